"""Operators of ``torch.ops.kvpack`` on coded tensors, for CUDA and the CPU, traceable by ``torch.compile``.

An operator is given a coded tensor as five tensors and ``geometry``, a list of integers (:func:`pack_geometry`):

    blob u8 · groups i32 [groups, 4] · tables i32 [num_tables, 4096] · scales f32 · status i32 [2] · geometry int[]

``scales`` are followed by row offsets and column scales, all f32, where ``geometry`` says that there are some.
``grouped_linear`` takes besides them where all matrices of a stack lie (:class:`kvpack.runtime.weights.grouped.Stack`).

The CPU implementations decode with :mod:`kvpack.encode`; groups and tables are empty there.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.weak import WeakIdKeyDictionary

from kvpack.encode.blob_decoder import ParsedBlob, decode_integers
from kvpack.encode.row_decoder import decode_rows
from kvpack.encode.threads import ThreadPool
from kvpack.errors import InputError
from kvpack.format.header import BlobHeader
from kvpack.format.layout import TILE_ROWS, ElementKind, Layout, Quantizer
from kvpack.runtime.device.devices import device_limits
from kvpack.runtime.weights import expansion, grouped, mma_product, products, wgmma_product
from kvpack.runtime.weights.products import FLOAT_TYPES, LOSSLESS_TYPES, NUMBER_TYPES, Coded

_CODED = "Tensor blob, Tensor groups, Tensor tables, Tensor scales, Tensor status, int[] geometry"

_LIBRARY = torch.library.Library("kvpack", "FRAGMENT")
_LIBRARY.define(f"linear(Tensor x, {_CODED}, Tensor? bias) -> Tensor")
_LIBRARY.define(f"grouped_linear(Tensor x, Tensor ids, {_CODED}, Tensor matrices, int max_tables) -> Tensor")
_LIBRARY.define(f"dequantize({_CODED}, ScalarType dtype) -> Tensor")
_LIBRARY.define(f"numbers({_CODED}) -> Tensor")
_LIBRARY.define(f"rows(Tensor ids, {_CODED}, ScalarType dtype) -> Tensor")
_LIBRARY.define("check_lanes(" + _CODED.replace("Tensor status", "Tensor(a!) status") + ") -> ()")


def pack_geometry(
    header: BlobHeader,
    blob_bytes: int,
    max_group_words: int,
    predicted: bool,
    has_outliers: bool,
    has_row_offsets: bool = False,
    has_column_scales: bool = False,
) -> list[int]:
    """The integers that go with a coded tensor's five tensors."""
    layout = header.layout
    return [
        int(layout.element_kind),
        layout.element_bits,
        layout.code_bits,
        layout.codes_per_symbol,
        header.rows,
        header.cols,
        header.tile_cols,
        header.matrices,
        blob_bytes,
        max_group_words,
        int(predicted),
        int(has_outliers),
        int(layout.folded),
        int(has_row_offsets),
        int(has_column_scales),
        int(layout.quantizer),
    ]


def _vectors(
    scales: torch.Tensor, geometry: list[int]
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Scales, row offsets and column scales from the tensor that has them one after another."""
    if not (geometry[13] or geometry[14]):
        return scales, None, None
    rows, cols, matrices = geometry[4], geometry[5], geometry[7]
    num_offsets, num_columns = matrices * rows * geometry[13], matrices * cols * geometry[14]
    own, offsets, columns = scales.split((len(scales) - num_offsets - num_columns, num_offsets, num_columns))
    return own, offsets if num_offsets else None, columns if num_columns else None


@lru_cache(maxsize=4096)
def _header(geometry: tuple[int, ...]) -> BlobHeader:
    kind, bits, code_bits, codes_per_symbol, rows, cols, tile_cols, matrices = geometry[:8]
    layout = Layout(ElementKind(kind), bits, code_bits, codes_per_symbol, bool(geometry[12]), Quantizer(geometry[15]))
    return BlobHeader(layout=layout, rows=rows, cols=cols, tile_cols=tile_cols, matrices=matrices)


@lru_cache(maxsize=4096)
def _described(
    geometry: tuple[int, ...], num_tables: int, scale_of_rows: bool, device: torch.device
) -> tuple[BlobHeader, dict[Any, Any]]:
    """The header, and the launches that have been found for all that are described so (:attr:`Coded.found`)."""
    return _header(geometry), {}


def _coded(
    blob: torch.Tensor,
    groups: torch.Tensor,
    tables: torch.Tensor,
    scales: torch.Tensor,
    status: torch.Tensor,
    geometry: list[int],
) -> Coded:
    scales, row_offsets, column_scales = _vectors(scales.contiguous(), geometry)
    header, found = _described(tuple(geometry), len(tables), len(scales) > 1, blob.device)
    return Coded(
        header=header,
        max_group_words=geometry[9],
        predicted=bool(geometry[10]),
        has_outliers=bool(geometry[11]),
        blob=blob,
        groups=groups,
        tables=tables,
        scales=scales,
        status=status,
        row_offsets=row_offsets,
        column_scales=column_scales,
        found=found,
    )


def _check_product(x: torch.Tensor, scales: torch.Tensor, geometry: list[int]) -> None:
    _check_activations(x, scales, geometry)
    if geometry[7] != 1:
        raise ValueError(f"the blob holds {geometry[7]} matrices; a product takes one")


def _check_grouped(x: torch.Tensor, ids: torch.Tensor, scales: torch.Tensor, geometry: list[int]) -> None:
    _check_activations(x, scales, geometry)
    if geometry[13] or geometry[14]:
        raise InputError("no grouped products with row offsets or column scales; multiply with one matrix at a time")
    if ids.dtype != torch.int64 or ids.ndim != 2:
        raise InputError(f"ids are {ids.dtype} {list(ids.shape)}; i64 [tokens, top_k] are wanted")
    if ids.device != x.device:
        raise InputError(f"ids are on {ids.device}, activations on {x.device}")
    if x.shape[:-1] not in (ids.shape, ids.shape[:1]):
        raise InputError(
            f"activations are {list(x.shape)} for ids {list(ids.shape)}: a row for each token, or each id, is wanted"
        )


def _check_activations(x: torch.Tensor, scales: torch.Tensor, geometry: list[int]) -> None:
    kind, cols = ElementKind(geometry[0]), geometry[5]
    if x.dtype not in FLOAT_TYPES:
        raise TypeError(f"activations are {x.dtype}; {', '.join(map(str, FLOAT_TYPES))} are possible")
    if x.device != scales.device:
        raise ValueError(f"activations are on {x.device}, the weight on {scales.device}")
    if x.shape[-1] != cols:
        raise ValueError(f"activations have {x.shape[-1]} columns, the weight {cols}")
    if kind.is_integer and not len(scales):
        raise TypeError("a tensor of plain integers has no scales to multiply with")


def _bias(bias: torch.Tensor | None, x: torch.Tensor, rows: int) -> torch.Tensor | None:
    if bias is None:
        return None
    if bias.shape != (rows,):
        raise ValueError(f"bias has shape {list(bias.shape)}, the weight {rows} rows")
    if bias.device != x.device:
        raise ValueError(f"bias is on {bias.device}, activations are on {x.device}")
    return bias.to(x.dtype).contiguous()


def linear_cuda(
    x: torch.Tensor,
    blob: torch.Tensor,
    groups: torch.Tensor,
    tables: torch.Tensor,
    scales: torch.Tensor,
    status: torch.Tensor,
    geometry: list[int],
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """What ``torch.ops.kvpack.linear`` does on a GPU."""
    _check_product(x, scales, geometry)
    coded = _coded(blob, groups, tables, scales, status, geometry)
    rows, cols = geometry[4], geometry[5]
    tokens = x.reshape(-1, cols).contiguous()
    count = tokens.shape[0]
    bias = _bias(bias, x, rows)
    limits = device_limits(x.device)
    if count == 0:
        out = x.new_empty(0, rows)
    elif fit := wgmma_product.fit_for(coded, count, x.dtype, limits):
        out = wgmma_product.multiply(coded, tokens, bias, fit)
    elif mma_fit := mma_product.fit_for(coded, count, x.dtype, limits):
        out = mma_product.multiply(coded, tokens, bias, mma_fit)
    elif count <= products.max_fused_tokens(x.dtype) and products.can_multiply(coded.layout):
        fused = products.multiply_fp32 if x.dtype == torch.float32 else products.multiply
        out = fused(coded, tokens, bias, limits)
    else:
        out = expansion.multiply(coded, tokens, bias, limits)
    return _shaped(out, x)


def _grouped_linear_cuda(
    x: torch.Tensor,
    ids: torch.Tensor,
    blob: torch.Tensor,
    groups: torch.Tensor,
    tables: torch.Tensor,
    scales: torch.Tensor,
    status: torch.Tensor,
    geometry: list[int],
    matrices: torch.Tensor,
    max_tables: int,
) -> torch.Tensor:
    _check_grouped(x, ids, scales, geometry)
    coded = _coded(blob, groups, tables, scales, status, geometry)
    stack = grouped.Stack(coded, matrices, max_tables)
    rows, chosen, limits = x.reshape(-1, geometry[5]).contiguous(), ids.contiguous(), device_limits(x.device)
    is_own = stack.parts == 1 and stack.experts == coded.header.matrices
    # Of blobs of their own, the caller has asked whether one by one is faster.
    one_by_one = is_own and not _is_captured(x)
    one_by_one = one_by_one and grouped.has_many_rows(stack.experts, *ids.shape, weights=coded.header.matrix_elements)
    if not ids.numel() or (products.can_multiply(coded.layout) and not one_by_one):
        out = grouped.multiply(stack, rows, chosen, limits)
    elif is_own:
        out = grouped.multiply_each(coded, rows, chosen, limits)
    else:
        raise InputError("matrices of floats in blobs of their own are multiplied one by one")
    return out.resize_(*ids.shape, out.shape[1])


def _is_captured(x: torch.Tensor) -> bool:
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _shaped(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A new tensor [tokens, rows] as [..., rows], and no view: autograd forbids to change views of operators."""
    return out.resize_(*x.shape[:-1], out.shape[1])


# By a coded tensor's status, which is its own and lives as long as it does: where the blob lies, and the blob.
_parsed: WeakIdKeyDictionary = WeakIdKeyDictionary()
_pool = ThreadPool(name="kvpack-cpu")


def _blob(blob: torch.Tensor, status: torch.Tensor, geometry: list[int]) -> ParsedBlob:
    found = _parsed.get(status)
    if found is None or found[0] != blob.data_ptr():
        found = _parsed[status] = blob.data_ptr(), ParsedBlob(blob[: geometry[8]].numpy().data)
    parsed: ParsedBlob = found[1]
    return parsed


def _integers(blob: ParsedBlob, matrices: range | None = None) -> torch.Tensor:
    """Of some matrices, or of all; tiles side by side, unless torch is to take one thread."""
    is_alone = blob.header.num_tiles == 1 or torch.get_num_threads() == 1
    numbers = decode_integers(blob, executor=None if is_alone else _pool.executor, matrices=matrices)
    if numbers.dtype in (np.uint16, np.uint32):
        numbers = numbers.view(np.dtype(f"i{numbers.dtype.itemsize}"))
    return torch.from_numpy(numbers)


def _by_row(scales: torch.Tensor, count: int) -> torch.Tensor:
    return scales.expand(count) if len(scales) == 1 else scales


def _grouped_linear_cpu(
    x: torch.Tensor,
    ids: torch.Tensor,
    blob: torch.Tensor,
    groups: torch.Tensor,
    tables: torch.Tensor,
    scales: torch.Tensor,
    status: torch.Tensor,
    geometry: list[int],
    matrices: torch.Tensor,
    max_tables: int,
) -> torch.Tensor:
    _check_grouped(x, ids, scales, geometry)
    parsed = _blob(blob, status, geometry)
    experts, rows, cols = parsed.header.matrices, parsed.header.rows, parsed.header.cols
    kind, flat = ElementKind(geometry[0]), ids.flatten()
    wrong = torch.nonzero((flat < 0) | (flat >= experts))[:, 0]
    if len(wrong):
        raise InputError(
            f"id {int(wrong[0])} of {len(flat)} is {int(flat[wrong[0]])}: the blob holds {experts} matrices, 0 to "
            f"{experts - 1}"
        )
    by_row = _by_row(scales, experts * rows).reshape(experts, rows, 1) if len(scales) else None
    tokens = x.reshape(-1, cols).to(torch.float32)
    out = torch.empty((len(flat), rows), dtype=torch.float32, device="cpu")
    for expert in torch.unique(flat).tolist():
        pairs = torch.nonzero(flat == expert)[:, 0]
        numbers = _integers(parsed, range(expert, expert + 1))[0]
        weights = (numbers.view(LOSSLESS_TYPES[kind]) if kind in LOSSLESS_TYPES else numbers).to(torch.float32)
        if by_row is not None:
            weights *= by_row[expert]
        out[pairs] = tokens[pairs // (len(flat) // len(tokens))] @ weights.T
    return out.to(x.dtype).reshape(*ids.shape, rows)


def linear_cpu(
    x: torch.Tensor,
    blob: torch.Tensor,
    groups: torch.Tensor,
    tables: torch.Tensor,
    scales: torch.Tensor,
    status: torch.Tensor,
    geometry: list[int],
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """What ``torch.ops.kvpack.linear`` does on the CPU."""
    _check_product(x, scales, geometry)
    integers = _numbers_cpu(blob, groups, tables, scales, status, geometry)[0]
    rows, cols = integers.shape
    kind = ElementKind(geometry[0])
    tokens = x.reshape(-1, cols).to(torch.float32)
    out = torch.empty(len(tokens), rows, dtype=torch.float32, device="cpu")
    scales, row_offsets, column_scales = _vectors(scales, geometry)
    by_row = _by_row(scales, rows) if len(scales) else None
    for first in range(0, rows, TILE_ROWS):  # so that fp32 weights never exist all at once
        part = integers[first : first + TILE_ROWS]
        weights = part.view(LOSSLESS_TYPES[kind]) if kind in LOSSLESS_TYPES else part
        weights = weights.to(torch.float32)
        if by_row is not None:
            weights *= by_row[first : first + TILE_ROWS, None]
        if row_offsets is not None:
            weights += row_offsets[first : first + TILE_ROWS, None]
        if column_scales is not None:
            weights *= column_scales
        out[:, first : first + TILE_ROWS] = tokens @ weights.T
    own_bias = _bias(bias, x, rows)
    if own_bias is not None:
        out += own_bias.to(torch.float32)
    return _shaped(out.to(x.dtype), x)


def _dequantize_cuda(
    blob: torch.Tensor,
    groups: torch.Tensor,
    tables: torch.Tensor,
    scales: torch.Tensor,
    status: torch.Tensor,
    geometry: list[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    coded = _coded(blob, groups, tables, scales, status, geometry)
    header = coded.header
    out = torch.empty((header.matrices, header.rows, header.cols), dtype=dtype, device=blob.device)
    output = products.OUTPUTS[_float_type(dtype)]
    products.decode(coded, output, out, device_limits(blob.device))
    return out


def _float_type(dtype: torch.dtype) -> torch.dtype:
    if dtype not in FLOAT_TYPES:
        raise TypeError(f"no dequantization to {dtype}; {', '.join(map(str, FLOAT_TYPES))} are possible")
    return dtype


def _dequantize_cpu(
    blob: torch.Tensor,
    groups: torch.Tensor,
    tables: torch.Tensor,
    scales: torch.Tensor,
    status: torch.Tensor,
    geometry: list[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    integers = _numbers_cpu(blob, groups, tables, scales, status, geometry)
    matrices, rows, cols = integers.shape
    scales, row_offsets, column_scales = _vectors(scales, geometry)
    weights = integers.to(torch.float32) * _by_row(scales, matrices * rows).reshape(matrices, rows, 1)
    if row_offsets is not None:
        weights += row_offsets.reshape(matrices, rows, 1)
    if column_scales is not None:
        weights *= column_scales.reshape(matrices, 1, cols)
    return weights.to(_float_type(dtype))


def _check_rows(ids: torch.Tensor, scales: torch.Tensor, geometry: list[int], dtype: torch.dtype) -> None:
    _float_type(dtype)
    if ElementKind(geometry[0]) != ElementKind.SIGNED or not len(scales) or geometry[7] != 1:
        raise TypeError("rows are looked up in one quantized matrix")
    if ids.dtype not in (torch.int64, torch.int32):
        raise InputError(f"ids are {ids.dtype}; i64 or i32 are wanted")
    if ids.device != scales.device:
        raise InputError(f"ids are on {ids.device}, the weight on {scales.device}")


def _rows_cpu(
    ids: torch.Tensor,
    blob: torch.Tensor,
    groups: torch.Tensor,
    tables: torch.Tensor,
    scales: torch.Tensor,
    status: torch.Tensor,
    geometry: list[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    _check_rows(ids, scales, geometry, dtype)
    rows, cols = geometry[4], geometry[5]
    flat = ids.flatten().long()
    wrong = torch.nonzero((flat < 0) | (flat >= rows))[:, 0]
    if len(wrong):
        raise InputError(f"id {int(wrong[0])} of {len(flat)} is {int(flat[wrong[0]])}: there are rows 0 to {rows - 1}")
    asked, places = torch.unique(flat, return_inverse=True)
    parsed = _blob(blob, status, geometry)
    values = torch.from_numpy(decode_rows(parsed, asked.numpy(), executor=_pool.executor)).to(torch.float32)
    scales, row_offsets, column_scales = _vectors(scales, geometry)
    values *= _by_row(scales, rows)[asked, None]
    if row_offsets is not None:
        values += row_offsets[asked, None]
    if column_scales is not None:
        values *= column_scales
    return values.to(dtype)[places].reshape(*ids.shape, cols)


def _rows_cuda(
    ids: torch.Tensor,
    blob: torch.Tensor,
    groups: torch.Tensor,
    tables: torch.Tensor,
    scales: torch.Tensor,
    status: torch.Tensor,
    geometry: list[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    _check_rows(ids, scales, geometry, dtype)
    coded = _coded(blob, groups, tables, scales, status, geometry)
    out = torch.empty((*ids.shape, geometry[5]), dtype=dtype, device=blob.device)
    if ids.numel():
        products.decode_rows(coded, ids.flatten().long().contiguous(), out)
    return out


def _number_type(geometry: list[int]) -> torch.dtype:
    return NUMBER_TYPES[ElementKind(geometry[0])] if not geometry[11] else torch.int16


def _numbers_cuda(
    blob: torch.Tensor,
    groups: torch.Tensor,
    tables: torch.Tensor,
    scales: torch.Tensor,
    status: torch.Tensor,
    geometry: list[int],
) -> torch.Tensor:
    coded = _coded(blob, groups, tables, scales, status, geometry)
    header = coded.header
    dtype = _number_type(geometry)
    out = torch.empty((header.matrices, header.rows, header.cols), dtype=dtype, device=blob.device)
    output = products.number_output(coded)
    products.decode(coded, output, out, device_limits(blob.device))
    return out


def _numbers_cpu(
    blob: torch.Tensor,
    groups: torch.Tensor,
    tables: torch.Tensor,
    scales: torch.Tensor,
    status: torch.Tensor,
    geometry: list[int],
) -> torch.Tensor:
    return _integers(_blob(blob, status, geometry))


def _check_lanes_cuda(
    blob: torch.Tensor,
    groups: torch.Tensor,
    tables: torch.Tensor,
    scales: torch.Tensor,
    status: torch.Tensor,
    geometry: list[int],
) -> None:
    coded = _coded(blob, groups, tables, scales, status, geometry)
    products.decode(coded, products.OUTPUT_NOTHING, None, device_limits(blob.device))


def _check_lanes_cpu(
    blob: torch.Tensor,
    groups: torch.Tensor,
    tables: torch.Tensor,
    scales: torch.Tensor,
    status: torch.Tensor,
    geometry: list[int],
) -> None:
    _integers(_blob(blob, status, geometry))


_LIBRARY.impl("linear", linear_cuda, "CUDA")
_LIBRARY.impl("linear", linear_cpu, "CPU")
_LIBRARY.impl("grouped_linear", _grouped_linear_cuda, "CUDA")
_LIBRARY.impl("grouped_linear", _grouped_linear_cpu, "CPU")
_LIBRARY.impl("dequantize", _dequantize_cuda, "CUDA")
_LIBRARY.impl("dequantize", _dequantize_cpu, "CPU")
_LIBRARY.impl("numbers", _numbers_cuda, "CUDA")
_LIBRARY.impl("numbers", _numbers_cpu, "CPU")
_LIBRARY.impl("rows", _rows_cuda, "CUDA")
_LIBRARY.impl("rows", _rows_cpu, "CPU")
_LIBRARY.impl("check_lanes", _check_lanes_cuda, "CUDA")
_LIBRARY.impl("check_lanes", _check_lanes_cpu, "CPU")


@torch.library.register_fake("kvpack::linear", lib=_LIBRARY)
def _linear_shape(
    x: torch.Tensor,
    blob: torch.Tensor,
    groups: torch.Tensor,
    tables: torch.Tensor,
    scales: torch.Tensor,
    status: torch.Tensor,
    geometry: list[int],
    bias: torch.Tensor | None,
) -> torch.Tensor:
    _check_product(x, scales, geometry)
    return x.new_empty((*x.shape[:-1], geometry[4]))


@torch.library.register_fake("kvpack::grouped_linear", lib=_LIBRARY)
def _grouped_linear_shape(
    x: torch.Tensor,
    ids: torch.Tensor,
    blob: torch.Tensor,
    groups: torch.Tensor,
    tables: torch.Tensor,
    scales: torch.Tensor,
    status: torch.Tensor,
    geometry: list[int],
    matrices: torch.Tensor,
    max_tables: int,
) -> torch.Tensor:
    _check_grouped(x, ids, scales, geometry)
    return x.new_empty((*ids.shape, matrices.shape[1] * geometry[4]))


@torch.library.register_fake("kvpack::dequantize", lib=_LIBRARY)
def _dequantize_shape(
    blob: torch.Tensor,
    groups: torch.Tensor,
    tables: torch.Tensor,
    scales: torch.Tensor,
    status: torch.Tensor,
    geometry: list[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    return blob.new_empty((geometry[7], geometry[4], geometry[5]), dtype=dtype)


@torch.library.register_fake("kvpack::numbers", lib=_LIBRARY)
def _numbers_shape(
    blob: torch.Tensor,
    groups: torch.Tensor,
    tables: torch.Tensor,
    scales: torch.Tensor,
    status: torch.Tensor,
    geometry: list[int],
) -> torch.Tensor:
    return blob.new_empty((geometry[7], geometry[4], geometry[5]), dtype=_number_type(geometry))


@torch.library.register_fake("kvpack::rows", lib=_LIBRARY)
def _rows_shape(
    ids: torch.Tensor,
    blob: torch.Tensor,
    groups: torch.Tensor,
    tables: torch.Tensor,
    scales: torch.Tensor,
    status: torch.Tensor,
    geometry: list[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    _check_rows(ids, scales, geometry, dtype)
    return blob.new_empty((*ids.shape, geometry[5]), dtype=dtype)


@torch.library.register_fake("kvpack::check_lanes", lib=_LIBRARY)
def _check_lanes_shape(
    blob: torch.Tensor,
    groups: torch.Tensor,
    tables: torch.Tensor,
    scales: torch.Tensor,
    status: torch.Tensor,
    geometry: list[int],
) -> None:
    return None


def _keep_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, *coded, ctx.geometry, _ = inputs
    ctx.save_for_backward(*coded)


def _linear_backward(ctx, gradient):  # type: ignore[no-untyped-def]
    """The gradient of x (and of bias): coded weights are constants, as under a LoRA adapter."""
    coded = ctx.saved_tensors
    rows = ctx.geometry[4]
    if len(coded[3]):
        weights = torch.ops.kvpack.dequantize(*coded, ctx.geometry, gradient.dtype)[0]
    else:
        weights = torch.ops.kvpack.numbers(*coded, ctx.geometry)[0]
        weights = weights.view(LOSSLESS_TYPES[ElementKind(ctx.geometry[0])]).to(gradient.dtype)
    bias = gradient.reshape(-1, rows).sum(dim=0) if ctx.needs_input_grad[-1] else None
    return gradient @ weights, None, None, None, None, None, None, bias


torch.library.register_autograd("kvpack::linear", _linear_backward, setup_context=_keep_for_backward, lib=_LIBRARY)
