"""What each page format spoils, measured on a page: the error of scores (K), and of values (V)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvpack.encode.page_coder import dequantize_blocks, quantize_blocks
from kvpack.format.pages import PageFormat, PageLayout, Side

# Stands in for the mean square of scores where no query has been seen: the mean of books-27m's layers.
_SCORE_SQUARE = 14.0


@dataclass
class Queries:
    """Squares of queries, times those of the scale: how much each dimension of keys counts.

    Attributes:
        squares: fp32 [num_kv_heads, head_dim], sums over query heads and tokens.
        count: of each sum.
    """

    squares: torch.Tensor
    count: int

    @classmethod
    def of(cls, q: torch.Tensor, num_kv_heads: int, scale: float) -> Queries:
        """q [batch, query heads, tokens, head_dim], multiplied with ``scale`` before keys."""
        squares = (q.detach().float() * scale).square().unflatten(1, (num_kv_heads, -1))
        return cls(squares.sum((0, 2, 3)), squares[:, 0, :, :, 0].numel())

    def __add__(self, other: Queries | None) -> Queries:
        return self if other is None else Queries(self.squares + other.squares, self.count + other.count)


def format_errors(
    x: npt.NDArray[np.float32],
    side: Side,
    formats: Sequence[PageFormat],
    queries: Queries | None,
    key_order: tuple[int, ...] = (),
) -> npt.NDArray[np.float64]:
    """What each format spoils of a page: of K the mean squared error of scores, of V that of values relative to their
    mean square, which change the result of attention about alike.

    Args:
        x: fp32 [heads, 64, head_dim]; what is not finite counts as 0.
        queries: that meet these keys; without them every dimension counts alike.
        key_order: of the pages.

    Returns:
        fp64 [formats].
    """
    x = np.where(np.isfinite(x), x, 0).astype(np.float32)
    weights = _weights(x, side, queries)
    found = []
    for page_format in formats:
        layout = PageLayout(side, page_format, x.shape[-1], key_order)
        error = dequantize_blocks(quantize_blocks(x, layout), layout) - x.astype(np.float64)
        found.append((np.square(error).mean(1) * weights).sum(-1).mean())
    return np.array(found)


def _weights(x: npt.NDArray[np.float32], side: Side, queries: Queries | None) -> npt.NDArray[np.float64]:
    """How much a squared error in each dimension counts, [heads or 1, head_dim]."""
    if side == Side.K and queries is not None:
        squares = queries.squares.double().cpu().numpy() / queries.count
        if np.isfinite(squares).all():
            return np.asarray(squares)
    energy = np.square(x, dtype=np.float64).mean()
    weight = (_SCORE_SQUARE if side == Side.K else 1.0) / energy if energy else 0.0
    return np.full((1, x.shape[-1]), weight / x.shape[-1])
