// log_prob [B], mean [B, d], fisher_trace [B] and ess [B] in one pass over the atoms.
#include "moments/posterior.h"

#include <tuple>

#include "host/accumulate.h"

namespace dfk {
namespace {

template <class T>
void finish(const Accumulated<T>& sums, T* log_prob, T* mean, T* fisher_trace, T* ess) {
  const Problem<T>& p = sums.problem;
  const Moments<T>& m = sums.moments;
  for_each_query(sums, 4 * p.d, [&](const FinishedQuery<T>& q) {
    for (int64_t k = 0; k < p.d; ++k) mean[q.b * p.d + k] = T(q.reference[k] + q.mean[k]);
    const double trace = PosteriorMoments<T>::covariance_trace(p, m, q.b, q.mean);
    const double weight_sum = m.weight_sum[q.b];
    log_prob[q.b] = T(log_density(sums, q.b));
    fisher_trace[q.b] = T((double(p.d) - q.ratio * trace) * q.precision);
    ess[q.b] = T(weight_sum * weight_sum / m.weight_square_sum[q.b]);
  });
  expect_representable(log_prob, p.B);
  expect_representable(fisher_trace, p.B);
  expect_representable(mean, p.B * p.d);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> posterior(Tensor x, Tensor y, Tensor alpha, Tensor sigma,
                                                     std::optional<Tensor> log_prior, double scale,
                                                     double offset, std::optional<Tensor> atoms,
                                                     std::optional<Tensor> counts) {
  const Arguments a =
      checked_clouds(x, y, std::nullopt, alpha, sigma, log_prior, scale, offset, atoms, counts);
  const int64_t B = a.x.size(0), d = a.x.size(1);
  const Tensor log_prob = new_output(a.x, {B}), mean = new_output(a.x, {B, d}),
               trace = new_output(a.x, {B}), ess = new_output(a.x, {B});
  with_dtype_of(a.x, [&]<class T>(T) {
    for_each_cloud(a, [&](int64_t cloud) {
      const int64_t b = cloud * a.B;
      finish(accumulate<T>(a, MomentKind::posterior, cloud), mutable_data<T>(log_prob) + b,
             mutable_data<T>(mean) + b * d, mutable_data<T>(trace) + b, mutable_data<T>(ess) + b);
    });
  });
  return {log_prob, mean, trace, ess};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfkernels, CPU, m) { m.impl("posterior", TORCH_BOX(&posterior)); }

}  // namespace dfk
