// Y = scale · (W X) + bias for up to 256 vectors X (tokens) and coded integers W on sm_90a: warps that decode beside warps that multiply.
//
// A block takes 128 rows (four groups) at a time. Its producers are warpgroups: each decodes a unit, the four groups of a tile column, a
// warp a group and a lane a row, and writes each chunk of 32 columns as fp16 into shared memory, where wgmma reads
// it. Activations come beside it, arranged before (arrange_activations.cu), two chunks ahead. Two consumers multiply, each 64 of the rows.
//
//   weights of a chunk       16 bytes of core k (0 … 3), row r, at 16 · (128·k + r): as fp16 bytes 0 … 3 of slot 2·k, then of slot 2·k + 1
//   activations of a chunk   16 bytes of core k, token t, at 16 · (tokens·k + t): of the same columns
//
// Units are numbered by block of rows, then tile column, and dealt to blocks in runs. A run's producers take its units in turn. Rows whose
// units are in several runs are put together in global memory by the last block to arrive, in a fixed order.
//
// Shared memory: weights, two stages a producer | activations, four | table (16 KiB) | words, one or two buffers for each warp that decodes |
// barriers.
#include "common/activations.cuh"
#include "common/hopper.cuh"
#include "weights/f16_elements.cuh"
#include "weights/schedule.cuh"
#include "codec/tile.cuh"

constexpr u32 kBuffers = KVPACK_BUFFERS;
constexpr u32 kTokens = KVPACK_TOKENS;
constexpr u32 kProducers = KVPACK_PRODUCERS;
constexpr u32 kConsumers = KVPACK_CONSUMERS;
constexpr u32 kGroups = KVPACK_BLOCK_GROUPS;  // of a block of rows; a warpgroup has as many warps
constexpr u32 kWarpgroup = kGroups * kLanes;
constexpr u32 kThreads = (kConsumers + kProducers) * kWarpgroup;
constexpr u32 kBlockRows = kGroups * kLanes;
constexpr u32 kStages = KVPACK_STAGES;
constexpr u32 kActivationStages = KVPACK_ACTIVATION_STAGES;
constexpr u32 kAhead = kActivationStages - kStages;
constexpr u32 kWeightsBytes = 2 * kBlockRows * kChunkCols;
constexpr u32 kActivationsBytes = 2 * kTokens * kChunkCols;
constexpr u32 kWeightsCoreBytes = 16 * kBlockRows;
constexpr u32 kActivationsCoreBytes = 16 * kTokens;
constexpr u32 kRowsCoreBytes = 8 * 16;
constexpr bool kHasOutliers = KVPACK_OUTLIERS != 0;
// What warps are started with is dealt anew where consumers need more.
constexpr u32 kLaunchRegisters = 65536 / kThreads / 8 * 8;
constexpr u32 kProducerRegisters = KVPACK_PRODUCER_REGISTERS;
constexpr u32 kConsumerRegisters = (kThreads * kLaunchRegisters - kProducers * kWarpgroup * kProducerRegisters) / (kConsumers * kWarpgroup) / 8 * 8;
// A product of more would need more registers than warps are started with.
constexpr u32 kProductTokens = kTokens < KVPACK_PRODUCT_TOKENS ? kTokens : KVPACK_PRODUCT_TOKENS;
constexpr u32 kProducts = kTokens / kProductTokens;

// Writes a lane's row of a chunk.
struct RowOfCores {
  u32 row;  // address of its first core
  u32 even = 0;

  __device__ __forceinline__ explicit RowOfCores(u32 address) : row(address) {}
  template <u32 k>
  __device__ __forceinline__ void slot(u32 elements) {
    if constexpr (k % 2 == 0) {
      even = elements;
    } else {
      store_shared_v4(row + k / 2 * kWeightsCoreBytes, make_uint4(first_two_f16(even), last_two_f16(even), first_two_f16(elements), last_two_f16(elements)));
    }
  }
};

// Where everything lies in shared memory.
struct Shared {
  u32 base;
  u32 word_bytes;  // of a warp's buffers

  static constexpr u32 kActivations = kProducers * kStages * kWeightsBytes;
  static constexpr u32 kTable = kActivations + kProducers * kActivationStages * kActivationsBytes;
  static constexpr u32 kWords = kTable + 4 * kTableSlots;

  __device__ __forceinline__ u32 weights(u32 producer, u32 chunk) const {
    return base + (producer * kStages + chunk % kStages) * kWeightsBytes;
  }
  __device__ __forceinline__ u32 activations(u32 producer, u32 chunk) const {
    return base + kActivations + (producer * kActivationStages + chunk % kActivationStages) * kActivationsBytes;
  }
  __device__ __forceinline__ u32 table() const { return base + kTable; }
  __device__ __forceinline__ u32 words(u32 warp) const { return base + kWords + warp * word_bytes; }
  __device__ __forceinline__ u32 barriers() const { return base + kWords + kProducers * kGroups * word_bytes; }
  // Of a chunk's stage: its weights are there; they are used up; its activations are there.
  __device__ __forceinline__ u32 written(u32 producer, u32 chunk) const { return barriers() + 8 * (producer * kStages + chunk % kStages); }
  __device__ __forceinline__ u32 used(u32 producer, u32 chunk) const { return written(producer, chunk) + 8 * kProducers * kStages; }
  __device__ __forceinline__ u32 arrived(u32 producer, u32 chunk) const {
    return barriers() + 16 * kProducers * kStages + 8 * (producer * kActivationStages + chunk % kActivationStages);
  }
  // What a consumer's first thread tells the others: how many parts of a sum were there before theirs.
  __device__ __forceinline__ u32 parts_before(u32 consumer) const {
    return barriers() + 8 * kProducers * (2 * kStages + kActivationStages) + 4 * consumer;
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1)
gemm_wgmma(const u8* x, const float* token_scales, const u8* blob, const uint4* groups, const u32* table, const float* scales,
           u32 scale_stride, const void* bias, void* y, float* partials, u32* semaphores, u32* status, u32 rows, u32 cols,
           u32 tile_cols, u32 tile_columns, u32 run_quotient, u32 run_remainder, u32 length_bytes, u32 buffer_bytes, u32 tokens) {
  KVPACK_DYNAMIC_SHARED(dynamic);
  const Shared shared{shared_address(dynamic), kBuffers * buffer_bytes};
  // The compiler sees of what is shuffled that it is the same for a warp: else it takes wgmma for one in a divergent branch.
  const u32 warp_of_block = __shfl_sync(kAllLanes, threadIdx.x / kLanes, 0);
  const u32 lane = threadIdx.x % kLanes, warp = warp_of_block % kGroups, warpgroup = warp_of_block / kGroups;
  const u32 tile_chunks = tile_cols / kChunkCols;
  const u32 delta_bits = outlier_delta_bits(tile_cols);
  const Runs runs{run_quotient, run_remainder};
  const u32 begin = runs.begin(blockIdx.x), end = runs.begin(blockIdx.x + 1);

  if (table != nullptr) copy_table(table, shared.table(), threadIdx.x, kThreads);  // null if no tile has words
  copy_async_commit();
  if (threadIdx.x < kProducers * kActivationStages) {
    const u32 producer = threadIdx.x / kActivationStages, stage = threadIdx.x % kActivationStages;
    barrier_init(shared.arrived(producer, stage), 1);
    if (stage < kStages) {
      barrier_init(shared.written(producer, stage), kGroups);
      barrier_init(shared.used(producer, stage), kConsumers * kGroups);
    }
  }
  barrier_init_done();
  copy_async_wait<0>();
  __syncthreads();

  if (warpgroup >= kConsumers) {
    if constexpr (kProducerRegisters < kLaunchRegisters) give_registers<kProducerRegisters>();
    const u32 producer = warpgroup - kConsumers, row_groups = ceil_div(rows, kLanes);
    const u32 buffers = shared.words(producer * kGroups + warp);
    auto row_group_of = [&](u32 unit) { return unit / tile_columns * kGroups + warp; };
    auto is_there = [&](u32 unit) { return unit < end && row_group_of(unit) < row_groups; };
    auto entry_of = [&](u32 unit) { return __ldg(groups + row_group_of(unit) * tile_columns + unit % tile_columns); };
    auto place_at = [&](u32 unit) { return place_of(row_group_of(unit), unit % tile_columns, rows, cols, tile_cols); };

    // One thread asks for activations: of chunk number `asked` of this producer, which is chunk `asked_chunk` of unit `asked_unit`.
    u32 asked = 0, asked_unit = begin + producer, asked_chunk = 0;
    auto ask = [&] {
      if (warp != 0 || lane != 0 || asked_unit >= end) return;
      const u32 chunk = asked_unit % tile_columns * tile_chunks + asked_chunk;
      copy_bulk(shared.activations(producer, asked), x + static_cast<u64>(chunk) * kActivationsBytes, kActivationsBytes,
                shared.arrived(producer, asked));
      ++asked;
      if (++asked_chunk == tile_chunks) {
        asked_chunk = 0;
        asked_unit += kProducers;
      }
    };
#pragma unroll
    for (u32 i = 0; i < kAhead; ++i) ask();

    u32 unit = begin + producer, number = 0;  // of the chunk, over all units
    auto begin_chunk = [&] {
      barrier_wait(shared.used(producer, number), (number / kStages & 1) ^ 1);
      ask();
    };
    auto end_chunk = [&] {
      fence_async();
      __syncwarp();
      if (lane == 0) barrier_arrive(shared.written(producer, number));
      ++number;
    };

    // Entries are looked up when they are needed, rather than in registers all the time.
    LaneStart start{KVPACK_STATE_LOW, 0};
    RawStream stream;
    stream.stale = true;
    if (is_there(unit)) {
      const Group group = unpack_group(blob, entry_of(unit));
      const Place place = place_at(unit);
      copy_words(group, buffers, lane);
      start = load_lane_start(group, place, length_bytes, lane);
      stream.begin(blob, raw_planes_unit(group, place), raw_chunks(group, place), lane);
    }
    copy_async_commit();
    for (u32 buffer = 0; unit < end; unit += kProducers, buffer ^= kBuffers - 1) {
      const bool present = is_there(unit);
      const Group group = unpack_group(blob, present ? entry_of(unit) : make_uint4(0, 0, 0, 0));
      const Place place = place_at(unit);
      const u32 planes = raw_planes_unit(group, place);
      const u32 next_unit = unit + kProducers;
      LaneStart next_start{KVPACK_STATE_LOW, 0};
      u32 next_planes = 0, next_chunks = 0;
      if (is_there(next_unit)) {
        const Group next = unpack_group(blob, entry_of(next_unit));
        const Place next_place = place_at(next_unit);
        if constexpr (kBuffers == 2) copy_words(next, buffers + (buffer ^ 1) * buffer_bytes, lane);
        next_start = load_lane_start(next, next_place, length_bytes, lane);
        next_planes = raw_planes_unit(next, next_place);
        next_chunks = raw_chunks(next, next_place);
      }
      if constexpr (kBuffers == 2) copy_async_commit();
      copy_async_wait<kBuffers - 1>();
      __syncwarp();

      // Outliers of the lane: an element becomes q + delta where it lies.
      const u32* outlier = nullptr;
      u32 outliers_left = 0;
      if constexpr (kHasOutliers) {
        if (present) {
          outlier = outliers_of(group, place);
          for (u32 i = 0; i < group.num_outliers; ++i) {
            const u32 row = outlier_lane(__ldg(outliers_of(group, place) + i));
            outlier += row < lane;
            outliers_left += row == lane;
          }
        }
      }
      auto put_outliers = [&](u32 chunk, u32 row) {
        if constexpr (kHasOutliers) {
          while (outliers_left > 0) {
            const u32 entry = __ldg(outlier), col = outlier_col(entry, delta_bits) - chunk * kChunkCols;
            if (static_cast<s32>(col) >= static_cast<s32>(kChunkCols)) break;
            if (col < kChunkCols) {  // damage to their order must not lead out of the row
              const u32 slot = column_slot(col);
              const u32 address = row + slot / 2 * kWeightsCoreBytes + slot % 2 * 8 + column_byte(col) * 2;
              store_shared_u16(address, f16_bits(f16_value(load_shared_u16(address)) + kF16Unit * static_cast<float>(outlier_delta(entry, delta_bits))));
            }
            ++outlier;
            --outliers_left;
          }
        }
      };

      u32 done = 0;
      if (present) {
        auto row_address = [&] { return shared.weights(producer, number) + 16 * (warp * kLanes + lane); };
        if (group.mode == KVPACK_MODE_RANS) {
          u32 end_address;
          Lane decoder = start_lane(group, start, buffers + buffer * buffer_bytes, lane, end_address);
          stream.each_chunk(blob, planes, place.chunks(), next_planes, next_chunks, lane, [&](u32 chunk, const RawChunk& raw) {
            begin_chunk();
            RowOfCores row(row_address());
            decode_chunk(decoder, shared.table(), raw, row);
            put_outliers(chunk, row.row);
            end_chunk();
          });
          const bool valid = place.group * kLanes + lane < place.tile_rows;
          if (valid && (decoder.state != KVPACK_STATE_LOW || decoder.word_address != end_address)) {
            report_damage(status, row_group_of(unit) * tile_columns + unit % tile_columns);
          }
        } else {
          stream.stale = true;
#pragma unroll 1
          for (u32 chunk = 0; chunk < place.chunks(); ++chunk) {
            begin_chunk();
            RowOfCores row(row_address());
            if (group.mode == KVPACK_MODE_CONSTANT) {
              RawChunk raw;
              load_raw(chunk_planes(blob, planes, chunk), lane, raw);
              constant_chunk(group.tile[0], raw, row);
            } else {
              raw_mode_chunk(group, place, place.group * kLanes + lane, chunk, row);
            }
            put_outliers(chunk, row.row);
            end_chunk();
          }
        }
        done = place.chunks();
      } else {
        stream.stale = true;
      }
      // Chunks that a narrower tile lacks, and those of rows that there are not, are zeros.
      for (; done < tile_chunks; ++done) {
        begin_chunk();
        const u32 row = shared.weights(producer, number) + 16 * (warp * kLanes + lane);
#pragma unroll
        for (u32 core = 0; core < kChunkCols / 8; ++core) store_shared_v4(row + core * kWeightsCoreBytes, make_uint4(0, 0, 0, 0));
        end_chunk();
      }
      __syncwarp();
      if constexpr (kBuffers == 1) {
        if (is_there(next_unit)) copy_words(unpack_group(blob, entry_of(next_unit)), buffers, lane);
        copy_async_commit();
      }
      start = next_start;
    }
  } else {
    if constexpr (kProducerRegisters < kLaunchRegisters) take_registers<kConsumerRegisters>();
    const u32 thread = threadIdx.x % kWarpgroup, half = warpgroup;
    for (u32 row_block = begin / tile_columns; row_block * tile_columns < end; ++row_block) {
      const u32 first_unit = row_block * tile_columns;
      const u32 first = max(begin, first_unit), last = min(end, first_unit + tile_columns);
      float sums[kProducts][kProductTokens / 2];
      auto clear_sums = [&] {
#pragma unroll
        for (u32 product = 0; product < kProducts; ++product) {
#pragma unroll
          for (u32 i = 0; i < kProductTokens / 2; ++i) sums[product][i] = 0.0f;
        }
      };
      clear_sums();
      for (u32 unit = first; unit < last;) {
        // What producers decode at the same time, a round, is multiplied in turns.
        const u32 round = (unit - begin) / kProducers, round_end = min(last, begin + (round + 1) * kProducers);
        const u32 first_producer = unit - begin - round * kProducers, end_producer = first_producer + round_end - unit;
        unit = round_end;
#pragma unroll 1
        for (u32 number = round * tile_chunks; number < (round + 1) * tile_chunks; ++number) {
#pragma unroll 1
          for (u32 producer = first_producer; producer < end_producer; ++producer) {
            barrier_wait(shared.written(producer, number), number / kStages & 1);
            barrier_wait(shared.arrived(producer, number), number / kActivationStages & 1);
            __syncwarp();
            const u64 weights = matrix_at(shared.weights(producer, number) + half * 64 * 16, kWeightsCoreBytes, kRowsCoreBytes);
            const u64 activations = matrix_at(shared.activations(producer, number), kActivationsCoreBytes, kRowsCoreBytes);
            wgmma_fence();
#pragma unroll
            for (u32 step = 0; step < 2; ++step) {
#pragma unroll
              for (u32 product = 0; product < kProducts; ++product) {
                wgmma_f16<kProductTokens>(sums[product], weights + step * (2 * kWeightsCoreBytes / 16),
                                          activations + step * (2 * kActivationsCoreBytes / 16) + product * kProductTokens);
              }
            }
            wgmma_commit();
            wgmma_wait();
            // Each warp says so for itself: those of a warpgroup need not be equally far.
            if (lane < 1) barrier_arrive(shared.used(producer, number));
          }
        }
      }

      const u32 first_worker = runs.worker_of(first_unit), parts = runs.worker_of(first_unit + tile_columns - 1) - first_worker + 1;
      if (parts > 1) {
        // A run has at most two blocks of rows in part: number 0 is the one that it begins with.
        auto part_of = [&](u32 worker) {
          const u32 which = runs.begin(worker) / tile_columns == row_block ? 0 : 1;
          return reinterpret_cast<float4*>(partials) + static_cast<u64>(kConsumers * (2 * worker + which) + half) * (kBlockRows / kConsumers * kTokens / 4) + thread;
        };
        float4* mine = part_of(blockIdx.x);
#pragma unroll
        for (u32 i = 0; i < kTokens / 8; ++i) {
          const float* four = sums[i / (kProductTokens / 8)] + 4 * (i % (kProductTokens / 8));
          mine[i * kWarpgroup] = make_float4(four[0], four[1], four[2], four[3]);
        }
        sync_warps(1 + warpgroup, kWarpgroup);
        if (thread == 0) {
          fence_device();
          store_shared_u32(shared.parts_before(warpgroup), atomicAdd(semaphores + kConsumers * row_block + half, 1u));
        }
        sync_warps(1 + warpgroup, kWarpgroup);
        if (load_shared_u32(shared.parts_before(warpgroup)) + 1 < parts) continue;
        fence_device();
        if (thread == 0) atomicExch(semaphores + kConsumers * row_block + half, 0u);
        clear_sums();
#pragma unroll 1
        for (u32 part = 0; part < parts; ++part) {
          const float4* of_part = part_of(first_worker + part);
#pragma unroll
          for (u32 i = 0; i < kTokens / 8; ++i) {
            const float4 v = load_l2_v4(of_part + i * kWarpgroup);
            float* four = sums[i / (kProductTokens / 8)] + 4 * (i % (kProductTokens / 8));
            four[0] += v.x, four[1] += v.y, four[2] += v.z, four[3] += v.w;
          }
        }
      }
#pragma unroll
      for (u32 r = 0; r < 2; ++r) {
        const u32 row = row_block * kBlockRows + 64 * half + 16 * warp + 8 * r + lane / 4;
        if (row >= rows) continue;
        const float scale = scales[row * scale_stride];
        const float offset = bias != nullptr ? load_activation(bias, row) : 0.0f;
#pragma unroll
        for (u32 i = 0; i < kTokens / 4; ++i) {
          const u32 token_eight = i / 2, token = token_eight * 8 + lane % 4 * 2 + i % 2;
          if (token >= tokens) continue;
          float result = sums[token_eight / (kProductTokens / 8)][token_eight % (kProductTokens / 8) * 4 + 2 * r + i % 2] * kF16UnitInverse;
          if (token_scales != nullptr) result *= __ldg(token_scales + token);
          result *= scale;
          if (bias != nullptr) result += offset;
          store_result(y, static_cast<u64>(token) * rows + row, result);
        }
      }
    }
  }
}
