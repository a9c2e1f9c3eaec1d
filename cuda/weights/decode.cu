// Coded tensor → expanded tensor in device memory, or to nowhere (a check of every lane).
//
// KVPACK_OUTPUT says what is written, row-major, [matrices, rows, cols]:
//   0 nothing            1 i8 integers         2 i16 integers, outliers added
//   3 fp16   4 bf16   5 fp32: (scale × (integer + outlier) + row offset) × column scale, each rounded to fp32, and to the type (§8)
//   6 the numbers of a kind without scales: u8, or the bit patterns of floats (u8, u16, u32)
//
// A warp decodes 32 rows × 32 columns into shared memory and writes them from there, so that neighbouring lanes write neighbouring
// bytes. Shared memory: table (16 KiB) | for each warp: rows to be written | words, one or two buffers.
#include "weights/schedule.cuh"

constexpr u32 kBuffers = KVPACK_BUFFERS;
constexpr u32 kOutput = KVPACK_OUTPUT;
constexpr u32 kElementBytes = kElementBits <= 8 ? 1 : kElementBits / 8;
constexpr u32 kOutputBytes = kOutput <= 1 ? 1 : kOutput <= 4 ? 2 : kOutput == 5 ? 4 : kElementBytes;
constexpr u32 kRowUnits = 2 * kOutputBytes;  // of 16 bytes in a row of 32 columns
constexpr u32 kUnitCols = 16 / kOutputBytes;
constexpr bool kScaled = kOutput >= 3 && kOutput <= 5;
// Asked for only where a tensor has them, because all of them cost registers.
constexpr bool kHasOutliers = KVPACK_OUTLIERS != 0 && (kScaled || kOutput == 2);
constexpr bool kHasRowOffsets = KVPACK_ROW_OFFSETS != 0 && kScaled;
constexpr bool kHasColumnScales = KVPACK_COLUMN_SCALES != 0 && kScaled;
constexpr bool kPredicted = KVPACK_PREDICTED != 0 && kElementBits <= 8;

// 16-byte unit of a row in shared memory: turned so that eight lanes in a row meet eight different groups of banks.
__device__ __forceinline__ u32 unit_address(u32 rows, u32 row, u32 unit) {
  return rows + 16 * (row * kRowUnits + (unit ^ (row / (8 / kRowUnits) % kRowUnits)));
}

// Four elements of a kind → four numbers of a byte.
__device__ __forceinline__ u32 byte_numbers(u32 elements) {
  if constexpr (kSigned) {
    if constexpr (kIntegerBits == 8) return elements ^ 0x80808080u;
    return ((elements | 0x80808080u) - kBytes * kHalf) ^ 0x80808080u;  // no borrow passes between bytes
  } else if constexpr (KVPACK_ELEMENT_KIND == KVPACK_KIND_UNSIGNED) {
    return elements;
  } else {
    return (elements >> 1 & 0x7F7F7F7Fu) | (elements & kBytes) << 7;  // floats are stored rotated left by one bit (§4)
  }
}

// The integer of an element, as fp32; exact.
template <u32 byte>
__device__ __forceinline__ float integer_value(u32 elements) {
  float biased = __uint_as_float(__byte_perm(elements, 0x4B000000u, 0x7540 | byte));  // 2^23 + u
  return biased - (8388608.0f + (kSigned ? kHalf : 0u));
}

__device__ __forceinline__ u32 output_bits(float value) {
  if constexpr (kOutput == 3) return f16_bits(value);
  if constexpr (kOutput == 4) return bf16_bits(value);
  return __float_as_uint(value);
}

__device__ __forceinline__ u32 output_pair(float low, float high) {
  return kOutput == 3 ? f16x2_bits(low, high) : bf16x2_bits(low, high);
}

// The bit pattern of a float of 16 or 32 bits in byte `byte` of slot k.
template <u32 k, u32 byte>
__device__ __forceinline__ u32 wide_pattern(const KeepSlots& codes, const RawChunk& raw) {
  const u32 element = wide_element<k, byte>(codes, raw);
  return element >> 1 | (element & 1) << (kElementBits - 1);
}

// One lane's row of a chunk, in the output's type, into shared memory.
template <u32 unit = 0>
__device__ __forceinline__ void put_wide_row(u32 rows, u32 lane, const KeepSlots& codes, const RawChunk& raw) {
  if constexpr (unit < kRowUnits) {
    uint4 v;
    if constexpr (kElementBits == 16) {
      v.x = wide_pattern<2 * unit, 0>(codes, raw) | wide_pattern<2 * unit, 1>(codes, raw) << 16;
      v.y = wide_pattern<2 * unit, 2>(codes, raw) | wide_pattern<2 * unit, 3>(codes, raw) << 16;
      v.z = wide_pattern<2 * unit + 1, 0>(codes, raw) | wide_pattern<2 * unit + 1, 1>(codes, raw) << 16;
      v.w = wide_pattern<2 * unit + 1, 2>(codes, raw) | wide_pattern<2 * unit + 1, 3>(codes, raw) << 16;
    } else {
      v.x = wide_pattern<unit, 0>(codes, raw);
      v.y = wide_pattern<unit, 1>(codes, raw);
      v.z = wide_pattern<unit, 2>(codes, raw);
      v.w = wide_pattern<unit, 3>(codes, raw);
    }
    store_shared_v4(unit_address(rows, lane, unit), v);
    put_wide_row<unit + 1>(rows, lane, codes, raw);
  }
}

// One number into shared memory.
__device__ __forceinline__ void put_number(u32 rows, u32 row, u32 col, u32 bits) {
  u32 address = unit_address(rows, row, col / kUnitCols) + col % kUnitCols * kOutputBytes;
  if constexpr (kOutputBytes == 1) store_shared_u8(address, bits);
  if constexpr (kOutputBytes == 2) store_shared_u16(address, bits);
  if constexpr (kOutputBytes == 4) store_shared_u32(address, bits);
}

// A warp writes its 32 rows × 32 columns, as far as they exist. `aligned`: rows of the output begin at multiples of 16 bytes.
__device__ __forceinline__ void write_rows(u32 rows, u8* output, u32 cols, u32 num_rows, u32 num_cols, bool aligned,
                                           u32 lane) {
  if (aligned) {
#pragma unroll
    for (u32 i = lane; i < kLanes * kRowUnits; i += kLanes) {
      u32 row = i / kRowUnits, unit = i % kRowUnits;
      if (row < num_rows && unit * kUnitCols < num_cols) {
        *reinterpret_cast<uint4*>(output + static_cast<u64>(row) * cols * kOutputBytes + 16 * unit) = load_shared_v4(unit_address(rows, row, unit));
      }
    }
  } else {
#pragma unroll 1
    for (u32 row = 0; row < num_rows; ++row) {
      u32 address = unit_address(rows, row, lane / kUnitCols) + lane % kUnitCols * kOutputBytes;
      u8* to = output + static_cast<u64>(row) * cols * kOutputBytes + lane * kOutputBytes;
      if (lane < num_cols) {
        if constexpr (kOutputBytes == 1) *to = static_cast<u8>(load_shared_u8(address));
        if constexpr (kOutputBytes == 2) *reinterpret_cast<u16*>(to) = static_cast<u16>(load_shared_u16(address));
        if constexpr (kOutputBytes == 4) *reinterpret_cast<u32*>(to) = load_shared_u32(address);
      }
    }
  }
}

// Writes a lane's row of a chunk into shared memory, 16 columns at a time, as its slots come.
struct RowWriter {
  u32 rows;
  u32 lane;
  float scale;
  u32 kept[kSlotsKept];
  // The lane's outliers: where the next one is, its column in the tile (or one that no tile has), how many are left.
  const u32* outlier;
  u32 outlier_col;
  u32 num_outliers;
  u32 first_col;  // of the chunk, in the tile
  u32 delta_bits;
  float offset;
  const float* column_scales;  // of the tile's first column
  u32 last_col;                // of the tile

  __device__ __forceinline__ void find_outliers(const Group& group, const Place& place) {
    outlier = outliers_of(group, place);
    num_outliers = 0;
    for (u32 i = 0; i < group.num_outliers; ++i) {
      u32 row = outlier_lane(__ldg(outliers_of(group, place) + i));
      outlier += row < lane;
      num_outliers += row == lane;
    }
    look_ahead();
  }

  __device__ __forceinline__ void look_ahead() {
    outlier_col = num_outliers > 0 ? ::outlier_col(__ldg(outlier), delta_bits) : KVPACK_MAX_TILE_COLS;
  }

  template <u32 k>
  __device__ __forceinline__ void slot(u32 elements) {
    kept[k % kSlotsKept] = elements;
    if constexpr (kSlotsKept == 4 && k % 4 == 3) put_columns<k / 4>();
    if constexpr (kSlotsKept == 8 && k == 7) {
      put_columns<0>();
      put_columns<1>();
    }
  }

  // The number of column `col` of the chunk. With vectors in between it may be denormal, which the product alone never is.
  __device__ __forceinline__ float value(float integer, u32 col) const {
    if constexpr (!kHasRowOffsets && !kHasColumnScales) return multiply_rn(scale, integer);
    float number = multiply_ieee(scale, integer);
    if constexpr (kHasRowOffsets) number = add_ieee(number, offset);
    if constexpr (kHasColumnScales) number = multiply_ieee(number, __ldg(column_scales + min(first_col + col, last_col)));
    return number;
  }

  // Columns 16·half … 16·half + 15 of the chunk.
  template <u32 half>
  __device__ __forceinline__ void put_columns() {
    u32 columns[4];
    order_columns<half>(kept, columns);
    if constexpr (kOutputBytes == 1) {
      put_unit(half, make_uint4(byte_numbers(columns[0]), byte_numbers(columns[1]), byte_numbers(columns[2]),
                                byte_numbers(columns[3])));
    } else if constexpr (kOutput == 2) {
      // u − half in 16 bits: the bytes are spread, and 0x8000 keeps a borrow from passing between halves.
      auto spread = [](u32 bytes, u32 selector) {
        return ((__byte_perm(bytes, 0, selector) | 0x80008000u) - 0x00010001u * (kSigned ? kHalf : 0)) ^ 0x80008000u;
      };
#pragma unroll
      for (u32 i = 0; i < 2; ++i) {
        put_unit(2 * half + i, make_uint4(spread(columns[2 * i], 0x4140), spread(columns[2 * i], 0x4342),
                                          spread(columns[2 * i + 1], 0x4140), spread(columns[2 * i + 1], 0x4342)));
      }
    } else if constexpr (kOutputBytes == 2) {
#pragma unroll
      for (u32 i = 0; i < 2; ++i) {
        const u32 a = columns[2 * i], b = columns[2 * i + 1], at = 16 * half + 8 * i;
        put_unit(2 * half + i, make_uint4(output_pair(value(integer_value<0>(a), at), value(integer_value<1>(a), at + 1)),
                                          output_pair(value(integer_value<2>(a), at + 2), value(integer_value<3>(a), at + 3)),
                                          output_pair(value(integer_value<0>(b), at + 4), value(integer_value<1>(b), at + 5)),
                                          output_pair(value(integer_value<2>(b), at + 6), value(integer_value<3>(b), at + 7))));
      }
    } else {
#pragma unroll
      for (u32 i = 0; i < 4; ++i) {
        const u32 a = columns[i], at = 16 * half + 4 * i;
        put_unit(4 * half + i, make_uint4(__float_as_uint(value(integer_value<0>(a), at)), __float_as_uint(value(integer_value<1>(a), at + 1)),
                                          __float_as_uint(value(integer_value<2>(a), at + 2)), __float_as_uint(value(integer_value<3>(a), at + 3))));
      }
    }
    if constexpr (kHasOutliers) {
      while (outlier_col < first_col + 16 * half + 16) {
        const u32 col = outlier_col - first_col;
        // Not as columns[col / 4 % 4], which would put them into memory.
        const u32 even = (col & 8) != 0 ? columns[2] : columns[0], odd = (col & 8) != 0 ? columns[3] : columns[1];
        const u32 four = (col & 4) != 0 ? odd : even;
        int integer = static_cast<int>((four >> (col % 4 * 8)) & 0xFF) - static_cast<int>(kHalf) + outlier_delta(__ldg(outlier), delta_bits);
        // Damage to their order must not lead out of the row.
        if (col < kChunkCols) put_number(rows, lane, col, kScaled ? output_bits(value(static_cast<float>(integer), col)) : static_cast<u32>(integer));
        ++outlier;
        --num_outliers;
        look_ahead();
      }
    }
  }

  __device__ __forceinline__ void put_unit(u32 unit, uint4 v) const { store_shared_v4(unit_address(rows, lane, unit), v); }
};

// A group's place among all matrices.
struct Position {
  u32 matrix, row_group, tile_column;
};

// `first_index` … `end_index` of the group table are decoded, in runs of equal length; `output` is where row `first_row` of the
// tensor goes (rows counted over all matrices).
extern "C" __global__ void __launch_bounds__(KVPACK_MAX_WARPS * 32, KVPACK_BLOCKS_PER_SM)
decode(const u8* blob, const uint4* groups, const u32* table, const float* scales, u32 scale_stride,
       const float* row_offsets, const float* column_scales, u8* output, u32* status,
       u64 first_row, u32 rows, u32 cols, u32 tile_cols, u32 row_groups, u32 tile_columns, u32 first_index, u32 end_index,
       u32 length_bytes, u32 buffer_bytes, u32 table_index) {
  KVPACK_DYNAMIC_SHARED(shared);
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const u32 shared_table = shared_address(shared);
  const u32 staged = shared_table + 4 * kTableSlots + warp * kLanes * 16 * kRowUnits;
  const u32 buffers = shared_table + 4 * kTableSlots + warps * kLanes * 16 * kRowUnits + kBuffers * warp * buffer_bytes;
  const bool aligned = cols % kUnitCols == 0;

  // Neighbouring runs go to different blocks, so that the longer ones are spread.
  const Runs runs{(end_index - first_index) / (gridDim.x * warps), (end_index - first_index) % (gridDim.x * warps)};
  const u32 worker = blockIdx.x + gridDim.x * warp;
  u32 index = first_index + runs.begin(worker);
  const u32 end = first_index + runs.begin(worker + 1);
  Position position{index / tile_columns / row_groups, index / tile_columns % row_groups, index % tile_columns};
  auto after = [&](Position at) {
    if (++at.tile_column == tile_columns) {
      at.tile_column = 0;
      if (++at.row_group == row_groups) {
        at.row_group = 0;
        ++at.matrix;
      }
    }
    return at;
  };
  auto place_at = [&](Position at) { return place_of(at.row_group, at.tile_column, rows, cols, tile_cols); };
  // Wide elements and predictors leave no registers for planes ahead; a check looks at no planes.
  constexpr bool streams_planes = kOutput != 0 && kElementBits <= 8 && !kPredicted;
  auto chunks_to_load = [&](const Group& group, const Place& place) { return streams_planes ? raw_chunks(group, place) : 0; };

  // Three groups of a warp are under way: the one that is decoded, the next one's words and first planes, the entry of the one after.
  uint4 entry = make_uint4(0, 0, 0, 0), next_entry = entry;
  if (index < end) entry = __ldg(groups + index);
  if (index + 1 < end) next_entry = __ldg(groups + index + 1);
  if (table != nullptr) copy_table(table, shared_table, threadIdx.x, blockDim.x);  // null if no tile has words
  LaneStart start{KVPACK_STATE_LOW, 0};
  RawStream stream;
  if (index < end) {
    const Group group = unpack_group(blob, entry);
    const Place place = place_at(position);
    copy_words(group, buffers, lane);
    start = load_lane_start(group, place, length_bytes, lane);
    stream.begin(blob, raw_planes_unit(group, place), chunks_to_load(group, place), lane);
  }
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();

  for (u32 buffer = 0; index < end; ++index, buffer ^= kBuffers - 1) {
    const Group group = unpack_group(blob, entry);
    const Place place = place_at(position);
    const bool rans = group.mode == KVPACK_MODE_RANS;
    const bool mine = rans ? group.table == table_index : table_index == 0;
    const u32 first_of_group = position.row_group * kLanes, num_rows = min(rows - first_of_group, kLanes);
    const u64 matrix_row = static_cast<u64>(position.matrix) * rows + first_of_group;
    u8* to = output + ((matrix_row - first_row) * cols + place.first_col) * kOutputBytes;
    float scale = 0;
    if constexpr (kScaled) scale = lane < num_rows ? scales[(matrix_row + lane) * scale_stride] : 0.0f;
    RowWriter writer{staged, lane, scale, {}, nullptr, KVPACK_MAX_TILE_COLS, 0, 0, outlier_delta_bits(tile_cols), 0, nullptr, 0};
    if constexpr (kHasRowOffsets) writer.offset = lane < num_rows ? row_offsets[matrix_row + lane] : 0.0f;
    if constexpr (kHasColumnScales) {
      writer.column_scales = column_scales + static_cast<u64>(position.matrix) * cols + place.first_col;
      writer.last_col = place.tile_cols - 1;
    }
    if constexpr (kHasOutliers) {
      if (mine && group.num_outliers > 0) writer.find_outliers(group, place);
    }
    auto write_chunk = [&](u32 chunk) {
      if constexpr (kOutput != 0) {
        __syncwarp();
        write_rows(staged, to, cols, num_rows, min(place.tile_cols - chunk * kChunkCols, kChunkCols), aligned, lane);
        to += kChunkCols * kOutputBytes;
        __syncwarp();
        writer.first_col += kChunkCols;
      }
    };
    const u32 planes = raw_planes_unit(group, place);

    position = after(position);
    uint4 after_entry = make_uint4(0, 0, 0, 0);
    if (kBuffers == 2 && index + 2 < end) after_entry = __ldg(groups + index + 2);
    LaneStart next_start{KVPACK_STATE_LOW, 0};
    u32 next_planes = 0;
    u32 next_chunks = 0;
    if (index + 1 < end) {
      if (kBuffers == 1) next_entry = __ldg(groups + index + 1);  // earlier would take registers that there are not
      const Group next = unpack_group(blob, next_entry);
      const Place place = place_at(position);
      if constexpr (kBuffers == 2) copy_words(next, buffers + (buffer ^ 1) * buffer_bytes, lane);
      next_start = load_lane_start(next, place, length_bytes, lane);
      next_planes = raw_planes_unit(next, place);
      next_chunks = chunks_to_load(next, place);
    }
    if constexpr (kBuffers == 2) copy_async_commit();
    copy_async_wait<kBuffers - 1>();
    __syncwarp();

    if (rans && mine) {
      u32 end_address;
      Lane decoder = start_lane(group, start, buffers + buffer * buffer_bytes, lane, end_address);
      u32 previous = 0;
      auto put_chunk = [&](u32 chunk, const RawChunk& raw) {
        if constexpr (kElementBits > 8 || kOutput == 0) {
          KeepSlots codes;
          decode_chunk(decoder, shared_table, raw, codes);
          if constexpr (kOutput == 6) put_wide_row(staged, lane, codes, raw);
        } else if constexpr (kPredicted) {
          KeepSlots elements;
          decode_chunk(decoder, shared_table, raw, elements);
          if (group.predictor != 0) undo_predictor(elements, chunk == 0, previous);
          emit_kept(elements, writer);
        } else {
          decode_chunk(decoder, shared_table, raw, writer);
        }
        write_chunk(chunk);
      };
      if constexpr (!streams_planes) {
#pragma unroll 1
        for (u32 chunk = 0; chunk < place.chunks(); ++chunk) {
          RawChunk raw;
          if constexpr (kOutput != 0) load_raw(chunk_planes(blob, planes, chunk), lane, raw);
          put_chunk(chunk, raw);
        }
      } else {
        stream.each_chunk(blob, planes, place.chunks(), next_planes, next_chunks, lane, put_chunk);
      }
      if (lane < num_rows && (decoder.state != KVPACK_STATE_LOW || decoder.word_address != end_address)) {
        report_damage(status, index);
      }
    } else {
      stream.stale = true;
      if constexpr (kOutput != 0) {
#pragma unroll 1
        for (u32 chunk = 0; chunk < (mine ? place.chunks() : 0); ++chunk) {
          if (group.mode == KVPACK_MODE_CONSTANT) {
            RawChunk raw;
            load_raw(chunk_planes(blob, planes, chunk), lane, raw);
            KeepSlots elements;
            constant_chunk(group.tile[0], raw, elements);
            if constexpr (kElementBits > 8) {
              put_wide_row(staged, lane, elements, raw);
            } else {
              emit_kept(elements, writer);
            }
          } else if constexpr (kElementBits > 8) {
#pragma unroll 1
            for (u32 col = chunk * kChunkCols; col < place.tile_cols && col < (chunk + 1) * kChunkCols; ++col) {
              if (lane >= num_rows) break;
              u32 element = raw_mode_element(group, place, place.group * kLanes + lane, col);
              put_number(staged, lane, col % kChunkCols, element >> 1 | (element & 1) << (kElementBits - 1));
            }
          } else {
            raw_mode_chunk(group, place, place.group * kLanes + lane, chunk, writer);
          }
          write_chunk(chunk);
        }
      }
    }
    __syncwarp();
    if constexpr (kBuffers == 1) {
      if (index + 1 < end) copy_words(unpack_group(blob, next_entry), buffers, lane);
      copy_async_commit();
    }
    entry = next_entry;
    next_entry = after_entry;
    start = next_start;
  }
}
