"""What the tensors of transformers' architectures are, by their module trees and by their names alone.

    python benchmarks/tensor_kinds.py survey              # builds them all, writes tests/data/tensor_kinds.json
    python benchmarks/tensor_kinds.py compare [-o RESULTS]  # the table of names against the survey

The survey builds each architecture from its default configuration on the meta device, turns its names into those of
checkpoints as ``save_pretrained`` does, and asks the tree what each tensor is, from the checkpoint's name on, as
``kvpack.compress`` does. Layers' numbers become N. Tensors with one dimension or fewer than 4096 elements are left out:
they are kept whatever they are.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from bench_common import provenance, write_result

from kvpack.encode.selection import MIN_ELEMENTS
from kvpack.encode.tensor_kinds import Kind, kind_of_name

ROOT = Path(__file__).resolve().parents[1]
SURVEY = ROOT / "tests" / "data" / "tensor_kinds.json"
_BUILD_S = 60
# What default configurations leave open.
_HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
_SETTINGS: dict[str, dict[str, Any]] = {
    "dots1": {"n_shared_experts": 2, "n_routed_experts": 64},
    "hunyuan_v1_dense": _HEADS,
    "hunyuan_v1_moe": {**_HEADS, "num_experts": 16, "moe_topk": 1},
    "hunyuan_vl_text": _HEADS,
    "ministral": _HEADS,
    "nemotron": _HEADS,
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "reformer": {"is_decoder": True},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
}
_LAYER = re.compile(r"(?<![^.])\d+(?![^.])")


def architectures() -> list[tuple[str, str, str]]:
    """Group, model type and class: the first of these that a model type has."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto as auto

    groups = [
        ("causal language models", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("image and text to text", auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
        ("masked language models", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
        ("sequence to sequence", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        ("speech", auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES),
        ("speech", auto.MODEL_FOR_CTC_MAPPING_NAMES),
        ("images", auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
        ("others", auto.MODEL_MAPPING_NAMES),
    ]
    found = []
    for model_type in CONFIG_MAPPING:
        for group, names in groups:
            if name := names.get(model_type):
                found.append((group, model_type, name if isinstance(name, str) else name[0]))
                break
    return found


def tensors_of(model_type: str, name: str) -> tuple[dict[tuple[str, str], list[int]], int]:
    """(name, kind) → shape of an architecture's tensors, layers' numbers collapsed; and how many the tree lacks."""
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    from kvpack.integrations.module_tree import build_model, checkpoint_names, parameter_kinds

    configuration_class = getattr(transformers, name).config_class or transformers.CONFIG_MAPPING[model_type]
    config = configuration_class(**_SETTINGS.get(configuration_class.model_type, {}))
    values = {**config.to_dict(), "model_type": configuration_class.model_type, "architectures": [name]}
    model = build_model(values)
    kinds = parameter_kinds(model)
    tied = set(model.all_tied_weights_keys) if hasattr(model, "all_tied_weights_keys") else set()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state = {name: tensor for name, tensor in model.state_dict().items() if name in parameters and name not in tied}
    shapes = {name: list(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}
    shapes = {n: s for n, s in shapes.items() if len(s) > 1 and math.prod(s) >= MIN_ELEMENTS}
    targets = dict(checkpoint_names(model, list(shapes)))
    found = {(_LAYER.sub("N", stored), kinds[target]): shapes[stored] for stored, target in targets.items()}
    return found, len({_LAYER.sub("N", stored) for stored in shapes if stored not in targets})


def survey(output: Path) -> None:
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"more than {_BUILD_S} s")

    signal.signal(signal.SIGALRM, too_long)
    numbers: dict[tuple[str, str, int, bool], int] = {}
    rows: list[list[Any]] = []
    built: dict[str, list[Any]] = {}
    not_built: dict[str, str] = {}
    for group, model_type, name in architectures():
        signal.alarm(_BUILD_S)
        try:
            tensors, lacking = tensors_of(model_type, name)
        except Exception as error:
            said = (str(error).strip().splitlines() or [""])[0]
            not_built[model_type] = f"{type(error).__name__}: {said[:60]}"
            continue
        finally:
            signal.alarm(0)
        own = set()
        for (stored, kind), shape in tensors.items():
            key = (stored, kind, len(shape), shape[-2] < shape[-1])
            if key not in numbers:
                numbers[key] = len(rows)
                rows.append([stored, shape, list(Kind).index(Kind(kind))])
            own.add(numbers[key])
        built[model_type] = [group, lacking, sorted(own)]
        print(f"{model_type}: {len(own)}", file=sys.stderr)
    write_survey(output, transformers.__version__, rows, built, not_built)
    print(f"{len(built)} architectures, {len(rows)} names; not built: {len(not_built)}")


def write_survey(
    output: Path, version: str, rows: list[list[Any]], built: dict[str, list[Any]], not_built: dict[str, str]
) -> None:
    """A line for each name and for each architecture, and numbers as ranges, so that changes can be read."""

    def ranges(values: list[int]) -> list[Any]:
        found: list[list[int]] = []
        for value in values:
            if found and found[-1][1] == value - 1:
                found[-1][1] = value
            else:
                found.append([value, value])
        return [first if first == last else [first, last] for first, last in found]

    def dump(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"))

    lines = [f'{{"transformers":{dump(version)},"kinds":{dump(list(Kind))},"tensors":[']
    lines.append(",\n".join(map(dump, rows)))
    lines.append('],"architectures":{')
    lines.append(
        ",\n".join(f"{dump(n)}:{dump([group, lacking, ranges(own)])}" for n, (group, lacking, own) in built.items())
    )
    lines.append(f'}},"not built":{dump(not_built)}}}')
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")


class Architecture(NamedTuple):
    """Its group, how many of its tensors' names the tree lacks, and name, shape and kind of the others."""

    group: str
    lacking: int
    tensors: list[tuple[str, tuple[int, ...], Kind]]


def read_survey(path: Path = SURVEY) -> tuple[str, dict[str, Architecture]]:
    """The version of transformers, and model type → what the survey found."""
    value = json.loads(path.read_text(encoding="utf-8"))
    tensors = [(name, tuple(shape), Kind(value["kinds"][kind])) for name, shape, kind in value["tensors"]]
    found = {}
    for model_type, (group, lacking, spans) in value["architectures"].items():
        numbers = [n for span in spans for n in (range(span[0], span[1] + 1) if isinstance(span, list) else [span])]
        found[model_type] = Architecture(group, lacking, [tensors[number] for number in numbers])
    return value["transformers"], found


def judge(tensors: list[tuple[str, tuple[int, ...], Kind]]) -> Counter[str]:
    """How many tensors the table of names judges right, and in which way the others are wrong."""
    counts: Counter[str] = Counter()
    for name, shape, kind in tensors:
        by_name = kind_of_name(name.replace(".N", ".0"), shape)
        counts["tensors"] += 1
        counts["sure"] += by_name.is_sure
        if by_name.kind.is_coded == kind.is_coded:
            counts["right"] += 1
        else:
            counts["kept, though linear" if kind.is_coded else "coded, though to be kept"] += 1
            counts["sure, and wrong"] += by_name.is_sure
    return counts


def compare(output: Path | None, *, verbose: bool) -> None:
    version, surveyed = read_survey()
    groups: dict[str, Counter[str]] = {}
    for model_type, (group, lacking, tensors) in surveyed.items():
        counts = judge(tensors)
        total = groups.setdefault(group, Counter())
        total.update(counts)
        total["architectures"] += 1
        total["not in the tree"] += lacking
        total["architectures all right"] += counts["right"] == counts["tensors"]
        if verbose:
            for name, shape, kind in tensors:
                by_name = kind_of_name(name.replace(".N", ".0"), shape)
                if by_name.kind.is_coded != kind.is_coded:
                    print(model_type, name, shape, kind, "by name", by_name.kind, "SURE" if by_name.is_sure else "")
    columns = ["architectures", "architectures all right", "tensors", "not in the tree", "right", "kept, though linear",
               "coded, though to be kept", "sure", "sure, and wrong"]  # fmt: skip
    rows = [{"group": group, **{column: counts[column] for column in columns}} for group, counts in groups.items()]
    for row in rows:
        print("; ".join(f"{key} {value}" for key, value in row.items()))
    if output is not None:
        write_result(output, {"what": "tensor-kinds", **provenance({}), "transformers": version, "rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("survey")
    command.add_argument("-o", "--output", type=Path, default=SURVEY)
    command = commands.add_parser("compare")
    command.add_argument("-o", "--output", type=Path)
    command.add_argument("-v", "--verbose", action="store_true", help="each tensor that its name misjudges")
    arguments = parser.parse_args()
    if arguments.command == "survey":
        survey(arguments.output)
    else:
        compare(arguments.output, verbose=arguments.verbose)


if __name__ == "__main__":
    main()
