"""Causal language models from directories: loaded, with a cache, and with what they take of memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers.models import auto

from kvpack.encode.listing import listed
from kvpack.encode.model_config import METHOD
from kvpack.errors import InputError, KvpackError
from kvpack.integrations.transformers.cache import KVPackCache
from kvpack.integrations.transformers.model_configuration import model_configuration
from kvpack.runtime.weights.coded_matrix import CodedMatrix

DTYPES = ("auto", "float32", "bfloat16", "float16")
# How many names a message lists.
_SHOWN = 3


@dataclass(frozen=True)
class WeightMemory:
    """What a model's weights take, tied ones counted once.

    Attributes:
        weights: how many there are.
        bytes: what they take in memory: coded ones as they are coded, tables and scales in.
        dense_bytes: what they would take if the coded ones were dense, in the type that they are decoded to.
    """

    weights: int
    bytes: int
    dense_bytes: int


def kv_bytes(cache: Any) -> int:
    """What a cache holds of keys and values: pages in use, or the tensors of a ``DynamicCache``, padding counted."""
    if isinstance(cache, KVPackCache):
        return sum(kv.pools.bytes_in_use for kv in cache.kvs)
    return sum(side.nbytes for side in _sides(cache))


def kv_bytes_16_bit(cache: Any) -> int:
    """What the same tokens take in 16 bits, densely."""
    if not isinstance(cache, KVPackCache):
        return sum(2 * side.numel() for side in _sides(cache))
    return 2 * sum(kv.elements for kv in cache.kvs)


def _sides(cache: Any) -> list[torch.Tensor]:
    return [side for layer in cache.layers for side in (layer.keys, layer.values) if side is not None]


def chosen_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device where there is one, else the CPU.

    Raises:
        InputError: torch knows no such device, or this machine has none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used ({reason}); auto, cpu and cuda can be named") from None
    return device


def check_directory(path: Path) -> None:
    """A directory whose configuration is that of a causal language model of transformers.

    Raises:
        InputError: it is none; the message says how to get one.
    """
    config = model_configuration(path)
    kind = config["model_type"]
    if "auto_map" in config:  # a model of its own code
        return
    if kind not in auto.CONFIG_MAPPING:
        raise InputError(
            f"{path} has a model of type {kind!r}, which transformers {transformers.__version__} does not have: "
            "another version may have it"
        )
    if kind not in auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(
            f"{path} has a model of type {kind!r}, of which transformers makes no causal language model: it does not "
            "continue a text by itself"
        )


def _check_weights(directory: Path) -> None:
    """
    Raises:
        InputError: there are none that transformers reads.
    """
    if not any(directory.glob("*.safetensors")) and not any(directory.glob("pytorch_model*.bin")):
        raise InputError(
            f"{directory} has no weights, neither *.safetensors nor pytorch_model*.bin: only its configuration is there"
        )


@contextmanager
def _loading(directory: Path, what: str) -> Iterator[None]:
    """What transformers says in several lines, in one; it draws no bars."""
    check_directory(directory)
    had_bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    except KvpackError:
        raise
    except Exception as error:
        # tokenizers raises a bare Exception for a file that it cannot read.
        known = OSError | ValueError | KeyError | ImportError | SafetensorError
        if not isinstance(error, known) and type(error) is not Exception:
            raise
        lines = [line.strip() for line in str(error).strip().splitlines()]
        reason = lines[0] if lines else type(error).__name__
        if reason.endswith(":"):  # a list follows
            reason = " ".join(lines)
        raise InputError(f"{directory}: transformers cannot load {what}: {reason}") from None
    finally:
        if had_bars:
            transformers.utils.logging.enable_progress_bar()


def load_config(directory: Path) -> Any:
    """The directory's configuration.

    Raises:
        InputError: there is none that transformers can load.
    """
    with _loading(directory, "its configuration"):
        return transformers.AutoConfig.from_pretrained(directory, local_files_only=True)


def load_tokenizer(directory: Path) -> Any:
    """The directory's tokenizer.

    Raises:
        InputError: there is none that transformers can load.
    """
    with _loading(directory, "its tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)


def load_causal_model(
    directory: Path, *, device: str = "auto", dtype: str = "auto", attention: str | None = None
) -> Any:
    """A causal language model in evaluation mode, coded or ordinary.

    Args:
        device: ``auto``, or a name of torch's.
        dtype: what is computed in: one of ``DTYPES``; ``auto`` is what the directory names.
        attention: an attention implementation that transformers knows; its own choice by default.

    Raises:
        InputError: the directory is none, or transformers cannot load a causal language model from it, or it has no
            weights for parts of that model, as an encoder without a language model's head.
        FormatError: the directory is compressed, and damaged.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    check_directory(directory)
    _check_weights(directory)
    place = chosen_device(device)
    options: dict[str, Any] = {"dtype": "auto" if dtype == "auto" else getattr(torch, dtype)}
    if attention is not None:
        options["attn_implementation"] = attention
    if place.type != "cpu":
        options["device_map"] = {"": place}
    with _loading(directory, "a causal language model of it"):
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            directory, local_files_only=True, output_loading_info=True, **options
        )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"{directory} has no weights for {listed(missing, _SHOWN)}, which a causal language model of its "
            "configuration has: they would be random"
        )
    return model.eval()


def expected_dtype(config: Any, dtype: str) -> torch.dtype | None:
    """What a model of this configuration will be in when :func:`load_causal_model` has loaded it; None: cannot be told.

    >>> expected_dtype(transformers.LlamaConfig(dtype="bfloat16"), "auto")
    torch.bfloat16
    """
    method = getattr(config, "quantization_config", None) or {}
    method = method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", None)
    if method not in (None, METHOD):  # others choose themselves
        return None
    if dtype != "auto":
        found: Any = getattr(torch, dtype)
    else:
        found = config.dtype if config.dtype == config.get_text_config(decoder=True).dtype else None
    return found if isinstance(found, torch.dtype) else None


def position_limit(config: Any) -> int | None:
    """The most tokens of a sequence that a configuration allows; None where it names no limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def weight_memory(model: Any) -> WeightMemory:
    """What the weights of a loaded model take."""
    weights = size = dense = 0
    width = torch.empty(0, dtype=model.dtype).element_size()
    shared: set[int] = set()
    for module in model.modules():
        if not isinstance(module, CodedMatrix):
            continue
        blob = module._current()
        is_new = blob is None or id(blob) not in shared  # an output layer may share an embedding's
        shared.add(id(blob))
        bias = getattr(module, "bias", None)
        count = is_new * module.in_features * module.out_features + (0 if bias is None else bias.numel())
        weights += count
        size += module.memory_bytes - (0 if is_new or blob is None else blob.nbytes)
        dense += count * width
    for parameter in model.parameters():  # each once, tied ones too
        weights += parameter.numel()
        size += parameter.nbytes
        dense += parameter.nbytes
    return WeightMemory(weights, size, dense)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory so far: what torch has allocated on a GPU; on the CPU, what the process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
