"""``kvpack.replace_linears``: put a compressed file's weights into a model; its linear layers stay coded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from kvpack.encode.reader import Reader
from kvpack.errors import ModelMismatchError
from kvpack.format.header import BlobHeader
from kvpack.runtime.device.devices import resolve_device
from kvpack.runtime.weights.device_blob import DeviceBlob
from kvpack.runtime.weights.linear import RansLinear
from kvpack.runtime.weights.load import TORCH_DTYPES, kept_shape, load_tensors, shown_progress, stored_bytes

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
        missing: tensors of the model that are neither in the file nor tied (with ``strict=False``).
        unexpected: tensors of the file for which the model has no place (with ``strict=False``).
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
        return f"{', '.join(parts)}; {self.bytes_before / 1e6:.2f} MB → {self.bytes_after / 1e6:.2f} MB"


@dataclass
class _Place:
    """One parameter or persistent buffer of one module; a module may have several names.

    The plan fills in ``source``, the tensor of the file ("": none), and ``coded``, whether it becomes a
    RansLinear's.
    """

    module: nn.Module
    key: str
    tensor: torch.Tensor
    module_names: list[str]
    source: str = ""
    coded: bool = False

    @property
    def names(self) -> list[str]:
        return [f"{name}.{self.key}" if name else self.key for name in self.module_names]

    @property
    def is_linear_weight(self) -> bool:
        """Whether the module is one that RansLinear can stand for. Subclasses are not: they may do anything else."""
        plain = type(self.module) is nn.Linear or type(self.module).__name__ == CONV1D
        return plain and self.key == "weight" and self.tensor.ndim == 2

    @property
    def needs_transposed(self) -> bool:
        return type(self.module) is not nn.Linear


def _places(model: nn.Module) -> list[_Place]:
    found: dict[tuple[int, str], _Place] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        tensors = {
            **module._parameters,
            **{k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set},
        }
        for key, tensor in tensors.items():
            if tensor is not None:
                place = found.setdefault((id(module), key), _Place(module, key, tensor, []))
                place.module_names.append(name)
    return list(found.values())


def _tied_groups(places: Iterable[_Place]) -> list[list[_Place]]:
    """Places that hold one and the same tensor."""
    groups: dict[int, list[_Place]] = {}
    for place in places:
        groups.setdefault(id(place.tensor), []).append(place)
    return list(groups.values())


@dataclass
class _Selection:
    include: re.Pattern[str] | None
    exclude: re.Pattern[str] | None

    def reason_against(self, place: _Place, name: str, header: BlobHeader) -> str | None:
        """Why a coded tensor cannot, or shall not, stay coded in this place; None if it can."""
        if not place.is_linear_weight:
            return f"{type(place.module).__name__} needs plain numbers"
        if self.include and not self.include.search(name):
            return "not included"
        if self.exclude and self.exclude.search(name):
            return "excluded"
        if header.transposed != place.needs_transposed:
            stored = "inputs × outputs" if header.transposed else "outputs × inputs"
            return f"stored as {stored}, {type(place.module).__name__} is the other way round"
        return None


def _stored_dtype(reader: Reader, name: str) -> str:
    container = reader.container(name)
    return str(container.coded[name]["dtype"]) if name in container.coded else container.tensors[name].dtype


def _refuse_other_type(name: str, stored: torch.dtype | None, wanted: torch.dtype) -> None:
    """Pairs of F4 are the one dtype that torch converts neither to others nor from them."""
    if stored != wanted and torch.float4_e2m1fn_x2 in (stored, wanted):
        raise ModelMismatchError(f"{name} is {stored} in the file, {wanted} in the model: torch does not convert F4")


def _plan(groups: list[list[_Place]], reader: Reader, selection: _Selection, report: Replacement) -> list[str]:
    """Decide for each place which tensor of the file it gets, and how. Returns differences of shape."""
    differences = []
    for group in groups:
        # What is not a linear layer's decides for all that share it: it needs plain numbers, which the others can use.
        group.sort(key=lambda place: place.is_linear_weight)
        own = [next((n for n in place.names if n in reader), None) for place in group]
        shared = next((name for name in own if name is not None), None)
        if shared is None:
            report.missing.append(group[0].names[0])
            continue
        dense: str | None = None
        for place, name in zip(group, own, strict=True):
            source = name or shared
            info = reader.info(source)
            stored = info.shape if info is not None else kept_shape(reader.container(source).tensors[source])
            if tuple(stored) != tuple(place.tensor.shape):
                differences.append(f"{source} is {list(stored)} in the file, {list(place.tensor.shape)} in the model")
                continue
            _refuse_other_type(source, TORCH_DTYPES.get(_stored_dtype(reader, source)), place.tensor.dtype)
            reason = "is not coded" if info is None else selection.reason_against(place, source, info.header)
            place.coded = reason is None and source != dense
            if not place.coded:
                # All plain places of a group stay tied, to the numbers of the first.
                source = dense = dense or source
                if reason and reader.info(source) is not None:
                    report.dequantized.setdefault(source, reason)
            place.source = source
            if source != name:
                report.tied[place.names[0]] = source
    return list(dict.fromkeys(differences))  # tied places may differ from one tensor in the same way


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


def _not_ignored(model: nn.Module, what: str, names: Iterable[str]) -> list[str]:
    """Names but those that a transformers model says are of no account."""
    ignored = [re.compile(text) for text in getattr(model, f"_keys_to_ignore_on_load_{what}", None) or ()]
    return [name for name in names if not any(pattern.search(name) for pattern in ignored)]


def _refuse_coded_model(model: nn.Module, reader: Reader) -> None:
    """Layers that are coded already have no parameters that a file could have."""
    coded = [
        name
        for name, module in model.named_modules()
        if isinstance(module, RansLinear) and (f"{name}.weight" in reader or module.tensor_name in reader)
    ]
    if coded:
        raise ModelMismatchError(
            f"{reader.path}: {len(coded)} layers of the model are coded already ({_list(coded)}), as replace_linears "
            "leaves them; it takes plain modules: make the model anew (strict=False loads what fits)"
        )


def _refuse_differences(reader: Reader, differences: list[str], report: Replacement, strict: bool) -> None:
    lines = [f"{len(differences)} of another shape: {_list(differences)}"] if differences else []
    if strict and report.missing:
        lines.append(f"{len(report.missing)} of the model are not in the file: {_list(report.missing)}")
    if strict and report.unexpected:
        lines.append(f"{len(report.unexpected)} of the file are not in the model: {_list(report.unexpected)}")
    if lines:
        advice = "" if differences else " (strict=False loads what fits)"
        raise ModelMismatchError(f"{reader.path}: the tensors are not the model's; {'; '.join(lines)}{advice}")


def _fill_unsaved_buffers(model: nn.Module, device: torch.device) -> None:
    """Give buffers that no file holds (rotary frequencies, masks) their values, where the model was made on meta.

    transformers' models compute them in ``_init_weights``; it is used where it is there, and believed if it wrote.
    """
    initialize = getattr(model, "_init_weights", None)
    filled: list[tuple[nn.Module, dict[str, torch.Tensor]]] = []
    empty: list[str] = []
    for name, module in model.named_modules():
        unsaved = {
            key: buffer
            for key, buffer in module._buffers.items()
            if buffer is not None and buffer.is_meta and key in module._non_persistent_buffers_set
        }
        if not unsaved:
            continue
        filled.append((module, unsaved))
        fresh = {key: torch.empty_like(buffer, device=device) for key, buffer in unsaved.items()}
        module._buffers.update(fresh)
        before = {key: buffer._version for key, buffer in fresh.items()}
        if callable(initialize):
            with torch.no_grad():
                initialize(module)
        empty += [
            f"{name}.{key}" if name else key
            for key, buffer in fresh.items()
            if module._buffers[key] is buffer and buffer._version == before[key]
        ]
    if empty:
        for module, unsaved in filled:
            module._buffers.update(unsaved)
        raise ModelMismatchError(
            f"buffers on the meta device that no file holds, and that the model does not compute: {_list(empty)}; "
            "make the model with real buffers (as accelerate's init_empty_weights does)"
        )


def _size_bytes(model: nn.Module) -> int:
    """Parameters and buffers, each tensor once; of coded layers all that they keep on the device."""
    seen: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, RansLinear):
            blob = module._current()
            if blob is not None:
                seen[id(blob)] = blob.nbytes
            tensors: Iterable[torch.Tensor | None] = [module.bias]
        else:
            tensors = [*module._parameters.values(), *module._buffers.values()]
        seen |= {id(t): t.numel() * t.element_size() for t in tensors if t is not None}
    return sum(seen.values())


def _deferred_layer(reader: Reader, name: str) -> RansLinear:
    """A layer whose weights stay in the file until a LayerStream takes it."""
    info = reader.info(name)
    assert info is not None
    scales = reader.container(name).scales(name)
    return RansLinear.empty(
        info.header.cols,
        info.header.rows,
        info.blob_bytes,
        0 if scales is None else len(scales),
        False,
        TORCH_DTYPES[info.dtype],
        "meta",
        tensor_name=name,
        transposed=info.header.transposed,
    )


def _strip(place: _Place) -> None:
    """Let go of a tensor, so that what comes in its place finds room."""
    place.tensor = torch.empty_like(place.tensor, device="meta", requires_grad=place.tensor.requires_grad)
    if place.key in place.module._buffers:
        place.module._buffers[place.key] = place.tensor
    else:
        place.module._parameters[place.key] = nn.Parameter(place.tensor, place.tensor.requires_grad)


def _put_module(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = layer


class _Loading:
    """The second half: a checked plan, carried out."""

    def __init__(
        self, model: nn.Module, reader: Reader, places: list[_Place], home: torch.device | None, report: Replacement
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
                by_device.setdefault(device, {})[place.source] = None
            _strip(place)
        total = sum(stored_bytes(self.reader, name) for names in by_device.values() for name in names)
        with shown_progress(progress, "loading", total) as advance:
            for device, names in by_device.items():
                loaded = load_tensors(self.reader, names, device, verify=verify, progress=advance)
                self.tensors |= {(name, device): tensor for name, tensor in loaded.items()}

    def attach_numbers(self) -> None:
        """Plain tensors to their places; those that are tied get the same one."""
        shared: dict[tuple[str, torch.device], torch.Tensor] = {}
        for place, device in zip(self.places, self.devices, strict=True):
            if place.coded:
                continue
            key, is_parameter = (place.source, device), place.key in place.module._parameters
            if key not in shared:
                tensor = self.tensors[key]
                dtype = place.tensor.dtype
                values = tensor.dequantize(dtype) if isinstance(tensor, DeviceBlob) else tensor.to(dtype)
                shared[key] = nn.Parameter(values, place.tensor.requires_grad) if is_parameter else values
                if not isinstance(tensor, DeviceBlob):
                    self.report.loaded.append(place.source)
            home = place.module._parameters if is_parameter else place.module._buffers
            home[place.key] = shared[key]  # type: ignore[assignment]

    def attach_layers(self) -> None:
        """Coded weights to new layers, which take the biases that are there by now."""
        for place, device in zip(self.places, self.devices, strict=True):
            if not place.coded:
                continue
            blob = self.tensors.get((place.source, device))
            bias = place.module.bias
            assert bias is None or isinstance(bias, torch.Tensor)
            if blob is None:
                layer = _deferred_layer(self.reader, place.source)
                layer.bias = None if bias is None else bias.detach()
            else:
                assert isinstance(blob, DeviceBlob)
                layer = RansLinear(blob, None if bias is None else bias.to(device), tensor_name=place.source)
            layer.train(place.module.training)
            for name in place.module_names:
                _put_module(self.model, name, layer)
                self.report.replaced[name] = place.source

    def move_rest(self, home: torch.device) -> None:
        """What no file holds goes to the same device."""
        for module in self.model.modules():
            if isinstance(module, RansLinear):
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
    verify: bool = False,
    progress: bool | Progress | None = None,
) -> Replacement:
    """Load a compressed file or directory into a model of plain modules, in place.

    ``nn.Linear`` (and transformers' ``Conv1D``) whose weights are coded become :class:`RansLinear`. All other tensors
    are loaded in the model's own dtypes; coded ones of other modules, as embeddings, are decoded. Weights that are tied
    stay tied: a layer that shares an embedding's numbers multiplies with those. The model may be on the meta device.

    Everything is compared before anything is changed; an error while loading leaves the model without weights.

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
    places = _places(model)
    on_meta = any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    home = resolve_device(device) if device is not None or on_meta else None
    with Reader(Path(path), components=False) as reader:
        report.other_weights = [*reader.tree.not_opened, *reader.other_sets()]
        if strict:
            _refuse_coded_model(model, reader)
        coded_names = [name for container in reader.containers for name in container.coded]
        selection = _Selection(_pattern(include, "include", coded_names), _pattern(exclude, "exclude", coded_names))
        differences = _plan(_tied_groups(places), reader, selection, report)
        known = {name for place in places for name in place.names}
        report.unexpected = _not_ignored(
            model, "unexpected", [name for name in reader.main_keys() if name not in known]
        )
        report.missing = _not_ignored(model, "missing", report.missing)
        _refuse_differences(reader, differences, report, strict)
        if any(place.coded and "" in place.module_names for place in places):
            raise ModelMismatchError("the model itself is the linear layer: put it into a module, or use kvpack.load")
        if home is not None:
            _fill_unsaved_buffers(model, home)
        loading = _Loading(model, reader, [place for place in places if place.source], home, report)
        loading.load({id(module) for outer in defer for module in outer.modules()}, verify, progress)
        loading.attach_numbers()
        loading.attach_layers()
        if home is not None:
            loading.move_rest(home)
    report.bytes_after = _size_bytes(model)
    return report
