// Which queries are worth searching for, by fitted times: each query by itself, as if all queries
// of its group were like it, so that the answer does not depend on those that stand beside it.
#pragma once
#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "certified/query_bounds.h"
#include "simd/problem.h"

namespace dfk {

// Times per atom of the cloud, in units of what the dense kernel takes to read an atom. A pair is a
// query with one of its atoms; the Q queries of a group share the rows that are read.
// `python -m bench.fit_costs` measures these times and prints what fits them. The values here were
// fitted to photographs (d = 3072) and digits (d = 784) on two threads of an AMD EPYC with AVX-512.
struct FittedCosts {
  double dense_query = 0.13;   // dense kernel: 1 + dense_query Q
  double dense_shared = 0.6;   // times this where more than two groups share what it reads
  double dense_margin = 0.95;  // a search has to be faster by so much
  double fine_rows = 0.4;      // fine level: fine_rows (1 - exp(-fine_decay pairs))
  double fine_decay = 0.6;     //   + (fine_pair + fine_pair_start / d) pairs
  double fine_pair = 0.02, fine_pair_start = 40;
  double list_row = 0.8, list_row_start = 300;    // kernel over lists: (list_row + .. / d) rows
  double list_pair = 0.27, list_pair_start = 80;  //   + (list_pair + .. / d) pairs
};

class Costs {
 public:
  Costs(int64_t B, int64_t N, int64_t d)
      : Q_(double(std::min(B, query_group))),
        N_(double(N)),
        d_(double(d)),
        many_(B > 2 * query_group) {}

  // Whether a search that leaves so many candidates, as far as one knows, is cheaper than taking
  // all atoms; without `candidates`: before the search.
  bool worth(const QueryBounds& q, int64_t k, int64_t candidates) const {
    return list_time(q, k) + fine_time(Q_ * double(candidates) / N_) <= dense_time();
  }
  bool worth(const QueryBounds& q, int64_t k) const { return list_time(q, k) <= dense_time(); }

 private:
  double dense_time() const {
    return fit_.dense_margin * (many_ ? fit_.dense_shared : 1) * (1 + fit_.dense_query * Q_);
  }
  double fine_time(double pairs) const {
    return fit_.fine_rows * (1 - std::exp(-fit_.fine_decay * pairs)) +
           (fit_.fine_pair + fit_.fine_pair_start / d_) * pairs;
  }
  double list_time(const QueryBounds& q, int64_t k) const {
    const double share = selected_share(q, k);
    const double rows = 1 - std::pow(1 - share, Q_), pairs = Q_ * share;
    return (fit_.list_row + fit_.list_row_start / d_) * rows +
           (fit_.list_pair + fit_.list_pair_start / d_) * pairs;
  }
  // The share of the sample that will be selected. While nothing else is known, the k best of the
  // sample itself are what the others are compared with, and tell nothing.
  double selected_share(const QueryBounds& q, int64_t k) const {
    std::vector<double> sorted = q.sample;
    const int64_t size = int64_t(sorted.size()), best = std::min(k, size);
    std::nth_element(sorted.begin(), sorted.begin() + (best - 1), sorted.end(), std::greater<>());
    const double threshold = std::max(q.kth_logit, sorted[best - 1]) - q.gap;
    const int64_t tell_nothing = q.kth_logit > -INFINITY ? 0 : std::min(best, size - 1);
    const int64_t above = std::count_if(sorted.begin(), sorted.end(),
                                        [=](double logit) { return logit >= threshold; });
    return double(std::max<int64_t>(above - tell_nothing, 0)) / double(size - tell_nothing);
  }

  FittedCosts fit_;
  double Q_, N_, d_;
  bool many_;
};

}  // namespace dfk
