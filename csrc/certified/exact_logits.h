// Logits of a few atoms by differences in double.
#pragma once
#include <cmath>
#include <vector>

#include "certified/query_bounds.h"
#include "host/isa.h"
#include "host/tensors.h"

namespace dfk {

template <class T>
class ExactLogits {
 public:
  ExactLogits(const Problem<T>& p, const Index& index) : p_(p), index_(index) {
    in_double_.y = p.y, in_double_.scale = p.scale, in_double_.offset = p.offset;
    in_double_.d = p.d, in_double_.row_stride = p.row_stride, in_double_.storage = p.storage;
  }
  const Problem<T>& problem() const { return p_; }
  const Index& index() const { return index_; }

  bool masked(int64_t atom) const { return p_.log_prior && p_.log_prior[atom] == -INFINITY; }
  // Relative to the largest; -inf for an atom without codes.
  double log_prior(int64_t atom) const {
    if (!index_.has_codes(atom)) return -INFINITY;
    return p_.log_prior ? double(p_.log_prior[atom]) - double(p_.max_log_prior) : 0;
  }
  void read(int64_t atom, std::vector<double>& y) const {
    y.resize(p_.d);
    kernels().f64.read_reference(in_double_, atom, y.data());
  }
  // The logit of an atom y for a query, less what rounding may have added to it.
  double operator()(const QueryBounds& q, int64_t atom, const std::vector<double>& y) const {
    const double prior = q.variance * log_prior(atom);
    if (std::isinf(prior)) return prior;
    const double square = kernels().certified.square_distance(q.x.data(), q.alpha, y.data(), p_.d);
    const double sizes = square + q.z_square + std::fabs(prior);
    return prior + (q.z_square - square) / 2 - rounding::exact_logit(p_.d) * sizes;
  }

 private:
  const Problem<T>& p_;
  const Index& index_;
  Problem<double> in_double_{};  // to read atoms in double
};

// Queries [b0, b1), each with the exact logits of the same few atoms.
template <class T>
std::vector<QueryBounds> sampled_queries(const ExactLogits<T>& exact, double gap, int64_t b0,
                                         int64_t b1) {
  constexpr int64_t sample_size = 32;
  const Problem<T>& p = exact.problem();
  std::vector<QueryBounds> out;
  for (int64_t b = b0; b < b1; ++b) {
    out.emplace_back(exact.index(), p.x + b * p.d, double(p.alpha[b]), double(p.sigma[b]), gap);
    out.back().sample.resize(sample_size);
  }
  each(sample_size, (b1 - b0) * p.d, [&](int64_t s) {
    const int64_t atom = s * p.N / sample_size;
    std::vector<double> y;
    exact.read(atom, y);
    for (QueryBounds& q : out) q.sample[s] = exact(q, atom, y);
  });
  return out;
}

}  // namespace dfk
