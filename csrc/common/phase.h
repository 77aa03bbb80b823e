// The phases exp(-i w.t) of a convolution's symbol F(w) = sum_t K_t exp(-i w.t) (Sedghi, Gupta, Long 2018).
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace iresnet_fast {

// cos and sin of -2 pi m / n for m = 0 .. n-1. A phase is looked up at (t * j) mod n, reduced in integers, so it is
// exact to the last bit however large the frequency.
struct PhaseTable {
  std::vector<double> re, im;

  explicit PhaseTable(int64_t n) : re(n), im(n) {
    const double step = -2.0 * 3.14159265358979323846 / static_cast<double>(n);
    for (int64_t m = 0; m < n; ++m) {
      re[m] = std::cos(step * static_cast<double>(m));
      im[m] = std::sin(step * static_cast<double>(m));
    }
  }
};

}  // namespace iresnet_fast
