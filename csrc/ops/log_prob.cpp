// log_prob [B] alone, in one pass over the atoms without any sum of vectors.
#include "host/accumulate.h"

namespace dfk {
namespace {

template <class T>
void finish(const Accumulated<T>& sums, T* log_prob) {
  for (int64_t b = 0; b < sums.problem.B; ++b) log_prob[b] = T(log_density(sums, b));
  expect_representable(log_prob, sums.problem.B);
}

Tensor log_prob(Tensor x, Tensor y, Tensor alpha, Tensor sigma, std::optional<Tensor> log_prior,
                double scale, double offset, std::optional<Tensor> atoms,
                std::optional<Tensor> counts) {
  const Arguments a =
      checked_clouds(x, y, std::nullopt, alpha, sigma, log_prior, scale, offset, atoms, counts);
  const Tensor out = new_output(a.x, {a.x.size(0)});
  with_dtype_of(a.x, [&]<class T>(T) {
    for_each_cloud(a, [&](int64_t cloud) {
      finish(accumulate<T>(a, MomentKind::log_prob, cloud), mutable_data<T>(out) + cloud * a.B);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfkernels, CPU, m) { m.impl("log_prob", TORCH_BOX(&log_prob)); }

}  // namespace dfk
