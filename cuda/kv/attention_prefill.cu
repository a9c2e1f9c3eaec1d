// Attention of many query tokens to the pages of a KV cache, in place: softmax(q · Kᵀ) · V for each sequence and head. Queries are
// the last tokens of a sequence and see those up to their own (kCausal), or see all.
//
// A block takes a *tile* of columns (a query token and head of one KV head's, token after token) of a sequence, each of its warps
// kTiles times the eight columns of mma.m16n8k16. Operands are as in attention_decode.cu; each of a page serves kTiles products:
// K's with all scores of the page held in registers, V's with the probabilities in their place.
//
// Pages that some column of the tile sees are visited in order. They come to all warps through shared memory in *pieces* of up to
// kSlotBytes, kSlots − 1 ahead. The first warp lists them: where they lie and how long they are, a visit ahead of their use.
//
// Shared memory: slots of pieces | list | barriers of the slots | of each warp: queries as operands; of each two columns, their
// factors of scores, then their maxima so far (here, since registers are scarce).
#include "kv/attention.cuh"

constexpr u32 kWarps = KVPACK_WARPS;
constexpr u32 kTiles = KVPACK_COLUMN_TILES;
constexpr u32 kWarpColumns = 8 * kTiles;
constexpr u32 kColumns = kWarps * kWarpColumns;  // of a block
constexpr u32 kSlots = 3;
constexpr u32 kSlotBytes = KVPACK_SLOT_BYTES;
constexpr u32 kListed = 32;  // pieces of two visits
constexpr u32 kListBytes = 16 * kListed;
constexpr u32 kBarriersBytes = align_up(8 * kSlots, 16);
constexpr u32 kQueryBytes = kGroups * kLanes * 8;  // of eight columns

// Groups of a piece: as many as lie in 4 KiB, scales not counted, and at most eight; of K in 4 bits, whose first groups have 5, half as
// many where a block has more than eight. Without a division, which would be a function.
__device__ constexpr u32 log2_groups_of_piece(u32 side, u32 format) {
  const u32 bits = element_bits(format);
  return bits > 8 ? 1 : bits > 4 || (side == KVPACK_SIDE_K && bits == 4 && kGroups > 8) ? 2 : 3;
}
__device__ constexpr u32 groups_of_piece(u32 side, u32 format) { return 1u << log2_groups_of_piece(side, format); }
__device__ constexpr u32 pieces_of_block(u32 side, u32 format) {
  return (kGroups + groups_of_piece(side, format) - 1) >> log2_groups_of_piece(side, format);
}
// Pieces of a visit. `formats` is K's, plus V's times 256.
__device__ __forceinline__ u32 pieces_of(u32 formats) {
  return pieces_of_block(KVPACK_SIDE_K, formats & 0xFF) + pieces_of_block(KVPACK_SIDE_V, formats >> 8);
}
static_assert(2 * pieces_of_block(KVPACK_SIDE_K, KVPACK_FORMAT_FP16) <= kListed / 2);
// The largest pieces: the first ones.
__device__ constexpr u32 first_piece_bytes(u32 side, u32 format) {
  const u32 groups = groups_of_piece(side, format);
  return group_start(side, format, groups < kGroups ? groups : kGroups);
}
static_assert(first_piece_bytes(KVPACK_SIDE_K, KVPACK_FORMAT_INT4) <= kSlotBytes);
static_assert(first_piece_bytes(KVPACK_SIDE_K, KVPACK_FORMAT_INT3) <= kSlotBytes);
static_assert(first_piece_bytes(KVPACK_SIDE_K, KVPACK_FORMAT_INT8) <= kSlotBytes);
static_assert(first_piece_bytes(KVPACK_SIDE_K, KVPACK_FORMAT_FP16) <= kSlotBytes);
static_assert(first_piece_bytes(KVPACK_SIDE_V, KVPACK_FORMAT_INT8) <= kSlotBytes);

// The pieces of all visits in turn. `number` is that of the next one to use.
struct Pieces {
  u32 slots, list, barriers, thread, number;

  __device__ __forceinline__ Pieces(u32 shared, u32 t)
      : slots(shared), list(slots + kSlots * kSlotBytes), barriers(list + kListBytes), thread(t), number(0) {
#ifdef KVPACK_BULK_COPIES
    if (thread == 0) {
      for (u32 i = 0; i < kSlots; ++i) barrier_init(barriers + 8 * i);
      barrier_init_done();
    }
#endif
  }
  __device__ __forceinline__ u32 listed(u32 piece) const { return list + 16 * (piece % kListed); }

  __device__ __forceinline__ void copy(u32 piece, u32 to) const {
#ifdef KVPACK_BULK_COPIES
    if (thread != 0) return;
#endif
    const uint4 v = load_shared_v4(listed(piece));
    const u8* source = reinterpret_cast<const u8*>(static_cast<u64>(v.y) << 32 | v.x);
    const u32 size = v.z;
#ifdef KVPACK_BULK_COPIES
    if (size > 0) copy_bulk(slots + to * kSlotBytes, source, size, barriers + 8 * to);
#else
    // A loop, not unrolled: otherwise ptxas moves loads of a whole piece to before it, and has no registers for them.
#pragma unroll 1
    for (u32 i = 16 * thread; i < size; i += 16 * kWarps * kLanes) copy_async_16(slots + to * kSlotBytes + i, source + i);
    copy_async_commit();
#endif
  }

  // The first copies; the list is there.
  __device__ __forceinline__ void start() const {
#pragma unroll
    for (u32 i = 0; i < kSlots - 1; ++i) copy(i, i);
  }

  // Formats of the visit whose first piece comes next.
  __device__ __forceinline__ u32 formats() const { return load_shared_u32(listed(number) + 12); }

  // The address of the next piece, which stays until the call after this one.
  __device__ __forceinline__ u32 next() {
    const u32 slot = number % kSlots;
#ifdef KVPACK_BULK_COPIES
    barrier_wait(barriers + 8 * slot, number / kSlots % 2);
#else
    copy_async_wait<kSlots - 2>();
#endif
    __syncthreads();  // all have copied their parts, and are done with the piece before, into whose slot the next copy goes
    copy(number + kSlots - 1, slot == 0 ? kSlots - 1 : slot - 1);
    ++number;
    return slots + slot * kSlotBytes;
  }
};

// The first warp's part: writes the list.
struct Lister {
  const u8* pages;
  const u64* k_entries;
  const u64* v_entries;
  u32 list, lane, head;

  // A visit's pieces, of which the first one has a number; behind the last visit: some of no bytes.
  __device__ __forceinline__ void add(const Visits& seen, u32 visit, u32 number) const {
    u32 here = kSlots - 1, size = 0, formats = 0;
    u64 address = 0;
    if (visit < seen.count) {
      const u32 page = seen.page_of(visit);
      const u64 k_entry = __ldg(k_entries + page), v_entry = __ldg(v_entries + page);
      const u32 of_k = pieces_of_block(KVPACK_SIDE_K, entry_format(k_entry));
      formats = entry_format(k_entry) | entry_format(v_entry) << 8;
      here = pieces_of(formats);

      const bool of_v = lane >= of_k;
      const u64 entry = of_v ? v_entry : k_entry;
      const u32 format = entry_format(entry), piece = of_v ? lane - of_k : lane;
      const u32 side = of_v ? KVPACK_SIDE_V : KVPACK_SIDE_K;
      const u32 groups = groups_of_piece(side, format), first = piece * groups;
      const u32 begin = piece == 0 ? 0 : group_start(side, format, first);
      address = reinterpret_cast<u64>(entry_page(pages, entry)) + static_cast<u64>(head) * block_bytes(side, format) + begin;
      size = group_start(side, format, min(first + groups, kGroups)) - begin;
    }
    if (lane < here) {
      const uint4 v = make_uint4(static_cast<u32>(address), static_cast<u32>(address >> 32), size, formats);
      store_shared_v4(list + 16 * ((number + lane) % kListed), v);
    }
  }
};

typedef Scores TileScores[kTiles];
typedef float Offsets[kTiles][2];  // what the centers of keys add to all scores of a column

__device__ __forceinline__ u32 bf16_of_f16(u32 pair) { return bf16x2_bits(f16_value(pair & 0xFFFF), f16_value(pair >> 16)); }

// Some groups of a piece, of a group format: `group` is the first one's address, `begin` and `end` are those of their queries.
template <u32 format>
__device__ __forceinline__ void multiply_centers(u32 group, u32 begin, u32 end, u32 lane, float (&centers)[kTiles][4]) {
  u32 at = group + kScalesBytes + 8 * (lane % 4);
#pragma unroll 1
  for (u32 operands = begin; operands < end; operands += 8 * kLanes, at += group_header_bytes(KVPACK_SIDE_K, format) + payload_bytes(format)) {
    const uint2 center = load_shared_v2(at);
    const u32 rows[4] = {center.x, 0, center.y, 0};  // eight rows alike, so that every lane has the product of its columns
#pragma unroll
    for (u32 tile = 0; tile < kTiles; ++tile) {
      const uint2 q = load_shared_v2(operands + tile * kQueryBytes + 8 * lane);
      mma_f16(centers[tile], rows, q.x, q.y);
    }
  }
}
template <u32 format>
__device__ __forceinline__ void multiply_groups(u32 group, u32 begin, u32 end, u32 lane, TileScores& scores) {
  constexpr u32 header_bytes = group_header_bytes(KVPACK_SIDE_K, format);
#pragma unroll 1
  for (u32 operands = begin; operands < end; operands += 8 * kLanes, group += header_bytes + payload_bytes(format)) {
    uint2 q[kTiles];
#pragma unroll
    for (u32 tile = 0; tile < kTiles; ++tile) q[tile] = load_shared_v2(operands + tile * kQueryBytes + 8 * lane);
    if constexpr (is_quantized(format)) {
      const uint2 scales = load_shared_v2(group + 8 * (lane % 4));
#pragma unroll
      for (uint2& operand : q) operand = make_uint2(mul_f16x2(operand.x, scales.x), mul_f16x2(operand.y, scales.y));
    } else if constexpr (kBf16) {
#pragma unroll
      for (uint2& operand : q) operand = make_uint2(bf16_of_f16(operand.x), bf16_of_f16(operand.y));
    }
    for_slices<format>(group + header_bytes, lane, [&](u32 slice, const u32 (&a)[4]) {
#pragma unroll
      for (u32 tile = 0; tile < kTiles; ++tile) mma_page<format>(scores[tile][slice], a, q[tile].x, q[tile].y);
    });
  }
}

template <u32 format>
__device__ __forceinline__ void multiply_keys(Pieces& pieces, u32 queries, u32 lane, TileScores& scores, Offsets& offsets) {
  constexpr u32 piece_groups = groups_of_piece(KVPACK_SIDE_K, format);
  constexpr u32 wide = wide_format(KVPACK_SIDE_K, format), thin = thin_format(KVPACK_SIDE_K, format);
  constexpr u32 wide_groups = wide == thin ? kGroups : kWideGroups;
#pragma unroll
  for (u32 tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (u32 slice = 0; slice < kSlices; ++slice)
#pragma unroll
      for (u32 i = 0; i < 4; ++i) scores[tile][slice][i] = 0;
#pragma unroll
  for (u32 tile = 0; tile < kTiles; ++tile) offsets[tile][0] = offsets[tile][1] = 0;
#pragma unroll 1
  for (u32 first = 0; first < kGroups; first += piece_groups) {
    const u32 group = pieces.next();
    const u32 last = min(first + piece_groups, kGroups), change = min(max(first, wide_groups), last);
    const u32 begin = queries + 8 * kLanes * first, middle = queries + 8 * kLanes * change, end = queries + 8 * kLanes * last;
    const u32 thin_group = group + (change - first) * wide_bytes(KVPACK_SIDE_K, format);
    if constexpr (is_quantized(format)) {
      float centers[kTiles][4];
#pragma unroll
      for (u32 tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (u32 i = 0; i < 4; ++i) centers[tile][i] = 0;
      multiply_centers<wide>(group, begin, middle, lane, centers);
      if constexpr (wide != thin) multiply_centers<thin>(thin_group, middle, end, lane, centers);
#pragma unroll
      for (u32 tile = 0; tile < kTiles; ++tile) offsets[tile][0] += centers[tile][0], offsets[tile][1] += centers[tile][1];
    }
    multiply_groups<wide>(group, begin, middle, lane, scores);
    if constexpr (wide != thin) multiply_groups<thin>(thin_group, middle, end, lane, scores);
  }
}

// `scores` are probabilities by now. `slot`: the first piece; `scales`: a lane's, if the format has some. `whole`: all columns see
// all tokens of the page.
template <u32 format>
__device__ __forceinline__ void multiply_values(Pieces& pieces, u32 slot, const uint4& scales, u32 lane, TileScores& scores,
                                                Softmax (&softmax)[kTiles], bool whole) {
  constexpr u32 piece_groups = groups_of_piece(KVPACK_SIDE_V, format);
  add_centers<format, kTiles>(scores, softmax, slot, lane);
  u32 seen[kTiles];
  Operands p[kTiles], rest[kTiles];
#pragma unroll
  for (u32 tile = 0; tile < kTiles; ++tile) {
    seen[tile] = is_quantized(format) || whole ? 0 : seen_bits(scores[tile]);
    to_operands<format>(scores[tile], scales, p[tile], rest[tile]);
  }
#pragma unroll
  for (u32 group = 0; group < kGroups; ++group) {
    if (group > 0 && group % piece_groups == 0) slot = pieces.next();
    if constexpr (!is_quantized(format) && kBf16) __syncwarp();  // loads of later groups stay behind it, and out of registers
    const u32 header = group < piece_groups ? block_header_bytes(KVPACK_SIDE_V, format) : 0;
    const u32 payload = slot + header + group % piece_groups * payload_bytes(format);
    const bool leave_out = !is_quantized(format) && !whole && has_not_finite(payload, lane);
    for_slices<format>(payload, lane, [&](u32 slice, u32 (&a)[4]) {
      if (leave_out) {
#pragma unroll
        for (u32& pair : a) pair &= ~halves_of(find_not_finite<kBf16>(pair));
      }
#pragma unroll
      for (u32 tile = 0; tile < kTiles; ++tile) {
        mma_page<format>(softmax[tile].values[group], a, p[tile][slice][0], p[tile][slice][1]);
      }
      if constexpr (!is_quantized(format) && kBf16) {
#pragma unroll
        for (u32 tile = 0; tile < kTiles; ++tile) {
          mma_page<format>(softmax[tile].values[group], a, rest[tile][slice][0], rest[tile][slice][1]);
        }
      }
    });
    if (leave_out) {
#pragma unroll
      for (u32 tile = 0; tile < kTiles; ++tile) {
        float* sums = softmax[tile].values[group];
        const float4 left_out = sum_not_finite(payload, lane, seen[tile]);
        sums[0] += left_out.x, sums[1] += left_out.y, sums[2] += left_out.z, sums[3] += left_out.w;
      }
    }
  }
}

struct MultiplyKeys {
  Pieces& pieces;
  u32 queries, lane;
  TileScores& scores;
  Offsets& offsets;
  template <u32 format>
  __device__ __forceinline__ void operator()() {
    multiply_keys<format>(pieces, queries, lane, scores, offsets);
  }
};
struct MultiplyValues {
  Pieces& pieces;
  u32 slot;
  const uint4& scales;
  u32 lane;
  TileScores& scores;
  Softmax (&softmax)[kTiles];
  bool whole;
  template <u32 format>
  __device__ __forceinline__ void operator()() {
    multiply_values<format>(pieces, slot, scales, lane, scores, softmax, whole);
  }
};

__device__ __forceinline__ float2 pair_of_floats(u32 pair) {
  if constexpr (kBf16) return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000));
  return make_float2(f16_value(pair & 0xFFFF), f16_value(pair >> 16));
}

extern "C" __global__ void __launch_bounds__(kWarps * 32, KVPACK_BLOCKS_PER_SM)
attention_prefill(const u16* q, u64 q_sequence_stride, u64 q_head_stride, u64 q_token_stride, u16* out, const u8* pages,
                  const u64* table, const u32* lengths, u32 sequences, u32 max_pages, u32 heads, u32 heads_per_kv_head, u32 tokens,
                  u32 window, u32 sinks, float scale KVPACK_SOFTCAP_PARAMETERS KVPACK_SINK_PARAMETERS) {
  KVPACK_DYNAMIC_SHARED(shared);
  const u32 thread = threadIdx.x, lane = thread % kLanes, warp = thread / kLanes;
  const u32 columns = heads_per_kv_head * tokens;
  // Late tiles, which see the most, first.
  const u32 tile_of_block = (columns - 1) / kColumns - blockIdx.x / (heads * sequences);
  const u32 head = blockIdx.x % heads, sequence = blockIdx.x / heads % sequences;
  const u32 first_column = tile_of_block * kColumns, warp_column = first_column + warp * kWarpColumns;
  const u32 length = __ldg(lengths + sequence);

  const u32 of_warps = shared_address(shared) + kSlots * kSlotBytes + kListBytes + kBarriersBytes;
  const u32 queries = of_warps + warp * (kTiles * kQueryBytes + 8 * kWarpColumns);
  const u32 statistics = queries + kTiles * kQueryBytes;
  // The element at which a column's query or result begins.
  auto start_of = [&](u32 column, u64 head_stride, u64 token_stride) {
    const u32 token = column / heads_per_kv_head, of_group = column - token * heads_per_kv_head;
    return (head * heads_per_kv_head + of_group) * head_stride + token * token_stride;
  };
  auto result_of = [&](u32 column) {
    u16* of_sequence = out + static_cast<u64>(sequence) * heads * columns * kHeadDim;
    return reinterpret_cast<u32*>(of_sequence + start_of(column, static_cast<u64>(tokens) * kHeadDim, kHeadDim));
  };
  if (length < (kCausal ? tokens : 1)) {
    constexpr u32 kPairsOfRow = kHeadDim / 2;
    for (u32 i = thread; i < kColumns * kPairsOfRow; i += kWarps * kLanes) {
      const u32 column = first_column + i / kPairsOfRow;
      if (column < columns) result_of(column)[i % kPairsOfRow] = 0;
    }
    return;
  }

  const u32 all_but_new = length - tokens;
  // Tokens that a column attends to, but for a window.
  auto limit_of = [&](u32 column) { return kCausal ? all_but_new + column / heads_per_kv_head + 1 : length; };
  const Visits seen(limit_of(first_column), limit_of(min(first_column + kColumns, columns) - 1), window, sinks);
  const u64* k_entries = table + static_cast<u64>(KVPACK_SIDE_K * sequences + sequence) * max_pages;
  const u64* v_entries = table + static_cast<u64>(KVPACK_SIDE_V * sequences + sequence) * max_pages;
  Pieces pieces(shared_address(shared), thread);
  const Lister lister{pages, k_entries, v_entries, pieces.list, lane, head};
  if (warp == 0) lister.add(seen, 0, 0);
  __syncthreads();
  pieces.start();

  // Queries as operands, divided by a power of two for each column, so that with scales they fit fp16. A lane has column g's.
#pragma unroll 1
  for (u32 tile = 0; tile < kTiles; ++tile) {
    const u32 column = warp_column + 8 * tile + lane / 4;
    const u64 place = sequence * q_sequence_stride + start_of(min(column, columns - 1), q_head_stride, q_token_stride);
    const u32* from = reinterpret_cast<const u32*>(q + place);
    u32 pairs[kGroups][2];
    float largest = 0;
#pragma unroll
    for (u32 m = 0; m < kGroups; ++m)
#pragma unroll
      for (u32 h = 0; h < 2; ++h) pairs[m][h] = __ldg(from + 8 * m + 4 * h + lane % 4);
#pragma unroll
    for (u32 m = 0; m < kGroups; ++m)
#pragma unroll
      for (u32 h = 0; h < 2; ++h) {
        const float2 v = pair_of_floats(pairs[m][h]);
        largest = fmaxf(largest, fmaxf(fabsf(v.x), fabsf(v.y)));
      }
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
    const u32 bounded = min(max(__float_as_uint(largest) >> 23, 32u), 222u);
    const float power = __uint_as_float((bounded + 1) << 23), inverse = __uint_as_float((253 - bounded) << 23);
#pragma unroll
    for (u32 m = 0; m < kGroups; ++m) {
      u32 operand[2];
#pragma unroll
      for (u32 h = 0; h < 2; ++h) {
        const float2 v = pair_of_floats(pairs[m][h]);
        operand[h] = f16x2_bits(v.x * inverse, v.y * inverse);
      }
      store_shared_v2(queries + tile * kQueryBytes + 8 * (kLanes * place_of(m) + lane), make_uint2(operand[0], operand[1]));
    }
    if (lane % 4 == 0) {
      const u32 address = statistics + 64 * tile + lane / 8 * 16 + lane / 4 % 2 * 4;
      store_shared_f32(address, power * scale);
      store_shared_f32(address + 8, kNothing);
    }
  }
  __syncwarp();

  Softmax softmax[kTiles];
#pragma unroll
  for (Softmax& s : softmax) s.clear();
#pragma unroll 1
  for (u32 visit = 0; visit < seen.count; ++visit) {
    const u32 formats = pieces.formats(), first_token = seen.page_of(visit) * kPageTokens;
    if (warp == 0) lister.add(seen, visit + 1, pieces.number + pieces_of(formats));
    TileScores scores;
    Offsets offsets;
    with_format<KVPACK_K_FORMATS>(formats & 0xFF, MultiplyKeys{pieces, queries, lane, scores, offsets});
#if KVPACK_SOFTCAP
#pragma unroll
    for (u32 tile = 0; tile < kTiles; ++tile) {
      const uint2 of_queries = load_shared_v2(statistics + 64 * tile + 16 * (lane % 4));
#pragma unroll
      for (u32 slice = 0; slice < kSlices; ++slice)
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
          float& score = scores[tile][slice][i];
          score = capped((score + offsets[tile][i % 2]) * __uint_as_float(i % 2 == 0 ? of_queries.x : of_queries.y), cap, cap_exponent);
        }
      offsets[tile][0] = offsets[tile][1] = 0;
    }
#endif

    const bool whole = seen.whole(first_token);
    if (!whole) {
#pragma unroll
      for (u32 tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (u32 slice = 0; slice < kSlices; ++slice)
#pragma unroll
          for (u32 i = 0; i < 4; ++i) {
            const u32 column = min(warp_column + 8 * tile + 2 * (lane % 4) + i % 2, columns - 1);
            const u32 token = first_token + 16 * slice + 8 * (i / 2) + lane / 4;
            if (!is_seen(token, limit_of(column), window, sinks)) scores[tile][slice][i] = kUnseen;
          }
    }
#pragma unroll
    for (u32 tile = 0; tile < kTiles; ++tile) {
      Softmax& s = softmax[tile];
      const u32 address = statistics + 64 * tile + 16 * (lane % 4);
      const uint4 bits = load_shared_v4(address);
      // Capped scores have their factor in them.
      const float factor[2] = {KVPACK_SOFTCAP ? 1 : __uint_as_float(bits.x), KVPACK_SOFTCAP ? 1 : __uint_as_float(bits.y)};
      const float before[2] = {__uint_as_float(bits.z), __uint_as_float(bits.w)};
      float maximum[2] = {kUnseen, kUnseen};
#pragma unroll
      for (u32 slice = 0; slice < kSlices; ++slice)
#pragma unroll
        for (u32 i = 0; i < 4; ++i) maximum[i % 2] = fmaxf(maximum[i % 2], scores[tile][slice][i]);
#pragma unroll
      for (u32 j = 0; j < 2; ++j) maximum[j] = fmaxf(before[j], maximum[j] + offsets[tile][j]);
      if (__any_sync(kAllLanes, maximum[0] > before[0] || maximum[1] > before[1])) {
#pragma unroll
        for (float& m : maximum) m = max_over_rows(m);
        s.rescale(exp2_approximate((before[0] - maximum[0]) * factor[0]), exp2_approximate((before[1] - maximum[1]) * factor[1]));
        __syncwarp();  // all have loaded
        if (lane < 4) store_shared_v2(address + 8, make_uint2(__float_as_uint(maximum[0]), __float_as_uint(maximum[1])));
      }
      const float shift[2] = {(maximum[0] - offsets[tile][0]) * factor[0], (maximum[1] - offsets[tile][1]) * factor[1]};
#pragma unroll
      for (u32 slice = 0; slice < kSlices; ++slice)
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
          const float p = exp2_approximate(scores[tile][slice][i] * factor[i % 2] - shift[i % 2]);
          s.sum[i % 2] += p;
          scores[tile][slice][i] = p;
        }
    }
    const u32 slot = pieces.next();
    uint4 scales = make_uint4(0, 0, 0, 0);
    if (kQuantizedValues && formats >> 8 != kFloatFormat) {
      scales = load_shared_v4(slot + 16 * (lane / 4));
      if (!whole) take_scales_apart<kTiles>(scales, scores);
    }
    with_format<KVPACK_V_FORMATS>(formats >> 8, MultiplyValues{pieces, slot, scales, lane, scores, softmax, whole});
  }

#if KVPACK_SINK_LOGITS
  __syncwarp();  // all maxima are there
#endif
  // Results of two columns and one dimension become those of one column, g, and two dimensions.
#pragma unroll
  for (u32 tile = 0; tile < kTiles; ++tile) {
    Softmax& s = softmax[tile];
    // The sum of p of all tokens, and of the logit of the column's head.
    auto with_sink = [&](u32 j, float sum) {
#if KVPACK_SINK_LOGITS
      const u32 address = statistics + 64 * tile + 16 * (lane % 4) + 4 * j;
      const float maximum = load_shared_f32(address + 8) * (KVPACK_SOFTCAP ? 1 : load_shared_f32(address));
      const u32 of_group = min(warp_column + 8 * tile + 2 * (lane % 4) + j, columns - 1) % heads_per_kv_head;
      return sum + exp2_approximate(__ldg(sink_logits + head * heads_per_kv_head + of_group) * log2_e - maximum);
#else
      return sum;
#endif
    };
    const float inverse[2] = {reciprocal(with_sink(0, sum_over_rows(s.sum[0]))), reciprocal(with_sink(1, sum_over_rows(s.sum[1])))};
    const float centers[2] = {sum_over_rows(s.centers[0]), sum_over_rows(s.centers[1])};
    const u32 column = warp_column + 8 * tile + lane / 4;
    u32* to = result_of(column);
#pragma unroll
    for (u32 m = 0; m < kGroups; ++m)
#pragma unroll
      for (u32 h = 0; h < 2; ++h) {
        const float a = (s.values[m][2 * h] + centers[0]) * inverse[0];
        const float b = (s.values[m][2 * h + 1] + centers[1]) * inverse[1];
        const u32 pair = transpose_matrix(kBf16 ? bf16x2_bits(a, b) : f16x2_bits(a, b));
        if (column < columns) to[8 * m + 4 * h + lane % 4] = pair;
      }
  }
}
