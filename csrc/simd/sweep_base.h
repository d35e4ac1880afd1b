// The sums of a block of queries over a range of atoms: what every sweep of whole rows keeps, and
// the exact evaluation of a few atoms by differences, about the heaviest.
#pragma once
#include "simd/query.h"

namespace {

template <class T>
class Exact {
 protected:
  // tile: as many atoms as are evaluated at once, at most.
  Exact(const Problem<T>& p, const Moments<T>& m, int64_t s, int64_t b0, int64_t b1, int64_t tile)
      : p_(p),
        m_(m),
        s_(s),
        b0_(b0),
        B_(b1 - b0),
        w_(m.stride),
        tile_(tile),
        gap_(weight_gap(p)),
        own_(room()) {
    if (!own_.ok()) return;
    raw_x_ = own_.template take<T>(B_ * w_);
    ref_ = own_.template take<T>(B_ * w_);
    v_ = own_.template take<T>(B_ * p.K * w_);
    shifted_ = own_.template take<T>(p.op == Op::posterior ? 0 : tile_ * w_);
    coef_ = own_.template take<T>((group + 1) * tile_);
    prior_ = own_.template take<T>(tile_);
    exact_ = own_.template take<double>(tile_);
    atom_ = own_.template take<int64_t>(tile_);
    pointer_ = own_.template take<const T*>(tile_);
    delta_ = own_.template take<double>(w_);
    origin_ = own_.template take<double>(B_ * p.K);
    work_ = own_.template take<T>(B_ * (1 + m.rows) * w_);
    begun_ = own_.template take<bool>(B_);
    for (int64_t i = 0; i < B_; ++i) {
      begun_[i] = false;
      clear(p, m, sums(i));
      *sums(i).outlier = -__builtin_inf();
    }
  }

  // Before anything is added to query i; what is never begun costs nothing, and leaves no vectors
  // behind.
  void begin(int64_t i) {
    const int64_t b = at(i);
    begun_[i] = true;
    for (int64_t k = 0; k < w_; ++k) {
      raw_x_[i * w_ + k] = k < p_.d ? p_.x[b * p_.d + k] : T(0);
      ref_[i * w_ + k] = 0;
      for (int64_t j = 0; j < p_.K; ++j)
        v_[(i * p_.K + j) * w_ + k] = k < p_.d ? p_.v[(b * p_.K + j) * p_.d + k] : T(0);
    }
    restart(i);
  }

  // Query i anew, about the centre.
  void restart(int64_t i) {
    for (int64_t k = 0; k < p_.K; ++k) origin_[i * p_.K + k] = __builtin_nan("");
    clear(p_, m_, sums(i));
    clear_vectors(m_, sums(i));
    read_reference(p_, -1, ref_ + i * w_);
    memset(work(i), 0, size_t((1 + m_.rows) * w_) * sizeof(T));
  }

  bool ok() const { return own_.ok(); }
  int64_t at(int64_t i) const { return query_at(p_, b0_ + i); }
  Sums sums(int64_t i) const { return sums_of(p_, m_, s_, at(i)); }
  T* work(int64_t i) const { return work_ + i * (1 + m_.rows) * w_; }
  Target<T> target(int64_t i, const T* e) const {
    return {sums(i), work(i), v_ + i * p_.K * w_, e, origin_ + i * p_.K};
  }

  // Working sums of a few tiles into the sums in double: short chains of additions, whatever N is.
  void flush(int64_t i) {
    const Sums s = sums(i);
    T* from = work(i);
    add_scaled(s.first, w_, 1, from);
    add_scaled(s.second, m_.rows * w_, 1, from + w_);
    memset(from, 0, size_t((1 + m_.rows) * w_) * sizeof(T));
  }
  void flush() {
    for (int64_t i = 0; i < B_; ++i)
      if (begun_[i]) flush(i);
  }
  void finish() {
    for (int64_t i = 0; i < B_; ++i) {
      if (!begun_[i]) continue;
      flush(i);
      settle(p_, m_, sums(i), origin_ + i * p_.K);
    }
  }

  // Adds the n <= tile_ atoms at pointer_, with prior_ and atom_, to query i; pointer_ is used up.
  // False where an atom is not finite.
  bool gather_exactly(int64_t i, int64_t n) {
    if (!begun_[i]) begin(i);
    const Sums s = sums(i);
    const int64_t best = exact_logits(i, n);
    if (best < 0) return false;
    if (exact_[best] == -__builtin_inf()) return true;  // outliers all
    T* ref = ref_ + i * w_;
    if (exact_[best] > *s.top) {
      flush(i);
      settle(p_, m_, s, origin_ + i * p_.K);
      raise_top(p_, m_, s, exact_[best]);
      for (int64_t k = 0; k < w_; ++k) {
        delta_[k] = double(ref[k]) - pointer_[best][k];
        ref[k] = pointer_[best][k];
      }
      if (*s.mass > 0) move_reference(p_, m_, s, delta_, v_ + i * p_.K * w_);
      *s.ref = atom_[best];
    }
    T* e = coef_;
    int64_t kept = 0;
    for (int64_t j = 0; j < n; ++j) {
      if (exact_[j] < *s.top - gap_) continue;
      e[kept] = T(exact_[j] - *s.top);
      pointer_[kept++] = pointer_[j];
    }
    for (int64_t j = kept; j < round_up(kept, W<T>); ++j) e[j] = -T(__builtin_inf());
    Vec<T> sum{}, sum2{};
    for (int64_t j = 0; j < kept; j += W<T>) {
      const Vec<T> w = vexp(::load(e + j));
      store<T>(e + j, w);
      sum += w;
      sum2 += w * w;
    }
    *s.mass += total<T>(sum);
    *s.mass2 += total<T>(sum2);
    if (p_.op == Op::posterior)
      *s.spread += add_about(e, pointer_, kept, w_, ref, work(i));
    else
      add_shifted(i, e, kept);
    return true;
  }

  const Problem<T>& p_;
  const Moments<T>& m_;
  const int64_t s_, b0_, B_, w_, tile_;
  const double gap_;

 private:
  size_t room() const {
    const auto t = [](int64_t n) { return Arena::bytes<T>(n); };
    return 2 * t(B_ * w_) + t(B_ * p_.K * w_) + t(tile_ * w_) + t((group + 1) * tile_) + t(tile_) +
           3 * Arena::bytes<double>(tile_) + Arena::bytes<double>(w_) +
           Arena::bytes<double>(B_ * p_.K) + Arena::bytes<bool>(B_) + t(B_ * (1 + m_.rows) * w_);
  }

  // Logits of the atoms at pointer_ into exact_, an outlier's -inf. Returns the index of the
  // largest, -1 where an atom is not finite.
  int64_t exact_logits(int64_t i, int64_t n) {
    const int64_t b = at(i);
    const double half = 0.5 / (double(p_.sigma[b]) * p_.sigma[b]);
    distances(raw_x_ + i * w_, p_.alpha[b], pointer_, n, w_, exact_);
    int64_t best = 0;
    for (int64_t j = 0; j < n; ++j) {
      if (exact_[j] <= (sizeof(T) == 4 ? 3.4e38 : 1.7e308)) {
        exact_[j] = double(prior_[j]) - half * exact_[j];
      } else {
        if (!finite_row(pointer_[j], p_.d)) return -1;
        leave_out(p_, sums(i), b, pointer_[j], prior_[j]);
        exact_[j] = -__builtin_inf();
      }
      if (exact_[j] > exact_[best]) best = j;
    }
    return best;
  }

  // Row m of the compacted tile is the m-th atom that counts, less the reference.
  void add_shifted(int64_t i, const T* e, int64_t n) {
    const T* ref = ref_ + i * w_;
    for (int64_t j = 0; j < n; ++j) {
      T* row = shifted_ + j * w_;
      for (int64_t k = 0; k < w_; ++k) row[k] = pointer_[j][k] - ref[k];
    }
    for (int64_t k = 0; k < p_.K; ++k)
      if (origin_[i * p_.K + k] != origin_[i * p_.K + k]) origin_[i * p_.K + k] = 0;
    const Target<T> one = target(i, e);
    add_tile(p_, m_, 1, &one, Rows<T>{shifted_, w_}, static_cast<const T*>(nullptr), n,
             static_cast<const T*>(nullptr), coef_ + tile_, tile_);
  }

  double* delta_;
  T* shifted_;
  double* exact_;
  bool* begun_;

 protected:
  Arena own_;
  T *raw_x_, *ref_, *v_, *coef_, *prior_, *work_;
  double* origin_;
  int64_t* atom_;
  const T** pointer_;
};

}  // namespace
