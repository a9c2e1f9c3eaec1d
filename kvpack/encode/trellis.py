"""The trellis (docs/FORMAT.md §4.1): which of two grids an element's integer is on.

An element stands for k = u − 2^(n−1) and, in units of a quarter of the distance between neighbouring k, for the integer
4k + 2g + 1. Its grid g is the xor of the parities of k one, three, five, … rows above it in its column, as far as its
group of 32 rows goes.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from kvpack.encode.jit import kernel
from kvpack.encode.threads import map_ordered
from kvpack.format.layout import GROUP_LANES, TILE_ROWS


@kernel
def _put_integers(elements, offset):  # type: ignore[no-untyped-def]
    """4u + 2g + 1 − offset modulo 256, in place of u8 ``elements`` [R, K], whose first row is a group's first."""
    rows, cols = elements.shape
    one, two, offset = np.uint8(1), np.uint8(2), np.uint8(offset)
    grids = np.zeros((2, cols), np.uint8)  # of even and of odd rows: a row's parity turns the grid of the next
    for row in range(rows):
        if row % GROUP_LANES == 0:
            grids[:] = 0
        own, following, line = grids[row % 2], grids[1 - row % 2], elements[row]
        for col in range(cols):
            u, grid = line[col], own[col]
            line[col] = (u << two) + (grid << one) + one - offset
            following[col] ^= u & one


def put_integers(elements: npt.NDArray[np.uint8], element_bits: int, executor: ThreadPoolExecutor | None = None) -> Any:
    """The integers of elements, outliers aside, in their place: i8 [matrices, rows, cols], of u8 of that shape.

    Args:
        elements: whole matrices; they are overwritten.
    """

    def work(place: tuple[int, int]) -> None:
        matrix, first = place
        _put_integers(elements[matrix, first : first + TILE_ROWS], 1 << (element_bits + 1))

    strips = [(matrix, first) for matrix in range(len(elements)) for first in range(0, elements.shape[1], TILE_ROWS)]
    for _ in map_ordered(work, strips, executor):
        pass
    return elements.view(np.int8)


def unsigned_integers(elements: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The integers of a strip, outliers aside, plus 2^(n+1): u8 [R, K], of elements of that shape."""
    found = np.array(elements, order="C")
    _put_integers(found, 0)
    return found
