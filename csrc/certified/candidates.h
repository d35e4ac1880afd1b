// The candidates of a group of queries, in chunks of atoms.
#pragma once
#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <vector>

#include "certified/kernels.h"
#include "host/tensors.h"

namespace dfk {

// Memory that a thread keeps from call to call, unless it is much: touching it anew would cost as
// much as the coarse level. 9 bytes for each pair of a query of the group and an atom.
struct Workspace {
  std::vector<float> floats;
  std::vector<uint8_t> picks;

  static Workspace& of_this_thread() {
    static thread_local Workspace workspace;
    return workspace;
  }
  void shrink() {
    constexpr size_t largest = 8 << 20;
    if (floats.size() > largest) floats = {}, picks = {};
  }
};

class Candidates {
 public:
  // What is left of a chunk for a query: how many atoms, and the largest of their logits'
  // estimates and upper bounds.
  struct Cell {
    int32_t count;
    float largest_estimate, largest_upper;
  };

  Candidates(int64_t queries, int64_t N, Workspace& workspace)
      : chunks((N + chunk_size - 1) / chunk_size), cells_(queries * chunks) {
    const size_t n = size_t(queries * chunks * chunk_size);
    if (workspace.picks.size() < n) workspace.floats.resize(2 * n), workspace.picks.resize(n);
    products_ = workspace.floats.data(), upper_ = products_ + n;
    picks_ = workspace.picks.data();
    std::iota(all_.begin(), all_.end(), 0);
  }

  const int64_t chunks;

  // f(c) for every chunk, in parallel.
  template <class F>
  void each_chunk(const F& f) const {
    const int64_t tasks = std::min<int64_t>(chunks, 64);
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        for (int64_t c = t; c < chunks; c += tasks) f(c);
    });
  }

  Cell& cell(int64_t i, int64_t c) { return cells_[i * chunks + c]; }
  const Cell& cell(int64_t i, int64_t c) const { return cells_[i * chunks + c]; }
  // Of query i in chunk c, the candidates first: approximate <z, t>, upper bounds of logits, places
  // in the chunk.
  float* products(int64_t i, int64_t c) { return products_ + offset(i, c); }
  float* upper(int64_t i, int64_t c) { return upper_ + offset(i, c); }
  uint8_t* picks(int64_t i, int64_t c) { return picks_ + offset(i, c); }
  const float* products(int64_t i, int64_t c) const { return products_ + offset(i, c); }
  const uint8_t* picks(int64_t i, int64_t c) const { return picks_ + offset(i, c); }
  int64_t query_stride() const { return chunks * chunk_size; }

  // Makes all atoms of a chunk candidates of query i.
  void take_all(int64_t i, int64_t c) { std::memcpy(picks(i, c), all_.data(), chunk_size); }

  // Drops all candidates but those with the n places `stay`, in order.
  void keep_only(int64_t i, int64_t c, const uint8_t* stay, int64_t n) {
    float *product = products(i, c), *bound = upper(i, c);
    uint8_t* pick = picks(i, c);
    for (int64_t j = 0; j < n; ++j) {
      pick[j] = pick[stay[j]];
      product[j] = product[stay[j]];
      bound[j] = bound[stay[j]];
    }
    cell(i, c).count = int32_t(n);
  }

  int64_t count(int64_t i) const {
    int64_t sum = 0;
    for (int64_t c = 0; c < chunks; ++c) sum += cell(i, c).count;
    return sum;
  }
  // The atoms' numbers, in order: out[0, count(i)).
  void write(int64_t i, int64_t* out) const {
    for (int64_t c = 0; c < chunks; ++c)
      for (int64_t j = 0; j < cell(i, c).count; ++j) *out++ = c * chunk_size + picks(i, c)[j];
  }

 private:
  int64_t offset(int64_t i, int64_t c) const { return (i * chunks + c) * chunk_size; }

  std::vector<Cell> cells_;
  float *products_, *upper_;
  uint8_t* picks_;
  std::array<uint8_t, chunk_size> all_;  // 0, 1, 2, ..
};

}  // namespace dfk
