"""from_pretrained on compressed directories, and save_pretrained: what transformers tests of its own quantizers."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from models import ARCHITECTURES  # noqa: E402
from safetensors import safe_open  # noqa: E402

import kvpack  # noqa: E402
from kvpack.encode.compress import compress  # noqa: E402
from kvpack.encode.model_config import GUARD  # noqa: E402
from kvpack.errors import FormatError, InputError, ModelMismatchError  # noqa: E402
from kvpack.runtime.weights.embedding import RansEmbedding  # noqa: E402
from kvpack.runtime.weights.linear import RansLinear  # noqa: E402

Load = Callable[..., Any]
CODED = {"llama": 14, "llama tied": 14, "gpt2": 8, "mixtral": 32}


class Directories:
    """A tiny model as it was, compressed, and decompressed again."""

    def __init__(self, folder: Path, name: str, dtype: Any = torch.float32, **quant: Any) -> None:
        self.name = name
        self.plain, self.coded, self.dense = folder / "plain", folder / "coded", folder / "dense"
        ARCHITECTURES[name].save(self.plain, dtype)
        kvpack.compress(self.plain, self.coded, kvpack.QuantConfig(**(quant or {"bits": 4.25})))
        kvpack.decompress(self.coded, self.dense)

    def load(self, path: Path | None = None, **options: Any) -> Any:
        class_ = ARCHITECTURES[self.name].class_
        return class_.from_pretrained(path or self.coded, **({"experts_implementation": "eager"} | options))

    def logits(self, model: Any, dtype: Any = torch.float32) -> Any:
        with torch.no_grad():
            return model(**ARCHITECTURES[self.name].example(dtype)).logits


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Directories]:
    made: dict[str, Directories] = {}

    def get(name: str) -> Directories:
        if name not in made:
            made[name] = Directories(tmp_path_factory.mktemp("model"), name)
        return made[name]

    return get


def coded_layers(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, RansLinear)]


def bytes_of(state: dict[str, Any]) -> dict[str, bytes]:
    return {name: tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in state.items()}


@pytest.mark.parametrize("name", CODED)
def test_load_and_save(directories: Callable[[str], Directories], tmp_path: Path, name: str) -> None:
    """Loaded: as the decompressed model. Saved: a directory that verifies, and loads as the same bytes."""
    model_of = directories(name)
    model, info = model_of.load(output_loading_info=True)
    assert len(coded_layers(model)) == CODED[name]
    assert {key: list(found) for key, found in info.items() if found} == {}
    expected = model_of.logits(model_of.load(model_of.dense))
    assert torch.equal(model_of.logits(model), expected)

    model.save_pretrained(tmp_path / "first")
    kvpack.verify(tmp_path / "first")
    again = model_of.load(tmp_path / "first")
    assert bytes_of(again.state_dict()) == bytes_of(model.state_dict())
    assert torch.equal(model_of.logits(again), expected)
    again.save_pretrained(tmp_path / "second")
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "second").iterdir())
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file
    # Coded tensors are those of the compressed directory, under the same names.
    with kvpack.open(model_of.coded) as reader, kvpack.open(tmp_path / "first") as saved:
        for tensor in saved:
            one, other = saved.info(tensor), reader.info(tensor)
            assert one is None or one == other
    kvpack.decompress(tmp_path / "first", tmp_path / "dense")
    assert torch.equal(model_of.logits(model_of.load(tmp_path / "dense")), expected)


@pytest.mark.parametrize("name", ["llama tied", "mixtral"])
def test_shards(directories: Callable[[str], Directories], tmp_path: Path, name: str) -> None:
    model_of = directories(name)
    model = model_of.load()
    model.save_pretrained(tmp_path / "saved", max_shard_size="60KB")
    shards = sorted((tmp_path / "saved").glob("model-*.safetensors"))
    assert len(shards) > 2
    kvpack.verify(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())["weight_map"]
    for shard in shards:
        with safe_open(shard, "pt") as file:
            entries = json.loads(file.metadata()["kvpack_tensors"])
            assert {f"{name}_kvpack" for name in entries} == {n for n in file.keys() if n.endswith("_kvpack")}  # noqa: SIM118
            assert all(index[stored] == shard.name for stored in file.keys())  # noqa: SIM118
    again = model_of.load(tmp_path / "saved")
    assert bytes_of(again.state_dict()) == bytes_of(model.state_dict())
    # And back into one file, in place of the shards.
    again.save_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "once")
    assert (tmp_path / "single" / "model.safetensors").read_bytes() == (
        tmp_path / "once" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("name", [*CODED, "gpt oss", "t5"])
def test_dequantize(directories: Callable[[str], Directories], tmp_path: Path, name: str) -> None:
    model_of = directories(name)
    dense = model_of.load(model_of.dense)
    later = model_of.load().dequantize()
    config = transformers.AutoConfig.from_pretrained(model_of.coded)
    config.quantization_config["dequantize"] = True
    at_once = model_of.load(config=config)
    for model in (later, at_once):
        assert coded_layers(model) == []
        assert {name: type(module) for name, module in model.named_modules()} == {
            name: type(module) for name, module in dense.named_modules()
        }
        assert bytes_of(model.state_dict()) == bytes_of(dense.state_dict())
        assert torch.equal(model_of.logits(model), model_of.logits(dense))
        assert not hasattr(model.config, "quantization_config")
        model.save_pretrained(tmp_path / "plain")
        dense.save_pretrained(tmp_path / "dense")
        files = ("model.safetensors", "config.json")
        assert [(tmp_path / "plain" / f).read_bytes() for f in files] == [
            (tmp_path / "dense" / f).read_bytes() for f in files
        ]


UNAWARE = """
import sys, transformers
for name in sys.argv[2].split(","):
    for options in ({}, {"subfolder": "inner"}):
        folder = sys.argv[1 if not options else 3]
        try:
            getattr(transformers, name).from_pretrained(folder, **options)
        except ValueError as error:
            print(error)
"""


def test_transformers_alone_fails(directories: Callable[[str], Directories], tmp_path: Path) -> None:
    """Without kvpack: the sentence that says what to import, for all classes, not a model of random weights."""
    coded = directories("llama").coded
    shutil.copytree(coded, tmp_path / "inner")
    names = "AutoModel,AutoModelForCausalLM,LlamaModel,LlamaForCausalLM"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", UNAWARE, str(coded), names, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 8
    assert all(line.endswith(GUARD) for line in lines)


@pytest.mark.parametrize("first", ["kvpack", "transformers"])
def test_import_order(directories: Callable[[str], Directories], first: str) -> None:
    second = "transformers" if first == "kvpack" else "kvpack"
    code = f"import sys, {first}, {second}; m = transformers.AutoModel.from_pretrained(sys.argv[1]); print(m.layers[0])"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(directories("llama").coded)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("RansLinear") == 7


def test_guard_of_the_config(directories: Callable[[str], Directories], tmp_path: Path) -> None:
    """Taken away while loading, there again when saved; the original's own key comes back."""
    model_of = directories("llama")
    config = json.loads((model_of.coded / "config.json").read_text())
    assert config["transformers_weights"] == GUARD
    model = model_of.load()
    assert not hasattr(model.config, "transformers_weights")
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["transformers_weights"] == GUARD

    shutil.copytree(model_of.plain, tmp_path / "named")
    config = json.loads((tmp_path / "named" / "config.json").read_text())
    config["transformers_weights"] = "model.safetensors"
    (tmp_path / "named" / "config.json").write_text(json.dumps(config))
    kvpack.compress(tmp_path / "named", tmp_path / "coded", kvpack.QuantConfig(bits=4.25))
    assert torch.equal(model_of.logits(model_of.load(tmp_path / "coded")), model_of.logits(model))
    kvpack.decompress(tmp_path / "coded", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config


def test_directories_without_the_guard(directories: Callable[[str], Directories], tmp_path: Path) -> None:
    model_of = directories("llama")
    shutil.copytree(model_of.coded, tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    del config["transformers_weights"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    assert len(coded_layers(model_of.load(tmp_path / "old"))) == 14


def test_snapshot_of_links_and_subfolder(directories: Callable[[str], Directories], tmp_path: Path) -> None:
    """As the hub's cache has it: links in a snapshot's folder to files without endings."""
    model_of = directories("llama tied")
    model_of.load().save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots" / "0a1b" / "inner").mkdir(parents=True)
    for number, file in enumerate(sorted((tmp_path / "sharded").iterdir())):
        shutil.copy(file, tmp_path / "blobs" / str(number))
        (tmp_path / "snapshots" / "0a1b" / "inner" / file.name).symlink_to(tmp_path / "blobs" / str(number))
    model = model_of.load(tmp_path / "snapshots" / "0a1b", subfolder="inner")
    assert len(coded_layers(model)) == 14
    assert torch.equal(model_of.logits(model), model_of.logits(model_of.load()))


def test_modules_to_not_convert(directories: Callable[[str], Directories]) -> None:
    model_of = directories("mixtral")
    config = transformers.AutoConfig.from_pretrained(model_of.coded)
    config.quantization_config["modules_to_not_convert"] = ["model.layers.0.mlp", "model.layers.1.self_attn.q_proj"]
    model = model_of.load(config=config)
    layers = coded_layers(model)
    assert len(layers) == CODED["mixtral"] - 12 - 1
    assert not any(name.startswith("model.layers.0.mlp") for name in layers)
    assert type(model.model.layers[1].self_attn.q_proj) is torch.nn.Linear
    assert torch.equal(model_of.logits(model), model_of.logits(model_of.load(model_of.dense)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype(directories: Callable[[str], Directories], dtype: Any) -> None:
    """All plain tensors have it, in a model without the head too, whose tensors are renamed while they are loaded."""
    model_of = directories("qwen2")
    for model in (
        model_of.load(dtype=dtype),
        transformers.AutoModel.from_pretrained(model_of.coded, dtype=dtype),
    ):
        floating = [t for name, t in model.state_dict().items() if "kvpack" not in name and t.is_floating_point()]
        assert len(floating) > 10
        assert {tensor.dtype for tensor in floating} == {dtype}
        assert model.dtype == dtype
        assert model(**ARCHITECTURES["qwen2"].example()).last_hidden_state.dtype if not hasattr(model, "lm_head") else 1


def test_base_and_head(directories: Callable[[str], Directories], tmp_path: Path) -> None:
    """A body from a whole model's directory, and a whole model from a body's, whose head is new."""
    model_of = directories("llama")
    body = transformers.AutoModel.from_pretrained(model_of.coded)
    expected = transformers.AutoModel.from_pretrained(model_of.dense)
    example = ARCHITECTURES["llama"].example()
    with torch.no_grad():
        assert torch.equal(body(**example).last_hidden_state, expected(**example).last_hidden_state)
    body.save_pretrained(tmp_path / "body")
    kvpack.verify(tmp_path / "body")
    model, info = model_of.load(tmp_path / "body", output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    assert len(coded_layers(model)) == 14
    with torch.no_grad():
        assert torch.equal(model.model(**example).last_hidden_state, expected(**example).last_hidden_state)


def test_unexpected_keys_are_reported(tmp_path: Path) -> None:
    model_of = Directories(tmp_path, "bert")
    model, info = transformers.BertModel.from_pretrained(model_of.coded, output_loading_info=True)
    assert "cls.predictions.transform.dense.weight" in info["unexpected_keys"]
    assert not any("kvpack" in name for name in info["unexpected_keys"])
    assert len(coded_layers(model)) == 12


@pytest.mark.parametrize(("name", "pattern"), [("llama tied", "embed_tokens"), ("llama", "embed_tokens|lm_head")])
def test_coded_embeddings(tmp_path: Path, name: str, pattern: str) -> None:
    """An embedding stays coded, and so does the head; one that is tied to it has the same blob."""
    model_of = Directories(tmp_path, name, bits=4.25, tensor_bits={pattern: 6.0})
    model, dense = model_of.load(), model_of.load(model_of.dense)
    assert len(coded_layers(model)) == 15
    assert type(model.model.embed_tokens) is RansEmbedding
    assert (model.lm_head.prepare() is model.model.embed_tokens.prepare()) == ("tied" in name)
    assert torch.equal(model_of.logits(model), model_of.logits(dense))
    model.save_pretrained(tmp_path / "saved")
    kvpack.verify(tmp_path / "saved")
    assert torch.equal(model_of.logits(model_of.load(tmp_path / "saved")), model_of.logits(dense))


def test_tied_model_whose_file_has_two(tmp_path: Path) -> None:
    """Numbers that differ are not tied, though the config says so; the head stays coded, as in a model that is not."""
    model_of = Directories(tmp_path, "llama", bits=4.25, tensor_bits={"lm_head": 6.0})
    model = model_of.load(tie_word_embeddings=True)
    assert "lm_head" in coded_layers(model)
    assert torch.equal(model_of.logits(model), model_of.logits(model_of.load(model_of.dense)))
    model.tie_weights()
    plain = model.dequantize()
    assert torch.equal(model_of.logits(plain), model_of.logits(model_of.load(model_of.dense)))


def test_device_maps(directories: Callable[[str], Directories], tmp_path: Path) -> None:
    model_of = directories("llama tied")
    expected = model_of.logits(model_of.load())
    layers = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    maps: list[Any] = ["auto", "cpu", {"": "cpu"}, layers | {f"model.layers.{i}": "cpu" for i in range(2)}]
    for device_map in maps:
        model = model_of.load(device_map=device_map)
        assert len(coded_layers(model)) == 14
        assert torch.equal(model_of.logits(model), expected)


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("name", ["llama tied", "mixtral"])
def test_disk_offload(
    directories: Callable[[str], Directories], tmp_path: Path, name: str, offload_buffers: bool
) -> None:
    model_of = directories(name)
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu", "model.norm": "disk"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = model_of.load(device_map=places, offload_folder=tmp_path, offload_buffers=offload_buffers)
    assert len(coded_layers(model)) == CODED[name]
    expected = model_of.logits(model_of.load())
    for _ in range(2):
        assert torch.equal(model_of.logits(model), expected)


def test_all_on_disk(directories: Callable[[str], Directories], tmp_path: Path) -> None:
    model_of = directories("llama tied")
    model = model_of.load(device_map={"": "disk"}, offload_folder=tmp_path, offload_buffers=True)
    assert torch.equal(model_of.logits(model), model_of.logits(model_of.load()))


def spoil(path: Path, stored: str, offset: int) -> None:
    with kvpack.open(path) as reader:
        container = reader.containers[0]
        at = container.data_begin + container.tensors[stored].begin + offset
        file = container.path
    with file.open("r+b") as target:
        target.seek(at)
        byte = target.read(1)[0]
        target.seek(at)
        target.write(bytes([byte ^ 0x41]))


@pytest.mark.parametrize("where", [0, 40, -100])
@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.experts.1.w1.weight"])
def test_damage_is_found(directories: Callable[[str], Directories], tmp_path: Path, tensor: str, where: int) -> None:
    """Of layers that stay coded, and of experts that are decoded, for both know the tensor's name."""
    model_of = directories("mixtral")
    shutil.copytree(model_of.coded, tmp_path / "coded")
    with kvpack.open(tmp_path / "coded") as reader:
        names = [name for name in reader if reader.info(name) is not None]
        stored = next(name for name in names if "q_proj" in name) if "up_proj" in tensor else names[-3]
        size = reader.container(stored).tensors[f"{stored}_kvpack"].size_bytes
    spoil(tmp_path / "coded", f"{stored}_kvpack", where % size)
    for dequantize in (False, True):
        config = transformers.AutoConfig.from_pretrained(tmp_path / "coded")
        config.quantization_config["dequantize"] = dequantize
        with pytest.raises(FormatError, match=stored.replace(".", r"\.")):
            model_of.load(tmp_path / "coded", config=config)


def test_other_shapes_are_refused(directories: Callable[[str], Directories]) -> None:
    model_of = directories("llama")
    config = transformers.AutoConfig.from_pretrained(model_of.coded, intermediate_size=192)
    with pytest.raises(ModelMismatchError, match=r"mlp\.\w+_proj\.weight is \[\d+, \d+\] in the file"):
        model_of.load(config=config)


def test_tensor_parallelism_is_refused(directories: Callable[[str], Directories]) -> None:
    config = transformers.AutoConfig.from_pretrained(directories("llama").coded)
    config.distributed_config = {"tp_size": 2}
    with pytest.raises(InputError, match="tensor parallelism"):
        directories("llama").load(config=config)


def test_unknown_version_of_the_format(directories: Callable[[str], Directories]) -> None:
    config = transformers.AutoConfig.from_pretrained(directories("llama").coded)
    config.quantization_config["format_version"] = 9
    with pytest.raises(kvpack.errors.DirectoryIndexError, match="format_version 9"):
        directories("llama").load(config=config)


def test_moves_and_copies(directories: Callable[[str], Directories]) -> None:
    model_of = directories("llama")
    model = model_of.load()
    twin = copy.deepcopy(model)
    assert twin.save_pretrained.model is twin
    half = twin.to(torch.bfloat16)
    assert half.model.norm.weight.dtype == torch.bfloat16
    assert half.model.layers[0].mlp.up_proj.weight_kvpack_scale.dtype == torch.float32
    difference = (model_of.logits(half).float() - model_of.logits(model)).abs().max()
    assert 0 < float(difference) < 0.05
    with pytest.raises(ValueError, match="not supported for quantized model"):
        model.half()


def test_push_to_hub_uploads_a_finished_directory(
    directories: Callable[[str], Directories], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = directories("llama").load()
    pushed = []
    monkeypatch.setattr(type(model), "push_to_hub", lambda self, repo_id, **options: pushed.append((repo_id, options)))
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="one/model", token="t")
    assert pushed == [("one/model", {"token": "t"})]
    kvpack.verify(tmp_path / "saved")


ALREADY = "ignore:You passed `quantization_config`:UserWarning"


@pytest.mark.filterwarnings(ALREADY)
def test_what_is_kept_in_fp32_stays_so(tmp_path: Path) -> None:
    """T5's `wo` where the rest is fp16: of a decoded layer as of a dense model's."""
    model_of = Directories(tmp_path, "t5")
    dense = model_of.load(model_of.dense, dtype=torch.float16)
    model = model_of.load(dtype=torch.float16, quantization_config=kvpack.KVPackConfig(dequantize=True))
    types = {name: tensor.dtype for name, tensor in dense.state_dict().items()}
    assert torch.float32 in types.values()
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == types
    assert bytes_of(model.state_dict()) == bytes_of(dense.state_dict())


@pytest.mark.filterwarnings(ALREADY)
def test_config_for_a_compressed_model(directories: Callable[[str], Directories]) -> None:
    """What concerns loading counts; that the rest does not, transformers says."""
    model_of = directories("llama")
    modules = ["model.layers.0"]
    model = model_of.load(quantization_config=kvpack.KVPackConfig(bits=3, modules_to_not_convert=modules))
    assert coded_layers(model) == [name for name in coded_layers(model_of.load()) if ".layers.1." in name]
    assert model.config.quantization_config.options["bits"] == 4.25
    with pytest.warns(UserWarning, match="already has a `quantization_config` attribute"):
        assert len(coded_layers(model_of.load(quantization_config=kvpack.KVPackConfig(bits=3)))) == 14
    body = transformers.AutoModel.from_pretrained(
        model_of.coded, quantization_config=kvpack.KVPackConfig(modules_to_not_convert=modules)
    )
    assert len(coded_layers(body)) == 7
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM has no module model\.layer\.0$"):
        model_of.load(quantization_config=kvpack.KVPackConfig(modules_to_not_convert=["model.layer.0"]))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("modules_to_not_convert", "lm_head"),
        ("modules_to_not_convert", [3]),
        ("dequantize", "false"),
        ("blob_bytes", [1]),
        ("options", "x"),
    ],
)
def test_types_of_options(option: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{option} of a KVPackConfig is "):
        kvpack.KVPackConfig(**{option: value})


def test_config_keys_do_not_replace_methods(directories: Callable[[str], Directories]) -> None:
    config = transformers.AutoConfig.from_pretrained(directories("llama").coded)
    config.quantization_config |= {"to_dict": 3, "of_a_later_version": 4}
    loaded = directories("llama").load(config=config).config.quantization_config.to_dict()
    assert loaded["of_a_later_version"] == 4
    assert "to_dict" not in loaded


def test_damage_of_plain_tensors_is_found(directories: Callable[[str], Directories], tmp_path: Path) -> None:
    shutil.copytree(directories("llama").coded, tmp_path / "coded")
    spoil(tmp_path / "coded", "model.embed_tokens.weight", 5)
    with pytest.raises(FormatError, match=r"model\.embed_tokens\.weight"):
        directories("llama").load(tmp_path / "coded")


def test_shards_of_a_variant(directories: Callable[[str], Directories], tmp_path: Path) -> None:
    """Their index has another kind of name."""
    model_of = directories("llama")
    model = model_of.load()
    model.save_pretrained(tmp_path, max_shard_size="60KB", variant="fp16")
    again = model_of.load(tmp_path, variant="fp16")
    assert bytes_of(again.state_dict()) == bytes_of(model.state_dict())


def test_save_in_place_of_other_shards(directories: Callable[[str], Directories], tmp_path: Path) -> None:
    """Into the directory that it was loaded from. What was there must not be taken for what is there now."""
    model_of = directories("llama tied")
    model_of.load().save_pretrained(tmp_path)
    for size, files in (("60KB", 3), ("5GB", 1), ("60KB", 3)):
        model = model_of.load(tmp_path)
        with torch.no_grad():
            model.model.norm.weight += 1
        model.save_pretrained(tmp_path, max_shard_size=size)
        assert len(list(tmp_path.glob("*.safetensors"))) == files
        assert len(list(tmp_path.glob("*.index.json"))) == (files > 1)
        kvpack.verify(tmp_path)
        assert bytes_of(model_of.load(tmp_path).state_dict()) == bytes_of(model.state_dict())


def test_save_twice_within_a_tick(
    directories: Callable[[str], Directories], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File systems have clocks of up to two seconds: times do not tell what was written."""
    model = directories("llama").load()
    save = type(model).save_pretrained

    def at_the_same_time(self: Any, directory: Path, **options: Any) -> None:
        save(self, directory, **options)
        for file in directory.iterdir():
            os.utime(file, (1, 1))

    model.save_pretrained(tmp_path)
    for file in tmp_path.iterdir():
        os.utime(file, (1, 1))
    monkeypatch.setattr(type(model), "save_pretrained", at_the_same_time)
    model.save_pretrained(tmp_path)
    kvpack.verify(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["transformers_weights"] == GUARD


def test_offloaded_layers_are_not_decoded(directories: Callable[[str], Directories], tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model_of = directories("llama")
    model = model_of.load(device_map=places, offload_folder=tmp_path)
    with pytest.raises(InputError, match=r"weights of model\.layers\.1\.self_attn\.q_proj, .* and 4 more on"):
        model.dequantize()
    assert len(coded_layers(model)) == 14
    assert torch.equal(model_of.logits(model), model_of.logits(model_of.load()))


def test_a_state_dict_is_refused(directories: Callable[[str], Directories]) -> None:
    model = directories("llama").load()
    config = transformers.AutoConfig.from_pretrained(directories("llama").coded)
    with pytest.raises(InputError, match="not a state_dict"):
        type(model).from_pretrained(None, config=config, state_dict=model.state_dict())


def test_experts_without_weights(tmp_path: Path) -> None:
    """LongCat's: `gate_up_proj` has rows for them, `down_proj` has none."""
    sizes = dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 32)
    config = transformers.LongcatFlashConfig(
        vocab_size=160,
        hidden_size=64,
        num_layers=1,
        num_attention_heads=2,
        ffn_hidden_size=128,
        expert_ffn_hidden_size=64,
        n_routed_experts=4,
        zero_expert_num=2,
        moe_topk=2,
        head_dim=32,
        **sizes,
    )
    torch.manual_seed(0)
    transformers.LongcatFlashForCausalLM(config).save_pretrained(tmp_path / "plain")
    kvpack.compress(tmp_path / "plain", tmp_path / "coded", kvpack.QuantConfig(bits=4.25))
    kvpack.decompress(tmp_path / "coded", tmp_path / "dense")
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        coded, dense = (
            transformers.LongcatFlashForCausalLM.from_pretrained(tmp_path / name)(ids).logits
            for name in ("coded", "dense")
        )
    assert torch.equal(coded, dense)


HUB = """
import sys, transformers
print(type(transformers.AutoConfig.from_pretrained("one/model", cache_dir=sys.argv[1])).__name__)
try:
    transformers.AutoModelForCausalLM.from_pretrained("one/model", cache_dir=sys.argv[1])
except ValueError as error:
    print(error)
import kvpack
model = transformers.AutoModelForCausalLM.from_pretrained("one/model", cache_dir=sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""


def test_repository_in_the_hub_cache(directories: Callable[[str], Directories], tmp_path: Path) -> None:
    """By its name: its config is read without kvpack, its weights are not, and afterwards they are."""
    home = tmp_path / "models--one--model"
    snapshot = home / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0a1b")
    for number, file in enumerate(sorted(directories("llama").coded.iterdir())):
        shutil.copy(file, home / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HUB, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    config, sentence, layer = done.stdout.splitlines()
    assert (config, layer) == ("LlamaConfig", "RansLinear")
    assert sentence.endswith(GUARD)


def test_column_scales_and_row_offsets(tmp_path: Path) -> None:
    """Loaded, merged into plain weights, offloaded, and saved again with all that stands beside the blobs."""
    model_of = Directories(tmp_path, "llama")
    rng = np.random.default_rng(1)
    with kvpack.open(model_of.plain) as reader:
        shapes = {name: reader.stored(name).shape for name in reader if name.endswith("proj.weight")}
    columns = {name: rng.lognormal(0, 0.5, shape[1]).astype(np.float16) for name, shape in shapes.items()}
    offsets = {name: rng.normal(0, 0.01, shape[0]).astype(np.float32) for name, shape in shapes.items()}
    shutil.rmtree(model_of.coded)
    shutil.rmtree(model_of.dense)
    config = kvpack.QuantConfig(bits=6)
    compress(model_of.plain, model_of.coded, config, column_scales=columns, row_offsets=offsets)
    kvpack.decompress(model_of.coded, model_of.dense)
    expected = model_of.logits(model_of.load(model_of.dense))
    model = model_of.load()
    assert len(coded_layers(model)) == CODED["llama"]
    torch.testing.assert_close(model_of.logits(model), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    assert kvpack.verify(tmp_path / "saved", model_of.plain).mismatches == {}
    with kvpack.open(tmp_path / "saved") as reader:
        info = reader.info(min(shapes))
        assert info is not None
        assert (info.has_column_scales, info.has_row_offsets) == (True, True)
    again = model_of.load(tmp_path / "saved")
    assert bytes_of(again.state_dict()) == bytes_of(model.state_dict())
    assert torch.equal(model_of.logits(again.dequantize()), expected)
    on_disk = model_of.load(device_map={"": "disk"}, offload_folder=tmp_path / "offloaded", offload_buffers=True)
    torch.testing.assert_close(model_of.logits(on_disk), expected, rtol=1e-4, atol=1e-5)
