// Slots of a grouped product (grouped.cuh): which pairs each expert has, in their order, and how they are dealt to slots.
//
//   order   pairs by expert, those without one last
//   slots   expert (or kNoExpert), its first pair in `order`, number of pairs: those of an expert behind each other, then empty ones
//
// One block. A warp looks through all ids for one of its experts, so that nothing depends on timing.
//
// Shared memory, for each expert and for none: number of pairs | first in `order` | first slot. Then the number of slots.
#include "weights/grouped.cuh"

extern "C" __global__ void __launch_bounds__(KVPACK_MAX_WARPS * 32, KVPACK_BLOCKS_PER_SM)
route(const uint2* ids, u32* order, uint4* slots, u32 num_pairs, u32 num_experts, u32 slot_pairs, u32 max_slots) {
  KVPACK_DYNAMIC_SHARED(shared);
  const u32 lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y, lists = num_experts + 1;
  const u32 counts = shared_address(shared), firsts = counts + 4 * lists, first_slots = firsts + 4 * lists;
  const u32 num_slots = first_slots + 4 * lists;

  // Calls body(mask, pair) for each 32 pairs of a list: which of them are its, and whether this lane's is.
  auto each_32 = [&](u32 list, auto&& body) {
    const u32 wanted = list == num_experts ? kNoExpert : list;
    for (u32 first = 0; first < num_pairs; first += kLanes) {
      const u32 pair = first + lane;
      const bool is_here = pair < num_pairs && expert_of(__ldg(ids + pair), num_experts) == wanted;
      body(__ballot_sync(kAllLanes, is_here), pair);
    }
  };
  for (u32 list = warp; list < lists; list += warps) {
    u32 count = 0;
    each_32(list, [&](u32 mask, u32) { count += __popc(mask); });
    if (lane == 0) store_shared_u32(counts + 4 * list, count);
  }
  __syncthreads();
  if (warp == 0) {
    u32 pairs_before = 0, slots_before = 0;
    for (u32 first = 0; first < lists; first += kLanes) {
      const u32 list = first + lane, count = list < lists ? load_shared_u32(counts + 4 * list) : 0;
      const u32 own_slots = ceil_div(count, slot_pairs);
      u32 pairs = count, slots_so_far = own_slots;
#pragma unroll
      for (u32 distance = 1; distance < kLanes; distance *= 2) {
        const u32 of_pairs = __shfl_up_sync(kAllLanes, pairs, distance), of_slots = __shfl_up_sync(kAllLanes, slots_so_far, distance);
        if (lane >= distance) pairs += of_pairs, slots_so_far += of_slots;
      }
      if (list < lists) {
        store_shared_u32(firsts + 4 * list, pairs_before + pairs - count);
        store_shared_u32(first_slots + 4 * list, slots_before + slots_so_far - own_slots);
      }
      pairs_before += __shfl_sync(kAllLanes, pairs, kLanes - 1);
      slots_before += __shfl_sync(kAllLanes, slots_so_far, kLanes - 1);
    }
    if (lane == 0) store_shared_u32(num_slots, slots_before);
  }
  __syncthreads();
  for (u32 list = warp; list < lists; list += warps) {
    const u32 count = load_shared_u32(counts + 4 * list);
    if (count == 0) continue;
    const u32 first = load_shared_u32(firsts + 4 * list), first_slot = load_shared_u32(first_slots + 4 * list);
    u32 at = first;
    each_32(list, [&](u32 mask, u32 pair) {
      if ((mask >> lane & 1) != 0) order[at + __popc(mask & ((1u << lane) - 1))] = pair;
      at += __popc(mask);
    });
    for (u32 slot = lane; slot < ceil_div(count, slot_pairs); slot += kLanes) {
      const u32 behind = slot * slot_pairs;
      slots[first_slot + slot] = make_uint4(list == num_experts ? kNoExpert : list, first + behind, min(count - behind, slot_pairs), 0);
    }
  }
  for (u32 slot = load_shared_u32(num_slots) + warp * kLanes + lane; slot < max_slots; slot += warps * kLanes) {
    slots[slot] = make_uint4(kNoExpert, 0, 0, 0);
  }
}
