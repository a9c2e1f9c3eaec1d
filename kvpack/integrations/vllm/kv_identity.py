"""What model a vLLM engine's keys and values are of, told from its configuration and its files.

The connector meets no weights, only the directory that they were loaded from: some bytes of each tensor are read there,
as :mod:`kvpack.runtime.kv.fingerprint` samples elements. Models differ by training in all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvpack.errors import InputError
from kvpack.format.snapshot import Fingerprint
from kvpack.runtime.kv.fingerprint import json_digest, json_values

_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
_SAMPLE_BYTES, _SAMPLES_OF_TENSOR, _SAMPLES_OF_FILE = 64, 16, 4096
_MOST_HEADER_BYTES = 100 << 20
# What a configuration says that keys and values do not depend on.
_NO_MATTER = {"_name_or_path", "name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype"}


def weights_digest(directory: Path) -> str:
    """Hex SHA-256 of names, sizes and samples of a directory's files of weights.

    Raises:
        InputError: it has none.
    """
    digest, found = hashlib.sha256(), False
    for path in sorted(directory.iterdir()):
        if path.suffix in _WEIGHTS and path.is_file():
            found = True
            digest.update(f"{path.name} {path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                for begin, end, samples in _spans(file.fileno(), path):
                    step = max(_SAMPLE_BYTES, (end - begin) // samples)
                    for place in range(begin, end, step):
                        digest.update(os.pread(file.fileno(), min(_SAMPLE_BYTES, end - place), place))
    if not found:
        raise InputError(f"{directory} has no files of weights ({', '.join(_WEIGHTS)})")
    return digest.hexdigest()


def _spans(descriptor: int, path: Path) -> list[tuple[int, int, int]]:
    """(begin, end, samples) of a file's tensors, its header first; of a file of another kind the whole."""
    size = os.fstat(descriptor).st_size
    whole = [(0, size, _SAMPLES_OF_FILE)]
    if path.suffix != ".safetensors" or size < 8:
        return whole
    header_bytes = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    begin = 8 + header_bytes
    if header_bytes > min(size - 8, _MOST_HEADER_BYTES):
        return whole
    try:
        header = json.loads(os.pread(descriptor, header_bytes, 8))
        offsets = [entry["data_offsets"] for name, entry in sorted(header.items()) if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError):
        return whole
    spans = [(begin + first, begin + end, _SAMPLES_OF_TENSOR) for first, end in offsets]
    return [(0, begin, header_bytes // _SAMPLE_BYTES + 1), *spans]


def text_digest(text: str) -> str:
    """Hex SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def rank_fingerprint(
    config: Mapping[str, Any], weights: str, *, dtype: str, world: Mapping[str, int], rank: int
) -> Fingerprint:
    """Of one rank's keys and values: it has its own heads, or layers.

    Args:
        config: of the model, as JSON values.
        weights: hex SHA-256 of the weights, as :func:`weights_digest`.
        dtype: of keys and values.
        world: over how many ranks of which kind the model is spread.
        rank: among all of them.
    """
    told = {key: json_values(value) for key, value in config.items() if key not in _NO_MATTER}
    rope: dict[str, Any] = {key: told[key] for key in ("rope_parameters", "rope_theta", "rope_scaling") if key in told}
    config_digest = json_digest(told | {"world": dict(world)})
    model = json_digest({"config": config_digest, "weights": weights, "dtype": dtype, "rank": rank})
    return Fingerprint(model=model, config=config_digest, weights=weights, rope=rope, dtype=dtype)


def adapter_identity(name: str, path: str) -> list[Any] | None:
    """What tells an adapter from another of the same name: its files' names, sizes and times. None: they are not here.

    JSON values.
    """
    directory = Path(path)
    if not directory.is_dir():
        return None
    files = [(found.name, found.stat()) for found in sorted(directory.iterdir()) if found.is_file()]
    return [name, [[file, state.st_size, state.st_mtime_ns] for file, state in files]]
