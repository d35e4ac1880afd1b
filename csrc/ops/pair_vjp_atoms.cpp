// The gradients of reverse mode in the tensors per atom.
#include <algorithm>
#include <atomic>
#include <tuple>

#include "host/cut.h"
#include "host/pair.h"

namespace dfk {
namespace {

// Queries [b0, b1) over all atoms of the problem.
template <class T>
int sweep(const Problem<T>& p, const PairArguments<T>& pairs, const AtomGradients<T>& out,
          int64_t b0, int64_t b1) {
  const Kernels<T>& kernel = kernels_for<T>();
  const int64_t tile = kernel.pair_tile(p, b1 - b0);
  std::atomic<int> status{ok};
  torch::stable::parallel_for(0, (p.N + tile - 1) / tile, 1, [&](int64_t begin, int64_t end) {
    const int result =
        kernel.pair_atoms(p, pairs, out, b0, b1, begin * tile, std::min(end * tile, p.N));
    if (result != ok) status = result;
  });
  return status;
}

// So many queries at a time that what is kept of them takes some 32 MiB.
template <class T>
int64_t queries_together(const Problem<T>& p) {
  return std::max<int64_t>(128, (32 << 20) / (int64_t(sizeof(T)) * (p.d + 16) * (8 + 3 * p.K)));
}

template <class T>
void run(const PairTensors& t, T* grad_y, T* grad_log_pi) {
  const CheckedProblem<T> c = problem_of<T>(t.inputs, t.kind);
  const Problem<T>& p = c.problem;
  if (p.B == 0 || t.inputs.atoms || c.masked > 0) {  // the kernel does not write all atoms
    if (grad_y) std::fill_n(grad_y, p.N * p.d, T(0));
    std::fill_n(grad_log_pi, p.N, T(0));
  }
  if (p.B == 0) return;
  std::vector<double> shift;
  const PairArguments<T> pairs = pair_arguments<T>(t, false, p.max_log_prior, shift);
  const Cut<T> work = cut(t.inputs, c, p.d, 0);
  int status = ok;
  const auto add = [&](const Problem<T>& problem, int64_t b0, int64_t b1) {
    if (status == ok)
      status = sweep<T>(
          problem, pairs,
          {.y = grad_y, .log_pi = grad_log_pi, .add = b0 > 0 || t.inputs.atoms.has_value()}, b0,
          b1);
  };
  if (t.inputs.atoms) {
    for (const QueryGroup<T>& group : work.groups) add(group.problem, group.b0, group.b1);
  } else {
    const int64_t step = queries_together(p);
    for (int64_t b = 0; b < p.B; b += step)
      add(work.groups.front().problem, b, std::min(b + step, p.B));
  }
  DFK_EXPECT(status != non_finite_atom, "y", "finite values, got nan or inf");
  if (status == out_of_memory) out_of_memory_for("");
}

std::tuple<Tensor, Tensor> pair_vjp_atoms(
    Tensor x, Tensor y, std::optional<Tensor> v, Tensor alpha, Tensor sigma,
    std::optional<Tensor> log_pi, double scale, double offset, Tensor shift, Tensor reference,
    std::string kind, std::optional<Tensor> h_weight, std::optional<Tensor> h_first,
    std::optional<Tensor> h_second, std::optional<Tensor> h_weight_square,
    std::optional<Tensor> atoms, std::optional<Tensor> counts, bool want_y) {
  PairTensors t = checked_pair(x, y, v, alpha, sigma, log_pi, scale, offset, shift, reference, kind,
                               atoms, counts);
  set_cotangents(t, h_weight, h_first, h_second, h_weight_square);
  const int64_t N = y.size(0);
  const Tensor grad_y = new_output(x, {want_y ? N : 0, x.size(1)}),
               grad_log_pi = new_output(x, {N});
  with_dtype_of(x, [&]<class T>(T) {
    run(t, want_y ? mutable_data<T>(grad_y) : nullptr, mutable_data<T>(grad_log_pi));
  });
  return {grad_y, grad_log_pi};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfkernels, CPU, m) {
  m.impl("pair_vjp_atoms", TORCH_BOX(&pair_vjp_atoms));
}

}  // namespace dfk
