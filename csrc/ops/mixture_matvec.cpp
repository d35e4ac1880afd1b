// F v of a Gaussian mixture under noise, [B, K, d].
#include "host/mixture.h"

namespace dfk {
namespace {

template <class T>
void finish(const MixtureAccumulated<T>& sums, T* out) {
  const Problem<T>& p = sums.problem;
  const int64_t d = p.d;
  for_each_query(sums, [&](const MixtureQuery<T>& q) {
    for (int64_t r = 0; r < p.K; ++r) {
      const int64_t row = (q.b * p.K + r) * d;
      const double* const second = q.second + r * sums.sums.stride;
      for (int64_t k = 0; k < d; ++k)
        out[row + k] = T(q.precision[k] * p.v[row + k] - (second[k] - q.along[r] * q.score[k]));
    }
  });
  expect_representable(out, p.B * p.K * d);
}

Tensor mixture_matvec(Tensor x, Tensor v, Tensor y, Tensor variance, Tensor alpha, Tensor sigma,
                      std::optional<Tensor> log_prior, double scale, double offset) {
  const MixtureArguments given =
      checked_mixture(x, y, variance, v, alpha, sigma, log_prior, scale, offset);
  const Tensor& vectors = *given.a.v;
  const Tensor out = new_output(vectors, {vectors.size(0), vectors.size(1), vectors.size(2)});
  with_dtype_of(out, [&]<class T>(T) {
    finish(accumulate_mixture<T>(given, MomentKind::matvec), mutable_data<T>(out));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfkernels, CPU, m) {
  m.impl("mixture_matvec", TORCH_BOX(&mixture_matvec));
}

}  // namespace dfk
