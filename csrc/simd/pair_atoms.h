// The gradients of the atoms, as a sink of pair_sweep.h. With t less the origin o that a tile is
// taken about, and x_o = x - alpha o,
//   grad y_i = sum_b c (alpha / sigma^2) (x_o - alpha t_i) + e df/dt,   grad log_pi_i = sum_b c,
// where df/dt is the linear form of f at o, which pair_forms.h has, and multiples of t and of the
// kind's vectors. About the centre that is a product of the transposed matrices of c and e [B, n]
// with vectors of the queries, and a multiple of t which all queries share.
#pragma once
#include "simd/pair_sweep.h"
#include "simd/sweep_small_d.h"

namespace {

// How many atoms and vectors of coordinates fill the registers.
inline constexpr int outer_atoms = DFK_VECTOR_BYTES == 64 ? 8 : 4, outer_vectors = 3;

// to_i += sum_j coef_j[i] row_j for the ATOMS atoms i from `first` on; 64 rows are added at a time.
template <class T, int ATOMS, int V>
DFK_INLINE void outer_block(const T* const* coef, const T* const* rows, int64_t count,
                            int64_t first, int64_t k, T* to, int64_t ld) {
  for (int64_t j = 0; j < count;) {
    const int64_t end = j + 64 < count ? j + 64 : count;
    Vec<T> acc[ATOMS][V] = {};
    for (; j < end; ++j) {
      const T *row = rows[j] + k, *c = coef[j] + first;
      Vec<T> x[V];
      for (int v = 0; v < V; ++v) x[v] = load(row + v * W<T>);
      for (int i = 0; i < ATOMS; ++i) {
        const Vec<T> by = all(c[i]);
        for (int v = 0; v < V; ++v) acc[i][v] += by * x[v];
      }
    }
    for (int i = 0; i < ATOMS; ++i)
      for (int v = 0; v < V; ++v) {
        T* at = to + (first + i) * ld + k + v * W<T>;
        store(at, load(at) + acc[i][v]);
      }
  }
}
template <class T, int V>
DFK_INLINE void outer_columns(const T* const* coef, const T* const* rows, int64_t count, int64_t n,
                              int64_t k, T* to, int64_t ld) {
  for (int64_t i = 0; i < n; i += outer_atoms)
    outer_block<T, outer_atoms, V>(coef, rows, count, i, k, to, ld);
}
// to_i += sum_j coef_j[i] row_j for i < n, and up to a multiple of outer_atoms; rows of `width`.
template <class T>
void outer_sums(const T* const* coef, const T* const* rows, int64_t count, int64_t n, int64_t width,
                T* to, int64_t ld) {
  constexpr int V = outer_vectors;
  int64_t k = 0;
  const auto left = [&] { return (width - k) / W<T>; };
  // Four vectors are taken as two and two rather than as three and one.
  for (; left() >= V && left() != V + 1; k += V * W<T>)
    outer_columns<T, V>(coef, rows, count, n, k, to, ld);
  for (; left() >= 2; k += 2 * W<T>) outer_columns<T, 2>(coef, rows, count, n, k, to, ld);
  if (left() > 0) outer_columns<T, 1>(coef, rows, count, n, k, to, ld);
}

template <class T>
class PairAtoms {
 public:
  PairAtoms(const Problem<T>& p, const PairArguments<T>& a, const AtomGradients<T>& out, int64_t w,
            int64_t b0, int64_t B, int64_t tile)
      : p_(p),
        out_(out),
        w_(w),
        b0_(b0),
        tile_(tile),
        ld_(round_up(tile, outer_atoms)),
        forms_(p, a, w, b0, B, tile, out.y != nullptr),
        with_squares_(forms_.needs_squares()),
        columns_(p.d <= small_d && !p.listed_by),
        long_(out.y && B > chain),
        per_query_(2 + 2 * forms_.vectors()),
        most_(out.y ? (per_query_ > 16 ? per_query_ : 16) * tile_queries : 0),
        scratch_(room()) {
    if (!scratch_.ok()) return;
    const int64_t size = out.y ? ld_ * w : 0;
    work_ = scratch_.template take<T>(size);
    square_work_ = scratch_.template take<T>(with_squares_ ? size : 0);
    total_ = scratch_.template take<double>(long_ ? size : 0);
    log_pi_ = scratch_.template take<double>(ld_);
    by_t_ = scratch_.template take<double>(ld_);
    log_pi_part_ = scratch_.template take<T>(ld_);
    by_t_part_ = scratch_.template take<T>(ld_);
    coefficients_ = scratch_.template take<T>(most_ * ld_);
    coefficient_ = scratch_.template take<const T*>(most_);
    row_ = scratch_.template take<const T*>(most_);
    square_coefficient_ = scratch_.template take<const T*>(most_);
    square_row_ = scratch_.template take<const T*>(most_);
    memset(coefficients_, 0, size_t(most_ * ld_) * sizeof(T));
  }

  bool ok() const { return scratch_.ok() && forms_.ok(); }
  const PairForms<T>& forms() const { return forms_; }

  // The next tiles are of the n atoms from `start` on, or of some of them.
  void begin(int64_t start, int64_t n) {
    flush();
    start_ = start, n_ = n, added_ = 0, t_ = {}, touched_ = false;
  }

  void add(const PairTile<T>& t) {
    if (!touched_) clear();
    if (t.about_centre)
      add_products(t);
    else if (columns_)
      add_columns(t);
    else
      add_rows(t);
    added_ += t.count;
    if (long_ && added_ >= chain) settle();
  }

  // Writes the gradients of the last tiles' atoms, or adds to them.
  void flush() {
    if (touched_ && out_.y) settle();
    for (int64_t j = 0; j < n_; ++j) {
      const int64_t row = row_of(p_, start_ + j);
      const T log_pi = touched_ ? T(log_pi_[j]) : T(0);
      out_.log_pi[row] = out_.add ? out_.log_pi[row] + log_pi : log_pi;
      T* const y = out_.y + row * p_.d;
      if (out_.y && touched_)
        write(j, y);
      else if (out_.y && !out_.add)
        memset(y, 0, size_t(p_.d) * sizeof(T));
    }
    n_ = 0;
  }

 private:
  // So many queries are added up in T before they are in double: chains of additions stay short.
  static constexpr int64_t chain = 512;

  size_t room() const {
    const auto t = [](int64_t n) { return Arena::bytes<T>(n); };
    const auto d = [](int64_t n) { return Arena::bytes<double>(n); };
    return 2 * t(ld_ * w_) + d(long_ ? ld_ * w_ : 0) + 2 * d(ld_) + 2 * t(ld_) + t(most_ * ld_) +
           4 * d(most_);
  }
  int64_t batch_index(int64_t q) const { return query_at(p_, b0_ + q); }
  T pull(int64_t q) const {
    const int64_t b = batch_index(q);
    return T(p_.alpha[b] / (double(p_.sigma[b]) * p_.sigma[b]));
  }

  void clear() {
    touched_ = true;
    memset(log_pi_, 0, size_t(n_) * sizeof(double));
    memset(by_t_, 0, size_t(n_) * sizeof(double));
    if (!out_.y) return;
    memset(work_, 0, size_t(ld_ * w_) * sizeof(T));
    if (with_squares_) memset(square_work_, 0, size_t(ld_ * w_) * sizeof(T));
    if (long_) memset(total_, 0, size_t(ld_ * w_) * sizeof(double));
  }

  void write(int64_t j, T* to) {
    const int64_t d = p_.d;
    T* const sum = columns_ ? column_sums(j) : row_sums(j);
    for (int64_t k = 0; out_.add && k < d; ++k) sum[k] += to[k];
    memcpy(to, sum, size_t(d) * sizeof(T));
  }
  T* row_sums(int64_t j) {
    T* const sum = work_ + j * w_;
    for (int64_t k = 0; long_ && k < w_; ++k) sum[k] = T(total_[j * w_ + k]);
    if (!t_.at) return sum;
    const T* const t = t_.at + j * t_.ld;
    const T by_t = T(by_t_[j]);
    for (int64_t k = 0; k < w_; k += W<T>) store<T>(sum + k, load(sum + k) + by_t * load(t + k));
    return sum;
  }
  T* column_sums(int64_t j) {
    for (int64_t k = 0; k < p_.d; ++k)
      column_[k] = long_ ? T(total_[k * ld_ + j]) : work_[k * ld_ + j];
    return column_;
  }

  // Makes room for the coefficients of one more product with a vector of a query.
  T* product(const T* row) {
    T* const to = coefficients_ + products_ * ld_;
    coefficient_[products_] = to, row_[products_++] = row;
    return to;
  }
  // to = e by, and 0 where e is.
  static void weigh(const PairTile<T>& t, const T* e, const T* by, T* to) {
    for (int64_t j = 0; j < t.padded; j += W<T>)
      store<T>(to + j, load(e + j) > T(0) ? load(e + j) * load(by + j) : Vec<T>{});
  }

  // A tile less the centre: the products of its queries wait for those of more.
  void add_products(const PairTile<T>& t) {
    if (products_ + t.count * per_query_ > most_) multiply();
    t_ = t.t.rows;
    const T* const c = forms_.cotangent_weights(t, [&](int64_t k, const T* ha, const T* va) {
      for (int64_t i = 0; out_.y && i < t.count; ++i) {
        weigh(t, t.weight[i], va + i * tile_, product(forms_.partner(t.queries[i], k)));
        weigh(t, t.weight[i], ha + i * tile_, product(forms_.v(t.queries[i], k)));
      }
    });
    memset(log_pi_part_, 0, size_t(t.padded) * sizeof(T));
    memset(by_t_part_, 0, size_t(t.padded) * sizeof(T));
    for (int64_t i = 0; i < t.count; ++i) add_query(t, i, c + i * tile_);
    add_scaled(log_pi_, t.n, 1, log_pi_part_);
    if (out_.y) add_scaled(by_t_, t.n, 1, by_t_part_);
  }
  void add_query(const PairTile<T>& t, int64_t i, const T* c) {
    const int64_t q = t.queries[i];
    T *const log_pi = log_pi_part_, *const by_t = by_t_part_;
    for (int64_t j = 0; j < t.padded; j += W<T>)
      store<T>(log_pi + j, load(log_pi + j) + load(c + j));
    if (!out_.y) return;
    const T pull = this->pull(q), back = -pull * p_.alpha[batch_index(q)],
            twice = 2 * forms_.quadratic(q);
    const T* const e = t.weight[i];
    T* const pulls = product(forms_.shifted_x(q, true));
    for (int64_t j = 0; j < t.padded; j += W<T>) {
      store<T>(pulls + j, pull * load(c + j));
      store<T>(by_t + j, load(by_t + j) + back * load(c + j) + twice * load(e + j));
    }
    const T* const linear = forms_.linear(q, true);
    if (!linear) return;
    T* const slopes = product(linear);
    memcpy(slopes, e, size_t(t.padded) * sizeof(T));
    if (!with_squares_) return;
    square_coefficient_[squares_] = slopes, square_row_[squares_++] = forms_.partner(q, 0);
  }

  void multiply() {
    outer_sums(coefficient_, row_, products_, n_, w_, work_, w_);
    if (squares_) outer_sums(square_coefficient_, square_row_, squares_, n_, w_, square_work_, w_);
    products_ = squares_ = 0;
  }
  // Does all products that wait, and keeps chains short.
  void settle() {
    multiply();
    added_ = 0;
    for (int64_t j = 0; t_.at && with_squares_ && j < n_; ++j)
      for (int64_t k = 0; k < w_; ++k)
        work_[j * w_ + k] += 2 * t_.at[j * t_.ld + k] * square_work_[j * w_ + k];
    if (with_squares_) memset(square_work_, 0, size_t(ld_ * w_) * sizeof(T));
    if (!long_) return;
    add_scaled(total_, ld_ * w_, 1, work_);
    memset(work_, 0, size_t(ld_ * w_) * sizeof(T));
  }

  // All atoms less the reference of one query, in columns, and so are the sums.
  void add_columns(const PairTile<T>& t) {
    const int64_t q = t.queries[0], d = p_.d;
    const T *const e = t.weight[0], *const at = t.t.cols;
    const auto each = [&](int64_t vector, const T* ha, const T* va) {
      const T *const v = forms_.v(q, vector), *const h = forms_.partner(q, vector);
      for (int64_t j = 0; out_.y && j < t.padded; j += W<T>) {
        const Vec<T> weight = load(e + j), none{};
        const Vec<T> by_h = weight > T(0) ? weight * load(va + j) : none,
                     by_v = weight > T(0) ? weight * load(ha + j) : none;
        for (int64_t k = 0; k < d; ++k) add_at(k * ld_ + j, by_h * h[k] + by_v * v[k]);
      }
    };
    const T* const c = forms_.cotangent_weights(t, each);
    for (int64_t j = 0; j < t.n; ++j) log_pi_[j] += c[j];
    if (!out_.y) return;
    const T pull = this->pull(q), alpha = p_.alpha[batch_index(q)], twice = 2 * forms_.quadratic(q);
    const T *const x = forms_.shifted_x(q, false), *const linear = forms_.linear(q, false),
                   *const square = with_squares_ ? forms_.partner(q, 0) : nullptr;
    for (int64_t j = 0; j < t.padded; j += W<T>) {
      const Vec<T> slope = load(e + j), pulled = pull * load(c + j),
                   back = twice * slope - alpha * pulled;
      for (int64_t k = 0; k < d; ++k) {
        Vec<T> sum = pulled * x[k];
        if (linear) sum += slope * linear[k];
        const Vec<T> by_t = square ? back + 2 * square[k] * slope : back;
        add_at(k * ld_ + j, sum + by_t * load(at + k * t.padded + j));
      }
    }
  }
  void add_at(int64_t at, Vec<T> more) { store<T>(work_ + at, load(work_ + at) + more); }

  // A tile of some atoms less the reference of one query.
  void add_rows(const PairTile<T>& t) {
    const int64_t q = t.queries[0];
    const T* const e = t.weight[0];
    const auto each = [&](int64_t k, const T* ha, const T* va) {
      const T *const v = forms_.v(q, k), *const h = forms_.partner(q, k);
      for (int64_t j = 0; out_.y && j < t.n; ++j)
        add_row(t, j, [=](int64_t k, Vec<T>) {
          return e[j] * (va[j] * load(h + k) + ha[j] * load(v + k));
        });
    };
    const T* const c = forms_.cotangent_weights(t, each);
    for (int64_t j = 0; j < t.n; ++j) log_pi_[place(t, j)] += c[j];
    if (!out_.y) return;
    const T pull = this->pull(q), alpha = p_.alpha[batch_index(q)], quadratic = forms_.quadratic(q);
    const T *const x = forms_.shifted_x(q, false), *const linear = forms_.linear(q, false),
                   *const square = with_squares_ ? forms_.partner(q, 0) : nullptr;
    for (int64_t j = 0; j < t.n; ++j) {
      const T slope = e[j], pulled = pull * c[j], back = 2 * quadratic * slope - alpha * pulled;
      if (square)
        add_row(t, j, [=](int64_t k, Vec<T> at) {
          return pulled * load(x + k) + slope * load(linear + k) +
                 (back + 2 * slope * load(square + k)) * at;
        });
      else if (linear)
        add_row(t, j, [=](int64_t k, Vec<T> at) {
          return pulled * load(x + k) + slope * load(linear + k) + back * at;
        });
      else
        add_row(t, j, [=](int64_t k, Vec<T> at) { return pulled * load(x + k) + back * at; });
    }
  }
  // Adds term(k, t at k) to the sums of atom j of the tile.
  template <class F>
  void add_row(const PairTile<T>& t, int64_t j, const F& term) {
    const T* const row = t.t.rows.at + j * t.t.rows.ld;
    T* const to = work_ + place(t, j) * w_;
    for (int64_t k = 0; k < w_; k += W<T>) store<T>(to + k, load(to + k) + term(k, load(row + k)));
  }
  // Where atom j of the tile is among those that begin() had.
  int64_t place(const PairTile<T>& t, int64_t j) const {
    const int64_t atom = t.atoms[j];
    if (!p_.atom_rows) return atom - start_;
    int64_t first = start_, last = start_ + n_ - 1;
    while (first < last) {
      const int64_t middle = (first + last) / 2;
      if (p_.atom_rows[middle] < atom)
        first = middle + 1;
      else
        last = middle;
    }
    return first - start_;
  }

  const Problem<T>& p_;
  const AtomGradients<T>& out_;
  const int64_t w_, b0_, tile_, ld_;
  PairForms<T> forms_;
  const bool with_squares_, columns_, long_;
  const int64_t per_query_, most_;
  Arena scratch_;
  bool touched_ = false;
  int64_t start_ = 0, n_ = 0, added_ = 0, products_ = 0, squares_ = 0;
  Rows<T> t_{};             // the atoms less the centre, where there are products
  T *work_, *square_work_;  // [ld_, w_]: gradients of y; sum e h_second, to be multiplied by 2 t
  double* total_;           // [ld_, w_]: what was in work_ before
  double *log_pi_, *by_t_;  // [ld_]: gradients of log_pi; what t is to be multiplied by
  T *log_pi_part_, *by_t_part_;
  T column_[small_d];                                                    // the sums of one atom
  T* coefficients_;                                                      // [most_, ld_]
  const T **coefficient_, **row_, **square_coefficient_, **square_row_;  // the waiting products
};

}  // namespace
