"""What processes and machines do to a reader or a writer: forks, files that change, full disks, few descriptors."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import kvpack
from kvpack.encode import blob_decoder, jit
from kvpack.encode.threads import ThreadPool
from kvpack.errors import CacheFullError, FileChangedError, InputError, LimitError, StreamingError
from kvpack.format import container as container_module
from kvpack.format.blob import TILE_METADATA, pack_front
from kvpack.format.container import Container, ContainerWriter
from kvpack.format.header import BlobHeader
from kvpack.format.layout import ElementKind, integer_layout
from kvpack.format.temporary_files import create_directory, create_file, hidden_name, remove_abandoned

ROOT = Path(__file__).resolve().parents[1]
FORK_SECONDS = 60


def weights(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(0, 0.02, shape).astype(np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a coded tensor of 16 tiles and a kept one of 40 MB."""
    folder = tmp_path_factory.mktemp("model")
    save_file(
        {"a.weight": weights(2048, 1024), "big.norm": np.arange(10_000_000, dtype=np.float32)},
        folder / "m.safetensors",
    )
    kvpack.compress(folder / "m.safetensors", folder / "k.safetensors", bits=4.25)
    return folder


def copy(source: Path, target: Path) -> Path:
    target.write_bytes(source.read_bytes())
    return target


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvpack", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        errors="surrogateescape",
        **{"env": os.environ | {"PYTHONPATH": str(ROOT)}} | options,
    )


# Forks ---------------------------------------------------------------------------------------------------------------


def in_a_fork(work: Callable[[], bool]) -> None:
    """``work`` in a child, which must end with True in time."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if work() else 3)
        except BaseException:
            os._exit(4)
    end = time.monotonic() + FORK_SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail("the child hangs")


def test_a_reader_after_a_fork(model: Path) -> None:
    with kvpack.open(model / "k.safetensors", threads=2) as reader:
        numbers = reader.dequantize("a.weight")

        def child() -> bool:
            same = np.array_equal(reader.dequantize("a.weight"), numbers)
            in_a_fork(lambda: np.array_equal(reader.dequantize("a.weight"), numbers))  # and its own child
            reader.close()
            return same

        in_a_fork(child)
        assert np.array_equal(reader.dequantize("a.weight"), numbers)


def test_a_reader_that_was_used_after_a_fork_alone(model: Path) -> None:
    with kvpack.open(model / "k.safetensors", threads=2) as reader, kvpack.open(model / "k.safetensors") as other:
        numbers = other.dequantize("a.weight")
        in_a_fork(lambda: np.array_equal(reader.dequantize("a.weight"), numbers))


def test_a_fork_while_other_threads_decode(model: Path) -> None:
    with kvpack.open(model / "k.safetensors", threads=2) as reader:
        numbers = reader.dequantize("a.weight")
        stop = threading.Event()

        def decode() -> None:
            while not stop.is_set():
                reader.dequantize("a.weight")

        busy = [threading.Thread(target=decode) for _ in range(2)]
        for thread in busy:
            thread.start()
        try:
            for _ in range(5):
                in_a_fork(lambda: np.array_equal(reader.dequantize("a.weight"), numbers))
        finally:
            stop.set()
            for thread in busy:
                thread.join()


def test_compress_and_verify_after_a_fork(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "s.safetensors"
    save_file({"a.weight": weights(256, 256)}, source)
    kvpack.compress(source, tmp_path / "parent.safetensors")
    in_a_fork(
        lambda: (
            kvpack.compress(source, tmp_path / "child.safetensors").ratio > 1
            and kvpack.verify(tmp_path / "child.safetensors", source, threads=2).mismatches == {}
        )
    )
    assert (tmp_path / "child.safetensors").read_bytes() == (tmp_path / "parent.safetensors").read_bytes()


def test_the_compiler_is_waited_for_by_a_fork(model: Path) -> None:
    """A thread that compiles holds numba's lock; a child must not find it locked."""
    from numba.core.compiler_lock import global_compiler_lock

    compiling = threading.Event()

    def compile_something() -> None:
        with global_compiler_lock:
            compiling.set()
            time.sleep(0.5)

    thread = threading.Thread(target=compile_something)
    thread.start()
    compiling.wait()

    def child() -> bool:
        with global_compiler_lock:
            return True

    in_a_fork(child)
    thread.join()
    with global_compiler_lock:
        pass


def test_multiprocessing(model: Path) -> None:
    """As a DataLoader's workers are made on Linux."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    with kvpack.open(model / "k.safetensors") as reader:
        total = float(reader.dequantize("a.weight").sum())
        queue = context.Queue()
        workers = [
            context.Process(target=lambda: queue.put(float(reader.dequantize("a.weight").sum()))) for _ in range(2)
        ]
        for worker in workers:
            worker.start()
        assert [queue.get(timeout=FORK_SECONDS) for _ in workers] == [total, total]
        for worker in workers:
            worker.join(FORK_SECONDS)
            assert worker.exitcode == 0


def test_uploads_after_a_fork(tmp_path: Path) -> None:
    """A streamed model reads on in a child; what was under way at the fork is refused there, not waited for."""
    torch = pytest.importorskip("torch")
    from kvpack.format.container import OpenFile
    from kvpack.runtime.device import upload as upload_module

    (tmp_path / "numbers").write_bytes(bytes(range(100)))
    file, gate = OpenFile(tmp_path / "numbers"), threading.Event()
    read = upload_module.read_exactly

    def gated(*arguments: Any) -> None:
        gate.wait()
        read(*arguments)

    def pieces() -> list[Any]:
        return [upload_module.Piece(file, 7, torch.zeros(20, dtype=torch.uint8))]

    with pytest.MonkeyPatch.context() as patch, upload_module.Uploader(torch.device("cpu")) as uploader:
        patch.setattr(upload_module, "read_exactly", gated)
        begun = uploader.submit(pieces())

        def child() -> bool:
            with pytest.raises(StreamingError, match="when the process was forked"):
                begun.wait()
            gate.set()
            own = uploader.submit(pieces())
            own.wait()
            return bytes(own.pieces[0].target.tolist()) == bytes(range(7, 27))

        try:
            in_a_fork(child)
        finally:
            gate.set()  # leaving the uploader waits for what it reads
        begun.wait()
        assert begun.pieces[0].target.tolist() == list(range(7, 27))


def test_a_pool_makes_its_threads_late() -> None:
    pool = ThreadPool(2)
    assert pool._executor is None
    first = pool.executor
    assert pool.executor is first
    pool.close()
    assert pool.executor is not first
    pool.close()


# Files that change while they are read -------------------------------------------------------------------------------


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    """Other bytes, as many, a moment later."""
    with path.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"\xff" * 1000)
    later = path.stat().st_mtime_ns + 1_000_000
    os.utime(path, ns=(later, later))


IN_A_PROCESS = """
import sys, os
from pathlib import Path
sys.path.insert(0, {tests!r})
import kvpack
from kvpack.format.container import OpenFile
from test_machine import cut, overwrite
path, change, late = Path(sys.argv[1]), {{"cut": cut, "overwrite": overwrite}}[sys.argv[2]], int(sys.argv[3])
read, calls = OpenFile.read_into, 0

def changing(self, view, offset):
    global calls
    calls += 1
    if calls == 2 + late and self.path == path:  # the header takes two
        change(path)
    read(self, view, offset)

OpenFile.read_into = changing
try:
    {work}
except kvpack.FileChangedError as error:
    print(error)
else:
    print("nothing was noticed in", calls, "reads")
"""

WORK = {
    "compress": "kvpack.compress(path, sys.argv[4])",
    "verify": "kvpack.verify(path)",
    "decompress": "kvpack.decompress(path, sys.argv[4])",
    "dequantize": "[kvpack.open(path).dequantize(name) for name in ('a.weight', 'big.norm')]",
}


@pytest.mark.parametrize("change", ["cut", "overwrite"])
@pytest.mark.parametrize("late", [1, 3])
@pytest.mark.parametrize("work", WORK)
def test_a_file_that_changes_while_it_is_read(model: Path, tmp_path: Path, work: str, change: str, late: int) -> None:
    """In a process, since a signal would end it: a mapped file that is cut raises SIGBUS."""
    path = copy(model / ("m.safetensors" if work == "compress" else "k.safetensors"), tmp_path / "f.safetensors")
    code = IN_A_PROCESS.format(tests=str(ROOT / "tests"), work=WORK[work])
    done = subprocess.run(
        [sys.executable, "-c", code, path, change, str(late), tmp_path / "out.safetensors"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{path} " in done.stdout
    assert "while it was read" in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["f.safetensors"]


def test_a_file_that_is_cut_while_a_command_reads_it(model: Path, tmp_path: Path) -> None:
    """No hook: `kvpack verify` is started again and again, and its file is cut at some time."""
    for wait in (0.3, 0.6, 1.0):
        path = copy(model / "k.safetensors", tmp_path / "f.safetensors")
        process = subprocess.Popen(
            [sys.executable, "-m", "kvpack", "verify", str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        time.sleep(wait)
        cut(path)
        _, err = process.communicate(timeout=300)
        assert process.returncode in (0, 3), err  # before or behind the command, or a corrupt file; never a signal
        assert "Traceback" not in err


def test_a_replaced_file_is_read_as_it_was(model: Path, tmp_path: Path) -> None:
    """A rename leaves the opened file as it is."""
    path = copy(model / "k.safetensors", tmp_path / "f.safetensors")
    with kvpack.open(path) as reader, kvpack.open(model / "k.safetensors") as same:
        (tmp_path / "other").write_bytes(b"other")
        (tmp_path / "other").rename(path)
        assert np.array_equal(reader.dequantize("a.weight"), same.dequantize("a.weight"))


def test_the_error_is_of_both_kinds(tmp_path: Path) -> None:
    """A FormatError for who reads files, an OSError for who loads them."""
    save_file({"a": np.zeros(1000, np.float32)}, tmp_path / "a.safetensors")
    with Container(tmp_path / "a.safetensors") as container:
        cut(tmp_path / "a.safetensors")
        with pytest.raises(
            FileChangedError, match=r"a\.safetensors ended while it was read \(20\d\d bytes now"
        ) as found:
            container.data("a")
    assert isinstance(found.value, OSError)
    assert isinstance(found.value, kvpack.FormatError)


def test_reading_takes_what_it_reads(model: Path, tmp_path: Path) -> None:
    """A 40 MB tensor is passed on in pieces, whatever the direction."""
    code = (
        "import resource, sys, kvpack\n"
        "kvpack.verify(sys.argv[1])\n"  # what kernels and imports take
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "kvpack.decompress(sys.argv[2], sys.argv[3], threads=1)\n"
        "kvpack.verify(sys.argv[2], sys.argv[3], threads=1)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)\n"
    )
    save_file(
        {"big.norm": np.zeros(100_000_000, np.uint8), "a.weight": weights(256, 256)}, tmp_path / "big.safetensors"
    )
    save_file({"a.weight": weights(256, 256)}, tmp_path / "small.safetensors")
    for name in ("big", "small"):
        kvpack.compress(tmp_path / f"{name}.safetensors", tmp_path / f"{name}-k.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", code, *(tmp_path / f"{name}.safetensors" for name in ("small-k", "big-k", "out"))],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert int(done.stdout) < 80, done.stdout  # MB: two pieces of 16 MiB at a time


# What the machine refuses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EMFILE, "Too many open files", "m"), "Too many open files: m; a higher limit of open files"),
        (OSError(errno.ENFILE, "Too many open files in system", "m"), "all programs of this machine together"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free some space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "your quota is used up"),
        (OSError(errno.EROFS, "Read-only file system", "o"), "Read-only file system: o; -o names an output"),
        (PermissionError(errno.EACCES, "Permission denied", "o"), "Permission denied: o; check the permissions"),
        (
            MemoryError("Unable to allocate 3.00 GiB"),
            "not enough memory (Unable to allocate 3.00 GiB); fewer",
        ),
        (MemoryError(), "not enough memory; fewer --threads"),
        (RuntimeError("can't start new thread"), "no thread can be started; fewer --threads"),
        (CacheFullError("no memory for 4 pages"), "no memory for 4 pages"),
    ],
    ids=str,
)
@pytest.mark.parametrize("as_json", [False, True])
def test_each_failure_is_one_sentence(
    error: BaseException, said: str, as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    import typer

    from kvpack.cli.failures import exit_codes

    with pytest.raises(typer.Exit) as found, exit_codes(as_json):
        raise error
    assert found.value.exit_code == 1
    out, err = capsys.readouterr()
    if as_json:
        assert err == ""
        assert said in json.loads(out)["message"]
    else:
        assert err.count("\n") == 1
        assert err.startswith("kvpack: ")
        assert said in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
@pytest.mark.parametrize("option", [[], ["--json"]])
def test_a_report_that_cannot_be_printed(tmp_path: Path, option: list[str]) -> None:
    save_file({"w": np.zeros((4, 4), np.float32)}, tmp_path / "m.safetensors")
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "kvpack", "inspect", str(tmp_path / "m.safetensors"), *option]
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert process.returncode == 1
    assert process.stderr == "kvpack: the report could not be printed: No space left on device\n"


def test_another_runtime_error_is_a_traceback() -> None:
    from kvpack.cli.failures import exit_codes

    with pytest.raises(RuntimeError, match="a bug"), exit_codes(False):
        raise RuntimeError("a bug")


def limits(name: int, value: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(name, (value, value))


def test_little_memory(model: Path, tmp_path: Path) -> None:
    """The address space ends while a tensor of 2 GB is decoded."""
    source = tmp_path / "zeros.safetensors"
    save_file({"a.weight": weights(64, 64)}, source)
    kvpack.compress(source, tmp_path / "k.safetensors")
    code = (
        "import resource, sys\n"
        "from kvpack.cli import main\n"
        "from kvpack.encode.reader import Reader\n"
        "import numpy as np\n"
        "def much(self, name, dtype): np.ones(1 << 33, np.uint8)\n"
        "Reader.dequantize = much\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "sys.argv = ['kvpack', 'decompress', *sys.argv[1:]]\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "k.safetensors", "-o", tmp_path / "out.safetensors"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("kvpack: not enough memory (Unable to allocate 8.00 GiB")
    assert done.stderr.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["k.safetensors", "zeros.safetensors"]


def test_a_read_only_folder(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    source = tmp_path / "a.safetensors"
    save_file({"a.weight": weights(64, 64)}, source)
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    done = run("compress", source, "-o", folder / "out.safetensors")
    assert done.returncode == 1
    assert "Permission denied" in done.stderr
    assert "check the permissions" in done.stderr


# Kernels without a cache ---------------------------------------------------------------------------------------------


def square(x: float) -> float:
    return x * x


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import numba

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(jit, "_told", False)
    return tmp_path


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EMFILE])
def test_a_kernel_that_cannot_be_cached(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    compiled = jit.kernel(square)

    def failing(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(compiled._cache._cache_file, "save", failing)
    with pytest.warns(RuntimeWarning, match=os.strerror(number)) as told:
        results = compiled(3.0), compiled(3)  # two kernels, told once
    assert results == (9.0, 9)
    assert len(told) == 1


def test_a_damaged_cache_is_mended(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert jit.kernel(square)(3.0) == 9.0
    (index,) = fresh_cache.rglob("*.nbi")
    whole = index.stat().st_size
    for damaged in (b"", index.read_bytes()[:20]):
        index.write_bytes(damaged)
        monkeypatch.setattr(jit, "_told", False)
        with pytest.warns(RuntimeWarning, match="cannot be cached"):
            assert jit.kernel(square)(3.0) == 9.0
        assert index.stat().st_size == whole
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert jit.kernel(square)(3.0) == 9.0


def test_no_place_for_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*_: object) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(jit, "_KernelCache", nowhere)
    monkeypatch.setattr(jit, "_told", False)
    with pytest.warns(RuntimeWarning, match="no locator available"):
        compiled = jit.kernel(square)
    assert compiled(4.0) == 16.0


# Names that are no UTF-8 ---------------------------------------------------------------------------------------------


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    source = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff.safetensors"))
    save_file({"a.weight": weights(128, 128)}, tmp_path / "m.safetensors")
    (tmp_path / "m.safetensors").rename(source)
    output = source.with_name(os.fsdecode(b"k\xfe.safetensors"))
    for arguments in (
        ("compress", source, "-o", output),
        ("inspect", output),
        ("verify", output, "--against", source),
        ("decompress", output, "-o", source.with_name(os.fsdecode(b"back\xff.safetensors"))),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stderr) == (0, ""), arguments
        report = run(*arguments, "--json", *(["--force"] if arguments[0] in ("compress", "decompress") else []))
        assert json.loads(report.stdout)["ok"] is True
    missing = run("inspect", source.with_name(os.fsdecode(b"none\xff")), "--json")
    assert missing.returncode == 2
    assert json.loads(missing.stdout)["message"].endswith("none\udcff does not exist")


def test_shards_whose_names_an_index_cannot_hold(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for number in (1, 2):
        save_file({f"l{number}.weight": weights(128, 128)}, tmp_path / "m.safetensors")
        (tmp_path / "m.safetensors").rename(folder / os.fsdecode(b"s%d\xff.safetensors" % number))
    with pytest.raises(InputError, match=r"safetensors' is no name in UTF-8, which JSON needs: rename the file"):
        kvpack.compress(folder, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["model"]


# What a killed process leaves ----------------------------------------------------------------------------------------


def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from kvpack.encode.model_directory import directory_in_place\n"
        "from kvpack.format.container import ContainerWriter\n"
        "folder = Path(sys.argv[1])\n"
        "writer = ContainerWriter(folder / 'out.safetensors')\n"
        "writer.add('a', 'U8', [1], [b'1'])\n"
        "with directory_in_place(folder / 'model') as temporary:\n"
        "    ContainerWriter(temporary / 'shard.safetensors').add('a', 'U8', [1], [b'1'])\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, tmp_path], check=False, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2
    # Neither of another output, nor of another form, nor no file of ours at all.
    others = [".other.safetensors.12345678.data", ".out.safetensors.1234567.data", ".out.safetensors.12345678.bak"]
    for name in others:
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / ".out.safetensors.12345678.data").symlink_to(tmp_path / others[0])

    source = tmp_path / "source"
    source.mkdir()
    save_file({"a.weight": weights(64, 64)}, source / "a.safetensors")
    kvpack.compress(source / "a.safetensors", tmp_path / "out.safetensors")
    kvpack.compress(source, tmp_path / "model")
    left = {*others, ".out.safetensors.12345678.data", "model", "out.safetensors", "source"}
    assert set(os.listdir(tmp_path)) == left


def test_what_is_in_use_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    with ContainerWriter(target) as running:
        running.add("a", "U8", [1], [b"1"])
        assert remove_abandoned(target, "data", "tmp") == []
        with ContainerWriter(target) as other:
            other.finish({})
        running.finish({})
    assert os.listdir(tmp_path) == ["out.safetensors"]
    file = create_file(tmp_path / hidden_name("x", "tmp"))
    folder = create_directory(tmp_path / hidden_name("x", "tmp"))
    assert remove_abandoned(tmp_path / "x", "tmp") == []
    os.close(folder)
    file.close()
    assert len(remove_abandoned(tmp_path / "x", "tmp")) == 2
    assert os.listdir(tmp_path) == ["out.safetensors"]


def test_a_file_that_is_removed_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its creation and its lock it looks abandoned: its maker must notice, and make another."""
    lock, path = fcntl.flock, tmp_path / "x"
    removed = []

    def late(descriptor: int, operation: int) -> None:
        if not removed:
            path.unlink()
            removed.append(path)
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with create_file(path) as file:
        file.write(b"here")
    assert path.read_bytes() == b"here"


# Expansion of a whole file -------------------------------------------------------------------------------------------


def test_many_constant_tensors_are_refused_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each keeps the limit of a tensor, all of them do not keep that of a file."""
    source = tmp_path / "equal.safetensors"
    save_file({f"{i}.weight": np.full((512, 512), 0.5, np.float32) for i in range(4)}, source)
    kvpack.compress(source, tmp_path / "k.safetensors", preset="lossless")
    monkeypatch.setattr(blob_decoder, "FREE_ELEMENTS", 1 << 18)
    monkeypatch.setattr(blob_decoder, "ELEMENTS_PER_BLOB_BYTE", 0)
    with pytest.raises(
        LimitError, match=r"k\.safetensors: 1048576 elements in \d+ bytes of blobs exceed the limit of 262144"
    ):
        kvpack.decompress(tmp_path / "k.safetensors", tmp_path / "back.safetensors")
    assert not (tmp_path / "back.safetensors").exists()
    kvpack.decompress(tmp_path / "k.safetensors", tmp_path / "back.safetensors", max_elements=1 << 20)
    assert kvpack.verify(tmp_path / "k.safetensors", source).mismatches == {}  # a tensor at a time


def test_what_is_written_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer keeps what a reader would refuse for the sake of the file."""
    monkeypatch.setattr(blob_decoder, "FREE_ELEMENTS", 1 << 18)
    monkeypatch.setattr(blob_decoder, "ELEMENTS_PER_BLOB_BYTE", 0)
    source = tmp_path / "equal.safetensors"
    save_file({f"{i}.weight": np.full((256, 512), 0.5, np.float32) for i in range(4)}, source)
    report = kvpack.compress(source, tmp_path / "k.safetensors", preset="lossless")
    kept = [tensor.name for tensor in report.tensors if tensor.method == "keep"]
    assert len(kept) == 2
    assert all("readers refuse" in str(tensor.reason) for tensor in report.tensors if tensor.method == "keep")
    kvpack.decompress(tmp_path / "k.safetensors", tmp_path / "back.safetensors")
    assert kvpack.verify(tmp_path / "k.safetensors", source).mismatches == {}


def test_twenty_constant_tensors_in_a_file_of_two_megabytes(tmp_path: Path) -> None:
    """5.4·10⁹ elements: no process may take them for what the bytes are worth."""
    from blob_surgery import mend_crcs  # noqa: F401  (the blobs are made by the encoder's own front)

    tiles = 2048  # 256 × 512 elements each
    tile = bytes([0]) + bytes(15)
    layout = integer_layout("compact", ElementKind.SIGNED, 8)
    header = BlobHeader(layout=layout, rows=256 * tiles, cols=512, tile_cols=512)
    meta = np.zeros(tiles, TILE_METADATA)
    meta["data_offset"] = 16 * np.arange(tiles)
    meta["data_size"] = meta["raw_offset"] = meta["outlier_offset"] = 16
    meta["mode"] = 2
    meta["payload_crc32"] = zlib.crc32(tile)
    blob = pack_front(header, b"", meta, 16 * tiles) + tile * tiles
    entries = {f"{i}": {"shape": [256 * tiles, 512], "dtype": "I8"} for i in range(20)}
    path = tmp_path / "bomb.safetensors"
    with ContainerWriter(path) as writer:
        for name in entries:
            writer.add(f"{name}_kvpack", "U8", [len(blob)], [blob])
        writer.finish({"kvpack_version": "1", "kvpack_tensors": json.dumps(entries)})
    assert path.stat().st_size < 2_100_000
    done = run("decompress", path, "-o", tmp_path / "out.safetensors", preexec_fn=limits(resource.RLIMIT_AS, 4 << 30))
    assert done.returncode == 3, done.stderr
    assert "5368709120 elements in" in done.stderr
    assert os.listdir(tmp_path) == ["bomb.safetensors"]


def test_headers_are_read_with_the_file_s_size_in_mind(tmp_path: Path) -> None:
    """A header that claims 90 MB in a file of 100 bytes allocates nothing."""
    path = tmp_path / "short.safetensors"
    path.write_bytes(struct.pack("<Q", 90_000_000) + b"{}" * 46)
    with pytest.raises(container_module.NotAContainerError, match="90000000 bytes in a file of 100"):
        Container(path)
