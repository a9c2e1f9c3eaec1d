"""Whether the files of a compressed directory account for all of the original's."""

from __future__ import annotations

import filecmp
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvpack.encode.fp8 import dequantized_config
from kvpack.encode.model_config import CONFIG_NAME, decompressed_config, read_config
from kvpack.encode.model_directory import FileReport, sort_files
from kvpack.encode.model_tree import ModelTree
from kvpack.encode.output_files import added_indexes


@dataclass
class FileComparison:
    """What comparing two directories found, tensors left aside.

    Attributes:
        compared: how many files of the original have their like.
        differences: file → what differs.
        left_out: files of the original that compress leaves out, and that are not there.
        extra: files that the original does not have.
    """

    compared: int = 0
    differences: dict[str, str] = field(default_factory=dict)
    left_out: list[FileReport] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)


def compare_files(tree: ModelTree, original: ModelTree, dequantized_folders: Collection[Path] = ()) -> FileComparison:
    """Every file of ``original`` against ``tree``: copies by their bytes, indexes and config.json by what they say.

    Args:
        dequantized_folders: those where ``tree`` has the weights that quantized ones of ``original`` stand for.
    """
    result = FileComparison()
    ours = {file.path for file in tree.weight_files} | {i.path for i in tree.indexes} | set(tree.others)
    theirs: set[Path] = set()

    def note(path: Path, difference: str | None) -> None:
        theirs.add(path)
        if path not in ours:
            difference = "is missing"
        if difference is None:
            result.compared += 1
        else:
            result.differences[str(path)] = difference

    for file in original.weight_files:  # whose tensors are compared one by one
        note(file.path, None)
    indexes = {index.path: index for index in tree.indexes}
    for index in original.indexes:
        difference = None
        if index.path in indexes:
            other = indexes[index.path]
            if not original.counted_files(index).items() <= tree.counted_files(other).items():
                difference = "names other files for the same tensors"
            elif index.rewritten({}, 0) != other.rewritten({}, 0):
                difference = "says something else than the original beside its weight_map and total_size"
        note(index.path, difference)
    for folder in original.folders:
        path = folder / CONFIG_NAME
        if (original.path / path).exists():
            expected = _plain(original.path / folder)
            if folder in dequantized_folders and expected is not None:
                expected = dequantized_config(expected)
            same = path in ours and _plain(tree.path / folder) == expected
            note(path, None if same else "says something else than the original")
    copied, left_out = sort_files(original.path, original)
    for report in copied:
        path = Path(report.path)
        same = path in ours and filecmp.cmp(tree.path / path, original.path / path, shallow=False)
        note(path, None if same else "its bytes differ")
    for report in left_out:
        path = Path(report.path)
        if path in ours:  # somebody put it there
            same = filecmp.cmp(tree.path / path, original.path / path, shallow=False)
            note(path, None if same else "its bytes differ")
        else:
            result.left_out.append(report)
    added = {folder / CONFIG_NAME for folder in tree.folders if _is_added(tree.path / folder)}
    added |= {index.path for index in added_indexes(original)}
    result.extra = sorted(str(path) for path in ours - theirs - added)
    return result


def _plain(folder: Path) -> dict[str, Any] | None:
    return decompressed_config(read_config(folder))


def _is_added(folder: Path) -> bool:
    return (folder / CONFIG_NAME).exists() and decompressed_config(read_config(folder)) is None
