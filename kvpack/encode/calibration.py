"""What moments of a model's activations say to the encoder: feedback within a tensor, and importance between tensors.

A tensor's step Δ costs, to second order, KL = ½·Σ_r s_r·E[(e_r·x)²] nats a token, with e_r the error of row r and s_r
the sensitivity of its output (FORMAT.md's integers know nothing of it); that of an expert, times the part of the tokens
that it meets. With feedback (see feedback.py) E[(e_r·x)²] is about K·mean(L_jj²)·Δ²/12. The least sum over tensors at
a number of bits in all has the same derivative by bits everywhere: Δ² ∝ 1 / (mean s_r · mean L_jj²).
"""

from __future__ import annotations

import math
import shutil
import tempfile
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvpack.encode.feedback import Feedback, MatrixFeedback
from kvpack.encode.moments import F32, SAMPLES, Moments, sampled_crc32
from kvpack.encode.quant_config import QuantConfig
from kvpack.encode.table_moments import TableMoments, table_moments
from kvpack.encode.tensor_encoder import CPU_CODER, Coder, Matrices
from kvpack.errors import InputError, MomentsError
from kvpack.format.container import FEEDBACK_DEVICE_KEY, Container

_OF_TENSORS = ("shapes", "left_out", SAMPLES)
# Squared steps that a bit is worth where errors are fed back, in units of the mean L_jj².
FEEDBACK_RATE_WEIGHT = 0.06
# Inputs by their name, which of a tensor's matrices reads them, and whether they are as that tensor alone has them.
_Key = tuple[str, int, bool]


def calibrated_config(config: QuantConfig, calibration: Calibration) -> QuantConfig:
    """The options of a compression with these moments: what made them, and steps by sensitivity if they say so."""
    allocation = config.allocation
    if allocation == "auto":
        sensitive = calibration.has_sensitivities and config.bits is not None and not config.stack
        allocation = "sensitivity" if sensitive else "tensor"
    elif allocation == "sensitivity" and not calibration.has_sensitivities:
        raise InputError(f"allocation 'sensitivity': {calibration.moments.path} has no sensitivities")
    made = calibration.made
    if calibration.coder.feedback_device is not None:
        made[FEEDBACK_DEVICE_KEY] = calibration.coder.feedback_device
    return replace(config, allocation=allocation, calibration=made)


def _in_file(numbers: F32, folder: Path) -> F32:
    """The same numbers, in memory while the system has room; as they are where the folder cannot be written to."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            numbers.tofile(file)
            file.flush()
            return np.memmap(file, np.float32, "r", shape=numbers.shape)
    except OSError:
        return numbers


class _TensorFeedback:
    """See :class:`.feedback.TensorFeedback`."""

    def __init__(self, calibration: Calibration, name: str, weights: Matrices) -> None:
        self._calibration, self._name, self._weights = calibration, name, weights

    def of_matrix(self, matrix: int) -> MatrixFeedback:
        return self._calibration.factor(self._name, matrix, self._weights)

    def row_weights(self, matrix: int) -> npt.NDArray[np.float64] | None:
        table = self._calibration.table(self._name)
        if table is not None:
            return table.use * (self._calibration.mean_variance(self._name, matrix, self._weights) / 2)
        sensitivity = self._calibration.moments.sensitivity(self._name)
        if sensitivity is None:
            return None
        rows: npt.NDArray[np.float64] = sensitivity.reshape(self._weights.matrices, -1)[matrix].astype(np.float64)
        # Means are over the tokens that a matrix met, which of an expert are some of all.
        mean_variance = self._calibration.mean_variance(self._name, matrix, self._weights)
        rows *= self._calibration.part_of_tokens(self._name, matrix) * mean_variance / 2
        return rows


class Calibration:
    """Moments as the encoder asks for them; one for all threads.

    A factor is made once for all tensors and threads that ask for it while it is kept. Kept are those that were used
    last, ``coder.keep_bytes`` of them in all, or one that is larger; each thread that works with another one holds that
    as well. For K inputs a factor takes 4·K² bytes; with the moment 16·K² while the CPU makes it, and 28·K² for a GPU.

    Where that is too little for all, and a folder has room for them (as much as the moments take), the CPU's factors
    are kept in files without a name there, which end with the process: passes over the tensors ask for each again.

    Args:
        coder: who quantizes.
        executor: threads that share the making of a factor; none of those that ask for one.
        folder: where such files may be.
        token_counts: i64 [vocabulary], in place of those of the moments.
    """

    def __init__(
        self,
        moments: Moments,
        coder: Coder = CPU_CODER,
        executor: ThreadPoolExecutor | None = None,
        folder: Path | None = None,
        token_counts: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self.moments, self.coder, self._executor = moments, coder, executor
        self._folder = folder if folder is not None and self._is_better_in(folder) else None
        self.token_counts = moments.token_counts if token_counts is None else token_counts
        self._tables: dict[str, TableMoments] = {}
        self._factors: OrderedDict[_Key, MatrixFeedback] = OrderedDict()
        self._mean_variances: dict[_Key, float] = {}
        self._kept_bytes = 0
        # Tensors that were compared with what the moments are of -> whether they have the same weights.
        self.same_weights: dict[str, bool] = {}
        self._text_tokens = float(moments.token_counts.sum(dtype=np.float64))
        # Who makes a factor holds its key's lock, and the other lock for moments alone.
        self._lock = threading.Lock()
        self._locks: dict[_Key, threading.Lock] = {}

    @property
    def made(self) -> dict[str, Any]:
        """What the moments were made of, less what they say of single tensors."""
        return {key: value for key, value in self.moments.made.items() if key not in _OF_TENSORS}

    @property
    def has_sensitivities(self) -> bool:
        """Whether it is known what an error at outputs costs."""
        return any(self.moments.sensitivity(name) is not None for name in self.moments.names)

    def compare(self, name: str, container: Container, stored: str) -> None:
        """Note whether a tensor is the one that the moments are of, where they say it and as far as samples tell."""
        samples = self.moments.made.get(SAMPLES)
        if isinstance(samples, dict) and name in samples:
            self.same_weights[name] = sampled_crc32(container, stored) == samples[name]

    def prepare(self, name: str, weights: Matrices) -> bool:
        """Let a tensor be quantized with feedback; whether there are moments of it that can be used.

        Raises:
            MomentsError: they are those of a tensor of another shape.
        """
        if name not in self.moments.inputs or self._is_by_inputs(name, weights):
            return False
        matrices, inputs = self.moments.matrices(name), self.moments.inputs_of(name)
        if weights.matrices == 1 < matrices == weights.rows and weights.cols % inputs == 0:
            return False  # experts of so few outputs that they are coded as one matrix, a row for each
        self._check_inputs(name, weights)
        self._feed_back(name, weights)
        return True

    def prepare_table(self, name: str, weights: Matrices, *, looked_up: bool) -> bool:
        """The same of a matrix with a row for each token.

        Args:
            looked_up: whether it is an embedding, be it an output layer as well or not.

        Raises:
            MomentsError: they are those of a tensor of another shape.
        """
        if name not in self._tables:
            if name in self.moments.inputs:
                self._check_inputs(name, weights)
            found = table_moments(self.moments, name, self.token_counts, looked_up=looked_up)
            if found is None or len(found.use) != weights.rows:
                return False
            if len(found.metric) != weights.cols:
                raise MomentsError(
                    f"{self.moments.path} has moments of rows of {len(found.metric)} for {name!r}, which has rows of "
                    f"{weights.cols}: they are another model's; kvpack moments makes those of this one"
                )
            self._tables[name] = found
        self._feed_back(name, weights)
        return True

    def table(self, name: str) -> TableMoments | None:
        """What is known of a matrix with a row for each token that is quantized with feedback."""
        return self._tables.get(name)

    def _feed_back(self, name: str, weights: Matrices) -> None:
        weights.feedback = _TensorFeedback(self, name, weights)
        weights.rate_weight = FEEDBACK_RATE_WEIGHT

    def _check_inputs(self, name: str, weights: Matrices) -> None:
        found = self.moments.matrices(name), self.moments.inputs_of(name)
        if found != (weights.matrices, weights.cols):
            raise MomentsError(
                f"{self.moments.path} has moments of {found[0]} × {found[1]} inputs for {name!r}, which has "
                f"{weights.matrices} × {weights.cols}: they are another model's; kvpack moments makes those of this one"
            )
        sensitivity = self.moments.sensitivity(name)
        if sensitivity is not None and sensitivity.size != weights.matrices * weights.rows:
            raise MomentsError(
                f"{self.moments.path} has sensitivities of {sensitivity.size} outputs for {name!r}, which has "
                f"{weights.matrices * weights.rows}: they are another model's; kvpack moments makes those of this one"
            )

    def _is_by_inputs(self, name: str, weights: Matrices) -> bool:
        """Whether experts in one tensor are stored inputs × outputs, and so read as outputs × inputs.

        Their shape says so, or, if they are square, that of others of their module.
        """
        if weights.matrices == 1:
            return False
        module, shapes = name.rpartition(".")[0], self.moments.made.get("shapes")
        known = shapes if isinstance(shapes, dict) else {}
        stored = [(name, [weights.matrices, weights.rows, weights.cols])]
        stored += [(n, known[n]) for n in self.moments.inputs if n.rpartition(".")[0] == module and n in known]
        return any(
            isinstance(shape, list) and len(shape) == 3 and shape[1] == self.moments.inputs_of(n) != shape[2]
            for n, shape in stored
        )

    def importance(self, name: str, weights: Matrices) -> float | None:
        """What a squared step costs a weight, in nats: the mean over its matrices; None where nobody knows."""
        if weights.feedback is None:
            return None
        found = []
        for matrix in range(weights.matrices):
            row_weights = weights.feedback.row_weights(matrix)
            if row_weights is None:
                return None
            if weights.row_factors is not None:
                row_weights = row_weights * np.square(weights.row_factors.reshape(weights.matrices, -1)[matrix])
            found.append(row_weights.mean())
        mean = float(np.mean(found))
        return mean if mean > 0 and math.isfinite(mean) else None

    def part_of_tokens(self, name: str, matrix: int) -> float:
        """How many tokens one of a tensor's matrices met, for each one of the text; 1.0 of a text without tokens."""
        return int(self.moments.tokens(name)[matrix]) / self._text_tokens if self._text_tokens else 1.0

    def mean_variance(self, name: str, matrix: int, weights: Matrices) -> float:
        """The mean of L_jj² of one of a tensor's matrices; it is kept when the factor is not.

        Raises:
            MomentsError: the moments are none of any inputs.
        """
        with self._lock:
            known = self._mean_variances.get(self._key(name, matrix, weights))
        return self.factor(name, matrix, weights).mean_variance if known is None else known

    def factor(self, name: str, matrix: int, weights: Matrices) -> MatrixFeedback:
        """The feedback of one of a tensor's matrices, made once for all that read the same inputs.

        Raises:
            MomentsError: the moments are none of any inputs.
        """
        key = self._key(name, matrix, weights)
        with self._lock:
            own_lock = self._locks.setdefault(key, threading.Lock())
        with own_lock:
            with self._lock:
                if key in self._factors:
                    self._factors.move_to_end(key)
                    return self._factors[key]
            factor = self._make(name, matrix, weights)
            if self._folder is not None and isinstance(factor, Feedback):
                factor = factor._replace(coefficients=_in_file(factor.coefficients, self._folder))
            with self._lock:
                self._factors[key] = factor
                self._mean_variances[key] = factor.mean_variance
                self._kept_bytes += factor.size_bytes
                while self._kept_bytes > self.coder.keep_bytes and len(self._factors) > 1:
                    _, oldest = self._factors.popitem(last=False)
                    self._kept_bytes -= oldest.size_bytes
            return factor

    def _is_better_in(self, folder: Path) -> bool:
        """Whether memory is too small for all factors, and a folder large enough, with half of it left."""
        sizes = {
            key: 4 * self.moments.inputs_of(name) ** 2 * self.moments.matrices(name)
            for name, key in self.moments.inputs.items()
        }
        total = sum(sizes.values())
        return total > self.coder.keep_bytes and folder.is_dir() and 2 * total < shutil.disk_usage(folder).free

    def _key(self, name: str, matrix: int, weights: Matrices) -> _Key:
        # A tensor's own, with vectors or as a table, is none of all that read these inputs, one of which names them.
        alone = weights.column_scales is not None or name in self._tables
        return name if alone else self.moments.inputs[name], matrix, alone

    def _make(self, name: str, matrix: int, weights: Matrices) -> MatrixFeedback:
        table = self._tables.get(name)
        second_moment = self.moments.second_moment(name, matrix) if table is None else table.metric
        if weights.column_scales is not None:
            # An error in what is quantized is that times the column's scale in the weight.
            scales = weights.strip_column_scales(matrix * weights.tile_rows)
            second_moment = second_moment * scales[:, None] * scales
        try:
            return self.coder.feedback_of(second_moment, executor=self._executor)
        except ValueError as error:
            raise MomentsError(
                f"{self.moments.path}, inputs of {name!r}: {error}; make it anew with kvpack moments"
            ) from None
