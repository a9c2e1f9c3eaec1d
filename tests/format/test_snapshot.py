"""Files of KV pages: what is written comes back, and what is wrong with a file is said by name."""

from __future__ import annotations

import json
import os
import re
import struct
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import independent_decoder
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshot_samples import FINGERPRINT, SamplePages, make_header, mixed_formats, usual_formats

from kvpack.encode.page_coder import dequantize_blocks
from kvpack.encode.snapshot_coder import (
    decode_run,
    decode_runs,
    encode_run,
    verify_snapshot,
    write_snapshot,
)
from kvpack.encode.verify import verify
from kvpack.errors import (
    ContainerError,
    DamagedRunError,
    LimitError,
    NotASnapshotError,
    SnapshotHeaderError,
    TensorCrcError,
)
from kvpack.format.container import ContainerWriter
from kvpack.format.pages import PageFormat, Side, split_block
from kvpack.format.snapshot import (
    SNAPSHOT_CRC_KEY,
    SNAPSHOT_KEY,
    Fingerprint,
    SnapshotFile,
    SnapshotHeader,
    run_pages,
    snapshot_crc32,
)
from kvpack.format.snapshot_summary import describe_snapshot


def read_file(path: Path) -> tuple[dict[str, Any], bytes]:
    """(the JSON header, the data) of a safetensors file."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_file(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def change_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a snapshot's own header, with a right CRC."""
    header, data = read_file(path)
    fields = json.loads(header["__metadata__"][SNAPSHOT_KEY])
    change(fields)
    text = json.dumps(fields)
    header["__metadata__"] |= {SNAPSHOT_KEY: text, SNAPSHOT_CRC_KEY: snapshot_crc32(text)}
    write_file(path, header, data)


def change_byte(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def place_of(path: Path, name: str, share: float = 0.7) -> int:
    """Where in a file some byte of a tensor is."""
    with SnapshotFile(path) as file:
        tensor = file.container.tensors[name]
        return file.container.data_begin + tensor.begin + int(share * tensor.size_bytes)


@pytest.fixture
def three_runs(tmp_path: Path) -> tuple[Path, SamplePages]:
    """A snapshot of three runs of four pages; the last page has 5 tokens."""
    header = make_header(64 * 9 + 5, run_pages=4, first_page=10)
    pages = SamplePages(header, usual_formats(header, PageFormat.INT4))
    path = tmp_path / "three.kvpack.safetensors"
    pages.write(path)
    return path, pages


def check_pages(file: SnapshotFile, pages: SamplePages, runs: range) -> int:
    """The runs hold these pages; how many."""
    count = 0
    for _, decoded in decode_runs(file, runs):
        for found, blocks in decoded:
            np.testing.assert_array_equal(blocks, pages.blocks(found))
            count += len(found)
    return count


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128])
@pytest.mark.parametrize("tokens", [1, 64, 64 * 33, 64 * 12 + 7])
def test_pages_come_back(tmp_path: Path, tokens: int, head_dim: int, dtype: str) -> None:
    header = make_header(tokens, 2, 1, head_dim, dtype=dtype)
    pages = SamplePages(header, mixed_formats(header, head_dim), random_bytes=tokens % 64 == 0)
    path = tmp_path / "x.safetensors"
    assert pages.write(path) == path.stat().st_size
    with SnapshotFile(path) as file:
        assert file.header == header
        np.testing.assert_array_equal(file.page_formats, pages.page_formats)
        np.testing.assert_array_equal(file.tokens(), np.arange(tokens))
        assert check_pages(file, pages, range(header.runs)) == 4 * header.pages
    report = verify_snapshot(path)
    assert (report.intact_pages, report.damage) == (header.pages, None)
    assert verify(path).bytes_without_checksum == 0


def test_all_arrays_come_back(tmp_path: Path) -> None:
    header = make_header(200, parent="a" * 64, chain="b" * 64, budget=0.25)
    rng = np.random.default_rng(0)
    arrays = {
        "positions": rng.permutation(200).astype(np.int32),
        "page_hashes": rng.integers(0, 256, (3, 32)).astype(np.uint8),
        "importance": rng.random((2, 2, 4)).astype(np.float32),
        "errors": rng.random((2, 2, 5)),
        "shares": rng.random(2),
    }
    arrays["errors"][0, 0, 0] = np.nan
    path = tmp_path / "x.safetensors"
    SamplePages(header, usual_formats(header, PageFormat.INT8)).write(path, **arrays)
    with SnapshotFile(path) as file:
        for name, array in arrays.items():
            found = file.array(name)
            assert found is not None
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(found, array)
    SamplePages(header, usual_formats(header, PageFormat.INT8)).write(path)
    with SnapshotFile(path) as file:
        assert file.array("positions") is None


def test_parts_of_a_file_are_read_alone(three_runs: tuple[Path, SamplePages], monkeypatch: pytest.MonkeyPatch) -> None:
    path, pages = three_runs
    with SnapshotFile(path) as file:
        assert file.header.runs_of(4, 8) == range(1, 2)
        assert file.header.runs_of(3, 9) == range(3)
        assert file.header.token_range(1) == range(14 * 64, 18 * 64)
        assert file.header.token_range(2) == range(18 * 64, 19 * 64 + 5)
        read = []
        data = file.container.data
        monkeypatch.setattr(file.container, "data", lambda name: read.append(name) or data(name))
        assert check_pages(file, pages, file.header.runs_of(4, 8)) == 16
        assert read
        assert all(name.startswith("run.00001.") for name in read)


def test_opening_reads_headers_alone(three_runs: tuple[Path, SamplePages]) -> None:
    """Damage in blobs is not looked for: a directory of snapshots is listed by headers."""
    path, _ = three_runs
    whole = describe_snapshot(path)
    assert whole["pages"] == {"K FP16": 4, "K INT4": 16, "V FP16": 4, "V INT4": 16}
    assert whole["file_bytes"] == path.stat().st_size
    with SnapshotFile(path) as file:
        layouts = [file.header.page_layout(side, f) for side in Side for f in (PageFormat.FP16, PageFormat.INT4)]
    assert whole["page_bytes"] == 2 * sum(
        count * layout.block_bytes for count, layout in zip((4, 16, 4, 16), layouts, strict=True)
    )
    assert json.loads(json.dumps(whole)) == whole
    change_byte(path, place_of(path, "run.00001.V.INT4.codes"))
    assert describe_snapshot(path) == whole


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("run.00001.K.INT4.wide", "K INT4"),
        ("run.00001.K.INT4.thin", "K INT4"),
        ("run.00001.V.INT4.scales", "V INT4"),
        ("run.00002.V.FP16.codes", "V FP16"),
    ],
)
def test_a_damaged_run_is_named(three_runs: tuple[Path, SamplePages], name: str, where: str) -> None:
    path, pages = three_runs
    change_byte(path, place_of(path, name))
    run = int(name[4:9])
    tokens = pages.header.token_range(run)
    shown = f"run {run} \\(tokens {tokens.start}.{tokens.stop - 1}\\), layer \\d, {where}: .*{re.escape(str(path))}"
    with SnapshotFile(path) as file:
        with pytest.raises(DamagedRunError, match=shown):
            decode_run(file, run)
        good = []
        with pytest.raises(DamagedRunError, match=shown):
            good.extend(found for found, _ in decode_runs(file, range(3)))
        assert good == list(range(run))
        assert check_pages(file, pages, range(run)) == run * 16
    report = verify_snapshot(path)
    assert report.intact_pages == 4 * run
    assert re.match(shown, str(report.damage))


def test_the_damaged_layer_is_named(tmp_path: Path) -> None:
    header = make_header(64 * 8, 6, 2, 128)
    pages = SamplePages(header, usual_formats(header, PageFormat.INT2))
    path = tmp_path / "x.safetensors"
    for layer in range(6):
        pages.write(path)
        change_byte(path, place_of(path, "run.00000.K.INT2.wide", (layer + 0.6) / 6))
        damage = verify_snapshot(path).damage
        assert damage is not None
        assert damage.layer in (layer - 1, layer)  # where its tile begins
        assert (damage.run, damage.first_token, damage.end_token) == (0, 0, 512)


def test_damaged_arrays_are_refused(three_runs: tuple[Path, SamplePages]) -> None:
    path, _ = three_runs
    change_byte(path, place_of(path, "tokens"))
    with SnapshotFile(path) as file, pytest.raises(TensorCrcError, match="tokens"):
        file.tokens()
    with pytest.raises(TensorCrcError, match="tokens"):
        verify_snapshot(path)
    change_byte(path, place_of(path, "page_formats"))
    with pytest.raises(TensorCrcError, match="page_formats"):
        SnapshotFile(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name, most in {"importance": 3e38, "errors": 2.0**512, "shares": 4096.0}.items()
        for value in [-1.0, -1e-30, np.inf, np.nan, 0.0, most, 2 * most]
        if (name, value) != ("importance", 2 * most)  # which its dtype does not hold
    ],
)
def test_numbers_that_nothing_can_be_computed_of_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: float
) -> None:
    header = make_header(300, budget=0.3)
    pages, path = SamplePages(header, usual_formats(header, PageFormat.INT4)), tmp_path / "x.safetensors"
    shapes = {"importance": ((2, 2, 5), "f4"), "errors": ((2, 2, 5), "f8"), "shares": ((2,), "f8")}
    array = np.full(shapes[name][0], 0.5, shapes[name][1])
    array.flat[1] = value
    most = {"importance": 3e38, "errors": 2.0**512, "shares": 4096.0}[name]
    if 0 <= value <= most or (name == "errors" and np.isnan(value)):  # which has not been measured
        pages.write(path, **{name: array})
        verify_snapshot(path)
        return
    with pytest.raises(SnapshotHeaderError, match=f"{name}.* has .*; its numbers run from 0 to"):
        pages.write(path, **{name: array})
    assert not path.exists()
    monkeypatch.setattr("kvpack.encode.snapshot_coder.check_values", lambda *_: None)
    pages.write(path, **{name: array})
    with SnapshotFile(path) as file, pytest.raises(SnapshotHeaderError, match=f"x.safetensors|{name}"):
        file.array(name)
    with pytest.raises(SnapshotHeaderError, match=name):
        verify_snapshot(path)


def test_what_is_no_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with ContainerWriter(path) as writer:
        writer.add("w", "F32", (1,), [bytes(4)])
        writer.finish({})
    with pytest.raises(NotASnapshotError, match=re.escape(f"{path}: no kvpack_snapshot")):
        SnapshotFile(path)
    path.write_bytes(b"\x80\x04" * 40)
    with pytest.raises(ContainerError):
        SnapshotFile(path)
    with pytest.raises(FileNotFoundError):
        SnapshotFile(tmp_path / "absent")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"coding": "transform"}, "coding 'transform'"),
        ({"page_tokens": 128}, "page_tokens"),
        ({"tokens": 0}, "tokens"),
        ({"tokens": 1 << 25}, "tokens"),
        ({"tokens": True}, "tokens"),
        ({"tokens": 580.0}, "tokens"),
        ({"tokens": 64 * 9 + 6}, "tensor 'tokens' is I32"),
        ({"layers": 3}, "page_formats"),
        ({"layers": 1 << 13}, "layers"),
        ({"kv_heads": 0}, "kv_heads"),
        ({"kv_heads": 3}, None),
        ({"head_dim": 40}, "head_dim"),
        ({"head_dim": 1 << 30}, "head_dim"),
        ({"head_dim": 512}, "head_dim"),
        ({"run_pages": 5}, "missing, or no blob"),
        ({"run_pages": 0}, "run_pages"),
        ({"dtype": "F32"}, "dtype"),
        ({"dtype": "BF16"}, "which a snapshot of BF16 cannot have"),
        ({"key_order": [0]}, "key_order"),
        ({"key_order": [0, 0]}, "key_order"),
        ({"key_order": [0, 1.0]}, "key_order"),
        ({"key_order": {}}, "key_order"),
        ({"formats": [["INT4", "INT4"]]}, "formats"),
        ({"formats": [["INT4"], ["INT4", "INT4"]]}, "formats"),
        ({"formats": [["INT5", "INT4"], ["INT4", "INT4"]]}, "formats"),
        ({"formats": [[1, 2], [3, 4]]}, "formats"),
        ({"budget": 0}, "budget"),
        ({"budget": "0.5"}, "budget"),
        ({"policy": 3}, "policy"),
        ({"policy": "x" * 2000}, "policy"),
        ({"parent": "abc"}, "parent"),
        ({"chain": "G" * 64}, "chain"),
        ({"created_unix_s": -1}, "created_unix_s"),
        ({"fingerprint": 3}, "fingerprint"),
        ({"fingerprint": {}}, "fingerprint"),
        ({"fingerprint": FINGERPRINT.to_dict() | {"model": None}}, "fingerprint.model"),
        ({"fingerprint": FINGERPRINT.to_dict() | {"rope": []}}, "fingerprint.rope"),
        ({"fingerprint": FINGERPRINT.to_dict() | {"dtype": 1}}, "fingerprint.dtype"),
    ],
)
def test_headers_that_are_refused(
    three_runs: tuple[Path, SamplePages], change: dict[str, Any], message: str | None
) -> None:
    path, _ = three_runs
    change_header(path, lambda fields: fields.update(change))
    if message is None:  # nothing but the blobs tells
        with SnapshotFile(path) as file, pytest.raises(DamagedRunError, match="elements, the pages"):
            decode_run(file, 0)
        return
    with pytest.raises(SnapshotHeaderError, match=re.escape(message)) as caught:
        SnapshotFile(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("key", sorted(json.loads(make_header(1).to_json())))
def test_every_key_is_needed(three_runs: tuple[Path, SamplePages], key: str) -> None:
    path, _ = three_runs
    change_header(path, lambda fields: fields.pop(key))
    with pytest.raises(SnapshotHeaderError):
        SnapshotFile(path)


def test_unknown_keys_are_passed_over(three_runs: tuple[Path, SamplePages]) -> None:
    path, pages = three_runs
    change_header(path, lambda fields: fields.update({"later": [1, 2], "another": None}))
    with SnapshotFile(path) as file:
        assert file.header == pages.header


def rename(header: dict[str, Any], old: str, new: str) -> None:
    crc32 = json.loads(header["__metadata__"]["kvpack_crc32"])
    for of_names in (header, crc32):
        of_names[new] = of_names.pop(old)
    header["__metadata__"]["kvpack_crc32"] = json.dumps(crc32)


def own_header(text: str) -> dict[str, str]:
    return {SNAPSHOT_KEY: text, SNAPSHOT_CRC_KEY: snapshot_crc32(text)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: rename(h, "tokens", "tokenz"), "'tokens' is missing|tokenz"),
        (lambda h: rename(h, "run.00001.K.INT4.thin", "run.00001.K.INT4.thick"), "run.00001.K.INT4.thin|thick"),
        (lambda h: rename(h, "run.00001.K.INT4.thin", "run.1.K.INT4.thin"), "run.00001.K.INT4.thin|run.1"),
        (lambda h: h["run.00001.K.INT4.thin"].update(dtype="I8"), "no blob of type U8"),
        (lambda h: h["tokens"].update(dtype="U32"), "'tokens' is U32"),
        (lambda h: h["__metadata__"].pop("kvpack_crc32"), "has no CRC"),
        (lambda h: h["__metadata__"].pop(SNAPSHOT_CRC_KEY), SNAPSHOT_CRC_KEY),
        (lambda h: h["__metadata__"].update({SNAPSHOT_KEY: "{}"}), "computed"),
        (
            lambda h: h["__metadata__"].update({SNAPSHOT_KEY: "[]", SNAPSHOT_CRC_KEY: snapshot_crc32("[]")}),
            "no.*object",
        ),
        (lambda h: h["__metadata__"].update({SNAPSHOT_KEY: "{", SNAPSHOT_CRC_KEY: snapshot_crc32("{")}), "valid JSON"),
    ],
)
def test_tensors_that_are_refused(three_runs: tuple[Path, SamplePages], change: Any, message: str) -> None:
    path, _ = three_runs
    header, data = read_file(path)
    change(header)
    write_file(path, header, data)
    with pytest.raises((SnapshotHeaderError, ContainerError), match=message):
        SnapshotFile(path)


def test_a_tensor_more_is_refused(three_runs: tuple[Path, SamplePages]) -> None:
    path, _ = three_runs
    header, data = read_file(path)
    header["more"] = {"dtype": "U8", "shape": [4], "data_offsets": [len(data), len(data) + 4]}
    write_file(path, header, data + bytes(4))
    with pytest.raises(SnapshotHeaderError, match="'more' is no part"):
        SnapshotFile(path)


def test_blobs_in_each_others_place_are_refused(three_runs: tuple[Path, SamplePages]) -> None:
    """Their own CRCs are right."""
    path, _ = three_runs
    header, data = read_file(path)
    for a, b in (("wide", "thin"), ("scales", "centers")):
        names = [f"run.00001.K.INT4.{part}" for part in (a, b)]
        header[names[0]], header[names[1]] = header[names[1]], header[names[0]]
    write_file(path, header, data)
    with SnapshotFile(path) as file, pytest.raises(DamagedRunError, match=r"K INT4: wide: .* 5 bits are needed"):
        decode_run(file, 1)
    assert verify_snapshot(path).intact_pages == 4


def test_a_header_cannot_ask_for_much_memory(tmp_path: Path) -> None:
    """4,096 heads of 256 in a file of some kilobytes."""
    header = make_header(64 * 64, 4, 1)
    path = tmp_path / "x.safetensors"
    SamplePages(header, np.full((4, 2, 64), PageFormat.INT2, np.uint8)).write(path)
    change_header(path, lambda fields: fields.update(kv_heads=4096, head_dim=256, key_order=[]))
    tracemalloc.start()
    with pytest.raises(LimitError, match="numbers in"):
        SnapshotFile(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * path.stat().st_size
    with SnapshotFile(path, max_elements=1 << 60) as file:
        assert file.header.kv_heads == 4096


def test_an_empty_conversation_is_refused() -> None:
    with pytest.raises(SnapshotHeaderError, match="tokens"):
        make_header(0)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"tokens": np.zeros(4, np.int32)}, r"'tokens' is I32 \[4\]; I32 \[100\]"),
        ({"tokens": np.zeros(100, np.int64)}, "'tokens' is int64"),
        ({"page_formats": np.full((2, 2, 2), 9, np.uint8)}, "layer 0, K, page 0 has format 9"),
        ({"page_formats": np.full((2, 2, 2), 1, np.uint8)}, "has format 1, which a snapshot of F16 cannot have"),
        ({"extra": np.zeros(1, np.uint8)}, "'extra' is no part"),
    ],
)
def test_what_is_not_written(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    header = make_header(100)
    pages = SamplePages(header, usual_formats(header, PageFormat.INT4))
    with pytest.raises(SnapshotHeaderError, match=message):
        pages.write(tmp_path / "x.safetensors", **arrays)
    assert not list(tmp_path.iterdir())


def test_a_failing_writer_leaves_what_was_there(three_runs: tuple[Path, SamplePages]) -> None:
    path, pages = three_runs
    before = path.read_bytes()

    def fails(_: object) -> np.ndarray:
        raise RuntimeError("device lost")

    arrays = {"tokens": np.zeros(pages.header.tokens, np.int32), "page_formats": pages.page_formats}
    runs = (
        encode_run(run_pages(pages.header, pages.page_formats, run), fails if run else pages.blocks) for run in range(3)
    )
    with pytest.raises(RuntimeError, match="device lost"):
        write_snapshot(path, pages.header, arrays, runs)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_differences_of_fingerprints() -> None:
    other = replace(FINGERPRINT, weights="3" * 64, rope={"theta": 5e5, "factor": 2}, adapter="4" * 64)
    assert FINGERPRINT.differences(FINGERPRINT) == []
    assert FINGERPRINT.differences(Fingerprint.parse(json.loads(json.dumps(FINGERPRINT.to_dict())))) == []
    assert FINGERPRINT.differences(other) == [
        f"adapter: None in the file, {'4' * 64} in the model",
        "rope.factor: absent in the file, 2 in the model",
        "rope.theta: 10000.0 in the file, 500000.0 in the model",
        "rope.type: default in the file, absent in the model",
        f"weights: {'2' * 64} in the file, {'3' * 64} in the model",
    ]


@pytest.mark.parametrize(
    ("head_dim", "key_order", "dtype"), [(16, (), "F16"), (96, (), "BF16"), (128, (7, 0, 6, 1, 5, 2, 4, 3), "F16")]
)
def test_a_decoder_written_from_the_page_alone_agrees(
    tmp_path: Path, head_dim: int, key_order: tuple[int, ...], dtype: str
) -> None:
    header = make_header(64 * 11 + 3, 3, 2, head_dim, dtype=dtype, key_order=key_order, run_pages=8)
    pages = SamplePages(header, mixed_formats(header), random_bytes=True)
    path = tmp_path / "x.safetensors"
    pages.write(path)
    fields, arrays, found = independent_decoder.read_snapshot(path)
    assert SnapshotHeader.parse(json.dumps(fields)) == header
    np.testing.assert_array_equal(arrays["tokens"], np.arange(header.tokens))
    seen = set()
    for run in range(header.runs):
        for group in run_pages(header, pages.page_formats, run):
            with np.errstate(invalid="ignore", over="ignore"):
                numbers = dequantize_blocks(pages.blocks(group), group.layout)
            parts = split_block(pages.blocks(group), group.layout)
            for i, place in enumerate(zip(group.layers.tolist(), group.indices.tolist(), strict=True)):
                theirs = found[(group.side.name, *place)]
                np.testing.assert_array_equal(theirs.codes, parts.codes[i])
                np.testing.assert_array_equal(theirs.numbers, numbers[i])
                for mine, other in ((parts.scales, theirs.scales), (parts.centers, theirs.centers)):
                    assert (other is None) == (mine.shape[-1] == 0)
                    if other is not None:
                        np.testing.assert_array_equal(other.reshape(2, -1), mine[i].view(np.uint16))
                seen.add((group.side.name, *place))
    assert seen == found.keys()


@settings(max_examples=25)
@given(data=st.data())
def test_any_mixture_comes_back(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    integers = st.integers
    head_dim = 16 * data.draw(integers(1, 16))
    header = make_header(
        data.draw(integers(1, 400)),
        data.draw(integers(1, 3)),
        data.draw(integers(1, 3)),
        head_dim,
        key_order=tuple(data.draw(st.permutations(range(head_dim // 16)))),
        run_pages=data.draw(integers(1, 12)),
        dtype=data.draw(st.sampled_from(["F16", "BF16"])),
    )
    pages = SamplePages(
        header, mixed_formats(header, data.draw(integers(0, 99))), random_bytes=data.draw(st.booleans())
    )
    path = tmp_path_factory.mktemp("mixture") / "x.safetensors"
    pages.write(path)
    with SnapshotFile(path) as file:
        assert file.header == header
        assert check_pages(file, pages, range(header.runs)) == 2 * header.layers * header.pages


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=70),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(json.loads(make_header(1).to_json()))), json_values, max_size=3))
def test_any_header_is_parsed_or_refused_by_name(change: dict[str, Any]) -> None:
    fields = json.loads(make_header(100).to_json()) | change
    with suppress(SnapshotHeaderError, LimitError):
        header = SnapshotHeader.parse(json.dumps(fields))
        assert SnapshotHeader.parse(header.to_json()) == header


@given(st.text(max_size=200))
def test_any_text_is_parsed_or_refused_by_name(text: str) -> None:
    with pytest.raises((SnapshotHeaderError, LimitError)):
        SnapshotHeader.parse(text)
