"""Peak memory of compressing models of several sizes, and what a process of the command line costs.

    python benchmarks/memory.py --dir SCRATCH --gigabytes 1,2,4,6 --minilm "$KVPACK_MINILM" \\
        --json benchmarks/results/DATE-memory.json
    python benchmarks/memory.py --dir SCRATCH --gigabytes 1 --no-processes
    python benchmarks/memory.py --dir SCRATCH --gigabytes 1.6 --no-processes --threads 1,4,8,16 \\
        --json DATE-compress-threads.json

Writes a synthetic bf16 model with a Llama's shapes in shards of about 1 GB into a folder of its own under --dir,
compresses it with ``python -m kvpack compress --bits 4.25 --json`` and samples the process's anonymous memory
(RssAnon of /proc/PID/status; mapped files are left out, since the system may drop them at any time) every 50 ms. Each
model is deleted before the next. Needs up to twice the largest size on disk. The weights are one Gaussian block,
scaled and rolled: the result is about memory and time, and says nothing about ratios. With --threads each model is
compressed with each of these numbers, to the same bytes or the script fails; 1.6 GB are an embedding, which is copied,
and three layers.

The second part times whole processes (best of --repeats): ``kvpack --help``, ``compress`` of MiniLM with a warm
compiler cache, and ``inspect`` of a file with 10,000 coded tensors.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from bench_common import PACKAGE, environment_path, print_table, provenance, write_result

from kvpack.encode.parts import file_crc32

BITS = "4.25"
GIGABYTE = 1e9
SHARD_BYTES = 1_000_000_000
BLOCK_ELEMENTS = 1 << 25  # 64 MB of bf16
SAMPLE_SECONDS = 0.05
INSPECT_TENSORS, INSPECT_SIDE = 10_000, 64
# An 8-billion-parameter Llama's layer.
HIDDEN, INTERMEDIATE, KV_COLUMNS, VOCABULARY = 4096, 14336, 1024, 32000

Shapes = list[tuple[str, tuple[int, ...]]]


def layer_shapes(layer: int) -> Shapes:
    prefix = f"model.layers.{layer}"
    return [
        (f"{prefix}.input_layernorm.weight", (HIDDEN,)),
        (f"{prefix}.self_attn.q_proj.weight", (HIDDEN, HIDDEN)),
        (f"{prefix}.self_attn.k_proj.weight", (KV_COLUMNS, HIDDEN)),
        (f"{prefix}.self_attn.v_proj.weight", (KV_COLUMNS, HIDDEN)),
        (f"{prefix}.self_attn.o_proj.weight", (HIDDEN, HIDDEN)),
        (f"{prefix}.post_attention_layernorm.weight", (HIDDEN,)),
        (f"{prefix}.mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN)),
        (f"{prefix}.mlp.up_proj.weight", (INTERMEDIATE, HIDDEN)),
        (f"{prefix}.mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)),
    ]


def size_bytes(shape: tuple[int, ...]) -> int:
    return 2 * int(np.prod(shape))


def model_shards(total_bytes: float) -> list[Shapes]:
    """Tensors of a model of about ``total_bytes``, cut into shards: an embedding, then layers while there is room."""
    shards: list[Shapes] = [[("model.embed_tokens.weight", (VOCABULARY, HIDDEN))]]
    used, in_shard, layer = size_bytes((VOCABULARY, HIDDEN)), size_bytes((VOCABULARY, HIDDEN)), 0
    while used < total_bytes:
        for name, shape in layer_shapes(layer):
            size = size_bytes(shape)
            if used + size > total_bytes * 1.005:
                continue
            if in_shard + size > SHARD_BYTES:
                shards.append([])
                in_shard = 0
            shards[-1].append((name, shape))
            used, in_shard = used + size, in_shard + size
        layer += 1
        if total_bytes - used < size_bytes((KV_COLUMNS, HIDDEN)):
            break
    return shards


def _block_pieces(block: np.ndarray[Any, Any], elements: int, tensor: int) -> Iterator[bytes]:
    """``elements`` bf16 values: the block from a place, and with a scale, of the tensor's own."""
    scale = np.float32(0.02 * (1 + (tensor * 37 % 100) / 100))
    at, step = tensor * 1_000_003 % len(block), 1 << 22
    while elements:
        part = block[at : at + min(step, elements)]
        yield (part * scale).astype(ml_dtypes.bfloat16).tobytes()
        elements -= len(part)
        at = (at + len(part)) % len(block)


def write_safetensors(path: Path, header: dict[str, Any], pieces: Iterator[bytes]) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for piece in pieces:
            file.write(piece)


def tensor_table(shapes: Shapes, dtype: str, itemsize: int) -> dict[str, Any]:
    header, at = {}, 0
    for name, shape in shapes:
        end = at + int(np.prod(shape)) * itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    return header


def make_model(directory: Path, gigabytes: float, block: np.ndarray[Any, Any]) -> int:
    """Write the model; returns its size in bytes."""
    directory.mkdir()
    shards = model_shards(gigabytes * GIGABYTE)
    weight_map, tensor = {}, 0
    for number, shapes in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"

        def pieces(shapes: Shapes = shapes, first: int = tensor) -> Iterator[bytes]:
            for index, (_, shape) in enumerate(shapes):
                yield from _block_pieces(block, int(np.prod(shape)), first + index)

        write_safetensors(directory / name, tensor_table(shapes, "BF16", 2), pieces())
        tensor += len(shapes)
        weight_map |= dict.fromkeys((tensor_name for tensor_name, _ in shapes), name)
    total = sum(size_bytes(shape) for shapes in shards for _, shape in shapes)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return total


def environment() -> dict[str, str]:
    """For subprocesses: the kvpack that this script imports."""
    return {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}


class Sampler(threading.Thread):
    """Samples a process's anonymous memory until it ends."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.status = Path(f"/proc/{pid}/status")
        self.peak_bytes, self.samples = 0, 0
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(SAMPLE_SECONDS):
            try:
                text = self.status.read_text()
            except OSError:
                return
            for line in text.splitlines():
                if line.startswith("RssAnon:"):
                    self.peak_bytes = max(self.peak_bytes, 1024 * int(line.split()[1]))
                    self.samples += 1


def measured_compress(source: Path, target: Path, threads: int | None = None) -> dict[str, Any]:
    """Compress in a process of its own; its report, seconds of wall time and peak anonymous bytes."""
    command = [sys.executable, "-m", "kvpack", "compress", str(source), "-o", str(target), "--bits", BITS, "--json"]
    command += [] if threads is None else ["--threads", str(threads)]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment(), text=True) as process:
        sampler = Sampler(process.pid)
        sampler.start()
        out, _ = process.communicate()
        seconds = time.perf_counter() - began
        sampler.ended.set()
        sampler.join()
    if process.returncode:
        raise SystemExit(f"compress failed with status {process.returncode}: {out.strip()}")
    report = json.loads(out)
    return {
        "seconds": seconds,
        "seconds_without_start": report["seconds"],
        "peak_anonymous_mb": sampler.peak_bytes / 1e6,
        "samples": sampler.samples,
        "output_bytes": report["output_bytes"],
        "bits_per_weight": report["bits_per_weight"],
        "coded": sum(tensor["method"] != "keep" for tensor in report["tensors"]),
        "kept": {tensor["name"]: tensor["reason"] for tensor in report["tensors"] if tensor["method"] == "keep"},
    }


def warm_up(folder: Path) -> None:
    """Fill the compiler's cache, so that no measured process compiles: that costs seconds, and memory of its own."""
    source, target = folder / "small.safetensors", folder / "small.kvpack.safetensors"
    values = np.random.default_rng(2).standard_normal((512, 512), np.float32).astype(ml_dtypes.bfloat16)
    write_safetensors(source, tensor_table([("small.weight", values.shape)], "BF16", 2), iter([values.tobytes()]))
    measured_compress(source, target)
    source.unlink()
    target.unlink()


def memory_rows(
    folder: Path, gigabytes: float, block: np.ndarray[Any, Any], threads: list[int | None]
) -> Iterator[dict[str, Any]]:
    """A row for each number of threads; None: all cores."""
    needed = int(2 * gigabytes * GIGABYTE)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SystemExit(f"{gigabytes} GB: {needed / 1e9:.1f} GB of disk are needed, {free / 1e9:.1f} GB are free")
    source, target = folder / "model", folder / "coded"
    try:
        began = time.perf_counter()
        total = make_model(source, gigabytes, block)
        print(f"{gigabytes:g} GB: written in {time.perf_counter() - began:.0f} s", file=sys.stderr)
        largest = max(size_bytes(shape) for shapes in model_shards(gigabytes * GIGABYTE) for _, shape in shapes)
        coded = max(size_bytes(shape) for _, shape in layer_shapes(0))
        crc32 = None
        for number in threads:
            row = {"gigabytes": gigabytes, "model_bytes": total, "largest_tensor_bytes": largest}
            row |= {"threads": number} if number is not None else {}
            row |= {"largest_layer_tensor_bytes": coded, **measured_compress(source, target, number)}
            unexpected = {n: reason for n, reason in row["kept"].items() if "norm" not in n and "embed" not in n}
            if unexpected:
                print(f"kept: {unexpected}", file=sys.stderr)
            row["kept"] = unexpected
            if len(threads) > 1:
                found = {file.name: file_crc32(file) for file in target.glob("*.safetensors")}
                crc32 = crc32 or found
                if found != crc32:
                    raise SystemExit(f"with {number} threads the bytes are others")
            shutil.rmtree(target)
            yield row
    finally:
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)


def process_seconds(arguments: list[str], repeats: int, remove: Path | None = None) -> dict[str, float]:
    """Best and median wall time of ``python -m kvpack ARGUMENTS``, after one run that is not counted."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "kvpack", *arguments], stdout=subprocess.DEVNULL, env=environment(), check=True
        )
        times.append(time.perf_counter() - began)
        if remove is not None:
            remove.unlink()
    return {"first_s": times[0], "best_s": min(times[1:]), "median_s": float(np.median(times[1:]))}


def process_rows(folder: Path, minilm: Path | None, repeats: int, tensors: int) -> list[dict[str, Any]]:
    rows = [{"process": "kvpack --help", **process_seconds(["--help"], repeats)}]
    if minilm is not None:
        out = folder / "minilm.kvpack.safetensors"
        done = process_seconds(["compress", str(minilm), "-o", str(out), "--json"], repeats, remove=out)
        rows.append({"process": "kvpack compress MiniLM", **done})
    source, target = folder / "many.safetensors", folder / "many.kvpack.safetensors"
    rng = np.random.default_rng(1)
    shapes: Shapes = [(f"block.{index}.weight", (INSPECT_SIDE, INSPECT_SIDE)) for index in range(tensors)]
    write_safetensors(
        source,
        tensor_table(shapes, "F32", 4),
        (rng.standard_normal(shape, np.float32).tobytes() for _, shape in shapes),
    )
    command = ["compress", str(source), "-o", str(target), "--preset", "near-lossless", "--include", ".*", "--json"]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "kvpack", *command], capture_output=True, env=environment(), check=True, text=True
    )
    seconds = time.perf_counter() - began
    coded = sum(tensor["method"] != "keep" for tensor in json.loads(done.stdout)["tensors"])
    if coded != tensors:
        raise SystemExit(f"only {coded} of {tensors} small tensors are coded")
    rows.append({"process": f"kvpack compress, {tensors} tensors, near-lossless", "first_s": seconds})
    source.unlink()
    for shown, extra in (("inspect", []), ("inspect --json", ["--json"])):
        timed = process_seconds(["inspect", str(target), *extra], repeats)
        rows.append({"process": f"kvpack {shown}, {tensors} tensors", "coded": coded, **timed})
    target.unlink()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    parser.add_argument("--gigabytes", default="1,2,4,6", help="sizes of the models; empty for none")
    parser.add_argument("--threads", default="", help="numbers of threads, as 1,4,16; all cores if there are none")
    parser.add_argument("--minilm", type=Path, default=environment_path("KVPACK_MINILM"))
    parser.add_argument("--no-processes", action="store_true", help="leave out the times of whole processes")
    parser.add_argument("--tensors", type=int, default=INSPECT_TENSORS, help="tensors of the file for inspect")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    threads: list[int | None] = [int(number) for number in options.threads.split(",") if number] or [None]
    what = "compress-threads" if options.threads else "memory"
    result: dict[str, Any] = {"what": what, **provenance({"KVPACK_MINILM": options.minilm})}
    sizes = [float(size) for size in options.gigabytes.split(",") if size]
    result["sizes"], result["processes"] = [], []
    with tempfile.TemporaryDirectory(prefix="kvpack-memory-", dir=options.dir) as name:
        folder = Path(name)
        if sizes:
            warm_up(folder)
            block = np.random.default_rng(0).standard_normal(BLOCK_ELEMENTS, np.float32)
            for size in sizes:
                result["sizes"].extend(memory_rows(folder, size, block, threads))
            del block
        if not options.no_processes:
            result["processes"] = process_rows(folder, options.minilm, options.repeats, options.tensors)
    if result["sizes"]:
        print_table(
            (
                "model GB",
                "threads",
                "largest coded tensor MB",
                "seconds",
                "without start-up",
                "GB/s",
                "peak anonymous MB",
                "bits",
                "coded",
                "kept in error",
            ),
            (
                (
                    f"{row['model_bytes'] / 1e9:.2f}",
                    row.get("threads"),
                    f"{row['largest_layer_tensor_bytes'] / 1e6:.0f}",
                    f"{row['seconds']:.1f}",
                    f"{row['seconds_without_start']:.1f}",
                    f"{row['model_bytes'] / 1e9 / row['seconds_without_start']:.2f}",
                    f"{row['peak_anonymous_mb']:.0f}",
                    f"{row['bits_per_weight']:.3f}",
                    row["coded"],
                    len(row["kept"]),
                )
                for row in result["sizes"]
            ),
            f"compress --bits {BITS}",
        )
    if result["processes"]:
        print_table(
            ("process", "first s", "best s", "median s"),
            (
                (row["process"], *(f"{row[k]:.2f}" if k in row else None for k in ("first_s", "best_s", "median_s")))
                for row in result["processes"]
            ),
            "Whole processes",
        )
    if options.json:
        write_result(options.json, result)


if __name__ == "__main__":
    main()
