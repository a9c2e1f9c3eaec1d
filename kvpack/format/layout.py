"""Constants and layouts of the format (docs/FORMAT.md §§3–7): the one place where each number is typed.

The CUDA sources receive these values as ``-D`` options, so nothing here is written a second time.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from kvpack.errors import LayoutError

MAGIC = 0x52414E53
VERSION = 1

TILE_ROWS = 256
GROUP_LANES = 32
CHUNK_COLS = 32
MAX_TILE_COLS = 2048
ALIGNMENT_BYTES = 16

PROBABILITY_BITS = 12
FREQUENCY_SUM = 1 << PROBABILITY_BITS
STATE_LOW = 1 << 16  # L: a state between two steps is never below it
NUM_SYMBOLS = 256
MAX_TABLES = 16
# A step takes at most 12 bits and a word has 16, so that up to 340 steps fit 255 words.
MAX_STEPS_U8_LENGTHS = 340

MAX_RAW_BITS = 24
OUTLIER_BYTES = 4
OUTLIER_ROW_SHIFT = 24  # below the row, column and delta share the bits
OUTLIER_LEAST_COL_BITS = 9

FLAG_TRANSPOSED = 1 << 0
FLAG_FOLDED = 1 << 2  # bit 1 is reserved for seeded states
KNOWN_FLAGS = FLAG_TRANSPOSED | FLAG_FOLDED

# Elements of a trellis (FORMAT.md §4.1): integers of two bits more must fit a signed byte.
TRELLIS_MAX_ELEMENT_BITS = 6
TRELLIS_EXTRA_BITS = 2
# An element of two bits may be across zero from its value, up to 1.75 steps off: outliers keep room for it.
TRELLIS_REACH_STEPS = 2


class ElementKind(IntEnum):
    """What number an element stands for (FORMAT.md §4)."""

    UNSIGNED = 0
    SIGNED = 1
    BF16 = 2
    FP16 = 3
    FP32 = 4
    FP8_E4M3 = 5
    FP8_E5M2 = 6

    @property
    def is_integer(self) -> bool:
        return self <= ElementKind.SIGNED


FLOAT_ELEMENT_BITS = {
    ElementKind.BF16: 16,
    ElementKind.FP16: 16,
    ElementKind.FP32: 32,
    ElementKind.FP8_E4M3: 8,
    ElementKind.FP8_E5M2: 8,
}


class TileMode(IntEnum):
    """How a tile is stored (FORMAT.md §7)."""

    RANS = 0
    RAW = 1
    CONSTANT = 2


class Predictor(IntEnum):
    """What is subtracted from an element before it is coded (FORMAT.md §5.3)."""

    NONE = 0
    PREVIOUS = 1


class Quantizer(IntEnum):
    """How elements become integers (FORMAT.md §§4, 4.1)."""

    SCALAR = 0
    TRELLIS = 1


class TableEncoding(IntEnum):
    """How frequency tables are written (FORMAT.md §5.1)."""

    PLAIN = 0
    PACKED = 1


@dataclass(frozen=True)
class Layout:
    """How elements of ``element_bits`` bits become symbols and raw bits.

    The high ``code_bits`` are the code; ``codes_per_symbol`` codes make a symbol; the rest is stored raw. A ``folded``
    code is 0 where the raw bits alone say what the integer is, and the same for an integer and its complement: the sign
    is among the raw bits, where it costs what it is worth. With the ``quantizer`` TRELLIS an element stands for one of
    two integers; those above it in its column say which (FORMAT.md §4.1).

    Raises:
        LayoutError: for a combination that FORMAT.md §§3–4 calls illegal.
    """

    element_kind: ElementKind
    element_bits: int
    code_bits: int
    codes_per_symbol: int
    folded: bool = False
    quantizer: Quantizer = Quantizer.SCALAR

    def __post_init__(self) -> None:
        if self.element_kind.is_integer:
            if not 2 <= self.element_bits <= 8:
                raise LayoutError(f"element_bits is {self.element_bits}; {self.element_kind.name} elements have 2 to 8")
        elif self.element_bits != FLOAT_ELEMENT_BITS[self.element_kind]:
            raise LayoutError(
                f"element_bits is {self.element_bits}; {self.element_kind.name} elements have "
                f"{FLOAT_ELEMENT_BITS[self.element_kind]}"
            )
        if self.folded and self.element_kind != ElementKind.SIGNED:
            raise LayoutError(f"codes of {self.element_kind.name} elements are folded; those of SIGNED ones can be")
        if self.quantizer == Quantizer.TRELLIS and not self.folded:
            raise LayoutError("elements of a trellis have folded codes")
        if self.quantizer == Quantizer.TRELLIS and self.element_bits > TRELLIS_MAX_ELEMENT_BITS:
            raise LayoutError(
                f"element_bits is {self.element_bits}; elements of a trellis have 2 to {TRELLIS_MAX_ELEMENT_BITS}"
            )
        # A folded code needs a raw bit to be folded by.
        low, high = (1, self.element_bits - 1) if self.folded else (2, min(8, self.element_bits))
        if not low <= self.code_bits <= high:
            raise LayoutError(
                f"code_bits is {self.code_bits}; legal for {self.element_bits}-bit elements"
                f"{' with folded codes' if self.folded else ''} is {low} to {high}"
            )
        if self.codes_per_symbol not in (1, 2, 4, 8):
            raise LayoutError(f"codes_per_symbol is {self.codes_per_symbol}; legal is 1, 2, 4 or 8")
        if self.codes_per_symbol * self.code_bits > 8:
            raise LayoutError(f"{self.codes_per_symbol} codes of {self.code_bits} bits do not fit one byte")
        if self.codes_per_symbol > 1 and self.element_bits > 8:
            raise LayoutError(
                f"codes_per_symbol is {self.codes_per_symbol}; legal for {self.element_bits}-bit elements is 1"
            )
        if self.raw_bits > MAX_RAW_BITS:
            raise LayoutError(f"raw_bits is {self.raw_bits}; at most {MAX_RAW_BITS} are legal")

    @property
    def raw_bits(self) -> int:
        return self.element_bits - self.code_bits

    @property
    def integer_bits(self) -> int:
        """Bits of the integers that elements of an integer kind stand for, outliers aside."""
        return self.element_bits + (TRELLIS_EXTRA_BITS if self.quantizer == Quantizer.TRELLIS else 0)

    @property
    def parameters(self) -> tuple[int, int, int, bool]:
        """What compiled loops are given: code_bits, codes_per_symbol, raw_bits, folded."""
        return self.code_bits, self.codes_per_symbol, self.raw_bits, self.folded

    def codes(self, elements: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The codes of unsigned elements (FORMAT.md §4).

        >>> Layout(ElementKind.SIGNED, 4, 2, 4, folded=True).codes(np.arange(16)).tolist()
        [2, 2, 1, 1, 3, 3, 0, 0, 0, 0, 3, 3, 1, 1, 2, 2]
        """
        if not self.folded:
            return np.asarray(elements >> self.raw_bits)
        turned = elements ^ (1 << (self.element_bits - 1))
        top = turned >> (self.raw_bits - 1) & 1
        return np.asarray(turned >> self.raw_bits ^ top * ((1 << self.code_bits) - 1))

    @property
    def alphabet_size(self) -> int:
        """Symbols that can occur: 2^(codes_per_symbol · code_bits)."""
        return 1 << (self.codes_per_symbol * self.code_bits)

    @property
    def name(self) -> str:
        """The writer's name for this layout, or ``custom``."""
        if not self.element_kind.is_integer:
            return "lossless"
        for name in LAYOUT_NAMES:
            if self in integer_layouts(name, self.element_kind, self.element_bits, self.quantizer):
                return name
        return "custom"


LAYOUT_NAMES = ("balanced", "fast", "compact")


def integer_layout(name: str, element_kind: ElementKind, element_bits: int) -> Layout:
    """The named layout (``compact``, ``balanced`` or ``fast``) for integers of ``element_bits`` bits (FORMAT.md §4).

    >>> integer_layout("balanced", ElementKind.SIGNED, 5)
    Layout(element_kind=<ElementKind.SIGNED: 1>, element_bits=5, code_bits=2, codes_per_symbol=4, folded=True, \
quantizer=<Quantizer.SCALAR: 0>)
    """
    signed = element_kind == ElementKind.SIGNED
    match name:
        case "compact":
            return Layout(element_kind, element_bits, element_bits, 1)
        case "balanced" if signed and element_bits >= 4:
            return Layout(element_kind, element_bits, 2, 4, folded=True)
        case "balanced" if element_bits >= 3:
            return Layout(element_kind, element_bits, min(4, element_bits), 2)
        case "fast" if signed:
            return Layout(element_kind, element_bits, 1, 8, folded=True)
        case "balanced" | "fast":
            return Layout(element_kind, element_bits, 2, 4)
    raise ValueError(f"unknown layout {name!r}; there are {', '.join(LAYOUT_NAMES)}")


def integer_layouts(
    name: str, element_kind: ElementKind, element_bits: int, quantizer: Quantizer = Quantizer.SCALAR
) -> tuple[Layout, ...]:
    """All layouts of a name, the quickest (and usual) one first.

    ``balanced`` has a second one, for integers whose range is given and much wider than most of them: a folded code
    would be 0 for nearly all, and their raw bits far from even. That of a trellis has codes of three bits, for low
    rates.
    """
    if quantizer == Quantizer.TRELLIS:
        return _trellis_layouts(name, element_kind, element_bits)
    first = integer_layout(name, element_kind, element_bits)
    if name == "balanced" and first.folded:
        return first, Layout(element_kind, element_bits, 4, 2)
    return (first,)


def _trellis_layouts(name: str, element_kind: ElementKind, element_bits: int) -> tuple[Layout, ...]:
    def layout(code_bits: int, codes_per_symbol: int) -> Layout:
        return Layout(element_kind, element_bits, code_bits, codes_per_symbol, True, Quantizer.TRELLIS)

    match name:
        case "compact":
            return (layout(element_bits - 1, 1),)
        case "balanced" if element_bits == 4:
            return layout(2, 4), layout(3, 2)
        case "balanced" if element_bits >= 3:
            return (layout(2, 4),)
        case "balanced" | "fast":
            return (layout(1, 8),)
    raise ValueError(f"unknown layout {name!r}; there are {', '.join(LAYOUT_NAMES)}")


def float_layouts(element_kind: ElementKind) -> tuple[Layout, ...]:
    """The layouts a writer may choose from for a lossless float tensor, most usual first."""
    match element_kind:
        case ElementKind.BF16 | ElementKind.FP32:
            return (Layout(element_kind, FLOAT_ELEMENT_BITS[element_kind], 8, 1),)
        case ElementKind.FP16:
            return tuple(Layout(element_kind, 16, c, 1) for c in (5, 6, 7, 8))
        case ElementKind.FP8_E4M3:
            return (Layout(element_kind, 8, 4, 2),)
        case ElementKind.FP8_E5M2:
            return (Layout(element_kind, 8, 5, 1),)
    raise ValueError(f"{element_kind.name} is no float kind")


def outlier_delta_bits(tile_cols: int) -> int:
    """Bits of an outlier's delta: what the row, and a column of a tile so long, leave (FORMAT.md §7.5).

    >>> [outlier_delta_bits(tile_cols) for tile_cols in (32, 512, 544, 1024, 1056, 2048)]
    [15, 15, 14, 14, 13, 13]
    """
    return OUTLIER_ROW_SHIFT - max(OUTLIER_LEAST_COL_BITS, (tile_cols - 1).bit_length())


def outlier_delta_max(tile_cols: int) -> int:
    """The largest delta of an outlier; the least one is −1 minus that.

    >>> [outlier_delta_max(tile_cols) for tile_cols in (512, 1024, 2048)]
    [16383, 8191, 4095]
    """
    return (1 << (outlier_delta_bits(tile_cols) - 1)) - 1


def align(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)
