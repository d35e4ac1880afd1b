// The sum of other values of the atoms: sum e values, the first moment of these in the place of the
// atoms'. It is about no reference.
#pragma once
#include "moments/log_prob.h"

namespace {

template <class T>
struct AverageMoments : LogProbMoments<T> {
  static constexpr bool first_moment = true;

  // The tile's columns are those of the values.
  static void add_small_d(const Problem<T>& p, const Moments<T>&, const SmallDTile<T>& tile,
                          const QuerySums& sums, const T*, const T*) {
    for (int64_t k = 0; k < p.values.P; ++k)
      sums.first_moment[k] += tile.template moments_of<false>(tile.weight, k, 0).first;
  }
};

}  // namespace
