"""Model directories: which files come along, and putting a whole directory in place."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvpack.encode.listing import listed
from kvpack.encode.model_config import CONFIG_NAME
from kvpack.encode.model_tree import ModelTree, is_index_name
from kvpack.errors import InputError, OtherFilesError
from kvpack.format.container import VERSION_KEY, Container
from kvpack.format.temporary_files import hidden_directory, hidden_name

# Weights in other forms than safetensors, by the names that tools give them. What has any other name is copied: an
# optimizer's state, a voice or a training state is nobody's copy.
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_PICKLED_MODEL = re.compile(r"^(diffusion_)?(pytorch_)?(model|consolidated)([.-].*)?\.(bin|pt|pth|ckpt)$")
_ADAPTER = "adapter_model"
_ONNX = (".onnx", ".onnx_data", ".onnx.data")
# Form, names in any folder, folders and the suffixes that are such weights in them.
_EXPORTS: tuple[tuple[str, re.Pattern[str], set[str], tuple[str, ...]], ...] = (
    ("GGUF", re.compile(r".*\.gguf$"), set(), ()),
    ("ONNX", re.compile(r"^((encoder|decoder)_)?model.*\.(onnx|onnx_data)$"), {"onnx"}, _ONNX),
    ("OpenVINO", re.compile(r"^openvino_.*\.bin$"), {"openvino"}, (".bin",)),
    ("TensorFlow", re.compile(r"^tf_model.*\.h5$"), set(), ()),
    ("Flax", re.compile(r"^(diffusion_)?flax_model.*\.msgpack$"), set(), ()),
    ("rust-bert", re.compile(r"^rust_model.*\.ot$"), set(), ()),
    ("Core ML", re.compile(r"^$"), {"coreml"}, (".bin", ".mlmodel")),
    ("TFLite", re.compile(r"^model.*\.tflite$"), {"tflite"}, (".tflite",)),
)
_OTHER_WEIGHTS = re.compile(
    r"\.(bin|pt|pth|ckpt|h5|msgpack|onnx|onnx_data|ot|gguf|tflite|safetensors)(\.index(\.[^.]+)*\.json)?$",
    re.IGNORECASE,
)
_SHARD_NUMBER = re.compile(r"-\d+-of-\d+")
_ANY_INDEX = re.compile(r"\.index(\.[^.]+)*\.json$")

# How many entries a message lists.
_SHOWN = 5


def json_text(value: object) -> str:
    """What an index or config.json is as text."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, value: object) -> None:
    """Write an index or config.json.

    Raises:
        InputError: a file's name in it is not UTF-8.
    """
    text = json_text(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        bad = text[: error.start].rpartition('"')[2] + text[error.start :].partition('"')[0]
        raise InputError(f"{path.name}: {bad!r} is no name in UTF-8, which JSON needs: rename the file") from None
    path.write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class FileReport:
    """What became of a file, or a hidden folder, of a model directory.

    Attributes:
        path: relative to the directory.
        size_bytes: in the directory that was read.
        action: ``coded``, ``rewritten`` (an index, config.json), ``copied`` or ``left out``.
        reason: why, where that is not plain.
    """

    path: str
    size_bytes: int
    action: str
    reason: str | None = None


def other_form(file: Path, weight_files: Iterable[Path]) -> str | None:
    """Why a file holds nothing but weights that the safetensors files hold as well; None if that is not known.

    Names alone decide: a pickle counts as a copy of the safetensors in its folder, or of those above if it lies in a
    folder without config.json of its own; an export (ONNX, GGUF, …) as one of those in its folder or above.
    """
    weights = set(weight_files)
    models = {w.parent for w in weights if not w.name.startswith(_ADAPTER)}
    above = models & set(file.parents)
    folders = {part.lower() for part in file.parent.parts}
    name = _without_index(file.name)
    for form, pattern, in_folders, suffixes in _EXPORTS:
        if above and (pattern.match(name) or (folders & in_folders and name.endswith(suffixes))):
            return f"the weights as {form}: the safetensors hold them"
    if not name.endswith(_PICKLE_SUFFIXES):
        return None
    stem = name.rpartition(".")[0]
    twin = file.parent / f"{stem}.safetensors" in weights
    adapter = name.startswith(_ADAPTER) and any(
        w.parent == file.parent and w.name.startswith(_ADAPTER) for w in weights
    )
    # A half-precision variant alone is no copy of the whole.
    held = {_variant_of(w.name) for w in weights if w.parent in above and not w.name.startswith(_ADAPTER)}
    if twin or adapter or (_PICKLED_MODEL.match(name) and not held.isdisjoint({"", _variant_of(name)})):
        return "the weights as a PyTorch pickle: the safetensors hold them"
    return None


def _variant_of(name: str) -> str:
    """``fp16`` of ``model.fp16-00001-of-00002.safetensors``; empty for a model without a variant."""
    return _SHARD_NUMBER.sub("", name).rpartition(".")[0].partition(".")[2]


def _without_index(name: str) -> str:
    return _ANY_INDEX.sub("", name)


def sort_files(root: Path, tree: ModelTree) -> tuple[list[FileReport], list[FileReport]]:
    """The files of a model directory that hold no safetensors: those to copy, and those to leave out.

    config.json files of folders with weights and the indexes of these are in neither.
    """
    weight_files = [file.path for file in tree.weight_files]
    configs = {folder / CONFIG_NAME for folder in tree.folders}
    with_config = {file.parent for file in tree.others if file.name == CONFIG_NAME}
    copied: list[FileReport] = []
    left_out: list[FileReport] = []
    for file in tree.others:
        if file in configs:
            continue
        # A folder with config.json of its own and no safetensors is a model that only the pickle holds.
        near = [w for w in weight_files if w.parent == file.parent] if file.parent in with_config else weight_files
        reason = other_form(file, near) or (None if near is weight_files else _export_of(file, weight_files))
        size = (root / file).stat().st_size
        if reason is not None:
            left_out.append(FileReport(str(file), size, "left out", reason))
        else:
            is_weights = _OTHER_WEIGHTS.search(file.name) is not None
            why = "weights that no safetensors file is known to hold" if is_weights else None
            copied.append(FileReport(str(file), size, "copied", why))
    for path, reason in tree.passed_over.items():
        left_out.append(FileReport(str(path), _passed_over_bytes(root / path), "left out", reason))
    return copied, left_out


def _export_of(file: Path, weight_files: Iterable[Path]) -> str | None:
    """As :func:`other_form`, for exports alone: they carry config.json of the model that they are made from."""
    return None if file.name.endswith(_PICKLE_SUFFIXES) else other_form(file, weight_files)


def _passed_over_bytes(path: Path) -> int:
    if path.is_symlink():
        return 0
    return size_bytes(path)


def copy_files(source: Path, target: Path, files: Iterable[Path], advance: Callable[[int], None]) -> None:
    """Copy ``files``, relative paths, from one directory to another; ``advance`` is called with bytes done."""
    for relative in files:
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / relative, target / relative)
        advance((target / relative).stat().st_size)


def size_bytes(path: Path) -> int:
    """Bytes of a file, or of all files of a directory."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


def _is_earlier_output(path: Path) -> bool:
    """Whether a file is one that kvpack made of a model's weights."""
    if is_index_name(path.name):
        return True
    if path.suffix != ".safetensors":
        return False
    try:
        with Container(path) as container:
            return VERSION_KEY in container.metadata
    except (ValueError, OSError):
        return False


def _other_entries(directory: Path, written: set[Path], folders: set[Path], below: Path) -> Iterator[str]:
    for entry in sorted((directory / below).iterdir()):
        relative = entry.relative_to(directory)
        is_folder = entry.is_dir() and not entry.is_symlink()
        if is_folder and relative in folders:
            yield from _other_entries(directory, written, folders, relative)
        elif is_folder or (relative not in written and (below.parts or not _is_earlier_output(entry))):
            yield f"{relative}{os.sep if is_folder else ''}"


def refuse_other_files(directory: Path, written: Iterable[Path], shown_as: Path | None = None) -> None:
    """Check that replacing ``directory`` loses nothing but an earlier output.

    Args:
        directory: the old one; need not exist.
        written: files of the new one, relative.
        shown_as: its path in the message, if another.

    Raises:
        OtherFilesError: it holds something that the new one does not write anew, and that is no weight file of
            kvpack's.
    """
    if not directory.is_dir():
        return
    files = set(written)
    folders = {folder for file in files for folder in file.parents}
    others = list(_other_entries(directory, files, folders, Path()))
    if others:
        raise OtherFilesError(
            f"{shown_as or directory} is not replaced: it holds {len(others)} "
            f"{'entry that is' if len(others) == 1 else 'entries that are'} no part of the output "
            f"({listed(others, _SHOWN)}); choose another output (-o), or move them away"
        )


@contextmanager
def directory_in_place(target: Path) -> Iterator[Path]:
    """A temporary directory beside ``target`` that takes its place on success and vanishes otherwise.

    An existing ``target`` is moved aside first and deleted last; a directory cannot be exchanged in one step, so a
    process killed between the two renames leaves the old one under its hidden name, ``.NAME.12345678.old``. That is
    nobody's to remove but the user's; a ``.tmp`` left by a killed process is removed by the next.

    Raises:
        OtherFilesError: ``target`` holds something that is no part of an output; it stays as it is.
    """
    target = Path(os.path.abspath(target))  # "." has no name
    with hidden_directory(target) as temporary:
        yield temporary
        if not target.exists():
            temporary.rename(target)
            return
        previous = target.with_name(hidden_name(target.name, "old"))
        target.rename(previous)
        try:
            # Again, for what came while the output was made; where it lies now, nobody puts anything.
            written = [file.relative_to(temporary) for file in temporary.rglob("*") if file.is_file()]
            refuse_other_files(previous, written, shown_as=target)
            temporary.rename(target)
        except BaseException:
            previous.rename(target)
            raise
        if previous.is_symlink():
            previous.unlink()
        else:
            shutil.rmtree(previous)
