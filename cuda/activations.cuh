// Activations and results in the type of the caller: KVPACK_ACTIVATION is 0 for fp16, 1 for bf16, 2 for fp32.
#pragma once

#include "common.cuh"

__device__ __forceinline__ float load_activation(const void* x, u64 index) {
#if KVPACK_ACTIVATION == 0
  return f16_value(__ldg(static_cast<const u16*>(x) + index));
#elif KVPACK_ACTIVATION == 1
  return __uint_as_float(static_cast<u32>(__ldg(static_cast<const u16*>(x) + index)) << 16);
#else
  return __ldg(static_cast<const float*>(x) + index);
#endif
}

__device__ __forceinline__ void store_result(void* y, u64 index, float value) {
#if KVPACK_ACTIVATION == 0
  static_cast<u16*>(y)[index] = static_cast<u16>(f16_bits(value));
#elif KVPACK_ACTIVATION == 1
  static_cast<u16*>(y)[index] = static_cast<u16>(bf16_bits(value));
#else
  static_cast<float*>(y)[index] = value;
#endif
}
