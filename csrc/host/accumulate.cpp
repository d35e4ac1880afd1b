#include "host/accumulate.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "host/centre.h"

namespace dfk {
namespace {

// The mean of up to 64 atoms, where it is not small beside their spread: about it, less cancels.
// Else nothing, and the atoms can be read in place.
template <class T>
std::vector<T> centre_of(const Problem<T>& p, const Kernels<T>& kernel) {
  const int64_t count = std::min<int64_t>(p.N, 64);
  const auto read = [&](int64_t i, T* row) {
    const int64_t atom = i * (p.N / count);
    kernel.read_reference(p, p.rows ? p.rows[atom] : atom, row);
  };
  const Middle<T> middle = middle_of<T>(count, p.d, largest_square<T>, 0.5, read);
  double mean_square = 0;
  for (const T m : middle.mean) mean_square += double(m) * m;
  if (!(mean_square > 0.5 * middle.square) || count < 2) return {};
  return middle.mean;
}

// The rows that are not masked; found in runs of atoms, by as many threads as there are.
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

// The queries by rising sigma / |alpha|: what share of the atoms they can skip is much the same in
// a group that the kernels take together. Nothing where they are in this order already.
template <class T>
std::vector<int64_t> by_noise(const Problem<T>& p) {
  std::vector<int64_t> order(p.B);
  std::vector<double> noise(p.B);
  for (int64_t b = 0; b < p.B; ++b)
    order[b] = b, noise[b] = double(p.sigma[b]) / std::abs(double(p.alpha[b]));
  const auto less = [&](int64_t a, int64_t b) { return noise[a] < noise[b]; };
  if (std::is_sorted(order.begin(), order.end(), less)) return {};
  std::stable_sort(order.begin(), order.end(), less);
  return order;
}

// A block of queries that share the rows they read; the atoms are cut into `splits` of `span`.
template <class T>
struct Block {
  Problem<T> problem;
  int64_t b0, b1, splits, span;
  Block(const Problem<T>& p, int64_t b0, int64_t b1, int64_t most) : problem(p), b0(b0), b1(b1) {
    span = (p.N + most - 1) / most;
    splits = (p.N + span - 1) / span;
  }
};

// The most splits of a block whose partial sums stay small, or that make four tasks of all blocks;
// one split of every query takes `bytes`.
int64_t most_splits(int64_t blocks, int64_t bytes) {
  constexpr int64_t partials = 24 << 20;
  return std::max((4 + blocks - 1) / blocks, partials / (bytes + 1));
}

// How the work is cut where all queries count all atoms. Depends on the shapes alone, never on the
// number of threads, so that neither do the results.
template <class T>
std::vector<Block<T>> dense_blocks(const Problem<T>& p, int64_t stride, int64_t rows) {
  constexpr int64_t tasks = 64, state = 8 << 20;
  const int64_t row = stride * int64_t(sizeof(double));
  int64_t blocks = (p.B * row * (4 + rows + p.K) + state - 1) / state;
  blocks = std::max({blocks, std::min(tasks, p.B / 128),
                     int64_t(1)});  // 128 queries pay for one pass over the atoms
  int64_t size = (p.B + blocks - 1) / blocks;
  size = std::min((size + 3) / 4 * 4, p.B);
  blocks = (p.B + size - 1) / size;
  const int64_t small = most_splits(blocks, p.B * row * (1 + rows));
  const int64_t enough =
      std::clamp<int64_t>((1 << 19) / (p.d + 1), 128, 256);  // rows that pay for a merge
  const int64_t splits =
      std::min({(tasks + blocks - 1) / blocks, small, std::max<int64_t>(p.N / enough, 1)});
  std::vector<Block<T>> out;
  for (int64_t b = 0; b < p.B; b += size) out.emplace_back(p, b, std::min(b + size, p.B), splits);
  return out;
}

// The atoms that some query of a block counts, and which queries do.
struct Union {
  std::vector<int64_t> rows;
  std::vector<uint8_t> wanted;
};

template <class T>
std::vector<Union> unions(const Arguments& a, const Problem<T>& p) {
  const int64_t B = p.B, N = p.N;
  const int64_t *atoms = data<int64_t>(*a.atoms), *counts = data<int64_t>(*a.counts);
  const int64_t* const end = atoms + a.atoms->size(0);
  std::vector<Union> out;
  std::vector<uint8_t> wanted(size_t(N) + 8);  // read 8 at a time
  for (int64_t b0 = 0; b0 < B; b0 += query_group) {
    for (int64_t b = b0; b < std::min(b0 + query_group, B); ++b) {
      STD_TORCH_CHECK(
          counts[b] >= 1 && counts[b] <= end - atoms,
          "counts: expected at least one atom per query, as many in all as atoms has, got ",
          counts[b], " at index ", b);
      int64_t previous = -1;
      bool masked = p.log_prior;
      for (const int64_t* last = atoms + counts[b]; atoms < last; ++atoms) {
        STD_TORCH_CHECK(*atoms > previous && *atoms < N, "atoms: expected numbers of ", N,
                        " rows, each query's ascending, got ", *atoms, " after ", previous);
        previous = *atoms;
        if (p.log_prior && p.log_prior[previous] == -INFINITY) continue;  // whatever it holds
        wanted[previous] |= uint8_t(1 << (b - b0));
        masked = false;
      }
      STD_TORCH_CHECK(!masked,
                      "atoms: expected one with a log_prior above -inf for each query, got ",
                      counts[b], " masked at index ", b);
    }
    Union& u = out.emplace_back();
    for (int64_t i = 0; i < N; i += 8) {
      uint64_t some;
      std::memcpy(&some, &wanted[i], 8);
      if (!some) continue;
      for (int64_t j = i; j < std::min(i + 8, N); ++j)
        if (wanted[j]) u.rows.push_back(j), u.wanted.push_back(wanted[j]);
      std::memset(&wanted[i], 0, 8);
    }
  }
  STD_TORCH_CHECK(atoms == end, "atoms: expected as many as counts say, got ", end - atoms,
                  " more");
  return out;
}

template <class T>
std::vector<Block<T>> listed_blocks(const Problem<T>& p, const std::vector<Union>& unions,
                                    int64_t stride, int64_t rows) {
  constexpr int64_t enough = 128;  // rows that pay for a merge
  const int64_t bytes = p.B * stride * (1 + rows) * int64_t(sizeof(double));
  const int64_t most = std::min<int64_t>(most_splits(int64_t(unions.size()), bytes), 32);
  std::vector<Block<T>> out;
  for (const Union& u : unions) {
    Problem<T> one = p;
    one.rows = u.rows.data(), one.wanted = u.wanted.data(), one.N = int64_t(u.rows.size());
    const int64_t b = int64_t(out.size()) * query_group;
    out.emplace_back(one, b, std::min(b + query_group, p.B),
                     std::clamp<int64_t>(one.N / enough, 1, most));
  }
  return out;
}

// Memory for the moments of `most` splits of every query.
template <class T>
void allocate(Gathered<T>& out, int64_t most) {
  const Problem<T>& p = out.problem;
  Moments<T>& m = out.moments;
  const int64_t cells = most * p.B;
  const size_t bytes = size_t(cells) * size_t(6 + p.K + (1 + m.rows) * m.stride) * sizeof(double);
  out.memory.reset(std::malloc(bytes));
  STD_TORCH_CHECK(out.memory != nullptr, "dfkernels: out of memory (", bytes,
                  " bytes of partial sums)");
  double* at = static_cast<double*>(out.memory.get());
  m.top = at;
  m.mass = at + cells;
  m.mass2 = at + 2 * cells;
  m.spread = at + 3 * cells;
  m.outlier = at + 4 * cells;
  m.ref = reinterpret_cast<int64_t*>(at + 5 * cells);
  m.tilt = at + 6 * cells;
  m.first = m.tilt + cells * p.K;
  m.second = m.first + cells * m.stride;
}

template <class T>
int sweep(const std::vector<Block<T>>& blocks, const Moments<T>& m, int64_t tasks) {
  const Kernels<T>& kernel = kernels_for<T>();
  std::atomic<int> status{ok};
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    auto of = blocks.begin();
    int64_t s = begin;
    for (; s >= of->splits; ++of) s -= of->splits;
    for (int64_t task = begin; task < end && status == ok; ++task, ++s) {
      if (s == of->splits) ++of, s = 0;
      const int got = kernel.gather(of->problem, m, s, of->b0, of->b1, s * of->span,
                                    std::min((s + 1) * of->span, of->problem.N));
      if (got != ok) status = got;
    }
  });
  return status;
}

// Every query has an atom at a distance that T can represent; and the outliers left out weigh
// nothing beside it, not even in double, with a margin for all that is rounded.
template <class T>
void expect_complete(const Problem<T>& p, const Moments<T>& m, const std::vector<int64_t>& splits) {
  constexpr double weightless = 1000;  // exp(-1000) = 0
  for (int64_t b = 0; b < p.B; ++b) {
    STD_TORCH_CHECK(
        m.mass[b] > 0,
        "x: expected distances to the atoms that can be represented, got an overflow at index ", b);
    for (int64_t s = 0; s < splits[b]; ++s)
      STD_TORCH_CHECK(m.outlier[s * p.B + b] < m.top[b] - weightless,
                      "y: expected finite values of moderate size, got an overflow of |y|^2 of an "
                      "atom that may "
                      "carry weight for query ",
                      b);
  }
}

}  // namespace

template <class T>
Gathered<T> gather(const Arguments& a, Op op) {
  const Kernels<T>& kernel = kernels_for<T>();
  Gathered<T> out;
  const Checked<T> c = problem_of<T>(a, op);
  Problem<T>& p = out.problem;
  p = c.problem;
  out.log_total = c.log_total;
  Moments<T>& m = out.moments;
  m.stride = (p.d + kernel.lanes - 1) / kernel.lanes * kernel.lanes;
  m.rows = op == Op::posterior ? 0 : op == Op::matvec ? p.K : op == Op::diagonal ? 1 : p.d;
  if (p.B == 0) return out;
  std::vector<Union> listed;
  std::vector<int64_t> rows, order;
  std::vector<Block<T>> blocks;
  if (a.atoms) {
    listed = unions(a, p);
    blocks = listed_blocks(p, listed, m.stride, m.rows);
  } else {
    Problem<T> all = p;
    if (c.masked) {  // whatever masked rows hold, they are not read
      rows = unmasked_rows(p, c.masked);
      all.rows = rows.data(), all.N = int64_t(rows.size());
    }
    order = by_noise(p);
    if (!order.empty()) all.order = order.data();
    out.centre = centre_of(all, kernel);
    p.centre = all.centre = out.centre.empty() ? nullptr : out.centre.data();
    blocks = dense_blocks(all, m.stride, m.rows);
  }

  int64_t most = 1, tasks = 0;
  std::vector<int64_t> splits(p.B);  // of the atoms of a query
  for (const Block<T>& some : blocks) {
    for (int64_t i = some.b0; i < some.b1; ++i) splits[order.empty() ? i : order[i]] = some.splits;
    most = std::max(most, some.splits), tasks += some.splits;
  }
  allocate(out, most);
  std::atomic<int> status = sweep(blocks, m, tasks);
  STD_TORCH_CHECK(status != non_finite_atom, "y: expected finite values, got nan or inf");
  if (status == ok && most > 1)
    each(p.B, most * m.stride * (1 + m.rows), [&](int64_t b) {
      const int got = kernel.merge(p, m, splits[b], b);
      if (got != ok) status = got;
    });
  STD_TORCH_CHECK(status != out_of_memory, "dfkernels: out of memory");
  expect_complete(p, m, splits);
  return out;
}

template Gathered<float> gather(const Arguments&, Op);
template Gathered<double> gather(const Arguments&, Op);

}  // namespace dfk
