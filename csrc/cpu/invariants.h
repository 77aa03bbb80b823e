// A check that no eigenvalue was lost or wrong, made of what is known before they are computed.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/hermitian.h"

namespace iresnet_fast {

// What the eigenvalues of a group of matrices must sum up to.
struct Invariants {
  Pack trace = splat(0), frobenius = splat(0);

  Invariants(const Entry* matrix, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const Entry* row = matrix + entry_index(i, 0);
      for (int64_t j = 0; j < i; ++j) frobenius += splat(2) * (row[j].re * row[j].re + row[j].im * row[j].im);
      frobenius += row[i].re * row[i].re;
      trace += row[i].re;
    }
  }

  bool match(int lane, const double* eigenvalues, int64_t n) const {
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < n; ++i) {
      sum += eigenvalues[i];
      squares += eigenvalues[i] * eigenvalues[i];
    }
    const auto near = [](double found, double expected, double size) {
      return std::abs(found - expected) <= 1e-11 * std::max(size, 1e-290);
    };
    // A matrix of rounding errors is indefinite: its trace can cancel, its norm cannot.
    return near(sum, trace[lane], std::sqrt(n * frobenius[lane])) && near(squares, frobenius[lane], frobenius[lane]);
  }
};

}  // namespace iresnet_fast
