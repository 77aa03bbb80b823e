// Singular values of a circular convolution at its distinct frequencies, and proofs that they stay below a bound;
// parallel over frequencies.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "common/interrupt.h"
#include "common/spectrum.h"
#include "cpu/conv_symbol.h"
#include "cpu/gram.h"
#include "cpu/hermitian.h"
#include "cpu/invariants.h"

namespace iresnet_fast {
namespace {

// Matrices of a larger order leave the caches, where LAPACK's blocked reduction is faster.
constexpr int64_t kLargestOrder = 640;

// Parallel over [0, count) in slices, of less than a second up to order 640, between which Ctrl-C is heard.
template <typename Work>
void parallel_in_slices(int64_t count, double flops_each, const Work& work) {
  constexpr double kSliceFlops = 1e10;
  const int64_t slice = std::max<int64_t>(at::get_num_threads(), static_cast<int64_t>(kSliceFlops / flops_each));
  for (int64_t first = 0; first < count; first += slice) {
    at::parallel_for(first, std::min(count, first + slice), 1, work);
    check_interrupt();
  }
}

// Operations of a complex Hermitian eigenvalue problem of order n, most of them in its reduction.
double eigenvalue_flops(int64_t n) { return 16.0 / 3 * n * n * n + 1; }

// Splits the distinct frequencies into groups of kLanes, the last filled up by repeating its last frequency.
class FrequencyGroups {
 public:
  explicit FrequencyGroups(const DistinctFrequencies& distinct)
      : count_(static_cast<int64_t>(distinct.index.size())), index_(distinct.index) {
    while (index_.size() % kLanes) index_.push_back(index_.back());
  }
  int64_t size() const { return static_cast<int64_t>(index_.size()) / kLanes; }
  const int64_t* of(int64_t group) const { return index_.data() + group * kLanes; }
  // How many of a group's frequencies are not repeated.
  int64_t lanes(int64_t group) const { return std::min<int64_t>(kLanes, count_ - group * kLanes); }

 private:
  int64_t count_;
  std::vector<int64_t> index_;
};

// Scale the matrices of lanes whose entries' fourth powers would leave the range of a double, by a power of two that is
// returned; groups of channels can differ by any factor.
Pack bring_into_range(HermitianGroup& matrices) {
  Pack trace = splat(0), scale = splat(1);
  for (int64_t i = 0; i < matrices.order(); ++i) trace += matrices.matrix()[entry_index(i, i)].re;
  bool needed = false;
  for (int lane = 0; lane < kLanes; ++lane)
    if (trace[lane] > 0 && (trace[lane] < 1e-60 || trace[lane] > 1e60)) {
      int exponent = 0;
      std::frexp(trace[lane], &exponent);
      scale[lane] = std::ldexp(1.0, std::clamp(exponent, -1000, 1000));
      needed = true;
    }
  if (!needed) return scale;
  const Pack inverse = splat(1) / scale;
  for (int64_t i = 0; i < matrices.entries(); ++i) {
    matrices.matrix()[i].re *= inverse;
    matrices.matrix()[i].im *= inverse;
  }
  return scale;
}

// out: (count, groups * order) singular values at the distinct frequencies, not yet in order.
void values_by_gram(const GramSource& source, const FrequencyGroups& frequencies, int64_t channels, int64_t count,
                    double* out) {
  const int64_t n = source.order(), width = channels * n;
  const int64_t pairs = (frequencies.size() + kPairs - 1) / kPairs;
  std::atomic<bool> wrong{false};
  parallel_in_slices(pairs * channels, kPairs * kLanes * eigenvalue_flops(n), [&](int64_t begin, int64_t end) {
    const at::NoGradGuard no_grad;
    HermitianGroup matrices(n);
    Packed<Pack> diagonal(n), off_squared(n), d(n * kPairs), e(n * kPairs);
    std::vector<double> values(n);
    for (int64_t item = begin; item < end && !wrong; ++item) {
      const int64_t channel = item % channels, first = item / channels * kPairs;
      std::vector<Invariants> invariants;
      Pack scales[kPairs];
      for (int pair = 0; pair < kPairs; ++pair) {
        if (first + pair < frequencies.size()) {  // else the group before is solved once more beside itself
          source.fill(frequencies.of(first + pair), channel, matrices);
          scales[pair] = bring_into_range(matrices);
          invariants.emplace_back(matrices.matrix(), n);
          matrices.tridiagonalize(diagonal.data(), off_squared.data());
        }
        for (int64_t i = 0; i < n; ++i) {
          d[i * kPairs + pair] = diagonal[i];
          if (i + 1 < n) e[i * kPairs + pair] = off_squared[i];
        }
      }
      if (!tridiagonal_eigenvalues_of_pairs(d.data(), e.data(), n)) wrong = true;
      for (int pair = 0; pair < kPairs && first + pair < frequencies.size(); ++pair)
        for (int lane = 0; lane < frequencies.lanes(first + pair); ++lane) {
          for (int64_t i = 0; i < n; ++i) values[i] = d[i * kPairs + pair][lane];
          if (!invariants[pair].match(lane, values.data(), n)) wrong = true;
          double* to = out + ((first + pair) * kLanes + lane) * width + channel * n;
          for (int64_t i = 0; i < n; ++i) to[i] = std::sqrt(std::max(values[i], 0.0) * scales[pair][lane]);
        }
    }
  });
  check_eigenvalues(wrong);
  at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t f = begin; f < end; ++f) std::sort(out + f * width, out + (f + 1) * width, std::greater<double>());
  });
}

// The same through ATen's solvers, in chunks.
void values_by_aten(const at::Tensor& taps, const SymbolProblem& problem, const DistinctFrequencies& distinct,
                    bool gram, double* out) {
  const int64_t count = static_cast<int64_t>(distinct.index.size()), width = problem.groups * problem.rank();
  // Small enough to stay near the caches and to share the work evenly, large enough to amortise a call.
  constexpr int64_t kChunkBytes = int64_t{8} << 20;
  const int64_t by_memory = std::max<int64_t>(1, kChunkBytes / problem.bytes_per_frequency());
  const int64_t by_threads = std::max<int64_t>(1, count / (4 * at::get_num_threads()));
  const int64_t chunk = std::min(by_memory, by_threads);
  const double flops = chunk * problem.groups * 4 * eigenvalue_flops(problem.rank());
  parallel_in_slices((count + chunk - 1) / chunk, flops, [&](int64_t begin, int64_t end) {
    const at::NoGradGuard no_grad;
    for (int64_t first = begin * chunk; first < std::min(count, end * chunk); first += chunk) {
      const int64_t size = std::min(chunk, count - first);
      const at::Tensor symbol = conv_symbol_at(problem, taps, distinct.index.data() + first, size);
      const at::Tensor values = checked_singular_values(symbol, gram).contiguous();
      std::memcpy(out + first * width, values.const_data_ptr<double>(), size * width * sizeof(double));
    }
  });
}

at::Tensor conv_singular_values(const at::Tensor& weight, at::IntArrayRef grid, at::IntArrayRef stride,
                                at::IntArrayRef dilation, int64_t groups, c10::string_view driver) {
  const SymbolProblem problem(weight, grid, stride, dilation, groups);
  DistinctFrequencies distinct = distinct_frequencies(problem.coarse);
  const int64_t count = static_cast<int64_t>(distinct.index.size()), width = groups * problem.rank();
  const at::Tensor found = at::empty({count, width}, weight.options());
  double* values = found.data_ptr<double>();
  if (driver == "gram" && problem.rank() <= kLargestOrder) {
    const GramSource source(weight, problem, count);
    values_by_gram(source, FrequencyGroups(distinct), groups, count, values);
  } else {
    values_by_aten(weight_by_tap(weight, problem), problem, distinct, driver == "gram", values);
  }
  std::vector<int64_t> shape = problem.coarse;
  shape.push_back(width);
  at::Tensor result = at::empty(shape, weight.options());
  double* out = result.data_ptr<double>();
  for (int64_t f = 0; f < count; ++f) {
    std::memcpy(out + distinct.index[f] * width, values + f * width, width * sizeof(double));
    std::memcpy(out + distinct.mirror[f] * width, values + f * width, width * sizeof(double));
  }
  return result;
}

// Whether bound^2 I - G - margin I has a Cholesky factorisation at every frequency of the grid.
at::Tensor conv_norm_below(const at::Tensor& weight, at::IntArrayRef grid, at::IntArrayRef stride,
                           at::IntArrayRef dilation, int64_t groups, double bound, double margin) {
  const SymbolProblem problem(weight, grid, stride, dilation, groups);
  const DistinctFrequencies distinct = distinct_frequencies(problem.coarse);
  const GramSource source(weight, problem, static_cast<int64_t>(distinct.index.size()));
  const FrequencyGroups frequencies(distinct);
  const int64_t n = source.order();
  const Pack shift = splat(bound * bound - margin);
  std::atomic<bool> proven{true};
  parallel_in_slices(frequencies.size() * groups, kLanes * eigenvalue_flops(n) / 4, [&](int64_t begin, int64_t end) {
    const at::NoGradGuard no_grad;
    HermitianGroup matrices(n);
    for (int64_t item = begin; item < end && proven; ++item) {
      source.fill(frequencies.of(item / groups), item % groups, matrices);
      Entry* matrix = matrices.matrix();
      for (int64_t i = 0; i < matrices.entries(); ++i) matrix[i] = Entry{-matrix[i].re, -matrix[i].im};
      for (int64_t i = 0; i < n; ++i) matrix[entry_index(i, i)].re += shift;
      if (!matrices.has_cholesky()) proven = false;
    }
  });
  return at::scalar_tensor(at::Scalar(proven.load()), at::TensorOptions().dtype(at::kBool));
}

}  // namespace

TORCH_LIBRARY_IMPL(iresnet_fast, CPU, m) {
  m.impl("conv_singular_values", &conv_singular_values);
  m.impl("conv_norm_below", &conv_norm_below);
}

}  // namespace iresnet_fast
