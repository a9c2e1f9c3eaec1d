"""What the benchmark scripts share: provenance of a result, fixed-width baselines, tables, JSON.

Results name files, not places: a path that is given as an argument is recorded as the variable that may hold it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvpack.bench.provenance import PACKAGE, environment

if TYPE_CHECKING:
    import torch

F32 = npt.NDArray[np.float32]


def describe_input(path: Path) -> dict[str, Any]:
    """Name, size and SHA-256 of an input file (of a directory: of its .safetensors files, in order of name)."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return {"name": path.name, "bytes": sum(f.stat().st_size for f in files), "sha256": digest.hexdigest()}


def command_line(variables: dict[str, Path | None]) -> str:
    """This process's command, with ``$VARIABLE`` for the paths given and a bare name for any other."""
    known = {str(path): f"${name}" for name, path in variables.items() if path is not None}
    shown = ["python", f"benchmarks/{Path(sys.argv[0]).name}"]
    for argument in sys.argv[1:]:
        # --option=VALUE, NAME=VALUE, or both.
        named = re.match(r"(?:--[\w-]+=)?(?:[\w-]+=)?", argument)
        option = named[0] if named else ""
        value = argument[len(option) :]
        if value in known:
            value = known[value]
        elif os.sep in value and (value.startswith(os.sep) or Path(value).parent.exists()):
            value = Path(value).name
        shown.append(option + value)
    return " ".join(shown)


def provenance(variables: dict[str, Path | None], packages: Iterable[str] = ()) -> dict[str, Any]:
    """When, where and with what a result was made; ``variables`` as for :func:`command_line`."""
    return {
        **environment(packages),
        "command": command_line(variables),
        "inputs": [describe_input(path) for path in variables.values() if path is not None],
    }


def write_result(path: Path, result: dict[str, Any], *, quiet: bool = False) -> None:
    """Write a result in one piece, refusing one that names a place on this machine."""
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    places = {str(Path.home()), str(PACKAGE.parent), os.getcwd(), sys.prefix} - {os.sep}
    found = [place for place in places if place in text]
    if found:
        raise ValueError(f"the result contains a local path ({found[0]})")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
    if not quiet:
        print(f"wrote {path.name}", file=sys.stderr)


def print_table(headings: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> None:
    """A Markdown table on stdout."""
    cells = [["–" if value is None else str(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(headings), *cells]) for i in range(len(headings))]
    if title:
        print(f"\n{title}\n")
    print("| " + " | ".join(h.ljust(w) for h, w in zip(headings, widths, strict=True)) + " |")
    print("|" + "|".join("-" * (w + 2) for w in widths) + "|")
    for row in cells:
        print("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |")
    sys.stdout.flush()


def group_quantized(weights: F32, bits: int, group: int = 128) -> tuple[F32, float]:
    """Fixed-width asymmetric integers: each ``group`` weights of a row share an fp16 scale and an fp16 minimum.

    Returns:
        The dequantized weights, and all bits they take (a row's last group may be short).
    """
    matrix = weights.reshape(weights.shape[0], -1)
    out = np.empty_like(matrix)
    rows, cols = matrix.shape
    total = float(matrix.size * bits)
    for first in range(0, cols, group):
        part = matrix[:, first : first + group]
        low = part.min(axis=1, keepdims=True).astype(np.float16).astype(np.float32)
        scale = (part.max(axis=1, keepdims=True) - low) / np.float32(2**bits - 1)
        scale = scale.astype(np.float16).astype(np.float32)
        q = np.clip(np.rint((part - low) / np.where(scale == 0, 1, scale)), 0, 2**bits - 1)
        out[:, first : first + group] = low + scale * q
        total += 32 * rows
    return out.reshape(weights.shape), total


def relative_noise(original: F32, coded: F32) -> float:
    """Σ (w − ŵ)² / Σ w²."""
    signal = original.astype(np.float64)
    error = signal - coded
    return float(np.vdot(error, error) / np.vdot(signal, signal))


class MeanNoise:
    """The size-weighted mean of tensors' relative noise, in dB."""

    def __init__(self) -> None:
        self.weighted, self.size = 0.0, 0

    def add(self, noise: float, size: int) -> None:
        self.weighted += noise * size
        self.size += size

    @property
    def db(self) -> float:
        return 10 * math.log10(self.weighted / self.size)


def require_inputs(parser: argparse.ArgumentParser, model: Path | None, *texts: Path) -> None:
    """End the program, before anything is loaded, unless these are a model directory and files.

    transformers would look for the name of a missing directory on the Hub.
    """
    from kvpack.errors import InputError
    from kvpack.integrations.transformers.causal_models import check_directory

    try:
        if model is not None:
            check_directory(model)
    except InputError as error:
        parser.error(str(error))
    for text in texts:
        if not text.is_file():
            parser.error(f"{text} is no file")


def require_plotting(parser: argparse.ArgumentParser, plot: Path | None) -> None:
    """End the program, before the work, if a chart is wanted that cannot be drawn."""
    try:
        if plot is not None:
            import kvpack.bench.plot  # noqa: F401
    except ImportError as error:
        parser.error(f"--plot needs matplotlib ({error}): pip install 'kvpack[plot]'")


def environment_path(name: str) -> Path | None:
    """The path that an environment variable holds, if it is set."""
    value = os.environ.get(name)
    return Path(value) if value else None


def synchronize(device: torch.device) -> None:
    """Wait for all that a device has been given."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()


def device_record(device: torch.device) -> dict[str, Any]:
    """What results say of the device that they were measured on."""
    if device.type == "cuda":
        from kvpack.bench.run import device_report

        return device_report()
    return {"name": "CPU", "driver": None, "cuda": None}
