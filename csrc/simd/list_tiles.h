// Tiles of the atoms that some query of a group has in its list: each is read once, and each query
// then picks its own.
#pragma once
#include "simd/tile.h"

namespace {

template <class T>
class ListTiles {
 public:
  // Rows of w elements, zero padded; tile: the most atoms of a tile.
  ListTiles(const Problem<T>& p, int64_t w, int64_t tile)
      : p_(p),
        w_(w),
        in_place_(rows_in_place(p)),
        scratch_(Arena::bytes<T>(in_place_ ? 0 : tile * w) + Arena::bytes<const T*>(tile)) {
    if (!scratch_.ok()) return;
    rows_ = scratch_.template take<T>(in_place_ ? 0 : tile * w);
    row_ = scratch_.template take<const T*>(tile);
  }
  bool ok() const { return scratch_.ok(); }

  // As many atoms as stay in a second-level cache while all queries pass.
  static int64_t rows_of(int64_t w) {
    const int64_t n = 384 * 1024 / (w * int64_t(sizeof(T))) / W<T> * W<T>;
    return n < W<T> ? W<T> : n < 64 ? n : 64;
  }

  void load(int64_t start, int64_t n) {
    start_ = start, n_ = n;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t row = p_.atom_rows[start + j];
      if (in_place_) {
        row_[j] = static_cast<const T*>(p_.y) + row * p_.row_stride;
        continue;
      }
      T* to = rows_ + j * w_;
      read_row(p_, row, to);
      for (int64_t k = p_.d; k < w_; ++k) to[k] = 0;
      row_[j] = to;
    }
  }

  // Writes the atoms that query q of the group has in its list; returns how many there are.
  int64_t pick(int64_t q, const T** row, int64_t* atom, T* log_prior) const {
    int64_t count = 0;
    for (int64_t j = 0; j < n_; ++j) {
      if (!(p_.listed_by[start_ + j] >> q & 1)) continue;
      row[count] = row_[j];
      atom[count] = p_.atom_rows[start_ + j];
      log_prior[count] = p_.log_prior ? p_.log_prior[atom[count]] - p_.max_log_prior : T(0);
      ++count;
    }
    return count;
  }

 private:
  const Problem<T>& p_;
  const int64_t w_;
  const bool in_place_;
  Arena scratch_;
  int64_t start_ = 0, n_ = 0;
  T* rows_;
  const T** row_;
};

}  // namespace
