"""Sequences of caches in files: the same pages bit for bit, in whole and in parts, and nothing half-loaded."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

torch = pytest.importorskip("torch")

from kvpack import KVCache, PageFormat  # noqa: E402
from kvpack.encode.snapshot_coder import verify_snapshot  # noqa: E402
from kvpack.errors import (  # noqa: E402
    CacheFullError,
    CacheInputError,
    DamagedRunError,
    FingerprintMismatchError,
    FormatError,
    InputError,
    ModelMismatchError,
    NotASnapshotError,
)
from kvpack.format.container import Container  # noqa: E402
from kvpack.format.snapshot import Fingerprint, SnapshotFile, SnapshotHeader  # noqa: E402
from kvpack.runtime.kv.allocator import PageImportance  # noqa: E402
from kvpack.runtime.kv.snapshot import load_snapshot, save_snapshot  # noqa: E402
from kvpack.runtime.kv.snapshot_convert import convert_snapshot  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]

LAYERS, HEADS, DIM = 2, 2, 32
MIXED = [(PageFormat.INT4, PageFormat.INT2), (PageFormat.FP8_E4M3, PageFormat.FP16)]
OPTIONS: dict[str, dict[str, Any]] = {
    "16 bits": {},
    "bf16": {"dtype": torch.bfloat16, "formats": PageFormat.INT3},
    "int4": {"formats": PageFormat.INT4, "recent_tokens": 100},
    "mixed": {"formats": MIXED, "sinks": 0},
    "budget": {"budget": 0.35},
    "key order": {"formats": PageFormat.INT4, "key_order": (1, 0)},
}


def new_cache(**options: Any) -> Any:
    given = {"max_sequences": 3, "device": "cpu"} | options
    return KVCache(LAYERS, HEADS, DIM, 1 << 14, **given)


def fill(cache: Any, tokens: int, sequence: int = 0, seed: int = 1, start: int = 0) -> None:
    """Channels differ in scale, and follow their last value, as keys do; the first tokens do not depend on how many."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(2, LAYERS, HEADS, DIM, 4096, generator=generator).transpose(-1, -2)
    x = (steps + steps.roll(1, -2)) * torch.linspace(0.2, 3, DIM)
    for layer in range(LAYERS):
        k, v = (side[layer, None, :, start : start + tokens].to(cache.dtype) for side in x)
        cache.append(layer, k, v, sequences=[sequence])


def dump(cache: Any, sequence: int) -> list[Any]:
    """A sequence's length, and the format and bytes of its pages."""
    pages = -(-cache.length(0, sequence) // 64)
    entries = cache.entries[:, :, sequence, :pages]
    return [
        cache.length(0, sequence),
        (entries & 15).tolist(),
        [block.numpy().tobytes() for block in cache.read_pages(entries)],
    ]


def used(cache: Any) -> tuple[int, int]:
    return cache.pools.bytes_in_use, cache.held_bytes


@pytest.mark.parametrize("name", OPTIONS)
def test_pages_are_equal_bit_for_bit(tmp_path: Path, name: str) -> None:
    cache = new_cache(**OPTIONS[name])
    fill(cache, 2500, sequence=1)
    size_bytes = cache.save(tmp_path / "context", sequence=1, tokens=range(2500))
    assert size_bytes == (tmp_path / "context").stat().st_size
    assert cache.held_bytes == 0
    loaded = KVCache.load(tmp_path / "context", device="cpu")
    assert dump(loaded, 0) == dump(cache, 1)
    assert used(loaded) == (cache.pools.bytes_in_use, 0)
    assert (loaded.budget, loaded.policy, loaded.key_order) == (cache.budget, cache.policy, cache.key_order)
    assert (loaded.recent_tokens, loaded.sinks, loaded.dtype) == (cache.recent_tokens, cache.sinks, cache.dtype)
    # What comes behind goes the same way: formats, the window and what is known of the formats are the same.
    fill(cache, 200, sequence=1, start=2500)
    fill(loaded, 200, start=2500)
    assert dump(loaded, 0) == dump(cache, 1)
    np.testing.assert_array_equal(loaded.errors, cache.errors)


def test_the_file_is_smaller_than_the_pages_and_does_not_depend_on_threads(tmp_path: Path) -> None:
    cache = new_cache(formats=PageFormat.INT4)
    fill(cache, 4096)
    for threads in (1, 3):
        cache.save(tmp_path / str(threads), threads=threads)
    one, three = (SnapshotFile(tmp_path / name) for name in ("1", "3"))
    with one, three:
        assert one.container.file.size_bytes < one.page_bytes
        for name in one.container.tensors:
            assert bytes(one.container.data(name)) == bytes(three.container.data(name))


def test_importance_goes_along(tmp_path: Path) -> None:
    cache = new_cache(budget=0.5)
    fill(cache, 300)
    given = PageImportance(np.arange(10, dtype=np.float32).reshape(2, 5), np.full((2, 5), 0.5, np.float32))
    cache.importance.put(0, given)
    known = cache.importance_of(0)
    assert known.average.any()
    cache.save(tmp_path / "context")
    loaded = KVCache.load(tmp_path / "context", device="cpu").importance_of(0)
    np.testing.assert_array_equal(loaded.average, known.average)
    np.testing.assert_array_equal(loaded.weight, known.weight)


@pytest.mark.parametrize("tokens", [1, 64, 1000, 1024, 2048, 2300, 2500])
def test_a_prefix(tmp_path: Path, tokens: int) -> None:
    """Is what truncate() leaves of all of it."""
    cache = new_cache(formats=PageFormat.INT4)
    fill(cache, 2500)
    cache.save(tmp_path / "context", tokens=range(2500))
    other = new_cache(formats=PageFormat.INT4)
    loaded = load_snapshot(other, tmp_path / "context", 2, tokens=tokens)
    assert loaded.tokens.tolist() == list(range(tokens))
    cache.truncate(0, tokens)
    assert dump(other, 2) == dump(cache, 0)
    assert used(other) == used(cache)


def test_parts_one_behind_the_other(tmp_path: Path) -> None:
    cache = new_cache(formats=PageFormat.INT4)
    fill(cache, 2500, sequence=1)
    for first, end in ((0, 7), (7, 39), (39, 40)):
        cache.save(tmp_path / str(first), sequence=1, tokens=range(2500), pages=(first, end))
    other = new_cache(formats=PageFormat.INT4)
    fill(other, 70, sequence=1)
    with pytest.raises(CacheInputError, match="needs the 448 tokens before it"):
        load_snapshot(other, tmp_path / "7", 2)
    ids: list[int] = []
    for first in (0, 7, 39):
        ids += load_snapshot(other, tmp_path / str(first), 2).tokens.tolist()
    assert ids == list(range(2500))
    assert dump(other, 2) == dump(cache, 1)
    assert other.held_bytes == 0
    with pytest.raises(CacheInputError, match="0 to 40; 5 to 41 cannot be saved"):
        cache.save(tmp_path / "x", sequence=1, pages=(5, 41))


def test_a_part_that_comes_takes_no_bits_from_other_sequences(tmp_path: Path) -> None:
    cache = new_cache(budget=0.3)
    fill(cache, 2560)
    for first, end in ((0, 32), (32, 40)):
        cache.save(tmp_path / str(first), pages=(first, end))
    cache = new_cache(budget=0.3)
    fill(cache, 1000, sequence=1)
    load_snapshot(cache, tmp_path / "0")
    mass = torch.zeros(2, 2, 32)
    mass[0], mass[1, :, :15] = 1e-4, 10  # the other sequence is worth more than its part of the budget
    for layer in range(LAYERS):
        cache.observe(layer, mass)
    cache.reallocate()
    before, known = dump(cache, 1), cache.importance_of(0)
    load_snapshot(cache, tmp_path / "32")
    assert dump(cache, 1) == before
    assert cache.length(0, 0) == 2560
    assert (cache.importance_of(0).average[:, :32] == known.average).all()
    assert not cache.importance_of(0).weight[:, 32:].any()
    assert cache.held_bytes == 0
    with pytest.raises(CacheInputError, match="sequence 0 has tokens: it must have the 512 before them"):
        cache.adopt(0, cache.page_entries(1, 8, 9), 64, first_page=8)


def test_an_incomplete_page_that_is_gone_is_no_page(tmp_path: Path) -> None:
    """Its memory is cut anew into pages of another kind: the next append must not look for it."""
    source = new_cache(formats=PageFormat.INT4)
    fill(source, 100)
    source.save(tmp_path / "context")
    cache = new_cache(formats=PageFormat.INT4, max_bytes=400_000, slab_bytes=1)
    load_snapshot(cache, tmp_path / "context")
    cache.free(0)
    formats = np.full((cache.num_layers, 2, 1), PageFormat.INT4, np.uint8)
    held = []
    with suppress(CacheFullError):
        while True:
            held.append(cache.new_pages(formats))
    for entries in held:
        cache.release(entries)
    fill(cache, 10)
    assert cache.length(0, 0) == 10


def test_a_cache_that_cannot_have_the_pages_stays_as_it_is(tmp_path: Path) -> None:
    cache = new_cache(formats=PageFormat.INT4)
    fill(cache, 300)
    cache.save(tmp_path / "context")
    others = {
        "dtype": new_cache(formats=PageFormat.INT4, dtype=torch.bfloat16),
        "key_order": new_cache(formats=PageFormat.INT4, key_order=(1, 0)),
        "INT4|format": new_cache(formats=PageFormat.INT3),
        "layers": KVCache(3, HEADS, DIM, 999, device="cpu"),
        "KV heads": KVCache(LAYERS, 1, DIM, 999, device="cpu"),
        "head_dim": KVCache(LAYERS, HEADS, 64, 999, device="cpu"),
        "max_tokens": KVCache(LAYERS, HEADS, DIM, 256, device="cpu", formats=PageFormat.INT4),
    }
    for reason, other in others.items():
        with pytest.raises(CacheInputError, match=reason):
            load_snapshot(other, tmp_path / "context")
        assert (other.length(0, 0), *used(other)) == (0, 0, 0)
    fill(cache, 100, sequence=1)
    before = [dump(cache, sequence) for sequence in range(3)], used(cache)
    with pytest.raises(CacheInputError, match="sequence 1 has 100 tokens"):
        load_snapshot(cache, tmp_path / "context", 1)
    with pytest.raises(CacheInputError, match="301 tokens are to be loaded"):
        load_snapshot(cache, tmp_path / "context", 2, tokens=301)
    assert ([dump(cache, sequence) for sequence in range(3)], used(cache)) == before


def test_memory_that_ends_changes_nothing(tmp_path: Path) -> None:
    cache = new_cache()
    fill(cache, 2500)
    cache.save(tmp_path / "context")
    small = new_cache(max_bytes=300_000, slab_bytes=4096)
    fill(small, 100, sequence=1)
    before = dump(small, 1), used(small)
    with pytest.raises(CacheFullError):
        load_snapshot(small, tmp_path / "context", 0)
    assert (dump(small, 1), used(small)) == before


def _fingerprint(**changed: Any) -> Fingerprint:
    fields: dict[str, Any] = {"model": "0" * 64, "config": "1" * 64, "weights": "2" * 64, "dtype": "float16"}
    return Fingerprint(**({"rope": {"rope_theta": 1e4}} | fields | changed))


def test_another_model_is_refused(tmp_path: Path) -> None:
    cache = new_cache()
    fill(cache, 100)
    ours = _fingerprint()
    cache.save(tmp_path / "context", fingerprint=ours)
    cache.save(tmp_path / "of no model")
    assert KVCache.load(tmp_path / "context", fingerprint=ours, device="cpu").length(0, 0) == 100
    theirs = _fingerprint(model="a" * 64, rope={"rope_theta": 5e5}, dtype="bfloat16")
    with pytest.raises(FingerprintMismatchError, match=r"rope\.rope_theta: 10000\.0 in the file, 500000\.0") as found:
        load_snapshot(cache, tmp_path / "context", 1, fingerprint=theirs)
    assert "0" * 64 in str(found.value)
    assert "a" * 64 in str(found.value)
    first, *lines = str(found.value).splitlines()
    assert first == "the pages are of another model, to which alone they mean anything"
    assert [line.split(":")[0] for line in lines] == [
        "  fingerprint of the file",
        "  fingerprint of the model",
        "  dtype",
        "  rope.rope_theta",
    ]
    assert [line.partition(":")[0] for line in found.value.differences] == ["dtype", "model", "rope.rope_theta"]
    with pytest.raises(ModelMismatchError, match="does not say what model"):
        load_snapshot(cache, tmp_path / "of no model", 1, fingerprint=ours)
    assert cache.length(0, 1) == 0


def test_pages_made_by_other_rules_are_not_added_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = new_cache(formats=PageFormat.INT8)
    fill(cache, 300)
    with monkeypatch.context() as patched:
        header = functools.partial(SnapshotHeader, page_rules=2)
        patched.setattr("kvpack.runtime.kv.snapshot.SnapshotHeader", header)
        cache.save(tmp_path / "context", fingerprint=_fingerprint())
    for fingerprint in (None, _fingerprint()):
        with pytest.raises(CacheInputError, match="page_rules: 2 in the file, 1 in"):
            load_snapshot(cache, tmp_path / "context", 1, fingerprint=fingerprint)
    with pytest.raises(InputError, match="made by rules 2"):
        convert_snapshot(tmp_path / "context", tmp_path / "other", PageFormat.INT4)
    assert cache.length(0, 1) == 0
    assert not (tmp_path / "other").exists()


def test_hashes_and_long_lists_are_shortened_in_a_refusal() -> None:
    ours = _fingerprint(rope={"long_factor": [1.0] * 64})
    theirs = _fingerprint(weights="b" * 64, rope={"long_factor": [2.0] * 64})
    refused = FingerprintMismatchError(ours.model, theirs.model, ours.differences(theirs))
    *_, rope, weights = str(refused).splitlines()
    assert (rope.split(":")[0], len(rope), rope[-1]) == ("  rope.long_factor", 2 + 120, "…")
    assert weights == f"  weights: {'2' * 12}… in the file, {'b' * 12}… in the model"
    assert f"{[1.0] * 64} in the file, {[2.0] * 64} in the model" in refused.differences[0]


def _damage(path: Path, run: int) -> None:
    with Container(path) as container:
        tensor = next(t for name, t in sorted(container.tensors.items()) if name.startswith(f"run.{run:05d}."))
        at = container.data_begin + tensor.begin + tensor.size_bytes // 2
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1
    path.write_bytes(damaged)


@pytest.mark.parametrize("run", [0, 1, 2])
def test_a_damaged_run(tmp_path: Path, run: int) -> None:
    cache = new_cache(formats=PageFormat.INT4)
    fill(cache, 4090)
    fill(cache, 30, seed=2)
    cache.save(tmp_path / "context", tokens=range(4120))
    _damage(tmp_path / "context", run)
    other = new_cache(formats=PageFormat.INT4)
    with pytest.raises(DamagedRunError, match=rf"run {run} \(tokens {2048 * run}") as found:
        load_snapshot(other, tmp_path / "context", 1)
    way_on = f'on_corrupt="drop_from_here" (kvpack generate --drop-damaged) loads the {2048 * run} tokens before it'
    assert found.value.advice == (way_on if run else "nothing is before it: the context has to be computed anew")
    assert str(found.value).endswith(f"; {found.value.advice}")
    assert (other.length(0, 1), *used(other)) == (0, 0, 0)
    with pytest.warns(UserWarning, match=f"^{2048 * run} of 4120 tokens were loaded; .*run {run}"):
        loaded = load_snapshot(other, tmp_path / "context", 1, on_corrupt="drop_from_here")
    assert loaded.damage is not None
    assert loaded.damage.run == run
    assert loaded.tokens.tolist() == list(range(2048 * run))
    cache.truncate(0, 2048 * run)
    assert dump(other, 1) == dump(cache, 0)
    assert used(other) == used(cache)


def test_what_is_behind_the_last_token_is_zero_when_loaded(tmp_path: Path) -> None:
    """A file may hold anything there, NaN too, which attention would spread."""
    cache = new_cache()
    ones = torch.full((1, HEADS, 100, DIM), 1 + 2**-10).half()  # no byte of which is 0
    for layer in range(LAYERS):
        cache.append(layer, ones, -ones, sequences=[0])
    clean = dump(cache, 0)
    for block in cache.read_pages(cache.entries[:, :, 0, 1]):
        block[block == 0] = 0xFF
    cache.save(tmp_path / "context")
    assert dump(cache, 0) != clean
    assert dump(KVCache.load(tmp_path / "context", device="cpu"), 0) == clean


@pytest.mark.parametrize("page_format", [PageFormat.INT8, PageFormat.INT4, PageFormat.INT2])
def test_converted_pages_are_those_of_a_cache_of_these_bits(tmp_path: Path, page_format: PageFormat) -> None:
    options = {"recent_tokens": 100, "sinks": 70}
    wide, narrow = new_cache(**options), new_cache(formats=page_format, **options)
    for cache in (wide, narrow):
        fill(cache, 2500)
    wide.save(tmp_path / "wide", tokens=range(2500))
    size_bytes = convert_snapshot(tmp_path / "wide", tmp_path / "narrow", page_format)
    assert size_bytes == (tmp_path / "narrow").stat().st_size < (tmp_path / "wide").stat().st_size
    loaded = KVCache.load(tmp_path / "narrow", device="cpu")
    assert dump(loaded, 0) == dump(narrow, 0)
    fill(loaded, 300, start=2500)
    fill(narrow, 300, start=2500)
    assert dump(loaded, 0) == dump(narrow, 0)
    with pytest.raises(InputError, match=r"which have fewer bits than FP8_E4M3|no format of fewer bits"):
        convert_snapshot(
            tmp_path / "narrow",
            tmp_path / "x",
            PageFormat.FP16 if page_format == PageFormat.INT8 else PageFormat.FP8_E4M3,
        )
    assert not (tmp_path / "x").exists()


def test_converting_pages_of_a_budget_gives_one_format(tmp_path: Path) -> None:
    cache = new_cache(budget=0.5)
    fill(cache, 2500)
    cache.save(tmp_path / "context")
    before = set(cache.precision_map(0).reshape(-1).tolist())
    assert len(before - {-1}) > 2
    convert_snapshot(tmp_path / "context", tmp_path / "context", PageFormat.INT2)
    loaded = KVCache.load(tmp_path / "context", device="cpu")
    assert loaded.budget is None
    formats = loaded.precision_map(0)
    assert set(formats.reshape(-1).tolist()) == {-1, PageFormat.FP16, PageFormat.INT2}
    assert (formats[:, 0, 1:38] == PageFormat.INT2).all()


# Interrupted and out of space ----------------------------------------------------------------------------------------

SAVES = """
import os, random, resource, signal, sys, time
from pathlib import Path
import numpy as np
from snapshot_samples import SamplePages, make_header, usual_formats
from kvpack.format.pages import PageFormat
path, limit, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
header = make_header(6000, layers=4)

class Pages(SamplePages):
    known = {}

    def blocks(self, pages):
        key = pages.run, pages.side, pages.format
        if key not in self.known:
            self.known[key] = super().blocks(pages)
        return self.known[key]

pages = Pages(header, usual_formats(header, PageFormat.FP16), random_bytes=True)

def save(number):
    pages.write(path, tokens=np.full(6000, number, np.int32))

for _ in pages.encoded():
    list(_)
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    save(0)
rng = random.Random(7)
for _ in range(kills):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        for number in range(1000000):
            os.write(writer, b".")
            save(number)
    for _ in range(rng.randint(1, 3)):
        os.read(reader, 1)
    time.sleep(rng.random() * 0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader), os.close(writer)
    print("killed", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def saving(path: Path, *, limit: int = 0, kills: int = 0) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SAVES, str(path), str(limit), str(kills)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and limits")
def test_killed_while_it_saves(tmp_path: Path) -> None:
    """Again and again over the same file: it is always one that was saved, whole. KVPACK_KILLS says how often."""
    path, kills, cut_short = tmp_path / "context", int(os.environ.get("KVPACK_KILLS", "8")), 0
    with saving(path, kills=kills) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(kills):
            assert process.stdout.readline() == "killed\n"
            if path.exists():
                report = verify_snapshot(path)
                assert (report.damage, report.header.tokens) == (None, 6000)
                with SnapshotFile(path) as file:
                    assert len(set(file.tokens().tolist())) == 1
            left = [found for found in tmp_path.iterdir() if found != path]
            assert all(found.name.startswith(".context.") for found in left)
            cut_short += bool(left)
            for found in left:
                found.unlink()
            process.stdin.write("\n")
            process.stdin.flush()
        process.communicate()
        assert process.returncode == 0
    assert path.exists()
    assert cut_short > kills // 3  # of the others some were killed between two files


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and limits")
@pytest.mark.parametrize("limit", [20_000, 3_000_001])
def test_a_full_disk(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "context"
    cache = new_cache()
    fill(cache, 100)
    cache.save(path)
    before = path.read_bytes()
    with saving(path, limit=limit) as process:
        _, said = process.communicate(timeout=120)
    assert "OSError: [Errno 27] File too large" in said
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["context"]


def test_a_file_of_another_kind_is_not_replaced(tmp_path: Path) -> None:
    cache = new_cache(formats=PageFormat.INT4)
    fill(cache, 300)
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "tensors")
    before = (tmp_path / "tensors").read_bytes()
    for save in (cache.save, functools.partial(save_snapshot, cache)):
        with pytest.raises(InputError, match="tensors is there, and no context: it is not replaced"):
            save(tmp_path / "tensors")
        with pytest.raises(InputError, match="is a directory"):
            save(tmp_path)
    assert (tmp_path / "tensors").read_bytes() == before
    assert cache.save(tmp_path / "context") == cache.save(tmp_path / "context") > 0


def test_truncated_missing_and_other_files(tmp_path: Path) -> None:
    cache = new_cache(formats=PageFormat.INT4)
    fill(cache, 300)
    cache.save(tmp_path / "context")
    whole = (tmp_path / "context").read_bytes()
    for size in [0, 7, 100, *range(1000, len(whole), len(whole) // 20)]:
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(FormatError, match="cut"):
            load_snapshot(cache, tmp_path / "cut", 1)
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "tensors")
    with pytest.raises(NotASnapshotError, match="tensors: no kvpack_snapshot"):
        load_snapshot(cache, tmp_path / "tensors", 1)
    with pytest.raises(FileNotFoundError):
        load_snapshot(cache, tmp_path / "nowhere", 1)
    assert cache.length(0, 1) == cache.held_bytes == 0
