// The symbol as a CUDA tensor, for the ops that start from it.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "common/conv_symbol.h"

namespace iresnet_fast {

// A vector on the device of another tensor.
at::Tensor to_device(const std::vector<int64_t>& values, const at::Tensor& like);

// (count, groups, c_out, aliases * c_in), complex128, at these flat indices on the coarse grid; weight is contiguous.
at::Tensor symbol_at(const at::Tensor& weight, const SymbolProblem& problem, const at::Tensor& frequencies);

}  // namespace iresnet_fast
