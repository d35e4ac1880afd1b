// One sweep over a range of atoms for a block of queries: d above a few vectors' worth.
//
// Logits come from the expanded form l = k + (alpha / sigma^2) (<x, y> - (alpha / 2) |y|^2) + log
// pi, a matrix product. Its rounding error grows with (alpha^2/sigma^2)|y|^2, x and y measured from
// the centre. So, for every query and tile:
//   near     the noise is as large as the data and most atoms carry weight: they are believed
//   between  most atoms carry weight, in less noise: logits again by differences, for the whole
//   tile far      a filter with a rigorous error bound: the atoms that can carry weight, few as a
//   rule, are done
//            again by differences and gathered about the heaviest of them (sweep_base.h)
#pragma once
#include "simd/sweep_base.h"

namespace {

template <class T>
class Sweep : private Exact<T> {
  using Base = Exact<T>;
  using Base::at, Base::sums, Base::work, Base::target, Base::flush;
  using Base::p_, Base::m_, Base::b0_, Base::B_, Base::w_, Base::tile_, Base::gap_, Base::raw_x_,
      Base::ref_, Base::coef_, Base::prior_, Base::origin_, Base::atom_, Base::pointer_;

 public:
  Sweep(const Problem<T>& p, const Moments<T>& m, int64_t s, int64_t b0, int64_t b1)
      : Base(p, m, s, b0, b1, tile_rows(m, b1 - b0 >= 2 * group)),
        by_cols_(B_ >= 2 * group),
        in_place_(rows_in_place(p) && !(by_cols_ && p.ldy * int64_t(sizeof(T)) % 4096 == 0)),
        arena_(room()) {
    if (!arena_.ok() || !Base::ok()) return;
    query_ = arena_.template take<Query<T>>(B_);
    x_ = arena_.template take<T>(B_ * w_);
    rows_ = arena_.template take<T>(tile_ * (w_ + W<T>));
    centred_ = arena_.template take<T>(p.centre ? tile_ * (w_ + W<T>) : 0);
    cols_ = arena_.template take<T>(tile_ * w_);
    logits_ = arena_.template take<T>(group * tile_);
    norm_ = arena_.template take<T>(tile_);
    log_prior_ = arena_.template take<T>(tile_);
    for (int64_t i = 0; i < B_; ++i) {
      const int64_t b = at(i);
      Base::begin(i);
      for (int64_t k = 0; k < w_; ++k)
        x_[i * w_ + k] =
            raw_x_[i * w_ + k] - (p.centre && k < p.d ? p.alpha[b] * p.centre[k] : T(0));
      query_[i] = query_of(x_ + i * w_, w_, p.alpha[b], p.sigma[b]);
    }
  }

  int run(int64_t n0, int64_t n1) {
    if (!arena_.ok() || !Base::ok()) return out_of_memory;
    int64_t visited = 0;
    for (int64_t i = n0; i < n1; i += tile_) {
      Tile<T> tile = load(i, n1 - i < tile_ ? n1 - i : tile_);
      bool within = dot_products(tile, 0, true);
      if (!within) {
        if (!leave_outliers_out(tile)) return non_finite_atom;
        dot_products(tile, 0, true);
      }
      for (int64_t q = 0; q < B_; q += group) {
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
           t(group * tile_) + 2 * t(tile_);
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
    Tile<T> t{p_.centre ? centred(raw, n) : raw,
              raw,
              nullptr,
              start,
              n,
              round_up(n, W<T>),
              norm_,
              log_prior_,
              0,
              0};
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

  int64_t group_size(int64_t q) const { return B_ - q < group ? B_ - q : group; }

  // Of the queries from q on with the atoms, into logits_; with `norms` the atoms' norms too. False
  // where one of these is beyond what T can work with.
  bool dot_products(Tile<T>& t, int64_t q, bool norms) {
    const int64_t count = group_size(q);
    const T* x[group];
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

  // The tile with the centre, masked, in place of every outlier. False where one is not finite.
  bool leave_outliers_out(Tile<T>& t) {
    const int64_t ld = w_ + W<T>;
    if (t.raw.at != rows_)
      for (int64_t j = 0; j < t.n; ++j)
        memcpy(rows_ + j * ld, t.raw.at + j * t.raw.ld, size_t(w_) * sizeof(T));
    for (int64_t j = 0; j < t.n; ++j) {
      if (!outlier(j)) continue;
      T* row = rows_ + j * ld;
      if (!finite_row(row, p_.d)) return false;
      for (int64_t i = 0; i < B_; ++i) leave_out(p_, sums(i), at(i), row, log_prior_[j]);
      read_reference(p_, -1, row);
      log_prior_[j] = -T(__builtin_inf());
    }
    t = tile_of({rows_, ld}, t.start, t.n);
    return true;
  }

  void visit(const Tile<T>& t, int64_t q, int64_t count) {
    Target<T> active[group];
    int64_t n_active = 0, between[group], n_between = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Query<T>& query = query_[q + i];
      const Sums s = sums(q + i);
      T* l = logits_ + i * tile_;
      if (!expands(query, t.largest_norm)) {
        gather_all(t, q + i);
        continue;
      }
      const T largest = finish_logits(t, query, l);
      if (!(largest > -T(__builtin_inf()))) continue;
      // A tile beside which all that came before is nothing starts the query anew.
      if (*s.mass > 0 && query.k + largest - error(t, query) > *s.top + gap_) Base::restart(q + i);
      const double z = query.h * t.largest_norm;
      const bool about_centre =
          z <= centre_limit(p_) * p_.d && *s.ref < 0 && (*s.mass > 0 || crowded(t, l, largest));
      if (about_centre && z - query.k <= near_limit * p_.d) {
        if (weigh(t, q + i, l, largest, query.k)) active[n_active++] = target(q + i, l);
      } else if (about_centre) {
        between[n_between++] = q + i;
      } else {
        filter(t, q + i, l, largest);
      }
    }
    if (n_between) {
      exact_logits(t, n_between, between, logits_ - q * tile_);
      for (int64_t i = 0; i < n_between; ++i) {
        T* l = logits_ + (between[i] - q) * tile_;
        if (weigh(t, between[i], l, max_of(l, t.padded), 0))
          active[n_active++] = target(between[i], l);
      }
    }
    if (n_active) add_tile(p_, m_, n_active, active, t.rows, t.cols, t.n, t.norm, coef_, tile_);
  }

  // Dot products into logits, relative to the query's k; returns the largest.
  T finish_logits(const Tile<T>& t, const Query<T>& query, T* l) {
    for (int64_t j = 0; j < t.padded; j += W<T>)
      store<T>(l + j, query.by * (::load(l + j) - query.alpha / 2 * ::load(t.norm + j)) +
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
  void exact_logits(const Tile<T>& t, int64_t count, const int64_t* queries, T* out) {
    const T* x[group];
    T *l[group], alpha[group];
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
      for (int64_t j = 0; j < t.n; ++j) pointer_[j] = t.raw.at + j * t.raw.ld;
      for (int64_t i = 0; i < count; ++i) {
        distances(x[i], alpha[i], pointer_, t.n, w_, l[i]);
        for (int64_t j = t.n; j < t.padded; ++j) l[i][j] = 0;
      }
    }
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < t.padded; j += W<T>)
        store<T>(l[i] + j, ::load(t.log_prior + j) - T(query_[queries[i]].half) * ::load(l[i] + j));
  }

  // No expanded logit of the tile is further than this from the exact one.
  double error(const Tile<T>& t, const Query<T>& query) const {
    return epsilon<T> * double(w_ / W<T> + 16) *
           (2 * query.h * t.largest_norm - query.k + t.largest_log_prior);
  }

  // Whether at least half of the atoms can carry weight: no one atom is then a better reference
  // than the centre.
  bool crowded(const Tile<T>& t, const T* l, T largest) const {
    int64_t count = 0;
    for (int64_t j = 0; j < t.n; ++j) count += l[j] >= largest - T(gap_);
    return 2 * count >= t.n;
  }

  // Logits less `offset` into weights, in place; false where the whole tile is too light to count.
  bool weigh(const Tile<T>& t, int64_t i, T* l, T largest, double offset) {
    const Sums s = sums(i);
    T top = T(*s.top - offset);
    if (largest < top - T(gap_)) return false;
    if (largest > top) top = largest;
    // The top is offset plus a number of type T, so that it comes back from double without
    // rounding.
    if (offset + top != *s.top) {
      flush(i);
      raise_top(p_, m_, s, offset + top);
    }
    Vec<T> sum{}, sum2{};
    for (int64_t j = 0; j < t.padded; j += W<T>) {
      const Vec<T> e = vexp(::load(l + j) - top);
      store<T>(l + j, e);
      sum += e;
      sum2 += e * e;
    }
    *s.mass += total<T>(sum);
    *s.mass2 += total<T>(sum2);
    return true;
  }

  // The atoms of the tile that can carry weight, few as a rule.
  void filter(const Tile<T>& t, int64_t i, const T* l, T largest) {
    const Query<T>& query = query_[i];
    const double error = this->error(t, query);
    const double sure = query.k + largest - error, top = *sums(i).top;
    const double least = (top > sure ? top : sure) - gap_ - error - query.k;
    if (!(largest >= least)) return;
    int64_t n = 0;
    for (int64_t j = 0; j < t.n; ++j)
      if (l[j] >= least) take(t, j, n++);
    Base::gather_exactly(i, n);
  }
  void gather_all(const Tile<T>& t, int64_t i) {
    int64_t n = 0;
    for (int64_t j = 0; j < t.n; ++j)
      if (t.log_prior[j] > -T(__builtin_inf())) take(t, j, n++);
    if (n) Base::gather_exactly(i, n);
  }
  void take(const Tile<T>& t, int64_t j, int64_t n) {
    pointer_[n] = t.raw.at + j * t.raw.ld;
    prior_[n] = t.log_prior[j];
    atom_[n] = row_of(p_, t.start + j);
  }

  const bool by_cols_, in_place_;
  Arena arena_;
  Query<T>* query_;
  T *x_, *centred_, *rows_, *cols_, *logits_, *norm_, *log_prior_;
};

}  // namespace
