"""A checkpoint compressed by tasks of Ray, a part each, on a file system that all of its machines see.

    python examples/compress_ray.py /models/Llama /models/Llama-kvpack --parts 8 --cpus 16 --bits 4.25

A task whose machine is lost is run again by Ray, and goes on with the files that it has not finished.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ray

import kvpack


def compress_part(
    source: Path, output: Path, part: int, parts: int, threads: int, bits: float
) -> kvpack.CompressReport:
    """One part, from 1; the one that ends last completes the output, and its report is of the whole."""
    return kvpack.compress(source, output, bits=bits, shards=(part, parts), threads=threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--parts", type=int, default=8)
    parser.add_argument("--cpus", type=int, default=1, help="of each part")
    parser.add_argument("--bits", type=float, default=4.25)
    options = parser.parse_args()
    ray.init()
    task = ray.remote(num_cpus=options.cpus, max_retries=3)(compress_part)
    paths = options.source.resolve(), options.output.resolve()  # tasks have other working directories
    waiting = [
        task.remote(*paths, part, options.parts, options.cpus, options.bits) for part in range(1, options.parts + 1)
    ]
    while waiting:
        (ready,), waiting = ray.wait(waiting)
        report = ray.get(ready)
        print(f"part {report.part.number}/{report.part.of}: {len(report.part.files)} files, {report.seconds:.1f} s")
        if report.output is not None:
            print(f"{report.input_bytes} bytes → {report.output_bytes} bytes, {report.output}")


if __name__ == "__main__":
    main()
