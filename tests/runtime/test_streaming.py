"""Streamed layers give the results of resident ones, whatever the order, the source and the timing."""

from __future__ import annotations

import copy
import gc
import mmap
import pickle
import random
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from happens_before import Detector, FakeStream, detecting  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402

import kvpack  # noqa: E402
from kvpack.errors import FormatError, StreamingError  # noqa: E402
from kvpack.format.container import Container  # noqa: E402
from kvpack.runtime.device import upload as upload_module  # noqa: E402
from kvpack.runtime.weights import offload  # noqa: E402
from kvpack.runtime.weights.device_blob import SLACK_BYTES  # noqa: E402
from kvpack.runtime.weights.linear import RansLinear  # noqa: E402
from kvpack.runtime.weights.load import load  # noqa: E402
from kvpack.runtime.weights.offload import LayerStream, run_concurrently, stream_modules  # noqa: E402
from kvpack.runtime.weights.replace import replace_linears  # noqa: E402

LAYERS = 7
WIDTH = 128

# Before a detector puts others in their place.
REGISTER, UNREGISTER = offload._register, offload._unregister


class Block(nn.Module):
    def __init__(self, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, inner)
        self.down = nn.Linear(inner, WIDTH, bias=False)
        self.disturb: Callable[[], None] = lambda: None

    def forward(self, x: Any) -> Any:
        self.disturb()
        h = torch.nn.functional.gelu(self.up(self.norm(x)))
        self.disturb()
        return x + self.down(h)


class Model(nn.Module):
    """Layers of different sizes, so that slots hold now this layout of blobs, now that."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, WIDTH)
        self.blocks = nn.ModuleList(Block(96 + 64 * (i % 3)) for i in range(LAYERS))

    def forward(self, x: Any) -> Any:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streaming")
    torch.manual_seed(0)
    save_file(Model().state_dict(), folder / "in.safetensors")
    kvpack.compress(folder / "in.safetensors", folder / "out.safetensors", kvpack.QuantConfig(bits=4.5))
    return folder / "out.safetensors"


def resident(path: Path, device: str = "cpu") -> Model:
    model = Model().eval()
    replace_linears(model, path, device=device)
    return model


def streamed(path: Path, source: str, device: str = "cpu", prefetch: int = 2) -> tuple[Model, LayerStream]:
    """Never loaded: the coded weights come from the file."""
    with torch.device("meta"):
        model = Model().eval()
    replace_linears(model, path, device=device, defer=model.blocks)
    stream = stream_modules(model, model.blocks, source=source, path=path, prefetch=prefetch, device=device)
    return model, stream


@pytest.fixture
def detector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Detector]:
    with detecting(monkeypatch) as found:
        yield found


def inputs(seed: int = 0, device: str = "cpu") -> Any:
    return torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize("prefetch", [0, 1, 2, 5, 6, 20])
@pytest.mark.parametrize("source", ["pinned", "disk"])
def test_same_results(path: Path, source: str, prefetch: int) -> None:
    expected = resident(path)
    model, stream = streamed(path, source, prefetch=prefetch)
    with stream, torch.no_grad():
        for seed in range(4):
            assert model(inputs(seed)).equal(expected(inputs(seed)))
        slots = min(prefetch + 1, LAYERS)
        assert stream.hits + stream.misses == 4 * LAYERS
        assert stream.misses == (4 * LAYERS if prefetch == 0 else 1)
        if slots == LAYERS:
            assert stream.uploads == LAYERS  # all of them stay
        else:
            assert stream.uploads == 4 * LAYERS + prefetch
        largest = max(layer.size_bytes for layer in stream._layers)
        assert stream.device_bytes >= slots * largest
        if slots < LAYERS:
            assert stream.device_bytes < stream.streamed_bytes + slots * largest


def test_pinned_layers_share_no_page(path: Path) -> None:
    """CUDA pins whole pages and refuses one that is pinned already."""
    _, stream = streamed(path, "pinned")
    with stream:
        hosts = [layer.host for layer in stream._layers]
        assert len(hosts) == LAYERS
        assert all(host is not None and host.data_ptr() % mmap.PAGESIZE == 0 for host in hosts)


@pytest.mark.parametrize("used", ["inference", "no_grad"])
@pytest.mark.parametrize("made", ["inference", "no_grad"])
@pytest.mark.parametrize("source", ["pinned", "disk"])
def test_inference_mode(path: Path, source: str, made: str, used: str) -> None:
    """The mode is a thread's own, and the uploader's threads have none; a stream made in it is used outside it, too."""
    modes = {"inference": torch.inference_mode, "no_grad": torch.no_grad}
    expected = resident(path)
    with modes[made]():
        model, stream = streamed(path, source, prefetch=1)
    with stream, modes[used]():
        for seed in range(2):
            assert model(inputs(seed)).equal(expected(inputs(seed)))
        stream.check()


@pytest.mark.parametrize("source", ["pinned", "disk"])
def test_slots_hold_what_a_blob_needs(path: Path, source: str) -> None:
    """The blob's bytes and slack of zeros, whatever layer was there before."""
    _, stream = streamed(path, source, prefetch=1)
    with stream, kvpack.open(path) as reader:
        for slot in stream._slots:
            slot.buffer.fill_(0xA5)
        for index in [*range(LAYERS), 2, 0, 5]:
            with stream.layers(index):
                for member in stream._layers[index].members:
                    blob, name = member.blob, member.linear.tensor_name
                    assert bytes(blob.blob[: blob.blob_bytes].numpy()) == bytes(reader.blob(name).buffer)
                    assert len(blob.blob) == blob.blob_bytes + SLACK_BYTES
                    assert not blob.blob[blob.blob_bytes :].any()


@pytest.mark.parametrize("source", ["pinned", "disk"])
def test_any_order(path: Path, source: str) -> None:
    """Layers skipped, repeated, backwards: fetched when they are needed."""
    expected = resident(path)
    model, stream = streamed(path, source)
    order = random.Random(1).choices(range(LAYERS), k=60)
    with stream, torch.no_grad():
        x = torch.randn(2, WIDTH)
        for index in [*order, *reversed(range(LAYERS)), 3, 3, 3]:
            assert model.blocks[index](x).equal(expected.blocks[index](x)), index
        assert stream.hits
        assert stream.misses


def test_layers_that_are_loaded_already(path: Path) -> None:
    expected = resident(path)
    model = resident(path)
    before = [tensor.clone() for tensor in model.state_dict().values()]
    stream = stream_modules(model, model.blocks, device="cpu")
    with torch.no_grad():
        assert model(inputs()).equal(expected(inputs()))
    for tensor, old in zip(model.state_dict().values(), before, strict=True):
        assert tensor.equal(old)
    assert "streamed" in repr(model.blocks[0].up)
    assert "device=cpu" in repr(model.first) or isinstance(model.first, nn.Linear)
    stream.close()
    stream.close()
    with torch.no_grad():  # as before, without hooks
        assert model(inputs()).equal(expected(inputs()))
    assert not model.blocks[0]._forward_hooks
    assert not model.blocks[0]._forward_pre_hooks
    with pytest.raises(StreamingError, match="the stream is closed"):
        stream.acquire(0)


def test_closed_disk_stream_leaves_layers_empty(path: Path) -> None:
    model, stream = streamed(path, "disk")
    with stream, torch.no_grad():
        model(inputs())
    assert model.blocks[2].up.weight_kvpack.is_meta
    with pytest.raises(
        StreamingError, match=r"blocks\.0\.up\.weight .* that has ended\. .*stream_modules, or load them"
    ):
        model(inputs())
    with stream_modules(model, model.blocks, source="disk", path=path, device="cpu"), torch.no_grad():
        assert model(inputs()).equal(resident(path)(inputs()))
    state = load(path, "cpu")
    for index in range(LAYERS):
        for name in ("up", "down"):
            layer = getattr(model.blocks[index], name)
            layer.load_state_dict(state.linear(f"blocks.{index}.{name}").state_dict(), assign=True)
    with torch.no_grad():
        assert model(inputs()).equal(resident(path)(inputs()))


def test_closed_pinned_stream_leaves_weights_in_host_memory(path: Path) -> None:
    model, stream = streamed(path, "pinned")
    stream.close()
    assert {b.device.type for block in model.blocks for b in block.buffers()} == {"cpu"}
    with torch.no_grad():
        assert model(inputs()).equal(resident(path)(inputs()))
    with stream_modules(model, model.blocks, source="pinned", device="cpu"), torch.no_grad():
        assert model(inputs()).equal(resident(path)(inputs()))


def test_deferred_weights_without_a_stream(path: Path) -> None:
    model = Model().eval()
    replace_linears(model, path, device="cpu", defer=model.blocks)
    advice = r"weights of blocks\.0\.up\.weight .* left in the file by replace_linears\(defer=…\).*stream_modules"
    for use in (lambda: model(inputs()), model.blocks[0].up.dequantize):
        with pytest.raises(StreamingError, match=advice):
            use()


def test_use_out_of_turn(path: Path) -> None:
    model, stream = streamed(path, "pinned")
    x = torch.randn(2, WIDTH)
    with stream:
        with pytest.raises(StreamingError, match=r"blocks\.1\.up\.weight are streamed"):
            model.blocks[1].up(x)
        stream.acquire(1)
        model.blocks[1].up(x)
        stream.release(1)
        stream.release(1)  # nothing
        with pytest.raises(StreamingError, match="streamed"):
            model.blocks[1].up(x)
        with pytest.raises(StreamingError, match="streamed"):
            model.blocks[1].up.dequantize()


def test_errors_in_a_layer_release_it(path: Path) -> None:
    expected = resident(path)
    model, stream = streamed(path, "pinned", prefetch=1)

    def fail() -> None:
        raise ZeroDivisionError

    with stream, torch.no_grad():
        for index in range(LAYERS):
            model.blocks[index].disturb = fail
            with pytest.raises(ZeroDivisionError):
                model(inputs())
            model.blocks[index].disturb = lambda: None
            assert not stream._active
        assert model(inputs()).equal(expected(inputs()))


def test_several_layers_at_once(path: Path) -> None:
    expected = resident(path)
    model, stream = streamed(path, "disk", prefetch=5)
    xs = [torch.randn(4, WIDTH) for _ in range(5)]
    with stream, torch.no_grad():
        with stream.layers(*range(5)):
            ys = run_concurrently([model.blocks[i].up for i in range(5)], xs)
        for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
            assert y.equal(expected.blocks[i].up(x))
        with pytest.raises(StreamingError, match="6 layers are in use at once; prefetch=5"), stream.layers(*range(7)):
            pass
        assert not stream._active
        assert model(inputs()).equal(expected(inputs()))


def test_what_torch_does_to_a_streamed_model(path: Path) -> None:
    """Moves and casts pass the coded weights by; copies get what is in host memory."""
    expected = resident(path)
    model, stream = streamed(path, "pinned")
    with stream, torch.no_grad():
        layer = model.blocks[0].up
        at = layer.weight_kvpack.data_ptr()
        model.half()
        model.to("cpu")
        model.float()
        expected.half().float()  # the biases lose bits as well
        assert layer.weight_kvpack.data_ptr() == at
        assert model(inputs()).equal(expected(inputs()))
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            x = torch.randn(2, WIDTH)
            assert not other.streamed
            assert other(x).equal(expected.blocks[0].up(x))
        with pytest.raises(RuntimeError, match="close the stream"):
            layer.load_state_dict(layer.state_dict())


# torch's own, from importing Inductor, which torch._dynamo.reset does wherever there is a GPU.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning")
def test_compile_with_graph_breaks(path: Path) -> None:
    torch._dynamo.reset()
    expected = resident(path)
    model, stream = streamed(path, "pinned", prefetch=1)
    compiled = torch.compile(model, backend="aot_eager")
    with stream, torch.no_grad():
        for seed in range(3):
            torch.testing.assert_close(compiled(inputs(seed)), expected(inputs(seed)))
    torch._dynamo.reset()


def test_refusals(path: Path) -> None:
    model = resident(path)
    plain = Model()
    with pytest.raises(StreamingError, match=r"'blocks\.0' has no RansLinear: call kvpack\.replace_linears"):
        stream_modules(plain, plain.blocks, device="cpu")
    with pytest.raises(StreamingError, match="is not part of the model"):
        stream_modules(model, [nn.Linear(2, 2)], device="cpu")
    with pytest.raises(StreamingError, match="in two streamed layers"):
        stream_modules(model, [model.blocks[0], model.blocks[0].up], device="cpu")
    with pytest.raises(ValueError, match="source is 'tape'"):
        stream_modules(model, model.blocks, source="tape", device="cpu")
    with pytest.raises(ValueError, match="needs the path"):
        stream_modules(model, model.blocks, source="disk", device="cpu")
    with pytest.raises(ValueError, match="prefetch is -1"):
        stream_modules(model, model.blocks, prefetch=-1, device="cpu")
    with pytest.raises(ValueError, match="no RansLinear to stream"):
        LayerStream([], device="cpu")
    assert not any(layer.streamed for layer in model.modules() if isinstance(layer, RansLinear))
    stream = stream_modules(model, model.blocks[:2], device="cpu")
    with pytest.raises(StreamingError, match="streamed already"):
        stream_modules(model, model.blocks[1:], device="cpu")
    stream.close()

    with torch.device("meta"):
        lazy = Model().eval()
    replace_linears(lazy, path, device="cpu", defer=lazy.blocks)
    with pytest.raises(StreamingError, match=r"'?blocks\.0\.up\.weight'? is on the meta device, and path"):
        stream_modules(lazy, lazy.blocks, device="cpu")
    with pytest.raises(StreamingError, match=r"blocks\.6\.up\.weight_kvpack is on the meta device: load it"):
        stream_modules(lazy, lazy.blocks[:6], path=path, device="cpu")


@pytest.mark.parametrize("what", ["move", "hooks", "uploader"])
@pytest.mark.parametrize("held", ["held", "deferred"])
@pytest.mark.parametrize("source", ["pinned", "disk"])
def test_failed_setup_is_undone(
    path: Path, page_locks: PageLocks, monkeypatch: pytest.MonkeyPatch, source: str, held: str, what: str
) -> None:
    """Threads, files, pinned pages and hooks are gone, and every tensor is the one that it was."""
    if held == "held":
        model = resident(path)
    else:
        with torch.device("meta"):
            model = Model().eval()
        replace_linears(model, path, device="cpu", defer=model.blocks)
    model.register_buffer("mask", torch.ones(3))
    model.blocks[0].up.tensor_name = None if held == "held" and source == "pinned" else "blocks.0.up.weight"

    def look() -> list[Any]:
        linears = [module for module in model.modules() if isinstance(module, RansLinear)]
        tensors = [*model.parameters(), *(p.data.data_ptr() for p in model.parameters()), *model.buffers()]
        derived = [(m._current(), m.streamed, m.tensor_name) for m in linears]
        hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
        threads = sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("kvpack-upload"))
        return [*(id(x) if isinstance(x, torch.Tensor) else x for x in tensors), derived, hooks, threads]

    class FailingError(Exception):
        pass

    def fail(*_arguments: Any, **_options: Any) -> Any:
        raise FailingError

    def move_some(device: Any) -> Any:
        """As ``Module.to`` leaves a model when there is no room for all of it."""
        model.first.to(torch.float16)
        model.mask = torch.zeros(3)
        for block in model.blocks:
            block.up.bias = block.up.bias.clone()
        raise FailingError

    uploaders: list[Any] = []

    class Uploader(offload.Uploader):  # type: ignore[misc, name-defined]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            uploaders.append(self)
            self._pool.submit(lambda: None).result()  # a thread

    before = look()
    with monkeypatch.context() as patch:
        patch.setattr(offload, "Uploader", Uploader)
        if what == "move":
            patch.setattr(model, "to", move_some)
        elif what == "hooks":
            patch.setattr(model.blocks[3], "register_forward_hook", fail)
        elif source == "disk":
            patch.setattr(offload, "Uploader", fail)
        else:
            patch.setattr(Uploader, "submit", fail)
        with pytest.raises(FailingError) as caught:
            stream_modules(model, model.blocks, source=source, path=path, device="cpu")
    assert look() == before
    assert not page_locks.ranges
    assert all(uploader._pool._shutdown for uploader in uploaders)
    del caught
    with stream_modules(model, model.blocks, source=source, path=path, device="cpu"), torch.no_grad():
        assert model(inputs()).equal(resident(path)(inputs()))


def test_file_of_another_model(path: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Model().eval()
    replace_linears(model, path, device="cpu", defer=model.blocks)
    tensors = {
        name: torch.randn(64, 128) for name in Model().state_dict() if name.endswith(("up.weight", "down.weight"))
    }
    save_file(tensors, tmp_path / "in.safetensors")
    kvpack.compress(tmp_path / "in.safetensors", tmp_path / "out.safetensors", kvpack.QuantConfig(bits=4.5))
    for source in ("pinned", "disk"):
        with pytest.raises(StreamingError, match=r"blocks\.0\.up\.weight.*blob"):
            stream_modules(model, model.blocks, source=source, path=tmp_path / "out.safetensors", device="cpu")
    assert not any(layer.streamed for layer in model.modules() if isinstance(layer, RansLinear))


@pytest.mark.parametrize("source", ["pinned", "disk"])
@pytest.mark.parametrize("stored", ["weight_kvpack", "weight_kvpack_scale"])
def test_damage_is_found_before_anything_runs(path: Path, tmp_path: Path, source: str, stored: str) -> None:
    """Deferred weights have not been looked at by replace_linears."""
    with Container(path) as container:
        name = max(name for name in container.tensors if name.startswith("blocks") and name.endswith(stored))
        at = container.data_begin + container.tensors[name].end - (3 if stored == "weight_kvpack_scale" else 100)
    broken = tmp_path / "broken.safetensors"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    broken.write_bytes(data)
    model = Model().eval()
    replace_linears(model, broken, device="cpu", defer=model.blocks)
    with pytest.raises(FormatError, match=rf"broken\.safetensors, tensor '{name.removesuffix('_scale')[:-7]}"):
        stream_modules(model, model.blocks, source=source, path=broken, device="cpu")
    stream_modules(model, model.blocks, source=source, path=broken, device="cpu", verify=False).close()


def test_disk_errors_surface_and_pass(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that fails is an error of the layer that needs it; the next pass tries again."""
    expected = resident(path)
    model, stream = streamed(path, "disk")
    read = upload_module.read_exactly
    broken = threading.Event()

    def failing(*arguments: Any) -> None:
        if broken.is_set():
            raise OSError(5, "no such sector")
        read(*arguments)

    monkeypatch.setattr(upload_module, "read_exactly", failing)
    with stream, torch.no_grad():
        assert model(inputs()).equal(expected(inputs()))
        broken.set()
        with pytest.raises(OSError, match="no such sector"):
            model(inputs())
        broken.clear()
        for _ in range(2):  # what was fetched ahead while the disk was broken is fetched again
            for _ in range(LAYERS):
                try:
                    y = model(inputs())
                except OSError:
                    continue
                break
            assert y.equal(expected(inputs()))
        assert not stream._active


def test_host_does_not_wait_for_later_layers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 0 runs while layers 1 and 2 are still being read."""
    gate = threading.Event()
    read = upload_module.read_exactly
    model, stream = streamed(path, "disk")
    first = {member.piece for member in stream._layers[0].members}
    ends = [(at, at + m.blob_bytes) for layer in stream._layers[:1] for m in layer.members for _, at in [m.piece]]
    assert len(first) == 2

    def gated(file: Any, view: Any, offset: int) -> None:
        if not any(begin <= offset < end for begin, end in ends):
            assert gate.wait(10)
        read(file, view, offset)

    monkeypatch.setattr(upload_module, "read_exactly", gated)
    x = torch.randn(2, WIDTH)
    with stream, torch.no_grad():
        y = model.blocks[0](x)
        assert not gate.is_set()
        gate.set()
        assert y.equal(resident(path).blocks[0](x))
        assert model.blocks[1](x).equal(resident(path).blocks[1](x))


def test_file_replaced_under_a_stream(path: Path, tmp_path: Path) -> None:
    """Bytes come from the file whose fronts and scales are on the device, not from another of its name."""
    copy, other = tmp_path / "copy.safetensors", tmp_path / "other.safetensors"
    copy.write_bytes(path.read_bytes())
    other.write_bytes(bytes(len(path.read_bytes())))
    model, stream = streamed(copy, "disk")
    other.rename(copy)
    with stream, torch.no_grad():
        assert model(inputs()).equal(resident(path)(inputs()))
    assert all(member.piece is None for layer in stream._layers for member in layer.members)  # the file is let go of


def test_stream_is_freed(path: Path) -> None:
    model, stream = streamed(path, "pinned")
    slot = weakref.ref(stream._slots[0].buffer)
    stream.close()
    gc.collect()
    assert slot() is None
    assert model.blocks[0].up.prepare().blob_bytes == len(model.blocks[0].up.weight_kvpack)


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("order", ["in turn", "any"])
@pytest.mark.parametrize("prefetch", [0, 1, 2, 5])
@pytest.mark.parametrize("source", ["pinned", "disk"])
def test_no_races(path: Path, detector: Detector, source: str, prefetch: int, order: str, streams: int) -> None:
    """All accesses to slots and pinned buffers are ordered by streams and events, not by luck."""
    model, stream = streamed(path, source, prefetch=prefetch)
    chance = random.Random(prefetch)
    others = [detector.default, *(FakeStream(detector) for _ in range(streams - 1))]
    with stream, torch.no_grad():
        x = torch.randn(2, WIDTH)
        for step in range(4 * LAYERS):
            index = step % LAYERS if order == "in turn" else chance.randrange(LAYERS)
            with detector.use(chance.choice(others)):
                model.blocks[index](x)
    watched = [memory for memory in detector.watched if memory.name.startswith("slot")]
    assert len(watched) == min(prefetch + 1, LAYERS)
    assert all(memory.write and len(memory.streams) >= 2 for memory in watched)


class PageLocks:
    """CUDA's list of pinned pages: each of them once, and unpinned as they were pinned."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.ranges: dict[int, range] = {}

    @property
    def pages(self) -> set[int]:
        return {page for pages in self.ranges.values() for page in pages}

    def register(self, address: int, size: int, flags: int) -> None:
        from cupy.cuda import runtime

        pages = range(address // mmap.PAGESIZE, (address + size - 1) // mmap.PAGESIZE + 1)
        if not self.pages.isdisjoint(pages):
            raise runtime.CUDARuntimeError(712)  # cudaErrorHostMemoryAlreadyRegistered
        if len(self.pages) + len(pages) > self.limit:
            raise runtime.CUDARuntimeError(2)  # cudaErrorMemoryAllocation
        self.ranges[address] = pages

    def unregister(self, address: int) -> None:
        del self.ranges[address]


@pytest.fixture
def page_locks(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> PageLocks:
    runtime = pytest.importorskip("cupy").cuda.runtime
    locks = PageLocks(limit=1000)
    monkeypatch.setattr(runtime, "hostRegister", locks.register)
    monkeypatch.setattr(runtime, "hostUnregister", locks.unregister)
    monkeypatch.setattr(torch.cuda, "device", lambda _device: nullcontext())
    monkeypatch.setattr(offload, "_register", REGISTER)
    monkeypatch.setattr(offload, "_unregister", UNREGISTER)
    return locks


@pytest.mark.parametrize("end", ["closed", "dropped"])
def test_pages_are_pinned_for_the_streams_life(path: Path, page_locks: PageLocks, end: str) -> None:
    model, stream = streamed(path, "pinned")
    assert page_locks.ranges.keys() == {layer.host.data_ptr() for layer in stream._layers}
    with torch.no_grad():
        model(inputs())
    if end == "closed":
        stream.close()
    else:
        del model, stream
        gc.collect()
    assert not page_locks.ranges


def test_pages_are_let_go_when_not_all_can_be_pinned(path: Path, page_locks: PageLocks) -> None:
    page_locks.limit = 3
    with pytest.raises(
        StreamingError, match=r"cannot pin \d+ bytes of host memory \(cudaErrorMemoryAllocation: .*disk"
    ):
        streamed(path, "pinned")
    gc.collect()
    assert not page_locks.ranges


def test_the_detector_sees_races(path: Path, detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two waits is needed."""

    def run() -> set[str]:
        model, stream = streamed(path, "pinned", prefetch=1)
        with stream, torch.no_grad():
            model(inputs())
        found = {race.partition(": ")[2] for race in detector.races}
        detector.races.clear()
        return found

    assert run() == set()
    with monkeypatch.context() as patch:
        patch.setattr(LayerStream, "_wait_until_free", lambda _self, _slot: None)
        assert run() == {"overwritten before it was read"}
    with monkeypatch.context() as patch:
        patch.setattr(FakeStream, "wait_event", lambda _self, _event: None)
        assert run() == {"overwritten before it was read", "read before it was written"}


def test_run_concurrently_on_the_cpu(path: Path) -> None:
    model = resident(path)
    layers = [block.up for block in model.blocks[:5]]
    xs = [torch.randn(2, WIDTH) for _ in layers]
    for y, layer, x in zip(run_concurrently(layers, xs), layers, xs, strict=True):
        assert y.equal(layer(x))
    assert run_concurrently([], []) == []
    with pytest.raises(ValueError, match="5 layers and 4 inputs"):
        run_concurrently(layers, xs[:4])


# On a GPU -------------------------------------------------------------------------------------------------------------

SLEEP = 20_000_000  # cycles: some 10 ms, long against every copy and kernel here


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Every wait of the host for the device is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def sleep() -> None:
    torch.cuda._sleep(SLEEP)


@pytest.mark.gpu
@pytest.mark.parametrize("slow", ["nothing", "compute", "copies", "both", "random"])
@pytest.mark.parametrize("source", ["pinned", "disk"])
@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_cuda_timing(
    path: Path,
    source: str,
    slow: str,
    prefetch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With kernels far behind the host, or copies far behind the kernels, each layer meets its own weights."""
    reference = resident(path, "cuda")
    model, stream = streamed(path, source, "cuda", prefetch)
    chance = random.Random(3)
    if slow in ("compute", "both", "random"):
        for block in model.blocks:
            block.disturb = sleep if slow != "random" else lambda: sleep() if chance.random() < 0.3 else None
    if slow in ("copies", "both", "random"):
        wait = stream._wait_until_free

        def slow_copy(slot: Any) -> None:
            wait(slot)  # the copy stream is the current one
            if slow != "random" or chance.random() < 0.5:
                sleep()

        monkeypatch.setattr(stream, "_wait_until_free", slow_copy)
    xs = [inputs(seed, "cuda") for seed in range(3)]
    with stream, torch.no_grad():
        model(xs[0])  # compiles
        torch.cuda.synchronize()
        # From disk, the host waits for the threads that read, and they for their buffers.
        with no_host_sync() if source == "pinned" else nullcontext():
            results = [model(x) for x in xs]
        for x, y in zip(xs, results, strict=True):
            torch.testing.assert_close(y, reference(x), rtol=1e-5, atol=1e-5)
        stream.check()


@pytest.mark.gpu
def test_cuda_other_streams(path: Path) -> None:
    """Each pass on another stream, none of them waited for by the host."""
    reference = resident(path, "cuda")
    model, stream = streamed(path, "pinned", "cuda")
    for block in model.blocks:
        block.disturb = sleep
    x = inputs(0, "cuda")
    with stream, torch.no_grad():
        expected = reference(x)
        results = []
        for _ in range(3):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                results.append(model(x))
        torch.cuda.synchronize()
        for y in results:
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_cuda_slots_outlive_their_use(path: Path) -> None:
    """A stream that is dropped while its copies and kernels are under way: nobody gets their memory too early."""
    reference = resident(path, "cuda")
    x = inputs(0, "cuda")
    with torch.no_grad():
        expected = reference(x)
    for _ in range(3):
        model, stream = streamed(path, "disk", "cuda")
        for block in model.blocks:
            block.disturb = sleep
        size = len(stream._slots[0].buffer)
        with torch.no_grad():
            y = model(x)
        for handle in stream._handles:
            handle.remove()
        del stream, model
        gc.collect()
        junk = [torch.full((size,), 0xA5, dtype=torch.uint8, device="cuda") for _ in range(8)]
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        torch.cuda.synchronize()
        assert all(bool((tensor == 0xA5).all()) for tensor in junk)


@pytest.mark.gpu
def test_cuda_pinned_memory(path: Path) -> None:
    model, stream = streamed(path, "pinned", "cuda")
    assert all(layer.host.is_pinned() for layer in stream._layers)
    assert model.blocks[0].up.weight_kvpack.device.type == "cpu"
    assert model.blocks[0].norm.weight.is_cuda
    assert model.blocks[0].up.bias.is_cuda
    host = stream._layers[0].host
    stream.close()
    assert not host.is_pinned()
    model.cuda()
    with torch.no_grad():
        torch.testing.assert_close(model(inputs(0, "cuda")), resident(path, "cuda")(inputs(0, "cuda")))


@pytest.mark.gpu
def test_cuda_memory_that_cannot_be_pinned(path: Path) -> None:
    """The refusal is an error of its own, not also of the next kernel."""
    model, stream = streamed(path, "pinned", "cuda")
    with stream, torch.no_grad():
        expected = model(inputs(0, "cuda"))
        with pytest.raises(StreamingError, match=r"cannot pin .*AlreadyRegistered"):
            offload._register(stream._layers[0].host, stream.device)
        assert model(inputs(0, "cuda")).equal(expected)


@pytest.mark.gpu
def test_cuda_memory(path: Path) -> None:
    """The device holds slots and tables, not the model."""
    model, stream = streamed(path, "pinned", "cuda", prefetch=1)
    with stream, torch.no_grad():
        model(inputs(0, "cuda"))
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for seed in range(3):
            model(inputs(seed, "cuda"))
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - held < 1 << 20


@pytest.mark.gpu
def test_cuda_graphs_are_refused(path: Path) -> None:
    model, stream = streamed(path, "pinned", "cuda")
    x = inputs(0, "cuda")
    with stream, torch.no_grad():
        model(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(StreamingError, match="cannot be captured"), torch.cuda.graph(graph):
            model(x)


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
def test_cuda_run_concurrently(path: Path, captured: bool) -> None:
    model = resident(path, "cuda")
    layers = [block.up for block in model.blocks[:5]]
    expected_of = [copy.deepcopy(layer) for layer in layers]
    xs = [torch.randn(2, WIDTH, device="cuda") for _ in layers]
    kvpack.warmup(model, dtypes=[torch.float32], tokens=[2])
    run_concurrently(layers, xs)
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ys = run_concurrently(layers, xs)
    for round_ in range(20):
        if captured:
            for x in xs:
                x.normal_()
            graph.replay()
        else:
            xs = [torch.randn(2, WIDTH, device="cuda") for _ in layers]  # memory of the last round's, perhaps
            if round_ % 3 == 0:
                sleep()
            for x in xs:
                x.mul_(2)
            ys = run_concurrently(layers, xs)
        for y, layer, x in zip(ys, expected_of, xs, strict=True):
            torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_cuda_results_of_side_streams_are_not_overwritten(path: Path) -> None:
    """Results die while the current stream has still to read them, and the side streams go on allocating."""
    model = resident(path, "cuda")
    layers = [block.up for block in model.blocks[:5]]
    x = torch.randn(2, WIDTH, device="cuda")
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    sums = []
    for _ in range(30):
        ys = run_concurrently(layers, [x] * 5)
        torch.cuda._sleep(2_000_000)
        sums.append(torch.cat(ys, dim=-1))
        del ys
    for found in sums:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
