// Sweeps over atoms with given shift and reference: they make tiles with weights (pair_tile.h) and
// hand them to a sink,
//   ok()        whether it has its memory
//   forms()     the PairForms, which say what a tile must have
//   begin(start, n)  the next tiles are of atoms [start, start + n), or of some of them
//   add(tile)   takes a tile
//   flush()     is called every few tiles
// such as PairSums. Nothing has to be found out on the way: no maximum, no reference.
#pragma once
#include "simd/list_tiles.h"
#include "simd/pair_sums.h"

namespace {

// The evaluation of a few atoms by differences for one query, with t from its reference.
template <class T, class Sink>
class PairDifferences {
 protected:
  // tile: the most atoms that are evaluated at once.
  PairDifferences(const Problem<T>& p, const PairArguments<T>& a, Sink& sink, int64_t w, int64_t b0,
                  int64_t B, int64_t tile)
      : p_(p),
        a_(a),
        sink_(sink),
        w_(w),
        b0_(b0),
        B_(B),
        tile_(tile),
        gap_(weight_gap(p)),
        scratch_(room()) {
    if (!scratch_.ok()) return;
    const PairForms<T>& forms = sink.forms();
    raw_x_ = scratch_.template take<T>(B * w);
    reference_ = scratch_.template take<T>(B * w);
    shift_ = scratch_.template take<double>(B);
    shifted_ = scratch_.template take<T>(tile * w);
    squares_ = scratch_.template take<T>(forms.needs_squares() ? tile * w : 0);
    tangents_ = scratch_.template take<T>(forms.needs_tangents() ? tile * w : 0);
    products_ = scratch_.template take<T>(forms.needs_products() ? tile * w : 0);
    weight_ = scratch_.template take<T>(tile);
    norm_ = scratch_.template take<T>(tile);
    along_ = scratch_.template take<T>(tile);
    log_pi_tangent_ = scratch_.template take<T>(tile);
    shifted_x_ = scratch_.template take<T>(B * w);
    constant_ = scratch_.template take<double>(B);
    picked_log_prior_ = scratch_.template take<T>(tile);
    picked_atom_ = scratch_.template take<int64_t>(tile);
    picked_row_ = scratch_.template take<const T*>(tile);
    for (int64_t i = 0; i < B; ++i) {
      const int64_t b = batch_index(i);
      shift_[i] = a.shift[b];
      for (int64_t k = 0; k < w; ++k) {
        raw_x_[i * w + k] = k < p.d ? p.x[b * p.d + k] : T(0);
        reference_[i * w + k] = k < p.d ? a.reference[b * p.d + k] : T(0);
      }
      double square = 0;
      for (int64_t k = 0; k < w; ++k) {
        const double x = double(raw_x_[i * w + k]) - double(p.alpha[b]) * reference_[i * w + k];
        shifted_x_[i * w + k] = T(x);
        square += x * x;
      }
      constant_[i] = shift_[i] + 0.5 * square / (double(p.sigma[b]) * p.sigma[b]);
    }
  }

  bool ok() const { return scratch_.ok() && sink_.ok(); }
  int64_t batch_index(int64_t i) const { return query_at(p_, b0_ + i); }

  // Adds the n <= tile_ atoms at picked_row_, with picked_log_prior_ and picked_atom_, to query i;
  // these are overwritten. False where an atom is not finite.
  bool add_by_differences(int64_t i, int64_t n) {
    int64_t count = 0;
    for (int64_t j = 0; j < n; ++j) {
      const T* const row = picked_row_[j];
      const double logit = double(picked_log_prior_[j]) + shift_row(i, row, count) - constant_[i];
      if (!(norm_[count] <= T(largest_square<T>))) {
        if (!finite_row(row, p_.d)) return false;
        continue;  // an outlier
      }
      if (!(logit >= -gap_)) continue;
      weight_[count] = T(logit);
      picked_atom_[count] = picked_atom_[j];
      finish_row(count++);
    }
    if (!count) return true;
    const int64_t padded = round_up(count, W<T>);
    for (int64_t j = count; j < padded; ++j) {
      weight_[j] = -T(__builtin_inf());
      norm_[j] = along_[j] = log_pi_tangent_[j] = 0;
    }
    for (int64_t j = 0; j < padded; j += W<T>) store<T>(weight_ + j, vexp(::load(weight_ + j)));
    const T* weight = weight_;
    const PairForms<T>& forms = sink_.forms();
    const auto matrix = [&](bool needed, T* rows) {
      return Matrix<T>{{needed ? rows : nullptr, w_}, nullptr};
    };
    sink_.add(PairTile<T>{.count = 1,
                          .queries = &i,
                          .weight = &weight,
                          .about_centre = false,
                          .n = count,
                          .padded = padded,
                          .width = w_,
                          .t = matrix(true, shifted_),
                          .squares = matrix(forms.needs_squares(), squares_),
                          .tangents = matrix(forms.needs_tangents(), tangents_),
                          .products = matrix(forms.needs_products(), products_),
                          .norm = norm_,
                          .along = along_,
                          .log_pi_tangent = a_.dlog_pi ? log_pi_tangent_ : nullptr,
                          .atoms = picked_atom_});
    return true;
  }

  // The atom at `row` as row j of the tile for query i, and its |t|^2. Returns what its logit has
  // beside log pi and the constant, whose rounding error is small where t is: with x_r from the
  // reference, (alpha / sigma^2) <t, x_r - alpha t / 2>.
  double shift_row(int64_t i, const T* row, int64_t j) {
    const T *const reference = reference_ + i * w_, *const x = shifted_x_ + i * w_;
    const int64_t b = batch_index(i);
    const double alpha = p_.alpha[b], sigma = p_.sigma[b];
    const T half_alpha = T(0.5 * alpha);
    T* const t = shifted_ + j * w_;
    Vec<T> norm{};
    Vec<double> sum{};
    for (int64_t k = 0; k < w_;) {
      const int64_t end = k + 16 * W<T> < w_ ? k + 16 * W<T> : w_;
      Vec<T> part{};
      for (; k < end; k += W<T>) {
        const Vec<T> v = ::load(row + k) - ::load(reference + k);
        store<T>(t + k, v);
        norm += v * v;
        part += v * (::load(x + k) - half_alpha * v);
      }
      sum += widened<T>(part);
    }
    norm_[j] = T(total<T>(norm));
    return alpha / (sigma * sigma) * sum_lanes<double>(sum);
  }
  const Problem<T>& p_;
  const PairArguments<T>& a_;
  Sink& sink_;
  const int64_t w_, b0_, B_, tile_;
  const double gap_;

 private:
  size_t room() const {
    const auto t = [](int64_t n) { return Arena::bytes<T>(n); };
    return 3 * t(B_ * w_) + 2 * Arena::bytes<double>(B_) + 4 * t(tile_ * w_) + 5 * t(tile_) +
           3 * Arena::bytes<double>(tile_);
  }

  // The rest of what a tile has of its atom j.
  void finish_row(int64_t j) {
    const PairForms<T>& forms = sink_.forms();
    const T* const t = shifted_ + j * w_;
    for (int64_t k = 0; forms.needs_squares() && k < w_; k += W<T>)
      store<T>(squares_ + j * w_ + k, ::load(t + k) * ::load(t + k));
    if (a_.dlog_pi) log_pi_tangent_[j] = a_.dlog_pi[picked_atom_[j]];
    if (!a_.dy) return;
    T* const dy = tangents_ + j * w_;
    read_tangent(p_, a_, picked_atom_[j], w_, dy);
    Vec<T> along{};
    for (int64_t k = 0; k < w_; k += W<T>) {
      const Vec<T> product = ::load(t + k) * ::load(dy + k);
      along += product;
      if (forms.needs_products()) store<T>(products_ + j * w_ + k, product);
    }
    along_[j] = T(total<T>(along));
  }

  T *shifted_, *squares_, *tangents_, *products_, *weight_, *norm_, *along_, *log_pi_tangent_;
  T* shifted_x_;  // [B, w]: x less alpha times the reference

 protected:
  Arena scratch_;
  double *shift_, *constant_;  // [B]; the shift + |x_r|^2 / (2 sigma^2)
  T *raw_x_, *reference_, *picked_log_prior_;
  int64_t* picked_atom_;
  const T** picked_row_;
};

// The sweep that evaluates every atom of a list by differences.
template <class T, class Sink>
class PairListSweep : private PairDifferences<T, Sink> {
  using Base = PairDifferences<T, Sink>;
  using Base::sink_, Base::B_, Base::tile_, Base::picked_log_prior_, Base::picked_atom_,
      Base::picked_row_;

 public:
  PairListSweep(const Problem<T>& p, const PairArguments<T>& a, Sink& sink, int64_t w, int64_t b0,
                int64_t B)
      : Base(p, a, sink, w, b0, B, ListTiles<T>::rows_of(w)), tiles_(p, w, tile_) {}

  int run(int64_t n0, int64_t n1) {
    if (!tiles_.ok() || !Base::ok()) return out_of_memory;
    int64_t visited = 0;
    for (int64_t i = n0; i < n1; i += tile_) {
      const int64_t n = n1 - i < tile_ ? n1 - i : tile_;
      sink_.begin(i, n);
      tiles_.load(i, n);
      for (int64_t q = 0; q < B_; ++q) {
        const int64_t count = tiles_.pick(q, picked_row_, picked_atom_, picked_log_prior_);
        if (count && !Base::add_by_differences(q, count)) return non_finite_atom;
      }
      if (++visited % 16 == 0) sink_.flush();
    }
    sink_.flush();
    return ok;
  }

 private:
  ListTiles<T> tiles_;
};

}  // namespace
