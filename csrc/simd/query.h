// What a sweep knows of a query and of a tile of atoms, and how far expanded logits and the centre
// can be trusted.
#pragma once
#include "simd/moment_kinds.h"
#include "simd/outlier.h"

namespace {

template <class T>
inline constexpr double epsilon = sizeof(T) == 4 ? 1.1920929e-7 : 2.220446e-16;

// Atoms that are lighter than exp(-gap) times the heaviest are negligible: all N of them together
// weigh less than 1e-4 epsilon.
template <class T>
double weight_gap(const Problem<T>& p) {
  return __builtin_log(double(p.N) + 1) - __builtin_log(epsilon<T>) + 10;
}

// With z = alpha^2 |y|^2 / 2 sigma^2: the centre is the reference only where z <= centre_limit d,
// since second moments about it are then good to a few units in the last place. What is rounded is
// the weighted mean of |y|^2, or elementwise (diagonal) of y * y, a vector whose norm is no larger
// than the largest |y * y|. Times (alpha / sigma)^2 that is 2 z beside the trace's unit d, or 2 z /
// sqrt(d) beside sqrt(d) if sqrt(d) |y * y| stands for |y|^2 in z: the same where all coordinates
// are alike, and sqrt(d) times as much where one of them is all of y. dense measures its atoms by
// |y|^2, and has a small limit instead. Expanded logits are used as they are only where
// z + |x|^2 / 2 sigma^2 <= expanded_limit d.
inline constexpr double expanded_limit = 1;

template <class T>
struct Query {
  double constant;        // -|x|^2 / 2 sigma^2, where x is less alpha times the centre
  double half_precision;  // 1 / 2 sigma^2
  T alpha;
  T factor;  // alpha / sigma^2: rounding it scales all logits alike, whose differences are small
  double atom_factor;  // alpha^2 / 2 sigma^2
  double square;       // |x|^2, or inf where factor overflows
};
template <class T>
Query<T> query_of(const T* x, int64_t d, double alpha, double sigma) {
  const double half_precision = 0.5 / (sigma * sigma), square = dot(x, x, d);
  const T factor = T(2 * alpha * half_precision);
  return {.constant = -square * half_precision,
          .half_precision = half_precision,
          .alpha = T(alpha),
          .factor = factor,
          .atom_factor = alpha * alpha * half_precision,
          .square = factor - factor == 0 ? square : __builtin_inf()};
}
// Whether T holds all terms of the expanded logits of atoms with |y|^2 <= norm, and the squares of
// their distances.
template <class T>
bool expands(const Query<T>& query, double norm) {
  const double terms = query.square + 2 * double(query.alpha) * query.alpha * norm;
  return terms <= largest_square<T> && terms * query.half_precision <= largest_square<T>;
}

// Whether expanded logits of such atoms, of d coordinates, are as exact as those by differences.
template <class T>
bool expands_exactly(const Query<T>& query, double norm, int64_t d) {
  return query.atom_factor * norm - query.constant <= expanded_limit * double(d);
}

// |alpha <x, y>| / sigma^2 is no larger for such atoms.
template <class T>
double largest_product(const Query<T>& query, double norm) {
  return __builtin_fabs(double(query.factor)) * __builtin_sqrt(query.square * norm);
}

template <class T>
struct Tile {
  Rows<T> rows, raw;         // less the centre, and as they are
  const T* cols;             // the packed transpose of all `padded`, or null
  int64_t start, n, padded;  // padded: n rounded up to whole vectors
  T *norm, *log_prior;
  double largest_norm, largest_log_prior;
};

}  // namespace
