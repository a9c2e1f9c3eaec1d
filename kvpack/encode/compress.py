"""What ``kvpack.compress`` does: whole files and model directories, a tensor at a time.

Memory holds one tensor's blob and a few strips, whatever the model's size; sources are mapped. Outputs are
written beside their place and renamed at the end, files and directories alike.
"""

from __future__ import annotations

import json
import math
import os
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kvpack.encode.blob_decoder import element_limit
from kvpack.encode.dtypes import NUMPY_DTYPES
from kvpack.encode.fp8 import DequantizedContainer, dequantized_config, find_fp8
from kvpack.encode.model_directory import (
    CONFIG_NAME,
    compressed_config,
    copy_files,
    directory_in_place,
    other_files,
    read_config,
    refuse_other_files,
    size_bytes,
    write_json,
)
from kvpack.encode.nearest import CommonPlan, EncodeOptions, encode_nearest
from kvpack.encode.output_files import Shard, check_target, pieces, write_shard_index
from kvpack.encode.progress import Progress
from kvpack.encode.quant_config import QuantConfig
from kvpack.encode.rate import FineHistogram
from kvpack.encode.reader import INDEX_NAME, locate_tensors, shard_paths
from kvpack.encode.selection import Selection, TensorKinds, quantization_notes
from kvpack.encode.tensor_encoder import (
    CPU_CODER,
    Coder,
    EncodedTensor,
    Matrices,
    NotEncodableError,
    encode_lossless,
    measure,
    plan_at_common_step,
    planned_bytes,
)
from kvpack.encode.tensor_kinds import ModuleTree
from kvpack.encode.threads import default_threads
from kvpack.errors import InputError
from kvpack.format.container import (
    BLOB_SUFFIX,
    CONTAINER_VERSION,
    CRC_KEY,
    SCALE_SUFFIX,
    TENSORS_KEY,
    VARIANCE_NOISE_KEY,
    VERSION_KEY,
    Container,
    ContainerWriter,
    StoredTensor,
)

_SCALE_BYTES = 4
_STEP_CORRECTIONS = 4
_STEP_MARGIN_BITS = 0.005


@dataclass
class TensorReport:
    """One tensor of the output.

    ``reason`` says why it is kept, or why it is not coded as was asked for. Kept tensors: method ``keep``, and null for
    what does not apply. ``noise_db`` is over the variance where the mean matters, else over the power (FORMAT.md §9.3).
    """

    name: str
    shape: list[int]
    dtype: str
    method: str
    layout: str | None
    bits_per_weight: float
    entropy_bits: float | None
    noise_db: float | None
    outliers: int
    bytes: int
    reason: str | None = None


@dataclass
class CompressReport:
    """What a compression gave.

    ``bits_per_weight`` and ``noise_db`` are those of the coded tensors (the noise: the mean of the quantized tensors'
    ratios, weighted by size); ``left_out`` names other files with weights that were not carried over;
    ``notes`` are sentences on how it was found out what the tensors are, and on other quantizations, fp8 among them.
    """

    input: str
    output: str | None
    input_bytes: int
    output_bytes: int
    ratio: float
    bits_per_weight: float | None
    noise_db: float | None
    seconds: float
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tensors: list[TensorReport] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {"ok": True, **asdict(self)}


def default_output(source: Path) -> Path:
    """``model.safetensors`` → ``model.kvpack.safetensors``, ``dir`` → ``dir-kvpack``."""
    source = Path(os.path.abspath(source))  # beside a symbolic link, not beside what it points to
    if source.is_dir():
        return source.with_name(source.name + "-kvpack")
    return source.with_name(source.name.removesuffix(".safetensors") + ".kvpack.safetensors")


def _as_array(container: Container, tensor: StoredTensor) -> np.ndarray[Any, np.dtype[Any]]:
    data = container.data(tensor.name)
    return np.frombuffer(data, NUMPY_DTYPES[tensor.dtype]).reshape(tensor.shape)


class _Model:
    """The sources of a compression: containers, what to do with each tensor, and the common step if there is one."""

    def __init__(
        self,
        source: Path,
        config: QuantConfig,
        executor: ThreadPoolExecutor,
        coder: Coder,
        module_tree: ModuleTree | None,
    ) -> None:
        self.source, self.config, self.executor, self.coder = source, config, executor, coder
        self.selection = Selection.from_config(config)
        self.containers: list[Container] = []
        try:
            for path in shard_paths(source):
                self.containers.append(Container(path))
            for container in self.containers:
                if container.coded:
                    raise InputError(f"{container.path} is compressed already")
            self.fp8 = find_fp8(self.containers, read_config(source) if source.is_dir() else {})
            self.dequantizes_fp8 = bool(self.fp8.weights) and bool(config.dequantize_fp8)
            if self.dequantizes_fp8:
                self.containers = [DequantizedContainer(container, self.fp8) for container in self.containers]
            names = locate_tensors(self.containers)
        except BaseException:
            self.close()
            raise
        for option, pattern in self.selection.patterns():
            if not any(pattern.search(name) for name in names):
                raise InputError(f"{option} {pattern.pattern!r} matches no tensor's name")
        tensors = {name: tensor for container in self.containers for name, tensor in container.tensors.items()}
        # Where every bit stays, it does not matter what a tensor is.
        tree = None if self.selection.lossless and not self.selection.tensor_bits else module_tree
        self.kinds = TensorKinds.of(tensors, self.source_config, tree)

    @property
    def source_config(self) -> dict[str, Any]:
        """config.json of the source, as it is true of the weights that are coded."""
        config = read_config(self.source) if self.source.is_dir() else {}
        return dequantized_config(config) if self.dequantizes_fp8 else config

    def close(self) -> None:
        for container in self.containers:
            container.close()

    @property
    def total_bytes(self) -> int:
        return sum(t.size_bytes for c in self.containers for t in c.tensors.values())

    def matrices(self, container: Container, tensor: StoredTensor) -> Matrices:
        array = _as_array(container, tensor)
        return Matrices(array, transposed=tensor.name in self.kinds.transposed)

    def common_step_tensors(self) -> list[tuple[Container, StoredTensor]]:
        selection = self.selection
        return [
            (container, tensor)
            for container in self.containers
            for tensor in container.tensors.values()
            if selection.reason_to_keep(tensor, self.kinds) is None
            and selection.is_lossy(tensor, self.kinds)
            and not selection.has_own_rate(tensor.name)
        ]

    def encode(self, container: Container, tensor: StoredTensor, plan: CommonPlan | None) -> EncodedTensor:
        """One tensor by whatever method the options say."""
        config, selection = self.config, self.selection
        weights = self.matrices(container, tensor)
        if not selection.is_lossy(tensor, self.kinds):
            return encode_lossless(weights, tensor.dtype, config.tile_cols, config.layout, self.executor, self.coder)
        return encode_nearest(
            weights,
            tensor.dtype,
            selection.quality_of(tensor.name),
            plan,
            EncodeOptions(config.layout, config.tile_cols, self.executor, self.coder),
        )


def _common_step_plans(model: _Model, progress: Progress) -> dict[str, CommonPlan]:
    """One step for all tensors, such that together they take the rate (equal slope: least total squared error)."""
    config, bits = model.config, model.selection.bits
    assert bits is not None
    measured: list[tuple[StoredTensor, Matrices, FineHistogram]] = []
    for container, tensor in model.common_step_tensors():
        progress.tensor(tensor.name)
        weights = model.matrices(container, tensor)
        try:
            fine = measure(weights, model.executor)
        except NotEncodableError:
            continue
        if fine.rms > 0:
            measured.append((tensor, weights, fine))
    if not measured:
        return {}
    total = sum(weights.size for _, weights, _ in measured)

    def plans_at(step: float) -> tuple[float, dict[str, CommonPlan]]:
        plans = {
            tensor.name: (fine, plan_at_common_step(weights, fine, step, config.layout, config.tile_cols))
            for tensor, weights, fine in measured
        }
        used = sum(plans[tensor.name][1].predicted.bits * weights.size for tensor, weights, _ in measured)
        return used / total, plans

    smallest = min(fine.rms for _, _, fine in measured)
    largest = max(fine.rms for _, _, fine in measured)
    low, high = math.log2(smallest) - 8, math.log2(largest) + 3

    def solve(target: float) -> dict[str, CommonPlan]:
        under, over = low, high
        _, plans = plans_at(2.0**over)
        for _ in range(14):
            middle = (under + over) / 2
            used, trial = plans_at(2.0**middle)
            if used > target:
                under = middle
            else:
                over, plans = middle, trial
        return plans

    aim = bits
    best: tuple[float, dict[str, CommonPlan]] | None = None
    for _ in range(_STEP_CORRECTIONS):
        plans = solve(aim)
        # The histograms leave table rounding out; a pass over the weights counts what the tensors really take.
        counted = 0.0
        for tensor, weights, _ in measured:
            try:
                counted += planned_bytes(weights, *plans[tensor.name], config.tile_cols, model.executor, model.coder)
            except NotEncodableError:  # it will be kept; the others get their rate as if it were not
                counted += bits * weights.size / 8
        achieved = 8 * counted / total
        if achieved <= bits and (best is None or achieved > best[0]):
            best = achieved, plans
        if bits - 2 * _STEP_MARGIN_BITS <= achieved <= bits:
            break
        aim += bits - _STEP_MARGIN_BITS - achieved
    return plans if best is None else best[1]


def _encode_container(
    model: _Model,
    container: Container,
    plans: dict[str, CommonPlan],
    writer: ContainerWriter | None,
    progress: Progress,
    reports: list[TensorReport],
) -> tuple[dict[str, str], Shard]:
    """Encode one file's tensors into ``writer`` (None: a dry run); returns its metadata and its contents."""
    selection = model.selection
    entries: dict[str, dict[str, Any]] = {}
    crc32: dict[str, int] = {}
    shard = Shard(container.path.name, [], 0, {})
    kept: list[tuple[StoredTensor, str]] = []
    scales: list[tuple[str, np.ndarray[Any, np.dtype[np.float32]]]] = []

    def add(name: str, dtype: str, shape: list[int], *parts: memoryview) -> None:
        if writer is not None:
            writer.add(name, dtype, shape, (piece for part in parts for piece in pieces(part)))
        shard.stored_names.append(name)
        shard.stored_bytes += sum(map(len, parts))

    for tensor in container.tensors.values():
        reason = selection.reason_to_keep(tensor, model.kinds)
        if reason is not None:
            kept.append((tensor, reason))
            continue
        progress.tensor(tensor.name)
        try:
            encoded = model.encode(container, tensor, plans.get(tensor.name))
        except NotEncodableError as error:
            kept.append((tensor, str(error)))
            continue
        if encoded.size_bytes >= tensor.size_bytes:
            kept.append((tensor, "coding does not make it smaller"))
            continue
        if math.prod(tensor.shape) > element_limit(encoded.blob.size_bytes):
            kept.append((tensor, "nearly all equal: readers refuse to expand so much from so few bytes"))
            continue
        name = tensor.name
        blob = encoded.blob
        add(name + BLOB_SUFFIX, "U8", [blob.size_bytes], memoryview(blob.front), memoryview(blob.payload))
        shard.blob_bytes[name] = blob.size_bytes
        if encoded.scales is not None:
            scales.append((name + SCALE_SUFFIX, np.ascontiguousarray(encoded.scales, "<f4")))
        elements = math.prod(tensor.shape)
        report = TensorReport(
            name=name,
            shape=list(tensor.shape),
            dtype=tensor.dtype,
            method=encoded.method,
            layout=encoded.layout.name,
            bits_per_weight=round(8 * encoded.size_bytes / elements, 6),
            entropy_bits=round(encoded.blob.entropy_bits_per_element, 6),
            noise_db=_rounded(encoded.noise_db if encoded.variance_noise_db is None else encoded.variance_noise_db),
            outliers=encoded.blob.outlier_count,
            bytes=encoded.size_bytes,
            reason=encoded.reason,
        )
        reports.append(report)
        entries[name] = {
            key: getattr(report, key)
            for key in (
                "shape", "dtype", "method", "layout", "bits_per_weight", "entropy_bits", "noise_db", "outliers"
            )
        }  # fmt: skip
        entries[name]["noise_db"] = _rounded(encoded.noise_db)
        if encoded.variance_noise_db is not None:
            entries[name][VARIANCE_NOISE_KEY] = report.noise_db
        progress.advance(tensor.size_bytes)

    def add_scales() -> None:
        for name, values in scales:
            data = values.data.cast("B")
            crc32[name] = zlib.crc32(data)
            add(name, "F32", [len(values)], data)
        scales.clear()

    # Widest dtypes first, so that each tensor stays aligned to its own size behind blobs of 16-byte multiples.
    for tensor, reason in sorted(kept, key=lambda item: (-_alignment(item[0]), item[0].begin)):
        if _alignment(tensor) <= _SCALE_BYTES:
            add_scales()
        progress.tensor(tensor.name)
        data = container.data(tensor.name)
        crc32[tensor.name] = zlib.crc32(data)
        add(tensor.name, tensor.dtype, list(tensor.shape), data)
        elements = math.prod(tensor.shape)
        reports.append(
            TensorReport(
                name=tensor.name,
                shape=list(tensor.shape),
                dtype=tensor.dtype,
                method="keep",
                layout=None,
                bits_per_weight=8 * tensor.size_bytes / elements if elements else 0.0,
                entropy_bits=None,
                noise_db=None,
                outliers=0,
                bytes=tensor.size_bytes,
                reason=reason,
            )
        )
        progress.advance(tensor.size_bytes)
    add_scales()
    metadata = dict(container.metadata)
    metadata[VERSION_KEY] = CONTAINER_VERSION
    metadata[TENSORS_KEY] = json.dumps(entries, separators=(",", ":"))
    metadata[CRC_KEY] = json.dumps(crc32, separators=(",", ":"))
    return metadata, shard


def _rounded(decibels: float | None) -> float | None:
    return None if decibels is None else round(decibels, 4)


def _alignment(tensor: StoredTensor) -> int:
    dtype = NUMPY_DTYPES.get(tensor.dtype)
    return dtype.itemsize if dtype is not None else 1


def compress(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    config: QuantConfig | None = None,
    *,
    threads: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    coder: Coder = CPU_CODER,
    module_tree: ModuleTree | None = None,
) -> CompressReport:
    """Compress a .safetensors file or a model directory: see :func:`kvpack.compress`.

    Args:
        coder: who counts and codes; whoever it is, the bytes are the same.
        module_tree: who says what a directory's tensors are where their names leave doubt; None: names alone do.

    Raises:
        InputError: the input, the output or the number of threads cannot be used.
        FormatError: the input is damaged.
        OSError: reading or writing failed; no output is left.
    """
    began = time.perf_counter()
    progress = progress or Progress()
    source = Path(path)
    config = QuantConfig() if config is None else config
    target = Path(out) if out is not None else default_output(source)
    check_target(source, target, force=force or dry_run)
    carried, left_out = other_files(source, target) if source.is_dir() else ([], [])
    if threads is not None and threads < 1:
        raise InputError(f"{threads} threads: at least 1 is needed")
    reports: list[TensorReport] = []
    executor = ThreadPoolExecutor(threads or default_threads())
    try:
        model = _Model(source, config, executor, coder, module_tree)
        try:
            progress.total(model.total_bytes)
            # What comes along counts on both sides of the ratio; other forms of the weights on neither.
            if source.is_dir() and not dry_run:
                shards = [Path(c.path.name) for c in model.containers]
                refuse_other_files(target, [Path(CONFIG_NAME), *shards, *carried])
            own = [source / name for name in (CONFIG_NAME, INDEX_NAME) if source.is_dir() and (source / name).exists()]
            input_files = [c.path for c in model.containers] + own + [source / file for file in carried]
            input_bytes = sum(file.stat().st_size for file in input_files)
            coded = {c.path.resolve() for c in model.containers}
            left_out = [file for file in left_out if (source / file).resolve() not in coded]
            plans = {}
            if config.allocation == "model" and config.bits is not None:
                plans = _common_step_plans(model, progress)
            if source.is_dir():
                output_bytes = _compress_directory(
                    model, source, target, plans, progress, reports, carried, dry_run=dry_run
                )
            else:
                output_bytes = _compress_file(model, target, plans, progress, reports, dry_run=dry_run)
        finally:
            model.close()
    finally:
        executor.shutdown(cancel_futures=True)
    return _report(
        source,
        None if dry_run else target,
        input_bytes,
        output_bytes,
        reports,
        [str(file) for file in left_out if not file.name.endswith(".index.json")],
        [
            *model.kinds.notes,
            *model.fp8.notes(asked=bool(config.dequantize_fp8)),
            *quantization_notes(report.reason for report in reports),
        ],
        time.perf_counter() - began,
    )


def _report(
    source: Path,
    target: Path | None,
    input_bytes: int,
    output_bytes: int,
    reports: list[TensorReport],
    left_out: list[str],
    notes: list[str],
    seconds: float,
) -> CompressReport:
    coded = [report for report in reports if report.method != "keep"]
    weights = sum(math.prod(report.shape) for report in coded)
    noise = [(math.prod(report.shape), 10 ** (report.noise_db / 10)) for report in coded if report.noise_db is not None]
    noisy = sum(size for size, _ in noise)
    return CompressReport(
        input=str(source),
        output=None if target is None else str(target),
        input_bytes=input_bytes,
        output_bytes=output_bytes,
        ratio=round(input_bytes / output_bytes, 6),
        bits_per_weight=round(8 * sum(r.bytes for r in coded) / weights, 6) if weights else None,
        noise_db=(round(10 * math.log10(sum(size * ratio for size, ratio in noise) / noisy), 4) if noise else None),
        seconds=round(seconds, 3),
        left_out=left_out,
        notes=notes,
        tensors=sorted(reports, key=lambda report: report.name),
    )


def _file_bytes(metadata: dict[str, str], shard: Shard) -> int:
    """About what a file takes that a dry run does not write."""
    header = sum(len(name) + 80 for name in shard.stored_names)
    return 8 + shard.stored_bytes + header + sum(map(len, metadata.values()))


def _compress_file(
    model: _Model,
    target: Path,
    plans: dict[str, CommonPlan],
    progress: Progress,
    reports: list[TensorReport],
    *,
    dry_run: bool,
) -> int:
    """Write (or only count) the output of the model's single file; returns its size."""
    with nullcontext() if dry_run else ContainerWriter(target) as writer:
        metadata, shard = _encode_container(model, model.containers[0], plans, writer, progress, reports)
        if writer is not None:
            return writer.finish(metadata)
        return _file_bytes(metadata, shard)


def _compress_directory(
    model: _Model,
    source: Path,
    target: Path,
    plans: dict[str, CommonPlan],
    progress: Progress,
    reports: list[TensorReport],
    carried: list[Path],
    *,
    dry_run: bool,
) -> int:
    shards: list[Shard] = []
    if dry_run:
        return sum((source / file).stat().st_size for file in carried) + sum(
            _file_bytes(*_encode_container(model, container, plans, None, progress, reports))
            for container in model.containers
        )
    with directory_in_place(target) as temporary:
        for container in model.containers:
            with ContainerWriter(temporary / container.path.name) as writer:
                metadata, shard = _encode_container(model, container, plans, writer, progress, reports)
                writer.finish(metadata)
            shards.append(shard)
        if (source / INDEX_NAME).exists() or len(shards) > 1:
            write_shard_index(temporary, shards)
        blob_bytes = {name: size for shard in shards for name, size in shard.blob_bytes.items()}
        write_json(temporary / CONFIG_NAME, compressed_config(model.source_config, model.config.to_json(), blob_bytes))
        copy_files(source, temporary, carried)
        return size_bytes(temporary)
