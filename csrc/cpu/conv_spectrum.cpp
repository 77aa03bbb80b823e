// Singular values of a circular convolution at its distinct frequencies, parallel over frequencies.
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/complex.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_eigvalsh.h>
#include <ATen/ops/linalg_svdvals.h>
#include <ATen/ops/view_as_real.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "common/frequencies.h"
#include "common/phase.h"

namespace iresnet_fast {
namespace {

using Sizes = std::vector<int64_t>;

int64_t product(at::IntArrayRef sizes) {
  int64_t result = 1;
  for (const int64_t size : sizes) result *= size;
  return result;
}

// Coordinates of a flat (row-major) index.
Sizes unravel(int64_t flat, const Sizes& sizes) {
  Sizes index(sizes.size());
  for (size_t axis = sizes.size(); axis-- > 0;) {
    index[axis] = flat % sizes[axis];
    flat /= sizes[axis];
  }
  return index;
}

// Evaluates the symbol on a grid. With stride s, the frequencies that alias onto one of the coarse grid are stacked
// along the input channels and scaled by 1/sqrt(prod s).
class Symbol {
 public:
  Symbol(const at::Tensor& weight, Sizes grid, Sizes stride, Sizes dilation, int64_t groups)
      : grid_(std::move(grid)), stride_(std::move(stride)), dilation_(std::move(dilation)), groups_(groups) {
    c_out_ = weight.size(0) / groups;
    c_in_ = weight.size(1);
    kernel_.assign(weight.sizes().begin() + 2, weight.sizes().end());
    for (const int64_t n : grid_) tables_.emplace_back(n);
    for (size_t axis = 0; axis < grid_.size(); ++axis) coarse_.push_back(grid_[axis] / stride_[axis]);
    aliases_ = product(stride_);
    taps_ = product(kernel_);
    weight_by_tap_ = weight.reshape({weight.size(0) * c_in_, taps_}).t().contiguous();
  }

  const Sizes& coarse_grid() const { return coarse_; }
  int64_t rank() const { return std::min(c_out_, c_in_ * aliases_); }
  int64_t bytes_per_frequency() const { return 16 * aliases_ * groups_ * c_out_ * c_in_; }

  // (count, groups, c_out/groups, aliases * c_in/groups), complex128.
  at::Tensor at_frequencies(const int64_t* flat, int64_t count) const {
    const auto real = weight_by_tap_.options();
    at::Tensor cosines = at::empty({count * aliases_, taps_}, real);
    at::Tensor sines = at::empty({count * aliases_, taps_}, real);
    double* re = cosines.data_ptr<double>();
    double* im = sines.data_ptr<double>();
    for (int64_t f = 0; f < count; ++f) {
      const Sizes base = unravel(flat[f], coarse_);
      for (int64_t alias = 0; alias < aliases_; ++alias, re += taps_, im += taps_) {
        fill_phases(base, unravel(alias, stride_), re, im);
      }
    }
    const auto shape = {count, aliases_, groups_, c_out_, c_in_};
    at::Tensor symbol = at::complex(cosines.matmul(weight_by_tap_), sines.matmul(weight_by_tap_)).view(shape);
    symbol = symbol.permute({0, 2, 3, 1, 4}).reshape({count, groups_, c_out_, aliases_ * c_in_});
    return aliases_ == 1 ? symbol : symbol.div_(std::sqrt(static_cast<double>(aliases_)));
  }

 private:
  void fill_phases(const Sizes& base, const Sizes& alias, double* re, double* im) const {
    for (int64_t tap = 0; tap < taps_; ++tap) {
      const Sizes t = unravel(tap, kernel_);
      double c = 1.0, s = 0.0;
      for (size_t axis = 0; axis < grid_.size(); ++axis) {
        const int64_t frequency = base[axis] + alias[axis] * coarse_[axis];
        const int64_t m = (t[axis] * dilation_[axis] % grid_[axis]) * frequency % grid_[axis];
        const double tc = tables_[axis].re[m], ts = tables_[axis].im[m];
        const double next = c * tc - s * ts;
        s = c * ts + s * tc;
        c = next;
      }
      re[tap] = c;
      im[tap] = s;
    }
  }

  Sizes grid_, stride_, dilation_, kernel_, coarse_;
  int64_t groups_, c_out_, c_in_, aliases_, taps_;
  std::vector<PhaseTable> tables_;
  at::Tensor weight_by_tap_;
};

// Singular values, descending, from the Gram matrix on its smaller side: fast, and exact to sqrt(eps) * largest.
at::Tensor values_by_gram(const at::Tensor& symbol) {
  const bool wide = symbol.size(-2) <= symbol.size(-1);
  const at::Tensor gram = wide ? symbol.matmul(symbol.mH()) : symbol.mH().matmul(symbol);
  return at::linalg_eigvalsh(gram).flip({-1}).clamp_min_(0.0).sqrt_();
}

// A batched solver that went wrong must not pass for an answer: sum sigma^2 equals the squared Frobenius norm.
void check_frobenius(const at::Tensor& values, const at::Tensor& symbol) {
  const at::Tensor expected = at::view_as_real(symbol).square().sum({-3, -2, -1});
  const at::Tensor found = values.square().sum(-1);
  const double deviation = ((found - expected).abs() / expected.clamp_min(1e-300)).max().item<double>();
  TORCH_CHECK(deviation < 1e-9, "conv_singular_values: the solver's values do not match the operator's Frobenius norm ",
              "(relative deviation ", deviation, "); this is a fault of the linear algebra library. ",
              "Remedy: the other driver, or IRESNET_FAST_BACKEND=reference.");
}

at::Tensor conv_singular_values(const at::Tensor& weight, at::IntArrayRef grid, at::IntArrayRef stride,
                                at::IntArrayRef dilation, int64_t groups, c10::string_view driver) {
  TORCH_CHECK(weight.scalar_type() == at::kDouble, "conv_singular_values: weight must be float64, got ",
              weight.scalar_type());
  const bool gram = driver == "gram";
  const Symbol symbol(weight.contiguous(), grid.vec(), stride.vec(), dilation.vec(), groups);
  const DistinctFrequencies distinct = distinct_frequencies(symbol.coarse_grid());
  const int64_t width = groups * symbol.rank();
  Sizes shape = symbol.coarse_grid();
  shape.push_back(width);
  at::Tensor result = at::empty(shape, weight.options());
  double* out = result.data_ptr<double>();

  const int64_t count = static_cast<int64_t>(distinct.index.size());
  // Small enough to stay near the caches and to share the work evenly, large enough to amortise a call.
  constexpr int64_t kChunkBytes = int64_t{8} << 20;
  const int64_t by_memory = std::max<int64_t>(1, kChunkBytes / symbol.bytes_per_frequency());
  const int64_t by_threads = std::max<int64_t>(1, count / (4 * at::get_num_threads()));
  const int64_t chunk = std::min(by_memory, by_threads);
  at::parallel_for(0, (count + chunk - 1) / chunk, 1, [&](int64_t begin, int64_t end) {
    const at::NoGradGuard no_grad;
    for (int64_t first = begin * chunk; first < std::min(count, end * chunk); first += chunk) {
      const int64_t size = std::min(chunk, count - first);
      const at::Tensor f = symbol.at_frequencies(distinct.index.data() + first, size);
      at::Tensor values = gram ? values_by_gram(f) : at::linalg_svdvals(f);
      check_frobenius(values, f);
      values = values.reshape({size, width});
      if (groups > 1) values = std::get<0>(values.sort(-1, /*descending=*/true));
      values = values.contiguous();
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
