// What an op refuses, as data. A kernel that cannot go on says which arguments are at fault and
// why: that is recorded for Python, which takes it from the module (module.cpp), and thrown.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace dfk {

enum class Fault { none, value, memory };

struct Refusal {
  Fault fault = Fault::none;
  std::string arguments;  // at fault, "x, y"; empty where memory ran out
  std::string message;    // of the error that is thrown
};

// The record of this thread.
inline Refusal& refusal() {
  thread_local Refusal record;
  return record;
}

template <class... Parts>
[[noreturn]] void refuse(Fault fault, const std::string& arguments, const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  refusal() = {.fault = fault, .arguments = arguments, .message = text.str()};
  throw std::runtime_error(text.str());
}
template <class... Parts>
[[noreturn]] void refuse_value(const std::string& arguments, const Parts&... parts) {
  refuse(Fault::value, arguments, arguments, ": expected ", parts...);
}
[[noreturn]] inline void out_of_memory_for(const std::string& what) {
  refuse(Fault::memory, "", "dfkernels: out of memory", what.empty() ? "" : " (" + what + ")");
}

}  // namespace dfk

// Raises "arguments: expected ..." unless the condition holds: what was expected and what came.
#define DFK_EXPECT(condition, arguments, ...)                    \
  do {                                                           \
    if (!(condition)) dfk::refuse_value(arguments, __VA_ARGS__); \
  } while (false)
