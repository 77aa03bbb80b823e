// Gram matrices from the kernel's autocorrelation, or from the symbol.
#include "cpu/gram.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tril_indices.h>
#include <ATen/ops/view_as_real.h>

#include "cpu/conv_symbol.h"

namespace iresnet_fast {
namespace {

// The autocorrelation is kept where it is no larger than this.
constexpr int64_t kCoefficientBytes = int64_t{256} << 20;

}  // namespace

GramSource::GramSource(const at::Tensor& weight, const SymbolProblem& problem, int64_t frequencies)
    : problem_(problem),
      order_(problem.rank()),
      inner_(problem.c_in * problem.aliases <= problem.c_out),
      taps_(weight_by_tap(weight, problem)) {
  int64_t shifts = 1;
  for (int axis = 0; axis < kMaxAxes; ++axis) shifts *= 2 * problem.shape.kernel[axis] - 1;
  const int64_t pairs_of_taps = problem.taps * (problem.taps + 1);
  const int64_t bytes = problem.groups * order_ * (order_ + 1) / 2 * shifts * 8;
  // Taps that wrap onto each other may cancel, in the symbol to the last bit, in the autocorrelation to rounding.
  bool apart = true;
  for (int axis = 0; axis < kMaxAxes; ++axis) {
    const int64_t n = problem.shape.grid[axis], step = problem.shape.dilation[axis] % n;
    for (int64_t tap = 1; tap < problem.shape.kernel[axis]; ++tap) apart = apart && tap * step % n != 0;
  }
  const bool cheaper = pairs_of_taps <= 8 * frequencies && bytes <= kCoefficientBytes;
  if (problem.aliases == 1 && apart && cheaper) correlate(weight);
}

void GramSource::correlate(const at::Tensor& weight) {
  const int64_t* kernel = problem_.shape.kernel;
  const at::Tensor indices = at::tril_indices(order_, order_);
  const at::Tensor entries = indices[0] * order_ + indices[1];
  for (int64_t group = 0; group < problem_.groups; ++group) {
    // (taps, rows, order): the side that is summed over first.
    at::Tensor taps = weight.narrow(0, group * problem_.c_out, problem_.c_out)
                          .reshape({problem_.c_out, problem_.c_in, problem_.taps});
    taps = taps.permute({2, inner_ ? 0 : 1, inner_ ? 1 : 0}).contiguous();
    std::vector<at::Tensor> columns;
    std::vector<int64_t> shift(kMaxAxes);
    for (shift[0] = 0; shift[0] < kernel[0]; ++shift[0])
      for (shift[1] = 1 - kernel[1]; shift[1] < kernel[1]; ++shift[1])
        for (shift[2] = 1 - kernel[2]; shift[2] < kernel[2]; ++shift[2]) {
          if (shift < std::vector<int64_t>(kMaxAxes, 0)) continue;  // the mirror image of another
          std::vector<at::Tensor> here, there;
          for (int64_t tap = 0; tap < problem_.taps; ++tap) {
            int64_t rest = tap, moved = 0, place = 1;
            bool inside = true;
            for (int axis = kMaxAxes - 1; axis >= 0; --axis) {
              const int64_t position = rest % kernel[axis] + shift[axis];
              inside = inside && 0 <= position && position < kernel[axis];
              moved += position * place;
              place *= kernel[axis];
              rest /= kernel[axis];
            }
            if (!inside) continue;
            here.push_back(taps[tap]);
            there.push_back(taps[moved]);
          }
          // F^H F pairs K_t with K_{t+s}, F F^H the other way round.
          const at::Tensor block =
              inner_ ? at::mm(at::cat(here).t(), at::cat(there)) : at::mm(at::cat(there).t(), at::cat(here));
          const auto lower = [&](const at::Tensor& matrix) { return matrix.flatten().index_select(0, entries); };
          if (columns.empty()) {
            columns.push_back(lower(block));
            continue;
          }
          if (group == 0) shifts_.push_back(shift);
          columns.push_back(lower(block + block.t()));
          columns.push_back(lower(block.t() - block));
        }
    coefficients_.push_back(at::stack(columns, 1).contiguous());
  }
}

void GramSource::fill(const int64_t* frequencies, int64_t group, HermitianGroup& matrices) const {
  if (!coefficients_.empty()) {
    const int64_t pairs = static_cast<int64_t>(shifts_.size());
    Packed<Pack> cosines(pairs), sines(pairs);
    for (int64_t s = 0; s < pairs; ++s)
      for (int lane = 0; lane < kLanes; ++lane) {
        const Phase phase = shift_phase(problem_.shape, frequencies[lane], shifts_[s].data());
        cosines[s][lane] = phase.re;
        sines[s][lane] = -phase.im;
      }
    combine_coefficients(coefficients_[group].const_data_ptr<double>(), pairs, cosines.data(), sines.data(),
                         matrices.entries(), matrices.matrix());
    return;
  }
  const at::Tensor symbol = conv_symbol_at(problem_, taps_, frequencies, kLanes).select(1, group);
  const at::Tensor gram =
      at::view_as_real(inner_ ? symbol.mH().matmul(symbol) : symbol.matmul(symbol.mH())).contiguous();
  const double* from = gram.const_data_ptr<double>();
  for (int lane = 0; lane < kLanes; ++lane)
    for (int64_t i = 0; i < order_; ++i)
      for (int64_t j = 0; j <= i; ++j) {
        Entry& entry = matrices.matrix()[entry_index(i, j)];
        const double* number = from + 2 * ((lane * order_ + i) * order_ + j);
        entry.re[lane] = number[0];
        entry.im[lane] = number[1];
      }
}

}  // namespace iresnet_fast
