"""``kvpack generate``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpack.cli.failures import ExitCode, exit_codes, require_transformers
from kvpack.cli.options import CacheBits, CacheBudget, ComputeDevice, ComputeDtype, ComputeDtypeOption, Json
from kvpack.cli.printing import shown_number

if TYPE_CHECKING:
    from kvpack.integrations.transformers.text_generation import Generation


def generate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model directory, coded or ordinary.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="Repeatable: several make a batch.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", metavar="FILE", help="The prompt, in UTF-8; - is standard input.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a message; use the chat template.")] = False,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="A system message before it, with --chat.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", min=1, help="Default: 256, or what the model has positions for."),
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, help="0 takes the most probable token each time.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0, max=1, help="Draw from the most probable tokens of this share.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the draws.")] = 0,
    kv_bits: CacheBits = None,
    kv_budget: CacheBudget = None,
    device: ComputeDevice = "auto",
    dtype: ComputeDtype = ComputeDtypeOption.AUTO,
    as_json: Json = False,
) -> None:
    """Continue a prompt, or answer a message with --chat; the text comes as it is made.

    What it took of time and memory goes to stderr at the end, also after Ctrl-C.
    """
    with exit_codes(as_json):
        prompts = _prompts(prompt, prompt_file)
        if system is not None and not chat:
            raise typer.BadParameter("--system needs --chat", param_hint="--system")
        require_transformers("kvpack generate")
        from kvpack.integrations.transformers.cache import ATTENTION_NAME
        from kvpack.integrations.transformers.causal_models import CacheOptions, load_causal_model, load_tokenizer
        from kvpack.integrations.transformers.text_generation import chat_prompt, generate_text

        cache = None if kv_bits is None and kv_budget is None else CacheOptions(kv_bits, kv_budget)
        attention = None if cache is None else ATTENTION_NAME
        tokenizer = load_tokenizer(model)
        if chat:
            prompts = [chat_prompt(tokenizer, message, system) for message in prompts]
        loaded = load_causal_model(model, device=device, dtype=dtype.value, attention=attention)
        result = generate_text(
            loaded,
            tokenizer,
            prompts,
            is_chat=chat,
            cache=None if cache is None else cache.new(loaded),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            on_text=None if as_json else lambda text: print(text, end="", flush=True),
        )
    if as_json:
        print(json.dumps(result.as_dict(), allow_nan=False))
    else:
        if len(prompts) == 1:
            print(flush=True)
        else:
            for number, text in enumerate(result.texts, 1):
                print(f"--- prompt {number}\n{text}")
        _print(result)
    if result.interrupted:
        raise typer.Exit(int(ExitCode.INTERRUPTED))


def _prompts(prompt: list[str] | None, file: Path | None) -> list[str]:
    if prompt and file is not None:
        raise typer.BadParameter("--prompt and --prompt-file are both given", param_hint="--prompt-file")
    if prompt:
        return prompt
    if file is None:
        raise typer.BadParameter("give a --prompt or a --prompt-file", param_hint="--prompt")
    try:
        return [sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{file} is not UTF-8 text ({error})", param_hint="--prompt-file") from None


def _mb(size_bytes: int) -> str:
    """In one unit, so that sizes of a line can be compared."""
    return f"{shown_number(size_bytes / 1e6)} MB"


def _print(result: Generation) -> None:
    weights, kv = result.weights, result.kv_bytes
    dense = "" if weights.bytes == weights.dense_bytes else f" ({_mb(weights.dense_bytes)} dense)"
    whole = "" if kv == result.kv_bytes_16_bit else f" ({_mb(result.kv_bytes_16_bit)} in 16 bits)"
    parts = [
        f"{result.prompt_tokens} prompt tokens",
        f"{result.new_tokens} new",
        f"prefill {shown_number(result.prefill_seconds)} s",
        f"{shown_number(result.tokens_per_second, 1)} tokens/s",
        f"weights {_mb(weights.bytes)}{dense}",
        f"KV {_mb(kv)}{whole}",
        f"peak memory {_mb(result.peak_memory_bytes)}",
    ]
    ended = "interrupted; " if result.interrupted else ""
    print(f"kvpack: {ended}{', '.join(parts)}", file=sys.stderr)
