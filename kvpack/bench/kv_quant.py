"""``kvpack bench kv-quant``: quantizing and dequantizing whole matrices on a GPU, in all variants, against the CPU.

Before anything is timed, its bytes are checked: scales against those that the CPU makes of the columns' or rows'
maxima, codes and values of the naive kernels against the CPU's on the first rows, and the other variants against the
naive ones. How it is timed is said in :mod:`kvpack.bench.timing`, what comes out in
:mod:`kvpack.bench.kv_quant_report`.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvpack.bench import matrix_quantizer_reference as reference
from kvpack.bench import run as bench_run
from kvpack.bench.kv_quant_report import (
    NOTE,
    OTHER_WAYS,
    RANDOM_SOURCE,
    SCHEMA,
    Case,
    KvQuantOptions,
    Size,
    find_cpu,
)
from kvpack.bench.matrix_quantizer import (
    QuantizedMatrix,
    Variant,
    as_array,
    dequantize_matrix,
    quantize_matrix,
)
from kvpack.bench.matrix_quantizer_reference import Axis, parse_axis, parse_format
from kvpack.bench.report import Report, Row, finite
from kvpack.bench.run import BenchRun, Publish
from kvpack.bench.timing import Result, Timed, Work, copy_bandwidth, measure
from kvpack.encode.threads import default_threads
from kvpack.errors import InputError

DEVICE = "cuda"  # torch's current one; tests put the CPU here
SECTIONS = ("copy", "processor", "matrices", "quality")
COPY_BYTES = 1 << 32
# What is worked on in turn, together, unless that takes too many copies.
ROTATE_BYTES = 1_000_000_000
MAX_COPIES = 1024
CPU_ELEMENTS = 1 << 26  # of larger matrices the CPU takes the first rows
CPU_REPEATS = 3
QUERIES = 64
_QUALITY_ELEMENTS = 1 << 24  # of a chunk in fp32


class KvQuantBench(BenchRun):
    """One run; :meth:`run` returns its report."""

    def __init__(self, options: KvQuantOptions, publish: Publish | None, say: Callable[[str], None]) -> None:
        self.options = options
        self.threads = default_threads()
        self.kv = None if options.kv is None else load_matrices(Path(options.kv))
        self.generator = torch.Generator(device=DEVICE)
        self.generator.manual_seed(0)
        report = bench_run.new_report("bench-kv-quant", SCHEMA, NOTE, options.as_dict(), SECTIONS)
        super().__init__(report, options.time_limit_s, publish, say)

    def run(self) -> Report:
        """Measure everything; what time or the device did not allow is missing from the report."""
        with self._running():
            with self._stage("copy"):
                self.report["copy"] = [copy_bandwidth(COPY_BYTES)]
            if self.kv is not None:
                with self._stage("quality"):
                    self._real_quality(self.kv)
            for size in self.options.sizes:
                with self._stage(size.label):
                    self._size(size)
                gc.collect()
                torch.cuda.empty_cache()
        return self.report

    # --- speed -----------------------------------------------------------------

    def _size(self, size: Size) -> None:
        first = torch.randn(size, dtype=torch.float16, device=DEVICE, generator=self.generator)
        count = max(1, min(MAX_COPIES, math.ceil(ROTATE_BYTES / (2 * first.nbytes))))
        copies = [first, *(first.clone() for _ in range(count - 1))]
        sample = as_array(first[: max(1, CPU_ELEMENTS // size.columns)].cpu())
        for case in self.options.cases(size):
            self._check_time(f"{size.label}, {case.format} by {case.axis}")
            self._on_cpu(case, sample)
            self._case(case, copies, sample)
            if self.kv is None:
                self._quality(RANDOM_SOURCE, [first], case.format, case.axis)
            self._hand_out()

    def _on_cpu(self, case: Case, sample: np.ndarray[Any, Any]) -> None:
        """The reference on all threads, best of several runs."""
        times: dict[str, list[float]] = {"quantize": [], "dequantize": []}
        with ThreadPoolExecutor(self.threads) as executor:
            reference.quantize_matrix(sample[:64], case.format, case.axis)  # compiles
            for _ in range(CPU_REPEATS):
                began = time.perf_counter()
                quantized = reference.quantize_matrix(sample, case.format, case.axis, executor)
                times["quantize"].append(time.perf_counter() - began)
                began = time.perf_counter()
                reference.dequantize_matrix(quantized, np.float16, executor)
                times["dequantize"].append(time.perf_counter() - began)
        scale = case.size.rows / len(sample)
        self.report["processor"].append(
            {
                "rows": case.size.rows,
                "columns": case.size.columns,
                "format": case.format,
                "axis": case.axis,
                "threads": self.threads,
                "measured_rows": len(sample),
                "quantize_ms": 1e3 * scale * min(times["quantize"]),
                "dequantize_ms": 1e3 * scale * min(times["dequantize"]),
            }
        )

    def _measure(self, works: list[Work]) -> list[Timed]:
        options = self.options
        return measure(works, samples=options.samples, sample_ms=options.sample_ms, case_ms=options.case_ms)

    def _case(self, case: Case, copies: list[torch.Tensor], sample: np.ndarray[Any, Any]) -> None:
        """Check and time all variants, quantizing and dequantizing, in turns."""
        naive = quantize_matrix(copies[0], case.format, case.axis, Variant.NAIVE.name)
        wrong = differences(naive, copies[0], sample)

        def quantize(x: torch.Tensor, variant: str) -> Result:
            done = quantize_matrix(x, case.format, case.axis, variant)
            return done.codes, done.scales

        def error_of_part(out: torch.Tensor) -> float:
            return wrong + share_differing(out, naive.codes if out.dtype == torch.uint8 else naive.scales)

        names = [variant.name.lower() for variant in Variant]
        works = [Work([partial(quantize, x, name) for x in copies], error_of_part, 0.0) for name in names]
        quantized = self._measure(works)
        del works
        torch.cuda.empty_cache()

        values = dequantize_matrix(naive, variant=Variant.NAIVE.name)
        wrong_values = wrong + differing_values(naive, values, len(sample))
        twins = [
            QuantizedMatrix(
                naive.codes.clone(), naive.scales.clone(), naive.format, naive.axis, naive.columns, naive.dtype
            )
            for _ in copies
        ]

        def error_of_values(out: torch.Tensor) -> float:
            return wrong_values + share_differing(out, values)

        works = [
            Work([partial(dequantize_matrix, twin, None, name) for twin in twins], error_of_values, 0.0)
            for name in names
        ]
        dequantized = self._measure(works)
        least_bytes = copies[0].nbytes + naive.nbytes
        for name, forth, back in zip(names, quantized, dequantized, strict=True):
            self._row(case, name, forth, back, least_bytes, copies[0].nbytes)

    def _row(self, case: Case, variant: str, forth: Timed, back: Timed, least_bytes: int, matrix_bytes: int) -> None:
        bytes_per_us = 1e3 * self.report["copy"][-1]["gb_per_s"]
        bound_us = least_bytes / bytes_per_us
        once = (case.axis, variant) == (Axis.TOKEN, Variant.VECTORIZED.name.lower())
        again_us = 0.0 if once else matrix_bytes / bytes_per_us
        cpu = find_cpu(self.report, case)
        assert cpu is not None
        row: Row = {
            "rows": case.size.rows,
            "columns": case.size.columns,
            "format": case.format,
            "axis": case.axis,
            "variant": variant,
            "quantize": forth.as_dict(),
            "dequantize": back.as_dict(),
            "total_ms": (forth.us + back.us) / 1e3 if forth.us and back.us else None,
        }
        for work, timed in (("quantize", forth), ("dequantize", back)):
            row[f"{work}_fraction"] = bound_us / timed.us if timed.us else None
            row[f"{work}_speedup"] = 1e3 * cpu[f"{work}_ms"] / timed.us if timed.us else None
        row["quantize_moved_fraction"] = (bound_us + again_us) / forth.us if forth.us else None
        self.report["matrices"].append(row)

    # --- quality ---------------------------------------------------------------

    def _real_quality(self, matrices: list[torch.Tensor]) -> None:
        """All formats and both axes on keys of a model."""
        matrices = [matrix.to(DEVICE) for matrix in matrices]
        for page_format, axis in dict.fromkeys([("int8", "channel"), *OTHER_WAYS]):
            self._check_time(f"quality, {page_format} by {axis}")
            self._quality(Path(str(self.options.kv)).name, matrices, page_format, axis)

    def _quality(self, source: str, matrices: list[torch.Tensor], page_format: str, axis: str) -> None:
        """Errors of matrices of one shape: L2 over all, the largest, and of products with random queries their mean."""
        rows, columns = matrices[0].shape
        queries = torch.randn(QUERIES, columns, device=DEVICE, generator=self.generator)
        energy = norm = largest = products = 0.0
        step = max(1, _QUALITY_ELEMENTS // columns)
        for matrix in matrices:
            restored = dequantize_matrix(quantize_matrix(matrix, page_format, axis))
            for first in range(0, rows, step):
                part = matrix[first : first + step].float()
                error = restored[first : first + step].float() - part
                energy += error.square().sum(dtype=torch.float64).item()
                norm += part.square().sum(dtype=torch.float64).item()
                largest = max(largest, error.abs().max().item())
                products += (queries @ error.T).abs().sum(dtype=torch.float64).item()
        self.report["quality"].append(
            {
                "source": source,
                "matrices": len(matrices),
                "rows": rows,
                "columns": columns,
                "format": page_format,
                "axis": axis,
                "l2": math.sqrt(energy / len(matrices)),
                "relative_l2": math.sqrt(energy / norm) if norm else 0.0,
                "max_abs": largest,
                "attention": products / (len(matrices) * rows * QUERIES),
            }
        )


def share_differing(out: torch.Tensor, wanted: torch.Tensor) -> float:
    """The share of elements that are not those wanted; 1 if the sizes are not. NaN equals nothing."""
    if out.shape != wanted.shape:
        return 1.0
    return (out != wanted).count_nonzero().item() / wanted.numel()


def differences(quantized: QuantizedMatrix, x: torch.Tensor, sample: np.ndarray[Any, Any]) -> float:
    """What share of the scales, and of the first rows' codes, are not the CPU's."""
    page_format, axis = parse_format(quantized.format), parse_axis(quantized.axis)
    rows = len(sample)
    largest = x.abs().amax(0 if axis == Axis.CHANNEL else 1).float().cpu().numpy()
    scales = quantized.scales.cpu()
    wrong = share_differing(scales, torch.from_numpy(reference.scales_of(largest, page_format)))
    mine = scales.numpy() if axis == Axis.CHANNEL else scales.numpy()[:rows]
    with ThreadPoolExecutor(default_threads()) as executor:
        codes = reference.matrix_codes(sample, mine, page_format, axis, executor)
    return wrong + share_differing(quantized.codes[:rows].cpu(), torch.from_numpy(codes))


def differing_values(quantized: QuantizedMatrix, values: torch.Tensor, rows: int) -> float:
    """What share of the first rows' values are not the CPU's."""
    scales = quantized.scales if quantized.axis == Axis.CHANNEL else quantized.scales[:rows]
    first = QuantizedMatrix(
        quantized.codes[:rows].cpu(),
        scales.cpu(),
        quantized.format,
        quantized.axis,
        quantized.columns,
        quantized.dtype,
    )
    return share_differing(values[:rows].cpu(), dequantize_matrix(first))


def load_matrices(path: Path) -> list[torch.Tensor]:
    """Keys of an .npz file: its arrays whose names begin with K, of [..., T, D], as fp16 matrices of one shape.

    Raises:
        InputError: there are none, or their last two dimensions differ.
        OSError: the file cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as found:
            arrays = [found[name] for name in found.files if name.upper().startswith("K")]
    except ValueError as error:
        raise InputError(f"{path.name} is no .npz file of arrays: {error}") from None
    shapes = {array.shape[-2:] for array in arrays if array.ndim >= 2}
    if len(shapes) != 1 or any(array.ndim < 2 or not array.size for array in arrays):
        shown = ", ".join(str(array.shape) for array in arrays) or "none"
        raise InputError(f"{path.name}: arrays K [..., T, D] of one T and D are wanted; found: {shown}")
    matrices = [matrix for array in arrays for matrix in array.reshape(-1, *array.shape[-2:])]
    return [torch.from_numpy(np.ascontiguousarray(matrix, np.float16)) for matrix in matrices]


def bench_kv_quant(
    options: KvQuantOptions, publish: Publish | None = None, say: Callable[[str], None] = lambda stage: None
) -> Report:
    """Measure, and return the report (``kvpack.bench.kv_quant_report`` says what is in it).

    Args:
        publish: called with the report so far after each step.
        say: called with the name of each stage as it begins.

    Raises:
        DeviceError: there is no CUDA device, or no CuPy.
        InputError: ``options.kv`` is not a file of keys.
    """
    bench_run.require_cuda("kvpack bench kv-quant")
    with torch.no_grad():
        report: Report = finite(KvQuantBench(options, publish, say).run())
        return report
