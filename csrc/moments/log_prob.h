// The log-density alone: nothing beside sum e, which is added up for every kind.
#pragma once
#include "simd/moments.h"

namespace {

template <class T>
struct LogProbMoments {
  static constexpr bool first_moment = false;
  // The posterior's: about the centre or not, the logits are found in the same way.
  static constexpr double centre_limit = 4;
  static constexpr bool elementwise = false;

  static int64_t second_rows(const Problem<T>&) { return 0; }
  static void add_tile(const Problem<T>&, const Moments<T>&, const WeightedTile<T>&) {}
  static void add_rows(const QuerySums&, const T*, const T* const*, int64_t, int64_t, const T*,
                       T*) {}
  static void add_small_d(const Problem<T>&, const Moments<T>&, const SmallDTile<T>&,
                          const QuerySums&, const T*, const T*) {}
  static void move_reference(const Problem<T>&, const Moments<T>&, const QuerySums&, const double*,
                             const T*) {}
};

}  // namespace
