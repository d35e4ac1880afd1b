// How the work of an op over a data set is cut into tasks: groups of queries that share the rows
// they read, and splits of the atoms of each. That depends on the shapes and the lists alone, never
// on the number of threads, so that the results do not either.
#pragma once
#include <algorithm>
#include <atomic>
#include <vector>

#include "host/accumulate.h"

namespace dfk {

// Queries that share the rows they read; their atoms are cut into `splits` of `span`.
template <class T>
struct QueryGroup {
  Problem<T> problem;
  int64_t b0, b1, splits, span;
  QueryGroup(const Problem<T>& p, int64_t b0, int64_t b1, int64_t most)
      : problem(p), b0(b0), b1(b1) {
    span = (p.N + most - 1) / most;
    splits = (p.N + span - 1) / span;
  }
};

// The rows that some query of a group has in its list, and which queries do.
struct ListedRows {
  std::vector<int64_t> rows;
  std::vector<uint8_t> listed_by;
};

// The tasks of one call, with what their problems point to.
template <class T>
struct Cut {
  std::vector<T> centre;  // empty: the origin
  std::vector<int64_t> rows, order;
  std::vector<ListedRows> listed;
  std::vector<QueryGroup<T>> groups;
  std::vector<int64_t> splits;  // of every query of the batch
  int64_t most = 1;             // the most splits of a query
};
// stride, rows: every split of a query has `rows` vectors of sums beside the first moment; -1 where
// it has not even that.
template <class T>
Cut<T> cut(const Arguments& a, const CheckedProblem<T>& c, int64_t stride, int64_t rows);
extern template Cut<float> cut(const Arguments&, const CheckedProblem<float>&, int64_t, int64_t);
extern template Cut<double> cut(const Arguments&, const CheckedProblem<double>&, int64_t, int64_t);

// Where the split that begins with atom n of a group does begin: for draw, whose blocks must not be
// torn, with the next block.
template <class T>
int64_t split_start(const Problem<T>& p, int64_t n) {
  if (p.kind != MomentKind::draw) return std::min(n, p.N);
  const auto block = [&](int64_t i) { return (p.atom_rows ? p.atom_rows[i] : i) / draw_block; };
  while (n > 0 && n < p.N && block(n) == block(n - 1)) ++n;
  return std::min(n, p.N);
}

// f(problem, s, b0, b1, n0, n1): queries [b0, b1) over atoms [n0, n1), which are their split s; for
// all splits of all groups, in parallel. Returns the status of one that was not ok, if any.
template <class T, class F>
int for_each_split(const std::vector<QueryGroup<T>>& groups, const F& f) {
  std::atomic<int> status{ok};
  int64_t tasks = 0;
  for (const QueryGroup<T>& group : groups) tasks += group.splits;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    auto group = groups.begin();
    int64_t s = begin;
    for (; s >= group->splits; ++group) s -= group->splits;
    for (int64_t task = begin; task < end && status == ok; ++task, ++s) {
      if (s == group->splits) ++group, s = 0;
      const Problem<T>& p = group->problem;
      const int result = f(p, s, group->b0, group->b1, split_start(p, s * group->span),
                           split_start(p, (s + 1) * group->span));
      if (result != ok) status = result;
    }
  });
  return status;
}

}  // namespace dfk
