// Products with the covariance, of many queries in high noise, in two phases over the atoms:
//   C v = sum w (c - mean of c) t,   c = <t, v>.
// The first finds all weights and c, by two products, and so the mean of c; the second adds up, by
// one. A sweep in one phase (moments/matvec.h) has to take that mean off at the end, for which it
// needs sum e t as well: four products.
//
// t is about the centre, however narrow the posterior is: since the coefficients sum to 0, nothing
// cancels that is large beside their own terms. Mean and sums of e are therefore in double, and the
// mean comes off in two parts.
#pragma once
#include "simd/expanded_tiles.h"

namespace {

// Where a split's rows of a group of B queries from b0 on begin. They lie in the order in which
// both phases take them: [tile][query][1 + K][atoms of the tile, in whole vectors].
template <class T>
T* rows_of(const Problem<T>& p, const MatvecWeights<T>& w, int64_t s, int64_t b0, int64_t B) {
  return w.rows + ((b0 - w.b0) * w.splits + s * B) * w.span * (1 + p.K);
}
// The sums of one of the kernels' queries over a split.
struct MatvecSums {
  double &origin, &largest;  // the logit that weights are relative to, and the largest
  double& weight_sum;
  double* projection_sum;  // [K]
};
template <class T>
MatvecSums matvec_sums(const Problem<T>& p, const MatvecWeights<T>& w, int64_t s, int64_t query) {
  double* const at = w.sums + ((query - w.b0) * w.splits + s) * (3 + p.K);
  return {.origin = at[0], .largest = at[1], .weight_sum = at[2], .projection_sum = at + 3};
}

// The first phase, of queries [b0, b1) over the atoms of split s, and whether they are for it.
template <class T>
class MatvecWeigher {
 public:
  MatvecWeigher(const Problem<T>& p, const MatvecWeights<T>& out, int64_t s, int64_t b0, int64_t b1)
      : p_(p),
        out_(out),
        s_(s),
        b0_(b0),
        B_(b1 - b0),
        w_(round_up(p.d, W<T>)),
        tile_(ExpandedTiles<T>::tile_rows(w_, B_)),
        tiles_(p, w_, b0, B_, false),
        scratch_(Arena::bytes<T>(B_ * w_) + Arena::bytes<T>(B_ * p.K * w_) +
                 Arena::bytes<T>(tile_queries * tile_)) {
    if (!ok()) return;
    raw_x_ = scratch_.template take<T>(B_ * w_);
    v_ = scratch_.template take<T>(B_ * p.K * w_);
    projection_ = scratch_.template take<T>(tile_queries * tile_);
    for (int64_t i = 0; i < B_; ++i) {
      const int64_t b = query_at(p, b0 + i);
      read(p.x + b * p.d, raw_x_ + i * w_);
      tiles_.set_query(i, b, raw_x_ + i * w_);
      for (int64_t k = 0; k < p.K; ++k) read(p.v + (b * p.K + k) * p.d, v_ + (i * p.K + k) * w_);
    }
  }

  // Marks the queries as unfit that are not in high noise by the first n atoms, at most a tile: for
  // which the sweep in one phase needs no such products, or leaves out most atoms.
  int look(int64_t n) {
    if (!ok()) return out_of_memory;
    Tile<T> tile;
    if (!tiles_.load(0, n < tile_ ? n : tile_, tile, [](const T*, T) {})) return non_finite_atom;
    for (int64_t i = 0; i < B_; ++i) {
      if (i && i % tile_queries == 0) tiles_.dot_products(tile, i);
      const Query<T>& query = tiles_.query(i);
      T* const l = tiles_.logits(i % tile_queries);
      if (!exact(tile, query) ||
          !tiles_.crowded(tile, l, tiles_.finish_logits(tile, query, l) - T(weight_gap(p_))))
        mark_unfit(i);
    }
    return dfk::ok;
  }

  int run(int64_t n0, int64_t n1) {
    if (!ok()) return out_of_memory;
    for (int64_t i = 0; i < B_; ++i) {
      const MatvecSums s = sums(i);
      s.origin = s.largest = -__builtin_inf();
      s.weight_sum = 0;
      for (int64_t k = 0; k < p_.K; ++k) s.projection_sum[k] = 0;
    }
    for (int64_t n = n0; n < n1; n += tile_) {
      Tile<T> tile;
      bool outliers = false;
      const auto leave_out = [&](const T*, T) { outliers = true; };
      if (!tiles_.load(n, n1 - n < tile_ ? n1 - n : tile_, tile, leave_out)) return non_finite_atom;
      for (int64_t i = 0; i < B_; ++i)
        if (outliers || !expands(tiles_.query(i), tile.largest_norm)) mark_unfit(i);
      for (int64_t q = 0; q < B_; q += tile_queries) {
        if (q) tiles_.dot_products(tile, q);
        visit(tile, q, n - n0);
      }
    }
    return dfk::ok;
  }

 private:
  bool ok() const { return tiles_.ok() && scratch_.ok(); }
  MatvecSums sums(int64_t i) const { return matvec_sums(p_, out_, s_, b0_ + i); }
  // at: how many atoms of the split came before the tile.
  T* weights(int64_t i, int64_t at, int64_t padded) const {
    return rows_of(p_, out_, s_, b0_, B_) + (B_ * at + i * padded) * (1 + p_.K);
  }
  // Other splits may say so at the same time.
  bool fit(int64_t i) const {
    return !__atomic_load_n(out_.unfit + query_at(p_, b0_ + i), __ATOMIC_RELAXED);
  }
  void mark_unfit(int64_t i) const {
    __atomic_store_n(out_.unfit + query_at(p_, b0_ + i), uint8_t(1), __ATOMIC_RELAXED);
  }
  void read(const T* from, T* to) const {
    for (int64_t k = 0; k < w_; ++k) to[k] = k < p_.d ? from[k] : T(0);
  }
  // Whether expanded logits of the tile are as exact as those by differences.
  bool exact(const Tile<T>& t, const Query<T>& query) const {
    return expands(query, t.largest_norm) && expands_exactly(query, t.largest_norm, p_.d);
  }

  void visit(const Tile<T>& t, int64_t q, int64_t at) {
    int64_t again[tile_queries], n_again = 0;
    for (int64_t i = q; i < q + tiles_.group_size(q); ++i) {
      if (!fit(i)) continue;
      const Query<T>& query = tiles_.query(i);
      T* const l = tiles_.logits(i - q);
      if (exact(t, query))
        weigh(t, i, l, tiles_.finish_logits(t, query, l), query.constant, at);
      else
        again[n_again++] = i;
    }
    if (n_again) tiles_.logits_by_differences(t, q, n_again, again, raw_x_);
    for (int64_t i = 0; i < n_again; ++i) {
      const T* const l = tiles_.logits(again[i] - q);
      weigh(t, again[i], l, tiles_.max_of(l, t.padded), 0, at);
    }
    int64_t target[tile_queries], count = 0;  // a query with one of its vectors
    for (int64_t i = q; i < q + tiles_.group_size(q); ++i)
      for (int64_t k = 0; k < p_.K && fit(i); ++k) {
        target[count++] = i * p_.K + k;
        if (count == tile_queries) project(t, count, target, at), count = 0;
      }
    if (count) project(t, count, target, at);
  }

  // Makes weights of logits less `offset`. They are relative to the largest logit of the split's
  // first tile; where a later one is so much larger that sums could overflow, all that came before
  // is scaled.
  void weigh(const Tile<T>& t, int64_t i, const T* l, T largest, double offset, int64_t at) {
    constexpr double most_above = 10;
    const MatvecSums s = sums(i);
    T* const to = weights(i, at, t.padded);
    if (!(largest > -T(__builtin_inf()))) {
      memset(to, 0, size_t(t.padded) * sizeof(T));
      return;
    }
    const double logit = offset + double(largest);
    if (logit > s.largest) s.largest = logit;
    if (logit > s.origin + most_above) refer_to(i, logit, at);
    const T from = T(s.origin - offset);
    Vec<double> sum[4] = {};
    in_four_chains<T>(t.padded, [&](int64_t j, int u) {
      const Vec<T> e = vexp(::load(l + j) - from);
      store<T>(to + j, e);
      sum[u] += widened<T>(e);
    });
    s.weight_sum += sum_lanes<double>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }

  void refer_to(int64_t i, double logit, int64_t at) {
    const MatvecSums s = sums(i);
    const double by = __builtin_exp(s.origin - logit);
    s.origin = logit;
    s.weight_sum *= by;
    for (int64_t k = 0; k < p_.K; ++k) s.projection_sum[k] *= by;
    for (int64_t n = 0; n < at; n += tile_) {
      T* const before = weights(i, n, tile_);
      for (int64_t j = 0; j < (1 + p_.K) * tile_; ++j) before[j] *= T(by);
    }
  }

  // Keeps e <t, v>, and its sum in double.
  void project(const Tile<T>& t, int64_t count, const int64_t* target, int64_t at) {
    const T* v[tile_queries];
    for (int64_t i = 0; i < count; ++i) {
      v[i] = v_ + target[i] * w_;
      store<T>(projection_ + i * tile_ + t.padded - W<T>, Vec<T>{});
    }
    dots<T>(count, v, t.rows, t.cols, t.n, w_, projection_, tile_, nullptr);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t query = target[i] / p_.K, k = target[i] % p_.K;
      const T *const e = weights(query, at, t.padded), *const from = projection_ + i * tile_;
      T* const to = weights(query, at, t.padded) + (1 + k) * t.padded;
      Vec<double> sum[4] = {};
      in_four_chains<T>(t.padded, [&](int64_t j, int u) {
        const Vec<T> weighted = ::load(e + j) * ::load(from + j);
        store<T>(to + j, weighted);
        sum[u] += widened<T>(weighted);
      });
      sums(query).projection_sum[k] += sum_lanes<double>((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
  }

  const Problem<T>& p_;
  const MatvecWeights<T>& out_;
  const int64_t s_, b0_, B_, w_, tile_;
  ExpandedTiles<T> tiles_;
  Arena scratch_;
  T *raw_x_, *v_, *projection_;  // [B, w], [B, K, w], [tile_queries, tile]
};

// The second phase, of queries [b0, b1) over the atoms of split s. The sums are those that Moments
// promises, of weights relative to the largest of all splits, but for the mean: <t, v> is taken
// less its mean over all of the query's atoms, so that the covariance is the second moment alone,
// and the first moment, which is not known, is given as zero.
template <class T>
class MatvecAdder {
 public:
  MatvecAdder(const Problem<T>& p, const Moments<T>& m, const MatvecWeights<T>& in, int64_t s,
              int64_t b0, int64_t b1)
      : p_(p),
        m_(m),
        in_(in),
        s_(s),
        B_(b1 - b0),
        w_(m.width),
        tile_(ExpandedTiles<T>::tile_rows(w_, B_)),
        in_place_(rows_in_place(p)),
        weights_(rows_of(p, in, s, b0, B_)),
        scratch_(room()) {
    if (!scratch_.ok()) return;
    rows_ = scratch_.template take<T>(tile_ * (w_ + W<T>));
    panels_ = scratch_.template take<T>(tile_ * w_);
    centre_ = scratch_.template take<T>(w_);
    coefficient_ = scratch_.template take<T>(tile_queries * tile_);
    work_ = scratch_.template take<T>(B_ * p.K * w_);
    target_ = scratch_.template take<Target>(B_ * p.K);
    memset(centre_, 0, size_t(w_) * sizeof(T));
    read_reference(p, -1, centre_);
    for (int64_t i = 0; i < B_; ++i)
      if (!in.unfit[query_at(p, b0 + i)]) begin(i, b0 + i);
    memset(work_, 0, size_t(count_ * w_) * sizeof(T));
  }

  int run(int64_t n0, int64_t n1) {
    if (!scratch_.ok()) return out_of_memory;
    int64_t visited = 0;
    for (int64_t i = n0; i < n1 && count_; i += tile_) {
      const int64_t n = n1 - i < tile_ ? n1 - i : tile_;
      const Rows<T> rows = packed(read_rows(p_, i, n, w_, rows_, in_place_), n);
      for (int64_t q = 0; q < count_; q += tile_queries)
        add(rows, n, i - n0, q, count_ - q < tile_queries ? count_ - q : tile_queries);
      if (++visited % 16 == 0) flush();
    }
    flush();
    return ok;
  }

 private:
  // A query with one of its vectors: coefficients are scale e (c - mean), the mean in two parts, so
  // that they sum to 0.
  struct Target {
    int64_t query, vector;
    double* sum;
    T scale, mean, rest;
  };

  size_t room() const {
    const auto t = [](int64_t n) { return Arena::bytes<T>(n); };
    return t(tile_ * (w_ + W<T>)) + t(tile_ * w_) + t(w_) + t(tile_queries * tile_) +
           t(B_ * p_.K * w_) + Arena::bytes<Target>(B_ * p_.K);
  }

  // Weights and means over all splits of query i, which is the kernels' `query`.
  void begin(int64_t i, int64_t query) {
    const auto part = [&](int64_t s) { return matvec_sums(p_, in_, s, query); };
    double max_logit = -__builtin_inf(), weight_sum = 0;
    for (int64_t s = 0; s < in_.splits; ++s)
      if (part(s).largest > max_logit) max_logit = part(s).largest;
    const auto scale = [&](int64_t s) { return __builtin_exp(part(s).origin - max_logit); };
    for (int64_t s = 0; s < in_.splits; ++s) weight_sum += scale(s) * part(s).weight_sum;

    const QuerySums out = sums_of(p_, m_, s_, query_at(p_, query));
    clear(p_, out);
    clear_vectors(m_, out);
    *out.outlier_logit = -__builtin_inf();
    *out.max_logit = max_logit;
    *out.weight_sum = scale(s_) * part(s_).weight_sum;
    for (int64_t k = 0; k < p_.K; ++k) {
      double mean = 0;
      for (int64_t s = 0; s < in_.splits; ++s)
        mean += scale(s) * part(s).projection_sum[k] / weight_sum;
      target_[count_++] = {.query = i,
                           .vector = k,
                           .sum = out.second_moment + k * m_.stride,
                           .scale = T(scale(s_)),
                           .mean = T(mean),
                           .rest = T(mean - T(mean))};
    }
  }

  // Rows less the centre, in panels.
  Rows<T> packed(Rows<T> raw, int64_t n) {
    for (int64_t j = 0; j < n; ++j)
      for_each_panel<T>(w_, [&](int64_t at, auto vectors) {
        constexpr int V = vectors.value;
        for (int v = 0; v < V; ++v)
          store<T>(panels_ + at * n + (j * V + v) * W<T>,
                   load(raw.at + j * raw.ld + at + v * W<T>) - load(centre_ + at + v * W<T>));
      });
    return {nullptr, 0, panels_};
  }

  void add(Rows<T> rows, int64_t n, int64_t at, int64_t first, int64_t count) {
    const int64_t padded = round_up(n, W<T>);
    const T* c[tile_queries];
    T* sum[tile_queries];
    for (int64_t i = 0; i < count; ++i) {
      const Target& target = target_[first + i];
      const T *const weight = weights_ + (B_ * at + target.query * padded) * (1 + p_.K),
                     *const weighted = weight + (1 + target.vector) * padded;
      T* const to = coefficient_ + i * tile_;
      for (int64_t j = 0; j < n; j += W<T>) {
        const Vec<T> e = load(weight + j);
        store<T>(to + j, target.scale * (load(weighted + j) - target.mean * e - target.rest * e));
      }
      c[i] = to;
      sum[i] = work_ + (first + i) * w_;
    }
    weighted_sums<T>(count, c, rows, n, w_, sum);
  }

  // Into the sums in double, as SweepBase does.
  void flush() {
    for (int64_t i = 0; i < count_; ++i) add_scaled(target_[i].sum, w_, 1, work_ + i * w_);
    memset(work_, 0, size_t(count_ * w_) * sizeof(T));
  }

  const Problem<T>& p_;
  const Moments<T>& m_;
  const MatvecWeights<T>& in_;
  const int64_t s_, B_, w_, tile_;
  const bool in_place_;
  const T* const weights_;
  Arena scratch_;
  T *rows_, *panels_, *centre_, *coefficient_, *work_;
  Target* target_;
  int64_t count_ = 0;
};

}  // namespace
