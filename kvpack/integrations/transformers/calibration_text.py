"""What a model reads in a calibration run: a text, token ids, or samples of its own."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvpack.errors import ContainerError, InputError
from kvpack.format.container import Container
from kvpack.integrations.transformers.causal_models import load_config, load_tokenizer, position_limit
from kvpack.integrations.transformers.evaluation import spread_windows, tokens_before_text
from kvpack.integrations.transformers.own_samples import starts

DEFAULT_TOKENS = 131_072
_DEFAULT_WINDOW = 2048
_ID_FILES = (".npy", ".safetensors", ".json")
_INTEGERS = {"I64": np.int64, "I32": np.int32, "U32": np.uint32, "U16": np.uint16, "I16": np.int16}


@dataclass(frozen=True)
class CalibrationText:
    """Windows that a model reads.

    Attributes:
        shape: windows, and tokens of each.
        ids: i64 [windows, tokens]; None: the model has to write them first.
        begins: of windows that the model writes, how they begin, in turn.
        made: what the windows are made of, as JSON values.
    """

    shape: tuple[int, int]
    ids: torch.Tensor | None
    begins: tuple[tuple[int, ...], ...]
    made: dict[str, Any]

    @property
    def tokens(self) -> int:
        """Of all windows together."""
        return self.shape[0] * self.shape[1]

    def beginnings(self, windows: Iterable[int]) -> list[tuple[int, ...]]:
        """How these windows begin, of those that the model writes."""
        return [self.begins[window % len(self.begins)] if self.begins else () for window in windows]


def own_text(directory: Path, *, tokens: int, window: int) -> CalibrationText:
    """Windows that the model is to write itself (:mod:`kvpack.integrations.transformers.own_samples`).

    Args:
        tokens: of all windows together, at least.
        window: tokens of a window.

    Raises:
        InputError: transformers cannot load the tokenizer.
    """
    begins = tuple(tuple(start[:window]) for start in starts(load_tokenizer(directory), load_config(directory)))
    shape = (-(-tokens // window), window)
    made = {"text": None, "tokens": shape[0] * window, "window_tokens": window, "begins_with": [*map(list, begins)]}
    return CalibrationText(shape, None, begins, made)


def window_tokens(directory: Path, window: int | None) -> int:
    """Tokens of a window: as asked for, or 2048, or the most that the model has positions for.

    Raises:
        InputError: the model has fewer positions.
    """
    limit = position_limit(load_config(directory))
    if window is None:
        return min(_DEFAULT_WINDOW, limit or _DEFAULT_WINDOW)
    if limit is not None and window > limit:
        raise InputError(f"--window is {window}, and the model has {limit} positions: --window takes at most that")
    return window


def read_text(
    directory: Path,
    text: Path,
    *,
    tokens: int,
    window: int,
    part: tuple[float, float] = (0.0, 1.0),
    option: str | None = "--window",
) -> CalibrationText:
    """Windows at equal distances over a part of a text.

    Args:
        directory: the model, with its tokenizer where the text is no file of ids.
        text: text in UTF-8; a ``.jsonl`` file with ``{"text": …}`` a line, between which the end token stands where
            the tokenizer has one; or token ids, integers of any shape, in a ``.npy`` or a ``.safetensors`` file with
            one tensor or a ``.json`` file with lists.
        tokens: of all windows together, at least; as many whole windows as that takes, if the text has them.
        window: tokens of a window, with the token that the tokenizer puts before a text.
        part: of the text's tokens, from and to fractions of it.
        option: what messages call ``window``; None: the caller has no such option.

    Raises:
        InputError: the file cannot be read as that, or the part has fewer tokens than a window, or ids that the
            model does not have.
    """
    begin, end = part
    content = text.read_bytes()
    prefix: list[int] = []
    if text.suffix in _ID_FILES:
        ids = _read_ids(text, content)
    else:
        tokenizer = load_tokenizer(directory)
        prefix = tokens_before_text(tokenizer)
        ids = _tokenized(text, content, tokenizer)
    first, last = (round(fraction * len(ids)) for fraction in part)
    own = window - len(prefix)
    if option is None and last - first < own:
        needed = math.ceil(own / (end - begin))
        raise InputError(
            f"{text} has {len(ids)} tokens, fewer than the {needed} that it takes for one window of {own} in its part "
            f"from {begin:g} to {end:g}: a longer text is needed"
        )
    rows = spread_windows(ids[first:last], prefix, window, -(-tokens // window), option=option)
    _check_ids(text, rows, directory)
    made = {
        "text": text.name,
        "text_sha256": hashlib.sha256(content).hexdigest(),
        "part": [begin, end],
        "tokens": rows.numel(),
        "window_tokens": window,
        "begins_with": prefix,
    }
    return CalibrationText((len(rows), window), rows, (), made)


def _check_ids(text: Path, ids: torch.Tensor, directory: Path) -> None:
    vocabulary = getattr(load_config(directory).get_text_config(), "vocab_size", None)
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or (isinstance(vocabulary, int) and most >= vocabulary):
        shown = least if least < 0 else most
        raise InputError(f"{text} has a token {shown}, which is none of the model's {vocabulary}")


def _tokenized(text: Path, content: bytes, tokenizer: Any) -> torch.Tensor:
    """i64 [tokens] of a text file."""
    try:
        decoded = content.decode()
    except UnicodeDecodeError as error:
        advice = "iconv -f LATIN1 -t UTF-8 FILE > NEW converts one in Latin-1"
        raise InputError(f"{text} is not UTF-8 text ({error}): {advice}") from None
    if text.suffix != ".jsonl":
        found = tokenizer(decoded, add_special_tokens=False, verbose=False).input_ids
        return torch.tensor(found, dtype=torch.int64)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for number, line in enumerate(decoded.splitlines(), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            document = None
        if not isinstance(document, str):
            raise InputError(f'{text}, line {number}: no JSON object with a "text"; each line has one')
        ids += tokenizer(document, add_special_tokens=False, verbose=False).input_ids + end
    return torch.tensor(ids, dtype=torch.int64)


def _read_ids(path: Path, content: bytes) -> torch.Tensor:
    """i64 [tokens] of a file of ids."""
    try:
        if path.suffix == ".npy":
            found = np.load(path, allow_pickle=False)
        elif path.suffix == ".safetensors":
            found = _only_tensor(path)
        else:
            found = np.asarray(json.loads(content))
    except (ValueError, EOFError) as error:
        raise InputError(f"{path} has no token ids: {error}") from None
    if not np.issubdtype(found.dtype, np.integer):
        raise InputError(f"{path} has {found.dtype} {list(found.shape)}; token ids are integers")
    return torch.from_numpy(found.astype(np.int64).reshape(-1))


def _only_tensor(path: Path) -> np.ndarray[Any, Any]:
    try:
        with Container(path) as container:
            tensors = list(container.tensors.values())
            if len(tensors) != 1 or tensors[0].dtype not in _INTEGERS:
                raise InputError(f"{path} is to have one tensor, of integers: token ids")
            return np.frombuffer(container.data(tensors[0].name), _INTEGERS[tensors[0].dtype])
    except ContainerError as error:
        raise InputError(str(error)) from None
