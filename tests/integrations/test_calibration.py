"""Calibration: second moments and sensitivities against plain runs of the whole model, texts, resuming."""

from __future__ import annotations

from collections.abc import Callable
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
from kvpack.integrations.transformers.calibration import _label_gradient, _uniform, calibrate

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
    for window, row in enumerate(ids):
        embedded = model.get_input_embeddings()(row[None]).requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        logits.backward(_label_gradient(logits.detach(), _uniform(SEED, window, len(row))))
    return {name: (h.numpy() / n, s.numpy() / n, n) for name, (h, s, n) in sums.items()}


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
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
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
            assert (moments.second_moment(name) == full.second_moment(name)).all()
