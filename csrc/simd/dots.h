// The inner loops: dot products, squared distances and weighted sums of rows, blocked so that the
// accumulators stay in registers. Rows are whole vectors long (zero padded), `width` elements.
#pragma once
#include "simd/transpose.h"

namespace {

// Columns are taken `slab` at a time, so that the queries' part stays in the first-level cache
// while all rows pass.
inline constexpr int64_t slab_bytes = 4096;

template <class T, int Q, int R>
struct DotAccumulators {
  Vec<T> dot[Q][R], square[R];
};

template <class T, int Q, int R, bool NORMS>
DFK_INLINE DotAccumulators<T, Q, R> dot_block(const T* const* q, const T* rows, int64_t ld,
                                              int64_t k, int64_t end, DotAccumulators<T, Q, R> r) {
  for (; k < end; k += W<T>) {
    Vec<T> y[R];
    for (int j = 0; j < R; ++j) {
      y[j] = load(rows + j * ld + k);
      if (NORMS) r.square[j] += y[j] * y[j];
    }
    for (int i = 0; i < Q; ++i) {
      const Vec<T> x = load(q[i] + k);
      for (int j = 0; j < R; ++j) r.dot[i][j] += x * y[j];
    }
  }
  return r;
}

// out[i * ldo + j] = <q_i, row_j> for j < n, row_j = rows + j * ld; with NORMS also norm[j] =
// |row_j|^2.
template <class T, int Q, int R, bool NORMS>
void dot_some(const T* const* q, const T* rows, int64_t ld, int64_t n, int64_t width, T* out,
              int64_t ldo, T* norm) {
  constexpr int64_t slab = slab_bytes / sizeof(T), most = 8;
  for (int64_t j0 = 0; j0 < n; j0 += most * R) {
    const int64_t blocks = (n - j0) / R < most ? (n - j0) / R : most;
    DotAccumulators<T, Q, R> a[most];
    for (int64_t b = 0; b < blocks; ++b)
      a[b] = dot_block<T, Q, R, NORMS>(q, rows + (j0 + b * R) * ld, ld, 0,
                                       slab < width ? slab : width, {});
    for (int64_t k = slab; k < width; k += slab)
      for (int64_t b = 0; b < blocks; ++b)
        a[b] = dot_block<T, Q, R, NORMS>(q, rows + (j0 + b * R) * ld, ld, k,
                                         k + slab < width ? k + slab : width, a[b]);
    for (int64_t b = 0; b < blocks; ++b)
      for (int j = 0; j < R; ++j) {
        for (int i = 0; i < Q; ++i) out[i * ldo + j0 + b * R + j] = sum_lanes<T>(a[b].dot[i][j]);
        if (NORMS) norm[j0 + b * R + j] = sum_lanes<T>(a[b].square[j]);
      }
  }
}
template <class T, int Q, bool NORMS>
void dot_rows(const T* const* q, const T* rows, int64_t ld, int64_t n, int64_t width, T* out,
              int64_t ldo, T* norm) {
  const int64_t even = n / 4 * 4;
  if (even) dot_some<T, Q, 4, NORMS>(q, rows, ld, even, width, out, ldo, norm);
  if (n > even)
    dot_some<T, Q, 1, NORMS>(q, rows + even * ld, ld, n - even, width, out + even, ldo,
                             norm + even);
}

// Computes the same from a transposed tile cols[k * ldc + j], j < n (a multiple of the vector
// width). Atoms are in the lanes, which saves the sum over lanes; with few coordinates that would
// be most of the work. Terms are added 32 at a time, since the rounding error of one long chain
// would show in the weights.
template <class T, int Q, int V>
DFK_INLINE void dot_cols_block(const T* const* q, const T* cols, int64_t ldc, int64_t d, T* out,
                               int64_t ldo) {
  for (int64_t start = 0; start < d; start += 32) {
    const int64_t end = start + 32 < d ? start + 32 : d;
    Vec<T> acc[Q][V] = {};
    for (int64_t k = start; k < end; ++k) {
      Vec<T> y[V];
      for (int j = 0; j < V; ++j) y[j] = load(cols + k * ldc + j * W<T>);
      for (int i = 0; i < Q; ++i) {
        const Vec<T> x = all(q[i][k]);
        for (int j = 0; j < V; ++j) acc[i][j] += x * y[j];
      }
    }
    for (int i = 0; i < Q; ++i)
      for (int j = 0; j < V; ++j) {
        T* at = out + i * ldo + j * W<T>;
        store(at, start ? load(at) + acc[i][j] : acc[i][j]);
      }
  }
}
template <class T, int Q>
void dot_cols(const T* const* q, const T* cols, int64_t ldc, int64_t n, int64_t d, T* out,
              int64_t ldo) {
  int64_t j = 0;
  for (; j + 3 * W<T> <= n; j += 3 * W<T>)
    dot_cols_block<T, Q, 3>(q, cols + j, ldc, d, out + j, ldo);
  for (; j + 2 * W<T> <= n; j += 2 * W<T>)
    dot_cols_block<T, Q, 2>(q, cols + j, ldc, d, out + j, ldo);
  for (; j < n; j += W<T>) dot_cols_block<T, Q, 1>(q, cols + j, ldc, d, out + j, ldo);
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

// How many queries are taken together with a tile: eight dot products with three vectors of atoms
// fill the registers.
inline constexpr int tile_queries = 8;

// out[i * ldo + j] = <q_i, row_j> for i < count <= tile_queries; where norm is given also
// |row_j|^2. `cols` is the tile's transpose, or null.
template <class T>
void dots(int64_t count, const T* const* q, Rows<T> rows, const T* cols, int64_t n, int64_t width,
          T* out, int64_t ldo, T* norm) {
  if (cols) {
    const int64_t padded = round_up(n, W<T>);
    with_count<tile_queries>(
        count, [&](auto c) { dot_cols<T, c.value>(q, cols, padded, padded, width, out, ldo); });
    if (norm) squares(cols, padded, padded, width, norm);
    return;
  }
  for (int64_t i = 0; i < count; i += 4)
    with_count<4>(count - i < 4 ? count - i : 4, [&](auto c) {
      if (norm && i == 0)
        dot_rows<T, c.value, true>(q, rows.at, rows.ld, n, width, out, ldo, norm);
      else
        dot_rows<T, c.value, false>(q + i, rows.at, rows.ld, n, width, out + i * ldo, ldo, nullptr);
    });
}

// out[j] = |x - alpha rows[j]|^2, by differences, so that nothing cancels. Sixteen terms of a lane
// at a time are added up in double, since the rounding error of long sums would show in the
// weights.
template <class T, int R, class Out>
DFK_INLINE void distance_block(const T* x, T alpha, const T* const* rows, int64_t width, Out* out) {
  Vec<double> sum[R] = {};
  for (int64_t k = 0; k < width;) {
    const int64_t end = k + 16 * W<T> < width ? k + 16 * W<T> : width;
    Vec<T> part[R] = {};
    for (; k < end; k += W<T>) {
      const Vec<T> xk = load(x + k);
      for (int j = 0; j < R; ++j) {
        const Vec<T> u = xk - alpha * load(rows[j] + k);
        part[j] += u * u;
      }
    }
    for (int j = 0; j < R; ++j) sum[j] += widened<T>(part[j]);
  }
  for (int j = 0; j < R; ++j) out[j] = Out(sum_lanes<double>(sum[j]));
}
// out[i][j] = |x_i - alpha_i row_j|^2 from the transposed tile, 32 terms at a time as in dot_cols.
template <class T, int Q, int V>
DFK_INLINE void distance_cols_block(const T* const* x, const T* alpha, const T* cols, int64_t ldc,
                                    int64_t d, T* const* out, int64_t at) {
  for (int64_t start = 0; start < d; start += 32) {
    const int64_t end = start + 32 < d ? start + 32 : d;
    Vec<T> acc[Q][V] = {};
    for (int64_t k = start; k < end; ++k) {
      Vec<T> y[V];
      for (int j = 0; j < V; ++j) y[j] = load(cols + k * ldc + at + j * W<T>);
      for (int i = 0; i < Q; ++i) {
        const Vec<T> xk = all(x[i][k]);
        for (int j = 0; j < V; ++j) {
          const Vec<T> u = xk - alpha[i] * y[j];
          acc[i][j] += u * u;
        }
      }
    }
    for (int i = 0; i < Q; ++i)
      for (int j = 0; j < V; ++j) {
        T* to = out[i] + at + j * W<T>;
        store(to, start ? load(to) + acc[i][j] : acc[i][j]);
      }
  }
}
template <class T, int Q>
void distance_cols(const T* const* x, const T* alpha, const T* cols, int64_t ldc, int64_t n,
                   int64_t d, T* const* out) {
  int64_t j = 0;
  for (; j + 3 * W<T> <= n; j += 3 * W<T>)
    distance_cols_block<T, Q, 3>(x, alpha, cols, ldc, d, out, j);
  for (; j < n; j += W<T>) distance_cols_block<T, Q, 1>(x, alpha, cols, ldc, d, out, j);
}

template <class T, class Out>
void distances(const T* x, T alpha, const T* const* rows, int64_t n, int64_t width, Out* out) {
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) distance_block<T, 4>(x, alpha, rows + j, width, out + j);
  for (; j < n; ++j) distance_block<T, 1>(x, alpha, rows + j, width, out + j);
}

template <class T, int V>
DFK_INLINE Vec<T> shifted_block(const T* e, const T* const* rows, int64_t n, const T* reference,
                                T* dst, int64_t k) {
  Vec<T> from[V], sum[V] = {}, square[V] = {};
  for (int v = 0; v < V; ++v) from[v] = load(reference + k + v * W<T>);
  for (int64_t j = 0; j < n; ++j) {
    const Vec<T> weight = all(e[j]);
    for (int v = 0; v < V; ++v) {
      const Vec<T> t = load(rows[j] + k + v * W<T>) - from[v], part = weight * t;
      sum[v] += part;
      square[v] += part * t;
    }
  }
  for (int v = 0; v < V; ++v) {
    T* to = dst + k + v * W<T>;
    store(to, load(to) + sum[v]);
    if (v) square[0] += square[v];
  }
  return square[0];
}
// dst += sum_j e_j t_j, t_j = row_j - reference, for a few (n) rows; returns sum_j e_j |t_j|^2.
template <class T>
double add_about(const T* e, const T* const* rows, int64_t n, int64_t width, const T* reference,
                 T* dst) {
  constexpr int V = 4;
  Vec<T> sum{};
  int64_t k = 0;
  for (; k + V * W<T> <= width; k += V * W<T>)
    sum += shifted_block<T, V>(e, rows, n, reference, dst, k);
  for (; k < width; k += W<T>) sum += shifted_block<T, 1>(e, rows, n, reference, dst, k);
  return total<T>(sum);
}

// dst_i += sum_j coef_i[j] row_j; with SQUARE the rows enter squared elementwise. The sums take
// 64 rows at a time.
template <class T, int Q, int V, bool SQUARE>
DFK_INLINE void add_block(const T* const* coef, const T* rows, int64_t ld, int64_t n, T* const* dst,
                          int64_t k) {
  for (int64_t j = 0; j < n;) {
    const int64_t end = j + 64 < n ? j + 64 : n;
    Vec<T> acc[Q][V] = {};
    for (; j < end; ++j) {
      Vec<T> y[V];
      for (int v = 0; v < V; ++v) {
        y[v] = load(rows + j * ld + k + v * W<T>);
        if (SQUARE) y[v] *= y[v];
      }
      for (int i = 0; i < Q; ++i) {
        const Vec<T> c = all(coef[i][j]);
        for (int v = 0; v < V; ++v) acc[i][v] += c * y[v];
      }
    }
    for (int i = 0; i < Q; ++i)
      for (int v = 0; v < V; ++v) {
        T* to = dst[i] + k + v * W<T>;
        store(to, load(to) + acc[i][v]);
      }
  }
}
template <class T, int Q, bool SQUARE>
void add_weighted_rows(const T* const* coef, const T* rows, int64_t ld, int64_t n, int64_t width,
                       T* const* dst) {
  constexpr int V = Q <= 2 ? 8 : Q <= 4 ? 4 : 3;
  int64_t k = 0;
  for (; k + V * W<T> <= width; k += V * W<T>)
    add_block<T, Q, V, SQUARE>(coef, rows, ld, n, dst, k);
  for (; k < width; k += W<T>) add_block<T, Q, 1, SQUARE>(coef, rows, ld, n, dst, k);
}
// dst_i += sum_j coef_i[j] row_j for i < count <= tile_queries.
template <class T, bool SQUARE = false>
void weighted_sums(int64_t count, const T* const* coef, const T* rows, int64_t ld, int64_t n,
                   int64_t width, T* const* dst) {
  with_count<tile_queries>(
      count, [&](auto c) { add_weighted_rows<T, c.value, SQUARE>(coef, rows, ld, n, width, dst); });
}

}  // namespace
