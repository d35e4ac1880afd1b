// Tiles of atoms less the centre, and expanded logits of a few queries as a matrix product:
//   logit = constant + (alpha / sigma^2) (<x, y> - (alpha / 2) |y|^2) + log pi,
// x and y from the centre. Their rounding error grows with (alpha^2 / sigma^2) |y|^2; error()
// bounds it, and logits_by_differences() has none that grows.
#pragma once
#include "simd/query.h"

namespace {

template <class T>
class ExpandedTiles {
 public:
  // Queries [b0, b0 + B), whose rows of w numbers are at raw_x. sums: whether weighted sums of the
  // rows are wanted, for which these are packed too.
  ExpandedTiles(const Problem<T>& p, int64_t w, int64_t b0, int64_t B, bool sums = true)
      : p_(p),
        w_(w),
        B_(B),
        tile_(tile_rows(w, B)),
        packed_(B >= packed_queries),
        in_place_(rows_in_place(p)),
        scratch_(room()) {
    if (!scratch_.ok()) return;
    query_ = scratch_.template take<Query<T>>(B);
    x_ = scratch_.template take<T>(B * (w + W<T>));
    rows_ = scratch_.template take<T>(tile_ * (w + W<T>));
    centred_ = scratch_.template take<T>(p.centre ? tile_ * (w + W<T>) : 0);
    panels_ = packed_ && sums ? scratch_.template take<T>(tile_ * w) : nullptr;
    cols_ = scratch_.template take<T>(packed_ ? tile_ * w : 0);
    logits_ = scratch_.template take<T>(tile_queries * tile_);
    norm_ = scratch_.template take<T>(tile_);
    log_prior_ = scratch_.template take<T>(tile_);
    row_ = scratch_.template take<const T*>(tile_);
  }
  // x less alpha times the centre, of query b of the batch, which is query i of the group.
  void set_query(int64_t i, int64_t b, const T* raw_x) {
    T* const x = centred_x(i);
    // Rounded once: an error of the size of the centre's would lead the filter astray.
    for (int64_t k = 0; k < w_; ++k)
      x[k] = p_.centre && k < p_.d
                 ? T(double(raw_x[k]) - double(p_.alpha[b]) * double(p_.centre[k]))
                 : raw_x[k];
    query_[i] = query_of(x, w_, p_.alpha[b], p_.sigma[b]);
  }

  // As many atoms as stay in the caches while all queries pass: whole panels of them, and several,
  // so that the sums are not read and written for a few.
  static int64_t tile_rows(int64_t w, int64_t B) {
    const bool packed = B >= packed_queries;
    const int64_t n = (packed ? packed_tile_bytes : tile_bytes) / (w * int64_t(sizeof(T)));
    const int64_t step = packed || n >= 2 * block.vectors * W<T> ? block.vectors * W<T> : W<T>;
    return n < step ? step : n > 512 ? 512 / step * step : n / step * step;
  }

  bool ok() const { return scratch_.ok(); }
  // x of a query less alpha times the centre. One vector longer than it need be: rows a multiple of
  // 4 KiB apart would compete for the same cache lines.
  T* centred_x(int64_t i) const { return x_ + i * (w_ + W<T>); }
  const Query<T>& query(int64_t i) const { return query_[i]; }
  // The logits of the i-th query of those that dot_products() had last.
  T* logits(int64_t i) const { return logits_ + i * tile_; }

  // Atoms [start, start + n) and the dot products of the first queries. Outliers are replaced by
  // the centre, masked; leave_out(row, log_prior) is called for each. False where one is not
  // finite.
  template <class F>
  bool load(int64_t start, int64_t n, Tile<T>& tile, const F& leave_out) {
    read_log_prior(p_, start, n, round_up(n, W<T>), log_prior_);
    tile = tile_of(read_rows(p_, start, n, w_, rows_, in_place_), start, n);
    if (dot_products(tile, 0, true)) return true;
    if (!leave_outliers_out(tile, leave_out)) return false;
    dot_products(tile, 0, true);
    return true;
  }
  int64_t group_size(int64_t q) const { return B_ - q < tile_queries ? B_ - q : tile_queries; }

  // Dot products of the queries from q on with the atoms into logits_.
  void dot_products(Tile<T>& t, int64_t q) { dot_products(t, q, false); }

  // The logits of W atoms from atom j on, relative to the query's constant, of the dot products at
  // l; to be kept in a local variable, which no store can change.
  static auto logits_of(const Tile<T>& t, const Query<T>& query, const T* l) {
    return [factor = query.factor, half_alpha = query.alpha / 2, norm = t.norm,
            log_prior = t.log_prior, l](int64_t j) {
      return factor * (::load(l + j) - half_alpha * ::load(norm + j)) + ::load(log_prior + j);
    };
  }
  // Makes logits of all dot products of a query; returns the largest.
  T finish_logits(const Tile<T>& t, const Query<T>& query, T* l) const {
    Vec<T> largest[4];
    for (Vec<T>& some : largest) some = all<T>(-T(__builtin_inf()));
    const auto logit_of = logits_of(t, query, l);
    in_four_chains<T>(t.padded, [&](int64_t j, int u) {
      const Vec<T> logit = logit_of(j);
      store<T>(l + j, logit);
      largest[u] = larger<T>(logit, largest[u]);
    });
    return max_lanes<T>(
        larger<T>(larger<T>(largest[0], largest[1]), larger<T>(largest[2], largest[3])));
  }

  static T max_of(const T* l, int64_t n) {
    Vec<T> largest = all<T>(-T(__builtin_inf()));
    for (int64_t j = 0; j < n; j += W<T>) largest = larger<T>(::load(l + j), largest);
    return max_lanes<T>(largest);
  }

  // Logits of the whole tile by differences, log pi - |x - alpha y|^2 / 2 sigma^2, of some of the
  // queries from q on, whose rows are at raw_x.
  void logits_by_differences(const Tile<T>& t, int64_t q, int64_t count, const int64_t* queries,
                             const T* raw_x) {
    distances_into_logits(t, q, count, queries, raw_x);
    for (int64_t i = 0; i < count; ++i) {
      T* const l = logits(queries[i] - q);
      for (int64_t j = 0; j < t.padded; j += W<T>)
        store<T>(l + j,
                 ::load(t.log_prior + j) - T(query_[queries[i]].half_precision) * ::load(l + j));
    }
  }
  // The |x - alpha y|^2 alone, where a metric is given in that of each query.
  void distances_into_logits(const Tile<T>& t, int64_t q, int64_t count, const int64_t* queries,
                             const T* raw_x, const T* const* metric = nullptr) {
    const T* x[tile_queries];
    T *l[tile_queries], alpha[tile_queries];
    for (int64_t i = 0; i < count; ++i) {
      x[i] = raw_x + queries[i] * w_;
      alpha[i] = query_[queries[i]].alpha;
      l[i] = logits(queries[i] - q);
    }
    if (t.cols && !p_.centre) {
      if (metric)
        distance_cols<T, true>(count, x, alpha, t.cols, t.padded, w_, l, metric);
      else
        distance_cols<T>(count, x, alpha, t.cols, t.padded, w_, l);
      return;
    }
    for (int64_t j = 0; j < t.n; ++j) row_[j] = t.raw.at + j * t.raw.ld;
    for (int64_t i = 0; i < count; ++i) {
      if (metric)
        distances<T, true>(x[i], alpha[i], row_, t.n, w_, l[i], metric[i]);
      else
        distances<T>(x[i], alpha[i], row_, t.n, w_, l[i]);
      for (int64_t j = t.n; j < t.padded; ++j) l[i][j] = 0;
    }
  }

  // No expanded logit of the tile is further than this from the exact one.
  double error(const Tile<T>& t, const Query<T>& query) const {
    return epsilon<T> * double(w_ / W<T> + 16) *
           (2 * query.atom_factor * t.largest_norm - query.constant + t.largest_log_prior);
  }

  // The largest |y * y|.
  double largest_square_norm(const Tile<T>& t) const {
    double largest = 0;
    for (int64_t j = 0; j < t.n; ++j) {
      Vec<T> sum{};
      for (int64_t k = 0; k < w_; k += W<T>) {
        const Vec<T> y = ::load(t.rows.at + j * t.rows.ld + k), square = y * y;
        sum += square * square;
      }
      const double norm = __builtin_sqrt(total<T>(sum));
      if (!(norm <= largest)) largest = norm;
    }
    return largest;
  }

  // Whether at least half of the atoms have a logit of at least `least`.
  static bool crowded(const Tile<T>& t, const T* l, T least) {
    int count = 0;
    for (int64_t j = 0; j < t.n; ++j) count += l[j] >= least;
    return 2 * count >= t.n;
  }

 private:
  size_t room() const {
    const auto t = [](int64_t n) { return Arena::bytes<T>(n); };
    return Arena::bytes<Query<T>>(B_) + t(B_ * (w_ + W<T>)) + 2 * t(packed_ ? tile_ * w_ : 0) +
           2 * t(tile_ * (w_ + W<T>)) + t(tile_queries * tile_) + 2 * t(tile_) +
           Arena::bytes<const T*>(tile_);
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
    if (packed_) {
      pack(t.rows, n, w_, panels_, cols_);
      t.rows.panels = panels_;
      t.cols = cols_;
    } else if (raw.at != rows_) {
      t.rows.ahead = raw.at + n * raw.ld;
    }
    return t;
  }

  // Dot products of the queries from q on with the atoms into logits_; with `norms` also |y|^2.
  // False where one of these is too large for T.
  bool dot_products(Tile<T>& t, int64_t q, bool norms) {
    const int64_t count = group_size(q);
    const T* x[tile_queries];
    for (int64_t i = 0; i < count; ++i) x[i] = centred_x(q + i);
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
  template <class F>
  bool leave_outliers_out(Tile<T>& t, const F& leave_out) {
    const int64_t ld = w_ + W<T>;
    if (t.raw.at != rows_)
      for (int64_t j = 0; j < t.n; ++j)
        memcpy(rows_ + j * ld, t.raw.at + j * t.raw.ld, size_t(w_) * sizeof(T));
    for (int64_t j = 0; j < t.n; ++j) {
      if (!outlier(j)) continue;
      T* row = rows_ + j * ld;
      if (!finite_row(row, p_.d)) return false;
      leave_out(row, log_prior_[j]);
      read_reference(p_, -1, row);
      log_prior_[j] = -T(__builtin_inf());
    }
    t = tile_of({rows_, ld}, t.start, t.n);
    return true;
  }

  const Problem<T>& p_;
  const int64_t w_, B_, tile_;
  const bool packed_, in_place_;
  Arena scratch_;
  Query<T>* query_;
  T *x_, *centred_, *rows_, *panels_, *cols_, *logits_, *norm_, *log_prior_;
  const T** row_;
};

}  // namespace
