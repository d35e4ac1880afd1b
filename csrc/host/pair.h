// The kernels of first derivatives (dfkernels/ops/common/pair_kernels.py has their formulas): their
// arguments, and the sums per query.
#pragma once
#include <array>
#include <string>

#include "host/accumulate.h"

namespace dfk {

// Arguments as the schemas have them, checked.
struct PairTensors {
  Arguments inputs;
  Tensor shift, reference;
  MomentKind kind;
  std::optional<Tensor> h_weight, h_first, h_second, h_weight_square;
  std::optional<Tensor> dx, dy, dv, dalpha, dsigma, dlog_pi;
};
// What both modes have; cotangents or tangents are to be set.
PairTensors checked_pair(Tensor x, Tensor y, std::optional<Tensor> v, Tensor alpha, Tensor sigma,
                         std::optional<Tensor> log_pi, double scale, double offset, Tensor shift,
                         Tensor reference, const std::string& kind, std::optional<Tensor> atoms,
                         std::optional<Tensor> counts);
void set_cotangents(PairTensors& to, std::optional<Tensor> h_weight, std::optional<Tensor> h_first,
                    std::optional<Tensor> h_second, std::optional<Tensor> h_weight_square);
void set_tangents(PairTensors& to, std::optional<Tensor> dx, std::optional<Tensor> dy,
                  std::optional<Tensor> dv, std::optional<Tensor> dalpha,
                  std::optional<Tensor> dsigma, std::optional<Tensor> dlog_pi);

// The arguments as the kernels take them. `shift` is memory that the result points to.
template <class T>
PairArguments<T> pair_arguments(const PairTensors& t, bool forward, double max_log_prior,
                                std::vector<double>& shift);

// The sums of every query over its atoms, in split 0.
template <class T>
struct PairAccumulated {
  Problem<T> problem;
  PairOutput<T> sums;
  std::vector<double> memory;
  const double* scalars(int64_t b) const { return sums.scalars + b * sums.scalar_count; }
  const double* row(int64_t b, int64_t i) const {
    return sums.vectors + (b * sums.rows + i) * sums.stride;
  }
};
template <class T>
PairAccumulated<T> accumulate_pairs(const PairTensors& t, bool forward);
extern template PairAccumulated<float> accumulate_pairs(const PairTensors&, bool);
extern template PairAccumulated<double> accumulate_pairs(const PairTensors&, bool);

}  // namespace dfk
