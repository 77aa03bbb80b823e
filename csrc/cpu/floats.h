// Vectors of float32, and sums of many numbers by them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/inline.h"

namespace iresnet_fast {

typedef float Floats8 __attribute__((vector_size(8 * sizeof(float))));
typedef float Floats16 __attribute__((vector_size(16 * sizeof(float))));

// F below is one of the two.
template <typename F>
constexpr int kWide = sizeof(F) / sizeof(float);
template <typename F>
IRESNET_FAST_INLINE F load(const float* from) {
  typedef float Unaligned __attribute__((vector_size(sizeof(F)), aligned(sizeof(float))));
  return *reinterpret_cast<const Unaligned*>(from);
}
template <typename F>
IRESNET_FAST_INLINE void store(float* to, F x) {
  typedef float Unaligned __attribute__((vector_size(sizeof(F)), aligned(sizeof(float))));
  *reinterpret_cast<Unaligned*>(to) = x;
}

IRESNET_FAST_INLINE float total(Floats8 x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }
IRESNET_FAST_INLINE float total(Floats16 x) {
  return total(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
               __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
}

template <typename F>
IRESNET_FAST_INLINE double dot(const float* a, const float* b, int64_t n) {
  constexpr int64_t kBlock = 512;  // summed in float before it is added in double
  double result = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = std::min(n, start + kBlock);
    F sum[2] = {F{}, F{}};
    int64_t i = start;
    for (; i + 2 * kWide<F> <= end; i += 2 * kWide<F>) {
      sum[0] += load<F>(a + i) * load<F>(b + i);
      sum[1] += load<F>(a + i + kWide<F>) * load<F>(b + i + kWide<F>);
    }
    float rest = total(sum[0] + sum[1]);
    for (; i < end; ++i) rest += a[i] * b[i];
    result += rest;
  }
  return result;
}

// The norm, in double where squares leave the range of float.
template <typename F>
IRESNET_FAST_INLINE double norm_of(const float* x, int64_t n) {
  double squares = dot<F>(x, x, n);
  if (!(squares > 1e-30 && squares < 1e30)) {
    squares = 0;
    for (int64_t i = 0; i < n; ++i) squares += static_cast<double>(x[i]) * x[i];
  }
  return std::sqrt(squares);
}

// to = from / divisor
template <typename F>
IRESNET_FAST_INLINE void divide(const float* from, float divisor, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + kWide<F> <= n; i += kWide<F>) store(to + i, load<F>(from + i) / divisor);
  for (; i < n; ++i) to[i] = from[i] / divisor;
}

}  // namespace iresnet_fast
