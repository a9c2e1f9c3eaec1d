// Y = scale · (W X) + bias for 65 to 128 vectors X (tokens) and coded integers W, with ldmatrix and mma.sync: GPUs without wgmma, and blobs
// with predictors or several tables.
//
// A block takes 128 or 256 rows (four or eight groups) and two tile columns at a time: two teams of warps, one a tile column, decode them, a
// warp a group and a lane a row. Each round a team decodes a chunk of 32 columns into one of two stages in shared memory, while all warps
// multiply what lies in the other one, each a part of the rows and tokens. One team decodes before it multiplies, the other one after it, so
// that tensor cores are at work while elements are decoded. Activations come beside the weights, arranged before (arrange_activations.cu), a
// round ahead.
//
// Weights are staged as bytes, and become fp16 when they are multiplied; or as fp16, where outliers join them:
//
//   bytes    16-byte unit u (slots 4·u … 4·u + 3) of row r, at 32·r + 16·(u ^ (r / 4 & 1)), so that ldmatrix meets all banks
//   fp16     16 bytes of core k (0 … 3), row r, at 16 · (rows·k + r): bytes 2·h, 2·h + 1 of slots 4·s … 4·s + 3, for k = 2·s + h
//   activations of a chunk       16 bytes of core k, token t, at 16 · (tokens·k + t): of the same columns
//
// Units, pairs of tile columns of a block of rows, are numbered by block of rows, then pair, and dealt to blocks in runs. Rows whose units are
// in several runs are put together in global memory by the last one to arrive, warp by warp, in a fixed order. Where there are more tokens than
// a block takes, blocks along y decode the same again (expansion is faster: mma_product.MAX_TOKENS).
//
// Shared memory: tables (16 KiB each: one, or one a team) | weights, two stages | activations, two stages | for each warp: two entries of the
// group table | states and lengths | what is known of two rounds, and which table is in place | raw planes of a chunk | words.
#include "common/activations.cuh"
#include "weights/f16_elements.cuh"
#include "weights/schedule.cuh"
#include "codec/tile.cuh"

constexpr u32 kTokens = KVPACK_TOKENS;
constexpr u32 kGroups = KVPACK_GROUPS;
constexpr u32 kElementBytes = KVPACK_STAGED_BYTES;
constexpr bool kHasOutliers = KVPACK_OUTLIERS != 0;
constexpr bool kPredicted = KVPACK_PREDICTED != 0;
constexpr bool kSeveralTables = KVPACK_SEVERAL_TABLES != 0;
static_assert(!kHasOutliers || kElementBytes == 2, "outliers do not fit into bytes");
constexpr u32 kTeams = 2;
constexpr u32 kTeamThreads = kGroups * kLanes;
constexpr u32 kWarps = kTeams * kGroups;
constexpr u32 kThreads = kWarps * kLanes;
constexpr u32 kBlockRows = kGroups * kLanes;
constexpr u32 kStages = 2;
constexpr u32 kWeightsBytes = kElementBytes * kBlockRows * kChunkCols;  // of a team
constexpr u32 kActivationsBytes = 2 * kTokens * kChunkCols;
constexpr u32 kWeightsCoreBytes = 16 * kBlockRows;
constexpr u32 kActivationsCoreBytes = 16 * kTokens;
constexpr u32 kCores = 4;
constexpr u32 kPartsAhead = 2;  // partial sums on their way
constexpr u32 kStateBytes = 4 * kLanes, kStartBytes = kStateBytes + 2 * kLanes;
// What a warp multiplies: the fewer rows, the fewer bytes are converted by several warps.
constexpr u32 kWarpRows = kTokens == 64 ? 32 : 64;
constexpr u32 kRowParts = kBlockRows / kWarpRows;
constexpr u32 kWarpTokens = kTokens * kRowParts / kWarps;
constexpr u32 kSixteens = kWarpRows / 16, kEights = kWarpTokens / 8;

// Fragments of mma.m16n8k16, of 16 rows and eight tokens. Of each a lane holds, as number i, row 8·(i / 2) + lane / 4 and token
// 2·(lane % 4) + i % 2.
typedef Sums<4 * kSixteens * kEights> TokenSums;
__device__ __forceinline__ constexpr u32 fragment(u32 sixteen, u32 eight) { return 4 * (sixteen * kEights + eight); }

// Where everything lies in shared memory.
struct Shared {
  u32 base;
  u32 word_bytes;  // of a warp

  static constexpr u32 kWeights = (kSeveralTables ? kTeams : 1) * 4 * kTableSlots;
  static constexpr u32 kActivations = kWeights + kStages * kTeams * kWeightsBytes;
  static constexpr u32 kEntries = kActivations + kStages * kTeams * kActivationsBytes;
  static constexpr u32 kStarts = kEntries + kWarps * 2 * 16;
  static constexpr u32 kRounds = kStarts + kWarps * kStartBytes;
  static constexpr u32 kPlanes = kRounds + kWarps * 16;
  static constexpr u32 kWords = kPlanes + kWarps * kRawChunkBytes;

  __device__ __forceinline__ u32 table(u32 team) const { return base + (kSeveralTables ? team * 4 * kTableSlots : 0); }
  __device__ __forceinline__ u32 weights(u32 round, u32 team) const { return base + kWeights + (round % kStages * kTeams + team) * kWeightsBytes; }
  __device__ __forceinline__ u32 activations(u32 round, u32 team) const {
    return base + kActivations + (round % kStages * kTeams + team) * kActivationsBytes;
  }
  __device__ __forceinline__ u32 entry(u32 warp, u32 unit) const { return base + kEntries + (2 * warp + unit % 2) * 16; }
  __device__ __forceinline__ u32 start(u32 warp) const { return base + kStarts + warp * kStartBytes; }
  __device__ __forceinline__ u32 round(u32 warp, u32 round) const { return base + kRounds + 16 * warp + round % 2 * 4; }
  __device__ __forceinline__ u32 table_in_place(u32 warp) const { return base + kRounds + 16 * warp + 8; }
  __device__ __forceinline__ u32 planes(u32 warp) const { return base + kPlanes + warp * kRawChunkBytes; }
  __device__ __forceinline__ u32 words(u32 warp) const { return base + kWords + warp * word_bytes; }
};

// Writes a lane's row of a chunk.
struct StagedRow {
  u32 address;  // of its first unit or core
  u32 kept[4];

  __device__ __forceinline__ StagedRow(u32 weights, u32 row)
      : address(weights + (kElementBytes == 1 ? 32 * row + 16 * (row / 4 & 1) : 16 * row)) {}
  template <u32 k>
  __device__ __forceinline__ void slot(u32 elements) {
    kept[k % 4] = elements;
    if constexpr (k % 4 == 3) {
      if constexpr (kElementBytes == 1) {
        store_shared_v4(address ^ 16 * (k / 4), make_uint4(kept[0], kept[1], kept[2], kept[3]));
      } else {
        const u32 core = address + k / 4 * 2 * kWeightsCoreBytes;
        store_shared_v4(core,
                        make_uint4(first_two_f16(kept[0]), first_two_f16(kept[1]), first_two_f16(kept[2]), first_two_f16(kept[3])));
        store_shared_v4(core + kWeightsCoreBytes,
                        make_uint4(last_two_f16(kept[0]), last_two_f16(kept[1]), last_two_f16(kept[2]), last_two_f16(kept[3])));
      }
    }
  }
  // Slot by slot: slower, and in few registers.
  __device__ __forceinline__ void put_slot(u32 k, u32 elements) const {
    if constexpr (kElementBytes == 1) {
      store_shared_u32((address ^ 16 * (k / 4)) + 4 * (k % 4), elements);
    } else {
      const u32 of_core = address + k / 4 * 2 * kWeightsCoreBytes + 4 * (k % 4);
      store_shared_u32(of_core, first_two_f16(elements));
      store_shared_u32(of_core + kWeightsCoreBytes, last_two_f16(elements));
    }
  }
  // Of a column of the chunk, staged as fp16.
  __device__ __forceinline__ u32 element(u32 col) const {
    const u32 slot = column_slot(col), byte = column_byte(col);
    return address + (slot / 4 * 2 + byte / 2) * kWeightsCoreBytes + slot % 4 * 4 + byte % 2 * 2;
  }
};

template <u32 k = 0>
__device__ __forceinline__ void emit_kept(const KeepSlots& kept, StagedRow& row) {
  if constexpr (k < kSlots) {
    row.slot<k>(kept.slots[k]);
    emit_kept<k + 1>(kept, row);
  }
}

// A chunk's weights times its activations; the addresses are of the warp's first row and token. In two steps of 16 columns, so that few
// activations are in registers.
__device__ __forceinline__ void multiply_chunk(u32 weights, u32 activations, u32 lane, TokenSums& sums) {
#pragma unroll
  for (u32 step = 0; step < 2; ++step) {
    u32 x[kEights / 2][4];  // of two eights of tokens: core 2·step, then core 2·step + 1, of each
#pragma unroll
    for (u32 two = 0; two < kEights / 2; ++two) {
      load_matrix_x4(x[two], activations + (2 * step + lane / 8 % 2) * kActivationsCoreBytes + (16 * two + lane / 16 * 8 + lane % 8) * 16);
    }
    auto multiply_sixteen = [&](u32 sixteen, const u32(&w)[4]) {
#pragma unroll
      for (u32 eight = 0; eight < kEights; ++eight) {
        mma_f16(sums.of + fragment(sixteen, eight), w, x[eight / 2][eight % 2 * 2], x[eight / 2][eight % 2 * 2 + 1]);
      }
    };
#pragma unroll
    for (u32 sixteen = 0; sixteen < kSixteens; sixteen += 2) {
      if constexpr (kElementBytes == 1) {
        u32 staged[4];  // of 32 rows; the warp's first row is a multiple of 8, so that it does not swap units
        load_matrix_x4(staged, weights + 32 * (16 * sixteen + lane) + 16 * (step ^ (lane / 4 & 1)));
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
          const u32 upper = staged[2 * half], lower = staged[2 * half + 1];
          const u32 w[4] = {first_two_f16(upper), first_two_f16(lower), last_two_f16(upper), last_two_f16(lower)};
          multiply_sixteen(sixteen + half, w);
        }
      } else {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
          u32 w[4];
          load_matrix_x4(w, weights + (2 * step + lane / 16) * kWeightsCoreBytes + 16 * (16 * (sixteen + half) + lane % 16));
          multiply_sixteen(sixteen + half, w);
        }
      }
    }
  }
}

// Which block of rows, and which pair of its tile columns.
struct PairUnit {
  u32 row_block, pair;
  __device__ __forceinline__ PairUnit next(u32 pairs) const {
    const bool wraps = pair + 1 == pairs;
    return {row_block + wraps, wraps ? 0 : pair + 1};
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, KVPACK_BLOCKS_PER_SM)
gemm_mma(const u8* x, const float* token_scales, const u8* blob, const uint4* groups, const u32* tables, const float* scales,
         u32 scale_stride, const void* bias, void* y, float* partials, u32* semaphores, u32* status, u32 rows, u32 cols,
         u32 tile_cols, u32 tile_columns, u32 run_quotient, u32 run_remainder, u32 length_bytes, u32 buffer_bytes, u32 tokens,
         u32 arranged_tokens, u32 chunks, u32 tile_chunks, u32 pairs, u32 row_groups) {
  // What follows from other arguments is one all the same: those take no registers.
  KVPACK_DYNAMIC_SHARED(dynamic);
  const Shared shared{shared_address(dynamic), buffer_bytes};
  const u32 lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, team = warp / kGroups;
  const Runs runs{run_quotient, run_remainder};
  const u32 begin = runs.begin(blockIdx.x), end = runs.begin(blockIdx.x + 1);
  const u32 first_token = blockIdx.y * kTokens;
  // Of a unit: as many as its wider tile has chunks.
  auto rounds_of = [&](u32 pair) { return min(tile_chunks, chunks - kTeams * pair * tile_chunks); };
  // Number of a team's chunk among those of the matrix's columns. It is one that there is not where the team has no tile, or a narrower one.
  auto chunk_of = [&](u32 pair, u32 of_team, u32 chunk) { return (kTeams * pair + of_team) * tile_chunks + chunk; };

  // ---- What is decoded. Warps beyond the last group decode that one again, and nobody looks at it.
  PairUnit decoded{begin / pairs, begin % pairs};
  u32 units = end - begin;  // left; the number of a unit's entry, too
  u32 decoded_chunk = 0;
  Lane decoder{KVPACK_STATE_LOW, 0, 0};
  u32 next_outlier = 0;  // of the lane's, among the group's
  auto row_group_of = [&](PairUnit unit) { return min(unit.row_block * kGroups + warp % kGroups, row_groups - 1); };
  auto copy_entry = [&](PairUnit unit, u32 number) {
    const u32 column = kTeams * unit.pair + team;
    if (lane == 0 && column < tile_columns) copy_async_16(shared.entry(warp, number), groups + row_group_of(unit) * tile_columns + column);
  };
  // Asks for a chunk's raw planes.
  auto copy_planes = [&](const Group& group, const Place& place, u32 chunk) {
    if (chunk >= raw_chunks(group, place)) return;
    const u8* from = chunk_planes(blob, raw_planes_unit(group, place), chunk);
#pragma unroll
    for (u32 unit = 0; unit < kRawChunkBytes / 16; unit += kLanes) {
      if (unit + lane < kRawChunkBytes / 16) copy_async_16(shared.planes(warp) + 16 * (unit + lane), from + 16 * (unit + lane));
    }
  };
  // Asks for what unit `decoded` starts from. Its entry is there; the next one's is asked for.
  auto copy_start = [&] {
    const u32 column = kTeams * decoded.pair + team;
    if (column < tile_columns) {
      const Group group = unpack_group(blob, load_shared_v4(shared.entry(warp, units)));
      const Place place = place_of(row_group_of(decoded), column, rows, cols, tile_cols);
      copy_words(group, shared.words(warp), lane);
      const u32 state_units = kStateBytes / 16;
      if (group.mode == KVPACK_MODE_RANS && lane < state_units + 2 * length_bytes) {
        const u8* states = group.tile + kGroupOffsetsBytes;
        const u8* from = lane < state_units ? states + place.group * kStateBytes
                                            : states + 4 * place.lanes() + place.group * kLanes * length_bytes - kStateBytes;
        copy_async_16(shared.start(warp) + 16 * lane, from + 16 * lane);
      }
      copy_planes(group, place, 0);
    }
    if (units > 1) copy_entry(decoded.next(pairs), units - 1);
  };
  auto put_outliers = [&](const u32* outliers, u32 count, u32 chunk, const StagedRow& row) {
    const u32 delta_bits = outlier_delta_bits(tile_cols);
    while (next_outlier < count) {
      const u32 entry = __ldg(outliers + next_outlier), col = outlier_col(entry, delta_bits) - chunk * kChunkCols;
      if (outlier_lane(entry) != lane) {
        next_outlier = count;
        break;
      }
      if (static_cast<s32>(col) >= static_cast<s32>(kChunkCols)) break;
      if (col < kChunkCols) {  // damage to their order must not lead out of the row
        const u32 address = row.element(col);
        store_shared_u16(address, f16_bits(f16_value(load_shared_u16(address)) + kF16Unit * static_cast<float>(outlier_delta(entry, delta_bits))));
      }
      ++next_outlier;
    }
  };
  auto decode = [&](u32 round) {
    const u32 column = kTeams * decoded.pair + team, chunk = decoded_chunk;
    copy_async_wait<1>();  // not for the activations
    __syncwarp();
    if (chunk_of(decoded.pair, team, chunk) < chunks) {
      const u32 row_group = row_group_of(decoded);
      const Group group = unpack_group(blob, load_shared_v4(shared.entry(warp, units)));
      const Place place = place_of(row_group, column, rows, cols, tile_cols);
      if (kHasOutliers && chunk == 0) {
        next_outlier = 0;
        for (u32 i = 0; i < group.num_outliers; ++i) next_outlier += outlier_lane(__ldg(outliers_of(group, place) + i)) < lane;
      }
      RawChunk raw;
      if (raw_chunks(group, place) > 0) load_raw(PlanesInShared{shared.planes(warp)}, lane, raw);
      StagedRow row(shared.weights(round, team), warp % kGroups * kLanes + lane);
      if (group.mode == KVPACK_MODE_RANS) {
        if (chunk == 0) {
          const u32 states = shared.start(warp), lengths = states + kStateBytes;
          const LaneStart start{load_shared_u32(states + 4 * lane),
                                length_bytes == 1 ? load_shared_u8(lengths + lane) : load_shared_u16(lengths + 2 * lane)};
          u32 end_address;
          decoder = start_lane(group, start, shared.words(warp), lane, end_address);
          store_shared_u32(states + 4 * lane, end_address);  // where the state was
          if constexpr (kSeveralTables) {
            if (group.table != load_shared_u32(shared.table_in_place(warp))) {  // so it is for the whole team
              __syncwarp();
              store_shared_u32(shared.table_in_place(warp), group.table);
              copy_table(tables + group.table * kTableSlots, shared.table(team), threadIdx.x % kTeamThreads, kTeamThreads);
              copy_async_commit();
              copy_async_wait<0>();
              sync_warps(1 + team, kTeamThreads);
            }
          }
        }
        if constexpr (kPredicted) {
          KeepSlots kept;
          decode_chunk(decoder, shared.table(team), raw, kept);
          if (group.predictor != 0) {
            const u32 kept_at = shared.start(warp) + kStateBytes + length_bytes * lane;  // where the length was
            u32 previous = load_shared_u8(kept_at);
            undo_predictor(kept, chunk == 0, previous);
            store_shared_u8(kept_at, previous);
          }
          emit_kept(kept, row);
        } else {
          decode_chunk(decoder, shared.table(team), raw, row);
        }
        const bool is_last = chunk + 1 == place.chunks() && decoded.row_block * kGroups + warp % kGroups < row_groups && blockIdx.y == 0;
        if (is_last && place.group * kLanes + lane < place.tile_rows &&
            (decoder.state != KVPACK_STATE_LOW || decoder.word_address != load_shared_u32(shared.start(warp) + 4 * lane))) {
          report_damage(status, row_group * tile_columns + column);
        }
      } else if (group.mode == KVPACK_MODE_CONSTANT) {
        constant_chunk(group.tile[0], raw, row);
      } else {
#pragma unroll 1
        for (u32 k = 0; k < kSlots; ++k) row.put_slot(k, raw_mode_slot(group, place, place.group * kLanes + lane, chunk, k));
      }
      // Looked up again, rather than in registers beside what is decoded.
      const Group again = unpack_group(blob, load_shared_v4(shared.entry(warp, units)));
      const Place place_again = place_of(row_group_of(decoded), kTeams * decoded.pair + team, rows, cols, computed_anew(tile_cols));
      if constexpr (kHasOutliers) put_outliers(outliers_of(again, place_again), again.num_outliers, chunk, row);
      __syncwarp();  // planes have been read
      copy_planes(again, place_again, chunk + 1);
    }
    if (++decoded_chunk == rounds_of(decoded.pair)) {
      __syncwarp();  // words and entries have been read
      decoded = decoded.next(pairs);
      decoded_chunk = 0;
      if (--units > 0) copy_start();
    }
  };
  // Asks for the activations of what is decoded next.
  auto copy_activations = [&](u32 round) {
#pragma unroll
    for (u32 i = 0; i < kTeams * kCores * kTokens / kThreads; ++i) {
      const u32 number = i * kThreads + threadIdx.x, core = number / kTokens, token = number % kTokens;
      const u32 chunk = chunk_of(decoded.pair, core / kCores, decoded_chunk);
      if (chunk < chunks) {
        copy_async_16(shared.activations(round, 0) + 16 * number,
                      x + 16 * (static_cast<u64>(kCores * chunk + core % kCores) * arranged_tokens + first_token + token));
      }
    }
  };

  // ---- What is multiplied: a round later.
  const u32 first_row = warp % kRowParts * kWarpRows, warp_token = warp / kRowParts * kWarpTokens;
  TokenSums sums;
  sums.clear();
  // Sums of a block of rows go to global memory, from where the last one to arrive takes all parts: also where there is one part, so that
  // registers are free of sums when results are written.
  auto finish = [&](u32 row_block) {
    // Nothing of this is computed before the loops, where it would take registers.
    const u32 thread = computed_anew(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
    const u32 first_row = warp % kRowParts * kWarpRows, warp_token = warp / kRowParts * kWarpTokens;
    const u32 first_unit = row_block * pairs, first_worker = runs.worker_of(first_unit);
    const u32 parts = runs.worker_of(first_unit + pairs - 1) - first_worker + 1;
    // A run has at most two blocks of rows in part: number 0 is the one that it begins with.
    auto part_of = [&](u32 worker) {
      const u32 which = runs.begin(worker) / pairs == row_block ? 0 : 1;
      return partials + (static_cast<u64>(blockIdx.y * 2 * gridDim.x + 2 * worker + which) * kWarps + warp) * (TokenSums::kBytes / 4);
    };
    sums.store_global(part_of(blockIdx.x), lane);
    if (parts > 1) {
      __syncwarp();
      u32* semaphore = semaphores + (blockIdx.y * ceil_div(rows, kBlockRows) + row_block) * kWarps + warp;
      u32 before = 0;
      if (lane == 0) {
        fence_device();
        before = atomicAdd(semaphore, 1u);
        if (before + 1 == parts) {
          fence_device();
          atomicExch(semaphore, 0u);
        }
      }
      __syncwarp();
      if (__shfl_sync(kAllLanes, before, 0) + 1 < parts) return;
    }
#pragma unroll 1
    for (u32 sixteen = 0; sixteen < kSixteens; ++sixteen) {
      typedef Sums<4 * kEights> SixteenRows;
      SixteenRows total;
      total.clear();
#pragma unroll 1
      for (u32 batch = 0; batch < parts; batch += kPartsAhead) {
        SixteenRows of_parts[kPartsAhead];
#pragma unroll
        for (u32 i = 0; i < kPartsAhead; ++i) {
          of_parts[i].clear();
          if (batch + i < parts) of_parts[i].load_global(part_of(first_worker + batch + i) + sixteen * (SixteenRows::kBytes / 4), lane);
        }
#pragma unroll
        for (u32 i = 0; i < kPartsAhead; ++i) total.add(of_parts[i]);
      }
#pragma unroll
      for (u32 r = 0; r < 2; ++r) {
        const u32 row = row_block * kBlockRows + first_row + 16 * sixteen + 8 * r + lane / 4;
        if (row >= rows) continue;
        const float scale = scales[row * scale_stride];
        const float offset = bias != nullptr ? load_activation(bias, row) : 0.0f;
#pragma unroll
        for (u32 i = 0; i < 2 * kEights; ++i) {
          const u32 token = first_token + warp_token + i / 2 * 8 + lane % 4 * 2 + i % 2;
          if (token >= tokens) continue;
          float result = total.of[fragment(0, i / 2) + 2 * r + i % 2] * kF16UnitInverse;
          if (token_scales != nullptr) result *= __ldg(token_scales + token);
          result *= scale;
          if (bias != nullptr) result += offset;
          store_result(y, static_cast<u64>(token) * rows + row, result);
        }
      }
    }
  };
  // What is to be known of a round when it is multiplied, which each warp puts down in shared memory: a block of rows, whether this is its last
  // round here, for how many teams there is a chunk.
  auto round_of_decoded = [&] {
    const u32 has_second = chunk_of(decoded.pair, 1, decoded_chunk) < chunks;
    const u32 is_last = decoded_chunk + 1 == rounds_of(decoded.pair) && (decoded.pair + 1 == pairs || units == 1);
    return decoded.row_block << 2 | is_last << 1 | has_second;
  };
  auto multiply = [&](u32 round) {
    const u32 which = load_shared_u32(shared.round(warp, round));
#pragma unroll 1
    for (u32 of_team = 0; of_team < 1 + (which & 1); ++of_team) {
      const u32 weights = shared.weights(round, of_team) + (kElementBytes == 1 ? 32 : 16) * first_row;
      multiply_chunk(weights, shared.activations(round, of_team) + 16 * warp_token, lane, sums);
    }
    if (which & 2) {
      finish(which >> 2);
      sums.clear();
    }
  };

  if (!kSeveralTables && tables != nullptr) copy_table(tables, shared.table(0), threadIdx.x, kThreads);  // null if no tile has words
  if constexpr (kSeveralTables) store_shared_u32(shared.table_in_place(warp), ~0u);
  copy_entry(decoded, units);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  copy_start();
  copy_async_commit();
  for (u32 round = 0;; ++round) {
    const bool decodes = units > 0;
    if (decodes) {
      store_shared_u32(shared.round(warp, round), round_of_decoded());
      copy_activations(round);
    }
    copy_async_commit();
#pragma unroll 1
    for (u32 turn = 0; turn < kTeams; ++turn) {
      if (turn == team) {
        if (round > 0) multiply(round - 1);
      } else if (decodes) {
        decode(round);
      }
    }
    if (!decodes) break;
    copy_async_commit();
    copy_async_wait<1>();  // not for what the next unit starts from
    __syncthreads();
  }
}
