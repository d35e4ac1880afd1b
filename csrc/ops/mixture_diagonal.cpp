// The diagonal of F of a Gaussian mixture under noise, [B, d].
#include "host/mixture.h"

namespace dfk {
namespace {

template <class T>
void finish(const MixtureAccumulated<T>& sums, T* out) {
  const int64_t d = sums.problem.d;
  for_each_query(sums, [&](const MixtureQuery<T>& q) {
    for (int64_t k = 0; k < d; ++k)
      out[q.b * d + k] = T(q.precision[k] - (q.second[k] - q.score[k] * q.score[k]));
  });
  expect_representable(out, sums.problem.B * d);
}

Tensor mixture_diagonal(Tensor x, Tensor y, Tensor variance, Tensor alpha, Tensor sigma,
                        std::optional<Tensor> log_prior, double scale, double offset) {
  const MixtureArguments given =
      checked_mixture(x, y, variance, std::nullopt, alpha, sigma, log_prior, scale, offset);
  const Tensor out = new_output(given.a.x, {given.a.x.size(0), given.a.x.size(1)});
  with_dtype_of(out, [&]<class T>(T) {
    finish(accumulate_mixture<T>(given, MomentKind::diagonal), mutable_data<T>(out));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfkernels, CPU, m) {
  m.impl("mixture_diagonal", TORCH_BOX(&mixture_diagonal));
}

}  // namespace dfk
