"""What config.json says of a model directory of transformers; torch is not loaded for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvpack.errors import InputError


def model_configuration(path: Path) -> dict[str, Any]:
    """What config.json of a model directory of transformers says.

    Raises:
        InputError: it is none; the message says how to get one.
    """
    if path.suffix == ".gguf":
        advice = f"kvpack compress {path} -o DIRECTORY makes a model directory of it (--preset lossless: exactly)"
        raise InputError(f"{path} is a GGUF file, not a model directory: {advice}")
    if path.is_file():
        advice = "name the directory that holds it, with config.json and the tokenizer"
        raise InputError(f"{path} is one file, not a model directory: {advice}")
    if not path.is_dir():
        advice = f"a model of the Hub becomes one with: hf download {path} --local-dir DIRECTORY"
        raise InputError(f"{path} is no directory; {advice}")
    if not (path / "config.json").is_file():
        raise InputError(f"{path} has no config.json: it is no model directory of transformers")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path / 'config.json'} is no JSON ({error})") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise InputError(f"{path / 'config.json'} has no model_type: it is no configuration of a model of transformers")
    return config
