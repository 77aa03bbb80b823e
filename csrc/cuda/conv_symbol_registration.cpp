// Registration of the CUDA symbol for CUDA tensors.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "cuda/conv_symbol.cuh"
#include "cuda/symbol_tensor.h"

namespace iresnet_fast {

at::Tensor to_device(const std::vector<int64_t>& values, const at::Tensor& like) {
  const auto host =
      at::from_blob(const_cast<int64_t*>(values.data()), {static_cast<int64_t>(values.size())}, at::kLong);
  return host.to(like.device());
}

at::Tensor symbol_at(const at::Tensor& weight, const SymbolProblem& problem, const at::Tensor& frequencies) {
  TORCH_CHECK(problem.taps <= kMaxTaps, "the CUDA symbol takes kernels of up to ", kMaxTaps, " taps, got ",
              problem.taps, ". Remedy: IRESNET_FAST_BACKEND=reference");
  const int64_t count = frequencies.numel(), columns = problem.aliases * problem.c_in;
  const auto options = weight.options().dtype(at::kComplexDouble);
  at::Tensor symbol = at::empty({count, problem.groups, problem.c_out, columns}, options);
  const SymbolSizes sizes{count, problem.aliases, problem.groups, problem.c_out, problem.c_in, problem.taps};
  const double scale = 1.0 / std::sqrt(static_cast<double>(problem.aliases));
  C10_CUDA_CHECK(launch_conv_symbol(weight.data_ptr<double>(), frequencies.data_ptr<int64_t>(),
                                    reinterpret_cast<double2*>(symbol.data_ptr<c10::complex<double>>()), problem.shape,
                                    sizes, scale, c10::cuda::getCurrentCUDAStream()));
  return symbol;
}

namespace {

at::Tensor conv_symbol(const at::Tensor& weight, at::IntArrayRef grid, at::IntArrayRef stride, at::IntArrayRef dilation,
                       int64_t groups) {
  const c10::cuda::CUDAGuard guard(weight.device());
  const SymbolProblem problem(weight, grid, stride, dilation, groups);
  return symbol_at(weight.contiguous(), problem, to_device(distinct_frequencies(problem.coarse).index, weight));
}

}  // namespace

TORCH_LIBRARY_IMPL(iresnet_fast, CUDA, m) { m.impl("conv_symbol", &conv_symbol); }

}  // namespace iresnet_fast
