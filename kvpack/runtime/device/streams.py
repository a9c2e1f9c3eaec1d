"""Streams beside the current one: work is forked off to them, and joined again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch


@cache
def side_streams(device: torch.device, count: int) -> tuple[torch.cuda.Stream, ...]:
    """Streams of a GPU, the same ones for the same count."""
    return tuple(torch.cuda.Stream(device) for _ in range(count))


@contextmanager
def forked(device: torch.device, count: int) -> Iterator[Sequence[torch.cuda.Stream | None]]:
    """``count`` streams that begin behind what the current one has been given; what it is given afterwards waits for
    them. None instead of each on the CPU, where ``torch.cuda.stream(None)`` changes nothing.
    """
    if device.type == "cpu":
        yield [None] * count
        return
    current, streams = torch.cuda.current_stream(device), side_streams(device, count)
    for stream in streams:
        stream.wait_stream(current)
    try:
        yield streams
    finally:
        for stream in streams:
            current.wait_stream(stream)
