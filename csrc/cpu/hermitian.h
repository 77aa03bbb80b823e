// The batched Hermitian algorithms of common/hermitian.h, compiled for each kind of x86 processor and chosen at run
// time.
#pragma once

#include "common/hermitian.h"
#include "cpu/packed.h"

namespace iresnet_fast {

// kLanes matrices of order n, and what their algorithms need; kept by a thread from one group of matrices to the next.
class HermitianGroup {
 public:
  explicit HermitianGroup(int64_t n) : n_(n), storage_(n * (n + 1) / 2 + 4 * n) {}

  int64_t order() const { return n_; }
  int64_t entries() const { return n_ * (n_ + 1) / 2; }
  Entry* matrix() { return storage_.data(); }

  // diagonal: n packs, off_squared: n - 1; the matrices are overwritten.
  void tridiagonalize(Pack* diagonal, Pack* off_squared);
  // Whether all are positive definite, as far as their Cholesky factorisation tells; they are overwritten.
  bool has_cholesky();

 private:
  int64_t n_;
  Packed<Entry> storage_;
};

// Groups whose tridiagonal matrices are solved together: the serial iteration of one hides behind the other's.
constexpr int kPairs = 2;

// Eigenvalues of kPairs groups; diagonal and off_squared interleave the groups, and the diagonal is overwritten.
bool tridiagonal_eigenvalues_of_pairs(Pack* diagonal, Pack* off_squared, int64_t n);

// Entries sum_s coefficients[s] * phase[s] for kLanes frequencies: the first coefficient is real, then follow pairs
// for the cosines (real part) and the sines (imaginary part).
void combine_coefficients(const double* coefficients, int64_t pairs, const Pack* cosines, const Pack* sines,
                          int64_t entries, Entry* matrix);

}  // namespace iresnet_fast
