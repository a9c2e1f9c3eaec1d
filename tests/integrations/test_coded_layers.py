"""Coded layers as vLLM multiplies with them: parts of tensors, behind handles that torch.compile cannot tell apart."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from coded_files import arrived_from, coded_file, numbers_of

from kvpack.errors import InputError, NotSupportedError
from kvpack.integrations.vllm.arriving import Part, stacked
from kvpack.integrations.vllm.coded_experts import ExpertMatrices, StackedExperts
from kvpack.integrations.vllm.coded_layer import CodedLayer

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Largest error over the largest result. A GPU's fused products round activations of fp32 as those of fp16.
TYPES = {torch.float32: 1e-3, torch.float16: 1e-3, torch.bfloat16: 8e-3}
_ON_THE_CPU = {torch.float32: 2e-6}


def _parts(folder: Path, spans: list[tuple[int, int]], *, cols: int = 320) -> tuple[list[Part], torch.Tensor]:
    """Parts of files of 320 rows each, and their numbers one below the other."""
    parts, numbers = [], []
    for number, (first, stop) in enumerate(spans):
        own = folder / str(number)
        own.mkdir(parents=True)
        file = coded_file(own, (320, cols), seed=number)
        parts.append(arrived_from(file).outputs(first, stop))
        numbers.append(numbers_of(file)[first:stop])
    return parts, torch.cat(numbers)


def _check(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Against float64, relative to what sums of that length may be off by."""
    right = x.double() @ weight.double().to(x.device).T
    if bias is not None:
        right = right + bias.double()
    error = (out.double() - right).abs().max() / right.abs().max()
    assert error < (TYPES if x.is_cuda else TYPES | _ON_THE_CPU)[x.dtype], error


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("spans", [[(0, 320)], [(3, 70)], [(0, 320), (0, 320), (64, 96)], [(0, 320), (31, 33)]])
def test_products(tmp_path: Path, device: str, dtype: torch.dtype, tokens: int, spans: list[tuple[int, int]]) -> None:
    """Whole tensors as one blob, and parts at whatever borders; with a bias, and rows that no part has."""
    parts, weight = _parts(tmp_path, spans)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((tokens, 320), generator=generator).to(dtype).to(device)
    bias = torch.randn(len(weight), generator=generator).to(dtype).to(device)
    layer = CodedLayer(stacked(parts), torch.device(device))
    assert layer.rows == len(weight)
    for own in (None, bias):
        _check(torch.ops.kvpack.linear_of(x, layer.handle, layer.rows, own), x, weight, own)
    wide = CodedLayer(parts, torch.device(device), len(weight) + 7)
    out = torch.ops.kvpack.linear_of(x, wide.handle, wide.rows, None)
    _check(out[:, : len(weight)], x, weight, None)
    assert not out[:, len(weight) :].any()


@pytest.mark.parametrize("device", DEVICES)
def test_look_ups(tmp_path: Path, device: str) -> None:
    parts, weight = _parts(tmp_path, [(37, 300)])
    layer = CodedLayer(parts, torch.device(device))
    # A column of others: ids that do not lie one behind another.
    ids = torch.tensor([[[0, 7], [262, 8]], [[5, 9], [5, 9]]], device=device)[..., 0]
    rows = torch.ops.kvpack.rows_of(ids, layer.handle, layer.columns, torch.float32)
    assert torch.equal(rows.cpu(), weight[ids.cpu()])


def test_one_graph_for_all_layers(tmp_path: Path) -> None:
    """Blobs of other lengths, other tables and scales: the second layer compiles nothing."""
    layers = []
    for number in range(2):
        parts, weight = _parts(tmp_path / str(number), [(0, 320), (32 * number, 32 * number + 64)])
        layers.append((CodedLayer(parts, torch.device("cpu")), weight))
    compiled = []

    def backend(graph: torch.fx.GraphModule, _example: list[torch.Tensor]) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    @torch.compile(backend=backend, fullgraph=True)
    def forward(x: torch.Tensor, handle: torch.Tensor, rows: int) -> torch.Tensor:
        return torch.relu(torch.ops.kvpack.linear_of(x, handle, rows, None))

    x = torch.randn((3, 320), generator=torch.Generator().manual_seed(2))
    for layer, weight in layers:
        out = forward(x, layer.handle, layer.rows)
        torch.testing.assert_close(out, torch.relu(x @ weight.T), atol=1e-4, rtol=1e-5)
    assert len(compiled) == 1


def test_a_handle_of_a_layer_that_is_gone(tmp_path: Path) -> None:
    layer = CodedLayer(_parts(tmp_path, [(0, 320)])[0], torch.device("cpu"))
    handle = layer.handle
    del layer
    gc.collect()
    with pytest.raises(InputError, match="names no coded layer"):
        torch.ops.kvpack.linear_of(torch.zeros(1, 320), handle, 320, None)


def _experts(folder: Path, device: str, count: int = 3) -> tuple[ExpertMatrices, list[torch.Tensor]]:
    made = [_parts(folder / str(number), [(0, 320), (0, 320)]) for number in range(count)]
    return ExpertMatrices([stacked(parts) for parts, _ in made], torch.device(device)), [weight for _, weight in made]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("by_id", [False, True])
def test_experts(tmp_path: Path, device: str, tokens: int, by_id: bool) -> None:
    """A row for each token or for each id; an id of −1 gives zeros, and so many tokens are multiplied one by one."""
    matrices, weights = _experts(tmp_path, device)
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(-1, 3, (tokens, 2), generator=generator)
    x = torch.randn((tokens, 2, 320) if by_id else (tokens, 320), generator=generator).to(torch.bfloat16)
    out = matrices.product(x.to(device), ids.to(device)).cpu()
    assert out.shape == (tokens, 2, 640)
    for token in range(tokens):
        for slot in range(2):
            row, expert = x[token, slot] if by_id else x[token], int(ids[token, slot])
            if expert < 0:
                assert not out[token, slot].any()
            else:
                _check(out[token, slot][None], row[None], weights[expert], None)


def _stack(folder: Path, device: str, spans: list[tuple[int, int]]) -> tuple[StackedExperts, torch.Tensor]:
    """Of three experts in one tensor, rows of each; and their numbers."""
    folder.mkdir(exist_ok=True)
    file = coded_file(folder, (3, 320, 192))
    parts = [arrived_from(file).outputs(*span) for span in spans]
    numbers = torch.cat([numbers_of(file)[:, first:stop] for first, stop in spans], dim=1)
    return StackedExperts(parts, torch.device(device)), numbers


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("by_id", [False, True])
@pytest.mark.parametrize("spans", [[(0, 320)], [(40, 97), (201, 258)]])
def test_experts_of_one_tensor(
    tmp_path: Path, device: str, tokens: int, by_id: bool, spans: list[tuple[int, int]]
) -> None:
    """As they are in the file, and a rank's halves of them at whatever borders."""
    matrices, weights = _stack(tmp_path, device, spans)
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(-1, 3, (tokens, 2), generator=generator)
    x = torch.randn((tokens, 2, 192) if by_id else (tokens, 192), generator=generator).to(torch.bfloat16)
    out = matrices.product(x.to(device), ids.to(device)).cpu()
    assert out.shape == (tokens, 2, weights.shape[1])
    rows = x if by_id else x[:, None].expand(-1, 2, -1)
    for expert in range(3):
        if (ids == expert).any():
            _check(out[ids == expert], rows[ids == expert], weights[expert], None)
    assert not out[ids < 0].any()
    assert not matrices.product(x.to(device), torch.full_like(ids, -1).to(device)).any()


def test_one_graph_for_all_experts(tmp_path: Path) -> None:
    """What is in them is not looked into, one by one or in one blob; an id of −1 has no part."""
    each, of_each = _experts(tmp_path / "each", "cpu")
    stack, of_stack = _stack(tmp_path / "stack", "cpu", [(0, 320)])

    @torch.compile(backend="eager", fullgraph=True)
    def forward(x: torch.Tensor, ids: torch.Tensor, handle: torch.Tensor, rows: int) -> torch.Tensor:
        return torch.relu(torch.ops.kvpack.experts_of(x, ids, handle, rows))

    ids = torch.tensor([[2, 0], [1, -1]])
    for matrices, weights in ((each, of_each), (stack, of_stack)):
        x = torch.randn((2, weights[0].shape[1]), generator=torch.Generator().manual_seed(2))
        out = forward(x, ids, matrices.handle, matrices.rows)
        for token, slot, expert in ((0, 0, 2), (0, 1, 0), (1, 0, 1)):
            torch.testing.assert_close(out[token, slot], torch.relu(weights[expert] @ x[token]), atol=1e-4, rtol=1e-5)
        assert not out[1, 1].any()


def test_experts_of_one_tensor_with_column_scales(tmp_path: Path) -> None:
    part = arrived_from(coded_file(tmp_path, (3, 64, 192))).outputs(0, 64)
    scaled = replace(part, coded=replace(part.coded, column_scales=np.ones(3 * 192, np.float16)))
    with pytest.raises(NotSupportedError, match="dense"):
        StackedExperts([scaled], torch.device("cpu"))


@pytest.mark.gpu
def test_captured(tmp_path: Path) -> None:
    """Products, look-ups and experts in a CUDA graph after their warm-up, run again with other inputs."""
    parts, weight = _parts(tmp_path / "layer", [(0, 320)])
    layer = CodedLayer(parts, torch.device("cuda"))
    matrices, weights = _experts(tmp_path / "experts", "cuda")
    stack, of_stack = _stack(tmp_path / "stack", "cuda", [(0, 320)])
    layer.warm_up(torch.bfloat16)
    matrices.warm_up(torch.bfloat16, 320, 2)
    stack.warm_up(torch.bfloat16, 192, 2)
    x = torch.zeros((4, 320), dtype=torch.bfloat16, device="cuda")
    ids = torch.zeros((4, 2), dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        product = torch.ops.kvpack.linear_of(x, layer.handle, layer.rows, None)
        rows = torch.ops.kvpack.rows_of(ids[:, 0], layer.handle, layer.columns, torch.bfloat16)
        chosen = matrices.product(x, ids)
        stacked_out = stack.product(x[:, :192], ids)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x.copy_(torch.randn((4, 320), generator=generator))
        ids.copy_(torch.randint(0, 3, (4, 2), generator=generator))
        for out in (product, rows, chosen, stacked_out):
            out.fill_(float("nan"))
        graph.replay()
        _check(product, x, weight, None)
        assert torch.equal(rows.cpu(), weight[ids[:, 0].cpu()].to(torch.bfloat16))
        for token in range(4):
            for slot in range(2):
                expert = int(ids[token, slot])
                _check(chosen[token, slot][None], x[token][None], weights[expert], None)
                _check(stacked_out[token, slot][None], x[token, :192][None], of_stack[expert], None)


@pytest.mark.gpu
def test_experts_that_no_launch_takes(tmp_path: Path) -> None:
    file = coded_file(tmp_path, (320, 320), preset="lossless", bits=None)
    part = arrived_from(file).outputs(0, 320)
    with pytest.raises(NotSupportedError, match="dense"):
        ExpertMatrices([[part], [part]], torch.device("cuda"))
    (tmp_path / "stack").mkdir()
    stack = coded_file(tmp_path / "stack", (3, 64, 192), preset="lossless", bits=None)
    with pytest.raises(NotSupportedError, match="dense"):
        StackedExperts([arrived_from(stack).outputs(0, 64)], torch.device("cuda"))
