"""Whether an output that is there already is the one that was asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from kvpack.encode.listing import listed
from kvpack.encode.model_config import written_options
from kvpack.encode.model_tree import ModelTree
from kvpack.encode.moments import sampled_crc32
from kvpack.encode.verify import changed_tensors
from kvpack.errors import FormatError, InputError
from kvpack.format.container import Container

_SHOWN = 3


def check_finished(
    target: Path, tree: ModelTree, options: Mapping[str, Any], own: Collection[Path], threads: int | None = None
) -> None:
    """Check that ``target`` is ``tree``'s model, compressed with ``options``.

    Options are those of its config.json. Of its tensors names and shapes are compared, and samples of those that are
    kept as they are. Of a part's own files all is compared, as :func:`~kvpack.encode.verify.verify` does it: other
    weights of the same shapes differ in nothing else.

    Args:
        tree: the input, as it is coded.
        own: the part's files, relative to the input.

    Raises:
        InputError: it is another output, or none of kvpack's; says in what it differs.
        OSError: it cannot be read.
    """
    try:
        differences = _differences(target, tree, options)
        if not differences:
            changed = changed_tensors(target, tree.path, own, threads=threads)
            differences = [f"{name}: {difference}" for name, difference in list(changed.items())[:_SHOWN]]
    except FormatError as error:
        differences = [str(error)]
    if differences:
        raise InputError(
            f"{target} exists already, and not as what is asked for: {'; '.join(differences)}. Move it away, or name "
            "another output (-o)"
        )


def _differences(target: Path, tree: ModelTree, options: Mapping[str, Any]) -> list[str]:
    theirs = written_options(target) if target.is_dir() else None
    if not isinstance(theirs, dict):
        return ["its config.json does not say how the weights were compressed"]
    found = [
        f"{name} is {options.get(name)!r} here, {theirs.get(name)!r} there"
        for name in dict.fromkeys([*options, *theirs])
        if options.get(name) != theirs.get(name)
    ]
    with ModelTree(target) as output:
        files = {file.path: file.container for file in output.weight_files}
        for file in tree.weight_files:
            if file.path not in files:
                found.append(f"{file.path} is missing")
            elif others := _other_tensors(files[file.path], file.container):
                found.append(f"tensors of {file.path}: {listed(others, _SHOWN)}")
    return found


def _other_tensors(output: Container, source: Container) -> list[str]:
    """Names of those that are not the source's."""
    found = [name for name in output.original_names() if name not in source.tensors]
    for name, tensor in source.tensors.items():
        if name in output.coded:
            is_same = tuple(output.coded[name]["shape"]) == tuple(tensor.shape)
        else:
            is_same = name in output.tensors and sampled_crc32(output, name) == sampled_crc32(source, name)
        if not is_same:
            found.append(name)
    return found
