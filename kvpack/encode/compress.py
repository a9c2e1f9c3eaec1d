"""What ``kvpack.compress`` does: whole files and model directories, a tensor at a time.

Memory holds the blobs of a few tensors (or those of a stack) and a few strips, whatever the model's size; sources are
read strip by strip. While one tensor is written, or its step is searched, others are coded. Outputs are written beside
their place and renamed at the end, files and directories alike.
"""

from __future__ import annotations

import json
import math
import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, astuple, dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from kvpack._version import __version__
from kvpack.encode.blob_decoder import element_limit
from kvpack.encode.calibration import Calibration, calibrated_config
from kvpack.encode.dtypes import NUMPY_DTYPES
from kvpack.encode.finished_output import check_finished
from kvpack.encode.fp8 import dequantize_tree, dequantized_config, find_fp8
from kvpack.encode.listing import listed
from kvpack.encode.model_config import CONFIG_NAME, compressed_config, read_config
from kvpack.encode.model_directory import (
    FileReport,
    copy_files,
    directory_in_place,
    json_text,
    refuse_other_files,
    size_bytes,
    sort_files,
    write_json,
)
from kvpack.encode.model_tree import ModelTree, WeightFile, folder_prefix
from kvpack.encode.moments import Moments
from kvpack.encode.nearest import CommonPlan, EncodeOptions, encode_nearest
from kvpack.encode.output_files import Crc32, Shard, added_indexes, check_target, pieces, write_indexes
from kvpack.encode.parts import PartReport, Parts, check_shards, container_crc32, divide, file_crc32
from kvpack.encode.progress import Progress
from kvpack.encode.quant_config import CODE, KEEP, QuantConfig
from kvpack.encode.rate import FineHistogram, RatePlan, step_at_bits
from kvpack.encode.rates import MAX_BITS, MIN_BITS
from kvpack.encode.row_factors import row_factors
from kvpack.encode.selection import Selection, TensorKinds, quantization_notes
from kvpack.encode.stack_encoder import encode_stack
from kvpack.encode.stored_matrices import StoredMatrices
from kvpack.encode.tensor_encoder import (
    CPU_CODER,
    Coder,
    EncodedTensor,
    Matrices,
    NotEncodableError,
    encode_lossless,
    measure,
    plan_at_common_step,
    plan_in_layout,
    planned_bytes,
    try_plan,
)
from kvpack.encode.tensor_kinds import Kind, ModuleTree
from kvpack.encode.tensor_parallel import Split, reason_not_to_split, stack_of
from kvpack.encode.threads import default_threads, map_ordered
from kvpack.errors import InputError, MomentsError, ScaleError
from kvpack.format.container import (
    BLOB_SUFFIX,
    COLUMN_SCALE_SUFFIX,
    CONTAINER_VERSION,
    CRC_KEY,
    EXPECTED_KL_KEY,
    FEEDBACK_DEVICE_KEY,
    NUMBER_DTYPES,
    PARALLEL_KEY,
    ROW_OFFSET_SUFFIX,
    SCALE_SUFFIX,
    TENSORS_KEY,
    VARIANCE_NOISE_KEY,
    VERSION_KEY,
    Container,
    ContainerWriter,
    Readable,
    StoredTensor,
)
from kvpack.format.layout import ElementKind, Layout, Quantizer

_STEP_CORRECTIONS = 4
# As many again where none of them came out below the rate.
_MORE_STEP_CORRECTIONS = 4
_STEP_MARGIN_BITS = 0.005
# By how much a count of symbols may be below what coding them takes: bits a weight, and bytes a tensor.
_COUNT_MARGIN_BITS, _COUNT_MARGIN_BYTES = 0.002, 24
# Tensors, or stacks, that are coded at once have no more bytes in the input, but for a single one that has.
_BYTES_AT_ONCE = 1 << 28
# How far below and above the model's rate sensitivities may put a tensor's.
_LESS_BITS, _MORE_BITS = 1.5, 3.0


@dataclass
class TensorReport:
    """One tensor of the output.

    ``reason`` says why it is kept, or why it is not coded as was asked for. Kept tensors: method ``keep``, and null for
    what does not apply. ``noise_db`` is over the variance where the mean matters, else over the power (FORMAT.md §9.3).
    ``expected_kl``, with sensitivities alone, is what its noise costs, in nats a token to second order.
    """

    name: str
    shape: list[int]
    dtype: str
    method: str
    layout: str | None
    bits_per_weight: float
    entropy_bits: float | None
    noise_db: float | None
    outliers: int
    bytes: int
    reason: str | None = None
    expected_kl: float | None = None


@dataclass
class CompressReport:
    """What a compression gave.

    ``bits_per_weight`` and ``noise_db`` are those of the coded tensors (the noise: the mean of the quantized tensors'
    ratios, weighted by size). ``files`` says of each file of a directory what became of it; ``left_out`` names those
    with weights in other forms that were not carried over; ``notes`` are sentences on an input that was converted
    first, on how it was found out what the tensors are, and on other quantizations, fp8 among them.

    With ``shards``, ``part`` says what this part did. Until the output is complete, all else is of the part's own
    files, and ``output`` is null.
    """

    input: str
    output: str | None
    input_bytes: int
    output_bytes: int
    ratio: float
    bits_per_weight: float | None
    noise_db: float | None
    seconds: float
    left_out: list[str] = field(default_factory=list)
    files: list[FileReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tensors: list[TensorReport] = field(default_factory=list)
    part: PartReport | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it; ``part`` only with ``shards``."""
        return {"ok": True, **{key: value for key, value in asdict(self).items() if key != "part" or value is not None}}


def default_output(source: Path) -> Path:
    """``model.safetensors`` → ``model.kvpack.safetensors``, ``dir`` → ``dir-kvpack``.

    Checkpoints of torch become files as well, and ``model.gguf`` the directory ``model-kvpack``.
    """
    source = Path(os.path.abspath(source))  # beside a symbolic link, not beside what it points to
    if source.is_dir():
        return source.with_name(source.name + "-kvpack")
    if source.suffix.lower() == ".gguf":
        return source.with_name(source.stem + "-kvpack")
    named = source.suffix.lower() in (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
    return source.with_name((source.stem if named else source.name) + ".kvpack.safetensors")


class _Model:
    """The sources of a compression, and what to do with each tensor."""

    def __init__(
        self,
        source: Path,
        target: Path,
        config: QuantConfig,
        executor: ThreadPoolExecutor,
        tensor_executor: ThreadPoolExecutor | None,
        coder: Coder,
        tensors: Readable | None,
        module_tree: ModuleTree | None,
        column_scales: Mapping[str, npt.NDArray[np.float16]],
        row_offsets: Mapping[str, npt.NDArray[np.float32]],
        token_counts: npt.NDArray[np.int64] | None,
        calibration: Calibration | None,
    ) -> None:
        self.config, self.executor, self.coder, self.calibration = config, executor, coder, calibration
        # Threads that code a tensor each, whose strips ``executor`` does; None: one tensor after the other.
        self.tensor_executor = tensor_executor
        self.token_counts = token_counts
        # Coded tensors with a row for each token, of which there are not so many as counts.
        self.without_counts: set[str] = set()
        # Quantized tensors -> whether there are moments of them.
        self.calibrated: dict[str, bool] = {}
        self.column_scales, self.row_offsets = column_scales, row_offsets
        self.tree = ModelTree(source, without=target, file=tensors)
        # How many stacks have common tables; others -> why they have not.
        self.stacks = 0
        self.stack_reasons: dict[tuple[str, ...], str] = {}
        # Coded tensor -> why it cannot be split into config.tensor_parallel parts, None if it can be.
        self.split_reasons: dict[str, str | None] = {}
        try:
            selection = Selection.from_config(config)
            for file in self.tree.weight_files:
                if file.container.coded:
                    whole = file.container.path == source or len(self.tree.weight_files) == 1
                    advice = "" if whole else f": move it out of {source}, or decompress it"
                    raise InputError(f"{file.container.path} is compressed already{advice}")
            self.fp8 = find_fp8(self.tree)
            self.dequantizes_fp8 = bool(config.dequantize_fp8)
            if self.dequantizes_fp8:
                dequantize_tree(self.tree, self.fp8)
            self.names = {name for file in self.tree.weight_files for name in file.names.values()}
            for option, pattern in selection.patterns():
                if not any(pattern.search(name) for name in self.names):
                    raise InputError(f"{option} {pattern.pattern!r} matches no tensor's name")
            for shown, vectors in (("column scales", column_scales), ("row offsets", row_offsets)):
                strange = vectors.keys() - self.names
                if strange:
                    raise InputError(f"there are {shown} for {min(strange)!r}, which is no tensor of {source}")
            # By path: what a tensor is, its own name and its folder's config.json say, what is asked for, its name in
            # the directory.
            self.selections = {f.path: replace(selection, prefix=f.set_prefix) for f in self.tree.weight_files}
            # Where every bit stays, it does not matter what a tensor is.
            all_is_exact = selection.lossless and not selection.tensor_bits and config.embeddings in (KEEP, CODE)
            modules = None if all_is_exact else module_tree
            self.kinds = {
                prefix: self._kinds_of(prefix, source, modules)
                for prefix in dict.fromkeys(f.set_prefix for f in self.tree.weight_files)
            }
        except BaseException:
            self.close()
            raise

    def _kinds_of(self, prefix: str, source: Path, modules: ModuleTree | None) -> TensorKinds:
        """What the tensors of a set of weights are, by their own names and their folder's config.json."""
        files = [file for file in self.tree.weight_files if file.set_prefix == prefix]
        tensors = {name: tensor for file in files for name, tensor in file.container.tensors.items()}
        config = read_config(source / files[0].folder) if source.is_dir() else {}
        if self.dequantizes_fp8 and self.fp8[prefix].weights:
            config = dequantized_config(config)
        return TensorKinds.of(tensors, config, modules)

    def config_of(self, folder: Path) -> dict[str, Any]:
        """config.json of a folder, as it is true of the weights that are coded."""
        config = read_config(self.tree.path / folder)
        is_dequantized = self.dequantizes_fp8 and any(fp8.config_folder == folder for fp8 in self.fp8.values())
        return dequantized_config(config) if is_dequantized else config

    def split_notes(self, reports: list[TensorReport]) -> list[str]:
        """A sentence for each reason why coded tensors cannot be split as was asked for."""
        names_of: dict[str, list[str]] = {}
        for name in [report.name for report in reports if report.method != "keep"]:
            if (reason := self.split_reasons.get(name)) is not None:
                names_of.setdefault(reason, []).append(name)
        return [
            f"tensor parallel {self.config.tensor_parallel}: {listed(names, 3)} cannot be split so ({reason}), "
            "coded as without it"
            for reason, names in names_of.items()
        ]

    def notes(self) -> list[str]:
        """What there is to say of how it was found out, and of fp8, each sentence once, with where it holds."""
        return list(
            dict.fromkeys(
                f"{prefix}: {note}" if prefix else note
                for prefix, kinds in self.kinds.items()
                for note in (*kinds.notes, *self.fp8[prefix].notes(asked=self.dequantizes_fp8))
            )
        )

    def vector_notes(self, reports: list[TensorReport]) -> list[str]:
        """Which tensors go without the vectors that were given for them."""
        exact = {report.name for report in reports if report.method in ("keep", "lossless")}
        unused = sorted(exact & (self.column_scales.keys() | self.row_offsets.keys()))
        return [f"not quantized, so without column scales and row offsets: {listed(unused, 3)}"] * bool(unused)

    def check_moments(self) -> None:
        """Before anything long: whether the moments are of this model.

        Raises:
            MomentsError: they are of no tensor, or of tensors of other shapes.
        """
        if self.calibration is None:
            return
        for file in self.tree.weight_files:
            kinds = self.kinds[file.set_prefix]
            for tensor in file.container.tensors.values():
                if self.selections[file.path].reason_to_keep(tensor, kinds) is None:
                    self.matrices(file, tensor)
                    self.calibration.compare(file.names[tensor.name], file.container, tensor.name)
        if not any(self.calibrated.values()):
            raise MomentsError(
                f"{self.calibration.moments.path} has moments of no tensor that is quantized at a rate: they are of "
                "another model, or none is"
            )

    def calibration_notes(self) -> list[str]:
        """How the moments were used, and which tensors that are quantized have none."""
        if self.calibration is None:
            return []
        found = sum(self.calibrated.values())
        steps = {"sensitivity": "steps by sensitivity", "model": "one step"}.get(self.config.allocation, "equal rates")
        notes = [f"calibrated: {found} of {len(self.calibrated)} tensors with feedback, {steps}"]
        if without := sorted(name for name, has in self.calibrated.items() if not has):
            notes.append(f"no moments, so rounded each for itself: {listed(without, 3)}")
        compared = self.calibration.same_weights
        if others := sorted(name for name, is_same in compared.items() if not is_same):
            notes.append(
                f"{self.calibration.moments.path} has moments of other weights than {self.tree.path}: {len(others)} of "
                f"{len(compared)} tensors differ ({listed(others, 3)}); of a fine-tune's base they serve, of another "
                "model they do not: kvpack moments makes those of this one"
            )
        return notes

    def trellis_notes(self, reports: list[TensorReport]) -> list[str]:
        """Which tensors have no trellis though it was asked for."""
        if self.config.quantizer != "trellis":
            return []
        rounded = sorted(report.name for report in reports if report.method == "uniform")
        others = f"; each weight for itself: {listed(rounded, 3)}" if rounded else ""
        return [f"trellis: {sum(report.method == 'trellis' for report in reports)} tensors{others}"]

    def all_notes(self, reports: list[TensorReport]) -> list[str]:
        """All that there is to say of the tensors that are reported."""
        return [
            *self.notes(),
            *self.vector_notes(reports),
            *self.count_notes(),
            *self.split_notes(reports),
            *self.stack_notes(),
            *self.calibration_notes(),
            *self.trellis_notes(reports),
            *quantization_notes(report.reason for report in reports),
        ]

    def decisions_crc32(self, file: WeightFile) -> str:
        """What the tensors of a file were found to be, eight digits."""
        selection, kinds = self.selections[file.path], self.kinds[file.set_prefix]
        found = [
            (
                tensor.name,
                selection.reason_to_keep(tensor, kinds),
                tensor.name in kinds.transposed,
                kinds.has_row_for_each_token(tensor),
            )
            for tensor in file.container.tensors.values()
        ]
        return f"{zlib.crc32(json.dumps(found).encode()):08x}"

    def findings_of(self, file: WeightFile, stacks_before: int) -> dict[str, Any]:
        """What coding a file found that notes tell, as JSON has it."""
        names = set(file.names.values())
        return {
            "stacks": self.stacks - stacks_before,
            "stack_reasons": [
                [list(stack), reason]
                for stack, reason in sorted(self.stack_reasons.items())
                if not names.isdisjoint(stack)
            ],
            "split_reasons": {name: reason for name, reason in self.split_reasons.items() if name in names},
            "without_counts": sorted(self.without_counts & names),
        }

    def take_findings(self, findings: Mapping[str, Any]) -> None:
        """Take over what :meth:`findings_of` gave in another process."""
        self.stacks += findings["stacks"]
        self.stack_reasons |= {tuple(stack): reason for stack, reason in findings["stack_reasons"]}
        self.split_reasons |= findings["split_reasons"]
        self.without_counts |= set(findings["without_counts"])

    def close(self) -> None:
        self.tree.close()

    @staticmethod
    def bytes_of(files: Iterable[WeightFile]) -> int:
        """What the tensors of some files take in the input."""
        return sum(tensor.size_bytes for file in files for tensor in file.container.tensors.values())

    def matrices(self, file: WeightFile, tensor: StoredTensor) -> Matrices:
        transposed = tensor.name in self.kinds[file.set_prefix].transposed
        weights = StoredMatrices(file.container, tensor, transposed=transposed)
        parts = self.config.tensor_parallel
        # Experts in one tensor may be stored outputs × inputs or inputs × outputs: names do not tell.
        split = Split.of(tensor.name) if len(tensor.shape) == 2 else Split.EITHER
        if parts > 1:
            reason = reason_not_to_split(split, weights.rows, weights.cols, self.config.tile_cols, parts)
            self.split_reasons[file.names[tensor.name]] = reason
            if reason is None and split in (Split.INPUTS, Split.EITHER):
                weights.column_parts = parts
        if members := self.stack_members(file, tensor):
            weights.stacked_rows = sum(member.shape[0] for member in members)
        if self.config.quantizer == "trellis":
            weights.quantizer = Quantizer.TRELLIS
        name = file.names[tensor.name]
        try:
            weights.set_vectors(self.column_scales.get(name), self.row_offsets.get(name))
        except ScaleError as error:
            error.args = (f"tensor {name!r}: {error}",)
            raise
        if self.calibration is not None and self.is_at_rate(file, tensor):
            kinds = self.kinds[file.set_prefix]
            if kinds.has_row_for_each_token(tensor):
                looked_up = kinds.kind_of(tensor) is Kind.EMBEDDING
                self.calibrated[name] = self.calibration.prepare_table(name, weights, looked_up=looked_up)
            else:
                self.calibrated[name] = self.calibration.prepare(name, weights)
        return weights

    def is_at_rate(self, file: WeightFile, tensor: StoredTensor) -> bool:
        """Whether a coded tensor is quantized at a rate."""
        selection, kinds = self.selections[file.path], self.kinds[file.set_prefix]
        return selection.is_lossy(tensor, kinds) and isinstance(selection.quality_of(tensor, kinds), float)

    def stack_members(self, file: WeightFile, tensor: StoredTensor) -> list[StoredTensor]:
        """What a tensor is stacked with, itself included; none if not asked for, or if it cannot be: notes say why."""
        names = stack_of(tensor.name) if self.config.stack else ()
        if not names or len(tensor.shape) != 2:
            return []
        tensors, kinds, selection = file.container.tensors, self.kinds[file.set_prefix], self.selections[file.path]
        wanted = [file.set_prefix + name for name in names]
        members = [tensors[name] for name in names if name in tensors]
        reason = None
        if not self.names.issuperset(wanted):
            return []  # a model whose layers only have such names
        if len(members) < len(names):
            reason = "they are in different files"
        elif any(selection.reason_to_keep(member, kinds) is not None for member in members):
            reason = "some are kept as they are"
        elif len({(member.dtype, member.shape[1:]) for member in members}) > 1:
            reason = "their dtypes or inputs differ"
        elif len({selection.quality_of(member, kinds) for member in members}) > 1:
            reason = "their rates differ"
        elif kinds.transposed & set(names):
            reason = "they are stored as inputs × outputs"
        if reason is not None:
            self.stack_reasons[tuple(wanted)] = reason
        return [] if reason is not None else members

    def stack_notes(self) -> list[str]:
        """What became of stacks, if they were asked for."""
        if not self.config.stack:
            return []
        stacks_of: dict[str, list[str]] = {}
        for names, reason in sorted(self.stack_reasons.items()):  # they were found in an order that threads change
            stacks_of.setdefault(reason, []).append(" + ".join(names))
        sets = "set of layers has" if self.stacks == 1 else "sets of layers have"
        return [f"stack: {self.stacks} {sets} common tables"] + [
            f"stack: {listed(stacks, 3)} cannot be one ({reason}), coded as without it"
            for reason, stacks in stacks_of.items()
        ]

    def common_step_tensors(self) -> list[tuple[WeightFile, StoredTensor]]:
        """Those that share the rate; tables of tokens do if none is theirs, and it is known what errors cost there."""
        with_tables = self.config.allocation == "sensitivity" and self.config.embeddings == CODE
        return [
            (file, tensor)
            for file in self.tree.weight_files
            for selection, kinds in [(self.selections[file.path], self.kinds[file.set_prefix])]
            for tensor in file.container.tensors.values()
            if selection.reason_to_keep(tensor, kinds) is None
            and selection.is_lossy(tensor, kinds)
            and not selection.has_own_rate(tensor.name)
            and (with_tables or not kinds.has_row_for_each_token(tensor))
        ]

    def encode(
        self,
        file: WeightFile,
        tensor: StoredTensor,
        plan: CommonPlan | None,
        less_bits: float = 0.0,
        layout: Layout | None = None,
    ) -> EncodedTensor:
        """One tensor by whatever method the options say; with a rate, at one that is ``less_bits`` lower.

        A ``layout`` is prescribed for numbers of its kind.
        """
        config, selection = self.config, self.selections[file.path]
        weights = self.matrices(file, tensor)
        weights.layout = layout
        kinds = self.kinds[file.set_prefix]
        if not selection.is_lossy(tensor, kinds):
            return encode_lossless(weights, tensor.dtype, config.tile_cols, config.layout, self.executor, self.coder)
        quality = selection.quality_of(tensor, kinds)
        if isinstance(quality, float):
            self.set_row_factors(file, tensor, weights)
        if isinstance(quality, float) and less_bits:
            quality = max(MIN_BITS, quality - less_bits)
        return encode_nearest(
            weights,
            tensor.dtype,
            quality,
            plan,
            EncodeOptions(config.layout, config.tile_cols, self.executor, self.coder),
        )

    def set_row_factors(self, file: WeightFile, tensor: StoredTensor, weights: Matrices) -> None:
        """Let rows have unlike steps where a tensor has a row for each token."""
        if not self.kinds[file.set_prefix].has_row_for_each_token(tensor):
            return
        name, counts = file.names[tensor.name], self.token_counts
        table = None if self.calibration is None else self.calibration.table(name)
        frequencies = None
        if table is not None:
            frequencies = table.frequencies
        elif counts is not None and len(counts) != weights.rows:
            self.without_counts.add(name)
        elif counts is not None:
            frequencies = counts.astype(np.float64) + 1
        factors = row_factors(weights, frequencies, self.executor)
        weights.set_vectors(weights.column_scales, weights.row_offsets, factors)

    def count_notes(self) -> list[str]:
        """Which tensors have not as many rows as there are token counts."""
        if self.token_counts is None or not self.without_counts:
            return []
        names = listed(sorted(self.without_counts), 3)
        return [
            f"token counts are of {len(self.token_counts)} tokens; coded without them, as it has other rows: {names}"
        ]

    def encode_stack(
        self, file: WeightFile, members: list[StoredTensor]
    ) -> tuple[dict[str, EncodedTensor], str | None]:
        """Tensors that will be stacked, as :func:`kvpack.encode.stack_encoder.encode_stack` gives them."""
        tensors = {member.name: member for member in members}
        quality = self.selections[file.path].quality_of(members[0], self.kinds[file.set_prefix])
        return encode_stack(
            {name: math.prod(member.shape) for name, member in tensors.items()},
            lambda name, less_bits, layout: self.encode(file, tensors[name], None, less_bits, layout),
            quality if isinstance(quality, float) else None,
            self.executor,
        )

    def encode_together(
        self, file: WeightFile, members: list[StoredTensor], plans: Mapping[str, CommonPlan]
    ) -> _Together:
        """A tensor, or those of a stack; may be used by several threads."""
        stacked, reason = self.encode_stack(file, members) if len(members) > 1 else ({}, None)
        found: dict[str, EncodedTensor | str] = {**stacked}
        for member in members:
            if member.name not in found:
                try:
                    found[member.name] = self.encode(file, member, plans.get(file.names[member.name]))
                except NotEncodableError as error:
                    found[member.name] = str(error)
        return _Together([member.name for member in members], found, reason)

    def encode_all(
        self, file: WeightFile, tensors: Iterable[StoredTensor], plans: Mapping[str, CommonPlan]
    ) -> Generator[dict[str, EncodedTensor | str]]:
        """Code tensors, several at once if there are threads for that, in their order.

        Yields:
            Each tensor by its name, or why it is to be kept; with the first one of a stack all of its.
        """

        def groups() -> Iterator[list[StoredTensor]]:
            begun: set[str] = set()
            for tensor in tensors:
                if tensor.name not in begun:
                    group = self.stack_members(file, tensor) or [tensor]
                    begun |= {member.name for member in group}
                    yield group

        def cost(group: list[StoredTensor]) -> int:
            return max(sum(member.size_bytes for member in group), _BYTES_AT_ONCE // self.coder.tensors_at_once)

        def work(group: list[StoredTensor]) -> _Together:
            return self.encode_together(file, group, plans)

        # Strips that are not begun need not be: those who wait for them end.
        stop = partial(self.executor.shutdown, wait=False, cancel_futures=True)
        done = map_ordered(work, groups(), self.tensor_executor, ahead=_BYTES_AT_ONCE, cost=cost, give_up=stop)
        with closing(done):
            for names, found, reason in done:
                if len(names) > 1 and reason is None:
                    self.stacks += 1
                elif reason is not None:
                    self.stack_reasons[tuple(file.set_prefix + name for name in names)] = reason
                yield found


class _Together(NamedTuple):
    """Tensors that were coded together, or why each is to be kept, and why a stack is none in the end."""

    names: list[str]
    found: dict[str, EncodedTensor | str]
    reason: str | None


# Asked for what a stage of the search for common steps finds of all tensors, which ``work`` gives of those of a file: a
# name and what JSON has at a time.
_Share = Callable[[str, Callable[[WeightFile], Iterator[tuple[str, Any]]]], dict[str, Any]]


class _Measured(NamedTuple):
    """A tensor that shares a step with others: by what its own step is that step times, and the least and the most."""

    weights: Matrices
    fine: FineHistogram
    factor: float
    least: float
    most: float


def _measure_all(model: _Model, progress: Progress, share: _Share) -> dict[str, _Measured]:
    """The tensors that have steps in common.

    With sensitivities a step is that of the model over the root of the tensor's importance, and no tensor gets a rate
    that is far from the model's: what is said of small errors holds for these alone.
    """
    bits = model.config.bits
    assert bits is not None
    common = model.common_step_tensors()
    weights_of = {file.names[tensor.name]: model.matrices(file, tensor) for file, tensor in common}

    def of_file(file: WeightFile) -> Iterator[tuple[str, Any]]:
        for tensor in [tensor for other, tensor in common if other is file]:
            name = file.names[tensor.name]
            progress.tensor(name)
            weights = weights_of[name]
            model.set_row_factors(file, tensor, weights)
            try:
                fine = measure(weights, model.executor)
            except NotEncodableError:
                continue
            if fine.rms <= 0 or (weights.feedback is not None and fine.tells_values_apart(bits)):
                continue
            if model.config.allocation == "model":
                yield name, [fine.packed(), 1.0, 0.0, math.inf]
                continue
            assert model.calibration is not None
            importance = model.calibration.importance(name, weights)
            if importance is not None:
                lowest, highest = max(MIN_BITS, bits - _LESS_BITS), min(MAX_BITS, bits + _MORE_BITS)
                least, most = step_at_bits(fine, highest), step_at_bits(fine, lowest)
                yield name, [fine.packed(), importance**-0.5, float(least), float(most)]

    found = share("measure", of_file)
    for file, tensor in common:
        name = file.names[tensor.name]
        if name in found and weights_of[name].row_factors is None:  # found by another process
            model.set_row_factors(file, tensor, weights_of[name])
    return {
        name: _Measured(weights_of[name], FineHistogram.unpacked(fine), *numbers)
        for name, (fine, *numbers) in found.items()
    }


def _common_step_plans(model: _Model, progress: Progress, share: _Share) -> dict[str, CommonPlan]:
    """One step for all tensors, or one in proportion for each, such that together they take the rate.

    One step is equal slope: the least total squared error. Steps by sensitivity: the least expected KL.
    """
    config, bits = model.config, model.config.bits
    assert bits is not None
    measured = _measure_all(model, progress, share)
    if not measured:
        return {}
    total = sum(tensor.weights.size for tensor in measured.values())
    # What tensors take beyond what their histograms predict, in bits a weight.
    beyond = dict.fromkeys(measured, 0.0)

    # By tensor and step: solutions begin alike, and steps that are too fine, or too coarse, are all one.
    known: dict[tuple[str, float], RatePlan] = {}

    def plans_at(step: float) -> tuple[float, dict[str, CommonPlan]]:
        plans: dict[str, CommonPlan] = {}
        used = 0.0
        for name, (weights, fine, factor, least, most) in measured.items():
            own = min(max(step * factor, least), most)
            if (name, own) not in known:
                known[name, own] = plan_at_common_step(weights, fine, own, config.layout, config.tile_cols)
            plans[name] = fine, known[name, own]
            used += (plans[name][1].predicted.bits + beyond[name]) * weights.size
        return used / total, plans

    # Bounds of the common step: that of the tensor which gets the finest, or the coarsest, for its spread.
    units = [tensor.fine.rms / tensor.factor for tensor in measured.values()]
    low, high = math.log2(min(units)) - 8, math.log2(max(units)) + 3

    def solve(target: float) -> dict[str, CommonPlan]:
        under, over = low, high
        _, plans = plans_at(2.0**over)
        for _ in range(14):
            middle = (under + over) / 2
            used, trial = plans_at(2.0**middle)
            if used > target:
                under = middle
            else:
                over, plans = middle, trial
        return plans

    def round_where_better(plans: dict[str, CommonPlan]) -> None:
        """Let tensors have no trellis that have less noise then, at equal bits."""

        def of_file(file: WeightFile) -> Iterator[tuple[str, bool]]:
            for name in [name for name in file.names.values() if name in measured]:
                weights, fine, *_ = measured[name]
                plan = plans[name][1]
                if plan.layout.quantizer == Quantizer.SCALAR:
                    continue
                progress.tensor(name)
                asked, weights.quantizer = weights.quantizer, Quantizer.SCALAR
                rounded = plan_at_common_step(weights, fine, plan.step, config.layout, config.tile_cols)
                noise, noise_rounded = (
                    try_plan(weights, fine, tried, config.tile_cols, model.executor).noise_at_equal_bits
                    for tried in (plan, rounded)
                )
                weights.quantizer = asked
                yield name, bool(noise <= noise_rounded)

        for name, is_better in share("trellis", of_file).items():
            if not is_better:
                measured[name].weights.quantizer = Quantizer.SCALAR
                known.clear()

    most = bits - _COUNT_MARGIN_BITS - 8 * _COUNT_MARGIN_BYTES * len(measured) / total
    aim = most - _STEP_MARGIN_BITS / 2
    if config.quantizer == "trellis":
        round_where_better(solve(aim))
    best: tuple[float, dict[str, CommonPlan]] | None = None
    for attempt in range(_STEP_CORRECTIONS + _MORE_STEP_CORRECTIONS):
        if attempt >= _STEP_CORRECTIONS and best is not None:
            break
        progress.tensor("steps")
        plans = solve(aim)
        # The histograms leave table rounding out; a pass over the weights counts what the tensors really take.
        counted = 0.0
        for name, size in share(
            f"bytes-{attempt}", partial(_planned_bytes_of, model, measured, plans, progress)
        ).items():
            weights = measured[name].weights
            beyond[name] = 8 * size / weights.size - plans[name][1].predicted.bits
            counted += size
        achieved = 8 * counted / total
        if achieved <= most and (best is None or achieved > best[0]):
            best = achieved, plans
        if achieved > most and attempt >= _STEP_CORRECTIONS - 1:
            aim -= achieved - most  # small tensors take a byte more or less, whatever was counted before
        if most - 2 * _STEP_MARGIN_BITS <= achieved <= most:
            break
    return plans if best is None else best[1]


def _planned_bytes_of(
    model: _Model,
    measured: Mapping[str, _Measured],
    plans: Mapping[str, CommonPlan],
    progress: Progress,
    file: WeightFile,
) -> Iterator[tuple[str, float]]:
    """What the tensors of a file take by their plans."""
    assert model.config.bits is not None
    for name in [name for name in file.names.values() if name in measured]:
        progress.tensor(name)
        weights = measured[name].weights
        try:
            size = planned_bytes(weights, *plans[name], model.config.tile_cols, model.executor, model.coder)
        except NotEncodableError:  # it will be kept; the others get their rate as if it were not
            size = model.config.bits * weights.size / 8
        yield name, float(size)


def _encode_file(
    model: _Model,
    file: WeightFile,
    plans: dict[str, CommonPlan],
    writer: ContainerWriter | None,
    progress: Progress,
    reports: list[TensorReport],
) -> tuple[dict[str, str], Shard]:
    """Encode one file's tensors into ``writer`` (None: a dry run); returns its metadata and its contents."""
    container, selection = file.container, model.selections[file.path]
    entries: dict[str, dict[str, Any]] = {}
    crc32: dict[str, int] = {}
    shard = Shard(file.path)
    kept: list[tuple[StoredTensor, str]] = []
    beside: list[tuple[str, str, npt.NDArray[Any]]] = []  # blobs

    def add(name: str, suffix: str, dtype: str, shape: list[int], size_bytes: int, data: Iterable[memoryview]) -> None:
        if writer is not None:
            writer.add(name + suffix, dtype, shape, data)
        else:
            deque(data, maxlen=0)  # a dry run reads what a real one would
        shard.add(name + suffix, name, size_bytes)

    to_code: list[StoredTensor] = []
    for tensor in container.tensors.values():
        reason = selection.reason_to_keep(tensor, model.kinds[file.set_prefix])
        if reason is None:
            to_code.append(tensor)
        else:
            kept.append((tensor, reason))
    found: dict[str, EncodedTensor | str] = {}
    coded_elements = coded_bytes = 0
    with closing(model.encode_all(file, to_code, plans)) as coded:
        for tensor in to_code:
            progress.tensor(file.names[tensor.name])
            if tensor.name not in found:
                found |= next(coded)
            encoded = found.pop(tensor.name)
            if isinstance(encoded, str):
                kept.append((tensor, encoded))
                continue
            if encoded.size_bytes >= tensor.size_bytes:
                kept.append((tensor, "coding does not make it smaller"))
                continue
            elements = math.prod(tensor.shape)
            size = encoded.blob.size_bytes
            if elements > element_limit(size) or coded_elements + elements > element_limit(coded_bytes + size):
                kept.append((tensor, "nearly all equal: readers refuse to expand so much from so few bytes"))
                continue
            coded_elements, coded_bytes = coded_elements + elements, coded_bytes + size
            name = tensor.name
            blob = encoded.blob
            parts = memoryview(blob.front), memoryview(blob.payload)
            add(name, BLOB_SUFFIX, "U8", [blob.size_bytes], blob.size_bytes, chain.from_iterable(map(pieces, parts)))
            shard.blob_bytes[name] = blob.size_bytes
            for suffix, numbers, dtype in (
                (SCALE_SUFFIX, encoded.scales, "<f4"),
                (ROW_OFFSET_SUFFIX, encoded.row_offsets, "<f4"),
                (COLUMN_SCALE_SUFFIX, encoded.column_scales, "<f2"),
            ):
                if numbers is not None:
                    beside.append((name, suffix, np.ascontiguousarray(numbers, dtype)))
            report = TensorReport(
                name=file.names[name],
                shape=list(tensor.shape),
                dtype=tensor.dtype,
                method=encoded.method,
                layout=encoded.layout.name,
                bits_per_weight=round(8 * encoded.size_bytes / elements, 6),
                entropy_bits=round(encoded.blob.entropy_bits_per_element, 6),
                noise_db=_rounded(encoded.noise_db if encoded.variance_noise_db is None else encoded.variance_noise_db),
                outliers=encoded.blob.outlier_count,
                bytes=encoded.size_bytes,
                reason=encoded.reason,
                expected_kl=None if encoded.expected_kl is None else float(f"{encoded.expected_kl:.6g}"),
            )
            reports.append(report)
            entries[name] = {
                key: getattr(report, key)
                for key in (
                    "shape", "dtype", "method", "layout", "bits_per_weight", "entropy_bits", "noise_db", "outliers"
                )
            }  # fmt: skip
            entries[name]["noise_db"] = _rounded(encoded.noise_db)
            if encoded.variance_noise_db is not None:
                entries[name][VARIANCE_NOISE_KEY] = report.noise_db
            if model.config.tensor_parallel > 1 and model.split_reasons[file.names[name]] is None:
                entries[name][PARALLEL_KEY] = model.config.tensor_parallel
            if report.expected_kl is not None:
                entries[name][EXPECTED_KL_KEY] = report.expected_kl
            if encoded.feedback_device is not None:
                entries[name][FEEDBACK_DEVICE_KEY] = encoded.feedback_device
            progress.advance(tensor.size_bytes)

    def add_beside(alignment: int) -> None:
        """Those of a type as wide as this, or wider."""
        for name, suffix, values in [entry for entry in beside if entry[2].itemsize >= alignment]:
            data = values.data.cast("B")
            crc32[name + suffix] = zlib.crc32(data)
            add(name, suffix, NUMBER_DTYPES[suffix], [len(values)], len(data), [data])
        beside[:] = [entry for entry in beside if entry[2].itemsize < alignment]

    # Widest dtypes first, so that each tensor stays aligned to its own size behind blobs of 16-byte multiples.
    for tensor, reason in sorted(kept, key=lambda item: (-_alignment(item[0]), item[0].begin)):
        add_beside(_alignment(tensor))
        progress.tensor(file.names[tensor.name])
        computed = Crc32(container.pieces(tensor.name))
        add(tensor.name, "", tensor.dtype, list(tensor.shape), tensor.size_bytes, computed)
        crc32[tensor.name] = computed.value
        elements = math.prod(tensor.shape)
        reports.append(
            TensorReport(
                name=file.names[tensor.name],
                shape=list(tensor.shape),
                dtype=tensor.dtype,
                method="keep",
                layout=None,
                bits_per_weight=8 * tensor.size_bytes / elements if elements else 0.0,
                entropy_bits=None,
                noise_db=None,
                outliers=0,
                bytes=tensor.size_bytes,
                reason=reason,
            )
        )
        progress.advance(tensor.size_bytes)
    add_beside(0)
    metadata = dict(container.metadata)
    metadata[VERSION_KEY] = CONTAINER_VERSION
    metadata[TENSORS_KEY] = json.dumps(entries, separators=(",", ":"))
    metadata[CRC_KEY] = json.dumps(crc32, separators=(",", ":"))
    return metadata, shard


def _checked_counts(token_counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    counts = np.asarray(token_counts)
    if counts.ndim != 1 or counts.dtype.kind not in "iu" or not len(counts) or int(counts.min()) < 0:
        raise InputError(
            f"token_counts are {counts.dtype} {list(counts.shape)}: a row of integers is wanted, none below 0, one for "
            "each token of the vocabulary"
        )
    return counts.astype(np.int64)


def _rounded(decibels: float | None) -> float | None:
    return None if decibels is None else round(decibels, 4)


def _alignment(tensor: StoredTensor) -> int:
    dtype = NUMPY_DTYPES.get(tensor.dtype)
    return dtype.itemsize if dtype is not None else 1


def compress(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    config: QuantConfig | None = None,
    *,
    threads: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    coder: Coder = CPU_CODER,
    file: Readable | None = None,
    module_tree: ModuleTree | None = None,
    column_scales: Mapping[str, npt.NDArray[np.float16]] | None = None,
    row_offsets: Mapping[str, npt.NDArray[np.float32]] | None = None,
    token_counts: npt.NDArray[np.int64] | None = None,
    moments: str | os.PathLike[str] | None = None,
    shards: tuple[int, int] | None = None,
) -> CompressReport:
    """Compress a .safetensors file or a model directory: see :func:`kvpack.compress`.

    Args:
        coder: who quantizes, counts and codes; whoever it is, the bytes are the same, but with moments.
        file: what is read in place of a file at ``path``, which is a name alone then.
        module_tree: who says what a directory's tensors are where their names leave doubt; None: names alone do.
        column_scales, row_offsets: tensor → vector, see :meth:`.tensor_encoder.Matrices.set_vectors`. A tensor that is
            not quantized after all goes without; a note says so.
        token_counts: see :func:`kvpack.compress`; those of ``moments`` by default.
        moments: a moments file of this model (:mod:`.moments`): what is quantized at a rate is quantized with feedback.
        shards: which part of the output to make, of how many: see :mod:`.parts`.

    Raises:
        PartsMismatchError: other parts have other options or another source.
        DamagedPartError: another part's file is damaged, and so the output cannot be completed.
        MomentsError: the moments are damaged, or another model's.
        ScaleError: a vector that does not fit its tensor.
        InputError: the input, the output or the number of threads cannot be used.
        FormatError: the input is damaged.
        OSError: reading or writing failed; no output is left.
    """
    began = time.perf_counter()
    progress = progress or Progress()
    source = Path(path)
    config = QuantConfig() if config is None else config
    if moments is None and (config.allocation == "sensitivity" or config.calibration is not None):
        what = "allocation 'sensitivity'" if config.calibration is None else "options of a calibrated compression"
        raise InputError(f"{what} without moments: give a file of them, which kvpack moments makes")
    if moments is not None and config.bits is None and not _has_rates(config):
        raise InputError(f"preset {config.preset!r} and moments exclude each other: moments serve a rate, as bits=4.25")
    target = Path(out) if out is not None else default_output(source)
    check_target(source, target, force=force or dry_run or shards is not None, exists=file is None)
    if shards is not None:
        _check_part(source, target, shards, force=force, dry_run=dry_run)
    if threads is not None and threads < 1:
        raise InputError(f"{threads} threads: at least 1 is needed")
    if config.quantizer == "trellis":
        coder = coder.with_trellis()
    reports: list[TensorReport] = []
    threads = threads or default_threads()
    executor = ThreadPoolExecutor(threads)
    with ExitStack() as stack:
        tensor_executor = None
        # Factors of moments are kept for one tensor after the other; what is read in place of a file has one at hand.
        if threads > 1 and coder.tensors_at_once > 1 and moments is None and file is None:
            # No more than were asked for: each searches a step by itself, beside the threads of strips.
            tensor_executor = ThreadPoolExecutor(min(threads, coder.tensors_at_once))
            stack.callback(tensor_executor.shutdown, cancel_futures=True)
        stack.callback(executor.shutdown, cancel_futures=True)
        calibration = None
        if moments is not None:
            factor_executor = ThreadPoolExecutor(threads)
            stack.callback(factor_executor.shutdown, cancel_futures=True)
            given = None if token_counts is None else _checked_counts(token_counts)
            found = stack.enter_context(Moments(moments))
            calibration = Calibration(found, coder, factor_executor, target.parent, given)
            config = calibrated_config(config, calibration)
            token_counts = calibration.token_counts
        model = _Model(
            source,
            target,
            config,
            executor,
            tensor_executor,
            coder,
            file,
            module_tree,
            column_scales or {},
            row_offsets or {},
            None if token_counts is None else _checked_counts(token_counts),
            calibration,
        )
        try:
            files = _file_reports(model, source)
            # What comes along counts on both sides of the ratio; other forms of the weights on neither.
            input_bytes = sum(file.size_bytes for file in files if file.action != "left out")
            carried = [Path(file.path) for file in files if file.action == "copied"]
            copied_bytes = sum(file.size_bytes for file in files if file.action == "copied")
            if shards is None:
                progress.total(model.bytes_of(model.tree.weight_files) + (0 if dry_run else copied_bytes))
            if source.is_dir() and not dry_run and shards is None:
                written = [Path(file.path) for file in files if file.action != "left out"]
                written += [index.path for index in added_indexes(model.tree)]
                written += [Path(CONFIG_NAME)] if _adds_config(model.tree) else []
                refuse_other_files(target, written)
            model.check_moments()
            plans: dict[str, CommonPlan] = {}
            part: PartReport | None = None
            if shards is None and _has_common_steps(config):
                plans = _common_step_plans(model, progress, partial(_found_alone, model))
            if shards is not None:
                parts = Parts(target, _job(model, files, moments))
                if parts.was_there:
                    part, records, output_bytes = _finished_part(model, parts, shards, threads)
                else:
                    part, records, output_bytes = _compress_part(model, source, parts, shards, progress, carried)
                reports += [TensorReport(**tensor) for record in records.values() for tensor in record["tensors"]]
                if len(records) < len(model.tree.weight_files) and not parts.was_there:
                    files = [file for file in files if Path(file.path) in records]
                    input_bytes = sum(file.size_bytes for file in files)
            elif dry_run:
                output_bytes = copied_bytes + _dry_run(model, source, plans, progress, reports)
            elif source.is_dir():
                output_bytes = _compress_directory(model, source, target, plans, progress, reports, carried)
            else:
                output_bytes = _compress_file(model, target, plans, progress, reports)
        finally:
            model.close()
    return _report(
        source,
        None if dry_run or (part is not None and not part.joined) else target,
        input_bytes,
        output_bytes,
        reports,
        files if source.is_dir() else [],
        [str(file) for file in model.tree.passed_over],
        model.all_notes(reports),
        time.perf_counter() - began,
        part,
    )


def _has_rates(config: QuantConfig) -> bool:
    """Whether some tensors have a rate beside the preset of all others."""
    return any(isinstance(rate, float) for rate in (*config.tensor_bits.values(), config.embeddings))


def _file_reports(model: _Model, source: Path) -> list[FileReport]:
    """What becomes of each file of the input."""
    tree = model.tree
    reports = []
    for file in tree.weight_files:
        size = file.container.file.size_bytes
        reports.append(FileReport(str(file.path), size, "coded", _reason_for_set(file)))
    if not source.is_dir():
        return reports
    rewritten = [index.path for index in tree.indexes]
    rewritten += [folder / CONFIG_NAME for folder in tree.folders if (source / folder / CONFIG_NAME).exists()]
    reports += [FileReport(str(path), (source / path).stat().st_size, "rewritten") for path in rewritten]
    copied, left_out = sort_files(source, tree)
    return reports + copied + left_out


def _adds_config(tree: ModelTree) -> bool:
    """Whether the output gets a config.json of its own: a pipeline and folders without one are no model to load."""
    return any(file.reason is None for file in tree.files_of(Path()))


def _reason_for_set(file: WeightFile) -> str | None:
    """What is to be said of a file that is not all of its folder's model."""
    copies = [own for own, name in file.names.items() if name != file.set_prefix + own]
    if copies:
        return f"the index takes {listed(copies, 3)} from another file: coded here, too, as a copy that does not count"
    return file.reason


def _report(
    source: Path,
    target: Path | None,
    input_bytes: int,
    output_bytes: int,
    reports: list[TensorReport],
    files: list[FileReport],
    passed_over: list[str],
    notes: list[str],
    seconds: float,
    part: PartReport | None,
) -> CompressReport:
    coded = [report for report in reports if report.method != "keep"]
    weights = sum(math.prod(report.shape) for report in coded)
    noise = [(math.prod(report.shape), 10 ** (report.noise_db / 10)) for report in coded if report.noise_db is not None]
    noisy = sum(size for size, _ in noise)
    return CompressReport(
        input=str(source),
        output=None if target is None else str(target),
        input_bytes=input_bytes,
        output_bytes=output_bytes,
        ratio=round(input_bytes / output_bytes, 6) if output_bytes else 1.0,  # a part may have no files
        bits_per_weight=round(8 * sum(r.bytes for r in coded) / weights, 6) if weights else None,
        noise_db=(round(10 * math.log10(sum(size * ratio for size, ratio in noise) / noisy), 4) if noise else None),
        seconds=round(seconds, 3),
        left_out=[f.path for f in files if f.action == "left out" and f.path not in passed_over],
        files=files,
        notes=notes,
        tensors=sorted(reports, key=lambda report: report.name),
        part=part,
    )


def _file_bytes(metadata: dict[str, str], shard: Shard) -> int:
    """About what a file takes that a dry run does not write."""
    header = sum(len(name) + 80 for name in shard.stored)
    return 8 + sum(shard.stored_bytes.values()) + header + sum(map(len, metadata.values()))


def _compress_file(
    model: _Model, target: Path, plans: dict[str, CommonPlan], progress: Progress, reports: list[TensorReport]
) -> int:
    """Write the output of the model's single file; returns its size."""
    with ContainerWriter(target) as writer:
        metadata, _ = _encode_file(model, model.tree.weight_files[0], plans, writer, progress, reports)
        return writer.finish(metadata)


def _dry_run(
    model: _Model, source: Path, plans: dict[str, CommonPlan], progress: Progress, reports: list[TensorReport]
) -> int:
    """About what the files take that would be written."""
    encoded = [_encode_file(model, file, plans, None, progress, reports) for file in model.tree.weight_files]
    total = sum(_file_bytes(metadata, shard) for metadata, shard in encoded)
    if source.is_dir():
        configs = _configs(model, source, [shard for _, shard in encoded])
        total += sum(len(json_text(config)) for _, config in configs)
    return total


def _configs(model: _Model, source: Path, shards: list[Shard]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folders of the output that have a config.json, and what stands in it."""
    tree = model.tree
    for folder in tree.folders:
        exists = (source / folder / CONFIG_NAME).exists()
        if not exists and not (folder == Path() and _adds_config(tree)):
            continue
        prefix = folder_prefix(folder)
        blob_bytes = {
            file.names[name].removeprefix(prefix): size
            for file, shard in zip(tree.weight_files, shards, strict=True)
            if file.folder == folder
            for name, size in shard.blob_bytes.items()
        }
        config = model.config_of(folder) if exists else None
        yield folder, compressed_config(config, model.config.to_json(), blob_bytes)


class _CodedFile(NamedTuple):
    """What the output of a file of weights holds; its writer is open until it is finished."""

    shard: Shard
    writer: ContainerWriter
    metadata: dict[str, str]

    def finish(self) -> None:
        """Put it in place."""
        with self.writer:
            self.writer.finish(self.metadata)


class _Finisher:
    """A thread that copies files behind their headers, and flushes them, while others are coded.

    Left by an error it begins no other file and gives up the one it is at: none will be needed.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1)
        self._pending: deque[tuple[Future[None], ContainerWriter]] = deque()

    def finish(self, file: _CodedFile) -> None:
        """Begin with a file when those before are in place, which is waited for."""
        self._pending.append((self._executor.submit(file.finish), file.writer))
        while len(self._pending) > 1:
            self._first()

    def check(self) -> None:
        """Raise what kept a file from being finished, if that is known by now."""
        while self._pending and self._pending[0][0].done():
            self._first()

    def wait(self) -> None:
        """Return when all files are in place."""
        while self._pending:
            self._first()

    def _first(self) -> None:
        self._pending[0][0].result()  # if this is interrupted, it is still under way
        self._pending.popleft()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        for _, writer in self._pending:
            writer.give_up()
        self._executor.shutdown(cancel_futures=True)
        for future, writer in self._pending:
            if future.cancelled():
                writer.close()


def _compress_directory(
    model: _Model,
    source: Path,
    target: Path,
    plans: dict[str, CommonPlan],
    progress: Progress,
    reports: list[TensorReport],
    carried: list[Path],
) -> int:
    """Write the output of a model directory; returns its size."""
    shards: list[Shard] = []
    with directory_in_place(target) as temporary, _Finisher() as finisher:

        def begin_tensor(name: str) -> None:
            finisher.check()  # a full disk is not told only when the next file has been coded
            progress.tensor(name)

        watched = replace(progress, tensor=begin_tensor)
        for file in model.tree.weight_files:
            (temporary / file.folder).mkdir(parents=True, exist_ok=True)
            coded = _code_file(model, file, temporary / file.path, plans, watched, reports)
            shards.append(coded.shard)
            finisher.finish(coded)
        finisher.wait()
        _write_other_files(model, source, temporary, shards, progress, carried)
        return size_bytes(temporary)


def _code_file(
    model: _Model,
    file: WeightFile,
    path: Path,
    plans: dict[str, CommonPlan],
    progress: Progress,
    reports: list[TensorReport],
) -> _CodedFile:
    """Code one file of weights, which then is to be finished."""
    with ExitStack() as stack:
        writer = stack.enter_context(ContainerWriter(path))
        metadata, shard = _encode_file(model, file, plans, writer, progress, reports)
        stack.pop_all()
    return _CodedFile(shard, writer, metadata)


def _write_other_files(
    model: _Model, source: Path, directory: Path, shards: list[Shard], progress: Progress, carried: list[Path]
) -> None:
    """Write all files of an output but those of the weights."""
    for folder in model.tree.folders:
        (directory / folder).mkdir(parents=True, exist_ok=True)
    write_indexes(directory, model.tree, shards, added_indexes(model.tree))
    for folder, written in _configs(model, source, shards):
        write_json(directory / folder / CONFIG_NAME, written)
    copy_files(source, directory, carried, progress.advance)


def _has_common_steps(config: QuantConfig) -> bool:
    """Whether tensors' steps depend on those of all others."""
    return config.allocation in ("model", "sensitivity") and config.bits is not None


# Compression in parts


def _check_part(source: Path, target: Path, shards: tuple[int, int], *, force: bool, dry_run: bool) -> None:
    """Refuse what cannot be done in parts, before any work. Raises InputError."""
    check_shards(shards)
    if not source.is_dir():
        raise InputError(f"shards: {source} is one file, and parts are made of whole files: give a model directory")
    if force:
        raise InputError(
            f"shards and force exclude each other: each part would remove what others made. Move {target} away first"
        )
    if dry_run:
        raise InputError("shards and dry_run exclude each other: a dry run is of the whole")
    if target.resolve().is_relative_to(source.resolve()):
        raise InputError(
            f"shards: the output {target} is in the input, which it would be part of: -o names another one"
        )


def _job(model: _Model, files: list[FileReport], moments: str | os.PathLike[str] | None) -> dict[str, Any]:
    """What the parts of an output must agree on for its bytes to be those of one run: see :class:`.parts.Parts`."""
    tree, counts = model.tree, model.token_counts
    vectors: dict[str, int | str] = {
        f"{what} of {name}": zlib.crc32(np.ascontiguousarray(vector).data)
        for what, given in (("column scales", model.column_scales), ("row offsets", model.row_offsets))
        for name, vector in given.items()
    }
    if counts is not None:
        vectors["token counts"] = zlib.crc32(np.ascontiguousarray(counts).data)
    if moments is not None:
        with Container(moments) as container:
            vectors["moments"] = container_crc32(container)
    return {
        "kvpack": __version__,
        "options": model.config.to_json(),
        "weights": {str(file.path): container_crc32(file.container) for file in tree.weight_files},
        "rewritten files": {f.path: file_crc32(tree.path / f.path) for f in files if f.action == "rewritten"},
        "copied files": {f.path: file_crc32(tree.path / f.path) for f in files if f.action == "copied"},
        # Where names leave doubt, transformers says what tensors are: the one that each machine has.
        "what tensors are": {str(file.path): model.decisions_crc32(file) for file in tree.weight_files},
        "vectors": vectors,
    }


class _PartResult(NamedTuple):
    """What a part did, and ``records`` of what is to be reported: of its own files, or of a complete output's; none
    where that was there before."""

    report: PartReport
    records: dict[Path, dict[str, Any]]
    output_bytes: int


def _divided(model: _Model, parts: int) -> list[list[Path]]:
    """Files of weights of each part."""
    files = [file.path for file in model.tree.weight_files]
    divided = divide([model.bytes_of([file]) for file in model.tree.weight_files], parts)
    return [[files[number] for number in numbers] for numbers in divided]


def _finished_part(model: _Model, parts: Parts, shards: tuple[int, int], threads: int | None) -> _PartResult:
    """A part of an output that was complete before, if that is what the parts would make."""
    own = _divided(model, shards[1])[shards[0] - 1]
    check_finished(parts.target, model.tree, parts.job["options"], own, threads)
    files = list(map(str, own))
    report = PartReport(shards[0], shards[1], files, files, [], [], joined=True, was_there=True)
    return _PartResult(report, {}, size_bytes(parts.target))


def _compress_part(
    model: _Model, source: Path, parts: Parts, shards: tuple[int, int], progress: Progress, carried: list[Path]
) -> _PartResult:
    """Make the files of one part that are not whole, and complete the output if no other is missing."""
    files = {file.path: file for file in model.tree.weight_files}
    paths_of = _divided(model, shards[1])
    own = paths_of[shards[0] - 1]
    records: dict[Path, dict[str, Any]] = {}
    found: list[Path] = []
    made: list[Path] = []
    try:
        if not parts.is_joined:
            records = {path: record for path in own if (record := parts.finished(path)) is not None}
            found = list(records)
            to_make = [files[path] for path in own if path not in records]
            progress.total(model.bytes_of(to_make))
            plans = _plans_of_part(model, parts, own, to_make, progress)
            for file in to_make:
                records[file.path] = _make_file(model, parts, file, shards, plans, progress)
                made.append(file.path)
            others = {path: parts.record_of(path) for path in files if path not in records}
            if all(record is not None for record in others.values()):
                _join(model, source, parts, records | others, list(others), carried)
    except FileNotFoundError:
        if not parts.is_joined:
            raise
    joined = parts.is_joined  # by this process or by another
    known = {path: record for path in files if (record := records.get(path) or parts.record_of(path)) is not None}
    if joined:
        parts.remove()
    missing = [] if joined else [path for path in files if path not in known]
    report = PartReport(
        number=shards[0],
        of=shards[1],
        files=list(map(str, own)),
        found=list(map(str, found)),
        missing=list(map(str, missing)),
        missing_parts=[number for number, paths in enumerate(paths_of, 1) if not set(missing).isdisjoint(paths)],
        joined=joined,
    )
    is_complete = joined and len(known) == len(files)
    told = known if is_complete else {path: known[path] for path in own if path in known}
    for path, record in told.items():
        if path not in made:
            model.take_findings(record["findings"])
    size = size_bytes(parts.target) if is_complete else sum(record["bytes"] for record in told.values())
    return _PartResult(report, told, size)


def _found_alone(model: _Model, _: str, work: Callable[[WeightFile], Iterator[tuple[str, Any]]]) -> dict[str, Any]:
    """What a stage finds, by this process."""
    return {name: value for file in model.tree.weight_files for name, value in work(file)}


def _found_by_parts(
    model: _Model,
    parts: Parts,
    own: list[Path],
    stage: str,
    work: Callable[[WeightFile], Iterator[tuple[str, Any]]],
) -> dict[str, Any]:
    """What a stage finds, by all parts that are at it: each does its own files and then those that still are missing.

    So nobody waits for a part that has not begun, or was killed; and what it makes is the same.
    """

    def of_file(file: WeightFile) -> dict[str, Any]:
        if (theirs := parts.read_finding(stage, file.path)) is not None:
            return theirs
        found = {}
        for name, value in work(file):
            found[name] = value
            if file.path not in own and (theirs := parts.read_finding(stage, file.path)) is not None:
                return theirs  # they were at it
        parts.write_finding(stage, file.path, found)
        return found

    files = model.tree.weight_files
    first = next((number for number, file in enumerate(files) if file.path in own), 0)
    # Own ones first, and those of others from there on, so that not all help the same one.
    order = sorted(files[first:] + files[:first], key=lambda file: file.path not in own)
    findings = {file.path: of_file(file) for file in order}
    return {name: value for file in files for name, value in findings[file.path].items()}


def _plans_of_part(
    model: _Model, parts: Parts, own: list[Path], files: list[WeightFile], progress: Progress
) -> dict[str, CommonPlan]:
    """The plans of some files' tensors where steps are the model's: by those that are known, or by all weights."""
    if not files or not _has_common_steps(model.config):
        return {}
    steps = parts.read_steps()
    if steps is None:
        plans = _common_step_plans(model, progress, partial(_found_by_parts, model, parts, own))
        parts.write_steps({name: [plan.step, list(astuple(plan.layout))] for name, (_, plan) in plans.items()})
        return plans
    known: dict[str, CommonPlan] = {}
    wanted = {file.path for file in files}
    for file, tensor in model.common_step_tensors():
        name = file.names[tensor.name]
        if file.path not in wanted or name not in steps:
            continue
        progress.tensor(name)
        weights = model.matrices(file, tensor)
        model.set_row_factors(file, tensor, weights)
        fine = measure(weights, model.executor)
        step, (kind, element_bits, code_bits, codes_per_symbol, folded, quantizer) = steps[name]
        layout = Layout(
            ElementKind(kind), element_bits, code_bits, codes_per_symbol, folded=folded, quantizer=Quantizer(quantizer)
        )
        known[name] = fine, plan_in_layout(weights, fine, step, layout, model.config.tile_cols)
    return known


def _make_file(
    model: _Model,
    parts: Parts,
    file: WeightFile,
    shards: tuple[int, int],
    plans: dict[str, CommonPlan],
    progress: Progress,
) -> dict[str, Any]:
    """Make one file of weights and its record; returns that."""
    stacks = model.stacks
    reports: list[TensorReport] = []
    with parts.making(file.path) as path:
        coded = _code_file(model, file, path, plans, progress, reports)
        coded.finish()
    contents = asdict(coded.shard)
    del contents["path"]
    about = {
        "shard": contents,
        "tensors": [asdict(report) for report in reports],
        "findings": model.findings_of(file, stacks),
    }
    return parts.write_record(file.path, shards, about)


def _join(
    model: _Model,
    source: Path,
    parts: Parts,
    records: Mapping[Path, dict[str, Any] | None],
    unchecked: list[Path],
    carried: list[Path],
) -> None:
    """Check what others made, write all that is not weights, and put the output in its place.

    Raises:
        FileNotFoundError: another process did it meanwhile.
    """
    for _ in model.executor.map(parts.check_whole, unchecked):
        pass
    paths = [file.path for file in model.tree.weight_files]
    shards = [Shard(path, **record["shard"]) for path in paths if (record := records[path]) is not None]
    with parts.joining() as folder:
        _write_other_files(model, source, folder, shards, Progress(), carried)
        parts.put_in_place(folder, paths)
