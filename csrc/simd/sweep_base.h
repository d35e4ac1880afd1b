// What every sweep over whole rows has in common: the sums of a few queries over a range of atoms,
// and the evaluation of a few atoms by differences, with moments about the heaviest of them.
#pragma once
#include "simd/query.h"
#include "simd/value_rows.h"

namespace {

template <class T>
class SweepBase {
 protected:
  // tile: the most atoms that are evaluated at once.
  SweepBase(const Problem<T>& p, const Moments<T>& m, int64_t s, int64_t b0, int64_t b1,
            int64_t tile)
      : p_(p),
        m_(m),
        s_(s),
        b0_(b0),
        B_(b1 - b0),
        w_(m.width),
        tile_(tile),
        gap_(weight_gap(p)),
        scratch_(room()),
        values_(p, m.stride, tile) {
    if (!ok()) return;
    raw_x_ = scratch_.template take<T>(B_ * w_);
    reference_ = scratch_.template take<T>(B_ * w_);
    v_ = scratch_.template take<T>(B_ * p.K * w_);
    shifted_ = scratch_.template take<T>(kind_of(p).add_rows ? 0 : tile_ * w_);
    weight_ = scratch_.template take<T>(tile_);
    kind_scratch_ = scratch_.template take<T>(tile_queries * tile_);
    picked_log_prior_ = scratch_.template take<T>(tile_);
    logit_ = scratch_.template take<double>(tile_);
    picked_atom_ = scratch_.template take<int64_t>(tile_);
    picked_row_ = scratch_.template take<const T*>(tile_);
    delta_ = scratch_.template take<double>(w_);
    origin_ = scratch_.template take<double>(B_ * p.K);
    work_ = scratch_.template take<T>(B_ * m.rows() * m.stride);
    begun_ = scratch_.template take<bool>(B_);
    if (m.race) segments_.take(scratch_, tile_);
    for (int64_t i = 0; i < B_; ++i) {
      begun_[i] = false;
      clear(p, sums(i));
      *sums(i).outlier_logit = -__builtin_inf();
    }
  }

  // Call begin(i) before anything is added to query i. A query that is never begun costs nothing,
  // and its vectors of sums are not written.
  void begin(int64_t i) {
    const int64_t b = batch_index(i);
    begun_[i] = true;
    read_vectors(p_.x + b * p_.d, 1, raw_x_ + i * w_);
    read_vectors(p_.v + b * p_.K * p_.d, p_.K, v_ + i * p_.K * w_);
    memset(reference_ + i * w_, 0, size_t(w_) * sizeof(T));
    restart(i);
  }

  // Forgets the sums of query i; the reference is the centre again.
  void restart(int64_t i) {
    for (int64_t k = 0; k < p_.K; ++k) origin_[i * p_.K + k] = __builtin_nan("");
    clear(p_, sums(i));
    clear_vectors(m_, sums(i));
    read_reference(p_, -1, reference_ + i * w_);
    memset(work(i), 0, size_t(m_.rows() * m_.stride) * sizeof(T));
  }

  bool ok() const { return scratch_.ok() && values_.ok(); }
  int64_t batch_index(int64_t i) const { return query_at(p_, b0_ + i); }
  QuerySums sums(int64_t i) const { return sums_of(p_, m_, s_, batch_index(i)); }
  T* work(int64_t i) const { return work_ + i * m_.rows() * m_.stride; }
  QueryInTile<T> in_tile(int64_t i, const T* weight) const {
    return {.sums = sums(i),
            .vectors = work(i),
            .v = v_ + i * p_.K * w_,
            .weight = weight,
            .origin = origin_ + i * p_.K};
  }

  // Moves the working sums of a few tiles into the sums in double: chains of additions in T stay
  // short, whatever N is.
  void flush(int64_t i) {
    const QuerySums s = sums(i);
    T* from = work(i);
    const int64_t first = m_.first_rows * m_.stride;
    add_scaled(s.first_moment, first, 1, from);
    add_scaled(s.second_moment, m_.second_rows * m_.stride, 1, from + first);
    memset(from, 0, size_t(m_.rows() * m_.stride) * sizeof(T));
  }
  void flush() {
    for (int64_t i = 0; i < B_; ++i)
      if (begun_[i]) flush(i);
  }
  void finish() {
    for (int64_t i = 0; i < B_; ++i) {
      if (!begun_[i]) continue;
      flush(i);
      const QuerySums s = sums(i);
      restore_projections(p_, m_, s, origin_ + i * p_.K);
      if (s.race) close_block(p_, batch_index(i), *s.race);
    }
  }

  // Adds the n <= tile_ atoms at picked_row_, with picked_log_prior_ and picked_atom_, to query i;
  // picked_row_ is overwritten. False where an atom is not finite.
  bool add_by_differences(int64_t i, int64_t n) {
    if (!begun_[i]) begin(i);
    const QuerySums s = sums(i);
    const int64_t heaviest = logits_by_differences(i, n);
    if (heaviest < 0) return false;
    if (logit_[heaviest] == -__builtin_inf()) return true;  // all are outliers
    if (logit_[heaviest] > *s.max_logit) refer_to(i, heaviest);
    const int64_t count = weigh(i, n);
    if (p_.values.at)
      values_.add(picked_atom_, weight_, count, work(i));
    else if (const AddRows<T> add_rows = kind_of(p_).add_rows)
      add_rows(s, weight_, picked_row_, count, w_, reference_ + i * w_, work(i));
    else
      add_shifted(i, count);
    return true;
  }

  const Problem<T>& p_;
  const Moments<T>& m_;
  const int64_t s_, b0_, B_, w_, tile_;
  const double gap_;

 private:
  // `count` rows of d numbers, as rows of the width.
  void read_vectors(const T* from, int64_t count, T* to) const {
    for (int64_t j = 0; j < count; ++j) {
      memcpy(to + j * w_, from + j * p_.d, size_t(p_.d) * sizeof(T));
      memset(to + j * w_ + p_.d, 0, size_t(w_ - p_.d) * sizeof(T));
    }
  }
  size_t room() const {
    const auto t = [](int64_t n) { return Arena::bytes<T>(n); };
    return 2 * t(B_ * w_) + t(B_ * p_.K * w_) + t(tile_ * w_) + 2 * t(tile_) +
           t(tile_queries * tile_) + 3 * Arena::bytes<double>(tile_) + Arena::bytes<double>(w_) +
           Arena::bytes<double>(B_ * p_.K) + Arena::bytes<bool>(B_) +
           t(B_ * m_.rows() * m_.stride) + (m_.race ? Segments::bytes(tile_) : 0);
  }

  // Logits of the atoms at picked_row_ into logit_, -inf for an outlier. Returns the index of the
  // largest, or -1 where an atom is not finite.
  int64_t logits_by_differences(int64_t i, int64_t n) {
    const int64_t b = batch_index(i);
    const double half_precision = 0.5 / (double(p_.sigma[b]) * p_.sigma[b]);
    distances(raw_x_ + i * w_, p_.alpha[b], picked_row_, n, w_, logit_);
    int64_t heaviest = 0;
    for (int64_t j = 0; j < n; ++j) {
      if (logit_[j] <= (sizeof(T) == 4 ? 3.4e38 : 1.7e308)) {
        logit_[j] = double(picked_log_prior_[j]) - half_precision * logit_[j];
      } else {
        if (!finite_row(picked_row_[j], p_.d)) return -1;
        leave_out(p_, sums(i), b, picked_row_[j], picked_log_prior_[j]);
        logit_[j] = -__builtin_inf();
      }
      if (logit_[j] > logit_[heaviest]) heaviest = j;
    }
    return heaviest;
  }

  // Makes atom j of picked_row_, the heaviest so far, the reference of query i.
  void refer_to(int64_t i, int64_t j) {
    const QuerySums s = sums(i);
    T* reference = reference_ + i * w_;
    flush(i);
    restore_projections(p_, m_, s, origin_ + i * p_.K);
    raise_max_logit(p_, m_, s, logit_[j]);
    for (int64_t k = 0; k < w_; ++k) {
      delta_[k] = double(reference[k]) - picked_row_[j][k];
      reference[k] = picked_row_[j][k];
    }
    if (*s.weight_sum > 0) move_reference(p_, m_, s, delta_, v_ + i * p_.K * w_);
    *s.reference = picked_atom_[j];
  }

  // Weights of the atoms that are not negligible into weight_; these atoms move to the front of
  // picked_row_ and picked_atom_. Returns how many there are.
  int64_t weigh(int64_t i, int64_t n) {
    const QuerySums s = sums(i);
    T* const weight = weight_;
    int64_t count = 0;
    for (int64_t j = 0; j < n; ++j) {
      if (logit_[j] < *s.max_logit - gap_) continue;
      weight[count] = T(logit_[j] - *s.max_logit);
      picked_atom_[count] = picked_atom_[j];
      picked_row_[count++] = picked_row_[j];
    }
    for (int64_t j = count; j < round_up(count, W<T>); ++j) weight[j] = -T(__builtin_inf());
    Vec<T> sum{}, square_sum{};
    for (int64_t j = 0; j < count; j += W<T>) {
      const Vec<T> w = vexp(::load(weight + j));
      store<T>(weight + j, w);
      sum += w;
      square_sum += w * w;
    }
    *s.weight_sum += total<T>(sum);
    *s.weight_square_sum += total<T>(square_sum);
    if (s.race)
      for (int64_t j = 0; j < count; ++j)
        add_to_block(p_, batch_index(i), *s.race, picked_atom_[j] / draw_block, weight[j]);
    return count;
  }

  // Adds the n atoms at picked_row_ as a tile of rows less the reference.
  void add_shifted(int64_t i, int64_t n) {
    const T* reference = reference_ + i * w_;
    for (int64_t j = 0; j < n; ++j) {
      T* row = shifted_ + j * w_;
      for (int64_t k = 0; k < w_; ++k) row[k] = picked_row_[j][k] - reference[k];
    }
    for (int64_t k = 0; k < p_.K; ++k)
      if (origin_[i * p_.K + k] != origin_[i * p_.K + k]) origin_[i * p_.K + k] = 0;
    const QueryInTile<T> query = in_tile(i, weight_);
    add_tile<T>(p_, m_,
                {.count = 1,
                 .queries = &query,
                 .rows = {shifted_, w_},
                 .cols = nullptr,
                 .n = n,
                 .norm = nullptr,
                 .scratch = kind_scratch_,
                 .scratch_stride = tile_});
  }

  double* delta_;
  T *shifted_, *weight_;
  double* logit_;
  bool* begun_;

 protected:
  Arena scratch_;
  ValueRows<T> values_;  // for average
  T *raw_x_, *reference_, *v_, *picked_log_prior_, *work_;
  T* kind_scratch_;  // [tile_queries, tile_]: what a moment kind's add_tile may overwrite
  double* origin_;
  int64_t* picked_atom_;
  const T** picked_row_;
  Segments segments_;  // of the tile, where there is a race
};

}  // namespace
