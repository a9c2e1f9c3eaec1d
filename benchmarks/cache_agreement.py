"""What a quantized cache changes in a model's predictions, through transformers: KVPackCache against the default cache.

    python benchmarks/cache_agreement.py "$KVPACK_BOOKS_MODEL" "$KVPACK_BOOKS_TEXT" \\
        --json benchmarks/results/DATE-cache-agreement-books.json

Windows of a text go through the model a token at a time. At each token the probabilities that the model gives with
KVPackCache and ``attn_implementation="kvpack"`` are compared with those of transformers' default cache and ``sdpa``:
the KL distance, and whether both find the same token the most probable. A cache's name is ``16 bits``, that of a page
format, or ``budget`` and a fraction.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from bench_common import environment_path, print_table, provenance, require_inputs, write_result
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kvpack import KVPackCache
from kvpack.integrations.transformers.evaluation import ReferenceLogits, measure, step_by_step, text_windows

DEFAULT_CACHES = "16 bits,INT8,INT4,INT3,budget 0.3"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--caches", default=DEFAULT_CACHES)
    parser.add_argument("--context", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="of the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    require_inputs(parser, options.model, options.text)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = options.text.read_text(encoding="utf-8")
    windows = text_windows(tokenizer, text, context=options.context, windows=options.windows)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
    model = model.to(options.device)
    rows: list[dict[str, Any]] = []

    def row(name: str, new_cache: Callable[[], Any], reference: ReferenceLogits, *, keeps: bool = False) -> None:
        made: list[Any] = []

        def remembered() -> Any:
            made.append(new_cache())
            return made[-1]

        begin = time.perf_counter()
        found = step_by_step(model, windows, remembered)
        quality = measure(reference.keep(found) if keeps else found, windows, None if keeps else reference)
        seconds = time.perf_counter() - begin
        bits = made[0].average_bits() if isinstance(made[0], KVPackCache) else 16.0
        print(f"{name}: {seconds:.0f} s, perplexity {quality.perplexity.value:.3f}", file=sys.stderr)
        rows.append({"cache": name, "bits": bits, "seconds": seconds, **dataclasses.asdict(quality)})

    with ReferenceLogits(windows) as reference:
        row("default", lambda: DynamicCache(config=model.config), reference, keeps=True)
        model.set_attn_implementation("kvpack")
        for name in options.caches.split(","):
            arguments = cache_options(name.strip())
            row(name.strip(), lambda arguments=arguments: KVPackCache(model.config, **arguments), reference)
    print_table(
        ("cache", "bits", "perplexity", "KL, nats", "same top token"),
        [
            (
                found["cache"],
                f"{found['bits']:.2f}",
                f"{found['perplexity']['value']:.3f}",
                *(shown(found[name]) for name in ("kl", "same_top_token")),
            )
            for found in rows
        ],
        f"{options.model.name}, {len(windows.ids)} windows of {windows.ids.shape[1]} tokens",
    )
    if options.json is not None:
        variables = {name: environment_path(name) for name in ("KVPACK_BOOKS_MODEL", "KVPACK_BOOKS_TEXT")}
        record = provenance(variables, ("torch", "transformers"))
        write_result(
            options.json,
            record
            | {
                "model": options.model.name,
                "windows": len(windows.ids),
                "context": int(windows.ids.shape[1]),
                "dtype": options.dtype,
                "device": options.device,
                "transformers": transformers.__version__,
                "rows": rows,
            },
        )


def cache_options(name: str) -> dict[str, Any]:
    kind, _, value = name.partition(" ")
    if kind == "budget":
        return {"budget": float(value)}
    return {} if name == "16 bits" else {"formats": name}


def shown(mean: dict[str, Any] | None) -> str:
    if mean is None:
        return ""
    error = mean["standard_error"]
    return f"{mean['value']:.5f}" + ("" if error is None else f" ± {error:.5f}")


if __name__ == "__main__":
    main()
