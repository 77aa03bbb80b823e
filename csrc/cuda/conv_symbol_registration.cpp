// Registration of the CUDA symbol and spectrum for CUDA tensors.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "common/conv_symbol.h"
#include "common/spectrum.h"
#include "cuda/conv_symbol.cuh"

namespace iresnet_fast {
namespace {

// The largest part of a symbol that is held at once.
constexpr int64_t kChunkBytes = int64_t{1} << 30;

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

at::Tensor conv_symbol(const at::Tensor& weight, at::IntArrayRef grid, at::IntArrayRef stride, at::IntArrayRef dilation,
                       int64_t groups) {
  const c10::cuda::CUDAGuard guard(weight.device());
  const SymbolProblem problem(weight, grid, stride, dilation, groups);
  return symbol_at(weight.contiguous(), problem, to_device(distinct_frequencies(problem.coarse).index, weight));
}

// Waits for the device: the eigensolver and the check of its values do.
at::Tensor conv_singular_values(const at::Tensor& weight, at::IntArrayRef grid, at::IntArrayRef stride,
                                at::IntArrayRef dilation, int64_t groups, c10::string_view driver) {
  const c10::cuda::CUDAGuard guard(weight.device());
  const SymbolProblem problem(weight, grid, stride, dilation, groups);
  const DistinctFrequencies distinct = distinct_frequencies(problem.coarse);
  const at::Tensor index = to_device(distinct.index, weight), mirror = to_device(distinct.mirror, weight);
  const at::Tensor taps = weight.contiguous();
  int64_t cells = 1;
  for (const int64_t n : problem.coarse) cells *= n;
  std::vector<int64_t> shape = problem.coarse;
  shape.push_back(groups * problem.rank());
  at::Tensor result = at::empty({cells, shape.back()}, weight.options());
  const int64_t chunk = std::max<int64_t>(1, kChunkBytes / problem.bytes_per_frequency());
  for (int64_t first = 0; first < index.numel(); first += chunk) {
    const int64_t size = std::min(chunk, index.numel() - first);
    const at::Tensor here = index.narrow(0, first, size);
    const at::Tensor values = checked_singular_values(symbol_at(taps, problem, here), driver == "gram");
    result.index_copy_(0, here, values);
    result.index_copy_(0, mirror.narrow(0, first, size), values);
  }
  return result.view(shape);
}

}  // namespace

TORCH_LIBRARY_IMPL(iresnet_fast, CUDA, m) {
  m.impl("conv_symbol", &conv_symbol);
  m.impl("conv_singular_values", &conv_singular_values);
}

}  // namespace iresnet_fast
