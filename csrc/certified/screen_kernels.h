// The functions of one instruction set that the certified search calls, and what it tells them:
// plain data. No torch and no C++ library header may be included here (see simd/kernels.cpp).
#pragma once
#include <stdint.h>

namespace dfk {

// kept_atoms: with t = y - centre and z = x - alpha centre, c approximates <z, t>, and no logit of
// atom i, times sigma^2 and less what is the same for all atoms, is above
//   alpha c - half size_i^2 + variance log pi_i
//     + |alpha| (reach rest_i + along shift_i + code (size_i + shift_i) + extra_i)
struct Bound {
  float alpha, half, variance, reach, along, code, lost;  // extra_i = lost scale_i
};

// What is known of the atoms of one chunk at a level of the index; scale and log_prior may be null.
inline constexpr int64_t screen_chunk = 128, screen_tile = 64, most_axes = 32;
struct ScreenAtoms {
  const float *size, *rest, *shift, *scale, *log_prior;
};

struct ScreenKernels {
  // out[q * ld + j] = scales[j] sum_k query[q * K + k] codes[k * screen_tile + j]
  void (*first)(const int16_t* codes, const float* scales, int64_t K, const float* query,
                int64_t queries, float* out, int64_t ld);
  // The middle and the upper end of the logits of atoms pick[0, n), from c; the largest of each.
  // pick may be null for a whole chunk.
  void (*bounds)(const Bound&, const ScreenAtoms&, const uint8_t* pick, const float* c, int64_t n,
                 float* mid, float* up, float* largest_mid, float* largest_up);
  // Keeps those j < n with up[j] >= least, or nan: their indices, in order, to pick; the largest of
  // the others.
  int64_t (*keep)(const float* up, int64_t n, float least, uint8_t* pick, float* largest_dropped);
  // out[i] = <row, queries[i]>, n a multiple of 32
  void (*dots)(const int8_t* row, int64_t n, const int16_t* const* queries, int64_t count,
               double* out);
  // out[i][j] = <row j of v, z[i]>, rows d apart
  void (*rotate)(const float* v, int64_t rows, int64_t d, const double* const* z, int64_t count,
                 double* const* out);
  double (*square_distance)(const double* x, double alpha, const double* y, int64_t n);
};

}  // namespace dfk
