"""Calibration: second moments and sensitivities against plain runs of the whole model, texts, resuming."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from models import ARCHITECTURES
from safetensors import safe_open
from tiny_text_model import write_novel, write_tokenizer

from kvpack.encode.moments import Moments
from kvpack.encode.progress import Progress
from kvpack.integrations.transformers import calibration_run, layer_by_layer
from kvpack.integrations.transformers.calibration import calibrate
from kvpack.integrations.transformers.layer_by_layer import NotLayerByLayerError
from kvpack.integrations.transformers.own_samples import label_gradient, uniform

WINDOW = 48
TOKENS = 4 * WINDOW
SEED = 5


@pytest.fixture(scope="module")
def novel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_novel(tmp_path_factory.mktemp("text"))


def windows_by_hand(directory: Path, text: Path) -> Any:
    """i64 [windows, tokens], at equal distances over the text."""
    ids = transformers.AutoTokenizer.from_pretrained(directory)(text.read_text(), verbose=False).input_ids
    available, taken = len(ids) // WINDOW, TOKENS // WINDOW
    chosen = [i * available // taken for i in range(taken)]
    return torch.tensor([ids[i * WINDOW : (i + 1) * WINDOW] for i in chosen])


def plain_run(model: Any, ids: Any) -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    """Of each linear of a model: fp64 mean of x xᵀ, mean of squared gradients at its outputs, tokens; by hooks."""
    model = model.double().requires_grad_(False)
    sums: dict[str, list[Any]] = {}

    def hook(name: str) -> Callable[..., None]:
        def note(module: Any, inputs: Any, output: Any) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            one = sums.setdefault(name, [0, 0, 0])
            one[0] = one[0] + x.T @ x
            one[2] += len(x)
            output.register_hook(lambda g: one.__setitem__(1, one[1] + g.square().reshape(-1, g.shape[-1]).sum(0)))

        return note

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            module.register_forward_hook(hook(f"{name}.weight"))
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    for window, row in enumerate(ids):
        logits = model(input_ids=row[None], use_cache=False).logits
        logits.backward(label_gradient(logits.detach()[0], uniform(len(row), "labels", SEED, window))[None])
    return {name: (h.numpy() / n, s.numpy() / n, n) for name, (h, s, n) in sums.items()}


def row_gradients(model: Any, ids: Any) -> np.ndarray:
    """fp64 mean of g gᵀ, g = d loss / d row that was looked up, by plain runs: its table gets a row for each place."""
    model = model.double().requires_grad_(False)
    embedding = model.get_input_embeddings()
    table, total = embedding.weight, 0
    for window, row in enumerate(ids):
        rows = table[row].clone().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            original = torch.nn.functional.embedding
            patch.setattr(
                torch.nn.functional,
                "embedding",
                lambda given, weight, *rest, rows=rows, original=original, **options: (
                    rows[None] if weight is table else original(given, weight, *rest, **options)
                ),
            )
            logits = model(input_ids=row[None], use_cache=False).logits
        logits.backward(label_gradient(logits.detach()[0], uniform(len(row), "labels", SEED, window))[None])
        total = total + rows.grad.T @ rows.grad
    return total.numpy() / ids.numel()


def save(architecture: str, directory: Path, **options: Any) -> Path:
    ARCHITECTURES[architecture].save(directory, **options)
    write_tokenizer(directory)
    return directory


DENSE = ["llama", "llama tied", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "mistral"]


@pytest.mark.parametrize("architecture", DENSE)
def test_moments_and_sensitivities_are_those_of_a_plain_run(architecture: str, tmp_path: Path, novel: Path) -> None:
    directory = save(architecture, tmp_path / "model", attn_implementation="eager")
    report = calibrate(
        directory, novel, tmp_path / "m.safetensors", tokens=TOKENS, window=WINDOW, seed=SEED, dtype="float32"
    )
    assert (report.windows, report.tokens, report.left_out) == (4, TOKENS, {})
    # With the attention that transformers takes by itself: SDPA of 5.17 leaves Gemma 2's soft cap out.
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    plain = plain_run(model, windows_by_hand(directory, novel))
    with Moments(report.output) as moments, safe_open(directory / "model.safetensors", "np") as stored:
        for name, (second_moment, squares, tokens) in plain.items():
            name = name if name in stored.keys() else TIED[architecture]  # noqa: SIM118
            assert moments.tokens(name).tolist() == [tokens]
            found = moments.second_moment(name)
            assert np.abs(found - second_moment).max() <= 2e-5 * np.abs(second_moment).max(), name
            assert (found == found.T).all()
            sensitivity = moments.sensitivity(name)
            assert sensitivity is not None
            assert sensitivity == pytest.approx(squares, rel=1e-3, abs=1e-4 * squares.max()), name
        assert len(moments.names) == len(plain)
        table = "transformer.wte.weight" if architecture == "gpt2" else "model.embed_tokens.weight"
        gradients = moments.gradient_moment(table)
        assert gradients is not None
        expected = row_gradients(model, windows_by_hand(directory, novel))
        assert np.abs(gradients - expected).max() <= 1e-3 * np.abs(expected).max()
        assert all(moments.gradient_moment(name) is None for name in moments.names if name != table)


TIED = {"llama tied": "model.embed_tokens.weight", "qwen3": "model.embed_tokens.weight"}
TIED |= {"gemma2": "model.embed_tokens.weight", "gemma3": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}


class KilledError(Exception):
    """In place of a kill."""


def killing_at(tokens: int) -> Progress:
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        if done >= tokens:
            raise KilledError

    return Progress(advance=advance)


@pytest.mark.parametrize("windows_done", [1, 5, 9, 13, 18])
def test_a_run_that_was_killed_goes_on_and_gives_the_same_bytes(windows_done: int, tmp_path: Path, novel: Path) -> None:
    directory = save("llama", tmp_path / "model")
    options: dict[str, Any] = {"tokens": TOKENS, "window": WINDOW, "seed": SEED}
    whole = calibrate(directory, novel, tmp_path / "whole.safetensors", **options)
    output = tmp_path / "m.safetensors"
    with pytest.raises(KilledError):
        calibrate(directory, novel, output, **options, progress=killing_at(windows_done * WINDOW))
    assert not output.exists()
    told: list[int] = []
    report = calibrate(directory, novel, output, **options, progress=Progress(advance=told.append))
    assert report.resumed
    assert not whole.resumed
    # What is finished is not run again: two layers forward, the output layer, two layers back; four windows each.
    assert told.count(TOKENS) == windows_done // 4
    assert sum(told) == 5 * TOKENS
    assert output.read_bytes() == Path(whole.output).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors", "model", "whole.safetensors"]


def test_other_inputs_begin_anew(tmp_path: Path, novel: Path) -> None:
    directory = save("llama", tmp_path / "model")
    output = tmp_path / "m.safetensors"
    options: dict[str, Any] = {"tokens": TOKENS, "window": WINDOW}
    with pytest.raises(KilledError):
        calibrate(directory, novel, output, **options, seed=1, progress=killing_at(9 * WINDOW))
    report = calibrate(directory, novel, output, **options, seed=2)
    assert not report.resumed
    other = calibrate(directory, novel, tmp_path / "other.safetensors", **options, seed=2)
    assert output.read_bytes() == Path(other.output).read_bytes()


def test_without_sensitivities(tmp_path: Path, novel: Path) -> None:
    directory = save("llama", tmp_path / "model")
    options: dict[str, Any] = {"tokens": TOKENS, "window": WINDOW}
    both = calibrate(directory, novel, tmp_path / "both.safetensors", **options)
    report = calibrate(directory, novel, tmp_path / "m.safetensors", **options, sensitivities=False)
    with Moments(report.output) as moments, Moments(both.output) as full:
        assert moments.names == full.names
        for name in moments.names:
            assert moments.sensitivity(name) is None
            assert moments.gradient_moment("model.embed_tokens.weight") is None
            assert (moments.second_moment(name) == full.second_moment(name)).all()


EXPERTS = ["mixtral", "qwen3 moe", "gpt oss", "deepseek v3"]


def experts_by_hand(model: Any, ids: Any) -> dict[str, list[Any]]:
    """Of each product that an expert's matrix is in: inputs and gradients at outputs, [tokens, …] in fp64, by windows.

    Keys are of the model's tensor and the expert: ``model.layers.1.mlp.experts.down_proj/3``.
    """
    model = model.double().requires_grad_(False)
    model.set_experts_implementation("eager")
    names = {id(tensor): name for name, tensor in model.named_parameters() if tensor.ndim == 3}
    found: dict[str, list[Any]] = {}

    class Matrix:
        def __init__(self, key: str, tensor: Any) -> None:
            self.key, self.tensor = key, tensor

        def product(self, x: Any, y: Any) -> Any:
            found.setdefault(self.key, []).append([x.detach().clone(), None])
            y.register_hook(lambda g: found[self.key][-1].__setitem__(1, g.clone()))
            return y

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            x, matrix = args[:2]
            return matrix.product(x, function(x, matrix.tensor))

        def __rmatmul__(self, x: Any) -> Any:
            return self.product(x, x @ self.tensor)

    class Stack:
        def __init__(self, name: str, tensor: Any) -> None:
            self.name, self.tensor = name, tensor

        def __getitem__(self, expert: Any) -> Matrix:
            return Matrix(f"{self.name}/{int(expert)}", self.tensor[expert])

    for module in model.modules():
        for key, tensor in list(module._parameters.items()):
            if id(tensor) in names:
                del module._parameters[key]
                module.__dict__[key] = Stack(names[id(tensor)], tensor)
    for window, row in enumerate(ids):
        embedded = model.get_input_embeddings()(row[None]).requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        at = uniform(len(row), "labels", SEED, window)
        logits.backward(label_gradient(logits.detach()[0], at)[None])
    return found


# By a tensor of the checkpoint: the model's tensor and expert, and the rows of that; or all of the model's tensor.
def places(architecture: str, layer: int, expert: int) -> dict[str, tuple[str, slice]]:
    block = f"model.layers.{layer}"
    if architecture == "mixtral":
        stored, model, names = f"{block}.block_sparse_moe.experts.{expert}", f"{block}.mlp.experts", ("w1", "w3", "w2")
        width = 128
    else:
        stored, model = f"{block}.mlp.experts.{expert}", f"{block}.mlp.experts"
        names, width = ("gate_proj", "up_proj", "down_proj"), 64
    rows = (slice(width), slice(width, 2 * width), slice(None))
    of = (f"{model}.gate_up_proj/{expert}", f"{model}.gate_up_proj/{expert}", f"{model}.down_proj/{expert}")
    return {f"{stored}.{name}.weight": place for name, place in zip(names, zip(of, rows, strict=True), strict=True)}


@pytest.mark.parametrize("architecture", EXPERTS)
def test_experts_have_moments_of_the_tokens_routed_to_them(architecture: str, tmp_path: Path, novel: Path) -> None:
    directory = save(architecture, tmp_path / "model", attn_implementation="eager")
    report = calibrate(
        directory, novel, tmp_path / "m.safetensors", tokens=TOKENS, window=WINDOW, seed=SEED, dtype="float32"
    )
    assert report.whole_model is None
    assert not report.left_out
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    found = experts_by_hand(model, windows_by_hand(directory, novel))
    assert len(found) >= 8
    of_layer: dict[str, list[Any]] = {}
    for key, products in found.items():
        of_layer.setdefault(key.rpartition("/")[0], []).extend(product[0] for product in products)
    routed = 0
    with Moments(report.output) as moments:
        for key, products in found.items():
            x, g = (torch.cat([product[at] for product in products]) for at in (0, 1))
            name, expert = key.rpartition("/")[::2]
            if architecture == "gpt oss":
                stored = {name: slice(None)}
                matrix = int(expert)
            else:
                of = places(architecture, int(name.split(".")[2]), int(expert))
                stored = {one: rows for one, (place, rows) in of.items() if place == key}
                matrix = 0
            assert stored
            for one, rows in stored.items():
                assert moments.tokens(one)[matrix] == len(x)
                # As if an expert had met tokens of all of its layer's, half as many as it has inputs.
                inputs, all_x = x.shape[1], torch.cat(of_layer[name])
                lent = inputs / 2 * (all_x.T @ all_x / len(all_x))
                second_moment = ((x.T @ x + lent) / (len(x) + inputs / 2)).numpy()
                error = np.abs(moments.second_moment(one, matrix) - second_moment).max()
                assert error <= 2e-5 * np.abs(second_moment).max()
                sensitivity = moments.sensitivity(one)
                assert sensitivity is not None
                squares = g.square().mean(0)[rows].numpy()
                values = sensitivity[matrix] if architecture == "gpt oss" else sensitivity
                assert values == pytest.approx(squares, rel=1e-3, abs=1e-4 * squares.max())
            routed += len(x) if "down" in key else 0
        layers = 1 if architecture == "deepseek v3" else 2
        assert routed == layers * 2 * TOKENS  # each token to two experts a layer
    assert report.untouched == 0


def test_experts_that_meet_no_token(tmp_path: Path, novel: Path) -> None:
    directory = save("qwen3 moe", tmp_path / "model", num_experts=32)
    report = calibrate(directory, novel, tmp_path / "m.safetensors", tokens=8, window=8)
    assert report.untouched > 0
    with Moments(report.output) as moments:
        names = [name for name in moments.names if "down_proj" in name]
        assert len(names) == 2 * 32
        none = [name for name in names if not moments.tokens(name)[0]]
        assert none
        assert all((moments.second_moment(name) == 0).all() for name in none)
        assert sum(int(moments.tokens(name)[0]) for name in names) == 2 * 2 * 8


@pytest.mark.parametrize("architecture", ["llama tied", "gpt2", "mixtral"])
def test_the_whole_model_gives_what_its_layers_give(
    architecture: str, tmp_path: Path, novel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save(architecture, tmp_path / "model")
    options: dict[str, Any] = {"tokens": TOKENS, "window": WINDOW, "seed": SEED}
    one_by_one = calibrate(directory, novel, tmp_path / "layers.safetensors", **options)

    def refuse(*_: object) -> None:
        raise NotLayerByLayerError("its layers share a secret")

    monkeypatch.setattr(calibration_run, "LayerByLayer", refuse)
    whole = calibrate(directory, novel, tmp_path / "whole.safetensors", **options)
    assert (one_by_one.whole_model, whole.whole_model) == (None, "its layers share a secret")
    with Moments(whole.output) as moments, Moments(one_by_one.output) as other:
        assert moments.names == other.names
        assert moments.made["whole_model"] == "its layers share a secret"
        for name in moments.names:
            assert moments.tokens(name).tolist() == other.tokens(name).tolist()
            second_moment = other.second_moment(name)
            assert np.abs(moments.second_moment(name) - second_moment).max() <= 1e-5 * np.abs(second_moment).max()
            a, b = moments.sensitivity(name), other.sensitivity(name)
            assert a is not None
            assert b is not None
            assert a == pytest.approx(b, rel=1e-3, abs=1e-4 * float(b.max()))
        table = "transformer.wte.weight" if architecture == "gpt2" else "model.embed_tokens.weight"
        gradients, others = moments.gradient_moment(table), other.gradient_moment(table)
        assert gradients is not None
        assert others is not None
        assert np.abs(gradients - others).max() <= 1e-3 * np.abs(others).max()


def test_layers_that_share_state_are_found(tmp_path: Path, novel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second layer adds what the first one has kept: one by one, it would be that of another window."""
    directory = save("llama", tmp_path / "model")
    layer = transformers.models.llama.modeling_llama.LlamaDecoderLayer
    forward, kept = layer.forward, {}

    def sharing(self: Any, hidden_states: Any, *args: Any, **keywords: Any) -> Any:
        if self.self_attn.layer_idx == 0:
            kept["hidden"] = hidden_states
        return forward(self, hidden_states, *args, **keywords) + kept["hidden"]

    monkeypatch.setattr(layer, "forward", sharing)
    report = calibrate(directory, novel, tmp_path / "m.safetensors", tokens=TOKENS, window=WINDOW, seed=SEED)
    assert report.whole_model == "one by one, its layers give other hidden states than its own forward pass"
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    plain = plain_run(model, windows_by_hand(directory, novel))
    with Moments(report.output) as moments:
        for name, (second_moment, squares, _) in plain.items():
            found = moments.second_moment(name)
            assert np.abs(found - second_moment).max() <= 1e-4 * np.abs(second_moment).max()
            assert moments.sensitivity(name) == pytest.approx(squares, rel=1e-2, abs=1e-3 * squares.max())


def test_one_layer_at_a_time_is_on_the_device(tmp_path: Path, novel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of layers, as on a GPU: they are let go of before the next one is made."""
    directory = save("llama", tmp_path / "model", num_hidden_layers=4)
    whole = calibrate(directory, novel, tmp_path / "layers.safetensors", tokens=TOKENS, window=WINDOW)
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    @contextmanager
    def placed(layer: Any, device: Any) -> Iterator[Any]:
        nonlocal most
        copied = copy.deepcopy(layer)
        alive.add(copied)
        most = max(most, len(alive))
        yield copied

    monkeypatch.setattr(layer_by_layer, "placed", placed)
    report = calibrate(directory, novel, tmp_path / "m.safetensors", tokens=TOKENS, window=WINDOW)
    assert report.whole_model is None
    assert most == 1
    assert Path(report.output).read_bytes() == Path(whole.output).read_bytes()


def test_weights_that_are_multiplied_otherwise_are_named(
    tmp_path: Path, novel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save("llama", tmp_path / "model")

    def forward(self: Any, x: Any) -> Any:
        inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return torch.einsum("...k,rk->...r", inner, self.down_proj.weight)

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward", forward)
    report = calibrate(directory, novel, tmp_path / "m.safetensors", tokens=WINDOW, window=WINDOW)
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]
    assert report.left_out == dict.fromkeys(names, "no product with it was seen")
    with Moments(report.output) as moments:
        assert not set(names) & set(moments.names)
        assert moments.made["left_out"] == report.left_out


def test_a_model_whose_layers_share_keys_and_values(tmp_path: Path, novel: Path) -> None:
    """Gemma 3n: two of four layers read keys and values of others, and each is given its own embedding of the text."""
    config = transformers.Gemma3nTextConfig(
        vocab_size=160,
        vocab_size_per_layer_input=160,
        hidden_size=64,
        hidden_size_per_layer_input=8,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        sliding_window=16,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 4,
        max_position_embeddings=320,
        attn_implementation="eager",
    )
    directory = tmp_path / "model"
    torch.manual_seed(0)
    transformers.Gemma3nForCausalLM(config).save_pretrained(directory)
    write_tokenizer(directory)
    options: dict[str, Any] = {"tokens": TOKENS, "window": WINDOW, "seed": SEED, "dtype": "float32"}
    report = calibrate(directory, novel, tmp_path / "m.safetensors", **options)
    assert report.whole_model is not None
    assert not report.left_out
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    plain = plain_run(model, windows_by_hand(directory, novel))
    with Moments(report.output) as moments, safe_open(directory / "model.safetensors", "np") as stored:
        assert len(moments.names) == len(plain)
        for name, (second_moment, squares, tokens) in plain.items():
            name = name if name in stored.keys() else "model.embed_tokens.weight"  # noqa: SIM118
            assert moments.tokens(name).tolist() == [tokens]
            assert np.abs(moments.second_moment(name) - second_moment).max() <= 1e-4 * np.abs(second_moment).max(), name
            assert moments.sensitivity(name) == pytest.approx(squares, rel=1e-2, abs=1e-3 * squares.max()), name
