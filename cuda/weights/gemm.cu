// Y = scale · (W (X · column scales)) + bias for a few vectors X (tokens) and coded integers W: decoded once, multiplied on the tensor cores.
//
// A lane decodes a row, a tensor core wants eight lanes to share one: each warp passes its 32 rows × 32 columns through shared
// memory as bytes, and ldmatrix hands every lane four neighbouring elements of the slot that it needs. Only then do they become
// fp16. Activations are fp16 too, bf16 and fp32 ones, and those times a column's scale, after a power of two
// for each token and block that brings the largest near 2^14. Which columns a tensor core takes for k = 0 … 15 is arbitrary as long as both sides agree:
//
//   step h of a chunk (16 columns)     lane 4·i + q holds of slot q + 4h:   bytes 0, 1 as k = 2q, 2q + 1;  bytes 2, 3 as 2q + 8, 2q + 9
//   activations in shared memory       for each h 8 bytes a lane: t = 0 … 3, for token i of eight
//
// How work is dealt to warps: schedule.cuh. Sums stay the tensor core's fragments until all of a row are together.
//
// Shared memory: table (16 KiB) | activations of the panel, 512 bytes for each chunk and eight tokens | a float a token | in a
// grouped product, of a token, its row and pair, and what is needed of the matrix at the end | for each warp: two buffers of 1 KiB for
// rows in passing | for each warp: what its next unit begins with (NextUnit) | words, one or two buffers | sums of members.
#include "common/activations.cuh"
#include "weights/f16_elements.cuh"
#include "weights/grouped.cuh"
#include "weights/schedule.cuh"
#include "codec/tile.cuh"

constexpr u32 kBuffers = KVPACK_BUFFERS;
constexpr u32 kTokenTiles = KVPACK_TOKEN_TILES;
constexpr u32 kTokens = 8 * kTokenTiles;
constexpr u32 kFragmentBytes = 16 * kLanes;  // of a chunk and eight tokens
constexpr u32 kRowsBytes = 32 * kLanes;      // 32 rows of 32 bytes
constexpr u32 kPartsAhead = kTokenTiles == 1 ? 2 : 1;  // partial sums on their way
#define KVPACK_TOKEN_SCALES (KVPACK_ACTIVATION != 0 || KVPACK_COLUMN_SCALES)
constexpr float kSumsUnitInverse = KVPACK_TOKEN_SCALES ? 1.0f : kF16UnitInverse;  // when results are stored
// Of activations on their way; scales and fp32 take registers, too.
constexpr u32 kFragmentsAhead = kTokenTiles == 2 && KVPACK_TOKEN_SCALES ? 1 : KVPACK_COLUMN_SCALES ? 2 : kTokenTiles == 4 && KVPACK_ACTIVATION != 2 ? 8 : 4;
constexpr u32 kLoadsAhead = 8;

// 32 rows of 32 bytes in passing, in one of a warp's two buffers. The 16-byte units of a row are swapped for every other four rows, so
// that eight lanes in a row meet eight different groups of banks. A lane writes where it then names a row to ldmatrix; the address is kept,
// since to compute it for each chunk takes as long as a tenth of its decoding.
struct Passing {
  u32 row;     // the lane's, in the first buffer
  u32 buffer;  // 0, or kRowsBytes
  u32 kept[4];

  __device__ __forceinline__ Passing(u32 rows, u32 lane) : row(rows + 32 * lane + 16 * (lane / 4 & 1)), buffer(0) { forget(row); }
  // Chunks of a group take turns: what is still read of the one before is not overwritten.
  __device__ __forceinline__ void begin_chunk(u32 chunk) { buffer = chunk % 2 * kRowsBytes; }
  __device__ __forceinline__ u32 unit(u32 k) const { return (row ^ 16 * k) + buffer; }
  template <u32 k>
  __device__ __forceinline__ void slot(u32 elements) {
    kept[k % 4] = elements;
    if constexpr (k % 4 == 3) store_shared_v4(unit(k / 4), make_uint4(kept[0], kept[1], kept[2], kept[3]));
  }
};

template <u32 k = 0>
__device__ __forceinline__ void emit_kept(const KeepSlots& kept, Passing& passing) {
  if constexpr (k < kSlots) {
    passing.slot<k>(kept.slots[k]);
    emit_kept<k + 1>(kept, passing);
  }
}

// 16 rows, eight tokens: the fragment of mma.m16n8k16. Of it a lane holds, as number i, row 8·(i / 2) + lane / 4 and token
// 2·(lane % 4) + i % 2.
typedef Sums<8 * kTokenTiles> TokenSums;
__device__ __forceinline__ constexpr u32 fragment(u32 half, u32 tile) { return 4 * (half * kTokenTiles + tile); }

// Calls body(sum, token) for all that a lane holds of 32 rows.
template <class Body>
__device__ __forceinline__ void each_sum(TokenSums& sums, u32 lane, Body&& body) {
#pragma unroll
  for (u32 half = 0; half < 2; ++half)
#pragma unroll
    for (u32 tile = 0; tile < kTokenTiles; ++tile)
#pragma unroll
      for (u32 i = 0; i < 4; ++i) {
        body(sums.of[fragment(half, tile) + i], 8 * tile + lane % 4 * 2 + i % 2);
      }
}

// The rows that are in passing times their chunk's activations.
__device__ __forceinline__ void multiply_chunk(const Passing& passing, u32 fragments, u32 lane, TokenSums& sums) {
  __syncwarp();
#pragma unroll
  for (u32 step = 0; step < 2; ++step) {
    u32 elements[4];  // of rows 0 … 7, 8 … 15, …
    load_matrix_x4(elements, passing.unit(step));
    u32 weights[2][4];
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
      const u32 upper = elements[2 * half], lower = elements[2 * half + 1];
      weights[half][0] = first_two_f16(upper), weights[half][1] = first_two_f16(lower);
      weights[half][2] = last_two_f16(upper), weights[half][3] = last_two_f16(lower);
    }
#pragma unroll
    for (u32 tile = 0; tile < kTokenTiles; ++tile) {
      const uint2 activations = load_shared_v2(fragments + tile * kFragmentBytes + step * (kFragmentBytes / 2) + 8 * lane);
#pragma unroll
      for (u32 half = 0; half < 2; ++half) mma_f16(sums.of + fragment(half, tile), weights[half], activations.x, activations.y);
    }
  }
}

// An outlier of row `row` in a chunk whose fragments are at `fragments`: its product joins the sums.
__device__ __forceinline__ void add_outlier(u32 outlier, u32 delta_bits, u32 fragments, u32 lane, TokenSums& sums) {
  const u32 row = outlier_lane(outlier), col = outlier_col(outlier, delta_bits);
  if (row % 8 != lane / 4) return;
  const u32 slot = column_slot(col % kChunkCols), byte = column_byte(col % kChunkCols);
  const float delta = static_cast<float>(outlier_delta(outlier, delta_bits));
#pragma unroll
  for (u32 tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
    for (u32 j = 0; j < 2; ++j) {
      const u32 holder = 4 * (lane % 4 * 2 + j) + slot % 4;
      const u32 address = fragments + tile * kFragmentBytes + slot / 4 * (kFragmentBytes / 2) + 8 * holder + byte * 2;
      const float product = delta * kF16Unit * f16_value(load_shared_u16(address));
      // Not as `if (…) sum += product`: of that the compiler makes an index, and puts the sums into memory.
#pragma unroll
      for (u32 eight = 0; eight < 4; ++eight) sums.of[fragment(eight / 2, tile) + eight % 2 * 2 + j] += row / 8 == eight ? product : 0.0f;
    }
  }
}

// Columns 8·(lane % 4) … + 7 of a chunk, of token lane / 4, into the fragments at `fragments`.
__device__ __forceinline__ void store_eight(const Eight& eight, float inverse, const float* column_scales, u32 col, u32 cols,
                                            u32 fragments, u32 lane) {
  const u32 j = lane % 4, of_token = fragments + 32 * (lane / 4);
  auto value = [&](u32 i) {
#if KVPACK_COLUMN_SCALES
    return eight.value(i) * __ldg(column_scales + min(col + i, cols - 1)) * inverse;  // behind the last column it is 0
#else
    return eight.value(i) * inverse;
#endif
  };
  auto pair = [&](u32 a, u32 b) { return f16x2_bits(value(a), value(b)); };
  auto of_slot = [&](u32 slot) { return of_token + slot / 4 * (kFragmentBytes / 2) + 8 * (slot % 4); };
  if constexpr (kCodesPerSymbol == 1) {  // two slots, all of each
    store_shared_v2(of_slot(2 * j), make_uint2(pair(0, 1), pair(2, 3)));
    store_shared_v2(of_slot(2 * j + 1), make_uint2(pair(4, 5), pair(6, 7)));
  } else if constexpr (kCodesPerSymbol == 2) {  // two slots that alternate
    store_shared_v2(of_slot(2 * j), make_uint2(pair(0, 2), pair(4, 6)));
    store_shared_v2(of_slot(2 * j + 1), make_uint2(pair(1, 3), pair(5, 7)));
  } else if constexpr (kCodesPerSymbol == 8) {  // one byte of all slots
#pragma unroll
    for (u32 k = 0; k < kSlots; ++k) store_shared_u16(of_slot(k) + 2 * j, f16_bits(value(k)));
  } else {  // the first or the last two bytes of four slots
#pragma unroll
    for (u32 k = 0; k < 4; ++k) store_shared_u32(of_slot(j / 2 * 4 + k) + j % 2 * 4, pair(k, 4 + k));
  }
}

extern "C" __global__ void __launch_bounds__(KVPACK_MAX_WARPS * 32, KVPACK_BLOCKS_PER_SM)
gemm(const void* x, const u8* blob, const uint4* groups, const u32* table, const float* scales, u32 scale_stride,
     const float* column_scales, const void* bias, void* y, float* partials, u32* semaphores, u32* status, u32 rows, u32 cols, u32 tile_cols, u32 tile_columns, u32 panel_width,
     u32 member_width, u32 last_members, u32 run_quotient, u32 run_remainder, u32 length_bytes, u32 buffer_bytes, u32 table_index,
     u32 num_tables, u32 tokens
#if KVPACK_GROUPED
     , const u32* order, const uint4* slots, const StackedMatrix* matrices, u32 stack_parts, u32 row_pairs, u32 y_stride
#endif
) {
  KVPACK_DYNAMIC_SHARED(shared);
  const u32 lane = threadIdx.x, warp = threadIdx.z * blockDim.y + threadIdx.y, warps = blockDim.y * blockDim.z;
  const Schedule schedule(tile_columns, panel_width, member_width);
  const Runs runs{run_quotient, run_remainder};
  const u32 tile_chunks = tile_cols / kChunkCols;
  Unit unit{runs.begin(Schedule::team()), 0};
  u32 units = (runs.begin(Schedule::team() + 1) - unit.row_group) * schedule.width;  // left of this warp's run

  const u32 shared_table = shared_address(shared);
  const u32 activations = shared_table + 4 * kTableSlots;
  auto behind_activations = [&](u32 width) { return activations + width * tile_chunks * kTokenTiles * kFragmentBytes; };
  const u32 token_maxima = behind_activations(panel_width);
  const u32 token_pairs = token_maxima + 4 * kTokens, ends = token_pairs + 8 * kTokens, all_passing_rows = ends + kEndsBytes;
  const u32 passing_rows = all_passing_rows + warp * 2 * kRowsBytes, all_next_units = all_passing_rows + warps * 2 * kRowsBytes;
  const NextUnit next_unit{all_next_units + warp * NextUnit::kBytes};
  const u32 all_buffers = all_next_units + warps * NextUnit::kBytes;
  const u32 buffers = all_buffers + kBuffers * warp * buffer_bytes;
  auto word_buffer = [&](u32 units_left) { return buffers + (kBuffers == 2 ? units_left % 2 * buffer_bytes : 0); };

#if KVPACK_GROUPED
  const u32 part_of_expert = blockIdx.z % stack_parts;
  const uint4 slot = __ldg(slots + blockIdx.z / stack_parts);
  tokens = slot.z;
  StackedMatrix matrix{};
  if (slot.x != kNoExpert) matrix = load_matrix(matrices + slot.x * stack_parts + part_of_expert);
  if (matrix.launches == 0 && table_index == 0 && blockIdx.y == 0) {
    for (u32 token = 0; token < tokens; ++token) {
      const u64 first = static_cast<u64>(__ldg(order + slot.y + token)) * y_stride + part_of_expert * rows;
      each_row(rows, [&](u32 row) { store_result(y, first + row, 0.0f); });
    }
  }
  if (table_index >= matrix.launches) return;
  if (warp == 0 && lane < kTokens) {
    const u32 pair = lane < tokens ? __ldg(order + slot.y + lane) : 0;
    store_shared_v2(token_pairs + 8 * lane, make_uint2(pair / row_pairs, pair));
  }
  blob = bytes_behind(blob, matrix.blob), groups = bytes_behind(groups, matrix.groups);
  table = matrix.num_tables == 0 ? nullptr : bytes_behind(table, matrix.tables + 4ull * kTableSlots * table_index);
  if (warp == 0 && lane == 0) {
    const u64 sums = static_cast<u64>(blockIdx.z) * ceil_div(rows, kLanes);
    store_ends(ends, {bytes_behind(y, static_cast<u64>(part_of_expert) * rows * kActivationSize), bytes_behind(scales, matrix.scales),
                      partials + sums * gridDim.y * num_tables * kTokens * kLanes, semaphores + sums,
                      bytes_behind(status, matrix.status), x, groups, static_cast<u32>(matrix.first_group), static_cast<u32>(matrix.launches)});
  }
  auto source_row = [&](u32 token) { return static_cast<u64>(load_shared_u32(token_pairs + 8 * token)); };
  auto result_at = [&](u32 token) { return static_cast<u64>(load_shared_u32(token_pairs + 8 * token + 4)) * y_stride; };
#else
  auto source_row = [&](u32 token) { return static_cast<u64>(token); };
  auto result_at = [&](u32 token) { return static_cast<u64>(token) * rows; };
#endif

  auto entries = [&] { return KVPACK_GROUPED ? load_pointer<const uint4>(ends + kEndsGroups) : groups; };

  // Two units are under way: the one that is decoded, and the next one's words and first planes.
  uint4 entry = make_uint4(0, 0, 0, 0);
  if (units > 0) entry = __ldg(groups + schedule.index_of(unit));
  if (table != nullptr) copy_table(table, shared_table, warp * kLanes + lane, warps * kLanes);  // null if no tile has words
  RawStream stream;
  if (units > 0) {
    const Group group = unpack_group(blob, entry);
    const Place place = schedule.place_of(unit, rows, cols, tile_cols);
    copy_words(group, word_buffer(units), lane);
    next_unit.put(entry, group, place, length_bytes, lane);
    stream.begin(blob, raw_planes_unit(group, place), raw_chunks(group, place), lane);
  }
  copy_async_commit();

#if KVPACK_GROUPED
  __syncthreads();  // pairs
#endif
  const u32 first_of_panel = blockIdx.y * panel_width, first_col = first_of_panel * tile_cols;
  const u32 panel_chunks = min(panel_width, tile_columns - first_of_panel) * tile_chunks;
#if KVPACK_TOKEN_SCALES
  if (warp == 0) {
#pragma unroll
    for (u32 token = 0; token < kTokens; token += kLanes) {
      if (token + lane < kTokens) store_shared_u32(token_maxima + 4 * (token + lane), 0);
    }
  }
  __syncthreads();
  for (u32 i = warp; i < kTokens * ceil_div(panel_chunks, kLoadsAhead); i += warps) {
    const u32 token = i % kTokens;
    float largest = 0;
#pragma unroll
    for (u32 j = 0; j < kLoadsAhead; ++j) {
      const u32 chunk = i / kTokens * kLoadsAhead + j, col = first_col + chunk * kChunkCols + lane;
      const bool is_there = token < tokens && chunk < panel_chunks && col < cols;
      largest = fmaxf(largest, is_there ? fabsf(load_scaled_activation(x, source_row(token) * cols + col, column_scales, col)) : 0.0f);
    }
    const u32 largest_bits = __reduce_max_sync(kAllLanes, __float_as_uint(largest));
    if (lane == 0) max_shared_u32(token_maxima + 4 * token, largest_bits);
  }
  __syncthreads();
#endif
  const u32 fragments_of_panel = panel_chunks * kTokenTiles;
  const bool aligned = cols % 8 == 0 && reinterpret_cast<u64>(x) % 16 == 0;
  for (u32 first = warp; first < fragments_of_panel; first += kFragmentsAhead * warps) {
    Eight eights[kFragmentsAhead];
#pragma unroll
    for (u32 ahead = 0; ahead < kFragmentsAhead; ++ahead) {
      const u32 i = first + ahead * warps, token = i % kTokenTiles * 8 + lane / 4;
      const u32 col = first_col + i / kTokenTiles * kChunkCols + lane % 4 * 8;
      const bool is_there = i < fragments_of_panel && token < tokens && col < cols;
      eights[ahead].load(x, source_row(token) * cols + col, is_there ? min(cols - col, 8) : 0, aligned);
    }
#pragma unroll
    for (u32 ahead = 0; ahead < kFragmentsAhead; ++ahead) {
      const u32 i = first + ahead * warps;
      if (i >= fragments_of_panel) break;
#if KVPACK_TOKEN_SCALES
      const float inverse = 1.0f / token_scale(load_shared_u32(token_maxima + 4 * (i % kTokenTiles * 8 + lane / 4)));
#else
      const float inverse = 1.0f;
#endif
      const u32 col = first_col + i / kTokenTiles * kChunkCols + lane % 4 * 8;
      store_eight(eights[ahead], inverse, column_scales, col, cols, activations + i * kFragmentBytes, lane);
    }
  }
  copy_async_wait<0>();
  __syncthreads();

  Passing passing(passing_rows, lane);
  TokenSums sums;
  sums.clear();
  for (; units > 0; --units) {
    copy_async_wait<0>();
    __syncwarp();
    const Group group = unpack_group(blob, next_unit.entry());
    const Place place = schedule.place_of(unit, rows, cols, tile_cols);
    const bool mine = group.mode == KVPACK_MODE_RANS ? group.table == table_index : table_index == 0;
    const bool has_outliers = mine && group.num_outliers > 0;
    const u32 planes = raw_planes_unit(group, place);
    auto fragments_of = [&](Unit of) {
      return activations + (threadIdx.y * member_width + of.column) * (computed_anew(tile_cols) / kChunkCols) * kTokenTiles * kFragmentBytes;
    };
    u32 fragments = fragments_of(unit);
    auto finish_chunk = [&] {
      multiply_chunk(passing, fragments, lane, sums);
      fragments += kTokenTiles * kFragmentBytes;
    };
    u32 end_address = 0;
    Lane decoder{};
    if (group.mode == KVPACK_MODE_RANS) {
      decoder = start_lane(group, next_unit.start(length_bytes, lane), word_buffer(units), lane, end_address);
    }
    __syncwarp();  // what it began with has been read

    unit = schedule.after(unit);  // what is decoded now is the one before it
    u32 next_planes = 0, next_chunks = 0;
    if (units > 1) {
      const uint4 next_entry = __ldg(entries() + schedule.index_of(unit));
      const Group next = unpack_group(blob, next_entry);
      const Place place = schedule.place_of(unit, rows, cols, tile_cols);
      if constexpr (kBuffers == 2) copy_words(next, word_buffer(units - 1), lane);
      next_unit.put(next_entry, next, place, length_bytes, lane);
      next_planes = raw_planes_unit(next, place);
      next_chunks = raw_chunks(next, place);
    }
    copy_async_commit();

    if (!mine) {
      stream.stale = true;
    } else if (group.mode == KVPACK_MODE_RANS) {
      if (group.predictor == 0) {
        stream.each_chunk(blob, planes, place.chunks(), next_planes, next_chunks, lane, [&](u32 chunk, const RawChunk& raw) {
          passing.begin_chunk(chunk);
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
          passing.begin_chunk(chunk);
          emit_kept(kept, passing);
          finish_chunk();
        }
      }
      const bool valid = place.group * kLanes + lane < place.tile_rows;
      if (valid && (decoder.state != KVPACK_STATE_LOW || decoder.word_address != end_address)) {
#if KVPACK_GROUPED
        report_damage(load_pointer<u32>(ends + kEndsStatus), load_shared_u32(ends + kEndsFirstGroup) + schedule.index_of(schedule.before(unit)));
#else
        report_damage(status, schedule.index_of(schedule.before(unit)));
#endif
      }
    } else {
      stream.stale = true;
#pragma unroll 1
      for (u32 chunk = 0; chunk < place.chunks(); ++chunk) {
        passing.begin_chunk(chunk);
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
      const Group again = unpack_group(blob, __ldg(entries() + schedule.index_of(schedule.before(unit))));
      const u32* outliers = outliers_of(again, place);
      const u32 unit_fragments = fragments_of(schedule.before(unit));
#pragma unroll 1
      for (u32 i = 0; i < again.num_outliers; ++i) {
        const u32 outlier = __ldg(outliers + i);
        const u32 delta_bits = outlier_delta_bits(computed_anew(tile_cols));
        const u32 col = outlier_col(outlier, delta_bits);
        if (col >= place.tile_cols) continue;  // damage must not lead out of the activations
        add_outlier(outlier, delta_bits, unit_fragments + col / kChunkCols * kTokenTiles * kFragmentBytes, lane, sums);
      }
    }

    if (unit.column == 0) {
#if KVPACK_GROUPED
      num_tables = load_shared_u32(ends + kEndsNumTables);
#endif
      const u32 row_group = schedule.before(unit).row_group;
      const u32 members = blockIdx.y + 1 == gridDim.y ? last_members : blockDim.y, parts = gridDim.y * num_tables;
      const u32 maxima = behind_activations(computed_anew(panel_width));
      const MemberSums member_sums{all_buffers + kBuffers * warps * buffer_bytes, runs};
#if KVPACK_TOKEN_SCALES
      // Out of units of 2^-24 first: a small token's sums would become denormal.
      each_sum(sums, lane, [&](float& sum, u32 token) { sum = sum * kF16UnitInverse * token_scale(load_shared_u32(maxima + 4 * token)); });
#endif
#if KVPACK_GROUPED
      if (parts > 1) partials = load_pointer<float>(ends + kEndsPartials), semaphores = load_pointer<u32>(ends + kEndsSemaphores);
#endif
      const bool finishes =
          (members == 1 || join_members(sums, member_sums, row_group, members, lane)) &&
          (parts == 1 || join_parts<kPartsAhead>(sums, partials, semaphores, row_group, table_index * gridDim.y + blockIdx.y, parts, lane));
      if (finishes) {
#if KVPACK_GROUPED
        y = load_pointer<void>(ends + kEndsY), scales = load_pointer<const float>(ends + kEndsScales);
#endif
        const u32 first_row = row_group * kLanes + lane / 4;  // and 8, 16, 24 on
        float row_scales[4], row_offsets[4];
#pragma unroll
        for (u32 eight = 0; eight < 4; ++eight) {
          const u32 row = min(first_row + 8 * eight, rows - 1);
          row_scales[eight] = scales[row * scale_stride];
          row_offsets[eight] = bias != nullptr ? load_activation(bias, row) : 0.0f;
        }
#pragma unroll
        for (u32 tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
          for (u32 j = 0; j < 2; ++j) {
            const u32 token = 8 * tile + lane % 4 * 2 + j;
            if (token >= tokens) continue;
            const u64 at = result_at(token) + first_row;
#pragma unroll
            for (u32 eight = 0; eight < 4; ++eight) {
              if (first_row + 8 * eight >= rows) continue;
              float result = sums.of[fragment(eight / 2, tile) + eight % 2 * 2 + j] * kSumsUnitInverse * row_scales[eight];
              if (bias != nullptr) result += row_offsets[eight];
              store_result(y, at + 8 * eight, result);
            }
          }
        }
      }
      sums.clear();
    }
    if constexpr (kBuffers == 1) {
      __syncwarp();
      if (units > 1) copy_words(unpack_group(blob, next_unit.entry()), word_buffer(units - 1), lane);
      copy_async_commit();
    }
  }
}
