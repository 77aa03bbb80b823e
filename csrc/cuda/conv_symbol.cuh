// Plain entry point of the CUDA kernel: no torch headers, so nvcc takes seconds and can check it on any machine.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/phase.h"

namespace iresnet_fast {

// The phases of one frequency must fit into shared memory.
constexpr int64_t kMaxTaps = 3072;

// Sizes of one launch; channels are per group.
struct SymbolSizes {
  int64_t frequencies, aliases, groups, c_out, c_in, taps;
};

// symbol[f, g, o, a * c_in + i] = scale * sum_t weight[g, o, i, t] * phase(frequencies[f], a, t), all row-major.
// weight: (groups * c_out, c_in, taps) float64; frequencies: flat indices on the coarse grid; symbol: complex128.
// Returns the launch's error, cudaSuccess where it was queued on the stream.
cudaError_t launch_conv_symbol(const double* weight, const int64_t* frequencies, double2* symbol,
                               const SymbolShape& shape, const SymbolSizes& sizes, double scale, cudaStream_t stream);

}  // namespace iresnet_fast
