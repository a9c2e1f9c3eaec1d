"""The documents show what the result files hold."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from kvpack.bench import attention_report
from kvpack.bench.report import ratio

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))


def newest(name: str) -> Any:
    return json.loads(max((ROOT / "benchmarks" / "results").glob(f"*-{name}.json")).read_text())


def test_documents_show_the_results() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "render_docs.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_sentences_say_what_the_results_do() -> None:
    """The figures that README.md and PERFORMANCE.md have in sentences."""
    linear, attention = newest("bench-linear"), newest("bench-attention")
    shapes = dict.fromkeys(row["shape"] for row in linear["linear"])
    large = [shape for shape in shapes if shape not in ("2048×5632", "5632×2048")]

    def speeds(layouts: tuple[str, ...], among: Any, low: int, high: int) -> list[float]:
        numbers = [m for m in linear["options"]["ms"] if low <= m <= high]
        return [ratio(linear, shape, m, layout) for layout in layouts for shape in among for m in numbers]

    def between(values: list[float]) -> str:
        return f"{min(values):.2f}–{max(values):.2f}"

    five = [shape for shape in shapes if shape != "28672×4096"]
    coded = [row["ratio_to_dense"] for row in newest("books-generate")["rows"] if row["setting"].endswith(", coded")]
    prefill = attention["prefill"]
    cases = {(row["context"], row["tokens"], row["head_dim"]) for row in prefill}
    slow = []
    for case in cases:
        rows = [r for r in prefill if (r["context"], r["tokens"], r["head_dim"]) == case and r["causal"]]
        best = min(row["us"] for row in rows if row["name"].startswith("sdpa"))
        slow += [best / row["us"] for row in rows if not row["name"].startswith("sdpa")]
    long = next(
        c for c in attention_report.cases_of(attention) if (c.sequences, c.head_dim, c.context) == (16, 128, 16384)
    )
    quality = {row["setting"]: row["kl"] for row in newest("books-quality")["rows"]}
    prompt = newest("long-prompt")
    readme = [
        f"{between(speeds(('balanced',), large, 1, 1))} times as fast",
        f"{between(speeds(('fast',), large, 1, 1))} times as fast",
        f"five of six shapes: {between(speeds(('balanced',), five, 2, 32))}×",
        f"run at {between(speeds(('balanced', 'fast'), shapes, 64, 4096))}×",
        f"attention at {between(slow)}×",
        f"generates tokens at {between(coded)}×",
        f"{attention_report.speed(attention, long, 'int4'):.1f} times as fast",
        f"| {quality['tensor:4.25']:.3f} | {quality['int4-g128']:.3f} with INT4",
        f"| {prompt['peak_bytes'] / 1e9:.1f} GB | {prompt['fp16_bytes'] / 1e9:.1f} GB in FP16",
    ]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert not [claim for claim in readme if claim not in text]
    page = [
        f"{between(speeds(('balanced',), large, 1, 1))}× in `balanced`",
        f"{between(speeds(('fast',), large, 1, 1))}× in `fast`",
        f"five of six shapes, {between(speeds(('balanced',), five, 2, 32))}×",
        f"cuBLAS, at {between(speeds(('balanced', 'fast'), shapes, 64, 4096))}×",
    ]
    text = " ".join((ROOT / "docs" / "PERFORMANCE.md").read_text().split())
    assert not [claim for claim in page if claim not in text]


def anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    broken = []
    for document in DOCUMENTS:
        for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
            target, _, anchor = link.partition("#")
            if target.startswith(("http:", "https:")):
                continue
            found = document.parent / target if target else document
            if not found.exists() or (anchor and found.suffix == ".md" and anchor not in anchors(found)):
                broken.append(f"{document.relative_to(ROOT)}: {link}")
    assert not broken
