// Outliers: atoms so far out that T cannot represent the squares of their distances. They never
// enter a sum. Their logits are taken in double, and the largest is kept: host/accumulate.cpp
// raises where it could carry weight.
#pragma once
#include "simd/moments.h"

namespace {

template <class T>
bool finite_row(const T* row, int64_t d) {
  T sum = 0;  // 0 * inf and 0 * nan are nan
  for (int64_t k = 0; k < d; ++k) sum += T(0) * row[k];
  return sum == 0;
}

// The logit of an atom for query b of x, from divided differences: they do not overflow where the
// square of a distance does. inf where even a difference overflows, so that nothing is known.
template <class T>
double wide_logit(const Problem<T>& p, int64_t b, const T* atom, T log_prior) {
  const double alpha = p.alpha[b], sigma = p.sigma[b];
  double sum = 0;
  for (int64_t k = 0; k < p.d; ++k) {
    const double difference = double(p.x[b * p.d + k]) - alpha * double(atom[k]);
    if (!(__builtin_fabs(difference) < __builtin_inf())) return __builtin_inf();
    sum += difference / sigma * (difference / sigma);
  }
  return double(log_prior) - 0.5 * sum;
}

// Query b goes without this atom.
template <class T>
void leave_out(const Problem<T>& p, QuerySums s, int64_t b, const T* atom, T log_prior) {
  const double logit = wide_logit(p, b, atom, log_prior);
  if (!(logit <= *s.outlier_logit)) *s.outlier_logit = logit;
}

}  // namespace
