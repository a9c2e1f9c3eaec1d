"""The documents show what the result files hold."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from kvpack.bench.report import ratio
from kvpack.encode.blob_encoder import even_tile_cols
from kvpack.encode.rate import fixed_bits_per_weight
from kvpack.format.header import BlobHeader
from kvpack.format.layout import ElementKind, integer_layout
from kvpack.format.pages import PAGE_TOKENS, PageFormat, PageLayout, Side

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

    def speeds(layouts: tuple[str, ...], among: Any, low: int, high: int) -> list[float]:
        numbers = [m for m in linear["options"]["ms"] if low <= m <= high]
        return [ratio(linear, shape, m, layout) for layout in layouts for shape in among for m in numbers]

    def between(values: list[float]) -> str:
        return f"{min(values):.2f}–{max(values):.2f}"

    coded = [row["ratio_to_dense"] for row in newest("books-generate")["rows"] if row["setting"].endswith(", coded")]
    prefill = attention["prefill"]
    cases = {(row["context"], row["tokens"], row["head_dim"]) for row in prefill}
    slow = []
    for case in cases:
        rows = [r for r in prefill if (r["context"], r["tokens"], r["head_dim"]) == case and r["causal"]]
        best = min(row["us"] for row in rows if row["name"].startswith("sdpa"))
        slow += [best / row["us"] for row in rows if not row["name"].startswith("sdpa")]
    decode = [row for row in newest("pages-speed-attention")["rows"] if row["section"] == "decode"]
    long = {row["name"]: row["after_us"] for row in decode if row["context"] == 16384}
    best = min(us for name, us in long.items() if name.startswith("sdpa"))
    blocks = sum(PageLayout(side, PageFormat.INT2, 128).block_bytes for side in Side)
    two_bits = 200_000 / PAGE_TOKENS * 28 * 8 * blocks
    caches = {r["name"]: r for r in newest("kv-quantizers-smollm2-2k")["texts"][0]["rows"]}
    kl = {name: sum(r["kl"]) / len(r["kl"]) for name, r in caches.items()}
    same = [{r["name"]: r for r in one["rows"]} for one in newest("kv-quantizers-smollm2-2k-same")["texts"]]
    assert [one["name"] for one in newest("kv-quantizers-smollm2-2k-same")["texts"]] == ["books", "python"]
    # README says so of both.
    assert newest("kv-quantizers-smollm2-2k")["first_page"] == "fp16"
    assert newest("kv-quantizers-smollm2-2k-same")["first_page"] == "same"
    assert {len(r["kl"]) for rows in same for r in rows.values()} == {6}
    own, peer = ([sum(rows[name]["kl"]) / 6 for rows in same] for name in ("int4", "kivi4g64"))
    equal_bits = {f"{rows[name]['bits']:.4f}" for rows in same for name in ("int4", "kivi4g64")}
    assert len(equal_bits) == 1
    times = [[sum(rows[f"int{bits}"]["kl"]) / sum(rows[f"kivi{bits}g64"]["kl"]) for bits in (8, 4, 3)] for rows in same]
    quality = {row["setting"]: row["kl"] for row in newest("books-layouts")["rows"]}
    prompt = newest("long-prompt")
    kept = {row["tokens"]: row for row in newest("bench-snapshot")["prefill"]}[32768]
    shape = {(row["weights"], row["batch"]): row for row in newest("llama-shape")["rows"]}
    dense_bytes = shape["bf16", 1]["linear_bytes"]
    us = {
        (row["shape"], row["m"], row["layout"] or row["name"]): row["us"]
        for row in linear["linear"]
        if row["best"] is not False
    }
    humming = {m: [us[shape, m, "fast"] / us[shape, m, "humming-int4"] for shape in shapes] for m in (1, 8, 64)}
    readme = [
        f"{between(speeds(('fast',), shapes, 1, 1))} times as fast as FP16",
        f"{between(speeds(('balanced',), shapes, 1, 1))} times in `balanced`",
        f"`fast` runs at {between(speeds(('fast',), shapes, 8, 32))}×",
        f"`balanced` at {between(speeds(('balanced',), shapes, 8, 32))}×",
        f"| {shape['fast', 1]['tokens_per_s']:.0f} tokens a second, {shape['fast', 1]['linear_bytes'] / 1e9:.2f} GB |",
        f"| {shape['bf16', 1]['tokens_per_s']:.0f} tokens a second, {dense_bytes / 1e9:.2f} GB in bf16",
        "{:.2f}, {:.2f} and {:.2f}× of bf16".format(*(shape["fast", n]["ratio_to_dense"] for n in (8, 32, 128))),
        "{} times as fast as `fast` with one vector, {} with 8 and {} with 64".format(*map(between, humming.values())),
        f"run at {between(speeds(('balanced', 'fast'), shapes, 64, 4096))}×",
        f"attention at {between(slow)}×",
        f"generates tokens at {between(coded)}×",
        f"{best / long['int4']:.1f} times as fast",
        f"first page of 64 in 16 bits on this side alone, {caches['int4']['bits']:.1f} bits with everything counted",
        f"in 4 bits on both sides, {float(equal_bits.pop()):.1f} bits each: KL on novels, and on Python's library | ",
        f"| {own[0]:.4f}, {own[1]:.4f} | {peer[0]:.4f}, {peer[1]:.4f} with KIVI-like 4 bits |",
        "pages then have {:.2f}, {:.2f} and {:.2f} times the KL of KIVI-like groups of 64 on novels".format(*times[0]),
        "and {:.2f}, {:.2f} and {:.2f} times on Python's library".format(*times[1]),
        f"| {kl['int4']:.4f} | {kl['kivi4g32']:.4f} with KIVI-like 4 bits, which take",
        f"which take {caches['kivi4g32']['bits']:.1f} |",
        f"| {quality['tensor:4.25']:.4f} | {quality['int4-g128']:.4f} with INT4",
        f"| {two_bits / 1e9:.1f} GB | {prompt['fp16_bytes'] / 1e9:.1f} GB in FP16",
        f"| {kept['load_s']:.2f} s from a file in memory, {kept['file_bytes'] / 1e9:.1f} GB |",
        f"| {kept['prefill_s']:.2f} s to read it again",
    ]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert not [claim for claim in readme if claim not in text]
    page = [
        f"{between(speeds(('balanced',), shapes, 1, 1))}× in `balanced`",
        f"{between(speeds(('fast',), shapes, 1, 1))}× in `fast`",
        f"`balanced` runs at {between(speeds(('balanced',), shapes, 2, 32))}×",
        f"`fast` at {between(speeds(('fast',), shapes, 2, 32))}×",
        f"at {between(speeds(('balanced', 'fast'), shapes, 64, 4096))}× of cuBLAS",
    ]
    text = " ".join((ROOT / "docs" / "PERFORMANCE.md").read_text().split())
    assert not [claim for claim in page if claim not in text]


def test_sentences_about_whole_models_say_what_the_results_do() -> None:
    """The figures that README.md and CHOOSING.md have in sentences, of models that generate and of a chat model."""
    block = (ROOT / "docs" / "results" / "generation.md").read_text().split("<!-- figures:generation-summary -->")[1]
    table = [line.strip("| ").split(" | ") for line in block.split("<!-- end -->")[0].splitlines()]
    large = [row for row in table if row[0] == "llama-3.1-8b" and row[5] != "–"]
    small = [row for row in table if row[0] in ("qwen3-0.6b", "books-27m")]

    def between(values: list[float]) -> str:
        return f"{min(values):.2f}–{max(values):.2f}"

    speed = between([float(row[5]) for row in large])
    speed_of_small = between([float(row[5]) for row in small])
    memory = between([float(row[9]) / float(row[8]) for row in large])
    alone = between([float(row[5]) for row in large if row[1] == "1"])
    short_batches = between([float(row[5]) for row in large if row[1] != "1" and row[2] != "32768"])
    chat = {Path(model["model"]).name: model["full"] for model in newest("smollm2-quality")["models"]}
    kl = {name: quality["kl"]["value"] for name, quality in chat.items()}
    cache = {row["name"]: row for row in newest("kv-quality")["rows"]}
    share = {name: row["end_bits"] / 16 for name, row in cache.items()}
    claims = {
        ROOT / "README.md": [
            f"writes at {speed}× of bf16's speed",
            f"in {memory} of its memory; smaller models at {speed_of_small}×",
            f"KL is {kl['SmolLM2-4.25']:.3f} at 4.25 bits, {kl['SmolLM2-5']:.3f} at 5 and {kl['SmolLM2-6']:.3f} at 6",
        ],
        ROOT / "docs" / "CHOOSING.md": [
            f"{memory} of the memory of bf16 with the shape of Llama-3.1-8B",
            f"{alone}× the speed of bf16",
            f"coded weights write at {short_batches}×",
            f"| bf16 | – | {speed_of_small}× |",
            f"KL {kl['SmolLM2-near-lossless']:.3f} even on SmolLM2-135M",
            f"KL {kl['SmolLM2-6']:.3f} on SmolLM2-135M",
            f"{kl['SmolLM2-3.5']:.2f} on SmolLM2-135M",
            f"{share['int8']:.2f} of the bytes, KL {cache['int8']['kl']:.6f}",
            f"{share['int4']:.2f} of the bytes, KL {cache['int4']['kl']:.4f}",
            f"{share['int3']:.2f} of the bytes, KL {cache['int3']['kl']:.4f}",
            f"{share['int2']:.2f} of the bytes, KL {cache['int2']['kl']:.3f}",
            f"KL {cache['importance@0.3']['kl']:.4f}: pages that are looked at",
        ],
    }
    missing = []
    for document, sentences in claims.items():
        text = " ".join(document.read_text().split())
        missing += [claim for claim in sentences if claim not in text]
    assert not missing


def anchors(document: Path) -> set[str]:
    """What links to headings end with: the second heading of a name has "-1" behind it."""
    repeated: Counter[str] = Counter()
    found = set()
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)  # comments are no headings
    for heading in re.findall(r"^#{1,6} (.*)$", text, re.MULTILINE):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading.strip().lower())
        name = re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")
        found.add(f"{name}-{repeated[name]}" if repeated[name] else name)
        repeated[name] += 1
    return found


def broken_links(document: Path) -> list[str]:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        target, _, anchor = link.partition("#")
        if target.startswith(("http:", "https:")):
            continue
        found = document.parent / target if target else document
        if not found.exists() or (anchor and found.suffix == ".md" and anchor not in anchors(found)):
            broken.append(link)
    return broken


def test_links_lead_somewhere() -> None:
    assert not {document.name: links for document in DOCUMENTS if (links := broken_links(document))}


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One `two`\n\n```sh\n# comment\n```\n## Same\n## Same\n## With [a link](b.md)\n")
    assert anchors(page) == {"one-two", "same", "same-1", "with-a-link"}
    good = "[a](page.md#one-two) [b](page.md#same-1) [c](https://a.b/#c) [d](page.md#with-a-link)"
    (tmp_path / "other.md").write_text(f"{good} [e](page.md#comment) [f](page.md#same-2) [g](none.md) [h](#tiers)\n")
    assert broken_links(tmp_path / "other.md") == ["page.md#comment", "page.md#same-2", "none.md", "#tiers"]


def test_the_table_of_parts_has_the_tiles_that_layers_get() -> None:
    """Of docs/TENSOR-PARALLEL.md: columns of tiles, and what lanes take in bits a weight, for 5-bit integers."""
    page = (ROOT / "docs" / "TENSOR-PARALLEL.md").read_text()
    table = page.split("| layer | layout | N = 1 |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) >= 8
    layer = ""
    for line in table:
        own, name, *found = (cell.strip(" `") for cell in line.strip("|").split("|"))
        layer = own or layer
        rows, cols = map(int, layer.split(" × "))
        layout = integer_layout(name, ElementKind.SIGNED, 5)
        expected = []
        for parts in (1, 2, 4, 8):
            tile_cols = even_tile_cols(rows, cols, layout, parts)
            lanes = fixed_bits_per_weight(BlobHeader(layout, rows, cols, tile_cols)).rans
            expected.append(f"{tile_cols}, {lanes:.3f}")
        assert found == expected, f"{layer}, {name}"
