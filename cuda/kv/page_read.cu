// Tokens of pages of any format as numbers: what dequantize_blocks of kvpack/encode/page_coder.py gives, rounded once.
#include "kv/page_codes.cuh"
#include "kv/token_rows.cuh"

typedef long long s64;

constexpr u32 kSide = KVPACK_SIDE;
constexpr bool kKeys = kSide == KVPACK_SIDE_K;
static_assert(KVPACK_MAX_WARPS == kSlices, "a warp has a slice");

#if KVPACK_ACTIVATION == 2
typedef float Output;
__device__ __forceinline__ Output output_of(float value) { return value; }
__device__ __forceinline__ void store_two(Output* out, Two x) { *reinterpret_cast<float2*>(out) = make_float2(x.first, x.second); }
#else
typedef u16 Output;
__device__ __forceinline__ Output output_of(float value) {
  return static_cast<Output>(KVPACK_ACTIVATION == 0 ? f16_bits(value) : bf16_bits(value));
}
__device__ __forceinline__ void store_two(Output* out, Two x) {
  *reinterpret_cast<u32*>(out) = KVPACK_ACTIVATION == 0 ? f16x2_bits(x.first, x.second) : bf16x2_bits(x.first, x.second);
}
#endif

// Where a page's tokens go: rows for those from `first` to `last`; zeros from `valid` on.
struct Rows {
  TokenRows<Output> out;
  s32 before;  // how many rows come before the page's token 0; negative where that has none
  s32 first, last, valid;

  __device__ __forceinline__ Output* at(u32 token) const { return out.at(static_cast<u32>(before + static_cast<s32>(token))); }
};

// Where a lane's tokens of slice `s` go: two rows of K, four columns of V.
struct LaneRows {
  static constexpr u32 kTokens = kKeys ? 2 : kColumns;
  Output* out[kTokens];  // null: there is no such row
  bool zero[kTokens];

  __device__ __forceinline__ LaneRows(const Rows& rows, u32 s, u32 lane) {
    const u32 g = lane / 4, c = lane % 4;
#pragma unroll
    for (u32 i = 0; i < kTokens; ++i) {
      const s32 token = static_cast<s32>(16 * s + (kKeys ? g + 8 * i : 2 * c + i % 2 + 8 * (i / 2)));
      out[i] = token >= rows.first && token < rows.last ? rows.at(token) : nullptr;
      zero[i] = token >= rows.valid;
    }
  }
};

// A slice of the groups at places `first` to `last`, which have one format.
template <u32 page_format, u32 format>
__device__ __forceinline__ void read_groups(const u8* block, const LaneRows& rows, u32 s, u32 lane, u32 first, u32 last) {
  const u32 g = lane / 4, c = lane % 4;
  Columns<kSide, format> columns;
  for (u32 place = first; place < last; ++place) {
    const u8* start = block + group_start(kSide, page_format, place);
    if (kKeys || place == first) columns.load(kKeys ? start : block, s, lane);
    const Slice<format> slice = load_slice<format>(start + group_header_bytes(kSide, format), s, lane);
    const u32 dims = kGroupDims * (kKeys ? group_at(place) : place);
#pragma unroll
    for (u32 r = 0; r < kRowPairs; ++r) {
      const Two x = columns.pair(slice, r);
      const u32 row = g + 8 * (r & 1), column = 2 * c + 8 * (r >> 1);
      if constexpr (kKeys) {
        const u32 i = r & 1;
        if (rows.out[i] != nullptr) store_two(rows.out[i] + dims + column, rows.zero[i] ? Two{0.0f, 0.0f} : x);
      } else {
#pragma unroll
        for (u32 e = 0; e < 2; ++e) {
          const u32 i = 2 * (r >> 1) + e;
          const float value = rows.zero[i] ? 0.0f : e == 0 ? x.first : x.second;
          if (rows.out[i] != nullptr) rows.out[i][dims + row] = output_of(value);
        }
      }
    }
  }
}

template <u32 format>
__device__ __forceinline__ void read_slice(const u8* block, const LaneRows& rows, u32 s, u32 lane) {
  constexpr u32 wide = wide_format(kSide, format), thin = thin_format(kSide, format);
  read_groups<format, wide>(block, rows, s, lane, 0, wide == thin ? kGroups : kWideGroups);
  if constexpr (wide != thin) read_groups<format, thin>(block, rows, s, lane, kWideGroups, kGroups);
}

// pages: what entries count from; null if they are addresses. table: [gridDim.y, max_pages] of one side.
// starts, ends: [gridDim.y]: row i of a sequence is its token starts + i, or zeros from ends on.
// out: [gridDim.y, num_heads, num_tokens, head_dim], element strides; or [blocks, num_heads, tokens, head_dim], gridDim.y times.
// layers, blocks, block_step, skipped: a BlockTable, of rows in blocks.
// status: i32 [2], see report_left_out; tokens whose pages are not there, which are read as zeros, and the sequence.
// blockIdx: x: page from that of the first token, times num_heads, plus head; y: sequence.
extern "C" __global__ void __launch_bounds__(kLanes * KVPACK_MAX_WARPS, KVPACK_BLOCKS_PER_SM)
page_read(const u8* pages, const u64* table, const s32* starts, const s32* ends, Output* out, u64 out_batch, u64 out_head, u64 out_token,
          u32* status, u32 num_heads, u32 num_tokens, u32 max_pages, const u64* layers, const s32* blocks, u64 block_step,
          u32 skipped) {
  const u32 head = blockIdx.x % num_heads, sequence = blockIdx.y;
  const u32 lane = threadIdx.x % kLanes, s = threadIdx.x / kLanes;
  const s32 start = max(__ldg(starts + sequence), 0), end = __ldg(ends + sequence);
  const u32 page = static_cast<u32>(start) / kPageTokens + blockIdx.x / num_heads;
  const s64 page_start = static_cast<s64>(page) * kPageTokens;
  const s32 first = static_cast<s32>(max(start - page_start, s64{0}));
  const s32 last = static_cast<s32>(min(start + static_cast<s64>(num_tokens) - page_start, s64{kPageTokens}));
  if (first >= last) return;
  const s32 valid = static_cast<s32>(max(min(end - page_start, s64{kPageTokens}), s64{0}));
  const Rows rows{{out, out_batch, out_head, out_token, {layers, blocks, block_step, skipped}, sequence, head},
                  static_cast<s32>(page_start - start), first, last, valid};

  const u64 entry = page < max_pages ? __ldg(table + static_cast<u64>(sequence) * max_pages + page) : 0;
  const u8* block = entry_page(pages, entry);
  const u32 format = entry_format(entry);
  if (rows.valid <= rows.first || page >= max_pages || block == nullptr || format > KVPACK_FORMAT_FP8_E5M2) {
    if (rows.valid > rows.first && head == 0 && threadIdx.x == 0) {
      report_left_out(status, sequence, static_cast<u32>(min(rows.valid, rows.last) - rows.first));
    }
    for (u32 i = threadIdx.x + rows.first * kHeadDim; i < rows.last * kHeadDim; i += kLanes * KVPACK_MAX_WARPS) {
      rows.at(i / kHeadDim)[i % kHeadDim] = 0;
    }
    return;
  }
  const LaneRows of_lane(rows, s, lane);
#define KVPACK_READ(name)                                                                                    \
  case KVPACK_FORMAT_##name:                                                                                 \
    read_slice<KVPACK_FORMAT_##name>(block + static_cast<u64>(head) * block_bytes(kSide, KVPACK_FORMAT_##name), of_lane, s, lane); \
    break;
  switch (format) {
    KVPACK_READ(FP16)
    KVPACK_READ(BF16)
    KVPACK_READ(INT8)
    KVPACK_READ(INT4)
    KVPACK_READ(INT3)
    KVPACK_READ(INT2)
    KVPACK_READ(FP8_E4M3)
    KVPACK_READ(FP8_E5M2)
  }
#undef KVPACK_READ
}
