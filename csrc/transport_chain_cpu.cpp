// DDIM over the exact posterior of a few atoms, with the Jacobian A of the map from start to end, for B
// chains:
//   x <- (sigma_s / sigma_t) x + (alpha_s - alpha_t sigma_s / sigma_t) mean
//   A <- M A,  M = (sigma_s / sigma_t) I + (alpha_s - alpha_t sigma_s / sigma_t) (alpha_t / sigma_t^2) C
// or, with rates r: M = (1 + r_0) I + r_1 (alpha_t / sigma_t)^2 C; transposed: A <- A + A^T (M - I).
#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "dispatch_cpu.h"
#include "tensors_cpu.h"

namespace dfk {
namespace {

constexpr int64_t most_d = 16;

struct Levels {
  const double *alpha, *sigma, *rates;  // [M + 1], [M + 1], [M, 2] or null
  int64_t M;
};

template <class T>
std::vector<ChainStep<T>> steps_of(const Levels& at, bool transposed) {
  std::vector<ChainStep<T>> steps;
  for (int64_t i = 0; i < at.M; ++i) {
    const double a = at.alpha[i], precision = 1 / (at.sigma[i] * at.sigma[i]);
    const double keep = at.sigma[i + 1] / at.sigma[i], pull = at.alpha[i + 1] - a * keep;
    const double* rate = at.rates ? at.rates + 2 * i : nullptr;
    const double identity = rate ? rate[0] + (transposed ? 0 : 1) : keep;
    const double spread = (rate ? rate[1] * a : pull) * a * precision;
    steps.push_back({T(a), T(0.5 * precision), T(keep), T(pull), T(identity), T(spread)});
  }
  return steps;
}

// log_prior less its largest; and the mean of the atoms that it leaves, about which the chains run: an offset
// of the data costs no digits.
template <class T>
std::vector<T> priors(const T* log_prior, int64_t N) {
  std::vector<T> out(N);
  if (!log_prior) return out;
  const T top = *std::max_element(log_prior, log_prior + N);
  for (int64_t i = 0; i < N; ++i) {
    STD_TORCH_CHECK(log_prior[i] < INFINITY, "log_prior: expected numbers below inf, got ", log_prior[i],
                    " at index ", i);
    out[i] = log_prior[i] - top;
  }
  STD_TORCH_CHECK(top > -INFINITY, "log_prior: expected at least one atom above -inf, got all ", N,
                  " masked");
  return out;
}
template <class T>
std::vector<double> centre_of(const T* y, const std::vector<T>& log_prior, int64_t d) {
  std::vector<double> centre(d);
  int64_t count = 0;
  for (size_t i = 0; i < log_prior.size(); ++i)
    if (log_prior[i] > -INFINITY) {
      ++count;
      for (int64_t k = 0; k < d; ++k) centre[k] += double(y[int64_t(i) * d + k]);
    }
  for (double& c : centre) c /= double(count);
  return centre;
}

template <class T>
void run(const T* x, const T* y, const T* log_prior, const Levels& at, Chains<T> c) {
  expect_finite("x", x, c.B * c.d);
  expect_finite("y", y, c.N * c.d);
  expect_finite("alpha", at.alpha, c.M + 1);
  expect_finite("sigma", at.sigma, c.M + 1);
  expect_positive("sigma", at.sigma, c.M + 1);
  if (at.rates) expect_finite("rates", at.rates, 2 * c.M);
  const std::vector<T> prior = priors(log_prior, c.N);
  const std::vector<double> centre = centre_of(y, prior, c.d);
  std::vector<T> atoms(y, y + c.N * c.d);
  for (int64_t i = 0; i < c.N * c.d; ++i) atoms[i] = T(double(y[i]) - centre[i % c.d]);
  for (int64_t i = 0; i < c.B * c.d; ++i) c.x[i] = T(double(x[i]) - at.alpha[0] * centre[i % c.d]);
  const std::vector<ChainStep<T>> steps = steps_of<T>(at, c.transposed);
  c.y = atoms.data(), c.log_prior = prior.data(), c.steps = steps.data();

  const Kernels<T>& kernel = kernels_for<T>();
  const int64_t lanes = kernel.chain_lanes;
  std::atomic<int> status{ok};
  torch::stable::parallel_for(0, (c.B + lanes - 1) / lanes, 1, [&](int64_t begin, int64_t end) {
    const int got = kernel.transport(c, begin * lanes, std::min(end * lanes, c.B));
    if (got != ok) status = got;
  });
  STD_TORCH_CHECK(status == ok, "dfkernels: out of memory");
  for (int64_t i = 0; i < c.B * c.d; ++i) c.x[i] = T(double(c.x[i]) + at.alpha[c.M] * centre[i % c.d]);
  expect_representable(c.x, c.B * c.d);
  expect_representable(c.jacobian, c.B * c.d * c.d);
  expect_representable(c.log_norm, c.B);
}

std::tuple<Tensor, Tensor, Tensor> transport_chain(Tensor x, Tensor y, Tensor alpha, Tensor sigma,
                                                   std::optional<Tensor> log_prior,
                                                   std::optional<Tensor> rates, bool transposed) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) <= most_d, "x: expected shape [B, d] with d <= ", most_d,
                  ", got ", shape_text(x));
  STD_TORCH_CHECK(y.dim() == 2 && y.size(1) == x.size(1) && y.size(0) > 0, "y: expected shape [N, ",
                  x.size(1), "] with N > 0, got ", shape_text(y));
  STD_TORCH_CHECK(alpha.dim() == 1 && alpha.size(0) > 0, "alpha: expected shape [M + 1], got ",
                  shape_text(alpha));
  const int64_t B = x.size(0), N = y.size(0), d = x.size(1), M = alpha.size(0) - 1;
  expect_shape("sigma", sigma, {M + 1});
  const ScalarType type = compute_type("x", x);
  x = dense("x", x, type), y = dense("y", y, type);
  alpha = dense("alpha", alpha, ScalarType::Double), sigma = dense("sigma", sigma, ScalarType::Double);
  if (log_prior) {
    expect_shape("log_prior", *log_prior, {N});
    log_prior = dense("log_prior", *log_prior, type);
  }
  STD_TORCH_CHECK(rates || !transposed, "rates: expected a tensor with transposed, got None");
  if (rates) {
    expect_shape("rates", *rates, {M, 2});
    rates = dense("rates", *rates, ScalarType::Double);
  }
  const Levels at{data<double>(alpha), data<double>(sigma), data<double>(rates), M};
  const Tensor end = torch::stable::new_empty(x, {B, d}), jacobian = torch::stable::new_empty(x, {B, d, d}),
               log_norm = torch::stable::new_empty(x, {B});
  const auto go = [&](auto zero) {
    using T = decltype(zero);
    run<T>(data<T>(x), data<T>(y), data<T>(log_prior), at,
           {mutable_data<T>(end), mutable_data<T>(jacobian), mutable_data<T>(log_norm), nullptr, nullptr,
            nullptr, B, N, d, M, transposed});
  };
  type == ScalarType::Float ? go(0.0f) : go(0.0);
  return {end, jacobian, log_norm};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfkernels, CPU, m) { m.impl("transport_chain", TORCH_BOX(&transport_chain)); }

}  // namespace dfk
