"""``kvpack moments``: a causal language model reads a text, and the moments of what its linears get are kept.

What it reads is of :mod:`kvpack.integrations.transformers.calibration_text`, how the run goes of
:mod:`kvpack.integrations.transformers.calibration_run`; the file is described in :mod:`kvpack.encode.moments`.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from kvpack._version import __version__
from kvpack.encode.progress import Progress
from kvpack.errors import DeviceError
from kvpack.integrations.transformers.calibration_inputs import check_moments_run
from kvpack.integrations.transformers.calibration_output import Checkpoint, checkpoint_shapes, write_moments
from kvpack.integrations.transformers.calibration_run import Windows, plan_run
from kvpack.integrations.transformers.calibration_text import (
    DEFAULT_TOKENS,
    CalibrationText,
    own_text,
    read_text,
    window_tokens,
)
from kvpack.integrations.transformers.calibration_work import WorkDirectory
from kvpack.integrations.transformers.causal_models import (
    check_directory,
    chosen_device,
    load_causal_model,
    peak_memory_bytes,
)
from kvpack.integrations.transformers.contexts import model_fingerprint
from kvpack.integrations.transformers.own_samples import ROWS, any_tokens, write_windows


@dataclass(frozen=True)
class CalibrationReport:
    """What :func:`calibrate` did.

    Attributes:
        tensors: how many tensors of the checkpoint have moments.
        matrices: how many second moments the file has.
        tokens: that were read.
        asked_tokens: how many were asked for.
        untouched: matrices of experts that met no token.
        left_out: tensor of the model → why it has no moments.
        whole_model: why the whole model was on the device; None: the layer in hand alone was.
        resumed: whether it went on from what an earlier run had left.
        peak_memory_bytes: see :func:`~kvpack.integrations.transformers.causal_models.peak_memory_bytes`.
        seconds: that the run took, without what an earlier one had done.
    """

    output: str
    output_bytes: int
    tensors: int
    matrices: int
    tokens: int
    asked_tokens: int
    windows: int
    window_tokens: int
    untouched: int
    left_out: dict[str, str]
    whole_model: str | None
    resumed: bool
    device: str
    dtype: str
    peak_memory_bytes: int
    seconds: float

    @property
    def note(self) -> str | None:
        """What is to be said where other than the tokens that were asked for were read."""
        if self.tokens < self.asked_tokens:
            return f"{self.tokens} tokens were read, not {self.asked_tokens}: the text has no more whole windows"
        if self.tokens > self.asked_tokens:
            return f"{self.tokens} tokens were read, not {self.asked_tokens}: windows of {self.window_tokens} are whole"
        return None

    def as_dict(self) -> dict[str, Any]:
        """What ``kvpack moments --json`` prints, less when and with what it was made."""
        return {"ok": True, **asdict(self)}


def calibrate(
    directory: Path,
    text: Path | None,
    output: Path,
    *,
    tokens: int = DEFAULT_TOKENS,
    window: int | None = None,
    part: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    sensitivities: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    progress: Progress | None = None,
    option: str | None = "--window",
) -> CalibrationReport:
    """Have a model read a text, and write the moments of what its linears get.

    Args:
        directory: the model, not compressed.
        text: what it reads: text in UTF-8, a ``.jsonl`` file with ``{"text": …}`` a line, or token ids in a ``.npy``,
            ``.safetensors`` or ``.json`` file. None: text of its own, drawn at temperature 1; then the whole model is
            on the device while it writes.
        output: the file to be made. A hidden directory beside it keeps what is finished of a run that was ended.
        tokens: how many it reads, in whole windows; fewer where the text has fewer.
        window: tokens of a window; 2048 by default, or the most that the model has positions for.
        part: of the text's tokens, from and to fractions of it.
        seed: of labels and of text of its own.
        sensitivities: whether gradients are found too.
        device: ``auto``, or a name of torch's.
        dtype: what is computed in; ``auto`` is what the directory names. Second moments are summed in fp32 and fp64.
        force: replace an existing output, which has to be a moments file.
        progress: told tokens, once for each pass through a layer.
        option: what messages call ``window``; None: the caller has no such option.

    Raises:
        InputError: the directory, the text or the output cannot be used.
        NotSupportedError: a weight's inputs are not the same from window to window.
        DeviceError: the device has no room for the whole model where that is needed.

    Example:
        >>> calibrate(Path("Llama"), Path("text.txt"), Path("Llama.moments.safetensors")).tensors  # doctest: +SKIP
        225
    """
    progress, start = progress or Progress(), time.perf_counter()
    check_moments_run(directory, text, output, part, force=force)
    check_directory(directory)
    shapes = checkpoint_shapes(directory)
    window = window_tokens(directory, window)
    if text is None:
        calibration = own_text(directory, tokens=tokens, window=window)
    else:
        calibration = read_text(directory, text, tokens=tokens, window=window, part=part, option=option)
    place = chosen_device(device)
    progress.tensor(f"loading {directory.name}")
    model = load_causal_model(directory, device="cpu", dtype=dtype)
    model.requires_grad_(False)
    if getattr(model.config, "_experts_implementation", None) not in (None, "eager"):
        model.set_experts_implementation("eager")  # which takes one expert's matrix after the other
    checkpoint = Checkpoint.of(model, shapes)
    fingerprint = model_fingerprint(model)
    made = {
        **calibration.made,
        "seed": seed,
        "sensitivities": sensitivities,
        "device": place.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": fingerprint.config,
        "weights": fingerprint.weights,
        "kvpack": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
    ids, shape = calibration.ids, calibration.shape
    sample = any_tokens(model, shape[1]) if ids is None else ids
    with _enough_memory(place), _reproducible(place):
        run = plan_run(model, sample, place)
        run.check_room(output, shape[0], sensitivities)
        stages = run.stages(sensitivities)
        progress.total((len(stages) + (ids is None)) * calibration.tokens)
        digest = None if ids is None else hashlib.sha256(ids.numpy().tobytes()).hexdigest()
        with WorkDirectory(output, {**made, "ids": digest, "threads": torch.get_num_threads()}) as work:
            if ids is None:
                progress.tensor("text of its own")
                ids = _own_ids(model, calibration, place, seed, work, progress)
                run.place()
            for stage in stages:
                if work.has(stage):
                    progress.advance(calibration.tokens)
                else:
                    run.do(stage, Windows(ids, seed, work, progress), sensitivities)
            progress.tensor("writing")
            written = write_moments(
                output, directory, model, work, stages, checkpoint, ids, made | {"whole_model": run.whole_model}
            )
            work.delete()
    return CalibrationReport(
        output=str(output),
        output_bytes=written.size_bytes,
        tensors=written.tensors,
        matrices=written.matrices,
        tokens=calibration.tokens,
        asked_tokens=tokens,
        windows=shape[0],
        window_tokens=shape[1],
        untouched=written.untouched,
        left_out=written.left_out,
        whole_model=run.whole_model,
        resumed=work.resumed,
        device=str(place),
        dtype=str(made["dtype"]),
        peak_memory_bytes=peak_memory_bytes(place),
        seconds=time.perf_counter() - start,
    )


@contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """The same sums each time, also of what GPUs add in the order in which it comes."""
    if device.type != "cuda":
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*deterministic.*")  # of what has no other way, as running sums
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@contextmanager
def _enough_memory(device: torch.device) -> Iterator[None]:
    """torch's several lines in one."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        advice = "a shorter --window or --device cpu needs less; text of its own needs the whole model there"
        raise DeviceError(f"{device} has not enough memory ({str(error).splitlines()[0]}): {advice}") from None


def _own_ids(
    model: Any, text: CalibrationText, device: torch.device, seed: int, work: WorkDirectory, progress: Progress
) -> torch.Tensor:
    """Windows that the model writes, i64 [windows, tokens]; those of a run that was ended are taken from there."""
    windows, tokens = text.shape
    found = []
    for first in range(0, windows, ROWS):
        name = f"text-{first // ROWS}"
        rows = min(ROWS, windows - first)
        if work.has(name):
            progress.advance(rows * tokens)
        else:
            model.to(device)
            begins = text.beginnings(range(first, first + rows))
            ids = write_windows(model, begins, tokens, f"{seed} {first}", progress.advance)
            work.save(name, {"ids": ids})
        found.append(work.open(name).get_tensor("ids"))
    return torch.cat(found)
