"""GGUF files of llama.cpp as model directories of transformers, as far as transformers knows how."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvpack.encode.listing import listed
from kvpack.errors import InputError, NotAContainerError, NotInstalledError

# How many names a message lists.
_SHOWN = 5


def _listed(names: Iterable[str]) -> str:
    return listed(sorted(names), _SHOWN)


def write_model_directory(path: Path, directory: Path) -> list[str]:
    """Write config.json, the tokenizer and ``model.safetensors`` of a GGUF file into an empty directory.

    Quantized tensors become plain numbers, in the memory of this process, all of them.

    Returns:
        What a user must be told: which types were expanded, and what transformers has no place for.

    Raises:
        NotInstalledError: gguf, transformers or torch is missing.
        NotAContainerError: the gguf package cannot read it.
        InputError: transformers does not know the architecture, or the file lacks tensors of the model.
    """
    try:
        import gguf
        import torch
        import transformers
        from safetensors.torch import save_file
        from transformers import modeling_gguf_pytorch_utils
    except ImportError as error:
        raise NotInstalledError(
            f"{path} is a GGUF file: to read it takes {error.name}: pip install 'kvpack[gguf]'"
        ) from None
    converter: Any = modeling_gguf_pytorch_utils
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise NotAContainerError(f"{path}: a GGUF file that the gguf package cannot read: {error}") from None
    parts = reader.get_field("split.count")
    if parts is not None and parts.contents() > 1:
        raise InputError(
            f"{path} is one of {parts.contents()} parts: join them first with llama.cpp's llama-gguf-split --merge"
        )
    field = reader.get_field("general.architecture")
    architecture = "" if field is None else str(field.contents())
    dtype = _plain_dtype(gguf, torch, reader)
    folder, name = str(path.parent), path.name
    try:
        config = transformers.AutoConfig.from_pretrained(folder, gguf_file=name)
        with torch.device("meta"):
            model = _model_class(transformers, config).from_config(config, dtype=dtype)
        content = converter.load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model, torch_dtype=dtype)
        processor = converter.TENSOR_PROCESSORS.get(architecture, converter.TensorProcessor)(config=content["config"])
        places = converter.get_gguf_hf_weights_map(model, processor)
    except (ValueError, KeyError, NotImplementedError, AttributeError, TypeError) as error:
        raise InputError(
            f"{path}: transformers {transformers.__version__} cannot make a model of this GGUF file (architecture "
            f"{architecture!r}): {error}. Compress the original model's safetensors files instead"
        ) from None
    tensors = content["tensors"]
    infinite = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if infinite:
        raise InputError(f"{path}: {_listed(infinite)} have values that are infinite or no numbers as {dtype}")
    _check_complete(path, model, tensors)
    notes = _expansion_notes(path, gguf, reader, dtype)
    unused = [tensor.name for tensor in reader.tensors if tensor.name not in places]
    if unused:
        notes.append(
            f"{path}: transformers has no place for {_listed(unused)}: left out"
            + (", and with it the scaling of positions" if any("rope_freqs" in name for name in unused) else "")
        )
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
    try:
        transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(directory)
    except Exception as error:  # whatever a converter of some tokenizer raises: the weights are worth having without
        notes.append(f"{path}: no tokenizer written, since transformers cannot convert it ({_first_line(error)})")
    save_file({n: t.contiguous() for n, t in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    return notes


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _plain_dtype(gguf: Any, torch: Any, reader: Any) -> Any:
    """That of the matrices, where they have one; float16 for quantized ones, whose scales are float16."""
    kinds = gguf.GGMLQuantizationType
    plain = {kinds.F32: torch.float32, kinds.F16: torch.float16, kinds.BF16: torch.bfloat16}
    types = {tensor.tensor_type for tensor in reader.tensors if len(tensor.shape) > 1}
    found = {plain[kind] for kind in types if kind in plain}
    if found == {torch.bfloat16} and types == {kinds.BF16}:
        return torch.bfloat16
    return torch.float32 if found - {torch.float16} else torch.float16


def _model_class(transformers: Any, config: Any) -> Any:
    for name in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel"):
        found = getattr(transformers, name)
        if type(config) in found._model_mapping:
            return found
    raise InputError(f"transformers has no model for {type(config).__name__}")


def _check_complete(path: Path, model: Any, tensors: dict[str, Any]) -> None:
    """Each parameter and saved buffer of the model has its tensor, or is tied to one that has; shapes agree."""
    groups: dict[int, list[str]] = {}
    shapes = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
        shapes[name] = tuple(tensor.shape)
    missing = [names[0] for names in groups.values() if not any(name in tensors for name in names)]
    if missing:
        raise InputError(
            f"{path}: transformers' converter finds no values for {len(missing)} tensors of the model "
            f"({_listed(missing)}): compress the original model's safetensors files instead"
        )
    wrong = [name for name, tensor in tensors.items() if name in shapes and tuple(tensor.shape) != shapes[name]]
    if wrong:
        raise InputError(f"{path}: {_listed(wrong)} are of other shapes than the model that transformers makes of it")


def _expansion_notes(path: Path, gguf: Any, reader: Any, dtype: Any) -> list[str]:
    kinds = gguf.GGMLQuantizationType
    quantized = {t.tensor_type.name for t in reader.tensors} - {kinds.F32.name, kinds.F16.name, kinds.BF16.name}
    if not quantized:
        return []
    note = f"{path}: tensors of {_listed(quantized)} were expanded to {str(dtype).removeprefix('torch.')}"
    return [f"{note}, and are coded from that: what their quantization lost is lost, and the noise below comes on top"]
