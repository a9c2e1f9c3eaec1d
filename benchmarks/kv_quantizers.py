"""Page quantizers judged by what they do to a model: KL and the error of attention, on real keys and values.

    python benchmarks/kv_quantizers.py "$KVPACK_BOOKS_MODEL" --text books="$KVPACK_BOOKS_TEXT" --text python \\
        --windows 24 --json benchmarks/results/DATE-kv-quantizers-books.json --plot kv-quantizers.png
    python benchmarks/kv_quantizers.py --constructed --json benchmarks/results/DATE-kv-quantizers-constructed.json
    python benchmarks/kv_quantizers.py "$KVPACK_BOOKS_MODEL" --text books="$KVPACK_BOOKS_TEXT" \\
        --schemes int4,int3/int2,kivi4g64,turbo4,importance@0.3,uniform@0.3

Any causal model of transformers whose layers all attend to all tokens, with K and V of one head_dim, reads windows of
--context tokens. Its keys and values, rounded to fp16, are what is quantized, all at once, and the next 64 tokens are
the queries: they see each scheme's keys and values in a ``DynamicCache``. The reference is the same pass over the
fp16 ones. Model and attention are in fp32.

``kl`` is the mean over the 64 queries of KL(reference ‖ scheme), in nats; ``same_top`` says how often the most likely
token is the reference's; ``error`` is ‖o − o'‖ / ‖o‖ of attention's outputs o, its mean over layers: queries, and the
tokens that they bring themselves, are the reference's, so that only the quantizer errs. Each is given for every window;
standard errors are those over windows. ``bits`` of an element count everything.

Schemes, and what each keeps in 16 bits, are in ``kv_quantizer_schemes.py``. kvpack's pages are compared window by
window with KIVI-like schemes: with groups of 64 at the same width; with what these would have at equal bits (log KL
linear in bits between two of them); and with the one of least KL that takes no more bits, and at most one bit less.
Budgets are compared with uniform ones, POLICY@BUDGET with uniform@BUDGET, where both are measured.
``--constructed`` measures the error of attention on keys and values made after ones that real models have
(``kv_constructed.py``), too.

Windows lie at equal distances in a text. ``--text python`` is Python's own standard library: the *.py files beside each
other in sysconfig's ``stdlib`` folder, in order of name. Token by token through the cache, with pages quantized while
the text is read: ``kv_quality.py`` (a Llama of transformers; mixtures at equal bytes) and
``kvpack eval``.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_common import (
    device_record,
    print_table,
    provenance,
    require_inputs,
    require_plotting,
    write_result,
)
from kv_constructed import constructed
from kv_quantizer_schemes import (
    CHUNK_TOKENS,
    FirstPage,
    Quantized,
    Recording,
    Scheme,
    SideBySide,
    page_format,
    parse_schemes,
)
from kv_quantizers_report import tables, verdicts

from kvpack.format.pages import PAGE_TOKENS
from kvpack.integrations.transformers import rotary
from kvpack.integrations.transformers.cache import cache_keyword

QUERIES = 64
# The first page, one between, the recent window.
LEAST_TOKENS = 3 * PAGE_TOKENS
# Tokens take some 4 characters of prose; a window's text is cut to this many for each, then to its tokens.
_MOST_CHARACTERS = 12


@dataclass(frozen=True)
class Text:
    name: str
    content: str

    @property
    def about(self) -> dict[str, Any]:
        encoded = self.content.encode()
        return {"name": self.name, "bytes": len(encoded), "sha256": hashlib.sha256(encoded).hexdigest()}


def python_text() -> str:
    """Python's standard library, packages left out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def read_text(argument: str) -> Text:
    """``python`` or NAME=FILE.

    Raises:
        ValueError: it is neither.
        OSError: there is no such file.
    """
    name, _, file = argument.partition("=")
    if file:
        return Text(name, Path(file).read_text(encoding="utf-8"))
    if name != "python":
        raise ValueError(f"--text is {argument!r}; it is NAME=FILE, or python: that of the standard library")
    return Text(name, python_text())


def windows_of(tokenizer: Any, text: Text, windows: int, tokens: int) -> Iterator[torch.Tensor]:
    """i64 [tokens] each, at equal distances, without overlap.

    Raises:
        SystemExit: the text is too short.
    """
    distance = len(text.content) // windows
    for i in range(windows):
        content = text.content[i * distance : i * distance + min(distance, _MOST_CHARACTERS * tokens)]
        ids = tokenizer(content, return_tensors="pt", verbose=False).input_ids[0]
        if len(ids) < tokens:
            sys.exit(f"{text.name}: {windows} windows of {tokens} tokens do not fit; window {i} has {len(ids)}")
        yield ids[:tokens]


class Attention:
    """transformers' ``sdpa``, which keeps the queries, keys and values of new tokens, and refuses what is not measured.

    One object for all models: transformers finds attention by name.
    """

    NAME = "recording"

    def __init__(self) -> None:
        self.kept: dict[int, list[tuple[torch.Tensor, ...]]] | None = None
        self.scale: float | None = None

    def __call__(
        self, module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, **options: Any
    ) -> tuple[torch.Tensor, None]:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        for option in ("sliding_window", "softcap", "s_aux", "position_bias"):
            if options.get(option) is not None:
                sys.exit(f"{type(module).__name__} attends with {option}, which the error of attention leaves out")
        if self.kept is not None:
            new = slice(k.shape[2] - q.shape[2], None)
            # Copies, or all that is cached would be kept with them.
            self.kept.setdefault(module.layer_idx, []).append((q[0], k[0, :, new].clone(), v[0, :, new].clone()))
            scaling = options.get("scaling")
            self.scale = q.shape[-1] ** -0.5 if scaling is None else float(scaling)
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(module, q, k, v, mask, **options)
        return found

    @contextmanager
    def recording(self) -> Iterator[Callable[[], list[torch.Tensor]]]:
        """Gives what gives q, k and v [layers, heads, tokens, head_dim] of all tokens that came meanwhile."""
        self.kept = kept = {}

        def taken() -> list[torch.Tensor]:
            layers = [[torch.cat(parts, 1) for parts in zip(*kept[layer], strict=True)] for layer in sorted(kept)]
            return [torch.stack(side) for side in zip(*layers, strict=True)]

        try:
            yield taken
        finally:
            self.kept = None


ATTENTION = Attention()


def prepare(model: Any) -> None:
    """Let a model attend through :data:`ATTENTION`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(ATTENTION.NAME, ATTENTION)
    AttentionMaskInterface.register(ATTENTION.NAME, sdpa_mask)
    model.set_attn_implementation(ATTENTION.NAME)


def _forward(part: Any, ids: torch.Tensor, cache: Any, begin: int) -> Any:
    """What a model, or its part below the head, returns for tokens [tokens] at positions from ``begin`` on."""
    positions = torch.arange(begin, begin + len(ids), device=ids.device)
    return part(ids[None], position_ids=positions[None], use_cache=True, **{cache_keyword(part): cache})


def next_log_probabilities(model: Any, ids: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """fp64 [64, vocabulary] of the last 64 of ``ids``, behind keys and values [layers, kv_heads, tokens, head_dim]."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for layer in range(len(k)):
        cache.update(k[None, layer].float(), v[None, layer].float(), layer)
    logits: torch.Tensor = _forward(model, ids[-QUERIES:], cache, k.shape[2]).logits[0]
    return logits.double().log_softmax(-1)


def record(model: Any, ids: torch.Tensor, *, prompt_queries: bool) -> tuple[Recording, torch.Tensor]:
    """What a model caches of all but the last 64 of ``ids``, and the reference: fp64 [64, vocabulary].

    Raises:
        SystemExit: a model whose cache is not keys and values of one shape in each layer, or beyond fp16; or whose
            attention does not go through transformers' interface, where queries are seen.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache(config=model.config)
    tokens = len(ids) - QUERIES
    with ATTENTION.recording() if prompt_queries else nullcontext() as taken:
        for begin in range(0, tokens, CHUNK_TOKENS):
            _forward(model.base_model, ids[begin : min(begin + CHUNK_TOKENS, tokens)], cache, begin)
        queries = taken() if taken else None
    if queries == []:
        sys.exit(f"{type(model).__name__}'s attention is its own in this transformers: its queries cannot be recorded")
    prompt_q = queries[0].half() if queries else None
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        sys.exit(f"{type(model).__name__} has layers that do not cache all tokens")
    if len({x.shape for layer in cache.layers for x in (layer.keys, layer.values)}) != 1:
        sys.exit(f"{type(model).__name__} has keys and values of several shapes")
    k = torch.stack([layer.keys[0] for layer in cache.layers]).half()
    v = torch.stack([layer.values[0] for layer in cache.layers]).half()
    if not (k.isfinite().all() and v.isfinite().all()):
        sys.exit(f"{type(model).__name__} has keys or values that fp16 cannot hold")
    del cache
    with ATTENTION.recording() as taken:
        reference = next_log_probabilities(model, ids, k, v)
        q, new_k, new_v = taken()
    assert ATTENTION.scale is not None
    key_order = rotary.key_order(model.config.get_text_config(decoder=True), k.shape[-1])
    return Recording(k, v, q, new_k, new_v, ATTENTION.scale, prompt_q, key_order), reference


def attention_error(recording: Recording, quantized: Quantized) -> float:
    """The mean over layers of ‖o − o'‖ / ‖o‖ of queries' attention to the cached tokens and, causally, their own."""
    kv_heads, tokens = recording.k.shape[1:3]
    queries, new = recording.q.shape[2], recording.new_k.shape[2]
    seen = torch.ones(queries, tokens + new, dtype=torch.bool, device=recording.q.device).tril(tokens)
    errors = []
    for layer, q in enumerate(recording.q):
        q = recording.scale * q.unflatten(0, (kv_heads, -1))

        def attend(k: torch.Tensor, v: torch.Tensor, layer: int = layer, q: torch.Tensor = q) -> torch.Tensor:
            k = torch.cat([k[layer].to(q), recording.new_k[layer]], 1)
            v = torch.cat([v[layer].to(q), recording.new_v[layer]], 1)
            scores = (q @ k[:, None].mT).masked_fill(~seen, -torch.inf)
            return scores.softmax(-1) @ v[:, None]

        exact, found = attend(recording.k, recording.v), attend(quantized.k, quantized.v)
        errors.append(float((exact - found).norm() / exact.norm()))
    return sum(errors) / len(errors)


Row = dict[str, Any]


def measure_window(model: Any, ids: torch.Tensor, schemes: Sequence[Scheme], rows: list[Row]) -> None:
    """Put what each scheme does to a window into its row."""
    wanted = any(scheme.wants_prompt_queries for scheme in schemes)
    recording, reference = record(model, ids, prompt_queries=wanted)
    for scheme, row in zip(schemes, rows, strict=True):
        quantized = scheme.apply(recording)
        found = next_log_probabilities(model, ids, quantized.k, quantized.v)
        row["kl"].append(float((reference.exp() * (reference - found)).sum(-1).mean()))
        row["same_top"].append(float((reference.argmax(-1) == found.argmax(-1)).double().mean()))
        row["error"].append(attention_error(recording, quantized))
        row["window_bits"].append(quantized.bits)
        row["bits"] = sum(row["window_bits"]) / len(row["window_bits"])


@torch.inference_mode()
def measure(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Text],
    schemes: Sequence[Scheme],
    *,
    windows: int,
    context: int,
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator[list[dict[str, Any]]]:
    """What there is to report of texts, growing with each window.

    Args:
        model: a causal one of transformers, in fp32, on the device where it shall run.
        context: tokens that are cached; a multiple of 64.
        tell: given a line for each window.
    """
    prepare(model)
    found: list[dict[str, Any]] = []
    for text in texts:
        rows: list[Row] = [
            {"name": s.name, "family": s.family, "bits": None, "kl": [], "same_top": [], "error": [], "window_bits": []}
            for s in schemes
        ]
        found.append({**text.about, "windows": windows, "rows": rows})
        for i, ids in enumerate(windows_of(tokenizer, text, windows, context + QUERIES)):
            begin = time.perf_counter()
            measure_window(model, ids.to(model.device), schemes, rows)
            tell(f"{text.name}: window {i + 1} of {windows}, {time.perf_counter() - begin:.1f} s")
            yield found


@torch.inference_mode()
def measure_constructed(schemes: Sequence[Scheme]) -> list[dict[str, Any]]:
    """Errors of attention on constructed keys and values; budgets, which want a prompt's queries, are left out."""
    found = []
    for name, recording in constructed().items():
        rows = []
        for scheme in schemes:
            if not scheme.wants_prompt_queries:
                quantized = scheme.apply(recording)
                error = attention_error(recording, quantized)
                rows.append({"name": scheme.name, "family": scheme.family, "bits": quantized.bits, "error": error})
        found.append({"name": name, "tokens": recording.k.shape[2], "head_dim": recording.k.shape[3], "rows": rows})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told = "; default: %(default)s"
    parser.add_argument("model", type=Path, nargs="?", help="a directory; reads each --text")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE|python", help="may be given again")
    parser.add_argument("--windows", type=int, default=4, help="of each text" + told)
    parser.add_argument("--context", type=int, default=1984, help=f"tokens of each; a multiple of {PAGE_TOKENS}{told}")
    parser.add_argument("--schemes", default="default", help="comma-separated; `default`: all without a budget" + told)
    parser.add_argument(
        "--first-page",
        default="cache",
        help="format of kvpack's first page, but of a budget's; `cache`: as KVCache has it; `same`: as the others"
        + told,
    )
    parser.add_argument("--constructed", action="store_true", help="keys and values that are made; needs no model")
    parser.add_argument("--device", default="cpu", help="of torch" + told)
    parser.add_argument("--json", type=Path, help="written anew after each window; default: none")
    parser.add_argument("--plot", type=Path, help="a PNG: KL over bits; default: none")
    options = parser.parse_args()
    directory: Path | None = options.model
    if bool(directory) != bool(options.text) or not (directory or options.constructed):
        parser.error("a model and a --text for it to read are needed, or --constructed")
    if options.windows < 1 or options.context < LEAST_TOKENS or options.context % PAGE_TOKENS:
        parser.error(f"--windows is at least 1, --context a multiple of {PAGE_TOKENS}, at least {LEAST_TOKENS}")
    if options.plot and not options.text:
        parser.error("--plot draws KL, which takes a model and a --text")
    try:
        named: dict[str, FirstPage] = {"cache": "cache", "same": None}
        first_page = named[options.first_page] if options.first_page in named else page_format(options.first_page)
        schemes = parse_schemes(options.schemes.split(","), first_page)
        texts = [read_text(argument) for argument in options.text]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    require_inputs(parser, directory)
    require_plotting(parser, options.plot)
    first_formats = {one.name for s in schemes if isinstance(s, SideBySide) for one in s.first_formats}
    result: dict[str, Any] = {
        "what": "kv-quantizers",
        **provenance({"MODEL": directory}, ("torch", "transformers")),
        "device": device_record(torch.device(options.device)),
        "model": directory.resolve().name if directory else None,
        "context": options.context,
        "queries": QUERIES,
        "first_page": options.first_page,
        "first_page_formats": sorted(first_formats),
        "texts": [],
        "constructed": measure_constructed(schemes) if options.constructed else [],
        "complete": True,
        "stopped": None,
    }
    if directory is not None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(directory)
        try:
            for text in texts:
                list(windows_of(tokenizer, text, options.windows, options.context + QUERIES))
        except SystemExit as error:
            parser.error(str(error))
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().to(options.device)
        most = getattr(model.config, "max_position_embeddings", None)
        if most is not None and options.context + QUERIES > most:
            parser.error(f"--context and {QUERIES} queries are more than the model's {most} positions")
        all_windows = options.windows * len(texts)
        found = measure(
            model,
            tokenizer,
            texts,
            schemes,
            windows=options.windows,
            context=options.context,
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )
        for done, result["texts"] in enumerate(found, 1):
            result["complete"] = done == all_windows
            result["stopped"] = None if result["complete"] else f"{done} of {all_windows} windows"
            if options.json:
                write_result(options.json, result, quiet=True)
    if options.json:
        write_result(options.json, result)
    for table in tables(result).values():
        print_table(table.headings, table.rows, table.title)
    if result["texts"]:
        print(f"\n{verdicts(result)}")
    if options.plot:
        from kvpack.bench.plot import plot_kv_quantizers

        plot_kv_quantizers(result, options.plot)


if __name__ == "__main__":
    main()
