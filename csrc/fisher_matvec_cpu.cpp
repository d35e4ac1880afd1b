// F v for K vectors per query, [B, K, d], in one pass over the atoms: F v = (v - (alpha^2 / sigma^2) C v) /
// sigma^2.
#include <vector>

#include "gather_cpu.h"

namespace dfk {
namespace {

template <class T>
void finish(const Gathered<T>& g, T* out) {
  const Problem<T>& p = g.problem;
  const Moments<T>& m = g.moments;
  each(p.B, 4 * p.d * (1 + p.K), [&](int64_t b) {
    std::vector<double> mean(p.d);
    std::vector<T> ref(p.d);
    g.mean(b, mean.data(), ref.data());
    const Noise<T> noise(p, b);
    for (int64_t k = 0; k < p.K; ++k) {
      const int64_t row = b * p.K + k;
      const double tilt = m.tilt[row] / m.mass[b];
      const double* second = m.second + row * m.stride;
      const T* v = p.v + row * p.d;
      for (int64_t j = 0; j < p.d; ++j)
        out[row * p.d + j] =
            T((v[j] - noise.ratio * (second[j] / m.mass[b] - tilt * mean[j])) * noise.precision);
    }
  });
}

Tensor fisher_matvec(Tensor x, Tensor y, Tensor v, Tensor alpha, Tensor sigma,
                     std::optional<Tensor> log_prior, double scale, double offset) {
  const Arguments a = check(x, y, v, alpha, sigma, log_prior, scale, offset);
  Tensor out = torch::stable::new_empty(v, {v.size(0), v.size(1), v.size(2)});
  if (v.numel() == 0) return out;
  if (x.scalar_type() == ScalarType::Float)
    finish(gather<float>(a, Op::matvec), mutable_data<float>(out));
  else
    finish(gather<double>(a, Op::matvec), mutable_data<double>(out));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfkernels, CPU, m) { m.impl("fisher_matvec", TORCH_BOX(&fisher_matvec)); }

}  // namespace dfk
