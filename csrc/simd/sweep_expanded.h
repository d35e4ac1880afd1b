// The sweep for d above a few vectors: expanded logits as a matrix product, and differences where
// these are not exact enough.
//
// With x and y measured from the centre,
//   logit = constant + (alpha / sigma^2) (<x, y> - (alpha / 2) |y|^2) + log pi,
// whose rounding error grows with (alpha^2 / sigma^2) |y|^2. So, for every query and tile:
//   * The noise is as large as the data and most atoms carry weight: expanded logits are used as
//     they are, and moments are about the centre.
//   * Most atoms carry weight in less noise: the logits of the whole tile are computed again by
//     differences; moments are still about the centre.
//   * Otherwise expanded logits are a filter with a rigorous error bound. The survivors, as a rule
//     few, are evaluated by differences, with moments about the heaviest (sweep_base.h).
#pragma once
#include "simd/expanded_tiles.h"
#include "simd/sweep_base.h"

namespace {

template <class T>
class ExpandedSweep : private SweepBase<T> {
  using Base = SweepBase<T>;
  using Base::batch_index, Base::sums, Base::work, Base::in_tile, Base::flush;
  using Base::p_, Base::m_, Base::B_, Base::w_, Base::tile_, Base::gap_, Base::raw_x_,
      Base::kind_scratch_, Base::v_, Base::picked_log_prior_, Base::picked_atom_, Base::picked_row_,
      Base::segments_, Base::values_;

 public:
  ExpandedSweep(const Problem<T>& p, const Moments<T>& m, int64_t s, int64_t b0, int64_t b1)
      : Base(p, m, s, b0, b1,
             ExpandedTiles<T>::tile_rows(m.width + (p.values.at ? m.stride : 0), b1 - b0)),
        tiles_(p, m.width, b0, b1 - b0) {
    if (!tiles_.ok() || !Base::ok()) return;
    for (int64_t i = 0; i < B_; ++i) {
      Base::begin(i);
      tiles_.set_query(i, batch_index(i), raw_x_ + i * w_);
    }
    most_norm_ = largest_square<T> * 0x1p-35 / largest_vector();
  }

  int run(int64_t n0, int64_t n1) {
    if (!tiles_.ok() || !Base::ok()) return out_of_memory;
    const auto leave_out = [this](const T* row, T log_prior) {
      for (int64_t i = 0; i < B_; ++i) ::leave_out(p_, sums(i), batch_index(i), row, log_prior);
    };
    int64_t visited = 0;
    for (int64_t i = n0; i < n1; i += tile_) {
      Tile<T> tile;
      if (!tiles_.load(i, n1 - i < tile_ ? n1 - i : tile_, tile, leave_out)) return non_finite_atom;
      if (m_.race) find_segments(p_, i, tile.n, segments_);
      value_rows_ = {};
      largest_square_norm_ = __builtin_nan("");
      for (int64_t q = 0; q < B_; q += tile_queries) {
        if (q) tiles_.dot_products(tile, q);
        visit(tile, q, tiles_.group_size(q));
      }
      if (++visited % 16 == 0) flush();
    }
    Base::finish();
    return ok;
  }

 private:
  static constexpr double headroom = 24;  // exp(-24) > 2^-35

  // Whether no logit of the tile can be more than `headroom` above max_logit or, in the first tile,
  // above any other. Then it need not be known which is the largest: weights up to exp(headroom)
  // and their squares can be added up in T, also times |y|^2, and |v| where there are vectors.
  bool has_headroom(const Tile<T>& t, const Query<T>& query, const QuerySums& s) const {
    if (!(t.largest_norm <= most_norm_)) return false;
    const double product = largest_product(query, t.largest_norm);
    if (*s.weight_sum > 0) return query.constant + product <= *s.max_logit + headroom;
    return t.log_prior[0] > -T(__builtin_inf()) &&
           2 * product + query.atom_factor * t.largest_norm + t.largest_log_prior <= headroom;
  }
  // The largest |v|, or 1 if that is less.
  double largest_vector() const {
    double largest = 1;
    for (int64_t i = 0; i < B_; ++i)
      for (int64_t k = 0; k < p_.K; ++k) {
        const T* const v = v_ + (i * p_.K + k) * w_;
        const double square = dot(v, v, w_);
        if (square > largest) largest = square;
      }
    return __builtin_sqrt(largest);
  }

  void visit(const Tile<T>& t, int64_t q, int64_t count) {
    QueryInTile<T> active[tile_queries];
    int64_t n_active = 0, again[tile_queries], n_again = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Query<T>& query = tiles_.query(q + i);
      const QuerySums s = sums(q + i);
      T* l = tiles_.logits(i);
      if (!expands(query, t.largest_norm)) {
        add_all(t, q + i);
        continue;
      }
      const bool exact = expands_exactly(query, t.largest_norm, p_.d);
      const bool near = near_centre(t, query);
      if (exact && near && *s.reference < 0 && has_headroom(t, query, s)) {
        const auto logit_of = tiles_.logits_of(t, query, l);
        const T max_logit = *s.weight_sum > 0 ? T(*s.max_logit - query.constant) : logit_of(0)[0];
        refer_weights_to(q + i, query.constant + max_logit);
        weigh(t, s, q + i, l, max_logit, logit_of);
        active[n_active++] = in_tile(q + i, l);
        continue;
      }
      const T largest = tiles_.finish_logits(t, query, l);
      if (!(largest > -T(__builtin_inf()))) continue;
      // Beside such a tile all that came before is negligible: the query starts again. max_logit
      // need not be the largest logit so far, so that the weights' sum counts too.
      if (*s.weight_sum > 0 && query.constant + largest - tiles_.error(t, query) >
                                   *s.max_logit + __builtin_log(*s.weight_sum) + gap_)
        Base::restart(q + i);
      const bool centre_will_do = near && *s.reference < 0 &&
                                  (*s.weight_sum > 0 || tiles_.crowded(t, l, largest - T(gap_)));
      if (centre_will_do && exact) {
        if (weigh_logits(t, q + i, l, largest, query.constant))
          active[n_active++] = in_tile(q + i, l);
      } else if (centre_will_do) {
        again[n_again++] = q + i;
      } else {
        filter(t, q + i, l, largest);
      }
    }
    if (n_again) {
      tiles_.logits_by_differences(t, q, n_again, again, raw_x_);
      for (int64_t i = 0; i < n_again; ++i) {
        T* l = tiles_.logits(again[i] - q);
        if (weigh_logits(t, again[i], l, tiles_.max_of(l, t.padded), 0))
          active[n_active++] = in_tile(again[i], l);
      }
    }
    if (n_active && p_.values.at && !value_rows_.at) value_rows_ = values_.tile(t.start, t.n);
    if (n_active)
      add_tile<T>(p_, m_,
                  {.count = n_active,
                   .queries = active,
                   .rows = p_.values.at ? value_rows_ : t.rows,
                   .cols = t.cols,
                   .n = t.n,
                   .norm = t.norm,
                   .scratch = kind_scratch_,
                   .scratch_stride = tile_});
    for (int64_t i = 0; p_.values.at && i < n_active; ++i)
      values_.expect_weightless(active[i].weight, active[i].vectors);
  }

  // Whether moments of the tile's atoms about the centre are exact enough (simd/query.h).
  bool near_centre(const Tile<T>& t, const Query<T>& query) {
    const double limit = kind_of(p_).centre_limit * p_.d, root = __builtin_sqrt(double(p_.d)),
                 z = query.atom_factor * t.largest_norm;
    if (!kind_of(p_).elementwise || !(z <= limit) || root * z <= limit) return z <= limit;
    // |y * y|, which is at least |y|^2 / sqrt(d), could underflow.
    if (!(t.largest_norm > root * 1e-12 * __builtin_sqrt(epsilon<T>))) return false;
    if (largest_square_norm_ != largest_square_norm_)
      largest_square_norm_ = tiles_.largest_square_norm(t);
    return root * query.atom_factor * largest_square_norm_ <= limit;
  }

  // Makes weights of logits less `offset`, in place. False where the whole tile is negligible.
  bool weigh_logits(const Tile<T>& t, int64_t i, T* l, T largest, double offset) {
    const QuerySums s = sums(i);
    T max_logit = T(*s.max_logit - offset);
    if (largest < max_logit - T(gap_)) return false;
    if (largest > max_logit) max_logit = largest;
    refer_weights_to(i, offset + max_logit);
    weigh(t, s, i, l, max_logit, [l](int64_t j) { return ::load(l + j); });
    return true;
  }
  // Makes the weights of query i relative to exp(max_logit), which is the query's offset plus a
  // number of type T: so it comes back from double without rounding, which all weights of a tile
  // would have in common.
  void refer_weights_to(int64_t i, double max_logit) {
    const QuerySums s = sums(i);
    if (max_logit == *s.max_logit) return;
    if (*s.weight_sum > 0) flush(i);
    raise_max_logit(p_, m_, s, max_logit);
  }
  // Puts the weights of the logits logit_of(j), relative to exp(max_logit), at l.
  template <class F>
  void weigh(const Tile<T>& t, const QuerySums& s, int64_t i, T* l, T max_logit, const F logit_of) {
    Vec<T> sum[4] = {}, square_sum[4] = {};
    in_four_chains<T>(t.padded, [&](int64_t j, int u) {
      const Vec<T> e = vexp(logit_of(j) - max_logit);
      store<T>(l + j, e);
      sum[u] += e;
      square_sum[u] += e * e;
    });
    *s.weight_sum += total<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
    *s.weight_square_sum +=
        total<T>((square_sum[0] + square_sum[1]) + (square_sum[2] + square_sum[3]));
    if (s.race) add_segments(p_, batch_index(i), *s.race, segments_, l);
  }

  // Adds the survivors among the atoms of the tile, as a rule few.
  void filter(const Tile<T>& t, int64_t i, const T* l, T largest) {
    const Query<T>& query = tiles_.query(i);
    const double error = tiles_.error(t, query);
    const double sure = query.constant + largest - error, max_logit = *sums(i).max_logit;
    const double least = (max_logit > sure ? max_logit : sure) - gap_ - error - query.constant;
    if (!(largest >= least)) return;
    constexpr int64_t run = 4 * W<T>;  // most of them have no survivor
    int64_t n = 0;
    for (int64_t j0 = 0; j0 < t.padded; j0 += run) {
      const int64_t end = t.padded - j0 < run ? t.padded : j0 + run;
      if (!(tiles_.max_of(l + j0, end - j0) >= least)) continue;
      for (int64_t j = j0; j < end; ++j)
        if (l[j] >= least) take(t, j, n++);
    }
    Base::add_by_differences(i, n);
  }
  void add_all(const Tile<T>& t, int64_t i) {
    int64_t n = 0;
    for (int64_t j = 0; j < t.n; ++j)
      if (t.log_prior[j] > -T(__builtin_inf())) take(t, j, n++);
    if (n) Base::add_by_differences(i, n);
  }
  void take(const Tile<T>& t, int64_t j, int64_t n) {
    picked_row_[n] = t.raw.at + j * t.raw.ld;
    picked_log_prior_[n] = t.log_prior[j];
    picked_atom_[n] = row_of(p_, t.start + j);
  }

  ExpandedTiles<T> tiles_;
  double most_norm_;      // |y|^2 up to which weights may be exp(headroom)
  Rows<T> value_rows_{};  // of the tile, once a query needs them
  double largest_square_norm_ = __builtin_nan("");  // of the tile, once a query needs it
};

}  // namespace
