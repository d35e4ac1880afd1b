// The tangents of a kind's sums, forward mode; the sums are the results.
#include <tuple>

#include "host/pair.h"

namespace dfk {
namespace {

template <class T>
void finish(const PairAccumulated<T>& sums, T* weight, T* first, T* second, T* weight_square) {
  const Problem<T>& p = sums.problem;
  const int64_t d = p.d, rows = sums.sums.rows - 1;
  const bool posterior = p.kind == MomentKind::posterior;
  each(p.B, d * (1 + rows), [&](int64_t b) {
    const double* const scalars = sums.scalars(b);
    weight[b] = T(scalars[0]);
    if (posterior) second[b] = T(scalars[1]), weight_square[b] = T(scalars[2]);
    for (int64_t k = 0; k < d; ++k) first[b * d + k] = T(sums.row(b, 0)[k]);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = 0; k < d; ++k) second[(b * rows + i) * d + k] = T(sums.row(b, 1 + i)[k]);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pair_jvp(
    Tensor x, Tensor y, std::optional<Tensor> v, Tensor alpha, Tensor sigma,
    std::optional<Tensor> log_pi, double scale, double offset, Tensor shift, Tensor reference,
    std::string kind, std::optional<Tensor> dx, std::optional<Tensor> dy, std::optional<Tensor> dv,
    std::optional<Tensor> dalpha, std::optional<Tensor> dsigma, std::optional<Tensor> dlog_pi,
    std::optional<Tensor> atoms, std::optional<Tensor> counts) {
  PairTensors t = checked_pair(x, y, v, alpha, sigma, log_pi, scale, offset, shift, reference, kind,
                               atoms, counts);
  set_tangents(t, dx, dy, dv, dalpha, dsigma, dlog_pi);
  const int64_t B = x.size(0), d = x.size(1);
  const bool posterior = t.kind == MomentKind::posterior;
  const Tensor weight = new_output(x, {B}), first = new_output(x, {B, d}),
               second = posterior ? new_output(x, {B})
                        : v       ? new_output(x, {B, v->size(1), d})
                                  : new_output(x, {B, d}),
               weight_square = new_output(x, {posterior ? B : 0});
  with_dtype_of(x, [&]<class T>(T) {
    finish(accumulate_pairs<T>(t, true), mutable_data<T>(weight), mutable_data<T>(first),
           mutable_data<T>(second), mutable_data<T>(weight_square));
  });
  return {weight, first, second, weight_square};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfkernels, CPU, m) { m.impl("pair_jvp", TORCH_BOX(&pair_jvp)); }

}  // namespace dfk
