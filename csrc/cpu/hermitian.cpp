// The batched Hermitian algorithms for each kind of processor.
#include "cpu/hermitian.h"

#include <algorithm>
#include <cmath>

namespace iresnet_fast {
namespace {

constexpr int64_t kTile = 4;  // entries that are combined together

template <int64_t Tile, typename P>
IRESNET_FAST_INLINE void combine_tile(const double* coefficients, int64_t pairs, const P* cosines, const P* sines,
                                      Entry<P>* entries) {
  const int64_t each = 1 + 2 * pairs;
  Entry<P> sum[Tile];
  for (int64_t t = 0; t < Tile; ++t) sum[t] = {splat<P>(coefficients[t * each]), P{}};
  for (int64_t s = 0; s < pairs; ++s) {
    const P cosine = cosines[s], sine = sines[s];
    for (int64_t t = 0; t < Tile; ++t) {
      const double* pair = coefficients + t * each + 1 + 2 * s;
      sum[t].re += pair[0] * cosine;
      sum[t].im += pair[1] * sine;
    }
  }
  for (int64_t t = 0; t < Tile; ++t) entries[t] = sum[t];
}

}  // namespace

template <typename P>
bool Invariants<P>::match(int lane, const double* eigenvalues, int64_t n) const {
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < n; ++i) {
    sum += eigenvalues[i];
    squares += eigenvalues[i] * eigenvalues[i];
  }
  const auto near = [](double found, double expected, double size) {
    return std::abs(found - expected) <= 1e-11 * std::max(size, 1e-290);
  };
  // A matrix of rounding errors is indefinite: its trace can cancel, its norm cannot.
  return near(sum, trace[lane], std::sqrt(n * frobenius[lane])) && near(squares, frobenius[lane], frobenius[lane]);
}

template <typename P>
void HermitianGroup<P>::combine(const double* coefficients, int64_t pairs, const P* cosines, const P* sines) {
  run_on<sizeof(P)>(processor_, [&]() IRESNET_FAST_INLINED {
    const int64_t each = 1 + 2 * pairs, count = entries();
    Entry<P>* to = matrix();
    int64_t entry = 0;
    for (; entry + kTile <= count; entry += kTile)
      combine_tile<kTile>(coefficients + entry * each, pairs, cosines, sines, to + entry);
    for (; entry < count; ++entry) combine_tile<1>(coefficients + entry * each, pairs, cosines, sines, to + entry);
  });
}

template <typename P>
void HermitianGroup<P>::bring_into_range(P* scale) {
  P trace{};
  for (int64_t i = 0; i < n_; ++i) trace += matrix()[entry_index(i, i)].re;
  *scale = splat<P>(1);
  bool needed = false;
  for (int lane = 0; lane < kLanes<P>; ++lane)
    if (trace[lane] > 0 && (trace[lane] < 1e-60 || trace[lane] > 1e60)) {
      int exponent = 0;
      std::frexp(trace[lane], &exponent);
      (*scale)[lane] = std::ldexp(1.0, std::clamp(exponent, -1000, 1000));
      needed = true;
    }
  if (!needed) return;
  const P inverse = 1.0 / *scale;
  for (int64_t i = 0; i < entries(); ++i) {
    matrix()[i].re *= inverse;
    matrix()[i].im *= inverse;
  }
}

template <typename P>
void HermitianGroup<P>::take_invariants(Invariants<P>* invariants) {
  run_on<sizeof(P)>(processor_, [&]() IRESNET_FAST_INLINED {
    P trace{}, diagonal{}, off{};
    for (int64_t i = 0; i < n_; ++i) {
      const Entry<P>* row = matrix() + entry_index(i, 0);
      for (int64_t j = 0; j < i; ++j) off = off + row[j].re * row[j].re + row[j].im * row[j].im;
      diagonal += row[i].re * row[i].re;
      trace += row[i].re;
    }
    *invariants = {trace, diagonal + 2.0 * off};
  });
}

template <typename P>
void HermitianGroup<P>::subtract_from(double shift) {
  run_on<sizeof(P)>(processor_, [&]() IRESNET_FAST_INLINED {
    for (int64_t i = 0; i < entries(); ++i) matrix()[i] = {-matrix()[i].re, -matrix()[i].im};
    for (int64_t i = 0; i < n_; ++i) matrix()[entry_index(i, i)].re += shift;
  });
}

template <typename P>
void HermitianGroup<P>::tridiagonalize(P* diagonal, P* off_squared) {
  Entry<P>* free = matrix() + entries();
  const TridiagonalScratch<P> scratch{free, free + n_, free + 2 * n_, free + 3 * n_};
  run_on<sizeof(P)>(processor_, [&]() IRESNET_FAST_INLINED {
    iresnet_fast::tridiagonalize(matrix(), n_, scratch, diagonal, off_squared);
  });
}

template <typename P>
bool HermitianGroup<P>::has_cholesky() {
  P* scratch = &(matrix() + entries())->re;
  return run_on<sizeof(P)>(processor_,
                           [&]() IRESNET_FAST_INLINED { return iresnet_fast::has_cholesky(matrix(), n_, scratch); });
}

template <typename P>
bool tridiagonal_eigenvalues_of_pairs(P* diagonal, P* off_squared, int64_t n, Processor processor) {
  return run_on<sizeof(P)>(
      processor, [&]() IRESNET_FAST_INLINED { return tridiagonal_eigenvalues<kPairs>(diagonal, off_squared, n); });
}

template struct Invariants<Pack4>;
template struct Invariants<Pack8>;
template class HermitianGroup<Pack4>;
template class HermitianGroup<Pack8>;
template bool tridiagonal_eigenvalues_of_pairs(Pack4*, Pack4*, int64_t, Processor);
template bool tridiagonal_eigenvalues_of_pairs(Pack8*, Pack8*, int64_t, Processor);

}  // namespace iresnet_fast
