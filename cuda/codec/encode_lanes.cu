// rANS-encodes the lanes of tiles into scratch memory (docs/FORMAT.md §5.2).
#include "codec/encode_elements.cuh"

// An entry of an encoder's table. The quotient x div f is umulhi(x + round_down, reciprocal) >> shift, exact for all
// x < f·2^20 (kvpack/runtime/codec/encoder.py makes the table and gives the proof).
//
//   .x  reciprocal
//   .y  bit 31 .. 20    19 .. 7              6 .. 5   4            3 .. 0
//       frequency f     start (f > 1), or    zero     round_down   shift
//                       start + 4095 (f = 1)
struct LaneCoder {
  u32 state;
  u32 count;     // words emitted
  u64 pending;   // the last count mod 4 of them, the latest lowest
  u16* end;      // behind the lane's scratch: words fill it backwards

  __device__ __forceinline__ void put(uint2 entry) {
    const u32 frequency = entry.y >> 20;
    if (state >= (entry.y & 0xFFF00000u)) {
      pending = (pending << 16) | (state & 0xFFFFu);
      state >>= 16;
      ++count;
      // Four words at a time: single ones would cost a sector of memory traffic each.
      if (count % 4 == 0) *reinterpret_cast<u64*>(end - count) = pending;
    }
    const u32 quotient = __umulhi(state + (entry.y >> 4 & 1), entry.x) >> (entry.y & 15);
    state += (entry.y >> 7 & 0x1FFF) + quotient * (kTableSlots - frequency);
  }

  __device__ __forceinline__ void finish() {
    for (u32 word = 0; word < count % 4; ++word) *(end - count + word) = static_cast<u16>(pending >> (16 * word));
  }
};

// A block encodes a tile, a thread a lane: it has as many threads as the tile with the most rows has lanes. Tiles whose plan is negative have no table and are left alone.
//
// tables: uint2 [tables, 256]; plan: s32 [tiles]; words: u16 [blocks, blockDim.x, lane_words], a lane's words at the end of
// its part; states, lengths: u32 [blocks, blockDim.x]; tile_words: u32 [tiles], all the words of a tile. lane_words is a multiple of 4
// and at least ceil(steps · 12 / 16) + 1.
extern "C" __global__ void __launch_bounds__(KVPACK_TILE_ROWS)
encode_lanes(const Element* elements, u32 rows, u32 cols, u32 tile_cols, u32 first_tile, u32 previous, const s32* plan,
             const uint2* tables, u32 lane_words, u16* words, u32* states, u32* lengths, u32* tile_words) {
  __shared__ uint2 table[KVPACK_NUM_SYMBOLS];
  __shared__ u32 group_words[kGroupsPerTile];
  const u32 thread = threadIdx.x, tile = first_tile + blockIdx.x;
  const s32 table_index = plan[tile];
  if (table_index < 0) return;
  for (u32 i = thread; i < KVPACK_NUM_SYMBOLS; i += blockDim.x) table[i] = tables[table_index * KVPACK_NUM_SYMBOLS + i];
  __syncthreads();
  const TileView view(elements, rows, cols, tile_cols, tile);
  const u64 lane = static_cast<u64>(blockIdx.x) * blockDim.x + thread;
  LaneCoder coder{KVPACK_STATE_LOW, 0, 0, words + (lane + 1) * lane_words};
  if (thread < view.rows) {
    const Element* row = view.first + thread * view.row_stride;
    u32 words_of_chunk[kChunkWords], symbols[kChunkWords];
    load_chunk(view, row, view.chunks - 1, previous, words_of_chunk);
    for (u32 chunk = view.chunks; chunk-- > 0;) {
#pragma unroll
      for (u32 i = 0; i < kChunkWords; ++i) symbols[i] = words_of_chunk[i];
      if (kLoadAhead && chunk > 0) load_chunk(view, row, chunk - 1, previous, words_of_chunk);
      // Entries are loaded some steps ahead: behind a store of words the compiler would not load them before it.
      constexpr u32 at_once = 4;
#pragma unroll
      for (u32 end = kChunkSteps; end > 0; end -= at_once) {
        uint2 entries[at_once];
#pragma unroll
        for (u32 i = 0; i < at_once; ++i) entries[i] = table[chunk_symbol(symbols, end - 1 - i)];
#pragma unroll
        for (u32 i = 0; i < at_once; ++i) coder.put(entries[i]);
      }
      if (!kLoadAhead && chunk > 0) load_chunk(view, row, chunk - 1, previous, words_of_chunk);
    }
    coder.finish();
  }
  states[lane] = coder.state;
  lengths[lane] = coder.count;
  u32 sum = coder.count;
#pragma unroll
  for (u32 distance = kLanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  if (thread % kLanes == 0) group_words[thread / kLanes] = sum;
  __syncthreads();
  if (thread == 0) {
    u32 total = 0;
    for (u32 group = 0; group < blockDim.x / kLanes; ++group) total += group_words[group];
    tile_words[tile] = total;
  }
}
