"""``kvpack.compress``: ``kvpack.encode.compress``, with the device that it runs on, and for other inputs as well."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpack import conversion
from kvpack.encode.compress import CompressReport, default_output
from kvpack.encode.compress import compress as compress_with
from kvpack.encode.progress import Progress
from kvpack.encode.quant_config import QuantConfig
from kvpack.encode.tensor_encoder import CPU_CODER, Coder
from kvpack.encode.verify import Verification
from kvpack.encode.verify import verify as verify_with
from kvpack.errors import DeviceError, InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch


def coder_of(device: str | torch.device) -> Coder:
    """Who counts and codes on ``device``: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        DeviceError: there is no such device, or torch or CuPy is not installed.
    """
    if str(device) == "cpu":
        return CPU_CODER
    try:
        from kvpack.runtime.codec.encoder import device_coder
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "cupy"):
            raise
        raise DeviceError(
            f"device {str(device)!r} needs {error.name}, which is not installed: "
            "pip install 'kvpack[cuda13]' (or [cuda12]), or use device='cpu'"
        ) from None
    return device_coder(device)


def compress(
    path: str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str] | None = None,
    config: QuantConfig | None = None,
    *,
    threads: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    device: str | torch.device = "cpu",
    token_counts: npt.NDArray[np.int64] | None = None,
    moments: str | os.PathLike[str] | None = None,
    shards: tuple[int, int] | None = None,
    **settings: Any,
) -> CompressReport:
    """Compress a .safetensors file, a model directory, or tensors in memory.

    Checkpoints of torch (``.bin``, ``.pt``, ``.pth``) are read by torch's loader that runs no code, and so are those of
    a directory without any safetensors file; a ``.gguf`` file becomes a model directory, as far as transformers knows
    how. The output is what it would be for the same tensors in a safetensors file. ``notes`` of the report says what
    such an input had that the output has not.

    The same file comes from every device: on a GPU weights are quantized, counted and coded there, while what is
    summed in floating point to choose a step, or to measure the noise, stays with the CPU. With moments the file of the
    CPU is the same on every machine; that of a GPU is another one, of the same quality, the same on GPUs of a model
    with a CUDA version. It says what made it.

    Args:
        path: the input, or a mapping of names to tensors of torch (of any device and strides) or arrays of NumPy, as
            ``model.state_dict()``; each name gets its values, those of tied tensors too.
        out: the output; by default ``NAME.kvpack.safetensors`` or ``NAME-kvpack`` beside the input. Tensors in memory
            need it.
        config: the rate and all other options of :class:`kvpack.QuantConfig`; by default those of ``QuantConfig()``.
        threads: CPU threads; all cores by default.
        dry_run: do everything but write.
        force: replace an existing output; a directory that holds anything else is refused.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        token_counts: integers [vocabulary]: how often each token stands in a text like those that the model will see.
            Embeddings and output layers with so many rows, coded at a rate, are finer where tokens are frequent. A note
            names those with another number of rows.
        moments: a moments file of this model, which ``kvpack moments`` makes: what is quantized at a rate is quantized
            with feedback between columns, and steps follow the sensitivity of outputs. Embeddings and output layers of
            ``embeddings="code"`` share the rate by theirs.
        shards: ``(i, n)``: make part i, from 1 to n, of a model directory's output, whose whole files are divided among
            n processes, of one machine or of several that see the directory. The bytes are those of one run. Finished
            files wait in ``NAME.parts`` beside the output; the part that is ready last completes it. A part that was
            killed goes on when it is run again. All parts need the same source and options.
        settings: options of :class:`kvpack.QuantConfig` by name, in place of ``config``.

    Raises:
        MomentsError: the moments are damaged, or another model's.
        PartsMismatchError: a part has other options, or another source, than those made before.
        DamagedPartError: what another part has made is damaged; says which part makes it anew.
        TypeError: a setting is none of :class:`kvpack.QuantConfig`.
        InputError: the input, the output, the counts or the number of threads cannot be used, or a pattern matches no
            tensor.
        DeviceError: the device is not there, or something that it needs is not installed.
        NotInstalledError: a checkpoint of torch without torch, a GGUF file without the extra ``gguf``.
        FormatError: the input is damaged, or none of these.
        OSError: reading or writing failed; no output is left.

    Example::

        report = kvpack.compress("model.safetensors", bits=4.25, exclude="lm_head")
        print(report.ratio, report.noise_db)
    """
    if settings and config is not None:
        raise InputError(f"config, and {', '.join(settings)} beside it: make it part of the config")
    from kvpack.integrations.module_tree import kinds_by_module_tree

    options: dict[str, Any] = {
        "config": QuantConfig(**settings) if settings else config,
        "threads": threads,
        "dry_run": dry_run,
        "force": force,
        "progress": progress,
        "coder": coder_of(device),
        "module_tree": kinds_by_module_tree,
        "token_counts": token_counts,
        "moments": moments,
        "shards": shards,
    }
    if not isinstance(path, str | os.PathLike):
        if not isinstance(path, Mapping):
            raise InputError(f"a {type(path).__name__} is neither a path nor a mapping of names to tensors")
        if out is None:
            raise InputError("tensors in memory need the output's name: kvpack.compress(tensors, out)")
        file, notes = conversion.serialized_mapping(path)
        report = compress_with(file.path, out, file=file, **options)
        return replace(report, notes=[*notes, *report.notes])
    source = Path(path)
    if conversion.is_checkpoint(source):
        file, notes = conversion.serialized_checkpoint(source)
        report = compress_with(source, out, file=file, **options)
        return replace(report, notes=[*notes, *report.notes])
    target = default_output(source) if out is None else Path(out)
    if conversion.has_checkpoints_alone(source, target) or conversion.is_gguf_file(source):
        if shards is not None:
            raise InputError(
                f"shards: {source} is converted as a whole first, by each part: make safetensors files of it, with "
                "save_pretrained of transformers, and give these"
            )
        if target.exists() and not (force or dry_run):
            raise InputError(f"{target} exists already; --force (force=True) replaces it")
        with conversion.staged(source, target) as (directory, notes):
            report = compress_with(directory, target, **options)
        size_bytes = source.stat().st_size if source.is_file() else report.input_bytes
        ratio = round(size_bytes / report.output_bytes, 6)
        return replace(report, input=str(source), input_bytes=size_bytes, ratio=ratio, notes=[*notes, *report.notes])
    return compress_with(source, out, **options)


def verify(
    path: Path,
    against: Path | None = None,
    *,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Verification:
    """Check a compressed file or directory, and compare it with whatever :func:`compress` made it from.

    An original without safetensors is converted beside ``path`` first, as for compression; that goes away at the end.

    Raises:
        FormatError: corruption.
        InputError, NotInstalledError, OSError: ``against`` cannot be read.
    """
    if against is None:
        return verify_with(path, threads=threads, progress=progress)
    with conversion.as_safetensors(against, path) as original:
        return verify_with(path, original, threads=threads, progress=progress)
