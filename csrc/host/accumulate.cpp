// From the arguments of an op over a data set to the merged moments of every query.
#include "host/accumulate.h"

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <utility>

#include "host/cut.h"
#include "host/matvec_phases.h"

namespace dfk {
namespace {

// Memory for the moments of `most` splits of every query.
template <class T>
void allocate(Accumulated<T>& out, int64_t most) {
  const Problem<T>& p = out.problem;
  Moments<T>& m = out.moments;
  const int64_t cells = most * p.B;
  const bool races = p.kind == MomentKind::draw;
  const size_t bytes = size_t(cells) * (size_t(6 + p.K + m.rows() * m.stride) * sizeof(double) +
                                        (races ? sizeof(BlockRace) : 0));
  out.memory.reset(std::malloc(bytes));
  if (!out.memory) out_of_memory_for(std::to_string(bytes) + " bytes of partial sums");
  double* at = static_cast<double*>(out.memory.get());
  m.max_logit = at;
  m.weight_sum = at + cells;
  m.weight_square_sum = at + 2 * cells;
  m.square_moment = at + 3 * cells;
  m.outlier_logit = at + 4 * cells;
  m.reference = reinterpret_cast<int64_t*>(at + 5 * cells);
  m.projection_sum = at + 6 * cells;
  m.first_moment = m.projection_sum + cells * p.K;
  m.second_moment = m.first_moment + cells * m.first_rows * m.stride;
  double* const end = m.second_moment + cells * m.second_rows * m.stride;
  m.race = races ? reinterpret_cast<BlockRace*>(end) : nullptr;
}

// Raises unless every query has an atom at a distance that T can represent, beside which the
// outliers left out weigh nothing, not even in double, with a margin for all that is rounded.
template <class T>
void expect_complete(const Problem<T>& p, const Moments<T>& m, const std::vector<int64_t>& splits) {
  constexpr double weightless = 1000;  // exp(-1000) = 0
  for (int64_t b = 0; b < p.B; ++b) {
    DFK_EXPECT(m.weight_sum[b] > 0, "x",
               "distances to the atoms that can be represented, got an overflow at index ", b);
    for (int64_t s = 0; s < splits[b]; ++s)
      DFK_EXPECT(m.outlier_logit[s * p.B + b] < m.max_logit[b] - weightless, "y",
                 "finite values of moderate size, got an overflow of |y|^2 of an "
                 "atom that may carry weight for query ",
                 b);
  }
}

}  // namespace

template <class T>
Accumulated<T> accumulate(const Arguments& a, MomentKind kind, int64_t cloud, Mean mean) {
  const Kernels<T>& kernel = kernels_for<T>();
  Accumulated<T> out;
  const CheckedProblem<T> c = problem_of<T>(a, kind, cloud);
  Problem<T>& p = out.problem;
  p = c.problem;
  out.log_total = c.log_total;
  Moments<T>& m = out.moments;
  const auto whole_vectors = [&](int64_t n) {
    return (n + kernel.lanes - 1) / kernel.lanes * kernel.lanes;
  };
  m.width = whole_vectors(p.d);
  m.stride = p.values.at ? whole_vectors(p.values.P) : m.width;
  m.first_rows = kernel.first_rows(p);
  m.second_rows = kernel.second_rows(p);
  if (p.B == 0) return out;
  Cut<T> work = cut(a, c, std::max(m.width, m.stride), m.rows() - 1);
  out.centre = std::move(work.centre);
  if (!out.centre.empty()) p.centre = out.centre.data();
  allocate(out, work.most);
  std::atomic<int> status{ok};
  if constexpr (std::is_same_v<T, float>)
    if (kind == MomentKind::matvec && mean == Mean::unused) status = add_in_phases(work, m);
  if (status == ok)
    status = for_each_split(work.groups, [&](const Problem<T>& problem, auto... range) {
      return kernel.accumulate(problem, m, range...);
    });
  DFK_EXPECT(status != non_finite_atom, "y", "finite values, got nan or inf");
  if (status == ok && work.most > 1)
    each(p.B, work.most * m.stride * m.rows(), [&](int64_t b) {
      const int result = kernel.merge(p, m, work.splits[b], b);
      if (result != ok) status = result;
    });
  if (status == out_of_memory) out_of_memory_for("");
  expect_complete(p, m, work.splits);
  return out;
}

template Accumulated<float> accumulate(const Arguments&, MomentKind, int64_t, Mean);
template Accumulated<double> accumulate(const Arguments&, MomentKind, int64_t, Mean);

}  // namespace dfk
