// The partial sums of one query, and what a moment kind (moments/<kind>.h) is made of: the tiles
// that it adds up, and the arithmetic that kinds share. The kinds themselves come together in
// simd/moment_kinds.h.
#pragma once
#include "simd/dots.h"
#include "simd/race.h"

namespace {

// The place of one query's sums in Moments.
struct QuerySums {
  double *max_logit, *weight_sum, *weight_square_sum, *square_moment, *projection_sum;
  double* outlier_logit;
  int64_t* reference;
  double *first_moment, *second_moment;
  BlockRace* race;  // or null
};
template <class T>
QuerySums sums_of(const Problem<T>& p, const Moments<T>& m, int64_t s, int64_t b) {
  const int64_t i = s * p.B + b;
  return {.max_logit = m.max_logit + i,
          .weight_sum = m.weight_sum + i,
          .weight_square_sum = m.weight_square_sum + i,
          .square_moment = m.square_moment + i,
          .projection_sum = m.projection_sum + i * p.K,
          .outlier_logit = m.outlier_logit + i,
          .reference = m.reference + i,
          .first_moment = m.first_moment + i * m.first_rows * m.stride,
          .second_moment = m.second_moment + i * m.second_rows * m.stride,
          .race = m.race ? m.race + i : nullptr};
}

// Forgets what was added up so far, but not the outliers that were left out.
template <class T>
void clear(const Problem<T>& p, const QuerySums& s) {
  *s.max_logit = -__builtin_inf();
  *s.weight_sum = *s.weight_square_sum = *s.square_moment = 0;
  *s.reference = -1;
  for (int64_t k = 0; k < p.K; ++k) s.projection_sum[k] = 0;
  if (s.race) clear_race(*s.race);
}
template <class T>
void clear_vectors(const Moments<T>& m, const QuerySums& s) {
  memset(s.first_moment, 0, size_t(m.first_rows * m.stride) * sizeof(double));
  memset(s.second_moment, 0, size_t(m.second_rows * m.stride) * sizeof(double));
}

template <class A, class B>
void add_scaled(A* a, int64_t n, double by, const B* b) {
  for (int64_t k = 0; k < n; ++k) a[k] += A(by * b[k]);
}
template <class A, class B>
double dot(const A* a, const B* b, int64_t n) {
  double sum[8] = {};  // n is a multiple of the vector width at least 2
  for (int64_t k = 0; k < n; k += 8)
    for (int64_t u = 0; u < 8 && k + u < n; ++u) sum[u] += double(a[k + u]) * b[k + u];
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

// Where the exponential of simd/vec.h gives 0.
template <class T>
inline constexpr double weightless = sizeof(T) == 4 ? 1.7e-38 : 3.3e-308;  // exp(-87), exp(-708)

// Makes the weights relative to exp(max_logit).
template <class T>
void raise_max_logit(const Problem<T>& p, const Moments<T>& m, const QuerySums& s,
                     double max_logit) {
  const double by = __builtin_exp(*s.max_logit - max_logit);
  *s.max_logit = max_logit;
  if (*s.weight_sum == 0 || by == 1) return;
  // Values of atoms that are weightless by now may be nan, and stay so by multiplication.
  if (p.values.at && by < weightless<T>) clear_vectors(m, s);
  *s.weight_sum *= by;
  *s.weight_square_sum *= by * by;
  *s.square_moment *= by;
  if (s.race) rescale_race(*s.race, by);
  for (int64_t k = 0; k < p.K; ++k) s.projection_sum[k] *= by;
  for (int64_t k = 0; k < m.first_rows * m.stride; ++k) s.first_moment[k] *= by;
  for (int64_t k = 0; k < m.second_rows * m.stride; ++k) s.second_moment[k] *= by;
}

// Puts back what was taken off the projections, so that the sums are those that Moments promises.
template <class T>
void restore_projections(const Problem<T>& p, const Moments<T>& m, const QuerySums& s,
                         double* origin) {
  for (int64_t k = 0; k < p.K; ++k) {
    if (origin[k] != 0 && origin[k] == origin[k]) {
      add_scaled(s.second_moment + k * m.stride, m.stride, origin[k], s.first_moment);
      s.projection_sum[k] += origin[k] * *s.weight_sum;
    }
    origin[k] = 0;
  }
}

// The working state of one query while a tile is added.
template <class T>
struct QueryInTile {
  QuerySums sums;
  T* vectors;       // where this tile's vectors go: the first moments, then the second
  const T* v;       // K vectors, rows of `stride`
  const T* weight;  // zero where an atom does not count
  double* origin;   // [K] what is taken off <t, v_k>; nan until the first tile sets it
};

// A tile of atoms t, less the reference, with the queries that share it.
template <class T>
struct WeightedTile {
  int64_t count;
  const QueryInTile<T>* queries;
  Rows<T> rows;
  const T* cols;  // the packed transpose of the rows, or null
  int64_t n;
  const T* norm;  // |t|^2, or null where the rows were shifted for one query
  T* scratch;     // [tile_queries, scratch_stride]
  int64_t scratch_stride;
};

// Adds the moments of n rows less the reference, which are read where they are. vectors: as in
// QueryInTile, rows of `width`.
template <class T>
using AddRows = void (*)(const QuerySums&, const T* weight, const T* const* rows, int64_t n,
                         int64_t width, const T* reference, T* vectors);

// A tile of atoms of few coordinates, with one query's weights: coordinate k of the atoms stands at
// cols + k * padded.
template <class T>
struct SmallDTile {
  const T *cols, *weight;
  int64_t padded;  // a multiple of four vectors
  T* scratch;      // [padded]

  struct Pair {
    double first, square;
  };
  // sum_j c_j (y_jk - reference), and the same with the difference squared.
  template <bool SQUARE = true>
  Pair moments_of(const T* c, int64_t k, T reference) const {
    Vec<T> first[4] = {}, square[4] = {};
    const T* y = cols + k * padded;
    for (int64_t j = 0; j < padded; j += 4 * W<T>)
      for (int u = 0; u < 4; ++u) {
        const Vec<T> t = load(y + j + u * W<T>) - reference, ct = load(c + j + u * W<T>) * t;
        first[u] += ct;
        if (SQUARE) square[u] += ct * t;
      }
    return {total<T>((first[0] + first[1]) + (first[2] + first[3])),
            SQUARE ? total<T>((square[0] + square[1]) + (square[2] + square[3])) : 0.0};
  }
  void add_first_moment(int64_t d, const T* reference, const QuerySums& sums) const {
    for (int64_t k = 0; k < d; ++k)
      sums.first_moment[k] += moments_of<false>(weight, k, reference[k]).first;
  }
  // Adds sum_j scratch_j (y_j - reference) to out[0, d).
  void add_scratch_moment(int64_t d, const T* reference, double* out) const {
    for (int64_t k = 0; k < d; ++k) out[k] += moments_of<false>(scratch, k, reference[k]).first;
  }
};

}  // namespace
