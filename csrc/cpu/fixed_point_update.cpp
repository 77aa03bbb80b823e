// One step of the fixed-point inverse and its residual, in one pass over memory.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

namespace iresnet_fast {
namespace {

// Squares are summed in double precision: in float32 they would underflow where a residual is as small as it should be.
template <typename scalar_t>
void update_sample(const scalar_t* __restrict__ y, const scalar_t* __restrict__ image, const scalar_t* __restrict__ x,
                   scalar_t* __restrict__ following, scalar_t* residual, int64_t size) {
  constexpr int kSums = 8;  // a fixed order, and independent chains of additions
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= size; i += kSums)
    for (int lane = 0; lane < kSums; ++lane) {
      const scalar_t next = y[i + lane] - image[i + lane];
      const double step = next - x[i + lane];
      following[i + lane] = next;
      sums[lane] += step * step;
    }
  for (; i < size; ++i) {
    const scalar_t next = y[i] - image[i];
    const double step = next - x[i];
    following[i] = next;
    sums[0] += step * step;
  }
  double total = 0;
  for (const double sum : sums) total += sum;
  *residual = static_cast<scalar_t>(std::sqrt(total));
}

// Float32 and float64, of one dense layout.
std::tuple<at::Tensor, at::Tensor> fixed_point_update(const at::Tensor& y, const at::Tensor& image,
                                                      const at::Tensor& x) {
  const bool last = y.dim() == 4 && y.is_contiguous(at::MemoryFormat::ChannelsLast);
  const at::MemoryFormat layout = last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const at::Tensor from = y.contiguous(layout), minus = image.contiguous(layout), before = x.contiguous(layout);
  at::Tensor following = at::empty_like(from), residual = at::empty({y.size(0)}, y.options());
  const int64_t samples = y.size(0), size = samples ? y.numel() / samples : 0;
  AT_DISPATCH_FLOATING_TYPES(y.scalar_type(), "fixed_point_update", [&] {
    const scalar_t *a = from.const_data_ptr<scalar_t>(), *b = minus.const_data_ptr<scalar_t>(),
                   *c = before.const_data_ptr<scalar_t>();
    scalar_t *next = following.data_ptr<scalar_t>(), *norms = residual.data_ptr<scalar_t>();
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, size));
    at::parallel_for(0, samples, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        update_sample(a + i * size, b + i * size, c + i * size, next + i * size, norms + i, size);
    });
  });
  return {following, residual};
}

}  // namespace

TORCH_LIBRARY_IMPL(iresnet_fast, CPU, m) { m.impl("fixed_point_update", &fixed_point_update); }

}  // namespace iresnet_fast
