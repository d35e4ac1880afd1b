// log_prob [B], mean [B, d], fisher_trace [B], ess [B] and score [B, d] of a Gaussian mixture under
// noise, in one pass over the components.
#include <tuple>

#include "host/mixture.h"

namespace dfk {
namespace {

template <class T>
void finish(const MixtureAccumulated<T>& sums, T* log_prob, T* mean, T* trace, T* ess, T* score) {
  const int64_t B = sums.problem.B, d = sums.problem.d;
  for_each_query(sums, [&](const MixtureQuery<T>& q) {
    double sum = -q.square;
    for (int64_t k = 0; k < d; ++k) {
      mean[q.b * d + k] = T(q.mean[k]);
      score[q.b * d + k] = T(q.reference[k] + q.score[k]);
      sum += q.precision[k] + q.score[k] * q.score[k];
    }
    log_prob[q.b] = T(q.log_prob);
    trace[q.b] = T(sum);
    ess[q.b] = T(q.ess);
  });
  expect_representable(log_prob, B);
  expect_representable(trace, B);
  expect_representable(mean, B * d);
  expect_representable(score, B * d);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mixture_posterior(
    Tensor x, Tensor y, Tensor variance, Tensor alpha, Tensor sigma,
    std::optional<Tensor> log_prior, double scale, double offset) {
  const MixtureArguments given =
      checked_mixture(x, y, variance, std::nullopt, alpha, sigma, log_prior, scale, offset);
  const Tensor& like = given.a.x;
  const int64_t B = like.size(0), d = like.size(1);
  const Tensor log_prob = new_output(like, {B}), mean = new_output(like, {B, d}),
               trace = new_output(like, {B}), ess = new_output(like, {B}),
               score = new_output(like, {B, d});
  with_dtype_of(like, [&]<class T>(T) {
    finish(accumulate_mixture<T>(given, MomentKind::posterior), mutable_data<T>(log_prob),
           mutable_data<T>(mean), mutable_data<T>(trace), mutable_data<T>(ess),
           mutable_data<T>(score));
  });
  return {log_prob, mean, trace, ess, score};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfkernels, CPU, m) {
  m.impl("mixture_posterior", TORCH_BOX(&mixture_posterior));
}

}  // namespace dfk
