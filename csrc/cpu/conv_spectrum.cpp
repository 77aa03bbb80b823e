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
#include <type_traits>
#include <vector>

#include "common/interrupt.h"
#include "common/spectrum.h"
#include "cpu/conv_symbol.h"
#include "cpu/gram.h"
#include "cpu/hermitian.h"

namespace iresnet_fast {
namespace {

// Matrices of a larger order leave the caches, where LAPACK's blocked reduction is faster.
constexpr int64_t kLargestOrder = 640;

// How many items are less than a second's work up to order 640, and hold no more memory than the caches; as many for
// each thread.
int64_t items_of_a_slice(double flops_each, int64_t bytes_each) {
  constexpr double kSliceFlops = 1e10, kSliceBytes = 16 << 20;
  const int64_t threads = at::get_num_threads();
  const auto items = static_cast<int64_t>(std::min(kSliceFlops / flops_each, kSliceBytes / bytes_each));
  return std::max<int64_t>(1, items / threads) * threads;
}

// Parallel over [0, count) in slices, between which Ctrl-C is heard.
template <typename Work>
void parallel_in_slices(int64_t count, double flops_each, const Work& work) {
  const int64_t slice = items_of_a_slice(flops_each, 1);
  for (int64_t first = 0; first < count; first += slice) {
    at::parallel_for(first, std::min(count, first + slice), 1, work);
    check_interrupt();
  }
}

// Operations of a complex Hermitian eigenvalue problem of order n, most of them in its reduction.
double eigenvalue_flops(int64_t n) { return 16.0 / 3 * n * n * n + 1; }

// Splits the distinct frequencies into groups of some lanes, the last filled up by repeating its last frequency.
class FrequencyGroups {
 public:
  FrequencyGroups(const DistinctFrequencies& distinct, int64_t lanes)
      : lanes_(lanes), count_(static_cast<int64_t>(distinct.index.size())), index_(distinct.index) {
    while (index_.size() % lanes) index_.push_back(index_.back());
  }
  int64_t size() const { return static_cast<int64_t>(index_.size()) / lanes_; }
  const int64_t* of(int64_t group) const { return index_.data() + group * lanes_; }
  // How many of a group's frequencies are not repeated.
  int64_t lanes(int64_t group) const { return std::min(lanes_, count_ - group * lanes_); }

 private:
  int64_t lanes_, count_;
  std::vector<int64_t> index_;
};

// work(std::type_identity<a pack>): as wide as the processor's vectors, where the groups of so many matrices then still
// serve all threads.
template <typename Work>
auto with_packs(int64_t matrices, const Work& work) {
  const bool enough = matrices >= 2 * kLanes<Pack8> * at::get_num_threads();
  return enough && kProcessor == Processor::avx512 ? work(std::type_identity<Pack8>{})
                                                   : work(std::type_identity<Pack4>{});
}

// A group of matrices on their way to their eigenvalues.
template <typename P>
struct Reduced {
  Invariants<P> invariants;
  P scale;
};

// out: (count, channels * order) singular values at the distinct frequencies, not yet in order.
template <typename P>
void values_by_gram(const GramSource& source, const DistinctFrequencies& distinct, int64_t channels, double* out) {
  const FrequencyGroups frequencies(distinct, kLanes<P>);
  const int64_t n = source.order(), items = frequencies.size() * channels;
  const int64_t slice = items_of_a_slice(kLanes<P> * eigenvalue_flops(n), 2 * n * sizeof(P) + sizeof(Reduced<P>));
  std::atomic<bool> wrong{false};
  // Of the items of a slice: the diagonals of the reduced matrices, interleaved by pairs.
  const int64_t held = (std::min(slice, items) + kPairs - 1) / kPairs * kPairs;
  Packed<P> d(held * n), e(held * n);
  Packed<Reduced<P>> reduced(held);
  for (int64_t first = 0; first < items && !wrong; first += slice) {
    const int64_t count = std::min(slice, items - first);
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      const at::NoGradGuard no_grad;
      HermitianGroup<P> matrices(n);
      Packed<P> diagonal(n), off_squared(n);
      for (int64_t item = begin; item < end; ++item) {
        source.fill(frequencies.of((first + item) / channels), (first + item) % channels, matrices);
        matrices.bring_into_range(&reduced[item].scale);
        matrices.take_invariants(&reduced[item].invariants);
        matrices.tridiagonalize(diagonal.data(), off_squared.data());
        // The last one of an odd number is solved beside itself.
        for (int64_t to = item; to < (item + 1 == count ? (item / kPairs + 1) * kPairs : item + 1); ++to)
          for (int64_t i = 0; i < n; ++i) {
            const int64_t at = (to / kPairs * n + i) * kPairs + to % kPairs;
            d[at] = diagonal[i];
            if (i + 1 < n) e[at] = off_squared[i];
          }
      }
    });
    at::parallel_for(0, (count + kPairs - 1) / kPairs, 1, [&](int64_t begin, int64_t end) {
      std::vector<double> values(n);
      for (int64_t pair = begin; pair < end && !wrong; ++pair) {
        P* found = d.data() + pair * n * kPairs;
        if (!tridiagonal_eigenvalues_of_pairs(found, e.data() + pair * n * kPairs, n)) wrong = true;
        for (int64_t item = pair * kPairs; item < std::min((pair + 1) * kPairs, count); ++item) {
          const int64_t group = (first + item) / channels, channel = (first + item) % channels;
          for (int lane = 0; lane < frequencies.lanes(group); ++lane) {
            for (int64_t i = 0; i < n; ++i) values[i] = found[i * kPairs + item % kPairs][lane];
            if (!reduced[item].invariants.match(lane, values.data(), n)) wrong = true;
            double* to = out + ((group * kLanes<P> + lane) * channels + channel) * n;
            for (int64_t i = 0; i < n; ++i) to[i] = std::sqrt(std::max(values[i], 0.0) * reduced[item].scale[lane]);
          }
        }
      }
    });
    check_interrupt();
  }
  check_eigenvalues(wrong);
  const int64_t width = channels * n;
  at::parallel_for(0, static_cast<int64_t>(distinct.index.size()), 16, [&](int64_t begin, int64_t end) {
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
    with_packs(count * groups,
               [&]<typename P>(std::type_identity<P>) { values_by_gram<P>(source, distinct, groups, values); });
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

template <typename P>
bool all_positive_definite(const GramSource& source, const DistinctFrequencies& distinct, int64_t channels,
                           double shift) {
  const FrequencyGroups frequencies(distinct, kLanes<P>);
  const int64_t n = source.order();
  std::atomic<bool> proven{true};
  parallel_in_slices(frequencies.size() * channels, kLanes<P> * eigenvalue_flops(n) / 4,
                     [&](int64_t begin, int64_t end) {
                       const at::NoGradGuard no_grad;
                       HermitianGroup<P> matrices(n);
                       for (int64_t item = begin; item < end && proven; ++item) {
                         source.fill(frequencies.of(item / channels), item % channels, matrices);
                         matrices.subtract_from(shift);
                         if (!matrices.has_cholesky()) proven = false;
                       }
                     });
  return proven;
}

// Whether bound^2 I - G - margin I has a Cholesky factorisation at every frequency of the grid.
at::Tensor conv_norm_below(const at::Tensor& weight, at::IntArrayRef grid, at::IntArrayRef stride,
                           at::IntArrayRef dilation, int64_t groups, double bound, double margin) {
  const SymbolProblem problem(weight, grid, stride, dilation, groups);
  const DistinctFrequencies distinct = distinct_frequencies(problem.coarse);
  const int64_t count = static_cast<int64_t>(distinct.index.size());
  const GramSource source(weight, problem, count);
  const bool proven = with_packs(count * groups, [&]<typename P>(std::type_identity<P>) {
    return all_positive_definite<P>(source, distinct, groups, bound * bound - margin);
  });
  return at::scalar_tensor(at::Scalar(proven), at::TensorOptions().dtype(at::kBool));
}

}  // namespace

TORCH_LIBRARY_IMPL(iresnet_fast, CPU, m) {
  m.impl("conv_singular_values", &conv_singular_values);
  m.impl("conv_norm_below", &conv_norm_below);
}

}  // namespace iresnet_fast
