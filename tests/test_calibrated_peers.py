"""The peers that benchmarks/calibrated_peers.py makes itself: what they store, and what data is worth to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import calibrated_peers as peers

from kvpack.encode.moments import Moments, MomentsWriter

Array = npt.NDArray[Any]
K = 192
NAMES = [f"model.layers.0.{kind}_proj.weight" for kind in ("self_attn.q", "self_attn.k", "mlp.up")]


def moments(path: Path) -> tuple[Path, Array]:
    """Of inputs a few channels of which are large, shared by three linears."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2000, 16)) @ rng.standard_normal((16, K)) + rng.standard_normal((2000, K))
    x *= np.where(np.arange(K) % 31 == 0, 12.0, 1.0)
    h = (x.T @ x / len(x)).astype(np.float32)
    h = (h + h.T) / 2
    with MomentsWriter(path) as writer:
        writer.add_second_moment("x", (K, K), iter([h]), np.array([2000]))
        writer.finish(dict.fromkeys(NAMES, "x"), np.array([2000]), {})
    return path, h


def test_what_sees_data_has_less_error_at_the_outputs(tmp_path: Path) -> None:
    path, h = moments(tmp_path / "m.safetensors")
    rng = np.random.default_rng(1)
    weights = {
        name: rng.standard_normal((rows, K)).astype(np.float32) for name, rows in zip(NAMES, (40, 24, 33), strict=True)
    }
    plain = {name: peers.from_groups(peers.rounded(peers.in_groups(w, 64), 4), K) for name, w in weights.items()}

    def error(done: dict[str, Array]) -> float:
        return sum(float((((done[n] - w) @ h) * (done[n] - w)).sum()) for n, w in weights.items())

    with Moments(path) as found:
        scaled, bits = peers.awq(weights, found, 4, 64)
        fed_back, _ = peers.own_gptq(weights, found, 4, 64)
    assert bits == sum(4 * w.size + 32 * len(w) * 3 for w in weights.values())
    assert error(scaled) < 0.8 * error(plain)
    assert error(fed_back) < 0.6 * error(plain)


def test_cut_groups_are_no_worse(tmp_path: Path) -> None:
    """Also where columns are no multiple of a group, and where one weight is far from the others."""
    _, h = moments(tmp_path / "m.safetensors")
    w = np.random.default_rng(2).standard_normal((9, 150)).astype(np.float32)
    w[3, 70] = 9.0
    cut = peers.cut(w, h[:150, :150], 3, 64)
    plain = peers.from_groups(peers.rounded(peers.in_groups(w, 64), 3), 150)

    def of_groups(done: Array) -> float:
        e = done - w
        blocks = [slice(at, min(at + 64, 150)) for at in range(0, 150, 64)]
        return sum(float(((e[:, block] @ h[block, block]) * e[:, block]).sum()) for block in blocks)

    assert cut.shape == w.shape
    assert of_groups(cut) < of_groups(plain)


@pytest.mark.parametrize(
    ("mix", "kind", "layer", "heads_a_value", "cols", "chosen"),
    [
        ("Q4_K_M", "v", 0, 4, 512, "Q6_K"),
        ("Q4_K_M", "down", 1, 4, 512, "Q4_K"),
        ("Q4_K_M", "down", 3, 4, 512, "Q6_K"),  # the third behind the first eighth
        ("Q4_K_M", "down", 7, 4, 1408, "Q8_0"),
        ("Q4_K_S", "v", 3, 3, 512, "Q5_K"),
        ("Q4_K_S", "down", 0, 3, 512, "Q5_K"),
        ("Q4_K_S", "q", 0, 3, 576, "Q5_0"),
        ("IQ4_XS", "v", 5, 4, 512, "Q5_K"),
        ("IQ4_XS", "v", 5, 3, 576, "IQ4_NL"),
        ("Q3_K_M", "down", 0, 4, 512, "Q4_K"),
        ("Q3_K_M", "gate", 0, 4, 576, "Q4_0"),
        ("IQ3_S", "v", 2, 4, 512, "Q4_K"),
        ("Q2_K", "o", 2, 4, 512, "Q3_K"),
        ("Q2_K", "v", 2, 3, 512, "Q3_K"),
    ],
)
def test_types_of_a_mix(mix: str, kind: str, layer: int, heads_a_value: int, cols: int, chosen: str) -> None:
    assert peers.gguf_type(mix, kind, layer, 8, heads_a_value, cols) == chosen
