// The sums of one query over components of a Gaussian mixture: relative to another largest logit,
// about another score, and of several splits together.
#pragma once
#include "simd/query.h"

namespace {

// Forgets what was added up of query b in split s; about the score 0.
template <class T>
void clear_mixture(const MixtureSums<T>& m, int64_t s, int64_t b) {
  *m.max_logit(s, b) = -__builtin_inf();
  memset(m.weight_sum(s, b), 0, size_t(4 + m.K) * sizeof(double));
  memset(m.first(s, b), 0, size_t(m.rows * m.stride) * sizeof(double));
  memset(m.reference(s, b), 0, size_t(m.stride) * sizeof(double));
}

// Makes the weights relative to exp(max_logit).
template <class T>
void raise_mixture(const MixtureSums<T>& m, int64_t s, int64_t b, double max_logit) {
  const double by = __builtin_exp(*m.max_logit(s, b) - max_logit);
  *m.max_logit(s, b) = max_logit;
  if (*m.weight_sum(s, b) == 0 || by == 1) return;
  *m.weight_sum(s, b) *= by;
  *m.weight_square_sum(s, b) *= by * by;
  *m.precision_sum(s, b) *= by;
  *m.square_sum(s, b) *= by;
  for (int64_t k = 0; k < m.K; ++k) m.projection_sum(s, b)[k] *= by;
  double* const vectors = m.first(s, b);
  for (int64_t i = 0; i < m.rows * m.stride; ++i) vectors[i] *= by;
}

// Makes the sums about the score `reference` of those about another. v: K rows; delta: room.
template <class T, class R>
void refer_mixture_to(const MixtureSums<T>& m, int64_t s, int64_t b, const R* reference, const T* v,
                      double* delta) {
  const int64_t w = m.stride;
  double* const old = m.reference(s, b);
  const double weight = *m.weight_sum(s, b);
  double *const first = m.first(s, b), *const second = m.row(s, b, m.second);
  for (int64_t k = 0; k < w; ++k) {
    delta[k] = old[k] - reference[k];
    old[k] = reference[k];
  }
  if (weight == 0) return;
  if (m.mean >= 0)  // posterior
    *m.square_sum(s, b) += 2 * dot(delta, first, w) + weight * dot(delta, delta, w);
  else if (m.K == 0 && m.rows > m.second)  // not products with no vector
    for (int64_t k = 0; k < w; ++k) second[k] += delta[k] * (2 * first[k] + weight * delta[k]);
  for (int64_t r = 0; r < m.K; ++r) {
    const double along = dot(delta, v + r * w, w);
    double& projection_sum = m.projection_sum(s, b)[r];
    projection_sum += weight * along;
    add_scaled(second + r * w, w, along, first);
    add_scaled(second + r * w, w, projection_sum, delta);
  }
  add_scaled(first, w, weight, delta);
}

// Merges the splits of query b into split 0.
template <class T>
int merge_mixture(const Problem<T>& p, const MixtureSums<T>& m, int64_t splits, int64_t b) {
  const int64_t w = m.stride;
  int64_t heaviest = 0;
  for (int64_t s = 1; s < splits; ++s)
    if (*m.max_logit(s, b) > *m.max_logit(heaviest, b)) heaviest = s;
  const double max_logit = *m.max_logit(heaviest, b);
  if (splits == 1 || !(max_logit > -__builtin_inf())) return ok;
  Arena arena(Arena::bytes<T>(w * p.K) + 2 * Arena::bytes<double>(w));
  if (!arena.ok()) return out_of_memory;
  T* const v = arena.take<T>(w * p.K);
  double *const reference = arena.take<double>(w), *const delta = arena.take<double>(w);
  memcpy(reference, m.reference(heaviest, b), size_t(w) * sizeof(double));
  memset(v, 0, size_t(w * p.K) * sizeof(T));
  for (int64_t k = 0; k < p.K; ++k)
    memcpy(v + k * w, p.v + (b * p.K + k) * p.d, size_t(p.d) * sizeof(T));
  for (int64_t s = 0; s < splits; ++s) {
    // As a rule few splits carry weight in low noise.
    const bool none =
        *m.weight_sum(s, b) == 0 || __builtin_exp(*m.max_logit(s, b) - max_logit) < weightless<T>;
    if (none && s > 0) continue;
    if (none) clear_mixture(m, s, b);
    refer_mixture_to(m, s, b, reference, v, delta);
    raise_mixture(m, s, b, max_logit);
    if (s == 0) continue;
    *m.weight_sum(0, b) += *m.weight_sum(s, b);
    *m.weight_square_sum(0, b) += *m.weight_square_sum(s, b);
    *m.precision_sum(0, b) += *m.precision_sum(s, b);
    *m.square_sum(0, b) += *m.square_sum(s, b);
    for (int64_t k = 0; k < p.K; ++k) m.projection_sum(0, b)[k] += m.projection_sum(s, b)[k];
    add_scaled(m.first(0, b), m.rows * w, 1, m.first(s, b));
  }
  return ok;
}

}  // namespace
