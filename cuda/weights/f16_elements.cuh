// Elements of up to 8 bits as fp16: 0x6400 | u is 1024 + u.
#pragma once

#include "weights/tile.cuh"

struct F16Elements {
  // In a register: prmt takes one constant, and which bytes it takes is another, which would be moved into a register for each.
  u32 high_bytes = 0x64646464u;
  static constexpr u32 kBias = 0x6400u | (kSigned ? kHalf : 0u);

  __device__ __forceinline__ F16Elements() { forget(high_bytes); }
  // Of four elements in the bytes of a register.
  __device__ __forceinline__ u32 first_two(u32 elements) const {
    return sub_f16x2(__byte_perm(elements, high_bytes, 0x4140), kBias * 0x00010001u);
  }
  __device__ __forceinline__ u32 last_two(u32 elements) const {
    return sub_f16x2(__byte_perm(elements, high_bytes, 0x4342), kBias * 0x00010001u);
  }
};
