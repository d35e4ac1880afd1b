#include "host/matvec_phases.h"

#include <memory>
#include <new>
#include <numeric>

namespace dfk {
namespace {

// Less than this does not pay: queries of a group, for reading the atoms twice; coordinates, for
// writing and reading what is kept; atoms, for looking at some of them first.
constexpr int64_t few_queries = 32, few_coordinates = 192, few_atoms = 4096;
constexpr int64_t looked_at = 64;  // atoms
// Of weights and projections kept at a time: glibc gives larger blocks back after every call, and
// touching new pages takes longer than a product saves.
constexpr int64_t most_bytes = 31 << 20;

// Queries [b0, b1) in as few groups of about `size` as there can be, as even as blocks of eight
// allow: at least half of it, so that all tiles are packed.
std::vector<QueryGroup<float>> even_groups(const Problem<float>& p, int64_t b0, int64_t b1,
                                           int64_t size, int64_t splits) {
  std::vector<QueryGroup<float>> out;
  const int64_t n = b1 - b0, count = (n + size - 1) / size;
  const auto start = [&](int64_t i) { return i == count ? b1 : b0 + n * i / count / 8 * 8; };
  for (int64_t i = 0; i < count; ++i) out.emplace_back(p, start(i), start(i + 1), splits);
  return out;
}

// The room for what is kept of `queries` queries at a time.
struct Kept {
  std::vector<double> sums;
  std::unique_ptr<float[]> rows;
  MatvecWeights<float> at;

  Kept(const Problem<float>& p, int64_t queries, int64_t splits, int64_t span, uint8_t* unfit)
      : sums(queries * splits * (3 + p.K)),
        rows(new (std::nothrow) float[queries * splits * span * (1 + p.K)]),
        at{.rows = rows.get(),
           .sums = sums.data(),
           .unfit = unfit,
           .b0 = 0,
           .splits = splits,
           .span = span} {
    if (!rows) out_of_memory_for("the weights of some queries");
  }
};

// Marks queries as unfit by a few atoms from all over the data set, so that those in low noise cost
// next to nothing.
int look(Problem<float> p, const std::vector<QueryGroup<float>>& groups, uint8_t* unfit) {
  std::vector<int64_t> rows(looked_at);
  for (int64_t i = 0; i < looked_at; ++i) {
    const int64_t atom = i * (p.N / looked_at);
    rows[i] = p.atom_rows ? p.atom_rows[atom] : atom;
  }
  p.atom_rows = rows.data();
  p.K = 0;
  MatvecWeights<float> out{};
  out.unfit = unfit;
  std::vector<QueryGroup<float>> one;
  for (const QueryGroup<float>& group : groups) one.emplace_back(p, group.b0, group.b1, 1);
  return for_each_split(
      one, [&](const Problem<float>& some, int64_t, int64_t b0, int64_t b1, int64_t, int64_t) {
        return kernels().matvec_phases.look(some, out, b0, b1, looked_at);
      });
}

}  // namespace

int add_in_phases(Cut<float>& work, const Moments<float>& m) {
  const MatvecPhases& kernel = kernels().matvec_phases;
  const int64_t lanes = kernels_for<float>().lanes;
  Problem<float> p = work.groups[0].problem;
  const int64_t size = work.groups[0].b1, splits = work.groups[0].splits,
                span = (work.groups[0].span + lanes - 1) / lanes * lanes,
                bytes = (1 + p.K) * splits * span * int64_t(sizeof(float)),
                most = most_bytes / bytes;
  if (p.listed_by || p.d < few_coordinates || p.N < few_atoms || std::min(size, most) < few_queries)
    return ok;
  std::vector<uint8_t> unfit(p.B);
  int status = look(p, work.groups, unfit.data());
  std::vector<int64_t>& order = work.order;
  if (order.empty()) order.resize(p.B), std::iota(order.begin(), order.end(), 0);
  p.query_order = order.data();
  // What is left to the sweep in one phase goes to the front.
  const auto sort = [&] {
    return std::stable_partition(order.begin(), order.end(), [&](int64_t b) { return unfit[b]; }) -
           order.begin();
  };
  const int64_t first = sort();
  if (p.B - first < few_queries || status != ok) return status;

  // As many queries at a time as keep all threads busy: so what is kept may stay in the cache. No
  // result depends on that.
  const int64_t tasks = 4 * int64_t(torch::stable::get_num_threads()),
                busy = (tasks + splits - 1) / splits * size;
  const auto rounds = even_groups(p, first, p.B, std::min(most, busy), splits);
  int64_t largest = 0;
  for (const QueryGroup<float>& round : rounds) largest = std::max(largest, round.b1 - round.b0);
  Kept kept(p, largest, splits, span, unfit.data());
  for (const QueryGroup<float>& round : rounds) {
    kept.at.b0 = round.b0;
    const auto groups = even_groups(p, round.b0, round.b1, size, splits);
    status = for_each_split(groups, [&](const Problem<float>& some, auto... range) {
      return kernel.weigh(some, kept.at, range...);
    });
    if (status != ok) return status;
    status = for_each_split(groups, [&](const Problem<float>& some, auto... range) {
      return kernel.add(some, m, kept.at, range...);
    });
    if (status != ok) return status;
  }
  work.groups = even_groups(p, 0, int64_t(sort()), size, splits);
  return ok;
}

}  // namespace dfk
