// Writes tiles to their places in the payload (docs/FORMAT.md §7).
#include "codec/encode_elements.cuh"

// Raw planes of a tile, a warp a group.
__device__ __forceinline__ void pack_planes(const TileView& view, bool previous, u8* planes) {
  if constexpr (kRawBits != 0) {
    const u32 thread = threadIdx.x, group = thread / kLanes, lane = thread % kLanes;
    if (group >= view.groups) return;
    const Element* row = view.first + thread * view.row_stride;
    u32* of_group = reinterpret_cast<u32*>(planes) + static_cast<u64>(group) * view.chunks * kLanes * kRawBits;
    for (u32 chunk = 0; chunk < view.chunks; ++chunk) {
      u32 words[kChunkWords];
      if (thread < view.rows) {
        load_chunk(view, row, chunk, previous, words);
      } else {
#pragma unroll
        for (u32 i = 0; i < kChunkWords; ++i) words[i] = 0;
      }
      store_planes(words, lane, of_group + chunk * kLanes * kRawBits);
    }
  }
}

// Group offsets, states, lengths and words.
__device__ __forceinline__ void pack_lanes(const TileView& view, u32 length_bytes, u32 lane_words, const u16* words,
                                           const u32* states, const u32* lengths, u32 raw_offset, u8* tile) {
  __shared__ u32 group_words[kGroupsPerTile];
  const u32 thread = threadIdx.x, group = thread / kLanes, lane = thread % kLanes, lanes = view.groups * kLanes;
  const u32 length = thread < view.rows ? lengths[thread] : 0;
  u32 sum = length;
#pragma unroll
  for (u32 distance = 1; distance < kLanes; distance *= 2) {
    const u32 other = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == kLanes - 1) group_words[group] = sum;
  __syncthreads();
  u32 before = 0, total = 0;
  for (u32 g = 0; g < blockDim.x / kLanes; ++g) {
    if (g == group) before = total;
    total += group_words[g];
  }
  u32* head = reinterpret_cast<u32*>(tile);
  if (lane == 0) head[group] = before;  // equals the total behind the last group
  if (thread == 0) {
    for (u32 g = blockDim.x / kLanes; g < kGroupsPerTile; ++g) head[g] = total;
  }
  u8* length_table = tile + kGroupOffsetsBytes + 4 * lanes;
  u16* out = reinterpret_cast<u16*>(length_table + lanes * length_bytes);
  if (thread < lanes) {
    head[kGroupsPerTile + thread] = thread < view.rows ? states[thread] : static_cast<u32>(KVPACK_STATE_LOW);
    if (length_bytes == 1) {
      length_table[thread] = static_cast<u8>(length);
    } else {
      reinterpret_cast<u16*>(length_table)[thread] = static_cast<u16>(length);
    }
  }
  // A warp copies the words of its lanes, several lanes at once so that their loads overlap.
  constexpr u32 at_once = kLoadAhead ? 8 : 4;
  const u32 first = before + sum - length;
  for (u32 l = 0; l < kLanes; l += at_once) {
    u32 counts[at_once], firsts[at_once], longest = 0;
#pragma unroll
    for (u32 i = 0; i < at_once; ++i) {
      counts[i] = __shfl_sync(kAllLanes, length, l + i);
      firsts[i] = __shfl_sync(kAllLanes, first, l + i);
      longest = max(longest, counts[i]);
    }
    const u16* from = words + static_cast<u64>(group * kLanes + l) * lane_words;
    for (u32 base = 0; base < longest; base += kLanes) {
      u16 values[at_once];
#pragma unroll
      for (u32 i = 0; i < at_once; ++i) {
        values[i] = base + lane < counts[i] ? from[(i + 1) * lane_words - counts[i] + base + lane] : 0;
      }
#pragma unroll
      for (u32 i = 0; i < at_once; ++i) {
        if (base + lane < counts[i]) out[firsts[i] + base + lane] = values[i];
      }
    }
  }
  u16* end = reinterpret_cast<u16*>(tile + raw_offset);
  if (out + total + thread < end) out[total + thread] = 0;
}

// Mode raw: a thread takes chunks, if these are whole u32 of the bit string, or gathers a u32 from elements.
__device__ __forceinline__ void pack_raw(const TileView& view, u8* tile) {
  if (view.cols % kChunkCols == 0) {
    for (u32 unit = threadIdx.x; unit < view.rows * view.chunks; unit += blockDim.x) {
      constexpr u32 mask = kElementBytes == 4 ? ~0u : (1u << 8 * kElementBytes % 32) - 1;
      u32 elements[kChunkWords], packed[kElementBits] = {};
      load_elements(view, view.first + unit / view.chunks * view.row_stride, unit % view.chunks, elements);
#pragma unroll
      for (u32 i = 0; i < kChunkCols; ++i) {
        const u32 element = elements[i * kElementBytes / 4] >> 8 * (i * kElementBytes % 4) & mask, bit = i * kElementBits;
        packed[bit / 32] |= element << bit % 32;
        if (bit % 32 + kElementBits > 32) packed[bit / 32 + 1] |= element >> (32 - bit % 32);
      }
      u32* const words = reinterpret_cast<u32*>(tile) + unit * kElementBits;
#pragma unroll
      for (u32 i = 0; i < kElementBits; ++i) words[i] = packed[i];
    }
    return;
  }
  const u32 elements = view.rows * view.cols, words = ceil_div(elements * kElementBits, 32);
  for (u32 word = threadIdx.x; word < words; word += blockDim.x) {
    u32 element = word * 32 / kElementBits;
    u32 row = element / view.cols, col = element % view.cols;
    s32 shift = static_cast<s32>(element * kElementBits) - static_cast<s32>(word * 32);
    u32 value = 0;
    while (shift < 32 && element < elements) {
      const u32 part = view.first[row * view.row_stride + col];
      value |= shift < 0 ? part >> -shift : part << shift;
      shift += kElementBits;
      ++element;
      if (++col == view.cols) {
        col = 0;
        ++row;
      }
    }
    reinterpret_cast<u32*>(tile)[word] = value;
  }
}

// A block writes a tile. Arguments as for encode_lanes and encode_place; outliers: u32, packed (§7.5), sorted by tile, row
// and column; payload is aligned to 16 bytes.
extern "C" __global__ void __launch_bounds__(KVPACK_TILE_ROWS)
encode_pack(const Element* elements, u32 rows, u32 cols, u32 tile_cols, u32 first_tile, u32 previous, u32 length_bytes,
            const s32* plan, u32 lane_words, const u16* words, const u32* states, const u32* lengths,
            const u32* outlier_first, const u32* outliers, const u32* metadata, u8* payload) {
  const u32 thread = threadIdx.x, tile = first_tile + blockIdx.x;
  const u32* entry = metadata + static_cast<u64>(tile) * kMetadataWords;
  const u32 size = entry[2], raw_offset = entry[3], mode = entry[4] & 0xFF, outlier_offset = entry[6];
  u8* out = payload + (entry[0] | static_cast<u64>(entry[1]) << 32);
  const TileView view(elements, rows, cols, tile_cols, tile);
  if (mode == KVPACK_MODE_RANS) {
    const u64 first_lane = static_cast<u64>(blockIdx.x) * blockDim.x;
    pack_lanes(view, length_bytes, lane_words, words + first_lane * lane_words, states + first_lane,
               lengths + first_lane, raw_offset, out);
    pack_planes(view, previous, out + raw_offset);
  } else if (mode == KVPACK_MODE_CONSTANT) {
    if (thread < KVPACK_ALIGNMENT_BYTES) out[thread] = thread == 0 ? static_cast<u8>(kPlanConstant - plan[tile]) : 0;
    pack_planes(view, false, out + raw_offset);
  } else {
    pack_raw(view, out);
  }
  u32* end = reinterpret_cast<u32*>(out + outlier_offset);
  const u32* from = outliers + outlier_first[tile];
  for (u32 i = thread; i < (size - outlier_offset) / 4; i += blockDim.x) end[i] = from[i];
  if (thread < (align_up(size, KVPACK_ALIGNMENT_BYTES) - size) / 4) reinterpret_cast<u32*>(out + size)[thread] = 0;
}
