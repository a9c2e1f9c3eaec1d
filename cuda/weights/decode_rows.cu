// Some rows of a coded matrix → fp16, bf16 or fp32, as an embedding looks them up.
//
// A warp takes one row in one tile column. A lane of a blob is a chain of steps, which one thread of the warp walks, from words in
// shared memory to symbols in shared memory; the others then make elements of these and of the raw planes, a column each.
//
// KVPACK_OUTPUT is 3 (fp16), 4 (bf16) or 5 (fp32) as in weights/decode.cu, and so are the numbers: (scale × (integer + outlier) + row
// offset) × column scale, each rounded to fp32, and to the type (§8).
//
// Shared memory, for each warp: integers, 4 bytes for each of tile_cols columns | the lane's words, 2 bytes a step | symbols, 1 byte a
// step.
#include "codec/tile.cuh"

static_assert(kSigned && kElementBits <= 8, "rows are of quantized matrices");

constexpr u32 kWarps = KVPACK_MAX_WARPS;
constexpr u32 kOutput = KVPACK_OUTPUT;
constexpr u32 kCodeMask = (1u << kCodeBits) - 1;

// The raw bits of column `col` of a chunk (§7.4): planes of 4, 2 and 1 bits, highest first. `planes` are the chunk's, of all lanes.
__device__ __forceinline__ u32 raw_bits_of(const u8* planes, u32 lane, u32 col) {
  const u32 slot = column_slot(col), byte = column_byte(col);
  u32 bits = 0;
#pragma unroll
  for (u32 width = 4; width > 0; width /= 2) {
    if ((kRawBits & width) == 0) continue;
    const u32* of_lane = reinterpret_cast<const u32*>(planes) + width * lane;
    bits = bits << width | ((__ldg(of_lane + slot * width / 8) >> (8 * byte + slot * width % 8)) & ((1u << width) - 1));
    planes += 4 * kLanes * width;
  }
  return bits;
}

// The grid of an element of a trellis (§4.1), from the parities of every other row above it.
__device__ __forceinline__ u32 grid_of(const Group& group, const Place& place, const u8* planes, u32 own, u32 col) {
  u32 grid = 0;
  for (u32 distance = 1; distance <= own; distance += 2) {
    const u32 lane = own - distance;
    if (group.mode != KVPACK_MODE_RAW) {
      grid ^= raw_bits_of(planes, lane, col % kChunkCols);
    } else if (col < place.tile_cols) {
      grid ^= raw_mode_element(group, place, place.group * kLanes + lane, col);
    }
  }
  return grid & 1;
}

// An element of a symbol and raw bits (§4).
__device__ __forceinline__ u32 joined(u32 symbol, u32 raw, u32 col) {
  u32 code = (symbol >> (kCodeBits * (col % kCodesPerSymbol))) & kCodeMask;
  if constexpr (kFolded) {
    if ((raw >> (kRawBits - 1)) & 1) code ^= kCodeMask;
    return (code << kRawBits | raw) ^ 1u << (kElementBits - 1);
  }
  return code << kRawBits | raw;
}

// One thread decodes a lane's symbols; whether it ended as it must.
__device__ __forceinline__ bool decode_symbols(const u32* table, u32 state, u32 words, u32 num_words, u32 symbols, u32 steps) {
  u32 at = 0;
  for (u32 step = 0; step < steps; ++step) {
    const u32 entry = __ldg(table + state % kTableSlots);
    store_shared_u8(symbols + step, entry & 0xFF);
    state = (entry >> 20) * (state >> KVPACK_PROBABILITY_BITS) + ((entry >> 8) & (kTableSlots - 1));
    if (state < KVPACK_STATE_LOW) {
      if (at == num_words) return false;
      state = state << 16 | load_shared_u16(words + 2 * at++);
    }
  }
  return state == KVPACK_STATE_LOW && at == num_words;
}

__device__ __forceinline__ void store_number(u8* output, u64 index, float value) {
  if constexpr (kOutput == 3) reinterpret_cast<u16*>(output)[index] = static_cast<u16>(f16_bits(value));
  if constexpr (kOutput == 4) reinterpret_cast<u16*>(output)[index] = static_cast<u16>(bf16_bits(value));
  if constexpr (kOutput == 5) reinterpret_cast<float*>(output)[index] = value;
}

// ids: s64 [count]; output: [count, cols], rows of ids that name none are zeros; tables: u32 [tables, 4096].
extern "C" __global__ void __launch_bounds__(KVPACK_MAX_WARPS * 32, KVPACK_BLOCKS_PER_SM)
decode_rows(const u8* blob, const uint4* groups, const u32* tables, const float* scales, u32 scale_stride, const float* row_offsets,
            const float* column_scales, const long long* ids, u8* output, u32* status, u32 count, u32 rows, u32 cols, u32 tile_cols,
            u32 tile_columns, u32 length_bytes) {
  KVPACK_DYNAMIC_SHARED(shared);
  const u32 lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const u32 max_steps = tile_cols / kCodesPerSymbol;
  const u32 integers = shared_address(shared) + warp * (4 * tile_cols + 3 * max_steps);
  const u32 words = integers + 4 * tile_cols, symbols = words + 2 * max_steps;

  const u64 unit = static_cast<u64>(blockIdx.x) * kWarps + warp;
  const u64 number = unit / tile_columns;
  const u32 column = static_cast<u32>(unit % tile_columns);
  if (number >= count) return;
  const long long id = ids[number];
  const u64 first = number * cols + static_cast<u64>(column) * tile_cols;
  if (id < 0 || id >= static_cast<long long>(rows)) {
    const u32 width = min(cols - column * tile_cols, tile_cols);
    for (u32 col = lane; col < width; col += kLanes) store_number(output, first + col, 0.0f);
    return;
  }

  const u32 row = static_cast<u32>(id), row_group = row / kLanes, own = row % kLanes;
  const u32 index = row_group * tile_columns + column;
  const Group group = unpack_group(blob, __ldg(groups + index));
  const Place place = place_of(row_group, column, rows, cols, tile_cols);
  const u32 chunks = place.chunks();

  if (group.mode == KVPACK_MODE_RANS) {
    const u32 steps = chunks * kStepsPerChunk;
    const LaneStart start = load_lane_start(group, place, length_bytes, lane);
    u32 end = start.num_words;
#pragma unroll
    for (u32 distance = 1; distance < kLanes; distance *= 2) {
      const u32 before = __shfl_up_sync(kAllLanes, end, distance);
      if (lane >= distance) end += before;
    }
    const u32 state = __shfl_sync(kAllLanes, start.state, own), num_words = __shfl_sync(kAllLanes, start.num_words, own);
    const u32 begin = __shfl_sync(kAllLanes, end, own) - num_words;
    // A damaged length must lead neither out of the group's words nor out of the room for them.
    const bool fits = num_words <= steps && begin + num_words <= group.num_words;
    if (fits) {
      const u16* source = reinterpret_cast<const u16*>(group.tile) + group.first_word + begin;
      for (u32 i = lane; i < num_words; i += kLanes) store_shared_u16(words + 2 * i, __ldg(source + i));
    }
    __syncwarp();
    if (lane == 0) {
      const u32* table = tables + static_cast<u64>(group.table) * kTableSlots;
      if (!decode_symbols(table, state, words, fits ? num_words : 0, symbols, steps) || !fits) report_damage(status, index);
    }
    __syncwarp();
  }

  const u32 constant = group.mode == KVPACK_MODE_CONSTANT ? static_cast<u32>(__ldg(group.tile)) : 0;
  const u8* planes = group.tile + group.raw_offset + place.group * chunks * kRawChunkBytes;
  u32 before = 0;  // sum of the differences of the chunks before, with predictor 1 (§5.3)
  for (u32 chunk = 0; chunk < chunks; ++chunk) {
    const u32 col = chunk * kChunkCols + lane;
    u32 element = 0;
    if (group.mode == KVPACK_MODE_RAW) {
      if (col < place.tile_cols) element = raw_mode_element(group, place, place.group * kLanes + own, col);
    } else {
      const u32 symbol = group.mode == KVPACK_MODE_RANS ? load_shared_u8(symbols + col / kCodesPerSymbol) : constant;
      element = joined(symbol, raw_bits_of(planes + chunk * kRawChunkBytes, own, lane), lane);
    }
    if constexpr (kTrellis) element = element << 2 | grid_of(group, place, planes + chunk * kRawChunkBytes, own, col) << 1 | 1;
    if (group.predictor != 0) {
      u32 sum = col == 0 ? element : element - kHalf;
#pragma unroll
      for (u32 distance = 1; distance < kLanes; distance *= 2) {
        const u32 other = __shfl_up_sync(kAllLanes, sum, distance);
        if (lane >= distance) sum += other;
      }
      sum += before;
      before = __shfl_sync(kAllLanes, sum, kLanes - 1);
      element = sum & kElementMask;
    }
    store_shared_u32(integers + 4 * col, element - kHalf);
  }
  __syncwarp();
  const u32 delta_bits = outlier_delta_bits(tile_cols);
  for (u32 i = lane; i < group.num_outliers; i += kLanes) {
    const u32 outlier = __ldg(outliers_of(group, place) + i), col = outlier_col(outlier, delta_bits);
    if (outlier_lane(outlier) != own || col >= place.tile_cols) continue;
    store_shared_u32(integers + 4 * col, load_shared_u32(integers + 4 * col) + static_cast<u32>(outlier_delta(outlier, delta_bits)));
  }
  __syncwarp();
  const float scale = __ldg(scales + static_cast<u64>(row) * scale_stride);
  for (u32 col = lane; col < place.tile_cols; col += kLanes) {
    float value = multiply_ieee(scale, static_cast<float>(static_cast<s32>(load_shared_u32(integers + 4 * col))));
    if (row_offsets != nullptr) value = add_ieee(value, __ldg(row_offsets + row));
    if (column_scales != nullptr) value = multiply_ieee(value, __ldg(column_scales + place.first_col + col));
    store_number(output, first + col, value);
  }
}
