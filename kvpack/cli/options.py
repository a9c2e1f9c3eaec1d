"""Arguments and options that several commands have."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

Source = Annotated[Path, typer.Argument(metavar="IN", help="A .safetensors file or a model directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, also on failure.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output; other files are never deleted.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; all cores by default.")]


class ComputeDtypeOption(StrEnum):
    """Names for --dtype where a model runs."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


ComputeDevice = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda or cuda:N; auto is CUDA if there is any.")
]
ComputeDtype = Annotated[
    ComputeDtypeOption, typer.Option("--dtype", help="What is computed in; auto is what the model's config.json names.")
]
CacheBits = Annotated[
    int | None, typer.Option("--kv-bits", metavar="16|8|4|3|2", help="Keys and values in pages of so many bits.")
]
CacheBudget = Annotated[
    float | None,
    typer.Option("--kv-budget", metavar="F", help="Or in mixed bits: this fraction of the bytes of 16 bits."),
]
