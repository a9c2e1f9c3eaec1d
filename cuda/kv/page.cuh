// Pages of a KV cache: sizes, and where things lie in them. kvpack/format/pages.py draws the layout; docs/KV.md explains it.
#pragma once

#include "common/common.cuh"

constexpr u32 kPageTokens = KVPACK_PAGE_TOKENS;
constexpr u32 kGroupDims = KVPACK_GROUP_DIMS;
constexpr u32 kHeadDim = KVPACK_HEAD_DIM;
constexpr u32 kGroups = kHeadDim / kGroupDims;  // of a block
constexpr u32 kSlices = kPageTokens / 16;
constexpr u32 kPairs = 4 * kSlices;  // of a lane in a group
static_assert(kPageTokens == 64 && kGroupDims == 16, "a lane has 16 pairs of a group");
static_assert(kHeadDim % kGroupDims == 0 && kHeadDim <= 256);

constexpr u32 kScalesBytes = 2 * kGroupDims;  // of a group of K
constexpr u32 kTokenScalesBytes = 2 * kPageTokens;

// Groups of K have widths of their own. A *group format* is a page's format, or 5 bits.
constexpr u32 kInt5 = 8;

__device__ constexpr u32 element_bits(u32 format) {
  return format == kInt5 ? 5 : static_cast<u32>(u64{KVPACK_FORMAT_BITS} >> (8 * format)) & 0xFF;
}
__device__ constexpr bool is_quantized(u32 format) { return format >= KVPACK_FORMAT_INT8; }
__device__ constexpr bool is_integer(u32 format) {
  return is_quantized(format) && format != KVPACK_FORMAT_FP8_E4M3 && format != KVPACK_FORMAT_FP8_E5M2;
}
__device__ constexpr bool has_centers(u32 side, u32 format) {
  return side == KVPACK_SIDE_K ? is_quantized(format) : is_integer(format);
}

// K's groups lie in an order of their own: `place` says where one lies. The first ones are wide.
constexpr u32 kHalfOfGroups = (kGroups + 1) / 2;
constexpr u32 kWideGroups = kGroups % 2 ? kHalfOfGroups : align_up(kHalfOfGroups, 2);
constexpr u64 kKeyOrder = u64{KVPACK_KEY_ORDER_HIGH} << 32 | u64{KVPACK_KEY_ORDER_LOW};
__device__ constexpr u32 group_at(u32 place) { return static_cast<u32>(kKeyOrder >> 4 * place) & 15; }
__device__ constexpr u64 places_of_groups() {
  u64 places = 0;
  for (u32 place = 0; place < kGroups; ++place) places |= static_cast<u64>(place) << 4 * group_at(place);
  return places;
}
constexpr u64 kKeyPlaces = places_of_groups();
__device__ constexpr u32 place_of(u32 group) { return static_cast<u32>(kKeyPlaces >> 4 * group) & 15; }

// The format of a page's groups, of the wide ones of K or of the others.
__device__ constexpr u32 wide_format(u32 side, u32 format) {
  if (side == KVPACK_SIDE_V) return format;
  return format == KVPACK_FORMAT_INT4 ? kInt5 : format == KVPACK_FORMAT_INT3 ? KVPACK_FORMAT_INT4 : format == KVPACK_FORMAT_INT2 ? KVPACK_FORMAT_INT3 : format;
}
__device__ constexpr u32 thin_format(u32 side, u32 format) {
  if (side == KVPACK_SIDE_V) return format;
  return format == KVPACK_FORMAT_INT4 ? KVPACK_FORMAT_INT3 : format == KVPACK_FORMAT_INT3 ? KVPACK_FORMAT_INT2 : format;
}

// Element bits of all formats' groups, as KVPACK_FORMAT_BITS has them: what is chosen while kernels run is a shift.
__device__ constexpr u64 key_bits(bool wide) {
  u64 bits = 0;
  for (u32 format = 0; format < 8; ++format) {
    const u32 group_format = wide ? wide_format(KVPACK_SIDE_K, format) : thin_format(KVPACK_SIDE_K, format);
    bits |= static_cast<u64>(element_bits(group_format)) << 8 * format;
  }
  return bits;
}
constexpr u64 kWideKeyBits = key_bits(true), kThinKeyBits = key_bits(false);
constexpr u32 kBitBytes = kGroupDims * kPageTokens / 8;  // of a group, for each bit

__device__ constexpr u32 payload_bytes(u32 group_format) { return kBitBytes * element_bits(group_format); }
// Scales and centers lie in front of each group of K, and in front of a block of V.
__device__ constexpr u32 group_header_bytes(u32 side, u32 format) {
  return side == KVPACK_SIDE_K && is_quantized(format) ? 2 * kScalesBytes : 0;
}
__device__ constexpr u32 block_header_bytes(u32 side, u32 format) {
  return side == KVPACK_SIDE_V && is_quantized(format) ? kTokenScalesBytes * (1 + has_centers(side, format)) : 0;
}
__device__ constexpr u32 wide_bytes(u32 side, u32 format) {
  const u64 bits = side == KVPACK_SIDE_K ? kWideKeyBits : u64{KVPACK_FORMAT_BITS};
  return group_header_bytes(side, format) + kBitBytes * (static_cast<u32>(bits >> 8 * format) & 0xFF);
}
__device__ constexpr u32 thin_bytes(u32 side, u32 format) {
  const u64 bits = side == KVPACK_SIDE_K ? kThinKeyBits : u64{KVPACK_FORMAT_BITS};
  return group_header_bytes(side, format) + kBitBytes * (static_cast<u32>(bits >> 8 * format) & 0xFF);
}
// Where the group at a place, or the block's end, lies in a block.
__device__ constexpr u32 group_start(u32 side, u32 format, u32 place) {
  const u32 wide = place < kWideGroups ? place : kWideGroups;
  return block_header_bytes(side, format) + wide * wide_bytes(side, format) + (place - wide) * thin_bytes(side, format);
}
__device__ constexpr u32 block_bytes(u32 side, u32 format) { return group_start(side, format, kGroups); }

// An entry of a page table: where the page begins, in bytes from `pages` (null on a GPU: then it is the address), and its format.
__device__ __forceinline__ u32 entry_format(u64 entry) { return static_cast<u32>(entry) & ((1u << KVPACK_ENTRY_FORMAT_BITS) - 1); }
__device__ __forceinline__ const u8* entry_page(const u8* pages, u64 entry) {
  return pages + (entry & ~static_cast<u64>((1u << KVPACK_ENTRY_FORMAT_BITS) - 1));
}
__device__ __forceinline__ u8* entry_page(u8* pages, u64 entry) {
  return const_cast<u8*>(entry_page(static_cast<const u8*>(pages), entry));
}

// What could not be done is counted in status[0]; the complement of the least index is the largest, so that the first one stays.
__device__ __forceinline__ void report_left_out(u32* status, u32 index, u32 count) {
  atomicAdd(status, count);
  atomicMax(status + 1, ~index);
}
