"""``kvpack generate``."""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpack.cli.failures import ExitCode, exit_codes, require_transformers
from kvpack.cli.options import CacheBits, CacheBudget, ComputeDevice, ComputeDtype, ComputeDtypeOption, Json
from kvpack.cli.printing import counted, progress_bar, shown_number
from kvpack.errors import InputError, SnapshotError

if TYPE_CHECKING:
    from kvpack.encode.progress import Progress
    from kvpack.format.snapshot import SnapshotHeader
    from kvpack.integrations.transformers.text_generation import Generation
    from kvpack.runtime.kv.snapshot import OnCorrupt


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
    load_context: Annotated[
        Path | None,
        typer.Option("--load-context", metavar="FILE", help="The prompt goes on behind what was saved there."),
    ] = None,
    drop_damaged: Annotated[
        bool, typer.Option("--drop-damaged", help="Of a damaged context take the runs of 2,048 tokens before it.")
    ] = False,
    save_context: Annotated[
        Path | None,
        typer.Option("--save-context", metavar="FILE", help="Save prompt and answer as the model has read them."),
    ] = None,
    device: ComputeDevice = "auto",
    dtype: ComputeDtype = ComputeDtypeOption.AUTO,
    as_json: Json = False,
) -> None:
    """Continue a prompt, or answer a message with --chat; the text comes as it is made.

    What it took of time and memory goes to stderr at the end, also after Ctrl-C.
    """
    with exit_codes(as_json):
        prompts = _prompts(prompt, prompt_file, is_needed=load_context is None)
        if system is not None and not chat:
            raise typer.BadParameter("--system needs --chat", param_hint="--system")
        if system is not None and load_context is not None:
            raise typer.BadParameter("a context goes on; --system is for its beginning", param_hint="--system")
        if load_context is not None and (kv_bits, kv_budget) != (None, None):
            advice = "its pages have the bits that they were saved with; kvpack kv convert gives them others"
            raise typer.BadParameter(f"{load_context}: {advice}", param_hint="--kv-bits/--kv-budget")
        if drop_damaged and load_context is None:
            raise typer.BadParameter("--drop-damaged is for --load-context", param_hint="--drop-damaged")
        if save_context is not None and len(prompts) > 1:
            raise typer.BadParameter("a context is of one prompt", param_hint="--save-context")
        if top_p == 0:
            raise typer.BadParameter("0 leaves no token to draw from", param_hint="--top-p")
        from kvpack.integrations.transformers.cache_options import CacheOptions

        # What can be refused is refused before torch is loaded, or else before the model is: both take long.
        options = None if kv_bits is None and kv_budget is None else CacheOptions(kv_bits, kv_budget)
        header = None if load_context is None else _context_header(load_context)
        if save_context is not None:
            _check_output(save_context)
        require_transformers("kvpack generate")
        from kvpack.integrations.transformers.attention_registration import ATTENTION_NAME
        from kvpack.integrations.transformers.cache import KVPackCache
        from kvpack.integrations.transformers.causal_models import (
            expected_dtype,
            load_causal_model,
            load_config,
            load_tokenizer,
        )
        from kvpack.integrations.transformers.contexts import check_configuration
        from kvpack.integrations.transformers.text_generation import chat_prompt, chat_turn, generate_text, tokenized

        if options is None and save_context is not None and load_context is None:
            options = CacheOptions(16)
        attention = None if options is None and load_context is None else ATTENTION_NAME
        config, tokenizer = load_config(model), load_tokenizer(model)
        if options is not None:
            options.check(config)
        if header is not None:
            check_configuration(header, config, expected_dtype(config, dtype.value))
        if chat and load_context is not None:
            prompts = [chat_turn(tokenizer, message) for message in prompts]
        elif chat:
            prompts = [chat_prompt(tokenizer, message, system) for message in prompts]
        # Of a damaged context, how many tokens are left is not known yet.
        context_tokens = 0 if header is None else 1 if drop_damaged else header.tokens
        tokenized(
            tokenizer, config, prompts, is_chat=chat, context_tokens=context_tokens, max_new_tokens=max_new_tokens
        )
        start = time.perf_counter()
        loaded = load_causal_model(model, device=device, dtype=dtype.value, attention=attention)
        cache, context = None if options is None else options.new(loaded, len(prompts)), []
        if load_context is not None:
            on_corrupt: OnCorrupt = "drop_from_here" if drop_damaged else "raise"
            cache = KVPackCache.load([load_context] * len(prompts), loaded, on_corrupt=on_corrupt)
            context = cache.ids[0].tolist()
            if not context:
                raise SnapshotError(f"{load_context}: the first tokens are damaged, and nothing is before them")
            if min(context) < 0:
                raise InputError(f"{load_context} does not say what all of its tokens are: it can be read by KVCache")
        load_seconds = time.perf_counter() - start
        with ExitStack() as opened:
            result = generate_text(
                loaded,
                tokenizer,
                prompts,
                is_chat=chat,
                cache=cache,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                on_text=None if as_json else lambda text: print(text, end="", flush=True),
                context=context,
                save_context=save_context,
                progress=None if as_json or not sys.stderr.isatty() else _PromptBar(opened),
            )
        result = replace(result, load_seconds=load_seconds)
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
        if save_context is not None:
            print("kvpack: no context was saved", file=sys.stderr)
        raise typer.Exit(int(ExitCode.INTERRUPTED))


class _PromptBar:
    """A bar on stderr while a long prompt is read, gone before the text comes; ``opened`` closes it after an error."""

    def __init__(self, opened: ExitStack) -> None:
        self._opened, self._done = opened, 0
        self._bar: Progress | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = self._opened.enter_context(progress_bar("reading the prompt", unit="tokens"))
            self._bar.total(total)
        self._bar.advance(done - self._done)
        self._done = done
        if done == total:
            self._opened.close()


def _context_header(path: Path) -> SnapshotHeader:
    """
    Raises:
        InputError: a directory.
        FormatError, OSError: no context, or a damaged one.
    """
    from kvpack.format.snapshot import SnapshotFile

    if path.is_dir():
        raise InputError(f"{path} is a directory: name one file; `kvpack kv inspect {path}` lists its contexts")
    with SnapshotFile(path) as file:
        return file.header


def _check_output(path: Path) -> None:
    """Whether a context can be saved there.

    Raises:
        InputError: there is a file of another kind, which is not replaced, or a directory; it cannot be written to.
    """
    from kvpack.format.snapshot import check_replaceable
    from kvpack.format.temporary_files import check_writable

    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is no directory: the context cannot be saved there")
    check_replaceable(path)
    try:
        check_writable(path, "tmp")
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{path} cannot be written ({reason}): name a file in a folder that can be written to"
        ) from None


def _prompts(prompt: list[str] | None, file: Path | None, *, is_needed: bool) -> list[str]:
    if prompt and file is not None:
        raise typer.BadParameter("--prompt and --prompt-file are both given", param_hint="--prompt-file")
    if prompt:
        return prompt
    if file is None and not is_needed:
        return [""]
    if file is None:
        raise typer.BadParameter("give a --prompt or a --prompt-file", param_hint="--prompt")
    try:
        return [sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")]
    except IsADirectoryError:
        raise typer.BadParameter(f"{file} is a directory; a text file is wanted", param_hint="--prompt-file") from None
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{file} is not UTF-8 text ({error})", param_hint="--prompt-file") from None


def _mb(size_bytes: int) -> str:
    """In one unit, so that sizes of a line can be compared."""
    return f"{shown_number(size_bytes / 1e6)} MB"


def _print(result: Generation) -> None:
    weights, kv = result.weights, result.kv_bytes
    dense = "" if weights.bytes == weights.dense_bytes else f" ({_mb(weights.dense_bytes)} dense)"
    whole = "" if kv == result.kv_bytes_16_bit else f" ({_mb(result.kv_bytes_16_bit)} in 16 bits)"
    context = [f"{counted(result.context_tokens, 'token')} of context"] if result.context_tokens else []
    shared = f" ({result.shared_tokens} of each shared)" if result.shared_tokens else ""
    parts = [
        *context,
        counted(result.prompt_tokens, "prompt token") + shared,
        f"{result.new_tokens} new",
        f"prefill {shown_number(result.prefill_seconds)} s",
        f"{shown_number(result.tokens_per_second, 1)} tokens/s",
        f"loaded in {shown_number(result.load_seconds)} s",
        f"weights {_mb(weights.bytes)}{dense}",
        f"KV {_mb(kv)}{whole}",
        f"peak memory {_mb(result.peak_memory_bytes)}",
    ]
    ended = "interrupted; " if result.interrupted else ""
    print(f"kvpack: {ended}{', '.join(parts)}", file=sys.stderr)
    if result.saved_bytes is not None:
        assert result.saved_tokens is not None
        saved = counted(result.saved_tokens, "token")
        print(f"kvpack: saved a context of {saved}, {_mb(result.saved_bytes)}", file=sys.stderr)
