// Vectors of the widest kind that this translation unit is compiled for, and the exponential on
// them.
#pragma once
#include <stdint.h>

#if defined(__AVX512F__)
#define DFK_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define DFK_VECTOR_BYTES 32
#else
#define DFK_VECTOR_BYTES 16
#endif
#define DFK_INLINE static inline __attribute__((always_inline))

namespace {  // every instruction set has its own copy of everything: nothing here may be shared by
             // the linker

template <class T>
struct Lane;
template <>
struct Lane<float> {
  using Int = int32_t;
};
template <>
struct Lane<double> {
  using Int = int64_t;
};

template <class T>
inline constexpr int W = DFK_VECTOR_BYTES / int(sizeof(T));
template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(DFK_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
using IntVec = Vec<typename Lane<T>::Int>;
template <class T>
struct LooseOf {
  typedef T type __attribute__((vector_size(DFK_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};

template <class T>
DFK_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename LooseOf<T>::type*>(p);
}
template <class T>
DFK_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename LooseOf<T>::type*>(p) = v;
}
template <class T>
DFK_INLINE Vec<T> all(T a) {
  return a - Vec<T>{};  // a + 0 would be an addition, since -0 + 0 is 0
}
template <class T>
DFK_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// All lanes as one number, by halves: `join` makes one vector, or number, of two.
template <int BYTES, class T, class V, class F>
DFK_INLINE T join_halves(V v, const F& join) {
  constexpr int n = BYTES / int(sizeof(T));
  if constexpr (n == 1) {
    return v;
  } else if constexpr (n == 2) {
    return join(v[0], v[1]);
  } else {
    typedef T Half __attribute__((vector_size(BYTES / 2)));
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
    if constexpr (n == 16)
      return join_halves<BYTES / 2, T, Half>(
          join(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
               __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15)),
          join);
    else if constexpr (n == 8)
      return join_halves<BYTES / 2, T, Half>(join(__builtin_shufflevector(v, v, 0, 1, 2, 3),
                                                  __builtin_shufflevector(v, v, 4, 5, 6, 7)),
                                             join);
    else
      return join_halves<BYTES / 2, T, Half>(
          join(__builtin_shufflevector(v, v, 0, 1), __builtin_shufflevector(v, v, 2, 3)), join);
#else
    Half half[2];
    __builtin_memcpy(half, &v, BYTES);
    return join_halves<BYTES / 2, T, Half>(join(half[0], half[1]), join);
#endif
  }
}
template <int BYTES, class T, class V>
DFK_INLINE T sum_halves(V v) {
  return join_halves<BYTES, T>(v, [](auto a, auto b) { return a + b; });
}
template <class T>
DFK_INLINE T sum_lanes(Vec<T> v) {
  return sum_halves<DFK_VECTOR_BYTES, T>(v);
}
// In double precision; of float the upper half of the lanes is added to the lower.
template <class T>
DFK_INLINE Vec<double> widened(Vec<T> v) {
  if constexpr (sizeof(T) == 8) {
    return v;
  } else {
    typedef float Half __attribute__((vector_size(DFK_VECTOR_BYTES / 2)));
    Half half[2];
    __builtin_memcpy(half, &v, sizeof v);
#ifdef __AVX512F__  // gcc would convert a quarter at a time and put them together
    const auto wide = [](Half h) {
      return __builtin_ia32_cvtps2pd512_mask(h, Vec<double>{}, -1, 4);
    };
    return wide(half[0]) + wide(half[1]);
#else
    return __builtin_convertvector(half[0], Vec<double>) +
           __builtin_convertvector(half[1], Vec<double>);
#endif
  }
}
template <class T>
DFK_INLINE double total(Vec<T> v) {
  return sum_lanes<double>(widened<T>(v));
}
template <class T>
DFK_INLINE T max_lanes(Vec<T> v) {
  return join_halves<DFK_VECTOR_BYTES, T>(v, [](auto a, auto b) { return a > b ? a : b; });
}
// f(j, u) for j = 0, W, 2 W, .. below n, which is a whole number of vectors; u, which runs from 0
// to 3 and again, says which of four chains of additions the vector belongs to.
template <class T, class F>
DFK_INLINE void in_four_chains(int64_t n, const F& f) {
  int64_t j = 0;
  for (; j + 4 * W<T> <= n; j += 4 * W<T>)
    for (int u = 0; u < 4; ++u) f(j + u * W<T>, u);
  for (; j < n; j += W<T>) f(j, 0);
}

// Calls f(Count<n>{}), which has n as a constant, for 1 <= n <= MOST.
template <int N>
struct Count {
  static constexpr int value = N;
};
template <int MOST, class F>
DFK_INLINE void with_count(int64_t n, const F& f) {
  if constexpr (MOST > 1) {
    if (n < MOST) return with_count<MOST - 1>(n, f);
  }
  f(Count<MOST>{});
}

// exp(x) for x <= 0 (up to rounding): 2^n exp(r), |r| <= ln(2)/2, Taylor in r; exactly 0 where the
// result would be subnormal, -inf included. Relative error <= 1e-7 (float), 3e-16 (double).
DFK_INLINE Vec<float> vexp(Vec<float> x) {
  const Vec<float> magic =
      all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  Vec<float> n = x * 1.44269504f + magic;
  const IntVec<float> bits = (reinterpret_cast<IntVec<float>>(n) - 0x4B400000 + 127) << 23;
  n -= magic;
  Vec<float> r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  return x > -87.0f ? p * reinterpret_cast<Vec<float>>(bits) : Vec<float>{};
}
DFK_INLINE Vec<double> vexp(Vec<double> x) {
  const Vec<double> magic = all(6755399441055744.0);  // 1.5 * 2^52
  Vec<double> n = x * 1.4426950408889634 + magic;
  const IntVec<double> bits = (reinterpret_cast<IntVec<double>>(n) - 0x4338000000000000 + 1023)
                              << 52;
  n -= magic;
  const Vec<double> r = x - n * 6.93147180369123816490e-01 - n * 1.90821492927058770002e-10;
  Vec<double> p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * (r * r) + (r + 1.0);
  return x > -708.0 ? p * reinterpret_cast<Vec<double>>(bits) : Vec<double>{};
}

}  // namespace
