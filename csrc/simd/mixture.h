// The sums of a Gaussian mixture under noise (dfkernels/ops/mixture_posterior/): components in the
// lanes of a transposed tile for the logits, rows of scores for the moments, every difference
// x - alpha y taken as it is, so that nothing cancels at any noise level or width.
#pragma once
#include "simd/dots.h"
#include "simd/log.h"
#include "simd/query.h"

namespace {

// Multiplies all sums of query b in split s.
template <class T>
void scale_mixture(const MixtureSums<T>& m, int64_t s, int64_t b, double by) {
  if (*m.weight_sum(s, b) == 0) return;
  *m.weight_sum(s, b) *= by;
  *m.weight_square_sum(s, b) *= by * by;
  *m.precision_sum(s, b) *= by;
  double* const vectors = m.vectors(s, b);
  for (int64_t i = 0; i < m.rows * m.stride; ++i) vectors[i] *= by;
}

// Makes the sums about the score `reference` of those about another. v: K rows; delta: room.
template <class T>
void refer_mixture_to(const MixtureSums<T>& m, int64_t s, int64_t b, const T* reference, const T* v,
                      int64_t K, double* delta) {
  const int64_t w = m.stride;
  T* const old = m.reference(s, b);
  const double weight = *m.weight_sum(s, b);
  double *const first = m.vectors(s, b) + MixtureSums<T>::first * w,
                *const second = m.vectors(s, b) + MixtureSums<T>::second * w;
  for (int64_t k = 0; k < w; ++k) {
    delta[k] = double(old[k]) - reference[k];
    old[k] = reference[k];
  }
  if (weight == 0) return;
  if (K == 0 && m.rows > MixtureSums<T>::second)  // not products with no vector
    for (int64_t k = 0; k < w; ++k) second[k] += delta[k] * (2 * first[k] + weight * delta[k]);
  for (int64_t r = 0; r < K; ++r) {
    const double along = dot(delta, v + r * w, w), of_first = dot(first, v + r * w, w);
    add_scaled(second + r * w, w, of_first + weight * along, delta);
    add_scaled(second + r * w, w, along, first);
  }
  add_scaled(first, w, weight, delta);
}

// Merges the splits of query b into split 0.
template <class T>
int merge_mixture(const Problem<T>& p, const MixtureSums<T>& m, int64_t splits, int64_t b) {
  const int64_t w = m.stride;
  int64_t heaviest = 0;
  for (int64_t s = 1; s < splits; ++s)
    if (*m.max_logit(s, b) > *m.max_logit(heaviest, b)) heaviest = s;
  const double max_logit = *m.max_logit(heaviest, b);
  if (splits == 1 || !(max_logit > -__builtin_inf())) return ok;
  Arena arena(Arena::bytes<T>(w) + Arena::bytes<T>(w * p.K) + Arena::bytes<double>(w));
  if (!arena.ok()) return out_of_memory;
  T *const reference = arena.take<T>(w), *const v = arena.take<T>(w * p.K);
  double* const delta = arena.take<double>(w);
  memcpy(reference, m.reference(heaviest, b), size_t(w) * sizeof(T));
  memset(v, 0, size_t(w * p.K) * sizeof(T));
  for (int64_t k = 0; k < p.K; ++k)
    memcpy(v + k * w, p.v + (b * p.K + k) * p.d, size_t(p.d) * sizeof(T));
  for (int64_t s = 0; s < splits; ++s) {
    refer_mixture_to(m, s, b, reference, v, p.K, delta);
    scale_mixture(m, s, b, __builtin_exp(*m.max_logit(s, b) - max_logit));
    if (s == 0) continue;
    *m.weight_sum(0, b) += *m.weight_sum(s, b);
    *m.weight_square_sum(0, b) += *m.weight_square_sum(s, b);
    *m.precision_sum(0, b) += *m.precision_sum(s, b);
    add_scaled(m.vectors(0, b), m.rows * w, 1, m.vectors(s, b));
  }
  *m.max_logit(0, b) = max_logit;
  return ok;
}

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
        scratch_(room()) {
    if (!scratch_.ok()) return;
    rows_ = scratch_.template take<T>(tile_ * w_);
    cols_ = scratch_.template take<T>(tile_ * p.d);
    variance_ = scratch_.template take<T>(variance_rows() * variance_width());
    precision_ = scratch_.template take<T>(own_ && diagonal_ ? w_ : precision_count());
    variance_cols_ = scratch_.template take<T>(own_ && diagonal_ ? tile_ * p.d : 0);
    precision_cols_ = scratch_.template take<T>(own_ && diagonal_ ? tile_ * p.d : 0);
    log_tau_ = scratch_.template take<T>(tile_);
    log_prior_ = scratch_.template take<T>(tile_);
    logits_ = scratch_.template take<T>(tile_);
    weight_ = scratch_.template take<T>(tile_);
    of_mean_ = scratch_.template take<T>(tile_);
    along_ = scratch_.template take<T>(tile_);
    projection_ = scratch_.template take<T>(chunk_ + W<T>);
    picked_ = scratch_.template take<int64_t>(tile_);
    x_ = scratch_.template take<T>(w_);
    v_ = scratch_.template take<T>(p.K * w_);
    score_ = scratch_.template take<T>(chunk_ * w_);
    mean_ = scratch_.template take<T>(chunk_ * w_);
    work_ = scratch_.template take<T>(m.rows * w_);
    delta_ = scratch_.template take<double>(w_);
    memset(x_, 0, size_t(w_) * sizeof(T));
    memset(v_, 0, size_t(p.K * w_) * sizeof(T));
    for (int64_t b = b0; b < b1; ++b) {
      *m.max_logit(s, b) = -__builtin_inf();
      *m.weight_sum(s, b) = *m.weight_square_sum(s, b) = *m.precision_sum(s, b) = 0;
      memset(m.vectors(s, b), 0, size_t(m.rows * w_) * sizeof(double));
      memset(m.reference(s, b), 0, size_t(w_) * sizeof(T));
    }
  }

  int run(int64_t n0, int64_t n1) {
    if (!scratch_.ok()) return out_of_memory;
    if (!own_) {
      if (!read_variance(0, 0)) return unusable_variance;
    }
    for (int64_t i = n0; i < n1; i += tile_) {
      n_ = n1 - i < tile_ ? n1 - i : tile_;
      padded_ = round_up(n_, 4 * W<T>);
      if (const int status = read_tile(i)) return status;
      level_ = {__builtin_nan(""), 0};
      for (int64_t b = b0_; b < b1_; ++b) visit(b);
    }
    return ok;
  }

 private:
  static constexpr int64_t chunk_ = sum_chain;
  struct Level {
    double alpha, sigma;
    bool operator==(const Level&) const = default;
  };

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
           t(own_ && diagonal_ ? w_ : precision_count()) +
           2 * t(own_ && diagonal_ ? tile_ * p_.d : 0) + 6 * t(tile_) + t(chunk_ + W<T>) +
           Arena::bytes<int64_t>(tile_) + t(w_) + t(p_.K * w_) + 2 * t(chunk_ * w_) +
           t(m_.rows * w_) + Arena::bytes<double>(w_);
  }

  // Row `row` of the variances as row j of the tile; false where one is not usable.
  bool read_variance(int64_t row, int64_t j) {
    T* const to = variance_ + j * variance_width();
    bool usable = true;
    for (int64_t k = 0; k < variance_width(); ++k) {
      to[k] = k < variances_.columns ? variances_.at[row * variances_.columns + k] : T(1);
      usable &= to[k] >= 0 && to[k] < T(__builtin_inf());
    }
    return usable;
  }

  int read_tile(int64_t start) {
    read_log_prior(p_, start, n_, padded_, log_prior_);
    for (int64_t j = 0; j < n_; ++j) {
      T* const row = rows_ + j * w_;
      const bool masked = !(log_prior_[j] > -T(__builtin_inf()));
      memset(row, 0, size_t(w_) * sizeof(T));
      if (!masked) {
        read_row(p_, start + j, row);
        if (!finite_row(row, p_.d)) return non_finite_atom;
      }
      if (!own_) continue;
      if (masked)
        for (int64_t k = 0; k < variance_width(); ++k) variance_[j * variance_width() + k] = 1;
      else if (!read_variance(start + j, j))
        return unusable_variance;
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
    square_ = square, ratio_ = ratio;
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
        const Vec<T> x = all(x_[k]);
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
    memcpy(x_, p_.x + b * p_.d, size_t(p_.d) * sizeof(T));
    const T alpha = p_.alpha[b];
    precisions({p_.alpha[b], p_.sigma[b]});
    const T largest = logits(alpha);
    double* const max_logit = m_.max_logit(s_, b);
    if (!(largest > -T(__builtin_inf())) || largest < *max_logit - gap_) return;
    for (int64_t k = 0; k < p_.K; ++k)
      memcpy(v_ + k * w_, p_.v + (b * p_.K + k) * p_.d, size_t(p_.d) * sizeof(T));
    if (largest > *max_logit) {
      int64_t heaviest = 0;
      while (logits_[heaviest] != largest) ++heaviest;
      scale_mixture(m_, s_, b, __builtin_exp(*max_logit - double(largest)));
      *max_logit = largest;
      memset(mean_, 0, size_t(w_) * sizeof(T));
      score_of(heaviest, alpha, mean_, 0);
      refer_mixture_to(m_, s_, b, mean_, v_, p_.K, delta_);
    }
    if (many(T(*max_logit - gap_))) return add_lanes(b, alpha, T(*max_logit));
    const int64_t count = weigh(b, T(*max_logit));
    for (int64_t c = 0; c < count; c += chunk_)
      add(b, alpha, c, count - c < chunk_ ? count - c : chunk_);
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
    const T* const reference = m_.reference(s_, b);
    double* const vectors = m_.vectors(s_, b);
    const auto row = [&](int64_t i) { return vectors + i * w_; };
    const bool means = p_.kind == MomentKind::posterior;
    for (int64_t k = 0; k < p_.d; ++k) {
      const T x = x_[k], r = reference[k];
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
      row(MixtureSums<T>::first)[k] += total<T>(first[0] + first[1]);
      row(MixtureSums<T>::mean)[k] += total<T>(mean[0] + mean[1]);
      row(MixtureSums<T>::precision)[k] += total<T>(precision[0] + precision[1]);
      if (p_.kind != MomentKind::matvec)
        row(MixtureSums<T>::second)[k] += total<T>(second[0] + second[1]);
    }
    for (int64_t q = 0; q < p_.K; ++q) {
      const T* const v = v_ + q * w_;
      for (int64_t j = 0; j < padded_; j += W<T>) {
        Vec<T> along{};
        for (int64_t k = 0; k < p_.d;) {
          Vec<T> part{};
          for (const int64_t end = k + dot_chain < p_.d ? k + dot_chain : p_.d; k < end; ++k)
            part += v[k] * (score_in_lanes<OWN, DIAGONAL>(j, k, alpha, x_[k]) - reference[k]);
          along += part;
        }
        store<T>(along_ + j, load(weight_ + j) * along);
      }
      for (int64_t k = 0; k < p_.d; ++k) {
        Vec<T> sum{};
        for (int64_t j = 0; j < padded_; j += W<T>)
          sum += load(along_ + j) *
                 (score_in_lanes<OWN, DIAGONAL>(j, k, alpha, x_[k]) - reference[k]);
        row(MixtureSums<T>::second + q)[k] += total<T>(sum);
      }
    }
  }

  // Weights of the components that are not negligible into weight_, their numbers into picked_.
  int64_t weigh(int64_t b, T max_logit) {
    const T least = T(max_logit - gap_);
    int64_t count = 0;
    for (int64_t j = 0; j < n_; j += W<T>) {
      if (!(max_lanes<T>(load(logits_ + j)) >= least)) continue;
      for (int64_t i = j; i < j + W<T> && i < n_; ++i) {
        if (!(logits_[i] >= least)) continue;
        weight_[count] = logits_[i] - max_logit;
        picked_[count++] = i;
      }
    }
    for (int64_t j = count; j < round_up(count, W<T>); ++j) weight_[j] = -T(__builtin_inf());
    Vec<T> sum{}, square_sum{};
    for (int64_t j = 0; j < count; j += W<T>) {
      const Vec<T> e = vexp(load(weight_ + j));
      store<T>(weight_ + j, e);
      sum += e;
      square_sum += e * e;
    }
    *m_.weight_sum(s_, b) += total<T>(sum);
    *m_.weight_square_sum(s_, b) += total<T>(square_sum);
    return count;
  }

  // The score of component j less the reference, and, with `mean`, what it says of x_0's mean.
  void score_of(int64_t j, T alpha, T* score, const T* reference, T* mean = nullptr) {
    const int64_t row = own_ ? j * variance_width() : 0;
    if (own_ && diagonal_)
      for (int64_t k = 0; k < w_; k += W<T>)
        store<T>(precision_ + k, T(1) / (square_ + ratio_ * load(variance_ + row + k)));
    const T* const precision = own_ && diagonal_ ? precision_ : precision_ + row;
    for (int64_t k = 0; k < w_; k += W<T>) {
      const Vec<T> y = load(rows_ + j * w_ + k);
      const Vec<T> a = diagonal_ ? load(precision + k) : all(precision[0]);
      const Vec<T> s = a * (alpha * y - load(x_ + k));
      store<T>(score + k, reference ? s - load(reference + k) : s);
      if (!mean) continue;
      const Vec<T> v = diagonal_ ? load(variance_ + row + k) : all(variance_[row]);
      store<T>(mean + k, y - alpha * v * s);
    }
  }

  // Adds n <= chunk_ picked components, from the first on, to the sums of query b.
  void add(int64_t b, T alpha, int64_t first, int64_t n) {
    const T* const e = weight_ + first;
    const bool means = p_.kind == MomentKind::posterior;
    double precision_sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t j = picked_[first + i];
      score_of(j, alpha, score_ + i * w_, m_.reference(s_, b), means ? mean_ + i * w_ : nullptr);
      // In double: what is taken off their mean may leave little of it.
      if (own_ && diagonal_)
        add_scaled(m_.vectors(s_, b) + MixtureSums<T>::precision * w_, w_, double(e[i]),
                   precision_);
      else if (own_)
        precision_sum += double(e[i]) * precision_[j];
    }
    *m_.precision_sum(s_, b) += precision_sum;
    memset(work_, 0, size_t(m_.rows * w_) * sizeof(T));
    const auto add_rows = [&](const T* coefficient, const T* rows, int64_t row) {
      T* to = work_ + row * w_;
      weighted_sums<T>(1, &coefficient, Rows<T>{rows, w_}, n, w_, &to);
    };
    add_rows(e, score_, MixtureSums<T>::first);
    if (means) add_rows(e, mean_, MixtureSums<T>::mean);
    if (p_.kind == MomentKind::matvec) {
      for (int64_t k = 0; k < p_.K; ++k) {
        const T* v = v_ + k * w_;
        dots<T>(1, &v, Rows<T>{score_, w_}, nullptr, n, w_, projection_, chunk_, nullptr);
        for (int64_t i = 0; i < n; ++i) projection_[i] *= e[i];
        add_rows(projection_, score_, MixtureSums<T>::second + k);
      }
    } else {
      T* to = work_ + MixtureSums<T>::second * w_;
      weighted_sums<T, true>(1, &e, Rows<T>{score_, w_}, n, w_, &to);
    }
    add_scaled(m_.vectors(s_, b), m_.rows * w_, 1, work_);
  }

  const Problem<T>& p_;
  const Variances<T>& variances_;
  const MixtureSums<T>& m_;
  const int64_t s_, b0_, b1_, w_, tile_;
  const bool own_, diagonal_;  // variances of each component, and of each coordinate
  const double gap_;
  Arena scratch_;
  Level level_ = {};
  T square_ = 0, ratio_ = 0;  // sigma^2, alpha^2
  int64_t n_ = 0, padded_ = 0;
  T *rows_, *cols_, *variance_, *precision_, *variance_cols_, *precision_cols_, *log_tau_;
  T *log_prior_, *logits_, *weight_, *of_mean_, *along_, *projection_, *x_, *v_, *score_, *mean_;
  T* work_;
  int64_t* picked_;
  double* delta_;
};

}  // namespace
