"""How many columns tiles get by default, and what lanes cost then."""

from __future__ import annotations

import numpy as np
import pytest
import sample_blobs as samples

from kvpack.encode.blob_encoder import encode_elements, even_tile_cols
from kvpack.encode.rate import fixed_bits_per_weight
from kvpack.encode.tensor_encoder import Matrices, encode_at_bits
from kvpack.format.blob import Blob
from kvpack.format.header import BlobHeader
from kvpack.format.layout import ElementKind, float_layouts, integer_layout

SIGNED = ElementKind.SIGNED


@pytest.mark.parametrize(
    ("rows", "cols", "compact", "balanced", "fast"),
    [
        (4096, 4096, 2048, 256, 256),  # 128 groups of rows: 2048 groups of lanes with 256 columns
        (6144, 4096, 2048, 256, 256),  # 3072 with 256 columns
        (12288, 4096, 2048, 512, 512),  # 3072 with 512
        (28672, 4096, 2048, 512, 512),
        (4096, 14336, 2048, 512, 512),
        (1024, 4096, 2048, 256, 256),  # 2²² elements
        (1024, 4000, 2016, 512, 256),
        (512, 1408, 1408, 480, 256),
        (768, 768, 768, 384, 256),
        (4096, 5504, 1856, 256, 256),
        (33, 40, 64, 64, 64),
        (1 << 20, 32, 32, 32, 32),
    ],
)
def test_columns_by_the_size_of_the_matrix(rows: int, cols: int, compact: int, balanced: int, fast: int) -> None:
    for name, expected in (("compact", compact), ("balanced", balanced), ("fast", fast)):
        assert even_tile_cols(rows, cols, integer_layout(name, SIGNED, 5)) == expected
    assert Matrices(np.zeros((33, 40), np.float32)).header(integer_layout("fast", SIGNED, 5), None).tile_cols == 64
    assert Matrices(np.zeros((33, 40), np.float32)).header(integer_layout("fast", SIGNED, 5), 32).tile_cols == 32


def test_floats_keep_512_columns_in_small_matrices() -> None:
    assert even_tile_cols(4096, 4096, float_layouts(ElementKind.BF16)[0]) == 512


def test_tiles_are_of_nearly_one_width_and_lose_no_groups_that_keep_a_gpu_busy() -> None:
    for name in ("balanced", "fast"):
        layout = integer_layout(name, SIGNED, 5)
        for rows in range(1000, 40000, 1700):
            for cols in range(96, 20000, 777):
                tile_cols = even_tile_cols(rows, cols, layout)
                parts = -(-cols // tile_cols)
                assert parts * tile_cols - cols < 32 * parts
                least = 512 if name == "balanced" and rows * cols < 1 << 22 else 256
                assert tile_cols <= least or (tile_cols <= 512 and -(-rows // 32) * parts >= 3072)


@pytest.mark.parametrize("cols", [4096, 4097, 5120, 8192, 11008, 14336])
def test_lanes_of_compact_cost_three_hundredths_of_a_bit(cols: int) -> None:
    layout = integer_layout("compact", SIGNED, 5)
    rows = 4096
    header = BlobHeader(layout=layout, rows=rows, cols=cols, tile_cols=even_tile_cols(rows, cols, layout))
    lanes = rows * header.num_tiles_col
    assert lanes * (32 + 8 * header.length_bytes - 8) / (rows * cols) <= 0.03
    assert fixed_bits_per_weight(header).rans <= 0.0325  # with metadata, tables and header


def test_a_blob_of_compact_is_as_large_as_its_entropy_and_its_lanes() -> None:
    elements = samples.gaussian_elements((512, 4096), 5, 3.9, 1)
    blob = Blob(encode_elements(elements, integer_layout("compact", SIGNED, 5)))
    assert blob.header.tile_cols == 2048
    share = np.bincount(elements.ravel(), minlength=32) / elements.size
    entropy = -float(share[share > 0] @ np.log2(share[share > 0]))
    assert 8 * blob.header.blob_bytes / elements.size - entropy <= 0.03


@pytest.mark.parametrize(("rows", "cols"), [(512, 1408), (300, 100), (290, 4097), (4, 70)])
@pytest.mark.parametrize("name", ["compact", "balanced", "fast"])
def test_the_overhead_that_is_planned_is_that_of_the_blob(name: str, rows: int, cols: int) -> None:
    """Padding is that of the last tile column and of the last 32 rows alone."""
    layout = integer_layout(name, SIGNED, 5)
    elements = samples.gaussian_elements((rows, cols), 5, 2.5, 2)
    tile_cols = even_tile_cols(rows, cols, layout)
    header = BlobHeader(layout=layout, rows=rows, cols=cols, tile_cols=tile_cols)
    padded = sum(header.tile_geometry(i).lanes * 32 * header.tile_geometry(i).chunks for i in range(header.num_tiles))
    planes = layout.raw_bits * (padded - elements.size) / elements.size
    overhead = fixed_bits_per_weight(header)
    assert overhead.edge == pytest.approx(rows % 256 / rows if rows % 32 else 0)
    lanes = rows * header.num_tiles_col * (24 + 8 * header.length_bytes)
    without = (lanes + header.num_tiles * 8 * 72 + 8 * (64 + 150 + 4)) / elements.size
    assert overhead.rans + overhead.idle_planes - without == pytest.approx(planes, abs=1e-9)


@pytest.mark.parametrize(
    ("rows", "cols", "bits", "name", "noise_db"),
    [
        # The last tile row has one row of 257, or 44 of 300, and goes raw where idle lanes' planes cost more.
        (257, 384, 6.0, "fast", -31.9),
        (257, 333, 5.0, "auto", -26.0),
        (257, 333, 6.0, "auto", -31.6),
        (300, 400, 7.0, "fast", -37.4),
        # Lanes without a row have raw planes, of which `balanced` has fewer in its other layout.
        (129, 1024, 6.0, "auto", -30.4),
        (100, 2048, 6.0, "auto", -30.2),
    ],
)
def test_rows_that_leave_lanes_idle(rows: int, cols: int, bits: float, name: str, noise_db: float) -> None:
    weights = (np.random.default_rng(rows).normal(0, 1, (rows, cols)) * 0.02).astype(np.float32)
    encoded = encode_at_bits(Matrices(weights), bits, layout_name=name)
    assert bits - 0.02 < 8 * encoded.size_bytes / weights.size <= bits
    assert encoded.noise_db is not None
    assert encoded.noise_db < noise_db
