// The moments of the diagonal: sum e t * t, elementwise, one row per query.
#pragma once
#include "simd/moments.h"

namespace {

template <class T>
struct DiagonalMoments {
  static constexpr bool first_moment = true;
  static constexpr double centre_limit = 1.5;
  static constexpr bool elementwise = true;

  static int64_t second_rows(const Problem<T>&) { return 1; }

  static void add_tile(const Problem<T>&, const Moments<T>& m, const WeightedTile<T>& tile) {
    const T* weight[tile_queries] = {};
    T* sum[tile_queries] = {};
    for (int64_t i = 0; i < tile.count; ++i) {
      weight[i] = tile.queries[i].weight;
      sum[i] = tile.queries[i].vectors + m.stride;
    }
    weighted_sums<T, true>(tile.count, weight, tile.rows, tile.n, m.stride, sum);
  }

  static void add_rows(const QuerySums&, const T* weight, const T* const* rows, int64_t n,
                       int64_t width, const T* reference, T* vectors) {
    add_about<T, true>(weight, rows, n, width, reference, vectors, vectors + width);
  }

  static void add_small_d(const Problem<T>& p, const Moments<T>&, const SmallDTile<T>& tile,
                          const QuerySums& sums, const T* reference, const T*) {
    for (int64_t k = 0; k < p.d; ++k) {
      const auto [first, square] = tile.moments_of(tile.weight, k, reference[k]);
      sums.first_moment[k] += first;
      sums.second_moment[k] += square;
    }
  }

  static void move_reference(const Problem<T>&, const Moments<T>& m, const QuerySums& sums,
                             const double* delta, const T*) {
    const double weight_sum = *sums.weight_sum;
    for (int64_t k = 0; k < m.stride; ++k)
      sums.second_moment[k] += delta[k] * (2 * sums.first_moment[k] + weight_sum * delta[k]);
  }

  // Entry k of the diagonal of query b's covariance.
  static double variance(const Moments<T>& m, int64_t b, const double* mean, int64_t k) {
    const double value = m.second_moment[b * m.stride + k] / m.weight_sum[b] - mean[k] * mean[k];
    return value < 0 ? 0 : value;
  }
};

}  // namespace
