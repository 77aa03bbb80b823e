// Eigenvalues and positive definiteness of Hermitian matrices, several side by side: every number is a pack that holds
// the same entry of four or eight matrices, so that what is serial in one matrix runs in parallel over the lanes.
//
// A matrix is its lower triangle by rows, entry (i, j) at i (i + 1) / 2 + j, each entry a pack of real and one of
// imaginary parts. The code is inlined into the function that calls it, and compiled for that function's processor.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/inline.h"

namespace iresnet_fast {

typedef double Pack4 __attribute__((vector_size(4 * sizeof(double))));
typedef double Pack8 __attribute__((vector_size(8 * sizeof(double))));
template <typename P>
constexpr int kLanes = sizeof(P) / sizeof(double);

template <typename P>
struct Entry {
  P re, im;
};

IRESNET_FAST_INLINE int64_t entry_index(int64_t i, int64_t j) { return i * (i + 1) / 2 + j; }

template <typename P>
IRESNET_FAST_INLINE P splat(double x) {
  return P{} + x;
}
template <typename Mask, typename P>
IRESNET_FAST_INLINE P select(Mask mask, P yes, P no) {
  return mask ? yes : no;
}
template <typename P>
IRESNET_FAST_INLINE P larger(P a, P b) {
  return a > b ? a : b;
}
template <typename P>
IRESNET_FAST_INLINE P absolute(P x) {
  return larger(x, -x);
}
template <typename P>
IRESNET_FAST_INLINE P square_root(P x) {
  P root;
  for (int lane = 0; lane < kLanes<P>; ++lane) root[lane] = std::sqrt(x[lane]);
  return root;
}
template <typename Mask>
IRESNET_FAST_INLINE bool any(Mask mask) {
  int64_t found = 0;
  for (size_t lane = 0; lane < sizeof(Mask) / sizeof(int64_t); ++lane) found |= mask[lane];
  return found != 0;
}

// a -= b * conj(c); here and below both products are summed first, so that a waits for one operation, not two.
template <typename P>
IRESNET_FAST_INLINE void subtract_product(Entry<P>& a, const Entry<P>& b, const Entry<P>& c) {
  a.re -= b.re * c.re + b.im * c.im;
  a.im -= b.im * c.re - b.re * c.im;
}
// a += b * c
template <typename P>
IRESNET_FAST_INLINE void add_product(Entry<P>& a, const Entry<P>& b, const Entry<P>& c) {
  a.re += b.re * c.re - b.im * c.im;
  a.im += b.re * c.im + b.im * c.re;
}
// a += conj(b) * c
template <typename P>
IRESNET_FAST_INLINE void add_conjugate_product(Entry<P>& a, const Entry<P>& b, const Entry<P>& c) {
  a.re += b.re * c.re + b.im * c.im;
  a.im += b.re * c.im - b.im * c.re;
}

// Scratch of one tridiagonalisation: four vectors of entries.
template <typename P>
struct TridiagonalScratch {
  Entry<P>*u, *q;     // the rank-two update that is still to be applied, A -= q u^H + u q^H
  Entry<P>*next, *p;  // the reflection under way, and A times it
};

// Apply the pending update to row i, columns 0 to i, and accumulate p += A next over this row and its mirror column.
// With Rows = 2, to rows i and i + 1: their entries of the four vectors stay in registers, and each of the streamed
// ones is loaded once for both.
template <int Rows, typename P>
IRESNET_FAST_INLINE void update_and_multiply(Entry<P>* a, int64_t i, const TridiagonalScratch<P>& s) {
  Entry<P> u[Rows], q[Rows], w[Rows], sum[Rows];
  Entry<P>* row[Rows];
  for (int r = 0; r < Rows; ++r) {
    u[r] = s.u[i + r];
    q[r] = s.q[i + r];
    w[r] = s.next[i + r];
    sum[r] = Entry<P>{};
    row[r] = a + entry_index(i + r, 0);
  }
  for (int64_t j = 0; j < i; ++j) {
    const Entry<P> uj = s.u[j], qj = s.q[j], wj = s.next[j];
    Entry<P> pj = s.p[j];
    for (int r = 0; r < Rows; ++r) {
      Entry<P> x = row[r][j];
      subtract_product(x, q[r], uj);
      subtract_product(x, u[r], qj);
      row[r][j] = x;
      add_product(sum[r], x, wj);
      add_conjugate_product(pj, x, w[r]);
    }
    s.p[j] = pj;
  }
  for (int r = 0; r < Rows; ++r) {  // the block on the diagonal
    for (int c = 0; c < r; ++c) {
      Entry<P>& x = row[r][i + c];
      subtract_product(x, q[r], u[c]);
      subtract_product(x, u[r], q[c]);
      add_product(sum[r], x, w[c]);
      add_conjugate_product(sum[c], x, w[r]);
    }
    Entry<P>& x = row[r][i + r];
    x.re -= 2.0 * (q[r].re * u[r].re + q[r].im * u[r].im);
    sum[r].re += x.re * w[r].re;
    sum[r].im += x.re * w[r].im;
  }
  for (int r = 0; r < Rows; ++r) {
    s.p[i + r].re += sum[r].re;
    s.p[i + r].im += sum[r].im;
  }
}

// Reduce n x n matrices to real tridiagonal ones of the same eigenvalues by Householder reflections, from the last row
// up; a is overwritten. diagonal: n; off_squared: n - 1 squares of the off-diagonal (its phases do not matter).
template <typename P>
IRESNET_FAST_INLINE void tridiagonalize(Entry<P>* a, int64_t n, TridiagonalScratch<P> s, P* diagonal, P* off_squared) {
  for (int64_t i = 0; i < n; ++i) s.u[i] = s.q[i] = Entry<P>{};
  for (int64_t k = n - 1; k >= 0; --k) {
    Entry<P>* row = a + entry_index(k, 0);
    const Entry<P> uk = s.u[k], qk = s.q[k];
    diagonal[k] = row[k].re - 2.0 * (qk.re * uk.re + qk.im * uk.im);
    if (k == 0) return;
    // The column above the diagonal, c = conj(row), is reflected onto its last entry.
    P norm_squared{};
    for (int64_t j = 0; j < k; ++j) {
      Entry<P> x = row[j];
      subtract_product(x, qk, s.u[j]);
      subtract_product(x, uk, s.q[j]);
      norm_squared += x.re * x.re + x.im * x.im;
      s.next[j] = {x.re, -x.im};
    }
    off_squared[k - 1] = norm_squared;
    if (k == 1) continue;
    const Entry<P> last = s.next[k - 1];
    const P norm = square_root(norm_squared), size = square_root(last.re * last.re + last.im * last.im);
    const auto zero = size == 0.0, nothing = norm_squared < 1e-290;  // or its inverse would overflow
    const P stretch = 1.0 + norm / select(zero, splat<P>(1), size);
    s.next[k - 1] = {select(zero, norm, last.re * stretch), select(zero, P{}, last.im * stretch)};
    const P beta = select(nothing, P{}, 1.0 / select(nothing, splat<P>(1), norm_squared + norm * size));
    for (int64_t j = 0; j < k; ++j) s.p[j] = Entry<P>{};
    int64_t i = 0;
    if (k % 2) update_and_multiply<1>(a, i++, s);
    for (; i < k; i += 2) update_and_multiply<2>(a, i, s);
    P overlap{};
    for (int64_t j = 0; j < k; ++j) {
      s.p[j].re *= beta;
      s.p[j].im *= beta;
      overlap += s.next[j].re * s.p[j].re + s.next[j].im * s.p[j].im;
    }
    const P half = 0.5 * beta * overlap;
    for (int64_t j = 0; j < k; ++j) {
      s.u[j] = s.next[j];
      s.q[j] = {s.p[j].re - half * s.next[j].re, s.p[j].im - half * s.next[j].im};
    }
  }
}

// Eigenvalues of real symmetric tridiagonal matrices by the QL iteration without square roots of Pal, Walker and Kahan
// (as in LAPACK's dsterf), Groups packs at a time; the diagonal is overwritten by them, in no order. Lanes that have
// converged at an index are left alone while the others go on. Fourth powers of the entries are formed: they must be in
// range. Returns whether all converged.
template <int Groups, typename P>
IRESNET_FAST_INLINE bool tridiagonal_eigenvalues(P* d, P* e, int64_t n) {
  using Mask = decltype(P{} > P{});
  constexpr double kNegligible = 1e-18;  // off-diagonals of this share of the norm are zero; well below rounding
  constexpr int kSweeps = 60;
  P negligible[Groups], least[Groups];
  for (int g = 0; g < Groups; ++g) {
    P norm{};
    for (int64_t i = 0; i < n; ++i) norm = larger(norm, absolute(d[i * Groups + g]));
    for (int64_t i = 0; i + 1 < n; ++i) norm = larger(norm, square_root(e[i * Groups + g]));
    negligible[g] = (kNegligible * norm) * (kNegligible * norm);
    least[g] = larger(norm * 1e-30, splat<P>(1e-120));
  }
  for (int64_t l = 0; l + 1 < n; ++l) {
    int sweep = 0;
    for (;; ++sweep) {
      Mask active[Groups];
      bool some = false;
      for (int g = 0; g < Groups; ++g) {
        active[g] = e[l * Groups + g] > negligible[g];
        some |= any(active[g]);
      }
      if (!some) break;
      if (sweep == kSweeps) return false;
      P sigma[Groups], gamma[Groups], p[Groups], s[Groups];
      for (int g = 0; g < Groups; ++g) {
        const P first = d[l * Groups + g];
        const P root = square_root(larger(e[l * Groups + g], least[g] * least[g]));
        const P slope = (d[(l + 1) * Groups + g] - first) / (root + root);
        const P length = square_root(slope * slope + 1.0);
        sigma[g] = first - root / (slope + select(slope < 0.0, -length, length));
        gamma[g] = d[(n - 1) * Groups + g] - sigma[g];
        gamma[g] = select(absolute(gamma[g]) < least[g], least[g], gamma[g]);
        p[g] = gamma[g] * gamma[g];
        s[g] = P{};
      }
      for (int64_t i = n - 2; i >= l; --i) {
        for (int g = 0; g < Groups; ++g) {
          P* di = d + i * Groups + g;
          P* ei = e + i * Groups + g;
          const P b = *ei, r = p[g] + b;
          if (i != n - 2) ei[Groups] = select(active[g], s[g] * r, ei[Groups]);
          const P inverse = 1.0 / (p[g] * r);
          const P scaled = p[g] * inverse;
          const P c = p[g] * scaled, before = gamma[g], alpha = *di;
          s[g] = b * scaled;
          P now = c * (alpha - sigma[g]) - s[g] * before;
          now = select(absolute(now) < least[g], least[g], now);
          di[Groups] = select(active[g], before + (alpha - now), di[Groups]);
          p[g] = now * now * (r * r * inverse);
          gamma[g] = now;
        }
      }
      for (int g = 0; g < Groups; ++g) {
        e[l * Groups + g] = select(active[g], s[g] * p[g], e[l * Groups + g]);
        d[l * Groups + g] = select(active[g], sigma[g] + gamma[g], d[l * Groups + g]);
      }
    }
  }
  return true;
}

// Rows x Columns entries from (i, j) on of the Cholesky factor L of A = L L^H, rows i >= j + Columns given to column j.
template <int Rows, int Columns, typename P>
IRESNET_FAST_INLINE void cholesky_tile(Entry<P>* a, int64_t i, int64_t j, const P* inverse_diagonal) {
  Entry<P> sum[Rows][Columns];
  Entry<P>* rows[Rows];
  const Entry<P>* columns[Columns];
  for (int r = 0; r < Rows; ++r) rows[r] = a + entry_index(i + r, 0);
  for (int c = 0; c < Columns; ++c) columns[c] = a + entry_index(j + c, 0);
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Columns; ++c) sum[r][c] = rows[r][j + c];
  for (int64_t k = 0; k < j; ++k)
    for (int r = 0; r < Rows; ++r)
      for (int c = 0; c < Columns; ++c) subtract_product(sum[r][c], rows[r][k], columns[c][k]);
  for (int c = 0; c < Columns; ++c)
    for (int r = 0; r < Rows; ++r) {
      for (int before = 0; before < c; ++before)
        subtract_product(sum[r][c], rows[r][j + before], columns[c][j + before]);
      rows[r][j + c] = {sum[r][c].re * inverse_diagonal[j + c], sum[r][c].im * inverse_diagonal[j + c]};
    }
}

// Whether all matrices have a Cholesky factorisation with positive pivots; a is overwritten. inverse_diagonal: scratch
// of n packs.
template <typename P>
IRESNET_FAST_INLINE bool has_cholesky(Entry<P>* a, int64_t n, P* inverse_diagonal) {
  constexpr int kRows = kLanes<P> == 8 ? 4 : 2;  // as many as there are registers for their sums
  constexpr int64_t kBlock = 8;                  // rows that share each pair of earlier rows while it is near
  for (int64_t top = 0; top < n; top += kBlock) {
    const int64_t bottom = top + kBlock < n ? top + kBlock : n;
    for (int64_t j = 0; j < top; j += 2) {
      int64_t i = top;
      for (; i + kRows <= bottom; i += kRows) cholesky_tile<kRows, 2>(a, i, j, inverse_diagonal);
      for (; i < bottom; ++i) cholesky_tile<1, 2>(a, i, j, inverse_diagonal);
    }
    for (int64_t i = top; i < bottom; ++i) {
      for (int64_t j = top; j < i; ++j) cholesky_tile<1, 1>(a, i, j, inverse_diagonal);
      const Entry<P>* row = a + entry_index(i, 0);
      P pivot = row[i].re;
      for (int64_t k = 0; k < i; ++k) pivot -= row[k].re * row[k].re + row[k].im * row[k].im;
      if (any(~(pivot > 0.0))) return false;
      inverse_diagonal[i] = 1.0 / square_root(pivot);
    }
  }
  return true;
}

}  // namespace iresnet_fast
