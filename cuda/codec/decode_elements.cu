// Coded groups → their elements as FORMAT.md §4 counts them, predictors undone: of any number of blobs of one layout in one launch.
//
// Meant for long lanes and many tables, as blobs of snapshots have them (§9.6). All words of a group of long lanes would fill the shared
// memory of a few warps, so each lane has a ring of 128 bytes, and asks for its words 16 bytes at a time, a chunk ahead. A block's
// groups have one table, which it makes in shared memory from the frequencies.
//
// Shared memory: table (16 KiB) | starts and frequencies of symbols (1 KiB) | a ring for each lane | rows to be written, for each warp.
#include "codec/tile.cuh"

static_assert(KVPACK_ELEMENT_BITS <= 16, "snapshots have no wider elements");
#if KVPACK_ELEMENT_BITS > 8
typedef u16 Element;
#else
typedef u8 Element;
#endif

constexpr bool kPredicted = KVPACK_PREDICTED != 0 && kElementBits <= 8;
constexpr u32 kRingBytes = 128;
// The most words that a chunk's steps read, and one that is kept ahead.
constexpr u32 kChunkBytes = 2 * ceil_div(kStepsPerChunk * KVPACK_PROBABILITY_BITS, 16);
// What a chunk reads must have come when it begins, so be under way when the one before it does.
constexpr u32 kAheadBytes = 2 * kChunkBytes + 2;
static_assert(kAheadBytes + 15 <= kRingBytes, "what is asked for must not overwrite what is not read yet");
// Elements go to memory 64 bytes of a row at a time, since 32 rows at once cost as many cycles whatever is written of them. Behind each row lie
// 16 bytes, so that eight lanes that store 16 bytes each meet eight different groups of banks.
constexpr u32 kRowBytes = 64;
constexpr u32 kRowStrideBytes = kRowBytes + 16;
constexpr u32 kRowChunks = kRowBytes / (kChunkCols * sizeof(Element));

// A lane's decoder, as Lane, whose words come from memory through a ring.
struct RingLane {
  u32 state;
  u32 word;          // the next one
  u32 word_at;       // where that is, in bytes from `source`
  u32 filled, limit; // up to where the ring has been asked to be filled, and will be: bytes from `source`
  u32 ring;          // in shared memory, a multiple of its size
  const u8* source;  // a multiple of 16, up to a ring's bytes in front of the lane's words

  __device__ __forceinline__ void refill() { refill_state_of_ring(state, word_at, word, ring); }

  // Asks for up to `units` times 16 bytes.
  template <u32 units>
  __device__ __forceinline__ void fill() {
#pragma unroll
    for (u32 unit = 0; unit < units; ++unit) {
      if (filled < min(limit, word_at + kAheadBytes)) {
        copy_async_16(ring | (filled & (kRingBytes - 1)), source + filled);
        filled += 16;
      }
    }
    copy_async_commit();
  }

  // Called by all lanes of a group in mode rans; returns where in bytes from `source` the lane's words end;
  // nowhere if those of all lanes are not the group's.
  __device__ __forceinline__ u32 begin(const Group& group, const LaneStart& start, u32 lane) {
    u32 sum = start.num_words;
#pragma unroll
    for (u32 distance = 1; distance < kLanes; distance *= 2) {
      const u32 before = __shfl_up_sync(kAllLanes, sum, distance);
      if (lane >= distance) sum += before;
    }
    // Damaged lengths must not lead out of the group's words.
    const u32 first = min(sum - start.num_words, group.num_words), end = min(sum, group.num_words);
    // Lanes of much and even information keep pace with each other: their rings begin at different groups of banks.
    const u32 turn = 16 * (lane % (kRingBytes / 16));
    const u32 byte = 2 * (group.first_word + first), lead = turn + (byte & 15);
    state = start.state;
    source = group.tile + byte - lead;
    word_at = lead;
    limit = lead + 2 * (end - first);
    filled = turn;
    fill<ceil_div(kAheadBytes + 15, 16)>();
    copy_async_wait<0>();
    word = load_shared_u16(ring | (word_at & (kRingBytes - 1)));
    const bool whole = __shfl_sync(kAllLanes, sum, kLanes - 1) == group.num_words;
    return whole ? lead + 2 * start.num_words : ~0u;
  }
};

// A unit of work, 32 bytes:
//
//   u32 0–3   the group's entry in the group table, its tile's first byte counted from `data`
//   u32 4, 5  where its first row's first column goes among the output's elements
//   u32 6     elements from one row to the next
//   u32 7     bits 0–8 rows of the tile     9–11 the group in it     12–23 columns of the tile     24, 25 bytes of a lane's length
struct Work {
  Place place;
  u64 first_element;
  u32 row_stride;
  u32 length_bytes;

  __device__ __forceinline__ explicit Work(uint4 v) {
    first_element = v.x | static_cast<u64>(v.y) << 32;
    row_stride = v.z;
    place.tile_rows = v.w & 511;
    place.group = v.w >> 9 & 7;
    place.tile_cols = v.w >> 12 & 4095;
    place.first_col = 0;
    length_bytes = v.w >> 24;
  }
  __device__ __forceinline__ u32 rows() const { return min(place.tile_rows - place.group * kLanes, kLanes); }
};

// The rows of a group, a lane each.
struct RowWriter {
  Element* row;      // the lane's, where the chunk begins
  u32 cols;          // that the chunk has of it: 0 in a lane of padding
  bool staged;       // rows are multiples of 16 bytes, at such addresses: they are written from shared memory
  u32 stage;         // the warp's rows there
  u32 own;           // where the lane's part of the chunk begins in them
  u32 kept[kSlotsKept];

  template <u32 k>
  __device__ __forceinline__ void slot(u32 elements) {
    kept[k % kSlotsKept] = elements;
    if constexpr (kSlotsKept == 4 && k % 4 == 3) put<k / 4>();
    if constexpr (kSlotsKept == 8 && k == 7) {
      put<0>();
      put<1>();
    }
  }
  // 16 columns of narrow elements.
  template <u32 half>
  __device__ __forceinline__ void put() {
    u32 columns[4];
    order_columns<half>(kept, columns);
    if (staged) {
      store_shared_v4(own + 16 * half, make_uint4(columns[0], columns[1], columns[2], columns[3]));
      return;
    }
#pragma unroll
    for (u32 i = 0; i < 16; ++i) {
      if (16 * half + i < cols) row[16 * half + i] = static_cast<Element>(columns[i / 4] >> 8 * (i % 4));
    }
  }

  // Elements of 16 bits, the four columns of a slot.
  template <u32 k = 0>
  __device__ __forceinline__ void put_wide(const KeepSlots& codes, const RawChunk& raw) {
    if constexpr (k < kSlots) {
      const u32 four[4] = {wide_element<k, 0>(codes, raw), wide_element<k, 1>(codes, raw), wide_element<k, 2>(codes, raw),
                           wide_element<k, 3>(codes, raw)};
      if (staged) {
        store_shared_v2(own + 8 * k, make_uint2(four[0] | four[1] << 16, four[2] | four[3] << 16));
      } else {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
          if (4 * k + i < cols) row[4 * k + i] = static_cast<Element>(four[i]);
        }
      }
      put_wide<k + 1>(codes, raw);
    }
  }

  // A chunk of a tile in mode raw whose rows have whole chunks: as many words as an element has bits.
  __device__ __forceinline__ void put_raw(const u32* words) {
    constexpr u32 each = 4 / sizeof(Element), width = 8 * sizeof(Element);
    u32 w[kElementBits + 1];
    w[kElementBits] = 0;
#pragma unroll
    for (u32 i = 0; i < kElementBits; ++i) w[i] = cols > 0 ? load_once_u32(words + i) : 0;
#pragma unroll
    for (u32 unit = 0; unit < kChunkCols / (4 * each); ++unit) {
      u32 four[4];
#pragma unroll
      for (u32 i = 0; i < 4; ++i) {
        four[i] = 0;
#pragma unroll
        for (u32 k = 0; k < each; ++k) {
          const u32 bit = ((unit * 4 + i) * each + k) * kElementBits;
          four[i] |= (__funnelshift_r(w[bit / 32], w[bit / 32 + 1], bit % 32) & kElementMask) << width * k;
        }
      }
      store_shared_v4(own + 16 * unit, make_uint4(four[0], four[1], four[2], four[3]));
    }
  }

  __device__ __forceinline__ void begin_chunk(u32 chunk, u32 lane) {
    own = stage + kRowStrideBytes * lane + chunk % kRowChunks * (kChunkCols * sizeof(Element));
  }
  // Writes what is staged once rows are full; `first`: row 0 of the group; `bytes`: of a row.
  __device__ __forceinline__ void end_chunk(u32 chunk, u32 chunks, Element* first, u32 stride, u32 rows, u32 bytes, u32 lane) {
    if (!staged || (chunk % kRowChunks != kRowChunks - 1 && chunk + 1 != chunks)) return;
    const u32 begin = chunk / kRowChunks * kRowBytes;
    __syncwarp();
#pragma unroll
    for (u32 i = 0; i < kRowBytes / 16; ++i) {
      const u32 unit = i * kLanes + lane, of_row = unit / (kRowBytes / 16), at = 16 * (unit % (kRowBytes / 16));
      if (of_row < rows && begin + at < bytes) {
        u8* to = reinterpret_cast<u8*>(first + static_cast<u64>(of_row) * stride) + begin + at;
        *reinterpret_cast<uint4*>(to) = load_shared_v4(stage + kRowStrideBytes * of_row + at);
      }
    }
    __syncwarp();
  }
};

// The decoder's table (4096 entries) from frequencies u16 [256]; visible to all of the block when it returns.
__device__ __forceinline__ void make_table(const u16* frequencies, u32 table, u32 starts) {
  constexpr u32 each = KVPACK_NUM_SYMBOLS / kLanes;
  const u32 thread = threadIdx.x, lane = thread % kLanes, warp = thread / kLanes, warps = blockDim.x / kLanes;
  if (warp == 0) {
    u32 own[each], sum = 0;
#pragma unroll
    for (u32 i = 0; i < each; ++i) {
      own[i] = frequencies[each * lane + i];
      sum += own[i];
    }
    u32 all = sum;
#pragma unroll
    for (u32 distance = 1; distance < kLanes; distance *= 2) {
      const u32 before = __shfl_up_sync(kAllLanes, all, distance);
      if (lane >= distance) all += before;
    }
    u32 start = all - sum;
#pragma unroll
    for (u32 i = 0; i < each; ++i) {
      store_shared_u32(starts + 4 * (each * lane + i), start | own[i] << 16);
      start += own[i];
    }
  }
  __syncthreads();
  for (u32 symbol = warp; symbol < KVPACK_NUM_SYMBOLS; symbol += warps) {
    const u32 both = load_shared_u32(starts + 4 * symbol), start = both & 0xFFFF, frequency = both >> 16;
    for (u32 slot = lane; slot < frequency; slot += kLanes) {
      store_shared_u32(table + 4 * (start + slot), frequency << 20 | slot << 8 | symbol);
    }
  }
  __syncthreads();
}

// data: where the units' entries count from; readable up to 16 bytes behind the last blob.
// units: uint4 [n, 2], see Work. blocks: uint4 [gridDim.x]: a table, or ~0 if none is needed; the block's first unit, and the one behind
// its last: a warp takes a unit. frequencies: u16 [tables, 256]; each sums to 4096.
// status: u32 [2], see report_damage; the index is the unit's.
extern "C" __global__ void __launch_bounds__(KVPACK_MAX_WARPS * kLanes, KVPACK_BLOCKS_PER_SM)
decode_elements(const u8* data, const uint4* units, const uint4* blocks, const u16* frequencies, Element* out, u32* status) {
  KVPACK_DYNAMIC_SHARED(shared);
  const u32 lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const u32 table = shared_address(shared), starts = table + 4 * kTableSlots, rings = starts + 4 * KVPACK_NUM_SYMBOLS;
  const u32 stages = rings + kRingBytes * KVPACK_MAX_WARPS * kLanes;
  const uint4 block = __ldg(blocks + blockIdx.x);
  if (block.x != ~0u) make_table(frequencies + static_cast<u64>(block.x) * KVPACK_NUM_SYMBOLS, table, starts);
  const u32 index = block.y + warp;
  if (index >= block.z) return;
  const Group group = unpack_group(data, __ldg(units + 2 * index));
  const Work work(__ldg(units + 2 * index + 1));
  const Place& place = work.place;
  const bool inside = lane < work.rows();

  RowWriter writer;
  Element* const first = out + work.first_element;
  writer.row = first + static_cast<u64>(lane) * work.row_stride;
  writer.stage = stages + kRowStrideBytes * kLanes * warp;
  const bool raw_in_words = group.mode == KVPACK_MODE_RAW && place.tile_cols % kChunkCols == 0;
  writer.staged = (reinterpret_cast<u64>(first) | work.row_stride * sizeof(Element) | place.tile_cols * sizeof(Element)) % 16 == 0 &&
                  (group.mode != KVPACK_MODE_RAW || raw_in_words);
  const u32 planes = raw_planes_unit(group, place);
  const u32 raw_mode_row = place.group * kLanes + lane;

  RingLane decoder;
  decoder.ring = rings + kRingBytes * threadIdx.x;
  u32 end = 0, previous = 0, symbol = 0;
  if (group.mode == KVPACK_MODE_RANS) end = decoder.begin(group, load_lane_start(group, place, work.length_bytes, lane), lane);
  if (group.mode == KVPACK_MODE_CONSTANT) symbol = __ldg(reinterpret_cast<const u32*>(group.tile)) & 0xFF;

  RawChunk next;
  if (raw_chunks(group, place) > 0) load_raw(chunk_planes(data, planes, 0), lane, next);
#pragma unroll 1
  for (u32 chunk = 0; chunk < place.chunks(); ++chunk) {
    const RawChunk raw = next;
    if (chunk + 1 < raw_chunks(group, place)) load_raw(chunk_planes(data, planes, chunk + 1), lane, next);
    writer.cols = inside ? min(place.tile_cols - chunk * kChunkCols, kChunkCols) : 0;
    writer.begin_chunk(chunk, lane);
    if (group.mode == KVPACK_MODE_RANS) {
      decoder.fill<ceil_div(kChunkBytes, 16)>();
      copy_async_wait<1>();
      if constexpr (kElementBits > 8 || kPredicted) {
        KeepSlots kept;
        decode_chunk(decoder, table, raw, kept);
        if constexpr (kElementBits > 8) {
          writer.put_wide(kept, raw);
        } else {
          if (group.predictor != 0) undo_predictor(kept, chunk == 0, previous);
          emit_kept(kept, writer);
        }
      } else {
        decode_chunk(decoder, table, raw, writer);
      }
    } else if (raw_in_words && writer.staged) {
      const u32 before = raw_mode_row * (place.tile_cols / kChunkCols) + chunk;
      writer.put_raw(reinterpret_cast<const u32*>(group.tile) + before * kElementBits);
    } else if (group.mode == KVPACK_MODE_RAW) {
      for (u32 i = 0; i < writer.cols; ++i) {
        writer.row[i] = static_cast<Element>(raw_mode_element(group, place, raw_mode_row, chunk * kChunkCols + i));
      }
    } else if constexpr (kElementBits > 8) {
      KeepSlots kept;
      constant_chunk(symbol, raw, kept);
      writer.put_wide(kept, raw);
    } else {
      constant_chunk(symbol, raw, writer);
    }
    writer.end_chunk(chunk, place.chunks(), first, work.row_stride, work.rows(), place.tile_cols * sizeof(Element), lane);
    writer.row += kChunkCols;
  }
  if (group.mode == KVPACK_MODE_RANS && inside && (decoder.state != KVPACK_STATE_LOW || decoder.word_at != end)) {
    report_damage(status, index);
  }
}
