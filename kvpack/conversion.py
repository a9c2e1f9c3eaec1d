"""What is no safetensors file, as one: checkpoints of torch, GGUF files, and tensors in memory.

Directories, and models of GGUF files, are written out as safetensors beside the output first, and removed at the end.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvpack.encode.array_sources import array_source
from kvpack.errors import DirectoryIndexError, InputError, NotInstalledError
from kvpack.format.container import ContainerWriter
from kvpack.format.serialized import SerializedTensors, TensorSource

if TYPE_CHECKING:
    from kvpack.runtime.weights.checkpoints import Checkpoint

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
GGUF_SUFFIX = ".gguf"
# What transformers and diffusers call a model's tensors; a trainer's own pickles have other names.
_MODEL_PICKLE = re.compile(
    r"^(?P<kind>pytorch_model|diffusion_pytorch_model|adapter_model)(?P<rest>(-\d+-of-\d+)?(\.\w+)?)\.bin$"
)
_MODEL_INDEX = re.compile(r"^(?P<kind>pytorch_model|diffusion_pytorch_model)\.bin\.index(?P<rest>(\.\w+)?)\.json$")
_MESSAGE_OF_LIBRARY = {"pytorch_model": "model"}
_PIECE_BYTES = 1 << 24


@dataclass
class Converted:
    """A safetensors file or directory to be compressed in place of an input, and what must be said of that."""

    path: Path
    notes: list[str] = field(default_factory=list)


def is_converted(source: Path) -> bool:
    """Whether an input is of another form than safetensors, and of one that can be read."""
    if source.is_dir():
        return not _has_safetensors(source) and any(True for _ in _model_pickles(source))
    return source.suffix.lower() in (*PICKLE_SUFFIXES, GGUF_SUFFIX)
