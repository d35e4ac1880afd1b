// Tiles of atoms: rows of y as whole, zero-padded vectors of T, read in place where they already are that.
#pragma once
#include <stdlib.h>
#include <string.h>

#include "../problem.h"
#include "vec.h"

namespace {

using namespace dfk;

template <class T>
DFK_INLINE constexpr Storage native_storage() {
  return sizeof(T) == 4 ? Storage::f32 : Storage::f64;
}
DFK_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Scratch memory of a task, one block, freed at its end.
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
template <class T>
void convert_bf16(const uint16_t* in, int64_t d, T scale, T offset, T* out) {
  for (int64_t k = 0; k < d; ++k) {
    const uint32_t bits = uint32_t(in[k]) << 16;
    float f;
    memcpy(&f, &bits, 4);
    out[k] = scale * T(f) + offset;
  }
}

template <class T>
void read_row(const Problem<T>& p, int64_t i, T* out) {
  const T scale = T(p.scale), offset = T(p.offset);
  const int64_t at = i * p.ldy;
  switch (p.storage) {
    case Storage::f32:
      convert(static_cast<const float*>(p.y) + at, p.d, scale, offset, out);
      break;
    case Storage::f64:
      convert(static_cast<const double*>(p.y) + at, p.d, scale, offset, out);
      break;
    case Storage::f16:
      convert(static_cast<const _Float16*>(p.y) + at, p.d, scale, offset, out);
      break;
    case Storage::bf16:
      convert_bf16(static_cast<const uint16_t*>(p.y) + at, p.d, scale, offset, out);
      break;
    case Storage::u8:
      convert(static_cast<const uint8_t*>(p.y) + at, p.d, scale, offset, out);
      break;
  }
}

template <class T>
DFK_INLINE bool rows_in_place(const Problem<T>& p) {
  return p.storage == native_storage<T>() && p.scale == 1 && p.offset == 0 && p.d % W<T> == 0;
}

template <class T>
struct Rows {
  const T* at;
  int64_t ld;
};

// Rows [i, i + n) of y; through `room` (n rows of `width`) where they cannot be read in place.
template <class T>
Rows<T> read_rows(const Problem<T>& p, int64_t i, int64_t n, int64_t width, T* room) {
  if (rows_in_place(p)) return {static_cast<const T*>(p.y) + i * p.ldy, p.ldy};
  for (int64_t j = 0; j < n; ++j) {
    T* row = room + j * width;
    read_row(p, i + j, row);
    for (int64_t k = p.d; k < width; ++k) row[k] = 0;
  }
  return {room, width};
}

// Vectors side by side, exchanged into the transpose of a square block: log2(W) rounds of interleaving.
template <class T>
DFK_INLINE void transpose_square(Vec<T>* v) {
  Vec<T> u[W<T>];
  IntVec<T> low, high;
  for (int i = 0; i < W<T>; ++i) {
    low[i] = i / 2 + (i % 2) * W<T>;
    high[i] = low[i] + W<T> / 2;
  }
  for (int h = 1; h < W<T>; h *= 2) {
    for (int i = 0; i < W<T> / 2; ++i) {
#if defined(__clang__)
      for (int l = 0; l < W<T>; ++l) {
        u[2 * i][l] = l % 2 ? v[i + W<T> / 2][l / 2] : v[i][l / 2];
        u[2 * i + 1][l] = l % 2 ? v[i + W<T> / 2][l / 2 + W<T> / 2] : v[i][l / 2 + W<T> / 2];
      }
#else
      u[2 * i] = __builtin_shuffle(v[i], v[i + W<T> / 2], low);
      u[2 * i + 1] = __builtin_shuffle(v[i], v[i + W<T> / 2], high);
#endif
    }
    for (int i = 0; i < W<T>; ++i) v[i] = u[i];
  }
}

// cols[k * ldc + j] = rows[j][k] for j < n; columns n .. ldc are zero.
template <class T>
void transpose(Rows<T> rows, int64_t n, int64_t d, T* cols, int64_t ldc) {
  const int64_t whole = n / W<T> * W<T>, wide = d / W<T> * W<T>;
  for (int64_t j = 0; j < whole; j += W<T>)
    for (int64_t k = 0; k < wide; k += W<T>) {
      Vec<T> v[W<T>];
      for (int i = 0; i < W<T>; ++i) v[i] = load(rows.at + (j + i) * rows.ld + k);
      transpose_square<T>(v);
      for (int i = 0; i < W<T>; ++i) store(cols + (k + i) * ldc + j, v[i]);
    }
  for (int64_t k = 0; k < d; ++k) {
    for (int64_t j = k < wide ? whole : 0; j < n; ++j) cols[k * ldc + j] = rows.at[j * rows.ld + k];
    for (int64_t j = n; j < ldc; ++j) cols[k * ldc + j] = 0;
  }
}

// log_prior of atoms [i, i + n) into out[0, padded); the padding is masked.
template <class T>
void read_log_prior(const Problem<T>& p, int64_t i, int64_t n, int64_t padded, T* out) {
  for (int64_t j = 0; j < n; ++j) out[j] = p.log_prior ? p.log_prior[i + j] : T(0);
  for (int64_t j = n; j < padded; ++j) out[j] = -T(__builtin_inf());
}

}  // namespace
