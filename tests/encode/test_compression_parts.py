"""Compression in parts: the bytes of one run, whoever made which part when, and what cannot be put together."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import kvpack
import kvpack.encode.compress as compress_module
from kvpack.cli import app
from kvpack.encode.model_tree import ModelTree
from kvpack.encode.moments import MomentsWriter
from kvpack.encode.parts import Parts, divide
from kvpack.encode.rate import FineHistogram
from kvpack.encode.tensor_encoder import Matrices, measure
from kvpack.errors import DamagedPartError, InputError, PartsMismatchError

Arrays = dict[str, npt.NDArray[Any]]
ROOT = Path(__file__).resolve().parents[2]
FILES = [f"model-{number:05}-of-00004.safetensors" for number in range(1, 5)]
COLS = 160
# What makes steps or tables depend on other tensors than the one that is coded, and what does not.
OPTIONS: dict[str, dict[str, Any]] = {
    "rate": {"bits": 4.0},
    "one step": {"bits": 4.0, "allocation": "model", "embeddings": "code"},
    "stacks": {"bits": 4.25, "stack": True, "tensor_parallel": 2},
    "exact": {"preset": "lossless", "tensor_bits": {"up_proj": 3.0}},
    "trellis": {"bits": 3.0, "quantizer": "trellis"},
}


def layer(number: int) -> Arrays:
    rng = np.random.default_rng(number)
    name = f"model.layers.{number}"
    rows = 64 + 64 * number
    return {
        f"{name}.self_attn.q_proj.weight": (rng.standard_t(5, (rows, COLS)) * 0.02).astype(np.float32),
        f"{name}.self_attn.k_proj.weight": (rng.standard_t(5, (64, COLS)) * 0.02).astype(np.float32),
        f"{name}.self_attn.v_proj.weight": (rng.standard_t(5, (64, COLS)) * 0.05).astype(np.float32),
        f"{name}.mlp.up_proj.weight": (rng.normal(size=(96, COLS)) * 0.04).astype(ml_dtypes.bfloat16),
        f"{name}.input_layernorm.weight": rng.normal(size=COLS).astype(np.float32),
    }


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four files of unlike sizes with an index, a folder with weights of its own, and files that are copied."""
    folder = tmp_path_factory.mktemp("original") / "model"
    (folder / "vision" / "more").mkdir(parents=True)
    weight_map = {}
    for number, name in enumerate(FILES):
        tensors = layer(number)
        if number == 0:
            tensors["model.embed_tokens.weight"] = np.random.default_rng(9).normal(size=(300, COLS)).astype(np.float32)
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"hidden_size": 160}')
    (folder / "tokenizer.json").write_text('{"a": 1}')
    save_file({"patch.proj.weight": layer(1)["model.layers.1.mlp.up_proj.weight"]}, folder / "vision" / "w.safetensors")
    (folder / "vision" / "config.json").write_text("{}")
    (folder / "vision" / "more" / "merges.txt").write_text("a b")
    return folder


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    folder.mkdir()
    for number in (1, 2):
        name = f"layers.{number}.up_proj.weight"
        save_file({name: layer(number)[f"model.layers.{number}.mlp.up_proj.weight"]}, folder / f"{number}.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    return folder


class Whole(NamedTuple):
    """What one run gives."""

    report: kvpack.CompressReport
    contents: dict[str, bytes]


@pytest.fixture(scope="module")
def whole(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    @cache
    def made(options: str) -> Whole:
        out = tmp_path_factory.mktemp("whole") / "out"
        return Whole(kvpack.compress(original, out, **OPTIONS[options]), contents(out))

    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def beside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def moments_of(model: Path, path: Path) -> Path:
    """Inputs of the layers' q, k and v; sensitivities that are unlike from layer to layer."""
    inputs = {}
    with MomentsWriter(path) as writer:
        for number in range(len(FILES)):
            x = np.random.default_rng(50 + number).standard_normal((500, COLS)).astype(np.float32)
            x[:, ::16] *= 5
            names = [f"model.layers.{number}.self_attn.{kind}_proj.weight" for kind in "qkv"]
            key = names[0]
            writer.add_second_moment(key, (COLS, COLS), iter([x.T @ x / len(x)]), np.array([500]))
            for name in names:
                rows = layer(number)[name].shape[0]
                writer.add_sensitivity(name, np.full(rows, 4.0**-number, np.float32))
                inputs[name] = key
        writer.finish(inputs, np.ones(300, np.int64), {"tokens": 500, "shapes": {}})
    return path


@pytest.mark.parametrize(
    ("options", "parts"),
    [*[("rate", parts) for parts in (1, 2, 3, 9)], ("one step", 3), ("stacks", 2), ("exact", 2), ("trellis", 2)],
)
def test_bytes_and_report_are_those_of_one_run(
    original: Path, tmp_path: Path, options: str, parts: int, whole: Callable[[str], Whole]
) -> None:
    """In an order drawn anew; more parts than files leave some of them without any."""
    numbers = [int(number) + 1 for number in np.random.default_rng(parts).permutation(parts)]
    for number in numbers:
        if (tmp_path / "out").exists():  # parts without files, after the last one that has some
            with pytest.raises(InputError, match="exists already"):
                kvpack.compress(original, tmp_path / "out", shards=(number, parts), **OPTIONS[options])
            continue
        report = kvpack.compress(original, tmp_path / "out", shards=(number, parts), **OPTIONS[options])
        part = report.part
        assert part is not None
        assert (part.number, part.of, part.found) == (number, parts, [])
        assert part.joined == (report.output is not None) == (not part.missing) == (not part.missing_parts)
        if not part.joined:
            assert not (tmp_path / "out").exists()
            assert sorted(file.path for file in report.files) == sorted(part.files)
            assert report.input_bytes == sum((original / file).stat().st_size for file in part.files)
    assert part.joined
    assert contents(tmp_path / "out") == whole(options).contents
    assert beside(tmp_path) == ["out"]
    assert kvpack.verify(tmp_path / "out", original).mismatches == {}
    one = whole(options).report
    found = report.as_dict() | {"output": one.output, "seconds": one.seconds}
    del found["part"]
    assert found == one.as_dict()


@pytest.mark.parametrize("embeddings", ["keep", "code"])
def test_steps_by_sensitivity(model: Path, tmp_path: Path, embeddings: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are found once, from all weights; the next parts read them."""
    moments = moments_of(model, tmp_path / "moments.safetensors")
    options: dict[str, Any] = {"bits": 3.5, "moments": moments, "embeddings": embeddings}
    whole = kvpack.compress(model, tmp_path / "one", **options)
    assert any("steps by sensitivity" in note for note in whole.notes)
    kvpack.compress(model, tmp_path / "out", shards=(2, 3), **options)
    monkeypatch.setattr(compress_module, "_common_step_plans", lambda *_: pytest.fail("steps were there"))
    kvpack.compress(model, tmp_path / "out", shards=(1, 3), **options)
    report = kvpack.compress(model, tmp_path / "out", shards=(3, 3), **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    assert report.notes == whole.notes
    assert report.tensors == whole.tensors
    late = kvpack.compress(model, tmp_path / "out", shards=(3, 3), **options).part
    assert late is not None
    assert late.was_there
    with pytest.raises(InputError, match="allocation is 'tensor' here, 'sensitivity' there"):
        kvpack.compress(model, tmp_path / "out", shards=(3, 3), **options, allocation="tensor")


def test_one_step_of_a_trellis(tmp_path: Path) -> None:
    """Weights of long tails are better off rounded, which the search finds; what is read of it has to say so."""
    folder = tmp_path / "model"
    folder.mkdir()
    for number in range(2):
        rng = np.random.default_rng(number)
        tails = rng.choice([-1, 1], (256, 512)) * rng.exponential(1, (256, 512)) ** 1.5 / 2.5
        matrices = {"up_proj": rng.normal(size=(256, 512)), "down_proj": tails}
        tensors = {f"layers.{number}.{name}.weight": values.astype(np.float32) for name, values in matrices.items()}
        save_file(tensors, folder / f"{number}.safetensors")
    (folder / "config.json").write_text("{}")
    options: dict[str, Any] = {"bits": 3.0, "quantizer": "trellis", "allocation": "model"}
    one = kvpack.compress(folder, tmp_path / "one", **options)
    assert {tensor.name.split(".")[2]: tensor.method for tensor in one.tensors} == {
        "up_proj": "trellis",
        "down_proj": "uniform",
    }
    for number in (2, 1):
        kvpack.compress(folder, tmp_path / "out", shards=(number, 2), **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def test_the_search_for_steps_is_divided(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Callable[[str], Whole]
) -> None:
    """What one part has found the other one does not look for; of a part that never begins, all is found."""
    counted: list[int] = []
    planned_bytes = compress_module.planned_bytes

    def counting(*arguments: Any) -> float:
        counted.append(1)
        return planned_bytes(*arguments)

    def ending(*_: Any) -> None:
        raise Stop

    monkeypatch.setattr(compress_module, "planned_bytes", counting)
    options = OPTIONS["one step"]
    with monkeypatch.context() as context:
        context.setattr(Parts, "write_steps", ending)
        with pytest.raises(Stop):
            kvpack.compress(original, tmp_path / "out", shards=(1, 2), **options)
    assert len(counted) >= 17  # four tensors of each of four files, and that of a folder
    found = sorted((tmp_path / "out.parts" / "findings" / "measure").rglob("*.json"))
    assert len(found) == 5
    counted.clear()
    found[0].unlink()
    kvpack.compress(original, tmp_path / "out", shards=(2, 2), **options)
    kvpack.compress(original, tmp_path / "out", shards=(1, 2), **options)
    assert counted == []
    assert contents(tmp_path / "out") == whole("one step").contents


def test_a_file_that_another_part_is_at_is_left_to_it(original: Path, tmp_path: Path) -> None:
    """A part looks after each tensor whether the file's own part has been ready with it meanwhile."""
    parts = Parts(tmp_path / "out", {})
    looked: list[tuple[str, int]] = []

    def work(file: Any) -> Iterator[tuple[str, int]]:
        for number in range(3):
            looked.append((file.path.name, number))
            if file.path.name == FILES[2] and number == 1:
                parts.write_finding("stage", file.path, {"theirs": 7})
            yield f"{file.path.name} {number}", number

    with ModelTree(original) as tree:
        model: Any = SimpleNamespace(tree=tree)
        own = [Path(FILES[1])]
        found = compress_module._found_by_parts(model, parts, own, "stage", work)
        assert [name for name, number in looked if number == 0] == [
            FILES[1],
            FILES[2],
            FILES[3],
            "w.safetensors",
            FILES[0],
        ]
        assert [number for name, number in looked if name == FILES[2]] == [0, 1]
        assert list(found) == [
            *(f"{name} {number}" for name in FILES[:2] for number in range(3)),
            "theirs",
            *(f"{name} {number}" for name in (FILES[3], "w.safetensors") for number in range(3)),
        ]
        looked.clear()
        assert compress_module._found_by_parts(model, parts, [Path(FILES[0])], "stage", work) == found
        assert looked == []


def test_histograms_in_json() -> None:
    rng = np.random.default_rng(3)
    for values in (rng.standard_normal((300, 200)), np.rint(rng.standard_normal((300, 200)) * 3), np.zeros((64, 80))):
        fine = measure(Matrices(values.astype(np.float32)))
        again = FineHistogram.unpacked(json.loads(json.dumps(fine.packed())))
        for name, value in vars(fine).items():
            other = getattr(again, name)
            if isinstance(value, np.ndarray):
                assert value.dtype == other.dtype
                np.testing.assert_array_equal(value, other)
            else:
                assert (type(value), value) == (type(other), other), name


def test_notes_of_other_parts_are_told_by_the_last(model: Path, tmp_path: Path) -> None:
    """Of stacks, of splits and of token counts: what the coding of a file has found, whoever coded it."""
    options: dict[str, Any] = {
        "bits": 4.5,
        "stack": True,
        "tensor_parallel": 3,
        "embeddings": "code",
        "token_counts": np.ones(7, np.int64),
    }
    whole = kvpack.compress(model, tmp_path / "one", **options)
    assert {note.partition(":")[0] for note in whole.notes} >= {"stack", "tensor parallel 3"}
    for number in (1, 2, 3, 4):
        report = kvpack.compress(model, tmp_path / "out", shards=(number, 4), **options)
    assert sorted(report.notes) == sorted(whole.notes)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 40])
def test_division(parts: int) -> None:
    for seed in range(20):
        sizes = np.random.default_rng(seed).integers(1, 1000, 30).tolist()
        divided = divide(sizes, parts)
        assert len(divided) == parts
        assert sorted(number for numbers in divided for number in numbers) == list(range(30))
        least = max(max(sizes), sum(sizes) / parts)
        assert max(sum(sizes[number] for number in numbers) for numbers in divided) <= 4 / 3 * least + 1
    assert [len(numbers) for numbers in divide([0, 0, 0, 0], 2)] == [2, 2]


# Killed, and run again


class Stop(BaseException):
    """As KeyboardInterrupt, of which nothing is caught on its way."""


PLACES = [
    "kvpack.encode.parts.Parts._create",
    "kvpack.encode.parts.Parts.write_record",
    "kvpack.encode.parts.Parts.write_steps",
    "kvpack.encode.parts.Parts.write_finding",
    "kvpack.encode.parts.Parts.check_whole",
    "kvpack.encode.parts.Parts.put_in_place",
    "kvpack.encode.parts.Parts.remove",
    "kvpack.encode.parts._sealed",
    "kvpack.encode.parts.file_crc32",
    "kvpack.encode.compress.copy_files",
    "kvpack.encode.compress.write_indexes",
    "kvpack.format.container.ContainerWriter.finish",
    "pathlib.Path.replace",
    "pathlib.Path.rename",
    "os.fsync",
]


@pytest.mark.parametrize("call", [1, 4])
@pytest.mark.parametrize("place", PLACES)
def test_parts_that_end_anywhere_go_on(
    small: Path, tmp_path: Path, place: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first call, at the second, and so on, in whatever part it comes."""
    options: dict[str, Any] = {"bits": 4.0, "allocation": "model"}
    one = kvpack.compress(small, tmp_path / "one", **options)
    owner, _, name = place.rpartition(".")
    module, _, kind = owner.rpartition(".")
    target: Any = __import__(owner if kind.islower() else module, fromlist=["x"])
    target = target if kind.islower() else getattr(target, kind)
    function: Callable[..., Any] = getattr(target, name)
    calls = 0

    def ending(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Stop
        return function(*arguments, **keywords)

    monkeypatch.setattr(target, name, ending)
    ended = 0
    for number in (1, 2):
        try:
            report = kvpack.compress(small, tmp_path / "out", shards=(number, 2), **options)
        except Stop:
            ended += 1
            report = kvpack.compress(small, tmp_path / "out", shards=(number, 2), **options)
    assert ended == (calls >= call)
    assert report.output == str(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    assert report.tensors == one.tensors
    assert beside(tmp_path) == ["one", "out", "small"]


def test_finished_files_are_not_made_again(model: Path, tmp_path: Path) -> None:
    first = kvpack.compress(model, tmp_path / "out", bits=4, shards=(1, 2))
    made = contents(tmp_path / "out.parts" / "model")
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out.parts" / "model").rglob("*.safetensors")}
    again = kvpack.compress(model, tmp_path / "out", bits=4, shards=(1, 2))
    assert again.part is not None
    assert again.part.found == again.part.files
    assert len(again.part.files) >= 2
    assert again.tensors == first.tensors
    assert (again.input_bytes, again.output_bytes) == (first.input_bytes, first.output_bytes)
    assert contents(tmp_path / "out.parts" / "model") == made
    found = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out.parts" / "model").rglob("*.safetensors")}
    assert found == times


def test_another_number_of_parts_goes_on_with_what_is_there(
    model: Path, tmp_path: Path, whole: Callable[[str], Whole]
) -> None:
    kvpack.compress(model, tmp_path / "out", bits=4, shards=(2, 5))
    report = kvpack.compress(model, tmp_path / "out", bits=4, shards=(1, 1))
    assert report.part is not None
    assert len(report.part.found) == 1
    assert contents(tmp_path / "out") == whole("rate").contents


def test_a_machine_that_loses_its_disk_cache(model: Path, tmp_path: Path, whole: Callable[[str], Whole]) -> None:
    """A file that is there by its name, and of zeros."""
    report = kvpack.compress(model, tmp_path / "out", bits=4, shards=(1, 2))
    assert report.part is not None
    lost = tmp_path / "out.parts" / "model" / report.part.files[0]
    lost.write_bytes(bytes(lost.stat().st_size))
    again = kvpack.compress(model, tmp_path / "out", bits=4, shards=(1, 2))
    assert again.part is not None
    assert again.part.found == report.part.files[1:]
    kvpack.compress(model, tmp_path / "out", bits=4, shards=(2, 2))
    assert contents(tmp_path / "out") == whole("rate").contents


def start(model: Path, out: Path, part: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "kvpack",
            "compress",
            model,
            "-o",
            out,
            *["--bits", "4", "--threads", "1", "--json", "--shards"],
            part,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_a_killed_process(model: Path, tmp_path: Path) -> None:
    """SIGKILL as soon as one file is finished; the next run makes the others alone."""
    for number in range(5, 9):
        save_file(
            {f"{number}": layer(number)[f"model.layers.{number}.mlp.up_proj.weight"]},
            model / "vision" / f"{number}.safetensors",
        )
    kvpack.compress(model, tmp_path / "one", bits=4)
    process = start(model, tmp_path / "out", "1/1")
    records = tmp_path / "out.parts" / "records"
    deadline = time.monotonic() + 120
    while not any(records.rglob("*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    if (tmp_path / "out").exists():
        pytest.skip("it was ready before it could be killed")
    report = kvpack.compress(model, tmp_path / "out", bits=4, shards=(1, 1))
    assert report.part is not None
    assert 1 <= len(report.part.found) < len(report.part.files)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    assert beside(tmp_path) == ["model", "one", "out"]


# Several at once


def test_processes_at_once(model: Path, tmp_path: Path, whole: Callable[[str], Whole]) -> None:
    """Each of two parts twice. One that begins when all is done says so."""
    processes = [start(model, tmp_path / "out", part) for part in ("1/2", "2/2", "1/2", "2/2")]
    joined = 0
    for process in processes:
        out, err = process.communicate(timeout=300)
        report = json.loads(out)
        if process.returncode == 0:
            joined += report["part"]["joined"]
        else:
            assert (process.returncode, report["error"]) == (2, "InputError"), err
            assert "exists already" in report["message"]
    assert joined >= 1
    assert contents(tmp_path / "out") == whole("rate").contents
    assert beside(tmp_path) == ["model", "out"]


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "method", ["finished", "making", "write_record", "record_of", "check_whole", "joining", "put_in_place", "remove"]
)
def test_another_process_joins_meanwhile(
    small: Path,
    tmp_path: Path,
    method: str,
    finished: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two that do the same part: the other one begins, ends and completes the output at any one point of this one."""
    kvpack.compress(small, tmp_path / "one", bits=4)
    kvpack.compress(small, tmp_path / "out", bits=4, shards=(2, 2))
    if finished:
        with monkeypatch.context() as context:
            context.setattr(compress_module, "_join", lambda *_: None)
            kvpack.compress(small, tmp_path / "out", bits=4, shards=(1, 2))
    original = getattr(Parts, method)
    nested: list[kvpack.CompressReport] = []

    def interrupted(*arguments: Any, **keywords: Any) -> Any:
        monkeypatch.setattr(Parts, method, original)
        if not nested and not (tmp_path / "out").exists():
            nested.append(kvpack.compress(small, tmp_path / "out", bits=4, shards=(1, 2)))
        return original(*arguments, **keywords)

    monkeypatch.setattr(Parts, method, interrupted)
    report = kvpack.compress(small, tmp_path / "out", bits=4, shards=(1, 2))
    for one in (report, *nested):
        assert one.part is not None
        assert one.part.joined
        assert one.part.missing == []
        assert one.output == str(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    assert beside(tmp_path) == ["one", "out", "small"]


def test_threads_at_once(model: Path, tmp_path: Path, whole: Callable[[str], Whole]) -> None:
    errors: list[BaseException] = []
    barrier = threading.Barrier(3)

    def work(number: int) -> None:
        barrier.wait()
        try:
            kvpack.compress(model, tmp_path / "out", bits=4, shards=(number, 3), threads=1)
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in (1, 2, 3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert errors == []
    assert contents(tmp_path / "out") == whole("rate").contents
    assert beside(tmp_path) == ["model", "out"]


# What does not belong together


def refuse(model: Path, out: Path, *expected: str, number: int = 2, **options: Any) -> None:
    with pytest.raises(PartsMismatchError) as caught:
        kvpack.compress(model, out, shards=(number, 2), **{"bits": 4, **options})
    for text in expected:
        assert text in str(caught.value)


def change(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


def test_other_options(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    kvpack.compress(model, out, bits=4, shards=(1, 2))
    before = contents(out.with_name("out.parts"))
    refuse(model, out, "bits is 5.0 here, 4.0 there", "out.parts was begun otherwise", bits=5)
    refuse(model, out, "exclude is 'q_proj' here, None there", "layout is 'fast'", layout="fast", exclude="q_proj")
    refuse(model, out, "vectors: token counts. All parts", token_counts=np.ones(300, np.int64), embeddings="keep")
    refuse(
        model,
        out,
        "calibration is given here, None there",
        "token counts, moments",
        moments=moments_of(model, tmp_path / "m.safetensors"),
    )
    with monkeypatch.context() as context:
        context.setattr(compress_module, "__version__", "0.0.1")
        refuse(model, out, "kvpack is '0.0.1' here")
    with monkeypatch.context() as context:
        context.setattr(compress_module._Model, "decisions_crc32", lambda *_: "0")
        refuse(model, out, f"what tensors are: {FILES[0]}")
    assert contents(out.with_name("out.parts")) == before
    assert kvpack.compress(model, out, bits=4, shards=(2, 2)).output == str(out)


def test_another_source(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kvpack.compress(model, out, bits=4, shards=(1, 2))
    for name, alter in (
        ("weights: " + FILES[3], lambda folder: save_file(layer(7) | layer(3), folder / FILES[3])),
        ("weights: " + FILES[2], lambda folder: change_weights(folder / FILES[2])),
        ("weights: x.safetensors", lambda folder: save_file({"x": np.zeros(3, np.float32)}, folder / "x.safetensors")),
        ("rewritten files: config.json", lambda folder: change(folder / "config.json", b"160", b"161")),
        ("copied files: tokenizer.json", lambda folder: (folder / "tokenizer.json").write_text('{"b": 22}')),
        ("copied files: vision/more/merges.txt", lambda folder: change(folder / "vision/more/merges.txt", b"b", b"c")),
    ):
        other = tmp_path / "other"
        shutil.copytree(model, other)
        if name.endswith(FILES[3]):  # an index that fits
            index = other / "model.safetensors.index.json"
            text = json.loads(index.read_text())
            text["weight_map"] |= dict.fromkeys(layer(7), FILES[3])
            index.write_text(json.dumps(text))
        alter(other)
        refuse(other, out, name)
        shutil.rmtree(other)
    assert kvpack.compress(model, out, bits=4, shards=(2, 2)).output == str(out)


def change_weights(path: Path) -> None:
    """A fine-tune's: the same header, each weight a little larger."""
    save_file({name: (values * 1.01).astype(values.dtype) for name, values in layer(2).items()}, path)


def test_a_part_that_was_brought_from_elsewhere(model: Path, tmp_path: Path, whole: Callable[[str], Whole]) -> None:
    """Files and records of one part, made on a machine of its own, in a directory with those of others."""
    kvpack.compress(model, tmp_path / "out", bits=4, shards=(1, 2))
    for bits, joins in ((5, False), (4, True)):
        kvpack.compress(model, tmp_path / "elsewhere", bits=bits, shards=(2, 2))
        brought = tmp_path / "elsewhere.parts"
        for folder in ("model", "records"):
            shutil.copytree(brought / folder, tmp_path / "out.parts" / folder, dirs_exist_ok=True)
        shutil.rmtree(brought)
        if joins:
            assert kvpack.compress(model, tmp_path / "out", bits=4, shards=(1, 2)).output == str(tmp_path / "out")
        else:
            refuse(model, tmp_path / "out", "(part 2/2) was made otherwise: bits is 4.0 here, 5.0 there", number=1)
    assert contents(tmp_path / "out") == whole("rate").contents


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("harm", [damage, cut, Path.unlink])
@pytest.mark.parametrize("kind", ["file", "record"])
def test_damage_is_found_before_the_output_is_complete(
    small: Path, tmp_path: Path, harm: Callable[[Path], None], kind: str
) -> None:
    kvpack.compress(small, tmp_path / "one", bits=4)
    first = kvpack.compress(small, tmp_path / "out", bits=4, shards=(1, 2))
    assert first.part is not None
    name = first.part.files[-1]
    parts = tmp_path / "out.parts"
    harm(parts / "model" / name if kind == "file" else parts / "records" / f"{name}.json")
    if kind == "file":
        with pytest.raises(DamagedPartError, match=f"{name} is not as it was written: run part 1/2 again"):
            kvpack.compress(small, tmp_path / "out", bits=4, shards=(2, 2))
    else:
        other = kvpack.compress(small, tmp_path / "out", bits=4, shards=(2, 2))
        assert other.part is not None
        assert (other.part.missing, other.part.missing_parts) == ([name], [1])
    assert not (tmp_path / "out").exists()
    again = kvpack.compress(small, tmp_path / "out", bits=4, shards=(1, 2))
    assert again.part is not None
    assert again.part.found == first.part.files[:-1]
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def test_damaged_steps_are_found_again_and_a_damaged_job_is_named(
    model: Path, tmp_path: Path, whole: Callable[[str], Whole]
) -> None:
    options = OPTIONS["one step"]
    kvpack.compress(model, tmp_path / "out", shards=(1, 2), **options)
    damage(tmp_path / "out.parts" / "steps.json")
    job = tmp_path / "out.parts" / "job.json"
    text = job.read_bytes()
    damage(job)
    with pytest.raises(DamagedPartError, match=r"job\.json is missing or damaged.*remove .*out\.parts"):
        kvpack.compress(model, tmp_path / "out", shards=(2, 2), **options)
    job.write_bytes(text)
    kvpack.compress(model, tmp_path / "out", shards=(2, 2), **options)
    assert contents(tmp_path / "out") == whole("one step").contents


def test_a_strange_file_among_the_finished_ones(model: Path, tmp_path: Path) -> None:
    kvpack.compress(model, tmp_path / "out", bits=4, shards=(1, 2))
    strange = tmp_path / "out.parts" / "model" / "vision" / "old.safetensors"
    strange.parent.mkdir(exist_ok=True)
    strange.write_text("1")
    with pytest.raises(InputError, match=r"holds what is no part of the output: vision/old\.safetensors"):
        kvpack.compress(model, tmp_path / "out", bits=4, shards=(2, 2))
    strange.unlink()
    assert kvpack.compress(model, tmp_path / "out", bits=4, shards=(2, 2)).output == str(tmp_path / "out")


# What is refused


@pytest.mark.parametrize("shards", [(0, 2), (3, 2), (1, 0), (-1, -1), (1.0, 2), (True, 1), [1, 2], (1,), "1/2"])
def test_numbers_of_parts(model: Path, tmp_path: Path, shards: Any) -> None:
    with pytest.raises(InputError, match="a part and the number of all parts are needed"):
        kvpack.compress(model, tmp_path / "out", shards=shards)


def when_written(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """All but when files were read last."""
    found = {path: path.stat() for path in folder.rglob("*")}
    return {path: (stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in found.items()}


def test_a_part_that_comes_when_all_is_done(model: Path, tmp_path: Path) -> None:
    """Nothing is written if the output is what the part would help to make; what it is not, is said."""
    out = tmp_path / "out"
    for number in (1, 2):
        kvpack.compress(model, out, bits=4, shards=(number, 2))
    files = when_written(out)
    late = kvpack.compress(model, out, bits=4, shards=(1, 2))
    assert late.output == str(out)
    assert late.part is not None
    assert (late.part.was_there, late.part.joined, late.part.missing) == (True, True, [])
    assert late.part.found == late.part.files != []
    assert late.output_bytes == sum(path.stat().st_size for path in files if path.is_file())
    assert kvpack.compress(model, out, bits=4, shards=(3, 9)).part is not None, "another number of parts is fine"
    with pytest.raises(InputError, match=r"not as what is asked for: bits is 5\.0 here, 4\.0 there\. Move it away"):
        kvpack.compress(model, out, bits=5, shards=(1, 2))
    with pytest.raises(InputError, match=r"exclude is .* here, .* there"):
        kvpack.compress(model, out, bits=4, exclude="0", shards=(1, 2))
    assert when_written(out) == files
    assert beside(tmp_path) == ["model", "out"]
    path = out / FILES[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(InputError, match="exists already, and not as what is asked for"):
        kvpack.compress(model, out, bits=4, shards=(1, 2))
    path.write_bytes(whole)
    tensors = load_file(model / FILES[0])
    kept = next(name for name, tensor in tensors.items() if tensor.ndim == 1)
    save_file(tensors | {kept: tensors[kept] + 1}, model / FILES[0])
    with pytest.raises(InputError, match=f"tensors of {FILES[0]}: .*{re.escape(kept)}"):
        kvpack.compress(model, out, bits=4, shards=(1, 2))


@pytest.mark.parametrize("options", [{"bits": 4}, {"preset": "lossless"}])
def test_a_part_of_another_model_that_comes_when_all_is_done(
    model: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """One weight of the same names and shapes is another: who would have made it, says so."""
    out = tmp_path / "out"
    for number in (1, 2):
        kvpack.compress(model, out, **options, shards=(number, 2))
    file = next(file for file in FILES if any("q_proj" in name for name in load_file(model / file)))
    tensors = load_file(model / file)
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name][0, :8] *= -1.5
    save_file(tensors, model / file)
    said = []
    for number in (1, 2):
        try:
            kvpack.compress(model, out, **options, shards=(number, 2))
        except InputError as error:
            said.append(str(error))
    assert len(said) == 1
    assert re.search(rf"{re.escape(name)}: (noise is .*, recorded|its bits differ)", said[0])


def test_what_cannot_be_made_in_parts(model: Path, tmp_path: Path) -> None:
    out, part = tmp_path / "out", (1, 2)
    with pytest.raises(InputError, match="is one file, and parts are made of whole files"):
        kvpack.compress(model / FILES[0], tmp_path / "out.safetensors", shards=part)
    with pytest.raises(InputError, match="parts are made of whole files"):
        kvpack.compress(layer(1), out, shards=part)
    with pytest.raises(InputError, match="force exclude each other: each part would remove"):
        kvpack.compress(model, out, shards=part, force=True)
    with pytest.raises(InputError, match="dry_run exclude each other"):
        kvpack.compress(model, out, shards=part, dry_run=True)
    with pytest.raises(InputError, match="is in the input, which it would be part of"):
        kvpack.compress(model, model / "out", shards=part)
    out.mkdir()
    (out / "a.safetensors").write_text("old")
    with pytest.raises(InputError, match=r"not as what is asked for: its config\.json does not say"):
        kvpack.compress(model, out, shards=part)
    assert beside(tmp_path) == ["model", "out"]
    (out / "a.safetensors").unlink()  # an empty directory is no output
    for number in (1, 2):
        kvpack.compress(model, out, shards=(number, 2))
    assert kvpack.verify(out, model).mismatches == {}
    pickles = tmp_path / "pickles"
    pickles.mkdir()
    (pickles / "pytorch_model.bin").write_bytes(b"PK\3\4")
    with pytest.raises(InputError, match="is converted as a whole first, by each part"):
        kvpack.compress(pickles, tmp_path / "other", shards=part)


# The command


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def test_the_command(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("compress", model, "-o", out, "--bits", 4, "--shards")
    first = run(*command, "2/3")
    assert first.exit_code == 0
    assert first.stdout.splitlines()[-1].startswith("part 2/3: 2 files; ")
    assert first.stdout.splitlines()[-1].endswith(" files still missing, of parts 1/3, 3/3")
    again = run(*command, "2/3")
    assert "part 2/3: 2 files, 2 of them made before; " in again.stdout
    report = json.loads(run(*command, "1/3", "--json").stdout)
    assert report["ok"] is True
    assert report["output"] is None
    assert report["part"]["missing_parts"] == [3]
    last = run(*command, "3/3")
    assert last.stdout.splitlines()[-1].endswith(f"; all parts are there: wrote {out}")
    assert run("verify", out, "--against", model).exit_code == 0
    late = run(*command, "3/3")
    assert late.exit_code == 0
    assert late.stdout.splitlines()[-1] == f"part 3/3: {out} is there already, made with the same settings"


@pytest.mark.parametrize("value", ["2", "a/b", "1/", "/2", "-1/2", "1/2/3", "1.0/2"])
def test_values_that_are_no_part(model: Path, value: str) -> None:
    result = run("compress", model, "--shards", value, "--json")
    assert result.exit_code == 2
    assert "I/N" in result.output


def test_the_command_refuses(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("compress", model, "-o", out, "--bits", 4, "--shards", "1/2").exit_code == 0
    other = run("compress", model, "-o", out, "--bits", 5, "--shards", "2/2", "--json")
    assert other.exit_code == 2
    assert json.loads(other.stdout)["error"] == "PartsMismatchError"
    for file in (tmp_path / "out.parts" / "model").rglob("*.safetensors"):
        damage(file)
    damaged = run("compress", model, "-o", out, "--bits", 4, "--shards", "2/2", "--json")
    assert damaged.exit_code == 3
    assert json.loads(damaged.stdout)["error"] == "DamagedPartError"
    calibrated = run("compress", model, "-o", out, "--calibrate", "self", "--shards", "1/2", "--json")
    assert calibrated.exit_code == 2
    assert "kvpack moments" in json.loads(calibrated.stdout)["message"]
