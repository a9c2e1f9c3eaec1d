"""Models whose layers lie on several GPUs: coded weights, kernels, and a KVPackCache of several KVCaches."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from generation import greedy, logits
from models import ARCHITECTURES, VOCABULARY

import kvpack
from kvpack import KVPackCache, PageFormat
from kvpack.errors import CacheInputError
from kvpack.integrations.transformers import cache as cache_module
from kvpack.integrations.transformers.causal_models import kv_bytes, kv_bytes_16_bit
from kvpack.integrations.transformers.decode_graph import DecodeGraph
from kvpack.runtime.device import kernels
from kvpack.runtime.weights.linear import RansLinear

pytestmark = pytest.mark.filterwarnings("ignore:KVPackCache. the model is in torch.float32:UserWarning")

LAYERS = 4
PLACES = [[0, 0, 1, 1], [0, 1, 1, 0]]
INT4, INT8, FP16 = PageFormat.INT4, PageFormat.INT8, PageFormat.FP16
OPTIONS: dict[str, dict[str, Any]] = {
    "16 bits": {},
    "INT4": {"formats": "INT4"},
    "by layer": {"formats": [(FP16, INT4), (INT4, INT8), (INT8, FP16), (INT4, INT4)]},
}

Split = Callable[[Sequence[int]], None]


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> Split:
    """Have layers of a model on the CPU pass for layers on these devices."""

    def on(places: Sequence[int]) -> None:
        monkeypatch.setattr(cache_module, "_device_of", lambda layer, states: torch.device("cpu", places[layer]))

    return on


def llama() -> Any:
    model = ARCHITECTURES["llama"].model(num_hidden_layers=LAYERS)
    model.set_attn_implementation("kvpack")
    return model


def prompts(tokens: int = 150) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Three rows with 0, 13 and 26 pads on the left, and their mask."""
    ids = torch.randint(3, VOCABULARY, (3, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(3):
        mask[row, : 13 * row] = 0
    return ids * mask, {"attention_mask": mask}


def lengths(cache: KVPackCache) -> list[list[int]]:
    return [lengths for kv in cache.kvs for lengths in kv.table.lengths.tolist()]


def pages(cache: KVPackCache) -> list[Any]:
    """Of each layer, the formats and the values of its pages."""
    found = []
    for kv in cache.kvs:
        for layer in range(kv.num_layers):
            rows = [kv.read(layer, row) for row in range(cache.rows)]
            found.append((kv.precision_map(layer).tolist(), [(k.tolist(), v.tolist()) for k, v in rows]))
    return found


@pytest.mark.parametrize("places", PLACES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_several_caches_hold_what_one_does(split: Split, options: dict[str, Any], places: list[int]) -> None:
    """A prompt, steps, other rows, fewer columns, and a second text behind a reset."""
    model, (ids, padded) = llama(), prompts()
    chosen = [2, 2, 0, 0]
    longer = torch.cat([padded["attention_mask"][chosen], torch.ones(4, 11, dtype=torch.int64)], 1)

    def run() -> tuple[KVPackCache, list[Any]]:
        cache = KVPackCache(model.config, **options, recent_tokens=16, max_sequences=4)
        found: list[Any] = [greedy(model, ids, cache, 20, **padded).tolist()]
        found += [pages(cache), cache.average_bits(), kv_bytes(cache), kv_bytes_16_bit(cache)]
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        cache.batch_select_indices(torch.tensor([0, 1]))
        cache.batch_repeat_interleave(2)
        cache.crop(-9)
        found += [lengths(cache), pages(cache), cache.average_bits()]
        found.append(logits(model, ids[chosen, :1], cache, attention_mask=longer).tolist())
        cache.reset()
        found += [lengths(cache), cache.average_bits(), cache.get_seq_length()]
        found.append(greedy(model, ids[:1], cache, 5).tolist())
        return cache, found

    one, want = run()
    split(places)
    several, got = run()
    assert got == want
    assert [kv.num_layers for kv in one.kvs] == [LAYERS]
    assert [kv.num_layers for kv in several.kvs] == ([2, 2] if places[1] == 0 else [1, 2, 1])
    assert several.memory_mb() == pytest.approx(sum(kv.estimate_memory_mb() for kv in several.kvs))
    assert str(several).count("KVCache(") == len(several.kvs)
    with pytest.raises(CacheInputError, match=r"several devices \(cpu:0, cpu:1.*KVPackCache.kvs"):
        _ = several.kv


def test_other_attention_reads_several_caches(split: Split) -> None:
    model, (ids, _) = llama(), prompts()
    model.set_attn_implementation("sdpa")

    def run() -> list[list[int]]:
        cache = KVPackCache(model.config, formats="INT4", recent_tokens=0)
        with pytest.warns(UserWarning, match="all pages are dequantized"):
            found: list[list[int]] = greedy(model, ids, cache).tolist()
        return found

    want = run()
    split(PLACES[0])
    assert run() == want


def test_a_budget_is_that_of_each_devices_layers(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, padded) = llama(), prompts(400)
    split([0, 0, 0, 1])
    cache = KVPackCache(model.config, budget=0.3, recent_tokens=0, sinks=0)
    logits(model, ids, cache, **padded)
    calls: list[tuple[int, int]] = []
    for at, kv in enumerate(cache.kvs):
        plain = kv.reallocate
        record = lambda at=at, plain=plain: (calls.append((at, cache.get_seq_length())), plain())  # noqa: E731
        monkeypatch.setattr(kv, "reallocate", record)
    mask = padded["attention_mask"]
    for _ in range(40):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.int64)], 1)
        logits(model, ids[:, :1], cache, attention_mask=mask)
    assert calls == [(0, 430), (1, 430)]  # in the 32nd forward pass
    assert [kv.num_layers for kv in cache.kvs] == [3, 1]
    for kv in cache.kvs:
        full = (kv.entries != -1).sum() * kv._full_bytes
        assert kv.shares.mean() == pytest.approx(0.3, abs=0.01)
        assert 0.2 * full < kv.pools.bytes_in_use < 0.5 * full  # last pages of three rows are not quantized
        assert not torch.from_numpy(kv.errors).isnan().any()


def test_a_pass_that_failed_on_the_second_device(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, padded) = llama(), prompts()
    want = logits(model, ids, KVPackCache(model.config), **padded)
    longer = torch.cat([padded["attention_mask"], torch.ones(3, 1, dtype=torch.int64)], 1)
    split(PLACES[0])
    for failing in (1, 3):  # before anything is known of the second device, and behind
        cache = KVPackCache(model.config)
        with monkeypatch.context() as patched:
            patched.setattr(model.model.layers[failing], "forward", lambda *args, **options: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                logits(model, ids, cache, **padded)
        with pytest.raises(CacheInputError, match="a forward pass has failed half-way"):
            logits(model, ids[:, :1], cache, attention_mask=longer)
        cache.reset()
        assert torch.equal(logits(model, ids, cache, **padded), want)
        assert [kv.num_layers for kv in cache.kvs] == [2, 2]
    monkeypatch.setattr(cache.kvs[1], "select_sequences", lambda rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cache.reorder_cache(torch.tensor([2, 0, 1]))
    with pytest.raises(CacheInputError, match=r"some layers of the cache hold its tokens: reset\(\)"):
        logits(model, ids[:, :1], cache, attention_mask=longer)


def test_what_is_seen_of_a_mask_goes_to_other_devices_with_it() -> None:
    """As accelerate sends it there, ahead of a layer."""
    model, (ids, padded) = llama(), prompts()
    want = logits(model, ids, KVPackCache(model.config), **padded)
    sent = []

    def send(module: Any, args: Any, options: dict[str, Any]) -> Any:
        sent.append(options["attention_mask"])
        return args, options | {"attention_mask": sent[-1].to("meta", non_blocking=True)}

    model.model.layers[1].register_forward_pre_hook(send, with_kwargs=True)
    assert torch.equal(logits(model, ids, KVPackCache(model.config), **padded), want)
    assert len(sent) == 1
    assert sent[0] is not None


def test_a_graph_of_several_devices_is_refused(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, _) = llama(), prompts()
    split(PLACES[0])
    cache = KVPackCache(model.config, budget=0.3)
    decoder = DecodeGraph(model, cache, max_tokens=200)
    decoder.prompt(ids)
    for call in (cache.plan_step, decoder.reallocate):
        with pytest.raises(CacheInputError, match="layers lie on several devices"):
            call()
    assert lengths(cache) == LAYERS * [[150, 150, 150]]
    placed = [SimpleNamespace(device=torch.device("cuda", index), is_meta=False) for index in (0, 1)]
    monkeypatch.setattr(model, "parameters", lambda: iter(placed))
    with pytest.raises(CacheInputError, match=r"several devices \(cuda:0, cuda:1\), and a CUDA graph is one device's"):
        DecodeGraph(model, cache, max_tokens=200)


# On GPUs --------------------------------------------------------------------------------------------------------------

EXPLICIT = {
    "model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1, "model.layers.2": 1,
    "model.layers.3": 0, "model.norm": 1, "lm_head": 1,
}  # fmt: skip
MAPS: dict[str, dict[str, Any]] = {
    "explicit": {"device_map": EXPLICIT},
    "auto": {"device_map": "auto", "max_memory": {0: 100_000, 1: 10**9}},
}


@pytest.fixture
def two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs; there are {torch.cuda.device_count()}")


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    ARCHITECTURES["llama"].save(folder / "plain", torch.bfloat16, num_hidden_layers=LAYERS)
    kvpack.compress(folder / "plain", folder / "coded", kvpack.QuantConfig(bits=4.25))
    return folder / "coded"


def load(path: Path, **options: Any) -> Any:
    return ARCHITECTURES["llama"].class_.from_pretrained(path, dtype=torch.bfloat16, **options).eval()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The devices of all launches; each is the current one of CUDA, and its stream the one that torch has there."""
    import cupy

    found: list[int] = []
    load_kernel, launched = kernels._load, kernels._launch_kernel()

    def watched(kernel: Any, device: int, shared_bytes: int) -> Any:
        assert cupy.cuda.runtime.getDevice() == device == torch.cuda.current_device()
        found.append(device)
        return load_kernel(kernel, device, shared_bytes)

    def watched_driver(*arguments: int) -> None:
        assert arguments[8] == torch.cuda.current_stream().cuda_stream
        launched(*arguments)

    monkeypatch.setattr(kernels, "_load", watched)
    monkeypatch.setattr(kernels, "_launch_kernel", lambda: watched_driver)
    return found


@pytest.mark.gpu
@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("tokens", [1, 8, 150])
@pytest.mark.parametrize("name", MAPS)
def test_a_model_on_two_gpus(coded: Path, launches: list[int], name: str, tokens: int) -> None:
    one, several = load(coded, device_map={"": 0}), load(coded, **MAPS[name])
    places = [int(several.hf_device_map[f"model.layers.{layer}"]) for layer in range(LAYERS)]
    assert set(places) == {0, 1}
    for layer, place in zip(several.model.layers, places, strict=True):
        found = [module for module in layer.modules() if isinstance(module, RansLinear)]
        assert len(found) == 7
        for module in found:
            blob = module.prepare()
            on_device = (module.weight_kvpack, module.weight_kvpack_scale, blob.groups, blob.tables, blob.status)
            assert {tensor.device for tensor in on_device} == {torch.device("cuda", place)}
    ids = prompts(tokens)[0][:1].to("cuda:0")
    launches.clear()  # those of loading
    want, new = logits(one, ids), greedy(one, ids, new_tokens=32)
    assert set(launches) == {0}
    launches.clear()
    aside = torch.cuda.Stream(1)
    torch.cuda.synchronize(1)
    for current in (0, 1):
        with torch.cuda.stream(aside), torch.cuda.device(current):
            got, found = logits(several, ids), greedy(several, ids, new_tokens=32)
        aside.synchronize()
        assert torch.equal(got.to("cuda:0"), want)
        assert torch.equal(found, new)
    assert set(launches) == {0, 1}


@pytest.mark.gpu
@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_cache_on_two_gpus(coded: Path, launches: list[int], options: dict[str, Any]) -> None:
    ids, padded = prompts()
    ids, padded = ids.to("cuda:0"), {name: mask.to("cuda:0") for name, mask in padded.items()}
    formats = options.get("formats")
    if isinstance(formats, list):
        options = {"formats": [tuple(PageFormat.BF16 if f == FP16 else f for f in pair) for pair in formats]}

    def run(model: Any) -> tuple[KVPackCache, list[Any]]:
        model.set_attn_implementation("kvpack")
        cache = KVPackCache(model.config, **options, recent_tokens=16, dtype=torch.bfloat16)
        found: list[Any] = [greedy(model, ids, cache, 32, **padded).tolist(), pages(cache), cache.average_bits()]
        cache.crop(-9)
        cache.reorder_cache(torch.tensor([2, 0, 1], device="cuda:0"))
        found += [lengths(cache), pages(cache)]
        cache.reset()
        found.append(logits(model, ids, cache, **padded).tolist())
        return cache, found

    _, want = run(load(coded, device_map={"": 0}))
    launches.clear()
    cache, got = run(load(coded, device_map=EXPLICIT))
    assert got == want
    assert set(launches) == {0, 1}
    assert [(kv.num_layers, kv.device.index) for kv in cache.kvs] == [(1, 0), (2, 1), (1, 0)]
    for kv in cache.kvs:
        assert {tensor.device for tensor in (kv.page_table, kv.lengths, kv.mass)} == {kv.device}
        kv.check()


@pytest.mark.gpu
@pytest.mark.usefixtures("two_gpus")
def test_a_budget_on_two_gpus(coded: Path) -> None:
    model = load(coded, device_map=EXPLICIT, attn_implementation="kvpack")
    cache = KVPackCache(model.config, budget=0.3)
    greedy(model, prompts(300)[0].to("cuda:0"), cache, 70)
    for kv in cache.kvs:
        kv.check()
        assert kv.shares.mean() == pytest.approx(0.3, abs=0.01)
        assert len(set(kv.precision_map(0).ravel().tolist())) > 2
    decoder = load(coded, device_map=EXPLICIT, attn_implementation="kvpack")
    with pytest.raises(CacheInputError, match="a CUDA graph is one device's"):
        DecodeGraph(decoder, KVPackCache(decoder.config), max_tokens=99)


@pytest.mark.gpu
@pytest.mark.usefixtures("two_gpus")
def test_a_graph_on_another_gpu_than_the_current_one(coded: Path) -> None:
    found = []
    for place in (0, 1):
        model = load(coded, device_map={"": place}, attn_implementation="kvpack")
        decoder = DecodeGraph(model, KVPackCache(model.config, formats="INT4"), max_tokens=300)
        assert torch.cuda.current_device() == 0
        found.append(decoder.generate(prompts()[0].to(place), max_new_tokens=32).tolist())
        assert decoder.is_captured
        decoder.cache.kv.check()
    assert found[0] == found[1]


@pytest.mark.gpu
@pytest.mark.usefixtures("two_gpus")
def test_compression_stays_on_the_current_gpu(tmp_path: Path) -> None:
    ARCHITECTURES["llama"].save(tmp_path / "plain", torch.bfloat16)
    config = kvpack.QuantConfig(bits=4.25)
    kvpack.compress(tmp_path / "plain", tmp_path / "want", config, device="cuda:0")
    torch.cuda.reset_peak_memory_stats(0)
    before = torch.cuda.memory_allocated(0)
    with torch.cuda.device(1):
        kvpack.compress(tmp_path / "plain", tmp_path / "got", config, device="cuda")
    assert torch.cuda.max_memory_allocated(0) == before
    want, got = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("want", "got"))
    assert got == want


ELSEWHERE = """
import torch, kvpack
cache = kvpack.KVCache(1, 2, 16, 256, device="cuda:1")
cache.append(0, *torch.ones(2, 1, 2, 10, 16, dtype=torch.float16, device="cuda:1"))
cache.check()
assert cache.read(0, 0)[0].eq(1).all() and torch._C._cuda_hasPrimaryContext(1)
assert not torch._C._cuda_hasPrimaryContext(0)
"""


@pytest.mark.gpu
@pytest.mark.usefixtures("two_gpus")
def test_launches_make_no_context_on_the_current_gpu() -> None:
    """It would take hundreds of MB of a GPU that is not used."""
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
