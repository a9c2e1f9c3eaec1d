"""JSON that would take much memory is refused before it is parsed, and so is what is none (FORMAT.md §§9.1, 10)."""

from __future__ import annotations

import json
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from independent_decoder import read_container

from kvpack.errors import ContainerMetadataError, FormatError, LimitError, NotAContainerError
from kvpack.format import container as container_module
from kvpack.format.container import Container
from kvpack.format.json_limits import MAX_JSON_DEPTH, MAX_JSON_VALUES, RepeatedKeyError, load_json

# Room for the interpreter, NumPy and a header of 60 MB, its decoded text and a copy; not for what a parser would make.
_ADDRESS_SPACE = 900 << 20


def write(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def opened_in_little_memory(path: Path) -> str:
    """What opening says in a process that may not have more than a little memory."""
    code = (
        "import sys\n"
        "from kvpack.format.container import Container\n"
        "try: print(len(Container(sys.argv[1]).tensors))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={"PYTHONPATH": str(Path(container_module.__file__).parents[2]), "OPENBLAS_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE)),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "error"),
    [("deep", "NotAContainerError"), ("flat", "LimitError"), ("numbers", "LimitError"), ("tensors", "LimitError")],
)
def test_json_bombs_cost_little_memory(tmp_path: Path, name: str, error: str) -> None:
    header = {
        "deep": lambda: b"[" * 60_000_000,
        "flat": lambda: b"[" + b"[]," * 20_000_000 + b"[]]",
        "numbers": lambda: b'{"a":[' + b"1234," * 12_000_000 + b"0]}",
        "tensors": lambda: (
            b"{"
            + b",".join(b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(1_000_000))
            + b"}"
        ),
    }[name]()
    said = opened_in_little_memory(write(tmp_path / "bomb.safetensors", header))
    assert said.startswith(error), said


def test_no_more_tensors_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container_module, "MAX_TENSORS", 3)
    for count in (3, 4):
        header = json.dumps({str(i): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(count)})
        path = write(tmp_path / "many.safetensors", header.encode())
        if count == 3:
            assert len(Container(path).tensors) == 3
        else:
            with pytest.raises(LimitError, match=r"many\.safetensors: 4 tensors in one file: this reader takes 3"):
                Container(path)


@pytest.mark.parametrize("text", ["[" * 5, '{"a":[{"b":', "[[[[", '[["]]]]",[["[["]]]'])
def test_depth_is_counted_outside_of_strings(text: str) -> None:
    """Only where the parser gives up anyway may the count differ from what json.loads sees."""
    with pytest.raises(ValueError, match=r"Expecting|delimiter|Extra"):
        load_json(text.encode())


@pytest.mark.parametrize(
    "inner",
    ["", "\\", '"', '\\"', "\\\\", '\\\\"', "[[[{{{,,,", '"[\\', "é[\U0001f600", "\\" * 7 + '"' + "\\" * 4],
)
def test_strings_hold_anything(inner: str) -> None:
    value = {"a": inner * 40, inner + "b": [inner, {"c": "[" * 500}]}
    assert load_json(json.dumps(value).encode()) == value
    assert load_json(json.dumps(value, ensure_ascii=False).encode()) == value


def test_strings_across_blocks() -> None:
    """Whether a block begins in a string is carried over from the one before."""
    value = {"a" * 1_048_570: "[" * 3_000_000, "b": ['"' * 1_048_576]}
    assert load_json(json.dumps(value).encode()) == value


def test_depth_and_number_of_values() -> None:
    assert load_json(b"[" * MAX_JSON_DEPTH + b"]" * MAX_JSON_DEPTH)
    with pytest.raises(ValueError, match=f"nested more than {MAX_JSON_DEPTH} deep"):
        load_json(b"[" * (MAX_JSON_DEPTH + 1) + b"]" * (MAX_JSON_DEPTH + 1))
    with pytest.raises(LimitError, match=f"more than {MAX_JSON_VALUES} values"):
        load_json(b"[" + b"0," * MAX_JSON_VALUES + b"0]")


def test_repeated_keys() -> None:
    with pytest.raises(RepeatedKeyError, match="'a' is there twice"):
        load_json(b'{"a":1,"\\u0061":2}')


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_what_no_json_is(tmp_path: Path, number: str) -> None:
    """Neither in the header nor in the strings of __metadata__, by either reader."""
    tensor = '"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,0]}'
    metadata = {"kvpack_version": "1", "kvpack_tensors": f'{{"b":{{"noise_db":{number}}}}}'}
    crc = {"kvpack_version": "1", "kvpack_tensors": "{}", "kvpack_crc32": f'{{"a":{number}}}'}
    for header, error in (
        ("{" + tensor % number + "}", NotAContainerError),
        (f'{{"__metadata__":{json.dumps(metadata)},{tensor % 0}}}', ContainerMetadataError),
        (f'{{"__metadata__":{json.dumps(crc)},{tensor % 0}}}', ContainerMetadataError),
    ):
        path = write(tmp_path / "number.safetensors", header.encode())
        with pytest.raises(error, match="is no number of JSON"):
            Container(path)
        with pytest.raises(ValueError, match="illegal number"):
            read_container(path)


@pytest.mark.parametrize("text", [r'["\ud800"]', r'{"a": [0, ["b\uDfff"]]}', r'"\ud800"', r'"\uDE00\uD83D"'])
def test_lone_surrogates_are_no_text_wherever_they_stand(text: str) -> None:
    with pytest.raises(ValueError, match="surrogates not allowed"):
        load_json(text.encode())
    assert load_json(rb'["\ud83d\ude00", "\\ud800"]') == ["\U0001f600", r"\ud800"]


@pytest.mark.parametrize("key", ['"\\ud800"', '"a\\udfff"'])
def test_lone_surrogates(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "s.safetensors", b'{%s:{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' % key.encode())
    with pytest.raises(NotAContainerError, match="surrogates not allowed"):
        Container(path)
    with pytest.raises(ValueError, match="lone_surrogate"):
        read_container(path)


@pytest.mark.parametrize("shape", ["[0,9223372036854775808]", "[2.0]", "[2e0]", "[true,2]", "[-1,0]", str([1] * 65)])
def test_dimensions(tmp_path: Path, shape: str) -> None:
    path = write(
        tmp_path / "d.safetensors", b'{"a":{"dtype":"U8","shape":%s,"data_offsets":[0,2]}}' % shape.encode(), b"xx"
    )
    with pytest.raises(FormatError, match="'a'"):
        Container(path)
    with pytest.raises(ValueError, match="illegal"):
        read_container(path)
