"""What a checkpoint's tensors are by the module tree of transformers, on torch's meta device: no weights, no memory.

A process of its own builds the tree, as ``python -P module_tree.py``: what a config.json asks for may take long or end
the interpreter, and who compresses needs no torch of his own. It reads ``{"config": …, "names": […]}`` and writes
``{"source": …, "kinds": {name: kind}}``; kinds are those of :class:`kvpack.encode.tensor_kinds.Kind`. No code of a
checkpoint runs: only architectures of transformers are built.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

TIMEOUT_S = 120
_MEMORY_BYTES = 8 << 30
_SHOWN_CHARACTERS = 200
_BIAS = re.compile(r"(^|_)bias(es)?(_|$)")
# Parameters that are matrices although no Linear holds them: Zamba's dt_proj_weight, XLNet's q, Funnel's r_kernel.
_MATRIX = re.compile(r"(\w*_)?(weight|proj|projection|kernel)|[qkvor]")
# Names of a model's last layers, and of routers that are a plain Linear.
_HEAD = re.compile(r"(^|[._])(heads?(\.\d+)?|logits(_\w+)?)$")
_CLASSIFIER = re.compile(r"(^|\.)(classifier|score)(\.\d+)?$")
_GATE = re.compile(r"\w*router|gate|wg|\w*expert\w*_gate")


def kinds_by_module_tree(config: Mapping[str, Any], names: Sequence[str]) -> tuple[str, dict[str, str]]:
    """What tensors are by the modules that they belong to.

    Args:
        config: what config.json says.
        names: of the checkpoint's tensors, as they stand there; transformers' renamings are followed.

    Returns:
        Which model this is by, and the kinds of the tensors that it has. Of tensors that are parameters of modules
        with a computation of their own, the kind is ``parameter``.

    Raises:
        NoModuleTreeError: transformers or torch is not installed, or cannot build the model.
    """
    from kvpack.encode.tensor_kinds import NoModuleTreeError

    for package in ("transformers", "torch"):
        if importlib.util.find_spec(package) is None:
            raise NoModuleTreeError(f"{package} is not installed")
    if not sys.executable:
        raise NoModuleTreeError("there is no Python interpreter to ask transformers with")
    try:
        said, errors, status = _ask(json.dumps({"config": dict(config), "names": list(names)}))
    except subprocess.TimeoutExpired:
        raise NoModuleTreeError(f"building the model takes more than {TIMEOUT_S} s") from None
    except OSError as error:
        raise NoModuleTreeError(f"no process to build the model in ({error})") from None
    try:
        # Packages may print while they are imported: the answer is the last line.
        answer = json.loads((said.splitlines() or [""])[-1])
        return str(answer["source"]), dict(answer["kinds"])
    except (ValueError, KeyError, TypeError):
        why = (errors.strip().splitlines() or [f"exit {status}"])[-1]
        raise NoModuleTreeError(f"the model is not built: {why[:_SHOWN_CHARACTERS]}") from None


@functools.lru_cache(8)  # who compresses a model at several rates waits once
def _ask(question: str) -> tuple[str, str, int]:
    """What the process writes to its outputs, and its exit status."""
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", str(Path(__file__).resolve())],
        input=question,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "HF_HUB_OFFLINE": "1"},  # a configuration may name another model's weights
        timeout=TIMEOUT_S,
        check=False,
    )
    return done.stdout, done.stderr, done.returncode


def build_model(config: Mapping[str, Any]) -> Any:
    """The model that ``config`` describes, on the meta device.

    Raises:
        Exception: whatever transformers raises.
    """
    import torch
    from transformers.models.auto import modeling_auto

    transformers: Any = importlib.import_module("transformers")

    values = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    model_type = values.get("model_type")
    if model_type not in transformers.CONFIG_MAPPING:
        raise ValueError(f"transformers {transformers.__version__} has no model_type {model_type!r}")
    configuration_class = transformers.CONFIG_MAPPING[model_type]
    configuration = configuration_class.from_dict(values)
    named = [getattr(transformers, str(name), None) for name in values.get("architectures") or []]
    classes: list[Any] = [c for c in named if isinstance(c, type) and issubclass(c, transformers.PreTrainedModel)]
    for mapping in (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, modeling_auto.MODEL_MAPPING):
        if not classes and configuration_class in mapping:
            found = mapping[configuration_class]
            classes = [found[0] if isinstance(found, tuple) else found]
    if not classes:
        raise ValueError(f"transformers {transformers.__version__} has no model class for {model_type!r}")
    with torch.device("meta"):
        return classes[0]._from_config(configuration, attn_implementation="eager")


def parameter_kinds(model: Any) -> dict[str, str]:
    """Kinds of a model's parameters of two or more dimensions, by their names in the tree."""
    output = None
    with contextlib.suppress(AttributeError, NotImplementedError):
        output = model.get_output_embeddings()
    vocabularies = _vocabulary_sizes(model.config)
    labels = getattr(model.config, "num_labels", None)
    modules = dict(model.named_modules(remove_duplicate=False))
    kinds = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.dim() < 2:
            continue
        path, _, leaf = name.rpartition(".")
        owner = modules[path]
        parts = path.split(".")
        holders = [type(modules[".".join(parts[:depth])]).__name__ for depth in range(len(parts))]
        kind = _kind_of_parameter(owner, holders, leaf, parameter.dim())
        if kind in ("linear", "convolution") and leaf == "weight":
            rows, cols = parameter.shape[:2]
            outside = not re.search(r"(^|\.)\d+\.", path)
            ends_model = rows in vocabularies or _HEAD.search(path) or (rows == labels and _CLASSIFIER.search(path))
            if owner is output or (outside and ends_model):
                kind = "output layer"
            elif kind == "linear" and rows < cols and _GATE.fullmatch(parts[-1]):
                kind = "router"
        kinds[name] = kind
    return kinds


def checkpoint_names(model: Any, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of a checkpoint's names and the parameters of the tree that transformers makes of them."""
    known = dict(model.named_parameters(remove_duplicate=False))
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # older than 5: names are those of the tree

        def renamed(name: str) -> str:
            return name
    else:
        conversions = get_model_conversion_mapping(model)
        renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]

        def renamed(name: str) -> str:
            return rename_source_key(name, renamings, converters, model.base_model_prefix, known)[0]

    prefix = model.base_model_prefix
    for name in names:
        target = renamed(name)
        for candidate in (target, name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
            if candidate in known:
                yield name, candidate
                break


def _vocabulary_sizes(config: Any) -> set[int]:
    """Sizes of vocabularies, here and in nested configurations, that are no other size of the model."""
    found: dict[bool, set[int]] = {True: set(), False: set()}

    def collect(one: Any) -> None:
        for key, value in vars(one).items():
            if isinstance(value, int):
                found["vocab" in key].add(value)
            elif hasattr(value, "model_type"):
                collect(value)

    collect(config)
    return found[True] - found[False]


def _kind_of_parameter(owner: Any, holders: list[str], leaf: str, dimensions: int) -> str:
    """The kind by the classes of the module that has the parameter, and of those that hold that module."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    own = type(owner).__name__
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag) or re.search(r"Embeddings?(Table)?$", own):
        return "embedding"
    if _BIAS.search(leaf):
        return "bias"
    if re.search(r"Norm(\dd|Gated|alization)?$", own):
        return "norm"
    if leaf == "weight" and re.search(r"(Router|Gate|Gating)$", own):
        return "router"
    if isinstance(owner, nn.Linear) and any(re.search(r"(Router|Gating)$", holder) for holder in holders):
        return "router"
    if own == "Conv1D":
        return "transposed linear"
    if isinstance(owner, _ConvNd) or re.search(r"Conv(Transpose)?\d[dD]$", own):
        return "convolution"
    if isinstance(owner, nn.Linear) or own.endswith("Linear"):
        return "linear"
    if isinstance(owner, nn.RNNBase | nn.MultiheadAttention) and "weight" in leaf:
        return "linear"
    if own.endswith("Experts") and dimensions == 3:
        return "linear"
    if own.endswith("Head") and leaf == "weight":
        return "output layer"
    if own == "ParametrizationList" and leaf == "original1":
        return "convolution"
    if _MATRIX.fullmatch(leaf):
        return "linear"
    return "parameter"


def _limit_memory() -> None:
    """A configuration may ask for a billion layers: this process ends before the machine has no memory left."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES if hard < 0 else min(hard, _MEMORY_BYTES), hard))


def _answer() -> None:
    _limit_memory()
    asked = json.load(sys.stdin)
    transformers: Any = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    model = build_model(asked["config"])
    kinds = parameter_kinds(model)
    found = {name: kinds[target] for name, target in checkpoint_names(model, asked["names"]) if target in kinds}
    source = f"{type(model).__name__} of transformers {transformers.__version__}"
    sys.stdout.write("\n" + json.dumps({"source": source, "kinds": found}))


if __name__ == "__main__":
    _answer()
