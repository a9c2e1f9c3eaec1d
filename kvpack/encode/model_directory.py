"""Model directories: configuration, index, which files come along, and putting a whole directory in place."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

from kvpack.encode.reader import INDEX_NAME
from kvpack.errors import DirectoryIndexError, InputError, OtherFilesError
from kvpack.format.container import VERSION_KEY, Container
from kvpack.format.layout import VERSION
from kvpack.format.temporary_files import create_directory, hidden_name, remove_abandoned

CONFIG_NAME = "config.json"
QUANTIZATION_KEY = "quantization_config"
# Where the original's own quantization_config is kept, to be put back by decompress.
ORIGINAL_KEY = "original"
# With which options the weights were compressed.
OPTIONS_KEY = "options"

# Weights in whatever form: the safetensors are coded, the others are left out.
_WEIGHTS = re.compile(
    r"\.(safetensors|safetensors\.index\.json|bin|bin\.index\.json|pt|pth|h5|msgpack|onnx|ot|gguf|tflite)$"
)

# How many entries a message lists.
_SHOWN = 5


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory, {} if there is none.

    Raises:
        DirectoryIndexError: it is not a JSON object.
    """
    path = directory / CONFIG_NAME
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DirectoryIndexError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise DirectoryIndexError(f"{path}: not a JSON object")
    return config


def compressed_config(
    config: Mapping[str, Any], options: Mapping[str, Any], blob_bytes: Mapping[str, int]
) -> dict[str, Any]:
    """config.json of the compressed model: FORMAT.md §9.4."""
    quantization: dict[str, Any] = {
        "quant_method": "kvpack",
        "format_version": VERSION,
        OPTIONS_KEY: dict(options),
        "blob_bytes": dict(sorted(blob_bytes.items())),
    }
    if QUANTIZATION_KEY in config:
        quantization[ORIGINAL_KEY] = config[QUANTIZATION_KEY]
    return {**config, QUANTIZATION_KEY: quantization}


def _is_kvpack(quantization: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(quantization, dict) and quantization.get("quant_method") == "kvpack"


def written_options(directory: Path) -> Any:
    """What config.json says of the options, as it stands there; None if it says nothing.

    Raises:
        DirectoryIndexError: config.json is not a JSON object.
    """
    quantization = read_config(directory).get(QUANTIZATION_KEY)
    return quantization.get(OPTIONS_KEY) if _is_kvpack(quantization) else None


def decompressed_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`compressed_config`."""
    restored = dict(config)
    quantization = restored.get(QUANTIZATION_KEY)
    if _is_kvpack(quantization):
        del restored[QUANTIZATION_KEY]
        if ORIGINAL_KEY in quantization:
            restored[QUANTIZATION_KEY] = quantization[ORIGINAL_KEY]
    return restored


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_index(directory: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    """model.safetensors.index.json: which shard holds which stored tensor.

    Raises:
        InputError: a shard's name is not UTF-8.
    """
    for shard in set(weight_map.values()):
        try:
            shard.encode()
        except UnicodeEncodeError:
            raise InputError(f"{shard!r} is no name in UTF-8, which an index needs: rename the file") from None
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / INDEX_NAME, index)


def other_files(source: Path, target: Path) -> tuple[list[Path], list[Path]]:
    """Files besides config.json, relative to ``source``: those that come along, and weights that do not.

    Hidden files and directories are passed over, and so is an earlier output at ``target``, which may lie in
    ``source``.
    """
    earlier = target.resolve()
    carried: list[Path] = []
    weights: list[Path] = []
    for folder, directories, names in os.walk(source):
        here = Path(folder)
        directories[:] = sorted(d for d in directories if not d.startswith(".") and (here / d).resolve() != earlier)
        for name in sorted(names):
            relative = (here / name).relative_to(source)
            if name.startswith(".") or relative == Path(CONFIG_NAME):
                continue
            (weights if _WEIGHTS.search(name) else carried).append(relative)
    return carried, weights


def copy_files(source: Path, target: Path, files: list[Path]) -> None:
    """Copy ``files``, relative paths, from one directory to another."""
    for relative in files:
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / relative, target / relative)


def size_bytes(path: Path) -> int:
    """Bytes of a file, or of all files of a directory."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


def _is_earlier_output(path: Path) -> bool:
    """Whether a file is one that kvpack made of a model's weights."""
    if path.name == INDEX_NAME:
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
        rest = len(others) - _SHOWN
        listed = ", ".join(others[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
        raise OtherFilesError(
            f"{shown_as or directory} is not replaced: it holds {len(others)} "
            f"{'entry that is' if len(others) == 1 else 'entries that are'} no part of the output ({listed}); choose "
            "another output (-o), or move them away"
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
    remove_abandoned(target, "tmp")
    temporary = target.with_name(hidden_name(target.name, "tmp"))
    lock = create_directory(temporary)
    try:
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
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock)
