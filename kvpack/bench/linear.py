"""``kvpack bench linear``: products with coded weights on a GPU against dense and quantized ones, in one run.

Every configuration is checked against float64 before it is timed (poisoned outputs, and again afterwards); how it is
timed is said in :mod:`kvpack.bench.timing`, what comes out in :mod:`kvpack.bench.report`. A peer that
is absent or fails is a line of the report. The report is handed out after each step, so that a run that is cut short
leaves what it has measured.
"""

from __future__ import annotations

import copy
import gc
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from kvpack.bench import peers as bench_peers
from kvpack.bench import run as bench_run
from kvpack.bench.report import (
    HUMMING,
    MAX_BITS,
    NOTE,
    SCHEMA,
    SPECIFICATION_SHAPE,
    LinearBenchOptions,
    Report,
    Row,
    Shape,
    choose_best,
    evaluate_specification,
    evaluate_targets,
    finite,
)
from kvpack.bench.run import BenchRun, Publish
from kvpack.bench.timing import (
    Result,
    Timed,
    Work,
    copy_bandwidth,
    differing,
    measure,
    relative_error,
    synchronize_or_stop,
)
from kvpack.encode.blob_encoder import encode_elements
from kvpack.encode.threads import default_threads
from kvpack.errors import FormatError
from kvpack.format.layout import ElementKind, Layout, integer_layout
from kvpack.runtime.weights.device_blob import DeviceBlob

DEVICE = "cuda"  # torch's current one; tests put the CPU here
SECTIONS = ("copy", "tensors", "linear", "decode", "streams", "codecs", "encode", "targets", "specification")
PEERS = ("triton", "humming-kernels", "nvidia-nvcomp-cu12", "nvidia-nvcomp-cu13", "entropack")
# The module that a peer of products lives in.
MODULES = {"int8": "triton", **dict.fromkeys(HUMMING.values(), "humming")}
# layout → (bits of an element, standard deviation of the integers). Until folded codes `balanced` had (8, 30): INT8.
SOURCES = {"balanced": (5, 3.9), "fast": (5, 3.9)}
WEIGHT_DEVIATION = 0.02  # of the dequantized weights, as in a trained layer
# Rounding to fp16 gives 2·10⁻⁴, to bf16 2·10⁻³; a wrong result is wrong by far more.
TOLERANCES = {torch.float16: 1e-3, torch.bfloat16: 1e-2}
MASSIVE_ACTIVATION = 1000.0
PEER_MAX_M = {"int8": 1, "int4": 64}
MIN_COPIES, MAX_COPIES = 3, 64
COPY_BYTES = (1 << 30, 1 << 32)
CODEC_BYTES = 1 << 29
STAGED_M = 512
_ENCODE_REPEATS = 5


@dataclass
class Source:
    """Weights before coding: integers i8 [rows, cols] and scales f32 [rows] on the device."""

    integers: torch.Tensor
    scales: torch.Tensor
    element_bits: int

    @cached_property
    def exact(self) -> torch.Tensor:
        """The weights in float64."""
        return self.integers.double() * self.scales.double()[:, None]

    def elements(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The unsigned elements of FORMAT.md §4 in host memory."""
        offset = 1 << (self.element_bits - 1)
        return (self.integers.to(torch.int16) + offset).to(torch.uint8).cpu().numpy()


@dataclass
class Coded:
    """One coded tensor on the device."""

    shape: Shape
    layout: str
    tile_cols: int
    data: bytes
    blob: DeviceBlob
    source: Source
    row: Row  # of report["tensors"]


@dataclass
class Contestant:
    """One way to multiply, with copies of its weights."""

    name: str
    layout: str | None
    peer: bench_peers.Peer
    coded: Coded | None = None

    @property
    def max_m(self) -> int | None:
        return PEER_MAX_M.get(self.name)


def rotated(size_bytes: int, rotate_bytes: int) -> int:
    """How many copies of ``size_bytes`` are worked on in turn."""
    return max(MIN_COPIES, min(MAX_COPIES, math.ceil(rotate_bytes / size_bytes)))


def copies_of(blob: DeviceBlob, count: int) -> list[DeviceBlob]:
    """A coded tensor, and the same at other addresses: everything that kernels read is copied."""
    several = [blob]
    for _ in range(count - 1):
        twin = copy.copy(blob)
        for name, value in vars(blob).items():
            if isinstance(value, torch.Tensor):
                setattr(twin, name, value.clone())
        several.append(twin)
    return several


class LinearBench(BenchRun):
    """One run; :meth:`run` returns its report."""

    def __init__(self, options: LinearBenchOptions, publish: Publish | None, say: Callable[[str], None]) -> None:
        self.options = options
        self.threads = default_threads()
        self.executor = ThreadPoolExecutor(self.threads)
        self.streams: list[torch.cuda.Stream] = []
        self.generator = torch.Generator(device=DEVICE)
        self.generator.manual_seed(0)
        report = bench_run.new_report("bench-linear", SCHEMA, NOTE, options.as_dict(), SECTIONS, PEERS)
        super().__init__(report, options.time_limit_s, publish, say)

    def _evaluate(self) -> None:
        self.report["targets"] = evaluate_targets(self.report)
        self.report["specification"] = evaluate_specification(self.report)

    def run(self) -> Report:
        """Measure everything; what time or the device did not allow is missing from the report."""
        try:
            with self._running():
                self._all()
        finally:
            self.executor.shutdown(cancel_futures=True)
        return self.report

    def _all(self) -> None:
        with self._stage("copy"):
            self.report["copy"] = [copy_bandwidth(size) for size in COPY_BYTES]
        with self._stage("encode"):
            self._encode()
        for shape in self.options.shapes:
            with self._stage(shape.label):
                self._shape(shape)
            gc.collect()
            torch.cuda.empty_cache()
        with self._stage("streams"):
            self._streams()
        if self.options.peers and not self.options.quick:
            with self._stage("codecs"):
                self._codecs()

    def _measure(self, works: list[Work]) -> list[Timed]:
        options = self.options
        return measure(works, samples=options.samples, sample_ms=options.sample_ms, case_ms=options.case_ms)

    # --- weights -------------------------------------------------------------

    def _source(self, shape: Shape, layout: str) -> Source:
        bits, sigma = SOURCES[layout]
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        normal = torch.randn(shape.rows, shape.cols, device=DEVICE, generator=self.generator)
        integers = (normal * sigma).round_().clamp_(low, high).to(torch.int8)
        spread = 0.5 + torch.rand(shape.rows, device=DEVICE, generator=self.generator)
        return Source(integers, spread * (WEIGHT_DEVIATION / sigma), bits)

    def _layout(self, layout: str) -> Layout:
        return integer_layout(layout, ElementKind.SIGNED, SOURCES[layout][0])

    def _code(self, shape: Shape, layout: str, tile_cols: int, source: Source, elements: Any) -> Coded | None:
        """Encode on the CPU, upload, and check that the integers come back; None if that fails."""
        row: Row = {
            "shape": shape.label,
            "layout": layout,
            "tile_cols": tile_cols,
            "bits_per_weight": None,
            "blob_bytes": None,
            "device_bytes": None,
            "encode_ms": None,
            "bit_exact": None,
            "dequantize_max_error": None,
            "error_with_massive_activations": None,
            "best": False,
            "error": None,
        }
        self.report["tensors"].append(row)
        try:
            began = time.perf_counter()
            data = encode_elements(elements, self._layout(layout), tile_cols=tile_cols, executor=self.executor)
            row["encode_ms"] = 1e3 * (time.perf_counter() - began)
            row["blob_bytes"] = len(data)
            row["bits_per_weight"] = 8 * (len(data) + source.scales.nbytes) / elements.size
            scales = source.scales.cpu().numpy()
            blob = DeviceBlob.from_bytes(
                memoryview(data), scales, torch.float16, (shape.rows, shape.cols), torch.device(DEVICE)
            )
            row["device_bytes"] = blob.nbytes
            integers = blob.integers().reshape(shape.rows, shape.cols)
            row["bit_exact"] = bool(torch.equal(integers.to(torch.int16), source.integers.to(torch.int16)))
            exact = source.exact
            row["dequantize_max_error"] = (blob.dequantize(torch.float32).double() - exact).abs().max().item()
            row["error_with_massive_activations"] = self._massive(blob, exact)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"
            synchronize_or_stop()
            return None
        return Coded(shape, layout, tile_cols, data, blob, source, row)

    def _massive(self, blob: DeviceBlob, exact: torch.Tensor) -> float:
        """Relative error of a product whose activations hold two values far above all others."""
        x = torch.randn(1, exact.shape[1], device=DEVICE, generator=self.generator)
        x[0, 1] = MASSIVE_ACTIVATION
        x[0, -2] = -MASSIVE_ACTIVATION
        x = x.half()
        return relative_error(x.double() @ exact.T)(blob.linear(x))

    # --- products ------------------------------------------------------------

    def _shape(self, shape: Shape) -> None:
        sources = {layout: self._source(shape, layout) for layout in self.options.layouts}
        coded: list[Coded] = []
        for layout, source in sources.items():
            elements = source.elements()
            for tile_cols in self.options.tile_cols:
                one = self._code(shape, layout, tile_cols, source, elements)
                coded += [one] if one is not None else []
        contestants = self._peers(shape, next(iter(sources.values())))
        tried = [self._contestant(one) for one in coded]
        # Which tile columns to use is decided with one activation vector, whether asked for or not.
        first = sorted({1, *self.options.ms})
        for m in first:
            self._check_time(f"{shape.label}, M = {m}")
            candidates = tried if m == first[0] else [c for c in tried if c.coded and c.coded.row["best"]]
            fitting = [c for c in contestants if c.max_m is None or m <= c.max_m]
            rows = self._products(shape, m, [*fitting, *candidates])
            if m == first[0]:
                self._choose(tried, rows[len(fitting) :])
                tried = [c for c in tried if c.coded and c.coded.row["best"]]
            self._hand_out()
        for contestant in tried:
            self._check_time(f"{shape.label}, decode")
            self._decode(contestant)
        for one in coded:
            try:
                one.blob.check()  # did any kernel above meet a lane that does not end as it must?
            except FormatError as error:
                one.row["error"] = f"{type(error).__name__}: {error}"

    def _peers(self, shape: Shape, source: Source) -> list[Contestant]:
        """Everything but kvpack. A peer that cannot be made is one row with the reason."""
        rotate = self.options.rotate_bytes
        # Humming compiles for each shape and width; a quick run has one width.
        widths = {name: bits for bits, name in HUMMING.items() if bits == 4 or not self.options.quick}

        def make(name: str) -> bench_peers.Peer:
            if name == "fp16":
                weights = source.exact.half()
                return bench_peers.dense(weights, rotated(weights.nbytes, rotate))
            if name == "int4":
                return bench_peers.int4(shape.rows, shape.cols, lambda size: rotated(size, rotate), self.generator)
            if name in widths:
                weights = source.exact.half()
                return bench_peers.humming(weights, widths[name], lambda size: rotated(size, rotate))
            from kvpack.bench.int8_gemv_triton import CONFIGS

            configs = CONFIGS[:3] if self.options.quick else CONFIGS
            count = rotated(source.integers.nbytes, rotate)
            return bench_peers.int8_gemv(source.integers, source.scales, count, configs)

        found = []
        for name in ("fp16", "int8", "int4", *widths) if self.options.peers else ("fp16",):
            try:
                found.append(Contestant(name, None, make(name)))
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error)[:300]}"
                if isinstance(error, ImportError):
                    reason = bench_peers.import_failure(error, MODULES.get(name, name))
                self._row(shape, min(self.options.ms), name, None, None, Timed(error=reason))
                synchronize_or_stop()
        return found

    def _contestant(self, coded: Coded) -> Contestant:
        blobs = copies_of(coded.blob, rotated(len(coded.data), self.options.rotate_bytes))

        def apply(blob: DeviceBlob, x: torch.Tensor) -> torch.Tensor:
            return blob.linear(x)

        peer = bench_peers.Peer(blobs, apply, coded.source.exact, torch.float16, len(coded.data))
        return Contestant("kvpack", coded.layout, peer, coded)

    def _row(self, shape: Shape, m: int, name: str, layout: str | None, peer: Any, timed: Timed) -> Row:
        row: Row = {
            "shape": shape.label,
            "m": m,
            "name": name,
            "layout": layout,
            "tile_cols": None,
            "bits_per_weight": None if peer is None else 8 * peer.weight_bytes / (shape.rows * shape.cols),
            "best": True,
            "note": None if peer is None else peer.note,
            **timed.as_dict(),
        }
        self.report["linear"].append(row)
        return row

    def _products(self, shape: Shape, m: int, contestants: list[Contestant]) -> list[Row]:
        """Check and time all contestants in turns on the same activations."""
        x = torch.randn(m, shape.cols, device=DEVICE, generator=self.generator).half()
        references: dict[tuple[int, torch.dtype], Callable[[torch.Tensor], float]] = {}
        works = []
        for contestant in contestants:
            peer = contestant.peer
            mine = x.to(peer.dtype)
            # Tile columns of one layout share the weights, hence the reference.
            key = (id(contestant.coded.source) if contestant.coded else id(contestant), peer.dtype)
            if key not in references:
                references[key] = relative_error(mine.double() @ peer.weights.T)
            # What is touched counts: outputs of many activations sweep the cache as well.
            touched = peer.weight_bytes + m * shape.rows * x.element_size()
            used = peer.copies[: rotated(touched, self.options.rotate_bytes)]
            calls = [partial(peer.apply, one, mine) for one in used]
            works.append(Work(calls, references[key], TOLERANCES[peer.dtype]))
        rows = []
        for contestant, timed in zip(contestants, self._measure(works), strict=True):
            row = self._row(shape, m, contestant.name, contestant.layout, contestant.peer, timed)
            if contestant.coded is not None:
                row["tile_cols"] = contestant.coded.tile_cols
                row["bits_per_weight"] = contestant.coded.row["bits_per_weight"]
            rows.append(row)
        return rows

    def _choose(self, tried: list[Contestant], rows: list[Row]) -> None:
        """Mark the fastest tile columns of each layout within its size."""
        for layout in self.options.layouts:
            of_layout = [row for row in rows if row["layout"] == layout]
            best = choose_best(of_layout, MAX_BITS[layout])
            for row in of_layout:
                row["best"] = row is best
            for contestant, row in zip(tried, rows, strict=True):
                if contestant.coded is not None and row["layout"] == layout:
                    contestant.coded.row["best"] = row is best

    # --- decoding alone ------------------------------------------------------

    def _decode(self, contestant: Contestant) -> None:
        """Coded weights to int8 and to fp16 in memory, without a product."""
        coded = contestant.coded
        assert coded is not None
        blobs = contestant.peer.copies
        exact = coded.source.exact
        works = []
        for to in ("int8", "fp16"):
            # int8 outputs are as large as the weights: fewer copies sweep the cache.
            size = len(coded.data) + exact.numel() * (1 if to == "int8" else 2)
            used = blobs[: rotated(size, self.options.rotate_bytes)]
            if to == "int8":
                works.append(Work([b.integers for b in used], differing(coded.source.integers), 0.0))
            else:
                calls = [partial(blob.dequantize, torch.float16) for blob in used]
                works.append(Work(calls, relative_error(exact), TOLERANCES[torch.float16]))
        bandwidth = self.report["copy"][-1]["gb_per_s"]
        for to, timed in zip(("int8", "fp16"), self._measure(works), strict=True):
            moved = coded.blob.nbytes + exact.numel() * (1 if to == "int8" else 2)
            bound_us = moved / bandwidth / 1e3
            self.report["decode"].append(
                {
                    "shape": coded.shape.label,
                    "layout": coded.layout,
                    "tile_cols": coded.tile_cols,
                    "to": to,
                    "moved_bytes": moved,
                    "elements_per_s": None if timed.us is None else exact.numel() / timed.us * 1e6,
                    "bound_us": bound_us,
                    "fraction_of_bound": None if timed.us is None else bound_us / timed.us,
                    **timed.as_dict(),
                }
            )
        self._hand_out()

    # --- five layers ---------------------------------------------------------

    def _streams(self) -> None:
        """Five layers of the specification's shape: one after another, and each on a stream of its own."""
        self.streams = [torch.cuda.Stream() for _ in range(5)]
        shape = SPECIFICATION_SHAPE
        for layout in self.options.layouts:
            self._check_time(f"streams, {layout}")
            chosen = [
                t["tile_cols"]
                for t in self.report["tensors"]
                if (t["shape"], t["layout"], t["best"]) == (shape.label, layout, True)
            ]
            source = self._source(shape, layout)
            tile_cols = chosen[0] if chosen else self.options.tile_cols[0]
            coded = self._code(shape, layout, tile_cols, source, source.elements())
            self.report["tensors"].pop()  # the same tensor as before
            if coded is None:
                continue
            rounds = max(2, math.ceil(rotated(len(coded.data), self.options.rotate_bytes) / 5))
            blobs = copies_of(coded.blob, 5 * rounds)
            fives = [blobs[5 * i : 5 * i + 5] for i in range(rounds)]
            exact = source.exact
            for work, m in (("decode", None), ("linear", 1), ("staged", 16), ("staged", STAGED_M)):
                self._five(shape, layout, work, m, fives, exact)
            self._hand_out()

    def _five(
        self, shape: Shape, layout: str, work: str, m: int | None, fives: list[list[DeviceBlob]], exact: torch.Tensor
    ) -> None:
        streams = self.streams
        x = torch.randn(m or 1, shape.cols, device=DEVICE, generator=self.generator).half()

        def one(blob: DeviceBlob) -> torch.Tensor:
            if work == "linear":
                return blob.linear(x)
            weights = blob.dequantize(torch.float16)
            return weights if work == "decode" else torch.nn.functional.linear(x, weights)

        def serial(five: list[DeviceBlob]) -> Result:
            return tuple(one(blob) for blob in five)

        def parallel(five: list[DeviceBlob]) -> Result:
            main = torch.cuda.current_stream()
            begun = main.record_event()
            outputs = []
            for blob, stream in zip(five, streams, strict=True):
                stream.wait_event(begun)
                with torch.cuda.stream(stream):
                    outputs.append(one(blob))
                main.wait_stream(stream)
            return tuple(outputs)

        def fused_path(five: list[DeviceBlob]) -> Result:
            return tuple(blob.linear(x) for blob in five)

        reference = exact if work == "decode" else x.double() @ exact.T
        error = relative_error(reference)
        variants = [serial, parallel]
        works = [Work([partial(v, five) for five in fives], error, TOLERANCES[torch.float16]) for v in variants]
        if work == "staged":
            # What the layers cost if kvpack chooses the path itself, on one stream.
            fused = [partial(fused_path, five) for five in fives]
            works.append(Work(fused, error, TOLERANCES[torch.float16]))
        done = self._measure(works)
        serial_us, parallel_us = done[0].us, done[1].us
        self.report["streams"].append(
            {
                "work": work,
                "m": m,
                "layout": layout,
                "serial": done[0].as_dict(),
                "parallel": done[1].as_dict(),
                "speedup": serial_us / parallel_us if serial_us and parallel_us else None,
                "fused_us": done[2].us if len(done) > 2 else None,
            }
        )

    # --- other coders, and encoding ------------------------------------------

    def _codecs(self) -> None:
        """Other entropy coders on the same distributions, through their own Python interfaces, half a gigabyte."""
        for layout in self.options.layouts:
            cols = 4096
            source = self._source(Shape("codec", CODEC_BYTES // cols, cols), layout)
            description = f"{SOURCES[layout][0]}-bit, σ = {SOURCES[layout][1]:g}, {CODEC_BYTES >> 20} MB as bytes"
            flat = source.integers.view(torch.uint8).flatten()
            attempts: list[tuple[str, str, Callable[[], Row]]] = [
                ("nvCOMP ANS", "nvidia.nvcomp", partial(bench_peers.nvcomp_ans, flat)),
                ("EntroPack tile-ANS", "entropack", partial(bench_peers.entropack_tile_ans, source.integers)),
            ]
            for name, module, attempt in attempts:
                row: Row = {"name": name, "source": description, "layout": layout, "error": None}
                self.report["codecs"].append(row)
                try:
                    row |= attempt()
                    row["elements_per_s"] = CODEC_BYTES / row["decode_us"] * 1e6
                    row["encode_elements_per_s"] = CODEC_BYTES / row["encode_us"] * 1e6
                except ImportError as error:
                    row["error"] = bench_peers.import_failure(error, module)
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
                    synchronize_or_stop()
            torch.cuda.empty_cache()

    def _encode(self) -> None:
        """The specification's layer on the CPU (one core, and all) and on the GPU."""
        shape = SPECIFICATION_SHAPE
        for layout in self.options.layouts:
            source = self._source(shape, layout)
            elements = source.elements()
            for threads in sorted({1, self.threads}):
                executor = self.executor if threads > 1 else None
                times = []
                for _ in range(_ENCODE_REPEATS):
                    began = time.perf_counter()
                    data = encode_elements(elements, self._layout(layout), executor=executor)
                    times.append(time.perf_counter() - began)
                self._encode_row(shape, layout, "cpu", threads, min(times), len(data))
            self._encode_on_gpu(shape, layout, source)
        large = Shape("gate_up", 28672, 4096)
        if not self.options.quick:
            for layout in self.options.layouts:
                self._encode_on_gpu(large, layout, self._source(large, layout))

    def _encode_row(
        self,
        shape: Shape,
        layout: str,
        where: str,
        threads: int | None,
        seconds: float | None,
        size: int | None,
        error: str | None = None,
    ) -> None:
        self.report["encode"].append(
            {
                "shape": shape.label,
                "layout": layout,
                "where": where,
                "threads": threads,
                "ms": None if seconds is None else 1e3 * seconds,
                "elements_per_s": None if seconds is None else shape.rows * shape.cols / seconds,
                "blob_bytes": size,
                "error": error,
            }
        )

    def _encode_on_gpu(self, shape: Shape, layout: str, source: Source) -> None:
        """Integers on the device in, bytes of a finished blob on the device out; must equal the CPU's bytes."""
        error = None
        seconds = size = None
        try:
            from kvpack.runtime.codec.encoder import encode_on_device

            host = source.elements()
            elements = torch.from_numpy(host).to(DEVICE)
            found = []
            for number in range(_ENCODE_REPEATS + 2):
                torch.cuda.synchronize()
                began = time.perf_counter()
                done = encode_on_device(elements, self._layout(layout))
                torch.cuda.synchronize()
                if number >= 2:
                    found.append(time.perf_counter() - began)
            seconds, size = float(np.median(found)), len(done.blob)
            if bytes(done.blob.cpu().numpy()) != encode_elements(host, self._layout(layout), executor=self.executor):
                seconds, error = None, "the bytes are not those of the CPU's encoder"
        except Exception as failure:
            error = f"{type(failure).__name__}: {str(failure)[:300]}"
            synchronize_or_stop()
        self._encode_row(shape, layout, "cuda", None, seconds, size, error)


def bench_linear(
    options: LinearBenchOptions, publish: Publish | None = None, say: Callable[[str], None] = lambda stage: None
) -> Report:
    """Measure, and return the report (``kvpack.bench.report`` says what is in it).

    Args:
        publish: called with the report so far after each step.
        say: called with the name of each stage as it begins.

    Raises:
        DeviceError: there is no CUDA device, or no CuPy.
    """
    bench_run.require_cuda("kvpack bench linear")
    with torch.no_grad():
        report: Report = finite(LinearBench(options, publish, say).run())
        return report
