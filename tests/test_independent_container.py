"""Whole files, read by the decoder that was written from FORMAT.md alone, equal what kvpack reads."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from independent_decoder import read_container
from safetensors.numpy import save_file

import kvpack
from kvpack.errors import TensorCrcError
from kvpack.format.container import Container


def model() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)

    def weights(*shape: int) -> np.ndarray:
        return (rng.standard_t(5, shape) * 0.02).astype(np.float32)

    return {
        "h.0.attn.c_attn.weight": weights(96, 288),  # GPT-2's: inputs × outputs, as the bias's length tells
        "h.0.attn.c_attn.bias": weights(288),
        "experts.weight": weights(3, 130, 96),
        "conv.weight": weights(64, 16, 3, 3),
        "half.weight": weights(300, 100).astype(np.float16),
        "brain.weight": weights(257, 545).astype(ml_dtypes.bfloat16),
        "eight.weight": rng.integers(-60, 60, (128, 64)).astype(np.int8),
        "norm.weight": np.ones(64, np.float32),
    }


@pytest.mark.parametrize(
    "options",
    [{"bits": 4.25}, {"bits": 2.5, "layout": "fast"}, {"preset": "near-lossless"}, {"preset": "lossless"}],
    ids=str,
)
def test_both_decoders_read_the_same(options: dict, tmp_path: Path) -> None:
    save_file(model(), tmp_path / "m.safetensors")
    report = kvpack.compress(tmp_path / "m.safetensors", config=kvpack.QuantConfig(**options))
    coded = {tensor.name: tensor.method for tensor in report.tensors if tensor.method != "keep"}
    expected = {"brain.weight", "conv.weight", "eight.weight", "h.0.attn.c_attn.weight"}
    if options != {"preset": "lossless"}:  # at these sizes the padding of the others outweighs what is saved
        expected |= {"experts.weight", "half.weight"}
    assert set(coded) == expected
    found = read_container(str(report.output))
    assert found.keys() == model().keys()
    with kvpack.open(str(report.output)) as reader:
        assert reader.info("h.0.attn.c_attn.weight").header.transposed  # type: ignore[union-attr]
        for name, original in model().items():
            lossless = coded.get(name, "keep") in ("lossless", "keep")
            ours = original if lossless else reader.dequantize(name, "float32")
            assert found[name].shape == original.shape
            assert found[name].tobytes() == ours.tobytes(), name
            if not lossless:
                assert np.array_equal(reader.dequantize(name), found[name])


@pytest.mark.parametrize("name", ["norm.weight", "h.0.attn.c_attn.bias", "brain.weight_kvpack_scale"])
def test_both_find_damage_in_what_is_not_coded(name: str, tmp_path: Path) -> None:
    save_file(model(), tmp_path / "m.safetensors")
    path = Path(str(kvpack.compress(tmp_path / "m.safetensors", config=kvpack.QuantConfig(bits=4.25)).output))
    content = bytearray(path.read_bytes())
    with Container(path) as container:
        content[len(content) + container.tensors[name].end - max(t.end for t in container.tensors.values()) - 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(TensorCrcError, match=name):
        kvpack.verify(path)
    with pytest.raises(ValueError, match="kvpack_crc32"):
        read_container(path)
