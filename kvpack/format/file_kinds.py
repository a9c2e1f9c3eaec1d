"""What a file is that is no safetensors file, by its first bytes, and what to do about it."""

from __future__ import annotations

import re

# As far as a tar archive has its mark.
HEAD_BYTES = 512

_AGAIN = "download it again, and look at what the server says"
_READ_BY_COMPRESS = "`kvpack compress` reads it"
_CONVERT = "convert it to safetensors first, or take the model's safetensors files"
_MAGIC = (
    (b"\x89HDF\r\n\x1a\n", f"an HDF5 file (Keras, TensorFlow): {_CONVERT}"),
    (b"\x93NUMPY", "a NumPy array (.npy): load it, and give kvpack.compress a mapping of names to arrays"),
    (b"\x1f\x8b", "compressed with gzip: unpack it with gunzip, or tar -xzf, first"),
    (b"\xfd7zXZ\0", "compressed with xz: unpack it first"),
    (b"BZh", "compressed with bzip2: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (b"PAR1", f"a Parquet file, which holds tables: {_CONVERT}"),
    (b"%PDF", f"a PDF document: {_AGAIN}"),
    (b"\x7fELF", f"a program: {_CONVERT}"),
)
_LEGACY_GGML = (b"lmgg", b"tjgg", b"fmgg")
_ONNX = re.compile(rb"\x08[\x01-\x20](\x12|\x1a|\x22|\x3a)")
_TFLITE = b"TFL3"
# Flax: a map of MessagePack whose first key is a text.
_MSGPACK = re.compile(rb"(?:[\x81-\x8f]|\xde..|\xdf....)(?:[\xa1-\xbf]|\xd9.)[A-Za-z_]", re.DOTALL)
# What torch.save puts first, and torch.jit.save.
_TORCH_MEMBER = re.compile(rb"[^/]+/(data\.pkl|version|byteorder|\.format_version|data/\d+)")
_LFS_SIZE = re.compile(rb"^size (\d{1,20})$", re.MULTILINE)
_SHOWN_CHARACTERS = 60
_MAX_PLAUSIBLE_HEADER = 100_000_000  # that of container.py


def is_gguf(head: bytes) -> bool:
    """Whether a file begins as one of llama.cpp's does, of either byte order."""
    return head[:4] == b"GGUF"


def is_pickle(head: bytes) -> bool:
    """Whether it begins as torch.save's do: a zip file of its own making, or a pickle (torch before 1.6)."""
    return _is_torch_zip(head) or head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def _first_member(head: bytes) -> bytes:
    """Name of the first file in a zip archive."""
    return head[30 : 30 + int.from_bytes(head[26:28], "little")]


def _is_torch_zip(head: bytes) -> bool:
    name = _first_member(head)
    return head[:4] == b"PK\3\4" and _TORCH_MEMBER.fullmatch(name) is not None


def _lfs_pointer(head: bytes) -> str:
    size = _LFS_SIZE.search(head)
    stands_for = f" that stands for a file of {int(size[1]):,} bytes" if size else ""
    return (
        f"a git-lfs pointer{stands_for}, not the weights: `git lfs install` and `git lfs pull` in its folder fetch them"
    )


def _as_text(head: bytes) -> str | None:
    """None if it is no text."""
    head = head.removeprefix(b"\xef\xbb\xbf")
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:  # or the end of the head cuts a character
            return None
        text = head[: error.start].decode()
    if not text.strip() or not all(character.isprintable() or character in "\t\r\n\f" for character in text):
        return None
    return text


def _text(head: bytes) -> str | None:
    """Of a page or a message in place of the file; None if it is no text."""
    text = _as_text(head)
    if text is None:
        return None
    start = text.lstrip().lower()
    if start.startswith(("<!doctype html", "<html", "<head", "<body", "<!--")):
        return f"an HTML page in place of the file (a login or an error?): {_AGAIN}"
    if start.startswith(("<?xml", "<error")):
        return f"an XML message in place of the file: {_AGAIN}"
    if start[:1] in ("{", "["):
        return "JSON text, not weights: is it the index or the configuration? The model's folder is what kvpack takes"
    return f"text ({_beginning(text)!r}), not weights: {_AGAIN}"


def _beginning(text: str) -> str:
    """The first words, on one line."""
    words = " ".join(text.split())
    return words if len(words) <= _SHOWN_CHARACTERS else words[:_SHOWN_CHARACTERS] + "…"


def describe(head: bytes, size_bytes: int) -> str | None:
    """What a file is, and what to do; None if its bytes do not tell.

    Args:
        head: its first ``HEAD_BYTES``, or all of it.
        size_bytes: of the whole file.
    """
    header_bytes = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header_bytes < _MAX_PLAUSIBLE_HEADER:
        if 8 + header_bytes <= size_bytes:
            return None  # a safetensors file, and something else is wrong with it
        return (
            f"one that is cut short (a download that broke off?), with a header of {header_bytes} bytes in a file of "
            f"{size_bytes} bytes: get it again"
        )
    if size_bytes == 0:
        return "empty: was a download or a copy broken off? Get it again"
    if size_bytes > 8 and not head.strip(b"\0"):
        return f"nothing but zeros at its beginning: was a download broken off? {_AGAIN.capitalize()}"
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return _lfs_pointer(head)
    if head.startswith(b"# xet version"):
        return "a Xet pointer, not the weights: `git xet` or the huggingface_hub package (`hf download`) fetch them"
    if is_gguf(head):
        return f"a GGUF file (llama.cpp): {_READ_BY_COMPRESS} under a name that ends in .gguf"
    if head[:4] in _LEGACY_GGML:
        return "a GGML file, older than GGUF: convert the original model anew"
    if head[:2] == b"PK":
        first = _first_member(head)
        if first.endswith(b".npy"):
            return "a NumPy archive (.npz): load it, and give kvpack.compress a mapping of names to arrays"
        if not _is_torch_zip(head):
            return "a zip archive, and no PyTorch pickle: unpack it first"
    if is_pickle(head):
        return f"a PyTorch pickle: {_READ_BY_COMPRESS} under a name that ends in .bin, .pt or .pth"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it with tar -xf first"
    for magic, what in _MAGIC:
        if head.startswith(magic):
            return what
    if head[4:8] == _TFLITE:
        return f"a TFLite model: {_CONVERT}"
    text = _text(head)
    if text is not None:
        return text
    if _ONNX.match(head):
        return f"an ONNX model (or another protocol buffer): {_CONVERT}"
    if _MSGPACK.match(head):
        return f"a MessagePack file (Flax): {_CONVERT}"
    return None


def describe_for_context(head: bytes, size_bytes: int) -> str | None:
    """The same where a file was to be a saved context: a text may be a prompt, and weights are none."""
    advice = "--prompt-file of `kvpack generate` reads texts, and its --save-context makes contexts of them"
    return _described_as_text(head, size_bytes, f"no context: {advice}")


def describe_for_moments(head: bytes, size_bytes: int) -> str | None:
    """The same where a file was to be of moments: a text may be what they are to be found on."""
    advice = "`kvpack moments MODEL --text FILE -o OUT` finds moments on a text, and --calibrate does it on the way"
    return _described_as_text(head, size_bytes, f"no moments: {advice}")


def _described_as_text(head: bytes, size_bytes: int, otherwise: str) -> str | None:
    if (text := _as_text(head)) is None or describe(head, size_bytes) != _text(head):
        return describe(head, size_bytes)
    return f"text ({_beginning(text)!r}), {otherwise}"
