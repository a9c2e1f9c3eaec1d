// What the CUDA sources use of CUDA C++ and of cuda/ptx.cuh, for a C++ compiler of the host.
//
// It is included at global scope before a source, which is then compiled inside an unnamed namespace: so all its
// functions have internal linkage, and `__shared__` variables of templates and inline functions can share one section.
#pragma once

#include "execution.h"
#include "launch.h"

// ---- Language -------------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("kvpack_shared")))
#define __builtin_assume(condition) ((void)0)
#define __builtin_align__(n) __attribute__((aligned(n)))
#define KVPACK_DYNAMIC_SHARED(name) [[maybe_unused]] unsigned char*& name = emulated::dynamic_shared

#define threadIdx (emulated::current->index)
#define blockIdx (emulated::block_index)
#define blockDim (emulated::block_size)
#define gridDim (emulated::grid_size)
#define warpSize 32

#define KVPACK_EMULATED_VECTOR(type, scalar)                                    \
  struct __align__(2 * sizeof(scalar)) type##2 {                                \
    scalar x, y;                                                                \
  };                                                                            \
  struct __align__(4 * sizeof(scalar)) type##4 {                                \
    scalar x, y, z, w;                                                          \
  };                                                                            \
  inline type##2 make_##type##2(scalar x, scalar y) { return {x, y}; }          \
  inline type##4 make_##type##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
KVPACK_EMULATED_VECTOR(uint, unsigned int)
KVPACK_EMULATED_VECTOR(int, int)
KVPACK_EMULATED_VECTOR(float, float)
KVPACK_EMULATED_VECTOR(uchar, unsigned char)
KVPACK_EMULATED_VECTOR(char, signed char)
KVPACK_EMULATED_VECTOR(ushort, unsigned short)
KVPACK_EMULATED_VECTOR(short, short)
#undef KVPACK_EMULATED_VECTOR
struct __align__(16) ulonglong2 {
  unsigned long long x, y;
};
struct __align__(16) longlong2 {
  long long x, y;
};
inline ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) { return {x, y}; }
inline longlong2 make_longlong2(long long x, long long y) { return {x, y}; }
inline uint3 make_uint3(unsigned int x, unsigned int y, unsigned int z) { return {x, y, z}; }

// ---- Bits and integers ----------------------------------------------------------------------------------------------

namespace emulated {
template <typename To, typename From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same number of bytes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}
}  // namespace emulated

inline unsigned int __float_as_uint(float x) { return emulated::bits_as<unsigned int>(x); }
inline int __float_as_int(float x) { return emulated::bits_as<int>(x); }
inline float __uint_as_float(unsigned int x) { return emulated::bits_as<float>(x); }
inline float __int_as_float(int x) { return emulated::bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return emulated::bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return emulated::bits_as<double>(x); }

inline int __popc(unsigned int x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned int>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned int __brev(unsigned int x) {
  unsigned int reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}
inline unsigned int __umulhi(unsigned int a, unsigned int b) {
  return static_cast<unsigned int>(static_cast<unsigned long long>(a) * b >> 32);
}
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<long long>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned int __funnelshift_l(unsigned int low, unsigned int high, unsigned int shift) {
  return static_cast<unsigned int>((static_cast<unsigned long long>(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned int __funnelshift_r(unsigned int low, unsigned int high, unsigned int shift) {
  return static_cast<unsigned int>((static_cast<unsigned long long>(high) << 32 | low) >> (shift & 31));
}
inline unsigned int __funnelshift_lc(unsigned int low, unsigned int high, unsigned int shift) {
  return shift >= 32 ? low : __funnelshift_l(low, high, shift);
}
inline unsigned int __funnelshift_rc(unsigned int low, unsigned int high, unsigned int shift) {
  return shift >= 32 ? high : __funnelshift_r(low, high, shift);
}
inline unsigned int __byte_perm(unsigned int a, unsigned int b, unsigned int selector) {
  const unsigned long long bytes = static_cast<unsigned long long>(b) << 32 | a;
  // The documents say that bit 3 is ignored, the instruction repeats a sign bit.
  if (selector & 0x8888) emulated::fail("__byte_perm: bit 3 of a selector's digit is set (%04x)", selector & 0xFFFF);
  unsigned int result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned int>(bytes >> (selector >> (4 * i) & 7) * 8 & 0xFF) << (8 * i);
  }
  return result;
}
inline unsigned int __dp4a(unsigned int a, unsigned int b, unsigned int c) {
  for (int i = 0; i < 4; ++i) c += (a >> (8 * i) & 0xFF) * (b >> (8 * i) & 0xFF);
  return c;
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += static_cast<signed char>(a >> (8 * i)) * static_cast<signed char>(b >> (8 * i));
  return c;
}

#define KVPACK_EMULATED_EXTREMES(type)                       \
  inline type min(type a, type b) { return a < b ? a : b; }  \
  inline type max(type a, type b) { return a > b ? a : b; }
KVPACK_EMULATED_EXTREMES(int)
KVPACK_EMULATED_EXTREMES(unsigned int)
KVPACK_EMULATED_EXTREMES(long)
KVPACK_EMULATED_EXTREMES(unsigned long)
KVPACK_EMULATED_EXTREMES(long long)
KVPACK_EMULATED_EXTREMES(unsigned long long)
#undef KVPACK_EMULATED_EXTREMES
#define KVPACK_EMULATED_MIXED(a_type, b_type, type)                                                      \
  inline type min(a_type a, b_type b) { return min(static_cast<type>(a), static_cast<type>(b)); }        \
  inline type max(a_type a, b_type b) { return max(static_cast<type>(a), static_cast<type>(b)); }
KVPACK_EMULATED_MIXED(int, unsigned int, unsigned int)
KVPACK_EMULATED_MIXED(unsigned int, int, unsigned int)
KVPACK_EMULATED_MIXED(long, unsigned long, unsigned long)
KVPACK_EMULATED_MIXED(unsigned long, long, unsigned long)
KVPACK_EMULATED_MIXED(long long, unsigned long long, unsigned long long)
KVPACK_EMULATED_MIXED(unsigned long long, long long, unsigned long long)
#undef KVPACK_EMULATED_MIXED
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(float a, double b) { return fmin(a, b); }
inline double max(float a, double b) { return fmax(a, b); }
inline double min(double a, float b) { return fmin(a, b); }
inline double max(double a, float b) { return fmax(a, b); }

// ---- Floating point -------------------------------------------------------------------------------------------------

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
// The approximate ones are exact here.
inline float __fdividef(float a, float b) { return a / b; }
inline float __frsqrt_rn(float a) { return static_cast<float>(1.0 / sqrt(static_cast<double>(a))); }
inline float rsqrtf(float a) { return __frsqrt_rn(a); }
inline float __expf(float a) { return expf(a); }
inline float __exp2f(float a) { return exp2f(a); }
inline float __logf(float a) { return logf(a); }
inline float __log2f(float a) { return log2f(a); }
inline float __saturatef(float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }

// Conversions to integers saturate; NaN becomes 0, of 64 bits the highest one.
namespace emulated {
inline int to_int(float x) {
  return x != x ? 0 : x >= 2147483648.0f ? 0x7FFFFFFF : x < -2147483648.0f ? -0x7FFFFFFF - 1 : static_cast<int>(x);
}
inline unsigned int to_uint(float x) {
  return !(x > 0.0f) ? 0u : x >= 4294967296.0f ? 0xFFFFFFFFu : static_cast<unsigned int>(x);
}
inline unsigned long long to_ulong(float x) {
  if (x != x) return 1ull << 63;
  return !(x > 0.0f) ? 0u : x >= 0x1p64f ? ~0ull : static_cast<unsigned long long>(x);
}
}  // namespace emulated
inline int __float2int_rn(float x) { return emulated::to_int(rintf(x)); }
inline int __float2int_rz(float x) { return emulated::to_int(x); }
inline int __float2int_rd(float x) { return emulated::to_int(floorf(x)); }
inline int __float2int_ru(float x) { return emulated::to_int(ceilf(x)); }
inline unsigned int __float2uint_rn(float x) { return emulated::to_uint(rintf(x)); }
inline unsigned int __float2uint_rz(float x) { return emulated::to_uint(x); }
inline unsigned int __float2uint_rd(float x) { return emulated::to_uint(floorf(x)); }
inline unsigned int __float2uint_ru(float x) { return emulated::to_uint(ceilf(x)); }
inline unsigned long long __float2ull_rn(float x) { return emulated::to_ulong(rintf(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned int x) { return static_cast<float>(x); }
inline float __ull2float_rn(unsigned long long x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }

// ---- Barriers, warps ------------------------------------------------------------------------------------------------

inline void __syncthreads() { emulated::block_operation(emulated::Operation::barrier, 0); }
inline int __syncthreads_or(int x) {
  return static_cast<int>(emulated::block_operation(emulated::Operation::barrier_or, x != 0));
}
inline int __syncthreads_and(int x) {
  return static_cast<int>(emulated::block_operation(emulated::Operation::barrier_and, x != 0));
}
inline int __syncthreads_count(int x) {
  return static_cast<int>(emulated::block_operation(emulated::Operation::barrier_count, x != 0));
}
inline void __syncwarp(unsigned int mask = 0xFFFFFFFFu) {
  emulated::warp_operation(emulated::Operation::sync, mask, 0);
}
inline unsigned int __activemask() {
  return static_cast<unsigned int>(
      emulated::warp_operation(emulated::Operation::active, 1u << emulated::current->lane, 0));
}
inline unsigned int __ballot_sync(unsigned int mask, int x) {
  return static_cast<unsigned int>(emulated::warp_operation(emulated::Operation::ballot, mask, x != 0));
}
inline int __any_sync(unsigned int mask, int x) {
  return static_cast<int>(emulated::warp_operation(emulated::Operation::any, mask, x != 0));
}
inline int __all_sync(unsigned int mask, int x) {
  return static_cast<int>(emulated::warp_operation(emulated::Operation::all, mask, x != 0));
}

namespace emulated {
template <typename T>
inline T shuffle_value(Operation operation, u32 mask, T value, u32 parameter, int width) {
  u64 bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = warp_operation(operation, mask, bits, parameter, static_cast<u32>(width));
  memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace emulated

#define KVPACK_EMULATED_SHUFFLES(type)                                                                       \
  inline type __shfl_sync(unsigned int mask, type value, int lane, int width = 32) {                         \
    return emulated::shuffle_value(emulated::Operation::shuffle, mask, value, unsigned(lane), width);        \
  }                                                                                                          \
  inline type __shfl_up_sync(unsigned int mask, type value, unsigned int delta, int width = 32) {            \
    return emulated::shuffle_value(emulated::Operation::shuffle_up, mask, value, delta, width);              \
  }                                                                                                          \
  inline type __shfl_down_sync(unsigned int mask, type value, unsigned int delta, int width = 32) {          \
    return emulated::shuffle_value(emulated::Operation::shuffle_down, mask, value, delta, width);            \
  }                                                                                                          \
  inline type __shfl_xor_sync(unsigned int mask, type value, int lanes, int width = 32) {                    \
    return emulated::shuffle_value(emulated::Operation::shuffle_xor, mask, value, unsigned(lanes), width);   \
  }
KVPACK_EMULATED_SHUFFLES(int)
KVPACK_EMULATED_SHUFFLES(unsigned int)
KVPACK_EMULATED_SHUFFLES(long)
KVPACK_EMULATED_SHUFFLES(unsigned long)
KVPACK_EMULATED_SHUFFLES(long long)
KVPACK_EMULATED_SHUFFLES(unsigned long long)
KVPACK_EMULATED_SHUFFLES(float)
KVPACK_EMULATED_SHUFFLES(double)
#undef KVPACK_EMULATED_SHUFFLES

template <typename T>
inline unsigned int __match_any_sync(unsigned int mask, T value) {
  unsigned long long bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return static_cast<unsigned int>(emulated::warp_operation(emulated::Operation::match_any, mask, bits));
}
template <typename T>
inline unsigned int __match_all_sync(unsigned int mask, T value, int* all) {
  unsigned long long bits = 0;
  memcpy(&bits, &value, sizeof(T));
  const unsigned long long lanes = emulated::warp_operation(emulated::Operation::match_all, mask, bits);
  *all = lanes != 0;
  return static_cast<unsigned int>(lanes);
}

#define KVPACK_EMULATED_REDUCTION(name, type, operation)                                                             \
  inline type name(unsigned int mask, type value) {                                                                  \
    return static_cast<type>(                                                                                        \
        emulated::warp_operation(emulated::Operation::operation, mask, static_cast<unsigned int>(value)));           \
  }
KVPACK_EMULATED_REDUCTION(__reduce_add_sync, unsigned int, reduce_add)
KVPACK_EMULATED_REDUCTION(__reduce_add_sync, int, reduce_add)
KVPACK_EMULATED_REDUCTION(__reduce_min_sync, unsigned int, reduce_min)
KVPACK_EMULATED_REDUCTION(__reduce_min_sync, int, reduce_min_signed)
KVPACK_EMULATED_REDUCTION(__reduce_max_sync, unsigned int, reduce_max)
KVPACK_EMULATED_REDUCTION(__reduce_max_sync, int, reduce_max_signed)
KVPACK_EMULATED_REDUCTION(__reduce_and_sync, unsigned int, reduce_and)
KVPACK_EMULATED_REDUCTION(__reduce_or_sync, unsigned int, reduce_or)
KVPACK_EMULATED_REDUCTION(__reduce_xor_sync, unsigned int, reduce_xor)
#undef KVPACK_EMULATED_REDUCTION

// ---- Memory ---------------------------------------------------------------------------------------------------------

// Where threads may see each other's stores, a shuffled run lets others go first.
namespace emulated {
inline void maybe_yield() {
  if (shuffled && (random_below(2) != 0)) yield_thread();
}
template <typename T>
struct Same {
  typedef T type;
};
}  // namespace emulated

inline void __threadfence() { emulated::maybe_yield(); }
inline void __threadfence_block() { emulated::maybe_yield(); }
inline void __threadfence_system() { emulated::maybe_yield(); }
inline void __nanosleep(unsigned int) { emulated::yield_thread(); }
[[noreturn]] inline void __trap() { emulated::fail("__trap"); }
inline size_t __cvta_generic_to_shared(const void* pointer) { return emulated::address_of_shared(pointer); }

#define KVPACK_EMULATED_LOAD(name)                                \
  template <typename T>                                           \
  inline T name(const T* pointer) {                               \
    emulated::check_global(pointer, sizeof(T), alignof(T), #name); \
    return *pointer;                                              \
  }
KVPACK_EMULATED_LOAD(__ldg)
KVPACK_EMULATED_LOAD(__ldcg)
KVPACK_EMULATED_LOAD(__ldca)
KVPACK_EMULATED_LOAD(__ldcs)
KVPACK_EMULATED_LOAD(__ldcv)
#undef KVPACK_EMULATED_LOAD
#define KVPACK_EMULATED_STORE(name)                                        \
  template <typename T>                                                    \
  inline void name(T* pointer, typename emulated::Same<T>::type value) {   \
    emulated::check_global(pointer, sizeof(T), alignof(T), #name);         \
    *pointer = value;                                                      \
  }
KVPACK_EMULATED_STORE(__stcg)
KVPACK_EMULATED_STORE(__stcs)
KVPACK_EMULATED_STORE(__stwb)
KVPACK_EMULATED_STORE(__stwt)
#undef KVPACK_EMULATED_STORE

#define KVPACK_EMULATED_ATOMIC(name, expression)                                  \
  template <typename T>                                                           \
  inline T name(T* pointer, typename emulated::Same<T>::type value) {             \
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, #name ": 32 or 64 bits");     \
    emulated::maybe_yield();                                                      \
    emulated::check_generic(pointer, sizeof(T), #name);                           \
    const T old = *pointer;                                                       \
    *pointer = static_cast<T>(expression);                                        \
    return old;                                                                   \
  }
KVPACK_EMULATED_ATOMIC(atomicAdd, old + value)
KVPACK_EMULATED_ATOMIC(atomicSub, old - value)
KVPACK_EMULATED_ATOMIC(atomicMin, value < old ? value : old)
KVPACK_EMULATED_ATOMIC(atomicMax, value > old ? value : old)
KVPACK_EMULATED_ATOMIC(atomicAnd, old & value)
KVPACK_EMULATED_ATOMIC(atomicOr, old | value)
KVPACK_EMULATED_ATOMIC(atomicXor, old ^ value)
#undef KVPACK_EMULATED_ATOMIC
// These two are what loops wait with.
template <typename T>
inline T atomicExch(T* pointer, typename emulated::Same<T>::type value) {
  emulated::yield_thread();
  emulated::check_generic(pointer, sizeof(T), "atomicExch");
  const T old = *pointer;
  *pointer = value;
  return old;
}
template <typename T>
inline T atomicCAS(T* pointer, typename emulated::Same<T>::type compare, typename emulated::Same<T>::type value) {
  emulated::yield_thread();
  emulated::check_generic(pointer, sizeof(T), "atomicCAS");
  const T old = *pointer;
  if (old == compare) *pointer = value;
  return old;
}

// ---- The functions of cuda/ptx.cuh, in its order --------------------------------------------------------------------

inline unsigned int shared_address(const void* pointer) { return emulated::address_of_shared(pointer); }

namespace emulated {
template <typename T, u32 alignment = sizeof(T)>
inline T load_shared(u32 address, const char* what) {
  T value;
  memcpy(&value, shared_pointer<sizeof(T), alignment>(address, what), sizeof(T));
  return value;
}
template <typename T>
inline void store_shared(u32 address, T value, const char* what) {
  memcpy(shared_pointer<sizeof(T), sizeof(T)>(address, what), &value, sizeof(T));
}
template <typename T>
inline T load_global(const void* pointer, const char* what) {
  check_global(pointer, sizeof(T), sizeof(T), what);
  T value;
  memcpy(&value, pointer, sizeof(T));
  return value;
}
}  // namespace emulated

inline unsigned int load_shared_u32(unsigned int address) {
  return emulated::load_shared<unsigned int>(address, "load_shared_u32");
}
inline unsigned int load_shared_u16(unsigned int address) {
  return emulated::load_shared<unsigned short>(address, "load_shared_u16");
}
inline unsigned int load_shared_u8(unsigned int address) {
  return emulated::load_shared<unsigned char>(address, "load_shared_u8");
}
inline uint2 load_shared_v2(unsigned int address) { return emulated::load_shared<uint2>(address, "load_shared_v2"); }
inline uint4 load_shared_v4(unsigned int address) { return emulated::load_shared<uint4>(address, "load_shared_v4"); }

inline void store_shared_u8(unsigned int address, unsigned int value) {
  emulated::store_shared(address, static_cast<unsigned char>(value), "store_shared_u8");
}
inline void store_shared_u16(unsigned int address, unsigned int value) {
  emulated::store_shared(address, static_cast<unsigned short>(value), "store_shared_u16");
}
inline void store_shared_u32(unsigned int address, unsigned int value) {
  emulated::store_shared(address, value, "store_shared_u32");
}
inline void store_shared_v2(unsigned int address, uint2 v) { emulated::store_shared(address, v, "store_shared_v2"); }
inline void store_shared_v4(unsigned int address, uint4 v) { emulated::store_shared(address, v, "store_shared_v4"); }

#ifdef KVPACK_STATE_LOW
inline void refill_state(unsigned int& state, unsigned int& word_address, unsigned int& word) {
  if (state >= KVPACK_STATE_LOW) return;
  state = state << 16 | (word & 0xFFFF);
  word_address += 2;
  word = emulated::load_shared<unsigned short>(word_address, "refill_state");
}
inline void refill_state_of_ring(unsigned int& state, unsigned int& word_at, unsigned int& word, unsigned int ring) {
  if (state >= KVPACK_STATE_LOW) return;
  state = state << 16 | (word & 0xFFFF);
  word_at += 2;
  word = emulated::load_shared<unsigned short>(ring | (word_at & 126), "refill_state_of_ring");
}
#endif

inline void copy_async_16(unsigned int shared, const void* global) { emulated::issue_copy(shared, global); }
inline void copy_async_commit() { ++emulated::current->copies.committed; }
template <int newest>
inline void copy_async_wait() {
  emulated::wait_for_copies(newest);
}

inline unsigned int load_once_u32(const void* global) {
  return emulated::load_global<unsigned int>(global, "load_once_u32");
}
inline uint2 load_once_v2(const void* global) { return emulated::load_global<uint2>(global, "load_once_v2"); }
inline uint4 load_once_v4(const void* global) { return emulated::load_global<uint4>(global, "load_once_v4"); }
inline float load_l2_f32(const float* global) { return emulated::load_global<float>(global, "load_l2_f32"); }
inline float4 load_l2_v4(const float4* global) { return emulated::load_global<float4>(global, "load_l2_v4"); }
inline void fence_device() { emulated::maybe_yield(); }
inline void sync_warps(unsigned int number, unsigned int threads) {
  static unsigned int arrived[16], generation[16];
  if (number < 1 || number > 15 || threads == 0 || threads % 32 != 0) emulated::fail("sync_warps(%u, %u)", number, threads);
  __syncwarp();
  const unsigned int before = generation[number];
  if (++arrived[number] == threads) {
    arrived[number] = 0;
    ++generation[number];
  }
  while (generation[number] == before) emulated::yield_thread();
}
inline float load_shared_f32(unsigned int address) { return emulated::load_shared<float>(address, "load_shared_f32"); }
inline float4 load_shared_f32x4(unsigned int address) { return emulated::load_shared<float4>(address, "load_shared_f32x4"); }
inline void store_shared_f32x4(unsigned int address, const float4& v) {
  emulated::store_shared(address, v, "store_shared_f32x4");
}
inline void store_shared_f32(unsigned int address, float value) { emulated::store_shared(address, value, "store_shared_f32"); }
inline void max_shared_u32(unsigned int address, unsigned int value) {
  emulated::maybe_yield();
  const unsigned int before = emulated::load_shared<unsigned int>(address, "max_shared_u32");
  if (value > before) emulated::store_shared(address, value, "max_shared_u32");
}
// Flushes denormals, as the instruction does.
inline float reciprocal(float value) {
  const auto flush = [](float f) { return (__float_as_uint(f) & 0x7F800000) == 0 ? 0.0f : f; };
  return flush(1.0f / flush(value));
}

namespace emulated {
inline int dot_2(u32 a, u32 low, u32 high, int c) {
  const int x = static_cast<short>(a & 0xFFFF), y = static_cast<short>(a >> 16);
  return static_cast<int>(static_cast<u32>(c) + static_cast<u32>(x * static_cast<int>(low & 0xFF)) +
                          static_cast<u32>(y * static_cast<int>(high & 0xFF)));
}
}  // namespace emulated
inline int dp2a_low(unsigned int a, unsigned int b, int c) { return emulated::dot_2(a, b, b >> 8, c); }
inline int dp2a_high(unsigned int a, unsigned int b, int c) { return emulated::dot_2(a, b >> 16, b >> 24, c); }

inline void load_matrix_x4(unsigned int (&r)[4], unsigned int address) {
  emulated::MatrixRow row = {emulated::shared_pointer<16, 16>(address, "load_matrix_x4"), r};
  emulated::warp_operation(emulated::Operation::load_matrix, emulated::kAllLanes, 0, 0, 32, &row);
}

// Sums in fp32, in the order of k; the order and the rounding of a tensor core are not documented.
inline void mma_f16(float* c, const unsigned int (&a)[4], unsigned int b0, unsigned int b1) {
  emulated::MatrixProduct product = {c, a, {b0, b1}, false};
  emulated::warp_operation(emulated::Operation::multiply_matrix, emulated::kAllLanes, 0, 0, 32, &product);
}

inline void mma_bf16(float* c, const unsigned int (&a)[4], unsigned int b0, unsigned int b1) {
  emulated::MatrixProduct product = {c, a, {b0, b1}, true};
  emulated::warp_operation(emulated::Operation::multiply_matrix, emulated::kAllLanes, 0, 0, 32, &product);
}
inline unsigned int transpose_matrix(unsigned int pair) {
  const unsigned int lane = emulated::current->lane, column = lane / 4, row = lane % 4 * 2;
  const unsigned int first = __shfl_sync(emulated::kAllLanes, pair, 4 * row + column / 2);
  const unsigned int second = __shfl_sync(emulated::kAllLanes, pair, 4 * (row + 1) + column / 2);
  const unsigned int shift = column % 2 * 16;
  return (first >> shift & 0xFFFF) | (second >> shift & 0xFFFF) << 16;
}
inline float exp2_approximate(float x) { return x < -126 ? 0.0f : exp2f(x); }

// Integer arithmetic only: denormals are kept whatever the processor flushes. NaN becomes 0x7FFF.
inline unsigned int f16_bits(float value) {
  const unsigned int bits = __float_as_uint(value);
  const unsigned int sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return 0x7FFF;
  if (magnitude >= 0x477FF000) return sign | 0x7C00;
  if (magnitude < 0x33000000) return sign;
  if (magnitude >= 0x38800000) return sign | (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  const unsigned int shift = 126 - (magnitude >> 23);
  const unsigned int significand = (magnitude & 0x7FFFFF) | 0x800000;
  const unsigned int quotient = significand >> shift;
  const unsigned int rest = significand & ((1u << shift) - 1), half = 1u << (shift - 1);
  return sign | (quotient + (rest > half || (rest == half && (quotient & 1))));
}
inline unsigned int bf16_bits(float value) {
  const unsigned int bits = __float_as_uint(value);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FFF;
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline float emulated::value_of_half(unsigned int bits) {
  const unsigned int sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3FF;
  if (exponent == 31) return __uint_as_float(fraction != 0 ? 0x7FFFFFFF : sign | 0x7F800000);
  if (exponent != 0) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
  if (fraction == 0) return __uint_as_float(sign);
  const unsigned int shift = static_cast<unsigned int>(__builtin_clz(fraction)) - 21;
  return __uint_as_float(sign | (113 - shift) << 23 | (fraction << shift & 0x3FF) << 13);
}
inline float f16_value(unsigned int bits) { return emulated::half_values[bits & 0xFFFF]; }
inline unsigned int f16x2_bits(float low, float high) { return f16_bits(low) | f16_bits(high) << 16; }
inline unsigned int bf16x2_bits(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
inline unsigned int computed_anew(unsigned int value) { return value; }
inline float multiply_rn(float a, float b) { return __fmul_rn(a, b); }

inline unsigned int and_or(unsigned int a, unsigned int mask, unsigned int bits) { return (a & mask) | bits; }

// Products of fp16 are exact in fp32, and their sums with one in fp64.
inline unsigned int mul_f16x2(unsigned int a, unsigned int b) {
  return f16x2_bits(f16_value(a & 0xFFFF) * f16_value(b & 0xFFFF), f16_value(a >> 16) * f16_value(b >> 16));
}
inline unsigned int fma_f16x2(unsigned int a, unsigned int b, unsigned int c) {
  const auto fma = [](unsigned int x, unsigned int y, unsigned int z) {
    return f16_bits(static_cast<float>(static_cast<double>(f16_value(x)) * f16_value(y) + f16_value(z)));
  };
  return fma(a & 0xFFFF, b & 0xFFFF, c & 0xFFFF) | fma(a >> 16, b >> 16, c >> 16) << 16;
}

// The processor flushes denormals (launch.h), but not while one of these lives.
namespace emulated {
class Denormals {
 public:
#if defined(__x86_64__)
  Denormals() : control(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(control & ~0x8040u); }
  ~Denormals() { __builtin_ia32_ldmxcsr(control); }

 private:
  unsigned int control;
#else
  Denormals() {
    asm volatile("mrs %0, fpcr" : "=r"(control));
    asm volatile("msr fpcr, %0" ::"r"(control & ~(u64{1} << 24)));
  }
  ~Denormals() { asm volatile("msr fpcr, %0" ::"r"(control)); }

 private:
  u64 control;
#endif
};
}  // namespace emulated
// What is volatile stays between the changes of the processor's mode.
#define KVPACK_EMULATED_IEEE(name, result)                \
  inline float name(float first, float second) {          \
    const emulated::Denormals denormals;                  \
    volatile float volatile_a = first, volatile_b = second; \
    const float a = volatile_a, b = volatile_b;           \
    volatile float found = result;                        \
    return found;                                         \
  }
KVPACK_EMULATED_IEEE(add_ieee, a + b)
KVPACK_EMULATED_IEEE(subtract_ieee, a - b)
KVPACK_EMULATED_IEEE(multiply_ieee, a * b)
KVPACK_EMULATED_IEEE(divide_ieee, a / b)
// -0 is less than 0, as PTX says.
KVPACK_EMULATED_IEEE(min_ieee, a == b ? (signbit(a) ? a : b) : fminf(a, b))
KVPACK_EMULATED_IEEE(max_ieee, a == b ? (signbit(a) ? b : a) : fmaxf(a, b))
#undef KVPACK_EMULATED_IEEE
inline float add_down_ieee(float a, float b) {
  fesetround(FE_DOWNWARD);
  const float sum = add_ieee(a, b);
  fesetround(FE_TONEAREST);
  return sum;
}
inline float square_root_ieee(float a) {
  const emulated::Denormals denormals;
  volatile float radicand = a;
  volatile float found = sqrtf(radicand);
  return found;
}
inline float min_nan(float a, float b) { return a != a || b != b ? __uint_as_float(0x7FFFFFFF) : min_ieee(a, b); }
inline float max_nan(float a, float b) { return a != a || b != b ? __uint_as_float(0x7FFFFFFF) : max_ieee(a, b); }
inline float without_denormals(float a) { return fabsf(a) < 1.17549435e-38f ? 0.0f : a; }
inline float bf16_value(unsigned int bits) { return __uint_as_float(bits << 16); }
#define KVPACK_EMULATED_HALVES(name, operation, value, bits)                                          \
  inline unsigned int name(unsigned int a, unsigned int b) {                                          \
    return bits(operation(value(a & 0xFFFF), value(b & 0xFFFF))) | bits(operation(value(a >> 16), value(b >> 16))) << 16; \
  }
KVPACK_EMULATED_HALVES(min_nan_f16x2, min_nan, f16_value, f16_bits)
KVPACK_EMULATED_HALVES(max_nan_f16x2, max_nan, f16_value, f16_bits)
KVPACK_EMULATED_HALVES(min_nan_bf16x2, min_nan, bf16_value, bf16_bits)
KVPACK_EMULATED_HALVES(max_nan_bf16x2, max_nan, bf16_value, bf16_bits)
#undef KVPACK_EMULATED_HALVES
inline void forget(unsigned int&) {}
template <unsigned int distance>
inline unsigned int of_lane_before(unsigned int value) {
  const unsigned int other = __shfl_up_sync(emulated::kAllLanes, value, distance);
  return emulated::current->lane < distance ? 0 : other;
}
template <unsigned int distance>
inline void xor_of_lane_before(unsigned int& value) {
  value ^= of_lane_before<distance>(value);
}

// A difference of fp16 is exact in fp32 up to one rounding, which does not change the second one (24 >= 2 * 11 + 2).
inline unsigned int sub_f16x2(unsigned int a, unsigned int b) {
  return f16x2_bits(f16_value(a & 0xFFFF) - f16_value(b & 0xFFFF), f16_value(a >> 16) - f16_value(b >> 16));
}

#include "emulated_hopper.h"
