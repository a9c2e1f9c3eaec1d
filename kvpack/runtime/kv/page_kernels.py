"""Filling and reading pages of a KV cache: the same bytes from CUDA kernels and, on the CPU, from the page coder.

A *page table* is i64 and holds *entries*: where a page begins, a multiple of 16, with its
:class:`~kvpack.format.pages.PageFormat` in the low 4 bits. Pages begin at ``entry & ~15`` bytes from the first byte of
``pages_base``; on a GPU that may be None, and then entries are addresses. The layout of a page is said in
:mod:`kvpack.format.pages`. An entry of another format, -1 for one, stands for no page; so does the address 0.

Tokens may lie in blocks that a table names (:mod:`~kvpack.runtime.kv.block_table`), as vLLM's do.

What cannot be done because of a table's contents is left out and counted in ``status``, i32 [2], zeros at first: the
count, and the bitwise complement of the least index concerned, which :func:`left_out` reads. Nothing here waits for the
device, so all functions can be captured in CUDA graphs. What Python sees at once (types, shapes, devices) is an error.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from kvpack.encode.page_coder import FLOAT_TYPES, FP8_MAX, MARGIN_EIGHTHS, REFITTED, dequantize_blocks, quantize_blocks
from kvpack.errors import PageError
from kvpack.format.layout import ceil_div
from kvpack.format.pages import (
    ENTRY_FORMAT_MASK,
    GROUP_DIMS,
    PAGE_TOKENS,
    WARP_LANES,
    PageFormat,
    PageLayout,
    Side,
    split_block,
)
from kvpack.runtime.device import kernels
from kvpack.runtime.device.devices import ACTIVATIONS
from kvpack.runtime.device.kernels import Kernel
from kvpack.runtime.kv.block_table import BlockRows

PAGE_FORMATS = {torch.float16: PageFormat.FP16, torch.bfloat16: PageFormat.BF16}

_SLICES = PAGE_TOKENS // 16
_MAX_SEQUENCES = 65535  # of a grid
# Warps of a block that writes or reads a page's head, and how many of these blocks shall share a multiprocessor.
_WRITE_WARPS, _WRITE_BLOCKS = 4, 8
_READ_BLOCKS = 8
# How many threads that quantize shall at least share a multiprocessor, so that none spills: of K, of K as fp8, where
# sums are taken, and of V, where a thread holds a slice's share of all dimensions; where it is fitted, with sums, too.
_K_THREADS, _K_SUM_THREADS, _V_THREADS, _V_SUM_THREADS, _WIDE_V_THREADS = 1024, 768, 512, 384, 256
_WIDE_HEAD_DIM = 128


def page_defines(head_dim: int, key_order: tuple[int, ...] = ()) -> dict[str, int]:
    """What cuda/kv/page.cuh needs to know of the pages: a nibble for each group of K, in their order."""
    order = PageLayout(Side.K, PageFormat.FP16, head_dim, key_order).group_order
    nibbles = sum(group << 4 * place for place, group in enumerate(order))
    return {
        "KVPACK_HEAD_DIM": head_dim,
        "KVPACK_KEY_ORDER_LOW": nibbles & 0xFFFFFFFF,
        "KVPACK_KEY_ORDER_HIGH": nibbles >> 32,
    }


def write_kernel(head_dim: int, key_order: tuple[int, ...] = (), block_tokens: int = 0) -> Kernel:
    """New tokens into pages of 16 bits; those in blocks of ``block_tokens``, or in one tensor (0)."""
    defines = page_defines(head_dim, key_order) | {
        "KVPACK_BLOCK_TOKENS": block_tokens,
        "KVPACK_MAX_WARPS": _WRITE_WARPS,
        "KVPACK_BLOCKS_PER_SM": _WRITE_BLOCKS,
    }
    return Kernel.of("kv/page_write.cu", "page_write", defines=defines)


def quantize_kernel(side: Side, source: PageFormat, target: PageFormat, head_dim: int) -> Kernel:
    """Pages of one format into a quantized one, whatever the order of K's groups is."""
    if side == Side.K:
        warps = head_dim // GROUP_DIMS
        threads = _K_THREADS if target.is_integer else _K_SUM_THREADS
    else:
        warps = _SLICES
        threads = _V_SUM_THREADS if target in REFITTED else _V_THREADS
        threads = _WIDE_V_THREADS if head_dim > _WIDE_HEAD_DIM else threads
    defines = page_defines(head_dim) | {
        "KVPACK_SIDE": int(side),
        "KVPACK_SOURCE_FORMAT": int(source),
        "KVPACK_TARGET_FORMAT": int(target),
        # Bits 4·b … are of codes of b bits; those of 8 bits have no margin.
        "KVPACK_MARGIN_EIGHTHS": sum(eighths << 4 * bits for bits, eighths in MARGIN_EIGHTHS[side].items()),
        "KVPACK_REFITTED": sum(1 << page_format for page_format in REFITTED),
        "KVPACK_FP8_MAX": FP8_MAX,
        "KVPACK_MAX_WARPS": warps,
        "KVPACK_BLOCKS_PER_SM": max(1, threads // (warps * WARP_LANES)),
    }
    return Kernel.of("kv/page_quantize.cu", "page_quantize", defines=defines)


def read_kernel(
    side: Side, head_dim: int, dtype: torch.dtype, key_order: tuple[int, ...] = (), block_tokens: int = 0
) -> Kernel:
    """Pages of any format into numbers, in blocks of ``block_tokens`` or in one tensor (0)."""
    defines = page_defines(head_dim, key_order) | {
        "KVPACK_BLOCK_TOKENS": block_tokens,
        "KVPACK_SIDE": int(side),
        "KVPACK_ACTIVATION": ACTIVATIONS[dtype],
        "KVPACK_MAX_WARPS": _SLICES,
        "KVPACK_BLOCKS_PER_SM": _READ_BLOCKS,
    }
    return Kernel.of("kv/page_read.cu", "page_read", defines=defines)


def new_status(device: torch.device | str) -> torch.Tensor:
    """A status of nothing left out."""
    return torch.zeros(2, dtype=torch.int32, device=device)


def left_out(status: torch.Tensor) -> tuple[int, int] | None:
    """(how much was left out, the least index concerned), or None if nothing was; waits for the device."""
    count, complement = status.tolist()
    return (count & 0xFFFFFFFF, ~complement & 0xFFFFFFFF) if count else None


def write_tokens(
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    status: torch.Tensor,
    pages_base: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    key_order: tuple[int, ...] = (),
) -> None:
    """Append tokens to sequences, in pages of 16 bits.

    Of sequence b the last ``counts[b]`` of k and v are tokens, of which the first goes to place ``positions[b]``. Where
    one is a page's first, the rest of the page becomes zero. Tokens without a page are not written but counted: those
    whose place is negative or beyond ``max_pages`` pages, or whose page is not of k's and v's type. The count is of a
    side's tokens; the index is the sequence.

    Args:
        k, v: [batch, num_kv_heads, tokens, head_dim], fp16 or bf16, of any strides; rows that do not lie each
            in one piece and at a multiple of 16 bytes are copied first.
        table: i64 [2, batch, max_pages], contiguous: entries for K and for V. Sequences share no page written to.
        positions: i32 [batch]: how many tokens each sequence has; it is not advanced here.
        status: i32 [2].
        pages_base: u8, on k's device; see the module. On the CPU it must be given.
        counts: i32 [batch], how many tokens each sequence gets, at most those of k; None: all.
        key_order: of the pages (:class:`~kvpack.format.pages.PageLayout`).

    Raises:
        PageError: a tensor of another shape, type or device.
    """
    _check_tokens(k, v)
    batch = k.shape[0]
    if table.dim() != 3 or table.shape[:2] != (2, batch):
        raise PageError(f"table has shape {tuple(table.shape)}; [2, {batch}, pages] is wanted for a batch of {batch}")
    _check("table", table, torch.int64, k.device)
    _check("positions", positions, torch.int32, k.device, (batch,))
    _check("status", status, torch.int32, k.device, (2,))
    if counts is not None:
        _check("counts", counts, torch.int32, k.device, (batch,))
    _check_base(pages_base, k.device)
    if k.numel() == 0:
        return
    if _runs_kernels(k.device):
        tokens = k.shape[2]
        _launch_write(_aligned(k), _aligned(v), tokens, table, positions, status, pages_base, counts, key_order)
    else:
        _write_on_cpu(k, v, table, positions, status, pages_base, counts, key_order)


def write_from_blocks(
    rows: BlockRows,
    table: torch.Tensor,
    status: torch.Tensor,
    pages_base: torch.Tensor | None = None,
    key_order: tuple[int, ...] = (),
) -> None:
    """As :func:`write_tokens`, of tokens that lie in blocks: a sequence is a layer, and its pages begin with them.

    On a GPU nothing is gathered: the kernel finds each row by the block table.

    Args:
        table: i64 [2, layers, pages], contiguous: as many pages as the tokens fill.
        status: i32 [2]; the index is the layer.

    Raises:
        PageError: a tensor of another shape, type or device, a head_dim that pages cannot have.
    """
    cache = rows.cache
    layers = len(cache.keys)
    PageLayout(Side.K, PAGE_FORMATS[cache.dtype], cache.head_dim, key_order)
    pages = ceil_div(rows.tokens, PAGE_TOKENS)
    _check("table", table, torch.int64, cache.device, (len(Side), layers, pages))
    _check("status", status, torch.int32, cache.device, (2,))
    _check_base(pages_base, cache.device)
    if not rows.tokens:
        return
    positions = torch.zeros(layers, dtype=torch.int32, device=cache.device)
    if _runs_kernels(cache.device):
        k, v = cache.keys[0], cache.values[0]
        _launch_write(k, v, rows.tokens, table, positions, status, pages_base, None, key_order, rows)
    else:
        k, v = map(rows.gathered, Side)
        _write_on_cpu(k, v, table, positions, status, pages_base, None, key_order)


def quantize_pages(
    jobs: torch.Tensor,
    side: Side,
    source_format: PageFormat,
    target_format: PageFormat,
    head_dim: int,
    num_kv_heads: int,
    status: torch.Tensor,
    pages_base: torch.Tensor | None = None,
) -> None:
    """Quantize pages, into others.

    A page that is quantized already is dequantized first. Jobs whose entries have other formats are left out and
    counted; the index is the job.

    Args:
        jobs: i64 [n, 2], contiguous: entries of a source and of a target each. No target overlaps a source or another
            target.
        side: of all these pages.
        source_format: of all sources.
        target_format: of all targets, a quantized one.
        status: i32 [2].
        pages_base: u8, on the jobs' device; see the module. On the CPU it must be given.

    Raises:
        PageError: a tensor of another shape, type or device, a target of 16 bits, a head_dim that pages cannot have.
    """
    source, target = (PageLayout(side, page_format, head_dim) for page_format in (source_format, target_format))
    if not target_format.is_quantized:
        raise PageError(f"pages are quantized to 8 bits or fewer, not to {target_format.name}")
    if num_kv_heads < 1:
        raise PageError(f"num_kv_heads is {num_kv_heads}; at least 1 is wanted")
    if jobs.dim() != 2 or jobs.shape[1] != 2:
        raise PageError(f"jobs have shape {tuple(jobs.shape)}; [jobs, 2] is wanted")
    _check("jobs", jobs, torch.int64, jobs.device)
    _check("status", status, torch.int32, jobs.device, (2,))
    _check_base(pages_base, jobs.device)
    if not len(jobs):
        return
    if not _runs_kernels(jobs.device):
        _quantize_on_cpu(jobs, source, target, num_kv_heads, status, pages_base)
        return
    kernel = quantize_kernel(side, source_format, target_format, head_dim)
    # Of V, codes in shared memory: each lane's ``Slice`` (cuda/kv/page_codes.cuh) of each group and slice.
    shared = 0
    if side == Side.V:
        shared = target.groups * _SLICES * WARP_LANES * (8 if target_format.element_bits == 8 else 4)
    kernels.launch(
        kernel,
        len(jobs) * num_kv_heads,
        dict(kernel.defines)["KVPACK_MAX_WARPS"] * WARP_LANES,
        (pages_base, jobs, np.uint32(num_kv_heads), status),
        device=jobs.device,
        shared_bytes=shared,
    )


def read_tokens(
    table: torch.Tensor,
    side: Side,
    starts: torch.Tensor,
    ends: torch.Tensor,
    num_tokens: int,
    head_dim: int,
    num_kv_heads: int,
    dtype: torch.dtype,
    status: torch.Tensor,
    pages_base: torch.Tensor | None = None,
    key_order: tuple[int, ...] = (),
) -> torch.Tensor:
    """Some tokens of each sequence, dequantized and rounded once to ``dtype``.

    Args:
        table: i64 [batch, max_pages], contiguous: one side's half of what :func:`write_tokens` takes.
        starts: i32 [batch], not negative: each sequence's first token.
        ends: i32 [batch]: behind its last one.
        num_tokens: rows of the result; row i is token ``starts + i``, or zeros from ``ends`` on.
        dtype: fp16, bf16 or fp32.
        status: i32 [2]. Tokens without a page are zeros and are counted; the index is the sequence.
        pages_base: u8, on the table's device; see the module. On the CPU it must be given.
        key_order: of the pages (:class:`~kvpack.format.pages.PageLayout`).

    Returns:
        [batch, num_kv_heads, num_tokens, head_dim].

    Raises:
        PageError: a tensor of another shape, type or device, a head_dim that pages cannot have.
    """
    PageLayout(side, PageFormat.FP16, head_dim, key_order)
    if dtype not in ACTIVATIONS:
        raise PageError(f"tokens cannot be read as {dtype}; fp16, bf16 and fp32 are possible")
    if num_kv_heads < 1 or num_tokens < 0:
        raise PageError(f"num_kv_heads is {num_kv_heads}, num_tokens is {num_tokens}")
    if table.dim() != 2 or len(table) > _MAX_SEQUENCES:
        raise PageError(f"table has shape {tuple(table.shape)}; [batch, pages] is wanted, a batch of at most 65535")
    batch = len(table)
    _check("table", table, torch.int64, table.device)
    _check("starts", starts, torch.int32, table.device, (batch,))
    _check("ends", ends, torch.int32, table.device, (batch,))
    _check("status", status, torch.int32, table.device, (2,))
    _check_base(pages_base, table.device)
    if not _runs_kernels(table.device):
        layouts = [PageLayout(side, page_format, head_dim, key_order) for page_format in PageFormat]
        return _read_on_cpu(table, layouts, starts, ends, num_tokens, num_kv_heads, dtype, status, pages_base)
    out = torch.empty((batch, num_kv_heads, num_tokens, head_dim), dtype=dtype, device=table.device)
    if out.numel():
        _launch_read(table, side, starts, ends, out, num_tokens, status, pages_base, key_order)
    return out


def read_to_blocks(
    rows: BlockRows,
    table: torch.Tensor,
    side: Side,
    first: int,
    status: torch.Tensor,
    pages_base: torch.Tensor | None = None,
    key_order: tuple[int, ...] = (),
) -> None:
    """As :func:`read_tokens`, to rows in blocks: a sequence is a layer. Nothing else of the blocks is touched.

    Args:
        table: i64 [layers, max_pages], contiguous: of one side.
        first: which token of the pages the first row is.
        status: i32 [2]; the index is the layer.

    Raises:
        PageError: a tensor of another shape, type or device, too few pages, a head_dim that pages cannot have.
    """
    cache = rows.cache
    layers = len(cache.keys)
    PageLayout(side, PageFormat.FP16, cache.head_dim, key_order)
    if table.dim() != 2 or len(table) != layers or not 0 <= first <= PAGE_TOKENS * table.shape[1] - rows.tokens:
        raise PageError(
            f"table has shape {tuple(table.shape)}; [{layers}, pages] is wanted, pages of tokens {first} … "
            f"{first + rows.tokens - 1}"
        )
    _check("table", table, torch.int64, cache.device)
    _check("status", status, torch.int32, cache.device, (2,))
    _check_base(pages_base, cache.device)
    if not rows.tokens:
        return
    starts = torch.full((layers,), first, dtype=torch.int32, device=cache.device)
    ends = starts + rows.tokens
    if _runs_kernels(cache.device):
        out = cache.of_side(side)[0]
        _launch_read(table, side, starts, ends, out, rows.tokens, status, pages_base, key_order, rows)
    else:
        layouts = [PageLayout(side, page_format, cache.head_dim, key_order) for page_format in PageFormat]
        out = _read_on_cpu(table, layouts, starts, ends, rows.tokens, cache.heads, cache.dtype, status, pages_base)
        rows.put(side, out)


def _runs_kernels(device: torch.device) -> bool:
    return device.type == "cuda"


def _most_pages(tokens: int) -> int:
    """How many pages some neighbouring tokens, at least one, may touch."""
    return ceil_div(tokens - 1, PAGE_TOKENS) + 1


# Checks --------------------------------------------------------------------------------------------------------------


def _check(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, device: torch.device, shape: tuple[int, ...] | None = None
) -> None:
    if tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
        kind = "contiguous" if tensor.is_contiguous() else "not contiguous"
        raise PageError(f"{name} is {kind} {tensor.dtype} on {tensor.device}; contiguous {dtype} on {device} is wanted")
    if shape is not None and tensor.shape != shape:
        raise PageError(f"{name} has shape {tuple(tensor.shape)}; {shape} is wanted")


def _check_base(pages_base: torch.Tensor | None, device: torch.device) -> None:
    if pages_base is not None:
        _check("pages_base", pages_base, torch.uint8, device)
    elif device.type != "cuda":
        raise PageError(f"entries are addresses on CUDA devices alone; on {device.type} pages_base must be given")


def _check_tokens(k: torch.Tensor, v: torch.Tensor) -> None:
    if k.dim() != 4 or k.shape != v.shape:
        raise PageError(
            f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}; the same [batch, heads, tokens, head_dim] is wanted"
        )
    if k.dtype not in PAGE_FORMATS or k.dtype != v.dtype or k.device != v.device:
        raise PageError(
            f"k is {k.dtype} on {k.device} and v {v.dtype} on {v.device}; the same type, float16 or bfloat16, and the "
            "same device are wanted"
        )
    PageLayout(Side.K, PAGE_FORMATS[k.dtype], k.shape[3])
    if len(k) > _MAX_SEQUENCES:
        raise PageError(f"k has a batch of {len(k)}; at most {_MAX_SEQUENCES} sequences are written at once")


# GPU -----------------------------------------------------------------------------------------------------------------


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same, with rows in one piece at multiples of 16 bytes."""
    steps = [step for size, step in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if size > 1]
    if tensor.stride(3) == 1 and tensor.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in steps):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _launch_write(
    k: torch.Tensor,
    v: torch.Tensor,
    tokens: int,
    table: torch.Tensor,
    positions: torch.Tensor,
    status: torch.Tensor,
    pages_base: torch.Tensor | None,
    counts: torch.Tensor | None,
    key_order: tuple[int, ...],
    rows: BlockRows | None = None,
) -> None:
    """k, v: [batch, heads, tokens, head_dim], or those of ``rows``' first layer."""
    _, heads, _, head_dim = k.shape
    kernels.launch(
        write_kernel(head_dim, key_order, _block_tokens(rows)),
        (_most_pages(tokens) * heads, table.shape[1], len(Side)),
        _WRITE_WARPS * WARP_LANES,
        (
            k,
            *map(np.uint64, k.stride()[:3]),
            v,
            *map(np.uint64, v.stride()[:3]),
            pages_base,
            table,
            positions,
            counts,
            status,
            np.uint32(heads),
            np.uint32(tokens),
            np.uint32(table.shape[2]),
            np.uint32(PAGE_FORMATS[k.dtype]),
            *_block_arguments(rows),
        ),
        device=k.device,
    )


def _launch_read(
    table: torch.Tensor,
    side: Side,
    starts: torch.Tensor,
    ends: torch.Tensor,
    out: torch.Tensor,
    tokens: int,
    status: torch.Tensor,
    pages_base: torch.Tensor | None,
    key_order: tuple[int, ...],
    rows: BlockRows | None = None,
) -> None:
    """out: [batch, heads, tokens, head_dim], or that of ``rows``' first layer."""
    _, heads, _, head_dim = out.shape
    kernels.launch(
        read_kernel(side, head_dim, out.dtype, key_order, _block_tokens(rows)),
        (_most_pages(tokens) * heads, len(table)),
        _SLICES * WARP_LANES,
        (
            pages_base,
            table,
            starts,
            ends,
            out,
            *map(np.uint64, out.stride()[:3]),
            status,
            np.uint32(heads),
            np.uint32(tokens),
            np.uint32(table.shape[1]),
            *_block_arguments(rows),
        ),
        device=table.device,
    )


def _block_tokens(rows: BlockRows | None) -> int:
    return 0 if rows is None else rows.cache.block_tokens


def _block_arguments(rows: BlockRows | None) -> tuple[torch.Tensor | np.generic | None, ...]:
    """The ``BlockTable`` of cuda/kv/token_rows.cuh."""
    if rows is None:
        return None, None, np.uint64(0), np.uint32(0)
    cache = rows.cache
    return cache.layer_offsets, rows.ids, np.uint64(cache.keys[0].stride(0)), np.uint32(rows.skipped)


# CPU -----------------------------------------------------------------------------------------------------------------


def _leave_out(status: torch.Tensor, index: int, count: int) -> None:
    """What ``report_left_out`` of cuda/kv/page.cuh does."""
    words = status.numpy().view(np.uint32)
    words[0] += count
    words[1] = max(int(words[1]), ~index & 0xFFFFFFFF)


def _blocks(pages: npt.NDArray[np.uint8], entry: int, layout: PageLayout, heads: int) -> npt.NDArray[np.uint8]:
    """A page as [heads, block_bytes], to be written to."""
    first, size = entry & ~ENTRY_FORMAT_MASK, heads * layout.block_bytes
    if not 0 <= first <= len(pages) - size:
        raise PageError(f"a page of {size} bytes begins at byte {first}; pages_base has {len(pages)}")
    return pages[first : first + size].reshape(heads, layout.block_bytes)


def _numbers(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    """16-bit floats for NumPy, bit for bit."""
    return tensor.contiguous().view(torch.int16).numpy().view(FLOAT_TYPES[PAGE_FORMATS[tensor.dtype]])


def _write_on_cpu(
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    status: torch.Tensor,
    pages_base: torch.Tensor | None,
    counts: torch.Tensor | None,
    key_order: tuple[int, ...],
) -> None:
    assert pages_base is not None
    pages, columns, heads = pages_base.numpy(), k.shape[2], k.shape[1]
    page_format = PAGE_FORMATS[k.dtype]
    of_sequences = [columns] * len(k) if counts is None else counts.clamp(0, columns).tolist()
    for side, values in zip(Side, (_numbers(k), _numbers(v)), strict=True):
        layout = PageLayout(side, page_format, k.shape[3], key_order)
        for b, (start, tokens) in enumerate(zip(positions.tolist(), of_sequences, strict=True)):
            if start < 0:
                if tokens:
                    _leave_out(status, b, tokens)
                continue
            before = start - (columns - tokens)  # where the first column would go
            for first, last, page in _pieces(start, start + tokens):
                entry = int(table[side, b, page]) if page < table.shape[2] else -1
                if entry & ENTRY_FORMAT_MASK != page_format:
                    _leave_out(status, b, last - first)
                    continue
                blocks = _blocks(pages, entry, layout, heads)
                held = np.zeros((heads, PAGE_TOKENS, layout.head_dim), np.uint16)
                if first % PAGE_TOKENS:
                    held = split_block(blocks, layout).codes.astype(np.uint16)
                at = first - page * PAGE_TOKENS
                held[:, at : at + last - first] = values[b, :, first - before : last - before].view(np.uint16)
                blocks[:] = quantize_blocks(held.view(FLOAT_TYPES[page_format]), layout)


def _pieces(start: int, end: int) -> Sequence[tuple[int, int, int]]:
    """(first, last, page) of the tokens from ``start`` to ``end``, for each page."""
    pages = range(start // PAGE_TOKENS, ceil_div(end, PAGE_TOKENS)) if start < end else ()
    return [(max(start, page * PAGE_TOKENS), min(end, (page + 1) * PAGE_TOKENS), page) for page in pages]


def _quantize_on_cpu(
    jobs: torch.Tensor,
    source: PageLayout,
    target: PageLayout,
    heads: int,
    status: torch.Tensor,
    pages_base: torch.Tensor | None,
) -> None:
    assert pages_base is not None
    pages = pages_base.numpy()
    for index, (from_entry, to_entry) in enumerate(jobs.tolist()):
        if from_entry & ENTRY_FORMAT_MASK != source.format or to_entry & ENTRY_FORMAT_MASK != target.format:
            _leave_out(status, index, 1)
            continue
        values = dequantize_blocks(_blocks(pages, from_entry, source, heads), source)
        _blocks(pages, to_entry, target, heads)[:] = quantize_blocks(values, target)


def _read_on_cpu(
    table: torch.Tensor,
    layouts: Sequence[PageLayout],
    starts: torch.Tensor,
    ends: torch.Tensor,
    num_tokens: int,
    heads: int,
    dtype: torch.dtype,
    status: torch.Tensor,
    pages_base: torch.Tensor | None,
) -> torch.Tensor:
    assert pages_base is not None
    pages = pages_base.numpy()
    out = torch.zeros((len(table), heads, num_tokens, layouts[0].head_dim), dtype=dtype, device="cpu")
    for b, (given, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        start = max(given, 0)
        for first, last, page in _pieces(start, min(start + num_tokens, end)):
            entry = int(table[b, page]) if page < table.shape[1] else -1
            if entry & ENTRY_FORMAT_MASK >= len(PageFormat):
                _leave_out(status, b, last - first)
                continue
            layout = layouts[entry & ENTRY_FORMAT_MASK]
            values = torch.from_numpy(dequantize_blocks(_blocks(pages, entry, layout, heads), layout))
            at = first - page * PAGE_TOKENS
            out[b, :, first - start : last - start] = values[:, at : at + last - first].to(dtype)
    return out
