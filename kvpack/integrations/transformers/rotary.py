"""Which dimensions of a model's keys rotary positions turn slowest.

Those say most of what a token is about, and quantized pages give them more bits (:mod:`kvpack.format.pages`).
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig

from kvpack.format.layout import ceil_div
from kvpack.format.pages import GROUP_DIMS, half_split_order

# What turns a text model's keys in its module; of several, the first: another may be for images.
_ROTATIONS = ("rotate_half_llm", "rotate_half_text", "rotate_every_two", "rotate_half")
# Models that turn dimensions 2i and 2i + 1 together, without such a function: as complex numbers, or in a method.
_INTERLEAVED = frozenset({"llama4_text", "roformer"})


def key_order(config: PreTrainedConfig, head_dim: int) -> tuple[int, ...]:
    """Groups of 16 dimensions of a model's keys, those first that turn slowest; dimensions that do not turn before all.

    Args:
        config: of the text model.
        head_dim: a multiple of 16.

    Returns:
        As :class:`~kvpack.KVCache` takes it. Empty where it is :func:`~kvpack.format.pages.half_split_order`, and for
        models without rotary positions or of unknown ones.

    >>> import transformers
    >>> key_order(transformers.LlamaConfig(), 128)
    ()
    >>> key_order(transformers.PhiConfig(partial_rotary_factor=0.5), 128)
    (4, 5, 6, 7, 1, 3, 0, 2)
    """
    layers = Counter(_rotated_dims(rope, config, head_dim) for rope in _rope_of_layers(config))
    interleaved = _is_interleaved(config)
    slowness = [
        sum(count * _slowness(dim, rotated, interleaved) for rotated, count in layers.items())
        for dim in range(head_dim)
    ]
    of_groups = [sum(slowness[dim : dim + GROUP_DIMS]) for dim in range(0, head_dim, GROUP_DIMS)]
    order = tuple(sorted(range(len(of_groups)), key=lambda group: (-of_groups[group], group)))
    return () if order == half_split_order(head_dim) else order


def _slowness(dim: int, rotated: int, interleaved: bool) -> Fraction:
    """From 0, of the fastest pair, to 1, of what does not turn."""
    if dim >= rotated:
        return Fraction(1)
    pairs = ceil_div(rotated, 2)
    return Fraction(dim // 2 if interleaved else dim % pairs, pairs)


def _rope_of_layers(config: PreTrainedConfig) -> Iterator[Mapping[str, Any]]:
    """What the configuration says of rotary positions: once, or for each layer."""
    found = _value(config, "rope_parameters") or _value(config, "rope_scaling")
    rope = found if isinstance(found, Mapping) else {}
    for kind in _value(config, "layer_types") or [""]:
        of_kind = rope.get(kind)
        yield of_kind if isinstance(of_kind, Mapping) else rope


def _rotated_dims(rope: Mapping[str, Any], config: PreTrainedConfig, head_dim: int) -> int:
    """How many dimensions turn, the first ones."""
    if rope.get("rope_type") == "proportional":  # the slowest of all pairs stand still: their order is the same
        return head_dim
    for factor in (rope.get("partial_rotary_factor"), _value(config, "partial_rotary_factor")):
        if factor is not None:
            return int(head_dim * factor)
    return _value(config, "rotary_dim") or head_dim


def _value(config: PreTrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # transformers' own, for a value that differs between layers
        return None


def _is_interleaved(config: PreTrainedConfig) -> bool:
    """Whether dimensions 2i and 2i + 1 turn together, not i and i + half of them: as the model's own code does it."""
    if config.model_type in _INTERLEAVED:
        return True
    module = _modeling_module(config)
    for name in _ROTATIONS:
        if (rotate := getattr(module, name, None)) is not None:
            try:
                turned = rotate(torch.arange(4.0, device="cpu").view(1, 1, 1, 4))
                return bool(turned.flatten()[0] == -1)
            except Exception:  # somebody's own function, of other arguments
                return False
    return False


def _modeling_module(config: PreTrainedConfig) -> Any:
    """The module beside that of a configuration, or of the one that it derives from; None: there is none."""
    for of_config in type(config).__mro__:
        package, found, name = of_config.__module__.rpartition(".configuration_")
        if found:
            try:
                return importlib.import_module(f"{package}.modeling_{name}")
            except ImportError:
                continue
    return None
