// DF-EA: F v with one endpoint in place of the data set; v [B, K, d].
#include <atomic>

#include "dispatch_cpu.h"
#include "tensors_cpu.h"

namespace dfk {
namespace {

template <class T>
void run(const Tensor& v, const Tensor& x0, const Tensor& mean, const Tensor& alpha, const Tensor& sigma,
         bool centred, const Tensor& out) {
  const int64_t K = v.size(1), d = v.size(2);
  expect_finite("alpha", data<T>(alpha), alpha.numel());
  expect_finite("sigma", data<T>(sigma), sigma.numel());
  expect_positive("sigma", data<T>(sigma), sigma.numel());
  const Kernels<T>& kernel = kernels_for<T>();  // may throw, which a parallel loop would garble
  std::atomic<bool> finite{true};
  each(v.size(0) * K, 4 * d, [&](int64_t i) {
    const int64_t b = i / K;
    const double precision = 1.0 / (double(data<T>(sigma)[b]) * data<T>(sigma)[b]);
    const double ratio = double(data<T>(alpha)[b]) * data<T>(alpha)[b] * precision;
    if (!kernel.endpoint(centred, data<T>(v) + i * d, data<T>(x0) + b * d, data<T>(mean) + b * d, d, ratio,
                         precision, mutable_data<T>(out) + i * d))
      finite = false;
  });
  STD_TORCH_CHECK(finite, "v, x0, mean: expected finite values, got nan, inf or an overflow");
}

Tensor endpoint_matvec(Tensor v, Tensor x0, Tensor mean, Tensor alpha, Tensor sigma, std::string form) {
  STD_TORCH_CHECK(form == "paper" || form == "centred", "form: expected 'paper' or 'centred', got '", form,
                  "'");
  STD_TORCH_CHECK(v.dim() == 3, "v: expected shape [B, K, d], got ", shape_text(v));
  expect_shape("x0", x0, {v.size(0), v.size(2)});
  expect_shape("mean", mean, {v.size(0), v.size(2)});
  expect_shape("alpha", alpha, {v.size(0)});
  expect_shape("sigma", sigma, {v.size(0)});
  const ScalarType type = compute_type("v", v);
  v = dense("v", v, type), x0 = dense("x0", x0, type), mean = dense("mean", mean, type);
  alpha = dense("alpha", alpha, type), sigma = dense("sigma", sigma, type);
  const Tensor out = torch::stable::new_empty(v, {v.size(0), v.size(1), v.size(2)});
  if (type == ScalarType::Float)
    run<float>(v, x0, mean, alpha, sigma, form == "centred", out);
  else
    run<double>(v, x0, mean, alpha, sigma, form == "centred", out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfkernels, CPU, m) { m.impl("endpoint_matvec", TORCH_BOX(&endpoint_matvec)); }

}  // namespace dfk
