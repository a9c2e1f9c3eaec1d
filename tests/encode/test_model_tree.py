"""Model directories as people have them: nothing of them is lost, and what does not come along is said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import kvpack
from kvpack.cli import app
from kvpack.encode.model_directory import other_form
from kvpack.encode.model_tree import ModelTree, list_files
from kvpack.encode.progress import Progress
from kvpack.errors import DirectoryIndexError, InputError, OtherFilesError

OK, USAGE, CORRUPT, MISMATCH = 0, 2, 3, 4
INDEX = "model.safetensors.index.json"
A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

Arrays = dict[str, npt.NDArray[Any]]


def weights(seed: int, rows: int = 64, cols: int = 128) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 0.02, (rows, cols)).astype(np.float32)


def put(root: Path, files: dict[str, Any]) -> Path:
    """Files by their paths: arrays become safetensors, other objects JSON, and text and bytes stay."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            save_file(content, path, {"format": "pt"})
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return root


def run(*arguments: object, code: int = OK) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def run_json(*arguments: object, code: int = OK) -> dict[str, Any]:
    report = json.loads(run(*arguments, "--json", code=code).stdout)
    assert isinstance(report, dict)
    return report


def content(root: Path) -> dict[str, Any]:
    """Every file of a directory, links followed: tensors of safetensors, objects of JSON, bytes of others."""
    found: dict[str, Any] = {}
    for folder, _, names in os.walk(root, followlinks=True):
        for name in names:
            path = Path(folder) / name
            key = str(path.relative_to(root))
            if name.endswith(".safetensors"):
                found[key] = {n: (a.dtype.str, a.shape, a.tobytes()) for n, a in load_file(path).items()}
            elif name.endswith(".json"):
                found[key] = json.loads(path.read_text())
            else:
                found[key] = path.read_bytes()
    return found


def there_and_back(source: Path, tmp_path: Path, left_out: set[str] = frozenset()) -> Path:  # type: ignore[assignment]
    """Compress, verify and decompress: all is as it was but for ``left_out``, which each says. Gives the compressed."""
    packed, back = tmp_path / "packed", tmp_path / "back"
    report = run_json("compress", source, "-o", packed, "--preset", "lossless")
    assert {file["path"] for file in report["files"] if file["action"] == "left out"} == left_out
    verified = run_json("verify", packed, "--against", source)
    assert set(verified["left_out"]) == left_out
    assert verified["extra_files"] == []
    run_json("decompress", packed, "-o", back)
    original = content(source)
    expected = {
        name: value
        for name, value in original.items()
        if not any(name == path or name.startswith(f"{path}/") for path in left_out)
    }
    assert content(back) == expected
    assert {file["path"] for file in report["files"] if file["action"] != "left out"} == expected.keys()
    again = run_json("verify", back, "--against", source)
    assert (again["files"], again["extra_files"]) == (len(expected), [])
    return packed


def sentence_transformer(root: Path) -> Path:
    return put(
        root,
        {
            "config.json": {"model_type": "bert"},
            "config_sentence_transformers.json": {"prompts": {}},
            "model.safetensors": {
                "encoder.layer.0.output.dense.weight": weights(1),
                "pooler.dense.bias": weights(2)[0],
            },
            "modules.json": [{"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}],
            "1_Pooling/config.json": {"word_embedding_dimension": 128},
            "2_Dense/config.json": {"in_features": 128, "out_features": 64},
            "2_Dense/model.safetensors": {"linear.weight": weights(3), "linear.bias": weights(4)[0]},
            "tokenizer.json": '{"é": 1}',
        },
    )


def pipeline(root: Path) -> Path:
    """As diffusers writes one: each component has the names of its own model."""
    shards = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    return put(
        root,
        {
            "model_index.json": {
                "_class_name": "StableDiffusionPipeline",
                "unet": ["diffusers", "UNet2DConditionModel"],
            },
            "scheduler/scheduler_config.json": {"num_train_timesteps": 1000},
            "tokenizer/merges.txt": "a b\n",
            "unet/config.json": {"_class_name": "UNet2DConditionModel"},
            f"unet/{shards[0]}": {"conv_in.weight": weights(1), "time_embedding.linear_1.weight": weights(2)},
            f"unet/{shards[1]}": {"mid_block.attentions.0.proj_in.weight": weights(3)},
            "unet/diffusion_pytorch_model.safetensors.index.json": {
                "metadata": {"total_size": 3 * 64 * 128 * 4, "made_by": "diffusers"},
                "weight_map": {
                    "conv_in.weight": shards[0],
                    "mid_block.attentions.0.proj_in.weight": shards[1],
                    "time_embedding.linear_1.weight": shards[0],
                },
            },
            "vae/config.json": {"_class_name": "AutoencoderKL"},
            "vae/diffusion_pytorch_model.safetensors": {"conv_in.weight": weights(4)},
            "vae/diffusion_pytorch_model.fp16.safetensors": {"conv_in.weight": weights(4).astype(np.float16)},
            "text_encoder/config.json": {"model_type": "clip_text_model"},
            "text_encoder/model.safetensors": {
                "text_model.embeddings.token_embedding.weight": weights(5),
                "text_model.encoder.layers.0.mlp.fc1.weight": weights(6),
            },
            "v1-5-pruned.safetensors": {"model.diffusion_model.out.2.weight": weights(7)},
            "v1-5-pruned-emaonly.safetensors": {"model.diffusion_model.out.2.weight": weights(8)},
        },
    )


def test_sentence_transformers(tmp_path: Path) -> None:
    source = sentence_transformer(tmp_path / "st")
    packed = there_and_back(source, tmp_path)
    with kvpack.open(packed) as reader:
        assert reader.keys() == [
            "2_Dense/linear.bias", "2_Dense/linear.weight", "encoder.layer.0.output.dense.weight", "pooler.dense.bias",
        ]  # fmt: skip
        np.testing.assert_array_equal(reader.dequantize("2_Dense/linear.weight"), weights(3))
        info = reader.info("2_Dense/linear.weight")
        assert info is not None
    config = json.loads((packed / "2_Dense" / "config.json").read_text())
    assert config["in_features"] == 128
    assert config["quantization_config"]["blob_bytes"] == {"linear.weight": info.blob_bytes}
    with kvpack.open(packed / "2_Dense") as reader:  # a component by itself
        np.testing.assert_array_equal(reader.dequantize("linear.weight"), weights(3))
    assert json.loads((packed / "1_Pooling" / "config.json").read_text()) == {"word_embedding_dimension": 128}


def test_a_pipeline(tmp_path: Path) -> None:
    source = pipeline(tmp_path / "sd")
    packed = there_and_back(source, tmp_path)
    with kvpack.open(packed) as reader:
        # Four tensors with one name, and two.
        np.testing.assert_array_equal(reader.dequantize("unet/conv_in.weight"), weights(1))
        np.testing.assert_array_equal(reader.dequantize("vae/conv_in.weight"), weights(4))
        variant = "vae/diffusion_pytorch_model.fp16.safetensors"
        half = reader.dequantize(f"{variant}/conv_in.weight", "original")
        np.testing.assert_array_equal(half, weights(4).astype(np.float16))
        name = "model.diffusion_model.out.2.weight"
        np.testing.assert_array_equal(reader.dequantize(f"v1-5-pruned.safetensors/{name}"), weights(7))
        np.testing.assert_array_equal(reader.dequantize(f"v1-5-pruned-emaonly.safetensors/{name}"), weights(8))
        assert reader.info("text_encoder/text_model.encoder.layers.0.mlp.fc1.weight") is not None
        assert set(reader.keys()) - set(reader.main_keys()) == {
            f"{variant}/conv_in.weight", f"v1-5-pruned.safetensors/{name}", f"v1-5-pruned-emaonly.safetensors/{name}",
        }  # fmt: skip
        assert reader.other_sets() == ["v1-5-pruned-emaonly.safetensors", "v1-5-pruned.safetensors", variant]
    vae = json.loads((packed / "vae" / "config.json").read_text())["quantization_config"]["blob_bytes"]
    assert vae.keys() == {"conv_in.weight", "diffusion_pytorch_model.fp16.safetensors/conv_in.weight"}
    assert not (packed / "config.json").exists()  # a pipeline's root has none
    index = json.loads((packed / "unet" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    stored: dict[str, int] = {}
    for shard in (packed / "unet").glob("*.safetensors"):
        for name, array in load_file(shard).items():
            assert index["weight_map"].pop(name) == shard.name
            stored[name] = array.nbytes
    assert index == {"metadata": {"total_size": sum(stored.values()), "made_by": "diffusers"}, "weight_map": {}}


def test_names_decide_by_themselves_and_patterns_by_where(tmp_path: Path) -> None:
    """What a tensor is, its own name says; `--exclude` and `--tensor-bits` see the component before it."""
    source = pipeline(tmp_path / "sd")
    report = run_json("compress", source, "--bits", 4, "--exclude", "^vae/", "--tensor-bits", "^unet/conv=6")
    tensors = {tensor["name"]: tensor for tensor in report["tensors"]}
    assert tensors["vae/conv_in.weight"]["reason"] == "excluded"
    assert tensors["vae/diffusion_pytorch_model.fp16.safetensors/conv_in.weight"]["reason"] == "excluded"
    assert 5.5 < tensors["unet/conv_in.weight"]["bits_per_weight"] <= 6.2
    assert tensors["unet/mid_block.attentions.0.proj_in.weight"]["bits_per_weight"] <= 4.5
    put(tmp_path / "e", {"config.json": {}, "x/model.safetensors": {"lm_head.weight": weights(1)}})
    kept = run_json("compress", tmp_path / "e", "--dry-run")["tensors"]
    assert [(tensor["name"], tensor["method"]) for tensor in kept] == [("x/lm_head.weight", "keep")]


def test_allocation_by_model_over_components(tmp_path: Path) -> None:
    source = pipeline(tmp_path / "sd")
    report = run_json("compress", source, "--bits", 4, "--allocation", "model")
    kept = [tensor["name"] for tensor in report["tensors"] if tensor["method"] == "keep"]
    assert kept == ["text_encoder/text_model.embeddings.token_embedding.weight"]
    assert {t["method"] for t in report["tensors"]} == {"uniform", "keep"}
    assert run_json("verify", report["output"], "--against", source)["coded"] == 8


def test_a_dry_run_counts_what_is_written_and_progress_ends_at_its_total(tmp_path: Path) -> None:
    source = put(pipeline(tmp_path / "sd"), {"tokenizer/big.txt": "x" * 100_000})
    dry = kvpack.compress(source, dry_run=True, preset="lossless")
    for step in ("compress", "decompress"):
        totals: list[int] = []
        done: list[int] = []
        progress = Progress(totals.append, done.append)
        if step == "compress":
            report = kvpack.compress(source, preset="lossless", progress=progress)
        else:
            kvpack.decompress(str(report.output), tmp_path / "back", progress=progress)
        assert totals == [sum(done)]
        assert totals[0] > 100_000
    assert [vars(t) for t in dry.tensors] == [vars(t) for t in report.tensors]
    assert dry.files == report.files
    assert dry.input_bytes == report.input_bytes == sum(p.stat().st_size for p in source.rglob("*") if p.is_file())
    assert report.output_bytes == sum(p.stat().st_size for p in Path(str(report.output)).rglob("*") if p.is_file())
    assert dry.output_bytes == pytest.approx(report.output_bytes, rel=0.03)


def test_force_spares_a_configuration_that_is_not_its_own(tmp_path: Path) -> None:
    source, packed = pipeline(tmp_path / "sd"), tmp_path / "packed"
    run("compress", source, "-o", packed)
    put(packed, {"config.json": {"mine": 1}})
    began: list[str] = []
    with pytest.raises(OtherFilesError, match=r"config\.json"):
        kvpack.compress(source, packed, force=True, progress=Progress(tensor=began.append))
    assert began == []
    assert json.loads((packed / "config.json").read_text()) == {"mine": 1}


def test_force_on_a_tree(tmp_path: Path) -> None:
    source, packed = pipeline(tmp_path / "sd"), tmp_path / "packed"
    run("compress", source, "-o", packed)
    first = content(packed)
    run("compress", source, "-o", packed, code=USAGE)
    run("compress", source, "-o", packed, "--force")
    assert content(packed) == first
    (packed / "unet" / "mine.txt").write_text("three years")
    result = run("compress", source, "-o", packed, "--force", code=USAGE)
    assert "unet/mine.txt" in result.stderr
    assert (packed / "unet" / "mine.txt").read_text() == "three years"
    assert {path.name for path in tmp_path.iterdir()} == {"sd", "packed"}


# Links


def test_linked_files_and_folders(tmp_path: Path) -> None:
    """As Hugging Face's cache has them: snapshots of links to blobs."""
    real = sentence_transformer(tmp_path / "real")
    cache = tmp_path / "models--org--st"
    snapshot = cache / "snapshots" / "0123abcd"
    (cache / "blobs").mkdir(parents=True)
    (cache / "refs").mkdir()
    for number, file in enumerate(list_files(real).files):
        blob = cache / "blobs" / f"{number:040x}"
        shutil.copy(real / file, blob)
        (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / file).symlink_to(os.path.relpath(blob, (snapshot / file).parent))
    put(tmp_path / "elsewhere", {"vocab.json": {"a": 1}, "more/model.safetensors": {"x.weight": weights(9)}})
    (snapshot / "tokenizer").symlink_to(tmp_path / "elsewhere")
    packed = there_and_back(snapshot, tmp_path)
    assert not any(path.is_symlink() for path in packed.rglob("*"))
    with kvpack.open(packed) as reader:
        assert "tokenizer/more/x.weight" in reader
    assert content(tmp_path / "elsewhere")["vocab.json"] == {"a": 1}
    with pytest.raises(InputError, match=r"give a folder in .*snapshots"):
        kvpack.compress(cache)


def test_links_that_go_round(tmp_path: Path) -> None:
    source = sentence_transformer(tmp_path / "st")
    (source / "self").symlink_to(source)
    (source / "2_Dense" / "up").symlink_to("..")
    (source / "above").symlink_to(tmp_path)
    (source / "gone.txt").symlink_to("nowhere")
    report = run_json("compress", source, "-o", tmp_path / "out")
    told = {file["path"]: file["reason"] for file in report["files"] if file["action"] == "left out"}
    around = "a link to a folder that contains it"
    assert told == {"self": around, "2_Dense/up": around, "above": around, "gone.txt": "a link that leads nowhere"}
    printed = run("compress", source, "-o", tmp_path / "out2").stdout
    assert f"left out ({around}): above, self, 2_Dense/up, 0 B\n" in printed
    (source / "2_Dense" / "model2.safetensors").symlink_to("nowhere.safetensors")
    with pytest.raises(
        InputError, match=r"model2\.safetensors is a link to nowhere\.safetensors, which does not exist"
    ):
        kvpack.compress(source, tmp_path / "out3")


# What is left out, and what only looks like it


@pytest.mark.parametrize(
    ("file", "form"),
    [
        ("pytorch_model.bin", "PyTorch pickle"),
        ("pytorch_model-00001-of-00002.bin", "PyTorch pickle"),
        ("pytorch_model.bin.index.json", "PyTorch pickle"),
        ("original/consolidated.00.pth", "PyTorch pickle"),
        ("unet/diffusion_pytorch_model.fp16.bin", "PyTorch pickle"),
        ("unet/renamed.ckpt", "PyTorch pickle"),  # its twin is renamed.safetensors
        ("llama-Q4_K_M.gguf", "GGUF"),
        ("onnx/model_quantized.onnx", "ONNX"),
        ("onnx/model.onnx_data", "ONNX"),
        ("onnx/decoder_with_past.onnx", "ONNX"),
        ("onnx_with_config/onnx/model.onnx", "ONNX"),
        ("model.onnx", "ONNX"),
        ("openvino/openvino_model.bin", "OpenVINO"),
        ("tf_model.h5", "TensorFlow"),
        ("flax_model.msgpack", "Flax"),
        ("rust_model.ot", "rust-bert"),
        # Of these no safetensors file is known to hold the weights.
        ("optimizer.pt", None),
        ("training_args.bin", None),
        ("voices/af_heart.pt", None),
        ("campplus.onnx", None),
        ("adapter_model.bin", None),
        ("only_pickle/pytorch_model.bin", None),  # a component with config.json and no safetensors
        ("adapter/pytorch_model.bin", None),  # beside an adapter's safetensors alone
        ("weights.h5", None),
    ],
)
def test_weights_in_other_forms(tmp_path: Path, file: str, form: str | None) -> None:
    source = put(
        tmp_path / "m",
        {
            "config.json": {},
            "model.safetensors": {"w": weights(1)},
            "unet/config.json": {},
            "unet/diffusion_pytorch_model.safetensors": {"w": weights(2)},
            "unet/renamed.safetensors": {"v": weights(3)},
            "only_pickle/config.json": {},
            "adapter/config.json": {},
            "adapter/adapter_model.safetensors": {"lora_A.weight": weights(4)},
            "onnx_with_config/onnx/config.json": {},
            file: "123456789",
        },
    )
    report = run_json("compress", source, "--dry-run")
    found = {f["path"]: f for f in report["files"]}[file]
    assert found["size_bytes"] == 9
    if form is None:
        assert (found["action"], found["reason"]) == ("copied", "weights that no safetensors file is known to hold")
        assert report["left_out"] == []
    else:
        reason = f"the weights as {'a ' if form == 'PyTorch pickle' else ''}{form}: the safetensors hold them"
        assert (found["action"], found["reason"]) == ("left out", reason)
        assert report["left_out"] == [file]


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    files = {"a/pytorch_model.bin": "123456789", "optimizer.pt": "1234"}
    source = put(tmp_path / "m", {"model.safetensors": {"w": weights(1)}, **files})
    output, reason = tmp_path / "m-kvpack", "the weights as a PyTorch pickle: the safetensors hold them"
    printed = run("compress", source).stdout
    assert f"left out ({reason}): a/pytorch_model.bin, 9 B\n" in printed
    assert "copied (weights that no safetensors file is known to hold): optimizer.pt, 4 B\n" in printed
    assert (output / "optimizer.pt").read_text() == "1234"
    assert not (output / "a").exists()
    assert f"kvpack: not in it: a/pytorch_model.bin ({reason})\n" in run("verify", output, "--against", source).stderr
    assert run_json("verify", output, "--against", source)["left_out"] == {"a/pytorch_model.bin": reason}
    put(output, {"a/pytorch_model.bin": "987654321"})  # by hand, and wrong
    report = run_json("verify", output, "--against", source, code=MISMATCH)
    assert report["mismatches"] == {"a/pytorch_model.bin": "its bytes differ"}
    put(output, files)
    report = run_json("verify", output, "--against", source)
    assert (report["left_out"], report["extra_files"]) == ({}, [])
    run("decompress", output, "-o", tmp_path / "back")
    assert (tmp_path / "back" / "a" / "pytorch_model.bin").read_text() == "123456789"


def test_other_form_needs_safetensors_above_it() -> None:
    weight_files = [Path("vae/model.safetensors")]
    assert other_form(Path("pytorch_model.bin"), weight_files) is None
    assert other_form(Path("unet/model.onnx"), weight_files) is None
    assert other_form(Path("vae/onnx/model.onnx"), weight_files) is not None


def test_hidden_files_are_named(tmp_path: Path) -> None:
    source = put(sentence_transformer(tmp_path / "st"), {".gitattributes": "x", ".git/objects/ab": "12345"})
    packed = there_and_back(source, tmp_path, {".gitattributes", ".git"})
    printed = run("compress", source, "-o", packed, "--force").stdout
    assert "left out (hidden): .git, .gitattributes, 6 B\n" in printed
    put(packed, {".mine": "x"})
    assert "left out (hidden, or nothing to copy): .mine\n" in run("decompress", packed, "-o", tmp_path / "b2").stdout


def test_empty_folders_and_weights_of_unread_names_are_named(tmp_path: Path) -> None:
    source = put(tmp_path / "m", {"model.safetensors": {"w": weights(1)}, "OTHER.SAFETENSORS": "x", "A.BIN": "12"})
    (source / "empty" / "inner").mkdir(parents=True)
    printed = run("compress", source).stdout
    assert "left out (an empty folder): empty/inner, 0 B\n" in printed
    assert "copied (weights that no safetensors file is known to hold): A.BIN, OTHER.SAFETENSORS, 3 B\n" in printed
    assert run_json("verify", tmp_path / "m-kvpack", "--against", source)["left_out"] == {
        "empty/inner": "an empty folder"
    }


def test_a_variant_is_no_copy_of_the_whole(tmp_path: Path) -> None:
    variant = [Path("unet/diffusion_pytorch_model.fp16.safetensors")]
    assert other_form(Path("unet/diffusion_pytorch_model.bin"), variant) is None
    assert other_form(Path("unet/diffusion_pytorch_model.fp16.bin"), variant) is not None
    whole = [Path("unet/diffusion_pytorch_model-00001-of-00002.safetensors")]
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.bin"):
        assert other_form(Path("unet") / name, whole) is not None
    files = {"model.fp16.safetensors": {"w": weights(1)}, "pytorch_model.bin": "123"}
    source = put(tmp_path / "m", files)
    run("compress", source)
    assert (tmp_path / "m-kvpack" / "pytorch_model.bin").read_text() == "123"


def test_an_index_that_is_a_pointer(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12345\n"
    source = put(tmp_path / "m", {"model.safetensors": {"w": weights(1)}, INDEX: pointer})
    with pytest.raises(DirectoryIndexError, match="not a valid index but a git-lfs pointer"):
        kvpack.compress(source)


# verify --against


def test_verify_accounts_for_every_file(tmp_path: Path) -> None:
    source, packed = pipeline(tmp_path / "sd"), tmp_path / "packed"
    run("compress", source, "-o", packed)
    assert ", 14 files too" in run("verify", packed, "--against", source).stdout

    def mismatches() -> dict[str, str]:
        found: dict[str, str] = run_json("verify", packed, "--against", source, code=MISMATCH)["mismatches"]
        return found

    whole = tmp_path / "whole"
    shutil.copytree(packed, whole)
    for file, difference in {
        "scheduler/scheduler_config.json": "its bytes differ",
        "vae/config.json": "says something else than the original",
    }.items():
        text = (packed / file).read_text()
        (packed / file).write_text(text.replace("{", '{"more": 1,', 1))
        assert mismatches() == {file: difference}
        (packed / file).write_text(text)
    (packed / "tokenizer" / "merges.txt").unlink()
    (packed / "vae" / "config.json").unlink()
    assert mismatches() == {"tokenizer/merges.txt": "is missing", "vae/config.json": "is missing"}
    shutil.rmtree(packed / "vae")
    missing = mismatches()
    assert missing["vae/diffusion_pytorch_model.safetensors"] == missing["vae/conv_in.weight"] == "is missing"
    shutil.rmtree(packed)
    shutil.copytree(whole, packed)
    index = packed / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(index.read_text().replace("made_by", "made"))
    assert list(mismatches()) == [str(index.relative_to(packed))]
    shutil.copy(whole / "unet" / index.name, index)
    put(packed, {"vae/mine.txt": "x"})
    result = run("verify", packed, "--against", source)
    assert result.stderr == "kvpack: not in the original: vae/mine.txt\n"
    put(packed, {"lora/adapter_model.safetensors": {"w": weights(1)}})
    assert mismatches() == {"lora/w": "is not in the original"}


def test_an_empty_configuration_and_none(tmp_path: Path) -> None:
    for name, files in {"none": {}, "empty": {"config.json": {}}}.items():
        source = put(tmp_path / name, {"model.safetensors": {"w": weights(1)}, **files})
        (tmp_path / f"{name}-t").mkdir()
        packed = there_and_back(source, tmp_path / f"{name}-t")
        assert (packed / "config.json").exists()


# Sets of weights in one folder


def test_what_was_not_compressed_comes_back_byte_for_byte(tmp_path: Path) -> None:
    source = sharded(tmp_path / "m")
    (source / "config.json").write_text('{"a":1}')
    run("decompress", source, "-o", tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_text() == '{"a":1}'


def test_both_precisions(tmp_path: Path) -> None:
    x = weights(1)
    source = put(
        tmp_path / "m",
        {"model.safetensors": {"a": x}, "model.fp16.safetensors": {"a": x.astype(np.float16), "b": x[0]}},
    )
    packed = there_and_back(source, tmp_path)
    with kvpack.open(packed) as reader:
        assert reader.keys() == ["a", "model.fp16.safetensors/a", "model.fp16.safetensors/b"]
        assert reader.dequantize("a", "original").dtype == np.float32
    with kvpack.open(packed / "model.fp16.safetensors") as reader:
        assert reader.dequantize("a", "original").dtype == np.float16
    line = "coded (other weights of the same names: a set of its own): model.fp16.safetensors, "
    assert line in run("compress", source).stdout
    shown = run("inspect", packed).stdout
    assert (
        "model.fp16.safetensors: other weights of the same names: a set of its own; its tensors are model.fp16" in shown
    )


def test_names_that_no_index_can_hold(tmp_path: Path) -> None:
    """Of shards that need an index, and of a second set, which config.json names."""
    for names in (("\udcffa", "\udcffb"), ("model", "model.\udcff")):
        source = put(tmp_path / names[0].encode("ascii", "replace").decode(), {"config.json": {}})
        for name in names:
            save_file({"x" if name.startswith("m") else name[-1]: weights(1)}, tmp_path / "one")
            (tmp_path / "one").rename(source / f"{name}.safetensors")
        with pytest.raises(InputError, match=r"is no name in UTF-8, which JSON needs: rename the file"):
            kvpack.compress(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_variant_alone_is_the_model(tmp_path: Path) -> None:
    source = put(tmp_path / "m", {"model.fp16.safetensors": {"a": weights(1)}})
    with kvpack.open(source) as reader:
        assert reader.keys() == reader.main_keys() == ["a"]
    put(source, {"model.bf16.safetensors": {"a": weights(1)}})
    with kvpack.open(source) as reader:  # which of the two is the model, nobody says
        assert reader.keys() == ["model.bf16.safetensors/a", "model.fp16.safetensors/a"]
    with pytest.raises(InputError, match=r"several sets of weights: give one of model\.bf16\.safetensors, model\.fp16"):
        kvpack.open(source, components=False)


def test_files_of_other_names_are_one_model(tmp_path: Path) -> None:
    """Layer by layer, or a part in a file of its own."""
    layers = {f"model.layers.{i}.safetensors": {f"l{i}": weights(i)} for i in range(3)}
    with kvpack.open(put(tmp_path / "layers", layers)) as reader:
        assert reader.keys() == ["l0", "l1", "l2"]
    parts = {"model.safetensors": {"a": weights(1)}, "model.vision.safetensors": {"v": weights(2)}}
    with kvpack.open(put(tmp_path / "parts", parts)) as reader:
        assert reader.keys() == ["a", "v"]


def sharded(root: Path, more: dict[str, Any] | None = None, weight_map: Any = None, **metadata: Any) -> Path:
    weight_map = {"a.weight": A, "b.weight": B} if weight_map is None else weight_map
    files = {
        A: {"a.weight": weights(1)},
        B: {"b.weight": weights(2)},
        INDEX: {"metadata": metadata, "weight_map": weight_map},
        "config.json": {},
    }
    return put(root, files | (more or {}))


def test_what_the_index_does_not_name(tmp_path: Path) -> None:
    source = sharded(
        tmp_path / "m",
        {
            "consolidated.safetensors": {"layers.0.wq.weight": weights(3)},
            "model-00003-of-00003.safetensors": {"a.weight": weights(4)},
        },
    )
    packed = there_and_back(source, tmp_path)
    with kvpack.open(packed) as reader:
        assert reader.main_keys() == ["a.weight", "b.weight"]
        np.testing.assert_array_equal(reader.dequantize("a.weight"), weights(1))
        consolidated = reader.dequantize("consolidated.safetensors/layers.0.wq.weight")
        np.testing.assert_array_equal(consolidated, weights(3))
        stray = reader.dequantize("model-*-of-00003.safetensors/a.weight")
        np.testing.assert_array_equal(stray, weights(4))
    printed = run("compress", source).stdout
    line = (
        "coded (not named by the index: a set of its own): consolidated.safetensors, model-00003-of-00003.safetensors, "
    )
    assert line in printed


def test_consolidated_without_an_index(tmp_path: Path) -> None:
    source = put(
        tmp_path / "m", {"model.safetensors": {"a": weights(1)}, "consolidated.safetensors": {"b": weights(2)}}
    )
    with kvpack.open(there_and_back(source, tmp_path)) as reader:
        assert reader.keys() == ["a", "consolidated.safetensors/b"]


def test_a_stale_copy_is_kept_apart(tmp_path: Path) -> None:
    more = {
        A: {"a.weight": weights(9), "b.weight": weights(2)},
        B: {"a.weight": weights(1), "b.weight": weights(8), "c.weight": weights(3)},
    }
    source = sharded(tmp_path / "m", more, {"a.weight": B, "b.weight": A, "c.weight": B})
    packed = there_and_back(source, tmp_path)
    for folder in (source, packed):
        with kvpack.open(folder) as reader:
            assert reader.main_keys() == ["a.weight", "b.weight", "c.weight"]
            np.testing.assert_array_equal(reader.dequantize("a.weight"), weights(1))
            np.testing.assert_array_equal(reader.dequantize("b.weight"), weights(2))
            np.testing.assert_array_equal(reader.dequantize(f"{A}/a.weight"), weights(9))
            np.testing.assert_array_equal(reader.dequantize(f"{B}/b.weight"), weights(8))
    printed = run("compress", source).stdout
    assert (
        f"(the index takes a.weight from another file: coded here, too, as a copy that does not count): {A}" in printed
    )
    index = json.loads((packed / INDEX).read_text())["weight_map"]
    assert index == {"a.weight_kvpack": B, "b.weight_kvpack": A, "c.weight_kvpack": B}


def test_variant_indexes(tmp_path: Path) -> None:
    """Of a precision variant beside the model; named in both ways that libraries have."""
    for name, pattern in {
        "model.safetensors.index.fp16.json": "model.fp16-0000{}-of-00002.safetensors",
        "model.fp16.safetensors.index.json": "model-0000{}-of-00002.fp16.safetensors",
    }.items():
        files = [pattern.format(i) for i in (1, 2)]
        half = [weights(i).astype(np.float16) for i in (1, 2)]
        more = {
            files[0]: {"a.weight": half[0]},
            files[1]: {"b.weight": half[1]},
            name: {
                "weight_map": {"a.weight": files[0], "b.weight": files[1]},
                "metadata": {"total_size": 4 * half[0].size},
            },
        }
        folder = tmp_path / name
        folder.mkdir()
        source = sharded(folder / "m", more, total_size=1, total_parameters=16384)
        (source / INDEX).write_text((source / INDEX).read_text().replace('"total_size": 1,', '"total_size": 65536,'))
        packed = there_and_back(source, folder)
        with kvpack.open(packed) as reader:
            assert reader.main_keys() == ["a.weight", "b.weight"]
            assert reader.dequantize(f"{name}/a.weight", "original").dtype == np.float16
        with kvpack.open(packed / name) as reader:  # the variant by its index
            assert reader.keys() == ["a.weight", "b.weight"]
            np.testing.assert_array_equal(reader.dequantize("b.weight", "original"), half[1])
        for command in ("compress", "decompress"):
            result = run(command, packed / name, "-o", folder / "x", code=USAGE)
            assert "is an index: give the folder that it is in" in result.stderr
        metadata = json.loads((packed / INDEX).read_text())["metadata"]
        stored = sum(a.nbytes for f in (A, B) for a in load_file(packed / f).values())
        assert metadata == {"total_size": stored, "total_parameters": 16384}


def test_shards_of_diffusers_without_an_index_get_its_name(tmp_path: Path) -> None:
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    source = put(tmp_path / "m", {f"unet/{name}": {name: weights(1)} for name in names})
    output = Path(run_json("compress", source)["output"])
    assert (output / "unet" / "diffusion_pytorch_model.safetensors.index.json").exists()
    assert not (output / "unet" / INDEX).exists()
    assert run_json("verify", output, "--against", source)["extra_files"] == []
    run("compress", source, "--force")  # of its own


# Judged the same by all


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a.weight": A, "b.weight": B, "mtp.fc.weight": B}, "'mtp.fc.weight' is not where the index says"),
        ({"a.weight": B, "b.weight": B}, "'a.weight' is not where the index says"),
        ({}, "weight_map is empty"),
        ({"a.weight": "model-00009-of-00009.safetensors"}, "which does not exist"),
        ({"a.weight": A, "b.weight": "config.json"}, "names 'config.json', which is no .safetensors file"),
        (f'{{"a.weight": "{A}", "b.weight": "{B}", "a.weight": "{B}"}}', "names 'a.weight' twice"),
    ],
)
def test_an_index_that_is_wrong_is_refused_by_all(tmp_path: Path, weight_map: Any, message: str) -> None:
    whole = sharded(tmp_path / "whole")
    run("compress", whole, "-o", tmp_path / "packed")
    source = sharded(tmp_path / "m")
    text = weight_map if isinstance(weight_map, str) else json.dumps(weight_map)
    (source / INDEX).write_text(f'{{"metadata": {{}}, "weight_map": {text}}}')
    for arguments in (
        ("compress", source),
        ("compress", source, "--dry-run"),
        ("inspect", source),
        ("verify", source),
        ("verify", tmp_path / "packed", "--against", source),
        ("decompress", source, "-o", tmp_path / "out"),
    ):
        report = run_json(*arguments, code=CORRUPT)
        assert report["error"] == "DirectoryIndexError"
        assert message in report["message"]
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "packed", "m"}
    # A compressed directory's index is judged in the same way.
    packed = tmp_path / "packed"
    (packed / INDEX).write_text(f'{{"weight_map": {text.replace(".weight", ".weight_kvpack")}}}')
    with pytest.raises(DirectoryIndexError):
        kvpack.open(packed)


def test_an_index_without_its_shards(tmp_path: Path) -> None:
    source = put(tmp_path / "m", {INDEX: {"weight_map": {"a": A}}})
    with pytest.raises(DirectoryIndexError, match="which does not exist"):
        kvpack.open(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method 'gptq', but files of the folder are coded by kvpack"),
        ({"format_version": 2}, "format_version 2, this reader knows 1"),
        ({"format_version": None}, "format_version None"),
        ({"format_version": True}, "format_version True"),
        ({"blob_bytes": None}, "has no object blob_bytes"),
        ({"blob_bytes": {}}, "blob_bytes of 'a.weight' is None, but its blob has"),
        ({"blob_bytes": {"a.weight": 16, "b.weight": 16}}, "blob_bytes of 'a.weight' is 16, but its blob has"),
        ({"blob_bytes+": {"c.weight": 16}}, "blob_bytes of 'c.weight' is 16, but no such tensor is coded"),
    ],
)
@pytest.mark.parametrize("below", [".", "unet"])
def test_config_is_checked_on_opening(tmp_path: Path, change: dict[str, Any], message: str, below: str) -> None:
    source = put(tmp_path / "m", {"README.md": "x"})
    sharded(source / below)
    packed = Path(run_json("compress", source)["output"])
    path = packed / below / "config.json"
    config = json.loads(path.read_text())
    for key, value in change.items():
        if key.endswith("+"):
            config["quantization_config"][key[:-1]] |= value
        else:
            config["quantization_config"][key] = value
    path.write_text(json.dumps(config))
    for arguments in (("verify", packed), ("inspect", packed), ("decompress", packed, "-o", tmp_path / "out")):
        report = run_json(*arguments, code=CORRUPT)
        assert report["error"] == "DirectoryIndexError"
        assert message in report["message"]
    with pytest.raises(DirectoryIndexError):
        kvpack.open(packed)
    path.unlink()
    run("verify", packed)


def test_a_compressed_part_is_not_compressed_again(tmp_path: Path) -> None:
    source = sharded(tmp_path / "m")
    run("compress", source, "-o", source / "packed")
    run("compress", source, "-o", source / "packed", "--force")  # its own earlier output is no part of it
    result = run("compress", source, "-o", tmp_path / "other", code=USAGE)
    assert "packed/model-00001-of-00002.safetensors is compressed already: move it out of" in result.stderr


def test_names_that_come_out_the_same(tmp_path: Path) -> None:
    source = put(tmp_path / "m", {"a.safetensors": {"x/w": weights(1)}, "x/b.safetensors": {"w": weights(2)}})
    with pytest.raises(DirectoryIndexError, match=r"'x/w' is in both a\.safetensors and x/b\.safetensors"):
        kvpack.open(source)


def test_opening_a_component_alone(tmp_path: Path) -> None:
    source = pipeline(tmp_path / "sd")
    for file in source.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(InputError, match=r"folders with weights: text_encoder, unet, vae\. Give one of these"):
        kvpack.open(source, components=False)
    with kvpack.open(sentence_transformer(tmp_path / "st"), components=False) as reader:
        assert reader.keys() == ["encoder.layer.0.output.dense.weight", "pooler.dense.bias"]
        assert reader.tree.not_opened == ["2_Dense"]


def test_as_a_process(tmp_path: Path) -> None:
    """A whole round as the shell sees it."""
    source = pipeline(tmp_path / "sd")
    done = subprocess.run(
        [sys.executable, "-m", "kvpack", "compress", str(source), "--bits", "5"],
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert "coded (beside model_index.json: a set of its own): v1-5-pruned-emaonly.safetensors" in done.stdout
    with ModelTree(tmp_path / "sd-kvpack") as tree:
        assert [folder.as_posix() for folder in tree.folders] == [".", "text_encoder", "unet", "vae"]
