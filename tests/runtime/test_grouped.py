"""Products with the matrices of a stack, on the emulator: each row against its own matrix, whatever the ids are."""

from __future__ import annotations

import functools
from dataclasses import replace

import emulator
import numpy as np
import pytest
import sample_blobs as samples

torch = pytest.importorskip("torch")

from emulated_device import LIMITS, coded_tensor, emulated_launch  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402

import kvpack  # noqa: E402
from kvpack.encode.blob_decoder import decode_integers, rotate_left  # noqa: E402
from kvpack.encode.blob_encoder import encode_elements  # noqa: E402
from kvpack.format.blob import Blob  # noqa: E402
from kvpack.format.header import BlobHeader  # noqa: E402
from kvpack.format.layout import ElementKind, TileMode, float_layouts, integer_layout  # noqa: E402
from kvpack.runtime.device import kernels, semaphores  # noqa: E402
from kvpack.runtime.device.devices import Limits  # noqa: E402
from kvpack.runtime.weights import grouped, products  # noqa: E402
from kvpack.runtime.weights.device_blob import DeviceBlob  # noqa: E402
from kvpack.runtime.weights.grouped import Stack, blob_matrices, stack_matrices  # noqa: E402
from kvpack.runtime.weights.launch_model import gemm_launches, gemv_launches  # noqa: E402
from kvpack.runtime.weights.products import Coded  # noqa: E402

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler for the emulator")


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "launch", emulated_launch)


def stacked(
    experts: int, rows: int, cols: int, name: str = "fast", bits: int = 5, *, tile_cols: int = 192
) -> tuple[bytes, np.ndarray]:
    """A blob of several matrices, and scales by row."""
    elements = samples.gaussian_elements((experts, rows, cols), bits, 0.97 * (1 << bits) / 8, experts)
    scales = np.random.default_rng(rows).uniform(0.5, 1.5, experts * rows).astype(np.float32) / 64
    data = encode_elements(elements, integer_layout(name, ElementKind.SIGNED, bits), tile_cols=tile_cols)
    return data, scales


def stack_of(data: bytes, scales: np.ndarray) -> Stack:
    coded = coded_tensor(data, scales)
    return Stack(coded, torch.from_numpy(blob_matrices(coded)), len(coded.tables))


def dense(data: bytes, scales: np.ndarray) -> np.ndarray:
    integers = decode_integers(Blob(data))
    by_row = np.broadcast_to(scales, integers.shape[0] * integers.shape[1]).reshape(*integers.shape[:2], 1)
    return integers.astype(np.float64) * by_row


# Of a row. Few vectors of fp32 are two of 11 bits each; one is rounded to 16 bits of the largest of each chunk.
ERRORS = {torch.float16: 1e-3, torch.bfloat16: 4e-3, torch.float32: 3e-5}


def expected(weights: np.ndarray, x: torch.Tensor, ids: torch.Tensor) -> np.ndarray:
    """Of each pair, the row times the matrix; zeros where there is none."""
    tokens, flat = x.double().numpy(), ids.flatten().tolist()
    each = len(flat) // len(tokens)
    out = np.zeros((len(flat), weights.shape[1]))
    for pair, expert in enumerate(flat):
        if 0 <= expert < len(weights):
            out[pair] = weights[expert] @ tokens[pair // each]
    return out


def check(
    stack: Stack, weights: np.ndarray, ids: torch.Tensor, *, dtype: torch.dtype = torch.float16, each: bool = False
) -> torch.Tensor:
    rng = np.random.default_rng(ids.numel())
    rows = ids.numel() if each else len(ids)
    x = torch.from_numpy(rng.normal(0, 1, (rows, weights.shape[2]))).to(dtype)
    wanted = expected(weights, x, ids)
    got = grouped.multiply(stack, x, ids, LIMITS)
    assert got.dtype == dtype
    for row, right, expert in zip(got.double().numpy(), wanted, ids.flatten().tolist(), strict=True):
        if not 0 <= expert < len(weights):
            assert not row.any()
            continue
        assert np.linalg.norm(row - right) / np.linalg.norm(right) < ERRORS[dtype]
    assert torch.equal(got, grouped.multiply(stack, x, ids, LIMITS))
    return got


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_token(dtype: torch.dtype) -> None:
    data, scales = stacked(4, 94, 300)
    stack = stack_of(data, scales)
    assert (Blob(data).tiles["mode"] == TileMode.RANS).any()
    for ids in ([3, 0], [1, 1], [-1, 2], [4, 1 << 32]):
        check(stack, dense(data, scales), torch.tensor([ids]), dtype=dtype)
    assert stack.first.status.tolist() == [0, 0]


ROUTINGS = {
    "by chance": lambda rng: rng.integers(0, 5, (12, 2)),
    "all to one": lambda _: np.full((12, 2), 3),
    "all to two": lambda _: np.broadcast_to([4, 0], (12, 2)),
    "none": lambda _: np.full((12, 2), 5),
    "some to none": lambda rng: rng.integers(-2, 7, (12, 2)),
    "far out of range": lambda rng: rng.choice([1, 1 << 31, 1 << 32, -(1 << 63), (1 << 63) - 1], (12, 2)),
}


@pytest.mark.parametrize(
    ("routing", "dtype"),
    [
        *((routing, torch.float16) for routing in ROUTINGS),
        ("some to none", torch.bfloat16),
        ("by chance", torch.float32),
    ],
)
def test_few_tokens(routing: str, dtype: torch.dtype) -> None:
    data, scales = stacked(5, 94, 300)
    stack = stack_of(data, scales)
    ids = torch.from_numpy(np.ascontiguousarray(ROUTINGS[routing](np.random.default_rng(0))).astype(np.int64))
    check(stack, dense(data, scales), ids, dtype=dtype)
    assert stack.first.status.tolist() == [0, 0]


@pytest.mark.parametrize(("name", "bits"), [("compact", 4), ("balanced", 8), ("fast", 8), ("balanced", 3)])
@pytest.mark.parametrize(("rows", "cols"), [(33, 131), (300, 64)])
def test_layouts_and_odd_shapes(name: str, bits: int, rows: int, cols: int) -> None:
    data, scales = stacked(3, rows, cols, name, bits)
    stack = stack_of(data, scales)
    check(stack, dense(data, scales), torch.tensor([[2, 0]]), each=True)
    check(stack, dense(data, scales), torch.tensor([[0, 2]] * 9), each=True)
    assert stack.first.status.tolist() == [0, 0]


def mixed_blob() -> bytes:
    """[4, 300, 150]: tiles of all modes, several tables, outliers in two matrices."""
    elements = np.concatenate([samples.mixed_elements(), samples.mixed_elements()[::-1]])
    elements[2, :256, :64] = samples.gaussian_elements((256, 64), 6, 3.0, 4)
    outliers = [(0, 299, 149, 77), (2, 0, 0, -300), (2, 31, 64, 5), (2, 32, 149, 1000), (3, 290, 5, 9)]
    return samples.encode_with_outliers(
        elements, outliers, integer_layout("compact", ElementKind.SIGNED, 6), tile_cols=64
    )


IDS = {
    "one token": [[2, 0, 3, 9]],
    "few tokens": [[0, 2], [2, 3], [-1, 1], [2, 0], [2, 3], [3, 0], [2, 0], [1, 2], [2, 2]],
}


@pytest.mark.parametrize("ids", IDS.values(), ids=list(IDS))
def test_modes_tables_and_outliers(ids: list[list[int]]) -> None:
    data = mixed_blob()
    assert Blob(data).header.num_tables > 1
    assert len(set(Blob(data).tiles["mode"].tolist())) == 3
    scales = np.full(1, 0.1, np.float32)
    stack = stack_of(data, scales)
    check(stack, dense(data, scales), torch.tensor(ids))
    assert stack.first.status.tolist() == [0, 0]


def blobs_apart() -> tuple[Stack, np.ndarray]:
    """Three experts of two parts, each a blob of its own, with different numbers of tables; one is another stack's.

    Their arrays are parts of one, as the emulator knows no addresses but those of a launch's arguments.
    """
    shape, layout = (100, 150), integer_layout("compact", ElementKind.SIGNED, 6)
    blobs, weights = [], []
    for number in range(6):
        elements = samples.gaussian_elements((1, *shape), 6, 1.0 + number, number)
        if number % 2:
            elements[:, :, :64] = samples.gaussian_elements((1, 100, 64), 6, 9.0, number)
        if number == 2:
            elements[:] = 44
        data = encode_elements(elements, layout, tile_cols=64)
        scales = np.random.default_rng(number).uniform(0.5, 1.5, 100).astype(np.float32) / 64
        blobs.append(coded_tensor(data, scales))
        weights.append(dense(data, scales)[0])
    assert [len(blob.tables) for blob in blobs] == [1, 2, 0, 2, 1, 1]

    def joined(name: str) -> list[torch.Tensor]:
        parts = [getattr(blob, name) for blob in blobs]
        ends = np.cumsum([0] + [-(-len(part) // 16) * 16 for part in parts]).tolist()
        whole = torch.zeros((ends[-1], *parts[0].shape[1:]), dtype=parts[0].dtype)
        for begin, part in zip(ends, parts, strict=False):
            whole[begin : begin + len(part)] = part
        return [whole[begin : begin + len(part)] for begin, part in zip(ends, parts, strict=False)]

    fields = {name: joined(name) for name in ("blob", "groups", "tables", "scales", "status")}
    apart = [replace(blob, **{name: views[i] for name, views in fields.items()}) for i, blob in enumerate(blobs)]
    wholes = {
        name: views[0].new_empty(0).set_(views[0].untyped_storage()).reshape(-1, *views[0].shape[1:])
        for name, views in fields.items()
    }
    words = max(blob.max_group_words for blob in blobs)
    first = replace(apart[0], max_group_words=words, **wholes)
    listed = [[apart[0], apart[1]], [apart[2], apart[3]], [apart[4], None]]
    of_parts = np.stack([np.concatenate(weights[i : i + 2]) for i in (0, 2, 4)])
    of_parts[2, 100:] = 0
    return Stack(first, torch.from_numpy(stack_matrices(listed, apart[0])), 2), of_parts


@pytest.mark.parametrize("ids", IDS.values(), ids=list(IDS))
def test_blobs_of_their_own(ids: list[list[int]]) -> None:
    stack, weights = blobs_apart()
    assert stack.first.scale_stride == 1
    check(stack, weights, torch.tensor(ids))
    assert not stack.first.status.any()


@pytest.mark.parametrize("tokens", [1, 9])
def test_damage_is_reported(tokens: int) -> None:
    """The group is that of the whole blob; experts that nobody asks for are not looked at."""
    data, scales = stacked(4, 94, 300)
    stack = stack_of(data, scales)
    coded, blob = stack.first, Blob(data)
    tile = blob.tiles[2 * blob.header.num_tiles // 4]  # expert 2
    assert tile["mode"] == TileMode.RANS
    states = blob.header.payload_offset + int(tile["data_offset"]) + 32
    coded.blob[states + 4 * 40] ^= 1  # row 40
    x = torch.ones(tokens, 300, dtype=torch.float16)
    grouped.multiply(stack, x, torch.tensor([[0, 3]] * tokens), LIMITS)
    assert coded.status.tolist() == [0, 0]
    grouped.multiply(stack, x, torch.tensor([[1, 2]] * tokens), LIMITS)
    count, where = coded.status.tolist()
    per_matrix = len(coded.groups) // 4
    assert count == 1
    assert ~where == 2 * per_matrix + coded.header.num_tiles_col  # the second group of rows, the first column


def one_matrix(coded: Coded, expert: int) -> Coded:
    """The same matrix as an ordinary product's."""
    header, count = coded.header, len(coded.groups) // coded.header.matrices
    return replace(
        coded,
        header=replace(header, matrices=1),
        groups=coded.groups[expert * count : (expert + 1) * count],
        scales=coded.scales[expert * header.rows : (expert + 1) * header.rows],
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bits_of_an_ordinary_product(dtype: torch.dtype) -> None:
    """By the same launch, whatever the other rows are."""
    data, scales = stacked(4, 150, 333)
    stack = stack_of(data, scales)
    x = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (9, 333))).to(dtype)
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 4, (9, 2)))
    got = grouped.multiply(stack, x, ids, LIMITS)
    plan = grouped._plan(stack, 9, 2, LIMITS)
    assert plan.slot_pairs > 1
    for pair, expert in enumerate(ids.flatten().tolist()):
        # One of several vectors, which one is no matter.
        rows = torch.stack([x[pair // 2], x[0]])
        assert torch.equal(
            got[pair], products.multiply(one_matrix(stack.first, expert), rows, None, LIMITS, plan.fit)[0]
        )
    got = grouped.multiply(stack, x[:1], ids[:1], LIMITS)
    fit = grouped._plan(stack, 1, 2, LIMITS).fit
    for pair, expert in enumerate(ids[0].tolist()):
        assert torch.equal(got[pair], products.multiply(one_matrix(stack.first, expert), x[:1], None, LIMITS, fit)[0])


@pytest.mark.parametrize("tokens", [1, 9])
def test_order_of_blocks_does_not_show(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Whichever panel comes last, from semaphores that each launch leaves at 0."""
    data, scales = stacked(3, 94, 500, "balanced", tile_cols=64)
    stack = stack_of(data, scales)
    shape = (stack.first.header, stack.first.word_buffer_bytes, LIMITS, 4)
    launches = gemv_launches(*shape, slots=2) if tokens == 1 else gemm_launches(*shape, 1, slots=2)
    fit = next(fit for _, fit in launches if fit.panels > 2 and fit.members > 1)
    plan = grouped._Plan(fit, 1, 2) if tokens == 1 else grouped._Plan(fit, 8, grouped.most_slots(3, 18, 8))
    monkeypatch.setattr(grouped, "_plan", lambda *_: plan)
    arrivals = torch.zeros(256, dtype=torch.int32)
    monkeypatch.setattr(semaphores, "take", lambda count, device: arrivals)
    ids = torch.from_numpy(np.random.default_rng(0).integers(-1, 3, (tokens, 2)))
    x = torch.from_numpy(np.random.default_rng(1).normal(0, 1, (tokens, 500))).to(torch.float16)
    results = []
    for seed in range(3):
        monkeypatch.setattr(kernels, "launch", functools.partial(emulated_launch, shuffle_seed=seed))
        results.append(grouped.multiply(stack, x, ids, LIMITS))
        assert not arrivals.any()
    assert all(torch.equal(result, results[0]) for result in results)
    wanted = expected(dense(data, scales), x, ids)
    assert np.linalg.norm(results[0].double().numpy() - wanted) / np.linalg.norm(wanted) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("each", [False, True])
def test_more_slots_than_a_launch_has(monkeypatch: pytest.MonkeyPatch, each: bool, dtype: torch.dtype) -> None:
    """Tokens go in parts, of as many slots as can be."""
    data, scales = stacked(5, 94, 300)
    stack = stack_of(data, scales)
    launches = []
    multiply = grouped._multiply
    monkeypatch.setattr(grouped, "_MAX_BLOCKS_Z", 6)
    monkeypatch.setattr(grouped, "_multiply", lambda *given: launches.append(given[3].slots) or multiply(*given))
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 5, (33, 2)))
    check(stack, dense(data, scales), ids, dtype=dtype, each=each)
    assert len(launches) > 2
    assert max(launches) <= 6


def test_what_many_rows_are() -> None:
    """A prompt of 2,048 tokens: Mixtral's experts are expanded, those of Qwen3-30B-A3B wait for the host no more."""
    assert grouped.has_many_rows(8, 2048, 2, weights=4096 * 14336)
    assert not grouped.has_many_rows(8, 512, 2, weights=4096 * 14336)
    assert not grouped.has_many_rows(128, 2048, 8, weights=768 * 2048)
    assert not grouped.has_many_rows(8, 256, 2, weights=1 << 40)


@pytest.mark.parametrize(("pairs", "experts", "slot_pairs"), [(1, 1, 8), (70, 3, 8), (512, 64, 16), (700, 300, 32)])
def test_route(pairs: int, experts: int, slot_pairs: int) -> None:
    rng = np.random.default_rng(pairs)
    ids = torch.from_numpy(np.minimum(rng.geometric(0.1, pairs), experts + 1) - 1)
    ids[rng.random(pairs) < 0.1] = -5
    slots = grouped.most_slots(experts, pairs, slot_pairs)
    order, found = grouped.route(ids, experts, slot_pairs, slots)
    flat = np.where((ids >= 0) & (ids < experts), ids, experts)
    assert np.array_equal(order, np.argsort(flat, kind="stable"))
    wanted = []
    for expert in range(experts + 1):
        (at,) = np.nonzero(np.sort(flat) == expert)
        for first in range(0, len(at), slot_pairs):
            name = expert if expert < experts else -1
            wanted.append([name, int(at[first]), min(slot_pairs, len(at) - first), 0])
    assert len(wanted) <= slots
    assert found.tolist() == wanted + [[-1, 0, 0, 0]] * (slots - len(wanted))


@pytest.mark.parametrize("experts", [1, 8, 64, 256])
@pytest.mark.parametrize("tokens", [1, 2, 16, 64])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_plans(experts: int, tokens: int, top_k: int) -> None:
    """Room for the worst routing, and no more shared memory than there is."""
    layout = integer_layout("fast", ElementKind.SIGNED, 5)
    coded = replace(coded_tensor(*stacked(1, 32, 64)), header=BlobHeader(layout, 2048, 4096, 512, experts))
    stack = Stack(coded, torch.empty((experts, 1, 8), dtype=torch.int64), 1)
    limits = Limits(90, 132, 228 << 10, 227 << 10)
    plan = grouped._plan(stack, tokens, top_k, limits)
    pairs, rng = tokens * top_k, np.random.default_rng(0)
    assert plan.fit.shared_bytes <= limits.shared_block_bytes
    if tokens == 1 and top_k <= experts:
        assert plan.slot_pairs == 1  # no two pairs of an expert
    if tokens * top_k >= 2 * experts:
        assert plan.slot_pairs >= 8
    for ids in (np.zeros(pairs, int), np.arange(pairs) % (experts + 1), rng.integers(-1, experts, pairs)):
        _, counts = np.unique(ids, return_counts=True)
        assert sum(-(-count // plan.slot_pairs) for count in counts) <= plan.slots


# The operator, on the CPU --------------------------------------------------------------------------------------------


def on_cpu(data: bytes, scales: np.ndarray) -> DeviceBlob:
    header = Blob(data).header
    shape = (header.matrices, header.rows, header.cols)
    return DeviceBlob.from_bytes(data, scales, torch.float32, shape, "cpu")


@pytest.mark.parametrize("each", [False, True])
def test_cpu(each: bool) -> None:
    data, scales = stacked(5, 94, 300)
    blob = on_cpu(data, scales)
    ids = torch.tensor([[4, 0], [4, 4], [1, 2]])
    x = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (3, 2, 300) if each else (3, 300))).float()
    got = blob.grouped_linear(x, ids)
    assert got.shape == (3, 2, 94)
    wanted = expected(dense(data, scales), x.reshape(-1, 300), ids).reshape(3, 2, 94)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    assert blob.grouped_linear(x[:0], ids[:0]).shape == (0, 2, 94)


def test_cpu_decodes_what_is_asked_for() -> None:
    """Outliers and tables of some matrices; one is damaged, and asked for last."""
    data = mixed_blob()
    scales = np.random.default_rng(1).uniform(0.5, 1.5, 4 * 300).astype(np.float32) / 64
    wanted = dense(data, scales)
    damaged, header = bytearray(data), Blob(data).header
    tiles = Blob(data).tiles[header.num_tiles_row * header.num_tiles_col :]
    damaged[header.payload_offset + int(tiles[0]["data_offset"])] ^= 1
    blob = on_cpu(bytes(damaged), scales)
    x = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (2, 150))).float()
    ids = torch.tensor([[3, 0], [2, 3]])
    got = blob.grouped_linear(x, ids)
    np.testing.assert_allclose(got.flatten(0, 1), expected(wanted, x, ids), rtol=1e-4, atol=1e-3)
    with pytest.raises(kvpack.FormatError, match=f"tile {header.num_tiles_row * header.num_tiles_col}:"):
        blob.grouped_linear(x, ids - 1 + (ids == 0))


def test_cpu_lossless_floats() -> None:
    values = np.random.default_rng(0).normal(0, 1, (3, 40, 64)).astype(np.float16)
    elements = rotate_left(values.view(np.uint16), 16)
    layout = next(iter(float_layouts(ElementKind.FP16)))
    data = encode_elements(elements, layout, tile_cols=64)
    blob = DeviceBlob.from_bytes(data, None, torch.float16, values.shape, "cpu")
    x = torch.from_numpy(np.random.default_rng(1).normal(0, 1, (2, 64))).float()
    ids = torch.tensor([[2, 0], [2, 1]])
    wanted = expected(values.astype(np.float64), x, ids).reshape(2, 2, 40)
    np.testing.assert_allclose(blob.grouped_linear(x, ids), wanted, rtol=1e-4, atol=1e-5)


def test_refusals() -> None:
    blob = on_cpu(*stacked(5, 94, 300))
    x, ids = torch.ones(2, 300), torch.tensor([[0, 4], [1, 5]])
    with pytest.raises(kvpack.InputError, match=r"id 3 of 4 is 5: the blob holds 5 matrices, 0 to 4"):
        blob.grouped_linear(x, ids)
    with pytest.raises(kvpack.InputError, match=r"id 0 of 4 is -1"):
        blob.grouped_linear(x, ids - 1)
    with pytest.raises(kvpack.InputError, match=r"ids are torch.int32 \[2, 2\]"):
        blob.grouped_linear(x, ids.int())
    with pytest.raises(kvpack.InputError, match=r"activations are \[3, 300\] for ids \[2, 2\]"):
        blob.grouped_linear(torch.ones(3, 300), ids)
    with pytest.raises(ValueError, match="activations have 299 columns, the weight 300"):
        blob.grouped_linear(torch.ones(2, 299), ids)


def test_shapes_without_numbers() -> None:
    blob = on_cpu(*stacked(5, 94, 300))
    with FakeTensorMode(allow_non_fake_inputs=True):
        got = blob.grouped_linear(torch.empty(3, 300, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.int64))
    assert (got.shape, got.dtype) == ((3, 2, 94), torch.bfloat16)
