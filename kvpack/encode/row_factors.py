"""How much coarser each row of an embedding or an output layer is quantized than the others.

A row is used as often as its token is met, and its noise counts as often: rows of rare tokens may have larger steps.
With high-rate theory alone the best steps go with frequency^(−1/2); what a text tells of rare tokens is uncertain, and
half that exponent, with some of the row's own size, was best (docs/DESIGN-NOTES.md). Without a text the rows' sizes
alone say a little: tokens that are seldom seen in training end up with larger rows.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from kvpack.encode.dtypes import as_float32
from kvpack.encode.tensor_encoder import Matrices
from kvpack.encode.threads import map_ordered

# Exponents of a row's frequency and rms, and of its rms alone where frequencies are not known.
_FREQUENCY, _RMS = -0.25, 0.5
_RMS_ALONE = 2.0
# Rows that are as good as zero count as rows of this part of the mean rms.
_LEAST_RMS = 2.0**-6


def row_factors(
    weights: Matrices, frequencies: npt.NDArray[np.float64] | None, executor: ThreadPoolExecutor | None = None
) -> npt.NDArray[np.float32] | None:
    """Factors of the rows' steps, f32 [rows], of geometric mean 1; None where rows say nothing.

    Args:
        weights: one matrix with a row for each token.
        frequencies: f64 [rows], above zero, in any unit: how often each token is met.
    """
    energies = np.zeros(weights.rows)

    def work(index: int) -> None:
        strip = as_float32(weights.strip(index)).astype(np.float64)
        energies[weights.strip_rows(index)] = np.square(strip).sum(axis=1)

    for _ in map_ordered(work, range(weights.num_strips), executor):
        pass
    rms = np.sqrt(energies / weights.cols)
    if not (np.isfinite(rms).all() and rms.any()):
        return None
    logarithms = (_RMS_ALONE if frequencies is None else _RMS) * np.log2(np.maximum(rms, _LEAST_RMS * rms.mean()))
    if frequencies is not None:
        logarithms += _FREQUENCY * np.log2(frequencies)
    return np.asarray(np.exp2(logarithms - logarithms.mean()), np.float32)
