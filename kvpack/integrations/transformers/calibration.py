"""``kvpack moments``: a causal language model reads a text, and the moments of what its linears get are kept.

The run goes layer after layer: a decoder layer reads the hidden states of all windows, and these are kept in files at
each border of layers; then back, from the last layer to the first, with the layer's forward pass once more. So memory
holds one layer on the device, and a run that was ended goes on where its last finished layer was
(:mod:`kvpack.integrations.transformers.calibration_work`). The file is described in :mod:`kvpack.encode.moments`.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from kvpack._version import __version__
from kvpack.encode.moments import MomentsWriter
from kvpack.encode.progress import Progress
from kvpack.encode.reader import Reader
from kvpack.errors import InputError, NotSupportedError
from kvpack.integrations.transformers.calibration_text import DEFAULT_TOKENS, CalibrationText, read_text, window_tokens
from kvpack.integrations.transformers.calibration_work import WorkDirectory
from kvpack.integrations.transformers.causal_models import (
    check_directory,
    chosen_device,
    load_causal_model,
    peak_memory_bytes,
)
from kvpack.integrations.transformers.contexts import model_fingerprint
from kvpack.integrations.transformers.layer_by_layer import LayerByLayer, NotLayerByLayerError
from kvpack.integrations.transformers.product_recorder import ProductRecorder, Sums, completed
from kvpack.integrations.transformers_names import transformers_names
from kvpack.runtime.weights.checkpoint_names import CheckpointNames
from kvpack.runtime.weights.load import kept_shape

# Probabilities are taken to fp64 so many at a time.
_CHUNK_BYTES = 1 << 25

# Where a checkpoint's tensors go in a model, and their shapes.
_Named = tuple[CheckpointNames, dict[str, tuple[int, ...]]]


@dataclass(frozen=True)
class CalibrationReport:
    """What :func:`calibrate` did.

    Attributes:
        tensors: how many tensors of the checkpoint have moments.
        matrices: how many second moments the file has.
        tokens: that were read.
        untouched: matrices of experts that met no token.
        left_out: tensor of the model → why it has no moments.
        resumed: whether it went on from what an earlier run had left.
        peak_memory_bytes: see :func:`~kvpack.integrations.transformers.causal_models.peak_memory_bytes`.
        seconds: that the run took, without what an earlier one had done.
    """

    output: str
    output_bytes: int
    tensors: int
    matrices: int
    tokens: int
    windows: int
    window_tokens: int
    untouched: int
    left_out: dict[str, str]
    resumed: bool
    device: str
    dtype: str
    peak_memory_bytes: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """What ``kvpack moments --json`` prints, less when and with what it was made."""
        return {"ok": True, **asdict(self)}


def calibrate(
    directory: Path,
    text: Path,
    output: Path,
    *,
    tokens: int = DEFAULT_TOKENS,
    window: int | None = None,
    part: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    sensitivities: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    progress: Progress | None = None,
) -> CalibrationReport:
    """Have a model read a text, and write the moments of what its linears get.

    Args:
        directory: the model, not compressed.
        text: what it reads: text in UTF-8, a ``.jsonl`` file with ``{"text": …}`` a line, or token ids in a ``.npy``,
            ``.safetensors`` or ``.json`` file.
        output: the file to be made. A hidden directory beside it keeps what is finished of a run that was ended.
        tokens: how many it reads, in whole windows; fewer where the text has fewer.
        window: tokens of a window; 2048 by default, or the most that the model has positions for.
        part: of the text's tokens, from and to fractions of it.
        seed: of labels and samples.
        sensitivities: whether gradients are found too.
        progress: told tokens times passes through layers.

    Raises:
        InputError: the directory, the text or the output cannot be used.
        NotSupportedError: the model's layers cannot be run one by one.
    """
    progress, start = progress or Progress(), time.perf_counter()
    _check(directory, output, force)
    window = window_tokens(directory, window)
    calibration = read_text(directory, text, tokens=tokens, window=window, part=part)
    place = chosen_device(device)
    progress.tensor(f"loading {directory.name}")
    model = load_causal_model(directory, device="cpu", dtype=dtype)
    model.requires_grad_(False)
    run = _Run(model, calibration, output, seed, sensitivities, place, progress)
    names = _checkpoint_names(model, directory)
    with run.work:
        run.all()
        report = _write(run, names, output, start)
        run.work.delete()
    return report


def _check(directory: Path, output: Path, force: bool) -> None:
    """What can be said without the model's weights.

    Raises:
        InputError
    """
    check_directory(directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if method == "kvpack":
            raise InputError(
                f"{directory} is compressed, and moments are of the original: kvpack decompress makes an ordinary model"
            )
        raise InputError(f"{directory} has quantized weights ({method}): moments are of a model with plain numbers")
    if output.is_dir():
        raise InputError(f"{output} is a directory; the moments are one file")
    if output.exists() and not force:
        raise InputError(f"{output} exists already; --force (force=True) replaces it")
    if not output.resolve().parent.is_dir():
        raise InputError(f"the directory {output.parent} does not exist")


def _checkpoint_names(model: Any, directory: Path) -> _Named:
    """Where the checkpoint's tensors go in the model, and their shapes."""
    with Reader(directory, components=False) as reader:
        shapes = {name: kept_shape(reader.container(name).tensors[name]) for name in reader.main_keys()}
    names = transformers_names(model, shapes)
    assert names is not None, "a model of transformers"
    return names, shapes


def _uniform(seed: int, window: int, count: int) -> torch.Tensor:
    """fp64 [count] in 0 … 1, the same for a seed and a window on each machine."""
    digest = hashlib.sha256(f"labels {seed} {window}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.rand(count, dtype=torch.float64, generator=generator)


def _label_gradient(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """d loss / d logits [1, tokens, vocabulary] of loss = Σ −log p(label), with labels sampled by ``uniform``."""
    gradient = torch.empty_like(logits)
    rows = logits[0]
    step = max(1, _CHUNK_BYTES // (8 * rows.shape[-1]))
    for begin in range(0, len(rows), step):
        part = slice(begin, begin + step)
        share = rows[part].double().softmax(-1)
        summed = share.cumsum(-1)
        at = uniform[part, None].to(rows.device) * summed[:, -1:]
        labels = torch.searchsorted(summed, at).clamp_(max=rows.shape[-1] - 1)
        share.scatter_add_(-1, labels, torch.full_like(at, -1.0))
        gradient[0, part] = share.to(gradient.dtype)
    return gradient


def _saved(sums: Mapping[str, Sums]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What a work file has of products: means as they go to the moments file, and whose inputs are whose."""
    tensors: dict[str, torch.Tensor] = {}
    for name, one in sums.items():
        tokens = torch.tensor([one.tokens.get(matrix, 0) for matrix in range(one.matrices)])
        tensors[f"tokens/{name}"] = tokens
        for matrix, total in one.second_moment.items():
            mean = completed(total) / max(1, one.tokens[matrix])
            tensors[f"second_moment/{name}/{matrix}"] = mean.float().cpu()
        if one.squares:
            tensors[f"sensitivity/{name}"] = _mean_squares(one, tokens).cpu()
    return tensors, {name: one.owner for name, one in sums.items()}


def _mean_squares(sums: Sums, tokens: torch.Tensor) -> torch.Tensor:
    """f32 [rows], or [matrices, rows]."""
    some = next(iter(sums.squares.values()))
    found = torch.zeros((sums.matrices, len(some)), dtype=torch.float64, device=some.device)
    for matrix, squares in sums.squares.items():
        found[matrix] = squares / max(1, int(tokens[matrix]))
    return (found if sums.tensor.ndim == 3 else found[0]).float()


class _Run:
    """A calibration run: its stages, each left out if its result is in the work directory."""

    def __init__(
        self,
        model: Any,
        calibration: CalibrationText,
        output: Path,
        seed: int,
        sensitivities: bool,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.model, self.calibration, self.seed = model, calibration, seed
        self.sensitivities, self.device, self.progress = sensitivities, device, progress
        self.fingerprint = model_fingerprint(model)
        self.made = {
            **calibration.made,
            "seed": seed,
            "sensitivities": sensitivities,
            "device": device.type,
            "dtype": str(model.dtype).removeprefix("torch."),
            "config": self.fingerprint.config,
            "weights": self.fingerprint.weights,
            "kvpack": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        }
        windows = calibration.ids.split(1)
        try:
            self.layers = LayerByLayer(model, [windows[0], windows[-1]], device)
        except NotLayerByLayerError as error:
            raise NotSupportedError(f"{type(model).__name__} cannot be run layer by layer: {error}") from None
        self._check_room(output)
        digest = hashlib.sha256(calibration.ids.numpy().tobytes()).hexdigest()
        self.work = WorkDirectory(output, {**self.made, "ids": digest, "threads": torch.get_num_threads()})

    def _check_room(self, output: Path) -> None:
        borders = len(self.layers.names) + 2 if self.sensitivities else 2
        window_bytes = math.prod(self.layers.hidden_shape) * self.layers.hidden_dtype.itemsize
        size = borders * len(self.calibration.ids) * window_bytes
        free = shutil.disk_usage(output.resolve().parent).free
        if size > free:
            raise InputError(
                f"hidden states between layers take {size / 1e9:.2f} GB beside {output}, where {free / 1e9:.2f} GB are "
                "free: fewer --tokens, another -o or --no-sensitivities help"
            )

    @property
    def stages(self) -> list[str]:
        """Names of the work files, in order."""
        forward = [f"forward-{number}" for number in range(len(self.layers.names))]
        backward = [f"backward-{number}" for number in reversed(range(len(self.layers.names)))]
        return [*forward, "head", *(backward if self.sensitivities else [])]

    def all(self) -> None:
        """Run what is not finished."""
        stages = self.stages
        self.progress.total(len(stages) * self.calibration.ids.numel())
        if not self.work.has("forward-0"):
            self._embed()
        for stage in stages:
            kind, _, number = stage.partition("-")
            if self.work.has(stage):
                self.progress.advance(self.calibration.ids.numel())
            elif kind == "forward":
                self._forward(int(number))
            elif kind == "head":
                self._head()
            else:
                self._backward(int(number))

    def _windows(self, name: str) -> Any:
        return self.work.windows(name, self.layers.hidden_shape, self.layers.hidden_dtype)

    def _done(self, stage: str, recorder: ProductRecorder) -> None:
        tensors, owners = _saved(recorder.found)
        self.work.save(stage, tensors, {"owners": json.dumps(owners)})

    def _read(self) -> Iterator[int]:
        """Windows, one after the other; tells of their tokens when they have been read."""
        for window in range(len(self.calibration.ids)):
            yield window
            self.progress.advance(self.calibration.ids.shape[1])

    def _embed(self) -> None:
        with self._windows("hidden-0") as hidden:
            for window, ids in enumerate(self.calibration.ids):
                hidden.write(window, self.layers.first_hidden(ids[None]))
        self.work.finish("hidden-0")

    def _forward(self, number: int) -> None:
        self.progress.tensor(self.layers.names[number])
        before, after = f"hidden-{number}", f"hidden-{number + 1}"
        with self._windows(before) as given, self._windows(after) as made, self.layers.layer(number) as layer:
            recorder = ProductRecorder(self.layers.layer_tensors(number, layer.module))
            for window in self._read():
                with torch.no_grad(), recorder:
                    states = layer(given.read(window).to(self.device))
                recorder.end_of_pass()
                made.write(window, states)
        self.work.finish(after)
        self._done(f"forward-{number}", recorder)
        if not self.sensitivities:
            self.work.remove(before)

    def _head(self) -> None:
        self.progress.tensor("output layer")
        count = len(self.layers.names)
        inside = {id(tensor) for layer in self.layers.layers for tensor in layer.parameters()}
        outside = {name: tensor for name, tensor in self.model.named_parameters() if id(tensor) not in inside}
        recorder = ProductRecorder(outside, squares=self.sensitivities)
        with self._windows(f"hidden-{count}") as given, self._windows(f"gradient-{count}") as made:
            for window in self._read():
                ids = self.calibration.ids[window : window + 1]
                final = given.read(window).to(self.device).requires_grad_(self.sensitivities)
                with torch.set_grad_enabled(self.sensitivities), recorder:
                    logits = self.layers.logits(ids, final)
                recorder.end_of_pass()
                if self.sensitivities:
                    uniform = _uniform(self.seed, window, ids.shape[1])
                    logits.backward(_label_gradient(logits.detach(), uniform))
                    made.write(window, final.grad)
        if self.sensitivities:
            self.work.finish(f"gradient-{count}")
        self._done("head", recorder)
        self.work.remove(f"hidden-{count}")

    def _backward(self, number: int) -> None:
        self.progress.tensor(f"{self.layers.names[number]}, back")
        behind, before = f"gradient-{number + 1}", f"gradient-{number}"
        with (
            self._windows(f"hidden-{number}") as given,
            self._windows(behind) as gradients,
            self._windows(before) as made,
            self.layers.layer(number) as layer,
        ):
            tensors = self.layers.layer_tensors(number, layer.module)
            recorder = ProductRecorder(tensors, moments=False, squares=True)
            for window in self._read():
                states = given.read(window).to(self.device).requires_grad_()
                with torch.enable_grad(), recorder:
                    result = layer(states)
                recorder.end_of_pass()
                result.backward(gradients.read(window).to(self.device))
                if number:
                    made.write(window, states.grad)
        self.work.finish(before)
        self._done(f"backward-{number}", recorder)
        self.work.remove(behind)
        self.work.remove(f"hidden-{number}")


@dataclass
class _Found:
    """Where in the work directory the numbers of a tensor of the model are."""

    second_moment: str
    sensitivity: str | None
    owner: str


def _write(run: _Run, named: _Named, output: Path, start: float) -> CalibrationReport:
    """Put the moments file together from the stages' files."""
    files = {stage: run.work.open(stage) for stage in run.stages}
    found: dict[str, _Found] = {}
    for stage, file in files.items():
        if stage.startswith("backward"):
            for name in json.loads(file.metadata()["owners"]):
                found[name].sensitivity = stage
        else:
            for name, owner in json.loads(file.metadata()["owners"]).items():
                squares = stage if f"sensitivity/{name}" in file.keys() else None  # noqa: SIM118
                found[name] = _Found(stage, squares, owner)
    places = _Places.of(*named, run.model, found)
    inputs: dict[str, str] = {}
    untouched = matrices = 0
    with MomentsWriter(output) as writer:
        for place in places.found:
            one = found[place.tensor]
            tokens = files[one.second_moment].get_tensor(f"tokens/{place.tensor}")
            key = places.key(one.owner, place)
            if key not in inputs.values():
                owner = files[found[one.owner].second_moment]
                chosen = range(len(tokens)) if place.matrix is None else [place.matrix]
                size = _inputs(owner, one.owner)
                whole = place.matrix is None and places.dimensions[place.tensor] == 3
                shape = (len(tokens), size, size) if whole else (size, size)
                of_key = tokens if place.matrix is None else tokens[place.matrix : place.matrix + 1]
                writer.add_second_moment(
                    key, shape, (_second_moment(owner, one.owner, at, size) for at in chosen), of_key.numpy()
                )
                untouched += int((of_key == 0).sum())
                matrices += len(of_key)
            inputs[place.name] = key
        for place in places.found:
            one = found[place.tensor]
            if one.sensitivity is not None and f"sensitivity/{place.tensor}" in files[one.sensitivity].keys():  # noqa: SIM118
                values = files[one.sensitivity].get_tensor(f"sensitivity/{place.tensor}")
                if place.matrix is not None:
                    values = values[place.matrix][slice(*place.rows)]
                writer.add_sensitivity(place.name, values.numpy())
        counts = np.bincount(
            run.calibration.ids.numpy().reshape(-1), minlength=run.model.get_input_embeddings().weight.shape[0]
        )
        shapes = {place.name: list(named[1][place.name]) for place in places.found}
        made = {**run.made, "shapes": shapes, "left_out": places.left_out}
        size_bytes = writer.finish(inputs, counts.astype(np.int64), made)
    return CalibrationReport(
        output=str(output),
        output_bytes=size_bytes,
        tensors=len(inputs),
        matrices=matrices,
        tokens=run.calibration.ids.numel(),
        windows=len(run.calibration.ids),
        window_tokens=run.calibration.ids.shape[1],
        untouched=untouched,
        left_out=places.left_out,
        resumed=run.work.resumed,
        device=str(run.device),
        dtype=str(run.made["dtype"]),
        peak_memory_bytes=peak_memory_bytes(run.device),
        seconds=time.perf_counter() - start,
    )


def _inputs(file: Any, name: str) -> int:
    """K of a tensor of the model whose second moments are in a work file."""
    some = next(key for key in file.keys() if key.startswith(f"second_moment/{name}/"))  # noqa: SIM118
    return int(file.get_slice(some).get_shape()[0])


def _second_moment(file: Any, name: str, matrix: int, size: int) -> Any:
    key = f"second_moment/{name}/{matrix}"
    if key in file.keys():  # noqa: SIM118
        return file.get_tensor(key).numpy()
    return np.zeros((size, size), np.float32)


@dataclass(frozen=True)
class _Place:
    """A tensor of the checkpoint, and where in the model's it is: all of it, or rows of one of its matrices."""

    name: str
    tensor: str
    matrix: int | None = None
    rows: tuple[int, int] = (0, 0)


@dataclass
class _Places:
    """Tensors of the checkpoint that have moments.

    Attributes:
        dimensions: tensor of the model → how many.
        left_out: tensor of the model → why it has none.
    """

    dimensions: dict[str, int]
    found: list[_Place] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    _keys: dict[tuple[str, int | None], str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, names: CheckpointNames, shapes: Mapping[str, Sequence[int]], model: Any, found: Mapping[str, _Found]
    ) -> _Places:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        aliases: dict[int, list[str]] = {}
        for name, tensor in parameters.items():
            aliases.setdefault(id(tensor), []).append(name)
        places = cls({name: parameters[name].ndim for name in found})
        conversions = {target: conversion for conversion in names.conversions for target in conversion.shapes}
        for name in found:
            direct = [names.direct[alias] for alias in aliases[id(parameters[name])] if alias in names.direct]
            conversion = conversions.get(name)
            if direct:
                places.found += [_Place(of_file, name) for of_file in dict.fromkeys(direct)]
            elif conversion is not None and conversion.experts is not None:
                for matrix, parts in enumerate(conversion.experts):
                    at = 0
                    for part in parts:
                        places.found.append(_Place(part, name, matrix, (at, at := at + shapes[part][0])))
            else:
                places.left_out[name] = "not in the checkpoint" if conversion is None else conversion.what
        return places

    def key(self, owner: str, place: _Place) -> str:
        """Of the inputs of a tensor: the name of the first one that has them."""
        return self._keys.setdefault((owner, place.matrix), place.name)
