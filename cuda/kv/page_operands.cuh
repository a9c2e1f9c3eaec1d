// A lane's codes of a group as operands of mma.m16n8k16: four registers for each slice of 16 tokens, two numbers in each.
//
// Codes of 8, 5, 4, 3 and 2 bits become the fp16 numbers code − 2^(bits−1), exactly: a code at bit p of a half, with 0x6400 around it, is
// 1024 + 2^p · code, as long as it lies below bit 10. Of those at p > 0 a fused product takes the 2^p away. fp8 becomes fp16 of the same
// value. Scales are applied to the other operand.
#pragma once

#include "kv/page.cuh"

// fp16 bits of an integer from 1 to 2047, and of 2^-p.
__device__ constexpr u32 f16_of_integer(u32 value) {
  u32 exponent = 0;
  for (u32 v = value; v > 1; v >>= 1) ++exponent;
  return (exponent + 15) << 10 | ((value << (10 - exponent)) & 0x3FF);
}
__device__ constexpr u32 f16_of_inverse_power(u32 p) { return (15 - p) << 10; }
__device__ constexpr u32 both_halves(u32 half) { return half << 16 | half; }

// The codes at bit p of both halves of a word, as numbers.
template <u32 bits, u32 p>
__device__ __forceinline__ u32 codes_at(u32 word) {
  static_assert(p + bits <= 10);
  constexpr u32 bias = 1u << (bits - 1);
  const u32 biased = and_or(word, both_halves(((1u << bits) - 1) << p), both_halves(0x6400));
  if constexpr (p == 0) return sub_f16x2(biased, both_halves(f16_of_integer(1024 + bias)));
  return fma_f16x2(biased, both_halves(f16_of_inverse_power(p)), both_halves(0x8000 | f16_of_integer((1024 >> p) + bias)));
}

// Of a group format.
template <u32 format>
struct GroupOperands {
  static constexpr u32 kBits = element_bits(format);
  static constexpr u32 kWords = kBits;
  u32 words[kWords];

  __device__ __forceinline__ void load(u32 payload, u32 lane) {
    if constexpr (kWords == 2) {
      const uint2 v = load_shared_v2(payload + 8 * lane);
      words[0] = v.x, words[1] = v.y;
    } else if constexpr (kWords == 3) {
      const uint2 v = load_shared_v2(payload + 8 * lane);
      words[0] = v.x, words[1] = v.y, words[2] = load_shared_u32(payload + 8 * kLanes + 4 * lane);
    } else if constexpr (kWords == 5) {
      const uint4 v = load_shared_v4(payload + 16 * lane);
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w, words[4] = load_shared_u32(payload + 16 * kLanes + 4 * lane);
    } else {
#pragma unroll
      for (u32 i = 0; i < kWords / 4; ++i) {
        const uint4 v = load_shared_v4(payload + 16 * (kLanes * i + lane));
        words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
      }
    }
  }

  template <u32 pair>
  __device__ __forceinline__ u32 pair_of_codes() const {
    if constexpr (format == KVPACK_FORMAT_INT8) {
      return sub_f16x2(__byte_perm(words[pair / 2], 0x64646464, pair % 2 ? 0x4342 : 0x4140), both_halves(f16_of_integer(1024 + 128)));
    } else if constexpr (format == KVPACK_FORMAT_FP8_E5M2) {
      return __byte_perm(words[pair / 2], 0, pair % 2 ? 0x3424 : 0x1404);
    } else if constexpr (format == KVPACK_FORMAT_FP8_E4M3) {
      // Its exponent has a bit less than fp16's, and is 8 less.
      const u32 high = __byte_perm(words[pair / 2], 0, pair % 2 ? 0x3424 : 0x1404);
      return mul_f16x2(and_or(high, 0x80008000, (high & 0x7F007F00) >> 1), both_halves(f16_of_integer(256)));
    } else if constexpr (kBits % 2 == 1) {
      // Words are shifted by kShift − k, so that the bits of pair 15 that lie above their pairs come to lie side by side at bit kLast.
      constexpr u32 kPerWord = 16 / kBits, kShift = kBits == 5 ? 10 : 9, kLast = 15 - kShift;
      if constexpr (pair < kPairs - 1) {
        constexpr u32 word = pair / kPerWord, first = kBits * (pair % kPerWord), shift = first + kBits <= 10 ? 0 : kShift - word;
        return codes_at<kBits, first - shift>(words[word] >> shift);
      } else {
        u32 bits = 0;
#pragma unroll
        for (u32 k = 0; k < kBits; ++k) bits = and_or(words[k] >> (kShift - k), both_halves(1) << (kLast + k), bits);
        return codes_at<kBits, kLast>(bits);
      }
    } else {
      constexpr u32 per_word = 16 / kBits, first = kBits * (pair % per_word);
      constexpr u32 shift = first + kBits <= 10 ? 0 : 8;
      return codes_at<kBits, first - shift>(words[pair / per_word] >> shift);
    }
  }

  template <u32 slice>
  __device__ __forceinline__ void slice_operands(u32 (&a)[4]) const {
    a[0] = pair_of_codes<4 * slice>();
    a[1] = pair_of_codes<4 * slice + 1>();
    a[2] = pair_of_codes<4 * slice + 2>();
    a[3] = pair_of_codes<4 * slice + 3>();
  }
};

// Products of pages of 16 bits: the numbers are what lies there.
template <u32 format>
__device__ __forceinline__ void mma_page(float* c, const u32 (&a)[4], u32 b0, u32 b1) {
  if constexpr (format == KVPACK_FORMAT_BF16) {
    mma_bf16(c, a, b0, b1);
  } else {
    mma_f16(c, a, b0, b1);
  }
}
