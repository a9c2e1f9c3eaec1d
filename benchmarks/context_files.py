"""Contexts in files, beside what they save: seconds of a prefill, of saving and loading its pages, and bytes.

    python benchmarks/context_files.py MODEL TEXT --tokens 1900 --formats INT4 FP16
    python benchmarks/context_files.py MODEL TEXT --tokens 8000 --formats INT4 \\
        --json benchmarks/results/DATE-context-files-8k.json

The loaded cache has to have the same pages bit for bit, and to go on with the same 64 greedy tokens.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from bench_common import environment_path, provenance, require_inputs, write_result

from kvpack import KVPackCache
from kvpack.integrations.transformers.cache import cache_keyword
from kvpack.integrations.transformers.contexts import model_fingerprint

NEW_TOKENS = 64


def timed(work: Any, rounds: int = 1) -> tuple[float, Any]:
    """Least seconds of several runs, and the last result."""
    best, result = float("inf"), None
    for _ in range(rounds):
        began = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - began)
    return best, result


def pages(cache: Any) -> list[bytes]:
    count = -(-cache.kv.length(0, 0) // 64)
    return [page.cpu().numpy().tobytes() for page in cache.kv.read_pages(cache.kv.entries[:, :, 0, :count])]


@torch.no_grad()
def measure(model: Any, ids: Any, page_format: str, path: Path) -> dict[str, Any]:
    """One row: of a context of all but the last token."""
    formats = None if page_format == "FP16" else page_format
    cache = KVPackCache(model.config, formats=formats, dtype=torch.float16)
    keyword = cache_keyword(model)

    def fill() -> None:
        cache.reset()
        model(ids[:, :-1], use_cache=True, logits_to_keep=1, **{keyword: cache})

    prefill, _ = timed(fill, 2)
    cache.save(path, model, ids)  # what is compiled at the first use is
    KVPackCache.load(path, model)
    save, size_bytes = timed(lambda: cache.save(path, model, ids), 5)
    load, loaded = timed(lambda: KVPackCache.load(path, model), 5)
    same_pages = pages(loaded) == pages(cache)
    page_bytes = cache.kv.pools.bytes_in_use
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want, got = (model.generate(ids, **{keyword: one}, **options)[0, ids.shape[1] :] for one in (cache, loaded))
    return {
        "format": page_format,
        "tokens": ids.shape[1] - 1,
        "prefill_s": prefill,
        "save_s": save,
        "load_s": load,
        "fingerprint_s": timed(lambda: model_fingerprint(model), 3)[0],
        "file_bytes": size_bytes,
        "page_bytes": page_bytes,
        "fp16_bytes": 4 * loaded.kv.num_layers * loaded.kv.num_kv_heads * loaded.kv.head_dim * (ids.shape[1] - 1),
        "same_pages": same_pages,
        "same_tokens": int((want == got).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=1900)
    parser.add_argument("--formats", nargs="+", default=["FP16", "INT4", "INT2"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    require_inputs(parser, arguments.model, arguments.text)
    dtype = getattr(torch, arguments.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=dtype, attn_implementation="kvpack"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    text = arguments.text.read_text(encoding="utf-8")[20_000 : 20_000 + 10 * arguments.tokens]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : arguments.tokens + 1]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for page_format in arguments.formats:
            rows.append(measure(model, ids, page_format, Path(folder) / "context"))
            print(json.dumps(rows[-1]), flush=True)
    record = provenance({"KVPACK_BOOKS_TEXT": environment_path("KVPACK_BOOKS_TEXT")}, ("torch", "transformers"))
    record |= {"model": arguments.model.name, "dtype": arguments.dtype, "rows": rows}
    if arguments.json is not None:
        write_result(arguments.json, record)


if __name__ == "__main__":
    main()
