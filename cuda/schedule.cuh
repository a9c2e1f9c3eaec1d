// How a product's work is dealt to blocks, and how their parts of a sum come together.
//
// Units of equal work (a kernel says which) are numbered with tile columns innermost and dealt to the thread blocks in runs of
// equal length, the split of Osama et al., "Stream-K", arXiv:2301.03598. Rows whose units lie in several runs are put together by
// whoever finishes last, from partial sums in a fixed order, so that a result does not depend on timing.
#pragma once

#include "common.cuh"

struct Schedule {
  u32 units;   // all of them
  u32 blocks;  // gridDim.x
  u32 quotient, remainder;

  __device__ __forceinline__ Schedule(u32 all_units, u32 all_blocks)
      : units(all_units), blocks(all_blocks), quotient(all_units / all_blocks), remainder(all_units % all_blocks) {}
  __device__ __forceinline__ u32 begin(u32 block) const { return block * quotient + min(block, remainder); }
  __device__ __forceinline__ u32 block_of(u32 unit) const {
    u32 longer = remainder * (quotient + 1);
    return unit < longer ? unit / (quotient + 1) : remainder + (unit - longer) / quotient;
  }
};

// A warp's arrival among the `contributions` to its rows: true for the last one, which sees the others' stores and leaves the
// ticket at 0 for the next launch. Call it after the warp's own stores.
__device__ __forceinline__ bool arrives_last(u32* ticket, u32 contributions, u32 lane) {
  __threadfence();
  __syncwarp();
  u32 before = 0;
  if (lane == 0) before = atomicAdd(ticket, 1u);
  before = __shfl_sync(kAllLanes, before, 0);
  if (before != contributions - 1) return false;
  if (lane == 0) atomicExch(ticket, 0u);
  __threadfence();
  return true;
}
