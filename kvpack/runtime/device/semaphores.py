"""Counters by which the blocks of a launch find out who of them is the last, and puts all parts of a sum together.

They are 0 between launches, so that one slice serves all launches of a stream. A launch in a graph gets a slice of its
own: the graph may be replayed beside anything. Slices are of memory made beforehand: what is allocated during a launch
may be a graph's, as on the streams on which Inductor warms up, and is not ours to keep.
"""

from __future__ import annotations

import threading

import torch

from kvpack.runtime.device.kernels import current_stream

_ARENA_SEMAPHORES = 1 << 20
_STREAM_SEMAPHORES = 4096
_arena: dict[int, torch.Tensor] = {}  # what is left of the newest
_arenas: list[torch.Tensor] = []  # all of them: graphs hold addresses
_stream_semaphores: dict[tuple[int, int], torch.Tensor] = {}
_arena_lock = threading.Lock()


def prepare(device: torch.device) -> None:
    """Have semaphores ready for launches to come, captured or not; without, a launch has some of its own zeroed."""
    index = torch.cuda.current_device() if device.index is None else device.index
    with _arena_lock:
        if index not in _arena or len(_arena[index]) < _ARENA_SEMAPHORES // 2:
            _arena[index] = torch.zeros(_ARENA_SEMAPHORES, dtype=torch.int32, device=device)
            _arenas.append(_arena[index])
            torch.cuda.synchronize(device)  # other streams take slices


def take(count: int, device: torch.device) -> torch.Tensor:
    """i32 [at least count], for a launch on the current stream that leaves them at 0."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    index = torch.cuda.current_device() if device.index is None else device.index
    key = (index, current_stream(index))
    captured = torch.cuda.is_current_stream_capturing()
    with _arena_lock:
        found = None if captured else _stream_semaphores.get(key)
        if found is not None and len(found) >= count:
            return found
        rest = _arena.get(index)
        taken = count if captured else max(count, _STREAM_SEMAPHORES)
        if rest is not None and len(rest) >= taken:
            found, _arena[index] = rest[:taken], rest[taken:]
            if not captured:
                _stream_semaphores[key] = found
            return found
    return torch.zeros(count, dtype=torch.int32, device=device)
