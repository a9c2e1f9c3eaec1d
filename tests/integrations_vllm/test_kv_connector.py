"""vLLM with kvpack's connector gives vLLM's own tokens: from memory, from files, and with whatever is wrong there.

vLLM's own prefix cache is off, but where that is said, so that what is found comes from the connector.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

MODEL = os.environ.get("KVPACK_BOOKS_MODEL", "")
TEXT = os.environ.get("KVPACK_BOOKS_TEXT", "")
pytestmark = [
    pytest.mark.model,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not MODEL or not TEXT, reason="KVPACK_BOOKS_MODEL and KVPACK_BOOKS_TEXT are not set"),
]
# vLLM reads them when it is imported.
for variable, value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # On a GPU what is found and what is computed would differ in the last bits otherwise, and then in tokens.
    "VLLM_BATCH_INVARIANT": str(int(torch.cuda.is_available())),
}.items():
    os.environ.setdefault(variable, value)

TOKENS = 24
# No multiples of pages; on the CPU blocks are of 128 tokens.
LENGTHS = (300, 513, 700)
# Of books-27m: 8 layers of 2 heads of 64.
PAGE_BYTES = 2 * 8 * 64 * 2 * 64 * 2


# Several engines in one process, and other processes beside it.
GPU: dict[str, Any] = {}
if torch.cuda.is_available():
    GPU = {"kv_cache_memory_bytes": 1 << 28, "gpu_memory_utilization": 0.05, "disable_custom_all_reduce": True}


class Engine:
    """An engine in this process."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int = TOKENS) -> tuple[list[list[int]], list[int]]:
        """Greedy tokens of each prompt, and how many of its own were found."""
        from vllm import SamplingParams

        outputs = self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True),
            use_tqdm=False,
        )
        return [list(one.outputs[0].token_ids) for one in outputs], [one.num_cached_tokens for one in outputs]

    def counts(self) -> dict[str, int]:
        """Of Prometheus, without what is zero."""
        return {
            metric.name.removeprefix("vllm:kvpack_"): int(metric.value)
            for metric in self.llm.get_metrics()
            if metric.name.startswith("vllm:kvpack_") and metric.value
        }

    @property
    def store(self) -> Any:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group()._store

    def settle(self) -> None:
        """All that is under way is saved, and the scheduler knows it."""
        self.store.drain()
        self.generate([[5]], 1)


@contextmanager
def engine(
    directory: Path | None = None, *, model: str = MODEL, connector: bool = True, **options: Any
) -> Iterator[Engine]:
    """Options of vLLM, and of the connector those that it knows."""
    from vllm import LLM
    from vllm.config import KVTransferConfig

    from kvpack.integrations.vllm.llvmlite_vars import give_vars

    give_vars()
    known = ("pages", "disk_bytes", "host_bytes", "queue_bytes", "min_load_tokens")
    extra = {name: options.pop(name) for name in known if name in options}
    if directory is not None:
        extra["directory"] = str(directory)
    transfer = KVTransferConfig(
        kv_connector="KVPackConnector",
        kv_connector_module_path="kvpack.integrations.vllm.kv_connector",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config=extra,
    )
    usual = {"enforce_eager": True, "enable_prefix_caching": False, "max_model_len": 1024, "disable_log_stats": False}
    usual |= GPU
    llm = LLM(model, kv_transfer_config=transfer if connector else None, **(usual | options))
    try:
        yield Engine(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()
        unregister_metrics()
        del llm
        gc.collect()


def unregister_metrics() -> None:
    """The next engine counts from zero."""
    import prometheus_client

    registry = prometheus_client.REGISTRY
    for collector in list(registry._collector_to_names):
        if any(name.startswith("vllm:") for name in registry._collector_to_names[collector]):
            registry.unregister(collector)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    from transformers import AutoTokenizer

    text = Path(TEXT).read_text(encoding="utf-8")[10_000:40_000]
    ids = AutoTokenizer.from_pretrained(MODEL)(text)["input_ids"]
    return [ids[1500 * place : 1500 * place + length] for place, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[list[int]]:
    """vLLM's own tokens."""
    with engine(connector=False) as plain:
        return plain.generate(prompts)[0]


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("rank-0-of-1/*.kvpack.safetensors"))


def test_tokens_are_vllm_s_own_and_outlive_the_engine(
    prompts: list[list[int]], expected: list[list[int]], tmp_path: Path
) -> None:
    with engine(tmp_path) as first:
        assert first.generate(prompts) == (expected, [0, 0, 0])
        first.settle()
        assert first.generate(prompts) == (expected, [256, 512, 640])
        counts = first.counts()
        assert counts["hit_tokens"] == counts["loaded_tokens"] == 256 + 512 + 640
        # Full pages of prompts and of what was generated behind them: the last token's keys are never computed.
        assert counts["saved_pages"] == sum((length + TOKENS - 1) // 64 for length in LENGTHS)
        assert counts["queried_tokens"] == 2 * sum(LENGTHS) + 1
        assert not {"failed_tokens", "dropped_pages", "damaged_files", "foreign_files"} & counts.keys()
    with engine(tmp_path, block_size=128) as second:
        assert second.generate(prompts) == (expected, [256, 512, 640])
        longer = [*prompts[2], *expected[2][:-1], *prompts[0][:200]]
        assert second.generate([longer], 1)[1] == [640]
    with engine(tmp_path, pages="INT8") as third:
        assert third.generate(prompts) == (expected, [0, 0, 0]), "pages of other formats are not found"


def test_behind_vllm_s_own_prefix_cache(prompts: list[list[int]], expected: list[list[int]], tmp_path: Path) -> None:
    with engine(tmp_path, enable_prefix_caching=True, block_size=128) as first:
        first.generate(prompts)
        first.settle()
    with engine(tmp_path, enable_prefix_caching=True, block_size=128) as second:
        second.generate([prompts[2][:300]])  # loaded, and vLLM's own from now on
        before = second.counts()["hit_tokens"]
        assert second.generate(prompts) == (expected, [256, 512, 640])
        assert second.counts()["hit_tokens"] - before == 256 + 512 + 640 - 256


def test_pages_of_eight_bits(prompts: list[list[int]], expected: list[list[int]], tmp_path: Path) -> None:
    """What comes first is all but as likely as before."""
    from vllm import SamplingParams

    def first_tokens(one: Engine) -> list[dict[int, float]]:
        outputs = one.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=1, logprobs=5),
            use_tqdm=False,
        )
        return [{token: found.logprob for token, found in one.outputs[0].logprobs[0].items()} for one in outputs]

    with engine(tmp_path, pages="INT8") as first:
        before = first_tokens(first)
        first.settle()
        after = first_tokens(first)
        counts = first.counts()
    assert counts["loaded_tokens"] == sum((256, 512, 640))
    # A first page in 16 bits, and others in half of that and their scales.
    assert counts["saved_bytes"] < 0.6 * counts["saved_pages"] * PAGE_BYTES
    for one, other, tokens in zip(before, after, expected, strict=True):
        assert max(other, key=lambda token: other[token]) == tokens[0]
        assert max(abs(one[token] - other[token]) for token in one.keys() & other.keys()) < 0.1


def test_chunked_prompts(prompts: list[list[int]], tmp_path: Path) -> None:
    """Pages fill in several steps. The reference is vLLM's own prefix cache: where a chunk ends changes the last bits,
    and, with them, some tokens."""
    chunks = {"max_num_batched_tokens": 192, "max_num_seqs": 6, "block_size": 128}
    with engine(connector=False, enable_prefix_caching=True, **chunks) as plain:
        own = [[plain.generate([prompt]) for prompt in prompts] for _ in range(2)]
    with engine(tmp_path, **chunks) as first:
        assert [first.generate([prompt]) for prompt in prompts] == own[0]
        first.settle()
        assert first.counts()["saved_pages"] == sum((length + TOKENS - 1) // 64 for length in LENGTHS)
        assert [first.generate([prompt]) for prompt in prompts] == own[1]
    assert [hits for _, (hits,) in own[1]] == [256, 512, 640]


def test_requests_that_begin_alike_are_saved_once(prompts: list[list[int]], tmp_path: Path) -> None:
    with engine(tmp_path, max_num_seqs=6) as first:
        for _ in range(2):
            first.generate([prompt for prompt in prompts for _ in range(3)], 1)
            first.settle()
            assert first.counts()["saved_pages"] == sum(length // 64 for length in LENGTHS)


def test_another_model_s_files_are_never_matched(
    prompts: list[list[int]], expected: list[list[int]], tmp_path: Path
) -> None:
    """Same configuration, same names, same sizes: one tensor is another."""
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(MODEL, other)
    (weights,) = other.glob("*.safetensors")
    tensors = load_file(weights)
    name = next(name for name in tensors if "v_proj" in name)
    save_file(tensors | {name: tensors[name] * 1.5}, weights, metadata={"format": "pt"})
    kept = tmp_path / "kept"
    with engine(kept) as first:
        first.generate(prompts)
    with engine(connector=False, model=str(other)) as plain:
        own = plain.generate(prompts)[0]
    assert own != expected
    with engine(kept, model=str(other)) as second:
        assert second.generate(prompts) == (own, [0, 0, 0])
        second.settle()
        assert second.counts()["foreign_files"] >= 1
    with engine(kept) as third:
        assert third.generate(prompts) == (expected, [256, 512, 640])


def test_damaged_files_are_computed_anew(prompts: list[list[int]], expected: list[list[int]], tmp_path: Path) -> None:
    with engine(tmp_path) as first:
        first.generate(prompts)
    random = np.random.default_rng(1)
    damaged = files(tmp_path)
    for path in damaged:
        data = bytearray(path.read_bytes())
        data[int(random.integers(len(data) // 2, len(data)))] ^= 1 << int(random.integers(8))
        path.write_bytes(data)
    with engine(tmp_path) as second:
        found, _ = second.generate(prompts)
        assert found == expected
        second.settle()
        counts = second.counts()
        assert 3 <= counts["damaged_files"] <= len(damaged)
        assert counts["failed_tokens"] > 0
        assert second.generate(prompts) == (expected, [256, 512, 640]), "saved anew"


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), AssertionError("what nobody thought of")])
def test_pages_that_can_never_be_loaded(
    error: Exception, prompts: list[list[int]], expected: list[list[int]], tmp_path: Path
) -> None:
    """They are computed, once it has been tried: vLLM would ask for them again and again."""
    with engine(tmp_path) as first:
        first.generate(prompts)
        first.settle()

        def fails(*_arguments: Any) -> None:
            raise error

        ways = ("decode", "put")  # of a CPU and of a GPU
        for way in ways:
            setattr(first.store._codec, way, fails)
        assert first.generate(prompts)[0] == expected
        assert first.counts()["failed_loads"] == 3
        for way in ways:
            delattr(first.store._codec, way)
        assert first.generate(prompts) == (expected, [256, 512, 640])


def test_what_options_make_of_the_files_is_told_apart() -> None:
    from types import SimpleNamespace

    from vllm.config import SpeculativeConfig

    from kvpack.integrations.vllm.kv_connector import _made_of_files

    def told(
        quantization: str | None = None, load_format: str = "auto", speculative: Any = None, rope: Any = None
    ) -> dict[str, Any]:
        text_config = SimpleNamespace(rope_parameters=rope or {"rope_type": "default"})
        return _made_of_files(
            SimpleNamespace(
                model_config=SimpleNamespace(quantization=quantization, hf_text_config=text_config, max_model_len=9000),
                load_config=SimpleNamespace(load_format=load_format),
                speculative_config=speculative,
            )
        )

    assert told() == told(speculative=SpeculativeConfig(method="ngram", num_speculative_tokens=2)) == {}
    assert told(rope={"rope_type": "longrope"}) == {"vllm_max_model_len": 9000}
    draft = SpeculativeConfig(method="ngram", num_speculative_tokens=2)
    draft.method, draft.draft_model_config = "eagle", SimpleNamespace(model="draft")
    assert told("fp8", "dummy", draft) == {
        "vllm_quantization": "fp8",
        "vllm_load_format": "dummy",
        "vllm_draft": ["eagle", "draft"],
    }


def test_caches_whose_blocks_are_not_of_plain_attention_are_refused() -> None:
    """Where later tokens change earlier ones' keys, or vLLM gives blocks away while a request goes on."""
    from types import SimpleNamespace

    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, RSWASpec, SlidingWindowSpec

    from kvpack.errors import InputError
    from kvpack.integrations.vllm.kv_connector import _block_tokens

    shape = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}

    def block_tokens(*specs: Any) -> int:
        return _block_tokens(SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=s) for s in specs]))

    full = FullAttentionSpec(**shape)
    assert block_tokens(full) == block_tokens(FullAttentionSpec(**shape, sliding_window=4096)) == 16
    for specs, name in (
        ([RSWASpec(**shape, rswa_window=128)], "RSWASpec"),
        ([FullAttentionSpec(**shape, non_causal=True)], r"FullAttentionSpec \(not causal\)"),
        ([FullAttentionSpec(**shape, tokens_per_state=4)], "FullAttentionSpec"),
        ([MLAAttentionSpec(**(shape | {"num_kv_heads": 1}))], "MLAAttentionSpec"),
        ([full, SlidingWindowSpec(**shape, sliding_window=128)], "FullAttentionSpec, SlidingWindowSpec"),
        ([], "has $"),
    ):
        with pytest.raises(InputError, match=name):
            block_tokens(*specs)


def test_a_full_disk(
    prompts: list[list[int]], expected: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from kvpack.runtime.kv import disk_tier

    def full(*_arguments: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk_tier, "write_snapshot", full)
    with engine(tmp_path) as first:
        assert first.generate(prompts)[0] == expected
        first.settle()
        assert first.counts()["failed_writes"] >= 1
        assert first.generate(prompts) == (expected, [256, 512, 640]), "host memory has them"
    assert not files(tmp_path)


def test_little_room_in_both_tiers(prompts: list[list[int]], expected: list[list[int]], tmp_path: Path) -> None:
    """A page of books-27m takes 0.26 MB."""
    limit = 2_000_000
    with engine(tmp_path, host_bytes=1_000_000, disk_bytes=limit) as first:
        for _ in range(3):
            for prompt, tokens in zip(prompts, expected, strict=True):
                assert first.generate([prompt])[0] == [tokens]
                first.settle()
                assert sum(path.stat().st_size for path in files(tmp_path)) <= limit
        assert first.store.sizes()["host_bytes"] <= 1_000_000


def test_preempted_requests_find_their_pages(
    prompts: list[list[int]], expected: list[list[int]], tmp_path: Path
) -> None:
    """Fourteen blocks of 128 tokens, which three prompts fill, and sixteen at their end.

    Where a request was preempted, keys of its tokens that were computed one by one are found, not computed together
    anew; so the tokens behind that may be others than without the connector.
    """
    with engine(connector=False) as plain:
        longer = plain.generate(prompts, 100)[0]
    with engine(tmp_path, num_gpu_blocks_override=15, block_size=128, max_num_seqs=3) as first:
        found, _ = first.generate(prompts, 100)
        preempted = sum(metric.value for metric in first.llm.get_metrics() if metric.name == "vllm:num_preemptions")
        assert preempted > 0
        assert first.counts()["loaded_tokens"] >= 640
    assert [len(tokens) for tokens in found] == [100] * 3
    assert found[:2] == longer[:2]
    assert found[2][:TOKENS] == longer[2][:TOKENS] == expected[2]


def test_a_queue_that_is_full_drops_pages(prompts: list[list[int]], expected: list[list[int]], tmp_path: Path) -> None:
    with engine(tmp_path, queue_bytes=1) as first:
        assert first.generate(prompts)[0] == expected
        first.settle()
        assert first.generate(prompts) == (expected, [0, 0, 0])
        assert first.counts()["dropped_pages"] >= 2 * sum(length // 64 for length in LENGTHS)


def test_the_queue_follows_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 65,536 tokens a step brings 256 MiB."""
    from kvpack.integrations.vllm import kv_connector

    said: list[str] = []
    monkeypatch.setattr(kv_connector, "free_bytes", lambda _device: 1 << 34)
    # A handler would be lost where the first engine of a process sets logging up.
    monkeypatch.setattr(kv_connector.logger, "info", lambda message, *values: said.append(message % values))
    with engine(tmp_path, max_num_batched_tokens=1 << 16) as first:
        # On a GPU a copy's room begins at a border of its own.
        assert 1 << 28 == 1024 * PAGE_BYTES <= first.store.step_bytes < 1.001 * (1 << 28)
        assert first.store.queue_bytes == 2 * first.store.step_bytes
    assert any(
        "keys and values of up to 512 MiB wait for being kept (queue_bytes); a step brings up to 256 MiB" in line
        for line in said
    )


def test_of_a_gpu_what_lies_outside_of_the_engines_share(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvpack.integrations.vllm.kv_connector import _outside_bytes

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (30 << 30, 80 << 30))
    device = torch.device("cuda", 0)
    assert _outside_bytes(device, 0.75) == 20 << 30
    assert _outside_bytes(device, 1.0) == 0


def test_salts_keep_prompts_apart(prompts: list[list[int]], expected: list[list[int]], tmp_path: Path) -> None:
    from vllm import SamplingParams

    with engine(tmp_path) as first:

        def hits(salt: str) -> int:
            given = {"prompt_token_ids": prompts[1], "cache_salt": salt}
            (output,) = first.llm.generate([given], SamplingParams(temperature=0, max_tokens=TOKENS), use_tqdm=False)
            assert list(output.outputs[0].token_ids) == expected[1]
            first.settle()
            return int(output.num_cached_tokens)

        assert [hits("a"), hits("a"), hits("b"), hits("b")] == [0, 512, 0, 512]


def test_what_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    from vllm import LLM
    from vllm.config import KVTransferConfig

    from kvpack.integrations.vllm.llvmlite_vars import give_vars

    give_vars()

    def start(extra: dict[str, Any], **options: Any) -> None:
        transfer = KVTransferConfig(
            kv_connector="KVPackConnector",
            kv_connector_module_path="kvpack.integrations.vllm.kv_connector",
            kv_role="kv_both",
            kv_connector_extra_config=extra,
            **options,
        )
        LLM(MODEL, enforce_eager=True, max_model_len=256, kv_transfer_config=transfer, **GPU)

    with pytest.raises(Exception, match="'folder'; KVPackConnector knows pages"):
        start({"folder": str(tmp_path)}, kv_load_failure_policy="recompute")
    with pytest.raises(Exception, match="kv_load_failure_policy='recompute'"):
        start({})
    with pytest.raises(Exception, match="pages=FP16"):
        start({"pages": "FP16"}, kv_load_failure_policy="recompute")
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    ensure_kv_transfer_shutdown()


def test_saving_does_not_wait_for_the_disk(
    prompts: list[list[int]], expected: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that takes a second for a file: requests end before it has written one."""
    from kvpack.runtime.kv import disk_tier

    write = disk_tier.write_snapshot

    def slow(*arguments: Any) -> int:
        time.sleep(3)
        return write(*arguments)

    monkeypatch.setattr(disk_tier, "write_snapshot", slow)
    with engine(tmp_path) as first:
        first.generate([prompts[0]], 4)
        assert not files(tmp_path)
        assert first.generate([prompts[2]], 4)[0] == [expected[2][:4]]
    assert files(tmp_path), "shutting down waits for it"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="each rank needs a core")
def test_two_ranks(prompts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each keeps its own head; a page counts when both have it. One that a rank has lost is computed by both."""
    for variable, value in {
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_PLUGINS": "none",
    }.items():
        monkeypatch.setenv(variable, value)

    def until_found(first: Engine, wanted: list[int]) -> list[list[int]]:
        """Ranks save in processes of their own, and say so in the steps that come."""
        for _ in range(60):
            found, hits = first.generate(prompts)
            if hits == wanted:
                return found
            time.sleep(0.5)
        raise AssertionError(f"{hits} instead of {wanted}")

    with engine(tmp_path, tensor_parallel_size=2) as first:
        own, hits = first.generate(prompts)
        assert hits == [0, 0, 0]
        assert until_found(first, [256, 512, 640]) == own
    ranks = [sorted((tmp_path / f"rank-{rank}-of-2").glob("*.safetensors")) for rank in range(2)]
    assert [path.name for path in ranks[0]] == [path.name for path in ranks[1]]
    assert [path.read_bytes() for path in ranks[0]] != [path.read_bytes() for path in ranks[1]]
    with engine(tmp_path, tensor_parallel_size=2) as second:
        assert second.generate(prompts) == (own, [256, 512, 640])
    for path in ranks[1]:
        path.unlink()
    with engine(tmp_path, tensor_parallel_size=2) as third:
        assert third.generate(prompts) == (own, [0, 0, 0])
    shutil.rmtree(ranks[1][0].parent)
    ranks[0][0].parent.rename(tmp_path / "rank-1-of-2")  # another rank's heads under the same names
    with engine(tmp_path, tensor_parallel_size=2) as fourth:
        assert fourth.generate(prompts) == (own, [0, 0, 0])
