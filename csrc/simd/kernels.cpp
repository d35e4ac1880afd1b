// The CPU kernels, compiled once for every instruction set (DFK_ISA). Only plain arithmetic on raw
// pointers: an inline function of the standard library or of torch, instantiated here with wide
// instructions, could be the copy that the linker keeps for the whole process, and crash it on an
// older CPU.
#include "certified/simd.h"
#include "simd/draw_atom.h"
#include "simd/endpoint.h"
#include "simd/log_prior.h"
#include "simd/matvec_phases.h"
#include "simd/mixture_diagonal.h"
#include "simd/mixture_expanded.h"
#include "simd/mixture_sweep.h"
#include "simd/pair_atoms.h"
#include "simd/pair_sweep_expanded.h"
#include "simd/pair_sweep_small_d.h"
#include "simd/sweep_expanded.h"
#include "simd/sweep_lists.h"
#include "simd/sweep_small_d.h"
#include "simd/transport_chain.h"

#define DFK_CAT_(a, b) a##b
#define DFK_CAT(a, b) DFK_CAT_(a, b)
#define DFK_STR_(a) #a
#define DFK_STR(a) DFK_STR_(a)

namespace {

template <class T>
int accumulate(const Problem<T>& p, const Moments<T>& m, int64_t s, int64_t b0, int64_t b1,
               int64_t n0, int64_t n1) {
  if (p.listed_by) return ListSweep<T>(p, m, s, b0, b1).run(n0, n1);
  if (p.d <= small_d && p.values.P <= small_d) return SmallDSweep<T>(p, m, s, b0, b1).run(n0, n1);
  return ExpandedSweep<T>(p, m, s, b0, b1).run(n0, n1);
}

template <class T>
int accumulate_mixture(const Problem<T>& p, const Variances<T>& variances, const MixtureSums<T>& m,
                       int64_t s, int64_t b0, int64_t b1, int64_t n0, int64_t n1) {
  const bool diagonals = variances.rows > 1 && variances.columns > 1;
  if (p.d <= small_d || (diagonals && !levels_are_shared(p, b0, b1)))
    return MixtureSweep<T>(p, variances, m, s, b0, b1).run(n0, n1);
  if (diagonals) return MixtureDiagonalSweep<T>(p, variances, m, s, b0, b1).run(n0, n1);
  return MixtureExpandedSweep<T>(p, variances, m, s, b0, b1).run(n0, n1);
}

// Products with the covariance in two phases.
int look_matvec(const Problem<float>& p, const MatvecWeights<float>& out, int64_t b0, int64_t b1,
                int64_t n) {
  return MatvecWeigher<float>(p, out, 0, b0, b1).look(n);
}
int weigh_matvec(const Problem<float>& p, const MatvecWeights<float>& out, int64_t s, int64_t b0,
                 int64_t b1, int64_t n0, int64_t n1) {
  return MatvecWeigher<float>(p, out, s, b0, b1).run(n0, n1);
}
int add_matvec(const Problem<float>& p, const Moments<float>& m, const MatvecWeights<float>& in,
               int64_t s, int64_t b0, int64_t b1, int64_t n0, int64_t n1) {
  return MatvecAdder<float>(p, m, in, s, b0, b1).run(n0, n1);
}

// How many atoms the sweep with given shift and reference takes at once.
template <class T>
int64_t pair_tile(const Problem<T>& p, int64_t queries) {
  const int64_t w = round_up(p.d, W<T>);
  return p.listed_by      ? ListTiles<T>::rows_of(w)
         : p.d <= small_d ? pair_small_d_atoms
                          : ExpandedTiles<T>::tile_rows(w, queries);
}
template <class T, class Sink>
int pair_sweep(const Problem<T>& p, const PairArguments<T>& a, Sink& sink, int64_t b0, int64_t b1,
               int64_t n0, int64_t n1) {
  if (!sink.ok()) return out_of_memory;
  const int64_t w = round_up(p.d, W<T>), B = b1 - b0;
  if (p.listed_by) return PairListSweep<T, Sink>(p, a, sink, w, b0, B).run(n0, n1);
  if (p.d <= small_d) return PairSmallDSweep<T, Sink>(p, a, sink, w, b0, B).run(n0, n1);
  return PairExpandedSweep<T, Sink>(p, a, sink, w, b0, B).run(n0, n1);
}
template <class T>
int pair_sums(const Problem<T>& p, const PairArguments<T>& a, const PairOutput<T>& out, int64_t s,
              int64_t b0, int64_t b1, int64_t n0, int64_t n1) {
  PairSums<T> sums(p, a, out, s, b0, b1 - b0, pair_tile(p, b1 - b0));
  return pair_sweep(p, a, sums, b0, b1, n0, n1);
}
template <class T>
int pair_atoms(const Problem<T>& p, const PairArguments<T>& a, const AtomGradients<T>& out,
               int64_t b0, int64_t b1, int64_t n0, int64_t n1) {
  PairAtoms<T> gradients(p, a, out, round_up(p.d, W<T>), b0, b1 - b0, pair_tile(p, b1 - b0));
  return pair_sweep(p, a, gradients, b0, b1, n0, n1);
}

double exp_rate(int64_t repeats) {
  alignas(64) float buffer[1024];
  for (int i = 0; i < 1024; ++i) buffer[i] = -0.01f * float(i);
  for (int64_t r = 0; r < repeats; ++r) {
    for (int i = 0; i < 1024; i += 4 * W<float>)
      for (int u = 0; u < 4; ++u) {
        float* at = buffer + i + u * W<float>;
        store<float>(at, vexp(load(at)) - 1.0f);
      }
    asm volatile("" ::: "memory");
  }
  return 1024.0 * double(repeats);
}

template <class T>
constexpr Kernels<T> kernels{.lanes = W<T>,
                             .chain_lanes = ChainGroup<T>::lanes,
                             .first_rows = first_rows<T>,
                             .second_rows = second_rows<T>,
                             .accumulate = accumulate<T>,
                             .merge = merge<T>,
                             .accumulate_mixture = accumulate_mixture<T>,
                             .merge_mixture = merge_mixture<T>,
                             .pair_sums = pair_sums<T>,
                             .pair_tile = pair_tile<T>,
                             .pair_atoms = pair_atoms<T>,
                             .draw_atom = draw_atom<T>,
                             .read_reference = read_reference<T>,
                             .endpoint = endpoint<T>,
                             .residual_square = residual_square<T>,
                             .transport = transport<T>,
                             .log_prior_sum = log_prior_sum<T>};
constexpr KernelTable table{.isa = DFK_STR(DFK_ISA),
                            .f32 = kernels<float>,
                            .f64 = kernels<double>,
                            .matvec_phases = {look_matvec, weigh_matvec, add_matvec},
                            .certified = certified_kernels,
                            .exp_rate = exp_rate};

}  // namespace

extern "C" __attribute__((visibility("hidden"))) const dfk::KernelTable* DFK_CAT(dfk_kernels_,
                                                                                 DFK_ISA)() {
  return &table;
}
