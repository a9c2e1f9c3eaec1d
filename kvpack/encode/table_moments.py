"""What moments say of a matrix with a row for each token: an embedding, an output layer, or both in one (tied).

An error e in the row of token v costs, to second order, ½·e·(s_v·H + f_v·G)·eᵀ nats a token. As output layer: by the
second moment H of its inputs and the sensitivity s_v of its output. As embedding: by the second moment G of the loss's
gradients at the rows that are looked up, and the frequency f_v of the token. Both s_v and f_v go with how often the
token is met, so that one metric for all rows, M = Σs·H + Σf·G, and one weight of each row stand for all these.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvpack.encode.moments import Moments


class TableMoments(NamedTuple):
    """Second-order costs of errors in a table: ½·Σ_v use_v·e_v·metric·e_vᵀ nats a token.

    Attributes:
        metric: f32 [K, K].
        use: f64 [rows], in all 1: how much each row's errors count.
        frequencies: f64 [rows]: the same as far as a text can tell, above zero also for tokens that it has not.
    """

    metric: npt.NDArray[np.float32]
    use: npt.NDArray[np.float64]
    frequencies: npt.NDArray[np.float64]


def table_moments(
    moments: Moments, name: str, token_counts: npt.NDArray[np.int64], *, looked_up: bool
) -> TableMoments | None:
    """Those of one table; None where the moments do not say what all of its uses cost.

    Args:
        token_counts: i64 [rows of an embedding].
        looked_up: whether it is an embedding, whatever else.

    Raises:
        MomentsError: a matrix is damaged.
    """
    parts: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]] = []
    sensitivity = moments.sensitivity(name) if name in moments.inputs else None
    if sensitivity is not None:
        parts.append((moments.second_moment(name), sensitivity.reshape(-1).astype(np.float64)))
    elif name in moments.inputs:
        return None
    gradients, tokens = moments.gradient_moment(name), int(token_counts.sum())
    if gradients is not None and tokens:
        parts.append((gradients, token_counts / tokens))
    elif looked_up:
        return None
    if len({len(weights) for _, weights in parts}) != 1:
        return None
    metric = sum(weights.sum() * matrix.astype(np.float64) for matrix, weights in parts)
    costs = sum(float(np.trace(matrix, dtype=np.float64)) * weights for matrix, weights in parts)
    total = float(np.sum(costs))
    if not total > 0:
        return None
    use = np.asarray(costs / total, np.float64)
    # One token more, of all: what a text does not have is not met less often than that.
    return TableMoments(np.asarray(metric, np.float32), use, use + 1 / max(1, tokens))
