// The natural logarithm on vectors, of positive finite numbers that are not subnormal.
#pragma once
#include "simd/vec.h"

namespace {

// log(x) = n log 2 + log m, m in [sqrt(1/2), sqrt(2)), log m = 2 artanh(z), z = (m - 1)/(m + 1).
DFK_INLINE Vec<float> vlog(Vec<float> x) {
  IntVec<float> bits = reinterpret_cast<IntVec<float>>(x);
  const IntVec<float> n = (bits - 0x3f3504f3) >> 23;
  const Vec<float> m = reinterpret_cast<Vec<float>>(bits - (n << 23));
  const Vec<float> exponent = __builtin_convertvector(n, Vec<float>);
  const Vec<float> z = (m - 1.0f) / (m + 1.0f), s = z * z;
  Vec<float> p = s * 0.11111111f + 0.14285715f;
  p = p * s + 0.2f;
  p = p * s + 0.33333334f;
  return exponent * 0.693359375f + (2.0f * z + (2.0f * z * s * p - exponent * 2.12194440e-4f));
}
DFK_INLINE Vec<double> vlog(Vec<double> x) {
  IntVec<double> bits = reinterpret_cast<IntVec<double>>(x);
  const IntVec<double> n = (bits - 0x3fe6a09e667f3bcd) >> 52;
  const Vec<double> m = reinterpret_cast<Vec<double>>(bits - (n << 52));
  const Vec<double> exponent = __builtin_convertvector(n, Vec<double>);
  const Vec<double> z = (m - 1.0) / (m + 1.0), s = z * z;
  Vec<double> p = s * (1.0 / 21) + 1.0 / 19;
  p = p * s + 1.0 / 17;
  p = p * s + 1.0 / 15;
  p = p * s + 1.0 / 13;
  p = p * s + 1.0 / 11;
  p = p * s + 1.0 / 9;
  p = p * s + 1.0 / 7;
  p = p * s + 1.0 / 5;
  p = p * s + 1.0 / 3;
  return exponent * 6.93147180369123816490e-01 +
         (2.0 * z + (2.0 * z * s * p + exponent * 1.90821492927058770002e-10));
}

}  // namespace
