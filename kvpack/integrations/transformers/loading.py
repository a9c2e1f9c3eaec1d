"""Which tensors of a compressed checkpoint transformers loads, and which kvpack loads in its place.

``from_pretrained`` makes a model on the meta device and fills it from the checkpoint's files. Three things happen to
the tensors of these files:

- What is not coded is transformers' own affair: names, ties, types, devices, offloading, its report.
- A coded tensor of a layer that can multiply with it stays coded. The layer is swapped before loading; transformers
  sees it as a layer without weights, and kvpack reads them afterwards, straight to where they stay.
- A coded tensor of anything else is decoded. Transformers' loader asks for it by a converter, and treats what it gets
  like any other tensor.

The plan is that of ``replace_linears``.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.integrations.accelerate import get_device

from kvpack.encode.dtypes import NARROW_DTYPES
from kvpack.encode.listing import listed
from kvpack.encode.model_tree import is_index_name
from kvpack.encode.reader import Reader, TensorInfo
from kvpack.errors import InputError, ModelMismatchError
from kvpack.format.container import PART_SUFFIXES
from kvpack.integrations.transformers_names import transformers_names
from kvpack.runtime.weights.checkpoint_names import Conversion
from kvpack.runtime.weights.coded_matrix import BLOB, PARTS, CodedMatrix, CodedWeight
from kvpack.runtime.weights.device_blob import DeviceBlob
from kvpack.runtime.weights.embedding import RansEmbedding
from kvpack.runtime.weights.experts import keep_coded
from kvpack.runtime.weights.linear import RansLinear
from kvpack.runtime.weights.load import CrcChecks, load_tensors, stored_name
from kvpack.runtime.weights.replace import (
    Place,
    Replacement,
    Selection,
    embedding_in_file,
    layer_in_file,
    name_in_expert,
    places_of,
    plan_places,
    put_module,
    tensor_shapes,
    tied_groups,
)

# What transformers' loader takes instead of the names of tensors that are not its own. Its renamings may put something
# before it, and do not change it.
_TAKEN = "kvpack-loads-this-itself"
_DECODED = "kvpack-decodes-"
# How many names a message lists.
_SHOWN = 5

_Layer = TypeVar("_Layer", bound=CodedMatrix)


def open_files(files: Sequence[str]) -> Reader:
    """The files of one set of weights, as transformers found them.

    Raises:
        InputError: several files without an index, or files that are no safetensors files.
        FormatError, OSError: as of :class:`Reader`.
    """
    paths = [Path(file) for file in files]
    if not paths or any(path.suffix != ".safetensors" for path in paths):
        found = listed(list(map(str, files)), _SHOWN) if paths else "a state_dict"
        raise InputError(f"kvpack reads safetensors files, and not {found}")
    if len(paths) == 1:
        return Reader(paths[0])
    names = {path.name for path in paths}
    for index in sorted(path for path in paths[0].parent.iterdir() if is_index_name(path.name)):
        weight_map = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {})
        if set(weight_map.values()) == names:
            return Reader(index, components=False)
    raise InputError(f"{paths[0].parent}: no index names these {len(paths)} files: {listed(sorted(names), _SHOWN)}")


class _GivenWeight(CodedWeight):
    """Tells transformers' functions of initialization, which some modules call for their children, to pass over it."""

    _is_hf_initialized = True


class _InFile(CodedMatrix):
    """A layer whose weights are still in the file; :func:`settle` makes it an ordinary one."""

    @property
    def weight(self) -> CodedWeight:
        known = super().weight
        return _GivenWeight(known.dtype, known.device, known.shape)

    def __setattr__(self, name: str, value: Any) -> None:
        """transformers gives buffers that no file has room on their device. All that is needed is the device."""
        if name in PARTS and not value.is_meta:
            value = value.new_empty(0)
        super().__setattr__(name, value)


class _LinearInFile(_InFile, RansLinear):
    pass


class _EmbeddingInFile(_InFile, RansEmbedding):
    pass


def settle(layer: CodedMatrix) -> None:
    """Make a layer in a file an ordinary one, without weights."""
    layer._buffers.update(dict.fromkeys(PARTS))
    layer._non_persistent_buffers_set -= set(PARTS)
    layer.__class__ = RansEmbedding if isinstance(layer, RansEmbedding) else RansLinear


@dataclass
class _ModuleSelection(Selection):
    """Leaves out modules by their names in the model, or all."""

    modules: Sequence[str] = ()
    nothing: bool = False

    def _why_not(self, names: Sequence[str]) -> str | None:
        if self.nothing:
            return "dequantize is set"
        if any(f"{name}.".startswith(f"{module}.") for name in names for module in self.modules):
            return "modules_to_not_convert names it"
        return None

    @classmethod
    def of(cls, model: Any, modules: Sequence[str], nothing: bool) -> _ModuleSelection:
        """
        Args:
            modules: names in the model, or in one that has a base model's prefix more.
        """
        base = f"{model.base_model_prefix}."
        known = {name for name, _ in model.named_modules(remove_duplicate=False)}
        found = {name: next((n for n in (name, name.removeprefix(base)) if n in known), None) for name in modules}
        if lacking := [name for name, module in found.items() if module is None]:
            warnings.warn(
                f"modules_to_not_convert: {type(model).__name__} has no module {listed(lacking, _SHOWN)}",
                stacklevel=2,
            )
        return cls(None, None, [module for module in found.values() if module is not None], nothing)

    def reason_against(self, place: Place, name: str, info: TensorInfo) -> str | None:
        return super().reason_against(place, name, info) or self._why_not(place.module_names)

    def reason_against_experts(self, conversion: Conversion, reader: Reader) -> str | None:
        return super().reason_against_experts(conversion, reader) or self._why_not(list(conversion.shapes))


class _Decode(ConversionOps):  # type: ignore[misc]
    """Reads and decodes what one parameter of the model needs; what transformers has read is not looked at."""

    supports_many_to_many = True

    def __init__(self, loading: CheckpointLoading) -> None:
        self.loading = loading

    def convert(
        self, input_dict: Any, source_patterns: list[str], target_patterns: list[str], **options: Any
    ) -> dict[str, Any]:
        return self.loading.decode(options["full_layer_name"])

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("what was decoded is saved as it is")


class _DecodingConverter(WeightConverter):  # type: ignore[misc]
    """Stored tensors → the parameter that is decoded from them."""

    def __init__(self, loading: CheckpointLoading) -> None:
        super().__init__([_DECODED], [_DECODED], [_Decode(loading)], force_cpu=True)
        self.loading = loading
        # The loader looks a converter up by the pattern that rename_source_key gives: here the stored tensor's name.
        object.__setattr__(self, "source_patterns", list(loading.decoded_from))

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        found = re.search(rf"{_DECODED}(\d+)-", source_key)
        if found is None:
            return source_key, None
        stored = self.source_patterns[int(found[1])]
        return self.loading.decoded_from[stored], stored

    def __deepcopy__(self, memo: Any) -> _DecodingConverter:
        return _DecodingConverter(self.loading)


class _OwnNames(WeightRenaming):  # type: ignore[misc]
    """Takes tensors that kvpack loads out of transformers' hands; the first of all renamings."""

    def __init__(self, loading: CheckpointLoading) -> None:
        super().__init__(_TAKEN, _TAKEN)
        self.loading = loading
        self.numbers = {stored: number for number, stored in enumerate(loading.decoded_from)}

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if source_key in self.numbers:
            return f"{_DECODED}{self.numbers[source_key]}-", None
        if source_key in self.loading.taken:
            return _TAKEN, None
        # Coded, and the model has no place for it: transformers reports it under its original name.
        for suffix in PART_SUFFIXES:
            if source_key.endswith(suffix) and source_key.removesuffix(suffix) in self.loading.reader:
                return source_key.removesuffix(suffix), None
        return source_key, None


@dataclass
class CheckpointLoading:
    """One call of ``from_pretrained``.

    Attributes:
        layers: layers that stay coded → the coded tensors that they multiply with.
        decoded_from: stored tensor → the model's parameter that is decoded from it, and perhaps from others.
        taken: stored tensors of layers that stay coded.
        dtypes: of the model's tensors that transformers loads.
        device_map: transformers' plan, as far as it is known.
        report: what became of each tensor.
        untied: attribute of the model → its ties, where coded layers are among them, which have weights of their own.
    """

    model: Any
    reader: Reader
    device_map: Any = None
    layers: dict[str, CodedMatrix] = field(default_factory=dict)
    decoded_from: dict[str, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    report: Replacement = field(default_factory=Replacement)
    untied: dict[str, dict[str, str]] = field(default_factory=dict)
    _places: dict[str, Place] = field(default_factory=dict)
    _sources: dict[str, list[str]] = field(default_factory=dict)

    def prepare(self, transforms: Sequence[Any], modules_to_not_convert: Sequence[str], dequantize: bool) -> list[Any]:
        """Plan, and swap the layers that stay coded.

        Args:
            transforms: transformers' renamings and converters for the model.

        Returns:
            The same with kvpack's own.

        Raises:
            ModelMismatchError: shapes differ, or experts lack matrices.
            FormatError: a tensor that will be decoded is damaged.
        """
        model, reader = self.model, self.reader
        try:
            names = transformers_names(model, tensor_shapes(reader), transforms)
        except ModelMismatchError as error:
            error.args = (f"{reader.path}: {error}",)
            raise
        assert names is not None
        selection = _ModuleSelection.of(model, modules_to_not_convert, dequantize)
        self.dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        self._refuse_narrow()
        places = places_of(model, names)
        self.dtypes |= {name: place.dtype for place in places if place.fp32 for name in place.names}
        self._tie(places, names.direct)
        groups = tied_groups(places)
        differences = plan_places(groups, reader, names, selection, self.report)
        # Transformers' own check of shapes is not made where there is a quantizer, before 5.23.
        if differences:
            raise ModelMismatchError(
                f"{reader.path}: {len(differences)} tensors are of another shape: {listed(differences, _SHOWN)}"
            )
        self._tell_of_decoded_embeddings(places)
        for group in groups:
            for place in group:
                self._plan_place(place, names.direct)
        for place in places:
            if place.coded:
                self._swap(place)
        self._untie()
        self._check_decoded()
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {_TAKEN}
        own: list[Any] = [_OwnNames(self)]
        if self.decoded_from:
            own.append(_DecodingConverter(self))
        return [*own, *transforms]

    def _tie(self, places: Sequence[Place], direct: dict[str, str]) -> None:
        """Let places hold one tensor that transformers ties after loading, where the file has it under one name."""
        by_name = {name: place for place in places for name in place.names}
        for one, other in (getattr(self.model, "all_tied_weights_keys", None) or {}).items():
            first, second = by_name.get(one), by_name.get(other)
            if first is None or second is None or direct.keys().isdisjoint(second.names):
                continue
            if direct.keys().isdisjoint(first.names) and first.tensor.shape == second.tensor.shape:
                first.tensor = second.tensor

    def _tell_of_decoded_embeddings(self, places: Sequence[Place]) -> None:
        """A model that was made small by coding its embedding is not to become large again without a word."""
        for place in places:
            if place.coded or not isinstance(place.module, nn.Embedding) or not place.source:
                continue
            info = self.reader.info(place.source)
            reason = self.report.dequantized.get(place.source)
            if info is not None and info.num_scales and reason == f"{type(place.module).__name__} needs plain numbers":
                warnings.warn(
                    f"{place.source} is coded, and decoded for the whole model: {reason}, so it takes "
                    f"{place.tensor.numel() * place.dtype.itemsize / 1e6:.1f} MB in memory in place of "
                    f"{info.blob_bytes / 1e6:.1f}",
                    stacklevel=2,
                )

    def _refuse_narrow(self) -> None:
        """fp8 and int8 weights have scales elsewhere, which a layer of another quantization would multiply with."""
        narrow = [
            f"{name} ({entry['dtype']})"
            for container in self.reader.containers
            for name, entry in container.coded.items()
            if entry["dtype"] in NARROW_DTYPES
        ]
        if narrow:
            raise ModelMismatchError(
                f"{self.reader.path}: the original's weights are quantized themselves: {listed(narrow, _SHOWN)}; "
                "kvpack decompress gives it back, for transformers to load with its own quantization"
            )

    def _stored(self, name: str) -> list[str]:
        """All stored tensors of an original one."""
        container = self.reader.container(name)
        possible = (name + suffix for suffix in ("", *PART_SUFFIXES))
        return [stored for stored in possible if stored in container.tensors]

    def _plan_place(self, place: Place, direct: dict[str, str]) -> None:
        sources = place.sources
        if place.coded:
            self.taken |= {stored for name in sources for stored in self._stored(name)}
            return
        if not any(name in self.reader.container(name).coded for name in sources):
            return  # transformers' own affair
        if place.conversion is not None:
            target = place.converted
        else:
            own = [name for name in place.names if direct.get(name) == place.source]
            if not own:
                return  # tied to one that has it
            target = own[0]
        self._places[target], self._sources[target] = place, sources
        first = next(iter(place.conversion.shapes)) if place.conversion is not None else target
        self.decoded_from |= {stored: first for name in sources for stored in self._stored(name)}

    def _swap(self, place: Place) -> None:
        training = place.module.training
        if place.conversion is not None:
            assert place.conversion.experts is not None
            matrices = [
                [(name_in_expert(name), self._layer(name, training)) for name in sources]
                for sources in place.conversion.experts
            ]
            for layers, own in zip(keep_coded(place.module, place.key, matrices), matrices, strict=True):
                for module_name in place.module_names:
                    for name, (_, layer) in zip(layers, own, strict=True):
                        self.layers[f"{module_name}.{name}"] = layer
            self._mark_initialized(place.module, place.module_names[0])
            return
        coded = self._embedding(place, training) if place.is_embedding_weight else self._layer(place.source, training)
        bias = getattr(place.module, "bias", None)
        if isinstance(bias, torch.Tensor):
            coded._buffers["bias"] = bias.detach()
        for name in place.module_names:
            if not name:
                raise ModelMismatchError("the model itself is the linear layer: put it into a module")
            put_module(self.model, name, coded)
            self.layers[name] = coded
        self._mark_initialized(coded, place.module_names[0])

    def _mark_initialized(self, module: nn.Module, name: str) -> None:
        """Keep transformers from drawing values for a module, which it does where it finds no weights."""
        lacking = [other for other in self.report.missing if other.rpartition(".")[0] == name]
        if lacking:
            raise ModelMismatchError(
                f"{self.reader.path}: the file has coded weights of {name}, and not {listed(lacking, _SHOWN)}"
            )
        module._is_hf_initialized = True  # type: ignore[assignment]

    def _layer(self, name: str, training: bool) -> RansLinear:
        layer = self._in_file(layer_in_file(self.reader, name), training)
        layer.__class__ = _LinearInFile
        return layer

    def _embedding(self, place: Place, training: bool) -> CodedMatrix:
        layer = self._in_file(embedding_in_file(self.reader, place), training)
        layer.__class__ = _EmbeddingInFile
        return layer

    def _in_file(self, layer: _Layer, training: bool) -> _Layer:
        """A layer whose weights are still in the file. transformers does not look for them.

        It counts their bytes where it plans for several devices, and makes room for them.
        """
        if self.device_map is None or (list(self.device_map) == [""] and self._home("") != "disk"):
            layer._buffers.update(dict.fromkeys(PARTS))
            layer._buffers[BLOB] = torch.empty(0, dtype=torch.uint8, device="meta")
        # accelerate takes each of them for a tensor.
        layer._non_persistent_buffers_set |= {part for part in PARTS if layer._buffers[part] is not None}
        layer.training = training
        return layer

    def _untie(self) -> None:
        """A coded layer has weights of its own, be it of an embedding's numbers."""
        for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
            ties = getattr(self.model, attribute, None)
            kept = {one: other for one, other in (ties or {}).items() if not self._are_coded(one, other)}
            if ties and len(kept) < len(ties):
                self.untied[attribute] = dict(ties)
                setattr(self.model, attribute, kept)

    def _are_coded(self, *names: str) -> bool:
        return any(name.removesuffix(".weight") in self.layers for name in names)

    def _check_decoded(self) -> None:
        """transformers puts errors of converters into its report, where nobody can catch them by their names."""
        with CrcChecks(self.reader) as checks:
            for name in dict.fromkeys(name for sources in self._sources.values() for name in sources):
                data = self.reader.container(name).data(stored_name(self.reader, name))
                with checks.around(name, data):
                    self.reader.info(name)
            checks.wait()

    def _device(self, name: str) -> torch.device:
        if not isinstance(self.device_map, dict):
            return torch.device("cpu")
        return torch.device(get_device(self.device_map, name, valid_torch_device=True))

    def decode(self, target: str) -> dict[str, torch.Tensor]:
        """Parameter of the model → its numbers, and those of others that are made of the same tensors."""
        place, device = self._places[target], self._device(target)
        tensors = load_tensors(self.reader, self._sources[target], device, verify=False)
        numbers = {name: _numbers(tensor, self.dtypes[target]) for name, tensor in tensors.items()}
        if place.conversion is None:
            return {target: numbers[place.source]}
        made = place.conversion.convert(numbers)
        return {
            name: made[name].to(self.dtypes[name]) for name in [target, *(other for other in made if other != target)]
        }

    @property
    def layer_sources(self) -> set[str]:
        """Coded tensors of layers that stay coded."""
        return {layer.tensor_name for layer in self.layers.values() if layer.tensor_name is not None}

    def finish(self) -> bool:
        """Read the weights of all coded layers to where transformers has put these.

        Returns:
            Whether the reader must stay open, for layers whose weights stay on disk.

        Raises:
            FormatError: a tensor is damaged; the message names file and tensor.
        """
        by_device: dict[torch.device, dict[str, list[CodedMatrix]]] = {}
        on_disk = []
        names = {id(layer): name for name, layer in self.layers.items()}
        for layer in {id(layer): layer for layer in self.layers.values()}.values():
            assert layer.tensor_name is not None
            device = layer.weight_kvpack.device
            hook = _offloading_hook(layer)
            settle(layer)
            if hook is not None and self._home(names[id(layer)]) == "disk":
                on_disk.append((layer, hook))
                continue
            if hook is not None:
                device = torch.device("cpu")
            by_device.setdefault(device, {}).setdefault(layer.tensor_name, []).append(layer)
        with CrcChecks(self.reader) as checks:
            # transformers has read them without a look at their CRCs.
            for name in self.reader.main_keys():
                if name not in self.reader.container(name).coded:
                    checks.add(name)
            for device, layers in by_device.items():
                loaded = load_tensors(self.reader, layers, device)
                for name, sharing in layers.items():
                    blob = loaded[name]
                    assert isinstance(blob, DeviceBlob)
                    for layer in sharing:
                        layer._take(blob)
                        if hook := _offloading_hook(layer):
                            _lend_weights(layer, hook, None)
            checks.wait()
        for layer, hook in on_disk:
            for key, tensor in layer_in_file(self.reader, str(layer.tensor_name))._buffers.items():
                if key in PARTS:
                    layer._buffers[key] = tensor
            _lend_weights(layer, hook, self.reader)
        del self.model._keys_to_ignore_on_load_unexpected
        self._cast()
        return bool(on_disk)

    def _home(self, name: str) -> str:
        """Where the device map has a module."""
        return str(get_device(self.device_map, name)) if isinstance(self.device_map, dict) else "cpu"

    def _cast(self) -> None:
        """transformers leaves renamed tensors of quantized models in the files' types, before 5.21."""
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            dtype = self.dtypes.get(name)
            if dtype is not None and tensor.dtype != dtype and tensor.is_floating_point() and not tensor.is_meta:
                tensor.data = tensor.data.to(dtype)


def _numbers(tensor: DeviceBlob | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.dequantize(dtype) if isinstance(tensor, DeviceBlob) else tensor.to(dtype)


def _offloading_hook(layer: CodedMatrix) -> Any:
    """What accelerate, which not all have, has put on a layer of a module that the device map offloads."""
    if not hasattr(layer, "_hf_hook"):
        return None
    from kvpack.integrations.transformers.offloading import offloading_hook

    return offloading_hook(layer)


def _lend_weights(layer: CodedMatrix, hook: Any, reader: Reader | None) -> None:
    from kvpack.integrations.transformers.offloading import lend_weights

    lend_weights(layer, hook, reader)
