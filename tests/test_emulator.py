"""The emulator itself, with kernels of a few lines: what they compute, and the mistakes that it must find."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import emulator
import ml_dtypes
import numpy as np
import pytest
from emulator import CompilationError, EmulationError

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler: install g++ or set CXX")

Kernel = Callable[..., None]
FULL = 0xFFFFFFFF
SEEDS = (None, 1, 2)
DEFINES = {"KVPACK_STATE_LOW": 65536}


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    """Runs `void kernel(parameters) { body }` in one block of 32 threads unless told otherwise."""
    numbers = itertools.count()

    def run(
        parameters: str,
        body: str,
        args: Sequence[Any],
        *,
        grid: int | tuple[int, ...] = 1,
        block: int | tuple[int, ...] = 32,
        before: str = "",
        **options: Any,
    ) -> None:
        source = tmp_path / f"kernel_{next(numbers)}.cu"
        source.write_text(
            f'#include "common/ptx.cuh"\n{before}\nextern "C" __global__ void __launch_bounds__(1024) '
            f"kernel({parameters}) {{\n  [[maybe_unused]] const u32 thread = threadIdx.x, lane = thread % 32;\n"
            f"{body}\n}}\n"
        )
        options.setdefault("defines", DEFINES)
        emulator.run(source, "kernel", grid, block, args, **options)

    return run


def lanes(start: int = 0) -> np.ndarray:
    return np.arange(start, start + 32, dtype=np.uint32)


# ---- Launches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_indices(kernel: Kernel, seed: int | None) -> None:
    out = np.zeros(3 * 2 * 40 * 2, np.uint32)
    body = """
      u32 block = blockIdx.y * gridDim.x + blockIdx.x;
      u32 t = threadIdx.y * blockDim.x + threadIdx.x;
      out[block * blockDim.x * blockDim.y + t] = blockIdx.y << 24 | blockIdx.x << 16 | threadIdx.y << 8 | threadIdx.x;
    """
    kernel("u32* out", body, [out], grid=(3, 2), block=(40, 2), shuffle_seed=seed)
    y, x, ty, tx = np.ogrid[:2, :3, :2, :40]
    np.testing.assert_array_equal(out, (y << 24 | x << 16 | ty << 8 | tx).ravel())


def test_scalars_null_pointers_and_read_only_arrays(kernel: Kernel) -> None:
    out = np.zeros(4, np.uint64)
    values = np.frombuffer(b"\x05\0\0\0", np.uint32)
    body = "if (thread == 0) { out[0] = a; out[1] = b; out[2] = c; out[3] = (none == nullptr) + f * 2 + values[0]; }"
    kernel(
        "u64* out, int a, u32 b, u64 c, float f, const u8* none, const u32* __restrict__ values",
        body,
        [out, np.int32(-1), np.uint32(FULL), np.uint64(1 << 63), np.float32(1.5), None, values],
    )
    assert out.tolist() == [(1 << 64) - 1, FULL, 1 << 63, 9]


def test_arrays_that_overlap_share_memory_and_views_keep_their_alignment(kernel: Kernel) -> None:
    data = np.arange(64, dtype=np.uint8)
    view = data[3:10]
    kernel(
        "u8* data, u8* view, u64* out",
        "*out = (u64)view - (u64)data; view[1] = 99;",
        [data, view, out := np.zeros(1, np.uint64)],
    )
    assert out[0] == 3
    assert data[4] == 99
    kernel("u8* view, u64* out", "*out = (u64)view % 16;", [view, out])
    assert out[0] == 3


def test_wrong_arguments(kernel: Kernel) -> None:
    out = np.zeros(8, np.uint32)
    with pytest.raises(EmulationError, match="1 arguments are given, the kernel has 2 parameters"):
        kernel("u32* out, u32 n", "", [out])
    with pytest.raises(EmulationError, match="argument 1 is int32, the kernel's parameter is uint32"):
        kernel("u32* out, u32 n", "", [out, np.int32(1)])
    with pytest.raises(TypeError, match="argument 1 is int"):
        kernel("u32* out, u32 n", "", [out, 1])
    with pytest.raises(ValueError, match="argument 0 is not contiguous"):
        kernel("u32* out", "", [out[::2]])
    with pytest.raises(CompilationError, match="undeclared_name"):
        kernel("u32* out", "out[0] = undeclared_name;", [out])


def test_the_slow_way_of_switching_threads(kernel: Kernel) -> None:
    """What processors other than x86-64 use."""
    body = """
      KVPACK_DYNAMIC_SHARED(shared);
      shared[thread] = thread;
      __syncthreads();
      out[lane] = __shfl_xor_sync(0xFFFFFFFFu, shared[lane], 1);
    """
    kernel("u32* out", body, [out := lanes()], block=64, shared_bytes=64, defines={"KVPACK_EMULATED_UCONTEXT": 1})
    np.testing.assert_array_equal(out, lanes() ^ 1)


def test_defines_reach_the_source(kernel: Kernel) -> None:
    for value in (3, 4):
        kernel("u32* out", "out[0] = VALUE;", [out := np.zeros(1, np.uint32)], defines={"VALUE": value})
        assert out[0] == value


def test_a_failure_leaves_the_arrays_as_they_were(kernel: Kernel) -> None:
    out = np.zeros(32, np.uint32)
    with pytest.raises(EmulationError, match=r"block \(0, 0, 0\), thread \(7, 0, 0\): __trap"):
        kernel("u32* out", "out[thread] = 1; if (thread == 7) __trap();", [out])
    assert not out.any()


def test_endless_loops_end(kernel: Kernel) -> None:
    body = "volatile u32 wait = 1; if (thread == 3) while (wait) {}"
    with pytest.raises(EmulationError, match=r"did not end within 0.5 s.*thread \(3, 0, 0\)"):
        kernel("", body, [], timeout=0.5)


# ---- Warps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_shuffles(kernel: Kernel, seed: int | None) -> None:
    out = np.zeros((7, 32), np.uint32)
    body = """
      u32 all = 0xFFFFFFFFu, value = 100 + lane;
      out[lane] = __shfl_sync(all, value, 5);
      out[32 + lane] = __shfl_sync(all, value, 9, 8);
      out[64 + lane] = __shfl_up_sync(all, value, 3);
      out[96 + lane] = __shfl_down_sync(all, value, 3, 16);
      out[128 + lane] = __shfl_xor_sync(all, value, 6);
      out[160 + lane] = (u32)(__shfl_xor_sync(all, (u64)value << 40, 1) >> 40);
      out[192 + lane] = (u32)(2 * __shfl_down_sync(all, value + 0.5f, 1));
    """
    kernel("u32* out", body, [out], shuffle_seed=seed)
    lane = np.arange(32)
    expected = [
        np.full(32, 5),
        lane // 8 * 8 + 1,
        np.where(lane < 3, lane, lane - 3),
        np.where(lane % 16 + 3 > 15, lane, lane + 3),
        lane ^ 6,
        lane ^ 1,
        np.minimum(lane + 1, 31),
    ]
    np.testing.assert_array_equal(out[:6], np.array(expected[:6]) + 100)
    np.testing.assert_array_equal(out[6], 2 * (expected[6] + 100) + 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_votes_matches_and_reductions(kernel: Kernel, seed: int | None) -> None:
    out = np.zeros((10, 32), np.uint32)
    body = """
      u32 all = 0xFFFFFFFFu; int same = 0;
      out[lane] = __ballot_sync(all, lane % 3 == 0);
      out[32 + lane] = __any_sync(all, lane == 31) * 2 + __any_sync(all, 0);
      out[64 + lane] = __all_sync(all, lane < 32) * 2 + __all_sync(all, lane < 31);
      out[96 + lane] = __match_any_sync(all, lane / 4);
      out[128 + lane] = __reduce_add_sync(all, lane);
      out[160 + lane] = (u32)__reduce_min_sync(all, (int)lane - 16);
      out[192 + lane] = __reduce_max_sync(all, lane - 16);
      out[224 + lane] = __reduce_or_sync(all, 1u << lane % 7);
      out[256 + lane] = __match_all_sync(all, 5, &same) & (same ? all : 0);
      out[288 + lane] = __activemask();
    """
    kernel("u32* out", body, [out], shuffle_seed=seed)
    expected = [0x49249249, 2, 2, None, 496, (1 << 32) - 16, FULL, 127, FULL, FULL]
    for row, value in zip(out, expected, strict=True):
        np.testing.assert_array_equal(row, 0xF << (np.arange(32) // 4 * 4) if value is None else value)


@pytest.mark.parametrize("seed", SEEDS)
def test_diverged_lanes_meet_by_their_masks(kernel: Kernel, seed: int | None) -> None:
    out = np.zeros(32, np.uint32)
    body = """
      u32 mask = lane % 2 ? 0xAAAAAAAAu : 0x55555555u;
      u32 sum = 0;
      if (lane % 2) {
        for (u32 i = 0; i < 5; ++i) sum += __reduce_add_sync(mask, lane);
      } else {
        sum = __reduce_add_sync(mask, lane);
      }
      __syncwarp();
      out[lane] = sum + __activemask() % 2;
    """
    kernel("u32* out", body, [out], shuffle_seed=seed)
    np.testing.assert_array_equal(out.reshape(16, 2), [[241, 5 * 256 + 1]] * 16)


@pytest.mark.parametrize("seed", SEEDS)
def test_lanes_that_have_returned_are_not_waited_for(kernel: Kernel, seed: int | None) -> None:
    out = np.zeros(80, np.uint32)
    body = """
      if (thread % 3 == 1) return;
      __syncthreads();
      if (thread % 3 == 2) return;
      out[thread] = __ballot_sync(0xFFFFFFFFu, 1);
      __syncthreads();
      out[thread] += 1;
    """
    kernel("u32* out", body, [out], block=80, shuffle_seed=seed)
    thread = np.arange(80)
    expected = [sum(1 << int(t) % 32 for t in thread[w * 32 : w * 32 + 32] if t % 3 == 0) + 1 for w in range(3)]
    np.testing.assert_array_equal(out, np.where(thread % 3 == 0, np.array(expected)[thread // 32], 0))


def test_a_mask_without_the_caller(kernel: Kernel) -> None:
    with pytest.raises(EmulationError, match="__shfl_sync: lane 3 is not in its mask 00000007"):
        kernel("", "if (lane < 4) __shfl_sync(7, lane, 0);", [])


def test_deadlock_of_a_warp(kernel: Kernel) -> None:
    with pytest.raises(EmulationError) as caught:
        kernel("", "if (lane < 5) __syncwarp(); else __syncthreads();", [], block=64)
    assert "deadlock" in str(caught.value)
    assert "warp 1: lanes 0000001f wait at __syncwarp (mask ffffffff)" in str(caught.value)
    assert "warp 1: lanes ffffffe0 wait at __syncthreads" in str(caught.value)


# ---- Blocks and shared memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_shared_memory_and_barriers(kernel: Kernel, seed: int | None) -> None:
    out = np.zeros((3, 512), np.uint32)
    before = """
      template <int count> __device__ __forceinline__ u32 next(u32 value) {
        __shared__ u32 kept[count];
        kept[threadIdx.x] = value;
        __syncthreads();
        return kept[(threadIdx.x + 1) % count];
      }
    """
    body = """
      KVPACK_DYNAMIC_SHARED(dynamic);
      __shared__ __align__(16) u16 halves[512];
      u32 at = shared_address(dynamic), value = 1000 * blockIdx.x + thread;
      if (load_shared_u32(at + 4 * thread) != 0xFFFFFFFFu || halves[thread] != 0xFFFF) __trap();
      __syncthreads();
      store_shared_u32(at + 4 * thread, value);
      store_shared_u16(shared_address(halves + thread), thread);
      __syncthreads();
      u32 other = reinterpret_cast<u32*>(dynamic)[511 - thread];
      uint4 four = load_shared_v4(shared_address(halves) + thread / 8 * 16);
      __syncthreads();
      u32 count = __syncthreads_count(thread < 9) + __syncthreads_or(thread == 1) + __syncthreads_and(thread == 1);
      out[blockIdx.x * 512 + thread] = other + next<512>(value) + (four.y >> 16) - thread / 8 * 8 + count;
    """
    kernel("u32* out", body, [out], grid=3, block=512, before=before, shared_bytes=2048, shuffle_seed=seed)
    thread, block = np.arange(512), np.arange(3)[:, None]
    np.testing.assert_array_equal(out, 2000 * block + 511 - thread + (thread + 1) % 512 + 3 + 10)


def test_a_missing_barrier_shows_in_some_order(kernel: Kernel) -> None:
    body = """
      __shared__ u32 kept[64];
      kept[thread] = thread;
      out[thread] = kept[(thread + 1) % 64];
    """
    kernel("u32* out", body, [out := np.zeros(64, np.uint32)], block=64)
    assert FULL in out


@pytest.mark.parametrize("seed", SEEDS)
def test_atomics(kernel: Kernel, seed: int | None) -> None:
    out = np.array([0, 0, FULL, 0, 0, 7, 0], np.uint32)
    body = """
      __shared__ u32 count; __shared__ u64 wide; __shared__ float real;
      if (thread == 0) { count = 0; wide = 0; real = 0; }
      __syncthreads();
      atomicAdd(&count, 1); atomicAdd(&wide, 1ull << 32); atomicAdd(&real, 0.5f);
      atomicMax(out + 1, thread); atomicMin(out + 2, thread + 3); atomicOr(out + 3, 1u << thread % 32);
      while (atomicCAS(out + 4, 0, 1) != 0) {}
      out[6] += 1;
      atomicExch(out + 4, 0);
      __syncthreads();
      if (thread == 0) {
        out[0] = count + (u32)(wide >> 32) + (u32)real;
        __threadfence();
        atomicCAS(out + 5, 7, 8);
      }
    """
    kernel("u32* out", body, [out], block=96, shuffle_seed=seed)
    assert out.tolist() == [96 + 96 + 48, 95, 3, FULL, 0, 8, 96]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("load_shared_u32(at + 100);", r"load_shared_u32: 4 bytes at shared address \d+ are out of bounds.*offset 100"),
        ("load_shared_u8(at - 1);", "load_shared_u8: 1 bytes .* out of bounds"),
        ("load_shared_v4(at + 96);", "load_shared_v4: 16 bytes .* out of bounds"),
        ("load_shared_u16(at + 1);", r"load_shared_u16: shared address \d+ is not a multiple of 2"),
        ("load_shared_v2(at + 4);", "is not a multiple of 8"),
        ("store_shared_u32(at + 2, 0);", "is not a multiple of 4"),
        ("store_shared_v4(at + 8, make_uint4(0, 0, 0, 0));", "is not a multiple of 16"),
        ("u32 r[4]; load_matrix_x4(r, at + 8 * lane);", "load_matrix_x4.* is not a multiple of 16"),
        ("u32 s = 0, a = at + 98, w = 0; refill_state(s, a, w);", "refill_state: .* out of bounds"),
        ("shared[4096 + lane] = 1;", r"access fault .* of dynamic shared memory \(100 bytes\)"),
        ("atomicAdd(reinterpret_cast<u32*>(shared) + 25, 1);", "atomicAdd: 4 bytes at shared address .* out of bounds"),
    ],
)
def test_bounds_of_shared_memory(kernel: Kernel, body: str, message: str) -> None:
    prefix = "KVPACK_DYNAMIC_SHARED(shared); u32 at = shared_address(shared); if (thread / 32 == 0) {"
    with pytest.raises(EmulationError, match=rf"block \(2, 0, 0\), thread \(\d+, 0, 0\): .*{message}"):
        kernel("", f"if (blockIdx.x != 2) return; {prefix} {body} }}", [], grid=3, block=64, shared_bytes=100)


def test_too_much_shared_memory(kernel: Kernel) -> None:
    with pytest.raises(EmulationError, match="are more than 232448"):
        kernel("u32* out", "__shared__ u32 a[64]; a[thread] = 1; out[0] = a[1];", [lanes()], shared_bytes=227 * 1024)


# ---- Global memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "out[1] = load_once_u32(in + 32);",
            r"load_once_u32: 4 bytes at byte 128 of argument 0 \(128 bytes, read-only\)",
        ),
        ("out[1] = load_once_v4(in + 25).x;", "load_once_v4: 16 bytes at byte 100 .*: the address is not a multiple"),
        ("out[1] = load_once_v2(in + 1).x;", "load_once_v2: .* is not a multiple of 8"),
        ("out[1] = __ldg(in - 1);", "__ldg: 4 bytes at 4 bytes before argument 0"),
        ("out[1] = load_l2_f32(nullptr);", "load_l2_f32: 4 bytes at a null pointer plus 0 are out of bounds"),
        ("atomicAdd(out + 8, 1);", "atomicAdd: 4 bytes at byte 32 of argument 1 .* out of bounds"),
        ("out[8] = 1;", r"access fault .* at byte 32 of argument 1 \(32 bytes\)"),
        ("out[0] = in[32];", "access fault .* at byte 128 of argument 0"),
        ("out[-1] = 1;", "something was written at 4 bytes before argument 1"),
        ("out[1 << 26] = 1;", "access fault"),
        ("const_cast<u32*>(in)[2] = 1;", "access fault .* at byte 8 of argument 0 .*read-only"),
    ],
)
def test_bounds_of_global_memory(kernel: Kernel, body: str, message: str) -> None:
    values = lanes()
    values.flags.writeable = False
    with pytest.raises(EmulationError, match=message):
        kernel("const u32* in, u32* out", body, [values, np.zeros(8, np.uint32)])


def test_variables_at_file_scope(kernel: Kernel) -> None:
    before = "__device__ u32 counter; __constant__ u32 table[4] = {1, 2, 3, 4};"
    kernel("u32* out", "out[0] = atomicAdd(&counter, __ldg(table + 3)) + 4;", [out := lanes()], before=before)
    assert out[0] == 128


# ---- What the compiler's sanitizer finds ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("__shared__ u32 kept[8]; kept[n + 8] = 1;", "index 8 out of bounds"),
        ("out[0] = 1u << (n + 32);", "shift exponent 32 is too large"),
        ("out[0] = *reinterpret_cast<u32*>(reinterpret_cast<u8*>(out) + 2 + n);", "misaligned address"),
        ("out[0] = (u32)(int)(3e9f + n);", "is outside the range of representable values"),
    ],
)
def test_sanitizer(kernel: Kernel, body: str, message: str) -> None:
    program = emulator.compiler()
    if program is None or not any(flag.startswith("-fsanitize") for flag in emulator._flags(program)):
        pytest.skip("the C++ compiler has no -fsanitize=undefined")
    with pytest.raises(EmulationError, match=rf"(?s){message}.*block \(0, 0, 0\), thread \(0, 0, 0\)"):
        kernel("u32* out, u32 n", body, [lanes(), np.uint32(0)])


# ---- Asynchronous copies --------------------------------------------------------------------------------------------

COPY = "KVPACK_DYNAMIC_SHARED(shared); u32 at = shared_address(shared) + 16 * thread; "


@pytest.mark.parametrize("seed", SEEDS)
def test_copies_in_groups(kernel: Kernel, seed: int | None) -> None:
    data, out = np.arange(3 * 32 * 4, dtype=np.uint32), np.zeros(3 * 32, np.uint32)
    body = """
      for (u32 i = 0; i < 3; ++i) { copy_async_16(at + 512 * i, in + 128 * i + 4 * thread); copy_async_commit(); }
      copy_async_wait<2>(); out[thread] = load_shared_u32(at);
      if (reinterpret_cast<u32*>(shared)[128 + 4 * thread] != 0xFFFFFFFFu) __trap();
      copy_async_wait<1>(); out[32 + thread] = load_shared_v4(at + 512).y;
      copy_async_wait<0>(); __syncwarp();
      out[64 + thread] = load_shared_u32(shared_address(shared) + 1024 + 16 * (31 - thread) + 8);
    """
    kernel("const u32* in, u32* out", COPY + body, [data, out], shared_bytes=1536, shuffle_seed=seed)
    first = 4 * np.arange(32)
    np.testing.assert_array_equal(out, np.concatenate([first, 128 + first + 1, 256 + first[::-1] + 2]))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("copy_async_commit(); load_shared_u8(at + 3);", "an asynchronous copy to it was not waited for"),
        ("copy_async_wait<0>(); load_shared_u8(at);", "an asynchronous copy to it was not waited for"),
        ("copy_async_commit(); copy_async_wait<1>(); load_shared_v4(at);", "was not waited for"),
        ("copy_async_commit(); copy_async_16(at, in); copy_async_commit(); copy_async_wait<0>();", "not waited for"),
        ("copy_async_commit(); store_shared_u8(at + 5, 1);", "store_shared_u8: .* was not waited for"),
        ("copy_async_commit(); shared[5] = 1; copy_async_wait<0>();", r"shared address \d+ was written while a copy"),
        (
            "copy_async_commit(); in[thread * 4] = 77; copy_async_wait<0>();",
            "the source, byte 0 of argument 0 .*, was written",
        ),
        ("copy_async_16(at + 8, in);", "copy_async_16: shared address .* is not a multiple of 16"),
        ("copy_async_16(at, in + 1);", "copy_async_16: .* argument 0 .*: the address is not a multiple of 16"),
        ("copy_async_16(at, in + 128);", "copy_async_16: 16 bytes at byte 512 of argument 0 .* out of bounds"),
        ("copy_async_16(at + 512, in);", "copy_async_16: 16 bytes at shared address .* out of bounds"),
    ],
)
def test_mistakes_with_copies(kernel: Kernel, body: str, message: str) -> None:
    prefix = COPY + "copy_async_16(at, in + 4 * thread);"
    with pytest.raises(EmulationError, match=message):
        kernel("u32* in", prefix + body, [np.arange(128, dtype=np.uint32)], shared_bytes=512)


# ---- Arithmetic -----------------------------------------------------------------------------------------------------


def test_dp2a_and_bits(kernel: Kernel) -> None:
    random = np.random.default_rng(1)
    a, b, c = random.integers(0, 1 << 32, (3, 1024), dtype=np.uint32)
    out = np.zeros((9, 1024), np.uint32)
    body = """
      u32* to = out + thread; u32 x = a[thread], y = b[thread], z = c[thread];
      to[0] = dp2a_low(x, y, z); to[1024] = dp2a_high(x, y, z);
      to[2048] = __byte_perm(x, y, z & 0x7777); to[3072] = __umulhi(x, y);
      to[4096] = __funnelshift_l(x, y, z); to[5120] = __funnelshift_r(x, y, z);
      to[6144] = __brev(x); to[7168] = (u32)__mulhi((int)x, (int)y);
      to[8192] = __popc(x) | __clz(x) << 8 | __ffs(x) << 16 | min(1, 2u) << 24;
    """
    kernel("const u32* a, const u32* b, const u32* c, u32* out", body, [a, b, c, out], block=1024)
    halves, octets = a.view(np.int16).reshape(-1, 2).astype(np.int64), b.view(np.uint8).reshape(-1, 4).astype(np.int64)
    for row in range(2):
        total = c + (halves * octets[:, 2 * row : 2 * row + 2]).sum(axis=1)
        np.testing.assert_array_equal(out[row], total.astype(np.uint32))
    both = np.concatenate([a, b]).reshape(2, -1).T.copy().view(np.uint8)
    chosen = [both[np.arange(1024), c >> (4 * i) & 7] for i in range(4)]
    np.testing.assert_array_equal(out[2], np.stack(chosen, 1).copy().view(np.uint32)[:, 0])
    wide = b.astype(np.uint64) << np.uint64(32) | a
    shift = (c & 31).astype(np.uint64)
    np.testing.assert_array_equal(out[3], (a.astype(np.uint64) * b) >> np.uint64(32))
    np.testing.assert_array_equal(out[4], (wide << shift) >> np.uint64(32))
    np.testing.assert_array_equal(out[5], (wide >> shift) & np.uint64(FULL))
    text = [f"{x:032b}" for x in a]
    np.testing.assert_array_equal(out[6], [int(x[::-1], 2) for x in text])
    signed = a.view(np.int32).astype(np.int64) * b.view(np.int32)
    np.testing.assert_array_equal(out[7], (signed >> 32).astype(np.uint32))
    expected = [x.count("1") | x.index("1") << 8 | 32 - x.rindex("1") << 16 | 1 << 24 for x in text]
    np.testing.assert_array_equal(out[8], expected)


def test_conversions_agree_with_numpy(kernel: Kernel) -> None:
    random = np.random.default_rng(2)
    bits = random.integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    halfway = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32) + 0x1000
    edges = np.array([0x477FEFFF, 0x477FF000, 0x33000000, 0x33000001, 0x387FFFFF, 1, 0x807FFFFF], np.uint32)
    values = np.concatenate([bits, halfway, halfway - 1, halfway + 1, edges]).view(np.float32)
    values = values[~np.isnan(values)]
    half, brain, back = np.zeros((3, values.size), np.uint32)
    body = """
      for (u32 i = thread; i < count; i += 32) {
        half[i] = f16_bits(values[i]);
        brain[i] = bf16_bits(values[i]);
        back[i] = __float_as_uint(f16_value(i));
      }
    """
    args = [values, np.uint32(values.size), half, brain, back]
    kernel("const float* values, u32 count, u32* half, u32* brain, u32* back", body, args)
    with np.errstate(over="ignore", under="ignore"):
        np.testing.assert_array_equal(half, values.astype(np.float16).view(np.uint16))
        np.testing.assert_array_equal(brain, values.astype(ml_dtypes.bfloat16).view(np.uint16))
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    np.testing.assert_array_equal(back.view(np.float32)[: 1 << 16], every.astype(np.float32))


def test_arithmetic_flushes_denormals_and_conversions_do_not(kernel: Kernel) -> None:
    values = np.array([1e-30, 1e-10, 1e-40, 1e-5], np.float32)
    out = np.zeros(6, np.uint32)
    body = """
      if (thread != 0) return;
      out[0] = __float_as_uint(multiply_rn(values[0], values[1]));
      out[1] = __float_as_uint(__fmaf_rn(values[0], values[1], 0.0f));
      out[2] = __float_as_uint(__fadd_rn(values[2], values[2]));
      out[3] = bf16_bits(values[2]);
      out[4] = f16x2_bits(values[3], 1.0f);
      out[5] = sub_f16x2(0x00020400, 0x000103FF);
    """
    kernel("const float* values, u32* out", body, [values, out])
    expected = values[2:3].astype(ml_dtypes.bfloat16).view(np.uint16)[0]
    assert out.tolist() == [0, 0, 0, expected, 0x3C000000 | int(np.float16(values[3]).view(np.uint16)), 0x00010001]


def test_float_to_int(kernel: Kernel) -> None:
    values = np.array([0.5, 1.5, -2.5, 1e10, -1e10, np.nan, 7.9], np.float32)
    out = np.zeros(7, np.int32)
    kernel("const float* v, int* out", "if (thread < 7) out[thread] = __float2int_rn(v[thread]);", [values, out])
    assert out.tolist() == [0, 2, -2, 2**31 - 1, -(2**31), 0, 8]
    wide = np.zeros(7, np.uint64)
    kernel("const float* v, u64* out", "if (thread < 7) out[thread] = __float2ull_rn(v[thread]);", [values, wide])
    assert wide.tolist() == [0, 2, 0, 10**10, 0, 2**63, 8]


@pytest.mark.parametrize("seed", SEEDS)
def test_matrices(kernel: Kernel, seed: int | None) -> None:
    """C += A·B, A [16, 16] row-major in shared memory, B [8, 16] column-major, by the fragments of the PTX manual."""
    random = np.random.default_rng(3)
    a, b = random.integers(-8, 8, (16, 16)).astype(np.float16), random.integers(-8, 8, (8, 16)).astype(np.float16)
    c = random.integers(-100, 100, (16, 8)).astype(np.float32)
    expected = a.astype(np.float32) @ b.astype(np.float32).T + c
    body = """
      __shared__ __align__(16) u16 as[16][16];
      for (u32 i = lane; i < 256; i += 32) as[i / 16][i % 16] = a[i];
      __syncwarp();
      u32 fragment[4];
      load_matrix_x4(fragment, shared_address(&as[lane % 8 + lane / 8 % 2 * 8][lane / 16 * 8]));
      const u32* column = reinterpret_cast<const u32*>(b + lane / 4 * 16);
      float sums[4];
      for (u32 i = 0; i < 4; ++i) sums[i] = c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2];
      mma_f16(sums, fragment, column[lane % 4], column[lane % 4 + 4]);
      for (u32 i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
    """
    kernel("const u16* a, const u16* b, float* c", body, [a, b, c], shuffle_seed=seed)
    np.testing.assert_array_equal(c, expected)


def test_matrices_need_the_whole_warp(kernel: Kernel) -> None:
    body = "float c[4] = {}; u32 a[4] = {}; if (lane != 9) mma_f16(c, a, 0, 0);"
    with pytest.raises(EmulationError, match="mma_f16: lanes 00000200 have returned or do not exist"):
        kernel("", body, [])


@pytest.mark.parametrize("seed", SEEDS)
def test_refill(kernel: Kernel, seed: int | None) -> None:
    out = np.zeros((3, 32), np.uint32)
    body = """
      __shared__ u16 words[34];
      words[lane] = 0xA000 + lane; words[32] = words[33] = 1;
      __syncwarp();
      u32 state = lane % 2 ? 65536 : 0x1234, address = shared_address(words + lane), word = load_shared_u16(address);
      refill_state(state, address, word);
      out[lane] = state; out[32 + lane] = address - shared_address(words); out[64 + lane] = word;
    """
    kernel("u32* out", body, [out], shuffle_seed=seed)
    lane = np.arange(32)
    even = lane % 2 == 0
    np.testing.assert_array_equal(out[0], np.where(even, 0x1234A000 + lane, 65536))
    np.testing.assert_array_equal(out[1], 2 * lane + 2 * even)
    np.testing.assert_array_equal(out[2], 0xA000 + lane + even)
