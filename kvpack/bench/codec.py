"""``kvpack bench codec``: how fast the CPU coder is. Gaussian integers, hence no claim about ratios."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from kvpack._version import __version__
from kvpack.encode.blob_decoder import decode_elements
from kvpack.encode.blob_encoder import encode_elements
from kvpack.encode.threads import default_threads
from kvpack.format.blob import Blob
from kvpack.format.layout import LAYOUT_NAMES, ElementKind, integer_layout

ROWS, COLS, SIGMA = 2048, 5632, 30
_REPEATS = 9


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _best_seconds(work: Callable[[], object]) -> float:
    """Minimum of several runs: the machine's other load only ever adds."""
    best = float("inf")
    for _ in range(_REPEATS):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best


def bench_codec(threads: int | None = None) -> dict[str, Any]:
    """Time encode and decode of a 2048 × 5632 INT8 tensor, on one thread and on ``threads`` (all cores)."""
    rng = np.random.default_rng(0)
    values = np.clip(np.rint(rng.normal(0, SIGMA, (ROWS, COLS))), -128, 127)
    elements = (values + 128).astype(np.uint8)
    rows = []
    for number in sorted({1, threads or default_threads()}):
        with ThreadPoolExecutor(number) as executor:
            for name in LAYOUT_NAMES:
                layout = integer_layout(name, ElementKind.SIGNED, 8)
                data = encode_elements(elements, layout, executor=executor)
                blob = Blob(data)
                out = decode_elements(blob, executor=executor)
                if not np.array_equal(out[0], elements):
                    raise AssertionError(f"{name}: decoded elements differ")
                encode = _best_seconds(
                    lambda layout=layout, executor=executor: encode_elements(  # type: ignore[misc]
                        elements, layout, executor=executor
                    )
                )
                decode = _best_seconds(
                    lambda blob=blob, executor=executor, out=out: decode_elements(  # type: ignore[misc]
                        blob, executor=executor, out=out
                    )
                )
                rows.append(
                    {
                        "layout": name,
                        "threads": number,
                        "bits_per_weight": 8 * len(data) / elements.size,
                        "encode_ms": 1e3 * encode,
                        "encode_mweights_per_s": elements.size / encode / 1e6,
                        "decode_ms": 1e3 * decode,
                        "decode_mweights_per_s": elements.size / decode / 1e6,
                    }
                )
    return {"version": __version__, "cpu": cpu_name(), "shape": [ROWS, COLS], "rows": rows}
