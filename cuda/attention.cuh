// What the attention kernels share. In sums of mma.m16n8k16, with lane = 4·g + c, rows are g and g + 8, columns 2·c and 2·c + 1.
#pragma once

#include "page_operands.cuh"

constexpr bool kBf16 = KVPACK_ACTIVATION == 1;
constexpr u32 kFloatFormat = kBf16 ? KVPACK_FORMAT_BF16 : KVPACK_FORMAT_FP16;
constexpr float kNothing = -1e30f;  // a maximum below all scores, and finite: differences stay numbers
constexpr float kUnseen = -3e38f;   // a score whose p is 0 even beside that

__device__ __forceinline__ u32 element_bits_of(u32 format) {
  constexpr u64 bits = 0x0808020304081010;
  return static_cast<u32>(bits >> (8 * format)) & 0xFF;
}

__device__ __forceinline__ float max_over_rows(float value) {
#pragma unroll
  for (u32 step = 4; step < kLanes; step *= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}
__device__ __forceinline__ float sum_over_rows(float value) {
#pragma unroll
  for (u32 step = 4; step < kLanes; step *= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// `product(slice, a)` for each of a group's four slices, with its operand.
template <u32 format, class Product>
__device__ __forceinline__ void for_slices(u32 payload, u32 lane, Product&& product) {
  u32 a[4];
  if constexpr (is_quantized(format)) {
    GroupOperands<format> operands;
    operands.load(payload, lane);
    operands.template slice_operands<0>(a), product(0, a);
    operands.template slice_operands<1>(a), product(1, a);
    operands.template slice_operands<2>(a), product(2, a);
    operands.template slice_operands<3>(a), product(3, a);
  } else {
#pragma unroll
    for (u32 slice = 0; slice < kSlices; ++slice) {
      const uint4 v = load_shared_v4(payload + slice * 512 + 16 * lane);
      a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w;
      product(slice, a);
    }
  }
}

// One case for each format that KVPACK_K_FORMATS or KVPACK_V_FORMATS, sets of bits, has.
template <u32 formats, u32 format = 0, class Body>
__device__ __forceinline__ void with_format(u32 of_page, Body&& body) {
  if constexpr (format < 8) {
    constexpr bool possible = (formats >> format & 1) && (is_quantized(format) || format == kFloatFormat);
    if constexpr (possible) {
      if (of_page == format) {
        body.template operator()<format>();
        return;
      }
    }
    with_format<formats, format + 1>(of_page, body);
  }
}
