// Elements of a run's parts → pages of one side and format: put_part of kvpack/encode/page_runs.py, byte for byte.
#include "kv/page_elements.cuh"

// The codes of a group from memory to the warp's rows in shared memory.
__device__ __forceinline__ void take_group(const Code* codes, u64 stride, u32 kept, u32 rows, u32 lane) {
#pragma unroll
  for (u32 i = 0; i < kGroupDims * kRowUnits / kLanes; ++i) {
    const u32 at = i * kLanes + lane, dim = at / kRowUnits, unit = at % kRowUnits;
    const uint4 v = load_once_v4(reinterpret_cast<const u8*>(codes + dim * stride) + 16 * unit);
    const u32 four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (u32 k = 0; k < 4; ++k) store_shared_u32(rows + dim * kRowBytes + 16 * unit + 4 * k, four[k]);
  }
  __syncwarp();
  if (kept < kPageTokens) {
    for (u32 i = lane; i < kGroupDims * (kPageTokens - kept); i += kLanes) {
      store_shared_code(rows + i % kGroupDims * kRowBytes + (kept + i / kGroupDims) * sizeof(Code), 0);
    }
    __syncwarp();
  }
}

// The codes of a group from shared memory into its payload.
template <u32 format>
__device__ __forceinline__ void put_group(u32 rows, u8* payload, u32 lane) {
  constexpr u32 bits = element_bits(format);
  Slice<format> slices[kSlices];
#pragma unroll
  for (u32 s = 0; s < kSlices; ++s) {
#pragma unroll
    for (u32 word = 0; word < Slice<format>::kWords; ++word) slices[s].words[word] = 0;
#pragma unroll
    for (u32 r = 0; r < kRowPairs; ++r) {
      auto code = [&](u32 e) {
        return rotate_right(load_shared_code(rows + pair_dim(lane, r, e) * kRowBytes + pair_token(lane, s, r, e) * sizeof(Code)));
      };
      if constexpr (bits == 16) {
        slices[s].words[r] = code(0) | code(1) << 16;
      } else if constexpr (bits > 4) {
        slices[s].words[r / 2] |= (code(0) | code(1) << 8) << 16 * (r % 2);
      } else {
        slices[s].words[0] |= (code(0) | code(1) << 16) << bits * r;
      }
    }
    if constexpr (bits == 16) {
      const u32* w = slices[s].words;
      *reinterpret_cast<uint4*>(payload + 16 * (kLanes * s + lane)) = make_uint4(w[0], w[1], w[2], w[3]);
    }
  }
  if constexpr (bits != 16) store_group(payload, lane, slices);
}

__device__ __forceinline__ void put_number(u8* to, u32 j, u16 integer) {
  reinterpret_cast<u16*>(to)[j] = static_cast<u16>(unordered(integer));
}

// pages: what entries count from; null if they are addresses. entries: u64 [gridDim.x / heads]; those of other formats, and 0, are left out.
// places: int4 [gridDim.x / heads], see PagePlace. first, second: codes of the parts; second only where there are two. scales, centers:
// integers, where the format has them. All parts begin at multiples of 16 bytes.
// blockIdx.x: page times heads, plus head.
extern "C" __global__ void __launch_bounds__(kLanes * kWarps, KVPACK_BLOCKS_PER_SM)
page_join(const Code* first, const Code* second, const u16* scales, const u16* centers, const int4* places, const u64* entries, u8* pages,
          u32 heads) {
  __shared__ u32 shared[kWarps][kGroupDims * kRowBytes / 4];
  const u32 page = blockIdx.x / heads, head = blockIdx.x % heads, warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const PagePlace place(__ldg(places + page));
  const u64 entry = __ldg(entries + page);
  if (entry == 0 || entry_format(entry) != kFormat) return;
  u8* block = entry_page(pages, entry) + static_cast<u64>(head) * block_bytes(kSide, kFormat);
  const u32 rows = shared_address(shared[warp]);

  if constexpr (is_quantized(kFormat) && !kKeys) {
    for (u32 j = threadIdx.x; j < kPageTokens; j += kLanes * kWarps) {
      const u64 at = place.number(heads, head, number_place(j));
      put_number(block, j, __ldg(scales + at));
      if constexpr (kCentered) put_number(block + kTokenScalesBytes, j, __ldg(centers + at));
    }
  }
  for (u32 group = warp; group < kGroups; group += kWarps) {
    u8* start = block + group_start(kSide, kFormat, group);
    if constexpr (is_quantized(kFormat) && kKeys) {
      const u64 at = place.number(heads, head, kGroupDims * group + number_place(lane % kGroupDims));
      if (lane < kGroupDims) put_number(start, lane, __ldg(scales + at));
      else if (kCentered) put_number(start + kScalesBytes, lane - kGroupDims, __ldg(centers + at));
    }
    u8* payload = start + group_header_bytes(kSide, kFormat);
    const u64 stride = static_cast<u64>(kPageTokens) * place.count;
    if (group < kFirstGroups) {
      take_group(first + place.code(heads, head, kGroupDims * kFirstGroups, kGroupDims * group), stride, place.kept, rows, lane);
      put_group<kWideFormat>(rows, payload, lane);
    } else if constexpr (kFirstGroups < kGroups) {
      const u32 dim = kGroupDims * (group - kFirstGroups);
      take_group(second + place.code(heads, head, kGroupDims * (kGroups - kFirstGroups), dim), stride, place.kept, rows, lane);
      put_group<kThinFormat>(rows, payload, lane);
    }
    __syncwarp();
  }
}
