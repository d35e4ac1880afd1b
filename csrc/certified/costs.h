// Exact logits of a few atoms, and which queries are worth searching for: of each by itself,
// whatever the queries beside it are.
#pragma once
#include <functional>

#include "certified/asked.h"
#include "host/tensors.h"

namespace dfk {

// Logits by differences in double.
template <class T>
class ExactLogits {
 public:
  ExactLogits(const Problem<T>& p, const Index& index) : p_(p), in_(index) {
    wide_.y = p.y, wide_.scale = p.scale, wide_.offset = p.offset;
    wide_.d = p.d, wide_.ldy = p.ldy, wide_.storage = p.storage;
  }
  const Problem<T>& problem() const { return p_; }
  const Index& index() const { return in_; }

  bool masked(int64_t atom) const { return p_.log_prior && p_.log_prior[atom] == -INFINITY; }
  // Relative to the largest; -inf for an atom without codes.
  double log_prior(int64_t atom) const {
    if (in_.uncoded(atom)) return -INFINITY;
    return p_.log_prior ? double(p_.log_prior[atom]) - double(p_.prior_top) : 0;
  }
  void read(int64_t atom, std::vector<double>& y) const {
    y.resize(p_.d);
    kernels().f64.read_reference(wide_, atom, y.data());
  }
  // A logit, less what rounding may have added to it.
  double operator()(const Asked& q, int64_t atom, const std::vector<double>& y) const {
    const double prior = q.variance * log_prior(atom);
    if (std::isinf(prior)) return prior;
    const double square = kernels().screen.square_distance(q.x.data(), q.alpha, y.data(), p_.d);
    const double error = 0x1p-51 * (double(p_.d) + 8) * (square + q.square + std::fabs(prior));
    return prior + (q.square - square) / 2 - error;
  }

 private:
  const Problem<T>& p_;
  const Index& in_;
  Problem<double> wide_{};  // to read atoms in double
};

// Times per atom, in units of what reading one takes: fitted to photographs (d = 3072) and digits
// (d = 784). A block of queries is taken to consist of queries like the one in question, so that
// the answer does not depend on those that happen to stand beside it.
class Costs {
 public:
  Costs(int64_t B, int64_t N, int64_t d)
      : Q_(double(std::min(B, block))), N_(double(N)), d_(double(d)) {
    shared_ = B > 2 * block ? 0.6 : 1;  // many queries share what the dense kernel reads
  }
  // Whether a search that leaves so many atoms, as far as one knows, is cheaper than taking all of
  // them.
  bool worth(const Asked& q, int64_t k, int64_t left) const {
    return kept_time(q, k) + tail_time(Q_ * double(left) / N_) <= dense_time();
  }
  bool worth(const Asked& q, int64_t k) const { return kept_time(q, k) <= dense_time(); }

 private:
  double dense_time() const { return 0.95 * shared_ * (1 + 0.13 * Q_); }
  double tail_time(double pairs) const {
    return 0.4 * (1 - std::exp(-0.6 * pairs)) + (0.02 + 40 / d_) * pairs;
  }
  // Of the kernel that reads what is kept, by the sample. While nothing else is known, the k best
  // of the sample itself are what the others are compared with, and tell nothing.
  double kept_time(const Asked& q, int64_t k) const {
    std::vector<double> sorted = q.sample;
    const int64_t size = int64_t(sorted.size()), first = std::min(k, size);
    std::nth_element(sorted.begin(), sorted.begin() + (first - 1), sorted.end(), std::greater<>());
    const double least = std::max(q.best, sorted[first - 1]) - q.gap;
    const int64_t tell_nothing = q.best > -INFINITY ? 0 : std::min(first, size - 1);
    const int64_t needed = std::count_if(sorted.begin(), sorted.end(),
                                         [least](double logit) { return logit >= least; });
    const double part =
        double(std::max<int64_t>(needed - tell_nothing, 0)) / double(size - tell_nothing);
    const double rows = 1 - std::pow(1 - part, Q_), pairs = Q_ * part;
    return (0.8 + 300 / d_) * rows + (0.27 + 80 / d_) * pairs;
  }

  double Q_, N_, d_, shared_;
};

// Queries [b0, b1), each with the exact logits of a few atoms.
template <class T>
std::vector<Asked> asked(const ExactLogits<T>& exact, double gap, int64_t b0, int64_t b1) {
  constexpr int64_t size = 32;
  const Problem<T>& p = exact.problem();
  std::vector<Asked> out;
  for (int64_t b = b0; b < b1; ++b) {
    out.emplace_back(exact.index(), p.x + b * p.d, double(p.alpha[b]), double(p.sigma[b]), gap);
    out.back().sample.resize(size);
  }
  each(size, (b1 - b0) * p.d, [&](int64_t s) {
    const int64_t atom = s * p.N / size;
    std::vector<double> y;
    exact.read(atom, y);
    for (Asked& q : out) q.sample[s] = exact(q, atom, y);
  });
  return out;
}

}  // namespace dfk
