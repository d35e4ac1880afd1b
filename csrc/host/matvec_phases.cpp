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
template <class T>
std::vector<QueryGroup<T>> even_groups(const Problem<T>& p, int64_t b0, int64_t b1, int64_t size,
                                       int64_t splits) {
  std::vector<QueryGroup<T>> out;
  const int64_t n = b1 - b0, count = (n + size - 1) / size;
  const auto start = [&](int64_t i) { return i == count ? b1 : b0 + n * i / count / 8 * 8; };
  for (int64_t i = 0; i < count; ++i) out.emplace_back(p, start(i), start(i + 1), splits);
  return out;
}

// The room for what is kept of `queries` queries at a time.
template <class T>
struct Kept {
  std::vector<double> sums;
  std::unique_ptr<T[]> rows;
  MatvecWeights<T> at;

  Kept(const Problem<T>& p, int64_t queries, int64_t splits, int64_t span, uint8_t* unfit)
      : sums(queries * splits * (3 + p.K)),
        rows(new (std::nothrow) T[queries * splits * span * (1 + p.K)]),
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
template <class T>
int look(Problem<T> p, const std::vector<QueryGroup<T>>& groups, uint8_t* unfit) {
  std::vector<int64_t> rows(looked_at);
  for (int64_t i = 0; i < looked_at; ++i) {
    const int64_t atom = i * (p.N / looked_at);
    rows[i] = p.atom_rows ? p.atom_rows[atom] : atom;
  }
  p.atom_rows = rows.data();
  p.K = 0;
  MatvecWeights<T> out{};
  out.unfit = unfit;
  std::vector<QueryGroup<T>> one;
  for (const QueryGroup<T>& group : groups) one.emplace_back(p, group.b0, group.b1, 1);
  return for_each_split(
      one, [&](const Problem<T>& some, int64_t, int64_t b0, int64_t b1, int64_t, int64_t) {
        return kernels_for<T>().look_matvec(some, out, b0, b1, looked_at);
      });
}

}  // namespace

template <class T>
int add_in_phases(Cut<T>& work, const Moments<T>& m) {
  const Kernels<T>& kernel = kernels_for<T>();
  Problem<T> p = work.groups[0].problem;
  const int64_t size = work.groups[0].b1, splits = work.groups[0].splits,
                span = (work.groups[0].span + kernel.lanes - 1) / kernel.lanes * kernel.lanes,
                bytes = (1 + p.K) * splits * span * int64_t(sizeof(T)), most = most_bytes / bytes;
  // Mean and sums have to be more precise than T, or a narrow covariance loses its digits.
  if (sizeof(T) == sizeof(double)) return ok;
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
  for (const QueryGroup<T>& round : rounds) largest = std::max(largest, round.b1 - round.b0);
  Kept<T> kept(p, largest, splits, span, unfit.data());
  for (const QueryGroup<T>& round : rounds) {
    kept.at.b0 = round.b0;
    const auto groups = even_groups(p, round.b0, round.b1, size, splits);
    status = for_each_split(groups, [&](const Problem<T>& some, auto... range) {
      return kernel.weigh_matvec(some, kept.at, range...);
    });
    if (status != ok) return status;
    status = for_each_split(groups, [&](const Problem<T>& some, auto... range) {
      return kernel.add_matvec(some, m, kept.at, range...);
    });
    if (status != ok) return status;
  }
  work.groups = even_groups(p, 0, int64_t(sort()), size, splits);
  return ok;
}

template int add_in_phases(Cut<float>&, const Moments<float>&);
template int add_in_phases(Cut<double>&, const Moments<double>&);

}  // namespace dfk
