"""Snapshots with pages of fewer bits than those that were saved: what a cache of such formats would have made of them.

Pages that would be in the recent window, and those of the first tokens, keep their 16 bits. No model is needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from kvpack.encode.page_coder import dequantize_blocks, quantize_blocks
from kvpack.encode.snapshot_coder import Blocks, decode_run, encode_run, write_snapshot
from kvpack.encode.threads import map_ordered
from kvpack.errors import InputError
from kvpack.format.pages import PAGE_TOKENS, PageFormat, PageLayout, Side
from kvpack.format.snapshot import (
    PAGE_RULES,
    PageFormats,
    RunPages,
    SnapshotFile,
    SnapshotHeader,
    array_rules,
    run_pages,
)
from kvpack.runtime.kv.budget import Window

# Of a budget's cache, which what comes out is not.
_OF_BUDGETS = ("errors", "shares")


def convert_snapshot(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    page_format: PageFormat,
    executor: ThreadPoolExecutor | None = None,
) -> int:
    """Write a snapshot whose pages have this format, but for the 16-bit ones of the first and the newest tokens.

    Args:
        target: may be the source itself: it is replaced at the end, and at once.

    Returns:
        The bytes of the file.

    Raises:
        InputError: pages of fewer bits than that, which no format gives back, or made by other rules; a format of 16
            bits.
        DamagedRunError, SnapshotError, ContainerError: the source is damaged, or no snapshot.
        OSError: a file cannot be read or written.
    """
    if not page_format.is_quantized:
        raise InputError(f"{page_format.name} is no format of fewer bits: pages of a snapshot do not gain bits")
    with SnapshotFile(source) as file:
        formats = _new_formats(file, page_format)
        header = replace(file.header, formats=((page_format.name, page_format.name),) * file.header.layers, budget=None)
        arrays: dict[str, npt.NDArray[Any]] = {
            name: found
            for name in array_rules(header)
            if name not in _OF_BUDGETS and (found := file.array(name)) is not None
        }
        arrays["page_formats"] = formats
        runs = (_converted(file, header, formats, run, executor) for run in range(header.runs))
        return write_snapshot(target, header, arrays, runs)


def _new_formats(file: SnapshotFile, page_format: PageFormat) -> PageFormats:
    """u8 [layers, 2, pages]

    Raises:
        InputError: a page has fewer bits; pages were made by other rules.
    """
    header, old = file.header, file.page_formats
    if header.page_rules != PAGE_RULES:
        raise InputError(
            f"{file.container.path} has pages made by rules {header.page_rules}; this kvpack makes them by {PAGE_RULES}"
        )
    window = Window(header.recent_tokens, header.sinks)
    index = header.first_page + np.arange(header.pages)
    end = int(window.open_ends(np.array([header.first_page * PAGE_TOKENS + header.tokens], np.int32))[0])
    is_open = (index >= window.sink_pages) & (index < end)
    new = old.copy()
    for side in Side:
        wanted = header.page_layout(side, page_format).block_bytes
        for number in np.unique(old[:, side]).tolist():
            found = PageFormat(number)
            here = old[:, side] == found
            if not found.is_quantized:
                new[:, side][here & is_open] = page_format
            elif found != page_format:
                if (layout := header.page_layout(side, found)).block_bytes < wanted:
                    raise InputError(
                        f"{file.container.path} has {side.name} pages of {layout.format.name}, which have fewer bits "
                        f"than {page_format.name}: those that are gone do not come back"
                    )
                new[:, side][here] = page_format
    return new


def _converted(
    file: SnapshotFile, header: SnapshotHeader, formats: PageFormats, run: int, executor: ThreadPoolExecutor | None
) -> Iterator[tuple[str, bytes]]:
    """The blobs of a run of the new file."""
    made: dict[tuple[int, int, int], Blocks] = {}
    for pages, blocks in decode_run(file, run, executor):
        wanted = formats[pages.layers, pages.side, pages.indices]
        for number in np.unique(wanted).tolist():
            chosen = np.flatnonzero(wanted == number)
            layout = header.page_layout(pages.side, PageFormat(number))
            given = blocks[chosen]
            if number != pages.format:
                work = partial(_requantized, source=pages.layout, target=layout)
                given = np.stack(list(map_ordered(work, given, executor)))
            for place, block in zip(chosen.tolist(), given, strict=True):
                made[int(pages.layers[place]), pages.side, int(pages.indices[place])] = block

    def blocks_of(pages: RunPages) -> Blocks:
        places = zip(pages.layers.tolist(), pages.indices.tolist(), strict=True)
        return np.stack([made[layer, pages.side, index] for layer, index in places])

    yield from encode_run(run_pages(header, formats, run), blocks_of, executor)


def _requantized(block: Blocks, source: PageLayout, target: PageLayout) -> Blocks:
    return quantize_blocks(dequantize_blocks(block, source), target)
