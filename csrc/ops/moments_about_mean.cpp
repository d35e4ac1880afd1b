// For the derivatives of a moment kind (dfkernels/ops/common/pair_kernels.py): the log of the sum
// of the weights, the mean as the reference, and the kind's moments about it with the weights
// normalised, in one pass over the atoms. Written in double, the moments keep what rounding takes
// off the reference.
#include <string>
#include <tuple>

#include "host/accumulate.h"
#include "moments/dense.h"
#include "moments/diagonal.h"
#include "moments/matvec.h"
#include "moments/posterior.h"

namespace dfk {
namespace {

struct Outputs {
  Tensor shift, reference, weight, first, second, weight_square;
};

// The kind's second moment of query q about the covariance's centre plus `delta`.
template <class T>
void second_moment(const Accumulated<T>& sums, const FinishedQuery<T>& q, const double* delta,
                   T* out) {
  const Problem<T>& p = sums.problem;
  const Moments<T>& m = sums.moments;
  const int64_t d = p.d, b = q.b;
  switch (p.kind) {
    case MomentKind::posterior: {
      double square = PosteriorMoments<T>::covariance_trace(p, m, b, q.mean);
      for (int64_t k = 0; k < d; ++k) square += delta[k] * delta[k];
      out[b] = T(square);
      break;
    }
    case MomentKind::matvec:
      for (int64_t row = b * p.K; row < (b + 1) * p.K; ++row) {
        const double projection = MatvecMoments<T>::mean_projection(m, b, row);
        const T* const v = p.v + row * d;
        double along = 0;
        for (int64_t k = 0; k < d; ++k) along += delta[k] * v[k];
        for (int64_t k = 0; k < d; ++k)
          out[row * d + k] =
              T(MatvecMoments<T>::covariance_product(m, b, q.mean, row, projection, k) +
                delta[k] * along);
      }
      break;
    case MomentKind::diagonal:
      for (int64_t k = 0; k < d; ++k)
        out[b * d + k] = T(DiagonalMoments<T>::variance(m, b, q.mean, k) + delta[k] * delta[k]);
      break;
    case MomentKind::dense:
      for (int64_t j = 0; j < d; ++j)
        for (int64_t k = 0; k < d; ++k)
          out[(b * d + j) * d + k] =
              T(DenseMoments<T>::covariance(m, b, q.mean, j, k) + delta[j] * delta[k]);
      break;
  }
}

template <class T>
void finish(const Accumulated<T>& sums, int64_t b0, const Outputs& out) {
  const Problem<T>& p = sums.problem;
  const Moments<T>& m = sums.moments;
  const int64_t second_size = p.B ? out.second.numel() / out.shift.numel() : 0;  // of a query
  const bool squares = p.kind == MomentKind::posterior;
  double* const shift = mutable_data<double>(out.shift) + b0;
  T *const reference = mutable_data<T>(out.reference) + b0 * p.d,
           *const weight = mutable_data<T>(out.weight) + b0,
           *const first = mutable_data<T>(out.first) + b0 * p.d,
           *const second = mutable_data<T>(out.second) + b0 * second_size,
           *const weight_square = squares ? mutable_data<T>(out.weight_square) + b0 : nullptr;
  for_each_query(sums, 4 * p.d * (1 + m.second_rows), [&](const FinishedQuery<T>& q) {
    std::vector<double> delta(p.d);
    for (int64_t k = 0; k < p.d; ++k) {
      const double mean = double(q.reference[k]) + q.mean[k];
      const T rounded = T(mean);
      reference[q.b * p.d + k] = rounded;
      delta[k] = mean - rounded;
      first[q.b * p.d + k] = T(delta[k]);
    }
    second_moment(sums, q, delta.data(), second);
    const double weight_sum = m.weight_sum[q.b];
    // The logits of the sums are less the largest log_prior, or without any.
    shift[q.b] = m.max_logit[q.b] + std::log(weight_sum) +
                 (p.log_prior ? double(p.max_log_prior) : -sums.log_total);
    weight[q.b] = 1;
    if (squares) weight_square[q.b] = T(m.weight_square_sum[q.b] / (weight_sum * weight_sum));
  });
  expect_representable(reference, p.B * p.d);
  expect_representable(second, p.B * second_size);
}

MomentKind kind_named(const std::string& name) {
  if (name == "posterior") return MomentKind::posterior;
  if (name == "matvec") return MomentKind::matvec;
  if (name == "diagonal") return MomentKind::diagonal;
  if (name == "dense") return MomentKind::dense;
  refuse_value("kind", "'posterior', 'matvec', 'diagonal' or 'dense', got '", name, "'");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moments_about_mean(
    Tensor x, Tensor y, std::optional<Tensor> v, Tensor alpha, Tensor sigma,
    std::optional<Tensor> log_pi, double scale, double offset, std::string kind_name,
    std::optional<Tensor> atoms, std::optional<Tensor> counts) {
  const Arguments a = checked_clouds(x, y, v, alpha, sigma, log_pi, scale, offset, atoms, counts);
  const MomentKind kind = kind_named(kind_name);
  DFK_EXPECT((kind == MomentKind::matvec) == v.has_value(), "v",
             "a tensor with kind 'matvec' and None with another");
  const int64_t B = a.x.size(0), d = a.x.size(1);
  const bool posterior = kind == MomentKind::posterior;
  const Outputs out = {.shift = new_output(a.x, {B}, ScalarType::Double),
                       .reference = new_output(a.x, {B, d}),
                       .weight = new_output(a.x, {B}),
                       .first = new_output(a.x, {B, d}),
                       .second = kind == MomentKind::dense    ? new_output(a.x, {B, d, d})
                                 : kind == MomentKind::matvec ? new_output(a.x, {B, v->size(1), d})
                                 : posterior                  ? new_output(a.x, {B})
                                                              : new_output(a.x, {B, d}),
                       .weight_square = new_output(a.x, {posterior ? B : 0})};
  with_dtype_of(a.x, [&]<class T>(T) {
    for_each_cloud(a,
                   [&](int64_t cloud) { finish(accumulate<T>(a, kind, cloud), cloud * a.B, out); });
  });
  return {out.shift, out.reference, out.weight, out.first, out.second, out.weight_square};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dfkernels, CPU, m) {
  m.impl("moments_about_mean", TORCH_BOX(&moments_about_mean));
}

}  // namespace dfk
