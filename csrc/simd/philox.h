// The noise of draw, from a counter: Philox4x32-10 (Salmon et al., 2011). dfkernels/ops/draw says
// what the counters mean.
#pragma once
#include <stdint.h>

#include "simd/vec.h"

namespace {

// Writes the four words of a counter.
inline void philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                   uint32_t* words) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53) * c0, b = uint64_t(0xCD9E8D57) * c2;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c3 = uint32_t(a);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// Exponential noise is at least this: -log u >= 1 - u.
inline constexpr double least_noise = 0x1p-33;

// The words that a query has for the numbers 4 group, ..., 4 group + 3.
DFK_INLINE void noise_words(uint64_t seed, int64_t query, int64_t group, uint32_t stage,
                            uint32_t* words) {
  philox(seed, uint32_t(group), uint32_t(query), uint32_t(uint64_t(query) >> 32), stage, words);
}

// A race is Gumbel-max by another scale: candidate k, of weight S_k and with exponential noise E_k,
// arrives at the time E_k / S_k, and argmax(log S_k - log E_k) comes first. The time at which one
// of this weight arrives, if that is before `least`, else `least`.
DFK_INLINE double arrival(uint32_t word, double weight, double least) {
  const double u = (double(word) + 0.5) * 0x1p-32, limit = least * weight;
  if (!(1 - u < limit)) return least;  // -log u >= 1 - u
  const double noise = -__builtin_log(u);
  return noise < limit ? noise / weight : least;
}

}  // namespace
