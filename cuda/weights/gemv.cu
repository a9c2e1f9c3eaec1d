// y = scale · (W (x · column scales)) + bias for one vector x and coded integers W: decode and product in one pass, nothing expanded.
//
// A lane decodes a row of a tile and multiplies as it goes. Activations become int16 with a scale for each chunk of 32 columns
// (a scale for more columns loses the small ones beside a massive one), so that a chunk's sum of products is exact in 32 bits.
// Four elements lie in the bytes of a register, and a register of the activations holds those of the same columns:
//
//   slot k of a chunk      byte t               element of column slot_column(k, t)
//   activations            8 bytes for slot k:  int16 of t = 0, 1, 2, 3
//
// How work is dealt to warps: schedule.cuh.
//
// Shared memory: table (16 KiB) | 80 bytes for each chunk of the panel: int16 activations, 64 bytes; first sum; scale; 8 unused |
// what a grouped product needs of its matrix at the end | words, one or two buffers for each warp: with two, the next tile's words are under way while this one's are decoded | sums of
// members.
#include "common/activations.cuh"
#include "weights/grouped.cuh"
#include "weights/schedule.cuh"
#include "codec/tile.cuh"

constexpr u32 kBuffers = KVPACK_BUFFERS;
constexpr u32 kActivationBytes = 2 * kChunkCols;  // of a chunk; then its first sum and its scale
constexpr u32 kChunkBytes = kActivationBytes + 16;
constexpr u32 kLoadsAhead = 8;
constexpr u32 kPartsAhead = 8;

// An activation below this is as good as zero: its reciprocal would not be finite.
constexpr float kTiniest = 1e-33f;
// The reciprocal of a float above 2^126 would be flushed to zero: those of fp16 stay below. A power of two, so that no bit changes.
constexpr float kDownscale = KVPACK_ACTIVATION == 0 ? 1.0f : 0.125f;

// One warp: 32 activations → int16, their scale, and the sum that makes unsigned elements signed: −half · Σ.
__device__ __forceinline__ void quantize_chunk(float value, u32 lane, u32 activations) {
  float largest = __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(value) & 0x7FFFFFFFu));
  bool usable = largest >= kTiniest && largest <= 3.4028234e38f;
  int q = usable ? __float2int_rn(value * kDownscale * (32767.0f * reciprocal(largest * kDownscale))) : 0;
  int sum = static_cast<int>(__reduce_add_sync(kAllLanes, static_cast<u32>(q)));
  store_shared_u16(activations + 8 * column_slot(lane) + 2 * column_byte(lane), static_cast<u32>(q));
  if (lane == 0) {
    store_shared_u32(activations + kActivationBytes, kSigned ? static_cast<u32>(-static_cast<int>(kHalf) * sum) : 0u);
    // An infinite or NaN activation makes the result NaN.
    store_shared_u32(activations + kActivationBytes + 4, __float_as_uint(usable ? largest * (1.0f / 32767.0f) : largest * 0.0f));
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
gemv(const void* x, const u8* blob, const uint4* groups, const u32* table, const float* scales, u32 scale_stride,
     const float* column_scales, const void* bias, void* y, float* partials, u32* semaphores, u32* status, u32 rows, u32 cols, u32 tile_cols, u32 tile_columns, u32 panel_width,
     u32 member_width, u32 last_members, u32 run_quotient, u32 run_remainder, u32 length_bytes, u32 buffer_bytes, u32 table_index,
     u32 num_tables
#if KVPACK_GROUPED
     , const uint2* ids, const StackedMatrix* matrices, u32 num_experts, u32 stack_parts, u32 row_pairs, u32 y_stride
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
  const u32 ends = activations + panel_width * tile_chunks * kChunkBytes, all_buffers = ends + kEndsBytes;
  const u32 buffers = all_buffers + kBuffers * warp * buffer_bytes;

#if KVPACK_GROUPED
  const u32 pair = blockIdx.z / stack_parts, part_of_expert = blockIdx.z % stack_parts;
  const u32 expert = expert_of(__ldg(ids + pair), num_experts), row_groups = ceil_div(rows, kLanes);
  StackedMatrix matrix{};
  if (expert != kNoExpert) matrix = load_matrix(matrices + expert * stack_parts + part_of_expert);
  y = bytes_behind(y, (static_cast<u64>(pair) * y_stride + part_of_expert * rows) * kActivationSize);
  if (matrix.launches == 0 && table_index == 0 && blockIdx.y == 0) {
    each_row(rows, [&](u32 row) { store_result(y, row, 0.0f); });
  }
  if (table_index >= matrix.launches) return;
  blob = bytes_behind(blob, matrix.blob), groups = bytes_behind(groups, matrix.groups);
  table = matrix.num_tables == 0 ? nullptr : bytes_behind(table, matrix.tables + 4ull * kTableSlots * table_index);
  x = bytes_behind(x, static_cast<u64>(pair / row_pairs) * cols * kActivationSize);
  if (warp == 0 && lane == 0) {
    const u64 sums = static_cast<u64>(blockIdx.z) * row_groups;
    store_ends(ends, {y, bytes_behind(scales, matrix.scales), partials + sums * gridDim.y * num_tables * kLanes, semaphores + sums,
                      bytes_behind(status, matrix.status), x, groups, static_cast<u32>(matrix.first_group), static_cast<u32>(matrix.launches)});
  }
#endif

  auto entries = [&] { return KVPACK_GROUPED ? load_pointer<const uint4>(ends + kEndsGroups) : groups; };

  // Two units are under way: the one that is decoded, and the next one's words and first planes.
  uint4 entry = make_uint4(0, 0, 0, 0), next_entry = entry;
  if (units > 0) entry = __ldg(groups + schedule.index_of(unit));
  // The first activations are asked for before all that has to wait for the entry.
  const u32 first_of_panel = blockIdx.y * panel_width;
  const u32 panel_chunks = min(panel_width, tile_columns - first_of_panel) * tile_chunks;
  float values[kLoadsAhead];
  auto load_values = [&](u32 first) {
#pragma unroll
    for (u32 i = 0; i < kLoadsAhead; ++i) {
      const u32 chunk = first + i * warps, col = first_of_panel * tile_cols + chunk * kChunkCols + lane;
      values[i] = chunk < panel_chunks && col < cols ? load_scaled_activation(x, col, column_scales, col) : 0.0f;
    }
  };
  load_values(warp);
  if (table != nullptr) copy_table(table, shared_table, warp * kLanes + lane, warps * kLanes);  // null if no tile has words
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
  for (u32 first = warp; first < panel_chunks; first += kLoadsAhead * warps) {
    if (first != warp) load_values(first);
#pragma unroll
    for (u32 i = 0; i < kLoadsAhead; ++i) {
      const u32 chunk = first + i * warps;
      if (chunk < panel_chunks) {
        quantize_chunk(values[i], lane, activations + chunk * kChunkBytes);
      }
    }
  }
  copy_async_wait<0>();
  __syncthreads();

  Sums<1> sums{};
  float& sum = sums.of[0];
  for (u32 buffer = 0; units > 0; --units, buffer ^= kBuffers - 1) {
    const Group group = unpack_group(blob, entry);
    const Place place = schedule.place_of(unit, rows, cols, tile_cols);
    const bool mine = group.mode == KVPACK_MODE_RANS ? group.table == table_index : table_index == 0;
    const bool has_outliers = mine && group.num_outliers > 0;
    const u32 planes = raw_planes_unit(group, place);
    Product product{activations + (threadIdx.y * member_width + unit.column) * tile_chunks * kChunkBytes, 0, {}};
    auto multiply = [&](auto&& decode) {
      const uint2 chunk_head = load_shared_v2(product.activations + kActivationBytes);
      product.sum = static_cast<int>(chunk_head.x);
      decode();
      sum += static_cast<float>(product.sum) * __uint_as_float(chunk_head.y);
      product.activations += kChunkBytes;
    };

    unit = schedule.after(unit);  // what is decoded now is the one before it
    LaneStart next_start{KVPACK_STATE_LOW, 0};
    u32 next_planes = 0;
    u32 next_chunks = 0;
    if (units > 1) {
      next_entry = __ldg(entries() + schedule.index_of(unit));
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
          multiply([&] { decode_chunk(decoder, shared_table, raw, product); });
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
          multiply([&] { emit_kept(kept, product); });
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
        multiply([&] {
          if (group.mode == KVPACK_MODE_CONSTANT) {
            RawChunk raw;
            load_raw(chunk_planes(blob, planes, chunk), lane, raw);
            constant_chunk(group.tile[0], raw, product);
          } else {
            raw_mode_chunk(group, place, place.group * kLanes + lane, chunk, product);
          }
        });
      }
    }
    if (has_outliers) {
      // Looked up again, rather than in registers all the time.
      const Group again = unpack_group(blob, __ldg(entries() + schedule.index_of(schedule.before(unit))));
      const u32* outliers = outliers_of(again, place);
#if KVPACK_GROUPED
      x = load_pointer<const void>(ends + kEndsX);
#endif
      const u32 delta_bits = outlier_delta_bits(tile_cols);
#pragma unroll 1
      for (u32 i = 0; i < again.num_outliers; ++i) {
        u32 outlier = __ldg(outliers + i);
        const u32 col = outlier_col(outlier, delta_bits);
        if (outlier_lane(outlier) == lane && col < place.tile_cols) {  // damage must not lead out of x
          const u32 of_row = place.first_col + col;
          sum += static_cast<float>(outlier_delta(outlier, delta_bits)) * load_scaled_activation(x, of_row, column_scales, of_row);
        }
      }
    }

    if (unit.column == 0) {
#if KVPACK_GROUPED
      num_tables = load_shared_u32(ends + kEndsNumTables);
#endif
      const u32 row_group = schedule.before(unit).row_group, row = row_group * kLanes + lane;
      const u32 members = blockIdx.y + 1 == gridDim.y ? last_members : blockDim.y, parts = gridDim.y * num_tables;
      const MemberSums member_sums{all_buffers + kBuffers * warps * buffer_bytes, runs};
#if KVPACK_GROUPED
      if (parts > 1) partials = load_pointer<float>(ends + kEndsPartials), semaphores = load_pointer<u32>(ends + kEndsSemaphores);
#endif
      const bool finishes =
          (members == 1 || join_members(sums, member_sums, row_group, members, lane)) &&
          (parts == 1 || join_parts<kPartsAhead>(sums, partials, semaphores, row_group, table_index * gridDim.y + blockIdx.y, parts, lane));
      if (finishes && row < rows) {
#if KVPACK_GROUPED
        y = load_pointer<void>(ends + kEndsY), scales = load_pointer<const float>(ends + kEndsScales);
#endif
        float result = sum * scales[row * scale_stride];
        if (bias != nullptr) result += load_activation(bias, row);
        store_result(y, row, result);
      }
      sum = 0;
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
