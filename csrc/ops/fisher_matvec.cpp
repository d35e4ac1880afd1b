// F v and C v for K vectors per query, [B, K, d], in one pass over the atoms, or two where that is
// quicker (host/matvec_phases.h):
//   C v = sum w (y - mean) <y - mean, v>,   F v = (v - (alpha^2 / sigma^2) C v) / sigma^2.
#include "host/accumulate.h"
#include "moments/matvec.h"

namespace dfk {
namespace {

template <class T>
void finish(const Accumulated<T>& sums, bool fisher, T* out) {
  const Problem<T>& p = sums.problem;
  for_each_query(sums, 4 * p.d * (1 + p.K), [&](const FinishedQuery<T>& q) {
    for (int64_t row = q.b * p.K; row < (q.b + 1) * p.K; ++row) {
      const double projection = MatvecMoments<T>::mean_projection(sums.moments, q.b, row);
      for (int64_t j = 0; j < p.d; ++j) {
        const double c =
            MatvecMoments<T>::covariance_product(sums.moments, q.b, q.mean, row, projection, j);
        const double v = p.v[row * p.d + j];
        out[row * p.d + j] = T(fisher ? (v - q.ratio * c) * q.precision : c);
      }
    }
  });
  expect_representable(out, p.B * p.K * p.d);
}

Tensor run(const Arguments& a, bool fisher) {
  const Tensor& v = *a.v;
  const Tensor out = new_output(v, {v.size(0), v.size(1), v.size(2)});
  if (v.numel() > 0)
    with_dtype_of(v, [&]<class T>(T) {
      for_each_cloud(a, [&](int64_t cloud) {
        finish(accumulate<T>(a, MomentKind::matvec, cloud, Mean::unused), fisher,
               mutable_data<T>(out) + cloud * a.B * v.size(1) * v.size(2));
      });
    });
  return out;
}

Tensor fisher_matvec(Tensor x, Tensor y, Tensor v, Tensor alpha, Tensor sigma,
                     std::optional<Tensor> log_prior, double scale, double offset,
                     std::optional<Tensor> atoms, std::optional<Tensor> counts) {
  return run(checked_clouds(x, y, v, alpha, sigma, log_prior, scale, offset, atoms, counts), true);
}

Tensor covariance_matvec(Tensor x, Tensor y, Tensor v, Tensor alpha, Tensor sigma,
                         std::optional<Tensor> log_prior, double scale, double offset,
                         std::optional<Tensor> atoms, std::optional<Tensor> counts) {
  return run(checked_clouds(x, y, v, alpha, sigma, log_prior, scale, offset, atoms, counts), false);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfkernels, CPU, m) {
  m.impl("fisher_matvec", TORCH_BOX(&fisher_matvec));
  m.impl("covariance_matvec", TORCH_BOX(&covariance_matvec));
}

}  // namespace dfk
