"""Which pages come and go in a step: against counting token by token, and in layers that are in step or are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpack.format.pages import PageFormat

torch = pytest.importorskip("torch")

from kvpack.runtime.kv import cache as cache_module  # noqa: E402
from kvpack.runtime.kv.budget import Window  # noqa: E402
from kvpack.runtime.kv.cache import KVCache  # noqa: E402
from kvpack.runtime.kv.steps import Step, quiet_tokens  # noqa: E402

LAYERS, SEQUENCES, MAX_TOKENS, HEAD_DIM = 3, 3, 64 * 20, 16
LENGTHS = st.integers(0, 400)


@settings(max_examples=200, deadline=None)
@given(
    before=st.lists(LENGTHS, min_size=3, max_size=3),
    ids=st.sampled_from([[0], [2, 0], [1, 2], [0, 1, 2]]),
    count=st.one_of(st.sampled_from([1, 2, 63, 64, 200]), st.lists(st.sampled_from([0, 1, 64, 90]), min_size=3)),
    recent_tokens=st.sampled_from([0, 1, 63, 64, 100]),
    sinks=st.sampled_from([0, 4, 65]),
)
def test_pages_of_a_step_are_those_of_its_tokens(
    before: list[int], ids: list[int], count: int | list[int], recent_tokens: int, sinks: int
) -> None:
    window = Window(recent_tokens, sinks)
    lengths = np.array(before, np.int32)
    counts = count[: len(ids)] if isinstance(count, list) else count
    step = Step(lengths, ids, counts, window, 1000, 1)
    of = dict(zip(ids, counts if isinstance(counts, list) else [counts] * len(ids), strict=True))
    coming, leaving = [], []
    for sequence in ids:
        for token in range(before[sequence], before[sequence] + of[sequence]):
            if token % 64 == 0:
                coming.append((sequence, token // 64))
            gone, rest = divmod(token + 1 - recent_tokens, 64)
            if rest == 0 and gone > max(0, -(-sinks // 64)):
                leaving.append((sequence, gone - 1))
    assert step.coming == coming
    assert step.leaving == leaving
    assert step.begins == any(before[sequence] == 0 and of[sequence] for sequence in ids)
    assert step.pages == max((index + 1 for _, index in coming), default=0)
    after = [length + of.get(sequence, 0) for sequence, length in enumerate(before)]
    assert step.lengths.tolist() == after
    assert step.sequences == sum(length > 0 for length in after)
    assert lengths.tolist() == before
    most = 402
    quiet = quiet_tokens(lengths[ids], window, most)
    for more in range(1, quiet + 1):
        found = Step(lengths, ids, more, window, 1000, 1)
        assert not found.coming
        assert not found.leaving
        assert not found.begins
    longest = max(before[sequence] for sequence in ids)
    assert quiet + longest <= most
    if quiet + longest < most and not sinks and all(before[sequence] >= recent_tokens for sequence in ids):
        one_more = Step(lengths, ids, quiet + 1, window, 1000, 1)
        assert one_more.coming or one_more.leaving
    assert step.quiet_tokens == quiet_tokens(step.lengths[ids], window, 1000)


def make_cache(layers: int, options: dict[str, Any]) -> KVCache:
    return KVCache(layers, 2, HEAD_DIM, MAX_TOKENS, max_sequences=SEQUENCES, device="cpu", slab_bytes=1, **options)


class Together:
    """A cache of several layers, and beside it one cache for each layer, which shares steps with nobody."""

    def __init__(self, **options: Any) -> None:
        self.cache = make_cache(LAYERS, options)
        self.apart = [make_cache(1, options) for _ in range(LAYERS)]
        self.generator = torch.Generator().manual_seed(0)

    def append(
        self,
        layer: int,
        count: int,
        sequences: list[int] | None = None,
        *,
        keep: bool = True,
        fails: bool = False,
    ) -> None:
        batch = SEQUENCES if sequences is None else len(sequences)
        k, v = torch.randn(2, batch, 2, count, HEAD_DIM, generator=self.generator).half()
        for cache, number in ((self.cache, layer), (self.apart[layer], 0)):
            try:
                with cache.writing(number, k, v, sequences, keep=keep):
                    if fails:
                        raise RuntimeError("attention failed")
            except RuntimeError:
                assert fails

    def append_to_all(self, count: int, sequences: list[int] | None = None) -> None:
        for layer in range(LAYERS):
            self.append(layer, count, sequences)

    def free(self, sequence: int) -> None:
        for cache in (self.cache, *self.apart):
            cache.free(sequence)

    def compare(self) -> None:
        for layer, alone in enumerate(self.apart):
            assert self.cache.table.lengths[layer].tolist() == alone.table.lengths[0].tolist()
            assert self.cache._used_bytes[layer] == alone._used_bytes[0]
            held, expected = self.cache.precision_map(layer), alone.precision_map(0)
            pages = min(held.shape[2], expected.shape[2])
            assert (held[..., :pages] == expected[..., :pages]).all()
            assert (held[..., pages:] == -1).all()
            for sequence in range(SEQUENCES):
                for found, wanted in zip(self.cache.read(layer, sequence), alone.read(0, sequence), strict=True):
                    assert torch.equal(found, wanted)
        assert (self.cache.page_table.numpy() == self.cache.entries).all()
        self.cache.check()


OPTIONS = [{"formats": PageFormat.INT4}, {"budget": 0.3}, {"budget": 0.5, "recent_tokens": 100, "sinks": 0}]


@pytest.mark.parametrize("options", OPTIONS)
def test_layers_out_of_step_plan_for_themselves(options: dict[str, Any]) -> None:
    """Whatever happens between the layers of a step, each has what it would have alone."""
    both = Together(**options)
    both.append_to_all(126)
    both.append(1, 66, [1])  # a prefix that one layer alone has
    for _ in range(3):
        both.append_to_all(1)
    both.compare()
    for layer in range(LAYERS):  # tokens that are taken back are those of the next layer's step
        both.append(layer, 70, keep=False)
        both.append(layer, 70, fails=True)
        both.append(layer, 70)
    both.compare()
    both.append(0, 1)
    both.free(2)  # in the midst of a step
    both.append(1, 1)
    both.append(2, 1)
    both.compare()
    for layer in range(LAYERS):  # batches between the layers' steps
        both.append(layer, 64, [2, 0])
        both.append(layer, 64, [0, 2])
        both.append(layer, 3, [1])
    both.append(0, 63)
    for layer in (2, 1):
        both.append(layer, 62)
        both.append(layer, 1)
    for _ in range(130):
        both.append_to_all(1)
    both.compare()


def count_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made = []

    def counted(*arguments: Any) -> Step:
        made.append(arguments[2])
        return Step(*arguments)

    monkeypatch.setattr(cache_module, "Step", counted)
    return made


def test_layers_in_step_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where nothing happens none is needed."""
    both = Together(budget=0.3)
    both.append_to_all(64)
    made = count_steps(monkeypatch)
    cache = both.cache
    k, v = torch.randn(2, SEQUENCES, 2, 1, HEAD_DIM, generator=both.generator).half()
    for _ in range(128):  # pages come at 64 and 128 tokens, and the first two leave at 128 and 192
        for layer in range(LAYERS):
            cache.append(layer, k, v)
    assert len(made) == 4
    for _ in range(64):
        cache.plan()
    assert len(made) == 6
    for _ in range(64):
        cache.table.device_lengths += 1
    cache.append(0, k[:1], v[:1], [1])
    made.clear()
    for layer in range(LAYERS):
        cache.append(layer, k, v)
    assert len(made) == 2
