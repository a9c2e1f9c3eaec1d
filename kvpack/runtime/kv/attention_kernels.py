"""Launches of the attention kernels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from kvpack.errors import PageError
from kvpack.format.layout import align, ceil_div
from kvpack.format.pages import GROUP_DIMS, WARP_LANES, PageFormat, PageLayout, Side, payload_bytes
from kvpack.runtime.device import kernels, semaphores
from kvpack.runtime.device.devices import ACTIVATIONS
from kvpack.runtime.device.kernels import Kernel
from kvpack.runtime.kv.page_kernels import PAGE_FORMATS, page_defines

COLUMNS = 8
DECODE_WARPS = 4
_MAX_BLOCKS = (1 << 16) - 1  # the kernel multiplies two numbers of blocks in 32 bits
# Of the units that masses are counted in.
MASS_FRACTION_BITS = 32
# What a block has without asking; consumer GPUs share 100 KiB among the blocks of a multiprocessor.
_SHARED_BYTES = 48 << 10
PREFILL_WARPS = 4
_PREFILL_SLOTS, _PREFILL_LIST_BYTES = 3, 512
_LOG2_E = math.log2(math.e)
_PLACES = 1 << 31  # of tokens: kernels add a window to one in 32 bits
# A warp's time for a page, over the warps of a block and over the time to add up what one block left of a segment (a
# part); and how many parts a segment may have before fewer blocks are better. `kvpack bench attention` tries others.
_PAGE_OVER_PART = 4
_FEW_PARTS = 32


def _defines(
    head_dim: int,
    dtype: torch.dtype,
    k_formats: frozenset[PageFormat],
    v_formats: frozenset[PageFormat],
    causal: bool,
    softcap: bool,
    sink_logits: bool,
    key_order: tuple[int, ...],
) -> dict[str, int]:
    """What both kernels are told of queries and pages."""
    if dtype not in PAGE_FORMATS:
        raise PageError(f"queries are {dtype}; float16 and bfloat16 are possible")
    return page_defines(head_dim, key_order) | {
        "KVPACK_ACTIVATION": ACTIVATIONS[dtype],
        "KVPACK_K_FORMATS": sum(1 << page_format for page_format in k_formats),
        "KVPACK_V_FORMATS": sum(1 << page_format for page_format in v_formats),
        "KVPACK_CAUSAL": int(causal),
        "KVPACK_SOFTCAP": int(softcap),
        "KVPACK_SINK_LOGITS": int(sink_logits),
    }


def _arguments(
    q: torch.Tensor,
    out: torch.Tensor,
    pages: torch.Tensor | None,
    table: torch.Tensor,
    lengths: torch.Tensor,
    num_kv_heads: int,
    scale: float,
    window: int,
    sinks: int,
    causal: bool,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
) -> tuple[torch.Tensor | np.generic | None, ...]:
    """What both kernels begin with."""
    if not (0 <= window < _PLACES and 0 <= sinks < _PLACES):
        raise PageError(f"window is {window} and sinks {sinks}; at most {_PLACES - 1} are possible")
    if window and not causal:
        raise PageError(f"a window of {window} tokens ends at the query's own; with causal=False there is no such end")
    sequences, num_heads, tokens, _ = q.shape
    # Of the kernels that have them alone. Scores are in base 2.
    cap = () if softcap is None else (np.float32(softcap * _LOG2_E), np.float32(2 / softcap))
    sink = () if sink_logits is None else (sink_logits, np.float32(_LOG2_E))
    return (
        q,
        *map(np.uint64, q.stride()[:3]),
        out,
        pages,
        table,
        lengths,
        np.uint32(sequences),
        np.uint32(table.shape[-1]),
        np.uint32(num_kv_heads),
        np.uint32(num_heads // num_kv_heads),
        np.uint32(tokens),
        np.uint32(window),
        np.uint32(sinks),
        np.float32(scale * _LOG2_E),
        *cap,
        *sink,
    )


@dataclass(frozen=True)
class DecodeShape:
    """Shared memory of ``cuda/kv/attention_decode.cu``: slots of a warp's ring, of so many bytes; bytes of a block."""

    slots: int
    slot_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Observed:
    """Where :func:`decode` adds up how much of the attention each page had.

    A page's share is the mean over query tokens of Σ over heads of weight · softmax probability of the page's tokens:
    those of all pages of a sequence sum to Σ weights in each step. Integers, since sums of floats would depend on the
    order in which blocks end.

    Attributes:
        mass: i64 [sequences, pages], at least as many pages as the table; rows may lie apart, elements of a row not.
            Shares are added, in units of 2^-:data:`MASS_FRACTION_BITS`.
        steps: i32 [sequences]. 1 is added for each sequence that is attended to.
        weights: fp32 [query heads], none negative; ``None``: 1 / number of heads each.
        visited_pages: at least as many as any sequence attends to; ``None``: as the table has room for.
    """

    mass: torch.Tensor
    steps: torch.Tensor
    weights: torch.Tensor | None = None
    visited_pages: int | None = None


def decode_blocks_per_sm(head_dim: int) -> int:
    """How many blocks of :func:`decode` fit on a multiprocessor."""
    return (16 if head_dim <= 128 else 12) // DECODE_WARPS


@cache
def decode_shape(
    head_dim: int, dtype: torch.dtype, k_formats: frozenset[PageFormat], v_formats: frozenset[PageFormat]
) -> DecodeShape:
    groups = head_dim // GROUP_DIMS
    together = 2 if groups % 2 == 0 else 1  # groups of a piece; one of 16 bits
    pieces = groups // together
    slot_bytes = payload_bytes(16)
    for side, page_formats in zip(Side, (k_formats, v_formats), strict=True):
        for page_format in page_formats:
            if page_format.is_quantized:
                slot_bytes = max(slot_bytes, PageLayout(side, page_format, head_dim).places_bytes(0, together))
    queries = groups * WARP_LANES * 8 * (2 if dtype == torch.bfloat16 else 1)
    fixed = max(queries, 4 * COLUMNS * head_dim) + 4 * 2 * COLUMNS * DECODE_WARPS + 4 * COLUMNS
    slots = min((_SHARED_BYTES - fixed) // (DECODE_WARPS * (slot_bytes + 8)), pieces + 1)
    shared_bytes = fixed + DECODE_WARPS * slots * slot_bytes + align(8 * DECODE_WARPS * slots, 16)
    return DecodeShape(slots, slot_bytes, shared_bytes)


@cache
def decode_kernel(
    head_dim: int,
    dtype: torch.dtype,
    k_formats: frozenset[PageFormat],
    v_formats: frozenset[PageFormat],
    *,
    causal: bool = True,
    softcap: bool = False,
    sink_logits: bool = False,
    observe: bool = False,
    key_order: tuple[int, ...] = (),
) -> Kernel:
    shape = decode_shape(head_dim, dtype, k_formats, v_formats)
    defines = _defines(head_dim, dtype, k_formats, v_formats, causal, softcap, sink_logits, key_order) | {
        "KVPACK_OBSERVE": int(observe),
        "KVPACK_MASS_FRACTION_BITS": MASS_FRACTION_BITS,
        "KVPACK_WARPS": DECODE_WARPS,
        "KVPACK_SLOTS": shape.slots,
        "KVPACK_SLOT_BYTES": shape.slot_bytes,
        "KVPACK_BLOCKS_PER_SM": decode_blocks_per_sm(head_dim),
    }
    return Kernel.of("kv/attention_decode.cu", "attention_decode", defines=defines)


def decode_blocks(
    sequences: int,
    num_kv_heads: int,
    tiles: int,
    max_pages: int,
    multiprocessors: int,
    *,
    blocks_per_sm: int = 16 // DECODE_WARPS,
) -> int:
    """How many blocks a launch of :func:`decode` shall have: all of them are resident at once.

    Args:
        tiles: of eight columns, for a KV head.
        max_pages: that a sequence attends to.
        blocks_per_sm: that fit on a multiprocessor (:func:`decode_blocks_per_sm`).

    >>> decode_blocks(16, 8, 1, 256, 132)
    512
    """
    segments = sequences * num_kv_heads * tiles
    resident = multiprocessors * blocks_per_sm
    # More blocks have fewer pages each, at least one for every warp, but leave more parts of a segment, which one of
    # them adds up: the sum of both times is least at the root. Beyond few parts, the third and fourth block of a
    # multiprocessor cost more than they bring.
    parts = min(ceil_div(max_pages, DECODE_WARPS), math.isqrt(_PAGE_OVER_PART * max_pages))
    if max_pages <= 2 * DECODE_WARPS:  # telling the others takes longer than a second page
        parts = 1
    most = max(2 * multiprocessors, _FEW_PARTS * segments)
    blocks = max(1, min(resident, most, segments * max(1, parts)))
    # Even parts that end where segments do leave less to add up.
    even = blocks // segments * segments if segments else 0
    return even if even >= 0.9 * blocks else blocks


def decode(
    q: torch.Tensor,
    pages: torch.Tensor | None,
    table: torch.Tensor,
    lengths: torch.Tensor,
    num_kv_heads: int,
    k_formats: Iterable[PageFormat],
    v_formats: Iterable[PageFormat],
    *,
    scale: float,
    blocks: int,
    window: int = 0,
    sinks: int = 0,
    causal: bool = True,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    observed: Observed | None = None,
    key_order: tuple[int, ...] = (),
) -> torch.Tensor:
    """softmax(q · Kᵀ · scale) · V over the pages of each sequence, [sequences, query heads, tokens, head_dim].

    Args:
        q: fp16 or bf16 [sequences, query heads, tokens, head_dim]; the last dimension is contiguous.
        pages: u8, what entries are offsets into; ``None`` on a GPU, where they are addresses.
        table: i64 [2, sequences, max_pages].
        lengths: i32 [sequences], in tokens, those of the queries included.
        blocks: of the launch (:func:`decode_blocks`).
        window: tokens that a query sees, up to its own; 0: all of them.
        sinks: first tokens that are seen beside the window.
        causal: queries are the last tokens of a sequence, and see none behind their own; a sequence shorter than them
            gives zeros. Otherwise each query token sees all tokens, and only an empty sequence gives zeros.
        softcap: scores, times ``scale``, become softcap · tanh(score / softcap), to within 2^-21 of it: at most 1000,
            so that probabilities are off by less than 10^-3.
        sink_logits: fp32 [query heads], contiguous: one more score in each head's softmax, whose value is zero.
        observed: where to add the pages' shares of the attention.
        key_order: of the pages (:class:`~kvpack.format.pages.PageLayout`).

    Raises:
        PageError: ``q`` has another dtype, there is a window without ``causal``, or too many blocks are asked for.
    """
    if not 1 <= blocks <= _MAX_BLOCKS:
        raise PageError(f"blocks is {blocks}; a launch has at least 1 and at most {_MAX_BLOCKS}")
    sequences, num_heads, tokens, head_dim = q.shape
    out = torch.empty((sequences, num_heads, tokens, head_dim), dtype=q.dtype, device=q.device)
    columns = num_heads // num_kv_heads * tokens
    segments = sequences * num_kv_heads * ceil_div(columns, COLUMNS)
    partials = torch.empty((blocks + segments) * COLUMNS * (head_dim + 2), dtype=torch.float32, device=q.device)
    observation: tuple[torch.Tensor | np.generic | None, ...] = (None, None, np.uint64(0), None, None)
    if observed is not None:
        visited = table.shape[-1] if observed.visited_pages is None else observed.visited_pages
        page_logs = torch.empty(segments * visited * COLUMNS, dtype=torch.float32, device=q.device)
        mass = observed.mass
        observation = (page_logs, mass, np.uint64(mass.stride(0)), observed.steps, observed.weights)
    of_k, of_v = frozenset(k_formats), frozenset(v_formats)
    kernels.launch(
        # One query token is the last one, which sees all: one kernel less to compile.
        decode_kernel(
            head_dim,
            q.dtype,
            of_k,
            of_v,
            causal=causal or tokens == 1,
            softcap=softcap is not None,
            sink_logits=sink_logits is not None,
            observe=observed is not None,
            key_order=key_order,
        ),
        blocks,
        DECODE_WARPS * WARP_LANES,
        (
            *_arguments(
                q, out, pages, table, lengths, num_kv_heads, scale, window, sinks, causal, softcap, sink_logits
            ),
            partials,
            semaphores.take(segments, q.device),
            *observation,
        ),
        device=q.device,
        shared_bytes=decode_shape(head_dim, q.dtype, of_k, of_v).shared_bytes,
    )
    return out


@dataclass(frozen=True)
class PrefillShape:
    """What a block of ``attention_prefill.cu`` takes: ``column_tiles`` times eight columns for each of its warps,
    bytes of a slot for pieces of pages, shared memory."""

    column_tiles: int
    slot_bytes: int
    shared_bytes: int
    blocks_per_sm: int

    @property
    def columns(self) -> int:
        return COLUMNS * self.column_tiles * PREFILL_WARPS


def _groups_of_piece(layout: PageLayout) -> int:
    """As ``attention_prefill.cu`` has it. A block's first piece is the largest."""
    bits = layout.format.element_bits
    if bits <= 4 and not (layout.side == Side.K and bits == 4 and layout.groups > 8):
        return 8
    return 4 if bits <= 8 else 2


@cache
def prefill_shape(head_dim: int) -> PrefillShape:
    # As many as registers allow, with the scores of a page and the values of all dimensions in them.
    column_tiles = 3 if head_dim <= 128 else 2
    slot_bytes = max(
        layout.places_bytes(0, _groups_of_piece(layout))
        for side in Side
        for layout in (PageLayout(side, page_format, head_dim) for page_format in PageFormat)
    )
    columns = COLUMNS * column_tiles * PREFILL_WARPS
    barriers = align(8 * _PREFILL_SLOTS, 16)
    shared_bytes = _PREFILL_SLOTS * slot_bytes + _PREFILL_LIST_BYTES + barriers + columns * (8 + 2 * head_dim)
    return PrefillShape(column_tiles, slot_bytes, shared_bytes, 2)


@cache
def prefill_kernel(
    head_dim: int,
    dtype: torch.dtype,
    k_formats: frozenset[PageFormat],
    v_formats: frozenset[PageFormat],
    *,
    causal: bool = True,
    softcap: bool = False,
    sink_logits: bool = False,
    key_order: tuple[int, ...] = (),
) -> Kernel:
    shape = prefill_shape(head_dim)
    defines = _defines(head_dim, dtype, k_formats, v_formats, causal, softcap, sink_logits, key_order) | {
        "KVPACK_WARPS": PREFILL_WARPS,
        "KVPACK_COLUMN_TILES": shape.column_tiles,
        "KVPACK_SLOT_BYTES": shape.slot_bytes,
        "KVPACK_BLOCKS_PER_SM": shape.blocks_per_sm,
    }
    return Kernel.of("kv/attention_prefill.cu", "attention_prefill", defines=defines)


def prefill(
    q: torch.Tensor,
    pages: torch.Tensor | None,
    table: torch.Tensor,
    lengths: torch.Tensor,
    num_kv_heads: int,
    k_formats: Iterable[PageFormat],
    v_formats: Iterable[PageFormat],
    *,
    scale: float,
    window: int = 0,
    sinks: int = 0,
    causal: bool = True,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    key_order: tuple[int, ...] = (),
) -> torch.Tensor:
    """What :func:`decode` computes, for many query tokens: each tile of them is one block's."""
    sequences, num_heads, tokens, head_dim = q.shape
    if q.data_ptr() % 4 or any(stride % 2 for stride in q.stride()[:3]):  # pairs are loaded
        q = q.clone(memory_format=torch.contiguous_format)
    out = torch.empty((sequences, num_heads, tokens, head_dim), dtype=q.dtype, device=q.device)
    shape = prefill_shape(head_dim)
    kernels.launch(
        prefill_kernel(
            head_dim,
            q.dtype,
            frozenset(k_formats),
            frozenset(v_formats),
            causal=causal,
            softcap=softcap is not None,
            sink_logits=sink_logits is not None,
            key_order=key_order,
        ),
        ceil_div(num_heads // num_kv_heads * tokens, shape.columns) * num_kv_heads * sequences,
        PREFILL_WARPS * WARP_LANES,
        _arguments(q, out, pages, table, lengths, num_kv_heads, scale, window, sinks, causal, softcap, sink_logits),
        device=q.device,
        shared_bytes=shape.shared_bytes,
    )
    return out
