"""``kvpack.compress``: ``kvpack.encode.compress``, with the device that it runs on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from kvpack.encode.compress import CompressReport
from kvpack.encode.compress import compress as compress_with
from kvpack.encode.progress import Progress
from kvpack.encode.quant_config import QuantConfig
from kvpack.encode.tensor_encoder import CPU_CODER, Coder
from kvpack.errors import DeviceError, InputError

if TYPE_CHECKING:
    import torch


def coder_of(device: str | torch.device) -> Coder:
    """Who counts and codes on ``device``: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        DeviceError: there is no such device, or torch or CuPy is not installed.
    """
    if str(device) == "cpu":
        return CPU_CODER
    try:
        from kvpack.runtime.weights.encoder import device_coder
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "cupy"):
            raise
        raise DeviceError(
            f"device {str(device)!r} needs {error.name}, which is not installed: "
            "pip install 'kvpack[cuda13]' (or [cuda12]), or use device='cpu'"
        ) from None
    return device_coder(device)


def compress(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    config: QuantConfig | None = None,
    *,
    threads: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    device: str | torch.device = "cpu",
    **settings: Any,
) -> CompressReport:
    """Compress a .safetensors file or a model directory.

    The same file comes from every device: on a GPU weights are quantized, counted and coded there, while what is
    summed in floating point to choose a step, or to measure the noise, stays with the CPU.

    Args:
        out: the output; by default ``NAME.kvpack.safetensors`` or ``NAME-kvpack`` beside the input.
        config: the rate and all other options of :class:`kvpack.QuantConfig`; by default those of ``QuantConfig()``.
        threads: CPU threads; all cores by default.
        dry_run: do everything but write.
        force: replace an existing output; a directory that holds anything else is refused.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        settings: options of :class:`kvpack.QuantConfig` by name, in place of ``config``.

    Raises:
        TypeError: a setting is none of :class:`kvpack.QuantConfig`.
        InputError: the input, the output or the number of threads cannot be used, or a pattern matches no tensor.
        DeviceError: the device is not there, or something that it needs is not installed.
        FormatError: the input is damaged.
        OSError: reading or writing failed; no output is left.

    Example::

        report = kvpack.compress("model.safetensors", bits=4.25, exclude="lm_head")
        print(report.ratio, report.noise_db)
    """
    if settings and config is not None:
        raise InputError(f"config, and {', '.join(settings)} beside it: make it part of the config")
    from kvpack.integrations.module_tree import kinds_by_module_tree

    return compress_with(
        path,
        out,
        QuantConfig(**settings) if settings else config,
        threads=threads,
        dry_run=dry_run,
        force=force,
        progress=progress,
        coder=coder_of(device),
        module_tree=kinds_by_module_tree,
    )
