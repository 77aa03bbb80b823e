// The symbol of a convolution on the CPU, at any of the coarse grid's frequencies.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/conv_symbol.h"

namespace iresnet_fast {

// weight_by_tap: (taps, c_out * c_in), contiguous; frequencies: flat indices on the coarse grid.
// Returns complex128 (count, groups, c_out/groups, aliases * c_in/groups).
at::Tensor conv_symbol_at(const SymbolProblem& problem, const at::Tensor& weight_by_tap, const int64_t* frequencies,
                          int64_t count);

// (taps, c_out * c_in) of a weight.
at::Tensor weight_by_tap(const at::Tensor& weight, const SymbolProblem& problem);

}  // namespace iresnet_fast
