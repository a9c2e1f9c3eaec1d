// What the encoder's kernels share: a lane's elements, a chunk of 32 columns at a time (docs/FORMAT.md §§4, 5.3, 7.4).
//
// A lane is a row, and a thread takes a lane: it reads its row 32 columns (one or more whole 32-byte sectors) at a time,
// with loads of 16 bytes where rows are aligned to that.
#pragma once

#include "codec/encode_tiles.cuh"

#if KVPACK_ELEMENT_BITS > 16
typedef u32 Element;
#elif KVPACK_ELEMENT_BITS > 8
typedef u16 Element;
#else
typedef u8 Element;
#endif

constexpr u32 kElementBits = KVPACK_ELEMENT_BITS;
constexpr u32 kCodeBits = KVPACK_CODE_BITS;
constexpr u32 kCodesPerSymbol = KVPACK_CODES_PER_SYMBOL;
constexpr u32 kRawBits = KVPACK_RAW_BITS;
constexpr bool kFolded = KVPACK_FOLDED != 0;
constexpr u32 kSymbolBits = kCodeBits * kCodesPerSymbol;
constexpr u32 kElementBytes = sizeof(Element);
constexpr u32 kChunkWords = kChunkCols * kElementBytes / 4;  // u32 that hold a lane's chunk, column after column
constexpr u32 kChunkSteps = kChunkCols / kCodesPerSymbol;
constexpr u32 kSlots = 8;                 // u32 of a chunk's low bytes, in the order that the raw planes prescribe
constexpr u32 kEveryByte = 0x01010101u;

constexpr u32 kNarrowHalf = kElementBytes == 1 ? kEveryByte << (kElementBits - 1) : 0;
constexpr u32 kNarrowMask = kElementBytes == 1 ? kEveryByte * ((1u << kElementBits % 32) - 1) : 0;

// A tile of elements [matrices, rows, cols].
struct TileView : TilePlace {
  const Element* first;  // its element (0, 0)
  u64 row_stride;        // in elements
  bool vectors;          // rows begin at multiples of 16 bytes

  __device__ __forceinline__ TileView(const Element* elements, u32 all_rows, u32 all_cols, u32 tile_cols, u32 tile)
      : TilePlace(all_rows, all_cols, tile_cols, tile) {
    first = elements + (static_cast<u64>(matrix) * all_rows + first_row) * all_cols + first_col;
    row_stride = all_cols;
    vectors = (reinterpret_cast<u64>(elements) | row_stride * kElementBytes) % 16 == 0;
  }
};

// Every byte of `a` minus (plus) that of `b`, mod 256.
__device__ __forceinline__ u32 subtract_bytes(u32 a, u32 b) {
  constexpr u32 high = kEveryByte << 7;
  return ((a | high) - (b & ~high)) ^ ((a ^ ~b) & high);
}
__device__ __forceinline__ u32 add_bytes(u32 a, u32 b) {
  constexpr u32 high = kEveryByte << 7;
  return ((a & ~high) + (b & ~high)) ^ ((a ^ b) & high);
}

// Four elements of up to 8 bits with their codes folded (§4). No product of a byte leaves it.
__device__ __forceinline__ u32 fold(u32 elements) {
  constexpr u32 top = kEveryByte << (kRawBits - 1) % 8, up = 2 * ((1u << kCodeBits) - 1);
  const u32 turned = elements ^ kNarrowHalf;
  return turned ^ (turned & top) * up;
}

// The elements of chunk `chunk` of a row that begins (in this tile) at `row`; columns behind the tile's last repeat it.
__device__ __forceinline__ void load_elements(const TileView& view, const Element* row, u32 chunk, u32 (&words)[kChunkWords]) {
  const u32 first_col = chunk * kChunkCols;
  if (view.vectors && first_col + kChunkCols <= view.cols) {
    const uint4* from = reinterpret_cast<const uint4*>(row + first_col);
#pragma unroll
    for (u32 i = 0; i < kChunkWords / 4; ++i) {
      const uint4 four = from[i];
      words[4 * i] = four.x;
      words[4 * i + 1] = four.y;
      words[4 * i + 2] = four.z;
      words[4 * i + 3] = four.w;
    }
  } else {
    constexpr u32 per_word = 4 / kElementBytes;
#pragma unroll
    for (u32 i = 0; i < kChunkWords; ++i) {
      u32 word = 0;
#pragma unroll
      for (u32 part = 0; part < per_word; ++part) {
        const u32 col = min(first_col + per_word * i + part, view.cols - 1);
        word |= static_cast<u32>(row[col]) << (8 * kElementBytes * part % 32);
      }
      words[i] = word;
    }
  }
}

// As load_elements; with `previous` they are replaced by their differences (§5.3, integers alone); codes are folded if the
// layout has them so.
__device__ __forceinline__ void load_chunk(const TileView& view, const Element* row, u32 chunk, bool previous,
                                           u32 (&words)[kChunkWords]) {
  load_elements(view, row, chunk, words);
  if constexpr (kElementBytes == 1) {
    if (previous) {
      const u32 first = words[0] & 0xFF;
      u32 before = chunk ? row[chunk * kChunkCols - 1] : 0;
#pragma unroll
      for (u32 i = 0; i < kChunkWords; ++i) {
        const u32 word = words[i];
        words[i] = add_bytes(subtract_bytes(word, (word << 8) | before), kNarrowHalf) & kNarrowMask;
        before = word >> 24;
      }
      if (chunk == 0) words[0] = (words[0] & ~0xFFu) | first;
    }
    if constexpr (kFolded) {
#pragma unroll
      for (u32 i = 0; i < kChunkWords; ++i) words[i] = fold(words[i]);
    }
  }
}

// Whether a second chunk's registers can be spared: its loads are then under way while the first is worked on.
constexpr bool kLoadAhead = kElementBytes < 4;

// Symbol of step `step` of a chunk (§4). Loops over steps are unrolled, so that all but the shifts is known when compiled.
__device__ __forceinline__ u32 chunk_symbol(const u32 (&words)[kChunkWords], u32 step) {
  constexpr u32 mask = (1u << kSymbolBits) - 1;
  if constexpr (kElementBytes == 4) {
    return words[step] >> kRawBits;
  } else if constexpr (kElementBytes == 2) {
    return (words[step / 2] >> (16 * (step % 2) + kRawBits)) & mask;
  } else if constexpr (kCodesPerSymbol == 1) {
    return (words[step / 4] >> (8 * (step % 4) + kRawBits)) & mask;
  } else {
    // Codes of four columns, two and two of them beside each other.
    auto pairs = [&](u32 word) {
      const u32 codes = (words[word] >> kRawBits) & (kEveryByte * ((1u << kCodeBits) - 1));
      return codes | codes >> (8 - kCodeBits);
    };
    auto four = [&](u32 word) {
      const u32 codes = pairs(word);
      return (codes | codes >> (2 * (8 - kCodeBits))) & ((1u << 4 * kCodeBits % 32) - 1);
    };
    if constexpr (kCodesPerSymbol == 2) {
      return (pairs(step / 2) >> (16 * (step % 2))) & mask;
    } else if constexpr (kCodesPerSymbol == 4) {
      return four(step);
    } else {
      return four(2 * step) | four(2 * step + 1) << (4 * kCodeBits);
    }
  }
}

// Byte t of slot k is a byte of column 4g·(k div g) + g·t + k mod g: of narrow elements the element itself, of wide ones
// bits shift … shift + 7.
__device__ __forceinline__ void chunk_slots(const u32 (&words)[kChunkWords], u32 shift, u32 (&slots)[kSlots]) {
#pragma unroll
  for (u32 slot = 0; slot < kSlots; ++slot) {
    if constexpr (kElementBytes == 4) {
      const u32* w = words + 4 * slot;
      const u32 low = __byte_perm(w[0] >> shift, w[1] >> shift, 0x0040);
      slots[slot] = __byte_perm(low, __byte_perm(w[2] >> shift, w[3] >> shift, 0x0040), 0x5410);
    } else if constexpr (kElementBytes == 2) {
      slots[slot] = __byte_perm(words[2 * slot] >> shift, words[2 * slot + 1] >> shift, 0x6420);
    } else if constexpr (kCodesPerSymbol == 1) {
      slots[slot] = words[slot];
    } else if constexpr (kCodesPerSymbol == 2) {
      const u32 first = slot / 2 * 2;
      slots[slot] = __byte_perm(words[first], words[first + 1], slot % 2 ? 0x7531 : 0x6420);
    } else {
      constexpr u32 apart = kCodesPerSymbol / 4;  // words from one byte's to the next one's
      const u32 first = apart == 1 ? slot / 4 * 4 : slot / 4, byte = slot % 4, pick = byte | (4 + byte) << 4;
      const u32 low = __byte_perm(words[first], words[first + apart], pick);
      slots[slot] = __byte_perm(low, __byte_perm(words[first + 2 * apart], words[first + 3 * apart], pick), 0x5410);
    }
  }
}

// Word `word` of a plane of `width` bits: bits shift … shift + width − 1 of 8/width slots.
__device__ __forceinline__ u32 plane_word(const u32 (&slots)[kSlots], u32 shift, u32 width, u32 word) {
  const u32 mask = kEveryByte * ((1u << width) - 1);
  u32 u = 0;
#pragma unroll
  for (u32 place = 0; place < 8 / width; ++place) {
    u |= ((slots[word * (8 / width) + place] >> shift) & mask) << (place * width);
  }
  return u;
}

// Stores a lane's part of its group's raw planes of one chunk (§7.4); `planes` is aligned to 16 bytes.
__device__ __forceinline__ void store_planes(const u32 (&words)[kChunkWords], u32 lane, u32* planes) {
  constexpr u32 narrow = kRawBits % 8;
  u32 slots[kSlots];
#pragma unroll
  for (u32 wide = kRawBits / 8; wide > 0; --wide) {
    chunk_slots(words, 8 * (wide - 1) + narrow, slots);
    uint4* unit = reinterpret_cast<uint4*>(planes);
    unit[lane] = make_uint4(slots[0], slots[1], slots[2], slots[3]);
    unit[kLanes + lane] = make_uint4(slots[4], slots[5], slots[6], slots[7]);
    planes += 8 * kLanes;
  }
  if constexpr (narrow != 0) chunk_slots(words, 0, slots);
  if constexpr ((narrow & 4) != 0) {
    reinterpret_cast<uint4*>(planes)[lane] =
        make_uint4(plane_word(slots, narrow & 3, 4, 0), plane_word(slots, narrow & 3, 4, 1),
                   plane_word(slots, narrow & 3, 4, 2), plane_word(slots, narrow & 3, 4, 3));
    planes += 4 * kLanes;
  }
  if constexpr ((narrow & 2) != 0) {
    reinterpret_cast<uint2*>(planes)[lane] =
        make_uint2(plane_word(slots, narrow & 1, 2, 0), plane_word(slots, narrow & 1, 2, 1));
    planes += 2 * kLanes;
  }
  if constexpr ((narrow & 1) != 0) planes[lane] = plane_word(slots, 0, 1, 0);
}
