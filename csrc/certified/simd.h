// The inner loops of the certified search (certified/kernels.h says what each does).
#pragma once
#if defined(__AVX2__)
#include <immintrin.h>  // intrinsics only: always inlined, so none can be the linker's copy for the process
#endif

#include "certified/rounding.h"
#include "simd/dots.h"

namespace {

// Atoms are in the SIMD lanes.
void coarse_products(const int16_t* codes, const float* scales, int64_t K, const float* query,
                     int64_t queries, float* out, int64_t ld) {
  constexpr int U = 4;
  alignas(64) float atoms[most_axes * code_tile];
  for (int64_t i = 0; i < K * code_tile; ++i) atoms[i] = float(codes[i]);
  for (int64_t q = 0; q < queries; ++q)
    for (int64_t j = 0; j < code_tile; j += U * W<float>) {
      Vec<float> sum[U] = {};
      for (int64_t k = 0; k < K; ++k) {
        const Vec<float> x = all(query[q * K + k]);
        for (int u = 0; u < U; ++u) sum[u] += x * load(atoms + k * code_tile + j + u * W<float>);
      }
      for (int u = 0; u < U; ++u)
        store<float>(out + q * ld + j + u * W<float>, load(scales + j + u * W<float>) * sum[u]);
    }
}

DFK_INLINE Vec<float> size_of(Vec<float> a) { return larger<float>(a, -a); }

// a[pick[0, n)] with zeros up to whole vectors, in out; a itself where pick is null.
DFK_INLINE const float* picked(const float* a, const uint8_t* pick, int64_t n, float* out) {
  if (!pick || !a) return a;
  for (int64_t j = 0; j < n; ++j) out[j] = a[pick[j]];
  for (int64_t j = n; j % W<float> != 0; ++j) out[j] = 0;
  return out;
}

void bound_logits(const BoundCoefficients& q, const BoundAtoms& atoms, const uint8_t* pick,
                  const float* products, int64_t n, float* estimate, float* upper,
                  float* largest_estimate, float* largest_upper) {
  constexpr float inf = __builtin_inff();
  float buffer[5][chunk_size];
  const float* atom_norm = picked(atoms.atom_norm, pick, n, buffer[0]);
  const float* remainder_norm = picked(atoms.remainder_norm, pick, n, buffer[1]);
  const float* axis_error = picked(atoms.axis_error, pick, n, buffer[2]);
  const float* code_scale = picked(atoms.code_scale, pick, n, buffer[3]);
  const float* log_prior = picked(atoms.log_prior, pick, n, buffer[4]);
  const float alpha_size = q.alpha < 0 ? -q.alpha : q.alpha;
  Vec<float> max_estimate = all(-inf), max_upper = all(-inf);
  for (int64_t j = 0; j < n; j += W<float>) {
    const Vec<float> norm = load(atom_norm + j), on_axes = load(axis_error + j);
    const Vec<float> product = q.alpha * load(products + j);
    const Vec<float> half_square = q.half_alpha_square * (norm * norm);
    Vec<float> error = q.query_remainder * load(remainder_norm + j) + q.query_on_axes * on_axes +
                       q.code_error * (norm + on_axes);
    if (code_scale) error += q.query_rounding * load(code_scale + j);
    error *= alpha_size;
    Vec<float> logit = product - half_square, sizes = size_of(product) + half_square + error;
    if (log_prior) {
      const Vec<float> prior = q.variance * load(log_prior + j);
      logit += prior;
      sizes += prior > -inf ? size_of(prior) : Vec<float>{};  // inf - inf is nan
    }
    const Vec<float> bound = logit + error + rounding::float_bound * sizes;
    store<float>(estimate + j, logit);
    store<float>(upper + j, bound);
    if (j + W<float> <= n) {
      max_estimate = larger<float>(logit, max_estimate);
      max_upper = bound <= max_upper ? max_upper : bound;  // nan counts as large
    }
  }
  *largest_estimate = max_lanes<float>(max_estimate);
  *largest_upper = max_upper[0];
  for (int i = 1; i < W<float>; ++i)
    *largest_upper = max_upper[i] <= *largest_upper ? *largest_upper : max_upper[i];
  for (int64_t j = n / W<float> * W<float>; j < n; ++j) {
    *largest_estimate = estimate[j] > *largest_estimate ? estimate[j] : *largest_estimate;
    *largest_upper = upper[j] <= *largest_upper ? *largest_upper : upper[j];
  }
}

int64_t find_candidates(const float* upper, int64_t n, float threshold, uint8_t* pick,
                        float* largest_dropped) {
  int64_t found = 0, whole = n / W<float> * W<float>;
  Vec<float> dropped = all(-__builtin_inff());
  for (int64_t j = 0; j < whole; j += W<float>) {
    const Vec<float> u = load(upper + j);
    dropped = larger<float>(u < threshold ? u : dropped, dropped);
  }
  float largest = max_lanes<float>(dropped);
  for (int64_t j = whole; j < n; ++j)
    largest = upper[j] < threshold && upper[j] > largest ? upper[j] : largest;
  for (int64_t j0 = 0; j0 < n; j0 += 16) {
    const int64_t end = n - j0 < 16 ? n : j0 + 16;
    int any = 0;
    for (int64_t j = j0; j < end; ++j) any |= !(upper[j] < threshold);
    if (!any) continue;
    for (int64_t j = j0; j < end; ++j) {
      pick[found] = uint8_t(j);
      found += !(upper[j] < threshold);
    }
  }
  *largest_dropped = largest;
  return found;
}

#if defined(__AVX2__)
// The sum of int32 lanes, in int64.
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

// A lane of int32 holds the sum of 500 products of at most 127 and 32767, so that 4096 products fit
// 16 or 8 lanes.
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

void fine_products(const int8_t* row, int64_t n, const int16_t* const* queries, int64_t count,
                   double* out) {
  constexpr int64_t span = 4096;
  for (int64_t i = 0; i < count; ++i) out[i] = 0;
  for (int64_t k = 0; k < n; k += span) {
    const int64_t length = n - k < span ? n - k : span;
    for (int64_t i = 0; i < count; i += 4) {
      const int16_t* four[4] = {};
      for (int64_t j = 0; j < 4 && i + j < count; ++j) four[j] = queries[i + j] + k;
      with_count<4>(count - i < 4 ? count - i : 4,
                    [&](auto c) { dot_codes<c.value>(row + k, length, four, out + i); });
    }
  }
}

template <int Q, int R>
void axis_products_of(const float* v, int64_t d, const double* const* z, double* const* out) {
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
      double tail = 0;
      for (int64_t l = k; l < d; ++l) tail += double(v[j * d + l]) * z[i][l];
      out[i][j] = sum_lanes<double>(sum[i][j]) + tail;
    }
}

void axis_products(const float* v, int64_t rows, int64_t d, const double* const* z, int64_t count,
                   double* const* out) {
  for (int64_t j = 0; j < rows; j += 4)
    for (int64_t i = 0; i < count; i += 4) {
      double* at[4] = {};
      for (int64_t l = 0; l < 4 && i + l < count; ++l) at[l] = out[i + l] + j;
      with_count<4>(count - i < 4 ? count - i : 4, [&](auto q) {
        with_count<4>(rows - j < 4 ? rows - j : 4,
                      [&](auto r) { axis_products_of<q.value, r.value>(v + j * d, d, z + i, at); });
      });
    }
}

double square_distance(const double* x, double alpha, const double* y, int64_t n) {
  constexpr int U = 4;
  Vec<double> sum[U] = {};
  int64_t k = 0;
  for (; k + U * W<double> <= n; k += U * W<double>)
    for (int u = 0; u < U; ++u) {
      const Vec<double> t = load(x + k + u * W<double>) - alpha * load(y + k + u * W<double>);
      sum[u] += t * t;
    }
  double tail = 0;
  for (; k < n; ++k) tail += (x[k] - alpha * y[k]) * (x[k] - alpha * y[k]);
  return sum_lanes<double>((sum[0] + sum[1]) + (sum[2] + sum[3])) + tail;
}

constexpr CertifiedKernels certified_kernels{.coarse_products = coarse_products,
                                             .bound_logits = bound_logits,
                                             .find_candidates = find_candidates,
                                             .fine_products = fine_products,
                                             .axis_products = axis_products,
                                             .square_distance = square_distance};

}  // namespace
