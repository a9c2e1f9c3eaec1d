// Grouped products: rows of x times matrices of a stack, each row the one that its id says, in one launch.
//
// A stack has `parts` matrices of one shape for each expert, whose results lie side by side. A slot is an expert and some rows of x;
// blocks of a slot and part have one blockIdx.z. What an ordinary product is given for its matrix is, in a grouped one, that of the
// stack's first; a matrix's own lie as many bytes behind, modulo 2^64, since they may have been allocated anywhere.
//
//   pair           a row of x and one of its ids: number row · top_k + rank. Its result is row `pair` of y
//   gemv           a slot a pair
//   gemm           slots are made by route.cu: up to kTokens pairs of one expert
//
// Pairs whose id is no expert's, or whose matrix is not in the stack, get zeros.
#pragma once

#include "common/common.cuh"

constexpr u32 kNoExpert = 0xFFFFFFFFu;

// As kvpack/runtime/weights/grouped.py writes them.
struct __align__(16) StackedMatrix {
  u64 blob, groups, tables, scales, status;  // bytes from those of the first
  u64 first_group;                           // what its groups' numbers begin with in a report of damage
  u64 num_tables;
  u64 launches;  // one for each table, at least one; 0 of a matrix that is not in this stack
};

__device__ __forceinline__ StackedMatrix load_matrix(const StackedMatrix* from) {
  const ulonglong2* words = reinterpret_cast<const ulonglong2*>(from);
  const ulonglong2 a = __ldg(words), b = __ldg(words + 1), c = __ldg(words + 2), d = __ldg(words + 3);
  return {a.x, a.y, b.x, b.y, c.x, c.y, d.x, d.y};
}

template <class T>
__device__ __forceinline__ T* bytes_behind(T* pointer, u64 bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<u64>(pointer) + bytes);
}

// The expert of an i64 id, or kNoExpert.
__device__ __forceinline__ u32 expert_of(uint2 id, u32 num_experts) { return id.y == 0 && id.x < num_experts ? id.x : kNoExpert; }

// Calls store(row) for all rows of a matrix, each by one thread of a slot's blocks.
template <class Store>
__device__ __forceinline__ void each_row(u32 rows, Store&& store) {
  const u32 threads = blockDim.x * blockDim.y * blockDim.z;
  const u32 thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  for (u32 row = blockIdx.x * threads + thread; row < rows; row += gridDim.x * threads) store(row);
}

// What a grouped kernel needs now and then, in shared memory until then: registers are the loop's.
struct Ends {
  void* y;
  const float* scales;
  float* partials;
  u32* semaphores;
  u32* status;
  const void* x;
  const uint4* groups;
  u32 first_group, num_tables;
};
constexpr u32 kEndsY = 0, kEndsScales = 8, kEndsPartials = 16, kEndsSemaphores = 24, kEndsStatus = 32, kEndsX = 40, kEndsGroups = 48;
constexpr u32 kEndsFirstGroup = 56, kEndsNumTables = 60, kEndsBytes = KVPACK_GROUPED ? 64 : 0;

template <class T>
__device__ __forceinline__ void store_pointer(u32 address, T* pointer) {
  const u64 bits = reinterpret_cast<u64>(pointer);
  store_shared_v2(address, make_uint2(static_cast<u32>(bits), static_cast<u32>(bits >> 32)));
}
template <class T>
__device__ __forceinline__ T* load_pointer(u32 address) {
  const uint2 bits = load_shared_v2(address);
  return reinterpret_cast<T*>(static_cast<u64>(bits.y) << 32 | bits.x);
}

// By one thread; visible after a barrier.
__device__ __forceinline__ void store_ends(u32 address, const Ends& ends) {
  store_pointer(address + kEndsY, ends.y);
  store_pointer(address + kEndsScales, ends.scales);
  store_pointer(address + kEndsPartials, ends.partials);
  store_pointer(address + kEndsSemaphores, ends.semaphores);
  store_pointer(address + kEndsStatus, ends.status);
  store_pointer(address + kEndsX, ends.x);
  store_pointer(address + kEndsGroups, ends.groups);
  store_shared_v2(address + kEndsFirstGroup, make_uint2(ends.first_group, ends.num_tables));
}
