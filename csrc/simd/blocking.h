// How the inner loops are blocked: traits of the instruction set. `python -m bench.tune` prints
// the rate of each candidate on the machine at hand.
#pragma once
#include "simd/vec.h"

namespace {

// A block of a product keeps `queries` x `vectors` sums in registers, beside `vectors` vectors of
// atoms and one number in all lanes. A block of dot products of rows keeps `row_queries` x `rows`.
struct Block {
  int queries, vectors, row_queries, rows;
};
#if DFK_VECTOR_BYTES == 64 || defined(__aarch64__)
inline constexpr Block block{8, 3, 4, 4};  // 32 registers
#elif defined(__FMA__)
inline constexpr Block block{4, 3, 4, 3};  // 16 registers
#else
inline constexpr Block block{3, 3, 4, 2};  // 16 registers, of which a product takes one
#endif

// How many queries are taken together with a tile: each part of it stays in the first-level cache
// while they pass.
inline constexpr int tile_queries = 32;
// With fewer queries than this a tile is not packed, which costs as much as a few products.
inline constexpr int64_t packed_queries = 16;
// The size of a tile, beside which the next one is on its way to the cache, and of a packed one,
// which there is twice: with its transpose.
inline constexpr int64_t tile_bytes = 256 << 10, packed_tile_bytes = 512 << 10;
// Coordinates, or atoms, that are taken at a time, so that their part of a panel stays in the
// first-level cache.
inline constexpr int64_t slab = 128;
// How many terms of a sum over coordinates, and over atoms, are added up in one chain: the rounding
// error of longer ones would show in the weights.
inline constexpr int64_t dot_chain = 32, sum_chain = 64;

}  // namespace
