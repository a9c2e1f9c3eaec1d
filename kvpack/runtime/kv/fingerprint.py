"""What model pages are of: pages of another one are garbage to it, and nothing in their numbers shows that.

A fingerprint has a hash for each thing that keys and values depend on, so that a refusal can say in what two models
differ. Weights are *sampled*: 1,024 elements of each tensor at equal distances, with its name, shape and dtype. That
takes milliseconds where reading all of an 8B model takes seconds, and tells models apart that differ by training; it
does not see that a few single weights were changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from kvpack.errors import CacheInputError, FingerprintMismatchError, ModelMismatchError
from kvpack.format.snapshot import Fingerprint, SnapshotHeader

SAMPLED_ELEMENTS = 1024


def json_digest(values: Any) -> str:
    """Hex SHA-256 of JSON values; the order of names in maps does not matter.

    >>> json_digest({"a": 1, "b": 2}) == json_digest({"b": 2, "a": 1})
    True
    """
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def json_values(values: Any) -> Any:
    """As a file's header has them."""
    return json.loads(json.dumps(values, default=str))


def tensors_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hex SHA-256 of names, shapes, dtypes and sampled elements, whatever their order and device.

    Raises:
        CacheInputError: a tensor has no data (it is on the device "meta"), as of a model whose weights are elsewhere.
    """
    # Tensors of one device come to the host in one copy.
    headers: list[str] = []
    samples: dict[torch.device, list[tuple[int, torch.Tensor]]] = {}
    for number, (name, tensor) in enumerate(sorted(tensors, key=lambda item: item[0])):
        if tensor.device.type == "meta":
            raise CacheInputError(
                f"weights of {name} are not in memory (a device_map has put them elsewhere): what model it is cannot "
                "be told; load it onto one device"
            )
        headers.append(f"{name} {tensor.dtype} {list(tensor.shape)}")
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLED_ELEMENTS)
        taken = flat[::step][:SAMPLED_ELEMENTS].contiguous().view(torch.uint8)
        samples.setdefault(tensor.device, []).append((number, taken))
    found: dict[int, torch.Tensor] = {}
    for of_device in samples.values():
        on_host = torch.cat([taken for _, taken in of_device]).cpu()
        parts = on_host.split([taken.numel() for _, taken in of_device])
        found |= {number: part for (number, _), part in zip(of_device, parts, strict=True)}
    digest = hashlib.sha256()
    for number, header in enumerate(headers):
        digest.update(header.encode() + b"\0" + found[number].numpy().tobytes())
    return digest.hexdigest()


def make_fingerprint(
    config: Mapping[str, Any],
    weights: Iterable[tuple[str, torch.Tensor]],
    *,
    rope: Mapping[str, Any],
    dtype: torch.dtype,
    adapter: str | None = None,
) -> Fingerprint:
    """The fingerprint of a model.

    Args:
        config: all that its shape and its computation follow from, as JSON values.
        weights: of names and tensors, those of adapters left out.
        rope: how it turns positions, as JSON values; a refusal shows them.
        dtype: of its activations.
        adapter: hex SHA-256 of the adapter that is in use, or None.

    Raises:
        CacheInputError: as of :func:`tensors_digest`.

    >>> import torch
    >>> a, b = (make_fingerprint({}, {"w": torch.full((4,), x)}.items(), rope={}, dtype=torch.float16) for x in (1, 2))
    >>> [line.partition(":")[0] for line in a.differences(b)]
    ['model', 'weights']
    """
    fields = {
        "config": json_digest(config),
        "weights": tensors_digest(weights),
        "rope": json_values(rope),
        "dtype": str(dtype).removeprefix("torch."),
        "adapter": adapter,
    }
    return Fingerprint(model=json_digest(fields), **fields)


def known_fingerprint(header: SnapshotHeader) -> Fingerprint:
    """Of the model that a snapshot's pages are of.

    Raises:
        ModelMismatchError: the file does not say it.
    """
    if header.fingerprint is None:
        raise ModelMismatchError(
            "the file does not say what model its pages are of, so that whether they are this model's cannot be told; "
            "KVCache.load reads it without a model"
        )
    return header.fingerprint


def check_fingerprint(header: SnapshotHeader, model: Fingerprint) -> None:
    """Whether a snapshot's pages are of a model.

    Raises:
        FingerprintMismatchError: the message has both fingerprints, and each field in which they differ.
        ModelMismatchError: the file does not say what model its pages are of.
    """
    ours = known_fingerprint(header)
    if differences := ours.differences(model):
        raise FingerprintMismatchError(ours.model, model.model, differences)
