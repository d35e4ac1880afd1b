// Small conveniences over torch's stable tensors.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <string>

namespace dfk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_text(const Tensor& t) {
  std::string out = "[";
  for (int64_t i = 0; i < t.dim(); ++i) out += (i ? ", " : "") + std::to_string(t.size(i));
  return out + "]";
}

inline void expect_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> want) {
  bool same = t.dim() == int64_t(want.size());
  std::string text;
  int64_t i = 0;
  for (const int64_t n : want) {
    same = same && t.size(i++) == n;
    text += (text.empty() ? "" : ", ") + std::to_string(n);
  }
  STD_TORCH_CHECK(same, name, ": expected shape [", text, "], got ", shape_text(t));
}

// Contiguous, on the CPU, of the dtype `type`; copied only where it is not.
inline Tensor dense(const char* name, const Tensor& t, ScalarType type) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a tensor on the CPU");
  STD_TORCH_CHECK(t.scalar_type() == type, name, ": expected the dtype of the others");
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline ScalarType compute_type(const char* name, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, name,
                  ": expected float32 or float64");
  return type;
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
const T* data(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class T>
void expect_finite(const char* name, const T* values, int64_t n) {
  T sum = 0;  // 0 * inf and 0 * nan are nan
  for (int64_t i = 0; i < n; ++i) sum += T(0) * values[i];
  STD_TORCH_CHECK(sum == 0, name, ": expected finite values, got nan or inf");
}

// Finite arguments can still lead out of the dtype: sigma^-2, |y|^2.
template <class T>
void expect_representable(const T* results, int64_t n) {
  T sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += T(0) * results[i];
  STD_TORCH_CHECK(sum == 0, "result: expected finite numbers, got an overflow of ",
                  sizeof(T) == 4 ? "float32" : "float64");
}

template <class T>
void expect_positive(const char* name, const T* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    STD_TORCH_CHECK(values[i] > 0, name, ": expected positive values, got ", values[i], " at index ", i);
}

// f(i) for i < n, in parallel where there is enough to do.
template <class F>
void each(int64_t n, int64_t work, const F& f) {
  torch::stable::parallel_for(0, n, 1 + 32768 / (work + 1), [&f](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

}  // namespace dfk
