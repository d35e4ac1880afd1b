// DF-TM: the Fisher trace [B] from a trace network's output m [B].
//   residual: (d / sigma^2) (1 - m)
//   paper:    d / sigma^2 - (alpha^2 / sigma^4) (d m - |denoised|^2), alpha denoised = x - sigma
//   eps
#include "host/isa.h"
#include "host/tensors.h"

namespace dfk {
namespace {

template <class T>
void run(const Tensor& m, const Tensor& eps, const std::optional<Tensor>& x, const Tensor& alpha,
         const Tensor& sigma, const Tensor& out) {
  const int64_t B = eps.size(0), d = eps.size(1);
  expect_finite("m", data<T>(m), B);
  expect_finite("alpha", data<T>(alpha), B);
  expect_finite("sigma", data<T>(sigma), B);
  expect_positive("sigma", data<T>(sigma), B);
  const Kernels<T>& kernel = kernels_for<T>();  // may throw, which a parallel loop would garble
  each(B, x ? 2 * d : 1, [&](int64_t b) {
    const double s = data<T>(sigma)[b], a = data<T>(alpha)[b], value = data<T>(m)[b],
                 precision = 1 / (s * s);
    double inside = double(d) * (1 - value);
    if (x) {
      const double square =
          kernel.residual_square(data<T>(x) + b * d, data<T>(eps) + b * d, T(s), d);
      inside = double(d) - (a * a * double(d) * value - square) * precision;
    }
    mutable_data<T>(out)[b] = T(inside * precision);
  });
  expect_finite(x ? "m, x, eps" : "m", data<T>(out), B);  // nan, inf, or an overflow
}

Tensor matched_trace(Tensor m, Tensor eps, std::optional<Tensor> x, Tensor alpha, Tensor sigma,
                     std::string form) {
  DFK_EXPECT(form == "paper" || form == "residual", "form", "'paper' or 'residual', got '", form,
             "'");
  DFK_EXPECT((form == "paper") == x.has_value(), "x",
             "a tensor with form 'paper' and None with 'residual'");
  const ScalarType type = compute_type("eps", eps);
  expect_shape("eps", eps, {"B", "d"});
  if (x) eps = dense("eps", eps, type);  // not read otherwise
  const int64_t B = eps.size(0);
  x = expect("x", x, type, {B, eps.size(1)});
  m = expect("m", m, type, {B});
  alpha = expect("alpha", alpha, type, {B}), sigma = expect("sigma", sigma, type, {B});
  const Tensor out = new_output(m, {B});
  with_dtype_of(out, [&]<class T>(T) { run<T>(m, eps, x, alpha, sigma, out); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfkernels, CPU, m) { m.impl("matched_trace", TORCH_BOX(&matched_trace)); }

}  // namespace dfk
