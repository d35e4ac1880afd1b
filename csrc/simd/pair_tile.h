// A tile of atoms with the weights that some queries give them, as every kernel of the first
// derivatives takes it (dfkernels/ops/common/pair_kernels.py has the formulas), and the products of
// which such kernels are made.
//
// simd/pair_sweep.h makes the tiles: of given shift and reference, with e = exp(logit - shift), t
// less the reference of one query or less the centre for several, and e = 0 where an atom is
// masked, negligible or an outlier. simd/pair_forms.h makes of a tile the weight c = e f of reverse
// mode or the tangent tau of a logit. What is done with these is the kernel's own: simd/pair_sums.h
// adds them up per query.
#pragma once
#include "simd/query.h"

namespace {

// One row per atom, with the packed transpose where there are many queries, or, of small d, only
// the transpose with rows of `padded`.
template <class T>
struct Matrix {
  Rows<T> rows;
  const T* cols;
};

template <class T>
struct PairTile {
  int64_t count;            // queries, at most tile_queries
  const int64_t* queries;   // their places among those of the sweep
  const T* const* weight;   // [padded] of each: e
  bool about_centre;        // else t is less the reference of the only query
  int64_t n, padded;        // atoms, and these in whole vectors
  int64_t width;            // of a row: d in whole vectors, or d where there are only columns
  Matrix<T> t;              // always
  Matrix<T> squares;        // t * t, where the forms need it
  Matrix<T> tangents;       // dy of the atoms' values, where it is given
  Matrix<T> products;       // t * dy, where the forms need it
  const T* norm;            // |t|^2
  const T* along;           // <t, dy>, where dy is given
  const T* log_pi_tangent;  // where it is given
  const int64_t* atoms;     // their rows in y
};

// out[i * ldo + j] = <q_i, row_j>, and 0 in the padding.
template <class T>
void project(const PairTile<T>& t, const Matrix<T>& m, const T* const* q, T* out, int64_t ldo) {
  if (!m.rows.at)
    return dots_of_columns<T>(t.count, q, {m.cols, t.padded}, t.padded, t.width, out, ldo);
  dots<T>(t.count, q, m.rows, m.cols, t.n, t.width, out, ldo, nullptr);
  if (m.cols) return;
  for (int64_t i = 0; i < t.count; ++i)
    for (int64_t j = t.n; j < t.padded; ++j) out[i * ldo + j] = 0;
}

// to_i += sum_j coef_i[j] row_j.
template <class T>
void add_rows_of(const PairTile<T>& t, const Matrix<T>& m, const T* const* coef, T* const* to) {
  if (m.rows.at) return weighted_sums<T>(t.count, coef, m.rows, t.n, t.width, to);
  for (int64_t i = 0; i < t.count; ++i)
    for (int64_t k = 0; k < t.width; ++k) {
      Vec<T> sum{};
      for (int64_t j = 0; j < t.padded; j += W<T>)
        sum += load(coef[i] + j) * load(m.cols + k * t.padded + j);
      to[i][k] += T(total<T>(sum));
    }
}

// The tangent of the value of the atom in a row of y, padded to w.
template <class T>
void read_tangent(const Problem<T>& p, const PairArguments<T>& a, int64_t row, int64_t w, T* out) {
  const T* const from = a.dy + row * a.dy_stride;
  for (int64_t k = 0; k < w; ++k) out[k] = k < p.d ? from[k] : T(0);
}

// A sum over a tile: 16 terms of a lane in T, these in double.
template <class T, class F>
DFK_INLINE double sum_over(int64_t padded, const F& f) {
  double sum = 0;
  for (int64_t j = 0; j < padded;) {
    const int64_t end = j + 16 * W<T> < padded ? j + 16 * W<T> : padded;
    Vec<T> part{};
    for (; j < end; j += W<T>) part += f(j);
    sum += total<T>(part);
  }
  return sum;
}

}  // namespace
