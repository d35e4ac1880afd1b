// Tiles of a Gaussian mixture's components where each has a diagonal covariance of its own, for a
// noise level that some queries share: rows twice as long as the means, so that what a query needs
// of a component are dot products with such a row, and what it adds up are weighted sums of these.
//
// With g = x - alpha centre, t = y - centre, p = 1/tau^2 of a coordinate, p_0 that of the usual
// variance v_0, a = alpha sqrt(p_0), and the row [u | z], u = (v_0 - v) p, z = p t / sqrt(p_0):
//   p - p_0   = a^2 u
//   logit     = -p_0/2 |g|^2 + bias + <[-a^2/2 g g | a g], [u | z]>
//   s + p_0 g = a z - a^2 g u
//   |s + p_0 g|^2 = a^2 (|z|^2 + <[a^2 g g | -2 a g], [u u | u z]>)
// where bias = log pi - log tau - alpha^2/2 sum p t^2, log tau less that of the usual variance.
#pragma once
#include "simd/log.h"
#include "simd/mixture_rows.h"

namespace {

template <class T>
class MixtureDiagonalTiles {
 public:
  MixtureDiagonalTiles(const Problem<T>& p, const Variances<T>& variances, int64_t w, int64_t B)
      : p_(p),
        variances_(variances),
        w_(w),
        tile(tile_rows(w, B)),
        packed_(B >= packed_queries),
        products_(p.kind != MomentKind::matvec),
        scratch_(room()) {
    if (!ok()) return;
    rows = scratch_.template take<T>(tile * w);
    variance = scratch_.template take<T>(tile * w);
    precision = scratch_.template take<T>(tile * w);
    stacked_ = scratch_.template take<T>(tile * 2 * w);
    panels_ = scratch_.template take<T>(packed_ ? tile * 2 * w : 0);
    cols_ = scratch_.template take<T>(packed_ ? tile * 2 * w : 0);
    square_ = scratch_.template take<T>(products_ ? tile * 2 * w : 0);
    square_cols_ = scratch_.template take<T>(squares_packed() ? tile * 2 * w : 0);
    for (T** table : tables) *table = scratch_.template take<T>(tile);
    for (T** table : of_coordinates) *table = scratch_.template take<T>(w);
    centre_ = scratch_.template take<T>(w);
    memset(centre_, 0, size_t(w) * sizeof(T));
    read_reference(p, -1, centre_);
  }
  bool ok() const { return scratch_.ok(); }

  // Components [start, start + count).
  int load(int64_t start, int64_t count) {
    level_ = {__builtin_nan(""), 0};
    n = count;
    padded = round_up(n, W<T>);
    read_log_prior(p_, start, n, padded, log_prior);
    for (int64_t j = 0; j < n; ++j) {
      const int64_t row = row_of(p_, start + j);
      T *const y = rows + j * w_, *const v = variance + j * w_;
      memset(y, 0, size_t(w_) * sizeof(T));
      read_row(p_, row, y);
      if (!finite_row(y, p_.d)) return non_finite_atom;
      for (int64_t k = 0; k < w_; ++k)
        v[k] = k < p_.d ? variances_.at[row * p_.d + k] : T(variances_.usual);
      if (!usable(v, p_.d)) return unusable_variance;
    }
    return dfk::ok;
  }

  void set_level(Level level) {
    if (level == level_) return;
    level_ = level;
    for (T** table : of_coordinates) memset(*table, 0, size_t(w_) * sizeof(T));
    largest_norm = largest_square_norm = largest_prior = 0;
    least_precision = __builtin_inf();
    for (int64_t j = 0; j < n; ++j) make_row(j);
    for (int64_t j = n; j < padded; ++j) bias[j] = prior[j] = log_prior[j], square_norm[j] = 0;
    if (!packed_) return;
    pack(Rows<T>{stacked_, 2 * w_}, n, 2 * w_, panels_, cols_);
    if (squares_packed())
      pack(Rows<T>{square_, 2 * w_}, n, 2 * w_, static_cast<T*>(nullptr), square_cols_);
  }
  // [u | z], with the packed transpose or null; and [u u | u z].
  Rows<T> stacked() const { return {stacked_, 2 * w_, packed_ ? panels_ : nullptr}; }
  const T* cols() const { return packed_ ? cols_ : nullptr; }
  Rows<T> squares() const { return {square_, 2 * w_}; }
  const T* square_cols() const { return squares_packed() ? square_cols_ : nullptr; }
  Rows<T> products() const { return {square_ + w_, 2 * w_}; }  // [u z]

 private:
  const Problem<T>& p_;
  const Variances<T>& variances_;
  const int64_t w_;

 public:
  const int64_t tile;  // the most components
  int64_t n = 0, padded = 0;
  T *rows, *variance;                                       // as they are
  T* precision;                                             // 1/tau^2 of the level
  T *log_prior, *prior, *bias, *square_norm;                // prior = log pi - log tau; |z|^2
  T *largest_precision, *largest_delta;                     // of each coordinate: p, and |p - p_0|
  double largest_norm, largest_square_norm, largest_prior;  // of sum p t^2, of |z|^2, of |prior|
  double least_precision;                                   // the least sum of p over coordinates

 private:
  T** const tables[4] = {&log_prior, &prior, &bias, &square_norm};
  T** const of_coordinates[2] = {&largest_precision, &largest_delta};

  bool squares_packed() const { return packed_ && p_.kind == MomentKind::posterior; }
  static int64_t tile_rows(int64_t w, int64_t B) {
    const int64_t size = (B >= packed_queries ? packed_tile_bytes : tile_bytes),
                  some = size / (2 * w * int64_t(sizeof(T))), step = block.vectors * W<T>;
    return some < step ? step : some > 512 ? 512 / step * step : some / step * step;
  }
  size_t room() const {
    const auto t = [](int64_t n) { return Arena::bytes<T>(n); };
    const int64_t pair = tile * 2 * w_;
    return 3 * t(tile * w_) + t(pair) + 2 * t(packed_ ? pair : 0) + t(products_ ? pair : 0) +
           t(squares_packed() ? pair : 0) + 4 * t(tile) + 3 * t(w_);
  }

  void make_row(int64_t j) {
    const double alpha = level_.alpha, sigma = level_.sigma,
                 usual = sigma * sigma + alpha * alpha * variances_.usual;
    const T noise = T(sigma * sigma), ratio = T(alpha * alpha), unit = T(1 / usual),
            root = T(__builtin_sqrt(usual)), v_0 = T(variances_.usual),
            tau_0 = noise + ratio * v_0;  // equal variances are exactly this
    const T *const y = rows + j * w_, *const v = variance + j * w_;
    T *const p = precision + j * w_, *const u = stacked_ + j * 2 * w_, *const z = u + w_,
             *const square = square_ + j * 2 * w_;
    Vec<T> norm{}, square_sum{}, precision_sum{}, logs{}, rounded{};
    for (int64_t k = 0; k < w_; k += W<T>) {
      const Vec<T> tau2 = noise + ratio * ::load(v + k);
      const Vec<T> t = ::load(y + k) - ::load(centre_ + k), of_p = T(1) / tau2;
      store<T>(p + k, of_p);
      const Vec<T> of_u = (v_0 - ::load(v + k)) * of_p, of_z = of_p * t * root,
                   delta = ratio * unit * of_u;
      store<T>(u + k, of_u);
      store<T>(z + k, of_z);
      if (products_) {
        store<T>(square + k, of_u * of_u);
        store<T>(square + w_ + k, of_u * of_z);
      }
      norm += of_p * t * t;
      square_sum += of_z * of_z;
      precision_sum += of_p;
      store<T>(largest_precision + k, larger<T>(of_p, ::load(largest_precision + k)));
      store<T>(largest_delta + k, larger<T>(larger<T>(delta, -delta), ::load(largest_delta + k)));
      // widths of all sizes have logarithms that cancel
      const Vec<T> term = vlog(tau2 / tau_0), next = logs + term, added = next - logs;
      rounded += (logs - (next - added)) + (term - added);
      logs = next;
    }
    const double log_tau = 0.5 * (total<T>(logs) + total<T>(rounded)), of_norm = total<T>(norm),
                 of_square = total<T>(square_sum);
    prior[j] = T(double(log_prior[j]) - log_tau);
    bias[j] = T(double(log_prior[j]) - log_tau - 0.5 * alpha * alpha * of_norm);
    square_norm[j] = T(of_square);
    const double size = __builtin_fabs(double(prior[j])),
                 least = total<T>(precision_sum) - double(w_ - p_.d) / usual;
    if (!(of_norm <= largest_norm)) largest_norm = of_norm;
    if (!(of_square <= largest_square_norm)) largest_square_norm = of_square;
    if (!(size <= largest_prior)) largest_prior = size;
    if (!(least >= least_precision)) least_precision = least;
  }

  const bool packed_, products_;
  Arena scratch_;
  Level level_ = {};
  T *centre_, *stacked_, *panels_, *cols_, *square_, *square_cols_;
};

}  // namespace
