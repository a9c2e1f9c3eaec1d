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

__device__ constexpr u32 element_bits(u32 format) {
  return static_cast<u32>(u64{KVPACK_FORMAT_BITS} >> (8 * format)) & 0xFF;
}
__device__ constexpr bool is_quantized(u32 format) { return format >= KVPACK_FORMAT_INT8; }
__device__ constexpr bool is_narrow(u32 format) {
  return format == KVPACK_FORMAT_INT4 || format == KVPACK_FORMAT_INT3 || format == KVPACK_FORMAT_INT2;
}
__device__ constexpr u32 payload_bytes(u32 format) { return kGroupDims * kPageTokens / 8 * element_bits(format); }
// K has scales and centers in front of each group; V has scales in front of a block.
__device__ constexpr u32 group_header_bytes(u32 side, u32 format) {
  return side == KVPACK_SIDE_K && is_quantized(format) ? kScalesBytes * (1 + is_narrow(format)) : 0;
}
__device__ constexpr u32 block_header_bytes(u32 side, u32 format) {
  return side == KVPACK_SIDE_V && is_quantized(format) ? kTokenScalesBytes : 0;
}
__device__ constexpr u32 group_bytes(u32 side, u32 format) { return group_header_bytes(side, format) + payload_bytes(format); }
__device__ constexpr u32 block_bytes(u32 side, u32 format) {
  return block_header_bytes(side, format) + kGroups * group_bytes(side, format);
}

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
