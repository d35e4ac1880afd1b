// Norms of a tile's components in the metrics of a group of queries: a diagonal covariance that all
// components share makes one metric, P = diag(1/tau^2), of every noise level.
#pragma once
#include "simd/expanded_tiles.h"
#include "simd/mixture_rows.h"

namespace {

template <class T>
class MixtureMetric {
 public:
  // Of B queries; with `squares` also the norms in P^2.
  MixtureMetric(const Problem<T>& p, const Variances<T>& variances, int64_t w, int64_t B,
                int64_t tile, bool squares)
      : p_(p), variances_(variances), w_(w), tile_(tile), squares_(squares), scratch_(room(B)) {
    if (!ok()) return;
    variance_ = scratch_.template take<T>(w);
    precision_ = scratch_.template take<double>(B * w);
    metric_ = scratch_.template take<T>(B * w);
    square_metric_ = scratch_.template take<T>(squares ? B * w : 0);
    norm_ = scratch_.template take<T>(tile_queries * tile);
    square_norm_ = scratch_.template take<T>(squares ? tile_queries * tile : 0);
    unit_ = scratch_.template take<T>(B);
    level_ = scratch_.template take<Level>(B);
    place_ = scratch_.template take<int64_t>(B);
    for (int64_t k = 0; k < w; ++k)
      variance_[k] = k < p.d ? variances.at[variances.columns > 1 ? k : 0] : T(1);
  }
  bool ok() const { return scratch_.ok(); }
  const T* variance() const { return variance_; }
  bool usable_variance() const { return usable(variance_, p_.d); }

  // Of 1/tau^2, over the coordinates.
  struct Sums {
    double largest, sum, square_sum;
  };
  // Queries in their order; those of one level that follow one another share a metric.
  Sums set_query(int64_t i, Level level) {
    const bool known = i > 0 && level == level_[i - 1];
    level_[i] = level;
    place_[i] = known ? place_[i - 1] : i;
    if (known) return sums_;
    double* const precision = precision_ + i * w_;
    T *const metric = metric_ + i * w_, *const square = square_metric_ + i * w_;
    const double noise = level.sigma * level.sigma, ratio = level.alpha * level.alpha;
    sums_ = {};
    for (int64_t k = 0; k < p_.d; ++k) precision[k] = 1 / (noise + ratio * double(variance_[k]));
    for (int64_t k = p_.d; k < w_; ++k) precision[k] = 0;
    for (int64_t k = 0; k < w_; ++k) {
      metric[k] = T(precision[k]);
      if (precision[k] > sums_.largest) sums_.largest = precision[k];
      sums_.sum += precision[k];
      sums_.square_sum += precision[k] * precision[k];
    }
    unit_[i] = T(sums_.largest);
    for (int64_t k = 0; squares_ && k < w_; ++k) {
      const T relative = T(precision[k] / sums_.largest);
      square[k] = relative * relative;
    }
    return sums_;
  }
  // 1/tau^2 of every coordinate.
  const double* precision(int64_t i) const { return precision_ + place_[i] * w_; }
  const T* metric(int64_t i) const { return metric_ + place_[i] * w_; }
  T unit(int64_t i) const { return unit_[place_[i]]; }

  // Forgets the tile before.
  void begin() { known_ = -1; }
  // Finds the norms for the queries from q on. Those of one level share them.
  void find(const Tile<T>& t, int64_t q, int64_t count) {
    const T *metric[tile_queries], *square[tile_queries];
    int64_t n = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (i == 0 || place_[q + i] != place_[q + i - 1]) {
        metric[n] = metric_ + place_[q + i] * w_;
        square[n++] = square_metric_ + place_[q + i] * w_;
      }
      slot_[i] = n - 1;
    }
    if (n == 1 && known_ == place_[q]) return;
    known_ = n == 1 ? place_[q] : -1;
    norms(t, n, metric, norm_);
    if (squares_) norms(t, n, square, square_norm_);
  }
  // Of query q + i in P, and in P^2 over unit^2.
  const T* norm(int64_t i) const { return norm_ + slot_[i] * tile_; }
  const T* square_norm(int64_t i) const {
    return squares_ ? square_norm_ + slot_[i] * tile_ : nullptr;
  }

 private:
  size_t room(int64_t B) const {
    const auto t = [](int64_t n) { return Arena::bytes<T>(n); };
    return t(w_) + (1 + squares_) * (t(B * w_) + t(tile_queries * tile_)) + t(B) +
           Arena::bytes<double>(B * w_) + Arena::bytes<Level>(B) + Arena::bytes<int64_t>(B);
  }

  void norms(const Tile<T>& t, int64_t n, const T* const* metric, T* out) const {
    if (t.cols) {
      T* to[tile_queries];
      for (int64_t i = 0; i < n; ++i) to[i] = out + i * tile_;
      return products<T, true>(n, metric, {nullptr, 0, t.cols}, w_, t.padded, dot_chain, false, to);
    }
    for (int64_t i = 0; i < n; ++i) {
      T* const to = out + i * tile_;
      for (int64_t j = 0; j < t.padded; ++j) to[j] = 0;
      for (int64_t j = 0; j < t.n; ++j) {
        Vec<T> sum[4] = {};
        const T* const row = t.rows.at + j * t.rows.ld;
        in_four_chains<T>(w_, [&](int64_t k, int u) {
          const Vec<T> y = load(row + k);
          sum[u] += y * y * load(metric[i] + k);
        });
        to[j] = sum_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
      }
    }
  }

  const Problem<T>& p_;
  const Variances<T>& variances_;
  const int64_t w_, tile_;
  const bool squares_;
  Arena scratch_;
  double* precision_;
  T *variance_, *metric_, *square_metric_, *norm_, *square_norm_, *unit_;
  Level* level_;
  int64_t* place_;  // where the metric of a query is
  Sums sums_ = {};
  int64_t known_ = -1;          // the place whose norms are known
  int64_t slot_[tile_queries];  // where the norms are
};

}  // namespace
