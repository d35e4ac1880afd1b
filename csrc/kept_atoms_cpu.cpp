// The atoms that can carry weight, found from an index of codes (dfkernels/index.py) without reading most of
// y.
#include <tuple>
#include <vector>

#include "cascade_cpu.h"
#include "gather_cpu.h"

namespace dfk {
namespace {

template <class T>
std::tuple<Tensor, Tensor, Tensor> run(const Arguments& a, const Index& index, double gap, int64_t k) {
  const Problem<T> p = problem_of<T>(a, Op::posterior).problem;
  const Tensor& x = a.x;
  std::vector<std::vector<int64_t>> kept(p.B);
  Tensor counts = torch::stable::new_empty(x, {p.B}, ScalarType::Long);
  Tensor dropped = torch::stable::new_empty(x, {p.B}, ScalarType::Double);
  Room& room = Room::of_this_thread();
  int64_t total = 0;
  for (int64_t b0 = 0; b0 < p.B; b0 += block) {
    const int64_t b1 = std::min(b0 + block, p.B);
    Cascade<T> cascade(p, index, gap, k, b0, b1, room);
    const bool sparse = cascade.run();
    for (int64_t b = b0; b < b1; ++b) {
      if (sparse) {
        kept[b].resize(cascade.count(b - b0));
        cascade.write(b - b0, kept[b].data());
      }
      mutable_data<int64_t>(counts)[b] = sparse ? int64_t(kept[b].size()) : -1;
      mutable_data<double>(dropped)[b] = sparse ? cascade.dropped(b - b0) : 0;
      total += int64_t(kept[b].size());
    }
  }
  room.trim();
  Tensor atoms = torch::stable::new_empty(x, {total}, ScalarType::Long);
  int64_t* to = mutable_data<int64_t>(atoms);
  for (const auto& some : kept) to = std::copy(some.begin(), some.end(), to);
  return {atoms, counts, dropped};
}

std::tuple<Tensor, Tensor, Tensor> kept_atoms(Tensor x, Tensor y, Tensor alpha, Tensor sigma,
                                              std::optional<Tensor> log_prior, double scale, double offset,
                                              Tensor centre, Tensor basis, Tensor step, Tensor first,
                                              Tensor tail, Tensor size, Tensor scales, Tensor rest,
                                              Tensor shift, Tensor facts, double gap, int64_t k) {
  const Arguments a = check(x, y, std::nullopt, alpha, sigma, log_prior, scale, offset);
  const int64_t N = y.size(0), d = y.size(1), K = basis.size(0);
  const bool has_tail = tail.size(0) > 0;
  expect_shape("centre", centre, {d});
  expect_shape("basis", basis, {K, d});
  expect_shape("step", step, {K});
  expect_shape("first", first, {(N + screen_tile - 1) / screen_tile, K, screen_tile});
  expect_shape("size", size, {N});
  expect_shape("scales", scales, {1 + has_tail, N});
  expect_shape("rest", rest, {1 + has_tail, N});
  expect_shape("shift", shift, {1 + has_tail, N});
  expect_shape("facts", facts, {3});
  if (has_tail) expect_shape("tail", tail, {N, (d + 31) / 32 * 32});
  STD_TORCH_CHECK(K <= most_axes, "basis: expected at most ", most_axes, " axes, got ", K);
  STD_TORCH_CHECK(k >= 1 && k <= N, "k: expected 1 <= k <= ", N, ", got ", k);
  const double* f = data<double>(facts);
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
                    N,
                    d,
                    K,
                    has_tail ? tail.size(1) : 0};
  if (x.scalar_type() == ScalarType::Float) return run<float>(a, index, gap, k);
  return run<double>(a, index, gap, k);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfkernels, CPU, m) { m.impl("kept_atoms", TORCH_BOX(&kept_atoms)); }

}  // namespace dfk
