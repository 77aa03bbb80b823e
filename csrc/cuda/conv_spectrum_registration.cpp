// Registration of the CUDA spectrum and certificate for CUDA tensors.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/real.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "common/autocorrelation.h"
#include "common/interrupt.h"
#include "common/spectrum.h"
#include "cuda/conv_spectrum.cuh"
#include "cuda/symbol_tensor.h"

namespace iresnet_fast {
namespace {

// The largest part of a symbol that is held at once.
constexpr int64_t kChunkBytes = int64_t{1} << 30;

// A convolution's distinct frequencies in chunks, and its Gram matrices where a thread block can hold one.
class Spectrum {
 public:
  // blocks: whether matrices are to be solved in thread blocks, if they fit.
  Spectrum(const at::Tensor& weight, at::IntArrayRef grid, at::IntArrayRef stride, at::IntArrayRef dilation,
           int64_t groups, bool blocks)
      : weight_(weight.contiguous()),
        problem_(weight_, grid, stride, dilation, groups),
        distinct_(distinct_frequencies(problem_.coarse)),
        index_(to_device(distinct_.index, weight_)) {
    int largest = 0;
    C10_CUDA_CHECK(largest_gram_order(weight_.get_device(), &largest));
    in_blocks_ = blocks && problem_.rank() <= largest;
    if (!in_blocks_) return;
    if (Autocorrelation::count_shifts(problem_) > kMaxShifts) return;
    const Autocorrelation autocorrelation(weight_, problem_, index_.numel());
    if (!autocorrelation.formed()) return;
    coefficients_ = autocorrelation.coefficients.transpose(1, 2).contiguous();
    std::vector<int64_t> shifts;
    for (const auto& shift : autocorrelation.shifts) shifts.insert(shifts.end(), shift.begin(), shift.end());
    shifts_ = to_device(shifts, weight_);
  }

  const SymbolProblem& problem() const { return problem_; }
  bool in_blocks() const { return in_blocks_; }
  at::Tensor mirror() const { return to_device(distinct_.mirror, weight_); }

  // Call work(first, frequencies, symbol) for chunks of the distinct frequencies; the symbol is undefined where the
  // Gram matrices follow from the autocorrelation, and then one chunk is all.
  template <typename Work>
  void in_chunks(const Work& work) const {
    const int64_t count = index_.numel();
    const int64_t memory = std::max<int64_t>(1, kChunkBytes / problem_.bytes_per_frequency());
    const int64_t chunk = coefficients_.defined() ? std::max<int64_t>(1, kMaxMatrices / problem_.groups) : memory;
    for (int64_t first = 0; first < count; first += chunk) {
      const at::Tensor here = index_.narrow(0, first, std::min(chunk, count - first));
      work(first, here, coefficients_.defined() ? at::Tensor() : symbol_at(weight_, problem_, here));
      check_interrupt();
    }
  }

  // Of the frequencies of a chunk; `formed` keeps what the description points to.
  GramMatrices matrices(const at::Tensor& frequencies, const at::Tensor& symbol, at::Tensor& formed) const {
    GramMatrices gram{};
    gram.order = static_cast<int>(problem_.rank());
    gram.groups = problem_.groups;
    gram.shape = problem_.shape;
    gram.frequencies = frequencies.const_data_ptr<int64_t>();
    if (symbol.defined()) {
      formed = smaller_gram(symbol).contiguous();
      gram.formed = reinterpret_cast<const double2*>(formed.const_data_ptr<c10::complex<double>>());
    } else {
      gram.coefficients = coefficients_.const_data_ptr<double>();
      gram.shifts = static_cast<int>(shifts_.numel() / kMaxAxes);
      gram.shift = shifts_.const_data_ptr<int64_t>();
    }
    return gram;
  }

 private:
  at::Tensor weight_;
  SymbolProblem problem_;
  DistinctFrequencies distinct_;
  at::Tensor index_, coefficients_, shifts_;
  bool in_blocks_ = false;
};

at::Tensor flag_like(const at::Tensor& weight) { return at::zeros({}, weight.options().dtype(at::kInt)); }

// Waits for the device, to check the eigenvalues.
at::Tensor conv_singular_values(const at::Tensor& weight, at::IntArrayRef grid, at::IntArrayRef stride,
                                at::IntArrayRef dilation, int64_t groups, c10::string_view driver) {
  const c10::cuda::CUDAGuard guard(weight.device());
  const Spectrum spectrum(weight, grid, stride, dilation, groups, driver == "gram");
  const SymbolProblem& problem = spectrum.problem();
  std::vector<int64_t> shape = problem.coarse;
  shape.push_back(groups * problem.rank());
  int64_t cells = 1;
  for (const int64_t n : problem.coarse) cells *= n;
  at::Tensor result = at::empty({cells, shape.back()}, weight.options());
  const at::Tensor mirror = spectrum.mirror(), wrong = flag_like(weight);
  spectrum.in_chunks([&](int64_t first, const at::Tensor& here, const at::Tensor& symbol) {
    at::Tensor values, formed;
    if (spectrum.in_blocks()) {
      values = at::empty({here.numel(), shape.back()}, weight.options());
      C10_CUDA_CHECK(launch_gram_values(spectrum.matrices(here, symbol, formed), here.numel(),
                                        values.data_ptr<double>(), wrong.data_ptr<int>(),
                                        c10::cuda::getCurrentCUDAStream()));
      if (groups > 1) values = std::get<0>(values.sort(-1, /*descending=*/true));
    } else {
      values = checked_singular_values(symbol, driver == "gram");
    }
    result.index_copy_(0, here, values);
    result.index_copy_(0, mirror.narrow(0, first, here.numel()), values);
  });
  check_eigenvalues(spectrum.in_blocks() && wrong.item<int>() != 0);
  return result.view(shape);
}

// Whether bound^2 I - G - margin I has a Cholesky factorisation at every frequency of the grid. Does not wait for its
// result.
at::Tensor conv_norm_below(const at::Tensor& weight, at::IntArrayRef grid, at::IntArrayRef stride,
                           at::IntArrayRef dilation, int64_t groups, double bound, double margin) {
  const c10::cuda::CUDAGuard guard(weight.device());
  const Spectrum spectrum(weight, grid, stride, dilation, groups, true);
  const double shift = bound * bound - margin;
  at::Tensor failed = flag_like(weight);
  spectrum.in_chunks([&](int64_t, const at::Tensor& here, const at::Tensor& symbol) {
    at::Tensor formed;
    if (spectrum.in_blocks()) {
      C10_CUDA_CHECK(launch_gram_below(spectrum.matrices(here, symbol, formed), here.numel(), shift,
                                       failed.data_ptr<int>(), c10::cuda::getCurrentCUDAStream()));
      return;
    }
    const at::Tensor identity = at::eye(spectrum.problem().rank(), symbol.options());
    const at::Tensor positive = identity * shift - smaller_gram(symbol);
    const auto [factor, info] = at::linalg_cholesky_ex(positive);
    // A solver need not report a NaN as a failure.
    const at::Tensor finite = at::real(factor.diagonal(0, -2, -1)).isfinite();
    failed.logical_or_(info.ne(0).any()).logical_or_(finite.all().logical_not());
  });
  return failed.eq(0);
}

}  // namespace

TORCH_LIBRARY_IMPL(iresnet_fast, CUDA, m) {
  m.impl("conv_singular_values", &conv_singular_values);
  m.impl("conv_norm_below", &conv_norm_below);
}

}  // namespace iresnet_fast
