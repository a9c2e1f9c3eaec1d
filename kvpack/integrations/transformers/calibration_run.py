"""How a calibration run goes over the windows of its text: layer after layer, or, where that cannot be, all at once.

Layer after layer: a decoder layer reads the hidden states of all windows, and these are kept in files at each border of
layers; then back, from the last layer to the first, with the layer's forward pass once more. So memory holds one layer
on the device. A stage of a run is one pass of all windows; its result is a file of the work directory.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.checkpoint import checkpoint

from kvpack.encode.progress import Progress
from kvpack.errors import InputError
from kvpack.integrations.transformers.calibration_work import WindowFile, WorkDirectory
from kvpack.integrations.transformers.layer_by_layer import LayerByLayer, NotLayerByLayerError, decoder_layers
from kvpack.integrations.transformers.own_samples import label_gradient, uniform
from kvpack.integrations.transformers.product_recorder import ProductRecorder, Sums, completed


@dataclass(frozen=True)
class Windows:
    """What a run reads, and where it keeps what it finds.

    Attributes:
        ids: i64 [windows, tokens].
        seed: of labels.
        work: where finished stages are.
        progress: told of tokens.
    """

    ids: torch.Tensor
    seed: int
    work: WorkDirectory
    progress: Progress

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Number and ids [1, tokens] of each window; tells of its tokens when it has been read."""
        for number, ids in enumerate(self.ids.split(1)):
            yield number, ids
            self.progress.advance(ids.shape[1])

    def label_gradient(self, window: int, logits: torch.Tensor) -> torch.Tensor:
        """d loss / d logits of a window, of labels that its number and the seed give: [1, tokens, vocabulary]."""
        return label_gradient(logits[0], uniform(logits.shape[1], "labels", self.seed, window))[None]

    def finish(self, stage: str, recorder: ProductRecorder) -> None:
        """Keep what a stage has found: means as they go to the moments file, and whose inputs are whose."""
        tensors = _means(recorder.found)
        for name, rows in recorder.looked_up.items():
            mean = completed(rows.gradient_moment) / rows.tokens
            tensors[f"gradient_moment/{name}"] = _finite(mean, f"gradients at rows of {name}").float().cpu()
        owners = {name: sums.owner for name, sums in recorder.found.items()}
        self.work.save(stage, tensors, {"owners": json.dumps(owners)})


class Run(Protocol):
    """A way to go over the windows."""

    @property
    def whole_model(self) -> str | None:
        """Why it has the whole model on the device; None: it has one layer."""

    def place(self) -> None:
        """Put the model where the run has it."""

    def check_room(self, output: Path, windows: int, sensitivities: bool) -> None:
        """Raises InputError where files of the work directory have no room."""

    def stages(self, sensitivities: bool) -> list[str]:
        """Names of its stages, in order. Those of ``backward…`` find gradients of what the others have found."""

    def do(self, stage: str, windows: Windows, sensitivities: bool) -> None:
        """Do a stage, those before it done."""


def plan_run(model: Any, sample: torch.Tensor, device: torch.device) -> Run:
    """Layer after layer where the model's layers can be run so, else all at once.

    Args:
        model: of transformers, on the CPU, in evaluation mode, its parameters without gradients.
        sample: i64 [windows, tokens], of which the first and the last tell.
    """
    try:
        return LayerRun(LayerByLayer(model, [sample[:1], sample[-1:]], device))
    except NotLayerByLayerError as error:
        return WholeRun(model, device, str(error))


class LayerRun:
    """Layer after layer."""

    whole_model: str | None = None

    def __init__(self, layers: LayerByLayer) -> None:
        self._layers = layers

    def place(self) -> None:
        """Layers on the CPU, the rest on the device."""
        self._layers.place()

    def check_room(self, output: Path, windows: int, sensitivities: bool) -> None:
        """Raises InputError where hidden states have no room beside the output."""
        borders = len(self._layers.names) + 2 if sensitivities else 2
        size = borders * windows * math.prod(self._layers.hidden_shape) * self._layers.hidden_dtype.itemsize
        free = shutil.disk_usage(output.resolve().parent).free
        if size > free:
            advice = "fewer --tokens, another -o or --no-sensitivities help"
            raise InputError(
                f"hidden states between layers take {size / 1e9:.2f} GB beside {output}, where {free / 1e9:.2f} GB are "
                f"free: {advice}"
            )

    def stages(self, sensitivities: bool) -> list[str]:
        """Layers forward, what comes behind them, layers back."""
        numbers = range(len(self._layers.names))
        backward = [f"backward-{number}" for number in reversed(numbers)] if sensitivities else []
        return [*(f"forward-{number}" for number in numbers), "head", *backward]

    def do(self, stage: str, windows: Windows, sensitivities: bool) -> None:
        """Do a stage."""
        kind, _, number = stage.partition("-")
        if kind == "forward":
            self._forward(int(number), windows, sensitivities)
        elif kind == "head":
            self._head(windows, sensitivities)
        else:
            self._backward(int(number), windows)

    def _file(self, windows: Windows, name: str) -> WindowFile:
        return windows.work.windows(name, self._layers.hidden_shape, self._layers.hidden_dtype)

    def _embed(self, windows: Windows) -> None:
        with self._file(windows, "hidden-0") as hidden:
            for window, ids in enumerate(windows.ids.split(1)):
                with torch.no_grad():
                    hidden.write(window, self._layers.first_hidden(ids))
        windows.work.finish("hidden-0")

    def _forward(self, number: int, windows: Windows, sensitivities: bool) -> None:
        layers, work = self._layers, windows.work
        windows.progress.tensor(f"layer {number + 1} of {len(layers.names)}")
        if number == 0 and not work.has("hidden-0"):
            self._embed(windows)
        before, after = f"hidden-{number}", f"hidden-{number + 1}"
        with self._file(windows, before) as given, self._file(windows, after) as made, layers.layer(number) as layer:
            recorder = ProductRecorder(layers.layer_tensors(number, layer.module))
            for window, _ in windows:
                with torch.no_grad(), recorder:
                    hidden = layer(given.read(window).to(layers.device))
                recorder.end_of_pass()
                made.write(window, hidden)
        work.finish(after)
        windows.finish(f"forward-{number}", recorder)
        if not sensitivities:
            work.remove(before)

    def _head(self, windows: Windows, sensitivities: bool) -> None:
        layers, work = self._layers, windows.work
        windows.progress.tensor("output layer")
        count = len(layers.names)
        recorder = ProductRecorder(layers.other_tensors(), squares=sensitivities)
        with ExitStack() as stack:
            given = stack.enter_context(self._file(windows, f"hidden-{count}"))
            made = stack.enter_context(self._file(windows, f"gradient-{count}")) if sensitivities else None
            for window, ids in windows:
                final = given.read(window).to(layers.device).requires_grad_(sensitivities)
                with torch.set_grad_enabled(sensitivities), recorder:
                    logits = layers.logits(ids, final)
                recorder.end_of_pass()
                if made is not None:
                    logits.backward(windows.label_gradient(window, logits.detach()))
                    assert final.grad is not None
                    made.write(window, final.grad)
        work.finish(f"gradient-{count}")
        windows.finish("head", recorder)
        work.remove(f"hidden-{count}")

    def _backward(self, number: int, windows: Windows) -> None:
        layers, work = self._layers, windows.work
        windows.progress.tensor(f"layer {number + 1} of {len(layers.names)}, back")
        behind, before = f"gradient-{number + 1}", f"gradient-{number}"
        with (
            self._file(windows, f"hidden-{number}") as given,
            self._file(windows, behind) as gradients,
            self._file(windows, before) as made,
            layers.layer(number) as layer,
        ):
            tensors = layers.layer_tensors(number, layer.module)
            embeddings = embedding_of(layers.model)
            recorder = ProductRecorder(tensors, moments=False, squares=True, embeddings=embeddings)
            for window, ids in windows:
                hidden = given.read(window).to(layers.device).requires_grad_()
                with torch.enable_grad(), recorder:
                    result = layer(hidden)
                recorder.end_of_pass()
                result.backward(gradients.read(window).to(layers.device))
                assert hidden.grad is not None
                made.write(window, hidden.grad)
                if number == 0:
                    with torch.enable_grad(), recorder:
                        first = layers.first_hidden(ids)
                    _back(first, hidden.grad)
        work.finish(before)
        windows.finish(f"backward-{number}", recorder)
        work.remove(behind)
        work.remove(f"hidden-{number}")


class WholeRun:
    """The whole model on the device, forward and back for each window; layers' forward passes are done twice for that.

    Args:
        why: the layers cannot be run one by one.
    """

    def __init__(self, model: Any, device: torch.device, why: str) -> None:
        self.whole_model: str | None = why
        self._model, self._device = model, device
        self.place()

    def place(self) -> None:
        """All on the device."""
        self._model.to(self._device)

    def check_room(self, output: Path, windows: int, sensitivities: bool) -> None:
        """Nothing but results is kept."""

    def stages(self, sensitivities: bool) -> list[str]:
        """All forward, all back."""
        return ["forward", "backward"] if sensitivities else ["forward"]

    def do(self, stage: str, windows: Windows, sensitivities: bool) -> None:
        """Do a stage."""
        windows.progress.tensor(f"whole model, {stage}")
        model, back = self._model, stage == "backward"
        recorder = ProductRecorder(
            dict(model.named_parameters()), moments=not back, squares=back, embeddings=embedding_of(model)
        )
        for window, ids in windows:
            given = ids.to(self._device)
            with torch.set_grad_enabled(back), self._checkpointed() if back else ExitStack():
                embedded = model.get_input_embeddings()(given).requires_grad_(back)
                with recorder, _returned_by(model.get_input_embeddings(), embedded):
                    logits = model(input_ids=given, use_cache=False).logits
                recorder.end_of_pass()
                if back:
                    logits.backward(windows.label_gradient(window, logits.detach()))
                    with recorder:
                        rows = model.get_input_embeddings()(given)
                    _back(rows, embedded.grad)
        windows.finish(stage, recorder)

    @contextmanager
    def _checkpointed(self) -> Iterator[None]:
        """Layers keep their inputs alone for the way back."""
        try:
            _, layers = decoder_layers(self._model)
        except NotLayerByLayerError:
            layers = []
        try:
            for layer in layers:
                layer.__dict__["forward"] = _twice(layer.forward)
            yield
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)


def embedding_of(model: Any) -> dict[str, torch.Tensor]:
    """The table in which a model looks tokens up, by its name in the model."""
    table = model.get_input_embeddings().weight
    return {name: tensor for name, tensor in model.named_parameters() if tensor is table}


def _back(result: torch.Tensor, gradient: torch.Tensor) -> None:
    """On to the rows that a result was made of, if these were looked up in a way that is known."""
    if result.requires_grad:
        result.backward(gradient)


def _twice(forward: Any) -> Any:
    return lambda *args, **keywords: checkpoint(forward, *args, use_reentrant=False, **keywords)


@contextmanager
def _returned_by(module: torch.nn.Module, value: torch.Tensor) -> Iterator[None]:
    """Let a module return this, so that gradients have where to begin."""
    handle = module.register_forward_hook(lambda *_: value)
    try:
        yield
    finally:
        handle.remove()


def _means(found: Mapping[str, Sums]) -> dict[str, torch.Tensor]:
    """On the host, by ``tokens/NAME`` i64 [matrices], ``second_moment/NAME/MATRIX`` f32 [K, K] and ``sensitivity/NAME``
    f32 [rows] or [matrices, rows]."""
    tensors: dict[str, torch.Tensor] = {}
    for name, sums in found.items():
        tokens = torch.tensor([sums.tokens.get(matrix, 0) for matrix in range(sums.matrices)])
        tensors[f"tokens/{name}"] = tokens
        for matrix, total in sums.second_moment.items():
            mean = completed(total) / max(1, sums.tokens[matrix])
            tensors[f"second_moment/{name}/{matrix}"] = _finite(mean, f"inputs of {name}").float().cpu()
        if sums.squares:
            squares = _finite(_mean_squares(sums, tokens), f"gradients at outputs of {name}")
            tensors[f"sensitivity/{name}"] = squares.cpu()
    return tensors


def _finite(values: torch.Tensor, what: str) -> torch.Tensor:
    if not values.isfinite().all():
        raise InputError(f"{what} are not finite: --dtype float32 may help, or the weights are at fault")
    return values


def _mean_squares(sums: Sums, tokens: torch.Tensor) -> torch.Tensor:
    """f32 [rows], or [matrices, rows]."""
    some = next(iter(sums.squares.values()))
    found = torch.zeros((sums.matrices, len(some)), dtype=torch.float64, device=some.device)
    for matrix, squares in sums.squares.items():
        found[matrix] = squares / max(1, int(tokens[matrix]))
    return (found if sums.tensor.ndim == 3 else found[0]).float()
