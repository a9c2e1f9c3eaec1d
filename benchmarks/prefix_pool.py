"""What a PrefixPool saves: prompts that begin with the same document, read anew each time and out of a pool.

    python benchmarks/prefix_pool.py MODEL TEXT --document 1500 --prompts 4 --formats FP16 INT4

Each prompt is the document and 30 tokens from elsewhere in the text. Both ways have the same cache and ``prefill``; the
pool is empty at first. Seconds are of all prompts, behind one that compiles.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from kvpack import KVPackCache
from kvpack.bench.provenance import environment
from kvpack.integrations.transformers.cache import cache_keyword
from kvpack.integrations.transformers.prefill import prefill
from kvpack.integrations.transformers.prefix_pool import PrefixPool

QUESTION_TOKENS = 30


def measure(model: Any, ids: torch.Tensor, arguments: argparse.Namespace, page_format: str) -> dict[str, Any]:
    cache_options = {"formats": None if page_format == "FP16" else page_format, "dtype": torch.float16}
    options = {"max_new_tokens": arguments.new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    document, rest = ids[:, : arguments.document], ids[:, arguments.document :]
    questions = rest.split(QUESTION_TOKENS, dim=1)[: arguments.prompts]
    prompts = [torch.cat([document, question], 1) for question in questions]
    PrefixPool(model, **cache_options).generate(prompts[0], **options)  # compiles
    pool = PrefixPool(model, **cache_options)
    reused, found = [], []
    start = time.perf_counter()
    for prompt in prompts:
        reused.append(pool.match(prompt[:, :-1]))
        found.append(pool.generate(prompt, **options))
    with_pool = time.perf_counter() - start
    same = 0
    start = time.perf_counter()
    for prompt, out in zip(prompts, found, strict=True):
        cache = KVPackCache(model.config, **cache_options)
        prefill(model, prompt, cache)
        alone = model.generate(prompt, **{cache_keyword(model): cache}, **options)
        same += int((alone == out)[0, prompt.shape[1] :].sum())
    without = time.perf_counter() - start
    return {
        "format": page_format,
        "prompt_tokens": sum(prompt.shape[1] for prompt in prompts),
        "reused_tokens": sum(reused),
        "pool_s": with_pool,
        "alone_s": without,
        "same_tokens": same,
        "new_tokens": arguments.new_tokens * len(prompts),
        "prefix_bytes": pool.manager.metrics().prefix_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--document", type=int, default=1500, help="tokens that all prompts begin with")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--formats", nargs="+", default=["FP16", "INT4"])
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, attn_implementation="kvpack")
    model = model.to(arguments.device).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    tokens = arguments.document + QUESTION_TOKENS * arguments.prompts
    text = arguments.text.read_text(encoding="utf-8")[20_000 : 20_000 + 10 * tokens]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :tokens].to(model.device)
    for page_format in arguments.formats:
        print(json.dumps(measure(model, ids, arguments, page_format)), flush=True)
    print(json.dumps(environment(("torch", "transformers"))))


if __name__ == "__main__":
    main()
