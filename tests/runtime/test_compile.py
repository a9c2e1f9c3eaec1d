"""Every kernel compiles for every GPU that kvpack knows, spills nothing, and keeps to its registers. Needs no GPU.

The whole product of layouts, options and GPUs takes long: without ``--all-kernels`` a selection of it is compiled.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest

torch = pytest.importorskip("torch")

import emulator  # noqa: E402
import nvrtc  # noqa: E402
from nvrtc import compile_for  # noqa: E402

from kvpack.bench import matrix_quantizer as matrices  # noqa: E402
from kvpack.bench.matrix_quantizer_reference import FORMATS, Axis  # noqa: E402
from kvpack.encode.snapshot_coder import _LAYOUTS  # noqa: E402
from kvpack.format.layout import LAYOUT_NAMES, ElementKind, Layout, Quantizer, float_layouts, integer_layouts  # noqa: E402
from kvpack.format.pages import PageFormat, PageLayout, Side  # noqa: E402
from kvpack.runtime.codec import encoder, feedback  # noqa: E402
from kvpack.runtime.codec.decoder import decode_kernel  # noqa: E402
from kvpack.runtime.device.kernels import Kernel, layout_defines  # noqa: E402
from kvpack.runtime.kv import attention_kernels as attention  # noqa: E402
from kvpack.runtime.kv import page_elements, page_kernels, page_slots, page_summaries, retrieval  # noqa: E402
from kvpack.runtime.weights import grouped  # noqa: E402
from kvpack.runtime.weights import mma_product as mma  # noqa: E402
from kvpack.runtime.weights import products as weights  # noqa: E402
from kvpack.runtime.weights import wgmma_product as wgmma  # noqa: E402

pytestmark = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# On these the selection has each layout and each option; on the others some of them.
COVERED = (80, 90)
_EVERY = 5  # odd, so that options which alternate meet every layout
# Of many layouts and options: one above a multiple of 4, so that each layout meets both numbers of buffers with both of
# resident blocks. sm_80 and sm_90 have other pairs, which together are more than _EVERY gives.
_EVERY_OF_MANY = 9
_EVERY_ELSEWHERE = 9

_REGISTERS = 1 << 16  # of a multiprocessor
_REGISTER_UNIT = 8
_MOST_REGISTERS = 255
# Threads of a block, and how many blocks shall share a multiprocessor, for kernels that do not state it themselves.
_ENCODER_BLOCKS = {
    "encode_count": (256, 4),
    "encode_lanes": (256, 4),
    "encode_pack": (256, 4),
    "encode_place": (1024, 1),
    "encode_quantize": (256, 6),
    "encode_feedback": (64, 8),
    "crc32": (256, 5),
    "arrange_activations": (256, 2),
}

T = TypeVar("T")
SIGNED, UNSIGNED = (
    # Some names mean the same layout.
    tuple(
        dict.fromkeys(
            layout for bits in range(2, 9) for name in LAYOUT_NAMES for layout in integer_layouts(name, kind, bits)
        )
    )
    for kind in (ElementKind.SIGNED, ElementKind.UNSIGNED)
)
# Kernels of products and decoding ask for a trellis, those that encode do not.
SCALAR = SIGNED
SIGNED += tuple(
    dict.fromkeys(
        layout
        for bits in range(2, 7)
        for name in ("balanced", "fast")
        for layout in integer_layouts(name, ElementKind.SIGNED, bits, Quantizer.TRELLIS)
    )
)
FLOATS = tuple(layout for kind in ElementKind if not kind.is_integer for layout in float_layouts(kind))
HEAD_DIMS = (64, 80, 96, 128, 256)
BUFFERS = (1, 2)
RESIDENT = (1, 2)
# Kernels that take elements for bits, whatever these mean.
KINDLESS = ("encode_count", "encode_lanes", "encode_pack")
# What a cache has pages of beside those of 16 bits.
PAGE_FORMATS = (
    (),
    (PageFormat.INT8, PageFormat.INT4, PageFormat.INT3, PageFormat.INT2),
    tuple(page_format for page_format in PageFormat if page_format.is_quantized),
)


def selected(
    layouts: Iterable[T], options: Sequence[Any], everything: bool, architecture: int = 0
) -> Iterator[tuple[T, Any]]:
    """All pairs, or so many that each layout and each option is in one; if there are many, other ones on sm_90."""
    layouts = list(layouts)
    every, first = min(_EVERY, len(options)), 0
    if architecture in COVERED and len(layouts) >= 2 * _EVERY_OF_MANY and len(options) >= 2 * _EVERY_OF_MANY:
        every, first = _EVERY_OF_MANY, _EVERY_OF_MANY // 2 * COVERED.index(architecture)
    for (i, layout), (j, option) in itertools.product(enumerate(layouts), enumerate(options)):
        if everything or (i + j) % every == first:
            yield layout, option


def gemv_kernels(everything: bool, architecture: int, *, grouped: bool = False) -> Iterator[Kernel]:
    options = list(itertools.product(weights.ACTIVATIONS, BUFFERS, RESIDENT))
    for layout, (activation, buffers, resident) in selected(SIGNED, options, everything, architecture):
        yield weights.gemv_kernel(layout, activation, buffers, resident, architecture, grouped=grouped)


def gemm_kernels(everything: bool, architecture: int, *, grouped: bool = False) -> Iterator[Kernel]:
    tiles = weights.GROUPED_TOKEN_TILES if grouped else weights.TOKEN_TILES
    options = list(itertools.product(weights.ACTIVATIONS, tiles, BUFFERS, RESIDENT))
    for layout, (activation, token_tiles, buffers, resident) in selected(SIGNED, options, everything, architecture):
        yield weights.gemm_kernel(layout, activation, buffers, resident, token_tiles, architecture, grouped=grouped)


def decode_kernels(everything: bool, architecture: int) -> Iterator[Kernel]:
    nothing, numbers = weights.OUTPUT_NOTHING, weights.OUTPUT_NUMBERS
    truth = (False, True)
    outputs = [
        (weights.OUTPUT_I8, False),
        (weights.OUTPUT_I16, True),
        *itertools.product((nothing, *weights.OUTPUTS.values()), truth),
    ]
    of_kinds: list[tuple[Iterable[Layout], list[Any]]] = [
        (SIGNED, list(itertools.product(outputs, truth, BUFFERS))),
        (UNSIGNED, list(itertools.product([(nothing, False), (numbers, False)], truth, BUFFERS))),
        (FLOATS, list(itertools.product([(nothing, False), (numbers, False)], [False], BUFFERS))),
    ]
    for layouts, options in of_kinds:
        for layout, option in selected(layouts, options, everything, architecture):
            (output, outliers), predicted, buffers = option
            yield weights.decode_kernel(layout, output, buffers, architecture, outliers=outliers, predicted=predicted)


def rows_kernels(everything: bool, architecture: int) -> Iterator[Kernel]:
    options = list(weights.OUTPUTS.values())
    for layout, output in selected(SIGNED, options, everything, architecture):
        yield weights.rows_kernel(layout, output)


def vector_kernels(everything: bool, architecture: int) -> Iterator[Kernel]:
    """Products with column scales, and decoding with row offsets and column scales."""
    products_of = list(itertools.product(weights.ACTIVATIONS, (0, *weights.TOKEN_TILES), RESIDENT, BUFFERS))
    for layout, (activation, tiles, resident, buffers) in selected(SIGNED, products_of, everything, architecture):
        if tiles:
            yield weights.gemm_kernel(layout, activation, buffers, resident, tiles, architecture, column_scales=True)
        else:
            yield weights.gemv_kernel(layout, activation, buffers, resident, architecture, column_scales=True)
    vectors = ((True, False), (False, True), (True, True))
    options = list(itertools.product(weights.OUTPUTS.values(), (False, True), (False, True), BUFFERS, vectors))
    for layout, option in selected(SIGNED, options, everything, architecture):
        output, outliers, predicted, buffers, (offsets, columns) = option
        yield weights.decode_kernel(
            layout, output, buffers, architecture,
            outliers=outliers, predicted=predicted, row_offsets=offsets, column_scales=columns,
        )  # fmt: skip


def wgmma_kernels(everything: bool, architecture: int) -> Iterator[Kernel]:
    """Products of 33 to 256 vectors, which are sm_90's alone, and their activations."""
    options = list(itertools.product(weights.ACTIVATIONS, wgmma._BLOCKS, BUFFERS, (False, True)))
    for layout, (activation, tokens, buffers, vectors) in selected(SIGNED, options, everything, architecture):
        yield wgmma.arrange_kernel(layout, activation, tokens, column_scales=vectors)
        if architecture == wgmma.ARCHITECTURE:
            fit = wgmma.WgmmaFit(tokens, wgmma.block_of(layout, tokens).producers, buffers, 1, 0)
            yield wgmma.wgmma_kernel(layout, activation, fit, outliers=vectors)


def mma_kernels(everything: bool, architecture: int) -> Iterator[Kernel]:
    """Products of 65 to 128 vectors on GPUs without wgmma, or with blobs that gemm_wgmma does not take."""
    half, bf16, fp32 = weights.ACTIVATIONS
    # Activation, outliers, predictors, several tables. What an activation changes has nothing to do with the others.
    kinds = [
        (half, False, False, False),
        (bf16, True, False, False),
        (fp32, False, True, False),
        (half, False, False, True),
        (bf16, True, True, True),
    ]
    options = list(itertools.product(mma._BLOCKS, kinds))
    tokens = mma.MAX_TOKENS
    for layout, ((groups, resident), kind) in selected(SIGNED, options, everything, architecture):
        activation, outliers, predicted, tables = kind
        if (groups, resident) not in mma.block_kinds(outliers=outliers, predicted=predicted, several_tables=tables):
            groups, resident = mma._BLOCKS[-1]
        yield wgmma.arrange_kernel(layout, activation, tokens, column_scales=tables, split_slots=True)
        fit = mma.MmaFit(tokens, groups, resident, 1, 1 + outliers, tables, 0)
        yield mma.mma_kernel(layout, activation, fit, outliers=outliers, predicted=predicted)


def prefill_kernels(everything: bool, _architecture: int) -> Iterator[Kernel]:
    options = list(itertools.product(PAGE_FORMATS, page_kernels.PAGE_FORMATS.items(), (True, False)))
    for head_dim, (formats, (dtype, float_format), causal) in selected(HEAD_DIMS, options, everything):
        read = frozenset({float_format, *formats})
        yield attention.prefill_kernel(head_dim, dtype, read, read, causal=causal)


def prefill_variant_kernels(everything: bool, _architecture: int) -> Iterator[Kernel]:
    options = list(itertools.product(page_kernels.PAGE_FORMATS.items(), ((True, False), (False, True), (True, True))))
    for head_dim, ((dtype, float_format), (softcap, sink_logits)) in selected(HEAD_DIMS, options, everything):
        read = frozenset({float_format, *PAGE_FORMATS[1]})
        yield attention.prefill_kernel(head_dim, dtype, read, read, softcap=softcap, sink_logits=sink_logits)


def encoder_kernels(operation: str) -> Callable[[bool, int], Iterator[Kernel]]:
    """The kernels of each layout, which have no options; the selection has one for all kinds of the same numbers."""

    def of_all(everything: bool, architecture: int) -> Iterator[Kernel]:
        kernels = (encoder._kernel(operation, layout) for layout in (*SCALAR, *UNSIGNED, *FLOATS))
        return (
            kernels
            if everything or architecture not in COVERED
            else iter({without_kind(kernel): kernel for kernel in kernels}.values())
        )

    return of_all


def without_kind(kernel: Kernel) -> tuple[tuple[str, int], ...]:
    """The defines that an encoder's kernel asks for."""
    return tuple(pair for pair in kernel.defines if pair[0] != "KVPACK_ELEMENT_KIND")


def decode_elements_kernels(_everything: bool, _architecture: int) -> Iterator[Kernel]:
    """Of the layouts that kvpack writes in snapshots."""
    written = [Layout(kind, bits, *codes) for (kind, bits), codes in _LAYOUTS.items()]
    written.append(Layout(ElementKind.FP16, 16, 8, 1))
    for layout in written:
        yield decode_kernel(layout, predicted=False)
        if layout.element_kind.is_integer:
            yield decode_kernel(layout, predicted=True)


def page_elements_kernels(make: Callable[[PageLayout], Kernel]) -> Callable[[bool, int], Iterator[Kernel]]:
    def of_all(everything: bool, _architecture: int) -> Iterator[Kernel]:
        for (side, page_format), head_dim in selected(itertools.product(Side, PageFormat), HEAD_DIMS, everything):
            yield make(PageLayout(side, page_format, head_dim))

    return of_all


def matrix_kernels(
    of: Callable[..., Kernel], *choices: Iterable[Any], rows_apart: bool = False
) -> Callable[[bool, int], Iterator[Kernel]]:
    """Kernels of all types and the given choices; `rows_apart`: vectorized kernels for tokens are another file's."""

    def of_all(everything: bool, _architecture: int) -> Iterator[Kernel]:
        options = [
            option
            for option in itertools.product(*choices)
            if not (rows_apart and option[-2:] == (Axis.TOKEN, matrices.Variant.VECTORIZED))
        ]
        for dtype, option in selected(weights.ACTIVATIONS, options, everything or len(options) < len(SIGNED)):
            yield of(dtype, *option)

    return of_all


def quantize_kernels(everything: bool, _architecture: int) -> Iterator[Kernel]:
    targets = [page_format for page_format in PageFormat if page_format.is_quantized]
    options = list(itertools.product(Side, PageFormat, targets))
    for head_dim, (side, source, target) in selected(HEAD_DIMS, options, everything):
        yield page_kernels.quantize_kernel(side, source, target, head_dim)


def read_kernels(everything: bool, _architecture: int) -> Iterator[Kernel]:
    options = list(itertools.product(Side, weights.ACTIVATIONS))
    for head_dim, (side, dtype) in selected(HEAD_DIMS, options, everything):
        yield page_kernels.read_kernel(side, head_dim, dtype)
        if dtype in page_kernels.PAGE_FORMATS:
            yield page_kernels.read_kernel(side, head_dim, dtype, block_tokens=16)


def score_kernels(everything: bool, _architecture: int) -> Iterator[Kernel]:
    options = list(itertools.product(page_kernels.PAGE_FORMATS, range(1, retrieval._MOST_HEADS + 1)))
    for head_dim, (dtype, heads) in selected(HEAD_DIMS, options, everything):
        yield retrieval.scores_kernel(head_dim, dtype, heads)


KERNELS: dict[str, Callable[[bool, int], Iterable[Kernel]]] = {
    "gemv": gemv_kernels,
    "gemm": gemm_kernels,
    "gemv, grouped": partial(gemv_kernels, grouped=True),
    "gemm, grouped": partial(gemm_kernels, grouped=True),
    "route": lambda _everything, _architecture: [grouped.route_kernel()],
    "gemm_wgmma": wgmma_kernels,
    "gemm_mma": mma_kernels,
    "decode": decode_kernels,
    "decode_rows": rows_kernels,
    "products and decode with vectors": vector_kernels,
    **{operation: encoder_kernels(operation) for operation in KINDLESS},
    "encode_place": lambda _everything, _architecture: [encoder._PLACE],
    "encode_quantize": lambda _everything, _architecture: [
        encoder._quantize_kernel(kind) for kind in encoder._WEIGHT_KINDS.values()
    ],
    "encode_feedback": lambda _everything, _architecture: [feedback.KERNEL],
    "crc32": lambda _everything, _architecture: [encoder._CRC],
    "attention_prefill": prefill_kernels,
    "attention_prefill with softcap or sink logits": prefill_variant_kernels,
    "matrix_scales": matrix_kernels(matrices.scales_kernel, Axis, matrices.Variant, rows_apart=True),
    "matrix_quantize": matrix_kernels(matrices.quantize_kernel, FORMATS, Axis, matrices.Variant, rows_apart=True),
    "matrix_quantize_rows": matrix_kernels(matrices.quantize_rows_kernel, FORMATS),
    "matrix_dequantize": matrix_kernels(matrices.dequantize_kernel, FORMATS, Axis, matrices.Variant),
    "page_write": lambda _everything, _architecture: [
        page_kernels.write_kernel(head_dim, block_tokens=tokens)
        for head_dim, tokens in itertools.product(HEAD_DIMS, (0, 16))
    ],
    "page_fetch": lambda _everything, _architecture: map(page_slots.fetch_kernel, HEAD_DIMS),
    "page_quantize": quantize_kernels,
    "page_read": read_kernels,
    "decode_elements": decode_elements_kernels,
    "page_join": page_elements_kernels(page_elements.join_kernel),
    "page_split": page_elements_kernels(page_elements.split_kernel),
    "page_scores": score_kernels,
    "page_slots": lambda _everything, _architecture: [page_slots.slots_kernel()],
    "page_summarize": lambda _everything, _architecture: map(page_summaries.summarize_kernel, HEAD_DIMS),
}


def most_registers(kernel: Kernel) -> int:
    """What a thread may take if as many blocks as the kernel means shall share a multiprocessor."""
    if kernel.function in _ENCODER_BLOCKS:
        threads, blocks = _ENCODER_BLOCKS[kernel.function]
    elif kernel.function == "gemm_wgmma":
        threads, blocks = 128 * (wgmma._CONSUMERS + dict(kernel.defines)["KVPACK_PRODUCERS"]), 1
    elif kernel.function == "gemm_mma":
        defines = dict(kernel.defines)
        threads, blocks = 64 * defines["KVPACK_GROUPS"], defines["KVPACK_BLOCKS_PER_SM"]
    else:
        defines = dict(kernel.defines)
        warps = defines["KVPACK_WARPS" if "KVPACK_WARPS" in defines else "KVPACK_MAX_WARPS"]
        threads, blocks = 32 * warps, defines["KVPACK_BLOCKS_PER_SM"]
    return min(_MOST_REGISTERS, _REGISTERS // (threads * blocks) // _REGISTER_UNIT * _REGISTER_UNIT)


def described(kernel: Kernel) -> str:
    """Which instance it is: its defines, shortened."""
    return " ".join(f"{name.removeprefix('KVPACK_').lower()}={value}" for name, value in kernel.defines)


def refused(kernels: Iterable[Kernel], architecture: int) -> dict[str, str]:
    """Those that do not compile, spill, or take too many registers, and what they did. Compiles on all cores."""

    def verdict(kernel: Kernel) -> str | None:
        try:
            used = compile_for(kernel, architecture)
        except AssertionError as error:
            return str(error)
        good = used.spill_bytes == used.stack_bytes == 0 and 0 < used.registers <= most_registers(kernel)
        return None if good else f"{used}, registers at most {most_registers(kernel)}"

    listed = list(kernels)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        verdicts = list(pool.map(verdict, listed))
    return {described(kernel): said for kernel, said in zip(listed, verdicts, strict=True) if said is not None}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("operation", KERNELS)
def test_resources(operation: str, architecture: int) -> None:
    kernels = list(KERNELS[operation](False, architecture))
    assert kernels
    if architecture not in COVERED:
        kernels = kernels[::_EVERY_ELSEWHERE]
    assert not refused(kernels, architecture)


@pytest.mark.all_kernels
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("operation", KERNELS)
def test_resources_of_all(operation: str, architecture: int) -> None:
    assert not refused(KERNELS[operation](True, architecture), architecture)


@pytest.mark.parametrize("operation", KERNELS)
@pytest.mark.parametrize("architecture", COVERED)
def test_selection_has_every_layout_and_option(operation: str, architecture: int) -> None:
    def parts(kernel: Kernel) -> set[tuple[tuple[str, int], ...]]:
        of_layout = layout_defines(SIGNED[0]).keys()
        asked = without_kind(kernel) if operation in KINDLESS else kernel.defines
        layout = tuple(pair for pair in asked if pair[0] in of_layout)
        return {layout, *((pair,) for pair in asked if pair not in layout)}

    every, some = (
        set().union(*map(parts, KERNELS[operation](everything, architecture))) for everything in (True, False)
    )
    assert some == every


@pytest.mark.parametrize("architecture", COVERED)
def test_each_layout_meets_both_buffers_with_both_residents(architecture: int) -> None:
    names = ("KVPACK_BUFFERS", "KVPACK_BLOCKS_PER_SM")
    met: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for kernel in gemm_kernels(False, architecture):
        defines = dict(kernel.defines)
        layout = tuple(defines[name] for name in layout_defines(SIGNED[0]))
        met.setdefault(layout, set()).add(tuple(defines[name] for name in names))
    assert set(map(len, met.values())) == {len(BUFFERS) * len(RESIDENT)}


@pytest.mark.parametrize("operation", KINDLESS)
def test_kernels_that_do_not_ask_for_the_kind(operation: str) -> None:
    """Otherwise the kinds are different kernels, and each has to be compiled."""
    path = Path(encoder._kernel(operation, SIGNED[0]).source)
    sources = emulator._sources(emulator.CUDA / path)
    assert len(sources) > 2
    assert not [source for source in sources if re.search("ELEMENT_KIND|kSigned", source.read_text())]


# What the measuring itself sees --------------------------------------------------------------------------------------

SPILLING = """
extern "C" __global__ void __launch_bounds__(1024) spilling(const float* x, float* y) {
  float values[96];
  #pragma unroll
  for (int i = 0; i < 96; ++i) values[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
  #pragma unroll
  for (int i = 0; i < 96; ++i) y[i * 1024 + threadIdx.x] = values[95 - i] * values[(7 * i) % 96];
}
"""
SHARING = """
extern "C" __global__ void sharing(float* y) {
  __shared__ float values[1024];
  values[threadIdx.x] = y[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = values[1023 - threadIdx.x];
}
"""


def kernel_of(text: str, function: str, folder: Path) -> Kernel:
    (folder / f"{function}.cu").write_text(text, encoding="utf-8")
    return Kernel(str(folder / f"{function}.cu"), function)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_spills_are_seen(tmp_path: Path, architecture: int) -> None:
    used = compile_for(kernel_of(SPILLING, "spilling", tmp_path), architecture)
    assert used.registers <= 64
    assert used.spill_bytes > 0
    sharing = compile_for(kernel_of(SHARING, "sharing", tmp_path), architecture)
    assert sharing.spill_bytes == sharing.stack_bytes == 0
    assert sharing.registers < 32


def test_faults_are_reported(tmp_path: Path) -> None:
    bounds = (("KVPACK_BLOCKS_PER_SM", 1), ("KVPACK_MAX_WARPS", 32))
    spilling = dataclasses.replace(kernel_of(SPILLING, "spilling", tmp_path), defines=bounds)
    wrong = dataclasses.replace(kernel_of("nonsense", "wrong", tmp_path), defines=bounds)
    good = dataclasses.replace(kernel_of(SHARING, "sharing", tmp_path), defines=bounds)
    which = "blocks_per_sm=1 max_warps=32"
    assert "spill_bytes" in refused([spilling], 90)[which]
    assert "nonsense" in refused([wrong], 90)[which]
    assert not refused([good], 90)


def test_register_ceilings() -> None:
    layout = SIGNED[0]
    assert most_registers(weights.gemv_kernel(layout, torch.float16, 1, 2, 90)) == 64
    defines = (("KVPACK_BLOCKS_PER_SM", 2), ("KVPACK_MAX_WARPS", 12))
    assert most_registers(Kernel("", "", defines)) == 80  # 85 are there, dealt by eights
    assert most_registers(encoder._PLACE) == 64
    assert most_registers(encoder._CRC) == 48
