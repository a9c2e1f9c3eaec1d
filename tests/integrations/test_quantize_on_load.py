"""``from_pretrained(…, quantization_config=KVPackConfig(bits=…))``: the same model as of a compressed directory."""

from __future__ import annotations

import copy
import errno
import gc
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from models import ARCHITECTURES, VOCABULARY  # noqa: E402
from safetensors import safe_open  # noqa: E402
from transformers import AutoModel, AutoModelForCausalLM  # noqa: E402

import kvpack  # noqa: E402
from kvpack.errors import InputError, NotSupportedError  # noqa: E402
from kvpack.integrations.transformers.config import KVPackConfig  # noqa: E402
from kvpack.integrations.transformers.quantize_on_load import coding_device  # noqa: E402

SHARDED = ("llama", "mixtral")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name → directory of the dense model, made once; those of SHARDED are of several files."""
    made: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("dense") / name
            options = {"max_shard_size": "150KB"} if name in SHARDED else {}
            ARCHITECTURES[name].model().save_pretrained(made[name], **options)
        return made[name]

    return save


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Where the coded files lie while a model is loaded; nothing may stay there."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    yield directory
    assert list(directory.glob("kvpack-*")) == []


def coded(model: Any) -> dict[str, Any]:
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.endswith(("weight_kvpack", "weight_kvpack_scale"))
    }


def same_weights(one: Any, other: Any) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def load(name: str, directory: Path, **options: Any) -> Any:
    return ARCHITECTURES[name].class_.from_pretrained(directory, **options)


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3 moe", "mixtral", "gpt oss", "gpt2", "t5"])
def test_weights_are_those_of_a_compressed_directory(saved: Any, tmp_path: Path, name: str) -> None:
    model = load(name, saved(name), quantization_config=KVPackConfig(bits=4.25))
    kvpack.compress(saved(name), tmp_path / "coded", bits=4.25)
    same_weights(model, load(name, tmp_path / "coded"))
    assert model.config.quantization_config.blob_bytes
    assert any(isinstance(module, kvpack.RansLinear) for module in model.modules())


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 3.0, "layout": "fast"},
        {"preset": "near-lossless"},
        {"preset": "lossless"},
        {"allocation": "model"},
        {"tensor_bits": {"q_proj": 6, "v_proj": "lossless"}, "exclude": "down_proj", "include": "embed_tokens"},
        {"exclude": ["down_proj", "up_proj"], "tile_cols": 32},
    ],
    ids=str,
)
def test_options_are_those_of_compress(saved: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved("llama"), quantization_config=KVPackConfig(**options))
    kvpack.compress(saved("llama"), tmp_path / "coded", **options)
    same_weights(model, AutoModelForCausalLM.from_pretrained(tmp_path / "coded"))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_saved_as_compress_writes_it(saved: Any, tmp_path: Path, name: str) -> None:
    source = saved(name)
    if name in SHARDED:  # save_pretrained decides anew how many files there are
        source = tmp_path / "dense"
        ARCHITECTURES[name].model().save_pretrained(source)
    load(name, source, quantization_config=KVPackConfig(bits=4.25)).save_pretrained(tmp_path / "saved")
    kvpack.compress(source, tmp_path / "coded", bits=4.25)
    written, expected = ({}, {})
    for tensors, folder in ((written, "saved"), (expected, "coded")):
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            tensors["metadata"] = json.loads(file.metadata()["kvpack_tensors"])
        tensors["config"] = json.loads((tmp_path / folder / "config.json").read_text())
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        if isinstance(tensor, torch.Tensor):
            assert written[name].dtype == tensor.dtype, name
            assert torch.equal(written[name], tensor), name
        else:
            assert written[name] == tensor, name
    assert kvpack.verify(tmp_path / "saved", source).mismatches == {}


def test_modules_to_not_convert(saved: Any, tmp_path: Path) -> None:
    names = ["model.layers.0.self_attn", "down_proj", "lm_head"]
    config = KVPackConfig(bits=4.25, modules_to_not_convert=names)
    model = AutoModelForCausalLM.from_pretrained(saved("llama"), quantization_config=config)
    found = {name.removesuffix(".weight_kvpack") for name in coded(model) if name.endswith("_kvpack")}
    assert found
    assert not any("layers.0.self_attn" in name or "down_proj" in name for name in found)
    assert "model.layers.1.self_attn.q_proj" in found
    assert "model.layers.0.mlp.up_proj" in found
    dense = AutoModelForCausalLM.from_pretrained(saved("llama"))
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, dense.model.layers[0].self_attn.q_proj.weight)


def test_tied_output_layer_may_be_named(saved: Any) -> None:
    """It has no tensor in the file; a name that is no module's is an error."""
    config = KVPackConfig(bits=4.25, modules_to_not_convert=["lm_head"])
    AutoModelForCausalLM.from_pretrained(saved("qwen3"), quantization_config=config)
    wrong = KVPackConfig(bits=4.25, modules_to_not_convert=["lm_haed"])
    with pytest.raises(InputError, match=r"'lm_haed' is no module of Qwen3ForCausalLM"):
        AutoModelForCausalLM.from_pretrained(saved("qwen3"), quantization_config=wrong)


def test_checkpoint_of_the_base_model(saved: Any, tmp_path: Path) -> None:
    """Names in the file lack the prefix of those in the model, and the other way round."""
    AutoModel.from_pretrained(saved("qwen3")).save_pretrained(tmp_path / "base")
    config = KVPackConfig(bits=4.25, modules_to_not_convert=["model.layers.0.mlp"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert isinstance(model.model.layers[1].mlp.up_proj, kvpack.RansLinear)
    base = AutoModel.from_pretrained(saved("qwen3"), quantization_config=KVPackConfig(bits=4.25))
    whole = AutoModelForCausalLM.from_pretrained(saved("qwen3"), quantization_config=KVPackConfig(bits=4.25))
    same_weights(base, whole.model)


def test_pickled_checkpoint(saved: Any, tmp_path: Path) -> None:
    source = tmp_path / "pickled"
    shutil.copytree(saved("qwen3"), source)
    tensors = AutoModelForCausalLM.from_pretrained(source).state_dict()
    del tensors["lm_head.weight"]
    torch.save(tensors, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    config = KVPackConfig(bits=4.25, modules_to_not_convert=["lm_head", "down_proj"])
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    other = AutoModelForCausalLM.from_pretrained(saved("qwen3"), quantization_config=config)
    same_weights(model, other)


def test_other_weights_beside_are_left_alone(saved: Any, tmp_path: Path) -> None:
    """A snapshot of links, in a subfolder, with a precision variant and a folder of other weights beside."""
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot" / "text"
    shutil.copytree(saved("qwen3"), blobs)
    folder.mkdir(parents=True)
    for file in blobs.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "model.fp16.safetensors").write_bytes(b"damaged")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.safetensors").write_bytes(b"damaged")
    config = KVPackConfig(bits=4.25)
    model = AutoModelForCausalLM.from_pretrained(folder.parent, subfolder="text", quantization_config=config)
    same_weights(
        model, AutoModelForCausalLM.from_pretrained(saved("qwen3"), quantization_config=KVPackConfig(bits=4.25))
    )


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map_and_dtype(saved: Any, device_map: Any) -> None:
    """The bytes do not depend on the type in which the model is loaded: they are made of what the files hold."""
    pytest.importorskip("accelerate")
    expected = AutoModelForCausalLM.from_pretrained(saved("llama"), quantization_config=KVPackConfig(bits=4.25))
    model = AutoModelForCausalLM.from_pretrained(
        saved("llama"), quantization_config=KVPackConfig(bits=4.25), device_map=device_map, dtype=torch.bfloat16
    )
    theirs = coded(expected)
    assert theirs
    for name, tensor in coded(model).items():
        assert torch.equal(tensor, theirs[name]), name
    assert model.lm_head.weight.dtype == torch.bfloat16
    ids = torch.arange(12)[None] % VOCABULARY
    difference = (model(ids).logits.float() - expected(ids).logits).norm() / expected(ids).logits.norm()
    assert 0 < difference < 0.03


def test_offloaded_to_disk(saved: Any, tmp_path: Path, temporary: Path) -> None:
    """What is not coded stays in the coded files; these go when the model does."""
    pytest.importorskip("accelerate")
    ids = torch.arange(12)[None] % VOCABULARY
    expected = AutoModelForCausalLM.from_pretrained(saved("llama"), quantization_config=KVPackConfig(bits=4.25))
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu"}
    places |= {"model.layers.1": "disk", "model.norm": "disk", "lm_head": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        saved("llama"),
        quantization_config=KVPackConfig(bits=4.25),
        device_map=places,
        offload_folder=tmp_path / "offload",
    )
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert len(list(temporary.glob("kvpack-*"))) == 1
    del model
    gc.collect()


def test_one_config_for_several_models(saved: Any) -> None:
    config = KVPackConfig(bits=4.25, modules_to_not_convert=["lm_head"])
    written = config.to_dict()
    for name in ("llama", "qwen3"):
        model = load(name, saved(name), quantization_config=config)
        assert config.to_dict() == written
        assert model.config.quantization_config.options["exclude"] == (r"(^|\.)lm_head\." if name == "llama" else None)


def test_what_is_kept_is_told(saved: Any, capsys: pytest.CaptureFixture[str]) -> None:
    AutoModelForCausalLM.from_pretrained(saved("llama"), quantization_config=KVPackConfig(bits=4.25))
    err = capsys.readouterr().err
    line = next(line for line in err.splitlines() if line.startswith("kvpack: "))
    assert "14 tensors coded at 4." in line
    assert "1-D (" in line
    assert "Coding weights: 100%" in err
    assert "embedding (lm_head.weight, model.embed_tokens.weight)" in line


def test_told_nothing_where_bars_are_off(saved: Any, capsys: pytest.CaptureFixture[str]) -> None:
    transformers.utils.logging.disable_progress_bar()
    try:
        AutoModelForCausalLM.from_pretrained(saved("llama"), quantization_config=KVPackConfig(bits=4.25))
    finally:
        transformers.utils.logging.enable_progress_bar()
    assert "kvpack" not in capsys.readouterr().err


# What is refused -----------------------------------------------------------------------------------------------------


def test_calibration_is_not_there_yet() -> None:
    with pytest.raises(NotSupportedError, match=r"calibrate.*bits.*tensor_bits"):
        KVPackConfig(bits=4.25, calibrate="wikitext")
    assert issubclass(NotSupportedError, NotImplementedError)


def test_failure_leaves_nothing(saved: Any) -> None:
    config = KVPackConfig(bits=4.25, exclude="no_such_tensor")
    with pytest.raises(InputError, match=r"exclude 'no_such_tensor' matches no tensor's name"):
        AutoModelForCausalLM.from_pretrained(saved("llama"), quantization_config=config)


def test_no_space(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_writer: Any, *_arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(temporary_file))

    temporary_file = Path(tempfile.gettempdir()) / "file"
    monkeypatch.setattr("kvpack.encode.compress.ContainerWriter.add", full)
    with pytest.raises(OSError, match="No space left") as raised:
        AutoModelForCausalLM.from_pretrained(saved("llama"), quantization_config=KVPackConfig(bits=4.25))
    assert "TMPDIR" in "".join(raised.value.__notes__)


def test_without_files(saved: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved("llama"))
    with pytest.raises(InputError, match=r"checkpoint's files.*kvpack\.compress\(state_dict"):
        type(model).from_pretrained(
            None, config=model.config, state_dict=model.state_dict(), quantization_config=KVPackConfig(bits=4.25)
        )


def test_compressed_already(saved: Any, tmp_path: Path) -> None:
    """With its config.json transformers warns and takes the model as it is; without, its files tell."""
    kvpack.compress(saved("qwen3"), tmp_path / "coded", bits=3)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "coded", quantization_config=KVPackConfig(bits=4.25))
    assert model.config.quantization_config.options["bits"] == 3
    shutil.copy(saved("qwen3") / "config.json", tmp_path / "coded" / "config.json")
    with pytest.raises(InputError, match="is compressed already"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "coded", quantization_config=KVPackConfig(bits=4.25))


def test_quantized_otherwise(saved: Any, tmp_path: Path) -> None:
    source = tmp_path / "fp8"
    shutil.copytree(saved("qwen3"), source)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quantized with .*FP8.* but you are passing a KVPackConfig"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=KVPackConfig(bits=4.25))


# The config ----------------------------------------------------------------------------------------------------------


def test_config_round_trip() -> None:
    config = KVPackConfig(bits=3.5, tensor_bits={"lm_head": 6}, exclude=["a", "b"], modules_to_not_convert=["c"])
    again = KVPackConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert again.quant_config() == kvpack.QuantConfig(bits=3.5, tensor_bits={"lm_head": 6}, exclude=["a", "b"])
    assert again.modules_to_not_convert == ["c"]
    assert copy.deepcopy(config).to_dict() == config.to_dict()


def test_config_of_no_options_is_the_default() -> None:
    assert KVPackConfig().quant_config() == kvpack.QuantConfig()


def test_config_keeps_what_a_file_says_and_refuses_unknown_options() -> None:
    of_file = {"quant_method": "kvpack", "format_version": 1, "blob_bytes": {"a": 5}, "options": {}, "later": [1]}
    assert KVPackConfig.from_dict(dict(of_file)).to_dict() == of_file
    with pytest.raises(InputError, match=r"KVPackConfig has no option bit; there are bits, preset"):
        KVPackConfig(bit=4)
    with pytest.raises(InputError, match="400 bits a weight"):
        KVPackConfig(bits=400)
    with pytest.raises(InputError, match="bits and preset"):
        KVPackConfig(bits=4, preset="lossless")


def test_config_is_shown_short() -> None:
    blobs = {f"model.layers.{n}.weight": 100 for n in range(500)}
    shown = repr(KVPackConfig.from_dict({"blob_bytes": blobs, "options": {"bits": 4.25}}))
    assert shown == "KVPackConfig(bits=4.25, 500 coded tensors)"
    assert repr(KVPackConfig(bits=3, exclude="x")) == "KVPackConfig(bits=3.0, exclude='x')"


def test_coding_device() -> None:
    assert coding_device(None) == "cpu"
    assert coding_device({"a": "cpu", "b": "disk"}) == "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("device_map", ["cuda", "auto", {"": 0}])
def test_coded_on_the_gpu(saved: Any, device_map: Any) -> None:
    assert coding_device(device_map).startswith("cuda")
    model = AutoModelForCausalLM.from_pretrained(
        saved("llama"), quantization_config=KVPackConfig(bits=4.25), device_map=device_map
    )
    on_cpu = AutoModelForCausalLM.from_pretrained(saved("llama"), quantization_config=KVPackConfig(bits=4.25))
    assert model.model.layers[0].mlp.up_proj.weight.device.type == "cuda"
    same_weights(model.cpu(), on_cpu)
