// The values that average adds up in the place of the atoms, as rows of whole vectors of T.
#pragma once
#include "simd/dots.h"

namespace {

template <class T>
class ValueRows {
 public:
  // tile: the most atoms that are asked for at once.
  ValueRows(const Problem<T>& p, int64_t width, int64_t tile)
      : values_(values_of(p)),
        width_(width),
        in_place_(rows_in_place(values_)),
        scratch_(p.values.at ? room(tile) : 64) {
    if (!p.values.at || !scratch_.ok()) return;
    rows_ = scratch_.template take<T>(tile * (width + W<T>));
    picked_ = scratch_.template take<T>(in_place_ ? 0 : tile * width);
    zero_ = scratch_.template take<T>(width);
    row_ = scratch_.template take<const T*>(tile);
    bad_ = scratch_.template take<int64_t>(tile);
    memset(zero_, 0, size_t(width) * sizeof(T));
  }
  bool ok() const { return scratch_.ok(); }

  // Those of atoms [start, start + n). In rows that are not finite there are zeros, since their
  // atoms may have no weight; expect_weightless() looks whether they have none.
  Rows<T> tile(int64_t start, int64_t n) {
    Rows<T> rows = read_rows(values_, start, n, width_, rows_, in_place_);
    bad_count_ = 0;
    for (int64_t j = 0; j < n; ++j)
      if (!finite(rows.at + j * rows.ld)) bad_[bad_count_++] = j;
    if (!bad_count_) return rows;
    const int64_t ld = width_ + W<T>;
    if (rows.at != rows_)
      for (int64_t j = 0; j < n; ++j)
        memcpy(rows_ + j * ld, rows.at + j * rows.ld, size_t(width_) * sizeof(T));
    for (int64_t i = 0; i < bad_count_; ++i)
      memset(rows_ + bad_[i] * ld, 0, size_t(width_) * sizeof(T));
    return {rows_, ld};
  }
  // Makes the sum nan where an atom of the last tile with values that are not finite has weight.
  template <class U>
  void expect_weightless(const T* weight, U* sum) const {
    for (int64_t i = 0; i < bad_count_; ++i)
      if (weight[bad_[i]] > 0) sum[0] = __builtin_nan("");
  }

  // sum += sum_j weight_j values_j of n rows of the data set, which all have weight.
  void add(const int64_t* rows, const T* weight, int64_t n, T* sum) {
    for (int64_t j = 0; j < n; ++j) {
      if (in_place_) {
        row_[j] = static_cast<const T*>(values_.y) + rows[j] * values_.row_stride;
        continue;
      }
      T* const to = picked_ + j * width_;
      read_row(values_, rows[j], to);
      for (int64_t k = values_.d; k < width_; ++k) to[k] = 0;
      row_[j] = to;
    }
    add_about(weight, row_, n, width_, zero_, sum);
  }

 private:
  // The rows of values as if they were atoms.
  static Problem<T> values_of(const Problem<T>& p) {
    Problem<T> v = p;
    v.y = p.values.at;
    v.d = p.values.P;
    v.row_stride = p.values.row_stride;
    v.storage = p.values.storage;
    v.scale = 1;
    v.offset = 0;
    return v;
  }
  size_t room(int64_t tile) const {
    return Arena::bytes<T>(tile * (width_ + W<T>)) +
           Arena::bytes<T>(in_place_ ? 0 : tile * width_) + Arena::bytes<T>(width_) +
           Arena::bytes<const T*>(tile) + Arena::bytes<int64_t>(tile);
  }
  bool finite(const T* row) const {
    Vec<T> sum{};  // 0 * inf and 0 * nan are nan
    for (int64_t k = 0; k < width_; k += W<T>) sum += T(0) * load(row + k);
    return sum_lanes<T>(sum) == 0;
  }

  const Problem<T> values_;
  const int64_t width_;
  const bool in_place_;
  Arena scratch_;
  T *rows_ = nullptr, *picked_ = nullptr, *zero_ = nullptr;  // of a tile, of add()
  const T** row_ = nullptr;
  int64_t* bad_ = nullptr;
  int64_t bad_count_ = 0;
};

}  // namespace
