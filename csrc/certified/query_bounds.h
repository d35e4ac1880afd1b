// One query, and the bounds on its logits that follow from each level of an index.
// docs/certified.md derives them. Logits are times sigma^2 and without -|z|^2 / 2, which all atoms
// of a query share.
#pragma once
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "certified/index.h"
#include "certified/kernels.h"
#include "certified/rounding.h"

namespace dfk {

class QueryBounds {
 public:
  template <class T>
  QueryBounds(const Index& index, const T* query, double alpha, double sigma, double gap)
      : index_(index),
        x(index.d),
        z(index.d),
        a(index.K),
        alpha(alpha),
        variance(sigma * sigma),
        gap(gap * variance) {
    double x_squares[4] = {}, z_squares[4] = {};  // one chain of additions would wait for itself
    for (int64_t k = 0; k < index_.d; ++k) {
      x[k] = query[k];
      z[k] = x[k] - alpha * index_.centre[k];
      z_squares[k % 4] += z[k] * z[k];
      x_squares[k % 4] += x[k] * x[k];
    }
    z_square = (z_squares[0] + z_squares[1]) + (z_squares[2] + z_squares[3]);
    z_norm_ = std::sqrt(z_square);
    const double x_square = (x_squares[0] + x_squares[1]) + (x_squares[2] + x_squares[3]);
    coordinate_error = rounding::coordinates *
                       (std::sqrt(x_square) + std::fabs(alpha) * index_.coordinate_norm) *
                       (z_norm_ + std::fabs(alpha) * index_.radius);
    coefficients.alpha = float(alpha);
    coefficients.half_alpha_square = float(alpha * alpha / 2);
    coefficients.variance = float(variance);
  }

  // Whether the numbers that bounds are made of are far from the ends of float, and the remote
  // atoms have a bound.
  bool usable() const {
    const double alpha_size = std::fabs(alpha), size = z_norm_ + index_.radius;
    return variance > 1e-24 && gap + 100 * variance < 1e24 &&
           (1 + alpha_size * alpha_size) * (1 + size * size) < 1e24 && remote_logit() < INFINITY;
  }

  // An atom whose upper bound lies below this cannot matter.
  double threshold() const { return kth_logit - gap - coordinate_error; }

  // Prepares the coarse level, from a = V z.
  void start_coarse() {
    double a_square = 0;
    for (int64_t k = 0; k < index_.K; ++k) {
      coarse_query.push_back(float(a[k] * index_.axis_scale[k]));
      a_square += a[k] * a[k];
    }
    a_norm_ = std::sqrt(a_square);
    const double remainder = std::max(z_square - a_square, 0.0) + index_.axis_skew * a_square +
                             double_sums() * (z_square + a_square);
    coefficients.query_remainder = rounding::round_up(std::sqrt(remainder));
    coefficients.query_on_axes = rounding::round_up(a_norm_);
    coefficients.code_error =
        rounding::round_up(index_.axis_skew * a_norm_ + double_sums() * z_norm_ + float_sums());
  }

  // Prepares the fine level: z as integer multiples of fine_unit.
  void start_fine() {
    level = 1;
    double largest = 0, lost = 0;
    for (const double zk : z) largest = std::max(largest, std::fabs(zk));
    fine_unit = largest > 0 ? largest / 32767 : 1;
    fine_query.assign(index_.padded, 0);
    // Adding this number and taking it off again rounds to an integer; nearbyint would be a call.
    constexpr double whole = 0x1.8p52;
    for (int64_t k = 0; k < index_.d; ++k) {
      const double m = (z[k] / fine_unit + whole) - whole;
      fine_query[k] = int16_t(m);
      lost += std::fabs(z[k] - m * fine_unit);
    }
    // a code is an int8
    coefficients.query_rounding = rounding::round_up(128 * lost * rounding::few_roundings);
    // the codes of both levels are at most 4 |t|
    coefficients.code_error = rounding::round_up(4 * (double_sums() * z_norm_ + float_sums()));
  }

  // Takes note that n atoms are dropped whose logits are at most `upper`.
  void drop(double upper, int64_t n) {
    if (n > 0) dropped_.emplace_back(upper + coordinate_error, n);
  }
  // Drops the remote atoms; false where they may matter.
  bool drop_remote() {
    const double upper = remote_logit();
    if (!(upper < threshold())) return false;
    drop(upper, index_.remote_count);
    return true;
  }
  // Upper bound of the dropped atoms' weight, relative to that of the selected ones.
  double dropped_weight() const {
    double sum = 0;
    for (const auto& [upper, n] : dropped_)  // exp would be slow below -700
      sum += double(n) * std::exp(std::max((upper - kth_logit) / variance, -700.0));
    return sum * rounding::few_roundings;
  }

 private:
  const Index& index_;

 public:
  std::vector<double> x, z, a;  // a = V z
  double alpha, variance, gap, z_square = 0;
  double coordinate_error = 0;
  double kth_logit = -INFINITY;      // k atoms have a logit of at least this
  int level = 0;                     // of the index, from which the candidates' bounds are
  BoundCoefficients coefficients{};  // at this level
  std::vector<float> coarse_query;   // a, times axis_scale
  std::vector<int16_t> fine_query;   // z, in units of fine_unit
  double fine_unit = 0;
  std::vector<double> sample;  // exact logits of a few atoms

 private:
  double double_sums() const { return rounding::double_sums(index_.d, index_.K); }
  double float_sums() const { return rounding::float_sums(index_.K, a_norm_, z_norm_); }

  // Upper bound of every remote atom's logit, where each is counted (|t| / radius)^2 times, so that
  // what it adds to a mean or a covariance is bounded like that of any other atom. The bound,
  // alpha |z| t - alpha^2 t^2 / 2 + variance log (t / radius)^2, falls for all larger t where it
  // falls at the least t.
  double remote_logit() const {
    if (index_.remote_count == 0) return -INFINITY;
    const double t = index_.remote_distance;
    const double slope = std::fabs(alpha) * z_norm_ * (1 + 1e-9);
    const double curvature = alpha * alpha * (1 - 1e-9);
    const double count = 2 * variance * std::log(std::max(t / index_.radius, 1.0));
    const bool falls = curvature * t > slope + 2 * variance / t;
    return falls ? (slope - curvature / 2 * t) * t + count * (1 + 1e-9) : INFINITY;
  }

  double z_norm_ = 0, a_norm_ = 0;
  std::vector<std::pair<double, int64_t>> dropped_;  // upper bounds of how many atoms
};

}  // namespace dfk
