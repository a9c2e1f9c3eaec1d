// Pages copied as they are, from wherever a GPU can read: host memory that is pinned, too. Nothing waits for the host.
#include "kv/page.cuh"

constexpr u32 kThreads = kLanes * KVPACK_MAX_WARPS;
constexpr u32 kUnits = 4;  // of 16 bytes, under way at once for a thread: the way is long

// pages: what entries count from; null if they are addresses. jobs: [gridDim.y, 2 sides, 2], entries of a source, or -1 where nothing
// is to be copied, and of a target.
// blockIdx: x: part of a page; y: job; z: side.
extern "C" __global__ void __launch_bounds__(kThreads, KVPACK_BLOCKS_PER_SM)
page_fetch(u8* pages, const u64* jobs, u32 num_heads) {
  const u32 side = blockIdx.z;
  const u64* job = jobs + 2 * (2 * static_cast<u64>(blockIdx.y) + side);
  const u64 source = __ldg(job), target = __ldg(job + 1);
  if (source == ~u64{0}) return;
  const u32 units = num_heads * block_bytes(side, entry_format(source)) / 16;
  const u8* from = entry_page(static_cast<const u8*>(pages), source);
  u8* to = entry_page(pages, target);
  for (u32 first = blockIdx.x * kThreads * kUnits + threadIdx.x; first < units; first += gridDim.x * kThreads * kUnits) {
    uint4 values[kUnits];
#pragma unroll
    for (u32 i = 0; i < kUnits; ++i) values[i] = load_once_v4(from + 16 * static_cast<u64>(min(first + i * kThreads, units - 1)));
#pragma unroll
    for (u32 i = 0; i < kUnits; ++i) {
      if (first + i * kThreads < units) *reinterpret_cast<uint4*>(to + 16 * static_cast<u64>(first + i * kThreads)) = values[i];
    }
  }
}
