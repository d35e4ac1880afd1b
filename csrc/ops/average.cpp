// log_prob [B] and the posterior average of values [N, P] that belong to the atoms, [B, P].
#include <tuple>

#include "host/accumulate.h"

namespace dfk {
namespace {

template <class T>
void finish(const Accumulated<T>& sums, T* log_prob, T* average) {
  const Moments<T>& m = sums.moments;
  const int64_t B = sums.problem.B, P = sums.problem.values.P;
  each(B, 4 * P, [&](int64_t b) {
    log_prob[b] = T(log_density(sums, b));
    for (int64_t k = 0; k < P; ++k)
      average[b * P + k] = T(m.first_moment[b * m.stride + k] / m.weight_sum[b]);
  });
  expect_representable(log_prob, B);
  DFK_EXPECT(all_finite(average, B * P), "values",
             "finite numbers of the atoms that carry weight, got nan or inf");
}

std::tuple<Tensor, Tensor> average(Tensor x, Tensor y, Tensor values, Tensor alpha, Tensor sigma,
                                   std::optional<Tensor> log_prior, double scale, double offset,
                                   std::optional<Tensor> atoms, std::optional<Tensor> counts) {
  Arguments a =
      checked_clouds(x, y, std::nullopt, alpha, sigma, log_prior, scale, offset, atoms, counts);
  add_values(a, values);
  const int64_t B = a.x.size(0), P = values.size(values.dim() - 1);
  const Tensor log_prob = new_output(a.x, {B}), average = new_output(a.x, {B, P});
  with_dtype_of(a.x, [&]<class T>(T) {
    for_each_cloud(a, [&](int64_t cloud) {
      const int64_t b = cloud * a.B;
      finish(accumulate<T>(a, MomentKind::average, cloud), mutable_data<T>(log_prob) + b,
             mutable_data<T>(average) + b * P);
    });
  });
  return {log_prob, average};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfkernels, CPU, m) { m.impl("average", TORCH_BOX(&average)); }

}  // namespace dfk
