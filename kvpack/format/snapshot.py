"""Snapshots of KV caches: what a file of one holds (docs/FORMAT.md §9.6).

A snapshot is a container whose ordinary tensors hold the pages of one sequence, bit for bit. Pages are cut into *runs*
of neighbouring page indices, in all layers and both sides. A run's pages of one side and format are coded together,
in order of layer, then index; their codes, scales and centers are *parts*, each a blob.

Nothing here decodes; see ``kvpack.encode.snapshot_coder``. A file is opened by its headers and the formats of its pages
alone, and what it claims is compared with the bytes that are there before memory is taken for it.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kvpack.errors import FormatError, InputError, LimitError, NotASnapshotError, PageError, SnapshotHeaderError
from kvpack.format.closing import Closing
from kvpack.format.container import CRC_KEY, Container
from kvpack.format.file_kinds import describe_for_context
from kvpack.format.json_limits import load_json
from kvpack.format.layout import ElementKind, ceil_div
from kvpack.format.pages import GROUP_DIMS, PAGE_TOKENS, PageFormat, PageLayout, Side

SNAPSHOT_KEY = "kvpack_snapshot"
ARCHIVE_KEY = "kvpack_archive"
SNAPSHOT_CRC_KEY = "kvpack_snapshot_crc32"
SNAPSHOT_VERSION = 1
# What a run's blobs hold: the cache's own pages. Other ways are reserved.
CODING = "pages"
# Numbers the rules by which values become pages (kvpack.encode.page_coder). How codes are read does not depend on it.
PAGE_RULES = 1
RUN_PAGES = 32

MAX_TOKENS = 1 << 24
MAX_LAYERS = MAX_KV_HEADS = 1 << 12
MAX_RUN_PAGES = 1 << 10
_MAX_TEXT = 1 << 10
# The most that a value of an array of a budget's cache may be; what is computed of them stays finite.
_MOST_OF = {"importance": float(np.finfo(np.float32).max), "errors": 2.0**512, "shares": float(MAX_LAYERS)}
# A reader's own limit, as for blobs (FORMAT.md §10): elements of all pages.
FREE_ELEMENTS = 1 << 28
ELEMENTS_PER_BYTE = 256

Dtype = Literal["F16", "BF16"]
PartName = Literal["codes", "wide", "thin", "scales", "centers"]
PAGE_FORMAT_OF_DTYPE: dict[str, PageFormat] = {"F16": PageFormat.FP16, "BF16": PageFormat.BF16}
_FLOAT_KINDS = {
    PageFormat.FP16: ElementKind.FP16,
    PageFormat.BF16: ElementKind.BF16,
    PageFormat.FP8_E4M3: ElementKind.FP8_E4M3,
    PageFormat.FP8_E5M2: ElementKind.FP8_E5M2,
}
_HEX_DIGITS = frozenset("0123456789abcdef")
_NUMPY_DTYPES = {"U8": "u1", "I32": "<i4", "F32": "<f4", "F64": "<f8"}

Ints = npt.NDArray[np.int64]
PageFormats = npt.NDArray[np.uint8]


def _refuse(key: str, value: object, wanted: str) -> SnapshotHeaderError:
    return SnapshotHeaderError(f"{SNAPSHOT_KEY}: {key} is {str(value)[:80]!r}; it must be {wanted}")


def _check_integer(key: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _refuse(key, value, f"an integer from {low} to {high}")


def _check_text(key: str, value: object) -> None:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise _refuse(key, value, f"a text of at most {_MAX_TEXT} characters")


def _check_hash(key: str, value: object, *, optional: bool = True) -> None:
    if value is None and optional:
        return
    if not isinstance(value, str) or len(value) != 64 or not _HEX_DIGITS.issuperset(value):
        raise _refuse(key, value, "64 lower-case hexadecimal digits" + " or null" * optional)


def _leaves(value: object, path: str) -> Iterator[tuple[str, object]]:
    """The values of nested maps, by dotted path."""
    if isinstance(value, Mapping):
        for key in sorted(value):
            yield from _leaves(value[key], f"{path}.{key}" if path else str(key))
    else:
        yield path, value


@dataclass(frozen=True)
class Fingerprint:
    """What says whether pages were made by a model: pages of another one are garbage to it.

    Attributes:
        model: hex SHA-256 of all the others together, or of whatever else names the model.
        config, weights: hex SHA-256 of its configuration and of its weights.
        rope: how it turns positions, as JSON values.
        dtype: of its activations.
        adapter: hex SHA-256 of an adapter that was in use, or None.

    Raises:
        SnapshotHeaderError: a field of another type.
    """

    model: str
    config: str
    weights: str
    rope: Mapping[str, Any]
    dtype: str
    adapter: str | None = None

    def __post_init__(self) -> None:
        for key in ("model", "config", "weights"):
            _check_hash(f"fingerprint.{key}", getattr(self, key), optional=False)
        _check_hash("fingerprint.adapter", self.adapter)
        _check_text("fingerprint.dtype", self.dtype)
        if not isinstance(self.rope, Mapping) or not all(isinstance(key, str) for key in self.rope):
            raise _refuse("fingerprint.rope", self.rope, "an object")

    def to_dict(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in _FINGERPRINT_KEYS} | {"rope": dict(self.rope)}

    @classmethod
    def parse(cls, value: object) -> Fingerprint:
        if not isinstance(value, dict) or not value.keys() >= _FINGERPRINT_KEYS:
            raise _refuse("fingerprint", value, f"an object with {', '.join(sorted(_FINGERPRINT_KEYS))}, or null")
        return cls(**{key: value[key] for key in _FINGERPRINT_KEYS})

    def differences(self, other: Fingerprint) -> list[str]:
        """Where a file's fingerprint (this one) and a model's differ, one line each; empty if they are equal.

        >>> ours = Fingerprint("0" * 64, "1" * 64, "2" * 64, {"theta": 10000.0}, "float16")
        >>> ours.differences(Fingerprint("0" * 64, "1" * 64, "2" * 64, {"theta": 500000.0}, "float16"))
        ['rope.theta: 10000.0 in the file, 500000.0 in the model']
        """
        mine, theirs = (dict(_leaves(found.to_dict(), "")) for found in (self, other))
        absent = object()
        found = []
        for key in sorted(mine.keys() | theirs.keys()):
            a, b = mine.get(key, absent), theirs.get(key, absent)
            if a != b:
                shown = ["absent" if value is absent else value for value in (a, b)]
                found.append(f"{key}: {shown[0]} in the file, {shown[1]} in the model")
        return found


_FINGERPRINT_KEYS = {"model", "config", "weights", "rope", "dtype", "adapter"}


@dataclass(frozen=True)
class SnapshotHeader:
    """What a snapshot is of: the JSON of FORMAT.md §9.6, checked.

    Attributes:
        tokens: how many the pages hold.
        layers, kv_heads, head_dim, dtype, key_order, recent_tokens, sinks, formats, budget, policy: of the cache, as
            :class:`kvpack.KVCache` has them. ``formats`` are names of page formats, (K, V) of each layer.
        fingerprint: of the model, or None if nobody said.
        first_page: where in its sequence the snapshot begins, in pages.
        parent, chain: hash of the pages before the first page, and of all up to the last full page; None: not known.
        created_unix_s: when it was written.
        run_pages: page indices of a run.
        page_rules: :data:`PAGE_RULES`.

    Raises:
        SnapshotHeaderError: a value that FORMAT.md §9.6 does not allow.
    """

    tokens: int
    layers: int
    kv_heads: int
    head_dim: int
    dtype: Dtype
    key_order: tuple[int, ...]
    recent_tokens: int
    sinks: int
    formats: tuple[tuple[str, str], ...] | None
    budget: float | None
    policy: str
    fingerprint: Fingerprint | None
    first_page: int = 0
    parent: str | None = None
    chain: str | None = None
    created_unix_s: int = 0
    run_pages: int = RUN_PAGES
    page_rules: int = PAGE_RULES

    def __post_init__(self) -> None:
        for key, low, high in (
            ("tokens", 1, MAX_TOKENS),
            ("layers", 1, MAX_LAYERS),
            ("kv_heads", 1, MAX_KV_HEADS),
            ("head_dim", GROUP_DIMS, 1 << 10),
            ("recent_tokens", 0, 1 << 31),
            ("sinks", 0, 1 << 31),
            ("first_page", 0, MAX_TOKENS // PAGE_TOKENS),
            ("created_unix_s", 0, 1 << 48),
            ("run_pages", 1, MAX_RUN_PAGES),
            ("page_rules", 1, 1 << 16),
        ):
            _check_integer(key, getattr(self, key), low, high)
        if not isinstance(self.dtype, str) or self.dtype not in PAGE_FORMAT_OF_DTYPE:
            raise _refuse("dtype", self.dtype, "F16 or BF16")
        if not isinstance(self.key_order, tuple) or not all(type(group) is int for group in self.key_order):
            raise _refuse("key_order", self.key_order, "a list of groups")
        try:
            self.page_layout(Side.K, PageFormat.FP16)
        except PageError as error:
            raise SnapshotHeaderError(f"{SNAPSHOT_KEY}: {error}") from None
        if self.formats is not None:
            names = PageFormat.__members__
            pairs = self.formats
            if len(pairs) != self.layers or not all(len(pair) == 2 and names.keys() >= set(pair) for pair in pairs):
                raise _refuse("formats", pairs, "null, or names of two page formats for each layer")
        budget = self.budget
        if budget is not None and not (type(budget) in (int, float) and 0 < budget <= 1):
            raise _refuse("budget", budget, "null, or above 0 and at most 1")
        _check_text("policy", self.policy)
        _check_hash("parent", self.parent)
        _check_hash("chain", self.chain)

    @property
    def pages(self) -> int:
        """Pages of each layer and side."""
        return ceil_div(self.tokens, PAGE_TOKENS)

    @property
    def runs(self) -> int:
        return ceil_div(self.pages, self.run_pages)

    @property
    def fp16_bytes(self) -> int:
        """Of the same numbers in 16 bits, without what is empty of the last page."""
        return 2 * len(Side) * self.layers * self.kv_heads * self.head_dim * self.tokens

    def page_range(self, run: int) -> range:
        """Page indices of a run, counted from the file's first page."""
        return range(run * self.run_pages, min((run + 1) * self.run_pages, self.pages))

    def token_range(self, run: int) -> range:
        """Tokens of a run, counted from the sequence's first."""
        first, pages = PAGE_TOKENS * self.first_page, self.page_range(run)
        return range(first + PAGE_TOKENS * pages.start, first + min(PAGE_TOKENS * pages.stop, self.tokens))

    def runs_of(self, first_page: int, end_page: int) -> range:
        """The runs that hold these pages, counted from the file's first page."""
        return range(first_page // self.run_pages, ceil_div(end_page, self.run_pages))

    def page_layout(self, side: Side, page_format: PageFormat) -> PageLayout:
        return PageLayout(side, page_format, self.head_dim, self.key_order)

    def to_json(self) -> str:
        """The text that files hold; :meth:`parse` is the inverse."""
        fields = {key: getattr(self, key) for key in _HEADER_KEYS}
        fields |= {
            "version": SNAPSHOT_VERSION,
            "coding": CODING,
            "page_tokens": PAGE_TOKENS,
            "fingerprint": None if self.fingerprint is None else self.fingerprint.to_dict(),
        }
        return json.dumps(fields, separators=(",", ":"), sort_keys=True, ensure_ascii=False, allow_nan=False)

    @classmethod
    def parse(cls, text: str) -> SnapshotHeader:
        """Read and check the JSON text. Keys that are not known are passed over.

        Raises:
            SnapshotHeaderError, LimitError
        """
        try:
            fields = load_json(text.encode())
        except LimitError as error:
            raise LimitError(f"{SNAPSHOT_KEY}: {error}") from None
        except ValueError as error:
            raise SnapshotHeaderError(f"{SNAPSHOT_KEY} is not valid JSON: {error}") from None
        if not isinstance(fields, dict):
            raise SnapshotHeaderError(f"{SNAPSHOT_KEY} is not a JSON object")
        if fields.get("version") != SNAPSHOT_VERSION or fields.get("coding") != CODING:
            found = f"version {fields.get('version')!r}, coding {fields.get('coding')!r}"
            raise SnapshotHeaderError(
                f"{SNAPSHOT_KEY}: {found}; this reader knows version {SNAPSHOT_VERSION}, coding {CODING!r}. "
                "A newer kvpack may read it"
            )
        if fields.get("page_tokens") != PAGE_TOKENS:
            raise _refuse("page_tokens", fields.get("page_tokens"), str(PAGE_TOKENS))
        if missing := _HEADER_KEYS - fields.keys():
            raise SnapshotHeaderError(f"{SNAPSHOT_KEY}: {min(missing)} is missing")
        values = {key: fields[key] for key in _HEADER_KEYS}
        if not isinstance(values["key_order"], list):
            raise _refuse("key_order", values["key_order"], "a list of groups")
        values["key_order"] = tuple(values["key_order"])
        formats = values["formats"]
        if formats is not None:
            if not isinstance(formats, list) or not all(
                isinstance(pair, list) and all(isinstance(name, str) for name in pair) for pair in formats
            ):
                raise _refuse("formats", formats, "null, or names of two page formats for each layer")
            values["formats"] = tuple(map(tuple, formats))
        if values["fingerprint"] is not None:
            values["fingerprint"] = Fingerprint.parse(values["fingerprint"])
        return cls(**values)


_HEADER_KEYS = frozenset(SnapshotHeader.__dataclass_fields__)


@dataclass(frozen=True, eq=False)
class RunPages:
    """The pages of one side and format in a run, in order of layer, then index; at least one.

    Attributes:
        layers, indices: i64 [pages]; indices count from the file's first page.
    """

    header: SnapshotHeader
    run: int
    side: Side
    format: PageFormat
    layers: Ints
    indices: Ints

    def __len__(self) -> int:
        return len(self.layers)

    @cached_property
    def layout(self) -> PageLayout:
        return self.header.page_layout(self.side, self.format)

    @cached_property
    def layer_pages(self) -> Ints:
        """How many pages each layer that has some has, in order: i64 [layers of this]."""
        return np.unique(self.layers, return_counts=True)[1].astype(np.int64)

    @property
    def block_shape(self) -> tuple[int, int, int]:
        """[pages, heads, bytes] of all blocks of these pages."""
        return len(self), self.header.kv_heads, self.layout.block_bytes

    @cached_property
    def parts(self) -> list[RunPart]:
        """What the pages consist of, in the order in which a file lists it."""
        codes: list[PartName] = ["codes"] if len(self.layout.parts) == 1 else ["wide", "thin"]
        names = codes + ["scales"] * self.format.is_quantized + ["centers"] * self.layout.has_centers
        return [RunPart(self, name) for name in names]


@dataclass(frozen=True, eq=False)
class RunPart:
    """One blob of a run: the same part of all of :class:`RunPages`."""

    pages: RunPages
    part: PartName

    @property
    def name(self) -> str:
        """Of the tensor that is the blob."""
        pages = self.pages
        return f"run.{pages.run:05d}.{pages.side.name}.{pages.format.name}.{self.part}"

    @property
    def is_codes(self) -> bool:
        """Codes, not scales or centers."""
        return self.part not in ("scales", "centers")

    @property
    def places(self) -> slice:
        """Places of the groups whose dimensions this part is of."""
        layout = self.pages.layout
        if self.part == "thin":
            return layout.parts[1][0]
        return layout.parts[0][0] if self.is_codes else slice(0, layout.groups)

    @property
    def element_bits(self) -> int:
        return int(self.pages.layout.bits_of(self.places.start)) if self.is_codes else 16

    @property
    def kind(self) -> ElementKind:
        if not self.is_codes:
            return ElementKind.FP16
        return _FLOAT_KINDS.get(self.pages.format, ElementKind.UNSIGNED)

    @property
    def page_elements(self) -> int:
        """Elements of one page and head."""
        if not self.is_codes and self.pages.side == Side.V:
            return PAGE_TOKENS
        dims = GROUP_DIMS * len(range(self.pages.layout.groups)[self.places])
        return dims * PAGE_TOKENS if self.is_codes else dims

    @property
    def elements(self) -> int:
        """How many there are."""
        return len(self.pages) * self.pages.header.kv_heads * self.page_elements


def run_pages(header: SnapshotHeader, page_formats: PageFormats, run: int) -> list[RunPages]:
    """The pages of a run by side and format; ``page_formats`` u8 [layers, 2, pages] are all of the file's."""
    pages = header.page_range(run)
    found = []
    for side in Side:
        window = page_formats[:, side, pages.start : pages.stop]
        for number in np.flatnonzero(np.bincount(window.reshape(-1))).tolist():
            layers, indices = np.nonzero(window == number)
            found.append(RunPages(header, run, side, PageFormat(number), layers, indices + pages.start))
    return found


@dataclass(frozen=True)
class ArrayRule:
    """Dtype and shape of one of a snapshot's tensors that are not blobs; −1 is any size up to 64."""

    dtype: str
    shape: tuple[int, ...]
    needed: bool = False

    def fits(self, dtype: str, shape: tuple[int, ...]) -> bool:
        return (
            dtype == self.dtype
            and len(shape) == len(self.shape)
            and all(a == b or (b == -1 and a <= 64) for a, b in zip(shape, self.shape, strict=True))
        )


def array_rules(header: SnapshotHeader) -> dict[str, ArrayRule]:
    """The tensors of a snapshot that are not blobs."""
    tokens, layers, pages = header.tokens, header.layers, header.pages
    return {
        "tokens": ArrayRule("I32", (tokens,), needed=True),
        "page_formats": ArrayRule("U8", (layers, len(Side), pages), needed=True),
        "positions": ArrayRule("I32", (tokens,)),
        "page_hashes": ArrayRule("U8", (tokens // PAGE_TOKENS, 32)),
        "importance": ArrayRule("F32", (2, layers, pages)),
        "errors": ArrayRule("F64", (layers, len(Side), -1)),
        "shares": ArrayRule("F64", (layers,)),
    }


def check_page_formats(header: SnapshotHeader, page_formats: PageFormats) -> None:
    """Formats that exist, and of 16 bits the cache's own.

    Raises:
        SnapshotHeaderError: the message names the first page that is at fault.
    """
    legal = np.zeros(256, bool)
    legal[[f for f in PageFormat if f.is_quantized or f == PAGE_FORMAT_OF_DTYPE[header.dtype]]] = True
    if not (fine := legal[page_formats]).all():
        layer, side, page = np.unravel_index(int(np.argmin(fine)), fine.shape)
        raise SnapshotHeaderError(
            f"page_formats: layer {layer}, {Side(int(side)).name}, page {page} has format "
            f"{page_formats[layer, side, page]}, which a snapshot of {header.dtype} cannot have"
        )


def check_values(name: str, array: npt.NDArray[Any]) -> None:
    """Of a tensor that is not a blob, where not all that its dtype can say is legal.

    Raises:
        SnapshotHeaderError
    """
    if (most := _MOST_OF.get(name)) is None:
        return
    fine = (array >= 0) & (array <= most)
    if name == "errors":
        fine |= np.isnan(array)
    if not fine.all():
        raise SnapshotHeaderError(f"tensor {name!r} has {array[~fine][0]}; its numbers run from 0 to {most:.6g}")


def check_elements(header: SnapshotHeader, file_bytes: int, max_elements: int | None = None) -> None:
    """Whether a file of so many bytes may say that it has so many numbers.

    Raises:
        LimitError
    """
    elements = len(Side) * header.layers * header.pages * header.kv_heads * PAGE_TOKENS * header.head_dim
    limit = max(FREE_ELEMENTS, ELEMENTS_PER_BYTE * file_bytes) if max_elements is None else max_elements
    if elements > limit:
        raise LimitError(
            f"pages of {elements} numbers in {file_bytes} bytes exceed the limit of {limit}; "
            "pass max_elements to allow more"
        )


class SnapshotFile(Closing):
    """A snapshot, opened by its headers and the formats of its pages.

    Attributes:
        header: what it is of.
        page_formats: u8 [layers, 2, pages].

    Args:
        path: of the file.
        max_elements: refuse more numbers in pages than that; by default max(2^28, 256 × the file's bytes).

    Raises:
        NotASnapshotError: a safetensors file that is no snapshot.
        SnapshotHeaderError: its header or its tensors break a rule of FORMAT.md §9.6.
        ContainerError: the file around it does.
        LimitError: more than ``max_elements``.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_elements: int | None = None) -> None:
        self.container = Container(path, describe=describe_for_context)
        self._max_elements = max_elements
        try:
            self._open()
        except OSError:
            self.close()
            raise
        except FormatError as error:
            self.close()
            if not str(error).startswith(str(self.container.path)):
                error.args = (f"{self.container.path}: {error}",)
            raise

    def _open(self) -> None:
        metadata = self.container.metadata
        text = metadata.get(SNAPSHOT_KEY)
        if text is None:
            if ARCHIVE_KEY in metadata:
                raise NotASnapshotError(
                    "an archive of a context: `kvpack kv convert FILE -o OUT` makes a context of it"
                )
            raise NotASnapshotError(
                f"no {SNAPSHOT_KEY} in __metadata__: a safetensors file, but no snapshot of a KV cache (context), as "
                "`kvpack generate --save-context` writes them"
            )
        given, computed = metadata.get(SNAPSHOT_CRC_KEY), snapshot_crc32(text)
        if given != computed:
            raise SnapshotHeaderError(f"{SNAPSHOT_CRC_KEY} is {given!r}, computed {computed!r}: the header is damaged")
        self.header = header = SnapshotHeader.parse(text)
        if self.container.coded:
            raise SnapshotHeaderError(f"{min(self.container.coded)!r} is a coded tensor; a snapshot has none")
        tensors = self.container.tensors
        expected = set()
        for name, rule in array_rules(header).items():
            if name not in tensors:
                if rule.needed:
                    raise SnapshotHeaderError(f"tensor {name!r} is missing")
                continue
            expected.add(name)
            found = tensors[name]
            if not rule.fits(found.dtype, found.shape):
                shown = f"{found.dtype} {list(found.shape)}"
                raise SnapshotHeaderError(f"tensor {name!r} is {shown}; {rule.dtype} {list(rule.shape)} is needed")
            if name not in self.container.crc32:
                raise SnapshotHeaderError(f"tensor {name!r} has no CRC in {CRC_KEY}")
        formats = self.array("page_formats")
        assert formats is not None
        self.page_formats = formats
        check_page_formats(header, formats)
        check_elements(header, self.container.file.size_bytes, self._max_elements)
        for run in range(header.runs):
            for part in (part for pages in self.pages_of_run(run) for part in pages.parts):
                blob = tensors.get(part.name)
                if blob is None or blob.dtype != "U8" or len(blob.shape) != 1:
                    raise SnapshotHeaderError(f"tensor {part.name!r} is missing, or no blob of type U8")
                expected.add(part.name)
        if extra := tensors.keys() - expected:
            raise SnapshotHeaderError(f"tensor {min(extra)!r} is no part of this snapshot")

    def pages_of_run(self, run: int) -> list[RunPages]:
        """The pages of a run by side and format."""
        return run_pages(self.header, self.page_formats, run)

    def array(self, name: str) -> npt.NDArray[Any] | None:
        """A tensor that is not a blob (:func:`array_rules`), its CRC checked; None if the file has none.

        Raises:
            SnapshotHeaderError: it has numbers that it must not have.
            TensorCrcError, FileChangedError
        """
        tensor = self.container.tensors.get(name)
        if tensor is None:
            return None
        data = self.container.data(name)
        self.container.check_crc32(name, data)
        stored = np.frombuffer(data, _NUMPY_DTYPES[tensor.dtype]).reshape(tensor.shape)
        array = stored.astype(stored.dtype.newbyteorder("="))
        check_values(name, array)
        return array

    def tokens(self) -> npt.NDArray[np.int32]:
        """Token ids i32 [tokens]; −1 where they are not known."""
        found = self.array("tokens")
        assert found is not None
        return found

    def blob(self, part: RunPart) -> memoryview:
        """The bytes of a part, unchecked.

        Raises:
            FileChangedError: the file was cut or written to since it was opened.
        """
        return self.container.data(part.name)

    @property
    def page_bytes(self) -> int:
        """Of the pages in memory."""
        counts = np.stack([np.bincount(self.page_formats[:, side].reshape(-1), minlength=8) for side in Side])
        return self.header.kv_heads * sum(
            int(counts[side, f]) * self.header.page_layout(side, f).block_bytes for side in Side for f in PageFormat
        )

    def close(self) -> None:
        """Let go of the file."""
        self.container.close()


def check_replaceable(path: str | os.PathLike[str]) -> None:
    """Whether a snapshot can be written there: in place of another snapshot at most.

    Raises:
        InputError: there is a file of another kind, which is not replaced, or a directory.
    """
    shown = os.fspath(path)
    if os.path.isdir(path):
        raise InputError(f"{shown} is a directory: name a file in it, which the context is saved to")
    if os.path.exists(path):
        try:
            SnapshotFile(path).close()
        except (FormatError, OSError):
            raise InputError(f"{shown} is there, and no context: it is not replaced; name another file") from None


def snapshot_crc32(text: str) -> str:
    """What :data:`SNAPSHOT_CRC_KEY` holds for a header's text."""
    return str(zlib.crc32(text.encode()))
