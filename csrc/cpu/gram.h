// Where the Gram matrices of a symbol come from: at each frequency, F^H F or F F^H, whichever is smaller.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/autocorrelation.h"
#include "common/conv_symbol.h"
#include "cpu/hermitian.h"

namespace iresnet_fast {

// The Gram matrices of a convolution, group by group of channels, without the symbol where that is cheaper.
class GramSource {
 public:
  GramSource(const at::Tensor& weight, const SymbolProblem& problem, int64_t frequencies);

  int64_t order() const { return problem_.rank(); }
  // Fill the lower triangles for kLanes<P> frequencies (flat indices on the coarse grid) and one group of channels.
  template <typename P>
  void fill(const int64_t* frequencies, int64_t group, HermitianGroup<P>& matrices) const;

 private:
  const SymbolProblem& problem_;
  Autocorrelation autocorrelation_;
  at::Tensor taps_;  // of the weight, for the symbol
};

}  // namespace iresnet_fast
