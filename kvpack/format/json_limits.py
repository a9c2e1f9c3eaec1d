"""JSON from files that nobody vouches for: how much of it is parsed at all (docs/FORMAT.md §10).

A parser takes up to a hundred bytes of memory for each byte of ``[[[[…`` or ``0,0,0,…``. What it would build is counted
beforehand, in one pass that builds nothing.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

import numpy as np

from kvpack.errors import LimitError

MAX_JSON_DEPTH = 127  # what the safetensors library takes
MAX_JSON_VALUES = 1 << 22
_BLOCK_BYTES = 1 << 20
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class RepeatedKeyError(ValueError):
    """An object has a key twice."""


def _check_size(text: bytes) -> None:
    """Count nesting and values outside of strings.

    Where the text is no JSON, the count is right up to the place where a parser stops.
    """
    text = text.replace(b"\\\\", b"").replace(b'\\"', b"")  # now each quotation mark begins or ends a string
    depth = values = 0
    in_string = np.uint8(0)
    for first in range(0, len(text), _BLOCK_BYTES):
        block = np.frombuffer(text, np.uint8, min(_BLOCK_BYTES, len(text) - first), first)
        inside = np.bitwise_xor.accumulate(np.equal(block, ord('"')).view(np.uint8)) ^ in_string
        in_string = inside[-1]
        structural = block[(inside == 0) & (block != ord('"'))]
        folded = structural | 0x20  # [ and {, ] and } differ in this bit
        steps = (folded == ord("{")).astype(np.int32) - (folded == ord("}"))
        values += int(np.count_nonzero(steps > 0) + np.count_nonzero(structural == ord(",")))
        if values > MAX_JSON_VALUES:
            raise LimitError(f"the JSON holds more than {MAX_JSON_VALUES} values, which this reader does not take")
        levels = depth + np.cumsum(steps)
        if len(levels):
            if levels.max() > MAX_JSON_DEPTH:
                raise ValueError(f"it is nested more than {MAX_JSON_DEPTH} deep")
            depth = int(levels[-1])


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise RepeatedKeyError(f"{twice!r} is there twice")
    return found


def _no_number(name: str) -> NoReturn:
    """Python's parser takes NaN and Infinity, which RFC 8259 does not have."""
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


def load_json(text: bytes) -> Any:
    """The value of a JSON text in UTF-8, in memory that is bounded whatever the text is.

    Raises:
        LimitError: more than :data:`MAX_JSON_VALUES` values.
        RepeatedKeyError: a key twice in an object.
        ValueError: no JSON, nested more than :data:`MAX_JSON_DEPTH` deep, NaN or Infinity, or no Unicode.
    """
    _check_size(text)
    try:
        value = json.loads(
            text.decode(), object_pairs_hook=_unique_keys, parse_constant=_no_number, parse_float=_finite
        )
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()  # which refuses one that is alone: that is no text
    except RecursionError as error:  # from a caller that is deep in its own stack already
        raise ValueError(str(error)) from None
    return value
