// A few components of a Gaussian mixture, row by row: scores less the reference, every difference
// x - alpha y taken as it is, so that nothing cancels at any noise level or width.
#pragma once
#include "simd/mixture_sums.h"

namespace {

template <class T>
struct Component {
  const T *row, *variance;  // variance: one number, or w of them of a diagonal
  T e;                      // its weight
};

// Noise level of a query.
struct Level {
  double alpha, sigma;
  bool operator==(const Level&) const = default;
};

// Makes weights of logits less the largest, in place, adds them up, and gives them to components.
template <class T>
void take_weights(const MixtureSums<T>& m, int64_t s, int64_t b, T* weight, Component<T>* c,
                  int64_t n) {
  for (int64_t j = n; j < round_up(n, W<T>); ++j) weight[j] = -T(__builtin_inf());
  Vec<T> sum{}, square_sum{};
  for (int64_t j = 0; j < n; j += W<T>) {
    const Vec<T> e = vexp(load(weight + j));
    store<T>(weight + j, e);
    sum += e;
    square_sum += e * e;
  }
  *m.weight_sum(s, b) += total<T>(sum);
  *m.weight_square_sum(s, b) += total<T>(square_sum);
  for (int64_t j = 0; j < n; ++j) c[j].e = weight[j];
}

// Whether variances can be used.
template <class T>
bool usable(const T* variance, int64_t n) {
  bool all_are = true;
  for (int64_t k = 0; k < n; ++k) all_are &= variance[k] >= 0 && variance[k] < T(__builtin_inf());
  return all_are;
}

template <class T>
class MixtureRows {
 public:
  // tile: the most components that take() has at once.
  MixtureRows(const Problem<T>& p, const Variances<T>& variances, const MixtureSums<T>& m,
              int64_t s, int64_t tile)
      : p_(p),
        m_(m),
        s_(s),
        w_(m.stride),
        own_(variances.rows > 1),
        diagonal_(variances.columns > 1),
        means_(m.mean >= 0),
        scratch_(room(tile)) {
    if (!scratch_.ok()) return;
    x_ = scratch_.template take<T>(w_);
    v_ = scratch_.template take<T>(p.K * w_);
    precision_ = scratch_.template take<T>(diagonal_ ? w_ : W<T>);
    reference_ = scratch_.template take<T>(w_);
    score_ = scratch_.template take<T>(most * w_);
    mean_ = scratch_.template take<T>(most * w_);
    weight_ = scratch_.template take<T>(most);
    projection_ = scratch_.template take<T>(most + W<T>);
    work_ = scratch_.template take<T>(m.rows * w_);
    delta_ = scratch_.template take<double>(w_);
    exact_ = scratch_.template take<double>(w_);
    all_weights_ = scratch_.template take<T>(tile + W<T>);
    memset(x_, 0, size_t(w_) * sizeof(T));
    memset(v_, 0, size_t(p.K * w_) * sizeof(T));
  }
  bool ok() const { return scratch_.ok(); }
  // How many components are taken at once.
  static constexpr int64_t most = 16;

  // Where there is one row of variances for all components: that row, as Component has it.
  void set_shared(const T* variance) { shared_ = variance; }

  // What follows is for query b of the batch.
  void set_query(int64_t b) {
    b_ = b;
    memcpy(x_, p_.x + b * p_.d, size_t(p_.d) * sizeof(T));
    for (int64_t k = 0; k < p_.K; ++k)
      memcpy(v_ + k * w_, p_.v + (b * p_.K + k) * p_.d, size_t(p_.d) * sizeof(T));
    const double alpha = p_.alpha[b], sigma = p_.sigma[b];
    alpha_ = T(alpha), square_ = T(sigma * sigma), ratio_ = T(alpha * alpha);
    if (level_ == Level{alpha, sigma}) return;
    level_ = {alpha, sigma};
    for (int64_t k = 0; !own_ && k < (diagonal_ ? w_ : 1); ++k)
      precision_[k] = T(1 / (sigma * sigma + alpha * alpha * double(shared_[k])));
  }
  const T* x() const { return x_; }
  const T* v() const { return v_; }

  // Makes the score of a component, whose logit is the largest so far, the reference, and the
  // weights relative to its own.
  void refer_to(const Component<T>& c, double logit) {
    raise_mixture(m_, s_, b_, logit);
    score_of(c, score_, nullptr, nullptr);
    refer_mixture_to(m_, s_, b_, score_, v_, delta_);
  }

  // Adds those of n components that are not negligible. logit: of each, nan or -inf where its
  // distance overflows. centred: whether the reference is a score that T need not represent, which
  // it stays while no component is the heaviest so far.
  void take(Component<T>* c, const double* logit, int64_t n, double gap, bool& centred) {
    double& max_logit = *m_.max_logit(s_, b_);
    int64_t heaviest = -1, count = 0;
    for (int64_t j = 0; j < n; ++j)
      if (logit[j] > (heaviest < 0 ? -__builtin_inf() : logit[heaviest])) heaviest = j;
    if (heaviest < 0) return;
    if (logit[heaviest] > max_logit) {
      refer_to(c[heaviest], logit[heaviest]);
      centred = false;
    }
    for (int64_t j = 0; j < n; ++j) {
      if (!(logit[j] >= max_logit - gap)) continue;
      all_weights_[count] = T(logit[j] - max_logit);
      c[count++] = c[j];
    }
    if (count == 0) return;
    take_weights(m_, s_, b_, all_weights_, c, count);
    if (!centred) return add(c, count);
    memcpy(exact_, m_.reference(s_, b_), size_t(w_) * sizeof(double));
    for (int64_t k = 0; k < w_; ++k) reference_[k] = T(exact_[k]);
    refer_mixture_to(m_, s_, b_, reference_, v_, delta_);
    add(c, count);
    refer_mixture_to(m_, s_, b_, exact_, v_, delta_);
  }

  // Adds n components; the sums of the weights and of their squares are the caller's.
  void add(const Component<T>* c, int64_t n) {
    const double* const reference = m_.reference(s_, b_);
    for (int64_t k = 0; k < w_; ++k) reference_[k] = T(reference[k]);
    for (; n > 0; c += most, n -= most) add_some(c, n < most ? n : most);
  }

 private:
  size_t room(int64_t tile) const {
    const auto t = [](int64_t n) { return Arena::bytes<T>(n); };
    return 2 * t(w_) + t(p_.K * w_) + t(diagonal_ ? w_ : W<T>) + 2 * t(most * w_) + t(most) +
           t(most + W<T>) + t(m_.rows * w_) + 2 * Arena::bytes<double>(w_) + t(tile + W<T>);
  }

  // 1/tau^2 into precision_: of every coordinate, or the one number.
  void read_precision(const T* variance) {
    if (!own_) return;
    if (!diagonal_) {
      const double alpha = level_.alpha, sigma = level_.sigma;
      precision_[0] = T(1 / (sigma * sigma + alpha * alpha * double(variance[0])));
      return;
    }
    for (int64_t k = 0; k < w_; k += W<T>)
      store<T>(precision_ + k, T(1) / (square_ + ratio_ * load(variance + k)));
  }

  // The score of a component less the reference, if there is one, and, where `mean` is given, what
  // the component says of x_0's mean.
  void score_of(const Component<T>& c, T* score, const T* reference, T* mean) {
    read_precision(c.variance);
    for (int64_t k = 0; k < w_; k += W<T>) {
      const Vec<T> y = load(c.row + k);
      const Vec<T> a = diagonal_ ? load(precision_ + k) : all(precision_[0]);
      const Vec<T> s = a * (alpha_ * y - load(x_ + k));
      store<T>(score + k, reference ? s - load(reference + k) : s);
      if (!mean) continue;
      const Vec<T> v = diagonal_ ? load(c.variance + k) : all(c.variance[0]);
      store<T>(mean + k, y - alpha_ * v * s);
    }
  }

  void add_some(const Component<T>* c, int64_t n) {
    double precision_sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      weight_[i] = c[i].e;
      score_of(c[i], score_ + i * w_, reference_, means_ ? mean_ + i * w_ : nullptr);
      // In double: what is taken off their mean may leave little of it.
      if (own_ && diagonal_)
        add_scaled(m_.row(s_, b_, m_.precision), w_, double(c[i].e), precision_);
      else if (own_)
        precision_sum += double(c[i].e) * precision_[0];
    }
    *m_.precision_sum(s_, b_) += precision_sum;
    memset(work_, 0, size_t(m_.rows * w_) * sizeof(T));
    const auto add_rows = [&](const T* coefficient, const T* rows, int64_t row) {
      T* to = work_ + row * w_;
      weighted_sums<T>(1, &coefficient, Rows<T>{rows, w_}, n, w_, &to);
    };
    add_rows(weight_, score_, 0);
    if (means_) {
      add_rows(weight_, mean_, m_.mean);
      for (int64_t i = 0; i < n; ++i)
        *m_.square_sum(s_, b_) += weight_[i] * dot(score_ + i * w_, score_ + i * w_, w_);
    } else if (p_.kind == MomentKind::matvec) {
      for (int64_t k = 0; k < p_.K; ++k) {
        const T* v = v_ + k * w_;
        dots<T>(1, &v, Rows<T>{score_, w_}, nullptr, n, w_, projection_, most, nullptr);
        double& sum = m_.projection_sum(s_, b_)[k];
        for (int64_t i = 0; i < n; ++i) sum += projection_[i] *= weight_[i];
        add_rows(projection_, score_, m_.second + k);
      }
    } else {
      T* to = work_ + m_.second * w_;
      const T* weight = weight_;
      weighted_sums<T, true>(1, &weight, Rows<T>{score_, w_}, n, w_, &to);
    }
    add_scaled(m_.first(s_, b_), m_.rows * w_, 1, work_);
  }

  const Problem<T>& p_;
  const MixtureSums<T>& m_;
  const int64_t s_, w_;
  const bool own_, diagonal_;  // variances of each component, and of each coordinate
  const bool means_;
  Arena scratch_;
  int64_t b_ = 0;
  T alpha_ = 0, square_ = 0, ratio_ = 0;  // alpha, sigma^2, alpha^2
  Level level_ = {__builtin_nan(""), 0};
  const T* shared_ = nullptr;
  T *x_, *v_, *precision_, *reference_, *score_, *mean_, *weight_, *projection_, *work_;
  double *delta_, *exact_;
  T* all_weights_;
};

}  // namespace
