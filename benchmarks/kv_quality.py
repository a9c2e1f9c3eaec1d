"""What quantized KV pages cost a causal language model on real text: perplexity, KL, same top token.

    python benchmarks/kv_quality.py "$KVPACK_BOOKS_MODEL" "$KVPACK_BOOKS_TEXT" \\
        --json benchmarks/results/DATE-kv-quality.json --plot kv-quality.png
    python benchmarks/kv_quality.py "$KVPACK_BOOKS_MODEL" "$KVPACK_BOOKS_TEXT" --device cpu \\
        --sequences 2 --tokens 256 --configurations int8,int2

A Llama reads --sequences windows of --tokens tokens, at equal distances in the text, one token a step: each step
appends keys and values of every layer to a KV cache and attends to its pages with ``attention_with_kv_cache``. No token
meets attention that is not the cache's. The text is given, so that all configurations see the same tokens. Everything
but attention is in fp32, on weights that fp32 holds exactly: q, k and v are rounded to fp16, and what differs between
two runs is what their pages differ by. The reference is a run with all pages in 16 bits; that it is the model, its
distance from transformers' dense forward pass (``difference_from_transformers``) says.

``loss`` is the mean of log p(reference) − log p(configuration) of the next token, ``kl`` that of
KL(reference ‖ configuration), both in nats a token; standard errors are those of the mean of paired differences.
``mean_bits`` is the mean over steps of the cache's bits an element, each weighted by the elements that it holds: what
the steps read. It counts scales and what is empty of last pages, so that 16-bit pages have a little more than 16.

Configurations:

    fp16                 the reference again: how far a run is from itself
    int8, …, fp8_e5m2    pages that leave the recent window get this format
    k4v2                 K in 4 bits, V in 2
    POLICY@BUDGET        KVCache(budget=…, policy=…); attention is observed each step where the policy asks for it,
                         and bytes are reallocated every 32 steps
    POLICY@FORMAT        the same, at the budget that gives the bytes at the end of pages of one format

The last ones, and k4v2 and k2v4 beside int3, are compared token by token with pages of that one format, which are
measured too. Their bytes are equal at the end; how equal the bits are that all steps read, ``mean_bits`` says.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import torch
from bench_common import (
    device_record,
    environment_path,
    print_table,
    provenance,
    require_inputs,
    require_plotting,
    synchronize,
    write_result,
)
from kv_quality_report import tables, verdicts
from torch.nn.functional import embedding, linear, rms_norm, silu

from kvpack.format.pages import PAGE_TOKENS, PageFormat, Side
from kvpack.runtime.kv.allocator import POLICIES, Policy
from kvpack.runtime.kv.attention import attention_with_kv_cache
from kvpack.runtime.kv.budget import YIELDED
from kvpack.runtime.kv.cache import KVCache

UNIFORM = ("int8", "int4", "int3", "int2", "fp8_e4m3", "fp8_e5m2")
BUDGETS = (0.5, 0.4, 0.3, 0.25, 0.2)
# Not int2: at the bytes of the lowest width, every mixture is that width.
EQUAL_BYTES = ("int4", "int3")
DEFAULT_CONFIGURATIONS = [
    "fp16",
    *UNIFORM,
    "k4v2",
    "k2v4",
    *(f"{policy}@{budget:g}" for policy in POLICIES for budget in BUDGETS),
    *(f"{policy}@{name}" for name in EQUAL_BYTES for policy in POLICIES if policy != "uniform"),
]
# These look at what has been observed.
OBSERVING: tuple[Policy, ...] = ("importance", "per-layer")
REALLOCATE_STEPS = 32
# Not replayed: they compile kernels, and the cache looks at their queries.
EAGER_STEPS = 16
# fp16 queries, keys and values move logits by some 10⁻⁴ of their norm; another rotation or mask moves them by 10⁻¹.
MOST_DIFFERENCE = 5e-3


@dataclass(frozen=True)
class Configuration:
    """What a cache is made with; either ``widths`` of K and V, or a budget and a policy.

    Attributes:
        against: the name of the one format that takes as many bytes.
    """

    name: str
    widths: tuple[PageFormat, PageFormat] | None = None
    policy: Policy = "uniform"
    budget: float | None = None
    against: str | None = None


def one_format(name: str) -> PageFormat:
    if name != "fp16" and name not in UNIFORM:
        raise ValueError(f"{name!r} is no format; there are fp16, {', '.join(UNIFORM)}")
    return PageFormat[name.upper()]


def equal_budget(page_format: PageFormat, tokens: int, kv_heads: int, head_dim: int) -> float:
    """The budget that allows as many bytes as pages of one format take when all tokens are there."""
    cache = KVCache(1, kv_heads, head_dim, tokens, device="cpu", formats=page_format)
    zeros = torch.zeros((1, kv_heads, tokens, head_dim), dtype=cache.dtype)
    cache.append(0, zeros, zeros)
    whole = cache.pools.page_bytes(Side.K, cache.full_format)
    pinned = sum(whole * cache.pools.pages_in_use(side, cache.full_format) for side in Side)
    everything = len(Side) * whole * (tokens // PAGE_TOKENS)
    used = cache.pools.bytes_in_use
    if pinned == everything:
        raise ValueError(f"{tokens} tokens are too few: all of their pages stay in 16 bits")
    return min(used / everything, (used - pinned) / ((1 - YIELDED) * (everything - pinned)))


def parse_configuration(name: str, tokens: int, kv_heads: int, head_dim: int) -> Configuration:
    """
    Raises:
        ValueError: a name that means nothing, or a budget that these tokens cannot have.
    """
    policy, at, amount = name.partition("@")
    if at:
        if policy not in POLICIES:
            raise ValueError(f"{policy!r} is no policy; there are {', '.join(POLICIES)}")
        if re.fullmatch(r"0?\.\d+|1", amount):
            return Configuration(name, policy=policy, budget=float(amount))
        budget = equal_budget(one_format(amount), tokens, kv_heads, head_dim)
        return Configuration(name, policy=policy, budget=budget, against=amount)
    if pair := re.fullmatch(r"k(\d)v(\d)", name):
        k, v = map(int, pair.groups())
        widths = one_format(f"int{k}"), one_format(f"int{v}")
        between = f"int{(k + v) // 2}"
        return Configuration(name, widths, against=between if (k + v) % 2 == 0 and between in UNIFORM else None)
    return Configuration(name, (one_format(name), one_format(name)))


def with_formats_first(configurations: Sequence[Configuration]) -> list[Configuration]:
    """Each once, and in front of it what it is compared with."""
    found: dict[str, Configuration] = {}
    for configuration in configurations:
        if configuration.against is not None:
            page_format = one_format(configuration.against)
            found.setdefault(configuration.against, Configuration(configuration.against, (page_format, page_format)))
        found.setdefault(configuration.name, configuration)
    return list(found.values())


class StepwiseLlama:
    """A Llama of transformers that takes a token of each sequence at a time, its keys and values in a KVCache.

    Transformers' own modules would take some 50 launches a layer where this takes 20, and a step is launches.
    """

    def __init__(self, model: Any) -> None:
        config, weights = model.config, dict(model.state_dict())
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            model.model.layers[0].self_attn.head_dim,
        )
        self.num_layers, self.epsilon = config.num_hidden_layers, config.rms_norm_eps
        self.embedding, self.head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
        self.final_norm = weights["model.norm.weight"]
        self.device = self.embedding.device

        def joined(layer: int, *names: str) -> torch.Tensor:
            return torch.cat([weights[f"model.layers.{layer}.{name}.weight"] for name in names])

        # Projections of one input as one product.
        self.layers = [
            (
                joined(i, "input_layernorm"),
                joined(i, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                joined(i, "self_attn.o_proj"),
                joined(i, "post_attention_layernorm"),
                joined(i, "mlp.gate_proj", "mlp.up_proj"),
                joined(i, "mlp.down_proj"),
            )
            for i in range(self.num_layers)
        ]
        places = torch.arange(config.max_position_embeddings, device=self.device)[None]
        cosine, sine = model.model.rotary_emb(self.final_norm, places)
        self.cosine, self.sine = cosine[0], sine[0]

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight.shape, weight, self.epsilon)

    def step(self, tokens: torch.Tensor, position: torch.Tensor, cache: KVCache, observe: bool) -> torch.Tensor:
        """The last hidden states [sequences, hidden] of the sequences' tokens [sequences] at a position [1]."""
        h = embedding(tokens, self.embedding)
        cosine, sine = self.cosine.index_select(0, position), self.sine.index_select(0, position)
        turning = self.heads + self.kv_heads
        for layer, (norm, qkv, out, mlp_norm, gate_up, down) in enumerate(self.layers):
            x = linear(self._norm(h, norm), qkv).unflatten(-1, (-1, self.head_dim))
            first, second = x[:, :turning].chunk(2, dim=-1)
            turned = x[:, :turning] * cosine + torch.cat([-second, first], dim=-1) * sine
            q, k = turned.to(cache.dtype)[:, :, None].split([self.heads, self.kv_heads], dim=1)
            v = x[:, turning:, None].to(cache.dtype)
            mixed, _ = attention_with_kv_cache(q, k, v, cache, layer=layer, observe=observe)
            h = h + linear(mixed.flatten(1).float(), out)
            gate, up = linear(self._norm(h, mlp_norm), gate_up).chunk(2, dim=-1)
            h = h + linear(silu(gate) * up, down)
        return self._norm(h, self.final_norm)


@dataclass(frozen=True)
class Run:
    """What a configuration gave.

    Attributes:
        hidden: fp32 [sequences, tokens, hidden], the last hidden states: a fraction of the logits' bytes.
        tokens_per_s: of the median of spans of steps, since kernels are compiled when they are first used.
    """

    hidden: torch.Tensor
    mean_bits: float
    end_bits: float
    page_bytes: int
    seconds: float
    tokens_per_s: float


@torch.inference_mode()
def read_text(
    model: StepwiseLlama,
    tokens: torch.Tensor,
    configuration: Configuration,
    advance: Callable[[int], None] = lambda steps: None,
) -> Run:
    """Step by step through ``tokens`` [sequences, tokens]; ``advance`` is told of steps done.

    On CUDA one step is captured in a graph, and replayed for all that come after the first few.
    """
    sequences, length = tokens.shape
    observe = configuration.budget is not None and configuration.policy in OBSERVING
    cache = KVCache(
        model.num_layers,
        model.kv_heads,
        model.head_dim,
        length,
        max_sequences=sequences,
        device=model.device,
        budget=configuration.budget,
        policy=configuration.policy,
        formats=None if configuration.widths is None else [configuration.widths] * model.num_layers,
    )
    hidden = torch.empty((sequences, length, model.embedding.shape[1]), device=model.device)
    bits = 0.0
    synchronize(model.device)
    times = [time.perf_counter()]
    token, place = tokens[:, 0].clone(), torch.zeros(1, dtype=torch.int64, device=model.device)
    graph = None
    for position in range(length):
        token.copy_(tokens[:, position])
        place.fill_(position)
        if model.device.type != "cuda" or position < EAGER_STEPS:
            last = model.step(token, place, cache, observe)
        else:
            if graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    last = model.step(token, place, cache, observe)
            cache.plan()
            graph.replay()
        hidden[:, position] = last
        bits += (position + 1) * cache.average_bits()
        if (position + 1) % REALLOCATE_STEPS == 0:
            if configuration.budget is not None:
                cache.reallocate()
            synchronize(model.device)
            times.append(time.perf_counter())
            advance(REALLOCATE_STEPS)
    cache.check()
    return Run(
        hidden,
        bits / (length * (length + 1) / 2),
        cache.average_bits(),
        cache.pools.bytes_in_use,
        times[-1] - times[0],
        sequences * REALLOCATE_STEPS / statistics.median(after - before for before, after in pairwise(times)),
    )


@dataclass(frozen=True)
class Measures:
    """For each token, fp64 [sequences, tokens]: log p of the next token, KL(reference ‖ this), 1 where the top token is
    the reference's."""

    log_likelihood: torch.Tensor
    kl: torch.Tensor
    same_top: torch.Tensor


def measures(reference: torch.Tensor, logits: torch.Tensor, following: torch.Tensor) -> Measures:
    """Measures of logits [..., vocabulary] and next tokens [...]. In fp64: KL is a small difference of large sums."""
    of_reference, found = (torch.log_softmax(x.double(), -1) for x in (reference, logits))
    return Measures(
        found.gather(-1, following[..., None])[..., 0],
        (of_reference.exp() * (of_reference - found)).sum(-1),
        (reference.argmax(-1) == logits.argmax(-1)).double(),
    )


@torch.inference_mode()
def compare(head: torch.Tensor, reference: torch.Tensor, hidden: torch.Tensor, following: torch.Tensor) -> Measures:
    """As :func:`measures`, of last hidden states, a page's tokens at a time."""
    parts = [
        measures(linear(a, head), linear(b, head), c)
        for a, b, c in zip(*(x.split(PAGE_TOKENS, dim=1) for x in (reference, hidden, following)), strict=True)
    ]
    fields = ("log_likelihood", "kl", "same_top")
    return Measures(*(torch.cat([getattr(part, field) for part in parts], dim=1).cpu() for field in fields))


def standard_error(values: torch.Tensor) -> float | None:
    """The standard error of the mean of [sequences, tokens], from the means of 64 tokens each: neighbours attend to the
    same pages and do not err independently."""
    blocks = values.unflatten(1, (-1, PAGE_TOKENS)).mean(-1).flatten()
    return float(blocks.std() / math.sqrt(len(blocks))) if len(blocks) > 1 else None


def result_row(configuration: Configuration, run: Run, found: Measures, reference: Measures) -> dict[str, Any]:
    loss = reference.log_likelihood - found.log_likelihood
    budgeted = configuration.budget is not None
    return {
        "name": configuration.name,
        "widths": None if configuration.widths is None else [width.name for width in configuration.widths],
        "policy": configuration.policy if budgeted else None,
        "budget": configuration.budget,
        "mean_bits": run.mean_bits,
        "end_bits": run.end_bits,
        "page_bytes": run.page_bytes,
        "perplexity": math.exp(-found.log_likelihood.mean()),
        "loss": float(loss.mean()),
        "loss_standard_error": standard_error(loss),
        "kl": float(found.kl.mean()),
        "kl_standard_error": standard_error(found.kl),
        "same_top": float(found.same_top.mean()),
        "seconds": run.seconds,
        "tokens_per_s": run.tokens_per_s,
    }


# The row of a configuration, and what it is the mean of.
Done = tuple[dict[str, Any], Measures]


def equal_bytes_row(mine: Done, other: Done) -> dict[str, Any]:
    """Gains are positive where the mixture is better than the one width."""
    kl = other[1].kl - mine[1].kl
    log_likelihood = mine[1].log_likelihood - other[1].log_likelihood
    return {
        "name": mine[0]["name"],
        "against": other[0]["name"],
        "bytes_ratio": mine[0]["page_bytes"] / other[0]["page_bytes"],
        "mean_bits_ratio": mine[0]["mean_bits"] / other[0]["mean_bits"],
        "kl_gain": float(kl.mean()),
        "kl_standard_error": standard_error(kl),
        "log_likelihood_gain": float(log_likelihood.mean()),
        "log_likelihood_standard_error": standard_error(log_likelihood),
    }


@torch.inference_mode()
def difference_from_dense(model: Any, head: torch.Tensor, tokens: torch.Tensor, hidden: torch.Tensor) -> float:
    """‖logits − transformers' logits‖ / ‖transformers' logits‖ over a sequence."""
    dense = model(tokens[None]).logits[0].double()
    return float((linear(hidden, head).double() - dense).norm() / dense.norm())


def measure(
    model: Any,
    tokens: torch.Tensor,
    configurations: Sequence[Configuration],
    begin: Callable[[str], Callable[[int], None]] = lambda name: lambda steps: None,
) -> Iterator[dict[str, Any]]:
    """What there is to report, growing: first with the reference, then with each configuration.

    Args:
        model: a Llama of transformers, in fp32, on the device where it shall run.
        tokens: i64 [sequences, tokens + 1]; the last ones are only predicted.
        begin: told of each run, gives what is told of its steps.
    """
    given, following = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    llama = StepwiseLlama(model)
    reference = Configuration("reference")
    whole = read_text(llama, given, reference, begin(reference.name))
    as_reference = compare(llama.head, whole.hidden, whole.hidden, following)
    result: dict[str, Any] = {
        "difference_from_transformers": difference_from_dense(model, llama.head, given[0], whole.hidden[0]),
        "rows": [result_row(reference, whole, as_reference, as_reference)],
        "equal_bytes": [],
    }
    yield result
    done: dict[str, Done] = {}
    for configuration in configurations:
        run = read_text(llama, given, configuration, begin(configuration.name))
        found = compare(llama.head, whole.hidden, run.hidden, following)
        done[configuration.name] = result_row(configuration, run, found, as_reference), found
        result["rows"].append(done[configuration.name][0])
        if configuration.against in done:
            result["equal_bytes"].append(equal_bytes_row(done[configuration.name], done[configuration.against]))
        yield result


@contextmanager
def progress(runs: int, tokens: int) -> Iterator[Callable[[str], Callable[[int], None]]]:
    """A bar on stderr, gone when done; where stderr is no terminal, a line for each run."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("", total=runs * tokens)
        numbers = count(1)
        begun = time.perf_counter()

        def begin(name: str) -> Callable[[int], None]:
            if not console.is_terminal:
                line = f"{name}: run {next(numbers)} of {runs}, after {time.perf_counter() - begun:.0f} s"
                print(line, file=sys.stderr, flush=True)
            bar.update(task, description=name)
            return lambda steps: bar.advance(task, steps)

        yield begin


def windows(directory: Path, text: Path, sequences: int, tokens: int) -> torch.Tensor:
    """i64 [sequences, tokens + 1], at equal distances, so that all of the text has its part."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
    distance = (len(ids) - 1) // sequences
    if distance < tokens:
        raise SystemExit(f"the text has {len(ids)} tokens; {sequences} windows of {tokens} do not fit without overlap")
    return torch.stack([ids[i * distance : i * distance + tokens + 1] for i in range(sequences)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=environment_path("KVPACK_BOOKS_MODEL"))
    parser.add_argument("text", type=Path, nargs="?", default=environment_path("KVPACK_BOOKS_TEXT"))
    parser.add_argument(
        "--configurations", default=",".join(DEFAULT_CONFIGURATIONS), help="comma-separated; default: all"
    )
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048, help=f"of each; a multiple of {PAGE_TOKENS}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="written anew after each configuration")
    parser.add_argument("--plot", type=Path, help="a PNG")
    options = parser.parse_args()
    if options.model is None or options.text is None:
        parser.error("MODEL and TEXT are needed, or KVPACK_BOOKS_MODEL and KVPACK_BOOKS_TEXT")
    require_inputs(parser, options.model, options.text)
    require_plotting(parser, options.plot)
    if options.sequences < 1 or options.tokens < PAGE_TOKENS or options.tokens % PAGE_TOKENS:
        parser.error(f"--sequences is at least 1, --tokens a multiple of {PAGE_TOKENS}")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device (--device cpu with few --sequences, --tokens and --configurations takes minutes)")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval().to(device)
    if options.tokens > model.config.max_position_embeddings:
        parser.error(f"--tokens is {options.tokens}; the model has {model.config.max_position_embeddings} positions")
    head_dim, kv_heads = model.model.layers[0].self_attn.head_dim, model.config.num_key_value_heads
    names = options.configurations.split(",")
    try:
        parsed = [parse_configuration(name, options.tokens, kv_heads, head_dim) for name in names]
    except ValueError as error:
        parser.error(str(error))
    configurations = with_formats_first(parsed)
    variables = {"KVPACK_BOOKS_MODEL": options.model, "KVPACK_BOOKS_TEXT": options.text}
    result: dict[str, Any] = {
        "what": "kv-quality",
        **provenance(variables, ("torch", "transformers", "cupy-cuda13x", "cupy-cuda12x")),
        "device": device_record(device),
        "sequences": options.sequences,
        "tokens": options.tokens,
        "reallocate_steps": REALLOCATE_STEPS,
    }
    tokens = windows(options.model, options.text, options.sequences, options.tokens).to(device)
    with progress(1 + len(configurations), options.tokens) as begin:
        for found in measure(model, tokens, configurations, begin):
            result |= found
            if found["difference_from_transformers"] > MOST_DIFFERENCE:
                sys.exit(f"logits differ from transformers' by {found['difference_from_transformers']:.1e}")
            done = len(found["rows"]) - 1
            result["complete"] = done == len(configurations)
            result["stopped"] = None if result["complete"] else f"{done} of {len(configurations)} configurations"
            if options.json:
                write_result(options.json, result, quiet=not result["complete"])
    for table in tables(result).values():
        print_table(table.headings, table.rows, table.title)
    print(f"\n{verdicts(result)}")
    print(f"The reference's logits against transformers': {result['difference_from_transformers']:.1e} of their norm.")
    if options.plot:
        from kvpack.bench.plot import plot_kv_quality

        plot_kv_quality(result, options.plot)


if __name__ == "__main__":
    main()
