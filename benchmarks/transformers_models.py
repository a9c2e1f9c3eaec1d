"""Which of transformers' causal models load coded: writes docs/results/transformers-models.md.

    python benchmarks/transformers_models.py [--only llama,gpt2] [--output FILE]

Each model is made on the meta device from its default config with fewer layers, and its checkpoint's names and shapes
are what ``save_pretrained`` would write. What kvpack's loader plans for such a checkpoint, with all matrices coded, is
counted: no weights are made, read or multiplied.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from kvpack.integrations.transformers_names import transformers_names
from kvpack.runtime.weights.replace import places_of, tied_groups

LAYERS = 4
TARGET = Path(__file__).parents[1] / "docs" / "results" / "transformers-models.md"
_FEWER = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")


def small(config: Any) -> Any:
    """The config with few layers, where it says how many of what kind in a list too."""
    for one in {id(part): part for part in (config, config.get_text_config())}.values():
        for key in _FEWER:
            if isinstance(getattr(one, key, None), int) and getattr(one, key) > LAYERS:
                setattr(one, key, LAYERS)
        for key in ("layer_types", "layers_block_type", "mlp_layer_types", "attention_types"):
            if isinstance(getattr(one, key, None), list) and len(getattr(one, key)) > LAYERS:
                setattr(one, key, getattr(one, key)[:LAYERS])
    return config


def planned(config_class: type, model_class: type) -> tuple[int, int, Counter[str]]:
    """Weights in matrices that stay coded; all weights in matrices; class of module → weights that are decoded."""
    with torch.device("meta"):
        model: Any = model_class(small(config_class()))
    checkpoint = revert_weight_conversion(model, model.state_dict())
    names = transformers_names(model, {name: tuple(tensor.shape) for name, tensor in checkpoint.items()})
    assert names is not None
    coded, total, decoded = 0, 0, Counter[str]()
    makers = {target: one for one in names.conversions for target in one.shapes}
    for group in tied_groups(places_of(model, names)):
        place = group[0]
        if place.tensor.ndim < 2:
            continue
        size = math.prod(place.tensor.shape)
        kinds = {type(one.module).__name__ for one in group}
        total += size
        maker = next((makers[name] for name in place.names if name in makers), None)
        if maker.experts is not None if maker is not None else all(one.is_linear_weight for one in group):
            coded += size
        else:
            decoded[" and ".join(sorted(kinds))] += size
    return coded, total, decoded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--output", type=Path, default=TARGET)
    options = parser.parse_args()
    only = set(filter(None, options.only.split(",")))
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    rows, reasons = [], Counter[str]()
    for config_class in sorted(MODEL_FOR_CAUSAL_LM_MAPPING, key=lambda found: str(found.model_type)):
        if only and config_class.model_type not in only:
            continue
        classes = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
        model_class = classes[0] if isinstance(classes, tuple) else classes
        try:
            coded, total, decoded = planned(config_class, model_class)
        except Exception as error:
            first = str(error).splitlines()[0][:110] if str(error) else ""
            rows.append(f"| {config_class.model_type} | no | | {type(error).__name__}: {first} |".replace("|.", "."))
            reasons["not planned"] += 1
            continue
        what = ", ".join(f"{kind} {share / total:.0%}" for kind, share in decoded.most_common(4))
        answer = "yes" if coded else "decoded"
        reasons[answer] += 1
        rows.append(f"| {config_class.model_type} | {answer} | {coded / total:.0%} | {what} |")
    counts = ", ".join(f"{what}: {count}" for what, count in reasons.most_common())
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(
        f"""# Causal models of transformers

`benchmarks/transformers_models.py` wrote this page, with transformers {transformers.__version__}. Each model is made
on the meta device from its default config with at most {LAYERS} layers. The page says what `from_pretrained` keeps
coded of a checkpoint whose matrices are all coded: "coded" is the share of the weights in matrices that multiply coded.
Others are decoded when the model is loaded, and take the memory that they take in the original; the last column says
which modules hold them. `compress` leaves embeddings and heads as they are by default. A model that is not planned has
no default config that makes a model with few layers, or kvpack refuses it; the error is quoted.

{counts}.

| model type | loads | coded | not coded, or why not |
|---|---|---|---|
"""
        + "\n".join(rows)
        + "\n",
        encoding="utf-8",
    )
    print(counts)


if __name__ == "__main__":
    main()
