// The rounding terms of the certificate, under the same names as in
// dfkernels/certified/rounding.py, which says what each covers; docs/certified.md has the table of
// where each is added. Included by every instruction set's build (see simd/kernels.cpp): no C++
// library header may be included here, and the functions are static.
#pragma once
#include <stdint.h>

namespace dfk::rounding {

inline constexpr double unit = 0x1p-53;            // unit roundoff of double
inline constexpr double few_roundings = 1 + 1e-9;  // a few operations on terms of one sign
inline constexpr float float_bound = 0x1p-19f;     // 32 roundings to float
inline constexpr double coordinates = 0x1p-48;     // coordinates beside their differences

// Error of V z in double, relative to |z|.
static inline double double_sums(int64_t d, int64_t K) {
  return 8 * unit * double(d + K) * __builtin_sqrt(double(K));
}

// Error of products with the codes in float, relative to the codes' norm.
static inline double float_sums(int64_t K, double query_on_axes, double z_norm) {
  return 0x1p-24 * double(K + 4) * query_on_axes + 0x1p-21 * z_norm;
}

// Error of a logit by differences in double, relative to the sum of its terms' sizes.
static inline double exact_logit(int64_t d) { return 4 * unit * (double(d) + 8); }

static inline float round_up(double a) { return __builtin_nextafterf(float(a), __builtin_inff()); }
static inline float round_down(double a) {
  return __builtin_nextafterf(float(a), -__builtin_inff());
}

}  // namespace dfk::rounding
