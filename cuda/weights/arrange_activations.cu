// Activations → fp16 in the order in which gemm_wgmma.cu and gemm_mma.cu multiply them: for each chunk of 32 columns four cores along k of
// every eight tokens (common/hopper.cuh). bf16 and fp32 ones, and those times a column's scale, are divided by a power of two for each token that
// brings the largest near 2^14.
//
//   16 bytes of chunk c, core k (0 … 3), token t, at 16 · (tokens · (4·c + k) + t)
//     gemm_wgmma.cu:                        bytes 0 … 3 of slot 2·k, then of slot 2·k + 1
//     gemm_mma.cu (KVPACK_SPLIT_SLOTS):     bytes 2·h, 2·h + 1 of slots 4·s … 4·s + 3, for k = 2·s + h
#include "common/activations.cuh"
#include "codec/tile.cuh"

constexpr u32 kTokens = KVPACK_TOKENS;
constexpr u32 kThreads = KVPACK_ARRANGE_THREADS;
constexpr bool kDivided = KVPACK_ACTIVATION != 0 || KVPACK_COLUMN_SCALES != 0;

// Blocks: a token, and a part of its chunks. Columns from `cols` on, to the end of chunk `chunks` − 1, are 0, and so are tokens from `tokens` on.
extern "C" __global__ void __launch_bounds__(kThreads)
arrange_activations(const void* x, const float* column_scales, uint4* arranged, float* token_scales, u32 tokens, u32 cols, u32 chunks) {
  const u32 token = blockIdx.x, thread = threadIdx.x;
  const u64 first = static_cast<u64>(token) * cols;
  auto load = [&](u32 col) { return load_scaled_activation(x, first + col, column_scales, col); };
  float inverse = 1.0f;
  if constexpr (kDivided) {
    __shared__ u32 maxima[kThreads / kLanes];
    u32 largest = 0;
    if (token < tokens) {
      for (u32 col = thread; col < cols; col += kThreads) largest = max(largest, __float_as_uint(load(col)) & 0x7FFFFFFFu);
    }
    largest = __reduce_max_sync(kAllLanes, largest);
    if (thread % kLanes == 0) maxima[thread / kLanes] = largest;
    __syncthreads();
#pragma unroll
    for (u32 warp = 0; warp < kThreads / kLanes; ++warp) largest = max(largest, maxima[warp]);
    const float scale = token_scale(largest);
    inverse = 1.0f / scale;
    if (blockIdx.y == 0 && thread == 0) token_scales[token] = scale;
  }
  for (u32 core = blockIdx.y * kThreads + thread; core < 4 * chunks; core += gridDim.y * kThreads) {
    u32 pairs[4];
#pragma unroll
    for (u32 pair = 0; pair < 4; ++pair) {
      float values[2];
#pragma unroll
      for (u32 i = 0; i < 2; ++i) {
#if KVPACK_SPLIT_SLOTS
        const u32 slot = core % 4 / 2 * 4 + pair, byte = core % 2 * 2 + i;
#else
        const u32 slot = core % 4 * 2 + pair / 2, byte = pair % 2 * 2 + i;
#endif
        const u32 col = core / 4 * kChunkCols + slot_column(slot, byte);
        values[i] = token < tokens && col < cols ? load(col) * inverse : 0.0f;
      }
      pairs[pair] = f16x2_bits(values[0], values[1]);
    }
    arranged[static_cast<u64>(core) * kTokens + token] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
}
