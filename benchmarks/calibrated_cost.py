"""What calibrated compression costs for a model with the shape of Llama-3.1-8B: seconds and memory, layer by layer.

    python benchmarks/calibrated_cost.py --device cuda --layers 3 --json benchmarks/results/DATE-calibrated-cost.json
    python benchmarks/calibrated_cost.py --device cuda --layers 3 --random-moments   # no forward passes
    python benchmarks/calibrated_cost.py --shape tiny --layers 2 --tokens 4096       # tries it out on the CPU
    python benchmarks/calibrated_cost.py --factor 8192                               # one factor alone

A model of some layers with random weights is written, ``kvpack moments`` reads random tokens with it, and it is
compressed with what that finds: the factors, all passes for the rate, coding and writing. Quality means nothing here.
Embedding and output layer are there as often as in the whole model, once. So the whole takes what these layers take,
and for each other layer the mean of those behind the first, which pays for compiling, too: ``extrapolated``.
"""

from __future__ import annotations

import argparse
import re
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from bench_common import device_record, provenance, synchronize, write_result
from safetensors.torch import save_file
from transformers import LlamaConfig

import kvpack
from kvpack.compression import coder_of
from kvpack.encode.compress import compress
from kvpack.encode.feedback import MatrixFeedback
from kvpack.encode.moments import Moments, MomentsWriter
from kvpack.encode.progress import Progress
from kvpack.encode.tensor_encoder import Coder
from kvpack.encode.threads import default_threads
from kvpack.integrations.transformers.calibration import calibrate

F32 = npt.NDArray[np.float32]
_SIGMA = 0.02
# What a compression tells while it solves for the steps of all layers, each of which takes as long.
_STEPS = "steps"


class Shape(NamedTuple):
    """Sizes of a Llama, and how many layers the whole has."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    layers: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of a layer's matrices."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (queries, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, queries),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }


SHAPES = {"llama-3.1-8b": Shape(4096, 14336, 32, 8, 128, 128256, 32), "tiny": Shape(128, 352, 4, 2, 32, 500, 8)}
# Of each group of linears with the same inputs, the one whose name the moments have.
_READS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


def write_model(directory: Path, shape: Shape, layers: int, device: torch.device) -> None:
    """A model directory with random weights in bf16."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device=device).normal_(0, _SIGMA, generator=generator).cpu()

    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    tensors = {"model.embed_tokens.weight": normal(shape.vocabulary, shape.hidden), "model.norm.weight": ones}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}{name}.weight": normal(*size) for name, size in shape.linears().items()}
        tensors |= {f"{prefix}{name}.weight": ones.clone() for name in ("input_layernorm", "post_attention_layernorm")}
    tensors["lm_head.weight"] = normal(shape.vocabulary, shape.hidden)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        max_position_embeddings=8192,
        rope_theta=500_000.0,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(directory)


def random_moment(size: int, device: torch.device, generator: torch.Generator) -> F32:
    """Of correlated inputs with some large channels, f32 [size, size]."""
    mixing = torch.randn(size, max(1, size // 16), device=device, generator=generator)
    mixing *= torch.exp(torch.randn(size, 1, device=device, generator=generator))
    found = mixing @ mixing.T / mixing.shape[1]
    found.diagonal().add_(0.1)
    return ((found + found.T) / 2).cpu().numpy()


def write_random_moments(path: Path, shape: Shape, layers: int, device: torch.device) -> None:
    """See :func:`random_moment`; and sensitivities."""
    generator = torch.Generator(device).manual_seed(1)
    inputs: dict[str, str] = {}
    with MomentsWriter(path) as writer:
        for layer in range(layers):
            for name, (rows, cols) in shape.linears().items():
                own = f"model.layers.{layer}.{name}.weight"
                module, _, last = name.rpartition(".")
                inputs[own] = f"model.layers.{layer}.{module}.{_READS.get(last, last)}.weight"
                if own == inputs[own]:
                    writer.add_second_moment(
                        own, (cols, cols), iter([random_moment(cols, device, generator)]), np.array([4096])
                    )
                writer.add_sensitivity(own, np.full(rows, 2.0 ** -(layer + len(name) % 5), np.float32))
        writer.finish(inputs, np.full(shape.vocabulary, 1, np.int64), {"tokens": 4096})


class Clock:
    """Seconds between the names that a run tells, by name; those of layers together."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.by_name: dict[str, list[float]] = {}
        self._name, self._begin, self._cpu_begin = "start", time.perf_counter(), time.process_time()

    def tell(self, name: str) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        self.by_name.setdefault(self._name, []).append(now - self._begin)
        self._name, self._begin = name, now

    @property
    def progress(self) -> Progress:
        return Progress(tensor=self.tell)

    def report(self, layers: int, of_layers: int) -> dict[str, Any]:
        """What was found, and what that says of ``of_layers`` layers."""
        self.tell("end")
        by_layer, others = [0.0] * layers, {}
        for name, seconds in self.by_name.items():
            if name == _STEPS:
                by_layer = [of_layer + sum(seconds) / layers for of_layer in by_layer]
            elif found := re.search(r"layers\.(\d+)\b", name):
                by_layer[int(found[1])] += sum(seconds)
            else:
                others[name] = sum(seconds)
        total = sum(by_layer) + sum(others.values())
        steady = by_layer[1:] or by_layer
        per_layer = sum(steady) / len(steady)
        most = sorted(others.items(), key=lambda item: -item[1])[:6]
        return {
            "seconds": round(total, 3),
            "cpu_seconds": round(time.process_time() - self._cpu_begin, 3),
            "seconds_by_layer": [round(seconds, 3) for seconds in by_layer],
            "seconds_beside_layers": {name: round(seconds, 3) for name, seconds in most if seconds >= 0.001},
            "seconds_a_layer": round(per_layer, 3),
            "extrapolated_seconds": round(total + (of_layers - layers) * per_layer, 1),
        }

    def passes(self, name: str) -> list[float]:
        """Seconds of each time that a tensor was told."""
        return [round(seconds, 3) for seconds in self.by_name.get(name, [])]


class TimedCoder:
    """A coder that knows how long it made factors."""

    def __init__(self, coder: Coder, device: torch.device) -> None:
        self.factors: dict[int, list[float]] = {}  # by K
        self._coder, self._device = coder, device

    @property
    def coder(self) -> Coder:
        return self._coder._replace(feedback_of=self._feedback_of)

    def _feedback_of(self, second_moment: F32, executor: ThreadPoolExecutor | None) -> MatrixFeedback:
        begin = time.perf_counter()
        found = self._coder.feedback_of(second_moment, executor=executor)
        synchronize(self._device)
        self.factors.setdefault(len(second_moment), []).append(round(time.perf_counter() - begin, 3))
        return found


class Peak:
    """The most memory of a part of the run: on the device, and of the process so far."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)

    def report(self) -> dict[str, int | None]:
        on_device = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"peak_device_bytes": on_device, "peak_resident_bytes_so_far": resident}


def factor(size: int, device: torch.device) -> dict[str, Any]:
    """What one factor costs, beside its moment."""
    coder = coder_of(device)
    generator = torch.Generator(device).manual_seed(1)
    executor = ThreadPoolExecutor(default_threads())
    coder.feedback_of(random_moment(1024, device, generator), executor=executor)  # compiles
    moment = random_moment(size, device, generator)
    peak, cpu_begin, begin = Peak(device), time.process_time(), time.perf_counter()
    coder.feedback_of(moment, executor=executor)
    synchronize(device)
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    return {
        "inputs": size,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "gigaflops": round(size**3 / 3 / seconds / 1e9, 2),
        "gigaflops_of_a_core": round(size**3 / 3 / cpu_seconds / 1e9, 2) if device.type == "cpu" else None,
        **peak.report(),
    }


def bench(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The parts of the run, each with what it cost."""
    device, shape = torch.device(arguments.device), SHAPES[arguments.shape]
    model, moments, layers = folder / "model", folder / "moments.safetensors", arguments.layers
    model.mkdir()
    write_model(model, shape, layers, device)
    clock, peak = Clock(device), Peak(device)
    if arguments.random_moments:
        write_random_moments(moments, shape, layers, device)
    else:
        ids = np.random.default_rng(0).integers(0, shape.vocabulary, arguments.tokens)
        np.save(folder / "ids.npy", ids)
        report = calibrate(
            model, folder / "ids.npy", moments, tokens=arguments.tokens, device=arguments.device,
            progress=clock.progress,
        )  # fmt: skip
        yield (
            "moments",
            {
                "tokens": report.tokens,
                "whole_model": report.whole_model,
                "bytes": report.output_bytes,
                **clock.report(layers, shape.layers),
                **peak.report(),
            },
        )
    largest = f"model.layers.{layers - 1}.mlp.down_proj.weight"
    with Moments(moments) as opened:
        begin = time.perf_counter()
        opened.second_moment(largest)
        read_seconds = time.perf_counter() - begin
    clock, peak = Clock(device), Peak(device)
    timed = TimedCoder(coder_of(arguments.device), device)
    config = kvpack.QuantConfig(bits=arguments.bits)
    compressed = compress(model, folder / "out", config, moments=moments, coder=timed.coder, progress=clock.progress)
    yield (
        "compress",
        {
            "bits_per_weight": compressed.bits_per_weight,
            **clock.report(layers, shape.layers),
            "seconds_of_each_pass": {
                name: clock.passes(f"model.layers.{layers - 1}.{name}.weight") for name in shape.linears()
            },
            "seconds_of_each_solution_for_steps": clock.passes(_STEPS),
            "factor_seconds_by_inputs": {str(size): seconds for size, seconds in timed.factors.items()},
            "seconds_to_read_the_largest_moment": round(read_seconds, 3),
            **peak.report(),
            "notes": compressed.notes,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, default=3, help="how many the model is made with")
    parser.add_argument("--tokens", type=int, default=131_072, help="that the calibration run reads")
    parser.add_argument("--random-moments", action="store_true", help="in place of a calibration run's")
    parser.add_argument("--factor", type=int, metavar="K", help="time one factor of K inputs, and nothing else")
    parser.add_argument("--bits", type=float, default=4.25)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--directory", type=Path, help="where files are made and deleted; by default the system's place"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        **provenance({}, ("torch", "transformers")),
        "device": device_record(torch.device(arguments.device)),
        "cores": default_threads(),
        "shape": {**SHAPES[arguments.shape]._asdict(), "layers_made": arguments.layers},
    }
    if arguments.factor is not None:
        result["factor"] = factor(arguments.factor, torch.device(arguments.device))
        print(result["factor"])
        if arguments.json is not None:
            write_result(arguments.json, result)
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        for part, found in bench(arguments, Path(folder)):
            result[part] = found
            print(
                f"{part}: {found['seconds']} s for {arguments.layers} layers, {found['seconds_a_layer']} s for each "
                f"behind the first; {found['extrapolated_seconds']} s for {SHAPES[arguments.shape].layers}",
                flush=True,
            )
            print({key: value for key, value in found.items() if key != "notes"}, flush=True)
            if arguments.json is not None:  # what there is, if the rest does not come
                write_result(arguments.json, result)
    together = sum(result[part]["extrapolated_seconds"] for part in ("moments", "compress") if part in result)
    result["extrapolated_minutes"] = round(together / 60, 2)
    print(f"together, extrapolated: {result['extrapolated_minutes']} minutes")
    if arguments.json is not None:
        write_result(arguments.json, result)


if __name__ == "__main__":
    main()
