// A launch: reads a job (tests/emulator.py writes it), runs the grid, and writes the arrays back into the job's file.
#pragma once

#include "execution.h"

namespace emulated {

struct JobHeader {
  u64 magic;
  u32 grid[3], block[3];
  u32 shared_bytes, shuffled;
  u64 seed;
  u32 num_regions, num_arguments;
};
struct JobRegion {
  u64 bytes, file_offset;
  u32 phase, writable;  // phase: the address modulo 16
  u64 argument;
};
struct JobArgument {
  u32 kind;  // p: pointer, n: null, i: int, u: unsigned, q: u64, f: float
  u32 region;
  u64 value;  // the bits, or the offset in the region
};
constexpr u64 kJobMagic = 0x3130424F4A55454Bull;

inline JobHeader job;
inline JobArgument* job_arguments = nullptr;

// ---- Arguments ------------------------------------------------------------------------------------------------------

template <typename T>
struct Kind;
template <typename T>
struct Kind<T*> {
  static constexpr char value = 'p';
};
template <>
struct Kind<int> {
  static constexpr char value = 'i';
};
template <>
struct Kind<u32> {
  static constexpr char value = 'u';
};
template <>
struct Kind<u64> {
  static constexpr char value = 'q';
};
template <>
struct Kind<float> {
  static constexpr char value = 'f';
};

inline const char* name_of_kind(u32 kind) {
  return kind == 'p'   ? "an array"
         : kind == 'n' ? "None"
         : kind == 'i' ? "int32"
         : kind == 'u' ? "uint32"
         : kind == 'q' ? "uint64"
                       : "float32";
}

template <typename T>
inline T argument(u32 i) {
  const JobArgument& given = job_arguments[i];
  if (given.kind != Kind<T>::value && !(given.kind == 'n' && Kind<T>::value == 'p')) {
    fail("argument %u is %s, the kernel's parameter is %s", i, name_of_kind(given.kind), name_of_kind(Kind<T>::value));
  }
  u64 bits = given.value;
  if (given.kind == 'p') bits += reinterpret_cast<u64>(regions[given.region].begin);
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

template <u32... i>
struct Numbers {};
template <u32 n, u32... i>
struct Count : Count<n - 1, n - 1, i...> {};
template <u32... i>
struct Count<0, i...> {
  typedef Numbers<i...> type;
};

template <auto kernel>
struct Call;
template <typename... P, void (*kernel)(P...)>
struct Call<kernel> {
  template <u32... i>
  static void run_with(Numbers<i...>) {
    kernel(argument<P>(i)...);
  }
  static void run() { run_with(typename Count<sizeof...(P)>::type()); }
  static constexpr u32 parameters = sizeof...(P);
};

// ---- Memory ---------------------------------------------------------------------------------------------------------

inline u8* reserve(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail("mmap of %zu bytes: %s", bytes, strerror(errno));
  return static_cast<u8*>(memory);
}

inline void protect(u8* memory, size_t bytes, int access) {
  if (bytes != 0 && mprotect(memory, bytes, access) != 0) fail("mprotect of %zu bytes: %s", bytes, strerror(errno));
}

inline size_t whole_pages(size_t bytes) { return (bytes + 4095) / 4096 * 4096; }

// `transfer` is pread or pwrite.
template <typename Transfer, typename Byte>
inline void transfer_all(Transfer transfer, int file, Byte* bytes, size_t count, size_t offset) {
  while (count != 0) {
    const ssize_t done = transfer(file, bytes, count, static_cast<off_t>(offset));
    if (done <= 0) fail("the job's file: %s", done == 0 ? "too short" : strerror(errno));
    bytes += done;
    count -= static_cast<size_t>(done);
    offset += static_cast<size_t>(done);
  }
}

// The bytes end less than 16 bytes before a page that cannot be accessed.
inline void map_region(Region& region, const JobRegion& given, int file) {
  const size_t pages = whole_pages(given.bytes + 32);
  region.mapped = reserve(pages + 2 * kGuardBytes) + kGuardBytes;
  region.last = region.mapped + pages;
  protect(region.mapped, pages, PROT_READ | PROT_WRITE);
  memset(region.mapped, kPoison, pages);
  u8* begin = region.last - given.bytes;
  begin -= (reinterpret_cast<uintptr_t>(begin) - given.phase) % 16;
  region.begin = begin;
  region.end = begin + given.bytes;
  region.writable = given.writable != 0;
  region.argument = static_cast<u32>(given.argument);
  transfer_all(pread, file, begin, given.bytes, given.file_offset);
  if (!region.writable) protect(region.mapped, pages, PROT_READ);
}

inline void check_surroundings(const Region& region) {
  for (const u8* p = region.mapped; p < region.last; ++p) {
    if (p == region.begin) p = region.end;
    if (p < region.last && *p != kPoison) {
      char where[200];
      describe(p, where, sizeof(where));
      fail("something was written at %s, out of bounds", where);
    }
  }
}

// ---- Signals --------------------------------------------------------------------------------------------------------

inline void on_fault(int signal, siginfo_t* info, void*) {
  char where[200];
  describe(static_cast<const u8*>(info->si_addr), where, sizeof(where));
  if (signal == SIGTERM) fail("stopped here: the time was over");
  if (signal == SIGABRT) fail("aborted");
  if (signal == SIGFPE) fail("division by zero");
  if (info->si_code == SI_KERNEL) fail("access fault: a vector access that is not aligned, or a wild pointer");
  fail("access fault (%s) at %s", strsignal(signal), where);
}

inline void handle_signals() {
  stack_t stack = {};
  stack.ss_size = 256 * 1024;
  stack.ss_sp = malloc(stack.ss_size);
  sigaltstack(&stack, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  const int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, SIGTERM};
  for (const int signal : signals) sigaction(signal, &action, nullptr);
}

extern "C" void __sanitizer_set_death_callback(void (*)()) __attribute__((weak));
inline void on_sanitizer() {
  print_position();
  fprintf(stderr, "stopped there\n");
}

// All floating-point arithmetic flushes denormals, as -ftz=true does.
inline void flush_denormals() {
#if defined(__x86_64__)
  __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | 0x8040);
#elif defined(__aarch64__)
  u64 control;
  asm volatile("mrs %0, fpcr" : "=r"(control));
  asm volatile("msr fpcr, %0" ::"r"(control | 1u << 24));
#endif
}

float value_of_half(u32 bits);

// ---- Running --------------------------------------------------------------------------------------------------------

inline void run_grid() {
  grid_size = {job.grid[0], job.grid[1], job.grid[2]};
  block_size = {job.block[0], job.block[1], job.block[2]};
  num_threads = block_size.x * block_size.y * block_size.z;
  num_warps = (num_threads + kWarpLanes - 1) / kWarpLanes;
  if (num_threads == 0 || num_threads > kMaxThreads) fail("a block of %u threads", num_threads);
  const u64 num_blocks = static_cast<u64>(grid_size.x) * grid_size.y * grid_size.z;
  if (num_blocks == 0 || grid_size.y > 65535 || grid_size.z > 65535) fail("a grid of %llu blocks", num_blocks);

  static_shared = __start_kvpack_shared;
  static_bytes = static_shared == nullptr ? 0 : static_cast<u32>(__stop_kvpack_shared - __start_kvpack_shared);
  dynamic_bytes = job.shared_bytes;
  if (static_bytes > kMaxSharedBytes || dynamic_bytes > kMaxSharedBytes - static_bytes) {
    fail("%u bytes of static and %u of dynamic shared memory are more than %u", static_bytes, dynamic_bytes,
         kMaxSharedBytes);
  }
  dynamic_base = (kSharedBase + static_bytes + 1023) / 1024 * 1024 + 1024;
  const size_t pages = whole_pages(dynamic_bytes);
  u8* memory = reserve(2 * kGuardBytes + pages) + kGuardBytes;
  protect(memory, pages, PROT_READ | PROT_WRITE);
  dynamic_shared = memory + pages - (dynamic_bytes + 15) / 16 * 16;

  stacks = reserve(kMaxThreads * (kStackBytes + 4096));
  for (u32 t = 0; t < num_threads; ++t) {
    protect(stacks + t * (kStackBytes + 4096) + 4096, kStackBytes, PROT_READ | PROT_WRITE);
  }

  u32* order = static_cast<u32*>(malloc(num_blocks * sizeof(u32)));
  for (u32 i = 0; i < num_blocks; ++i) order[i] = i;
  if (shuffled) {
    for (u32 i = static_cast<u32>(num_blocks); i > 1; --i) {
      const u32 other = random_below(i);
      const u32 kept = order[i - 1];
      order[i - 1] = order[other];
      order[other] = kept;
    }
  }
  for (u32 i = 0; i < num_blocks; ++i) {
    const u32 b = order[i];
    block_index = {b % grid_size.x, b / grid_size.x % grid_size.y, b / grid_size.x / grid_size.y};
    run_block();
  }
}

inline int launch(const char* path, void (*call)(), u32 parameters) {
  handle_signals();
  if (__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(on_sanitizer);
  for (u32 bits = 0; bits < 65536; ++bits) half_values[bits] = value_of_half(bits);

  const int file = open(path, O_RDWR);
  if (file < 0) fail("%s: %s", path, strerror(errno));
  transfer_all(pread, file, reinterpret_cast<u8*>(&job), sizeof(job), 0);
  if (job.magic != kJobMagic) fail("%s is no job of this version", path);
  if (job.num_arguments != parameters) {
    fail("%u arguments are given, the kernel has %u parameters", job.num_arguments, parameters);
  }
  JobRegion* given = static_cast<JobRegion*>(calloc(job.num_regions + 1, sizeof(JobRegion)));
  job_arguments = static_cast<JobArgument*>(calloc(job.num_arguments + 1, sizeof(JobArgument)));
  const size_t region_bytes = job.num_regions * sizeof(JobRegion);
  transfer_all(pread, file, reinterpret_cast<u8*>(given), region_bytes, sizeof(job));
  transfer_all(pread, file, reinterpret_cast<u8*>(job_arguments), job.num_arguments * sizeof(JobArgument),
               sizeof(job) + region_bytes);
  regions = static_cast<Region*>(calloc(job.num_regions + 1, sizeof(Region)));
  for (u32 i = 0; i < job.num_regions; ++i) map_region(regions[i], given[i], file);
  num_regions = job.num_regions;
  shuffled = job.shuffled != 0;
  random_state = job.seed * 0x9E3779B97F4A7C15ull | 1;
  kernel_call = call;

  flush_denormals();
  run_grid();
  for (u32 i = 0; i < num_regions; ++i) {
    if (!regions[i].writable) continue;
    check_surroundings(regions[i]);
    transfer_all(pwrite, file, const_cast<const u8*>(regions[i].begin), given[i].bytes, given[i].file_offset);
  }
  fflush(stdout);
  _exit(0);
}

}  // namespace emulated

#define KVPACK_EMULATED_MAIN(function)                                                            \
  int main(int argc, char** argv) {                                                               \
    if (argc != 2) return 2;                                                                      \
    return emulated::launch(argv[1], emulated::Call<&function>::run, emulated::Call<&function>::parameters); \
  }
