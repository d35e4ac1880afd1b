// The sweep over the components of a Gaussian mixture for small d, or where each has a diagonal
// covariance of its own and queries have levels that differ: components in the lanes of a
// transposed tile, every distance by differences. simd/mixture_expanded.h and
// simd/mixture_diagonal.h have the others.
#pragma once
#include "simd/log.h"
#include "simd/mixture_rows.h"

namespace {

template <class T>
class MixtureSweep {
 public:
  MixtureSweep(const Problem<T>& p, const Variances<T>& variances, const MixtureSums<T>& m,
               int64_t s, int64_t b0, int64_t b1)
      : p_(p),
        variances_(variances),
        m_(m),
        s_(s),
        b0_(b0),
        b1_(b1),
        w_(m.stride),
        tile_(tile_rows()),
        own_(variances.rows > 1),
        diagonal_(variances.columns > 1),
        gap_(weight_gap(p)),
        some_(p, variances, m, s, 0),
        scratch_(room()) {
    if (!scratch_.ok()) return;
    rows_ = scratch_.template take<T>(tile_ * w_);
    cols_ = scratch_.template take<T>(tile_ * p.d);
    variance_ = scratch_.template take<T>(variance_rows() * variance_width());
    precision_ = scratch_.template take<T>(own_ && diagonal_ ? 0 : precision_count());
    variance_cols_ = scratch_.template take<T>(own_ && diagonal_ ? tile_ * p.d : 0);
    precision_cols_ = scratch_.template take<T>(own_ && diagonal_ ? tile_ * p.d : 0);
    log_tau_ = scratch_.template take<T>(tile_);
    log_prior_ = scratch_.template take<T>(tile_);
    logits_ = scratch_.template take<T>(tile_);
    weight_ = scratch_.template take<T>(tile_);
    of_mean_ = scratch_.template take<T>(tile_);
    along_ = scratch_.template take<T>(tile_);
    picked_ = scratch_.template take<Component<T>>(tile_);
    reference_ = scratch_.template take<T>(w_);
    some_.set_shared(variance_);
    for (int64_t b = b0; b < b1; ++b) clear_mixture(m, s, query_at(p, b));
  }

  int run(int64_t n0, int64_t n1) {
    if (!scratch_.ok() || !some_.ok()) return out_of_memory;
    if (!own_) {
      if (!read_variance(0, 0)) return unusable_variance;
    }
    for (int64_t i = n0; i < n1; i += tile_) {
      n_ = n1 - i < tile_ ? n1 - i : tile_;
      padded_ = round_up(n_, 4 * W<T>);
      if (const int status = read_tile(i)) return status;
      level_ = {__builtin_nan(""), 0};
      for (int64_t b = b0_; b < b1_; ++b) visit(query_at(p_, b));
    }
    return ok;
  }

 private:
  // So many components that the tile stays in a core's own cache while all queries pass.
  int64_t tile_rows() const {
    const int64_t n = tile_bytes / (2 * m_.stride * int64_t(sizeof(T))) / (4 * W<T>)*(4 * W<T>);
    return n < 4 * W<T> ? 4 * W<T> : n < 512 ? n : 512;
  }
  int64_t variance_rows() const { return variances_.rows > 1 ? tile_ : 1; }
  int64_t variance_width() const { return variances_.columns > 1 ? w_ : 1; }
  int64_t precision_count() const { return variance_rows() * variance_width(); }
  size_t room() const {
    const auto t = [](int64_t n) { return Arena::bytes<T>(n); };
    return t(tile_ * w_) + t(tile_ * p_.d) + t(variance_rows() * variance_width()) +
           t(own_ && diagonal_ ? 0 : precision_count()) +
           2 * t(own_ && diagonal_ ? tile_ * p_.d : 0) + 6 * t(tile_) +
           Arena::bytes<Component<T>>(tile_) + t(w_);
  }

  // Row `row` of the variances as row j of the tile; false where one is not usable.
  bool read_variance(int64_t row, int64_t j) {
    T* const to = variance_ + j * variance_width();
    for (int64_t k = 0; k < variance_width(); ++k)
      to[k] = k < variances_.columns ? variances_.at[row * variances_.columns + k] : T(1);
    return usable(to, variance_width());
  }

  int read_tile(int64_t start) {
    read_log_prior(p_, start, n_, padded_, log_prior_);
    for (int64_t j = 0; j < n_; ++j) {
      T* const row = rows_ + j * w_;
      memset(row, 0, size_t(w_) * sizeof(T));
      read_row(p_, row_of(p_, start + j), row);
      if (!finite_row(row, p_.d)) return non_finite_atom;
      if (own_ && !read_variance(row_of(p_, start + j), j)) return unusable_variance;
    }
    if (own_ && !diagonal_)
      for (int64_t j = n_; j < padded_; ++j) variance_[j] = 0;
    transpose(Rows<T>{rows_, w_}, n_, p_.d, cols_, padded_);
    if (own_ && diagonal_) transpose(Rows<T>{variance_, w_}, n_, p_.d, variance_cols_, padded_);
    return ok;
  }

  // 1/tau^2 of the tile's components, and the sum of log tau less that of tau_0, for a level.
  void precisions(Level level) {
    if (level == level_) return;
    level_ = level;
    const double square = level.sigma * level.sigma, ratio = level.alpha * level.alpha;
    const double unit = 1 / (square + ratio * variances_.usual);
    for (int64_t j = 0; j < padded_; ++j) log_tau_[j] = 0;
    if (own_ && diagonal_) return diagonal_precisions(T(square), T(ratio));
    const int64_t count = own_ ? n_ : variance_width();
    for (int64_t i = 0; i < count; ++i)
      precision_[i] = T(1 / (square + ratio * double(variance_[i])));
    if (!own_) return;
    for (int64_t j = 0; j < n_; ++j)
      log_tau_[j] = T((square + ratio * double(variance_[j])) * unit);
    for (int64_t j = n_; j < padded_; ++j) precision_[j] = 0, log_tau_[j] = 1;
    for (int64_t j = 0; j < padded_; j += W<T>)
      store<T>(log_tau_ + j, (T(0.5) * T(p_.d)) * vlog(load(log_tau_ + j)));
  }
  void diagonal_precisions(T square, T ratio) {
    const T usual = square + ratio * T(variances_.usual);  // equal variances are exactly this
    for (int64_t j = 0; j < padded_; j += W<T>) {
      Vec<T> sum{}, rounded{};  // widths of all sizes have logarithms that cancel
      for (int64_t k = 0; k < p_.d; ++k) {
        const int64_t at = k * padded_ + j;
        const Vec<T> tau2 = square + ratio * load(variance_cols_ + at);
        store<T>(precision_cols_ + at, T(1) / tau2);
        const Vec<T> term = vlog(tau2 / usual), next = sum + term, added = next - sum;
        rounded += (sum - (next - added)) + (term - added);
        sum = next;
      }
      store<T>(log_tau_ + j, T(0.5) * (sum + rounded));
    }
  }

  // Squared distances in units of tau, four vectors of components from j on; of tau = 1 where all
  // coordinates of a component share it.
  template <bool OWN, bool DIAGONAL>
  void distances(T alpha, int64_t j, Vec<T>* square) const {
    const int64_t d = p_.d, ld = padded_;
    for (int64_t k = 0; k < d;) {
      Vec<T> part[4] = {};
      for (const int64_t end = k + dot_chain < d ? k + dot_chain : d; k < end; ++k) {
        const Vec<T> x = all(some_.x()[k]);
        for (int u = 0; u < 4; ++u) {
          const int64_t at = k * ld + j + u * W<T>;
          const Vec<T> t = x - alpha * load(cols_ + at);
          if (!DIAGONAL)
            part[u] += t * t;
          else if (OWN)
            part[u] += t * t * load(precision_cols_ + at);
          else
            part[u] += t * t * precision_[k];
        }
      }
      for (int u = 0; u < 4; ++u) square[u] += part[u];
    }
  }

  // Returns the largest.
  T logits(T alpha) {
    Vec<T> largest = all<T>(-T(__builtin_inf()));
    for (int64_t j = 0; j < padded_; j += 4 * W<T>) {
      Vec<T> square[4] = {};
      if (!diagonal_)
        distances<false, false>(alpha, j, square);
      else if (own_)
        distances<true, true>(alpha, j, square);
      else
        distances<false, true>(alpha, j, square);
      for (int u = 0; u < 4; ++u) {
        const int64_t at = j + u * W<T>;
        if (!diagonal_) square[u] *= own_ ? load(precision_ + at) : all(precision_[0]);
        const Vec<T> l = load(log_prior_ + at) - load(log_tau_ + at) - T(0.5) * square[u];
        store<T>(logits_ + at, l);
        largest = larger<T>(l, largest);
      }
    }
    return max_lanes<T>(largest);
  }

  void visit(int64_t b) {
    some_.set_query(b);
    const T alpha = p_.alpha[b];
    precisions({p_.alpha[b], p_.sigma[b]});
    const T largest = logits(alpha);
    double* const max_logit = m_.max_logit(s_, b);
    if (!(largest > -T(__builtin_inf())) || largest < *max_logit - gap_) return;
    if (largest > *max_logit) {
      int64_t heaviest = 0;
      while (logits_[heaviest] != largest) ++heaviest;
      some_.refer_to(component(heaviest, 1), largest);
    }
    if (many(T(*max_logit - gap_))) return add_lanes(b, alpha, T(*max_logit));
    some_.add(picked_, weigh(b, T(*max_logit)));
  }
  Component<T> component(int64_t j, T e) const {
    return {rows_ + j * w_, variance_ + (own_ ? j * variance_width() : 0), e};
  }

  // Whether so many of the tile are not negligible that all of it is added, lane by lane.
  bool many(T least) const {
    if (padded_ < 16 * W<T>) return false;  // sums over the lanes would cost too much
    const Vec<T> none = all(-T(__builtin_inf()));
    IntVec<T> count{}, outliers{};  // whose scores may overflow, and 0 times infinity is nan
    for (int64_t j = 0; j < padded_; j += W<T>) {
      const Vec<T> l = load(logits_ + j);
      count -= l >= least;
      outliers |= ~(l > none) & (load(log_prior_ + j) > none);
    }
    int64_t sum = 0, all_outliers = 0;
    for (int i = 0; i < W<T>; ++i) sum += int64_t(count[i]), all_outliers |= int64_t(outliers[i]);
    return 4 * sum > n_ && !all_outliers;
  }

  void add_lanes(int64_t b, T alpha, T max_logit) {
    Vec<T> sum{}, square_sum{}, precision_sum{};
    for (int64_t j = 0; j < padded_; j += W<T>) {
      const Vec<T> e = vexp(load(logits_ + j) - max_logit);
      store<T>(weight_ + j, e);
      sum += e;
      square_sum += e * e;
      if (own_ && !diagonal_) {
        precision_sum += e * load(precision_ + j);
        store<T>(of_mean_ + j, alpha * e * load(variance_ + j));
      }
    }
    *m_.weight_sum(s_, b) += total<T>(sum);
    *m_.weight_square_sum(s_, b) += total<T>(square_sum);
    *m_.precision_sum(s_, b) += total<T>(precision_sum);
    if (!diagonal_ && own_)
      add_columns<true, false>(b, alpha);
    else if (own_)
      add_columns<true, true>(b, alpha);
    else if (diagonal_)
      add_columns<false, true>(b, alpha);
    else
      add_columns<false, false>(b, alpha);
  }

  // s of coordinate k, of the components from j on.
  template <bool OWN, bool DIAGONAL>
  inline __attribute__((always_inline)) Vec<T> score_in_lanes(int64_t j, int64_t k, T alpha,
                                                              T x) const {
    const Vec<T> t = alpha * load(cols_ + k * padded_ + j) - x;
    if (OWN && DIAGONAL) return t * load(precision_cols_ + k * padded_ + j);
    if (OWN) return t * load(precision_ + j);
    return t * precision_[DIAGONAL ? k : 0];
  }

  // Adds the tile, with weight_, to the vectors of query b.
  template <bool OWN, bool DIAGONAL>
  void add_columns(int64_t b, T alpha) {
    const T *const reference = reference_, *const x_of = some_.x();
    for (int64_t k = 0; k < w_; ++k) reference_[k] = T(m_.reference(s_, b)[k]);
    const auto row = [&](int64_t r) { return m_.row(s_, b, r); };
    const bool means = m_.mean >= 0;
    for (int64_t k = 0; k < p_.d; ++k) {
      const T x = x_of[k], r = reference[k];
      Vec<T> first[2] = {}, second[2] = {}, mean[2] = {}, precision[2] = {};
      for (int64_t j = 0; j < padded_; j += 2 * W<T>)
        for (int u = 0; u < 2; ++u) {
          const int64_t i = j + u * W<T>;
          const Vec<T> e = load(weight_ + i);
          const Vec<T> score = score_in_lanes<OWN, DIAGONAL>(i, k, alpha, x), s = score - r;
          const Vec<T> es = e * s;
          first[u] += es;
          second[u] += es * s;
          if (OWN && DIAGONAL) precision[u] += e * load(precision_cols_ + k * padded_ + i);
          if (!means) continue;
          mean[u] += e * load(cols_ + k * padded_ + i);
          if (OWN && DIAGONAL)
            mean[u] -= alpha * e * load(variance_cols_ + k * padded_ + i) * score;
          else if (OWN)
            mean[u] -= load(of_mean_ + i) * score;
          else
            mean[u] -= alpha * e * variance_[DIAGONAL ? k : 0] * score;
        }
      row(0)[k] += total<T>(first[0] + first[1]);
      if (means) row(m_.mean)[k] += total<T>(mean[0] + mean[1]);
      if (OWN && DIAGONAL) row(m_.precision)[k] += total<T>(precision[0] + precision[1]);
      if (p_.kind == MomentKind::matvec) continue;
      (means ? *m_.square_sum(s_, b) : row(m_.second)[k]) += total<T>(second[0] + second[1]);
    }
    for (int64_t q = 0; q < p_.K; ++q) {
      const T* const v = some_.v() + q * w_;
      Vec<T> projections{};
      for (int64_t j = 0; j < padded_; j += W<T>) {
        Vec<T> along{};
        for (int64_t k = 0; k < p_.d;) {
          Vec<T> part{};
          for (const int64_t end = k + dot_chain < p_.d ? k + dot_chain : p_.d; k < end; ++k)
            part += v[k] * (score_in_lanes<OWN, DIAGONAL>(j, k, alpha, x_of[k]) - reference[k]);
          along += part;
        }
        along *= load(weight_ + j);
        store<T>(along_ + j, along);
        projections += along;
      }
      m_.projection_sum(s_, b)[q] += total<T>(projections);
      for (int64_t k = 0; k < p_.d; ++k) {
        Vec<T> sum{};
        for (int64_t j = 0; j < padded_; j += W<T>)
          sum += load(along_ + j) *
                 (score_in_lanes<OWN, DIAGONAL>(j, k, alpha, x_of[k]) - reference[k]);
        row(m_.second + q)[k] += total<T>(sum);
      }
    }
  }

  // The components that are not negligible, with their weights, into picked_; returns how many.
  int64_t weigh(int64_t b, T max_logit) {
    const T least = T(max_logit - gap_);
    int64_t count = 0;
    for (int64_t j = 0; j < n_; j += W<T>) {
      if (!(max_lanes<T>(load(logits_ + j)) >= least)) continue;
      for (int64_t i = j; i < j + W<T> && i < n_; ++i) {
        if (!(logits_[i] >= least)) continue;
        weight_[count] = logits_[i] - max_logit;
        picked_[count++] = component(i, 0);
      }
    }
    take_weights(m_, s_, b, weight_, picked_, count);
    return count;
  }

  const Problem<T>& p_;
  const Variances<T>& variances_;
  const MixtureSums<T>& m_;
  const int64_t s_, b0_, b1_, w_, tile_;
  const bool own_, diagonal_;  // variances of each component, and of each coordinate
  const double gap_;
  MixtureRows<T> some_;
  Arena scratch_;
  Level level_ = {};
  int64_t n_ = 0, padded_ = 0;
  T *rows_, *cols_, *variance_, *precision_, *variance_cols_, *precision_cols_, *log_tau_;
  T *log_prior_, *logits_, *weight_, *of_mean_, *along_, *reference_;
  Component<T>* picked_;
};

}  // namespace
