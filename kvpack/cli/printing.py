"""What several commands print: sizes, numbers, tables of tensors, and the progress on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from kvpack.encode.listing import listed

if TYPE_CHECKING:
    from kvpack.encode.progress import Progress

_UNFOLDED_COLUMNS = 10_000
_SECONDS_BETWEEN_LINES = 10.0


class _ProgressLines:
    """How many tokens, cases or runs a command has done, in lines on stderr."""

    def __init__(self, title: str, unit: str) -> None:
        self._title, self._unit = title, unit
        self._all = self._done = 0
        self._name = ""
        self._last = time.monotonic()

    def total(self, size: int) -> None:
        self._all = size

    def tensor(self, name: str) -> None:
        self._name = name

    def advance(self, size: int) -> None:
        self._done += size
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        named = f" ({printable(self._name)})" if self._name else ""
        line = f"kvpack: {self._title}: {self._done:,} of {self._all:,} {self._unit}{named} …"
        print(line, file=sys.stderr, flush=True)


@contextmanager
def progress_bar(
    title: str, unit: Literal["bytes", "tokens", "tokens through layers", "cases", "runs"] = "bytes"
) -> Iterator[Progress]:
    """A bar on stderr with rate and time left. Where stderr is no terminal, nothing of bytes, which are soon done, and
    of the others a line every ten seconds."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar

    from kvpack.encode.compiling import on_compile
    from kvpack.encode.progress import Progress

    console = Console(stderr=True)
    told = False
    amount: list[ProgressColumn] = [DownloadColumn(binary_units=True), TransferSpeedColumn()]
    if unit != "bytes":
        amount = [MofNCompleteColumn(), TextColumn(unit)]

    def tell() -> None:
        nonlocal told
        if not told:
            told = True
            console.print("compiling the CPU kernels (the first time they are used on this machine) …", style="dim")

    with (
        on_compile(tell),
        Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            *amount,
            TimeRemainingColumn(),
            TextColumn("{task.fields[tensor]}", style="dim", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ) as bar,
    ):
        if unit != "bytes" and not console.is_terminal:
            lines = _ProgressLines(title, unit)
            yield Progress(lines.total, lines.advance, lines.tensor)
            return
        task = bar.add_task(title, total=None, tensor="")
        yield Progress(
            total=lambda size: bar.update(task, total=size),
            advance=lambda size: bar.advance(task, size),
            tensor=lambda name: bar.update(task, tensor=name),
        )


def shown_size(size_bytes: float) -> str:
    """Bytes with a unit: powers of 1000, up to GB."""
    for unit in ("B", "KB", "MB", "GB"):
        if size_bytes < 1000 or unit == "GB":
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.2f} {unit}"
        size_bytes /= 1000
    raise AssertionError


def shown_number(value: float | None, digits: int = 2) -> str:
    """A number with so many decimals; a dash for none."""
    return "–" if value is None else f"{value:.{digits}f}"


def shown_share(part: float | None, total: float) -> str:
    """A part of a total as a percentage; a dash for none."""
    return "–" if part is None else f"{100 * part / total:.2f} %"


def data_console() -> Any:
    """Standard output; lines are not folded where it is a file or a pipe."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=_UNFOLDED_COLUMNS)


def printable(text: str) -> str:
    """Names come from files: no control character reaches the terminal."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def shown_names(names: list[str], most: int = 4) -> str:
    """The first of them, and how many more there are."""
    return listed([printable(name) for name in names], most)


def counted(count: int, noun: str) -> str:
    """So many of what a regular noun names.

    >>> counted(1, "run"), counted(2, "run")
    ('1 run', '2 runs')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def print_aligned(rows: Sequence[Sequence[str]], left: int) -> None:
    """Rows of as many cells in columns, the first ``left`` of them aligned at their left. Plain text: rich takes seven
    seconds for 10,000 rows."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def print_tensors(tensors: list[dict[str, Any]], *, kept_singly: bool) -> None:
    """A table of tensors; with what a calibration expects their noise to cost, where a file says so."""
    total = sum(tensor.get("expected_kl") or 0.0 for tensor in tensors)
    shares = ("KL share",) * (total > 0)
    rows = [("tensor", "shape", "dtype", "method", "layout", "bits", "entropy", "noise dB", "outliers", *shares)]
    rows += [
        (
            printable(tensor["name"]),
            "×".join(map(str, tensor["shape"])),
            tensor["dtype"],
            tensor["method"]
            + " + row scales" * (tensor["method"] in ("uniform", "trellis") and tensor.get("scales", 0) > 1)
            + " + column scales" * tensor.get("column_scales", False)
            + " + row offsets" * tensor.get("row_offsets", False),
            tensor["layout"] or "–",
            shown_number(tensor["bits_per_weight"], 3),
            shown_number(tensor["entropy_bits"], 3),
            shown_number(tensor["noise_db"]),
            str(tensor["outliers"]),
            *(shown_share(tensor.get("expected_kl"), total) for _ in shares),
        )
        for tensor in tensors
        if kept_singly or tensor["method"] != "keep"
    ]
    print_aligned(rows, left=5)
    print()
