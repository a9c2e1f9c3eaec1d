"""Archives of snapshots: as small and as near as they say, and refused by name if they are damaged."""

from __future__ import annotations

import json
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from snapshot_samples import SamplePages, make_header, mixed_formats, usual_formats

from kvpack.encode import archive_coder
from kvpack.encode.archive_coder import archive_snapshot, read_archive_header, restore_snapshot, turned
from kvpack.encode.page_coder import FLOAT_TYPES, dequantize_blocks, quantize_blocks
from kvpack.encode.reader import Reader
from kvpack.encode.snapshot_coder import decode_runs
from kvpack.encode.verify import verify
from kvpack.errors import InputError, KvpackError, LimitError, NotASnapshotError, SnapshotHeaderError
from kvpack.format.pages import PageFormat, Side
from kvpack.format.snapshot import RunPages, SnapshotFile

FREQUENCIES = [10000.0 ** (-i / 16) for i in range(16)]


class ContextPages(SamplePages):
    """Keys that are slow before RoPE turns them, and values in few directions: [2, layers, heads, tokens, 32]."""

    def __init__(self, tokens: int, page_format: PageFormat, *, finite: bool = True, **fields: object) -> None:
        header = make_header(tokens, 2, 2, 32, **fields)
        super().__init__(header, usual_formats(header, page_format))
        rng = np.random.default_rng(5)
        shape = 2, 2, 2, header.pages * 64, 32
        walk = np.cumsum(rng.normal(0, 0.1, shape), axis=3) + rng.normal(0, 3, (2, 2, 2, 1, 32))
        mixed = rng.normal(0, 1, (*shape[:-1], 4)) @ rng.normal(0, 1, (2, 2, 2, 4, 32))
        self.values = (walk + mixed).astype(np.float32)
        positions = np.arange(shape[3]) + 64 * header.first_page
        self.values[Side.K] = turned(self.values[Side.K], positions, FREQUENCIES, 1)
        if not finite:
            self.values[1, 1, 1, 70, 3] = np.inf

    def blocks(self, pages: RunPages) -> np.ndarray:
        places = zip(pages.layers.tolist(), pages.indices.tolist(), strict=True)
        made = np.stack([self.values[pages.side, layer, :, 64 * i : 64 * i + 64] for layer, i in places])
        kind = FLOAT_TYPES.get(pages.format, np.dtype(np.float32))
        return np.ascontiguousarray(quantize_blocks(made.astype(kind), pages.layout))


def values_of(path: Path) -> np.ndarray:
    """f32 [2, layers, heads, tokens, head_dim]."""
    with SnapshotFile(path) as file:
        header = file.header
        found = np.empty((2, header.layers, header.kv_heads, header.pages * 64, header.head_dim), np.float32)
        for _, run in decode_runs(file, range(header.runs)):
            for pages, blocks in run:
                for layer, i, page in zip(
                    pages.layers, pages.indices, dequantize_blocks(blocks, pages.layout), strict=True
                ):
                    found[pages.side, layer, :, 64 * i : 64 * i + 64] = page
    return found[..., : header.tokens, :]


def relative(off: np.ndarray, values: np.ndarray) -> float:
    around = values - values.mean(axis=-2, keepdims=True)
    return float(np.sqrt(np.square(off).mean() / np.square(around).mean()))


@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_noise_is_what_was_asked_for(
    tmp_path: Path, noise: float, rotates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_coder, "_PCA_TOKENS", 1 if rotates else 1 << 20)
    pages = ContextPages(64 * 8 + 10, PageFormat.FP16, first_page=3)
    pages.write(tmp_path / "s.safetensors")
    report = archive_snapshot(
        tmp_path / "s.safetensors", tmp_path / "a.safetensors", noise=noise, rope_frequencies=FREQUENCIES
    )
    assert report.file_bytes == (tmp_path / "a.safetensors").stat().st_size
    assert verify(tmp_path / "a.safetensors").bytes_without_checksum == 0
    archive = read_archive_header(tmp_path / "a.safetensors")
    assert archive.snapshot == pages.header
    assert (archive.key_noise, archive.value_noise) == (report.key_noise, report.value_noise)
    restore_snapshot(tmp_path / "a.safetensors", tmp_path / "r.safetensors")
    before, after = values_of(tmp_path / "s.safetensors"), values_of(tmp_path / "r.safetensors")
    np.testing.assert_array_equal(after[..., :4, :], before[..., :4, :])
    positions = np.arange(before.shape[3]) + 64 * 3
    for side, stated in ((Side.K, report.key_noise), (Side.V, report.value_noise)):
        a, b = (turned(v[side], positions, FREQUENCIES, -1) if side == Side.K else v[side] for v in (before, after))
        assert relative((b - a)[..., 4:, :], a[..., 4:, :]) == pytest.approx(stated, rel=0.02)
        assert 0.3 * noise < stated < 1.1 * noise
        recent = relative((b - a)[..., -64:, :], a[..., 4:, :])
        assert recent < 0.35 * noise
    with SnapshotFile(tmp_path / "r.safetensors") as file:
        assert file.header == pages.header
        np.testing.assert_array_equal(file.page_formats, pages.page_formats)
        np.testing.assert_array_equal(file.tokens(), np.arange(pages.header.tokens))


def test_each_step_of_it_makes_files_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = ContextPages(64 * 16, PageFormat.FP16)
    size = pages.write(tmp_path / "s.safetensors")

    before = values_of(tmp_path / "s.safetensors")

    def archived(noise: float, frequencies: list[float] | None = None, pca_tokens: int = 1 << 20) -> tuple[int, float]:
        """(bytes, RMS error of keys)."""
        monkeypatch.setattr(archive_coder, "_PCA_TOKENS", pca_tokens)
        paths = tmp_path / "s.safetensors", tmp_path / "a.safetensors"
        taken = archive_snapshot(*paths, noise=noise, rope_frequencies=frequencies).file_bytes
        restore_snapshot(tmp_path / "a.safetensors", tmp_path / "r.safetensors")
        return taken, float(np.sqrt(np.square(values_of(tmp_path / "r.safetensors") - before)[0].mean()))

    plain, plain_error = archived(0.2)
    unturned, unturned_error = archived(0.2, FREQUENCIES)
    rotated, rotated_error = archived(0.2, FREQUENCIES, 1)
    rotated -= 2 * 4 * 32 * 32 * 2  # without the rotations themselves: 2 sides, 4 heads
    coarse, coarse_error = archived(0.4, FREQUENCIES)
    assert plain < 0.3 * size
    # Heads vary less once turned back, so that the same share of it is a smaller step.
    assert unturned_error < 0.8 * plain_error
    assert unturned < 1.05 * plain
    assert rotated < 0.8 * unturned
    assert rotated_error < 1.1 * unturned_error
    assert coarse < 0.8 * unturned
    assert coarse_error > 1.5 * unturned_error


@pytest.mark.parametrize("tokens", [1, 4, 5, 68, 69, 200])
def test_short_contexts(tmp_path: Path, tokens: int) -> None:
    header = make_header(tokens, 1, 1, 16, dtype="BF16")
    pages = SamplePages(header, mixed_formats(header))
    pages.write(tmp_path / "s.safetensors", positions=np.arange(tokens, dtype=np.int32)[::-1])
    archive_snapshot(tmp_path / "s.safetensors", tmp_path / "a.safetensors", noise=0.1, rope_frequencies=[1.0, 0.1])
    restore_snapshot(tmp_path / "a.safetensors", tmp_path / "r.safetensors")
    with SnapshotFile(tmp_path / "r.safetensors") as file:
        assert file.header == header
        np.testing.assert_array_equal(file.array("positions"), np.arange(tokens)[::-1])
    before, after = values_of(tmp_path / "s.safetensors"), values_of(tmp_path / "r.safetensors")
    assert tokens <= 4 or relative(after - before, before) < 0.2


def test_what_cannot_be_archived(tmp_path: Path) -> None:
    source, target = tmp_path / "s.safetensors", tmp_path / "a.safetensors"
    ContextPages(200, PageFormat.FP16, finite=False).write(source)
    with pytest.raises(InputError, match="not finite"):
        archive_snapshot(source, target)
    ContextPages(200, PageFormat.FP16).write(source)
    for noise in (0, -1, 3, float("nan")):
        with pytest.raises(InputError, match="noise"):
            archive_snapshot(source, target, noise=noise)
    for frequencies in ([], [1.0] * 17, [float("inf")]):
        with pytest.raises(InputError, match="rope_frequencies"):
            archive_snapshot(source, target, rope_frequencies=frequencies)
    assert not target.exists()
    with pytest.raises(NotASnapshotError, match="no archive"):
        restore_snapshot(source, target)
    archive_snapshot(source, target)
    with pytest.raises(NotASnapshotError):
        SnapshotFile(target)


def test_damage_is_refused_by_name(tmp_path: Path) -> None:
    source, target = tmp_path / "s.safetensors", tmp_path / "a.safetensors"
    ContextPages(300, PageFormat.INT4).write(source)
    archive_snapshot(source, target, rope_frequencies=FREQUENCIES)
    whole = target.read_bytes()
    restore_snapshot(target, tmp_path / "r.safetensors")
    expected = (tmp_path / "r.safetensors").read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for place in [*rng.integers(0, len(whole), 150).tolist(), *range(0, 4000, 40)]:
        mutant = bytearray(whole)
        mutant[place] ^= 1 << int(rng.integers(8))
        target.write_bytes(mutant)
        (tmp_path / "r.safetensors").unlink()
        try:
            restore_snapshot(target, tmp_path / "r.safetensors")
        except KvpackError:
            assert not (tmp_path / "r.safetensors").exists()
            (tmp_path / "r.safetensors").touch()
            refused += 1
        else:  # a white space, or the name of a method
            assert (tmp_path / "r.safetensors").read_bytes() == expected
    assert refused > 240
    for size in range(0, len(whole), 1999):
        target.write_bytes(whole[:size])
        with pytest.raises(KvpackError):
            restore_snapshot(target, tmp_path / "r.safetensors")


def with_tensor(path: Path, name: str, values: np.ndarray) -> None:
    """Put others into a tensor that is not coded, with a right CRC."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    begin, end = (8 + size + offset for offset in header[name]["data_offsets"])
    assert values.nbytes == end - begin
    data = data[:begin] + values.tobytes() + data[end:]
    crcs = json.loads(header["__metadata__"]["kvpack_crc32"]) | {name: zlib.crc32(values.tobytes())}
    header["__metadata__"]["kvpack_crc32"] = json.dumps(crcs)
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + size :])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_archive_of_numbers_that_are_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    source, target, back = tmp_path / "s.safetensors", tmp_path / "a.safetensors", tmp_path / "r.safetensors"
    ContextPages(300, PageFormat.INT4).write(source)
    archive_snapshot(source, target)
    whole = target.read_bytes()
    with Reader(target) as reader:
        means, first = reader.stored("V.means").copy(), reader.stored("K.first").copy()
    means.flat[5] = value
    first.flat[5] = np.float16(value).view(np.uint16)
    for name, values in (("V.means", means), ("K.first", first)):
        target.write_bytes(whole)
        with_tensor(target, name, values)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(SnapshotHeaderError, match=f"numbers of {name[0]} are not finite"):
                restore_snapshot(target, back)
    assert not back.exists()


def test_an_archive_says_no_more_numbers_than_a_snapshot_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "s.safetensors", tmp_path / "a.safetensors"
    ContextPages(300, PageFormat.INT4).write(source)
    archive_snapshot(source, target)
    elements = 2 * 5 * 64 * (whole := read_archive_header(target).snapshot).layers * whole.kv_heads * whole.head_dim
    monkeypatch.setattr("kvpack.format.snapshot.ELEMENTS_PER_BYTE", 0)
    monkeypatch.setattr("kvpack.format.snapshot.FREE_ELEMENTS", elements)
    read_archive_header(target)
    monkeypatch.setattr("kvpack.format.snapshot.FREE_ELEMENTS", elements - 1)
    with pytest.raises(LimitError, match=f"pages of {elements} numbers"):
        restore_snapshot(target, tmp_path / "r.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2}, {"exact_tokens": 301}, {"exact_tokens": None}, {"exact_tokens": 2}, {"noise": "x"},
        {"rope_frequencies": []}, {"rope_frequencies": [None]}, {"rope_frequencies": 3}, {"snapshot": {}},
    ],
)  # fmt: skip
def test_headers_that_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    source, target = tmp_path / "s.safetensors", tmp_path / "a.safetensors"
    ContextPages(300, PageFormat.INT4).write(source)
    archive_snapshot(source, target)
    data = target.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    text = json.dumps(json.loads(header["__metadata__"][archive_coder.ARCHIVE_KEY]) | change)
    crc32 = archive_coder.snapshot_crc32(text)
    header["__metadata__"] |= {archive_coder.ARCHIVE_KEY: text, archive_coder.ARCHIVE_CRC_KEY: crc32}
    changed = json.dumps(header).encode()
    target.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + size :])
    with pytest.raises(SnapshotHeaderError):
        restore_snapshot(target, tmp_path / "r.safetensors")
