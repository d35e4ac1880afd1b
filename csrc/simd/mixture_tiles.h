// Whole tiles of a Gaussian mixture's components, added for several queries at once: their moments
// about the score of the centre, -P_0 g, are weighted sums of the rows, which are shared.
//
// With simd/mixture_widths.h's p, delta, g and t, and P of the metric, P t = t where there is none,
//   s + P_0 g = alpha p P t - delta g
//   m = centre + sigma^2 p P t + alpha v p g
// so sum e (s + P_0 g) = alpha P sum e p t - g sum e delta, and so on for the others.
#pragma once
#include "simd/mixture_metric.h"
#include "simd/mixture_widths.h"

namespace {

// What the sweep knows of a query.
template <class T>
struct MixtureState {
  int64_t b;  // of the batch
  Level level;
  double precision = 1;  // p_0; 1 in a metric
  double square = 0;     // |g|^2, or |g|_P^2
  double constant = 0;   // what all logits have in common
  double factor = 1;     // how much less than |t|^2 may be, if coordinates differ in size
  bool centred = true;   // whether sums are about the score of the centre
};

// A query that takes a tile, with weights e p; beside them e and delta for products with vectors,
// and e p^2 and e p delta for the diagonal.
template <class T>
struct WholeQuery {
  int64_t i;
  const T *weight, *other, *delta;
};

template <class T>
class MixtureTiles {
 public:
  MixtureTiles(const Problem<T>& p, const Variances<T>& variances, const MixtureMetric<T>& metric,
               const MixtureSums<T>& m, int64_t s, int64_t B, int64_t tile)
      : p_(p),
        metric_(metric),
        m_(m),
        s_(s),
        B_(B),
        w_(m.stride),
        tile_(tile),
        own_(variances.rows > 1),
        rows_(p.kind == MomentKind::matvec     ? 1 + p.K
              : p.kind == MomentKind::diagonal ? 3
                                               : 1),
        scratch_(room()) {
    if (!ok()) return;
    g_ = scratch_.template take<double>(B * w_);
    one_ = scratch_.template take<double>(w_);
    work_ = scratch_.template take<T>(B * rows_ * w_);
    v_ = scratch_.template take<T>(B * p.K * w_);
    projection_ = scratch_.template take<T>(tile_queries * tile);
    delta_ = scratch_.template take<T>(tile_queries * tile);
    sums_ = scratch_.template take<Sums>(B);
    of_v_ = scratch_.template take<OfVector>(B * p.K);
    for (int64_t k = 0; k < w_; ++k) one_[k] = 1;
    memset(v_, 0, size_t(B * p.K * w_) * sizeof(T));
    memset(delta_, 0, size_t(tile_queries * tile) * sizeof(T));
  }
  bool ok() const { return scratch_.ok(); }

  void set_query(int64_t i, const MixtureState<T>& query) {
    double* const g = g_ + i * w_;
    for (int64_t k = 0; k < w_; ++k) g[k] = k < p_.d ? double(p_.x[query.b * p_.d + k]) : 0;
    for (int64_t k = 0; p_.centre && k < p_.d; ++k) g[k] -= query.level.alpha * p_.centre[k];
    for (int64_t r = 0; r < p_.K; ++r) {
      T* const v = v_ + (i * p_.K + r) * w_;
      memcpy(v, p_.v + (query.b * p_.K + r) * p_.d, size_t(p_.d) * sizeof(T));
      of_v_[i * p_.K + r] = {.along_g = dot(g, v, w_)};
      for (int64_t k = 0; !own_ && k < p_.d; ++k) v[k] *= metric_.metric(i)[k];
    }
  }
  // Forgets what there is of query i; the reference is the score of the centre.
  void restart(int64_t i, const MixtureState<T>& query) {
    sums_[i] = {};
    for (int64_t r = 0; r < p_.K; ++r) {
      OfVector& of_v = of_v_[i * p_.K + r];
      of_v = {.origin = __builtin_nan(""), .along_g = of_v.along_g};
    }
    memset(work(i), 0, size_t(rows_ * w_) * sizeof(T));
    double* const reference = m_.reference(s_, query.b);
    const double *const g = g_ + i * w_, *const scale = scale_of(i);
    for (int64_t k = 0; k < w_; ++k) reference[k] = -query.precision * scale[k] * g[k];
  }

  // Makes weights of logits less the largest, in place, for add(); the scalars go to the sums.
  // squares: for posterior |s + P_0 g|^2, for the others room.
  WholeQuery<T> weigh(const Tile<T>& t, int64_t i, const MixtureState<T>& query,
                      const MixtureWidths<T>& widths, T* l, T* squares, T max_logit) {
    T* const deltas = delta_ + i % tile_queries * tile_;
    const auto weigh = [&](auto kind) {
      constexpr MomentKind KIND = MomentKind(kind.value);
      if (own_)
        weigh_some<KIND, true>(t, i, query, widths, l, squares, deltas, max_logit);
      else
        weigh_some<KIND, false>(t, i, query, widths, l, squares, deltas, max_logit);
    };
    if (p_.kind == MomentKind::posterior)
      weigh(Count<int(MomentKind::posterior)>{});
    else if (p_.kind == MomentKind::matvec)
      weigh(Count<int(MomentKind::matvec)>{});
    else
      weigh(Count<int(MomentKind::diagonal)>{});
    return {i, l, own_ ? squares : l, deltas};
  }

  // Adds the tile for the queries that take it.
  void add(const Tile<T>& t, const MixtureState<T>* queries, const WholeQuery<T>* active,
           int64_t n) {
    const T* weight[tile_queries] = {};
    T* to[tile_queries] = {};
    for (int64_t i = 0; i < n; ++i) weight[i] = active[i].weight, to[i] = work(active[i].i);
    weighted_sums<T>(n, weight, t.rows, t.n, w_, to);
    if (p_.kind == MomentKind::diagonal) add_squares(t, active, n);
    for (int64_t r = 0; r < p_.K; ++r) {
      const T* v[tile_queries] = {};
      for (int64_t i = 0; i < n; ++i) v[i] = v_ + (active[i].i * p_.K + r) * w_;
      dots<T>(n, v, t.rows, t.cols, t.n, w_, projection_, tile_, nullptr);
      for (int64_t i = 0; i < n; ++i) {
        T* const projection = projection_ + i * tile_;
        weigh_projections(t, queries[active[i].i], active[i], r, projection);
        weight[i] = projection;
        to[i] = work(active[i].i) + (1 + r) * w_;
      }
      weighted_sums<T>(n, weight, t.rows, t.n, w_, to);
    }
  }

  // Moves what was added for query i into its sums in double.
  void flush(int64_t i, const MixtureState<T>& query) {
    Sums& sums = sums_[i];
    if (sums.weight == 0) return;
    T* const from = work(i);
    double* const first = m_.first(s_, query.b);
    const double alpha = query.level.alpha, noise = query.level.sigma * query.level.sigma,
                 weight = sums.weight, delta = sums.delta;
    const double *const g = g_ + i * w_, *const scale = scale_of(i);
    for (int64_t k = 0; k < w_; ++k) first[k] += alpha * scale[k] * from[k] - g[k] * delta;
    if (m_.mean >= 0) {
      double* const mean = m_.row(s_, query.b, m_.mean);
      const T* const variance = metric_.variance();
      for (int64_t k = 0; k < w_; ++k) {
        const double drawn = own_ ? sums.drawn : weight * scale[k] * double(variance[k]);
        mean[k] += noise * scale[k] * from[k] + alpha * g[k] * drawn;
      }
      for (int64_t k = 0; p_.centre && k < p_.d; ++k) mean[k] += weight * p_.centre[k];
    }
    double* const second = m_.row(s_, query.b, m_.second);
    for (int64_t k = 0; p_.kind == MomentKind::diagonal && k < w_; ++k) {
      const double along = alpha * scale[k];
      second[k] += along * (along * from[w_ + k] - 2 * g[k] * from[2 * w_ + k]) +
                   g[k] * g[k] * sums.delta_square;
    }
    for (int64_t r = 0; r < p_.K; ++r) {
      const T* const row = from + (1 + r) * w_;
      const OfVector& of_v = of_v_[i * p_.K + r];
      for (int64_t k = 0; k < w_; ++k)
        second[r * w_ + k] += alpha * scale[k] * (row[k] + of_v.origin * from[k]) -
                              g[k] * (of_v.delta + of_v.origin * delta);
    }
    for (int64_t r = 0; r < p_.K; ++r) {
      OfVector& of_v = of_v_[i * p_.K + r];
      m_.projection_sum(s_, query.b)[r] += of_v.weighted + of_v.origin * sums.weight;
      of_v.delta = of_v.weighted = 0;
    }
    sums = {};
    memset(from, 0, size_t(rows_ * w_) * sizeof(T));
  }

 private:
  // Since the last flush: sum e, e delta, e v p and e delta^2.
  struct Sums {
    double weight = 0, delta = 0, drawn = 0, delta_square = 0;
  };
  // Of the projections c = <s + P_0 g, v> less an origin near their mean, which keeps the second
  // moment from being a small difference of large numbers; nan until the first tile sets it.
  struct OfVector {
    double origin = 0, along_g = 0;  // <g, v>
    double weighted = 0, delta = 0;  // sum e c, sum e c delta
  };

  size_t room() const {
    const auto t = [](int64_t n) { return Arena::bytes<T>(n); };
    return Arena::bytes<double>(B_ * w_) + Arena::bytes<double>(w_) + t(B_ * rows_ * w_) +
           t(B_ * p_.K * w_) + 2 * t(tile_queries * tile_) + Arena::bytes<Sums>(B_) +
           Arena::bytes<OfVector>(B_ * p_.K);
  }
  T* work(int64_t i) const { return work_ + i * rows_ * w_; }

  // P of every coordinate: 1 where there is no metric.
  const double* scale_of(int64_t i) const { return own_ ? one_ : metric_.precision(i); }
  static double total_of(const Vec<T>* v) { return total<T>((v[0] + v[1]) + (v[2] + v[3])); }

  template <MomentKind KIND, bool OWN>
  void weigh_some(const Tile<T>& t, int64_t i, const MixtureState<T>& query,
                  const MixtureWidths<T>& widths, T* l, T* squares, T* deltas, T max_logit) {
    constexpr bool posterior = KIND == MomentKind::posterior;
    const T *const p = widths.precision, *const half = widths.half_delta, *const v = widths.drawn;
    Vec<T> sum[4] = {}, square_sum[4] = {}, second[4] = {}, precision[4] = {}, delta_sum[4] = {},
           more[4] = {};
    in_four_chains<T>(t.padded, [&](int64_t j, int u) {
      const Vec<T> e = vexp(load(l + j) - max_logit);
      sum[u] += e;
      square_sum[u] += e * e;
      if (posterior) second[u] += e > T(0) ? e * load(squares + j) : Vec<T>{};
      if (!OWN) {
        store<T>(l + j, e);
        return;
      }
      const Vec<T> delta = T(2) * load(half + j), of_p = load(p + j), ep = e * of_p;
      precision[u] += ep;
      delta_sum[u] += e * delta;
      store<T>(l + j, ep);
      if (posterior) {
        more[u] += e * load(v + j);
      } else if (KIND == MomentKind::matvec) {
        store<T>(squares + j, e);
        store<T>(deltas + j, delta);
      } else {
        store<T>(squares + j, ep * of_p);
        store<T>(deltas + j, ep * delta);
        more[u] += e * delta * delta;
      }
    });
    const double weight = total_of(sum);
    sums_[i].weight += weight;
    *m_.weight_sum(s_, query.b) += weight;
    *m_.weight_square_sum(s_, query.b) += total_of(square_sum);
    if (posterior) *m_.square_sum(s_, query.b) += total_of(second);
    if (!OWN) return;
    *m_.precision_sum(s_, query.b) += total_of(precision);
    sums_[i].delta += total_of(delta_sum);
    (posterior ? sums_[i].drawn : sums_[i].delta_square) += total_of(more);
  }

  // Makes e p (c - origin) of the <t, P v> of one query, in place.
  void weigh_projections(const Tile<T>& t, const MixtureState<T>& query, const WholeQuery<T>& a,
                         int64_t r, T* projection) {
    OfVector& of_v = of_v_[a.i * p_.K + r];
    const T alpha = T(query.level.alpha), usual = T(query.precision), along_g = T(of_v.along_g);
    const T *const e = a.other, *const deltas = a.delta, *const weight = a.weight;
    for (int64_t j = t.n; !t.cols && j < t.padded; ++j) projection[j] = 0;
    Vec<T> mean[4] = {}, weights[4] = {};
    in_four_chains<T>(t.padded, [&](int64_t j, int u) {
      const Vec<T> delta = load(deltas + j),
                   c = alpha * (usual + delta) * load(projection + j) - delta * along_g;
      store<T>(projection + j, c);
      mean[u] += load(e + j) * c;
      weights[u] += load(e + j);
    });
    if (of_v.origin != of_v.origin) {
      const double sum = total_of(weights);
      of_v.origin = sum > 0 ? T(total_of(mean) / sum) : T(0);
    }
    const T origin = T(of_v.origin);
    Vec<T> sum[4] = {}, delta_sum[4] = {};
    in_four_chains<T>(t.padded, [&](int64_t j, int u) {
      const Vec<T> c = load(projection + j) - origin, ec = load(e + j) * c;
      sum[u] += ec;
      delta_sum[u] += ec * load(deltas + j);
      store<T>(projection + j, load(weight + j) * c);
    });
    of_v.weighted += total_of(sum);
    of_v.delta += total_of(delta_sum);
  }

  // sum e p^2 t^2 and, where p differs between components, sum e p delta t.
  void add_squares(const Tile<T>& t, const WholeQuery<T>* active, int64_t n) {
    const T *square[tile_queries] = {}, *delta[tile_queries] = {};
    T *to_square[tile_queries] = {}, *to_delta[tile_queries] = {};
    for (int64_t i = 0; i < n; ++i) {
      square[i] = active[i].other, delta[i] = active[i].delta;
      to_square[i] = work(active[i].i) + w_, to_delta[i] = work(active[i].i) + 2 * w_;
    }
    weighted_sums<T, true>(n, square, t.rows, t.n, w_, to_square);
    if (own_) weighted_sums<T>(n, delta, t.rows, t.n, w_, to_delta);
  }

  const Problem<T>& p_;
  const MixtureMetric<T>& metric_;
  const MixtureSums<T>& m_;
  const int64_t s_, B_, w_, tile_;
  const bool own_;
  const int64_t rows_;  // of sums in T of a query
  Arena scratch_;
  double *g_, *one_;  // x less alpha times the centre, and ones
  T *work_, *v_, *projection_, *delta_;
  Sums* sums_;
  OfVector* of_v_;
};

}  // namespace
