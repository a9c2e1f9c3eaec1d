"""scripts/transformers-own-tests, on a folder that is laid out as a checkout of transformers and has tests of ours."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

SCRIPT = Path(__file__).parents[2] / "scripts" / "transformers-own-tests"

# A mixin by the name and with the attributes of transformers': each test compares generate with its cache to generate
# without one.
GENERATION = """
import torch


class GenerationTesterMixin:
    has_attentions = True

    def model_and_inputs(self, rows=3):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        torch.manual_seed(0)
        model = self.all_generative_model_classes[0](config).eval()
        return model, {name: value[:rows] for name, value in inputs.items()}

    def generated(self, model, inputs, **options):
        return model.generate(**inputs, do_sample=False, max_new_tokens=8, return_dict_in_generate=True, **options)

    def check(self, rows=3, plain=None, **options):
        model, inputs = self.model_and_inputs(rows)
        if options.pop("assisted", False):
            options["assistant_model"] = self.model_and_inputs(rows)[0]
            torch.manual_seed(1)
            for weight in options["assistant_model"].parameters():
                weight.data.add_(0.2 * torch.randn_like(weight))
        want = self.generated(model, inputs, use_cache=False, **(plain or {}))
        got = self.generated(model, inputs, output_attentions=self.has_attentions, **options)
        self.assertEqual(got.sequences.tolist(), want.sequences.tolist())
        return model, got

    def test_greedy_generate(self):
        model, found = self.check()
        cache = getattr(found, "cache", None) or found.past_key_values
        shape = (3, model.config.num_key_value_heads, 12 + 8 - 1, model.config.head_dim)
        for layer in cache.layers:
            self.assertEqual((tuple(layer.keys.shape), tuple(layer.values.shape)), (shape, shape))
        self.assertEqual([bool(row.any()) for row in cache.layers[0].keys[1, 0, :8]], [False] * 5 + [True] * 3)

    def test_beam_search_generate(self):
        self.check(plain={"num_beams": 3}, num_beams=3)

    def test_assisted_decoding_matches_greedy_search(self):
        self.check(rows=1, assisted=True)

    def test_generate_with_static_cache(self):
        raise AssertionError("left out")

    def test_dynamic_generate_attentions(self):
        model, inputs = self.model_and_inputs()
        self.generated(model, inputs, output_attentions=True)

    def test_forward(self):
        raise AssertionError("not selected")
"""
LLAMA = '''
import unittest

import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from kvpack import KVPackCache

from ...generation.test_utils import GenerationTesterMixin


class LlamaModelTester:
    def prepare_config_and_inputs_for_common(self):
        config = LlamaConfig(
            vocab_size=99, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.3, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        )
        mask = torch.ones(4, 12, dtype=torch.long)
        for row in range(4):
            mask[row, : 5 * row] = 0
        ids = torch.randint(3, 99, (4, 12), generator=torch.Generator().manual_seed(5))
        return config, {"input_ids": ids * mask, "attention_mask": mask}


class LlamaModelTest(GenerationTesterMixin, unittest.TestCase):
    all_generative_model_classes = (LlamaForCausalLM,)

    def setUp(self):
        self.model_tester = LlamaModelTester()


class WrongTest(LlamaModelTest):
    """Fails where rows change places, and where tokens are forgotten."""

    def setUp(self):
        super().setUp()
        for name in ("select_rows", "crop_columns"):
            self.addCleanup(setattr, KVPackCache, name, getattr(KVPackCache, name))
            setattr(KVPackCache, name, lambda *args: None)


class EncoderDecoderTest(unittest.TestCase):
    def test_generate(self):
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 37, "num_layers": 1, "num_heads": 2}
        config = T5Config(vocab_size=99, decoder_start_token_id=0, **sizes)
        T5ForConditionalGeneration(config).eval().generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2)
'''


def checkout(folder: Path, version: str) -> Path:
    files = {
        "pyproject.toml": "[tool.pytest.ini_options]\naddopts = '-ra'\n",
        "src/transformers/__init__.py": f'__version__ = "{version}"\nraise ImportError("not what is installed")\n',
        "tests/__init__.py": "",
        # As transformers' own conftest.py does.
        "conftest.py": "import sys\nfrom pathlib import Path\nsys.path.insert(1, str(Path(__file__).parent / 'src'))\n",
        "tests/generation/__init__.py": "",
        "tests/generation/test_utils.py": GENERATION,
        "tests/models/__init__.py": "",
        "tests/models/llama/__init__.py": "",
        "tests/models/llama/test_modeling_llama.py": LLAMA,
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    root = str(SCRIPT.parents[1])
    folders = filter(None, [root, os.environ.get("PYTHONPATH")])
    environment |= {"PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(folders)}
    return subprocess.run(
        [SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def installed() -> str:
    return importlib.metadata.version("transformers")


def test_right_caches_pass_wrong_ones_fail_and_calls_are_counted(tmp_path: Path, installed: str) -> None:
    done = run(checkout(tmp_path, installed))
    failed = re.findall(r"^FAILED \S+::(\w+::\w+)", done.stdout, re.MULTILINE)
    assert sorted(failed) == [
        "WrongTest::test_assisted_decoding_matches_greedy_search",
        "WrongTest::test_beam_search_generate",
    ], done.stdout + done.stderr
    assert done.returncode == 1
    assert "2 failed, 7 passed, 4 deselected" in done.stdout
    report = done.stdout.partition(" kvpack ===")[2]
    # Of each of the two classes: greedy, beams, and assisted with the calls of both models.
    calls, reads = re.findall(r"generate calls on kvpack's pages: (\d+) \(which attention read (\d+) times\)", report)[
        0
    ]
    assert int(calls) >= 2 * (1 + 1 + 2)
    assert int(reads) >= 2 * 2 * (8 + 8 + 2)  # of two layers, at each step
    for line in (
        "6 × use_cache is False",
        "2 × the test asks for attention probabilities",
        "1 × t5 is an encoder-decoder model",
        "heads made wider: LlamaConfig 8 → 16",
        "2 × compares a StaticCache",
    ):
        assert line in report, done.stdout


def test_a_run_without_pages_fails(tmp_path: Path, installed: str) -> None:
    file = "tests/models/llama/test_modeling_llama.py::EncoderDecoderTest"
    done = run(checkout(tmp_path, installed), file)
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    assert "no generate call ran on kvpack's pages" in done.stdout
    assert done.returncode == 1


def test_another_version_and_another_folder_are_refused(tmp_path: Path, installed: str) -> None:
    done = run(checkout(tmp_path / "old", "5.0.0"))
    assert done.returncode == 2
    assert f"is of transformers 5.0.0, and {installed} is installed" in done.stderr
    done = run(tmp_path)
    assert done.returncode == 2
    assert "is no git checkout of transformers" in done.stderr
    assert run().returncode == 2


@pytest.fixture(scope="module")
def plugin() -> Any:
    """As a module: it changes transformers in ``pytest_configure`` alone."""
    path = SCRIPT.parent / "transformers_own_tests_plugin.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name",
    ["Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Qwen3Moe", "Gemma2", "Gemma3Text", "Phi3", "GptOss", "GPT2"],
)
def test_heads_are_made_wide_enough_for_pages(plugin: Any, name: str) -> None:
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if name != "GPT2":
        sizes |= {"intermediate_size": 37, "num_key_value_heads": 2}
    if name in ("Qwen3", "Qwen3Moe", "Gemma2", "Gemma3Text", "GptOss"):
        sizes |= {"head_dim": 8}
    config = plugin.widen_heads(getattr(transformers, name + "Config")(**sizes, pad_token_id=0))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    widths = {
        module.head_dim for module in model.modules() if hasattr(module, "head_dim") and hasattr(module, "layer_idx")
    }
    assert widths == {16}
    assert config.num_attention_heads in (2, 4)
