// All moment kinds behind one table of functions, indexed by MomentKind, and what is done with
// moments of any kind: a tile is added, the reference moves, splits are merged.
#pragma once
#include "generated/moments.h"  // written by _build/native.py

namespace {

template <class T>
struct MomentKindFunctions {
  bool first_moment;    // whether sum e t is added up
  double centre_limit;  // simd/query.h says of what
  bool elementwise;     // whether second moments are those of the coordinates
  int64_t (*second_rows)(const Problem<T>&);
  void (*add_tile)(const Problem<T>&, const Moments<T>&, const WeightedTile<T>&);
  AddRows<T> add_rows;  // null: rows are shifted into a tile first
  void (*add_small_d)(const Problem<T>&, const Moments<T>&, const SmallDTile<T>&, const QuerySums&,
                      const T* reference, const T* v);
  void (*move_reference)(const Problem<T>&, const Moments<T>&, const QuerySums&,
                         const double* delta, const T* v);
};

template <class T, template <class> class Kind>
inline constexpr MomentKindFunctions<T> functions_of{.first_moment = Kind<T>::first_moment,
                                                     .centre_limit = Kind<T>::centre_limit,
                                                     .elementwise = Kind<T>::elementwise,
                                                     .second_rows = Kind<T>::second_rows,
                                                     .add_tile = Kind<T>::add_tile,
                                                     .add_rows = Kind<T>::add_rows,
                                                     .add_small_d = Kind<T>::add_small_d,
                                                     .move_reference = Kind<T>::move_reference};

template <class T>
const MomentKindFunctions<T>& kind_of(const Problem<T>& p) {
#define DFK_ROW(name, Name) functions_of<T, Name##Moments>,
  static constexpr MomentKindFunctions<T> kinds[] = {DFK_MOMENT_KINDS(DFK_ROW)};
#undef DFK_ROW
  return kinds[int(p.kind)];
}

template <class T>
int64_t first_rows(const Problem<T>& p) {
  return kind_of(p).first_moment;
}
template <class T>
int64_t second_rows(const Problem<T>& p) {
  return kind_of(p).second_rows(p);
}

// Adds a tile for up to `tile_queries` queries. The scalars go to the sums at once, the vectors to
// where each query says.
template <class T>
void add_tile(const Problem<T>& p, const Moments<T>& m, const WeightedTile<T>& tile) {
  if (m.first_rows) {
    const T* weight[tile_queries] = {};
    T* first_moment[tile_queries] = {};
    for (int64_t i = 0; i < tile.count; ++i) {
      weight[i] = tile.queries[i].weight;
      first_moment[i] = tile.queries[i].vectors;
    }
    weighted_sums<T>(tile.count, weight, tile.rows, tile.n, m.stride, first_moment);
  }
  kind_of(p).add_tile(p, m, tile);
}

// Makes moments about r - delta of moments about r. v: this query's K vectors, rows of `stride`.
template <class T>
void move_reference(const Problem<T>& p, const Moments<T>& m, const QuerySums& s,
                    const double* delta, const T* v) {
  kind_of(p).move_reference(p, m, s, delta, v);
  if (!p.values.at) add_scaled(s.first_moment, m.first_rows * m.stride, *s.weight_sum, delta);
}

// Adds the moments of `part` to those of `all`: same reference, same max_logit.
template <class T>
void add_sums(const Problem<T>& p, const Moments<T>& m, const QuerySums& all,
              const QuerySums& part) {
  *all.weight_sum += *part.weight_sum;
  *all.weight_square_sum += *part.weight_square_sum;
  *all.square_moment += *part.square_moment;
  for (int64_t k = 0; k < p.K; ++k) all.projection_sum[k] += part.projection_sum[k];
  add_scaled(all.first_moment, m.first_rows * m.stride, 1, part.first_moment);
  if (all.race && part.race->least < all.race->least) *all.race = *part.race;
  add_scaled(all.second_moment, m.second_rows * m.stride, 1, part.second_moment);
}

// Merges the splits of query b into split 0: all about the reference of the heaviest, then a sum.
template <class T>
int merge(const Problem<T>& p, const Moments<T>& m, int64_t splits, int64_t b) {
  int64_t heaviest = 0;
  for (int64_t s = 1; s < splits; ++s)
    if (m.max_logit[s * p.B + b] > m.max_logit[heaviest * p.B + b]) heaviest = s;
  const double max_logit = m.max_logit[heaviest * p.B + b];
  const int64_t reference = m.reference[heaviest * p.B + b], w = m.width;
  if (splits == 1 || !(max_logit > -__builtin_inf())) return ok;
  Arena arena(2 * Arena::bytes<T>(w) + Arena::bytes<double>(w) + Arena::bytes<T>(w * p.K));
  if (!arena.ok()) return out_of_memory;
  T *new_reference = arena.take<T>(w), *old_reference = arena.take<T>(w),
    *v = arena.take<T>(w * p.K);
  double* delta = arena.take<double>(w);
  memset(new_reference, 0, size_t(w) * sizeof(T));
  memset(old_reference, 0, size_t(w) * sizeof(T));
  memset(v, 0, size_t(w * p.K) * sizeof(T));
  for (int64_t k = 0; k < p.K; ++k)
    memcpy(v + k * w, p.v + (b * p.K + k) * p.d, size_t(p.d) * sizeof(T));
  read_reference(p, reference, new_reference);
  const QuerySums all = sums_of(p, m, 0, b);
  if (*all.weight_sum == 0) clear_vectors(m, all);  // nothing was added, so they were not written
  for (int64_t s = 0; s < splits; ++s) {
    const QuerySums part = sums_of(p, m, s, b);
    if (*part.weight_sum == 0 && s > 0) continue;
    if (*part.weight_sum > 0) {
      if (*part.reference != reference) {
        read_reference(p, *part.reference, old_reference);
        for (int64_t k = 0; k < w; ++k) delta[k] = double(old_reference[k]) - new_reference[k];
        move_reference(p, m, part, delta, v);
      }
      raise_max_logit(p, m, part, max_logit);
    }
    *part.max_logit = max_logit;
    *part.reference = reference;
    if (s > 0) add_sums(p, m, all, part);
  }
  return ok;
}

}  // namespace
