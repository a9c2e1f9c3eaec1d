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
// A warp takes a run of units (schedule.cuh) and keeps the sums of its rows while the run stays within them. Partial sums go to
// memory as the tensor core's fragments, 16 bytes a lane.
//
// Shared memory: table (16 KiB) | activations of the panel, 512 bytes for each chunk and eight tokens | a float a token | for each
// warp: two buffers of 1 KiB for rows in passing | words, one or two buffers.
#include "activations.cuh"
#include "schedule.cuh"
#include "tile.cuh"

constexpr u32 kBuffers = KVPACK_BUFFERS;
constexpr u32 kTokenTiles = KVPACK_TOKEN_TILES;
constexpr u32 kTokens = 8 * kTokenTiles;
constexpr u32 kFragmentBytes = 16 * kLanes;  // of a chunk and eight tokens
constexpr u32 kRowsBytes = 32 * kLanes;      // 32 rows of 32 bytes
constexpr u32 kPartsAhead = kTokenTiles == 1 ? 2 : 1;  // partial sums on their way
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
  __device__ __forceinline__ void store(float4* to) const {
#pragma unroll
    for (u32 half = 0; half < 2; ++half)
#pragma unroll
      for (u32 tile = 0; tile < kTokenTiles; ++tile) {
        const float(&f)[4] = of[half][tile];
        to[(half * kTokenTiles + tile) * kLanes] = make_float4(f[0], f[1], f[2], f[3]);
      }
  }
  __device__ __forceinline__ void load(const float4* from) {
#pragma unroll
    for (u32 half = 0; half < 2; ++half)
#pragma unroll
      for (u32 tile = 0; tile < kTokenTiles; ++tile) {
        const float4 v = load_l2_v4(from + (half * kTokenTiles + tile) * kLanes);
        float(&f)[4] = of[half][tile];
        f[0] = v.x, f[1] = v.y, f[2] = v.z, f[3] = v.w;
      }
  }
  __device__ __forceinline__ void add(const Sums& other) {
#pragma unroll
    for (u32 half = 0; half < 2; ++half)
#pragma unroll
      for (u32 tile = 0; tile < kTokenTiles; ++tile)
#pragma unroll
        for (u32 i = 0; i < 4; ++i) of[half][tile][i] += other.of[half][tile][i];
  }
  __device__ __forceinline__ void scale_tokens(u32 token_scales, u32 lane) {
#pragma unroll
    for (u32 tile = 0; tile < kTokenTiles; ++tile) {
      const uint2 pair = load_shared_v2(token_scales + 4 * (8 * tile + lane % 4 * 2));
#pragma unroll
      for (u32 half = 0; half < 2; ++half)
#pragma unroll
        for (u32 i = 0; i < 4; ++i) of[half][tile][i] *= __uint_as_float(i % 2 == 0 ? pair.x : pair.y);
    }
  }
  // body(sum, row, token) for all that this lane holds.
  template <class Body>
  __device__ __forceinline__ void for_each(u32 first_row, u32 lane, Body&& body) const {
#pragma unroll
    for (u32 half = 0; half < 2; ++half)
#pragma unroll
      for (u32 tile = 0; tile < kTokenTiles; ++tile)
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
          body(of[half][tile][i], first_row + 16 * half + i / 2 * 8 + lane / 4, 8 * tile + lane % 4 * 2 + i % 2);
        }
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

// An outlier of row `row` in a chunk whose fragments are at `fragments`: its product joins the sums.
__device__ __forceinline__ void add_outlier(u32 outlier, u32 fragments, u32 lane, Sums& sums) {
  const u32 row = outlier_lane(outlier), col = outlier_col(outlier);
  if (row % 8 != lane / 4) return;
  constexpr u32 g = kCodesPerSymbol;
  const u32 in_chunk = col % kChunkCols, slot = g * (in_chunk / (4 * g)) + in_chunk % g, byte = in_chunk / g % 4;
  const float delta = static_cast<float>(outlier_delta(outlier));
#pragma unroll
  for (u32 tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
    for (u32 j = 0; j < 2; ++j) {
      const u32 holder = 4 * (lane % 4 * 2 + j) + slot % 4;
      const u32 address = fragments + tile * kFragmentBytes + 16 * holder + slot / 4 * 8 + byte * 2;
      const float product = delta * f16_value(load_shared_u16(address));
      // Not as `if (…) sum += product`: of that the compiler makes an index, and puts the sums into memory.
#pragma unroll
      for (u32 eight = 0; eight < 4; ++eight) sums.of[eight / 2][tile][eight % 2 * 2 + j] += row / 8 == eight ? product : 0.0f;
    }
  }
}

extern "C" __global__ void __launch_bounds__(KVPACK_MAX_WARPS * 32, KVPACK_BLOCKS_PER_SM)
gemm(const void* x, const u8* blob, const uint4* groups, const u32* table, const float* scales, u32 scale_stride, const void* bias,
     void* y, float4* partials, u32* tickets, u32* status, u32 rows, u32 cols, u32 tile_cols, u32 row_groups, u32 tile_columns,
     u32 panel_width, u32 panel_blocks, u32 panel_parts, u32 length_bytes, u32 buffer_bytes, u32 table_index, u32 num_tables, u32 tokens) {
  KVPACK_DYNAMIC_SHARED(shared);
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const Schedule schedule(row_groups, tile_columns, panel_width, panel_blocks);
  const u32 tile_chunks = tile_cols / kChunkCols, panel_chunks = schedule.width * tile_chunks;
  const Runs runs = schedule.runs(schedule.width);
  u32 units = runs.begin(schedule.worker + 1) - runs.begin(schedule.worker);  // left of this warp's run
  Unit unit = schedule.unit(runs.begin(schedule.worker));

  const u32 shared_table = shared_address(shared);
  const u32 activations = shared_table + 4 * kTableSlots;
  const u32 token_scales = activations + panel_chunks * kTokenTiles * kFragmentBytes;
  const u32 passing_rows = token_scales + 4 * kTokens + warp * 2 * kRowsBytes;
  const u32 buffers = token_scales + 4 * kTokens + warps * 2 * kRowsBytes + kBuffers * warp * buffer_bytes;

  // Two units are under way: the one that is decoded, and the next one's words and first planes.
  uint4 entry = make_uint4(0, 0, 0, 0), next_entry = entry;
  if (units > 0) entry = __ldg(groups + schedule.index_of(unit));
  if (table != nullptr) copy_table(table, shared_table, threadIdx.x, blockDim.x);  // null if no tile has words
  LaneStart start{KVPACK_STATE_LOW, 0};
  RawStream stream;
  if (units > 0) {
    const Group group = unpack_group(blob, entry);
    const Place place = schedule.place_of(unit, rows, cols, tile_cols);
    copy_words(group, buffers, lane);
    start = load_lane_start(group, place, length_bytes, lane);
    stream.begin(blob, raw_planes_unit(group, place), raw_chunks(group, place), lane);
  }
  copy_async_commit();

  const u32 first_col = schedule.first_column * tile_cols;
#if KVPACK_ACTIVATION != 0
  for (u32 token = warp; token < kTokens; token += warps) {
    float largest = 0;
    if (token < tokens) {
#pragma unroll 4
      for (u32 chunk = 0; chunk < panel_chunks; ++chunk) {
        const u32 col = first_col + chunk * kChunkCols + lane;
        if (col < cols) largest = fmaxf(largest, fabsf(load_activation(x, static_cast<u64>(token) * cols + col)));
      }
    }
    largest = __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(largest)));
    // Activations are divided by this: largest / 2^14, rounded down to a power of two.
    const u32 exponent = __float_as_uint(largest) >> 23;
    const bool usable = exponent > 14 && exponent < 255;
    if (lane == 0) store_shared_u32(token_scales + 4 * token, usable ? (exponent - 14) << 23 : __float_as_uint(1.0f));
  }
  __syncthreads();
#endif
  for (u32 i = warp; i < panel_chunks * kTokenTiles; i += warps) {
    const u32 token = i % kTokenTiles * 8 + lane / 4, first = first_col + i / kTokenTiles * kChunkCols;
#if KVPACK_ACTIVATION != 0
    const float inverse = 1.0f / __uint_as_float(load_shared_u32(token_scales + 4 * token));
#else
    const float inverse = 1.0f;
#endif
    float values[8];
#pragma unroll
    for (u32 j = 0; j < 8; ++j) {
      const u32 col = first + slot_column(lane % 4 + j / 4 * 4, j % 4);
      const bool is_there = token < tokens && col < cols;
      values[j] = is_there ? load_activation(x, static_cast<u64>(token) * cols + col) * inverse : 0.0f;
    }
    store_shared_v4(activations + i * kFragmentBytes + 16 * lane,
                    make_uint4(f16x2_bits(values[0], values[1]), f16x2_bits(values[2], values[3]),
                               f16x2_bits(values[4], values[5]), f16x2_bits(values[6], values[7])));
  }
  copy_async_wait<0>();
  __syncthreads();

  Sums sums;
  sums.clear();
  for (u32 buffer = 0; units > 0; --units, buffer ^= kBuffers - 1) {
    const Group group = unpack_group(blob, entry);
    const Place place = schedule.place_of(unit, rows, cols, tile_cols);
    const bool mine = group.mode == KVPACK_MODE_RANS ? group.table == table_index : table_index == 0;
    const bool has_outliers = mine && group.num_outliers > 0;
    const u32 planes = raw_planes_unit(group, place);
    const u32 unit_fragments = activations + unit.column * tile_chunks * kTokenTiles * kFragmentBytes;
    u32 fragments = unit_fragments;
    Passing passing{passing_rows, lane, {}};
    auto finish_chunk = [&] {
      multiply_chunk(passing.rows, fragments, lane, sums);
      fragments += kTokenTiles * kFragmentBytes;
      passing.rows = passing_rows + (passing_rows + kRowsBytes - passing.rows);
    };

    unit = schedule.after(unit);  // what is decoded now is the one before it
    LaneStart next_start{KVPACK_STATE_LOW, 0};
    u32 next_planes = 0;
    u32 next_chunks = 0;
    if (units > 1) {
      next_entry = __ldg(groups + schedule.index_of(unit));
      const Group next = unpack_group(blob, next_entry);
      const Place place = schedule.place_of(unit, rows, cols, tile_cols);
      if constexpr (kBuffers == 2) copy_words(next, buffers + (buffer ^ 1) * buffer_bytes, lane);
      next_start = load_lane_start(next, place, length_bytes, lane);
      next_planes = raw_planes_unit(next, place);
      next_chunks = raw_chunks(next, place);
    }
    if constexpr (kBuffers == 2) copy_async_commit();
    copy_async_wait<kBuffers - 1>();
    __syncwarp();

    if (!mine) {
      stream.stale = true;
    } else if (group.mode == KVPACK_MODE_RANS) {
      u32 end_address;
      Lane decoder = start_lane(group, start, buffers + buffer * buffer_bytes, lane, end_address);
      if (group.predictor == 0) {
        stream.each_chunk(blob, planes, place.chunks(), next_planes, next_chunks, lane, [&](u32, const RawChunk& raw) {
          decode_chunk(decoder, shared_table, raw, passing);
          finish_chunk();
        });
      } else {
        u32 previous = 0;
        stream.stale = true;
#pragma unroll 1
        for (u32 chunk = 0; chunk < place.chunks(); ++chunk) {
          RawChunk raw;
          load_raw(chunk_planes(blob, planes, chunk), lane, raw);
          KeepSlots kept;
          decode_chunk(decoder, shared_table, raw, kept);
          undo_predictor(kept, chunk == 0, previous);
          emit_kept(kept, passing);
          finish_chunk();
        }
      }
      const bool valid = place.group * kLanes + lane < place.tile_rows;
      if (valid && (decoder.state != KVPACK_STATE_LOW || decoder.word_address != end_address)) {
        report_damage(status, schedule.index_of(schedule.before(unit)));
      }
    } else {
      stream.stale = true;
#pragma unroll 1
      for (u32 chunk = 0; chunk < place.chunks(); ++chunk) {
        if (group.mode == KVPACK_MODE_CONSTANT) {
          RawChunk raw;
          load_raw(chunk_planes(blob, planes, chunk), lane, raw);
          constant_chunk(group.tile[0], raw, passing);
        } else {
          raw_mode_chunk(group, place, place.group * kLanes + lane, chunk, passing);
        }
        finish_chunk();
      }
    }
    if (has_outliers) {
      // Looked up again, rather than in registers all the time.
      const Group again = unpack_group(blob, __ldg(groups + schedule.index_of(schedule.before(unit))));
      const u32* outliers = outliers_of(again, place);
#pragma unroll 1
      for (u32 i = 0; i < again.num_outliers; ++i) {
        const u32 outlier = __ldg(outliers + i);
        add_outlier(outlier, unit_fragments + outlier_col(outlier) / kChunkCols * kTokenTiles * kFragmentBytes, lane, sums);
      }
    }

    if (units == 1 || unit.column == 0) {
      const u32 row_group = schedule.before(unit).row_group;
      const u32 all_units = tile_columns * num_tables;
      const Part own = schedule.own_part(row_group, panel_parts);
#if KVPACK_ACTIVATION != 0
      sums.scale_tokens(token_scales, lane);
#endif
      bool finishes = true;
      if (own.units < all_units) {
        const u32 part_stride = row_groups * 2 * kTokenTiles * kLanes;
        const u32 table_parts = ceil_div(tile_columns, panel_width) * panel_parts;
        float4* rows_partials = partials + row_group * 2 * kTokenTiles * kLanes + lane;
        sums.store(rows_partials + static_cast<u64>(table_index * table_parts + own.index) * part_stride);
        finishes = arrives_last(tickets + row_group, own.units, all_units, lane);
        if (finishes) {
          sums.clear();
          Sums others[kPartsAhead];
#pragma unroll
          for (Sums& other : others) other.clear();
          schedule.each_part<kPartsAhead>(
              row_group, panel_parts, num_tables,
              [&](u32 i, u32 part) { others[i].load(rows_partials + static_cast<u64>(part) * part_stride); },
              [&] {
#pragma unroll
                for (Sums& other : others) {
                  sums.add(other);
                  other.clear();
                }
              });
        }
      }
      if (finishes) {
        sums.for_each(row_group * kLanes, lane, [&](float sum, u32 row, u32 token) {
          if (row < rows && token < tokens) {
            float result = sum * scales[row * scale_stride];
            if (bias != nullptr) result += load_activation(bias, row);
            store_result(y, static_cast<u64>(token) * rows + row, result);
          }
        });
      }
      sums.clear();
    }
    __syncwarp();
    if constexpr (kBuffers == 1) {
      if (units > 1) copy_words(unpack_group(blob, next_entry), buffers, lane);
      copy_async_commit();
    }
    entry = next_entry;
    start = next_start;
  }
}
