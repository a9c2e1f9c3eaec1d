"""Which tensors of a model are coded, and how: by name, shape and dtype, with the user's patterns on top."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from kvpack.encode.dtypes import LOSSLESS_KINDS, LOSSY_DTYPES, NARROW_DTYPES
from kvpack.encode.quant_config import QuantConfig
from kvpack.encode.rates import LOSSLESS
from kvpack.format.container import StoredTensor

MIN_ELEMENTS = 4096
# Output layers count as embeddings: they share their sensitivity, and often their storage.
_EMBEDDING = re.compile(
    r"(^|[._])(embed\w*|wte|wpe|(tok|pos)_emb\w*|(word|position)_embeddings?|lm_head|shared|rotary\w*)([._]|$)",
    re.IGNORECASE,
)
_NORM = re.compile(r"(^|[._])(\w*norm\w*|ln_\w+|ln\d*)([._]|$)", re.IGNORECASE)
_CONV1D = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)\.weight$")


@dataclass(frozen=True)
class Selection:
    """What the user asked for.

    ``bits`` is the rate, or None with a ``preset``. ``include`` codes what would
    be kept, ``exclude`` keeps what would be coded and wins. ``tensor_bits`` gives names that match a
    rate of their own.
    """

    bits: float | None = None
    preset: str | None = None
    include: re.Pattern[str] | None = None
    exclude: re.Pattern[str] | None = None
    tensor_bits: tuple[tuple[re.Pattern[str], float | str], ...] = field(default=())

    @classmethod
    def from_config(cls, config: QuantConfig) -> Selection:
        """What the options say of tensors; ``config`` has checked the patterns."""
        return cls(
            bits=config.bits,
            preset=config.preset,
            include=None if config.include is None else re.compile(config.include),
            exclude=None if config.exclude is None else re.compile(config.exclude),
            tensor_bits=tuple((re.compile(pattern), bits) for pattern, bits in config.tensor_bits.items()),
        )

    def patterns(self) -> list[tuple[str, re.Pattern[str]]]:
        """All patterns with the options that they came from."""
        found = [("include", self.include), ("exclude", self.exclude)]
        found += [("tensor_bits", pattern) for pattern, _ in self.tensor_bits]
        return [(option, pattern) for option, pattern in found if pattern is not None]

    @property
    def lossless(self) -> bool:
        """Whether all that has no rate of its own is coded exactly."""
        return self.preset == LOSSLESS

    def quality_of(self, name: str) -> float | str:
        """The rate of a tensor, or a preset's name; the last matching ``tensor_bits`` counts."""
        for pattern, bits in reversed(self.tensor_bits):
            if pattern.search(name):
                return bits
        quality = self.preset if self.bits is None else self.bits
        assert quality is not None
        return quality

    def has_own_rate(self, name: str) -> bool:
        """Whether a pattern of ``tensor_bits`` matches."""
        return any(pattern.search(name) for pattern, _ in self.tensor_bits)

    def reason_to_keep(self, tensor: StoredTensor) -> str | None:
        """Why a tensor is stored as it is, or None if it is coded."""
        name, shape = tensor.name, tensor.shape
        if tensor.dtype not in LOSSLESS_KINDS:
            return f"dtype {tensor.dtype}"
        elements = 1
        for size in shape:
            elements *= size
        if elements == 0:
            return "empty"
        if len(shape) < 2:
            return f"{len(shape)}-D"
        if self.exclude and self.exclude.search(name):
            return "excluded"
        if (self.include and self.include.search(name)) or self.has_own_rate(name):
            return None
        if elements < MIN_ELEMENTS:
            return f"small ({elements} elements)"
        if self.lossless:
            return None
        if _EMBEDDING.search(name):
            return "embedding"
        if _NORM.search(name):
            return "norm"
        return None

    def is_lossy(self, tensor: StoredTensor) -> bool:
        """Whether a coded tensor is quantized; what is quantized already is recoded losslessly."""
        if tensor.dtype in NARROW_DTYPES:
            return False
        return tensor.dtype in LOSSY_DTYPES and self.quality_of(tensor.name) != LOSSLESS


def transposed_names(tensors: dict[str, StoredTensor], model_type: str | None) -> set[str]:
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
