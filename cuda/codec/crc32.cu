// CRC-32 of the tiles of a payload (docs/FORMAT.md, "Scope": that of zlib).
//
// A CRC is the remainder of a polynomial over GF(2), so words may be taken in any order if each is multiplied by the
// power of x that its place asks for. T threads take 4·T words a round: thread t words 4t … 4t + 3, each in a register of
// its own that is multiplied by x^(128·T) from round to round (four table look-ups) before the next word is added. At the
// end each register is multiplied once by the power of its place, and all are added.
//
// Bits are reflected as zlib has them: bit 31 is the coefficient of x^0.
#include "codec/encode_tiles.cuh"

constexpr u32 kThreads = KVPACK_CRC_THREADS;
constexpr u32 kWordsPerRound = 4 * kThreads;
constexpr u32 kPolynomial = KVPACK_CRC_POLYNOMIAL;

// a · b mod P.
__device__ __forceinline__ u32 multiply(u32 a, u32 b) {
  u32 product = 0;
  for (u32 bit = 0; bit < 32; ++bit) {
    product ^= (a >> (31 - bit) & 1) ? b : 0;
    b = (b >> 1) ^ ((b & 1) ? kPolynomial : 0);
  }
  return product;
}

// A block takes a tile, and writes the CRC to its metadata.
//
// step: u32 [4, 256], step[k][v] = (v at byte k) · x^(128·T); powers: u32 [2 · 4T + 1], powers[i] = x^(32·(i − 4T));
// metadata: u32 [tiles, 8]; payload is aligned to 16 bytes, and readable up to the next multiple of 16 of a tile's end.
extern "C" __global__ void __launch_bounds__(kThreads)
crc32(const u8* payload, u32 first_tile, const u32* step, const u32* powers, u32* metadata) {
  __shared__ u32 table[4][256];
  __shared__ u32 warp_sums[kThreads / kLanes];
  const u32 thread = threadIdx.x;
#pragma unroll
  for (u32 k = 0; k < 4; ++k) table[k][thread] = step[k * 256 + thread];
  __syncthreads();
  u32* entry = metadata + static_cast<u64>(first_tile + blockIdx.x) * kMetadataWords;
  const u32 words = entry[2] / 4;
  const uint4* data = reinterpret_cast<const uint4*>(payload + (entry[0] | static_cast<u64>(entry[1]) << 32));
  const u32 rounds = ceil_div(words, kWordsPerRound);
  u32 sums[4] = {0, 0, 0, 0};
  uint4 following = make_uint4(0, 0, 0, 0);
  if (4 * thread < words) following = data[thread];
  for (u32 round = 0; round < rounds; ++round) {
    const u32 first = round * kWordsPerRound + 4 * thread;
    const uint4 four = following;
    // Under way during this round's look-ups.
    if (first + kWordsPerRound < words) following = data[first / 4 + kThreads];
    u32 next[4] = {four.x, four.y, four.z, four.w};
    if (first == 0) next[0] = ~next[0];  // the CRC's initial value
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      const u32 s = sums[i];
      sums[i] = table[0][s & 0xFF] ^ table[1][s >> 8 & 0xFF] ^ table[2][s >> 16 & 0xFF] ^ table[3][s >> 24];
      // The tile may end within these words; behind it lie zeros (padding).
      sums[i] ^= first + i < words ? next[i] : 0;
    }
  }
  // Word w of the last round lies rounds·4T − w words in front of the rounds' end, which lies beyond the data's.
  const u32 beyond = rounds * kWordsPerRound - words;
  u32 sum = 0;
#pragma unroll
  for (u32 i = 0; i < 4; ++i) {
    sum ^= multiply(sums[i], powers[2 * kWordsPerRound - (4 * thread + i) - beyond]);
  }
#pragma unroll
  for (u32 distance = kLanes / 2; distance > 0; distance /= 2) sum ^= __shfl_xor_sync(kAllLanes, sum, distance);
  if (thread % kLanes == 0) warp_sums[thread / kLanes] = sum;
  __syncthreads();
  if (thread == 0) {
    u32 crc = 0;
    for (u32 warp = 0; warp < kThreads / kLanes; ++warp) crc ^= warp_sums[warp];
    entry[7] = ~crc;
  }
}
