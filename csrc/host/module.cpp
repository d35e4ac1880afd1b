// The Python module dfkernels._C: build info, the instruction set in use, hardware probes for the
// roofline. Tensors never come through here: the kernels register themselves with torch's
// dispatcher when this library is loaded.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "host/probe.h"
#include "host/refuse.h"

namespace py = pybind11;

namespace {

std::vector<std::string> words(const char* text) {
  std::istringstream stream(text);
  std::vector<std::string> out;
  for (std::string word; stream >> word;) out.push_back(word);
  return out;
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = compiler();
  info["flags"] = DFK_BUILD_FLAGS;
  info["isa_levels"] = words(DFK_BUILD_ISAS);
  info["built_with_torch"] = DFK_BUILD_TORCH;
  constexpr unsigned long long target = TORCH_TARGET_VERSION;
  info["target_torch"] = std::to_string(target >> 56) + "." + std::to_string((target >> 48) & 0xff);
  return info;
}

// (kind, arguments, message) of what an op last refused on this thread, which is then forgotten;
// None if nothing was.
py::object take_refusal() {
  const dfk::Refusal last = std::exchange(dfk::refusal(), {});
  if (last.fault == dfk::Fault::none) return py::none();
  const char* kind = last.fault == dfk::Fault::value ? "value" : "memory";
  return py::make_tuple(kind, last.arguments, last.message);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of dfkernels; importing it registers the CPU kernels.";
  m.def("build_info", &build_info, "Compiler, flags, instruction sets compiled, torch versions.");
  m.def("take_refusal", &take_refusal,
        "What an op last refused on this thread, taken off its record.");
  m.def("isa", &dfk::isa,
        "The instruction set of the CPU kernels: the best there is, or DFKERNELS_ISA's.");

  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.def("read_bandwidth", &dfk::read_bandwidth, py::arg("threads"), py::arg("bytes"),
        py::arg("repeats") = 5, no_gil,
        "GB/s of the best of `repeats` reads of a buffer of `bytes` bytes.");
  m.def("exp_rate", &dfk::exp_rate, py::arg("threads"), no_gil,
        "float32 exps per second of the kernels' own exp on cached data.");
}
