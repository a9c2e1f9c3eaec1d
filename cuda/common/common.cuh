// What all kernels share: integer types, geometry of a tile (docs/FORMAT.md §7), and the group table of the runtime.
//
// The constants KVPACK_* come from kvpack/format/layout.py as -D options; none is typed here.
#pragma once

#include "common/ptx.cuh"

static_assert(KVPACK_GROUP_LANES == 32, "a group is a warp");
static_assert(KVPACK_CHUNK_COLS == 32, "a chunk is eight registers of four bytes a lane");
static_assert(KVPACK_PROBABILITY_BITS == 12, "an entry of a decoder's table has 12 + 12 + 8 bits");

constexpr u32 kLanes = KVPACK_GROUP_LANES;
constexpr u32 kChunkCols = KVPACK_CHUNK_COLS;
constexpr u32 kGroupsPerTile = KVPACK_TILE_ROWS / KVPACK_GROUP_LANES;
constexpr u32 kTableSlots = 1u << KVPACK_PROBABILITY_BITS;
constexpr u32 kAllLanes = 0xFFFFFFFFu;
constexpr u32 kGroupOffsetsBytes = 4 * kGroupsPerTile;

__device__ constexpr u32 ceil_div(u32 a, u32 b) { return (a + b - 1) / b; }
__device__ constexpr u32 align_up(u32 value, u32 multiple) { return ceil_div(value, multiple) * multiple; }
