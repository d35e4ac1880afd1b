// The log_priors of a run of atoms, looked at and added up while they are in the cache.
#pragma once
#include "simd/problem.h"
#include "simd/vec.h"

namespace {

using namespace dfk;

template <class T>
PriorSum<T> prior_sum(const T* l, int64_t n) {
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
  PriorSum<T> out{max_lanes<T>(largest), 0, n - whole - W<T>,
                  true};  // the padding counted as masked
  for (int i = 0; i < W<T>; ++i) {
    out.masked += int64_t(masked[i]);
    out.usable = out.usable && usable[i];
  }
  if (!(out.top > -inf)) return out;

  for (int64_t j = 0; j < whole;) {  // 32 terms of a lane at a time, as everywhere
    Vec<T> part{};
    for (const int64_t end = j + 32 * W<T> < whole ? j + 32 * W<T> : whole; j < end; j += W<T>)
      part += vexp(load(l + j) - out.top);
    out.mass += total<T>(part);
  }
  out.mass += total<T>(vexp(rest - out.top));
  return out;
}

}  // namespace
