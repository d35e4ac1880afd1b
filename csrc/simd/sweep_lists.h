// The sweep for lists of atoms: each atom is evaluated by differences, while it is in the cache,
// for the queries that have it in their list and for no other.
#pragma once
#include "simd/list_tiles.h"
#include "simd/sweep_base.h"

namespace {

template <class T>
class ListSweep : private SweepBase<T> {
  using Base = SweepBase<T>;
  using Base::B_, Base::tile_, Base::picked_log_prior_, Base::picked_atom_, Base::picked_row_;

 public:
  ListSweep(const Problem<T>& p, const Moments<T>& m, int64_t s, int64_t b0, int64_t b1)
      : Base(p, m, s, b0, b1, ListTiles<T>::rows_of(m.width)), tiles_(p, m.width, tile_) {}

  int run(int64_t n0, int64_t n1) {
    if (!tiles_.ok() || !Base::ok()) return out_of_memory;
    int64_t visited = 0;
    for (int64_t i = n0; i < n1; i += tile_) {
      tiles_.load(i, n1 - i < tile_ ? n1 - i : tile_);
      for (int64_t q = 0; q < B_; ++q) {
        const int64_t count = tiles_.pick(q, picked_row_, picked_atom_, picked_log_prior_);
        if (count && !Base::add_by_differences(q, count)) return non_finite_atom;
      }
      if (++visited % 16 == 0) Base::flush();
    }
    Base::finish();
    return ok;
  }

 private:
  ListTiles<T> tiles_;
};

}  // namespace
