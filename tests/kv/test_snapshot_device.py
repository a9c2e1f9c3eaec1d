"""Snapshots that a GPU codes: the bytes and the pages of the CPU's coder, on the emulator and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import blob_surgery as surgery
import emulator
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from emulated_device import emulated_launch  # noqa: E402

from kvpack import KVCache, PageFormat  # noqa: E402
from kvpack.encode import snapshot_coder  # noqa: E402
from kvpack.encode.blob_encoder import encode_elements  # noqa: E402
from kvpack.encode.page_runs import part_elements  # noqa: E402
from kvpack.errors import CacheFullError, DamagedRunError, DeviceError  # noqa: E402
from kvpack.format.blob import Blob, lane_table_bytes  # noqa: E402
from kvpack.format.container import Container  # noqa: E402
from kvpack.format.layout import ElementKind, Layout, Predictor, TileMode  # noqa: E402
from kvpack.format.snapshot import RunPart, SnapshotFile  # noqa: E402
from kvpack.runtime.codec import encoder  # noqa: E402
from kvpack.runtime.device import kernels  # noqa: E402
from kvpack.runtime.kv import snapshot, snapshot_device  # noqa: E402

LAYERS, HEADS, DIM = 2, 2, 32
MIXED = [(PageFormat.INT4, PageFormat.INT2), (PageFormat.FP8_E4M3, PageFormat.FP16)]
OTHERS = [(PageFormat.INT8, PageFormat.FP8_E5M2), (PageFormat.INT2, PageFormat.INT3)]
OPTIONS: dict[str, dict[str, Any]] = {
    "16 bits": {},
    "bf16": {"dtype": torch.bfloat16, "formats": PageFormat.INT3},
    "int4": {"formats": PageFormat.INT4, "recent_tokens": 100},
    "mixed": {"formats": MIXED, "sinks": 0},
    "others": {"formats": OTHERS},
    "budget": {"budget": 0.35},
    "key order": {"formats": PageFormat.INT4, "key_order": (1, 0)},
}


class Coder:
    """Caches of a device whose snapshots kernels code, or, while `by_kernels` is false, the CPU."""

    def __init__(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device, self.by_kernels = device, True
        if device == "cpu":
            monkeypatch.setattr(kernels, "launch", emulated_launch)
            encode = encoder.encode_beside_each_other
            emulated = lambda *args, **options: encode(*args, launcher=emulated_launch, **options)  # noqa: E731
            monkeypatch.setattr(snapshot_device, "encode_beside_each_other", emulated)
            monkeypatch.setattr(snapshot, "runs_kernels", lambda _device: self.by_kernels)

    def cache(self, **options: Any) -> Any:
        return KVCache(LAYERS, HEADS, DIM, 1 << 14, **({"max_sequences": 3} | self.options() | options))

    def load(self, path: Path, **options: Any) -> Any:
        return KVCache.load(path, **self.options(), **options)

    def options(self) -> dict[str, Any]:
        # The emulator is given a copy of all memory that pages can be in.
        return {"device": self.device, "max_bytes": 6 << 20}

    def save_on_cpu(self, cache: Any, path: Path, sequence: int) -> None:
        """What the CPU makes of the same pages."""
        if self.device == "cpu":
            self.by_kernels = False
            cache.save(path, sequence=sequence)
            self.by_kernels = True
            return
        cache.save(path, sequence=sequence)
        KVCache.load(path, device="cpu").save(path)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def coder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Coder:
    if request.param == "cpu" and emulator.compiler() is None:
        pytest.skip("no C++ compiler for the emulator")
    return Coder(request.param, monkeypatch)


def fill(cache: Any, tokens: int, sequence: int = 0, seed: int = 1) -> None:
    """Channels differ in scale, and follow their last value, as keys do."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(2, LAYERS, HEADS, tokens, DIM, generator=generator)
    x = (steps + steps.roll(1, -2)) * torch.linspace(0.2, 3, DIM)
    for layer in range(LAYERS):
        k, v = (side[layer, None].to(cache.dtype).to(cache.device) for side in x)
        cache.append(layer, k, v, sequences=[sequence])


def dump(cache: Any, sequence: int = 0) -> list[Any]:
    """A sequence's length, and the format and bytes of its pages."""
    pages = -(-cache.length(0, sequence) // 64)
    entries = cache.entries[:, :, sequence, :pages]
    blocks = [block.cpu().numpy().tobytes() for block in cache.read_pages(entries)]
    return [cache.length(0, sequence), (entries & 15).tolist(), blocks]


def tensors(path: Path) -> dict[str, bytes]:
    with SnapshotFile(path) as file:
        return {name: bytes(file.container.data(name)) for name in file.container.tensors}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_files_and_pages(coder: Coder, tmp_path: Path, name: str) -> None:
    cache = coder.cache(**OPTIONS[name])
    fill(cache, 2500, sequence=1)
    # Pages that were used before hold something else.
    spoiled = coder.cache(**OPTIONS[name])
    fill(spoiled, 2560, seed=2)
    spoiled.free(0)
    coder.save_on_cpu(cache, tmp_path / "cpu", sequence=1)
    cache.save(tmp_path / "device", sequence=1)
    assert tensors(tmp_path / "device") == tensors(tmp_path / "cpu")
    assert dump(coder.load(tmp_path / "cpu")) == dump(cache, 1)
    loaded = snapshot.load_snapshot(spoiled, tmp_path / "cpu", 2)
    assert loaded.damage is None
    assert dump(spoiled, 2) == dump(cache, 1)


@pytest.mark.parametrize("tokens", [1, 64, 1000, 2048, 2300])
def test_a_prefix(coder: Coder, tmp_path: Path, tokens: int) -> None:
    cache = coder.cache(formats=PageFormat.INT4)
    fill(cache, 2500)
    cache.save(tmp_path / "context")
    loaded = coder.load(tmp_path / "context", tokens=tokens)
    cache.truncate(0, tokens)
    assert dump(loaded) == dump(cache)


def test_batches_of_runs(coder: Coder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = coder.cache(formats=PageFormat.INT4)
    fill(cache, 3 * 2048 + 10)
    cache.save(tmp_path / "context")
    for limit in (1, 2 * 2048 * LAYERS * HEADS * DIM * 2 + 200_000):
        monkeypatch.setattr(snapshot_device, "BATCH_BYTES", limit)
        done: list[int] = []
        other = coder.cache(formats=PageFormat.INT4)
        with SnapshotFile(tmp_path / "context") as file:
            entries, damage = snapshot.load_pages(other, file, file.header.pages, progress=done.append)
        assert damage is None
        assert done == [2048, 2048, 2048, 10]
        other.adopt(0, entries, 3 * 2048 + 10)
        other.release(entries)
        assert dump(other) == dump(cache)


def damaged(path: Path, out: Path, name: str, offset: int) -> None:
    """A byte of a tensor, counted from its end, is another one."""
    with Container(path) as container:
        tensor = container.tensors[name]
        at = container.data_begin + tensor.end - 1 - offset
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    out.write_bytes(data)


@pytest.mark.parametrize("run", [0, 1, 2])
@pytest.mark.parametrize("where", ["payload", "front"])
def test_damage_is_named_as_the_cpu_does(coder: Coder, tmp_path: Path, run: int, where: str) -> None:
    cache = coder.cache(formats=PageFormat.INT4)
    fill(cache, 3 * 2048)
    cache.save(tmp_path / "context")
    name = f"run.{run:05d}.V.INT4.codes"
    with SnapshotFile(tmp_path / "context") as file:
        size = file.container.tensors[name].size_bytes
    damaged(tmp_path / "context", tmp_path / "damaged", name, 40 if where == "payload" else size - 10)
    coder.by_kernels = False
    with pytest.raises(DamagedRunError) as expected:
        KVCache.load(tmp_path / "damaged", device="cpu")
    coder.by_kernels = True
    other = coder.cache(formats=PageFormat.INT4)
    with pytest.raises(DamagedRunError) as found:
        snapshot.load_snapshot(other, tmp_path / "damaged")
    assert str(found.value) == str(expected.value)
    assert (other.pools.bytes_in_use, other.held_bytes) == (0, 0)
    if not run:
        return
    with pytest.warns(UserWarning, match=f"{2048 * run} of 6144 tokens"):
        loaded = snapshot.load_snapshot(other, tmp_path / "damaged", on_corrupt="drop_from_here")
    assert loaded.damage is not None
    cache.truncate(0, 2048 * run)
    assert dump(other) == dump(cache)
    assert other.held_bytes == 0


def test_damage_that_the_cpu_does_not_find(coder: Coder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = coder.cache(formats=PageFormat.INT4)
    fill(cache, 300)
    cache.save(tmp_path / "context")
    monkeypatch.setattr(snapshot, "load_runs", lambda _file, runs, *_rest, **_options: list(runs))
    with pytest.raises(DeviceError, match="runs 0 to 0 where the CPU finds none"):
        coder.load(tmp_path / "context")


def test_runs_before_the_damaged_one_are_not_taken_on_trust(
    coder: Coder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are loaded again, and may be found to be damaged then."""
    cache = coder.cache(formats=PageFormat.INT4)
    fill(cache, 2 * 2048)
    cache.save(tmp_path / "context")
    damaged(tmp_path / "context", tmp_path / "damaged", "run.00001.V.INT4.codes", 40)
    asked: list[list[int]] = []

    def find_all_damaged(_file: Any, runs: range, *_rest: Any, **_options: Any) -> list[int]:
        asked.append(list(runs))
        return list(runs)

    monkeypatch.setattr(snapshot, "load_runs", find_all_damaged)
    other = coder.cache(formats=PageFormat.INT4)
    with pytest.raises(DeviceError, match="runs 0 to 0 where the CPU finds none"):
        snapshot.load_snapshot(other, tmp_path / "damaged", on_corrupt="drop_from_here")
    assert asked == [[0, 1], [0]]
    assert (other.pools.bytes_in_use, other.held_bytes) == (0, 0)


def test_no_memory_for_decoding(coder: Coder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = coder.cache(formats=PageFormat.INT4)
    fill(cache, 300)
    cache.save(tmp_path / "context")

    def decode(*_arguments: Any) -> None:
        raise torch.OutOfMemoryError("what the allocator says")

    monkeypatch.setattr(snapshot_device, "decode_blobs", decode)
    other = coder.cache(formats=PageFormat.INT4)
    with pytest.raises(CacheFullError, match=r"no memory for decoding .*context, .* what the allocator says"):
        snapshot.load_snapshot(other, tmp_path / "context")
    assert (other.pools.bytes_in_use, other.held_bytes) == (0, 0)


def test_no_memory_for_coding(coder: Coder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = coder.cache(formats=PageFormat.INT4)
    fill(cache, 300, sequence=1)
    cache.save(tmp_path / "context", sequence=1)
    before, pages = (tmp_path / "context").read_bytes(), dump(cache, 1)

    def encode(*_arguments: Any, **_options: Any) -> None:
        raise torch.OutOfMemoryError("what the allocator says")

    with monkeypatch.context() as patched:
        patched.setattr(snapshot_device, "encode_beside_each_other", encode)
        with pytest.raises(CacheFullError, match=r"no memory for coding .*context, .* what the allocator says"):
            cache.save(tmp_path / "context", sequence=1)
    assert [path.name for path in tmp_path.iterdir()] == ["context"]
    assert (tmp_path / "context").read_bytes() == before
    assert dump(cache, 1) == pages
    coder.by_kernels = False
    cache.copy([1], device="cpu").save(tmp_path / "copied")  # as the message says
    assert dump(KVCache.load(tmp_path / "copied", device="cpu")) == pages


def rewritten(path: Path, out: Path, encode: Any) -> None:
    """The same snapshot with other blobs: `encode(part, elements)` gives a part's."""
    with SnapshotFile(path) as file:
        arrays = {name: file.array(name) for name in ("tokens", "page_formats")}
        decoded = [snapshot_coder.decode_run(file, run) for run in range(file.header.runs)]

        def blobs(run: Any) -> Iterator[tuple[str, bytes]]:
            for pages, blocks in run:
                for part in pages.parts:
                    yield part.name, encode(part, part_elements(blocks, part))

        snapshot_coder.write_snapshot(out, file.header, arrays, map(blobs, decoded))


def other_layout(part: RunPart, elements: np.ndarray) -> bytes:
    """Large tiles of several groups, two tile columns, predictors, other layouts."""
    bits, kind = part.element_bits, part.kind
    layout = Layout(kind, bits, 8 if bits == 16 else min(bits, 4), 1)
    cols = 96
    rows = -(-len(elements) // cols)
    whole = np.full(rows * cols, elements[-1], elements.dtype)
    whole[: len(elements)] = elements
    options = {"predictor": Predictor.PREVIOUS} if kind == ElementKind.UNSIGNED else {}
    return encode_elements(whole.reshape(rows, cols), layout, tile_cols=64, **options)


@pytest.mark.parametrize("name", ["mixed", "others"])
def test_blobs_of_other_writers(coder: Coder, tmp_path: Path, name: str) -> None:
    cache = coder.cache(**OPTIONS[name])
    fill(cache, 900)
    cache.save(tmp_path / "context")
    rewritten(tmp_path / "context", tmp_path / "other", other_layout)
    assert dump(coder.load(tmp_path / "other")) == dump(cache)


def test_elements_behind_the_last_must_repeat_it(coder: Coder, tmp_path: Path) -> None:
    cache = coder.cache(formats=PageFormat.INT4)
    fill(cache, 300)
    cache.save(tmp_path / "context")

    def wrong(part: RunPart, elements: np.ndarray) -> bytes:
        whole = np.append(elements, elements[-1] ^ 1).astype(elements.dtype)
        layout = Layout(part.kind, part.element_bits, 8 if not part.is_codes else min(part.element_bits, 4), 1)
        return encode_elements(whole.reshape(1, -1), layout, tile_cols=2048)

    rewritten(tmp_path / "context", tmp_path / "other", wrong)
    with pytest.raises(DamagedRunError, match="do not repeat its last one"):
        coder.load(tmp_path / "other")


def test_what_is_behind_the_last_token_is_zero(coder: Coder, tmp_path: Path) -> None:
    cache = coder.cache()
    fill(cache, 90)
    entries = cache.entries[:, :, 0, 1]
    for block in cache.read_pages(entries):
        block.view(-1)[-1] = 7
    cache.save(tmp_path / "context")
    loaded = coder.load(tmp_path / "context")
    fill(other := coder.cache(), 90)
    assert dump(loaded) == dump(other)


def test_padding_that_is_not_zero_is_refused(coder: Coder, tmp_path: Path) -> None:
    """With right checksums: as the CPU does."""
    cache = coder.cache(formats=PageFormat.INT4)
    fill(cache, 300)
    cache.save(tmp_path / "context")
    spoiled = []

    def spoil(part: RunPart, elements: np.ndarray) -> bytes:
        blob = bytearray(other_layout(part, elements))
        parsed = Blob(bytes(blob))
        for number in range(parsed.header.num_tiles):
            tile = parsed.tile(number)
            words_end = lane_table_bytes(tile.geometry, parsed.header.length_bytes) + 2 * len(tile.words)
            if tile.mode == TileMode.RANS and words_end % 16 and not spoiled:
                spoiled.append(part.name)
                blob[parsed.header.payload_offset + int(parsed.tiles["data_offset"][number]) + words_end] = 1
                surgery.mend_crcs(blob)
        return bytes(blob)

    rewritten(tmp_path / "context", tmp_path / "spoiled", spoil)
    assert len(spoiled) == 1
    other = coder.cache(formats=PageFormat.INT4)
    with pytest.raises(DamagedRunError, match="the bytes behind the words are not zero"):
        snapshot.load_snapshot(other, tmp_path / "spoiled")
    assert (other.pools.bytes_in_use, other.held_bytes) == (0, 0)
