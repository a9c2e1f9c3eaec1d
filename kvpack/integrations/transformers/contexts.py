"""Contexts of transformers' models in files: what :meth:`KVPackCache.save` and :meth:`KVPackCache.load` do.

A context is one row of a cache, with its token ids and the fingerprint of the model that has read them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvpack.encode.model_config import GUARD_KEY
from kvpack.errors import CacheInputError, FingerprintMismatchError, NotSupportedError, SnapshotHeaderError
from kvpack.format.snapshot import Fingerprint, SnapshotFile, SnapshotHeader
from kvpack.runtime.kv.cache import KVCache
from kvpack.runtime.kv.fingerprint import (
    check_fingerprint,
    json_digest,
    json_values,
    known_fingerprint,
    make_fingerprint,
    tensors_digest,
)
from kvpack.runtime.kv.prefix_hash import token_bytes
from kvpack.runtime.kv.snapshot import UNKNOWN_TOKEN, OnCorrupt, cache_for, load_snapshot, save_snapshot

# What a configuration says that keys and values do not depend on, or that the fingerprint says elsewhere.
_OTHER_KEYS = {
    "architectures", "bos_token_id", "dtype", "eos_token_id", "id2label", "label2id", "name_or_path",
    "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "quantization_config",
    "return_dict", "torch_dtype", "transformers_version", "use_cache", GUARD_KEY,
}  # fmt: skip

Ids = npt.NDArray[np.int32]
PathLike = str | os.PathLike[str]
# Ids as users have them.
TokenIds = torch.Tensor | npt.NDArray[np.integer[Any]] | Sequence[int] | Sequence[Sequence[int]]


def model_fingerprint(model: Any) -> Fingerprint:
    """What says whether pages are of this model: of its configuration, weights, positions, dtype and LoRA adapter.

    The same on each device and, of one model directory, in each version of transformers. The ``rope`` of it is the
    configuration's ``rope_parameters``. Takes some milliseconds (:mod:`kvpack.runtime.kv.fingerprint`).

    Args:
        model: of transformers or PEFT.

    Raises:
        CacheInputError: weights are not in memory.
        NotSupportedError: the adapter is none of layers, as with prompt tuning.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if getattr(model, "peft_config", None) is not None and hasattr(model, "get_base_model"):
        if model.active_peft_config.is_prompt_learning:
            raise NotSupportedError("contexts of prompt tuning cannot be saved: virtual tokens have no ids")
        model = model.get_base_model()
    told, rope = _told(model.config)
    adapter, of_adapters = _adapter(model)
    weights = (
        (name.replace(".base_layer", ""), tensor) for name, tensor in _tensors(model) if id(tensor) not in of_adapters
    )
    return make_fingerprint(told, weights, rope=rope, dtype=model.dtype, adapter=adapter)


def _told(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What keys and values depend on of a configuration, and its ``rope_parameters``."""
    text = config.get_text_config(decoder=True)
    told = {
        key: value for key, value in text.to_diff_dict().items() if key not in _OTHER_KEYS and not key.startswith("_")
    }
    told["model_type"] = text.model_type
    return told, getattr(text, "rope_parameters", None) or {}


def check_configuration(header: SnapshotHeader, config: Any, dtype: torch.dtype | None) -> None:
    """Whether a context may be of a model, by what is known before its weights are loaded.

    Args:
        config: of the model.
        dtype: that it will be in; None: not known yet.

    Raises:
        FingerprintMismatchError: it cannot be.
        ModelMismatchError: the file does not say what model it is of.
    """
    ours = known_fingerprint(header)
    told, rope = _told(config)
    of_dtype = ours.dtype if dtype is None else str(dtype).removeprefix("torch.")
    theirs = replace(ours, config=json_digest(told), rope=json_values(rope), dtype=of_dtype)
    if differences := ours.differences(theirs):
        raise FingerprintMismatchError(ours.model, "not known, its weights were not loaded", differences)


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, and the buffers that files of the model have: coded weights are buffers."""
    yield from model.named_parameters()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}", buffer


def active_adapter(model: Any) -> str | None:
    """Hex SHA-256 of the LoRA adapters that a model uses now; None: it uses none."""
    return _adapter(getattr(model, "_orig_mod", model))[0]


def _adapter(model: Any) -> tuple[str | None, set[int]]:
    """Hex SHA-256 of the adapters that are in use, or None; and which tensors are of adapters, in use or not."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # without it there are none
    if tuners is None:
        return None, set()
    of_adapters: set[int] = set()
    used: list[tuple[str, torch.Tensor]] = []
    numbers: dict[str, Any] = {}
    for prefix, module in model.named_modules():
        if not isinstance(module, tuners.BaseTunerLayer):
            continue
        layer: Any = module
        active = [] if layer.disable_adapters or layer.merged else list(layer.active_adapters)
        for part in layer.adapter_layer_names:
            held = getattr(layer, part, None) or {}
            of_adapters |= {id(tensor) for tensor in held.parameters()} if hasattr(held, "parameters") else set()
            for place, name in enumerate(active):
                if name in held:
                    one = held[name]
                    inner = one.named_parameters() if isinstance(one, torch.nn.Module) else [("", one)]
                    used += [(f"{prefix}.{part}.{place}.{key}", tensor) for key, tensor in inner]
        scaling = getattr(layer, "scaling", {})
        numbers[prefix] = [scaling.get(name) for name in active]
    if not used:
        return None, of_adapters
    return json_digest([tensors_digest(used), numbers]), of_adapters


def token_rows(ids: TokenIds) -> Ids:
    """i32 [rows, columns] on the host; one row may come without the first axis.

    Raises:
        CacheInputError: they are no such integers, or not of 32 bits.
    """
    found = ids.detach().cpu().numpy() if isinstance(ids, torch.Tensor) else np.asarray(ids)
    found = found[None] if found.ndim == 1 else found
    if found.ndim != 2 or not (np.issubdtype(found.dtype, np.integer) or found.size == 0):
        raise CacheInputError(f"token ids are {found.dtype} {list(found.shape)}; integers [rows, columns] are wanted")
    return np.frombuffer(token_bytes(found.reshape(-1)), "<i4").reshape(found.shape).astype(np.int32)


def save_row(
    kv: KVCache, path: PathLike, row: int, ids: Ids, model: Any, pages: tuple[int, int] | None, threads: int | None
) -> int:
    """Write a row that has these ids; returns the bytes of the file.

    Raises:
        CacheInputError, NotSupportedError, InputError, OSError
    """
    device_of_model(model)
    fingerprint = model_fingerprint(model)
    return save_snapshot(kv, path, row, tokens=ids, fingerprint=fingerprint, pages=pages, threads=threads)


def device_of_model(model: Any) -> torch.device:
    """
    Raises:
        NotSupportedError: its layers lie on several.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        raise NotSupportedError(
            f"the model lies on several devices ({', '.join(sorted(map(str, devices)))}); contexts are saved and "
            "loaded of models on one"
        )
    found: torch.device = devices.pop()
    return found


def load_rows(
    paths: Sequence[PathLike],
    model: Any,
    *,
    tokens: int | None,
    on_corrupt: OnCorrupt,
    threads: int | None,
    max_sequences: int | None,
    **options: Any,
) -> tuple[SnapshotHeader, KVCache, list[Ids]]:
    """A cache of pages whose first rows are these files, with the header of the first one and the ids of each row.

    A file that is named again is read once: its rows share their pages.

    Raises:
        CacheInputError, CacheFullError, ModelMismatchError, NotSupportedError, FormatError, OSError
    """
    if not paths:
        raise CacheInputError("no file is named")
    device = device_of_model(model)
    fingerprint = model_fingerprint(model)
    vocabulary = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    rows = len(paths) if max_sequences is None else max_sequences
    if rows < len(paths):
        raise CacheInputError(f"{len(paths)} files are to be loaded; max_sequences is {max_sequences}")
    kv: KVCache | None = None
    header: SnapshotHeader | None = None
    found: list[Ids] = []
    first_row: dict[str, int] = {}
    for row, path in enumerate(paths):
        if (same := first_row.setdefault(os.path.realpath(path), row)) != row:
            assert kv is not None
            kv.fork(same, row)
            found.append(found[same])
            continue
        with SnapshotFile(path) as file:
            check_fingerprint(file.header, fingerprint)
            if isinstance(vocabulary, int) and (most := int(file.tokens().max())) >= vocabulary:
                raise SnapshotHeaderError(f"{path}: token id {most} is none of the model's {vocabulary}")
            if kv is None:
                header = file.header
                kv = cache_for(header, max_sequences=rows, device=device, **options)
            loaded = load_snapshot(kv, file, row, tokens=tokens, on_corrupt=on_corrupt, threads=threads)
        found.append(loaded.tokens)
    assert kv is not None
    assert header is not None
    return header, kv, found


def common_columns(held: Ids, given: Ids, is_token: npt.NDArray[np.bool_] | None) -> int:
    """How many first columns of two batches have the same known ids; what is no token in ``held`` may differ."""
    columns = min(held.shape[1], given.shape[1])
    a, b = held[:, :columns], given[:, :columns]
    same = (a == b) & (a != UNKNOWN_TOKEN)
    if is_token is not None:
        same |= ~is_token[:, :columns]
    all_same = same.all(axis=0)
    return columns if all_same.all() else int(np.argmin(all_same))
