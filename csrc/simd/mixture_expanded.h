// The sweep over the components of a Gaussian mixture for d above a few vectors, where each has one
// variance or all share a diagonal: as that over atoms (simd/sweep_expanded.h), with logits as a
// matrix product, and differences where these are not exact enough. For every query and tile:
//   * The noise is as large as the data and most components carry weight: moments of the whole tile
//     are a matrix product about the centre (simd/mixture_tiles.h).
//   * Otherwise expanded logits are a filter with a rigorous error bound, and the survivors are
//     evaluated by differences (simd/mixture_rows.h).
#pragma once
#include "simd/mixture_tiles.h"

namespace {

template <class T>
class MixtureExpandedSweep {
 public:
  MixtureExpandedSweep(const Problem<T>& p, const Variances<T>& variances, const MixtureSums<T>& m,
                       int64_t s, int64_t b0, int64_t b1)
      : p_(p),
        m_(m),
        s_(s),
        b0_(b0),
        B_(b1 - b0),
        w_(m.stride),
        tile_(ExpandedTiles<T>::tile_rows(w_, B_)),
        own_(variances.rows > 1),
        gap_(weight_gap(p)),
        tiles_(p, w_, b0, B_),
        widths_(p, variances, tile_),
        metric_(p, variances, w_, own_ ? 0 : B_, tile_, p.kind == MomentKind::posterior),
        some_(p, variances, m, s, tile_),
        whole_(p, variances, metric_, m, s, B_, tile_),
        scratch_(room()) {
    if (!has_memory()) return;
    query_ = scratch_.template take<MixtureState<T>>(B_);
    raw_x_ = scratch_.template take<T>(B_ * w_);
    squares_ = scratch_.template take<T>(tile_queries * tile_);
    picked_ = scratch_.template take<Component<T>>(tile_);
    picked_row_ = scratch_.template take<const T*>(tile_);
    picked_column_ = scratch_.template take<int64_t>(tile_);
    logit_ = scratch_.template take<double>(tile_);
    some_.set_shared(metric_.variance());
    usual_ = variances.usual;
    for (int64_t i = 0; i < B_; ++i) prepare(i);
  }

  int run(int64_t n0, int64_t n1) {
    if (!has_memory()) return out_of_memory;
    if (!own_ && !metric_.usable_variance()) return unusable_variance;
    int64_t visited = 0;
    for (int64_t i = n0; i < n1; i += tile_) {
      Tile<T> tile;
      const auto leave_out = [](const T*, T) {};  // their distances overflow
      if (!tiles_.load(i, n1 - i < tile_ ? n1 - i : tile_, tile, leave_out)) return non_finite_atom;
      if (!widths_.begin(tile)) return unusable_variance;
      metric_.begin();
      largest_square_norm_ = __builtin_nan("");
      for (int64_t q = 0; q < B_; q += tile_queries) {
        if (q) tiles_.dot_products(tile, q);
        visit(tile, q, tiles_.group_size(q));
      }
      if (++visited % 16 == 0) flush();
    }
    flush();
    return ok;
  }

 private:
  bool has_memory() const {
    return tiles_.ok() && widths_.ok() && metric_.ok() && some_.ok() && whole_.ok() &&
           scratch_.ok();
  }
  size_t room() const {
    const auto t = [](int64_t n) { return Arena::bytes<T>(n); };
    return Arena::bytes<MixtureState<T>>(B_) + t(B_ * w_) + t(tile_queries * tile_) +
           Arena::bytes<Component<T>>(tile_) + Arena::bytes<const T*>(tile_) +
           Arena::bytes<int64_t>(tile_) + Arena::bytes<double>(tile_);
  }

  void prepare(int64_t i) {
    MixtureState<T>& query = query_[i];
    const int64_t b = query_at(p_, b0_ + i);
    const double alpha = p_.alpha[b], sigma = p_.sigma[b];
    query = {.b = b, .level = {alpha, sigma}};
    T* const raw = raw_x_ + i * w_;
    memcpy(raw, p_.x + b * p_.d, size_t(p_.d) * sizeof(T));
    memset(raw + p_.d, 0, size_t(w_ - p_.d) * sizeof(T));
    tiles_.set_query(i, b, raw);
    T* const g = tiles_.centred_x(i);
    if (own_) {
      query.square = dot(g, g, w_);
      query.precision = 1 / (sigma * sigma + alpha * alpha * usual_);
      query.factor = kind_of(p_).elementwise ? __builtin_sqrt(double(p_.d)) : 1;
    } else {
      const auto sums = metric_.set_query(i, query.level);
      const T* const metric = metric_.metric(i);
      for (int64_t k = 0; k < w_; ++k) {
        query.square += double(metric[k]) * g[k] * g[k];
        g[k] *= metric[k];
      }
      query.precision = 1;
      query.factor = sums.largest * double(p_.d) /
                     (kind_of(p_).elementwise ? __builtin_sqrt(sums.square_sum) : sums.sum);
    }
    query.constant = -0.5 * query.precision * query.square;
    whole_.set_query(i, query);
    restart(i);
  }
  void restart(int64_t i) {
    query_[i].centred = true;
    clear_mixture(m_, s_, query_[i].b);
    whole_.restart(i, query_[i]);
  }
  void flush() {
    for (int64_t i = 0; i < B_; ++i) whole_.flush(i, query_[i]);
  }

  void set_level(const Tile<T>& t, int64_t q, int64_t i) {
    if (own_)
      widths_.set_level(t, query_[q + i].level, nullptr, nullptr, 1);
    else
      widths_.set_level(t, query_[q + i].level, metric_.norm(i), metric_.square_norm(i),
                        metric_.unit(q + i));
  }

  // What of a tile's expanded logits decides how they are used, with z = alpha^2 p |t|^2 / 2 of the
  // largest p and |t| (simd/query.h).
  double z_of(const MixtureState<T>& query) const {
    const double alpha = query.level.alpha;
    return 0.5 * alpha * alpha * widths_.largest_precision * widths_.largest_norm;
  }
  // Whether T holds all terms of the expanded logits and the squares of their distances.
  bool expands(const MixtureState<T>& query) const {
    const double alpha = query.level.alpha,
                 terms = query.square + 2 * alpha * alpha * widths_.largest_norm;
    return terms <= largest_square<T> &&
           0.5 * terms * widths_.largest_precision <= largest_square<T> &&
           widths_.largest_half_delta * query.square <= largest_square<T>;
  }
  bool expands_exactly(const MixtureState<T>& query) const {
    return z_of(query) + 0.5 * widths_.largest_precision * query.square <=
           expanded_limit * double(p_.d);
  }
  // Whether moments of the tile about the score of the centre are exact enough.
  bool near_centre(const Tile<T>& t, const MixtureState<T>& query) {
    const double limit = kind_of(p_).centre_limit * double(p_.d), z = z_of(query),
                 delta = 2 * widths_.largest_half_delta,
                 drift = 0.5 * delta * delta / widths_.largest_precision * query.square;
    if (!(z <= limit && query.factor * drift <= limit)) return false;
    if (query.factor * z <= limit) return true;
    if (!own_ || !(t.largest_norm > query.factor * 1e-12 * __builtin_sqrt(epsilon<T>)))
      return false;
    if (largest_square_norm_ != largest_square_norm_)
      largest_square_norm_ = tiles_.largest_square_norm(t);
    return query.factor * z * largest_square_norm_ / t.largest_norm <= limit;
  }
  // No expanded logit of the tile is further than this from the exact one.
  double error(const MixtureState<T>& query) const {
    return epsilon<T> * double(w_ / W<T> + 16) *
           (2 * z_of(query) +
            (0.5 * widths_.largest_precision + widths_.largest_half_delta) * query.square +
            widths_.largest_prior);
  }

  // Makes logits of the dot products of a query; returns the largest. With `squares` also
  // |s - reference|^2 into these.
  T finish_logits(const Tile<T>& t, const MixtureState<T>& query, T* l, T* squares) const {
    const T square = T(query.square);
    Vec<T> largest[4];
    for (Vec<T>& some : largest) some = all<T>(-T(__builtin_inf()));
    const MixtureWidths<T>& widths = widths_;
    const T *const bias = widths.bias, *const slope = widths.slope, *const half = widths.half_delta,
                   *const of_t = widths.square;
    in_four_chains<T>(t.padded, [&](int64_t j, int u) {
      const Vec<T> along = load(slope + j) * load(l + j), delta = load(half + j);
      const Vec<T> logit = load(bias + j) + (along - delta * square);
      if (squares) store<T>(squares + j, load(of_t + j) + T(4) * delta * (delta * square - along));
      store<T>(l + j, logit);
      largest[u] = larger<T>(logit, largest[u]);
    });
    return max_lanes<T>(
        larger<T>(larger<T>(largest[0], largest[1]), larger<T>(largest[2], largest[3])));
  }

  void visit(const Tile<T>& t, int64_t q, int64_t count) {
    WholeQuery<T> active[tile_queries];
    int64_t n_active = 0, again[tile_queries], n_again = 0;
    if (!own_) metric_.find(t, q, count);
    for (int64_t i = 0; i < count; ++i) {
      const MixtureState<T>& query = query_[q + i];
      T *const l = tiles_.logits(i), *const squares = squares_ + i * tile_;
      set_level(t, q, i);
      if (!expands(query)) {
        filter(t, q + i, nullptr, 0);
        continue;
      }
      const bool near = near_centre(t, query), exact = expands_exactly(query);
      const bool moments = p_.kind == MomentKind::posterior && near;
      const T largest = finish_logits(t, query, l, moments ? squares : nullptr);
      if (!(largest > -T(__builtin_inf()))) continue;
      const double seen = *m_.weight_sum(s_, query.b);
      // Beside such a tile all that came before is negligible: the query starts again.
      if (seen > 0 && query.constant + largest - error(query) >
                          *m_.max_logit(s_, query.b) + __builtin_log(seen) + gap_)
        restart(q + i);
      const bool centre_will_do =
          near && query.centred &&
          (*m_.weight_sum(s_, query.b) > 0 || ExpandedTiles<T>::crowded(t, l, largest - T(gap_)));
      if (!centre_will_do)
        filter(t, q + i, l, largest);
      else if (!exact)
        again[n_again++] = q + i;
      else if (matters(q + i, largest, query.constant))
        active[n_active++] = weigh(t, q + i, l, squares, largest, query.constant);
    }
    if (n_again) by_differences(t, q, n_again, again);
    for (int64_t i = 0; i < n_again; ++i) {
      T *const l = tiles_.logits(again[i] - q), *const squares = squares_ + (again[i] - q) * tile_;
      set_level(t, q, again[i] - q);
      const MixtureWidths<T>& widths = widths_;
      for (int64_t j = 0; j < t.padded; j += W<T>)
        store<T>(l + j, load(widths.prior + j) - T(0.5) * load(widths.precision + j) * load(l + j));
      const T largest = tiles_.max_of(l, t.padded);
      if (matters(again[i], largest, 0))
        active[n_active++] = weigh(t, again[i], l, squares, largest, 0);
    }
    if (n_active) whole_.add(t, query_, active, n_active);
  }
  void by_differences(const Tile<T>& t, int64_t q, int64_t count, const int64_t* queries) {
    const T* metric[tile_queries];
    for (int64_t i = 0; !own_ && i < count; ++i) metric[i] = metric_.metric(queries[i]);
    tiles_.distances_into_logits(t, q, count, queries, raw_x_, own_ ? nullptr : metric);
  }

  // Whether not the whole tile is negligible, whose largest logit less `offset` is given.
  bool matters(int64_t i, T largest, double offset) const {
    return largest >= T(*m_.max_logit(s_, query_[i].b) - offset) - T(gap_);
  }
  // Makes weights of logits less `offset`, in place, for whole_.
  WholeQuery<T> weigh(const Tile<T>& t, int64_t i, T* l, T* squares, T largest, double offset) {
    const MixtureState<T>& query = query_[i];
    const double before = *m_.max_logit(s_, query.b);
    const T seen = T(before - offset), max_logit = largest > seen ? largest : seen;
    if (offset + max_logit != before) {
      whole_.flush(i, query);
      raise_mixture(m_, s_, query.b, offset + max_logit);
    }
    return whole_.weigh(t, i, query, widths_, l, squares, max_logit);
  }

  // Adds the components of the tile that may matter, as a rule few, by differences. Without logits
  // all of them are looked at.
  void filter(const Tile<T>& t, int64_t i, const T* l, T largest) {
    const MixtureState<T>& query = query_[i];
    int64_t n = 0;
    if (!l) {
      for (int64_t j = 0; j < t.n; ++j)
        if (t.log_prior[j] > -T(__builtin_inf())) picked_column_[n++] = j;
      return add_by_differences(t, i, n);
    }
    const double bound = error(query), sure = query.constant + largest - bound,
                 max_logit = *m_.max_logit(s_, query.b);
    const double least = (max_logit > sure ? max_logit : sure) - gap_ - bound - query.constant;
    if (!(largest >= least)) return;
    constexpr int64_t run = 4 * W<T>;  // most of them have no survivor
    for (int64_t j0 = 0; j0 < t.padded; j0 += run) {
      const int64_t end = t.padded - j0 < run ? t.padded : j0 + run;
      if (!(tiles_.max_of(l + j0, end - j0) >= least)) continue;
      for (int64_t j = j0; j < end; ++j)
        if (l[j] >= least) picked_column_[n++] = j;
    }
    add_by_differences(t, i, n);
  }

  // Adds the n components of the tile in picked_column_.
  void add_by_differences(const Tile<T>& t, int64_t i, int64_t n) {
    MixtureState<T>& query = query_[i];
    for (int64_t c = 0; c < n; ++c) picked_row_[c] = t.raw.at + picked_column_[c] * t.raw.ld;
    if (own_)
      distances<T>(raw_x_ + i * w_, T(query.level.alpha), picked_row_, n, w_, logit_);
    else
      distances<T, true>(raw_x_ + i * w_, T(query.level.alpha), picked_row_, n, w_, logit_,
                         metric_.metric(i));
    for (int64_t c = 0; c < n; ++c) {
      const int64_t j = picked_column_[c];
      logit_[c] = double(widths_.prior[j]) - 0.5 * double(widths_.precision[j]) * logit_[c];
      picked_[c] = {picked_row_[c], own_ ? widths_.variance(j) : metric_.variance(), 0};
    }
    whole_.flush(i, query);
    some_.set_query(query.b);
    some_.take(picked_, logit_, n, gap_, query.centred);
  }

  const Problem<T>& p_;
  const MixtureSums<T>& m_;
  const int64_t s_, b0_, B_, w_, tile_;
  const bool own_;  // variances of each component
  const double gap_;
  ExpandedTiles<T> tiles_;
  MixtureWidths<T> widths_;
  MixtureMetric<T> metric_;
  MixtureRows<T> some_;
  MixtureTiles<T> whole_;
  Arena scratch_;
  double usual_ = 0, largest_square_norm_ = 0;
  MixtureState<T>* query_;
  T *raw_x_, *squares_;
  Component<T>* picked_;
  const T** picked_row_;
  int64_t* picked_column_;
  double* logit_;
};

}  // namespace
