// The diagonal of F, [B, d]: (1 - (alpha^2 / sigma^2) Var_w(y)) / sigma^2, elementwise.
#include <algorithm>
#include <vector>

#include "host/accumulate.h"

namespace dfk {
namespace {

template <class T>
void finish(const Gathered<T>& g, T* out) {
  const Problem<T>& p = g.problem;
  const Moments<T>& m = g.moments;
  each(p.B, 4 * p.d, [&](int64_t b) {
    std::vector<double> mean(p.d);
    std::vector<T> ref(p.d);
    g.mean(b, mean.data(), ref.data());
    const Noise<T> noise(p, b);
    for (int64_t k = 0; k < p.d; ++k) {
      const double variance = m.second[b * m.stride + k] / m.mass[b] - mean[k] * mean[k];
      out[b * p.d + k] = T((1 - noise.ratio * std::max(variance, 0.0)) * noise.precision);
    }
  });
  expect_representable(out, p.B * p.d);
}

Tensor run(const Arguments& a) {
  const Tensor& x = a.x;
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  if (x.scalar_type() == ScalarType::Float)
    finish(gather<float>(a, Op::diagonal), mutable_data<float>(out));
  else
    finish(gather<double>(a, Op::diagonal), mutable_data<double>(out));
  return out;
}

Tensor fisher_diagonal(Tensor x, Tensor y, Tensor alpha, Tensor sigma,
                       std::optional<Tensor> log_prior, double scale, double offset,
                       std::optional<Tensor> atoms, std::optional<Tensor> counts) {
  return run(check(x, y, std::nullopt, alpha, sigma, log_prior, scale, offset, atoms, counts));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfkernels, CPU, m) {
  m.impl("fisher_diagonal", TORCH_BOX(&fisher_diagonal));
}

}  // namespace dfk
