// Elements of up to 8 bits as fp16 for tensor cores: an element q as q · 2^-24, which is denormal and exact. For its bits are q's, so that
// bytes need no more than to be moved apart; as 1024 + u they would have to be put together with a constant, and prmt takes only one,
// which is the choice of bytes.
#pragma once

#include "codec/tile.cuh"

constexpr float kF16Unit = 1.0f / (1 << 24);      // what 1 becomes
constexpr float kF16UnitInverse = 1 << 24;

// −half of each where elements are signed. Of four in the bytes of a register.
__device__ __forceinline__ u32 signed_f16x2(u32 bits) { return kSigned ? sub_f16x2(bits, kHalf * 0x00010001u) : bits; }
__device__ __forceinline__ u32 first_two_f16(u32 elements) { return signed_f16x2(__byte_perm(elements, 0, 0x4140)); }
__device__ __forceinline__ u32 last_two_f16(u32 elements) { return signed_f16x2(__byte_perm(elements, 0, 0x4342)); }
