// Symbol histograms of tiles, padding columns included.
#include "encode_elements.cuh"

// A block counts a tile, its warps a group each, in a histogram of their own (fewer collisions).
//
// elements: [matrices, rows, cols]; counts: u32 [tiles, 256]; block b takes tile first_tile + b.
extern "C" __global__ void __launch_bounds__(KVPACK_TILE_ROWS)
encode_count(const Element* elements, u32 rows, u32 cols, u32 tile_cols, u32 first_tile, u32 previous, u32* counts) {
  __shared__ u32 histograms[kGroupsPerTile][KVPACK_NUM_SYMBOLS];
  const u32 thread = threadIdx.x, group = thread / kLanes;
#pragma unroll
  for (u32 g = 0; g < kGroupsPerTile; ++g) histograms[g][thread] = 0;
  __syncthreads();
  const u32 tile = first_tile + blockIdx.x;
  const TileView view(elements, rows, cols, tile_cols, tile);
  if (thread < view.rows) {
    const Element* row = view.first + thread * view.row_stride;
    for (u32 chunk = 0; chunk < view.chunks; ++chunk) {
      u32 words[kChunkWords];
      load_chunk(view, row, chunk, previous, words);
#pragma unroll
      for (u32 step = 0; step < kChunkSteps; ++step) atomicAdd(&histograms[group][chunk_symbol(words, step)], 1u);
    }
  }
  __syncthreads();
  u32 sum = 0;
#pragma unroll
  for (u32 g = 0; g < kGroupsPerTile; ++g) sum += histograms[g][thread];
  counts[static_cast<u64>(tile) * KVPACK_NUM_SYMBOLS + thread] = sum;
}

static_assert(KVPACK_TILE_ROWS == KVPACK_NUM_SYMBOLS, "a thread is a lane first and a symbol then");
