// The inner loops: dot products, squared distances and weighted sums of rows, blocked so that the
// accumulators stay in registers (simd/blocking.h). Rows are whole vectors long (zero padded),
// `width` elements.
#pragma once
#include "simd/transpose.h"

namespace {

// A block of a product, i < Q: out[i][at + j] (+)= sum_k c_i[k] m[k * ld + j] for V vectors of j.
// With AHEAD it asks for as much memory from `ahead` on, little by little: the CPU drops what is
// asked for in bursts.
template <class T, int Q, int V, bool SQUARE = false, bool AHEAD = false>
DFK_INLINE void product_block(const T* const* c, const T* m, int64_t ld, int64_t k, int64_t end,
                              int64_t chain, bool add, T* const* out, int64_t at,
                              const T* ahead = nullptr) {
  for (; k < end; add = true) {
    const int64_t stop = k + chain < end ? k + chain : end;
    Vec<T> sum[Q][V] = {};
    for (; k < stop; ++k) {
      Vec<T> y[V];
      for (int v = 0; v < V; ++v) {
        y[v] = load(m + k * ld + v * W<T>);
        if (AHEAD) __builtin_prefetch(ahead + v * W<T>, 0, 2);
        if (SQUARE) y[v] *= y[v];
      }
      for (int i = 0; i < Q; ++i) {
        const Vec<T> x = all(c[i][k]);
        for (int v = 0; v < V; ++v) sum[i][v] += x * y[v];
      }
      if (AHEAD) ahead += V * W<T>;
    }
    for (int i = 0; i < Q; ++i)
      for (int v = 0; v < V; ++v) {
        T* const to = out[i] + at + v * W<T>;
        store(to, add ? load(to) + sum[i][v] : sum[i][v]);
      }
  }
}

// out_i (+)= sum_k c_i[k] row_k for i < count, the rows `columns` long; a slab of rows at a time.
template <class T, bool SQUARE = false>
void products(int64_t count, const T* const* c, Rows<T> rows, int64_t n, int64_t columns,
              int64_t chain, bool add, T* const* out) {
  const T* ahead = rows.ahead;
  for (int64_t k = 0; k < n; k += slab, add = true) {
    const int64_t end = k + slab < n ? k + slab : n;
    for_each_panel<T>(columns, [&](int64_t at, auto vectors) {
      constexpr int V = vectors.value;
      const T* const m = rows.panels ? rows.panels + at * n : rows.at + at;
      const int64_t ld = rows.panels ? V * W<T> : rows.ld;
      for (int64_t i = 0; i < count; i += block.queries)
        with_count<block.queries>(count - i, [&](auto queries) {
          constexpr int Q = queries.value;
          if (ahead && i == 0)
            product_block<T, Q, V, SQUARE, true>(c, m, ld, k, end, chain, add, out, at, ahead);
          else
            product_block<T, Q, V, SQUARE>(c + i, m, ld, k, end, chain, add, out + i, at);
        });
      if (ahead) ahead += (end - k) * V * W<T>;
    });
  }
}

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
  // The queries' part of these columns stays in the first-level cache while all rows pass.
  constexpr int64_t slab = 4096 / sizeof(T), most = 8;
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
  constexpr int R = Q <= 2 ? 4 : block.rows;
  const int64_t even = n / R * R;
  if (even) dot_some<T, Q, R, NORMS>(q, rows, ld, even, width, out, ldo, norm);
  if (n > even)
    dot_some<T, Q, 1, NORMS>(q, rows + even * ld, ld, n - even, width, out + even, ldo,
                             norm + even);
}

// out[i * ldo + j] = sum_k q_i[k] column_k[j] for i < count <= tile_queries and all `padded` j: dot
// products from the d columns of a tile.
template <class T>
void dots_of_columns(int64_t count, const T* const* q, Rows<T> columns, int64_t padded, int64_t d,
                     T* out, int64_t ldo) {
  T* to[tile_queries];
  for (int64_t i = 0; i < count; ++i) to[i] = out + i * ldo;
  products<T>(count, q, columns, d, padded, dot_chain, false, to);
}

// out[i * ldo + j] = <q_i, row_j> for i < count <= tile_queries; where norm is given also
// |row_j|^2. `cols` is the tile's packed transpose, or null.
template <class T>
void dots(int64_t count, const T* const* q, Rows<T> rows, const T* cols, int64_t n, int64_t width,
          T* out, int64_t ldo, T* norm) {
  if (cols) {
    const int64_t padded = round_up(n, W<T>);
    dots_of_columns<T>(count, q, {nullptr, 0, cols}, padded, width, out, ldo);
    if (norm) squares(cols, padded, width, norm);
    return;
  }
  for (int64_t i = 0; i < count; i += block.row_queries)
    with_count<block.row_queries>(count - i, [&](auto c) {
      if (norm && i == 0)
        dot_rows<T, c.value, true>(q, rows.at, rows.ld, n, width, out, ldo, norm);
      else
        dot_rows<T, c.value, false>(q + i, rows.at, rows.ld, n, width, out + i * ldo, ldo, nullptr);
    });
}

// out[j] = |x - alpha rows[j]|^2, by differences, so that nothing cancels; with METRIC every square
// times its coordinate's number in `metric`. Sixteen terms of a lane at a time are added up in
// double, since the rounding error of long sums would show in the weights.
template <class T, int R, bool METRIC, class Out>
DFK_INLINE void distance_block(const T* x, T alpha, const T* const* rows, int64_t width, Out* out,
                               const T* metric) {
  Vec<double> sum[R] = {};
  for (int64_t k = 0; k < width;) {
    const int64_t end = k + 16 * W<T> < width ? k + 16 * W<T> : width;
    Vec<T> part[R] = {};
    for (; k < end; k += W<T>) {
      const Vec<T> xk = load(x + k);
      for (int j = 0; j < R; ++j) {
        const Vec<T> u = xk - alpha * load(rows[j] + k);
        part[j] += METRIC ? u * u * load(metric + k) : u * u;
      }
    }
    for (int j = 0; j < R; ++j) sum[j] += widened<T>(part[j]);
  }
  for (int j = 0; j < R; ++j) out[j] = Out(sum_lanes<double>(sum[j]));
}
// out[i][j] = |x_i - alpha_i row_j|^2 from the packed transpose, in chains as in dots; with METRIC
// in the metric of query i.
template <class T, int Q, int V, bool METRIC>
DFK_INLINE void distance_cols_block(const T* const* x, const T* alpha, const T* panel, int64_t d,
                                    T* const* out, int64_t at, const T* const* metric) {
  for (int64_t k = 0; k < d;) {
    const bool add = k > 0;
    const int64_t end = k + dot_chain < d ? k + dot_chain : d;
    Vec<T> sum[Q][V] = {};
    for (; k < end; ++k) {
      Vec<T> y[V];
      for (int v = 0; v < V; ++v) y[v] = load(panel + (k * V + v) * W<T>);
      for (int i = 0; i < Q; ++i) {
        const Vec<T> xk = all(x[i][k]);
        for (int v = 0; v < V; ++v) {
          const Vec<T> u = xk - alpha[i] * y[v];
          sum[i][v] += METRIC ? u * u * metric[i][k] : u * u;
        }
      }
    }
    for (int i = 0; i < Q; ++i)
      for (int v = 0; v < V; ++v) {
        T* const to = out[i] + at + v * W<T>;
        store(to, add ? load(to) + sum[i][v] : sum[i][v]);
      }
  }
}
template <class T, bool METRIC = false>
void distance_cols(int64_t count, const T* const* x, const T* alpha, const T* cols, int64_t padded,
                   int64_t d, T* const* out, const T* const* metric = nullptr) {
  constexpr int Q = block.queries / 2;  // a difference takes one more register
  for_each_panel<T>(padded, [&](int64_t at, auto vectors) {
    for (int64_t i = 0; i < count; i += Q)
      with_count<Q>(count - i, [&](auto c) {
        distance_cols_block<T, c.value, vectors.value, METRIC>(
            x + i, alpha + i, cols + at * d, d, out + i, at, METRIC ? metric + i : nullptr);
      });
  });
}

template <class T, bool METRIC = false, class Out>
void distances(const T* x, T alpha, const T* const* rows, int64_t n, int64_t width, Out* out,
               const T* metric = nullptr) {
  int64_t j = 0;
  for (; j + 4 <= n; j += 4)
    distance_block<T, 4, METRIC>(x, alpha, rows + j, width, out + j, metric);
  for (; j < n; ++j) distance_block<T, 1, METRIC>(x, alpha, rows + j, width, out + j, metric);
}

// first += sum_j e_j t_j, t_j = row_j - reference, in V vectors from k on. Returns sum_j e_j t_j^2
// in one vector, or adds it to `square`, elementwise.
template <class T, int V, bool SQUARE>
DFK_INLINE Vec<T> shifted_block(const T* e, const T* const* rows, int64_t n, const T* reference,
                                T* first, T* square, int64_t k) {
  Vec<T> from[V], sum[V] = {}, square_sum[V] = {};
  for (int v = 0; v < V; ++v) from[v] = load(reference + k + v * W<T>);
  for (int64_t j = 0; j < n; ++j) {
    const Vec<T> weight = all(e[j]);
    for (int v = 0; v < V; ++v) {
      const Vec<T> t = load(rows[j] + k + v * W<T>) - from[v], part = weight * t;
      sum[v] += part;
      square_sum[v] += part * t;
    }
  }
  for (int v = 0; v < V; ++v) {
    const int64_t at = k + v * W<T>;
    store(first + at, load(first + at) + sum[v]);
    if (SQUARE) store(square + at, load(square + at) + square_sum[v]);
    if (v) square_sum[0] += square_sum[v];
  }
  return square_sum[0];
}
// first += sum_j e_j t_j, t_j = row_j - reference, for a few (n) rows, which are read where they
// are; returns sum_j e_j |t_j|^2. With SQUARE also square += sum_j e_j t_j^2, elementwise.
template <class T, bool SQUARE = false>
double add_about(const T* e, const T* const* rows, int64_t n, int64_t width, const T* reference,
                 T* first, T* square = nullptr) {
  constexpr int V = 4;
  double square_sum = 0;
  for (int64_t j = 0; j < n; j += sum_chain) {
    const int64_t some = n - j < sum_chain ? n - j : sum_chain;
    Vec<T> sum{};
    int64_t k = 0;
    for (; k + V * W<T> <= width; k += V * W<T>)
      sum += shifted_block<T, V, SQUARE>(e + j, rows + j, some, reference, first, square, k);
    for (; k < width; k += W<T>)
      sum += shifted_block<T, 1, SQUARE>(e + j, rows + j, some, reference, first, square, k);
    square_sum += total<T>(sum);
  }
  return square_sum;
}

// dst_i += sum_j coef_i[j] row_j for i < count <= tile_queries; with SQUARE the rows enter squared
// elementwise.
template <class T, bool SQUARE = false>
void weighted_sums(int64_t count, const T* const* coef, Rows<T> rows, int64_t n, int64_t width,
                   T* const* dst) {
  products<T, SQUARE>(count, coef, rows, n, width, sum_chain, true, dst);
}

}  // namespace
