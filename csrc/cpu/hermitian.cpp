// The batched Hermitian algorithms for each kind of processor.
#include "cpu/hermitian.h"

#include "cpu/dispatch.h"

namespace iresnet_fast {
namespace {

IRESNET_FAST_INLINE void combine(const double* coefficients, int64_t pairs, const Pack* cosines, const Pack* sines,
                                 int64_t entries, Entry* matrix) {
  for (int64_t entry = 0; entry < entries; ++entry) {
    Pack re = splat(*coefficients++), im = splat(0);
    for (int64_t s = 0; s < pairs; ++s) {
      re += splat(coefficients[0]) * cosines[s];
      im += splat(coefficients[1]) * sines[s];
      coefficients += 2;
    }
    matrix[entry] = Entry{re, im};
  }
}

IRESNET_FAST_DISPATCH(void, reduce, (Entry * a, int64_t n, TridiagonalScratch s, Pack* d, Pack* e),
                      tridiagonalize(a, n, s, d, e))
IRESNET_FAST_DISPATCH(bool, factor, (Entry * a, int64_t n, Pack* scratch), has_cholesky(a, n, scratch))
IRESNET_FAST_DISPATCH(bool, solve, (Pack * d, Pack* e, int64_t n), tridiagonal_eigenvalues<kPairs>(d, e, n))
IRESNET_FAST_DISPATCH(void, assemble,
                      (const double* coefficients, int64_t pairs, const Pack* cosines, const Pack* sines,
                       int64_t entries, Entry* matrix),
                      combine(coefficients, pairs, cosines, sines, entries, matrix))

}  // namespace

void HermitianGroup::tridiagonalize(Pack* diagonal, Pack* off_squared) {
  Entry* free = matrix() + entries();
  const TridiagonalScratch scratch{free, free + n_, free + 2 * n_, free + 3 * n_};
  IRESNET_FAST_CHOOSE(reduce, (matrix(), n_, scratch, diagonal, off_squared));
}

bool HermitianGroup::has_cholesky() {
  Pack* scratch = &(matrix() + entries())->re;
  return IRESNET_FAST_CHOOSE(factor, (matrix(), n_, scratch));
}

bool tridiagonal_eigenvalues_of_pairs(Pack* diagonal, Pack* off_squared, int64_t n) {
  return IRESNET_FAST_CHOOSE(solve, (diagonal, off_squared, n));
}

void combine_coefficients(const double* coefficients, int64_t pairs, const Pack* cosines, const Pack* sines,
                          int64_t entries, Entry* matrix) {
  IRESNET_FAST_CHOOSE(assemble, (coefficients, pairs, cosines, sines, entries, matrix));
}

}  // namespace iresnet_fast
