// The autocorrelation by matrix products of the taps.
#include "common/autocorrelation.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tril_indices.h>

namespace iresnet_fast {
namespace {

// The autocorrelation is kept where it is no larger than this.
constexpr int64_t kCoefficientBytes = int64_t{256} << 20;

}  // namespace

Autocorrelation::Autocorrelation(const at::Tensor& weight, const SymbolProblem& problem, int64_t frequencies) {
  const int64_t pairs_of_taps = problem.taps * (problem.taps + 1), order = problem.rank();
  const int64_t bytes = problem.groups * order * (order + 1) / 2 * (1 + 2 * count_shifts(problem)) * 8;
  // Taps that wrap onto each other may cancel, in the symbol to the last bit, in the autocorrelation to rounding.
  bool apart = true;
  for (int axis = 0; axis < kMaxAxes; ++axis) {
    const int64_t n = problem.shape.grid[axis], step = problem.shape.dilation[axis] % n;
    for (int64_t tap = 1; tap < problem.shape.kernel[axis]; ++tap) apart = apart && tap * step % n != 0;
  }
  const bool cheaper = pairs_of_taps <= 8 * frequencies && bytes <= kCoefficientBytes;
  if (problem.aliases == 1 && apart && cheaper) correlate(weight, problem);
}

int64_t Autocorrelation::count_shifts(const SymbolProblem& problem) {
  int64_t all = 1;
  for (int axis = 0; axis < kMaxAxes; ++axis) all *= 2 * problem.shape.kernel[axis] - 1;
  return all / 2;
}

void Autocorrelation::correlate(const at::Tensor& weight, const SymbolProblem& problem) {
  const int64_t* kernel = problem.shape.kernel;
  const int64_t order = problem.rank();
  const bool inner = problem.c_in < problem.c_out;  // F^H F, as smaller_gram
  const at::Tensor indices = at::tril_indices(order, order, 0, weight.options().dtype(at::kLong));
  const at::Tensor entries = indices[0] * order + indices[1];
  // (taps, groups, rows, order): the side that is summed over first.
  const at::Tensor taps = weight.reshape({problem.groups, problem.c_out, problem.c_in, problem.taps})
                              .permute({3, 0, inner ? 1 : 2, inner ? 2 : 1})
                              .contiguous();
  std::vector<at::Tensor> columns;
  std::vector<int64_t> shift(kMaxAxes);
  for (shift[0] = 0; shift[0] < kernel[0]; ++shift[0])
    for (shift[1] = 1 - kernel[1]; shift[1] < kernel[1]; ++shift[1])
      for (shift[2] = 1 - kernel[2]; shift[2] < kernel[2]; ++shift[2]) {
        if (shift < std::vector<int64_t>(kMaxAxes, 0)) continue;  // the mirror image of another
        std::vector<at::Tensor> here, there;
        for (int64_t tap = 0; tap < problem.taps; ++tap) {
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
        const at::Tensor block = inner ? at::bmm(at::cat(here, 1).transpose(1, 2), at::cat(there, 1))
                                       : at::bmm(at::cat(there, 1).transpose(1, 2), at::cat(here, 1));
        const auto lower = [&](const at::Tensor& matrices) { return matrices.flatten(1).index_select(1, entries); };
        if (columns.empty()) {
          columns.push_back(lower(block));
          continue;
        }
        shifts.push_back(shift);
        columns.push_back(lower(block + block.transpose(1, 2)));
        columns.push_back(lower(block.transpose(1, 2) - block));
      }
  coefficients = at::stack(columns, 2).contiguous();
}

}  // namespace iresnet_fast
