// What the variances of a tile's components make of expanded logits at a noise level.
//
// With g = x - alpha centre and t = y - centre, the score of a component and its logit are
//   s = p (alpha t - g),   p = 1/tau^2,
//   logit = prior - p/2 |g - alpha t|^2,   prior = log pi - log tau, that of the usual variance
//   off.
// With p_0 that of the usual variance and delta = p - p_0, whose share of |g|^2 alone differs
// between components,
//   logit = -p_0/2 |g|^2 + bias + slope <g, t> - delta/2 |g|^2
//   |s + p_0 g|^2 = square + 2 delta (delta/2 |g|^2 - slope <g, t>)
// where bias = prior - alpha^2 p |t|^2 / 2, slope = alpha p and square = alpha^2 p^2 |t|^2. A
// diagonal that all components share is a metric: p is 1 and delta 0, and products and norms are
// those of the metric P = diag(1/tau^2), but for square, whose norm is that of P^2.
#pragma once
#include "simd/expanded_tiles.h"
#include "simd/log.h"
#include "simd/mixture_rows.h"

namespace {

template <class T>
class MixtureWidths {
 public:
  // tile: the most components of a tile.
  MixtureWidths(const Problem<T>& p, const Variances<T>& variances, int64_t tile)
      : p_(p),
        variances_(variances),
        own_(variances.rows > 1),
        scratch_(8 * Arena::bytes<T>(tile)) {
    if (!ok()) return;
    T** const tables[] = {&variance_, &prior,      &precision, &bias,
                          &slope,     &half_delta, &square,    &drawn};
    for (T** table : tables) *table = scratch_.template take<T>(tile);
    for (int64_t j = 0; j < tile; ++j) precision[j] = 1, half_delta[j] = drawn[j] = 0;
  }
  bool ok() const { return scratch_.ok(); }

  // Forgets the tile before; false where a variance of this one is not usable.
  bool begin(const Tile<T>& t) {
    level_ = {__builtin_nan(""), 0};
    if (!own_) return true;
    for (int64_t j = 0; j < t.n; ++j) variance_[j] = variances_.at[row_of(p_, t.start + j)];
    for (int64_t j = t.n; j < t.padded; ++j) variance_[j] = T(variances_.usual);
    return usable(variance_, t.n);
  }

  // The tables for a level. In a metric the norms of the components, |t|_P^2 and |t|_{P^2}^2 over
  // unit^2, are those given.
  void set_level(const Tile<T>& t, Level level, const T* norm, const T* square_norm, T unit) {
    if (level == level_) return;
    level_ = level;
    if (own_) {
      set_precisions(t);
      norm = square_norm = t.norm;
    } else {
      for (int64_t j = 0; j < t.padded; ++j) prior[j] = t.log_prior[j], slope[j] = T(level.alpha);
    }
    const T alpha = T(level.alpha), half = T(0.5) * alpha, factor = alpha * unit;
    Vec<T> norms{}, priors{};
    for (int64_t j = 0; j < t.padded; j += W<T>) {
      const Vec<T> n = load(norm + j), l = load(prior + j), size = larger<T>(l, -l),
                   along = own_ ? load(slope + j) : all(factor);
      store<T>(bias + j, l - half * load(precision + j) * (alpha * n));
      if (square_norm) store<T>(square + j, along * (along * load(square_norm + j)));
      norms = larger<T>(n, norms);
      priors = larger<T>(size < T(__builtin_inf()) ? size : Vec<T>{}, priors);
    }
    largest_norm = max_lanes<T>(norms);
    largest_prior = max_lanes<T>(priors);
  }
  // A component's variance, as MixtureRows takes it.
  const T* variance(int64_t j) const { return variance_ + j; }

  T *prior, *precision, *bias, *slope, *half_delta, *square;
  T* drawn;  // v p, where every component has its own v
  double largest_precision = 1, largest_half_delta = 0, largest_norm = 0, largest_prior = 0;

 private:
  void set_precisions(const Tile<T>& t) {
    // In units of the usual tau^2, so that squares of sigma need not be represented.
    const double noise = level_.sigma * level_.sigma, ratio = level_.alpha * level_.alpha,
                 unit = 1 / (noise + ratio * variances_.usual);
    const T of_noise = T(noise * unit), of_v = T(ratio * unit), scale = T(unit),
            usual = T(variances_.usual), alpha = T(level_.alpha), half_d = T(0.5) * T(p_.d);
    Vec<T> precisions{}, deltas{};
    for (int64_t j = 0; j < t.padded; j += W<T>) {
      const Vec<T> v = load(variance_ + j), relative = of_noise + of_v * v,
                   p = scale * (T(1) / relative), delta = (T(0.5) * of_v) * (usual - v) * p;
      store<T>(precision + j, p);
      store<T>(slope + j, alpha * p);
      store<T>(half_delta + j, delta);
      store<T>(drawn + j, v * p);
      store<T>(prior + j, load(t.log_prior + j) - half_d * vlog(relative));
      precisions = larger<T>(p, precisions);
      deltas = larger<T>(larger<T>(delta, -delta), deltas);
    }
    largest_precision = max_lanes<T>(precisions);
    largest_half_delta = max_lanes<T>(deltas);
  }

  const Problem<T>& p_;
  const Variances<T>& variances_;
  const bool own_;
  Arena scratch_;
  Level level_ = {};
  T* variance_;
};

}  // namespace
