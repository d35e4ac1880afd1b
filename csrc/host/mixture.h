// From the arguments of an op over a mixture's components to the merged sums of every query.
#pragma once
#include "host/accumulate.h"

namespace dfk {

template <class T>
struct MixtureAccumulated {
  Problem<T> problem;
  Variances<T> variances;
  MixtureSums<T> sums;
  double log_total;
  std::vector<double> scalars, rows, references;
};

// The checked arguments, and the variances [rows, columns] with them.
struct MixtureArguments {
  Arguments a;
  Tensor variance;
};
MixtureArguments checked_mixture(Tensor x, Tensor y, Tensor variance, std::optional<Tensor> v,
                                 Tensor alpha, Tensor sigma, std::optional<Tensor> log_prior,
                                 double scale, double offset);

// kind: posterior, matvec or diagonal.
template <class T>
MixtureAccumulated<T> accumulate_mixture(const MixtureArguments& a, MomentKind kind);
extern template MixtureAccumulated<float> accumulate_mixture(const MixtureArguments&, MomentKind);
extern template MixtureAccumulated<double> accumulate_mixture(const MixtureArguments&, MomentKind);

// One query whose results are made, of sums normalised by the weight.
template <class T>
struct MixtureQuery {
  int64_t b;
  double log_prob, ess, square;  // square: sum w |s - reference|^2, of posterior
  const double* reference;
  const double* score;      // [d], less the reference
  const double* precision;  // [d]: sum w/tau^2
  const double* mean;       // [d], of posterior
  const double* second;     // [1 or K, stride], about the reference
  const double* along;      // [K]: <score, v>, less the reference
};

// f(query) for every query, in parallel where there is enough to do. Normalises the sums.
template <class T, class F>
void for_each_query(const MixtureAccumulated<T>& all, const F& f) {
  const Problem<T>& p = all.problem;
  const MixtureSums<T>& m = all.sums;
  const Variances<T>& v = all.variances;
  const bool own = v.rows > 1, diagonal = v.columns > 1;
  in_ranges(p.B, 4 * m.rows * p.d, [&](int64_t begin, int64_t end) {
    std::vector<double> precision(p.d);
    for (int64_t b = begin; b < end; ++b) {
      const double weight = *m.weight_sum(0, b), alpha = p.alpha[b], sigma = p.sigma[b];
      double* const vectors = m.first(0, b);
      for (int64_t i = 0; i < m.rows * m.stride; ++i) vectors[i] /= weight;
      for (int64_t k = 0; k < p.K; ++k) m.projection_sum(0, b)[k] /= weight;
      const auto tau2 = [&](double variance) { return sigma * sigma + alpha * alpha * variance; };
      double log_norm = 0;  // sum_k log(2 pi tau_0^2)
      if (own || !diagonal)
        log_norm = double(p.d) * std::log(2 * M_PI * tau2(own ? v.usual : double(v.at[0])));
      for (int64_t k = 0; k < p.d; ++k) {
        if (own) {
          precision[k] = diagonal ? m.row(0, b, m.precision)[k] : *m.precision_sum(0, b) / weight;
          continue;
        }
        const double square = tau2(double(v.at[diagonal ? k : 0]));
        if (diagonal) log_norm += std::log(2 * M_PI * square);
        precision[k] = 1 / square;
      }
      f(MixtureQuery<T>{
          .b = b,
          .log_prob = *m.max_logit(0, b) + std::log(weight) - all.log_total - 0.5 * log_norm,
          .ess = weight * weight / *m.weight_square_sum(0, b),
          .square = *m.square_sum(0, b) / weight,
          .reference = m.reference(0, b),
          .score = vectors,
          .precision = precision.data(),
          .mean = m.mean < 0 ? nullptr : m.row(0, b, m.mean),
          .second = m.row(0, b, m.second),
          .along = m.projection_sum(0, b)});
    }
  });
}

}  // namespace dfk
