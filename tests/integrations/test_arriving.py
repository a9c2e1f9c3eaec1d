"""What ranks take of coded tensors: the same numbers, and of a file no more than they need."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
import pytest
import sample_blobs as samples
import torch
from coded_files import arrived_from, coded_file, numbers_of
from safetensors import safe_open
from safetensors.torch import save_file

from kvpack.encode.blob_decoder import decode_integers
from kvpack.encode.blob_encoder import encode_elements
from kvpack.errors import FormatError, GeometryError, ModelMismatchError, NotSupportedError
from kvpack.format.blob import Blob
from kvpack.format.layout import ElementKind, integer_layout
from kvpack.integrations.vllm.arriving import Arrivals, ArrivedTensor, dense, stacked
from kvpack.integrations.vllm.coded_experts import rank_stacks


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


@pytest.mark.parametrize("own", [range(5), range(1, 3), range(4, 5), range(1, 5, 2)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_experts_of_one_tensor(tmp_path: Path, own: range, ranks: int) -> None:
    """Each rank's numbers, expert by expert."""
    up, down = experts_files(tmp_path, tensor_parallel=2)
    wanted = numbers_of(up).unflatten(1, (2, ranks, -1)), numbers_of(down).unflatten(2, (ranks, -1))
    for rank in range(ranks):
        got = rank_stacks(arrived_from(up), arrived_from(down), list(own), rank, ranks)
        for parts, right in zip(got, (wanted[0][:, :, rank].flatten(1, 2), wanted[1][:, :, rank]), strict=True):
            assert parts[0].coded.header.matrices == len(own)
            for place, expert in enumerate(own):
                numbers = torch.cat([dense(part.matrix(place), torch.float32) for part in parts])
                assert torch.equal(numbers, right[expert])


def experts_files(folder: Path, **options: int) -> tuple[Path, Path]:
    """Gate and up, and down, of five experts of 64 inputs."""
    files = []
    for name, shape in (("up", (5, 256, 64)), ("down", (5, 64, 128))):
        (folder / name).mkdir()
        files.append(coded_file(folder / name, shape, **options))
    return files[0], files[1]


def test_halves_of_whole_groups_are_one_part(tmp_path: Path) -> None:
    """And where all is one rank's, it is the file's very bytes."""
    (tmp_path / "down").mkdir()
    down = arrived_from(coded_file(tmp_path / "down", (3, 64, 128), tensor_parallel=2))
    file = coded_file(tmp_path, (3, 256, 64))
    gate_up = arrived_from(file)
    (both,), (whole,) = rank_stacks(gate_up, down, [0, 1, 2], 0, 1)
    assert (both.coded.blob, whole.coded.blob) == (gate_up._bytes, down._bytes)
    (both,), _ = rank_stacks(gate_up, down, [0, 1, 2], 1, 2)
    right = numbers_of(file).unflatten(1, (4, 64))[:, [1, 3]].flatten(1, 2)
    assert torch.equal(torch.stack([dense(both.matrix(i), torch.float32) for i in range(3)]), right)


def test_experts_of_other_shapes(tmp_path: Path) -> None:
    """As inputs × outputs (Llama 4, gpt-oss), which is no error of the checkpoint; and others."""
    arrived = arrived_from(coded_file(tmp_path, (5, 192, 64)))
    arrived.check_shape(192, 64, 5)
    with pytest.raises(NotSupportedError, match="w: 5 matrices of 192 inputs × 64 outputs"):
        arrived.check_shape(64, 192, 5)
    with pytest.raises(ModelMismatchError, match="5 × 192 outputs × 64 inputs in the checkpoint, 4 × 192 × 64 in"):
        arrived.check_shape(192, 64, 4)
    with pytest.raises(ModelMismatchError, match=r"\[0, 1, 3\] of a rank"):
        rank_stacks(arrived, arrived, [0, 1, 3], 0, 1)


def test_experts_stored_as_inputs_by_outputs(tmp_path: Path) -> None:
    """Where the header says so, rows are outputs as everywhere."""
    elements = samples.gaussian_elements((2, 64, 96), 5, 2.0, 1)
    data = encode_elements(elements, integer_layout("balanced", ElementKind.SIGNED, 5), tile_cols=64, transposed=True)
    scales = torch.linspace(0.5, 1.5, 2 * 64)
    blob = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
    arrived = ArrivedTensor("w", {"_kvpack": blob, "_kvpack_scale": scales}, torch.float32)
    arrived.check_shape(64, 96, 2)
    (both,), _ = rank_stacks(arrived, arrived, [1], 0, 1)
    right = torch.from_numpy(decode_integers(Blob(data))).float() * scales.reshape(2, 64, 1)
    assert torch.equal(dense(both.matrix(0), torch.float32), right[1])


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


def test_of_experts_a_rank_reads_its_own(tmp_path: Path) -> None:
    file = coded_file(tmp_path, (8, 1024, 1024))
    size = file.stat().st_size
    _forget(file)
    if _resident_bytes(file) > size // 20:
        pytest.skip("the file system keeps files in memory")
    part = arrived_from(file).matrices(range(4, 6)).outputs(0, 1024)
    assert len(part.coded.blob) > size // 5
    assert _resident_bytes(file) <= size / 4 * 1.05 + (64 << 10)


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
