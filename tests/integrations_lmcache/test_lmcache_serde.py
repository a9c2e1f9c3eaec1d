"""The serde ``kvpack`` in LMCache's own processor, and beneath an adapter of its second tier (scripts/test-lmcache)."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lmcache", reason="LMCache is not installed here: scripts/test-lmcache has an environment with it")

from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey  # noqa: E402
from lmcache.v1.distributed.config import L1ManagerConfig, L1MemoryManagerConfig  # noqa: E402
from lmcache.v1.distributed.l1_manager import L1Manager  # noqa: E402
from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import FSL2Adapter, FSL2AdapterConfig  # noqa: E402
from lmcache.v1.distributed.l2_adapters.serde_wrapper import SerdeL2AdapterWrapper  # noqa: E402
from lmcache.v1.distributed.serde import SerdeConfig, create_serde_processor  # noqa: E402
from lmcache.v1.memory_management import MemoryObjMetadata, TensorMemoryObj  # noqa: E402

from kvpack.errors import ChunkError, InputError, PageError  # noqa: E402
from kvpack.format.pages import PageFormat, PageLayout, Side  # noqa: E402
from kvpack.integrations.kv_chunks import ChunkCoder  # noqa: E402
from kvpack.integrations.lmcache import PageSerde, create_serde  # noqa: E402

HEAD_DIM, HEADS, LAYERS, TOKENS = 64, 2, 3, 256
SHAPE = (2, LAYERS, TOKENS, HEADS * HEAD_DIM)
ROOT = Path(__file__).resolve().parents[2]


def kv(seed: int = 0, dtype: Any = torch.bfloat16, shape: tuple[int, ...] = SHAPE) -> Any:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    values[0] += torch.arange(shape[-1]) % 7
    return values.to(dtype)


def key(number: int) -> ObjectKey:
    return ObjectKey(chunk_hash=number.to_bytes(4, "big"), model_name="books", kv_rank=0)


def memory_of(*tensors: Any) -> TensorMemoryObj:
    """An object of LMCache's, of one group of layers or of several, in one piece of memory."""
    raw = torch.cat([tensor.contiguous().view(torch.uint8).flatten() for tensor in tensors])
    shapes, dtypes = [t.shape for t in tensors], [t.dtype for t in tensors]
    return TensorMemoryObj(
        raw, MemoryObjMetadata(shapes[0], dtypes[0], 0, len(raw), 1, shapes=shapes, dtypes=dtypes), None
    )


def layout_of(obj: TensorMemoryObj) -> MemoryLayoutDesc:
    return MemoryLayoutDesc(shapes=obj.get_shapes(), dtypes=obj.get_dtypes())


def wait_for(fd: int, result: Callable[[], Any]) -> Any:
    """What a task gives once its notifier is signaled."""
    deadline = time.monotonic() + 60
    while (found := result()) is None:
        assert time.monotonic() < deadline
        select.select([fd], [], [], 0.05)
    return found


@pytest.fixture
def processor(request: pytest.FixtureRequest) -> Iterator[Any]:
    made = create_serde_processor(SerdeConfig("kvpack", {"head_dim": HEAD_DIM, **getattr(request, "param", {})}))
    yield made
    made.close()


def serialized(processor: Any, objects: list[Any]) -> list[Any]:
    out = [memory_of(torch.zeros(processor.estimate_serialized_size(layout_of(o)), dtype=torch.uint8)) for o in objects]
    task = processor.submit_serialize(objects, out, [key(number) for number in range(len(objects))])
    assert wait_for(processor.get_serialize_event_fd(), lambda: processor.query_serialize_result(task))
    return out


def deserialize(processor: Any, stored: list[Any], objects: list[Any]) -> bool:
    task = processor.submit_deserialize(stored, objects, [key(number) for number in range(len(objects))])
    return bool(wait_for(processor.get_deserialize_event_fd(), lambda: processor.query_deserialize_result(task)))


PAGES = [*PageFormat.__members__, ["INT8", "INT4"], ["BF16", "INT2"]]


@pytest.mark.parametrize("pages", PAGES, ids=str)
def test_round_trip_by_lmcaches_processor(pages: Any) -> None:
    """The bytes are those of the chunk coder, whose size was told before."""
    keys, values = (PageFormat[name] for name in ([pages, pages] if isinstance(pages, str) else pages))
    dtype = torch.float16 if PageFormat.FP16 in (keys, values) else torch.bfloat16
    coder = ChunkCoder(HEAD_DIM, keys, values)
    processor = create_serde_processor(SerdeConfig("kvpack", {"head_dim": HEAD_DIM, "pages": pages}))
    tensors = [kv(seed, dtype) for seed in range(3)]
    stored = serialized(processor, [memory_of(tensor) for tensor in tensors])
    blocks = LAYERS * (TOKENS // 64) * HEADS
    size = 48 + blocks * sum(PageLayout(s, f, HEAD_DIM).block_bytes for s, f in zip(Side, (keys, values), strict=True))
    back = [memory_of(torch.zeros_like(tensor)) for tensor in tensors]
    assert deserialize(processor, stored, back)
    processor.close()
    for tensor, data, found in zip(tensors, stored, back, strict=True):
        assert data.get_size() == size
        wanted, numbers = torch.empty(size, dtype=torch.uint8), torch.empty_like(tensor)
        coder.encode([tensor], wanted)
        coder.decode(wanted, [numbers])
        assert torch.equal(data.tensor, wanted)
        assert torch.equal(found.tensor, numbers)


@pytest.mark.parametrize("processor", [{"pages": "INT8", "max_workers": 4}], indirect=True)
def test_many_tasks_at_once(processor: Any) -> None:
    tensors = [kv(seed) for seed in range(8)]
    objects = [memory_of(tensor) for tensor in tensors]
    size = processor.estimate_serialized_size(layout_of(objects[0]))
    out = [memory_of(torch.zeros(size, dtype=torch.uint8)) for _ in tensors]
    tasks = [processor.submit_serialize([o], [d], [key(n)]) for n, (o, d) in enumerate(zip(objects, out, strict=True))]
    for task in tasks:
        fd = processor.get_serialize_event_fd()
        assert wait_for(fd, lambda task=task: processor.query_serialize_result(task))
    back = [memory_of(torch.zeros_like(tensor)) for tensor in tensors]
    assert deserialize(processor, out, back)
    for tensor, found in zip(tensors, back, strict=True):
        error = (found.tensor.float() - tensor.float()).square().mean() / tensor.float().square().mean()
        assert float(error) < 1e-4


@pytest.mark.parametrize("processor", [{"pages": "INT4"}], indirect=True)
def test_groups_of_layers_of_unlike_shape(processor: Any) -> None:
    first, second = kv(1), kv(2, shape=(2, 1, TOKENS, HEAD_DIM))
    objects = [memory_of(first, second)]
    stored = serialized(processor, objects)
    back = [memory_of(torch.zeros_like(first), torch.zeros_like(second))]
    assert deserialize(processor, stored, back)
    for index, tensor in enumerate((first, second)):
        error = (back[0].get_tensor(index).float() - tensor.float()).square().mean() / tensor.float().square().mean()
        assert float(error) < 0.02


@pytest.mark.parametrize("processor", [{"pages": "INT4"}], indirect=True)
def test_damage_fails_the_task_and_leaves_the_tensor(processor: Any) -> None:
    (stored,) = serialized(processor, [memory_of(kv())])
    back = memory_of(torch.full(SHAPE, 3, dtype=torch.bfloat16))
    stored.tensor[5000] ^= 16
    assert not deserialize(processor, [stored], [back])
    assert bool((back.tensor == 3).all())
    serde = PageSerde(ChunkCoder(HEAD_DIM, PageFormat.INT4, PageFormat.INT4))
    with pytest.raises(ChunkError, match="CRC-32"):
        serde.deserialize(stored, back, key(0))


def test_options_that_there_are_not() -> None:
    for options, message in (
        ({}, "head_dim None: a number of 1 or more"),
        ({"head_dim": "64"}, "head_dim '64'"),
        ({"head_dim": True}, "head_dim True"),
        ({"head_dim": 64, "bits": 4}, "no option 'bits': there are head_dim, pages, max_workers"),
        ({"head_dim": 64, "pages": "int4"}, "pages 'int4': a format, or a list of two"),
        ({"head_dim": 64, "pages": ["INT4"]}, "of keys and of values; there are FP16, BF16"),
        ({"head_dim": 64, "pages": 4}, "pages 4"),
        ({"head_dim": 64, "max_workers": 0}, "max_workers 0"),
    ):
        with pytest.raises(InputError, match=message):
            create_serde(options)
    with pytest.raises(PageError, match="head_dim is 40"):
        create_serde({"head_dim": 40})


def test_layouts_that_are_no_kv() -> None:
    processor = create_serde({"head_dim": HEAD_DIM})
    for shape in ((1, 3, 256, 576), (256, 2, 128), (2, 3, 256, 100)):
        with pytest.raises(InputError):
            processor.estimate_serialized_size(MemoryLayoutDesc([torch.Size(shape)], [torch.bfloat16]))
    processor.close()


@pytest.mark.gpu
def test_tensors_on_a_gpu_go_through_host_memory() -> None:
    serde = PageSerde(ChunkCoder(HEAD_DIM, PageFormat.INT4, PageFormat.INT4))
    tensor = kv()
    source, target = memory_of(tensor.cuda()), memory_of(torch.zeros_like(tensor).cuda())
    size = serde.estimate_serialized_size(layout_of(source))
    on_host, on_gpu = (memory_of(torch.zeros(size, dtype=torch.uint8, device=device)) for device in ("cpu", "cuda"))
    with pytest.warns(UserWarning, match="in host memory"):
        assert serde.serialize(source, on_gpu, key(0)) == size
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        serde.deserialize(on_gpu, target, key(0))
    serde.serialize(memory_of(tensor), on_host, key(0))
    assert torch.equal(on_gpu.tensor.cpu(), on_host.tensor)
    back = memory_of(torch.zeros_like(tensor))
    serde.deserialize(on_host, back, key(0))
    assert torch.equal(target.tensor.cpu(), back.tensor)


# Beneath an adapter


def test_files_of_the_file_system_adapter(tmp_path: Path) -> None:
    """Stored, looked up and loaded by LMCache's wrapper; files have the size that was told, and no more."""
    memory = L1MemoryManagerConfig(size_in_bytes=64 << 20, use_lazy=False, shm_name="")
    manager = L1Manager(L1ManagerConfig(memory))
    serde = create_serde_processor(SerdeConfig("kvpack", {"head_dim": HEAD_DIM, "pages": "INT4"}))
    adapter = SerdeL2AdapterWrapper(FSL2Adapter(FSL2AdapterConfig(str(tmp_path))), serde, manager)
    tensors = [kv(seed) for seed in range(2)]
    objects, keys = [memory_of(tensor) for tensor in tensors], [key(1), key(2)]
    layout = layout_of(objects[0])
    size = serde.estimate_serialized_size(layout)
    task = adapter.submit_store_task(keys, objects)
    done = wait_for(adapter.get_store_event_fd(), lambda: adapter.pop_completed_store_tasks().get(task))
    assert done.is_successful()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.stat().st_size for path in files] == [size, size]
    assert size < 0.29 * tensors[0].nbytes

    def load() -> tuple[list[bool], list[Any]]:
        back = [memory_of(torch.zeros_like(tensor)) for tensor in tensors]
        lookup = adapter.submit_lookup_and_lock_task(keys, {0: layout})
        found = wait_for(adapter.get_lookup_and_lock_event_fd(), lambda: adapter.query_lookup_and_lock_result(lookup))
        assert [found.test(0), found.test(1)] == [True, True]
        task = adapter.submit_load_task(keys, back)
        loaded = wait_for(adapter.get_load_event_fd(), lambda: adapter.query_load_result(task))
        adapter.submit_unlock(keys)
        return [loaded.test(0), loaded.test(1)], back

    loaded, back = load()
    assert loaded == [True, True]
    for tensor, obj in zip(tensors, back, strict=True):
        error = (obj.tensor.float() - tensor.float()).square().mean() / tensor.float().square().mean()
        assert float(error) < 0.01
    data = bytearray(files[0].read_bytes())
    data[size // 2] ^= 1
    files[0].write_bytes(data)
    loaded, back = load()
    assert loaded == [False, False]  # LMCache fails the whole of a task
    adapter.close()
    manager.close()


def test_the_server_with_kvpack() -> None:
    """``python -m kvpack.integrations.lmcache`` is LMCache's own command."""
    done = subprocess.run(
        [sys.executable, "-m", "kvpack.integrations.lmcache", "server", "--help"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--l2-adapter" in done.stdout


# KV of a model


REAL = os.environ.get("KVPACK_BOOKS_MODEL")
# Decibels of keys and of values: at most. Errors of keys are over what they vary by over tokens.
REAL_DB = {
    "INT8": (-46.0, -44.5),
    "INT4": (-18.0, -20.4),
    "INT3": (-12.0, -14.3),
    "INT2": (-11.4, -7.6),
    "FP8_E4M3": (-32.3, -31.5),
    "FP8_E5M2": (-26.4, -25.5),
}


@pytest.fixture(scope="module")
def real_kv() -> Any:
    """Of books-27m reading README.md: [2, layers, 256, heads · head_dim], and head_dim."""
    if REAL is None:
        pytest.skip("KVPACK_BOOKS_MODEL is not set")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.bfloat16)
    text = (ROOT / "README.md").read_text()
    ids = transformers.AutoTokenizer.from_pretrained(REAL)(text, return_tensors="pt").input_ids[:, :TOKENS]
    assert ids.shape[1] == TOKENS
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    sides = [
        [getattr(layer, side)[0].transpose(0, 1).flatten(1) for layer in cache.layers] for side in ("keys", "values")
    ]
    return torch.stack([torch.stack(side) for side in sides]), cache.layers[0].keys.shape[-1]


@pytest.mark.model
@pytest.mark.parametrize("pages", ["BF16", *REAL_DB])
def test_noise_of_a_models_kv(real_kv: Any, pages: str) -> None:
    tensor, head_dim = real_kv
    processor = create_serde({"head_dim": head_dim, "pages": pages})
    stored = serialized(processor, [memory_of(tensor)])
    back = [memory_of(torch.zeros_like(tensor))]
    assert deserialize(processor, stored, back)
    processor.close()
    if pages == "BF16":
        assert torch.equal(back[0].tensor, tensor)
        return
    for side, at_most in zip(Side, REAL_DB[pages], strict=True):
        x, error = tensor[side].double(), back[0].tensor[side].double() - tensor[side].double()
        spread = x - x.mean(1, keepdim=True)
        noise = float(10 * torch.log10(error.square().mean() / spread.square().mean()))
        print(f"{pages} {side.name} {noise:.1f} dB, {stored[0].get_size()} of {tensor.nbytes} bytes")
        assert noise < at_most
