"""GGUF files, written with the gguf package: the directory that kvpack makes of one gives the model's own numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

from gguf.quants import dequantize, quantize  # noqa: E402

import kvpack  # noqa: E402
from kvpack.errors import InputError, NotAContainerError  # noqa: E402

Kind = gguf.GGMLQuantizationType
WIDTH, LAYERS, INNER, VOCABULARY, HEADS, KV_HEADS = 64, 2, 128, 259, 4, 2


def write(
    path: Path,
    kind: Any,
    *,
    architecture: str = "llama",
    without: str = "",
    extra: tuple[str, ...] = (),
    parts: int = 1,
    tokenizer: str = "llama",
) -> dict[str, np.ndarray]:
    """A llama of two layers; returns each tensor's numbers, as they are stored."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model(tokenizer)
    writer.add_token_list([b"<unk>", b"<s>", b"</s>"] + [f"<0x{i:02X}>".encode() for i in range(256)])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3] + [6] * 256)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCABULARY, WIDTH),
        "output_norm.weight": (WIDTH,),
        "output.weight": (VOCABULARY, WIDTH),
    }
    narrow = WIDTH * KV_HEADS // HEADS
    for layer in range(LAYERS):
        block = {
            "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_k": (narrow, WIDTH),
            "attn_v": (narrow, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH),
            "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER),
        }  # fmt: skip
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    shapes |= dict.fromkeys(extra, (8,))
    shapes.pop(without, None)
    stored = {}
    for name, shape in shapes.items():
        values = random.normal(len(shape) == 1, 0.02, shape).astype(np.float32)
        own = Kind.F32 if len(shape) == 1 else kind
        data = quantize(values, own)
        writer.add_tensor(name, data, raw_dtype=own)
        stored[name] = dequantize(data, own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (Kind.F32, "float32"),
        (Kind.F16, "float16"),
        (Kind.BF16, "bfloat16"),
        (Kind.Q8_0, "float16"),
        (Kind.Q4_0, "float16"),
        (Kind.Q5_1, "float16"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_directory_of_transformers(tmp_path: Path, kind: Any, dtype: str) -> None:
    stored = write(tmp_path / "tiny.gguf", kind)
    report = kvpack.compress(tmp_path / "tiny.gguf", preset="lossless")
    output = tmp_path / "tiny-kvpack"
    assert (report.input, report.output) == (str(tmp_path / "tiny.gguf"), str(output))
    assert report.input_bytes == (tmp_path / "tiny.gguf").stat().st_size
    config = json.loads((output / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], dtype)
    assert any(kind.name in note for note in report.notes) == kind.name.startswith("Q")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny-kvpack", "tiny.gguf"]

    kvpack.decompress(output, tmp_path / "plain")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain").float()
    weights = model.state_dict()
    for name, own in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output.weight", "lm_head.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight"),
        ("blk.0.attn_v.weight", "model.layers.0.self_attn.v_proj.weight"),
    ):
        expected = torch.from_numpy(stored[name].copy()).to(getattr(torch, dtype)).float()
        assert torch.equal(weights[own], expected), name
    # llama.cpp keeps rows of q and k in another order: halves of a head interleaved.
    query = stored["blk.0.attn_q.weight"].reshape(HEADS, WIDTH // HEADS // 2, 2, WIDTH).swapaxes(1, 2)
    expected = torch.from_numpy(query.reshape(WIDTH, WIDTH).copy()).to(getattr(torch, dtype)).float()
    assert torch.equal(weights["model.layers.0.self_attn.q_proj.weight"], expected)

    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    assert tokenizer("ab").input_ids[-2:] == [3 + ord("a"), 3 + ord("b")]
    with torch.device("meta"):
        coded = transformers.AutoModelForCausalLM.from_config(model.config)
    assert len(kvpack.replace_linears(coded, output, device="cpu").replaced) > 7
    tokens = torch.arange(3, 19)[None]
    with torch.no_grad():
        torch.testing.assert_close(coded(tokens).logits.float(), model(tokens).logits, atol=0.02, rtol=0.02)


def test_the_command(tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf", Kind.F16, extra=("rope_freqs.weight",))
    command = [sys.executable, "-m", "kvpack", "compress", str(tmp_path / "tiny.gguf"), "-o", str(tmp_path / "out")]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "transformers has no place for rope_freqs.weight: left out, and with it the scaling of pos" in process.stdout
    assert f"wrote {tmp_path / 'out'}\n" in process.stdout
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (again.returncode, "exists already" in again.stderr) == (2, True)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"architecture": "nonesuch"}, "architecture 'nonesuch'"),
        (
            {"without": "blk.1.ffn_up.weight"},
            r"finds no values for 1 tensors of the model \(model.layers.1.mlp.up_proj",
        ),
        ({"parts": 3}, "one of 3 parts"),
    ],
)
def test_what_transformers_cannot_make_a_model_of(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    write(tmp_path / "tiny.gguf", Kind.F16, **options)
    with pytest.raises(InputError, match=match):
        kvpack.compress(tmp_path / "tiny.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.gguf"]


def test_no_output_layer_is_a_tied_one(tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf", Kind.F16, without="output.weight")
    output = kvpack.compress(tmp_path / "tiny.gguf").output
    assert json.loads((Path(str(output)) / "config.json").read_text())["tie_word_embeddings"] is True


def test_an_unknown_tokenizer_is_said(tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf", Kind.F16, tokenizer="nonesuch")
    report = kvpack.compress(tmp_path / "tiny.gguf")
    tokenizers = list((tmp_path / "tiny-kvpack").glob("tokenizer*"))
    assert bool(tokenizers) != any("no tokenizer written" in note for note in report.notes)


@pytest.mark.parametrize("size_bytes", [30, 300, 20_000])
def test_a_file_that_ends_too_early(tmp_path: Path, size_bytes: int) -> None:
    write(tmp_path / "tiny.gguf", Kind.F16)
    (tmp_path / "tiny.gguf").write_bytes((tmp_path / "tiny.gguf").read_bytes()[:size_bytes])
    with pytest.raises(NotAContainerError, match="a GGUF file that the gguf package cannot read"):
        kvpack.compress(tmp_path / "tiny.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.gguf"]
