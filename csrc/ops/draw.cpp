// One atom per query, int64 [B], drawn from its posterior: the race between blocks is part of the
// pass over the atoms, that between the atoms of one block comes after it.
#include <algorithm>
#include <atomic>

#include "host/accumulate.h"

namespace dfk {
namespace {

// Where the list of every query begins, and where the last one ends.
std::vector<int64_t> list_starts(const Arguments& a) {
  std::vector<int64_t> out{0};
  const int64_t* counts = data<int64_t>(*a.counts);
  for (int64_t b = 0; b < a.counts->size(0); ++b) out.push_back(out.back() + counts[b]);
  return out;
}

template <class T>
void finish(const Accumulated<T>& sums, const Arguments& a, int64_t* out) {
  const Problem<T>& p = sums.problem;
  const std::vector<int64_t> starts = a.atoms ? list_starts(a) : std::vector<int64_t>();
  const int64_t* const atoms = a.atoms ? data<int64_t>(*a.atoms) : nullptr;
  std::atomic<bool> complete{true};
  each(p.B, 4 * draw_block * p.d, [&](int64_t b) {
    const int64_t first = sums.moments.race[b].winner * draw_block;
    int64_t rows[draw_block], n = 0;
    const auto add = [&](int64_t row) {
      if (!p.log_prior || p.log_prior[row] > -INFINITY) rows[n++] = row;
    };
    if (atoms) {
      const int64_t *at = atoms + starts[b], *end = atoms + starts[b + 1];
      for (at = std::lower_bound(at, end, first); at < end && *at < first + draw_block; ++at)
        add(*at);
    } else {
      for (int64_t row = first; row < std::min(first + draw_block, p.N); ++row) add(row);
    }
    out[b] = kernels_for<T>().draw_atom(p, b, rows, n);
    if (out[b] < 0) complete = false;
  });
  if (!complete) out_of_memory_for("");
}

Tensor draw(Tensor x, Tensor y, Tensor alpha, Tensor sigma, std::optional<Tensor> log_prior,
            double scale, double offset, int64_t seed, Tensor queries, int64_t total,
            std::optional<Tensor> atoms, std::optional<Tensor> counts) {
  Arguments a =
      checked_clouds(x, y, std::nullopt, alpha, sigma, log_prior, scale, offset, atoms, counts);
  a.seed = seed;
  a.queries = expect("queries", queries, ScalarType::Long, {a.x.size(0)});
  const Tensor out = new_output(a.x, {a.x.size(0)}, ScalarType::Long);
  with_dtype_of(a.x, [&]<class T>(T) {
    for_each_cloud(a, [&](int64_t cloud) {
      finish(accumulate<T>(a, MomentKind::draw, cloud), a,
             mutable_data<int64_t>(out) + cloud * a.B);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfkernels, CPU, m) { m.impl("draw", TORCH_BOX(&draw)); }

}  // namespace dfk
