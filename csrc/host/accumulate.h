// From tensors to a Problem, over the threads, back to merged moments: what the data-set ops share.
#pragma once
#include <cmath>
#include <cstdlib>
#include <memory>
#include <vector>

#include "host/isa.h"
#include "host/tensors.h"

namespace dfk {

// Merged moments of every query (split 0), with the memory they live in.
template <class T>
struct Gathered {
  Problem<T> problem;
  Moments<T> moments;
  double log_total;  // log sum exp(log_prior - prior_top)
  std::vector<T> centre;
  std::unique_ptr<void, decltype(&std::free)> memory{nullptr, &std::free};

  // Mean less the reference, in double: out[0, d). The reference itself goes to ref[0, d).
  void mean(int64_t b, double* out, T* ref) const {
    for (int64_t k = 0; k < problem.d; ++k)
      out[k] = moments.first[b * moments.stride + k] / moments.mass[b];
    kernels_for<T>().read_reference(problem, moments.ref[b], ref);
  }
};

// Arguments as the schemas have them; checked, made contiguous where need be, and kept alive.
struct Arguments {
  Tensor x, y, alpha, sigma;
  std::optional<Tensor> log_prior, v;
  double scale, offset;
  std::optional<Tensor> atoms{}, counts{};  // of every query the atoms that it counts; none: all
};
Arguments check(Tensor x, Tensor y, std::optional<Tensor> v, Tensor alpha, Tensor sigma,
                std::optional<Tensor> log_prior, double scale, double offset,
                std::optional<Tensor> atoms = std::nullopt,
                std::optional<Tensor> counts = std::nullopt);

// Arguments as a Problem, all values but y's checked.
template <class T>
struct Checked {
  Problem<T> problem;
  double log_total;    // log sum exp(log_prior - prior_top)
  int64_t masked = 0;  // atoms whose log_prior is -inf
};
template <class T>
Checked<T> problem_of(const Arguments& a, Op op);

template <class T>
Gathered<T> gather(const Arguments& a, Op op);
extern template Checked<float> problem_of(const Arguments&, Op);
extern template Checked<double> problem_of(const Arguments&, Op);
extern template Gathered<float> gather(const Arguments&, Op);
extern template Gathered<double> gather(const Arguments&, Op);

// fisher = (I - (alpha^2 / sigma^2) C) / sigma^2: the factor of C inside, and 1 / sigma^2.
template <class T>
struct Noise {
  double ratio, precision;
  Noise(const Problem<T>& p, int64_t b) {
    precision = 1.0 / (double(p.sigma[b]) * p.sigma[b]);
    ratio = double(p.alpha[b]) * p.alpha[b] * precision;
  }
};

}  // namespace dfk
