"""Pictures for the command line (matplotlib, extra ``plot``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib.figure import Figure

# 2^16 pixels are the most that a PNG of matplotlib can have.
MAX_HEIGHT_INCHES = 500.0


def plot_tensors(tensors: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """Draw bits a weight (achieved and entropy) and noise of each coded tensor into a PNG."""
    coded = [tensor for tensor in tensors if tensor["method"] != "keep"]
    if not coded:
        raise ValueError("no tensor is coded, so there is nothing to draw")
    names = [tensor["name"] for tensor in coded]
    places = list(range(len(coded)))
    figure = Figure(figsize=(11, min(MAX_HEIGHT_INCHES, max(3.0, 1.5 + 0.22 * len(coded)))), layout="constrained")
    bits, noise = figure.subplots(1, 2, sharey=True)
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
    figure.suptitle(title)
    figure.savefig(path, dpi=120, format="png")
