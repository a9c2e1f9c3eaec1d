// How a product's work is dealt to warps, and how their parts of a sum come together.
//
// A unit is a group of 32 rows in a tile column. Tile columns form panels of `panel_width` (the last may be narrower); a block works
// in one of them, so that it prepares few activations (split-K). Its warps form teams: a team takes whole rows of the panel, and each
// of its members `member_width` tile columns of them.
//
//   grid    x: blocks of a panel   y: panels
//   block   x: lanes   y: members of a team   z: teams
//
//   panel_width 4, member_width 2        panel 0              panel 1
//                                   member 0  member 1   member 0  member 1
//                    tile columns     0  1      2  3       4  5      6
//
// Row groups are dealt to a panel's teams in runs, whose lengths differ by at most one; neighbouring runs go to different blocks, so
// that the longer ones are spread. Members put their sums together in shared memory; panels (and tables, one launch each) in global
// memory, by the last one to arrive. Parts are added in a fixed order, so that a result does not depend on timing.
#pragma once

#include "codec/tile.cuh"

// Runs whose lengths differ by at most one, longer ones first.
struct Runs {
  u32 quotient, remainder;
  __device__ __forceinline__ u32 begin(u32 worker) const { return worker * quotient + min(worker, remainder); }
  __device__ __forceinline__ u32 longest() const { return quotient + (remainder > 0); }
  __device__ __forceinline__ u32 worker_of(u32 unit) const {
    const u32 longer = remainder * (quotient + 1);
    return unit < longer ? unit / (quotient + 1) : remainder + (unit - longer) / quotient;
  }
};

// A unit's place: its rows, and its tile column among those of the warp.
struct Unit {
  u32 row_group;
  u32 column;
};

// Few members, because they take registers in the kernels' loops: what can be had again from the launch is not kept.
struct Schedule {
  u32 tile_columns;
  u32 first_column, width;  // this warp's tile columns

  __device__ __forceinline__ Schedule(u32 all_tile_columns, u32 panel_width, u32 member_width) : tile_columns(all_tile_columns) {
    const u32 first_of_panel = blockIdx.y * panel_width;
    const u32 end = min(first_of_panel + panel_width, tile_columns);
    first_column = min(first_of_panel + threadIdx.y * member_width, end);
    width = min(member_width, end - first_column);
  }
  static __device__ __forceinline__ u32 team() { return blockIdx.x + gridDim.x * threadIdx.z; }
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
};

// What a lane holds of a row group's sums. A warp's lie in memory as `count` floats a lane: 16 bytes of each lane after another, or
// 4 if there is one.
template <u32 count>
struct Sums {
  float of[count];

  static constexpr u32 kBytes = 4 * count * kLanes;  // of a warp
  static constexpr u32 kVectors = count / 4;
  static_assert(count == 1 || count % 4 == 0);

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (u32 i = 0; i < count; ++i) of[i] = 0;
  }
  __device__ __forceinline__ void add(const Sums& other) {
#pragma unroll
    for (u32 i = 0; i < count; ++i) of[i] += other.of[i];
  }
  __device__ __forceinline__ void store_shared(u32 address, u32 lane) const {
    if constexpr (count == 1) store_shared_u32(address + 4 * lane, __float_as_uint(of[0]));
#pragma unroll
    for (u32 i = 0; i < kVectors; ++i) {
      store_shared_v4(address + 16 * (i * kLanes + lane),
                      make_uint4(__float_as_uint(of[4 * i]), __float_as_uint(of[4 * i + 1]),
                                 __float_as_uint(of[4 * i + 2]), __float_as_uint(of[4 * i + 3])));
    }
  }
  __device__ __forceinline__ void add_shared(u32 address, u32 lane) {
    if constexpr (count == 1) of[0] += __uint_as_float(load_shared_u32(address + 4 * lane));
#pragma unroll
    for (u32 i = 0; i < kVectors; ++i) {
      const uint4 v = load_shared_v4(address + 16 * (i * kLanes + lane));
      of[4 * i] += __uint_as_float(v.x);
      of[4 * i + 1] += __uint_as_float(v.y);
      of[4 * i + 2] += __uint_as_float(v.z);
      of[4 * i + 3] += __uint_as_float(v.w);
    }
  }
  __device__ __forceinline__ void store_global(float* to, u32 lane) const {
    if constexpr (count == 1) to[lane] = of[0];
#pragma unroll
    for (u32 i = 0; i < kVectors; ++i) {
      reinterpret_cast<float4*>(to)[i * kLanes + lane] = make_float4(of[4 * i], of[4 * i + 1], of[4 * i + 2], of[4 * i + 3]);
    }
  }
  __device__ __forceinline__ void load_global(const float* from, u32 lane) {
    if constexpr (count == 1) of[0] = load_l2_f32(from + lane);
#pragma unroll
    for (u32 i = 0; i < kVectors; ++i) {
      const float4 v = load_l2_v4(reinterpret_cast<const float4*>(from) + i * kLanes + lane);
      of[4 * i] = v.x, of[4 * i + 1] = v.y, of[4 * i + 2] = v.z, of[4 * i + 3] = v.w;
    }
  }
};

// Where members put their sums: for each team a sum of each member, and as many again if a run has several row groups, which take
// turns.
struct MemberSums {
  u32 address;  // in shared memory
  Runs runs;
};

// Members meet with their sums of a row group: true for one of them, which then has the sum of all. It may still be adding when the
// others are at the next row group, but not when they are at the one after, since all have met in between.
template <u32 count>
__device__ __forceinline__ bool join_members(Sums<count>& sums, const MemberSums& among, u32 row_group, u32 members, u32 lane) {
  constexpr u32 bytes = Sums<count>::kBytes;
  const u32 round = row_group - among.runs.begin(Schedule::team());
  const u32 slot = among.runs.longest() > 1 ? 2 * threadIdx.z + round % 2 : threadIdx.z;
  const u32 first = among.address + slot * blockDim.y * bytes;
  sums.store_shared(first + threadIdx.y * bytes, lane);
  __syncwarp();
  sync_warps(1 + threadIdx.z, members * kLanes);
  if (threadIdx.y != (round < members ? round : 0)) return false;  // in turn
  sums.clear();
#pragma unroll 4
  for (u32 member = 0; member < members; ++member) sums.add_shared(first + member * bytes, lane);
  return true;
}

// A panel arrives with its sums of a row group, as number `part` of `parts`: true for the last one, which then has the sum of all, and
// leaves the semaphore at 0 for the next launch. `ahead` parts are loaded at a time.
template <u32 ahead, u32 count>
__device__ __forceinline__ bool join_parts(Sums<count>& sums, float* partials, u32* semaphores, u32 row_group, u32 part, u32 parts, u32 lane) {
  float* first = partials + static_cast<u64>(row_group) * parts * (count * kLanes);
  sums.store_global(first + part * (count * kLanes), lane);
  __syncwarp();
  u32 before = 0;
  if (lane == 0) {
    fence_device();
    before = atomicAdd(semaphores + row_group, 1u);
    if (before + 1 == parts) {
      fence_device();
      atomicExch(semaphores + row_group, 0u);
    }
  }
  __syncwarp();
  if (__shfl_sync(kAllLanes, before, 0) + 1 < parts) return false;
  if (parts == 2) {  // a sum of two is the same either way round
    Sums<count> other;
    other.load_global(first + (1 - part) * (count * kLanes), lane);
    sums.add(other);
    return true;
  }
  sums.clear();
#pragma unroll 1
  for (u32 batch = 0; batch < parts; batch += ahead) {
    Sums<count> others[ahead];
#pragma unroll
    for (u32 i = 0; i < ahead; ++i) {
      others[i].clear();
      if (batch + i < parts) others[i].load_global(first + (batch + i) * (count * kLanes), lane);
    }
#pragma unroll
    for (u32 i = 0; i < ahead; ++i) sums.add(others[i]);
  }
  return true;
}
