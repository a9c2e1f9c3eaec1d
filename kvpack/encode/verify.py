"""``kvpack verify``: check the tensors of a model, each byte and lane, and all of them against the original."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kvpack.encode.blob_decoder import check_element_limit, verify_tiles
from kvpack.encode.dtypes import NUMPY_DTYPES, as_float32
from kvpack.encode.file_comparison import compare_files
from kvpack.encode.fp8 import dequantize_tree, find_fp8
from kvpack.encode.model_tree import ModelTree
from kvpack.encode.reader import Reader
from kvpack.encode.tensor_encoder import noise_db
from kvpack.format.container import NUMBER_DTYPES

# The recorded noise is rounded to 10^-4 dB.
NOISE_TOLERANCE_DB = 0.001

Progress = Callable[[int], None]


@dataclass
class Verification:
    """What was checked.

    Attributes:
        bytes_without_checksum: stored bytes in which ``against`` alone finds damage: tensors that are kept as they
            are, and scales, of a file that gives no CRCs for them (§9.3).
        mismatches: tensor, or file of a directory, → what differs from the original.
        files: how many files of a directory were compared.
        left_out: files of the original directory that compress leaves out → why.
        extra_files: those that the original directory does not have.
    """

    tensors: int = 0
    coded: int = 0
    tiles: int = 0
    elements: int = 0
    bytes_without_checksum: int = 0
    compared: bool = False
    mismatches: dict[str, str] = field(default_factory=dict)
    files: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    extra_files: list[str] = field(default_factory=list)


def verify(
    path: str | Path,
    against: str | Path | None = None,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check structure, CRCs and every lane; with ``against`` also that the original is reproduced.

    Lossless and kept tensors must be equal bit for bit; quantized ones must have the noise that was recorded. Of two
    directories every file is compared, but those that compress leaves out.

    Args:
        progress: called with stored bytes as they are done.

    Raises:
        FormatError: corruption.
    """
    result = Verification(compared=against is not None)
    with Reader(path, threads=threads) as reader:
        for name in reader:
            result.tensors += 1
            container = reader.container(name)
            plain = [name + suffix for suffix in NUMBER_DTYPES] if name in container.coded else [name]
            for stored in plain:
                if stored in container.tensors and not container.check_crc32(stored):
                    result.bytes_without_checksum += container.tensors[stored].size_bytes
            if name not in container.coded:
                if progress:
                    progress(container.tensors[name].size_bytes)
                continue
            blob = reader.blob(name)
            result.coded += 1
            try:
                check_element_limit(blob, reader.max_elements)
                for elements in verify_tiles(blob, reader._executor):
                    result.tiles += 1
                    result.elements += elements
            except ValueError as error:
                error.args = (f"{container.path}, tensor {name!r}: {error}",)
                raise
            if progress:
                progress(len(blob.buffer))
        if against is not None:
            with ModelTree(Path(against), without=Path(path)) as tree:
                dequantized_folders = _as_coded(tree, reader)
                original = Reader(against, threads=threads, tree=tree)
                if Path(path).is_dir() and Path(against).is_dir():
                    files = compare_files(reader.tree, tree, dequantized_folders)
                    result.mismatches |= files.differences
                    result.files = files.compared
                    result.left_out = {file.path: str(file.reason) for file in files.left_out}
                    result.extra_files = files.extra
                with original:
                    for name in sorted({*reader.keys(), *original.keys()}):
                        difference = _difference(name, reader, original)
                        if difference:
                            result.mismatches[name] = difference
    return result


def changed_tensors(
    path: Path, against: Path, files: Collection[Path], *, threads: int | None = None
) -> dict[str, str]:
    """Of what some files of a directory were made of, what is no longer as :func:`verify` wants it.

    Args:
        files: those of ``against``, relative to it.

    Returns:
        Tensor → what differs.
    """
    chosen = {against / file for file in files}
    with Reader(path, threads=threads) as reader, ModelTree(against, without=path) as tree:
        _as_coded(tree, reader)
        with Reader(against, threads=threads, tree=tree) as original:
            names = [name for name in original if original.container(name).path in chosen]
            found = {name: _difference(name, reader, original) for name in names}
    return {name: difference for name, difference in found.items() if difference}


def _as_coded(tree: ModelTree, reader: Reader) -> set[Path]:
    """Let those of the original's sets of weights be seen without fp8 scales that ``reader``'s model has so.

    Returns:
        Folders whose config.json then says nothing of a quantization.
    """
    sets = {
        prefix: fp8
        for prefix, fp8 in find_fp8(tree).items()
        if any(name in reader and reader.dtype(name) == "BF16" for name in fp8.weights)
    }
    dequantize_tree(tree, sets)
    return {fp8.config_folder for fp8 in sets.values() if fp8.config_folder is not None}


def _difference(name: str, reader: Reader, original: Reader) -> str | None:
    """What differs between a tensor and its original, or None."""
    if name not in original:
        return "is not in the original"
    if name not in reader:
        return "is missing"
    source = original.container(name).tensors.get(name)
    if source is None:
        return "is coded in the file to compare with"
    info = reader.info(name)
    if info is None:
        kept = reader.container(name).tensors[name]
        if (kept.dtype, kept.shape) != (source.dtype, source.shape):
            return f"is {kept.dtype} {list(kept.shape)}, the original {source.dtype} {list(source.shape)}"
        ours, theirs = reader.container(name).pieces(name), original.container(name).pieces(name)
        same = all(map(np.array_equal, ours, theirs))
        return None if same else "its bytes differ"
    if (info.dtype, info.shape) != (source.dtype, source.shape):
        return f"was {info.dtype} {list(info.shape)}, the original is {source.dtype} {list(source.shape)}"
    if reader.container(name).scales(name) is None:
        bits = np.ascontiguousarray(reader.dequantize(name, "original")).view(np.uint8).reshape(-1).data
        at, same = 0, bits.nbytes == source.size_bytes
        for piece in original.container(name).pieces(name) if same else ():
            same &= np.array_equal(bits[at : at + len(piece)], piece)
            at += len(piece)
        return None if same else "its bits differ"
    measured = measured_noise_db(reader, original, name)
    recorded = info.power_noise_db
    if (measured is None) != (recorded is None) or (
        measured is not None and recorded is not None and abs(measured - recorded) > NOISE_TOLERANCE_DB
    ):
        return f"noise is {_decibels(measured)}, recorded {_decibels(recorded)}"
    return None


def _decibels(noise: float | None) -> str:
    return "none" if noise is None else f"{noise:.4f} dB"


def measured_noise_db(reader: Reader, original: Reader, name: str) -> float | None:
    """10·log10(Σ(w − ŵ)² / Σw²) in f64, None where that is not finite."""
    decoded = reader.dequantize(name, "float32")
    noise = signal = 0.0
    container = original.container(name)
    source = container.tensors[name]
    dtype = NUMPY_DTYPES[source.dtype]
    decoded = decoded.reshape(-1, source.shape[-1])
    row_bytes = source.shape[-1] * dtype.itemsize
    for first in range(0, len(decoded), 256):
        rows = decoded[first : first + 256]
        stored = container.read(name, first * row_bytes, (first + len(rows)) * row_bytes)
        w = as_float32(np.frombuffer(stored, dtype).reshape(rows.shape)).astype(np.float64)
        error = w - rows
        noise += float(np.vdot(error, error))
        signal += float(np.vdot(w, w))
    return noise_db([(noise, signal)])
