"""Which tensors of a model are coded, and how: by what they are, with the user's patterns on top."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvpack.encode.dtypes import LOSSLESS_KINDS, LOSSY_DTYPES, NARROW_DTYPES
from kvpack.encode.listing import listed
from kvpack.encode.other_quantization import quantization_parts
from kvpack.encode.quant_config import KEEP, QuantConfig, pattern_list
from kvpack.encode.rates import LOSSLESS
from kvpack.encode.tensor_kinds import Kind, ModuleTree, NoModuleTreeError, has_row_for_each_token, kind_of_name
from kvpack.format.container import StoredTensor

MIN_ELEMENTS = 4096
# Why scales and the like are kept; which quantization it is follows.
OTHER_QUANTIZATION = "another quantization"
# How many tensors a note names.
_SHOWN, _MORE = 3, "more tensors"
_CONV1D = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)\.weight$")


@dataclass(frozen=True)
class Selection:
    """What the user asked for.

    ``bits`` is the rate, or None with a ``preset``. ``include`` codes what would
    be kept, ``exclude`` keeps what would be coded and wins; of several patterns each counts. ``tensor_bits`` gives
    names that match a rate of their own. Patterns see ``prefix`` and the tensor's name: where in a directory it is.
    ``embeddings`` is what becomes of embeddings of tokens and output layers: see :class:`QuantConfig`.
    """

    bits: float | None = None
    preset: str | None = None
    include: tuple[re.Pattern[str], ...] = ()
    exclude: tuple[re.Pattern[str], ...] = ()
    tensor_bits: tuple[tuple[re.Pattern[str], float | str], ...] = field(default=())
    embeddings: float | str = KEEP
    prefix: str = ""

    @classmethod
    def from_config(cls, config: QuantConfig) -> Selection:
        """What the options say of tensors; ``config`` has checked the patterns."""
        return cls(
            bits=config.bits,
            preset=config.preset,
            include=tuple(map(re.compile, pattern_list(config.include))),
            exclude=tuple(map(re.compile, pattern_list(config.exclude))),
            tensor_bits=tuple((re.compile(pattern), bits) for pattern, bits in config.tensor_bits.items()),
            embeddings=config.embeddings,
        )

    def patterns(self) -> list[tuple[str, re.Pattern[str]]]:
        """All patterns with the options that they came from."""
        found = [("include", pattern) for pattern in self.include]
        found += [("exclude", pattern) for pattern in self.exclude]
        return found + [("tensor_bits", pattern) for pattern, _ in self.tensor_bits]

    @property
    def lossless(self) -> bool:
        """Whether all that has no rate of its own is coded exactly."""
        return self.preset == LOSSLESS

    def quality_of(self, tensor: StoredTensor, kinds: TensorKinds) -> float | str:
        """The rate of a tensor, or a preset's name; the last matching ``tensor_bits`` counts, then ``embeddings``."""
        for pattern, bits in reversed(self.tensor_bits):
            if pattern.search(self.prefix + tensor.name):
                return bits
        if not isinstance(self.embeddings, str) and kinds.has_row_for_each_token(tensor):
            return self.embeddings
        quality = self.preset if self.bits is None else self.bits
        assert quality is not None
        return quality

    def has_own_rate(self, name: str) -> bool:
        """Whether a pattern of ``tensor_bits`` matches."""
        return any(pattern.search(self.prefix + name) for pattern, _ in self.tensor_bits)

    def reason_to_keep(self, tensor: StoredTensor, kinds: TensorKinds) -> str | None:
        """Why a tensor is stored as it is, or None if it is coded."""
        name, shape = tensor.name, tensor.shape
        elements = math.prod(shape)
        asked_for = _matches(self.include, self.prefix + name) or self.has_own_rate(name)
        can_be_coded = tensor.dtype in LOSSLESS_KINDS and len(shape) > 1 and elements > 0
        if name in kinds.part_of and not (can_be_coded and (self.lossless or asked_for)):
            return f"{OTHER_QUANTIZATION}: {kinds.part_of[name]}"
        if tensor.dtype not in LOSSLESS_KINDS:
            return f"dtype {tensor.dtype}"
        if elements == 0:
            return "empty"
        if len(shape) < 2:
            return f"{len(shape)}-D"
        if _matches(self.exclude, self.prefix + name):
            return "excluded"
        if asked_for:
            return None
        if elements < MIN_ELEMENTS:
            return f"small ({elements} elements)"
        if self.lossless or tensor.dtype in NARROW_DTYPES:
            return None
        kind = kinds.kind_of(tensor)
        if kind.is_coded or (self.embeddings != KEEP and kinds.has_row_for_each_token(tensor)):
            return None
        # Output layers count as embeddings: they share their sensitivity, and often their storage.
        return "embedding" if kind is Kind.OUTPUT else str(kind)

    def is_lossy(self, tensor: StoredTensor, kinds: TensorKinds) -> bool:
        """Whether a coded tensor is quantized; what is quantized already is recoded losslessly, whoever asks."""
        if tensor.dtype in NARROW_DTYPES or tensor.name in kinds.part_of:
            return False
        return tensor.dtype in LOSSY_DTYPES and self.quality_of(tensor, kinds) != LOSSLESS


def _matches(patterns: Iterable[re.Pattern[str]], name: str) -> bool:
    return any(pattern.search(name) for pattern in patterns)


@dataclass(frozen=True)
class TensorKinds:
    """What the tensors of a model are.

    ``by_tree`` holds the kinds that a module tree says, for the others their names do; ``part_of`` names the other
    quantization that a tensor belongs to; ``transposed`` are weights stored inputs x outputs; ``notes`` are sentences
    for the user on how all this was found out.
    """

    by_tree: Mapping[str, Kind]
    part_of: Mapping[str, str]
    transposed: frozenset[str]
    notes: tuple[str, ...]

    def kind_of(self, tensor: StoredTensor) -> Kind:
        """What a tensor of two or more dimensions is."""
        return self.by_tree.get(tensor.name) or kind_of_name(tensor.name, tensor.shape).kind

    def has_row_for_each_token(self, tensor: StoredTensor) -> bool:
        """Whether it is a matrix with a row for each token of a vocabulary, as embeddings and output layers are."""
        if len(tensor.shape) != 2 or tensor.name in self.transposed:
            return False
        return has_row_for_each_token(tensor.name, self.kind_of(tensor), tensor.shape)

    @classmethod
    def of(
        cls, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], module_tree: ModuleTree | None
    ) -> TensorKinds:
        """Find out; ``config`` is what config.json says, {} if there is none.

        The module tree is asked where a name leaves doubt, as it takes seconds: the survey of tests/data shows that it
        never says anything else where the table of names is sure.
        """
        part_of = quantization_parts(tensors, config)
        transposed = transposed_names(tensors, config.get("model_type"))
        notes = []
        by_tree: dict[str, Kind] = {}
        doubtful = [
            name
            for name, tensor in tensors.items()
            if len(tensor.shape) > 1
            and math.prod(tensor.shape) >= MIN_ELEMENTS
            and tensor.dtype in LOSSY_DTYPES
            and name not in part_of
            and name not in transposed
            and not kind_of_name(name, tensor.shape).is_sure
        ]
        if doubtful and module_tree is not None and isinstance(config.get("model_type"), str):
            judged = (
                f"what {listed(doubtful, _SHOWN, 'more tensors')} {'is' if len(doubtful) == 1 else 'are'}, is judged by"
            )
            try:
                source, found = module_tree(config, list(tensors))
            except NoModuleTreeError as error:
                notes.append(f"{judged} names alone: {error}")
            else:
                by_tree = {name: Kind(kind) for name, kind in found.items()}
                transposed = {name for name in transposed if name not in by_tree}
                transposed |= {name for name, kind in by_tree.items() if kind is Kind.TRANSPOSED}
                notes.append(f"{judged} the modules of {source}")
                if missing := [name for name in doubtful if name not in by_tree]:
                    notes.append(f"it has no {listed(missing, _SHOWN, 'more tensors')}: judged by names alone")
        return cls(by_tree, part_of, frozenset(transposed), tuple(notes))


def quantization_notes(reasons: Iterable[str | None]) -> list[str]:
    """A sentence for each other quantization that tensors were kept for."""
    start = f"{OTHER_QUANTIZATION}: "
    counts = Counter(reason.removeprefix(start) for reason in reasons if reason and reason.startswith(start))
    return [
        f"kept: {count} {'tensor' if count == 1 else 'tensors'} of "
        f"{'an' if method[:1] in 'aeiou' else 'a'} {method} quantization"
        for method, count in sorted(counts.items())
    ]


def transposed_names(tensors: Mapping[str, StoredTensor], model_type: str | None) -> set[str]:
    """Weights stored as inputs × outputs (GPT-2's Conv1D).

    They are recognised by name, and believed if the model says that it is of that family or if a sibling's
    bias has the length of the second dimension and not of the first.
    """
    named = {name for name, t in tensors.items() if _CONV1D.search(name) and len(t.shape) == 2}
    if model_type in {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}:
        return named
    for name in named:
        rows, cols = tensors[name].shape
        bias = tensors.get(name.removesuffix("weight") + "bias")
        if bias is not None and rows != cols and bias.shape == (cols,):
            return named
    return set()
