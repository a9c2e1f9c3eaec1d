"""Experts whose matrices stay coded, in a module that was made for one tensor of all of them.

A library's module of experts keeps its weights as [experts, rows, columns] and takes one expert's matrix after the
other in its forward pass. :func:`keep_coded` lets go of such a tensor and has the module hold a
:class:`~kvpack.runtime.weights.linear.RansLinear` for each matrix of the file. The module's own code runs on: what it
takes by an expert's index is an :class:`ExpertMatrix`, whose products are those of the coded layers.

That code asks the device which experts have work. On CUDA a few tokens go another way, which does not
(:func:`_grouped_forward`): all experts' products in one launch, what transformers calls an experts implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from kvpack.runtime.weights import grouped, ops, products
from kvpack.runtime.weights.device_blob import DeviceBlob
from kvpack.runtime.weights.linear import RansLinear

# Where a module keeps which of its tensors are coded: name → of each expert, the names of the layers below it.
_CODED = "_kvpack_experts"


class ExpertMatrix:
    """One expert's matrix, the rows of ``layers`` one below the other.

    ``torch.nn.functional.linear`` multiplies with the coded weights. Whatever else is asked of it is asked of its
    numbers, decoded at each time.
    """

    def __init__(self, layers: Sequence[RansLinear], dtype: torch.dtype) -> None:
        self.layers = layers
        self.dtype = dtype

    @property
    def shape(self) -> torch.Size:
        return torch.Size((sum(layer.out_features for layer in self.layers), self.layers[0].in_features))

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., columns] → x · Wᵀ (+ bias) [..., rows], in x's dtype."""
        products = [layer(x) for layer in self.layers]
        product = products[0] if len(products) == 1 else torch.cat(products, -1)
        return product if bias is None else product + bias

    def dequantize(self) -> torch.Tensor:
        """Its numbers, [rows, columns]."""
        return torch.cat([layer.dequantize(self.dtype) for layer in self.layers])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dequantize(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.linear:
            return _linear(*args, **kwargs)
        args = [arg.dequantize() if isinstance(arg, cls) else arg for arg in args]
        kwargs = {key: arg.dequantize() if isinstance(arg, cls) else arg for key, arg in kwargs.items()}
        return function(*args, **kwargs)


def _linear(input: torch.Tensor, weight: ExpertMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    return weight.linear(input, bias)


class ExpertStack:
    """What stands where the tensor [experts, rows, columns] was: an expert's index gives its matrix.

    Raises:
        TypeError: it is used as a tensor; forward passes that need all experts at once cannot run on coded ones.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.name = name
        self.dtype, matrices = module.__dict__[_CODED][name]
        self._matrices: list[list[str]] = matrices
        self._module = module

    def __len__(self) -> int:
        return len(self._matrices)

    def __getitem__(self, expert: int | torch.Tensor) -> ExpertMatrix:
        if isinstance(expert, torch.Tensor) and expert.ndim:
            raise TypeError(f"{self.name}: coded experts are taken one by one, not by {list(expert.shape)} indices")
        names = self._matrices[int(expert)]
        layers = [self._module.get_submodule(name) for name in names]
        return ExpertMatrix([layer for layer in layers if isinstance(layer, RansLinear)], self.dtype)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self[0].shape))

    @property
    def ndim(self) -> int:
        return 3

    @property
    def device(self) -> torch.device:
        return self[0].layers[0].weight_kvpack.device

    def __repr__(self) -> str:
        return f"ExpertStack({self.name}: {list(self.shape)}, coded)"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TypeError(
            f"{getattr(function, '__name__', function)}: coded experts are taken one by one; give the model its plain "
            "experts (replace_linears(exclude=…)) for a forward pass that needs all at once"
        )


@dataclass(frozen=True)
class GroupedMatrices:
    """All matrices of an :class:`ExpertStack`, for products in one launch (several, if their layouts differ).

    Attributes:
        blobs: of each expert, its layers'.
        kinds: what the operator is given for those of one layout, behind rows and ids.
    """

    blobs: list[list[DeviceBlob]]
    kinds: list[tuple[Any, ...]]

    @classmethod
    def of(cls, blobs: list[list[DeviceBlob]]) -> GroupedMatrices | None:
        """None if the kernels cannot take them: floats, column scales, row offsets, different shapes or devices."""
        every = list(chain(*blobs))
        first = every[0].header
        for blob in every:
            header = blob.header
            is_alike = (header.rows, header.cols, blob.device) == (first.rows, first.cols, every[0].device)
            has_vectors = blob.column_scales is not None or blob.row_offsets is not None
            if not is_alike or has_vectors or not len(blob.scales) or not products.can_multiply(header.layout):
                return None
        kinds: dict[tuple[object, ...], list[DeviceBlob]] = {}
        for blob in every:
            kinds.setdefault(_kind(blob), []).append(blob)
        found = []
        for kind, alike in kinds.items():
            coded = [[ops._coded(*b._arguments()) if _kind(b) == kind else None for b in parts] for parts in blobs]
            base = alike[0]
            table = grouped.stack_matrices(coded, ops._coded(*base._arguments()))
            geometry = [*base.geometry]
            geometry[9] = max(blob.geometry[9] for blob in alike)
            matrices = torch.from_numpy(table).to(base.device)
            arguments = (base.blob, base.groups, base.tables, base.scales, base.status, geometry, matrices)
            found.append((*arguments, max(len(blob.tables) for blob in alike)))
        return cls(blobs, found)

    @property
    def matrix_weights(self) -> int:
        """How many weights an expert's matrix has."""
        return len(self.blobs[0]) * self.blobs[0][0].header.matrix_elements

    def linear(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """x [tokens, columns] or [tokens, top_k, columns], ids i64 [tokens, top_k] → [tokens, top_k, rows]."""
        first, *others = (torch.ops.kvpack.grouped_linear(x, ids, *kind) for kind in self.kinds)
        for product in others:  # each has zeros where the other ones' matrices are asked for
            first += product
        return first  # type: ignore[no-any-return]


def _kind(blob: DeviceBlob) -> tuple[object, ...]:
    """Matrices for which this is the same can share a launch."""
    return blob.header.layout, blob.header.tile_cols, len(blob.scales) > 1


# Of modules: tensor's name → its matrices, None if these have to be multiplied one by one. They keep the layers' blobs
# on the device: where layers let go of these, the entry has to go, too; not before, as graphs read tables of addresses.
_grouped: WeakKeyDictionary[nn.Module, dict[str, tuple[list[list[DeviceBlob]], GroupedMatrices | None]]]
_grouped = WeakKeyDictionary()


def _grouped_matrices(module: nn.Module, name: str) -> GroupedMatrices | None:
    layers = [[module.get_submodule(layer) for layer in names] for names in module.__dict__[_CODED][name][1]]
    if any(
        not isinstance(layer, RansLinear) or layer.streamed or layer.weight_kvpack.is_meta for layer in chain(*layers)
    ):
        _grouped.pop(module, None)
        return None
    if any(layer._forward_hooks or layer._forward_pre_hooks for layer in chain(*layers)):
        return None  # somebody wants to see what each layer gets
    blobs = [[layer.prepare() for layer in parts if isinstance(layer, RansLinear)] for parts in layers]
    known = _grouped.setdefault(module, {})
    found = known.get(name)
    if found is None or any(a is not b for a, b in zip(chain(*found[0]), chain(*blobs), strict=True)):
        found = known[name] = blobs, GroupedMatrices.of(blobs)
    return found[1]


def _let_go_of_moved(module: nn.Module) -> None:
    """Forget matrices whose layers have others by now."""
    for name, (blobs, _) in list(_grouped.get(module, {}).items()):
        layers = map(module.get_submodule, chain(*module.__dict__[_CODED][name][1]))
        if any(
            not isinstance(layer, RansLinear) or layer._current() is not blob
            for layer, blob in zip(layers, chain(*blobs), strict=True)
        ):
            del _grouped[module][name]


def grouped_products(module: nn.Module) -> list[GroupedMatrices]:
    """The matrices of a module that :func:`keep_coded` has changed, as grouped products take them; none of another."""
    found = [_grouped_matrices(module, name) for name in module.__dict__.get(_CODED, ())]
    return [matrices for matrices in found if matrices is not None]


def _takes_grouped(x: torch.Tensor) -> bool:
    return x.device.type == "cuda" and not (torch.is_grad_enabled() and x.requires_grad)


def _both_grouped(module: Any, x: torch.Tensor, ids: torch.Tensor) -> tuple[GroupedMatrices, GroupedMatrices] | None:
    """Matrices before and behind the activation function, if their products are to be grouped ones."""
    if not _takes_grouped(x) or torch.compiler.is_compiling():
        return None
    names = ("gate_up_proj" if getattr(module, "has_gate", False) else "up_proj", "down_proj")
    if getattr(module, "is_transposed", True) or ids.ndim != 2 or any(n not in module.__dict__[_CODED] for n in names):
        return None
    before, behind = (_grouped_matrices(module, name) for name in names)
    if before is None or behind is None:
        return None
    many = grouped.has_many_rows(len(before.blobs), *ids.shape, weights=behind.matrix_weights)
    if many and not torch.cuda.is_current_stream_capturing():
        return None
    # Offloaded layers are on the device in their own forward pass alone.
    is_there = all(stack.blobs[0][0].device == x.device for stack in (before, behind))
    return (before, behind) if is_there else None


def _grouped_forward(
    module: Any,
    matrices: tuple[GroupedMatrices, GroupedMatrices],
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """What a module of experts computes, without asking the device which of them have work.

    Args:
        x: [tokens, columns]; ids: i64 [tokens, top_k], weights: [tokens, top_k], of the router. An id that is no
            expert's has no part in the result.
    """
    before, behind = matrices
    is_there = (ids >= 0) & (ids < len(before.blobs))
    chosen = ids.clamp(0, len(before.blobs) - 1)

    def linear(stack: GroupedMatrices, rows: torch.Tensor, bias: str) -> torch.Tensor:
        product = stack.linear(rows, ids)
        return product + getattr(module, bias)[chosen] if getattr(module, "has_bias", False) else product

    if module.has_gate:
        hidden = module._apply_gate(linear(before, x, "gate_up_proj_bias"))
    else:
        hidden = module.act_fn(linear(before, x, "up_proj_bias"))
    out = linear(behind, hidden, "down_proj_bias")
    if getattr(module, "has_post_expert_norm", False):
        out = module.post_expert_norm(out)
    return (out * weights.where(is_there, 0).unsqueeze(-1)).sum(1).to(x.dtype)


def _make(base: type[nn.Module]) -> nn.Module:
    """An empty module, for copies and pickles, which find a class by its name."""
    module = coded_class(base)
    return module.__new__(module)


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def coded_class(base: type[nn.Module]) -> type[nn.Module]:
    """The class of experts of class ``base`` that are coded."""
    if base in _classes:
        return _classes[base]
    # Implementations that compute all experts in one operation read whole tensors; the class's own code does not.
    own_forward: Callable[..., Any] = getattr(base.forward, "__wrapped__", base.forward)

    class CodedExperts(base):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: torch.Tensor, *others: Any, **options: Any) -> Any:
            if len(others) == 2 and not options:
                ids, weights = others
                matrices = _both_grouped(self, hidden_states, ids)
                if matrices is not None:
                    return _grouped_forward(self, matrices, hidden_states, ids, weights)
            return own_forward(self, hidden_states, *others, **options)

        def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
            moved = super()._apply(fn, recurse)
            _let_go_of_moved(self)
            return moved

        def __getattr__(self, name: str) -> Any:
            if name in self.__dict__.get(_CODED, ()):
                return ExpertStack(self, name)
            return super().__getattr__(name)

        def __reduce_ex__(self, protocol: Any) -> Any:
            return _make, (base,), self.__getstate__()

    CodedExperts.__name__ = CodedExperts.__qualname__ = f"Coded{base.__name__}"
    CodedExperts.__module__ = __name__
    _classes[base] = CodedExperts
    return CodedExperts


def keep_coded(module: nn.Module, key: str, matrices: Sequence[Sequence[tuple[str, RansLinear]]]) -> list[list[str]]:
    """Have ``module`` compute with coded matrices instead of its parameter ``key`` [experts, rows, columns].

    Args:
        matrices: of each expert, its layers, one below the other, each with the name that it gets below
            ``<expert>.`` in the module.

    Returns:
        The layers' names in the module.
    """
    dtype = module._parameters.pop(key).dtype  # type: ignore[union-attr]
    names = [[f"{expert}.{name}" for name, _ in layers] for expert, layers in enumerate(matrices)]
    for expert, layers in enumerate(matrices):
        home = module._modules.setdefault(str(expert), nn.ModuleDict())
        assert isinstance(home, nn.ModuleDict)
        for name, layer in layers:
            home[name] = layer
    if _CODED not in module.__dict__:
        module.__dict__[_CODED] = {}
        module.__class__ = coded_class(type(module))
    module.__dict__[_CODED][key] = (dtype, names)
    return names


def is_coded(module: nn.Module) -> bool:
    """Whether :func:`keep_coded` has changed a module."""
    return _CODED in module.__dict__


def decode_experts(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Undo :func:`keep_coded`: the module gets its parameters [experts, rows, columns] back, decoded.

    Args:
        dtype: of the parameters, by default what they had.
    """
    _grouped.pop(module, None)
    tensors = {}
    for key, (own, experts) in module.__dict__[_CODED].items():
        stack = ExpertStack(module, key)
        tensors[key] = torch.stack([stack[number].dequantize() for number in range(len(experts))]).to(dtype or own)
    for _, experts in module.__dict__.pop(_CODED).values():
        for name in {name.partition(".")[0] for names in experts for name in names}:
            module._modules.pop(name, None)
    module.__class__ = type(module).__bases__[0]
    for key, tensor in tensors.items():
        module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
