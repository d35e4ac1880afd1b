#include "host/pair.h"

#include <cmath>
#include <new>
#include <utility>

#include "host/cut.h"

namespace dfk {
namespace {

MomentKind kind_named(const std::string& name) {
  for (const auto& [known, kind] :
       {std::pair("posterior", MomentKind::posterior), std::pair("matvec", MomentKind::matvec),
        std::pair("diagonal", MomentKind::diagonal)})
    if (name == known) return kind;
  refuse_value("kind", "'posterior', 'matvec' or 'diagonal', got '", name, "'");
}

// Adds the other splits of query b to the first.
template <class T>
void merge(const PairOutput<T>& m, int64_t splits, int64_t B, int64_t b) {
  const int64_t size = m.rows * m.stride;
  for (int64_t s = 1; s < splits; ++s) {
    const int64_t from = s * B + b;
    for (int64_t k = 0; k < m.scalar_count; ++k)
      m.scalars[b * m.scalar_count + k] += m.scalars[from * m.scalar_count + k];
    for (int64_t k = 0; k < size; ++k) m.vectors[b * size + k] += m.vectors[from * size + k];
  }
}

}  // namespace

PairTensors checked_pair(Tensor x, Tensor y, std::optional<Tensor> v, Tensor alpha, Tensor sigma,
                         std::optional<Tensor> log_pi, double scale, double offset, Tensor shift,
                         Tensor reference, const std::string& kind, std::optional<Tensor> atoms,
                         std::optional<Tensor> counts) {
  const MomentKind known = kind_named(kind);
  DFK_EXPECT((known == MomentKind::matvec) == v.has_value(), "v",
             "a tensor with kind 'matvec' and None with another");
  const Arguments a =
      checked_arguments(x, y, v, alpha, sigma, log_pi, scale, offset, atoms, counts);
  const int64_t B = a.x.size(0), d = a.x.size(1);
  return {.inputs = a,
          .shift = expect("shift", shift, ScalarType::Double, {B}),
          .reference = expect("reference", reference, a.x.scalar_type(), {B, d}),
          .kind = known};
}

void set_cotangents(PairTensors& to, std::optional<Tensor> h_weight, std::optional<Tensor> h_first,
                    std::optional<Tensor> h_second, std::optional<Tensor> h_weight_square) {
  const Arguments& a = to.inputs;
  const ScalarType type = a.x.scalar_type();
  const int64_t B = a.x.size(0), d = a.x.size(1);
  to.h_weight = expect("h_weight", h_weight, type, {B});
  to.h_first = expect("h_first", h_first, type, {B, d});
  if (to.kind == MomentKind::posterior)
    to.h_second = expect("h_second", h_second, type, {B});
  else if (to.kind == MomentKind::matvec)
    to.h_second = expect("h_second", h_second, type, {B, a.v->size(1), d});
  else
    to.h_second = expect("h_second", h_second, type, {B, d});
  DFK_EXPECT(!h_weight_square || to.kind == MomentKind::posterior, "h_weight_square",
             "None but with kind 'posterior'");
  to.h_weight_square = expect("h_weight_square", h_weight_square, type, {B});
}

void set_tangents(PairTensors& to, std::optional<Tensor> dx, std::optional<Tensor> dy,
                  std::optional<Tensor> dv, std::optional<Tensor> dalpha,
                  std::optional<Tensor> dsigma, std::optional<Tensor> dlog_pi) {
  const Arguments& a = to.inputs;
  const ScalarType type = a.x.scalar_type();
  const int64_t B = a.x.size(0), N = a.y.size(0), d = a.x.size(1);
  DFK_EXPECT(!dv || a.v, "dv", "None without v");
  to.dx = expect("dx", dx, type, {B, d});
  if (dy) {
    expect_dtype("dy", *dy, type);
    to.dy = expect_rows("dy", *dy, {N, d});
  }
  if (dv) to.dv = expect("dv", dv, type, {B, a.v->size(1), d});
  to.dalpha = expect("dalpha", dalpha, type, {B});
  to.dsigma = expect("dsigma", dsigma, type, {B});
  to.dlog_pi = expect("dlog_pi", dlog_pi, type, {N});
}

template <class T>
PairArguments<T> pair_arguments(const PairTensors& t, bool forward, double max_log_prior,
                                std::vector<double>& shift) {
  const int64_t B = t.shift.size(0);
  expect_finite("shift", data<double>(t.shift), B);
  expect_finite("reference", data<T>(t.reference), t.reference.numel());
  shift.assign(data<double>(t.shift), data<double>(t.shift) + B);
  // The kernels' priors are less the largest.
  for (double& s : shift) s -= t.inputs.log_prior ? max_log_prior : -std::log(t.inputs.y.size(0));
  return {.shift = shift.data(),
          .reference = data<T>(t.reference),
          .forward = forward,
          .h_weight = data<T>(t.h_weight),
          .h_first = data<T>(t.h_first),
          .h_second = data<T>(t.h_second),
          .h_weight_square = data<T>(t.h_weight_square),
          .dx = data<T>(t.dx),
          .dv = data<T>(t.dv),
          .dalpha = data<T>(t.dalpha),
          .dsigma = data<T>(t.dsigma),
          .dlog_pi = data<T>(t.dlog_pi),
          .dy = data<T>(t.dy),
          .dy_stride = t.dy ? t.dy->stride(0) : 0};
}
template PairArguments<float> pair_arguments(const PairTensors&, bool, double,
                                             std::vector<double>&);
template PairArguments<double> pair_arguments(const PairTensors&, bool, double,
                                              std::vector<double>&);

template <class T>
PairAccumulated<T> accumulate_pairs(const PairTensors& t, bool forward) {
  const Kernels<T>& kernel = kernels_for<T>();
  const CheckedProblem<T> c = problem_of<T>(t.inputs, t.kind);
  PairAccumulated<T> out;
  const Problem<T>& p = out.problem = c.problem;
  PairOutput<T>& m = out.sums;
  m.stride = (p.d + kernel.lanes - 1) / kernel.lanes * kernel.lanes;
  m.rows = 1 + (p.kind == MomentKind::matvec     ? p.K
                : p.kind == MomentKind::diagonal ? int64_t(forward)
                                                 : 0);
  m.scalar_count = 3 + p.K;
  if (p.B == 0) return out;
  std::vector<double> shift;
  const PairArguments<T> pairs = pair_arguments<T>(t, forward, p.max_log_prior, shift);
  const Cut<T> work = cut(t.inputs, c, m.stride, m.rows - 1);
  const int64_t cells = work.most * p.B;
  try {
    out.memory.resize(size_t(cells) * size_t(m.scalar_count + m.rows * m.stride));
  } catch (const std::bad_alloc&) {
    out_of_memory_for("partial sums");
  }
  m.scalars = out.memory.data();
  m.vectors = m.scalars + cells * m.scalar_count;
  const int status = for_each_split(work.groups, [&](const Problem<T>& problem, auto... range) {
    return kernel.pair_sums(problem, pairs, m, range...);
  });
  DFK_EXPECT(status != non_finite_atom, "y", "finite values, got nan or inf");
  if (status == out_of_memory) out_of_memory_for("");
  if (work.most > 1)
    each(p.B, work.most * m.stride * m.rows, [&](int64_t b) { merge(m, work.splits[b], p.B, b); });
  return out;
}
template PairAccumulated<float> accumulate_pairs(const PairTensors&, bool);
template PairAccumulated<double> accumulate_pairs(const PairTensors&, bool);

}  // namespace dfk
