"""Tensors that N devices share, or that are multiplied as one: what names say, and tiles that end where parts do.

A layer is split by its outputs (q, k, v, gate, up: rows of a blob) or by its inputs (o, down: columns), as its name
says; one of another name may be split either way. Rows of a blob can be cut at multiples of 32, columns at tiles.
"""

from __future__ import annotations

import re
from enum import Enum

from kvpack.format.layout import CHUNK_COLS, GROUP_LANES, MAX_TILE_COLS

# Lanes of fewer columns cost 0.2 bit a weight and more.
_SHORTEST_TILE_COLS = 192
_OF_INPUTS = re.compile(
    r"(^|\.)(o_proj|down_proj|out_proj|c_proj|fc2|w2|wo|dense_4h_to_h|attention\.dense)(\.weight)?$"
)
_OF_OUTPUTS = re.compile(
    r"(^|\.)([qkv]_proj|qkv_proj|gate_proj|up_proj|c_attn|c_fc|fc1|w[13]|w[qkv]|Wqkv|query|key|value|query_key_value"
    r"|dense_h_to_4h)(\.weight)?$"
)
_OF_TWO_OUTPUTS = re.compile(r"(^|\.)(gate_up_proj|w13)(\.weight)?$")


# Layers of the same inputs, whose outputs are computed at once.
_STACKS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
)
_LAST_NAME = re.compile(r"(?P<before>.*\.)?(?P<last>\w+)(?P<after>\.weight)")


def stack_of(name: str) -> tuple[str, ...]:
    """The names of all tensors that are stacked with the one of that name, in order; none if it is not stacked.

    >>> stack_of("layers.0.mlp.up_proj.weight")
    ('layers.0.mlp.gate_proj.weight', 'layers.0.mlp.up_proj.weight')
    """
    found = _LAST_NAME.fullmatch(name)
    if found is None:
        return ()
    members = next((stack for stack in _STACKS if found["last"] in stack), ())
    return tuple(f"{found['before'] or ''}{member}{found['after']}" for member in members)


class Split(Enum):
    """By what a layer is split."""

    INPUTS = "inputs"
    OUTPUTS = "outputs"
    TWO_OUTPUTS = "outputs of two layers, one above the other"
    EITHER = "either"

    @classmethod
    def of(cls, name: str) -> Split:
        """How the tensor of that name is split.

        >>> Split.of("model.layers.0.mlp.down_proj.weight"), Split.of("model.layers.0.self_attn.q_proj.weight")
        (<Split.INPUTS: 'inputs'>, <Split.OUTPUTS: 'outputs'>)
        """
        for split, pattern in (
            (cls.INPUTS, _OF_INPUTS),
            (cls.OUTPUTS, _OF_OUTPUTS),
            (cls.TWO_OUTPUTS, _OF_TWO_OUTPUTS),
        ):
            if pattern.search(name):
                return split
        return cls.EITHER


def dividing_tile_cols(cols: int, wanted: int) -> int | None:
    """Columns of the tiles of which ``cols`` columns are made without a rest; None if lanes would be too short.

    Of all that divide, those whose ratio to ``wanted`` is nearest to 1.

    >>> [dividing_tile_cols(cols, 512) for cols in (4096, 1792, 704, 4736, 6432, 96)]
    [512, 448, 704, 1184, None, 96]
    """
    shortest = min(_SHORTEST_TILE_COLS, cols)
    columns = [c for c in range(CHUNK_COLS, MAX_TILE_COLS + 1, CHUNK_COLS) if cols % c == 0 and c >= shortest]
    return min(columns, key=lambda c: max(c / wanted, wanted / c), default=None)


def reason_not_to_split(split: Split, rows: int, cols: int, tile_cols: int | None, parts: int) -> str | None:
    """Why a matrix cannot be split into ``parts``, None if it can be; ``tile_cols``: those asked for."""
    row_parts = 2 * parts if split is Split.TWO_OUTPUTS else parts
    if split is not Split.INPUTS and rows % (GROUP_LANES * row_parts):
        return f"{rows} outputs are no multiple of {GROUP_LANES * row_parts}"
    if split in (Split.INPUTS, Split.EITHER):
        if cols % (CHUNK_COLS * parts):
            return f"{cols} inputs are no multiple of {CHUNK_COLS * parts}"
        if tile_cols is not None and cols // parts % tile_cols:
            return f"tiles of {tile_cols} columns do not divide the {cols // parts} of a part"
        if tile_cols is None and dividing_tile_cols(cols // parts, MAX_TILE_COLS) is None:
            return f"no tiles of {_SHORTEST_TILE_COLS} to {MAX_TILE_COLS} columns divide the {cols // parts} of a part"
    return None
