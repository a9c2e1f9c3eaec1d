// Attention of a few query tokens to the pages of a KV cache, in place: softmax(q · Kᵀ) · V for each sequence and head.
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
// A warp copies what it will need into a ring of its own, kSlots − 1 copies ahead: a group of K or V, or half of one of 16 bits.
//
// Shared memory: ring of each warp | queries as operands; in their place later the sums | maxima and sums of warps | factors.
#include "page_operands.cuh"

constexpr u32 kWarps = KVPACK_WARPS;
constexpr u32 kSlots = KVPACK_SLOTS;
constexpr u32 kSlotBytes = kTokenScalesBytes + 1024;
constexpr u32 kRingBytes = kSlots * kSlotBytes;
constexpr u32 kColumns = 8;
constexpr bool kBf16 = KVPACK_ACTIVATION == 1;
constexpr u32 kFloatFormat = kBf16 ? KVPACK_FORMAT_BF16 : KVPACK_FORMAT_FP16;
constexpr u32 kQueryBytes = kGroups * kLanes * 8;  // as fp16; as bf16 once more
constexpr u32 kSumsBytes = 4 * kColumns * kHeadDim;
constexpr u32 kQueryAreaBytes = (kBf16 ? 2 : 1) * kQueryBytes > kSumsBytes ? (kBf16 ? 2 : 1) * kQueryBytes : kSumsBytes;
constexpr u32 kStatisticsBytes = 4 * 2 * kColumns * kWarps;
constexpr float kNothing = -1e30f;  // a maximum below all scores: p of it is 0 beside any other
constexpr float kUnseen = -3e38f;   // p of it is 0 even beside that

__device__ __forceinline__ u32 element_bits_of(u32 format) {
  constexpr u64 bits = 0x0808020304081010;
  return static_cast<u32>(bits >> (8 * format)) & 0xFF;
}

// What a launch works on.
struct Work {
  const u8* pages;
  const u64* table;    // [2, sequences, max_pages]
  const u32* lengths;  // tokens of each sequence, new ones included
  u32 sequences, max_pages;
  u32 tiles, heads;  // of a sequence
  u32 tokens;        // of a query
  u32 window, sinks;

  __device__ __forceinline__ u32 sink_pages() const { return (sinks + kPageTokens - 1) / kPageTokens; }
  // The first page of the window of a sequence's first query token.
  __device__ __forceinline__ u32 window_page(u32 length) const {
    const u32 seen = length - tokens + 1;
    return window == 0 || seen <= window ? 0 : (seen - window) / kPageTokens;
  }
  __device__ __forceinline__ u32 visited_pages(u32 sequence) const {
    const u32 length = __ldg(lengths + sequence);
    if (length < tokens) return 0;
    const u32 all = (length + kPageTokens - 1) / kPageTokens, first = window_page(length);
    return first <= sink_pages() ? all : all - first + sink_pages();
  }
  // The page of a visit, from 0.
  __device__ __forceinline__ u32 page_of(u32 visit, u32 length) const {
    const u32 first = window_page(length);
    return visit < sink_pages() || first <= sink_pages() ? visit : visit - sink_pages() + first;
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

// Copies groups of K and V ahead of their use.
struct Ring {
  const Work& work;
  u32 base;
  u32 lane;
  u32 unit, end;  // being copied; behind the block's last
  Segment segment;
  u64 k_entry, v_entry, next_k, next_v;
  const u8* source;
  u32 pieces, bytes;  // left of K or V
  u32 first_bytes;    // more in the first piece: scales in front of V
  bool of_v;
  u32 filled, used;  // slots

  __device__ __forceinline__ Ring(const Work& w, u32 address, u32 l, u32 first_unit, u32 end_unit, const Segment& s)
      : work(w), base(address), lane(l), unit(first_unit), end(end_unit), segment(s), next_k(0), next_v(0), pieces(0), first_bytes(0),
        of_v(false), filled(0), used(0) {
    load_entries(unit);
    take_unit();
#pragma unroll 1
    for (u32 i = 0; i + 1 < kSlots; ++i) copy_one();
  }

  __device__ __forceinline__ void load_entries(u32 of) {
    if (of >= end) return;
    while (of >= segment.end()) segment.advance(work);
    const u32 page = work.page_of(of - segment.first, __ldg(work.lengths + segment.sequence));
    next_k = __ldg(work.entry(KVPACK_SIDE_K, segment.sequence, page));
    next_v = __ldg(work.entry(KVPACK_SIDE_V, segment.sequence, page));
  }

  // Begins with K of `unit`, whose entries are there, and loads those of the next one. `segment` may be ahead by then.
  __device__ __forceinline__ void take_unit() {
    if (unit >= end) return;
    const u32 head = segment.part / work.tiles;
    k_entry = next_k, v_entry = next_v;
    v_head = head;
    begin_block(KVPACK_SIDE_K, k_entry, head);
    load_entries(unit + kWarps);
  }
  u32 v_head;

  __device__ __forceinline__ void begin_block(u32 side, u64 entry, u32 head) {
    const u32 format = entry_format(entry), bits = element_bits_of(format);
    const bool quantized = is_quantized(format), narrow = is_narrow(format);
    of_v = side == KVPACK_SIDE_V;
    const u32 group = kGroupDims * kPageTokens / 8 * bits + (!of_v && quantized ? kScalesBytes * (narrow ? 2 : 1) : 0);
    first_bytes = of_v && quantized ? kTokenScalesBytes : 0;
    source = entry_page(work.pages, entry) + static_cast<u64>(head) * (first_bytes + kGroups * group);
    pieces = quantized ? kGroups : 2 * kGroups;
    bytes = quantized ? group : group / 2;
  }

  __device__ __forceinline__ void copy_one() {
    if (pieces == 0 && unit < end) {
      if (!of_v) {
        begin_block(KVPACK_SIDE_V, v_entry, v_head);
      } else {
        unit += kWarps;
        take_unit();
      }
    }
    if (unit < end) {
      const u32 size = bytes + first_bytes, slot = base + filled * kSlotBytes;
#pragma unroll
      for (u32 i = 0; i < (kSlotBytes + 16 * kLanes - 1) / (16 * kLanes); ++i) {
        const u32 at = 16 * (kLanes * i + lane);
        if (at < size) copy_async_16(slot + at, source + at);
      }
      source += size;
      first_bytes = 0;
      --pieces;
    }
    copy_async_commit();
    filled = filled + 1 == kSlots ? 0 : filled + 1;
  }

  // The address of the next piece, which stays until the call after this one.
  __device__ __forceinline__ u32 next() {
    copy_async_wait<kSlots - 2>();
    __syncwarp();
    copy_one();  // into the slot of the piece before
    const u32 slot = base + used * kSlotBytes;
    used = used + 1 == kSlots ? 0 : used + 1;
    return slot;
  }
};

// What a lane has of a segment's softmax, columns 2·c and 2·c + 1.
struct Softmax {
  float maximum[2], sum[2], half_sum[2];  // half_sum: Σ p · scale of V, for levels at odd multiples of half a scale
  float values[kGroups][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (u32 j = 0; j < 2; ++j) maximum[j] = kNothing, sum[j] = half_sum[j] = 0;
#pragma unroll
    for (u32 m = 0; m < kGroups; ++m)
#pragma unroll
      for (u32 i = 0; i < 4; ++i) values[m][i] = 0;
  }
  __device__ __forceinline__ void rescale(float a, float b) {
    sum[0] *= a, sum[1] *= b;
    half_sum[0] *= a, half_sum[1] *= b;
#pragma unroll
    for (u32 m = 0; m < kGroups; ++m) values[m][0] *= a, values[m][1] *= b, values[m][2] *= a, values[m][3] *= b;
  }
};

__device__ __forceinline__ float max_over_rows(float value) {
#pragma unroll
  for (u32 step = 4; step < kLanes; step *= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}
__device__ __forceinline__ float sum_over_rows(float value) {
#pragma unroll
  for (u32 step = 4; step < kLanes; step *= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

typedef float Scores[kSlices][4];

template <u32 format>
__device__ __forceinline__ void multiply_keys(Ring& ring, u32 queries, u32 lane, Scores& scores) {
  float centers[4] = {0, 0, 0, 0};
#pragma unroll 1
  for (u32 group = 0; group < kGroups; ++group) {
    u32 slot = ring.next();
    if constexpr (is_quantized(format)) {
      const uint2 q = load_shared_v2(queries + 8 * (kLanes * group + lane));
      const uint2 scales = load_shared_v2(slot + 8 * (lane % 4));
      const u32 q0 = mul_f16x2(q.x, scales.x), q1 = mul_f16x2(q.y, scales.y);
      if constexpr (is_narrow(format)) {
        const uint2 center = load_shared_v2(slot + kScalesBytes + 8 * (lane % 4));
        const u32 rows[4] = {center.x, 0, center.y, 0};  // eight rows alike, so that every lane has the product of its columns
        mma_f16(centers, rows, q.x, q.y);
      }
      GroupOperands<format> operands;
      operands.load(slot + group_header_bytes(KVPACK_SIDE_K, format), lane);
      u32 a[4];
      operands.template slice_operands<0>(a), mma_f16(scores[0], a, q0, q1);
      operands.template slice_operands<1>(a), mma_f16(scores[1], a, q0, q1);
      operands.template slice_operands<2>(a), mma_f16(scores[2], a, q0, q1);
      operands.template slice_operands<3>(a), mma_f16(scores[3], a, q0, q1);
    } else {
      const uint2 q = load_shared_v2(queries + (kBf16 ? kQueryBytes : 0) + 8 * (kLanes * group + lane));
#pragma unroll
      for (u32 slice = 0; slice < kSlices; ++slice) {
        if (slice == kSlices / 2) slot = ring.next();
        const uint4 v = load_shared_v4(slot + slice % 2 * 512 + 16 * lane);
        const u32 a[4] = {v.x, v.y, v.z, v.w};
        mma_page<format>(scores[slice], a, q.x, q.y);
      }
    }
  }
  if constexpr (is_narrow(format)) {
#pragma unroll
    for (u32 slice = 0; slice < kSlices; ++slice)
#pragma unroll
      for (u32 i = 0; i < 4; ++i) scores[slice][i] += centers[i % 2];
  }
}

// `scores` are probabilities by now.
template <u32 format>
__device__ __forceinline__ void multiply_values(Ring& ring, u32 lane, const Scores& scores, Softmax& softmax) {
  u32 slot = ring.next();
  u32 p[kSlices][2], rest[kSlices][2];  // rest: what bf16 leaves of a probability
  if constexpr (is_quantized(format)) {
    const uint4 scales = load_shared_v4(slot + 16 * (lane / 4));
    const u32 of_slice[kSlices] = {scales.x, scales.y, scales.z, scales.w};
#pragma unroll
    for (u32 slice = 0; slice < kSlices; ++slice)
#pragma unroll
      for (u32 h = 0; h < 2; ++h) {
        const float scale = f16_value(h == 0 ? of_slice[slice] & 0xFFFF : of_slice[slice] >> 16);
        const float a = scores[slice][2 * h] * scale, b = scores[slice][2 * h + 1] * scale;
        if constexpr (is_narrow(format)) softmax.half_sum[0] += a, softmax.half_sum[1] += b;
        p[slice][h] = transpose_matrix(f16x2_bits(a, b));
      }
  } else {
#pragma unroll
    for (u32 slice = 0; slice < kSlices; ++slice)
#pragma unroll
      for (u32 h = 0; h < 2; ++h) {
        const float a = scores[slice][2 * h], b = scores[slice][2 * h + 1];
        if constexpr (kBf16) {
          const u32 rounded = bf16x2_bits(a, b);
          p[slice][h] = transpose_matrix(rounded);
          rest[slice][h] = transpose_matrix(bf16x2_bits(a - __uint_as_float(rounded << 16), b - __uint_as_float(rounded & 0xFFFF0000)));
        } else {
          p[slice][h] = transpose_matrix(f16x2_bits(a, b));
        }
      }
  }
#pragma unroll
  for (u32 group = 0; group < kGroups; ++group) {
    if (group > 0) slot = ring.next();
    float* sums = softmax.values[group];
    if constexpr (is_quantized(format)) {
      GroupOperands<format> operands;
      operands.load(slot + (group == 0 ? kTokenScalesBytes : 0), lane);
      u32 a[4];
      operands.template slice_operands<0>(a), mma_f16(sums, a, p[0][0], p[0][1]);
      operands.template slice_operands<1>(a), mma_f16(sums, a, p[1][0], p[1][1]);
      operands.template slice_operands<2>(a), mma_f16(sums, a, p[2][0], p[2][1]);
      operands.template slice_operands<3>(a), mma_f16(sums, a, p[3][0], p[3][1]);
    } else {
#pragma unroll
      for (u32 slice = 0; slice < kSlices; ++slice) {
        if (slice == kSlices / 2) slot = ring.next();
        const uint4 v = load_shared_v4(slot + slice % 2 * 512 + 16 * lane);
        const u32 a[4] = {v.x, v.y, v.z, v.w};
        mma_page<format>(sums, a, p[slice][0], p[slice][1]);
        if constexpr (kBf16) mma_page<format>(sums, a, rest[slice][0], rest[slice][1]);
      }
    }
  }
}

// One case for each format that KVPACK_K_FORMATS or KVPACK_V_FORMATS, sets of bits, has.
template <u32 formats, u32 format = 0, class Body>
__device__ __forceinline__ void with_format(u32 of_page, Body&& body) {
  if constexpr (format < 8) {
    constexpr bool possible = (formats >> format & 1) && (is_quantized(format) || format == kFloatFormat);
    if constexpr (possible) {
      if (of_page == format) {
        body.template operator()<format>();
        return;
      }
    }
    with_format<formats, format + 1>(of_page, body);
  }
}

struct MultiplyKeys {
  Ring& ring;
  u32 queries, lane;
  Scores& scores;
  template <u32 format>
  __device__ __forceinline__ void operator()() {
    multiply_keys<format>(ring, queries, lane, scores);
  }
};
struct MultiplyValues {
  Ring& ring;
  u32 lane;
  const Scores& scores;
  Softmax& softmax;
  template <u32 format>
  __device__ __forceinline__ void operator()() {
    multiply_values<format>(ring, lane, scores, softmax);
  }
};

__device__ __forceinline__ float query_value(const u16* q) {
  const u32 bits = __ldg(q);
  return kBf16 ? __uint_as_float(bits << 16) : f16_value(bits);
}

extern "C" __global__ void __launch_bounds__(kWarps * 32, KVPACK_BLOCKS_PER_SM)
attention_decode(const u16* q, u64 q_sequence_stride, u64 q_head_stride, u64 q_token_stride, u16* out, const u8* pages, const u64* table,
                 const u32* lengths, u32 sequences, u32 max_pages, u32 heads, u32 heads_per_kv_head, u32 tokens, u32 window, u32 sinks,
                 float scale, float* partials, u32* tickets) {
  KVPACK_DYNAMIC_SHARED(shared);
  const u32 thread = threadIdx.x, lane = thread % kLanes, warp = thread / kLanes;
  const u32 columns = heads_per_kv_head * tokens;
  const Work work{pages, table, lengths, sequences, max_pages, (columns + kColumns - 1) / kColumns, heads, tokens, window, sinks};
  const u32 parts = work.heads * work.tiles;

  const u32 ring_address = shared_address(shared) + warp * kRingBytes;
  const u32 query_area = shared_address(shared) + kWarps * kRingBytes;
  const u32 statistics = query_area + kQueryAreaBytes;
  const u32 factors = statistics + kStatisticsBytes;

  // All units, and this block's.
  u32 total = 0;
  for (u32 sequence = lane; sequence < sequences; sequence += kLanes) total += work.visited_pages(sequence);
  total = __reduce_add_sync(kAllLanes, total) * parts;
  const u32 blocks = min(gridDim.x, total);  // none without a unit, so that all of a segment's arrive
  auto first_unit = [&](u32 block) { return static_cast<u32>(static_cast<u64>(total) * block / blocks); };
  auto block_of = [&](u32 unit) { return static_cast<u32>((static_cast<u64>(unit + 1) * blocks - 1) / total); };
  // Sequences without tokens have no units; their results are 0.
  for (u32 sequence = blockIdx.x; sequence < sequences; sequence += gridDim.x) {
    if (work.visited_pages(sequence) != 0) continue;
    const u64 size = static_cast<u64>(heads) * columns * kHeadDim;
    for (u64 i = thread; i < size; i += kWarps * kLanes) out[sequence * size + i] = 0;
  }
  if (blockIdx.x >= blocks) return;
  const u32 begin = first_unit(blockIdx.x), end = first_unit(blockIdx.x + 1);

  Segment segment{0, 0, 0, work.visited_pages(0)};
  while (segment.units * parts + segment.first <= begin) {  // whole sequences before the block's first unit
    segment.first += segment.units * parts;
    segment.units = work.visited_pages(++segment.sequence);
  }
  segment.part = (begin - segment.first) / segment.units;
  segment.first += segment.part * segment.units;

  Ring ring(work, ring_address, lane, begin + warp, end, segment);
  Softmax softmax;
  Scores scores;
  u32 unit = begin + warp;
  u32 k_format = 0, v_format = 0;
  Segment ahead = segment;  // of the unit whose formats are there
  auto load_formats = [&] {
    if (unit >= end) return;
    while (unit >= ahead.end()) ahead.advance(work);
    const u32 page = work.page_of(unit - ahead.first, __ldg(lengths + ahead.sequence));
    k_format = entry_format(__ldg(work.entry(KVPACK_SIDE_K, ahead.sequence, page)));
    v_format = entry_format(__ldg(work.entry(KVPACK_SIDE_V, ahead.sequence, page)));
  };
  load_formats();

  for (; segment.first < end; segment.advance(work)) {
    const u32 head = segment.part / work.tiles, tile = segment.part % work.tiles;
    const u32 length = __ldg(lengths + segment.sequence);
    // Queries as operands, divided by a power of two for each column, so that with scales they fit fp16.
    for (u32 column = warp; column < kColumns; column += kWarps) {
      const u32 index = tile * kColumns + column;
      const u16* from = q + segment.sequence * q_sequence_stride + (head * heads_per_kv_head + index % heads_per_kv_head) * q_head_stride +
                        index / heads_per_kv_head * q_token_stride;
      float values[(kHeadDim + kLanes - 1) / kLanes], largest = 0;
#pragma unroll
      for (u32 i = 0; i < (kHeadDim + kLanes - 1) / kLanes; ++i) {
        const u32 dim = kLanes * i + lane;
        values[i] = index < columns && dim < kHeadDim ? query_value(from + dim) : 0.0f;
        largest = fmaxf(largest, fabsf(values[i]));
      }
      const u32 exponent = __reduce_max_sync(kAllLanes, __float_as_uint(largest)) >> 23;
      const u32 bounded = min(max(exponent, 32u), 222u);
      const float power = __uint_as_float((bounded + 1) << 23), inverse = __uint_as_float((253 - bounded) << 23);
#pragma unroll
      for (u32 i = 0; i < (kHeadDim + kLanes - 1) / kLanes; ++i) {
        const u32 dim = kLanes * i + lane;
        if (dim >= kHeadDim) break;
        const u32 place = kLanes * (dim / 16) + 4 * column + dim % 8 / 2;
        const u32 address = query_area + 8 * place + dim % 16 / 8 * 4 + dim % 2 * 2;
        store_shared_u16(address, f16_bits(values[i] * inverse));
        if constexpr (kBf16) store_shared_u16(address + kQueryBytes, bf16_bits(values[i] * inverse));
      }
      if (lane == 0) store_shared_f32(factors + 4 * column, power * scale);
    }
    __syncthreads();
    const float factor[2] = {load_shared_f32(factors + 8 * (lane % 4)), load_shared_f32(factors + 8 * (lane % 4) + 4)};
    u32 limit[2];  // tokens that a column attends to
#pragma unroll
    for (u32 j = 0; j < 2; ++j) {
      const u32 index = tile * kColumns + 2 * (lane % 4) + j;
      limit[j] = length - tokens + 1 + min(index / heads_per_kv_head, tokens - 1);
    }

    softmax.clear();
    const u32 last = min(segment.end(), end);
    bool any = false;
#pragma unroll 1
    for (; unit < last; any = true) {
      const u32 this_k = k_format, this_v = v_format;
      const u32 first_token = work.page_of(unit - segment.first, length) * kPageTokens;
      unit += kWarps;
      load_formats();
#pragma unroll
      for (u32 slice = 0; slice < kSlices; ++slice)
#pragma unroll
        for (u32 i = 0; i < 4; ++i) scores[slice][i] = 0;
      with_format<KVPACK_K_FORMATS>(this_k, MultiplyKeys{ring, query_area, lane, scores});

      const u32 first_limit = length - tokens + 1;
      const bool whole = first_token + kPageTokens <= first_limit && (window == 0 || first_token + window >= length || first_token + kPageTokens <= sinks);
      float maximum[2] = {softmax.maximum[0], softmax.maximum[1]};
#pragma unroll
      for (u32 slice = 0; slice < kSlices; ++slice)
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
          float& score = scores[slice][i];
          score *= factor[i % 2];
          if (!whole) {
            const u32 token = first_token + 16 * slice + 8 * (i / 2) + lane / 4;
            const bool seen = token < limit[i % 2] && (window == 0 || token + window >= limit[i % 2] || token < sinks);
            score = seen ? score : kUnseen;
          }
          maximum[i % 2] = fmaxf(maximum[i % 2], score);
        }
      maximum[0] = max_over_rows(maximum[0]), maximum[1] = max_over_rows(maximum[1]);
      if (__any_sync(kAllLanes, maximum[0] > softmax.maximum[0] || maximum[1] > softmax.maximum[1])) {
        softmax.rescale(exp2_approximate(softmax.maximum[0] - maximum[0]), exp2_approximate(softmax.maximum[1] - maximum[1]));
        softmax.maximum[0] = maximum[0], softmax.maximum[1] = maximum[1];
      }
#pragma unroll
      for (u32 slice = 0; slice < kSlices; ++slice)
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
          const float p = exp2_approximate(scores[slice][i] - maximum[i % 2]);
          softmax.sum[i % 2] += p;
          scores[slice][i] = p;
        }
      with_format<KVPACK_V_FORMATS>(this_v, MultiplyValues{ring, lane, scores, softmax});
    }

    // The warps put their parts together: maxima first, then in turn their sums, [column, dimension].
#pragma unroll
    for (u32 j = 0; j < 2; ++j) {
      softmax.sum[j] = sum_over_rows(softmax.sum[j]);
      softmax.half_sum[j] = 0.5f * sum_over_rows(softmax.half_sum[j]);
      if (lane < 4) store_shared_f32(statistics + 4 * (kColumns * warp + 2 * lane + j), softmax.maximum[j]);
    }
    __syncthreads();
    float weight[2];
#pragma unroll
    for (u32 j = 0; j < 2; ++j) {
      float maximum = kNothing;
#pragma unroll
      for (u32 w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, load_shared_f32(statistics + 4 * (kColumns * w + 2 * (lane % 4) + j)));
      weight[j] = exp2_approximate(softmax.maximum[j] - maximum);
      softmax.maximum[j] = maximum;
      if (lane < 4) store_shared_f32(statistics + 4 * (kColumns * (kWarps + warp) + 2 * lane + j), softmax.sum[j] * weight[j]);
    }
#pragma unroll 1
    for (u32 w = 0; w < kWarps; ++w) {
      if (w == warp && (any || w == 0)) {
#pragma unroll
        for (u32 m = 0; m < kGroups; ++m)
#pragma unroll
          for (u32 i = 0; i < 4; ++i) {
            const u32 address = query_area + 4 * ((2 * (lane % 4) + i % 2) * kHeadDim + 16 * m + 8 * (i / 2) + lane / 4);
            const float mine = (softmax.values[m][i] + softmax.half_sum[i % 2]) * weight[i % 2];
            store_shared_f32(address, w == 0 ? mine : load_shared_f32(address) + mine);
          }
      }
      __syncthreads();
    }

    const bool alone = segment.first >= begin && segment.end() <= end;
    const u32 number = segment.sequence * parts + segment.part;
    const u32 here = min(kColumns, columns - tile * kColumns);  // columns of this tile
    auto maximum_of = [&](u32 column) {
      float maximum = kNothing;
#pragma unroll
      for (u32 w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, load_shared_f32(statistics + 4 * (kColumns * w + column)));
      return maximum;
    };
    auto sum_of = [&](u32 column) {
      float sum = 0;
#pragma unroll
      for (u32 w = 0; w < kWarps; ++w) sum += load_shared_f32(statistics + 4 * (kColumns * (kWarps + w) + column));
      return sum;
    };
    auto store_out = [&](u32 column, u32 dim, float value) {
      const u32 index = tile * kColumns + column;
      const u64 row = (static_cast<u64>(segment.sequence) * heads + head) * heads_per_kv_head + index % heads_per_kv_head;
      out[(row * tokens + index / heads_per_kv_head) * kHeadDim + dim] = static_cast<u16>(kBf16 ? bf16_bits(value) : f16_bits(value));
    };
    if (alone) {
      for (u32 i = thread; i < here * kHeadDim; i += kWarps * kLanes) {
        store_out(i / kHeadDim, i % kHeadDim, load_shared_f32(query_area + 4 * i) / sum_of(i / kHeadDim));
      }
    } else {
      // A place in global memory for each block and segment that meet: columns · (head_dim values, maximum, sum).
      constexpr u32 kPlace = kColumns * (kHeadDim + 2);
      float* place = partials + static_cast<u64>(blockIdx.x + number) * kPlace;
      for (u32 i = thread; i < here * kHeadDim; i += kWarps * kLanes) place[i] = load_shared_f32(query_area + 4 * i);
      if (thread < here) {
        place[kColumns * kHeadDim + 2 * thread] = maximum_of(thread);
        place[kColumns * kHeadDim + 2 * thread + 1] = sum_of(thread);
      }
      __syncthreads();
      const u32 first_block = block_of(segment.first), arrivals = block_of(segment.end() - 1) - first_block + 1;
      if (thread == 0) {
        fence_device();
        const u32 before = atomicAdd(tickets + number, 1u);
        if (before + 1 == arrivals) {
          fence_device();
          atomicExch(tickets + number, 0u);
        }
        store_shared_u32(factors, before + 1 == arrivals);
      }
      __syncthreads();
      if (load_shared_u32(factors) != 0) {
        const float* places = partials + static_cast<u64>(first_block + number) * kPlace;
        for (u32 i = thread; i < here * kHeadDim; i += kWarps * kLanes) {
          const u32 column = i / kHeadDim;
          float maximum = kNothing, sum = 0, value = 0;
#pragma unroll 4
          for (u32 part = 0; part < arrivals; ++part) {
            maximum = fmaxf(maximum, load_l2_f32(places + static_cast<u64>(part) * kPlace + kColumns * kHeadDim + 2 * column));
          }
#pragma unroll 4
          for (u32 part = 0; part < arrivals; ++part) {
            const float* at = places + static_cast<u64>(part) * kPlace;
            const float w = exp2_approximate(load_l2_f32(at + kColumns * kHeadDim + 2 * column) - maximum);
            sum += w * load_l2_f32(at + kColumns * kHeadDim + 2 * column + 1);
            value += w * load_l2_f32(at + i);
          }
          store_out(column, i % kHeadDim, value / sum);
        }
      }
    }
    __syncthreads();  // queries of the next segment go where the sums are
  }
}
