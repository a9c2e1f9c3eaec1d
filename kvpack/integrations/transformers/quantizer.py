"""transformers' quantizer of compressed models: what ``from_pretrained`` calls when config.json says kvpack."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from kvpack.encode.listing import listed
from kvpack.encode.model_config import GUARD_KEY, METHOD, unguarded
from kvpack.errors import InputError
from kvpack.integrations.transformers.config import KVPackConfig

# Whoever imports transformers with kvpack beside it imports this: what loads and saves comes when there is a model.
if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvpack.integrations.transformers.loading import CheckpointLoading
    from kvpack.integrations.transformers.quantize_on_load import CodedCheckpoint
    from kvpack.runtime.weights.coded_matrix import CodedMatrix


_SHOWN = 3


class KVPackQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads compressed models, whose linear layers stay coded, and saves them again."""

    requires_calibration = False
    quantization_config: KVPackConfig

    def __init__(self, quantization_config: KVPackConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self._loading: CheckpointLoading | None = None
        self._device_map: Any = None
        self._own_conversions: list[Any] = []
        self._entries: dict[str, dict[str, Any]] = {}
        self._untied: dict[str, dict[str, str]] = {}
        self._coded: CodedCheckpoint | None = None

    def validate_environment(self, *_args: Any, device_map: Any = None, **_options: Any) -> None:
        """Called before and after transformers plans where modules go."""
        self._device_map = device_map
        if self._loading is not None:
            self._loading.device_map = device_map

    def update_attn_implementation(self, config: Any) -> Any:
        """From 5.18 on the first hook that gets the config."""
        return self._without_guard(config)

    def update_tp_plan(self, config: Any) -> Any:
        """To 5.20 the first hook that gets the config."""
        return self._without_guard(config)

    def _without_guard(self, config: Any) -> Any:
        """Take away what makes transformers without kvpack fail (docs/FORMAT.md §9.4)."""
        _refuse_tensor_parallelism(config)
        file = unguarded(getattr(config, GUARD_KEY, None), self.quantization_config.__dict__)
        if file is not None:
            setattr(config, GUARD_KEY, file)
        elif hasattr(config, GUARD_KEY):
            delattr(config, GUARD_KEY)
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_options: Any
    ) -> Any:
        from kvpack.integrations.transformers.loading import CheckpointLoading, open_files

        _refuse_tensor_parallelism(model.config)
        if not self.pre_quantized:
            self._quantize(model, checkpoint_files)
        self._loading = CheckpointLoading(model, open_files(checkpoint_files or []), self._device_map)
        return model

    def _quantize(self, model: Any, checkpoint_files: list[str] | None) -> None:
        """Code the checkpoint, and go on as with a compressed one: ``checkpoint_files`` becomes that one's files."""
        from kvpack.integrations.transformers.quantize_on_load import code_checkpoint

        config = copy.deepcopy(self.quantization_config)  # the caller's may serve for another model
        self._coded = code_checkpoint(
            model,
            checkpoint_files,
            config.quant_config(),
            modules_to_not_convert=config.modules_to_not_convert,
            device_map=self._device_map,
        )
        assert checkpoint_files is not None
        checkpoint_files[:] = self._coded.files
        config.options, config.blob_bytes = (self._coded.quantization[key] for key in ("options", "blob_bytes"))
        config.modules_to_not_convert = []  # the options say so now
        self.quantization_config, self.pre_quantized = config, True

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Called between the hooks before and after loading, when the model is still on the meta device."""
        assert self._loading is not None
        self._own_conversions = weight_conversions
        config = self.quantization_config
        return self._loading.prepare(weight_conversions, config.modules_to_not_convert, config.dequantize)

    def _process_model_after_weight_loading(self, model: Any, **_options: Any) -> Any:
        from kvpack.integrations.transformers.saving import SavedNames, SavePretrained, coded_layers
        from kvpack.runtime.weights.embedding import RansEmbedding

        loading, self._loading = self._loading, None
        assert loading is not None
        reader = loading.reader
        self._entries = {name: reader.container(name).coded[name] for name in loading.layer_sources}
        if not loading.finish():
            reader.close()
        # What a device map puts on the disk is read from these files at each use, as long as the model is there.
        if self._coded is not None and not _is_on_disk(self._device_map):
            self._coded.close()
            self._coded = None
        self._untied = loading.untied
        if self.quantization_config.dequantize:
            return model
        # What save_pretrained undoes: transformers' own conversions alone. What was decoded is saved as it is.
        used = [one for one in self._own_conversions if one.was_used()]
        renamings = [one for one in used if isinstance(one, WeightRenaming)]
        converters = [one for one in used if isinstance(one, WeightConverter)]
        model._weight_conversions = [SavedNames(model, renamings), *converters]
        model.save_pretrained = SavePretrained(model)
        if any(isinstance(layer, RansEmbedding) for layer in coded_layers(model).values()):
            model.resize_token_embeddings = _FixedVocabulary(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """What save_pretrained writes beside the tensors."""
        from kvpack.integrations.transformers.saving import metadata_of, saved_state_dict

        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        return saved_state_dict(model), metadata_of(model, self._entries)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        from kvpack.integrations.transformers.saving import coded_layers
        from kvpack.runtime.weights.experts import decode_experts, is_coded
        from kvpack.runtime.weights.replace import put_module

        refuse_offloaded(
            coded_layers(model), "dequantize() does not decode them; KVPackConfig(dequantize=True) loads plain weights"
        )
        for module in list(model.modules()):
            if is_coded(module):
                decode_experts(module, dtype)
        for name, layer in coded_layers(model).items():
            put_module(model, name, plain_layer(layer, dtype))
        for attribute, ties in self._untied.items():
            tie_equal(model, ties)
            setattr(model, attribute, ties)
        del model.save_pretrained
        vars(model).pop("resize_token_embeddings", None)
        return model

    def is_serializable(self, *_args: Any, **_options: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters are: kvpack.integrations.peft."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class _FixedVocabulary:
    """``resize_token_embeddings`` of a model whose embedding is coded: an attribute in front of the class's method."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, new_num_tokens: int | None = None, *_args: Any, **_options: Any) -> Any:
        """
        Raises:
            InputError: another number of tokens.
        """
        embedding = self.model.get_input_embeddings()
        if new_num_tokens not in (None, embedding.num_embeddings):
            raise InputError(
                f"resize_token_embeddings to {new_num_tokens} tokens: the embedding is coded, with "
                f"{embedding.num_embeddings}; model.dequantize() makes it a plain one, which can be resized"
            )
        return embedding


def plain_layer(layer: CodedMatrix, dtype: torch.dtype | None) -> nn.Module:
    """The module that a coded layer stands for, with the hook that accelerate has put on it."""
    from kvpack.runtime.weights.embedding import RansEmbedding

    weight = nn.Parameter(layer.dequantize(dtype), requires_grad=False)
    bias = getattr(layer, "bias", None)
    with torch.device("meta"):
        plain: nn.Module
        if isinstance(layer, RansEmbedding):
            plain = layer.plain.module(weight)
        elif layer.prepare().header.transposed:
            plain = Conv1D(layer.out_features, layer.in_features)
        else:
            plain = nn.Linear(layer.in_features, layer.out_features, bias is not None)
    plain.weight = weight
    if bias is not None:
        plain.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    if hasattr(layer, "_hf_hook"):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(plain, layer._hf_hook)
    return plain.train(layer.training)


def refuse_offloaded(layers: Mapping[str, CodedMatrix], advice: str) -> None:
    """Raises InputError where weights come to a layer for each forward pass alone."""
    away = []
    for name, layer in layers.items():
        if hasattr(layer, "_hf_hook"):
            from kvpack.integrations.transformers.offloading import LentWeights

            if isinstance(layer._hf_hook, LentWeights):
                away.append(name)
    if away:
        raise InputError(f"device_map has the weights of {listed(away, _SHOWN)} on the CPU or the disk: {advice}")


def tie_equal(model: nn.Module, ties: dict[str, str]) -> None:
    """Let parameters of the same numbers be one again.

    Args:
        ties: parameter → the one that it was tied to; those of other numbers are taken out.
    """
    for one, other in list(ties.items()):
        first, second = model.get_parameter(one), model.get_parameter(other)
        if first.dtype == second.dtype and torch.equal(first, second):
            parent, _, key = one.rpartition(".")
            setattr(model.get_submodule(parent), key, second)
        else:
            del ties[one]


def _is_on_disk(device_map: Any) -> bool:
    return isinstance(device_map, dict) and "disk" in map(str, device_map.values())


def _refuse_tensor_parallelism(config: Any) -> None:
    if getattr(config, "distributed_config", None) is not None:
        raise InputError(
            "tensor parallelism (tp_plan, distributed_config) splits weights that compressed models do not have; load "
            "the model on one device, with device_map, or decompressed (kvpack decompress)"
        )


def register() -> None:
    """Make transformers know ``"quant_method": "kvpack"``."""
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(METHOD)(KVPackConfig)
        auto.register_quantizer(METHOD)(KVPackQuantizer)
        # Whose loading attributes transformers takes from a config that is given for a quantized model.
        types: Any = auto.LOADING_ATTRIBUTES_CONFIG_TYPES
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*types, KVPackConfig)
