// The sweep over the components of a Gaussian mixture where each has a diagonal covariance of its
// own, d is above a few vectors, and queries share their noise levels: as that of
// simd/mixture_expanded.h, with the rows of simd/mixture_diagonal_tiles.h.
#pragma once
#include "simd/mixture_diagonal_tiles.h"
#include "simd/mixture_tiles.h"

namespace {

// Whether so many queries share a level that making a tile's rows for each pays.
template <class T>
bool levels_are_shared(const Problem<T>& p, int64_t b0, int64_t b1) {
  int64_t levels = 0;
  for (int64_t i = b0; i < b1; ++i) {
    const int64_t b = query_at(p, i), before = i > b0 ? query_at(p, i - 1) : -1;
    levels += before < 0 || p.alpha[b] != p.alpha[before] || p.sigma[b] != p.sigma[before];
  }
  return 4 * levels <= b1 - b0;
}

template <class T>
class MixtureDiagonalSweep {
 public:
  MixtureDiagonalSweep(const Problem<T>& p, const Variances<T>& variances, const MixtureSums<T>& m,
                       int64_t s, int64_t b0, int64_t b1)
      : p_(p),
        m_(m),
        s_(s),
        b0_(b0),
        B_(b1 - b0),
        w_(m.stride),
        gap_(weight_gap(p)),
        usual_(variances.usual),
        tiles_(p, variances, w_, b1 - b0),
        tile_(tiles_.tile),
        some_(p, variances, m, s, tiles_.tile),
        rows_(p.kind == MomentKind::matvec     ? 2 + 2 * p.K
              : p.kind == MomentKind::diagonal ? 5
                                               : 2),
        scratch_(room()) {
    if (!has_memory()) return;
    query_ = scratch_.template take<MixtureState<T>>(B_);
    g_ = scratch_.template take<double>(B_ * w_);
    x_ = scratch_.template take<T>(B_ * w_);
    form_ = scratch_.template take<T>(B_ * 2 * w_);
    square_form_ = scratch_.template take<T>(p.kind == MomentKind::posterior ? B_ * 2 * w_ : 0);
    v_form_ = scratch_.template take<T>(B_ * p.K * 2 * w_);
    work_ = scratch_.template take<T>(B_ * rows_ * w_);
    logits_ = scratch_.template take<T>(tile_queries * tile_);
    other_ = scratch_.template take<T>(tile_queries * tile_);
    weight_sum_ = scratch_.template take<double>(B_);
    origin_ = scratch_.template take<double>(B_ * p.K);
    projected_ = scratch_.template take<double>(B_ * p.K);
    logit_ = scratch_.template take<double>(tile_);
    picked_ = scratch_.template take<Component<T>>(tile_);
    picked_column_ = scratch_.template take<int64_t>(tile_);
    for (int64_t i = 0; i < B_; ++i) prepare(i);
  }

  int run(int64_t n0, int64_t n1) {
    if (!has_memory()) return out_of_memory;
    int64_t visited = 0;
    for (int64_t i = n0; i < n1; i += tile_) {
      if (const int status = tiles_.load(i, n1 - i < tile_ ? n1 - i : tile_)) return status;
      for (int64_t q = 0, count; q < B_; q += count) {
        for (count = 1; count < tile_queries && q + count < B_; ++count)
          if (!(query_[q + count].level == query_[q].level)) break;
        tiles_.set_level(query_[q].level);
        visit(q, count);
      }
      if (++visited % 16 == 0) flush();
    }
    flush();
    return ok;
  }

 private:
  bool has_memory() const { return tiles_.ok() && some_.ok() && scratch_.ok(); }
  size_t room() const {
    const auto t = [](int64_t n) { return Arena::bytes<T>(n); };
    const auto wide = [](int64_t n) { return Arena::bytes<double>(n); };
    return Arena::bytes<MixtureState<T>>(B_) + wide(B_ * w_) + t(B_ * w_) +
           t(B_ * (2 + p_.K) * 2 * w_) + 2 * t(B_ * 2 * w_) + t(B_ * p_.K * 2 * w_) +
           t(B_ * rows_ * w_) + 2 * t(tile_queries * tile_) + wide(B_) + 2 * wide(B_ * p_.K) +
           wide(tile_) + Arena::bytes<Component<T>>(tile_) + Arena::bytes<int64_t>(tile_);
  }

  void prepare(int64_t i) {
    const int64_t b = query_at(p_, b0_ + i);
    const double alpha = p_.alpha[b], sigma = p_.sigma[b];
    MixtureState<T>& query = query_[i];
    query = {.b = b, .level = {alpha, sigma}};
    query.precision = 1 / (sigma * sigma + alpha * alpha * usual_);
    const double a = alpha * __builtin_sqrt(query.precision);
    double* const g = g_ + i * w_;
    T *const x = x_ + i * w_, *const form = form_ + i * 2 * w_;
    for (int64_t k = 0; k < w_; ++k) {
      x[k] = k < p_.d ? p_.x[b * p_.d + k] : T(0);
      g[k] = x[k];
      if (p_.centre && k < p_.d) g[k] -= alpha * p_.centre[k];
      query.square += g[k] * g[k];
      form[k] = T(-0.5 * a * a * g[k] * g[k]);
      form[w_ + k] = T(a * g[k]);
      if (p_.kind != MomentKind::posterior) continue;
      square_form_[i * 2 * w_ + k] = T(a * a * g[k] * g[k]);
      square_form_[i * 2 * w_ + w_ + k] = T(-2 * a * g[k]);
    }
    query.constant = -0.5 * query.precision * query.square;
    for (int64_t r = 0; r < p_.K; ++r) {
      const T* const v = p_.v + (b * p_.K + r) * p_.d;
      T* const to = v_form_ + (i * p_.K + r) * 2 * w_;
      for (int64_t k = 0; k < w_; ++k) {
        to[k] = k < p_.d ? T(-a * a * g[k] * v[k]) : T(0);
        to[w_ + k] = k < p_.d ? T(a * v[k]) : T(0);
      }
    }
    restart(i);
  }
  // Forgets what there is of query i; the reference is the score of the centre.
  void restart(int64_t i) {
    MixtureState<T>& query = query_[i];
    query.centred = true;
    clear_mixture(m_, s_, query.b);
    weight_sum_[i] = 0;
    for (int64_t r = 0; r < p_.K; ++r) {
      origin_[i * p_.K + r] = __builtin_nan("");
      projected_[i * p_.K + r] = 0;
    }
    memset(work(i), 0, size_t(rows_ * w_) * sizeof(T));
    double* const reference = m_.reference(s_, query.b);
    for (int64_t k = 0; k < w_; ++k) reference[k] = -query.precision * g_[i * w_ + k];
  }
  T* work(int64_t i) const { return work_ + i * rows_ * w_; }

  // What decides how a tile is used for a query (simd/mixture_expanded.h).
  struct Sizes {
    double norm;           // alpha^2 sum p t^2, the largest
    double square, drift;  // of g: sum p g^2 and sum (p - p_0)^2 g^2, with the largest p
    double limit;          // of sums of squares of scores
  };
  Sizes sizes_of(int64_t i) const {
    const MixtureState<T>& query = query_[i];
    const double alpha = query.level.alpha, *const g = g_ + i * w_;
    double square = 0, drift = 0;
    for (int64_t k = 0; k < w_; ++k) {
      const double p = tiles_.largest_precision[k], delta = tiles_.largest_delta[k];
      square += (p > query.precision ? p : query.precision) * g[k] * g[k];
      drift += delta * delta * g[k] * g[k];
    }
    const double a = alpha * alpha * query.precision;
    return {.norm = alpha * alpha * tiles_.largest_norm,
            .square = square,
            .drift = drift + a * tiles_.largest_square_norm,
            .limit = 2 * kind_of(p_).centre_limit * tiles_.least_precision /
                     (kind_of(p_).elementwise ? __builtin_sqrt(double(p_.d)) : 1)};
  }
  double error(const Sizes& of) const {
    return epsilon<T> * double(2 * w_ / W<T> + 16) *
           (1.5 * (of.norm + of.square) + tiles_.largest_prior);
  }

  void visit(int64_t q, int64_t count) {
    const T* form[tile_queries];
    int64_t active[tile_queries], n_active = 0;
    for (int64_t i = 0; i < count; ++i) form[i] = form_ + (q + i) * 2 * w_;
    dots<T>(count, form, tiles_.stacked(), tiles_.cols(), tiles_.n, 2 * w_, logits_, tile_,
            nullptr);
    for (int64_t i = 0; i < count; ++i) {
      MixtureState<T>& query = query_[q + i];
      T* const l = logits_ + i * tile_;
      const Sizes of = sizes_of(q + i);
      if (!(of.norm + of.square <= largest_square<T> && of.drift <= largest_square<T> &&
            query.level.alpha * query.level.alpha * of.square <= largest_square<T>)) {
        filter(q + i, nullptr, 0, 0);
        continue;
      }
      for (int64_t j = tiles_.n; j < tiles_.padded; ++j) l[j] = 0;
      Vec<T> largest_of = all<T>(-T(__builtin_inf()));
      for (int64_t j = 0; j < tiles_.padded; j += W<T>) {
        const Vec<T> logit = load(tiles_.bias + j) + load(l + j);
        store<T>(l + j, logit);
        largest_of = larger<T>(logit, largest_of);
      }
      const T largest = max_lanes<T>(largest_of);
      if (!(largest > -T(__builtin_inf()))) continue;
      const double seen = *m_.weight_sum(s_, query.b), bound = error(of);
      // Beside such a tile all that came before is negligible: the query starts again.
      if (seen > 0 && query.constant + largest - bound >
                          *m_.max_logit(s_, query.b) + __builtin_log(seen) + gap_)
        restart(q + i);
      const bool centre_will_do =
          query.centred && of.drift <= of.limit &&
          (*m_.weight_sum(s_, query.b) > 0 || crowded(l, largest - T(gap_)));
      if (!centre_will_do) {
        filter(q + i, l, largest, bound);
        continue;
      }
      double offset = query.constant;
      T most = largest;
      if (!(0.5 * (of.norm + of.square) <= expanded_limit * double(p_.d))) {
        offset = 0;
        most = by_differences(q + i, l);
      }
      if (weigh(q + i, l, most, offset)) active[n_active++] = q + i;
    }
    if (n_active) add(q, active, n_active);
  }
  bool crowded(const T* l, T least) const {
    int64_t count = 0;
    for (int64_t j = 0; j < tiles_.n; ++j) count += l[j] >= least;
    return 2 * count >= tiles_.n;
  }

  double logit_by_differences(int64_t i, int64_t j) const {
    const T* const row = tiles_.rows + j * w_;
    double square;
    distances<T, true>(x_ + i * w_, T(query_[i].level.alpha), &row, 1, w_, &square,
                       tiles_.precision + j * w_);
    return double(tiles_.prior[j]) - 0.5 * square;
  }
  // The logits of the whole tile; returns the largest.
  T by_differences(int64_t i, T* l) const {
    T largest = -T(__builtin_inf());
    for (int64_t j = 0; j < tiles_.n; ++j) {
      l[j] = T(logit_by_differences(i, j));
      if (l[j] > largest) largest = l[j];
    }
    return largest;
  }

  // Adds the components of the tile that may matter, by differences; without logits all of them.
  void filter(int64_t i, const T* l, T largest, double bound) {
    MixtureState<T>& query = query_[i];
    int64_t n = 0;
    double least = -__builtin_inf();
    if (l) {
      const double sure = query.constant + largest - bound, seen = *m_.max_logit(s_, query.b);
      least = (seen > sure ? seen : sure) - gap_ - bound - query.constant;
      if (!(largest >= least)) return;
    }
    for (int64_t j = 0; j < tiles_.n; ++j)
      if (!l || l[j] >= least) picked_column_[n++] = j;
    for (int64_t c = 0; c < n; ++c) {
      const int64_t j = picked_column_[c];
      logit_[c] = logit_by_differences(i, j);
      picked_[c] = {tiles_.rows + j * w_, tiles_.variance + j * w_, 0};
    }
    flush(i);
    some_.set_query(query.b);
    some_.take(picked_, logit_, n, gap_, query.centred);
  }

  // Makes weights of logits less `offset`, in place. False where the whole tile is negligible.
  bool weigh(int64_t i, T* l, T largest, double offset) {
    const MixtureState<T>& query = query_[i];
    const double before = *m_.max_logit(s_, query.b);
    T max_logit = T(before - offset);
    if (!(largest >= max_logit - T(gap_))) return false;
    if (largest > max_logit) max_logit = largest;
    if (offset + max_logit != before) {
      flush(i);
      raise_mixture(m_, s_, query.b, offset + max_logit);
    }
    Vec<T> sum[4] = {}, square_sum[4] = {};
    in_four_chains<T>(tiles_.padded, [&](int64_t j, int u) {
      const Vec<T> e = vexp(load(l + j) - max_logit);
      store<T>(l + j, e);
      sum[u] += e;
      square_sum[u] += e * e;
    });
    const double weight = total_of(sum);
    weight_sum_[i] += weight;
    *m_.weight_sum(s_, query.b) += weight;
    *m_.weight_square_sum(s_, query.b) += total_of(square_sum);
    return true;
  }
  static double total_of(const Vec<T>* v) { return total<T>((v[0] + v[1]) + (v[2] + v[3])); }

  // Adds the tile for the queries that take it, whose weights are where their logits were.
  void add(int64_t q, const int64_t* active, int64_t n) {
    const Rows<T> rows = tiles_.stacked();
    const T *weight[tile_queries], *form[tile_queries], *coefficient[tile_queries];
    T* to[tile_queries];
    const auto sums_at = [&](int64_t row) {
      for (int64_t i = 0; i < n; ++i) to[i] = work(active[i]) + row * w_;
    };
    for (int64_t i = 0; i < n; ++i) weight[i] = logits_ + (active[i] - q) * tile_;
    sums_at(0);
    weighted_sums<T>(n, weight, rows, tiles_.n, 2 * w_, to);
    if (p_.kind == MomentKind::diagonal) {
      sums_at(2);
      weighted_sums<T, true>(n, weight, rows, tiles_.n, 2 * w_, to);
      sums_at(4);
      weighted_sums<T>(n, weight, tiles_.products(), tiles_.n, w_, to);
    } else if (p_.kind == MomentKind::posterior) {
      for (int64_t i = 0; i < n; ++i) form[i] = square_form_ + active[i] * 2 * w_;
      dots<T>(n, form, tiles_.squares(), tiles_.square_cols(), tiles_.n, 2 * w_, other_, tile_,
              nullptr);
      for (int64_t i = 0; i < n; ++i) add_squares(active[i], weight[i], other_ + i * tile_);
    }
    for (int64_t r = 0; r < p_.K; ++r) {
      for (int64_t i = 0; i < n; ++i) form[i] = v_form_ + (active[i] * p_.K + r) * 2 * w_;
      dots<T>(n, form, rows, tiles_.cols(), tiles_.n, 2 * w_, other_, tile_, nullptr);
      for (int64_t i = 0; i < n; ++i) {
        weigh_projections(active[i] * p_.K + r, weight[i], other_ + i * tile_);
        coefficient[i] = other_ + i * tile_;
      }
      sums_at(2 + 2 * r);
      weighted_sums<T>(n, coefficient, rows, tiles_.n, 2 * w_, to);
    }
  }
  // sum e |s + p_0 g|^2, of |z|^2 and the product at `squares`.
  void add_squares(int64_t i, const T* weight, const T* squares) {
    const MixtureState<T>& query = query_[i];
    Vec<T> sum[4] = {};
    const int64_t whole = tiles_.n / W<T> * W<T>;
    in_four_chains<T>(whole, [&](int64_t j, int u) {
      const Vec<T> square = load(tiles_.square_norm + j) + load(squares + j);
      sum[u] += load(weight + j) * square;
    });
    double rest = 0;
    for (int64_t j = whole; j < tiles_.n; ++j)
      rest += double(weight[j]) * (tiles_.square_norm[j] + squares[j]);
    *m_.square_sum(s_, query.b) +=
        query.level.alpha * query.level.alpha * query.precision * (total_of(sum) + rest);
  }
  // Makes e (c - origin) of the projections c, in place; the origin, near their mean, keeps the
  // second moment from being a small difference of large numbers.
  void weigh_projections(int64_t at, const T* weight, T* projection) {
    double& origin = origin_[at];
    if (origin != origin) {
      double weights = 0, mean = 0;
      for (int64_t j = 0; j < tiles_.n; ++j) {
        weights += weight[j];
        mean += double(weight[j]) * projection[j];
      }
      origin = weights > 0 ? T(mean / weights) : T(0);
    }
    const T shift = T(origin);
    Vec<T> sum[4] = {};
    const int64_t whole = tiles_.n / W<T> * W<T>;
    in_four_chains<T>(whole, [&](int64_t j, int u) {
      const Vec<T> c = load(weight + j) * (load(projection + j) - shift);
      store<T>(projection + j, c);
      sum[u] += c;
    });
    double rest = 0;
    for (int64_t j = whole; j < tiles_.n; ++j)
      rest += projection[j] = weight[j] * (projection[j] - shift);
    projected_[at] += total_of(sum) + rest;
  }

  void flush() {
    for (int64_t i = 0; i < B_; ++i) flush(i);
  }
  // Moves what was added for query i into its sums in double.
  void flush(int64_t i) {
    const double weight = weight_sum_[i];
    if (weight == 0) return;
    const MixtureState<T>& query = query_[i];
    const double alpha = query.level.alpha, noise = query.level.sigma * query.level.sigma,
                 p = query.precision, a2 = alpha * alpha * p, a = alpha * __builtin_sqrt(p);
    const double* const g = g_ + i * w_;
    T *const u = work(i), *const z = u + w_;
    double *const first = m_.first(s_, query.b), *const second = m_.row(s_, query.b, m_.second),
                  *const precision = m_.row(s_, query.b, m_.precision);
    for (int64_t k = 0; k < w_; ++k) {
      first[k] += a * z[k] - a2 * g[k] * u[k];
      precision[k] += p * (weight + alpha * alpha * u[k]);
    }
    if (m_.mean >= 0) {
      double* const mean = m_.row(s_, query.b, m_.mean);
      for (int64_t k = 0; k < w_; ++k)
        mean[k] +=
            noise * __builtin_sqrt(p) * z[k] + alpha * g[k] * p * (usual_ * weight - noise * u[k]);
      for (int64_t k = 0; p_.centre && k < p_.d; ++k) mean[k] += weight * p_.centre[k];
    }
    const T *const uu = u + 2 * w_, *const zz = u + 3 * w_, *const uz = u + 4 * w_;
    for (int64_t k = 0; p_.kind == MomentKind::diagonal && k < w_; ++k)
      second[k] += a2 * (zz[k] + a * g[k] * (a * g[k] * uu[k] - 2 * double(uz[k])));
    for (int64_t r = 0; r < p_.K; ++r) {
      const T *const of_u = u + (2 + 2 * r) * w_, *const of_z = of_u + w_;
      const double origin = origin_[i * p_.K + r];
      for (int64_t k = 0; k < w_; ++k)
        second[r * w_ + k] += a * (of_z[k] + origin * z[k]) - a2 * g[k] * (of_u[k] + origin * u[k]);
      m_.projection_sum(s_, query.b)[r] += projected_[i * p_.K + r] + origin * weight;
      projected_[i * p_.K + r] = 0;
    }
    weight_sum_[i] = 0;
    memset(u, 0, size_t(rows_ * w_) * sizeof(T));
  }

  const Problem<T>& p_;
  const MixtureSums<T>& m_;
  const int64_t s_, b0_, B_, w_;
  const double gap_, usual_;
  MixtureDiagonalTiles<T> tiles_;
  const int64_t tile_;
  MixtureRows<T> some_;
  const int64_t rows_;  // of sums in T of a query: of [u | z], and what the kind needs
  Arena scratch_;
  MixtureState<T>* query_;
  double* g_;  // x less alpha times the centre
  T *x_, *form_, *square_form_, *v_form_, *work_, *logits_, *other_;
  double *weight_sum_, *origin_, *projected_;  // since the last flush, but the origin
  double* logit_;
  Component<T>* picked_;
  int64_t* picked_column_;
};

}  // namespace
