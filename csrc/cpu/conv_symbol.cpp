// The symbol of a convolution on the CPU: one phase matrix times the weights, already frequency-major.
#include "cpu/conv_symbol.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/complex.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>

namespace iresnet_fast {

at::Tensor weight_by_tap(const at::Tensor& weight, const SymbolProblem& problem) {
  return weight.reshape({-1, problem.taps}).t().contiguous();
}

at::Tensor conv_symbol_at(const SymbolProblem& problem, const at::Tensor& weight_by_tap, const int64_t* frequencies,
                          int64_t count) {
  const int64_t aliases = problem.aliases, taps = problem.taps;
  at::Tensor cosines = at::empty({count * aliases, taps}, weight_by_tap.options());
  at::Tensor sines = at::empty({count * aliases, taps}, weight_by_tap.options());
  double* re = cosines.data_ptr<double>();
  double* im = sines.data_ptr<double>();
  for (int64_t f = 0; f < count; ++f) {
    for (int64_t alias = 0; alias < aliases; ++alias) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        const Phase phase = tap_phase(problem.shape, frequencies[f], alias, tap);
        *re++ = phase.re;
        *im++ = phase.im;
      }
    }
  }
  at::Tensor symbol = at::complex(cosines.matmul(weight_by_tap), sines.matmul(weight_by_tap));
  symbol = symbol.view({count, aliases, problem.groups, problem.c_out, problem.c_in}).permute({0, 2, 3, 1, 4});
  symbol = symbol.reshape({count, problem.groups, problem.c_out, aliases * problem.c_in});
  return aliases == 1 ? symbol : symbol.div_(std::sqrt(static_cast<double>(aliases)));
}

namespace {

at::Tensor conv_symbol(const at::Tensor& weight, at::IntArrayRef grid, at::IntArrayRef stride, at::IntArrayRef dilation,
                       int64_t groups) {
  const SymbolProblem problem(weight, grid, stride, dilation, groups);
  const DistinctFrequencies distinct = distinct_frequencies(problem.coarse);
  const int64_t count = static_cast<int64_t>(distinct.index.size());
  return conv_symbol_at(problem, weight_by_tap(weight, problem), distinct.index.data(), count);
}

}  // namespace

TORCH_LIBRARY_IMPL(iresnet_fast, CPU, m) { m.impl("conv_symbol", &conv_symbol); }

}  // namespace iresnet_fast
