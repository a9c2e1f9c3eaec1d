// A matrix and its scales → packed codes.
#include "bench/matrix.cuh"

// Codes that may have bits in one byte.
constexpr u32 kSpan = kBits == 3 ? 4 : 8 / kBits;

// A byte of a row's codes; code `first`, the first that has bits in it, is the element at `x`. inverse: of these columns.
__device__ __forceinline__ u32 byte_of(const void* x, u64 row_start, u32 cols, u32 byte, u32 first, const float (&inverse)[kSpan]) {
  u32 bits = 0;
#pragma unroll
  for (u32 i = 0; i < kSpan; ++i) {
    const u32 col = first + i, from = col * kBits;
    if (from >= 8 * byte + 8) continue;
    const u32 code = col < cols ? code_of(load_activation(x, row_start + col), inverse[i]) : kZeroCode;
    bits |= from >= 8 * byte ? code << (from - 8 * byte) : code >> (8 * byte - from);
  }
  return bits & 0xFF;
}

// x: [rows, cols]; scales: [cols], or [rows] by token; codes: [rows, kBits · octets], from a multiple of 8 bytes.
// Blocks are one-dimensional. Naive and coarsened: the grid is (rows, bytes of a row), tiled (tiles along columns, along rows),
// vectorized (chunks of chunk_rows rows, strips of octets).
// aligned: rows of x begin at multiples of 16 bytes and consist of octets.
extern "C" __global__ void __launch_bounds__(kThreads, KVPACK_BLOCKS_PER_SM)
matrix_quantize(const void* x, u32 rows, u32 cols, u32 chunk_rows, u32 aligned, const float* scales, u8* codes) {
  const u32 thread = threadIdx.x;
  const u32 octets = ceil_div(cols, kOctet);
#if KVPACK_VARIANT == KVPACK_VARIANT_NAIVE || KVPACK_VARIANT == KVPACK_VARIANT_COARSENED
  constexpr u32 kRows = KVPACK_VARIANT == KVPACK_VARIANT_NAIVE ? 1 : kCoarsening;
  const u32 byte = blockIdx.y * kColumnThreads + thread % kColumnThreads;
  const u32 row_bytes = octets * kBits;
  if (byte >= row_bytes) return;
  const u32 first = 8 * byte / kBits;
  float inverse[kSpan] = {};
  if constexpr (!kByToken) {
#pragma unroll
    for (u32 i = 0; i < kSpan; ++i) inverse[i] = first + i < cols ? inverse_of(__ldg(scales + first + i)) : 0.0f;
  }
#pragma unroll
  for (u32 k = 0; k < kRows; ++k) {
    const u32 row = (blockIdx.x * kRows + k) * kRowThreads + thread / kColumnThreads;
    if (row >= rows) break;
    if constexpr (kByToken) {
      const float of_row = inverse_of(__ldg(scales + row));
#pragma unroll
      for (float& each : inverse) each = of_row;
    }
    codes[static_cast<u64>(row) * row_bytes + byte] =
        static_cast<u8>(byte_of(x, static_cast<u64>(row) * cols, cols, byte, first, inverse));
  }

#elif KVPACK_VARIANT == KVPACK_VARIANT_TILED
  __shared__ float tile[kTileRows][kTileCols + 1];
  __shared__ float inverse[kTileCols];
  const u32 first_row = blockIdx.x * kTileRows, first_col = blockIdx.y * kTileCols;
  if (thread < (kByToken ? kTileRows : kTileCols)) {
    const u32 index = (kByToken ? first_row : first_col) + thread;
    inverse[thread] = index < (kByToken ? rows : cols) ? inverse_of(__ldg(scales + index)) : 0.0f;
  }
#pragma unroll
  for (u32 i = 0; i < kOctet; ++i) {
    const u32 row = (i * kThreads + thread) / kTileCols, col = thread % kTileCols;
    const bool inside = first_row + row < rows && first_col + col < cols;
    tile[row][col] = inside ? load_element(x, first_row + row, cols, first_col + col) : 0.0f;
  }
  __syncthreads();
  const u32 row = thread / (kTileCols / kOctet), octet = thread % (kTileCols / kOctet);
  if (first_row + row >= rows || first_col / kOctet + octet >= octets) return;
  Codes packed;
#pragma unroll
  for (u32 i = 0; i < kOctet; ++i) {
    const u32 col = octet * kOctet + i;
    packed.set(i, code_of(tile[row][col], inverse[kByToken ? row : col]));
  }
  store_octet(codes, static_cast<u64>(first_row + row) * octets + first_col / kOctet + octet, packed);

#else
  static_assert(!kByToken, "matrix_quantize_rows.cu");
  const Octets mine(rows, cols, chunk_rows, true);
  float inverse[kOctet];
#pragma unroll
  for (u32 i = 0; i < kOctet; ++i) inverse[i] = i < mine.count ? inverse_of(__ldg(scales + mine.octet * kOctet + i)) : 0.0f;
  const u32 block_end = min(mine.first_row + chunk_rows, rows);
  // All threads go through the same steps, since those of a warp exchange codes of 3 bits.
  for (u32 first = mine.first_row; first < block_end; first += kBatch * mine.row_step) {
    Eight elements[kBatch];
#pragma unroll
    for (u32 k = 0; k < kBatch; ++k) {
      const u32 row = first + k * mine.row_step + mine.lane_row;
      elements[k].load(x, static_cast<u64>(row) * cols + mine.octet * kOctet, row < mine.end_row ? mine.count : 0, aligned);
    }
#pragma unroll
    for (u32 k = 0; k < kBatch; ++k) {
      const u32 row = first + k * mine.row_step + mine.lane_row;
      const bool inside = row < mine.end_row;
      Codes packed;
#pragma unroll
      for (u32 i = 0; i < kOctet; ++i) packed.set(i, code_of(elements[k].value(i), inverse[i]));
      store_octets(codes, static_cast<u64>(row) * octets + mine.octet, packed, octets % 4 == 0, inside);
    }
  }
#endif
}
