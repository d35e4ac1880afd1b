#include "host/isa.h"

#include <chrono>
#include <cstdlib>
#include <stdexcept>
#include <thread>

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
std::string there() {
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
                           "compiled and that this CPU has: " + there());
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable* table = choose();
  return *table;
}

std::string isa() { return kernels().isa; }

double exp_rate(int threads) {
  const KernelTable& table = kernels();
  const auto run = [&table](std::int64_t repeats) { table.exp_rate(repeats); };
  const std::int64_t repeats = 200000;
  double best = 0;
  for (int attempt = 0; attempt < 3; ++attempt) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(run, repeats);
    run(repeats);
    for (auto& thread : others) thread.join();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    const double rate = 1024.0 * double(repeats) * threads / took.count();
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace dfk
