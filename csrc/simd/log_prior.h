// The log_priors of a run of atoms, looked at and added up while they are in the cache.
#pragma once
#include "simd/problem.h"
#include "simd/vec.h"

namespace {

using namespace dfk;

template <class T>
LogPriorSum<T> log_prior_sum(const T* l, int64_t n) {
  const T inf = T(__builtin_inf());
  const int64_t whole = n / W<T> * W<T>;
  Vec<T> rest = all(-inf);  // the last, incomplete vector
  for (int64_t j = whole; j < n; ++j) rest[j - whole] = l[j];

  Vec<T> largest = all(-inf);
  IntVec<T> masked{}, usable = IntVec<T>{} - 1;
  const auto look = [&](Vec<T> v) {
    largest = larger<T>(v, largest);
    masked -= v == all(-inf);  // a comparison is 0 or -1
    usable &= v < all(inf);
  };
  for (int64_t j = 0; j < whole; j += W<T>) look(load(l + j));
  look(rest);
  LogPriorSum<T> out{.max = max_lanes<T>(largest),
                     .sum = 0,
                     .masked = n - whole - W<T>,
                     .usable = true};  // the padding counted as masked
  for (int i = 0; i < W<T>; ++i) {
    out.masked += int64_t(masked[i]);
    out.usable = out.usable && usable[i];
  }
  if (!(out.max > -inf)) return out;

  for (int64_t j = 0; j < whole;) {  // 32 terms of a lane at a time, as everywhere
    Vec<T> part{};
    for (const int64_t end = j + 32 * W<T> < whole ? j + 32 * W<T> : whole; j < end; j += W<T>)
      part += vexp(load(l + j) - out.max);
    out.sum += total<T>(part);
  }
  out.sum += total<T>(vexp(rest - out.max));
  return out;
}

}  // namespace
