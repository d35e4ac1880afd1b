// The sums of first derivatives per query: grad x, alpha, sigma and v of reverse mode, and the
// tangents of all sums of forward mode.
#pragma once
#include "simd/pair_forms.h"

namespace {

// Adds up what tiles say. Those less the centre and those less the reference go to sums of their
// own, in T; flush() makes one of them, about the reference and in double.
template <class T>
class PairSums {
 public:
  PairSums(const Problem<T>& p, const PairArguments<T>& a, const PairOutput<T>& out, int64_t s,
           int64_t b0, int64_t B, int64_t tile)
      : p_(p),
        a_(a),
        out_(out),
        s_(s),
        b0_(b0),
        B_(B),
        tile_(tile),
        forms_(p, a, out.stride, b0, B, tile),
        scratch_(Arena::bytes<T>(2 * B * size()) + Arena::bytes<double>(2 * B * out.scalar_count) +
                 Arena::bytes<T>(tile_queries * tile) + Arena::bytes<double>(out.stride)) {
    if (!scratch_.ok()) return;
    work_ = scratch_.template take<T>(2 * B * size());
    scalars_ = scratch_.template take<double>(2 * B * out.scalar_count);
    coefficient_ = scratch_.template take<T>(tile_queries * tile);
    shift_ = scratch_.template take<double>(out.stride);
    memset(work_, 0, size_t(2 * B * size()) * sizeof(T));
    memset(scalars_, 0, size_t(2 * B * out.scalar_count) * sizeof(double));
    for (int64_t i = 0; i < B; ++i) {
      memset(scalars_out(i), 0, size_t(out.scalar_count) * sizeof(double));
      memset(vectors_out(i), 0, size_t(size()) * sizeof(double));
    }
  }

  bool ok() const { return scratch_.ok() && forms_.ok(); }
  const PairForms<T>& forms() const { return forms_; }

  void begin(int64_t, int64_t) {}
  void add(const PairTile<T>& t) {
    if (a_.forward)
      add_tangents(t);
    else
      add_cotangents(t);
  }

  // Moves the working sums into those in double: chains of additions in T stay short.
  void flush() {
    for (int64_t i = 0; i < B_; ++i) {
      double *const scalars = scalars_out(i), *const vectors = vectors_out(i);
      add_moved(i, scalars, vectors);
      add_scaled(scalars, out_.scalar_count, 1, scalars_of(i, false));
      add_scaled(vectors, size(), 1, work(i, false));
      for (int origin = 0; origin < 2; ++origin) {
        memset(scalars_of(i, origin), 0, size_t(out_.scalar_count) * sizeof(double));
        memset(work(i, origin), 0, size_t(size()) * sizeof(T));
      }
    }
  }

 private:
  int64_t size() const { return out_.rows * out_.stride; }
  T* work(int64_t i, bool centre) const { return work_ + (centre * B_ + i) * size(); }
  double* scalars_of(int64_t i, bool centre) const {
    return scalars_ + (centre * B_ + i) * out_.scalar_count;
  }
  int64_t cell(int64_t i) const { return s_ * p_.B + query_at(p_, b0_ + i); }
  double* scalars_out(int64_t i) const { return out_.scalars + cell(i) * out_.scalar_count; }
  double* vectors_out(int64_t i) const { return out_.vectors + cell(i) * size(); }

  double* scalars_in(const PairTile<T>& t, int64_t i) const {
    return scalars_of(t.queries[i], t.about_centre);
  }
  // row_i += sum_j coef[i * tile + j] m_j
  void add_to_row(const PairTile<T>& t, const Matrix<T>& m, const T* coef, int64_t row) const {
    const T* from[tile_queries];
    for (int64_t i = 0; i < t.count; ++i) from[i] = coef + i * tile_;
    add_to_row(t, m, from, row);
  }
  void add_to_row(const PairTile<T>& t, const Matrix<T>& m, const T* const* coef,
                  int64_t row) const {
    T* to[tile_queries];
    for (int64_t i = 0; i < t.count; ++i)
      to[i] = work(t.queries[i], t.about_centre) + row * out_.stride;
    add_rows_of(t, m, coef, to);
  }

  void add_cotangents(const PairTile<T>& t) {
    const T* const c = forms_.cotangent_weights(t, [&](int64_t k, const T* ha, const T*) {
      for (int64_t i = 0; i < t.count; ++i)
        scalars_in(t, i)[3 + k] +=
            multiply(t, t.weight[i], ha + i * tile_, coefficient_ + i * tile_);
      add_to_row(t, t.t, coefficient_, 1 + k);
    });
    for (int64_t i = 0; i < t.count; ++i) {
      const T* const ci = c + i * tile_;
      double* const sums = scalars_in(t, i);
      sums[0] += sum_over<T>(t.padded, [&](int64_t j) { return load(ci + j); });
      sums[1] += sum_over<T>(t.padded, [&](int64_t j) { return load(ci + j) * load(t.norm + j); });
    }
    add_to_row(t, t.t, c, 0);
  }

  void add_tangents(const PairTile<T>& t) {
    const T* const c = forms_.tangent_weights(t);
    for (int64_t i = 0; i < t.count; ++i) {
      const T *const ci = c + i * tile_, *const e = t.weight[i];
      double* const sums = scalars_in(t, i);
      sums[0] += sum_over<T>(t.padded, [&](int64_t j) { return load(ci + j); });
      if (p_.kind != MomentKind::posterior) continue;
      sums[1] += sum_over<T>(t.padded, [&](int64_t j) { return load(ci + j) * load(t.norm + j); });
      sums[2] += 2 * sum_over<T>(t.padded, [&](int64_t j) { return load(ci + j) * load(e + j); });
      if (a_.dy)
        sums[1] +=
            2 * sum_over<T>(t.padded, [&](int64_t j) { return load(e + j) * load(t.along + j); });
    }
    if (forms_.logits_move()) add_to_row(t, t.t, c, 0);
    if (a_.dy) add_to_row(t, t.tangents, t.weight, 0);
    for (int64_t k = 0; k < forms_.vectors(); ++k) add_projected(t, c, k);
    if (p_.kind == MomentKind::diagonal) add_diagonal(t, c);
  }

  // sum e (tau <t, v> + <t, dv> + <dy, v>) t + sum e <t, v> dy, for vector k.
  void add_projected(const PairTile<T>& t, const T* c, int64_t k) {
    T *vt, *dvt;
    const bool move = forms_.tangent_projections(t, k, &vt, &dvt);
    for (int64_t i = 0; i < t.count; ++i) {
      const int64_t at = i * tile_;
      if (move) multiply(t, t.weight[i], dvt + at, dvt + at);
      scalars_in(t, i)[3 + k] += sum_over<T>(t.padded, [&](int64_t j) {
        Vec<T> g = load(c + at + j) * load(vt + at + j);
        if (move) g += load(dvt + at + j);
        store<T>(coefficient_ + at + j, g);
        return g;
      });
      if (a_.dy) multiply(t, t.weight[i], vt + at, vt + at);
    }
    add_to_row(t, t.t, coefficient_, 1 + k);
    if (a_.dy) add_to_row(t, t.tangents, vt, 1 + k);
  }

  // sum e (tau t * t + 2 t * dy)
  void add_diagonal(const PairTile<T>& t, const T* c) {
    if (forms_.logits_move()) add_to_row(t, t.squares, c, 1);
    if (!a_.dy) return;
    for (int64_t i = 0; i < t.count; ++i)
      for (int64_t j = 0; j < t.padded; j += W<T>)
        store<T>(coefficient_ + i * tile_ + j, T(2) * load(t.weight[i] + j));
    add_to_row(t, t.products, coefficient_, 1);
  }

  // out = e a, and 0 where e is; returns the sum.
  static double multiply(const PairTile<T>& t, const T* e, const T* a, T* out) {
    return sum_over<T>(t.padded, [&](int64_t j) {
      const Vec<T> weight = load(e + j), product = weight > T(0) ? weight * load(a + j) : Vec<T>{};
      store<T>(out + j, product);
      return product;
    });
  }

  // Adds the sums about the centre as sums about the reference, which is `shift_` further.
  void add_moved(int64_t i, double* scalars, double* vectors) {
    const int64_t b = query_at(p_, b0_ + i), w = out_.stride;
    const T* const from = work(i, true);
    const double* const sums = scalars_of(i, true);
    for (int64_t k = 0; k < w; ++k)
      shift_[k] =
          k < p_.d ? double(p_.centre ? p_.centre[k] : T(0)) - a_.reference[b * p_.d + k] : 0;
    const bool diagonal = a_.forward && p_.kind == MomentKind::diagonal;
    for (int64_t k = 0; k < out_.scalar_count; ++k) scalars[k] += sums[k];
    scalars[1] += 2 * dot(from, shift_, w) + sums[0] * dot(shift_, shift_, w);
    for (int64_t row = 0; row < out_.rows; ++row) {
      double* const to = vectors + row * w;
      add_scaled(to, w, 1, from + row * w);
      if (diagonal && row)
        for (int64_t k = 0; k < w; ++k) to[k] += shift_[k] * (2 * from[k] + sums[0] * shift_[k]);
      else
        add_scaled(to, w, sums[row ? 2 + row : 0], shift_);
    }
  }

  const Problem<T>& p_;
  const PairArguments<T>& a_;
  const PairOutput<T>& out_;
  const int64_t s_, b0_, B_, tile_;
  PairForms<T> forms_;
  Arena scratch_;
  T *work_, *coefficient_;  // [2, B, rows, stride] less reference, centre; [tile_queries, tile]
  double *scalars_, *shift_;
};

}  // namespace
