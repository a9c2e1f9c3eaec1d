"""Several tensors are coded at once where there are threads for that: in bounds, in order, and to the same bytes."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from kvpack.encode import compress as compressing
from kvpack.encode.compress import compress
from kvpack.encode.dtypes import as_float32
from kvpack.encode.progress import Progress
from kvpack.encode.quant_config import QuantConfig
from kvpack.encode.tensor_encoder import CPU_CODER, Coder
from kvpack.encode.threads import map_ordered
from kvpack.encode.verify import verify
from kvpack.errors import InputError
from kvpack.format.container import ContainerWriter
from kvpack.format.header import BlobHeader

WAIT_S = 30


def model(path: Path, layers: int = 3) -> Path:
    """Kept, coded, stacked and refused tensors, in an order in which a stack's are apart."""
    rng = np.random.default_rng(4)
    tensors: dict[str, np.ndarray] = {}
    for i in range(layers):
        for j, name in enumerate(("q_proj", "k_proj", "v_proj")):
            weights = rng.standard_t(5, (256 if j else 512, 512)) * 0.02 * (i + 1)
            tensors[f"{'cab'[j]}.{i}.self_attn.{name}.weight"] = weights.astype(ml_dtypes.bfloat16)
        tensors[f"d.{i}.mlp.down_proj.weight"] = (rng.normal(0, 0.02, (512, 300 + i))).astype(np.float32)
        tensors[f"e.{i}.norm.weight"] = np.ones(512, np.float32)
    tensors["f.nan.weight"] = np.full((64, 64), np.nan, np.float32)
    for name in ("q_proj", "k_proj", "v_proj"):
        tensors[f"g.self_attn.{name}.weight"] = rng.normal(0, 0.02, (256, 256)).astype(np.float32)
        # That these are no stack is found when they are coded, and of the next by their dtypes, ahead of that.
        tensors[f"h.self_attn.{name}.weight"] = np.full((64, 64), np.nan if name == "v_proj" else 0.5, np.float32)
        dtype = ml_dtypes.bfloat16 if name == "v_proj" else np.float32
        tensors[f"i.self_attn.{name}.weight"] = rng.normal(0, 0.02, (64, 256)).astype(dtype)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 4.25},
        {"bits": 3.0, "stack": True},
        {"bits": 3.0, "quantizer": "trellis"},
        {"bits": 4.0, "allocation": "model"},
        {"preset": "near-lossless"},
        {"preset": "lossless"},
    ],
    ids=str,
)
def test_threads_change_nothing(tmp_path: Path, settings: dict[str, Any]) -> None:
    source, bytes_of, reports = model(tmp_path / "m.safetensors"), [], []
    for threads in (1, 2, 7):
        output = tmp_path / f"{threads}.safetensors"
        report = compress(source, output, QuantConfig(**settings), threads=threads).as_dict()
        reports.append({key: value for key, value in report.items() if key not in ("output", "seconds")})
        bytes_of.append(output.read_bytes())
    assert bytes_of[0] == bytes_of[1] == bytes_of[2]
    assert reports[0] == reports[1] == reports[2]
    if "stack" in settings:
        assert "stack: 1 set of layers has common tables" in reports[0]["notes"]
        reasons = [note.split("(")[1].split(")")[0] for note in reports[0]["notes"] if "cannot be one" in note]
        assert reasons == ["their layouts differ", "their dtypes or inputs differ"]
    assert verify(output, source).mismatches == {}


def equal_tensors(path: Path, number: int) -> Path:
    rng = np.random.default_rng(number)
    save_file(
        {f"{path.stem}.{i}.weight": rng.normal(0, 0.02, (256, 256)).astype(np.float32) for i in range(number)}, path
    )
    return path


@pytest.mark.parametrize(("threads", "most"), [(2, 2), (3, 3), (4, 4), (7, 4)])
def test_as_many_as_threads_are_under_way(tmp_path: Path, threads: int, most: int) -> None:
    """Up to four. Each thread waits, with the elements of its first tensor, until the others have come as far."""
    barrier, met = threading.Barrier(most, timeout=WAIT_S), set()

    def encode_strips(*arguments: Any, **keywords: Any) -> Any:
        if threading.get_ident() not in met:
            met.add(threading.get_ident())
            barrier.wait()
        return CPU_CODER.encode_strips(*arguments, **keywords)

    source = equal_tensors(tmp_path / "m.safetensors", 8)
    coder = CPU_CODER._replace(encode_strips=encode_strips)
    compress(source, tmp_path / "out.safetensors", QuantConfig(bits=4.0), threads=threads, coder=coder)
    assert len(met) == most
    compress(source, tmp_path / "plain.safetensors", QuantConfig(bits=4.0), threads=1)
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("threads", "coder"), [(1, CPU_CODER), (2, CPU_CODER._replace(tensors_at_once=1))], ids=["one thread", "a device"]
)
def test_one_is_under_way(tmp_path: Path, threads: int, coder: Coder) -> None:
    under_way = []

    def encode_strips(*arguments: Any, **keywords: Any) -> Any:
        under_way.append(threading.current_thread())
        return CPU_CODER.encode_strips(*arguments, **keywords)

    source = equal_tensors(tmp_path / "m.safetensors", 3)
    given = coder._replace(encode_strips=encode_strips)
    compress(source, tmp_path / "out.safetensors", QuantConfig(bits=4.0), threads=threads, coder=given)
    assert len(under_way) >= 3
    assert set(under_way) == {threading.main_thread()}
    assert given.with_trellis().tensors_at_once == coder.tensors_at_once


@pytest.mark.parametrize(("limit", "most"), [(700_000, 2), (100_000, 1)])
def test_their_bytes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, most: int) -> None:
    """Of tensors of 256 KiB two are within 700,000 bytes, and one is where none would be."""
    monkeypatch.setattr(compressing, "_BYTES_AT_ONCE", limit)
    lock, under_way, seen = threading.Lock(), set(), []

    def encode_strips(*arguments: Any, **keywords: Any) -> Any:
        with lock:
            under_way.add(threading.get_ident())
            seen.append(len(under_way))
        time.sleep(0.05)
        try:
            return CPU_CODER.encode_strips(*arguments, **keywords)
        finally:
            with lock:
                under_way.remove(threading.get_ident())

    source = equal_tensors(tmp_path / "m.safetensors", 6)
    coder = CPU_CODER._replace(encode_strips=encode_strips)
    compress(source, tmp_path / "out.safetensors", QuantConfig(bits=4.0), threads=4, coder=coder)
    assert max(seen) == most


def test_an_error_ends_the_others(tmp_path: Path) -> None:
    """The first tensor fails while three are under way: what waits for strips of theirs is not waited for."""
    began = threading.Barrier(4, timeout=WAIT_S)
    ended = []

    def encode_strips(header: BlobHeader, *_: Any, executor: ThreadPoolExecutor, **__: Any) -> Any:
        began.wait()
        if header.rows == 128:
            raise InputError("no")
        try:
            for _ in range(100 * WAIT_S):  # as long as there are threads for it
                executor.submit(time.sleep, 0.01).result(WAIT_S)
        except (CancelledError, RuntimeError) as error:
            ended.append(error)
            raise
        return None

    shapes = [(128, 256), *[(256, 256)] * 5]
    source = tmp_path / "m.safetensors"
    save_file({f"{i}.weight": np.eye(*shape, dtype=np.float32) + i for i, shape in enumerate(shapes)}, source)
    coder = CPU_CODER._replace(encode_strips=encode_strips)
    with pytest.raises(InputError, match="no"):
        compress(source, tmp_path / "out.safetensors", QuantConfig(preset="lossless"), threads=4, coder=coder)
    assert len(ended) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_what_is_under_way_costs_no_more() -> None:
    lock, under_way, seen = threading.Lock(), [0], []
    costs = [3, 1, 1, 4, 9, 2, 2, 2, 1]

    def work(cost: int) -> int:
        with lock:
            under_way[0] += cost
            seen.append((under_way[0], cost))
        time.sleep(0.01)
        with lock:
            under_way[0] -= cost
        return cost

    with ThreadPoolExecutor(8) as executor:
        assert list(map_ordered(work, costs, executor, ahead=4, cost=int)) == costs
    assert max(total for total, cost in seen if cost <= 4) <= 4
    assert (9, 9) in seen  # alone


def test_giving_up() -> None:
    """It is called once, when something is under way that nobody will take."""
    calls = []
    with ThreadPoolExecutor(2) as executor:
        results = map_ordered(abs, range(10), executor, ahead=3, give_up=lambda: calls.append(1))
        assert next(results) == 0
        results.close()
        assert calls == [1]
        assert list(map_ordered(abs, range(10), executor, ahead=3, give_up=lambda: calls.append(2))) == [*range(10)]
        results = map_ordered(abs, range(3), executor, ahead=3, give_up=lambda: calls.append(3))
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        results.close()  # who takes the last one need not ask for another
        assert calls == [1]


def test_files_one_after_the_other(tmp_path: Path) -> None:
    """The threads of the first are there for the second."""
    source = two_files(tmp_path / "model")
    for threads in (1, 2):
        compress(source, tmp_path / f"{threads}", QuantConfig(bits=4.0), threads=threads)
    for name in "ab":
        first, second = ((tmp_path / f"{threads}" / f"{name}.safetensors").read_bytes() for threads in (1, 2))
        assert first == second


def two_files(folder: Path) -> Path:
    folder.mkdir()
    for name in "ab":
        equal_tensors(folder / f"{name}.safetensors", 2)
    return folder


def test_a_file_is_finished_while_the_next_is_coded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coding_b, finish, finished = threading.Event(), ContainerWriter.finish, []

    def slow(self: ContainerWriter, metadata: dict[str, str]) -> int:
        assert coding_b.wait(WAIT_S)
        finished.append(self.path.name)
        return finish(self, metadata)

    monkeypatch.setattr(ContainerWriter, "finish", slow)
    progress = Progress(tensor=lambda name: coding_b.set() if name.startswith("b.") else None)
    source = two_files(tmp_path / "model")
    compress(source, tmp_path / "out", QuantConfig(bits=4.0), progress=progress)
    assert finished == ["a.safetensors", "b.safetensors"]
    assert verify(tmp_path / "out", source).mismatches == {}


@pytest.mark.parametrize("failing", ["a.safetensors", "b.safetensors"])
def test_a_file_that_cannot_be_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    finish = ContainerWriter.finish

    def full(self: ContainerWriter, metadata: dict[str, str]) -> int:
        if self.path.name == failing:
            raise OSError("full")
        return finish(self, metadata)

    monkeypatch.setattr(ContainerWriter, "finish", full)
    with pytest.raises(OSError, match="full"):
        compress(two_files(tmp_path / "model"), tmp_path / "out", QuantConfig(bits=4.0))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_cannot_be_finished_is_told_at_the_next_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coding_b, failed, seen = threading.Event(), threading.Event(), []

    def full(self: ContainerWriter, metadata: dict[str, str]) -> int:
        assert coding_b.wait(WAIT_S)
        failed.set()
        raise OSError("full")

    def tensor(name: str) -> None:
        seen.append(name)
        if name.startswith("b."):
            coding_b.set()
            assert failed.wait(WAIT_S)
            time.sleep(0.2)  # for the thread to tell it

    monkeypatch.setattr(ContainerWriter, "finish", full)
    progress = Progress(tensor=tensor)
    with pytest.raises(OSError, match="full"):
        compress(two_files(tmp_path / "model"), tmp_path / "out", QuantConfig(bits=4.0), progress=progress)
    assert seen == ["a.0.weight", "a.1.weight", "b.0.weight"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("shape", [(0, 4), (3, 5), (64, 130)])
def test_bf16_is_widened(shape: tuple[int, int]) -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 16, shape).astype(np.uint16)
    for array in (bits, bits[:, ::-1], bits.T, bits[::2]):
        wide = as_float32(array.view(ml_dtypes.bfloat16))
        assert wide.flags.c_contiguous
        assert wide.dtype == np.float32
        np.testing.assert_array_equal(wide.view(np.uint32), array.astype(np.uint32) << 16)
