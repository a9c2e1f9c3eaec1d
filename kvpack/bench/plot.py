"""Pictures for the command line (matplotlib, extra ``plot``)."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib.figure import Figure

from kvpack.errors import InputError

# 2^16 pixels are the most that a PNG of matplotlib can have.
MAX_HEIGHT_INCHES = 500.0


def plot_tensors(tensors: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """Draw bits a weight (achieved and entropy) and noise of each coded tensor into a PNG.

    Beside them what the noise of each is expected to cost, where a calibration says so.
    """
    coded = [tensor for tensor in tensors if tensor["method"] != "keep"]
    if not coded:
        raise ValueError("no tensor is coded, so there is nothing to draw")
    names = [tensor["name"] for tensor in coded]
    places = list(range(len(coded)))
    expected = [(p, t["expected_kl"]) for p, t in zip(places, coded, strict=True) if t.get("expected_kl") is not None]
    height = min(MAX_HEIGHT_INCHES, max(3.0, 1.5 + 0.22 * len(coded)))
    figure = Figure(figsize=(15 if expected else 11, height), layout="constrained")
    bits, noise, *cost = figure.subplots(1, 3 if expected else 2, sharey=True)
    bits.barh(places, [t["bits_per_weight"] for t in coded], color="#4878a8", label="achieved")
    entropy = [(p, t["entropy_bits"]) for p, t in zip(places, coded, strict=True) if t["entropy_bits"]]
    bits.plot([e for _, e in entropy], [p for p, _ in entropy], "k|", ms=9, label="entropy")
    bits.set_yticks(places, names, fontsize=7, parse_math=False)
    bits.invert_yaxis()
    bits.set_xlabel("bits a weight, all overhead in")
    bits.legend(loc="lower left", fontsize=8)
    measured = [(p, t["noise_db"]) for p, t in zip(places, coded, strict=True) if t["noise_db"] is not None]
    noise.barh([p for p, _ in measured], [n for _, n in measured], color="#b5651d")
    noise.set_xlabel("noise to signal, dB" if measured else "no noise: lossless")
    for panel in cost:
        panel.barh([p for p, _ in expected], [kl for _, kl in expected], color="#5a8f5a")
        panel.set_xlabel("expected KL, nats a token")
    figure.suptitle(title)
    figure.savefig(path, dpi=120, format="png")


def _panels(count: int, *, columns: int, width: float, height: float, around: float) -> tuple[Figure, list[Any]]:
    """As many panels of ``width`` × ``height`` inches, in rows of at most ``columns``, with common axes."""
    columns = min(columns, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(width * columns, around + height * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    for panel in panels[count:]:
        panel.set_axis_off()
    return figure, panels[:count]


def _times_as_fast(panel: Any, title: str, xlabel: str) -> None:
    """Around what has been drawn: times as fast as something, over powers of two."""
    panel.axhline(1, color="0.5", lw=0.8)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:.0f}")
    panel.set_xlabel(xlabel, fontsize=8)
    panel.set_title(title, fontsize=10)
    panel.grid(True, alpha=0.3)


def plot_linear(report: dict[str, Any], path: Path) -> None:
    """Draw a report of ``kvpack bench linear`` into a PNG: speed against FP16 over M, a panel for each shape."""
    from kvpack.bench.report import HUMMING, humming_label, ratio

    ms = report["options"]["ms"]
    shapes = list(dict.fromkeys(row["shape"] for row in report["linear"]))
    if not shapes:
        raise ValueError("no product was measured, so there is nothing to draw")
    series: list[tuple[str, str, str | None, str]] = [
        ("INT8 (Triton)", "int8", None, "v"),
        ("INT4 g128 (torch)", "int4", None, "^"),
        *((humming_label(name), name, None, "s") for name in HUMMING.values()),
        *((f"kvpack {layout}", "kvpack", layout, "o") for layout in report["options"]["layouts"]),
    ]
    figure, panels = _panels(len(shapes), columns=3, width=4.2, height=3.2, around=0.8)
    for panel, shape in zip(panels, shapes, strict=True):
        for label, name, layout, marker in series:
            found = [(m, ratio(report, shape, m, layout, name=name)) for m in ms]
            points = [(m, value) for m, value in found if value is not None]
            if points:
                panel.plot([m for m, _ in points], [value for _, value in points], f"{marker}-", ms=4, label=label)
        _times_as_fast(panel, shape, "activation vectors M")
    drawn: dict[str, Any] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        drawn |= dict(zip(labels, handles, strict=True))
    if drawn:
        figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=len(drawn), fontsize=8)
    figure.supylabel("times as fast as FP16 cuBLAS", fontsize=9)
    figure.suptitle(f"{report['device']['name']}: products with coded weights (Gaussian integers)", fontsize=11)
    figure.savefig(path, dpi=120, format="png")


def plot_kv_quant(report: dict[str, Any], path: Path) -> None:
    """Draw a report of ``kvpack bench kv-quant`` into a PNG: the share of a copy's bandwidth over the sizes."""
    from kvpack.bench.kv_quant_report import VARIANTS, fractions

    works = ("quantize", "dequantize")
    drawn = {(work, variant): fractions(report, variant, work) for work in works for variant in VARIANTS}
    sizes = list(dict.fromkeys(size for points in drawn.values() for size, _ in points))
    if not sizes:
        raise ValueError("no matrix was measured, so there is nothing to draw")
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, work in zip(panels, works, strict=True):
        for variant, marker in zip(VARIANTS, "vs^o", strict=True):
            points = drawn[work, variant]
            places = [sizes.index(size) for size, _ in points]
            panel.plot(places, [100 * fraction for _, fraction in points], f"{marker}-", ms=4, label=variant)
        panel.set_xticks(range(len(sizes)), [size.label for size in sizes], rotation=45, ha="right", fontsize=7)
        panel.set_title(work, fontsize=10)
        panel.grid(True, alpha=0.3)
    panels[0].set_ylabel("% of the bandwidth of a copy", fontsize=9)
    panels[0].legend(fontsize=8)
    title = f"{report['device']['name']}: fp16 matrices and INT8, a scale for each channel"
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120, format="png")


def plot_attention(report: dict[str, Any], path: Path) -> None:
    """Draw a report of ``kvpack bench attention`` into a PNG: speed against FP16 over contexts, a panel for a model."""
    from kvpack.bench.attention_report import UNIFORM, cases_of, mixed, speed

    cases = cases_of(report)
    models = list(dict.fromkeys(case.model for case in cases))
    if not models:
        raise ValueError("no case was measured, so there is nothing to draw")
    series = [(name, name, "o-") for name in UNIFORM]
    series += [(mixed(budget), f"8/4/3/2 at {budget:g}", "s--") for budget in report["options"]["budgets"]]
    figure, panels = _panels(len(models), columns=2, width=5.5, height=3.6, around=1.2)
    for panel, model in zip(panels, models, strict=True):
        of_model = [case for case in cases if case.model == model]
        for name, label, style in series:
            found = [(case.context, speed(report, case, name)) for case in of_model]
            points = [(context, value) for context, value in found if value is not None]
            # A line without points is drawn too, so that all panels have the same colors and one legend serves them.
            panel.plot([context for context, _ in points], [value for _, value in points], style, ms=4, label=label)
        _times_as_fast(panel, model, "tokens of a sequence")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    figure.supylabel("times as fast as the best SDPA on fp16", fontsize=9)
    figure.suptitle(f"{report['device']['name']}: decode attention to pages", fontsize=11)
    figure.savefig(path, dpi=120, format="png")


def plot_kv_quality(report: dict[str, Any], path: Path) -> None:
    """Draw a result of ``benchmarks/kv_quality.py`` into a PNG: KL over bits, a line for each policy."""
    rows = [row for row in report["rows"] if row["kl"] > 0]
    if not rows:
        raise ValueError("no configuration differs from the reference, so there is nothing to draw")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for policy, marker in (("uniform", "v"), ("importance", "o"), ("per-layer", "s"), ("position", "^")):
        points = sorted((row["mean_bits"], row["kl"]) for row in rows if row["policy"] == policy)
        if points:
            label = f"a budget, {policy}"
            axes.plot([bits for bits, _ in points], [kl for _, kl in points], f"{marker}-", ms=5, lw=1, label=label)
    fixed = [row for row in rows if row["policy"] is None]
    if fixed:
        places = [row["mean_bits"] for row in fixed], [row["kl"] for row in fixed]
        axes.plot(*places, "k+", ms=9, label="widths by side")
    for row in fixed:
        place = row["mean_bits"], row["kl"]
        axes.annotate(row["name"], place, xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.set_yscale("log")
    axes.set_xlabel("bits an element, mean over the steps, everything counted")
    axes.set_ylabel("KL(16-bit pages ‖ these), nats a token")
    axes.set_title(f"KV pages, {report['sequences']} × {report['tokens']} tokens step by step", fontsize=11)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, format="png")


def plot_kv_quantizers(report: dict[str, Any], path: Path) -> None:
    """Draw a result of ``benchmarks/kv_quantizers.py`` into a PNG: KL over bits, a panel for each text and a line for
    each family of schemes."""
    texts = [text for text in report["texts"] if any(sum(row["kl"]) > 0 for row in text["rows"])]
    if not texts:
        raise ValueError("no scheme differs from the reference, so there is nothing to draw")
    figure, panels = _panels(len(texts), columns=2, width=5.5, height=4.2, around=1.0)
    families = list(dict.fromkeys(row["family"] for text in texts for row in text["rows"]))
    for panel, text in zip(panels, texts, strict=True):
        for family, marker in zip(families, itertools.cycle("ov^sD*P"), strict=False):
            rows = sorted((row for row in text["rows"] if row["family"] == family), key=lambda row: row["bits"])
            points = [(row["bits"], 1000 * sum(row["kl"]) / len(row["kl"])) for row in rows if sum(row["kl"]) > 0]
            # A line without points is drawn too, so that all panels have the same colors and one legend serves them.
            panel.plot([bits for bits, _ in points], [kl for _, kl in points], f"{marker}-", ms=5, lw=1, label=family)
        panel.set_yscale("log")
        panel.set_xlabel("bits an element, everything counted", fontsize=8)
        panel.set_title(text["name"], fontsize=10, parse_math=False)
        panel.grid(True, which="both", alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 * min(2, len(panels)), fontsize=8)
    figure.supylabel("KL(16 bits ‖ these), thousandths of a nat a token", fontsize=9)
    figure.suptitle(f"{report['model']}, {report['context']} cached tokens", fontsize=11, parse_math=False)
    figure.savefig(path, dpi=120, format="png")


def plot_models(report: dict[str, Any], path: Path) -> None:
    """Draw a report of ``kvpack eval`` into a PNG: KL, or without an original perplexity, over bits a weight."""
    original = report["original"]
    measure = "perplexity" if original is None else "kl"
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    for key, label, marker in (("full", "full forward", "o"), ("stepwise", "step by step through the cache", "s")):
        models = [model for model in report["models"] if model[key] and model["size"]["bits_per_weight"]]
        models.sort(key=lambda model: model["size"]["bits_per_weight"])
        if not models:
            continue
        bits = [model["size"]["bits_per_weight"] for model in models]
        means = [model[key][measure] for model in models]
        errors = [mean["standard_error"] or 0 for mean in means]
        axes.errorbar(bits, [mean["value"] for mean in means], errors, fmt=f"{marker}-", ms=5, lw=1, label=label)
        if key == "full":
            for place, mean, model in zip(bits, means, models, strict=True):
                name = Path(model["model"]).name
                offset = (6, 4)
                axes.annotate(
                    name, (place, mean["value"]), offset, textcoords="offset points", fontsize=8, parse_math=False
                )
    if not axes.lines:
        raise ValueError("no model has weights in safetensors files, so there is nothing to draw")
    if original is None:
        axes.set_ylabel("perplexity")
    else:
        if any(model["full"]["kl"]["value"] > 0 for model in report["models"]):
            axes.set_yscale("log")
        axes.set_ylabel("KL(original ‖ model), nats a token")
    axes.margins(x=0.2)  # names stand beside the points
    axes.set_xlabel("bits a weight, of the whole file")
    axes.set_title(f"{report['windows']} windows of {report['context']} tokens, ± standard error", fontsize=11)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, format="png")


def plot_snapshot(report: dict[str, Any], path: Path) -> None:
    """Draw a report of ``kvpack bench snapshot`` into a PNG: bytes beside those of other ways to keep a context, and
    seconds of a load and of a prefill over the tokens."""
    rows = [row for row in report["rows"] if row.get("bytes") is not None][::-1]
    prefill = report["prefill"]
    panels = [draw for draw, found in ((_draw_bytes, rows), (_draw_loads, prefill)) if found]
    if not panels:
        raise InputError("no file is given and there is no GPU, so there is nothing to draw")
    figure = Figure(figsize=(6.5 * len(panels), max(3.6, 0.5 * len(rows) + 1.2)), layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        draw(axes, report)
    figure.savefig(path, dpi=120, format="png")


def _draw_bytes(axes: Any, report: dict[str, Any]) -> None:
    rows = [row for row in report["rows"] if row.get("bytes") is not None][::-1]
    bars = axes.barh([row["name"] for row in rows], [row["of_fp16"] for row in rows])
    axes.bar_label(bars, [f"{row['of_fp16']:.3f}" for row in rows], padding=3)
    axes.set_xlim(0, 1.1)
    axes.set_xlabel("of the bytes in fp16")
    axes.set_title(f"a context of {report['tokens']} tokens", fontsize=11)


def _draw_loads(axes: Any, report: dict[str, Any]) -> None:
    tokens = [row["tokens"] for row in report["prefill"]]
    for key, label in (("prefill_s", "prefill"), ("load_s", "load of a warm file")):
        axes.plot(tokens, [row[key] for row in report["prefill"]], "o-", label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("s")
    axes.set_title(f"{report['device']['name']}, an 8B Llama's shape", fontsize=11)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
