#include "gather_cpu.h"

#include <algorithm>
#include <atomic>

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
    kernel.read_reference(p, i * (p.N / count), row.data());
    for (int64_t k = 0; k < p.d; ++k) mean[k] += row[k] * part;
    double sum[8] = {};  // one chain of additions would wait for itself
    for (int64_t k = 0; k < p.d; ++k) sum[k % 8] += double(row[k]) * row[k];
    for (const double s : sum) square += s / double(count);
  }
  for (const T m : mean) mean_square += double(m) * m;
  if (!(mean_square > 0.5 * square) || count < 2) mean.clear();
  return mean;
}

// How the work is cut: blocks of queries x splits of the atoms. Depends on the shapes alone, never on the
// number of threads, so that neither do the results.
struct Plan {
  int64_t block, blocks, splits, span;
  template <class T>
  Plan(const Problem<T>& p, int64_t stride, int64_t rows) {
    constexpr int64_t tasks = 64, state = 8 << 20, partials = 24 << 20;
    const int64_t row = stride * int64_t(sizeof(double));
    blocks = (p.B * row * (4 + rows + p.K) + state - 1) / state;
    blocks = std::max(
        {blocks, std::min(tasks, p.B / 128), int64_t(1)});  // 128 queries pay for one pass over the atoms
    block = (p.B + blocks - 1) / blocks;
    block = std::min((block + 3) / 4 * 4, p.B);
    blocks = (p.B + block - 1) / block;
    const int64_t least =
        std::max<int64_t>((4 + blocks - 1) / blocks, partials / (p.B * row * (1 + rows) + 1));
    const int64_t enough = std::clamp<int64_t>((1 << 19) / (p.d + 1), 128, 256);  // rows that pay for a merge
    splits = std::min({(tasks + blocks - 1) / blocks, least, std::max<int64_t>(p.N / enough, 1)});
    span = (p.N + splits - 1) / splits;
    splits = (p.N + span - 1) / span;
  }
};

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
  Problem<T>& p = out.problem;
  Checked<T> c = problem_of<T>(a, op);
  p = c.problem;
  out.log_total = c.log_total;
  // Where a mask leaves so few atoms that they pay for being copied out, theirs are the only rows read.
  if (p.log_prior && 4 * int64_t(c.unmasked.size()) <= 3 * p.N) {
    out.rows = std::move(c.unmasked);
    p.rows = out.rows.data();
    p.N = int64_t(out.rows.size());
  }

  Moments<T>& m = out.moments;
  m.stride = (p.d + kernel.lanes - 1) / kernel.lanes * kernel.lanes;
  m.rows = op == Op::posterior ? 0 : op == Op::matvec ? p.K : op == Op::diagonal ? 1 : p.d;
  if (p.B == 0) return out;
  out.centre = centre_of(p, kernel);
  p.centre = out.centre.empty() ? nullptr : out.centre.data();
  const Plan plan(p, m.stride, m.rows);
  const int64_t cells = plan.splits * p.B;
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
  torch::stable::parallel_for(0, plan.blocks * plan.splits, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end && status == ok; ++task) {
      const int64_t b = task / plan.splits * plan.block, s = task % plan.splits;
      const int got = kernel.gather(p, m, s, b, std::min(b + plan.block, p.B), s * plan.span,
                                    std::min((s + 1) * plan.span, p.N));
      if (got != ok) status = got;
    }
  });
  STD_TORCH_CHECK(status != non_finite_atom,
                  "y: expected finite values of moderate size, got nan, inf or an overflow of |y|^2");
  if (status == ok && plan.splits > 1)
    each(p.B, plan.splits * m.stride * (1 + m.rows), [&](int64_t b) {
      const int got = kernel.merge(p, m, plan.splits, b);
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
