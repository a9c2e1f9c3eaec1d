"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Source = Annotated[Path, typer.Argument(metavar="IN", help="A .safetensors file or a model directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, also on failure.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output; other files are never deleted.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; all cores by default.")]
