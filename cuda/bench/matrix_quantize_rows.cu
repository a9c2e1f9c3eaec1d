// A matrix → scales of its rows and packed codes, in one pass: lanes that have found a row's maximum read it again from the cache.
#include "bench/matrix.cuh"

// x: [rows, cols]; scales: [rows]; codes: [rows, kBits · octets], from a multiple of 8 bytes. Blocks and the grid are
// one-dimensional.
// aligned: rows of x begin at multiples of 16 bytes and consist of octets. lanes: of a row; a power of two, 32 at most, and 4 at
// least if rows have a multiple of four octets.
extern "C" __global__ void __launch_bounds__(kThreads, KVPACK_BLOCKS_PER_SM)
matrix_quantize_rows(const void* x, u32 rows, u32 cols, u32 aligned, u32 lanes, float limit, float* scales, u8* codes) {
  const u32 row = blockIdx.x * (kThreads / lanes) + threadIdx.x / lanes, lane = threadIdx.x % lanes;
  const u32 octets = ceil_div(cols, kOctet);
  const u64 row_start = static_cast<u64>(row) * cols;
  const auto load = [&](u32 octet) {
    Eight elements;
    const u32 count = row < rows && octet < octets ? min(cols - octet * kOctet, kOctet) : 0;
    elements.load(x, row_start + octet * kOctet, count, aligned);
    return elements;
  };
  u32 largest = 0;
  for (u32 first = 0; first < octets; first += kBatch * lanes) {
    Eight elements[kBatch];
#pragma unroll
    for (u32 k = 0; k < kBatch; ++k) elements[k] = load(first + k * lanes + lane);
#pragma unroll
    for (u32 k = 0; k < kBatch; ++k) {
#pragma unroll
      for (u32 i = 0; i < kOctet; ++i) largest = max(largest, magnitude(elements[k].value(i)));
    }
  }
  const float scale = scale_of(max_of_lanes(largest, lanes), limit);
  if (lane == 0 && row < rows) scales[row] = scale;
  const float inverse = inverse_of(scale);
  // All threads of a warp go through the same steps, since they exchange codes of 3 bits.
  for (u32 first = 0; first < octets; first += kBatch * lanes) {
    Eight elements[kBatch];
#pragma unroll
    for (u32 k = 0; k < kBatch; ++k) elements[k] = load(first + k * lanes + lane);
#pragma unroll
    for (u32 k = 0; k < kBatch; ++k) {
      const u32 octet = first + k * lanes + lane;
      Codes packed;
#pragma unroll
      for (u32 i = 0; i < kOctet; ++i) packed.set(i, code_of(elements[k].value(i), inverse));
      store_octets(codes, static_cast<u64>(row) * octets + octet, packed, octets % 4 == 0, row < rows && octet < octets);
    }
  }
}
