"""Many tiles in one CRC: the same answers as tile by tile."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvpack.errors import FormatError, PaddingError, PayloadCrcError
from kvpack.format import tile_crc
from kvpack.format.blob import TILE_METADATA, check_tile_bytes
from kvpack.format.tile_crc import check_tiles

Tiles = npt.NDArray[np.void]


def payload_of(sizes: list[int], seed: int = 0) -> tuple[bytearray, Tiles]:
    """Random bytes in tiles of these sizes."""
    rng = np.random.default_rng(seed)
    payload, tiles = bytearray(), np.zeros(len(sizes), TILE_METADATA)
    for tile, size in zip(tiles, sizes, strict=True):
        data = rng.bytes(size)
        tile["data_offset"], tile["data_size"], tile["payload_crc32"] = len(payload), size, zlib.crc32(data)
        payload += data + bytes(-size % 16)
    return payload, tiles


def answer(payload: bytes | bytearray, tiles: Tiles, first: int = 0) -> tuple[type[Exception], str] | None:
    """What is raised tile by tile."""
    try:
        for index, tile in enumerate(tiles, first):
            check_tile_bytes(memoryview(payload), tile, f"tile {index}")
    except FormatError as error:
        return type(error), str(error)
    return None


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which tiles were looked at alone."""
    seen: list[str] = []

    def noted(payload: memoryview, tile: Any, where: str) -> None:
        seen.append(where)
        check_tile_bytes(payload, tile, where)

    monkeypatch.setattr(tile_crc, "check_tile_bytes", noted)
    return seen


def test_intact_tiles_are_read_in_one_go(one_by_one: list[str]) -> None:
    """Every padding, distances in both digits, tiles of no bytes, all places of a run in a blob."""
    rng = np.random.default_rng(1)
    sizes = [4 * int(size) for size in rng.integers(0, 60_000, 60)]
    sizes[3] = sizes[-1] = 0
    sizes[5:9] = [64, 68, 72, 76]
    payload, tiles = payload_of(sizes)
    assert len(payload) > 5 << 20
    for begin, end in ((0, 60), (1, 60), (0, 31), (17, 40), (48, 60)):
        check_tiles(memoryview(payload), tiles[begin:end], begin)
    assert one_by_one == []


def test_damage_gives_the_same_error_as_tile_by_tile() -> None:
    rng = np.random.default_rng(2)
    payload, tiles = payload_of([4 * int(size) for size in rng.integers(1, 40, 40)])
    kinds = set()
    for at in range(len(payload)):
        broken = bytearray(payload)
        broken[at] ^= 1 << int(rng.integers(8))
        expected = answer(broken, tiles[2:], 2)
        if at < int(tiles["data_offset"][2]):
            assert expected is None
            check_tiles(memoryview(broken), tiles[2:], 2)
            continue
        assert expected is not None
        with pytest.raises(FormatError) as raised:
            check_tiles(memoryview(broken), tiles[2:], 2)
        assert (type(raised.value), str(raised.value)) == expected
        kinds.add(expected[0])
    assert kinds == {PayloadCrcError, PaddingError}


def test_tiles_that_change_places_are_damage() -> None:
    payload, tiles = payload_of([160] * 20)
    payload[160:320], payload[480:640] = payload[480:640], payload[160:320]
    with pytest.raises(PayloadCrcError, match=r"^tile 1: payload_crc32 is"):
        check_tiles(memoryview(payload), tiles, 0)


@pytest.mark.parametrize(
    ("field", "value"), [("data_offset", 0), ("data_offset", 2**64 - 16), ("data_size", 9), ("data_size", 2**32 - 4)]
)
def test_metadata_that_are_not_a_run(field: str, value: int) -> None:
    """They may come unchecked: what lies elsewhere is looked for there."""
    payload, tiles = payload_of([160] * 20)
    tiles[field][7] = value
    expected = answer(payload, tiles)
    assert expected is not None
    with pytest.raises(expected[0]) as raised:
        check_tiles(memoryview(payload), tiles, 0)
    assert str(raised.value) == expected[1]


def test_tiles_that_cannot_be_taken_together_are_checked_alone(
    one_by_one: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for sizes, largest in (([64] * 3, 1 << 20), ([64, 61] * 20, 1 << 20), ([64] * 20, 1024)):
        one_by_one.clear()
        monkeypatch.setattr(tile_crc, "_MAX_RUN_BYTES", largest)
        payload, tiles = payload_of(sizes)
        check_tiles(memoryview(payload), tiles, 5)
        assert one_by_one == [f"tile {5 + index}" for index in range(len(sizes))]
