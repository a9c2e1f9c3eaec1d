"""``--stack``: q, k, v (gate, up) have common tables and tiles, each keeps its rate, and a stack is one launch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_tensor_parallel import numbers
from typer.testing import CliRunner

import kvpack
from kvpack.cli import app
from kvpack.encode.coded_tensor import CodedTensor
from kvpack.encode.tensor_parallel import stack_of

QKV = [f"l.{name}_proj.weight" for name in "qkv"]


def model(folder: Path, **shapes: Any) -> Path:
    """Tensors l.NAME_proj.weight of unlike histograms, so that tables of their own differ."""
    rng = np.random.default_rng(1)
    tensors = {
        f"l.{name}_proj.weight": (rng.standard_t(3 + 4 * number, shape) * 0.02).astype(np.float32)
        for number, (name, shape) in enumerate(shapes.items())
    }
    save_file(tensors, folder / "m.safetensors")
    return folder / "m.safetensors"


def test_names() -> None:
    assert stack_of("a.q_proj.weight") == ("a.q_proj.weight", "a.k_proj.weight", "a.v_proj.weight")
    assert stack_of("w3.weight") == ("w1.weight", "w3.weight")
    assert stack_of("a.o_proj.weight") == stack_of("a.q_proj.bias") == stack_of("a.xq_proj.weight") == ()


def test_a_stack_has_one_table_and_each_part_its_rate(tmp_path: Path) -> None:
    source = model(tmp_path, q=(512, 192), k=(256, 192), v=(288, 192), o=(192, 256))
    kvpack.compress(source, tmp_path / "alone", bits=4.5)
    report = kvpack.compress(source, tmp_path / "out", bits=4.5, stack=True)
    assert report.notes == ["stack: 1 set of layers has common tables"]
    with kvpack.open(tmp_path / "alone") as alone, kvpack.open(tmp_path / "out") as reader:
        assert len(tables(CodedTensor.stack([alone.coded(name) for name in QKV]))) == 3
        parts = [reader.coded(name) for name in QKV]
        assert {part.header.tile_cols for part in parts} == {192}
        stacked = CodedTensor.stack(parts)
        assert len(tables(stacked)) == 1
        np.testing.assert_array_equal(numbers(stacked), np.concatenate([reader.dequantize(name) for name in QKV]))
        for name in QKV:
            info = reader.info(name)
            assert info is not None
            assert 4.45 < info.bits_per_weight <= 4.5
        # A tensor that is not stacked is what it is without.
        assert bytes(reader.coded("l.o_proj.weight").blob) == bytes(alone.coded("l.o_proj.weight").blob)
    assert kvpack.verify(tmp_path / "out", source).mismatches == {}


def tables(tensor: CodedTensor) -> list[Any]:
    from kvpack.format.blob import Blob

    return Blob(tensor.blob).tables


def test_common_tables_change_no_number(tmp_path: Path) -> None:
    source = model(tmp_path, gate=(300, 96), up=(300, 96))
    source_of = {"layout": "compact", "preset": "int8-row"}
    kvpack.compress(model(tmp_path, gate=(320, 96), up=(300, 96)), tmp_path / "alone", **source_of)
    kvpack.compress(source := tmp_path / "m.safetensors", tmp_path / "out", stack=True, **source_of)
    with kvpack.open(tmp_path / "alone") as alone, kvpack.open(tmp_path / "out") as reader:
        names = ["l.gate_proj.weight", "l.up_proj.weight"]
        for name in names:
            np.testing.assert_array_equal(reader.dequantize(name), alone.dequantize(name))
        stacked = CodedTensor.stack([reader.coded(name) for name in names])
        assert stacked.shape == (620, 96)
        assert len(stacked.scales) == 620
    assert source.exists()


@pytest.mark.parametrize(
    ("shapes", "options", "reason"),
    [
        ({"q": (510, 192), "k": (512, 192), "v": (512, 192)}, {}, "all but the last need a multiple of 32 rows"),
        ({"q": (128, 96), "k": (64, 96), "v": (64, 96)}, {"tensor_bits": {"k_proj": 4.4}}, "their rates differ"),
    ],
)
def test_what_cannot_be_stacked_is_said_and_coded_alone(shapes: Any, options: Any, reason: str, tmp_path: Path) -> None:
    source = model(tmp_path, **shapes)
    kvpack.compress(source, tmp_path / "alone", bits=4.5, **options)
    report = kvpack.compress(source, tmp_path / "out", bits=4.5, stack=True, **options)
    assert report.notes == [
        "stack: 0 sets of layers have common tables",
        f"stack: {' + '.join(QKV)} cannot be one ({reason}), coded as without it",
    ]
    assert (tmp_path / "out").read_bytes() == (tmp_path / "alone").read_bytes()


def test_a_stack_has_one_layout_unless_that_is_much_noisier(tmp_path: Path) -> None:
    """Alone k has integers of another width, and can do without; up, which has no tails, cannot. w3 is exact."""
    rng = np.random.default_rng(4)
    parts = {"q": rng.normal(0, 1, (256, 192)), "k": rng.standard_t(5, (256, 192)), "v": rng.normal(0, 1, (256, 192))}
    parts |= {"gate": rng.standard_t(3, (288, 192)), "up": rng.triangular(-1, 0, 1, (256, 192))}
    parts |= {"w1": rng.normal(0, 1, (64, 96)), "w3": np.where(rng.random((64, 96)) < 0.01, np.nan, 1.0)}
    names = {name: f"{name}.weight" if name[0] == "w" else f"{name}_proj.weight" for name in parts}
    save_file({names[name]: part.astype(np.float32) for name, part in parts.items()}, tmp_path / "m.safetensors")
    kvpack.compress(tmp_path / "m.safetensors", tmp_path / "alone", bits=4.35, layout="fast")
    report = kvpack.compress(tmp_path / "m.safetensors", tmp_path / "out", bits=4.35, layout="fast", stack=True)
    with kvpack.open(tmp_path / "alone") as alone, kvpack.open(tmp_path / "out") as reader:
        bits = [[r.coded(names[name]).header.layout.element_bits for name in ("q", "k", "v")] for r in (alone, reader)]
        assert bits == [[5, 4, 5], [5, 5, 5]]
        np.testing.assert_array_equal(alone.dequantize(names["up"]), reader.dequantize(names["up"]))
    assert report.notes[0] == "stack: 1 set of layers has common tables"
    assert (
        "gate_proj.weight + up_proj.weight cannot be one (some would be much noisier in a common layout)"
        in report.notes[1]
    )
    assert "w1.weight + w3.weight cannot be one (their layouts differ)" in report.notes[2]


def test_shards_inputs_and_kept_tensors_that_are_no_stack_are_said(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    folder = tmp_path / "model"
    folder.mkdir()

    def values(*shape: int) -> Any:
        return rng.normal(0, 0.02, shape).astype(np.float32)

    gate = [f"0.{name}_proj.weight" for name in ("gate", "up")]
    qkv = [f"x.{name}_proj.weight" for name in "qkv"]
    shards = (
        {gate[0]: values(64, 96), "1.gate_proj.weight": values(64, 96), "1.up_proj.weight": values(64, 96)},
        {gate[1]: values(64, 96), qkv[0]: values(64, 96), qkv[1]: values(64, 128)},
        {qkv[2]: values(64, 128), "y.w1.weight": values(64, 96), "y.w3.weight": values(64, 128)},
        {"z.w1.weight": values(64, 96), "z.w3.weight": values(64, 96)},
    )
    for number, tensors in enumerate(shards):
        save_file(tensors, folder / f"model-0000{number + 1}-of-00004.safetensors")
    report = kvpack.compress(folder, tmp_path / "out", stack=True, exclude="z.w3")
    assert report.notes[0] == "stack: 1 set of layers has common tables"
    assert [note.split("stack: ")[1].split(", coded")[0] for note in report.notes[1:]] == [
        f"{' + '.join(gate)}, {' + '.join(qkv)} cannot be one (they are in different files)",
        "y.w1.weight + y.w3.weight cannot be one (their dtypes or inputs differ)",
        "z.w1.weight + z.w3.weight cannot be one (some are kept as they are)",
    ]


def test_a_tensor_without_the_others_is_no_stack(tmp_path: Path) -> None:
    source = model(tmp_path, q=(128, 96), k=(64, 96))
    assert kvpack.compress(source, tmp_path / "out", stack=True).notes == ["stack: 0 sets of layers have common tables"]


def test_the_command(tmp_path: Path) -> None:
    source = model(tmp_path, gate=(64, 96), up=(64, 96))
    done = CliRunner().invoke(app, ["compress", str(source), "-o", str(tmp_path / "out"), "--stack"])
    assert done.exit_code == 0, done.output
    assert "stack: 1 set of layers has common tables" in done.output
