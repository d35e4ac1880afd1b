#include "gather_cpu.h"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace dfk {
namespace {

Storage storage_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Storage::f32;
    case ScalarType::Double:
      return Storage::f64;
    case ScalarType::BFloat16:
      return Storage::bf16;
    case ScalarType::Half:
      return Storage::f16;
    case ScalarType::Byte:
      return Storage::u8;
    default:
      STD_TORCH_CHECK(false, "y: expected float32, float64, float16, bfloat16 or uint8");
  }
  return Storage::f32;
}

// Checks the numbers that are cheap to look at (all but y); sets the rest of c.
template <class T>
void check_values(Checked<T>& c) {
  Problem<T>& p = c.problem;
  expect_finite("x", p.x, p.B * p.d);
  expect_finite("alpha", p.alpha, p.B);
  expect_finite("sigma", p.sigma, p.B);
  if (p.v) expect_finite("v", p.v, p.B * p.K * p.d);
  expect_positive("sigma", p.sigma, p.B);
  c.log_total = std::log(double(p.N));
  if (!p.log_prior) return;
  T top = -T(INFINITY);
  for (int64_t i = 0; i < p.N; ++i) {
    const T l = p.log_prior[i];
    STD_TORCH_CHECK(l < INFINITY, "log_prior: expected numbers below inf, got ", l, " at index ", i);
    if (l > -INFINITY) c.unmasked.push_back(i), top = std::max(top, l);
  }
  STD_TORCH_CHECK(top > -INFINITY, "log_prior: expected at least one atom above -inf, got all ", p.N,
                  " masked");
  double mass = 0;
  for (const int64_t i : c.unmasked) mass += std::exp(double(p.log_prior[i] - top));
  p.prior_top = top;
  c.log_total = std::log(mass);
}

// The mean of up to 64 atoms, where it is not small beside their spread: about it, less cancels. Else
// nothing, and the atoms can be read in place.
template <class T>
std::vector<T> centre_of(const Problem<T>& p, const Kernels<T>& kernel) {
  const int64_t count = std::min<int64_t>(p.N, 64);
  std::vector<T> row(p.d), mean(p.d);
  const T part = T(1) / T(count);
  double square = 0, mean_square = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t atom = i * (p.N / count);
    kernel.read_reference(p, p.rows ? p.rows[atom] : atom, row.data());
    for (int64_t k = 0; k < p.d; ++k) mean[k] += row[k] * part;
    double sum[8] = {};  // one chain of additions would wait for itself
    for (int64_t k = 0; k < p.d; ++k) sum[k % 8] += double(row[k]) * row[k];
    for (const double s : sum) square += s / double(count);
  }
  for (const T m : mean) mean_square += double(m) * m;
  if (!(mean_square > 0.5 * square) || count < 2) mean.clear();
  return mean;
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

// The most splits of a block whose partial sums stay small, or that make four tasks of all blocks; one split
// of every query takes `bytes`.
int64_t most_splits(int64_t blocks, int64_t bytes) {
  constexpr int64_t partials = 24 << 20;
  return std::max((4 + blocks - 1) / blocks, partials / (bytes + 1));
}

// How the work is cut where all queries count all atoms. Depends on the shapes alone, never on the number of
// threads, so that neither do the results.
template <class T>
std::vector<Block<T>> dense_blocks(const Problem<T>& p, int64_t stride, int64_t rows) {
  constexpr int64_t tasks = 64, state = 8 << 20;
  const int64_t row = stride * int64_t(sizeof(double));
  int64_t blocks = (p.B * row * (4 + rows + p.K) + state - 1) / state;
  blocks = std::max(
      {blocks, std::min(tasks, p.B / 128), int64_t(1)});  // 128 queries pay for one pass over the atoms
  int64_t size = (p.B + blocks - 1) / blocks;
  size = std::min((size + 3) / 4 * 4, p.B);
  blocks = (p.B + size - 1) / size;
  const int64_t small = most_splits(blocks, p.B * row * (1 + rows));
  const int64_t enough = std::clamp<int64_t>((1 << 19) / (p.d + 1), 128, 256);  // rows that pay for a merge
  const int64_t splits = std::min({(tasks + blocks - 1) / blocks, small, std::max<int64_t>(p.N / enough, 1)});
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
  for (int64_t b0 = 0; b0 < B; b0 += block) {
    for (int64_t b = b0; b < std::min(b0 + block, B); ++b) {
      STD_TORCH_CHECK(counts[b] >= 1 && counts[b] <= end - atoms,
                      "counts: expected at least one atom per query, as many in all as atoms has, got ",
                      counts[b], " at index ", b);
      int64_t previous = -1;
      bool masked = p.log_prior;
      for (const int64_t* last = atoms + counts[b]; atoms < last; ++atoms) {
        STD_TORCH_CHECK(*atoms > previous && *atoms < N, "atoms: expected numbers of ", N,
                        " rows, each query's ascending, got ", *atoms, " after ", previous);
        previous = *atoms;
        wanted[*atoms] |= uint8_t(1 << (b - b0));
        masked = masked && p.log_prior[previous] == -INFINITY;
      }
      STD_TORCH_CHECK(!masked, "atoms: expected one with a log_prior above -inf for each query, got ",
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
  STD_TORCH_CHECK(atoms == end, "atoms: expected as many as counts say, got ", end - atoms, " more");
  return out;
}

template <class T>
std::vector<Block<T>> listed_blocks(const Problem<T>& p, const std::vector<Union>& unions, int64_t stride,
                                    int64_t rows) {
  constexpr int64_t enough = 128;  // rows that pay for a merge
  const int64_t bytes = p.B * stride * (1 + rows) * int64_t(sizeof(double));
  const int64_t most = std::min<int64_t>(most_splits(int64_t(unions.size()), bytes), 32);
  std::vector<Block<T>> out;
  for (const Union& u : unions) {
    Problem<T> one = p;
    one.rows = u.rows.data(), one.wanted = u.wanted.data(), one.N = int64_t(u.rows.size());
    const int64_t b = int64_t(out.size()) * block;
    out.emplace_back(one, b, std::min(b + block, p.B), std::clamp<int64_t>(one.N / enough, 1, most));
  }
  return out;
}

}  // namespace

Arguments check(Tensor x, Tensor y, std::optional<Tensor> v, Tensor alpha, Tensor sigma,
                std::optional<Tensor> log_prior, double scale, double offset) {
  STD_TORCH_CHECK(x.dim() == 2, "x: expected shape [B, d], got ", shape_text(x));
  const ScalarType type = compute_type("x", x);
  STD_TORCH_CHECK(y.is_cpu(), "y: expected a tensor on the CPU");
  STD_TORCH_CHECK(y.dim() == 2 && y.size(1) == x.size(1) && y.size(0) > 0, "y: expected shape [N, ",
                  x.size(1), "] with N > 0, got ", shape_text(y));
  STD_TORCH_CHECK(type == ScalarType::Double || y.scalar_type() != ScalarType::Double,
                  "y: expected float32 or narrower storage for a float32 x, got float64");
  expect_shape("alpha", alpha, {x.size(0)});
  expect_shape("sigma", sigma, {x.size(0)});
  if (log_prior) {
    expect_shape("log_prior", *log_prior, {y.size(0)});
    log_prior = dense("log_prior", *log_prior, type);
  }
  if (v) {
    STD_TORCH_CHECK(v->dim() == 3, "v: expected shape [B, K, d], got ", shape_text(*v));
    expect_shape("v", *v, {x.size(0), v->size(1), x.size(1)});
    v = dense("v", *v, type);
  }
  if (!(y.stride(1) == 1 || y.size(1) == 1) || y.stride(0) < 0) y = torch::stable::contiguous(y);
  return {dense("x", x, type),
          y,
          dense("alpha", alpha, type),
          dense("sigma", sigma, type),
          log_prior,
          v,
          scale,
          offset};
}

Arguments with_atoms(Arguments a, Tensor atoms, Tensor counts) {
  STD_TORCH_CHECK(atoms.dim() == 1, "atoms: expected one dimension, got ", shape_text(atoms));
  expect_shape("counts", counts, {a.x.size(0)});
  for (const auto& [name, t] : {std::pair{"atoms", atoms}, {"counts", counts}})
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long, name, ": expected int64");
  a.atoms = dense("atoms", atoms, ScalarType::Long);
  a.counts = dense("counts", counts, ScalarType::Long);
  return a;
}

template <class T>
Checked<T> problem_of(const Arguments& a, Op op) {
  Problem<T> p{data<T>(a.x),
               a.y.const_data_ptr(),
               data<T>(a.v),
               data<T>(a.alpha),
               data<T>(a.sigma),
               data<T>(a.log_prior),
               nullptr,
               nullptr,
               nullptr,
               T(0),
               a.scale,
               a.offset,
               a.x.size(0),
               a.y.size(0),
               a.x.size(1),
               a.v ? a.v->size(1) : 0,
               a.y.stride(0),
               storage_of(a.y.scalar_type()),
               op};
  Checked<T> c{p, 0, {}};
  check_values(c);
  return c;
}

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
  std::vector<Block<T>> blocks;
  if (a.atoms) {
    listed = unions(a, p);
    blocks = listed_blocks(p, listed, m.stride, m.rows);
  } else {
    Problem<T> all = p;
    // Where a mask leaves so few atoms that they pay for being copied out, theirs are the only rows read.
    if (p.log_prior && 4 * int64_t(c.unmasked.size()) <= 3 * p.N)
      all.rows = c.unmasked.data(), all.N = int64_t(c.unmasked.size());
    out.centre = centre_of(all, kernel);
    p.centre = all.centre = out.centre.empty() ? nullptr : out.centre.data();
    blocks = dense_blocks(all, m.stride, m.rows);
  }

  int64_t most = 1, tasks = 0;
  std::vector<int64_t> splits(p.B);  // of the atoms of a query
  for (const Block<T>& some : blocks) {
    std::fill(splits.begin() + some.b0, splits.begin() + some.b1, some.splits);
    most = std::max(most, some.splits), tasks += some.splits;
  }
  const int64_t cells = most * p.B;
  const size_t bytes = size_t(cells) * size_t(5 + p.K + (1 + m.rows) * m.stride) * sizeof(double);
  out.memory.reset(std::malloc(bytes));
  STD_TORCH_CHECK(out.memory != nullptr, "dfkernels: out of memory (", bytes, " bytes of partial sums)");
  double* at = static_cast<double*>(out.memory.get());
  m.top = at;
  m.mass = at + cells;
  m.mass2 = at + 2 * cells;
  m.spread = at + 3 * cells;
  m.ref = reinterpret_cast<int64_t*>(at + 4 * cells);
  m.tilt = at + 5 * cells;
  m.first = m.tilt + cells * p.K;
  m.second = m.first + cells * m.stride;

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
  STD_TORCH_CHECK(status != non_finite_atom,
                  "y: expected finite values of moderate size, got nan, inf or an overflow of |y|^2");
  STD_TORCH_CHECK(status != non_finite_distance,
                  "x, y: expected distances that can be represented, got nan, inf or an overflow");
  if (status == ok && most > 1)
    each(p.B, most * m.stride * (1 + m.rows), [&](int64_t b) {
      const int got = kernel.merge(p, m, splits[b], b);
      if (got != ok) status = got;
    });
  STD_TORCH_CHECK(status != out_of_memory, "dfkernels: out of memory");
  for (int64_t b = 0; b < p.B; ++b)
    STD_TORCH_CHECK(m.mass[b] > 0,
                    "x: expected distances to the atoms that can be represented, got an overflow at index ",
                    b);
  return out;
}

template Checked<float> problem_of(const Arguments&, Op);
template Checked<double> problem_of(const Arguments&, Op);
template Gathered<float> gather(const Arguments&, Op);
template Gathered<double> gather(const Arguments&, Op);

}  // namespace dfk
