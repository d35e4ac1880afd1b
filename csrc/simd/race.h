// The race between blocks of rows, of which draw's first stage is made: weights are added up for
// one block after the other, and a block enters the race when the next one begins.
#pragma once
#include "simd/philox.h"
#include "simd/tile.h"

namespace {

DFK_INLINE void clear_race(BlockRace& r) {
  r.least = __builtin_inf();
  r.weight = 0;
  r.winner = r.block = r.group = -1;
}

// Makes times and weights relative to another max_logit, beside which they are `by` as heavy.
DFK_INLINE void rescale_race(BlockRace& r, double by) {
  r.weight *= by;
  r.least /= by;
}

// Lets the block whose weights are complete enter.
template <class T>
void close_block(const Problem<T>& p, int64_t b, BlockRace& r) {
  if (r.least * r.weight > least_noise) {  // else it comes too late, whatever its noise
    if (r.group != r.block / 4) {
      r.group = r.block / 4;
      noise_words(p.seed, p.queries[b], r.group, 0, r.words);
    }
    const double time = arrival(r.words[r.block % 4], r.weight, r.least);
    if (time < r.least) r.least = time, r.winner = r.block;
  }
  r.weight = 0;
}

template <class T>
DFK_INLINE void add_to_block(const Problem<T>& p, int64_t b, BlockRace& r, int64_t block,
                             double weight) {
  if (block != r.block) {
    close_block(p, b, r);
    r.block = block;
  }
  r.weight += weight;
}

// A tile's atoms by blocks: those from start[i] to start[i + 1] are rows of block[i].
struct Segments {
  int64_t count = 0;
  int64_t *start = nullptr, *block = nullptr;  // [count + 1], [count]

  // Room for the segments of n atoms.
  static size_t bytes(int64_t n) { return 2 * Arena::bytes<int64_t>(n + 1); }
  void take(Arena& arena, int64_t n) {
    start = arena.take<int64_t>(n + 1);
    block = arena.take<int64_t>(n + 1);
  }
};
template <class T>
void find_segments(const Problem<T>& p, int64_t first, int64_t n, Segments& s) {
  s.count = 0;
  for (int64_t j = 0; j < n;) {
    const int64_t row = row_of(p, first + j), block = row / draw_block;
    s.start[s.count] = j;
    s.block[s.count++] = block;
    const int64_t end = (block + 1) * draw_block;
    if (!p.atom_rows)
      j += end - row;
    else
      while (j < n && p.atom_rows[first + j] < end) ++j;
  }
  s.start[s.count] = n;
}

// Adds the weights of a tile to query b's blocks.
template <class T>
void add_segments(const Problem<T>& p, int64_t b, BlockRace& r, const Segments& s,
                  const T* weight) {
  for (int64_t i = 0; i < s.count; ++i) {
    Vec<T> sum{};
    double rest = 0;
    int64_t j = s.start[i];
    for (; j + W<T> <= s.start[i + 1]; j += W<T>) sum += load(weight + j);
    for (; j < s.start[i + 1]; ++j) rest += weight[j];
    add_to_block(p, b, r, s.block[i], total<T>(sum) + rest);
  }
}

}  // namespace
