// Singular values of a circular convolution at its distinct frequencies, parallel over frequencies.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/spectrum.h"
#include "cpu/conv_symbol.h"

namespace iresnet_fast {
namespace {

at::Tensor conv_singular_values(const at::Tensor& weight, at::IntArrayRef grid, at::IntArrayRef stride,
                                at::IntArrayRef dilation, int64_t groups, c10::string_view driver) {
  const bool gram = driver == "gram";
  const SymbolProblem problem(weight, grid, stride, dilation, groups);
  const DistinctFrequencies distinct = distinct_frequencies(problem.coarse);
  const at::Tensor taps = weight_by_tap(weight, problem);
  const int64_t width = groups * problem.rank();
  std::vector<int64_t> shape = problem.coarse;
  shape.push_back(width);
  at::Tensor result = at::empty(shape, weight.options());
  double* out = result.data_ptr<double>();

  const int64_t count = static_cast<int64_t>(distinct.index.size());
  // Small enough to stay near the caches and to share the work evenly, large enough to amortise a call.
  constexpr int64_t kChunkBytes = int64_t{8} << 20;
  const int64_t by_memory = std::max<int64_t>(1, kChunkBytes / problem.bytes_per_frequency());
  const int64_t by_threads = std::max<int64_t>(1, count / (4 * at::get_num_threads()));
  const int64_t chunk = std::min(by_memory, by_threads);
  at::parallel_for(0, (count + chunk - 1) / chunk, 1, [&](int64_t begin, int64_t end) {
    const at::NoGradGuard no_grad;
    for (int64_t first = begin * chunk; first < std::min(count, end * chunk); first += chunk) {
      const int64_t size = std::min(chunk, count - first);
      const at::Tensor symbol = conv_symbol_at(problem, taps, distinct.index.data() + first, size);
      const at::Tensor values = checked_singular_values(symbol, gram).contiguous();
      const double* from = values.data_ptr<double>();
      for (int64_t i = 0; i < size; ++i, from += width) {
        std::memcpy(out + distinct.index[first + i] * width, from, width * sizeof(double));
        std::memcpy(out + distinct.mirror[first + i] * width, from, width * sizeof(double));
      }
    }
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(iresnet_fast, CPU, m) { m.impl("conv_singular_values", &conv_singular_values); }

}  // namespace iresnet_fast
