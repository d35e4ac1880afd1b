// How the work of an op over a data set is cut among threads, and how the moments of the pieces are
// merged.
#include "host/accumulate.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

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

// Queries that share the rows they read; their atoms are cut into `splits` of `span`.
template <class T>
struct QueryGroup {
  Problem<T> problem;
  int64_t b0, b1, splits, span;
  QueryGroup(const Problem<T>& p, int64_t b0, int64_t b1, int64_t most)
      : problem(p), b0(b0), b1(b1) {
    span = (p.N + most - 1) / most;
    splits = (p.N + span - 1) / span;
  }
};

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
  int64_t groups = (p.B * row * (4 + rows + p.K) + state - 1) / state;
  groups = std::max({groups, std::min(tasks, p.B / 128),
                     int64_t(1)});  // 128 queries pay for one pass over the atoms
  int64_t size = (p.B + groups - 1) / groups;
  size = std::min((size + 3) / 4 * 4, p.B);
  groups = (p.B + size - 1) / size;
  const int64_t small = most_splits(groups, p.B * row * (1 + rows));
  const int64_t enough =
      std::clamp<int64_t>((1 << 19) / (p.d + 1), 128, 256);  // rows that pay for a merge
  const int64_t splits =
      std::min({(tasks + groups - 1) / groups, small, std::max<int64_t>(p.N / enough, 1)});
  std::vector<QueryGroup<T>> out;
  for (int64_t b = 0; b < p.B; b += size) out.emplace_back(p, b, std::min(b + size, p.B), splits);
  return out;
}

// The rows that some query of a group has in its list, and which queries do.
struct ListedRows {
  std::vector<int64_t> rows;
  std::vector<uint8_t> listed_by;
};

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

// Memory for the moments of `most` splits of every query.
template <class T>
void allocate(Accumulated<T>& out, int64_t most) {
  const Problem<T>& p = out.problem;
  Moments<T>& m = out.moments;
  const int64_t cells = most * p.B;
  const size_t bytes =
      size_t(cells) * size_t(6 + p.K + (1 + m.second_rows) * m.stride) * sizeof(double);
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
  m.second_moment = m.first_moment + cells * m.stride;
}

// Lets the kernels go over all splits of all groups.
template <class T>
int sweep(const std::vector<QueryGroup<T>>& groups, const Moments<T>& m, int64_t tasks) {
  const Kernels<T>& kernel = kernels_for<T>();
  std::atomic<int> status{ok};
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    auto group = groups.begin();
    int64_t s = begin;
    for (; s >= group->splits; ++group) s -= group->splits;
    for (int64_t task = begin; task < end && status == ok; ++task, ++s) {
      if (s == group->splits) ++group, s = 0;
      const int result =
          kernel.accumulate(group->problem, m, s, group->b0, group->b1, s * group->span,
                            std::min((s + 1) * group->span, group->problem.N));
      if (result != ok) status = result;
    }
  });
  return status;
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
Accumulated<T> accumulate(const Arguments& a, MomentKind kind) {
  const Kernels<T>& kernel = kernels_for<T>();
  Accumulated<T> out;
  const CheckedProblem<T> c = problem_of<T>(a, kind);
  Problem<T>& p = out.problem;
  p = c.problem;
  out.log_total = c.log_total;
  Moments<T>& m = out.moments;
  m.stride = (p.d + kernel.lanes - 1) / kernel.lanes * kernel.lanes;
  m.second_rows = kernel.second_rows(p);
  if (p.B == 0) return out;
  std::vector<ListedRows> listed;
  std::vector<int64_t> rows, order;
  std::vector<QueryGroup<T>> groups;
  if (a.atoms) {
    listed = listed_rows(a, p);
    groups = groups_over_lists(p, listed, m.stride, m.second_rows);
  } else {
    Problem<T> all = p;
    if (c.masked) {  // whatever masked rows hold, they are not read
      rows = unmasked_rows(p, c.masked);
      all.atom_rows = rows.data(), all.N = int64_t(rows.size());
    }
    order = order_by_noise(p);
    if (!order.empty()) all.query_order = order.data();
    out.centre = centre_of(all, kernel);
    p.centre = all.centre = out.centre.empty() ? nullptr : out.centre.data();
    groups = groups_over_all_atoms(all, m.stride, m.second_rows);
  }

  int64_t most = 1, tasks = 0;
  std::vector<int64_t> splits(p.B);  // of the atoms of a query
  for (const QueryGroup<T>& some : groups) {
    for (int64_t i = some.b0; i < some.b1; ++i) splits[order.empty() ? i : order[i]] = some.splits;
    most = std::max(most, some.splits), tasks += some.splits;
  }
  allocate(out, most);
  std::atomic<int> status = sweep(groups, m, tasks);
  DFK_EXPECT(status != non_finite_atom, "y", "finite values, got nan or inf");
  if (status == ok && most > 1)
    each(p.B, most * m.stride * (1 + m.second_rows), [&](int64_t b) {
      const int result = kernel.merge(p, m, splits[b], b);
      if (result != ok) status = result;
    });
  if (status == out_of_memory) out_of_memory_for("");
  expect_complete(p, m, splits);
  return out;
}

template Accumulated<float> accumulate(const Arguments&, MomentKind);
template Accumulated<double> accumulate(const Arguments&, MomentKind);

}  // namespace dfk
