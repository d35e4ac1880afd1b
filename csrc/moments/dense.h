// The moments of the dense covariance: sum e t t^T, d rows per query.
#pragma once
#include "simd/moments.h"

namespace {

template <class T>
struct DenseMoments {
  static constexpr bool first_moment = true;
  static constexpr double centre_limit = 0.125;
  static constexpr bool elementwise = false;
  static constexpr AddRows<T> add_rows = nullptr;

  static int64_t second_rows(const Problem<T>& p) { return p.d; }

  static void add_tile(const Problem<T>& p, const Moments<T>& m, const WeightedTile<T>& tile) {
    const T* coefficient[tile_queries] = {};
    T* sum[tile_queries] = {};
    for (int64_t i = 0; i < tile.count; ++i) {
      const QueryInTile<T>& query = tile.queries[i];
      for (int64_t k = 0; k < p.d; k += tile_queries) {
        const int64_t rows = p.d - k < tile_queries ? p.d - k : tile_queries;
        for (int64_t r = 0; r < rows; ++r) {
          T* to = tile.scratch + r * tile.scratch_stride;
          for (int64_t j = 0; j < tile.n; ++j)
            to[j] = query.weight[j] * tile.rows.at[j * tile.rows.ld + k + r];
          coefficient[r] = to;
          sum[r] = query.vectors + (1 + k + r) * m.stride;
        }
        weighted_sums<T>(rows, coefficient, tile.rows, tile.n, m.stride, sum);
      }
    }
  }

  static void add_small_d(const Problem<T>& p, const Moments<T>& m, const SmallDTile<T>& tile,
                          const QuerySums& sums, const T* reference, const T*) {
    tile.add_first_moment(p.d, reference, sums);
    const T* const weight = tile.weight;  // a store could change what `tile` points to
    T* const scratch = tile.scratch;
    const int64_t padded = tile.padded;
    for (int64_t r = 0; r < p.d; ++r) {
      const T *column = tile.cols + r * padded, origin = reference[r];
      for (int64_t j = 0; j < padded; j += W<T>)
        store<T>(scratch + j, load(weight + j) * (load(column + j) - origin));
      tile.add_scratch_moment(p.d, reference, sums.second_moment + r * m.stride);
    }
  }

  static void move_reference(const Problem<T>& p, const Moments<T>& m, const QuerySums& sums,
                             const double* delta, const T*) {
    const double weight_sum = *sums.weight_sum;
    for (int64_t j = 0; j < p.d; ++j) {
      double* row = sums.second_moment + j * m.stride;
      add_scaled(row, m.stride, delta[j], sums.first_moment);
      add_scaled(row, m.stride, sums.first_moment[j] + weight_sum * delta[j], delta);
    }
  }

  // Entry (j, k) of query b's covariance.
  static double covariance(const Moments<T>& m, int64_t b, const double* mean, int64_t j,
                           int64_t k) {
    const double second = m.second_moment[(b * m.second_rows + j) * m.stride + k] / m.weight_sum[b];
    return second - mean[j] * mean[k];
  }
};

}  // namespace
