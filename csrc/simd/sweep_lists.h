// The sweep for lists of atoms: each atom is evaluated by differences, while it is in the cache,
// for the queries that have it in their list and for no other.
#pragma once
#include "simd/sweep_base.h"

namespace {

template <class T>
class ListSweep : private SweepBase<T> {
  using Base = SweepBase<T>;
  using Base::p_, Base::B_, Base::w_, Base::tile_, Base::picked_log_prior_, Base::picked_atom_,
      Base::picked_row_;

 public:
  ListSweep(const Problem<T>& p, const Moments<T>& m, int64_t s, int64_t b0, int64_t b1)
      : Base(p, m, s, b0, b1, tile_rows(m)),
        in_place_(rows_in_place(p)),
        tile_scratch_(Arena::bytes<T>(in_place_ ? 0 : tile_ * w_) + Arena::bytes<const T*>(tile_)) {
    if (!tile_scratch_.ok()) return;
    rows_ = tile_scratch_.template take<T>(in_place_ ? 0 : tile_ * w_);
    row_ = tile_scratch_.template take<const T*>(tile_);
  }

  int run(int64_t n0, int64_t n1) {
    if (!tile_scratch_.ok() || !Base::ok()) return out_of_memory;
    int64_t visited = 0;
    for (int64_t i = n0; i < n1; i += tile_) {
      const int64_t n = n1 - i < tile_ ? n1 - i : tile_;
      load(i, n);
      for (int64_t q = 0; q < B_; ++q) {
        int64_t count = 0;
        for (int64_t j = 0; j < n; ++j) {
          if (!(p_.listed_by[i + j] >> q & 1)) continue;
          picked_row_[count] = row_[j];
          picked_atom_[count] = p_.atom_rows[i + j];
          picked_log_prior_[count] =
              p_.log_prior ? p_.log_prior[picked_atom_[count]] - p_.max_log_prior : T(0);
          ++count;
        }
        if (count && !Base::add_by_differences(q, count)) return non_finite_atom;
      }
      if (++visited % 16 == 0) Base::flush();
    }
    Base::finish();
    return ok;
  }

 private:
  // As many atoms as stay in a second-level cache while all queries pass.
  static int64_t tile_rows(const Moments<T>& m) {
    const int64_t n = 384 * 1024 / (m.width * int64_t(sizeof(T))) / W<T> * W<T>;
    return n < W<T> ? W<T> : n < 64 ? n : 64;
  }

  void load(int64_t start, int64_t n) {
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

  const bool in_place_;
  Arena tile_scratch_;
  T* rows_;
  const T** row_;
};

}  // namespace
