// The table of kernels of the instruction set that this process uses.
#pragma once
#include "simd/problem.h"

namespace dfk {

// The best that was compiled and that the CPU has, or what DFKERNELS_ISA (base, v3, v4) asks for;
// decided once. Throws std::runtime_error where DFKERNELS_ISA names one that is not there.
const KernelTable& kernels();

template <class T>
const Kernels<T>& kernels_for();
template <>
inline const Kernels<float>& kernels_for<float>() {
  return kernels().f32;
}
template <>
inline const Kernels<double>& kernels_for<double>() {
  return kernels().f64;
}

}  // namespace dfk
