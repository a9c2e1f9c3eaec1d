"""Rate, noise and overhead of the weight codec on all-MiniLM-L6-v2 (fp32): which idea gives what.

    python benchmarks/minilm_rate.py "$KVPACK_MINILM" \\
        --json benchmarks/results/DATE-minilm-rate.json --plot minilm-rate.png

Noise is always the size-weighted mean of the coded tensors' relative noise Σ(w − ŵ)²/Σw², in dB, measured here from
what the file gives back; bits are all bytes of the coded tensors, scales included. The coded tensors are those that
``compress`` codes by default. Four parts:

rates    presets and rates, beside fixed-width INT4 and EntroPack's published figures for these weights (in bf16)
layouts  the same integers in every layout: bound H (order-0 entropy, each tensor its own), bits stored, and where
         they go. The step is rms·7/2^n for n-bit elements; what lies beyond is clipped, so that nothing is an outlier
ideas    rounding for rate, least-squares scale, allocation: noise at equal bits with each switched off
tiles    noise at one rate for tiles of 128 to 512 columns, and frequency tables packed or plain
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from bench_common import (
    MeanNoise,
    environment_path,
    group_quantized,
    print_table,
    provenance,
    relative_noise,
    write_result,
)

import kvpack
from kvpack.encode.blob_decoder import decode_integers
from kvpack.encode.blob_encoder import encode_elements
from kvpack.encode.dtypes import as_float32
from kvpack.encode.frequencies import entropy_bits
from kvpack.encode.rate import LAMBDA, RatePlan, candidate_layouts, plan_for_bits
from kvpack.encode.tensor_encoder import EncodedTensor, Matrices, encode_plan, measure
from kvpack.encode.threads import default_threads
from kvpack.format.blob import Blob, lane_table_bytes, raw_plane_bytes
from kvpack.format.container import Container
from kvpack.format.header import HEADER_BYTES, TILE_METADATA_BYTES
from kvpack.format.layout import NUM_SYMBOLS, ElementKind, TileMode, integer_layout

RATES = (5.7, 4.303, 4.25, 4.035, 3.535, 3.035, 3.0, 2.026)
# EntroPack 0.1.5 (E8 lattice + rANS, everything counted) on the same weights rounded to bf16.
ENTROPACK_DB = {4.303: -23.67, 4.035: -22.42, 3.535: -19.46, 3.035: -16.47, 2.026: -10.47}
LAYOUT_WIDTHS = (7, 5, 4, 3)
IDEA_RATES = (4.25, 3.0, 2.026)
TILE_COLS = (128, 256, 512, None)
TILE_RATE = 4.25

Weights = dict[str, "np.ndarray[Any, np.dtype[np.float32]]"]


def coded_weights(model: Path) -> Weights:
    """What compress codes by default, as f32."""
    report = kvpack.compress(model, config=kvpack.QuantConfig(preset="near-lossless"), dry_run=True)
    names = [tensor.name for tensor in report.tensors if tensor.method != "keep"]
    with kvpack.open(model) as reader:
        return {name: as_float32(reader.stored(name)).copy() for name in names}


def compressed(model: Path, weights: Weights, **options: Any) -> dict[str, Any]:
    """Compress to a file, read it back, and measure."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "coded.safetensors"
        report = kvpack.compress(model, out, kvpack.QuantConfig(**options))
        tensors = {tensor.name: tensor for tensor in report.tensors if tensor.name in weights}
        noise = MeanNoise()
        error_energy, energy = 0.0, 0.0
        tables = {"number": 0, "bytes": 0, "plain_bytes": 0}
        with kvpack.open(out) as reader:
            for name, original in weights.items():
                relative = relative_noise(original, reader.dequantize(name))
                noise.add(relative, original.size)
                own_energy = float(np.square(original, dtype=np.float64).sum())
                energy += own_energy
                error_energy += relative * own_energy
                info = reader.info(name)
                if info is not None:
                    tables["number"] += info.header.num_tables
                    tables["bytes"] += info.header.table_bytes
                    tables["plain_bytes"] += 2 * NUM_SYMBOLS * info.header.num_tables
        with Container(out) as container:
            stored = sum(
                container.tensors[name + suffix].size_bytes
                for name in weights
                for suffix in ("", "_kvpack", "_kvpack_scale")
                if name + suffix in container.tensors
            )
    total = sum(original.size for original in weights.values())
    coded = [tensor for tensor in tensors.values() if tensor.entropy_bits is not None]
    coded_size = sum(math.prod(tensor.shape) for tensor in coded)
    return {
        "bits": 8 * stored / total,
        "entropy_bits": sum(float(t.entropy_bits or 0) * math.prod(t.shape) for t in coded) / coded_size,
        "noise_db": noise.db,
        "total_noise_db": 10 * math.log10(error_energy / energy),
        "reported_noise_db": report.noise_db,
        "outliers": sum(tensor.outliers for tensor in coded),
        "not_coded": [tensor.name for tensor in tensors.values() if tensor.method == "keep"],
        "layouts": sorted({str(tensor.layout) for tensor in coded}),
        "seconds": report.seconds,
        "tables": tables,
    }


def rate_rows(model: Path, weights: Weights) -> list[dict[str, Any]]:
    rows = [{"setting": "near-lossless", **compressed(model, weights, preset="near-lossless")}]
    rows.extend(
        {
            "setting": f"bits {bits:g}",
            **compressed(model, weights, bits=bits),
            "entropack_noise_db": ENTROPACK_DB.get(bits),
        }
        for bits in RATES
    )
    for bits in (4, 3):
        noise, used = MeanNoise(), 0.0
        for original in weights.values():
            values, taken = group_quantized(original, bits)
            noise.add(relative_noise(original, values), original.size)
            used += taken
        rows.append(
            {
                "setting": f"int{bits}-g128",
                "bits": used / sum(original.size for original in weights.values()),
                "noise_db": noise.db,
            }
        )
    return rows


def clipped_integers(weights: Weights, element_bits: int) -> Weights:
    """Elements (u8, biased) of a step rms·7/2^n, clipped to the range."""
    half = 1 << (element_bits - 1)
    elements = {}
    for name, original in weights.items():
        step = math.sqrt(float(np.mean(original.astype(np.float64) ** 2))) * 7 / 2**element_bits
        elements[name] = (np.clip(np.rint(original / step), -half, half - 1) + half).astype(np.uint8)
    return elements


def _parts(blob: Blob) -> dict[str, int]:
    """Bytes of a blob by purpose; they add up to all of it."""
    header = blob.header
    parts = dict.fromkeys(("words", "raw planes", "lanes", "front", "padding", "raw mode"), 0)
    parts["front"] = HEADER_BYTES + header.table_bytes + TILE_METADATA_BYTES * header.num_tiles
    for index in range(header.num_tiles):
        tile = blob.tiles[index]
        geometry = header.tile_geometry(index)
        if tile["mode"] != TileMode.RANS:
            parts["raw mode"] += int(tile["data_size"])
            continue
        planes = raw_plane_bytes(geometry, header.layout.raw_bits)
        lanes = lane_table_bytes(geometry, header.length_bytes)
        words = 2 * int(blob.tile(index).lengths.sum())
        parts["lanes"] += lanes
        parts["words"] += words
        parts["raw planes"] += planes
        parts["padding"] += int(tile["data_size"]) - lanes - words - planes
    parts["padding"] += header.blob_bytes - parts["front"] - int(blob.tiles["data_size"].sum())
    return parts


def layout_rows(weights: Weights, executor: ThreadPoolExecutor) -> list[dict[str, Any]]:
    rows = []
    total = sum(original.size for original in weights.values())
    for width in LAYOUT_WIDTHS:
        integers = clipped_integers(weights, width)
        bound = sum(entropy_bits(np.bincount(e.reshape(-1))) * e.size for e in integers.values()) / total
        for name in ("compact", "balanced", "fast"):
            layout = integer_layout(name, ElementKind.SIGNED, width)
            sums = dict.fromkeys(("words", "raw planes", "lanes", "front", "padding", "raw mode"), 0)
            split = 0.0  # entropy of the codes, one by one, and the raw bits: what the split itself costs
            length_bytes = set()
            for elements in integers.values():
                blob = Blob(encode_elements(elements, layout, executor=executor))
                length_bytes.add(blob.header.length_bytes)
                for part, size in _parts(blob).items():
                    sums[part] += size
                codes = np.bincount(elements.reshape(-1) >> layout.raw_bits)
                split += (entropy_bits(codes) + layout.raw_bits) * elements.size
            bits = {part: 8 * size / total for part, size in sums.items()}
            stored = sum(bits.values())
            contents = bits["words"] + bits["raw planes"]
            rows.append(
                {
                    "element_bits": width,
                    "layout": name,
                    "bound": bound,
                    "split_bound": split / total,
                    "bits": stored,
                    "over_bound": stored - bound,
                    "contents": contents,
                    "overhead": stored - contents,
                    "parts": bits,
                    "length_bytes": sorted(length_bytes),
                }
            )
    return rows


def _at_rate(
    matrices: Matrices, bits: float, rate_weight: float, executor: ThreadPoolExecutor
) -> tuple[RatePlan, EncodedTensor]:
    """Plan and encode at very nearly ``bits`` bits a weight, from either side."""
    fine = measure(matrices, executor)
    layouts = candidate_layouts("auto", bits)
    headers = {layout: matrices.header(layout, None) for layout in layouts}
    aim = bits
    for _ in range(4):
        plan = plan_for_bits(fine, aim, layouts, headers, rate_weight)
        encoded = encode_plan(matrices, fine, plan, executor=executor)
        achieved = 8 * encoded.size_bytes / matrices.size
        if abs(achieved - bits) < 0.001:
            break
        aim += bits - achieved
    return plan, encoded


def idea_rows(weights: Weights, executor: ThreadPoolExecutor) -> list[dict[str, Any]]:
    """Rounding for rate and least-squares scale, each on and off, at equal bits."""
    rows = []
    total = sum(original.size for original in weights.values())
    for bits in IDEA_RATES:
        for rate_weight in (0.0, LAMBDA):
            used, outliers = 0, 0
            step_noise, scale_noise = MeanNoise(), MeanNoise()
            for original in weights.values():
                plan, encoded = _at_rate(Matrices(original), bits, rate_weight, executor)
                used += encoded.size_bytes
                outliers += encoded.blob.outlier_count
                integers = decode_integers(Blob(encoded.blob.data), executor=executor)
                integers = integers.reshape(original.shape).astype(np.float32)
                assert encoded.scales is not None
                for noise, scale in ((step_noise, plan.step), (scale_noise, encoded.scales[0])):
                    noise.add(relative_noise(original, integers * np.float32(scale)), original.size)
            rows.append(
                {
                    "target_bits": bits,
                    "rate_weight": rate_weight,
                    "bits": 8 * used / total,
                    "noise_db_scale_is_step": step_noise.db,
                    "noise_db_least_squares": scale_noise.db,
                    "outliers": outliers,
                }
            )
    return rows


def tile_rows(model: Path, weights: Weights) -> list[dict[str, Any]]:
    rows = []
    for cols in TILE_COLS:
        row = compressed(model, weights, bits=TILE_RATE, tile_cols=cols)
        rows.append({"tile_cols": "even parts" if cols is None else cols, **row})
    return rows


def allocation_rows(model: Path, weights: Weights) -> list[dict[str, Any]]:
    return [
        {"allocation": allocation, "target_bits": bits, **compressed(model, weights, bits=bits, allocation=allocation)}
        for bits in IDEA_RATES
        for allocation in ("tensor", "model")
    ]


def show(result: dict[str, Any]) -> None:
    def number(value: float | None, digits: int = 3) -> str | None:
        return None if value is None else f"{value:.{digits}f}"

    print_table(
        ("setting", "bits", "entropy", "noise dB", "EntroPack dB", "gain dB", "outliers", "s", "not coded"),
        (
            (
                row["setting"],
                number(row["bits"]),
                number(row.get("entropy_bits")),
                number(row["noise_db"], 2),
                number(row.get("entropack_noise_db"), 2),
                number(row["entropack_noise_db"] - row["noise_db"], 2) if row.get("entropack_noise_db") else None,
                row.get("outliers"),
                number(row.get("seconds"), 1),
                len(row["not_coded"]) if "not_coded" in row else None,
            )
            for row in result["rates"]
        ),
        "Rates",
    )
    print_table(
        ("n", "layout", "H", "bound of the split", "bits", "over H", "words + planes", "lanes", "front", "padding"),
        (
            (
                row["element_bits"],
                row["layout"],
                number(row["bound"]),
                number(row["split_bound"]),
                number(row["bits"]),
                number(row["over_bound"]),
                number(row["contents"]),
                *(number(row["parts"][part]) for part in ("lanes", "front", "padding")),
            )
            for row in result["layouts"]
        ),
        "Layouts: the same integers (bits a weight; states carry 24 useful bits a lane, so words alone are below H)",
    )
    print_table(
        ("target", "rounding", "bits", "scale = step, dB", "least squares, dB", "outliers"),
        (
            (
                row["target_bits"],
                "for rate" if row["rate_weight"] else "nearest",
                number(row["bits"]),
                number(row["noise_db_scale_is_step"], 3),
                number(row["noise_db_least_squares"], 3),
                row["outliers"],
            )
            for row in result["ideas"]
        ),
        "Ideas",
    )
    print_table(
        ("target", "allocation", "bits", "mean noise dB", "total noise dB", "not coded"),
        (
            (
                row["target_bits"],
                row["allocation"],
                number(row["bits"]),
                number(row["noise_db"], 2),
                number(row["total_noise_db"], 2),
                len(row["not_coded"]),
            )
            for row in result["allocations"]
        ),
        "Allocation (mean of the tensors' relative noise; total: all error over all energy, which one step minimises)",
    )
    total = result["coded_weights"]
    print_table(
        ("tile columns", "bits", "entropy", "noise dB", "tables", "packed bits", "plain bits"),
        (
            (
                row["tile_cols"],
                number(row["bits"]),
                number(row["entropy_bits"]),
                number(row["noise_db"], 2),
                row["tables"]["number"],
                number(8 * row["tables"]["bytes"] / total, 4),
                number(8 * row["tables"]["plain_bytes"] / total, 4),
            )
            for row in result["tiles"]
        ),
        f"Tiles at {TILE_RATE} bits, and tables in bits a weight",
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """Noise against bits a weight."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in result["rates"] if row["setting"].startswith("bits")]
    points = sorted((row["bits"], row["noise_db"]) for row in rows)
    axes.plot([b for b, _ in points], [n for _, n in points], "o-", label="kvpack")
    axes.plot(list(ENTROPACK_DB), list(ENTROPACK_DB.values()), "s--", label="EntroPack 0.1.5 (E8 lattice)")
    grouped = [row for row in result["rates"] if row["setting"].startswith("int")]
    axes.plot([r["bits"] for r in grouped], [r["noise_db"] for r in grouped], "^", label="fixed width, groups of 128")
    axes.set_xlabel("bits a weight, everything counted")
    axes.set_ylabel("noise to signal, dB")
    axes.set_title("all-MiniLM-L6-v2")
    axes.grid(True, alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=environment_path("KVPACK_MINILM"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="a PNG")
    options = parser.parse_args()
    if options.model is None:
        parser.error("MODEL is needed, or KVPACK_MINILM")
    result: dict[str, Any] = {"what": "minilm-rate", **provenance({"KVPACK_MINILM": options.model})}
    weights = coded_weights(options.model)
    result |= {"coded_tensors": len(weights), "coded_weights": sum(w.size for w in weights.values())}
    with ThreadPoolExecutor(default_threads()) as executor:
        for part, work in (
            ("rates", lambda: rate_rows(options.model, weights)),
            ("layouts", lambda: layout_rows(weights, executor)),
            ("ideas", lambda: idea_rows(weights, executor)),
            ("allocations", lambda: allocation_rows(options.model, weights)),
            ("tiles", lambda: tile_rows(options.model, weights)),
        ):
            print(part, file=sys.stderr)
            result[part] = work()
    show(result)
    if options.json:
        write_result(options.json, result)
    if options.plot:
        plot(result, options.plot)


if __name__ == "__main__":
    main()
