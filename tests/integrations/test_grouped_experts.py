"""Modules of experts by grouped products, against their own code, expert by expert."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_blobs as samples

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from models import ARCHITECTURES  # noqa: E402
from torch import nn  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import MixtralExperts  # noqa: E402

import kvpack  # noqa: E402
from kvpack.encode.blob_encoder import encode_elements  # noqa: E402
from kvpack.format.layout import ElementKind, integer_layout  # noqa: E402
from kvpack.integrations.transformers.decode_graph import DecodeGraph  # noqa: E402
from kvpack.runtime.weights import experts as coded_experts  # noqa: E402
from kvpack.runtime.weights import grouped  # noqa: E402
from kvpack.runtime.weights.device_blob import DeviceBlob  # noqa: E402
from kvpack.runtime.weights.experts import GroupedMatrices, keep_coded  # noqa: E402
from kvpack.runtime.weights.linear import RansLinear  # noqa: E402

EXPERTS, COLS, INNER = 5, 64, 96


def layer(rows: int, cols: int, number: int, device: str, bits: int = 5) -> RansLinear:
    elements = samples.gaussian_elements((1, rows, cols), bits, (1 << bits) / 8, number)
    data = encode_elements(elements, integer_layout("balanced", ElementKind.SIGNED, bits), tile_cols=64)
    scales = np.random.default_rng(number).uniform(0.5, 1.5, rows).astype(np.float32) / (1 << bits)
    return RansLinear(DeviceBlob.from_bytes(data, scales, torch.float32, (rows, cols), device))


def mixtral(device: str = "cpu", bits: tuple[int, ...] = (5,)) -> nn.Module:
    """Coded experts; expert e's matrices have ``bits[e % len(bits)]``."""
    sizes = {"hidden_size": COLS, "intermediate_size": INNER, "num_local_experts": EXPERTS}
    module = MixtralExperts(transformers.MixtralConfig(**sizes)).to(device).eval()
    chosen = [bits[e % len(bits)] for e in range(EXPERTS)]
    up = [
        [(f"w{part}", layer(INNER, COLS, 10 * e + part, device, chosen[e])) for part in (1, 3)] for e in range(EXPERTS)
    ]
    down = [[("w2", layer(COLS, INNER, 10 * e, device, chosen[e]))] for e in range(EXPERTS)]
    keep_coded(module, "gate_up_proj", up)
    keep_coded(module, "down_proj", down)
    return module


def plain_product(stack: GroupedMatrices, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """What the operator gives on a GPU, from each expert's numbers."""
    rows = x[:, None].expand(*ids.shape, -1) if x.ndim == 2 else x
    height = sum(blob.header.rows for blob in stack.blobs[0])
    out = torch.zeros((*ids.shape, height), dtype=x.dtype)
    for place in np.ndindex(*ids.shape):
        expert = int(ids[place])
        if 0 <= expert < len(stack.blobs):
            weights = torch.cat([blob.dequantize(torch.float32) for blob in stack.blobs[expert]])
            out[place] = rows[place] @ weights.T
    return out


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """As on CUDA, with the operator's product replaced; filled with the shapes of ids that it was asked for."""
    asked: list[tuple[int, ...]] = []

    def linear(stack: GroupedMatrices, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        asked.append(tuple(ids.shape))
        return plain_product(stack, x, ids)

    monkeypatch.setattr(coded_experts, "_takes_grouped", lambda x: not x.requires_grad)
    monkeypatch.setattr(GroupedMatrices, "linear", linear)
    return asked


def routing(tokens: int, top_k: int, device: str = "cpu") -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(tokens)
    ids = torch.from_numpy(rng.integers(0, EXPERTS, (tokens, top_k)))
    weights = torch.from_numpy(rng.uniform(0, 1, (tokens, top_k))).float()
    x = torch.from_numpy(rng.normal(0, 1, (tokens, COLS))).float()
    return x.to(device), ids.to(device), weights.to(device)


@pytest.mark.parametrize("bits", [(5,), (5, 4)])
@pytest.mark.parametrize("tokens", [1, 7])
def test_same_as_expert_by_expert(
    on_gpu: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, tokens: int, bits: tuple[int, ...]
) -> None:
    module = mixtral(bits=bits)
    x, ids, weights = routing(tokens, 2)
    got = module(x, ids, weights)
    assert on_gpu == [(tokens, 2)] * 2
    stack = coded_experts._grouped_matrices(module, "gate_up_proj")
    assert stack is not None
    assert len(stack.kinds) == len(bits)
    monkeypatch.setattr(coded_experts, "_takes_grouped", lambda _: False)
    torch.testing.assert_close(got, module(x, ids, weights), rtol=1e-5, atol=1e-5)


def test_ids_of_no_expert_have_no_part(on_gpu: list[tuple[int, ...]]) -> None:
    """As where a device of several has some of the experts alone; not even by a bias."""
    module: Any = mixtral()
    module.has_bias = True
    module.gate_up_proj_bias = nn.Parameter(torch.randn(EXPERTS, 2 * INNER), requires_grad=False)
    module.down_proj_bias = nn.Parameter(torch.randn(EXPERTS, COLS), requires_grad=False)
    x, ids, weights = routing(3, 2)
    ids[1, 0] = EXPERTS
    got = module(x, ids, weights)
    ids[1, 0], weights[1, 0] = 0, 0
    torch.testing.assert_close(got, module(x, ids, weights))


def test_biases(on_gpu: list[tuple[int, ...]]) -> None:
    module: Any = mixtral()
    module.has_bias = True
    module.gate_up_proj_bias = nn.Parameter(torch.randn(EXPERTS, 2 * INNER), requires_grad=False)
    module.down_proj_bias = nn.Parameter(torch.randn(EXPERTS, COLS), requires_grad=False)
    x, ids, weights = routing(4, 2)
    wanted = torch.zeros(4, COLS)
    for token, rank in np.ndindex(4, 2):
        expert = int(ids[token, rank])
        up = module.gate_up_proj[expert].dequantize() @ x[token] + module.gate_up_proj_bias[expert]
        hidden = module.act_fn(up[:INNER]) * up[INNER:]
        wanted[token] += weights[token, rank] * (
            module.down_proj[expert].dequantize() @ hidden + module.down_proj_bias[expert]
        )
    torch.testing.assert_close(module(x, ids, weights), wanted, rtol=1e-4, atol=1e-4)


def test_what_goes_expert_by_expert(on_gpu: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, many rows of each expert, and layers that have hooks or are streamed."""
    module = mixtral()
    x, ids, weights = routing(4, 2)
    module(x.requires_grad_(), ids, weights).sum().backward()
    assert x.grad is not None
    many = routing(200, 2)
    module(*many)  # of small matrices
    assert on_gpu == [(200, 2)] * 2
    on_gpu.clear()
    monkeypatch.setattr(grouped, "_ROWS_BY_WEIGHTS", 0.0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    module(*many)
    assert on_gpu == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    module(*many)
    assert on_gpu == [(200, 2)] * 2
    gate: Any = module.get_submodule("3.w1")
    blob = gate.prepare()
    for vector in ("column_scales", "row_offsets"):
        of_one = copy.copy(blob)
        setattr(of_one, vector, torch.ones(8))
        assert GroupedMatrices.of([[blob, blob], [blob, of_one]]) is None
    assert GroupedMatrices.of([[blob, blob]]) is not None
    seen: list[Any] = []
    handle = gate.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    module(*routing(20, 2))
    assert seen  # as of who calibrates
    handle.remove()
    gate.streamed = True
    assert coded_experts._grouped_matrices(module, "gate_up_proj") is None


def test_weights_that_are_elsewhere_go_expert_by_expert(on_gpu: list[tuple[int, ...]]) -> None:
    """As of layers that a device map has on "cpu" beside a GPU, some or all of them."""
    module = mixtral()
    x, ids, _ = routing(4, 2)
    assert coded_experts._both_grouped(module, x, ids) is not None
    assert coded_experts._both_grouped(module, x.to("meta"), ids) is None
    blob: Any = module.get_submodule("3.w1")
    blob = blob.prepare()
    elsewhere = copy.copy(blob)
    elsewhere.blob = blob.blob.to("meta")
    assert GroupedMatrices.of([[blob, elsewhere]]) is None


@pytest.mark.parametrize("how", ["moved", "streamed", "decoded"])
def test_weights_that_layers_let_go_of_are_freed(on_gpu: list[tuple[int, ...]], how: str) -> None:
    module: Any = mixtral()
    x, ids, weights = routing(2, 2)
    module(x, ids, weights)
    layers = [child for child in module.modules() if isinstance(child, RansLinear)]
    blobs = [weakref.ref(child.prepare()) for child in layers]
    stack = coded_experts._grouped_matrices(module, "down_proj")
    module.to("cpu")  # where it is: a graph may read the table
    assert coded_experts._grouped[module]["down_proj"][1] is stack
    del stack
    if how == "moved":
        module._apply(torch.clone)
    elif how == "decoded":
        coded_experts.decode_experts(module)
        layers.clear()
    else:
        for child in layers:
            child._lend(None)
            child.streamed = True
        assert coded_experts._both_grouped(module, x, ids) is None
    gc.collect()
    assert not [blob for blob in blobs if blob() is not None]


def test_new_weights_are_seen(on_gpu: list[tuple[int, ...]]) -> None:
    module = mixtral()
    x, ids, weights = routing(2, 2)
    before = module(x, ids, weights)
    stack = coded_experts._grouped_matrices(module, "down_proj")
    assert coded_experts._grouped_matrices(module, "down_proj") is stack
    for expert in range(EXPERTS):
        module.get_submodule(str(expert))["w2"] = layer(COLS, INNER, 500 + expert, "cpu")
    assert coded_experts._grouped_matrices(module, "down_proj") is not stack
    assert not torch.allclose(before, module(x, ids, weights))


@pytest.mark.gpu
def test_warmup_runs_grouped_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of gate and up, and of down; each of both types."""
    run, linear = [], GroupedMatrices.linear

    def note(stack: GroupedMatrices, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        run.append((x.dtype, x.shape[1], tuple(ids.shape)))
        return linear(stack, x, ids)

    monkeypatch.setattr(GroupedMatrices, "linear", note)
    kvpack.warmup(mixtral("cuda"), tokens=(1, 8))
    assert len(run) == len(set(run)) == 8


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [(5,), (5, 4)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_on_a_gpu(tokens: int, dtype: torch.dtype, bits: tuple[int, ...]) -> None:
    """Eager, and one graph for other ids."""
    module = mixtral("cuda", bits)
    reference = mixtral("cpu", bits)
    x, ids, weights = routing(tokens, 2, "cuda")
    x, weights = x.to(dtype), weights.to(dtype)

    def check(got: torch.Tensor) -> None:
        wanted = reference(x.cpu().float(), ids.cpu(), weights.cpu().float())
        error = (got.cpu().float() - wanted).norm() / wanted.norm()
        assert error < (4e-3 if dtype == torch.float16 else 3e-2)

    with torch.no_grad():
        check(module(x, ids, weights))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = module(x, ids, weights)
        for turn in range(3):
            ids.copy_((ids + turn) % EXPERTS)
            graph.replay()
            check(out)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of generate, on configs of its own making
@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe", "deepseek v3"])
def test_a_model_in_one_graph_a_token(tmp_path: Path, name: str) -> None:
    """Two rows, whose tokens choose their own experts at each step."""
    architecture = ARCHITECTURES[name]
    kvpack.compress(architecture.save(tmp_path / "plain"), tmp_path / "coded", kvpack.QuantConfig(bits=4.25))
    model = architecture.class_.from_pretrained(tmp_path / "coded", dtype=torch.float16, device_map="cuda")
    assert any(type(module).__name__.startswith("Coded") for module in model.modules())
    ids = architecture.example()["input_ids"].cuda()

    def decoder() -> DecodeGraph:
        return DecodeGraph(model, transformers.StaticCache(model.config, max_cache_len=64))

    eager = decoder()
    expected = [eager.prompt(ids).clone()]
    while len(expected) < 40:
        eager._has_run = False  # no capture
        expected.append(eager.step().clone())
    captured = decoder()
    found = captured.generate(ids, max_new_tokens=40)
    assert captured.is_captured
    assert torch.equal(found[:, ids.shape[1] :], torch.stack(expected, 1))
