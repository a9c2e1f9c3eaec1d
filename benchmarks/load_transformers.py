"""Peak memory and time of ``from_pretrained``: a compressed directory against the original in bf16.

    python benchmarks/load_transformers.py MODEL [--device cuda] [--bits 4.25] [--repeats 5] [--json] [--profile]

Each load is a process of its own. Memory is the peak of the process's resident set, with mapped files, above what it
was before loading (on a GPU: what torch has allocated at most). transformers maps the files of a dense model on the CPU
and reads them when they are first used, so time is given twice: until ``from_pretrained`` returns, and until a first
forward pass over 8 tokens is done. Files are in the page cache. Imports are not in these times, neither side's: torch,
transformers and the model's module, kvpack, and on a GPU CuPy, which kvpack imports when a process uses its kernels for
the first time. ``cupy_s`` is what that takes; a first load in a process takes it besides. ``--profile`` lists the
functions in which ``from_pretrained`` of each spends the main thread's time, waiting included, in one more process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

LOAD = """
import sys, time, json, re
import torch, transformers, kvpack
from transformers import AutoModelForCausalLM
path, device, profile = sys.argv[1:]
transformers.utils.logging.disable_progress_bar()
config = transformers.AutoConfig.from_pretrained(path)
AutoModelForCausalLM._model_mapping[type(config)]  # imports the model's module
import kvpack.integrations.transformers.loading, kvpack.encode.blob_decoder, kvpack.runtime.weights.ops
cupy = 0.0
if device != "cpu":
    torch.empty(1, device=device)
    if getattr(config, "quantization_config", None):
        begin = time.perf_counter()
        kvpack.runtime.device.kernels.require_device(torch.device(device))
        cupy = time.perf_counter() - begin
def peak(what):
    return int(re.search(what + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")
before = peak("VmRSS")
begin = time.perf_counter()
def load():
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map=device)
    if device != "cpu":
        torch.cuda.synchronize()
    return model
if profile:
    import cProfile, pstats
    profiler = cProfile.Profile()
    profiler.runcall(load)
    pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(20)
    pstats.Stats(profiler).sort_stats("cumulative").print_stats("kvpack/", 30)
    raise SystemExit
model = load()
loaded = time.perf_counter() - begin
memory = torch.cuda.max_memory_allocated() if device != "cpu" else peak("VmHWM") - before
with torch.no_grad():
    model(torch.arange(3, 11, device=model.device)[None])[0].float().cpu()
ready = time.perf_counter() - begin
held = torch.cuda.memory_allocated() if device != "cpu" else peak("VmHWM") - before
times = {"load_s": loaded, "ready_s": ready, "cupy_s": cupy}
print(json.dumps({**times, "load_peak_bytes": memory, "ready_peak_bytes": held}))
"""


def run(path: Path, device: str, profile: str = "") -> str:
    command = [sys.executable, "-W", "ignore", "-c", LOAD, str(path), device, profile]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def measure(path: Path, device: str, repeats: int) -> dict[str, float]:
    """The median of each number over ``repeats`` processes."""
    runs = [json.loads(run(path, device).splitlines()[-1]) for _ in range(repeats)]
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def main() -> None:
    import torch
    import transformers

    import kvpack

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bits", type=float, default=4.25)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dense, coded = Path(folder) / "dense", Path(folder) / "coded"
        transformers.utils.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
        model.save_pretrained(dense)
        kvpack.compress(dense, coded, kvpack.QuantConfig(bits=options.bits))
        results = {}
        for name, path in (("bf16", dense), ("coded", coded)):
            file_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
            results[name] = measure(path, options.device, options.repeats) | {"file_bytes": file_bytes}
            if options.profile:
                print(f"{name}:\n{run(path, options.device, 'profile')}", file=sys.stderr)
    if options.json:
        about = {"model": options.model.name, "device": options.device, "bits": options.bits}
        print(json.dumps({**about, "transformers": transformers.__version__, "torch": torch.__version__, **results}))
        return
    for name, found in results.items():
        sizes = ", ".join(f"{key.removesuffix('_bytes')} {found[key] / 1e6:.1f} MB" for key in found if "bytes" in key)
        imported = f" (CuPy's import, not counted: {found['cupy_s']:.3f} s)" if found["cupy_s"] else ""
        print(f"{name:6} load {found['load_s']:.3f} s, first pass {found['ready_s']:.3f} s{imported}; {sizes}")


if __name__ == "__main__":
    main()
