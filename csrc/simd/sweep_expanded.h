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
#include "simd/sweep_base.h"

namespace {

template <class T>
class ExpandedSweep : private SweepBase<T> {
  using Base = SweepBase<T>;
  using Base::batch_index, Base::sums, Base::work, Base::in_tile, Base::flush;
  using Base::p_, Base::m_, Base::b0_, Base::B_, Base::w_, Base::tile_, Base::gap_, Base::raw_x_,
      Base::reference_, Base::kind_scratch_, Base::picked_log_prior_, Base::origin_,
      Base::picked_atom_, Base::picked_row_;

 public:
  ExpandedSweep(const Problem<T>& p, const Moments<T>& m, int64_t s, int64_t b0, int64_t b1)
      : Base(p, m, s, b0, b1, tile_rows(m, b1 - b0 >= 2 * tile_queries)),
        by_cols_(B_ >= 2 * tile_queries),
        in_place_(rows_in_place(p) && !(by_cols_ && p.row_stride * int64_t(sizeof(T)) % 4096 == 0)),
        tile_scratch_(room()) {
    if (!tile_scratch_.ok() || !Base::ok()) return;
    query_ = tile_scratch_.template take<Query<T>>(B_);
    x_ = tile_scratch_.template take<T>(B_ * w_);
    rows_ = tile_scratch_.template take<T>(tile_ * (w_ + W<T>));
    centred_ = tile_scratch_.template take<T>(p.centre ? tile_ * (w_ + W<T>) : 0);
    cols_ = tile_scratch_.template take<T>(tile_ * w_);
    logits_ = tile_scratch_.template take<T>(tile_queries * tile_);
    norm_ = tile_scratch_.template take<T>(tile_);
    log_prior_ = tile_scratch_.template take<T>(tile_);
    for (int64_t i = 0; i < B_; ++i) {
      const int64_t b = batch_index(i);
      Base::begin(i);
      for (int64_t k = 0; k < w_; ++k)
        x_[i * w_ + k] =
            raw_x_[i * w_ + k] - (p.centre && k < p.d ? p.alpha[b] * p.centre[k] : T(0));
      query_[i] = query_of(x_ + i * w_, w_, p.alpha[b], p.sigma[b]);
    }
  }

  int run(int64_t n0, int64_t n1) {
    if (!tile_scratch_.ok() || !Base::ok()) return out_of_memory;
    int64_t visited = 0;
    for (int64_t i = n0; i < n1; i += tile_) {
      Tile<T> tile = load(i, n1 - i < tile_ ? n1 - i : tile_);
      bool within = dot_products(tile, 0, true);
      if (!within) {
        if (!leave_outliers_out(tile)) return non_finite_atom;
        dot_products(tile, 0, true);
      }
      for (int64_t q = 0; q < B_; q += tile_queries) {
        if (q) dot_products(tile, q, false);
        visit(tile, q, group_size(q));
      }
      if (++visited % 16 == 0) flush();
    }
    Base::finish();
    return ok;
  }

 private:
  // As many atoms as stay in a second-level cache of 1 MiB, with their transpose if there is one,
  // while all queries pass.
  static int64_t tile_rows(const Moments<T>& m, bool by_cols) {
    const int64_t n = (by_cols ? 384 : 512) * 1024 / (m.stride * int64_t(sizeof(T)));
    const int64_t step = n >= 6 * W<T> ? 3 * W<T> : W<T>;  // whole blocks of dot_cols
    return n < step ? step : n > 256 ? 256 / step * step : n / step * step;
  }
  size_t room() const {
    const auto t = [](int64_t n) { return Arena::bytes<T>(n); };
    return Arena::bytes<Query<T>>(B_) + t(B_ * w_) + t(tile_ * w_) + 2 * t(tile_ * (w_ + W<T>)) +
           t(tile_queries * tile_) + 2 * t(tile_);
  }

  Rows<T> centred(Rows<T> raw, int64_t n) {
    const int64_t ld = w_ + W<T>;
    for (int64_t j = 0; j < n; ++j) {
      T* row = centred_ + j * ld;
      for (int64_t k = 0; k < p_.d; ++k) row[k] = raw.at[j * raw.ld + k] - p_.centre[k];
      for (int64_t k = p_.d; k < w_; ++k) row[k] = 0;
    }
    return {centred_, ld};
  }

  Tile<T> load(int64_t start, int64_t n) {
    read_log_prior(p_, start, n, round_up(n, W<T>), log_prior_);
    return tile_of(read_rows(p_, start, n, w_, rows_, in_place_), start, n);
  }

  Tile<T> tile_of(Rows<T> raw, int64_t start, int64_t n) {
    Tile<T> t{.rows = p_.centre ? centred(raw, n) : raw,
              .raw = raw,
              .cols = nullptr,
              .start = start,
              .n = n,
              .padded = round_up(n, W<T>),
              .norm = norm_,
              .log_prior = log_prior_,
              .largest_norm = 0,
              .largest_log_prior = 0};
    Vec<T> largest{};
    for (int64_t j = 0; j < t.padded; j += W<T>) {
      const Vec<T> l = ::load(log_prior_ + j), size = larger<T>(l, -l);
      largest = larger<T>(size < T(__builtin_inf()) ? size : Vec<T>{}, largest);
    }
    t.largest_log_prior = max_lanes<T>(largest);
    for (int64_t j = n; j < t.padded; ++j) norm_[j] = 0;
    if (by_cols_) {
      transpose(t.rows, n, w_, cols_, t.padded);
      t.cols = cols_;
    }
    return t;
  }

  int64_t group_size(int64_t q) const { return B_ - q < tile_queries ? B_ - q : tile_queries; }

  // Dot products of the queries from q on with the atoms into logits_; with `norms` also |y|^2.
  // False where one of these is too large for T.
  bool dot_products(Tile<T>& t, int64_t q, bool norms) {
    const int64_t count = group_size(q);
    const T* x[tile_queries];
    for (int64_t i = 0; i < count; ++i) x[i] = x_ + (q + i) * w_;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = t.n; j < t.padded; ++j) logits_[i * tile_ + j] = 0;
    dots<T>(count, x, t.rows, t.cols, t.n, w_, logits_, tile_, norms ? norm_ : nullptr);
    if (!norms) return true;
    T largest = 0;
    for (int64_t j = 0; j < t.n; ++j) {
      if (outlier(j)) return false;
      if (norm_[j] > largest) largest = norm_[j];
    }
    t.largest_norm = largest;
    return true;
  }
  bool outlier(int64_t j) const { return !(norm_[j] <= T(largest_square<T>)); }

  // Puts the centre, masked, in the place of every outlier of the tile. False where one is not
  // finite.
  bool leave_outliers_out(Tile<T>& t) {
    const int64_t ld = w_ + W<T>;
    if (t.raw.at != rows_)
      for (int64_t j = 0; j < t.n; ++j)
        memcpy(rows_ + j * ld, t.raw.at + j * t.raw.ld, size_t(w_) * sizeof(T));
    for (int64_t j = 0; j < t.n; ++j) {
      if (!outlier(j)) continue;
      T* row = rows_ + j * ld;
      if (!finite_row(row, p_.d)) return false;
      for (int64_t i = 0; i < B_; ++i) leave_out(p_, sums(i), batch_index(i), row, log_prior_[j]);
      read_reference(p_, -1, row);
      log_prior_[j] = -T(__builtin_inf());
    }
    t = tile_of({rows_, ld}, t.start, t.n);
    return true;
  }

  void visit(const Tile<T>& t, int64_t q, int64_t count) {
    QueryInTile<T> active[tile_queries];
    int64_t n_active = 0, again[tile_queries], n_again = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Query<T>& query = query_[q + i];
      const QuerySums s = sums(q + i);
      T* l = logits_ + i * tile_;
      if (!expands(query, t.largest_norm)) {
        add_all(t, q + i);
        continue;
      }
      const T largest = finish_logits(t, query, l);
      if (!(largest > -T(__builtin_inf()))) continue;
      // Beside such a tile all that came before is negligible: the query starts again.
      if (*s.weight_sum > 0 && query.constant + largest - error(t, query) > *s.max_logit + gap_)
        Base::restart(q + i);
      const double z = query.atom_factor * t.largest_norm;
      const bool centre_will_do = z <= kind_of(p_).centre_limit * p_.d && *s.reference < 0 &&
                                  (*s.weight_sum > 0 || crowded(t, l, largest));
      if (centre_will_do && z - query.constant <= expanded_limit * p_.d) {
        if (weigh(t, q + i, l, largest, query.constant)) active[n_active++] = in_tile(q + i, l);
      } else if (centre_will_do) {
        again[n_again++] = q + i;
      } else {
        filter(t, q + i, l, largest);
      }
    }
    if (n_again) {
      logits_by_differences(t, n_again, again, logits_ - q * tile_);
      for (int64_t i = 0; i < n_again; ++i) {
        T* l = logits_ + (again[i] - q) * tile_;
        if (weigh(t, again[i], l, max_of(l, t.padded), 0))
          active[n_active++] = in_tile(again[i], l);
      }
    }
    if (n_active)
      add_tile<T>(p_, m_,
                  {.count = n_active,
                   .queries = active,
                   .rows = t.rows,
                   .cols = t.cols,
                   .n = t.n,
                   .norm = t.norm,
                   .scratch = kind_scratch_,
                   .scratch_stride = tile_});
  }

  // Makes logits, relative to the query's constant, of dot products; returns the largest.
  T finish_logits(const Tile<T>& t, const Query<T>& query, T* l) {
    for (int64_t j = 0; j < t.padded; j += W<T>)
      store<T>(l + j, query.factor * (::load(l + j) - query.alpha / 2 * ::load(t.norm + j)) +
                          ::load(t.log_prior + j));
    return max_of(l, t.padded);
  }

  static T max_of(const T* l, int64_t n) {
    Vec<T> largest = all<T>(-T(__builtin_inf()));
    for (int64_t j = 0; j < n; j += W<T>) largest = larger<T>(::load(l + j), largest);
    return max_lanes<T>(largest);
  }

  // Logits of the whole tile by differences: log pi - |x - alpha y|^2 / 2 sigma^2, query i's at out
  // + i * tile_.
  void logits_by_differences(const Tile<T>& t, int64_t count, const int64_t* queries, T* out) {
    const T* x[tile_queries];
    T *l[tile_queries], alpha[tile_queries];
    for (int64_t i = 0; i < count; ++i) {
      x[i] = raw_x_ + queries[i] * w_;
      alpha[i] = query_[queries[i]].alpha;
      l[i] = out + queries[i] * tile_;
    }
    if (t.cols && !p_.centre) {
      for (int64_t i = 0; i < count; i += 4)
        with_count<4>(count - i < 4 ? count - i : 4, [&](auto c) {
          distance_cols<T, c.value>(x + i, alpha + i, t.cols, t.padded, t.padded, w_, l + i);
        });
    } else {
      for (int64_t j = 0; j < t.n; ++j) picked_row_[j] = t.raw.at + j * t.raw.ld;
      for (int64_t i = 0; i < count; ++i) {
        distances(x[i], alpha[i], picked_row_, t.n, w_, l[i]);
        for (int64_t j = t.n; j < t.padded; ++j) l[i][j] = 0;
      }
    }
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < t.padded; j += W<T>)
        store<T>(l[i] + j,
                 ::load(t.log_prior + j) - T(query_[queries[i]].half_precision) * ::load(l[i] + j));
  }

  // No expanded logit of the tile is further than this from the exact one.
  double error(const Tile<T>& t, const Query<T>& query) const {
    return epsilon<T> * double(w_ / W<T> + 16) *
           (2 * query.atom_factor * t.largest_norm - query.constant + t.largest_log_prior);
  }

  // Whether at least half of the atoms can carry weight: no one atom is then a better reference
  // than the centre.
  bool crowded(const Tile<T>& t, const T* l, T largest) const {
    int64_t count = 0;
    for (int64_t j = 0; j < t.n; ++j) count += l[j] >= largest - T(gap_);
    return 2 * count >= t.n;
  }

  // Makes weights of logits less `offset`, in place. False where the whole tile is negligible.
  bool weigh(const Tile<T>& t, int64_t i, T* l, T largest, double offset) {
    const QuerySums s = sums(i);
    T max_logit = T(*s.max_logit - offset);
    if (largest < max_logit - T(gap_)) return false;
    if (largest > max_logit) max_logit = largest;
    // *s.max_logit is offset plus a number of type T, so that it comes back from double without
    // rounding.
    if (offset + max_logit != *s.max_logit) {
      flush(i);
      raise_max_logit(p_, m_, s, offset + max_logit);
    }
    Vec<T> sum{}, square_sum{};
    for (int64_t j = 0; j < t.padded; j += W<T>) {
      const Vec<T> e = vexp(::load(l + j) - max_logit);
      store<T>(l + j, e);
      sum += e;
      square_sum += e * e;
    }
    *s.weight_sum += total<T>(sum);
    *s.weight_square_sum += total<T>(square_sum);
    return true;
  }

  // Adds the survivors among the atoms of the tile, as a rule few.
  void filter(const Tile<T>& t, int64_t i, const T* l, T largest) {
    const Query<T>& query = query_[i];
    const double error = this->error(t, query);
    const double sure = query.constant + largest - error, max_logit = *sums(i).max_logit;
    const double least = (max_logit > sure ? max_logit : sure) - gap_ - error - query.constant;
    if (!(largest >= least)) return;
    int64_t n = 0;
    for (int64_t j = 0; j < t.n; ++j)
      if (l[j] >= least) take(t, j, n++);
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

  const bool by_cols_, in_place_;
  Arena tile_scratch_;
  Query<T>* query_;
  T *x_, *centred_, *rows_, *cols_, *logits_, *norm_, *log_prior_;
};

}  // namespace
