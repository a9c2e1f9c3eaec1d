// Weights → integers, where a column's error is made up for by the columns after it: a block of columns of what
// kvpack/encode/feedback.py does. What the columns before the block ask for is given; it is a product of matrices.
//
// A thread takes a row, so that nobody waits for another: a row's targets are in its registers, and each column's error
// is added to those that follow it in the block, in the order of the columns. Nothing is fused.
#include "common/common.cuh"

constexpr u32 kThreads = KVPACK_FEEDBACK_THREADS;
constexpr u32 kColumns = KVPACK_FEEDBACK_COLUMNS;
constexpr u32 kMagnitudes = KVPACK_NUM_THRESHOLDS + 1;

// The integer with the least (value − q)² + rate·bits.
__device__ __forceinline__ s32 nearest(float value, float rate, const float* bits, s32 half, float clamp_bits) {
  const float magnitude = fabsf(value);
  const s32 most = value < 0.0f ? half : half - 1;
  s32 above = static_cast<s32>(magnitude) + 1;
  if (above > most) {
    const float edge = __fsub_rn(magnitude, static_cast<float>(most));
    if (edge > 0.0f && __fmul_rn(edge, edge) > __fmul_rn(rate, clamp_bits)) {
      const s32 q = static_cast<s32>(__fadd_rn(magnitude, 0.5f));
      return value < 0.0f ? -q : q;
    }
    above = most;
  }
  const float over = __fsub_rn(magnitude, static_cast<float>(above));
  float best = __fadd_rn(__fmul_rn(over, over), __fmul_rn(rate, bits[above]));
  s32 chosen = above;
  for (s32 q = above - 1; q >= 0; --q) {
    const float error = __fsub_rn(magnitude, static_cast<float>(q));
    const float squared = __fmul_rn(error, error);
    if (error > 0.0f && squared >= best) break;
    const float cost = __fadd_rn(squared, __fmul_rn(rate, bits[q]));
    if (cost < best) {
      best = cost;
      chosen = q;
    }
  }
  return value < 0.0f ? -chosen : chosen;
}

// values: float [columns, rows], in steps; at most kColumns columns, in the order of quantizing.
// corrections: float [columns, rows], what errors of the columns before the block add to the targets; null: nothing.
// coefficients: float, `stride` from one row to the next: what the error of column u adds to column t > u, at [t, u].
// variances: float [columns], above 0; bits: float [kMagnitudes], bits of a magnitude's code; half = 2^(n−1).
// most: steps that every value may be clamped to.
// integers: s32 [columns, rows]; errors: float [columns, rows], value − integer.
// row_errors: double [rows], to which Σ (target − integer)²·variance is added.
extern "C" __global__ void __launch_bounds__(kThreads)
encode_feedback(const float* values, const float* corrections, const float* coefficients, u32 stride,
                const float* variances, u32 columns, u32 rows, float rate_weight, const float* bits, float clamp_bits,
                s32 half, float most, s32* integers, float* errors, double* row_errors) {
  __shared__ float coefficient[kColumns][kColumns];  // [u][t]: those of a column's error lie side by side
  __shared__ float bits_of[kMagnitudes], variance[kColumns], rate[kColumns];
  const u32 thread = threadIdx.x;
  for (u32 i = thread; i < kMagnitudes; i += kThreads) bits_of[i] = bits[i];
  for (u32 t = thread; t < kColumns; t += kThreads) {
    variance[t] = t < columns ? variances[t] : 1.0f;
    rate[t] = __fdiv_rn(rate_weight, variance[t]);
  }
  for (u32 i = thread; i < kColumns * kColumns; i += kThreads) {
    const u32 t = i / kColumns, u = i % kColumns;
    coefficient[u][t] = u < t && t < columns ? coefficients[static_cast<u64>(t) * stride + u] : 0.0f;
  }
  __syncthreads();
  const u32 row = blockIdx.x * kThreads + thread;
  if (row >= rows) return;
  float target[kColumns];
#pragma unroll
  for (u32 t = 0; t < kColumns; ++t) {
    const u64 at = static_cast<u64>(t) * rows + row;
    target[t] = t < columns ? values[at] : 0.0f;
    if (corrections != nullptr && t < columns) target[t] = __fadd_rn(target[t], corrections[at]);
  }
  double damage = row_errors[row];
#pragma unroll
  for (u32 t = 0; t < kColumns; ++t) {
    if (t >= columns) break;
    const u64 at = static_cast<u64>(t) * rows + row;
    const float value = values[at];
    const float limit = fmaxf(most, fabsf(value));
    const float clamped = fminf(fmaxf(target[t], -limit), limit);
    const s32 q = nearest(clamped, rate[t], bits_of, half, clamp_bits);
    const float error = __fsub_rn(value, static_cast<float>(q));
    const double left = static_cast<double>(__fsub_rn(target[t], static_cast<float>(q)));
    damage += left * left * static_cast<double>(variance[t]);
    integers[at] = q;
    errors[at] = error;
#pragma unroll
    for (u32 u = t + 1; u < kColumns; ++u) {
      target[u] = __fadd_rn(target[u], __fmul_rn(coefficient[t][u], error));
    }
  }
  row_errors[row] = damage;
}
