// How the clouds of a call, data sets of their own, are gone over by the threads.
#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>

#include "host/accumulate.h"

namespace dfk {
namespace {

// The error of the first cloud that had one.
struct FirstError {
  std::mutex mutex;
  int64_t cloud = -1;
  std::exception_ptr error;
  Refusal refused;  // the record of the thread that met it

  void keep(int64_t g) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (cloud >= 0 && cloud < g) return;
    cloud = g;
    error = std::current_exception();
    refused = refusal();
  }

  [[noreturn]] void raise() const {
    try {
      std::rethrow_exception(error);
    } catch (const std::runtime_error& e) {
      if (refused.fault == Fault::none || refused.message != e.what()) throw;
    }
    refuse(refused.fault, refused.arguments, refused.message, ", in cloud ", cloud);
  }
};

// Whether each thread takes a cloud of its own, and not all of them a share of the same. They do
// where a cloud is too little for all, or where there are enough clouds, unless the clouds are so
// large that the partial sums of as many as there are threads would take much memory.
bool one_cloud_a_thread(const Arguments& a) {
  const double little = 1 << 18, much = 1 << 26;
  const double work = double(a.B) * double(a.y.size(a.y.dim() - 2)) * double(a.x.size(1) + 8);
  return work < little ||
         (work < much && a.clouds >= 4 * int64_t(torch::stable::get_num_threads()));
}

}  // namespace

void for_each_cloud(const Arguments& a, const std::function<void(int64_t)>& f) {
  if (a.clouds == 1) return f(0);
  FirstError first;
  std::atomic<int64_t> next{0};
  const auto take_clouds = [&](int64_t = 0, int64_t = 0) {
    for (int64_t g; (g = next++) < a.clouds;) {
      try {
        f(g);
      } catch (...) {
        first.keep(g);
        next = a.clouds;  // those before it have been taken already
      }
    }
  };
  if (one_cloud_a_thread(a))  // within such a task, all that f does runs on the task's thread
    torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, take_clouds);
  else
    take_clouds();
  if (first.error) first.raise();
}

}  // namespace dfk
