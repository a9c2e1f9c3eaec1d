"""Chunks of KV as bytes, in kvpack's pages: what stores of KV caches keep instead of tensors. docs/LMCACHE.md §Bytes.

A *chunk* is one tensor or several, each [2, layers, tokens, heads · head_dim]: keys and values of some tokens in a row.
Its size depends on shapes and formats alone, so that a store can be told before it is coded.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from kvpack.encode.page_coder import dequantize_blocks, quantize_blocks
from kvpack.errors import ChunkError, InputError
from kvpack.format.layout import ceil_div
from kvpack.format.pages import PAGE_TOKENS, PageFormat, PageLayout, Side

MAGIC = b"kvpackKV"
VERSION = 1
# Magic, version, head_dim, formats of K and V, type of the numbers, number of tensors, CRC-32 of what follows the
# header; for each tensor layers, tokens and hidden size; the CRC-32 of all that comes before it.
_HEAD = struct.Struct("<8sHHBBBBI")
_SHAPE = struct.Struct("<III")
_CRC = struct.Struct("<I")
# Pages begin where kernels that read them can.
_ALIGNMENT_BYTES = 16
_MAX_TENSORS = 255
_DTYPES = {torch.float16: PageFormat.FP16, torch.bfloat16: PageFormat.BF16}
_NUMPY_DTYPES = {torch.float16: np.dtype(np.float16), torch.bfloat16: np.dtype(ml_dtypes.bfloat16)}

Shapes = Sequence[Sequence[int]]


@dataclass(frozen=True)
class ChunkCoder:
    """How chunks become bytes, and back.

    Attributes:
        head_dim: of a head; a multiple of 16 up to 256.
        keys, values: formats of their pages. Those of 16 bits hold their own type, bit for bit.

    Raises:
        PageError: pages have no such head_dim.
    """

    head_dim: int
    keys: PageFormat
    values: PageFormat

    def __post_init__(self) -> None:
        assert self.layouts  # which checks head_dim

    @property
    def layouts(self) -> tuple[PageLayout, PageLayout]:
        """Of pages of keys and of values."""
        return PageLayout(Side.K, self.keys, self.head_dim), PageLayout(Side.V, self.values, self.head_dim)

    def size_bytes(self, shapes: Shapes) -> int:
        """What a chunk of tensors of these shapes takes, to the byte.

        Raises:
            InputError: a shape is not [2, layers, tokens, heads · head_dim], or there are none, or too many.
        """
        if not 0 < len(shapes) <= _MAX_TENSORS:
            raise InputError(f"a chunk of {len(shapes)} tensors: 1 to {_MAX_TENSORS} are possible")
        blocks = sum(math.prod(self._block_shape(shape)) for shape in shapes)
        return _header_bytes(len(shapes)) + blocks * sum(layout.block_bytes for layout in self.layouts)

    def encode(self, tensors: Sequence[torch.Tensor], out: torch.Tensor) -> int:
        """Write a chunk; tokens are taken up to a multiple of 64 by copies of the last one, which are dropped again.

        Args:
            tensors: fp16 or bf16 [2, layers, tokens, heads · head_dim] in host memory, of any strides.
            out: u8, contiguous, in host memory; at least as long as :meth:`size_bytes` says.

        Returns:
            That length.

        Raises:
            InputError: tensors are not so, of unlike types, or of another than 16-bit pages hold; ``out`` is too short.
        """
        shapes = [tuple(tensor.shape) for tensor in tensors]
        size, begin = self.size_bytes(shapes), _header_bytes(len(shapes))
        dtype = self._dtype_of(tensors)
        buffer = _bytes_of(out)
        if len(buffer) < size:
            raise InputError(f"a chunk of {_shown(shapes)} takes {size} bytes, the buffer has {len(buffer)}")
        at = begin
        for tensor in tensors:
            for side, layout in enumerate(self.layouts):
                for layer in _layers_of(tensor):
                    blocks = quantize_blocks(self._paged(tensor[side, layer]), layout)
                    buffer[at : at + blocks.size] = blocks.reshape(-1)
                    at += blocks.size
        crc32 = zlib.crc32(buffer[begin:size].data)
        buffer[:begin] = np.frombuffer(self._header(shapes, dtype, crc32), np.uint8)
        return size

    def decode(self, data: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
        """Read a chunk into tensors of the shapes and the type that it was made of; if it is damaged, they stay.

        Args:
            data: u8, contiguous, in host memory; what follows the chunk is not looked at.
            tensors: in host memory, of any strides.

        Raises:
            ChunkError: the bytes are damaged, or of another kind of chunk: other formats, shapes, head_dim or type.
            InputError: tensors are none that a chunk has.
        """
        shapes = [tuple(tensor.shape) for tensor in tensors]
        size, begin = self.size_bytes(shapes), _header_bytes(len(shapes))
        dtype = self._dtype_of(tensors)
        buffer = _bytes_of(data)
        self._check_header(buffer, shapes, dtype)
        if len(buffer) < size:
            raise ChunkError(f"a chunk of {_shown(shapes)} has {size} bytes, only {len(buffer)} are there")
        (crc32,) = _CRC.unpack_from(buffer.data, _HEAD.size - _CRC.size)
        if zlib.crc32(buffer[begin:size].data) != crc32:
            raise ChunkError("the pages of a chunk do not have the CRC-32 that its header gives: they are damaged")
        at = begin
        for tensor in tensors:
            _, pages, heads = self._block_shape(tensor.shape)
            for side, layout in enumerate(self.layouts):
                for layer in _layers_of(tensor):
                    end = at + pages * heads * layout.block_bytes
                    values = dequantize_blocks(buffer[at:end].reshape(pages, heads, layout.block_bytes), layout)
                    tokens = torch.from_numpy(values).transpose(1, 2).reshape(pages * PAGE_TOKENS, tensor.shape[3])
                    tensor[side, layer].copy_(tokens[: tensor.shape[2]])
                    at = end

    def _block_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Layers, pages and heads of a tensor. Raises InputError."""
        if len(shape) != 4 or shape[0] != 2:
            raise InputError(
                f"a tensor of KV is {list(shape)}; kvpack codes [2, layers, tokens, heads · head_dim], keys and values "
                "(models whose keys and values are one latent vector have no such)"
            )
        _, layers, tokens, hidden = shape
        if hidden % self.head_dim or not hidden:
            raise InputError(
                f"a token has {hidden} numbers a layer and side, which are no heads of {self.head_dim}: give the "
                "model's head_dim"
            )
        return layers, ceil_div(tokens, PAGE_TOKENS), hidden // self.head_dim

    def _dtype_of(self, tensors: Sequence[torch.Tensor]) -> torch.dtype:
        dtypes = list(dict.fromkeys(tensor.dtype for tensor in tensors))
        if len(dtypes) != 1 or dtypes[0] not in _DTYPES:
            raise InputError(f"tensors of KV are {', '.join(map(str, dtypes))}; a chunk is float16 or bfloat16")
        for page_format in (self.keys, self.values):
            if not page_format.is_quantized and page_format != _DTYPES[dtypes[0]]:
                raise InputError(f"tensors of KV are {dtypes[0]}; pages of {page_format.name} hold that type alone")
        return dtypes[0]

    def _paged(self, tokens: torch.Tensor) -> npt.NDArray[Any]:
        """[tokens, heads · head_dim] → [pages, heads, 64, head_dim]."""
        pages = ceil_div(len(tokens), PAGE_TOKENS)
        if missing := pages * PAGE_TOKENS - len(tokens):
            tokens = torch.cat([tokens, tokens[-1:].expand(missing, -1)])
        heads = tokens.shape[-1] // self.head_dim
        paged = tokens.reshape(pages, PAGE_TOKENS, heads, self.head_dim).transpose(1, 2)
        return paged.contiguous().view(torch.int16).numpy().view(_NUMPY_DTYPES[tokens.dtype])

    def _header(self, shapes: Shapes, dtype: torch.dtype, crc32: int) -> bytes:
        head = _HEAD.pack(
            MAGIC, VERSION, self.head_dim, self.keys, self.values, _DTYPES[dtype], len(shapes), crc32
        ) + b"".join(_SHAPE.pack(*shape[1:]) for shape in shapes)
        head = head.ljust(_header_bytes(len(shapes)) - _CRC.size, b"\0")
        return head + _CRC.pack(zlib.crc32(head))

    def _check_header(self, buffer: npt.NDArray[np.uint8], shapes: Shapes, dtype: torch.dtype) -> None:
        """Whether a chunk is of these options and tensors. Raises ChunkError."""
        beginning = buffer[: _HEAD.size].tobytes()
        if beginning[: len(MAGIC)] != MAGIC:
            raise ChunkError(f"bytes begin with {beginning[: len(MAGIC)]!r}, not {MAGIC!r}: no chunk of kvpack's")
        _, version, _, _, _, _, count, _ = _HEAD.unpack(beginning.ljust(_HEAD.size, b"\0"))
        if version != VERSION:
            raise ChunkError(f"a chunk of version {version}; this reader knows {VERSION}")
        header = buffer[: _header_bytes(count)].tobytes()
        if len(header) < _header_bytes(count) or _CRC.pack(zlib.crc32(header[: -_CRC.size])) != header[-_CRC.size :]:
            raise ChunkError("the header of a chunk does not have its CRC-32: it is damaged")
        found, wanted = _chunk_facts(header), _chunk_facts(self._header(shapes, dtype, 0))
        if found != wanted:
            differences = [
                f"{name} {found[name]}, not {wanted[name]}" for name in wanted if found[name] != wanted[name]
            ]
            raise ChunkError(f"a chunk that was coded otherwise: {'; '.join(differences)}")


def _header_bytes(tensors: int) -> int:
    """Of a chunk of so many tensors."""
    size = _HEAD.size + tensors * _SHAPE.size + _CRC.size
    return ceil_div(size, _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _chunk_facts(header: bytes) -> dict[str, object]:
    """What a whole header says of the chunk's kind, in words."""
    _, _, head_dim, keys, values, dtype, count, _ = _HEAD.unpack_from(header)
    formats = {"pages of K": keys, "pages of V": values, "numbers": dtype}
    return {
        "head_dim": head_dim,
        **{name: PageFormat(f).name if f in list(PageFormat) else f for name, f in formats.items()},
        "layers, tokens and hidden sizes": [
            list(_SHAPE.unpack_from(header, _HEAD.size + tensor * _SHAPE.size)) for tensor in range(count)
        ],
    }


def _layers_of(tensor: torch.Tensor) -> range:
    """Those that have pages: none without tokens."""
    return range(tensor.shape[1] if tensor.shape[2] else 0)


def _bytes_of(buffer: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The memory of a tensor of bytes. Raises InputError."""
    if buffer.dtype != torch.uint8 or buffer.device.type != "cpu" or not buffer.is_contiguous():
        raise InputError(f"a buffer is {buffer.dtype} on {buffer.device}; contiguous bytes in host memory are wanted")
    found: npt.NDArray[np.uint8] = buffer.view(-1).numpy()
    return found


def _shown(shapes: Shapes) -> str:
    return " and ".join(str(list(shape)) for shape in shapes)
