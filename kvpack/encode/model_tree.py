"""A model directory as a tree: its files, which safetensors make up one set of weights, and how tensors are named.

A folder may hold several sets that share tensor names (a precision variant, single files of other tools). One of them
is the folder's model: its tensors are ``folder/name``, those of the root plainly ``name``. Tensors of any other set
have the set's file name in between: ``model.fp16.safetensors/name``. docs/FORMAT.md §9.4 has the rules.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvpack.encode.model_config import check_config
from kvpack.errors import DirectoryIndexError, InputError
from kvpack.format.closing import Closing
from kvpack.format.container import BLOB_SUFFIX, PART_SUFFIXES, VERSION_KEY, Container, Readable
from kvpack.format.file_kinds import HEAD_BYTES, describe

PIPELINE_NAME = "model_index.json"
TRANSFORMERS_STEM = "model"
DIFFUSERS_STEM = "diffusion_pytorch_model"
# What a folder of Hugging Face's cache consists of.
_CACHE_FOLDERS = ("blobs", "refs", "snapshots")
SUFFIX = ".safetensors"
# Weights that are read where they are given as a file.
_SINGLE_FILES = (".bin", ".pt", ".pth", ".ckpt", ".gguf")
INDEX_NAME = f"{TRANSFORMERS_STEM}{SUFFIX}.index.json"

_INDEX = re.compile(r"^.+\.safetensors\.index(\.[^.]+)*\.json$")
_VARIANT_INDEX = re.compile(r"(\.[^.]+\.safetensors\.index\.json|\.index\.[^.]+(\.[^.]+)*\.json)$")
_SHARD_NUMBER = re.compile(r"-\d+-of-(\d+)")


def is_index_name(name: str) -> bool:
    """Whether a file of this name says which shard holds which tensor, variants included."""
    return _INDEX.match(name) is not None


def folder_prefix(folder: Path) -> str:
    """What goes before the names of a folder's tensors."""
    return "" if folder == Path() else f"{folder.as_posix()}/"


@dataclass
class Listing:
    """All files below a folder, relative to it, and what is no part of a model with the reason."""

    files: list[Path] = field(default_factory=list)
    passed_over: dict[Path, str] = field(default_factory=dict)


def list_files(root: Path, without: Path | None = None) -> Listing:
    """Every file below ``root``, links followed: a folder's own files in order of name, then its folders.

    Args:
        without: a folder that is no part of it, as an output that lies in its input.

    Raises:
        InputError: a safetensors file or an index is a link that leads nowhere.
        OSError: a folder cannot be read.
    """
    listing = Listing()
    excluded = None if without is None else without.resolve()
    top = root.resolve()
    # Of each folder the real ones that it lies in, links followed: a link back to one of them would never end.
    waiting = [(Path(), [*top.parents, top])]
    while waiting:
        below, above = waiting.pop()
        folders: list[tuple[Path, list[Path]]] = []
        names = sorted(os.listdir(root / below))
        if not names and below.parts:
            listing.passed_over[below] = "an empty folder"
        for name in names:
            relative = below / name
            path = root / relative
            if path.is_dir():
                real = path.resolve()
                if real == excluded:
                    continue
                if name.startswith("."):
                    listing.passed_over[relative] = "hidden"
                elif real in above:
                    listing.passed_over[relative] = "a link to a folder that contains it"
                else:
                    folders.append((relative, [*above, real]))
            elif name.startswith("."):
                listing.passed_over[relative] = "hidden"
            elif path.is_file():
                listing.files.append(relative)
            elif path.is_symlink() and not path.exists():
                if name.endswith(SUFFIX) or is_index_name(name):
                    raise InputError(f"{path} is a link to {os.readlink(path)}, which does not exist: fetch it again")
                listing.passed_over[relative] = "a link that leads nowhere"
            else:
                listing.passed_over[relative] = "neither a file nor a folder"
        waiting += reversed(folders)
    return listing


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise DirectoryIndexError(f"names {key!r} twice")
        found[key] = value
    return found


@dataclass
class Index:
    """An index file.

    Attributes:
        path: relative to the tree.
        content: all of its JSON.
        weight_map: stored tensor → file name beside it.
    """

    path: Path
    content: dict[str, Any]
    weight_map: dict[str, str]

    def rewritten(self, weight_map: Mapping[str, str], size_bytes: int) -> dict[str, Any]:
        """The same for other stored tensors, ``size_bytes`` together; whatever else it says stays."""
        metadata = dict(self.content.get("metadata") or {})
        if "total_size" in metadata:
            metadata["total_size"] = size_bytes
        return {**self.content, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def read_index(root: Path, relative: Path) -> Index:
    """Read and check an index by itself.

    Raises:
        DirectoryIndexError: it is no index, names a tensor twice, none at all, or a file that is not in its folder.
    """
    path = root / relative
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
        weight_map = content["weight_map"]
        plain = all(
            isinstance(v, str) and v == os.path.basename(v) and v not in ("", ".", "..") for v in weight_map.values()
        )
    except DirectoryIndexError as error:
        raise DirectoryIndexError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        kind = None if head.lstrip()[:1] in (b"{", b"[") else describe(head, path.stat().st_size)
        found = f" ({error!r})" if kind is None else f" but {kind}"
        raise DirectoryIndexError(f"{path}: not a valid index{found}") from None
    if not plain:
        raise DirectoryIndexError(
            f"{path}: weight_map does not map names to files of the directory: an index names files beside it, so move "
            "them there"
        )
    if not weight_map:
        raise DirectoryIndexError(
            f"{path}: weight_map is empty, so the index names no tensor: remove it, or fetch it anew"
        )
    if not isinstance(content.get("metadata") or {}, dict):
        raise DirectoryIndexError(f"{path}: metadata is not a JSON object")
    for name in sorted(set(weight_map.values())):
        if not os.path.isfile(path.parent / name):
            raise DirectoryIndexError(f"{path}: names {name!r}, which does not exist")
        if not name.endswith(SUFFIX) or name.startswith("."):
            raise DirectoryIndexError(f"{path}: names {name!r}, which is no {SUFFIX} file, or a hidden one")
    return Index(relative, content, weight_map)


@dataclass
class WeightFile:
    """A safetensors file of a tree.

    Attributes:
        path: relative to the tree.
        names: its original tensors' own names → their names in the tree.
        set_prefix: what goes before the names of its set; empty for the root's model.
        reason: why it is not part of its folder's model; None if it is.
    """

    path: Path
    container: Container
    names: dict[str, str] = field(default_factory=dict)
    set_prefix: str = ""
    reason: str | None = None

    @property
    def folder(self) -> Path:
        return self.path.parent


def _original_names(container: Container) -> dict[str, str]:
    """Stored tensor → original tensor, of one file."""
    parts = {name + suffix: name for name in container.coded for suffix in PART_SUFFIXES}
    return {stored: parts.get(stored, stored) for stored in container.tensors}


def _counted_files(index: Index, files: Mapping[str, WeightFile], shown: Path) -> dict[str, str]:
    """Original tensor → the file whose copy counts.

    Raises:
        DirectoryIndexError: the index names a tensor where it is not, or leaves out a part of a coded file.
    """
    counted: dict[str, str] = {}
    originals = {name: _original_names(files[name].container) for name in set(index.weight_map.values())}
    wrong = {stored for stored, name in index.weight_map.items() if stored not in originals[name]}
    for name, stored_names in originals.items():
        if VERSION_KEY in files[name].container.metadata:
            wrong |= stored_names.keys() - index.weight_map.keys()
    for stored in index.weight_map.keys() - wrong:
        name = index.weight_map[stored]
        if counted.setdefault(originals[name][stored], name) != name:  # a blob here, its scales there
            wrong.add(stored)
    if wrong:
        stored = min(wrong)
        where = index.weight_map.get(stored)
        named = f"it names {where!r}, which has no such tensor" if where else "it does not name it"
        raise DirectoryIndexError(
            f"{shown / index.path}: {stored!r} is not where the index says ({named}): fetch index and shards anew, or "
            "correct the entry"
        )
    return counted


def _group_of(name: str) -> str:
    """What shards of one set have in common; a single file is its own group."""
    return _SHARD_NUMBER.sub(r"-*-of-\1", name)


def _is_variant(group: str) -> bool:
    return "." in group.removesuffix(SUFFIX)


def _is_consolidated(group: str) -> bool:
    return group.startswith("consolidated")


class _Folder:
    """The weight files of one folder, being sorted into sets."""

    def __init__(
        self,
        root: Path,
        folder: Path,
        files: dict[str, WeightFile],
        indexes: list[Index],
        counted: Mapping[Path, dict[str, str]],
    ) -> None:
        self.root, self.folder, self.files, self.indexes, self.counted = root, folder, files, indexes, counted
        self.prefix = folder_prefix(folder)

    def sort(self, is_pipeline: bool) -> None:
        if self.indexes:
            self._sort_by_indexes()
        else:
            self._sort_by_names(is_pipeline)

    def _sort_by_indexes(self) -> None:
        # The folder's model is what the index without a variant says.
        self.indexes.sort(
            key=lambda i: (bool(_VARIANT_INDEX.search(i.path.name)), i.path.name != INDEX_NAME, i.path.name)
        )
        free = dict(self.files)
        for number, index in enumerate(self.indexes):
            own = [free.pop(name) for name in sorted(set(index.weight_map.values())) if name in free]
            own_set, reason = (None, None) if number == 0 else (index.path.name, "of a second index: a set of its own")
            self._name(own, own_set, reason, self.counted[index.path])
        for group, members in self._groups(free).items():
            self._name(members, group, "not named by the index: a set of its own")

    def _sort_by_names(self, is_pipeline: bool) -> None:
        groups = self._groups(self.files)
        if is_pipeline:  # single files of other tools, beside the folders
            for group, members in groups.items():
                self._name(members, group, f"beside {PIPELINE_NAME}: a set of its own")
            return
        model = [g for g in groups if not _is_variant(g) and not _is_consolidated(g)]
        # model.safetensors and its shards: the single file is what loaders take.
        model = [g for g in model if g == (one := re.sub(r"-\*-of-\d+", "", g)) or one not in groups]
        taken: set[str] = set()
        for group in model:
            taken |= self._names_in(groups[group])
        others = [g for g in groups if g not in model]
        if not model:
            names = [name for g in others for name in self._names_in(groups[g])]
            if len(names) == len(set(names)):
                model, others = others, []
        for group in others.copy():
            if model and not _is_consolidated(group) and not taken & self._names_in(groups[group]):
                taken |= self._names_in(groups[group])
                model.append(group)
                others.remove(group)
        self._name([member for g in sorted(model) for member in groups[g]], None, None)
        for group in others:
            self._name(groups[group], group, "other weights of the same names: a set of its own")

    @staticmethod
    def _groups(files: Mapping[str, WeightFile]) -> dict[str, list[WeightFile]]:
        groups: dict[str, list[WeightFile]] = {}
        for name in sorted(files):
            groups.setdefault(_group_of(name), []).append(files[name])
        return groups

    @staticmethod
    def _names_in(members: Iterable[WeightFile]) -> set[str]:
        return {name for member in members for name in member.container.original_names()}

    def _name(
        self,
        members: list[WeightFile],
        own_set: str | None,
        reason: str | None,
        counted: Mapping[str, str] | None = None,
    ) -> None:
        """Name the tensors of a set; the copies that do not count get their file's name, too."""
        prefix = self.prefix if own_set is None else f"{self.prefix}{own_set}/"
        where: dict[str, str] = {}
        for member in members:
            member.set_prefix = prefix
            member.reason = None if own_set is None else reason
            file = member.path.name
            for name in member.container.original_names():
                if counted is not None and counted.get(name, file) != file:
                    member.names[name] = f"{prefix}{file}/{name}"
                    continue
                if name in where:
                    raise DirectoryIndexError(
                        f"{self.root / self.folder}: {name!r} is in both {where[name]} and {file}, and no index says "
                        "which counts"
                    )
                where[name] = file
                member.names[name] = prefix + name


class ModelTree(Closing):
    """The weights of a file or directory, opened and sorted.

    Attributes:
        weight_files: all safetensors files; the root's first, then folder by folder in order of name.
        indexes: all index files.
        others: all other files, relative.
        passed_over: what is no part of it → why.

    Args:
        path: a safetensors file, an index, or a directory.
        without: a folder below the directory that is no part of it.
        components: False opens the directory's own model alone: no subfolders, no other sets.
        file: what to read in place of the file under ``path``.

    Raises:
        InputError: there is no safetensors file.
        FormatError: a file or an index breaks a rule.
        OSError: a file cannot be read.
    """

    def __init__(
        self,
        path: Path,
        *,
        without: Path | None = None,
        components: bool = True,
        file: Readable | None = None,
    ) -> None:
        self.path = path
        self.weight_files: list[WeightFile] = []
        self.indexes: list[Index] = []
        self.others: list[Path] = []
        self.passed_over: dict[Path, str] = {}
        self.not_opened: list[str] = []
        self._counted: dict[Path, dict[str, str]] = {}
        try:
            if path.is_dir():
                self._open_folders(without, components)
            elif is_index_name(path.name):
                self.path = path.parent
                index = read_index(self.path, Path(path.name))
                self._open_folder(Path(), sorted(set(index.weight_map.values())), [index.path], with_config=False)
            else:
                container = Container(path, file)
                names = {name: name for name in container.original_names()}
                self.weight_files.append(WeightFile(Path(path.name), container, names))
            self._check_names()
        except BaseException:
            self.close()
            raise

    def _open_folders(self, without: Path | None, components: bool) -> None:
        if all((self.path / name).is_dir() for name in _CACHE_FOLDERS):
            raise InputError(
                f"{self.path} is a folder of Hugging Face's cache, with all revisions of a model: give a folder "
                f"in {self.path / 'snapshots'}"
            )
        listing = list_files(self.path, without)
        self.passed_over = listing.passed_over
        by_folder: dict[Path, list[str]] = {}
        indexes: dict[Path, list[Path]] = {}
        for file in listing.files:
            if file.name.endswith(SUFFIX):
                by_folder.setdefault(file.parent, []).append(file.name)
            elif is_index_name(file.name):
                indexes.setdefault(file.parent, []).append(file)
            else:
                self.others.append(file)
        if not by_folder:
            for index in [index for folder in indexes.values() for index in folder]:
                read_index(self.path, index)  # which says what is missing
            alone = [str(file) for file in self.others if file.suffix.lower() in _SINGLE_FILES]
            here = f", as {alone[0]} here" if alone else ""
            raise InputError(
                f"{self.path} holds no .safetensors file. `kvpack compress` also reads folders of pytorch_model*.bin, "
                f"and .bin, .pt, .pth and .gguf files by their own names{here}; other forms of weights must be "
                "converted first"
            )
        if not components:
            self.not_opened = [folder.as_posix() for folder in by_folder if folder != Path()]
            if Path() not in by_folder:
                raise InputError(
                    f"{self.path} holds no .safetensors file of its own, but folders with weights: "
                    f"{', '.join(self.not_opened)}. Give one of these"
                )
            by_folder, indexes = {Path(): by_folder[Path()]}, {Path(): indexes.get(Path(), [])}
        for folder in sorted({*by_folder, *indexes}):
            self._open_folder(folder, by_folder.get(folder, []), indexes.get(folder, []))
        if not components:
            others = [weights for weights in self.weight_files if weights.set_prefix]
            self.not_opened += sorted({weights.set_prefix.rstrip("/") for weights in others if weights.names})
            for weights in others:
                weights.container.close()
                self.weight_files.remove(weights)
            if not self.weight_files:
                raise InputError(f"{self.path} holds several sets of weights: give one of {', '.join(self.not_opened)}")

    def _open_folder(
        self, folder: Path, names: list[str], index_files: list[Path], *, with_config: bool = True
    ) -> None:
        indexes = [read_index(self.path, file) for file in index_files]
        files: dict[str, WeightFile] = {}
        for name in names:
            files[name] = WeightFile(folder / name, Container(self.path / folder / name))
            self.weight_files.append(files[name])
        self.indexes += indexes
        is_pipeline = os.path.isfile(self.path / folder / PIPELINE_NAME)
        # Before any renaming: an index names what is in its files.
        counted = {index.path: _counted_files(index, files, self.path) for index in indexes}
        self._counted |= counted
        _Folder(self.path, folder, files, indexes, counted).sort(is_pipeline)
        if not with_config:  # which is the folder's, not this set's
            return
        prefix = folder_prefix(folder)
        blob_bytes = {
            file.names[name].removeprefix(prefix): file.container.tensors[name + BLOB_SUFFIX].size_bytes
            for file in files.values()
            for name in file.container.coded
        }
        is_coded = any(VERSION_KEY in file.container.metadata for file in files.values())
        check_config(self.path / folder, blob_bytes, is_coded)

    def _check_names(self) -> None:
        where: dict[str, Path] = {}
        for file in self.weight_files:
            for name in file.names.values():
                if name in where:
                    raise DirectoryIndexError(f"{self.path}: {name!r} is in both {where[name]} and {file.path}")
                where[name] = file.path

    def forget_missing(self) -> None:
        """Forget names of tensors that the files' containers, others than those opened, do not have."""
        for file in self.weight_files:
            there = set(file.container.original_names())
            file.names = {own: name for own, name in file.names.items() if own in there}
        own_names = {file.path: file.names for file in self.weight_files}
        for index, counted in self._counted.items():
            self._counted[index] = {own: f for own, f in counted.items() if own in own_names[index.parent / f]}

    def counted_files(self, index: Index) -> dict[str, str]:
        """Original tensor, named as in its file → the file beside ``index`` whose copy counts."""
        return self._counted[index.path]

    @property
    def folders(self) -> list[Path]:
        """Those with safetensors files."""
        return sorted({file.folder for file in self.weight_files})

    def files_of(self, folder: Path) -> list[WeightFile]:
        return [file for file in self.weight_files if file.folder == folder]

    def close(self) -> None:
        """Close all files."""
        for file in self.weight_files:
            file.container.close()
