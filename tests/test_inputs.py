"""Tensors in memory and checkpoints of torch: the bytes that the same tensors in a safetensors file would give."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.numpy import save_file as save_arrays  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import kvpack  # noqa: E402
from kvpack.cli import app  # noqa: E402
from kvpack.errors import DirectoryIndexError, InputError, NotAContainerError, NotInstalledError  # noqa: E402
from kvpack.format.container import Container  # noqa: E402
from kvpack.format.serialized import SerializedTensors  # noqa: E402
from kvpack.runtime.weights.checkpoints import tensor_source  # noqa: E402
from kvpack.runtime.weights.load import TORCH_DTYPES  # noqa: E402


def state(seed: int = 1) -> dict[str, Any]:
    """What a model may hold: matrices of three types, expanded and transposed ones, scalars, empties, ties."""
    random = torch.Generator().manual_seed(seed)
    wide = torch.randn(64, 96, generator=random) * 0.02
    tensors = {
        "b.weight": wide,
        "a.weight": (torch.randn(96, 80, generator=random) * 0.02).T,
        "half.weight": torch.randn(128, 128, generator=random).bfloat16() * 0.02,
        "every_second.weight": (torch.randn(64, 192, generator=random) * 0.02)[:, ::2],
        "expanded.bias": torch.ones(1).expand(96),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "steps": torch.arange(5),
        "mask": torch.tensor([True, False, True]),
    }
    tensors["tied.weight"] = tensors["b.weight"]
    tensors["view.weight"] = wide[:48]
    return tensors


def saved(tensors: dict[str, Any], path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def test_a_state_dict_gives_the_file_s_bytes(tmp_path: Path) -> None:
    tensors = state()
    expected = kvpack.compress(saved(tensors, tmp_path / "saved.safetensors"))
    report = kvpack.compress(OrderedDict(tensors), tmp_path / "direct.safetensors")
    assert (tmp_path / "direct.safetensors").read_bytes() == Path(expected.output).read_bytes()
    assert (report.input_bytes, report.ratio) == (expected.input_bytes, expected.ratio)
    assert report.notes == ["the same tensors as others, and stored again: 'tied.weight'"]
    assert sum(tensor.method == "uniform" for tensor in report.tensors) == 6


@pytest.mark.parametrize("options", [{"allocation": "model"}, {"preset": "lossless"}, {"dry_run": True}])
def test_whatever_the_options(tmp_path: Path, options: dict[str, Any]) -> None:
    tensors = state()
    expected = kvpack.compress(saved(tensors, tmp_path / "saved.safetensors"), **options)
    report = kvpack.compress(tensors, tmp_path / "direct.safetensors", **options)
    assert (report.output_bytes, report.tensors) == (expected.output_bytes, expected.tensors)
    assert (tmp_path / "direct.safetensors").exists() == ("dry_run" not in options)
    if expected.output:
        assert (tmp_path / "direct.safetensors").read_bytes() == Path(expected.output).read_bytes()


def test_arrays_of_any_strides_and_byte_order(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    weights = random.normal(0, 0.02, (64, 96)).astype(np.float32)
    arrays = {
        "w": weights.T,
        "reversed": weights[::-1, ::2],
        "big endian": weights.astype(">f4"),
        "bf16": weights.astype(ml_dtypes.bfloat16),
        "broadcast": np.broadcast_to(np.float16(2), (3, 5)),
        "scalar": np.array(7, np.int64),
        "flags": np.array([True, False]),
    }
    plain = {n: np.ascontiguousarray(a, a.dtype.newbyteorder("=")).reshape(a.shape) for n, a in arrays.items()}
    save_arrays(plain, tmp_path / "saved.safetensors")
    expected = kvpack.compress(tmp_path / "saved.safetensors")
    kvpack.compress(arrays, tmp_path / "direct.safetensors")
    assert (tmp_path / "direct.safetensors").read_bytes() == Path(expected.output).read_bytes()


def test_arrays_need_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np, kvpack\n"
        f"print(kvpack.compress({{'w': np.eye(64, dtype='f4')}}, {str(tmp_path / 'out.safetensors')!r}).output)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    with kvpack.open(tmp_path / "out.safetensors") as reader:
        assert reader.keys() == ["w"]


def test_the_file_that_tensors_make_is_the_library_s(tmp_path: Path) -> None:
    """Byte for byte, over all dtypes, whatever is read of it."""
    tensors: dict[str, Any] = {}
    for number, (name, dtype) in enumerate(TORCH_DTYPES.items()):
        size = torch.empty(3, 2, dtype=dtype).nbytes
        data = torch.arange(number, number + size, dtype=torch.uint8) % (2 if name == "BOOL" else 251)
        tensors[f"{number % 7}.é{name}"] = data.view(dtype).reshape(3, 2)
    metadata = {"format": "pt"}
    save_file(tensors, tmp_path / "saved.safetensors", metadata)
    expected = (tmp_path / "saved.safetensors").read_bytes()
    file = SerializedTensors(Path("x"), {n: tensor_source(n, t) for n, t in tensors.items()}, metadata)
    assert file.size_bytes == len(expected)
    random = np.random.default_rng(3)
    for begin, end in [(0, len(expected)), *np.sort(random.integers(0, len(expected), (200, 2)), axis=1).tolist()]:
        view = bytearray(end - begin)
        file.read_into(memoryview(view), begin)
        assert bytes(view) == expected[begin:end]
    with Container("x", file) as container:
        assert container.metadata == metadata
        assert container.tensors.keys() == tensors.keys()


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        (lambda: {"w": torch.zeros(2).to_sparse()}, "'w' is torch.sparse_coo"),
        (lambda: {"w": torch.zeros(2, device="meta")}, "'w' is on the meta device"),
        (
            lambda: {"w": torch.zeros(2, dtype=torch.complex128)},
            "'w' is torch.complex128, for which safetensors has no type",
        ),
        (lambda: {"w": torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)}, "'w' is quantized by torch"),
        (lambda: {"w": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])}, "'w' is nested"),
        (lambda: {"w": torch.nn.UninitializedParameter()}, "'w' is not initialized"),
        (lambda: {"w": np.zeros(2, np.complex128)}, "'w': safetensors has no type for an array of complex128"),
        (lambda: {"w": np.zeros(2, object)}, "no type for an array of object"),
        (lambda: {"w": [1.0, 2.0]}, "'w' is a list, and neither"),
        (lambda: {1: torch.zeros(2)}, "1 cannot be a tensor's name"),
        (lambda: {"__metadata__": torch.zeros(2)}, "'__metadata__' cannot be"),
        (lambda: {"\ud800": torch.zeros(2)}, "cannot be a tensor's name"),
        (dict, "no tensors"),
        (lambda: torch.nn.Linear(2, 2), "a Linear is neither a path nor a mapping"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:.*quantize_per_tensor")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_what_cannot_be_in_a_safetensors_file(tmp_path: Path, tensors: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        kvpack.compress(tensors(), tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_views_of_other_signs() -> None:
    """Tensors whose numbers are negated or conjugated when they are read."""
    imaginary = torch.tensor([1 + 2j, 3 - 4j]).conj()
    for tensor in (imaginary, imaginary.imag):
        data = tensor_source("w", tensor).read()
        assert np.array_equal(
            np.frombuffer(data, tensor.resolve_conj().resolve_neg().numpy().dtype), tensor.numpy(force=True)
        )


def test_tensors_in_memory_need_an_output() -> None:
    with pytest.raises(InputError, match="need the output's name"):
        kvpack.compress(state())


# Checkpoints of torch


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".bin", ".pth"])
def test_a_checkpoint(tmp_path: Path, zipped: bool, suffix: str) -> None:
    tensors = state()
    path = tmp_path / f"pytorch_model{suffix}"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    expected = kvpack.compress(saved(tensors, tmp_path / "saved.safetensors", {"format": "pt"}))
    report = kvpack.compress(path)
    assert report.output == str(tmp_path / "pytorch_model.kvpack.safetensors")
    assert Path(report.output).read_bytes() == Path(expected.output).read_bytes()
    assert report.notes == ["the same tensors as others, and stored again: 'tied.weight'"]


@pytest.mark.parametrize("name", ["state_dict", "model", "model_state_dict"])
def test_a_trainer_s_checkpoint(tmp_path: Path, name: str) -> None:
    tensors = {"w": state()["b.weight"]}
    momentum = {"state": {0: {"exp_avg": torch.zeros(64, 96)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({name: tensors, "optimizer": momentum, "epoch": 3}, tmp_path / "last.pt")
    expected = kvpack.compress(saved(tensors, tmp_path / "saved.safetensors", {"format": "pt"}))
    report = kvpack.compress(tmp_path / "last.pt")
    assert Path(report.output).read_bytes() == Path(expected.output).read_bytes()
    (note,) = report.notes
    assert f"the tensors are those of '{name}'; 'optimizer', 'epoch' left out" in note


def test_entries_that_are_no_tensors_are_named(tmp_path: Path) -> None:
    torch.save({"w": state()["b.weight"], "version": 2, "config": {"dim": 96}}, tmp_path / "m.pt")
    process = subprocess.run(
        [sys.executable, "-m", "kvpack", "compress", str(tmp_path / "m.pt")], capture_output=True, text=True, check=True
    )
    assert f"{tmp_path / 'm.pt'}: 'version', 'config' left out: no tensors\n" in process.stdout


class Anything:
    """What only a loader that runs code would make."""


def cut(path: Path) -> None:
    torch.save(state(), path)
    path.write_bytes(path.read_bytes()[:-3000])


def cut_early(path: Path) -> None:
    torch.save({"state_dict": {"w": torch.zeros(64, 128)}}, path)
    path.write_bytes(path.read_bytes()[:9000])


def script(path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(4, 4)), path)


@pytest.mark.parametrize(
    ("write", "error", "match"),
    [
        (lambda p: torch.save({"w": torch.zeros(2), "args": Anything()}, p), InputError, "could run code"),
        (lambda p: torch.save(torch.zeros(2), p), InputError, "one tensor without a name"),
        (lambda p: torch.save([torch.zeros(2)], p), InputError, "holds a list"),
        (lambda p: torch.save({"epoch": 3}, p), InputError, "holds no tensors"),
        (lambda p: torch.save({"g": {"w": torch.zeros(2)}, "d": {"w": torch.zeros(2)}}, p), InputError, "'g', 'd'"),
        (lambda p: torch.save({"w": torch.zeros(2), "model": {"w": torch.zeros(2)}}, p), InputError, "beside them"),
        (
            lambda p: torch.save({"model": {"w": torch.zeros(2)}, "state_dict": {"w": torch.ones(2)}}, p),
            InputError,
            "which",
        ),
        (cut, NotAContainerError, "a PyTorch pickle that torch cannot read"),
        (cut_early, NotAContainerError, "it is cut short"),
        (script, InputError, "TorchScript"),
        (
            lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\nsize 5\n"),
            NotAContainerError,
            "git-lfs",
        ),
        (lambda p: zipfile.ZipFile(p, "w").writestr("a.txt", "a"), NotAContainerError, "a zip archive"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_checkpoints_that_cannot_be_read(tmp_path: Path, write: Any, error: type[Exception], match: str) -> None:
    path = tmp_path / "pytorch_model.bin"
    write(path)
    with pytest.raises(error, match=match) as caught:
        kvpack.compress(path)
    assert str(caught.value).startswith(str(path))
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_without_torch(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "m.bin")
    code = "import sys; sys.modules['torch'] = None\nfrom kvpack.cli import main; main()"
    command = [sys.executable, "-c", code, "compress", str(tmp_path / "m.bin")]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 5
    assert "it takes torch, which is not installed: pip install 'kvpack[torch]'" in process.stderr


def test_safetensors_under_another_name_stay_what_they_are(tmp_path: Path) -> None:
    tensors = {"w": state()["b.weight"]}
    saved(tensors, tmp_path / "m.bin")
    assert kvpack.compress(tmp_path / "m.bin").notes == []


def checkpoint_directory(path: Path) -> tuple[Path, dict[str, Any]]:
    """Two shards of a model with their index, and what lies beside them."""
    path.mkdir()
    first, second = {"b.weight": state()["b.weight"]}, {"a.weight": state()["a.weight"], "steps": torch.arange(5)}
    torch.save(first, path / "pytorch_model-00001-of-00002.bin")
    torch.save(second, path / "pytorch_model-00002-of-00002.bin")
    where = {name: f"pytorch_model-0000{n}-of-00002.bin" for n, part in ((1, first), (2, second)) for name in part}
    index = {"metadata": {"total_size": 55336}, "weight_map": where}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "tokenizer.json").write_text("{}")
    return path, first | second


def test_a_directory_of_checkpoints(tmp_path: Path) -> None:
    source, tensors = checkpoint_directory(tmp_path / "model")
    report = kvpack.compress(source)
    output = tmp_path / "model-kvpack"
    assert report.output == str(output)
    assert sorted(p.name for p in output.iterdir()) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert not (output / "tokenizer.json").is_symlink()
    assert sum("read with torch, and coded as model-0000" in note for note in report.notes) == 2
    kvpack.decompress(output, tmp_path / "back")
    with kvpack.open(tmp_path / "back") as back:
        assert back.keys() == sorted(tensors)
        assert back.stored("steps").tolist() == [0, 1, 2, 3, 4]
        error = back.dequantize("a.weight") - tensors["a.weight"].numpy()
        assert (error**2).sum() < 10**-2 * (tensors["a.weight"].numpy() ** 2).sum()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "model", "model-kvpack"]


def test_a_directory_of_checkpoints_that_lacks_one(tmp_path: Path) -> None:
    source, _ = checkpoint_directory(tmp_path / "model")
    (source / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(DirectoryIndexError, match=r"names 'pytorch_model-00002-of-00002\.bin', which does not exist"):
        kvpack.compress(source)
    assert list(tmp_path.iterdir()) == [source]


def test_a_directory_of_pointers(tmp_path: Path) -> None:
    source, _ = checkpoint_directory(tmp_path / "model")
    pointer = source / "pytorch_model-00002-of-00002.bin"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12345\n")
    with pytest.raises(NotAContainerError, match=f"{pointer}: not a PyTorch pickle but a git-lfs pointer .*12,345"):
        kvpack.compress(source)
    assert list(tmp_path.iterdir()) == [source]


def test_an_output_in_a_directory_of_checkpoints_is_no_part_of_it(tmp_path: Path) -> None:
    source, _ = checkpoint_directory(tmp_path / "model")
    (source / ".cache").mkdir()
    (source / ".cache" / "x.safetensors").write_bytes(b"half a download")
    (source / "loop").symlink_to(".")
    for force in (False, True):
        report = kvpack.compress(source, source / "out", force=force)
        assert sorted(p.name for p in (source / "out").iterdir()) == [
            "config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json",
        ]
        assert {file.path: file.reason for file in report.files if file.action == "left out"} == {".cache": "hidden"}
        assert f"{source / 'loop'}: left out, a link to a folder that contains it" in report.notes


def test_verify_against_checkpoints(tmp_path: Path) -> None:
    source, _ = checkpoint_directory(tmp_path / "model")
    single = source / "pytorch_model-00001-of-00002.bin"
    packed = tmp_path / "one.safetensors"
    kvpack.compress(source)
    kvpack.compress(single, packed)

    def verify(output: Path, against: Path) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["verify", str(output), "--against", str(against)])
        return result.exit_code, result.output

    code, said = verify(tmp_path / "model-kvpack", source)
    assert (code, "compared with the original, 5 files too" in said) == (0, True), said
    assert verify(packed, single)[0] == 0
    (source / "tokenizer.json").write_text("[]")
    torch.save({name: tensor + 1 for name, tensor in torch.load(single).items()}, single)
    code, said = verify(tmp_path / "model-kvpack", source)
    assert code == 4
    assert "tokenizer.json: its bytes differ" in said
    assert verify(packed, single)[0] == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model-kvpack", "one.safetensors"]


def test_what_a_killed_conversion_left_is_removed(tmp_path: Path) -> None:
    source, _ = checkpoint_directory(tmp_path / "model")
    script = (
        "import os, signal, sys, kvpack.compression as c\n"
        "c.compress_with = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "c.compress(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", script, str(source)], check=False)
    (left,) = (path for path in tmp_path.iterdir() if path != source)
    assert (left / "model-00001-of-00002.safetensors").exists()
    kvpack.compress(source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model-kvpack"]


@pytest.mark.parametrize("name", ["consolidated.00.pth", "model.bin", "model.gguf"])
def test_a_directory_of_weights_by_other_names_says_what_to_give(tmp_path: Path, name: str) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / name).write_bytes(b"x")
    with pytest.raises(InputError, match=f"by their own names, as {name} here"):
        kvpack.compress(tmp_path / "m")


def test_gguf_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "m.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(100))
    with pytest.raises(NotInstalledError, match=r"gguf: pip install 'kvpack\[gguf\]'"):
        kvpack.compress(tmp_path / "m.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.gpu
def test_tensors_on_a_gpu(tmp_path: Path) -> None:
    tensors = state()
    expected = kvpack.compress(saved(tensors, tmp_path / "saved.safetensors"))
    kvpack.compress({name: tensor.cuda() for name, tensor in tensors.items()}, tmp_path / "direct.safetensors")
    assert (tmp_path / "direct.safetensors").read_bytes() == Path(expected.output).read_bytes()
