// What a sweep knows of a query and of a tile of atoms, and how far it trusts expanded logits and
// the centre.
#pragma once
#include "simd/outlier.h"

namespace {

template <class T>
inline constexpr double epsilon = sizeof(T) == 4 ? 1.1920929e-7 : 2.220446e-16;

// Atoms lighter than exp(-gap) of the heaviest are left out: all N of them together weigh less than
// 1e-4 epsilon.
template <class T>
double weight_gap(const Problem<T>& p) {
  return __builtin_log(double(p.N) + 1) - __builtin_log(epsilon<T>) + 10;
}

// With z = alpha^2 |y|^2 / d sigma^2: taken about the centre only if z <= 2 centre_limit, as far as
// second moments about it are good to a few units in the last place; near while z + |x|^2 / d
// sigma^2 <= 2 near_limit.
inline constexpr double near_limit = 1;
template <class T>
double centre_limit(const Problem<T>& p) {
  return p.op == Op::posterior || p.op == Op::matvec ? 4 : 0.125;
}

template <class T>
struct Query {
  double k;     // -|x|^2 / 2 sigma^2, x less alpha times the centre as everywhere here
  double half;  // 1 / 2 sigma^2
  T alpha, by;  // by = alpha / sigma^2: rounding it scales all logits alike, and their differences
                // are small
  double h;     // alpha^2 / 2 sigma^2
  double square;  // |x|^2; inf where by overflows
};
template <class T>
Query<T> query_of(const T* x, int64_t d, double alpha, double sigma) {
  const double half = 0.5 / (sigma * sigma), square = dot(x, x, d);
  const T by = T(2 * alpha * half);
  return {-square * half,
          half,
          T(alpha),
          by,
          alpha * alpha * half,
          by - by == 0 ? square : __builtin_inf()};
}
// Whether T holds all terms of the expanded logits of atoms with |y|^2 <= norm, and the squares of
// their distances.
template <class T>
bool expands(const Query<T>& query, double norm) {
  const double terms = query.square + 2 * double(query.alpha) * query.alpha * norm;
  return terms <= largest_square<T> && terms * query.half <= largest_square<T>;
}

template <class T>
struct Tile {
  Rows<T> rows, raw;         // less the centre, and as they are
  const T* cols;             // the transpose in columns of `padded`, or null
  int64_t start, n, padded;  // padded: n rounded up to whole vectors
  T *norm, *log_prior;
  double largest_norm, largest_log_prior;
};

}  // namespace
