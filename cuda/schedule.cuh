// How a product's work is dealt to warps, and how their parts of a sum come together.
//
// A unit is a group of 32 rows in a tile column. Tile columns form panels of equal width (the last may be narrower), and a
// block works in one panel, so that it prepares few activations. The units of a panel are numbered with tile columns innermost
// and dealt to the panel's warps in runs of equal length, the split of Osama et al., "Stream-K", arXiv:2301.03598; neighbouring
// runs go to different blocks, so that the longer ones are spread. Rows whose units lie in several runs are put together by
// whoever finishes last, from partial sums in a fixed order, so that a result does not depend on timing.
#pragma once

#include "tile.cuh"

// Units in runs whose lengths differ by at most one, longer ones first.
struct Runs {
  u32 quotient, remainder;

  __device__ __forceinline__ Runs(u32 units, u32 workers) : quotient(units / workers), remainder(units % workers) {}
  __device__ __forceinline__ u32 begin(u32 worker) const { return worker * quotient + min(worker, remainder); }
  __device__ __forceinline__ u32 worker_of(u32 unit) const {
    const u32 longer = remainder * (quotient + 1);
    return unit < longer ? unit / (quotient + 1) : remainder + (unit - longer) / quotient;
  }
};

// A unit's place: its rows, and its tile column within the panel.
struct Unit {
  u32 row_group;
  u32 column;
};

struct Part {
  u32 units;
  u32 index;
};

// Few members, because they take registers in the kernels' loops; the host works out what does not depend on the warp.
struct Schedule {
  u32 row_groups, tile_columns;
  u32 panel_width, panel_blocks;  // of every panel but the last: tile columns; of every panel: thread blocks
  u32 worker;                     // this warp among those of its panel
  u32 first_column, width;        // this panel's tile columns

  __device__ __forceinline__ Schedule(u32 all_row_groups, u32 all_tile_columns, u32 width_of_panels, u32 blocks_of_panels)
      : row_groups(all_row_groups),
        tile_columns(all_tile_columns),
        panel_width(width_of_panels),
        panel_blocks(blocks_of_panels),
        worker(blockIdx.x % blocks_of_panels + blocks_of_panels * (threadIdx.x / kLanes)),
        first_column(blockIdx.x / blocks_of_panels * width_of_panels),
        width(min(width_of_panels, all_tile_columns - first_column)) {}
  __device__ __forceinline__ Runs runs(u32 wide) const {
    return Runs(row_groups * wide, panel_blocks * (blockDim.x / kLanes));
  }
  __device__ __forceinline__ Unit unit(u32 number) const { return {number / width, number % width}; }
  __device__ __forceinline__ Unit after(Unit unit) const {
    const bool wraps = unit.column + 1 == width;
    return {unit.row_group + wraps, wraps ? 0 : unit.column + 1};
  }
  __device__ __forceinline__ Unit before(Unit unit) const {
    const bool wraps = unit.column == 0;
    return {unit.row_group - wraps, (wraps ? width : unit.column) - 1};
  }
  // Index in the group table.
  __device__ __forceinline__ u32 index_of(Unit unit) const {
    return unit.row_group * tile_columns + first_column + unit.column;
  }
  __device__ __forceinline__ Place place_of(Unit unit, u32 rows, u32 cols, u32 tile_cols) const {
    return ::place_of(unit.row_group, first_column + unit.column, rows, cols, tile_cols);
  }
  // This warp's part of the sums of a row group: how many units are in it, and where it goes, if a panel may have `parts`.
  __device__ __forceinline__ Part own_part(u32 row_group, u32 parts) const {
    const Runs dealt = runs(width);
    const u32 first = row_group * width, last = first + width;
    // The worker anew, and in other words than above, so that it does not take a register in the meantime.
    const u32 panel = first_column / panel_width;
    const u32 own = blockIdx.x - panel * panel_blocks + panel_blocks * (threadIdx.x / kLanes);
    return {min(dealt.begin(own + 1), last) - max(dealt.begin(own), first), panel * parts + own - dealt.worker_of(first)};
  }
  // Calls take(index) for where all parts of a row group are, `batch` at a time and then done(): panel after panel, and all of it
  // for each of `tables` tables, whose parts are `panels · parts` apart.
  template <u32 batch, class Take, class Done>
  __device__ __forceinline__ void each_part(u32 row_group, u32 parts, u32 tables, Take&& take, Done&& done) const {
    const u32 panels = ceil_div(tile_columns, panel_width);
    auto parts_of = [&](u32 wide) {
      const Runs dealt = runs(wide);
      return dealt.worker_of((row_group + 1) * wide - 1) - dealt.worker_of(row_group * wide) + 1;
    };
    const u32 in_last = parts_of(tile_columns - (panels - 1) * panel_width);
    const u32 in_others = panels > 1 ? parts_of(panel_width) : 0;
    u32 left = tables * ((panels - 1) * in_others + in_last), panel = 0, index = 0;
#pragma unroll 1
    while (left > 0) {
#pragma unroll
      for (u32 i = 0; i < batch; ++i) {
        if (left > 0) {
          take(i, panel * parts + index);
          --left;
          const bool wraps = ++index == (panel % panels == panels - 1 ? in_last : in_others);
          panel += wraps;
          index = wraps ? 0 : index;
        }
      }
      done();
    }
  }
};

// A warp arrives with the sums of `units` of a row group's `all`: true for the last one to arrive, which sees the others' stores
// and leaves the ticket at 0 for the next launch. Call it after the warp's own stores.
__device__ __forceinline__ bool arrives_last(u32* ticket, u32 units, u32 all, u32 lane) {
  __syncwarp();
  u32 before = 0;
  if (lane == 0) {
    fence_device();
    before = atomicAdd(ticket, units);
    if (before + units == all) {
      fence_device();
      atomicExch(ticket, 0u);
    }
  }
  __syncwarp();
  return __shfl_sync(kAllLanes, before, 0) + units == all;
}
