"""What checking all CRCs adds to loading a file that the system has cached.

    python benchmarks/load_checks.py MODEL.kvpack.safetensors --device cpu
    python benchmarks/load_checks.py MODEL.kvpack.safetensors --device cuda \\
        --json benchmarks/results/DATE-load-checks.json

Loads the file or directory --repeats times with ``verify=True`` (the default of ``kvpack.load``) and with
``verify=False``, by turns, and gives the medians. The first load of each is not counted: it brings the file into the
system's cache and compiles what is to be compiled.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from bench_common import device_record, print_table, provenance, synchronize, write_result

import kvpack


def load_seconds(path: Path, device: str, verify: bool) -> float:
    begin = time.perf_counter()
    state = kvpack.load(path, device, verify=verify, progress=False)
    synchronize(torch.device(device))
    seconds = time.perf_counter() - begin
    del state
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    files = [options.path] if options.path.is_file() else sorted(options.path.glob("*.safetensors"))
    size_bytes = sum(file.stat().st_size for file in files)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for repeat in range(options.repeats + 1):
        for verify in (True, False):
            measured = load_seconds(options.path, options.device, verify)
            if repeat:
                seconds[verify].append(measured)
    medians = {verify: statistics.median(values) for verify, values in seconds.items()}
    rows = [
        (f"verify={verify}", f"{1000 * median:.1f}", f"{size_bytes / median / 1e9:.2f}")
        for verify, median in medians.items()
    ]
    print_table(("", "load (ms)", "GB/s"), rows)
    if options.json:
        write_result(
            options.json,
            {
                **provenance({"MODEL": options.path}),
                "device": device_record(torch.device(options.device)),
                "size_bytes": size_bytes,
                "verified_seconds": seconds[True],
                "unverified_seconds": seconds[False],
            },
        )


if __name__ == "__main__":
    main()
