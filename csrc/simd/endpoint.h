// The network-based approximations: one query at a time, no atoms. Memory bound.
#pragma once
#include "simd/vec.h"

namespace {

// Sums in double over blocks of 4096 terms that are summed in T, lane by lane; f(k,
// vector-or-scalar tag) gives the terms.
template <class T, class F>
DFK_INLINE double blocked_sum(int64_t d, const F& f) {
  double sum = 0;
  int64_t k = 0;
  while (k + W<T> <= d) {
    Vec<T> acc[2] = {};
    const int64_t end = k + 4096 < d ? k + 4096 : d;
    for (; k + 2 * W<T> <= end; k += 2 * W<T>) {
      acc[0] += f(k, Vec<T>{});
      acc[1] += f(k + W<T>, Vec<T>{});
    }
    for (; k + W<T> <= end; k += W<T>) acc[0] += f(k, Vec<T>{});
    sum += total<T>(acc[0] + acc[1]);
    if (end == d) break;
  }
  for (; k < d; ++k) sum += f(k, T{});
  return sum;
}
template <class T>
DFK_INLINE Vec<T> read(const T* p, Vec<T>) {
  return load(p);
}
template <class T>
DFK_INLINE T read(const T* p, T) {
  return *p;
}

// out = (v - ratio (<x0, v> x0 - <mean, v> mean)) precision, or with r = x0 - mean, (v - ratio <r,
// v> r) precision. False where an inner product is not finite.
template <class T>
bool endpoint(bool centred, const T* v, const T* x0, const T* mean, int64_t d, double ratio,
              double precision, T* out) {
  double a, b;
  if (centred) {
    a = blocked_sum<T>(d, [=](int64_t k, auto tag) {
      return (read(x0 + k, tag) - read(mean + k, tag)) * read(v + k, tag);
    });
    b = a;
  } else {
    a = blocked_sum<T>(d,
                       [=](int64_t k, auto tag) { return read(x0 + k, tag) * read(v + k, tag); });
    b = blocked_sum<T>(d,
                       [=](int64_t k, auto tag) { return read(mean + k, tag) * read(v + k, tag); });
  }
  const T p = T(precision), along_x0 = T(ratio * precision * a),
          along_mean = T(ratio * precision * b);
  T zero = 0;  // nan once a result is not finite
  if (centred)
#pragma omp simd reduction(+ : zero)
    for (int64_t k = 0; k < d; ++k) {
      out[k] = p * v[k] - along_x0 * (x0[k] - mean[k]);
      zero += out[k] - out[k];
    }
  else
#pragma omp simd reduction(+ : zero)
    for (int64_t k = 0; k < d; ++k) {
      out[k] = p * v[k] - (along_x0 * x0[k] - along_mean * mean[k]);
      zero += out[k] - out[k];
    }
  return zero == 0;
}

// |x - sigma eps|^2, which is alpha^2 |denoised|^2.
template <class T>
double residual_square(const T* x, const T* eps, T sigma, int64_t d) {
  return blocked_sum<T>(d, [=](int64_t k, auto tag) {
    const auto r = read(x + k, tag) - sigma * read(eps + k, tag);
    return r * r;
  });
}

}  // namespace
