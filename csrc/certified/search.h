// The certified search for a group of queries: both levels of the index, and what is dropped.
#pragma once
#include <atomic>

#include "certified/candidates.h"
#include "certified/chunk_atoms.h"
#include "certified/costs.h"
#include "certified/exact_logits.h"

namespace dfk {

template <class T>
class Search {
 public:
  using Chunk = ChunkAtoms<T>;
  using Cell = Candidates::Cell;

  // Queries that are `worth` searching for.
  Search(const ExactLogits<T>& exact, const Costs& costs, int64_t k,
         std::vector<QueryBounds> queries, Workspace& workspace)
      : exact_(exact),
        index_(exact.index()),
        costs_(costs),
        k_(k),
        Q_(int64_t(queries.size())),
        queries_(std::move(queries)),
        active_(Q_, true),
        candidates_(Q_, index_.N, workspace) {}

  void run() {
    project();
    for (QueryBounds& q : queries_) q.start_coarse();
    candidates_.each_chunk([this](int64_t c) { coarse_level(c); });
    if (unknown_) active_.assign(Q_, false);
    raise_kth_logits();
    drop();
    for (int64_t i = 0; i < Q_; ++i)
      if (active_[i])
        active_[i] = queries_[i].kth_logit > -INFINITY && costs_.worth(queries_[i], k_, count(i));
    each(Q_, 8 * index_.d, [this](int64_t i) {
      if (index_.padded && active_[i] && count(i) > few_candidates) queries_[i].start_fine();
    });
    if (std::any_of(queries_.begin(), queries_.end(), [](auto& q) { return q.level == 1; })) {
      candidates_.each_chunk([this](int64_t c) { fine_level(c); });
      raise_kth_logits();
      drop();
    }
    each(Q_, 1 << 20, [this](int64_t i) {
      if (active_[i] && index_.remote_count) active_[i] = queries_[i].drop_remote();
      if (active_[i] && k_ == 1) drop_lightest(i);
    });
  }

  // Whether query i has a list; otherwise it should take all atoms, because that is cheaper or the
  // index does not know enough.
  bool has_list(int64_t i) const { return active_[i]; }
  int64_t count(int64_t i) const { return candidates_.count(i); }
  void write(int64_t i, int64_t* out) const { candidates_.write(i, out); }
  double dropped_weight(int64_t i) const { return queries_[i].dropped_weight(); }

 private:
  static constexpr int64_t few_candidates = 32;  // cheaper to take than to look at again

  // a = V z
  void project() {
    each((index_.K + 3) / 4, 4 * Q_ * index_.d, [&](int64_t i) {
      const int64_t k = 4 * i;
      const double* z[query_group];
      double* a[query_group];
      for (int64_t q = 0; q < Q_; ++q) z[q] = queries_[q].z.data(), a[q] = queries_[q].a.data() + k;
      kernels().certified.axis_products(index_.basis + k * index_.d,
                                        std::min<int64_t>(4, index_.K - k), index_.d, z, Q_, a);
    });
  }

  // Bounds on all atoms of chunk c.
  void coarse_level(int64_t c) {
    const int64_t K = index_.K, n0 = c * chunk_size;
    const Chunk chunk(exact_, c, 0);
    if (chunk.unknown) unknown_ = true;
    float query[query_group * most_axes], scales[chunk_size] = {};
    for (int64_t i = 0; i < Q_; ++i)
      std::copy(queries_[i].coarse_query.begin(), queries_[i].coarse_query.end(), query + i * K);
    std::copy_n(index_.code_scale + n0, chunk.n, scales);
    for (int64_t tile = 0; tile < chunk.n; tile += code_tile)
      kernels().certified.coarse_products(index_.coarse_codes + (n0 + tile) * K, scales + tile, K,
                                          query, Q_, candidates_.products(0, c) + tile,
                                          candidates_.query_stride());
    for (int64_t i = 0; i < Q_; ++i) {
      candidates_.take_all(i, c);
      candidates_.cell(i, c).count = int32_t(chunk.n);
      bound(i, c, chunk, chunk.n == chunk_size);
    }
  }

  // Adds the fine codes' part to the products of the candidates in chunk c, and bounds from these.
  // A row of codes serves all queries of which its atom is a candidate.
  void fine_level(int64_t c) {
    const Chunk chunk(exact_, c, 1);
    const int64_t ld = index_.padded;
    const int8_t* codes = index_.fine_codes + c * chunk_size * ld;
    uint8_t asking[chunk_size] = {};
    float* products[chunk_size][query_group];
    const QueryBounds* who[chunk_size][query_group];
    for (int64_t i = 0; i < Q_; ++i)
      for (int64_t j = 0; queries_[i].level == 1 && j < candidates_.cell(i, c).count; ++j) {
        const uint8_t atom = candidates_.picks(i, c)[j];
        const int m = asking[atom]++;
        products[atom][m] = candidates_.products(i, c) + j;
        who[atom][m] = &queries_[i];
      }
    for (int64_t atom = 0; atom < chunk.n; ++atom) {
      if (!asking[atom]) continue;
      const int16_t* query[query_group];
      double part[query_group];
      for (int m = 0; m < asking[atom]; ++m) query[m] = who[atom][m]->fine_query.data();
      prefetch_next(codes, asking, atom, chunk.n);
      kernels().certified.fine_products(codes + atom * ld, ld, query, asking[atom], part);
      for (int m = 0; m < asking[atom]; ++m)
        *products[atom][m] +=
            float(part[m] * who[atom][m]->fine_unit * chunk.atoms.code_scale[atom]);
    }
    for (int64_t i = 0; i < Q_; ++i)
      if (queries_[i].level == 1 && candidates_.cell(i, c).count) bound(i, c, chunk);
  }

  // The next row that is asked for. always_inline: gcc takes a function that only prefetches to do
  // nothing, and drops calls of it.
  __attribute__((always_inline)) void prefetch_next(const int8_t* codes, const uint8_t* asking,
                                                    int64_t atom, int64_t n) const {
    while (++atom < n && !asking[atom]) {
    }
    if (atom < n)
      for (int64_t k = 0; k < index_.padded; k += 64)
        __builtin_prefetch(codes + atom * index_.padded + k);
  }

  // Bounds on the candidates of query i in chunk c; `whole`: all atoms of a whole chunk.
  void bound(int64_t i, int64_t c, const Chunk& chunk, bool whole = false) {
    Cell& cell = candidates_.cell(i, c);
    float estimate[chunk_size];  // `promising` computes those that it needs again
    kernels().certified.bound_logits(
        queries_[i].coefficients, chunk.atoms, whole ? nullptr : candidates_.picks(i, c),
        candidates_.products(i, c), cell.count, estimate, candidates_.upper(i, c),
        &cell.largest_estimate, &cell.largest_upper);
  }

  // Drops the candidates whose upper bounds lie below the threshold.
  void drop() {
    std::vector<std::pair<float, int32_t>> gone(Q_ * candidates_.chunks);
    candidates_.each_chunk([&](int64_t c) {
      for (int64_t i = 0; i < Q_; ++i)
        if (candidates_.cell(i, c).count && active_[i])
          gone[i * candidates_.chunks + c] = drop_in_chunk(i, c);
    });
    for (int64_t i = 0; i < Q_; ++i)
      for (int64_t c = 0; c < candidates_.chunks; ++c) {
        const auto& [upper, n] = gone[i * candidates_.chunks + c];
        queries_[i].drop(upper, n);
      }
  }
  // (the largest upper bound of the dropped, how many they are)
  std::pair<float, int32_t> drop_in_chunk(int64_t i, int64_t c) {
    Cell& cell = candidates_.cell(i, c);
    const int32_t n = cell.count;
    const float threshold = rounding::round_down(queries_[i].threshold());
    if (cell.largest_upper < threshold) {
      cell.count = 0;
      return {cell.largest_upper, n};
    }
    uint8_t stay[chunk_size];
    float largest;
    const int64_t left =
        kernels().certified.find_candidates(candidates_.upper(i, c), n, threshold, stay, &largest);
    candidates_.keep_only(i, c, stay, left);
    return {largest, n - int32_t(left)};
  }

  // Drops the lightest candidates, as many as may go: `gap` allows for all N atoms at its edge.
  // Atoms go by the distance of their upper bounds from the k-th logit, in quarters of a nat.
  void drop_lightest(int64_t i) {
    constexpr int buckets = 256;
    constexpr double width = 0.25;
    QueryBounds& q = queries_[i];
    const auto bucket = [&](float upper) {
      const double below = (q.kth_logit - upper - q.coordinate_error) / q.variance / width;
      return below > 0 ? int(std::min(below, buckets - 1.0)) : 0;  // nan: 0
    };
    int64_t counts[buckets] = {};
    for (int64_t c = 0; c < candidates_.chunks; ++c)
      for (int64_t j = 0; j < candidates_.cell(i, c).count; ++j)
        ++counts[bucket(candidates_.upper(i, c)[j])];
    double allowed = double(index_.N) * std::exp(-q.gap / q.variance) * (1 - 1e-6);
    allowed -= q.dropped_weight();
    int cut = buckets;
    for (; cut > 1; --cut) {
      const double weight = double(counts[cut - 1]) * std::exp(-width * (cut - 1));
      if (weight > allowed) break;
      allowed -= weight;
      q.drop(q.kth_logit - width * (cut - 1) * q.variance - q.coordinate_error, counts[cut - 1]);
    }
    for (int64_t c = 0; c < candidates_.chunks; ++c) {
      uint8_t stay[chunk_size];
      int64_t n = 0;
      for (int64_t j = 0; j < candidates_.cell(i, c).count; ++j)
        if (bucket(candidates_.upper(i, c)[j]) < cut) stay[n++] = uint8_t(j);
      candidates_.keep_only(i, c, stay, n);
    }
  }

  // Evaluates the most promising atoms of every query: k by their estimates, which is right in much
  // noise, and k by their upper bounds, which is right where the query almost is an atom.
  void raise_kth_logits() {
    each(Q_, 1 << 20, [&](int64_t i) {
      if (!active_[i]) return;
      std::vector<int64_t> atoms;
      promising(i, &Cell::largest_estimate, atoms);
      promising(i, &Cell::largest_upper, atoms);
      std::sort(atoms.begin(), atoms.end());
      atoms.erase(std::unique(atoms.begin(), atoms.end()), atoms.end());
      if (int64_t(atoms.size()) < k_) return;
      std::vector<double> logits, y;
      for (const int64_t atom : atoms) {
        exact_.read(atom, y);
        logits.push_back(exact_(queries_[i], atom, y));
      }
      std::nth_element(logits.begin(), logits.begin() + (k_ - 1), logits.end(), std::greater<>());
      queries_[i].kth_logit = std::max(queries_[i].kth_logit, logits[k_ - 1]);
    });
  }
  // Adds the k candidates with the largest estimates or upper bounds: from no more than k chunks.
  void promising(int64_t i, float Cell::* largest, std::vector<int64_t>& atoms) const {
    std::vector<std::pair<float, int64_t>> chunks, best;
    for (int64_t c = 0; c < candidates_.chunks; ++c)
      if (candidates_.cell(i, c).count) chunks.emplace_back(candidates_.cell(i, c).*largest, c);
    const int64_t looked_at = std::min<int64_t>(k_, int64_t(chunks.size()));
    std::partial_sort(chunks.begin(), chunks.begin() + looked_at, chunks.end(), std::greater<>());
    for (int64_t m = 0; m < looked_at; ++m) {
      const int64_t c = chunks[m].second, count = candidates_.cell(i, c).count;
      const uint8_t* picks = candidates_.picks(i, c);
      const Chunk chunk(exact_, c, queries_[i].level);
      float estimate[chunk_size], upper[chunk_size];
      Cell unused;
      kernels().certified.bound_logits(queries_[i].coefficients, chunk.atoms, picks,
                                       candidates_.products(i, c), count, estimate, upper,
                                       &unused.largest_estimate, &unused.largest_upper);
      const float* by = largest == &Cell::largest_estimate ? estimate : upper;
      for (int64_t j = 0; j < count; ++j) best.emplace_back(by[j], c * chunk_size + picks[j]);
    }
    const int64_t k = std::min<int64_t>(k_, int64_t(best.size()));
    std::partial_sort(best.begin(), best.begin() + k, best.end(), std::greater<>());
    for (int64_t j = 0; j < k; ++j) atoms.push_back(best[j].second);
  }

  const ExactLogits<T>& exact_;
  const Index& index_;
  const Costs& costs_;
  const int64_t k_, Q_;
  std::vector<QueryBounds> queries_;
  std::vector<uint8_t> active_;       // the queries that still have a list
  std::atomic<bool> unknown_{false};  // an atom of which the index knows nothing was seen
  Candidates candidates_;
};

}  // namespace dfk
