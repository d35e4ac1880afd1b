// The functions of one instruction set that the certified search calls, and what it tells them:
// plain data. No torch and no C++ library header may be included here (see simd/kernels.cpp).
#pragma once
#include <stdint.h>

#include "generated/constants.h"  // written by _build/native.py

namespace dfk {

inline constexpr int64_t chunk_size = 128;  // atoms that are bounded together

// A query's part of the bounds on its logits. With t = y - centre and z = x - alpha centre, the
// approximate product c of <z, t> gives an estimate of the logit of atom i,
//   alpha c - half_alpha_square atom_norm_i^2 + variance log pi_i,
// times sigma^2 and without what all atoms share. Without rounding, no logit is above it by more
// than |alpha| times
//   query_remainder remainder_norm_i + query_on_axes axis_error_i
//     + code_error (atom_norm_i + axis_error_i) + query_rounding code_scale_i.
struct BoundCoefficients {
  float alpha, half_alpha_square, variance;
  float query_remainder, query_on_axes, code_error, query_rounding;
};

// The atoms' part, for the atoms of one chunk at one level of the index; code_scale (null at the
// coarse level) goes with query_rounding; log_prior may be null.
struct BoundAtoms {
  const float *atom_norm, *remainder_norm, *axis_error, *code_scale, *log_prior;
};

struct CertifiedKernels {
  // out[q * ld + j] = scales[j] sum_k query[q * K + k] codes[k * code_tile + j]
  void (*coarse_products)(const int16_t* codes, const float* scales, int64_t K, const float* query,
                          int64_t queries, float* out, int64_t ld);
  // Estimates and upper bounds of the logits of atoms pick[0, n), from their products; the largest
  // of each. pick may be null for a whole chunk.
  void (*bound_logits)(const BoundCoefficients&, const BoundAtoms&, const uint8_t* pick,
                       const float* products, int64_t n, float* estimate, float* upper,
                       float* largest_estimate, float* largest_upper);
  // Finds those j < n with upper[j] >= threshold, or nan: how many, and their indices, in order, in
  // pick. The largest of the others goes to largest_dropped.
  int64_t (*find_candidates)(const float* upper, int64_t n, float threshold, uint8_t* pick,
                             float* largest_dropped);
  // out[i] = <row, queries[i]>, n a multiple of 32
  void (*fine_products)(const int8_t* row, int64_t n, const int16_t* const* queries, int64_t count,
                        double* out);
  // out[i][j] = <row j of v, z[i]>, rows d apart
  void (*axis_products)(const float* v, int64_t rows, int64_t d, const double* const* z,
                        int64_t count, double* const* out);
  // |x - alpha y|^2
  double (*square_distance)(const double* x, double alpha, const double* y, int64_t n);
};

}  // namespace dfk
