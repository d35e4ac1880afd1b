// The posterior's moments: sum e |t|^2, a scalar per query, from which the trace of the covariance
// follows. No second moment is a vector.
#pragma once
#include "simd/moments.h"

namespace {

template <class T>
struct PosteriorMoments {
  static constexpr bool first_moment = true;
  static constexpr double centre_limit = 4;
  static constexpr bool elementwise = false;

  static int64_t second_rows(const Problem<T>&) { return 0; }

  static void add_tile(const Problem<T>&, const Moments<T>&, const WeightedTile<T>& tile) {
    for (int64_t i = 0; i < tile.count; ++i) {
      const QueryInTile<T>& query = tile.queries[i];
      Vec<T> sum[4] = {};
      const int64_t whole = tile.n / W<T> * W<T>;
      in_four_chains<T>(
          whole, [&](int64_t j, int u) { sum[u] += load(query.weight + j) * load(tile.norm + j); });
      *query.sums.square_moment += total<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
      for (int64_t j = whole; j < tile.n; ++j)
        *query.sums.square_moment += double(query.weight[j]) * tile.norm[j];
    }
  }

  // Reads the rows where they are: without vectors of second moments no shifted copy is needed.
  static void add_rows(const QuerySums& sums, const T* weight, const T* const* rows, int64_t n,
                       int64_t width, const T* reference, T* first_moment) {
    *sums.square_moment += add_about(weight, rows, n, width, reference, first_moment);
  }

  static void add_small_d(const Problem<T>& p, const Moments<T>&, const SmallDTile<T>& tile,
                          const QuerySums& sums, const T* reference, const T*) {
    for (int64_t k = 0; k < p.d; ++k) {
      const auto [first, square] = tile.moments_of(tile.weight, k, reference[k]);
      sums.first_moment[k] += first;
      *sums.square_moment += square;
    }
  }

  static void move_reference(const Problem<T>&, const Moments<T>& m, const QuerySums& sums,
                             const double* delta, const T*) {
    *sums.square_moment += 2 * dot(delta, sums.first_moment, m.stride) +
                           *sums.weight_sum * dot(delta, delta, m.stride);
  }

  // The trace of the covariance of query b, whose mean lies at `mean` from the reference.
  static double covariance_trace(const Problem<T>& p, const Moments<T>& m, int64_t b,
                                 const double* mean) {
    double square = 0;
    for (int64_t k = 0; k < p.d; ++k) square += mean[k] * mean[k];
    const double trace = m.square_moment[b] / m.weight_sum[b] - square;
    return trace < 0 ? 0 : trace;
  }
};

}  // namespace
