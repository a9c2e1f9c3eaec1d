"""What can be said of a calibration's inputs and outputs before torch is loaded, and a model."""

from __future__ import annotations

from pathlib import Path

from kvpack.encode.compress import default_output
from kvpack.encode.model_directory import refuse_other_files
from kvpack.encode.moments import check_moments_output
from kvpack.encode.output_files import check_target
from kvpack.encode.quant_config import QuantConfig
from kvpack.errors import InputError
from kvpack.integrations.transformers.model_configuration import model_configuration


def check_run(directory: Path, text: Path | None, part: tuple[float, float]) -> None:
    """Whether a calibration run can begin.

    Raises:
        InputError: the model is none, or has no plain numbers; the text is no file, or the part none of a text.
    """
    if quantization := model_configuration(directory).get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if method == "kvpack":
            raise InputError(
                f"{directory} is compressed, and moments are of the original: name the directory that it was made of, "
                "or, where that is gone, one that kvpack decompress makes of this"
            )
        raise InputError(f"{directory} has quantized weights ({method}): moments are of a model with plain numbers")
    if text is not None and text.is_dir():
        raise InputError(f"{text} is a directory: the text is one file, in UTF-8, or of token ids")
    if text is not None and not text.exists():
        raise InputError(f"{text} does not exist: the text is a file in UTF-8, or of token ids")
    begin, end = part
    if not 0 <= begin < end <= 1:
        raise InputError(f"--from {begin} and --to {end} name no part of a text: 0 ≤ from < to ≤ 1")


def check_moments_run(
    directory: Path, text: Path | None, output: Path, part: tuple[float, float], *, force: bool
) -> None:
    """Whether ``kvpack moments`` can begin. Raises InputError."""
    check_run(directory, text, part)
    check_moments_output(output, text, force=force)


def check_calibrated_compression(
    directory: Path,
    out: Path | None,
    config: QuantConfig,
    text: Path | None,
    part: tuple[float, float] = (0.0, 1.0),
    *,
    force: bool,
) -> None:
    """Whether ``kvpack compress --calibrate`` can begin. Raises InputError."""
    if directory.is_file():
        raise InputError(f"{directory}: calibration runs a model, so it needs its directory, with config.json and all")
    if config.bits is None:
        raise InputError(f"preset {config.preset!r} and calibration exclude each other: moments serve a rate")
    target = default_output(directory) if out is None else out
    check_target(directory, target, force=force)
    check_run(directory, text, part)
    refuse_other_files(target, [path.relative_to(directory) for path in directory.rglob("*")])
