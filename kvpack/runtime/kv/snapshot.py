"""Sequences of a :class:`~kvpack.KVCache` saved to files, and loaded: the same pages, bit for bit (docs/SNAPSHOTS.md).

Pages are stored as attention reads them, entropy-coded (FORMAT.md §9.6): nothing is quantized, neither when they are
saved nor when they are loaded. What fails leaves the cache, and the file that was there before, as they were.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from kvpack.encode.snapshot_coder import Blocks, decode_run, encode_run, write_snapshot
from kvpack.encode.threads import default_threads
from kvpack.errors import CacheFullError, CacheInputError, DamagedRunError, DeviceError, SnapshotHeaderError
from kvpack.format.layout import ceil_div
from kvpack.format.pages import (
    ENTRY_FORMAT_MASK,
    PAGE_TOKENS,
    BlockParts,
    PageFormat,
    PageLayout,
    Side,
    join_block,
    split_block,
)
from kvpack.format.snapshot import (
    PAGE_RULES,
    Dtype,
    Fingerprint,
    RunPages,
    SnapshotFile,
    SnapshotHeader,
    check_replaceable,
    run_pages,
)
from kvpack.runtime.kv.allocator import PageImportance
from kvpack.runtime.kv.cache import KVCache
from kvpack.runtime.kv.fingerprint import check_fingerprint
from kvpack.runtime.kv.page_table import Ints
from kvpack.runtime.kv.prefix_hash import Tokens, token_bytes
from kvpack.runtime.kv.snapshot_device import encode_runs, load_runs, runs_kernels

UNKNOWN_TOKEN = -1
OnCorrupt = Literal["raise", "drop_from_here"]
_DTYPES: dict[torch.dtype, Dtype] = {torch.float16: "F16", torch.bfloat16: "BF16"}
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}
_PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class LoadedSequence:
    """What :func:`load_snapshot` has put into a cache.

    Attributes:
        header: of the file.
        tokens: i32 [n], the ids of the sequence's tokens that came from it; −1: not known.
        damage: where the sequence was cut (``on_corrupt="drop_from_here"``), or None.
    """

    header: SnapshotHeader
    tokens: npt.NDArray[np.int32]
    damage: DamagedRunError | None


@contextmanager
def _executor(threads: int | None) -> Iterator[ThreadPoolExecutor | None]:
    count = default_threads() if threads is None else threads
    if count <= 1:
        yield None
        return
    with ThreadPoolExecutor(count, thread_name_prefix="kvpack") as executor:
        yield executor


# Saving --------------------------------------------------------------------------------------------------------------


def save_snapshot(
    cache: KVCache,
    path: _PathLike,
    sequence: int = 0,
    *,
    tokens: Tokens | None = None,
    fingerprint: Fingerprint | None = None,
    pages: tuple[int, int] | None = None,
    threads: int | None = None,
) -> int:
    """Write a sequence of a cache to a file, which is there whole, or not at all.

    Memory for one run (2,048 tokens in all layers) of one side and format is taken at a time.

    Args:
        tokens: the ids of all tokens of the sequence; None: not known.
        fingerprint: of the model; without, the file is of no known one.
        pages: (first, end): of the sequence's pages of 64 tokens only these; the last page of a sequence may be among
            them if it is not full. None: all.
        threads: of the CPU; all cores by default. The file does not depend on it, but for the time in it.

    Returns:
        The bytes of the file.

    Raises:
        CacheInputError: no such sequence, or an empty one; another number of tokens; pages that it does not have; the
            midst of a step, or of a CUDA graph's capture.
        CacheFullError: the device has no memory for coding pages; the file of before is there still.
        InputError: there is a file that is no context, which is not replaced, or a directory.
        OSError: the file cannot be written.

    >>> import tempfile, torch
    >>> from kvpack import KVCache, PageFormat
    >>> cache = KVCache(1, 2, 64, 1024, device="cpu", formats=PageFormat.INT4)
    >>> cache.append(0, *torch.randn(2, 1, 2, 300, 64).half())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size_bytes = save_snapshot(cache, f"{folder}/context")
    ...     loaded = KVCache.load(f"{folder}/context", device="cpu")
    >>> torch.equal(loaded.read(0, 0)[0], cache.read(0, 0)[0])
    True
    """
    check_replaceable(path)
    importance = cache.importance_of(sequence)  # says what is wrong with the sequence, and the moment
    length = cache.length(0, sequence)
    first, end = (0, ceil_div(length, PAGE_TOKENS)) if pages is None else pages
    if not 0 <= first < end <= ceil_div(length, PAGE_TOKENS):
        held = f"sequence {sequence} has {length} tokens, pages 0 to {ceil_div(length, PAGE_TOKENS)}"
        raise CacheInputError(
            f"{held}; {first} to {end} cannot be saved" if length else f"sequence {sequence} is empty"
        )
    ids = np.full(length, UNKNOWN_TOKEN, np.int32)
    if tokens is not None:
        given = np.frombuffer(token_bytes(tokens), "<i4")
        if len(given) != length:
            raise CacheInputError(
                f"{len(given)} token ids are given for sequence {sequence}, which has {length} tokens"
            )
        ids[:] = given
    ids = ids[first * PAGE_TOKENS : end * PAGE_TOKENS]
    entries = cache.entries[:, :, sequence, first:end].copy()
    page_formats = (entries & ENTRY_FORMAT_MASK).astype(np.uint8)
    header = snapshot_header(cache, tokens=len(ids), first_page=first, fingerprint=fingerprint)
    arrays: dict[str, npt.NDArray[Any]] = {"tokens": ids, "page_formats": page_formats}
    if importance.weight.any():
        arrays["importance"] = np.stack([importance.average[:, first:end], importance.weight[:, first:end]])
    if cache.budget is not None:
        arrays |= {"errors": cache.errors, "shares": cache.shares}

    def entries_of(run: RunPages) -> Ints:
        return entries[run.layers, run.side, run.indices]

    def blocks_of(run: RunPages) -> Blocks:
        return torch.stack(cache.read_pages(entries_of(run))).numpy().reshape(run.block_shape)

    with _executor(threads) as executor:
        parts = (run_pages(header, page_formats, run) for run in range(header.runs))
        coded: Iterable[Iterable[tuple[str, bytes | memoryview]]]
        if runs_kernels(cache.device):
            coded = encode_runs(parts, cache.device, entries_of, cache.pools.pages)
        else:
            coded = (encode_run(run, blocks_of, executor) for run in parts)
        try:
            return write_snapshot(path, header, arrays, coded)
        except torch.OutOfMemoryError as error:
            raise CacheFullError(
                f"{cache.device} has no memory for coding {os.fspath(path)}, beside the pages: free some, or save a "
                f'copy in host memory, cache.copy([sequence], device="cpu").save(…): {error}'
            ) from None


def snapshot_header(
    cache: KVCache,
    *,
    tokens: int,
    first_page: int = 0,
    fingerprint: Fingerprint | None = None,
    parent: str | None = None,
    chain: str | None = None,
) -> SnapshotHeader:
    """Of pages of a cache; the other arguments as of :class:`~kvpack.format.snapshot.SnapshotHeader`."""
    return SnapshotHeader(
        tokens=tokens,
        layers=cache.num_layers,
        kv_heads=cache.num_kv_heads,
        head_dim=cache.head_dim,
        dtype=_DTYPES[cache.dtype],
        key_order=cache.key_order,
        recent_tokens=cache.recent_tokens,
        sinks=cache.sinks,
        formats=None if cache.budget is not None else _open_formats(cache),
        budget=None if cache.budget is None else float(cache.budget),
        policy=cache.policy,
        fingerprint=fingerprint,
        first_page=first_page,
        parent=parent,
        chain=chain,
        created_unix_s=int(time.time()),
    )


def _open_formats(cache: KVCache) -> tuple[tuple[str, str], ...]:
    def of(layer: int, side: Side) -> str:
        others = cache.possible_formats(layer, side) - {cache.full_format}
        return next(iter(others), cache.full_format).name

    return tuple((of(layer, Side.K), of(layer, Side.V)) for layer in range(cache.num_layers))


# Loading -------------------------------------------------------------------------------------------------------------


def cache_for(header: SnapshotHeader, **options: Any) -> KVCache:
    """An empty cache of the shape and the formats that a snapshot's was of.

    Args:
        options: of :class:`~kvpack.KVCache`, instead of the snapshot's; ``max_tokens`` is twice what it has, at least
            65,536, if not given: page tables grow by need.

    Raises:
        CacheInputError, CacheFullError, DeviceError: as of :class:`~kvpack.KVCache`.
    """
    formats = header.formats
    saved: dict[str, Any] = {
        "max_tokens": max(1 << 16, 2 * (header.first_page * PAGE_TOKENS + header.tokens)),
        "dtype": _TORCH_DTYPES[header.dtype],
        "budget": header.budget,
        "formats": None if formats is None else [(PageFormat[k], PageFormat[v]) for k, v in formats],
        "policy": header.policy,
        "recent_tokens": header.recent_tokens,
        "sinks": header.sinks,
        "key_order": header.key_order or None,
    }
    return KVCache(header.layers, header.kv_heads, header.head_dim, **(saved | options))


def load_cache(
    path: _PathLike,
    *,
    tokens: int | None = None,
    fingerprint: Fingerprint | None = None,
    on_corrupt: OnCorrupt = "raise",
    threads: int | None = None,
    **options: Any,
) -> KVCache:
    """A cache whose sequence 0 is what a file holds: what :meth:`kvpack.KVCache.load` is.

    Args:
        tokens, fingerprint, on_corrupt, threads: as of :func:`load_snapshot`.
        options: as of :func:`cache_for`.

    Raises:
        CacheInputError, CacheFullError, DeviceError, and what :func:`load_snapshot` raises.
    """
    with SnapshotFile(path) as file:
        cache = cache_for(file.header, **options)
        load_snapshot(cache, file, tokens=tokens, fingerprint=fingerprint, on_corrupt=on_corrupt, threads=threads)
    return cache


def load_snapshot(
    cache: KVCache,
    source: _PathLike | SnapshotFile,
    sequence: int = 0,
    *,
    tokens: int | None = None,
    fingerprint: Fingerprint | None = None,
    on_corrupt: OnCorrupt = "raise",
    threads: int | None = None,
) -> LoadedSequence:
    """Put what a file holds into a sequence of a cache.

    The sequence has to be empty, or, for a file that begins with a later page, to have just the tokens before that:
    what was saved in parts is loaded part by part. Other sequences of the cache may have tokens.

    Args:
        source: the file, or one that is open.
        tokens: load only so many of the file's first tokens. A page that is cut becomes one of 16 bits, as of
            :meth:`~kvpack.KVCache.truncate`. None: all.
        fingerprint: of the model that will go on. None: nothing is compared.
        on_corrupt: "raise", or "drop_from_here": load what comes before the first damaged run, and warn.
        threads: of the CPU; all cores by default.

    Raises:
        CacheInputError: no such sequence, or other tokens in it; pages that the cache cannot have: its shape, dtype,
            ``key_order`` or formats are others.
        CacheFullError: no memory for the pages, or more than ``max_tokens``.
        FingerprintMismatchError, ModelMismatchError: as of :func:`~kvpack.runtime.kv.fingerprint.check_fingerprint`.
        DamagedRunError: pages that cannot be decoded; the message names them.
        SnapshotError, ContainerError, LimitError: the file is none, or is damaged elsewhere.
        OSError: it cannot be read.

    Whatever is raised, the cache is as it was.
    """
    if on_corrupt not in ("raise", "drop_from_here"):
        raise CacheInputError(f"on_corrupt is {on_corrupt!r}; there are 'raise' and 'drop_from_here'")
    if not isinstance(source, SnapshotFile):
        with SnapshotFile(source) as file:
            return load_snapshot(
                cache,
                file,
                sequence,
                tokens=tokens,
                fingerprint=fingerprint,
                on_corrupt=on_corrupt,
                threads=threads,
            )
    file, header = source, source.header
    if fingerprint is not None:
        check_fingerprint(header, fingerprint)
    check_cache(cache, header)
    wanted = header.tokens if tokens is None else tokens
    if not 0 < wanted <= header.tokens:
        raise CacheInputError(f"{tokens} tokens are to be loaded of {file.container.path}, which has {header.tokens}")
    before, held = header.first_page * PAGE_TOKENS, cache.length(0, sequence)
    if held != before:
        expected = f"the {before} tokens before it" if before else "none: free() it, or name an empty one"
        raise CacheInputError(
            f"sequence {sequence} has {held} tokens; {file.container.path}, which begins with token {before}, needs "
            f"{expected}"
        )
    if header.tokens % PAGE_TOKENS and (file.page_formats[:, :, -1] != cache.full_format).any():
        raise SnapshotHeaderError(
            f"{file.container.path}: the last page is not full, so that tokens will be written to it, and is quantized"
        )
    cache.importance_of(sequence)  # says what is wrong with the moment
    ids, importance = file.tokens(), file.array("importance")
    errors, shares = file.array("errors"), file.array("shares")
    with _executor(threads) as executor:
        entries, damage = load_pages(
            cache, file, ceil_div(wanted, PAGE_TOKENS), on_corrupt=on_corrupt, executor=executor
        )
    try:
        pages = entries.shape[2]
        reached = min(header.tokens, pages * PAGE_TOKENS)
        if pages:
            known = None if importance is None else PageImportance(*importance[:, :, :pages])
            cache.adopt(sequence, entries, reached, known, first_page=header.first_page)
    finally:
        cache.release(entries)
    if reached > wanted:
        reached = wanted
        try:
            cache.truncate(sequence, before + reached)
        except BaseException:  # no memory for the page in 16 bits
            cache.truncate(sequence, before)
            raise
    if errors is not None and errors.shape == cache.errors.shape and np.isnan(cache.errors).all():
        cache.errors = errors
        if shares is not None and cache.budget == header.budget:
            cache.shares = shares
    if damage is not None:
        warnings.warn(
            f"{reached} of {header.tokens} tokens were loaded; what is behind them is damaged: {damage}", stacklevel=2
        )
    return LoadedSequence(header, ids[:reached], damage)


def check_cache(cache: KVCache, header: SnapshotHeader) -> None:
    """Whether a cache can have a snapshot's pages, but for their formats, and add to them by the same rules.

    Raises:
        CacheInputError: the message says what differs.
    """
    for name, of_file, of_cache in (
        ("layers", header.layers, cache.num_layers),
        ("KV heads", header.kv_heads, cache.num_kv_heads),
        ("head_dim", header.head_dim, cache.head_dim),
        ("dtype", _TORCH_DTYPES[header.dtype], cache.dtype),
        ("page_rules", header.page_rules, PAGE_RULES),
        ("key_order", _order_of(header.key_order, header), _order_of(cache.key_order, header)),
    ):
        if of_file != of_cache:
            raise CacheInputError(
                f"{name}: {of_file} in the file, {of_cache} in the cache, which cannot have its pages"
            )


def _order_of(key_order: tuple[int, ...], header: SnapshotHeader) -> tuple[int, ...]:
    """An empty one is the usual one."""
    return PageLayout(Side.K, PageFormat.INT4, header.head_dim, key_order).group_order


def load_pages(
    cache: KVCache,
    file: SnapshotFile,
    end_page: int,
    *,
    first_page: int = 0,
    on_corrupt: OnCorrupt = "raise",
    executor: ThreadPoolExecutor | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Ints, DamagedRunError | None]:
    """Pages ``first_page`` … ``end_page`` − 1 of a file as pages of a cache, which the caller holds.

    Both count from the file's first page. Of the file's last page, what is behind its tokens becomes zero.

    Args:
        progress: called with the tokens of each run that is done.

    Returns:
        i64 [layers, 2, pages], as :meth:`~kvpack.KVCache.new_pages`; fewer pages if the file is damaged and
        ``on_corrupt`` says so, and the damage.

    Raises:
        CacheInputError: pages of formats that the cache cannot have, or that the file does not have.
        CacheFullError, DamagedRunError, FileChangedError: no page is held then.
    """
    header = file.header
    if not 0 <= first_page < end_page <= header.pages:
        raise CacheInputError(f"pages {first_page} to {end_page} are to be loaded of a file of {header.pages}")
    formats = file.page_formats[:, :, first_page:end_page]
    entries = cache.new_pages(formats, first_page=header.first_page + first_page)
    fill = _fill_on_device if runs_kernels(cache.device) else _fill_on_cpu
    damage, reached = None, end_page
    try:
        fill(cache, file, entries, first_page, end_page, executor, progress)
    except DamagedRunError as error:
        reached = max(first_page, header.page_range(error.run).start)
        if on_corrupt == "raise":
            cache.release(entries)
            error.advice = _advice(PAGE_TOKENS * (reached - first_page))
            raise
        damage = error
    except BaseException:
        cache.release(entries)
        raise
    cache.release(entries[:, :, reached - first_page :])
    return entries[:, :, : reached - first_page], damage


def _advice(intact_tokens: int) -> str:
    """What can be had of pages whose first so many tokens are intact."""
    if not intact_tokens:
        return "nothing is before it: the context has to be computed anew"
    return f'on_corrupt="drop_from_here" (kvpack generate --drop-damaged) loads the {intact_tokens} tokens before it'


def _fill_on_cpu(
    cache: KVCache,
    file: SnapshotFile,
    entries: Ints,
    first_page: int,
    end_page: int,
    executor: ThreadPoolExecutor | None,
    progress: Callable[[int], None] | None,
) -> None:
    """Pages of a file into new pages of a cache. Raises DamagedRunError when those of the runs before are done."""
    header = file.header
    for run in header.runs_of(first_page, end_page):
        for pages, blocks in decode_run(file, run, executor):
            _put_blocks(cache, pages, blocks, entries, first_page, end_page)
        if progress is not None:
            progress(len(header.token_range(run)))


def _fill_on_device(
    cache: KVCache,
    file: SnapshotFile,
    entries: Ints,
    first_page: int,
    end_page: int,
    executor: ThreadPoolExecutor | None,
    progress: Callable[[int], None] | None,
) -> None:
    """:func:`_fill_on_cpu` by a GPU, which sees that a run is damaged; the CPU's decoder says what is wrong."""

    def entries_of(pages: RunPages) -> Ints:
        chosen = (pages.indices >= first_page) & (pages.indices < end_page)
        return np.where(chosen, entries[pages.layers, pages.side, (pages.indices - first_page) * chosen], 0)

    def load(runs: range, progress: Callable[[int], None] | None) -> list[int]:
        try:
            return load_runs(file, runs, cache.device, entries_of, cache.pools.pages, progress=progress)
        except torch.OutOfMemoryError as error:
            raise CacheFullError(
                f"{cache.device} has no memory for decoding {file.container.path}, beside the pages: {error}"
            ) from None

    def require_none(suspects: list[int]) -> None:
        if suspects:
            raise DeviceError(
                f"{file.container.path}: {cache.device} found damage in runs {suspects[0]} to {suspects[-1]} where the "
                "CPU finds none: the file was changed meanwhile, or the device's memory is faulty"
            )

    suspects = load(file.header.runs_of(first_page, end_page), progress)
    for run in suspects:
        try:
            decode_run(file, run, executor)
        except DamagedRunError:
            require_none(load(range(suspects[0], run), None))
            raise
    require_none(suspects)


def _put_blocks(cache: KVCache, pages: RunPages, blocks: Blocks, entries: Ints, first_page: int, end_page: int) -> None:
    header = pages.header
    kept = header.tokens % PAGE_TOKENS
    if kept and (is_last := pages.indices == header.pages - 1).any():
        blocks[is_last] = _cleared(blocks[is_last], pages, kept)
    chosen = np.flatnonzero((pages.indices >= first_page) & (pages.indices < end_page))
    if not len(chosen):
        return
    targets = cache.read_pages(entries[pages.layers[chosen], pages.side, pages.indices[chosen] - first_page])
    sources = torch.from_numpy(blocks if len(chosen) == len(pages) else blocks[chosen]).to(cache.device)
    torch._foreach_copy_(targets, list(sources.unbind()))


def _cleared(blocks: Blocks, pages: RunPages, kept: int) -> Blocks:
    """Pages of 16 bits with zeros behind their first tokens."""
    parts = split_block(blocks, pages.layout)
    codes = parts.codes.copy()
    codes[..., kept:, :] = 0
    return join_block(BlockParts(codes, parts.scales, parts.centers), pages.layout)
