// DF-EA: F v with one endpoint in place of the data set; v [B, K, d].
#include <atomic>

#include "host/isa.h"
#include "host/tensors.h"

namespace dfk {
namespace {

template <class T>
void run(const Tensor& v, const Tensor& x0, const Tensor& mean, const Tensor& alpha,
         const Tensor& sigma, bool centred, const Tensor& out) {
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
    if (!kernel.endpoint(centred, data<T>(v) + i * d, data<T>(x0) + b * d, data<T>(mean) + b * d, d,
                         ratio, precision, mutable_data<T>(out) + i * d))
      finite = false;
  });
  DFK_EXPECT(finite, "v, x0, mean", "finite values, got nan, inf or an overflow");
}

Tensor endpoint_matvec(Tensor v, Tensor x0, Tensor mean, Tensor alpha, Tensor sigma,
                       std::string form) {
  DFK_EXPECT(form == "paper" || form == "centred", "form", "'paper' or 'centred', got '", form,
             "'");
  const ScalarType type = compute_type("v", v);
  v = expect("v", v, type, {"B", "K", "d"});
  const int64_t B = v.size(0), d = v.size(2);
  x0 = expect("x0", x0, type, {B, d}), mean = expect("mean", mean, type, {B, d});
  alpha = expect("alpha", alpha, type, {B}), sigma = expect("sigma", sigma, type, {B});
  const Tensor out = new_output(v, {v.size(0), v.size(1), v.size(2)});
  with_dtype_of(out,
                [&]<class T>(T) { run<T>(v, x0, mean, alpha, sigma, form == "centred", out); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfkernels, CPU, m) {
  m.impl("endpoint_matvec", TORCH_BOX(&endpoint_matvec));
}

}  // namespace dfk
