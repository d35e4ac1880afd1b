// What the index knows of the atoms of one chunk.
#pragma once
#include <algorithm>

#include "certified/exact_logits.h"
#include "certified/kernels.h"

namespace dfk {

// What the index knows of the atoms of a chunk at a level. Those without codes count as masked;
// `QueryBounds::drop_remote` looks after them.
template <class T>
struct ChunkAtoms {
  int64_t n;
  BoundAtoms atoms{};
  float log_prior[chunk_size];
  bool unknown = false;  // an atom that may count, and of which the index knows nothing

  ChunkAtoms(const ExactLogits<T>& exact, int64_t c, int level) {
    const Index& index = exact.index();
    const int64_t n0 = c * chunk_size, row = level * index.N + n0;
    n = std::min(chunk_size, index.N - n0);
    atoms = {.atom_norm = index.atom_norm + n0,
             .remainder_norm = index.remainder_norm + row,
             .axis_error = index.axis_error + row,
             .code_scale = level ? index.code_scale + row : nullptr,
             .log_prior = nullptr};
    bool all_coded = true;
    for (int64_t j = 0; j < n; ++j) all_coded &= index.has_codes(n0 + j);
    if (!exact.problem().log_prior && all_coded) return;
    atoms.log_prior = log_prior;
    for (int64_t j = 0; j < n; ++j) {
      log_prior[j] = float(exact.log_prior(n0 + j));
      unknown |= index.knows_nothing(n0 + j) && !exact.masked(n0 + j);
    }
  }
};

}  // namespace dfk
