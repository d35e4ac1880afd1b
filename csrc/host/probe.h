// What this machine can do at most: the denominators of the benchmark's roofline. Plain CPU code,
// no torch.
#pragma once

#include <cstddef>

namespace dfk {

// GB/s at which `threads` threads together read a buffer of `bytes` bytes, each its own part; the
// best of `repeats`. bytes should be at least eight times the last-level cache. Throws
// std::invalid_argument, std::bad_alloc.
double read_bandwidth(int threads, std::size_t bytes, int repeats);

}  // namespace dfk
