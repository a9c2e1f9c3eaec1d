// What the CUDA sources use of cuda/common/hopper.cuh, and of the bulk copies of cuda/common/ptx.cuh.
//
// A barrier's state lies here, not in shared memory. A product is made when it is waited for, from what shared memory then holds: who
// frees its operands too early gets wrong sums.
#pragma once

namespace emulated {

struct Barrier {
  u32 arrivals, left;
  bool odd;  // the phase that has not ended

  void arrive() {
    if (arrivals == 0) fail("a barrier that nobody has made ready");
    if (--left == 0) {
      left = arrivals;
      odd = !odd;
    }
  }
};
inline Barrier barriers[(kSharedBase + kMaxSharedBytes) / 8 + 1];

inline Barrier& barrier_at(u32 address) {
  shared_pointer<8, 8>(address, "a barrier");
  return barriers[address / 8];
}

// A product of a warpgroup that its threads have not waited for: what a thread holds of it.
struct GroupProduct {
  float* d;
  u64 a, b;
  u32 tokens, group;
};
struct GroupProducts {
  GroupProduct items[1024];
  u32 count, committed;
};
inline GroupProducts group_products[kMaxThreads];

inline u32 thread_number() { return static_cast<u32>(current - threads); }

// Eight rows are a core's 16 bytes each; k runs through a core and then to the next one.
inline float matrix_value(u64 matrix, u32 row, u32 k) {
  const u32 base = 16 * static_cast<u32>(matrix & 0x3FFF), along_k = 16 * static_cast<u32>(matrix >> 16 & 0x3FFF);
  const u32 rows = 16 * static_cast<u32>(matrix >> 32 & 0x3FFF);
  const u32 address = base + k / 8 * along_k + row / 8 * rows + row % 8 * 16 + k % 8 * 2;
  return half_values[load_shared<u16>(address, "wgmma_f16")];
}

inline void make_product(const GroupProduct& product) {
  const u32 warp = thread_number() / kWarpLanes % 4, lane = thread_number() % kWarpLanes;
  for (u32 i = 0; i < product.tokens / 2; ++i) {
    const u32 row = 16 * warp + 8 * (i / 2 % 2) + lane / 4, token = i / 4 * 8 + lane % 4 * 2 + i % 2;
    for (u32 k = 0; k < 16; ++k) product.d[i] += matrix_value(product.a, row, k) * matrix_value(product.b, token, k);
  }
}

}  // namespace emulated

inline void barrier_init(unsigned int barrier, unsigned int arrivals) {
  emulated::barrier_at(barrier) = {arrivals, arrivals, false};
}
inline void barrier_init_done() {}
inline void barrier_arrive(unsigned int barrier) {
  emulated::maybe_yield();
  emulated::barrier_at(barrier).arrive();
}
inline void barrier_wait(unsigned int barrier, unsigned int parity) {
  while (emulated::barrier_at(barrier).odd == (parity != 0)) emulated::yield_thread();
}
inline void copy_bulk(unsigned int shared, const void* global, unsigned int bytes, unsigned int barrier) {
  if (bytes % 16 != 0) emulated::fail("copy_bulk of %u bytes", bytes);
  for (unsigned int at = 0; at < bytes; at += 16) {
    const auto sixteen = emulated::load_global<uint4>(static_cast<const unsigned char*>(global) + at, "copy_bulk");
    emulated::store_shared(shared + at, sixteen, "copy_bulk");
  }
  emulated::barrier_at(barrier).arrive();
}
inline void fence_async() {}
template <unsigned int count>
inline void take_registers() {}
template <unsigned int count>
inline void give_registers() {}
inline void wgmma_fence() {}
template <unsigned int tokens>
inline void wgmma_f16(float (&d)[tokens / 2], unsigned long long a, unsigned long long b) {
  emulated::GroupProducts& held = emulated::group_products[emulated::thread_number()];
  if (held.count == 1024) emulated::fail("wgmma_f16 without wgmma_wait");
  held.items[held.count++] = {d, a, b, tokens, held.committed};
}
inline void wgmma_commit() { ++emulated::group_products[emulated::thread_number()].committed; }
inline void wgmma_wait() {
  __syncwarp();
  emulated::GroupProducts& held = emulated::group_products[emulated::thread_number()];
  unsigned int done = 0;
  while (done < held.count && held.items[done].group < held.committed) emulated::make_product(held.items[done++]);
  memmove(held.items, held.items + done, (held.count - done) * sizeof(held.items[0]));
  held.count -= done;
  __syncwarp();
}
