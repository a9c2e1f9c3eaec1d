"""``kvpack.replace_linears``: put a compressed file's weights into a model; its linear layers stay coded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kvpack.encode.dtypes import LOSSY_DTYPES
from kvpack.encode.reader import Reader, TensorInfo
from kvpack.errors import ModelMismatchError
from kvpack.format.container import PART_SUFFIXES
from kvpack.format.layout import ElementKind
from kvpack.runtime.device.devices import resolve_device
from kvpack.runtime.weights.checkpoint_names import CheckpointNames, Conversion, names_for
from kvpack.runtime.weights.coded_matrix import CodedMatrix
from kvpack.runtime.weights.device_blob import DeviceBlob
from kvpack.runtime.weights.embedding import PlainEmbedding, RansEmbedding
from kvpack.runtime.weights.experts import keep_coded
from kvpack.runtime.weights.linear import RansLinear
from kvpack.runtime.weights.load import (
    TORCH_DTYPES,
    kept_shape,
    load_tensors,
    shown_progress,
    stored_bytes,
)

if TYPE_CHECKING:
    import os

    from kvpack.runtime.weights.load import Progress

# A class of transformers' GPT-2 family: y = x · W + b, with W stored inputs × outputs.
CONV1D = "Conv1D"
# How many names a message lists.
_SHOWN = 5


@dataclass
class Replacement:
    """What :func:`replace_linears` did.

    Attributes:
        replaced: module → the coded tensor that it multiplies with now.
        dequantized: coded tensor → why it was loaded as plain numbers (decoded once).
        loaded: tensors that are not coded, loaded as they are.
        tied: tensor of the model that is not in the file → the one that it shares.
        missing: tensors of the model that are neither in the file nor tied (with ``strict=False``). They hold what they
            held before.
        unexpected: tensors of the file for which the model has no place (with ``strict=False``, or those of a head
            that a model of transformers without it leaves out).
        computed: tensors of the file that are not read, since the model computes them (rotary frequencies, masks), or
            its class says that they are of no account.
        other_weights: subfolders with weights, and other sets of weights, that were left alone.
        bytes_before: parameters and buffers of the model as it was, each counted once; on meta what they would take.
        bytes_after: the same now, with the tables that decoding needs; what is deferred is not counted.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    dequantized: dict[str, str] = field(default_factory=dict)
    loaded: list[str] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    other_weights: list[str] = field(default_factory=list)
    computed: list[str] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        parts = [
            f"{len(self.replaced)} linear layers coded",
            f"{len(self.dequantized)} coded tensors dequantized",
            f"{len(self.loaded)} loaded as they are",
        ]
        parts += [
            f"{len(names)} {what}"
            for names, what in ((self.tied, "tied"), (self.missing, "missing"), (self.unexpected, "unexpected"))
            if names
        ]
        if self.other_weights:
            parts.append(f"left alone: {_list(self.other_weights)}")
        lines = [f"{', '.join(parts)}; {self.bytes_before / 1e6:.2f} MB → {self.bytes_after / 1e6:.2f} MB"]
        if not self.replaced and not self.dequantized:
            lines.append("nothing in the file is coded: the model is as an uncompressed file would have made it")
        elif not self.replaced:
            lines.append("no layer stays coded, so that nothing is saved in memory")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.dequantized.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"dequantized ({reason}): {_list(names)}" for reason, names in reasons.items()]
        if self.missing:
            lines.append(f"missing, and as the model was made: {_list(self.missing)}")
        if self.unexpected:
            lines.append(f"unexpected, and not used: {_list(self.unexpected)}")
        if self.computed:
            lines.append(f"not read, the model does without: {_list(self.computed)}")
        return "\n".join(lines)


def _joined(module_name: str, key: str) -> str:
    return f"{module_name}.{key}" if module_name else key


@dataclass
class Place:
    """One parameter or persistent buffer of one module; a module may have several names.

    The plan fills in ``source``, the tensor of the file ("": none), or else ``conversion``, of which it gets
    ``converted``; and ``coded``, whether it becomes that of a RansLinear or RansEmbedding, or those of experts.
    """

    module: nn.Module
    key: str
    tensor: torch.Tensor
    module_names: list[str]
    source: str = ""
    coded: bool = False
    fp32: bool = False
    conversion: Conversion | None = None
    converted: str = ""

    @property
    def sources(self) -> list[str]:
        """Tensors of the file."""
        if self.conversion is not None:
            return self.conversion.sources
        return [self.source] if self.source else []

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers that the place gets, if they are not coded."""
        return torch.float32 if self.fp32 and self.tensor.is_floating_point() else self.tensor.dtype

    @property
    def names(self) -> list[str]:
        return [_joined(name, self.key) for name in self.module_names]

    @property
    def is_linear_weight(self) -> bool:
        """Whether the module is one that RansLinear can stand for. Subclasses are not: they may do anything else."""
        plain = type(self.module) is nn.Linear or type(self.module).__name__ == CONV1D
        return plain and self.key == "weight" and self.tensor.ndim == 2

    @property
    def is_embedding_weight(self) -> bool:
        """Whether the module is one that RansEmbedding can stand for."""
        return self.key == "weight" and PlainEmbedding.of(self.module) is not None

    @property
    def needs_transposed(self) -> bool:
        return type(self.module) is not nn.Linear


def places_of(model: nn.Module, names: CheckpointNames) -> list[Place]:
    """Parameters and persistent buffers, and those other buffers that the file has."""
    found: dict[tuple[int, str], Place] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            unsaved = key in module._non_persistent_buffers_set
            if tensor is not None and not (unsaved and _joined(name, key) not in names.direct):
                place = found.setdefault((id(module), key), Place(module, key, tensor, []))
                place.module_names.append(name)
    for place in found.values():
        place.fp32 = not names.fp32.isdisjoint(place.names)
    return list(found.values())


def tied_groups(places: Iterable[Place]) -> list[list[Place]]:
    """Places that hold one and the same tensor."""
    groups: dict[int, list[Place]] = {}
    for place in places:
        groups.setdefault(id(place.tensor), []).append(place)
    return list(groups.values())


@dataclass
class Selection:
    include: re.Pattern[str] | None
    exclude: re.Pattern[str] | None

    def reason_against(self, place: Place, name: str, info: TensorInfo) -> str | None:
        """Why a coded tensor cannot, or shall not, stay coded in this place; None if it can."""
        header = info.header
        if not place.is_linear_weight and not place.is_embedding_weight:
            return f"{type(place.module).__name__} needs plain numbers"
        if reason := self._not_chosen(name):
            return reason
        if place.is_embedding_weight:
            if header.layout.element_kind != ElementKind.SIGNED or info.dtype not in LOSSY_DTYPES:
                return "Embedding needs plain numbers of what is coded exactly"
            return "stored transposed, Embedding is not" if header.transposed else None
        if header.transposed != place.needs_transposed:
            stored = "inputs × outputs" if header.transposed else "outputs × inputs"
            return f"stored as {stored}, {type(place.module).__name__} is the other way round"
        return None

    def reason_against_experts(self, conversion: Conversion, reader: Reader) -> str | None:
        """Why matrices of experts cannot, or shall not, stay coded; None if they can."""
        if conversion.experts is None:
            return conversion.what
        for name in conversion.sources:
            info = reader.info(name)
            if info is None:
                return f"{conversion.what}, of which {name} is not coded"
            if info.header.transposed or info.header.matrices != 1:
                return f"{conversion.what}, of which {name} is no matrix of outputs × inputs"
            if reason := self._not_chosen(name):
                return f"{name} is {reason}, and experts stay coded all together"
        return None

    def _not_chosen(self, name: str) -> str | None:
        if self.include and not self.include.search(name):
            return "not included"
        if self.exclude and self.exclude.search(name):
            return "excluded"
        return None


def _stored_dtype(reader: Reader, name: str) -> str:
    container = reader.container(name)
    return str(container.coded[name]["dtype"]) if name in container.coded else container.tensors[name].dtype


def _refuse_other_type(name: str, stored: torch.dtype | None, wanted: torch.dtype) -> None:
    """Pairs of F4 are the one dtype that torch converts neither to others nor from them."""
    if stored != wanted and torch.float4_e2m1fn_x2 in (stored, wanted):
        raise ModelMismatchError(f"{name} is {stored} in the file, {wanted} in the model: torch does not convert F4")


def _plan_conversions(
    groups: list[list[Place]], reader: Reader, names: CheckpointNames, selection: Selection, report: Replacement
) -> list[str]:
    """The same for tensors that are made from others. Returns differences of shape."""
    makers = {target: conversion for conversion in names.conversions for target in conversion.shapes}
    differences = []
    for group in groups:
        target = next((name for place in group for name in place.names if name in makers), None)
        if target is None:
            continue
        conversion = makers[target]
        reason = selection.reason_against_experts(conversion, reader)
        for place in group:
            if conversion.shapes[target] != tuple(place.tensor.shape):
                differences.append(
                    f"{target}, {conversion.what} ({conversion.sources[0]}, …), is {list(conversion.shapes[target])}, "
                    f"and {list(place.tensor.shape)} in the model"
                )
            place.conversion, place.converted = conversion, target
            place.coded = reason is None and len(group) == 1 and place.key in place.module._parameters
            if target not in place.names:
                report.tied[place.names[0]] = target
        if not group[0].coded:
            why = reason or "tied to other tensors"
            report.dequantized |= {name: why for name in conversion.sources if reader.info(name) is not None}
    return differences


def plan_places(
    groups: list[list[Place]], reader: Reader, names: CheckpointNames, selection: Selection, report: Replacement
) -> list[str]:
    """Decide for each place which tensor of the file it gets, and how. Returns differences of shape."""
    differences = _plan_conversions(groups, reader, names, selection, report)
    for group in groups:
        if group[0].conversion is not None:
            continue

        def own_name(place: Place) -> str | None:
            return next((names.direct[n] for n in place.names if n in names.direct), None)

        shared = next((name for place in group if (name := own_name(place)) is not None), None)
        if shared is None:
            report.missing.append(group[0].names[0])
            continue
        # What needs plain numbers decides for all that share them: the others can use these.
        dense: str | None = None
        for place in sorted(group, key=lambda place: _stays_coded(place, own_name(place) or shared, reader, selection)):
            name = own_name(place)
            source = name or shared
            info = reader.info(source)
            stored = info.shape if info is not None else kept_shape(reader.container(source).tensors[source])
            if tuple(stored) != tuple(place.tensor.shape):
                differences.append(f"{source} is {list(stored)} in the file, {list(place.tensor.shape)} in the model")
                continue
            _refuse_other_type(source, TORCH_DTYPES.get(_stored_dtype(reader, source)), place.tensor.dtype)
            reason = "is not coded" if info is None else selection.reason_against(place, source, info)
            place.coded = reason is None and source != dense
            if not place.coded:
                # All plain places of a group stay tied, to the numbers of the first.
                dense = dense or source
                if name is None or not names.unties or _same_numbers(reader, dense, name):
                    source = dense
                if reason and reader.info(source) is not None:
                    report.dequantized.setdefault(source, reason)
            place.source = source
            if source != name:
                report.tied[place.names[0]] = source
    return list(dict.fromkeys(differences))  # tied places may differ from one tensor in the same way


def _stays_coded(place: Place, source: str, reader: Reader, selection: Selection) -> bool:
    info = reader.info(source)
    return info is not None and selection.reason_against(place, source, info) is None


def _same_numbers(reader: Reader, one: str, other: str) -> bool:
    """Whether two tensors of a file are stored as the same bytes of the same type, and with the same scales."""
    if one == other:
        return True
    if _stored_dtype(reader, one) != _stored_dtype(reader, other):
        return False
    first, second = reader.container(one), reader.container(other)
    for suffix in ("", *PART_SUFFIXES):
        a, b = first.tensors.get(one + suffix), second.tensors.get(other + suffix)
        if a is None and b is None:
            continue
        if a is None or b is None or a.size_bytes != b.size_bytes:
            return False
        if any(left != right for left, right in zip(first.pieces(a.name), second.pieces(b.name), strict=True)):
            return False
    return True


def _pattern(text: str | None, what: str, names: Iterable[str]) -> re.Pattern[str] | None:
    if text is None:
        return None
    pattern = re.compile(text)
    if not any(map(pattern.search, names)):
        raise ValueError(f"{what} {text!r} matches no coded tensor of the file")
    return pattern


def _list(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _refuse_coded_model(model: nn.Module, reader: Reader) -> None:
    """Layers that are coded already have no parameters that a file could have."""
    coded = [
        name
        for name, module in model.named_modules()
        if isinstance(module, CodedMatrix) and (f"{name}.weight" in reader or module.tensor_name in reader)
    ]
    if coded:
        raise ModelMismatchError(
            f"{reader.path}: {len(coded)} layers of the model are coded already ({_list(coded)}), as replace_linears "
            "leaves them; it takes plain modules: make the model anew"
        )


def _with_suggestions(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """The missing names, with those of the file that may be meant."""
    shown = [
        f"{name} (the file has {close[0]})" if (close := get_close_matches(name, unexpected, 1, 0.8)) else name
        for name in missing[:_SHOWN]
    ]
    rest = len(missing) - _SHOWN
    text = ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")
    if len(missing) == len(unexpected):
        for longer, shorter, whose in ((unexpected, missing, "the file"), (missing, unexpected, "the model")):
            prefix = min(longer)[: len(min(longer)) - len(min(shorter))]
            if prefix and sorted(longer) == sorted(prefix + name for name in shorter):
                return f"{text}; names of {whose} begin with {prefix!r}, and are the same but for that"
    return text


def _refuse_differences(
    reader: Reader, names: CheckpointNames, differences: list[str], report: Replacement, strict: bool
) -> None:
    lines = [f"{len(differences)} of another shape: {_list(differences)}"] if differences else []
    if strict and report.missing:
        missing = _with_suggestions(report.missing, names.unexpected)
        lines.append(f"{len(report.missing)} of the model are not in the file: {missing}")
    if strict and names.unexpected:
        lines.append(f"{len(names.unexpected)} of the file are not in the model: {_list(names.unexpected)}")
    if lines:
        advice = " (strict=False leaves these out)"
        if report.missing and strict:
            # A model that runs without some of its weights computes noise: strict=False is nothing to advise.
            advice = "; what has no weights would be random: make the model of the class and config that was saved"
        elif differences:
            advice = ""
        raise ModelMismatchError(f"{reader.path}: the tensors are not the model's; {'; '.join(lines)}{advice}")


def _initializer(model: nn.Module, name: str) -> Callable[[nn.Module], Any] | None:
    """What gives a module its first values: ``_init_weights`` of transformers' models, of the innermost around it."""
    parts = name.split(".") if name else []
    for count in range(len(parts), -1, -1):
        found = getattr(model.get_submodule(".".join(parts[:count])), "_init_weights", None)
        if callable(found):
            return found  # type: ignore[no-any-return]
    return None


def _computed_values(
    model: nn.Module, name: str, keys: Iterable[str], device: torch.device
) -> dict[str, torch.Tensor | None]:
    """What a model computes for tensors of one of its modules; None for what it does not, or draws by chance.

    Values that differ between two random seeds are drawn, or were not written at all. The model is as it was.
    """
    module, initialize = model.get_submodule(name), _initializer(model, name)
    keys = list(keys)
    if initialize is None:
        return dict.fromkeys(keys)
    held = [(inner, dict(inner._parameters), dict(inner._buffers)) for inner in module.modules()]
    results: list[dict[str, torch.Tensor | None]] = []
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            for seed in (0, 1):
                for inner, parameters, buffers in held:
                    where = device if inner is module else torch.device("meta")
                    inner._parameters.update(
                        {
                            k: None if p is None else nn.Parameter(_filled(p, seed, where), False)
                            for k, p in parameters.items()
                        }
                    )
                    inner._buffers.update(
                        {k: None if b is None else _filled(b, seed, where) for k, b in buffers.items()}
                    )
                torch.manual_seed(seed)
                initialize(module)
                results.append({key: module._parameters.get(key, module._buffers.get(key)) for key in keys})
    finally:
        for inner, parameters, buffers in held:
            inner._parameters.update(parameters)
            inner._buffers.update(buffers)
    first, second = results
    values: dict[str, torch.Tensor | None] = {}
    for key in keys:
        one, other = first[key], second[key]
        values[key] = one.detach() if one is not None and other is not None and one.equal(other) else None
    return values


def _filled(tensor: torch.Tensor, value: int, device: torch.device) -> torch.Tensor:
    return torch.empty_like(tensor, device=device, requires_grad=False).fill_(value)


def _put_tensor(module: nn.Module, key: str, tensor: torch.Tensor) -> None:
    if key in module._buffers:
        module._buffers[key] = tensor
    else:
        old = module._parameters[key]
        module._parameters[key] = nn.Parameter(tensor, old is None or old.requires_grad)


def _compute_missing(
    model: nn.Module, places: Sequence[Place], report: Replacement, home: torch.device | None
) -> list[tuple[Place, torch.Tensor]]:
    """Values of those missing tensors that a model says it does without; they are missing no more.

    Only what a model computes is taken, as the sinusoids of Marian's positions; values by chance are no weights.
    """
    ignored = [re.compile(text) for text in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    values: list[tuple[Place, torch.Tensor]] = []
    for place in places:
        name = place.names[0]
        if name not in report.missing or not any(pattern.search(name) for pattern in ignored):
            continue
        if _initializer(model, place.module_names[0]) is None and not place.tensor.is_meta:
            report.missing.remove(name)
            continue
        device = home or place.tensor.device
        value = _computed_values(model, place.module_names[0], [place.key], device)[place.key]
        if value is not None:
            report.missing.remove(name)
            values.append((place, value))
    return values


def _fill_unsaved_buffers(model: nn.Module, in_file: set[int], device: torch.device) -> None:
    """Give buffers that no file holds (rotary frequencies, masks) their values, where the model was made on meta.

    transformers' models compute them in ``_init_weights``; it is used where it is there.

    Args:
        in_file: ids of tensors that a file does hold.
    """
    filled: list[tuple[nn.Module, str, torch.Tensor]] = []
    empty: list[str] = []
    for name, module in model.named_modules():
        unsaved = [
            key
            for key, buffer in module._buffers.items()
            if buffer is not None and buffer.is_meta and key in module._non_persistent_buffers_set
            if id(buffer) not in in_file
        ]
        if not unsaved:
            continue
        for key, value in _computed_values(model, name, unsaved, device).items():
            if value is None:
                empty.append(_joined(name, key))
            else:
                filled.append((module, key, value))
    if empty:
        raise ModelMismatchError(
            f"buffers on the meta device that no file holds, and that the model does not compute: {_list(empty)}; "
            "make the model with real buffers (as accelerate's init_empty_weights does)"
        )
    for module, key, value in filled:
        module._buffers[key] = value


def _size_bytes(model: nn.Module) -> int:
    """Parameters and buffers, each tensor once; of coded layers all that they keep on the device."""
    seen: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, CodedMatrix):
            blob = module._current()
            if blob is not None:
                seen[id(blob)] = blob.nbytes
            tensors: Iterable[torch.Tensor | None] = [getattr(module, "bias", None)]
        else:
            tensors = [*module._parameters.values(), *module._buffers.values()]
        seen |= {id(t): t.numel() * t.element_size() for t in tensors if t is not None}
    return sum(seen.values())


def layer_in_file(reader: Reader, name: str) -> RansLinear:
    """A layer whose weights stay in the file until a LayerStream takes it."""
    info = reader.info(name)
    assert info is not None
    return RansLinear.empty(
        info.header.cols,
        info.header.rows,
        info.blob_bytes,
        info.num_scales,
        False,
        TORCH_DTYPES[info.dtype],
        "meta",
        tensor_name=name,
        transposed=info.header.transposed,
        column_scales=info.has_column_scales,
        row_offsets=info.has_row_offsets,
    )


def embedding_in_file(reader: Reader, place: Place) -> RansEmbedding:
    """The same for an embedding."""
    name, info, plain = place.source, reader.info(place.source), PlainEmbedding.of(place.module)
    assert info is not None
    assert plain is not None
    return RansEmbedding.empty(
        info.header.rows,
        info.header.cols,
        info.blob_bytes,
        info.num_scales,
        place.dtype,
        weight_dtype=TORCH_DTYPES[info.dtype],
        plain=plain,
        tensor_name=name,
        column_scales=info.has_column_scales,
        row_offsets=info.has_row_offsets,
    )


def _strip(group: Sequence[Place]) -> None:
    """Let go of a tensor, so that what comes in its place finds room. Its places stay tied, for another attempt."""
    old = group[0].tensor
    empty = torch.empty_like(old, device="meta", requires_grad=False)
    if isinstance(old, nn.Parameter):
        empty = nn.Parameter(empty, old.requires_grad)
    for place in group:
        home = place.module._parameters if place.key in place.module._parameters else place.module._buffers
        home[place.key] = empty  # type: ignore[assignment]
        place.tensor = empty


def name_in_expert(name: str) -> str:
    """``model.layers.0.mlp.experts.3.up_proj.weight`` → ``up_proj``."""
    return re.sub(r"^.*\.\d+\.", "", name).removesuffix(".weight").replace(".", "_")


def put_module(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = layer


class _Loading:
    """The second half: a checked plan, carried out."""

    def __init__(
        self, model: nn.Module, reader: Reader, places: list[Place], home: torch.device | None, report: Replacement
    ) -> None:
        self.model = model
        self.reader = reader
        self.places = places
        self.report = report
        self.devices = [home or place.tensor.device for place in places]
        self.tensors: dict[tuple[str, torch.device], DeviceBlob | torch.Tensor] = {}

    def load(self, deferred: set[int], verify: bool, progress: bool | Progress | None) -> None:
        by_device: dict[torch.device, dict[str, None]] = {}
        for place, device in zip(self.places, self.devices, strict=True):
            if not place.coded or id(place.module) not in deferred:
                by_device.setdefault(device, {}).update(dict.fromkeys(place.sources))
        for group in tied_groups(self.places):
            _strip(group)
        total = sum(stored_bytes(self.reader, name) for names in by_device.values() for name in names)
        with shown_progress(progress, "loading", total) as advance:
            for device, names in by_device.items():
                loaded = load_tensors(self.reader, names, device, verify=verify, progress=advance)
                self.tensors |= {(name, device): tensor for name, tensor in loaded.items()}

    def attach_numbers(self) -> None:
        """Plain tensors to their places; those that are tied get the same one."""
        shared: dict[tuple[str, torch.device], torch.Tensor] = {}
        converted: dict[tuple[str, torch.device], torch.Tensor] = {}
        for place, device in zip(self.places, self.devices, strict=True):
            if place.coded:
                continue
            is_parameter, dtype = place.key in place.module._parameters, place.dtype
            key = (place.converted or place.source, device)
            if key not in shared:
                if place.conversion is None:
                    values = self._numbers(place.source, device, dtype)
                else:
                    if key not in converted:
                        numbers = {name: self._numbers(name, device, dtype) for name in place.conversion.sources}
                        made = place.conversion.convert(numbers)
                        converted |= {(name, device): tensor for name, tensor in made.items()}
                    values = converted.pop(key).to(dtype)
                shared[key] = nn.Parameter(values, place.tensor.requires_grad) if is_parameter else values
            home = place.module._parameters if is_parameter else place.module._buffers
            home[place.key] = shared[key]  # type: ignore[assignment]

    def _numbers(self, name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        tensor = self.tensors[name, device]
        if isinstance(tensor, DeviceBlob):
            return tensor.dequantize(dtype)
        self.report.loaded.append(name)
        return tensor.to(dtype)

    def attach_layers(self) -> None:
        """Coded weights to new layers, which take the biases that are there by now."""
        for place, device in zip(self.places, self.devices, strict=True):
            if not place.coded:
                continue
            if place.conversion is not None:
                self._attach_experts(place, place.conversion, device)
                continue
            layer: CodedMatrix
            if place.is_embedding_weight:
                layer = self._embedding(place, device)
            else:
                bias = place.module.bias
                assert bias is None or isinstance(bias, torch.Tensor)
                layer = self._layer(place.source, device, bias, place.module.training)
            for name in place.module_names:
                put_module(self.model, name, layer)
                self.report.replaced[name] = place.source

    def _layer(self, name: str, device: torch.device, bias: torch.Tensor | None, training: bool) -> RansLinear:
        blob = self.tensors.get((name, device))
        if blob is None:
            layer = layer_in_file(self.reader, name)
            layer.bias = None if bias is None else bias.detach()
        else:
            assert isinstance(blob, DeviceBlob)
            layer = RansLinear(blob, None if bias is None else bias.to(device), tensor_name=name)
        return layer.train(training)

    def _embedding(self, place: Place, device: torch.device) -> RansEmbedding:
        blob, name, plain = self.tensors.get((place.source, device)), place.source, PlainEmbedding.of(place.module)
        assert plain is not None
        if blob is None:
            layer = embedding_in_file(self.reader, place)
        else:
            assert isinstance(blob, DeviceBlob)
            layer = RansEmbedding(blob, place.dtype, plain, tensor_name=name)
        return layer.train(place.module.training)

    def _attach_experts(self, place: Place, conversion: Conversion, device: torch.device) -> None:
        assert conversion.experts is not None
        matrices = [
            [(name_in_expert(name), self._layer(name, device, None, place.module.training)) for name in sources]
            for sources in conversion.experts
        ]
        for layers, sources in zip(keep_coded(place.module, place.key, matrices), conversion.experts, strict=True):
            for module_name in place.module_names:
                self.report.replaced |= {
                    _joined(module_name, layer): source for layer, source in zip(layers, sources, strict=True)
                }

    def move_rest(self, home: torch.device) -> None:
        """What no file holds goes to the same device."""
        for module in self.model.modules():
            if isinstance(module, CodedMatrix):
                continue
            for parameter in module._parameters.values():
                if parameter is not None and not parameter.is_meta:
                    parameter.data = parameter.data.to(home)
            for key, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[key] = buffer.to(home)


def replace_linears(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    include: str | None = None,
    exclude: str | None = None,
    strict: bool = True,
    defer: Iterable[nn.Module] = (),
    verify: bool = True,
    progress: bool | Progress | None = None,
) -> Replacement:
    """Load a compressed file or directory into a model of plain modules, in place.

    ``nn.Linear`` (and transformers' ``Conv1D``) whose weights are coded become :class:`RansLinear`, ``nn.Embedding``
    whose weights are quantized become :class:`RansEmbedding`. All other tensors are loaded in the model's own dtypes;
    coded ones of other modules are decoded. Weights that are tied stay tied: an output layer that shares an embedding's
    numbers multiplies with those, coded once where both can. The model may be on the meta device.

    Everything is compared before anything is changed; an error while loading leaves the model without weights,
    on the meta device and still tied, so that it can be tried again.

    Args:
        path: a .safetensors file or a directory, with the names of the model. Of a directory with components give the
            component's folder: subfolders are other models.
        device: where all goes; by default each tensor stays on the device where it is, and a model that is on meta,
            be it in parts, goes to CUDA where torch has it, else to the CPU.
        include: only weights whose names match this regular expression (``re.search``) stay coded.
        exclude: those that match this one are decoded.
        strict: the file must have all parameters and persistent buffers of the model, and no others.
        defer: modules whose coded weights are left in the file: :func:`kvpack.stream_modules` takes them from there.
        verify, progress: as of :func:`kvpack.load`.

    Raises:
        ModelMismatchError: names or shapes differ, layers are coded already, or a buffer on meta has no values. The
            model is as it was.
        ValueError: ``include`` or ``exclude`` matches nothing.
        DeviceError, FormatError, OSError: as of :func:`kvpack.load`.
    """
    report = Replacement(bytes_before=_size_bytes(model))
    on_meta = any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    home = resolve_device(device) if device is not None or on_meta else None
    with Reader(Path(path), components=False) as reader:
        report.other_weights = [*reader.tree.not_opened, *reader.other_sets()]
        if strict:
            _refuse_coded_model(model, reader)
        coded_names = [name for container in reader.containers for name in container.coded]
        selection = Selection(_pattern(include, "include", coded_names), _pattern(exclude, "exclude", coded_names))
        try:
            names = names_for(model, tensor_shapes(reader))
        except ModelMismatchError as error:
            error.args = (f"{reader.path}: {error}",)
            raise
        places = places_of(model, names)
        differences = plan_places(tied_groups(places), reader, names, selection, report)
        report.unexpected = [*names.unexpected, *names.heads]
        report.computed = names.computed
        computed = _compute_missing(model, places, report, home)
        _refuse_differences(reader, names, differences, report, strict)
        if any(place.coded and "" in place.module_names for place in places):
            raise ModelMismatchError("the model itself is the linear layer: put it into a module, or use kvpack.load")
        loading = _Loading(model, reader, [place for place in places if place.sources], home, report)
        if home is not None:
            _fill_unsaved_buffers(model, {id(p.tensor) for p in loading.places}, home)
        for place, value in computed:
            _put_tensor(place.module, place.key, value)
        loading.load({id(module) for outer in defer for module in outer.modules()}, verify, progress)
        loading.attach_numbers()
        loading.attach_layers()
        if home is not None:
            loading.move_rest(home)
    report.bytes_after = _size_bytes(model)
    return report


def tensor_shapes(reader: Reader) -> dict[str, Sequence[int]]:
    """Tensor → its shape, of all tensors of a file's own model."""
    shapes: dict[str, Sequence[int]] = {}
    for name in reader.main_keys():
        entry = reader.container(name).coded.get(name)
        shapes[name] = reader.container(name).tensors[name].shape if entry is None else entry["shape"]
    return shapes
