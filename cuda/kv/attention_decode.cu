// Attention of a few query tokens to the pages of a KV cache, in place: softmax(q · Kᵀ) · V for each sequence and head. Queries are
// the last tokens of a sequence and see those up to their own (kCausal), or see all.
//
// All query heads of a KV head are multiplied at once. A *column* is a query head and token, eight of them a *tile* (of the queries):
// the eight columns of mma.m16n8k16, whose rows are tokens for K and dimensions for V, so that a lane's part of a page is its own
// operand (page_operands.cuh). With lane = 4·g + c:
//
//   scores    rows tokens 16·s + g, + 8      columns 2·c, 2·c + 1       sums of q · k
//   values    rows dimensions 16·m + g, + 8  columns 2·c, 2·c + 1       sums of p · v
//
// Probabilities become the other operand by transposing 8 × 8 matrices. K's scales are applied to q, V's to the probabilities.
//
// How work is dealt: a *unit* is a page of a *segment*, the pages that a sequence, KV head and tile attends to. All units, in the order of
// segments, are cut into as many even parts as there are blocks; the warps of a block take the pages of its part in turn. At the end of
// a segment they put their sums together; where several blocks share a segment, the last one to arrive adds up what all of them left in
// global memory, in the order of the blocks, so that results do not depend on timing.
//
// How much of the attention a page has (kObserve): for each unit and column, a warp leaves log2 of the sum of p in global memory.
// Whoever finishes a segment knows what the sums are to be divided by, and adds each page's share to its mass. Masses are integers,
// in units of 2^-KVPACK_MASS_FRACTION_BITS: their sums over heads do not depend on the order of the atomic additions.
//
// A head's logit of KVPACK_SINK_LOGITS, whose value is zero, is added by whoever finishes a segment: once.
//
// A warp copies what it will need into a ring of its own, kSlots − 1 *pieces* ahead: two groups of K or V (one, of an odd number), or one of
// 16 bits.
//
// Shared memory: ring of each warp | barriers of its slots | queries as operands; in their place later the sums | maxima and sums of warps | factors.
#include "kv/attention.cuh"

constexpr u32 kWarps = KVPACK_WARPS;
constexpr u32 kSlots = KVPACK_SLOTS;
constexpr u32 kPieceGroups = kGroups % 2 == 0 ? 2 : 1;
constexpr u32 kPieces = kGroups / kPieceGroups;  // of a block that is quantized
constexpr u32 kThinPieces = (kGroups - kWideGroups) / kPieceGroups;  // the last ones of K
static_assert(kWideGroups % kPieceGroups == 0, "groups of a piece have one width");
constexpr u32 kSlotBytes = KVPACK_SLOT_BYTES;
constexpr u32 kBarriersBytes = kWarps * kSlots * 8;
constexpr u32 kRingBytes = kSlots * kSlotBytes;
constexpr u32 kColumns = 8;
constexpr u32 kQueryBytes = kGroups * kLanes * 8;  // as fp16; as bf16 once more
constexpr u32 kSumsBytes = 4 * kColumns * kHeadDim;
constexpr u32 kQueryAreaBytes = (kBf16 ? 2 : 1) * kQueryBytes > kSumsBytes ? (kBf16 ? 2 : 1) * kQueryBytes : kSumsBytes;
constexpr u32 kStatisticsBytes = 4 * 2 * kColumns * kWarps;
constexpr bool kObserve = KVPACK_OBSERVE;
constexpr u32 kPartial = 1u << KVPACK_ENTRY_FORMAT_BITS;  // beside a page's format: not all columns see all of its tokens
constexpr float kMassUnits = u64{1} << KVPACK_MASS_FRACTION_BITS;  // of a mass of 1

// What a launch works on.
struct Work {
  const u8* pages;
  const u64* table;    // [2, sequences, max_pages]
  const u32* lengths;  // tokens of each sequence, new ones included
  u32 sequences, max_pages;
  u32 tiles, heads;  // of a sequence
  u32 tokens;        // of a query
  u32 window, sinks;

  // The sequence must be long enough: causal, it has all tokens of the query; else it has any token.
  __device__ __forceinline__ Visits visits(u32 length) const { return {kCausal ? length - tokens + 1 : length, length, window, sinks}; }
  __device__ __forceinline__ u32 visited_pages(u32 sequence) const {
    const u32 length = __ldg(lengths + sequence);
    return length < (kCausal ? tokens : 1) ? 0 : visits(length).count;
  }
  __device__ __forceinline__ const u64* entry(u32 side, u32 sequence, u32 page) const {
    return table + (static_cast<u64>(side) * sequences + sequence) * max_pages + page;
  }
};

// A segment, and the number of its first unit.
struct Segment {
  u32 sequence, part;  // part: head · tiles + tile
  u32 first, units;

  __device__ __forceinline__ u32 end() const { return first + units; }
  __device__ __forceinline__ void advance(const Work& work) {
    first += units;
    if (++part < work.heads * work.tiles) return;
    part = 0;
    units = 0;
    while (units == 0 && ++sequence < work.sequences) units = work.visited_pages(sequence);
  }
};

// What is copied of one side of a unit: `left` pieces of `bytes`, of the last kThinPieces in the upper half; the first one of V has the
// block's scales and centers in front.
struct Block {
  const u8* source;
  u32 left, bytes, first_bytes;
};

__device__ __forceinline__ Block block_of(const u8* pages, u32 side, u64 entry, u32 head) {
  const u32 format = entry_format(entry);
  const bool quantized = is_quantized(format);
  Block block;
  block.source = entry_page(pages, entry) + static_cast<u64>(head) * block_bytes(side, format);
  block.left = quantized ? kPieces : kGroups;
  block.bytes = (quantized ? kPieceGroups : 1) * (wide_bytes(side, format) | thin_bytes(side, format) << 16);
  block.first_bytes = block_header_bytes(side, format);
  return block;
}

// A warp's copies ahead of their use. K and V of a unit follow each other; kSlots − 1 pieces are on their way, no more than a block
// has, so that at any time they are of one block and the one after it: `following`, which is to be set when a block's use begins.
struct Ring {
  u32 base, lane;
  Block block, following;
  u32 filled, used;  // numbers of slots
#ifdef KVPACK_BULK_COPIES
  u32 barriers, parity;
#endif

  __device__ __forceinline__ Ring(u32 ring_address, u32 barriers_address, u32 l, const Block& first)
      : base(ring_address), lane(l), block(first), filled(0), used(0) {
    static_assert(kSlots - 1 <= kPieces);
#ifdef KVPACK_BULK_COPIES
    barriers = barriers_address, parity = 0;
    if (lane < kSlots) barrier_init(barriers + 8 * lane);
    barrier_init_done();
    __syncwarp();
#endif
#pragma unroll 1
    for (u32 i = 0; i + 1 < kSlots; ++i) copy_one();
  }
  static __device__ __forceinline__ u32 after(u32 slot) { return slot + 1 == kSlots ? 0 : slot + 1; }

  __device__ __forceinline__ void copy_one() {
    const u32 size = (block.left > kThinPieces ? block.bytes & 0xFFFF : block.bytes >> 16) + block.first_bytes, to = base + filled * kSlotBytes;
#ifdef KVPACK_BULK_COPIES
    if (lane == 0 && size > 0) copy_bulk(to, block.source, size, barriers + 8 * filled);
#else
    const u8* from = block.source + 16 * lane;
#pragma unroll
    for (u32 i = 0; i < (kSlotBytes + 16 * kLanes - 1) / (16 * kLanes); ++i) {
      if (16 * (kLanes * i + lane) < size) copy_async_16(to + 16 * (kLanes * i + lane), from + 16 * kLanes * i);
    }
    copy_async_commit();
#endif
    block.source += size;
    block.first_bytes = 0;
    --block.left;
    filled = after(filled);
  }

  // The address of the next piece, which stays until the call after this one.
  __device__ __forceinline__ u32 next() {
#ifdef KVPACK_BULK_COPIES
    barrier_wait(barriers + 8 * used, parity);
#else
    copy_async_wait<kSlots - 2>();
#endif
    __syncwarp();  // all lanes are done with the piece before, into whose slot the next copy goes
    if (block.left == 0) block = following;
    copy_one();
    const u32 slot = base + used * kSlotBytes;
    used = after(used);
#ifdef KVPACK_BULK_COPIES
    parity ^= used == 0;
#endif
    return slot;
  }
};

// Adds the scores of some pieces of a group format, but for what centers give to all tokens of a column alike. Queries are at `operands`.
template <u32 format>
__device__ __forceinline__ void multiply_pieces(Ring& ring, u32 pieces, u32& operands, u32 lane, Scores& scores, float (&centers)[4]) {
  constexpr u32 piece_groups = is_quantized(format) ? kPieceGroups : 1;
  constexpr u32 header_bytes = group_header_bytes(KVPACK_SIDE_K, format);
#pragma unroll 1
  for (u32 piece = 0; piece < pieces; ++piece) {
    const u32 slot = ring.next();
#pragma unroll
    for (u32 i = 0; i < piece_groups; ++i, operands += 8 * kLanes) {
      const u32 group = slot + i * (header_bytes + payload_bytes(format));
      uint2 q = load_shared_v2(operands);
      if constexpr (is_quantized(format)) {
        const uint2 center = load_shared_v2(group + kScalesBytes + 8 * (lane % 4));
        const u32 rows[4] = {center.x, 0, center.y, 0};  // eight rows alike, so that every lane has the product of its columns
        mma_f16(centers, rows, q.x, q.y);
        const uint2 scales = load_shared_v2(group + 8 * (lane % 4));
        q = make_uint2(mul_f16x2(q.x, scales.x), mul_f16x2(q.y, scales.y));
      }
      for_slices<format>(group + header_bytes, lane, [&](u32 slice, const u32 (&a)[4]) { mma_page<format>(scores[slice], a, q.x, q.y); });
    }
  }
}

// Scores, but for an `offset` that all tokens of a column have.
template <u32 format>
__device__ __forceinline__ void multiply_keys(Ring& ring, u32 queries, u32 lane, Scores& scores, float (&offset)[2]) {
  constexpr u32 wide = wide_format(KVPACK_SIDE_K, format), thin = thin_format(KVPACK_SIDE_K, format);
  constexpr u32 pieces = is_quantized(format) ? kPieces : kGroups;
  float centers[4] = {0, 0, 0, 0};
  u32 operands = queries + (is_quantized(format) || !kBf16 ? 0 : kQueryBytes) + 8 * lane;
  multiply_pieces<wide>(ring, wide == thin ? pieces : kPieces - kThinPieces, operands, lane, scores, centers);
  if constexpr (wide != thin) multiply_pieces<thin>(ring, kThinPieces, operands, lane, scores, centers);
  offset[0] = centers[0], offset[1] = centers[1];
}

// `scores` are probabilities by now. `slot`: the first piece; `scales`: a lane's, if the format has some. `whole`: all columns see
// all tokens of the page.
template <u32 format>
__device__ __forceinline__ void multiply_values(Ring& ring, u32 slot, const uint4& scales, u32 lane, Scores& scores, Softmax& softmax,
                                                bool whole) {
  constexpr u32 piece_groups = is_quantized(format) ? kPieceGroups : 1;
  const u32 seen = is_quantized(format) || whole ? 0 : seen_bits(scores);
  Operands p, rest;
  add_centers<format, 1>(&scores, &softmax, slot, lane);
  to_operands<format>(scores, scales, p, rest);
#pragma unroll
  for (u32 group = 0; group < kGroups; ++group) {
    if (group > 0 && group % piece_groups == 0) slot = ring.next();
    if constexpr (!is_quantized(format) && kBf16) __syncwarp();  // loads of later groups stay behind it, and out of registers
    const u32 header = group < piece_groups ? block_header_bytes(KVPACK_SIDE_V, format) : 0;
    const u32 payload = slot + header + group % piece_groups * payload_bytes(format);
    float* sums = softmax.values[group];
    const bool leave_out = !is_quantized(format) && !whole && has_not_finite(payload, lane);
    for_slices<format>(payload, lane, [&](u32 slice, u32 (&a)[4]) {
      if (leave_out) {
#pragma unroll
        for (u32& pair : a) pair &= ~halves_of(find_not_finite<kBf16>(pair));
      }
      mma_page<format>(sums, a, p[slice][0], p[slice][1]);
      if constexpr (!is_quantized(format) && kBf16) mma_page<format>(sums, a, rest[slice][0], rest[slice][1]);
    });
    if (leave_out) {
      const float4 left_out = sum_not_finite(payload, lane, seen);
      sums[0] += left_out.x, sums[1] += left_out.y, sums[2] += left_out.z, sums[3] += left_out.w;
    }
  }
}

struct MultiplyKeys {
  Ring& ring;
  u32 queries, lane;
  Scores& scores;
  float (&offset)[2];
  template <u32 format>
  __device__ __forceinline__ void operator()() {
    multiply_keys<format>(ring, queries, lane, scores, offset);
  }
};
struct MultiplyValues {
  Ring& ring;
  u32 slot;
  const uint4& scales;
  u32 lane;
  Scores& scores;
  Softmax& softmax;
  bool whole;
  template <u32 format>
  __device__ __forceinline__ void operator()() {
    multiply_values<format>(ring, slot, scales, lane, scores, softmax, whole);
  }
};

__device__ __forceinline__ float query_value(u32 bits) {
  return kBf16 ? __uint_as_float(bits << 16) : f16_value(bits);
}

// log2 of a sum over rows and lanes, of `a` in lanes that are not `odd` (lane / 4 is even), of `b` in the others.
__device__ __forceinline__ float log2_of_sum(float a, float b, bool odd) {
  float sum = (odd ? b : a) + __shfl_xor_sync(kAllLanes, odd ? a : b, 4);
  sum += __shfl_xor_sync(kAllLanes, sum, 8);
  sum += __shfl_xor_sync(kAllLanes, sum, 16);
  return __log2f(sum);
}

// A segment's units, each to the mass of its page: Σ of columns, 2^(log - maximum) · worth. Maxima and worths are in shared memory.
__device__ __forceinline__ void add_masses(const Work& work, const Segment& segment, u32 totals, const float* page_logs, u64* mass) {
  constexpr u32 kBatch = 4;  // loads of so many units are under way at once
  const Visits seen = work.visits(__ldg(work.lengths + segment.sequence));
  const float4* logs = reinterpret_cast<const float4*>(page_logs) + static_cast<u64>(segment.first) * (kColumns / 4);
#pragma unroll 1
  for (u32 first = threadIdx.x; first < segment.units; first += kBatch * kWarps * kLanes) {
    float4 of_units[kBatch][2];
#pragma unroll
    for (u32 i = 0; i < kBatch; ++i) {
      const u32 visit = min(first + i * kWarps * kLanes, segment.units - 1);
#pragma unroll
      for (u32 j = 0; j < 2; ++j) of_units[i][j] = load_l2_v4(logs + 2 * visit + j);
    }
#pragma unroll
    for (u32 i = 0; i < kBatch; ++i) {
      const u32 visit = first + i * kWarps * kLanes;
      float sum = 0;
#pragma unroll
      for (u32 j = 0; j < 2; ++j) {
        const float4 log = of_units[i][j];
        const uint4 maximum = load_shared_v4(totals + 16 * j), worth = load_shared_v4(totals + 4 * kColumns + 16 * j);
        sum += exp2_approximate(log.x - __uint_as_float(maximum.x)) * __uint_as_float(worth.x);
        sum += exp2_approximate(log.y - __uint_as_float(maximum.y)) * __uint_as_float(worth.y);
        sum += exp2_approximate(log.z - __uint_as_float(maximum.z)) * __uint_as_float(worth.z);
        sum += exp2_approximate(log.w - __uint_as_float(maximum.w)) * __uint_as_float(worth.w);
      }
      if (visit < segment.units && sum > 0) atomicAdd(mass + seen.page_of(visit), __float2ull_rn(sum));  // what is NaN would be 2^63
    }
  }
}

extern "C" __global__ void __launch_bounds__(kWarps * 32, KVPACK_BLOCKS_PER_SM)
attention_decode(const u16* q, u64 q_sequence_stride, u64 q_head_stride, u64 q_token_stride, u16* out, const u8* pages, const u64* table,
                 const u32* lengths, u32 sequences, u32 max_pages, u32 heads, u32 heads_per_kv_head, u32 tokens, u32 window, u32 sinks,
                 float scale KVPACK_SOFTCAP_PARAMETERS KVPACK_SINK_PARAMETERS, float* partials, u32* semaphores, float* page_logs, u64* mass,
                 u64 mass_sequence_stride, u32* steps, const float* weights) {
  KVPACK_DYNAMIC_SHARED(shared);
  const u32 thread = threadIdx.x, lane = thread % kLanes, warp = thread / kLanes;
  const u32 columns = heads_per_kv_head * tokens;
  const Work work{pages, table, lengths, sequences, max_pages, ceil_div(columns, kColumns), heads, tokens, window, sinks};
  const u32 parts = work.heads * work.tiles;

  const u32 ring_address = shared_address(shared) + warp * kRingBytes;
  const u32 barriers = shared_address(shared) + kWarps * kRingBytes;
  const u32 query_area = barriers + align_up(kBarriersBytes, 16);
  const u32 statistics = query_area + kQueryAreaBytes;
  const u32 factors = statistics + kStatisticsBytes;

  // All units, and this block's: lanes look at 32 sequences at a time.
  auto scan = [&](u32 first, u32& units, u32& until) {
    units = first + lane < sequences ? work.visited_pages(first + lane) : 0;
    until = units;  // of this sequence and those before it
#pragma unroll
    for (u32 step = 1; step < kLanes; step *= 2) {
      const u32 before = __shfl_up_sync(kAllLanes, until, step);
      if (lane >= step) until += before;
    }
  };
  u32 units, until;
  scan(0, units, until);
  u32 total = __shfl_sync(kAllLanes, until, kLanes - 1);
#pragma unroll 1
  for (u32 first = kLanes; first < sequences; first += kLanes) {
    total += __reduce_add_sync(kAllLanes, first + lane < sequences ? work.visited_pages(first + lane) : 0);
  }
  total *= parts;
  const u32 blocks = min(gridDim.x, total);  // none without a unit, so that all of a segment's arrive
  // total · block / blocks without 64-bit division: block < blocks < 2^16.
  const u32 quotient = blocks == 0 ? 0 : total / blocks, remainder = total - quotient * blocks;
  auto first_unit = [&](u32 block) { return quotient * block + remainder * block / blocks; };
  auto block_with = [&](u32 unit) {
    u32 block = static_cast<u32>(static_cast<float>(unit) * blocks / total);  // or a neighbour
    while (first_unit(block) > unit) --block;
    while (first_unit(block + 1) <= unit) ++block;
    return block;
  };
  // Sequences that are too short have no units; their results are 0.
  for (u32 sequence = blockIdx.x; sequence < sequences; sequence += gridDim.x) {
    if (work.visited_pages(sequence) != 0) {
      if constexpr (kObserve) {
        if (thread == 0) atomicAdd(steps + sequence, 1u);
      }
      continue;
    }
    const u64 size = static_cast<u64>(heads) * columns * kHeadDim;
    for (u64 i = thread; i < size; i += kWarps * kLanes) out[sequence * size + i] = 0;
  }
  if (blockIdx.x >= blocks) return;
  const u32 begin = first_unit(blockIdx.x), end = first_unit(blockIdx.x + 1);

  Segment segment{0, 0, 0, 0};
#pragma unroll 1
  for (u32 first = 0;; first += kLanes) {
    if (first > 0) scan(first, units, until);
    const u32 behind = __ballot_sync(kAllLanes, segment.first + until * parts > begin);
    if (behind != 0) {
      const u32 found = __ffs(behind) - 1;
      segment.sequence = first + found;
      segment.units = __shfl_sync(kAllLanes, units, found);
      segment.first += (__shfl_sync(kAllLanes, until, found) - segment.units) * parts;
      break;
    }
    segment.first += __shfl_sync(kAllLanes, until, kLanes - 1) * parts;
  }
  segment.part = (begin - segment.first) / segment.units;
  segment.first += segment.part * segment.units;

  // Entries of the unit after the one in use; none behind the last.
  Segment ahead = segment;
  u32 unit = begin + warp;
  u64 next_k = 0, next_v = 0;
  auto load_entries = [&](u32 of) {
    if (of >= end) return;
    while (of >= ahead.end()) ahead.advance(work);
    const u32 page = work.visits(__ldg(lengths + ahead.sequence)).page_of(of - ahead.first);
    next_k = __ldg(work.entry(KVPACK_SIDE_K, ahead.sequence, page));
    next_v = __ldg(work.entry(KVPACK_SIDE_V, ahead.sequence, page));
  };
  // A column of the queries, a lane's dimensions, as they lie in memory: nothing waits for them yet.
  constexpr u32 kLaneDims = (kHeadDim + kLanes - 1) / kLanes;
  u32 query[kLaneDims];
  auto load_query = [&](const Segment& of, u32 column) {
    const u32 index = of.part % work.tiles * kColumns + column;
    const u16* from = q + of.sequence * q_sequence_stride +
                      (of.part / work.tiles * heads_per_kv_head + index % heads_per_kv_head) * q_head_stride +
                      index / heads_per_kv_head * q_token_stride;
#pragma unroll
    for (u32 i = 0; i < kLaneDims; ++i) {
      const u32 dim = kLanes * i + lane;
      query[i] = index < columns && dim < kHeadDim ? __ldg(from + dim) : 0;
    }
  };
  const Block nothing{nullptr, 0xFFFFFFFFu, 0, 0};
  load_entries(unit);
  load_query(segment, warp);  // before copies of pages, behind which it would have to wait
  bool query_is_loaded = true;
  Ring ring(ring_address, barriers + 8 * kSlots * warp, lane, unit < end ? block_of(pages, KVPACK_SIDE_K, next_k, ahead.part / work.tiles) : nothing);
  Softmax softmax;
  Scores scores;

  for (; segment.first < end; segment.advance(work)) {
    const u32 head = segment.part / work.tiles, tile = segment.part % work.tiles;
    const u32 length = __ldg(lengths + segment.sequence);
    // Queries as operands, divided by a power of two for each column, so that with scales they fit fp16.
    for (u32 column = warp; column < kColumns; column += kWarps) {
      if (!query_is_loaded) load_query(segment, column);
      query_is_loaded = false;
      float largest = 0;
#pragma unroll
      for (u32 i = 0; i < kLaneDims; ++i) largest = fmaxf(largest, fabsf(query_value(query[i])));
      const u32 exponent = __reduce_max_sync(kAllLanes, __float_as_uint(largest)) >> 23;
      const u32 bounded = min(max(exponent, 32u), 222u);
      const float power = __uint_as_float((bounded + 1) << 23), inverse = __uint_as_float((253 - bounded) << 23);
#pragma unroll
      for (u32 i = 0; i < kLaneDims; ++i) {
        const u32 dim = kLanes * i + lane;
        if (dim >= kHeadDim) break;
        const u32 place = kLanes * place_of(dim / 16) + 4 * column + dim % 8 / 2;
        const u32 address = query_area + 8 * place + dim % 16 / 8 * 4 + dim % 2 * 2;
        store_shared_u16(address, f16_bits(query_value(query[i]) * inverse));
        if constexpr (kBf16) store_shared_u16(address + kQueryBytes, bf16_bits(query_value(query[i]) * inverse));
      }
      if (lane == 0) store_shared_f32(factors + 4 * column, power * scale);
    }
    __syncthreads();
    const float of_query[2] = {load_shared_f32(factors + 8 * (lane % 4)), load_shared_f32(factors + 8 * (lane % 4) + 4)};
    const float factor[2] = {KVPACK_SOFTCAP ? 1 : of_query[0], KVPACK_SOFTCAP ? 1 : of_query[1]};  // capped scores have it in them

    softmax.clear();
    float maximum[2] = {kNothing, kNothing};
    const u32 last = min(segment.end(), end);
#pragma unroll 1
    while (unit < last) {
      const u32 k_format = entry_format(next_k);
      u32 v_format = entry_format(next_v);  // and kPartial
      const u32 first_token = work.visits(length).page_of(unit - segment.first) * kPageTokens;
      ring.following = block_of(pages, KVPACK_SIDE_V, next_v, head);
      unit += kWarps;
      load_entries(unit);
#pragma unroll
      for (u32 slice = 0; slice < kSlices; ++slice)
#pragma unroll
        for (u32 i = 0; i < 4; ++i) scores[slice][i] = 0;
      float offset[2];
      with_format<KVPACK_K_FORMATS>(k_format, MultiplyKeys{ring, query_area, lane, scores, offset});
#if KVPACK_SOFTCAP
#pragma unroll
      for (u32 slice = 0; slice < kSlices; ++slice)
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
          scores[slice][i] = capped((scores[slice][i] + offset[i % 2]) * of_query[i % 2], cap, cap_exponent);
        }
      offset[0] = offset[1] = 0;
#endif

      const Visits seen = work.visits(length);
      if (!seen.whole(first_token)) {
        v_format |= kPartial;
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
          const u32 column = tile * kColumns + 2 * (lane % 4) + i;
          const u32 limit = seen.whole_to + (kCausal ? min(column / heads_per_kv_head, tokens - 1) : 0);
#pragma unroll
          for (u32 slice = 0; slice < kSlices; ++slice)
#pragma unroll
            for (u32 h = 0; h < 2; ++h) {
              if (!is_seen(first_token + 16 * slice + 8 * h + lane / 4, limit, window, sinks)) scores[slice][2 * h + i] = kUnseen;
            }
        }
      }
      float larger[2] = {kUnseen, kUnseen};
#pragma unroll
      for (u32 slice = 0; slice < kSlices; ++slice)
#pragma unroll
        for (u32 i = 0; i < 4; ++i) larger[i % 2] = fmaxf(larger[i % 2], scores[slice][i]);
#pragma unroll
      for (u32 j = 0; j < 2; ++j) larger[j] = fmaxf(maximum[j], max_over_rows(larger[j]) + offset[j]);
      if (__any_sync(kAllLanes, larger[0] > maximum[0] || larger[1] > maximum[1])) {
        softmax.rescale(exp2_approximate((maximum[0] - larger[0]) * factor[0]), exp2_approximate((maximum[1] - larger[1]) * factor[1]));
        maximum[0] = larger[0], maximum[1] = larger[1];
      }
      const float shift[2] = {(maximum[0] - offset[0]) * factor[0], (maximum[1] - offset[1]) * factor[1]};
      const float sum_before[2] = {softmax.sum[0], softmax.sum[1]};
#pragma unroll
      for (u32 slice = 0; slice < kSlices; ++slice)
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
          const float p = exp2_approximate(scores[slice][i] * factor[i % 2] - shift[i % 2]);
          softmax.sum[i % 2] += p;
          scores[slice][i] = p;
        }
      if constexpr (kObserve) {
        // The page's sum as a difference: sums of its own would be an addition more for each p, or round softmax.sum otherwise. Of a lane's
        // eight p, it is off by at most 2^-21 of all the lane has summed; 0, thus -inf, if no token is seen.
        const bool odd = lane / 4 % 2 != 0;
        const float log = log2_of_sum(softmax.sum[0] - sum_before[0], softmax.sum[1] - sum_before[1], odd);
        const float exponent = odd ? maximum[1] * factor[1] : maximum[0] * factor[0];
        if (lane < kColumns) page_logs[(unit - kWarps) * kColumns + lane] = exponent + log;  // 2^32 of them would be 16 GiB
      }
      ring.following = unit < end ? block_of(pages, KVPACK_SIDE_K, next_k, ahead.part / work.tiles) : nothing;
      const u32 slot = ring.next();
      uint4 scales = make_uint4(0, 0, 0, 0);
      if (kQuantizedValues && v_format % kPartial != kFloatFormat) {
        scales = load_shared_v4(slot + 16 * (lane / 4));
        if (v_format >= kPartial) take_scales_apart<1>(scales, &scores);
      }
      with_format<KVPACK_V_FORMATS>(v_format % kPartial, MultiplyValues{ring, slot, scales, lane, scores, softmax, v_format < kPartial});
    }

    const bool alone = segment.first >= begin && segment.end() <= end;
    const u32 number = segment.sequence * parts + segment.part;
    const u32 here = min(kColumns, columns - tile * kColumns), pairs = ceil_div(here, 2);  // columns of this tile
    // A place in global memory for each block and segment that meet: 8 · head_dim sums, columns 2·c and 2·c + 1 side by side as
    // float4 [groups][c][g]; maximum and sum of each column.
    constexpr u32 kPlace = kColumns * (kHeadDim + 2);
    float4* place = reinterpret_cast<float4*>(partials + static_cast<u64>(blockIdx.x + number) * kPlace);
    // These take the place of the warps' statistics: each column's maximum, then what p relative to it is worth in units of mass.
    auto keep_total = [&](u32 column, float largest, float sum) {
      const u32 index = tile * kColumns + column, of_group = index % heads_per_kv_head;
      const float of_head = weights == nullptr ? 1.0f / (heads * heads_per_kv_head) : __ldg(weights + head * heads_per_kv_head + of_group);
      const u32 at = statistics + 4 * (column / 2 + column % 2 * 4);
      store_shared_f32(at, column < here ? largest : 0.0f);
      store_shared_f32(at + 4 * kColumns, column < here ? kMassUnits * of_head / (sum * tokens) : 0.0f);
    };

    // The sum of p of all of a segment's tokens, and of the logit of the column's head.
    auto with_sink = [&](u32 column, float largest, float sum) {
#if KVPACK_SINK_LOGITS
      const float* logit = sink_logits + head * heads_per_kv_head + (tile * kColumns + column) % heads_per_kv_head;
      return sum + exp2_approximate(__ldg(logit) * log2_e - largest);
#else
      return sum;
#endif
    };

    // The warps put their parts together: maxima first, then in turn their sums, as they lie in registers.
    maximum[0] *= factor[0], maximum[1] *= factor[1];
#pragma unroll
    for (u32 j = 0; j < 2; ++j) {
      softmax.sum[j] = sum_over_rows(softmax.sum[j]);
      softmax.centers[j] = sum_over_rows(softmax.centers[j]);
      if (lane < 4) store_shared_f32(statistics + 4 * (kColumns * warp + 2 * lane + j), maximum[j]);
    }
    __syncthreads();
    auto maximum_of = [&](u32 column) {
      float largest = kNothing;
#pragma unroll
      for (u32 w = 0; w < kWarps; ++w) largest = fmaxf(largest, load_shared_f32(statistics + 4 * (kColumns * w + column)));
      return largest;
    };
    float weight[2];
#pragma unroll
    for (u32 j = 0; j < 2; ++j) {
      weight[j] = exp2_approximate(maximum[j] - maximum_of(2 * (lane % 4) + j));
      if (lane < 4) store_shared_f32(statistics + 4 * (kColumns * (kWarps + warp) + 2 * lane + j), softmax.sum[j] * weight[j]);
    }
#pragma unroll 1
    for (u32 w = 0; w < kWarps; ++w) {
      if (w == warp) {
        constexpr u32 kBatch = kGroups % 4 == 0 ? 4 : kGroups % 3 == 0 ? 3 : kGroups % 2 == 0 ? 2 : 1;  // loads under way at once
#pragma unroll
        for (u32 first = 0; first < kGroups; first += kBatch) {
          float4 sums[kBatch];
#pragma unroll
          for (u32 i = 0; i < kBatch; ++i) {
            sums[i] = w == 0 ? make_float4(0, 0, 0, 0) : load_shared_f32x4(query_area + 16 * (kLanes * (first + i) + lane));
          }
#pragma unroll
          for (u32 i = 0; i < kBatch; ++i) {
            const float* values = softmax.values[first + i];
            sums[i].x += (values[0] + softmax.centers[0]) * weight[0], sums[i].y += (values[1] + softmax.centers[1]) * weight[1];
            sums[i].z += (values[2] + softmax.centers[0]) * weight[0], sums[i].w += (values[3] + softmax.centers[1]) * weight[1];
            if (w + 1 < kWarps || alone) {
              store_shared_f32x4(query_area + 16 * (kLanes * (first + i) + lane), sums[i]);
            } else if (lane % 4 < pairs) {
              place[kLanes * (first + i) + 8 * (lane % 4) + lane / 4] = sums[i];
            }
          }
        }
      }
      __syncthreads();
      if (w == 0 && thread < kColumns) {  // all sums of p are there; this warp's turn is over
        const float largest = maximum_of(thread);
        float sum = 0;
#pragma unroll
        for (u32 v = 0; v < kWarps; ++v) sum += load_shared_f32(statistics + 4 * (kColumns * (kWarps + v) + thread));
        if (alone) sum = with_sink(thread, largest, sum);
        if (alone) store_shared_f32(factors + 4 * thread, 1.0f / sum);
        else if (thread < here) reinterpret_cast<float2*>(place + kGroups * kLanes)[thread] = make_float2(largest, sum);
        if constexpr (kObserve) {
          __syncwarp(0xFF);
          if (alone) keep_total(thread, largest, sum);
        }
      }
    }

    // Parts of the sums that lie side by side in shared memory: four pairs of columns, or parts of fewer pairs.
    u32 shares = 1;
    bool complete = alone;  // this block has the segment's sums
    if (!alone) {
      const u32 first_block = block_with(segment.first), arrivals = block_with(segment.end() - 1) - first_block + 1;
      const u32 is_last = statistics + kStatisticsBytes - 4;
      if (thread == 0) {
        fence_device();
        const u32 before = atomicAdd(semaphores + number, 1u);
        if (before + 1 == arrivals) {
          fence_device();
          atomicExch(semaphores + number, 0u);
        }
        store_shared_u32(is_last, before + 1 == arrivals);
      }
      __syncthreads();
      complete = load_shared_u32(is_last) != 0;
      if (complete) {
        shares = 4 / pairs;
        constexpr u32 kMine = (kGroups + kWarps - 1) / kWarps, kBatch = kMine == 1 ? 8 : 4;
        const u32 c = lane % 4, pair = c % pairs, share = c / pairs;
        const float4* places = reinterpret_cast<const float4*>(partials + static_cast<u64>(first_block + number) * kPlace);
        float larger[2] = {kNothing, kNothing}, sum[2] = {0, 0};
        float4 value[kMine];
#pragma unroll
        for (u32 i = 0; i < kMine; ++i) value[i] = make_float4(0, 0, 0, 0);
#pragma unroll 1
        for (u32 part = share; part < arrivals && share < shares; part += shares * kBatch) {
          float4 of_part[kBatch], values[kBatch][kMine];  // maximum and sum of two columns; sums
#pragma unroll
          for (u32 b = 0; b < kBatch; ++b) {
            const float4* at = places + static_cast<u64>(min(part + b * shares, arrivals - 1)) * (kPlace / 4);
            of_part[b] = load_l2_v4(at + kGroups * kLanes + pair);
#pragma unroll
            for (u32 i = 0; i < kMine; ++i) {
              values[b][i] = load_l2_v4(at + kLanes * min(warp + i * kWarps, kGroups - 1) + 8 * pair + lane / 4);
            }
          }
          const float before[2] = {larger[0], larger[1]};
#pragma unroll
          for (u32 b = 0; b < kBatch; ++b) {
            if (part + b * shares >= arrivals) of_part[b] = make_float4(kUnseen, 0, kUnseen, 0);
            larger[0] = fmaxf(larger[0], of_part[b].x), larger[1] = fmaxf(larger[1], of_part[b].z);
          }
          const float kept[2] = {exp2_approximate(before[0] - larger[0]), exp2_approximate(before[1] - larger[1])};
          sum[0] *= kept[0], sum[1] *= kept[1];
#pragma unroll
          for (u32 i = 0; i < kMine; ++i) value[i].x *= kept[0], value[i].y *= kept[1], value[i].z *= kept[0], value[i].w *= kept[1];
#pragma unroll
          for (u32 b = 0; b < kBatch; ++b) {
            const float now[2] = {exp2_approximate(of_part[b].x - larger[0]), exp2_approximate(of_part[b].z - larger[1])};
            sum[0] += of_part[b].y * now[0], sum[1] += of_part[b].w * now[1];
#pragma unroll
            for (u32 i = 0; i < kMine; ++i) {
              value[i].x += values[b][i].x * now[0], value[i].y += values[b][i].y * now[1];
              value[i].z += values[b][i].z * now[0], value[i].w += values[b][i].w * now[1];
            }
          }
        }
#pragma unroll
        for (u32 i = 0; i < kMine; ++i) {
          if (warp + i * kWarps < kGroups) store_shared_f32x4(query_area + 16 * (kLanes * (warp + i * kWarps) + lane), value[i]);
        }
        if (warp == 0) {
#pragma unroll
          for (u32 j = 0; j < 2; ++j) {
            float largest = larger[j];
            for (u32 step = pairs; shares > 1 && step < 4; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, step));
            const float of_share = exp2_approximate(larger[j] - largest);
            float all = sum[j] * of_share;
            for (u32 step = pairs; shares > 1 && step < 4; step *= 2) all += __shfl_xor_sync(kAllLanes, all, step);
            all = with_sink(2 * pair + j, largest, all);
            if (lane < 4) {
              store_shared_f32(factors + 4 * (2 * lane + j), of_share / all);
              if constexpr (kObserve) keep_total(2 * lane + j, largest, all);
            }
          }
        }
        __syncthreads();
      }
    }
    if (complete) {
      for (u32 i = thread; i < here * (kHeadDim / 2); i += kWarps * kLanes) {
        const u32 column = i / (kHeadDim / 2), dim = 2 * (i % (kHeadDim / 2));
        const u32 at = query_area + 16 * (kLanes * (dim / 16) + 4 * (dim % 8) + column / 2) + 4 * (column % 2 + dim % 16 / 8 * 2);
        float value[2] = {0, 0};
        for (u32 share = 0; share < shares; ++share) {
          const float of_share = load_shared_f32(factors + 4 * (2 * (share * pairs + column / 2) + column % 2));
          value[0] += of_share * load_shared_f32(at + 16 * share * pairs);
          value[1] += of_share * load_shared_f32(at + 16 * share * pairs + 64);  // four lanes on
        }
        const u32 index = tile * kColumns + column;
        const u64 row = (static_cast<u64>(segment.sequence) * heads + head) * heads_per_kv_head + index % heads_per_kv_head;
        u32* to = reinterpret_cast<u32*>(out + (row * tokens + index / heads_per_kv_head) * kHeadDim + dim);
        *to = kBf16 ? bf16x2_bits(value[0], value[1]) : f16x2_bits(value[0], value[1]);
      }
      if constexpr (kObserve) add_masses(work, segment, statistics, page_logs, mass + segment.sequence * mass_sequence_stride);
    }
    __syncthreads();  // queries of the next segment go where the sums are
  }
}
