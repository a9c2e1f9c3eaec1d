"""A rank's pages in host memory and files, saved and loaded by threads of its own.

Saving: the engine's thread has keys and values copied out (:meth:`PageStore.save`), a thread makes pages of them, puts
them into host memory and, when nothing else waits, writes them to files. Loading: another thread reads pages, and puts
keys and values where vLLM wants them. The engine's thread waits for neither, nor for their lock.

All is done by :class:`~kvpack.runtime.kv.tiers.Tiers`: its files are bounded, written whole or not at all, shared by
several processes, known by a chain of hashes over the tokens, and looked at with suspicion.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch

from kvpack.encode.threads import ThreadPool
from kvpack.errors import CacheInputError, KvpackError
from kvpack.format.layout import ceil_div
from kvpack.format.pages import PAGE_TOKENS, PageFormat
from kvpack.format.snapshot import Fingerprint
from kvpack.integrations.vllm.kv_options import queue_room
from kvpack.integrations.vllm.kv_page_codec import CopiedPages, PageCodec, PagedLayers
from kvpack.integrations.vllm.kv_plan import Changes, Load, PageRange
from kvpack.runtime.kv.cache import KVCache
from kvpack.runtime.kv.host_tier import BlockBytes
from kvpack.runtime.kv.run_coder import Formats
from kvpack.runtime.kv.snapshot_device import runs_kernels
from kvpack.runtime.kv.tiers import Tiers

# A directory that others write to is read anew at most so often.
_SCAN_INTERVAL_S = 2.0

# Copied, waiting and encoded together: where the queue has no room for a whole prompt, it has for its beginning.
_JOB_PAGES = 8
# Read and put together: on a device that is full but for a little they lie beside vLLM's cache.
_LOAD_PAGES = 16

Counts = dict[str, int]


class PageStore:
    """Pages of one rank.

    Args:
        paged: vLLM's cache.
        formats: of K and of V; the first page of a prompt is kept in 16 bits whatever they are, since attention leans
            on the first tokens.
        host_bytes, directory, disk_bytes: of this rank.
        step_tokens: the most that a step of the engine computes.
        queue_bytes: of keys and values that wait for being encoded; None: as
            :func:`~kvpack.integrations.vllm.kv_options.queue_room` says.
        free_bytes: of the memory that they wait in; None: that is not known.
        outside_bytes: of that memory, what the engine does not count as its own; None: it may all be taken.
        fingerprint: of this rank.
        report: called with each file that is damaged, and what is wrong with it.
        report_foreign: called with those of something else that have been met since the last call, each with why: of
            another model's directory there may be thousands.
        on_failure: called with what failed and why, where keys and values are not saved or loaded for it.

    Attributes:
        step_bytes: of the keys and values of ``step_tokens``, as they wait.
        queue_bytes: the most that wait.

    Raises:
        CacheInputError, CacheFullError, PageError: as of :class:`~kvpack.runtime.kv.tiers.Tiers` and of
            :class:`~kvpack.KVCache`.
    """

    def __init__(
        self,
        paged: PagedLayers,
        formats: tuple[PageFormat, PageFormat],
        *,
        host_bytes: int,
        step_tokens: int,
        fingerprint: Fingerprint,
        queue_bytes: int | None = None,
        free_bytes: int | None = None,
        outside_bytes: int | None = None,
        directory: Path | None = None,
        disk_bytes: int | None = None,
        report: Callable[[Path, Exception], None] | None = None,
        report_foreign: Callable[[list[tuple[Path, Exception]]], None] | None = None,
        on_failure: Callable[[str, Exception], None] | None = None,
    ) -> None:
        layers = len(paged.layers)
        cache = KVCache(
            layers,
            paged.heads,
            paged.head_dim,
            PAGE_TOKENS,
            dtype=paged.dtype,
            device=paged.device,
            formats=[formats] * layers,
            recent_tokens=0,
            sinks=1,
            max_bytes=0,  # it never has pages
        )
        self._paged, self._codec, self._full = paged, PageCodec(cache), cache.full_format
        self._formats = np.array([formats] * layers, np.uint8)
        self._lock = threading.RLock()
        # What the engine's thread sees; guarded by a lock that is held for moments only.
        self._seen = threading.Condition()
        self._report, self._report_foreign = report, report_foreign
        self._foreign: list[tuple[Path, Exception]] = []
        self._tiers = Tiers(
            cache,
            host_bytes,
            directory,
            disk_bytes,
            lock=self._lock,
            fingerprint=fingerprint,
            report=self._met_bad_file,
            codes_on_device=runs_kernels(paged.device),
        )
        # Pages of a prompt behind so many have no room; None: files have it.
        first, later = self._codec.page_bytes(self._formats_at(0, 2))
        self._most_pages = self._tiers.host.longest_chain(first, later) if directory is None else None
        self.step_bytes = ceil_div(step_tokens, PAGE_TOKENS * _JOB_PAGES) * self._copy_bytes(1, _JOB_PAGES)
        room = queue_room(self.step_bytes, free_bytes, outside_bytes)
        self.queue_bytes = room if queue_bytes is None else queue_bytes
        self._on_failure = on_failure
        self._saver, self._loader = ThreadPool(1, "kvpack-save"), ThreadPool(1, "kvpack-load")
        self._streams = {
            name: torch.cuda.Stream(paged.device) if paged.device.type == "cuda" else None for name in ("save", "load")
        }
        self._loading = 0
        self._known: set[bytes] = set()
        self._changes = Changes()
        self._waiting: set[bytes] = set()
        self._waiting_bytes = self._waiting_jobs = 0
        self._counts: Counter[str] = Counter()
        self._told: Counter[str] = Counter()
        self._loaded: list[tuple[str, list[int]]] = []
        self._scanned_s = time.monotonic()
        self._publish()
        if paged.blocks is not None:  # the kernel that the engine's thread launches is compiled now, not in a step
            rows = paged.rows(range(ceil_div(PAGE_TOKENS, paged.block_tokens)), 0, PAGE_TOKENS)
            self._codec.copy(rows, self._formats[:, :, None])

    # Saving ----------------------------------------------------------------------------------------------------------

    def save(self, pages: PageRange) -> None:
        """Copy keys and values of pages out of vLLM's cache, as they are when what is enqueued now is done.

        A thread saves them. Those that are here or on their way are left out, and so are the last ones where the queue
        has no room, or the tiers have none.
        """
        with self._seen:
            missing = [place for place, one in enumerate(pages.hashes) if self._is_missing(one)]
        if not missing:
            return
        begin, end = missing[0], missing[-1] + 1
        room_end = self._room_end(pages, begin, end)
        parts = [_part(pages, first, min(first + _JOB_PAGES, room_end)) for first in range(begin, room_end, _JOB_PAGES)]
        sizes = [self._copy_bytes(part.first_page, len(part.hashes)) for part in parts]
        with self._seen:
            room = self.queue_bytes - self._waiting_bytes
            count = int(np.searchsorted(np.cumsum(sizes), room, side="right"))
            self._counts["dropped_pages"] += end - room_end + sum(len(part.hashes) for part in parts[count:])
            self._waiting_bytes += sum(sizes[:count])
            self._waiting_jobs += count
            self._waiting.update(one for part in parts[:count] for one in part.hashes)
        for part, size_bytes in zip(parts[:count], sizes, strict=False):
            self._begin_saving(part, size_bytes)

    def _room_end(self, pages: PageRange, begin: int, end: int) -> int:
        """Up to which of some pages, by their place, the tiers may have room.

        Without files they have none for what stands on pages that have gone, nor for more of a prompt than host memory
        takes, and would be asked for it whenever the prompt comes.
        """
        if self._most_pages is None:
            return end
        with self._seen:
            if not begin and pages.parent is not None and self._is_missing(pages.parent):
                return begin
        return max(begin, min(end, self._most_pages - pages.first_page))

    def _is_missing(self, page_hash: bytes) -> bool:
        return page_hash not in self._known and page_hash not in self._waiting

    def _begin_saving(self, pages: PageRange, size_bytes: int) -> None:
        copied = None
        try:
            copies = self._copied(pages)
            if self._paged.device.type == "cuda":
                copied = torch.cuda.Event()
                copied.record()
        except (KvpackError, RuntimeError) as error:  # no memory, say
            self._failed("save", error)
            self._let_go(pages, size_bytes)
            return
        self._saver.executor.submit(self._save, pages, copies, copied, size_bytes)

    def _copied(self, pages: PageRange) -> CopiedPages | torch.Tensor:
        """Keys and values as kernels copy them: pages of 16 bits; or as :meth:`PagedLayers.copy_out` does."""
        first = pages.first_page * PAGE_TOKENS
        end = first + len(pages.hashes) * PAGE_TOKENS
        if self._paged.blocks is None:
            return self._paged.copy_out(pages.block_ids, first, end)
        return self._codec.copy(self._paged.rows(pages.block_ids, first, end), self._formats_of(pages))

    def _copy_bytes(self, first_page: int, count: int) -> int:
        """Memory that pages take as :meth:`_copied`, but for others' tokens in the first and the last block."""
        paged = self._paged
        if paged.blocks is not None:
            return self._codec.copied_bytes(self._formats_at(first_page, count))
        return len(paged.layers) * PAGE_TOKENS * count * paged.heads * 2 * paged.head_dim * paged.dtype.itemsize

    def _save(
        self, pages: PageRange, copies: CopiedPages | torch.Tensor, copied: torch.cuda.Event | None, size_bytes: int
    ) -> None:
        try:
            with self._on_stream("save"):
                if copied is not None:
                    copied.synchronize()
                blocks = self._blocks(pages, copies)
                kept = self._tiers.put(blocks)
            with self._seen:
                # Those without room in memory are the last ones.
                self._counts["saved_pages"] += kept
                self._counts["saved_bytes"] += sum(block.data.numel() for block in blocks[:kept])
                self._counts["dropped_pages"] += len(blocks) - kept
        except Exception as error:  # no memory, say: these pages are not kept
            self._failed("save", error)
        finally:
            try:
                self._publish()  # before they wait no longer: they would be taken for missing ones in between
            except Exception as error:
                self._failed("save", error)
            finally:
                is_last = self._let_go(pages, size_bytes)
            if is_last and self._tiers.disk is not None:
                self._flush()
                self._publish()

    def _let_go(self, pages: PageRange, size_bytes: int) -> bool:
        """Pages wait no longer. Returns whether no others do."""
        with self._seen:
            self._waiting_bytes -= size_bytes
            self._waiting_jobs -= 1
            self._waiting.difference_update(pages.hashes)
            return not self._waiting_jobs

    def _flush(self) -> None:
        if not self._tiers.is_resting:
            with self._on_stream("save"):
                self._tiers.flush()

    def _blocks(self, pages: PageRange, copies: CopiedPages | torch.Tensor) -> list[BlockBytes]:
        formats = self._formats_of(pages)
        if isinstance(copies, CopiedPages):
            data = self._codec.quantized(copies)
        else:
            first = pages.first_page * PAGE_TOKENS
            values = self._paged.tokens_of(copies, first, first + len(pages.hashes) * PAGE_TOKENS)
            data = self._codec.encode(values, formats)
        parents = [pages.parent, *pages.hashes[:-1]]
        return [
            BlockBytes(one, parent, pages.first_page + place + 1, tokens, formats[:, :, place], of_page)
            for place, (one, parent, tokens, of_page) in enumerate(
                zip(pages.hashes, parents, pages.tokens, data, strict=True)
            )
        ]

    def _formats_of(self, pages: PageRange) -> Formats:
        """u8 [layers, 2, pages]."""
        return self._formats_at(pages.first_page, len(pages.hashes))

    def _formats_at(self, first_page: int, count: int) -> Formats:
        """u8 [layers, 2, count], of pages from there on."""
        formats = np.repeat(self._formats[:, :, None], count, -1)
        if first_page == 0:
            formats[:, :, 0] = self._full
        return formats

    # Loading ---------------------------------------------------------------------------------------------------------

    def load(self, load: Load) -> None:
        """Have keys and values put into vLLM's cache. :meth:`take_loaded` says when that is done."""
        begun = None
        if self._paged.device.type == "cuda":
            begun = torch.cuda.Event()
            begun.record()  # behind what had the blocks before
        with self._seen:
            self._loading += 1
        self._loader.executor.submit(self._load, load, begun)

    def _load(self, load: Load, begun: torch.cuda.Event | None) -> None:
        reached = load.first_token
        try:
            with self._on_stream("load"):
                if begun is not None:
                    begun.synchronize()
                while reached < load.end_token and (end := self._put(load, reached)) > reached:
                    reached = end
        except Exception as error:  # whatever it is: vLLM waits for an answer
            self._failed("load", error)
        block_tokens = self._paged.block_tokens
        failed = range(reached // block_tokens, ceil_div(load.end_token, block_tokens))
        with self._seen:
            self._counts["loaded_tokens"] += reached - load.first_token
            self._counts["failed_tokens"] += load.end_token - reached
            self._loaded.append((load.request_id, list(load.pages.block_ids[failed.start : failed.stop])))
            self._loading -= 1
            self._seen.notify_all()
        self._tiers.touch(load.pages.hashes)  # of all pieces the first one last
        if failed:
            self._publish()

    def _put(self, load: Load, first_token: int) -> int:
        """Put some tokens from there on. Returns up to which one, a whole block's end, they are there."""
        block_tokens, pages = self._paged.block_tokens, load.pages
        both = math.lcm(PAGE_TOKENS, block_tokens)
        step = ceil_div(_LOAD_PAGES * PAGE_TOKENS, both) * both
        last = min(load.end_token, (first_token // step + 1) * step)
        chosen = slice(first_token // PAGE_TOKENS - pages.first_page, ceil_div(last, PAGE_TOKENS) - pages.first_page)
        with self._tiers.reading(pages.hashes[chosen], pages.tokens[chosen]) as blocks:
            first = (pages.first_page + chosen.start) * PAGE_TOKENS
            end = min(last, first + len(blocks) * PAGE_TOKENS)
            end -= end % block_tokens
            if end <= first_token:
                return first_token
            formats = np.stack([block.formats for block in blocks], -1)
            rows = first_token - first, first_token, end
            self._put_tokens(pages.block_ids, *rows, [block.data for block in blocks], formats)
            with self._seen:
                self._counts["loaded_bytes"] += sum(block.data.numel() for block in blocks)
            return end

    def _put_tokens(
        self,
        block_ids: Sequence[int],
        skipped: int,
        first: int,
        end: int,
        data: Sequence[torch.Tensor],
        formats: Formats,
    ) -> None:
        """Tokens ``first … end − 1`` of a request, which come behind so many ``skipped`` ones of the pages."""
        try:
            if self._paged.blocks is not None:
                self._codec.put(data, formats, skipped, self._paged.rows(block_ids, first, end))
            else:
                values = self._codec.decode(data, formats, self._paged.device)
                self._paged.put(values[:, skipped : skipped + end - first], block_ids, first, end)
        finally:
            # vLLM computes with it as soon as it hears of it, or instead of it; and host memory may be written to then.
            if (stream := self._streams["load"]) is not None:
                stream.synchronize()

    def wait_for_load(self, timeout_s: float) -> None:
        """Until a load has ended, if one is under way, or so long."""
        with self._seen:
            if self._loading and not self._loaded:
                self._seen.wait(timeout_s)

    def take_loaded(self) -> list[tuple[str, list[int]]]:
        """Requests whose loading has ended since the last call, each with the blocks that could not be filled."""
        with self._seen:
            loaded, self._loaded = self._loaded, []
        return loaded

    # What there is ---------------------------------------------------------------------------------------------------

    def hashes(self) -> set[bytes]:
        """Of all pages that are here. What :meth:`take_changes` says counts from here on."""
        with self._seen:
            self._changes = Changes()
            return set(self._known)

    def take_changes(self) -> Changes:
        """Since the last call."""
        with self._seen:
            changes, self._changes = self._changes, Changes()
        return changes

    def look_around(self) -> None:
        """Learn of what others have written to the directory, if that was not done lately; a thread does it."""
        if self._tiers.disk is not None and time.monotonic() - self._scanned_s >= _SCAN_INTERVAL_S:
            self._scanned_s = math.inf  # until this one has ended
            self._saver.executor.submit(self._scan)

    def _scan(self) -> None:
        assert self._tiers.disk is not None
        try:
            self._tiers.disk.scan()
        except Exception as error:  # nobody asks what has become of it
            self._failed("read the directory", error)
        finally:
            self._scanned_s = time.monotonic()
        self._publish()

    def _publish(self) -> None:
        with self._lock:
            known = {block.hash for block in self._tiers.host.all()}
            if (disk := self._tiers.disk) is not None:
                known |= disk.hashes()
            # Two threads come here in turn. The engine's, which may not wait for so long, needs what is below.
            changes = Changes(known - self._known, self._known - known)
            with self._seen:
                self._changes, self._known = self._changes.then(changes), known
                if disk is not None:
                    for name in ("damaged_files", "foreign_files", "failed_writes", "written_files"):
                        self._counts[name] = getattr(disk, name)
                foreign, self._foreign = self._foreign, []
        if foreign and self._report_foreign is not None:
            self._report_foreign(foreign)

    def _met_bad_file(self, path: Path, error: Exception) -> None:
        if isinstance(error, CacheInputError):
            with self._seen:
                self._foreign.append((path, error))
        elif self._report is not None:
            self._report(path, error)

    def take_counts(self) -> Counts:
        """What has been counted since the last call, without what is zero."""
        with self._seen:
            found = {name: count - self._told[name] for name, count in self._counts.items()}
            self._told = self._counts.copy()
        return {name: count for name, count in found.items() if count}

    def sizes(self) -> Counts:
        """Bytes of host memory and of files now."""
        found = self._tiers.metrics()
        return {"host_bytes": found.host_bytes, "disk_bytes": found.disk_bytes}

    def _failed(self, what: str, error: Exception) -> None:
        with self._seen:
            self._counts[f"failed_{what.partition(' ')[0]}s"] += 1
        if self._on_failure is not None:
            self._on_failure(what, error)

    def _on_stream(self, name: str) -> AbstractContextManager[object]:
        stream = self._streams[name]
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    # Ends ------------------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Wait until all that has been handed over is saved or loaded."""
        futures: Sequence[Future[None]] = [pool.executor.submit(lambda: None) for pool in (self._loader, self._saver)]
        for future in futures:
            future.result()

    def close(self) -> None:
        """Save and load what waits, write what is in no file, and end the threads."""
        self._loader.close()
        self._saver.close()
        self._flush()
        self._tiers.close()


def _part(pages: PageRange, begin: int, end: int) -> PageRange:
    """Some of them, by their place among all."""
    return PageRange(
        pages.first_page + begin,
        pages.hashes[begin - 1] if begin else pages.parent,
        pages.hashes[begin:end],
        pages.tokens[begin:end],
        pages.block_ids,
    )
