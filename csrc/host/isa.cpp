// The choice of the instruction set whose kernels this process uses.
#include "host/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

extern "C" {
const dfk::KernelTable* dfk_kernels_base();
#ifdef DFK_HAVE_V3
const dfk::KernelTable* dfk_kernels_v3();
#endif
#ifdef DFK_HAVE_V4
const dfk::KernelTable* dfk_kernels_v4();
#endif
}

namespace dfk {
namespace {

// The instruction sets to choose from, best last.
std::string usable() {
  std::string out = "base";
#ifdef DFK_HAVE_V3
  if (__builtin_cpu_supports("x86-64-v3")) out += ", v3";
#endif
#ifdef DFK_HAVE_V4
  if (__builtin_cpu_supports("x86-64-v4")) out += ", v4";
#endif
  return out;
}

const KernelTable* choose() {
  const char* asked = std::getenv("DFKERNELS_ISA");
  const std::string want = asked ? asked : "";
#ifdef DFK_HAVE_V4
  if ((want.empty() || want == "v4") && __builtin_cpu_supports("x86-64-v4"))
    return dfk_kernels_v4();
#endif
#ifdef DFK_HAVE_V3
  if ((want.empty() || want == "v3") && __builtin_cpu_supports("x86-64-v3"))
    return dfk_kernels_v3();
#endif
  if (want.empty() || want == "base") return dfk_kernels_base();
  throw std::runtime_error("DFKERNELS_ISA is '" + want +
                           "', which is none of the instruction sets that were " +
                           "compiled and that this CPU has: " + usable());
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable* table = choose();
  return *table;
}

}  // namespace dfk
