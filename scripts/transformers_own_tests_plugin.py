"""A pytest plugin for transformers' own tests (scripts/transformers-own-tests): ``generate`` on kvpack's pages.

What it changes:

- ``GenerationMixin._prepare_cache_for_generation`` makes a :class:`kvpack.KVPackCache` of 16-bit pages in place of the
  default cache, and gives the model the attention "kvpack". Pages of a model in fp32 are in fp16.
- Configs of tiny models get a head_dim that is a multiple of 16: by ``head_dim`` where they have one, else by fewer
  heads. Weights are random, so that nothing else depends on it.
- ``has_attentions``, transformers' own switch of its test classes, is False: kvpack's attention gives no probabilities,
  and most tests would ask for them.
- Layers of the cache have ``keys`` and ``values``, dequantized, which the tests compare and look at the shapes of.

A ``generate`` call that cannot run on pages keeps its cache and its attention, and is counted with the reason. A run in
which none did fails. transformers is the installed one: it is imported here, before the checkout's conftest.py.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin

from kvpack import KVPackCache
from kvpack.errors import CacheInputError
from kvpack.integrations.transformers.cache import ATTENTION_NAME, KVPackLayer

# Patterns of "Class::test", and why these tests say nothing of a KVPackCache.
NOT_APPLICABLE = {
    "*::test_generate_*static_cache*": "compares a StaticCache with the default cache, to 1e-5 of fp32, pads too",
    "*::test_*compil*": "compiles the forward pass of generate, which a KVPackCache does not",
    "*::test_*eager_matches*": "compares attention functions with each other, and all would be kvpack's",
    "*::test_*sdpa*": "compares attention functions with each other, and all would be kvpack's",
    "*::test_*flash_att*": "compares attention functions with each other, and all would be kvpack's",
    "*::test_past_key_values_format*": "of the cache that forward makes without generate",
    "Cache*IntegrationTest::*": "needs a model from the hub",
}
_PAGES_HEAD_DIM = 16


class Record:
    """What ran where, in this process and in the workers of pytest-xdist."""

    def __init__(self) -> None:
        # Names of counters → what they count → how often.
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in ("total", "elsewhere", "heads", "left out")}

    def merge(self, other: dict[str, dict[str, int]]) -> None:
        for name, counts in other.items():
            self.counts[name].update(counts)

    @property
    def on_pages(self) -> int:
        return self.counts["total"]["on pages"]

    def lines(self) -> list[str]:
        total = self.counts["total"]
        lines = [
            f"generate calls on kvpack's pages: {self.on_pages} (which attention read {total['reads']} times)",
            f"generate calls elsewhere: {self.counts['elsewhere'].total()}",
        ]
        lines += [f"  {count} × {reason}" for reason, count in self.counts["elsewhere"].most_common()]
        if unread := total["made"] - self.on_pages:
            lines.append(f"caches that attention never read: {unread}")
        if heads := sorted(self.counts["heads"]):
            lines.append(f"heads made wider: {', '.join(heads)}")
        if self.counts["left out"]:
            lines.append(f"tests left out: {self.counts['left out'].total()}")
            lines += [f"  {count} × {reason}" for reason, count in self.counts["left out"].most_common()]
        return lines


record = Record()


# generate -------------------------------------------------------------------------------------------------------------


def _reason_elsewhere(model: Any, generation_config: Any, given: list[Cache]) -> str | None:
    """Why a call does not run on pages, as far as it can be known before the cache is made."""
    if generation_config.use_cache is False:
        return "use_cache is False"
    if given:
        return f"the test gives a {type(given[0]).__name__}"
    if generation_config.cache_implementation not in (None, "dynamic", ATTENTION_NAME):
        return f"the test asks for cache_implementation={generation_config.cache_implementation!r}"
    if generation_config.output_attentions:
        return "the test asks for attention probabilities"
    if not model._supports_default_dynamic_cache():
        return f"{type(model).__name__} has a state of its own in place of a cache"
    widths = {
        module.head_dim
        for module in model.modules()
        if hasattr(module, "layer_idx") and isinstance(getattr(module, "head_dim", None), int)
    }
    if narrow := sorted(width for width in widths if width % _PAGES_HEAD_DIM or width > 256):
        return f"{type(model).__name__} has a head_dim of {narrow[0]}; pages need a multiple of 16 up to 256"
    return None


def _with_kvpack_attention(model: Any) -> bool:
    """Whether the model's attention is kvpack's now."""
    text = model.config.get_text_config(decoder=True)
    if text._attn_implementation != ATTENTION_NAME:
        model.set_attn_implementation(ATTENTION_NAME)
    return bool(text._attn_implementation == ATTENTION_NAME)


def _put_into_generate() -> None:
    prepare = GenerationMixin._prepare_cache_for_generation

    @functools.wraps(prepare)
    def on_pages(model: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        def prepared() -> Any:
            return prepare(model, generation_config, model_kwargs, *args, **kwargs)

        def elsewhere(reason: str) -> Any:
            record.counts["elsewhere"][reason] += 1
            return prepared()

        given = [value for value in model_kwargs.values() if isinstance(value, Cache)]
        if given and isinstance(given[0], KVPackCache) and generation_config.use_cache is not False:
            _expect_reads(given[0])
            return prepared()
        reason = _reason_elsewhere(model, generation_config, given)
        if reason is not None:
            return elsewhere(reason)
        dtype = model.dtype if model.dtype in (torch.float16, torch.bfloat16) else torch.float16
        try:
            KVPackCache(model.config, dtype=dtype)
        except CacheInputError as error:
            return elsewhere(str(error))
        try:
            if not _with_kvpack_attention(model):
                return elsewhere(f"{type(model).__name__} takes no attention function")
        except ValueError as error:
            return elsewhere(str(error))
        asked = generation_config.cache_implementation, generation_config.cache_config
        generation_config.cache_implementation, generation_config.cache_config = ATTENTION_NAME, {"dtype": dtype}
        try:
            result = prepared()
        finally:
            generation_config.cache_implementation, generation_config.cache_config = asked
        made = [value for value in model_kwargs.values() if isinstance(value, KVPackCache)]
        assert len(made) == 1, "generate has not taken the KVPackCache"
        _expect_reads(made[0])
        return result

    GenerationMixin._prepare_cache_for_generation = on_pages


def _expect_reads(cache: Any) -> None:
    """A call counts as one on pages when attention has read them."""
    record.counts["total"]["made"] += 1
    cache.calls_without_reads = getattr(cache, "calls_without_reads", 0) + 1


def _count_reads() -> None:
    take_pending = KVPackLayer.take_pending

    @functools.wraps(take_pending)
    def counted(layer: Any, *args: Any) -> None:
        take_pending(layer, *args)
        total = record.counts["total"]
        total["reads"] += 1
        total["on pages"] += getattr(layer.cache, "calls_without_reads", 0)
        layer.cache.calls_without_reads = 0

    KVPackLayer.take_pending = counted


def _show_keys_and_values() -> None:
    """[rows, KV heads, columns, head_dim], zeros where there are pads; None of an empty cache."""

    def of_side(side: int) -> property:
        def read(layer: Any) -> torch.Tensor | None:
            cache, kv = layer.cache, layer.cache.kv
            if kv is None:
                return None
            shape = (cache.rows, kv.num_kv_heads, layer.columns, kv.head_dim)
            states = torch.zeros(shape, dtype=kv.dtype, device=kv.device)
            for row in range(cache.rows):
                tokens = slice(None) if cache._tokens is None else torch.from_numpy(cache._tokens[row]).to(kv.device)
                states[row, :, tokens] = kv.read(layer.index, row)[side]
            return states

        # transformers' own layers set both to None when they are made.
        return property(read, lambda layer, value: None)

    KVPackLayer.keys, KVPackLayer.values = of_side(0), of_side(1)


# Tests ----------------------------------------------------------------------------------------------------------------


def widen_heads(config: Any) -> Any:
    """The config, its head_dim a multiple of 16 where it has one, or can have fewer heads."""
    text = config.get_text_config(decoder=True)
    heads, width = getattr(text, "num_attention_heads", None), getattr(text, "head_dim", None)
    hidden = getattr(text, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(hidden, int):
        return config
    before = width if isinstance(width, int) else hidden // heads
    if before % _PAGES_HEAD_DIM == 0:
        return config
    if isinstance(width, int):
        after = math.ceil(width / _PAGES_HEAD_DIM) * _PAGES_HEAD_DIM
        try:
            text.head_dim = after
        except AttributeError:  # computed from others
            width = None
    if not isinstance(width, int):
        if hidden % _PAGES_HEAD_DIM:
            return config
        after, text.num_attention_heads = _PAGES_HEAD_DIM, hidden // _PAGES_HEAD_DIM
        if isinstance(kv_heads := getattr(text, "num_key_value_heads", None), int):
            text.num_key_value_heads = math.gcd(kv_heads, text.num_attention_heads)
    record.counts["heads"][f"{type(text).__name__} {before} → {after}"] += 1
    return config


def _adapt(test_class: Any) -> None:
    test_class.has_attentions = False
    set_up = test_class.setUp

    def with_wide_heads(self: Any) -> None:
        set_up(self)
        tester = self.model_tester
        prepare = tester.prepare_config_and_inputs_for_common

        def prepared(*args: Any, **kwargs: Any) -> Any:
            config, inputs = prepare(*args, **kwargs)
            return widen_heads(config), inputs

        tester.prepare_config_and_inputs_for_common = prepared

    test_class.setUp = with_wide_heads


def pytest_configure(config: pytest.Config) -> None:
    _put_into_generate()
    _count_reads()
    _show_keys_and_values()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, left_out, classes = [], [], {}
    for item in items:
        test_class = getattr(item, "cls", None)
        name = f"{getattr(test_class, '__name__', '')}::{item.name}"
        reason = next((why for pattern, why in NOT_APPLICABLE.items() if fnmatchcase(name, pattern)), None)
        if reason is None:
            kept.append(item)
            if any(base.__name__ == "GenerationTesterMixin" for base in getattr(test_class, "__mro__", ())):
                classes[test_class] = True
        else:
            left_out.append(item)
            record.counts["left out"][reason] += 1
    for test_class in classes:
        _adapt(test_class)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:  # a worker of pytest-xdist; all workers leave out the same tests
        if session.config.workerinput["workerid"] != "gw0":
            record.counts["left out"].clear()
        output["kvpack"] = {name: dict(counts) for name, counts in record.counts.items()}
    elif not session.config.option.collectonly and not record.on_pages and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    record.merge(getattr(node, "workeroutput", {}).get("kvpack", {}))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.option.collectonly:
        return
    terminalreporter.section("kvpack")
    for line in record.lines():
        terminalreporter.write_line(line)
    if not record.on_pages:
        terminalreporter.write_line("no generate call ran on kvpack's pages: this run says nothing of kvpack")
