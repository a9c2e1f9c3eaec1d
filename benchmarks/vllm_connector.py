"""Conversations in vLLM that take turns, with more KV than its cache has room for: time to first token, hits and bytes.

    python benchmarks/vllm_connector.py MODEL TEXT
    python benchmarks/vllm_connector.py MODEL TEXT --json benchmarks/results/DATE-vllm-connector.json
    python benchmarks/vllm_connector.py MODEL --modes "vLLM alone;16-bit;16-bit, again" --turn-tokens 2000

vLLM's own prefix cache is on, and holds one conversation or two. Each turn brings a piece of text that stands for an
answer and the next question. Requests come one after the other, and each is saved before the next one comes, outside of
the time that is taken: the least of all conversations, for each turn. *Again* is another engine, which finds the files
of the one before. vLLM alone is measured first and last: how far that differs is what the machine's other work does.
Without TEXT prompts are random tokens, for models that have no tokenizer.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_common import device_record, environment_path, print_table, provenance, require_inputs, write_result

for variable, value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}.items():
    os.environ.setdefault(variable, value)  # before vLLM is imported

PACKAGES = ("torch", "vllm-cpu", "vllm", "triton", "cupy-cuda13x")
# (name, pages); engines of the same pages use the same directory
MODES = (
    ("vLLM alone", None),
    ("16-bit", "16-bit"),
    ("16-bit, again", "16-bit"),
    ("INT8", "INT8"),
    ("INT8, again", "INT8"),
    ("INT4", "INT4"),
    ("INT4, again", "INT4"),
    ("vLLM alone, again", None),
)


def prompts_of(ids: list[int], options: argparse.Namespace) -> list[tuple[int, list[int]]]:
    """(turn, prompt) of each request: all conversations' first turns, then all their second ones, …"""
    system, place = ids[: options.system_tokens], options.system_tokens
    conversations = [list(system) for _ in range(options.conversations)]
    found = []
    for turn in range(options.turns):
        for conversation in conversations:
            conversation += ids[place : place + options.turn_tokens]
            place += options.turn_tokens
            found.append((turn, list(conversation)))
    if place > len(ids):
        raise SystemExit(f"the text has {len(ids)} tokens; {place} are needed")
    return found


def run(model: Path, pages: str | None, directory: Path, requests: Any, options: argparse.Namespace) -> dict[str, Any]:
    """One engine over all requests."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    from kvpack.integrations.vllm.llvmlite_vars import give_vars

    give_vars()
    transfer = None
    if pages is not None:
        transfer = KVTransferConfig(
            kv_connector="KVPackConnector",
            kv_connector_module_path="kvpack.integrations.vllm.kv_connector",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={"directory": str(directory), "pages": pages},
        )
    llm = LLM(
        str(model),
        kv_transfer_config=transfer,
        enforce_eager=True,
        skip_tokenizer_init=True,
        block_size=128,
        gpu_memory_utilization=0.2 if torch.cuda.is_available() else 0.92,  # the engine before may not be gone
        max_model_len=options.cache_blocks * 128,
        num_gpu_blocks_override=options.cache_blocks + 1,
        disable_log_stats=False,
    )
    sampling = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    llm.generate([{"prompt_token_ids": [1] * 200}], sampling, use_tqdm=False)
    seconds: dict[int, list[float]] = {}
    answers = []
    for turn, prompt in requests:
        began = time.perf_counter()
        (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        seconds.setdefault(turn, []).append(time.perf_counter() - began)
        answers.append(output.outputs[0].token_ids[0])
        if has_kv_transfer_group():
            get_kv_transfer_group()._store.drain()
    if has_kv_transfer_group():
        llm.generate([{"prompt_token_ids": [1]}], sampling, use_tqdm=False)  # brings the last counts
    counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    unregister_metrics()
    return {
        "first_token_s": statistics.mean(min(of_turn) for of_turn in seconds.values()),
        "first_token_s_by_turn": [min(of_turn) for of_turn in seconds.values()],
        "prompt_tokens": sum(len(prompt) for _, prompt in requests),
        "own_hit_tokens": int(counts["vllm:prefix_cache_hits"]),
        "loaded_tokens": int(counts.get("vllm:kvpack_loaded_tokens", 0)),
        "loaded_bytes": int(counts.get("vllm:kvpack_loaded_bytes", 0)),
        "saved_pages": int(counts.get("vllm:kvpack_saved_pages", 0)),
        "saved_bytes": int(counts.get("vllm:kvpack_saved_bytes", 0)),
        "file_bytes": sum(path.stat().st_size for path in directory.rglob("*.safetensors")) if pages else 0,
        "answers": answers,
    }


def unregister_metrics() -> None:
    """The next engine counts from zero."""
    import prometheus_client

    registry = prometheus_client.REGISTRY
    for collector, names in list(registry._collector_to_names.items()):
        if any(name.startswith("vllm:") for name in names):
            registry.unregister(collector)


def tokens_of(options: argparse.Namespace) -> list[int]:
    """Of the text, or random ones."""
    if options.text is None:
        return random.Random(1).choices(range(1000), k=1_000_000)
    from transformers import AutoTokenizer

    text = options.text.read_text(encoding="utf-8")[20_000:200_000]
    ids: list[int] = AutoTokenizer.from_pretrained(options.model)(text)["input_ids"]
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, nargs="?")
    parser.add_argument("--modes", default=";".join(name for name, _ in MODES), help="names, between semicolons")
    parser.add_argument("--conversations", type=int, default=6)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--system-tokens", type=int, default=200)
    parser.add_argument("--turn-tokens", type=int, default=250)
    parser.add_argument("--cache-blocks", type=int, default=12, help="of 128 tokens, in vLLM's own cache")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    require_inputs(parser, options.model, *filter(None, [options.text]))
    requests = prompts_of(tokens_of(options), options)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.modes.split(";"):
            pages = dict(MODES)[name]
            rows.append({"mode": name} | run(options.model, pages, Path(folder) / str(pages), requests, options))
            print(rows[-1] | {"answers": None}, flush=True)
    alone = rows[0]["answers"]
    for row in rows:
        row["same_answers"] = sum(a == b for a, b in zip(row.pop("answers"), alone, strict=True))
    shown = [
        [
            row["mode"],
            f"{row['first_token_s']:.3f}",
            " ".join(f"{one:.2f}" for one in row["first_token_s_by_turn"]),
            row["own_hit_tokens"],
            row["loaded_tokens"],
            f"{row['file_bytes'] / 1e6:.1f}",
            row["same_answers"],
        ]
        for row in rows
    ]
    print_table(["engine", "first token, s", "by turn", "own hits", "loaded", "files, MB", "same"], shown)
    record = provenance({"KVPACK_BOOKS_TEXT": environment_path("KVPACK_BOOKS_TEXT")}, PACKAGES)
    names = ("conversations", "turns", "system_tokens", "turn_tokens", "cache_blocks")
    record |= {"model": options.model.name, "requests": len(requests), "rows": rows}
    record |= {"workload": {name: getattr(options, name) for name in names}}
    import torch

    if torch.cuda.is_available():
        record |= {"device": device_record(torch.device("cuda"))}
    if options.json is not None:
        write_result(options.json, record)


if __name__ == "__main__":
    main()
