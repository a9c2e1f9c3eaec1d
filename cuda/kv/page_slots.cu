// Which slots hold the pages that are attended to: what _assign_on_cpu of kvpack/runtime/kv/page_slots.py does.
//
// A block has a row's pages. A page that is in a slot stays there; others get the slots that were not used for longest.
#include "kv/page.cuh"

constexpr u32 kThreads = kLanes * KVPACK_MAX_WARPS;
constexpr u32 kNone = 0xFFFFFFFFu;

// chosen: [batch, num_pages], each page once. sources: [2, batch, num_pages], entries. rows: [batch], of what follows.
// pages, used: [sequences, num_slots], which page a slot has, or -1, and when it was used. held: [sequences, num_slots, 2], its
// entries. clocks: [sequences]. counts: [sequences, 2], pages that were there, and those that were not.
// targets: [2, batch, num_pages], entries in slots; what is not quantized stays where it is.
// jobs: [batch, num_pages, 2, 2], what is to be copied and where, or -1.
// slots_base: where the first slot begins. on_host: bit f says whether pages of format f need a slot.
// Dynamic shared memory: u32 [num_pages] and [num_slots].
extern "C" __global__ void __launch_bounds__(kThreads, KVPACK_BLOCKS_PER_SM)
page_slots(const u64* chosen, const u64* sources, const u64* rows, s32* pages, s32* used, u64* held, s32* clocks, u64* counts,
           u64* targets, u64* jobs, u64 slots_base, u32 num_pages, u32 num_slots, u32 k_bytes, u32 slot_bytes, u32 on_host) {
  KVPACK_DYNAMIC_SHARED(memory);
  const u32 slot_of = shared_address(memory), victims = slot_of + 4 * num_pages;
  const u32 row = blockIdx.x, batch = gridDim.x, thread = threadIdx.x;
  const u64 sequence = __ldg(rows + row), first_slot = sequence * num_slots;
  const s32 now = clocks[sequence] + 1;
  auto source = [&](u32 side, u32 j) { return __ldg(sources + (static_cast<u64>(side) * batch + row) * num_pages + j); };
  auto needs_slot = [&](u64 entry) { return (on_host >> entry_format(entry) & 1) != 0; };

  for (u32 j = thread; j < num_pages; j += kThreads) store_shared_u32(slot_of + 4 * j, kNone);
  for (u32 s = thread; s < num_slots; s += kThreads) store_shared_u32(victims + 4 * s, kNone);
  __syncthreads();
  for (u32 s = thread; s < num_slots; s += kThreads) {
    const s32 page = pages[first_slot + s];
    for (u32 j = 0; j < num_pages && page >= 0; ++j) {
      if (__ldg(chosen + static_cast<u64>(row) * num_pages + j) != static_cast<u64>(page)) continue;
      if (held[2 * (first_slot + s)] == source(0, j) && held[2 * (first_slot + s) + 1] == source(1, j)) {
        store_shared_u32(slot_of + 4 * j, s);
        used[first_slot + s] = now;
      }
    }
  }
  __syncthreads();
  // Slots that are free to take, in the order in which they were used.
  for (u32 s = thread; s < num_slots; s += kThreads) {
    const s32 when = used[first_slot + s];
    if (when == now) continue;
    u32 before = 0;
    for (u32 t = 0; t < num_slots; ++t) {
      const s32 other = used[first_slot + t];
      before += other < when || (other == when && t < s);
    }
    store_shared_u32(victims + 4 * before, s);
  }
  __syncthreads();
  u64 there = 0, missing = 0;
  for (u32 j = thread; j < num_pages; j += kThreads) {
    const u64 of_k = source(0, j), of_v = source(1, j);
    const bool wanted = needs_slot(of_k) || needs_slot(of_v);
    u32 slot = load_shared_u32(slot_of + 4 * j);
    const bool is_new = wanted && slot == kNone;
    if (is_new) {
      u32 before = 0;
      for (u32 i = 0; i < j; ++i) before += load_shared_u32(slot_of + 4 * i) == kNone && (needs_slot(source(0, i)) || needs_slot(source(1, i)));
      slot = load_shared_u32(victims + 4 * before);
    }
    missing += is_new, there += wanted && !is_new;
    for (u32 side = 0; side < 2; ++side) {
      const u64 entry = side == 0 ? of_k : of_v;
      const u64 place = slots_base + (first_slot + slot) * slot_bytes + side * k_bytes;
      const u64 target = needs_slot(entry) ? place | entry_format(entry) : entry;
      targets[(static_cast<u64>(side) * batch + row) * num_pages + j] = target;
      u64* job = jobs + 2 * ((static_cast<u64>(row) * num_pages + j) * 2 + side);
      job[0] = is_new && needs_slot(entry) ? entry : ~u64{0}, job[1] = target;
      if (is_new) held[2 * (first_slot + slot) + side] = entry;
    }
    if (is_new) {
      pages[first_slot + slot] = static_cast<s32>(__ldg(chosen + static_cast<u64>(row) * num_pages + j));
      used[first_slot + slot] = now;
    }
  }
  if (there) atomicAdd(counts + 2 * sequence, there);
  if (missing) atomicAdd(counts + 2 * sequence + 1, missing);
  if (thread == 0) clocks[sequence] = now;
}
