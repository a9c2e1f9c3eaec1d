"""transformers' quantizer of kvpack directories."""

from __future__ import annotations


def register() -> None:
    """Make transformers know ``"quant_method": "kvpack"``."""
