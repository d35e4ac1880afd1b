// The inner loops of kept_atoms: bounds on logits from an index's codes.
#pragma once
#if defined(__AVX2__)
#include <immintrin.h>  // intrinsics only: always inlined, so none can be the linker's copy for the process
#endif

#include "simd/dots.h"

namespace {

// Atoms in the lanes.
void screen_first(const int16_t* codes, const float* scales, int64_t K, const float* query,
                  int64_t queries, float* out, int64_t ld) {
  constexpr int U = 4;
  alignas(64) float atoms[most_axes * screen_tile];
  for (int64_t i = 0; i < K * screen_tile; ++i) atoms[i] = float(codes[i]);
  for (int64_t q = 0; q < queries; ++q)
    for (int64_t j = 0; j < screen_tile; j += U * W<float>) {
      Vec<float> sum[U] = {};
      for (int64_t k = 0; k < K; ++k) {
        const Vec<float> x = all(query[q * K + k]);
        for (int u = 0; u < U; ++u) sum[u] += x * load(atoms + k * screen_tile + j + u * W<float>);
      }
      for (int u = 0; u < U; ++u)
        store<float>(out + q * ld + j + u * W<float>, load(scales + j + u * W<float>) * sum[u]);
    }
}

DFK_INLINE Vec<float> size_of(Vec<float> a) { return larger<float>(a, -a); }

// pick[0, n) of a, with zeros up to whole vectors, in room; a itself where pick is null.
DFK_INLINE const float* picked(const float* a, const uint8_t* pick, int64_t n, float* room) {
  if (!pick || !a) return a;
  for (int64_t j = 0; j < n; ++j) room[j] = a[pick[j]];
  for (int64_t j = n; j % W<float> != 0; ++j) room[j] = 0;
  return room;
}

void screen_bounds(const Bound& b, const ScreenAtoms& atoms, const uint8_t* pick, const float* c,
                   int64_t n, float* mid, float* up, float* largest_mid, float* largest_up) {
  constexpr float rounding = 32 * 5.9604645e-8f;  // of what is stored, and of these few operations
  constexpr float inf = __builtin_inff();
  float room[5][screen_chunk];
  const float* size = picked(atoms.size, pick, n, room[0]);
  const float* rest = picked(atoms.rest, pick, n, room[1]);
  const float* shift = picked(atoms.shift, pick, n, room[2]);
  const float* scale = picked(atoms.scale, pick, n, room[3]);
  const float* prior = picked(atoms.log_prior, pick, n, room[4]);
  const float slope = b.alpha < 0 ? -b.alpha : b.alpha;
  Vec<float> most_mid = all(-inf), most_up = all(-inf);
  for (int64_t j = 0; j < n; j += W<float>) {
    const Vec<float> s = load(size + j), wrong = load(shift + j);
    const Vec<float> product = b.alpha * load(c + j), square = b.half * (s * s);
    Vec<float> width = b.reach * load(rest + j) + b.along * wrong + b.code * (s + wrong);
    if (scale) width += b.lost * load(scale + j);
    width *= slope;
    Vec<float> logit = product - square, sizes = size_of(product) + square + width;
    if (prior) {
      const Vec<float> p = b.variance * load(prior + j);
      logit += p;
      sizes += p > -inf ? size_of(p) : Vec<float>{};  // inf - inf is nan
    }
    const Vec<float> end = logit + width + rounding * sizes;
    store<float>(mid + j, logit);
    store<float>(up + j, end);
    if (j + W<float> <= n) {
      most_mid = larger<float>(logit, most_mid);
      most_up = end <= most_up ? most_up : end;  // nan counts as large
    }
  }
  *largest_mid = max_lanes<float>(most_mid);
  *largest_up = most_up[0];
  for (int i = 1; i < W<float>; ++i)
    *largest_up = most_up[i] <= *largest_up ? *largest_up : most_up[i];
  for (int64_t j = n / W<float> * W<float>; j < n; ++j) {
    *largest_mid = mid[j] > *largest_mid ? mid[j] : *largest_mid;
    *largest_up = up[j] <= *largest_up ? *largest_up : up[j];
  }
}

int64_t screen_keep(const float* up, int64_t n, float least, uint8_t* pick,
                    float* largest_dropped) {
  int64_t kept = 0, whole = n / W<float> * W<float>;
  Vec<float> most = all(-__builtin_inff());
  for (int64_t j = 0; j < whole; j += W<float>) {
    const Vec<float> u = load(up + j);
    most = larger<float>(u < least ? u : most, most);
  }
  float largest = max_lanes<float>(most);
  for (int64_t j = whole; j < n; ++j) largest = up[j] < least && up[j] > largest ? up[j] : largest;
  for (int64_t j0 = 0; j0 < n; j0 += 16) {
    const int64_t end = n - j0 < 16 ? n : j0 + 16;
    int any = 0;
    for (int64_t j = j0; j < end; ++j) any |= !(up[j] < least);
    if (!any) continue;
    for (int64_t j = j0; j < end; ++j) {
      pick[kept] = uint8_t(j);
      kept += !(up[j] < least);
    }
  }
  *largest_dropped = largest;
  return kept;
}

#if defined(__AVX2__)
// Of int32 lanes, in int64.
template <class V>
DFK_INLINE double sum_of_lanes(V v) {
  static_assert(sizeof(V) == DFK_VECTOR_BYTES);
  typedef int32_t Half __attribute__((vector_size(DFK_VECTOR_BYTES / 2)));
  typedef int64_t Long __attribute__((vector_size(DFK_VECTOR_BYTES)));
  Half half[2];
  memcpy(half, &v, sizeof v);
  return double(sum_halves<DFK_VECTOR_BYTES, int64_t, Long>(
      __builtin_convertvector(half[0], Long) + __builtin_convertvector(half[1], Long)));
}
#endif

// Products of at most 127 and 32767: a lane of int32 takes 500 of them, so that 4096 in 16 lanes or
// 8 fit.
template <int Q>
void dot_codes(const int8_t* row, int64_t n, const int16_t* const* queries, double* out) {
#if defined(__AVX512BW__)
  __m512i sum[Q];
  for (int q = 0; q < Q; ++q) sum[q] = _mm512_setzero_si512();
  for (int64_t k = 0; k < n; k += 32) {
    const __m512i y =
        _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + k)));
    for (int q = 0; q < Q; ++q)
      sum[q] = _mm512_add_epi32(sum[q], _mm512_madd_epi16(y, _mm512_loadu_si512(queries[q] + k)));
  }
  for (int q = 0; q < Q; ++q) out[q] += sum_of_lanes(sum[q]);
#elif defined(__AVX2__)
  __m256i sum[Q];
  for (int q = 0; q < Q; ++q) sum[q] = _mm256_setzero_si256();
  for (int64_t k = 0; k < n; k += 16) {
    const __m256i y =
        _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + k)));
    for (int q = 0; q < Q; ++q) {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(queries[q] + k));
      sum[q] = _mm256_add_epi32(sum[q], _mm256_madd_epi16(y, x));
    }
  }
  for (int q = 0; q < Q; ++q) out[q] += sum_of_lanes(sum[q]);
#else
  for (int q = 0; q < Q; ++q) {
    int64_t sum = 0;
    for (int64_t k = 0; k < n; ++k) sum += int32_t(row[k]) * queries[q][k];
    out[q] += double(sum);
  }
#endif
}

void screen_dots(const int8_t* row, int64_t n, const int16_t* const* queries, int64_t count,
                 double* out) {
  constexpr int64_t most = 4096;
  for (int64_t i = 0; i < count; ++i) out[i] = 0;
  for (int64_t k = 0; k < n; k += most) {
    const int64_t length = n - k < most ? n - k : most;
    for (int64_t i = 0; i < count; i += 4) {
      const int16_t* some[4] = {};
      for (int64_t j = 0; j < 4 && i + j < count; ++j) some[j] = queries[i + j] + k;
      with_count<4>(count - i < 4 ? count - i : 4,
                    [&](auto c) { dot_codes<c.value>(row + k, length, some, out + i); });
    }
  }
}

template <int Q, int R>
void rotate_some(const float* v, int64_t d, const double* const* z, double* const* out) {
  typedef float Half __attribute__((vector_size(DFK_VECTOR_BYTES / 2), aligned(4), may_alias));
  Vec<double> sum[Q][R] = {};
  int64_t k = 0;
  for (; k + W<double> <= d; k += W<double>) {
    Vec<double> row[R];
    for (int j = 0; j < R; ++j)
      row[j] = __builtin_convertvector(*reinterpret_cast<const Half*>(v + j * d + k), Vec<double>);
    for (int i = 0; i < Q; ++i) {
      const Vec<double> zi = load(z[i] + k);
      for (int j = 0; j < R; ++j) sum[i][j] += zi * row[j];
    }
  }
  for (int i = 0; i < Q; ++i)
    for (int j = 0; j < R; ++j) {
      double rest = 0;
      for (int64_t l = k; l < d; ++l) rest += double(v[j * d + l]) * z[i][l];
      out[i][j] = sum_lanes<double>(sum[i][j]) + rest;
    }
}

void screen_rotate(const float* v, int64_t rows, int64_t d, const double* const* z, int64_t count,
                   double* const* out) {
  for (int64_t j = 0; j < rows; j += 4)
    for (int64_t i = 0; i < count; i += 4) {
      double* at[4] = {};
      for (int64_t l = 0; l < 4 && i + l < count; ++l) at[l] = out[i + l] + j;
      with_count<4>(count - i < 4 ? count - i : 4, [&](auto q) {
        with_count<4>(rows - j < 4 ? rows - j : 4,
                      [&](auto r) { rotate_some<q.value, r.value>(v + j * d, d, z + i, at); });
      });
    }
}

double screen_square_distance(const double* x, double alpha, const double* y, int64_t n) {
  constexpr int U = 4;
  Vec<double> sum[U] = {};
  int64_t k = 0;
  for (; k + U * W<double> <= n; k += U * W<double>)
    for (int u = 0; u < U; ++u) {
      const Vec<double> t = load(x + k + u * W<double>) - alpha * load(y + k + u * W<double>);
      sum[u] += t * t;
    }
  double rest = 0;
  for (; k < n; ++k) rest += (x[k] - alpha * y[k]) * (x[k] - alpha * y[k]);
  return sum_lanes<double>((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

constexpr ScreenKernels screen_kernels{screen_first, screen_bounds, screen_keep,
                                       screen_dots,  screen_rotate, screen_square_distance};

}  // namespace
