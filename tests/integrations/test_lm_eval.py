"""lm-evaluation-harness on a coded model that was loaded with ``from_pretrained``: a task of this file, no network.

The package is no part of the tests' environment, since it brings some 60 others. In an environment of its own::

    pip install '.[transformers]' 'lm_eval>=0.4.13' pytest hypothesis
    pytest tests/integrations/test_lm_eval.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("lm_eval", reason="lm_eval is not installed (see the top of this file)")

from tiny_text_model import text, write_model  # noqa: E402

import kvpack  # noqa: E402

# Of lm_eval and what it imports.
pytestmark = pytest.mark.filterwarnings("ignore")

QUESTIONS = [
    {"question": "the old house", "choices": [" was light", " and then", " under a river"], "answer": 0},
    {"question": "rain walked", "choices": [" into the night", " said", " the the"], "answer": 1},
    {"question": "a young river", "choices": [" stood", " looked over", " light rain"], "answer": 2},
]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A coded model, and the same numbers as an ordinary one."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "original", dtype="bfloat16")
    kvpack.compress(folder / "original", folder / "coded", kvpack.QuantConfig(bits=4.25, include=["proj"]))
    kvpack.decompress(folder / "coded", folder / "decoded")
    return folder / "coded", folder / "decoded"


def evaluated(directory: Path, folder: Path) -> Any:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    (folder / "choice.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (folder / "text.jsonl").write_text(json.dumps({"text": text(100, seed=2)}) + "\n")
    common = {"dataset_path": "json", "test_split": "test"}

    def files(name: str) -> dict[str, Any]:
        return {"data_files": {"test": str(folder / name)}, "cache_dir": str(folder / "cache")}

    choice = {
        "task": "kvpack_choice",
        "dataset_kwargs": files("choice.jsonl"),
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "target_delimiter": "",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    rolling = {
        "task": "kvpack_text",
        "dataset_kwargs": files("text.jsonl"),
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    for task in (choice, rolling):  # JSON is YAML
        (folder / f"{task['task']}.yaml").write_text(json.dumps(common | task))
    result = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2),
        tasks=["kvpack_choice", "kvpack_text"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
        log_samples=True,
    )
    assert result is not None
    return result, model, tokenizer


def test_a_coded_model_in_lm_eval(
    directories: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-likelihoods are those of the coded model itself, and of the same numbers in an ordinary one."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    coded, model, tokenizer = evaluated(directories[0], tmp_path)
    assert any(isinstance(module, kvpack.RansLinear) for module in model.modules())
    decoded, _, _ = evaluated(directories[1], tmp_path)
    samples = sorted(coded["samples"]["kvpack_choice"], key=lambda sample: sample["doc_id"])
    right = 0
    for question, sample in zip(QUESTIONS, samples, strict=True):
        expected = []
        for choice in question["choices"]:  # type: ignore[attr-defined]
            before = tokenizer(question["question"]).input_ids
            row = tokenizer(f"{question['question']}{choice}").input_ids
            with torch.no_grad():
                p = model(torch.tensor([row])).logits[0].log_softmax(-1)
            expected.append(sum(float(p[i - 1, row[i]]) for i in range(len(before), len(row))))
        assert [response[0][0] for response in sample["resps"]] == pytest.approx(expected, rel=1e-4)
        right += expected.index(max(expected)) == question["answer"]
    assert coded["results"]["kvpack_choice"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    assert coded["results"]["kvpack_choice"]["acc,none"] == decoded["results"]["kvpack_choice"]["acc,none"]
    perplexities = [result["results"]["kvpack_text"]["word_perplexity,none"] for result in (coded, decoded)]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-3)
