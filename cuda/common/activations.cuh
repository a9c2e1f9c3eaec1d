// Activations and results in the type of the caller: KVPACK_ACTIVATION is 0 for fp16, 1 for bf16, 2 for fp32.
#pragma once

#include "common/common.cuh"

constexpr u32 kActivationSize = KVPACK_ACTIVATION == 2 ? 4 : 2;  // bytes

__device__ __forceinline__ float load_activation(const void* x, u64 index) {
#if KVPACK_ACTIVATION == 0
  return f16_value(__ldg(static_cast<const u16*>(x) + index));
#elif KVPACK_ACTIVATION == 1
  return __uint_as_float(static_cast<u32>(__ldg(static_cast<const u16*>(x) + index)) << 16);
#else
  return __ldg(static_cast<const float*>(x) + index);
#endif
}

// The activation of column `col` at `index`, times the column's scale where the weight has such scales.
__device__ __forceinline__ float load_scaled_activation(const void* x, u64 index, const float* column_scales, u32 col) {
#if KVPACK_COLUMN_SCALES
  return load_activation(x, index) * __ldg(column_scales + col);
#else
  return load_activation(x, index);
#endif
}

// Eight neighbouring activations.
struct Eight {
  static constexpr u32 kPerWord = KVPACK_ACTIVATION == 2 ? 1 : 2;
  u32 words[8 / kPerWord];

  // The first `count` at `index`, then zeros. `aligned`: count is 0 or 8, and they begin at a multiple of 16 bytes.
  __device__ __forceinline__ void load(const void* x, u64 index, u32 count, bool aligned) {
#pragma unroll
    for (u32& word : words) word = 0;
    if (aligned) {
      const uint4* from = reinterpret_cast<const uint4*>(static_cast<const u8*>(x) + index * (4 / kPerWord));
#pragma unroll
      for (u32 i = 0; i < 2 / kPerWord; ++i) {
        if (count == 0) break;
        const uint4 v = __ldg(from + i);
        words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
      }
    } else {
#pragma unroll
      for (u32 i = 0; i < 8; ++i) {
        if (i >= count) continue;
        if constexpr (kPerWord == 1) words[i] = __ldg(static_cast<const u32*>(x) + index + i);
        if constexpr (kPerWord == 2) words[i / 2] |= static_cast<u32>(__ldg(static_cast<const u16*>(x) + index + i)) << (i % 2 * 16);
      }
    }
  }
  __device__ __forceinline__ float value(u32 i) const {
    if constexpr (KVPACK_ACTIVATION == 2) return __uint_as_float(words[i]);
    if constexpr (KVPACK_ACTIVATION == 1) return __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xFFFF0000u);
    return f16_value(words[i / kPerWord] >> (i % 2 * 16) & 0xFFFF);
  }
};

__device__ __forceinline__ void store_result(void* y, u64 index, float value) {
#if KVPACK_ACTIVATION == 0
  static_cast<u16*>(y)[index] = static_cast<u16>(f16_bits(value));
#elif KVPACK_ACTIVATION == 1
  static_cast<u16*>(y)[index] = static_cast<u16>(bf16_bits(value));
#else
  static_cast<float*>(y)[index] = value;
#endif
}

// What a token's activations are divided by on their way to fp16: 2^-14 of the largest, rounded down to a power of two.
__device__ __forceinline__ float token_scale(u32 largest_bits) {
  const u32 exponent = largest_bits >> 23;
  const bool usable = exponent > 14 && exponent < 255;
  return __uint_as_float(usable ? (exponent - 14) << 23 : __float_as_uint(1.0f));
}
