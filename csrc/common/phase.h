// The phases exp(-i w.t) of a convolution's symbol F(w) = sum_t K_t exp(-i w.t) (Sedghi, Gupta, Long 2018),
// one definition for CPU and GPU.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define IRESNET_FAST_HOST_DEVICE __host__ __device__
#else
#define IRESNET_FAST_HOST_DEVICE
#endif

namespace iresnet_fast {

constexpr int kMaxAxes = 3;

struct Phase {
  double re, im;
};

// Sizes of a convolution along its spatial axes, the last axis last; leading axes that it lacks have size 1. Always
// kMaxAxes of them, so that loops unroll and a GPU keeps them out of local memory.
struct SymbolShape {
  int64_t grid[kMaxAxes] = {1, 1, 1};      // spatial size of the input
  int64_t stride[kMaxAxes] = {1, 1, 1};    // divides the grid
  int64_t dilation[kMaxAxes] = {1, 1, 1};  // distance between taps
  int64_t kernel[kMaxAxes] = {1, 1, 1};    // taps
};

// exp(-2 pi i m / n) for 0 <= m < n. The caller reduces m in integers, so the angle is exact however large the
// frequency.
IRESNET_FAST_HOST_DEVICE inline Phase root_of_unity(int64_t m, int64_t n) {
  const double turns = static_cast<double>(m) / static_cast<double>(n);
#ifdef __CUDA_ARCH__
  Phase phase;
  sincospi(-2.0 * turns, &phase.im, &phase.re);
  return phase;
#else
  constexpr double kTwoPi = 6.28318530717958647692;
  return {std::cos(kTwoPi * turns), -std::sin(kTwoPi * turns)};
#endif
}

// Phase of one tap (flat index) at one frequency of the coarse grid n/s and one of the prod(s) frequencies that alias
// onto it (flat indices, row-major).
IRESNET_FAST_HOST_DEVICE inline Phase tap_phase(const SymbolShape& shape, int64_t frequency, int64_t alias,
                                                int64_t tap) {
  Phase phase{1.0, 0.0};
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int axis = kMaxAxes - 1; axis >= 0; --axis) {
    const int64_t n = shape.grid[axis], s = shape.stride[axis], coarse = n / s, k = shape.kernel[axis];
    const int64_t j = frequency % coarse + alias % s * coarse;
    const int64_t position = tap % k * shape.dilation[axis] % n;
    const Phase step = root_of_unity(position * j % n, n);
    phase = {phase.re * step.re - phase.im * step.im, phase.re * step.im + phase.im * step.re};
    frequency /= coarse;
    alias /= s;
    tap /= k;
  }
  return phase;
}

// Phase exp(-i w.s) of a shift between two taps, of either sign, at a frequency of the full grid (stride 1).
IRESNET_FAST_HOST_DEVICE inline Phase shift_phase(const SymbolShape& shape, int64_t frequency, const int64_t* shift) {
  Phase phase{1.0, 0.0};
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int axis = kMaxAxes - 1; axis >= 0; --axis) {
    const int64_t n = shape.grid[axis], j = frequency % n;
    const int64_t position = (shift[axis] * shape.dilation[axis] % n + n) % n;
    const Phase step = root_of_unity(position * j % n, n);
    phase = {phase.re * step.re - phase.im * step.im, phase.re * step.im + phase.im * step.re};
    frequency /= n;
  }
  return phase;
}

}  // namespace iresnet_fast
