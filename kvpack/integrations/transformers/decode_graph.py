"""Greedy decoding, one CUDA graph a token: what ``generate`` compiles for a StaticCache, for quantized pages too.

::

    model = AutoModelForCausalLM.from_pretrained("Llama-kvpack", attn_implementation="kvpack", device_map="cuda")
    decoder = DecodeGraph(model, KVPackCache(model.config, formats="INT4"), max_tokens=8192)
    tokens = decoder.generate(**tokenizer("A CUDA graph is", return_tensors="pt").to("cuda"), max_new_tokens=200)

A step of a model with 32 layers is more than a thousand launches. Python needs several times as long for them as the
device does. A graph repeats them with one call. What the host decides is done before each replay, without waiting for
the device: pages come, and others are quantized (:meth:`kvpack.KVCache.plan`). The next token is chosen inside.

The first step after the first prompt runs as usual, and compiles. Then the graph is captured, once, and serves all
steps and prompts to come: after ``cache.reset()`` the next prompt may have any length.

Rows of a batch may differ in length. A KVPackCache stores no pads, so that rows need positions of their own alone; a
StaticCache gets a mask of all its columns.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers.cache_utils import Cache, StaticCache
from transformers.modeling_utils import PreTrainedModel

from kvpack.errors import CacheFullError, CacheInputError, DeviceError, KvpackError
from kvpack.integrations.transformers.attention_registration import ATTENTION_NAME
from kvpack.integrations.transformers.cache import KVPackCache, cache_keyword

# How many tokens lie between two looks for ends of texts, which wait for the device.
_STEPS_BETWEEN_LOOKS = 16


class DecodeGraph:
    """A causal model of transformers and its cache, decoding one token a row and step.

    On the CPU the same calls run without a graph.

    Args:
        model: on one device, in evaluation mode.
        cache: a :class:`KVPackCache`, for a model whose ``attn_implementation`` is "kvpack", or a StaticCache.
        max_tokens: of a row, prompt included; None: what a StaticCache has room for. With a KVPackCache it is needed:
            the graph holds page tables of this size, and splits attention for it.

    Attributes:
        tokens: i64 [rows] on the device: the newest token of each row, overwritten by the next step. What is written
            here is what the next step goes on with: who samples puts the choice here.
        positions: i64 [rows] on the device: the position of that token.
        logits: [rows, vocabulary]: of the newest token, before one was chosen; overwritten by the next step.
        is_captured: whether steps replay a graph.

    Raises:
        CacheInputError: a cache or an attention function that cannot be captured; a model on several devices.

    >>> import torch, transformers
    >>> from kvpack import KVPackCache
    >>> from kvpack.integrations.transformers.decode_graph import DecodeGraph
    >>> config = transformers.LlamaConfig(vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2)
    >>> model = transformers.LlamaForCausalLM(config).half().eval()
    >>> model.set_attn_implementation("kvpack")
    >>> decoder = DecodeGraph(model, KVPackCache(model.config, formats="INT4"), max_tokens=64)
    >>> decoder.generate(torch.arange(3, 20)[None], max_new_tokens=4).shape
    torch.Size([1, 21])
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, *, max_tokens: int | None = None) -> None:
        if isinstance(cache, KVPackCache):
            if model.config.get_text_config(decoder=True)._attn_implementation != ATTENTION_NAME:
                raise CacheInputError(
                    "a KVPackCache can be captured in a CUDA graph by attn_implementation='kvpack' alone: call "
                    "model.set_attn_implementation('kvpack')"
                )
            if cache.pages is not None:
                raise CacheInputError(
                    f"the cache has pages={cache.pages}: a CUDA graph cannot choose which pages a step attends to"
                )
            if max_tokens is None:
                raise CacheInputError(
                    "max_tokens is missing: how many tokens a row may come to have, the prompt included"
                )
        elif isinstance(cache, StaticCache):
            if any(cache.is_sliding):
                raise CacheInputError(
                    "StaticCache counts the tokens of sliding windows on the host, which a CUDA graph does not repeat: "
                    "use a KVPackCache"
                )
            room = cache.get_max_length()
            max_tokens = room if max_tokens is None else min(room, max_tokens)
        else:
            raise CacheInputError(
                f"{type(cache).__name__} grows at each step, which a CUDA graph does not repeat: use a KVPackCache or "
                "a StaticCache"
            )
        devices = list(dict.fromkeys(p.device for p in model.parameters() if not p.is_meta))
        if len(devices) > 1:
            raise CacheInputError(
                f"the model's layers lie on several devices ({', '.join(map(str, devices))}), and a CUDA graph is one "
                "device's: load the model on one, or use model.generate"
            )
        self.model, self.cache, self.max_tokens = model, cache, max_tokens
        self.device: torch.device = next(model.parameters()).device
        self._cache_keyword = cache_keyword(model)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._graph: torch.cuda.CUDAGraph | None = None
        self._has_run = False
        self._longest = 0  # columns, which are at least as many as tokens
        self._input: torch.Tensor | None = None
        self._mask: torch.Tensor | None = None
        self.logits: torch.Tensor | None = None

    @property
    def is_captured(self) -> bool:
        return self._graph is not None

    @property
    def tokens(self) -> torch.Tensor:
        return self._started()[0, :, 0]

    @property
    def positions(self) -> torch.Tensor:
        return self._started()[1, :, 0]

    def _started(self) -> torch.Tensor:
        if self._input is None:
            raise CacheInputError("there is no token to go on with: call prompt() or start() first")
        return self._input

    @torch.no_grad()
    def prompt(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Put a prompt into the empty cache, without a graph, and choose the first token of each row.

        Args:
            input_ids: i64 [rows, columns]; attention_mask: [rows, columns], 0 where they are pads, which are on the
                left. None: no pads.

        Returns:
            :attr:`tokens`.

        Raises:
            CacheInputError: the cache is not empty; other shapes; pads on the right; another number of rows than
                the graph has.
            CacheFullError: more columns than ``max_tokens``.
        """
        if self._columns_held():
            raise CacheInputError("the cache holds tokens already: call cache.reset() before another prompt")
        rows, columns = input_ids.shape
        positions = torch.arange(columns, device=input_ids.device).expand(rows, columns)
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise CacheInputError(
                    f"attention_mask has shape {list(attention_mask.shape)}, input_ids {list(input_ids.shape)}"
                )
            attention_mask = attention_mask.long()
            if not attention_mask[:, -1].all():
                raise CacheInputError("a row ends in a pad; prompts are padded on the left (padding_side='left')")
            positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            attention_mask = None if attention_mask.all() else attention_mask
        self._require_room(columns, 0)
        kept = {"logits_to_keep": 1} if self._keeps_logits else {}
        out = self._call(input_ids, positions, attention_mask, **kept)
        self.logits = out.logits[:, -1]
        self.start(self.logits.argmax(-1), positions[:, -1] + 1, attention_mask)
        return self.tokens

    def start(self, tokens: torch.Tensor, positions: torch.Tensor, attention_mask: torch.Tensor | None = None) -> None:
        """Go on with these tokens, behind what the cache holds, however it has come there.

        Args:
            tokens: i64 [rows], not in the cache yet; positions: i64 [rows], theirs.
            attention_mask: [rows, columns held], for pads that a StaticCache holds.

        Raises:
            CacheInputError: another number of rows than the graph has; pads where it has none.
        """
        given = torch.stack([tokens.to(self.device), positions.to(self.device)])[..., None]
        if self._input is None:
            self._input = given.clone()
        elif self._input.shape != given.shape:
            raise CacheInputError(
                f"{len(tokens)} rows, where the graph has {self._input.shape[1]}: make another DecodeGraph"
            )
        else:
            self._input.copy_(given)
        self._longest = self._columns_held()
        if isinstance(self.cache, KVPackCache):
            return
        if self._mask is None and attention_mask is not None:
            if self.is_captured:
                raise CacheInputError("the graph was captured for a batch without pads: make another DecodeGraph")
            shape = (len(tokens), self.cache.get_max_length())
            self._mask = torch.ones(shape, dtype=torch.int64, device=self.device)
        if self._mask is not None:
            self._mask.fill_(1)
            if attention_mask is not None:
                self._mask[:, : attention_mask.shape[1]] = attention_mask

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """One more token of each row. Waits for the device only with a budget, every 32 steps.

        Returns:
            :attr:`tokens`: chosen behind those that this step put into the cache.

        Raises:
            CacheInputError: the KVPackCache has been reset, cropped or used by others since the last step.
            CacheFullError: a row would exceed ``max_tokens``, or pages the device's memory.
            DeviceError: the model's step cannot be captured in a CUDA graph.
        """
        self._started()
        if isinstance(self.cache, KVPackCache) and self._columns_held() != self._longest:
            raise CacheInputError(
                f"the cache holds {self._columns_held()} columns, and {self._longest} behind the last step: call "
                "prompt() or start() first"
            )
        self._require_room(1, self._longest)
        if self._has_run and self._graph is None and self.device.type == "cuda":
            self._graph = self._captured()
        if self._graph is None:
            self._forward()
            self._has_run = True
        else:
            if isinstance(self.cache, KVPackCache):
                self.cache.plan_step()
            self._graph.replay()
        self._longest += 1
        return self.tokens

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
    ) -> torch.Tensor:
        """A prompt and what follows it, as ``model.generate(…, do_sample=False)`` returns it.

        Looks for ends every 16 tokens, and waits for the device then. What was decoded behind them is in the cache too.

        Args:
            max_new_tokens: at most, of each row; 1 or more.
            eos_token_id: each of these ends a row; behind it come ``pad_token_id`` (None: the first of these). None: no
                row ends.

        Returns:
            i64 [rows, columns of the prompt + at most max_new_tokens].

        Raises:
            CacheInputError, CacheFullError, DeviceError: as of :meth:`prompt` and :meth:`step`.
        """
        if max_new_tokens < 1:
            raise CacheInputError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        self._require_room(input_ids.shape[1] + max_new_tokens - 1, 0)
        found = [self.prompt(input_ids, attention_mask).clone()]
        ends = None if eos_token_id is None else torch.tensor(eos_token_id, device=self.device).reshape(-1)
        while len(found) < max_new_tokens:
            is_look = len(found) % _STEPS_BETWEEN_LOOKS == 0
            if ends is not None and is_look and torch.isin(torch.stack(found), ends).any(0).all():
                break
            found.append(self.step().clone())
        new = torch.stack(found, dim=1)
        if ends is not None:
            is_end = torch.isin(new, ends)
            behind = is_end.cumsum(-1) - is_end.long() > 0
            new = new.masked_fill(behind, int(ends[0]) if pad_token_id is None else pad_token_id)
            new = new[:, : int((~behind).sum(-1).max())]
        return torch.cat([input_ids.to(new.device), new], dim=1)

    def reallocate(self) -> None:
        """Divide a budget's bytes anew, now: see :meth:`kvpack.KVCache.reallocate`. The cache does so by itself, too.

        Raises:
            CacheInputError: the cache has no pages.
        """
        if not isinstance(self.cache, KVPackCache) or self.cache.kv is None:
            raise CacheInputError("reallocate() is for a KVPackCache that holds tokens")
        self.cache.kv.reallocate()

    def _columns_held(self) -> int:
        held = self.cache.get_seq_length()
        return int(held)  # StaticCache has it on the device

    def _require_room(self, new: int, held: int) -> None:
        if held + new > self.max_tokens:
            raise CacheFullError(
                f"{new} tokens behind {held} are more than max_tokens, {self.max_tokens}: make a DecodeGraph with more"
            )

    def _call(self, input_ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None, **options: Any) -> Any:
        options[self._cache_keyword] = self.cache
        return self.model(input_ids=input_ids, position_ids=positions, attention_mask=mask, use_cache=True, **options)

    def _forward(self) -> None:
        """All that a step does on the device."""
        assert self._input is not None
        tokens, positions = self._input
        self.logits = self._call(tokens, positions, self._mask).logits[:, -1]
        tokens.copy_(self.logits.argmax(-1, keepdim=True))
        positions.add_(1)

    def _captured(self) -> torch.cuda.CUDAGraph:
        """
        Raises:
            DeviceError
        """
        around: Any = nullcontext()
        if isinstance(self.cache, KVPackCache):
            assert self.cache.kv is not None
            self.cache.kv.reserve_tokens(min(self.max_tokens, self.cache.kv.max_tokens))
            around = self.cache.captured_step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
        random_state = generator.get_state()
        try:
            # Both would be those of the current device.
            stream = torch.cuda.Stream(self.device)
            with around, torch.cuda.device(self.device), torch.cuda.graph(graph, stream=stream):
                self._forward()
        except KvpackError:
            raise
        except RuntimeError as error:
            # torch leaves its generator as if the capture went on: all random numbers would fail from here.
            fresh = torch.Generator(self.device)
            fresh.set_state(random_state)
            generator.graphsafe_set_state(fresh.graphsafe_get_state())
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DeviceError(
                f"a step of {type(self.model).__name__} cannot be captured in a CUDA graph ({reason}): something in it "
                "waits for the device, or depends on values; use model.generate"
            ) from error
        return graph
