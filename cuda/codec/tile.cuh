// Tiles of a blob (docs/FORMAT.md §7) as warps read them: a warp takes a group, a lane takes a row.
//
// The group table is the runtime's own index (kvpack/runtime/weights/device_blob.py builds and checks it): 16 bytes for each group of
// each tile, in the order matrix, group of rows, tile column, so that a warp that walks along its rows reads it in order.
//
//   u32 0   tile's first byte, from the blob's, in units of 16 bytes
//   u32 1   bits 0–18   group's first word, from the tile's first byte, in words
//           bits 19–20  mode      bit 21 predictor      bits 22–25 table
//           bits 26–29  number of outliers, its high bits
//   u32 2   bits 0–15   number of words
//           bits 16–31  raw_offset in units of 16 bytes
//   u32 3   bits 0–18   group's first outlier among the tile's
//           bits 19–31  number of outliers, its low bits
#pragma once

#include "common/common.cuh"

constexpr u32 kCodeBits = KVPACK_CODE_BITS;
constexpr u32 kCodesPerSymbol = KVPACK_CODES_PER_SYMBOL;
constexpr u32 kRawBits = KVPACK_RAW_BITS;
constexpr u32 kElementBits = KVPACK_ELEMENT_BITS;
constexpr bool kFolded = KVPACK_FOLDED != 0;
constexpr u32 kNarrowRawBits = kRawBits & 7;  // of the planes of 4, 2 and 1 bits
constexpr u32 kWidePlanes = kRawBits >> 3;
constexpr u32 kStepsPerChunk = kChunkCols / kCodesPerSymbol;
constexpr u32 kSlots = kChunkCols / 4;
constexpr u32 kBytes = 0x01010101u;
constexpr u32 kRawRegisters = kRawBits == 0 ? 1 : kRawBits;  // u32 of one lane and chunk
constexpr u32 kRawChunkBytes = 4 * kRawBits * kLanes;        // of a group
constexpr u32 kElementMask = kElementBits == 32 ? 0xFFFFFFFFu : (1u << (kElementBits & 31)) - 1;
// Integers of a trellis have two bits more than their elements: the grid, and 1 (§4.1).
constexpr bool kTrellis = KVPACK_TRELLIS != 0;
constexpr u32 kExtraBits = kTrellis ? KVPACK_TRELLIS_EXTRA_BITS : 0;
constexpr u32 kIntegerBits = kElementBits + kExtraBits;
constexpr u32 kHalf = 1u << (kIntegerBits - 1);
constexpr bool kSigned = KVPACK_ELEMENT_KIND == KVPACK_KIND_SIGNED;

struct Group {
  u32 tile_unit;  // where the tile begins, in units of 16 bytes from the blob's first byte
  const u8* tile;
  u32 first_word;
  u32 num_words;
  u32 raw_offset;
  u32 mode;
  u32 predictor;
  u32 table;
  u32 first_outlier;
  u32 num_outliers;
};

__device__ __forceinline__ Group unpack_group(const u8* blob, uint4 entry) {
  Group group;
  group.tile_unit = entry.x;
  group.tile = blob + 16ull * entry.x;
  group.first_word = entry.y & 0x7FFFF;
  group.mode = (entry.y >> 19) & 3;
  group.predictor = (entry.y >> 21) & 1;
  group.table = (entry.y >> 22) & 15;
  group.num_words = entry.z & 0xFFFF;
  group.raw_offset = 16 * (entry.z >> 16);
  group.first_outlier = entry.w & 0x7FFFF;
  group.num_outliers = (entry.y >> 26) << 13 | entry.w >> 19;
  return group;
}

// A group's place: rows and columns that are not padding, in its tile and in the matrix.
struct Place {
  u32 group;      // in the tile
  u32 tile_rows;  // R
  u32 tile_cols;  // K
  u32 first_col;  // of the tile in the matrix

  __device__ __forceinline__ u32 lanes() const { return align_up(tile_rows, kLanes); }
  __device__ __forceinline__ u32 chunks() const { return ceil_div(tile_cols, kChunkCols); }
};

__device__ __forceinline__ Place place_of(u32 row_group, u32 tile_col, u32 rows, u32 cols, u32 tile_cols) {
  Place place;
  u32 tile_row = row_group / kGroupsPerTile;
  place.group = row_group % kGroupsPerTile;
  place.tile_rows = min(rows - tile_row * KVPACK_TILE_ROWS, static_cast<u32>(KVPACK_TILE_ROWS));
  place.first_col = tile_col * tile_cols;
  place.tile_cols = min(cols - place.first_col, tile_cols);
  return place;
}

// ------------------------------------------------------------------------------------------------------------ lanes
// A lane's decoder. The next word is always in a register already, off the chain from one state to the next.
struct Lane {
  u32 state;
  u32 word_address;  // in shared memory, of `word`
  u32 word;

  __device__ __forceinline__ void refill() { refill_state(state, word_address, word); }
};

// What a lane starts from; loaded while the tile before is decoded.
struct LaneStart {
  u32 state;
  u32 num_words;
};

__device__ __forceinline__ LaneStart load_lane_start(const Group& group, const Place& place, u32 length_bytes, u32 lane) {
  LaneStart start{KVPACK_STATE_LOW, 0};
  if (group.mode == KVPACK_MODE_RANS) {
    u32 in_tile = place.group * kLanes + lane;
    const u8* states = group.tile + kGroupOffsetsBytes;
    const u8* lengths = states + 4 * place.lanes();
    start.state = load_once_u32(states + 4 * in_tile);
    start.num_words = length_bytes == 1 ? lengths[in_tile] : reinterpret_cast<const u16*>(lengths)[in_tile];
  }
  return start;
}

// What a warp begins its next unit with, in shared memory until then: in registers it would take room from the loop over chunks.
//
//   entry of the group, 16 bytes | states of its lanes, 4 bytes each | their lengths, 1 or 2 bytes each
struct NextUnit {
  u32 address;
  static constexpr u32 kStates = 16, kLengths = kStates + 4 * kLanes, kBytes = kLengths + 2 * kLanes;

  // Called by all lanes, once all have read what was here before; states and lengths are there after copy_async_wait.
  __device__ __forceinline__ void put(uint4 entry, const Group& group, const Place& place, u32 length_bytes, u32 lane) const {
    if (lane == 0) store_shared_v4(address, entry);
    if (group.mode != KVPACK_MODE_RANS) return;
    constexpr u32 units = 4 * kLanes / 16;
    const u32 in_tile = place.group * kLanes, unit = lane % units;
    const u8* states = group.tile + kGroupOffsetsBytes;
    const u8* lengths = states + 4 * place.lanes();
    if (lane < units) copy_async_16(address + kStates + 16 * unit, states + 4 * in_tile + 16 * unit);
    if (lane >= units && lane < units + 2 * length_bytes) {
      copy_async_16(address + kLengths + 16 * unit, lengths + length_bytes * in_tile + 16 * unit);
    }
  }
  __device__ __forceinline__ uint4 entry() const { return load_shared_v4(address); }
  __device__ __forceinline__ LaneStart start(u32 length_bytes, u32 lane) const {
    const u32 lengths = address + kLengths;
    return {load_shared_u32(address + kStates + 4 * lane),
            length_bytes == 1 ? load_shared_u8(lengths + lane) : load_shared_u16(lengths + 2 * lane)};
  }
};

// The group's words begin anywhere; they are copied from the multiple of 16 bytes before them.
__device__ __forceinline__ u32 words_lead_bytes(const Group& group) { return (2 * group.first_word) & 15; }

__device__ __forceinline__ void copy_words(const Group& group, u32 buffer, u32 lane) {
  u32 lead = words_lead_bytes(group);
  const u8* source = group.tile + 2 * group.first_word - lead;
  u32 units = group.mode == KVPACK_MODE_RANS ? ceil_div(lead + 2 * group.num_words, 16) : 0;
  for (u32 unit = lane; unit < units; unit += kLanes) copy_async_16(buffer + 16 * unit, source + 16 * unit);
}

// Lanes' words follow each other, so that a lane's first one is at the sum of the lengths before it. A damaged length must not
// lead out of the buffer: it holds the group's words and, behind them, as many bytes as a lane can read too many.
__device__ __forceinline__ Lane start_lane(const Group& group, const LaneStart& start, u32 buffer, u32 lane,
                                           u32& end_address) {
  u32 sum = start.num_words;
#pragma unroll
  for (u32 distance = 1; distance < kLanes; distance *= 2) {
    u32 before = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += before;
  }
  u32 first = buffer + words_lead_bytes(group);
  end_address = first + 2 * sum;
  Lane decoder;
  decoder.state = start.state;
  decoder.word_address = first + 2 * min(sum - start.num_words, group.num_words);
  decoder.word = load_shared_u16(decoder.word_address);
  return decoder;
}

// One step (§5.2) of a Lane, or of what has its words elsewhere: returns the table's entry, whose lowest byte is the symbol.
template <class Decoder>
__device__ __forceinline__ u32 decode_step(Decoder& decoder, u32 table) {
  u32 entry = load_shared_u32(table + 4 * (decoder.state & (kTableSlots - 1)));
  decoder.state = (entry >> 20) * (decoder.state >> KVPACK_PROBABILITY_BITS) + ((entry >> 8) & (kTableSlots - 1));
  decoder.refill();
  return entry;
}

// Four steps; their symbols in the bytes of a register.
template <class Decoder>
__device__ __forceinline__ u32 decode_four(Decoder& decoder, u32 table) {
  u32 e0 = decode_step(decoder, table);
  u32 e1 = decode_step(decoder, table);
  u32 e01 = __byte_perm(e0, e1, 0x0040);
  u32 e2 = decode_step(decoder, table);
  u32 e3 = decode_step(decoder, table);
  u32 e23 = __byte_perm(e2, e3, 0x0040);
  return __byte_perm(e01, e23, 0x5410);
}

// ------------------------------------------------------------------------------------------------------------ chunks
// Raw planes of one lane and chunk (§7.4), as they lie in the file.
struct RawChunk {
  u32 words[kRawRegisters];
};

// Where a group's planes begin: in units of 16 bytes from the blob's first byte, since an address takes two registers.
__device__ __forceinline__ u32 raw_planes_unit(const Group& group, const Place& place) {
  return group.tile_unit + (group.raw_offset + place.group * place.chunks() * kRawChunkBytes) / 16;
}

// How many chunks of a group have planes to be loaded.
__device__ __forceinline__ u32 raw_chunks(const Group& group, const Place& place) {
  return kRawBits == 0 || group.mode == KVPACK_MODE_RAW ? 0 : place.chunks();
}

// Where the planes of a group and chunk are: in memory, or copied to shared memory.
struct PlanesInMemory {
  const u8* planes;
  __device__ __forceinline__ uint4 four(u32 offset) const { return load_once_v4(planes + offset); }
  __device__ __forceinline__ uint2 two(u32 offset) const { return load_once_v2(planes + offset); }
  __device__ __forceinline__ u32 one(u32 offset) const { return load_once_u32(planes + offset); }
};
struct PlanesInShared {
  u32 address;
  __device__ __forceinline__ uint4 four(u32 offset) const { return load_shared_v4(address + offset); }
  __device__ __forceinline__ uint2 two(u32 offset) const { return load_shared_v2(address + offset); }
  __device__ __forceinline__ u32 one(u32 offset) const { return load_shared_u32(address + offset); }
};

template <class Planes>
__device__ __forceinline__ void load_raw(const Planes& planes, u32 lane, RawChunk& raw) {
  if constexpr (kWidePlanes > 0) {
    constexpr u32 units = 2 * kWidePlanes;
#pragma unroll
    for (u32 unit = 0; unit != units; ++unit) {
      uint4 v = planes.four(unit * 16 * kLanes + 16 * lane);
      raw.words[4 * unit] = v.x;
      raw.words[4 * unit + 1] = v.y;
      raw.words[4 * unit + 2] = v.z;
      raw.words[4 * unit + 3] = v.w;
    }
  }
  constexpr u32 wide = 8 * kWidePlanes;  // registers so far
  if constexpr ((kNarrowRawBits & 4) != 0) {
    uint4 v = planes.four(4 * kLanes * wide + 16 * lane);
    raw.words[wide] = v.x;
    raw.words[wide + 1] = v.y;
    raw.words[wide + 2] = v.z;
    raw.words[wide + 3] = v.w;
  }
  if constexpr ((kNarrowRawBits & 2) != 0) {
    constexpr u32 at = wide + (kNarrowRawBits & 4);
    uint2 v = planes.two(4 * kLanes * at + 8 * lane);
    raw.words[at] = v.x;
    raw.words[at + 1] = v.y;
  }
  if constexpr ((kNarrowRawBits & 1) != 0) {
    constexpr u32 at = wide + (kNarrowRawBits & 6);
    raw.words[at] = planes.one(4 * kLanes * at + 4 * lane);
  }
}
__device__ __forceinline__ void load_raw(const u8* planes, u32 lane, RawChunk& raw) { load_raw(PlanesInMemory{planes}, lane, raw); }

__device__ __forceinline__ const u8* chunk_planes(const u8* blob, u32 planes, u32 chunk) {
  return blob + 16ull * (planes + chunk * (kRawChunkBytes / 16));
}

// Raw planes on their way from memory to registers: those of two chunks of a warp's run of groups, so that a load has the time
// of a whole chunk. Planes that have been used are replaced by those two chunks on, be they the next group's.
struct RawStream {
  RawChunk even, odd;
  bool stale;  // what is here is not the group's: the one before had a single chunk, or there were no planes to load

  __device__ __forceinline__ void begin(const u8* blob, u32 planes, u32 chunks, u32 lane) {
    if (chunks > 0) load_raw(chunk_planes(blob, planes, 0), lane, even);
    if (chunks > 1) load_raw(chunk_planes(blob, planes, 1), lane, odd);
    stale = chunks == 0;
  }
  // Calls use(chunk, raw) for all chunks of a group whose planes begin at unit `planes`. `next`: those of the group after it, which
  // has `next_chunks` with planes, or none.
  template <class Use>
  __device__ __forceinline__ void each_chunk(const u8* blob, u32 planes, u32 chunks, u32 next, u32 next_chunks, u32 lane, Use&& use) {
    const u32 behind = next - chunks * (kRawChunkBytes / 16);
    auto load = [&](u32 chunk, RawChunk& raw) {
      if (chunk < chunks + next_chunks) load_raw(chunk_planes(blob, chunk < chunks ? planes : behind, chunk), lane, raw);
    };
    if (stale) begin(blob, planes, chunks, lane);
#pragma unroll 1
    for (u32 chunk = 0; chunk < chunks; chunk += 2) {
      use(chunk, even);
      if (chunk + 1 == chunks) {
        even = odd;
        load(chunk + 2, odd);
        break;
      }
      load(chunk + 2, even);
      use(chunk + 1, odd);
      load(chunk + 3, odd);
    }
    stale = chunks == 1 || next_chunks == 0;
  }
};

// Moves bits up by `shift`, or down if it is negative.
template <int shift>
__device__ __forceinline__ u32 shifted(u32 value) {
  if constexpr (shift >= 0) return value << shift;
  return value >> (shift < 0 ? -shift : 0);
}

// Of rows above the lane's: the xor of every other one's, from the next on (§4.1).
__device__ __forceinline__ u32 grids_of(u32 parities) {
  static_assert(kLanes == 32, "the distances");
  u32 grids = of_lane_before<1>(parities);
  xor_of_lane_before<2>(grids);
  xor_of_lane_before<4>(grids);
  xor_of_lane_before<8>(grids);
  xor_of_lane_before<16>(grids);
  return grids;
}

// Grids of a lane's elements of a chunk, packed: those of slot k in bits grid_place(k) of the bytes. The parities are the lowest raw bits, in
// each u32 of the narrowest plane.
constexpr u32 kLowestPlane = (kRawBits & 1) != 0 ? 1 : (kRawBits & 2) != 0 ? 2 : 4;
__device__ __forceinline__ constexpr u32 grid_place(u32 slot) { return slot * kLowestPlane % 8 + slot * kLowestPlane / 8; }
__device__ __forceinline__ u32 chunk_grids(const RawChunk& raw) {
  u32 parities = 0;
  if constexpr (kTrellis) {
    constexpr u32 every = kLowestPlane == 1 ? 0xFFFFFFFFu : kLowestPlane == 2 ? 0x55555555u : 0x11111111u;
#pragma unroll
    for (u32 i = 0; i < kLowestPlane; ++i) parities |= (raw.words[kRawBits - kLowestPlane + i] & every) << i;
    return grids_of(parities);
  }
  return parities;
}

// Bits of the narrow planes of slot k, one byte an element.
template <u32 slot>
__device__ __forceinline__ u32 narrow_bits(const RawChunk& raw) {
  u32 bits = 0;
  constexpr u32 wide = 8 * kWidePlanes;
  if constexpr ((kNarrowRawBits & 4) != 0) {
    constexpr u32 to = (kNarrowRawBits & 3) + kExtraBits;
    bits |= shifted<static_cast<int>(to) - static_cast<int>(slot * 4 % 8)>(raw.words[wide + slot * 4 / 8]) &
            (kBytes * (15u << to));
  }
  if constexpr ((kNarrowRawBits & 2) != 0) {
    constexpr u32 at = wide + (kNarrowRawBits & 4), to = (kNarrowRawBits & 1) + kExtraBits;
    bits |= shifted<static_cast<int>(to) - static_cast<int>(slot * 2 % 8)>(raw.words[at + slot * 2 / 8]) &
            (kBytes * (3u << to));
  }
  if constexpr ((kNarrowRawBits & 1) != 0) {
    constexpr u32 at = wide + (kNarrowRawBits & 6);
    bits |= shifted<static_cast<int>(kExtraBits) - static_cast<int>(slot)>(raw.words[at]) & (kBytes << kExtraBits);
  }
  return bits;
}

// Four elements whose codes are folded (§4), as unsigned elements: the codes are xor-ed with the highest raw bit, the sign is turned.
// No product of a byte leaves it. Those of a trellis come with their grids, and get their lowest bit.
__device__ __forceinline__ u32 unfold(u32 folded) {
  constexpr u32 top = kBytes << (kRawBits + kExtraBits - 1) % 8, up = 2 * ((1u << kCodeBits) - 1);
  constexpr u32 turned = kBytes * ((kHalf & 0xFF) | (kTrellis ? 1 : 0));
  return folded ^ turned ^ (folded & top) * up;
}

// Shifts down and logic share a pipe that is the busiest of all, shifts up do not. So codes that would be shifted down by different numbers are
// shifted down once, by the most, and then up.
constexpr u32 kElementShift = kElementBits <= 8 ? kRawBits + kExtraBits : 0;
constexpr u32 kHighestCode = kCodeBits * (kCodesPerSymbol - 1);
constexpr u32 kDown = kHighestCode > kElementShift ? kHighestCode - kElementShift : 0;

// Four symbols, and the same shifted down.
struct FourSymbols {
  u32 as_they_are, down;
  __device__ __forceinline__ explicit FourSymbols(u32 symbols) : as_they_are(symbols), down(symbols >> kDown) {
    if constexpr (kDown > 0) forget(down);
  }
};

// Codes number `code` of four symbols, above the raw bits of slot `slot`: four elements of up to 8 bits, or what is said of them in
// `grids` makes of those of a trellis: integers + kHalf.
template <u32 slot, u32 code>
__device__ __forceinline__ u32 join_slot(const FourSymbols& symbols, const RawChunk& raw, u32 grids) {
  constexpr u32 mask = kBytes * (((1u << kCodeBits) - 1) << kElementShift), at = kCodeBits * code;
  u32 codes = shifted<static_cast<int>(kElementShift) - static_cast<int>(at)>(symbols.as_they_are);
  if constexpr (at > kElementShift && at >= kDown) codes = symbols.down << (kElementShift + kDown - at);
  codes &= mask;
  if constexpr (kElementBits <= 8 && kRawBits > 0) codes |= narrow_bits<slot>(raw);
  if constexpr (kTrellis) codes |= shifted<1 - static_cast<int>(grid_place(slot))>(grids) & (kBytes << 1);
  if constexpr (kFolded) {
    forget(codes);  // else the sign is taken from the planes, by a shift down
    codes = unfold(codes);
  }
  return codes;
}

// Calls emit.template operator()<slot>(elements) for the g slots of four symbols.
template <u32 quad, u32 code, class Emit>
__device__ __forceinline__ void emit_quad(const FourSymbols& symbols, const RawChunk& raw, u32 grids, Emit& emit) {
  if constexpr (code < kCodesPerSymbol) {
    emit.template slot<quad * kCodesPerSymbol + code>(join_slot<quad * kCodesPerSymbol + code, code>(symbols, raw, grids));
    emit_quad<quad, code + 1>(symbols, raw, grids, emit);
  }
}

template <u32 quad, class Decoder, class Emit>
__device__ __forceinline__ void decode_quads(Decoder& decoder, u32 table, const RawChunk& raw, u32 grids, Emit& emit) {
  if constexpr (quad < kSlots / kCodesPerSymbol) {
    const FourSymbols symbols(decode_four(decoder, table));
    emit_quad<quad, 0>(symbols, raw, grids, emit);
    decode_quads<quad + 1>(decoder, table, raw, grids, emit);
  }
}

// Decodes one chunk of a rans tile: emit.slot<k>(four elements) for k = 0 … 7. For elements of more than 8 bits these are the
// codes alone. Called by all lanes of a group, as the next two are.
template <class Decoder, class Emit>
__device__ __forceinline__ void decode_chunk(Decoder& decoder, u32 table, const RawChunk& raw, Emit& emit) {
  decode_quads<0>(decoder, table, raw, chunk_grids(raw), emit);
}

template <u32 quad, class Emit>
__device__ __forceinline__ void constant_quads(u32 symbol, const RawChunk& raw, u32 grids, Emit& emit) {
  if constexpr (quad < kSlots / kCodesPerSymbol) {
    emit_quad<quad, 0>(FourSymbols(symbol * kBytes), raw, grids, emit);
    constant_quads<quad + 1>(symbol, raw, grids, emit);
  }
}

// The same for a constant tile.
template <class Emit>
__device__ __forceinline__ void constant_chunk(u32 symbol, const RawChunk& raw, Emit& emit) {
  constant_quads<0>(symbol, raw, chunk_grids(raw), emit);
}

// Where a column of a chunk lies: in which slot, and in which of its bytes (§7.4).
__device__ __forceinline__ constexpr u32 column_slot(u32 col) {
  return kCodesPerSymbol * (col / (4 * kCodesPerSymbol)) + col % kCodesPerSymbol;
}
__device__ __forceinline__ constexpr u32 column_byte(u32 col) { return col / kCodesPerSymbol % 4; }
// Column of a chunk that byte t of slot k holds.
__device__ __forceinline__ constexpr u32 slot_column(u32 slot, u32 byte) {
  return 4 * kCodesPerSymbol * (slot / kCodesPerSymbol) + kCodesPerSymbol * byte + slot % kCodesPerSymbol;
}

// Four slots hold 16 neighbouring columns, or eight slots 32 if g is 8.
constexpr u32 kSlotsKept = kCodesPerSymbol == 8 ? 8 : 4;

// Bytes in the order of the slots → in the order of the columns: 16 columns, of eight slots those of half `half`.
template <u32 half>
__device__ __forceinline__ void order_columns(const u32 (&slots)[kSlotsKept], u32 (&columns)[4]) {
#pragma unroll
  for (u32 i = 0; i < 4; ++i) {
    if constexpr (kCodesPerSymbol == 1) {
      columns[i] = slots[i];
    } else if constexpr (kCodesPerSymbol == 2) {
      columns[i] = __byte_perm(slots[i & 2], slots[i | 1], i % 2 == 0 ? 0x5140 : 0x7362);
    } else {
      const u32 first = kCodesPerSymbol == 8 ? i % 2 * 4 : 0, byte = kCodesPerSymbol == 8 ? 2 * half + i / 2 : i;
      u32 low = __byte_perm(slots[first], slots[first + 1], byte | (4 + byte) << 4);
      u32 high = __byte_perm(slots[first + 2], slots[first + 3], byte | (4 + byte) << 4);
      columns[i] = __byte_perm(low, high, 0x5410);
    }
  }
}

// An element of a tile in mode raw (§7.2). Reads up to 7 bytes behind it.
__device__ __forceinline__ u32 raw_mode_element(const Group& group, const Place& place, u32 row, u32 col) {
  u32 bit = (row * place.tile_cols + col) * kElementBits;
  const u32* words = reinterpret_cast<const u32*>(group.tile) + bit / 32;
  return __funnelshift_r(words[0], words[1], bit & 31) & kElementMask;
}

// Slot `slot` of a chunk of a tile in mode raw, for elements of up to 8 bits; padding is an element of 0.
__device__ __forceinline__ u32 raw_mode_slot(const Group& group, const Place& place, u32 row, u32 chunk, u32 slot) {
  u32 elements = 0;
#pragma unroll
  for (u32 byte = 0; byte < 4; ++byte) {
    u32 col = chunk * kChunkCols + slot_column(slot, byte);
    if (row < place.tile_rows && col < place.tile_cols) {
      elements |= raw_mode_element(group, place, row, col) << (8 * byte);
    }
  }
  if constexpr (kTrellis) return elements << 2 | grids_of(elements & kBytes) << 1 | kBytes;
  return elements;
}

// Decodes the same chunk.
template <class Emit, u32 slot = 0>
__device__ __forceinline__ void raw_mode_chunk(const Group& group, const Place& place, u32 row, u32 chunk, Emit& emit) {
  if constexpr (slot < kSlots) {
    emit.template slot<slot>(raw_mode_slot(group, place, row, chunk, slot));
    raw_mode_chunk<Emit, slot + 1>(group, place, row, chunk, emit);
  }
}

// Keeps the slots of a chunk.
struct KeepSlots {
  u32 slots[kSlots];
  template <u32 k>
  __device__ __forceinline__ void slot(u32 elements) {
    slots[k] = elements;
  }
};

// Passes them on.
template <u32 k = 0, class Emit>
__device__ __forceinline__ void emit_kept(const KeepSlots& kept, Emit& emit) {
  if constexpr (k < kSlots) {
    emit.template slot<k>(kept.slots[k]);
    emit_kept<k + 1>(kept, emit);
  }
}

// Element of 16 or 32 bits in byte `byte` of slot k, put together from its code and planes.
template <u32 k, u32 byte>
__device__ __forceinline__ u32 wide_element(const KeepSlots& codes, const RawChunk& raw) {
  auto byte_of = [](u32 word) { return (word >> (8 * byte)) & 0xFF; };
  u32 element = byte_of(codes.slots[k]) << kRawBits;
#pragma unroll
  for (u32 plane = 0; plane < kWidePlanes; ++plane) element |= byte_of(raw.words[8 * plane + k]) << (kRawBits - 8 * plane - 8);
  if constexpr (kNarrowRawBits > 0) element |= byte_of(narrow_bits<k>(raw));
  return element;
}

// Undoes predictor 1 (§5.3) in a chunk of elements of up to 8 bits; `previous` is the element before it.
__device__ __forceinline__ void undo_predictor(KeepSlots& chunk, bool first_chunk, u32& previous) {
#pragma unroll
  for (u32 col = 0; col < kChunkCols; ++col) {
    const u32 slot = column_slot(col), byte = column_byte(col);
    u32 element = (chunk.slots[slot] >> (8 * byte)) & 0xFF;
    if (!(first_chunk && col == 0)) element = (element + previous - kHalf) & kElementMask;
    previous = element;
    chunk.slots[slot] = (chunk.slots[slot] & ~(0xFFu << (8 * byte))) | (element << (8 * byte));
  }
}

// The outliers of a group (§7.5), sorted by row, then column.
__device__ __forceinline__ const u32* outliers_of(const Group& group, const Place& place) {
  u32 end = group.mode == KVPACK_MODE_RAW ? ceil_div(place.tile_rows * place.tile_cols * kElementBits, 8)
                                          : group.raw_offset + place.lanes() * place.chunks() * 4 * kRawBits;
  return reinterpret_cast<const u32*>(group.tile + align_up(end, 4)) + group.first_outlier;
}
// Bits of delta in a blob whose tiles have up to `tile_cols` columns: what a column leaves.
__device__ __forceinline__ u32 outlier_delta_bits(u32 tile_cols) {
  const u32 needed = 32 - static_cast<u32>(__clz(static_cast<int>(tile_cols - 1)));
  return KVPACK_OUTLIER_ROW_SHIFT - max(needed, static_cast<u32>(KVPACK_OUTLIER_LEAST_COL_BITS));
}
__device__ __forceinline__ u32 outlier_lane(u32 outlier) { return (outlier >> KVPACK_OUTLIER_ROW_SHIFT) % kLanes; }
__device__ __forceinline__ u32 outlier_col(u32 outlier, u32 delta_bits) {
  return (outlier & ((1u << KVPACK_OUTLIER_ROW_SHIFT) - 1)) >> delta_bits;
}
__device__ __forceinline__ int outlier_delta(u32 outlier, u32 delta_bits) {
  return static_cast<int>(outlier << (32 - delta_bits)) >> (32 - delta_bits);
}

// What a kernel saw of damage: [0] number of lanes that did not end as they must, [1] lowest group table index among them plus 1,
// stored as its complement so that atomicMax finds it in memory that starts as 0.
__device__ __forceinline__ void report_damage(u32* status, u32 index) {
  atomicAdd(status, 1u);
  atomicMax(status + 1, ~index);
}

// ------------------------------------------------------------------------------------------------------------ table
// Copies a decoder table (4096 entries) into shared memory; visible after copy_async_wait and a barrier.
__device__ __forceinline__ void copy_table(const u32* table, u32 shared, u32 thread, u32 threads) {
  for (u32 unit = thread; unit < kTableSlots / 4; unit += threads) copy_async_16(shared + 16 * unit, table + 4 * unit);
}
