"""How good is a causal language model on a text: perplexity, and its distance from the original.

The text is cut into windows of equally many tokens that do not overlap; those that are read lie at equal distances over
the whole text. A window's first token is not scored. Where the tokenizer puts a token such as ``<s>`` before a text, it
stands before each window and counts as its first.

A *full forward* reads a window in one pass, so that no cache is read. *Step by step* gives the model a token at a time,
as generation does: each step reads what the cache made of the tokens before.

Each figure is a mean over scored tokens; its standard error is that of the windows' means: their standard deviation
over √windows (none for one window). It says how far the mean would move with other windows of such text.
"""

from __future__ import annotations

import itertools
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kvpack.encode.progress import Progress
from kvpack.encode.report import describe
from kvpack.errors import InputError
from kvpack.format.closing import Closing
from kvpack.integrations.transformers.attention_registration import ATTENTION_NAME
from kvpack.integrations.transformers.cache import KVPackCache, cache_keyword
from kvpack.integrations.transformers.cache_options import CacheOptions
from kvpack.integrations.transformers.causal_models import (
    kv_bytes,
    kv_bytes_16_bit,
    load_causal_model,
    load_config,
    load_tokenizer,
    position_limit,
    weight_memory,
)

DEFAULT_CONTEXT = 512
DEFAULT_WINDOWS = 16
# Logits are taken to fp64 so many at a time.
_CHUNK_BYTES = 1 << 25
# Windows that are read side by side, step by step: a step decodes the weights once for all of them.
_ROWS = 16


@dataclass(frozen=True)
class Mean:
    """A mean over tokens, and the standard error of the windows' means; None for one window."""

    value: float
    standard_error: float | None


@dataclass(frozen=True)
class Quality:
    """What a model made of the windows; nats are of one token.

    Attributes:
        perplexity: exp of the mean loss; its standard error is perplexity times that of the loss.
        loss: −log p of the next token, in nats.
        kl: KL(reference ‖ model) in nats; None without a reference, as the next ones.
        same_top_token: share of tokens at which both give the same token most.
        loss_increase: the model's loss less the reference's, token by token, in nats.
    """

    perplexity: Mean
    loss: Mean
    kl: Mean | None = None
    same_top_token: Mean | None = None
    loss_increase: Mean | None = None


@dataclass(frozen=True)
class TextWindows:
    """Windows of a text.

    Attributes:
        ids: i64 [windows, context].
        available: how many windows the whole text has.
        text_tokens: how many tokens the whole text has.
        begins_with: tokens that the tokenizer puts before a text, and that stand before each window.
    """

    ids: torch.Tensor
    available: int
    text_tokens: int
    begins_with: tuple[int, ...]

    @property
    def scored(self) -> int:
        """Tokens that are scored in each window."""
        return int(self.ids.shape[1]) - max(1, len(self.begins_with))


@dataclass(frozen=True)
class Logits:
    """What a model says at some places: logits [windows, positions, vocabulary] in the type it computes them in.

    Those of position i are of the token at i + 1.
    """

    windows: slice
    positions: slice
    values: torch.Tensor


def text_windows(tokenizer: Any, text: str, *, context: int, windows: int) -> TextWindows:
    """Cut a text into windows of ``context`` tokens, and take at most ``windows`` of them at equal distances.

    Raises:
        InputError: ``context`` leaves no token to score, or the text has fewer tokens than a window.
    """
    prefix = tokens_before_text(tokenizer)
    if windows < 1:
        raise InputError(f"windows is {windows}; at least one is needed")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)
    rows = spread_windows(ids, prefix, context, windows, option="--context")
    return TextWindows(rows, len(ids) // (context - len(prefix)), len(ids), tuple(prefix))


def tokens_before_text(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before a text, as ``<s>``."""
    special = set(tokenizer.all_special_ids)
    return list(itertools.takewhile(special.__contains__, tokenizer("a").input_ids))


def spread_windows(
    ids: torch.Tensor, prefix: list[int], context: int, windows: int, *, option: str | None
) -> torch.Tensor:
    """Windows of a text at equal distances over it, i64 [windows, context].

    Args:
        ids: i64 [tokens] of the text.
        prefix: what stands before each window, as part of it.
        windows: how many at most.
        option: what messages call ``context``; None: who asked has no such option.

    Raises:
        InputError: ``context`` leaves no token to score, or there are fewer tokens than a window has.
    """
    own = context - len(prefix)
    if own < (1 if prefix else 2):
        raise InputError(f"a window of {context} tokens has none to score; {option or 'it'} takes at least 2")
    available = len(ids) // own
    if not available:
        most = len(ids) + len(prefix)
        advice = "a longer text is needed" + (f", or {option} of at most {most}" if option and most >= 2 else "")
        raise InputError(f"the text has {len(ids)} tokens, fewer than one window of {own}: {advice}")
    taken = min(windows, available)
    chosen = [i * available // taken for i in range(taken)]
    rows = torch.stack([ids[i * own : (i + 1) * own] for i in chosen])
    return torch.cat((torch.tensor(prefix, dtype=torch.int64).expand(taken, -1), rows), 1)


def full_forward(model: Any, windows: TextWindows) -> Iterator[Logits]:
    """Each window in one pass, without a cache."""
    length = windows.ids.shape[1]
    first = length - windows.scored - 1
    for index, ids in enumerate(windows.ids):
        with torch.inference_mode():
            logits = model(input_ids=ids[None].to(model.device), use_cache=False).logits
        yield Logits(slice(index, index + 1), slice(first, length - 1), logits[:, first:-1])


def step_by_step(model: Any, windows: TextWindows, new_cache: Callable[[], Any]) -> Iterator[Logits]:
    """A token at a time through a cache; 16 windows side by side.

    Args:
        new_cache: makes an empty cache of transformers, which is called for each 16 windows.
    """
    keyword = cache_keyword(model)
    length = windows.ids.shape[1]
    first = length - windows.scored - 1
    for begin in range(0, len(windows.ids), _ROWS):
        ids = windows.ids[begin : begin + _ROWS].to(model.device)
        cache = new_cache()
        for position in range(length - 1):
            with torch.inference_mode():
                given = {"input_ids": ids[:, position : position + 1], keyword: cache, "use_cache": True}
                logits = model(**given).logits
            if position >= first:
                yield Logits(slice(begin, begin + len(ids)), slice(position, position + 1), logits)


class ReferenceLogits(Closing):
    """A model's logits of all windows, in a temporary file that is mapped: memory holds one model at a time.

    Closing removes the file.

    Raises:
        InputError: the file system of temporary files has not so much room.
    """

    def __init__(self, windows: TextWindows) -> None:
        self.windows = windows
        self._first = windows.ids.shape[1] - windows.scored - 1
        self._folder = tempfile.TemporaryDirectory(prefix="kvpack-eval-")
        self._logits: torch.Tensor | None = None

    def close(self) -> None:
        self._logits = None
        self._folder.cleanup()

    def _new(self, like: torch.Tensor) -> torch.Tensor:
        shape = (len(self.windows.ids), self.windows.scored, like.shape[-1])
        size = math.prod(shape) * like.element_size()
        free = shutil.disk_usage(self._folder.name).free
        if size > free:
            advice = "fewer --windows, a shorter --context or another TMPDIR help"
            raise InputError(
                f"the original's logits take {size / 1e9:.2f} GB in {self._folder.name}, which has {free / 1e9:.2f} GB "
                f"free: {advice}"
            )
        file = str(Path(self._folder.name) / "logits")
        return torch.from_file(file, shared=True, size=math.prod(shape), dtype=like.dtype).view(shape)

    def keep(self, found: Iterable[Logits]) -> Iterator[Logits]:
        """Hands everything on and keeps it."""
        for logits in found:
            if self._logits is None:
                self._logits = self._new(logits.values)
            self._logits[logits.windows, self._shifted(logits.positions)] = logits.values.cpu()
            yield logits

    def _shifted(self, positions: slice) -> slice:
        return slice(positions.start - self._first, positions.stop - self._first)

    def at(self, logits: Logits) -> torch.Tensor:
        """The reference at the places of these, on the CPU.

        Raises:
            InputError: it has another vocabulary.
        """
        assert self._logits is not None, "nothing has been kept"
        if self._logits.shape[-1] != logits.values.shape[-1]:
            raise InputError(
                f"the model has logits of {logits.values.shape[-1]} tokens, the original of {self._logits.shape[-1]}: "
                "they cannot be compared"
            )
        return self._logits[logits.windows, self._shifted(logits.positions)]


def measure(found: Iterable[Logits], windows: TextWindows, reference: ReferenceLogits | None = None) -> Quality:
    """Perplexity, and the distance from a reference, of the logits of all windows. All sums are in fp64.

    Raises:
        InputError: logits that are not finite.
    """
    count = len(windows.ids)
    sums = torch.zeros((4, count), dtype=torch.float64)  # loss, KL, same top token, loss less the reference's
    for logits in found:
        following = windows.ids[logits.windows, logits.positions.start + 1 : logits.positions.stop + 1]
        compared = None if reference is None else reference.at(logits)
        rows, positions, vocabulary = logits.values.shape
        step = max(1, _CHUNK_BYTES // (8 * vocabulary))
        of_rows = torch.arange(logits.windows.start, logits.windows.stop).repeat_interleave(positions)
        flat, targets = logits.values.flatten(0, 1), following.flatten()
        flat_reference = None if compared is None else compared.flatten(0, 1)
        for begin in range(0, rows * positions, step):
            part = slice(begin, begin + step)
            other = None if flat_reference is None else flat_reference[part].to(flat.device)
            sums.index_add_(1, of_rows[part], _scores(flat[part], targets[part].to(flat.device), other).cpu())
    if not sums.isfinite().all():
        window = int((~sums.isfinite()).any(0).nonzero()[0])
        advice = "another --dtype may help, or the weights are at fault"
        raise InputError(f"the model's logits of window {window} are not finite: {advice}")
    loss, kl, same, increase = (_mean(row / windows.scored) for row in sums)
    perplexity = math.exp(loss.value)
    error = None if loss.standard_error is None else perplexity * loss.standard_error
    if reference is None:
        return Quality(Mean(perplexity, error), loss)
    return Quality(Mean(perplexity, error), loss, kl, same, increase)


def _scores(logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None) -> torch.Tensor:
    """fp64 [4, tokens]: loss, KL, same top token, loss less the reference's."""
    ours = logits.double().log_softmax(-1)
    loss = -ours.gather(-1, targets[:, None])[:, 0]
    if reference is None:
        return torch.stack((loss, *[torch.zeros_like(loss)] * 3))
    theirs = reference.double().log_softmax(-1)
    share = theirs.exp()
    kl = torch.where(share > 0, share * (theirs - ours), 0).sum(-1)
    same = (logits.argmax(-1) == reference.argmax(-1)).double()
    return torch.stack((loss, kl, same, loss + theirs.gather(-1, targets[:, None])[:, 0]))


def _mean(of_windows: torch.Tensor) -> Mean:
    count = len(of_windows)
    error = None if count < 2 else float(of_windows.std(correction=1)) / math.sqrt(count)
    return Mean(float(of_windows.mean()), error)


@dataclass(frozen=True)
class Size:
    """What a directory's weights take on disk; None where they are not safetensors.

    Attributes:
        bytes: of all its safetensors files.
        bits_per_weight: 8 × bytes over the number of weights, coded or not.
        coded_bits_per_weight: of the coded tensors alone; None where none is.
    """

    bytes: int | None
    bits_per_weight: float | None
    coded_bits_per_weight: float | None


def directory_size(directory: Path) -> Size:
    """What a model directory's weights take on disk."""
    try:
        found = describe(directory)
    except InputError:
        return Size(None, None, None)
    weights = sum(math.prod(tensor["shape"]) for tensor in found["tensors"])
    size = found["output_bytes"]
    return Size(size, 8 * size / weights if weights else None, found["bits_per_weight"])


@dataclass(frozen=True)
class ModelReport:
    """What was measured of one directory.

    Attributes:
        weights_bytes: what the weights take in memory.
        full: of full forwards.
        stepwise: step by step through the cache; None where no cache was asked for.
        kv_bits: bits an element of the cache at the end of its windows, everything counted; in short windows most is in
            the recent tokens' pages of 16 bits.
    """

    model: str
    size: Size
    weights_bytes: int
    dtype: str
    full: Quality
    stepwise: Quality | None = None
    kv_bits: float | None = None


@dataclass(frozen=True)
class Report:
    """What :func:`evaluate` found.

    Attributes:
        windows: how many were read, of ``windows_available``.
        scored_tokens: of all windows together.
        original: the original's own figures, where one was given.
    """

    text: str
    context: int
    windows: int
    windows_available: int
    scored_tokens: int
    begins_with: tuple[int, ...]
    device: str
    models: tuple[ModelReport, ...]
    original: ModelReport | None = None

    def as_dict(self) -> dict[str, Any]:
        """What ``kvpack eval --json`` prints, less when and with what it was measured."""
        return {"ok": True, **asdict(self)}


def evaluate(
    models: Sequence[Path],
    text: Path,
    *,
    against: Path | None = None,
    context: int | None = None,
    windows: int = DEFAULT_WINDOWS,
    cache: CacheOptions | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> Report:
    """Measure model directories on a text, one after the other.

    The original's logits are kept in a temporary file in the meantime (:class:`ReferenceLogits`).

    Args:
        text: a file in UTF-8.
        against: the original that the models are compared with.
        context: tokens of a window; 512 by default, or the most that all models have positions for.
        windows: how many windows are read, fewer if the text has fewer.
        cache: read the windows step by step through such caches too.
        progress: told tokens: all of them, and those that have been read.

    Raises:
        InputError: a directory or the text cannot be used, or the models have different vocabularies.
        FormatError: a directory is compressed, and damaged.

    Example:
        >>> report = evaluate([Path("Llama-kvpack")], Path("text.txt"), against=Path("Llama"))  # doctest: +SKIP
        >>> report.models[0].full.kl  # doctest: +SKIP
        Mean(value=0.0153, standard_error=0.0004)
    """
    progress = progress or Progress()
    attention = None if cache is None else ATTENTION_NAME
    directories = [*models] if against is None else [against, *models]
    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{text} is not UTF-8 text ({error})") from None
    chosen = _common_windows(directories, content, context, windows)
    passes = len(directories) + (0 if cache is None else len(models))
    progress.total(passes * chosen.ids.numel())
    reports: list[ModelReport] = []
    with ExitStack() as stack:
        reference: ReferenceLogits | None = None
        for index, directory in enumerate(directories):
            progress.tensor(f"loading {directory.name}")
            model = load_causal_model(directory, device=device, dtype=dtype, attention=attention)
            progress.tensor(directory.name)
            found = _counted(full_forward(model, chosen), progress, chosen)
            if index == 0 and against is not None:
                reference = stack.enter_context(ReferenceLogits(chosen))
                quality = measure(reference.keep(found), chosen)
            else:
                quality = measure(found, chosen, reference)
            stepwise = kv_bits = None
            if cache is not None and (index or against is None):
                progress.tensor(f"{directory.name} step by step")
                caches = _Caches(cache, model)
                stepwise = measure(
                    _counted(step_by_step(model, chosen, caches.new), progress, chosen), chosen, reference
                )
                kv_bits = caches.average_bits()
            reports.append(
                ModelReport(
                    str(directory),
                    directory_size(directory),
                    weight_memory(model).bytes,
                    str(model.dtype).removeprefix("torch."),
                    quality,
                    stepwise,
                    kv_bits,
                )
            )
            place = str(model.device)
            del model
    return Report(
        text=str(text),
        context=int(chosen.ids.shape[1]),
        windows=len(chosen.ids),
        windows_available=chosen.available,
        scored_tokens=len(chosen.ids) * chosen.scored,
        begins_with=chosen.begins_with,
        device=place,
        models=tuple(reports if against is None else reports[1:]),
        original=None if against is None else reports[0],
    )


class _Caches:
    """The caches of one model's windows, and what they hold at the end."""

    def __init__(self, options: CacheOptions, model: Any) -> None:
        self._options, self._model = options, model
        self._last: KVPackCache | None = None
        self._bytes = self._bytes_16_bit = 0

    def new(self) -> KVPackCache:
        self._count()
        self._last = self._options.new(self._model)
        return self._last

    def _count(self) -> None:
        if self._last is not None:
            self._bytes += kv_bytes(self._last)
            self._bytes_16_bit += kv_bytes_16_bit(self._last)
        self._last = None

    def average_bits(self) -> float:
        self._count()
        return 16 * self._bytes / self._bytes_16_bit


def _common_windows(directories: Sequence[Path], content: str, context: int | None, windows: int) -> TextWindows:
    """Windows that all of these models can read, in the tokens that all of them have.

    Raises:
        InputError: there are none, or the tokens of two models differ.
    """
    limits = {directory: position_limit(load_config(directory)) for directory in directories}
    least = min((limit for limit in limits.values() if limit is not None), default=None)
    if context is None:
        context = DEFAULT_CONTEXT if least is None else min(DEFAULT_CONTEXT, least)
    for directory, limit in limits.items():
        if limit is not None and context > limit:
            raise InputError(f"--context is {context}, but {directory} has positions for {limit} tokens")
    first, *others = directories
    tokenizer = load_tokenizer(first)
    chosen = text_windows(tokenizer, content, context=context, windows=windows)
    vocabulary = tokenizer.get_vocab()
    for directory in others:
        other = load_tokenizer(directory)
        same = other.get_vocab() == vocabulary
        if not same or not torch.equal(text_windows(other, content, context=context, windows=windows).ids, chosen.ids):
            what = "another way to cut a text into tokens" if same else "another vocabulary"
            raise InputError(f"{directory} has {what} than {first}: figures of one token cannot be compared")
    return chosen


def _counted(found: Iterable[Logits], progress: Progress, windows: TextWindows) -> Iterator[Logits]:
    """Tells of tokens that have been read, also of those that are not scored."""
    length = windows.ids.shape[1]
    for logits in found:
        yield logits
        places = logits.positions
        begin = 0 if places.start == length - windows.scored - 1 else places.start
        end = length if places.stop == length - 1 else places.stop
        progress.advance((logits.windows.stop - logits.windows.start) * (end - begin))
