"""What a tensor is by its name: the one table of names, used where no module tree says it.

Names are read in whole words: parts between dots, then words between underscores and at camel case's humps. What counts
is the name of the module that holds the tensor, not what stands further up: the ``dense`` of ``lm_head.dense`` is a
linear layer. ``tests/data/tensor_kinds.json`` holds the names of the architectures of transformers with what they are.
"""

from __future__ import annotations

import math
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
_WEIGHT = re.compile(r"weights?|weight_v|weight_[ih]h_l\d+(_reverse)?|kernel|original1|static_weight")

_BIAS_WORDS = frozenset({"bias", "biases"})
# TransformerLens' and fused experts' biases, of which each layer has one a head or an expert.
_BIASES = re.compile(r"b_([QKVOU]|in|out)|b[123]")
_NORM_WORDS = frozenset(
    {"norm", "norms", "layernorm", "rmsnorm", "batchnorm", "groupnorm", "instancenorm", "ln", "bn", "gn"}
)
_EMBEDDING_WORDS = frozenset(
    {"embed", "embeds", "embedding", "embeddings", "emb", "embs", "embedder", "wte", "wpe", "codebook", "rotary"}
)
# A module with such a word in its name is applied to an embedding, or makes one of something else.
_PROJECTION_WORDS = frozenset(
    {"proj", "projs", "projection", "project", "projector", "linear", "dense", "fc", "transform", "transformation",
     "mapping", "conv", "inner", "inner2emb", "patch"}
)  # fmt: skip
# Learned values that no module multiplies activations with as a matrix. The name is that of the tensor itself.
_PARAMETER_WORDS = frozenset(
    {"token", "tokens", "pos", "position", "positional", "cls", "latents", "latent", "probe", "prompt", "pad", "alpha",
     "beta", "gamma", "lambda", "scale", "scales", "sinks", "freq", "freqs", "encoding", "table", "temperature",
     "slopes", "offset", "ape", "lerp", "mix", "maa", "decay", "faaaa", "pointer", "query", "queries", "fn"}
)  # fmt: skip
_PARAMETERS = frozenset(
    {"A_log", "A", "D", "dt", "weight_g", "original0", "r_k", "x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w_g",
     "time_first", "index_kpool_compress_gate"}
)  # fmt: skip

_ROUTERS = frozenset(
    {"gate", "gates", "wg", "shared_expert_gate", "shared_experts_gate", "expert_gate", "gate_network", "switch"}
)
_ROUTER_WORDS = frozenset({"router", "routers", "gating"})

# Embeddings that no known architecture uses for anything else.
_SURE_EMBEDDINGS = frozenset(
    {"embed_tokens", "wte", "wpe", "word_embeddings", "position_embeddings", "token_type_embeddings", "tok_embeddings",
     "shared", "embed_positions", "relative_attention_bias"}
)  # fmt: skip
_EMBEDDINGS = frozenset({"query_feat", "queries_features", "pe_k", "pe_v", "bias_values", "W_E"})

# Output layers wherever they stand.
_OUTPUTS = frozenset(
    {"lm_head", "embed_out", "unembed", "to_logits", "lm_loss", "vocab_projector", "output_wte", "W_U"}
)
# Output layers if they stand outside all numbered layers, where inner modules have these names, too.
_OUTER_OUTPUTS = frozenset({"output", "output_layer", "output_projection", "proj_out", "classifier", "score"})
# (module, the one that holds it)
_INNER_OUTPUTS = frozenset(
    {
        ("decoder", "predictions"),
        ("decoder", "lm_head"),
        ("proj", "pred_layer"),
        ("fc", "head"),
        ("out_proj", "classifier"),
    }
)
# What stands above the modules of a whole model.
_WHOLE_MODEL = frozenset({"model", "transformer", "backbone", "module", "language_model", "net", "decoder"})
# A matrix outside all layers that has at least so many rows, and so many times its columns, has one for each token.
_VOCABULARY_ROWS = 8192
_VOCABULARY_RATIO = 3
# Phi's first checkpoints call the output layer layers.24.linear.
_LINEAR_RATIO = 16

# Linear layers that no known architecture uses for anything else.
_SURE_LINEARS = frozenset(
    {"Wi", "Wo", "Wqkv", "att_proj", "attention_weights", "b_proj", "conv", "conv1", "conv1d", "conv2", "conv3",
     "conv_1", "conv_layers", "conv_out", "conv_pre", "convolution", "dense", "dense1", "dense2", "dense_4h_to_h",
     "dense_h_to_4h", "depthwise_conv", "down_proj", "dt_proj", "dwconv", "f_a_proj", "f_b_proj", "fc", "fc1", "fc2",
     "feature_projection", "final_proj", "g_a_proj", "g_b_proj", "g_proj", "gate_proj", "gate_up_proj", "in_proj",
     "in_proj_a", "in_proj_b", "in_proj_qkv", "in_proj_weight", "in_proj_z", "input_linear", "input_proj",
     "intermediate_dense", "k", "k_lin", "k_proj", "k_sconv", "key", "key_proj", "kv_a_proj_with_mqa", "kv_b_proj",
     "lin1", "lin2", "linear", "linear1", "linear2", "linear_1", "linear_2", "linear_fc1", "linear_fc2", "linear_k",
     "linear_out", "linear_pos", "linear_q", "linear_v", "mm_input_projection_weight", "o", "o_proj", "out_lin",
     "out_proj", "output_dense", "output_linear", "output_proj", "patch_embedding", "patch_embeddings",
     "per_layer_input_gate", "per_layer_model_projection", "per_layer_projection", "pointwise_conv",
     "pointwise_conv1", "pointwise_conv2", "proj", "proj_in", "projection", "q", "q_a_proj", "q_b_proj", "q_lin",
     "q_proj", "qkv", "qkv_proj", "query", "query_key_value", "query_proj", "relative_k_proj", "sampling_offsets",
     "text_proj", "text_projection", "to_kv", "to_out", "to_q", "up_proj", "v", "v_lin", "v_proj", "v_sconv", "value",
     "value_proj", "visual_projection", "w1", "w2", "w3", "weights_proj", "wi", "wi_0", "wi_1", "wk", "wo", "wq",
     "wq_b", "wv", "x_proj"}
)  # fmt: skip


# Words of an embedding that has a row for something other than a token of a vocabulary.
_OTHER_ROWS_WORDS = frozenset(
    {"pos", "position", "positions", "positional", "wpe", "relative", "rotary", "type", "segment"}
)


def has_row_for_each_token(name: str, kind: Kind, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix with a row for each token: an embedding of them, or an output layer."""
    if kind not in (Kind.EMBEDDING, Kind.OUTPUT) or len(shape) != 2:
        return False
    modules = [part for part in name.split(".") if not _WEIGHT.fullmatch(part)]
    return kind is Kind.OUTPUT or _OTHER_ROWS_WORDS.isdisjoint(words(modules[-1]) if modules else [])


def words(name: str) -> list[str]:
    """The words of one part of a name, in lower case: ``input_layerNorm2`` → input, layer, norm, 2."""
    return [word.lower() for word in _WORD.findall(name)]


def kind_of_name(name: str, shape: tuple[int, ...]) -> NamedKind:
    """What a tensor of two or more dimensions is by its name.

    The shape decides little: a ``gate`` with fewer rows than columns is a router, another one half of an MLP; what has
    the rows of a vocabulary, outside all layers, is an embedding or an output layer.
    """
    *path, leaf = name.split(".")
    if leaf.isdigit() and path:
        leaf = path.pop()
    if kind := _kind_of_leaf(leaf):
        return NamedKind(kind, is_sure=True)
    outside = not any(part.isdigit() for part in path[:-1])
    is_weight = _WEIGHT.fullmatch(leaf) is not None
    # A tensor that is no module's weight is its own module, as fused experts' are.
    named = [part for part in path if not part.isdigit()] + ([] if is_weight else [leaf])
    if not named:
        return NamedKind(Kind.LINEAR, is_sure=False)
    module, holder = named[-1], named[-2] if len(named) > 1 else ""
    own = words(module)
    last = next((word for word in reversed(own) if not word.isdigit()), "")
    if last in _NORM_WORDS or own[:1] == ["ln"]:
        return NamedKind(Kind.NORM, is_sure=True)
    if _is_router(named, shape):
        return NamedKind(Kind.ROUTER, is_sure=True)
    if module in _OUTPUTS or own[-2:] == ["lm", "head"] or (module, holder) in _INNER_OUTPUTS:
        return NamedKind(Kind.OUTPUT, is_sure=module in _OUTPUTS)
    ends_model = module == "linear_out" or (module == "linear" and shape[0] >= _LINEAR_RATIO * shape[1])
    ends_model |= any(words(part)[-1:] in (["head"], ["heads"]) for part in named)  # lm_head.linear, medusa_head.0.1
    if ends_model and _has_vocabulary(shape):
        return NamedKind(Kind.OUTPUT, is_sure=False)
    if outside and _is_output(named, shape):
        return NamedKind(Kind.OUTPUT, is_sure=False)
    if module in _EMBEDDINGS or _is_embedding(module, own, last, shape, outside=outside):
        return NamedKind(Kind.EMBEDDING, is_sure=module in _SURE_EMBEDDINGS)
    if (
        outside
        and is_weight
        and _PROJECTION_WORDS.isdisjoint(own)
        and _has_vocabulary(shape)
        and module not in _SURE_LINEARS
    ):
        return NamedKind(Kind.OUTPUT, is_sure=False)
    kind = Kind.CONVOLUTION if len(shape) > 3 or (len(shape) == 3 and "conv" in module) else Kind.LINEAR
    return NamedKind(kind, is_sure=module in _SURE_LINEARS)


def _kind_of_leaf(leaf: str) -> Kind | None:
    """What the tensor's own name says, whatever holds it."""
    own = words(leaf)
    if _BIAS_WORDS.intersection(own) or _BIASES.fullmatch(leaf):
        return Kind.BIAS
    if leaf in _PARAMETERS:
        return Kind.PARAMETER
    if _WEIGHT.fullmatch(leaf) or _PROJECTION_WORDS.intersection(own) or own[-1:] == ["weight"]:
        return None
    if _EMBEDDING_WORDS.intersection(own):
        return Kind.EMBEDDING
    if _NORM_WORDS.intersection(own):
        return Kind.NORM
    return Kind.PARAMETER if len(leaf) > 1 and _PARAMETER_WORDS.intersection(own) else None


def _is_router(named: list[str], shape: tuple[int, ...]) -> bool:
    module, holder = named[-1], named[-2] if len(named) > 1 else ""
    if "experts" in words(holder) or "expert" in words(holder):
        return False
    if _ROUTER_WORDS.intersection(words(module)) or any(_ROUTER_WORDS.intersection(words(part)) for part in named[-3:]):
        return True
    rows, cols = shape[-2:]
    few = rows < cols or (rows >= 4 * cols and cols <= 512)  # some store them inputs x experts
    return few and (module in _ROUTERS or holder == "gate")


def _is_output(named: list[str], shape: tuple[int, ...]) -> bool:
    module = named[-1]
    if words(module)[-1:] in (["head"], ["heads"]) or "logits" in words(module):
        return True
    if module not in _OUTER_OUTPUTS or math.prod(shape[2:]) > 1:
        return False
    # Deeper inside, what has such a name may end a part of the model only.
    return _WHOLE_MODEL.issuperset(named[:-1]) or shape[0] >= 2 * shape[1]


def _is_embedding(module: str, own: list[str], last: str, shape: tuple[int, ...], *, outside: bool) -> bool:
    if _PROJECTION_WORDS.intersection(own) or (len(shape) > 2 and own[:1] not in (["pos"], ["position"])):
        return False
    if module == "shared" and outside:  # T5's; shared experts lie in numbered layers
        return True
    return last in ("bias", "token", "tokens") or not _EMBEDDING_WORDS.isdisjoint(own)


def _has_vocabulary(shape: tuple[int, ...]) -> bool:
    return math.prod(shape[2:]) == 1 and shape[0] >= max(_VOCABULARY_ROWS, _VOCABULARY_RATIO * shape[1])
