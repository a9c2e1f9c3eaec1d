"""A second decoder of the kvpack format, written from docs/FORMAT.md alone ("§" cites it).

It shares no code with the package: clear rather than fast, but the lanes of a tile go abreast.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
import zlib
from collections import namedtuple
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
L = 1 << 16  # §5.2: the lower bound of a state, and the state after a lane's last step
UNSIGNED, SIGNED = 0, 1  # the integer kinds (§4)
RANS, RAW, CONSTANT = 0, 1, 2  # modes (§6)
TRANSPOSED, FOLDED = 1, 4  # flags (§3)
TRELLIS = 1  # quantizer (§3)
KIND_BITS = {0: range(2, 9), 1: range(2, 9), 2: (16,), 3: (16,), 4: (32,), 5: (8,), 6: (8,)}  # §4
FLOAT_KIND = {"BF16": 2, "F16": 3, "F32": 4, "F8_E4M3": 5, "F8_E5M2": 6}  # §4, §9.3
NUMPY_DTYPE = {  # safetensors dtypes; those that NumPy lacks become bit patterns
    "BOOL": "?", "U8": "u1", "I8": "i1", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1",
    "U16": "<u2", "I16": "<i2", "F16": "<f2", "BF16": "<u2", "U32": "<u4", "I32": "<i4",
    "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8", "C64": "<c8",
}  # fmt: skip
Header = namedtuple(  # noqa: PYI024  (§3, in the order of the file; n, c, g, b as there)
    "Header",
    "magic version flags rows cols tile_rows tile_cols num_tiles_row num_tiles_col n c g b "
    "probability_bits kind quantizer table_encoding num_tables table_bytes payload_bytes matrices "
    "header_crc32",
)
Tile = namedtuple(  # noqa: PYI024  (§6, in the order of the file)
    "Tile",
    "data_offset data_size raw_offset mode predictor table_index outlier_count outlier_offset payload_crc32",
)
Table = namedtuple("Table", "freq start symbol")  # noqa: PYI024  (§5.1; `symbol` of each slot)


def _check(**legal: Any) -> None:
    for what, fine in legal.items():
        if not fine:
            raise ValueError(f"kvpack: illegal {what}")


def _align(x: int, m: int) -> int:
    return -(-x // m) * m


def _parse_header(data: bytes) -> tuple[Header, int, int]:
    """§3, §2: the header, checked; num_tiles; and P, the offset of the payload."""
    _check(length=len(data) >= 64)
    h = Header(*struct.unpack_from("<IHHQQHHII8BHHQII", data))
    _check(magic=h.magic == 0x52414E53, version=h.version == 1, flags=h.flags & ~(TRANSPOSED | FOLDED) == 0)
    _check(rows=h.rows >= 1, cols=h.cols >= 1, matrices=h.matrices >= 1)
    _check(tile_rows=h.tile_rows == 256, tile_cols=h.tile_cols in range(32, 2049, 32))
    _check(num_tiles_row=h.num_tiles_row == -(-h.rows // 256))
    _check(num_tiles_col=h.num_tiles_col == -(-h.cols // h.tile_cols))
    _check(element_kind=h.kind in KIND_BITS, element_bits=h.n in KIND_BITS.get(h.kind, ()))
    low, high = (1, h.n - 1) if h.flags & FOLDED else (2, min(8, h.n))
    _check(flags=h.kind == SIGNED or not h.flags & FOLDED)
    _check(code_bits=low <= h.c <= high, raw_bits=h.b == h.n - h.c and h.b <= 24)
    _check(codes_per_symbol=h.g in (1, 2, 4, 8) and h.g * h.c <= 8 and (h.g == 1 or h.n <= 8))
    _check(
        probability_bits=h.probability_bits == 12,
        quantizer=h.quantizer == 0 or (h.quantizer == TRELLIS and h.flags & FOLDED),
    )
    _check(element_bits=h.quantizer == 0 or h.n <= 6)
    _check(table_encoding=h.table_encoding in (0, 1), num_tables=h.num_tables <= 16)
    _check(table_bytes=h.table_bytes % 16 == 0 and (h.table_bytes > 0) == (h.num_tables > 0))
    num_tiles = h.matrices * h.num_tiles_row * h.num_tiles_col
    start = 64 + h.table_bytes + 32 * num_tiles
    _check(payload_bytes=h.payload_bytes % 16 == 0, length=len(data) == start + h.payload_bytes)
    _check(header_crc32=zlib.crc32(data[:60] + data[64:start]) == h.header_crc32)
    limit = max(1 << 28, 256 * len(data))  # §10: the project's own
    _check(number_of_elements=h.matrices * h.rows * h.cols <= limit)
    return h, num_tiles, start


def _exp_golomb(bits: Array, at: int) -> tuple[int, int]:
    """§5.1: the value of the Exp-Golomb code at bit `at`, and the position behind it."""
    k = 0
    while at < len(bits) and not bits[at]:
        k, at = k + 1, at + 1
    _check(exp_golomb_code=k <= 12 and at + 1 + k <= len(bits))
    low = sum(int(bits[at + 1 + i]) << i for i in range(k))  # least significant bit first
    return (1 << k) + low - 1, at + 1 + k


def _parse_tables(h: Header, section: bytes) -> list[Table]:
    """§5.1: both encodings, the sums, and the zero padding of the section."""
    bits = np.unpackbits(np.frombuffer(section, np.uint8), bitorder="little")
    tables, at, symbols = [], 0, 1 << (h.g * h.c)  # `at` counts bits
    for _ in range(h.num_tables):
        freq = np.zeros(256, np.int64)
        if h.table_encoding == 0:
            _check(table_bytes=at + 4096 <= len(bits))
            freq[:], at = np.frombuffer(section, "<u2", 256, at // 8), at + 4096
        else:
            for s in range(symbols):
                freq[s], at = _exp_golomb(bits, at)
            _check(table_padding=not bits[at : _align(at, 8)].any())
            at = _align(at, 8)
        _check(frequency=freq.max() <= 4095, frequency_sum=freq.sum() == 4096)
        _check(symbol_of_table=not freq[symbols:].any())
        tables.append(Table(freq, np.cumsum(freq) - freq, np.repeat(np.arange(256), freq)))
    _check(table_bytes=_align(at, 128) == len(bits), table_padding=not bits[at:].any())
    return tables


def _decode_lanes(table: Table, state: Array, length: Array, words: Array, steps: int) -> Array:
    """§5.2 for all lanes at once: the symbols [lanes, steps]; `words` lie lane after lane."""
    x, end = state.astype(np.int64), np.cumsum(length)
    position = end - length
    words = np.append(words, 0).astype(np.int64)  # lanes that run over their end may look here
    out = np.empty((len(x), steps), np.uint32)
    for i in range(steps):
        slot = x & 4095
        s = out[:, i] = table.symbol[slot]
        x = table.freq[s] * (x >> 12) + slot - table.start[s]
        refill = x < L
        x = np.where(refill, x << 16 | words[np.minimum(position, len(words) - 1)], x)
        position += refill
    _check(final_state=(x == L).all(), number_of_words_read=(position == end).all())
    return out


def _rans_symbols(h: Header, tile: Tile, table: Table, body: bytes, r: int, steps: int) -> Array:
    """§7.1 up to the raw planes: symbols [lanes, steps], zeros in the padding lanes."""
    lanes = _align(r, 32)
    size = 1 if h.tile_cols // h.g <= 340 else 2
    at_words = 32 + lanes * (4 + size)
    _check(data_size=at_words <= len(body))
    group_offset = np.frombuffer(body, "<u4", 8)
    state = np.frombuffer(body, "<u4", lanes, 32)
    length = np.frombuffer(body, f"<u{size}", lanes, 32 + 4 * lanes).astype(np.int64)
    _check(initial_state=(state >= L).all() and (state[r:] == L).all())
    _check(lane_length=(length <= steps).all() and not length[r:].any())
    before = np.concatenate([[0], np.cumsum(length)])  # words before each lane; last: all words
    expected = before[np.minimum(32 * np.arange(8), lanes)]
    end = at_words + 2 * int(before[-1])
    _check(group_offset=(group_offset == expected).all())
    _check(raw_offset=tile.raw_offset == _align(end, 16), data_size=tile.raw_offset <= len(body))
    _check(padding_after_words=not any(body[end : tile.raw_offset]))
    words = np.frombuffer(body, "<u2", int(before[-1]), at_words)
    symbols = np.zeros((lanes, steps), np.uint32)
    symbols[:r] = _decode_lanes(table, state[:r], length[:r], words, steps)
    return symbols


def _raw_planes(h: Header, planes: bytes, groups: int, chunks: int) -> Array:
    """§7.4: the raw bits [lanes, 32 * chunks]."""
    u32s = np.frombuffer(planes, "<u4").reshape(groups, chunks, 32 * h.b)
    column = np.arange(32)
    t = column // h.g % 4
    k = h.g * (column // (4 * h.g)) + column % h.g
    raw = np.zeros((groups, 32, chunks, 32), np.uint32)  # group, lane, chunk, column
    low, at = h.b, 0
    for p in [8] * (h.b // 8) + [p for p in (4, 2, 1) if h.b & p]:
        units = u32s[..., at : at + 32 * p].reshape(groups, chunks, -1, 32, min(p, 4))
        of_lane = units.transpose(0, 3, 1, 2, 4).reshape(groups, 32, chunks, p)
        shift = (8 * t + k * p % 8).astype(np.uint32)
        low, at = low - p, at + 32 * p
        raw |= (of_lane[..., k * p // 8] >> shift & np.uint32((1 << p) - 1)) << np.uint32(low)
    return raw.reshape(groups * 32, chunks * 32)


def _raw_mode(h: Header, body: bytes, r: int, k: int) -> tuple[Array, int]:
    """§7.2: the elements [r, k], and where they end."""
    end = -(-r * k * h.n // 8)
    _check(data_size=end <= len(body))
    bits = np.unpackbits(np.frombuffer(body, np.uint8, end), bitorder="little")
    _check(bits_after_elements=not bits[r * k * h.n :].any())
    weights = np.uint32(1) << np.arange(h.n, dtype=np.uint32)  # least significant bit first
    return bits[: r * k * h.n].reshape(r, k, h.n) @ weights, end


def _coded_mode(h: Header, tile: Tile, tables: list[Table], body: bytes, r: int, k: int) -> Any:
    """§7.1 and §7.3: the elements [r, k] of a tile in mode rans or constant, and their end."""
    lanes, chunks = _align(r, 32), -(-k // 32)
    steps = 32 * chunks // h.g
    if tile.mode == RANS:
        symbols = _rans_symbols(h, tile, tables[tile.table_index], body, r, steps)
    else:
        _check(raw_offset=tile.raw_offset == 16, data_size=len(body) >= 16)
        _check(symbol=body[0] < 1 << (h.g * h.c), padding_after_symbol=not any(body[1:16]))
        symbols = np.full((lanes, steps), body[0], np.uint32)
    end = tile.raw_offset + lanes * chunks * 4 * h.b
    _check(data_size=end <= len(body))
    raw = _raw_planes(h, body[tile.raw_offset : end], lanes // 32, chunks)
    _check(raw_planes_of_padding_lanes=not raw[r:].any())
    shift = np.arange(h.g, dtype=np.uint32) * np.uint32(h.c)  # §4: code j is in bits c*j ...
    code = (symbols[:, :, None] >> shift & np.uint32((1 << h.c) - 1)).reshape(lanes, -1)
    if h.flags & FOLDED:  # §4: bits of v are those of the code xor bit b - 1; the highest of u is that of v turned
        code ^= (raw >> np.uint32(h.b - 1)) * np.uint32((1 << h.c) - 1) ^ np.uint32(1 << (h.c - 1))
    u = (code << np.uint32(h.b) | raw)[:r, :k]
    if tile.predictor:  # §5.3, summed up: u_i = d_0 + ... + d_i - i * 2^(n-1) mod 2^n
        offset = np.arange(k, dtype=np.int64) << (h.n - 1)
        u = ((np.cumsum(u, axis=1, dtype=np.int64) - offset) % (1 << h.n)).astype(np.uint32)
    return u, end


def _on_grids(k: Array) -> Array:
    """§4.1: the integers of a tile [rows, columns] from its k, by the four states of each column and group."""
    q, state = np.empty_like(k), np.zeros(k.shape[1], np.int64)
    following = np.array([[0, 2], [2, 0], [1, 3], [3, 1]])  # of state and parity
    for row in range(len(k)):
        state = np.zeros_like(state) if row % 32 == 0 else state
        q[row] = 4 * k[row] + 2 * (state // 2) + 1
        state = following[state, k[row] % 2]
    return q


def _decode_tile(h: Header, tile: Tile, tables: list[Table], body: bytes, r: int, k: int) -> Array:
    """§7: the integers or bit patterns [r, k] of one tile."""
    integer, rans = h.kind in (UNSIGNED, SIGNED), tile.mode == RANS
    _check(payload_crc32=zlib.crc32(body) == tile.payload_crc32)
    _check(mode=tile.mode in (RANS, RAW, CONSTANT))
    _check(predictor=tile.predictor <= (integer and rans and h.quantizer == 0))
    _check(table_index=tile.table_index < (h.num_tables if rans else 1))
    _check(outlier_count=tile.outlier_count <= (r * k if h.kind == SIGNED else 0))
    if tile.mode == RAW:
        _check(raw_offset=tile.raw_offset == 0)
        u, end = _raw_mode(h, body, r, k)
    else:
        u, end = _coded_mode(h, tile, tables, body, r, k)
    _check(outlier_offset=tile.outlier_offset == _align(end, 4))
    _check(data_size=tile.data_size == tile.outlier_offset + 4 * tile.outlier_count)
    _check(padding_before_outliers=not any(body[end : tile.outlier_offset]))
    if not integer:  # §4: undo the rotation
        return u >> np.uint32(1) | (u & np.uint32(1)) << np.uint32(h.n - 1)
    q: Array = u.astype(np.int32) - (1 << (h.n - 1) if h.kind == SIGNED else 0)
    if h.quantizer == TRELLIS:
        q = _on_grids(q)
    v = np.frombuffer(body, "<u4", tile.outlier_count, tile.outlier_offset).astype(np.int64)
    bits = 15 if h.tile_cols <= 512 else 14 if h.tile_cols <= 1024 else 13  # §7.5, of δ
    row, col, delta = v >> 24, (v & 0xFFFFFF) >> bits, v & (1 << bits) - 1
    delta -= delta >> (bits - 1) << bits
    _check(outlier_position=(row < r).all() and (col < k).all(), outlier_delta=delta.all())
    _check(outlier_order=(np.diff(v >> bits) > 0).all())
    q[row, col] += delta.astype(np.int32)
    return q


def _decode(data: bytes) -> tuple[Header, Array]:
    """§2 and §6: the blob's header and values; every offset of a tile is prescribed."""
    h, num_tiles, start = _parse_header(data)
    tables = _parse_tables(h, data[64 : 64 + h.table_bytes])
    integer = h.kind in (UNSIGNED, SIGNED)
    out = np.empty((h.matrices, h.rows, h.cols), np.int32 if integer else f"u{h.n // 8}")
    payload, end = data[start:], 0
    for index in range(num_tiles):
        tile = Tile(*struct.unpack_from("<QIIBBHIII", data, 64 + h.table_bytes + 32 * index))
        _check(data_offset=tile.data_offset == _align(end, 16))
        _check(padding_between_tiles=not any(payload[end : tile.data_offset]))
        end = tile.data_offset + tile.data_size
        _check(data_size=end <= h.payload_bytes)
        matrix, rest = divmod(index, h.num_tiles_row * h.num_tiles_col)
        i, j = divmod(rest, h.num_tiles_col)
        place = out[matrix, 256 * i :, h.tile_cols * j :][:256, : h.tile_cols]
        r, k = place.shape
        place[:] = _decode_tile(h, tile, tables, payload[tile.data_offset : end], r, k)
    _check(payload_bytes=h.payload_bytes == _align(end, 16), padding=not any(payload[end:]))
    return h, out


def decode_blob(data: bytes) -> Array:
    """§2-§7: int32 integers with outliers, or uintN bit patterns, as [matrices, rows, cols]."""
    return _decode(bytes(data))[1]


def _restore(
    entry: dict[str, Any], blob: bytes, scale: Array | None, column_scale: Array | None, row_offset: Array | None
) -> Array:
    """§8 and §9.3: a coded tensor in its original shape."""
    h, value = _decode(blob)
    shape, dtype, transposed = entry["shape"], entry["dtype"], bool(h.flags & 1)
    _check(shape=isinstance(shape, list) and all(type(d) is int and d >= 1 for d in shape))
    _check(shape=len(shape) >= 2, dtype=dtype in [*FLOAT_KIND, "I8", "U8"])
    if scale is None or h.kind not in (UNSIGNED, SIGNED):
        _check(column_scale=column_scale is None, row_offset=row_offset is None)
    if transposed:
        value = value.transpose(0, 2, 1)
    as_one = (1, shape[0], math.prod(shape[1:]))
    as_matrices = (math.prod(shape[:-2]), *shape[-2:])
    _check(shape=value.shape == as_matrices or (value.shape == as_one and not transposed))
    if h.kind not in (UNSIGNED, SIGNED):
        _check(scale=scale is None, dtype=FLOAT_KIND.get(dtype) == h.kind)
    elif scale is None:
        low, high = {"U8": (0, 255), "I8": (-128, 127)}.get(dtype, (1, 0))
        _check(dtype=low <= high, value=low <= value.min() and value.max() <= high)
        value = value.astype(np.uint8)  # the bit pattern: int32 to uint8 wraps
    else:
        _check(scale_shape=scale.shape in ((1,), (h.matrices * h.rows,)))
        normal = (scale >= np.finfo(np.float32).tiny) & np.isfinite(scale)
        _check(method=entry.get("method") != "lossless", scale=(normal | (scale == 0)).all())
        per_row = scale.reshape(1, 1, 1) if scale.size == 1 else scale.reshape(h.matrices, -1, 1)
        with np.errstate(over="ignore", under="ignore"):  # a blob's rows are columns if transposed
            factor = per_row.transpose(0, 2, 1) if transposed else per_row
            value = factor.astype(np.float32) * value.astype(np.float32)
            if row_offset is not None:
                _check(row_offset_shape=row_offset.shape == (h.matrices * h.rows,))
                size = np.abs(row_offset)
                _check(row_offset=(((size >= np.finfo(np.float32).tiny) & np.isfinite(size)) | (size == 0)).all())
                offset = row_offset.reshape(h.matrices, -1, 1)
                value = value + (offset.transpose(0, 2, 1) if transposed else offset)
            if column_scale is not None:
                _check(column_scale_shape=column_scale.shape == (h.matrices * h.cols,))
                _check(column_scale=((column_scale >= 2.0**-14) & np.isfinite(column_scale)).all())
                per_column = column_scale.astype(np.float32).reshape(h.matrices, 1, -1)
                value = value * (per_column.transpose(0, 2, 1) if transposed else per_column)
    return np.ascontiguousarray(value).reshape(shape)


def _load_json(text: str | bytes) -> dict[str, Any]:
    """A JSON object without duplicate names (§9.1); errors of `json` are ValueErrors."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check(duplicate_name=len(dict(pairs)) == len(pairs))
        for text in (text for pair in pairs for text in pair if isinstance(text, str)):
            _check(lone_surrogate=not any(0xD800 <= ord(character) <= 0xDFFF for character in text))
        return dict(pairs)

    def number(text: str) -> float:
        _check(number=math.isfinite(float(text)))  # NaN, Infinity, 1e999
        return float(text)

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=number, parse_float=number)
    except RecursionError as error:
        raise ValueError("kvpack: illegal JSON: nested too deeply") from error
    _check(json=isinstance(value, dict))
    return dict(value)


def _read_safetensors(file: bytes | mmap.mmap) -> tuple[dict[str, Array], dict[str, str]]:
    """§9.1: the stored tensors and the metadata."""
    _check(file_length=len(file) >= 8)
    start = 8 + int.from_bytes(file[:8], "little")
    _check(header_length=start <= 8 + 100_000_000 and start <= len(file))
    header = _load_json(file[8:start].decode())
    metadata = header.pop("__metadata__", {})
    _check(metadata=isinstance(metadata, dict) and all(type(v) is str for v in metadata.values()))
    tensors, at = {}, start
    try:
        for name, info in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
            begin, end = (start + offset for offset in info["data_offsets"])
            dtype = np.dtype(NUMPY_DTYPE[info["dtype"]])
            _check(shape=len(info["shape"]) <= 64 and all(type(d) is int and 0 <= d < 1 << 63 for d in info["shape"]))
            _check(data_offsets=begin == at and end - begin == math.prod(info["shape"]) * dtype.itemsize)
            tensors[name] = np.frombuffer(file[begin:end], dtype).reshape(info["shape"])
            at = end
    except (TypeError, KeyError) as error:
        raise ValueError(f"kvpack: illegal safetensors header: {error!r}") from error
    _check(data_offsets=at == len(file))
    return tensors, metadata


def read_container(path: Any) -> dict[str, Array]:
    """§9: every tensor of a file. Quantized: float32; lossless: uintN; ordinary: as stored."""
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as file:
        tensors, metadata = _read_safetensors(file)
    if "kvpack_tensors" in metadata or "kvpack_version" in metadata:
        _check(kvpack_version=metadata.get("kvpack_version") == "1")
        _check(kvpack_tensors="kvpack_tensors" in metadata)
    entries = _load_json(metadata.get("kvpack_tensors", "{}"))
    for name, crc in _load_json(metadata.get("kvpack_crc32", "{}") if "kvpack_version" in metadata else "{}").items():
        _check(kvpack_crc32=name in tensors and name.removesuffix("_kvpack") not in entries)
        _check(kvpack_crc32=type(crc) is int and crc == zlib.crc32(tensors[name].tobytes()))
    out: dict[str, Array] = {}
    for name, entry in entries.items():
        _check(entry=isinstance(entry, dict) and entry.keys() >= {"shape", "dtype"})
        blob, scale = tensors.pop(f"{name}_kvpack", None), tensors.pop(f"{name}_kvpack_scale", None)
        columns, offset = (tensors.pop(f"{name}_kvpack_{what}", None) for what in ("column_scale", "row_offset"))
        _check(name=name not in tensors, scale=scale is None or scale.dtype == np.float32)
        _check(column_scale=columns is None or columns.dtype == np.float16)
        _check(row_offset=offset is None or offset.dtype == np.float32)
        if blob is None or blob.dtype != np.uint8 or blob.ndim != 1:
            raise ValueError(f"kvpack: entry {name} without its blob")
        out[name] = _restore(entry, blob.tobytes(), scale, columns, offset)
    for name in tensors:
        _check(entry=not name.endswith(("_kvpack", "_kvpack_scale", "_kvpack_column_scale", "_kvpack_row_offset")))
    return out | tensors


PAGE_FORMATS = {  # §9.6: number, name, bits of K wide, K thin and V, whether K and V have centers
    0: ("FP16", 16, 16, 16, ""), 1: ("BF16", 16, 16, 16, ""), 2: ("INT8", 8, 8, 8, "KV"),
    3: ("INT4", 5, 3, 4, "KV"), 4: ("INT3", 4, 2, 3, "KV"), 5: ("INT2", 3, 2, 2, "KV"),
    6: ("FP8_E4M3", 8, 8, 8, "K"), 7: ("FP8_E5M2", 8, 8, 8, "K"),
}  # fmt: skip
KIND_OF_FORMAT = {"FP16": 3, "BF16": 2, "FP8_E4M3": 5, "FP8_E5M2": 6}
SNAPSHOT_ARRAYS = {"page_formats", "tokens", "positions", "page_hashes", "importance", "errors", "shares"}
Page = namedtuple("Page", "codes scales centers numbers")  # noqa: PYI024  (codes, numbers [heads, 64, head_dim])


def _half(pattern: Array) -> Array:
    return pattern.astype(np.uint16).view(np.float16).astype(np.float32)


def _fp8(pattern: Array, exponent_bits: int) -> Array:
    """OCP FP8 as float32 (§4)."""
    mantissa_bits = 7 - exponent_bits
    exponent = (pattern >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = (pattern & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    bias = (1 << (exponent_bits - 1)) - 1
    size = np.where(
        exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent.astype(float) - bias)
    )
    if exponent_bits == 4:
        size[(pattern & 0x7F) == 0x7F] = np.nan
    else:
        size[exponent == 31] = np.where(mantissa[exponent == 31] == 0, np.inf, np.nan)
    return np.where(pattern & 0x80, -size, size).astype(np.float32)


def _group_order(header: dict[str, Any], side: str) -> list[int]:
    groups = header["head_dim"] // 16
    if side == "V":
        return list(range(groups))
    half = header["head_dim"] // 2
    slowness = [sum(d % half for d in range(16 * g, 16 * g + 16)) for g in range(groups)]
    return header["key_order"] or sorted(range(groups), key=lambda g: (-slowness[g], g))


def _part(tensors: dict[str, Array], name: str, kind: int, n: int, count: int) -> Array:
    """§9.6: the elements of a part, as integers (float kinds: bit patterns)."""
    _check(blob=tensors[name].dtype == np.uint8 and tensors[name].ndim == 1)
    h, value = _decode(tensors[name].tobytes())
    flat = value.reshape(-1).astype(np.int64)
    _check(kind=(h.kind, h.n) == (kind, n), transposed=not h.flags & TRANSPOSED)
    _check(elements=count <= flat.size < count + (1 << 16), surplus=(flat[count:] == flat[count - 1]).all())
    return flat[:count]


def _scale_numbers(elements: Array, differences: bool) -> Array:
    """§9.6: elements of `scales` or `centers`, which _part gives as if rotated by §4 → bit patterns of fp16."""
    a = ((elements << 1) | (elements >> 15)) & 0xFFFF  # undo what §4 does with the kind fp16
    if differences:
        a = np.cumsum(a - 0x8000) & 0xFFFF
    return np.where(a >= 0x8000, a - 0x8000, a ^ 0xFFFF)


def _run_pages(tensors: dict[str, Array], header: dict[str, Any], run: int, side: str, number: int) -> Any:
    """§9.6: ((layer, index), Page) of all pages of a run with that side and format; nothing if there are none."""
    name, wide_bits, thin_bits, v_bits, with_centers = PAGE_FORMATS[number]
    heads, dim = header["kv_heads"], header["head_dim"]
    first = run * header["run_pages"]
    found = tensors["page_formats"][:, "KV".index(side), first : first + header["run_pages"]] == number
    if not found.any():
        return
    prefix = f"run.{run:05}.{side}.{name}."
    order = _group_order(header, side)
    groups = len(order)
    w = -(-groups // 2)
    w += w % 2 if groups % 2 == 0 else 0
    quantized, total = number >= 2, int(found.sum())
    kind = KIND_OF_FORMAT.get(name, UNSIGNED)
    if side == "K" and wide_bits != thin_bits and w < groups:
        parts = [("wide", order[:w], wide_bits), ("thin", order[w:], thin_bits)]
    else:
        parts = [("codes", order, v_bits if side == "V" else wide_bits)]
    sequences = {
        part: _part(tensors, prefix + part, kind, bits, total * heads * 16 * len(places) * 64)
        for part, places, bits in parts
    }
    row = 64 if side == "V" else dim
    for part in ["scales"] * quantized + ["centers"] * (side in with_centers):
        sequences[part] = _scale_numbers(_part(tensors, prefix + part, 3, 16, total * heads * row), part == "scales")
    at = dict.fromkeys(sequences, 0)

    def take(part: str, *shape: int) -> Array:
        begin, at[part] = at[part], at[part] + math.prod(shape)
        return sequences[part][begin : at[part]].reshape(shape)

    dims = np.array([16 * g + i for g in order for i in range(16)])
    for layer in np.flatnonzero(found.any(axis=1)):
        indices = np.flatnonzero(found[layer])
        count = len(indices)
        codes = np.empty((heads, dim, count, 64), np.int64)
        bits_of = np.empty(dim)
        for part, places, bits in parts:
            of_part = np.array([16 * g + i for g in places for i in range(16)])
            codes[:, of_part] = take(part, heads, len(of_part), count, 64)
            bits_of[of_part] = bits
        numbers = {}
        for part in ("scales", "centers"):
            if part not in sequences:
                numbers[part] = None
            elif side == "K":
                numbers[part] = np.empty((heads, dim, count), np.int64)
                numbers[part][:, dims] = take(part, heads, dim, count)
            else:
                numbers[part] = take(part, heads, count, 64)
        for i, index in enumerate(indices):
            u = codes[:, :, i].transpose(0, 2, 1)
            s, c = (
                None if v is None else (v[:, None, :, i] if side == "K" else v[:, i, :, None]) for v in numbers.values()
            )
            yield (int(layer), first + int(index)), Page(u, s, c, _page_numbers(name, u, s, c, bits_of))


def _page_numbers(name: str, u: Array, s: Array | None, c: Array | None, bits_of: Array) -> Array:
    """§9.6: what codes, scales and centers stand for, float32."""
    if name == "FP16":
        return _half(u)
    if name == "BF16":
        return (u.astype(np.uint32) << 16).view(np.float32)
    x = _fp8(u, 4 if name == "FP8_E4M3" else 5) if name.startswith("FP8") else u - 2.0 ** (bits_of - 1)
    assert s is not None
    with np.errstate(invalid="ignore", over="ignore"):
        value = _half(s) * x.astype(np.float32)
        return value if c is None else _half(c) + value


def read_snapshot(path: Any) -> tuple[dict[str, Any], dict[str, Array], dict[tuple[str, int, int], Page]]:
    """§9.6: the header, the tensors that are not blobs, and each page by (side, layer, index)."""
    with open(path, "rb") as f:
        tensors, metadata = _read_safetensors(f.read())
    text = metadata["kvpack_snapshot"]
    _check(kvpack_version=metadata["kvpack_version"] == "1", kvpack_tensors=metadata["kvpack_tensors"] == "{}")
    _check(kvpack_snapshot_crc32=metadata["kvpack_snapshot_crc32"] == str(zlib.crc32(text.encode())))
    header, crc32 = _load_json(text), _load_json(metadata["kvpack_crc32"])
    _check(version=header["version"] == 1, coding=header["coding"] == "pages", page_tokens=header["page_tokens"] == 64)
    arrays = {name: tensors[name] for name in SNAPSHOT_ARRAYS & tensors.keys()}
    _check(kvpack_crc32=arrays.keys() <= crc32.keys())
    for name, crc in crc32.items():
        _check(kvpack_crc32=crc == zlib.crc32(tensors[name].tobytes()))
    pages = -(-header["tokens"] // 64)
    _check(
        page_formats=arrays["page_formats"].shape == (header["layers"], 2, pages),
        formats=(arrays["page_formats"] < 8).all(),
    )
    _check(tokens=arrays["tokens"].shape == (header["tokens"],) and arrays["tokens"].dtype == np.int32)
    found = {}
    for run in range(-(-pages // header["run_pages"])):
        for side in "KV":
            for number in PAGE_FORMATS:
                for place, page in _run_pages(tensors, header, run, side, number):
                    found[(side, *place)] = page
    _check(pages=len(found) == arrays["page_formats"].size)
    return header, arrays, found
