// Elements of a snapshot's run in the order of docs/FORMAT.md §9.6, beside pages of one side and format.
//
// A part's elements are one sequence: layer, head, dimension as it lies in the page, page of the layer, token. Codes of wide and thin
// groups are two parts, scales and centers two more; scales and centers are integers in the order of their numbers.
#pragma once

#include "kv/page_codes.cuh"

constexpr u32 kSide = KVPACK_SIDE;
constexpr bool kKeys = kSide == KVPACK_SIDE_K;
constexpr u32 kFormat = KVPACK_FORMAT;
constexpr u32 kWideFormat = wide_format(kSide, kFormat), kThinFormat = thin_format(kSide, kFormat);
// Groups of the first part of codes; the others are the second's.
constexpr u32 kFirstGroups = kWideFormat == kThinFormat ? kGroups : kWideGroups;
constexpr bool kCentered = has_centers(kSide, kFormat);
constexpr bool kFloats = !is_integer(kFormat);  // whose codes are rotated to the left by one bit
constexpr u32 kWarps = KVPACK_MAX_WARPS;

#if KVPACK_CODE_BYTES == 2
typedef u16 Code;
#else
typedef u8 Code;
#endif
constexpr u32 kFormatBits = kFloats ? element_bits(kFormat) : 8;

// What a group's codes are while they are turned from one order into the other: a row of 64 tokens a dimension, and four bytes, so that
// lanes that take the same token of different dimensions meet different banks.
constexpr u32 kRowBytes = kPageTokens * sizeof(Code) + 4;
constexpr u32 kRowUnits = kPageTokens * sizeof(Code) / 16;  // of 16 bytes

// A page's place in its run: int4 of pages of earlier layers, pages of this layer, its index among these, tokens of it that are kept.
struct PagePlace {
  u32 before, count, index, kept;

  __device__ __forceinline__ explicit PagePlace(int4 v)
      : before(static_cast<u32>(v.x)), count(static_cast<u32>(v.y)), index(static_cast<u32>(v.z)), kept(static_cast<u32>(v.w)) {}

  // Token 0 of dimension `dim` of the `dims` that each head has in a part of codes.
  __device__ __forceinline__ u64 code(u32 heads, u32 head, u32 dims, u32 dim) const {
    return kPageTokens * (static_cast<u64>(before) * heads * dims + (static_cast<u64>(head) * dims + dim) * count + index);
  }
  // A dimension's (K, as it lies) or a token's (V) scale or center.
  __device__ __forceinline__ u64 number(u32 heads, u32 head, u32 i) const {
    if constexpr (kKeys) return static_cast<u64>(before) * heads * kHeadDim + (static_cast<u64>(head) * kHeadDim + i) * count + index;
    return kPageTokens * (static_cast<u64>(before) * heads + static_cast<u64>(head) * count + index) + i;
  }
};

// Where the j-th number of a group's (K) or block's (V) scales belongs: its dimension in the group, or its token.
__device__ __forceinline__ u32 number_place(u32 j) {
  if constexpr (kKeys) return 2 * (j / 4) + 8 * (j / 2 % 2) + j % 2;
  return 16 * (j / 2 % 4) + 8 * (j % 2) + j / 8;
}

// Row (dimension) and token of the elements of a lane's pair r of slice s, in a group; the second one's is the next column.
__device__ __forceinline__ u32 pair_dim(u32 lane, u32 r, u32 e) { return kKeys ? 2 * (lane % 4) + 8 * (r >> 1) + e : lane / 4 + 8 * (r & 1); }
__device__ __forceinline__ u32 pair_token(u32 lane, u32 s, u32 r, u32 e) {
  return 16 * s + (kKeys ? lane / 4 + 8 * (r & 1) : 2 * (lane % 4) + 8 * (r >> 1) + e);
}

// Bit patterns of fp16 and integers that grow with the numbers.
__device__ __forceinline__ u32 ordered(u32 bits) { return (bits & 0x8000) != 0 ? ~bits & 0xFFFF : bits | 0x8000; }
__device__ __forceinline__ u32 unordered(u32 integer) { return (integer & 0x8000) != 0 ? integer & 0x7FFF : ~integer & 0xFFFF; }

constexpr u32 kCodeMask = (1u << kFormatBits % 32) - 1;
__device__ __forceinline__ u32 rotate_left(u32 code) { return kFloats ? (code << 1 | code >> (kFormatBits - 1)) & kCodeMask : code; }
__device__ __forceinline__ u32 rotate_right(u32 code) { return kFloats ? (code >> 1 | code << (kFormatBits - 1)) & kCodeMask : code; }

__device__ __forceinline__ u32 load_shared_code(u32 address) { return sizeof(Code) == 2 ? load_shared_u16(address) : load_shared_u8(address); }
__device__ __forceinline__ void store_shared_code(u32 address, u32 code) {
  if constexpr (sizeof(Code) == 2) store_shared_u16(address, code);
  else store_shared_u8(address, code);
}
