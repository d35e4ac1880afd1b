// The atoms that can carry weight, found from an index of codes (dfkernels/index.py) without
// reading most of y.
#include <tuple>
#include <vector>

#include "certified/cascade.h"
#include "host/accumulate.h"

namespace dfk {
namespace {

// What is found for each query: a list, or nothing where all atoms should be taken.
struct Found {
  std::vector<int64_t> atoms;
  bool sparse = false;
  double dropped = 0;
};

// Searches for queries, some at a time, that are worth it; `whose` are their places in `found`.
template <class T>
void search(const ExactLogits<T>& exact, const Costs& costs, int64_t k, std::vector<Asked> queries,
            const std::vector<int64_t>& whose, std::vector<Found>& found, Room& room) {
  Cascade<T> cascade(exact, costs, k, std::move(queries), room);
  cascade.run();
  for (int64_t i = 0; i < int64_t(whose.size()); ++i) {
    if (!cascade.sparse(i)) continue;
    Found& f = found[whose[i]];
    f.sparse = true, f.dropped = cascade.dropped(i);
    f.atoms.resize(cascade.count(i));
    cascade.write(i, f.atoms.data());
  }
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> run(const Arguments& a, const Index& index, double gap,
                                       int64_t k) {
  const Problem<T> p = problem_of<T>(a, Op::posterior).problem;
  const ExactLogits<T> exact(p, index);
  const Costs costs(p.B, p.N, p.d);
  Room& room = Room::of_this_thread();
  std::vector<Found> found(p.B);
  std::vector<Asked> waiting;  // until eight of them share a pass over the codes
  std::vector<int64_t> whose;
  const auto next = [&] {
    search(exact, costs, k, std::exchange(waiting, {}), std::exchange(whose, {}), found, room);
  };
  for (int64_t b0 = 0; b0 < p.B; b0 += block) {
    std::vector<Asked> some = asked(exact, gap, b0, std::min(b0 + block, p.B));
    for (int64_t i = 0; i < int64_t(some.size()); ++i) {
      if (!some[i].usable() || !costs.worth(some[i], k)) continue;
      waiting.push_back(std::move(some[i]));
      whose.push_back(b0 + i);
      if (int64_t(waiting.size()) == block) next();
    }
  }
  if (!waiting.empty()) next();
  room.trim();
  int64_t total = 0;
  for (const Found& f : found) total += int64_t(f.atoms.size());
  Tensor atoms = torch::stable::new_empty(a.x, {total}, ScalarType::Long);
  Tensor counts = torch::stable::new_empty(a.x, {p.B}, ScalarType::Long);
  Tensor dropped = torch::stable::new_empty(a.x, {p.B}, ScalarType::Double);
  int64_t* to = mutable_data<int64_t>(atoms);
  for (int64_t b = 0; b < p.B; ++b) {
    const Found& f = found[b];
    to = std::copy(f.atoms.begin(), f.atoms.end(), to);
    mutable_data<int64_t>(counts)[b] = f.sparse ? int64_t(f.atoms.size()) : -1;
    mutable_data<double>(dropped)[b] = f.dropped;
  }
  return {atoms, counts, dropped};
}

template <class T>
void expect_not_negative(const char* name, const T* values, int64_t n) {
  constexpr int64_t some = 1 << 16;
  std::atomic<bool> wrong{false};
  each((n + some - 1) / some, some, [&](int64_t task) {
    int bad = 0;
    for (int64_t i = task * some; i < std::min(n, (task + 1) * some); ++i)
      bad |= !(values[i] >= 0) | !(values[i] < T(INFINITY));
    if (bad) wrong = true;
  });
  for (int64_t i = 0; wrong && i < n; ++i)
    STD_TORCH_CHECK(values[i] >= 0 && values[i] < INFINITY, name,
                    ": expected finite values >= 0, got ", values[i], " at index ", i);
}

std::tuple<Tensor, Tensor, Tensor> kept_atoms(Tensor x, Tensor y, Tensor alpha, Tensor sigma,
                                              std::optional<Tensor> log_prior, double scale,
                                              double offset, Tensor centre, Tensor basis,
                                              Tensor step, Tensor first, Tensor tail, Tensor size,
                                              Tensor scales, Tensor rest, Tensor shift,
                                              Tensor facts, double gap, int64_t k) {
  const Arguments a = check(x, y, std::nullopt, alpha, sigma, log_prior, scale, offset);
  const int64_t N = y.size(0), d = y.size(1);
  constexpr ScalarType f32 = ScalarType::Float;
  STD_TORCH_CHECK(basis.dim() == 2 && basis.size(0) >= 1 && basis.size(0) <= most_axes,
                  "basis: expected 1 to ", most_axes, " axes of ", d, " numbers, got ",
                  shape_text(basis));
  STD_TORCH_CHECK(tail.dim() == 2, "tail: expected two dimensions, got ", shape_text(tail));
  const int64_t K = basis.size(0), levels = tail.size(0) > 0 ? 2 : 1;
  centre = expect("centre", centre, f32, {d});
  basis = expect("basis", basis, f32, {K, d});
  step = expect("step", step, f32, {K});
  first = expect("first", first, ScalarType::Short,
                 {(N + screen_tile - 1) / screen_tile, K, screen_tile});
  if (levels == 2) tail = expect("tail", tail, ScalarType::Char, {N, (d + 31) / 32 * 32});
  if (levels == 1) tail = expect("tail", tail, ScalarType::Char, {int64_t(0), int64_t(0)});
  size = expect("size", size, f32, {N});
  scales = expect("scales", scales, f32, {levels, N});
  rest = expect("rest", rest, f32, {levels, N});
  shift = expect("shift", shift, f32, {levels, N});
  facts = expect("facts", facts, ScalarType::Double, {5});
  expect_finite("centre", data<float>(centre), d);
  expect_finite("basis", data<float>(basis), K * d);
  expect_finite("step", data<float>(step), K);
  expect_positive("step", data<float>(step), K);
  expect_not_negative("facts", data<double>(facts), 5);
  expect_not_negative("size", data<float>(size), N);
  for (const auto& [name, t] : {std::pair{"scales", scales}, {"rest", rest}, {"shift", shift}})
    expect_not_negative(name, data<float>(t), levels * N);
  STD_TORCH_CHECK(k >= 1 && k <= N, "k: expected 1 <= k <= ", N, ", got ", k);
  STD_TORCH_CHECK(gap >= 0 && gap < INFINITY, "gap: expected a finite number >= 0, got ", gap);
  const double* f = data<double>(facts);
  STD_TORCH_CHECK(f[4] <= double(N), "facts: expected at most ", N, " atoms set apart, got ", f[4]);
  const Index index{data<float>(centre),
                    data<float>(basis),
                    data<float>(step),
                    data<int16_t>(first),
                    data<int8_t>(tail),
                    data<float>(size),
                    data<float>(scales),
                    data<float>(rest),
                    data<float>(shift),
                    f[0],
                    f[1],
                    f[2],
                    f[3],
                    int64_t(f[4]),
                    N,
                    d,
                    K,
                    levels == 2 ? tail.size(1) : 0};
  if (x.scalar_type() == ScalarType::Float) return run<float>(a, index, gap, k);
  return run<double>(a, index, gap, k);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfkernels, CPU, m) { m.impl("kept_atoms", TORCH_BOX(&kept_atoms)); }

}  // namespace dfk
