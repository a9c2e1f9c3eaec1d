// New tokens of keys and values into pages of 16 bits.
//
// A block of threads has what one page of a side gets of one head. Nobody else writes there, so a page that begins here is written
// whole, with zeros behind its tokens: they meet probabilities of zero, and must not be NaN.
#include "kv/token_rows.cuh"

constexpr u32 kThreads = kLanes * KVPACK_MAX_WARPS;
constexpr u32 kRowBytes = 2 * kHeadDim;
constexpr u32 kRowUnits = kRowBytes / 16;
// Rows begin four banks apart: eight rows' words, or four pairs of rows' halves, lie in different banks.
constexpr u32 kRowStride = kRowBytes + 16;
constexpr u32 kGroupUnits = kLanes * kSlices;


// Pair r of lane 4g + c in a slice of V: two tokens of one dimension.
__device__ __forceinline__ u32 token_pair(u32 address) {
  return load_shared_u16(address) | load_shared_u16(address + kRowStride) << 16;
}

// A page's tokens `first` … `first + count` from the rows from `row` on, one element or pair after another.
__device__ __forceinline__ void write_some(u8* block, bool keys, const TokenRows<const u16>& rows, u32 row, u32 first, u32 count) {
  for (u32 i = threadIdx.x; i < count * (kHeadDim / 2); i += kThreads) {
    const u32 token = first + i / (kHeadDim / 2), dim = 2 * (i % (kHeadDim / 2));
    const u32 pair = __ldg(reinterpret_cast<const u32*>(rows.at(row + i / (kHeadDim / 2)) + dim));
    const u32 group = dim / kGroupDims;
    u8* slice = block + 16 * ((keys ? place_of(group) : group) * kGroupUnits + token / 16 * kLanes);
    const u32 down = keys ? token % 16 : dim % 16, column = keys ? dim % 16 : token % 16;
    u8* word = slice + 16 * (4 * (down % 8) + column % 8 / 2) + 4 * (2 * (column / 8) + down / 8);
    if (keys) {
      *reinterpret_cast<u32*>(word) = pair;
    } else {
      u16* half = reinterpret_cast<u16*>(word) + column % 2;
      half[0] = static_cast<u16>(pair);
      half[8 * 4] = static_cast<u16>(pair >> 16);  // the next dimension: four lanes on
    }
  }
}

// All of a page: `count` tokens, then zeros.
__device__ __forceinline__ void write_all(u8* block, bool keys, const TokenRows<const u16>& rows, u32 row, u32 count) {
  __shared__ __align__(16) u8 tile[kPageTokens * kRowStride];
  const u32 tile_address = shared_address(tile);
  for (u32 i = threadIdx.x; i < kPageTokens * kRowUnits; i += kThreads) {
    const u32 token = i / kRowUnits, unit = i % kRowUnits, at = tile_address + token * kRowStride + 16 * unit;
    if (token < count) copy_async_16(at, rows.at(row + token) + 8 * unit);
    else store_shared_v4(at, make_uint4(0, 0, 0, 0));
  }
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  const u32 lane = threadIdx.x % kLanes, g = lane / 4, c = lane % 4;
#pragma unroll 4
  for (u32 i = threadIdx.x; i < kGroups * kGroupUnits; i += kThreads) {
    const u32 group = keys ? group_at(i / kGroupUnits) : i / kGroupUnits;
    const u32 slice = tile_address + i / kLanes % kSlices * (16 * kRowStride) + group * (2 * kGroupDims);
    uint4 pairs;
    if (keys) {
      const u32 at = slice + g * kRowStride + 4 * c;
      pairs = make_uint4(load_shared_u32(at), load_shared_u32(at + 8 * kRowStride), load_shared_u32(at + 16),
                         load_shared_u32(at + 8 * kRowStride + 16));
    } else {
      const u32 at = slice + 2 * c * kRowStride + 2 * g;
      pairs = make_uint4(token_pair(at), token_pair(at + 16), token_pair(at + 8 * kRowStride),
                         token_pair(at + 8 * kRowStride + 16));
    }
    *reinterpret_cast<uint4*>(block + 16 * i) = pairs;
  }
}

// k, v: [gridDim.y, num_heads, num_rows, head_dim], element strides; or [blocks, num_heads, tokens, head_dim], gridDim.y times.
// layers, blocks, block_step, skipped: a BlockTable, of rows in blocks.
// pages: what entries count from; null if they are addresses. table: [2 sides, gridDim.y, max_pages].
// positions: [gridDim.y], where each sequence's first new token goes.
// counts: [gridDim.y], how many of the last rows are a sequence's tokens; null: all are.
// format: of k and v, which a page's must be. status: i32 [2], see report_left_out; tokens of a side, the sequence.
// blockIdx: x: page from that of the first token, times num_heads, plus head; y: sequence; z: side.
extern "C" __global__ void __launch_bounds__(kThreads, KVPACK_BLOCKS_PER_SM)
page_write(const u16* k, u64 k_batch, u64 k_head, u64 k_token, const u16* v, u64 v_batch, u64 v_head, u64 v_token, u8* pages,
           const u64* table, const s32* positions, const s32* counts, u32* status, u32 num_heads, u32 num_rows, u32 max_pages,
           u32 format, const u64* layers, const s32* blocks, u64 block_step, u32 skipped) {
  const u32 head = blockIdx.x % num_heads, sequence = blockIdx.y, side = blockIdx.z;
  const s32 position = __ldg(positions + sequence);
  const u32 given = counts == nullptr ? num_rows : static_cast<u32>(max(0, __ldg(counts + sequence)));
  const u32 num_tokens = min(given, num_rows);
  if (num_tokens == 0) return;
  const u32 piece = blockIdx.x / num_heads;
  const bool reports = head == 0 && threadIdx.x == 0;
  if (position < 0) {
    if (reports && piece == 0) report_left_out(status, sequence, num_tokens);
    return;
  }
  const u32 start = static_cast<u32>(position), page = start / kPageTokens + piece;
  const u64 page_start = static_cast<u64>(page) * kPageTokens, end = static_cast<u64>(start) + num_tokens;
  const u64 first = max(page_start, static_cast<u64>(start)), last = min(page_start + kPageTokens, end);
  if (first >= last) return;
  const u32 count = static_cast<u32>(last - first);
  const u64 entry = page < max_pages ? __ldg(table + (static_cast<u64>(side) * gridDim.y + sequence) * max_pages + page) : 0;
  u8* block = entry_page(pages, entry);
  if (page >= max_pages || entry_format(entry) != format || block == nullptr) {
    if (reports) report_left_out(status, sequence, count);
    return;
  }
  block += static_cast<u64>(head) * block_bytes(KVPACK_SIDE_K, KVPACK_FORMAT_FP16);
  const bool keys = side == KVPACK_SIDE_K;
  const TokenRows<const u16> rows(keys ? k : v, keys ? k_batch : v_batch, keys ? k_head : v_head, keys ? k_token : v_token,
                                  {layers, blocks, block_step, skipped}, sequence, head);
  const u32 row = static_cast<u32>(first - start) + num_rows - num_tokens;
  if (first == page_start) write_all(block, keys, rows, row, count);
  else write_some(block, keys, rows, row, static_cast<u32>(first - page_start), count);
}
