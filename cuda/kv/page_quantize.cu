// Blocks of a page → the same tokens in a quantized format: what quantize_blocks(dequantize_blocks(…)) of
// kvpack/encode/page_coder.py gives, byte for byte.
//
// A warp has 16 columns of a block, that is the dimensions of a group of K or the tokens of a slice of V, which have a scale each.
// Down a column lie kParts parts of 16 rows: slices of K, groups of V. So sums run over parts, over a lane's two rows, and over
// lanes of the same columns, in the order of tree_sum.
#include "kv/page_codes.cuh"

constexpr u32 kSide = KVPACK_SIDE, kSourceFormat = KVPACK_SOURCE_FORMAT, kTargetFormat = KVPACK_TARGET_FORMAT;
constexpr bool kKeys = kSide == KVPACK_SIDE_K;
constexpr u32 kParts = kKeys ? kSlices : kGroups;
constexpr u32 kWarps = kKeys ? kGroups : kSlices;
constexpr u32 kRows = 16 * kParts;
constexpr float kMaxF16 = 65504.0f;

static_assert(is_quantized(kTargetFormat), "pages of 16 bits hold what is written to them");
static_assert(kWarps == KVPACK_MAX_WARPS);

// How far a column's ends lie outside of the outer levels, in steps.
__device__ constexpr float margin(u32 bits) { return static_cast<float>(u64{KVPACK_MARGIN_EIGHTHS} >> 4 * bits & 15) / 16.0f; }

// A lane's four columns become the one that it keeps, 2·(lane's bit 4) + (bit 3). Lanes of the same columns are joined: those of rows 4, 2
// and 1 apart in turn. Each step halves what is left to join, and two lanes, not eight, compute what follows.
template <typename Join>
__device__ __forceinline__ float joined_column(const float (&values)[kColumns], const Join& join, u32 lane) {
  const bool upper = lane & 16, second = lane & 8;
  const float a = join(upper ? values[2] : values[0], __shfl_xor_sync(kAllLanes, upper ? values[0] : values[2], 16));
  const float b = join(upper ? values[3] : values[1], __shfl_xor_sync(kAllLanes, upper ? values[1] : values[3], 16));
  const float c = join(second ? b : a, __shfl_xor_sync(kAllLanes, second ? a : b, 8));
  return join(c, __shfl_xor_sync(kAllLanes, c, 4));
}
// Back: column `column` from a lane that keeps it.
template <typename T>
__device__ __forceinline__ T of_column(T kept, u32 column, u32 lane) {
  return __shfl_sync(kAllLanes, kept, (column >> 1) * 16 + (column & 1) * 8 + lane % 4);
}

template <u32 source>
__device__ __forceinline__ u32 larger_halves(u32 a, u32 b) {
  return source == KVPACK_FORMAT_FP16 ? max_nan_f16x2(a, b) : max_nan_bf16x2(a, b);
}
template <u32 source>
__device__ __forceinline__ u32 smaller_halves(u32 a, u32 b) {
  return source == KVPACK_FORMAT_FP16 ? min_nan_f16x2(a, b) : min_nan_bf16x2(a, b);
}
// joined_column of two columns to a word.
template <u32 source, typename Join>
__device__ __forceinline__ float joined_halves(const u32 (&words)[2], const Join& join, u32 lane) {
  const bool upper = lane & 16;
  u32 joined = join(upper ? words[1] : words[0], __shfl_xor_sync(kAllLanes, upper ? words[0] : words[1], 16));
  joined = join(joined, __shfl_xor_sync(kAllLanes, joined, 8));
  joined = join(joined, __shfl_xor_sync(kAllLanes, joined, 4));
  const Two both = halves<source>(joined);
  return lane & 8 ? both.second : both.first;
}

// The least and the largest value of the column that the lane keeps. NaN if one of the values is.
struct Extremes {
  float low, high;

  template <u32 source>
  __device__ __forceinline__ Extremes(const Slice<source> (&parts)[kParts], const Columns<kSide, source>& columns, u32 lane) {
    if constexpr (is_quantized(source)) {
      float lows[kColumns], highs[kColumns];
#pragma unroll
      for (u32 i = 0; i < 2 * kParts; ++i) {
#pragma unroll
        for (u32 h = 0; h < 2; ++h) {
          const Two x = columns.pair(parts[i / 2], 2 * h + i % 2);
          highs[2 * h] = i == 0 ? x.first : max_nan(highs[2 * h], x.first);
          highs[2 * h + 1] = i == 0 ? x.second : max_nan(highs[2 * h + 1], x.second);
          lows[2 * h] = i == 0 ? x.first : min_nan(lows[2 * h], x.first);
          lows[2 * h + 1] = i == 0 ? x.second : min_nan(lows[2 * h + 1], x.second);
        }
      }
      high = joined_column(highs, max_nan, lane);
      low = joined_column(lows, min_nan, lane);
    } else {
      u32 lows[2], highs[2];
#pragma unroll
      for (u32 i = 0; i < 2 * kParts; ++i) {
#pragma unroll
        for (u32 h = 0; h < 2; ++h) {
          const u32 word = parts[i / 2].words[2 * h + i % 2];
          highs[h] = i == 0 ? word : larger_halves<source>(highs[h], word);
          lows[h] = i == 0 ? word : smaller_halves<source>(lows[h], word);
        }
      }
      high = joined_halves<source>(highs, larger_halves<source>, lane);
      low = joined_halves<source>(lows, smaller_halves<source>, lane);
    }
    high = without_denormals(high);
    low = without_denormals(low);
  }

  __device__ __forceinline__ bool is_finite() const {
    const float infinity = __uint_as_float(0x7F800000);
    return fabsf(high) < infinity && fabsf(low) < infinity;
  }
};

// Values below 2^-126 count as 0; of fp16 and quantized pages there are none. -0 is 0, but that only shows in a code of fp8.
template <bool to_integers, u32 source>
__device__ __forceinline__ Two values(const Slice<source> (&parts)[kParts], const Columns<kSide, source>& columns, u32 part, u32 r) {
  const Two x = columns.pair(parts[part], r);
  if constexpr (to_integers && source != KVPACK_FORMAT_BF16) return x;
  return {without_denormals(x.first), without_denormals(x.second)};
}

// These are too many to keep as floats.
template <u32 source>
__device__ __forceinline__ void forget_numbers(Slice<source> (&parts)[kParts]) {
#pragma unroll
  for (Slice<source>& part : parts) {
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
// Divided by how many there are, of the column that the lane keeps.
template <typename Terms>
__device__ __forceinline__ float column_mean(const Terms& terms, u32 lane) {
  float sums[kColumns];
#pragma unroll
  for (u32 h = 0; h < 2; ++h) {
    const Two upper = sum_of_parts<power_of_two_from(kParts)>(terms, 0, 1, 2 * h);
    const Two lower = sum_of_parts<power_of_two_from(kParts)>(terms, 0, 1, 2 * h + 1);
    sums[2 * h] = add_ieee(upper.first, lower.first);
    sums[2 * h + 1] = add_ieee(upper.second, lower.second);
  }
  const float sum = joined_column(sums, add_ieee, lane);
  constexpr float kCount = static_cast<float>(kRows);
  return (kRows & (kRows - 1)) == 0 ? multiply_ieee(sum, 1.0f / kCount) : divide_ieee(sum, kCount);
}

__device__ __forceinline__ u32 saturated_f16(float value) { return f16_bits(max_ieee(min_ieee(value, kMaxF16), -kMaxF16)); }

// Rounded to nearest even; |value| is at most what the format holds. Between numbers of fp32's exponent in kDenormal lies
// what lies between denormals.
template <bool e4m3>
__device__ __forceinline__ u32 fp8_code(float value) {
  constexpr u32 kFraction = e4m3 ? 3 : 2, kBias = e4m3 ? 7 : 15;
  constexpr u32 kShift = 23 - kFraction;
  constexpr u32 kDenormal = (127 + 1 - kBias + kShift) << 23;
  const u32 bits = __float_as_uint(value), magnitude = bits & 0x7FFFFFFF;
  const u32 normal = (magnitude + ((1u << (kShift - 1)) - 1) + (magnitude >> kShift & 1) - ((127 - kBias) << 23)) >> kShift;
  const u32 denormal = __float_as_uint(add_ieee(__uint_as_float(magnitude), __uint_as_float(kDenormal))) - kDenormal;
  return (magnitude < (128 - kBias) << 23 ? denormal : normal) | (bits >> 24 & 0x80);
}

// An integer's level, plus this number. Adding 1.5 · 2^23 rounds to an integer, to nearest even.
template <u32 target>
constexpr float kShift = 12582912.0f + static_cast<float>(1u << (element_bits(target) - 1));
template <u32 target>
__device__ __forceinline__ float shifted_level(float x, float inverse, float center) {
  constexpr float kHalf = static_cast<float>(1u << (element_bits(target) - 1));
  const float k = multiply_ieee(subtract_ieee(x, center), inverse);
  return add_ieee(max_ieee(min_ieee(k, kHalf - 1.0f), -kHalf), kShift<target>);
}

// The code is in the low byte; the next byte is 0.
template <u32 target>
__device__ __forceinline__ u32 code_of(float x, float inverse, float center) {
  if constexpr (is_integer(target)) {
    return __float_as_uint(shifted_level<target>(x, inverse, center));
  } else {
    if constexpr (has_centers(kSide, target)) x = subtract_ieee(x, center);
    const float k = multiply_ieee(x, inverse);
    constexpr float kMost = KVPACK_FP8_MAX;
    return fp8_code<target == KVPACK_FORMAT_FP8_E4M3>(max_ieee(min_ieee(k, kMost), -kMost));
  }
}

template <u32 format>
__device__ __forceinline__ void store_shared(u32 address, const Slice<format>& slice) {
  if constexpr (Slice<format>::kWords == 1) store_shared_u32(address, slice.words[0]);
  else store_shared_v2(address, make_uint2(slice.words[0], slice.words[1]));
}
template <u32 format>
__device__ __forceinline__ void load_shared(Slice<format>& slice, u32 address) {
  if constexpr (Slice<format>::kWords == 1) {
    slice.words[0] = load_shared_u32(address);
  } else {
    const uint2 v = load_shared_v2(address);
    slice.words[0] = v.x, slice.words[1] = v.y;
  }
}

// Where a pair's codes lie in a slice of a target. The second byte of each is 0.
template <u32 target>
struct Places {
  static constexpr bool kOneWord = Slice<target>::kWords == 1;
  static __device__ constexpr u32 word_of_pair(u32 r) { return kOneWord ? 0 : r / 2; }
  static __device__ constexpr u32 bit_of_pair(u32 r) { return kOneWord ? element_bits(target) * r : 16 * (r % 2); }
  static __device__ __forceinline__ u32 pair_of_codes(u32 first, u32 second) {
    return kOneWord ? __byte_perm(first, second, 0x5410) : __byte_perm(first, second, 0x1140);
  }
};

// Columns with values that are not finite have the codes of zeros.
template <u32 target>
struct CodesOfZero {
  typedef Places<target> At;
  u32 keep[Slice<target>::kWords], fill[Slice<target>::kWords];

  __device__ __forceinline__ CodesOfZero(const bool (&usable)[kColumns]) {
    constexpr u32 kMask = (1u << element_bits(target)) - 1, kZero = is_integer(target) ? 1u << (element_bits(target) - 1) : 0;
#pragma unroll
    for (u32 i = 0; i < Slice<target>::kWords; ++i) keep[i] = fill[i] = 0;
#pragma unroll
    for (u32 r = 0; r < kRowPairs; ++r) {
      const bool first = usable[2 * (r >> 1)], second = usable[2 * (r >> 1) + 1];
      keep[At::word_of_pair(r)] |= At::pair_of_codes(first ? kMask : 0, second ? kMask : 0) << At::bit_of_pair(r);
      fill[At::word_of_pair(r)] |= At::pair_of_codes(first ? 0 : kZero, second ? 0 : kZero) << At::bit_of_pair(r);
    }
  }
  __device__ __forceinline__ void replace(Slice<target>& codes) const {
#pragma unroll
    for (u32 i = 0; i < Slice<target>::kWords; ++i) codes.words[i] = (codes.words[i] & keep[i]) | fill[i];
  }
};

// Templates, so that what is of the other side is not compiled. `start`: a group of K, or a block of V.
template <u32 source, u32 count>
__device__ __forceinline__ void load_parts(Slice<source> (&parts)[count], const u8* start, u32 warp, u32 lane) {
  if constexpr (kKeys) {
    load_group(start + group_header_bytes(kSide, source), lane, parts);
  } else {
    const u8* payload = start + block_header_bytes(kSide, source);
#pragma unroll
    for (u32 part = 0; part < count; ++part) parts[part] = load_slice<source>(payload + part * payload_bytes(source), warp, lane);
  }
}

// The warp's scales, centers and codes to a group or a block.
template <u32 target, u32 count>
__device__ __forceinline__ void store_parts(u8* start, const u32 (&scales)[kColumns], const u32 (&centers)[kColumns],
                                            const Slice<target> (&codes)[count], u32 warp, u32 lane) {
  if constexpr (kKeys) {
    if (lane < kColumns) {
      *reinterpret_cast<uint2*>(start + 8 * lane) = make_uint2(scales[0] | scales[1] << 16, scales[2] | scales[3] << 16);
      *reinterpret_cast<uint2*>(start + kScalesBytes + 8 * lane) = make_uint2(centers[0] | centers[1] << 16, centers[2] | centers[3] << 16);
    }
    store_group(start + group_header_bytes(kSide, target), lane, codes);
  } else {
    if (lane < kColumns) {
#pragma unroll
      for (u32 e = 0; e < 2; ++e) {
        u32* at = reinterpret_cast<u32*>(start + 16 * (2 * lane + e) + 4 * warp);
        *at = scales[e] | scales[2 + e] << 16;
        if constexpr (has_centers(kSide, target)) at[kTokenScalesBytes / 4] = centers[e] | centers[2 + e] << 16;
      }
    }
    // A lane's words of all slices lie side by side in a page, so warps change places: from a slice each to groups.
    KVPACK_DYNAMIC_SHARED(dynamic);
    const u32 shared = shared_address(dynamic) + sizeof(Slice<target>) * lane;
    constexpr u32 kSliceBytes = sizeof(Slice<target>) * kLanes;
#pragma unroll
    for (u32 part = 0; part < count; ++part) store_shared(shared + kSliceBytes * (part * kSlices + warp), codes[part]);
    __syncthreads();
    for (u32 group = warp; group < kGroups; group += kWarps) {
      Slice<target> slices[kSlices];
#pragma unroll
      for (u32 s = 0; s < kSlices; ++s) load_shared(slices[s], shared + kSliceBytes * (group * kSlices + s));
      store_group(start + block_header_bytes(kSide, target) + group * payload_bytes(target), lane, slices);
    }
  }
}

// A warp's columns, of group formats. `from`, `to`: a group of K, or a block of V.
template <u32 source, u32 target>
__device__ __forceinline__ void quantize_columns(const u8* from, u8* to, u32 warp, u32 lane) {
  constexpr bool kInteger = is_integer(target);
  Slice<source> parts[kParts];
  Columns<kSide, source> columns;
  columns.load(from, warp, lane);
  load_parts(parts, from, warp, lane);

  const Extremes ends(parts, columns, lane);
  const bool finite = ends.is_finite();
  u32 center_bits = 0, scale_bits;
  if constexpr (kInteger) {
    constexpr float kHalf = static_cast<float>(1u << (element_bits(target) - 1)), kMargin = margin(element_bits(target));
    const float step = divide_ieee(subtract_ieee(ends.high, ends.low), 2.0f * kHalf - 1.0f + 2.0f * kMargin);
    const float exact = add_ieee(ends.low, multiply_ieee(kHalf + kMargin, step));
    center_bits = saturated_f16(exact);
    const float center = f16_value(center_bits), reach = fabsf(exact) > kMaxF16 ? 0.0f : kMargin;
    const float above = divide_ieee(subtract_ieee(ends.high, center), add_ieee(kHalf - 1.0f, reach));
    const float below = divide_ieee(subtract_ieee(center, ends.low), add_ieee(kHalf, reach));
    scale_bits = saturated_f16(max_ieee(above, below));
  } else {
    if constexpr (has_centers(kSide, target)) {
      forget_numbers(parts);
      const float mean = column_mean([&](u32 part, u32 r) { return values<kInteger>(parts, columns, part, r); }, lane);
      center_bits = fabsf(mean) < __uint_as_float(0x7F800000) ? saturated_f16(mean) : 0;
    }
    const float center = f16_value(center_bits);
    const float furthest = max_ieee(fabsf(subtract_ieee(ends.high, center)), fabsf(subtract_ieee(ends.low, center)));
    scale_bits = saturated_f16(divide_ieee(furthest, KVPACK_FP8_MAX));
  }
  const float scale = f16_value(scale_bits), inverse = scale == 0.0f ? 0.0f : divide_ieee(1.0f, scale);
  const u32 both = finite ? scale_bits | center_bits << 16 : kNaNF16;
  u32 scales[kColumns], centers[kColumns];
  float inverses[kColumns], centers_of_codes[kColumns];
  bool usable[kColumns];
  auto tell_all = [&](u32 of_kept) {
#pragma unroll
    for (u32 i = 0; i < kColumns; ++i) {
      const u32 bits = of_column(of_kept, i, lane);
      scales[i] = bits & 0xFFFF, centers[i] = bits >> 16;
    }
  };
  tell_all(both);
#pragma unroll
  for (u32 i = 0; i < kColumns; ++i) {
    usable[i] = scales[i] != kNaNF16, centers_of_codes[i] = f16_value(centers[i]);
    inverses[i] = of_column(inverse, i, lane);
  }
  const CodesOfZero<target> zero(usable);
  if constexpr (!kKeys && (KVPACK_REFITTED >> target & 1)) {
    // Levels as long as values, in the direction of these, around the same mean. Without forget_numbers in between: values would lie in
    // local memory.
    auto level = [&](float x, u32 i) {
      return subtract_ieee(shifted_level<target>(x, inverses[i], centers_of_codes[i]), kShift<target>);
    };
    const float mean = column_mean([&](u32 part, u32 r) { return values<kInteger>(parts, columns, part, r); }, lane);
    float means[kColumns];
#pragma unroll
    for (u32 i = 0; i < kColumns; ++i) means[i] = of_column(mean, i, lane);
    const float square = column_mean(
        [&](u32 part, u32 r) {
          const Two x = values<kInteger>(parts, columns, part, r);
          const float a = subtract_ieee(x.first, means[2 * (r >> 1)]), b = subtract_ieee(x.second, means[2 * (r >> 1) + 1]);
          return Two{multiply_ieee(a, a), multiply_ieee(b, b)};
        },
        lane);
    const float along = column_mean(
        [&](u32 part, u32 r) {
          const u32 i = 2 * (r >> 1);
          const Two x = values<kInteger>(parts, columns, part, r);
          const float a = subtract_ieee(x.first, means[i]), b = subtract_ieee(x.second, means[i + 1]);
          return Two{multiply_ieee(a, level(x.first, i)), multiply_ieee(b, level(x.second, i + 1))};
        },
        lane);
    const float mean_level = column_mean(
        [&](u32 part, u32 r) {
          const u32 i = 2 * (r >> 1);
          const Two x = values<kInteger>(parts, columns, part, r);
          return Two{level(x.first, i), level(x.second, i + 1)};
        },
        lane);
    const float quotient = along > 0.0f ? divide_ieee(square, along) : __uint_as_float(0x7F800000);
    const u32 fitted_bits = saturated_f16(quotient);
    const float exact = subtract_ieee(mean, multiply_ieee(f16_value(fitted_bits), mean_level));
    const bool holds = finite && quotient <= multiply_ieee(1.25f, scale) && fabsf(exact) <= kMaxF16;
    tell_all(holds ? fitted_bits | saturated_f16(exact) << 16 : both);
  }

  forget_numbers(parts);
  typedef Places<target> At;
  Slice<target> codes[kParts];
#pragma unroll
  for (u32 part = 0; part < kParts; ++part) {
#pragma unroll
    for (u32& word : codes[part].words) word = 0;
#pragma unroll
    for (u32 r = 0; r < kRowPairs; ++r) {
      const u32 i = 2 * (r >> 1);
      const Two x = values<kInteger>(parts, columns, part, r);
      const u32 first = code_of<target>(x.first, inverses[i], centers_of_codes[i]);
      const u32 second = code_of<target>(x.second, inverses[i + 1], centers_of_codes[i + 1]);
      codes[part].words[At::word_of_pair(r)] |= At::pair_of_codes(first, second) << At::bit_of_pair(r);
    }
    zero.replace(codes[part]);
  }
  store_parts(to, scales, centers, codes, warp, lane);
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
  if (entry_format(from) != kSourceFormat || entry_format(to) != kTargetFormat || source == nullptr || target == nullptr) {
    if (head == 0 && threadIdx.x == 0) report_left_out(status, job, 1);
    return;
  }
  source += static_cast<u64>(head) * block_bytes(kSide, kSourceFormat);
  target += static_cast<u64>(head) * block_bytes(kSide, kTargetFormat);

  constexpr u32 kSource = wide_format(kSide, kSourceFormat), kTarget = wide_format(kSide, kTargetFormat);
  constexpr u32 kThinSource = thin_format(kSide, kSourceFormat), kThinTarget = thin_format(kSide, kTargetFormat);
  if constexpr (kKeys) {
    source += group_start(kSide, kSourceFormat, warp);
    target += group_start(kSide, kTargetFormat, warp);
    if constexpr (kSource != kThinSource || kTarget != kThinTarget) {
      if (warp >= kWideGroups) {
        quantize_columns<kThinSource, kThinTarget>(source, target, warp, lane);
        return;
      }
    }
  }
  quantize_columns<kSource, kTarget>(source, target, warp, lane);
}
