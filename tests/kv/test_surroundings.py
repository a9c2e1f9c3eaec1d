"""What is set elsewhere, as autocast or a default device, changes nothing; and what is no number is refused."""

from __future__ import annotations

import ast
import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool_dump import cache_state

from kvpack.errors import CacheInputError
from kvpack.format.pages import PageFormat

torch = pytest.importorskip("torch")

import kvpack.runtime  # noqa: E402
from kvpack.runtime.kv.attention import attention_with_kv_cache  # noqa: E402
from kvpack.runtime.kv.cache import KVCache  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS = {
    "autocast to bf16": lambda device: torch.autocast(device, dtype=torch.bfloat16),
    "device meta": lambda _: torch.device("meta"),
    "dtype fp64": lambda _: default_dtype(torch.float64),
    "dtype bf16": lambda _: default_dtype(torch.bfloat16),
    "inference": lambda _: torch.inference_mode(),
}


def use(device: str, inputs: list[torch.Tensor]) -> tuple[list[torch.Tensor], KVCache]:
    """All that a cache can do: prompts, steps, observing, dividing anew, tokens that do not stay, queries alone."""
    cache = KVCache(2, 2, 64, 1024, max_sequences=2, device=device, budget=0.3)
    outs = []
    for x in inputs:
        options = {"observe": True, "chunk_tokens": 128}
        outs += [cache.attend(layer, x[:, :8], x[:, 8:10], x[:, 10:], **options) for layer in range(2)]
    cache.reallocate()
    x = inputs[-1]
    outs.append(cache.attend(0, x[:, :8], x[:, 8:10], x[:, 10:], update_cache=False))
    outs.append(cache.attend(1, x[:1, :8], sequences=[1]))
    cache.reserve_tokens(600)
    outs += [cache.attend(layer, x[:, :8], x[:, 8:10], x[:, 10:]) for layer in range(2)]
    return outs, cache


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_surroundings_change_nothing(name: str, device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(2, 12, tokens, 64, generator=generator).half().to(device) for tokens in (300, 1, 40, 1)]
    expected, quiet = use(device, inputs)
    with SURROUNDINGS[name](device):
        found, cache = use(device, inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for layer in range(2):
        assert (cache.precision_map(layer) == quiet.precision_map(layer)).all()
        for sequence in range(2):
            pairs = zip(cache.read(layer, sequence), quiet.read(layer, sequence), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(cache.mass, quiet.mass)
    assert np.array_equal(cache.errors, quiet.errors)
    assert np.array_equal(cache.shares, quiet.shares)


FACTORIES = {
    "arange",
    "as_tensor",
    "asarray",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randn",
    "tensor",
    "zeros",
}


def test_tensors_of_the_runtime_name_their_device_and_type() -> None:
    """Defaults that a caller has set would decide otherwise."""
    assert kvpack.runtime.__file__ is not None
    nameless, count = [], 0
    for path in sorted(Path(kvpack.runtime.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch" and node.func.attr in FACTORIES:
                count += 1
                named = {keyword.arg for keyword in node.keywords}
                if "device" not in named or ("dtype" not in named and node.func.attr != "arange"):
                    nameless.append(f"{path.name}:{node.lineno}")
    assert nameless == []
    assert count > 30


def made(**options: Any) -> KVCache:
    return KVCache(
        **({"num_layers": 1, "num_kv_heads": 2, "head_dim": 64, "max_tokens": 64, "device": "cpu"} | options)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({name: value}, f"{name} is {value!r}; an integer is wanted")
        for name in ("num_layers", "num_kv_heads", "head_dim", "max_tokens", "max_sequences", "recent_tokens", "sinks")
        for value in (64.0, "64", [64])
    ]
    + [
        ({"slab_bytes": 0.5}, "slab_bytes is 0.5"),
        ({"max_bytes": "1"}, "max_bytes is '1'"),
        ({"budget": "0.3"}, "budget is '0.3'"),
        ({"budget": math.nan}, "budget is nan"),
        ({"budget": 0.05}, "pages of INT2 take 0.1719 of the bytes of those in 16 bits: that is the least"),
        ({"budget": 0.148}, "that is the least"),
        ({"formats": PageFormat.INT4, "widths": PageFormat.INT4}, "both given"),
    ],
)
@pytest.mark.filterwarnings("ignore:KVCache:DeprecationWarning")
def test_a_cache_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CacheInputError) as refused:
        made(**options)
    assert message in str(refused.value)


def test_numbers_of_other_types_are_numbers() -> None:
    cache = made(max_tokens=np.int64(64), budget=np.float32(0.5), sinks=np.int8(4))
    assert (cache.max_tokens, cache.sinks) == (64, 4)
    assert made(budget=0.172).budget == 0.172


def test_truth_values_are_numbers() -> None:
    """Not masks, as they are to NumPy."""
    cache = made(max_sequences=2)
    k, v = torch.zeros(2, 2, 2, 3, 64).half()
    cache.append(0, k, v, [True, False])
    assert cache.table.lengths.tolist() == cache.lengths.tolist() == [[3, 3]]
    assert cache.length(0, True) == 3


@pytest.mark.parametrize(
    ("layer", "sequences", "message"),
    [
        (0, 1, "sequences are 1"),
        (True, [0], "layer is True"),
        (None, [0], "layer is None"),
        (0.0, None, "layer is 0.0"),
    ],
)
def test_places_are_refused(layer: Any, sequences: Any, message: str) -> None:
    cache = made(num_layers=2)
    x = torch.zeros(1, 2, 3, 64).half()
    before = cache_state(cache)
    for call in (
        lambda: cache.append(layer, x, x, sequences),
        lambda: cache.attend(layer, x, x, x, sequences),
    ):
        with pytest.raises(CacheInputError) as refused:
            call()
        assert message in str(refused.value) or "a sequence of integers is wanted" in str(refused.value)
    assert cache_state(cache) == before


def test_the_former_name_of_formats() -> None:
    with pytest.warns(DeprecationWarning, match="formats"):
        cache = made(widths=PageFormat.INT2)
    assert cache.possible_formats(0, 0) == {PageFormat.FP16, PageFormat.INT2}


def test_the_former_place_of_errors() -> None:
    from kvpack.runtime import errors

    assert errors.CacheInputError is CacheInputError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequences": [1.7]}, "1.7"),
        ({"sequences": "1"}, "'1'"),
        ({"sequences": [None]}, "None"),
        ({"scale": "x"}, "scale is 'x'"),
        ({"scale": math.nan}, "scale is nan"),
        ({"window": 2.0}, "window is 2.0"),
        ({"sinks": "4"}, "sinks is '4'"),
        ({"chunk_tokens": 0.5}, "chunk_tokens is 0.5"),
        ({"layer": 0.0}, "layer is 0.0"),
        ({"causal": 1}, "causal is 1"),
        ({"head_importance": [1, 1, 1, 1], "observe": True}, "head_importance is a list"),
        ({"q": [1.0]}, "q is a list"),
        ({"q": [1.0], "past_key_value": None}, "q is a list"),
        ({"q": torch.zeros(4, 3, 64).half(), "k": None, "v": None}, "q has shape [4, 3, 64]"),
        ({"q": torch.zeros(()).half(), "cached_tokens": 0}, "q has shape []"),
        ({"layer": True}, "layer is True"),
        ({"sequences": 1}, "a sequence of integers is wanted"),
        ({"k": np.zeros((1, 2, 3, 64))}, "k is a ndarray"),
    ],
)
def test_a_call_is_refused(options: dict[str, Any], message: str) -> None:
    cache = made(max_sequences=3)
    x = torch.zeros(1, 4, 3, 64).half()
    arguments = {"q": x, "k": x[:, :2], "v": x[:, :2], "past_key_value": cache} | options
    before = cache_state(cache)
    with pytest.raises(CacheInputError) as refused:
        attention_with_kv_cache(**arguments)
    assert message in str(refused.value)
    assert cache_state(cache) == before
