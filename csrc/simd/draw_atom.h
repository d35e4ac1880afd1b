// draw's second stage: one atom of a few, by logits from differences.
#pragma once
#include "simd/dots.h"
#include "simd/philox.h"

namespace {

// The row, among the n <= draw_block at `rows`, that comes first for query b; -1 where there is no
// memory.
template <class T>
int64_t draw_atom(const Problem<T>& p, int64_t b, const int64_t* rows, int64_t n) {
  const int64_t w = round_up(p.d, W<T>);
  const bool in_place = rows_in_place(p);
  Arena arena(Arena::bytes<T>(w) + Arena::bytes<T>(in_place ? 0 : n * w));
  if (!arena.ok()) return -1;
  T *x = arena.take<T>(w), *copy = arena.take<T>(in_place ? 0 : n * w), weight[draw_block];
  const T* atom[draw_block];
  double logit[draw_block], largest = -__builtin_inf();
  for (int64_t k = 0; k < w; ++k) x[k] = k < p.d ? p.x[b * p.d + k] : T(0);
  for (int64_t j = 0; j < n; ++j) {
    if (in_place) {
      atom[j] = static_cast<const T*>(p.y) + rows[j] * p.row_stride;
      continue;
    }
    T* const to = copy + j * w;
    read_row(p, rows[j], to);
    for (int64_t k = p.d; k < w; ++k) to[k] = 0;
    atom[j] = to;
  }
  distances(x, p.alpha[b], atom, n, w, logit);
  const double half_precision = 0.5 / (double(p.sigma[b]) * p.sigma[b]);
  for (int64_t j = 0; j < n; ++j) {
    const double prior = p.log_prior ? p.log_prior[rows[j]] - p.max_log_prior : T(0);
    // an outlier's distance is inf or nan
    logit[j] = logit[j] < __builtin_inf() ? prior - half_precision * logit[j] : -__builtin_inf();
    if (logit[j] > largest) largest = logit[j];
  }
  for (int64_t j = 0; j < draw_block; ++j)
    weight[j] = j < n ? T(logit[j] - largest) : -T(__builtin_inf());
  for (int64_t j = 0; j < n; j += W<T>) store<T>(weight + j, vexp(load(weight + j)));

  double least = __builtin_inf();
  int64_t winner = rows[0], group = -1;
  uint32_t words[4];
  for (int64_t j = 0; j < n; ++j) {
    if (!(weight[j] > 0)) continue;
    if (group != rows[j] / 4) {
      group = rows[j] / 4;
      noise_words(p.seed, p.queries[b], group, 1, words);
    }
    const double time = arrival(words[rows[j] % 4], weight[j], least);
    if (time < least) least = time, winner = rows[j];
  }
  return winner;
}

}  // namespace
