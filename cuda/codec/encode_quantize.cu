// Weights → signed elements: what kvpack/encode/quantize.py does, number for number.
//
// All is exact or rounded once: under -ftz the quotients of denormal weights become 0, and they round to 0 anyway since the
// caller sees to it that steps are far from denormal.
#include "common/common.cuh"

typedef long long s64;

constexpr u32 kThreads = KVPACK_QUANTIZE_THREADS;
constexpr u32 kWarps = kThreads / kLanes;
constexpr u32 kLastThreshold = KVPACK_NUM_THRESHOLDS - 1;
constexpr s32 kDeltaOffset = KVPACK_DELTA_OFFSET;

#if KVPACK_WEIGHT_KIND == KVPACK_KIND_FP32
typedef float Weight;
__device__ __forceinline__ float weight_value(Weight weight) { return weight; }
#elif KVPACK_WEIGHT_KIND == KVPACK_KIND_FP16
typedef u16 Weight;
__device__ __forceinline__ float weight_value(Weight weight) { return f16_value(weight); }
#else
typedef u16 Weight;
__device__ __forceinline__ float weight_value(Weight weight) { return __uint_as_float(static_cast<u32>(weight) << 16); }
#endif

// A warp takes a row after another.
//
// weights: [rows, cols], finite, at most outlier_delta_max (layout.py) steps; steps: float [rows] if by_row, else [1]; a step of 0 gives 0.
// thresholds: float [KVPACK_NUM_THRESHOLDS]; half = 2^(n−1); elements: u8 [rows, cols].
// outliers: u64 [capacity], (row · cols + col) << 16 | delta + 2^14, in any order; those beyond capacity are counted alone.
// sums: u64 [3], to which are added (two's complement) Σ trunc(4096·w/step)·q, Σ q², the number of outliers.
extern "C" __global__ void __launch_bounds__(kThreads)
encode_quantize(const Weight* weights, u32 rows, u32 cols, const float* steps, u32 by_row, const float* thresholds,
                float clamp, s32 half, u8* elements, u64* outliers, u32 capacity, u64* sums) {
  __shared__ float threshold[KVPACK_NUM_THRESHOLDS];
  const u32 thread = threadIdx.x, lane = thread % kLanes;
  for (u32 i = thread; i < KVPACK_NUM_THRESHOLDS; i += kThreads) threshold[i] = thresholds[i];
  __syncthreads();
  const s32 low = -half, high = half - 1;
  s64 dot = 0, energy = 0;
  for (u32 row = blockIdx.x * kWarps + thread / kLanes; row < rows; row += gridDim.x * kWarps) {
    const float step = steps[by_row ? row : 0];
    const u64 first = static_cast<u64>(row) * cols;
    for (u32 col = lane; col < cols; col += kLanes) {
      s32 element = 0;
      if (step != 0.0f) {
        const float v = __fdiv_rn(weight_value(weights[first + col]), step);
        const float a = fabsf(v);
        const s32 k = static_cast<s32>(a);
        s32 q = k + (__fsub_rn(a, static_cast<float>(k)) >= threshold[min(static_cast<u32>(k), kLastThreshold)] ? 1 : 0);
        if (v < 0.0f) q = -q;
        element = q;
        if (q > high || q < low) {
          element = q > 0 ? high : low;
          if (__fsub_rn(a, static_cast<float>(abs(element))) < clamp) {
            q = element;
          } else {
            const u64 at = atomicAdd(&sums[2], u64{1});
            if (at < capacity) outliers[at] = (first + col) << 16 | static_cast<u32>(q - element + kDeltaOffset);
          }
        }
        dot += static_cast<s64>(static_cast<s32>(__fmul_rn(v, static_cast<float>(KVPACK_FIXED_POINT)))) * q;
        energy += static_cast<s64>(q) * q;
      }
      elements[first + col] = static_cast<u8>(element + half);
    }
  }
#pragma unroll
  for (u32 distance = kLanes / 2; distance > 0; distance /= 2) {
    dot += __shfl_xor_sync(kAllLanes, dot, distance);
    energy += __shfl_xor_sync(kAllLanes, energy, distance);
  }
  if (lane == 0) {
    atomicAdd(&sums[0], static_cast<u64>(dot));
    atomicAdd(&sums[1], static_cast<u64>(energy));
  }
}
