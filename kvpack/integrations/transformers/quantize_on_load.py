"""Quantization while loading: ``from_pretrained("Llama", quantization_config=KVPackConfig(bits=4.25))``.

The checkpoint's files are coded by :func:`kvpack.compress`, a tensor at a time, into a temporary directory, and the
loading goes on with these. So the weights are those of a compressed directory, byte for byte, whatever transformers
does to them afterwards: merged experts, renamed or tied tensors, devices, saving.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_utils import load_state_dict
from transformers.utils import logging

from kvpack.compression import coder_of, compress
from kvpack.encode.compress import CompressReport
from kvpack.encode.listing import listed
from kvpack.encode.model_config import CONFIG_NAME, QUANTIZATION_KEY, read_config
from kvpack.encode.model_directory import write_json
from kvpack.encode.progress import Progress
from kvpack.encode.quant_config import QuantConfig, pattern_list
from kvpack.errors import DeviceError, InputError
from kvpack.format.container import Container

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SUFFIX = ".safetensors"
_INDEXES = (f"{_SUFFIX}.index.json", ".bin.index.json")
_SHOWN = 2


class CodedCheckpoint:
    """The files of a checkpoint, coded, until :meth:`close`.

    Attributes:
        files: paths of the coded safetensors files, in the order of the original ones.
        quantization: what config.json of a compressed directory says under ``quantization_config``.
    """

    def __init__(self, directory: Path, files: list[str], quantization: dict[str, Any]) -> None:
        self.files, self.quantization = files, quantization
        # Where loading fails, and at the end of the process, too.
        self._remove = weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)

    def close(self) -> None:
        """Remove the files; what is loaded of them stays."""
        self._remove()


def code_checkpoint(
    model: PreTrainedModel,
    checkpoint_files: list[str] | None,
    config: QuantConfig,
    *,
    modules_to_not_convert: list[str] | None = None,
    device_map: Any = None,
) -> CodedCheckpoint:
    """Code the files of a checkpoint into a temporary directory.

    It takes the coded size on disk, where ``tempfile`` puts things (``TMPDIR``), until it is closed. Memory holds a
    few strips of one tensor and its blob.

    Args:
        model: into which they will be loaded; tells which modules there are.
        checkpoint_files: that transformers found, safetensors or pickles.
        modules_to_not_convert: names of modules whose weights stay as they are, on top of ``config.exclude``.
        device_map: as given to ``from_pretrained``. Where it names a GPU, the weights are coded there; the bytes are
            the same.

    Raises:
        InputError: there are no files, they are coded already, or a name or pattern matches nothing.
        FormatError: a file is damaged.
        OSError: reading failed, or writing the coded files.
    """
    if not checkpoint_files:
        raise InputError(
            "quantization while loading reads the checkpoint's files, and there are none (a state_dict was given?): "
            "kvpack.compress(state_dict, 'model.kvpack.safetensors') compresses tensors in memory"
        )
    directory = Path(tempfile.mkdtemp(prefix="kvpack-"))
    try:
        source = directory / "original"
        target = directory / "coded"
        _link(checkpoint_files, source, model)
        exclude = [*pattern_list(config.exclude), *_patterns_of(modules_to_not_convert or [], checkpoint_files, model)]
        config = replace(config, exclude=exclude or None)
        with _progress() as progress:
            report = compress(source, target, config, device=coding_device(device_map), progress=progress)
        shutil.rmtree(source)
        files = sorted(str(path) for path in target.glob(f"*{_SUFFIX}"))
        _tell(report)
        return CodedCheckpoint(directory, files, read_config(target)[QUANTIZATION_KEY])
    except BaseException as error:
        shutil.rmtree(directory, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            error.add_note(f"quantization while loading writes the coded files to {directory.parent}: TMPDIR moves it")
        raise


def _link(checkpoint_files: list[str], directory: Path, model: PreTrainedModel) -> None:
    """A model directory of these files alone: beside them there may be others, as a precision variant."""
    directory.mkdir()
    names = {Path(file).name for file in checkpoint_files}
    home = Path(checkpoint_files[0]).absolute().parent
    for file in checkpoint_files:
        (directory / Path(file).name).symlink_to(Path(file).absolute())
    for index in home.iterdir():
        if index.name.endswith(_INDEXES) and names.issuperset(_shards(index)):
            (directory / index.name).symlink_to(index)
    config = read_config(home) or model.config.to_dict()
    config.pop(QUANTIZATION_KEY, None)
    write_json(directory / CONFIG_NAME, config)


def _shards(index: Path) -> set[str]:
    found = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
    return set(found.values()) if isinstance(found, Mapping) else {""}


def _patterns_of(modules: list[str], checkpoint_files: list[str], model: PreTrainedModel) -> Iterator[str]:
    """A pattern of tensors' names for each module; none for one that has no tensors of its own, as a tied layer."""
    tensors = {tensor for file in checkpoint_files for tensor in _names_in(file)} if modules else set()
    base = f"{model.base_model_prefix}."
    for name in modules:
        # A checkpoint of the base model lacks its prefix.
        for candidate in dict.fromkeys((name, name.removeprefix(base))):
            pattern = rf"(^|\.){re.escape(candidate)}\."
            if any(re.search(pattern, tensor) for tensor in tensors):
                yield pattern
                break
        else:
            pattern = rf"(^|\.){re.escape(name)}(\.|$)"
            if not any(re.search(pattern, module) for module, _ in model.named_modules()):
                raise InputError(f"modules_to_not_convert: {name!r} is no module of {type(model).__name__}")


def _names_in(file: str) -> list[str]:
    if file.endswith(_SUFFIX):
        with Container(Path(file)) as container:
            return list(container.tensors)
    return list(load_state_dict(file, map_location="meta"))


def coding_device(device_map: Any) -> str:
    """Where to code: the GPU that the map names, if kvpack can use it, else the CPU."""
    placed = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    named = [f"cuda:{place}" if isinstance(place, int) else str(place) for place in placed if place is not None]
    if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        named = ["cuda"]
    device = next((name for name in named if name.startswith("cuda")), None)
    if device is None or not torch.cuda.is_available():
        return "cpu"
    try:
        coder_of(device)
    except DeviceError as error:
        _say(f"kvpack: the weights are coded on the CPU, which takes longer: {error}")
        return "cpu"
    return device


@contextmanager
def _progress() -> Iterator[Progress]:
    """transformers' own kind of bar, shown and hidden with its others."""
    bar = logging.tqdm(desc="Coding weights", unit="B", unit_scale=True)

    def total(size_bytes: int) -> None:
        bar.total = size_bytes
        bar.refresh()

    try:
        yield Progress(total=total, advance=bar.update)
    finally:
        bar.close()


def _say(line: str) -> None:
    if logging.is_progress_bar_enabled():
        print(line, file=sys.stderr)


def _tell(report: CompressReport) -> None:
    """One line: what it came to, what is kept and why, and what else there is to know."""
    kept: dict[str, list[str]] = {}
    for tensor in report.tensors:
        if tensor.method == "keep":
            kept.setdefault(tensor.reason or "", []).append(tensor.name)
    coded = sum(tensor.method != "keep" for tensor in report.tensors)
    parts = [f"kvpack: {coded} tensors coded"]
    if report.bits_per_weight is not None:
        parts[0] += f" at {report.bits_per_weight:.3f} bits a weight"
        parts[0] += f", noise {report.noise_db:.2f} dB" if report.noise_db is not None else ", exact"
    parts[0] += f" ({report.input_bytes / 1e6:.1f} → {report.output_bytes / 1e6:.1f} MB, {report.seconds:.1f} s)"
    if kept:
        parts.append("kept: " + ", ".join(f"{reason} ({listed(names, _SHOWN)})" for reason, names in kept.items()))
    _say("; ".join([*parts, *report.notes]))
