// From the arguments of an op over a mixture's components to the merged sums of every query.
#include "host/mixture.h"

#include <algorithm>
#include <atomic>

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

// Groups of queries that pass over a tile together, and splits of the components, by shapes alone.
struct MixtureCut {
  int64_t group, groups, splits, span;
  MixtureCut(int64_t B, int64_t N) {
    constexpr int64_t most_queries = 32, tasks = 16, least_span = 1024;
    group = std::min<int64_t>(B, most_queries);
    groups = (B + group - 1) / group;
    const int64_t most = std::clamp<int64_t>(N / least_span, 1, std::max<int64_t>(1, tasks / groups));
    span = (N + most - 1) / most;
    splits = (N + span - 1) / span;
  }
};

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
  m.stride = (p.d + kernel.lanes - 1) / kernel.lanes * kernel.lanes;
  m.rows = MixtureSums<T>::second + (kind == MomentKind::matvec ? p.K : 1);
  if (p.B == 0) return out;
  const MixtureCut cut(p.B, p.N);
  const int64_t cells = cut.splits * p.B;
  out.scalars.resize(4 * cells);
  out.rows.resize(cells * m.rows * m.stride);
  out.references.resize(cells * m.stride);
  m.scalars = out.scalars.data();
  m.rows_at = out.rows.data();
  m.references = out.references.data();
  std::atomic<int> status{ok};
  torch::stable::parallel_for(0, cut.groups * cut.splits, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end && status == ok; ++task) {
      const int64_t g = task / cut.splits, s = task % cut.splits;
      const int result = kernel.accumulate_mixture(
          p, out.variances, m, s, g * cut.group, std::min(p.B, (g + 1) * cut.group), s * cut.span,
          std::min(p.N, (s + 1) * cut.span));
      if (result != ok) status = result;
    }
  });
  DFK_EXPECT(status != non_finite_atom, "y", "finite values, got nan or inf");
  DFK_EXPECT(status != unusable_variance, "variance",
             "finite values >= 0, got nan, inf or one below 0");
  if (status == ok && cut.splits > 1)
    each(p.B, cut.splits * m.stride * m.rows, [&](int64_t b) {
      const int result = kernel.merge_mixture(p, m, cut.splits, b);
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
