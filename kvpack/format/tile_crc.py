"""Many tiles of a blob against their CRCs at once.

A call of zlib for each tile gives the GIL up for microseconds, and to get it back takes up to milliseconds while other
threads run Python. So one call reads a whole run of tiles. What it must find follows from the tiles' own CRCs: with
zlib's CRC-32, crc(A, B) = crc(A) · x^(8 · len(B)) + crc(B), polynomials over GF(2) modulo the CRC's own.
"""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

from kvpack.format.blob import check_tile_bytes
from kvpack.format.layout import ALIGNMENT_BYTES, OUTLIER_BYTES

_POLYNOMIAL = 0xEDB88320  # bit 31 is the coefficient of x^0, here and in all that follows
_ONE = 1 << 31
_BITS = np.arange(31, -1, -1, dtype=np.uint32)
# Distances between tiles have two digits of so many bits, in units of 16 bytes.
_DIGIT_BITS = 10
_MAX_RUN_BYTES = ALIGNMENT_BYTES << 2 * _DIGIT_BITS
# Of fewer tiles, one call for each takes less time than the arithmetic.
_MANY_TILES = 12

Polynomials = npt.NDArray[np.uint32]


def _multiples(values: Polynomials) -> Polynomials:
    """values · x^i for i < 32: u32 [len(values), 32]."""
    multiples = np.empty((len(values), 32), np.uint32)
    for i in range(32):
        multiples[:, i] = values
        values = values >> np.uint32(1) ^ np.uint32(_POLYNOMIAL) * (values & np.uint32(1))
    return multiples


def _product(values: Polynomials, multiples: Polynomials) -> Polynomials:
    """values · those of which ``multiples`` are the multiples, one by one or all by the same."""
    product: Polynomials = np.bitwise_xor.reduce(multiples * (values[:, None] >> _BITS & 1), axis=1)
    return product


def _powers(step: Polynomials, count: int) -> tuple[Polynomials, Polynomials]:
    """step^i for i < ``count``, a power of 2, and step^count; ``step`` is u32 [1]."""
    powers = np.array([_ONE], np.uint32)
    while len(powers) < count:
        multiples = _multiples(step)
        powers = np.concatenate((powers, _product(powers, multiples)))
        step = _product(step, multiples)
    return powers, step


def _tables() -> tuple[Polynomials, Polynomials, Polynomials, Polynomials]:
    """Multiples of x^(8 · bytes) for a distance's low and high digit and for padding, and the CRC of padding."""
    padding_units = ALIGNMENT_BYTES // OUTLIER_BYTES
    _, unit = _powers(np.array([_ONE >> 8], np.uint32), OUTLIER_BYTES)
    padding, unit = _powers(unit, padding_units)
    low, unit = _powers(unit, 1 << _DIGIT_BITS)
    high, _ = _powers(unit, 1 << _DIGIT_BITS)
    crcs = [zlib.crc32(bytes(OUTLIER_BYTES * units)) for units in range(padding_units)]
    return _multiples(low), _multiples(high), _multiples(padding), np.array(crcs, np.uint32)


# Made when this is imported: threads that need them at the same time would each make them.
_LOW, _HIGH, _PADDING, _PADDING_CRCS = _tables()


def _is_intact(payload: memoryview, tiles: npt.NDArray[np.void]) -> bool:
    """Whether all tiles and the zeros behind them are what the tiles' CRCs say. Where it cannot be seen: False."""
    sizes = tiles["data_size"].astype(np.int64)
    ends = np.cumsum(-(-sizes // ALIGNMENT_BYTES))
    run_bytes = int(ends[-1]) * ALIGNMENT_BYTES
    begin = int(tiles["data_offset"][0])
    offsets = tiles["data_offset"] - np.uint64(begin)
    if (
        run_bytes >= _MAX_RUN_BYTES
        or (sizes % OUTLIER_BYTES).any()
        or offsets[0] != 0
        or (offsets[1:] != (ends[:-1] * ALIGNMENT_BYTES).astype(np.uint64)).any()
    ):
        return False
    padding = -sizes // OUTLIER_BYTES % len(_PADDING_CRCS)
    crcs = _product(tiles["payload_crc32"].astype(np.uint32), _PADDING[padding]) ^ _PADDING_CRCS[padding]
    distances = ends[-1] - ends
    crcs = _product(crcs, _LOW[distances & ((1 << _DIGIT_BITS) - 1)])
    crcs = _product(crcs, _HIGH[distances >> _DIGIT_BITS])
    return zlib.crc32(payload[begin : begin + run_bytes]) == int(np.bitwise_xor.reduce(crcs))


def check_tiles(payload: memoryview, tiles: npt.NDArray[np.void], first: int) -> None:
    """Tiles that follow one another against their CRCs, and the zeros behind each, as ``check_tile_bytes`` does.

    Damage to many tiles is seen in one CRC over all of them: every change of up to 32 adjacent bits, and of all others
    all but one in 2^32.

    Args:
        payload: of a blob whose front part is intact.
        tiles: some of :attr:`~kvpack.format.blob.Blob.tiles`.
        first: number of the first of them, for messages.

    Raises:
        PayloadCrcError, PaddingError: of the first damaged tile.
    """
    if len(tiles) >= _MANY_TILES and _is_intact(payload, tiles):
        return
    for index, tile in enumerate(tiles, first):
        check_tile_bytes(payload, tile, f"tile {index}")
