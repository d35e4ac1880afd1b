// From the arguments of an op over a data set to a Problem: what every tensor must be, and the
// values that are cheap to look at, which are all but those of y.
#include <algorithm>
#include <limits>

#include "host/accumulate.h"

namespace dfk {
namespace {

Storage storage_of(const char* name, ScalarType type) {
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
      refuse_value(name, "float32, float64, float16, bfloat16 or uint8, got ", dtype_text(type));
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

// In a dtype that atoms may have beside queries of `compute`.
void expect_stored(const char* name, const Tensor& t, ScalarType compute) {
  storage_of(name, t.scalar_type());  // or an error
  DFK_EXPECT(compute == ScalarType::Double || t.scalar_type() != ScalarType::Double, name,
             "float32 or narrower storage for a float32 x, got float64");
}

// How many clouds there are: one, unless y or log_prior has an axis of them.
int64_t clouds_of(const Tensor& y, const std::optional<Tensor>& log_prior) {
  if (!log_prior || log_prior->dim() < 2) return y.dim() < 3 ? 1 : y.size(0);
  DFK_EXPECT(y.dim() < 3 || y.size(0) == log_prior->size(0), "log_prior", "shape [",
             log_prior->size(1), "] or [", y.size(0), ", ", log_prior->size(1),
             "] to go with the clouds of y, got ", shape_text(*log_prior));
  return log_prior->size(0);
}

template <class T>
const T* prior_of(const Tensor& log_prior, int64_t cloud) {
  return data<T>(log_prior) + (log_prior.dim() == 2 ? cloud * log_prior.stride(0) : 0);
}

}  // namespace

Arguments checked_clouds(Tensor x, Tensor y, std::optional<Tensor> v, Tensor alpha, Tensor sigma,
                         std::optional<Tensor> log_prior, double scale, double offset,
                         std::optional<Tensor> atoms, std::optional<Tensor> counts) {
  DFK_EXPECT(atoms.has_value() == counts.has_value(), atoms ? "counts" : "atoms",
             "a tensor to go with ", atoms ? "atoms" : "counts", ", got None");
  const ScalarType type = compute_type("x", x);
  x = expect("x", x, type, {"B", positive("d")});
  const int64_t B = x.size(0), d = x.size(1);
  expect_stored("y", y, type);
  const Tensor rows = expect_clouds("y", y, {positive("N"), d});
  std::optional<Tensor> prior;
  if (log_prior) {
    prior = expect_clouds("log_prior", *log_prior, {rows.size(rows.dim() - 2)});
    expect_dtype("log_prior", *log_prior, type);
  }
  const int64_t clouds = clouds_of(y, log_prior);
  DFK_EXPECT(clouds ? B % clouds == 0 : B == 0, "x", "equally many queries for each of ", clouds,
             " clouds, got ", B);
  DFK_EXPECT(!atoms || (y.dim() == 2 && !(log_prior && log_prior->dim() == 2)), "atoms",
             "None where y or log_prior has an axis of clouds, got a tensor");
  return {.x = x,
          .y = rows,
          .alpha = expect("alpha", alpha, type, {B}),
          .sigma = expect("sigma", sigma, type, {B}),
          .log_prior = prior,
          .v = expect("v", v, type, {B, "K", d}),
          .scale = scale,
          .offset = offset,
          .atoms = expect("atoms", atoms, ScalarType::Long, {"M"}),
          .counts = expect("counts", counts, ScalarType::Long, {B}),
          .clouds = clouds,
          .B = clouds ? B / clouds : 0};
}

void add_values(Arguments& a, const Tensor& values) {
  expect_stored("values", values, a.x.scalar_type());
  const int64_t N = a.y.size(a.y.dim() - 2), B = a.x.size(0);
  a.values = expect_clouds("values", values, {N, "P"});
  if (values.dim() < 3) return;
  const int64_t clouds = values.size(0);
  DFK_EXPECT(a.clouds == clouds || a.clouds == 1, "values", "as many clouds as y has, ", a.clouds,
             ", got ", clouds);
  DFK_EXPECT(clouds ? B % clouds == 0 : B == 0, "x", "equally many queries for each of ", clouds,
             " clouds, got ", B);
  DFK_EXPECT(!a.atoms, "atoms", "None where values have an axis of clouds, got a tensor");
  a.clouds = clouds;
  a.B = clouds ? B / clouds : 0;
}

Arguments checked_arguments(Tensor x, Tensor y, std::optional<Tensor> v, Tensor alpha, Tensor sigma,
                            std::optional<Tensor> log_prior, double scale, double offset,
                            std::optional<Tensor> atoms, std::optional<Tensor> counts) {
  expect_shape("y", y, {"N", "d"});
  if (log_prior) expect_shape("log_prior", *log_prior, {y.size(0)});
  return checked_clouds(x, y, v, alpha, sigma, log_prior, scale, offset, atoms, counts);
}

template <class T>
CheckedProblem<T> problem_of(const Arguments& a, MomentKind kind, int64_t cloud) {
  const int64_t d = a.x.size(1), K = a.v ? a.v->size(1) : 0, first = cloud * a.B;
  const int64_t rows = a.y.dim() - 2, N = a.y.size(rows);  // `rows`: the axis that they have
  const int64_t y_at = rows ? cloud * a.y.stride(0) * int64_t(a.y.element_size()) : 0;
  CheckedProblem<T> c{
      .problem = {.x = data<T>(a.x) + first * d,
                  .y = static_cast<const char*>(a.y.const_data_ptr()) + y_at,
                  .v = a.v ? data<T>(*a.v) + first * K * d : nullptr,
                  .alpha = data<T>(a.alpha) + first,
                  .sigma = data<T>(a.sigma) + first,
                  .log_prior = a.log_prior ? prior_of<T>(*a.log_prior, cloud) : nullptr,
                  .centre = nullptr,
                  .atom_rows = nullptr,
                  .query_order = nullptr,
                  .listed_by = nullptr,
                  .max_log_prior = 0,
                  .scale = a.scale,
                  .offset = a.offset,
                  .B = a.B,
                  .N = N,
                  .d = d,
                  .K = K,
                  .row_stride = a.y.stride(rows),
                  .storage = storage_of("y", a.y.scalar_type()),
                  .kind = kind,
                  .queries = a.queries ? data<int64_t>(*a.queries) + first : nullptr,
                  .seed = uint64_t(a.seed)},
      .log_total = std::log(double(N))};
  Problem<T>& p = c.problem;
  if (a.values) {
    const Tensor& v = *a.values;
    const int64_t axis = v.dim() - 2;
    const int64_t at = axis ? cloud * v.stride(0) * int64_t(v.element_size()) : 0;
    p.values = {.at = static_cast<const char*>(v.const_data_ptr()) + at,
                .P = v.size(axis + 1),
                .row_stride = v.stride(axis),
                .storage = storage_of("values", v.scalar_type())};
  }
  expect_values(p);
  if (p.log_prior) sum_priors(c);
  return c;
}

template CheckedProblem<float> problem_of(const Arguments&, MomentKind, int64_t);
template CheckedProblem<double> problem_of(const Arguments&, MomentKind, int64_t);

}  // namespace dfk
