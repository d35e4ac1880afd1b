// The cascade of bounds: which atoms of a block of queries can carry weight.
#pragma once
#include <array>
#include <atomic>
#include <cstring>
#include <numeric>

#include "certified/costs.h"

namespace dfk {

// What is left of a chunk for a query: so many atoms, the largest middle and upper end of their
// logits.
struct Cell {
  int32_t count;
  float mid, up;
};

// Memory that a thread keeps from call to call, unless it is much: touching it anew would cost as
// much as the first level.
struct Room {
  std::vector<float> floats;
  std::vector<uint8_t> picks;
  static Room& of_this_thread() {
    static thread_local Room room;
    return room;
  }
  void trim() {
    constexpr size_t most = 8 << 20;
    if (floats.size() > most) floats = {}, picks = {};
  }
};

// A block of queries, each of which is `worth` searching for.
template <class T>
class Cascade {
 public:
  Cascade(const ExactLogits<T>& exact, const Costs& costs, int64_t k, std::vector<Asked> queries,
          Room& room)
      : exact_(exact),
        p_(exact.problem()),
        in_(exact.index()),
        costs_(costs),
        k_(k),
        Q_(int64_t(queries.size())),
        chunks_((p_.N + screen_chunk - 1) / screen_chunk),
        q_(std::move(queries)),
        sparse_(Q_, true),
        cells_(Q_ * chunks_) {
    const size_t n = size_t(Q_ * chunks_ * screen_chunk);
    if (room.picks.size() < n) room.floats.resize(2 * n), room.picks.resize(n);
    c_ = room.floats.data(), up_ = c_ + n;
    picks_ = room.picks.data();
    std::iota(each_.begin(), each_.end(), 0);
  }

  void run() {
    rotate();
    for (Asked& q : q_) q.set_first();
    each_chunk([this](int64_t c) { first_level(c); });
    if (unknown_) sparse_.assign(Q_, false);
    improve();
    screen();
    for (int64_t i = 0; i < Q_; ++i)
      if (sparse_[i]) sparse_[i] = q_[i].best > -INFINITY && costs_.worth(q_[i], k_, count(i));
    each(Q_, 8 * p_.d, [this](int64_t i) {
      if (in_.padded && sparse_[i] && count(i) > 32) q_[i].set_tail(), q_[i].level = 1;
    });
    if (std::any_of(q_.begin(), q_.end(), [](const Asked& q) { return q.level == 1; })) {
      each_chunk([this](int64_t c) { tail(c); });
      improve();
      screen();
    }
    each(Q_, 1 << 20, [this](int64_t i) {
      if (sparse_[i] && in_.set_apart) sparse_[i] = q_[i].drop_apart();
      if (sparse_[i] && k_ == 1) trim(i);
    });
  }

  // False where all atoms should be taken: cheaper, or the index does not know enough.
  bool sparse(int64_t i) const { return sparse_[i]; }
  int64_t count(int64_t i) const {
    int64_t sum = 0;
    for (int64_t c = 0; c < chunks_; ++c) sum += cell(i, c).count;
    return sum;
  }
  void write(int64_t i, int64_t* out) const {
    for (int64_t c = 0; c < chunks_; ++c)
      for (int64_t j = 0; j < cell(i, c).count; ++j)
        *out++ = c * screen_chunk + picks_[at(i, c) + j];
  }
  double dropped(int64_t i) const { return q_[i].dropped(); }

 private:
  const Cell& cell(int64_t i, int64_t c) const { return cells_[i * chunks_ + c]; }
  Cell& cell(int64_t i, int64_t c) { return cells_[i * chunks_ + c]; }
  int64_t at(int64_t i, int64_t c) const { return (i * chunks_ + c) * screen_chunk; }
  template <class F>
  void each_chunk(const F& f) {
    const int64_t tasks = std::min<int64_t>(chunks_, 64);
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        for (int64_t c = t; c < chunks_; c += tasks) f(c);
    });
  }

  // a = V z
  void rotate() {
    each((in_.K + 3) / 4, 4 * Q_ * p_.d, [&](int64_t i) {
      const int64_t k = 4 * i;
      const double* z[block];
      double* a[block];
      for (int64_t q = 0; q < Q_; ++q) z[q] = q_[q].z.data(), a[q] = q_[q].a.data() + k;
      kernels().screen.rotate(in_.basis + k * p_.d, std::min<int64_t>(4, in_.K - k), p_.d, z, Q_,
                              a);
    });
  }

  void first_level(int64_t c) {
    const int64_t K = in_.K, n0 = c * screen_chunk, n = std::min(screen_chunk, p_.N - n0);
    float query[block * most_axes], scales[screen_chunk] = {};
    for (int64_t i = 0; i < Q_; ++i)
      std::copy(q_[i].first.begin(), q_[i].first.end(), query + i * K);
    std::copy_n(in_.scales + n0, n, scales);
    for (int64_t tile = 0; tile < n; tile += screen_tile)
      kernels().screen.first(in_.first + (n0 + tile) * K, scales + tile, K, query, Q_,
                             c_ + at(0, c) + tile, at(1, 0));
    const Known known(*this, c, 0);
    if (known.unknown) unknown_ = true;
    for (int64_t i = 0; i < Q_; ++i) {
      std::memcpy(picks_ + at(i, c), each_.data(), screen_chunk);
      bound(i, c, n, known, n == screen_chunk);
    }
  }

  // Adds the tail's part to c, and bounds from it. A row of codes serves all queries that its atom
  // is left of.
  void tail(int64_t c) {
    const Known known(*this, c, 1);
    const int64_t ld = in_.padded;
    const int8_t* codes = in_.tail + c * screen_chunk * ld;
    uint8_t asking[screen_chunk] = {};
    int64_t cells[screen_chunk][block];
    const Asked* who[screen_chunk][block];
    for (int64_t i = 0; i < Q_; ++i)
      for (int64_t j = 0; q_[i].level == 1 && j < cell(i, c).count; ++j) {
        const uint8_t atom = picks_[at(i, c) + j];
        const int m = asking[atom]++;
        cells[atom][m] = at(i, c) + j;
        who[atom][m] = &q_[i];
      }
    for (int64_t atom = 0; atom < known.n; ++atom) {
      if (!asking[atom]) continue;
      const int16_t* queries[block];
      double products[block];
      for (int m = 0; m < asking[atom]; ++m) queries[m] = who[atom][m]->tail.data();
      prefetch_next(codes, asking, atom, known.n);
      kernels().screen.dots(codes + atom * ld, ld, queries, asking[atom], products);
      for (int m = 0; m < asking[atom]; ++m)
        c_[cells[atom][m]] +=
            float(products[m] * who[atom][m]->tail_unit * known.atoms.scale[atom]);
    }
    for (int64_t i = 0; i < Q_; ++i)
      if (q_[i].level == 1 && cell(i, c).count) bound(i, c, cell(i, c).count, known);
  }

  // The next row that is asked for. always_inline: gcc takes a function that only prefetches to do
  // nothing, and drops calls of it.
  __attribute__((always_inline)) void prefetch_next(const int8_t* codes, const uint8_t* asking,
                                                    int64_t atom, int64_t n) const {
    while (++atom < n && !asking[atom]) {
    }
    if (atom < n)
      for (int64_t k = 0; k < in_.padded; k += 64)
        __builtin_prefetch(codes + atom * in_.padded + k);
  }

  // What the index knows of the atoms of a chunk. Those without codes count as masked: `drop_apart`
  // looks after them.
  struct Known {
    int64_t n;
    ScreenAtoms atoms{};
    float log_prior[screen_chunk];
    bool unknown = false;  // an atom that may count, and of which the index knows nothing
    Known(const Cascade& of, int64_t c, int level) {
      const int64_t n0 = c * screen_chunk, N = of.p_.N;
      n = std::min(screen_chunk, N - n0);
      const float* scales = of.in_.scales + level * N + n0;
      atoms.size = of.in_.size + n0;
      atoms.rest = of.in_.rest + level * N + n0;
      atoms.shift = of.in_.shift + level * N + n0;
      atoms.scale = level ? scales : nullptr;
      bool uncoded = false;
      for (int64_t j = 0; j < n; ++j) uncoded |= of.in_.uncoded(n0 + j);
      if (!of.p_.log_prior && !uncoded) return;
      atoms.log_prior = log_prior;
      for (int64_t j = 0; j < n; ++j) {
        log_prior[j] = float(of.exact_.log_prior(n0 + j));
        unknown |= of.in_.uncoded(n0 + j) && atoms.size[j] == 0 && !of.exact_.masked(n0 + j);
      }
    }
  };

  // Bounds of the n atoms that are left of chunk c for query i.
  void bound(int64_t i, int64_t c, int64_t n, const Known& known, bool whole = false) {
    const int64_t from = at(i, c);
    Cell& out = cell(i, c);
    out.count = int32_t(n);
    float mid[screen_chunk];  // of use for few: `promising` has them again
    kernels().screen.bounds(q_[i].bound, known.atoms, whole ? nullptr : picks_ + from, c_ + from, n,
                            mid, up_ + from, &out.mid, &out.up);
  }

  // Drops what lies below the best known logit less the gap.
  void screen() {
    std::vector<std::pair<float, int32_t>> gone(Q_ * chunks_);
    each_chunk([&](int64_t c) {
      for (int64_t i = 0; i < Q_; ++i) {
        Cell& here = cell(i, c);
        const int64_t to = at(i, c), n = here.count;
        if (n == 0 || !sparse_[i]) continue;
        const float below = std::nextafter(float(q_[i].least()), -INFINITY);
        if (here.up < below) {
          gone[i * chunks_ + c] = {here.up, int32_t(n)};
          here.count = 0;
          continue;
        }
        uint8_t pick[screen_chunk];
        float largest;
        here.count = int32_t(kernels().screen.keep(up_ + to, n, below, pick, &largest));
        for (int64_t j = 0; j < here.count; ++j) {
          picks_[to + j] = picks_[to + pick[j]];
          c_[to + j] = c_[to + pick[j]];
          up_[to + j] = up_[to + pick[j]];
        }
        gone[i * chunks_ + c] = {largest, int32_t(n - here.count)};
      }
    });
    for (int64_t i = 0; i < Q_; ++i)
      for (int64_t c = 0; c < chunks_; ++c)
        q_[i].drop(gone[i * chunks_ + c].first, gone[i * chunks_ + c].second);
  }

  // Leaves out the lightest of what is left, as many as may go: gap allows for all N atoms at its
  // edge.
  void trim(int64_t i) {
    constexpr int buckets = 256;  // by distance from the best, in quarters
    constexpr double width = 0.25;
    Asked& q = q_[i];
    const auto bucket = [&](float up) {
      const double below = (q.best - up - q.margin) / q.variance / width;
      return below > 0 ? int(std::min(below, buckets - 1.0)) : 0;  // nan: 0
    };
    int64_t counts[buckets] = {};
    for (int64_t c = 0; c < chunks_; ++c)
      for (int64_t j = 0; j < cell(i, c).count; ++j) ++counts[bucket(up_[at(i, c) + j])];
    double room = double(p_.N) * std::exp(-q.gap / q.variance) * (1 - 1e-6) - dropped(i);
    int cut = buckets;
    for (; cut > 1; --cut) {
      const double mass = double(counts[cut - 1]) * std::exp(-width * (cut - 1));
      if (mass > room) break;
      room -= mass;
      q.drop(q.best - width * (cut - 1) * q.variance - q.margin, counts[cut - 1]);
    }
    for (int64_t c = 0; c < chunks_; ++c) {
      int32_t kept = 0;
      const int64_t from = at(i, c);
      for (int64_t j = 0; j < cell(i, c).count; ++j)
        if (bucket(up_[from + j]) < cut) picks_[from + kept++] = picks_[from + j];
      cell(i, c).count = kept;
    }
  }

  // The exact logits of the most promising atoms of every query: k by the middle of what their
  // logits may be, which is right in much noise, and k by the upper end, which is right where the
  // query almost is an atom.
  void improve() {
    each(Q_, 1 << 20, [&](int64_t i) {
      if (!sparse_[i]) return;
      std::vector<int64_t> atoms;
      promising(i, &Cell::mid, atoms);
      promising(i, &Cell::up, atoms);
      std::sort(atoms.begin(), atoms.end());
      atoms.erase(std::unique(atoms.begin(), atoms.end()), atoms.end());
      if (int64_t(atoms.size()) < k_) return;
      std::vector<double> logits, y;
      for (const int64_t atom : atoms) {
        exact_.read(atom, y);
        logits.push_back(exact_(q_[i], atom, y));
      }
      std::nth_element(logits.begin(), logits.begin() + (k_ - 1), logits.end(), std::greater<>());
      q_[i].best = std::max(q_[i].best, logits[k_ - 1]);
    });
  }
  // The k atoms that are left for which `by` is largest: from no more than k chunks.
  void promising(int64_t i, float Cell::* largest, std::vector<int64_t>& atoms) const {
    std::vector<std::pair<float, int64_t>> chunks, best;
    for (int64_t c = 0; c < chunks_; ++c)
      if (cell(i, c).count) chunks.emplace_back(cell(i, c).*largest, c);
    const int64_t some = std::min<int64_t>(k_, int64_t(chunks.size()));
    std::partial_sort(chunks.begin(), chunks.begin() + some, chunks.end(), std::greater<>());
    for (int64_t n = 0; n < some; ++n) {
      const int64_t c = chunks[n].second, from = at(i, c);
      const int64_t count = cell(i, c).count;
      const Known known(*this, c, q_[i].level);
      float mid[screen_chunk], up[screen_chunk];
      Cell found;
      kernels().screen.bounds(q_[i].bound, known.atoms, picks_ + from, c_ + from, count, mid, up,
                              &found.mid, &found.up);
      const float* by = largest == &Cell::mid ? mid : up;
      for (int64_t j = 0; j < count; ++j)
        best.emplace_back(by[j], c * screen_chunk + picks_[from + j]);
    }
    const int64_t k = std::min<int64_t>(k_, int64_t(best.size()));
    std::partial_sort(best.begin(), best.begin() + k, best.end(), std::greater<>());
    for (int64_t j = 0; j < k; ++j) atoms.push_back(best[j].second);
  }

  const ExactLogits<T>& exact_;
  const Problem<T>& p_;
  const Index& in_;
  const Costs& costs_;
  const int64_t k_, Q_, chunks_;
  std::vector<Asked> q_;
  std::vector<uint8_t> sparse_;
  std::atomic<bool> unknown_{false};  // seen in some chunk
  float *c_, *up_;                    // [Q, chunks, screen_chunk], the survivors of a chunk first
  uint8_t* picks_;
  std::array<uint8_t, screen_chunk> each_;  // 0, 1, 2, ..
  std::vector<Cell> cells_;
};

}  // namespace dfk
