// The moments of products with K vectors per query: sum e <t, v> t, a row for each, and the scalar
// sum e <t, v>.
#pragma once
#include "simd/moments.h"

namespace {

template <class T>
struct MatvecMoments {
  static constexpr bool first_moment = true;
  // As large as the posterior's, although a vector comes out: projections are taken less an origin
  // (weigh_projections), so little is subtracted at the end. simd/query.h says what it limits.
  static constexpr double centre_limit = 4;
  static constexpr bool elementwise = false;
  static constexpr AddRows<T> add_rows = nullptr;

  static int64_t second_rows(const Problem<T>& p) { return p.K; }

  static void add_tile(const Problem<T>& p, const Moments<T>& m, const WeightedTile<T>& tile) {
    const T* in[tile_queries] = {};
    T* sum[tile_queries] = {};
    for (int64_t k = 0; k < p.K; ++k) {
      for (int64_t i = 0; i < tile.count; ++i) in[i] = tile.queries[i].v + k * m.stride;
      dots<T>(tile.count, in, tile.rows, tile.cols, tile.n, m.stride, tile.scratch,
              tile.scratch_stride, nullptr);
      for (int64_t i = 0; i < tile.count; ++i) {
        const QueryInTile<T>& query = tile.queries[i];
        T* projection = tile.scratch + i * tile.scratch_stride;
        in[i] = projection;
        sum[i] = query.vectors + (1 + k) * m.stride;
        query.sums.projection_sum[k] +=
            weigh_projections(query.weight, tile.n, projection, query.origin + k);
      }
      weighted_sums<T>(tile.count, in, tile.rows, tile.n, m.stride, sum);
    }
  }

  static void add_small_d(const Problem<T>& p, const Moments<T>& m, const SmallDTile<T>& tile,
                          const QuerySums& sums, const T* reference, const T* v) {
    tile.add_first_moment(p.d, reference, sums);
    for (int64_t r = 0; r < p.K; ++r) {
      sums.projection_sum[r] += project(p.d, tile, v + r * m.stride, reference);
      tile.add_scratch_moment(p.d, reference, sums.second_moment + r * m.stride);
    }
  }

  static void move_reference(const Problem<T>& p, const Moments<T>& m, const QuerySums& sums,
                             const double* delta, const T* v) {
    const int64_t w = m.stride;
    for (int64_t k = 0; k < p.K; ++k) {
      const double shift = dot(delta, v + k * w, w);
      sums.projection_sum[k] += *sums.weight_sum * shift;
      add_scaled(sums.second_moment + k * w, w, shift, sums.first_moment);
      add_scaled(sums.second_moment + k * w, w, sums.projection_sum[k], delta);
    }
  }

  // The mean of <t, v> over query b's atoms, for vector `row` of all B * K.
  static double mean_projection(const Moments<T>& m, int64_t b, int64_t row) {
    return m.projection_sum[row] / m.weight_sum[b];
  }
  // Entry j of C v for that vector.
  static double covariance_product(const Moments<T>& m, int64_t b, const double* mean, int64_t row,
                                   double mean_projection, int64_t j) {
    return m.second_moment[row * m.stride + j] / m.weight_sum[b] - mean_projection * mean[j];
  }

 private:
  // Replaces each projection <t_j, v> by e_j (projection_j - origin), in place, and returns the sum
  // of these. An origin near the mean of <t, v> keeps the second moment from being a small
  // difference of large numbers; it is set from the first tile, where it is nan.
  static double weigh_projections(const T* weight, int64_t n, T* projection, double* origin) {
    if (*origin != *origin) {
      double weight_sum = 0, sum = 0;
      for (int64_t j = 0; j < n; ++j) {
        weight_sum += weight[j];
        sum += double(weight[j]) * projection[j];
      }
      *origin = weight_sum > 0 ? T(sum / weight_sum) : T(0);
    }
    const T shift = T(*origin);
    Vec<double> part[4] = {};
    const int64_t whole = n / W<T> * W<T>;
    in_four_chains<T>(whole, [&](int64_t j, int u) {
      const Vec<T> weighted = load(weight + j) * (load(projection + j) - shift);
      store<T>(projection + j, weighted);
      part[u] += widened<T>(weighted);
    });
    double sum = sum_lanes<double>((part[0] + part[1]) + (part[2] + part[3]));
    for (int64_t j = whole; j < n; ++j) {
      projection[j] = weight[j] * (projection[j] - shift);
      sum += projection[j];
    }
    return sum;
  }

  // Fills the scratch of a small-d tile with e <y - reference, v> and returns its sum.
  static double project(int64_t d, const SmallDTile<T>& tile, const T* v, const T* reference) {
    Vec<T> sum{};
    for (int64_t j = 0; j < tile.padded; j += W<T>) {
      Vec<T> t{};
      for (int64_t k = 0; k < d; ++k)
        t += v[k] * (load(tile.cols + k * tile.padded + j) - reference[k]);
      const Vec<T> weight = load(tile.weight + j);
      t = weight > T(0) ? weight * t : Vec<T>{};  // <t, v> of a weightless atom may overflow
      store<T>(tile.scratch + j, t);
      sum += t;
    }
    return total<T>(sum);
  }
};

}  // namespace
