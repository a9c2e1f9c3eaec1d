"""Text of a model's own: that it is drawn from what the model says, how it begins, and that a killed run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from models import ARCHITECTURES
from tiny_text_model import TEMPLATE, write_model, write_tokenizer

from kvpack.encode.moments import Moments
from kvpack.encode.progress import Progress
from kvpack.integrations.transformers import calibration
from kvpack.integrations.transformers.calibration import calibrate
from kvpack.integrations.transformers.own_samples import draw, label_gradient, starts, uniform, write_windows


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 2.0, -1.0, float("-inf"), 1.0]])
    at = uniform(40_000, "test")
    tokens, share = draw(logits.expand(len(at), -1), at)
    counts = np.bincount(tokens.numpy(), minlength=5) / len(at)
    assert counts == pytest.approx(share[0].numpy(), abs=0.01)  # four standard errors
    assert counts[3] == 0
    assert draw(logits, torch.ones(1, dtype=torch.float64))[0].tolist() == [4]


def test_label_gradient_is_that_of_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(11, 7, dtype=torch.float64, requires_grad=True)
    at = uniform(11, "labels")
    labels, _ = draw(logits.detach(), at)
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    assert logits.grad is not None
    assert label_gradient(logits.detach(), at).numpy() == pytest.approx(logits.grad.numpy(), abs=1e-12)
    monkeypatch.setattr("kvpack.integrations.transformers.own_samples._CHUNK_BYTES", 3 * 8 * 7)
    assert label_gradient(logits.detach(), at).numpy() == pytest.approx(logits.grad.numpy(), abs=1e-12)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
def test_each_token_is_drawn_from_what_the_model_says_of_those_before(architecture: str) -> None:
    """Windows begin with one token, three and none, side by side; Mistral's attention has a window of 16."""
    model = ARCHITECTURES[architecture].model()
    begins, told = [[5], [7, 8, 9], []], []
    ids = write_windows(model, begins, 24, "seed", told.append)
    assert [ids[row, : len(begin)].tolist() for row, begin in enumerate(begins)] == begins
    assert told == [3] * 24
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    for position in range(3, 24):
        expected, _ = draw(logits[:, position - 1], uniform(3, "next", "seed", position - 1))
        assert ids[:, position].tolist() == expected.tolist()
    assert torch.equal(ids, write_windows(model, begins, 24, "seed", told.append))
    assert not torch.equal(ids, write_windows(model, begins, 24, "other", told.append))


def test_starts(tmp_path: Path) -> None:
    write_model(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)

    def found(**options: Any) -> list[list[int]]:
        write_tokenizer(tmp_path, **options)
        return starts(transformers.AutoTokenizer.from_pretrained(tmp_path), config)

    assert found() == [[0]]  # the model's first token
    assert found(begins=True) == [[0]]
    first, chat = found(template=TEMPLATE)
    assert first == [0]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).decode(chat) == "[user] "
    assert found(template="{{ raise_exception('no') }}") == [[0]]
    config.bos_token_id = None
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.bos_token = None
    assert starts(tokenizer, config) == []


class KilledError(Exception):
    """In place of a kill."""


def test_calibration_on_text_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "ROWS", 2)
    directory = write_model(tmp_path / "model")
    write_tokenizer(directory, template=TEMPLATE)
    options: dict[str, Any] = {"tokens": 5 * 24, "window": 24, "seed": 3}
    report = calibrate(directory, None, tmp_path / "a.safetensors", **options)
    assert (report.windows, report.tokens) == (5, 120)
    with Moments(report.output) as moments:
        assert moments.made["text"] is None
        assert moments.token_counts.sum() == 120
        assert moments.token_counts[0] >= 3  # every second window begins with it
        assert moments.tokens("lm_head.weight").tolist() == [120]
    done = 0

    def kill(size: int) -> None:
        nonlocal done
        done += size
        if done > 80:  # in the second of three batches
            raise KilledError

    output = tmp_path / "b.safetensors"
    with pytest.raises(KilledError):
        calibrate(directory, None, output, **options, progress=Progress(advance=kill))
    told: list[int] = []
    total: list[int] = []
    again = calibrate(directory, None, output, **options, progress=Progress(total.append, told.append))
    assert again.resumed
    assert told[0] == 48  # the first batch is there
    assert total == [sum(told)] == [120 * 6]
    assert output.read_bytes() == Path(report.output).read_bytes()
