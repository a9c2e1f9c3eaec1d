"""What ranks take of coded tensors: the same numbers, and of a file no more than they need."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from coded_files import arrived_from, coded_file, numbers_of
from safetensors import safe_open
from safetensors.torch import save_file

from kvpack.errors import FormatError, GeometryError, ModelMismatchError
from kvpack.integrations.vllm.arriving import Arrivals, dense, stacked


@pytest.mark.parametrize(("first", "stop"), [(0, 700), (0, 32), (64, 256), (300, 417), (699, 700), (255, 258)])
def test_outputs(tmp_path: Path, first: int, stop: int) -> None:
    """Also where no group of 32 rows begins or ends."""
    file = coded_file(tmp_path, (700, 320))
    part = arrived_from(file).outputs(first, stop)
    assert part.coded.header.rows <= stop - first + 62
    assert torch.equal(dense(part, torch.float32), numbers_of(file)[first:stop])


@pytest.mark.parametrize("options", [{"tensor_parallel": 4}, {}])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_inputs(tmp_path: Path, parts: int, options: dict[str, int]) -> None:
    """Without tiles that end where parts do the tensor is coded again: the same numbers."""
    file = coded_file(tmp_path, (300, 1536), **options)
    numbers = numbers_of(file)
    for number in range(parts):
        own = slice(1536 // parts * number, 1536 // parts * (number + 1))
        part = arrived_from(file).inputs(number, parts)
        assert torch.equal(dense(part, torch.float32), numbers[:, own])


def test_borders_that_are_none(tmp_path: Path) -> None:
    arrived = arrived_from(coded_file(tmp_path, (64, 320)))
    with pytest.raises(ModelMismatchError, match="rows 0 to 65 of 64"):
        arrived.outputs(0, 65)
    with pytest.raises(GeometryError, match="w: "):
        arrived.inputs(0, 3)


def test_stacked(tmp_path: Path) -> None:
    parts = []
    for name in "ab":
        (tmp_path / name).mkdir()
        parts.append(arrived_from(coded_file(tmp_path / name, (256, 320))).outputs(0, 256))
    (one,) = stacked(parts)
    assert torch.equal(dense(one, torch.float32), torch.cat([dense(part, torch.float32) for part in parts]))
    cut = arrived_from(tmp_path / "a" / "coded.safetensors").outputs(3, 70)
    assert stacked([cut, parts[0]]) == [cut, parts[0]]


def test_damage_is_found_where_it_is_read(tmp_path: Path) -> None:
    """The last tile row is damaged: parts in front of it are not."""
    file = coded_file(tmp_path, (1024, 320))
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    tensors["w.weight_kvpack"][-200] ^= 1
    save_file(tensors, file, metadata)
    arrived_from(file).outputs(0, 768)
    with pytest.raises(FormatError, match="w: tile"):
        arrived_from(file).outputs(512, 1024)


def test_damage_beside_blobs_and_in_front(tmp_path: Path) -> None:
    """A bit of a scale, and one of a header: the layer, or the file and the tensor, are named."""
    file = coded_file(tmp_path, (256, 320))
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    for name, error in (("w.weight_kvpack", "w: "), ("w.weight_kvpack_scale", r"coded\.safetensors.*_kvpack_scale")):
        damaged = {key: tensor.clone() for key, tensor in tensors.items()}
        damaged[name].view(torch.uint8)[3] ^= 1
        save_file(damaged, file, metadata)
        with pytest.raises(FormatError, match=error):
            arrived_from(file)


def test_lacking_and_twice() -> None:
    arrivals = Arrivals("layer", torch.bfloat16)
    with pytest.raises(ModelMismatchError, match="layer: vLLM has brought no coded weight of shard 'q'"):
        arrivals.shard("q")
    arrivals.keep("_kvpack", torch.zeros(64, dtype=torch.uint8), "q")
    with pytest.raises(ModelMismatchError, match="twice"):
        arrivals.keep("_kvpack", torch.zeros(64, dtype=torch.uint8), "q")


def _resident_bytes(file: Path) -> int:
    """Of a file, what is in the page cache."""
    size = file.stat().st_size
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), size, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(pages.ctypes.data)
        )
        assert not failed
        del view
    return int((pages & 1).sum()) * mmap.PAGESIZE


def _forget(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("split", ["outputs", "inputs"])
def test_of_a_file_a_rank_reads_its_part(tmp_path: Path, split: str) -> None:
    file = coded_file(tmp_path, (4096, 2048), tensor_parallel=4)
    size = file.stat().st_size
    _forget(file)
    if _resident_bytes(file) > size // 20:
        pytest.skip("the file system keeps files in memory")
    arrived = arrived_from(file)
    part = arrived.outputs(1024, 2048) if split == "outputs" else arrived.inputs(1, 4)
    assert len(part.coded.blob) > size // 5
    assert _resident_bytes(file) <= size / 4 * 1.05 + (64 << 10)
