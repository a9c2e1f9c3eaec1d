// Y = scale · (W X) + bias for a few vectors X (tokens) and coded integers W: decoded once, multiplied on the tensor cores.
//
// A lane decodes a row, a tensor core wants eight lanes to share one: each warp passes its 32 rows × 32 columns through shared
// memory as bytes, and ldmatrix hands every lane four neighbouring elements of the slot that it needs. Only then do they become
// fp16 (0x6400 | u is 1024 + u). Activations are fp16 too, bf16 and fp32 ones after a power of two for each token and block that
// brings the largest near 2^14. Which columns a tensor core takes for k = 0 … 15 is arbitrary as long as both sides agree:
//
//   step h of a chunk (16 columns)     lane 4·i + q holds of slot q + 4h:   bytes 0, 1 as k = 2q, 2q + 1;  bytes 2, 3 as 2q + 8, 2q + 9
//   activations in shared memory       16 bytes a lane: h = 0: t = 0 … 3, h = 1: t = 0 … 3, for token i of eight
//
// A unit is one group for each warp, in a tile column; a warp keeps the sums of its rows while the block's run stays within them.
//
// Shared memory: table (16 KiB) | activations, 512 bytes for each chunk and eight tokens | a float a token | for each warp: two
// buffers of 1 KiB for rows in passing | words, one or two buffers.
#include "activations.cuh"
#include "schedule.cuh"
#include "tile.cuh"

constexpr u32 kBuffers = KVPACK_BUFFERS;
constexpr u32 kTokenTiles = KVPACK_TOKEN_TILES;
constexpr u32 kTokens = 8 * kTokenTiles;
constexpr u32 kFragmentBytes = 16 * kLanes;  // of a chunk and eight tokens
constexpr u32 kRowsBytes = 32 * kLanes;      // 32 rows of 32 bytes
constexpr u32 kBias = 0x6400u | (kSigned ? kHalf : 0u);

// 16 bytes of a row in passing: turned so that eight lanes in a row meet eight different groups of banks.
__device__ __forceinline__ u32 passing_address(u32 rows, u32 row, u32 unit) {
  return rows + 32 * row + 16 * (unit ^ (row / 4 & 1));
}

struct Passing {
  u32 rows;
  u32 lane;
  u32 kept[4];
  template <u32 k>
  __device__ __forceinline__ void slot(u32 elements) {
    kept[k % 4] = elements;
    if constexpr (k % 4 == 3) {
      store_shared_v4(passing_address(rows, lane, k / 4), make_uint4(kept[0], kept[1], kept[2], kept[3]));
    }
  }
};

template <u32 k = 0>
__device__ __forceinline__ void emit_kept(const KeepSlots& kept, Passing& passing) {
  if constexpr (k < kSlots) {
    passing.slot<k>(kept.slots[k]);
    emit_kept<k + 1>(kept, passing);
  }
}

__device__ __forceinline__ u32 first_two(u32 elements) {
  return sub_f16x2(__byte_perm(elements, 0x64646464u, 0x4140), kBias * 0x00010001u);
}
__device__ __forceinline__ u32 last_two(u32 elements) {
  return sub_f16x2(__byte_perm(elements, 0x64646464u, 0x4342), kBias * 0x00010001u);
}

struct Sums {
  float of[2][kTokenTiles][4];  // 16 rows, eight tokens, the fragment of mma.m16n8k16
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (u32 half = 0; half < 2; ++half)
#pragma unroll
      for (u32 tile = 0; tile < kTokenTiles; ++tile)
#pragma unroll
        for (u32 i = 0; i < 4; ++i) of[half][tile][i] = 0;
  }
};

// Rows of a chunk in `rows` times its activations.
__device__ __forceinline__ void multiply_chunk(u32 rows, u32 fragments, u32 lane, Sums& sums) {
  __syncwarp();
  u32 elements[2][4];
  const u32 row = lane % 16, unit = lane / 16;
  load_matrix_x4(elements[0], passing_address(rows, row, unit));
  load_matrix_x4(elements[1], passing_address(rows, row + 16, unit));
  uint4 activations[kTokenTiles];
#pragma unroll
  for (u32 tile = 0; tile < kTokenTiles; ++tile) {
    activations[tile] = load_shared_v4(fragments + tile * kFragmentBytes + 16 * lane);
  }
#pragma unroll
  for (u32 half = 0; half < 2; ++half) {
    const u32(&e)[4] = elements[half];
    const u32 first[4] = {first_two(e[0]), first_two(e[1]), last_two(e[0]), last_two(e[1])};
#pragma unroll
    for (u32 tile = 0; tile < kTokenTiles; ++tile) mma_f16(sums.of[half][tile], first, activations[tile].x, activations[tile].y);
    const u32 second[4] = {first_two(e[2]), first_two(e[3]), last_two(e[2]), last_two(e[3])};
#pragma unroll
    for (u32 tile = 0; tile < kTokenTiles; ++tile) mma_f16(sums.of[half][tile], second, activations[tile].z, activations[tile].w);
  }
}

extern "C" __global__ void __launch_bounds__(KVPACK_MAX_WARPS * 32, KVPACK_BLOCKS_PER_SM)
gemm(const void* x, const u8* blob, const uint4* groups, const u32* table, const float* scales, u32 scale_stride, const void* bias,
     void* y, float* partials, u32* tickets, u32* status, u32 rows, u32 cols, u32 tile_cols, u32 length_bytes, u32 buffer_bytes,
     u32 table_index, u32 num_tables, u32 tokens) {
  KVPACK_DYNAMIC_SHARED(shared);
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const u32 row_groups = ceil_div(rows, kLanes), tile_columns = ceil_div(cols, tile_cols);
  const u32 row_blocks = ceil_div(row_groups, warps), tile_chunks = tile_cols / kChunkCols;
  const Schedule schedule(row_blocks * tile_columns, gridDim.x);
  const u32 begin = schedule.begin(blockIdx.x), end = schedule.begin(blockIdx.x + 1);
  if (begin == end) return;

  const u32 shared_table = shared_address(shared);
  const u32 kept_tiles = min(end - begin, tile_columns);  // tile columns whose activations are kept
  const bool keeps_all = kept_tiles == tile_columns;
  const u32 activations = shared_table + 4 * kTableSlots;
  const u32 token_scales = activations + kept_tiles * tile_chunks * kTokenTiles * kFragmentBytes;
  const u32 passing_rows = token_scales + 4 * kTokens + warp * 2 * kRowsBytes;
  const u32 buffers = token_scales + 4 * kTokens + warps * 2 * kRowsBytes + kBuffers * warp * buffer_bytes;

  u32 row_group = begin / tile_columns * warps + warp, tile_column = begin % tile_columns;
  if (table != nullptr) copy_table(table, shared_table, threadIdx.x, blockDim.x);  // null if no tile has words
  bool exists = row_group < row_groups;
  uint4 entry = make_uint4(0, 0, 0, 0);
  LaneStart start{KVPACK_STATE_LOW, 0};
  if (exists) {
    entry = __ldg(groups + row_group * tile_columns + tile_column);
    Group group = unpack_group(blob, entry);
    copy_words(group, buffers, lane);
    const Place place = place_of(row_group, tile_column, rows, cols, tile_cols);
    start = load_lane_start(group, place, length_bytes, lane);
    prefetch_raw(group, place, lane);
  }
  copy_async_commit();

  auto column_of = [&](u32 kept_chunk) {  // first column of a chunk whose activations are kept
    u32 of_tile = kept_chunk / tile_chunks;
    if (!keeps_all) of_tile = (begin + of_tile) % tile_columns;
    return of_tile * tile_cols + kept_chunk % tile_chunks * kChunkCols;
  };
  for (u32 token = warp; token < kTokens; token += warps) {
    float largest = 0;
#if KVPACK_ACTIVATION != 0
    if (token < tokens) {
      for (u32 chunk = 0; chunk < kept_tiles * tile_chunks; ++chunk) {
        u32 col = column_of(chunk) + lane;
        if (col < cols) largest = fmaxf(largest, fabsf(load_activation(x, static_cast<u64>(token) * cols + col)));
      }
    }
    largest = __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(largest)));
#endif
    // Activations are divided by this: largest / 2^14, rounded down to a power of two.
    u32 exponent = __float_as_uint(largest) >> 23;
    bool usable = exponent > 14 && exponent < 255;
    if (lane == 0) store_shared_u32(token_scales + 4 * token, usable ? (exponent - 14) << 23 : __float_as_uint(1.0f));
  }
  __syncthreads();
  for (u32 i = warp; i < kept_tiles * tile_chunks * kTokenTiles; i += warps) {
    const u32 token = i % kTokenTiles * 8 + lane / 4, first = column_of(i / kTokenTiles);
    const float inverse = 1.0f / __uint_as_float(load_shared_u32(token_scales + 4 * token));
    u32 halves[4];
#pragma unroll
    for (u32 pair = 0; pair < 4; ++pair) {
      float values[2];
#pragma unroll
      for (u32 j = 0; j < 2; ++j) {
        u32 col = first + slot_column(lane % 4 + pair / 2 * 4, pair % 2 * 2 + j);
        bool is_there = token < tokens && col < cols;
        values[j] = is_there ? load_activation(x, static_cast<u64>(token) * cols + col) * inverse : 0.0f;
      }
      halves[pair] = f16x2_bits(values[0], values[1]);
    }
    store_shared_v4(activations + i * kFragmentBytes + 16 * lane, make_uint4(halves[0], halves[1], halves[2], halves[3]));
  }
  copy_async_wait<0>();
  __syncthreads();

  Sums sums;
  sums.clear();
  for (u32 unit = begin, buffer = 0; unit < end; ++unit, buffer ^= kBuffers - 1) {
    const bool last_of_rows = tile_column + 1 == tile_columns || unit + 1 == end;
    const u32 next_row_group = tile_column + 1 == tile_columns ? row_group + warps : row_group;
    const u32 next_tile_column = tile_column + 1 == tile_columns ? 0 : tile_column + 1;
    const bool next_exists = unit + 1 < end && next_row_group < row_groups;
    uint4 next_entry = make_uint4(0, 0, 0, 0);
    LaneStart next_start{KVPACK_STATE_LOW, 0};
    if (next_exists) {
      next_entry = __ldg(groups + next_row_group * tile_columns + next_tile_column);
      Group next = unpack_group(blob, next_entry);
      if constexpr (kBuffers == 2) copy_words(next, buffers + (buffer ^ 1) * buffer_bytes, lane);
      const Place place = place_of(next_row_group, next_tile_column, rows, cols, tile_cols);
      next_start = load_lane_start(next, place, length_bytes, lane);
      prefetch_raw(next, place, lane);
    }
    if constexpr (kBuffers == 2) copy_async_commit();
    copy_async_wait<kBuffers - 1>();
    __syncwarp();

    if (exists) {
      const Group group = unpack_group(blob, entry);
      const Place place = place_of(row_group, tile_column, rows, cols, tile_cols);
      const bool mine = group.mode == KVPACK_MODE_RANS ? group.table == table_index : table_index == 0;
      const u32 chunks = mine ? place.chunks() : 0;
      const u32 kept = (keeps_all ? tile_column : unit - begin) * tile_chunks;
      u32 fragments = activations + kept * kTokenTiles * kFragmentBytes;
      const u8* planes = raw_planes(group, place);
      Passing passing{passing_rows, lane, {}};
      u32 other = passing_rows + kRowsBytes;
      auto finish_chunk = [&] {
        multiply_chunk(passing.rows, fragments, lane, sums);
        fragments += kTokenTiles * kFragmentBytes;
        u32 now = passing.rows;
        passing.rows = other;
        other = now;
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
            decode_chunk(decoder, shared_table, raw, passing);
            finish_chunk();
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
            emit_kept(kept_slots, passing);
            finish_chunk();
          }
        }
        const bool valid = place.group * kLanes + lane < place.tile_rows;
        if (valid && (decoder.state != KVPACK_STATE_LOW || decoder.word_address != end_address)) {
          report_damage(status, row_group * tile_columns + tile_column);
        }
      } else {
#pragma unroll 1
        for (u32 chunk = 0; chunk < chunks; ++chunk) {
          if (group.mode == KVPACK_MODE_CONSTANT) {
            RawChunk raw;
            load_raw(planes + chunk * kRawChunkBytes, lane, raw);
            constant_chunk(group.tile[0], raw, passing);
          } else {
            raw_mode_chunk(group, place, place.group * kLanes + lane, chunk, passing);
          }
          finish_chunk();
        }
      }
      const u32 num_outliers = mine ? group.num_outliers : 0;
      const u32* outliers = outliers_of(group, place);
      for (u32 i = 0; i < num_outliers; ++i) {
        const u32 outlier = __ldg(outliers + i), row = outlier_lane(outlier), col = outlier_col(outlier);
        if (row % 8 != lane / 4) continue;
        constexpr u32 g = kCodesPerSymbol;
        const u32 in_chunk = col % kChunkCols, slot = g * (in_chunk / (4 * g)) + in_chunk % g, byte = in_chunk / g % 4;
        const float delta = static_cast<float>(outlier_delta(outlier));
        const u32 chunk = activations + (kept + col / kChunkCols) * kTokenTiles * kFragmentBytes;
#pragma unroll
        for (u32 tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
          for (u32 j = 0; j < 2; ++j) {
            const u32 holder = 4 * (lane % 4 * 2 + j) + slot % 4;
            const u32 address = chunk + tile * kFragmentBytes + 16 * holder + slot / 4 * 8 + byte * 2;
            const float product = delta * f16_value(load_shared_u16(address));
#pragma unroll
            for (u32 eight = 0; eight < 4; ++eight) {
              if (row / 8 == eight) sums.of[eight / 2][tile][eight % 2 * 2 + j] += product;
            }
          }
        }
      }

      if (last_of_rows) {
        const u32 row_block = row_group / warps, padded_rows = row_groups * kLanes;
        const u32 first_block = schedule.block_of(row_block * tile_columns);
        const u32 parts = schedule.block_of((row_block + 1) * tile_columns - 1) - first_block + 1;
        auto for_sums = [&](auto&& body) {
#pragma unroll
          for (u32 half = 0; half < 2; ++half)
#pragma unroll
            for (u32 tile = 0; tile < kTokenTiles; ++tile)
#pragma unroll
              for (u32 i = 0; i < 4; ++i) {
                const u32 row = row_group * kLanes + 16 * half + i / 2 * 8 + lane / 4;
                const u32 token = 8 * tile + lane % 4 * 2 + i % 2;
                if (token < tokens) body(sums.of[half][tile][i], row, token);
              }
        };
        for_sums([&](float& sum, u32, u32 token) { sum *= __uint_as_float(load_shared_u32(token_scales + 4 * token)); });
        bool finishes = true;
        if (parts * num_tables > 1) {
          const u32 own = table_index * parts + blockIdx.x - first_block;
          for_sums([&](float& sum, u32 row, u32 token) {
            partials[(static_cast<u64>(own) * tokens + token) * padded_rows + row] = sum;
          });
          finishes = arrives_last(tickets + row_group, parts * num_tables, lane);
          if (finishes) {
            sums.clear();
#pragma unroll 2
            for (u32 part = 0; part < parts * num_tables; ++part) {
              for_sums([&](float& sum, u32 row, u32 token) {
                sum += load_l2_f32(partials + (static_cast<u64>(part) * tokens + token) * padded_rows + row);
              });
            }
          }
        }
        if (finishes) {
          for_sums([&](float& sum, u32 row, u32 token) {
            if (row < rows) {
              float result = sum * scales[row * scale_stride];
              if (bias != nullptr) result += load_activation(bias, row);
              store_result(y, static_cast<u64>(token) * rows + row, result);
            }
          });
        }
        sums.clear();
      }
    }
    __syncwarp();
    if constexpr (kBuffers == 1) {
      if (next_exists) copy_words(unpack_group(blob, next_entry), buffers, lane);
      copy_async_commit();
    }
    row_group = next_row_group;
    tile_column = next_tile_column;
    exists = next_exists;
    entry = next_entry;
    start = next_start;
  }
}
