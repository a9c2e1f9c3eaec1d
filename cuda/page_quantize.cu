// Blocks of a page → the same tokens in a quantized format: what quantize_blocks(dequantize_blocks(…)) of
// kvpack/encode/page_coder.py gives, byte for byte.
//
// A warp has 16 columns of a block, that is the dimensions of a group of K or the tokens of a slice of V, which have a scale each.
// Down a column lie kParts parts of 16 rows: slices of K, groups of V. So sums run over parts, over a lane's two rows, and over
// lanes of the same columns, in the order of tree_sum.
#include "page_codes.cuh"

constexpr u32 kSide = KVPACK_SIDE, kSource = KVPACK_SOURCE_FORMAT, kTarget = KVPACK_TARGET_FORMAT;
constexpr bool kKeys = kSide == KVPACK_SIDE_K;
constexpr u32 kParts = kKeys ? kSlices : kGroups;
constexpr u32 kWarps = kKeys ? kGroups : kSlices;
constexpr u32 kRows = 16 * kParts;
constexpr u32 kBits = element_bits(kTarget);
constexpr float kHalf = static_cast<float>(1u << (kBits - 1));
constexpr bool kNarrow = is_narrow(kTarget);
constexpr bool kInteger = kNarrow || kTarget == KVPACK_FORMAT_INT8;
constexpr bool kCentered = kKeys && kNarrow;
constexpr bool kMidRise = !kKeys && kNarrow;
constexpr bool kE4M3 = kTarget == KVPACK_FORMAT_FP8_E4M3;
// In root mean squares from the mean (K) or from 0 (V).
constexpr bool kClipped = kTarget == KVPACK_FORMAT_INT2 || (kMidRise && kTarget == KVPACK_FORMAT_INT3);
constexpr float kClip = kTarget == KVPACK_FORMAT_INT2 ? 1.5f : 2.2f;
constexpr float kMaxF16 = 65504.0f;
constexpr float kLargestLevel = kMidRise ? kHalf - 0.5f : kInteger ? kHalf - 1.0f : 448.0f;

static_assert(is_quantized(kTarget), "pages of 16 bits hold what is written to them");
static_assert(kWarps == KVPACK_MAX_WARPS);

typedef Slice<kSource> Source;
typedef Slice<kTarget> Target;
typedef Columns<kSide, kSource> SourceColumns;

__device__ __forceinline__ float over_lanes(float value, float (*joined)(float, float)) {
#pragma unroll
  for (u32 distance = 16; distance >= 4; distance /= 2) value = joined(value, __shfl_xor_sync(kAllLanes, value, distance));
  return value;
}

// The least (with centers) and the largest of each column, of magnitudes without centers; NaN if one of its values is.
struct Extremes {
  float low[kColumns], high[kColumns];

  __device__ __forceinline__ void find(const Source (&parts)[kParts], const SourceColumns& columns) {
    if constexpr (is_quantized(kSource)) {
#pragma unroll
      for (u32 part = 0; part < kParts; ++part) {
#pragma unroll
        for (u32 r = 0; r < kRowPairs; ++r) {
          const Two x = columns.pair(parts[part], r);
          const u32 column = 2 * (r >> 1);
          add(column, x.first, part == 0 && r % 2 == 0);
          add(column + 1, x.second, part == 0 && r % 2 == 0);
        }
      }
#pragma unroll
      for (u32 column = 0; column < kColumns; ++column) {
        high[column] = over_lanes(high[column], max_nan);
        if constexpr (kCentered) low[column] = over_lanes(low[column], min_nan);
      }
    } else {
      // Two columns at once.
#pragma unroll
      for (u32 h = 0; h < 2; ++h) {
        u32 most = magnitudes(parts[0].words[2 * h]), least = most;
#pragma unroll
        for (u32 i = 1; i < 2 * kParts; ++i) {
          const u32 word = magnitudes(parts[i / 2].words[2 * h + i % 2]);
          most = larger(most, word);
          if constexpr (kCentered) least = smaller(least, word);
        }
#pragma unroll
        for (u32 distance = 16; distance >= 4; distance /= 2) {
          most = larger(most, __shfl_xor_sync(kAllLanes, most, distance));
          if constexpr (kCentered) least = smaller(least, __shfl_xor_sync(kAllLanes, least, distance));
        }
        const Two highs = halves<kSource>(most), lows = halves<kSource>(least);
        high[2 * h] = highs.first, high[2 * h + 1] = highs.second;
        low[2 * h] = lows.first, low[2 * h + 1] = lows.second;
      }
    }
#pragma unroll
    for (u32 column = 0; column < kColumns; ++column) {
      high[column] = without_denormals(high[column]);
      if constexpr (kCentered) low[column] = without_denormals(low[column]);
    }
  }

  __device__ __forceinline__ bool is_finite(u32 column) const {
    const float infinity = __uint_as_float(0x7F800000);
    return fabsf(high[column]) < infinity && (!kCentered || fabsf(low[column]) < infinity);
  }

 private:
  __device__ __forceinline__ void add(u32 column, float x, bool is_first) {
    if constexpr (!kCentered) x = fabsf(x);
    high[column] = is_first ? x : max_nan(high[column], x);
    if constexpr (kCentered) low[column] = is_first ? x : min_nan(low[column], x);
  }
  static __device__ __forceinline__ u32 magnitudes(u32 word) { return kCentered ? word : word & 0x7FFF7FFF; }
  static __device__ __forceinline__ u32 larger(u32 a, u32 b) {
    return kSource == KVPACK_FORMAT_FP16 ? max_nan_f16x2(a, b) : max_nan_bf16x2(a, b);
  }
  static __device__ __forceinline__ u32 smaller(u32 a, u32 b) {
    return kSource == KVPACK_FORMAT_FP16 ? min_nan_f16x2(a, b) : min_nan_bf16x2(a, b);
  }
};

__device__ __forceinline__ Two values(const Source (&parts)[kParts], const SourceColumns& columns, u32 part, u32 r) {
  const Two x = columns.pair(parts[part], r);
  return {without_denormals(x.first), without_denormals(x.second)};
}

// These are too many to keep as floats.
__device__ __forceinline__ void forget_numbers(Source (&parts)[kParts]) {
#pragma unroll
  for (Source& part : parts) {
#pragma unroll
    for (u32& word : part.words) forget(word);
  }
}

// Σ of terms(part, r, column of r) over a column, in the order of tree_sum: parts i and i + count / 2 first.
constexpr u32 power_of_two_from(u32 count) { return count <= 1 ? 1 : 2 * power_of_two_from((count + 1) / 2); }
template <u32 count, typename Terms>
__device__ __forceinline__ Two sum_of_parts(const Terms& terms, u32 first, u32 stride, u32 r) {
  if constexpr (count == 1) {
    return terms(first, r);
  } else {
    // Parts that are not there are 0: a sum with them changes nothing but -0, of which there are none.
    const Two a = sum_of_parts<count / 2>(terms, first, 2 * stride, r);
    if (first + stride >= kParts) return a;
    const Two b = sum_of_parts<count / 2>(terms, first + stride, 2 * stride, r);
    return {add_ieee(a.first, b.first), add_ieee(a.second, b.second)};
  }
}
template <typename Terms>
__device__ __forceinline__ void column_sums(float (&sums)[kColumns], const Terms& terms) {
#pragma unroll
  for (u32 h = 0; h < 2; ++h) {
    const Two upper = sum_of_parts<power_of_two_from(kParts)>(terms, 0, 1, 2 * h);
    const Two lower = sum_of_parts<power_of_two_from(kParts)>(terms, 0, 1, 2 * h + 1);
    sums[2 * h] = over_lanes(add_ieee(upper.first, lower.first), add_ieee);
    sums[2 * h + 1] = over_lanes(add_ieee(upper.second, lower.second), add_ieee);
  }
}

__device__ __forceinline__ u32 saturated_f16(float value) { return f16_bits(max_ieee(min_ieee(value, kMaxF16), -kMaxF16)); }

// Rounded to nearest even; |value| is at most what the format holds. The spacing of denormals is that of fp32 at `kDenormal`.
__device__ __forceinline__ u32 fp8_code(float value) {
  constexpr u32 kFraction = kE4M3 ? 3 : 2, kBias = kE4M3 ? 7 : 15;
  constexpr u32 kShift = 23 - kFraction;
  constexpr u32 kDenormal = (127 + 1 - kBias + kShift) << 23;
  const u32 bits = __float_as_uint(value), magnitude = bits & 0x7FFFFFFF;
  const u32 normal = (magnitude + ((1u << (kShift - 1)) - 1) + (magnitude >> kShift & 1) - ((127 - kBias) << 23)) >> kShift;
  const u32 denormal = __float_as_uint(add_ieee(__uint_as_float(magnitude), __uint_as_float(kDenormal))) - kDenormal;
  return (magnitude < (128 - kBias) << 23 ? denormal : normal) | (bits >> 24 & 0x80);
}

// In the low byte; the next one is 0. Adding 1.5 · 2^23 rounds to an integer, nearest even or down.
__device__ __forceinline__ u32 code_of(float x, float inverse, float center) {
  if constexpr (kCentered) x = subtract_ieee(x, center);
  const float k = multiply_ieee(x, inverse);
  if constexpr (!kInteger) {
    return fp8_code(max_ieee(min_ieee(k, kLargestLevel), -kLargestLevel));
  } else {
    constexpr float kLeast = kNarrow ? -kHalf : 1.0f - kHalf;
    const float clamped = max_ieee(min_ieee(k, kHalf - 1.0f), kLeast);
    const float shifted = kMidRise ? add_down_ieee(clamped, 12582912.0f + kHalf) : add_ieee(clamped, 12582912.0f + kHalf);
    return __float_as_uint(shifted);
  }
}

template <u32 format>
__device__ __forceinline__ void store_shared(u32 address, const Slice<format>& slice) {
  if constexpr (is_narrow(format)) store_shared_u32(address, slice.words[0]);
  else store_shared_v2(address, make_uint2(slice.words[0], slice.words[1]));
}
template <u32 format>
__device__ __forceinline__ void load_shared(Slice<format>& slice, u32 address) {
  if constexpr (is_narrow(format)) {
    slice.words[0] = load_shared_u32(address);
  } else {
    const uint2 v = load_shared_v2(address);
    slice.words[0] = v.x, slice.words[1] = v.y;
  }
}

// Templates, so that what is of the other side is not compiled.
template <u32 count>
__device__ __forceinline__ void load_parts(Slice<kSource> (&parts)[count], const u8* block, u32 warp, u32 lane) {
  if constexpr (kKeys) {
    load_group(block + warp * group_bytes(kSide, kSource) + group_header_bytes(kSide, kSource), lane, parts);
  } else {
    const u8* payload = block + block_header_bytes(kSide, kSource);
#pragma unroll
    for (u32 part = 0; part < count; ++part) parts[part] = load_slice<kSource>(payload + part * payload_bytes(kSource), warp, lane);
  }
}

// The warp's scales, centers and codes to a block.
template <u32 count>
__device__ __forceinline__ void store_parts(u8* block, const u32 (&scales)[kColumns], const u32 (&centers)[kColumns],
                                            const Slice<kTarget> (&codes)[count], u32 warp, u32 lane) {
  if constexpr (kKeys) {
    u8* group = block + warp * group_bytes(kSide, kTarget);
    if (lane < kColumns) {
      *reinterpret_cast<uint2*>(group + 8 * lane) = make_uint2(scales[0] | scales[1] << 16, scales[2] | scales[3] << 16);
      if constexpr (kCentered) {
        *reinterpret_cast<uint2*>(group + kScalesBytes + 8 * lane) =
            make_uint2(centers[0] | centers[1] << 16, centers[2] | centers[3] << 16);
      }
    }
    store_group(group + group_header_bytes(kSide, kTarget), lane, codes);
  } else {
    if (lane < kColumns) {
#pragma unroll
      for (u32 e = 0; e < 2; ++e) *reinterpret_cast<u32*>(block + 16 * (2 * lane + e) + 4 * warp) = scales[e] | scales[2 + e] << 16;
    }
    // In a page a lane's words of all slices lie side by side, so warps change places: from a slice each to groups.
    KVPACK_DYNAMIC_SHARED(dynamic);
    const u32 shared = shared_address(dynamic) + sizeof(Slice<kTarget>) * lane;
    constexpr u32 kSliceBytes = sizeof(Slice<kTarget>) * kLanes;
#pragma unroll
    for (u32 part = 0; part < count; ++part) store_shared(shared + kSliceBytes * (part * kSlices + warp), codes[part]);
    __syncthreads();
    for (u32 group = warp; group < kGroups; group += kWarps) {
      Slice<kTarget> slices[kSlices];
#pragma unroll
      for (u32 s = 0; s < kSlices; ++s) load_shared(slices[s], shared + kSliceBytes * (group * kSlices + s));
      store_group(block + block_header_bytes(kSide, kTarget) + group * payload_bytes(kTarget), lane, slices);
    }
  }
}

// pages: what entries count from; null if they are addresses.
// jobs: [jobs, 2], entries of a source and of a target; no target overlaps a source or a target.
// status: i32 [2], see report_left_out; for jobs of other formats, or without a page.
// A block of threads has a job's head: for K a warp each group, for V a warp each slice.
extern "C" __global__ void __launch_bounds__(kLanes * KVPACK_MAX_WARPS, KVPACK_BLOCKS_PER_SM)
page_quantize(u8* pages, const u64* jobs, u32 num_heads, u32* status) {
  const u32 job = blockIdx.x / num_heads, head = blockIdx.x % num_heads;
  const u32 lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const u64 from = __ldg(jobs + 2 * static_cast<u64>(job)), to = __ldg(jobs + 2 * static_cast<u64>(job) + 1);
  const u8* source = entry_page(static_cast<const u8*>(pages), from);
  u8* target = entry_page(pages, to);
  if (entry_format(from) != kSource || entry_format(to) != kTarget || source == nullptr || target == nullptr) {
    if (head == 0 && threadIdx.x == 0) report_left_out(status, job, 1);
    return;
  }
  source += static_cast<u64>(head) * block_bytes(kSide, kSource);
  target += static_cast<u64>(head) * block_bytes(kSide, kTarget);

  Source parts[kParts];
  SourceColumns columns;
  columns.load(source, warp, warp, lane);
  load_parts(parts, source, warp, lane);

  Extremes extremes;
  extremes.find(parts, columns);
  float low[kColumns], high[kColumns];
#pragma unroll
  for (u32 i = 0; i < kColumns; ++i) low[i] = extremes.low[i], high[i] = extremes.high[i];
  if constexpr (kClipped) {
    forget_numbers(parts);
    float sums[kColumns], means[kColumns];
#pragma unroll
    for (u32 i = 0; i < kColumns; ++i) means[i] = 0.0f;
    if constexpr (kKeys) {
      column_sums(sums, [&](u32 part, u32 r) { return values(parts, columns, part, r); });
#pragma unroll
      for (u32 i = 0; i < kColumns; ++i) means[i] = divide_ieee(sums[i], static_cast<float>(kRows));
    }
    column_sums(sums, [&](u32 part, u32 r) {
      Two x = values(parts, columns, part, r);
      if constexpr (kKeys) x = {subtract_ieee(x.first, means[2 * (r >> 1)]), subtract_ieee(x.second, means[2 * (r >> 1) + 1])};
      return Two{multiply_ieee(x.first, x.first), multiply_ieee(x.second, x.second)};
    });
#pragma unroll
    for (u32 i = 0; i < kColumns; ++i) {
      const float reach = multiply_ieee(kClip, square_root_ieee(divide_ieee(sums[i], static_cast<float>(kRows))));
      high[i] = min_ieee(high[i], add_ieee(means[i], reach));
      if constexpr (kCentered) low[i] = max_ieee(low[i], subtract_ieee(means[i], reach));
    }
  }

  u32 scales[kColumns], centers[kColumns];
  float inverses[kColumns], middles[kColumns];
  bool finite[kColumns];
#pragma unroll
  for (u32 i = 0; i < kColumns; ++i) {
    finite[i] = extremes.is_finite(i);
    const float range = kCentered ? divide_ieee(subtract_ieee(high[i], low[i]), 2.0f * kHalf - 1.0f) : divide_ieee(high[i], kLargestLevel);
    scales[i] = saturated_f16(range);
    const float scale = f16_value(scales[i]);
    inverses[i] = scale == 0.0f ? 0.0f : divide_ieee(1.0f, scale);
    if constexpr (kCentered) {
      centers[i] = finite[i] ? saturated_f16(add_ieee(low[i], multiply_ieee(kHalf, scale))) : 0;
      middles[i] = f16_value(centers[i]);
    } else {
      middles[i] = 0.0f;
    }
    if (!finite[i]) scales[i] = kNaNF16;
  }

  forget_numbers(parts);
  Target codes[kParts];
#pragma unroll
  for (u32 part = 0; part < kParts; ++part) {
#pragma unroll
    for (u32& word : codes[part].words) word = 0;
#pragma unroll
    for (u32 r = 0; r < kRowPairs; ++r) {
      const u32 i = 2 * (r >> 1);
      const Two x = values(parts, columns, part, r);
      const u32 first = code_of(finite[i] ? x.first : 0.0f, inverses[i], middles[i]);
      const u32 second = code_of(finite[i + 1] ? x.second : 0.0f, inverses[i + 1], middles[i + 1]);
      if constexpr (kNarrow) {
        codes[part].words[0] |= __byte_perm(first, second, 0x5410) << kBits * r;
      } else {
        codes[part].words[r / 2] |= (__byte_perm(first, second, 0x0040) & 0xFFFF) << 16 * (r % 2);
      }
    }
  }

  store_parts(target, scales, centers, codes, warp, lane);
}
