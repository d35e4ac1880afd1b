// Tiles in the order in which the inner loops read them: transposed, and packed in panels.
#pragma once
#include "simd/blocking.h"
#include "simd/tile.h"

namespace {

#if DFK_VECTOR_BYTES == 64 && defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
#define DFK_TRANSPOSE_16
#define DFK_SHUFFLE __builtin_shufflevector
// Transposes a 16 x 16 block in registers, first by shuffles that stay within 128 bits.
DFK_INLINE void transpose_16(Vec<float>* v) {
  Vec<float> t[16], u[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = DFK_SHUFFLE(v[i], v[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    t[i + 1] =
        DFK_SHUFFLE(v[i], v[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
  for (int g = 0; g < 16; g += 4)
    for (int h = 0; h < 2; ++h) {
      const Vec<float> a = t[g + h], b = t[g + h + 2];
      u[g + 2 * h] = DFK_SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
      u[g + 2 * h + 1] =
          DFK_SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
  for (int c = 0; c < 4; ++c) {
    Vec<float> half[2][2];
    for (int h = 0; h < 2; ++h) {
      const Vec<float> a = u[8 * h + c], b = u[8 * h + 4 + c];
      half[h][0] = DFK_SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
      half[h][1] = DFK_SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    for (int h = 0; h < 2; ++h) {
      const Vec<float> a = half[0][h], b = half[1][h];
      v[8 * h + c] = DFK_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
      v[8 * h + 4 + c] =
          DFK_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
  }
}
#undef DFK_SHUFFLE
#endif

// Transposes a block of any width W by log2(W) rounds, each of which interleaves the first half
// with the second.
template <class T>
DFK_INLINE void transpose_square(Vec<T>* v) {
#ifdef DFK_TRANSPOSE_16
  if constexpr (sizeof(T) == 4) return transpose_16(v);
#endif
  Vec<T> u[W<T>];
  IntVec<T> low, high;
  for (int i = 0; i < W<T>; ++i) {
    low[i] = i / 2 + (i % 2) * W<T>;
    high[i] = low[i] + W<T> / 2;
  }
  for (int h = 1; h < W<T>; h *= 2) {
    for (int i = 0; i < W<T> / 2; ++i) {
#if defined(__clang__)
      for (int l = 0; l < W<T>; ++l) {
        u[2 * i][l] = l % 2 ? v[i + W<T> / 2][l / 2] : v[i][l / 2];
        u[2 * i + 1][l] = l % 2 ? v[i + W<T> / 2][l / 2 + W<T> / 2] : v[i][l / 2 + W<T> / 2];
      }
#else
      u[2 * i] = __builtin_shuffle(v[i], v[i + W<T> / 2], low);
      u[2 * i + 1] = __builtin_shuffle(v[i], v[i + W<T> / 2], high);
#endif
    }
    for (int i = 0; i < W<T>; ++i) v[i] = u[i];
  }
}

// cols[k * ldc + j] = rows[j][k] for j < n; columns n .. ldc are zero.
template <class T>
void transpose(Rows<T> rows, int64_t n, int64_t d, T* cols, int64_t ldc) {
  const int64_t whole = n / W<T> * W<T>, wide = d / W<T> * W<T>;
  for (int64_t j = 0; j < whole; j += W<T>)
    for (int64_t k = 0; k < wide; k += W<T>) {
      Vec<T> v[W<T>];
      for (int i = 0; i < W<T>; ++i) v[i] = load(rows.at + (j + i) * rows.ld + k);
      transpose_square<T>(v);
      for (int i = 0; i < W<T>; ++i) store(cols + (k + i) * ldc + j, v[i]);
    }
  for (int64_t k = 0; k < d; ++k) {
    for (int64_t j = k < wide ? whole : 0; j < n; ++j) cols[k * ldc + j] = rows.at[j * rows.ld + k];
    for (int64_t j = n; j < ldc; ++j) cols[k * ldc + j] = 0;
  }
}

// A matrix whose rows are `columns` long, in whole vectors, packed in panels of block.vectors
// vectors, the last of which may be narrower: one row of a panel follows the other. Calls
// f(first column, V) for every panel, V having its vectors as a constant.
template <class T, int V = block.vectors, class F>
DFK_INLINE void for_each_panel(int64_t columns, const F& f, int64_t at = 0) {
  for (; at + V * W<T> <= columns; at += V * W<T>) f(at, Count<V>{});
  if constexpr (V > 1) for_each_panel<T, V - 1>(columns, f, at);
}

// Asks for rows in the order in which they lie in memory, while others that came before are packed,
// which goes across the rows. It may run past the last row: no address is too far for it.
template <class T>
struct Prefetch {
  const T* row;
  int64_t ld, width, at = 0;
  __attribute__((always_inline)) inline void fetch(int64_t count) {
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t i = 0; i < count; i += line) {
      __builtin_prefetch(row + at, 0, 2);
      at += line;
      if (at >= width) row += ld, at = 0;
    }
  }
};

// Packs n rows of `width` columns, and their transpose, whose rows are `padded` long: n rounded up
// to whole vectors, the columns from n on zero. row_panels may be null.
template <class T>
void pack(Rows<T> rows, int64_t n, int64_t width, T* row_panels, T* col_panels) {
  constexpr int64_t step = block.vectors * W<T>;
  const int64_t padded = round_up(n, W<T>);
  // Where column k of a matrix with `count` rows of `columns` starts, and how long its panel's rows
  // are.
  const auto stride = [](int64_t k, int64_t columns) {
    const int64_t rest = columns - k / step * step;
    return rest < step ? rest : step;
  };
  const auto start = [](int64_t k, int64_t count) { return k / step * step * count + k % step; };
  for (int64_t j = 0; j < n; j += W<T>) {
    const int64_t count = n - j < W<T> ? n - j : W<T>, col_stride = stride(j, padded);
    T* const col = col_panels + start(j, width);
    Prefetch<T> ahead{rows.at + (j + W<T>)*rows.ld, rows.ld, width};
    for (int64_t k = 0; k < width; k += W<T>) {
      const int64_t row_stride = stride(k, width);
      ahead.fetch(W<T> * W<T>);
      Vec<T> v[W<T>];
      for (int i = 0; i < W<T>; ++i)
        v[i] = i < count ? load(rows.at + (j + i) * rows.ld + k) : Vec<T>{};
      if (row_panels)
        for (int64_t i = 0; i < count; ++i)
          store(row_panels + start(k, n) + (j + i) * row_stride, v[i]);
      transpose_square<T>(v);
      for (int i = 0; i < W<T>; ++i) store(col + (k + i) * col_stride, v[i]);
    }
  }
}

// norm[j] = |row_j|^2 for j < padded, from the packed transpose.
template <class T>
void squares(const T* cols, int64_t padded, int64_t d, T* norm) {
  for_each_panel<T>(padded, [&](int64_t at, auto vectors) {
    constexpr int V = vectors.value;
    const T* const panel = cols + at * d;
    Vec<T> sum[V] = {};
    for (int64_t k = 0; k < d;) {
      const int64_t end = k + dot_chain < d ? k + dot_chain : d;
      Vec<T> part[V] = {};
      for (; k < end; ++k)
        for (int v = 0; v < V; ++v) {
          const Vec<T> y = load(panel + (k * V + v) * W<T>);
          part[v] += y * y;
        }
      for (int v = 0; v < V; ++v) sum[v] += part[v];
    }
    for (int v = 0; v < V; ++v) store(norm + at + v * W<T>, sum[v]);
  });
}

}  // namespace
