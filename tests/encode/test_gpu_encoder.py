"""The GPU's encoder gives the bytes of the CPU's: its kernels in the emulator, and on a device where there is one."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import emulator
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from sample_blobs import (
    SIGNED,
    UNSIGNED,
    encode_with_outliers,
    float_elements,
    gaussian_elements,
    mixed_elements,
)
from typer.testing import CliRunner

import kvpack
from kvpack.cli import ExitCode, app
from kvpack.encode.blob_encoder import encode_elements
from kvpack.encode.compress import compress
from kvpack.encode.frequencies import coded_bits, entropy_bits, normalise_frequencies
from kvpack.encode.quantize import NEAREST, Rounding
from kvpack.encode.tensor_encoder import Matrices, QuantizedStrips
from kvpack.errors import DeviceError
from kvpack.format.blob import Blob
from kvpack.format.layout import (
    ElementKind,
    Layout,
    Predictor,
    TableEncoding,
    TileMode,
    float_layouts,
    integer_layout,
)
from kvpack.format.tables import pack_tables

torch = pytest.importorskip("torch")

from emulated_device import emulated_launch  # noqa: E402

from kvpack.runtime.codec import encoder  # noqa: E402

needs_compiler = pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler")


def as_tensor(elements: np.ndarray, device: str = "cpu") -> Any:
    signed = {1: np.uint8, 2: np.int16, 4: np.int32}[elements.itemsize]
    return torch.from_numpy(np.array(elements).view(signed)).to(device)


def check(elements: np.ndarray, layout: Layout, device: str = "cpu", **options: Any) -> Blob:
    """Encode on the CPU and by the kernels, and compare; returns the blob."""
    launcher = {} if device == "cuda" else {"launcher": emulated_launch}
    scratch = {"scratch_bytes": options.pop("scratch_bytes")} if "scratch_bytes" in options else {}
    expected = encode_elements(elements, layout, **options)
    encoding = encoder.encode_on_device(as_tensor(elements, device), layout, **options, **scratch, **launcher)
    found = encoding.blob.cpu().numpy().tobytes()
    assert found[: len(encoding.front)] == encoding.front
    assert found == expected
    assert encoding.header == Blob(expected).header
    return Blob(expected)


def modes(blob: Blob) -> set[int]:
    return set(blob.tiles["mode"].tolist())


FOURS = Layout(SIGNED, 8, 4, 2)
FOUR_BITS = integer_layout("balanced", SIGNED, 4)
INTEGER_LAYOUTS = [
    integer_layout("balanced", SIGNED, 8),  # b = 4
    integer_layout("balanced", UNSIGNED, 7),  # b = 2 + 1
    integer_layout("balanced", SIGNED, 3),  # six-bit symbols, no raw bits
    integer_layout("fast", SIGNED, 8),  # b = 4 + 2
    integer_layout("fast", UNSIGNED, 7),  # b = 4 + 1
    integer_layout("fast", SIGNED, 4),
    integer_layout("compact", SIGNED, 8),
    Layout(SIGNED, 8, 5, 1),
    FOURS,
    Layout(SIGNED, 5, 1, 8, folded=True),
    Layout(SIGNED, 5, 2, 4, folded=True),  # b = 2 + 1
    Layout(SIGNED, 6, 3, 2, folded=True),
    Layout(SIGNED, 8, 1, 4, folded=True),  # b = 4 + 2 + 1
    Layout(SIGNED, 3, 2, 1, folded=True),
]
FLOAT_LAYOUTS = [layout for kind in ElementKind if not kind.is_integer for layout in float_layouts(kind)]


def layout_id(layout: Layout) -> str:
    folded = "-folded" if layout.folded else ""
    return f"{layout.element_kind.name}-{layout.element_bits}-{layout.code_bits}x{layout.codes_per_symbol}{folded}"


def elements_of(layout: Layout, shape: Sequence[int], seed: int = 0, sigma: float = 0.06) -> np.ndarray:
    """Elements that are worth coding in this layout; ``sigma`` is relative to the range of integers."""
    if layout.element_kind.is_integer:
        return gaussian_elements(shape, layout.element_bits, sigma * 2**layout.element_bits, seed)
    return float_elements(layout.element_kind, shape, seed)


@needs_compiler
@pytest.mark.parametrize("layout", INTEGER_LAYOUTS + FLOAT_LAYOUTS, ids=layout_id)
def test_layouts(layout: Layout) -> None:
    # Two matrices; a full tile and edges in both directions, with rows that are aligned for wide loads.
    sigma = 0.12 if layout.code_bits == 1 else 0.03  # a folded code of one bit is 0 within a quarter of the range
    blob = check(elements_of(layout, (2, 290, 112), sigma=sigma), layout, tile_cols=96)
    assert TileMode.RANS in modes(blob)


@needs_compiler
@pytest.mark.parametrize("cols", [1, 31, 33, 100])
@pytest.mark.parametrize("layout", [INTEGER_LAYOUTS[0], FLOAT_LAYOUTS[0]], ids=layout_id)
def test_rows_without_alignment(layout: Layout, cols: int) -> None:
    check(elements_of(layout, (257, cols), sigma=0.02), layout, tile_cols=64)


@needs_compiler
@pytest.mark.parametrize("cols", [340, 352, 512])
def test_both_widths_of_lengths(cols: int) -> None:
    """Lanes of the most words that there can be, on either side of the limit for u8 lengths."""
    rng = np.random.default_rng(1)
    elements = rng.integers(0, 256, (40, cols)).astype(np.uint8)
    elements[8:] = 3  # a table that gives nearly everything to one symbol: twelve bits for the others
    check(elements, integer_layout("compact", UNSIGNED, 8), tile_cols=-(-cols // 32) * 32)


@needs_compiler
def test_all_modes_and_slabs() -> None:
    elements = mixed_elements()
    layout = integer_layout("compact", UNSIGNED, 6)
    blob = check(elements, layout, tile_cols=64)
    assert modes(blob) == set(TileMode)
    assert blob.header.num_tables > 1
    for scratch_bytes in (0, 3 * 512 * 52):
        check(elements, layout, tile_cols=64, scratch_bytes=scratch_bytes)


@needs_compiler
@pytest.mark.parametrize("scratch_bytes", [1 << 30, 0])
def test_more_tables_than_the_device_began_with(scratch_bytes: int) -> None:
    """No tile is constant: the lanes are coded with one table while the host finds that several are better."""
    elements = np.concatenate(
        [gaussian_elements((520, 64), 6, sigma, int(10 * sigma)) for sigma in (0.5, 2.0, 6.0)], axis=1
    )
    blob = check(elements, integer_layout("compact", UNSIGNED, 6), tile_cols=64, scratch_bytes=scratch_bytes)
    assert TileMode.CONSTANT not in modes(blob)
    assert blob.header.num_tables > 1


@needs_compiler
@pytest.mark.parametrize(
    ("layout", "sigma"),
    [(layout, sigma) for layout in (FOURS, INTEGER_LAYOUTS[6], FLOAT_LAYOUTS[0]) for sigma in (0.004, 0.02, 0.1)]
    + [(INTEGER_LAYOUTS[0], sigma) for sigma in (0.05, 0.1, 0.2)],  # folded: 0 within an eighth of the range
)
def test_least_bits(layout: Layout, sigma: float) -> None:
    """Below what each tile takes with a table of its own, and above its entropy."""
    elements = elements_of(layout, (290, 352), sigma=sigma)
    header = Matrices(elements[None].astype(np.float32)).header(layout, 160)
    job = encoder._Job(as_tensor(elements[None]), header, Predictor.NONE, emulated_launch)
    summary = torch.zeros(2 * encoder._SUMMARY_SIZE, dtype=torch.int32)
    counts = job.launch_count(Predictor.NONE, summary).numpy().astype(np.int64)
    *total, least_units, constant = summary.numpy().view(np.int64).tolist()
    assert total == counts.sum(axis=0).tolist()
    assert constant == 0
    own = sum(coded_bits(tile, normalise_frequencies(tile)) for tile in counts)
    entropy = sum(tile.sum() * entropy_bits(tile) for tile in counts)
    assert entropy * (1 - 1e-3) < least_units / encoder._UNITS_PER_BIT <= own
    assert own < entropy * 1.02


def test_packed_tables() -> None:
    rng = np.random.default_rng(8)
    for alphabet_size in (4, 64, 256):
        for power in (0, 1, 4, 12):
            counts = np.zeros(256, np.int64)
            counts[:alphabet_size] = rng.integers(1, 8, alphabet_size) ** power
            table = normalise_frequencies(counts)
            encoding, section = pack_tables([table], alphabet_size)
            packed = encoder.pack_table(table, alphabet_size)
            bits = sum(2 * (frequency + 1).bit_length() - 1 for frequency in table[:alphabet_size].tolist())
            assert len(packed) == -(-bits // 8)
            if encoding == TableEncoding.PACKED:
                assert section[: len(packed)] == packed
                assert len(section) < len(packed) + 16


@needs_compiler
def test_more_tiles_than_one_block_places_at_once() -> None:
    elements = gaussian_elements((3, 300, 6000), 4, 1.0, 0)
    elements[1] = 3
    blob = check(elements, integer_layout("compact", SIGNED, 4), tile_cols=32)
    assert blob.header.num_tiles > encoder._PLACE_THREADS
    assert modes(blob) == set(TileMode)


@needs_compiler
@pytest.mark.parametrize("bits", [2, 3, 5, 7, 8])
def test_raw_tiles(bits: int) -> None:
    elements = np.random.default_rng(bits).integers(0, 1 << bits, (259, 37)).astype(np.uint8)
    assert modes(check(elements, integer_layout("compact", UNSIGNED, bits))) == {TileMode.RAW}


@needs_compiler
@pytest.mark.parametrize("cols", [96, 69])  # rows at multiples of 16 bytes, and others
@pytest.mark.parametrize("kind", [UNSIGNED, ElementKind.FP16, ElementKind.FP32], ids=lambda kind: kind.name)
def test_raw_tiles_of_whole_chunks(kind: ElementKind, cols: int) -> None:
    """Tiles of 64 columns, whose chunks are whole words, and of 32 or 5."""
    layout = integer_layout("compact", UNSIGNED, 5) if kind.is_integer else float_layouts(kind)[0]
    dtype = {5: np.uint8, 16: np.uint16, 32: np.uint32}[layout.element_bits]
    elements = np.random.default_rng(cols).integers(0, 1 << layout.element_bits, (259, cols)).astype(dtype)
    assert modes(check(elements, layout, tile_cols=64)) == {TileMode.RAW}


@needs_compiler
def test_constant_tiles_with_and_without_planes() -> None:
    rng = np.random.default_rng(0)
    noisy = (5 << 4 | rng.integers(0, 16, (300, 96))).astype(np.uint8)
    balanced, compact = integer_layout("balanced", SIGNED, 8), integer_layout("compact", SIGNED, 8)
    assert modes(check(noisy, FOURS, tile_cols=64)) == {TileMode.CONSTANT}
    around_zero = (128 + rng.integers(-32, 32, (320, 96))).astype(np.uint8)  # all folded codes are 0
    assert modes(check(around_zero, balanced, tile_cols=64)) == {TileMode.CONSTANT}
    assert modes(check(np.full((300, 96), 200, np.uint8), compact, tile_cols=64)) == {TileMode.CONSTANT}
    assert modes(check(np.full((3, 3), 200, np.uint8), compact)) == {TileMode.RAW}  # nine bytes are less than sixteen


@needs_compiler
@pytest.mark.parametrize("layout", [INTEGER_LAYOUTS[0], INTEGER_LAYOUTS[2], INTEGER_LAYOUTS[6]], ids=layout_id)
def test_predictor(layout: Layout) -> None:
    rng = np.random.default_rng(2)
    size = 1 << layout.element_bits
    walks = np.cumsum(rng.integers(-1, 2, (300, 224)), axis=1) + rng.integers(0, size, (300, 1))
    walks[:256, 64:128] = size // 2  # constant with a predictor as without
    walks[256:, :64] = np.arange(64) * (size // 2)  # constant differences of unlike elements
    elements = (walks % size).astype(np.uint8)
    blob = check(elements, layout, tile_cols=64, predictor=Predictor.PREVIOUS)
    assert modes(blob) == set(TileMode)
    assert Predictor.PREVIOUS in blob.tiles["predictor"]
    check(elements[:, :217], layout, tile_cols=96, predictor=Predictor.PREVIOUS)


def test_float_kinds_have_no_predictor() -> None:
    elements = as_tensor(elements_of(FLOAT_LAYOUTS[0], (2, 2)))
    with pytest.raises(ValueError, match="no predictor"):
        encoder.encode_on_device(elements, FLOAT_LAYOUTS[0], predictor=Predictor.PREVIOUS)


@pytest.mark.parametrize(
    ("elements", "layout"),
    [
        (torch.zeros((0, 4), dtype=torch.uint8), INTEGER_LAYOUTS[0]),
        (torch.zeros(4, dtype=torch.uint8), INTEGER_LAYOUTS[0]),
        (torch.zeros((4, 4), dtype=torch.int16), INTEGER_LAYOUTS[0]),
        (torch.zeros((4, 4), dtype=torch.bfloat16), FLOAT_LAYOUTS[0]),
    ],
)
def test_wrong_elements(elements: Any, layout: Layout) -> None:
    with pytest.raises(ValueError, match="elements"):
        encoder.encode_on_device(elements, layout)


@needs_compiler
def test_outliers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through strips, as the pipeline hands them over; in tiles of every mode."""
    elements = mixed_elements()
    rng = np.random.default_rng(3)
    places = sorted(set(map(tuple, rng.integers((0, 0, 0), elements.shape, (300, 3)).tolist())))
    deltas = rng.integers(1, 1 << 14, len(places)) * rng.choice((-1, 1), len(places))
    outliers = [(*place, delta) for place, delta in zip(places, deltas.tolist(), strict=True)]
    layout = integer_layout("compact", SIGNED, 6)
    expected = encode_with_outliers(elements, outliers, layout, tile_cols=64, transposed=True)
    coder = encoder.device_coder("cpu", emulated_launch)
    monkeypatch.setattr("sample_blobs.encode_strips", coder.encode_strips)
    assert encode_with_outliers(elements, outliers, layout, tile_cols=64, transposed=True) == expected
    assert modes(Blob(expected)) == set(TileMode)


@needs_compiler
@pytest.mark.parametrize(
    "options",
    [
        {"preset": "lossless"},
        {"preset": "near-lossless"},
        {"bits": 4.25},
        {"bits": 4.25, "embeddings": "code"},
        {"bits": 3.5, "embeddings": "code", "quantizer": "trellis"},
    ],
)
def test_whole_files(tmp_path: Path, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(4)
    tensors = {
        "a.weight": rng.normal(0, 0.02, (300, 160)).astype(np.float32),
        "b.weight": rng.standard_t(3, (2, 70, 96)).astype(np.float16),
        "embed_tokens.weight": rng.normal(0, 0.1, (500, 64)).astype(ml_dtypes.bfloat16),
        "c_fc.weight": rng.normal(0, 1, (64, 290)).astype(np.float16),
        "c_fc.bias": np.zeros(290, np.float16),
        "zeros.weight": np.zeros((64, 128), np.float32),
        "gate_proj.weight": rng.normal(0, 1, (64, 96)).astype(np.float32),
        "up_proj.weight": rng.standard_t(4, (96, 96)).astype(np.float32),
        "i8.weight": np.clip(rng.normal(0, 20, (128, 64)), -128, 127).astype(np.int8),
    }
    save_file(tensors, tmp_path / "in.safetensors")
    coder = encoder.device_coder("cpu", emulated_launch)
    config = kvpack.QuantConfig(tile_cols=64, stack=True, tensor_parallel=2, **options)
    given = {"config": config, "token_counts": rng.integers(0, 999, 500)}
    there = compress(tmp_path / "in.safetensors", tmp_path / "there.safetensors", coder=coder, **given)
    here = compress(tmp_path / "in.safetensors", tmp_path / "here.safetensors", **given)
    assert (tmp_path / "there.safetensors").read_bytes() == (tmp_path / "here.safetensors").read_bytes()
    assert there.tensors == here.tensors
    assert any(tensor.method != "keep" for tensor in here.tensors)


@needs_compiler
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("by_row", [False, True])
def test_quantized_strips(dtype: Any, by_row: bool) -> None:
    """Elements, outliers and sums, with denormal weights, ties, both sides of the clamp, and rows of step 0."""
    rng = np.random.default_rng(6)
    values = rng.standard_t(2, (2, 300, 70)).astype(np.float32)
    values[0, :3] = np.arange(70) / 2 - 17.5  # multiples of half a step
    values[1, 5, :4] = 1e-40, -1e-40, -0.0, 600
    weights = Matrices(np.clip(values, -600, 600).astype(dtype))
    steps = np.full(600 if by_row else 1, 0.25, np.float32)
    if by_row:
        steps[::7] = 0
        steps[1::7] = 0.37
    rounding = Rounding(rng.uniform(0.3, 0.95, 129).astype(np.float32), np.float32(1.9))
    coder = encoder.device_coder("cpu", emulated_launch)
    header = weights.header(integer_layout("balanced", SIGNED, 5), 64)
    for options in ((steps, header.layout, rounding), (steps, header.layout, NEAREST)):
        here, there = QuantizedStrips(weights, *options), coder.quantize(weights, *options)
        assert type(there) is not QuantizedStrips
        expected, found = here.count(header, None), there.count(header, None)
        assert np.array_equal(found.tiles, expected.tiles)
        assert found[1:] == expected[1:]
        assert expected.outliers > 300
        for index in range(weights.num_strips):
            for mine, other in zip(there.strip(index), here.strip(index), strict=True):
                assert np.array_equal(mine, other)


@needs_compiler
def test_more_outliers_than_expected() -> None:
    weights = Matrices(np.full((100, 100), -300, np.float32))
    coder = encoder.device_coder("cpu", emulated_launch)
    strips = coder.quantize(weights, np.ones(1, np.float32), FOUR_BITS, NEAREST)
    strip = strips.strip(0)
    assert np.array_equal(
        strip.outliers, QuantizedStrips(weights, np.ones(1, np.float32), FOUR_BITS, NEAREST).strip(0).outliers
    )
    assert len(strip.outliers) == 10000


def test_tiny_steps_stay_with_the_cpu() -> None:
    coder = encoder.device_coder("cpu", emulated_launch)
    weights = Matrices(np.full((4, 4), 1e-38, np.float32))
    assert type(coder.quantize(weights, np.full(1, 1e-38, np.float32), FOUR_BITS, NEAREST)) is QuantizedStrips


def test_quotients_are_exact() -> None:
    """For all frequencies, at the numbers where a quotient changes: the proof is encoder_entries'."""
    rest = 4096 - np.arange(1, 4096)
    tables = [np.array([f, r, *[0] * 254], np.uint16) for f, r in zip(np.arange(1, 4096), rest, strict=True)]
    entries = encoder.encoder_entries(tables)[:, 0].astype(np.uint64)
    f = np.arange(1, 4096, dtype=np.uint64)[:, None]
    rng = np.random.default_rng(0)
    quotients = np.concatenate(([1, 2, 3, 2**20 - 2, 2**20 - 1], rng.integers(1, 1 << 20, 500))).astype(np.uint64)
    for x in (f * quotients, f * quotients + f - np.uint64(1)):
        reciprocal, packed = entries[:, :1], entries[:, 1:]
        sums = x + (packed >> np.uint64(4) & np.uint64(1))
        found = (sums * reciprocal >> np.uint64(32)) >> (packed & np.uint64(15))
        state = x + (packed >> np.uint64(7) & np.uint64(0x1FFF)) + found * (np.uint64(4096) - (packed >> np.uint64(20)))
        assert np.array_equal(state, (x // f << np.uint64(12)) + x % f)  # start is 0


def test_powers_of_x() -> None:
    step, powers = encoder.crc_tables()
    middle = len(powers) // 2
    assert powers[middle] == 1 << 31
    for i in (1, 17, middle):
        assert encoder._multiply(int(powers[middle + i]), int(powers[middle - i])) == 1 << 31
    # A state with one byte set, and zeros behind it: what zlib makes of it, less what it makes of its initial value.
    zeros = bytes(4 * middle)
    with_byte, without = (zlib.crc32(first + zeros) for first in (b"\x5a\0\0\0", b"\0\0\0\0"))
    assert step[0, 0x5A] == encoder._multiply(with_byte ^ without, int(powers[middle - 1]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_no_device(tmp_path: Path) -> None:
    save_file({"a.weight": np.ones((64, 128), np.float32)}, tmp_path / "in.safetensors")
    with pytest.raises(DeviceError, match="pip install"):
        kvpack.compress(tmp_path / "in.safetensors", device="cuda")
    result = CliRunner().invoke(app, ["compress", str(tmp_path / "in.safetensors"), "--device", "cuda", "--json"])
    assert result.exit_code == ExitCode.NO_DEVICE
    assert json.loads(result.stdout)["error"] == "DeviceError"
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", INTEGER_LAYOUTS + FLOAT_LAYOUTS, ids=layout_id)
def test_layouts_on_the_device(layout: Layout) -> None:
    for shape, tile_cols in (((2, 1000, 1536), 512), ((777, 1100), 352), ((300, 333), 96)):
        check(elements_of(layout, shape, sigma=0.04), layout, "cuda", tile_cols=tile_cols)


@pytest.mark.gpu
def test_modes_on_the_device() -> None:
    elements = np.tile(mixed_elements(), (1, 4, 5))
    layout = integer_layout("compact", UNSIGNED, 6)
    for predictor in Predictor:
        check(elements, layout, "cuda", tile_cols=64, predictor=predictor)
    check(elements, layout, "cuda", tile_cols=64, scratch_bytes=1 << 20)
    raw = np.random.default_rng(0).integers(0, 32, (1000, 1001)).astype(np.uint8)
    assert modes(check(raw, integer_layout("balanced", SIGNED, 5), "cuda")) == {TileMode.RAW}


@pytest.mark.gpu
def test_large_on_the_device() -> None:
    for name in ("balanced", "fast"):
        layout = integer_layout(name, SIGNED, 8)
        check(elements_of(layout, (6144, 4096), sigma=0.12), layout, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [{"preset": "lossless"}, {"preset": "near-lossless"}, {"bits": 4.25}, {"bits": 4.25, "embeddings": "code"}],
)
def test_files_from_the_device(tmp_path: Path, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(5)
    tensors = {
        "a.weight": rng.normal(0, 0.02, (1000, 1536)).astype(np.float16),
        "embed_tokens.weight": rng.normal(0, 0.1, (3000, 512)).astype(np.float16),
        "c_fc.weight": rng.standard_t(4, (512, 1000)).astype(np.float32),
        "c_fc.bias": np.zeros(1000, np.float32),
    }
    save_file(tensors, tmp_path / "in.safetensors")
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}.safetensors"
        kvpack.compress(tmp_path / "in.safetensors", out, kvpack.QuantConfig(**options), device=device)
    assert (tmp_path / "cuda.safetensors").read_bytes() == (tmp_path / "cpu.safetensors").read_bytes()
