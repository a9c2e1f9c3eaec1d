"""vLLM's quantization method ``kvpack``: which layers of a compressed model are coded, and by what they multiply."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from kvpack.encode.listing import listed
from kvpack.encode.model_config import METHOD
from kvpack.errors import InputError, ModelMismatchError, NotSupportedError

# Every vLLM with kvpack beside it imports this module, for whatever model: the rest comes when a layer asks.
if TYPE_CHECKING:
    from torch import nn
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

logger = init_logger(f"vllm.{__name__}")

# Of `--additional-config '{"kvpack": {"weights": …}}'`.
CODED, DENSE = "coded", "dense"
_SHOWN = 3
# A tensor of an expert of its own; and one that has two of its matrices, which vLLM's loader cuts in the middle.
_EXPERT = re.compile(r"\.\d+\.")
_GATE_AND_UP = re.compile(r"\.\d+\.(gate_up_proj|w13)\.")
# Models whose experts are one tensor of inputs × outputs, which vLLM's class of them takes apart itself.
_TAKEN_APART = ("gpt_oss", "llama4_text")
# Names of experts that are one tensor → those that vLLM's loader splits. It has none for such a Mixtral, as it was made
# for checkpoints of before; of Granite it looks for names that end with the weight's, behind which a coded one goes on.
_RENAMED = {
    "mixtral": {
        ".mlp.gate.": ".block_sparse_moe.gate.",
        ".mlp.experts.gate_up_proj": ".block_sparse_moe.experts.w13",
        ".mlp.experts.down_proj": ".block_sparse_moe.experts.w2",
    },
    "granitemoe": {
        ".input_linear.weight": ".experts.gate_up_proj",
        ".output_linear.weight": ".experts.down_proj",
    },
}
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
# model_type → tensors whose rows vLLM's class puts in another order as it loads them; those of a blob cannot be.
_REORDERED = {
    "bloom": ("query_key_value.weight",),
    "falcon": ("query_key_value.weight",),
    "k2_horizon": ("q_proj.weight", "k_proj.weight"),
    "llama4_text": ("q_proj.weight", "k_proj.weight"),
    "mistral": ("wq.weight", "wk.weight"),  # names of Mistral's own files
}
# model_type whose published checkpoints lack the "transformer." that vLLM's class puts before their names.
_WITHOUT_PREFIX = ("gpt2",)


def asked_weights(additional_config: object) -> str:
    """What ``additional_config`` says of weights, ``"coded"`` by default.

    Raises:
        InputError: it says something else under ``"kvpack"``.
    """
    asked = additional_config.get("kvpack", {}) if isinstance(additional_config, dict) else {}
    unknown = sorted(set(asked) - {"weights"}) if isinstance(asked, dict) else [str(asked)]
    weights = CODED if unknown else asked.get("weights", CODED)
    if unknown or weights not in (CODED, DENSE):
        raise InputError(
            f'additional_config: "kvpack" is {asked!r}; {{"weights": "{CODED}"}} (the default) and '
            f'{{"weights": "{DENSE}"}} are possible'
        )
    return str(weights)


class KVPackQuantization(QuantizationConfig):  # type: ignore[misc]
    """What config.json's ``quantization_config`` of a compressed model says.

    Args:
        config: that object; ``blob_bytes`` names the coded tensors (docs/FORMAT.md §9.4).

    Raises:
        InputError: ``blob_bytes`` is missing or no object.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        blob_bytes = config.get("blob_bytes")
        if not isinstance(blob_bytes, dict):
            raise InputError("quantization_config of a kvpack model has an object blob_bytes; compress the model anew")
        self.blob_bytes: dict[str, Any] = dict(blob_bytes)
        self.is_tied = False
        self._weights: str | None = None
        self._claimed: set[str] = set()
        # How names begin of layers that guess tokens ahead, which vLLM leaves to a drafter's model.
        self._drafter: tuple[str, ...] = ("mtp.",)
        self._model_type = ""

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # config.json says all

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> KVPackQuantization:
        return cls(config)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Called with what renames the checkpoint's tensors to the model's."""
        self.blob_bytes = hf_to_vllm_mapper.apply_dict(self.blob_bytes)

    def get_checkpoint_weight_mapper(self) -> Any:
        """Called as weights are loaded: what renames tensors besides the model's own."""
        from vllm.model_executor.models.utils import WeightsMapper

        own = WeightsMapper(orig_to_new_substr=_RENAMED.get(self._model_type, {}))
        return super().get_checkpoint_weight_mapper() | own

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Called once, before there is a model.

        Raises:
            NotSupportedError: coded weights whose rows vLLM would put in another order.
        """
        self._tell_embeddings()
        if hf_config is None:
            return
        text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
        self.is_tied = bool(getattr(text, "tie_word_embeddings", False))
        self._model_type = text.model_type
        self._refuse_reordered(text)
        ahead = getattr(text, "num_nextn_predict_layers", None) or 0
        self._drafter += tuple(f"model.layers.{text.num_hidden_layers + number}." for number in range(ahead))
        for old, new in _RENAMED.get(text.model_type, {}).items():
            self.blob_bytes = {name.replace(old, new): size for name, size in self.blob_bytes.items()}
        if text.model_type in _WITHOUT_PREFIX:
            named = ("transformer.", "lm_head.")
            self.blob_bytes = {
                name if name.startswith(named) else f"transformer.{name}": size
                for name, size in self.blob_bytes.items()
            }

    def _refuse_reordered(self, config: Any) -> None:
        is_in_order = getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False)
        endings = _REORDERED.get(config.model_type)
        if endings is None or is_in_order:
            return
        if found := sorted(name for name in self.blob_bytes if name.endswith(endings)):
            raise NotSupportedError(
                f"{listed(found, _SHOWN)}: vLLM's class of {config.model_type} models puts rows of these weights in "
                "another order as it loads them, and cannot where they are coded; kvpack decompress gives the plain "
                "model back"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Workers get a copy, for which nothing else is called before there is a model."""
        self.__dict__.update(state)
        self._tell_embeddings()

    def _tell_embeddings(self) -> None:
        if self.has_coded_embedding:
            from kvpack.integrations.vllm.told_embedding import tell_embeddings

            tell_embeddings()

    @property
    def weights(self) -> str:
        """Whether weights stay coded in memory."""
        if self._weights is None:
            from vllm.config import get_current_vllm_config_or_none

            vllm_config = get_current_vllm_config_or_none()
            self._weights = asked_weights(getattr(vllm_config, "additional_config", None))
        return self._weights

    def coded_parts(self, prefix: str) -> list[bool]:
        """Of each tensor of the checkpoint that a layer of vLLM is made of, whether it is coded."""
        parent, dot, last = prefix.rpartition(".")
        names = [f"{parent}{dot}{name}.weight" for name in self.packed_modules_mapping.get(last, [last])]
        self._claimed.update(names)
        return [name in self.blob_bytes for name in names]

    def _untie(self) -> None:
        """Where the output layer is coded it is not the embedding's, whatever config.json says of the original.

        vLLM finds that out by a tensor ``lm_head.weight``, which is named otherwise here.
        """
        from vllm.config import get_current_vllm_config_or_none

        if not any(name.endswith("lm_head.weight") for name in self.blob_bytes):
            return
        self.is_tied = False
        config = get_current_vllm_config_or_none()
        for one in () if config is None else (config.model_config.hf_config, config.model_config.hf_text_config):
            one.tie_word_embeddings = False

    def _check_claims(self, model: nn.Module) -> None:
        """Each coded tensor is of a layer that asked for its method, or that another stage of a pipeline has."""
        from vllm.model_executor.models.utils import PPMissingLayer, StageMissingLayer

        logger.info(
            "kvpack: %d coded tensors of %.1f MB in the checkpoint; %s",
            len(self.blob_bytes),
            sum(size for size in self.blob_bytes.values() if isinstance(size, int)) / 1e6,
            "they stay coded" if self.weights == CODED else "they are decoded as they are loaded",
        )
        others = [
            f"{name}."
            for name, one in model.named_modules(remove_duplicate=False)  # one that is missing may have several names
            if isinstance(one, PPMissingLayer | StageMissingLayer)
        ]
        not_here = (*self._drafter, *others)
        unknown = sorted(name for name in self.blob_bytes.keys() - self._claimed if not name.startswith(not_here))
        if unknown:
            raise ModelMismatchError(
                f"{listed(unknown, _SHOWN)}: coded weights that vLLM's class of this model has no layers for, or under "
                "other names; kvpack decompress gives the plain model back"
            )

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """What multiplies with a layer's weights; vLLM's own method where nothing is coded.

        Raises:
            ModelMismatchError: coded weights of a kind of layer that kvpack does not know.
        """
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        from kvpack.integrations.vllm.llvmlite_vars import give_vars
        from kvpack.integrations.vllm.reading import read_as_needed

        read_as_needed(self._check_claims)
        give_vars()
        if isinstance(layer, LinearBase):
            return self._linear_method(prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return self._embedding_method(layer, prefix)
        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        if f"{prefix}.weight" in self.blob_bytes:
            raise ModelMismatchError(
                f"{prefix}: coded weights of a {type(layer).__name__}, which vLLM cannot have coded"
            )
        return None

    def _linear_method(self, prefix: str) -> QuantizeMethodBase:
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod

        from kvpack.integrations.vllm.linear import DecodingLinearMethod, KVPackLinearMethod

        coded = self.coded_parts(prefix)
        if not any(coded):
            return UnquantizedLinearMethod()
        # Attention with a latent cache (MLA) takes this one's numbers apart.
        is_taken_apart = prefix.endswith("kv_b_proj")
        if all(coded) and self.weights == CODED and not is_taken_apart:
            return KVPackLinearMethod(prefix)
        if not all(coded):
            logger.warning_once(
                "kvpack: %s is made of coded and of plain weights: it, and others like it, is decoded as it is loaded",
                prefix,
            )
        return DecodingLinearMethod(prefix, coded)

    def _embedding_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        from kvpack.integrations.vllm.embedding import KVPackEmbeddingMethod

        self._untie()
        is_output = isinstance(layer, ParallelLMHead)
        # Some models give their embeddings no names, and tied output layers are of the embedding's weight.
        without_name = self.has_coded_embedding and (self.is_tied if is_output else not prefix)
        names = (f"{prefix}.weight", *_EMBEDDINGS) if prefix else _EMBEDDINGS
        self._claimed.update(name for name in self.blob_bytes if name.endswith(names))
        if f"{prefix}.weight" in self.blob_bytes or without_name:
            return KVPackEmbeddingMethod(prefix or "the embedding", is_dense=self.weights == DENSE)
        return None

    @property
    def has_coded_embedding(self) -> bool:
        """Whether the rows of an embedding are coded, of the one that language models have."""
        return any(name.endswith(_EMBEDDINGS) for name in self.blob_bytes)

    def _experts_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        coded = [name for name in self.blob_bytes if name.startswith(f"{prefix}.")]
        self._claimed.update(coded)
        if not coded:
            return None
        each = [name for name in coded if _EXPERT.match(name.removeprefix(prefix))]
        halves = [name for name in coded if _GATE_AND_UP.match(name.removeprefix(prefix))]
        if halves or (each and len(each) < len(coded)):
            raise NotSupportedError(
                f"{listed(halves or coded, _SHOWN)}: experts of which some are one tensor in the checkpoint and others "
                "are not, or that have gate and up of one expert in a tensor, cannot be coded in vLLM; kvpack "
                "decompress gives the plain model back"
            )
        if not each and self._model_type in _TAKEN_APART:
            raise NotSupportedError(
                f"{listed(coded, _SHOWN)}: experts that are one tensor of inputs × outputs in the checkpoint cannot be "
                "coded in vLLM; kvpack decompress gives the plain model back"
            )
        from kvpack.integrations.vllm.experts import DecodingExpertsMethod, KVPackExpertsMethod

        method = KVPackExpertsMethod if self.weights == CODED else DecodingExpertsMethod
        return method(layer.moe_config, prefix, is_stacked=not each)
