// The CPU kernels, compiled once for every instruction set (DFK_ISA). Only plain arithmetic on raw
// pointers: an inline function of the standard library or of torch, instantiated here with wide
// instructions, could be the copy that the linker keeps for the whole process, and crash it on an
// older CPU.
#include "certified/simd.h"
#include "simd/draw_atom.h"
#include "simd/endpoint.h"
#include "simd/log_prior.h"
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

template <class T, template <class, class> class Sweep>
int pair_sums_by(int64_t most_atoms, const Problem<T>& p, const PairArguments<T>& a,
                 const PairOutput<T>& out, int64_t s, int64_t b0, int64_t b1, int64_t n0,
                 int64_t n1) {
  PairSums<T> sums(p, a, out, s, b0, b1 - b0, most_atoms);
  if (!sums.ok()) return out_of_memory;
  return Sweep<T, PairSums<T>>(p, a, sums, out.stride, b0, b1 - b0).run(n0, n1);
}
template <class T>
int pair_sums(const Problem<T>& p, const PairArguments<T>& a, const PairOutput<T>& out, int64_t s,
              int64_t b0, int64_t b1, int64_t n0, int64_t n1) {
  if (p.listed_by)
    return pair_sums_by<T, PairListSweep>(pair_list_atoms, p, a, out, s, b0, b1, n0, n1);
  if (p.d <= small_d)
    return pair_sums_by<T, PairSmallDSweep>(pair_small_d_atoms, p, a, out, s, b0, b1, n0, n1);
  return pair_sums_by<T, PairExpandedSweep>(ExpandedTiles<T>::tile_rows(out.stride, b1 - b0), p, a,
                                            out, s, b0, b1, n0, n1);
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
                             .pair_sums = pair_sums<T>,
                             .pair_atoms_tile = pair_atoms_tile<T>,
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
                            .certified = certified_kernels,
                            .exp_rate = exp_rate};

}  // namespace

extern "C" __attribute__((visibility("hidden"))) const dfk::KernelTable* DFK_CAT(dfk_kernels_,
                                                                                 DFK_ISA)() {
  return &table;
}
