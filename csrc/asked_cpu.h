// What kept_atoms knows of a query, and the bounds on its logits that follow at a level of the index.
// docs/certified.md derives them. In units of sigma^2 and less -|z|^2 / 2, which is the same for all atoms.
#pragma once
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "dispatch_cpu.h"

namespace dfk {

inline constexpr size_t most_levels = 4;  // without the tail

struct Index {
  const float *centre, *basis, *step;
  const int16_t* first;
  const int8_t *codes, *tail;
  const float *size, *scales, *rest, *shift;
  std::vector<int64_t> cuts;  // coordinates of the basis up to each level
  double skew, radius, far;   // |V V^T - I|; the largest |t|; the largest |y|, with the centre's
  int64_t d, K, padded;       // padded: length of a row of tail, 0 without
};

class Asked {
 public:
  template <class T>
  Asked(const Index& index, const T* query, double alpha, double sigma, double gap)
      : in_(index),
        x(index.d),
        z(index.d),
        a(index.K),
        alpha(alpha),
        variance(sigma * sigma),
        gap(gap * variance) {
    double all = 0;
    for (int64_t k = 0; k < in_.d; ++k) {
      x[k] = query[k];
      z[k] = x[k] - alpha * in_.centre[k];
      square += z[k] * z[k];
      all += x[k] * x[k];
    }
    size_ = std::sqrt(square);
    // Of coordinates that are large beside their differences; |t|, |z| and distances are at most the last
    // factor.
    margin =
        0x1p-48 * (std::sqrt(all) + std::fabs(alpha) * in_.far) * (size_ + std::fabs(alpha) * in_.radius);
    bound.alpha = float(alpha), bound.half = float(alpha * alpha / 2), bound.variance = float(variance);
  }

  // Whether the numbers that bounds are made of are far from the ends of float.
  bool usable() const {
    const double s = std::fabs(alpha), size = size_ + in_.radius;
    return variance > 1e-24 && gap + 100 * variance < 1e24 && (1 + s * s) * (1 + size * size) < 1e24;
  }
  // Where a logit cannot matter: the best known less the gap.
  double least() const { return best - gap - margin; }

  void set_first() {
    first.resize(in_.cuts[0]);
    for (size_t k = 0; k < first.size(); ++k) first[k] = float(a[k] * in_.step[k]);
    levels_ = 1;
    set_bound(0);
  }
  void set_level(size_t l) {
    const int64_t k0 = in_.cuts[l - 1], n = in_.cuts[l] - k0;
    quantise(n, n, [&](int64_t k) { return a[k0 + k] * in_.step[k0 + k]; });
    set_bound(l);
  }
  // The tail codes what the first level leaves over, along the coordinates of the data themselves.
  void set_tail() {
    levels_ = in_.cuts.size();
    std::fill_n(bound.lost, levels_, 0.0f);
    quantise(in_.d, in_.padded, [&](int64_t k) { return z[k]; });
    bound.reach = up(size_);
    bound.along = 0;
    bound.code = up(4 * (rounding(0) * size_ + float_sums()));  // the codes of both are at most 4 |t|
  }

  // Leaves out n atoms whose logits are at most `largest`.
  void drop(double largest, int64_t n) {
    if (n > 0) drops_.emplace_back(largest + margin, n);
  }
  // The mass of what was left out is at most this part of the mass of what was kept.
  double dropped() const {
    double sum = 0;
    for (const auto& [largest, n] : drops_) sum += double(n) * std::exp((largest - best) / variance);
    return sum * (1 + 1e-9);
  }

 private:
  static constexpr double unit_ = 0x1p-53;
  const Index& in_;

 public:
  std::vector<double> x, z, a;  // a = V z as far as it was needed
  double alpha, variance, gap, square = 0, margin = 0;
  std::vector<float> first;    // a_k step_k of the first level
  std::vector<int16_t> level;  // the same of another level, or z, as integers
  double level_unit = 0;       // of these
  Bound bound{};
  double best = -INFINITY;  // k atoms have a logit of at least this

 private:
  static float up(double a) { return std::nextafter(float(a), INFINITY); }
  // What sums in double cost, up to level l.
  double rounding(size_t l) const {
    return 8 * unit_ * double(in_.d + in_.cuts[l]) * std::sqrt(double(in_.cuts[l]));
  }
  // What sums in float cost, of the first level and of up to three more.
  double float_sums() const { return 0x1p-24 * double(in_.cuts[0] + 4) * size_of_a(0) + 0x1p-20 * size_; }
  double size_of_a(size_t l) const {
    double sum = 0;
    for (int64_t k = 0; k < in_.cuts[l]; ++k) sum += a[k] * a[k];
    return std::sqrt(sum);
  }

  void set_bound(size_t l) {
    const double s = size_of_a(l), r = rounding(l);
    bound.reach = up(std::sqrt(std::max(square - s * s, 0.0) + in_.skew * s * s + r * (square + s * s)));
    bound.along = up(s);
    bound.code = up(in_.skew * s + r * size_ + float_sums());
  }

  // v as integers of 16 bits; bound.lost of this level: codes are at most 127.
  template <class F>
  void quantise(int64_t n, int64_t padded, const F& v) {
    double largest = 0, lost = 0;
    for (int64_t k = 0; k < n; ++k) largest = std::max(largest, std::fabs(v(k)));
    level_unit = largest > 0 ? largest / 32767 : 1;
    level.assign(padded, 0);
    for (int64_t k = 0; k < n; ++k) {
      const double m = std::nearbyint(v(k) / level_unit);
      level[k] = int16_t(m);
      lost += std::fabs(v(k) - m * level_unit);
    }
    bound.lost[levels_++] = up(127 * lost * (1 + 1e-9));
  }

  double size_ = 0;
  size_t levels_ = 0;
  std::vector<std::pair<double, int64_t>> drops_;
};

}  // namespace dfk
