"""Interrupted, killed, or out of space: an output is complete or not there, and an old one stays as it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import kvpack
from kvpack.encode import compress as compressing
from kvpack.format import container
from kvpack.format.container import ContainerWriter

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and limits")

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (1024, 2048)
TENSORS = 10

# A shell's background job, and so a test run in one, may ignore SIGINT; a limit of 0 is none.
START = """
import resource, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
limit = int(sys.argv.pop(1))
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
runpy.run_module("kvpack", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def block() -> np.ndarray:
    return (np.random.default_rng(1).standard_t(5, SHAPE) * 0.02).astype(np.float32)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory, block: np.ndarray) -> Path:
    """84 MB: some seconds of work for one thread."""
    path = tmp_path_factory.mktemp("big") / "in.safetensors"
    save_file({f"layers.{i}.weight": np.roll(block, i) for i in range(TENSORS)}, path)
    return path


@pytest.fixture(scope="module")
def big_folder(tmp_path_factory: pytest.TempPathFactory, block: np.ndarray) -> Path:
    """The same in three shards."""
    folder = tmp_path_factory.mktemp("big-folder") / "model"
    folder.mkdir()
    weight_map = {}
    for shard, numbers in enumerate((range(1), range(1, 5), range(5, TENSORS))):
        name = f"shard{shard}.safetensors"
        names = [f"layers.{i}.weight" for i in numbers]
        save_file({n: np.roll(block, i) for n, i in zip(names, numbers, strict=True)}, folder / name)
        weight_map |= dict.fromkeys(names, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    return folder


@contextmanager
def kvpack_process(*arguments: object, limit: int = 0, threads: int = 1) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", START, str(limit), *map(str, arguments), "--threads", str(threads)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_until_midway(process: subprocess.Popen[str], folder: Path) -> None:
    """Until something of the output has reached a temporary file."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"it ended before it could be interrupted: {process.communicate()}")
        spools = [path for path in folder.rglob("*.data") if path.name.startswith(".")]
        try:
            if any(path.stat().st_size > 100_000 for path in spools):
                return
        except FileNotFoundError:  # a shard was finished between the two looks
            continue
        time.sleep(0.01)
    pytest.fail("no temporary file appeared")


def stop(process: subprocess.Popen[str], signal_number: int) -> tuple[int, str, str]:
    process.send_signal(signal_number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def said(err: str) -> str:
    """What a process printed to stderr, but for a first run's remark that it compiles."""
    return "".join(line for line in err.splitlines(keepends=True) if not line.startswith("compiling the CPU kernels"))


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_nothing(big: Path, tmp_path: Path, signal_number: signal.Signals, threads: int) -> None:
    with kvpack_process("compress", big, "-o", tmp_path / "out.safetensors", threads=threads) as process:
        wait_until_midway(process, tmp_path)
        code, out, err = stop(process, signal_number)
    assert (code, out) == (130, "")
    assert said(err) == "kvpack: interrupted; nothing half-written was left behind\n"
    assert contents(tmp_path) == []


def test_sigint_with_json_and_an_old_output(big: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"the old output")
    with kvpack_process("compress", big, "-o", output, "--force", "--json") as process:
        wait_until_midway(process, tmp_path)
        code, out, err = stop(process, signal.SIGINT)
    assert (code, said(err)) == (130, "")
    assert json.loads(out) == {
        "ok": False,
        "error": "KeyboardInterrupt",
        "message": "interrupted; nothing half-written was left behind",
        "exit_code": 130,
    }
    assert contents(tmp_path) == ["out.safetensors"]
    assert output.read_bytes() == b"the old output"


def test_sigkill_leaves_no_output(big: Path, tmp_path: Path) -> None:
    """Only hidden temporary files, which do not stand in the way of the next run."""
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"the old output")
    with kvpack_process("compress", big, "-o", output, "--force") as process:
        wait_until_midway(process, tmp_path)
        assert stop(process, signal.SIGKILL)[0] == -signal.SIGKILL
    assert output.read_bytes() == b"the old output"
    left = [name for name in contents(tmp_path) if name != "out.safetensors"]
    assert left
    assert all(name.startswith(".out.safetensors.") for name in left)
    small = tmp_path / "small.safetensors"
    save_file({"a.weight": np.ones((64, 128), np.float32)}, small)
    kvpack.compress(small, output, force=True)
    assert kvpack.verify(output, small).mismatches == {}


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("old", [False, True])
def test_directories(big_folder: Path, tmp_path: Path, signal_number: signal.Signals, old: bool) -> None:
    output = tmp_path / "out"
    if old:
        output.mkdir()
        (output / "shard0.safetensors").write_text("the old output")
    with kvpack_process("compress", big_folder, "-o", output, *(["--force"] if old else [])) as process:
        wait_until_midway(process, tmp_path)
        code = stop(process, signal_number)[0]
    assert code == (130 if signal_number == signal.SIGINT else -signal.SIGKILL)
    visible = [name for name in contents(tmp_path) if not name.startswith(".")]
    assert visible == (["out"] if old else [])
    if old:
        assert contents(output) == ["shard0.safetensors"]
        assert (output / "shard0.safetensors").read_text() == "the old output"
    if signal_number == signal.SIGINT:
        assert contents(tmp_path) == visible


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("limit", [300_000, 3_000_001])
def test_a_full_disk(big: Path, tmp_path: Path, limit: int, threads: int) -> None:
    """The limit on a file's size stands for the disk's: writes fail half-way, in the first tensor or later."""
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"the old output")
    with kvpack_process("compress", big, "-o", output, "--force", limit=limit, threads=threads) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert said(err).startswith("kvpack: File too large")
    assert said(err).count("\n") == 1
    assert contents(tmp_path) == ["out.safetensors"]
    assert output.read_bytes() == b"the old output"


def test_a_full_disk_for_a_directory(big_folder: Path, tmp_path: Path) -> None:
    """The first shard of one tensor fits, the second does not."""
    with kvpack_process("compress", big_folder, "-o", tmp_path / "out", "--json", limit=2_000_000) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, said(err)) == (1, "")
    assert json.loads(out) == {
        "ok": False,
        "error": "OSError",
        "message": "File too large",
        "exit_code": 1,
    }
    assert contents(tmp_path) == []


def test_decompressing_onto_a_full_disk(tmp_path: Path, block: np.ndarray) -> None:
    save_file({"a.weight": block}, tmp_path / "in.safetensors")
    kvpack.compress(tmp_path / "in.safetensors", tmp_path / "packed.safetensors", kvpack.QuantConfig(bits=2))
    output = tmp_path / "out.safetensors"
    with kvpack_process("decompress", tmp_path / "packed.safetensors", "-o", output, limit=3_000_000) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert "File too large" in err
    assert contents(tmp_path) == ["in.safetensors", "packed.safetensors"]


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    source = tmp_path / "in.safetensors"
    save_file({"a.weight": np.ones((64, 128), np.float32)}, source)
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    with pytest.raises(PermissionError):
        kvpack.compress(source, locked / "out.safetensors")
    assert contents(locked) == []


# The same in one process, at each place


class Stop(Exception):
    pass


def fail(*_: object, **__: object) -> None:
    raise Stop


def small_source(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a.weight": np.ones((64, 128), np.float32)}, folder / "a.safetensors")
    save_file({"b": np.ones(3, np.float32)}, folder / "b.safetensors")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    "place",
    [
        "kvpack.encode.blob_encoder.cluster_tables",
        "kvpack.format.container.ContainerWriter.add",
        "kvpack.format.container.ContainerWriter.finish",
        "os.fsync",
        "pathlib.Path.replace",
        "pathlib.Path.write_text",
        "shutil.copy2",
    ],
)
def test_a_failure_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    folder = small_source(tmp_path)
    old = tmp_path / "old"
    old.mkdir()
    (old / "a.safetensors").write_text("1")
    monkeypatch.setattr(place, fail)
    for output, force in ((tmp_path / "new", False), (old, True)):
        with pytest.raises(Stop):
            kvpack.compress(folder, output, force=force)
    assert contents(tmp_path) == ["model", "old"]
    assert contents(old) == ["a.safetensors"]
    if place not in ("pathlib.Path.write_text", "shutil.copy2"):  # those are for directories
        with pytest.raises(Stop):
            kvpack.compress(folder / "a.safetensors", tmp_path / "out.safetensors")
        assert contents(tmp_path) == ["model", "old"]


def test_an_interrupt_does_not_wait_for_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one file is put in place and another waits for that: neither is copied to its end, or flushed."""
    monkeypatch.setattr(container, "_COPY_BYTES", 1000)
    interrupted, begun, flushed, code_file = threading.Event(), [], [], compressing._code_file
    finish, give_up = ContainerWriter.finish, ContainerWriter.give_up

    def interrupting(self: ContainerWriter, metadata: dict[str, str]) -> int:
        begun.append(self.path.name)
        assert coded_both.wait(60)
        time.sleep(0.2)  # for the second one to wait
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        assert interrupted.wait(60)
        return finish(self, metadata)

    def told(self: ContainerWriter) -> None:
        give_up(self)
        interrupted.set()

    coded, coded_both = [], threading.Event()

    def coding(model: Any, file: Any, *others: Any) -> Any:
        coded.append(code_file(model, file, *others))
        if len(coded) == 2:
            coded_both.set()
        return coded[-1]

    monkeypatch.setattr(ContainerWriter, "finish", interrupting)
    monkeypatch.setattr(ContainerWriter, "give_up", told)
    monkeypatch.setattr(compressing, "_code_file", coding)
    monkeypatch.setattr(os, "fsync", flushed.append)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            kvpack.compress(small_source(tmp_path), tmp_path / "out")
    finally:
        signal.signal(signal.SIGINT, before)
    assert begun == ["a.safetensors"]
    assert flushed == []
    assert all(file.writer._spool.closed for file in coded)
    assert contents(tmp_path) == ["model"]


@pytest.mark.parametrize("number", [0, 1])
def test_an_old_directory_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Two renames put a directory in place of another; neither may fail at the cost of the old one."""
    folder = small_source(tmp_path)
    old = tmp_path / "old"
    old.mkdir()
    (old / "a.safetensors").write_text("1")
    rename, calls = Path.rename, []

    def failing(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == number + 1:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no"):
        kvpack.compress(folder, old, force=True)
    assert contents(tmp_path) == ["model", "old"]
    assert contents(old) == ["a.safetensors"]


def test_leftovers_of_another_process_are_no_obstacle(tmp_path: Path) -> None:
    """In a container every process has the same number: what a killed one left must not stop the next."""
    first = ContainerWriter(tmp_path / "out.safetensors")
    first.add("a", "U8", [1], [b"\1"])
    with ContainerWriter(tmp_path / "out.safetensors") as second:
        second.add("b", "U8", [1], [b"\2"])
        second.finish({})
    with kvpack.open(tmp_path / "out.safetensors") as reader:
        assert reader.decode("b").tolist() == [2]
        assert "a" not in reader
    assert len(contents(tmp_path)) == 2
    first.__exit__(None, None, None)
    assert contents(tmp_path) == ["out.safetensors"]
