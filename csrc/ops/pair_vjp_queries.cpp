// The gradients of reverse mode in the tensors per query, from m1 = sum c t and m2 = sum c |t|^2.
#include <tuple>

#include "host/pair.h"

namespace dfk {
namespace {

template <class T>
void finish(const PairAccumulated<T>& sums, const T* reference, T* grad_x, T* grad_alpha,
            T* grad_sigma, T* grad_v) {
  const Problem<T>& p = sums.problem;
  const int64_t d = p.d, K = p.K;
  each(p.B, 8 * d * (1 + K), [&](int64_t b) {
    const double alpha = p.alpha[b], sigma = p.sigma[b], precision = 1 / (sigma * sigma);
    const double m2 = sums.scalars(b)[1];
    const double* const m1 = sums.row(b, 0);
    double along_y = -alpha * m2, square = alpha * alpha * m2;
    for (int64_t k = 0; k < d; ++k) {
      const double r = reference[b * d + k], x = p.x[b * d + k] - alpha * r;
      grad_x[b * d + k] = T(alpha * m1[k] * precision);
      along_y += (x - alpha * r) * m1[k];
      square -= 2 * alpha * x * m1[k];
    }
    grad_alpha[b] = T(along_y * precision);
    grad_sigma[b] = T(square * precision / sigma);
    for (int64_t i = 0; i < K; ++i)
      for (int64_t k = 0; k < d; ++k) grad_v[(b * K + i) * d + k] = T(sums.row(b, 1 + i)[k]);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pair_vjp_queries(
    Tensor x, Tensor y, std::optional<Tensor> v, Tensor alpha, Tensor sigma,
    std::optional<Tensor> log_pi, double scale, double offset, Tensor shift, Tensor reference,
    std::string kind, std::optional<Tensor> h_weight, std::optional<Tensor> h_first,
    std::optional<Tensor> h_second, std::optional<Tensor> h_weight_square,
    std::optional<Tensor> atoms, std::optional<Tensor> counts) {
  PairTensors t = checked_pair(x, y, v, alpha, sigma, log_pi, scale, offset, shift, reference, kind,
                               atoms, counts);
  set_cotangents(t, h_weight, h_first, h_second, h_weight_square);
  const int64_t B = x.size(0), d = x.size(1), K = v ? v->size(1) : 0;
  const Tensor grad_x = new_output(x, {B, d}), grad_alpha = new_output(x, {B}),
               grad_sigma = new_output(x, {B}), grad_v = new_output(x, {v ? B : 0, K, d});
  with_dtype_of(x, [&]<class T>(T) {
    finish(accumulate_pairs<T>(t, false), data<T>(t.reference), mutable_data<T>(grad_x),
           mutable_data<T>(grad_alpha), mutable_data<T>(grad_sigma), mutable_data<T>(grad_v));
  });
  return {grad_x, grad_alpha, grad_sigma, grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfkernels, CPU, m) {
  m.impl("pair_vjp_queries", TORCH_BOX(&pair_vjp_queries));
}

}  // namespace dfk
