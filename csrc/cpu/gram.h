// Where the Gram matrices of a symbol come from: at each frequency, F^H F or F F^H, whichever is smaller.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "common/conv_symbol.h"
#include "cpu/hermitian.h"

namespace iresnet_fast {

// The Gram matrices of a convolution, group by group of channels, without the symbol where that is cheaper: for stride
// 1, G(w) = sum_s R_s exp(-i w.s) with the kernel's autocorrelation R_s = sum_t K_t^T K_{t+s}, whose (2k-1)^d blocks
// are real and satisfy R_{-s} = R_s^T.
class GramSource {
 public:
  GramSource(const at::Tensor& weight, const SymbolProblem& problem, int64_t frequencies);

  int64_t order() const { return order_; }
  // Fill the lower triangles for kLanes frequencies (flat indices on the coarse grid) and one group of channels.
  void fill(const int64_t* frequencies, int64_t group, HermitianGroup& matrices) const;

 private:
  void correlate(const at::Tensor& weight);

  const SymbolProblem& problem_;
  int64_t order_;
  bool inner_;                                // F^H F rather than F F^H
  std::vector<std::vector<int64_t>> shifts_;  // s, one of each pair s and -s; empty where the symbol is formed
  std::vector<at::Tensor> coefficients_;      // per group: (entries, 1 + 2 shifts)
  at::Tensor taps_;                           // of the weight, for the symbol
};

}  // namespace iresnet_fast
