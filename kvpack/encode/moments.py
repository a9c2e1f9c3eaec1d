"""Moments of a model's activations in a file: what a calibration run finds, and what encoding by error feedback reads.

The file is an ordinary safetensors file. For a linear of ``rows`` outputs y = W x with ``K`` inputs:

- ``KEY.second_moment`` F32 [K, K], or [E, K, K] for a tensor of E matrices: the mean of x xᵀ over tokens. Linears that
  read the same inputs share a KEY.
- ``KEY.tokens`` I64 [1] or [E]: over how many tokens that mean is. A matrix that met none has zeros.
- ``TENSOR.sensitivity`` F32 [rows] or [E, rows]: the mean of (d loss / d y)² over the same tokens, where loss is the
  sum of −log p(label) over a window's tokens and labels are sampled from the model itself. A file may have none.
- ``EMBEDDING.gradient_moment`` F32 [K, K], with sensitivities, of the embedding of tokens: the mean of g gᵀ over the
  same tokens, with g = d loss / d row of the row that was looked up.
- ``token_counts`` I64 [vocabulary]: how often each token stood in the text.

``__metadata__`` has ``kvpack_moments``, the JSON text of ``{"version": 1, "inputs": {TENSOR: KEY}, "made": {…}}``.
TENSOR is a tensor's name in the checkpoint; ``made`` says what the file was made of.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from kvpack.encode.jit import kernel
from kvpack.errors import FormatError, InputError, MomentsError
from kvpack.format.closing import Closing
from kvpack.format.container import Container, ContainerWriter, StoredTensor
from kvpack.format.file_kinds import describe_for_moments
from kvpack.format.json_limits import load_json

METADATA_KEY = "kvpack_moments"
VERSION = 1
SECOND_MOMENT = ".second_moment"
TOKENS = ".tokens"
SENSITIVITY = ".sensitivity"
GRADIENT_MOMENT = ".gradient_moment"
TOKEN_COUNTS = "token_counts"
# In ``made``: tensor → its ``sampled_crc32``, by which moments of another model of the same shapes are known.
SAMPLES = "sampled_crc32"
_SAMPLES, _SAMPLE_BYTES = 64, 16
# |H_ij − H_ji| over the geometric mean of the diagonal's two elements.
_ASYMMETRY = 1e-3
_REMEDY = "make it anew with kvpack moments"

_NOT_FINITE, _NOT_SYMMETRIC = 1, 2
# Rows and columns of a square that is compared with its mirror image while both lie in a cache.
_SQUARE = 64

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]


@kernel
def _what_is_wrong(found, roots):  # type: ignore[no-untyped-def]
    """Whether f32 ``found`` [K, K] is not finite, or not symmetric; ``roots`` f64 [K] of its diagonal. 0: neither."""
    size = found.shape[0]
    mirrored = np.empty((_SQUARE, _SQUARE), np.float32)
    strange = unlike = 0
    for above in range(0, size, _SQUARE):
        below = min(above + _SQUARE, size)
        for left in range(0, above + 1, _SQUARE):
            right = min(left + _SQUARE, size)
            for j in range(left, right):  # row by row: columns of rows that are a power of two apart share few lines
                for i in range(above, below):
                    mirrored[i - above, j - left] = found[j, i]
            for i in range(above, below):
                row, other, limit = found[i, left:right], mirrored[i - above], _ASYMMETRY * roots[i]
                for j in range(right - left):
                    apart = abs(np.float64(row[j]) - np.float64(other[j]))
                    strange += not apart < np.inf
                    unlike += apart > limit * roots[left + j]
    return _NOT_FINITE if strange else _NOT_SYMMETRIC if unlike else 0


class Moments(Closing):
    """A moments file, opened and what it says of itself checked; matrices are read and checked one at a time.

    Attributes:
        path: of the file.
        inputs: tensor of the checkpoint → key of its inputs.
        made: what the file was made of.

    Raises:
        MomentsError: the file is none of moments, or contradicts itself.
        ContainerError: it is no safetensors file.
        OSError: it cannot be read.

    Example:
        >>> with Moments("Llama.moments.safetensors") as moments:  # doctest: +SKIP
        ...     moments.second_moment("model.layers.0.self_attn.q_proj.weight").shape
        (4096, 4096)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._container = Container(path, describe=describe_for_moments)
        self.path = self._container.path
        try:
            self._parse()
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """The same as the class itself."""
        return cls(path)

    @property
    def names(self) -> list[str]:
        """Tensors of the checkpoint that have second moments."""
        return sorted(self.inputs)

    def matrices(self, name: str) -> int:
        """How many matrices a tensor has: experts of a tensor of them, else 1. Raises KeyError."""
        shape = self._container.tensors[self._key(name) + SECOND_MOMENT].shape
        return shape[0] if len(shape) == 3 else 1

    def inputs_of(self, name: str) -> int:
        """K, the number of inputs of a tensor's linear. Raises KeyError."""
        return self._container.tensors[self._key(name) + SECOND_MOMENT].shape[-1]

    def tokens(self, name: str) -> I64:
        """Over how many tokens a tensor's moments are means: i64 [matrices].

        Raises:
            MomentsError: a number is negative.
            KeyError: the tensor has no moments.
        """
        tokens = self._numbers(self._key(name) + TOKENS, np.dtype(np.int64))
        if (tokens < 0).any():
            raise self._error(f"{self._key(name)}{TOKENS}", f"{tokens.min()} tokens")
        return tokens

    def second_moment(self, name: str, matrix: int = 0) -> F32:
        """The mean of x xᵀ over the inputs of a tensor's linear: f32 [K, K].

        Args:
            matrix: which one, of a tensor of several.

        Raises:
            MomentsError: it is not finite, not symmetric, or has a negative diagonal.
            KeyError: the tensor has no moments.
            IndexError: it has no such matrix.
        """
        if not 0 <= matrix < self.matrices(name):
            raise IndexError(f"{self.path}: {name!r} has {self.matrices(name)} matrices, and no {matrix}")
        return self._square(self._key(name) + SECOND_MOMENT, matrix)

    def gradient_moment(self, name: str) -> F32 | None:
        """The mean of g gᵀ, g = d loss / d row, of an embedding's looked-up rows: f32 [K, K]; None if there is none.

        Raises:
            MomentsError: as of :meth:`second_moment`.
        """
        return self._square(name + GRADIENT_MOMENT, 0) if name + GRADIENT_MOMENT in self._container.tensors else None

    def sensitivity(self, name: str) -> F32 | None:
        """The mean of (d loss / d y)² at each output: f32 [rows], or [matrices, rows]; None if the file has none.

        Raises:
            MomentsError: a number is negative or not finite.
        """
        stored = self._container.tensors.get(name + SENSITIVITY)
        if stored is None:
            return None
        found = self._numbers(stored.name, np.dtype(np.float32))
        if not (np.isfinite(found).all() and (found >= 0).all()):
            raise self._error(stored.name, "a number is negative or not finite")
        return found

    @property
    def token_counts(self) -> I64:
        """How often each token stood in the text: i64 [vocabulary].

        Raises:
            MomentsError: a number is negative.
        """
        counts = self._numbers(TOKEN_COUNTS, np.dtype(np.int64))
        if (counts < 0).any():
            raise self._error(TOKEN_COUNTS, f"token {int(counts.argmin())} stood there {counts.min()} times")
        return counts

    def close(self) -> None:
        """Let go of the file."""
        self._container.close()

    def _error(self, tensor: str, what: str) -> MomentsError:
        return MomentsError(f"{self.path}, {tensor!r}: {what}; {_REMEDY}")

    def _key(self, name: str) -> str:
        try:
            return self.inputs[name]
        except KeyError:
            raise KeyError(f"{self.path} has no moments of {name!r}") from None

    def _square(self, name: str, matrix: int) -> F32:
        """One of the [K, K] of a stored tensor, checked."""
        k = self._container.tensors[name].shape[-1]
        size = 4 * k * k
        data = self._container.read(name, matrix * size, (matrix + 1) * size)
        found = np.frombuffer(data, "<f4").reshape(k, k).astype(np.float32, copy=False)
        self._check_second_moment(name, found)
        return found

    def _numbers(self, name: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        data = np.frombuffer(self._container.data(name), dtype.newbyteorder("<"))
        return data.reshape(self._container.tensors[name].shape).astype(dtype, copy=False)

    def _check_second_moment(self, name: str, found: F32) -> None:
        diagonal = np.diagonal(found)
        if not np.isfinite(diagonal).all() or (diagonal < 0).any():
            at = int(np.argmin(np.isfinite(diagonal) & (diagonal >= 0)))
            raise self._error(name, f"element [{at}, {at}] of the diagonal is {diagonal[at]}")
        roots = np.sqrt(diagonal.astype(np.float64))
        what = _what_is_wrong(found, roots)
        if what:
            raise self._error(name, "elements are not finite" if what == _NOT_FINITE else "it is not symmetric")

    def _parse(self) -> None:
        text = self._container.metadata.get(METADATA_KEY)
        if text is None:
            raise MomentsError(f"{self.path} is no file of moments: it has no {METADATA_KEY}; kvpack moments makes one")
        try:
            said = load_json(text.encode())
        except ValueError as error:
            raise MomentsError(f"{self.path}: {METADATA_KEY} is no JSON ({error}); {_REMEDY}") from None
        if not isinstance(said, dict) or "version" not in said:
            raise MomentsError(f"{self.path}: {METADATA_KEY} names no version; {_REMEDY}")
        if said["version"] != VERSION or isinstance(said["version"], bool):
            raise MomentsError(
                f"{self.path}: moments of version {said['version']!r}, this reader knows {VERSION}; a newer kvpack may "
                "know it"
            )
        inputs, made = said.get("inputs"), said.get("made")
        if not isinstance(inputs, dict) or not all(isinstance(key, str) for key in inputs.values()):
            raise MomentsError(f"{self.path}: {METADATA_KEY} has no map of tensors to inputs; {_REMEDY}")
        if not isinstance(made, dict):
            raise MomentsError(f"{self.path}: {METADATA_KEY} does not say what the file was made of; {_REMEDY}")
        self.inputs: dict[str, str] = inputs
        self.made: dict[str, Any] = made
        known = {TOKEN_COUNTS}
        self._stored(TOKEN_COUNTS, "I64", (1,))
        for key in dict.fromkeys(inputs.values()):
            known |= {key + SECOND_MOMENT, key + TOKENS}
            moment = self._stored(key + SECOND_MOMENT, "F32", (2, 3))
            matrices = moment.shape[0] if len(moment.shape) == 3 else 1
            if moment.shape[-1] != moment.shape[-2] or 0 in moment.shape:
                raise self._error(moment.name, f"its shape is {list(moment.shape)}, which is not square")
            tokens = self._stored(key + TOKENS, "I64", (1,))
            if tokens.shape != (matrices,):
                raise self._error(tokens.name, f"{list(tokens.shape)} numbers for {matrices} matrices")
        for name, key in inputs.items():
            if name + SENSITIVITY not in self._container.tensors:
                continue
            known.add(name + SENSITIVITY)
            moment = self._container.tensors[key + SECOND_MOMENT]
            found = self._stored(name + SENSITIVITY, "F32", (len(moment.shape) - 1,))
            if 0 in found.shape or found.shape[:-1] != moment.shape[:-2]:
                raise self._error(found.name, f"its shape is {list(found.shape)}, the inputs' {list(moment.shape)}")
        for name in [name for name in self._container.tensors if name.endswith(GRADIENT_MOMENT)]:
            known.add(name)
            found = self._stored(name, "F32", (2,))
            if found.shape[0] != found.shape[1] or 0 in found.shape:
                raise self._error(name, f"its shape is {list(found.shape)}, which is not square")
        if extra := sorted(self._container.tensors.keys() - known):
            raise self._error(extra[0], "it is of no tensor that the file names")

    def _stored(self, name: str, dtype: str, dimensions: tuple[int, ...]) -> StoredTensor:
        stored = self._container.tensors.get(name)
        if stored is None:
            raise self._error(name, "the file does not have it")
        if stored.dtype != dtype or len(stored.shape) not in dimensions:
            shown = " or ".join(map(str, dimensions))
            raise self._error(
                name, f"it is {stored.dtype} {list(stored.shape)}, {dtype} of {shown} dimensions is wanted"
            )
        return stored


def sampled_crc32(container: Container, name: str) -> str:
    """What tells a stored tensor from another model's: eight hex digits, of its dtype, its shape and 1 KiB of it.

    That is 16 bytes at each of 64 equal distances. Reading all of a model takes as long as a pass over its weights.
    """
    tensor = container.tensors[name]
    found = zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode())
    places = dict.fromkeys(tensor.size_bytes * sample // _SAMPLES for sample in range(_SAMPLES))
    for begin in places:
        found = zlib.crc32(container.read(name, begin, min(begin + _SAMPLE_BYTES, tensor.size_bytes)), found)
    return f"{found:08x}"


def check_moments_output(output: Path, text: Path | None, *, force: bool) -> None:
    """Whether a moments file can be written there: in place of another one at most, and of none without ``force``.

    Args:
        text: what the moments are found on, which is never replaced; None: no file.

    Raises:
        InputError: there is a file that must stay, or a directory, or no directory that it would be in.
    """
    if output.is_dir():
        raise InputError(f"{output} is a directory; the moments are one file")
    if output.exists():
        if text is not None and text.exists() and output.samefile(text):
            raise InputError(f"{output} is the text that is read: name another output with -o")
        if not force:
            raise InputError(f"{output} exists already; --force (force=True) replaces it")
        try:
            Moments(output).close()
        except (FormatError, OSError):
            raise InputError(
                f"{output} is there, and no moments file: it is not replaced; name another output with -o"
            ) from None
    if not output.resolve().parent.is_dir():
        raise InputError(f"the directory {output.parent} does not exist")


class MomentsWriter:
    """Writes a moments file tensor by tensor; it is put in place at once, by :meth:`finish`.

    Leaving the ``with`` block without that leaves no traces.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._writer = ContainerWriter(path)

    def add_second_moment(self, key: str, shape: tuple[int, ...], matrices: Iterator[F32], tokens: I64) -> None:
        """The second moments of some inputs.

        Args:
            shape: [K, K], or [E, K, K].
            matrices: f32 [K, K] each, one after the other.
            tokens: i64 [1] or [E].
        """
        pieces = (np.ascontiguousarray(matrix, "<f4").data.cast("B") for matrix in matrices)
        self._writer.add(key + SECOND_MOMENT, "F32", shape, pieces)
        self._writer.add(key + TOKENS, "I64", tokens.shape, [np.ascontiguousarray(tokens, "<i8").data.cast("B")])

    def add_sensitivity(self, tensor: str, values: F32) -> None:
        """f32 [rows] or [E, rows]."""
        data = np.ascontiguousarray(values, "<f4").data.cast("B")
        self._writer.add(tensor + SENSITIVITY, "F32", values.shape, [data])

    def add_gradient_moment(self, embedding: str, matrix: F32) -> None:
        """f32 [K, K]."""
        data = np.ascontiguousarray(matrix, "<f4").data.cast("B")
        self._writer.add(embedding + GRADIENT_MOMENT, "F32", matrix.shape, [data])

    def finish(self, inputs: Mapping[str, str], token_counts: I64, made: Mapping[str, Any]) -> int:
        """Put the file in place; returns its size in bytes.

        Args:
            inputs: tensor of the checkpoint → key of its inputs.
            token_counts: i64 [vocabulary].
            made: what the file is made of, as JSON values.
        """
        data = np.ascontiguousarray(token_counts, "<i8").data.cast("B")
        self._writer.add(TOKEN_COUNTS, "I64", token_counts.shape, [data])
        said = {"version": VERSION, "inputs": dict(inputs), "made": dict(made)}
        return self._writer.finish({METADATA_KEY: json.dumps(said, separators=(",", ":"), ensure_ascii=False)})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.__exit__(*error)  # type: ignore[arg-type]
