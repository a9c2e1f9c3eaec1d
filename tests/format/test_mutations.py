"""Mutation fuzzing: whatever happens to a blob's bytes, only a FormatError may come out.

Half of the mutants keep their CRCs: any damage must be found. The others get right CRCs, so that the checks
behind them are reached; these mutants may also decode, to exactly as many elements as they claim.
"""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from functools import cache

import blob_surgery as surgery
import independent_decoder
import numpy as np
import pytest
import sample_blobs as samples

from kvpack.encode.blob_decoder import decode_integers
from kvpack.encode.blob_encoder import encode_elements
from kvpack.errors import FormatError, LimitError
from kvpack.format.blob import Blob
from kvpack.format.layout import ElementKind, Predictor, Quantizer, float_layouts, integer_layout, integer_layouts

MAX_ELEMENTS = 1 << 14
MUTANTS_PER_BASE = 3000
EXTREMES = (0, 1, 2, 15, 16, 31, 32, 33, 255, 256, 511, 512, 4095, 4096, 65535, 65536)
EXTREMES += (2**31 - 1, 2**31, 2**32 - 16, 2**32 - 1, 2**63, 2**64 - 16, 2**64 - 1)


def small_bases() -> dict[str, bytes]:
    """Seventeen blobs of 112 to 22,000 bytes."""
    gaussian = samples.gaussian_elements
    signed, unsigned = ElementKind.SIGNED, ElementKind.UNSIGNED
    blobs = {}
    for name in samples.LAYOUT_NAMES:
        elements = gaussian((32, 224), 5, 2.0, 21) + np.uint8(4)
        blobs[name] = encode_elements(elements, integer_layout(name, signed, 5))
    walk = np.cumsum(np.random.default_rng(22).integers(-1, 2, (16, 200)), axis=1) + 128
    blobs["predicted"] = encode_elements(
        walk.astype(np.uint8),
        integer_layout("compact", unsigned, 8),
        predictor=Predictor.PREVIOUS,
    )
    blobs["outliers"] = samples.encode_with_outliers(
        gaussian((1, 20, 200), 4, 0.8, 23),
        [(0, row, (row * 37) % 200, 1000 - 99 * row) for row in range(20)],
        integer_layout("balanced", signed, 4),
        tile_cols=224,
    )
    blobs["trellis"] = samples.encode_with_outliers(
        gaussian((1, 40, 200), 4, 0.8, 31),
        [(0, row, (row * 37) % 200, 1000 - 99 * row) for row in range(20)],
        integer_layouts("balanced", signed, 4, Quantizer.TRELLIS)[0],
        tile_cols=224,
    )
    three_d = gaussian((2, 20, 180), 6, 1.0, 24)
    three_d[0, :, 96:] = gaussian((20, 84), 6, 7.0, 25)
    three_d[1, :, :96] = 3
    three_d[1, :, 96:] = np.random.default_rng(26).integers(0, 64, (20, 84))
    blobs["3-d mixed"] = encode_elements(three_d, integer_layout("balanced", unsigned, 6), tile_cols=96)
    blobs["tables"] = samples.two_tables_blob()
    blobs["plain"] = surgery.with_plain_tables(blobs["tables"], samples.frequencies(blobs["tables"]))
    blobs["wide"] = encode_elements(
        gaussian((9, 400), 3, 0.5, 27), integer_layout("compact", unsigned, 3), tile_cols=416
    )
    blobs["raw"] = samples.raw_blob()
    blobs["constant"] = encode_elements(
        8 + np.random.default_rng(28).integers(0, 4, (32, 320)).astype(np.uint8),
        integer_layout("fast", signed, 4),
        tile_cols=320,
    )
    blobs["constant of 64 symbols"] = samples.narrow_constant_blob()
    for kind in (ElementKind.BF16, ElementKind.FP8_E5M2):
        elements = samples.float_elements(kind, (32, 300), 29)
        blobs[kind.name] = encode_elements(elements, float_layouts(kind)[0])
    for kind in (ElementKind.FP16, ElementKind.FP32):
        elements = samples.float_elements(kind, (64, 96), 30)
        blobs[kind.name] = encode_elements(elements, float_layouts(kind)[0], transposed=True)
    return blobs


@cache
def bases() -> dict[str, bytes]:
    return small_bases()


NAMES = (
    *samples.LAYOUT_NAMES,
    "predicted",
    "outliers",
    "trellis",
    "3-d mixed",
    "tables",
    "plain",
    "wide",
    "raw",
    "constant",
    "constant of 64 symbols",
    "BF16",
    "FP8_E5M2",
    "FP16",
    "FP32",
)


def overwrite(rng: random.Random, blob: bytearray, field: tuple[int, str], at: int) -> None:
    """Put an extreme, a nearby or a random value into a field."""
    offset, code = field
    size = {"B": 1, "H": 2, "I": 4, "Q": 8}[code[1]]
    old = int.from_bytes(blob[at + offset : at + offset + size], "little")
    value = rng.choice(
        (
            rng.choice(EXTREMES),
            old + rng.choice((-16, -4, -1, 1, 4, 16)),
            old ^ 1 << rng.randrange(8 * size),
            rng.getrandbits(8 * size),
        )
    )
    blob[at + offset : at + offset + size] = (value % (1 << 8 * size)).to_bytes(size, "little")


def mutate(rng: random.Random, blob: bytearray) -> str:
    """Change something in place; returns what."""
    tables = 64
    metadata = surgery.metadata_offset(blob)
    payload = surgery.payload_offset(blob)
    tile = rng.randrange(surgery.num_tiles(blob))
    first = payload + surgery.tile_get(blob, tile, "data_offset")
    what = rng.choice(("flip", "flip", "payload", "tables", "truncate", "insert", "header", "header", "tile", "u32"))
    if what == "flip":
        for _ in range(rng.choice((1, 1, 2, 8))):
            blob[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)
    elif what == "payload":
        # The front of a tile holds its lane tables, the end its outliers.
        size = surgery.tile_get(blob, tile, "data_size")
        places = (rng.randrange(size), rng.randrange(min(size, 200)), size - 1 - rng.randrange(4))
        blob[first + max(0, rng.choice(places))] ^= rng.randrange(1, 256)
    elif what == "tables" and metadata > tables:
        blob[rng.randrange(tables, metadata)] ^= 1 << rng.randrange(8)
    elif what == "truncate":
        del blob[rng.choice((rng.randrange(len(blob)), len(blob) - rng.choice((1, 4, 16)))) :]
    elif what == "insert":
        at = rng.randrange(len(blob) + 1)
        blob[at:at] = rng.randbytes(rng.choice((1, 4, 16, 32)))
    elif what == "tile":
        field = rng.choice(list(surgery.TILE_FIELDS.values()))
        overwrite(rng, blob, field, metadata + 32 * tile)
    elif what == "u32":
        at = rng.randrange((len(blob) - payload) // 4)
        overwrite(rng, blob, (0, "<I"), payload + 4 * at)
    else:
        for _ in range(rng.choice((1, 1, 2))):
            overwrite(rng, blob, rng.choice(list(surgery.HEADER_FIELDS.values())), 0)
    return what


def decode(blob: bytes) -> str:
    """The name of the error, or ``decoded``. Anything but a FormatError goes through."""
    try:
        parsed = Blob(blob)
        integers = decode_integers(parsed, max_elements=MAX_ELEMENTS)
    except FormatError as error:
        return type(error).__name__
    header = parsed.header
    assert integers.shape == (header.matrices, header.rows, header.cols)
    return "decoded"


@cache
def fuzz(name: str) -> tuple[Counter[str], Counter[str]]:
    """What became of a base's mutants: with damaged CRCs, and with right ones."""
    base = bases()[name]
    rng = random.Random(f"kvpack {name}")
    damaged: Counter[str] = Counter()
    mended: Counter[str] = Counter()
    for number in range(MUTANTS_PER_BASE):
        blob = bytearray(base)
        mutate(rng, blob)
        if blob == base:
            continue
        if number % 3:
            surgery.mend_crcs(blob)
            mended[decode(bytes(blob))] += 1
        else:
            damaged[decode(bytes(blob))] += 1
    return damaged, mended


def test_bases_cover_what_they_should() -> None:
    blobs = {name: Blob(blob) for name, blob in bases().items()}
    assert tuple(blobs) == NAMES
    assert {int(mode) for blob in blobs.values() for mode in blob.tiles["mode"]} == {0, 1, 2}
    assert {int(mode) for mode in blobs["3-d mixed"].tiles["mode"]} == {0, 1, 2}
    assert blobs["predicted"].tiles["predictor"].tolist() == [1]
    assert blobs["outliers"].tiles["outlier_count"].tolist() == [20]
    assert blobs["tables"].header.num_tables == 2 == blobs["plain"].header.num_tables
    assert {int(blob.header.table_encoding) for blob in blobs.values()} == {0, 1}
    assert {blob.header.layout.element_kind for blob in blobs.values()} == set(ElementKind) - {ElementKind.FP8_E4M3}
    assert {blob.header.length_bytes for blob in blobs.values()} == {1, 2}
    for name, blob in blobs.items():
        assert decode(bytes(blob.buffer)) == "decoded", name


@pytest.mark.parametrize("name", NAMES)
def test_only_format_errors_escape(name: str) -> None:
    damaged, mended = fuzz(name)
    # The CRCs cover every byte but zero padding, and that is compared with zero.
    assert damaged["decoded"] == 0
    # Most of the mended ones break another rule, and some are other legal blobs.
    assert mended["decoded"] < mended.total() / 2
    assert mended["HeaderCrcError"] + mended["PayloadCrcError"] < mended.total() / 50


def test_enough_mutants_reach_the_deep_checks() -> None:
    seen: Counter[str] = Counter()
    total = 0
    for name in NAMES:
        damaged, mended = fuzz(name)
        total += damaged.total() + mended.total()
        seen += mended
    assert total >= 20_000
    floors = {
        "LaneStateError": 3000,
        "LaneError": 600,
        "OutlierError": 200,
        "TableError": 1000,
        "PaddingError": 1000,
        "TileModeError": 500,
        "TileBoundsError": 1000,
        "LimitError": 5,
        "LayoutError": 100,
        "GeometryError": 500,
        "ReservedError": 200,
        "VersionError": 50,
        "MagicError": 50,
        "TruncatedError": 500,
        "decoded": 500,
    }
    assert {name: seen[name] for name, floor in floors.items() if seen[name] < floor} == {}
    assert {"PayloadCrcError", "HeaderCrcError"} <= set(seen + fuzz("tables")[0])


def test_claims_cannot_make_a_reader_allocate() -> None:
    """Extreme header and tile fields with right CRCs: memory stays in proportion to what is there."""
    rng = random.Random("kvpack memory")
    largest = max(len(blob) for blob in bases().values())
    # Elements of at most 4 bytes, twice (elements, integers), tables of 16 KiB, the lists of a packed
    # table's bits, and small change.
    bound = 2 * 4 * MAX_ELEMENTS + 16 * largest + (1 << 19)
    tracemalloc.start()
    try:
        for _ in range(1500):
            base = bases()[rng.choice(NAMES)]
            blob = bytearray(base)
            for _ in range(rng.choice((1, 2, 3))):
                overwrite(rng, blob, rng.choice(list(surgery.HEADER_FIELDS.values())), 0)
            surgery.mend_crcs(blob)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            decode(bytes(blob))
            assert tracemalloc.get_traced_memory()[1] - before < bound
    finally:
        tracemalloc.stop()


def test_two_decoders_agree_on_mutants() -> None:
    """The package and the decoder written from FORMAT.md alone accept the same mutants, as the same numbers."""
    accepted = refused = 0
    for name in NAMES:
        base = bases()[name]
        rng = random.Random(f"kvpack twice {name}")
        for _ in range(500):
            blob = bytearray(base)
            mutate(rng, blob)
            surgery.mend_crcs(blob)
            ours: object
            theirs: object
            try:
                ours = decode_integers(Blob(blob), max_elements=MAX_ELEMENTS)
            except LimitError:
                continue
            except FormatError as error:
                ours = error
            try:
                theirs = independent_decoder.decode_blob(bytes(blob))
            except ValueError as error:
                if "padding_lanes" in str(error):  # readers need not look there (FORMAT.md §7.4), but may
                    continue
                theirs = error
            if isinstance(ours, FormatError) or isinstance(theirs, ValueError):
                assert isinstance(ours, FormatError), (name, str(theirs))
                assert isinstance(theirs, ValueError), (name, str(ours))
                refused += 1
            else:
                np.testing.assert_array_equal(ours, theirs)
                accepted += blob != base
    assert accepted > 800
    assert refused > 4000


def test_random_bytes() -> None:
    rng = random.Random("kvpack noise")
    for _ in range(300):
        noise = bytearray(rng.randbytes(rng.choice((0, 63, 64, 96, 500))))
        assert decode(bytes(noise)) in {"TruncatedError", "MagicError"}
    for base in bases().values():
        front = surgery.payload_offset(base)
        for _ in range(20):
            blob = bytearray(base[:front] + rng.randbytes(len(base) - front))
            surgery.mend_crcs(blob)
            assert decode(bytes(blob)) in {
                "LaneError",
                "PaddingError",
                "TileModeError",
                "TileBoundsError",
                "OutlierError",
                "decoded",  # one tile in mode raw without spare bits is legal whatever it holds
            }
