// The sweep for small d: atoms in the lanes of a transposed tile, every distance by differences and
// every moment about the heaviest atom so far, or about the centre, so that nothing cancels at any
// noise level. Most of the time goes into the exponentials.
#pragma once
#include "simd/query.h"
#include "simd/value_rows.h"

namespace {

inline constexpr int64_t small_d = 16;

template <class T>
class SmallDSweep {
 public:
  SmallDSweep(const Problem<T>& p, const Moments<T>& m, int64_t s, int64_t b0, int64_t b1)
      : p_(p),
        m_(m),
        s_(s),
        b0_(b0),
        b1_(b1),
        gap_(weight_gap(p)),
        scratch_(room()),
        values_(p, m.stride, tile_) {
    if (!has_memory()) return;
    rows_ = scratch_.template take<T>(tile_ * p.d);
    cols_ = scratch_.template take<T>(tile_ * p.d);
    logits_ = scratch_.template take<T>(tile_);
    projections_ = scratch_.template take<T>(tile_);
    log_prior_ = scratch_.template take<T>(tile_);
    v_ = scratch_.template take<T>(p.K * m.stride);
    reference_ = scratch_.template take<T>((b1 - b0) * p.d);
    centre_ = scratch_.template take<T>(p.d);
    distance_ = scratch_.template take<double>(b1 - b0);
    if (m.race) segments_.take(scratch_, tile_);
    value_cols_ = scratch_.template take<T>(tile_ * p.values.P);
    memset(v_, 0, size_t(p.K * m.stride) * sizeof(T));
    read_reference(p, -1, centre_);
    for (int64_t i = 0; i < b1 - b0; ++i) {
      const int64_t b = query_at(p, b0 + i);
      const QuerySums sums = sums_of(p, m, s, b);
      clear(p, sums);
      clear_vectors(m, sums);
      *sums.outlier_logit = -__builtin_inf();
      memcpy(reference_ + i * p.d, centre_, size_t(p.d) * sizeof(T));
      double square = 0;
      for (int64_t k = 0; k < p.d; ++k) {
        const double t = double(p.x[b * p.d + k]) - double(p.alpha[b]) * centre_[k];
        square += t * t;
      }
      distance_[i] = __builtin_sqrt(square);
    }
  }

  int run(int64_t n0, int64_t n1) {
    if (!has_memory()) return out_of_memory;
    for (int64_t i = n0; i < n1; i += tile_) {
      const int64_t n = n_ = n1 - i < tile_ ? n1 - i : tile_;
      padded_ = round_up(n, 4 * W<T>);
      for (int64_t j = 0; j < n; ++j) read_row(p_, row_of(p_, i + j), rows_ + j * p_.d);
      read_log_prior(p_, i, n, padded_, log_prior_);
      largest_norm_ = 0;
      for (int64_t j = 0; j < n; ++j) {
        double norm = 0;
        for (int64_t k = 0; k < p_.d; ++k) {
          const double t = double(rows_[j * p_.d + k]) - centre_[k];
          norm += t * t;
        }
        if (!(norm <= largest_square<T>)) {
          if (!leave_outlier_out(j)) return non_finite_atom;
          continue;
        }
        if (norm > largest_norm_) largest_norm_ = norm;
      }
      if (m_.race) find_segments(p_, i, n, segments_);
      transpose(Rows<T>{rows_, p_.d}, n, p_.d, cols_, padded_);
      if (p_.values.at) transpose(values_.tile(i, n), n, p_.values.P, value_cols_, padded_);
      for (int64_t q = 0; q < b1_ - b0_; ++q) visit(q, i);
    }
    for (int64_t q = b0_; m_.race && q < b1_; ++q) {
      const int64_t b = query_at(p_, q);
      close_block(p_, b, *sums_of(p_, m_, s_, b).race);
    }
    return ok;
  }

 private:
  static constexpr int64_t tile_ = 512;

  bool has_memory() const { return scratch_.ok() && values_.ok(); }
  size_t room() const {
    const auto t = [](int64_t n) { return Arena::bytes<T>(n); };
    return 2 * t(tile_ * p_.d) + 3 * t(tile_) + t(p_.K * m_.stride) + t((b1_ - b0_) * p_.d) +
           t(p_.d) + Arena::bytes<double>(b1_ - b0_) + (m_.race ? Segments::bytes(tile_) : 0) +
           t(tile_ * p_.values.P);
  }

  // The centre, masked, takes the place of atom j of the tile. False where that is not finite.
  bool leave_outlier_out(int64_t j) {
    T* row = rows_ + j * p_.d;
    if (!finite_row(row, p_.d)) return false;
    for (int64_t i = b0_; i < b1_; ++i) {
      const int64_t b = query_at(p_, i);
      leave_out(p_, sums_of(p_, m_, s_, b), b, row, log_prior_[j]);
    }
    memcpy(row, centre_, size_t(p_.d) * sizeof(T));
    log_prior_[j] = -T(__builtin_inf());
    return true;
  }

  void visit(int64_t q, int64_t start) {
    const int64_t b = query_at(p_, b0_ + q);
    const QuerySums s = sums_of(p_, m_, s_, b);
    T* reference = reference_ + q * p_.d;
    T largest = logits(b);
    const double distance =
        distance_[q] + __builtin_fabs(double(p_.alpha[b])) * __builtin_sqrt(largest_norm_);
    if (!(distance * distance <= largest_square<T>)) largest = without_overflow(s, b);
    if (!(largest > -T(__builtin_inf())) || largest < *s.max_logit - gap_) return;
    for (int64_t k = 0; k < p_.K; ++k)
      memcpy(v_ + k * m_.stride, p_.v + (b * p_.K + k) * p_.d, size_t(p_.d) * sizeof(T));
    const bool heavier = largest > *s.max_logit;
    if (heavier) raise_max_logit(p_, m_, s, largest);
    const int64_t heaviest = heavier ? find(largest) : 0;
    const T max_logit = T(*s.max_logit);
    Vec<T> sum[4] = {}, square_sum[4] = {};
    for (int64_t j = 0; j < padded_; j += 4 * W<T>)
      for (int u = 0; u < 4; ++u) {
        const Vec<T> e = vexp(load(logits_ + j + u * W<T>) - max_logit);
        store<T>(logits_ + j + u * W<T>, e);
        sum[u] += e;
        square_sum[u] += e * e;
      }
    const double weight_sum = total<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
    // Where the weights are nearly even and the noise is as large as the data, the centre is nearer
    // to their mean than the heaviest atom.
    const double a = p_.alpha[b] / p_.sigma[b];
    const bool nearly_even = 4 * weight_sum > double(n_) && a * a * largest_norm_ < double(p_.d);
    if (heavier && !(nearly_even && *s.reference < 0)) {
      double delta[small_d + 64 / sizeof(T)] = {};
      for (int64_t k = 0; k < p_.d; ++k) {
        const T value = cols_[k * padded_ + heaviest];
        delta[k] = double(reference[k]) - value;
        reference[k] = value;
      }
      if (*s.weight_sum > 0) move_reference(p_, m_, s, delta, v_);
      *s.reference = row_of(p_, start + heaviest);
    }
    *s.weight_sum += weight_sum;
    *s.weight_square_sum +=
        total<T>((square_sum[0] + square_sum[1]) + (square_sum[2] + square_sum[3]));
    if (s.race) add_segments(p_, b, *s.race, segments_, logits_);
    const SmallDTile<T> tile{.cols = p_.values.at ? value_cols_ : cols_,
                             .weight = logits_,
                             .padded = padded_,
                             .scratch = projections_};
    kind_of(p_).add_small_d(p_, m_, tile, s, reference, v_);
    values_.expect_weightless(logits_, s.first_moment);
  }

  // The atoms whose distances overflow are outliers to this query.
  T without_overflow(QuerySums s, int64_t b) {
    T largest = -T(__builtin_inf()), row[small_d];
    for (int64_t j = 0; j < n_; ++j) {
      if (!(logits_[j] > -T(__builtin_inf())) && log_prior_[j] > -T(__builtin_inf())) {
        for (int64_t k = 0; k < p_.d; ++k) row[k] = cols_[k * padded_ + j];
        leave_out(p_, s, b, row, log_prior_[j]);
        logits_[j] = -T(__builtin_inf());
      }
      if (logits_[j] > largest) largest = logits_[j];
    }
    return largest;
  }

  int64_t find(T logit) const {
    int64_t j = 0;
    while (logits_[j] != logit) ++j;
    return j;
  }

  // l = log prior - |x - alpha y|^2 / 2 sigma^2; returns the largest.
  T logits(int64_t b) {
    const T* x = p_.x + b * p_.d;
    const T alpha = p_.alpha[b], half_precision = T(0.5 / (double(p_.sigma[b]) * p_.sigma[b]));
    Vec<T> largest = all<T>(-T(__builtin_inf()));
    for (int64_t j = 0; j < padded_; j += 4 * W<T>) {
      Vec<T> square[4] = {};
      for (int64_t k = 0; k < p_.d; ++k)
        for (int u = 0; u < 4; ++u) {
          const Vec<T> t = x[k] - alpha * load(cols_ + k * padded_ + j + u * W<T>);
          square[u] += t * t;
        }
      for (int u = 0; u < 4; ++u) {
        const Vec<T> l = load(log_prior_ + j + u * W<T>) - half_precision * square[u];
        store<T>(logits_ + j + u * W<T>, l);
        largest = larger<T>(l, largest);
      }
    }
    return max_lanes<T>(largest);
  }

  const Problem<T>& p_;
  const Moments<T>& m_;
  const int64_t s_, b0_, b1_;
  const double gap_;
  Arena scratch_;
  int64_t n_ = 0, padded_ = 0;
  double largest_norm_ = 0;
  T *rows_, *cols_, *logits_, *projections_, *log_prior_, *v_, *reference_, *centre_;
  double* distance_;  // |x - alpha centre| of every query
  Segments segments_;
  T* value_cols_;
  ValueRows<T> values_;  // for average
};

}  // namespace
