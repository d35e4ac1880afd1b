// F as a matrix, [B, d, d], symmetric to the bit.
#include <vector>

#include "host/accumulate.h"

namespace dfk {
namespace {

template <class T>
void finish(const Gathered<T>& g, T* out) {
  const Problem<T>& p = g.problem;
  const Moments<T>& m = g.moments;
  each(p.B, 4 * p.d * p.d, [&](int64_t b) {
    std::vector<double> mean(p.d);
    std::vector<T> ref(p.d);
    g.mean(b, mean.data(), ref.data());
    const Noise<T> noise(p, b);
    T* f = out + b * p.d * p.d;
    for (int64_t j = 0; j < p.d; ++j)
      for (int64_t k = 0; k <= j; ++k) {
        const double second = m.second[(b * m.rows + j) * m.stride + k] / m.mass[b];
        const double value =
            ((j == k) - noise.ratio * (second - mean[j] * mean[k])) * noise.precision;
        f[j * p.d + k] = f[k * p.d + j] = T(value);
      }
  });
  expect_representable(out, p.B * p.d * p.d);
}

Tensor run(const Arguments& a) {
  const Tensor& x = a.x;
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(1)});
  if (x.scalar_type() == ScalarType::Float)
    finish(gather<float>(a, Op::dense), mutable_data<float>(out));
  else
    finish(gather<double>(a, Op::dense), mutable_data<double>(out));
  return out;
}

Tensor fisher_dense(Tensor x, Tensor y, Tensor alpha, Tensor sigma, std::optional<Tensor> log_prior,
                    double scale, double offset, std::optional<Tensor> atoms,
                    std::optional<Tensor> counts) {
  return run(check(x, y, std::nullopt, alpha, sigma, log_prior, scale, offset, atoms, counts));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfkernels, CPU, m) { m.impl("fisher_dense", TORCH_BOX(&fisher_dense)); }

}  // namespace dfk
