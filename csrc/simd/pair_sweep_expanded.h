// The sweep with given shift and reference for d above a few vectors. For every query and tile:
//   * Expanded logits show that all atoms are negligible: nothing is done.
//   * The noise is as large as the data and most atoms carry weight: the tile goes to the sink
//     whole, about the centre, with all such queries; expanded logits are used as they are, or
//     those by differences in less noise. What cancels about the centre would show in derivatives,
//     though it does not in the moments. So if the posterior is narrow beside the reference's
//     distance from the centre, the atoms near the reference are taken out of the tile and
//     evaluated by differences.
//   * Otherwise the atoms that the expanded logits cannot exclude, as a rule few, are evaluated by
//     differences (pair_sweep.h).
#pragma once
#include "simd/expanded_tiles.h"
#include "simd/pair_sweep.h"

namespace {

template <class T, class Sink>
class PairExpandedSweep : private PairDifferences<T, Sink> {
  using Base = PairDifferences<T, Sink>;
  using Base::p_, Base::a_, Base::sink_, Base::B_, Base::w_, Base::tile_, Base::gap_, Base::raw_x_,
      Base::shift_, Base::constant_, Base::picked_log_prior_, Base::picked_atom_, Base::picked_row_;

 public:
  PairExpandedSweep(const Problem<T>& p, const PairArguments<T>& a, Sink& sink, int64_t w,
                    int64_t b0, int64_t B)
      : Base(p, a, sink, w, b0, B, ExpandedTiles<T>::tile_rows(w, B)),
        tiles_(p, w, b0, B),
        packed_(B >= packed_queries),
        tile_scratch_(room()) {
    if (!ok()) return;
    const PairForms<T>& forms = sink.forms();
    const int64_t size = tile_ * (w + W<T>), cols = packed_ ? tile_ * w : 0;
    squares_ = tile_scratch_.template take<T>(forms.needs_squares() ? size : 0);
    square_cols_ = tile_scratch_.template take<T>(forms.needs_squares() ? cols : 0);
    tangents_ = tile_scratch_.template take<T>(forms.needs_tangents() ? size : 0);
    tangent_cols_ = tile_scratch_.template take<T>(forms.needs_tangents() ? cols : 0);
    products_ = tile_scratch_.template take<T>(forms.needs_products() ? size : 0);
    along_ = tile_scratch_.template take<T>(tile_);
    log_pi_tangent_ = tile_scratch_.template take<T>(tile_);
    atoms_ = tile_scratch_.template take<int64_t>(tile_);
    centre_constant_ = tile_scratch_.template take<double>(B);
    distance_ = tile_scratch_.template take<double>(tile_);
    square_ = tile_scratch_.template take<double>(B);
    from_centre_ = tile_scratch_.template take<T>(B * w);
    along_m_ = tile_scratch_.template take<T>(tile_queries * tile_);
    for (int64_t i = 0; i < B; ++i) {
      const int64_t b = Base::batch_index(i);
      tiles_.set_query(i, b, raw_x_ + i * w);
      centre_constant_[i] = constant(i);
      square_[i] = 0;
      for (int64_t k = 0; k < w; ++k) {
        const double m =
            k < p.d ? double(a.reference[b * p.d + k]) - (p.centre ? p.centre[k] : T(0)) : 0;
        from_centre_[i * w + k] = T(m);
        square_[i] += m * m;
      }
    }
  }

  int run(int64_t n0, int64_t n1) {
    if (!ok()) return out_of_memory;
    int64_t visited = 0;
    for (int64_t i = n0; i < n1; i += tile_) {
      const int64_t n = n1 - i < tile_ ? n1 - i : tile_;
      sink_.begin(i, n);
      Tile<T> tile;
      if (!tiles_.load(i, n, tile, [](const T*, T) {})) return non_finite_atom;
      prepared_ = false;
      for (int64_t q = 0; q < B_; q += tile_queries) {
        if (q) tiles_.dot_products(tile, q);
        visit(tile, q, tiles_.group_size(q));
      }
      if (++visited % 16 == 0) sink_.flush();
    }
    sink_.flush();
    return dfk::ok;
  }

 private:
  // About the centre, sums are for a posterior which is at least so wide, |t|^2 beside |m|^2, and
  // where z (simd/query.h) is no larger than this.
  static constexpr double near = 0.25, centre_limit = 4;

  bool ok() const { return tiles_.ok() && tile_scratch_.ok() && Base::ok(); }
  size_t room() const {
    const auto t = [](int64_t n) { return Arena::bytes<T>(n); };
    return 3 * t(tile_ * (w_ + W<T>)) + 2 * t(packed_ ? tile_ * w_ : 0) + 2 * t(tile_) +
           Arena::bytes<int64_t>(tile_) + 2 * Arena::bytes<double>(B_) +
           Arena::bytes<double>(tile_) + t(B_ * w_) + t(tile_queries * tile_);
  }

  // What an expanded logit less the shift has beside the products, of x before it is rounded.
  double constant(int64_t i) const {
    const int64_t b = Base::batch_index(i);
    double square = 0;
    for (int64_t k = 0; k < p_.d; ++k) {
      const double x =
          double(p_.x[b * p_.d + k]) - (p_.centre ? double(p_.alpha[b]) * p_.centre[k] : 0.0);
      square += x * x;
    }
    return -square * tiles_.query(i).half_precision - shift_[i];
  }

  void visit(const Tile<T>& t, int64_t q, int64_t count) {
    int64_t active[tile_queries], narrow[tile_queries], n_active = 0, n_narrow = 0;
    const T* weight[tile_queries];
    for (int64_t i = 0; i < count; ++i) {
      const Query<T>& query = tiles_.query(q + i);
      T* const l = tiles_.logits(i);
      if (!expands(query, t.largest_norm)) {
        pick(t, q + i, nullptr, 0);
        continue;
      }
      const double largest = tiles_.finish_logits(t, query, l), error = tiles_.error(t, query),
                   constant = centre_constant_[q + i];
      if (!(largest + constant + error >= -gap_)) continue;
      const double z = query.atom_factor * t.largest_norm;
      if (!(z <= centre_limit * p_.d && tiles_.crowded(t, l, T(-gap_ - constant)))) {
        pick(t, q + i, l, -gap_ - error - constant);
        continue;
      }
      const bool expanded = expands_exactly(query, t.largest_norm, p_.d);
      if (!expanded) logits_by_differences(t, q + i, l);
      if (weigh(t, q + i, l, expanded ? constant : 0))
        narrow[n_narrow++] = q + i;
      else
        weigh_heavy(t, q + i, l);
      weight[n_active] = l, active[n_active++] = q + i;
    }
    if (n_narrow) take_near_atoms(t, q, n_narrow, narrow);
    if (n_active) add(t, n_active, active, weight);
  }

  // Logits less the shift, both in double before the difference is rounded.
  void logits_by_differences(const Tile<T>& t, int64_t i, T* l) {
    const Query<T>& query = tiles_.query(i);
    for (int64_t j = 0; j < t.n; ++j) picked_row_[j] = t.raw.at + j * t.raw.ld;
    distances(raw_x_ + i * w_, query.alpha, picked_row_, t.n, w_, distance_);
    for (int64_t j = 0; j < t.n; ++j)
      l[j] = T(double(t.log_prior[j]) - query.half_precision * distance_[j] - shift_[i]);
    for (int64_t j = t.n; j < t.padded; ++j) l[j] = -T(__builtin_inf());
  }

  // Makes weights of logits, which lack a constant, in place. Returns whether the tile shows that
  // the posterior is narrow: with m = reference - centre, its variance is the mean of |y|^2 less
  // |m|^2.
  bool weigh(const Tile<T>& t, int64_t i, T* l, double constant) {
    constexpr double light = 1e-4;  // beside the mean weight
    const T rounded = T(constant), rest = T(__builtin_exp(constant - double(rounded)));
    Vec<T> sum{}, square_sum{};
    for (int64_t j = 0; j < t.padded; j += W<T>) {
      const Vec<T> e = rest * vexp(::load(l + j) + rounded);
      store<T>(l + j, e);
      sum += e;
      square_sum += e * ::load(t.norm + j);
    }
    const double weight = total<T>(sum);
    return total<T>(square_sum) < (1 + near) * square_[i] * weight &&
           weight * double(p_.N) >= light * double(t.n);
  }

  // The few atoms of a query that weigh much have their logits taken about its reference, near
  // which they are: the error of a logit shows in its weight alone.
  void weigh_heavy(const Tile<T>& t, int64_t i, T* e) {
    constexpr T much = T(1) / 64;
    if (!(tiles_.max_of(e, t.padded) >= much)) return;
    for (int64_t j = 0; j < t.n; ++j)
      if (e[j] >= much)
        e[j] = T(__builtin_exp(double(t.log_prior[j]) +
                               Base::shift_row(i, t.raw.at + j * t.raw.ld, 0) - constant_[i]));
  }

  // Of queries from q on with narrow posteriors: adds the atoms near the reference, whose |t|^2 is
  // less than `near` |m|^2, by differences, and sets their weights in the tile to 0. Terms about
  // the centre are at most a few times as large as those of the other atoms about the reference.
  void take_near_atoms(const Tile<T>& t, int64_t q, int64_t count, const int64_t* queries) {
    const T* m[tile_queries];
    for (int64_t i = 0; i < count; ++i) m[i] = from_centre_ + queries[i] * w_;
    dots<T>(count, m, t.rows, t.cols, t.n, w_, along_m_, tile_, nullptr);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t query = queries[i];
      T *const e = tiles_.logits(query - q), *const along_m = along_m_ + i * tile_;
      const T least = T(__builtin_exp(-gap_ - tiles_.error(t, tiles_.query(query)))),
              far = T((near - 1) * square_[query]);
      int64_t n = 0;
      for (int64_t j = 0; j < t.n; ++j) {
        if (t.norm[j] - 2 * along_m[j] >= far) continue;
        if (e[j] >= least) take(t, j, n++);
        e[j] = 0;
      }
      if (n) Base::add_by_differences(query, n);
      weigh_heavy(t, query, e);
    }
  }

  // Adds by differences the atoms whose logits are at least so much; all if there are none.
  void pick(const Tile<T>& t, int64_t i, const T* l, double least) {
    int64_t n = 0;
    for (int64_t j = 0; j < t.n; ++j) {
      if (l ? !(l[j] >= least) : !(t.log_prior[j] > -T(__builtin_inf()))) continue;
      take(t, j, n++);
    }
    if (n) Base::add_by_differences(i, n);
  }
  void take(const Tile<T>& t, int64_t j, int64_t n) {
    picked_row_[n] = t.raw.at + j * t.raw.ld;
    picked_log_prior_[n] = t.log_prior[j];
    picked_atom_[n] = row_of(p_, t.start + j);
  }

  void add(const Tile<T>& t, int64_t count, const int64_t* queries, const T* const* weight) {
    if (!prepared_) prepare(t);
    prepared_ = true;
    const PairForms<T>& forms = sink_.forms();
    const auto matrix = [&](bool needed, T* rows, T* cols) {
      return Matrix<T>{{needed ? rows : nullptr, w_ + W<T>}, needed && packed_ ? cols : nullptr};
    };
    sink_.add(PairTile<T>{.count = count,
                          .queries = queries,
                          .weight = weight,
                          .about_centre = true,
                          .n = t.n,
                          .padded = t.padded,
                          .width = w_,
                          .t = {t.rows, t.cols},
                          .squares = matrix(forms.needs_squares(), squares_, square_cols_),
                          .tangents = matrix(forms.needs_tangents(), tangents_, tangent_cols_),
                          .products = matrix(forms.needs_products(), products_, nullptr),
                          .norm = t.norm,
                          .along = along_,
                          .log_pi_tangent = a_.dlog_pi ? log_pi_tangent_ : nullptr,
                          .atoms = atoms_});
  }

  // All that the queries' tiles share beside t.
  void prepare(const Tile<T>& t) {
    const PairForms<T>& forms = sink_.forms();
    const int64_t ld = w_ + W<T>;
    for (int64_t j = 0; j < t.n; ++j) {
      const T* const row = t.rows.at + j * t.rows.ld;
      atoms_[j] = row_of(p_, t.start + j);
      if (a_.dlog_pi) log_pi_tangent_[j] = a_.dlog_pi[atoms_[j]];
      if (forms.needs_squares())
        for (int64_t k = 0; k < w_; k += W<T>)
          store<T>(squares_ + j * ld + k, ::load(row + k) * ::load(row + k));
      if (!forms.needs_tangents()) continue;
      T* const dy = tangents_ + j * ld;
      read_tangent(p_, a_, atoms_[j], w_, dy);
      Vec<T> along{};
      for (int64_t k = 0; k < w_; k += W<T>) {
        const Vec<T> product = ::load(row + k) * ::load(dy + k);
        along += product;
        if (forms.needs_products()) store<T>(products_ + j * ld + k, product);
      }
      along_[j] = T(total<T>(along));
    }
    for (int64_t j = t.n; j < t.padded; ++j) along_[j] = log_pi_tangent_[j] = 0;
    if (!packed_) return;
    if (forms.needs_squares())
      for (int64_t k = 0; k < w_ * t.padded; k += W<T>)
        store<T>(square_cols_ + k, ::load(t.cols + k) * ::load(t.cols + k));
    if (forms.needs_tangents()) pack<T>({tangents_, ld}, t.n, w_, nullptr, tangent_cols_);
  }

  ExpandedTiles<T> tiles_;
  const bool packed_;
  Arena tile_scratch_;
  bool prepared_ = false;
  T *squares_, *square_cols_, *tangents_, *tangent_cols_, *products_;
  T *along_, *log_pi_tangent_;
  int64_t* atoms_;
  double *centre_constant_, *distance_;
  T *from_centre_, *along_m_;  // m = reference - centre [B, w]; [tile_queries, tile]: <y, m>
  double* square_;             // [B]: |m|^2
};

}  // namespace
