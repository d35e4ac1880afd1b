// The op select_atoms: the atoms that can carry weight, found from an index of codes
// (dfkernels/certified/select_atoms.py) without reading most of y.
#include <tuple>
#include <vector>

#include "certified/search.h"
#include "host/accumulate.h"

namespace dfk {
namespace {

// What is found for a query: a list, or nothing where all atoms should be taken.
struct Selection {
  std::vector<int64_t> atoms;
  bool has_list = false;
  double dropped_weight = 0;
};

// Queries that wait for others with which they share a pass over the codes.
struct Waiting {
  std::vector<QueryBounds> queries;
  std::vector<int64_t> places;  // theirs in the batch
};

template <class T>
void search(const ExactLogits<T>& exact, const Costs& costs, int64_t k, Waiting& waiting,
            std::vector<Selection>& selections, Workspace& workspace) {
  Search<T> search(exact, costs, k, std::exchange(waiting.queries, {}), workspace);
  search.run();
  const std::vector<int64_t> places = std::exchange(waiting.places, {});
  for (int64_t i = 0; i < int64_t(places.size()); ++i) {
    if (!search.has_list(i)) continue;
    Selection& s = selections[places[i]];
    s = {.atoms = std::vector<int64_t>(search.count(i)),
         .has_list = true,
         .dropped_weight = search.dropped_weight(i)};
    search.write(i, s.atoms.data());
  }
}

std::tuple<Tensor, Tensor, Tensor> as_tensors(const Tensor& x,
                                              const std::vector<Selection>& selections) {
  const int64_t B = int64_t(selections.size());
  int64_t total = 0;
  for (const Selection& s : selections) total += int64_t(s.atoms.size());
  Tensor atoms = new_output(x, {total}, ScalarType::Long);
  Tensor counts = new_output(x, {B}, ScalarType::Long);
  Tensor dropped = new_output(x, {B}, ScalarType::Double);
  int64_t* to = mutable_data<int64_t>(atoms);
  for (int64_t b = 0; b < B; ++b) {
    const Selection& s = selections[b];
    to = std::copy(s.atoms.begin(), s.atoms.end(), to);
    mutable_data<int64_t>(counts)[b] = s.has_list ? int64_t(s.atoms.size()) : -1;
    mutable_data<double>(dropped)[b] = s.dropped_weight;
  }
  return {atoms, counts, dropped};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> run(const Arguments& a, const Index& index, double gap,
                                       int64_t k) {
  const Problem<T> p = problem_of<T>(a, MomentKind::posterior).problem;
  const ExactLogits<T> exact(p, index);
  const Costs costs(p.B, p.N, p.d);
  Workspace& workspace = Workspace::of_this_thread();
  std::vector<Selection> selections(p.B);
  Waiting waiting;
  for (int64_t b0 = 0; b0 < p.B; b0 += query_group) {
    std::vector<QueryBounds> queries =
        sampled_queries(exact, gap, b0, std::min(b0 + query_group, p.B));
    for (int64_t i = 0; i < int64_t(queries.size()); ++i) {
      if (!queries[i].usable() || !costs.worth(queries[i], k)) continue;
      waiting.queries.push_back(std::move(queries[i]));
      waiting.places.push_back(b0 + i);
      if (int64_t(waiting.places.size()) == query_group)
        search(exact, costs, k, waiting, selections, workspace);
    }
  }
  if (!waiting.places.empty()) search(exact, costs, k, waiting, selections, workspace);
  workspace.shrink();
  return as_tensors(a.x, selections);
}

template <class T>
void expect_not_negative(const char* name, const T* values, int64_t n) {
  constexpr int64_t run = 1 << 16;
  std::atomic<bool> wrong{false};
  each((n + run - 1) / run, run, [&](int64_t task) {
    int bad = 0;
    for (int64_t i = task * run; i < std::min(n, (task + 1) * run); ++i)
      bad |= !(values[i] >= 0) | !(values[i] < T(INFINITY));
    if (bad) wrong = true;
  });
  for (int64_t i = 0; wrong && i < n; ++i)
    DFK_EXPECT(values[i] >= 0 && values[i] < INFINITY, name, "finite values >= 0, got ", values[i],
               " at index ", i);
}

std::tuple<Tensor, Tensor, Tensor> select_atoms(
    Tensor x, Tensor y, Tensor alpha, Tensor sigma, std::optional<Tensor> log_prior, double scale,
    double offset, Tensor centre, Tensor basis, Tensor axis_scale, Tensor coarse_codes,
    Tensor fine_codes, Tensor atom_norm, Tensor code_scale, Tensor remainder_norm,
    Tensor axis_error, Tensor limits, double gap, int64_t k) {
  const Arguments a = checked_arguments(x, y, std::nullopt, alpha, sigma, log_prior, scale, offset);
  const int64_t N = y.size(0), d = y.size(1);
  constexpr ScalarType f32 = ScalarType::Float;
  DFK_EXPECT(basis.dim() == 2 && basis.size(0) >= 1 && basis.size(0) <= most_axes, "basis", "1 to ",
             most_axes, " axes of ", d, " numbers, got ", shape_text(basis));
  DFK_EXPECT(fine_codes.dim() == 2, "fine_codes", "two dimensions, got ", shape_text(fine_codes));
  const bool fine = fine_codes.size(0) > 0;
  const int64_t K = basis.size(0), levels = 1 + fine;
  const int64_t tiles = (N + code_tile - 1) / code_tile;
  const int64_t rows = fine ? N : 0, padded = fine ? (d + 31) / 32 * 32 : 0;
  centre = expect("centre", centre, f32, {d});
  basis = expect("basis", basis, f32, {K, d});
  axis_scale = expect("axis_scale", axis_scale, f32, {K});
  coarse_codes = expect("coarse_codes", coarse_codes, ScalarType::Short, {tiles, K, code_tile});
  fine_codes = expect("fine_codes", fine_codes, ScalarType::Char, {rows, padded});
  atom_norm = expect("atom_norm", atom_norm, f32, {N});
  code_scale = expect("code_scale", code_scale, f32, {levels, N});
  remainder_norm = expect("remainder_norm", remainder_norm, f32, {levels, N});
  axis_error = expect("axis_error", axis_error, f32, {levels, N});
  limits = expect("limits", limits, ScalarType::Double, {5});
  expect_finite("centre", data<float>(centre), d);
  expect_finite("basis", data<float>(basis), K * d);
  expect_finite("axis_scale", data<float>(axis_scale), K);
  expect_positive("axis_scale", data<float>(axis_scale), K);
  expect_not_negative("limits", data<double>(limits), 5);
  expect_not_negative("atom_norm", data<float>(atom_norm), N);
  expect_not_negative("code_scale", data<float>(code_scale), levels * N);
  expect_not_negative("remainder_norm", data<float>(remainder_norm), levels * N);
  expect_not_negative("axis_error", data<float>(axis_error), levels * N);
  const double* limit = data<double>(limits);
  DFK_EXPECT(limit[4] <= double(N), "limits", "at most ", N, " remote atoms, got ", limit[4]);
  DFK_EXPECT(k >= 1 && k <= N, "k", "1 <= k <= ", N, ", got ", k);
  DFK_EXPECT(gap >= 0 && gap < INFINITY, "gap", "a finite number >= 0, got ", gap);
  const Index index{.centre = data<float>(centre),
                    .basis = data<float>(basis),
                    .axis_scale = data<float>(axis_scale),
                    .coarse_codes = data<int16_t>(coarse_codes),
                    .fine_codes = data<int8_t>(fine_codes),
                    .atom_norm = data<float>(atom_norm),
                    .code_scale = data<float>(code_scale),
                    .remainder_norm = data<float>(remainder_norm),
                    .axis_error = data<float>(axis_error),
                    .axis_skew = limit[0],
                    .radius = limit[1],
                    .coordinate_norm = limit[2],
                    .remote_distance = limit[3],
                    .remote_count = int64_t(limit[4]),
                    .N = N,
                    .d = d,
                    .K = K,
                    .padded = padded};
  if (x.scalar_type() == ScalarType::Float) return run<float>(a, index, gap, k);
  return run<double>(a, index, gap, k);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfkernels, CPU, m) { m.impl("select_atoms", TORCH_BOX(&select_atoms)); }

}  // namespace dfk
