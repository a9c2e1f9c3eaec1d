// Symbol histograms of tiles, padding columns included.
#include "codec/encode_elements.cuh"

// The least bits that a tile can take with any table, in units of 2^-8 bits.
//
// Frequencies f ≥ 1 of the symbols that the tile has sum to at most 4096. For any μ > 0 the sum of c·log2(4096/f) over counts
// c is then at least Σ (c·log2(4096/f) + μ·log2(e)·f) − 4096·μ·log2(e) where each f, real now, minimises its term:
// f = max(1, c/μ). The best μ makes these f sum to 4096; two steps from n/4096 come close enough. An eighth of the margin
// is more than the rounding of the terms (below 2^-18 bits a symbol) can be; so any order of any sums gives a bound.
constexpr float kUnitsPerBit = 256.0f;
constexpr float kMarginBits = 1.0f / (1 << 15);  // a symbol
constexpr float kLog2E = 1.44269504f;

__device__ __forceinline__ u32 block_sum(u32 value, u32* warp_sums) {
#pragma unroll
  for (u32 distance = kLanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  __syncthreads();
  if (threadIdx.x % kLanes == 0) warp_sums[threadIdx.x / kLanes] = value;
  __syncthreads();
  u32 sum = 0;
#pragma unroll
  for (u32 warp = 0; warp < KVPACK_NUM_SYMBOLS / kLanes; ++warp) sum += warp_sums[warp];
  return sum;
}

// `count`: that of the thread's symbol, of the tile's `symbols`.
__device__ __forceinline__ u32 least_units(u32 count, u32 symbols, u32* warp_sums) {
  constexpr u32 low_bits = 9;  // at most 256 symbols have a small count, and a tile has at most 2^17 symbols
  float mu = static_cast<float>(symbols) / kTableSlots;
#pragma unroll
  for (u32 step = 0; step < 2; ++step) {
    const bool low = static_cast<float>(count) < mu;
    const u32 sums = block_sum(low ? count != 0 : count << low_bits, warp_sums);
    mu = static_cast<float>(sums >> low_bits) / static_cast<float>(kTableSlots - (sums & ((1u << low_bits) - 1)));
  }
  const float frequency = fmaxf(1.0f, static_cast<float>(count) / mu);
  const float bits = static_cast<float>(count) * log2f(kTableSlots / frequency) + mu * kLog2E * frequency;
  const u32 units = block_sum(count != 0 ? static_cast<u32>(bits * kUnitsPerBit) : 0, warp_sums);
  const float rest = mu * kLog2E * kTableSlots + static_cast<float>(symbols) * kMarginBits;
  return units - min(units, static_cast<u32>(rest * kUnitsPerBit));
}

// A block counts a tile, each warp in a histogram of its own (fewer collisions).
//
// elements: [matrices, rows, cols]; counts: u32 [tiles, 256]; block b takes tile first_tile + b. summary, unless null:
// u64 [258], to which are added the histogram of all tiles, the least units that they take with any tables, and how many
// have one symbol alone.
extern "C" __global__ void __launch_bounds__(KVPACK_TILE_ROWS)
encode_count(const Element* elements, u32 rows, u32 cols, u32 tile_cols, u32 first_tile, u32 previous, u32* counts,
             u64* summary) {
  __shared__ u32 histograms[kGroupsPerTile][KVPACK_NUM_SYMBOLS];
  const u32 thread = threadIdx.x, warp = thread / kLanes;
#pragma unroll
  for (u32 g = 0; g < kGroupsPerTile; ++g) histograms[g][thread] = 0;
  __syncthreads();
  const u32 tile = first_tile + blockIdx.x;
  const TileView view(elements, rows, cols, tile_cols, tile);
  // Warps that have no group of their own take some of another one's chunks.
  const u32 share = warp / view.groups, shares = kGroupsPerTile / view.groups, in_tile = warp % view.groups * kLanes + thread % kLanes;
  if (in_tile < view.rows && share < min(shares, view.chunks)) {
    const Element* row = view.first + in_tile * view.row_stride;
    u32 words[kChunkWords], symbols[kChunkWords];
    load_chunk(view, row, share, previous, words);
    for (u32 chunk = share; chunk < view.chunks; chunk += shares) {
#pragma unroll
      for (u32 i = 0; i < kChunkWords; ++i) symbols[i] = words[i];
      if (kLoadAhead && chunk + shares < view.chunks) load_chunk(view, row, chunk + shares, previous, words);
#pragma unroll
      for (u32 step = 0; step < kChunkSteps; ++step) atomicAdd(&histograms[warp][chunk_symbol(symbols, step)], 1u);
      if (!kLoadAhead && chunk + shares < view.chunks) load_chunk(view, row, chunk + shares, previous, words);
    }
  }
  __syncthreads();
  u32 sum = 0;
#pragma unroll
  for (u32 g = 0; g < kGroupsPerTile; ++g) sum += histograms[g][thread];
  counts[static_cast<u64>(tile) * KVPACK_NUM_SYMBOLS + thread] = sum;
  if (summary == nullptr) return;
  if (sum != 0) atomicAdd(&summary[thread], static_cast<u64>(sum));
  __shared__ u32 warp_sums[KVPACK_NUM_SYMBOLS / kLanes];
  const u32 symbols = view.rows * view.chunks * kChunkSteps;
  const u32 units = least_units(sum, symbols, warp_sums);
  if (thread == 0) atomicAdd(&summary[KVPACK_NUM_SYMBOLS], static_cast<u64>(units));
  if (sum == symbols) atomicAdd(&summary[KVPACK_NUM_SYMBOLS + 1], u64{1});
}

static_assert(KVPACK_TILE_ROWS == KVPACK_NUM_SYMBOLS, "a thread is a lane first and a symbol then");
