"""What vLLM's scheduler is told: which tokens can be loaded, and which pages are to be saved. Without vLLM."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.numpy import save_file  # noqa: E402

from kvpack.errors import InputError  # noqa: E402
from kvpack.format.pages import PageFormat  # noqa: E402
from kvpack.integrations.vllm.kv_identity import adapter_identity, rank_fingerprint, weights_digest  # noqa: E402
from kvpack.integrations.vllm.kv_options import ConnectorOptions  # noqa: E402
from kvpack.integrations.vllm.kv_plan import Changes, Load  # noqa: E402
from kvpack.integrations.vllm.kv_scheduler import PageScheduler  # noqa: E402


@dataclass
class Adapter:
    lora_name: str
    lora_path: str
    lora_int_id: int = 1
    load_inplace: bool = False


@dataclass
class Request:
    """What the scheduler looks at of vLLM's."""

    request_id: str
    all_token_ids: list[int]
    num_computed_tokens: int = 0
    num_preemptions: int = 0
    mm_features: list[Any] = field(default_factory=list)
    prompt_embeds: Any = None
    lora_request: Adapter | None = None
    cache_salt: str | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)


def make(*, ranks: int = 1, block_tokens: int = 16, **options: Any) -> PageScheduler:
    return PageScheduler({"model": "tiny"}, ranks=ranks, block_tokens=block_tokens, **options)


def step(scheduler: PageScheduler, requests: dict[Request, int] | list[tuple[Request, int]], table: Any = ()) -> Any:
    """A step that computes so many tokens of each request."""
    plan = scheduler.plan_step({request.request_id: count for request, count in requests}, lambda _request_id: table)
    for request, count in requests:
        request.num_computed_tokens += count
    return plan


def prefill(scheduler: PageScheduler, tokens: list[int], *, ranks: int = 1, name: str = "first", **of: Any) -> Any:
    """A request is computed at once, and all ranks have saved its pages. Returns these."""
    request = Request(name, tokens, **of)
    assert scheduler.lookup(request, 0) == 0
    scheduler.allocated(request, (), 0)
    plan = step(scheduler, [(request, len(tokens))])
    scheduler.finished(name)
    hashes = [one for pages in plan.saves for one in pages.hashes]
    for rank in range(ranks):
        scheduler.update(rank, Changes(come=set(hashes)))
    return hashes


@pytest.mark.parametrize(
    ("block_tokens", "prompt", "expected"),
    [
        (16, 200, 192),
        (16, 193, 192),
        (16, 192, 176),  # a token has to be computed, so not all of the last page is taken
        (16, 65, 64),
        (16, 64, 48),
        (16, 63, 0),
        (48, 200, 192),
        (48, 150, 96),
        (128, 300, 256),
        (128, 257, 256),
        (128, 256, 128),
        (128, 200, 128),
        (128, 128, 0),
    ],
)
def test_hits_are_whole_blocks_of_full_pages_before_the_last_token(
    block_tokens: int, prompt: int, expected: int
) -> None:
    scheduler = make(block_tokens=block_tokens)
    prefill(scheduler, list(range(prompt)))
    assert scheduler.lookup(Request("second", list(range(prompt))), 0) == expected


def test_a_longer_prompt_finds_what_is_alike() -> None:
    scheduler = make()
    prefill(scheduler, list(range(300)))
    assert scheduler.lookup(Request("a", [*range(200), *range(1000, 1300)]), 0) == 192
    assert scheduler.lookup(Request("b", [1, *range(1, 500)]), 0) == 0
    assert scheduler.lookup(Request("c", list(range(1000))), 0) == 256


def test_a_load_begins_where_vllm_s_own_prefix_ends() -> None:
    scheduler = make()
    hashes = prefill(scheduler, list(range(300)))
    request = Request("second", list(range(300)))
    assert scheduler.lookup(request, 80) == 256 - 80
    table = list(range(100, 119))
    scheduler.allocated(request, table, 176)
    plan = scheduler.plan_step({}, lambda _request_id: table)
    (load,) = plan.loads
    assert isinstance(load, Load)
    assert (load.request_id, load.first_token, load.end_token) == ("second", 80, 256)
    assert (load.pages.first_page, load.pages.parent) == (1, hashes[0])
    assert list(load.pages.hashes) == hashes[1:4]
    assert list(load.pages.block_ids) == table
    assert not plan.computes
    assert not scheduler.plan_step({}, lambda _request_id: table).loads
    assert scheduler.lookup(request, 256) == 0
    assert scheduler.lookup(request, 288) == 0
    assert scheduler.take_counts() == {"queried_tokens": 300 + 220, "hit_tokens": 176}


def test_a_hit_counts_when_all_ranks_have_the_page() -> None:
    scheduler = make(ranks=3)
    tokens = list(range(300))
    hashes = prefill(scheduler, tokens, ranks=2)
    request = Request("second", tokens)
    assert scheduler.lookup(request, 0) == 0
    scheduler.update(2, Changes(come=set(hashes[:2]) | {hashes[3]}))
    assert scheduler.lookup(request, 0) == 128
    scheduler.update(0, Changes(gone={hashes[1]}))
    assert scheduler.lookup(request, 0) == 64
    scheduler.update(0, Changes(come={hashes[1]}))
    scheduler.update(2, Changes(come={hashes[2]}))
    assert scheduler.lookup(request, 0) == 256
    for rank in range(3):
        scheduler.update(rank, Changes(gone=set(hashes)))
    assert scheduler.lookup(request, 0) == 0
    assert not scheduler._ranks_of, "what no rank has takes no memory"


def test_changes_one_after_the_other() -> None:
    a, b, c = (bytes([one]) * 32 for one in range(3))
    both = Changes(come={a, b}).then(Changes(come={c}, gone={a}))
    assert both == Changes(come={b, c}, gone={a})
    assert both.then(Changes(come={a}, gone={b})) == Changes(come={a, c}, gone={b})
    assert not Changes()


def test_full_pages_are_saved_once_as_they_are_computed() -> None:
    scheduler = make()
    request = Request("long", list(range(400)))
    scheduler.lookup(request, 0)
    saved = [step(scheduler, [(request, count)], (7,)).saves for count in (100, 20, 8, 172, 100)]
    assert [[(pages.first_page, len(pages.hashes)) for pages in of_step] for of_step in saved] == [
        [(0, 1)],
        [],
        [(1, 1)],
        [(2, 2)],
        [(4, 2)],
    ]
    assert saved[2][0].parent == saved[0][0].hashes[0]
    # Tokens that are generated: their page is full when the last one's keys are computed, not when it is known.
    pages = []
    for token in range(60):
        request.all_token_ids.append(token)
        pages += step(scheduler, [(request, 1)]).saves
    assert [(found.first_page, len(found.hashes)) for found in pages] == [(6, 1)]
    assert request.num_computed_tokens == 460
    scheduler.finished("long")
    assert not step(scheduler, [(request, 64)]).saves


def test_tokens_that_are_not_known_yet_are_not_saved() -> None:
    """vLLM schedules the next token before it knows this one, and drafts that may be wrong."""
    scheduler = make()
    request = Request("ahead", list(range(120)))
    scheduler.lookup(request, 0)
    assert len(step(scheduler, [(request, 120)]).saves[0].hashes) == 1
    assert not step(scheduler, [(request, 8)]).saves
    request.all_token_ids += range(8)
    assert [pages.first_page for pages in step(scheduler, [(request, 1)]).saves] == [1]


def test_what_is_there_is_not_saved_again() -> None:
    scheduler = make()
    prefill(scheduler, list(range(200)))
    request = Request("second", list(range(400)))
    assert scheduler.lookup(request, 0) == 192
    (pages,) = step(scheduler, [(request, 400)]).saves
    assert (pages.first_page, len(pages.hashes)) == (3, 3)


def test_a_preempted_request_is_looked_up_and_saved_again() -> None:
    scheduler = make()
    request = Request("first", list(range(200)))
    scheduler.lookup(request, 0)
    (pages,) = step(scheduler, [(request, 200)]).saves
    scheduler.update(0, Changes(come=set(pages.hashes[:2])))  # the third one had no room
    request.num_computed_tokens = 0
    request.all_token_ids += [5, 6]
    assert scheduler.lookup(request, 0) == 128
    request.num_computed_tokens = 128
    (again,) = step(scheduler, [(request, 74)]).saves
    assert again.hashes == pages.hashes[2:]


def test_a_prompt_that_is_changed_is_named_anew() -> None:
    """A session whose prompt comes piece by piece drops the last token that was generated."""
    scheduler = make()
    request = Request("session", list(range(128)))
    scheduler.lookup(request, 0)
    request.all_token_ids[100] = 7
    (pages,) = step(scheduler, [(request, 128)]).saves
    other = Request("other", list(request.all_token_ids))
    scheduler.lookup(other, 0)
    assert step(scheduler, [(other, 128)]).saves[0].hashes == pages.hashes


def test_salts_and_adapters_keep_pages_apart(tmp_path: Path) -> None:
    scheduler = make()
    tokens = list(range(200))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(b"x" * 9)
    kinds: list[dict[str, Any]] = [
        {},
        {"cache_salt": "tenant"},
        {"lora_request": Adapter("one", str(tmp_path / "a"))},
        {"lora_request": Adapter("one", str(tmp_path / "b"), 2)},
        {"lora_request": Adapter("two", str(tmp_path / "a"), 3)},
    ]
    names = [tuple(prefill(scheduler, tokens, name=f"n{place}", **kind)) for place, kind in enumerate(kinds)]
    assert len(set(names)) == len(kinds)
    for kind in kinds:
        assert scheduler.lookup(Request("again", tokens, **kind), 0) == 192


def test_an_adapter_that_is_trained_on_is_another(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(b"x" * 9)
    before = adapter_identity("one", str(tmp_path))
    file.write_bytes(b"y" * 9)
    assert adapter_identity("one", str(tmp_path)) != before
    assert adapter_identity("one", str(tmp_path / "nowhere")) is None


def test_an_adapter_whose_files_change_under_the_engine(tmp_path: Path) -> None:
    """vLLM may have the one of before or, where it has dropped that, the one of now; unless it reads it anew."""
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(b"x" * 9)
    scheduler = make()
    tokens = list(range(200))
    adapter = Adapter("one", str(tmp_path))
    before = prefill(scheduler, tokens, lora_request=adapter)
    file.write_bytes(b"y" * 10)
    assert scheduler.lookup(Request("second", tokens, lora_request=adapter), 0) == 0
    assert prefill(scheduler, tokens, name="third", lora_request=adapter) == []
    anew = prefill(scheduler, tokens, name="fourth", lora_request=replace(adapter, load_inplace=True))
    assert len(anew) == 3
    assert not set(anew) & set(before)
    assert scheduler.lookup(Request("fifth", tokens, lora_request=adapter), 0) == 192


def test_a_load_that_brought_nothing_is_not_tried_again() -> None:
    """Or a request whose pages are said to be there, and cannot be read, would be under way for ever."""
    scheduler = make()
    tokens = list(range(300))
    prefill(scheduler, tokens)
    request = Request("second", tokens)
    assert scheduler.lookup(request, 0) == 256
    assert scheduler.lookup(request, 0) == 256, "it got no blocks"
    scheduler.allocated(request, range(19), 256)
    assert len(scheduler.plan_step({}, lambda _request_id: range(19)).loads) == 1
    assert scheduler.lookup(request, 0) == 0
    scheduler.allocated(request, range(19), 0)
    request.num_preemptions += 1
    assert scheduler.lookup(request, 0) == 256
    assert scheduler.lookup(Request("third", tokens), 0) == 256


def test_what_tokens_do_not_say_is_passed_over(tmp_path: Path) -> None:
    scheduler = make()
    tokens = list(range(200))
    prefill(scheduler, tokens)
    for of in (
        {"mm_features": ["image"]},
        {"prompt_embeds": np.zeros(3)},
        {"lora_request": Adapter("hub", str(tmp_path / "nowhere"))},
    ):
        request = Request("other", tokens, **of)
        assert scheduler.lookup(request, 0) == 0
        assert scheduler.lookup(request, 0) == 0, "a request waits for blocks, and is looked up in each step"
        scheduler.allocated(request, (), 0)
        assert not step(scheduler, [(request, 200)]).saves
    assert scheduler.take_counts()["passed_over_requests"] == 3


def test_weights_that_are_changed_in_place() -> None:
    """Nothing from before is found, and what was begun before goes under no name."""
    scheduler, other = make(), make()
    tokens = list(range(300))
    hashes = prefill(scheduler, tokens)
    under_way = Request("under way", list(range(1000, 1300)))
    scheduler.lookup(under_way, 0)
    assert step(scheduler, [(under_way, 100)]).saves
    scheduler.reset()
    assert not step(scheduler, [(under_way, 200)]).saves
    assert scheduler.lookup(Request("second", tokens), 0) == 0
    again = prefill(scheduler, tokens)
    assert not set(again) & set(hashes)
    assert scheduler.lookup(Request("third", tokens), 0) == 256
    # An engine with the weights of before.
    other.update(0, Changes(come=set(hashes + again)))
    assert other.lookup(Request("fourth", tokens), 0) == 256


def test_few_tokens_are_computed_not_loaded() -> None:
    scheduler = make(min_load_tokens=100)
    tokens = list(range(300))
    prefill(scheduler, tokens)
    assert scheduler.lookup(Request("a", tokens), 144) == 112
    assert scheduler.lookup(Request("b", tokens), 160) == 0


def test_roles() -> None:
    tokens = list(range(300))
    producer, consumer = make(loads=False), make(saves=False)
    hashes = prefill(producer, tokens)
    assert producer.lookup(Request("a", tokens), 0) == 0
    assert not prefill(consumer, tokens)
    consumer.update(0, Changes(come=set(hashes)))
    assert consumer.lookup(Request("a", tokens), 0) == 256


# Options --------------------------------------------------------------------------------------------------------------


def test_options_and_their_defaults() -> None:
    assert ConnectorOptions.parse({}) == ConnectorOptions()
    assert ConnectorOptions().formats(PageFormat.BF16) == (PageFormat.BF16, PageFormat.BF16)
    found = ConnectorOptions.parse({"pages": ["INT8", "16-bit"], "directory": "/x", "disk_bytes": None})
    assert found.formats(PageFormat.FP16) == (PageFormat.INT8, PageFormat.FP16)
    assert found.directory == Path("/x")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"page": "INT8", "direktory": "x"}, "'direktory', 'page'.*knows pages, directory"),
        ({"pages": "INT7"}, "INT7.*16-bit, FP16"),
        ({"pages": ["INT8"]}, "list of two"),
        ({"pages": 8}, "pages=8"),
        ({"directory": 3}, "directory=3"),
        ({"directory": ""}, "no path"),
        ({"disk_bytes": 5}, "needs a directory"),
        ({"directory": "x", "disk_bytes": -1}, "disk_bytes=-1"),
        ({"host_bytes": 0}, "host_bytes=0"),
        ({"host_bytes": "1G"}, "host_bytes='1G'"),
        ({"queue_bytes": True}, "queue_bytes=True"),
        ({"min_load_tokens": 0}, "min_load_tokens"),
        ({"weights_id": 7}, "weights_id=7"),
    ],
)
def test_what_is_not_known_or_cannot_be_is_refused_by_name(config: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ConnectorOptions.parse(config)


def test_sixteen_bits_of_another_type_are_refused() -> None:
    with pytest.raises(InputError, match=r"pages=FP16.*BF16"):
        ConnectorOptions.parse({"pages": "FP16"}).formats(PageFormat.BF16)


# What model it is -----------------------------------------------------------------------------------------------------


def test_weights_are_told_apart_by_samples_of_each_tensor(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    tensors = {f"layers.{place}.weight": random.standard_normal((40, 50)).astype(np.float32) for place in range(3)}
    one, same, trained, renamed = (tmp_path / name for name in ("one", "same", "trained", "renamed"))
    for directory in (one, trained, renamed):
        directory.mkdir()
    save_file(tensors, one / "model.safetensors")
    shutil.copytree(one, same)
    save_file(tensors | {"layers.2.weight": tensors["layers.2.weight"] * 1.001}, trained / "model.safetensors")
    save_file({f"x.{name}": tensor for name, tensor in tensors.items()}, renamed / "model.safetensors")
    digests = [weights_digest(directory) for directory in (one, same, trained, renamed)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    (one / "notes.txt").write_text("no weights")
    assert weights_digest(one) == digests[0]
    (one / "more.bin").write_bytes(b"123")
    assert weights_digest(one) != digests[0]


@pytest.mark.parametrize(
    "head", [b"", b"\xff" * 20, (9).to_bytes(8, "little") + b"[1, 2, 3]", b"\2" + b"\0" * 7 + b"{}"]
)
def test_files_that_only_have_the_name_are_taken_as_bytes(head: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(head)
    assert len(weights_digest(tmp_path)) == 64


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no files of weights"):
        weights_digest(tmp_path)


def test_fingerprints_differ_by_all_that_pages_depend_on() -> None:
    config = json.loads('{"hidden_size": 8, "rope_parameters": {"rope_theta": 1e4}, "_name_or_path": "a"}')
    usual: dict[str, Any] = {"dtype": "bfloat16", "world": {"tensor": 2}, "rank": 0}
    base = rank_fingerprint(config, "0" * 64, **usual)
    assert rank_fingerprint(config | {"_name_or_path": "b", "transformers_version": "9"}, "0" * 64, **usual) == base
    others = [
        rank_fingerprint(config | {"hidden_size": 9}, "0" * 64, **usual),
        rank_fingerprint(config | {"rope_parameters": {"rope_theta": 2e4}}, "0" * 64, **usual),
        rank_fingerprint(config, "1" * 64, **usual),
        rank_fingerprint(config, "0" * 64, **(usual | {"dtype": "float16"})),
        rank_fingerprint(config, "0" * 64, **(usual | {"world": {"tensor": 4}})),
        rank_fingerprint(config, "0" * 64, **(usual | {"rank": 1})),
    ]
    assert len({base.model, *(found.model for found in others)}) == 7
    assert "rope.rope_parameters.rope_theta: 10000.0 in the file, 20000.0 in the model" in base.differences(others[1])
