"""PEFT's LoRA over :class:`kvpack.RansLinear`: adapters are trained, the coded weights stay as they are.

After ``import kvpack`` PEFT needs nothing else: ``get_peft_model``, ``PeftModel.from_pretrained`` and transformers'
``model.add_adapter`` take coded layers as they take ``nn.Linear``, ``target_modules="all-linear"`` included.

Coded weights cannot take up an adapter. :func:`merge` makes dense ones of the adapted layers, and of these alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from peft.tuners import tuners_utils
from peft.tuners.lora import layer as lora
from peft.tuners.lora.model import LoraModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from kvpack.encode.listing import listed
from kvpack.errors import InputError
from kvpack.integrations.transformers.quantizer import plain_layer, refuse_offloaded
from kvpack.runtime.weights.linear import RansLinear

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

_MERGE = (
    "coded weights cannot take up an adapter. kvpack.integrations.peft.merge(model) makes dense weights of the adapted "
    "layers and merges into these; or keep the adapter beside the model (save_pretrained)"
)
# Variants that need the base weight's numbers at no step.
_VARIANTS = ((), ("alora_invocation_tokens",))
_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal")
_SHOWN = 3


class RansLoraLinear(lora.Linear):
    """A LoRA layer whose base is a :class:`kvpack.RansLinear`, or a dense layer once :func:`merge` has made one.

    Raises:
        InputError: the variant or the initialization needs the base weight as numbers, or changes it; or the base is on
            the CPU or the disk by a ``device_map``.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **options: Any) -> None:
        # As PEFT has it, for layers that it takes to be stored inputs × outputs: a coded one is never used that way.
        base: Any = base_layer.get_base_layer() if isinstance(base_layer, tuners_utils.BaseTunerLayer) else base_layer
        advice = "an adapter would lie there too, and not where the layer runs"
        refuse_offloaded({base.tensor_name or "a layer": base}, advice)
        super().__init__(base_layer, adapter_name, config=config, **options)
        self.fan_in_fan_out = False

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """Those of PEFT's that work on activations alone."""
        return {names: variant for names, variant in super().lora_variants.items() if names in _VARIANTS}

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        layer: Any = module.get_base_layer() if isinstance(module, tuners_utils.BaseTunerLayer) else module
        return layer.in_features, layer.out_features

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **options: Any) -> None:
        how = config.init_lora_weights
        if not any(how is known or (isinstance(known, str) and how == known) for known in _INITIALIZATIONS):
            raise InputError(
                f"init_lora_weights={how!r} needs the base weights as numbers, or changes them, and "
                f"{options.get('target_name') or 'the layer'} is coded; there are True, 'gaussian', 'eva' and "
                "'orthogonal'"
            )
        try:
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **options)
        except ValueError as error:
            if "variant combination" not in str(error):
                raise
            raise InputError(
                f"{error}: over coded weights ({options.get('target_name') or 'RansLinear'}) there are plain LoRA, "
                "rsLoRA and aLoRA; DoRA and the others need the base weights as numbers"
            ) from None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As of ``peft``'s layer, once the base is dense.

        Raises:
            InputError: it is still coded.
        """
        if isinstance(self.get_base_layer(), RansLinear) and tuners_utils.check_adapters_to_merge(self, adapter_names):
            raise InputError(_MERGE)
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def make_dense(self, dtype: torch.dtype | None = None) -> None:
        """Put a dense copy in the place of the coded base layer; nothing if it is one already."""
        base = self.get_base_layer()
        if isinstance(base, RansLinear):
            self.base_layer = dense_copy(base, dtype)
            self.fan_in_fan_out = isinstance(self.base_layer, Conv1D)


def dense_copy(layer: RansLinear, dtype: torch.dtype | None = None) -> nn.Module:
    """The layer that the coded one was made from, as dense weights on its device.

    Args:
        layer: the coded layer.
        dtype: of the weights; that of the original by default.

    Returns:
        ``nn.Linear``, or transformers' ``Conv1D`` where the original weight is inputs × outputs.

    Raises:
        FormatError, StreamingError, RuntimeError: as of :meth:`kvpack.RansLinear.prepare`.
    """
    return plain_layer(layer, dtype or layer.weight_dtype).requires_grad_(False)


def _adapted(model: nn.Module) -> dict[str, RansLoraLinear]:
    """The adapted layers whose base is coded, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, RansLoraLinear) and isinstance(module.get_base_layer(), RansLinear)
    }


def merge(model: Any, *, safe_merge: bool = False, adapter_names: list[str] | None = None) -> Any:
    """The base model with the adapters merged into dense copies of the layers that have some, in the model's dtype.

    Layers without an adapter stay coded; the adapted ones take the memory of dense weights, one more of them at a
    time. The model is changed in place, as by PEFT's own ``merge_and_unload``.

    Args:
        model: a ``PeftModel`` with LoRA adapters.
        safe_merge: check the merged weights for numbers that are not finite.
        adapter_names: which adapters; the active ones by default.

    Returns:
        The base model, without PEFT's layers.

    Raises:
        InputError: no adapter is over coded weights, or the model has no ``merge_and_unload``.

    Example::

        merged = kvpack.integrations.peft.merge(model)
        merged.save_pretrained("merged")
    """
    if not hasattr(model, "merge_and_unload"):
        raise InputError(f"a {type(model).__name__} has no adapters of PEFT to merge: give what get_peft_model returns")
    adapted = _adapted(model)
    if not adapted:
        raise InputError("no adapter is over coded weights: the model's own merge_and_unload() merges")
    # A coded layer multiplies in the dtype of its input. A dense one has to have it: the file's may be another one.
    dtype = getattr(model.get_base_model(), "dtype", None)
    for layer in adapted.values():
        layer.make_dense(dtype)
    return model.merge_and_unload(safe_merge=safe_merge, adapter_names=adapter_names)


def register() -> None:
    """Make coded layers known to PEFT's LoRA; once, and nothing at a second call."""
    model: Any = LoraModel
    if not getattr(model._create_new_module, "_kvpack", False):
        model._create_new_module = staticmethod(_creating(model._create_new_module))
        model._check_merge_allowed = _checking_merges(model._check_merge_allowed)
        utilities: Any = tuners_utils
        utilities._maybe_include_all_linear_layers = _including_coded(utilities._maybe_include_all_linear_layers)


def _creating(create: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(create)
    def create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **options: Any) -> Any:
        base = target.get_base_layer() if isinstance(target, tuners_utils.BaseTunerLayer) else target
        if not isinstance(base, RansLinear):
            return create(lora_config, adapter_name, target, **options)
        return RansLoraLinear(target, adapter_name, config=lora_config, **options)

    create_new_module._kvpack = True  # type: ignore[attr-defined]
    return create_new_module


def _checking_merges(check: Callable[[Any], None]) -> Callable[[Any], None]:
    """Refuse before the first layer is merged: a model merged by half would be neither."""

    @functools.wraps(check)
    def check_merge_allowed(self: Any) -> None:
        check(self)
        if adapted := _adapted(self.model):
            raise InputError(f"{listed(list(adapted), _SHOWN, 'more layers')}: {_MERGE}")

    return check_merge_allowed


def _including_coded(include: Callable[..., Any]) -> Callable[..., Any]:
    """``target_modules="all-linear"`` means coded layers too, but for the model's output layer."""

    @functools.wraps(include)
    def include_all_linear_layers(peft_config: Any, model: Any) -> Any:
        asked = getattr(peft_config, "target_modules", None)
        found = include(peft_config, model)
        if isinstance(asked, str) and asked.lower() == "all-linear":
            output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
            # Those below an adapter's layer are named by that layer.
            adapters = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, tuners_utils.BaseTunerLayer))
            found.target_modules |= {
                name
                for name, module in model.named_modules()
                if isinstance(module, RansLinear) and module is not output and not name.startswith(adapters)
            }
        return found

    return include_all_linear_layers


register()  # where this module was imported first, and PEFT by it
