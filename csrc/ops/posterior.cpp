// log_prob [B], mean [B, d], fisher_trace [B], ess [B] in one pass over the atoms.
#include <algorithm>
#include <tuple>
#include <vector>

#include "host/accumulate.h"

namespace dfk {
namespace {

template <class T>
void finish(const Gathered<T>& g, T* log_prob, T* mean, T* fisher_trace, T* ess) {
  const Problem<T>& p = g.problem;
  const Moments<T>& m = g.moments;
  each(p.B, 4 * p.d, [&](int64_t b) {
    std::vector<double> shift(p.d);
    std::vector<T> ref(p.d);
    g.mean(b, shift.data(), ref.data());
    double square = 0;
    for (int64_t k = 0; k < p.d; ++k) {
      square += shift[k] * shift[k];
      mean[b * p.d + k] = T(ref[k] + shift[k]);
    }
    const Noise<T> noise(p, b);
    const double spread = std::max(m.spread[b] / m.mass[b] - square, 0.0);
    log_prob[b] = T(m.top[b] + std::log(m.mass[b]) - g.log_total +
                    0.5 * double(p.d) * std::log(noise.precision / (2 * M_PI)));
    fisher_trace[b] = T((double(p.d) - noise.ratio * spread) * noise.precision);
    ess[b] = T(m.mass[b] * m.mass[b] / m.mass2[b]);
  });
  expect_representable(log_prob, p.B);
  expect_representable(fisher_trace, p.B);
  expect_representable(mean, p.B * p.d);
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Results run(const Arguments& a) {
  const Tensor& x = a.x;
  const int64_t B = x.size(0);
  Tensor log_prob = torch::stable::new_empty(x, {B}),
         mean = torch::stable::new_empty(x, {B, x.size(1)});
  Tensor trace = torch::stable::new_empty(x, {B}), ess = torch::stable::new_empty(x, {B});
  const auto compute = [&]<class T>(T) {
    finish(gather<T>(a, Op::posterior), mutable_data<T>(log_prob), mutable_data<T>(mean),
           mutable_data<T>(trace), mutable_data<T>(ess));
  };
  if (x.scalar_type() == ScalarType::Float)
    compute(float{});
  else
    compute(double{});
  return {log_prob, mean, trace, ess};
}

Results posterior(Tensor x, Tensor y, Tensor alpha, Tensor sigma, std::optional<Tensor> log_prior,
                  double scale, double offset, std::optional<Tensor> atoms,
                  std::optional<Tensor> counts) {
  return run(check(x, y, std::nullopt, alpha, sigma, log_prior, scale, offset, atoms, counts));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfkernels, CPU, m) { m.impl("posterior", TORCH_BOX(&posterior)); }

}  // namespace dfk
