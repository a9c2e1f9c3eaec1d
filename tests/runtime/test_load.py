"""kvpack.load against the CPU reader; the uploader's chunks; what damaged files and absent devices lead to."""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from happens_before import Detector, detecting  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from small_models import LAYERS, layer_file  # noqa: E402

import kvpack  # noqa: E402
from kvpack.encode.model_directory import write_json  # noqa: E402
from kvpack.encode.model_tree import INDEX_NAME  # noqa: E402
from kvpack.encode.reader import Reader  # noqa: E402
from kvpack.errors import (  # noqa: E402
    DeviceError,
    DirectoryIndexError,
    FormatError,
    HeaderCrcError,
    InputError,
    LaneStateError,
    ModelMismatchError,
    PayloadCrcError,
    TensorCrcError,
)
from kvpack.format import container as container_module  # noqa: E402
from kvpack.format.container import Container  # noqa: E402
from kvpack.format.open_files import OpenFile  # noqa: E402
from kvpack.runtime.device import upload as upload_module  # noqa: E402
from kvpack.runtime.device.upload import Piece, Uploader, split_pieces  # noqa: E402
from kvpack.runtime.weights import load as load_module  # noqa: E402
from kvpack.runtime.weights.device_blob import SLACK_BYTES, DeviceBlob  # noqa: E402
from kvpack.runtime.weights.linear import RansLinear  # noqa: E402
from kvpack.runtime.weights.load import TORCH_DTYPES, CrcChecks, State, load, resolve_device  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layer_file(tmp_path_factory.mktemp("load"))


def as_tensor(array: np.ndarray[Any, Any]) -> Any:
    """An array of any dtype as the tensor of the same bits."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def assert_equals_reader(state: State, path: Path) -> None:
    with kvpack.open(path) as reader:
        assert list(state) == reader.keys()
        for name in reader:
            tensor, info = state[name], reader.info(name)
            assert isinstance(tensor, DeviceBlob) == (info is not None), name
            if info is None:
                stored = reader.container(name).tensors[name]
                assert tensor.dtype == TORCH_DTYPES[stored.dtype]
                assert tensor.shape == stored.shape
                plain = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                assert plain == bytes(reader.container(name).data(name)), name
            else:
                assert (tensor.shape, tensor.dtype) == (info.shape, TORCH_DTYPES[info.dtype])
                assert len(tensor.blob) == info.blob_bytes + SLACK_BYTES
                assert not tensor.blob[info.blob_bytes :].any()
                expected = as_tensor(reader.dequantize(name, "original"))
                assert tensor.dequantize().cpu().equal(expected), name


@pytest.mark.parametrize("verify", [False, True])
def test_file(path: Path, verify: bool) -> None:
    state = load(path, "cpu", verify=verify)
    assert_equals_reader(state, path)
    assert state.device == CPU
    assert state.nbytes == sum(tensor.nbytes for tensor in state.values())
    assert "coded" in repr(state)


def test_small_chunks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that span many reads, and reads that span many tensors."""
    for size in (100, 4096):
        monkeypatch.setattr(load_module, "Uploader", lambda device, s=size, **kw: Uploader(device, chunk_bytes=s, **kw))
        assert_equals_reader(load(path, "cpu"), path)


def test_files_that_are_not_compressed(path: Path) -> None:
    original = path.with_name("others.safetensors")
    state = load(original, "cpu")
    for name, tensor in load_file(original).items():
        assert state[name].dtype == tensor.dtype
        assert state[name].equal(tensor)


def test_a_directory_with_components(tmp_path: Path) -> None:
    """Those of a subfolder have the folder before their names; a variant, the same weights again, is not loaded."""
    source = tmp_path / "pipe"
    torch.manual_seed(0)
    root, dense = torch.randn(64, 128), torch.randn(64, 128)
    for file, tensors in {
        "model.safetensors": {"a.weight": root},
        "model.fp16.safetensors": {"a.weight": root.half()},
        "2_Dense/model.safetensors": {"a.weight": dense, "a.bias": dense[:, 0].contiguous()},
    }.items():
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, source / file)
    packed = Path(str(kvpack.compress(source, preset="lossless").output))
    state = load(packed, "cpu")
    assert list(state) == ["2_Dense/a.bias", "2_Dense/a.weight", "a.weight"]
    assert state["a.weight"].dequantize().equal(root)
    x = torch.randn(3, 128)
    expected = torch.nn.functional.linear(x, dense, dense[:, 0])
    torch.testing.assert_close(state.linear("2_Dense/a")(x), expected)
    assert state.not_loaded == ["model.fp16.safetensors"]
    assert repr(state).endswith("; not loaded: model.fp16.safetensors>")
    assert load(packed / "2_Dense", "cpu")["a.weight"].dequantize().equal(dense)
    variant = load(packed / "model.fp16.safetensors", "cpu")
    assert variant["a.weight"].dequantize().equal(root.half())
    save_file({"a.weight": dense}, packed / "2_Dense" / "model.bf16.safetensors")
    (packed / "2_Dense" / "model.safetensors").rename(packed / "2_Dense" / "model.fp8.safetensors")
    with pytest.raises(InputError, match=r"several sets of weights.*'model\.bf16\.safetensors', 'model\.fp8"):
        load(packed / "2_Dense", "cpu")
    (packed / "2_Dense" / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(DirectoryIndexError, match="'gptq'"):
        load(packed, "cpu")


@pytest.mark.parametrize("index", [True, False])
def test_directory(path: Path, tmp_path: Path, index: bool) -> None:
    shards = [path.with_name("1.safetensors"), path.with_name("2.safetensors")]
    for shard in shards:
        (tmp_path / shard.name).write_bytes(shard.read_bytes())
    if index:
        names = {}
        for shard in shards:
            with Container(shard) as container:
                names |= dict.fromkeys(container.tensors, shard.name)
        write_json(tmp_path / INDEX_NAME, {"metadata": {"total_size": 0}, "weight_map": names})
    state, whole = load(tmp_path, "cpu"), load(path, "cpu")
    assert_equals_reader(state, tmp_path)
    assert list(state) == list(whole)


def test_names(path: Path) -> None:
    state = load(path, "cpu")
    layer = state.linear("biased")
    assert isinstance(layer, RansLinear)
    assert state.linear("biased") is layer
    assert state.linear("biased.weight") is layer
    assert layer.tensor_name == "biased.weight"
    assert layer.bias.equal(state["biased.bias"])
    assert state.linear("quantized").bias is None
    x = torch.randn(2, 416)
    torch.testing.assert_close(layer(x), x @ state["biased.weight"].dequantize().T + state["biased.bias"])
    assert "biased" not in state
    assert "biased.weight" in state
    assert len(state) == len(list(state)) == 16
    with pytest.raises(KeyError, match=r"no tensor 'nothing', and no 'nothing\.weight'"):
        state.linear("nothing")
    with pytest.raises(KeyError, match=r"'norm' is not coded"):
        state.linear("norm")
    with pytest.raises(ModelMismatchError, match="needs one matrix"):
        state.linear("experts")
    with pytest.raises(KeyError, match=r"no tensor 'biased'; linear\('biased'\) gives the layer"):
        _ = state["biased"]
    with pytest.raises(KeyError, match=r"no tensor 'norm\.weight'\"$"):
        _ = state["norm.weight"]
    assert state.get("nothing") is None


NAMES = ["a", "a.weight", "a.bias", "a.weight.weight", "a.weight.bias", "b.weight", "weight", "bias", ".weight", ""]


@given(coded=st.dictionaries(st.sampled_from(NAMES), st.booleans()), asked=st.lists(st.sampled_from(NAMES), max_size=8))
def test_state_is_a_mapping(path: Path, coded: dict[str, bool], asked: list[str]) -> None:
    """Whatever has been asked for, all ways to ask agree on the same names, those of the tensors."""
    blob, names = _matrix(path), list(coded)
    tensors = {name: blob if is_coded else torch.zeros(256) for name, is_coded in coded.items()}
    state = State(tensors, CPU)
    for name in asked:  # which leaves nothing behind
        if name not in state:
            with suppress(KeyError):
                state.linear(name)
    assert isinstance(state, Mapping)
    assert list(state) == list(state.keys()) == names
    assert len(state) == len(names)
    assert list(state.values()) == [state[name] for name in state]
    assert [(name, id(tensor)) for name, tensor in state.items()] == [(n, id(t)) for n, t in tensors.items()]
    default = object()
    for name in NAMES:
        there = name in tensors
        assert (name in state) == there
        assert (name in set(state.keys())) == there
        assert state.get(name, default) is (tensors[name] if there else default)
        if there:
            assert state[name] is tensors[name]
        else:
            with pytest.raises(KeyError):
                state[name]
        if isinstance(tensors.get(name), DeviceBlob) and f"{name}.weight" not in tensors:
            bias = tensors.get(name.removesuffix("weight") + "bias") if name.endswith(".weight") else None
            if not isinstance(bias, DeviceBlob):
                assert state.linear(name).prepare() is tensors[name]


@cache
def _matrix(path: Path) -> DeviceBlob:
    matrix = load(path, "cpu")["half.weight"]
    assert isinstance(matrix, DeviceBlob)
    return matrix


def test_layer_that_is_not_coded(path: Path) -> None:
    with pytest.raises(KeyError, match=r"'biased\.weight' is not coded"):
        _ = load(path.with_name("others.safetensors"), "cpu").linear("biased")


def test_conversion(path: Path) -> None:
    state, plain = load(path, "cpu", dtype=torch.bfloat16), load(path, "cpu")
    for name in ("norm", "biased.bias", "scalar", "none"):
        assert state[name].dtype == torch.bfloat16
        assert state[name].equal(plain[name].to(torch.bfloat16))
    for name in ("ids", "flags", "small.f8", "quantized.weight"):
        assert state[name].dtype == plain[name].dtype
    assert state["quantized.weight"].dequantize().dtype == torch.float32


def test_the_file_may_go_away(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(path.read_bytes())
    state = load(copy, "cpu")
    copy.write_bytes(bytes(copy.stat().st_size))
    copy.unlink()
    assert_equals_reader(state, path)


@pytest.mark.parametrize("verify", [False, True])
def test_file_replaced_while_it_is_loaded(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: bool
) -> None:
    """What is loaded is what was mapped and checked, not what has taken its name since."""
    copy, other = tmp_path / "copy.safetensors", tmp_path / "other.safetensors"
    copy.write_bytes(path.read_bytes())
    with kvpack.open(path) as reader:
        payload = reader.blob("quantized.weight").header.payload_offset
    damaged(path, tmp_path, "quantized.weight_kvpack", payload + 2200, 0x10).rename(other)

    def replaced_before(*arguments: Any, **options: Any) -> Any:
        other.rename(copy)
        return load_tensors(*arguments, **options)

    load_tensors = load_module.load_tensors
    monkeypatch.setattr(load_module, "load_tensors", replaced_before)
    state = load(copy, "cpu", verify=verify)
    assert not other.exists()
    assert_equals_reader(state, path)


def open_files() -> list[str]:
    """What this process has open, but for what Python's own modules may open at any time."""
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [link for link in links if link.endswith(".safetensors")]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
def test_files_are_closed(path: Path) -> None:
    before = open_files()
    state = load(path, "cpu", verify=True)
    assert open_files() == before
    with kvpack.open(path) as reader:
        assert len(open_files()) == len(before) + 1
    assert open_files() == before
    assert len(reader) == len(state)


def test_progress(path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[int, int]] = []
    load(path, "cpu", progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert (
        calls[-1][0]
        == calls[-1][1]
        == sum(t.size_bytes for t in Container(path).tensors.values() if not t.name.endswith("_scale"))
    )
    capfd.readouterr()
    load(path, "cpu")
    load(path, "cpu", progress=False)
    assert capfd.readouterr().err == ""  # no terminal

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for progress, shown in ((None, True), (False, False), (True, True)):
        monkeypatch.setattr(sys, "stderr", Terminal())
        monkeypatch.setenv("TERM", "xterm")
        load(path, "cpu", progress=progress)
        assert ("loading" in sys.stderr.getvalue()) == shown


# Damage -------------------------------------------------------------------------------------------------------------


def damaged(path: Path, folder: Path, name: str, offset: int, bits: int = 1) -> Path:
    """A copy with one byte of a stored tensor changed."""
    data = bytearray(path.read_bytes())
    with Container(path) as container:
        start = len(data) - max(t.end for t in container.tensors.values()) + container.tensors[name].begin
        data[start + (offset if offset >= 0 else container.tensors[name].size_bytes + offset)] ^= bits
    (folder / "damaged.safetensors").write_bytes(data)
    return folder / "damaged.safetensors"


def test_damaged_front(path: Path, tmp_path: Path) -> None:
    broken = damaged(path, tmp_path, "rows.weight_kvpack", 70)
    with pytest.raises(HeaderCrcError, match=r"damaged\.safetensors, tensor 'rows\.weight': header_crc32"):
        load(broken, "cpu")


def test_damaged_payload(path: Path, tmp_path: Path) -> None:
    """A changed word: found at once, and with verify=False by the first product."""
    with kvpack.open(path) as reader:
        payload = reader.blob("quantized.weight").header.payload_offset
    broken = damaged(path, tmp_path, "quantized.weight_kvpack", payload + 2200, 0x10)
    with pytest.raises(PayloadCrcError, match=r"tensor 'quantized\.weight': tile 0"):
        load(broken, "cpu")
    state = load(broken, "cpu", verify=False)
    with pytest.raises(FormatError):
        state.linear("quantized")(torch.zeros(1, 416))


@pytest.mark.parametrize("name", ["norm", "ids", "rows.weight_kvpack_scale"])
def test_damage_in_what_is_not_coded(path: Path, tmp_path: Path, name: str) -> None:
    broken = damaged(path, tmp_path, name, 8)
    with pytest.raises(TensorCrcError, match=rf"damaged\.safetensors, tensor {name!r}: kvpack_crc32"):
        load(broken, "cpu")
    load(broken, "cpu", verify=False)


def test_every_byte_counts(path: Path, tmp_path: Path) -> None:
    """Whichever byte of whichever tensor is changed, load says so, and names file and tensor."""
    rng = np.random.default_rng(5)
    found = 0
    with Container(path) as container:
        tensors = dict(container.tensors)
    for name, tensor in tensors.items():
        size = tensor.size_bytes
        few = {0, size - 1, *rng.integers(0, size, 12).tolist()} if size else set()
        for offset in sorted(few):
            broken = damaged(path, tmp_path, name, offset, 1 << int(rng.integers(8)))
            original = name.removesuffix("_kvpack_scale").removesuffix("_kvpack")
            with pytest.raises(FormatError, match=rf"damaged\.safetensors.*{original}"):
                load(broken, "cpu")
            found += 1
    assert found > 200


@pytest.mark.parametrize("name", ["norm", "rows.weight_kvpack_scale"])
def test_reader_checks_what_is_asked_for(path: Path, tmp_path: Path, name: str) -> None:
    broken = damaged(path, tmp_path, name, 8)
    original = name.removesuffix("_kvpack_scale")
    with kvpack.open(broken) as reader:
        reader.dequantize("ids" if name != "ids" else "norm")
        with pytest.raises(TensorCrcError, match=rf"damaged\.safetensors, tensor {name!r}: kvpack_crc32"):
            reader.dequantize(original)
    with kvpack.open(broken, verify=False) as reader:
        reader.dequantize(original)


def test_few_bytes_wait_for_their_checks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read is held until it is checked: a slow check holds up who reads."""
    limit, checked = 60_000, 0
    check = load_module.check_tiles

    def slow(payload: memoryview, tiles: Any, first: int) -> None:
        nonlocal checked
        time.sleep(0.02 * len(tiles))
        check(payload, tiles, first)
        checked += int(tiles["data_size"].sum())

    monkeypatch.setattr(load_module, "_MAX_PENDING_BYTES", limit)
    monkeypatch.setattr(load_module, "check_tiles", slow)
    with kvpack.open(path, threads=1) as reader, CrcChecks(reader) as checks:
        added = 0
        for name in [name for name in reader if reader.info(name)] * 2:
            host = reader.container(name).data(name + "_kvpack")
            added += int(reader.blob(name).tiles["data_size"].sum())
            checks.add(name, host)
            assert added - checked <= limit + len(host)
        checks.wait()
        assert added == checked > 4 * limit


def test_small_tensors_are_checked_together(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One task for a thread, not one each; and what comes behind a damaged one of them is not looked at."""
    checked: list[int] = []
    check = load_module.check_tiles

    def noted(payload: memoryview, tiles: Any, first: int) -> None:
        checked.append(len(payload))
        check(payload, tiles, first)

    monkeypatch.setattr(load_module, "check_tiles", noted)
    with kvpack.open(path, threads=1) as reader, CrcChecks(reader) as checks:
        names = [name for name in reader if reader.info(name)]
        hosts = [reader.container(name).data(name + "_kvpack") for name in names]
        assert sum(map(len, hosts)) < load_module._CHECK_BYTES
        for name, host in zip(names, hosts, strict=True):
            checks.add(name, host)
        assert checked == []
        checks.wait()
        assert len(checked) >= len(names) > 2
        broken = bytearray(hosts[1])
        broken[-20] ^= 1
        checked.clear()
        for name, host in zip(names, [hosts[0], memoryview(broken), *hosts[2:]], strict=True):
            checks.add(name, host)
        with pytest.raises(FormatError, match=rf"tensor {names[1]!r}: tile \d+: "):
            checks.wait()
        assert len(checked) == 2


def test_few_bytes_are_read_ahead(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with kvpack.open(path) as reader:
        names = [name for name in reader if reader.info(name)] * 2
        sizes = [load_module.stored_bytes(reader, name) for name in names]
        limit = 2 * max(sizes)
        monkeypatch.setattr(load_module, "_MAX_PENDING_BYTES", limit)
        waited: list[str] = []
        taken = 0
        for name, host in zip(names, load_module._coded_bytes(reader, names, waited.append), strict=True):
            assert host == reader.container(name).data(name + "_kvpack")
            taken += len(host)
            assert sum(sizes[: len(waited)]) - taken <= limit
        assert sorted(waited) == sorted(names)
        assert taken == sum(sizes) > 2 * limit


def test_host_buffers_share_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a tensor of its own all the same, with room for slack, and none lies in another's."""
    monkeypatch.setattr(load_module, "_HOST_BLOCK_BYTES", 20_000)
    sizes = [100, 50_000, 7_000, 1, 4_096, 12_345]
    buffers = load_module._host_buffers(sizes)
    assert [len(buffer) for buffer in buffers] == [size + SLACK_BYTES for size in sizes]
    assert [buffer.untyped_storage().nbytes() for buffer in buffers] == [len(buffer) for buffer in buffers]
    for number, buffer in enumerate(buffers):
        buffer.fill_(number)
    assert all((buffer == number).all() for number, buffer in enumerate(buffers))


def check_all(reader: Reader, names: list[str]) -> None:
    with CrcChecks(reader) as checks:
        for name in names:
            checks.add(name)
        checks.wait()


@pytest.mark.parametrize("intact", [True, False])
def test_kept_tensors_are_checked_in_parts(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, intact: bool
) -> None:
    """Where the host has not got their bytes, it reads them for the check alone."""
    file = path if intact else damaged(path, tmp_path, "norm", 1000)
    parts = []
    read = Container.read

    def noted(self: Container, name: str, begin: int, end: int) -> memoryview:
        parts.append((begin, end))
        return read(self, name, begin, end)

    monkeypatch.setattr(container_module, "_COPY_BYTES", 512)
    with kvpack.open(file) as reader:
        monkeypatch.setattr(Container, "read", noted)
        with nullcontext() if intact else pytest.raises(TensorCrcError, match=r"tensor 'norm': kvpack_crc32"):
            check_all(reader, ["norm"])
    assert parts == [(0, 512), (512, 1024), (1024, 1200)]


def test_no_check_is_left_behind_an_error(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for what is of no interest any more."""
    begun = 0
    check = Container.check_crc32

    def slow(self: Container, name: str, data: memoryview | None = None) -> bool:
        nonlocal begun
        begun += 1
        time.sleep(0.05)
        return check(self, name, data)

    monkeypatch.setattr(Container, "check_crc32", slow)
    with kvpack.open(damaged(path, tmp_path, "norm", 8), threads=1) as reader:
        with pytest.raises(TensorCrcError):
            check_all(reader, ["norm", *["ids"] * 40])
        reader._executor.shutdown()
    assert begun < 10


def test_lanes_of_all_tensors(path: Path) -> None:
    """Kernels count corrupt lanes beside each tensor; whichever it is, it is found and named."""
    with kvpack.open(path) as reader:
        tensors = dict(load(path, "cpu"))
        load_module.check_lanes(reader, {})
        load_module.check_lanes(reader, tensors)
        tensors["rows.weight"].status[:] = torch.tensor([3, ~0])
        with pytest.raises(LaneStateError, match=r"safetensors, tensor 'rows\.weight': 3 lanes did not end"):
            load_module.check_lanes(reader, tensors)


def test_damaged_scale(path: Path, tmp_path: Path) -> None:
    broken = damaged(path, tmp_path, "quantized.weight_kvpack_scale", 3, 0x80)
    with pytest.raises(FormatError, match=r"scale 0 of 'quantized\.weight' is -"):
        load(broken, "cpu", verify=False)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing.safetensors", "cpu")


# Devices ------------------------------------------------------------------------------------------------------------


def test_devices(path: Path) -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device(torch.device("cpu", 0)) == CPU
    if not torch.cuda.is_available():
        assert resolve_device(None) == CPU
        assert load(path).device == CPU
        with pytest.raises(DeviceError, match="device='cpu'"):
            load(path, "cuda")
        with pytest.raises(DeviceError, match="device='cpu'"):
            resolve_device("cuda:3")
    with pytest.raises(DeviceError, match="not on 'meta': use device='cpu'"):
        load(path, "meta")
    for device in ("bogus", "cuda:x", "cuda:-2"):
        with pytest.raises(DeviceError, match=rf"^'{device}' is no device \([^\n]*\): use 'cuda', 'cuda:1' or 'cpu'$"):
            load(path, device)


@pytest.mark.parametrize(
    ("cuda", "message"),
    [
        (None, r"is built without CUDA: pip uninstall torch, then pip install 'kvpack\[cuda13\]'.*device='cpu'"),
        ("13.0", r"is built for CUDA 13\.0, but finds no CUDA device: see whether `nvidia-smi`.*device='cpu'"),
    ],
)
def test_advice_where_there_is_no_device(monkeypatch: pytest.MonkeyPatch, cuda: str | None, message: str) -> None:
    """A torch without CUDA, and one with it on a machine without a GPU, lack different things."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=message):
        resolve_device("cuda:77")


# The uploader -------------------------------------------------------------------------------------------------------


@given(
    ranges=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 400), st.integers(0, 300)), max_size=8),
    chunk_bytes=st.integers(1, 200),
    gap_bytes=st.integers(0, 50),
)
def test_chunks_cover_pieces(ranges: list[tuple[int, int, int]], chunk_bytes: int, gap_bytes: int) -> None:
    files = [OpenFile(Path(__file__)), OpenFile(Path(__file__))]  # as if replaced in between
    pieces = [Piece(files[f], at, torch.empty(size, dtype=torch.uint8)) for f, at, size in ranges]
    chunks = split_pieces(pieces, chunk_bytes, gap_bytes)
    covered: list[list[tuple[int, int]]] = [[] for _ in pieces]
    for chunk in chunks:
        assert 0 < chunk.size <= chunk_bytes
        assert chunk.parts
        for number, begin, end in chunk.parts:
            assert pieces[number].file is chunk.file
            assert chunk.offset <= begin < end <= chunk.offset + chunk.size
            covered[number].append((begin, end))
    for piece, parts in zip(pieces, covered, strict=True):
        at = piece.offset
        for begin, end in sorted(parts):
            assert begin == at
            at = end
        assert at == piece.end


def test_neighbours_share_a_chunk() -> None:
    file = OpenFile(Path(__file__))
    pieces = [Piece(file, 100 * i, torch.empty(100, dtype=torch.uint8)) for i in (2, 0, 1, 3)]
    assert [(c.offset, c.size, len(c.parts)) for c in split_pieces(pieces, 1000, 0)] == [(0, 400, 4)]
    apart = [Piece(file, 300 * i, torch.empty(100, dtype=torch.uint8)) for i in range(3)]
    assert len(split_pieces(apart, 1000, 199)) == 3
    assert [c.size for c in split_pieces(apart, 1000, 200)] == [700]


@pytest.fixture
def detector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Detector]:
    with detecting(monkeypatch) as found:
        yield found


@pytest.fixture
def numbers(tmp_path: Path) -> tuple[OpenFile, bytes]:
    data = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8).tobytes()
    (tmp_path / "numbers").write_bytes(data)
    return OpenFile(tmp_path / "numbers"), data


def test_uploads(numbers: tuple[OpenFile, bytes]) -> None:
    file, data = numbers
    done: list[int] = []
    begun: list[int] = []
    with Uploader(CPU, threads=3, chunk_bytes=777, progress=done.append) as uploader:
        uploads = []
        for first in range(0, 100_000, 20_000):
            pieces = [
                Piece(file, at, torch.zeros(5_000, dtype=torch.uint8)) for at in range(first, first + 20_000, 5_000)
            ]
            uploads.append(uploader.submit(reversed(pieces), begin=lambda f=first: begun.append(f)))
        nothing = uploader.submit([], begin=lambda: begun.append(-1))
        nothing.wait()
        for upload in reversed(uploads):
            upload.wait_piece(2)
            piece = upload.pieces[2]
            assert bytes(piece.target.numpy()) == data[piece.offset : piece.end]
        for upload in uploads:
            upload.wait()
            for piece in upload.pieces:
                assert bytes(piece.target.numpy()) == data[piece.offset : piece.end]
    assert sum(done) == 100_000
    assert sorted(begun) == [-1, *range(0, 100_000, 20_000)]


def test_pieces_are_waited_for_singly(numbers: tuple[OpenFile, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    file, data = numbers
    gate, read = threading.Event(), upload_module.read_exactly

    def gated(file: OpenFile, view: Any, offset: int) -> None:
        assert offset < 1000 or gate.wait(10)
        read(file, view, offset)

    monkeypatch.setattr(upload_module, "read_exactly", gated)
    with Uploader(CPU, threads=2, chunk_bytes=500) as uploader:
        upload = uploader.submit([Piece(file, at, torch.zeros(1000, dtype=torch.uint8)) for at in (0, 1000, 2000)])
        upload.wait_piece(0)
        assert not gate.is_set()
        assert not upload.finished
        assert bytes(upload.pieces[0].target.numpy()) == data[:1000]
        gate.set()
        upload.wait_piece(2)
        assert bytes(upload.pieces[2].target.numpy()) == data[2000:3000]


def test_file_that_ends_too_early(numbers: tuple[OpenFile, bytes]) -> None:
    file, data = numbers
    with Uploader(CPU, chunk_bytes=1000) as uploader:
        upload = uploader.submit([Piece(file, 0, torch.zeros(len(data) + 1, dtype=torch.uint8))])
        with pytest.raises(OSError, match="ended while it was read"):
            upload.wait()
        with pytest.raises(OSError, match="ended while it was read"):
            upload.wait_piece(0)
        good = uploader.submit([Piece(file, 5, torch.zeros(10, dtype=torch.uint8))])
        good.wait()
        assert bytes(good.pieces[0].target.numpy()) == data[5:15]


def test_closing_with_work_left(numbers: tuple[OpenFile, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread goes on when close() has come to wait for it, not before: it would have read all on a busy machine."""
    file, _ = numbers
    go, started = threading.Event(), threading.Event()
    read = upload_module.read_exactly

    def gated(*arguments: Any) -> None:
        started.set()
        go.wait(10)
        read(*arguments)

    monkeypatch.setattr(upload_module, "read_exactly", gated)
    uploader = Uploader(CPU, threads=1, chunk_bytes=100)
    upload = uploader.submit([Piece(file, 0, torch.zeros(50_000, dtype=torch.uint8))])
    assert started.wait(10)
    shutdown = uploader._pool.shutdown

    def released(**options: Any) -> None:
        go.set()
        shutdown(**options)

    monkeypatch.setattr(uploader._pool, "shutdown", released)
    closing = threading.Thread(target=uploader.close)
    closing.start()
    closing.join(10)
    assert not closing.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        upload.wait()


def test_errors_of_begin_reach_the_waiter(numbers: tuple[OpenFile, bytes]) -> None:
    def begin() -> None:
        raise MemoryError("no room")

    with Uploader(CPU) as uploader:
        upload = uploader.submit([Piece(numbers[0], 0, torch.zeros(10, dtype=torch.uint8))], begin=begin)
        with pytest.raises(MemoryError, match="no room"):
            upload.wait()


@pytest.mark.parametrize("streams", [False, True])
def test_targets_of_inference_mode(
    numbers: tuple[OpenFile, bytes], streams: bool, request: pytest.FixtureRequest
) -> None:
    """The mode is a thread's own: torch refuses to write to such tensors from a thread without it."""
    if streams:  # pinned buffers and copies, as on CUDA
        request.getfixturevalue("detector")
    file, data = numbers
    with torch.inference_mode():
        target = torch.zeros(100_000, dtype=torch.uint8)

    def begin() -> None:
        target.fill_(1)

    with Uploader(CPU, threads=2, chunk_bytes=999) as uploader:
        uploader.submit([Piece(file, 0, target)], begin=begin).wait()
    assert target.is_inference()
    assert bytes(target.numpy()) == data


def test_uploads_are_ordered(numbers: tuple[OpenFile, bytes], detector: Detector) -> None:
    """Pinned buffers are reused behind their copies, targets written behind what the current stream did with them."""
    file, data = numbers
    target = torch.zeros(100_000, dtype=torch.uint8)
    for careful in (True, False):
        detector.watch(target, "the target")
        detector.access(target, write=False)
        with Uploader(CPU, threads=3, chunk_bytes=999) as uploader:
            begin = uploader.after_current_work() if careful else None
            upload = uploader.submit([Piece(file, 0, target)], begin=begin)
            upload.wait()
            if careful:
                assert upload.ready is not None
                detector.default.wait_event(upload.ready)
                detector.access(target, write=False)
        assert bytes(target.numpy()) == data
        assert detector.races == ([] if careful else ["the target: overwritten before it was read"])
        target.zero_()
        detector.races.clear()


# On a GPU -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("verify", [False, True])
def test_cuda_file(path: Path, verify: bool) -> None:
    state = load(path, "cuda", verify=verify)
    assert_equals_reader(state, path)
    assert state.device == torch.device("cuda", torch.cuda.current_device())


@pytest.mark.gpu
def test_cuda_small_chunks_under_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Little pinned memory, used again and again, while the current stream is busy with memory it has just freed."""
    monkeypatch.setattr(
        load_module, "Uploader", lambda device, **kw: Uploader(device, chunk_bytes=4096, threads=3, **kw)
    )
    for _ in range(3):
        junk = [torch.full((size,), 0x5A, dtype=torch.uint8, device="cuda") for size in (100_000, 300_000, 3_000_000)]
        torch.cuda._sleep(50_000_000)
        for tensor in junk:
            tensor.fill_(0xA5)
        del junk, tensor  # the loaded tensors may get this memory while it is still to be written
        assert_equals_reader(load(path, "cuda"), path)


@pytest.mark.gpu
def test_cuda_side_stream(path: Path) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        state = load(path, "cuda")
        assert_equals_reader(state, path)


@pytest.mark.gpu
def test_cuda_inference_mode(path: Path) -> None:
    with torch.inference_mode():
        assert_equals_reader(load(path, "cuda"), path)


@pytest.mark.gpu
def test_cuda_damaged_payload(path: Path, tmp_path: Path) -> None:
    """Lanes are checked at load, also where nobody looks at CRCs."""
    with kvpack.open(path) as reader:
        payload = reader.blob("quantized.weight").header.payload_offset
    broken = damaged(path, tmp_path, "quantized.weight_kvpack", payload + 2200, 0x10)
    with pytest.raises(FormatError, match=r"damaged\.safetensors, tensor 'quantized\.weight'"):
        load(broken, "cuda")


@pytest.mark.gpu
def test_cuda_devices(path: Path) -> None:
    assert resolve_device(None).type == "cuda"
    assert load(path).device.type == "cuda"
    with pytest.raises(DeviceError, match="cuda:99"):
        load(path, "cuda:99")


@pytest.mark.gpu
def test_cuda_warmup(path: Path) -> None:
    state = load(path, "cuda")
    count = kvpack.warmup(state, dtypes=[torch.float16], tokens=[1, 8])
    assert count == 2 * len(LAYERS)
