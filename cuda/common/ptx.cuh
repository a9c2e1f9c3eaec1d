// All inline PTX of the project, behind functions. sm_80 and newer.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char s8;
typedef short s16;
typedef int s32;

#ifdef KVPACK_EMULATED
#include <emulated_ptx.h>
#else

#define KVPACK_DYNAMIC_SHARED(name) extern __shared__ __align__(128) u8 name[]

// Addresses in shared memory are 32 bits wide; the functions below take them so.
__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ u32 load_shared_u32(u32 address) {
  u32 value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address));
  return value;
}

__device__ __forceinline__ u32 load_shared_u16(u32 address) {
  u16 value;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(address));
  return value;
}

__device__ __forceinline__ u32 load_shared_u8(u32 address) {
  u32 value;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(value) : "r"(address));
  return value;
}

__device__ __forceinline__ float load_shared_f32(u32 address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address));
  return value;
}

__device__ __forceinline__ uint2 load_shared_v2(u32 address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}

__device__ __forceinline__ uint4 load_shared_v4(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}

__device__ __forceinline__ void store_shared_u8(u32 address, u32 value) {
  asm volatile("st.shared.u8 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void store_shared_u16(u32 address, u32 value) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(static_cast<u16>(value)) : "memory");
}

__device__ __forceinline__ void store_shared_u32(u32 address, u32 value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void store_shared_v2(u32 address, uint2 v) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(v.x), "r"(v.y) : "memory");
}

__device__ __forceinline__ void store_shared_v4(u32 address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// if (state < 2^16): state = state << 16 | word, and word = the next one, 2 bytes on. Four predicated instructions: from C++ the
// address takes a fifth.
__device__ __forceinline__ void refill_state(u32& state, u32& word_address, u32& word) {
  asm volatile(
      "{\n"
      ".reg .pred below;\n"
      "setp.lo.u32 below, %0, %3;\n"
      "@below prmt.b32 %0, %2, %0, 0x5410;\n"
      "@below add.u32 %1, %1, 2;\n"
      "@below ld.shared.u16 %2, [%1];\n"
      "}"
      : "+r"(state), "+r"(word_address), "+r"(word)
      : "n"(KVPACK_STATE_LOW));
}

// The same where words lie in a ring of 128 bytes at `ring`, a multiple of 128; `word_at` counts on.
__device__ __forceinline__ void refill_state_of_ring(u32& state, u32& word_at, u32& word, u32 ring) {
  asm volatile(
      "{\n"
      ".reg .pred below;\n"
      ".reg .u32 address;\n"
      "setp.lo.u32 below, %0, %4;\n"
      "@below prmt.b32 %0, %2, %0, 0x5410;\n"
      "@below add.u32 %1, %1, 2;\n"
      "lop3.b32 address, %1, 126, %3, 0xEA;\n"
      "@below ld.shared.u16 %2, [address];\n"
      "}"
      : "+r"(state), "+r"(word_at), "+r"(word)
      : "r"(ring), "n"(KVPACK_STATE_LOW));
}

// Asynchronous copy of 16 bytes, both addresses multiples of 16.
__device__ __forceinline__ void copy_async_16(u32 shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `newest` of this thread's committed groups are still under way.
template <int newest>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory");
}

// Copies of any multiple of 16 bytes, asked for by one thread, and barriers in shared memory (8 bytes) that count them: sm_90 and newer.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define KVPACK_BULK_COPIES 1
__device__ __forceinline__ void barrier_init(u32 barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}
// Applies to copies that come after it.
__device__ __forceinline__ void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// The barrier's phase ends when the bytes have come.
__device__ __forceinline__ void copy_bulk(u32 shared, const void* global, u32 bytes, u32 barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared), "l"(global), "r"(bytes),
               "r"(barrier)
               : "memory");
}
// Waits for the end of a phase; its parity is that of its number, from 0.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
#endif

// Loads of data that is used once: past L1.
__device__ __forceinline__ u32 load_once_u32(const void* global) {
  u32 value;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(value) : "l"(global));
  return value;
}
__device__ __forceinline__ uint2 load_once_v2(const void* global) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(global));
  return v;
}
__device__ __forceinline__ uint4 load_once_v4(const void* global) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(global));
  return v;
}

// Loads that another block's stores before its fence are visible to: from L2.
__device__ __forceinline__ float load_l2_f32(const float* global) {
  float value;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(global) : "memory");
  return value;
}
__device__ __forceinline__ float4 load_l2_v4(const float4* global) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(global) : "memory");
  return v;
}

// Orders this thread's accesses to global memory, for threads of the whole device. __threadfence() orders sequentially
// consistent accesses too, and takes longer.
__device__ __forceinline__ void fence_device() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// A barrier for some warps of a block: those that call it with the same number, 1 … 15, `threads` in all. It orders their accesses to
// shared memory as __syncthreads() does, which is number 0.
__device__ __forceinline__ void sync_warps(u32 number, u32 threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Atomic, in shared memory.
__device__ __forceinline__ void max_shared_u32(u32 address, u32 value) {
  asm volatile("red.shared.max.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

// 1 / value to within a unit in the last place.
__device__ __forceinline__ float reciprocal(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

__device__ __forceinline__ void store_shared_f32(u32 address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ __forceinline__ float4 load_shared_f32x4(u32 address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address));
  return v;
}
__device__ __forceinline__ void store_shared_f32x4(u32 address, const float4& v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}

// Two products of i16 (a) with two unsigned bytes of b, the lower or the upper ones, added to c.
__device__ __forceinline__ int dp2a_low(u32 a, u32 b, int c) {
  int d;
  asm("dp2a.lo.s32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ __forceinline__ int dp2a_high(u32 a, u32 b, int c) {
  int d;
  asm("dp2a.hi.s32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Four 8 × 8 matrices of 16-bit numbers; lane l gives the address of a row of matrix l / 8.
__device__ __forceinline__ void load_matrix_x4(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

// c += a · b: 16 × 16 by 16 × 8, fp16 with fp32 sums.
__device__ __forceinline__ void mma_f16(float* c, const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same of bf16.
__device__ __forceinline__ void mma_bf16(float* c, const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// An 8 × 8 matrix of 16-bit numbers, of which lane 4·r + j holds numbers 2·j and 2·j + 1 of row r, transposed.
__device__ __forceinline__ u32 transpose_matrix(u32 pair) {
  u32 transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// 2^x to within 2 units in the last place.
__device__ __forceinline__ float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// (a & mask) | bits in one instruction: of two constants the compiler makes two.
__device__ __forceinline__ u32 and_or(u32 a, u32 mask, u32 bits) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(mask), "r"(bits));
  return d;
}

// Two fp16 in a register.
__device__ __forceinline__ u32 mul_f16x2(u32 a, u32 b) {
  u32 d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ u32 fma_f16x2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ __forceinline__ u32 sub_f16x2(u32 a, u32 b) {
  u32 d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// Conversions, rounding to nearest even; denormal fp16 and bf16 results are kept.
__device__ __forceinline__ u32 f16_bits(float value) {
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
__device__ __forceinline__ u32 bf16_bits(float value) {
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
__device__ __forceinline__ float f16_value(u32 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<u16>(bits)));
  return value;
}
// The first argument goes to the lower half.
__device__ __forceinline__ u32 f16x2_bits(float low, float high) {
  u32 bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
__device__ __forceinline__ u32 bf16x2_bits(float low, float high) {
  u32 bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
// What is made of this is computed where it stands, rather than before a loop, where it would take a register.
__device__ __forceinline__ u32 computed_anew(u32 value) {
  asm volatile("" : "+r"(value));
  return value;
}
// One IEEE product: not contracted with a sum. Denormal results become 0, as everywhere under -ftz.
__device__ __forceinline__ float multiply_rn(float a, float b) { return __fmul_rn(a, b); }

// IEEE operations with denormals, which -ftz does not touch, and never contracted: what NumPy does.
#define KVPACK_IEEE(name, instruction)                                             \
  __device__ __forceinline__ float name(float a, float b) {                        \
    float result;                                                                  \
    asm(instruction ".f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));           \
    return result;                                                                 \
  }
KVPACK_IEEE(add_ieee, "add.rn")
KVPACK_IEEE(subtract_ieee, "sub.rn")
KVPACK_IEEE(multiply_ieee, "mul.rn")
KVPACK_IEEE(divide_ieee, "div.rn")
KVPACK_IEEE(add_down_ieee, "add.rm")  // rounded down
// A number where the other one is NaN.
KVPACK_IEEE(min_ieee, "min")
KVPACK_IEEE(max_ieee, "max")
// NaN where one of them is.
KVPACK_IEEE(min_nan, "min.NaN")
KVPACK_IEEE(max_nan, "max.NaN")
#undef KVPACK_IEEE
__device__ __forceinline__ float square_root_ieee(float a) {
  float result;
  asm("sqrt.rn.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}
// Denormals and -0 become 0.
__device__ __forceinline__ float without_denormals(float a) {
  float result;
  asm("add.rn.ftz.f32 %0, %1, 0f00000000;" : "=f"(result) : "f"(a));
  return result;
}

// The instruction on each half of a and b; NaN where either half is.
#define KVPACK_HALVES(name, instruction)                                           \
  __device__ __forceinline__ u32 name(u32 a, u32 b) {                              \
    u32 result;                                                                    \
    asm(instruction " %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));               \
    return result;                                                                 \
  }
KVPACK_HALVES(min_nan_f16x2, "min.NaN.f16x2")
KVPACK_HALVES(max_nan_f16x2, "max.NaN.f16x2")
KVPACK_HALVES(min_nan_bf16x2, "min.NaN.bf16x2")
KVPACK_HALVES(max_nan_bf16x2, "max.NaN.bf16x2")
#undef KVPACK_HALVES

// What is computed from a value behind this is computed again, not kept from before it.
__device__ __forceinline__ void forget(u32& value) { asm volatile("" : "+r"(value)); }
// Of the lane `distance` in front, or 0 if there is none; called by all lanes. What shfl itself says of that takes no register.
template <u32 distance>
__device__ __forceinline__ u32 of_lane_before(u32 value) {
  u32 other;
  asm volatile("{\n.reg .pred there;\nshfl.sync.up.b32 %0|there, %1, %2, 0, 0xffffffff;\n@!there mov.b32 %0, 0;\n}\n"
               : "=r"(other)
               : "r"(value), "n"(distance));
  return other;
}
template <u32 distance>
__device__ __forceinline__ void xor_of_lane_before(u32& value) {
  asm volatile(
      "{\n.reg .pred there;\n.reg .b32 other;\nshfl.sync.up.b32 other|there, %0, %1, 0, 0xffffffff;\n@there xor.b32 %0, %0, other;\n}\n"
      : "+r"(value)
      : "n"(distance));
}

#endif
