// From the arguments of an op over a data set to the merged moments of every query, and from these
// to results: what those ops share.
#pragma once
#include <cmath>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#include "host/isa.h"
#include "host/tensors.h"

namespace dfk {

// Arguments as the schemas have them: checked, made contiguous where need be, and kept alive.
struct Arguments {
  Tensor x, y, alpha, sigma;
  std::optional<Tensor> log_prior, v;
  double scale, offset;
  std::optional<Tensor> atoms, counts;  // lists of atoms; none: every query counts all atoms
  // y is [N, d] or, with an axis of clouds, [G, N, d]; log_prior likewise. The first B queries
  // belong to the first cloud, the next B to the second.
  int64_t clouds = 1, B = 0;
  std::optional<Tensor> queries = std::nullopt;  // for draw
  std::optional<Tensor> values = std::nullopt;   // for average: [N, P] or [G, N, P]
  int64_t seed = 0;
};
Arguments checked_clouds(Tensor x, Tensor y, std::optional<Tensor> v, Tensor alpha, Tensor sigma,
                         std::optional<Tensor> log_prior, double scale, double offset,
                         std::optional<Tensor> atoms = std::nullopt,
                         std::optional<Tensor> counts = std::nullopt);
// Adds values of the atoms, which may have an axis of clouds too.
void add_values(Arguments& a, const Tensor& values);
// The same of an op that takes one cloud only.
Arguments checked_arguments(Tensor x, Tensor y, std::optional<Tensor> v, Tensor alpha, Tensor sigma,
                            std::optional<Tensor> log_prior, double scale, double offset,
                            std::optional<Tensor> atoms = std::nullopt,
                            std::optional<Tensor> counts = std::nullopt);

// f(cloud) for every cloud, several of them at once where they are small. The error of a cloud says
// which it is.
void for_each_cloud(const Arguments& a, const std::function<void(int64_t cloud)>& f);

// Arguments of one cloud as a Problem; all values are checked but those of y.
template <class T>
struct CheckedProblem {
  Problem<T> problem;
  double log_total;    // log sum exp(log_prior - max_log_prior)
  int64_t masked = 0;  // atoms whose log_prior is -inf
};
template <class T>
CheckedProblem<T> problem_of(const Arguments& a, MomentKind kind, int64_t cloud = 0);
extern template CheckedProblem<float> problem_of(const Arguments&, MomentKind, int64_t);
extern template CheckedProblem<double> problem_of(const Arguments&, MomentKind, int64_t);

// The merged moments of every query of one cloud (split 0), with the memory they live in.
template <class T>
struct Accumulated {
  Problem<T> problem;
  Moments<T> moments;
  double log_total;
  std::vector<T> centre;
  std::unique_ptr<void, decltype(&std::free)> memory{nullptr, &std::free};
};
// Whether first_moment is used: products with the covariance can do without (host/matvec_phases.h).
enum class Mean { used, unused };
template <class T>
Accumulated<T> accumulate(const Arguments& a, MomentKind kind, int64_t cloud = 0,
                          Mean mean = Mean::used);
extern template Accumulated<float> accumulate(const Arguments&, MomentKind, int64_t, Mean);
extern template Accumulated<double> accumulate(const Arguments&, MomentKind, int64_t, Mean);

// log q_t of query b.
template <class T>
double log_density(const Accumulated<T>& sums, int64_t b) {
  const Problem<T>& p = sums.problem;
  const double precision = 1.0 / (double(p.sigma[b]) * p.sigma[b]);
  return sums.moments.max_logit[b] + std::log(sums.moments.weight_sum[b]) - sums.log_total +
         0.5 * double(p.d) * std::log(precision / (2 * M_PI));
}

// One query whose results are made: F = (I - ratio C) precision, its mean lies at `mean` from the
// reference.
template <class T>
struct FinishedQuery {
  int64_t b;
  double ratio, precision;  // alpha^2 / sigma^2, 1 / sigma^2
  const double* mean;
  const T* reference;
};

// f(query) for every query, in parallel where there is enough to do.
template <class T, class F>
void for_each_query(const Accumulated<T>& sums, int64_t work, const F& f) {
  const Problem<T>& p = sums.problem;
  const Moments<T>& m = sums.moments;
  in_ranges(p.B, work, [&](int64_t begin, int64_t end) {
    std::vector<double> mean(p.d);
    std::vector<T> reference(p.d);
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t k = 0; k < p.d; ++k)
        mean[k] = m.first_moment[b * m.stride + k] / m.weight_sum[b];
      kernels_for<T>().read_reference(p, m.reference[b], reference.data());
      const double precision = 1.0 / (double(p.sigma[b]) * p.sigma[b]);
      f(FinishedQuery<T>{.b = b,
                         .ratio = double(p.alpha[b]) * p.alpha[b] * precision,
                         .precision = precision,
                         .mean = mean.data(),
                         .reference = reference.data()});
    }
  });
}

}  // namespace dfk
