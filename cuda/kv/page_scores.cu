// What scores the keys of pages can have, by query head: what range_scores of kvpack/runtime/kv/retrieval.py gives.
//
// A warp has one KV head of a few pages. A lane holds a quarter or so of a row: neighbouring lanes load neighbouring pairs.
#include "kv/page.cuh"

constexpr u32 kWarps = KVPACK_MAX_WARPS;
constexpr u32 kHeads = KVPACK_HEADS;  // query heads of a KV head that are computed at once
constexpr u32 kPagesOfWarp = KVPACK_PAGES_OF_WARP;
constexpr u32 kRows = ceil_div(kHeadDim, kLanes);  // pairs of a lane

__device__ __forceinline__ float query(const u16* q, u32 dim) {
  const u32 bits = __ldg(q + dim);
  return KVPACK_ACTIVATION == 0 ? f16_value(bits) : __uint_as_float(bits << 16);
}

// q: [batch, num_kv_heads · heads_per_kv_head, head_dim], element strides of the first two.
// summaries: [sequences, max_pages, num_kv_heads, head_dim], pairs of fp16. rows: [batch], of summaries.
// out: [batch, query heads, num_pages].
// blockIdx: x: pages; y: KV head times tiles of query heads, plus tile; z: row.
extern "C" __global__ void __launch_bounds__(kLanes * KVPACK_MAX_WARPS, KVPACK_BLOCKS_PER_SM)
page_scores(const u16* q, u64 q_batch, u64 q_head, const u32* summaries, const u64* rows, float* out, u32 max_pages, u32 num_kv_heads,
            u32 heads_per_kv_head, u32 num_pages, float scale, float width) {
  const u32 lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, tiles = ceil_div(heads_per_kv_head, kHeads);
  const u32 kv_head = blockIdx.y / tiles, first_head = blockIdx.y % tiles * kHeads, row = blockIdx.z;
  const u32 count = min(kHeads, heads_per_kv_head - first_head);
  float values[kHeads][kRows];
#pragma unroll
  for (u32 h = 0; h < kHeads; ++h) {
    const u16* of_head = q + row * q_batch + (kv_head * heads_per_kv_head + first_head + min(h, count - 1)) * q_head;
#pragma unroll
    for (u32 i = 0; i < kRows; ++i) {
      const u32 dim = lane + kLanes * i;
      values[h][i] = dim < kHeadDim ? scale * query(of_head, dim) : 0.0f;
    }
  }
  const u64 sequence = __ldg(rows + row);
#pragma unroll 2
  for (u32 j = 0; j < kPagesOfWarp; ++j) {
    const u32 page = (blockIdx.x * kWarps + warp) * kPagesOfWarp + j;
    if (page >= num_pages) return;
    const u32* of_page = summaries + ((sequence * max_pages + page) * num_kv_heads + kv_head) * kHeadDim;
    float sum[kHeads];
#pragma unroll
    for (u32 h = 0; h < kHeads; ++h) sum[h] = 0;
#pragma unroll
    for (u32 i = 0; i < kRows; ++i) {
      const u32 dim = lane + kLanes * i;
      const u32 range = dim < kHeadDim ? load_once_u32(of_page + dim) : 0;
      const float middle = f16_value(range & 0xFFFF), half = width * f16_value(range >> 16);
#pragma unroll
      for (u32 h = 0; h < kHeads; ++h) sum[h] += values[h][i] * middle + fabsf(values[h][i]) * half;
    }
#pragma unroll
    for (u32 h = 0; h < kHeads; ++h) {
#pragma unroll
      for (u32 step = 1; step < kLanes; step *= 2) sum[h] += __shfl_xor_sync(kAllLanes, sum[h], step);
      if (lane == h && h < count) {
        const u64 head = static_cast<u64>(row) * num_kv_heads * heads_per_kv_head + kv_head * heads_per_kv_head + first_head + h;
        out[head * num_pages + page] = sum[h];
      }
    }
  }
}
