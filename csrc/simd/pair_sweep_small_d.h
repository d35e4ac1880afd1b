// The sweep with given shift and reference for small d: atoms in the lanes of a transposed tile,
// every logit by differences and every tile about the query's reference, so that nothing cancels at
// any noise level.
#pragma once
#include "simd/pair_sweep.h"
#include "simd/sweep_small_d.h"

namespace {

// How many atoms are taken at once.
inline constexpr int64_t pair_small_d_atoms = 512;

template <class T, class Sink>
class PairSmallDSweep {
 public:
  PairSmallDSweep(const Problem<T>& p, const PairArguments<T>& a, Sink& sink, int64_t, int64_t b0,
                  int64_t B)
      : p_(p), a_(a), sink_(sink), b0_(b0), B_(B), gap_(weight_gap(p)), scratch_(room()) {
    if (!scratch_.ok()) return;
    const PairForms<T>& forms = sink.forms();
    const int64_t size = pair_small_d_atoms * p.d;
    const auto if_needed = [&](bool needed) {
      return scratch_.template take<T>(needed ? size : 0);
    };
    rows_ = if_needed(true), cols_ = if_needed(true), t_ = if_needed(true);
    squares_ = if_needed(forms.needs_squares());
    tangents_ = if_needed(forms.needs_tangents());
    products_ = if_needed(forms.needs_products());
    T** const columns[] = {&weight_, &norm_, &along_, &log_pi_tangent_, &log_prior_};
    for (T** column : columns) *column = scratch_.template take<T>(pair_small_d_atoms);
    atoms_ = scratch_.template take<int64_t>(pair_small_d_atoms);
  }

  int run(int64_t n0, int64_t n1) {
    if (!scratch_.ok() || !sink_.ok()) return out_of_memory;
    int64_t visited = 0;
    for (int64_t i = n0; i < n1; i += pair_small_d_atoms) {
      const int64_t n = n1 - i < pair_small_d_atoms ? n1 - i : pair_small_d_atoms;
      sink_.begin(i, n);
      if (!load(i, n)) return non_finite_atom;
      for (int64_t q = 0; q < B_; ++q) visit(q);
      if (++visited % 16 == 0) sink_.flush();
    }
    sink_.flush();
    return ok;
  }

 private:
  size_t room() const {
    return 6 * Arena::bytes<T>(pair_small_d_atoms * p_.d) +
           5 * Arena::bytes<T>(pair_small_d_atoms) + Arena::bytes<int64_t>(pair_small_d_atoms);
  }

  // Atoms [start, start + n). Outliers are masked. False where one is not finite.
  bool load(int64_t start, int64_t n) {
    const int64_t d = p_.d;
    n_ = n, padded_ = round_up(n, 4 * W<T>);
    read_log_prior(p_, start, n, padded_, log_prior_);
    for (int64_t j = 0; j < n; ++j) {
      T* const row = rows_ + j * d;
      atoms_[j] = row_of(p_, start + j);
      read_row(p_, atoms_[j], row);
      double norm = 0;
      for (int64_t k = 0; k < d; ++k) {
        const double t = double(row[k]) - (p_.centre ? double(p_.centre[k]) : 0.0);
        norm += t * t;
      }
      if (norm <= largest_square<T>) continue;
      if (!finite_row(row, d)) return false;
      read_reference(p_, -1, row);
      log_prior_[j] = -T(__builtin_inf());
    }
    transpose(Rows<T>{rows_, d}, n, d, cols_, padded_);
    for (int64_t j = 0; j < padded_; ++j)
      log_pi_tangent_[j] = a_.dlog_pi && j < n ? a_.dlog_pi[atoms_[j]] : T(0);
    if (!a_.dy) return true;
    for (int64_t j = 0; j < n; ++j) read_tangent(p_, a_, atoms_[j], d, rows_ + j * d);
    transpose(Rows<T>{rows_, d}, n, d, tangents_, padded_);
    return true;
  }

  void visit(int64_t q) {
    const int64_t b = query_at(p_, b0_ + q);
    if (!weigh(b)) return;
    shift(b);
    const PairForms<T>& forms = sink_.forms();
    const auto matrix = [](bool needed, const T* cols) {
      return Matrix<T>{{nullptr, 0}, needed ? cols : nullptr};
    };
    const T* const weight = weight_;
    sink_.add(PairTile<T>{.count = 1,
                          .queries = &q,
                          .weight = &weight,
                          .about_centre = false,
                          .n = n_,
                          .padded = padded_,
                          .width = p_.d,
                          .t = matrix(true, t_),
                          .squares = matrix(forms.needs_squares(), squares_),
                          .tangents = matrix(forms.needs_tangents(), tangents_),
                          .products = matrix(forms.needs_products(), products_),
                          .norm = norm_,
                          .along = along_,
                          .log_pi_tangent = a_.dlog_pi ? log_pi_tangent_ : nullptr,
                          .atoms = atoms_});
  }

  // The weights; false where all are negligible. With x_r from the reference, a logit is
  //   log pi + (alpha / sigma^2) <t, x_r - alpha t / 2> - (shift + |x_r|^2 / (2 sigma^2)),
  // whose rounding error is small where t is.
  bool weigh(int64_t b) {
    const T* const reference = a_.reference + b * p_.d;
    const double alpha = p_.alpha[b], precision = 1 / (double(p_.sigma[b]) * p_.sigma[b]);
    T x[small_d];
    double square = 0;
    for (int64_t k = 0; k < p_.d; ++k) {
      const double r = double(p_.x[b * p_.d + k]) - alpha * reference[k];
      x[k] = T(r);
      square += r * r;
    }
    const double constant = -a_.shift[b] - 0.5 * square * precision;
    const T rounded = T(constant), rest = T(__builtin_exp(constant - double(rounded))),
            half_alpha = T(0.5 * alpha), factor = T(alpha * precision);
    Vec<T> largest = all<T>(-T(__builtin_inf()));
    for (int64_t j = 0; j < padded_; j += 4 * W<T>) {
      Vec<T> sum[4] = {};
      for (int64_t k = 0; k < p_.d; ++k)
        for (int u = 0; u < 4; ++u) {
          const Vec<T> t = ::load(cols_ + k * padded_ + j + u * W<T>) - reference[k];
          sum[u] += t * (x[k] - half_alpha * t);
        }
      for (int u = 0; u < 4; ++u) {
        const Vec<T> l = (::load(log_prior_ + j + u * W<T>) + rounded) + factor * sum[u];
        store<T>(weight_ + j + u * W<T>, l);
        largest = larger<T>(l, largest);
      }
    }
    if (!(max_lanes<T>(largest) >= -T(gap_))) return false;
    for (int64_t j = 0; j < padded_; j += W<T>)
      store<T>(weight_ + j, rest * vexp(::load(weight_ + j)));
    return true;
  }

  // t from the query's reference, and what is made of it.
  void shift(int64_t b) {
    const PairForms<T>& forms = sink_.forms();
    const T* const reference = a_.reference + b * p_.d;
    for (int64_t j = 0; j < padded_; j += W<T>) {
      Vec<T> norm{}, along{};
      for (int64_t k = 0; k < p_.d; ++k) {
        const int64_t at = k * padded_ + j;
        const Vec<T> t = ::load(cols_ + at) - reference[k];
        store<T>(t_ + at, t);
        norm += t * t;
        if (forms.needs_squares()) store<T>(squares_ + at, t * t);
        if (!a_.dy) continue;
        const Vec<T> product = t * ::load(tangents_ + at);
        along += product;
        if (forms.needs_products()) store<T>(products_ + at, product);
      }
      store<T>(norm_ + j, norm);
      if (a_.dy) store<T>(along_ + j, along);
    }
  }

  const Problem<T>& p_;
  const PairArguments<T>& a_;
  Sink& sink_;
  const int64_t b0_, B_;
  const double gap_;
  Arena scratch_;
  int64_t n_ = 0, padded_ = 0;
  T *rows_, *cols_, *t_, *squares_, *tangents_, *products_;  // [d, padded], but for the first
  T *weight_, *norm_, *along_, *log_pi_tangent_, *log_prior_;
  int64_t* atoms_;
};

}  // namespace
