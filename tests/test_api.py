"""The Python interface: ``kvpack.open`` and its reader, limits, threads, and the examples in docstrings."""

from __future__ import annotations

import doctest
import gc
import importlib
import pkgutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

import kvpack
from kvpack.errors import LimitError

Arrays = dict[str, npt.NDArray[Any]]
# Packages of extras: modules that need them are left out where they are not installed.
OPTIONAL = {"torch", "cupy", "transformers", "matplotlib", "cuda", "lmcache", "vllm"}
NEED_TORCH = {"KVCache", "RansEmbedding", "RansLinear", "attention_with_kv_cache", "load", "replace_linears", "warmup"}
NEED_TRANSFORMERS = {"KVPackCache", "KVPackConfig"}


def model() -> Arrays:
    rng = np.random.default_rng(1)
    arrays: Arrays = {f"layers.{i}.weight": (rng.standard_t(5, (300, 400)) * 0.02).astype(np.float32) for i in range(3)}
    arrays["half.weight"] = rng.normal(size=(128, 256)).astype(ml_dtypes.bfloat16)
    arrays["codes.weight"] = np.rint(rng.normal(size=(100, 200)) * 9).astype(np.int8)
    arrays["norm.weight"] = rng.normal(size=300).astype(np.float32)
    arrays["ids"] = np.arange(12, dtype=np.int64).reshape(3, 4)
    return arrays


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantized but for ``half.weight``, which is kept exact."""
    folder = tmp_path_factory.mktemp("api")
    save_file(model(), folder / "in.safetensors")
    kvpack.compress(
        folder / "in.safetensors",
        folder / "out.safetensors",
        kvpack.QuantConfig(preset="lossless", tensor_bits={r"^layers\.": 4.0}),
    )
    return folder / "out.safetensors"


@pytest.fixture(scope="module")
def expected(packed: Path) -> Arrays:
    with kvpack.open(packed, threads=1) as reader:
        return {name: reader.dequantize(name, "original") for name in reader}


def test_names(packed: Path) -> None:
    with kvpack.open(packed) as reader:
        assert isinstance(reader, kvpack.Reader)
        assert reader.keys() == sorted(model())
        assert list(reader) == reader.keys()
        assert len(reader) == 7
        assert "ids" in reader
        assert "ids_kvpack" not in reader
        assert "half.weight_kvpack" not in reader
        for use in (reader.info, reader.decode, reader.dequantize, reader.container, reader.blob):
            with pytest.raises(KeyError, match=r"no tensor 'nothing'"):
                use("nothing")
        with pytest.raises(KeyError, match="'ids' is not coded"):
            reader.blob("ids")


def test_info(packed: Path) -> None:
    with kvpack.open(packed) as reader:
        assert reader.info("ids") is None
        assert reader.info("norm.weight") is None
        info = reader.info("layers.1.weight")
        assert info is not None
        assert (info.name, info.shape, info.dtype, info.method) == ("layers.1.weight", (300, 400), "F32", "uniform")
        container = reader.container("layers.1.weight")
        stored = container.tensors["layers.1.weight_kvpack"].size_bytes
        assert info.blob_bytes == stored == len(reader.blob("layers.1.weight").buffer)
        assert info.bits_per_weight == 8 * (stored + 4) / 120_000
        assert 3.9 < info.bits_per_weight <= 4
        original, values = model()["layers.1.weight"].astype(np.float64), reader.dequantize("layers.1.weight")
        noise = 10 * np.log10(((original - values) ** 2).sum() / (original**2).sum())
        assert info.noise_db == pytest.approx(noise, abs=1e-4)
        exact = reader.info("half.weight")
        assert exact is not None
        assert (exact.method, exact.layout, exact.noise_db, exact.dtype) == ("lossless", "lossless", None, "BF16")


def test_decode_gives_what_is_stored(packed: Path) -> None:
    original = model()
    with kvpack.open(packed) as reader:
        q = reader.decode("layers.0.weight")
        assert q.dtype in (np.int8, np.int16)
        scales = reader.container("layers.0.weight").scales("layers.0.weight")
        assert scales is not None
        np.testing.assert_array_equal(reader.dequantize("layers.0.weight"), q.astype(np.float32) * scales[0])
        np.testing.assert_array_equal(reader.decode("half.weight"), original["half.weight"].view(np.uint16))
        np.testing.assert_array_equal(reader.decode("codes.weight"), original["codes.weight"])
        for name in ("norm.weight", "ids"):
            stored = reader.decode(name)
            assert stored.dtype == original[name].dtype
            np.testing.assert_array_equal(stored, original[name])
            assert not stored.flags.writeable


def test_float_types_are_casts_of_float32(packed: Path) -> None:
    """float16 and bfloat16 round to nearest even from the fp32 product, as ml_dtypes and NumPy do."""
    with kvpack.open(packed) as reader:
        for name in ("layers.2.weight", "half.weight", "codes.weight", "norm.weight"):
            single = reader.dequantize(name)
            assert single.dtype == np.float32
            for kind, dtype in (("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16), ("float64", np.float64)):
                values = reader.dequantize(name, kind)
                assert values.dtype == dtype
                assert values.tobytes() == single.astype(dtype).tobytes()
        # Not what truncation would give: about half of the numbers round up.
        single = reader.dequantize("layers.2.weight")
        bits = single.view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        np.testing.assert_array_equal(reader.dequantize("layers.2.weight", "bfloat16").view(np.uint16), rounded)
        assert (rounded != (bits >> 16)).any()
        original = reader.dequantize("half.weight", "original")
        assert original.dtype == ml_dtypes.bfloat16
        assert original.tobytes() == model()["half.weight"].tobytes()
        assert reader.dequantize("ids", "original").dtype == np.int64
        with pytest.raises(ValueError, match="dtype is 'int8'; there are float32, float16, bfloat16, float64"):
            reader.dequantize("ids", "int8")


def test_numbers_too_large_for_a_type(tmp_path: Path) -> None:
    """They become infinite without a warning, coded or not (warnings are errors here)."""
    weights = np.random.default_rng(2).uniform(2e5, 1e6, (128, 256)).astype(np.float32)
    weights[::2] *= -1
    save_file({"a.weight": weights, "b": weights[0]}, tmp_path / "in.safetensors")
    kvpack.compress(tmp_path / "in.safetensors", tmp_path / "out.safetensors", kvpack.QuantConfig(bits=6))
    with kvpack.open(tmp_path / "out.safetensors") as reader:
        assert reader.info("a.weight") is not None
        assert reader.info("b") is None
        half = reader.dequantize("a.weight", "float16")
        np.testing.assert_array_equal(half, np.where(weights > 0, np.inf, -np.inf))
        assert np.isneginf(reader.dequantize("b", "float16")).all()


def test_element_limit(packed: Path) -> None:
    with kvpack.open(packed, max_elements=120_000) as reader:
        assert reader.decode("layers.0.weight").size == 120_000
    with kvpack.open(packed, max_elements=119_999) as reader:
        for use in (reader.decode, reader.dequantize):
            with pytest.raises(LimitError, match=r"tensor 'layers\.0\.weight': 120000 elements .* limit of 119999"):
                use("layers.0.weight")
        assert reader.decode("half.weight").size == 32_768
        assert reader.decode("ids").size == 12


def test_threads_share_a_reader(packed: Path, expected: Arrays) -> None:
    """Eight at once, on different tensors and on the same, always to the same numbers."""
    with kvpack.open(packed, threads=2) as reader, ThreadPoolExecutor(8) as pool:
        different = sorted(expected) * 6
        found = pool.map(lambda n: reader.dequantize(n, "original"), different)
        for name, values in zip(different, found, strict=True):
            assert values.tobytes() == expected[name].tobytes(), name
        same = ["layers.0.weight"] * 24
        for values in pool.map(lambda n: reader.dequantize(n, "original"), same):
            assert values.tobytes() == expected["layers.0.weight"].tobytes()


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_number_of_threads(packed: Path, expected: Arrays, threads: int) -> None:
    with kvpack.open(packed, threads=threads) as reader:
        for name, values in expected.items():
            assert reader.dequantize(name, "original").tobytes() == values.tobytes()


def test_arrays_outlive_the_reader(packed: Path, expected: Arrays) -> None:
    with kvpack.open(packed) as reader:
        arrays = {name: reader.dequantize(name, "original") for name in reader}
        kept = reader.stored("norm.weight")
    del reader
    gc.collect()
    np.testing.assert_array_equal(kept, model()["norm.weight"])
    for name, values in arrays.items():
        assert values.tobytes() == expected[name].tobytes()


def test_closing_twice_and_after_an_error(packed: Path) -> None:
    reader = kvpack.open(packed)
    reader.close()
    reader.close()
    with pytest.raises(KeyError), kvpack.open(packed) as reader:
        reader.decode("nothing")
    with pytest.raises(ValueError, match=r"out\.safetensors is closed"):
        reader.decode("ids")
    with pytest.raises(FileNotFoundError):
        kvpack.open(packed.with_name("nothing.safetensors"))


def test_verify(packed: Path) -> None:
    seen: list[int] = []
    result = kvpack.verify(packed, packed.with_name("in.safetensors"), progress=seen.append)
    assert (result.tensors, result.coded, result.compared, result.mismatches) == (7, 5, True, {})
    assert result.elements == 3 * 120_000 + 32_768 + 20_000
    with kvpack.open(packed) as reader:
        tiles = sum(info.header.num_tiles for info in map(reader.info, reader) if info)
        stored = sum(tensor.size_bytes for tensor in reader.containers[0].tensors.values())
    assert result.tiles == tiles
    # Scales are not counted.
    assert sum(seen) == stored - 3 * 4


def test_verify_names_what_differs(packed: Path, tmp_path: Path) -> None:
    original = model()
    changed = {
        "layers.0.weight": original["layers.0.weight"] * np.float32(1.01),
        "half.weight": original["half.weight"].copy(),
        "codes.weight": original["codes.weight"].copy(),
        "ids": original["ids"].astype(np.int32),
        "norm.weight": original["norm.weight"].reshape(3, 100),
        "layers.1.weight": original["layers.1.weight"].T.copy(),
        "new": np.zeros(3, np.float32),
    }
    changed["half.weight"].view(np.uint16)[127, 255] ^= 1
    changed["codes.weight"][0, 0] += 1
    save_file(changed, tmp_path / "other.safetensors")
    mismatches = kvpack.verify(packed, tmp_path / "other.safetensors").mismatches
    assert {name: text.partition(" dB")[0].split(" -")[0] for name, text in mismatches.items()} == {
        "codes.weight": "its bits differ",
        "half.weight": "its bits differ",
        "ids": "is I64 [3, 4], the original I32 [3, 4]",
        "layers.0.weight": "noise is",
        "layers.1.weight": "was F32 [300, 400], the original is F32 [400, 300]",
        "layers.2.weight": "is not in the original",
        "new": "is missing",
        "norm.weight": "is F32 [300], the original F32 [3, 100]",
    }


def test_attributes_of_the_package() -> None:
    assert set(kvpack.__all__) > NEED_TORCH
    for name in set(kvpack.__all__) - NEED_TORCH - NEED_TRANSFORMERS:
        assert getattr(kvpack, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = kvpack.nothing


@pytest.mark.parametrize("name", sorted(NEED_TORCH))
def test_attributes_that_need_torch(name: str) -> None:
    pytest.importorskip("torch")
    assert getattr(kvpack, name) is not None


@pytest.mark.parametrize("name", sorted(NEED_TRANSFORMERS))
def test_attributes_that_need_transformers(name: str) -> None:
    pytest.importorskip("transformers")
    assert getattr(kvpack, name) is not None


def test_examples_in_docstrings() -> None:
    attempted = 0
    for module in pkgutil.walk_packages(kvpack.__path__, "kvpack."):
        if module.name.endswith("__main__"):
            continue
        try:
            imported = importlib.import_module(module.name)
        except ImportError as error:
            if (error.name or "").partition(".")[0] not in OPTIONAL:
                raise
            continue
        result = doctest.testmod(imported)
        assert result.failed == 0, module.name
        attempted += result.attempted
    result = doctest.testmod(kvpack)
    assert result.failed == 0
    assert result.attempted == 2
    assert attempted >= 7
