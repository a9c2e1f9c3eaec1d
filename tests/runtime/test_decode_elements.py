"""Blobs that lie on a device → elements: those of the CPU's decoder, for each layout, mode and shape."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import blob_surgery as surgery
import emulator
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from emulated_device import emulated_launch  # noqa: E402

from kvpack.encode.blob_decoder import decode_elements  # noqa: E402
from kvpack.encode.blob_encoder import encode_elements  # noqa: E402
from kvpack.encode.snapshot_coder import _LAYOUTS  # noqa: E402
from kvpack.errors import LaneError, PaddingError, TileBoundsError, TileModeError  # noqa: E402
from kvpack.format.blob import GROUP_OFFSETS_BYTES, Blob  # noqa: E402
from kvpack.format.layout import GROUP_LANES, ElementKind, Layout, Predictor, TileMode, float_layouts, integer_layouts  # noqa: E402
from kvpack.runtime.codec import encoder  # noqa: E402
from kvpack.runtime.codec.decoder import SLACK_BYTES, Decoded, PlacedBlob, decode_blobs  # noqa: E402
from kvpack.runtime.device import kernels  # noqa: E402

UNSIGNED = [
    integer_layouts(name, ElementKind.UNSIGNED, bits)[0] for name in ("fast", "compact") for bits in range(2, 9)
]
WIDE = [layout for kind in (ElementKind.FP16, ElementKind.BF16) for layout in float_layouts(kind)]
LAYOUTS = list(
    dict.fromkeys(
        [
            *(Layout(kind, bits, *codes) for (kind, bits), codes in _LAYOUTS.items()),
            Layout(ElementKind.FP16, 16, 8, 1),
            *UNSIGNED,
            *WIDE,
        ]
    )
)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def decode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[bytes]], Decoded]:
    """Decodes blobs that lie one behind the other."""
    if request.param == "cpu":
        if emulator.compiler() is None:
            pytest.skip("no C++ compiler for the emulator")
        monkeypatch.setattr(kernels, "launch", emulated_launch)

    def of(
        blobs: list[bytes],
        damage: Callable[[bytearray], None] = lambda _data: None,
        parse: Callable[[bytes], Blob] = Blob,
    ) -> Decoded:
        data, placed = bytearray(), []
        for blob in blobs:
            placed.append(PlacedBlob(parse(blob), len(data)))
            data += blob
        data += bytes(SLACK_BYTES)
        damage(data)
        return decode_blobs(placed, torch.from_numpy(np.frombuffer(data, np.uint8)).to(request.param))

    return of


def elements(shape: tuple[int, int, int], bits: int, seed: int) -> np.ndarray:
    """Matrices of different spreads, so that they have tables of their own; of three, one constant and one uniform."""
    rng = np.random.default_rng(seed)
    spread = (1 + 3 * rng.random((shape[0], 1, 1))) * (1 << bits) / 16
    x = np.clip(rng.normal((1 << bits) / 2, spread, shape), 0, (1 << bits) - 1)
    if shape[0] > 2:
        x[1] = 1
        x[2] = rng.integers(0, 1 << bits, shape[1:])
    return x.astype(np.uint8 if bits <= 8 else np.uint16)


def check(decoded: Decoded, expected: list[np.ndarray]) -> None:
    assert not decoded.damage.item()
    for found, wanted in zip(decoded.elements, expected, strict=True):
        np.testing.assert_array_equal(found.cpu().numpy().view(wanted.dtype).reshape(wanted.shape), wanted)


@pytest.mark.parametrize(
    "layout", LAYOUTS, ids=lambda layout: f"{layout.element_kind.name}-{layout.name}-{layout.element_bits}"
)
def test_elements(decode: Any, layout: Layout) -> None:
    shapes = [((4, 32, 1056), 1056), ((1, 7, 96), 96), ((2, 300, 70), 64), ((1, 1, 2048), 2048), ((1, 33, 161), 96)]
    expected = [elements(shape, layout.element_bits, i) for i, (shape, _) in enumerate(shapes)]
    blobs = [encode_elements(x, layout, tile_cols=cols) for x, (_, cols) in zip(expected, shapes, strict=True)]
    modes = {mode for blob in blobs for mode in Blob(blob).tiles["mode"].tolist()}
    assert modes >= {TileMode.RANS, TileMode.CONSTANT}
    if layout.element_kind.is_integer:
        predicted = np.cumsum(np.random.default_rng(9).integers(0, 2, (2, 40, 200)), axis=2) % (
            1 << layout.element_bits
        )
        expected.append(predicted.astype(np.uint8))
        blobs.append(encode_elements(expected[-1], layout, tile_cols=128, predictor=Predictor.PREVIOUS))
    check(decode(blobs), expected)


def test_many_tables(decode: Any) -> None:
    """Tiles of sixteen distributions: blocks have a table each, and their units in another order than the blob."""
    rng = np.random.default_rng(3)
    x = np.stack([np.clip(rng.normal(8, 0.3 + i % 16 / 4, (32, 1024)), 0, 15) for i in range(40)]).astype(np.uint8)
    blob = encode_elements(x, Layout(ElementKind.UNSIGNED, 4, 4, 2), tile_cols=1024)
    assert len(Blob(blob).tables) > 4
    check(decode([blob, blob]), [x, x])


@pytest.mark.parametrize("where", ["words", "states", "planes", "raw", "constant"])
def test_damage_is_counted(decode: Any, where: str) -> None:
    x = elements((3, 32, 256), 5, 1)
    blob = encode_elements(x, Layout(ElementKind.UNSIGNED, 5, 4, 2), tile_cols=256)
    parsed = Blob(blob)
    tile = {"raw": 2, "constant": 1}.get(where, 0)
    meta = parsed.tiles[tile]
    inside = {"words": int(meta["raw_offset"]) - 40, "states": 40, "planes": int(meta["raw_offset"]) + 100}.get(
        where, 5
    )
    at = parsed.header.payload_offset + int(meta["data_offset"]) + inside

    def damage(data: bytearray) -> None:
        data[at] ^= 1

    assert decode([blob], damage).damage.item()
    assert not decode([blob]).damage.item()


def test_lengths_of_lanes_that_are_wrong_and_have_a_right_crc(decode: Any) -> None:
    """They lead nowhere, and are seen."""
    x = elements((1, 32, 512), 4, 2)
    original = encode_elements(x, Layout(ElementKind.UNSIGNED, 4, 4, 2), tile_cols=512)
    parsed = Blob(original)
    begin = parsed.header.payload_offset + int(parsed.tiles["data_offset"][0])
    lengths = begin + GROUP_OFFSETS_BYTES + 4 * GROUP_LANES
    for change in ((0, 0xFF), (31, 0), (31, original[lengths + 31] + 1)):
        blob = bytearray(original)
        blob[lengths + change[0]] = change[1]
        wrong = Blob(original)
        wrong.tiles = wrong.tiles.copy()
        wrong.tiles["payload_crc32"] = zlib.crc32(blob[begin : begin + int(parsed.tiles["data_size"][0])])
        assert decode([bytes(blob)], parse=lambda _blob, found=wrong: found).damage.item()


@pytest.mark.parametrize(
    ("mode", "place", "error"),
    [
        (TileMode.RAW, "behind", PaddingError),
        (TileMode.RANS, "words", PaddingError),
        (TileMode.RAW, "end", PaddingError),
        (TileMode.RAW, "behind the end", PaddingError),
        (TileMode.CONSTANT, "second", PaddingError),
        (TileMode.CONSTANT, "first", TileModeError),
        (TileMode.RANS, "padding state", LaneError),
        (TileMode.RANS, "padding length", LaneError),
        (TileMode.RANS, "state", LaneError),
    ],
)
def test_what_no_kernel_reads_is_checked(decode: Any, mode: TileMode, place: str, error: type[Exception]) -> None:
    """The file is refused as the CPU's decoder does, its CRCs right or not."""
    x = elements((3, 31, 93), 3, 1)
    original = encode_elements(x, Layout(ElementKind.UNSIGNED, 3, 3, 2), tile_cols=96)
    parsed = Blob(original)
    assert parsed.tiles["mode"].tolist() == [TileMode.RANS, TileMode.CONSTANT, TileMode.RAW]
    tile = parsed.tiles[parsed.tiles["mode"].tolist().index(mode)]
    begin = parsed.header.payload_offset + int(tile["data_offset"])
    states, lengths = GROUP_OFFSETS_BYTES, GROUP_OFFSETS_BYTES + 4 * GROUP_LANES
    words = sum(original[begin + lengths : begin + lengths + GROUP_LANES])
    words_end = lengths + GROUP_LANES + 2 * words
    assert words_end % 16
    assert int(tile["data_size"]) % 16 or mode != TileMode.RAW
    inside = {
        "behind": int(tile["data_size"]),
        "words": words_end,
        "end": (x[0].size * 3 + 7) // 8 - 1,
        "behind the end": (x[0].size * 3 + 7) // 8,
        "first": 0,
        "second": 1,
        "padding state": states + 4 * 31,
        "padding length": lengths + 31,
        "state": states + 2,
    }[place]
    blob = bytearray(original)
    blob[begin + inside] = 0 if place == "state" else blob[begin + inside] | 0x80
    if place == "state":
        blob[begin + inside + 1] = 0
    surgery.mend_crcs(blob)
    with pytest.raises(error) as expected:
        decode_elements(Blob(bytes(blob)))
    with pytest.raises(error) as found:
        decode([bytes(blob)])
    assert str(expected.value).split(":")[0].split(",")[0] == str(found.value).split(":")[0]
    check(decode([original]), [x])


def test_a_payload_that_would_lead_out_of_the_blob_is_refused(decode: Any) -> None:
    x = elements((1, 32, 512), 4, 2)
    blob = bytearray(encode_elements(x, Layout(ElementKind.UNSIGNED, 4, 4, 2), tile_cols=512))
    parsed = Blob(bytes(blob))
    begin = parsed.header.payload_offset + int(parsed.tiles["data_offset"][0])
    blob[begin + 4 : begin + 32] = b"\xff\xff\0\0" * 7  # words of groups that the tile does not have
    with pytest.raises(TileBoundsError):
        decode([bytes(blob)])


@pytest.mark.gpu
def test_the_tables_of_crcs_are_there_for_every_stream() -> None:
    """They are made once, and used on streams that do not wait for the one on which they were first asked for."""
    encoder._crc_tables_on.cache_clear()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(1 << 30)
        tables = encoder._crc_tables_on(torch.device("cuda", torch.cuda.current_device()))
    with torch.cuda.stream(torch.cuda.Stream()):
        found = [table.cpu().numpy().view(np.uint32) for table in tables]
    for table, wanted in zip(found, encoder.crc_tables(), strict=True):
        np.testing.assert_array_equal(table, wanted.reshape(-1))
