// Groups of Hermitian matrices side by side in packs, their algorithms compiled for each kind of processor.
#pragma once

#include "common/hermitian.h"
#include "cpu/dispatch.h"
#include "cpu/packed.h"

namespace iresnet_fast {

// What the eigenvalues of a group of matrices must sum up to: a check that none was lost or wrong, made of what is
// known before they are computed.
template <typename P>
struct Invariants {
  P trace, frobenius;

  bool match(int lane, const double* eigenvalues, int64_t n) const;
};

// kLanes<P> matrices of one order, and what their algorithms need; kept by a thread from one group of matrices to the
// next.
template <typename P>
class HermitianGroup {
 public:
  explicit HermitianGroup(int64_t n, Processor processor = kProcessor)
      : n_(n), processor_(processor), storage_(n * (n + 1) / 2 + 4 * n) {}

  int64_t order() const { return n_; }
  int64_t entries() const { return n_ * (n_ + 1) / 2; }
  Entry<P>* matrix() { return storage_.data(); }

  // Entries sum_s coefficients[s] * phase[s]: the first coefficient is real, then follow pairs for the cosines (real
  // part) and the sines (imaginary part).
  void combine(const double* coefficients, int64_t pairs, const P* cosines, const P* sines);
  // Scale the matrices of lanes whose entries' fourth powers would leave the range of a double, by a power of two that
  // is written: groups of channels can differ by any factor.
  void bring_into_range(P* scale);
  void take_invariants(Invariants<P>* invariants);
  // shift I minus the matrices.
  void subtract_from(double shift);
  // diagonal: n packs, off_squared: n - 1; the matrices are overwritten.
  void tridiagonalize(P* diagonal, P* off_squared);
  // Whether all are positive definite, as far as their Cholesky factorisation tells; they are overwritten.
  bool has_cholesky();

 private:
  int64_t n_;
  Processor processor_;
  Packed<Entry<P>> storage_;
};

// Groups whose tridiagonal matrices are solved together: the serial iteration of one hides behind the other's.
constexpr int kPairs = 2;

// Eigenvalues of kPairs groups; diagonal and off_squared interleave the groups, and the diagonal is overwritten.
template <typename P>
bool tridiagonal_eigenvalues_of_pairs(P* diagonal, P* off_squared, int64_t n, Processor processor = kProcessor);

}  // namespace iresnet_fast
