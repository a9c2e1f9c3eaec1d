"""Each rule of docs/FORMAT.md §§8–9 is broken alone, and the reader must name the rule that was broken.

Files are put together here byte by byte; neither kvpack's writer nor the safetensors package has a hand in them.
"""

from __future__ import annotations

import copy
import json
import math
import random
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import sample_blobs as samples
from safetensors import safe_open
from safetensors.numpy import load_file

import kvpack
from kvpack.encode.blob_encoder import encode_elements
from kvpack.encode.dtypes import NUMPY_DTYPES
from kvpack.errors import (
    ContainerMetadataError,
    DirectoryIndexError,
    FormatError,
    InputError,
    LayoutError,
    LimitError,
    MagicError,
    NotAContainerError,
    ScaleError,
    TensorCrcError,
    TensorTableError,
    TruncatedError,
)
from kvpack.format.container import Container
from kvpack.format.layout import ElementKind, float_layouts, integer_layout

SIGNED, UNSIGNED = ElementKind.SIGNED, ElementKind.UNSIGNED
SCALE = np.float32(0.037)


@dataclass
class File:
    """A container in pieces; ``build`` puts them together as they are, right or wrong."""

    tensors: dict[str, tuple[str, list[int], bytes]] = field(default_factory=dict)
    entries: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=lambda: {"format": "pt", "kvpack_version": "1"})
    entries_text: str | None = None

    def header(self) -> dict[str, Any]:
        text = json.dumps(self.entries) if self.entries_text is None else self.entries_text
        header: dict[str, Any] = {"__metadata__": self.metadata | {"kvpack_tensors": text}}
        at = 0
        for name, (dtype, shape, data) in self.tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
            at += len(data)
        return header

    @property
    def data(self) -> bytes:
        return b"".join(data for _, _, data in self.tensors.values())

    def build(self) -> bytes:
        return assemble(self.header(), self.data)

    def put(self, name: str, dtype: str, shape: list[int], data: bytes) -> None:
        self.tensors[name] = (dtype, shape, data)

    def put_scales(self, *values: float) -> None:
        self.put("w_kvpack_scale", "F32", [len(values)], struct.pack(f"<{len(values)}f", *values))

    def put_blob(self, name: str, blob: bytes) -> None:
        self.put(f"{name}_kvpack", "U8", [len(blob)], blob)


def assemble(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def integers(shape: tuple[int, ...], bits: int, sigma: float, seed: int) -> np.ndarray:
    return samples.gaussian_elements(shape, bits, sigma, seed)


@cache
def blob_of(name: str) -> bytes:
    if name == "w":  # F32 [40, 350], quantized to 5 bits, one scale
        return samples.rans_blob()
    if name == "codes":  # I8 [6, 70]
        return encode_elements(integers((6, 70), 8, 20.0, 51), integer_layout("balanced", SIGNED, 8))
    if name == "half":  # BF16 [3, 8, 64], three matrices
        elements = samples.float_elements(ElementKind.BF16, (3, 8, 64), 52)
        return encode_elements(elements, float_layouts(ElementKind.BF16)[0])
    raise AssertionError(name)


def base() -> File:
    """A legal file of three coded tensors and two ordinary ones."""
    file = File()
    for name, dtype, shape in (
        ("w", "F32", [40, 350]),
        ("codes", "I8", [6, 70]),
        ("half", "BF16", [3, 8, 64]),
    ):
        file.put_blob(name, blob_of(name))
        file.entries[name] = {"shape": shape, "dtype": dtype}
        if name == "w":
            file.put_scales(float(SCALE))
    file.put("bias", "F32", [5], np.arange(5, dtype="<f4").tobytes())
    file.put("empty", "I64", [0, 7], b"")
    return file


def read_all(path: Path) -> dict[str, np.ndarray]:
    """Everything a reader offers, for each tensor."""
    arrays = {}
    with kvpack.open(path, threads=1, max_elements=1 << 16) as reader:
        for name in reader.keys():  # noqa: SIM118
            reader.info(name)
            if name in reader.container(name).coded:
                arrays[name] = reader.decode(name)
                reader.dequantize(name)
                reader.dequantize(name, "original")
            elif reader.container(name).tensors[name].dtype in NUMPY_DTYPES:
                arrays[name] = reader.decode(name)
            else:  # legal, but NumPy has no such type
                with pytest.raises(TypeError, match="NumPy has no type"):
                    reader.decode(name)
    return arrays


def expect(path: Path, content: bytes, error: type[FormatError], match: str) -> None:
    """Reading must fail with exactly this class, and a message that names the file."""
    path.write_bytes(content)
    with pytest.raises(FormatError, match=match) as caught:
        read_all(path)
    assert caught.type is error, f"{caught.type.__name__}: {caught.value}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_the_base_is_legal(path: Path) -> None:
    path.write_bytes(base().build())
    arrays = read_all(path)
    q = integers((40, 350), 5, 1.5, 1).astype(np.int8) - np.int8(16)
    np.testing.assert_array_equal(arrays["w"], q)
    np.testing.assert_array_equal(arrays["codes"], integers((6, 70), 8, 20.0, 51).astype(np.int16) - 128)
    np.testing.assert_array_equal(arrays["half"], samples.float_patterns(ElementKind.BF16, (3, 8, 64), 52))
    np.testing.assert_array_equal(arrays["bias"], np.arange(5, dtype=np.float32))
    assert (arrays["empty"].shape, arrays["empty"].dtype) == ((0, 7), np.int64)
    with kvpack.open(path) as reader:
        np.testing.assert_array_equal(reader.dequantize("w"), q.astype(np.float32) * SCALE)
        half = samples.float_patterns(ElementKind.BF16, (3, 8, 64), 52).view(ml_dtypes.bfloat16)
        assert reader.dequantize("half", "original").tobytes() == half.tobytes()


# §9.1: the file


def test_a_file_of_a_few_bytes(path: Path) -> None:
    for size in range(8):
        expect(path, bytes(size), NotAContainerError, f"{size} bytes are too few")


def test_a_header_longer_than_the_file(path: Path) -> None:
    content = base().build()
    header_bytes = struct.unpack_from("<Q", content)[0]
    for length in (len(content) - 7, 2**63, 2**64 - 1):
        expect(path, struct.pack("<Q", length) + content[8:], NotAContainerError, "a header of")
    expect(path, content[: 8 + header_bytes - 1], NotAContainerError, "a header of")


def test_a_header_longer_than_allowed(path: Path) -> None:
    """A sparse file of 100 MB of legal JSON: an object, then spaces, one too many."""
    for length, legal in ((100_000_000, True), (100_000_001, False)):
        with path.open("wb") as file:
            file.write(struct.pack("<Q", length) + b"{}")
            blank = b" " * (1 << 20)
            left = length - 2
            while left > 0:
                left -= file.write(blank[:left])
        if legal:
            assert read_all(path) == {}
        else:
            with pytest.raises(NotAContainerError, match="a header of 100000001 bytes"):
                Container(path)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"{}}",
        b"[" * 200_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"\xff": 1}',
        '{"é": 1}'.encode("latin-1"),
        "{}".encode("utf-16"),
        "{}".encode("utf-32"),
        b"\xef\xbb\xbf{}",
        b'{"__metadata__": {"a": "\\ud800"}}',
        b'{"\\udfff": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}',
        b"1" * 5000,
        b"null",
        b"[]",
        b'"text"',
        b"7",
    ],
    ids=lambda text: repr(text[:16]),
)
def test_a_header_that_is_no_json_object(path: Path, text: bytes) -> None:
    expect(path, assemble(text, b""), NotAContainerError, "the header is not|not valid JSON")


def test_spaces_may_pad_the_header(path: Path) -> None:
    file = base()
    text = json.dumps(file.header()).encode() + b" " * 77
    path.write_bytes(assemble(text, file.data))
    assert set(read_all(path)) == {"w", "codes", "half", "bias", "empty"}


def change(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """A function that overwrites parts of the entry of ``bias`` in the header."""

    def apply(header: dict[str, Any]) -> None:
        header["bias"] |= changes

    return apply


def shift(name: str, begin: int, end: int) -> Callable[[dict[str, Any]], None]:
    def apply(header: dict[str, Any]) -> None:
        offsets = header[name]["data_offsets"]
        header[name]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]

    return apply


def without(key: str) -> Callable[[dict[str, Any]], None]:
    def apply(header: dict[str, Any]) -> None:
        del header["bias"][key]

    return apply


def replace(value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(header: dict[str, Any]) -> None:
        header["bias"] = value

    return apply


@pytest.mark.parametrize(
    ("breaking", "match"),
    [
        (change(dtype="F64"), "does not fill the bytes"),
        (change(dtype="BF16"), "does not fill"),
        (change(dtype="F6_E2M3"), "does not fill"),
        (change(shape=[4]), "does not fill"),
        (change(shape=[5, 2]), "does not fill"),
        (change(shape=[]), "does not fill"),
        (change(shape=[5, 1 << 62, 1 << 62]), "does not fill"),
        (change(shape=[(1 << 61) + 5]), "does not fill"),
        (change(dtype="F31"), "unknown dtype"),
        (change(dtype="f32"), "unknown dtype"),
        (change(dtype=32), "unknown dtype"),
        (change(dtype=None), "unknown dtype"),
        (change(dtype=["F32"]), "unknown dtype"),
        (change(shape=5), "shape"),
        (change(shape=[5.0]), "shape"),
        (change(shape=["5"]), "shape"),
        (change(shape=[-5, -1]), "shape"),
        (change(shape=[5, True]), "shape"),
        (change(shape=[5, None]), "shape"),
        (change(shape={"0": 5}), "shape"),
        (change(shape=[1 << 63]), "shape"),
        (change(data_offsets=[0]), "data_offsets"),
        (change(data_offsets=[0, 4, 8]), "data_offsets"),
        (change(data_offsets=20), "data_offsets"),
        (change(data_offsets=["0", "20"]), "data_offsets"),
        (change(data_offsets=[-20, 0]), "data_offsets"),
        (change(data_offsets=[20, 0]), "does not fill"),
        (change(data_offsets=[0.0, 20.0]), "data_offsets"),
        (without("dtype"), "needs dtype"),
        (without("shape"), "needs dtype"),
        (without("data_offsets"), "needs dtype"),
        (replace([]), "needs dtype"),
        (replace(None), "needs dtype"),
        (replace("F32"), "needs dtype"),
        (lambda h: h.update(__metadata__=[]), "__metadata__ is not"),
        (lambda h: h["__metadata__"].update(format=1), "__metadata__ is not"),
        (lambda h: h["__metadata__"].update(format={"a": "b"}), "__metadata__ is not"),
    ],
)
def test_a_tensor_of_the_header(path: Path, breaking: Callable[[dict[str, Any]], None], match: str) -> None:
    file = base()
    header = file.header()
    breaking(header)
    expect(path, assemble(header, file.data), TensorTableError, match)


def test_a_sub_byte_tensor_must_fill_whole_bytes(path: Path) -> None:
    header = {"f": {"dtype": "F4", "shape": [2, 3], "data_offsets": [0, 3]}}
    path.write_bytes(assemble(header, bytes(3)))
    assert read_all(path) == {}  # NumPy has no F4: read_all checks that it is refused as a type
    header["f"]["shape"] = [5]
    expect(path, assemble(header, bytes(3)), TensorTableError, "does not fill")


def test_gaps(path: Path) -> None:
    """At the start, and between two tensors."""
    file = base()
    header = file.header()
    for name in header:
        if name != "__metadata__":
            shift(name, 4, 4)(header)
    expect(path, assemble(header, bytes(4) + file.data), TensorTableError, "begins at 4, expected 0")

    header = file.header()
    at = header["bias"]["data_offsets"][0]
    for name in ("bias", "empty"):
        shift(name, 1, 1)(header)
    expect(path, assemble(header, file.data[:at] + b"\0" + file.data[at:]), TensorTableError, "'bias' begins at")


def test_overlaps(path: Path) -> None:
    file = base()
    header = file.header()
    header["again"] = copy.deepcopy(header["bias"])
    expect(path, assemble(header, file.data), TensorTableError, "begins at")

    header = file.header()
    header["tail"] = {"dtype": "U8", "shape": [4], "data_offsets": [len(file.data) - 1, len(file.data) + 3]}
    expect(path, assemble(header, file.data + bytes(3)), TensorTableError, "begins at")


def test_trailing_data(path: Path) -> None:
    content = base().build()
    expect(path, content + b"\0", TensorTableError, "the tensors end at")
    expect(path, content[:-1], TensorTableError, "the tensors end at")
    expect(path, assemble({}, b"\0"), TensorTableError, "the tensors end at 0, the data at 1")


def test_duplicate_names(path: Path) -> None:
    file = base()
    text = json.dumps(file.header())
    twice = text[:-1] + ',"bias":' + json.dumps(file.header()["bias"]) + "}"
    expect(path, assemble(twice.encode(), file.data), TensorTableError, "'bias' is there twice")
    escaped = text[:-1] + ',"b\\u0069as":' + json.dumps(file.header()["bias"]) + "}"
    expect(path, assemble(escaped.encode(), file.data), TensorTableError, "'bias' is there twice")
    metadata = text.replace('"format": "pt"', '"format": "pt", "format": "np"')
    expect(path, assemble(metadata.encode(), file.data), TensorTableError, "'format' is there twice")


def test_more_than_an_array_can_have(path: Path) -> None:
    """Legal in a safetensors file, but no array: the reader's own limit, before any product gets long."""
    header = {"a": {"dtype": "U8", "shape": [1] * 64, "data_offsets": [0, 1]}}
    path.write_bytes(assemble(header, b"\7"))
    assert read_all(path)["a"].reshape(-1).tolist() == [7]
    for shape, size in (([1] * 65, 1), ([(1 << 62) + 1] * 500_000, 1), ([0, 1 << 40, 1 << 40], 0)):
        header = {"a": {"dtype": "U8", "shape": shape, "data_offsets": [0, size]}}
        expect(path, assemble(header, b"\7" * size), LimitError, "array")


def test_an_ordinary_file_is_one_with_nothing_coded(path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}
    path.write_bytes(assemble(header, b"\1\2"))
    assert Container(path).coded == {}
    assert read_all(path)["a"].tolist() == [1, 2]


# §9.2 and §9.3: names and metadata


def test_a_coded_name_without_metadata(path: Path) -> None:
    for name in ("a_kvpack", "a_kvpack_scale"):
        header = {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
        expect(path, assemble(header, bytes(4)), ContainerMetadataError, f"'{name}' is a name of a coded tensor")


@pytest.mark.parametrize("version", ["0", "2", "1.0", "", " 1", "one"])
def test_an_unknown_version(path: Path, version: str) -> None:
    file = base()
    file.metadata["kvpack_version"] = version
    expect(path, file.build(), ContainerMetadataError, f"kvpack_version is '{version}'")


def test_one_key_without_the_other(path: Path) -> None:
    file = base()
    del file.metadata["kvpack_version"]
    expect(path, file.build(), ContainerMetadataError, "kvpack_version is None")
    file = base()
    header = file.header()
    del header["__metadata__"]["kvpack_tensors"]
    expect(path, assemble(header, file.data), ContainerMetadataError, "kvpack_tensors is not valid JSON")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("\ud800", "not valid JSON"),
        ('{"a": 1, "a": 1}', "'a' is there twice"),
        ("[]", "not a JSON object"),
        ("null", "not a JSON object"),
        ('"w"', "not a JSON object"),
    ],
)
def test_kvpack_tensors_that_is_no_json_object(path: Path, text: str, match: str) -> None:
    file = base()
    file.entries_text = text
    # A lone surrogate cannot even be in the header.
    error = NotAContainerError if text == "\ud800" else ContainerMetadataError
    expect(path, file.build(), error, match)


def entry(**changes: Any) -> Callable[[File], None]:
    """Overwrites parts of the entry of ``w``; None removes a key."""

    def apply(file: File) -> None:
        file.entries["w"] |= changes
        file.entries["w"] = {key: value for key, value in file.entries["w"].items() if value is not None}

    return apply


@pytest.mark.parametrize(
    "breaking",
    [
        entry(shape=None),
        entry(dtype=None),
        entry(shape="40x350"),
        entry(shape=[40, "350"]),
        entry(shape=[40, -350]),
        entry(shape=[40.0, 350.0]),
        entry(shape=[True, 14000]),
        entry(shape=[1 << 63, 1]),
        entry(shape=[40, 350] + [1] * 63),
        entry(dtype="F33"),
        entry(dtype=["F32"]),
        entry(dtype={"F32": 1}),
        entry(dtype=7),
        lambda file: file.entries.update(w=[]),
        lambda file: file.entries.update(w=7),
        lambda file: file.entries.update(w="F32"),
    ],
)
def test_a_malformed_entry(path: Path, breaking: Callable[[File], None]) -> None:
    file = base()
    breaking(file)
    expect(path, file.build(), ContainerMetadataError, "the entry of 'w' is malformed")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "kvpack_crc32 is not valid JSON"),
        ("[" * 100_000, "kvpack_crc32 is not valid JSON"),
        ('{"bias": 1, "bias": 1}', "'bias' is there twice"),
        ("[]", "kvpack_crc32 is not a JSON object"),
        ('{"nothing": 1}', "'nothing' is no stored tensor"),
        ('{"w": 1}', "'w' is no stored tensor"),
        ('{"w_kvpack": 1}', "'w_kvpack' is no stored tensor, or a blob"),
        ('{"bias": -1}', "the CRC of 'bias' is -1"),
        ('{"bias": 4294967296}', "the CRC of 'bias' is 4294967296"),
        ('{"bias": "1"}', "the CRC of 'bias' is '1'"),
        ('{"bias": 1.0}', "the CRC of 'bias' is 1.0"),
        ('{"bias": true}', "the CRC of 'bias' is True"),
    ],
)
def test_malformed_crcs(path: Path, text: str, match: str) -> None:
    file = base()
    file.metadata["kvpack_crc32"] = text
    expect(path, file.build(), ContainerMetadataError, match)


def test_crcs_of_what_is_not_coded(path: Path) -> None:
    """All, some or no tensors have one. `verify` looks at it, and readers do unless told not to."""
    file = base()
    crc32 = {name: zlib.crc32(file.tensors[name][2]) for name in ("bias", "empty", "w_kvpack_scale")}
    for given, unchecked in ((crc32, 0), ({"bias": crc32["bias"]}, 4), ({}, 24)):
        file.metadata["kvpack_crc32"] = json.dumps(given)
        path.write_bytes(file.build())
        assert kvpack.verify(path).bytes_without_checksum == unchecked
    for name in crc32:
        file.metadata["kvpack_crc32"] = json.dumps({name: crc32[name] ^ 1})
        path.write_bytes(file.build())
        with kvpack.open(path, verify=False) as reader:
            for original in reader:
                reader.dequantize(original)
        for read in (kvpack.verify, read_all):
            with pytest.raises(TensorCrcError, match=rf"{path}, tensor '{name}': kvpack_crc32 is 0x"):
                read(path)


def test_an_entry_without_its_blob(path: Path) -> None:
    file = base()
    del file.tensors["w_kvpack"]
    del file.tensors["w_kvpack_scale"]
    expect(path, file.build(), ContainerMetadataError, "'w' has an entry, but no blob")


def test_a_blob_without_an_entry(path: Path) -> None:
    file = base()
    file.put_blob("other", blob_of("codes"))
    expect(path, file.build(), ContainerMetadataError, "'other_kvpack' has no entry")


def test_scales_without_a_blob(path: Path) -> None:
    file = base()
    file.put("other_kvpack_scale", "F32", [1], struct.pack("<f", 1))
    expect(path, file.build(), ContainerMetadataError, "'other_kvpack_scale' has no entry")


def test_a_tensor_both_coded_and_as_it_is(path: Path) -> None:
    file = base()
    file.put("w", "F32", [2], bytes(8))
    expect(path, file.build(), ContainerMetadataError, "'w' is stored both coded and as it is")


@pytest.mark.parametrize(("dtype", "columns"), [("I8", None), ("U8", 2), ("F32", None), ("BOOL", None)])
def test_a_blob_must_be_one_row_of_bytes(path: Path, dtype: str, columns: int | None) -> None:
    file = base()
    blob = blob_of("w")
    shape = [len(blob) // 4] if dtype == "F32" else [len(blob)]
    file.put("w_kvpack", dtype, [columns, len(blob) // columns] if columns else shape, blob)
    expect(path, file.build(), ContainerMetadataError, "'w' has an entry, but no blob of type U8")


@pytest.mark.parametrize(
    ("dtype", "shape", "data"),
    [("F64", [1], bytes(8)), ("I32", [1], b"\0\0\0\1"), ("F32", [1, 1], bytes(4)), ("F32", [], bytes(4))],
)
def test_scales_must_be_one_row_of_f32(path: Path, dtype: str, shape: list[int], data: bytes) -> None:
    file = base()
    file.put("w_kvpack_scale", dtype, shape, data)
    expect(path, file.build(), ScaleError, "the scales of 'w' are")


# §8: scales


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize(
    "pattern",
    [0x80000001, 0xBF800000, 0x807FFFFF, 0x00000001, 0x007FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00001],
    ids="{:08X}".format,
)
def test_illegal_scales(path: Path, count: int, pattern: int) -> None:
    """Negative, denormal, infinite, NaN: alone, or last of a row's."""
    file = base()
    data = struct.pack("<f", 0.5) * (count - 1) + struct.pack("<I", pattern)
    file.put("w_kvpack_scale", "F32", [count], data)
    expect(path, file.build(), ScaleError, f"scale {count - 1} of 'w' is")


def test_legal_scales(path: Path) -> None:
    """The smallest normal number, the largest, and zero, row by row; exactly one fp32 multiplication."""
    file = base()
    scales = np.full(40, 0.1, "<f4")
    scales[:3] = np.finfo(np.float32).tiny, np.finfo(np.float32).max, 0
    file.put_scales(*scales.tolist())
    path.write_bytes(file.build())
    q = integers((40, 350), 5, 1.5, 1).astype(np.float32) - 16
    with np.errstate(over="ignore"):
        expected = q * scales[:, None]
    assert np.isinf(expected[1]).any()
    with kvpack.open(path) as reader:
        np.testing.assert_array_equal(reader.dequantize("w"), expected)
        np.testing.assert_array_equal(reader.dequantize("w", "bfloat16"), expected.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("count", [0, 2, 39, 41, 80, 14000])
def test_a_wrong_number_of_scales(path: Path, count: int) -> None:
    file = base()
    file.put_scales(*[0.5] * count)
    expect(path, file.build(), ScaleError, f"{count} scales for 1 × 40 rows")


def test_missing_scales(path: Path) -> None:
    file = base()
    del file.tensors["w_kvpack_scale"]
    expect(path, file.build(), ScaleError, "scales are missing")


@pytest.mark.parametrize("name", ["codes", "half"])
def test_unexpected_scales(path: Path, name: str) -> None:
    file = base()
    file.put(f"{name}_kvpack_scale", "F32", [1], struct.pack("<f", 1))
    expect(path, file.build(), ScaleError, "scales are not expected")


# §8: row offsets and column scales

VECTORS = {"column_scale": ("F16", "<f2", 350), "row_offset": ("F32", "<f4", 40)}


def put_vector(file: File, what: str, values: Any, tensor: str = "w") -> None:
    dtype, stored, _ = VECTORS[what]
    data = np.asarray(values, stored)
    file.put(f"{tensor}_kvpack_{what}", dtype, list(data.shape), data.tobytes())


@pytest.mark.parametrize("what", VECTORS)
def test_numbers_with_vectors(path: Path, what: str) -> None:
    """In fp32, an operation after the other, denormal results and all."""
    file = base()
    file.put_scales(2.0**-124)
    rng = np.random.default_rng(8)
    count = VECTORS[what][2]
    values = rng.lognormal(0, 2, count) if what == "column_scale" else rng.normal(0, 1, count) * 2.0**-120
    put_vector(file, what, values)
    path.write_bytes(file.build())
    q = integers((40, 350), 5, 1.5, 1).astype(np.float32) - 16
    w = np.float32(2.0**-124) * q
    if what == "column_scale":
        expected = w * values.astype("<f2").astype(np.float32)
    else:
        expected = w + values.astype(np.float32)[:, None]
    assert 0 < np.abs(expected[expected != 0]).min() < np.finfo(np.float32).tiny
    with kvpack.open(path) as reader:
        np.testing.assert_array_equal(reader.dequantize("w"), expected)
        info = reader.info("w")
        assert info is not None
        assert (info.has_column_scales, info.has_row_offsets) == (what == "column_scale", what == "row_offset")
        stored = len(blob_of("w")) + 4 + count * (2 if what == "column_scale" else 4)
        assert info.bits_per_weight == 8 * stored / expected.size


@pytest.mark.parametrize("what", VECTORS)
@pytest.mark.parametrize("bad", ["denormal", "-denormal", "inf", "-inf", "nan", "0", "-0", "-1"])
def test_illegal_vectors(path: Path, what: str, bad: str) -> None:
    file = base()
    _, stored, count = VECTORS[what]
    values = np.full(count, 0.5, stored)
    tiny = np.finfo(stored).smallest_subnormal
    values[7] = {"denormal": tiny, "-denormal": -tiny}.get(bad) or float(bad)
    put_vector(file, what, values)
    if what == "row_offset" and bad in ("0", "-0", "-1"):
        path.write_bytes(file.build())
        with kvpack.open(path) as reader:
            reader.dequantize("w")
        return
    expect(path, file.build(), ScaleError, f"{what.replace('_', ' ')} 7 of 'w' is")


@pytest.mark.parametrize("what", VECTORS)
@pytest.mark.parametrize("count", [0, 1, 39, 41, 349, 351])
def test_a_wrong_number_of_vectors(path: Path, what: str, count: int) -> None:
    file = base()
    put_vector(file, what, [0.5] * count)
    expected = f"{count} {what.replace('_', ' ')}s for 1 × {'350 columns' if what == 'column_scale' else '40 rows'}"
    expect(path, file.build(), ScaleError, expected)


@pytest.mark.parametrize("what", VECTORS)
def test_vectors_of_another_type_and_place(path: Path, what: str) -> None:
    shown = what.replace("_", " ")
    for dtype, size in (("BF16", 2), ("F64", 8), ("F32", 4) if what == "column_scale" else ("F16", 2)):
        file = base()
        count = VECTORS[what][2]
        file.put(f"w_kvpack_{what}", dtype, [count], bytes(size * count))
        expect(path, file.build(), ScaleError, f"the {shown}s of 'w' are {dtype}")
    file = base()
    put_vector(file, what, [[0.5] * VECTORS[what][2]])
    expect(path, file.build(), ScaleError, f"the {shown}s of 'w' are")
    file = base()
    put_vector(file, what, [0.5] * VECTORS[what][2], tensor="nothing")
    expect(path, file.build(), ContainerMetadataError, f"'nothing_kvpack_{what}' has no entry")
    for name in ("codes", "half"):
        file = base()
        put_vector(file, what, [0.5], tensor=name)
        expect(path, file.build(), ScaleError, f"{shown}s are not expected")


# §9.3: shapes and kinds


def encoded(shape: tuple[int, ...], *, transposed: bool = False) -> bytes:
    elements = integers(shape, 4, 1.0, 61)
    return encode_elements(elements, integer_layout("compact", SIGNED, 4), transposed=transposed)


@pytest.mark.parametrize(
    ("blob_shape", "transposed", "shape"),
    [
        ((6, 40), False, [6, 40]),
        ((6, 40), True, [40, 6]),
        ((3, 6, 40), False, [3, 6, 40]),
        ((3, 6, 40), True, [3, 40, 6]),
        ((6, 6, 40), False, [2, 3, 6, 40]),
        ((6, 40), False, [6, 5, 8]),
        ((6, 40), True, [40, 2, 3]),
        ((6, 40), False, [6, 2, 4, 5]),
        ((1, 6, 40), False, [1, 6, 40]),
        ((6, 40), False, [1, 1, 6, 40]),
        ((6, 40), False, [6, 40, 1]),
    ],
)
def test_shapes_that_agree(path: Path, blob_shape: tuple[int, ...], transposed: bool, shape: list[int]) -> None:
    file = File()
    file.put_blob("w", encoded(blob_shape, transposed=transposed))
    file.put_scales(0.5)
    file.entries["w"] = {"shape": shape, "dtype": "F16"}
    path.write_bytes(file.build())
    q = integers(blob_shape, 4, 1.0, 61).astype(np.int8) - np.int8(8)
    expected = (q.swapaxes(-1, -2) if transposed else q).reshape(shape)
    np.testing.assert_array_equal(read_all(path)["w"], expected)


@pytest.mark.parametrize(
    ("blob_shape", "transposed", "shape"),
    [
        ((6, 40), False, [40, 6]),
        ((6, 40), True, [6, 40]),
        ((6, 40), False, [6, 41]),
        ((6, 40), False, [240]),
        ((6, 40), False, []),
        ((6, 40), False, [12, 20]),
        ((6, 40), False, [6, 0]),
        ((6, 40), False, [2, 3, 40]),
        ((6, 40), True, [2, 20, 6]),
        ((6, 6, 40), False, [3, 2, 40, 6]),
        ((6, 6, 40), False, [36, 40]),
        ((6, 6, 40), False, [6, 240]),
        ((3, 6, 40), True, [3, 6, 40]),
        ((2, 6, 40), False, [3, 6, 40]),
    ],
)
def test_shapes_that_do_not_agree(path: Path, blob_shape: tuple[int, ...], transposed: bool, shape: list[int]) -> None:
    file = File()
    file.put_blob("w", encoded(blob_shape, transposed=transposed))
    file.put_scales(0.5)
    file.entries["w"] = {"shape": shape, "dtype": "F16"}
    expect(path, file.build(), ContainerMetadataError, r"tensor 'w': shape .* in the metadata, .* in the blob")


KIND_BLOBS: dict[str, Callable[[], bytes]] = {
    "signed 8": lambda: encode_elements(integers((6, 70), 8, 20.0, 62), integer_layout("compact", SIGNED, 8)),
    "signed 7": lambda: encode_elements(integers((6, 70), 7, 9.0, 62), integer_layout("compact", SIGNED, 7)),
    "unsigned 8": lambda: encode_elements(integers((6, 70), 8, 20.0, 62), integer_layout("compact", UNSIGNED, 8)),
    "unsigned 7": lambda: encode_elements(integers((6, 70), 7, 9.0, 62), integer_layout("compact", UNSIGNED, 7)),
} | {
    kind.name: lambda kind=kind: encode_elements(  # type: ignore[misc]
        samples.float_elements(kind, (6, 70), 63), float_layouts(kind)[0]
    )
    for kind in samples.FLOAT_KINDS
}
LEGAL_KINDS = {
    "F32": {"FP32", "signed 8", "signed 7"},
    "F16": {"FP16", "signed 8", "signed 7"},
    "BF16": {"BF16", "signed 8", "signed 7"},
    "F8_E4M3": {"FP8_E4M3"},
    "F8_E5M2": {"FP8_E5M2"},
    "I8": {"signed 8"},
    "U8": {"unsigned 8"},
    "F64": set(),
    "I16": set(),
    "BOOL": set(),
    "F8_E8M0": set(),
}


@pytest.mark.parametrize("dtype", LEGAL_KINDS)
@pytest.mark.parametrize("kind", KIND_BLOBS)
def test_kinds_of_a_dtype(path: Path, dtype: str, kind: str) -> None:
    file = File()
    file.put_blob("w", KIND_BLOBS[kind]())
    if kind.startswith("signed") and dtype != "I8":
        file.put_scales(0.5)
    file.entries["w"] = {"shape": [6, 70], "dtype": dtype}
    if kind in LEGAL_KINDS[dtype]:
        path.write_bytes(file.build())
        assert read_all(path)["w"].shape == (6, 70)
    else:
        expect(path, file.build(), ContainerMetadataError, f"dtype {dtype} with {kind.split()[0].upper()} elements")


def test_outliers_in_whole_numbers(path: Path) -> None:
    """I8 tensors have none: −128 … 127 are the numbers themselves."""
    blob = samples.encode_with_outliers(
        integers((1, 6, 70), 8, 20.0, 64), [(0, 2, 3, 500)], integer_layout("compact", SIGNED, 8), tile_cols=96
    )
    file = File()
    file.put_blob("w", blob)
    file.entries["w"] = {"shape": [6, 70], "dtype": "I8"}
    expect(path, file.build(), ContainerMetadataError, "outliers in a tensor that is not quantized")
    file.entries["w"]["dtype"] = "F32"
    file.put_scales(1.0)
    path.write_bytes(file.build())
    expected = integers((6, 70), 8, 20.0, 64).astype(np.int16) - 128
    expected[2, 3] += 500
    np.testing.assert_array_equal(read_all(path)["w"], expected)


def test_a_blob_at_fault_is_named(path: Path) -> None:
    for blob, error in (
        (blob_of("w")[:-16], TruncatedError),
        (blob_of("w") + bytes(16), TruncatedError),
        (b"", TruncatedError),
        (b"X" + blob_of("w")[1:], MagicError),
        (blob_of("w")[:37] + b"\1" + blob_of("w")[38:], LayoutError),
    ):
        file = base()
        file.put_blob("w", blob)
        expect(path, file.build(), error, "blob|magic|code_bits")
        with kvpack.open(path) as reader:  # the others are as good as before
            assert reader.decode("codes").shape == (6, 70)
            with pytest.raises(error, match=r"model\.safetensors, tensor 'w': "):
                reader.decode("w")


def with_informative_value(key: str, value: str) -> File:
    """A file whose entry of ``x`` says one thing more, in JSON or what looks like it."""
    file = base()
    file.entries_text = (
        json.dumps(file.entries)[:-1] + f', "x": {{"shape": [6, 70], "dtype": "I8", "{key}": {value}}}}}'
    )
    file.put_blob("x", blob_of("codes"))
    return file


@pytest.mark.parametrize("value", ["9" * 400, '"-20"', "[]", "true", "null"])
@pytest.mark.parametrize("key", ["noise_db", "entropy_bits", "outliers", "bits_per_weight"])
def test_informative_values_are_not_believed(path: Path, key: str, value: str) -> None:
    """They cannot make a reader fail, and a report of them is always JSON."""
    from kvpack.encode.report import describe

    file = with_informative_value(key, value)
    path.write_bytes(file.build())
    with kvpack.open(path) as reader:
        info = reader.info("x")
        assert info is not None
        assert (info.noise_db, info.entropy_bits, info.outliers) == (None, None, 0)
        assert info.bits_per_weight == 8 * len(blob_of("codes")) / 420
    tensors = json.loads(json.dumps(describe(path), allow_nan=False))["tensors"]
    assert next(t for t in tensors if t["name"] == "x")["noise_db"] is None


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400"])
@pytest.mark.parametrize("key", ["noise_db", "entropy_bits", "outliers", "bits_per_weight"])
def test_informative_values_are_json(path: Path, key: str, value: str) -> None:
    """What is no number of JSON is refused wherever it stands (§9.1)."""
    file = with_informative_value(key, value)
    expect(
        path, file.build(), ContainerMetadataError, f"kvpack_tensors is not valid JSON: {value} is no number of JSON"
    )


# §9.4: directories


def directory(tmp_path: Path) -> Path:
    """Two shards with an index."""
    folder = tmp_path / "model"
    folder.mkdir()
    whole = base()
    weight_map = {}
    for shard, names in (("1.safetensors", ["w"]), ("2.safetensors", ["codes", "half", "bias", "empty"])):
        file = File(
            {k: v for k, v in whole.tensors.items() if k.partition("_kvpack")[0] in names},
            {k: v for k, v in whole.entries.items() if k in names},
        )
        (folder / shard).write_bytes(file.build())
        weight_map |= dict.fromkeys(file.tensors, shard)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_index(folder: Path) -> dict[str, str]:
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return {str(name): str(shard) for name, shard in weight_map.items()}


def refuse_directory(folder: Path, match: str) -> None:
    with pytest.raises(FormatError, match=match) as caught:
        kvpack.open(folder)
    assert caught.type is DirectoryIndexError, caught.value


def test_a_directory(tmp_path: Path) -> None:
    folder = directory(tmp_path)
    one = tmp_path / "one.safetensors"
    one.write_bytes(base().build())
    expected, found = read_all(one), read_all(folder)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    (folder / "model.safetensors.index.json").unlink()
    assert read_all(folder).keys() == expected.keys()


def test_a_directory_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds no \.safetensors file"):
        kvpack.open(tmp_path)


def test_an_index_that_names_missing_files(tmp_path: Path) -> None:
    folder = directory(tmp_path)
    weight_map = read_index(folder)
    for name in ("3.safetensors", "x" * 5000, "a\0b"):
        write_index(folder, weight_map | {"more": name})
        refuse_directory(folder, "which does not exist")
    write_index(folder, weight_map)
    (folder / "1.safetensors").unlink()
    refuse_directory(folder, "'1.safetensors', which does not exist")
    (folder / "1.safetensors").mkdir()
    refuse_directory(folder, "'1.safetensors', which does not exist")


def test_an_index_that_lies(tmp_path: Path) -> None:
    folder = directory(tmp_path)
    right = read_index(folder)
    for name, weight_map in {
        "bias": right | {"bias": "1.safetensors"},
        "more": right | {"more": "1.safetensors"},
        "w_kvpack_scale": {k: v for k, v in right.items() if k != "w_kvpack_scale"},
        "w": right | {"w": "1.safetensors"},  # the index names stored tensors
    }.items():
        write_index(folder, weight_map)
        refuse_directory(folder, f"'{name}' is not where the index says")
    write_index(folder, right)
    assert set(read_all(folder)) == {"w", "codes", "half", "bias", "empty"}


@pytest.mark.parametrize("target", ["../secret.safetensors", "sub/../../secret.safetensors", "ABSOLUTE", "..", ".", ""])
def test_an_index_cannot_leave_its_directory(tmp_path: Path, target: str) -> None:
    folder = directory(tmp_path)
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(assemble({"s": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"\1"))
    assert read_all(secret)["s"].tolist() == [1]
    (folder / "sub").mkdir()
    write_index(folder, read_index(folder) | {"s": str(secret) if target == "ABSOLUTE" else target})
    refuse_directory(folder, "weight_map does not map names to files of the directory")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        "null",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": null}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": ["1.safetensors"]}}',
        "[" * 100_000,
        "\ufeff{}",
    ],
    ids=lambda text: repr(text[:30]),
)
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    folder = directory(tmp_path)
    (folder / "model.safetensors.index.json").write_bytes(text.encode())
    refuse_directory(folder, "not a valid index|does not map")
    (folder / "model.safetensors.index.json").write_bytes(b"\xff\xfe\x00")
    refuse_directory(folder, "not a valid index")


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    """As it is in both, or coded in one and as it is in the other."""
    folder = directory(tmp_path)
    (folder / "model.safetensors.index.json").unlink()
    for name in ("bias", "w"):
        header = {name: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
        (folder / "3.safetensors").write_bytes(assemble(header, b"\1"))
        refuse_directory(folder, f"'{name}' is in both")


# What others make of our files


def test_outputs_open_with_safetensors(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    rng = np.random.default_rng(71)
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    tensors = {
        "a.weight": rng.normal(size=(96, 200)).astype(np.float32),
        "a.bias": rng.normal(size=96).astype(np.float32),
        "naïve.weight": rng.normal(size=(100, 101)).astype(np.float16),
        "ids": np.arange(7, dtype=np.int64),
        "flags": np.array([True, False, True]),
        "none": np.zeros((0, 4), np.float32),
    }
    save_file(tensors, source, metadata={"format": "pt", "author": "Ünï"})
    kvpack.compress(source, output, kvpack.QuantConfig(preset="int8-row"))
    loaded = load_file(output)
    assert set(loaded) == {
        "a.weight_kvpack", "a.weight_kvpack_scale", "naïve.weight_kvpack", "naïve.weight_kvpack_scale",
        "a.bias", "ids", "flags", "none",
    }  # fmt: skip
    for name in ("a.bias", "ids", "flags", "none"):
        np.testing.assert_array_equal(loaded[name], tensors[name])
        assert loaded[name].dtype == tensors[name].dtype
    absmax = np.abs(tensors["a.weight"]).max(axis=1)
    np.testing.assert_array_equal(loaded["a.weight_kvpack_scale"], absmax / np.float32(127))
    with safe_open(output, "numpy") as file:
        metadata = file.metadata()
        blob = file.get_tensor("a.weight_kvpack")
    assert (metadata["format"], metadata["author"], metadata["kvpack_version"]) == ("pt", "Ünï", "1")
    entries = json.loads(metadata["kvpack_tensors"])
    assert entries["a.weight"]["shape"] == [96, 200]
    assert entries["naïve.weight"]["dtype"] == "F16"
    assert blob.tobytes()[:4] == b"SNAR"


def test_stored_tensors_are_aligned(tmp_path: Path) -> None:
    """Blobs to 16 bytes, every other tensor to its own size, whatever the number of scales."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(72)
    tensors: dict[str, np.ndarray] = {
        f"w{i}.weight": rng.normal(size=(65 + i, 80)).astype(np.float32) for i in range(5)
    }
    tensors |= {"flag": np.ones(3, bool), "f16": np.ones(3, np.float16), "i64": np.arange(3), "f32": np.ones(1, "<f4")}
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, source)
    for preset in (None, "near-lossless", "lossless"):
        kvpack.compress(source, output, kvpack.QuantConfig(preset=preset), force=True)
        content = output.read_bytes()
        start = 8 + struct.unpack_from("<Q", content)[0]
        header = json.loads(content[8:start])
        for name, tensor in header.items():
            if name != "__metadata__":
                unit = 16 if name.endswith("_kvpack") else NUMPY_DTYPES[tensor["dtype"]].itemsize
                assert (start + tensor["data_offsets"][0]) % unit == 0, name


# Mutation fuzzing of whole files

MUTANTS = 4400
INTERESTING = (0, 1, 2, 3, 7, 8, 31, 32, 63, 64, 65, 255, 256, 350, 4096, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64, -1)
WORDS = (
    "w", "codes", "half", "bias", "empty", "_kvpack", "_kvpack_scale", "F32", "BF16", "F16", "I8", "U8", "F64", "I64",
    "F4", "F8_E5M2", "BOOL", "C64", "shape", "dtype", "data_offsets", "__metadata__", "kvpack_version", "1", "2", "",
    "kvpack_crc32",
    "\ud800", "\0", "é",
)  # fmt: skip


def mutate_json(rng: random.Random, value: Any, depth: int = 0) -> Any:
    """One random change somewhere in a JSON value."""
    choice = rng.random()
    if isinstance(value, dict) and value and choice < 0.9:
        copied = dict(value)
        key = rng.choice(list(copied))
        action = rng.random()
        if action < 0.08:
            del copied[key]
        elif action < 0.16:
            copied[rng.choice(WORDS)] = copied.pop(key)
        elif action < 0.22:
            copied[key + rng.choice(WORDS)] = copied[key]
        elif action < 0.28:
            copied[key] = copied[rng.choice(list(copied))]
        else:
            copied[key] = mutate_json(rng, copied[key], depth + 1)
        return copied
    if isinstance(value, list) and value and choice < 0.9:
        items = list(value)
        place = rng.randrange(len(items))
        action = rng.random()
        if action < 0.15:
            del items[place]
        elif action < 0.3:
            items.insert(place, rng.choice(INTERESTING))
        elif action < 0.4:
            rng.shuffle(items)
        else:
            items[place] = mutate_json(rng, items[place], depth + 1)
        return items
    if isinstance(value, int) and not isinstance(value, bool) and choice < 0.8:
        return rng.choice((value + rng.choice((-16, -4, -1, 1, 4, 16)), rng.choice(INTERESTING), 2 * value))
    if isinstance(value, str) and value.startswith("{") and choice < 0.9:
        return json.dumps(mutate_json(rng, json.loads(value), depth + 1))
    if isinstance(value, str) and choice < 0.8:
        return rng.choice(WORDS)
    return rng.choice((None, True, 1.5, -1, [], {}, "", [[]], float("inf"), "w", 7, {"shape": [6, 70], "dtype": "I8"}))


def mutate_bytes(rng: random.Random, content: bytes, first: int, end: int) -> bytes:
    """Some bytes of a region flipped, deleted, inserted, or copied from elsewhere."""
    copied = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at = rng.randrange(first, min(end, len(copied)))
        action = rng.random()
        if action < 0.5:
            copied[at] ^= 1 << rng.randrange(8)
        elif action < 0.7:
            copied[at] = rng.choice((0, 255, 0x22, 0x5C, 0x7B, 0x7D, rng.randrange(256)))
        elif action < 0.8:
            del copied[at : at + rng.randrange(1, 9)]
        elif action < 0.9:
            copied[at:at] = rng.randbytes(rng.randrange(1, 9))
        else:
            source = rng.randrange(len(copied) - 8)
            copied[at : at + 8] = copied[source : source + 8]
    return bytes(copied)


def test_mutants_of_whole_files(path: Path) -> None:
    """Only a FormatError may come out of a damaged file, whatever was damaged; sound tensors stay readable."""
    rng = random.Random(20261120)
    file = base()
    # A smaller one, so that mutants are quick to read.
    file.put_blob("w", encoded((6, 40)))
    file.entries["w"]["shape"] = [6, 40]
    file.metadata["kvpack_crc32"] = json.dumps({"bias": zlib.crc32(file.tensors["bias"][2]), "empty": 0})
    header, data, content = file.header(), file.data, file.build()
    data_start = len(content) - len(data)
    path.write_bytes(content)
    original = read_all(path)
    outcomes: Counter[str] = Counter()
    unnamed: list[str] = []
    for number in range(MUTANTS):
        match number % 4:
            case 0 | 1:
                mutated: Any = header
                for _ in range(rng.choice((1, 1, 2, 4))):
                    mutated = mutate_json(rng, mutated)
                mutant = assemble(mutated, data)
            case 2:
                mutant = mutate_bytes(rng, content, 0, data_start)
                if rng.random() < 0.7:  # the length is right again, so that the JSON is reached
                    mutant = struct.pack("<Q", max(0, len(mutant) - 8 - len(data))) + mutant[8:]
            case _:
                mutant = mutate_bytes(rng, content, data_start, len(content))
        path.write_bytes(mutant)
        try:
            found = read_all(path)
        except FormatError as error:
            if str(path) not in str(error):
                unnamed.append(str(error))
            outcomes[type(error).__name__] += 1
        else:
            outcomes["read"] += 1
            for name in found.keys() & original.keys() & {"codes", "half"}:
                # What a blob holds has CRCs: it comes back right, in whatever shape the header gives it.
                if math.prod(found[name].shape) == original[name].size and found[name].dtype == original[name].dtype:
                    assert sorted(found[name].ravel()) == sorted(original[name].ravel()), name
    assert sum(outcomes.values()) == MUTANTS
    assert unnamed == []
    expected = ("NotAContainerError", "TensorTableError", "ContainerMetadataError", "ScaleError", "HeaderCrcError")
    for name in (*expected, "PayloadCrcError", "read"):
        assert outcomes[name] >= 15, outcomes
