// F as a matrix, [B, d, d], symmetric to the bit.
#include "host/accumulate.h"
#include "moments/dense.h"

namespace dfk {
namespace {

template <class T>
void finish(const Accumulated<T>& sums, T* out) {
  const int64_t d = sums.problem.d;
  for_each_query(sums, 4 * d * d, [&](const FinishedQuery<T>& q) {
    T* f = out + q.b * d * d;
    for (int64_t j = 0; j < d; ++j)
      for (int64_t k = 0; k <= j; ++k) {
        const double c = DenseMoments<T>::covariance(sums.moments, q.b, q.mean, j, k);
        f[j * d + k] = f[k * d + j] = T(((j == k) - q.ratio * c) * q.precision);
      }
  });
  expect_representable(out, sums.problem.B * d * d);
}

Tensor fisher_dense(Tensor x, Tensor y, Tensor alpha, Tensor sigma, std::optional<Tensor> log_prior,
                    double scale, double offset, std::optional<Tensor> atoms,
                    std::optional<Tensor> counts) {
  const Arguments a =
      checked_clouds(x, y, std::nullopt, alpha, sigma, log_prior, scale, offset, atoms, counts);
  const int64_t d = a.x.size(1);
  const Tensor out = new_output(a.x, {a.x.size(0), d, d});
  with_dtype_of(a.x, [&]<class T>(T) {
    for_each_cloud(a, [&](int64_t cloud) {
      finish(accumulate<T>(a, MomentKind::dense, cloud),
             mutable_data<T>(out) + cloud * a.B * d * d);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfkernels, CPU, m) { m.impl("fisher_dense", TORCH_BOX(&fisher_dense)); }

}  // namespace dfk
