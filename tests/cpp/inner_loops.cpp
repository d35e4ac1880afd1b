// Compares the inner loops (csrc/simd/dots.h) with plain loops in double, for shapes with and
// without remainders. Prints what differs; the exit status says whether anything does.
#include <math.h>
#include <stdio.h>

#include <vector>

#include "simd/dots.h"

namespace {

int wrong = 0;

// got is a sum of `terms` terms whose sizes add up to `size`: each addition rounds once.
template <class T>
void expect(const char* what, double got, double want, double size, int64_t terms) {
  const double epsilon = sizeof(T) == 4 ? 1.2e-7 : 2.3e-16;
  if (fabs(got - want) <= epsilon * double(terms + 8) * size) return;
  if (++wrong < 20) printf("%s, %d bytes: %.9g instead of %.9g\n", what, int(sizeof(T)), got, want);
}

template <class T>
struct Numbers {
  std::vector<T> all;
  int64_t ld;
  Numbers(int64_t rows, int64_t columns, int64_t ld, unsigned seed)
      : all(rows * ld + W<T>), ld(ld) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = 0; k < columns; ++k) {
        seed = seed * 1664525u + 1013904223u;
        row(i)[k] = T(double(seed >> 8) / (1 << 23) - 1);
      }
  }
  T* row(int64_t i) { return all.data() + i * ld; }
  std::vector<T*> rows(int64_t count) {
    std::vector<T*> out;
    for (int64_t i = 0; i < count; ++i) out.push_back(row(i));
    return out;
  }
};

template <class T>
struct Case {
  int64_t count, n, d, width, padded;
  Numbers<T> q, y, weight;
  std::vector<T> row_panels, cols;

  Case(int64_t count, int64_t n, int64_t d)
      : count(count),
        n(n),
        d(d),
        width(round_up(d, W<T>)),
        padded(round_up(n, W<T>)),
        q(count, d, width + W<T>, 1),
        y(n, d, width + W<T>, 2),
        weight(count, n, padded, 3),
        row_panels(n * width),
        cols(padded * width) {
    pack<T>({y.row(0), y.ld}, n, width, row_panels.data(), cols.data());
  }

  void check_dots(bool packed) {
    Numbers<T> out(count, 0, padded, 0), norm(1, 0, padded, 0);
    const std::vector<T*> from = q.rows(count);
    dots<T>(count, from.data(), {y.row(0), y.ld}, packed ? cols.data() : nullptr, n, width,
            out.row(0), out.ld, norm.row(0));
    for (int64_t j = 0; j < n; ++j) {
      double square = 0;
      for (int64_t k = 0; k < d; ++k) square += double(y.row(j)[k]) * y.row(j)[k];
      expect<T>("norm", norm.row(0)[j], square, square, d);
      for (int64_t i = 0; i < count; ++i) {
        double dot = 0, size = 0;
        for (int64_t k = 0; k < d; ++k) {
          const double term = double(q.row(i)[k]) * y.row(j)[k];
          dot += term, size += fabs(term);
        }
        expect<T>(packed ? "dots of panels" : "dots", out.row(i)[j], dot, size, d);
      }
    }
  }

  void check_distances() {
    Numbers<T> out(count, 0, padded, 0);
    const std::vector<T*> x = q.rows(count), to = out.rows(count), rows = y.rows(n);
    const std::vector<T> alpha(count, T(0.75));
    std::vector<double> by_rows(n);
    distance_cols<T>(count, x.data(), alpha.data(), cols.data(), padded, width, to.data());
    for (int64_t i = 0; i < count; ++i) {
      distances<T>(x[i], alpha[i], rows.data(), n, width, by_rows.data());
      for (int64_t j = 0; j < n; ++j) {
        double square = 0, size = 0;  // a difference is rounded as its terms are
        for (int64_t k = 0; k < d; ++k) {
          const double u = x[i][k] - 0.75 * double(rows[j][k]);
          square += u * u, size += fabs(u) * (fabs(x[i][k]) + fabs(rows[j][k]));
        }
        expect<T>("distances", by_rows[j], square, size, 16);
        expect<T>("distances of panels", to[i][j], square, size, d);
      }
    }
  }

  template <bool SQUARE>
  void check_sums(bool packed) {
    Numbers<T> out(count, width, width, 4);
    const Numbers<T> before = out;
    const std::vector<T*> from = weight.rows(count), to = out.rows(count);
    weighted_sums<T, SQUARE>(
        count, from.data(),
        {y.row(0), y.ld, packed ? row_panels.data() : nullptr, packed ? nullptr : y.row(0)}, n,
        width, to.data());
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < width; ++k) {
        double sum = before.all[i * width + k], size = fabs(sum);
        for (int64_t j = 0; j < n; ++j) {
          const double value = y.row(j)[k],
                       term = weight.row(i)[j] * (SQUARE ? value * value : value);
          sum += term, size += fabs(term);
        }
        expect<T>(packed ? "sums of panels" : "sums", to[i][k], sum, size, n);
      }
  }
};

template <class T>
void check_all() {
  for (const int64_t count : {1, 3, 4, 7, 8, 15, 32})
    for (const int64_t n : {1, 5, 16, 50, 131})
      for (const int64_t d : {1, 17, 40, 128, 200}) {
        Case<T> some(count, n, d);
        for (const bool packed : {false, true}) {
          some.check_dots(packed);
          some.template check_sums<false>(packed);
          some.template check_sums<true>(packed);
        }
        some.check_distances();
      }
  for (double x = 0; x > -80; x -= 0.37) {
    const double got = vexp(all(T(x)))[W<T> - 1], want = exp(double(T(x)));
    expect<T>("exp", got, want, want, 0);
  }
}

}  // namespace

int main() {
  check_all<float>();
  check_all<double>();
  printf("%d wrong\n", wrong);
  return wrong != 0;
}
