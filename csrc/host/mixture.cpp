// From the arguments of an op over a mixture's components to the merged sums of every query.
#include "host/mixture.h"

#include <algorithm>
#include <atomic>

#include "host/cut.h"

namespace dfk {
namespace {

// The median of some of the variances, evenly spaced, that are above 0; 0 if there are none.
template <class T>
double usual_variance(const T* variances, int64_t n) {
  std::vector<double> some;
  const int64_t step = std::max<int64_t>(1, n / 1024);
  for (int64_t i = 0; i < n; i += step)
    if (variances[i] > 0 && std::isfinite(variances[i])) some.push_back(variances[i]);
  if (some.empty()) return 0;
  const auto middle = some.begin() + int64_t(some.size() / 2);
  std::nth_element(some.begin(), middle, some.end());
  return *middle;
}

}  // namespace

MixtureArguments checked_mixture(Tensor x, Tensor y, Tensor variance, std::optional<Tensor> v,
                                 Tensor alpha, Tensor sigma, std::optional<Tensor> log_prior,
                                 double scale, double offset) {
  const Arguments a = checked_arguments(x, y, v, alpha, sigma, log_prior, scale, offset);
  const int64_t N = a.y.size(0), d = a.x.size(1);
  DFK_EXPECT(variance.dim() == 2 && (variance.size(0) == 1 || variance.size(0) == N) &&
                 (variance.size(1) == 1 || variance.size(1) == d),
             "variance", "shape [1 or ", N, ", 1 or ", d, "], got ", shape_text(variance));
  return {a, dense("variance", variance, a.x.scalar_type())};
}

template <class T>
MixtureAccumulated<T> accumulate_mixture(const MixtureArguments& given, MomentKind kind) {
  const Kernels<T>& kernel = kernels_for<T>();
  const CheckedProblem<T> c = problem_of<T>(given.a, kind);
  MixtureAccumulated<T> out;
  out.problem = c.problem;
  out.log_total = c.log_total;
  const Problem<T>& p = out.problem;
  const Tensor& variance = given.variance;
  out.variances = {.at = data<T>(variance),
                   .rows = variance.size(0),
                   .columns = variance.size(1),
                   .usual = usual_variance(data<T>(variance), variance.numel())};
  MixtureSums<T>& m = out.sums;
  m.B = p.B;
  m.K = p.K;
  m.stride = (p.d + kernel.lanes - 1) / kernel.lanes * kernel.lanes;
  m.rows = 1;
  m.mean = kind == MomentKind::posterior ? m.rows++ : -1;
  m.precision = out.variances.rows > 1 && out.variances.columns > 1 ? m.rows++ : -1;
  m.second = m.rows;
  m.rows += kind == MomentKind::matvec ? p.K : kind == MomentKind::diagonal;
  if (p.B == 0) return out;
  const Cut<T> work = cut(given.a, c, m.stride, m.rows - 1);
  const int64_t cells = work.most * p.B;
  out.scalars.resize(cells * (5 + p.K));
  out.rows.resize(cells * m.rows * m.stride);
  out.references.resize(cells * m.stride);
  m.scalars = out.scalars.data();
  m.rows_at = out.rows.data();
  m.references = out.references.data();
  std::atomic<int> status{
      for_each_split(work.groups, [&](const Problem<T>& problem, auto... range) {
        return kernel.accumulate_mixture(problem, out.variances, m, range...);
      })};
  DFK_EXPECT(status != non_finite_atom, "y", "finite values, got nan or inf");
  DFK_EXPECT(status != unusable_variance, "variance",
             "finite values >= 0, got nan, inf or one below 0");
  if (status == ok && work.most > 1)
    each(p.B, work.most * m.stride * m.rows, [&](int64_t b) {
      const int result = kernel.merge_mixture(p, m, work.splits[b], b);
      if (result != ok) status = result;
    });
  if (status == out_of_memory) out_of_memory_for("");
  for (int64_t b = 0; b < p.B; ++b)
    DFK_EXPECT(*m.weight_sum(0, b) > 0, "x",
               "distances to the atoms that can be represented, got an overflow at index ", b);
  return out;
}

template MixtureAccumulated<float> accumulate_mixture(const MixtureArguments&, MomentKind);
template MixtureAccumulated<double> accumulate_mixture(const MixtureArguments&, MomentKind);

}  // namespace dfk
