"""A causal language model of transformers, one decoder layer at a time on the device.

The model's own forward pass says how each layer is called, and does what comes before the first layer and after the
last: its layers' ``forward`` is replaced meanwhile. Modules stay where they are, so that whatever a model asks of its
layers is there.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

_HIDDEN = "hidden_states"
# Of final hidden states, against those of the model's own forward pass: fractions of their root mean square.
_TOLERANCE = 1e-3


class NotLayerByLayerError(Exception):
    """The model's layers cannot be run one by one; says why."""


class _ReachedError(Exception):
    """The first layer has been called."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@dataclass(frozen=True)
class LayerCall:
    """How a layer is called, its hidden states left out, and what it returns.

    Attributes:
        args, keywords: the hidden states are the first of ``args``, or else ``keywords["hidden_states"]``: None there.
        rest: what a layer that returns a tuple returns behind its hidden states; None: it returns these alone.
    """

    args: tuple[Any, ...]
    keywords: Mapping[str, Any]
    rest: tuple[Any, ...] | None = None

    def run(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What the layer makes of hidden states."""
        if self.args:
            result = layer(hidden, *self.args[1:], **self.keywords)
        else:
            result = layer(**{**self.keywords, _HIDDEN: hidden})
        found: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return found

    def result(self, hidden: torch.Tensor) -> Any:
        """These hidden states as the layer would return them."""
        return hidden if self.rest is None else (hidden, *self.rest)


def _split(args: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[torch.Tensor, LayerCall]:
    """The hidden states of a call, and the call without them."""
    hidden = args[0] if args else keywords.get(_HIDDEN)
    if not isinstance(hidden, torch.Tensor):
        raise NotLayerByLayerError(f"its layers are not called with {_HIDDEN}")
    if args:
        return hidden, LayerCall((None, *args[1:]), keywords)
    return hidden, LayerCall((), {key: value for key, value in keywords.items() if key != _HIDDEN})


def decoder_layers(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """Where a model has its decoder layers, and these.

    Raises:
        NotLayerByLayerError: it has no list of them.
    """
    found = [
        (name, list(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    if len(found) != 1:
        raise NotLayerByLayerError(f"it has {len(found)} lists of decoder layers")
    return found[0]


@contextmanager
def placed(layer: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """The layer on the device: a copy that is let go of at the end, or on the CPU the layer itself."""
    if device.type == "cpu":
        yield layer
        return
    on_device = copy.deepcopy(layer).to(device)
    yield on_device


class LayerByLayer:
    """A model of which the layer in hand alone is on the device, beside what is no layer.

    Attributes:
        names: of the layers, as the model's modules are named.
        calls: how each layer is called with a window's hidden states.
        hidden_shape, hidden_dtype: of a window's hidden states at the layers' borders.

    Args:
        model: of transformers, in evaluation mode, its parameters without gradients.
        windows: i64 [1, tokens] each, two of them, with which the layers' independence is checked.
        device: where it runs.

    Raises:
        NotLayerByLayerError: layers share state, or are called with what depends on the text.
    """

    def __init__(self, model: Any, windows: list[torch.Tensor], device: torch.device) -> None:
        self.model, self.device = model, device
        path, self.layers = decoder_layers(model)
        self.names = [f"{path}.{number}" for number in range(len(self.layers))]
        self.place()
        self.calls: list[LayerCall] = []
        final = self._own_pass(windows[0])
        self._check_calls(windows[1])
        self._check_result(windows, final)

    def place(self) -> None:
        """Put what is no layer on the device, and layers on the CPU."""
        inside = {id(module) for layer in self.layers for module in layer.modules()}
        for module in self.model.modules():
            device = torch.device("cpu") if id(module) in inside else self.device
            module._apply(functools.partial(torch.Tensor.to, device=device), recurse=False)

    @contextmanager
    def _instead(self, forward: Callable[[int, tuple[Any, ...], Mapping[str, Any]], Any]) -> Iterator[None]:
        """Let ``forward(number, args, keywords)`` stand for each layer's own."""

        def of_layer(number: int) -> Callable[..., Any]:
            return lambda *args, **keywords: forward(number, args, keywords)

        try:
            for number, layer in enumerate(self.layers):
                layer.__dict__["forward"] = of_layer(number)
            yield
        finally:
            for layer in self.layers:
                layer.__dict__.pop("forward", None)

    def _run_model(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=ids.to(self.device), use_cache=False).logits
        return logits

    @torch.no_grad()
    def _own_pass(self, ids: torch.Tensor) -> torch.Tensor:
        """Find the calls; returns the final hidden states."""
        last: torch.Tensor | None = None

        def forward(number: int, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
            nonlocal last
            hidden, call = _split(args, keywords)
            if number != len(self.calls) or (last is not None and hidden is not last):
                raise NotLayerByLayerError("a layer does not go on from what the one before it returned")
            layer = self.layers[number]
            own = layer.__dict__.pop("forward")
            try:
                with placed(layer, self.device) as on_device:
                    result = on_device(*args, **keywords)
            finally:
                layer.__dict__["forward"] = own
            last = result[0] if isinstance(result, tuple) else result
            rest = result[1:] if isinstance(result, tuple) else None
            self.calls.append(LayerCall(call.args, call.keywords, rest))
            return result

        with self._instead(forward):
            self._run_model(ids)
        if last is None or len(self.calls) != len(self.layers):
            raise NotLayerByLayerError("its forward pass leaves layers out")
        self.hidden_shape, self.hidden_dtype = tuple(last.shape), last.dtype
        return last

    @torch.no_grad()
    def _check_calls(self, ids: torch.Tensor) -> None:
        def forward(number: int, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
            hidden, call = _split(args, keywords)
            known = self.calls[number]
            if not _equal((call.args, call.keywords), (known.args, known.keywords)):
                raise NotLayerByLayerError("its layers are called with what depends on the text")
            return known.result(hidden)

        with self._instead(forward):
            self._run_model(ids)

    @torch.no_grad()
    def _check_result(self, windows: list[torch.Tensor], final: torch.Tensor) -> None:
        hidden = [self.first_hidden(ids) for ids in windows]
        for number in range(len(self.layers)):
            with self.layer(number) as run:
                hidden = [run(states) for states in hidden]
            del run  # before the next layer comes to the device
        difference = (hidden[0].float() - final.float()).square().mean().sqrt()
        if not difference <= _TOLERANCE * final.float().square().mean().sqrt():
            raise NotLayerByLayerError("one by one, its layers give other hidden states than its own forward pass")

    def layer_tensors(self, number: int, layer: nn.Module) -> dict[str, torch.Tensor]:
        """Parameters of a layer that is on the device, by their names in the model."""
        return {f"{self.names[number]}.{name}": tensor for name, tensor in layer.named_parameters()}

    def other_tensors(self) -> dict[str, torch.Tensor]:
        """Parameters that are in no layer, by their names in the model."""
        inside = {id(tensor) for layer in self.layers for tensor in layer.parameters()}
        return {name: tensor for name, tensor in self.model.named_parameters() if id(tensor) not in inside}

    @contextmanager
    def layer(self, number: int) -> Iterator[PlacedLayer]:
        """The layer on the device."""
        with placed(self.layers[number], self.device) as module:
            yield PlacedLayer(module, self.calls[number])

    def first_hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """What the first layer gets for a window [1, tokens]; with gradients if enabled."""

        def forward(number: int, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
            raise _ReachedError(_split(args, keywords)[0])

        try:
            with self._instead(forward):
                self._run_model(ids)
        except _ReachedError as reached:
            return reached.hidden
        raise AssertionError("no layer was called")

    def logits(self, ids: torch.Tensor, final: torch.Tensor) -> torch.Tensor:
        """What the model makes of the final hidden states of a window, [1, tokens, vocabulary]; with gradients if
        enabled."""
        last = len(self.layers) - 1

        def forward(number: int, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
            return self.calls[number].result(final if number == last else _split(args, keywords)[0])

        with self._instead(forward):
            return self._run_model(ids)


@dataclass(frozen=True)
class PlacedLayer:
    """A layer on the device; called with a window's hidden states, gives the next ones."""

    module: nn.Module
    call: LayerCall

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.call.run(self.module, hidden)


def _equal(one: Any, other: Any) -> bool:
    """Whether arguments of two calls are the same, tensors by their values; of what it does not know: no."""
    if one is other:
        return True
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return (
            isinstance(other, list | tuple)
            and len(one) == len(other)
            and all(_equal(a, b) for a, b in zip(one, other, strict=True))
        )
    return isinstance(one, str | int | float) and one == other
