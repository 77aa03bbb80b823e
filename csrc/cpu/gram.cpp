// Gram matrices from the kernel's autocorrelation, or from the symbol.
#include "cpu/gram.h"

#include <ATen/ops/view_as_real.h>

#include "common/spectrum.h"
#include "cpu/conv_symbol.h"

namespace iresnet_fast {

GramSource::GramSource(const at::Tensor& weight, const SymbolProblem& problem, int64_t frequencies)
    : problem_(problem), autocorrelation_(weight, problem, frequencies), taps_(weight_by_tap(weight, problem)) {}

template <typename P>
void GramSource::fill(const int64_t* frequencies, int64_t group, HermitianGroup<P>& matrices) const {
  if (autocorrelation_.formed()) {
    const int64_t pairs = static_cast<int64_t>(autocorrelation_.shifts.size());
    Packed<P> cosines(pairs), sines(pairs);
    for (int64_t s = 0; s < pairs; ++s)
      for (int lane = 0; lane < kLanes<P>; ++lane) {
        const Phase phase = shift_phase(problem_.shape, frequencies[lane], autocorrelation_.shifts[s].data());
        cosines[s][lane] = phase.re;
        sines[s][lane] = -phase.im;
      }
    matrices.combine(autocorrelation_.coefficients[group].const_data_ptr<double>(), pairs, cosines.data(),
                     sines.data());
    return;
  }
  const int64_t order = this->order();
  const at::Tensor symbol = conv_symbol_at(problem_, taps_, frequencies, kLanes<P>).select(1, group);
  const at::Tensor gram = at::view_as_real(smaller_gram(symbol)).contiguous();
  const double* from = gram.const_data_ptr<double>();
  for (int lane = 0; lane < kLanes<P>; ++lane)
    for (int64_t i = 0; i < order; ++i)
      for (int64_t j = 0; j <= i; ++j) {
        Entry<P>& entry = matrices.matrix()[entry_index(i, j)];
        const double* number = from + 2 * ((lane * order + i) * order + j);
        entry.re[lane] = number[0];
        entry.im[lane] = number[1];
      }
}

template void GramSource::fill(const int64_t*, int64_t, HermitianGroup<Pack4>&) const;
template void GramSource::fill(const int64_t*, int64_t, HermitianGroup<Pack8>&) const;

}  // namespace iresnet_fast
