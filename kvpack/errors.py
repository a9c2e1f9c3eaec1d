"""All errors of kvpack, one hierarchy. Each is a ``ValueError`` or a ``RuntimeError`` too.

::

    KvpackError
    ├── FormatError (ValueError)           one class for each rule of docs/FORMAT.md that a file can break
    │   ├── ContainerError                 the safetensors file around the blobs (§9)
    │   │   ├── NotAContainerError         no safetensors header where one must be
    │   │   ├── TensorTableError           dtype, shape, offsets, gaps, overlaps, duplicate names
    │   │   ├── ContainerMetadataError     kvpack_version, kvpack_tensors, kvpack_crc32, shapes, missing blobs or scales
    │   │   ├── ScaleError                 scales of a wrong number, negative, denormal, infinite or NaN
    │   │   ├── TensorCrcError             bytes of a kept tensor, or scales, damaged
    │   │   ├── FileChangedError (OSError) cut, or written to, while it was read
    │   │   └── DirectoryIndexError        model.safetensors.index.json or config.json of a directory
    │   ├── BlobError                      one coded tensor (§§2–7)
    │   │   ├── TruncatedError             fewer or more bytes than the header announces
    │   │   ├── MagicError                 not a blob
    │   │   ├── VersionError               a version this reader does not know
    │   │   ├── ReservedError              a reserved field, bit or value is in use
    │   │   ├── GeometryError              rows, cols, tiles, matrices, sizes
    │   │   ├── LayoutError                element kind, bits, codes per symbol
    │   │   ├── HeaderCrcError             header, tables or tile metadata damaged
    │   │   ├── TableError                 a frequency table that does not add up
    │   │   ├── TileBoundsError            offsets or sizes of a tile other than prescribed
    │   │   ├── TileModeError              mode, predictor or table index
    │   │   ├── PaddingError               bytes that must be zero are not
    │   │   ├── PayloadCrcError            a tile's bytes damaged
    │   │   ├── LaneError                  states, lengths or group offsets of the lanes
    │   │   ├── LaneStateError             a lane does not end in the state it must end in
    │   │   └── OutlierError               unsorted, out of range, or zero
    │   ├── SnapshotError                  a file of a KV cache's pages, around their blobs
    │   │   ├── NotASnapshotError          a container, but not of a cache's pages
    │   │   ├── SnapshotHeaderError        what it says of its pages is malformed, or contradicts the tensors
    │   │   └── DamagedRunError            pages that cannot be decoded; names the run and its tokens
    │   ├── ChunkError                     bytes of a chunk of KV in a store are damaged, or of other options
    │   ├── DamagedPartError               what one part of a compression has made is not as it was written
    │   ├── MomentsError                   a file of a calibration run's moments contradicts itself, or is none
    │   ├── LimitError                     legal, but more than this reader agreed to allocate
    │   └── PageError                      a page of a KV cache cannot have that shape or size
    ├── InputError (ValueError)            an input, an output or an option cannot be used
    │   ├── OtherFilesError                a directory holds what is no part of an output
    │   └── PartsMismatchError             a part of a compression has other options, or another source, than others
    ├── ModelMismatchError (ValueError)    the tensors of a file are not those of the model
    │   └── FingerprintMismatchError       a snapshot's pages are of another model; says in what it differs
    ├── AllocationError (ValueError)       formats of pages cannot be chosen from what was given
    ├── PageEntryError (ValueError)        an entry is not of a page that is in use
    ├── CacheInputError (ValueError)       tensors, layers or sequences do not fit a KV cache
    ├── NotInstalledError (RuntimeError)   an option needs a package that is not installed
    ├── NotSupportedError (RuntimeError)   what is asked for is not in this version of kvpack
    ├── DeviceError (RuntimeError)         no such device, or it lacks what kvpack needs
    ├── StreamingError (RuntimeError)      a streamed layer is used outside its turn
    ├── TierMissError (RuntimeError)       pages are no longer where they were found, or cannot be read there
    └── CacheFullError (RuntimeError)      a KV cache would exceed its bytes, tokens or sequences
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_LINE = 120


class KvpackError(Exception):
    """What kvpack raises on purpose. The message says what, where and what to do."""


class FormatError(KvpackError, ValueError):
    """A file breaks a rule of FORMAT.md. The message says what, where and what was found."""


class ContainerError(FormatError):
    """The safetensors file around the blobs is at fault."""


class NotAContainerError(ContainerError):
    """The file has no valid safetensors header."""


class TensorTableError(ContainerError):
    """The list of tensors (dtype, shape, offsets) contradicts itself or the file."""


class ContainerMetadataError(ContainerError):
    """`kvpack_version` or `kvpack_tensors` is missing, malformed or contradicts the blobs; or `kvpack_crc32` is."""


class ScaleError(ContainerError):
    """Scales are missing, of a wrong number, or of a value that FORMAT.md §8 forbids."""


class TensorCrcError(ContainerError):
    """A tensor that is kept as it is, or scales, do not have the CRC that `kvpack_crc32` gives."""


class FileChangedError(ContainerError, OSError):
    """The file was cut, or written to, between its opening and its reading. What was read before is worth nothing."""


class DirectoryIndexError(ContainerError):
    """The index or the configuration of a model directory contradicts its shards."""


class BlobError(FormatError):
    """A coded tensor is at fault."""


class TruncatedError(BlobError):
    """The blob has another length than its header announces."""


class MagicError(BlobError):
    """The bytes do not begin with the magic number."""


class VersionError(BlobError):
    """The blob has a version that this reader does not know."""


class ReservedError(BlobError):
    """A reserved bit, field or value is in use."""


class GeometryError(BlobError):
    """Rows, columns, tile counts, matrices or section sizes contradict each other."""


class LayoutError(BlobError):
    """The combination of element kind, element bits and code layout is illegal."""


class HeaderCrcError(BlobError):
    """Header, tables or tile metadata do not have the CRC that the header gives."""


class TableError(BlobError):
    """A frequency table is illegal."""


class TileBoundsError(BlobError):
    """An offset or a size of a tile is not the prescribed one."""


class TileModeError(BlobError):
    """A tile's mode, predictor or table index is illegal."""


class PaddingError(BlobError):
    """Bytes or bits that must be zero are not."""


class PayloadCrcError(BlobError):
    """A tile's bytes do not have the CRC that its metadata gives."""


class LaneError(BlobError):
    """Initial states, lengths or group offsets of a tile's lanes are illegal."""


class LaneStateError(BlobError):
    """A decoded lane does not end in the state, or at the word, in which it must end."""


class OutlierError(BlobError):
    """A tile's outliers are unsorted, out of range, or zero."""


class SnapshotError(FormatError):
    """A file of a KV cache's pages is at fault. No cache has been changed."""


class NotASnapshotError(SnapshotError):
    """The file may be a container, but does not hold a KV cache's pages."""


class SnapshotHeaderError(SnapshotError):
    """What a snapshot says of its pages is malformed, out of range, or contradicts its tensors."""


class DamagedRunError(SnapshotError):
    """Some pages of a snapshot cannot be decoded, and those behind them are worth nothing without them.

    Attributes:
        run: its number, from 0.
        first_token, end_token: the run's tokens are ``first_token … end_token − 1``.
        cause: what was found.
        layer: where it was found, or None: not known, as with what all layers share.
        side, page_format: ``"K"`` or ``"V"``, and the format's name, or None: not known.
        advice: what can be had all the same, and how; empty where nobody has said.
    """

    def __init__(
        self,
        run: int,
        first_token: int,
        end_token: int,
        cause: str,
        layer: int | None = None,
        side: str | None = None,
        page_format: str | None = None,
    ) -> None:
        super().__init__(run, first_token, end_token, cause, layer, side, page_format)
        self.run, self.first_token, self.end_token, self.cause = run, first_token, end_token, cause
        self.layer, self.side, self.page_format = layer, side, page_format
        self.advice = ""

    def __str__(self) -> str:
        where = f"run {self.run} (tokens {self.first_token}\N{EN DASH}{self.end_token - 1})"
        if self.layer is not None:
            where += f", layer {self.layer}"
        if kind := " ".join(name for name in (self.side, self.page_format) if name):
            where += f", {kind}"
        return "; ".join(filter(None, [f"{where}: {self.cause}", self.advice]))


class ChunkError(FormatError):
    """Bytes of a chunk of KV, as a store keeps them, are damaged, or were coded with other options. Nothing is read."""


class DamagedPartError(FormatError):
    """What one part of a compression has made is not as it was written. The message says which part makes it anew."""


class MomentsError(FormatError):
    """A file of moments is none, contradicts itself, or holds numbers that no calibration run finds."""


class LimitError(FormatError):
    """The file may be legal, but is larger than the limit this reader was given."""


class PageError(FormatError):
    """A page of a KV cache cannot have the shape, or does not have the size, that was given."""


class InputError(KvpackError, ValueError):
    """The input, the output or an option cannot be used; the message says why and what would do."""


class NotInstalledError(KvpackError, RuntimeError):
    """An option needs a package that is not installed; the message says what to install."""


class NotSupportedError(KvpackError, NotImplementedError):
    """What is asked for is planned, and not in this version of kvpack. The message says what there is instead."""


class OtherFilesError(InputError):
    """A directory is not replaced, since it holds what is no part of an output. The message lists it."""


class PartsMismatchError(InputError):
    """A part of a compression has other options, or another source, than the parts made before. Says which."""


class DeviceError(KvpackError, RuntimeError):
    """No such device, or no driver, no CUDA in torch, no CuPy. The message says what to install or to pass instead."""


class StreamingError(KvpackError, RuntimeError):
    """A streamed layer is used outside its turn or its stream, or in a way that streaming cannot serve."""


class ModelMismatchError(KvpackError, ValueError):
    """Names or shapes of a file's tensors are not those of the model. The model has not been changed."""


class FingerprintMismatchError(ModelMismatchError):
    """A snapshot's pages were computed by another model than the one that is to go on from them.

    Attributes:
        of_file, of_model: both fingerprints.
        differences: in what they differ, a line each, as long as it has to be. The message has them shortened.
    """

    def __init__(self, of_file: object, of_model: object, differences: Sequence[str] = ()) -> None:
        super().__init__(of_file, of_model, tuple(differences))
        self.of_file, self.of_model, self.differences = of_file, of_model, tuple(differences)

    def __str__(self) -> str:
        told = {line.partition(": ")[0]: line for line in self.differences if not line.startswith("model: ")}
        first = "the pages are of another model, to which alone they mean anything"
        if "dtype" in told and told.keys() <= {"dtype", "weights"}:
            # Weights in one dtype are never equal to those in another.
            dtype = told["dtype"].split()[1]
            first = f"the pages were made in another dtype than the model is in: load it in {dtype} (--dtype {dtype})"
        lines = [
            first,
            f"fingerprint of the file:  {self.of_file}",
            f"fingerprint of the model: {self.of_model}",
            *map(_shortened, told.values()),
        ]
        return "\n  ".join(lines)


def _shortened(line: str) -> str:
    """Hashes by their first digits, and what is longer than a line cut."""
    line = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", line)
    return line if len(line) <= _LINE else line[: _LINE - 1] + "…"


class TierMissError(KvpackError, RuntimeError):
    """Pages are no longer in the tier where they were found, or cannot be read there. They must be computed anew."""


class CacheFullError(KvpackError, RuntimeError):
    """A KV cache would exceed its limit of bytes, tokens or sequences. The cache has not been changed."""


class AllocationError(KvpackError, ValueError):
    """Columns of pages, a ladder of formats or a policy contradict each other. Nothing has been changed."""


class PageEntryError(KvpackError, ValueError):
    """An entry is not of a page that these pools have given out and that is still in use. Nothing has been changed."""


class CacheInputError(KvpackError, ValueError):
    """Tensors, layers or sequences do not fit the KV cache they were given to. The cache has not been changed."""
