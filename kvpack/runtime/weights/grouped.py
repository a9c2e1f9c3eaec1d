"""Products with many matrices of one shape in one launch: each row of activations with the one that its id says.

A stack has a matrix, or several whose results lie side by side, for each expert. They may be those of one blob, or of
blobs of their own; a kernel finds them by a table in the device's memory (:func:`blob_matrices`,
:func:`stack_matrices`), and which of them are asked for is known to the device alone: nothing here waits for it, and
all can be captured in a CUDA graph. See ``cuda/weights/grouped.cuh``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from kvpack.errors import DeviceError, InputError
from kvpack.format.layout import GROUP_LANES, ceil_div
from kvpack.runtime.device import kernels, semaphores
from kvpack.runtime.device.devices import Limits
from kvpack.runtime.device.kernels import Kernel
from kvpack.runtime.weights import expansion, products
from kvpack.runtime.weights.launch_costs import device_costs
from kvpack.runtime.weights.launch_model import ProductFit, fit_gemm, fit_gemv
from kvpack.runtime.weights.products import GROUPED_TOKEN_TILES, Coded

# As StackedMatrix in cuda/weights/grouped.cuh: bytes behind the first matrix's blob, groups, tables, scales and status;
# then the number of its first group in a report of damage, its tables, and its launches.
MATRIX_NUMBERS = 8
_ROUTE_WARPS = 32
_MAX_BLOCKS_Z = 65535
# Three numbers for each expert are in 48 KiB.
MAX_EXPERTS = 4000
# Where pairs meet so few others of their expert, to decode a matrix once more costs less than to find them.
_APART = 0.9
# Rows of an expert, on average, up to which its matrix is decoded for 32 of them at a time; and rows times weights of a
# matrix, as a grouped product does them in the 146 µs that the host takes to ask for the rows of one expert, expand its
# matrix, and multiply (H200, 2,048 tokens and 128 experts of 768 × 2048).
_MOST_ROWS = 64
_ROWS_BY_WEIGHTS = 9.4e9


@dataclass(frozen=True)
class Stack:
    """Matrices of one shape and layout.

    Attributes:
        first: what kernels need of the first; its ``max_group_words`` is the most of all.
        matrices: i64 [experts, parts, 8]: where all of them lie, from the first; 0 launches of those that are not here.
        max_tables: the most tables of a matrix.
    """

    first: Coded
    matrices: torch.Tensor
    max_tables: int

    @property
    def experts(self) -> int:
        return self.matrices.shape[0]

    @property
    def parts(self) -> int:
        return self.matrices.shape[1]


def blob_matrices(coded: Coded) -> npt.NDArray[np.int64]:
    """The table of a blob's own matrices, i64 [matrices, 1, 8]."""
    header, tables = coded.header, len(coded.tables)
    number = np.arange(header.matrices, dtype=np.int64)
    first_group = number * (coded.row_groups * header.num_tiles_col)
    found = np.zeros((header.matrices, 1, MATRIX_NUMBERS), np.int64)
    found[:, 0, 1] = 16 * first_group
    found[:, 0, 3] = 4 * header.rows * number * coded.scale_stride
    found[:, 0, 5] = first_group
    found[:, 0, 6:] = tables, max(1, tables)
    return found


def stack_matrices(stack: Sequence[Sequence[Coded | None]], first: Coded) -> npt.NDArray[np.int64]:
    """The same of blobs of one matrix each, wherever they were allocated; ``first`` is one of them."""
    found = np.zeros((len(stack), len(stack[0]), MATRIX_NUMBERS), np.int64)
    base = _addresses(first)
    for expert, parts in enumerate(stack):
        for part, coded in enumerate(parts):
            if coded is not None:
                if coded.row_offsets is not None or coded.column_scales is not None:
                    raise InputError("no grouped products with row offsets or column scales")
                tables = len(coded.tables)
                found[expert, part, :5] = _addresses(coded) - base
                found[expert, part, 6:] = tables, max(1, tables)
    return found


def _addresses(coded: Coded) -> npt.NDArray[np.int64]:
    tensors = (coded.blob, coded.groups, coded.tables, coded.scales, coded.status)
    return np.array([tensor.data_ptr() for tensor in tensors], np.int64)


def has_many_rows(experts: int, tokens: int, top_k: int, *, weights: int) -> bool:
    """Whether experts have so many rows that to expand each one's matrix, after a look at the ids, is faster.

    ``weights``: of one matrix. Small ones are soon multiplied, and it would be the host that is waited for.
    """
    return tokens * top_k > max(_MOST_ROWS, _ROWS_BY_WEIGHTS / weights) * _busy(tokens, top_k, experts)


def multiply_each(coded: Coded, x: torch.Tensor, ids: torch.Tensor, limits: Limits) -> torch.Tensor:
    """What :func:`multiply` does, for a blob's own matrices: one after the other, expanded. Waits for the device."""
    flat = ids.flatten()
    out = torch.zeros((len(flat), coded.header.rows), dtype=x.dtype, device=x.device)
    each = len(flat) // len(x)
    for expert in torch.unique(flat).tolist():
        if 0 <= expert < coded.header.matrices:
            pairs = torch.nonzero(flat == expert)[:, 0]
            out[pairs] = expansion.multiply(coded, x[pairs // each], None, limits, matrix=expert)
    return out


@dataclass(frozen=True)
class _Plan:
    """``slot_pairs``: of a slot at most, 1 for the kernel of one vector; ``slots``: as many as there can be."""

    fit: ProductFit
    slot_pairs: int
    slots: int


def _busy(tokens: int, top_k: int, experts: int) -> float:
    """How many experts get work if each token chooses ``top_k`` of them by chance."""
    if top_k >= experts:
        return min(experts, tokens * top_k)
    return experts * (1 - (1 - top_k / experts) ** tokens)


def most_slots(experts: int, pairs: int, slot_pairs: int) -> int:
    """How many slots pairs can take: each expert's last one may have a single pair, and so may those of no expert."""
    lists = min(experts + 1, pairs)
    return lists + (pairs - lists) // slot_pairs


def _plan(stack: Stack, tokens: int, top_k: int, limits: Limits) -> _Plan:
    """The launch for ``tokens`` rows of ``top_k`` different experts."""
    coded, pairs = stack.first, tokens * top_k
    busy = max(1.0, _busy(tokens, top_k, stack.experts))
    if busy < _APART * pairs:
        # Blocks of more experts than expected would wait for all others to end: room for a standard deviation more.
        spread = math.sqrt(busy * (1 - busy / stack.experts))
        probable = min(stack.experts, pairs, math.ceil(busy + spread))
        wanted = products.token_tiles(min(8 * GROUPED_TOKEN_TILES[-1], ceil_div(2 * pairs, round(busy))))
        for eights in reversed([eights for eights in GROUPED_TOKEN_TILES if eights <= wanted]):
            slot_pairs = 8 * eights
            active = max(probable, ceil_div(pairs, slot_pairs))
            fit = _fit(stack, eights, active, limits)
            if fit is not None:
                return _Plan(fit, slot_pairs, most_slots(stack.experts, pairs, slot_pairs))
    fit = _fit(stack, 0, pairs, limits)
    if fit is None:
        products.check_fits(coded.header, coded.max_group_words, limits)
    assert fit is not None  # no more than what has just been checked
    return _Plan(fit, 1, pairs)


def _fit(stack: Stack, eights: int, slots: int, limits: Limits) -> ProductFit | None:
    coded = stack.first
    matrices = slots * stack.parts
    shape = (coded.header, coded.word_buffer_bytes, limits)
    panels = products.max_panels(coded, max(1, 8 * eights), matrices, stack.max_tables)
    costs = device_costs(limits).costs[eights]
    if eights == 0:
        warps = products.gemv_warps(coded.layout, limits.architecture, grouped=True)
        return fit_gemv(*shape, warps, panels, matrices, costs) or fit_gemv(*shape, warps, slots=matrices, costs=costs)
    warps = products.gemm_warps(coded.layout, eights, limits.architecture, grouped=True)
    return fit_gemm(*shape, warps, eights, panels, matrices, costs)


@lru_cache(maxsize=1)
def route_kernel() -> Kernel:
    """Pairs dealt to slots, see ``cuda/weights/route.cu``."""
    return Kernel.of(
        "weights/route.cu",
        "route",
        None,
        {"KVPACK_GROUPED": 1, "KVPACK_MAX_WARPS": _ROUTE_WARPS, "KVPACK_BLOCKS_PER_SM": 1},
    )


def route(ids: torch.Tensor, experts: int, slot_pairs: int, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs by expert, and slots of up to ``slot_pairs`` of them.

    Args:
        ids: contiguous i64 of any shape.

    Returns:
        i32 [pairs], i32 [slots, 4]: see ``cuda/weights/route.cu``.
    """
    order = torch.empty(ids.numel(), dtype=torch.int32, device=ids.device)
    found = torch.empty((slots, 4), dtype=torch.int32, device=ids.device)
    numbers = (ids.numel(), experts, slot_pairs, slots)
    kernels.launch(
        route_kernel(),
        1,
        (GROUP_LANES, _ROUTE_WARPS),
        (ids, order, found, *map(np.uint32, numbers)),
        device=ids.device,
        shared_bytes=12 * (experts + 1) + 4,
    )
    return order, found


def multiply(stack: Stack, x: torch.Tensor, ids: torch.Tensor, limits: Limits) -> torch.Tensor:
    """Each row of x times the matrices that its ids name.

    Args:
        x: contiguous [tokens, cols], or [tokens · top_k, cols], a row for each id; fp16, bf16 or fp32.
        ids: contiguous i64 [tokens, top_k].

    Returns:
        [tokens · top_k, parts · rows] of x's type; zeros where an id is no expert's, or its matrix is not in the stack.
        The same bits at each run, whatever else the ids are, as long as shapes are the same.
    """
    if stack.experts > MAX_EXPERTS:
        raise DeviceError(f"{stack.experts} experts; one launch takes up to {MAX_EXPERTS}")
    tokens, top_k = ids.shape
    if not ids.numel():
        return torch.empty((0, stack.parts * stack.first.header.rows), dtype=x.dtype, device=x.device)
    plan = _plan(stack, tokens, top_k, limits)
    in_halves = x.dtype == torch.float32 and plan.slot_pairs > 1
    if in_halves:
        plan = _plan(stack, 2 * tokens, top_k, limits)
    if plan.slots * stack.parts > _MAX_BLOCKS_Z and tokens > 1:
        half = tokens // 2
        rows = half * (len(x) // tokens)
        parts = (x[:rows], ids[:half]), (x[rows:], ids[half:])
        return torch.cat([multiply(stack, *part, limits) for part in parts])
    if not in_halves:
        return _multiply(stack, x, ids, plan, limits)
    upper, lower = _multiply(stack, products.halves_of(x), ids.repeat(2, 1), plan, limits).chunk(2)
    return upper + lower


def _multiply(stack: Stack, x: torch.Tensor, ids: torch.Tensor, plan: _Plan, limits: Limits) -> torch.Tensor:
    """One product, in a launch for each table."""
    coded, pairs, width = stack.first, ids.numel(), stack.parts * stack.first.header.rows
    out = torch.empty((pairs, width), dtype=x.dtype, device=x.device)
    fit, matrices = plan.fit, plan.slots * stack.parts
    if matrices > _MAX_BLOCKS_Z:
        raise InputError(
            f"{pairs} ids may need {matrices} matrices at once; a launch takes {_MAX_BLOCKS_Z}: give fewer"
        )
    launches = max(1, stack.max_tables)
    if plan.slot_pairs == 1:
        kernel = products.gemv_kernel(
            coded.layout, x.dtype, fit.buffers, fit.resident, limits.architecture, grouped=True
        )
        own: tuple[torch.Tensor | np.generic, ...] = (ids, stack.matrices, np.uint32(stack.experts))
    else:
        order, slots = route(ids, stack.experts, plan.slot_pairs, plan.slots)
        eights = plan.slot_pairs // 8
        kernel = products.gemm_kernel(
            coded.layout, x.dtype, fit.buffers, fit.resident, eights, limits.architecture, grouped=True
        )
        own = (np.uint32(0), order, slots, stack.matrices)
    own = (*own, np.uint32(stack.parts), np.uint32(pairs // len(x)), np.uint32(width))
    partials = arrivals = None
    if fit.panels * launches > 1:
        sums = matrices * coded.row_groups * GROUP_LANES * plan.slot_pairs
        partials = torch.empty(sums * fit.panels * launches, dtype=torch.float32, device=x.device)
        # Semaphores are not 0 between the launches of several tables; shared ones would mislead another product.
        count = matrices * coded.row_groups
        if launches > 1:
            arrivals = torch.zeros(count, dtype=torch.int32, device=x.device)
        else:
            arrivals = semaphores.take(count, x.device)
    numbers = products.product_numbers(coded, fit)
    arguments = products.product_arguments(coded, numbers, x, coded.tables, None, out, partials, arrivals)
    for index in range(launches):
        kernels.launch(
            kernel,
            (fit.blocks, fit.panels, matrices),
            (GROUP_LANES, fit.members, fit.teams),
            (*arguments, np.uint32(index), np.uint32(launches), *own),
            device=x.device,
            shared_bytes=fit.shared_bytes,
        )
    return out
