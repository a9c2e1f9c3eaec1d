// Where tiles lie, what is planned for them and what they take (docs/FORMAT.md §§6, 7): for all kernels of the encoder.
#pragma once

#include "common/common.cuh"

constexpr u32 kMetadataWords = 8;  // u32 of a tile's metadata (§6)

// What is planned for a tile before it is coded: the index of its table (it may end up raw all the same), kPlanRaw, or
// kPlanConstant − symbol.
constexpr s32 kPlanRaw = -1;
constexpr s32 kPlanConstant = -2;

// Tile `tile` (matrix, then tile row, then tile column) of matrices of rows × cols.
struct TilePlace {
  u32 matrix, first_row, first_col;
  u32 rows, cols, groups, chunks;

  __device__ __forceinline__ TilePlace(u32 all_rows, u32 all_cols, u32 tile_cols, u32 tile) {
    const u32 across = ceil_div(all_cols, tile_cols), down = ceil_div(all_rows, KVPACK_TILE_ROWS);
    matrix = tile / across / down;
    first_row = tile / across % down * KVPACK_TILE_ROWS;
    first_col = tile % across * tile_cols;
    rows = min(static_cast<u32>(KVPACK_TILE_ROWS), all_rows - first_row);
    cols = min(tile_cols, all_cols - first_col);
    groups = ceil_div(rows, kLanes);
    chunks = ceil_div(cols, kChunkCols);
  }
};
