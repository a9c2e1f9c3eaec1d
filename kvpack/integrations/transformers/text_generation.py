"""Text from a causal language model as it comes, with what it took of time and memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer, TextStreamer

from kvpack.errors import CacheInputError, InputError
from kvpack.format.pages import PAGE_TOKENS
from kvpack.integrations.transformers.cache import KVPackCache, cache_keyword
from kvpack.integrations.transformers.causal_models import (
    WeightMemory,
    kv_bytes,
    kv_bytes_16_bit,
    peak_memory_bytes,
    position_limit,
    weight_memory,
)
from kvpack.integrations.transformers.prefill import prefill
from kvpack.runtime.kv.steps import CELL_TOKENS

DEFAULT_NEW_TOKENS = 256


@dataclass(frozen=True)
class Generation:
    """What came of the prompts.

    Attributes:
        texts: what follows each prompt, without special tokens.
        prompt_tokens, new_tokens: of all prompts together, without padding; end tokens count as new.
        context_tokens: that the cache held before, in front of each prompt.
        prefill_seconds: from the call to the first token of all prompts.
        tokens_per_second: new tokens after the first ones, over the time that they took; None if there are none.
        weights: what the weights take in memory.
        kv_bytes: keys and values at the end, as the cache holds them.
        kv_bytes_16_bit: what the same tokens take in 16 bits.
        peak_memory_bytes: see :func:`peak_memory_bytes`.
        interrupted: whether Ctrl-C ended it.
        saved_tokens, saved_bytes: what ``save_context`` was written with; None: nothing was saved.
        shared_tokens: that all prompts begin with, and that were read once.
        load_seconds: that loading the model took, and its context; None: it was there.
    """

    texts: tuple[str, ...]
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float | None
    tokens_per_second: float | None
    weights: WeightMemory
    kv_bytes: int
    kv_bytes_16_bit: int
    peak_memory_bytes: int
    interrupted: bool
    context_tokens: int = 0
    saved_tokens: int | None = None
    saved_bytes: int | None = None
    shared_tokens: int = 0
    load_seconds: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """What ``kvpack generate --json`` prints."""
        return {"ok": True, **asdict(self)}


class _Text(TextStreamer):
    """Hands pieces of text on instead of printing them."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)


class _Tokens(BaseStreamer):
    """Collects what ``generate`` gives out, and when the first and the last token came."""

    def __init__(self, text: Any) -> None:  # a _Text or None
        self.text = text
        self.steps: list[torch.Tensor] = []
        self.first_time = self.last_time = 0.0
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        self.last_time = time.perf_counter()
        if not self.steps:
            self.first_time = self.last_time
        self.steps.append(value.reshape(-1))
        if self.text is not None:
            self.text.put(value.reshape(-1))

    def end(self) -> None:
        if self.text is not None:
            self.text.end()


def chat_prompt(tokenizer: Any, message: str, system: str | None = None) -> str:
    """What the tokenizer's chat template makes of a user's message, up to where the answer begins.

    Raises:
        InputError: the tokenizer has no chat template, or the template has no place for a system message.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("the tokenizer has no chat template: the model is no chat model; leave --chat out")
    messages = [{"role": "user", "content": message}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        text: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except ImportError:
        raise
    except Exception as error:  # templates raise what they like
        raise InputError(f"the chat template does not take these messages: {error}") from None
    return text


def opened_chat(tokenizer: Any) -> str | None:
    """What the tokenizer's chat template puts before a user's message; None if there is none, or it takes none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        text: str = tokenizer.apply_chat_template([{"role": "user", "content": _ANSWER}], tokenize=False)
    except ImportError:
        raise
    except Exception:  # templates raise what they like
        return None
    opened, mark, _ = text.partition(_ANSWER)
    return opened if mark else None


# Stands for what the model has answered, or a user has said, in what a template makes of a conversation.
_ANSWER = "\N{OBJECT REPLACEMENT CHARACTER}"


def chat_turn(tokenizer: Any, message: str) -> str:
    """What the tokenizer's chat template puts behind an answer that the model has given, up to the next one.

    Raises:
        InputError: as of :func:`chat_prompt`; or the template does not take conversations of several turns.
    """
    chat_prompt(tokenizer, message)
    earlier = [{"role": "user", "content": "…"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text: str = tokenizer.apply_chat_template(
            [*earlier, {"role": "user", "content": message}], add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # templates raise what they like
        raise InputError(f"the chat template does not take a second message: {error}") from None
    if text.count(_ANSWER) != 1:
        raise InputError("the chat template does not keep earlier answers: a context cannot go on with --chat")
    return text.partition(_ANSWER)[2]


def tokenized(
    tokenizer: Any,
    config: Any,
    prompts: Sequence[str],
    *,
    is_chat: bool = False,
    context_tokens: int = 0,
    max_new_tokens: int | None = None,
) -> tuple[list[list[int]], int]:
    """Ids of prompts, and the most tokens that may follow them: what :func:`generate_text` begins with. It can be asked
    before the model is loaded.

    Args:
        config: of the model.
        context_tokens: that the cache holds in front of each prompt.
        is_chat, max_new_tokens: as of :func:`generate_text`.

    Raises:
        InputError: no prompt, one without tokens, or one too long for the model.
    """
    if not prompts:
        raise InputError("no prompt is given")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; at least one is needed")
    begins = not is_chat and not context_tokens
    rows = [tokenizer(prompt, add_special_tokens=begins).input_ids for prompt in prompts]
    longest = max(map(len, rows))
    if not context_tokens and not min(map(len, rows)):
        raise InputError("a prompt has no tokens: it is empty")
    limit = position_limit(config)
    room = DEFAULT_NEW_TOKENS if limit is None else limit - longest - context_tokens
    if max_new_tokens is None:
        max_new_tokens = max(1, min(DEFAULT_NEW_TOKENS, room))
    if limit is not None and max_new_tokens > room:
        raise InputError(
            f"{f'a context of {context_tokens} tokens, ' * bool(context_tokens)}a prompt of {longest} tokens and "
            f"{max_new_tokens} new ones are more than the {limit} positions that the model has: a shorter prompt or a "
            "smaller --max-new-tokens is needed"
        )
    return rows, max_new_tokens


def generate_text(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    is_chat: bool = False,
    cache: Any = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
    context: Sequence[int] = (),
    save_context: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Generation:
    """Continue prompts, several as one batch that is padded on the left.

    Into a :class:`~kvpack.KVPackCache` prompts of more than 2,048 tokens are read in several passes
    (:func:`~.prefill.prefill`). A page or more that several prompts have in common is read once, if the cache has
    ``formats`` and room for as many rows.

    Args:
        is_chat: the prompts are of :func:`chat_prompt` or :func:`chat_turn`, so that the tokenizer adds no tokens of
            its own.
        cache: a cache of transformers, empty, as of :meth:`CacheOptions.new`; a ``DynamicCache`` by default.
        max_new_tokens: 256 by default, or as many as the model has positions for.
        temperature: 0 takes the most probable token each time; above, tokens are drawn.
        top_p: tokens are drawn from the most probable ones that have this share.
        on_text: called with pieces of the text as it comes; of a single prompt alone.
        context: ids of the tokens that the cache, a :class:`~kvpack.KVPackCache`, holds in each row: prompts go on
            behind them, without what the tokenizer puts in front of a text, and may be empty.
        save_context: file that prompt and answer are saved to, end tokens left out; of a single prompt, and of a
            :class:`~kvpack.KVPackCache`. Nothing is saved when Ctrl-C has ended it.
        progress: called behind each of several passes over a long prompt with how many columns are done, and of how
            many.

    Raises:
        InputError: a prompt without tokens, one too long for the model, or a number out of its range; several prompts,
            or another cache, with ``save_context``.
        CacheInputError: the cache does not hold ``context``.
    """
    if save_context is not None and (len(prompts) != 1 or not isinstance(cache, KVPackCache)):
        raise InputError("a context is saved of one prompt, and of a KVPackCache (--kv-bits or --kv-budget)")
    if temperature < 0 or not 0 < top_p <= 1:
        raise InputError(f"temperature is {temperature} and top_p {top_p}; they must be ≥ 0, and above 0 up to 1")
    ends = _end_tokens(model)
    padding = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, *ends) if i is not None), 0)
    held = list(context)
    rows, max_new_tokens = tokenized(
        tokenizer, model.config, prompts, is_chat=is_chat, context_tokens=len(held), max_new_tokens=max_new_tokens
    )
    longest = max(map(len, rows))
    start = time.perf_counter()
    prompt_tokens, context_tokens = sum(map(len, rows)), len(held)
    cache = transformers.DynamicCache(config=model.config) if cache is None else cache
    shared = [] if held else _shared(rows, cache)
    if shared:
        prefill(model, rows[0][: len(shared) + 1], cache)
        cache.select_rows([0] * len(rows))
        held, rows = shared, [row[len(shared) :] for row in rows]
        longest -= len(shared)
    pads = [longest - len(row) for row in rows]
    ids = torch.tensor([held + [padding] * n + row for n, row in zip(pads, rows, strict=True)], device=model.device)
    mask = torch.ones_like(ids)
    for row, n in enumerate(pads):
        mask[row, len(held) : len(held) + n] = 0
    if held and cache.reuse(ids) < min(len(held), ids.shape[1] - 1):
        raise CacheInputError(f"the cache does not hold the {len(held)} tokens of the context")
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    text = _Text(tokenizer, on_text) if on_text is not None and len(rows) == 1 else None
    streamer = _Tokens(text)
    interrupted = False
    torch.manual_seed(seed)
    try:
        if _is_long(cache, longest, has_pads=any(pads)):
            prefill(model, ids, cache, attention_mask=mask, progress=progress)
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=padding,
            streamer=streamer,
            **{cache_keyword(model): cache},
            **sampling,
        )
    except KeyboardInterrupt:
        interrupted = True
        streamer.end()
    found = [_until_end([int(step[row]) for step in streamer.steps], ends) for row in range(len(rows))]
    new_tokens, steps = sum(map(len, found)), len(streamer.steps)
    decoding = streamer.last_time - streamer.first_time
    saved_tokens = saved_bytes = None
    if save_context is not None and not interrupted:
        answer = found[0][:-1] if found[0][-1] in ends else found[0]
        saved_tokens, saved_bytes = _save(model, cache, [*ids[0].tolist(), *answer], save_context)
    return Generation(
        texts=tuple(tokenizer.decode(row, skip_special_tokens=True) for row in found),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        prefill_seconds=streamer.first_time - start if steps else None,
        tokens_per_second=(new_tokens - len(rows)) / decoding if steps > 1 and decoding > 0 else None,
        weights=weight_memory(model),
        kv_bytes=kv_bytes(cache),
        kv_bytes_16_bit=kv_bytes_16_bit(cache),
        peak_memory_bytes=peak_memory_bytes(model.device),
        interrupted=interrupted,
        context_tokens=context_tokens,
        saved_tokens=saved_tokens,
        saved_bytes=saved_bytes,
        shared_tokens=len(shared),
    )


def _shared(rows: list[list[int]], cache: Any) -> list[int]:
    """What all of several prompts begin with, but for the last token of each, if it is worth a pass of its own."""
    if len(rows) < 2 or not isinstance(cache, KVPackCache) or cache.is_read_elsewhere():
        return []
    if cache.observes or cache.room_for_rows < len(rows):
        return []
    most = min(map(len, rows)) - 1
    same = next((i for i, of_rows in enumerate(zip(*rows, strict=False)) if len(set(of_rows)) > 1), most)
    return rows[0][: min(same, most)] if min(same, most) >= PAGE_TOKENS else []


def _is_long(cache: Any, columns: int, *, has_pads: bool) -> bool:
    """Whether so many columns are read in several passes."""
    if not isinstance(cache, KVPackCache) or cache.is_read_elsewhere() or (cache.observes and has_pads):
        return False
    return columns > CELL_TOKENS


@torch.no_grad()
def _save(model: Any, cache: KVPackCache, ids: list[int], path: str | os.PathLike[str]) -> tuple[int, int]:
    """Tokens and bytes of the file. The last token that ``generate`` gave out was not fed yet."""
    row = torch.tensor([ids], device=model.device)
    if row.shape[1] > (before := cache.get_seq_length()):
        given = {cache_keyword(model): cache, "attention_mask": torch.ones_like(row)}
        model(input_ids=row[:, before:], use_cache=True, **given)
    return len(ids), cache.save(path, model, row)


def _end_tokens(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _until_end(row: list[int], ends: list[int]) -> list[int]:
    """Up to the first end token, which is the last that counts: what follows in a batch is padding."""
    return row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))]
