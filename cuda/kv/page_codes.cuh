// A lane's part of a slice, and the numbers that its codes stand for; what kvpack/encode/page_coder.py does, bit for bit.
//
// A lane has four pairs r of a slice, in rows g and g + 8 and columns 2c + 8h, 2c + 8h + 1; r = 2h + (row > 7). A column has a
// scale. The columns of K are dimensions, those of V tokens. A lane's four columns are numbered 2h + e, e = 0, 1.
#pragma once

#include "kv/page.cuh"

constexpr u32 kColumns = 4;  // of a lane
constexpr u32 kRowPairs = 4;
constexpr u32 kNaNF16 = 0x7E00;

struct Two {
  float first, second;
};

// The four pairs: 16 bits a word each; 8 and 5 bits two in a word, a byte each, as 8 bits are in a page; narrower ones in one word,
// pair r at bit element_bits · r of both halves.
template <u32 format>
struct Slice {
  static constexpr u32 kBits = element_bits(format);
  static constexpr u32 kWords = kBits == 16 ? 4 : kBits > 4 ? 2 : 1;
  u32 words[kWords];
};

// Codes at bit 0 of both halves of a word, as bytes at bit 0 or 16 of the word that has pair r; and back.
__device__ __forceinline__ u32 bytes_of_halves(u32 pair, u32 r) { return __byte_perm(pair, 0, r % 2 ? 0x2044 : 0x4420); }
__device__ __forceinline__ u32 halves_of_bytes(u32 word, u32 r) { return __byte_perm(word, 0, r % 2 ? 0x4342 : 0x4140); }

// 5-bit pairs 3k … 3k + 2 lie in word k, pair 15 above them. `word(k)` loads one.
template <typename Word>
__device__ __forceinline__ Slice<kInt5> slice_of_words5(const Word& word, u32 s) {
  Slice<kInt5> slice{{0, 0}};
#pragma unroll
  for (u32 r = 0; r < 4; ++r) {
    const u32 i = 4 * s + r;
    u32 pair = 0;
    if (i < kPairs - 1) {
      pair = word(i / 3) >> 5 * (i % 3) & 0x001F001F;
    } else {
#pragma unroll
      for (u32 k = 0; k < 5; ++k) pair |= (word(k) >> 15 & 0x00010001) << k;
    }
    slice.words[r / 2] |= bytes_of_halves(pair, r);
  }
  return slice;
}

// 3-bit pairs 5k … 5k + 4 lie in word k, pair 15 above them.
__device__ __forceinline__ u32 slice_of_words3(u32 w0, u32 w1, u32 w2, u32 s) {
  if (s == 0) return w0 & 0x0FFF0FFF;
  if (s == 1) return (w0 >> 12 & 0x00070007) | (w1 & 0x01FF01FF) << 3;
  if (s == 2) return (w1 >> 9 & 0x003F003F) | (w2 & 0x003F003F) << 6;
  return (w2 >> 6 & 0x01FF01FF) | (w0 >> 15 & 0x00010001) << 9 | (w1 >> 15 & 0x00010001) << 10 | (w2 >> 15 & 0x00010001) << 11;
}
__device__ __forceinline__ void words3_of_slices(u32 (&w)[3], u32 a0, u32 a1, u32 a2, u32 a3) {
  w[0] = a0 | (a1 & 0x00070007) << 12 | (a3 >> 9 & 0x00010001) << 15;
  w[1] = (a1 >> 3 & 0x01FF01FF) | (a2 & 0x003F003F) << 9 | (a3 >> 10 & 0x00010001) << 15;
  w[2] = (a2 >> 6 & 0x003F003F) | (a3 & 0x01FF01FF) << 6 | (a3 >> 11 & 0x00010001) << 15;
}

// Slice s of the group whose payload is given.
template <u32 format>
__device__ __forceinline__ Slice<format> load_slice(const u8* payload, u32 s, u32 lane) {
  Slice<format> slice;
  if constexpr (element_bits(format) == 16) {
    const uint4 v = load_once_v4(payload + 16 * (kLanes * s + lane));
    slice.words[0] = v.x, slice.words[1] = v.y, slice.words[2] = v.z, slice.words[3] = v.w;
  } else if constexpr (element_bits(format) == 8) {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(payload + 16 * (kLanes * (s / 2) + lane) + 8 * (s % 2)));
    slice.words[0] = v.x, slice.words[1] = v.y;
  } else if constexpr (format == kInt5) {
    const u32* words = reinterpret_cast<const u32*>(payload);
    slice = slice_of_words5([&](u32 k) { return __ldg(words + (k < 4 ? 4 * lane + k : 4 * kLanes + lane)); }, s);
  } else if constexpr (format == KVPACK_FORMAT_INT4) {
    slice.words[0] = __ldg(reinterpret_cast<const u32*>(payload + 16 * lane + 4 * s));
  } else if constexpr (format == KVPACK_FORMAT_INT2) {
    slice.words[0] = __ldg(reinterpret_cast<const u32*>(payload + 8 * lane + 4 * (s / 2))) >> 8 * (s % 2);
  } else {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(payload + 8 * lane));
    slice.words[0] = slice_of_words3(v.x, v.y, __ldg(reinterpret_cast<const u32*>(payload + 8 * kLanes + 4 * lane)), s);
  }
  return slice;
}

// All slices of a group, by the widest loads.
template <u32 format>
__device__ __forceinline__ void load_group(const u8* payload, u32 lane, Slice<format> (&slices)[kSlices]) {
  if constexpr (element_bits(format) == 16) {
#pragma unroll
    for (u32 s = 0; s < kSlices; ++s) slices[s] = load_slice<format>(payload, s, lane);
  } else if constexpr (element_bits(format) == 8) {
#pragma unroll
    for (u32 s = 0; s < kSlices; s += 2) {
      const uint4 v = load_once_v4(payload + 16 * (kLanes * (s / 2) + lane));
      slices[s].words[0] = v.x, slices[s].words[1] = v.y, slices[s + 1].words[0] = v.z, slices[s + 1].words[1] = v.w;
    }
  } else if constexpr (format == KVPACK_FORMAT_INT4) {
    const uint4 v = load_once_v4(payload + 16 * lane);
    slices[0].words[0] = v.x, slices[1].words[0] = v.y, slices[2].words[0] = v.z, slices[3].words[0] = v.w;
  } else if constexpr (format == KVPACK_FORMAT_INT2) {
    const uint2 v = load_once_v2(payload + 8 * lane);
    slices[0].words[0] = v.x, slices[1].words[0] = v.x >> 8, slices[2].words[0] = v.y, slices[3].words[0] = v.y >> 8;
  } else if constexpr (format == kInt5) {
    const uint4 v = load_once_v4(payload + 16 * lane);
    const u32 words[5] = {v.x, v.y, v.z, v.w, load_once_u32(payload + 16 * kLanes + 4 * lane)};
#pragma unroll
    for (u32 s = 0; s < kSlices; ++s) slices[s] = slice_of_words5([&](u32 k) { return words[k]; }, s);
  } else {
    const uint2 v = load_once_v2(payload + 8 * lane);
    const u32 last = load_once_u32(payload + 8 * kLanes + 4 * lane);
#pragma unroll
    for (u32 s = 0; s < kSlices; ++s) slices[s].words[0] = slice_of_words3(v.x, v.y, last, s);
  }
}

// Codes of a quantized format; all their other bits are 0.
template <u32 format>
__device__ __forceinline__ void store_group(u8* payload, u32 lane, const Slice<format> (&slices)[kSlices]) {
  if constexpr (element_bits(format) == 8) {
#pragma unroll
    for (u32 s = 0; s < kSlices; s += 2) {
      *reinterpret_cast<uint4*>(payload + 16 * (kLanes * (s / 2) + lane)) =
          make_uint4(slices[s].words[0], slices[s].words[1], slices[s + 1].words[0], slices[s + 1].words[1]);
    }
  } else if constexpr (format == KVPACK_FORMAT_INT4) {
    *reinterpret_cast<uint4*>(payload + 16 * lane) =
        make_uint4(slices[0].words[0], slices[1].words[0], slices[2].words[0], slices[3].words[0]);
  } else if constexpr (format == KVPACK_FORMAT_INT2) {
    *reinterpret_cast<uint2*>(payload + 8 * lane) =
        make_uint2(slices[0].words[0] | slices[1].words[0] << 8, slices[2].words[0] | slices[3].words[0] << 8);
  } else if constexpr (format == kInt5) {
    u32 words[5] = {0, 0, 0, 0, 0};
#pragma unroll
    for (u32 i = 0; i < kPairs; ++i) {
      const u32 pair = halves_of_bytes(slices[i / 4].words[i % 4 / 2], i);
#pragma unroll
      for (u32 k = 0; k < 5; ++k) {
        if (i < kPairs - 1) words[k] |= k == i / 3 ? pair << 5 * (i % 3) : 0;
        else words[k] |= (pair >> k & 0x00010001) << 15;
      }
    }
    *reinterpret_cast<uint4*>(payload + 16 * lane) = make_uint4(words[0], words[1], words[2], words[3]);
    *reinterpret_cast<u32*>(payload + 16 * kLanes + 4 * lane) = words[4];
  } else {
    u32 words[3];
    words3_of_slices(words, slices[0].words[0], slices[1].words[0], slices[2].words[0], slices[3].words[0]);
    *reinterpret_cast<uint2*>(payload + 8 * lane) = make_uint2(words[0], words[1]);
    *reinterpret_cast<u32*>(payload + 8 * kLanes + 4 * lane) = words[2];
  }
}


// An unsigned number in the low bits of 2^23 is that much more, so the difference is exact.
__device__ __forceinline__ float code_number(u32 code, u32 half) {
  return subtract_ieee(__uint_as_float(0x4B000000 | code), static_cast<float>((1u << 23) + half));
}
// fp16 has e4m3's fraction at bit 7 and an exponent that is 8 less.
__device__ __forceinline__ float e4m3_value(u32 code) {
  const float value = multiply_ieee(f16_value((code & 0x80) << 8 | (code & 0x7F) << 7), 256.0f);
  return (code & 0x7F) == 0x7F ? __uint_as_float(0x7FC00000) : value;
}

// The two numbers in a word of a 16-bit format.
template <u32 format>
__device__ __forceinline__ Two halves(u32 word) {
  if constexpr (format == KVPACK_FORMAT_FP16) return {f16_value(word & 0xFFFF), f16_value(word >> 16)};
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000)};
}

// What the codes of pair r say, before scale and center.
template <u32 format>
__device__ __forceinline__ Two pair_numbers(const Slice<format>& slice, u32 r) {
  constexpr u32 bits = element_bits(format), half = 1u << (bits - 1);
  if constexpr (bits == 16) {
    return halves<format>(slice.words[r]);
  } else if constexpr (bits > 4) {
    const u32 word = slice.words[r / 2] >> 16 * (r % 2), first = word & 0xFF, second = word >> 8 & 0xFF;
    if constexpr (is_integer(format)) return {code_number(first, half), code_number(second, half)};
    if constexpr (format == KVPACK_FORMAT_FP8_E4M3) return {e4m3_value(first), e4m3_value(second)};
    return {f16_value(first << 8), f16_value(second << 8)};
  } else {
    constexpr u32 mask = (1u << bits) - 1;
    const u32 word = slice.words[0] >> bits * r;
    return {code_number(word & mask, half), code_number(word >> 16 & mask, half)};
  }
}

// Scales, and centers, of a lane's columns.
template <u32 side, u32 format>
struct Columns {
  static constexpr bool kCentered = has_centers(side, format);
  float scales[kColumns], centers[kColumns];

  // Loads those in front of a group of K, or of slice `s` in front of a block of V.
  __device__ __forceinline__ void load(const u8* header, u32 s, u32 lane) {
    if constexpr (is_quantized(format) && side == KVPACK_SIDE_K) {
      load_of_group(scales, header, lane);
      load_of_group(centers, header + kScalesBytes, lane);
    } else if constexpr (is_quantized(format)) {
      load_of_slice(scales, header, s, lane);
      if constexpr (kCentered) load_of_slice(centers, header + kTokenScalesBytes, s, lane);
    }
  }

  __device__ __forceinline__ float value(float number, u32 column) const {
    if constexpr (!is_quantized(format)) return number;
    const float scaled = multiply_ieee(scales[column], number);
    return kCentered ? add_ieee(centers[column], scaled) : scaled;
  }
  __device__ __forceinline__ Two pair(const Slice<format>& slice, u32 r) const {
    const Two numbers = pair_numbers<format>(slice, r);
    return {value(numbers.first, 2 * (r >> 1)), value(numbers.second, 2 * (r >> 1) + 1)};
  }

 private:
  static __device__ __forceinline__ void load_of_group(float (&values)[kColumns], const u8* header, u32 lane) {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(header + 8 * (lane % 4)));
    values[0] = f16_value(v.x & 0xFFFF), values[1] = f16_value(v.x >> 16);
    values[2] = f16_value(v.y & 0xFFFF), values[3] = f16_value(v.y >> 16);
  }
  static __device__ __forceinline__ void load_of_slice(float (&values)[kColumns], const u8* header, u32 s, u32 lane) {
#pragma unroll
    for (u32 e = 0; e < 2; ++e) {
      const u32 of_both = __ldg(reinterpret_cast<const u32*>(header + 16 * (2 * (lane % 4) + e) + 4 * s));
      values[e] = f16_value(of_both & 0xFFFF), values[2 + e] = f16_value(of_both >> 16);
    }
  }
};
