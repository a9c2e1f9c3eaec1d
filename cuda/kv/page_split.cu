// Pages of one side and format → elements of a run's parts: part_elements of kvpack/encode/page_runs.py, number for number.
#include "kv/page_elements.cuh"

// The codes of a group from its payload to the warp's rows in shared memory.
template <u32 format>
__device__ __forceinline__ void take_group(const u8* payload, u32 rows, u32 lane) {
  constexpr u32 bits = element_bits(format), mask = (1u << bits % 32) - 1;
  Slice<format> slices[kSlices];
  load_group<format>(payload, lane, slices);
#pragma unroll
  for (u32 s = 0; s < kSlices; ++s) {
#pragma unroll
    for (u32 r = 0; r < kRowPairs; ++r) {
#pragma unroll
      for (u32 e = 0; e < 2; ++e) {
        u32 code = 0;
        if constexpr (bits == 16) code = slices[s].words[r] >> 16 * e;
        else if constexpr (bits > 4) code = slices[s].words[r / 2] >> (16 * (r % 2) + 8 * e);
        else code = slices[s].words[0] >> (bits * r + 16 * e);
        store_shared_code(rows + pair_dim(lane, r, e) * kRowBytes + pair_token(lane, s, r, e) * sizeof(Code), rotate_left(code & mask));
      }
    }
  }
  __syncwarp();
}

// From there to memory.
__device__ __forceinline__ void put_group(u32 rows, Code* codes, u64 stride, u32 lane) {
#pragma unroll
  for (u32 i = 0; i < kGroupDims * kRowUnits / kLanes; ++i) {
    const u32 at = i * kLanes + lane, dim = at / kRowUnits, unit = at % kRowUnits, from = rows + dim * kRowBytes + 16 * unit;
    *reinterpret_cast<uint4*>(reinterpret_cast<u8*>(codes + dim * stride) + 16 * unit) =
        make_uint4(load_shared_u32(from), load_shared_u32(from + 4), load_shared_u32(from + 8), load_shared_u32(from + 12));
  }
  __syncwarp();
}

__device__ __forceinline__ u16 number_at(const u8* from, u32 j) {
  return static_cast<u16>(ordered(__ldg(reinterpret_cast<const u16*>(from) + j)));
}

// Arguments as of page_join; all entries are of pages of this format.
extern "C" __global__ void __launch_bounds__(kLanes * kWarps, KVPACK_BLOCKS_PER_SM)
page_split(const u8* pages, const u64* entries, const int4* places, Code* first, Code* second, u16* scales, u16* centers, u32 heads) {
  __shared__ u32 shared[kWarps][kGroupDims * kRowBytes / 4];
  const u32 page = blockIdx.x / heads, head = blockIdx.x % heads, warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const PagePlace place(__ldg(places + page));
  const u8* block = entry_page(pages, __ldg(entries + page)) + static_cast<u64>(head) * block_bytes(kSide, kFormat);
  const u32 rows = shared_address(shared[warp]);

  if constexpr (is_quantized(kFormat) && !kKeys) {
    for (u32 j = threadIdx.x; j < kPageTokens; j += kLanes * kWarps) {
      const u64 at = place.number(heads, head, number_place(j));
      scales[at] = number_at(block, j);
      if constexpr (kCentered) centers[at] = number_at(block + kTokenScalesBytes, j);
    }
  }
  for (u32 group = warp; group < kGroups; group += kWarps) {
    const u8* start = block + group_start(kSide, kFormat, group);
    if constexpr (is_quantized(kFormat) && kKeys) {
      const u64 at = place.number(heads, head, kGroupDims * group + number_place(lane % kGroupDims));
      if (lane < kGroupDims) scales[at] = number_at(start, lane);
      else if (kCentered) centers[at] = number_at(start + kScalesBytes, lane - kGroupDims);
    }
    const u8* payload = start + group_header_bytes(kSide, kFormat);
    const u64 stride = static_cast<u64>(kPageTokens) * place.count;
    if (group < kFirstGroups) {
      take_group<kWideFormat>(payload, rows, lane);
      put_group(rows, first + place.code(heads, head, kGroupDims * kFirstGroups, kGroupDims * group), stride, lane);
    } else if constexpr (kFirstGroups < kGroups) {
      const u32 dim = kGroupDims * (group - kFirstGroups);
      take_group<kThinFormat>(payload, rows, lane);
      put_group(rows, second + place.code(heads, head, kGroupDims * (kGroups - kFirstGroups), dim), stride, lane);
    }
  }
}
