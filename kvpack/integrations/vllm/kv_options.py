"""What ``kv_connector_extra_config`` may say to :class:`~kvpack.integrations.vllm.kv_connector.KVPackConnector`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kvpack.errors import InputError
from kvpack.format.pages import PageFormat

LOSSLESS = "16-bit"
_DEFAULT_BYTES = 1 << 30
# What waits for being encoded: of so many steps, as the next one comes while one is encoded; of free memory no more
# than such a part, and in any case so much.
_QUEUED_STEPS, _QUEUE_PART_OF_FREE, _LEAST_QUEUE_BYTES = 2, 4, 1 << 28


@dataclass(frozen=True)
class ConnectorOptions:
    """How prompts' KV is kept.

    Attributes:
        pages: names of the formats that K and V are kept in; ``"16-bit"`` is the model's own type, bit for bit.
        directory: of files, made if it is not there; None: nothing outlives the engine.
        disk_bytes: the most that files take, of all ranks together; None: no limit.
        host_bytes: of host memory, of all ranks together.
        queue_bytes: the most that waits for being encoded, of each rank; what does not fit is not kept. None: as
            :func:`queue_room` says.
        min_load_tokens: fewer tokens than these are computed, not loaded.
        weights_id: names the weights, where they are in no local directory that could be looked at.
    """

    pages: tuple[str, str] = (LOSSLESS, LOSSLESS)
    directory: Path | None = None
    disk_bytes: int | None = None
    host_bytes: int = _DEFAULT_BYTES
    queue_bytes: int | None = None
    min_load_tokens: int = 64
    weights_id: str | None = None

    def formats(self, full_format: PageFormat) -> tuple[PageFormat, PageFormat]:
        """Of K and V, where 16 bits are ``full_format``.

        Raises:
            InputError: FP16 of a cache in BF16, or the other way round.
        """
        k, v = (full_format if name == LOSSLESS else PageFormat[name] for name in self.pages)
        for found in (k, v):
            if not found.is_quantized and found != full_format:
                raise InputError(
                    f"pages={found.name}: the model's keys and values are {full_format.name}; say {LOSSLESS!r}"
                )
        return k, v

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> ConnectorOptions:
        """
        Raises:
            InputError: a key that is not known, or a value that cannot be used; the message names it.

        >>> ConnectorOptions.parse({"pages": "INT8", "host_bytes": 1024}).pages
        ('INT8', 'INT8')
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(config.keys() - set(known)):
            raise InputError(
                f"kv_connector_extra_config has {', '.join(map(repr, unknown))}; KVPackConnector knows "
                f"{', '.join(known)}"
            )
        values = dict(config)
        if "pages" in values:
            values["pages"] = _parsed_pages(values["pages"])
        if (directory := values.get("directory")) is not None:
            if not isinstance(directory, str | Path) or not str(directory):
                raise InputError(f"directory={directory!r} is no path")
            values["directory"] = Path(directory)
        for name, least in (("disk_bytes", 0), ("host_bytes", 1), ("queue_bytes", 1), ("min_load_tokens", 1)):
            value = values.get(name, least)
            if value is None and name in ("disk_bytes", "queue_bytes"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{name}={value!r}; an integer of at least {least} is wanted")
        if values.get("disk_bytes") is not None and values.get("directory") is None:
            raise InputError(f"disk_bytes={values['disk_bytes']} needs a directory")
        weights_id = values.get("weights_id")
        if weights_id is not None and not isinstance(weights_id, str):
            raise InputError(f"weights_id={weights_id!r} is no text")
        return cls(**values)


def queue_room(step_bytes: int, free_bytes: int | None, outside_bytes: int | None = None) -> int:
    """How many bytes may wait for being encoded, where nothing else is said.

    Args:
        step_bytes: of keys and values that a step of the engine brings at most.
        free_bytes: of the memory that they wait in; None: that is not known.
        outside_bytes: of that memory, what the engine does not count as its own: of what is free when it starts it
            keeps some for activations. None: it may all be taken.

    >>> queue_room(1 << 30, free_bytes=100 << 30) >> 20, queue_room(1 << 30, free_bytes=5 << 30) >> 20
    (2048, 1280)
    >>> queue_room(1 << 20, free_bytes=100 << 30) >> 20
    256
    >>> queue_room(1 << 30, free_bytes=100 << 30, outside_bytes=1 << 30) >> 20
    1024
    """
    room = _QUEUED_STEPS * step_bytes
    if free_bytes is not None:
        room = min(room, free_bytes // _QUEUE_PART_OF_FREE)
    if outside_bytes is not None:
        room = min(room, outside_bytes)
    return max(room, _LEAST_QUEUE_BYTES)


def _parsed_pages(value: object) -> tuple[str, str]:
    pair = list(value) if isinstance(value, list | tuple) else [value, value]
    names = (LOSSLESS, *PageFormat.__members__)
    if len(pair) != 2 or not all(name in names for name in pair):
        raise InputError(f"pages={value!r}; one of {', '.join(names)} is wanted, or a list of two: for K and for V")
    k, v = map(str, pair)
    return k, v
