"""What calibrated weights depend on: how many tokens the moments are of, which labels were drawn, and which text.

    python benchmarks/calibration_tokens.py --model $KVPACK_BOOKS_MODEL --variable KVPACK_BOOKS_MODEL \\
        --text $KVPACK_BOOKS_TEXT --windows 8 --window-tokens 1024 --bits 4.25 3 --tokens 4096 16384 65536 124928 \\
        --seeds 1 2 --seed-tokens 16384 --other-text python.txt --other-tokens 65536 --moments-in FOLDER \\
        --json benchmarks/results/DATE-calibration-tokens-books.json
    python benchmarks/calibration_tokens.py --draw RESULT.json --plot docs/images/calibration-tokens.png

Moments are of windows at equal distances over the last quarter of a text, KL is that of its first windows. With another
text the same model is calibrated on each and evaluated on both. Moments that FOLDER has already are taken from there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_common import provenance, require_inputs, require_plotting, write_result
from calibrated_quality import Bench, add_bench_arguments

import kvpack
from kvpack.encode.moments import Moments
from kvpack.integrations.transformers.calibration import calibrate

PART = (0.75, 1.0)


def moments_of(model: Path, text: Path, tokens: int, window: int, seed: int, folder: Path) -> Path:
    """Moments of so many tokens of a text."""
    path = folder / f"{model.name}-{text.stem}-{tokens}-{seed}.safetensors"
    if not path.exists():
        calibrate(model, text, path, tokens=tokens, window=window, part=PART, seed=seed)
    return path


def qualities(benches: dict[str, Bench], bits: float, moments: Path | None) -> dict[str, dict[str, Any]]:
    """Text → KL there of the model coded once."""
    bench = next(iter(benches.values()))
    with tempfile.TemporaryDirectory() as folder:
        report = kvpack.compress(bench.directory, Path(folder) / "coded", bits=bits, moments=moments)
        names = [tensor.name for tensor in report.tensors if tensor.method != "keep"]
        with kvpack.open(Path(folder) / "coded") as reader:
            weights = {name: reader.dequantize(name, "float32") for name in names}
    size = sum(tensor.bytes for tensor in report.tensors if tensor.name in bench.original)
    rate = 8 * size / sum(original.size for original in bench.original.values())
    return {label: {"bits": rate, **bench.quality(weights.__getitem__, names)} for label, bench in benches.items()}


def draw(result: dict[str, Any], path: Path) -> None:
    """KL over tokens, a line for each rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    text = result["text"]
    own = [row for row in result["rows"] if row["calibrated_on"] in (None, text) and row["evaluated_on"] == text]
    for bits in sorted({row["asked"] for row in own}):
        rows = [row for row in own if row["asked"] == bits]
        points = sorted((row["tokens"], row["kl"]) for row in rows if row["tokens"] and row["seed"] == 0)
        (line,) = axes.loglog(*zip(*points, strict=True), "o-", label=f"{bits:g} bits")
        others = [(row["tokens"], row["kl"]) for row in rows if row["tokens"] and row["seed"] != 0]
        if others:
            axes.loglog(*zip(*others, strict=True), "x", color=line.get_color())
        for row in rows:
            if not row["tokens"]:
                axes.axhline(row["kl"], color=line.get_color(), ls=":", label=f"{bits:g} bits without moments")
    axes.set_xlabel("tokens that the moments are of (crosses: other labels)")
    axes.set_ylabel("KL(original ‖ coded), nats a token")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, format="png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_bench_arguments(parser, required=False)
    parser.add_argument("--bits", type=float, nargs="+", default=[4.25, 3.0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="of labels, beside 0")
    parser.add_argument("--seed-tokens", type=int, default=16384)
    parser.add_argument("--other-text", type=Path)
    parser.add_argument("--other-tokens", type=int, default=65536, help="of each text, where there are two")
    parser.add_argument("--moments-in", type=Path, help="a folder where moments are, or will be")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--draw", type=Path, metavar="RESULT")
    parser.add_argument("--plot", type=Path, help="a PNG")
    arguments = parser.parse_args()
    if arguments.draw is not None:
        require_plotting(parser, arguments.plot)
        draw(json.loads(arguments.draw.read_text()), arguments.plot)
        return 0
    texts = [text for text in (arguments.text, arguments.other_text) if text is not None]
    require_inputs(parser, arguments.model, *texts)
    windows = arguments.windows, arguments.window_tokens
    benches = {text.name: Bench(arguments.model, text, *windows) for text in texts}
    # Text, tokens, seed: what is calibrated on.
    runs: list[tuple[Path | None, int, int]] = [(None, 0, 0)]
    runs += [(arguments.text, tokens, 0) for tokens in arguments.tokens]
    runs += [(arguments.text, arguments.seed_tokens, seed) for seed in arguments.seeds]
    runs += [(text, arguments.other_tokens, 0) for text in texts] if arguments.other_text is not None else []
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.moments_in or Path(temporary)
        for text, tokens, seed in dict.fromkeys(runs):
            path = None
            if text is not None:
                path = moments_of(arguments.model, text, tokens, arguments.window_tokens, seed, folder)
                with Moments(path) as moments:
                    tokens = int(moments.made["tokens"])
            for bits in arguments.bits:
                for label, quality in qualities(benches, bits, path).items():
                    row = {
                        "calibrated_on": None if text is None else text.name,
                        "evaluated_on": label,
                        "tokens": tokens,
                        "seed": seed,
                        "asked": bits,
                        **quality,
                    }
                    rows.append(row)
                    print(json.dumps(row), file=sys.stderr)
            if arguments.json is not None:
                variables = {arguments.variable: arguments.model, "KVPACK_BOOKS_TEXT": arguments.text}
                write_result(
                    arguments.json,
                    {
                        "benchmark": "calibration-tokens",
                        "model": arguments.model.name,
                        "text": arguments.text.name,
                        "windows": arguments.windows,
                        "window_tokens": arguments.window_tokens,
                        "rows": rows,
                        **provenance(variables | {"OTHER_TEXT": arguments.other_text}, ("torch", "transformers")),
                    },
                    quiet=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
