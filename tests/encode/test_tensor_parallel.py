"""``--tensor-parallel``: tiles end where parts do, what cannot be split is said, and parts are those of the whole."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_blobs as samples
from safetensors.numpy import save_file
from typer.testing import CliRunner

import kvpack
from kvpack.cli import app
from kvpack.encode.blob_decoder import decode_integers
from kvpack.encode.blob_encoder import even_tile_cols
from kvpack.encode.coded_tensor import CodedTensor
from kvpack.encode.compress import compress
from kvpack.encode.retiling import retile
from kvpack.encode.tensor_parallel import Split, dividing_tile_cols, reason_not_to_split
from kvpack.errors import GeometryError, InputError
from kvpack.format.blob import Blob
from kvpack.format.layout import ElementKind, integer_layout

BALANCED = integer_layout("balanced", ElementKind.SIGNED, 5)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("model.layers.0.self_attn.q_proj.weight", Split.OUTPUTS),
        ("model.layers.0.self_attn.o_proj.weight", Split.INPUTS),
        ("model.layers.0.mlp.gate_up_proj.weight", Split.TWO_OUTPUTS),
        ("model.layers.0.mlp.experts.down_proj", Split.INPUTS),
        ("model.layers.0.mlp.experts.3.w2.weight", Split.INPUTS),
        ("h.0.attn.c_attn.weight", Split.OUTPUTS),
        ("encoder.layer.0.attention.self.query.weight", Split.OUTPUTS),
        ("encoder.layer.0.output.dense.weight", Split.EITHER),
        ("model.embed_tokens.weight", Split.EITHER),
    ],
)
def test_names_say_how_layers_are_split(name: str, split: Split) -> None:
    assert Split.of(name) is split


@pytest.mark.parametrize("cols", [4096, 5120, 8192, 11008, 14336, 18944, 28672, 1408, 4736, 27648])
@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("name", ["balanced", "fast", "compact"])
def test_tiles_divide_the_parts(cols: int, parts: int, name: str) -> None:
    layout = integer_layout(name, ElementKind.SIGNED, 5)
    if cols % (32 * parts):
        assert "inputs are no multiple" in str(reason_not_to_split(Split.INPUTS, 4096, cols, None, parts))
        return
    tile_cols = even_tile_cols(4096, cols, layout, parts)
    assert cols // parts % tile_cols == 0
    assert 192 <= tile_cols <= 2048


def test_parts_that_no_tiles_divide() -> None:
    assert dividing_tile_cols(32 * 67, 512) is None
    reason = reason_not_to_split(Split.INPUTS, 64, 2 * 32 * 67, None, 2)
    assert reason == "no tiles of 192 to 2048 columns divide the 2144 of a part"
    assert reason_not_to_split(Split.OUTPUTS, 96, 50, None, 2) == "96 outputs are no multiple of 64"
    assert reason_not_to_split(Split.TWO_OUTPUTS, 192, 50, None, 4) == "192 outputs are no multiple of 256"
    assert reason_not_to_split(Split.EITHER, 128, 100, None, 4) == "100 inputs are no multiple of 128"
    assert reason_not_to_split(Split.INPUTS, 7, 512, 192, 2) == "tiles of 192 columns do not divide the 256 of a part"
    assert reason_not_to_split(Split.INPUTS, 7, 512, 64, 2) is None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Down's 1408 inputs are a tile of 704 in each of two parts, and tiles of 480 without."""
    rng = np.random.default_rng(1)
    shapes = {"q_proj": (128, 96), "k_proj": (64, 96), "v_proj": (48, 96), "down_proj": (96, 1408), "o_proj": (96, 100)}
    tensors = {f"l.{name}.weight": rng.normal(0, 0.02, shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "m.safetensors")
    return tmp_path


def test_parts_need_no_coding(folder: Path) -> None:
    report = kvpack.compress(folder / "m.safetensors", folder / "two", bits=5, tensor_parallel=2)
    assert [note for note in report.notes if "tensor parallel" in note] == [
        "tensor parallel 2: l.o_proj.weight cannot be split so (100 inputs are no multiple of 64), coded as without it",
        "tensor parallel 2: l.v_proj.weight cannot be split so (48 outputs are no multiple of 64), coded as without it",
    ]
    with kvpack.open(folder / "two") as reader:
        infos = {name: reader.info(name) for name in reader.keys()}  # noqa: SIM118
        assert {n: i.tensor_parallel for n, i in infos.items() if i} == {
            "l.down_proj.weight": 2,
            "l.k_proj.weight": 2,
            "l.o_proj.weight": 1,
            "l.q_proj.weight": 2,
            "l.v_proj.weight": 1,
        }
        down, q = reader.coded("l.down_proj.weight"), reader.coded("l.q_proj.weight")
        assert down.header.tile_cols == 704
        whole = reader.dequantize("l.down_proj.weight")
        halves = [numbers(down.part("inputs", rank, 2)) for rank in (0, 1)]
        np.testing.assert_array_equal(np.concatenate(halves, axis=1), whole)
        second = q.part("outputs", 1, 2)
        assert second.shape == (64, 96)
        np.testing.assert_array_equal(numbers(second), reader.dequantize("l.q_proj.weight")[64:])
        with pytest.raises(GeometryError, match="16 is no border"):
            q.part("outputs", 1, 8)
        with pytest.raises(GeometryError, match="part 2 of 2"):
            q.part("outputs", 2, 2)


def test_without_it_parts_are_made_by_coding_again(folder: Path) -> None:
    kvpack.compress(folder / "m.safetensors", folder / "one", bits=5)
    with kvpack.open(folder / "one") as reader:
        down, whole = reader.coded("l.down_proj.weight"), reader.dequantize("l.down_proj.weight")
    with pytest.raises(GeometryError, match=r"704 is no border.*480 and 960"):
        down.part("inputs", 0, 2)
    again = down.for_parts(2)
    assert (again.header.tile_cols, again.for_parts(2)) == (704, again)
    np.testing.assert_array_equal(numbers(again.part("inputs", 1, 2)), whole[:, 704:])
    with pytest.raises(GeometryError, match="3 parts of the inputs: 1408 inputs are no multiple of 96"):
        down.for_parts(3)


@pytest.mark.parametrize("tile_cols", [32, 96, 224])
def test_other_tiles_hold_the_same_numbers(tile_cols: int) -> None:
    elements = samples.gaussian_elements((2, 300, 200), 5, 2.0, 7)
    outliers = [(0, 3, 199, 9), (0, 3, 4, -9), (0, 256, 64, 4095), (1, 299, 2, -4096)]
    outliers = sorted(outliers)
    blob = Blob(samples.encode_with_outliers(elements, outliers, BALANCED, tile_cols=64))
    other = Blob(retile(blob, tile_cols))
    assert (other.header.tile_cols, int(other.tiles["outlier_count"].sum())) == (tile_cols, 4)
    np.testing.assert_array_equal(decode_integers(other), decode_integers(blob))


def test_an_outlier_may_be_too_far_for_longer_tiles() -> None:
    elements = samples.gaussian_elements((1, 32, 2048), 5, 2.0, 7)
    blob = Blob(samples.encode_with_outliers(elements, [(0, 0, 0, 16000)], BALANCED, tile_cols=512))
    with pytest.raises(GeometryError, match="an outlier of 16000 steps; those of tiles of 2048 columns end at 4095"):
        retile(blob, 2048)


def test_tiles_that_outliers_make_shorter_divide_the_parts_too(tmp_path: Path) -> None:
    values = np.random.default_rng(6).normal(0, 0.02, (64, 2112)).astype(np.float32)
    values[5, 7] = 300 * 0.02  # more steps than an outlier of a tile of 1056 columns can have
    save_file({"l.down_proj.weight": values}, tmp_path / "m.safetensors")
    options = {"preset": "near-lossless", "layout": "compact", "tensor_parallel": 2}
    kvpack.compress(tmp_path / "m.safetensors", tmp_path / "out", **options)
    with kvpack.open(tmp_path / "out") as reader:
        tensor = reader.coded("l.down_proj.weight")
        assert tensor.header.tile_cols == 352
        np.testing.assert_array_equal(
            numbers(tensor.part("inputs", 1, 2)), reader.dequantize("l.down_proj.weight")[:, 1056:]
        )


def test_the_command_and_inspect_say_it(folder: Path) -> None:
    source, target = str(folder / "m.safetensors"), str(folder / "out")
    done = CliRunner().invoke(app, ["compress", source, "-o", target, "--tensor-parallel", "2"])
    assert done.exit_code == 0, done.output
    assert "l.v_proj.weight cannot be split so" in done.output.replace("\n", " ")
    shown = CliRunner().invoke(app, ["inspect", target]).output.replace("\n", " ")
    assert "tensor parallel: all coded tensors but l.o_proj.weight, l.v_proj.weight can be cut into 2 parts" in shown
    tensors = json.loads(CliRunner().invoke(app, ["inspect", target, "--json"]).output)["tensors"]
    assert {t["tensor_parallel"] for t in tensors} == {1, 2}
    refused = CliRunner().invoke(app, ["compress", source, "--tensor-parallel", "0"])
    assert refused.exit_code != 0
    for parts in (0, -1, True, 1.5):
        with pytest.raises(InputError, match="a number of devices"):
            kvpack.QuantConfig(tensor_parallel=parts)  # type: ignore[arg-type]


def numbers(tensor: CodedTensor) -> Any:
    """What it stands for, f32 of its shape."""
    integers = decode_integers(Blob(tensor.blob)).astype(np.float32)
    scales = np.ones(1, np.float32) if tensor.scales is None else tensor.scales
    values = integers * np.broadcast_to(scales, integers.shape[0] * integers.shape[1]).reshape(*integers.shape[:2], 1)
    if tensor.row_offsets is not None:
        values += tensor.row_offsets.reshape(*integers.shape[:2], 1)
    if tensor.column_scales is not None:
        values *= tensor.column_scales.astype(np.float32).reshape(integers.shape[0], 1, -1)
    return values.reshape(tensor.shape)


def coded(values: Any, folder: Path, **options: Any) -> CodedTensor:
    save_file({"w": values}, folder / "w.safetensors")
    kvpack.compress(folder / "w.safetensors", folder / "w", include="w", force=True, **options)
    with kvpack.open(folder / "w") as reader:
        return reader.coded("w")


def test_scales_of_rows_go_with_their_rows(tmp_path: Path) -> None:
    values = np.random.default_rng(2).normal(0, np.arange(1, 97)[:, None], (3, 96, 64)).astype(np.float32)
    experts = coded(values, tmp_path, preset="int8-row")
    assert len(experts.scales) == 3 * 96
    whole = numbers(experts)
    np.testing.assert_array_equal(numbers(experts.outputs(32, 96)), whole[:, 32:])
    np.testing.assert_array_equal(numbers(experts.matrices(1, 3)), whole[1:])
    np.testing.assert_array_equal(numbers(experts.matrices(0, 3, 2)), whole[::2])
    np.testing.assert_array_equal(numbers(experts.part("outputs", 0, 3)), whole[:, :32])
    again = CodedTensor.stack([experts.outputs(64, 96), experts.outputs(0, 64)])
    np.testing.assert_array_equal(numbers(again), np.concatenate((whole[:, 64:], whole[:, :64]), axis=1))


def test_a_stack_has_a_scale_for_each_row(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    parts = [coded(rng.normal(0, s, (r, 96)).astype(np.float32), tmp_path, bits=5) for s, r in ((1, 64), (0.1, 96))]
    stacked = CodedTensor.stack(parts)
    assert stacked.shape == (160, 96)
    assert len(stacked.scales) == 160
    np.testing.assert_array_equal(numbers(stacked), np.concatenate([numbers(part) for part in parts]))
    assert len(CodedTensor.stack([parts[0], parts[0]]).scales) == 1
    exact = coded(rng.normal(0, 1, (64, 96)).astype(np.float32), tmp_path, preset="lossless")
    with pytest.raises(GeometryError, match="layout is"):
        CodedTensor.stack([parts[0], exact])
    halves = [exact.part("outputs", rank, 2) for rank in (0, 1)]
    again, before = (decode_integers(Blob(tensor.blob)) for tensor in (CodedTensor.stack(halves), exact))
    np.testing.assert_array_equal(again, before)
    flat = coded(rng.normal(0, 1, (64, 4, 24)).astype(np.float32), tmp_path, preset="lossless")  # a convolution's
    assert (flat.shape, flat.header.matrices, flat.outputs(32, 64).shape) == ((64, 4, 24), 1, (32, 96))


def test_vectors_go_with_their_rows_and_columns(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    column_scales = rng.uniform(0.5, 2, 2 * 128).astype(np.float16)
    offsets = rng.normal(0, 1, 2 * 96).astype(np.float32)
    values = rng.normal(0, 1, (2, 96, 128)).astype(np.float32) * column_scales.reshape(2, 1, 128)
    save_file({"w.down_proj": values}, tmp_path / "m.safetensors")
    vectors = {"column_scales": {"w.down_proj": column_scales}, "row_offsets": {"w.down_proj": offsets}}
    config = kvpack.QuantConfig(preset="int8-row", tile_cols=64)
    compress(tmp_path / "m.safetensors", tmp_path / "out", config, **vectors)
    with kvpack.open(tmp_path / "out") as reader:
        tensor, whole = reader.coded("w.down_proj"), reader.dequantize("w.down_proj")
    np.testing.assert_array_equal(numbers(tensor), whole)
    np.testing.assert_array_equal(numbers(tensor.part("inputs", 1, 2)), whole[:, :, 64:])
    np.testing.assert_array_equal(numbers(tensor.part("outputs", 2, 3)), whole[:, 64:])
    np.testing.assert_array_equal(numbers(tensor.matrices(1, 2)), whole[1:])
    again = CodedTensor.stack([tensor.outputs(0, 32), tensor.outputs(32, 96)])
    np.testing.assert_array_equal(numbers(again), whole)
    without = dataclasses.replace(tensor, row_offsets=None)
    added = numbers(CodedTensor.stack([without, tensor]))
    np.testing.assert_array_equal(added[:, 96:], whole)
    np.testing.assert_array_equal(added[:, :96], numbers(without))
    with pytest.raises(GeometryError, match="tensor 1 cannot be stacked: its column scales are not those of tensor 0"):
        CodedTensor.stack([tensor, dataclasses.replace(tensor, column_scales=None)])


def test_weights_stored_as_inputs_times_outputs(tmp_path: Path) -> None:
    """GPT-2's: the blob holds the transpose, and parts have the original's orientation."""
    rng = np.random.default_rng(4)
    tensors = {"h.0.attn.c_attn.weight": rng.normal(0, 1, (64, 192)), "h.0.attn.c_attn.bias": rng.normal(0, 1, 192)}
    save_file({name: values.astype(np.float32) for name, values in tensors.items()}, tmp_path / "m.safetensors")
    kvpack.compress(tmp_path / "m.safetensors", tmp_path / "out", bits=5)
    with kvpack.open(tmp_path / "out") as reader:
        tensor, whole = reader.coded("h.0.attn.c_attn.weight"), reader.dequantize("h.0.attn.c_attn.weight")
    part = tensor.part("outputs", 1, 3)
    assert part.header.transposed
    assert part.shape == (64, 64)
    np.testing.assert_array_equal(numbers_of_transposed(part), whole[:, 64:128])


def numbers_of_transposed(tensor: CodedTensor) -> Any:
    assert tensor.scales is not None
    return (decode_integers(Blob(tensor.blob)).astype(np.float32) * tensor.scales[0])[0].T
