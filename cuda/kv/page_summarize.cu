// Between which values the keys of pages lie, by channel: what key_ranges of kvpack/runtime/kv/page_summaries.py gives.
//
// A warp has one head of a page.
#include "kv/page.cuh"

constexpr u32 kWarps = KVPACK_MAX_WARPS;
constexpr float kMost = 65504.0f;  // of fp16

// The middle and half of the width, fp16. What is no number stays none; what fp16 cannot hold is as near as it can.
__device__ __forceinline__ u32 range_of(float middle, float half) {
  const bool is_number = fabsf(middle) <= 3.0e38f && half <= 3.0e38f;
  if (!is_number) return 0x7E007E00u;
  return f16x2_bits(fminf(fmaxf(middle, -kMost), kMost), fminf(half, kMost));
}

// The dimension of a group's scale `i` (kvpack/format/pages.py).
__device__ __forceinline__ u32 dim_of_scale(u32 i) { return 2 * (i / 4) + 8 * (i % 4 >> 1) + (i & 1); }

__device__ __forceinline__ void of_levels(const u8* block, u32 format, u32 lane, u32* out) {
  const bool whole = is_integer(format);
  for (u32 place = 0; place < kGroups; ++place) {
    const u64 bits_of_format = place < kWideGroups ? kWideKeyBits : kThinKeyBits;
    const u32 bits = static_cast<u32>(bits_of_format >> 8 * format) & 0xFF;
    if (lane >= kGroupDims) continue;
    const u16* header = reinterpret_cast<const u16*>(block + group_start(KVPACK_SIDE_K, format, place));
    const float scale = f16_value(__ldg(header + lane)), center = f16_value(__ldg(header + kGroupDims + lane));
    // Codes from 0 to 2^bits - 1 stand for so much less 2^(bits - 1).
    const float middle = whole ? center - scale / 2 : center;
    const float half = fabsf(scale) * (whole ? static_cast<float>((1u << bits) - 1) / 2 : float{KVPACK_FP8_MAX});
    out[kGroupDims * group_at(place) + dim_of_scale(lane)] = range_of(middle, half);
  }
}

template <u32 format>
__device__ __forceinline__ float number(u32 bits) {
  return format == KVPACK_FORMAT_FP16 ? f16_value(bits & 0xFFFF) : __uint_as_float(bits << 16);
}

// NaN where there is one.
__device__ __forceinline__ float least_of(float a, float b) { return a != a || a < b ? a : b; }
__device__ __forceinline__ float greatest_of(float a, float b) { return a != a || a > b ? a : b; }

template <u32 format>
__device__ __forceinline__ void of_elements(const u8* block, u32 lane, u32* out) {
  for (u32 place = 0; place < kGroups; ++place) {
    const u8* group = block + group_start(KVPACK_SIDE_K, format, place);
    float least[4], greatest[4];  // of dimensions 2c, 2c + 1, 2c + 8, 2c + 9
#pragma unroll
    for (u32 s = 0; s < kSlices; ++s) {
      const uint4 v = load_once_v4(group + 16 * (kLanes * s + lane));
      const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (u32 r = 0; r < 4; ++r) {
#pragma unroll
        for (u32 e = 0; e < 2; ++e) {
          const float x = number<format>(words[r] >> 16 * e & 0xFFFF);
          const u32 d = 2 * (r >> 1) + e;
          const bool is_first = s == 0 && (r & 1) == 0;
          least[d] = is_first ? x : least_of(x, least[d]), greatest[d] = is_first ? x : greatest_of(x, greatest[d]);
        }
      }
    }
#pragma unroll
    for (u32 d = 0; d < 4; ++d) {
#pragma unroll
      for (u32 step = 4; step < kLanes; step *= 2) {
        const float low = __shfl_xor_sync(kAllLanes, least[d], step), high = __shfl_xor_sync(kAllLanes, greatest[d], step);
        least[d] = least_of(least[d], low != low ? low : least_of(low, least[d]));
        greatest[d] = greatest_of(greatest[d], high != high ? high : greatest_of(high, greatest[d]));
      }
      if (lane < 4) {
        const float middle = (least[d] + greatest[d]) / 2, half = (greatest[d] - least[d]) / 2;
        out[kGroupDims * group_at(place) + 2 * lane + 8 * (d >> 1) + (d & 1)] = range_of(middle, half);
      }
    }
  }
}

// pages: what entries count from; null if they are addresses. jobs: [num_jobs, 2], a page of K and where its summary goes.
// summaries: [..., num_heads, head_dim], a pair of fp16 each.
extern "C" __global__ void __launch_bounds__(kLanes * KVPACK_MAX_WARPS, KVPACK_BLOCKS_PER_SM)
page_summarize(const u8* pages, const u64* jobs, u32* summaries, u32 num_jobs, u32 num_heads) {
  const u32 number_of = blockIdx.x * kWarps + threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  if (number_of >= num_jobs * num_heads) return;
  const u32 job = number_of / num_heads, head = number_of % num_heads;
  const u64 entry = __ldg(jobs + 2 * job);
  const u32 format = entry_format(entry);
  const u8* block = entry_page(pages, entry) + static_cast<u64>(head) * block_bytes(KVPACK_SIDE_K, format);
  u32* out = summaries + (__ldg(jobs + 2 * job + 1) * num_heads + head) * kHeadDim;
  if (format == KVPACK_FORMAT_FP16) of_elements<KVPACK_FORMAT_FP16>(block, lane, out);
  else if (format == KVPACK_FORMAT_BF16) of_elements<KVPACK_FORMAT_BF16>(block, lane, out);
  else of_levels(block, format, lane, out);
}
