// What kept_atoms knows of a query, and the bounds on its logits that follow at a level of the
// index. docs/certified.md derives them. In units of sigma^2 and less -|z|^2 / 2, which is the same
// for all atoms.
#pragma once
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "host/isa.h"

namespace dfk {

struct Index {
  const float *centre, *basis, *step;
  const int16_t* first;
  const int8_t* tail;
  const float *size, *scales, *rest, *shift;
  double skew, radius,
      far;            // |V V^T - I|; the largest |t| that is coded; such a |y|, with the centre's
  double apart;       // no atom that is set apart has a smaller |t|
  int64_t set_apart;  // how many atoms are
  int64_t N, d, K, padded;  // padded: length of a row of tail, 0 without
  // Such an atom has no codes: it is set apart where it has a size, else nothing is known of it.
  bool uncoded(int64_t atom) const { return scales[atom] == 0; }
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
    double all[4] = {}, squares[4] = {};  // one chain of additions would wait for itself
    for (int64_t k = 0; k < in_.d; ++k) {
      x[k] = query[k];
      z[k] = x[k] - alpha * in_.centre[k];
      squares[k % 4] += z[k] * z[k];
      all[k % 4] += x[k] * x[k];
    }
    square = (squares[0] + squares[1]) + (squares[2] + squares[3]);
    size_ = std::sqrt(square);
    // Of coordinates that are large beside their differences; |t|, |z| and distances are at most
    // the last factor.
    margin = 0x1p-48 *
             (std::sqrt((all[0] + all[1]) + (all[2] + all[3])) + std::fabs(alpha) * in_.far) *
             (size_ + std::fabs(alpha) * in_.radius);
    bound.alpha = float(alpha), bound.half = float(alpha * alpha / 2),
    bound.variance = float(variance);
  }

  // Whether the numbers that bounds are made of are far from the ends of float, and atoms that are
  // set apart have a bound.
  bool usable() const {
    const double s = std::fabs(alpha), size = size_ + in_.radius;
    return variance > 1e-24 && gap + 100 * variance < 1e24 &&
           (1 + s * s) * (1 + size * size) < 1e24 && most_apart() < INFINITY;
  }
  // No atom that is set apart has a larger logit, where each is counted (|t| / radius)^2 times, so
  // that what it adds to a mean or a covariance is bounded like that of any other. alpha |z| t -
  // alpha^2 t^2 / 2 + variance log (t / radius)^2 falls for all larger t where it falls at the
  // least.
  double most_apart() const {
    if (in_.set_apart == 0) return -INFINITY;
    const double t = in_.apart, rise = std::fabs(alpha) * size_ * (1 + 1e-9),
                 bend = alpha * alpha * (1 - 1e-9);
    const double more = 2 * variance * std::log(std::max(t / in_.radius, 1.0));
    return bend * t > rise + 2 * variance / t ? (rise - bend / 2 * t) * t + more * (1 + 1e-9)
                                              : INFINITY;
  }
  // Leaves out the atoms that are set apart; false where they may matter.
  bool drop_apart() {
    const double most = most_apart();
    if (!(most < least())) return false;
    drop(most, in_.set_apart);
    return true;
  }
  // Where a logit cannot matter: the best known less the gap.
  double least() const { return best - gap - margin; }

  // From a = V z.
  void set_first() {
    double sum = 0;
    for (int64_t k = 0; k < in_.K; ++k) {
      first.push_back(float(a[k] * in_.step[k]));
      sum += a[k] * a[k];
    }
    along_ = std::sqrt(sum);
    const double rest = std::max(square - sum, 0.0) + in_.skew * sum + rounding() * (square + sum);
    bound.reach = up(std::sqrt(rest));
    bound.along = up(along_);
    bound.code = up(in_.skew * along_ + rounding() * size_ + float_sums());
  }
  void set_tail() {
    double largest = 0, sum = 0;
    for (const double zk : z) largest = std::max(largest, std::fabs(zk));
    tail_unit = largest > 0 ? largest / 32767 : 1;
    tail.assign(in_.padded, 0);
    // Added and taken off, it rounds to an integer; nearbyint would be a call.
    constexpr double whole = 0x1.8p52;
    for (int64_t k = 0; k < in_.d; ++k) {
      const double m = (z[k] / tail_unit + whole) - whole;
      tail[k] = int16_t(m);
      sum += std::fabs(z[k] - m * tail_unit);
    }
    bound.lost = up(128 * sum * (1 + 1e-9));  // a code is an int8
    bound.code =
        up(4 * (rounding() * size_ + float_sums()));  // the codes of both levels are at most 4 |t|
  }

  // Leaves out n atoms whose logits are at most `largest`.
  void drop(double largest, int64_t n) {
    if (n > 0) drops_.emplace_back(largest + margin, n);
  }
  // The mass of what was left out is at most this part of the mass of what was kept.
  double dropped() const {
    double sum = 0;
    for (const auto& [largest, n] : drops_)  // below -700 exp would be slow
      sum += double(n) * std::exp(std::max((largest - best) / variance, -700.0));
    return sum * (1 + 1e-9);
  }

 private:
  static constexpr double unit_ = 0x1p-53;
  const Index& in_;

 public:
  std::vector<double> x, z, a;  // a = V z
  double alpha, variance, gap, square = 0, margin = 0;
  std::vector<float> first;   // a_k step_k
  std::vector<int16_t> tail;  // z in tail_unit
  double tail_unit = 0;
  Bound bound{};
  double best = -INFINITY;     // k atoms have a logit of at least this
  int level = 0;               // of the index: up_ and c_ of Cascade are from there
  std::vector<double> sample;  // exact logits of a few atoms

 private:
  static float up(double a) { return std::nextafter(float(a), INFINITY); }
  // What sums in double cost, relative to what they add up.
  double rounding() const { return 8 * unit_ * double(in_.d + in_.K) * std::sqrt(double(in_.K)); }
  // What sums in float cost: the first level's, and adding the tail.
  double float_sums() const { return 0x1p-24 * double(in_.K + 4) * along_ + 0x1p-21 * size_; }

  double size_ = 0, along_ = 0;  // |z|, |a|
  std::vector<std::pair<double, int64_t>> drops_;
};

}  // namespace dfk
