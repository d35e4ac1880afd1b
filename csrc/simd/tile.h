// Tiles of atoms: rows of y as whole, zero-padded vectors of T, read in place where they already
// have that form.
#pragma once
#include <stdlib.h>
#include <string.h>

#include "simd/problem.h"
#include "simd/vec.h"

namespace {

using namespace dfk;

template <class T>
DFK_INLINE constexpr Storage native_storage() {
  return sizeof(T) == 4 ? Storage::f32 : Storage::f64;
}
DFK_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The scratch memory of a task: one block, which is freed when the task ends.
class Arena {
 public:
  explicit Arena(size_t bytes)
      : base_(static_cast<char*>(aligned_alloc(64, round_up(int64_t(bytes), 64)))), next_(base_) {}
  ~Arena() { free(base_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  bool ok() const { return base_ != nullptr; }
  template <class U>
  U* take(int64_t n) {
    U* p = reinterpret_cast<U*>(next_);
    next_ += bytes<U>(n);
    return p;
  }
  template <class U>
  static size_t bytes(int64_t n) {
    return size_t(round_up(n * int64_t(sizeof(U)), 64));
  }

 private:
  char *base_, *next_;
};

template <class T, class S>
void convert(const S* in, int64_t d, T scale, T offset, T* out) {
  for (int64_t k = 0; k < d; ++k) out[k] = scale * T(in[k]) + offset;
}
DFK_INLINE float float_of_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
template <class T>
void convert_bf16(const uint16_t* in, int64_t d, T scale, T offset, T* out) {
  for (int64_t k = 0; k < d; ++k) out[k] = scale * T(float_of_bits(uint32_t(in[k]) << 16)) + offset;
}
// The conversion is done on bits, since not every compiler that builds the rest has _Float16.
template <class T>
void convert_f16(const uint16_t* in, int64_t d, T scale, T offset, T* out) {
  for (int64_t k = 0; k < d; ++k) {
    const uint32_t size = uint32_t(in[k] & 0x7fff) << 13, sign = uint32_t(in[k] & 0x8000) << 16;
    const float normal = float_of_bits(size + (112u << 23)),
                special = float_of_bits(size | (255u << 23));
    const float subnormal = float_of_bits(size + (113u << 23)) - 6.103515625e-5f;
    const float f = size < (1u << 23) ? subnormal : size >= (31u << 23) ? special : normal;
    out[k] = scale * T(sign ? -f : f) + offset;
  }
}

template <class T>
DFK_INLINE int64_t row_of(const Problem<T>& p, int64_t i) {
  return p.atom_rows ? p.atom_rows[i] : i;
}
// The number in the batch of the query that the kernels take as their i-th.
template <class T>
DFK_INLINE int64_t query_at(const Problem<T>& p, int64_t i) {
  return p.query_order ? p.query_order[i] : i;
}

// Writes the values of row `row` of y.
template <class T>
void read_row(const Problem<T>& p, int64_t row, T* out) {
  const T scale = T(p.scale), offset = T(p.offset);
  const int64_t at = row * p.row_stride;
  switch (p.storage) {
    case Storage::f32:
      convert(static_cast<const float*>(p.y) + at, p.d, scale, offset, out);
      break;
    case Storage::f64:
      convert(static_cast<const double*>(p.y) + at, p.d, scale, offset, out);
      break;
    case Storage::f16:
      convert_f16(static_cast<const uint16_t*>(p.y) + at, p.d, scale, offset, out);
      break;
    case Storage::bf16:
      convert_bf16(static_cast<const uint16_t*>(p.y) + at, p.d, scale, offset, out);
      break;
    case Storage::u8:
      convert(static_cast<const uint8_t*>(p.y) + at, p.d, scale, offset, out);
      break;
  }
}

// Writes the reference: the atom in row `reference` of y or, for -1, the centre.
template <class T>
void read_reference(const Problem<T>& p, int64_t reference, T* out) {
  if (reference >= 0) return read_row(p, reference, out);
  for (int64_t k = 0; k < p.d; ++k) out[k] = p.centre ? p.centre[k] : T(0);
}

template <class T>
DFK_INLINE bool rows_in_place(const Problem<T>& p) {
  return p.storage == native_storage<T>() && p.scale == 1 && p.offset == 0 && p.d % W<T> == 0;
}

// Row j of a tile is at + j * ld. `panels`: the same rows packed (simd/transpose.h), or null.
// `ahead`: memory that will be read next, as much as the rows take, or null.
template <class T>
struct Rows {
  const T* at;
  int64_t ld;
  const T *panels = nullptr, *ahead = nullptr;
};

// Returns atoms [i, i + n), in place where `in_place` says so and they follow one another. Else
// they are copied to `room`, n rows of the width plus one vector, since rows a multiple of 4 KiB
// apart would compete for the same cache lines.
template <class T>
Rows<T> read_rows(const Problem<T>& p, int64_t i, int64_t n, int64_t width, T* room,
                  bool in_place) {
  const int64_t row = row_of(p, i);
  if (in_place && row_of(p, i + n - 1) == row + n - 1)
    return {static_cast<const T*>(p.y) + row * p.row_stride, p.row_stride};
  for (int64_t j = 0; j < n; ++j) {
    T* row = room + j * (width + W<T>);
    read_row(p, row_of(p, i + j), row);
    for (int64_t k = p.d; k < width; ++k) row[k] = 0;
  }
  return {room, width + W<T>};
}

// Writes log_prior of atoms [i, i + n), less the largest, to out[0, padded); the padding is masked.
template <class T>
void read_log_prior(const Problem<T>& p, int64_t i, int64_t n, int64_t padded, T* out) {
  const T max_log_prior = p.max_log_prior;
  if (!p.log_prior)
    for (int64_t j = 0; j < n; ++j) out[j] = 0;
  else if (!p.atom_rows)
    for (int64_t j = 0; j < n; ++j) out[j] = p.log_prior[i + j] - max_log_prior;
  else
    for (int64_t j = 0; j < n; ++j) out[j] = p.log_prior[p.atom_rows[i + j]] - max_log_prior;
  for (int64_t j = n; j < padded; ++j) out[j] = -T(__builtin_inf());
}

}  // namespace
