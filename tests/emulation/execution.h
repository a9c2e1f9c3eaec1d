// The execution model of the emulator: the blocks of a grid run one after another; the threads of a block are fibers
// that run until they reach a barrier or a warp-wide operation. One launch is one process (see launch.h), so everything here
// is plain global state.
//
// Everything that a GPU would leave undefined and that can be seen here ends the process with a message.
#pragma once

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <fenv.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#if defined(__x86_64__) && !defined(KVPACK_EMULATED_UCONTEXT)
#define KVPACK_EMULATED_OWN_SWITCH
#else
#include <ucontext.h>
#endif

struct uint3 {
  unsigned int x, y, z;
};
struct dim3 {
  unsigned int x, y, z;
};

namespace emulated {

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 kWarpLanes = 32;
constexpr u32 kMaxThreads = 1024;
constexpr u32 kAllLanes = 0xFFFFFFFFu;
constexpr u32 kMaxSharedBytes = 227 * 1024;
constexpr u8 kPoison = 0xFF;
// What a lane receives from a lane that does not take part.
constexpr u64 kUndefined = 0xDEADBEEFDEADBEEFull;
constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kGuardBytes = 1 << 20;
constexpr int kExitFailed = 3;

// ---- Context switches -----------------------------------------------------------------------------------------------

#ifdef KVPACK_EMULATED_OWN_SWITCH
typedef void* Context;
extern "C" void kvpack_emulated_switch(Context* from, Context to);
// The callee-saved registers go to the stack; mxcsr is the same in all fibers.
asm(R"(
.text
.local kvpack_emulated_switch
.type kvpack_emulated_switch, @function
kvpack_emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size kvpack_emulated_switch, .-kvpack_emulated_switch
)");
inline void prepare_context(Context* context, u8* stack, void (*entry)()) {
  // The registers above, the address to return to, and the word that makes the stack aligned as after a call.
  u64* top = reinterpret_cast<u64*>(stack + kStackBytes) - 8;
  memset(top, 0, 64);
  top[6] = reinterpret_cast<u64>(entry);
  *context = top;
}
inline void switch_context(Context* from, Context* to) { kvpack_emulated_switch(from, *to); }
#else
typedef ucontext_t Context;
inline void prepare_context(Context* context, u8* stack, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = kStackBytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}
inline void switch_context(Context* from, Context* to) { swapcontext(from, to); }
#endif

// ---- State ----------------------------------------------------------------------------------------------------------

enum class Operation : u8 {
  none,
  // of a block
  barrier,
  barrier_or,
  barrier_and,
  barrier_count,
  // of a warp
  sync,
  shuffle,
  shuffle_up,
  shuffle_down,
  shuffle_xor,
  ballot,
  any,
  all,
  active,
  match_any,
  match_all,
  reduce_add,
  reduce_min,
  reduce_max,
  reduce_min_signed,
  reduce_max_signed,
  reduce_and,
  reduce_or,
  reduce_xor,
  load_matrix,
  multiply_matrix,
};

inline const char* name_of(Operation operation) {
  static const char* const names[] = {
      "nothing",           "__syncthreads",     "__syncthreads_or",  "__syncthreads_and", "__syncthreads_count",
      "__syncwarp",        "__shfl_sync",       "__shfl_up_sync",    "__shfl_down_sync",  "__shfl_xor_sync",
      "__ballot_sync",     "__any_sync",        "__all_sync",        "__activemask",      "__match_any_sync",
      "__match_all_sync",  "__reduce_add_sync", "__reduce_min_sync", "__reduce_max_sync", "__reduce_min_sync",
      "__reduce_max_sync", "__reduce_and_sync", "__reduce_or_sync",  "__reduce_xor_sync", "load_matrix_x4",
      "mma_f16",
  };
  return names[static_cast<int>(operation)];
}

struct MatrixRow {
  const u8* row;
  u32* registers;
};

struct MatrixProduct {
  float* c;
  const u32* a;
  u32 b[2];
  bool of_bf16;

  float value(u32 bits) const;
};

struct Copy {
  u32 shared;
  u32 group;
  const u8* global;
  u8 bytes[16];  // of the source, when the copy was issued
};

// The asynchronous copies of a thread that it has not waited for, oldest first.
struct Copies {
  Copy* items;
  u32 count, capacity, committed;

  void push(const Copy& copy) {
    if (count == capacity) {
      capacity = capacity == 0 ? 16 : 2 * capacity;
      items = static_cast<Copy*>(realloc(items, capacity * sizeof(Copy)));
    }
    items[count++] = copy;
  }
};

struct Thread {
  Context context;
  uint3 index;
  u32 lane, warp;
  // What it waits for.
  Operation operation;
  u32 mask, parameter, width;
  u64 input, output;
  void* operands;
  Copies copies;
};

// Each existing lane is in one of the four sets, but for the one that runs.
struct Warp {
  u32 existing, ready, waiting, at_barrier, exited;
};

struct Region {
  u8 *begin, *end;    // of the bytes that were passed
  u8 *mapped, *last;  // of what can be accessed without a fault
  bool writable;
  u32 argument;  // the first one that points here
};

inline Thread threads[kMaxThreads];
inline Warp warps[kMaxThreads / kWarpLanes];
inline Thread* current = nullptr;
inline u8* stacks = nullptr;
inline Context scheduler;
inline u32 num_threads, num_warps, num_alive, num_at_barrier;
inline uint3 block_index;
inline dim3 block_size, grid_size;
inline bool shuffled = false;
inline u64 random_state = 1;
inline void (*kernel_call)();

inline Region* regions = nullptr;
inline u32 num_regions = 0;
inline u32 last_region = 0;

inline u32 random_below(u32 limit) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<u32>((random_state >> 32) * limit >> 32);
}

// ---- Failures -------------------------------------------------------------------------------------------------------

inline void print_position() {
  if (current == nullptr) return;
  const uint3& t = current->index;
  const uint3& b = block_index;
  fprintf(stderr, "block (%u, %u, %u), thread (%u, %u, %u): ", b.x, b.y, b.z, t.x, t.y, t.z);
}

[[noreturn, gnu::noinline, gnu::cold, gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
  fflush(stdout);
  print_position();
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fputc('\n', stderr);
  fflush(stderr);
  _exit(kExitFailed);
}

// ---- Shared memory --------------------------------------------------------------------------------------------------

// Static arrays lie in a section of their own (see __shared__ in emulated_ptx.h); dynamic shared memory ends at a guard
// page.
// Addresses begin behind what CUDA reserves, and a gap lies between the two parts.
constexpr u32 kSharedBase = 1024;
extern "C" u8 __start_kvpack_shared[] __attribute__((weak, visibility("hidden")));
extern "C" u8 __stop_kvpack_shared[] __attribute__((weak, visibility("hidden")));
inline u8 *static_shared = nullptr, *dynamic_shared = nullptr;
inline u32 static_bytes = 0, dynamic_bytes = 0, dynamic_base = 0;
// How many asynchronous copies are under way to each 16 bytes.
inline u8 in_flight[(kSharedBase + 4096 + kMaxSharedBytes) / 16 + 1];

inline u32 address_of_shared(const void* pointer) {
  const u8* p = static_cast<const u8*>(pointer);
  if (static_bytes != 0 && p >= static_shared && p <= static_shared + static_bytes) {
    return kSharedBase + static_cast<u32>(p - static_shared);
  }
  const long long offset = p - dynamic_shared;
  if (offset < -(1 << 24) || offset > (1 << 24)) fail("shared_address(%p): not a pointer into shared memory", pointer);
  return dynamic_base + static_cast<u32>(offset);
}

[[noreturn, gnu::noinline, gnu::cold]] inline void fail_shared(u32 address, u32 size, u32 alignment, const char* what) {
  if (address % alignment != 0) fail("%s: shared address %u is not a multiple of %u", what, address, alignment);
  const bool in_dynamic = address - dynamic_base < dynamic_bytes && address - dynamic_base + size <= dynamic_bytes;
  const bool in_static = address - kSharedBase < static_bytes && address - kSharedBase + size <= static_bytes;
  if (in_dynamic || in_static) {
    fail("%s: shared address %u (%s offset %u): an asynchronous copy to it was not waited for", what, address,
         in_dynamic ? "dynamic" : "static", address - (in_dynamic ? dynamic_base : kSharedBase));
  }
  fail(
      "%s: %u bytes at shared address %u are out of bounds: static shared memory is [%u, %u), dynamic is [%u, %u) "
      "(offset %d in the dynamic part)",
      what, size, address, kSharedBase, kSharedBase + static_bytes, dynamic_base, dynamic_base + dynamic_bytes,
      static_cast<int>(address - dynamic_base));
}

template <u32 size, u32 alignment>
inline u8* shared_pointer(u32 address, const char* what, bool may_be_in_flight = false) {
  const u32 offset = address - dynamic_base;
  const u32 offset_static = address - kSharedBase;
  u8* pointer;
  if (offset < dynamic_bytes && dynamic_bytes - offset >= size) {
    pointer = dynamic_shared + offset;
  } else if (offset_static < static_bytes && static_bytes - offset_static >= size) {
    pointer = static_shared + offset_static;
  } else {
    fail_shared(address, size, alignment, what);
  }
  if (address % alignment != 0 || (!may_be_in_flight && in_flight[address / 16] != 0)) {
    fail_shared(address, size, alignment, what);
  }
  return pointer;
}

// ---- Global memory --------------------------------------------------------------------------------------------------

extern "C" char __executable_start, _end;

inline bool in_region(const u8* p, u32 size) {
  if (num_regions == 0) return false;
  const Region* hit = &regions[last_region];
  if (p >= hit->begin && p + size <= hit->end) return true;
  for (u32 i = 0; i < num_regions; ++i) {
    if (p >= regions[i].begin && p + size <= regions[i].end) {
      last_region = i;
      return true;
    }
  }
  return false;
}

// Where an address lies, in words.
inline void describe(const u8* p, char* text, size_t length) {
  if (reinterpret_cast<uintptr_t>(p) < 65536) {
    snprintf(text, length, "a null pointer plus %llu", static_cast<u64>(reinterpret_cast<uintptr_t>(p)));
    return;
  }
  for (u32 i = 0; i < num_regions; ++i) {
    const Region& r = regions[i];
    const long long bytes = r.end - r.begin;
    if (p < r.mapped - kGuardBytes || p >= r.last + kGuardBytes) continue;
    if (p < r.begin) {
      snprintf(text, length, "%lld bytes before argument %u (%lld bytes)", static_cast<long long>(r.begin - p),
               r.argument, bytes);
    } else {
      snprintf(text, length, "byte %lld of argument %u (%lld bytes%s)", static_cast<long long>(p - r.begin), r.argument,
               bytes, r.writable ? "" : ", read-only");
    }
    return;
  }
  if (dynamic_shared != nullptr && p >= dynamic_shared - kMaxSharedBytes &&
      p < dynamic_shared + dynamic_bytes + kGuardBytes) {
    snprintf(text, length, "byte %lld of dynamic shared memory (%u bytes)", static_cast<long long>(p - dynamic_shared),
             dynamic_bytes);
    return;
  }
  if (stacks != nullptr && p >= stacks && p < stacks + kMaxThreads * (kStackBytes + 4096)) {
    snprintf(text, length, "a thread's stack (%zu bytes, overflown)", kStackBytes);
    return;
  }
  snprintf(text, length, "address %p, outside of all arguments (or a vector access that is not aligned)",
           static_cast<const void*>(p));
}

inline void check_global(const void* pointer, u32 size, u32 alignment, const char* what) {
  const u8* p = static_cast<const u8*>(pointer);
  if (reinterpret_cast<uintptr_t>(p) % alignment == 0 && in_region(p, size)) return;
  // Variables at file scope.
  const u8* image = reinterpret_cast<const u8*>(&__executable_start);
  const bool variable = p >= image && p + size <= reinterpret_cast<const u8*>(&_end);
  if (variable && reinterpret_cast<uintptr_t>(p) % alignment == 0) return;
  char where[200];
  describe(p, where, sizeof(where));
  if (variable || in_region(p, size)) {
    fail("%s: %u bytes at %s: the address is not a multiple of %u", what, size, where, alignment);
  }
  fail("%s: %u bytes at %s are out of bounds", what, size, where);
}

// For what works on both memories: atomics.
inline void check_generic(const void* pointer, u32 size, const char* what) {
  const u8* p = static_cast<const u8*>(pointer);
  const bool in_static = static_bytes != 0 && p >= static_shared && p < static_shared + static_bytes;
  const bool in_dynamic = p >= dynamic_shared - kMaxSharedBytes && p < dynamic_shared + dynamic_bytes + kGuardBytes;
  if (!in_static && !in_dynamic) return check_global(pointer, size, size, what);
  const u32 address = address_of_shared(pointer);
  if (size == 8) {
    shared_pointer<8, 8>(address, what);
  } else {
    shared_pointer<4, 4>(address, what);
  }
}

// ---- Scheduling -----------------------------------------------------------------------------------------------------

inline void release(Warp& warp, u32 lanes) {
  warp.waiting &= ~lanes;
  warp.ready |= lanes;
}

[[noreturn, gnu::noinline, gnu::cold]] inline void fail_deadlock() {
  fflush(stdout);
  current = nullptr;
  fprintf(stderr, "block (%u, %u, %u): deadlock: no thread can go on\n", block_index.x, block_index.y, block_index.z);
  for (u32 w = 0; w < num_warps; ++w) {
    Warp& warp = warps[w];
    u32 left = warp.waiting | warp.at_barrier;
    const u32 returned = warp.exited & warp.existing;
    if (returned != 0) fprintf(stderr, "  warp %u: lanes %08x have returned\n", w, returned);
    while (left != 0) {
      const Thread& first = threads[w * kWarpLanes + __builtin_ctz(left)];
      u32 same = 0;
      for (u32 lane = 0; lane < kWarpLanes; ++lane) {
        const Thread& other = threads[w * kWarpLanes + lane];
        if ((left >> lane & 1) && other.operation == first.operation && other.mask == first.mask) same |= 1u << lane;
      }
      left &= ~same;
      fprintf(stderr, "  warp %u: lanes %08x wait at %s", w, same, name_of(first.operation));
      if (first.operation >= Operation::sync) fprintf(stderr, " (mask %08x)", first.mask);
      fputc('\n', stderr);
    }
  }
  _exit(kExitFailed);
}

// __activemask sees the lanes of its warp that have come to it when nothing else can run.
inline bool release_active() {
  bool any = false;
  for (u32 w = 0; w < num_warps; ++w) {
    u32 lanes = 0;
    for (u32 left = warps[w].waiting; left != 0; left &= left - 1) {
      const u32 lane = __builtin_ctz(left);
      if (threads[w * kWarpLanes + lane].operation == Operation::active) lanes |= 1u << lane;
    }
    for (u32 left = lanes; left != 0; left &= left - 1) threads[w * kWarpLanes + __builtin_ctz(left)].output = lanes;
    release(warps[w], lanes);
    any |= lanes != 0;
  }
  return any;
}

inline Thread* take(u32 warp, u32 lane) {
  warps[warp].ready &= ~(1u << lane);
  return &threads[warp * kWarpLanes + lane];
}

inline Thread* pick_random() {
  const u32 start = random_below(num_warps);
  for (u32 i = 0; i < num_warps; ++i) {
    const u32 w = (start + i) % num_warps;
    const u32 ready = warps[w].ready;
    if (ready == 0) continue;
    u32 skip = random_below(__builtin_popcount(ready));
    u32 left = ready;
    while (skip-- != 0) left &= left - 1;
    return take(w, __builtin_ctz(left));
  }
  return nullptr;
}

// The next thread that can run: of the same warp if there is one.
inline Thread* pick(u32 warp) {
  if (shuffled) return pick_random();
  for (u32 i = 0, w = warp; i < num_warps; ++i, w = w + 1 == num_warps ? 0 : w + 1) {
    if (warps[w].ready != 0) return take(w, __builtin_ctz(warps[w].ready));
  }
  return nullptr;
}

inline void switch_to(Thread* next) {
  Thread* self = current;
  if (next == self) return;
  current = next;
  switch_context(&self->context, &next->context);
}

// The running thread must be in one of the sets of its warp.
inline void switch_away() {
  Thread* next = pick(current->warp);
  if (next == nullptr && release_active()) next = pick(current->warp);
  if (next == nullptr) fail_deadlock();
  switch_to(next);
}

// Lets others run, in turn, so that a loop that waits for another thread ends.
[[gnu::noinline]] inline void yield_thread() {
  const u32 warp = current->warp, lane = current->lane;
  warps[warp].ready |= 1u << lane;
  if (shuffled) return switch_away();
  const u32 later = lane == 31 ? 0 : warps[warp].ready & ~((2u << lane) - 1);
  if (later != 0) return switch_to(take(warp, __builtin_ctz(later)));
  switch_to(pick(warp + 1 == num_warps ? 0 : warp + 1));
}

// ---- Warp-wide operations -------------------------------------------------------------------------------------------

inline float half_values[65536];

inline float MatrixProduct::value(u32 bits) const {
  if (!of_bf16) return half_values[bits];
  const u32 word = bits << 16;
  float result;
  memcpy(&result, &word, 4);
  return result;
}

inline void multiply_matrices(Thread* lanes) {
  float a[16][16], b[16][8];
  for (u32 lane = 0; lane < kWarpLanes; ++lane) {
    const MatrixProduct& m = *static_cast<MatrixProduct*>(lanes[lane].operands);
    const u32 group = lane / 4, pair = lane % 4 * 2;
    for (u32 i = 0; i < 4; ++i) {
      a[group + i % 2 * 8][pair + i / 2 * 8] = m.value(m.a[i] & 0xFFFF);
      a[group + i % 2 * 8][pair + i / 2 * 8 + 1] = m.value(m.a[i] >> 16);
    }
    for (u32 i = 0; i < 2; ++i) {
      b[pair + i * 8][group] = m.value(m.b[i] & 0xFFFF);
      b[pair + i * 8 + 1][group] = m.value(m.b[i] >> 16);
    }
  }
  for (u32 lane = 0; lane < kWarpLanes; ++lane) {
    const MatrixProduct& m = *static_cast<MatrixProduct*>(lanes[lane].operands);
    const u32 group = lane / 4, pair = lane % 4 * 2;
    for (u32 i = 0; i < 4; ++i) {
      float sum = m.c[i];
      for (u32 k = 0; k < 16; ++k) sum += a[group + i / 2 * 8][k] * b[k][pair + i % 2];
      m.c[i] = sum;
    }
  }
}

inline u32 shuffle_source(Operation operation, u32 lane, u32 parameter, u32 width) {
  const u32 segment = lane & ~(width - 1);
  const u32 last = segment + width - 1;
  parameter &= 31;
  switch (operation) {
    case Operation::shuffle:
      return segment | (parameter & (width - 1));
    case Operation::shuffle_up:
      return lane < segment + parameter ? lane : lane - parameter;
    case Operation::shuffle_down:
      return lane + parameter > last ? lane : lane + parameter;
    default:
      return (lane ^ parameter) > last ? lane : lane ^ parameter;
  }
}

inline u64 reduce(Operation operation, u64 a, u64 b) {
  const u32 x = static_cast<u32>(a), y = static_cast<u32>(b);
  const int p = static_cast<int>(x), q = static_cast<int>(y);
  switch (operation) {
    case Operation::reduce_add:
      return x + y;
    case Operation::reduce_min:
      return x < y ? x : y;
    case Operation::reduce_max:
      return x > y ? x : y;
    case Operation::reduce_min_signed:
      return static_cast<u32>(p < q ? p : q);
    case Operation::reduce_max_signed:
      return static_cast<u32>(p > q ? p : q);
    case Operation::reduce_and:
      return x & y;
    case Operation::reduce_or:
      return x | y;
    default:
      return x ^ y;
  }
}

[[gnu::noinline]] inline void execute(Operation operation, u32 mask, u32 members, Thread* lanes) {
  const u32 first = __builtin_ctz(members);
  u64 together = 0;
  switch (operation) {
    case Operation::sync:
      return;
    case Operation::shuffle:
    case Operation::shuffle_up:
    case Operation::shuffle_down:
    case Operation::shuffle_xor:
      for (u32 left = members; left != 0; left &= left - 1) {
        Thread& thread = lanes[__builtin_ctz(left)];
        const u32 source = shuffle_source(operation, thread.lane, thread.parameter, thread.width);
        thread.output = (members >> source & 1) ? lanes[source].input : kUndefined;
      }
      return;
    case Operation::match_any:
      for (u32 left = members; left != 0; left &= left - 1) {
        Thread& thread = lanes[__builtin_ctz(left)];
        thread.output = 0;
        for (u32 others = members; others != 0; others &= others - 1) {
          const u32 other = __builtin_ctz(others);
          if (lanes[other].input == thread.input) thread.output |= 1u << other;
        }
      }
      return;
    case Operation::load_matrix:
    case Operation::multiply_matrix:
      if (members != kAllLanes) fail("%s: lanes %08x have returned or do not exist", name_of(operation), ~members);
      if (operation == Operation::multiply_matrix) return multiply_matrices(lanes);
      for (u32 lane = 0; lane < kWarpLanes; ++lane) {
        u32* registers = static_cast<MatrixRow*>(lanes[lane].operands)->registers;
        for (u32 matrix = 0; matrix < 4; ++matrix) {
          const u8* row = static_cast<MatrixRow*>(lanes[matrix * 8 + lane / 4].operands)->row;
          memcpy(&registers[matrix], row + lane % 4 * 4, 4);
        }
      }
      return;
    case Operation::ballot:
    case Operation::any:
    case Operation::all:
      for (u32 left = members; left != 0; left &= left - 1) {
        const u32 lane = __builtin_ctz(left);
        if (lanes[lane].input != 0) together |= 1u << lane;
      }
      if (operation == Operation::any) together = together != 0;
      if (operation == Operation::all) together = together == members;
      break;
    case Operation::match_all:
      together = members;
      for (u32 left = members; left != 0; left &= left - 1) {
        if (lanes[__builtin_ctz(left)].input != lanes[first].input) together = 0;
      }
      break;
    default:
      together = lanes[first].input;
      for (u32 left = members & (members - 1); left != 0; left &= left - 1) {
        together = reduce(operation, together, lanes[__builtin_ctz(left)].input);
      }
  }
  for (u32 left = members; left != 0; left &= left - 1) lanes[__builtin_ctz(left)].output = together;
}

// Executes the operation if all lanes of the mask that have not returned wait at it.
inline bool try_execute(u32 w, Operation operation, u32 mask) {
  Warp& warp = warps[w];
  const u32 members = mask & ~warp.exited;
  if ((warp.waiting & members) != members) return false;
  Thread* lanes = &threads[w * kWarpLanes];
  for (u32 left = members; left != 0; left &= left - 1) {
    const Thread& thread = lanes[__builtin_ctz(left)];
    if (thread.operation != operation || thread.mask != mask) return false;
  }
  execute(operation, mask, members, lanes);
  release(warp, members);
  return true;
}

inline u64 warp_operation(Operation operation, u32 mask, u64 input, u32 parameter = 0, u32 width = kWarpLanes,
                          void* operands = nullptr) {
  Thread& self = *current;
  const u32 bit = 1u << self.lane;
  if ((mask & bit) == 0) fail("%s: lane %u is not in its mask %08x", name_of(operation), self.lane, mask);
  if (width == 0 || width > kWarpLanes || (width & (width - 1)) != 0) {
    fail("%s: width %u is not a power of two up to 32", name_of(operation), width);
  }
  self.operation = operation;
  self.mask = mask;
  self.input = input;
  self.parameter = parameter;
  self.width = width;
  self.operands = operands;
  Warp& warp = warps[self.warp];
  warp.waiting |= bit;
  if (operation != Operation::active && try_execute(self.warp, operation, mask) && !shuffled) {
    warp.ready &= ~bit;  // the last to come goes on
  } else {
    switch_away();
  }
  return self.output;
}

// ---- The block's barrier --------------------------------------------------------------------------------------------

inline void release_barrier() {
  Operation operation = Operation::none;
  u32 count = 0;
  for (u32 w = 0; w < num_warps; ++w) {
    for (u32 left = warps[w].at_barrier; left != 0; left &= left - 1) {
      const Thread& thread = threads[w * kWarpLanes + __builtin_ctz(left)];
      if (operation == Operation::none) operation = thread.operation;
      if (operation != thread.operation) {
        fail("threads meet at %s and at %s", name_of(operation), name_of(thread.operation));
      }
      count += thread.input != 0;
    }
  }
  if (operation == Operation::barrier_or) count = count != 0;
  if (operation == Operation::barrier_and) count = count == num_at_barrier;
  for (u32 w = 0; w < num_warps; ++w) {
    for (u32 left = warps[w].at_barrier; left != 0; left &= left - 1) {
      threads[w * kWarpLanes + __builtin_ctz(left)].output = count;
    }
    warps[w].ready |= warps[w].at_barrier;
    warps[w].at_barrier = 0;
  }
  num_at_barrier = 0;
}

inline u32 block_operation(Operation operation, u32 input) {
  Thread& self = *current;
  self.operation = operation;
  self.mask = 0;
  self.input = input;
  warps[self.warp].at_barrier |= 1u << self.lane;
  ++num_at_barrier;
  if (num_at_barrier == num_alive) release_barrier();
  switch_away();
  return static_cast<u32>(self.output);
}

// ---- Asynchronous copies --------------------------------------------------------------------------------------------

inline void issue_copy(u32 shared, const void* global) {
  check_global(global, 16, 16, "copy_async_16");
  u8* target = shared_pointer<16, 16>(shared, "copy_async_16");
  Copy copy;
  copy.shared = shared;
  copy.group = current->copies.committed;
  copy.global = static_cast<const u8*>(global);
  memcpy(copy.bytes, global, 16);
  memset(target, kPoison, 16);
  ++in_flight[shared / 16];
  current->copies.push(copy);
}

// Ends the copies of all groups but the newest; those that were not committed are newer than all groups.
inline void wait_for_copies(u32 newest) {
  Copies& copies = current->copies;
  u32 done = 0;
  for (; done < copies.count && copies.items[done].group + newest < copies.committed; ++done) {
    const Copy& copy = copies.items[done];
    u8* target = shared_pointer<16, 16>(copy.shared, "copy_async_wait", true);
    for (u32 i = 0; i < 16; ++i) {
      if (target[i] != kPoison) fail("shared address %u was written while a copy to it was under way", copy.shared + i);
    }
    if (memcmp(copy.bytes, copy.global, 16) != 0) {
      char where[200];
      describe(copy.global, where, sizeof(where));
      fail("copy_async_16: the source, %s, was written while the copy was under way", where);
    }
    memcpy(target, copy.bytes, 16);
    --in_flight[copy.shared / 16];
  }
  copies.count -= done;
  memmove(copies.items, copies.items + done, copies.count * sizeof(Copy));
}

// ---- Blocks ---------------------------------------------------------------------------------------------------------

inline void exit_thread() {
  Warp& warp = warps[current->warp];
  const u32 bit = 1u << current->lane;
  warp.exited |= bit;
  --num_alive;
  for (u32 left = warp.waiting; left != 0; left &= left - 1) {
    const u32 lane = __builtin_ctz(left);
    const Thread& thread = threads[current->warp * kWarpLanes + lane];
    if ((warp.waiting >> lane & 1) && (thread.mask & bit) && thread.operation != Operation::active) {
      try_execute(current->warp, thread.operation, thread.mask);
    }
  }
  if (num_alive == 0) {
    switch_context(&current->context, &scheduler);
  } else {
    if (num_at_barrier == num_alive) release_barrier();
    switch_away();
  }
}

inline void thread_entry() {
  kernel_call();
  exit_thread();
  abort();  // a thread that has returned is never switched to
}

inline void run_block() {
  if (static_bytes != 0) memset(static_shared, kPoison, static_bytes);
  if (dynamic_bytes != 0) memset(dynamic_shared, kPoison, dynamic_bytes);
  memset(in_flight, 0, sizeof(in_flight));
  for (u32 w = 0; w < num_warps; ++w) {
    const u32 lanes = num_threads - w * kWarpLanes;
    const u32 existing = lanes >= kWarpLanes ? kAllLanes : (1u << lanes) - 1;
    warps[w] = {existing, existing, 0, 0, ~existing};
  }
  for (u32 t = 0; t < num_threads; ++t) {
    Thread& thread = threads[t];
    thread.index = {t % block_size.x, t / block_size.x % block_size.y, t / block_size.x / block_size.y};
    thread.lane = t % kWarpLanes;
    thread.warp = t / kWarpLanes;
    thread.operation = Operation::none;
    thread.copies.count = thread.copies.committed = 0;
    prepare_context(&thread.context, stacks + t * (kStackBytes + 4096) + 4096, thread_entry);
  }
  num_alive = num_threads;
  num_at_barrier = 0;
  current = pick(0);
  switch_context(&scheduler, &current->context);
  current = nullptr;
}

}  // namespace emulated
