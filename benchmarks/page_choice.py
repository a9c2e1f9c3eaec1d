"""By what should pages be chosen? The share of attention that chosen pages have, in a real model, by what tells it.

    python benchmarks/page_choice.py "$KVPACK_BOOKS_MODEL" "$KVPACK_BOOKS_TEXT" --context 2048 --windows 4

Queries are those of the last 64 tokens of each window, every --every-th of them; keys are not quantized. Scores of a
page, of which each head takes a softmax over all pages, and heads the mean, as ``attend(…, pages=k)`` does it:

    range w         q · middle + w · |q| · half of the width, 4 bytes a channel; at w = 1 a bound, as in Quest
    mean            q · mean of the keys: 2 bytes a channel
    mean, variance  log of the mean of exp, were keys normal and channels independent: 4 bytes a channel
    4 means         log of the sum of exp, over means of 16 tokens: 8 bytes a channel
    4 ranges w      the largest of ranges of 16 tokens: 16 bytes a channel
    keys            the true log of the sum of exp

The first page and the last two are always chosen. ``hits`` is how many of the chosen others were in slots, with
--slots times as many slots as pages are chosen, behind the first 16 tokens.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_common import print_table, require_inputs

from kvpack.format.pages import PAGE_TOKENS
from kvpack.runtime.kv.retrieval import LEAST_PAGES, WIDTH

SHARES = (0.05, 0.1, 0.2)
QUERIES = 64
Scores = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def range_scores(width: float, parts: int, q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    by_part = keys.unflatten(2, (parts, -1))
    least, greatest = by_part.amin(3), by_part.amax(3)
    found = torch.einsum("hgqd,hpnd->hgqpn", q, (least + greatest) / 2)
    found += width * torch.einsum("hgqd,hpnd->hgqpn", q.abs(), (greatest - least) / 2)
    return found.amax(-1)


def mean_scores(parts: int, q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return torch.einsum("hgqd,hpnd->hgqpn", q, keys.unflatten(2, (parts, -1)).mean(3)).logsumexp(-1)


def normal_scores(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    spread = torch.einsum("hgqd,hpd->hgqp", q.square(), keys.var(2, unbiased=False))
    return mean_scores(1, q, keys) + spread / 2


def true_scores(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return torch.einsum("hgqd,hptd->hgqpt", q, keys).logsumexp(-1)


RULES: dict[str, Scores] = {
    **{f"range {width:g}": functools.partial(range_scores, width, 1) for width in (1, WIDTH, 0.25)},
    "mean": functools.partial(mean_scores, 1),
    "mean, variance": normal_scores,
    "4 means": functools.partial(mean_scores, 4),
    **{f"4 ranges {width:g}": functools.partial(range_scores, width, 4) for width in (1, WIDTH)},
    "keys": true_scores,
}


def recorded(options: argparse.Namespace) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each window and layer q [query heads, QUERIES, head_dim] and k [KV heads, tokens, head_dim]."""
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from kvpack.integrations.transformers.evaluation import text_windows

    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def recording(module: Any, q: torch.Tensor, k: torch.Tensor, *args: Any, **named: Any) -> Any:
        found.append((q[0, :, -QUERIES:].clone(), k[0].clone()))
        return sdpa_attention_forward(module, q, k, *args, **named)

    AttentionInterface.register("recording", recording)
    text = options.text.read_text(encoding="utf-8")
    windows = text_windows(
        AutoTokenizer.from_pretrained(options.model), text, context=options.context, windows=options.windows
    )
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    model.set_attn_implementation("recording")
    with torch.inference_mode():
        for ids in windows.ids:
            model(input_ids=ids[None], use_cache=False, logits_to_keep=1)
    return found


def chosen(scores: torch.Tensor, pages: int) -> torch.Tensor:
    """[queries, pages], of scores [KV heads, group, queries, all pages]."""
    joint = scores.log_softmax(-1).flatten(0, 1).logsumexp(0)
    joint[:, 0] = joint[:, -2:] = math.inf
    return joint.topk(pages).indices


def hits(pages: torch.Tensor, slots: int, all_pages: int) -> list[float]:
    """Of each step, which pages were in slots that are filled in turn, but for those that are used."""
    ring: list[int] = [-1] * slots
    hand, found = 0, []
    for of_step in pages.tolist():
        wanted = [page for page in of_step if 0 < page < all_pages - 2]
        missing = [page for page in wanted if page not in ring]
        for page in missing:
            while ring[hand] in wanted:
                hand = (hand + 1) % slots
            ring[hand] = page
            hand = (hand + 1) % slots
        if wanted:
            found.append(1 - len(missing) / len(wanted))
    return found[16:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--context", type=int, default=2048, help="tokens of a window, a multiple of 64")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--slots", type=float, default=1.5)
    options = parser.parse_args()
    require_inputs(parser, options.model, options.text)
    if options.context % PAGE_TOKENS:
        parser.error(f"--context is {options.context}; a multiple of {PAGE_TOKENS} is wanted")
    all_pages = options.context // PAGE_TOKENS
    counts = [max(LEAST_PAGES + 1, round(share * all_pages)) for share in SHARES]
    masses: dict[str, list[list[float]]] = {name: [[] for _ in SHARES] for name in RULES}
    kept: list[list[float]] = [[] for _ in SHARES]
    for q, k in recorded(options):
        keys = k.unflatten(1, (all_pages, PAGE_TOKENS))
        by_head = q.unflatten(0, (len(k), -1)) / math.sqrt(q.shape[-1])
        some = by_head[:, :, :: options.every]
        mass = true_scores(some, keys).softmax(-1)
        for name, rule in RULES.items():
            scores = rule(some, keys)
            for n, count in enumerate(counts):
                pages = chosen(scores, count).expand(*mass.shape[:3], -1)
                masses[name][n].append(float(mass.gather(-1, pages).sum(-1).mean()))
        scores = range_scores(WIDTH, 1, by_head, keys)
        for n, count in enumerate(counts):
            kept[n] += hits(chosen(scores, count), round(options.slots * count), all_pages)
    rows = [[name, *(f"{100 * statistics.mean(of_share):.2f}" for of_share in found)] for name, found in masses.items()]
    rows.append(["hits", *(f"{100 * statistics.mean(found):.1f}" for found in kept)])
    headings = ["score", *(f"{count} of {all_pages} pages" for count in counts)]
    print_table(headings, rows, f"{options.model.name}: mass that chosen pages have, and hits, %")


if __name__ == "__main__":
    main()
