// Roughly where the middle of a cloud is: the mean of some rows, without those that are far out.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace dfk {

template <class T>
struct Centre {
  std::vector<T> mean;
  double square = 0;  // the mean of the squared norms
};

// |row|^2.
template <class T>
double square_norm(const std::vector<T>& row) {
  double sum[8] = {}, square = 0;  // one chain of additions would wait for itself
  for (size_t k = 0; k < row.size(); ++k) sum[k % 8] += double(row[k]) * row[k];
  for (const double s : sum) square += s;
  return square;
}

// Which rows have a squared norm of at most `limit`, and of at most 64 times the quantile `rank` of
// such norms. A row that has not, or is not finite, is a fill value or the like, and no reason to
// move the origin towards it.
inline std::vector<int64_t> ordinary_rows(const std::vector<double>& squares, double limit,
                                          double rank) {
  std::vector<double> sorted;
  for (const double s : squares)
    if (s <= limit) sorted.push_back(s);
  if (sorted.empty()) return {};
  const auto typical = sorted.begin() + int64_t(rank * double(sorted.size()));
  std::nth_element(sorted.begin(), typical, sorted.end());
  std::vector<int64_t> out;
  for (size_t i = 0; i < squares.size(); ++i)
    if (squares[i] <= limit && squares[i] <= 64 * *typical) out.push_back(int64_t(i));
  return out;
}

// The centre of the ordinary rows among `count` rows of d numbers; read(i, row) gives the i-th as
// T.
template <class T, class Read>
Centre<T> centre_of_rows(int64_t count, int64_t d, double limit, double rank, const Read& read) {
  std::vector<T> row(d);
  std::vector<double> squares(count);
  for (int64_t i = 0; i < count; ++i) {
    read(i, row.data());
    squares[i] = square_norm(row);
  }
  const std::vector<int64_t> rows = ordinary_rows(squares, limit, rank);
  Centre<T> out{std::vector<T>(d), 0};
  const T part = T(1) / T(std::max<size_t>(rows.size(), 1));
  for (const int64_t i : rows) {
    read(i, row.data());
    for (int64_t k = 0; k < d; ++k) out.mean[k] += row[k] * part;
    out.square += squares[i] * double(part);
  }
  return out;
}

}  // namespace dfk
