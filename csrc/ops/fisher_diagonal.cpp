// The diagonal of F, [B, d]: (1 - (alpha^2 / sigma^2) Var_w(y)) / sigma^2, elementwise.
#include "host/accumulate.h"
#include "moments/diagonal.h"

namespace dfk {
namespace {

template <class T>
void finish(const Accumulated<T>& sums, T* out) {
  const int64_t d = sums.problem.d;
  for_each_query(sums, 4 * d, [&](const FinishedQuery<T>& q) {
    for (int64_t k = 0; k < d; ++k) {
      const double variance = DiagonalMoments<T>::variance(sums.moments, q.b, q.mean, k);
      out[q.b * d + k] = T((1 - q.ratio * variance) * q.precision);
    }
  });
  expect_representable(out, sums.problem.B * d);
}

Tensor fisher_diagonal(Tensor x, Tensor y, Tensor alpha, Tensor sigma,
                       std::optional<Tensor> log_prior, double scale, double offset,
                       std::optional<Tensor> atoms, std::optional<Tensor> counts) {
  const Arguments a =
      checked_clouds(x, y, std::nullopt, alpha, sigma, log_prior, scale, offset, atoms, counts);
  const Tensor out = new_output(a.x, {a.x.size(0), a.x.size(1)});
  with_dtype_of(a.x, [&]<class T>(T) {
    for_each_cloud(a, [&](int64_t cloud) {
      finish(accumulate<T>(a, MomentKind::diagonal, cloud),
             mutable_data<T>(out) + cloud * a.B * a.x.size(1));
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfkernels, CPU, m) {
  m.impl("fisher_diagonal", TORCH_BOX(&fisher_diagonal));
}

}  // namespace dfk
