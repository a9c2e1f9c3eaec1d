"""What a snapshot is of, told by its headers and the formats of its pages alone: nothing is decoded."""

from __future__ import annotations

import json
import os
from typing import Any

from kvpack.errors import FormatError
from kvpack.format.container import Container
from kvpack.format.snapshot import SNAPSHOT_KEY, SnapshotFile


def says_snapshot(path: str | os.PathLike[str]) -> bool:
    """Whether a file says that it is a snapshot, which may be damaged all the same. False of what is no container.

    Raises:
        OSError: it cannot be read.
    """
    try:
        with Container(path) as container:
            return SNAPSHOT_KEY in container.metadata
    except FormatError:
        return False


def snapshot_sizes(file: SnapshotFile) -> tuple[int, int, int]:
    """Bytes of the file, of its pages in memory, and of the same numbers in 16 bits."""
    return file.container.file.size_bytes, file.page_bytes, file.header.fp16_bytes


def describe_snapshot(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a snapshot is of: its header, its sizes, and its pages and their bytes by side and format, as JSON values.

    Raises:
        SnapshotError, ContainerError, OSError
    """
    with SnapshotFile(path) as file:
        file_bytes, page_bytes, fp16_bytes = snapshot_sizes(file)
        coded_bytes: dict[str, int] = {}
        counts: dict[str, int] = {}
        for run in range(file.header.runs):
            for pages in file.pages_of_run(run):
                key = f"{pages.side.name} {pages.format.name}"
                counts[key] = counts.get(key, 0) + len(pages)
                for part in pages.parts:
                    coded_bytes[key] = coded_bytes.get(key, 0) + file.container.tensors[part.name].size_bytes
        return {
            **json.loads(file.header.to_json()),
            "runs": file.header.runs,
            "file_bytes": file_bytes,
            "page_bytes": page_bytes,
            "fp16_bytes": fp16_bytes,
            "pages": counts,
            "coded_bytes": coded_bytes,
        }
