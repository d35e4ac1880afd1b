// From the arguments of an op over a data set to a Problem: what every tensor must be, and the
// values that are cheap to look at, which are all but those of y.
#include <algorithm>
#include <limits>

#include "host/accumulate.h"

namespace dfk {
namespace {

Storage storage_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Storage::f32;
    case ScalarType::Double:
      return Storage::f64;
    case ScalarType::BFloat16:
      return Storage::bf16;
    case ScalarType::Half:
      return Storage::f16;
    case ScalarType::Byte:
      return Storage::u8;
    default:
      refuse_value("y", "float32, float64, float16, bfloat16 or uint8, got ", dtype_text(type));
  }
}

template <class T>
void expect_values(const Problem<T>& p) {
  expect_number<T>("scale", p.scale);
  expect_number<T>("offset", p.offset);
  expect_finite("x", p.x, p.B * p.d);
  expect_finite("alpha", p.alpha, p.B);
  expect_finite("sigma", p.sigma, p.B);
  if (p.v) expect_finite("v", p.v, p.B * p.K * p.d);
  expect_positive("sigma", p.sigma, p.B);
}

// Looks at log_prior once, in runs that do not depend on the number of threads, and sets what c
// knows of it.
template <class T>
void sum_priors(CheckedProblem<T>& c) {
  constexpr int64_t size = 1 << 14;
  Problem<T>& p = c.problem;
  const Kernels<T>& kernel = kernels_for<T>();
  std::vector<LogPriorSum<T>> parts((p.N + size - 1) / size);
  torch::stable::parallel_for(0, int64_t(parts.size()), 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      parts[i] = kernel.log_prior_sum(p.log_prior + i * size, std::min(size, p.N - i * size));
  });
  T max = -T(INFINITY);
  for (const LogPriorSum<T>& part : parts) {
    if (!part.usable)
      for (int64_t i = (&part - parts.data()) * size; i < p.N; ++i)
        DFK_EXPECT(p.log_prior[i] < INFINITY, "log_prior", "numbers below inf, got ",
                   p.log_prior[i], " at index ", i);
    max = std::max(max, part.max);
    c.masked += part.masked;
  }
  DFK_EXPECT(max > -INFINITY, "log_prior", "at least one atom above -inf, got all ", p.N,
             " masked");
  double sum = 0;
  for (const LogPriorSum<T>& part : parts)
    if (part.sum > 0) sum += part.sum * std::exp(double(part.max) - double(max));
  p.max_log_prior = max;
  c.log_total = std::log(sum);
}

}  // namespace

Arguments checked_arguments(Tensor x, Tensor y, std::optional<Tensor> v, Tensor alpha, Tensor sigma,
                            std::optional<Tensor> log_prior, double scale, double offset,
                            std::optional<Tensor> atoms, std::optional<Tensor> counts) {
  DFK_EXPECT(atoms.has_value() == counts.has_value(), atoms ? "counts" : "atoms",
             "a tensor to go with ", atoms ? "atoms" : "counts", ", got None");
  const ScalarType type = compute_type("x", x);
  x = expect("x", x, type, {"B", positive("d")});
  const int64_t B = x.size(0), d = x.size(1);
  storage_of(y.scalar_type());  // or an error
  DFK_EXPECT(type == ScalarType::Double || y.scalar_type() != ScalarType::Double, "y",
             "float32 or narrower storage for a float32 x, got float64");
  y = expect_rows("y", y, {positive("N"), d});
  return {.x = x,
          .y = y,
          .alpha = expect("alpha", alpha, type, {B}),
          .sigma = expect("sigma", sigma, type, {B}),
          .log_prior = expect("log_prior", log_prior, type, {y.size(0)}),
          .v = expect("v", v, type, {B, "K", d}),
          .scale = scale,
          .offset = offset,
          .atoms = expect("atoms", atoms, ScalarType::Long, {"M"}),
          .counts = expect("counts", counts, ScalarType::Long, {B})};
}

template <class T>
CheckedProblem<T> problem_of(const Arguments& a, MomentKind kind) {
  CheckedProblem<T> c{.problem = {.x = data<T>(a.x),
                                  .y = a.y.const_data_ptr(),
                                  .v = data<T>(a.v),
                                  .alpha = data<T>(a.alpha),
                                  .sigma = data<T>(a.sigma),
                                  .log_prior = data<T>(a.log_prior),
                                  .centre = nullptr,
                                  .atom_rows = nullptr,
                                  .query_order = nullptr,
                                  .listed_by = nullptr,
                                  .max_log_prior = 0,
                                  .scale = a.scale,
                                  .offset = a.offset,
                                  .B = a.x.size(0),
                                  .N = a.y.size(0),
                                  .d = a.x.size(1),
                                  .K = a.v ? a.v->size(1) : 0,
                                  .row_stride = a.y.stride(0),
                                  .storage = storage_of(a.y.scalar_type()),
                                  .kind = kind},
                      .log_total = std::log(double(a.y.size(0)))};
  Problem<T>& p = c.problem;
  expect_values(p);
  if (p.log_prior) sum_priors(c);
  return c;
}

template CheckedProblem<float> problem_of(const Arguments&, MomentKind);
template CheckedProblem<double> problem_of(const Arguments&, MomentKind);

}  // namespace dfk
