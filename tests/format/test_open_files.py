"""Hundreds of shards with few descriptors: each is the file that was opened, or an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import kvpack
from kvpack.errors import FileChangedError
from kvpack.format.open_files import MAX_DESCRIPTORS, OpenFile

SHARDS = 300


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 shards, each with a matrix that is coded and a vector that is kept."""
    directory = tmp_path_factory.mktemp("shards") / "model"
    directory.mkdir()
    random = np.random.default_rng(1)
    weight_map = {}
    for number in range(SHARDS):
        name = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        tensors = {
            f"l{number}.weight": random.normal(0, 0.02, (64, 64)).astype(np.float32),
            f"l{number}.bias": random.normal(0, 0.02, 64).astype(np.float32),
        }
        save_file(tensors, directory / name)
        weight_map |= dict.fromkeys(tensors, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text("{}")
    return directory


ALL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
import kvpack, numpy as np
source, coded, back = sys.argv[1:]
kvpack.compress(source, coded, bits=6)
assert kvpack.verify(coded, against=source).mismatches == {}
kvpack.decompress(coded, back)
with kvpack.open(coded) as reader, kvpack.open(back) as plain:
    assert len(reader) == 600
    held = [reader.dequantize(name) for name in reader]
    for name, values in zip(reader, held):
        assert np.array_equal(plain.stored(name), values), name
try:
    import torch
except ModuleNotFoundError:
    sys.exit()
state = kvpack.load(coded, device="cpu")
assert np.array_equal(state["l299.bias"].numpy(), held[reader.keys().index("l299.bias")])
model = torch.nn.Module()
for number in range(300):
    model.add_module(f"l{number}", torch.nn.Linear(64, 64, device="meta"))
assert len(kvpack.replace_linears(model, coded, device="cpu").replaced) == 300
"""


def test_300_shards_with_256_descriptors(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ALL, str(model), str(tmp_path / "coded"), str(tmp_path / "back")]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-2000:]


def test_few_are_open_and_none_stays_so(model: Path) -> None:
    before = descriptors()
    with kvpack.open(model) as reader:
        assert descriptors() - before <= MAX_DESCRIPTORS
        for name in reader:
            reader.stored(name)
        assert descriptors() - before <= MAX_DESCRIPTORS
    del reader
    assert descriptors() == before


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}" for number in range(2 * MAX_DESCRIPTORS)]
    for number, path in enumerate(paths):
        path.write_bytes(number.to_bytes(2, "little") * 100)
    return paths


def read(file: OpenFile) -> bytes:
    view = bytearray(file.size_bytes)
    file.read_into(memoryview(view), 0)
    return bytes(view)


def test_one_that_is_open_is_read_whatever_lies_under_its_path(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    file = OpenFile(tmp_path / "a")
    (tmp_path / "b").write_bytes(b"new")
    (tmp_path / "b").replace(tmp_path / "a")
    assert read(file) == b"old"


def test_one_that_was_replaced_is_not_taken_for_the_first(files: list[Path], tmp_path: Path) -> None:
    opened = [OpenFile(path) for path in files]
    (tmp_path / "other").write_bytes(files[0].read_bytes())
    (tmp_path / "other").replace(files[0])
    with pytest.raises(FileChangedError, match="was replaced by another file"):
        read(opened[0])
    assert read(opened[1]) == (1).to_bytes(2, "little") * 100


def test_paths_lead_to_the_same_files_from_elsewhere(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files[0].parent)
    opened = [OpenFile(Path(path.name)) for path in files]
    monkeypatch.chdir("/")
    assert [read(file) for file in opened] == [path.read_bytes() for path in files]


def test_threads(files: list[Path]) -> None:
    """More threads than descriptors, each at another file: none is closed under its reader."""
    opened = [OpenFile(path) for path in files]
    expected = [path.read_bytes() for path in files]
    wrong: list[int] = []

    def work(first: int) -> None:
        numbers = [number % len(opened) for number in range(first, first + 200)]
        wrong.extend(number for number in numbers if read(opened[number]) != expected[number])

    threads = [threading.Thread(target=work, args=(7 * number,)) for number in range(MAX_DESCRIPTORS + 16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
