"""Names of transformers' checkpoints, as ``from_pretrained`` understands them, for ``kvpack.replace_linears``.

transformers keeps a table of how checkpoints differ from its models: renamed tensors, experts merged into one tensor,
fused ones that are split. It is asked here for where each tensor of a file goes. Importing this module makes
``replace_linears`` know it; transformers is not imported for that.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from kvpack.encode.listing import listed
from kvpack.errors import ModelMismatchError
from kvpack.runtime.weights.checkpoint_names import SOURCES, CheckpointNames, Conversion
from kvpack.runtime.weights.replace import replace_linears

__all__ = ["replace_linears", "transformers_names"]


# Operations that stack matrices, one an expert or several, one below the other.
_STACKED = ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
# How many names a message lists.
_SHOWN = 5


def _operations(converter: Any) -> list[tuple[str, Any]]:
    return [(type(operation).__name__, getattr(operation, "dim", None)) for operation in converter.operations]


def _ignored(model: Any) -> list[re.Pattern[str]]:
    """Patterns of tensors that may be in a file though the model has no place for them, as from_pretrained has them."""
    patterns = list(model._keys_to_ignore_on_load_unexpected or ())
    # Old checkpoints have them a layer; from_pretrained passes over them wherever the model has such a buffer.
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.append(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.append(r"(^|\.)position_ids$")
    return [re.compile(pattern) for pattern in patterns]


def _kept_in_fp32(model: Any, names: Iterable[str]) -> set[str]:
    """Tensors that from_pretrained loads in fp32 though the model is of 16 bits: biases of routers, for one."""
    patterns: set[str] = set()
    if model.dtype in (torch.float16, torch.bfloat16):
        patterns |= set(model._keep_in_fp32_modules_strict or ())
    if model.dtype == torch.float16:
        patterns |= set(model._keep_in_fp32_modules or ())
    found = [re.compile(pattern.replace("*", ".*")) for pattern in patterns]
    return {name for name in names if any(pattern.search(name) for pattern in found)}


def _by_pattern(found: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """(source pattern, tensor of the file) in order → the tensors of each pattern."""
    grouped: dict[str, list[str]] = {}
    for pattern, name in found:
        grouped.setdefault(pattern, []).append(name)
    return grouped


def _lacking(groups: Iterable[Sequence[str]], experts: int) -> list[str]:
    """Tensors that experts need and a file has not, since their names differ from others in the expert's number alone.

    Where matrices are stacked in the order of their names, those behind a lacking one would be another expert's.

    Args:
        groups: tensors of a module of experts, those of one kind each.
        experts: that the model has.
    """
    split = [[re.split(r"(\d+)", name) for name in group] for group in groups]
    varying = {at for names in split for at, texts in enumerate(zip(*names, strict=False)) if len(set(texts)) > 1}
    if len(varying) != 1 or (at := varying.pop()) % 2 == 0:
        return []
    numbers = [{int(parts[at]) for parts in names} for names in split]
    needed = set[int]().union(*numbers)
    if len(needed) < experts:
        needed |= set(range(experts))
    return [
        "".join([*names[0][:at], str(number), *names[0][at + 1 :]])
        for names, there in zip(split, numbers, strict=True)
        for number in sorted(needed - there)
    ]


def _refuse_lacking_experts(
    found: Mapping[str, list[tuple[str, str]]], converter_of: Mapping[str, Any], state: Mapping[str, torch.Tensor]
) -> None:
    """Raises ModelMismatchError where a file has not all matrices of all experts."""
    # Those of as many experts together: in LongCat's modules one tensor has rows for experts that the other has not.
    stacks: dict[tuple[str, int], list[str]] = {}
    for target, tensors in found.items():
        if _operations(converter_of[tensors[0][0]]) in _STACKED:
            stacks.setdefault((target.rpartition(".")[0], len(state[target])), []).append(target)
    for (module, experts), targets in stacks.items():
        groups = [group for target in targets for group in _by_pattern(found[target]).values()]
        if lacking := _lacking(groups, experts):
            raise ModelMismatchError(
                f"{module}: the file has some of its experts' matrices, and not {listed(lacking, _SHOWN)}; "
                "what has no weights would be random"
            )


def _converter_of(
    model: Any, converter: Any, target: str, found: list[tuple[str, str]]
) -> Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """A WeightConverter of transformers as a function of the file's tensors."""

    def convert(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        once = deepcopy(converter)
        for pattern, name in found:
            # A function is what from_pretrained gives when it reads in one thread.
            once.add_tensor(target, name, pattern, lambda tensor=tensors[name]: tensor)
        made = once.convert(target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    return convert


def _experts(model: nn.Module, target: str, converter: Any, found: list[tuple[str, str]]) -> list[list[str]] | None:
    """The tensors of each expert, where a module of experts gets them stacked, one below the other."""
    if _operations(converter) not in _STACKED:
        return None
    module = model.get_submodule(target.rpartition(".")[0])
    # Set by `use_experts_implementation`: its forward takes one expert's matrix after the other.
    if getattr(module, "is_transposed", True) or not hasattr(type(module).forward, "__wrapped__"):
        return None
    grouped = _by_pattern(found)
    parts = [grouped[pattern] for pattern in converter.source_patterns if pattern in grouped]
    if len({len(part) for part in parts}) != 1:
        return None
    return [list(matrices) for matrices in zip(*parts, strict=True)]


def _conversion(
    model: Any, converter: Any, target: str, found: list[tuple[str, str]], shapes: Mapping[str, Sequence[int]]
) -> Conversion:
    operations = ", ".join(type(op).__name__ for op in converter.operations)
    what = f"made by transformers ({operations}) from {len(found)} tensor{'s' if len(found) > 1 else ''} of the file"
    convert = _converter_of(model, converter, target, found)
    sources = [name for _, name in found]
    # Tensors on meta have shapes alone: what comes out says whether the file has all that the model needs.
    try:
        made = convert({name: torch.empty(tuple(shapes[name]), device="meta") for name in sources})
    except Exception as error:
        raise ModelMismatchError(
            f"{target} cannot be {what} ({sources[0]}, …): {type(error).__name__}: {error}"
        ) from error
    return Conversion(
        what,
        sources,
        {name: tuple(tensor.shape) for name, tensor in made.items()},
        convert,
        _experts(model, target, converter, found) if len(made) == 1 else None,
    )


def transformers_names(
    model: nn.Module, shapes: Mapping[str, Sequence[int]], transforms: Sequence[Any] | None = None
) -> CheckpointNames | None:
    """Where a file's tensors go in a model of transformers; None if it is none.

    Args:
        shapes: tensor of the file → its shape.
        transforms: transformers' renamings and converters, by default those that it has for the model.

    Raises:
        ModelMismatchError: transformers cannot make one of its tensors from those of the file.
    """
    library = sys.modules.get("transformers.modeling_utils")
    if library is None or not isinstance(model, library.PreTrainedModel):
        return None
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    if transforms is None:
        transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix

    names = CheckpointNames(unties=True, fp32=_kept_in_fp32(model, state))
    found: dict[str, list[tuple[str, str]]] = {}
    stripped = False
    for name in sorted(shapes, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        stripped |= target in state and bool(prefix) and name.startswith(f"{prefix}.") and name != target
        if target not in state:
            names.unexpected.append(name)
        elif pattern is not None:
            found.setdefault(target, []).append((pattern, name))
        elif names.direct.setdefault(target, name) != name:
            # Two of the file for one of the model: its own name counts, and the other one is no tensor of the model.
            if target == name:
                name, names.direct[target] = names.direct[target], name
            names.unexpected.append(name)
    _refuse_lacking_experts(
        {target: tensors for target, tensors in found.items() if target not in names.direct}, converter_of, state
    )
    for target, tensors in found.items():
        if target in names.direct:
            names.unexpected += [name for _, name in tensors]
        else:
            names.conversions.append(_conversion(model, converter_of[tensors[0][0]], target, tensors, shapes))

    ignored = _ignored(model)
    names.computed = [name for name in names.unexpected if any(pattern.search(name) for pattern in ignored)]
    is_body = stripped and not hasattr(model, prefix)
    names.heads = [
        name
        for name in names.unexpected
        if is_body and name not in names.computed and not name.startswith(f"{prefix}.")
    ]
    passed_over = {*names.computed, *names.heads}
    names.unexpected = [name for name in names.unexpected if name not in passed_over]
    return names


SOURCES.append(transformers_names)
