"""``kvpack compress`` and ``kvpack decompress``."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpack.cli.failures import exit_codes, require_transformers
from kvpack.cli.options import Force, Json, Source, Threads
from kvpack.cli.printing import (
    counted,
    data_console,
    print_tensors,
    printable,
    progress_bar,
    shown_names,
    shown_number,
    shown_size,
)
from kvpack.encode.rates import DEFAULT_BITS, LOSSLESS, MAX_BITS, MIN_BITS

if TYPE_CHECKING:
    from kvpack.encode.compress import CompressReport
    from kvpack.encode.model_directory import FileReport
    from kvpack.encode.quant_config import QuantConfig
    from kvpack.integrations.transformers.calibrated_compression import CalibratedReport


class LayoutOption(StrEnum):
    """Names for --layout."""

    AUTO = "auto"
    COMPACT = "compact"
    BALANCED = "balanced"
    FAST = "fast"


class PresetOption(StrEnum):
    """Names for --preset."""

    NEAR_LOSSLESS = "near-lossless"
    INT8_ROW = "int8-row"
    LOSSLESS = "lossless"


class QuantizerOption(StrEnum):
    """Names for --quantizer."""

    SCALAR = "scalar"
    TRELLIS = "trellis"


class DeviceOption(StrEnum):
    """Names for --device."""

    CPU = "cpu"
    CUDA = "cuda"


class AllocationOption(StrEnum):
    """Names for --allocation."""

    AUTO = "auto"
    TENSOR = "tensor"
    MODEL = "model"
    SENSITIVITY = "sensitivity"


class DtypeOption(StrEnum):
    """Names for --dtype."""

    ORIGINAL = "original"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


def _parse_tensor_bits(values: list[str] | None) -> dict[str, float | str]:
    rates: dict[str, float | str] = {}
    for value in values or []:
        pattern, separator, bits = value.rpartition("=")
        try:
            rates[pattern] = bits if bits == LOSSLESS else float(bits)
        except ValueError:
            separator = ""
        if not separator or not pattern:
            raise typer.BadParameter(f"{value!r} is not REGEX=BITS", param_hint="--tensor-bits")
    return rates


def _parse_embeddings(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value


def _parse_shards(value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    number, separator, parts = value.partition("/")
    if not (separator and number.isdecimal() and parts.isdecimal()):
        raise typer.BadParameter(f"{value!r} is not I/N, a part of N, as 1/4", param_hint="--shards")
    return int(number), int(parts)


def _calibrated(
    source: Path,
    output: Path | None,
    config: QuantConfig,
    text: Path,
    tokens: int,
    seed: int,
    threads: int | None,
    device: DeviceOption,
    dry_run: bool,
    force: bool,
    moments: Path | None,
    shards: tuple[int, int] | None,
) -> CalibratedReport:
    """What ``--calibrate`` does; ``self`` is no file."""
    from kvpack.errors import InputError

    if shards is not None:
        raise InputError(
            "--shards and --calibrate exclude each other, as each part would find moments of its own: kvpack moments "
            "makes a file of them once, and --moments gives it to each part"
        )
    if moments is not None:
        raise InputError("--moments and --calibrate exclude each other: one reads moments, the other finds them")
    if dry_run:
        raise InputError("--dry-run and --calibrate exclude each other: the check on tokens held back reads the output")
    require_transformers("kvpack compress --calibrate")
    from kvpack.integrations.transformers.calibration_inputs import check_calibrated_compression

    text_file = None if str(text) == "self" else text
    check_calibrated_compression(source, output, config, text_file, force=force)
    from kvpack.integrations.transformers.calibrated_compression import compress_calibrated

    return compress_calibrated(
        source,
        output,
        config,
        text=text_file,
        tokens=tokens,
        seed=seed,
        threads=threads,
        coding_device=device.value,
        force=force,
        stage=progress_bar,
    )


def _outcome(report: CompressReport) -> str:
    """What there is now."""
    if report.part is None:
        return "dry run: nothing was written" if report.output is None else f"wrote {report.output}"
    part = report.part
    if part.was_there:
        return f"part {part.number}/{part.of}: {report.output} is there already, made with the same settings"
    found = f", {len(part.found)} of them made before" if part.found else ""
    done = f"part {part.number}/{part.of}: {counted(len(part.files), 'file')}{found}"
    if part.joined:
        return f"{done}; all parts are there: wrote {report.output}"
    missing = ", ".join(f"{number}/{part.of}" for number in part.missing_parts)
    return f"{done}; {counted(len(part.missing), 'file')} still missing, of parts {missing}"


def compress(
    source: Source,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="OUT", help="Default: NAME.kvpack.safetensors or NAME-kvpack."),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(
            "--bits",
            help=f"Bits a weight, {MIN_BITS} to {MAX_BITS}, every overhead counted; above, exact where that fits. "
            f"Default: {DEFAULT_BITS}.",
        ),
    ] = None,
    preset: Annotated[PresetOption | None, typer.Option("--preset", help="Instead of a rate.")] = None,
    layout: Annotated[LayoutOption, typer.Option("--layout", help="How weights become symbols.")] = (LayoutOption.AUTO),
    quantizer: Annotated[
        QuantizerOption,
        typer.Option("--quantizer", help="Round weights one by one, or choose a column's together: mostly less noise."),
    ] = QuantizerOption.SCALAR,
    tile_cols: Annotated[
        int | None,
        typer.Option("--tile-cols", help="Columns of a tile: a multiple of 32 up to 2048."),
    ] = None,
    tensor_parallel: Annotated[
        int,
        typer.Option(
            "--tensor-parallel", metavar="N", help="Devices that will share the weights: tiles end where parts do."
        ),
    ] = 1,
    stack: Annotated[
        bool, typer.Option("--stack", help="Same tiles and tables for q, k, v (gate, up): one launch for them all.")
    ] = False,
    allocation: Annotated[
        AllocationOption,
        typer.Option(
            "--allocation",
            help="The rate for each tensor, one step for the model, or steps by sensitivity: the default with moments.",
        ),
    ] = AllocationOption.AUTO,
    moments: Annotated[
        Path | None,
        typer.Option("--moments", metavar="FILE", help="What kvpack moments found of this model: far less damage."),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option("--include", metavar="REGEX", help="Code these names too; repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="REGEX", help="Keep these names as they are; repeatable.")
    ] = None,
    tensor_bits: Annotated[
        list[str] | None,
        typer.Option("--tensor-bits", metavar="REGEX=BITS", help="A rate of their own, or lossless; repeatable."),
    ] = None,
    embeddings: Annotated[
        str,
        typer.Option(
            "--embeddings", metavar="keep|code|BITS", help="Token embeddings and output layers: kept, or coded."
        ),
    ] = "keep",
    calibrate: Annotated[
        Path | None,
        typer.Option(
            "--calibrate",
            metavar="TEXT",
            help="Find such moments first, on a text, and check the result on its end. self: on text of the model's.",
        ),
    ] = None,
    calibration_tokens: Annotated[
        int, typer.Option("--calibration-tokens", min=1, metavar="N", help="How many tokens --calibrate reads.")
    ] = 131_072,
    seed: Annotated[int, typer.Option("--seed", help="Of what --calibrate draws.")] = 0,
    shards: Annotated[
        str | None,
        typer.Option(
            "--shards", metavar="I/N", help="Part I of N of a directory's files; the last one completes the output."
        ),
    ] = None,
    threads: Threads = None,
    device: Annotated[
        DeviceOption,
        typer.Option("--device", help="Where weights are coded; the output is the same, but with moments."),
    ] = DeviceOption.CPU,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report, but write nothing.")] = False,
    force: Force = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Print a line for each coded tensor too.")] = False,
    as_json: Json = False,
) -> None:
    """Compress a .safetensors file or a model directory; or a .bin, .pt, .pth or .gguf file.

    Embeddings and output layers (without --embeddings), norms, routers, biases,
    other parameters and small tensors are kept as they are, and so are the
    scales of what is quantized already (the report lists them). Of a directory every file comes
    along, subfolders too; hidden files and weights in other forms than
    safetensors do not, and are named.
    """
    with exit_codes(as_json):
        from kvpack.compression import compress as run
        from kvpack.encode.quant_config import QuantConfig

        config = QuantConfig(
            bits=bits,
            preset=None if preset is None else preset.value,
            layout=layout.value,
            quantizer=quantizer.value,
            tile_cols=tile_cols,
            tensor_parallel=tensor_parallel,
            stack=stack,
            allocation=allocation.value,
            include=include,
            exclude=exclude,
            tensor_bits=_parse_tensor_bits(tensor_bits),
            embeddings=_parse_embeddings(embeddings),
        )
        part_of = _parse_shards(shards)
        calibrated = None
        if calibrate is not None:
            calibrated = _calibrated(
                source,
                output,
                config,
                calibrate,
                calibration_tokens,
                seed,
                threads,
                device,
                dry_run,
                force,
                moments,
                part_of,
            )
            report = calibrated.compression
        else:
            with progress_bar("compress") as progress:
                report = run(
                    source,
                    output,
                    config,
                    threads=threads,
                    dry_run=dry_run,
                    force=force,
                    progress=progress,
                    device=device.value,
                    moments=moments,
                    shards=part_of,
                )
    if as_json:
        print(json.dumps((calibrated or report).as_dict(), allow_nan=False))
        return
    console = data_console()
    if verbose:
        print_tensors([vars(tensor) for tensor in report.tensors], kept_singly=False)
    otherwise: dict[tuple[str, str], list[str]] = {}
    for tensor in report.tensors:
        if tensor.reason is not None:
            done = {"keep": "kept", "lossless": "coded exactly"}.get(tensor.method, "coded at another rate")
            otherwise.setdefault((done, tensor.reason), []).append(tensor.name)
    for (done, reason), names in otherwise.items():
        console.print(f"{done} ({reason}): {shown_names(names)}", markup=False, highlight=False)
    told: dict[tuple[str, str], list[FileReport]] = {}
    for file in report.files:
        if file.reason is not None:
            told.setdefault((file.action, file.reason), []).append(file)
    for (action, reason), files in told.items():
        size = shown_size(sum(file.size_bytes for file in files))
        line = f"{action} ({reason}): {shown_names([file.path for file in files])}, {size}"
        console.print(line, markup=False, highlight=False)
    for note in report.notes:
        console.print(printable(note), markup=False, highlight=False)
    coded = ""
    if report.bits_per_weight is not None:
        coded = f"; coded tensors {report.bits_per_weight:.3f} bits a weight"
        coded += f", noise {shown_number(report.noise_db)} dB" if report.noise_db is not None else ", exact"
    if calibrated is not None:
        kept = calibrated.held_out_kl[calibrated.allocation]
        said = {"sensitivity": "steps by sensitivity", "tensor": "equal rates", "model": "one step"}
        others = [
            f"; {kl.value:.5f} with {said[allocation]}"
            for allocation, kl in calibrated.held_out_kl.items()
            if allocation != calibrated.allocation
        ]
        console.print(
            f"KL on {calibrated.held_out_tokens} tokens held back: {kept.value:.5f} nats a token with "
            f"{said[calibrated.allocation]}, kept{''.join(others)}",
            highlight=False,
        )
    # A GGUF file has its embedding in few bits; it is kept in 16 here.
    ratio = f"{report.ratio:.2f} times smaller" if report.ratio >= 1 else f"{1 / report.ratio:.2f} times larger"
    console.print(
        f"{shown_size(report.input_bytes)} → {shown_size(report.output_bytes)}, {ratio}{coded}; {report.seconds:.1f} s",
        highlight=False,
    )
    console.print(_outcome(report), markup=False, highlight=False)


def decompress(
    source: Source,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Where to write.")],
    dtype: Annotated[
        DtypeOption, typer.Option("--dtype", help="Float type of the coded tensors.")
    ] = DtypeOption.ORIGINAL,
    threads: Threads = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write ordinary safetensors back."""
    with exit_codes(as_json):
        from kvpack.encode.decompress import decompress as run

        with progress_bar("decompress") as progress:
            report = run(source, output, dtype=dtype, threads=threads, force=force, progress=progress)
    if as_json:
        print(json.dumps(report.as_dict()))
        return
    print(
        f"{counted(report.tensors, 'tensor')}, {shown_size(report.input_bytes)} → {shown_size(report.output_bytes)} "
        f"in {report.seconds:.1f} s\nwrote {report.output}"
    )
    if report.left_out:
        print(f"left out (hidden, or nothing to copy): {shown_names(report.left_out)}")
