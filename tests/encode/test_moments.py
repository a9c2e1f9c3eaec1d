"""The moments file: what is written is read, and what contradicts itself is refused with a name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kvpack.encode.moments import Moments, MomentsWriter
from kvpack.errors import KvpackError, MomentsError, NotAContainerError

MADE = {"text": "novel.txt", "tokens": 96}
INPUTS = {"a.weight": "a.weight", "b.weight": "a.weight", "experts": "experts"}


def second_moment(k: int, seed: int = 0) -> Any:
    x = np.random.default_rng(seed).standard_normal((5 * k, k)).astype(np.float32)
    return (x.T @ x / len(x)).astype(np.float32)


def write(path: Path) -> Path:
    with MomentsWriter(path) as writer:
        writer.add_second_moment("a.weight", (7, 7), iter([second_moment(7)]), np.array([96]))
        writer.add_sensitivity("a.weight", np.arange(3, dtype=np.float32))
        writer.add_sensitivity("b.weight", np.arange(1, dtype=np.float32))
        several = iter([second_moment(5, 1), second_moment(5, 2)])
        writer.add_second_moment("experts", (2, 5, 5), several, np.array([60, 36]))
        writer.add_sensitivity("experts", np.ones((2, 4), np.float32))
        writer.add_gradient_moment("embedding", second_moment(6, 3))
        size = writer.finish(INPUTS, np.array([90, 0, 6]), MADE)
    assert path.stat().st_size == size
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    with Moments.open(write(tmp_path / "m.safetensors")) as moments:
        assert moments.names == ["a.weight", "b.weight", "experts"]
        assert moments.made == MADE
        assert moments.token_counts.tolist() == [90, 0, 6]
        for name in ("a.weight", "b.weight"):
            assert (moments.second_moment(name) == second_moment(7)).all()
            assert (moments.matrices(name), moments.inputs_of(name), moments.tokens(name).tolist()) == (1, 7, [96])
        assert [moments.second_moment("experts", e).tolist() for e in (0, 1)] == [
            second_moment(5, seed).tolist() for seed in (1, 2)
        ]
        assert moments.tokens("experts").tolist() == [60, 36]
        sensitivity = moments.sensitivity("experts")
        assert sensitivity is not None
        assert sensitivity.shape == (2, 4)
        gradients = moments.gradient_moment("embedding")
        assert gradients is not None
        assert (gradients == second_moment(6, 3)).all()
        assert moments.gradient_moment("a.weight") is None
        with pytest.raises(KeyError, match="has no moments of 'c'"):
            moments.second_moment("c")
        with pytest.raises(IndexError, match="2 matrices, and no 2"):
            moments.second_moment("experts", 2)
    assert write(tmp_path / "again.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()


def test_sensitivities_may_be_absent(tmp_path: Path) -> None:
    with MomentsWriter(tmp_path / "m.safetensors") as writer:
        writer.add_second_moment("a", (1, 1), iter([np.ones((1, 1), np.float32)]), np.array([1]))
        writer.finish({"a": "a"}, np.array([1]), {})
    with Moments(tmp_path / "m.safetensors") as moments:
        assert moments.sensitivity("a") is None


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), MomentsWriter(tmp_path / "m.safetensors") as writer:
        writer.add_sensitivity("a", {"a": np.ones(1, np.float32)}["b"])
    assert list(tmp_path.iterdir()) == []


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Write the file anew, its tensors and what it says of itself changed."""
    tensors = load_file(path)
    said = {"version": 1, "inputs": dict(INPUTS), "made": dict(MADE)}
    change(tensors, said)
    text = said.pop("text", None) or json.dumps(said)
    save_file(tensors, path, {"kvpack_moments": text})


def other(name: str, make: Callable[[Any], Any]) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda tensors, said: tensors.__setitem__(name, np.ascontiguousarray(make(tensors[name])))


def without(name: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda tensors, said: tensors.pop(name)


def says(**changes: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda tensors, said: said.update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (says(text="{"), "is no JSON"),
        (says(text="[]"), "names no version"),
        (says(text='{"version": 1}'), "no map of tensors"),
        (says(version=2), "moments of version 2, this reader knows 1"),
        (says(version=True), "moments of version True"),
        (says(inputs={"a": 1}), "no map of tensors"),
        (says(made=3), "does not say what"),
        (says(inputs={**INPUTS, "c": "c"}), r"'c\.second_moment': the file does not have it"),
        (says(inputs={"a.weight": "a.weight"}), "of no tensor that the file names"),
        (without("a.weight.tokens"), r"'a\.weight\.tokens': the file does not have it"),
        (without("token_counts"), "'token_counts': the file does not have it"),
        (other("a.weight.second_moment", lambda m: m[:6]), "not square"),
        (other("a.weight.second_moment", lambda m: m[:0, :0]), "not square"),
        (other("a.weight.second_moment", lambda m: m.astype(np.float64)), "it is F64"),
        (other("a.weight.second_moment", lambda m: m[0]), "of 2 or 3 dimensions is wanted"),
        (other("experts.tokens", lambda t: t[:1]), "1.* numbers for 2 matrices"),
        (other("experts.sensitivity", lambda s: s[0]), "of 2 dimensions is wanted"),
        (other("experts.sensitivity", lambda s: s[:1]), r"its shape is \[1, 4\]"),
        (other("embedding.gradient_moment", lambda m: m[:5]), r"\[5, 6\], which is not square"),
        (other("embedding.gradient_moment", lambda m: m.astype(np.float64)), "it is F64"),
    ],
)
def test_files_that_contradict_themselves(change: Callable[..., None], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors")
    rewrite(path, change)
    with pytest.raises(MomentsError, match=message) as caught:
        Moments(path)
    assert str(path) in str(caught.value)


def with_element(row: int, column: int, value: float) -> Callable[[Any], Any]:
    def make(matrix: Any) -> Any:
        matrix[..., row, column] = value
        return matrix

    return make


def read_all(moments: Moments, name: str) -> None:
    moments.second_moment(name)
    moments.tokens(name)
    moments.sensitivity(name)
    moments.gradient_moment("embedding")
    assert moments.token_counts.dtype == np.int64


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("a.weight.second_moment", with_element(2, 2, -1.0), r"\[2, 2\] of the diagonal is -1"),
        ("a.weight.second_moment", with_element(2, 2, np.nan), r"\[2, 2\] of the diagonal is nan"),
        ("a.weight.second_moment", with_element(6, 1, np.inf), "not finite"),
        ("a.weight.second_moment", with_element(6, 1, 0.9), "not symmetric"),
        ("embedding.gradient_moment", with_element(1, 1, -1.0), r"\[1, 1\] of the diagonal is -1"),
        ("embedding.gradient_moment", with_element(5, 1, np.inf), "not finite"),
        ("a.weight.tokens", lambda t: -t, "-96 tokens"),
        ("a.weight.sensitivity", lambda s: -1 - s, "negative or not finite"),
        ("a.weight.sensitivity", lambda s: s + np.nan, "negative or not finite"),
        ("token_counts", lambda c: c - 1, "token 1 stood there -1 times"),
    ],
)
def test_numbers_that_no_run_finds(name: str, make: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors")
    rewrite(path, other(name, make))
    with Moments(path) as moments:
        assert moments.second_moment("experts", 1).shape == (5, 5)  # the others are as they were
        with pytest.raises(MomentsError, match=message):
            read_all(moments, "a.weight")


def test_a_little_asymmetry_is_rounding(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors")
    rewrite(path, other("a.weight.second_moment", lambda m: m + np.triu(np.full_like(m, 3e-4), 1)))
    with Moments(path) as moments:
        assert moments.second_moment("a.weight").shape == (7, 7)


def test_other_files(tmp_path: Path) -> None:
    text = tmp_path / "m.txt"
    text.write_text("no tensors at all", encoding="utf-8")
    with pytest.raises(NotAContainerError, match=r"m\.txt"):
        Moments(text)
    save_file({"a": np.ones(1, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(MomentsError, match="is no file of moments"):
        Moments(tmp_path / "a.safetensors")


@pytest.mark.parametrize("seed", range(4))
def test_damaged_headers_are_named_errors(seed: int, tmp_path: Path) -> None:
    content = write(tmp_path / "m.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    generator = np.random.default_rng(seed)
    path = tmp_path / "damaged.safetensors"
    for _ in range(60):
        damaged = bytearray(content)
        for at in generator.integers(0, header, 2):
            damaged[at] = generator.integers(0, 256)
        path.write_bytes(damaged[: len(content) - int(generator.integers(0, 2))])
        try:
            with Moments(path) as moments:
                for name in moments.names:
                    moments.second_moment(name)
                    moments.sensitivity(name)
        except KvpackError:
            pass
