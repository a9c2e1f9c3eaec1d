// Where rows of tokens lie: a step apart in one tensor; or, where KVPACK_BLOCK_TOKENS is not 0, in blocks of so many tokens that a table
// names, the same ones in each of several layers.
#pragma once

#include "kv/page.cuh"

constexpr u32 kBlockTokens = KVPACK_BLOCK_TOKENS;

// Of rows in blocks, else nothing.
struct BlockTable {
  const u64* layers;  // where each layer's block 0 begins, in elements from the tensor's first one
  const s32* blocks;  // of the blocks that the rows are in, in the rows' order; the host has seen that the cache has them
  u64 step;           // elements from a block to the next one
  u32 skipped;        // rows of the first of these blocks that come before row 0
};

template <typename Element>
struct TokenRows {
  Element* first;
  u64 step;
  BlockTable table;

  // batch_step, head_step, step: elements from a sequence, a head and a row to the next one; sequences of blocks are layers.
  __device__ __forceinline__ TokenRows(Element* tensor, u64 batch_step, u64 head_step, u64 row_step, const BlockTable& t, u32 sequence, u32 head)
      : step(row_step), table(t) {
    first = tensor + head * head_step + (kBlockTokens ? __ldg(table.layers + sequence) : sequence * batch_step);
  }
  __device__ __forceinline__ Element* at(u32 row) const {
    if constexpr (kBlockTokens == 0) return first + row * step;
    constexpr u32 kTokens = kBlockTokens ? kBlockTokens : 1;
    const u32 token = table.skipped + row, block = static_cast<u32>(__ldg(table.blocks + token / kTokens));
    return first + block * table.step + token % kTokens * step;
  }
};
