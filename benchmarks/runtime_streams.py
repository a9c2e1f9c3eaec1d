"""What a coded model costs on a GPU besides products: loading, memory, streaming from the host, encoding.

    python benchmarks/runtime_streams.py --dir SCRATCH --json benchmarks/results/DATE-runtime-streams.json
    python benchmarks/runtime_streams.py --dir SCRATCH --device cpu --hidden 256 --intermediate 512 --repeats 1

Writes a synthetic bf16 model of a few layers with a Llama's shapes under --dir (deleted afterwards), compresses it and

- loads it to the device, files cached: ``kvpack.load`` against ``safetensors.torch.load_file`` of the bf16 model;
- counts the memory that the coded model takes, and what products take beyond that while they run;
- times a pass over all layers with the weights on the device, streamed from pinned memory, and from disk;
- runs five layers of 2048×5632 one after another and with ``run_concurrently``, in CUDA graphs on a GPU;
- encodes: ``kvpack.compress`` on the CPU and with ``device="cuda"``, and the GPU encoder alone, stage by stage.

The weights are Gaussian: the result is about speed and memory, and says nothing about ratios.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_common import print_table, provenance, write_result
from books_generate import device_record, synchronize
from safetensors.torch import load_file, save_file

import kvpack
from kvpack.format.layout import ElementKind, integer_layout
from kvpack.runtime.weights.linear import RansLinear
from kvpack.runtime.weights.load import State, load
from kvpack.runtime.weights.offload import LayerStream, run_concurrently

HEADS_FRACTION = 4  # a Llama of 8 B has a quarter as many key and value heads as query heads
FIVE = (2048, 5632)
BITS = 4.25
LAYOUTS = ("balanced", "fast")
PASS_M, WIDE_M = 1, 2048

Rows = list[dict[str, Any]]


class Bench:
    """The options, the device and the result."""

    def __init__(self, options: argparse.Namespace, scratch: Path, result: dict[str, Any]) -> None:
        self.options, self.scratch, self.result = options, scratch, result
        self.device = torch.device(options.device)
        self.dense = scratch / "dense.safetensors"
        self.began = time.monotonic()

    def seconds(self, work: Callable[[], object]) -> float:
        """Median wall time, the device's work included."""
        found = []
        for _ in range(self.options.repeats):
            synchronize(self.device)
            began = time.perf_counter()
            work()
            synchronize(self.device)
            found.append(time.perf_counter() - began)
        return statistics.median(found)

    def section(self, name: str, work: Callable[[], Rows]) -> None:
        """One part of the result; one that fails does not stop the others, and what there is gets written."""
        if self.options.time_limit_s and time.monotonic() - self.began > self.options.time_limit_s:
            self.result["stopped"] = self.result["stopped"] or f"time limit before {name}"
            self.result["complete"] = False
            return
        print(f"{name} …", file=sys.stderr)
        try:
            self.result[name] = work()
        except Exception as error:
            self.result["complete"] = False
            self.result["stopped"] = f"{name}: {type(error).__name__}: {str(error)[:300]}"
            print(self.result["stopped"], file=sys.stderr)
        if self.options.json:
            write_result(self.options.json, self.result)

    # --- the model -----------------------------------------------------------

    def write_model(self) -> None:
        hidden, intermediate = self.options.hidden, self.options.intermediate
        shapes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden // HEADS_FRACTION, hidden),
            "self_attn.v_proj": (hidden // HEADS_FRACTION, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
        }
        generator = torch.Generator(self.device)
        generator.manual_seed(0)
        tensors = {
            f"model.layers.{layer}.{name}.weight": (
                torch.randn(shape, device=self.device, generator=generator) * 0.02
            ).to(torch.bfloat16)
            for layer in range(self.options.layers)
            for name, shape in shapes.items()
        }
        self.weights = sum(tensor.numel() for tensor in tensors.values())
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, self.dense)

    def coded(self, layout: str) -> Path:
        return self.scratch / f"{layout}.safetensors"

    def layers(self, state: State) -> list[list[RansLinear]]:
        """The linear layers of each layer of the model."""
        names = [name.removesuffix(".weight") for name in state]
        return [
            [state.linear(name) for name in names if name.startswith(f"model.layers.{layer}.")]
            for layer in range(self.options.layers)
        ]

    # --- the parts -----------------------------------------------------------

    def encode(self) -> Rows:
        rows: Rows = []

        def row(shape: str, layout: str, where: str, elements: int, seconds: float | None, **more: Any) -> None:
            done = seconds is not None
            rows.append(
                {
                    "shape": shape,
                    "layout": layout,
                    "where": where,
                    "ms": 1e3 * seconds if done else None,
                    "gelements_per_s": elements / seconds / 1e9 if done else None,
                    "error": None,
                    **more,
                }
            )

        for layout in LAYOUTS:
            began = time.perf_counter()
            kvpack.compress(self.dense, self.coded(layout), kvpack.QuantConfig(bits=BITS, layout=layout))
            row("the model", layout, "compress, CPU", self.weights, time.perf_counter() - began)
        if self.device.type != "cuda":
            return rows
        from kvpack.runtime.codec.encoder import encode_on_device

        for layout in LAYOUTS:
            out = self.scratch / f"{layout}-gpu.safetensors"
            try:
                began = time.perf_counter()
                kvpack.compress(self.dense, out, kvpack.QuantConfig(bits=BITS, layout=layout), device="cuda")
                seconds = time.perf_counter() - began
                same = out.read_bytes() == self.coded(layout).read_bytes()
                row("the model", layout, "compress, GPU", self.weights, seconds, same_bytes=same)
                rows[-1]["error"] = None if same else "other bytes than the CPU's"
            except Exception as error:
                row("the model", layout, "compress, GPU", self.weights, None, error=f"{type(error).__name__}: {error}")
            finally:
                out.unlink(missing_ok=True)
        shape = (2 * self.options.intermediate, self.options.hidden)
        for layout in LAYOUTS:
            bits, sigma = 5, 3.9
            half = 1 << (bits - 1)
            normal = torch.randn(shape, device=self.device) * sigma
            elements = (normal.round_().clamp_(-half, half - 1) + half).to(torch.uint8)
            chosen = integer_layout(layout, ElementKind.SIGNED, bits)
            label = f"{shape[0]}×{shape[1]}"
            try:
                encode_on_device(elements, chosen)
                seconds = self.seconds(lambda elements=elements, chosen=chosen: encode_on_device(elements, chosen))  # type: ignore[misc]
                stages = encode_on_device(elements, chosen, time_stages=True).stage_seconds
                row(label, layout, "integers to blob, GPU", elements.numel(), seconds, stage_seconds=stages)
            except Exception as error:
                message = f"{type(error).__name__}: {error}"
                row(label, layout, "integers to blob, GPU", elements.numel(), None, error=message)
        return rows

    def loading(self) -> Rows:
        rows: Rows = []
        paths = [
            ("safetensors, bf16", self.dense),
            *((f"kvpack.load, {layout}", self.coded(layout)) for layout in LAYOUTS),
        ]
        for what, path in paths:
            if path == self.dense:
                work: Callable[[], object] = lambda: load_file(self.dense, device=str(self.device))  # noqa: E731
            else:
                work = lambda path=path: load(path, self.device, progress=False)  # type: ignore[misc] # noqa: E731
            entry: dict[str, Any] = {"what": what, "megabytes": path.stat().st_size / 1e6, "error": None}
            try:
                work()
                seconds = self.seconds(work)
                entry |= {"seconds": seconds, "gb_per_s": path.stat().st_size / seconds / 1e9}
            except Exception as error:
                entry |= {"seconds": None, "gb_per_s": None, "error": f"{type(error).__name__}: {error}"}
            rows.append(entry)
        return rows

    def memory(self) -> Rows:
        """Bytes that torch's allocator hands out; zero on the CPU, where nobody counts."""
        rows: Rows = []
        cuda = self.device.type == "cuda"
        for layout in LAYOUTS:
            synchronize(self.device)
            before = torch.cuda.memory_allocated() if cuda else 0
            state = load(self.coded(layout), self.device, progress=False)
            synchronize(self.device)
            allocated = (torch.cuda.memory_allocated() if cuda else state.nbytes) - before
            peaks = {}
            for m in (PASS_M, WIDE_M):
                for linear in (one for layer in self.layers(state) for one in layer):
                    x = torch.randn(m, linear.in_features, device=self.device, dtype=torch.float16)
                    held = torch.cuda.memory_allocated() if cuda else 0
                    if cuda:
                        torch.cuda.reset_peak_memory_stats()
                    y = linear(x)
                    peak = (torch.cuda.max_memory_allocated() if cuda else 0) - held - (y.nbytes if cuda else 0)
                    peaks[m] = max(peaks.get(m, 0), peak)
                    del x, y
            stored = sum(8 * (blob.blob_bytes + 4 * blob.scales.numel()) for blob in state.values())
            rows.append(
                {
                    "layout": layout,
                    "bits_per_weight": stored / self.weights,
                    "allocated_megabytes": allocated / 1e6,
                    "percent_of_fp16": 100 * allocated / (2 * self.weights),
                    "percent_of_int8": 100 * allocated / self.weights,
                    "peak_megabytes_in_products": max(peaks.values()) / 1e6,
                    "peak_megabytes_by_m": {str(m): peak / 1e6 for m, peak in peaks.items()},
                }
            )
            del state
        return rows

    def streaming(self) -> Rows:
        rows: Rows = []
        path = self.coded("balanced")
        state = load(path, self.device, progress=False)
        layers = self.layers(state)
        inputs = {
            linear.in_features: torch.randn(PASS_M, linear.in_features, device=self.device, dtype=torch.float16)
            for layer in layers
            for linear in layer
        }

        def compute(layer: list[RansLinear]) -> list[torch.Tensor]:
            return [linear(inputs[linear.in_features]) for linear in layer]

        def resident() -> None:
            for layer in layers:
                compute(layer)

        resident()
        expected = [out.double() for layer in layers for out in compute(layer)]
        ms = 1e3 * self.seconds(resident)
        rows.append({"what": "on the device", "ms": ms, "megabytes": state.nbytes / 1e6, "error": None})
        for source in ("pinned", "disk"):
            entry: dict[str, Any] = {"what": f"streamed, {source}", "ms": None, "megabytes": None, "error": None}
            rows.append(entry)
            try:
                # Layers of their own: a stream takes the weights away from the device.
                own = self.layers(load(path, self.device, progress=False))
                with LayerStream(own, device=self.device, source=source, path=path, prefetch=1) as stream:

                    def streamed(own: list[list[RansLinear]] = own, stream: LayerStream = stream) -> list[torch.Tensor]:
                        outputs = []
                        for number, layer in enumerate(own):
                            stream.acquire(number)
                            outputs += compute(layer)
                            stream.release(number)
                        return outputs

                    worst = max(
                        ((out.double() - reference).norm() / reference.norm()).item()
                        for out, reference in zip(streamed(), expected, strict=True)
                    )
                    if worst > 1e-3:
                        raise RuntimeError(f"results differ from those of resident weights by {worst:.1e}")
                    entry["ms"] = 1e3 * self.seconds(streamed)
                    entry["megabytes"] = stream.device_bytes / 1e6
                    entry["streamed_megabytes"] = stream.streamed_bytes / 1e6
            except Exception as error:
                entry["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        return rows

    def five(self) -> Rows:
        """Five layers of one shape, independent of each other: in turn, and each on a stream of its own."""
        rows: Rows = []
        path, out = self.scratch / "five.safetensors", self.scratch / "five-coded.safetensors"
        rows_, cols = (FIVE[0] // 8, FIVE[1] // 8) if self.device.type == "cpu" else FIVE
        save_file({f"{n}.weight": (torch.randn(rows_, cols) * 0.02).half() for n in range(5)}, path)
        for layout in LAYOUTS:
            kvpack.compress(path, out, kvpack.QuantConfig(bits=BITS, layout=layout), force=True)
            state = load(out, self.device, progress=False)
            linears = [state.linear(str(number)) for number in range(5)]
            for m in (1, 16, 512):
                inputs = [torch.randn(m, cols, device=self.device, dtype=torch.float16) for _ in linears]

                def in_turn(inputs: list[torch.Tensor] = inputs, linears: Any = linears) -> list[torch.Tensor]:
                    return [linear(x) for linear, x in zip(linears, inputs, strict=True)]

                def at_once(inputs: list[torch.Tensor] = inputs, linears: Any = linears) -> list[torch.Tensor]:
                    return run_concurrently(linears, inputs)

                entry: dict[str, Any] = {"layout": layout, "m": m, "error": None}
                rows.append(entry)
                try:
                    entry |= self._compare(in_turn, at_once)
                except Exception as error:
                    entry["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        return rows

    def _compare(self, in_turn: Callable[[], Any], at_once: Callable[[], Any]) -> dict[str, Any]:
        if self.device.type == "cuda":
            from kvpack.bench.timing import Work, measure, relative_error

            # The largest of five layers' errors against the first's outputs: they must be the same products.
            expected = torch.cat([out.flatten() for out in in_turn()]).double()
            works = [
                Work([lambda f=f: torch.cat([o.flatten() for o in f()])], relative_error(expected), 1e-3)  # type: ignore[misc]
                for f in (in_turn, at_once)
            ]
            done = measure(works, samples=15, sample_ms=1.0, case_ms=300.0)
            turn, once = done[0].us, done[1].us
            error = done[0].error or done[1].error
        else:
            turn, once, error = 1e6 * self.seconds(in_turn), 1e6 * self.seconds(at_once), None
        speedup = turn / once if turn and once else None
        return {"in_turn_us": turn, "at_once_us": once, "speedup": speedup, "error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="scratch space for a model of --layers layers")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--time-limit-s", type=float)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("no CUDA device (--device cpu with small sizes tries the script out)")
    device = torch.device(options.device)
    result: dict[str, Any] = {
        "what": "runtime-streams",
        "complete": True,
        "stopped": None,
        **provenance({}, ("torch", "cupy-cuda13x", "cupy-cuda12x")),
        "device": device_record(device),
        "bits": BITS,
        "layers": options.layers,
        "loading": [],
        "memory": [],
        "streaming": [],
        "five": [],
        "encode": [],
    }
    with tempfile.TemporaryDirectory(dir=options.dir) as scratch, torch.no_grad():
        bench = Bench(options, Path(scratch), result)
        bench.write_model()
        result["weights"] = bench.weights
        for name in ("encode", "loading", "memory", "streaming", "five"):
            bench.section(name, getattr(bench, name))
    for name in ("encode", "loading", "memory", "streaming", "five"):
        if result[name]:
            headings = list(result[name][0])
            cells = [
                [f"{v:.4g}" if isinstance(v, float) else v for v in map(row.get, headings)] for row in result[name]
            ]
            print_table(headings, cells, name)
    print(result["stopped"] or "complete")


if __name__ == "__main__":
    main()
