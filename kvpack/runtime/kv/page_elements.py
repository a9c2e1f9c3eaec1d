"""Pages on a GPU ⇄ the elements of a run's parts: what :mod:`kvpack.encode.page_runs` does on the CPU, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from kvpack.format.pages import PAGE_TOKENS, WARP_LANES, PageFormat, PageLayout
from kvpack.format.snapshot import PartName, RunPages
from kvpack.runtime.device import kernels
from kvpack.runtime.device.kernels import Kernel
from kvpack.runtime.device.upload import sent
from kvpack.runtime.kv.page_kernels import page_defines

_WARPS, _BLOCKS_PER_SM = 4, 8

Parts = Mapping[PartName, torch.Tensor]


def join_kernel(layout: PageLayout) -> Kernel:
    """Elements into pages."""
    return _kernel("page_join", layout)


def split_kernel(layout: PageLayout) -> Kernel:
    """Pages into elements."""
    return _kernel("page_split", layout)


def _kernel(operation: str, layout: PageLayout) -> Kernel:
    defines = page_defines(layout.head_dim, layout.key_order) | {
        "KVPACK_SIDE": int(layout.side),
        "KVPACK_FORMAT": int(layout.format),
        "KVPACK_CODE_BYTES": 2 if layout.format.element_bits == 16 else 1,
        "KVPACK_MAX_WARPS": _WARPS,
        "KVPACK_BLOCKS_PER_SM": _BLOCKS_PER_SM,
    }
    return Kernel.of(f"kv/{operation}.cu", operation, defines=defines)


def _places(pages: RunPages, kept: npt.NDArray[np.int64] | None) -> npt.NDArray[np.int32]:
    """i32 [pages, 4]: pages of earlier layers, pages of the layer, the page's index among these, tokens kept."""
    counts = pages.layer_pages
    before = np.repeat(np.cumsum(counts) - counts, counts)
    places = np.empty((len(pages), 4), np.int32)
    places[:, 0], places[:, 1] = before, np.repeat(counts, counts)
    places[:, 2] = np.arange(len(pages)) - before
    places[:, 3] = PAGE_TOKENS if kept is None else kept
    return places


def _launch(kernel: Kernel, pages: RunPages, arguments: tuple[torch.Tensor | None, ...], device: torch.device) -> None:
    heads = pages.header.kv_heads
    grid = len(pages) * heads
    kernels.launch(kernel, grid, _WARPS * WARP_LANES, (*arguments, np.uint32(heads)), device=device)


def _codes(parts: Parts) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return parts.get("codes", parts.get("wide")), parts.get("thin")


def join_pages(
    pages: RunPages,
    parts: Parts,
    entries: npt.NDArray[np.int64],
    device: torch.device,
    *,
    kept: npt.NDArray[np.int64] | None = None,
    pages_base: torch.Tensor | None = None,
) -> None:
    """Write whole pages from their elements.

    Args:
        parts: the elements of each part of ``pages.parts``: u8, or i16 (bit patterns); at least as many as it has,
            contiguous, from a multiple of 16 bytes on. Scales and centers as the format stores them: ordered integers,
            scales as differences.
        entries: i64 [pages], of pages of this format; 0 for pages that are left out.
        kept: i64 [pages], how many tokens of each page keep their codes; those of the others become 0. None: all.
        pages_base: as of :mod:`~kvpack.runtime.kv.page_kernels`.
    """
    first, second = _codes(parts)
    scales = parts.get("scales")
    if scales is not None:
        # Modulo 2^16, as all of this.
        scales = torch.cumsum(scales.to(torch.int32) - 0x8000, 0, dtype=torch.int32).to(torch.int16)
    arguments = (
        first, second, scales, parts.get("centers"), sent(_places(pages, kept), device), sent(entries, device),
        pages_base,
    )  # fmt: skip
    _launch(join_kernel(pages.layout), pages, arguments, device)


def split_pages(
    pages: RunPages,
    entries: npt.NDArray[np.int64],
    out: Parts,
    device: torch.device,
    *,
    pages_base: torch.Tensor | None = None,
) -> None:
    """Write the elements of pages to ``out``, whose tensors are as those of :func:`join_pages`.

    Args:
        entries: i64 [pages], each of a page of this format.
    """
    first, second = _codes(out)
    scales = out.get("scales")
    arguments = (
        pages_base, sent(entries, device), sent(_places(pages, None), device), first, second, scales,
        out.get("centers"),
    )  # fmt: skip
    _launch(split_kernel(pages.layout), pages, arguments, device)
    if scales is not None:
        (of_scales,) = (part for part in pages.parts if part.part == "scales")
        of_pages = scales[: of_scales.elements]
        before = torch.cat([of_pages.new_zeros(1), of_pages[:-1]])
        of_pages.copy_((of_pages.to(torch.int32) - before + 0x8000).to(torch.int16))


def code_dtype(page_format: PageFormat) -> torch.dtype:
    """Of the elements of codes."""
    return torch.int16 if page_format.element_bits == 16 else torch.uint8
