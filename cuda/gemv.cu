// y = scale · (W x) + bias for one vector x and coded integers W: decode and product in one pass, nothing expanded.
//
// A lane decodes a row of a tile and multiplies as it goes. Activations become int16 with a scale for each chunk of 32 columns
// (a scale for more columns loses the small ones beside a massive one), so that a chunk's sum of products is exact in 32 bits.
// Four elements lie in the bytes of a register, and a register of the activations holds those of the same columns:
//
//   slot k of a chunk      byte t               element of column slot_column(k, t)
//   activations            8 bytes for slot k:  int16 of t = 0, 1, 2, 3
//
// A unit is a group in a tile column; a block takes a run of units, its warps in turn. Sums of units that share rows meet in
// shared memory.
//
// Shared memory: table (16 KiB) | a sum for each row of each unit | int16 activations, 64 bytes a chunk | {first sum, scale}, 8 bytes a chunk | words, one or two
// buffers for each warp: with two, the next tile's words are under way while this one's are decoded.
#include "activations.cuh"
#include "schedule.cuh"
#include "tile.cuh"

constexpr u32 kBuffers = KVPACK_BUFFERS;
constexpr u32 kActivationBytes = 2 * kChunkCols;
constexpr u32 kChunkHeadBytes = 8;

// An activation below this is as good as zero: its reciprocal would not be finite.
constexpr float kTiniest = 1e-33f;

// One warp: 32 activations → int16, their scale, and the sum that makes unsigned elements signed: −half · Σ.
__device__ __forceinline__ void quantize_chunk(const void* x, u32 first_col, u32 cols, u32 lane, u32 activations, u32 head) {
  u32 col = first_col + lane;
  float value = col < cols ? load_activation(x, col) : 0.0f;
  float largest = __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(value) & 0x7FFFFFFFu));
  bool usable = largest >= kTiniest && largest <= 3.4028234e38f;
  int q = usable ? __float2int_rn(value * (32767.0f / largest)) : 0;
  int sum = static_cast<int>(__reduce_add_sync(kAllLanes, static_cast<u32>(q)));
  constexpr u32 g = kCodesPerSymbol;
  u32 slot = g * (lane / (4 * g)) + lane % g, byte = lane / g % 4;
  store_shared_u16(activations + 8 * slot + 2 * byte, static_cast<u32>(q));
  if (lane == 0) {
    store_shared_u32(head, kSigned ? static_cast<u32>(-static_cast<int>(kHalf) * sum) : 0u);
    // An infinite or NaN activation makes the result NaN.
    store_shared_u32(head + 4, __float_as_uint(usable ? largest / 32767.0f : largest * 0.0f));
  }
}

// Sums up the products of a chunk's slots, which come in order.
struct Product {
  u32 activations;  // address of the chunk's
  int sum;
  uint4 pair;
  template <u32 k>
  __device__ __forceinline__ void slot(u32 elements) {
    if constexpr (k % 2 == 0) {
      pair = load_shared_v4(activations + 8 * k);
      sum = dp2a_high(pair.y, elements, dp2a_low(pair.x, elements, sum));
    } else {
      sum = dp2a_high(pair.w, elements, dp2a_low(pair.z, elements, sum));
    }
  }
};

template <u32 k = 0>
__device__ __forceinline__ void emit_kept(const KeepSlots& kept, Product& product) {
  if constexpr (k < kSlots) {
    product.slot<k>(kept.slots[k]);
    emit_kept<k + 1>(kept, product);
  }
}

extern "C" __global__ void __launch_bounds__(KVPACK_MAX_WARPS * 32, KVPACK_BLOCKS_PER_SM)
gemv(const void* x, const u8* blob, const uint4* groups, const u32* table, const float* scales, u32 scale_stride, const void* bias,
     void* y, float* partials, u32* tickets, u32* status, u32 rows, u32 cols, u32 tile_cols, u32 length_bytes, u32 buffer_bytes,
     u32 table_index, u32 num_tables) {
  KVPACK_DYNAMIC_SHARED(shared);
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const u32 row_groups = ceil_div(rows, kLanes), tile_columns = ceil_div(cols, tile_cols), tile_chunks = tile_cols / kChunkCols;
  const Schedule schedule(row_groups * tile_columns, gridDim.x);
  const u32 begin = schedule.begin(blockIdx.x), end = schedule.begin(blockIdx.x + 1);
  const u32 kept_tiles = min(end - begin, tile_columns);  // tile columns whose activations are kept
  const bool keeps_all = kept_tiles == tile_columns;

  const u32 shared_table = shared_address(shared);
  const u32 sums = shared_table + 4 * kTableSlots;
  const u32 activations = sums + 4 * kLanes * (end - begin);
  const u32 heads = activations + kept_tiles * tile_chunks * kActivationBytes;
  const u32 buffers = align_up(heads + kept_tiles * tile_chunks * kChunkHeadBytes, 16) + kBuffers * warp * buffer_bytes;

  if (table != nullptr) copy_table(table, shared_table, threadIdx.x, blockDim.x);  // null if no tile has words
  // Three units of a warp are under way: the one that is decoded, the next one's words, the entry of the one after.
  auto place_at = [&](u32 unit) { return place_of(unit / tile_columns, unit % tile_columns, rows, cols, tile_cols); };
  auto entry_at = [&](u32 unit) { return unit < end ? __ldg(groups + unit) : make_uint4(0, 0, 0, 0); };
  uint4 entry = entry_at(begin + warp), next_entry = entry_at(begin + warp + warps);
  LaneStart start{KVPACK_STATE_LOW, 0};
  if (begin + warp < end) {
    const Group group = unpack_group(blob, entry);
    const Place place = place_at(begin + warp);
    copy_words(group, buffers, lane);
    start = load_lane_start(group, place, length_bytes, lane);
    prefetch_raw(group, place, lane);
  }
  copy_async_commit();

  for (u32 chunk = warp; chunk < kept_tiles * tile_chunks; chunk += warps) {
    u32 of_tile = keeps_all ? chunk / tile_chunks : (begin + chunk / tile_chunks) % tile_columns;
    quantize_chunk(x, of_tile * tile_cols + chunk % tile_chunks * kChunkCols, cols, lane,
                   activations + chunk * kActivationBytes, heads + chunk * kChunkHeadBytes);
  }
  copy_async_wait<0>();
  __syncthreads();

  for (u32 unit = begin + warp, buffer = 0; unit < end; unit += warps, buffer ^= kBuffers - 1) {
    const u32 row_group = unit / tile_columns, tile_column = unit % tile_columns;
    const bool next_exists = unit + warps < end;
    const uint4 after_entry = entry_at(unit + 2 * warps);
    LaneStart next_start{KVPACK_STATE_LOW, 0};
    if (next_exists) {
      const Group next = unpack_group(blob, next_entry);
      const Place place = place_at(unit + warps);
      if constexpr (kBuffers == 2) copy_words(next, buffers + (buffer ^ 1) * buffer_bytes, lane);
      next_start = load_lane_start(next, place, length_bytes, lane);
      prefetch_raw(next, place, lane);
    }
    if constexpr (kBuffers == 2) copy_async_commit();
    copy_async_wait<kBuffers - 1>();
    __syncwarp();

    float sum = 0;
    {
      const Group group = unpack_group(blob, entry);
      const Place place = place_at(unit);
      const bool mine = group.mode == KVPACK_MODE_RANS ? group.table == table_index : table_index == 0;
      const u32 chunks = mine ? place.chunks() : 0;
      const u8* planes = raw_planes(group, place);
      const u32 kept = keeps_all ? tile_column : unit - begin;
      u32 head = heads + kept * tile_chunks * kChunkHeadBytes;
      Product product{activations + kept * tile_chunks * kActivationBytes, 0, {}};
      auto begin_chunk = [&] { product.sum = static_cast<int>(load_shared_u32(head)); };
      auto end_chunk = [&] {
        sum += static_cast<float>(product.sum) * __uint_as_float(load_shared_u32(head + 4));
        product.activations += kActivationBytes;
        head += kChunkHeadBytes;
      };
      if (group.mode == KVPACK_MODE_RANS && mine) {
        u32 end_address;
        Lane decoder = start_lane(group, start, buffers + buffer * buffer_bytes, lane, end_address);
        RawChunk raw, next_raw;
        load_raw(planes, lane, raw);
        if (group.predictor == 0) {
#pragma unroll 1
          for (u32 chunk = 0; chunk < chunks; ++chunk) {
            planes += chunk + 1 < chunks ? kRawChunkBytes : 0;
            load_raw(planes, lane, next_raw);
            begin_chunk();
            decode_chunk(decoder, shared_table, raw, product);
            end_chunk();
            raw = next_raw;
          }
        } else {
          u32 previous = 0;
#pragma unroll 1
          for (u32 chunk = 0; chunk < chunks; ++chunk, planes += kRawChunkBytes) {
            load_raw(planes, lane, raw);
            KeepSlots kept_slots;
            decode_chunk(decoder, shared_table, raw, kept_slots);
            undo_predictor(kept_slots, chunk == 0, previous);
            begin_chunk();
            emit_kept(kept_slots, product);
            end_chunk();
          }
        }
        const bool valid = place.group * kLanes + lane < place.tile_rows;
        if (valid && (decoder.state != KVPACK_STATE_LOW || decoder.word_address != end_address)) {
          report_damage(status, unit);
        }
      } else {
#pragma unroll 1
        for (u32 chunk = 0; chunk < chunks; ++chunk) {
          begin_chunk();
          if (group.mode == KVPACK_MODE_CONSTANT) {
            RawChunk raw;
            load_raw(planes + chunk * kRawChunkBytes, lane, raw);
            constant_chunk(group.tile[0], raw, product);
          } else {
                raw_mode_chunk(group, place, place.group * kLanes + lane, chunk, product);
          }
          end_chunk();
        }
      }
      if (mine) {
        const u32* outliers = outliers_of(group, place);
        for (u32 i = 0; i < group.num_outliers; ++i) {
          u32 outlier = __ldg(outliers + i);
          if (outlier_lane(outlier) == lane) {
            sum += static_cast<float>(outlier_delta(outlier)) * load_activation(x, place.first_col + outlier_col(outlier));
          }
        }
      }
    }
    store_shared_u32(sums + 4 * (kLanes * (unit - begin) + lane), __float_as_uint(sum));
    __syncwarp();
    if constexpr (kBuffers == 1) {
      if (next_exists) copy_words(unpack_group(blob, next_entry), buffers, lane);
      copy_async_commit();
    }
    entry = next_entry;
    next_entry = after_entry;
    start = next_start;
  }
  __syncthreads();

  // The block's units of each row group are added up, then the blocks' parts of rows that several of them share.
  for (u32 row_group = begin / tile_columns + warp; row_group * tile_columns < end; row_group += warps) {
    const u32 first = max(begin, row_group * tile_columns), last = min(end, (row_group + 1) * tile_columns);
    const u32 row = row_group * kLanes + lane;
    float sum = 0;
#pragma unroll 8
    for (u32 unit = first; unit < last; ++unit) {
      sum += __uint_as_float(load_shared_u32(sums + 4 * (kLanes * (unit - begin) + lane)));
    }
    const u32 first_block = schedule.block_of(row_group * tile_columns);
    const u32 parts = (schedule.block_of((row_group + 1) * tile_columns - 1) - first_block + 1) * num_tables;
    bool finishes = true;
    if (parts > 1) {
      const u32 padded_rows = row_groups * kLanes;
      partials[(table_index * (parts / num_tables) + blockIdx.x - first_block) * padded_rows + row] = sum;
      finishes = arrives_last(tickets + row_group, parts, lane);
      if (finishes) {
        sum = 0;
#pragma unroll 8
        for (u32 part = 0; part < parts; ++part) sum += load_l2_f32(partials + part * padded_rows + row);
      }
    }
    if (finishes && row < rows) {
      float result = sum * scales[row * scale_stride];
      if (bias != nullptr) result += load_activation(bias, row);
      store_result(y, row, result);
    }
  }
}
