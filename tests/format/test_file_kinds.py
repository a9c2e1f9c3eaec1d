"""Files that are no safetensors files are named for what they are, wherever one is expected."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

import kvpack
from kvpack.errors import NotAContainerError
from kvpack.format.file_kinds import HEAD_BYTES, describe


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"abc")
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights"), io.BytesIO())
    return buffer.getvalue()


def numpy_file(save: Callable[[io.BytesIO, np.ndarray], None]) -> bytes:
    buffer = io.BytesIO()
    save(buffer, np.zeros(9))
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 4976698672\n"
KINDS = {
    "lfs": (LFS, r"git-lfs pointer that stands for a file of 4,976,698,672 bytes.*`git lfs pull`"),
    "xet": (b"# xet version 0\nfilesize = 12\nhash = 'ab'\n", "Xet pointer"),
    "html": (b"<!DOCTYPE html><html><body>401</body></html>", "an HTML page"),
    "html with space": (b"\xef\xbb\xbf\n  <html lang=en>" + "é".encode() * 400, "an HTML page"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML message"),
    "not found": (b"Entry not found", r"text \('Entry not found'\)"),
    "short text": (b"404", r"text \('404'\)"),
    "json": (json.dumps({"weight_map": {}}).encode(), "JSON text"),
    "empty": (b"", "empty"),
    "zeros": (bytes(5000), "nothing but zeros"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(200), r"a GGUF file .*\.gguf"),
    "ggml": (b"tjgg\x03\0\0\0" + bytes(200), "a GGML file"),
    "torch": (zipped("archive/data.pkl"), r"a PyTorch pickle.*\.bin"),
    "torch before 1.6": (pickle.dumps(0x1950A86A20F9469CFC6C, 2), "a PyTorch pickle"),
    "pickle": (pickle.dumps({"a": np.zeros(3)}, 5), "a PyTorch pickle"),
    "zip": (zipped("model.safetensors"), "a zip archive"),
    "npz": (numpy_file(lambda file, array: np.savez(file, w=array)), r"NumPy archive \(.npz\)"),
    "npy": (numpy_file(np.save), r"NumPy array \(.npy\)"),
    "gzip": (gzip.compress(b"abc"), "gzip"),
    "xz": (lzma.compress(b"abc"), "xz"),
    "bzip2": (bz2.compress(b"abc"), "bzip2"),
    "tar": (tarred(), "a tar archive"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "HDF5"),
    "onnx": (b"\x08\x08\x12\x07pytorch\x1a\x051.9.0" + bytes(40), "ONNX"),
    "onnx of tf2onnx": (b"\x08\x07\x12\x07tf2onnx\x1a\x051.9.0\xff\xfe", "ONNX"),
    "flax": (b"\x82\xa6params\x81\xa6kernel\xc7\x10\x01" + bytes(40), "MessagePack"),
    "flax of many layers": (b"\xde\x00\x10\xd9\x25transformer.h" + bytes(40), "MessagePack"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_kind(tmp_path: Path, kind: str) -> None:
    """Named as a file, and as a shard of a directory, in all that opens one."""
    content, match = KINDS[kind]
    directory = tmp_path / "model"
    directory.mkdir()
    path = directory / "model.safetensors"
    path.write_bytes(content)
    for source in (path, directory):
        for use in (kvpack.open, kvpack.compress, kvpack.verify, lambda p: kvpack.decompress(p, tmp_path / "back")):
            with pytest.raises(NotAContainerError, match=match) as caught:
                use(source)
            assert str(caught.value).startswith(f"{path}: ")
    assert sorted(tmp_path.iterdir()) == [directory]
    assert sorted(directory.iterdir()) == [path]


def test_what_says_nothing_of_itself() -> None:
    safetensors = struct.pack("<Q", 60) + b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    for head in (safetensors, b"\x80\x02" + safetensors[2:], bytes(range(144, 192)), b"\xff" * HEAD_BYTES):
        assert describe(head, 10**6) is None


@pytest.mark.parametrize("cut", [9, 20, 100])
def test_a_safetensors_file_that_ends_too_early(tmp_path: Path, cut: int) -> None:
    """A download that broke off is told from other kinds of files."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(save({"w": np.zeros((4, 4), np.float32), "v": np.zeros((4, 4), np.float32)})[:cut])
    with pytest.raises(NotAContainerError, match=f"cut short.* of {cut} bytes"):
        kvpack.open(path)
