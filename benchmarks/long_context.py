"""What attention to some pages of a long context loses: on keys whose right answer is known, and in a model.

    python benchmarks/long_context.py
    python benchmarks/long_context.py --model "$KVPACK_BOOKS_MODEL" --text "$KVPACK_BOOKS_TEXT"

Constructed contexts (one layer, 2 KV heads of 128 with 4 query heads each, all of which ask for one token):

    needle     a token says what a query asks for; all others are of topics that last for about 100 tokens each
    multi-key  as needle, but it is one of 64 such tokens, which are scattered over the context
    one-off    as needle, but all other keys are independent of each other and alike in all directions: the worst case

Needles get 0.9 of each head's attention to all tokens. ``recall`` is how often the needle's page is chosen, ``mass``
the share of the attention to all tokens that chosen pages have, ``best`` that of as many pages chosen by it, and
``error`` the distance of outputs from those of attention to all pages, relative to their norm.

With a model: windows of a text, all but the last --decoded tokens of which are a prompt. These are given, a step a
token, with attention to --pages pages of each layer; predictions are compared with those of attention to all pages.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from bench_common import print_table, require_inputs

from kvpack import KVCache, PageFormat, attention_with_kv_cache
from kvpack.format.pages import PAGE_TOKENS, half_split_order
from kvpack.runtime.kv.cache import MASS_UNIT

KV_HEADS, HEADS, HEAD_DIM = 2, 8, 128
SHARES = (0.01, 0.02, 0.05, 0.1, 0.25)
FORMATS: dict[str, PageFormat | None] = {"16 bits": None, "INT4": PageFormat.INT4, "INT2": PageFormat.INT2}
_RANK, _TOPIC_TOKENS, _NOISE, _ROPE_BASE, _NEEDLE_SHARE = 24, 100, 0.3, 1e6, 0.9


def rotated(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[…, tokens, head_dim] by RoPE."""
    angle = positions[:, None] * _ROPE_BASE ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def context(case: str, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """q [1, HEADS, 1, HEAD_DIM], k and v [1, KV_HEADS, tokens, HEAD_DIM], and the token that all heads ask for.

    What tokens are about lies in the quarter of dimensions that RoPE turns slowest, as it does in trained models.
    """
    random = torch.Generator().manual_seed(seed)
    normal = functools.partial(torch.randn, generator=random)
    needles = 64 if case == "multi-key" else 1
    # Not among the last pages nor in the first, which are chosen anyway.
    at = (torch.randperm(tokens - 4 * PAGE_TOKENS, generator=random)[:needles] + PAGE_TOKENS).sort().values
    asked = int(torch.randint(needles, (1,), generator=random))
    v = normal(KV_HEADS, tokens, HEAD_DIM)
    slow = torch.zeros(HEAD_DIM)
    slow.view(-1, 16)[list(half_split_order(HEAD_DIM)[:2])] = 1
    if case == "one-off":
        k, about = normal(KV_HEADS, tokens, HEAD_DIM), normal(KV_HEADS, needles, HEAD_DIM)
    else:
        directions = normal(KV_HEADS, _RANK, HEAD_DIM) * slow / math.sqrt(_RANK)
        topics = normal(KV_HEADS, tokens // _TOPIC_TOKENS + 1, _RANK)
        ends = torch.randint(0, topics.shape[1], (tokens,), generator=random).sort().values
        k = topics[:, ends] @ directions + _NOISE * normal(KV_HEADS, tokens, HEAD_DIM) + normal(KV_HEADS, 1, HEAD_DIM)
        about = normal(KV_HEADS, needles, HEAD_DIM) * slow
    where, of_head = int(at[asked]), torch.arange(HEADS) // (HEADS // KV_HEADS)
    # A head's query is not just what it asks for.
    q = about[of_head, asked]
    q = q + 0.5 * q.std() * normal(HEADS, HEAD_DIM)
    k[:, at] = (0 if case == "one-off" else k.mean(1, keepdim=True)) + about
    if case != "one-off":
        k, q = rotated(k, torch.arange(tokens)), rotated(q[:, None], torch.tensor([tokens - 1.0]))[:, 0]
    # As large as gives each head's needle its share.
    scores = torch.einsum("hd,htd->ht", q, k[of_head])
    for head in range(HEADS):
        others = torch.cat([scores[head, :where], scores[head, where + 1 :]]).double()
        least, most = 0.0, 1e3
        for _ in range(60):
            size = (least + most) / 2
            ahead = size * scores[head, where].double() - (size * others).logsumexp(0)
            least, most = (size, most) if ahead < math.log(_NEEDLE_SHARE / (1 - _NEEDLE_SHARE)) else (least, size)
        q[head] *= most * math.sqrt(HEAD_DIM)
    return q[None, :, None].half(), k[None].half(), v[None].half(), where


def measured(
    case: str, tokens: int, page_format: PageFormat | None, shares: list[float], seeds: int
) -> list[list[Any]]:
    found: dict[float, list[tuple[float, ...]]] = {share: [] for share in shares}
    counts: dict[float, int] = {}
    for seed in range(seeds):
        q, k, v, needle = context(case, tokens, seed)
        cache = KVCache(1, KV_HEADS, HEAD_DIM, tokens, device="cpu", formats=page_format)
        cache.append(0, k, v)

        def attend(
            pages: int | None, q: torch.Tensor = q, cache: KVCache = cache
        ) -> tuple[torch.Tensor, torch.Tensor, float]:
            """Outputs, masses and seconds."""
            before, begin = cache.mass[0, 0].clone(), time.perf_counter()
            out, _ = attention_with_kv_cache(q, None, None, cache, pages=pages)
            seconds = time.perf_counter() - begin
            attention_with_kv_cache(q, None, None, cache, pages=pages, observe=True)
            return out.float(), (cache.mass[0, 0] - before).double() * MASS_UNIT, seconds

        full, mass, full_seconds = attend(None)
        for share in shares:
            pages = counts[share] = max(4, round(share * tokens / PAGE_TOKENS))
            out, chosen, seconds = attend(pages)
            recall = float(chosen[needle // PAGE_TOKENS] > 0)
            kept = mass[chosen > 0].sum()
            pinned = mass[[0, -2, -1]].sum()
            best = pinned + mass[1:-2].topk(pages - 3).values.sum()
            error = (out - full).norm() / full.norm()
            found[share].append((recall, float(kept), float(best), float(error), seconds, full_seconds))
    return [
        [counts[share], f"{100 * share:.0f} %"]
        + [f"{statistics.mean(values):.3f}" for values in list(zip(*rows, strict=True))[:4]]
        + [f"{1e3 * statistics.median(values):.1f}" for values in list(zip(*rows, strict=True))[4:]]
        for share, rows in found.items()
    ]


def in_a_model(options: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvpack import KVPackCache
    from kvpack.integrations.transformers.evaluation import text_windows

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    windows = text_windows(
        tokenizer, options.text.read_text(encoding="utf-8"), context=options.context, windows=options.windows
    )
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    model.set_attn_implementation("kvpack")
    prompt = options.context - options.decoded

    def predictions(pages: int | None) -> torch.Tensor:
        """Log-probabilities [windows, tokens, vocabulary]."""
        cache, found = KVPackCache(model.config, formats=options.format, pages=pages), []
        with torch.inference_mode():
            model(input_ids=windows.ids[:, :prompt], past_key_values=cache, logits_to_keep=1)
            for at in range(prompt, options.context):
                logits = model(input_ids=windows.ids[:, at : at + 1], past_key_values=cache).logits[:, -1]
                found.append(logits.log_softmax(-1))
        return torch.stack(found, 1)

    full, rows = predictions(None), []
    targets = windows.ids[:, prompt + 1 :, None]

    def loss(of: torch.Tensor) -> float:
        return -float(of[:, :-1].gather(-1, targets).mean())

    for pages in options.pages:
        some = predictions(pages)
        kl = float((full.exp() * (full - some)).sum(-1).mean())
        same = float((full.argmax(-1) == some.argmax(-1)).float().mean())
        rows.append((pages, f"{kl:.5f}", f"{100 * same:.2f} %", f"{loss(some) - loss(full):+.5f}"))
        print(rows[-1], flush=True)
    print_table(
        ("pages", "KL, nats", "same top token", "loss more, nats"),
        rows,
        f"{options.model.name}, the last {options.decoded} of {options.context} tokens, {len(windows.ids)} windows, "
        f"{options.format}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--cases", nargs="+", default=["needle", "multi-key", "one-off"])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--context", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--decoded", type=int, default=64, help="tokens of it that are compared")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--format", default="INT4", help="of the model's pages")
    parser.add_argument("--pages", type=int, nargs="+", default=[4, 8, 16])
    options = parser.parse_args()
    if options.model is not None:
        require_inputs(parser, options.model, options.text)
        in_a_model(options)
        return
    headings = ("pages", "of all", "recall", "mass", "best", "error", "ms", "ms, all pages")
    for case in options.cases:
        for tokens in options.tokens:
            for name in options.formats:
                rows = measured(case, tokens, FORMATS[name], options.shares, options.seeds)
                print_table(headings, rows, f"{case}, {tokens} tokens, {name}")


if __name__ == "__main__":
    main()
