// Which slots hold the pages that are attended to: what _assign_on_cpu of kvpack/runtime/kv/page_slots.py does.
//
// A block has a row's pages. A page that is in a slot stays there; others get the slots that were filled longest ago, but for those
// that are used now.
#include "kv/page.cuh"

constexpr u32 kWarps = KVPACK_MAX_WARPS;
constexpr u32 kThreads = kLanes * kWarps;
constexpr u32 kNone = 0xFFFFFFFFu;
constexpr u32 kNew = 0x80000000u;  // with the number of a page that is not there, in place of its slot

// How many threads before this one have set their flag; `total` becomes that of all. All threads call it. `area`: u32 [kWarps].
__device__ __forceinline__ u32 rank_of(bool flag, u32 area, u32& total) {
  const u32 lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, flags = __ballot_sync(kAllLanes, flag);
  if (lane == 0) store_shared_u32(area + 4 * warp, __popc(flags));
  __syncthreads();
  u32 before = __popc(flags & ((1u << lane) - 1));
  total = 0;
#pragma unroll
  for (u32 w = 0; w < kWarps; ++w) {
    const u32 of_warp = load_shared_u32(area + 4 * w);
    before += w < warp ? of_warp : 0;
    total += of_warp;
  }
  __syncthreads();
  return before;
}

// chosen: [batch, num_pages], ascending. sources: [2, batch, num_pages], entries. rows: [batch], of what follows.
// pages: [sequences, num_slots], which page a slot has, or -1. held: [sequences, num_slots, 2], its entries.
// hands: [sequences], the slot that was filled longest ago. counts: [sequences, 2], pages that were there, and those that were not.
// targets: [2, batch, num_pages], entries in slots; what needs none stays where it is.
// jobs: [batch, num_pages, 2, 2], what is to be copied, or -1, and where.
// slots_base: where the first slot begins. on_host: bit f says whether pages of format f need a slot.
// Dynamic shared memory: u32 [3 · num_pages + num_slots + kWarps]. There are at least as many slots as pages.
extern "C" __global__ void __launch_bounds__(kThreads, KVPACK_BLOCKS_PER_SM)
page_slots(const u64* chosen, const u64* sources, const u64* rows, s32* pages, u64* held, s32* hands, u64* counts, u64* targets,
           u64* jobs, u64 slots_base, u32 num_pages, u32 num_slots, u32 k_bytes, u32 slot_bytes, u32 on_host) {
  KVPACK_DYNAMIC_SHARED(memory);
  const u32 wanted_pages = shared_address(memory), slot_of = wanted_pages + 4 * num_pages, victims = slot_of + 4 * num_pages;
  const u32 in_use = victims + 4 * num_pages, area = in_use + 4 * num_slots;
  const u32 row = blockIdx.x, batch = gridDim.x, thread = threadIdx.x;
  const u64 sequence = __ldg(rows + row), first_slot = sequence * num_slots;
  const u32 hand = static_cast<u32>(hands[sequence]);
  auto source = [&](u32 side, u32 j) { return __ldg(sources + (static_cast<u64>(side) * batch + row) * num_pages + j); };
  auto needs_slot = [&](u64 entry) { return (on_host >> entry_format(entry) & 1) != 0; };

  for (u32 j = thread; j < num_pages; j += kThreads) {
    store_shared_u32(wanted_pages + 4 * j, static_cast<u32>(__ldg(chosen + static_cast<u64>(row) * num_pages + j)));
    store_shared_u32(slot_of + 4 * j, kNone);
  }
  __syncthreads();
  for (u32 s = thread; s < num_slots; s += kThreads) {
    const s32 page = pages[first_slot + s];
    u32 first = 0, end = page < 0 ? 0 : num_pages;
    while (first < end) {
      const u32 middle = (first + end) / 2;
      if (load_shared_u32(wanted_pages + 4 * middle) < static_cast<u32>(page)) first = middle + 1;
      else end = middle;
    }
    bool is_used = page >= 0 && first < num_pages && load_shared_u32(wanted_pages + 4 * min(first, num_pages - 1)) == static_cast<u32>(page);
    if (is_used) {
      is_used = held[2 * (first_slot + s)] == source(0, first) && held[2 * (first_slot + s) + 1] == source(1, first);
      if (is_used) store_shared_u32(slot_of + 4 * first, s);
    }
    store_shared_u32(in_use + 4 * s, is_used);
  }
  __syncthreads();
  u32 missing = 0, there = 0;  // of all threads, and of this one
  for (u32 tile = 0; tile < num_pages; tile += kThreads) {
    const u32 j = tile + thread;
    const bool wanted = j < num_pages && (needs_slot(source(0, j)) || needs_slot(source(1, j)));
    const bool is_new = wanted && load_shared_u32(slot_of + 4 * min(j, num_pages - 1)) == kNone;
    u32 of_tile;
    const u32 rank = missing + rank_of(is_new, area, of_tile);
    if (is_new) store_shared_u32(slot_of + 4 * j, kNew | rank);
    there += wanted && !is_new;
    missing += of_tile;
  }
  u32 found = 0;
  for (u32 tile = 0; tile < num_slots && found < missing; tile += kThreads) {
    const u32 i = tile + thread, s = (hand + i) % num_slots;
    const bool is_free = i < num_slots && load_shared_u32(in_use + 4 * s) == 0;
    u32 of_tile;
    const u32 rank = found + rank_of(is_free, area, of_tile);
    if (is_free && rank < missing) store_shared_u32(victims + 4 * rank, s);
    if (is_free && rank + 1 == missing) hands[sequence] = static_cast<s32>((s + 1) % num_slots);
    found += of_tile;
  }
  __syncthreads();
  for (u32 j = thread; j < num_pages; j += kThreads) {
    const u64 of_k = source(0, j), of_v = source(1, j);
    u32 slot = load_shared_u32(slot_of + 4 * j);
    const bool is_new = slot != kNone && (slot & kNew) != 0;
    if (is_new) slot = load_shared_u32(victims + 4 * (slot & ~kNew));
    for (u32 side = 0; side < 2; ++side) {
      const u64 entry = side == 0 ? of_k : of_v;
      const u64 place = slots_base + (first_slot + slot) * slot_bytes + side * k_bytes;
      const u64 target = needs_slot(entry) ? place | entry_format(entry) : entry;
      targets[(static_cast<u64>(side) * batch + row) * num_pages + j] = target;
      u64* job = jobs + 2 * ((static_cast<u64>(row) * num_pages + j) * 2 + side);
      job[0] = is_new && needs_slot(entry) ? entry : ~u64{0}, job[1] = target;
      if (is_new) held[2 * (first_slot + slot) + side] = entry;
    }
    if (is_new) pages[first_slot + slot] = static_cast<s32>(load_shared_u32(wanted_pages + 4 * j));
  }
  if (there) atomicAdd(counts + 2 * sequence, static_cast<u64>(there));
  if (thread == 0 && missing) atomicAdd(counts + 2 * sequence + 1, static_cast<u64>(missing));
}
