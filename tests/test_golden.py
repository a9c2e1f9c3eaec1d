"""Golden files of format version 1 decode to what they were made from, with two decoders."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import independent_decoder
import make_golden
import numpy as np
import pytest

from kvpack.encode.blob_decoder import decode_integers
from kvpack.format.blob import Blob
from kvpack.format.layout import ElementKind, Predictor, TableEncoding, TileMode

FOLDER = Path(__file__).parent / "data" / "v1"
MANIFEST: dict[str, dict[str, Any]] = json.loads((FOLDER / "manifest.json").read_text())


@cache
def read(name: str) -> bytes:
    return (FOLDER / f"{name}.blob").read_bytes()


def test_manifest_names_every_file() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.blob")) == sorted(MANIFEST)
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 300_000


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


def test_golden_files_cover_the_format() -> None:
    blobs = [Blob(read(name)) for name in MANIFEST]
    headers = [blob.header for blob in blobs]
    integer = {"compact", "balanced", "fast"}
    layouts = Counter((h.layout.element_kind, h.layout.element_bits, h.layout.name) for h in headers)
    for kind in (ElementKind.SIGNED, ElementKind.UNSIGNED):
        for bits in range(2, 9):
            # Layouts that coincide (2-bit balanced is fast) bear one name.
            assert {n for k, b, n in layouts if (k, b) == (kind, bits)} >= integer - (
                {"compact", "fast"} if bits <= 4 else set()
            )
    coded = {
        (h.layout.element_kind, h.layout.element_bits, h.layout.code_bits, h.layout.codes_per_symbol)
        for h, blob in zip(headers, blobs, strict=True)
        if (blob.tiles["mode"] == TileMode.RANS).any()
    }
    for kind in (ElementKind.SIGNED, ElementKind.UNSIGNED):
        for bits in range(4, 9):
            assert {(kind, bits, bits, 1), (kind, bits, 4, 2), (kind, bits, 2, 4)} <= coded
        assert {(kind, 2, 2, 4), (kind, 3, 3, 2), (kind, 3, 3, 1), (kind, 3, 2, 4)} <= coded
    assert {k for k, *_ in coded} == set(ElementKind)
    assert {c for k, _, c, _ in coded if k == ElementKind.FP16} == {5, 6, 7, 8}
    # Every combination of raw planes that a layout can have: 8s, 4, 2 and 1.
    assert {0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 24} <= {h.layout.raw_bits for h in headers}

    tiles = np.concatenate([blob.tiles for blob in blobs])
    assert set(tiles["mode"].tolist()) == set(TileMode)
    assert set(tiles["predictor"].tolist()) == set(Predictor)
    for mode in TileMode:
        assert (tiles["outlier_count"][tiles["mode"] == mode] > 0).any()
    assert tiles["table_index"].max() >= 1
    assert {h.table_encoding for h in headers if h.num_tables > 1} == set(TableEncoding)
    assert {h.length_bytes for h in headers if h.num_tables} == {1, 2}
    assert {h.transposed for h in headers} == {True, False}
    assert max(h.matrices for h in headers) > 1
    assert any(h.num_tiles_row > 1 and h.num_tiles_col > 1 and h.matrices > 1 for h in headers)


def test_the_script_refuses_to_overwrite(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(SystemExit, match="never written again"):
        make_golden.main(tmp_path)
    assert (tmp_path / "manifest.json").read_text() == "{}"


def test_the_script_still_makes_them(tmp_path: Path) -> None:
    """The same names and shapes, each blob holding what its manifest says; the bytes may become others."""
    make_golden.main(tmp_path / "v1")
    made = json.loads((tmp_path / "v1" / "manifest.json").read_text())
    assert {n: e["shape"] for n, e in made.items()} == {n: e["shape"] for n, e in MANIFEST.items()}
    for name, entry in made.items():
        decoded = independent_decoder.decode_blob((tmp_path / "v1" / f"{name}.blob").read_bytes())
        assert make_golden.digest(decoded) == entry["decoded_sha256"]
