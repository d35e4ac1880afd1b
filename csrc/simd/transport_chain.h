// PF-ODE chains over the exact posterior of a few atoms: one chain per lane, so that everything but
// the atoms and the steps' coefficients is a vector. Arrays are [..][lanes].
#pragma once
#include "simd/dots.h"

namespace {

// Returns 2^-e for an m >= 0 in [2^e, 2^(e+1)) and adds e to `exponent`. A product with 2^-e is
// exact.
template <class T>
DFK_INLINE Vec<T> rescaling(Vec<T> m, IntVec<T>& exponent) {
  using Int = typename Lane<T>::Int;
  constexpr Int mantissa = sizeof(T) == 4 ? 23 : 52, bias = sizeof(T) == 4 ? 127 : 1023;
  const IntVec<T> e = (reinterpret_cast<IntVec<T>>(m) >> mantissa) - bias;
  exponent += e;
  return reinterpret_cast<Vec<T>>((bias - e) << mantissa);
}

template <class T>
class ChainGroup {
 public:
  // Vectors of chains side by side, since a step is one long chain of dependences.
  static constexpr int U = 2;
  static constexpr int64_t lanes = U * W<T>;

  explicit ChainGroup(const Chains<T>& c) : c_(c), arena_(room()) {
    if (!arena_.ok()) return;
    x_ = arena_.template take<T>(c.d * lanes);
    mean_ = arena_.template take<T>(c.d * lanes);
    weight_ = arena_.template take<T>(c.N * lanes);
    cov_ = arena_.template take<T>(c.d * c.d * lanes);
    jacobian_ = arena_.template take<T>(c.d * c.d * lanes);
    next_ = arena_.template take<T>(c.d * c.d * lanes);
  }
  bool ok() const { return arena_.ok(); }

  // Runs chains [b0, b1), at most `lanes` of them; the lanes left over repeat the last one.
  void run(int64_t b0, int64_t b1) {
    const int64_t d = c_.d;
    for (int64_t k = 0; k < d; ++k)
      for (int64_t l = 0; l < lanes; ++l)
        x_[k * lanes + l] = c_.x[(b0 + l < b1 ? b0 + l : b1 - 1) * d + k];
    for (int64_t i = 0; i < d * d * lanes; ++i) jacobian_[i] = i / lanes % (d + 1) == 0;
    for (int u = 0; u < U; ++u) exponent_[u] = IntVec<T>{}, largest_[u] = all(T(1));
    for (int64_t i = 0; i < c_.M; ++i) step(c_.steps[i]);
    for (int64_t b = b0; b < b1; ++b) finish(b, b - b0);
  }

 private:
  static constexpr int64_t tile_ = 128;  // atoms summed in one chain of additions

  size_t room() const {
    const auto t = [](int64_t n) { return Arena::bytes<T>(n * lanes); };
    return 2 * t(c_.d) + t(c_.N) + 3 * t(c_.d * c_.d);
  }
  // Calls f(first, Count) for [0, n) in blocks of four and a last one of what remains.
  template <class F>
  DFK_INLINE void blocks(int64_t n, const F& f) {
    for (int64_t i = 0; i < n; i += 4)
      with_count<4>(n - i < 4 ? n - i : 4, [&](auto c) { f(i, c); });
  }
  DFK_INLINE Vec<T> get(const T* a, int64_t i, int u) { return load(a + i * lanes + u * W<T>); }
  DFK_INLINE void put(T* a, int64_t i, int u, Vec<T> v) { store<T>(a + i * lanes + u * W<T>, v); }

  void step(const ChainStep<T>& s) {
    weigh(s);
    for (int u = 0; u < U; ++u) average(u);
    for (int u = 0; u < U; ++u) covariance(u);
    for (int u = 0; u < U; ++u) {
      advance(s, u);
      for (int64_t k = 0; k < c_.d; ++k)
        put(x_, k, u, s.keep * get(x_, k, u) + s.pull * get(mean_, k, u));
    }
    T* const swap = jacobian_;
    jacobian_ = next_;
    next_ = swap;
  }

  // weight = exp(l - largest l), l = log prior - |x - alpha y|^2 / 2 sigma^2.
  void weigh(const ChainStep<T>& s) {
    Vec<T> max_logit[U];
    for (int u = 0; u < U; ++u) max_logit[u] = all(-T(__builtin_inf())), weight_sum_[u] = Vec<T>{};
    blocks(c_.N, [&](int64_t i, auto count) {
      Vec<T> square[count.value][U] = {};
      for (int64_t k = 0; k < c_.d; ++k)
        for (int j = 0; j < count.value; ++j) {
          const T y = s.alpha * c_.y[(i + j) * c_.d + k];
          for (int u = 0; u < U; ++u) {
            const Vec<T> t = get(x_, k, u) - y;
            square[j][u] += t * t;
          }
        }
      for (int j = 0; j < count.value; ++j)
        for (int u = 0; u < U; ++u) {
          const Vec<T> l = c_.log_prior[i + j] - s.half_precision * square[j][u];
          put(weight_, i + j, u, l);
          max_logit[u] = larger<T>(l, max_logit[u]);
        }
    });
    blocks(c_.N, [&](int64_t i, auto count) {
      for (int j = 0; j < count.value; ++j)
        for (int u = 0; u < U; ++u)
          put(weight_, i + j, u, vexp(get(weight_, i + j, u) - max_logit[u]));
    });
  }

  // weight_sum = sum w, mean = sum w y / weight_sum.
  void average(int u) {
    Vec<T> weight_sum{};
    for (int64_t i = 0; i < c_.N;) {
      Vec<T> part{};
      for (const int64_t end = i + tile_ < c_.N ? i + tile_ : c_.N; i < end; ++i)
        part += get(weight_, i, u);
      weight_sum += part;
    }
    weight_sum_[u] = weight_sum;
    blocks(c_.d, [&](int64_t k, auto count) {
      Vec<T> sum[count.value] = {};
      for (int64_t i = 0; i < c_.N;) {
        Vec<T> part[count.value] = {};
        for (const int64_t end = i + tile_ < c_.N ? i + tile_ : c_.N; i < end; ++i)
          for (int j = 0; j < count.value; ++j)
            part[j] += get(weight_, i, u) * c_.y[i * c_.d + k + j];
        for (int j = 0; j < count.value; ++j) sum[j] += part[j];
      }
      for (int j = 0; j < count.value; ++j) put(mean_, k + j, u, sum[j] / weight_sum);
    });
  }

  // cov = sum w (y - mean) (y - mean)^T, symmetric to the bit: without that an affine cloud would
  // rotate.
  void covariance(int u) {
    blocks(c_.d, [&](int64_t k0, auto rows) {
      blocks(k0 + rows.value, [&](int64_t l0, auto columns) {
        Vec<T> sum[rows.value][columns.value] = {};
        for (int64_t i = 0; i < c_.N;) {
          Vec<T> part[rows.value][columns.value] = {};
          for (const int64_t end = i + tile_ < c_.N ? i + tile_ : c_.N; i < end; ++i) {
            const T* y = c_.y + i * c_.d;
            Vec<T> right[columns.value];
            for (int l = 0; l < columns.value; ++l) right[l] = y[l0 + l] - get(mean_, l0 + l, u);
            for (int k = 0; k < rows.value; ++k) {
              const Vec<T> left = get(weight_, i, u) * (y[k0 + k] - get(mean_, k0 + k, u));
              for (int l = 0; l < columns.value; ++l) part[k][l] += left * right[l];
            }
          }
          for (int k = 0; k < rows.value; ++k)
            for (int l = 0; l < columns.value; ++l) sum[k][l] += part[k][l];
        }
        for (int k = 0; k < rows.value; ++k)
          for (int l = 0; l < columns.value; ++l)
            if (l0 + l <= k0 + k) {
              put(cov_, (k0 + k) * c_.d + l0 + l, u, sum[k][l]);
              put(cov_, (l0 + l) * c_.d + k0 + k, u, sum[k][l]);
            }
      });
    });
  }

  // next = (identity I + covariance C) A or A + A^T (identity I + covariance C), times an exact
  // power of two.
  void advance(const ChainStep<T>& s, int u) {
    const int64_t d = c_.d;
    const Vec<T> scale = rescaling<T>(largest_[u], exponent_[u]);
    const Vec<T> identity = scale * s.identity, covariance = scale * s.covariance / weight_sum_[u];
    Vec<T> largest{};
    blocks(d, [&](int64_t k0, auto rows) {
      blocks(d, [&](int64_t j0, auto columns) {
        Vec<T> product[rows.value][columns.value] = {};
        for (int64_t l = 0; l < d; ++l)
          for (int k = 0; k < rows.value; ++k) {
            const Vec<T> c = get(cov_, (k0 + k) * d + l, u);
            for (int j = 0; j < columns.value; ++j)
              product[k][j] += c * get(jacobian_, l * d + j0 + j, u);
          }
        for (int k = 0; k < rows.value; ++k)
          for (int j = 0; j < columns.value; ++j) {
            const int64_t at = (k0 + k) * d + j0 + j, across = (j0 + j) * d + k0 + k;
            Vec<T> a = identity * get(jacobian_, at, u) + covariance * product[k][j];
            if (c_.transposed) a += scale * get(jacobian_, across, u);
            put(next_, c_.transposed ? across : at, u, a);
            largest = larger<T>(larger<T>(a, -a), largest);
          }
      });
    });
    largest_[u] = largest;
  }

  void finish(int64_t b, int64_t lane) {
    const int64_t d = c_.d, u = lane / W<T>, at = lane % W<T>;
    IntVec<T> exponent = exponent_[u];
    const Vec<T> scale = rescaling<T>(largest_[u], exponent);
    double square = 0;
    for (int64_t i = 0; i < d * d; ++i) {
      const double a = jacobian_[i * lanes + lane] * scale[at];
      square += a * a;
    }
    const double norm = __builtin_sqrt(square / double(d));
    for (int64_t i = 0; i < d * d; ++i)
      c_.jacobian[b * d * d + i] = T(jacobian_[i * lanes + lane] * scale[at] / norm);
    c_.log_norm[b] = T(0.693147180559945309 * double(exponent[at]) + __builtin_log(norm));
    for (int64_t k = 0; k < d; ++k) c_.x[b * d + k] = x_[k * lanes + lane];
  }

  const Chains<T>& c_;
  Arena arena_;
  T *x_, *mean_, *weight_, *cov_, *jacobian_, *next_;
  Vec<T> weight_sum_[U], largest_[U];
  IntVec<T> exponent_[U];
};

template <class T>
int transport(const Chains<T>& c, int64_t b0, int64_t b1) {
  ChainGroup<T> group(c);
  if (!group.ok()) return out_of_memory;
  for (; b0 < b1; b0 += group.lanes) group.run(b0, b0 + group.lanes < b1 ? b0 + group.lanes : b1);
  return ok;
}

}  // namespace
