// Packed codes and scales → a matrix: s · level in fp32, rounded to the type of the output.
#include "bench/matrix.cuh"

// The code of a column; `row`: its row's codes.
__device__ __forceinline__ u32 load_code(const u8* row, u32 col) {
  const u32 from = col * kBits, shift = from % 8;
  u32 bits = __ldg(row + from / 8);
  if (shift + kBits > 8) bits |= static_cast<u32>(__ldg(row + from / 8 + 1)) << 8;
  return bits >> shift & kCodeMask;
}

// Eight neighbouring elements, 16 bytes at a time.
__device__ __forceinline__ void store_eight(void* out, u64 index, const float (&values)[kOctet]) {
  u32 words[kOctet / Eight::kPerWord];
#pragma unroll
  for (u32 i = 0; i < kOctet / Eight::kPerWord; ++i) {
#if KVPACK_ACTIVATION == 0
    words[i] = f16x2_bits(values[2 * i], values[2 * i + 1]);
#elif KVPACK_ACTIVATION == 1
    words[i] = bf16x2_bits(values[2 * i], values[2 * i + 1]);
#else
    words[i] = __float_as_uint(values[i]);
#endif
  }
  uint4* to = reinterpret_cast<uint4*>(static_cast<u8*>(out) + index * (4 / Eight::kPerWord));
#pragma unroll
  for (u32 i = 0; i < 2 / Eight::kPerWord; ++i) {
    __stcs(to + i, make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]));
  }
}

// codes: [rows, kBits · octets], from a multiple of 8 bytes; scales: [cols], or [rows] by token; out: [rows, cols].
// Blocks are one-dimensional. Naive and coarsened: the grid is (rows, columns), tiled (tiles along columns, along rows), vectorized
// (chunks of chunk_rows rows, strips of octets).
// aligned: rows of out begin at multiples of 16 bytes and consist of octets.
extern "C" __global__ void __launch_bounds__(kThreads, KVPACK_BLOCKS_PER_SM)
matrix_dequantize(const u8* codes, u32 rows, u32 cols, u32 chunk_rows, u32 aligned, const float* scales, void* out) {
  const u32 thread = threadIdx.x;
  const u32 octets = ceil_div(cols, kOctet), row_bytes = octets * kBits;
#if KVPACK_VARIANT == KVPACK_VARIANT_NAIVE || KVPACK_VARIANT == KVPACK_VARIANT_COARSENED
  constexpr u32 kRows = KVPACK_VARIANT == KVPACK_VARIANT_NAIVE ? 1 : kCoarsening;
  const u32 col = blockIdx.y * kColumnThreads + thread % kColumnThreads;
  if (col >= cols) return;
  const float of_column = kByToken ? 0.0f : __ldg(scales + col);
#pragma unroll
  for (u32 k = 0; k < kRows; ++k) {
    const u32 row = (blockIdx.x * kRows + k) * kRowThreads + thread / kColumnThreads;
    if (row >= rows) break;
    const float scale = kByToken ? __ldg(scales + row) : of_column;
    const u32 code = load_code(codes + static_cast<u64>(row) * row_bytes, col);
    store_result(out, static_cast<u64>(row) * cols + col, value_of(code, scale));
  }

#elif KVPACK_VARIANT == KVPACK_VARIANT_TILED
  constexpr u32 kTileBytes = kTileCols / 8 * kBits;  // of a row
  __shared__ u8 tile[kTileRows][kTileBytes];
  __shared__ float scale[kTileCols];
  const u32 first_row = blockIdx.x * kTileRows, first_col = blockIdx.y * kTileCols, first_byte = first_col / 8 * kBits;
  if (thread < (kByToken ? kTileRows : kTileCols)) {
    const u32 index = (kByToken ? first_row : first_col) + thread;
    scale[thread] = index < (kByToken ? rows : cols) ? __ldg(scales + index) : 0.0f;
  }
  for (u32 i = thread; i < kTileRows * kTileBytes; i += kThreads) {
    const u32 row = i / kTileBytes, byte = i % kTileBytes;
    const bool inside = first_row + row < rows && first_byte + byte < row_bytes;
    tile[row][byte] = inside ? __ldg(codes + static_cast<u64>(first_row + row) * row_bytes + first_byte + byte) : 0;
  }
  __syncthreads();
#pragma unroll
  for (u32 i = 0; i < kOctet; ++i) {
    const u32 row = (i * kThreads + thread) / kTileCols, col = thread % kTileCols;
    if (first_row + row >= rows || first_col + col >= cols) continue;
    const u32 from = col * kBits, shift = from % 8;
    u32 bits = tile[row][from / 8];
    if (shift + kBits > 8) bits |= static_cast<u32>(tile[row][from / 8 + 1]) << 8;
    const float value = value_of(bits >> shift & kCodeMask, scale[kByToken ? row : col]);
    store_result(out, static_cast<u64>(first_row + row) * cols + first_col + col, value);
  }

#else
  const Octets mine(rows, cols, chunk_rows, false);
  float scale[kOctet];
  if constexpr (!kByToken) {
#pragma unroll
    for (u32 i = 0; i < kOctet; ++i) scale[i] = i < mine.count ? __ldg(scales + mine.octet * kOctet + i) : 0.0f;
  }
  for (u32 first = mine.first_row + mine.lane_row; first < mine.end_row; first += kBatch * mine.row_step) {
    Codes packed[kBatch];
#pragma unroll
    for (u32 k = 0; k < kBatch; ++k) {
      const u32 row = first + k * mine.row_step;
      if (row < mine.end_row) packed[k] = load_octet(codes, static_cast<u64>(row) * octets + mine.octet, octets % 4 == 0);
    }
#pragma unroll
    for (u32 k = 0; k < kBatch; ++k) {
      const u32 row = first + k * mine.row_step;
      if (row >= mine.end_row) break;
      if constexpr (kByToken) {
        const float of_row = __ldg(scales + row);
#pragma unroll
        for (float& each : scale) each = of_row;
      }
      float values[kOctet];
#pragma unroll
      for (u32 i = 0; i < kOctet; ++i) values[i] = value_of(packed[k].get(i), scale[i]);
      const u64 index = static_cast<u64>(row) * cols + mine.octet * kOctet;
      if (aligned) {
        store_eight(out, index, values);
      } else {
#pragma unroll
        for (u32 i = 0; i < kOctet; ++i) {
          if (i < mine.count) store_result(out, index + i, values[i]);
        }
      }
    }
  }
#endif
}
