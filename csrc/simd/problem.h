// What a kernel is asked to do, and what it leaves behind: plain data, shared by the bindings and
// by every instruction-set build of the kernels. No torch and no C++ library header may be included
// here (see simd/kernels.cpp).
#pragma once
#include <stdint.h>

#include "certified/kernels.h"
#include "generated/constants.h"

namespace dfk {

inline constexpr int64_t block = query_group;

enum class Storage : int { f32, f64, bf16, f16, u8 };

// Which moments of the atoms are gathered. With e_i the unnormalised weight of atom i and t_i = y_i
// - r:
//   posterior  sum e |t|^2               matvec  sum e <t, v_k> t   for k < K
//   diagonal   sum e t * t (elementwise) dense   sum e t t^T
enum class Op : int { posterior, matvec, diagonal, dense };

template <class T>
struct Problem {
  const T* x;           // [B, d]
  const void* y;        // [N, d], rows ldy elements apart; the real atoms are scale * y + offset
  const T* v;           // [B, K, d], matvec only
  const T* alpha;       // [B]
  const T* sigma;       // [B]
  const T* log_prior;   // [N] or null (uniform)
  const T* centre;      // [d] or null (zero): roughly the middle of the atoms
  const int64_t* rows;  // [N] or null (all): atom i is row rows[i] of y and log_prior
  const int64_t*
      order;  // [B] or null (as they are): the kernels' query i is query order[i] of the batch
  const uint8_t*
      wanted;   // [N] or null (all): bit j says whether query j of the block counts atom i
  T prior_top;  // the largest log_prior, taken off it
  double scale, offset;
  int64_t B, N, d, K, ldy;
  Storage storage;
  Op op;
};

// Partial sums over the atoms of one split, per query. All moments are taken about the row y[ref],
// or about the origin where ref = -1, and all weights are relative to exp(top): associative, so
// splits merge in any grouping. first and second have rows of `stride` elements (d rounded up to
// whole vectors, the rest zero); they are double because a mean near zero is the small remainder of
// large terms.
template <class T>
struct Moments {
  double* top;     // [S, B]     largest logit seen, -inf where none
  double* mass;    // [S, B]     sum e
  double* mass2;   // [S, B]     sum e^2
  double* spread;  // [S, B]     sum e |t|^2                 (posterior)
  double* tilt;    // [S, B, K]  sum e <t, v_k>              (matvec)
  double*
      outlier;    // [S, B]    largest logit of an atom too far out to be evaluated, -inf where none
  int64_t* ref;   // [S, B]     a row of y
  double* first;  // [S, B, stride]           sum e t
  double* second;  // [S, B, rows, stride]     matvec: rows = K; diagonal: 1; dense: d; posterior: 0
  int64_t stride, rows;
};

// One step of transport_chain, x being x - alpha centre: x <- keep x + pull mean, and
// A <- (identity I + spread C) A, or transposed A <- A + A^T (identity I + spread C).
template <class T>
struct ChainStep {
  T alpha, half;  // half = 1 / 2 sigma^2
  T keep, pull, identity, spread;
};

// B chains of M steps over the atoms less their centre; everything contiguous.
template <class T>
struct Chains {
  T* x;                // [B, d], from start to end
  T* jacobian;         // [B, d, d], |A|_F = sqrt(d)
  T* log_norm;         // [B]
  const T* y;          // [N, d]
  const T* log_prior;  // [N]
  const ChainStep<T>* steps;
  int64_t B, N, d, M;
  bool transposed;
};

enum Status : int { ok = 0, non_finite_atom = 1, out_of_memory = 2 };

// Squares of up to four times this size can be added up in T. Atoms that are further than its root
// from the centre are outliers: left out where they carry no weight, an error where they do.
template <class T>
inline constexpr double largest_square = sizeof(T) == 4 ? 0x1p124 : 0x1p980;

// What a run of log_priors tells: the largest; sum exp(log_prior - top); how many are -inf; whether
// all are numbers below inf.
template <class T>
struct PriorSum {
  T top;
  double mass;
  int64_t masked;
  bool usable;
};

// One instruction set's kernels.
template <class T>
struct Kernels {
  int64_t lanes;  // elements of T in a vector
  // Gathers the moments of queries [b0, b1) over atoms [n0, n1) into split s.
  int (*gather)(const Problem<T>&, const Moments<T>&, int64_t s, int64_t b0, int64_t b1, int64_t n0,
                int64_t n1);
  // Merges the S splits of query b (of the batch) into split 0.
  int (*merge)(const Problem<T>&, const Moments<T>&, int64_t S, int64_t b);
  // Row `ref` of y as T, scaled, or the centre where ref = -1, into out[0, d).
  void (*read_reference)(const Problem<T>&, int64_t ref, T* out);
  // One row of endpoint_matvec; false where a result is not finite.
  bool (*endpoint)(bool centred, const T* v, const T* x0, const T* mean, int64_t d, double ratio,
                   double precision, T* out);
  // |x - sigma eps|^2.
  double (*residual_square)(const T* x, const T* eps, T sigma, int64_t d);
  // Chains [b0, b1), in groups of chain_lanes.
  int (*transport)(const Chains<T>&, int64_t b0, int64_t b1);
  PriorSum<T> (*prior_sum)(const T* log_prior, int64_t n);
  int64_t chain_lanes;
};

struct KernelTable {
  const char* isa;
  Kernels<float> f32;
  Kernels<double> f64;
  CertifiedKernels certified;
  double (*exp_rate)(int64_t repeats);  // how many float exps were done: the probe times it
};

}  // namespace dfk
