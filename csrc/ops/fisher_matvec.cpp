// F v and C v for K vectors per query, [B, K, d], in one pass over the atoms:
//   C v = sum w (y - mean) <y - mean, v>,   F v = (v - (alpha^2 / sigma^2) C v) / sigma^2.
#include <vector>

#include "host/accumulate.h"

namespace dfk {
namespace {

// Writes f(noise, v_j, (C v)_j) for every query and vector.
template <class T, class F>
void finish(const Gathered<T>& g, T* out, const F& f) {
  const Problem<T>& p = g.problem;
  const Moments<T>& m = g.moments;
  each(p.B, 4 * p.d * (1 + p.K), [&](int64_t b) {
    std::vector<double> mean(p.d);
    std::vector<T> ref(p.d);
    g.mean(b, mean.data(), ref.data());
    const Noise<T> noise(p, b);
    for (int64_t row = b * p.K; row < (b + 1) * p.K; ++row) {
      const double tilt = m.tilt[row] / m.mass[b];
      const double* second = m.second + row * m.stride;
      for (int64_t j = 0; j < p.d; ++j)
        out[row * p.d + j] =
            T(f(noise, double(p.v[row * p.d + j]), second[j] / m.mass[b] - tilt * mean[j]));
    }
  });
  expect_representable(out, p.B * p.K * p.d);
}

template <class F>
Tensor run(const Arguments& a, const F& f) {
  const Tensor& v = *a.v;
  Tensor out = torch::stable::new_empty(v, {v.size(0), v.size(1), v.size(2)});
  if (v.numel() == 0) return out;
  if (v.scalar_type() == ScalarType::Float)
    finish(gather<float>(a, Op::matvec), mutable_data<float>(out), f);
  else
    finish(gather<double>(a, Op::matvec), mutable_data<double>(out), f);
  return out;
}

constexpr auto fisher = [](const auto& noise, double vj, double cj) {
  return (vj - noise.ratio * cj) * noise.precision;
};

Tensor fisher_matvec(Tensor x, Tensor y, Tensor v, Tensor alpha, Tensor sigma,
                     std::optional<Tensor> log_prior, double scale, double offset,
                     std::optional<Tensor> atoms, std::optional<Tensor> counts) {
  return run(check(x, y, v, alpha, sigma, log_prior, scale, offset, atoms, counts), fisher);
}

constexpr auto covariance = [](const auto&, double, double cj) { return cj; };

Tensor covariance_matvec(Tensor x, Tensor y, Tensor v, Tensor alpha, Tensor sigma,
                         std::optional<Tensor> log_prior, double scale, double offset,
                         std::optional<Tensor> atoms, std::optional<Tensor> counts) {
  return run(check(x, y, v, alpha, sigma, log_prior, scale, offset, atoms, counts), covariance);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfkernels, CPU, m) {
  m.impl("fisher_matvec", TORCH_BOX(&fisher_matvec));
  m.impl("covariance_matvec", TORCH_BOX(&covariance_matvec));
}

}  // namespace dfk
