// Modes, sizes and places of tiles: their metadata but for the CRC (docs/FORMAT.md §6).
#include "codec/encode_tiles.cuh"

constexpr u32 kThreads = KVPACK_PLACE_THREADS;

// One block of kThreads places tiles first_tile … first_tile + tiles − 1 behind *payload_bytes, which it moves on.
//
// plan: s32 [all tiles]; tile_words: u32 [all tiles]; outlier_first: u32 [all tiles + 1], where the outliers of a tile
// begin among all; metadata: u32 [all tiles, 8]. length_bytes are those of a lane's length (§7.1), element_bits and
// raw_bits the layout's.
extern "C" __global__ void __launch_bounds__(kThreads)
encode_place(u32 rows, u32 cols, u32 tile_cols, u32 first_tile, u32 tiles, u32 previous, u32 length_bytes,
             u32 element_bits, u32 raw_bits, const s32* plan, const u32* tile_words, const u32* outlier_first, u32* metadata, u64* payload_bytes) {
  __shared__ u32 warp_sums[kThreads / kLanes];
  const u32 thread = threadIdx.x, lane = thread % kLanes, warp = thread / kLanes;
  u64 offset = *payload_bytes;
  for (u32 first = 0; first < tiles; first += kThreads) {
    const bool inside = first + thread < tiles;
    const u32 tile = first_tile + first + thread;
    u32 size = 0, raw_offset = 0, mode = KVPACK_MODE_RAW, table_index = 0, outliers = 0, outlier_offset = 0;
    if (inside) {
      const TilePlace place(rows, cols, tile_cols, tile);
      const s32 planned = plan[tile];
      const u32 raw = (place.rows * place.cols * element_bits + 7) / 8;                            // §7.2
      const u32 planes = place.groups * kLanes * place.chunks * (kChunkCols / 8) * raw_bits;  // §7.4
      u32 end = raw;
      if (planned >= 0) {
        const u32 words_at = kGroupOffsetsBytes + place.groups * kLanes * (4 + length_bytes);
        raw_offset = align_up(words_at + 2 * tile_words[tile], KVPACK_ALIGNMENT_BYTES);
        end = raw_offset + planes;
        mode = KVPACK_MODE_RANS;
        table_index = planned;
      } else if (planned <= kPlanConstant) {
        raw_offset = KVPACK_ALIGNMENT_BYTES;
        end = raw_offset + planes;
        mode = KVPACK_MODE_CONSTANT;
      }
      if (end >= raw) {
        mode = KVPACK_MODE_RAW;
        raw_offset = 0;
        table_index = 0;
        end = raw;
      }
      outliers = outlier_first[tile + 1] - outlier_first[tile];
      outlier_offset = align_up(end, 4);
      size = outlier_offset + 4 * outliers;
    }
    // The sum of all sizes in front of this one's.
    const u32 aligned = align_up(size, KVPACK_ALIGNMENT_BYTES);
    u32 sum = aligned;
#pragma unroll
    for (u32 distance = 1; distance < kLanes; distance *= 2) {
      const u32 other = __shfl_up_sync(kAllLanes, sum, distance);
      if (lane >= distance) sum += other;
    }
    if (lane == kLanes - 1) warp_sums[warp] = sum;
    __syncthreads();
    u32 before = 0, total = 0;
    for (u32 w = 0; w < kThreads / kLanes; ++w) {
      if (w == warp) before = total;
      total += warp_sums[w];
    }
    __syncthreads();
    if (inside) {
      const u64 data_offset = offset + before + sum - aligned;
      u32* entry = metadata + static_cast<u64>(tile) * kMetadataWords;
      const bool predicted = mode == KVPACK_MODE_RANS && previous;
      entry[0] = static_cast<u32>(data_offset);
      entry[1] = static_cast<u32>(data_offset >> 32);
      entry[2] = size;
      entry[3] = raw_offset;
      entry[4] = mode | (predicted ? KVPACK_PREDICTOR_PREVIOUS << 8 : 0) | table_index << 16;
      entry[5] = outliers;
      entry[6] = outlier_offset;
    }
    offset += total;
  }
  if (thread == 0) *payload_bytes = offset;
}
