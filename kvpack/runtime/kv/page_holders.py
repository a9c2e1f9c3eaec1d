"""Who keeps pages of a KV cache without being one of its sequences: a store of prefixes, a copy on its way elsewhere.

A page counts one reference of the page table, however many sequences have it, and one of each holder, who takes it with
:meth:`KVCache.retain` and gives it back with :meth:`KVCache.release`. It is freed when the last one goes. Holders keep
full pages and never write to them, so their bytes stay what they are for as long as they are held.

A holder that does no more than that gets no word of what becomes of the sequences. One that is made known by
:meth:`KVCache.add_holder` can follow a page to fewer bits, and is asked to give up pages when memory ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from kvpack.format.pages import PageFormat, Side

# A page's side and format: memory that one kind gives up is of no use to another before its slab is empty.
Kind = tuple[Side, PageFormat]


class PageHolder(Protocol):
    """Keeps pages that sequences may hold too.

    It is called in the midst of the cache's work, by the thread that does it, and may call nothing of the cache but
    :meth:`KVCache.release`. Nothing may raise.
    """

    def follows(self, entry: int) -> bool:
        """Whether it has retained this page, once, and shall have it in the fewer bits that the last of its sequences
        is about to have it in: then its reference moves to the new page, and :meth:`replaced` says so.

        False of a page that it has not retained, and of one that must stay as it is, such as one in 16 bits that is in
        the recent window of a prefix: it keeps the page, which no sequence has then.
        """

    def replaced(self, changes: Mapping[int, int]) -> None:
        """Pages that it follows are others now, {entry before: entry now}. The references have moved already: those
        before must not be released, those now are to be."""

    def reclaim(self, missing: Mapping[Kind, int], missing_bytes: int) -> bool:
        """Memory has ended, and so many pages of each kind have to become free.

        Returns:
            True if it has released that many of each kind, or others in such numbers that whole slabs of at least
            ``missing_bytes`` are empty. False if it cannot: then nothing may have changed, but for pages that it held
            for a moment only.
        """
