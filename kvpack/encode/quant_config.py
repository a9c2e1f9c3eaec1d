"""How to compress: every option that decides what the output's weights are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from kvpack.encode.model_config import CONFIG_NAME, written_options
from kvpack.encode.rates import DEFAULT_BITS, LOSSLESS, MAX_ASKED_BITS, MAX_BITS, MIN_BITS
from kvpack.errors import InputError
from kvpack.format.layout import CHUNK_COLS, LAYOUT_NAMES, MAX_TILE_COLS

PRESETS = ("near-lossless", "int8-row", LOSSLESS)
LAYOUTS = ("auto", *LAYOUT_NAMES)
QUANTIZERS = ("scalar", "trellis")
ALLOCATIONS = ("auto", "tensor", "model", "sensitivity")
# What becomes of embeddings and output layers, if they have no rate of their own.
KEEP, CODE = "keep", "code"


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Options of a compression. Where it runs and where the output goes are arguments of :func:`kvpack.compress`.

    >>> config = QuantConfig(bits=4.25, exclude="lm_head", tensor_bits={"down_proj": 5})
    >>> QuantConfig.from_json(config.to_json()) == config
    True
    >>> QuantConfig(preset="lossless").bits is None
    True
    >>> QuantConfig(bits=1)
    Traceback (most recent call last):
    kvpack.errors.InputError: 1 bits a weight: rates from 1.5 to 32 are possible, above 7.5 exactly where that fits

    ``tensor_bits`` is the one place where a user says what differs between tensors.

    Attributes:
        bits: bits a weight, 1.5 to 32, every overhead counted. Without a preset 4.85 by default; None with one.
            Weights are quantized at no more than 7.5: with a higher rate tensors whose exact coding fits it are coded
            exactly, the others at 7.5.
        preset: instead of a rate ``near-lossless`` (a noise of −41.5 dB of the variance), ``int8-row`` (INT8 with a
            scale for each row) or ``lossless``.
        layout: how weights become symbols: ``auto``, ``balanced``, ``fast`` or ``compact`` (FORMAT.md §4).
        quantizer: ``scalar`` rounds each weight; ``trellis`` chooses those of a column together (FORMAT.md §4.1), for a
            sixth less noise at the same rate. It takes a rate, of up to 5.25 bits, and without moments from 2.25 bits
            on; what is coded otherwise is rounded.
        tile_cols: columns of a tile, a multiple of 32 up to 2048; None: equal parts, longer ones in larger matrices.
        tensor_parallel: how many devices will share the weights: tiles end where the parts of layers do that are split
            by their inputs, so that a part needs no coding of its own. 1: tiles are chosen without.
        stack: give q, k and v, and gate and up, of a layer the same tiles and tables, so that one launch multiplies
            them when they are stacked. They are coded twice, and are a little noisier.
        allocation: ``tensor`` gives each tensor the rate, ``model`` all tensors one step, ``sensitivity`` each the step
            that moments of the model's activations ask for. ``auto``: that with moments that have sensitivities, else
            ``tensor``.
        include: a regular expression, or several; tensors that would be kept as they are, are coded if one of them is
            found in their names. One is held as text, several as a tuple (in JSON a list).
        exclude: the same for names to keep; it wins over all others.
        tensor_bits: regular expression → rate, or ``"lossless"``, of the tensors in whose names it is found; the last
            match counts.
        embeddings: embeddings of tokens and output layers: ``keep`` stores them as they are, ``code`` codes them at the
            rate of all (with steps by sensitivity: they share that of all), a number at a rate of their own. Coded at a
            rate, each row has a scale. Those of positions are kept.
        dequantize_fp8: code the weights that fp8 numbers and their scales stand for, as bf16, and drop the scales;
            otherwise fp8 numbers are coded exactly. None: if ``bits`` is given, whatever it is.
        calibration: what the moments were made of that a compression had; it sets that itself.

    Raises:
        InputError: an option has no such value, or two exclude each other.
    """

    bits: float | None = None
    preset: str | None = None
    layout: str = "auto"
    quantizer: str = "scalar"
    tile_cols: int | None = None
    tensor_parallel: int = 1
    stack: bool = False
    allocation: str = "auto"
    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None
    tensor_bits: Mapping[str, float | str] = field(default_factory=dict, hash=False)
    embeddings: float | str = KEEP
    dequantize_fp8: bool | None = None
    calibration: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if self.bits is not None and self.preset is not None:
            raise InputError("bits and preset exclude each other")
        if self.preset is not None:
            _check_name("preset", self.preset, PRESETS)
        _check_name("layout", self.layout, LAYOUTS)
        _check_name("quantizer", self.quantizer, QUANTIZERS)
        if self.quantizer == "trellis" and self.preset is not None:
            raise InputError(f"quantizer 'trellis' and preset {self.preset!r} exclude each other: it takes a rate")
        _check_name("allocation", self.allocation, ALLOCATIONS)
        include, exclude = _patterns("include", self.include), _patterns("exclude", self.exclude)
        if not isinstance(self.tensor_bits, Mapping):
            raise InputError(f"tensor_bits {self.tensor_bits!r}: not a mapping of regular expressions to rates")
        for pattern in self.tensor_bits:
            _check_pattern("tensor_bits", pattern)
        if self.dequantize_fp8 not in (None, True, False):
            raise InputError(f"dequantize_fp8 {self.dequantize_fp8!r}: there are true and false")
        if not isinstance(self.stack, bool):
            raise InputError(f"stack {self.stack!r}: there are true and false")
        if self.stack and self.allocation in ("model", "sensitivity"):
            raise InputError(
                f"stack and allocation {self.allocation!r} exclude each other: common tables change what tensors take"
            )
        if self.calibration is not None and not isinstance(self.calibration, Mapping):
            raise InputError(f"calibration {self.calibration!r}: not a mapping of what moments were made of")
        if self.dequantize_fp8 is None:
            object.__setattr__(self, "dequantize_fp8", self.bits is not None)
        rate = DEFAULT_BITS if self.bits is None and self.preset is None else self.bits
        # The class is frozen: this is how it takes what was asked for in its one form.
        object.__setattr__(self, "include", include)
        object.__setattr__(self, "exclude", exclude)
        object.__setattr__(self, "bits", None if rate is None else _rate(rate))
        object.__setattr__(self, "embeddings", _embeddings(self.embeddings))
        object.__setattr__(self, "tile_cols", None if self.tile_cols is None else _columns(self.tile_cols))
        object.__setattr__(self, "tensor_parallel", _parts(self.tensor_parallel))
        object.__setattr__(
            self,
            "tensor_bits",
            {name: rate if rate == LOSSLESS else _rate(rate) for name, rate in self.tensor_bits.items()},
        )

    def to_json(self) -> dict[str, Any]:
        """All options as what JSON has: text, numbers, null, lists of patterns, an object for ``tensor_bits``."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> QuantConfig:
        """The inverse of :meth:`to_json`; what is missing has its default.

        Raises:
            InputError: it is no object, or has an option or a value that there is not.
        """
        if not isinstance(value, Mapping):
            raise InputError(f"options {value!r}: not an object")
        known = [option.name for option in fields(cls)]
        unknown = [name for name in value if name not in known]
        if unknown:
            raise InputError(f"options {', '.join(map(str, unknown))}: there are {', '.join(known)}")
        return cls(**value)

    @classmethod
    def from_directory(cls, directory: str | Path) -> QuantConfig:
        """With which options a compressed model directory was made: what its config.json says.

        Raises:
            InputError: it does not say, or has options that this version does not know.
            DirectoryIndexError: config.json is not a JSON object.
        """
        options = written_options(Path(directory))
        if options is None:
            raise InputError(f"{Path(directory) / CONFIG_NAME} does not say how the weights were compressed")
        try:
            return cls.from_json(options)
        except InputError as error:
            raise InputError(f"{Path(directory) / CONFIG_NAME}: {error}") from None


def _check_name(option: str, value: object, names: tuple[str, ...]) -> None:
    if value not in names:
        raise InputError(f"{option} {value!r}: there are {', '.join(names)}")


def _check_pattern(option: str, pattern: object) -> str:
    if not isinstance(pattern, str):
        raise InputError(f"{option} {pattern!r}: not text")
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(f"{option} {pattern!r} is not a regular expression: {error}") from None
    return pattern


def _patterns(option: str, value: object) -> str | tuple[str, ...] | None:
    """One form for each set of patterns: None, the only one, or a tuple of several, each once."""
    if value is None:
        return None
    given = list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    patterns = tuple(dict.fromkeys(_check_pattern(option, pattern) for pattern in given))
    return patterns if len(patterns) > 1 else next(iter(patterns), None)


def pattern_list(value: str | Sequence[str] | None) -> list[str]:
    """The patterns of ``include`` or ``exclude``, however many."""
    return [value] if isinstance(value, str) else list(value or ())


def _rate(bits: object) -> float:
    if isinstance(bits, bool) or not isinstance(bits, Real) or not MIN_BITS <= float(bits) <= MAX_ASKED_BITS:
        raise InputError(
            f"{bits} bits a weight: rates from {MIN_BITS} to {MAX_ASKED_BITS} are possible, above {MAX_BITS} "
            "exactly where that fits"
        )
    return float(bits)


def _embeddings(value: object) -> float | str:
    if isinstance(value, str):
        if value not in (KEEP, CODE):
            raise InputError(f"embeddings {value!r}: there are {KEEP}, {CODE}, and a rate, as 4.25")
        return value
    try:
        return _rate(value)
    except InputError as error:
        raise InputError(f"embeddings: {error}") from None


def _columns(columns: object) -> int:
    if (
        isinstance(columns, bool)
        or not isinstance(columns, Integral)
        or int(columns) % CHUNK_COLS
        or not CHUNK_COLS <= int(columns) <= MAX_TILE_COLS
    ):
        raise InputError(
            f"tile_cols {columns}: multiples of {CHUNK_COLS} from {CHUNK_COLS} to {MAX_TILE_COLS} are possible"
        )
    return int(columns)


def _parts(parts: object) -> int:
    if isinstance(parts, bool) or not isinstance(parts, Integral) or int(parts) < 1:
        raise InputError(f"tensor_parallel {parts}: a number of devices, 1 or more, is needed")
    return int(parts)
