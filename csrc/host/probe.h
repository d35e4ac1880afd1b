// What runs on this machine and how fast it can be at most: the instruction set in use, and the
// denominators of the benchmark's roofline. No torch.
#pragma once

#include <cstddef>
#include <string>

namespace dfk {

// The instruction set of the kernels in use: base, v3 or v4.
std::string isa();

// GB/s at which `threads` threads together read a buffer of `bytes` bytes, each its own part; the
// best of `repeats`. bytes should be at least eight times the last-level cache. Throws
// std::invalid_argument, std::bad_alloc.
double read_bandwidth(int threads, std::size_t bytes, int repeats);

// float32 exps per second of the library's own exp on `threads` threads.
double exp_rate(int threads);

}  // namespace dfk
