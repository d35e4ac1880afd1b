// What a kernel is asked to do, and what it leaves behind: plain data, shared by the bindings and
// by the kernels of every instruction set. No torch and no C++ library header may be included here
// (see simd/kernels.cpp).
#pragma once
#include <stdint.h>

#include "certified/kernels.h"
#include "generated/constants.h"     // written by _build/native.py
#include "generated/moment_kinds.h"  // written by _build/native.py

namespace dfk {

enum class Storage : int { f32, f64, bf16, f16, u8 };

// Which second moments of the atoms are added up; each kind is a header in moments/.
#define DFK_NAME(name, Name) name,
enum class MomentKind : int { DFK_MOMENT_KINDS(DFK_NAME) };
#undef DFK_NAME

// Rows of P numbers that belong to the atoms, as they are stored; none where `at` is null.
struct Values {
  const void* at = nullptr;  // [N, P], rows row_stride elements apart
  int64_t P = 0, row_stride = 0;
  Storage storage = Storage::f32;
};

template <class T>
struct Problem {
  const T* x;          // [B, d]
  const void* y;       // [N, d], rows row_stride elements apart; an atom is scale * y + offset
  const T* v;          // [B, K, d], for kinds that project on vectors, else null
  const T* alpha;      // [B]
  const T* sigma;      // [B]
  const T* log_prior;  // [N] or null (uniform)
  const T* centre;     // [d] or null (zero): roughly the middle of the atoms
  // [N] or null (all): atom i is row atom_rows[i] of y and of log_prior.
  const int64_t* atom_rows;
  // [B] or null (as they are): the kernels' query i is query query_order[i] of the batch.
  const int64_t* query_order;
  // [N] or null (all): bit q says whether query q of the group has atom i in its list.
  const uint8_t* listed_by;
  T max_log_prior;  // the largest log_prior, taken off it
  double scale, offset;
  int64_t B, N, d, K, row_stride;
  Storage storage;
  MomentKind kind;
  const int64_t* queries = nullptr;  // [B], for draw: the numbers of the queries in their noise
  uint64_t seed = 0;
  Values values = {};  // for average
};

// draw's first stage for one query: of the blocks of draw_block rows, each arrives at some time,
// and the first wins (simd/race.h). Weights are relative to exp(max_logit), and times to its
// inverse.
struct BlockRace {
  double least;    // the earliest time so far
  int64_t winner;  // whose it is, or -1
  int64_t block;   // the block whose weights are being added up, or -1
  double weight;   // their sum so far
  int64_t group;   // words are the noise of blocks 4 group, ..., 4 group + 3
  uint32_t words[4];
};

// Sums over the atoms of one split, per query. With e the weights relative to exp(max_logit) and t
// an atom less the reference, which is row `reference` of y, or the centre where that is -1. Splits
// merge in any grouping. first_moment and second_moment have rows of `stride` elements (d, or the
// P of values, rounded up to whole vectors, the rest zero); they are double because a mean near
// zero is the small remainder of large terms.
template <class T>
struct Moments {
  double* max_logit;          // [S, B]     -inf where no atom was seen
  double* weight_sum;         // [S, B]     sum e
  double* weight_square_sum;  // [S, B]     sum e^2
  double* square_moment;      // [S, B]     sum e |t|^2, where the kind needs it
  double* projection_sum;     // [S, B, K]  sum e <t, v_k>
  double* outlier_logit;  // [S, B]     the largest of an atom too far out to be evaluated, or -inf
  int64_t* reference;     // [S, B]
  double* first_moment;   // [S, B, first_rows, stride]   sum e t; of values sum e values
  double* second_moment;  // [S, B, second_rows, stride]  what the kind says
  BlockRace* race;        // [S, B], for draw, else null
  int64_t width;          // d rounded up to whole vectors: of rows of atoms
  int64_t stride;
  int64_t first_rows, second_rows;  // 1, or 0 for a kind without first moments; what the kind says

  int64_t rows() const { return first_rows + second_rows; }
};

// Variances of a mixture's components, in the order of y: one row for all or one for each, of one
// number for all coordinates or one for each. `usual`: one of a common size.
template <class T>
struct Variances {
  const T* at;  // [rows, columns]
  int64_t rows, columns;
  double usual;
};

// Sums over a mixture's components, per split and query, with e the weights relative to
// exp(max_logit), s the components' scores, m what they say of x_0's mean, and K vectors v. Logits
// are less log tau_0 for every coordinate, tau_0 that of the usual variance, where components have
// variances of their own; else less log tau.
template <class T>
struct MixtureSums {
  double* scalars;     // [S, B, 5 + K]: max_logit, sum e, sum e^2, sum e/tau^2 (of a number for
                       // each), sum e |s - reference|^2 (of posterior), sum e <s - reference, v_k>
  double* rows_at;     // [S, B, rows, stride]
  double* references;  // [S, B, stride]: a score, about which sums are taken
  int64_t B, K, rows, stride;
  // The rows of `vectors`: sum e (s - reference), then those of which the number is not -1:
  // sum e m; sum e/tau^2 of a diagonal for each; and sum e (s - reference)^2, or with vectors
  // sum e <s - reference, v_k> (s - reference).
  int64_t mean, precision, second;

  double* max_logit(int64_t s, int64_t b) const { return scalars + (5 + K) * (s * B + b); }
  double* weight_sum(int64_t s, int64_t b) const { return max_logit(s, b) + 1; }
  double* weight_square_sum(int64_t s, int64_t b) const { return max_logit(s, b) + 2; }
  double* precision_sum(int64_t s, int64_t b) const { return max_logit(s, b) + 3; }
  double* square_sum(int64_t s, int64_t b) const { return max_logit(s, b) + 4; }
  double* projection_sum(int64_t s, int64_t b) const { return max_logit(s, b) + 5; }
  double* first(int64_t s, int64_t b) const { return rows_at + (s * B + b) * rows * stride; }
  double* row(int64_t s, int64_t b, int64_t r) const { return first(s, b) + r * stride; }
  double* reference(int64_t s, int64_t b) const { return references + (s * B + b) * stride; }
};

// What is kept between the two phases of products with the covariance (simd/matvec_phases.h), for
// queries from b0 on and splits of at most `span` atoms, which is a whole number of vectors.
template <class T>
struct MatvecWeights {
  T* rows;         // [queries, S, span, 1 + K]  e, and e <t, v_k>
  double* sums;    // [queries, S, 3 + K]  the logit that e is relative to, the largest, sum e, and
                   //                      sum e <t, v_k>
  uint8_t* unfit;  // [B], of the batch: what both phases leave out
  int64_t b0, splits, span;
};

// What the kernels of first derivatives have beside a Problem, whose v is the kind's own tensor:
// the arguments of dfkernels/ops/common/pair_kernels.py, which has the formulas. Null is zero.
template <class T>
struct PairArguments {
  const double* shift;  // [B], less max_log_prior
  const T* reference;   // [B, d]
  bool forward;         // tangents are given, else cotangents
  const T *h_weight, *h_first, *h_second, *h_weight_square;
  const T *dx, *dv, *dalpha, *dsigma, *dlog_pi;
  const T* dy;  // rows dy_stride apart, of the atoms' values
  int64_t dy_stride;
};

// The sums over the atoms of one split, per query, with t from the query's reference.
//   reverse mode:  scalars sum c, sum c |t|^2, 0, then sum_i e <h_second_k, t> for every k
//                  rows sum c t, then sum e <h_second_k, t> t
//   forward mode:  scalars d weight, the posterior's d second, d weight_square, then K for the
//                  kernel's own use
//                  rows d first, then d second of the other kinds
template <class T>
struct PairOutput {
  double* scalars;  // [S, B, scalar_count]
  double* vectors;  // [S, B, rows, stride]
  int64_t scalar_count, rows, stride;
};

// The gradients of all atoms.
template <class T>
struct AtomGradients {
  T* y;       // [N, d], of the atoms' values, or null
  T* log_pi;  // [N]
  bool add;   // to what is there
};

// One step of transport_chain, x being x - alpha centre: x <- keep x + pull mean, and
// A <- (identity I + covariance C) A, or transposed A <- A + A^T (identity I + covariance C).
template <class T>
struct ChainStep {
  T alpha, half_precision;  // 1 / 2 sigma^2
  T keep, pull, identity, covariance;
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

enum Status : int { ok = 0, non_finite_atom = 1, out_of_memory = 2, unusable_variance = 3 };

// Squares of up to four times this size can be added up in T. Atoms that are further than its root
// from the centre are outliers: left out where they carry no weight, an error where they do.
template <class T>
inline constexpr double largest_square = sizeof(T) == 4 ? 0x1p124 : 0x1p980;

// What one look at a run of log_priors tells.
template <class T>
struct LogPriorSum {
  T max;
  double sum;      // of exp(log_prior - max)
  int64_t masked;  // how many are -inf
  bool usable;     // all are numbers below inf
};

// The kernels of one instruction set.
template <class T>
struct Kernels {
  int64_t lanes;  // elements of T in a vector
  int64_t chain_lanes;
  // Rows of first and of second moments of a query.
  int64_t (*first_rows)(const Problem<T>&);
  int64_t (*second_rows)(const Problem<T>&);
  // Adds up the moments of queries [b0, b1) over atoms [n0, n1) into split s.
  int (*accumulate)(const Problem<T>&, const Moments<T>&, int64_t s, int64_t b0, int64_t b1,
                    int64_t n0, int64_t n1);
  // Merges the splits of query b (of the batch) into split 0.
  int (*merge)(const Problem<T>&, const Moments<T>&, int64_t splits, int64_t b);
  // The same of a mixture's components, and of its splits.
  int (*accumulate_mixture)(const Problem<T>&, const Variances<T>&, const MixtureSums<T>&,
                            int64_t s, int64_t b0, int64_t b1, int64_t n0, int64_t n1);
  int (*merge_mixture)(const Problem<T>&, const MixtureSums<T>&, int64_t splits, int64_t b);
  // Adds up the derivatives of queries [b0, b1) over atoms [n0, n1) into split s.
  int (*pair_sums)(const Problem<T>&, const PairArguments<T>&, const PairOutput<T>&, int64_t s,
                   int64_t b0, int64_t b1, int64_t n0, int64_t n1);
  // How many atoms pair_atoms takes at once for so many queries.
  int64_t (*pair_tile)(const Problem<T>&, int64_t queries);
  // The gradients of atoms [n0, n1) by queries [b0, b1); n0 is a multiple of that tile.
  int (*pair_atoms)(const Problem<T>&, const PairArguments<T>&, const AtomGradients<T>&, int64_t b0,
                    int64_t b1, int64_t n0, int64_t n1);
  // The atom that query b (of the batch) draws of the n <= draw_block at `rows`; -1: out of memory.
  int64_t (*draw_atom)(const Problem<T>&, int64_t b, const int64_t* rows, int64_t n);
  // Row `reference` of y as T, scaled, or the centre where that is -1, into out[0, d).
  void (*read_reference)(const Problem<T>&, int64_t reference, T* out);
  // One row of endpoint_matvec; false where a result is not finite.
  bool (*endpoint)(bool centred, const T* v, const T* x0, const T* mean, int64_t d, double ratio,
                   double precision, T* out);
  // |x - sigma eps|^2.
  double (*residual_square)(const T* x, const T* eps, T sigma, int64_t d);
  // Chains [b0, b1), chain_lanes at a time.
  int (*transport)(const Chains<T>&, int64_t b0, int64_t b1);
  LogPriorSum<T> (*log_prior_sum)(const T* log_prior, int64_t n);
};

// Products with the covariance in two phases: the first n atoms tell which queries are unfit for
// that; then weights and projections, then sums. In float32 alone: mean and sums have to be more
// precise than the terms, or a narrow covariance would lose its digits.
struct MatvecPhases {
  int (*look)(const Problem<float>&, const MatvecWeights<float>&, int64_t b0, int64_t b1,
              int64_t n);
  int (*weigh)(const Problem<float>&, const MatvecWeights<float>&, int64_t s, int64_t b0,
               int64_t b1, int64_t n0, int64_t n1);
  int (*add)(const Problem<float>&, const Moments<float>&, const MatvecWeights<float>&, int64_t s,
             int64_t b0, int64_t b1, int64_t n0, int64_t n1);
};

struct KernelTable {
  const char* isa;
  Kernels<float> f32;
  Kernels<double> f64;
  MatvecPhases matvec_phases;
  CertifiedKernels certified;
  double (*exp_rate)(int64_t repeats);  // how many float exps were done: the probe times it
};

}  // namespace dfk
