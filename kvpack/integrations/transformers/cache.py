"""A :class:`kvpack.KVCache` as a cache of transformers' models and of ``generate`` (docs/TRANSFORMERS.md).

::

    model = AutoModelForCausalLM.from_pretrained("Llama", attn_implementation="kvpack")
    cache = KVPackCache(model.config, formats=PageFormat.INT4)
    model.generate(**inputs, past_key_values=cache)

transformers sees a cache as long as the padded columns that came. Pads are never stored: a row of the batch holds the
tokens that its attention mask admits, so that rows differ in length, and attention needs no mask.

``update`` writes nothing: the attention function "kvpack" (:mod:`kvpack.integrations.transformers.attention`) finds the
layer, writes the new tokens and attends to all of them in one call. With any other attention function ``update``
returns all keys and values dequantized, which is slow, and pads are stored with the rest.
"""

from __future__ import annotations

import inspect
import itertools
import os
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn, Self

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.configuration_utils import PreTrainedConfig

from kvpack.errors import CacheFullError, CacheInputError
from kvpack.format.pages import GROUP_DIMS, MAX_GROUPS, PageFormat
from kvpack.integrations.transformers import rotary
from kvpack.integrations.transformers.attention_registration import ATTENTION_NAME
from kvpack.integrations.transformers.contexts import (
    Ids,
    TokenIds,
    common_columns,
    load_rows,
    save_row,
    token_rows,
)
from kvpack.runtime.kv.allocator import Policy
from kvpack.runtime.kv.cache import KVCache, OpenFormats
from kvpack.runtime.kv.retrieval import LEAST_PAGES
from kvpack.runtime.kv.snapshot import UNKNOWN_TOKEN, OnCorrupt
from kvpack.runtime.kv.steps import CELL_TOKENS

# Page tables grow by need: this is no memory.
_MAX_TOKENS = 1 << 24
# How many forward passes lie between two looks at all pages, which wait for the device.
_STEPS_BETWEEN_REALLOCATIONS = 32
# What layers of a configuration may be; of others the cache is no keys and values, or a mask is wanted.
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_LAYER_CLASSES = frozenset({"DynamicLayer", "DynamicSlidingWindowLayer"})

Mask = npt.NDArray[np.bool_]
NamedFormats = str | Sequence[tuple[PageFormat | str, PageFormat | str]]


def forward_parameters(model: Any) -> frozenset[str]:
    """What a model's ``forward`` takes; of one of PEFT, which takes anything, what the model beneath does."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return frozenset(inspect.signature(inner.forward).parameters)


def cache_keyword(model: Any) -> str:
    """By what name a model's ``forward``, and ``generate``, take a cache: transformers 5.24 has renamed it."""
    return "cache" if "cache" in forward_parameters(model) else "past_key_values"


class ColumnCount(int):
    """How many columns a mask has, with the cache that said so.

    A mask function is told sizes, and nothing of the cache that it makes a mask for.
    """

    cache: KVPackCache

    @classmethod
    def of(cls, columns: int, cache: KVPackCache) -> ColumnCount:
        count = cls(columns)
        count.cache = cache
        return count


class KVPackLayer(CacheLayerMixin):  # type: ignore[misc, no-untyped-call]
    """A layer of a :class:`KVPackCache`, as transformers sees it.

    Attributes:
        cache, index: which layer of which cache.
        kv, kv_layer: where its pages are: which layer of which :class:`~kvpack.KVCache`; None before the first tokens.
        columns: padded columns that the cache holds; tokens may be fewer.
        pending: new keys and values, which wait for the attention function.
    """

    # generate() would make 4-d masks beforehand, and compile the forward pass by itself.
    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = True

    def __init__(self, cache: KVPackCache, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Weakly: else a cache would go with the next garbage collection, which knows nothing of a GPU's memory.
        self._cache = weakref.ref(cache)
        self.index = index
        self.kv: KVCache | None = None
        self.kv_layer = index
        self.columns = 0
        self.pending: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def cache(self) -> KVPackCache:
        found = self._cache()
        if found is None:
            raise ReferenceError("the KVPackCache that this layer is of is no more: keep it as long as its layers")
        return found

    @torch.compiler.disable
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.kv, self.kv_layer = self.cache.prepare(self.index, key_states, value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Raises:
            CacheInputError: the model's attention does not read the cache; keys and values that pages cannot hold.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.pending is not None:
            raise CacheInputError(
                f"layer {self.index}: attention has not read the tokens that came before. This model does not call the "
                "attention function 'kvpack', or a forward pass has failed: reset() the cache, and use another "
                "attn_implementation"
            )
        if self.cache.is_read_elsewhere():
            return self.cache.append_and_read(self, key_states, value_states)
        self.pending = key_states, value_states
        attention_arguments = kwargs.get("kwargs")
        if isinstance(attention_arguments, dict):  # from 5.24: what the attention function is called with
            attention_arguments["kvpack_layer"] = self
        else:
            key_states.kvpack_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def take_pending(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Called by the attention function, with what the model gives it.

        Raises:
            CacheInputError: not what :meth:`update` has returned.
        """
        pending, self.pending = self.pending, None
        if torch.compiler.is_compiling():
            return
        for name, given, expected in zip(("keys", "values"), (key, value), pending or (None, None), strict=True):
            if expected is None or given.shape != expected.shape or given.data_ptr() != expected.data_ptr():
                raise CacheInputError(
                    f"layer {self.index}: the model changes {name} between cache and attention; kvpack's attention "
                    "reads them from the cache. Use another attn_implementation, or another cache"
                )

    def get_seq_length(self) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        columns = self.columns + query_length
        if torch.compiler.is_compiling():  # which knows no subclasses of int
            self.cache.announce_mask()
            return columns, 0
        return (columns if self.cache.is_read_elsewhere() else ColumnCount.of(columns, self.cache)), 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:  # to 5.19
        return -1

    def reset(self) -> None:
        self.columns, self.pending = 0, None

    # Each of these is called for every layer, and done for all at the first.

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.index == 0:
            self.cache.select_rows(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.index == 0:
            self.cache.select_rows(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.index == 0:
            self.cache.select_rows([row for row in range(self.cache.rows) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise CacheInputError(f"crop({tokens_to_remove}); minus the number of tokens to remove is wanted")
        if tokens_to_remove == 0:
            return
        self.columns = max(self.columns + tokens_to_remove, 0)
        if self.index == 0:
            self.cache.crop_columns(-tokens_to_remove)

    def offload(self) -> None:
        raise CacheInputError("KVPackCache cannot be offloaded to the CPU")

    prefetch = offload


class _Part(NamedTuple):
    """Layers that follow one another on one device: the first of them, and their pages."""

    first: int
    device: torch.device
    kv: KVCache


class KVPackCache(Cache):  # type: ignore[misc]
    """Keys and values of a causal language model in kvpack's pages: 16 bits, or a quarter of that, or by importance.

    With ``attn_implementation="kvpack"`` attention reads pages in place. With any other the cache gives out everything
    dequantized: right, slow, and said in a warning.

    Args:
        config: the model's own ``model.config``.
        formats: what pages become when they leave the recent window: a :class:`~kvpack.PageFormat` or its name
            ("INT4"), or a pair of such (of K, of V) for each layer. With neither this nor ``budget``, 16 bits.
        budget: bytes of pages as a fraction of those in 16 bits, divided by what attention looks at.
        recent_tokens, sinks: of each sequence the newest and the first ones, in 16 bits.
        max_tokens: of a sequence; pages come by need. None: 16 million.
        max_sequences: rows of the batch; None: as many as come first (with beams, batch times beams).
        dtype: of 16-bit pages, fp16 or bf16. None: the model's, and fp16 for one in fp32.
        policy: with a ``budget``, as of :class:`~kvpack.KVCache`; None: "importance".
        max_bytes: as of :class:`~kvpack.KVCache`.
        key_order: the same; None: after the model's rotary positions (:mod:`~kvpack.integrations.transformers.rotary`).
        pages: a step of one token attends to so many pages of 64 tokens of each row, those that can matter most to it
            (docs/KV.md, "Long contexts"); layers with sliding windows to what is in theirs. None: all of them.
        device_pages: as of :class:`~kvpack.KVCache`: quantized pages lie in host memory, and so many of each layer and
            row on the device too. At least ``pages``, which has to be given with it.

    Of a model on several devices, layers that follow one another on one of them have a :class:`~kvpack.KVCache` to
    themselves, and ``budget`` and ``max_bytes`` are those of each.

    Attributes:
        rows: of the batch.
        is_partial: whether more of the prompt follows the tokens that come now (:meth:`partial_prompt`).
        sequences: which ones of the :class:`~kvpack.KVCache` the rows are; None: 0, 1, ….
        pages: as given; it may be changed between steps.

    Raises:
        PageError: a ``key_order`` that does not have each group once.
        CacheInputError: another option; a model whose layers are no causal attention with keys and values of their own.

    >>> import torch, transformers
    >>> from kvpack import KVPackCache
    >>> config = transformers.LlamaConfig(vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2)
    >>> model = transformers.LlamaForCausalLM(config).half().eval()
    >>> model.set_attn_implementation("kvpack")
    >>> cache = KVPackCache(model.config, formats="INT4")  # for generate(…, past_key_values=cache)
    >>> cache
    KVPackCache(0 columns; no tokens yet)
    >>> ids = torch.arange(3, 20)[None]
    >>> lengths = {"max_new_tokens": 4, "min_new_tokens": 4}
    >>> model.generate(ids, cache_implementation="kvpack-int4", do_sample=False, **lengths).shape
    torch.Size([1, 21])
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        formats: OpenFormats | NamedFormats | None = None,
        budget: float | None = None,
        recent_tokens: int = 64,
        sinks: int = 4,
        max_tokens: int | None = None,
        max_sequences: int | None = None,
        dtype: torch.dtype | None = None,
        policy: Policy | None = None,
        max_bytes: int | None = None,
        key_order: Sequence[int] | None = None,
        pages: int | None = None,
        device_pages: int | None = None,
    ) -> None:
        text = _checked_config(config)
        if pages is not None and (isinstance(pages, bool) or not isinstance(pages, int) or pages < LEAST_PAGES):
            raise CacheInputError(f"pages is {pages!r}; it must be an integer of at least {LEAST_PAGES}, or None")
        if device_pages is not None and (pages is None or device_pages < pages):
            raise CacheInputError(f"device_pages is {device_pages} with pages={pages}: at least as many are needed")
        self.pages = pages
        if policy is not None and budget is None:
            raise CacheInputError(f"policy is {policy!r} without a budget, whose bytes it would divide: give a budget")
        self._config, self._dtype, self._max_sequences = text, dtype, max_sequences
        self._budget = budget
        self._options: dict[str, Any] = {
            "max_tokens": _MAX_TOKENS if max_tokens is None else max_tokens,
            "formats": _formats_of(formats),
            "budget": budget,
            "recent_tokens": recent_tokens,
            "sinks": sinks,
            "policy": "importance" if policy is None else policy,
            "max_bytes": max_bytes,
            "key_order": key_order,
            "device_pages": device_pages,
        }
        # What is wrong with the options shall be known before the first token; of key_order, all but its length.
        groups = min(len(key_order), MAX_GROUPS) if isinstance(key_order, Sequence) else 0
        head_dim, of_pages = GROUP_DIMS * groups or 64, _pages_dtype(dtype, torch.float16)
        rows = 1 if max_sequences is None else max_sequences
        KVCache(text.num_hidden_layers, 1, head_dim, max_sequences=rows, dtype=of_pages, device="cpu", **self._options)
        self._parts: list[_Part] = []
        self.rows, self.is_partial = 0, False
        self.sequences: list[int] | None = None
        # [rows, columns]: which columns are tokens; None: all.
        self._tokens: Mask | None = None
        # i32 [rows, columns]: ids of the first columns, as far as somebody has said them.
        self._ids: Ids | None = None
        self._steps = 0
        self._has_warned = False
        super().__init__(layers=[KVPackLayer(self, index) for index in range(text.num_hidden_layers)])

    def __repr__(self) -> str:
        held = "; ".join(map(str, self.kvs)) or "no tokens yet"
        return f"KVPackCache({self.get_seq_length()} columns; {held})"

    @property
    def kvs(self) -> list[KVCache]:
        """The caches of pages, in the order of their layers; none before the first tokens."""
        return [part.kv for part in self._parts]

    @property
    def kv(self) -> KVCache | None:
        """The :class:`~kvpack.KVCache` of all layers; None before the first tokens.

        Raises:
            CacheInputError: layers lie on several devices, and there are several.
        """
        if len(self._parts) > 1:
            raise CacheInputError(
                f"the model's layers lie on several devices ({', '.join(str(part.device) for part in self._parts)}), "
                "with a KVCache each, KVPackCache.kvs; DecodeGraph takes one alone"
            )
        return self._parts[0].kv if self._parts else None

    def is_read_elsewhere(self) -> bool:
        """Whether the model's attention function is another than "kvpack"."""
        return bool(self._config._attn_implementation != ATTENTION_NAME)

    def announce_mask(self) -> None:
        """To the mask function that is called next, in what a compiler traces."""
        global _announced
        _announced = not self.is_read_elsewhere()

    def prepare(self, layer: int, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[KVCache, int]:
        """The pages' cache for a layer's first keys and values, and which of its layers that is.

        Where the layers behind lie is not known before their keys come. So a new cache is for all of them, and gives
        up those that turn out to lie elsewhere.

        Raises:
            CacheInputError: pages cannot hold such keys and values.
        """
        device = _device_of(layer, key_states)
        last = self._parts[-1] if self._parts else None
        if last is not None:
            self._check_shapes(last.kv, key_states, value_states)
            if device == last.device:
                return last.kv, layer - last.first
        made = self._made(len(self.layers) - layer, key_states, value_states)
        if last is not None:
            last.kv.keep_layers(layer - last.first)
        else:
            self.rows = len(key_states)
        self._parts.append(_Part(layer, device, made))
        return made, 0

    def _made(self, num_layers: int, key_states: torch.Tensor, value_states: torch.Tensor) -> KVCache:
        """A cache for the last layers, as many as that.

        Raises:
            CacheInputError: pages cannot hold such keys and values.
            PageError: a key_order of another head_dim.
        """
        rows, heads, _, head_dim = key_states.shape
        if value_states.shape != key_states.shape:
            raise CacheInputError(
                f"keys have head_dim {head_dim} and values {value_states.shape[-1]}, as with multi-head latent "
                "attention; kvpack's pages need the same for both: use another cache"
            )
        named = _heads_of(self._config)
        if torch.distributed.is_available() and torch.distributed.is_initialized() and named is not None:
            named = heads, named[1]  # a model in tensor-parallel parts has a part of its heads
        if named is not None and named != (heads, head_dim):
            raise CacheInputError(
                f"keys have {heads} heads of {head_dim}, and the config that KVPackCache was made with has {named[0]} "
                f"of {named[1]}: make the cache with this model's own, KVPackCache(model.config, …)"
            )
        if head_dim % 16 != 0 or head_dim > 256:
            raise CacheInputError(
                f"head_dim is {head_dim}; kvpack's pages need a multiple of 16 up to 256: use another cache"
            )
        return self._new_kv(num_layers, heads, head_dim, rows, key_states.dtype, key_states.device)

    def empty_kv(self, dtype: torch.dtype, device: torch.device) -> KVCache:
        """A cache of pages for all layers of a model of that dtype on that device.

        Raises:
            CacheInputError: the configuration does not say how many KV heads there are, or of what head_dim.
            PageError: a head_dim that pages cannot have, or a key_order of another one.
        """
        named = _heads_of(self._config)
        if named is None:
            raise CacheInputError(
                f"the config of {self._config.model_type} does not name KV heads and head_dim as most do, so that they "
                "are not known before the first tokens"
            )
        return self._new_kv(len(self.layers), *named, 1, dtype, device)

    def _new_kv(
        self, num_layers: int, heads: int, head_dim: int, rows: int, of_model: torch.dtype, device: torch.device
    ) -> KVCache:
        dtype = _pages_dtype(self._dtype, of_model)
        if self._dtype is None and dtype != of_model:
            warnings.warn(
                f"KVPackCache: the model is in {of_model}, pages are in {dtype} (KVPackCache(dtype=…) chooses)",
                stacklevel=2,
            )
        formats, order = self._options["formats"], self._options["key_order"]
        options = self._options | {
            "formats": formats[-num_layers:] if isinstance(formats, Sequence) else formats,
            "key_order": rotary.key_order(self._config, head_dim) if order is None else order,
        }
        return KVCache(
            num_layers,
            heads,
            head_dim,
            max_sequences=max(rows, self._max_sequences or 1),
            dtype=dtype,
            device=device,
            **options,
        )

    def _check_shapes(self, kv: KVCache, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        for name, states in (("keys", key_states), ("values", value_states)):
            _, heads, _, head_dim = states.shape
            if (heads, head_dim) != (kv.num_kv_heads, kv.head_dim):
                raise CacheInputError(
                    f"{name} have {heads} heads of {head_dim} in one layer, {kv.num_kv_heads} of {kv.head_dim} in "
                    "another; kvpack's pages need the same in all layers: use another cache"
                )

    @property
    def batch_size(self) -> int:
        return self.rows or -1

    @property
    def room_for_rows(self) -> int:
        """The most rows that the batch can have, also by :meth:`select_rows`."""
        return self._parts[0].kv.max_sequences if self._parts else self._max_sequences or 1

    @property
    def observes(self) -> bool:
        """Whether attention is to be observed, for :meth:`kvpack.KVCache.reallocate`."""
        return self._budget is not None

    def memory_mb(self) -> float:
        """Memory in MB (10^6 bytes), of all devices."""
        return sum(kv.estimate_memory_mb() for kv in self.kvs)

    def average_bits(self) -> float:
        """Bits of pages for an element of K and V, all that pages need counted; 0.0 of an empty cache."""
        elements = sum(kv.elements for kv in self.kvs)
        return 8 * sum(kv.pools.bytes_in_use for kv in self.kvs) / elements if elements else 0.0

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()  # type: ignore[no-untyped-call]
        for kv in self.kvs:
            for row in range(kv.max_sequences):
                kv.free(row)
        self._tokens, self._ids, self._steps = None, None, 0

    # Contexts in files ------------------------------------------------------------------------------------------------

    @property
    def ids(self) -> torch.Tensor:
        """i64 [rows, columns]: the token ids of all columns, as far as :meth:`load`, :meth:`reuse` or :meth:`save` have
        been told them; −1 of those that are not known, and of pads."""
        return torch.from_numpy(self._known_ids().astype(np.int64))

    def _known_ids(self) -> Ids:
        columns = self.get_seq_length()
        found = np.full((self.rows, columns), UNKNOWN_TOKEN, np.int32)
        if self._ids is not None and len(self._ids) == self.rows:
            known = self._ids[:, :columns]
            found[:, : known.shape[1]] = known
        if self._tokens is not None:
            found[~self._tokens] = UNKNOWN_TOKEN
        return found

    def _take_ids(self, ids: TokenIds) -> None:
        """
        Raises:
            CacheInputError: other rows than the cache has.
        """
        given = token_rows(ids)
        if self.rows and len(given) != self.rows:
            raise CacheInputError(f"ids have {len(given)} rows, and the cache holds {self.rows}")
        self._ids = given

    def _check_ids(self, given: Ids) -> None:
        """
        Raises:
            CacheInputError: another token than one that the cache knows; ``given`` i32 [rows, columns held].
        """
        known = self._known_ids()
        if given.shape != known.shape:
            return
        others = np.argwhere((known != UNKNOWN_TOKEN) & (given != known))
        if len(others):
            row, column = others[0].tolist()
            raise CacheInputError(
                f"ids have token {given[row, column]} in row {row}, column {column}, where the cache holds "
                f"{known[row, column]} by what load, reuse or save were told: give the ids that the model was fed, or "
                "none"
            )

    def save(
        self,
        path: str | os.PathLike[str],
        model: Any,
        ids: TokenIds | None = None,
        *,
        row: int = 0,
        pages: tuple[int, int] | None = None,
        threads: int | None = None,
    ) -> int:
        """Write a row to a file: its pages as they are, its token ids, and what model they are of.

        What waits in 16 bits for more of its prompt (:meth:`partial_prompt`) is quantized before.

        Args:
            model: which has filled the cache.
            ids: [rows, columns], or [columns] of a single row: what the model was fed, pads included, as ``generate``
                takes it. More columns may be given than the cache holds: what ``generate`` returns ends with a token
                that was not fed. None: :attr:`ids`.
            row: which one. A file holds one row.
            pages: (first, end): of its pages of 64 tokens only these.
            threads: of the CPU; all cores by default.

        Returns:
            The bytes of the file, which is there whole, or not at all.

        Raises:
            CacheInputError: the cache is empty, or has no such row; fewer ids than it holds columns, or others
                than those of :attr:`ids` that are known.
            NotSupportedError: the model lies on several devices.
            InputError: there is a file that is no context, which is not replaced, or a directory.
            OSError: the file cannot be written.
        """
        kv, columns = self.kv, self.get_seq_length()
        if kv is None or not columns:
            raise CacheInputError("the cache is empty: there is nothing to save")
        if not 0 <= row < self.rows:
            raise CacheInputError(f"row {row} is to be saved; the cache holds {self.rows}")
        if ids is not None:
            given = token_rows(ids)
            if given.shape[1] < columns:
                raise CacheInputError(
                    f"ids have {given.shape[1]} columns, and the cache holds {columns}: some are missing"
                )
            given = given[:, :columns]  # behind them others may come than these
            self._check_ids(given)
            self._take_ids(given)
        sequence = row if self.sequences is None else self.sequences[row]
        kv.settle([sequence])
        of_row = self._known_ids()[row]
        if self._tokens is not None:
            of_row = of_row[self._tokens[row]]
        return save_row(kv, path, sequence, of_row, model, pages, threads)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        model: Any,
        *,
        tokens: int | None = None,
        on_corrupt: OnCorrupt = "raise",
        max_sequences: int | None = None,
        max_tokens: int | None = None,
        max_bytes: int | None = None,
        threads: int | None = None,
    ) -> Self:
        """A cache that holds what a file does, for the model that it is of.

        Formats of pages, and a budget, are those of the first file. With several files each is a row; shorter ones have
        pads in front of them, as with padding on the left. A file that is named several times is read once, and its
        rows share their pages.

        Args:
            tokens: of each file only so many first ones.
            on_corrupt: "raise", or "drop_from_here": load what comes before the first damaged pages, and warn.
            max_sequences, max_tokens, max_bytes: as of the class; ``max_sequences`` at least the number of files.
            threads: of the CPU; all cores by default.

        Raises:
            FingerprintMismatchError: another model; the message has both fingerprints, field by field.
            ModelMismatchError: the file does not say what model it is of.
            NotSupportedError: the model lies on several devices.
            DamagedRunError, SnapshotError, ContainerError, LimitError: no snapshot, or a damaged one.
            CacheInputError, CacheFullError: pages that cannot be together in a cache, or too many.
            OSError: a file cannot be read.
        """
        paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
        most = _MAX_TOKENS if max_tokens is None else max_tokens
        header, kv, found = load_rows(
            paths,
            model,
            tokens=tokens,
            on_corrupt=on_corrupt,
            threads=threads,
            max_sequences=max_sequences,
            max_tokens=most,
            max_bytes=max_bytes,
        )
        made = cls(
            model.config,
            formats=header.formats,
            budget=header.budget,
            recent_tokens=header.recent_tokens,
            sinks=header.sinks,
            max_tokens=most,
            max_sequences=kv.max_sequences,
            dtype=kv.dtype,
            policy=kv.policy if header.budget is not None else None,
            max_bytes=max_bytes,
            key_order=header.key_order or None,
        )
        made.hold(kv, found)
        return made

    def hold(self, kv: KVCache, ids: Sequence[Ids]) -> None:
        """An empty cache has pages that were filled elsewhere, of rows of these ids: those of :attr:`sequences`."""
        self._parts, self.rows = [_Part(0, kv.device, kv)], len(ids)
        columns = max(map(len, ids))
        self._ids = np.full((self.rows, columns), UNKNOWN_TOKEN, np.int32)
        is_token = np.zeros(self._ids.shape, np.bool_)
        for row, of_row in enumerate(ids):
            start = columns - len(of_row)
            self._ids[row, start:], is_token[row, start:] = of_row, True
        self._tokens = None if is_token.all() else is_token
        layers: Any = self.layers
        for layer in layers:
            layer.kv, layer.kv_layer, layer.columns, layer.is_initialized = kv, layer.index, columns, True

    def reuse(self, ids: TokenIds, held: TokenIds | None = None) -> int:
        """Before ``generate`` is called with these ids: keep what they begin with, and forget the rest.

        ``generate`` then feeds only the columns behind those that are kept; at least one is left for it. A row that is
        cut within a quantized page keeps its values (:meth:`kvpack.KVCache.truncate`), and goes on from these; where
        there is no memory for them, all is forgotten.

        Args:
            ids: [rows, columns], or [columns] of a single row: the whole prompt, as ``generate`` takes it.
            held: the same of what the cache holds: what ``generate`` has returned. None: what :meth:`load`, the last
                :meth:`reuse` and :meth:`save` were told, behind which tokens are not known, and not kept.

        Returns:
            How many columns are kept, and need no prefill.

        Raises:
            CacheInputError: other rows than the cache holds; layers hold different tokens, after a forward pass that
                has failed, and all is forgotten.

        >>> import torch, transformers
        >>> from kvpack import KVPackCache
        >>> from kvpack.integrations.transformers.cache import cache_keyword
        >>> config = transformers.LlamaConfig(vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        ...     num_attention_heads=4, num_key_value_heads=2)
        >>> model = transformers.LlamaForCausalLM(config).half().eval()
        >>> model.set_attn_implementation("kvpack")
        >>> cache, ids = KVPackCache(model.config), torch.arange(3, 40)[None]
        >>> for prompt in (ids[:, :30], ids):
        ...     print(cache.reuse(prompt))
        ...     _ = model.generate(prompt, **{cache_keyword(model): cache}, max_new_tokens=4, do_sample=False)
        0
        30
        """
        given = token_rows(ids)
        if held is not None:
            self._take_ids(held)
        columns = self.get_seq_length()
        if columns and len(given) != self.rows:
            raise CacheInputError(f"ids have {len(given)} rows, and the cache holds {self.rows}: reset() it")
        kept = min(common_columns(self._known_ids(), given, self._tokens), given.shape[1] - 1) if columns else 0
        if kept <= 0:
            self.reset()
            kept = 0
        elif kept < columns:
            layers: Any = self.layers
            for layer in layers:
                layer.columns = kept
            try:
                self.crop_columns(columns - kept)
            except CacheFullError:
                kept = 0
        self._ids = given
        return kept

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Raises:
            CacheInputError: the cache has fewer layers than the model, and what :meth:`KVPackLayer.update` raises.
        """
        if layer_idx >= len(self.layers):
            self._refuse_layers(f"at least {layer_idx + 1}")
        found: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return found

    def check_layers(self, config: Any) -> None:
        """Called by the attention function of the first layer with the model's configuration, if it has one.

        Raises:
            CacheInputError: the model has another number of layers than the cache.
        """
        layers = len(self.layers) if config is self._config else getattr(config, "num_hidden_layers", None)
        if isinstance(layers, int) and layers != len(self.layers):
            self._refuse_layers(str(layers))

    def _refuse_layers(self, of_model: str) -> NoReturn:
        raise CacheInputError(
            f"the config that KVPackCache was made with has {len(self.layers)} layers, and the model has {of_model}: "
            "make the cache with this model's own, KVPackCache(model.config, …)"
        )

    # Columns and rows -------------------------------------------------------------------------------------------------

    def begin_step(self, rows: int, before: int) -> None:
        """Called by the attention function of the first layer, when all layers have the same tokens.

        Raises:
            CacheInputError: other rows than the cache has; a forward pass has failed, and some layers have its tokens.
        """
        layers: Any = self.layers
        kvs = self.kvs
        lengths = np.concatenate([kv.table.lengths for kv in kvs])
        if any(layer.columns != before for layer in layers) or (lengths != lengths[0]).any():
            reached = sum(layer.is_initialized for layer in layers)
            never = ""
            if reached < len(layers):
                never = f"keys have come for {reached} layers, and the config that KVPackCache was made with has "
                never += f"{len(layers)}: it is another model's (KVPackCache(model.config, …) is wanted), or "
            raise CacheInputError(
                f"{never}a forward pass has failed half-way, and some layers of the cache hold its tokens: reset() the "
                "cache"
            )
        if rows != self.rows:
            if before or rows > self.room_for_rows:
                raise CacheInputError(
                    f"a batch of {rows} rows has come, and the cache holds {before} columns of {self.rows} rows, with "
                    f"room for {self.room_for_rows}: make another cache (KVPackCache(max_sequences=…)), or reset()"
                )
            self.rows = rows
        # Pieces of a prompt do not count, but the cells that begin with them.
        if self._budget is None or (self.is_partial and before % CELL_TOKENS):
            return
        self._steps += 1
        if self._steps % _STEPS_BETWEEN_REALLOCATIONS == 0:
            for kv in kvs:
                kv.reallocate()

    @contextmanager
    def partial_prompt(self) -> Iterator[None]:
        """Around forward passes that more of the same prompt follows: pages are quantized where cells of 2,048 tokens
        end, however the prompt is cut (:meth:`kvpack.KVCache.writing`). :func:`~.prefill.prefill` does so."""
        self.is_partial = True
        try:
            yield
        finally:
            self.is_partial = False

    def take_back(self, columns: int) -> None:
        """A forward pass of :meth:`partial_prompt` that has failed half-way is undone: all layers hold the first
        columns alone, which all of them had before it, as they were.

        Raises:
            CacheFullError: as of :meth:`kvpack.KVCache.truncate`.
        """
        layers: Any = self.layers
        held = np.full(self.rows, columns) if self._tokens is None else self._tokens[:, :columns].sum(axis=1)
        rows = range(self.rows) if self.sequences is None else self.sequences
        for kv, (row, tokens) in itertools.product(self.kvs, zip(rows, held.tolist(), strict=True)):
            kv.truncate(row, tokens, takes_back=True)
        if self._tokens is not None:
            self._tokens = self._tokens[:, :columns]
        for layer in layers:
            layer.columns, layer.pending = columns, None

    def add_columns(self, before: int, new: int, tokens: Mask | None) -> None:
        """Behind ``before`` columns ``new`` ones, of which those of ``tokens`` [rows, new] are stored; None: all."""
        if tokens is None and self._tokens is None:
            return
        old = np.ones((self.rows, before), np.bool_) if self._tokens is None else self._tokens[:, :before]
        added = np.ones((self.rows, new), np.bool_) if tokens is None else tokens
        self._tokens = np.concatenate([old, added], axis=1)

    def check_columns(self, mask: Mask, before: int) -> None:
        """Whether a mask [rows, columns] admits of the columns that came before those that are stored.

        Raises:
            CacheInputError
        """
        held = True if self._tokens is None else self._tokens[:, :before]
        if len(mask) == self.rows and (mask[:, :before] != held).any():
            row, column = np.argwhere(mask[:, :before] != held)[0].tolist()
            raise CacheInputError(
                f"row {row}, column {column} of attention_mask is {int(mask[row, column])}, and was another when its "
                "token came: what the cache holds cannot be masked afterwards"
            )

    @contextmanager
    def captured_step(self) -> Iterator[None]:
        """Around a step of one token a row that a CUDA graph captures: nothing runs, so that no columns come.

        Before each replay :meth:`plan_step` is to be called. :class:`~.decode_graph.DecodeGraph` does both.
        """
        layers: Any = self.layers
        columns, tokens, steps = [layer.columns for layer in layers], self._tokens, self._steps
        self._steps = 0  # no reallocation, which waits for the device
        try:
            yield
        finally:
            self._tokens, self._steps = tokens, steps
            for layer, count in zip(layers, columns, strict=True):
                layer.columns, layer.pending = count, None

    def plan_step(self) -> None:
        """What the host does in a step of one token a row, before a CUDA graph repeats what the device does.

        Does not wait for the device, but with a budget, every 32 steps.

        Raises:
            CacheFullError: no room for the tokens; nothing has changed then.
            CacheInputError: layers on several devices.
        """
        kv = self.kv
        assert kv is not None
        before = self.get_seq_length()
        self.begin_step(self.rows, before)
        kv.plan(1, range(self.rows) if self.sequences is None else self.sequences)
        self.add_columns(before, 1, None)
        layers: Any = self.layers
        for layer in layers:
            layer.columns = before + 1

    def append_and_read(
        self, layer: KVPackLayer, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """For any other attention function: everything dequantized, [rows, heads, columns, head_dim], pads included."""
        kv = layer.kv
        assert kv is not None
        if not self._has_warned:
            warnings.warn(
                f"KVPackCache: attn_implementation is {self._config._attn_implementation!r}, so all pages are "
                "dequantized at each step, which is slow; model.set_attn_implementation('kvpack') reads them in place",
                stacklevel=2,
            )
            self._has_warned = True
        if self._tokens is not None:
            raise CacheInputError(
                "the cache has been filled without pads by attn_implementation='kvpack'; another attention function "
                "cannot go on with it: reset() it"
            )
        before = layer.columns
        if layer.index == 0:
            self.begin_step(len(key_states), before)
        k, v = (in_pages_dtype(kv, states, is_prompt=before == 0) for states in (key_states, value_states))
        held = [kv.read(layer.kv_layer, row) for row in range(self.rows)]
        both = [torch.cat([torch.stack([x[side] for x in held]), new], dim=2) for side, new in enumerate((k, v))]
        kv.append(layer.kv_layer, k, v)
        layer.columns += k.shape[2]
        return both[0].to(key_states.dtype), both[1].to(value_states.dtype)

    def crop_columns(self, count: int) -> None:
        """Forget the last columns, in all layers, each of which knows how many are left.

        Raises:
            CacheFullError, CacheInputError: as of :meth:`kvpack.KVCache.truncate`. All tokens are forgotten then.
        """
        if not self._parts:
            return
        gone = np.full(self.rows, count) if self._tokens is None else self._tokens[:, -count:].sum(axis=1)
        try:
            for kv, (row, tokens) in itertools.product(self.kvs, enumerate(gone.tolist())):
                if tokens:
                    kv.truncate(row, max(kv.length(0, row) - tokens, 0))
        except BaseException:  # some rows are cut and others are not
            self.reset()
            raise
        if self._tokens is not None:
            self._tokens = self._tokens[:, :-count]
        if self._ids is not None:
            layers: Any = self.layers
            self._ids = self._ids[:, : layers[0].columns]  # others may come there

    def select_rows(self, rows: Sequence[int]) -> None:
        """Row i becomes what ``rows[i]`` was, in all layers.

        Raises:
            CacheInputError: more rows than there is room for.
        """
        kvs = self.kvs
        if not kvs or list(rows) == list(range(self.rows)):
            return
        if len(rows) > kvs[0].max_sequences:
            raise CacheInputError(
                f"{len(rows)} rows are wanted, and the cache has room for {kvs[0].max_sequences}: make it with "
                f"KVPackCache(max_sequences={len(rows)})"
            )
        for kv in kvs:
            kv.select_sequences(rows)
        if self._ids is not None:
            self._ids = self._ids[list(rows)] if len(self._ids) == self.rows else None
        self.rows = len(rows)
        if self._tokens is not None:
            self._tokens = self._tokens[list(rows)]


_announced = False


def take_announced_mask() -> bool:
    """Whether :meth:`KVPackCache.announce_mask` was called, once."""
    global _announced
    found, _announced = _announced, False
    return found


def _device_of(layer: int, states: torch.Tensor) -> torch.device:
    """Where a layer runs."""
    return states.device


def in_pages_dtype(kv: KVCache, states: torch.Tensor, *, is_prompt: bool) -> torch.Tensor:
    """Keys, values or queries, as pages have them.

    Raises:
        CacheInputError: fp16 is too narrow for them; on a GPU, which would be waited for, only those of a prompt are
            looked at.
    """
    if states.dtype == kv.dtype:
        return states
    cast = states.to(kv.dtype)
    is_looked_at = is_prompt or cast.device.type == "cpu"
    if kv.dtype == torch.float16 and is_looked_at and not torch.compiler.is_compiling():
        _require_finite(states, cast)
    return cast


def _require_finite(states: torch.Tensor, cast: torch.Tensor) -> None:
    if not cast.isfinite().all() and states[~cast.isfinite()].isfinite().any():
        raise CacheInputError(
            f"keys, values or queries reach {float(states.abs().nan_to_num(0, 0, 0).max()):.4g}, and fp16 pages end at "
            "65,504: KVPackCache(dtype=torch.bfloat16) holds them"
        )


def _checked_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the text model.

    Raises:
        CacheInputError: the cache cannot be one of this model.
    """
    if not isinstance(config, PreTrainedConfig):
        raise CacheInputError(f"config is a {type(config).__name__}; KVPackCache(model.config, …) is wanted")
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise CacheInputError(
            f"{name} is an encoder-decoder model, whose decoder also attends to the encoder; KVPackCache is for models "
            "that are decoders alone: use transformers' EncoderDecoderCache"
        )
    text = config.get_text_config(decoder=True)
    if not getattr(text, "num_hidden_layers", None) or not _has_heads(text):
        raise CacheInputError(
            f"{name} has no attention layers (num_hidden_layers, num_attention_heads); KVPackCache holds keys and "
            "values of attention: use the cache that transformers gives this model"
        )
    types = set(getattr(text, "layer_types", None) or ())
    if types <= _LAYER_TYPES:  # what it does not say, transformers knows
        types |= {type(layer).__name__ for layer in DynamicCache(config=text).layers}
    if getattr(text, "attention_chunk_size", None) is not None:
        types.add("chunked_attention")
    if others := sorted(map(str, types - _LAYER_TYPES - _LAYER_CLASSES)):
        raise CacheInputError(
            f"{name} has layers of type {', '.join(others)}; KVPackCache holds "
            f"{' and '.join(sorted(_LAYER_TYPES))}: use the cache that transformers gives this model"
        )
    if getattr(text, "cross_attention_layers", None):
        raise CacheInputError(
            f"{name} has layers that attend to an image (cross_attention_layers); those of KVPackCache attend to the "
            "text before: use the cache that transformers gives this model"
        )
    sharing = getattr(text, "kv_sharing_modes", None)
    if getattr(text, "num_kv_shared_layers", 0) or (sharing is not None and "reuse" in sharing):
        raise CacheInputError(
            f"layers of {name} share keys and values with others (num_kv_shared_layers), which KVPackCache does not "
            "know: use the cache that transformers gives this model"
        )
    if getattr(text, "kv_lora_rank", None):
        raise CacheInputError(
            f"{name} has multi-head latent attention (kv_lora_rank), of which not keys and values are cached; kvpack's "
            "pages hold those alone: use the cache that transformers gives this model"
        )
    return text


def _has_heads(config: PreTrainedConfig) -> bool:
    try:
        return bool(getattr(config, "num_attention_heads", None))
    except Exception:  # one number for each layer: there are some
        return True


def _heads_of(config: PreTrainedConfig) -> tuple[int, int] | None:
    """KV heads and head_dim, where a configuration names them as most do; of others they are known with the keys."""
    try:
        heads = getattr(config, "num_key_value_heads", None)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    except Exception:  # numbers for each layer, or none
        return None
    return (heads, head_dim) if isinstance(heads, int) and isinstance(head_dim, int) else None


def _formats_of(formats: OpenFormats | NamedFormats | None) -> OpenFormats | None:
    """With the formats that names are of; what is no such thing is left to :class:`~kvpack.KVCache` to refuse."""
    if isinstance(formats, str):
        return _format_of(formats)
    if isinstance(formats, PageFormat) or not isinstance(formats, Sequence):
        return formats
    pairs: Any = [
        tuple(_format_of(one) if isinstance(one, str) else one for one in pair)
        if isinstance(pair, Sequence) and not isinstance(pair, str)
        else pair
        for pair in formats
    ]
    return pairs  # type: ignore[no-any-return]


def _format_of(name: str) -> PageFormat:
    try:
        return PageFormat[name.upper()]
    except KeyError:
        known = ", ".join(page_format.name for page_format in PageFormat)
        raise CacheInputError(f"formats has {name!r}; there are {known}") from None


def _pages_dtype(wanted: torch.dtype | None, of_model: torch.dtype) -> torch.dtype:
    if wanted is not None:
        return wanted
    return of_model if of_model in (torch.float16, torch.bfloat16) else torch.float16
