// Small conveniences over torch's stable tensors. Every tensor that a kernel reads comes through
// `expect` (or, where its rows may stay where they are, `expect_rows`), so that device, dtype,
// shape and layout are checked in one place.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>

#include "host/refuse.h"

namespace dfk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_text(const Tensor& t) {
  std::string out = "[";
  for (int64_t i = 0; i < t.dim(); ++i) out += (i ? ", " : "") + std::to_string(t.size(i));
  return out + "]";
}

// The name that Python gives a dtype.
inline std::string dtype_text(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default: {
      std::string text = torch::headeronly::toString(type);  // BFloat16, Bool, ...
      for (char& c : text) c = char(std::tolower(c));
      return text;
    }
  }
}

// What an argument's size along one dimension must be: a number; any, by a name for the message
// ("B"); or any but zero ("N > 0").
struct Size {
  int64_t n = -1;
  const char* name = nullptr;
  bool positive = false;
  Size(int64_t n) : n(n) {}
  Size(const char* name, bool positive = false) : name(name), positive(positive) {}
  bool allows(int64_t size) const { return n >= 0 ? size == n : size > 0 || !positive; }
  std::string text() const {
    return n >= 0 ? std::to_string(n) : name + std::string(positive ? " > 0" : "");
  }
};
inline Size positive(const char* name) { return {name, true}; }

// With `clouds`, a leading axis of any size may come before that shape.
inline void expect_shape(const char* name, const Tensor& t, std::initializer_list<Size> want,
                         bool clouds = false) {
  int64_t i = clouds && t.dim() == int64_t(want.size()) + 1;
  bool same = t.dim() == i + int64_t(want.size());
  std::string text;
  for (const Size& size : want) {
    same = same && size.allows(t.size(i++));
    text += (text.empty() ? "" : ", ") + size.text();
  }
  DFK_EXPECT(same, name, "shape [", text, clouds ? "] or [G, " + text : "", "], got ",
             shape_text(t));
}

// In memory that this process can read, and that a pointer to T may point to.
inline bool is_aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % t.element_size() == 0;
}
inline void expect_memory(const char* name, const Tensor& t) {
  DFK_EXPECT(t.is_cpu(), name, "a tensor on the CPU");
  DFK_EXPECT(t.numel() == 0 || t.const_data_ptr() != nullptr, name,
             "a tensor with memory, got one whose storage was freed");
}
inline void expect_dtype(const char* name, const Tensor& t, ScalarType type) {
  DFK_EXPECT(t.scalar_type() == type, name, dtype_text(type), ", got ",
             dtype_text(t.scalar_type()));
}

// make(), or an error that says what there was no memory for. A stable call of torch says that it
// failed, but not why; of those that make tensors memory is the only reason.
template <class F>
Tensor allocated(const char* what, const F& make) {
  try {
    return make();
  } catch (const std::exception&) {
    out_of_memory_for(what);
  }
}
inline Tensor new_output(const Tensor& like, std::initializer_list<int64_t> shape,
                         std::optional<ScalarType> type = std::nullopt) {
  return allocated("an output", [&] { return torch::stable::new_empty(like, shape, type); });
}
inline Tensor contiguous_copy(const Tensor& t) {
  return allocated("a contiguous copy of an argument", [&] {
    return torch::stable::contiguous(is_aligned(t) ? t : torch::stable::clone(t));
  });
}

// Contiguous, aligned, on the CPU, of the dtype `type`; copied only where it is not.
inline Tensor dense(const char* name, const Tensor& t, ScalarType type) {
  expect_memory(name, t);
  expect_dtype(name, t, type);
  return t.is_contiguous() && is_aligned(t) ? t : contiguous_copy(t);
}
// The tensor that a kernel reads as `type`s, one after the other.
inline Tensor expect(const char* name, const Tensor& t, ScalarType type,
                     std::initializer_list<Size> shape) {
  expect_shape(name, t, shape);
  return dense(name, t, type);
}
inline std::optional<Tensor> expect(const char* name, const std::optional<Tensor>& t,
                                    ScalarType type, std::initializer_list<Size> shape) {
  return t ? std::optional<Tensor>(expect(name, *t, type, shape)) : std::nullopt;
}
// What each cloud has of its own, a matrix or a vector, of a dtype that the caller has checked: one
// for all clouds, or with a leading axis one for each. Its rows are contiguous; they and the clouds
// follow one another at some distance, perhaps none: what is expanded, overlaps or lies in
// something wider is not copied. Clouds that are one and the same lose their axis.
inline Tensor expect_clouds(const char* name, Tensor t, std::initializer_list<Size> shape) {
  expect_shape(name, t, shape, true);
  expect_memory(name, t);
  if (t.dim() > int64_t(shape.size()) && t.size(0) > 0 && (t.stride(0) == 0 || t.size(0) == 1))
    t = allocated("a view of an argument", [&] { return torch::stable::select(t, 0, 0); });
  const int64_t last = t.dim() - 1;
  return is_aligned(t) && (t.stride(last) == 1 || t.size(last) == 1) ? t : contiguous_copy(t);
}
// The same of one cloud.
inline Tensor expect_rows(const char* name, const Tensor& t, std::initializer_list<Size> shape) {
  expect_shape(name, t, shape);
  return expect_clouds(name, t, shape);
}

inline ScalarType compute_type(const char* name, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  DFK_EXPECT(type == ScalarType::Float || type == ScalarType::Double, name,
             "float32 or float64, got ", dtype_text(type));
  return type;
}

// f(T{}) with the dtype of x, float or double.
template <class F>
void with_dtype_of(const Tensor& x, const F& f) {
  if (x.scalar_type() == ScalarType::Float)
    f(float{});
  else
    f(double{});
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
bool all_finite(const T* values, int64_t n) {
  T sum[8] = {},
    all = 0;  // 0 * inf and 0 * nan are nan; one chain of additions would wait for itself
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int64_t u = 0; u < 8; ++u) sum[u] += T(0) * values[i + u];
  for (; i < n; ++i) all += T(0) * values[i];
  for (const T s : sum) all += s;
  return all == 0;
}
template <class T>
void expect_finite(const char* name, const T* values, int64_t n) {
  DFK_EXPECT(all_finite(values, n), name, "finite values, got nan or inf");
}

// Finite arguments can still lead out of the dtype: sigma^-2, |y|^2.
template <class T>
void expect_representable(const T* results, int64_t n) {
  DFK_EXPECT(all_finite(results, n), "result", "finite numbers, got an overflow of ",
             sizeof(T) == 4 ? "float32" : "float64");
}
// A number that the kernel uses as a T.
template <class T>
void expect_number(const char* name, double value) {
  DFK_EXPECT(std::abs(value) <= std::numeric_limits<T>::max(), name, "a finite number in ",
             sizeof(T) == 4 ? "float32" : "float64", ", got ", value);
}

template <class T>
void expect_positive(const char* name, const T* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    DFK_EXPECT(values[i] > 0, name, "positive values, got ", values[i], " at index ", i);
}

// f(begin, end) for ranges that make up [0, n), in parallel where there is enough to do: each of n
// is some `work`.
template <class F>
void in_ranges(int64_t n, int64_t work, const F& f) {
  torch::stable::parallel_for(0, n, 1 + 32768 / (work + 1), f);
}
// f(i) for i < n, likewise.
template <class F>
void each(int64_t n, int64_t work, const F& f) {
  in_ranges(n, work, [&f](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

}  // namespace dfk
