// What first derivatives make of a pair of query and atom, from cotangents or tangents: the weight
// c = e f, or e tau with tau the tangent of the logit. Both f and tau are
//   constant + <first, t> + <second, t * t>
// and products of the kind's own. With t from the centre instead of the reference the second part
// stays as it is; the first changes, and the constant. All this is made in double, then rounded.
#pragma once
#include "simd/pair_tile.h"

namespace {

template <class T>
class PairForms {
 public:
  // Queries [b0, b0 + B), rows of w; tile: the most atoms of a tile; with_x: shifted_x is needed.
  PairForms(const Problem<T>& p, const PairArguments<T>& a, int64_t w, int64_t b0, int64_t B,
            int64_t tile, bool with_x = false)
      : p_(p),
        a_(a),
        w_(w),
        b0_(b0),
        B_(B),
        tile_(tile),
        with_x_(with_x || a.dy),
        linear_given_(a.forward ? a.dx || a.dalpha || a.dsigma : a.h_first || a.h_second),
        vectors_(p.kind == MomentKind::matvec && (a.forward || a.h_second) ? p.K : 0),
        scratch_(room()) {
    if (!scratch_.ok()) return;
    constant_ = scratch_.template take<T>(2 * B);
    quadratic_ = scratch_.template take<T>(B);
    square_ = scratch_.template take<T>(B);
    linear_ = scratch_.template take<T>(2 * B * w);
    shifted_x_ = scratch_.template take<T>(with_x_ ? 2 * B * w : 0);
    v_ = scratch_.template take<T>(B * vectors_ * w);
    partner_ = scratch_.template take<T>(B * partners() * w);
    v_origin_ = scratch_.template take<T>(B * vectors_);
    partner_origin_ = scratch_.template take<T>(B * partners());
    form_ = scratch_.template take<T>(tile_queries * tile);
    v_dot_ = scratch_.template take<T>(tile_queries * tile);
    partner_dot_ = scratch_.template take<T>(tile_queries * tile);
    extra_dot_ = scratch_.template take<T>(tile_queries * tile);
    double* const origin = scratch_.template take<double>(3 * w);
    for (int64_t i = 0; i < B; ++i) prepare(i, origin);
  }

  bool ok() const { return scratch_.ok(); }
  // Which matrices a tile must have beside t.
  bool needs_squares() const {
    return p_.kind == MomentKind::diagonal && (a_.forward || a_.h_second);
  }
  bool needs_tangents() const { return a_.dy; }
  bool needs_products() const { return a_.dy && p_.kind == MomentKind::diagonal; }
  // Whether logits have a tangent at all.
  bool logits_move() const { return linear_given_ || a_.dy || a_.dlog_pi; }
  // How many vectors of a query have products of their own.
  int64_t vectors() const { return vectors_; }

  // What query i has, rows of w; `about_centre` or about its reference. No linear form: null.
  const T* shifted_x(int64_t i, bool about_centre) const {
    return shifted_x_ + (about_centre * B_ + i) * w_;
  }
  const T* linear(int64_t i, bool about_centre) const {
    return linear_given_ ? linear_ + (about_centre * B_ + i) * w_ : nullptr;
  }
  T quadratic(int64_t i) const { return quadratic_[i]; }
  const T* v(int64_t i, int64_t k) const { return v_ + (i * vectors_ + k) * w_; }
  const T* partner(int64_t i, int64_t k) const { return partner_ + (i * partners() + k) * w_; }

  // Reverse mode: c = e f, [count, tile]. For every vector k it calls each(k, ha, va) with
  // ha = <h_second_k, t> and va = <v_k, t>, both [count, tile], before c is done.
  template <class F>
  T* cotangent_weights(const PairTile<T>& t, const F& each) {
    T* const f = form_;
    start(t, f);
    if (p_.kind == MomentKind::diagonal && a_.h_second) {
      project_on(t, t.squares, partner_, partners(), 0, partner_dot_);
      for_each_vector(t, [&](int64_t i, int64_t j) {
        store<T>(f + i * tile_ + j, load(f + i * tile_ + j) + load(partner_dot_ + i * tile_ + j));
      });
    }
    for (int64_t k = 0; k < vectors_; ++k) {
      project_about(t, v_, v_origin_, vectors_, k, v_dot_);
      project_about(t, partner_, partner_origin_, partners(), k, partner_dot_);
      for_each_vector(t, [&](int64_t i, int64_t j) {
        const int64_t at = i * tile_ + j;
        store<T>(f + at, load(f + at) + load(partner_dot_ + at) * load(v_dot_ + at));
      });
      each(k, partner_dot_, v_dot_);
    }
    weigh(t, f, a_.h_weight_square ? square_ : nullptr);
    return f;
  }

  // Forward mode: e tau, [count, tile].
  T* tangent_weights(const PairTile<T>& t) {
    T* const tau = form_;
    start(t, tau);
    if (t.log_pi_tangent)
      for_each_vector(t, [&](int64_t i, int64_t j) {
        store<T>(tau + i * tile_ + j, load(tau + i * tile_ + j) + load(t.log_pi_tangent + j));
      });
    if (a_.dy) {  // (alpha / sigma^2) <x - alpha y, dy>
      project_on(t, t.tangents, shifted_x_ + (t.about_centre ? B_ * w_ : 0), 1, 0, v_dot_);
      for (int64_t i = 0; i < t.count; ++i) {
        const int64_t b = query_at(p_, b0_ + t.queries[i]);
        const T alpha = p_.alpha[b], factor = T(alpha / (double(p_.sigma[b]) * p_.sigma[b]));
        for (int64_t j = 0; j < t.padded; j += W<T>) {
          const Vec<T> along = load(v_dot_ + i * tile_ + j) - alpha * load(t.along + j);
          store<T>(tau + i * tile_ + j, load(tau + i * tile_ + j) + factor * along);
        }
      }
    }
    weigh(t, tau, nullptr);
    return tau;
  }
  // Forward mode, [count, tile]: <t, v_k> into vt, <t, dv_k> + <dy, v_k> into dvt where there are
  // such tangents. Returns whether there are.
  bool tangent_projections(const PairTile<T>& t, int64_t k, T** vt, T** dvt) {
    project_about(t, v_, v_origin_, vectors_, k, v_dot_);
    *vt = v_dot_, *dvt = partner_dot_;
    if (a_.dv) project_about(t, partner_, partner_origin_, partners(), k, partner_dot_);
    if (!a_.dy) return a_.dv;
    if (!a_.dv) {
      project_on(t, t.tangents, v_, vectors_, k, partner_dot_);
      return true;
    }
    T* const more = extra_dot_;
    project_on(t, t.tangents, v_, vectors_, k, more);
    for_each_vector(t, [&](int64_t i, int64_t j) {
      const int64_t at = i * tile_ + j;
      store<T>(partner_dot_ + at, load(partner_dot_ + at) + load(more + at));
    });
    return true;
  }

 private:
  // Vectors beside v: h_second or dv, or the diagonal's h_second.
  int64_t partners() const {
    if (p_.kind == MomentKind::matvec) return (a_.forward ? a_.dv : a_.h_second) ? p_.K : 0;
    return p_.kind == MomentKind::diagonal && !a_.forward && a_.h_second ? 1 : 0;
  }
  size_t room() const {
    const auto t = [](int64_t n) { return Arena::bytes<T>(n); };
    return t(2 * B_) + 2 * t(B_) + t(2 * B_ * w_) + t(with_x_ ? 2 * B_ * w_ : 0) +
           t(B_ * vectors_ * w_) + t(B_ * partners() * w_) + t(B_ * vectors_) + t(B_ * partners()) +
           4 * t(tile_queries * tile_) + Arena::bytes<double>(3 * w_);
  }

  // What there is of query i; `room` holds 3 w numbers.
  void prepare(int64_t i, double* room) {
    const int64_t b = query_at(p_, b0_ + i), d = p_.d;
    const T* const reference = a_.reference + b * d;
    for (int64_t k = 0; k < vectors_; ++k)
      pad(p_.v + (b * p_.K + k) * d, v_ + (i * vectors_ + k) * w_);
    const T* const given = a_.forward ? a_.dv : a_.h_second;
    for (int64_t k = 0; k < partners(); ++k)
      pad(given + (b * partners() + k) * d, partner_ + (i * partners() + k) * w_);
    double *const first = room, *const second = room + w_, *const from_reference = room + 2 * w_;
    if (a_.forward)
      tangent_form(b, first, second);
    else
      cotangent_form(b, first, second);
    const double constant = !a_.forward && a_.h_weight ? a_.h_weight[b] : T(0);
    for (int about_centre = 0; about_centre < 2; ++about_centre) {
      const int64_t at = about_centre * B_ + i;
      double sum = constant;
      for (int64_t k = 0; k < w_; ++k) {
        if (k >= d) {
          linear_[at * w_ + k] = from_reference[k] = 0;
          if (with_x_) shifted_x_[at * w_ + k] = 0;
          continue;
        }
        const double origin = !about_centre ? reference[k]
                              : p_.centre   ? p_.centre[k]
                                            : T(0),
                     delta = origin - reference[k];
        from_reference[k] = delta;
        sum += (first[k] + second[k] * delta) * delta;
        linear_[at * w_ + k] = T(first[k] + 2 * second[k] * delta);
        if (with_x_)
          shifted_x_[at * w_ + k] = T(double(p_.x[b * d + k]) - double(p_.alpha[b]) * origin);
      }
      constant_[at] = T(sum);
    }
    quadratic_[i] = p_.kind == MomentKind::posterior || a_.forward ? T(second[0]) : T(0);
    square_[i] = a_.h_weight_square ? 2 * a_.h_weight_square[b] : T(0);
    for (int64_t k = 0; k < vectors_; ++k)
      v_origin_[i * vectors_ + k] = T(dot(v_ + (i * vectors_ + k) * w_, from_reference, d));
    if (vectors_)
      for (int64_t k = 0; k < partners(); ++k)
        partner_origin_[i * partners() + k] =
            T(dot(partner_ + (i * partners() + k) * w_, from_reference, d));
  }
  void pad(const T* from, T* to) const {
    for (int64_t k = 0; k < w_; ++k) to[k] = k < p_.d ? from[k] : T(0);
  }

  // What f and tau have about the reference: <first, t> + <second, t * t>. Products of a kind's own
  // come on top.
  void cotangent_form(int64_t b, double* first, double* second) const {
    const int64_t d = p_.d;
    for (int64_t k = 0; k < d; ++k) {
      first[k] = a_.h_first ? a_.h_first[b * d + k] : T(0);
      second[k] = !a_.h_second || vectors_           ? T(0)
                  : p_.kind == MomentKind::posterior ? a_.h_second[b]
                                                     : a_.h_second[b * d + k];
    }
  }
  void tangent_form(int64_t b, double* first, double* second) const {
    const int64_t d = p_.d;
    const double alpha = p_.alpha[b], sigma = p_.sigma[b], precision = 1 / (sigma * sigma),
                 dalpha = a_.dalpha ? a_.dalpha[b] : T(0),
                 growth = a_.dsigma ? a_.dsigma[b] / sigma : 0.0;  // d log sigma
    for (int64_t k = 0; k < d; ++k) {
      const double reference = a_.reference[b * d + k],
                   x = double(p_.x[b * d + k]) - alpha * reference,
                   dx = (a_.dx ? a_.dx[b * d + k] : T(0)) - dalpha * reference;
      first[k] = (alpha * dx + (dalpha - 2 * alpha * growth) * x) * precision;
      second[k] = (alpha * growth - dalpha) * alpha * precision;
    }
  }

  // Calls f(i, j) for every query i of the tile and every vector of atoms from j on.
  template <class F>
  static void for_each_vector(const PairTile<T>& t, const F& f) {
    for (int64_t i = 0; i < t.count; ++i)
      for (int64_t j = 0; j < t.padded; j += W<T>) f(i, j);
  }

  // Products with vector k of `count` of every query.
  void project_on(const PairTile<T>& t, const Matrix<T>& m, const T* vectors, int64_t count,
                  int64_t k, T* out) const {
    const T* q[tile_queries];
    for (int64_t i = 0; i < t.count; ++i) q[i] = vectors + (t.queries[i] * count + k) * w_;
    project(t, m, q, out, tile_);
  }
  // The same with t from the reference.
  void project_about(const PairTile<T>& t, const T* vectors, const T* origins, int64_t count,
                     int64_t k, T* out) const {
    project_on(t, t.t, vectors, count, k, out);
    if (!t.about_centre) return;
    for (int64_t i = 0; i < t.count; ++i) {
      const T more = origins[t.queries[i] * count + k];
      for (int64_t j = 0; j < t.padded; j += W<T>)
        store<T>(out + i * tile_ + j, load(out + i * tile_ + j) + more);
    }
  }

  // The constant, the linear form and the multiple of |t|^2.
  void start(const PairTile<T>& t, T* f) const {
    const int64_t origin = t.about_centre ? B_ : 0;
    if (linear_given_) project_on(t, t.t, linear_ + origin * w_, 1, 0, f);
    for (int64_t i = 0; i < t.count; ++i) {
      const T constant = constant_[origin + t.queries[i]], quadratic = quadratic_[t.queries[i]];
      for (int64_t j = 0; j < t.padded; j += W<T>) {
        const Vec<T> known = constant + quadratic * load(t.norm + j);
        store<T>(f + i * tile_ + j, linear_given_ ? load(f + i * tile_ + j) + known : known);
      }
    }
  }

  // e (f + square e), and 0 for an atom without weight, whatever f is.
  void weigh(const PairTile<T>& t, T* f, const T* square) const {
    for (int64_t i = 0; i < t.count; ++i) {
      const T more = square ? square[t.queries[i]] : T(0);
      for (int64_t j = 0; j < t.padded; j += W<T>) {
        const Vec<T> e = load(t.weight[i] + j);
        store<T>(f + i * tile_ + j, e > T(0) ? e * (load(f + i * tile_ + j) + more * e) : Vec<T>{});
      }
    }
  }

  const Problem<T>& p_;
  const PairArguments<T>& a_;
  const int64_t w_, b0_, B_, tile_;
  const bool with_x_, linear_given_;
  const int64_t vectors_;
  Arena scratch_;
  T *constant_, *linear_, *shifted_x_;  // [2, B] and [2, B, w]: about the reference, the centre
  T *quadratic_, *square_;              // [B]
  T *v_, *partner_;                     // [B, vectors, w] and [B, partners, w]
  T *v_origin_, *partner_origin_;       // products of these with the centre less the reference
  T *form_, *v_dot_, *partner_dot_, *extra_dot_;  // [tile_queries, tile]
};

}  // namespace
