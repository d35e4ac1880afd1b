// DDIM over the exact posterior of a few atoms, with the Jacobian A of the map from start to end,
// for B chains:
//   x <- (sigma_s / sigma_t) x + (alpha_s - alpha_t sigma_s / sigma_t) mean
//   A <- M A,  M = (sigma_s / sigma_t) I + (alpha_s - alpha_t sigma_s / sigma_t) (alpha_t /
//   sigma_t^2) C
// or, with rates r: M = (1 + r_0) I + r_1 (alpha_t / sigma_t)^2 C; transposed: A <- A + A^T (M -
// I).
#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "host/centre.h"
#include "host/isa.h"
#include "host/tensors.h"

namespace dfk {
namespace {

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
    const double covariance = (rate ? rate[1] * a : pull) * a * precision;
    steps.push_back({.alpha = T(a),
                     .half_precision = T(0.5 * precision),
                     .keep = T(keep),
                     .pull = T(pull),
                     .identity = T(identity),
                     .covariance = T(covariance)});
  }
  return steps;
}

// The atoms that a mask leaves, less the centre about which the chains run (so that an offset of
// the data costs no digits), and log_prior less its largest.
template <class T>
struct Atoms {
  std::vector<T> y, log_prior;
  std::vector<double> centre;
};
template <class T>
Atoms<T> atoms_of(const T* y, const T* log_prior, int64_t N, int64_t d) {
  Atoms<T> out;
  T max = log_prior ? -T(INFINITY) : T(0);
  for (int64_t i = 0; i < N; ++i) {
    const T l = log_prior ? log_prior[i] : T(0);
    DFK_EXPECT(l < INFINITY, "log_prior", "numbers below inf, got ", l, " at index ", i);
    if (l == -INFINITY) continue;  // whatever the row holds
    out.log_prior.push_back(l);
    out.y.insert(out.y.end(), y + i * d, y + (i + 1) * d);
    max = std::max(max, l);
  }
  DFK_EXPECT(!out.log_prior.empty(), "log_prior", "at least one atom above -inf, got all ", N,
             " masked");
  expect_finite("y", out.y.data(), int64_t(out.y.size()));
  for (T& l : out.log_prior) l -= max;
  // Where the smallest norm is far below the others there is no offset that could cost digits, and
  // any atoms will do: so it may say what is ordinary, and most atoms may be outliers.
  const auto read = [&](int64_t i, double* row) { std::copy_n(out.y.begin() + i * d, d, row); };
  out.centre =
      centre_of_rows<double>(int64_t(out.log_prior.size()), d, largest_square<double>, 0, read)
          .mean;
  for (size_t i = 0; i < out.y.size(); ++i) out.y[i] = T(double(out.y[i]) - out.centre[i % d]);
  return out;
}

// Squares of distances that T cannot represent count as infinite. That is right as long as such an
// atom weighs nothing, exp(-1000) or less, at every level.
template <class T>
void expect_weightless_outliers(const Chains<T>& c, const Levels& at) {
  constexpr double most = std::numeric_limits<T>::max();
  double alpha = 0, sigma = 0;
  for (int64_t i = 0; i <= at.M; ++i)
    alpha = std::max(alpha, std::abs(at.alpha[i])), sigma = std::max(sigma, at.sigma[i]);
  const auto largest_norm = [&](const T* rows, int64_t n) {
    double largest = 0;
    for (int64_t i = 0; i < n; ++i) {
      double square = 0;
      for (int64_t k = 0; k < c.d; ++k) square += double(rows[i * c.d + k]) * rows[i * c.d + k];
      largest = std::max(largest, square);
    }
    return std::sqrt(largest);
  };
  const double distance = largest_norm(c.x, c.B) + alpha * largest_norm(c.y, c.N);
  DFK_EXPECT(distance * distance <= most || 2000 * sigma * sigma <= most, "x, y",
             "finite values of moderate size, got an overflow of |x - alpha "
             "y|^2 at a sigma "
             "that is as large");
}

template <class T>
void run(const T* x, const T* y, const T* log_prior, const Levels& at, Chains<T> c) {
  expect_finite("x", x, c.B * c.d);
  expect_finite("alpha", at.alpha, c.M + 1);
  expect_finite("sigma", at.sigma, c.M + 1);
  expect_positive("sigma", at.sigma, c.M + 1);
  if (at.rates) expect_finite("rates", at.rates, 2 * c.M);
  const Atoms<T> atoms = atoms_of(y, log_prior, c.N, c.d);
  const std::vector<double>& centre = atoms.centre;
  for (int64_t i = 0; i < c.B * c.d; ++i) c.x[i] = T(double(x[i]) - at.alpha[0] * centre[i % c.d]);
  const std::vector<ChainStep<T>> steps = steps_of<T>(at, c.transposed);
  c.y = atoms.y.data(), c.log_prior = atoms.log_prior.data(), c.steps = steps.data();
  c.N = int64_t(atoms.log_prior.size());
  expect_weightless_outliers(c, at);

  const Kernels<T>& kernel = kernels_for<T>();
  const int64_t lanes = kernel.chain_lanes;
  std::atomic<int> status{ok};
  torch::stable::parallel_for(0, (c.B + lanes - 1) / lanes, 1, [&](int64_t begin, int64_t end) {
    const int got = kernel.transport(c, begin * lanes, std::min(end * lanes, c.B));
    if (got != ok) status = got;
  });
  if (status != ok) out_of_memory_for("");
  for (int64_t i = 0; i < c.B * c.d; ++i)
    c.x[i] = T(double(c.x[i]) + at.alpha[c.M] * centre[i % c.d]);
  expect_representable(c.x, c.B * c.d);
  expect_representable(c.jacobian, c.B * c.d * c.d);
  expect_representable(c.log_norm, c.B);
}

std::tuple<Tensor, Tensor, Tensor> transport_chain(Tensor x, Tensor y, Tensor alpha, Tensor sigma,
                                                   std::optional<Tensor> log_prior,
                                                   std::optional<Tensor> rates, bool transposed) {
  const ScalarType type = compute_type("x", x);
  x = expect("x", x, type, {"B", positive("d")});
  const int64_t B = x.size(0), d = x.size(1);
  DFK_EXPECT(d <= chain_most_d, "x", "shape [B, d] with d <= ", chain_most_d, ", got ",
             shape_text(x));
  y = expect("y", y, type, {positive("N"), d});
  alpha = expect("alpha", alpha, ScalarType::Double, {positive("M + 1")});
  const int64_t N = y.size(0), M = alpha.size(0) - 1;
  sigma = expect("sigma", sigma, ScalarType::Double, {M + 1});
  log_prior = expect("log_prior", log_prior, type, {N});
  DFK_EXPECT(rates || !transposed, "rates", "a tensor with transposed, got None");
  rates = expect("rates", rates, ScalarType::Double, {M, 2});
  const Levels at{data<double>(alpha), data<double>(sigma), data<double>(rates), M};
  const Tensor end = new_output(x, {B, d}), jacobian = new_output(x, {B, d, d}),
               log_norm = new_output(x, {B});
  with_dtype_of(x, [&]<class T>(T) {
    run<T>(data<T>(x), data<T>(y), data<T>(log_prior), at,
           {.x = mutable_data<T>(end),
            .jacobian = mutable_data<T>(jacobian),
            .log_norm = mutable_data<T>(log_norm),
            .y = nullptr,
            .log_prior = nullptr,
            .steps = nullptr,
            .B = B,
            .N = N,
            .d = d,
            .M = M,
            .transposed = transposed});
  });
  return {end, jacobian, log_norm};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfkernels, CPU, m) {
  m.impl("transport_chain", TORCH_BOX(&transport_chain));
}

}  // namespace dfk
