// Arguments of the convolution-symbol ops, checked and put into the shape that both devices compute with.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

#include "common/frequencies.h"
#include "common/phase.h"

namespace iresnet_fast {

// The symbol at the distinct frequencies of the coarse grid n/s: (count, groups, c_out/groups, prod(s) c_in/groups).
struct SymbolProblem {
  SymbolShape shape{};
  std::vector<int64_t> coarse;  // the grid of frequencies, n/s
  int64_t groups, c_out, c_in;  // channels per group
  int64_t taps = 1, aliases = 1;

  SymbolProblem(const at::Tensor& weight, at::IntArrayRef grid, at::IntArrayRef stride, at::IntArrayRef dilation,
                int64_t groups)
      : groups(groups), c_out(weight.size(0) / groups), c_in(weight.size(1)) {
    TORCH_CHECK(weight.scalar_type() == at::kDouble, "weight must be float64, got ", weight.scalar_type());
    const int64_t axes = weight.dim() - 2, lead = kMaxAxes - axes;
    TORCH_CHECK(1 <= axes && lead >= 0, "weight must have 1 to 3 spatial axes, got shape ", weight.sizes());
    for (int64_t axis = 0; axis < axes; ++axis) {
      shape.grid[lead + axis] = grid[axis];
      shape.stride[lead + axis] = stride[axis];
      shape.dilation[lead + axis] = dilation[axis];
      shape.kernel[lead + axis] = weight.size(axis + 2);
      coarse.push_back(grid[axis] / stride[axis]);
      taps *= weight.size(axis + 2);
      aliases *= stride[axis];
    }
  }

  int64_t rank() const { return std::min(c_out, c_in * aliases); }
  int64_t bytes_per_frequency() const { return 16 * aliases * groups * c_out * c_in; }
};

}  // namespace iresnet_fast
