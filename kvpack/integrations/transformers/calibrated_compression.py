"""``kvpack compress --calibrate``: moments of a model, a compression with them, and a check on tokens held back.

Steps by sensitivity rest on a second-order guess of the damage. So the same model is coded with equal rates, too, both
read tokens that the moments are not of, and the one with the less KL is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from kvpack.compression import coder_of, compress
from kvpack.encode.compress import CompressReport, default_output
from kvpack.encode.model_directory import directory_in_place
from kvpack.encode.progress import Progress
from kvpack.encode.quant_config import QuantConfig
from kvpack.format.temporary_files import hidden_directory
from kvpack.integrations.transformers.calibration import calibrate
from kvpack.integrations.transformers.calibration_inputs import check_calibrated_compression
from kvpack.integrations.transformers.calibration_text import DEFAULT_TOKENS, own_text, read_text, window_tokens
from kvpack.integrations.transformers.causal_models import load_causal_model
from kvpack.integrations.transformers.evaluation import Mean, ReferenceLogits, TextWindows, full_forward, measure
from kvpack.integrations.transformers.own_samples import write_windows

# Of a text, the part that is held back; and how much of it is read.
_HELD_OUT = 1 / 8
_HELD_OUT_WINDOWS = 16
_HELD_OUT_WINDOW_TOKENS = 512

Stage = Callable[[str, Literal["bytes", "tokens"]], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class CalibratedReport:
    """What a calibrated compression gave.

    Attributes:
        compression: of the output that was kept; its ``seconds`` are those of all: moments, codings and the check.
        allocation: of these the one that was kept.
        held_out_kl: allocation → KL(original ‖ coded) in nats a token, over tokens that the moments are not of.
        held_out_tokens: how many tokens were scored.
        calibration_tokens: how many the moments are of.
    """

    compression: CompressReport
    allocation: str
    held_out_kl: dict[str, Mean]
    held_out_tokens: int
    calibration_tokens: int

    def as_dict(self) -> dict[str, Any]:
        """What ``kvpack compress --calibrate --json`` prints."""
        found = {key: value for key, value in asdict(self).items() if key != "compression"}
        return {**self.compression.as_dict(), "calibration": found}


def compress_calibrated(
    directory: Path,
    out: Path | None = None,
    config: QuantConfig | None = None,
    *,
    text: Path | None = None,
    tokens: int = DEFAULT_TOKENS,
    window: int | None = None,
    part: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    coding_device: str = "cpu",
    force: bool = False,
    stage: Stage | None = None,
) -> CalibratedReport:
    """Compress a model directory by what the model does on a text.

    The moments lie in a hidden directory beside the output meanwhile. ``kvpack moments`` and ``compress --moments`` do
    the same in two steps that may be a day apart, and of which the first goes on where it was ended.

    Args:
        directory: the model, not compressed, as transformers loads it.
        out: the output; by default ``NAME-kvpack`` beside it.
        config: options with a rate. An allocation other than ``auto`` is taken as it is, and nothing is compared.
        text: see :func:`.calibration.calibrate`; None: text of the model's own. Its last eighth is held back.
        tokens, window, part, seed, device: as there.
        coding_device: where weights are coded, see :func:`kvpack.compress`.
        force: replace an existing output.
        stage: makes the progress of each part of the work from its title and unit.

    Raises:
        InputError: the directory, the text, the options or the output cannot be used.
        DeviceError: a device is not there, or something that it needs is not installed.
        FormatError: the input is damaged.
        OSError: reading or writing failed; an output that was there before is still there, or the new one is.
    """
    start = time.perf_counter()
    config = QuantConfig() if config is None else config
    begin, end = part
    check_calibrated_compression(directory, out, config, text, part, force=force)
    target = default_output(directory) if out is None else out
    coder_of(coding_device)  # before anything long
    begun = stage or (lambda *_: nullcontext(Progress()))
    held_out = end - (end - begin) * _HELD_OUT if text is not None else end
    length = min(_HELD_OUT_WINDOW_TOKENS, window_tokens(directory, window))
    windows = None
    if text is not None:  # before anything long: whether the text is long enough
        held_back = (held_out, end)
        rest = read_text(directory, text, tokens=_HELD_OUT_WINDOWS * length, window=length, part=held_back, option=None)
        assert rest.ids is not None
        windows = TextWindows(rest.ids, len(rest.ids), rest.tokens, tuple(rest.made["begins_with"]))
    with hidden_directory(target) as hidden:
        moments = hidden / "moments.safetensors"
        with begun("moments", "tokens") as progress:
            run = calibrate(
                directory,
                text,
                moments,
                tokens=tokens,
                window=window,
                part=(begin, held_out),
                seed=seed,
                device=device,
                progress=progress,
                option=None,
            )
        allocations = ["sensitivity", "tensor"]
        if config.allocation != "auto":
            allocations = [config.allocation]
        elif config.stack:
            allocations = ["tensor"]
        reports: dict[str, CompressReport] = {}
        for allocation in allocations:
            with begun("compress", "bytes") as progress:
                reports[allocation] = compress(
                    directory,
                    hidden / allocation,
                    replace(config, allocation=allocation),
                    threads=threads,
                    progress=progress,
                    device=coding_device,
                    moments=moments,
                )
        with begun("held-out tokens", "tokens") as progress:
            if windows is None:
                windows = _own_windows(directory, length, seed, device)
            coded = {allocation: hidden / allocation for allocation in allocations}
            kl = _held_out_kl(directory, coded, windows, device, progress)
        kept = min(allocations, key=lambda allocation: kl[allocation].value)
        with directory_in_place(target) as temporary:
            for path in coded[kept].iterdir():
                path.rename(temporary / path.name)
    notes = [*reports[kept].notes, *([run.note] if run.note else [])]
    report = replace(reports[kept], output=str(target), notes=notes, seconds=time.perf_counter() - start)
    return CalibratedReport(report, kept, kl, len(windows.ids) * windows.scored, run.tokens)


def _own_windows(directory: Path, length: int, seed: int, device: str) -> TextWindows:
    """Windows that the model writes, other ones than those that the moments are of."""
    text = own_text(directory, tokens=_HELD_OUT_WINDOWS * length, window=length)
    model = load_causal_model(directory, device=device)
    with torch.inference_mode():
        ids = write_windows(model, text.beginnings(range(text.shape[0])), length, f"held out {seed}", lambda _: None)
    return TextWindows(ids, len(ids), ids.numel(), ())


def _held_out_kl(
    directory: Path, coded: dict[str, Path], windows: TextWindows, device: str, progress: Progress
) -> dict[str, Mean]:
    """KL(original ‖ coded) of each."""
    progress.total((1 + len(coded)) * windows.ids.numel())
    found: dict[str, Mean] = {}
    with ReferenceLogits(windows) as reference:
        for name, path in [("the original", directory), *coded.items()]:
            progress.tensor(name)
            model = load_causal_model(path, device=device)
            logits = full_forward(model, windows)
            if path == directory:
                measure(reference.keep(logits), windows)
            else:
                kl = measure(logits, windows, reference).kl
                assert kl is not None
                found[name] = kl
            progress.advance(windows.ids.numel())
            del model
    return found
