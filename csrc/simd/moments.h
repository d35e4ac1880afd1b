// The partial sums of one query and the three things that happen to them: a tile is added, the
// weights are rescaled when a heavier atom turns up, and the point about which moments are taken
// moves to it.
#pragma once
#include "simd/dots.h"

namespace {

struct Sums {
  double *top, *mass, *mass2, *spread, *tilt, *outlier;
  int64_t* ref;
  double *first, *second;
};
template <class T>
Sums sums_of(const Problem<T>& p, const Moments<T>& m, int64_t s, int64_t b) {
  const int64_t i = s * p.B + b;
  return {m.top + i,
          m.mass + i,
          m.mass2 + i,
          m.spread + i,
          m.tilt + i * p.K,
          m.outlier + i,
          m.ref + i,
          m.first + i * m.stride,
          m.second + i * m.rows * m.stride};
}
// Nothing gathered so far; outliers left out stay known.
template <class T>
void clear(const Problem<T>& p, const Moments<T>& m, Sums s) {
  *s.top = -__builtin_inf();
  *s.mass = *s.mass2 = *s.spread = 0;
  *s.ref = -1;
  for (int64_t k = 0; k < p.K; ++k) s.tilt[k] = 0;
}
template <class T>
void clear_vectors(const Moments<T>& m, Sums s) {
  memset(s.first, 0, size_t(m.stride) * sizeof(double));
  memset(s.second, 0, size_t(m.rows * m.stride) * sizeof(double));
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

// Weights become relative to exp(top).
template <class T>
void raise_top(const Problem<T>& p, const Moments<T>& m, Sums s, double top) {
  const double by = __builtin_exp(*s.top - top);
  *s.top = top;
  if (*s.mass == 0 || by == 1) return;
  *s.mass *= by;
  *s.mass2 *= by * by;
  *s.spread *= by;
  for (int64_t k = 0; k < p.K; ++k) s.tilt[k] *= by;
  for (int64_t k = 0; k < m.stride; ++k) s.first[k] *= by;
  for (int64_t k = 0; k < m.rows * m.stride; ++k) s.second[k] *= by;
}

// Moments about r become moments about r - delta. v: this query's K vectors, rows of `stride`.
template <class T>
void move_reference(const Problem<T>& p, const Moments<T>& m, Sums s, const double* delta,
                    const T* v) {
  const double mass = *s.mass;
  const int64_t w = m.stride;
  if (p.op == Op::posterior) {
    *s.spread += 2 * dot(delta, s.first, w) + mass * dot(delta, delta, w);
  } else if (p.op == Op::matvec) {
    for (int64_t k = 0; k < p.K; ++k) {
      const double shift = dot(delta, v + k * w, w);
      s.tilt[k] += mass * shift;
      add_scaled(s.second + k * w, w, shift, s.first);
      add_scaled(s.second + k * w, w, s.tilt[k], delta);
    }
  } else if (p.op == Op::diagonal) {
    for (int64_t k = 0; k < w; ++k) s.second[k] += delta[k] * (2 * s.first[k] + mass * delta[k]);
  } else {
    for (int64_t j = 0; j < p.d; ++j) {
      add_scaled(s.second + j * w, w, delta[j], s.first);
      add_scaled(s.second + j * w, w, s.first[j] + mass * delta[j], delta);
    }
  }
  add_scaled(s.first, w, mass, delta);
}

// along_j = <t_j, v> becomes e_j (along_j - origin); returns the sum. Near the mean of <t, v>, an
// origin keeps the second moment from being a small difference of large numbers.
template <class T>
double tilt_weights(const T* e, int64_t n, T* along, double* origin) {
  if (*origin != *origin) {
    double mass = 0, sum = 0;
    for (int64_t j = 0; j < n; ++j) {
      mass += e[j];
      sum += double(e[j]) * along[j];
    }
    *origin = mass > 0 ? T(sum / mass) : T(0);
  }
  const T shift = T(*origin);
  double tilt = 0;
  for (int64_t j = 0; j < n; ++j) {
    along[j] = e[j] * (along[j] - shift);
    tilt += along[j];
  }
  return tilt;
}

// Takes the origins back: sums of e <t, v_k> as Moments has them.
template <class T>
void settle(const Problem<T>& p, const Moments<T>& m, Sums s, double* origin) {
  for (int64_t k = 0; k < p.K; ++k) {
    if (origin[k] != 0 && origin[k] == origin[k]) {
      add_scaled(s.second + k * m.stride, m.stride, origin[k], s.first);
      s.tilt[k] += origin[k] * *s.mass;
    }
    origin[k] = 0;
  }
}

// One query while a tile is added.
template <class T>
struct Target {
  Sums sums;
  T* work;         // where this tile's vectors go: first, then the rows of second
  const T* v;      // K vectors, rows of `stride`
  const T* e;      // weights, zero where an atom does not count
  double* origin;  // [K] what is taken off <t, v_k>; set from the first tile where it is nan
};

// Adds e_j t_j and its like for up to `group` queries that share the rows t; the scalars go to the
// sums at once. norm: |t_j|^2. cols: the transpose of the rows, or null. coef: group * ld_coef.
template <class T>
void add_tile(const Problem<T>& p, const Moments<T>& m, int64_t count, const Target<T>* q,
              Rows<T> t, const T* cols, int64_t n, const T* norm, T* coef, int64_t ld_coef) {
  const T* in[group] = {};
  T* out[group] = {};
  for (int64_t i = 0; i < count; ++i) {
    in[i] = q[i].e;
    out[i] = q[i].work;
  }
  weighted_sums<T>(count, in, t.at, t.ld, n, m.stride, out);
  if (p.op == Op::posterior) {
    for (int64_t i = 0; i < count; ++i) {
      Vec<T> sum{};
      int64_t j = 0;
      for (; j + W<T> <= n; j += W<T>) sum += load(q[i].e + j) * load(norm + j);
      *q[i].sums.spread += total<T>(sum);
      for (; j < n; ++j) *q[i].sums.spread += double(q[i].e[j]) * norm[j];
    }
  } else if (p.op == Op::matvec) {
    for (int64_t k = 0; k < p.K; ++k) {
      for (int64_t i = 0; i < count; ++i) in[i] = q[i].v + k * m.stride;
      dots<T>(count, in, t, cols, n, m.stride, coef, ld_coef, nullptr);
      for (int64_t i = 0; i < count; ++i) {
        in[i] = coef + i * ld_coef;
        out[i] = q[i].work + (1 + k) * m.stride;
        q[i].sums.tilt[k] += tilt_weights(q[i].e, n, coef + i * ld_coef, q[i].origin + k);
      }
      weighted_sums<T>(count, in, t.at, t.ld, n, m.stride, out);
    }
  } else if (p.op == Op::diagonal) {
    for (int64_t i = 0; i < count; ++i) out[i] = q[i].work + m.stride;
    weighted_sums<T, true>(count, in, t.at, t.ld, n, m.stride, out);
  } else {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < p.d; k += group) {
        const int64_t some = p.d - k < group ? p.d - k : group;
        for (int64_t c = 0; c < some; ++c) {
          T* to = coef + c * ld_coef;
          for (int64_t j = 0; j < n; ++j) to[j] = q[i].e[j] * t.at[j * t.ld + k + c];
          in[c] = to;
          out[c] = q[i].work + (1 + k + c) * m.stride;
        }
        weighted_sums<T>(some, in, t.at, t.ld, n, m.stride, out);
      }
  }
}

// Merges the splits of query b into split 0: all about the reference of the heaviest, then a sum.
template <class T>
int merge(const Problem<T>& p, const Moments<T>& m, int64_t S, int64_t b) {
  int64_t best = 0;
  for (int64_t s = 1; s < S; ++s)
    if (m.top[s * p.B + b] > m.top[best * p.B + b]) best = s;
  const double top = m.top[best * p.B + b];
  const int64_t ref = m.ref[best * p.B + b], w = m.stride;
  if (S == 1 || !(top > -__builtin_inf())) return ok;
  Arena arena(2 * Arena::bytes<T>(w) + Arena::bytes<double>(w) + Arena::bytes<T>(w * p.K));
  if (!arena.ok()) return out_of_memory;
  T *there = arena.take<T>(w), *here = arena.take<T>(w), *v = arena.take<T>(w * p.K);
  double* delta = arena.take<double>(w);
  memset(there, 0, size_t(w) * sizeof(T));
  memset(here, 0, size_t(w) * sizeof(T));
  memset(v, 0, size_t(w * p.K) * sizeof(T));
  for (int64_t k = 0; k < p.K; ++k)
    memcpy(v + k * w, p.v + (b * p.K + k) * p.d, size_t(p.d) * sizeof(T));
  read_reference(p, ref, there);
  const Sums all = sums_of(p, m, 0, b);
  if (*all.mass == 0) clear_vectors(m, all);  // never begun: its vectors were not written
  for (int64_t s = 0; s < S; ++s) {
    const Sums part = sums_of(p, m, s, b);
    if (*part.mass == 0 && s > 0) continue;
    if (*part.mass > 0) {
      if (*part.ref != ref) {
        read_reference(p, *part.ref, here);
        for (int64_t k = 0; k < w; ++k) delta[k] = double(here[k]) - there[k];
        move_reference(p, m, part, delta, v);
      }
      raise_top(p, m, part, top);
    }
    *part.top = top;
    *part.ref = ref;
    if (s == 0) continue;
    *all.mass += *part.mass;
    *all.mass2 += *part.mass2;
    *all.spread += *part.spread;
    for (int64_t k = 0; k < p.K; ++k) all.tilt[k] += part.tilt[k];
    add_scaled(all.first, w, 1, part.first);
    add_scaled(all.second, m.rows * w, 1, part.second);
  }
  return ok;
}

}  // namespace
