"""What a tensor is by its name: the one table of names, used where no module tree says it.

Names are read in whole words: parts between dots, then words between underscores and at camel case's humps. What counts
is the name of the module that holds the tensor, not what stands further up: the ``dense`` of ``lm_head.dense`` is a
linear layer. ``tests/data/tensor_kinds.json`` holds the names of the architectures of transformers with what they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple


class Kind(StrEnum):
    """What a tensor is; ``TRANSPOSED`` is a linear layer stored inputs x outputs (GPT-2's Conv1D)."""

    LINEAR = "linear"
    TRANSPOSED = "transposed linear"
    CONVOLUTION = "convolution"
    EMBEDDING = "embedding"
    OUTPUT = "output layer"
    NORM = "norm"
    ROUTER = "router"
    BIAS = "bias"
    PARAMETER = "parameter"

    @property
    def is_coded(self) -> bool:
        """Whether tensors of this kind are coded where a rate is given."""
        return self in (Kind.LINEAR, Kind.TRANSPOSED, Kind.CONVOLUTION)


class NamedKind(NamedTuple):
    """What a name says. ``is_sure``: the table knows the name, and no known architecture uses it for anything else."""

    kind: Kind
    is_sure: bool


class NoModuleTreeError(Exception):
    """There is no module tree of a model; the message says why, as half a sentence."""


# config.json and tensors' names → which model it is by, and the kinds of those tensors that it has.
ModuleTree = Callable[[Mapping[str, Any], Sequence[str]], tuple[str, Mapping[str, str]]]

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_WEIGHT = re.compile(r"weight|weight_v|weight_[ih]h_l\d+(_reverse)?|kernel|original1|static_weight")

_BIAS_WORDS = frozenset({"bias", "biases"})
_NORM_WORDS = frozenset(
    {"norm", "norms", "layernorm", "rmsnorm", "batchnorm", "groupnorm", "instancenorm", "ln", "bn", "gn"}
)
_EMBEDDING_WORDS = frozenset(
    {"embed", "embeds", "embedding", "embeddings", "emb", "embs", "embedder", "wte", "wpe", "codebook", "rotary"}
)
# A module whose name ends so is applied to an embedding, or makes one of something else.
_PROJECTION_WORDS = frozenset(
    {"proj", "projs", "projection", "project", "projector", "linear", "dense", "fc", "transform", "transformation",
     "mapping", "conv", "inner", "in", "generator"}
)  # fmt: skip
# Learned values that no module multiplies activations with as a matrix. The name is that of the tensor itself.
_PARAMETER_WORDS = frozenset(
    {"token", "tokens", "pos", "position", "positional", "cls", "latents", "latent", "probe", "alpha", "beta", "gamma",
     "lambda", "scale", "scales", "sinks", "freq", "freqs", "encoding", "table", "temperature", "slopes", "offset",
     "ape", "lerp", "mix", "maa", "decay", "faaaa", "pointer"}
)  # fmt: skip
_PARAMETERS = frozenset(
    {"A_log", "A", "D", "dt", "dt_bias", "weight_g", "original0", "query", "queries", "fn", "hc_fn", "r_k", "x_r", "x_w",
     "x_k", "x_v", "x_a", "x_g", "proj_scale", "lightning_attn_decay"}
)  # fmt: skip

_ROUTERS = frozenset({"gate", "gates", "wg", "router", "routers", "shared_expert_gate", "shared_experts_gate"})
_ROUTER_WORDS = frozenset({"router", "gating"})

# Output layers wherever they stand.
_OUTPUTS = frozenset(
    {"embed_out", "unembed", "to_logits", "lm_loss", "vocab_projector", "output_wte", "word_timestamp_head"}
)
# Output layers if they stand outside all numbered layers, where inner modules have these names, too.
_OUTER_OUTPUTS = frozenset(
    {"head", "heads", "output", "output_layer", "output_projection", "proj_out", "classifier", "classification_head",
     "score", "logits_proj", "logits"}
)  # fmt: skip
# (module, the one that holds it)
_INNER_OUTPUTS = frozenset({("decoder", "predictions"), ("decoder", "lm_head"), ("proj", "pred_layer")})

_LINEARS = frozenset()


def words(name: str) -> list[str]:
    """The words of one part of a name, in lower case: ``input_layerNorm2`` → input, layer, norm, 2."""
    return [word.lower() for word in _WORD.findall(name)]


def kind_of_name(name: str, shape: tuple[int, ...]) -> NamedKind:
    """What a tensor of two or more dimensions is by its name.

    The shape decides one thing: a ``gate`` with fewer rows than columns is a router, another one half of an MLP.
    """
    *path, leaf = name.split(".")
    if kind := _kind_of_leaf(leaf):
        return NamedKind(kind, is_sure=True)
    named = [part for part in path if not part.isdigit()]
    outside = not any(part.isdigit() for part in path[:-1])
    if not _WEIGHT.fullmatch(leaf):  # a tensor of its own, as fused experts' are
        named.append(leaf)
    if not named:
        return NamedKind(Kind.LINEAR, is_sure=False)
    module, holder = named[-1], named[-2] if len(named) > 1 else ""
    if kind := _kind_of_module(module, holder, shape, outside=outside):
        return NamedKind(kind, is_sure=True)
    kind = Kind.CONVOLUTION if len(shape) > 3 or (len(shape) == 3 and "conv" in module) else Kind.LINEAR
    return NamedKind(kind, is_sure=module in _LINEARS)


def _kind_of_leaf(leaf: str) -> Kind | None:
    """What the tensor's own name says, whatever holds it."""
    own = words(leaf)
    if _BIAS_WORDS.intersection(own):
        return Kind.BIAS
    if leaf in _PARAMETERS:
        return Kind.PARAMETER
    if _WEIGHT.fullmatch(leaf) or (own and own[-1] in _PROJECTION_WORDS):
        return None
    if _EMBEDDING_WORDS.intersection(own):
        return Kind.EMBEDDING
    if _NORM_WORDS.intersection(own):
        return Kind.NORM
    return Kind.PARAMETER if _PARAMETER_WORDS.intersection(own) else None


def _kind_of_module(module: str, holder: str, shape: tuple[int, ...], *, outside: bool) -> Kind | None:
    """What a weight is by its module's name, None for a linear layer or a convolution."""
    own = words(module)
    last = next((word for word in reversed(own) if not word.isdigit()), "")
    if last in _NORM_WORDS or own[:1] == ["ln"]:
        return Kind.NORM
    if module in _ROUTERS or _ROUTER_WORDS.intersection(own) or _ROUTER_WORDS.intersection(words(holder)):
        return Kind.ROUTER if shape[-2] < shape[-1] else None
    if _is_output(module, holder, own, outside=outside):
        return Kind.OUTPUT
    if module == "shared" and outside:  # T5's; shared experts lie in numbered layers
        return Kind.EMBEDDING
    if _BIAS_WORDS.intersection(own):
        return Kind.BIAS
    if _EMBEDDING_WORDS.intersection(own) and last not in _PROJECTION_WORDS and "patch" not in own:
        return Kind.EMBEDDING
    return None


def _is_output(module: str, holder: str, own: list[str], *, outside: bool) -> bool:
    if module in _OUTPUTS or "lm_head" in "_".join(own):
        return True
    if (module, holder) in _INNER_OUTPUTS:
        return True
    return outside and (module in _OUTER_OUTPUTS or own[-1:] == ["head"])
