// Measurements of what this machine can do at most: the benchmark's denominators.
#include "host/probe.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#include "host/isa.h"

namespace {

using Clock = std::chrono::steady_clock;
double since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Runs work(i) on threads i = 0 .. threads - 1 that start together; the seconds until the last one
// ends.
template <class Work>
double timed(int threads, Work work) {
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  std::vector<std::thread> pool;
  for (int i = 0; i < threads; ++i) {
    pool.emplace_back([&, i] {
      ++ready;
      while (!go) std::this_thread::yield();
      work(i);
    });
  }
  while (ready < threads) std::this_thread::yield();
  const auto start = Clock::now();
  go = true;
  for (auto& thread : pool) thread.join();
  return since(start);
}

// Four streams a thread keep more cache lines in flight than one.
#define DFK_READ(NAME, TARGET, WIDTH)                              \
  TARGET float NAME(const float* data, std::size_t floats) {       \
    typedef float Vector __attribute__((vector_size(WIDTH)));      \
    const std::size_t stream = floats * sizeof(float) / WIDTH / 4; \
    const auto* p = reinterpret_cast<const Vector*>(data);         \
    Vector sum[4] = {};                                            \
    for (std::size_t i = 0; i < stream; ++i)                       \
      for (int s = 0; s < 4; ++s) sum[s] += p[i + s * stream];     \
    return (sum[0] + sum[1] + sum[2] + sum[3])[0];                 \
  }

#if defined(__x86_64__)
DFK_READ(read_v4, __attribute__((target("arch=x86-64-v4"))), 64)
DFK_READ(read_v3, __attribute__((target("arch=x86-64-v3"))), 32)
#endif
DFK_READ(read_base, , 16)

using Read = float (*)(const float*, std::size_t);

// By the widest vectors of the CPU, whatever DFKERNELS_ISA says.
Read widest() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("x86-64-v4")) return read_v4;
  if (__builtin_cpu_supports("x86-64-v3")) return read_v3;
#endif
  return read_base;
}

void require(bool good, const char* what) {
  if (!good) throw std::invalid_argument(what);
}

}  // namespace

namespace dfk {

double read_bandwidth(int threads, std::size_t bytes, int repeats) {
  require(threads >= 1, "read_bandwidth: threads must be at least 1");
  require(repeats >= 1, "read_bandwidth: repeats must be at least 1");
  require(bytes >= std::size_t(threads) << 16,
          "read_bandwidth: bytes must be at least 65536 per thread");
  constexpr std::size_t line = 64, block = 4096;
  const std::size_t part = bytes / threads / block * block, floats = part / sizeof(float);
  const auto release = [](float* p) { ::operator delete[](p, std::align_val_t(line)); };
  std::unique_ptr<float[], decltype(release)> data(
      static_cast<float*>(::operator new[](part * threads, std::align_val_t(line))), release);
  // Each thread touches its own part first: real pages, on its own memory node.
  timed(threads, [&](int i) { std::fill_n(data.get() + i * floats, floats, 1.0f); });
  const auto read = widest();
  std::vector<float> sink(threads);
  double best = 0;
  for (int r = 0; r < repeats; ++r) {
    const double seconds =
        timed(threads, [&](int i) { sink[i] = read(data.get() + i * floats, floats); });
    best = std::max(best, part * threads / seconds * 1e-9);
  }
  return best;
}

std::string isa() { return kernels().isa; }

double exp_rate(int threads) {
  const KernelTable& table = kernels();  // may throw, which a thread must not
  const std::int64_t repeats = 200000;
  double best = 0;
  for (int attempt = 0; attempt < 3; ++attempt) {
    const double seconds = timed(threads, [&](int) { table.exp_rate(repeats); });
    best = std::max(best, 1024.0 * double(repeats) * threads / seconds);
  }
  return best;
}

}  // namespace dfk
