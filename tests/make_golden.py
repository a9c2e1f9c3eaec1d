"""Write the golden files of format version 1: tests/data/v1/*.blob with manifest.json, *.safetensors with
containers.json, tests/data/v1-trellis (since revision 2.2) and tests/data/v1-snapshots. Run once for each revision of
the format that changes what files mean: the one of docs/FORMAT.md §12, before anything was published, is the last.

Golden files never change: a reader of any later release must decode them to the same numbers. This script
therefore refuses to touch a folder that has some. It is kept to show where they come from, and to be run by
whoever adds files for a new format version (in a new folder).

    python tests/make_golden.py [folder]
"""

from __future__ import annotations

import hashlib
import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import sample_blobs as samples  # noqa: E402
from blob_surgery import with_plain_tables  # noqa: E402
from snapshot_samples import SamplePages, make_header, mixed_formats, usual_formats  # noqa: E402

from kvpack.encode.blob_encoder import encode_elements  # noqa: E402
from kvpack.encode.page_coder import dequantize_blocks  # noqa: E402
from kvpack.format.blob import Blob  # noqa: E402
from kvpack.format.container import CRC_KEY, TENSORS_KEY, VERSION_KEY, ContainerWriter  # noqa: E402
from kvpack.format.layout import (  # noqa: E402
    ElementKind,
    Layout,
    Predictor,
    Quantizer,
    float_layouts,
    integer_layout,
    integer_layouts,
)
from kvpack.format.pages import PageFormat  # noqa: E402
from kvpack.format.snapshot import run_pages  # noqa: E402

FOLDER = TESTS / "data" / "v1"
SIGNED, UNSIGNED = ElementKind.SIGNED, ElementKind.UNSIGNED


def digest(array: np.ndarray) -> str:
    """SHA-256 of the array's bytes in C order, little-endian."""
    return hashlib.sha256(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()).hexdigest()


def golden_blobs() -> Iterator[tuple[str, bytes, np.ndarray]]:
    """(name, blob, what it must decode to [matrices, rows, cols]: int32 integers or bit patterns)."""
    for number, name in enumerate(samples.LAYOUT_NAMES):
        for kind in (SIGNED, UNSIGNED):
            for bits in (2, 3, 4, 5, 6, 7, 8):
                seed = 100 * number + 10 * kind + bits
                layout = integer_layout(name, kind, bits)
                # In the middle of what has code 2 of 4, so that the mode is rans also where c = 2; with one folded bit
                # nearer to zero, where few elements have code 1.
                shift = (1 << bits) // (16 if layout.code_bits == 1 else 8)
                elements = samples.gaussian_elements((1, 63, 93), bits, 0.55 * (1 << bits) / 8, seed)
                elements = np.minimum(elements + shift, (1 << bits) - 1).astype(np.uint8)
                blob = encode_elements(elements, layout)
                half = 1 << (bits - 1) if kind == SIGNED else 0
                yield f"{kind.name.lower()}{bits}-{name}", blob, elements.astype(np.int32) - half

    for kind in samples.FLOAT_KINDS:
        for layout in float_layouts(kind):
            patterns = samples.float_patterns(kind, (1, 64, 64), 1000 + kind)
            elements = samples.rotate_left(patterns, layout.element_bits)
            blob = encode_elements(elements, layout)
            suffix = f"-{layout.code_bits}" if len(float_layouts(kind)) > 1 else ""
            yield f"lossless-{kind.name.lower()}{suffix}", blob, patterns

    walk = 128 + np.cumsum(np.random.default_rng(2000).integers(-1, 2, (1, 63, 160)), axis=2)
    for name in samples.LAYOUT_NAMES:
        blob = encode_elements(
            walk.astype(np.uint8),
            integer_layout(name, UNSIGNED, 8),
            predictor=Predictor.PREVIOUS,
        )
        yield f"predicted-unsigned8-{name}", blob, walk.astype(np.int32)
    narrow = (walk // 4) % 32
    blob = encode_elements(narrow.astype(np.uint8), integer_layout("compact", SIGNED, 5), predictor=Predictor.PREVIOUS)
    for name, sigma in (("balanced", 1.5), ("fast", 2.5)):
        steps = np.rint(np.random.default_rng(2007).normal(0, sigma, (1, 32, 128))).astype(np.int64)
        walk = np.cumsum(steps, axis=2) % 32
        walks = encode_elements(walk.astype(np.uint8), integer_layout(name, SIGNED, 5), predictor=Predictor.PREVIOUS)
        yield f"predicted-signed5-{name}", walks, walk.astype(np.int32) - 16
    yield "predicted-signed5-compact", blob, narrow.astype(np.int32) - 16

    elements = samples.gaussian_elements((1, 40, 90), 4, 1.0, 2001)
    blob = encode_elements(elements, integer_layout("balanced", SIGNED, 4), transposed=True)
    yield "transposed", blob, elements.astype(np.int32) - 8

    elements = samples.mixed_elements()
    blob = encode_elements(elements, integer_layout("compact", UNSIGNED, 6), tile_cols=64)
    yield "tables-packed-3d", blob, elements.astype(np.int32)
    blob = samples.two_tables_blob()
    blob = with_plain_tables(blob, samples.frequencies(blob))
    yield "tables-plain", blob, samples.two_tables_elements()[None].astype(np.int32)

    elements = samples.gaussian_elements((1, 33, 352), 4, 0.7, 2002)
    blob = encode_elements(elements, integer_layout("compact", SIGNED, 4), tile_cols=352)
    yield "lengths-u16", blob, elements.astype(np.int32) - 8

    # Folded codes of three bits, of seven, and of one with four a symbol, which no name has; the second `balanced`.
    for bits, code_bits, codes_per_symbol, folded in (
        (6, 3, 2, True),
        (8, 7, 1, True),
        (3, 1, 4, True),
        (8, 4, 2, False),
    ):
        elements = samples.gaussian_elements((1, 32, 93), bits, (1 << bits) / 12, 2010 + bits + code_bits)
        layout = Layout(SIGNED, bits, code_bits, codes_per_symbol, folded)
        name = f"signed{bits}-{code_bits}x{codes_per_symbol}{'-folded' * folded}"
        yield name, encode_elements(elements, layout), elements.astype(np.int32) - (1 << (bits - 1))

    # The longest tiles of each number of bits of δ, with the extremes of outliers in their last columns.
    compact = integer_layout("compact", SIGNED, 2)
    for tile_cols, most in ((512, 1 << 14), (544, 1 << 13), (1024, 1 << 13), (1056, 1 << 12)):
        last = tile_cols - 1
        outliers = [(0, 0, 0, -most), (0, 0, last, most - 1), (0, 5, last - 31, -most), (0, 5, tile_cols, 1)]
        elements = samples.gaussian_elements((1, 6, tile_cols + 5), 2, 0.4, 2022 + tile_cols)
        blob = samples.encode_with_outliers(elements, outliers, compact, tile_cols=tile_cols)
        yield f"outliers-{tile_cols}-columns", blob, samples.with_deltas(elements.astype(np.int32) - 2, outliers)
    outliers = [(0, 0, 511, 1), (0, 0, 512, -4096), (0, 3, 1024, 77), (0, 3, 2047, 4095), (0, 7, 2048, -9)]
    for name, bits, rows in (("compact", 2, 8), ("fast", 2, 32)):
        elements = samples.gaussian_elements((1, rows, 2080), bits, (1 << bits) / 8, 2020 + bits)
        blob = samples.encode_with_outliers(elements, outliers, integer_layout(name, SIGNED, bits), tile_cols=2048)
        integers = samples.with_deltas(elements.astype(np.int32) - (1 << (bits - 1)), outliers)
        yield f"longest-{name}", blob, integers

    uniform = np.random.default_rng(2003).integers(0, 8, (3, 5, 7)).astype(np.uint8)
    blob = encode_elements(uniform, integer_layout("compact", SIGNED, 3))
    yield "raw-3d", blob, uniform.astype(np.int32) - 4
    constant = np.full((2, 300, 600), 77, np.uint8)
    blob = encode_elements(constant, integer_layout("compact", SIGNED, 8), tile_cols=320)
    yield "constant-3d", blob, constant.astype(np.int32) - 128
    planes = 20 + np.random.default_rng(2004).integers(0, 4, (1, 32, 96)).astype(np.uint8)
    blob = encode_elements(planes, integer_layout("balanced", SIGNED, 6))
    yield "constant-with-planes", blob, planes.astype(np.int32) - 32
    yield (
        "one-element",
        encode_elements(np.array([[1]], np.uint8), integer_layout("fast", UNSIGNED, 2)),
        (np.array([[[1]]], np.int32)),
    )

    rng = np.random.default_rng(2005)
    for mode, bits, layout_name, base in (
        ("rans", 5, "balanced", samples.gaussian_elements((1, 270, 70), 5, 1.2, 2006)),
        ("raw", 3, "compact", rng.integers(0, 8, (1, 11, 33)).astype(np.uint8)),
        ("constant", 8, "compact", np.full((1, 40, 70), 3, np.uint8)),
    ):
        places = np.sort(rng.choice(base.size, 40, replace=False))
        deltas = rng.integers(1, 1 << 14, 40) * rng.choice((-1, 1), 40)
        deltas[:2] = -16384, 16383
        positions = zip(*(axis.tolist() for axis in np.unravel_index(places, base.shape)), strict=True)
        blob = samples.encode_with_outliers(
            base,
            [(*place, int(delta)) for place, delta in zip(positions, deltas, strict=True)],
            integer_layout(layout_name, SIGNED, bits),
            tile_cols=64,
        )
        integers = base.astype(np.int32) - (1 << (bits - 1))
        integers.ravel()[places] += deltas.astype(np.int32)
        yield f"outliers-{mode}", blob, integers


def golden_trellis_blobs() -> Iterator[tuple[str, bytes, np.ndarray]]:
    """As golden_blobs, of §4.1: each named layout; tiles of each mode, with outliers; borders of groups, of tiles."""
    trellis = Quantizer.TRELLIS
    seen = set()
    for name in samples.LAYOUT_NAMES:
        for bits in (2, 3, 4, 5, 6):
            for layout in integer_layouts(name, SIGNED, bits, trellis):
                if layout not in seen:
                    seen.add(layout)
                    elements = samples.gaussian_elements((1, 63, 93), bits, 0.6 * (1 << bits) / 8, 2200 + len(seen))
                    blob = encode_elements(elements, layout)
                    codes = f"{layout.code_bits}x{layout.codes_per_symbol}"
                    yield f"trellis{bits}-{codes}", blob, trellis_integers(elements, bits)

    layout = integer_layouts("balanced", SIGNED, 4, trellis)[0]
    elements = samples.gaussian_elements((2, 300, 70), 4, 1.2, 2231)
    yield "trellis-stack", encode_elements(elements, layout, tile_cols=32), trellis_integers(elements, 4)
    elements = samples.gaussian_elements((1, 40, 90), 4, 0.6, 2232)
    yield "trellis-transposed", encode_elements(elements, layout, transposed=True), trellis_integers(elements, 4)
    rng = np.random.default_rng(2233)
    for mode, base in (
        ("rans", samples.gaussian_elements((1, 70, 130), 4, 0.7, 2234)),
        ("raw", rng.integers(0, 16, (1, 43, 33)).astype(np.uint8)),
        ("constant", 6 + rng.integers(0, 4, (1, 64, 70)).astype(np.uint8)),  # of code 0
    ):
        outliers = [(0, 0, 0, -16384), (0, 31, 7, 1), (0, 32, 7, -1), (0, 39, 32, 16383)]
        blob = samples.encode_with_outliers(base, outliers, layout, tile_cols=96)
        yield f"trellis-outliers-{mode}", blob, samples.with_deltas(trellis_integers(base, 4), outliers)


def trellis_integers(elements: np.ndarray, bits: int) -> np.ndarray:
    """What §4.1 says elements [matrices, rows, cols] of ``bits`` bits stand for, by the sums of parities above."""
    k = elements.astype(np.int32) - (1 << (bits - 1))
    grids = np.zeros_like(k)
    for row in range(k.shape[1]):
        for above in range(row - 1, row // 32 * 32 - 1, -2):
            grids[:, row] ^= k[:, above] & 1
    return 4 * k + 2 * grids + 1


def golden_containers() -> Iterator[tuple[str, dict[str, tuple[str, np.ndarray]], dict[str, list[int]], dict]]:
    """(name, stored tensors, shapes of coded ones, what these must decode to): integers with all that §8 has."""
    rng = np.random.default_rng(2090)
    layout = integer_layout("balanced", SIGNED, 4)
    stored: dict[str, tuple[str, np.ndarray]] = {}
    shapes: dict[str, list[int]] = {}
    numbers: dict[str, np.ndarray] = {}
    for name, shape, transposed, offsets, columns in (
        ("columns", (1, 9, 70), False, False, True),
        ("offsets", (1, 9, 38), False, True, False),
        ("both", (1, 9, 70), True, True, True),
        ("stack", (2, 7, 36), False, True, True),
    ):
        matrices, rows, cols = shape
        elements = samples.gaussian_elements(shape, 4, 1.5, 2091 + len(name))
        places = [(0, 0, 0, -16384), (0, 3, cols - 1, 16383), (matrices - 1, rows - 1, 5, 77)]
        blob = samples.encode_with_outliers(elements, places, layout, tile_cols=64, transposed=transposed)
        scales = rng.uniform(0.001, 2, matrices * rows).astype(np.float32)
        q = samples.with_deltas(elements.astype(np.int32) - 8, places).astype(np.float32)
        stored[f"{name}_kvpack"] = "U8", np.frombuffer(blob, np.uint8)
        stored[f"{name}_kvpack_scale"] = "F32", scales
        w = scales.reshape(matrices, rows, 1) * q
        if offsets:
            added = rng.normal(0, 3, matrices * rows).astype(np.float32)
            added[:4] = 0, -0.0, 2.0**-126, -scales[3] * q[0, 3, 0]
            stored[f"{name}_kvpack_row_offset"] = "F32", added
            w = w + added.reshape(matrices, rows, 1)
        if columns:
            factors = rng.lognormal(0, 1, matrices * cols).astype(np.float16)
            factors[:3] = 2.0**-14, 65504, 1 / 3
            stored[f"{name}_kvpack_column_scale"] = "F16", factors
            w = w * factors.astype(np.float32).reshape(matrices, 1, cols)
        numbers[name] = (w.swapaxes(1, 2) if transposed else w).squeeze(0) if matrices == 1 else w
        shapes[name] = list(numbers[name].shape)
    yield "numbers-beside", stored, shapes, numbers


def write_containers(folder: Path) -> None:
    manifest = {}
    for name, stored, shapes, numbers in golden_containers():
        with ContainerWriter(folder / f"{name}.safetensors") as writer:
            for key, (dtype, array) in sorted(stored.items(), key=lambda item: item[1][0], reverse=True):
                writer.add(key, dtype, array.shape, [array.tobytes()])
            crcs = {key: zlib.crc32(array.tobytes()) for key, (dtype, array) in stored.items() if dtype != "U8"}
            entries = {tensor: {"shape": shape, "dtype": "F32"} for tensor, shape in shapes.items()}
            keys = {VERSION_KEY: "1", TENSORS_KEY: json.dumps(entries), CRC_KEY: json.dumps(crcs)}
            writer.finish(keys)
        manifest[name] = {
            "file_sha256": hashlib.sha256((folder / f"{name}.safetensors").read_bytes()).hexdigest(),
            "decoded_sha256": {tensor: digest(values) for tensor, values in numbers.items()},
            "shape": shapes,
        }
    (folder / "containers.json").write_text(json.dumps(manifest, indent=1) + "\n")


def golden_snapshots() -> Iterator[tuple[str, SamplePages, dict[str, np.ndarray]]]:
    """(name, pages, arrays beside the tokens and the formats of pages): small ones, which have all of §9.6 together."""
    rng = np.random.default_rng(2100)

    header = make_header(64 * 6 + 5, 1, 1, 48, run_pages=4)
    yield "int4", SamplePages(header, usual_formats(header, PageFormat.INT4)), {}

    header = make_header(
        64 * 5, 2, 1, 16, run_pages=3, first_page=7, parent="5" * 64, chain="6" * 64, budget=0.25, fingerprint=None
    )
    arrays = {
        "positions": np.arange(448, 768, dtype=np.int32)[::-1],
        "page_hashes": rng.integers(0, 256, (5, 32), np.uint8),
        "importance": rng.random((2, 2, 5)).astype(np.float32),
        "errors": rng.random((2, 2, 5)),
        "shares": rng.random(2),
    }
    yield "budget", SamplePages(header, mixed_formats(header, 1)), arrays

    header = make_header(64 * 6, 2, 1, 32, dtype="BF16", key_order=(1, 0), run_pages=32)
    yield "mixed-bf16", SamplePages(header, mixed_formats(header, 2)), {}

    header = make_header(64 * 3, 1, 1, 64, formats=(("INT3", "INT2"),), sinks=0)
    formats = np.empty((1, 2, 3), np.uint8)
    formats[0] = [
        [PageFormat.INT3, PageFormat.INT2, PageFormat.FP16],
        [PageFormat.INT2, PageFormat.INT3, PageFormat.FP16],
    ]
    yield "int3-int2", SamplePages(header, formats), {}

    header = make_header(1, 1, 1, 16, dtype="BF16")
    yield "one-token", SamplePages(header, usual_formats(header, PageFormat.INT8)), {}


def page_digests(pages: SamplePages) -> dict[str, str]:
    """SHA-256 of the numbers of each side's and format's pages, fp32 [pages, heads, 64, head_dim] in order of layer,
    then index. They are finite: NaN has other bits elsewhere."""
    every = replace(pages.header, run_pages=1024)
    found = {}
    for group in run_pages(every, pages.page_formats, 0):
        numbers = dequantize_blocks(pages.blocks(group), group.layout)
        found[f"{group.side.name} {group.format.name}"] = digest(numbers)
    return found


def write_snapshots(folder: Path) -> None:
    """Into a folder of their own."""
    folder.mkdir()
    manifest = {}
    for name, pages, arrays in golden_snapshots():
        path = folder / f"{name}.safetensors"
        pages.write(path, **arrays)
        manifest[name] = {
            "file_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "decoded_sha256": page_digests(pages),
            "arrays_sha256": {key: digest(array) for key, array in arrays.items()},
        }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def main(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty: golden files are never written again")
    folder.mkdir(parents=True, exist_ok=True)
    write_blobs(folder, golden_blobs())
    write_containers(folder)
    write_trellis(folder.with_name(f"{folder.name}-trellis"))
    write_snapshots(folder.with_name(f"{folder.name}-snapshots"))


def write_trellis(folder: Path) -> None:
    """Into a folder of their own."""
    folder.mkdir()
    write_blobs(folder, golden_trellis_blobs())


def write_blobs(folder: Path, blobs: Iterator[tuple[str, bytes, np.ndarray]]) -> None:
    manifest = {}
    total = 0
    for name, blob, values in blobs:
        Blob(blob)
        if name in manifest:
            raise SystemExit(f"two files named {name}")
        (folder / f"{name}.blob").write_bytes(blob)
        total += len(blob)
        manifest[name] = {
            "file_sha256": hashlib.sha256(blob).hexdigest(),
            "decoded_sha256": digest(values),
            "dtype": values.dtype.name,
            "shape": list(values.shape),
        }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    print(f"{len(manifest)} files, {total} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
