"""What tensors are: by their names, by a module tree, and by the siblings that mark another quantization."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tensor_kinds import judge, read_survey
from typer.testing import CliRunner

import kvpack
from kvpack.cli import app
from kvpack.encode.compress import compress
from kvpack.encode.other_quantization import quantization_parts
from kvpack.encode.selection import TensorKinds
from kvpack.encode.tensor_kinds import Kind, NoModuleTreeError, kind_of_name, words
from kvpack.errors import InputError
from kvpack.format.container import StoredTensor
from kvpack.integrations import module_tree

RNG = np.random.default_rng(7)
Array = np.ndarray[Any, np.dtype[Any]]


def matrix(*shape: int) -> Array:
    return RNG.normal(0, 0.02, shape).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("model.layers.0.mlp.shared_expert.gate_proj.weight", (512, 512), Kind.LINEAR),
        ("model.layers.0.mlp.shared_experts.gate_up_proj", (2, 512, 512), Kind.LINEAR),
        ("model.layers.0.shared_mlp.input_linear.weight", (512, 512), Kind.LINEAR),
        ("model.layers.0.shared_transformer.o_proj.weight", (512, 512), Kind.LINEAR),
        ("model.shared.weight", (32128, 512), Kind.EMBEDDING),
        ("roberta_prelayernorm.encoder.layer.0.attention.self.query.weight", (512, 512), Kind.LINEAR),
        ("transformer_blocks.0.norm1.linear.weight", (512, 512), Kind.LINEAR),
        ("blocks.0.normalizer_proj.weight", (512, 512), Kind.LINEAR),
        ("model.layers.0.self_attn.q_norm.weight", (32, 128), Kind.NORM),
        ("encoder.layer.0.LayerNorm.weight", (32, 128), Kind.NORM),
        ("transformer.h.0.ln_1.weight", (32, 128), Kind.NORM),
        ("model.embed_tokens_extend.image_embed.img_processor.encoder.layers.0.self_attn.k_proj.weight", (512, 512),
         Kind.LINEAR),
        ("model.embedding_projection.weight", (512, 512), Kind.LINEAR),
        ("gpt_neox.embed_in.weight", (50432, 512), Kind.EMBEDDING),
        ("embed_out.weight", (1000, 512), Kind.OUTPUT),
        ("lm_head.weight", (1000, 512), Kind.OUTPUT),
        ("lm_head.dense.weight", (512, 512), Kind.LINEAR),
        ("lm_head.decoder.weight", (1000, 512), Kind.OUTPUT),
        ("cls.predictions.decoder.weight", (1000, 512), Kind.OUTPUT),
        ("cls.predictions.transform.dense.weight", (512, 512), Kind.LINEAR),
        ("output.weight", (1000, 512), Kind.OUTPUT),
        ("model.output.weight", (512, 512), Kind.OUTPUT),
        ("encoder.layer.0.attention.output.weight", (512, 512), Kind.LINEAR),
        ("encoder.layer.0.attention.output.dense.weight", (512, 512), Kind.LINEAR),
        ("to_logits.weight", (1000, 512), Kind.OUTPUT),
        ("token_emb.weight", (1000, 512), Kind.EMBEDDING),
        ("lm_heads.3.weight", (1000, 512), Kind.OUTPUT),
        ("model.layers.0.attn.proj_out.weight", (512, 512), Kind.LINEAR),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", (32, 5760), Kind.BIAS),
        ("model.layers.0.mlp.experts.down_proj", (32, 2880, 2880), Kind.LINEAR),
        ("model.layers.0.mlp.gate.weight", (64, 2048), Kind.ROUTER),
        ("model.layers.0.mlp.gate.weight", (2560, 64), Kind.ROUTER),
        ("model.layers.0.mlp.gate.weight", (5632, 2048), Kind.LINEAR),
        ("model.layers.0.mlp.experts.3.gate.weight", (768, 2048), Kind.LINEAR),
        ("model.layers.0.mlp.gate_proj.weight", (64, 2048), Kind.LINEAR),
        ("model.layers.0.block_sparse_moe.router.layer.weight", (8, 2048), Kind.ROUTER),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 4096), Kind.ROUTER),
        ("model.layers.0.mamba.A_log", (1536, 16), Kind.PARAMETER),
        ("model.layers.0.mamba.x_proj.weight", (264, 512), Kind.LINEAR),
        ("transformer.output_layer.weight", (1000, 512), Kind.OUTPUT),
        ("emb.weight", (1000, 512), Kind.EMBEDDING),
        ("pred_layer.proj.weight", (1000, 512), Kind.OUTPUT),
        ("classifier.weight", (1000, 768), Kind.OUTPUT),
        ("head.fc.weight", (1000, 768), Kind.OUTPUT),
        ("transformer.w.weight", (246534, 1280), Kind.OUTPUT),
        ("blocks.0.att.time_maa_w1", (160, 512), Kind.PARAMETER),
        ("embeddings.cls_token", (1, 1, 768), Kind.PARAMETER),
        ("embeddings.patch_embeddings.projection.weight", (768, 3, 16, 16), Kind.CONVOLUTION),
        ("weight", (512, 512), Kind.LINEAR),
        ("lm_head.linear.weight", (51200, 2048), Kind.OUTPUT),
        ("layers.24.linear.weight", (51200, 2048), Kind.OUTPUT),
        ("layers.3.linear.weight", (8192, 2048), Kind.LINEAR),
        ("medusa_head.0.1.weight", (32000, 4096), Kind.OUTPUT),
        ("medusa_head.0.0.linear.weight", (4096, 4096), Kind.LINEAR),
        ("model.lm_head.out_proj.weight", (51200, 2048), Kind.OUTPUT),
        ("linear_out.weight", (32000, 1024), Kind.OUTPUT),
        ("unembed.W_U", (768, 50257), Kind.OUTPUT),
        ("embed.W_E", (50257, 768), Kind.EMBEDDING),
        ("blocks.0.attn.b_Q", (64, 128), Kind.BIAS),
        ("blocks.0.attn.W_Q", (12, 768, 64), Kind.LINEAR),
        ("model.layers.0.mlp.experts.b1", (8, 4096), Kind.BIAS),
        ("rwkv.blocks.0.attention.time_first", (64, 64), Kind.PARAMETER),
        ("model.layers.0.mlp.expert_gate.weight", (8, 4096), Kind.ROUTER),
        ("model.layers.0.moe.gate_network.weight", (8, 4096), Kind.ROUTER),
        ("model.layers.0.moe.switch.weight", (8, 4096), Kind.ROUTER),
    ],
)  # fmt: skip
def test_names(name: str, shape: tuple[int, ...], kind: Kind) -> None:
    found = kind_of_name(name, shape).kind
    assert found == kind or (found.is_coded and kind.is_coded)


def test_words() -> None:
    assert words("input_layerNorm2") == ["input", "layer", "norm", "2"]
    assert words("SCB") == ["scb"]


def test_the_table_against_all_architectures() -> None:
    """By names alone, nothing that is to be kept is coded, and what the table is sure of is so."""
    _, surveyed = read_survey()
    causal = {name: one.tensors for name, one in surveyed.items() if one.group == "causal language models"}
    assert len(surveyed) > 550
    assert len(causal) > 165
    coded, wrong, sure = set(), set(), 0
    for name, one in surveyed.items():
        counts = judge(one.tensors)
        sure += counts["sure"]
        if counts["coded, though to be kept"]:
            coded.add(name)
        if counts["sure, and wrong"]:
            wrong.add(name)
    assert wrong == set()
    assert coded == set()
    assert sure > 0.85 * sum(len(one.tensors) for one in surveyed.values())
    kept = {name for name, tensors in causal.items() if judge(tensors)["right"] < len(tensors)}
    assert kept == {"fuyu", "prophetnet"}  # an embedding by its name, a linear layer by its module
    assert not any(one.lacking for one in surveyed.values())


def stored(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, StoredTensor]:
    return {name: StoredTensor(name, dtype, shape, 0, math.prod(shape)) for name, (dtype, shape) in tensors.items()}


@pytest.mark.parametrize(
    ("method", "tensors", "others"),
    [
        ("gptq", {"qweight": "I32", "qzeros": "I32", "scales": "F16", "g_idx": "I32"}, {}),
        ("compressed-tensors", {"weight_packed": "I32", "weight_scale": "BF16", "weight_zero_point": "I32",
                                "weight_g_idx": "I32"}, {}),
        ("mlx", {"weight": "U32", "scales": "BF16", "biases": "BF16"}, {"bias": "BF16"}),
        ("fp8", {"weight_scale_inv": "F32"}, {"weight": "F8_E4M3", "bias": "BF16"}),
        ("fp8", {"weight_scale": "F32", "input_scale": "F32"}, {"weight": "F8_E4M3"}),
        ("fp8", {"gate_up_proj_scale_inv": "F32"}, {"gate_up_proj": "F8_E4M3", "gate_up_proj_bias": "F32"}),
        ("nvfp4", {"weight_scale": "F8_E4M3", "weight_scale_2": "F32", "input_scale": "F32"}, {"weight": "U8"}),
        ("mxfp4", {"down_proj_scales": "U8"}, {"down_proj_blocks": "U8", "down_proj_bias": "BF16"}),
        ("bitsandbytes", {"weight.absmax": "F32", "weight.quant_map": "F32", "weight.nested_absmax": "F32",
                          "weight.quant_state.bitsandbytes__nf4": "U8"}, {"weight": "U8"}),
        ("bitsandbytes", {"SCB": "F32"}, {"weight": "I8", "bias": "F16"}),
        ("hqq", {"scale": "F16", "zero": "F16"}, {"W_q": "U8"}),
        ("int8", {"weight._scale": "BF16"}, {"weight._data": "I8"}),
        ("gptq", {"qweight": "I32", "wscales": "BF16", "smooth_factor": "BF16", "proj_down": "BF16"}, {}),
        ("unnamed", {"Qidxs": "I64", "SU": "F16", "SV": "F16"}, {"bias": "F16"}),
        ("aqlm", {"codes": "I16", "codebooks": "F16", "scales": "F16"}, {}),
    ],
)  # fmt: skip
def test_parts_of_other_quantizations(method: str, tensors: dict[str, str], others: dict[str, str]) -> None:
    names = {f"model.layers.0.q_proj.{leaf}": (dtype, (128, 64)) for leaf, dtype in {**tensors, **others}.items()}
    plain = {"model.embed_tokens.weight": ("BF16", (128, 64)), "model.layers.0.k_proj.weight": ("BF16", (128, 64)),
             "model.layers.0.norm.scale": ("BF16", (64,)), "a.logit_scale": ("F32", ()),
             "a.codebook.embed": ("F32", (128, 64)), "a.position_ids": ("I64", (1, 64))}  # fmt: skip
    found = quantization_parts(stored({**names, **plain}), {})
    assert set(found) == {f"model.layers.0.q_proj.{leaf}" for leaf in tensors}
    assert set(found.values()) == {method}
    declared = {"quantization_config": {"quant_method": "modelopt"}}
    assert set(quantization_parts(stored({**names, **plain}), declared).values()) == {"modelopt"}


def test_awq_packs_columns() -> None:
    tensors = stored({"q.qweight": ("I32", (64, 16)), "q.qzeros": ("I32", (1, 16)), "q.scales": ("F16", (1, 128))})
    assert set(quantization_parts(tensors, {}).values()) == {"awq"}


def test_scales_are_never_rounded(tmp_path: Path) -> None:
    tensors: dict[str, Array] = {
        "a.down_proj.weight": RNG.integers(0, 200, (256, 256), np.uint8).view(ml_dtypes.float8_e4m3fn),
        "a.down_proj.weight_scale_inv": matrix(256, 64),
        "b.q_proj.qweight": RNG.integers(0, 2**31, (32, 256), np.int32),
        "b.q_proj.scales": matrix(64, 256).astype(np.float16),
        "c.up_proj.weight": matrix(256, 256),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    for options in ({}, {"include": "proj"}, {"tensor_bits": {"proj": 3.0}}, {"preset": "near-lossless"},
                    {"preset": "lossless"}, {"allocation": "model"}):  # fmt: skip
        report = kvpack.compress(tmp_path / "m.safetensors", tmp_path / "out.safetensors", force=True, **options)
        methods = {t.name: t.method for t in report.tensors}
        assert methods["c.up_proj.weight"] not in ("keep", "lossless") or options == {"preset": "lossless"}
        assert methods["a.down_proj.weight"] in ("lossless", "keep")
        with kvpack.open(tmp_path / "out.safetensors") as reader:
            for name in list(tensors)[:-1]:
                assert np.asarray(reader.dequantize(name, "original")).tobytes() == tensors[name].tobytes()
        if not options:
            reasons = {t.name: t.reason for t in report.tensors if t.reason}
            assert reasons["a.down_proj.weight_scale_inv"] == "another quantization: fp8"
            assert reasons["b.q_proj.scales"] == reasons["b.q_proj.qweight"] == "another quantization: gptq"
            assert report.notes == ["kept: 1 tensor of a fp8 quantization", "kept: 2 tensors of a gptq quantization"]
    printed = CliRunner().invoke(app, ["compress", str(tmp_path / "m.safetensors"), "--dry-run"]).stdout.splitlines()
    assert "kept: 2 tensors of a gptq quantization" in printed


CONFIG = {"model_type": "ctrl", "vocab_size": 96, "n_embd": 64, "dff": 128, "n_layer": 1, "n_head": 2, "n_positions": 8}


def ctrl(folder: Path, **config: Any) -> Path:
    """A model whose embedding is called ``w``."""
    folder.mkdir()
    tensors = {"transformer.w.weight": matrix(96, 64), "transformer.h.0.multi_head_attention.Wq.weight": matrix(64, 64)}
    save_file({**tensors, "an_extra.weight": matrix(64, 64)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def test_the_module_tree_decides_where_a_name_leaves_doubt(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the module tree is that of transformers, which is not installed")
    report = kvpack.compress(ctrl(tmp_path / "ctrl"), bits=6)
    assert {t.name: t.reason for t in report.tensors} == {
        "transformer.w.weight": "embedding",
        "transformer.h.0.multi_head_attention.Wq.weight": None,
        "an_extra.weight": None,
    }
    assert report.notes[0].endswith(f"judged by the modules of {report.notes[0].rpartition('modules of ')[2]}")
    assert "CTRLLMHeadModel of transformers" in report.notes[0]
    assert report.notes[1] == "it has no an_extra.weight: judged by names alone"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "no_such"}, "has no model_type 'no_such'"),
        ({"n_head": 0}, "ZeroDivisionError"),
        ({"n_embd": "wide"}, "Error"),
    ],
)
def test_a_tree_that_cannot_be_built_is_said(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    pytest.importorskip("transformers", reason="the module tree is that of transformers, which is not installed")
    report = kvpack.compress(ctrl(tmp_path / "ctrl", **config), bits=6)
    assert {t.method for t in report.tensors} == {"uniform"}
    (note,) = report.notes
    assert "judged by names alone: the model is not built" in note
    assert said in note


def test_without_transformers_names_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_tree.importlib.util, "find_spec", lambda name: None)
    (note,) = kvpack.compress(ctrl(tmp_path / "ctrl"), bits=6).notes
    assert note.startswith(
        "what an_extra.weight, transformer.h.0.multi_head_attention.Wq.weight, transformer.w.weight are"
    )
    assert note.endswith("judged by names alone: transformers is not installed")
    printed = CliRunner().invoke(app, ["compress", str(tmp_path / "ctrl"), "--dry-run"]).stdout.splitlines()
    assert note in printed


def test_a_slow_tree_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="the module tree is that of transformers, which is not installed")
    monkeypatch.setattr(module_tree, "TIMEOUT_S", 0.01)
    with pytest.raises(NoModuleTreeError, match="takes more than"):
        module_tree.kinds_by_module_tree(CONFIG, ["transformer.w.weight"])


def test_sure_names_ask_no_tree(tmp_path: Path) -> None:
    """It takes seconds: it is asked if it can say something new."""
    asked = []

    def tree(config: Mapping[str, Any], names: Sequence[str]) -> tuple[str, dict[str, str]]:
        asked.append(sorted(names))
        return "a test", {"model.odd.weight": "router", "model.layers.0.mlp.c_fc.weight": "transposed linear"}

    tensors = {"model.embed_tokens.weight": matrix(96, 64), "model.layers.0.mlp.up_proj.weight": matrix(64, 64)}
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file(tensors, tmp_path / "model.safetensors")
    assert compress(tmp_path, tmp_path.with_name("out"), module_tree=tree).notes == []
    assert asked == []
    tensors |= {"model.odd.weight": matrix(64, 64), "model.layers.0.mlp.c_fc.weight": matrix(64, 128)}
    save_file(tensors, tmp_path / "model.safetensors")
    report = compress(tmp_path, tmp_path.with_name("out"), force=True, module_tree=tree)
    assert asked == [sorted(tensors)]
    assert {t.name: t.reason for t in report.tensors if t.reason} == {
        "model.embed_tokens.weight": "embedding", "model.odd.weight": "router"
    }  # fmt: skip
    with kvpack.open(tmp_path.with_name("out")) as reader:
        info = reader.info("model.layers.0.mlp.c_fc.weight")
        assert info is not None
        assert (info.header.transposed, info.header.rows) == (True, 128)


def test_renamed_checkpoints_are_found_in_the_tree() -> None:
    """Mixtral's experts, one by one on disk, are fused in the tree; base-model prefixes come and go."""
    pytest.importorskip("transformers", minversion="5", reason="renamings came with transformers 5")
    config = {"model_type": "mixtral", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
              "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": 96}  # fmt: skip
    names = ["model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.block_sparse_moe.experts.3.w1.weight",
             "layers.0.self_attn.q_proj.weight", "lm_head.weight", "model.embed_tokens.weight", "nowhere"]  # fmt: skip
    source, kinds = module_tree.kinds_by_module_tree({**config, "quantization_config": {"quant_method": "x"}}, names)
    assert source.startswith("MixtralForCausalLM of transformers ")
    assert kinds == dict(zip(names[:-1], ["router", "linear", "linear", "output layer", "embedding"], strict=True))


def test_kinds_of_a_lossless_compression_ask_nobody(tmp_path: Path) -> None:
    report = kvpack.compress(ctrl(tmp_path / "ctrl"), preset="lossless")
    assert report.notes == []
    assert {t.method for t in report.tensors} == {"lossless"}


def test_include_and_exclude_may_be_several(tmp_path: Path) -> None:
    names = ["lm_head.weight", "wte.weight", "a.q_proj.weight", "b.q_proj.weight", "c.q_proj.weight"]
    save_file({name: matrix(64, 128) for name in names}, tmp_path / "m.safetensors")
    arguments = ["compress", str(tmp_path / "m.safetensors"), "--json", "--include", "lm_head", "--include", "wte",
                 "--exclude", "^a", "--exclude", "^b"]  # fmt: skip
    report = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert {t["name"] for t in report["tensors"] if t["method"] == "keep"} == {"a.q_proj.weight", "b.q_proj.weight"}
    with pytest.raises(InputError, match="exclude 'nothing' matches no tensor's name"):
        kvpack.compress(tmp_path / "m.safetensors", dry_run=True, exclude=["^a", "nothing"])


def test_kinds_without_configuration() -> None:
    tensors = stored({"h.0.attn.c_attn.weight": ("F32", (64, 192)), "h.0.attn.c_attn.bias": ("F32", (192,))})
    assert TensorKinds.of(tensors, {}, None) == TensorKinds({}, {}, frozenset({"h.0.attn.c_attn.weight"}), ())
