// Scales of the columns or rows of a matrix: the largest magnitude of each, as matrix.cuh makes a scale of it.
//
// Magnitudes are compared by their bits, where infinities and NaN are the largest: the order does not matter, so that a column may
// be dealt to many blocks. They raise its maximum in global memory, and the last one that arrives makes the scales.
#include "bench/matrix.cuh"

// After this block has raised the maxima of its strip, columns [first, end).
__device__ __forceinline__ void finish_strip(u32 first, u32 end, float limit, const u32* maxima, u32* semaphore, float* scales) {
  __shared__ bool last;
  fence_device();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(semaphore, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  fence_device();
  for (u32 col = first + threadIdx.x; col < end; col += kThreads) scales[col] = scale_of(__ldcg(maxima + col), limit);
}

// x: [rows, cols]; scales: [cols], or [rows] by token. Blocks are one-dimensional.
// By channel, other than naive: the grid is (chunks of chunk_rows rows, strips of columns); maxima u32 [cols] and semaphores
// u32 [strips] are 0 before.
// aligned: rows begin at multiples of 16 bytes and consist of octets.
extern "C" __global__ void __launch_bounds__(kThreads, KVPACK_BLOCKS_PER_SM)
matrix_scales(const void* x, u32 rows, u32 cols, u32 chunk_rows, u32 aligned, float limit, u32* maxima, u32* semaphores,
              float* scales) {
  const u32 thread = threadIdx.x;
#if KVPACK_VARIANT == KVPACK_VARIANT_NAIVE
  const u32 index = blockIdx.x * kThreads + thread;
  if (index >= (kByToken ? rows : cols)) return;
  u32 largest = 0;
  if constexpr (kByToken) {
    for (u32 col = 0; col < cols; ++col) largest = max(largest, magnitude(load_element(x, index, cols, col)));
  } else {
    for (u32 row = 0; row < rows; ++row) largest = max(largest, magnitude(load_element(x, row, cols, index)));
  }
  scales[index] = scale_of(largest, limit);

#elif KVPACK_VARIANT == KVPACK_VARIANT_TILED
  __shared__ float tile[kTileRows][kTileCols + 1];
  const u32 col = thread % kTileCols, row_lane = thread / kTileCols;
  constexpr u32 kRowLanes = kThreads / kTileCols;
  const auto load_tile = [&](u32 first_row, u32 first_col) {
#pragma unroll
    for (u32 row = row_lane; row < kTileRows; row += kRowLanes) {
      const bool inside = first_row + row < rows && first_col + col < cols;
      tile[row][col] = inside ? load_element(x, first_row + row, cols, first_col + col) : 0.0f;
    }
    __syncthreads();
  };
  u32 largest = 0;
  if constexpr (kByToken) {
    constexpr u32 kLanesOfRow = kTileCols / kOctet;
    const u32 row = thread / kLanesOfRow, first_row = blockIdx.x * kTileRows;
    for (u32 first_col = 0; first_col < cols; first_col += kTileCols) {
      load_tile(first_row, first_col);
#pragma unroll
      for (u32 i = 0; i < kOctet; ++i) largest = max(largest, magnitude(tile[row][thread % kLanesOfRow + i * kLanesOfRow]));
      __syncthreads();
    }
    largest = max_of_lanes(largest, kLanesOfRow);
    if (thread % kLanesOfRow == 0 && first_row + row < rows) scales[first_row + row] = scale_of(largest, limit);
  } else {
    __shared__ u32 maximum[kTileCols];
    const u32 first_col = blockIdx.y * kTileCols, end_row = min((blockIdx.x + 1) * chunk_rows, rows);
    if (thread < kTileCols) maximum[thread] = 0;
    for (u32 first_row = blockIdx.x * chunk_rows; first_row < end_row; first_row += kTileRows) {
      load_tile(first_row, first_col);
#pragma unroll
      for (u32 row = row_lane; row < kTileRows; row += kRowLanes) largest = max(largest, magnitude(tile[row][col]));
      __syncthreads();
    }
    max_shared_u32(shared_address(&maximum[col]), largest);
    __syncthreads();
    const u32 end = min(first_col + kTileCols, cols);
    if (first_col + thread < end) atomicMax(maxima + first_col + thread, maximum[thread]);
    finish_strip(first_col, end, limit, maxima, semaphores + blockIdx.y, scales);
  }

#elif KVPACK_VARIANT == KVPACK_VARIANT_COARSENED
  u32 largest = 0;
  if constexpr (kByToken) {
    const u32 row = blockIdx.x * (kThreads / kLanes) + thread / kLanes;
    if (row < rows) {
      for (u32 col = thread % kLanes; col < cols; col += kLanes) largest = max(largest, magnitude(load_element(x, row, cols, col)));
    }
    largest = max_of_lanes(largest, kLanes);
    if (thread % kLanes == 0 && row < rows) scales[row] = scale_of(largest, limit);
  } else {
    const u32 first_col = blockIdx.y * kThreads, col = first_col + thread, end_row = min((blockIdx.x + 1) * chunk_rows, rows);
    if (col < cols) {
#pragma unroll 4
      for (u32 row = blockIdx.x * chunk_rows; row < end_row; ++row) {
        largest = max(largest, magnitude(load_element(x, row, cols, col)));
      }
      atomicMax(maxima + col, largest);
    }
    finish_strip(first_col, min(first_col + kThreads, cols), limit, maxima, semaphores + blockIdx.y, scales);
  }

#else
  static_assert(!kByToken, "matrix_quantize_rows.cu");
  // Maximum i of the strip's octet c: place i · kThreads + c, so that neighbouring threads meet no bank twice.
  __shared__ u32 maximum[kOctet * kThreads];
#pragma unroll
  for (u32 i = 0; i < kOctet; ++i) maximum[i * kThreads + thread] = 0;
  __syncthreads();
  const Octets mine(rows, cols, chunk_rows, false);
  u32 largest[kOctet] = {};
  for (u32 row = mine.first_row + mine.lane_row; row < mine.end_row; row += kBatch * mine.row_step) {
    Eight elements[kBatch];
#pragma unroll
    for (u32 k = 0; k < kBatch; ++k) {
      const u32 at = row + k * mine.row_step;
      elements[k].load(x, static_cast<u64>(at) * cols + mine.octet * kOctet, at < mine.end_row ? mine.count : 0, aligned);
    }
#pragma unroll
    for (u32 k = 0; k < kBatch; ++k) {
#pragma unroll
      for (u32 i = 0; i < kOctet; ++i) largest[i] = max(largest[i], magnitude(elements[k].value(i)));
    }
  }
  const u32 first_octet = blockIdx.y * kThreads;
#pragma unroll
  for (u32 i = 0; i < kOctet; ++i) max_shared_u32(shared_address(&maximum[i * kThreads + mine.octet - first_octet]), largest[i]);
  __syncthreads();
  const u32 first = first_octet * kOctet, end = min(first + kThreads * kOctet, cols);
  for (u32 i = thread; first + i < end; i += kThreads) {
    atomicMax(maxima + first + i, maximum[i % kOctet * kThreads + i / kOctet]);
  }
  finish_strip(first, end, limit, maxima, semaphores + blockIdx.y, scales);
#endif
}
