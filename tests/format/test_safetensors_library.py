"""What the safetensors library opens, kvpack opens, and the other way round; differences are listed and tested.

Headers are put together here as text, so that they can have what no JSON writer would write.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

import kvpack
from kvpack.errors import FormatError, LimitError, NotAContainerError, TensorTableError
from kvpack.format.container import DTYPE_BITS, Container


def assemble(header: str, size_bytes: int = 4) -> bytes:
    text = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + bytes(range(size_bytes))


def library(path: Path) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes, or None if it refuses the file."""
    try:
        with safe_open(path, "np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None


def ours(path: Path) -> dict[str, tuple[int, ...]] | None:
    try:
        with Container(path) as container:
            return {name: tensor.shape for name, tensor in container.tensors.items()}
    except FormatError:
        return None


# As JSON text, each with what both readers must say to it; numbers stand for the kinds of number that JSON has.
NUMBERS = ["1", "-1", "0", "2.5", "1e3", "NaN", "Infinity", "-Infinity", "1e999", "01", "+1", ".5", "-", "9" * 30]
STRINGS = ['""', '"a"', r'"\u00e9"', r'"\ud83d\ude00"', r'"\ud800"', r'"\t"', '"\t"', "'a'"]
OTHERS = ["null", "true", "false", "[]", "[[], {}]", "{}", '{"a": [1, null]}', "[1,]", "{,}", "nul", ""]
VALUES = st.sampled_from([*NUMBERS, *STRINGS, *OTHERS])
DTYPES = st.one_of(
    st.sampled_from([f'"{name}"' for name in DTYPE_BITS]), st.sampled_from(['"F31"', '"f32"', "32", "null", '["F32"]'])
)
SIZES = st.sampled_from(
    ["0", "1", "2", "3", "4", "8", "1", "4.0", "true", "null", '"4"', "-4", "9223372036854775808", "04"]
)
SHAPES = st.one_of(
    st.lists(SIZES, max_size=3).map(lambda sizes: f"[{', '.join(sizes)}]"), st.sampled_from(["4", "null", "{}"])
)
OFFSETS = st.one_of(
    st.tuples(st.integers(0, 5), st.integers(0, 8)).map(lambda pair: f"[{pair[0]}, {pair[1]}]"),
    st.sampled_from(["[0]", "[0, 4, 8]", "4", '["0", "4"]', "[0.0, 4.0]", "[-4, 0]", "null"]),
)
METADATA = st.one_of(
    st.sampled_from(["null", "{}", '{"format": "pt"}', '{"a": null}', '{"a": 1}', "[]", '"a"', "1", '{"": ""}']), VALUES
)


# Parts of a header that both open, and what a part may be instead.
PARTS = {
    "before": ("", st.sampled_from([" ", "\n", "\ufeff", "\0"])),
    "metadata": ("", METADATA.map(lambda text: f'"__metadata__": {text}, ')),
    "dtype": ('"dtype": "U8", ', st.one_of(DTYPES.map(lambda text: f'"dtype": {text}, '), st.just(""))),
    "shape": ('"shape": [4], ', st.one_of(SHAPES.map(lambda text: f'"shape": {text}, '), st.just(""))),
    "unknown": ("", VALUES.map(lambda text: f'"requires_grad": {text}, ')),
    "offsets": ('"data_offsets": [0, 4]', OFFSETS.map(lambda text: f'"data_offsets": {text}')),
    "second": (
        ', "e": {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}',
        st.one_of(
            VALUES.map(lambda text: f', "e": {text}'),
            OFFSETS.map(lambda text: f', "e": {{"data_offsets": {text}, "dtype": "F32", "shape": [0, 7]}}'),
        ),
    ),
    "after": ("", st.sampled_from([" ", "\n\t\r ", "\0", "\u00a0", "}", "{}"])),
}


@st.composite
def headers(draw: st.DrawFn) -> str:
    """One or two parts are other than in a header that both open."""
    changed = draw(st.sets(st.sampled_from(sorted(PARTS)), min_size=1, max_size=2))
    part = {name: draw(others) if name in changed else right for name, (right, others) in PARTS.items()}
    entry = "{" + part["dtype"] + part["shape"] + part["unknown"] + part["offsets"] + "}"
    return f'{part["before"]}{{{part["metadata"]}"w": {entry}{part["second"]}}}{part["after"]}'


def test_both_open_the_same_files(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    opened = [0, 0]

    @settings(max_examples=1000, deadline=None, derandomize=True)
    @given(headers(), st.sampled_from([4] * 9 + [0, 5, 8]))
    def compare(header: str, size_bytes: int) -> None:
        path.write_bytes(assemble(header, size_bytes))
        expected = library(path)
        opened[expected is not None] += 1
        assert ours(path) == expected, header

    compare()
    assert min(opened) > 100  # neither answer is rare


ENTRY = '{"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}'


@pytest.mark.parametrize(
    "header",
    [
        f'{{"__metadata__": null, "w": {ENTRY}}}',
        f'{{"w": {ENTRY[:-1]}, "requires_grad": false}}}}',
        f'{{"w": {ENTRY[:-1]}, "strides": [1], "device": {{"type": "cuda", "index": null}}}}}}',
    ],
)
def test_null_metadata_and_unknown_keys_reach_every_reader(tmp_path: Path, header: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(assemble(header))
    assert library(path) == {"w": (4,)}
    with kvpack.open(path) as reader:
        assert reader.stored("w").tolist() == [0, 1, 2, 3]
    report = kvpack.compress(path)
    assert kvpack.verify(report.output, against=path).mismatches == {}
    kvpack.decompress(report.output, tmp_path / "back.safetensors")
    with safe_open(tmp_path / "back.safetensors", "np") as file:
        assert file.get_tensor("w").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("header", "error"),
    [
        (f'{{"w": {ENTRY}, "w": {ENTRY}}}', TensorTableError),
        (f'{{"__metadata__": {{"a": "b", "a": "c"}}, "w": {ENTRY}}}', TensorTableError),
        (f'{{"w": {ENTRY[:-1]}, "x": {{"a": 1, "a": 2}}}}}}', TensorTableError),
        ('{"w": ["U8", [4], [0, 4]]}', TensorTableError),
        ('{"w": {"dtype": {"U8": null}, "shape": [4], "data_offsets": [0, 4]}}', TensorTableError),
        (f'{{"w": {{"dtype": "U8", "shape": [{"1," * 64}4], "data_offsets": [0, 4]}}}}', LimitError),
    ],
)
def test_where_kvpack_is_stricter(tmp_path: Path, header: str, error: type[FormatError]) -> None:
    """FORMAT.md §9.1 lists these; the library opens them."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(assemble(header))
    assert library(path) is not None
    with pytest.raises(error):
        Container(path)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_have(tmp_path: Path, value: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(assemble(f'{{"w": {ENTRY[:-1]}, "x": {value}}}}}'))
    assert library(path) is None
    with pytest.raises(NotAContainerError, match="no number of JSON"):
        Container(path)
