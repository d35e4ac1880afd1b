#include "host/cut.h"

#include <cmath>
#include <cstring>
#include <numeric>

#include "host/centre.h"

namespace dfk {
namespace {

// The mean of up to 64 atoms, where it is not small beside their spread, since less cancels about
// it. Otherwise nothing, so that the atoms can be read in place.
template <class T>
std::vector<T> centre_of(const Problem<T>& p, const Kernels<T>& kernel) {
  const int64_t count = std::min<int64_t>(p.N, 64);
  const auto read = [&](int64_t i, T* row) {
    const int64_t atom = i * (p.N / count);
    kernel.read_reference(p, p.atom_rows ? p.atom_rows[atom] : atom, row);
  };
  const Centre<T> centre = centre_of_rows<T>(count, p.d, largest_square<T>, 0.5, read);
  double mean_square = 0;
  for (const T m : centre.mean) mean_square += double(m) * m;
  if (!(mean_square > 0.5 * centre.square) || count < 2) return {};
  return centre.mean;
}

// The rows that are not masked, found in runs of atoms by as many threads as there are.
template <class T>
std::vector<int64_t> unmasked_rows(const Problem<T>& p, int64_t masked) {
  constexpr int64_t size = 1 << 14;
  const int64_t runs = (p.N + size - 1) / size;
  const auto counts = [&](int64_t i) { return p.log_prior[i] > -INFINITY; };
  std::vector<int64_t> first(runs + 1), rows(p.N - masked);
  torch::stable::parallel_for(0, runs, 4, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t i = r * size; i < std::min((r + 1) * size, p.N); ++i) first[r + 1] += counts(i);
  });
  for (int64_t r = 0; r < runs; ++r) first[r + 1] += first[r];
  torch::stable::parallel_for(0, runs, 4, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      int64_t to = first[r];
      for (int64_t i = r * size; i < std::min((r + 1) * size, p.N); ++i)
        if (counts(i)) rows[to++] = i;
    }
  });
  return rows;
}

// The queries by rising sigma / |alpha|, so that those which the kernels take together can skip
// much the same share of the atoms. Nothing where they are in this order already.
template <class T>
std::vector<int64_t> order_by_noise(const Problem<T>& p) {
  std::vector<int64_t> order(p.B);
  std::vector<double> noise(p.B);
  for (int64_t b = 0; b < p.B; ++b)
    order[b] = b, noise[b] = double(p.sigma[b]) / std::abs(double(p.alpha[b]));
  const auto less = [&](int64_t a, int64_t b) { return noise[a] < noise[b]; };
  if (std::is_sorted(order.begin(), order.end(), less)) return {};
  std::stable_sort(order.begin(), order.end(), less);
  return order;
}

// The most splits of a group with which partial sums stay small, or with which all groups make four
// tasks; one split of every query takes `bytes`.
int64_t most_splits(int64_t groups, int64_t bytes) {
  constexpr int64_t partials = 24 << 20;
  return std::max((4 + groups - 1) / groups, partials / (bytes + 1));
}

// How the work is cut where all queries count all atoms. That depends on the shapes alone, never on
// the number of threads, so that the results do not either.
template <class T>
std::vector<QueryGroup<T>> groups_over_all_atoms(const Problem<T>& p, int64_t stride,
                                                 int64_t rows) {
  constexpr int64_t tasks = 64, state = 8 << 20;
  const int64_t row = stride * int64_t(sizeof(double));
  int64_t groups = (p.B * stride * int64_t(sizeof(T)) * (4 + rows + p.K) + state - 1) / state;
  groups = std::max({groups, std::min(tasks, p.B / 128),
                     int64_t(1)});  // 128 queries pay for one pass over the atoms
  int64_t size = (p.B + groups - 1) / groups;
  size = std::min((size + 3) / 4 * 4, p.B);
  groups = (p.B + size - 1) / size;
  const int64_t small = most_splits(groups, p.B * row * (1 + rows));
  // Rows that pay for a merge. Many queries share them, and the merge is the dearer: then there are
  // 16 splits before any has more than 256.
  const int64_t most = p.B < 16 ? 256 : std::clamp<int64_t>(p.N / 16, 256, 1024);
  const int64_t enough = std::clamp<int64_t>((1 << 19) / (p.d + 1), 128, most);
  int64_t splits =
      std::min({(tasks + groups - 1) / groups, small, std::max<int64_t>(p.N / enough, 1)});
  const int64_t even = 4 / std::gcd(groups, int64_t(4));  // as many tasks for each thread
  if (splits > even) splits = splits / even * even;
  std::vector<QueryGroup<T>> out;
  for (int64_t b = 0; b < p.B; b += size) out.emplace_back(p, b, std::min(b + size, p.B), splits);
  return out;
}

// The lists, checked, as the union of rows of every group of queries.
template <class T>
std::vector<ListedRows> listed_rows(const Arguments& a, const Problem<T>& p) {
  const int64_t B = p.B, N = p.N;
  const int64_t *atoms = data<int64_t>(*a.atoms), *counts = data<int64_t>(*a.counts);
  const int64_t* const end = atoms + a.atoms->size(0);
  std::vector<ListedRows> out;
  std::vector<uint8_t> listed_by(size_t(N) + 8);  // read 8 at a time
  for (int64_t b0 = 0; b0 < B; b0 += query_group) {
    for (int64_t b = b0; b < std::min(b0 + query_group, B); ++b) {
      DFK_EXPECT(counts[b] >= 1 && counts[b] <= end - atoms, "counts",
                 "at least one atom per query, as many in all as atoms has, got ", counts[b],
                 " at index ", b);
      int64_t previous = -1;
      bool masked = p.log_prior;
      for (const int64_t* last = atoms + counts[b]; atoms < last; ++atoms) {
        DFK_EXPECT(*atoms > previous && *atoms < N, "atoms", "numbers of ", N,
                   " rows, each query's ascending, got ", *atoms, " after ", previous);
        previous = *atoms;
        if (p.log_prior && p.log_prior[previous] == -INFINITY) continue;  // whatever it holds
        listed_by[previous] |= uint8_t(1 << (b - b0));
        masked = false;
      }
      DFK_EXPECT(!masked, "atoms", "one with a log_prior above -inf for each query, got ",
                 counts[b], " masked at index ", b);
    }
    ListedRows& u = out.emplace_back();
    for (int64_t i = 0; i < N; i += 8) {
      uint64_t some;
      std::memcpy(&some, &listed_by[i], 8);
      if (!some) continue;
      for (int64_t j = i; j < std::min(i + 8, N); ++j)
        if (listed_by[j]) u.rows.push_back(j), u.listed_by.push_back(listed_by[j]);
      std::memset(&listed_by[i], 0, 8);
    }
  }
  DFK_EXPECT(atoms == end, "atoms", "as many as counts say, got ", end - atoms, " more");
  return out;
}

// How the work is cut where every query has a list; depends on the lists alone.
template <class T>
std::vector<QueryGroup<T>> groups_over_lists(const Problem<T>& p,
                                             const std::vector<ListedRows>& lists, int64_t stride,
                                             int64_t rows) {
  constexpr int64_t enough = 128;  // rows that pay for a merge
  const int64_t bytes = p.B * stride * (1 + rows) * int64_t(sizeof(double));
  const int64_t most = std::min<int64_t>(most_splits(int64_t(lists.size()), bytes), 32);
  std::vector<QueryGroup<T>> out;
  for (const ListedRows& u : lists) {
    Problem<T> one = p;
    one.atom_rows = u.rows.data(), one.listed_by = u.listed_by.data(),
    one.N = int64_t(u.rows.size());
    const int64_t b = int64_t(out.size()) * query_group;
    out.emplace_back(one, b, std::min(b + query_group, p.B),
                     std::clamp<int64_t>(one.N / enough, 1, most));
  }
  return out;
}

}  // namespace

template <class T>
Cut<T> cut(const Arguments& a, const CheckedProblem<T>& c, int64_t stride, int64_t rows) {
  Cut<T> out;
  Problem<T> p = c.problem;
  if (a.atoms) {
    out.listed = listed_rows(a, p);
    out.groups = groups_over_lists(p, out.listed, stride, rows);
  } else {
    if (c.masked) {  // whatever masked rows hold, they are not read
      out.rows = unmasked_rows(p, c.masked);
      p.atom_rows = out.rows.data(), p.N = int64_t(out.rows.size());
    }
    out.order = order_by_noise(p);
    if (!out.order.empty()) p.query_order = out.order.data();
    out.centre = centre_of(p, kernels_for<T>());
    if (!out.centre.empty()) p.centre = out.centre.data();
    out.groups = groups_over_all_atoms(p, stride, rows);
  }
  out.splits.resize(p.B);
  for (const QueryGroup<T>& some : out.groups) {
    for (int64_t i = some.b0; i < some.b1; ++i)
      out.splits[out.order.empty() ? i : out.order[i]] = some.splits;
    out.most = std::max(out.most, some.splits);
  }
  return out;
}

template Cut<float> cut(const Arguments&, const CheckedProblem<float>&, int64_t, int64_t);
template Cut<double> cut(const Arguments&, const CheckedProblem<double>&, int64_t, int64_t);

}  // namespace dfk
