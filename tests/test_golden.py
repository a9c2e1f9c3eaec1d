"""Golden files of format version 1 decode to what they were made from, with two decoders."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import independent_decoder
import make_golden
import ml_dtypes
import numpy as np
import pytest

import kvpack
from kvpack.encode.blob_decoder import decode_integers
from kvpack.encode.page_coder import dequantize_blocks
from kvpack.encode.snapshot_coder import decode_runs
from kvpack.format.blob import Blob
from kvpack.format.layout import (
    ElementKind,
    Layout,
    Predictor,
    Quantizer,
    TableEncoding,
    TileMode,
    integer_layout,
    integer_layouts,
    outlier_delta_max,
)
from kvpack.format.pages import PageFormat, Side
from kvpack.format.snapshot import RunPages, SnapshotFile, run_pages

FOLDER = Path(__file__).parent / "data" / "v1"
MANIFEST: dict[str, dict[str, Any]] = json.loads((FOLDER / "manifest.json").read_text())
CONTAINERS: dict[str, dict[str, Any]] = json.loads((FOLDER / "containers.json").read_text())
TRELLIS_FOLDER = FOLDER.with_name("v1-trellis")
TRELLIS: dict[str, dict[str, Any]] = json.loads((TRELLIS_FOLDER / "manifest.json").read_text())
SNAPSHOT_FOLDER = FOLDER.with_name("v1-snapshots")
SNAPSHOTS: dict[str, dict[str, Any]] = json.loads((SNAPSHOT_FOLDER / "manifest.json").read_text())


@cache
def read(name: str) -> bytes:
    return (FOLDER / f"{name}.blob").read_bytes()


def test_manifest_names_every_file() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.blob")) == sorted(MANIFEST)
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 330_000


@pytest.mark.parametrize("name", MANIFEST)
def test_golden_file(name: str) -> None:
    entry = MANIFEST[name]
    assert hashlib.sha256(read(name)).hexdigest() == entry["file_sha256"]
    blob = Blob(read(name))
    ours = decode_integers(blob)
    if blob.header.layout.element_kind.is_integer:
        ours = ours.astype(np.int32)
    theirs = independent_decoder.decode_blob(read(name))
    for decoded in (ours, theirs):
        assert list(decoded.shape) == entry["shape"]
        assert decoded.dtype.name == entry["dtype"]
        assert make_golden.digest(decoded) == entry["decoded_sha256"]


@pytest.mark.parametrize("name", CONTAINERS)
def test_golden_container(name: str) -> None:
    """Numbers with row offsets and column scales, by kvpack and by the independent decoder."""
    entry, path = CONTAINERS[name], FOLDER / f"{name}.safetensors"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["file_sha256"]
    theirs = independent_decoder.read_container(path)
    assert sorted(theirs) == sorted(entry["shape"])
    with kvpack.open(path) as reader:
        assert reader.keys() == sorted(entry["shape"])
        for tensor, shape in entry["shape"].items():
            for decoded in (reader.dequantize(tensor, "float32"), theirs[tensor]):
                assert list(decoded.shape) == shape
                assert decoded.dtype == np.float32
                assert make_golden.digest(decoded) == entry["decoded_sha256"][tensor]
            expected = theirs[tensor].astype(ml_dtypes.bfloat16).view(np.uint16)
            np.testing.assert_array_equal(reader.dequantize(tensor, "bfloat16").view(np.uint16), expected)
        infos = [reader.info(tensor) for tensor in ("columns", "offsets", "both", "stack")]
    assert [(i.has_column_scales, i.has_row_offsets) for i in infos if i] == [
        (True, False), (False, True), (True, True), (True, True),
    ]  # fmt: skip
    assert kvpack.verify(path).bytes_without_checksum == 0


def test_golden_files_cover_the_format() -> None:
    blobs = [Blob(read(name)) for name in MANIFEST]
    headers = [blob.header for blob in blobs]
    coded = {h.layout for h, blob in zip(headers, blobs, strict=True) if (blob.tiles["mode"] == TileMode.RANS).any()}
    for kind, bits, name in itertools.product(
        (ElementKind.SIGNED, ElementKind.UNSIGNED), range(2, 9), ("compact", "balanced", "fast")
    ):
        # Two unsigned bits are as well stored raw as coded one by one.
        if (kind, bits, name) != (ElementKind.UNSIGNED, 2, "compact"):
            assert integer_layout(name, kind, bits) in coded
    assert {(layout.code_bits, layout.codes_per_symbol) for layout in coded if layout.folded} == {
        (1, 4), (1, 8), (2, 4), (3, 2), (7, 1),
    }  # fmt: skip
    assert Layout(ElementKind.SIGNED, 8, 4, 2) in coded
    assert {blob.header.layout.folded for blob in blobs if blob.tiles["predictor"].any()} == {True, False}
    assert {layout.element_kind for layout in coded} == set(ElementKind)
    assert {layout.code_bits for layout in coded if layout.element_kind == ElementKind.FP16} == {5, 6, 7, 8}
    # Every combination of raw planes that a layout can have: 8s, 4, 2 and 1.
    assert {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 24} <= {h.layout.raw_bits for h in headers}

    tiles = np.concatenate([blob.tiles for blob in blobs])
    assert set(tiles["mode"].tolist()) == set(TileMode)
    assert set(tiles["predictor"].tolist()) == set(Predictor)
    for mode in TileMode:
        assert (tiles["outlier_count"][tiles["mode"] == mode] > 0).any()
    assert tiles["table_index"].max() >= 1
    assert {h.table_encoding for h in headers if h.num_tables > 1} == set(TableEncoding)
    assert {h.length_bytes for h in headers if h.num_tables} == {1, 2}
    longest = [blob for blob in blobs if blob.header.tile_cols == 2048]
    assert {blob.header.length_bytes for blob in longest} == {1, 2}
    outliers = [blob.tile(0).outliers for blob in longest]
    assert {cols.max() for cols in (found.cols for found in outliers)} == {2047}
    assert all({-4096, 4095} <= set(found.deltas.tolist()) for found in outliers)
    for tile_cols in (512, 544, 1024, 1056):
        found = next(blob for blob in blobs if blob.header.tile_cols == tile_cols).tile(0).outliers
        most = outlier_delta_max(tile_cols)
        assert ((found.deltas == most) & (found.cols == tile_cols - 1)).any()
        assert -most - 1 in found.deltas
    assert {h.transposed for h in headers} == {True, False}
    assert max(h.matrices for h in headers) > 1
    assert any(h.num_tiles_row > 1 and h.num_tiles_col > 1 and h.matrices > 1 for h in headers)


@pytest.mark.parametrize("name", TRELLIS)
def test_golden_trellis(name: str) -> None:
    entry, data = TRELLIS[name], (TRELLIS_FOLDER / f"{name}.blob").read_bytes()
    assert hashlib.sha256(data).hexdigest() == entry["file_sha256"]
    for decoded in (decode_integers(Blob(data)).astype(np.int32), independent_decoder.decode_blob(data)):
        assert list(decoded.shape) == entry["shape"]
        assert make_golden.digest(decoded) == entry["decoded_sha256"]


def test_golden_trellis_files_cover_what_there_is() -> None:
    files = sorted(TRELLIS_FOLDER.glob("*.blob"))
    assert [path.stem for path in files] == sorted(TRELLIS)
    assert sum(path.stat().st_size for path in files) < 90_000
    blobs = [Blob(path.read_bytes()) for path in files]
    assert {blob.header.layout.quantizer for blob in blobs} == {Quantizer.TRELLIS}
    coded = {b.header.layout for b in blobs if (b.tiles["mode"] == TileMode.RANS).any()}
    for bits, name in itertools.product(range(2, 7), ("compact", "balanced", "fast")):
        assert {*integer_layouts(name, ElementKind.SIGNED, bits, Quantizer.TRELLIS)} <= coded
    with_outliers = [b.tiles[b.tiles["outlier_count"] > 0] for b in blobs]
    assert set(np.concatenate([tiles["mode"] for tiles in with_outliers]).tolist()) == set(TileMode)
    headers = [blob.header for blob in blobs]
    assert any(h.num_tiles_row > 1 and h.num_tiles_col > 1 and h.matrices > 1 for h in headers)
    assert {h.transposed for h in headers} == {True, False}


def test_the_script_refuses_to_overwrite(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(SystemExit, match="never written again"):
        make_golden.main(tmp_path)
    assert (tmp_path / "manifest.json").read_text() == "{}"


def test_the_script_still_makes_them(tmp_path: Path) -> None:
    """The same names and shapes, each blob holding what its manifest says; the bytes may become others."""
    make_golden.main(tmp_path / "v1")
    made = json.loads((tmp_path / "v1" / "manifest.json").read_text())
    snapshots = json.loads((tmp_path / "v1-snapshots" / "manifest.json").read_text())
    for name, entry in SNAPSHOTS.items():
        assert {k: v for k, v in snapshots[name].items() if k != "file_sha256"} == {
            k: v for k, v in entry.items() if k != "file_sha256"
        }
    containers = json.loads((tmp_path / "v1" / "containers.json").read_text())
    assert {n: e["decoded_sha256"] for n, e in containers.items()} == {
        n: e["decoded_sha256"] for n, e in CONTAINERS.items()
    }
    assert {n: e["shape"] for n, e in made.items()} == {n: e["shape"] for n, e in MANIFEST.items()}
    trellis = json.loads((tmp_path / "v1-trellis" / "manifest.json").read_text())
    assert {n: e["decoded_sha256"] for n, e in trellis.items()} == {n: e["decoded_sha256"] for n, e in TRELLIS.items()}
    for name, entry in made.items():
        decoded = independent_decoder.decode_blob((tmp_path / "v1" / f"{name}.blob").read_bytes())
        assert make_golden.digest(decoded) == entry["decoded_sha256"]


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_golden_snapshot(name: str) -> None:
    entry, path = SNAPSHOTS[name], SNAPSHOT_FOLDER / f"{name}.safetensors"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["file_sha256"]
    numbers: dict[str, list[np.ndarray]] = {}
    with SnapshotFile(path) as file:
        whole = replace(file.header, run_pages=1024)
        blocks = {(p.side, p.format): np.empty(p.block_shape, np.uint8) for p in run_pages(whole, file.page_formats, 0)}
        for _, decoded in decode_runs(file, range(file.header.runs)):
            for pages, found in decoded:
                every = next(p for p in run_pages(whole, file.page_formats, 0) if (p.side, p.format) == key(pages))
                for block, layer, index in zip(found, pages.layers, pages.indices, strict=True):
                    at = np.flatnonzero((every.layers == layer) & (every.indices == index))
                    blocks[key(pages)][at] = block
        ours = {
            f"{side.name} {page_format.name}": make_golden.digest(
                dequantize_blocks(found, file.header.page_layout(side, page_format))
            )
            for (side, page_format), found in blocks.items()
        }
        arrays = {name: make_golden.digest(file.array(name)) for name in entry["arrays_sha256"]}
    assert ours == entry["decoded_sha256"]
    assert arrays == entry["arrays_sha256"]

    fields, theirs, pages_of = independent_decoder.read_snapshot(path)
    for (side, layer, index), page in sorted(pages_of.items(), key=lambda item: (item[0][1], item[0][2])):
        number = theirs["page_formats"][layer, "KV".index(side), index]
        numbers.setdefault(f"{side} {PageFormat(number).name}", []).append(page.numbers)
    digests = {name: make_golden.digest(np.stack(pages)) for name, pages in numbers.items()}
    assert digests == entry["decoded_sha256"]
    assert {name: make_golden.digest(theirs[name]) for name in arrays} == arrays
    assert fields["kv_heads"] == whole.kv_heads


def key(pages: RunPages) -> tuple[Side, PageFormat]:
    return pages.side, pages.format


def test_golden_snapshots_cover_the_format() -> None:
    files = sorted(SNAPSHOT_FOLDER.glob("*.safetensors"))
    assert [path.stem for path in files] == sorted(SNAPSHOTS)
    assert sum(path.stat().st_size for path in files) < 200_000
    parts, runs, unlike = set(), set(), False
    headers = []
    for path in files:
        with SnapshotFile(path) as file:
            headers.append(file.header)
            for run in range(file.header.runs):
                for pages in file.pages_of_run(run):
                    unlike |= len(set(pages.layer_pages.tolist())) > 1
                    parts |= {(pages.side, pages.format, part.part) for part in pages.parts}
            runs.add(file.header.runs)
    assert {(side, page_format) for side, page_format, _ in parts} == set(itertools.product(Side, PageFormat))
    assert {part for _, _, part in parts} == {"codes", "wide", "thin", "scales", "centers"}
    assert unlike
    assert max(runs) > 1
    assert {bool(header.key_order) for header in headers} == {True, False}
    assert any(header.tokens % 64 for header in headers)
    assert any(header.first_page for header in headers)
