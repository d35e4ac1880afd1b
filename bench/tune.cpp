// Rates of the inner loops (csrc/simd/dots.h) for the candidate shapes of a block, on one core, as
// a share of its multiply-add peak: what csrc/simd/blocking.h was chosen by. Printed by `python -m
// bench.tune`.
#include <algorithm>
#include <cstdio>
#include <ctime>
#include <vector>

#include "simd/dots.h"

namespace {

// Of this thread alone: others may use the machine.
double seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// Multiply-adds a second of f(), which does so many; the best of several runs.
template <class F>
double rate(double multiply_adds, const F& f) {
  double best = 1e9;
  const int repeats = 1 + int(5e7 / multiply_adds);
  for (int attempt = 0; attempt < 7; ++attempt) {
    const double start = seconds();
    for (int r = 0; r < repeats; ++r) {
      f();
      asm volatile("" ::: "memory");
    }
    best = std::min(best, (seconds() - start) / repeats);
  }
  return multiply_adds / best;
}

double peak() {
  constexpr int chains = 10;  // multiply-adds under way at a time, with 16 registers
  const int64_t steps = 100000;
  return rate(double(chains) * W<float> * steps, [&] {
    Vec<float> sum[chains] = {}, x = all(1.0f), y = all(1e-9f);
    asm volatile("" : "+m"(x), "+m"(y));
    for (int64_t i = 0; i < steps; ++i)
      for (int c = 0; c < chains; ++c) sum[c] += x * y;
    for (const Vec<float>& s : sum) asm volatile("" ::"m"(s));
  });
}

// 32 queries against a tile of n atoms of d coordinates.
struct Data {
  static constexpr int64_t queries = 32, n = 144, d = 768;
  std::vector<float> x, y, out;
  Data() : x(queries * (d + 16), 0.5f), y(n * d, 0.25f), out(queries * d) {}
  template <class F>
  double of(const F& f) {
    return rate(double(queries) * n * d, f);
  }
};

template <int Q, int V>
void print_product(double peak) {
  Data data;
  const float* x[Data::queries];
  float* out[Data::queries];
  for (int64_t i = 0; i < Data::queries; ++i)
    x[i] = data.x.data() + i * (Data::d + 16), out[i] = data.out.data() + i * Data::d;
  constexpr int64_t wide = V * W<float>;
  const double found = data.of([&] {
    for (int64_t k = 0; k < Data::d; k += slab)
      for (int64_t j = 0; j + wide <= Data::n; j += wide)
        for (int64_t i = 0; i + Q <= Data::queries; i += Q)
          product_block<float, Q, V>(x + i, data.y.data() + j * Data::d, wide, k, k + slab,
                                     dot_chain, k > 0, out + i, j);
  });
  const double done =
      double(Data::queries / Q * Q) * double(Data::n / wide * wide) / (Data::queries * Data::n);
  printf("  product %d x %d %5.1f GFMA/s %4.0f %%%s\n", Q, V, found * done * 1e-9,
         100 * found * done / peak, Q == block.queries && V == block.vectors ? "  chosen" : "");
}

template <int Q, int R>
void print_rows(double peak) {
  Data data;
  const float* x[Data::queries];
  for (int64_t i = 0; i < Data::queries; ++i) x[i] = data.x.data() + i * (Data::d + 16);
  const double found = data.of([&] {
    for (int64_t i = 0; i + Q <= Data::queries; i += Q)
      dot_some<float, Q, R, false>(x + i, data.y.data(), Data::d, Data::n / R * R, Data::d,
                                   data.out.data(), Data::n, nullptr);
  });
  const double done =
      double(Data::queries / Q * Q) * double(Data::n / R * R) / (Data::queries * Data::n);
  printf("  rows    %d x %d %5.1f GFMA/s %4.0f %%%s\n", Q, R, found * done * 1e-9,
         100 * found * done / peak, Q == block.row_queries && R == block.rows ? "  chosen" : "");
}

}  // namespace

int main() {
  const double most = peak();
  printf("  peak          %5.1f GFMA/s\n", most * 1e-9);
  print_product<3, 3>(most), print_product<4, 2>(most), print_product<4, 3>(most);
  print_product<6, 2>(most), print_product<3, 4>(most), print_product<8, 2>(most);
  print_product<8, 3>(most), print_product<6, 4>(most), print_product<12, 2>(most);
  print_rows<4, 2>(most), print_rows<4, 3>(most), print_rows<4, 4>(most), print_rows<8, 3>(most);
}
