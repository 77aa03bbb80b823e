// The autocorrelation of a convolution's kernel, from which its Gram matrices follow at every frequency.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "common/conv_symbol.h"

namespace iresnet_fast {

// For stride 1, G(w) = sum_s R_s exp(-i w.s) with R_s = sum_t K_t^T K_{t+s}, whose (2k-1)^d blocks are real and satisfy
// R_{-s} = R_s^T (and with K K^T for F F^H, where that is smaller): real coefficients of 1 and, for one of each pair s
// and -s, of cos(w.s) and i sin(w.s).
struct Autocorrelation {
  std::vector<std::vector<int64_t>> shifts;
  at::Tensor coefficients;  // (groups, entries of the lower triangle, 1 + 2 shifts)

  // On weight's device; without shifts and coefficients where forming the symbol is cheaper or more accurate.
  Autocorrelation(const at::Tensor& weight, const SymbolProblem& problem, int64_t frequencies);

  bool formed() const { return coefficients.defined(); }

  // How many pairs s and -s there are.
  static int64_t count_shifts(const SymbolProblem& problem);

 private:
  void correlate(const at::Tensor& weight, const SymbolProblem& problem);
};

}  // namespace iresnet_fast
