// Quantizers of a whole matrix [rows, cols]: scales, codes and their packing, as kvpack/bench/matrix_quantizer_reference.py defines them.
//
// KVPACK_ACTIVATION is the type of the matrix (activations.cuh), KVPACK_MATRIX_BY_TOKEN whether a scale belongs to a row,
// KVPACK_MATRIX_FORMAT what a code is, KVPACK_VARIANT how the work is dealt to threads:
//
//   naive        a thread an element (of quantization: a byte of codes); of scales: a column or a row
//   tiled        a block a tile of 32 × 64 elements, staged in shared memory
//   coarsened    a thread an element, or a byte of codes, in several rows: what belongs to the column is loaded once
//   vectorized   a thread an octet of a row, 16 bytes of fp16, in several rows; quantizing by token, some lanes a row, read once
#pragma once

#include "common/activations.cuh"

constexpr u32 kThreads = KVPACK_MAX_WARPS * kLanes;
constexpr u32 kOctet = 8;
constexpr bool kByToken = KVPACK_MATRIX_BY_TOKEN != 0;
// Blocks of naive and coarsened kernels: so many threads along a row, the others on other rows.
constexpr u32 kColumnThreads = 32;
constexpr u32 kRowThreads = kThreads / kColumnThreads;
constexpr u32 kCoarsening = KVPACK_MATRIX_COARSENING;
constexpr u32 kTileRows = 32, kTileCols = 64;
// Rows of which a thread of a vectorized kernel has elements under way.
constexpr u32 kBatch = KVPACK_MATRIX_BATCH;
static_assert(kThreads == kTileRows * kTileCols / kOctet, "a thread of a tile has an octet");

constexpr u32 kMagnitudeMask = 0x7FFFFFFFu;
constexpr u32 kInfinity = 0x7F800000u;
constexpr u32 kNaN = 0x7FC00000u;

__device__ __forceinline__ float load_element(const void* x, u32 row, u32 cols, u32 col) {
  return load_activation(x, static_cast<u64>(row) * cols + col);
}
__device__ __forceinline__ u32 magnitude(float value) { return __float_as_uint(value) & kMagnitudeMask; }

// The scale of values up to `largest`, the bits of a magnitude.
__device__ __forceinline__ float scale_of(u32 largest, float limit) {
  if (largest >= kInfinity) return __uint_as_float(kNaN);
  const float scale = __fdiv_rn(__uint_as_float(largest), limit);
  return scale < __uint_as_float(KVPACK_MIN_SCALE_BITS) ? 0.0f : fminf(scale, __uint_as_float(KVPACK_MAX_SCALE_BITS));
}

// Largest of a power of two of neighbouring lanes.
__device__ __forceinline__ u32 max_of_lanes(u32 value, u32 lanes) {
  for (u32 distance = lanes / 2; distance > 0; distance /= 2) value = max(value, __shfl_xor_sync(kAllLanes, value, distance));
  return value;
}

// A thread's octet of a row, and the rows it goes through: blocks take strips of columns (y) and chunks of rows (x), the last
// ones first if `reversed`, since those are what the cache still has of a pass before.
struct Octets {
  u32 octets;     // of a row
  u32 octet;      // this thread's
  u32 row_step;   // rows that the block has under way at once
  u32 first_row;  // of the block
  u32 lane_row;   // this thread's, from there
  u32 end_row;    // of this thread: where it has no octet it has no rows
  u32 count;      // elements of the octet

  __device__ __forceinline__ Octets(u32 rows, u32 cols, u32 chunk_rows, bool reversed) {
    octets = ceil_div(cols, kOctet);
    const u32 strip = reversed ? gridDim.y - 1 - blockIdx.y : blockIdx.y;
    const u32 chunk = reversed ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const u32 width = min(octets - strip * kThreads, kThreads);
    octet = strip * kThreads + threadIdx.x % width;
    row_step = kThreads / width;
    lane_row = threadIdx.x / width;
    first_row = chunk * chunk_rows;
    end_row = lane_row < row_step ? min(first_row + chunk_rows, rows) : 0;
    count = min(cols - octet * kOctet, kOctet);
  }
};

#ifdef KVPACK_MATRIX_FORMAT

constexpr u32 kFormat = KVPACK_MATRIX_FORMAT;
constexpr bool kFp8 = kFormat == KVPACK_FORMAT_FP8_E4M3 || kFormat == KVPACK_FORMAT_FP8_E5M2;
constexpr u32 kBits = kFormat == KVPACK_FORMAT_INT4 ? 4 : kFormat == KVPACK_FORMAT_INT3 ? 3 : kFormat == KVPACK_FORMAT_INT2 ? 2 : 8;
constexpr bool kMidRise = kBits == 3 || kBits == 2;
constexpr u32 kHalf = 1u << (kBits - 1);
constexpr u32 kCodeMask = (1u << kBits) - 1;
constexpr u32 kZeroCode = kBits == 8 ? 0 : kHalf;
// fp8 has these bits of fraction and this bias of the exponent.
constexpr u32 kFraction = kFormat == KVPACK_FORMAT_FP8_E4M3 ? 3 : 2;
constexpr u32 kBias = kFormat == KVPACK_FORMAT_FP8_E4M3 ? 7 : 15;

__device__ __forceinline__ float inverse_of(float scale) { return scale > 0.0f ? __frcp_rn(scale) : 0.0f; }

// An fp32 within the range of fp8, to nearest even. Below the least normal number all steps are equal, and a sum rounds there.
__device__ __forceinline__ u32 fp8_code(float p) {
  constexpr u32 kDrop = 23 - kFraction;
  constexpr u32 kRounder = (127 + 24 - kBias - kFraction) << 23;
  const u32 a = magnitude(p);
  const u32 below = __float_as_uint(__fadd_rn(__uint_as_float(a), __uint_as_float(kRounder))) - kRounder;
  const u32 normal = ((a + (1u << (kDrop - 1)) - 1 + (a >> kDrop & 1)) >> kDrop) - ((127 - kBias) << kFraction);
  return (a < (128 - kBias) << 23 ? below : normal) | (__float_as_uint(p) >> 24 & 0x80);
}

// The code of x, in the low bits; those above are 0. Only values under a scale that was too large, at 3 and 2 bits, are clamped:
// others are within.
__device__ __forceinline__ u32 code_of(float x, float inverse) {
  const float p = inverse != 0.0f ? __fmul_rn(x, inverse) : 0.0f;
  if constexpr (kFp8) {
    return fp8_code(p);
  } else if constexpr (kMidRise) {
    const float level = __fadd_rn(p, static_cast<float>(kHalf));
    return static_cast<u32>(fminf(fmaxf(level, 0.0f), 2.0f * kHalf - 0.5f));
  } else {
    // 1.5·2^23, whose sum with p rounds p to an integer, which is left in the low bits in two's complement.
    const u32 rounded = __float_as_uint(__fadd_rn(p, 12582912.0f));
    return (rounded + kZeroCode) & kCodeMask;
  }
}

__device__ __forceinline__ float value_of(u32 code, float scale) {
  float level;
  if constexpr (kFormat == KVPACK_FORMAT_FP8_E5M2) {
    level = f16_value(code << 8);
  } else if constexpr (kFp8) {
    // fp16 has the same fraction behind one zero more, and an exponent that is 8 larger.
    level = 256.0f * f16_value((code & 0x80) << 8 | (code & 0x7F) << 7);
    if ((code & 0x7F) == 0x7F) level = __uint_as_float(kNaN);
  } else if constexpr (kBits == 8) {
    level = static_cast<float>(static_cast<s8>(code));
  } else {
    level = static_cast<float>(code) - (kMidRise ? kHalf - 0.5f : kHalf);
  }
  return __fmul_rn(scale, level);
}

// Eight codes: of 8 bits in two words, of fewer in `low`.
struct Codes {
  u32 low = 0, high = 0;

  __device__ __forceinline__ void set(u32 i, u32 code) { (i * kBits < 32 ? low : high) |= code << (i * kBits % 32); }
  __device__ __forceinline__ u32 get(u32 i) const { return (i * kBits < 32 ? low : high) >> (i * kBits % 32) & kCodeMask; }
};

// Octets lie one after another through the whole matrix. `index` counts them.
__device__ __forceinline__ void store_octet(u8* codes, u64 index, const Codes& octet) {
  u8* at = codes + index * kBits;
  if constexpr (kBits == 8) __stcs(reinterpret_cast<uint2*>(at), make_uint2(octet.low, octet.high));
  if constexpr (kBits == 4) __stcs(reinterpret_cast<u32*>(at), octet.low);
  if constexpr (kBits == 2) __stcs(reinterpret_cast<u16*>(at), static_cast<u16>(octet.low));
  if constexpr (kBits == 3) {
#pragma unroll
    for (u32 i = 0; i < 3; ++i) at[i] = static_cast<u8>(octet.low >> (8 * i));
  }
}

// The same by neighbouring threads for neighbouring octets, if a row has a multiple of four (`quads`): at 3 bits four threads have
// twelve bytes, three words, of which each of the first three writes one. All threads of a warp call it, with the place of their
// octet among its four as in the warp.
__device__ __forceinline__ void store_octets(u8* codes, u64 index, const Codes& octet, bool quads, bool inside) {
  if (kBits == 3 && quads) {
    const u32 next = __shfl_down_sync(kAllLanes, octet.low, 1), place = threadIdx.x % 4;
    u32* words = reinterpret_cast<u32*>(codes) + index / 4 * 3;
    if (inside && place < 3) __stcs(words + place, octet.low >> (8 * place) | next << (24 - 8 * place));
  } else if (inside) {
    store_octet(codes, index, octet);
  }
}

// `quads`: rows have a multiple of four octets, so that those of 3 bits begin at a word after each four.
__device__ __forceinline__ Codes load_octet(const u8* codes, u64 index, bool quads) {
  const u8* at = codes + index * kBits;
  Codes octet;
  if constexpr (kBits == 8) {
    const uint2 words = __ldcs(reinterpret_cast<const uint2*>(at));
    octet.low = words.x, octet.high = words.y;
  }
  if constexpr (kBits == 4) octet.low = __ldcs(reinterpret_cast<const u32*>(at));
  if constexpr (kBits == 2) octet.low = __ldcs(reinterpret_cast<const u16*>(at));
  if constexpr (kBits == 3) {
    if (quads) {
      const u32 place = static_cast<u32>(index % 4);
      const u32* words = reinterpret_cast<const u32*>(codes + index / 4 * 12) + 3 * place / 4;
      const u32 next = place == 0 || place == 3 ? 0 : __ldg(words + 1);
      octet.low = __funnelshift_r(__ldg(words), next, 8 * (3 * place % 4)) & 0xFFFFFF;
    } else {
#pragma unroll
      for (u32 i = 0; i < 3; ++i) octet.low |= static_cast<u32>(__ldg(at + i)) << (8 * i);
    }
  }
  return octet;
}

#endif
