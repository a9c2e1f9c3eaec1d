// What the attention kernels share. In sums of mma.m16n8k16, with lane = 4·g + c, rows are g and g + 8, columns 2·c and 2·c + 1.
#pragma once

#include "kv/page_operands.cuh"

constexpr bool kBf16 = KVPACK_ACTIVATION == 1;
constexpr u32 kFloatFormat = kBf16 ? KVPACK_FORMAT_BF16 : KVPACK_FORMAT_FP16;
constexpr bool kQuantizedValues = KVPACK_V_FORMATS != 1u << kFloatFormat;  // some pages may be
constexpr bool kCausal = KVPACK_CAUSAL;
constexpr float kNothing = -1e30f;  // a maximum below all scores, and finite: differences stay numbers
constexpr float kUnseen = -3e38f;   // a score whose p is 0 even beside that

// Parameters behind a kernel's `scale`, of those that have a softcap and a logit of each head that is no token's.
#if KVPACK_SOFTCAP
#define KVPACK_SOFTCAP_PARAMETERS , float cap, float cap_exponent
#else
#define KVPACK_SOFTCAP_PARAMETERS
#endif
#if KVPACK_SINK_LOGITS
#define KVPACK_SINK_PARAMETERS , const float* sink_logits, float log2_e
#else
#define KVPACK_SINK_PARAMETERS
#endif

// cap · tanh(score / cap) = cap − 2 · cap / (1 + e^(2 · score / cap)), to within 2^-21 · cap, where score and cap are in base 2 and
// cap_exponent is 2 · log2(e) / cap. tanh.approx would be off by 2^-11 of the result: of p by up to 3 % at a cap of 50.
__device__ __forceinline__ float capped(float score, float cap, float cap_exponent) {
  return cap - 2 * cap * reciprocal(1 + exp2_approximate(score * cap_exponent));
}

// The pages that some queries see: those of the sinks, then those from the first one in the window of the first query.
struct Visits {
  u32 sinks;
  u32 count;
  u32 skipped;               // pages between sinks and window
  u32 whole_from, whole_to;  // tokens that all queries see, but for sinks

  // Limits: tokens up to the one of the first and the last query.
  __device__ __forceinline__ Visits(u32 first_limit, u32 last_limit, u32 window, u32 s) : sinks(s), whole_to(first_limit) {
    const u32 window_page = window == 0 || first_limit <= window ? 0 : (first_limit - window) / kPageTokens;
    skipped = window_page > sink_pages() ? window_page - sink_pages() : 0;
    count = ceil_div(last_limit, kPageTokens) - skipped;
    whole_from = window == 0 || last_limit <= window ? 0 : last_limit - window;
  }
  __device__ __forceinline__ u32 sink_pages() const { return ceil_div(sinks, kPageTokens); }
  __device__ __forceinline__ u32 page_of(u32 visit) const { return visit < sink_pages() ? visit : visit + skipped; }
  // Whether all queries see all tokens of a page.
  __device__ __forceinline__ bool whole(u32 first_token) const {
    const u32 end = first_token + kPageTokens;
    return end <= whole_to && (first_token >= whole_from || end <= sinks);
  }
};

// Whether a column whose tokens end at `limit` sees one.
__device__ __forceinline__ bool is_seen(u32 token, u32 limit, u32 window, u32 sinks) {
  return token < limit && (window == 0 || token + window >= limit || token < sinks);
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

// What a lane has of eight columns, 2·c and 2·c + 1 of them, but for the maxima of their scores.
struct Softmax {
  float sum[2];
  float centers[2];  // Σ p · center of V: the same for all dimensions
  float values[kGroups][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (u32 j = 0; j < 2; ++j) sum[j] = 0, centers[j] = 0;
#pragma unroll
    for (u32 m = 0; m < kGroups; ++m)
#pragma unroll
      for (u32 i = 0; i < 4; ++i) values[m][i] = 0;
  }
  __device__ __forceinline__ void rescale(float a, float b) {
    sum[0] *= a, sum[1] *= b;
    centers[0] *= a, centers[1] *= b;
#pragma unroll
    for (u32 m = 0; m < kGroups; ++m) values[m][0] *= a, values[m][1] *= b, values[m][2] *= a, values[m][3] *= b;
  }
};

typedef float Scores[kSlices][4];  // of a page and eight columns
typedef u32 Operands[kSlices][2];

// A lane's numbers of tokens of V, scales or centers: two halves for each slice, of rows g and g + 8.
__device__ __forceinline__ float of_row(const u32 (&of_slices)[kSlices], u32 slice, u32 h) {
  return f16_value(h == 0 ? of_slices[slice] & 0xFFFF : of_slices[slice] >> 16);
}

// Adds Σ p · center of a page of V, the header of whose block is given, to the sums of each of `tiles` times eight columns.
template <u32 format, u32 tiles>
__device__ __forceinline__ void add_centers(const Scores* probabilities, Softmax* sums, u32 header, u32 lane) {
  if constexpr (has_centers(KVPACK_SIDE_V, format)) {
    const uint4 v = load_shared_v4(header + kTokenScalesBytes + 16 * (lane / 4));
    const u32 centers[kSlices] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (u32 slice = 0; slice < kSlices; ++slice)
#pragma unroll
      for (u32 h = 0; h < 2; ++h) {
        const float center = of_row(centers, slice, h);
#pragma unroll
        for (u32 i = 0; i < 2 * tiles; ++i) sums[i / 2].centers[i % 2] += probabilities[i / 2][slice][2 * h + i % 2] * center;
      }
  }
}

// Probabilities as operands for V: multiplied with its scales, a lane's eight, if the format has some; `rest`: what bf16 leaves of one.
template <u32 format>
__device__ __forceinline__ void to_operands(const Scores& probabilities, const uint4& scales, Operands& p, Operands& rest) {
  const u32 of_slice[kSlices] = {scales.x, scales.y, scales.z, scales.w};
#pragma unroll
  for (u32 slice = 0; slice < kSlices; ++slice)
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
      const float a = probabilities[slice][2 * h], b = probabilities[slice][2 * h + 1];
      if constexpr (is_quantized(format)) {
        const float scale = of_row(of_slice, slice, h);
        p[slice][h] = transpose_matrix(f16x2_bits(a * scale, b * scale));
      } else if constexpr (kBf16) {
        const u32 rounded = bf16x2_bits(a, b);
        p[slice][h] = transpose_matrix(rounded);
        rest[slice][h] = transpose_matrix(bf16x2_bits(a - __uint_as_float(rounded << 16), b - __uint_as_float(rounded & 0xFFFF0000)));
      } else {
        p[slice][h] = transpose_matrix(f16x2_bits(a, b));
      }
    }
}

// `product(slice, a)` for each of the four slices of a group of this group format, with its operand, which it may change.
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

// Values that are not finite, in a page of which a column does not see all tokens. Its p of such a token is 0, but 0 · NaN and
// 0 · inf are NaN: so products leave these values out, and then columns that do see one (p is not 0) are given it.

// Bit 15 of each half that is inf or NaN, of fp16 or bf16.
template <bool bf16>
__device__ __forceinline__ u32 find_not_finite(u32 pair) {
  constexpr u32 exponent = bf16 ? 0x7F80 : 0x7C00;
  return ((pair & both_halves(exponent)) + both_halves(0x8000 - exponent)) & 0x80008000;
}
// All bits of the halves whose bit 15 is set.
__device__ __forceinline__ u32 halves_of(u32 found) { return (found >> 15) * 0xFFFF; }

// A token of a quantized page whose scale is NaN is NaN in all dimensions: so is p, where it is seen.
template <u32 tiles>
__device__ __forceinline__ void take_scales_apart(uint4& scales, Scores* probabilities) {
  u32 of_slice[kSlices] = {scales.x, scales.y, scales.z, scales.w}, all = 0;
#pragma unroll
  for (u32 found : of_slice) all |= find_not_finite<false>(found);
  if (!__any_sync(kAllLanes, all != 0)) return;
#pragma unroll
  for (u32 slice = 0; slice < kSlices; ++slice) {
    const u32 found = find_not_finite<false>(of_slice[slice]);
    of_slice[slice] &= ~halves_of(found);
#pragma unroll
    for (u32 i = 0; i < 4 * tiles; ++i) {
      float& p = probabilities[i / 4][slice][i % 4];
      if (found >> (i % 4 < 2 ? 15 : 31) & 1) p = p == 0 ? 0 : __uint_as_float(0x7FC00000);
    }
  }
  scales = make_uint4(of_slice[0], of_slice[1], of_slice[2], of_slice[3]);
}

// Bit 4 · slice + i: the column sees the token of probabilities[slice][i].
__device__ __forceinline__ u32 seen_bits(const Scores& probabilities) {
  u32 seen = 0;
#pragma unroll
  for (u32 slice = 0; slice < kSlices; ++slice)
#pragma unroll
    for (u32 i = 0; i < 4; ++i) seen |= probabilities[slice][i] == 0 ? 0 : 1u << (4 * slice + i);
  return seen;
}

// Whether a group of 16 bits has values that are not finite.
__device__ __forceinline__ bool has_not_finite(u32 payload, u32 lane) {
  u32 found = 0;
#pragma unroll 1
  for (u32 slice = 0; slice < kSlices; ++slice) {
    const uint4 v = load_shared_v4(payload + slice * 512 + 16 * lane);
    found |= find_not_finite<kBf16>(v.x) | find_not_finite<kBf16>(v.y) | find_not_finite<kBf16>(v.z) | find_not_finite<kBf16>(v.w);
  }
  return __any_sync(kAllLanes, found != 0);
}

// What its products left out, for their sums. A product counts what a column sees of it: inf as 1, -inf as 2^-8, NaN as both.
// A function of its own: few pages come here, and the instructions of all others shall be close to each other.
__device__ __noinline__ float4 sum_not_finite(u32 payload, u32 lane, u32 seen) {
  constexpr u32 one = 0x3C00, small = 0x1C00, both = 0x3C04;
  constexpr u32 exponent = kBf16 ? 0x7F80 : 0x7C00;
  float counts[4] = {0, 0, 0, 0};
#pragma unroll 1
  for (u32 slice = 0; slice < kSlices; ++slice) {
    const uint4 v = load_shared_v4(payload + slice * 512 + 16 * lane);
    u32 a[4] = {v.x, v.y, v.z, v.w}, ones[2];
#pragma unroll
    for (u32& pair : a) {
      const u32 nan = halves_of(((pair & 0x7FFF7FFF) + both_halves(0x7FFF - exponent)) & 0x80008000);
      const u32 negative = halves_of(pair & 0x80008000), infinite = negative & both_halves(small) | ~negative & both_halves(one);
      pair = halves_of(find_not_finite<kBf16>(pair)) & (nan & both_halves(both) | ~nan & infinite);
    }
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
      const u32 of_h = seen >> (4 * slice + 2 * h);
      ones[h] = transpose_matrix((of_h & 1) * one | (of_h >> 1 & 1) * (one << 16));
    }
    mma_f16(counts, a, ones[0], ones[1]);
  }
#pragma unroll
  for (float& count : counts) {
    const float positive = count >= 1 ? __uint_as_float(0x7F800000) : 0, negative = count == floorf(count) ? 0 : __uint_as_float(0xFF800000);
    count = positive + negative;
  }
  return make_float4(counts[0], counts[1], counts[2], counts[3]);
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
