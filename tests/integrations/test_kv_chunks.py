"""Chunks of KV as bytes: those of the page coder, sizes to the byte, and damage."""

from __future__ import annotations

import threading
import zlib
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvpack.encode.page_coder import dequantize_blocks, quantize_blocks
from kvpack.errors import ChunkError, InputError, PageError
from kvpack.format.pages import PAGE_TOKENS, PageFormat, PageLayout, Side

torch = pytest.importorskip("torch")
ml_dtypes = pytest.importorskip("ml_dtypes")

from kvpack.integrations.kv_chunks import ChunkCoder  # noqa: E402

HEADER_BYTES = 48
QUANTIZED = [page_format for page_format in PageFormat if page_format.is_quantized]


def kv(layers: int, tokens: int, hidden: int, dtype: Any = torch.bfloat16, seed: int = 0) -> Any:
    """Keys with channels of unlike means and sizes, as models have; values around 0."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, layers, tokens, hidden, generator=generator)
    values[0] = values[0] * torch.rand(hidden, generator=generator) * 3 + torch.randn(hidden, generator=generator) * 4
    return values.to(dtype)


def buffer(size: int, beyond: int = 0) -> Any:
    return torch.full((size + beyond,), 255, dtype=torch.uint8)


def coded(coder: ChunkCoder, *tensors: Any) -> Any:
    out = buffer(coder.size_bytes([t.shape for t in tensors]))
    assert coder.encode(tensors, out) == len(out)
    return out


def decoded(coder: ChunkCoder, data: Any, *like: Any) -> list[Any]:
    tensors = [torch.zeros_like(tensor) for tensor in like]
    coder.decode(data, tensors)
    return tensors


def as_numpy(tensor: Any) -> Any:
    return tensor.contiguous().view(torch.int16).numpy().view(
        ml_dtypes.bfloat16 if tensor.dtype == torch.bfloat16 else np.float16
    )  # fmt: skip


def noise_db(original: Any, found: Any) -> float:
    """Over the variance of each channel (of keys) or of all (of values): means cost nothing."""
    x, error = original.double(), (found.double() - original.double())
    return float(10 * torch.log10(error.square().mean() / (x - x.mean(-2, keepdim=True)).square().mean()))


@pytest.mark.parametrize(("keys", "values"), [(f, f) for f in PageFormat] + [(PageFormat.INT8, PageFormat.INT4)])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_pages_are_those_of_the_page_coder(keys: PageFormat, values: PageFormat, head_dim: int) -> None:
    dtype = torch.float16 if PageFormat.FP16 in (keys, values) else torch.bfloat16
    layers, tokens, heads = 3, 128, 2
    tensor = kv(layers, tokens, heads * head_dim, dtype)
    coder = ChunkCoder(head_dim, keys, values)
    data = coded(coder, tensor)
    blocks, wanted = [], torch.empty_like(tensor)
    for side, page_format in zip(Side, (keys, values), strict=True):
        layout = PageLayout(side, page_format, head_dim)
        of_side = as_numpy(tensor[side]).reshape(layers, tokens // PAGE_TOKENS, PAGE_TOKENS, heads, head_dim)
        found = quantize_blocks(of_side.transpose(0, 1, 3, 2, 4), layout)
        blocks.append(found.tobytes())
        numbers = dequantize_blocks(found, layout).transpose(0, 1, 3, 2, 4).reshape(layers, tokens, -1)
        wanted[side] = torch.from_numpy(np.ascontiguousarray(numbers)).to(dtype)
    assert data.numpy()[HEADER_BYTES:].tobytes() == b"".join(blocks)
    (found,) = decoded(coder, data, tensor)
    assert torch.equal(found, wanted)
    if not keys.is_quantized:
        assert torch.equal(found.view(torch.int16), tensor.view(torch.int16))


@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 100, 256, 300])
@pytest.mark.parametrize("page_format", [PageFormat.BF16, PageFormat.INT4, PageFormat.INT2])
def test_any_number_of_tokens(tokens: int, page_format: PageFormat) -> None:
    """The last page is filled with its last token: scales are those of the tokens that there are."""
    coder, tensor = ChunkCoder(32, page_format, page_format), kv(2, tokens, 96)
    data = coded(coder, tensor)
    pages = -(-tokens // PAGE_TOKENS)
    sizes = sum(PageLayout(side, page_format, 32).block_bytes for side in Side)
    assert len(data) == HEADER_BYTES + 2 * pages * 3 * sizes
    (found,) = decoded(coder, data, tensor)
    if page_format == PageFormat.BF16:
        assert torch.equal(found, tensor)
    rest = tokens % PAGE_TOKENS
    if rest > 1 and page_format.is_quantized:
        error = (found - tensor).float()[0, :, -rest:]
        x = tensor.float()[0, :, -rest:]
        step = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) / (3 if page_format == PageFormat.INT2 else 7)
        assert bool((error.abs() <= 0.6 * step + 0.01 * x.abs().amax()).all())


def test_strides_and_several_tensors() -> None:
    """A transposed view, and groups of layers of unlike heads in one chunk."""
    coder = ChunkCoder(16, PageFormat.INT8, PageFormat.INT4)
    stored = kv(2, 96, 64, torch.float16).permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    assert not stored.is_contiguous()
    other = kv(1, 64, 16, torch.float16, seed=1)
    data = coded(coder, stored, other)
    assert torch.equal(data, coded(coder, stored.contiguous(), other))
    target = torch.zeros(96, 2, 2, 64, dtype=torch.float16).permute(1, 2, 0, 3)
    second = torch.zeros_like(other)
    coder.decode(data, [target, second])
    alone = decoded(coder, coded(coder, stored), stored)[0]
    assert torch.equal(target, alone)
    assert noise_db(other[0], second[0]) < -35


@pytest.mark.parametrize("page_format", QUANTIZED)
def test_values_that_are_not_finite_stay_so(page_format: PageFormat) -> None:
    tensor = kv(1, 64, 32)
    tensor[0, 0, 5, 3] = float("inf")
    tensor[1, 0, 7, 1] = float("nan")
    coder = ChunkCoder(32, page_format, page_format)
    (found,) = decoded(coder, coded(coder, tensor), tensor)
    assert bool(torch.isnan(found[0, 0, :, 3]).all())
    assert bool(torch.isnan(found[1, 0, 7]).all())
    assert int(torch.isnan(found).sum()) == 64 + 32


# Decibels on such numbers, of keys and of values: at most.
NOISE_DB = {
    PageFormat.INT8: (-45, -45),
    PageFormat.INT4: (-17.9, -20.8),
    PageFormat.INT3: (-11.8, -14.8),
    PageFormat.INT2: (-10.9, -8.0),
    PageFormat.FP8_E4M3: (-31.8, -31.8),
    PageFormat.FP8_E5M2: (-25.9, -25.8),
}


@pytest.mark.parametrize("page_format", NOISE_DB)
def test_noise(page_format: PageFormat) -> None:
    tensor = kv(2, 256, 128)
    coder = ChunkCoder(64, page_format, page_format)
    (found,) = decoded(coder, coded(coder, tensor), tensor)
    for side in Side:
        assert noise_db(tensor[side], found[side]) < NOISE_DB[page_format][side], (
            side,
            noise_db(tensor[side], found[side]),
        )


def test_every_damaged_byte_is_found() -> None:
    coder, tensor = ChunkCoder(16, PageFormat.INT2, PageFormat.INT2), kv(1, 64, 16)
    data = coded(coder, tensor)
    for at in range(len(data)):
        harmed = data.clone()
        harmed[at] ^= 1 << at % 8
        target = torch.full_like(tensor, 3)
        with pytest.raises(ChunkError):
            coder.decode(harmed, [target])
        assert bool((target == 3).all())


@pytest.mark.parametrize("length", [0, 1, 7, 23, 47, 48, -1])
def test_cut_buffers(length: int) -> None:
    coder, tensor = ChunkCoder(16, PageFormat.INT4, PageFormat.INT4), kv(1, 64, 16)
    data = coded(coder, tensor)
    with pytest.raises(ChunkError, match=r"begin with|CRC-32|only \d+ are there"):
        decoded(coder, data[:length], tensor)
    assert len(decoded(coder, torch.cat([data, buffer(9)]), tensor)) == 1  # what follows does not matter


def test_chunks_of_other_options_are_named() -> None:
    tensor = kv(2, 64, 64)
    coder = ChunkCoder(32, PageFormat.INT8, PageFormat.INT4)
    data = coded(coder, tensor)
    for other, like, message in (
        (ChunkCoder(64, PageFormat.INT8, PageFormat.INT4), tensor, "head_dim 32, not 64"),
        (ChunkCoder(32, PageFormat.FP8_E4M3, PageFormat.INT4), tensor, "pages of K INT8, not FP8_E4M3"),
        (coder, tensor.half(), "numbers BF16, not FP16"),
        (coder, kv(2, 32, 64), r"hidden sizes \[\[2, 64, 64\]\], not \[\[2, 32, 64\]\]"),
        (coder, kv(1, 64, 128), r"\[\[2, 64, 64\]\], not \[\[1, 64, 128\]\]"),
    ):
        with pytest.raises(ChunkError, match=message):
            decoded(other, data, like)
    with pytest.raises(ChunkError, match=r"\[\[2, 64, 64\]\], not \[\[2, 64, 64\], \[2, 64, 64\]\]"):
        decoded(coder, data, tensor, tensor)
    newer = data.clone()
    newer[8] = 2
    with pytest.raises(ChunkError, match="version 2; this reader knows 1"):
        decoded(coder, newer, tensor)
    with pytest.raises(ChunkError, match="no chunk of kvpack's"):
        decoded(coder, buffer(len(data)), tensor)


def test_a_header_of_formats_that_there_are_not() -> None:
    """With a CRC that is right: a later version's, or an attacker's."""
    coder, tensor = ChunkCoder(16, PageFormat.INT4, PageFormat.INT4), kv(1, 64, 16)
    data = coded(coder, tensor)
    data[12] = 200
    crc32 = zlib.crc32(data.numpy()[: HEADER_BYTES - 4].tobytes())
    data[HEADER_BYTES - 4 : HEADER_BYTES] = torch.tensor(list(crc32.to_bytes(4, "little")), dtype=torch.uint8)
    with pytest.raises(ChunkError, match="pages of K 200, not INT4"):
        decoded(coder, data, tensor)


def test_what_is_refused() -> None:
    coder = ChunkCoder(32, PageFormat.INT4, PageFormat.INT4)
    for tensors, message in (
        ([], "a chunk of 0 tensors"),
        ([kv(1, 64, 48)], "48 numbers a layer and side, which are no heads of 32"),
        ([kv(1, 64, 32)[:1]], "keys and values"),
        ([kv(1, 64, 32)[0]], "keys and values"),
        ([kv(1, 64, 32).float()], "torch.float32; a chunk is float16 or bfloat16"),
        ([kv(1, 64, 32), kv(1, 64, 32).half()], "torch.bfloat16, torch.float16"),
    ):
        with pytest.raises(InputError, match=message):
            coder.encode(tensors, buffer(100_000))
    tensor = kv(1, 64, 32)
    with pytest.raises(InputError, match=r"takes \d+ bytes, the buffer has 100"):
        coder.encode([tensor], buffer(100))
    with pytest.raises(InputError, match="contiguous bytes in host memory"):
        coder.encode([tensor], torch.zeros(100_000, dtype=torch.int8))
    for side, page_format in product((0, 1), (PageFormat.FP16,)):
        formats = [PageFormat.INT8, PageFormat.INT8]
        formats[side] = page_format
        with pytest.raises(InputError, match="pages of FP16 hold that type alone"):
            ChunkCoder(32, *formats).encode([tensor], buffer(100_000))
    with pytest.raises(PageError, match="head_dim is 24"):
        ChunkCoder(24, PageFormat.INT8, PageFormat.INT8)


def test_the_code_of_the_document() -> None:
    document = (Path(__file__).resolve().parents[2] / "docs" / "LMCACHE.md").read_text()
    found: dict[str, Any] = {}
    exec(document.split("```python\n")[1].split("```")[0], found)
    assert len(found["data"]) == found["coder"].size_bytes([(2, 8, 256, 128)])


def test_threads_at_once() -> None:
    coder = ChunkCoder(32, PageFormat.INT4, PageFormat.INT3)
    tensors = [kv(2, 128, 64, seed=seed) for seed in range(6)]
    wanted = [coded(coder, tensor) for tensor in tensors]
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        for _ in range(3):
            data = coded(coder, tensors[number])
            found[number] = data, decoded(coder, data, tensors[number])[0]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(6):
        assert torch.equal(found[number][0], wanted[number])
        assert torch.equal(found[number][1], decoded(coder, wanted[number], tensors[number])[0])
