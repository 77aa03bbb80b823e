// Eigenvalues and positive definiteness of Hermitian matrices, several side by side: every number is a pack that holds
// the same entry of kLanes matrices, so that what is serial in one matrix runs in parallel over the lanes.
//
// A matrix is its lower triangle by rows, entry (i, j) at i (i + 1) / 2 + j, each entry a pack of real and one of
// imaginary parts. The code is inlined into the function that calls it, and compiled for that function's processor.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/inline.h"

namespace iresnet_fast {

constexpr int kLanes = 4;
typedef double Pack __attribute__((vector_size(kLanes * sizeof(double))));
typedef int64_t PackMask __attribute__((vector_size(kLanes * sizeof(int64_t))));

struct Entry {
  Pack re, im;
};

IRESNET_FAST_INLINE int64_t entry_index(int64_t i, int64_t j) { return i * (i + 1) / 2 + j; }

IRESNET_FAST_INLINE Pack splat(double x) { return Pack{x, x, x, x}; }
IRESNET_FAST_INLINE Pack select(PackMask mask, Pack yes, Pack no) { return mask ? yes : no; }
IRESNET_FAST_INLINE Pack larger(Pack a, Pack b) { return a > b ? a : b; }
IRESNET_FAST_INLINE Pack absolute(Pack x) { return larger(x, -x); }
IRESNET_FAST_INLINE Pack square_root(Pack x) {
  Pack root;
  for (int lane = 0; lane < kLanes; ++lane) root[lane] = std::sqrt(x[lane]);
  return root;
}
IRESNET_FAST_INLINE bool any(PackMask mask) {
  int64_t found = 0;
  for (int lane = 0; lane < kLanes; ++lane) found |= mask[lane];
  return found != 0;
}

// a -= b * conj(c)
IRESNET_FAST_INLINE void subtract_product(Entry& a, const Entry& b, const Entry& c) {
  a.re -= b.re * c.re + b.im * c.im;
  a.im -= b.im * c.re - b.re * c.im;
}

// Scratch of one tridiagonalisation: five vectors of entries.
struct TridiagonalScratch {
  Entry *u, *q;     // the rank-two update that is still to be applied, A -= q u^H + u q^H
  Entry *next, *p;  // the reflection under way, and A times it
};

// Apply the pending update to row i, columns 0 to i, and accumulate p += A next over this row and its mirror column.
// With Rows = 2, to rows i and i + 1: their entries of the four vectors stay in registers, and each of the streamed
// ones is loaded once for both.
template <int Rows>
IRESNET_FAST_INLINE void update_and_multiply(Entry* a, int64_t i, const TridiagonalScratch& s) {
  Entry u[Rows], q[Rows], w[Rows], sum[Rows];
  Entry* row[Rows];
  for (int r = 0; r < Rows; ++r) {
    u[r] = s.u[i + r];
    q[r] = s.q[i + r];
    w[r] = s.next[i + r];
    sum[r] = Entry{splat(0), splat(0)};
    row[r] = a + entry_index(i + r, 0);
  }
  for (int64_t j = 0; j < i; ++j) {
    const Entry uj = s.u[j], qj = s.q[j], wj = s.next[j];
    Entry pj = s.p[j];
    for (int r = 0; r < Rows; ++r) {
      Entry x = row[r][j];
      x.re -= q[r].re * uj.re + q[r].im * uj.im;
      x.im -= q[r].im * uj.re - q[r].re * uj.im;
      x.re -= u[r].re * qj.re + u[r].im * qj.im;
      x.im -= u[r].im * qj.re - u[r].re * qj.im;
      row[r][j] = x;
      sum[r].re += x.re * wj.re - x.im * wj.im;
      sum[r].im += x.re * wj.im + x.im * wj.re;
      pj.re += x.re * w[r].re + x.im * w[r].im;
      pj.im += x.re * w[r].im - x.im * w[r].re;
    }
    s.p[j] = pj;
  }
  for (int r = 0; r < Rows; ++r) {  // the block on the diagonal
    for (int c = 0; c < r; ++c) {
      Entry& x = row[r][i + c];
      subtract_product(x, q[r], u[c]);
      subtract_product(x, u[r], q[c]);
      sum[r].re += x.re * w[c].re - x.im * w[c].im;
      sum[r].im += x.re * w[c].im + x.im * w[c].re;
      sum[c].re += x.re * w[r].re + x.im * w[r].im;
      sum[c].im += x.re * w[r].im - x.im * w[r].re;
    }
    Entry& x = row[r][i + r];
    x.re -= splat(2) * (q[r].re * u[r].re + q[r].im * u[r].im);
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
IRESNET_FAST_INLINE void tridiagonalize(Entry* a, int64_t n, TridiagonalScratch s, Pack* diagonal, Pack* off_squared) {
  for (int64_t i = 0; i < n; ++i) s.u[i] = s.q[i] = Entry{splat(0), splat(0)};
  for (int64_t k = n - 1; k >= 0; --k) {
    Entry* row = a + entry_index(k, 0);
    const Entry uk = s.u[k], qk = s.q[k];
    diagonal[k] = row[k].re - splat(2) * (qk.re * uk.re + qk.im * uk.im);
    if (k == 0) return;
    // The column above the diagonal, c = conj(row), is reflected onto its last entry.
    Pack norm_squared = splat(0);
    for (int64_t j = 0; j < k; ++j) {
      Entry x = row[j];
      subtract_product(x, qk, s.u[j]);
      subtract_product(x, uk, s.q[j]);
      norm_squared += x.re * x.re + x.im * x.im;
      s.next[j] = Entry{x.re, -x.im};
    }
    off_squared[k - 1] = norm_squared;
    if (k == 1) continue;
    const Entry last = s.next[k - 1];
    const Pack norm = square_root(norm_squared), size = square_root(last.re * last.re + last.im * last.im);
    const PackMask zero = size == splat(0), nothing = norm_squared < splat(1e-290);  // or its inverse would overflow
    const Pack stretch = splat(1) + norm / select(zero, splat(1), size);
    s.next[k - 1] = Entry{select(zero, norm, last.re * stretch), select(zero, splat(0), last.im * stretch)};
    const Pack beta = select(nothing, splat(0), splat(1) / select(nothing, splat(1), norm_squared + norm * size));
    for (int64_t j = 0; j < k; ++j) s.p[j] = Entry{splat(0), splat(0)};
    int64_t i = 0;
    if (k % 2) update_and_multiply<1>(a, i++, s);
    for (; i < k; i += 2) update_and_multiply<2>(a, i, s);
    Pack overlap = splat(0);
    for (int64_t j = 0; j < k; ++j) {
      s.p[j].re *= beta;
      s.p[j].im *= beta;
      overlap += s.next[j].re * s.p[j].re + s.next[j].im * s.p[j].im;
    }
    const Pack half = splat(0.5) * beta * overlap;
    for (int64_t j = 0; j < k; ++j) {
      s.u[j] = s.next[j];
      s.q[j] = Entry{s.p[j].re - half * s.next[j].re, s.p[j].im - half * s.next[j].im};
    }
  }
}

// Eigenvalues of real symmetric tridiagonal matrices by the QL iteration without square roots of Pal, Walker and Kahan
// (as in LAPACK's dsterf), Groups packs at a time; the diagonal is overwritten by them, in no order. Lanes that have
// converged at an index are left alone while the others go on. Fourth powers of the entries are formed: they must be in
// range. Returns whether all converged.
template <int Groups>
IRESNET_FAST_INLINE bool tridiagonal_eigenvalues(Pack* d, Pack* e, int64_t n) {
  constexpr double kNegligible = 1e-18;  // off-diagonals of this share of the norm are zero; well below rounding
  constexpr int kSweeps = 60;
  Pack negligible[Groups], least[Groups];
  for (int g = 0; g < Groups; ++g) {
    Pack norm = splat(0);
    for (int64_t i = 0; i < n; ++i) norm = larger(norm, absolute(d[i * Groups + g]));
    for (int64_t i = 0; i + 1 < n; ++i) norm = larger(norm, square_root(e[i * Groups + g]));
    negligible[g] = (splat(kNegligible) * norm) * (splat(kNegligible) * norm);
    least[g] = larger(norm * splat(1e-30), splat(1e-120));
  }
  for (int64_t l = 0; l + 1 < n; ++l) {
    int sweep = 0;
    for (;; ++sweep) {
      PackMask active[Groups];
      bool some = false;
      for (int g = 0; g < Groups; ++g) {
        active[g] = e[l * Groups + g] > negligible[g];
        some |= any(active[g]);
      }
      if (!some) break;
      if (sweep == kSweeps) return false;
      Pack sigma[Groups], gamma[Groups], p[Groups], s[Groups];
      for (int g = 0; g < Groups; ++g) {
        const Pack first = d[l * Groups + g];
        const Pack root = square_root(larger(e[l * Groups + g], least[g] * least[g]));
        const Pack slope = (d[(l + 1) * Groups + g] - first) / (root + root);
        const Pack length = square_root(slope * slope + splat(1));
        sigma[g] = first - root / (slope + select(slope < splat(0), -length, length));
        gamma[g] = d[(n - 1) * Groups + g] - sigma[g];
        gamma[g] = select(absolute(gamma[g]) < least[g], least[g], gamma[g]);
        p[g] = gamma[g] * gamma[g];
        s[g] = splat(0);
      }
      for (int64_t i = n - 2; i >= l; --i) {
        for (int g = 0; g < Groups; ++g) {
          Pack* di = d + i * Groups + g;
          Pack* ei = e + i * Groups + g;
          const Pack b = *ei, r = p[g] + b;
          if (i != n - 2) ei[Groups] = select(active[g], s[g] * r, ei[Groups]);
          const Pack inverse = splat(1) / (p[g] * r);
          const Pack scaled = p[g] * inverse;
          const Pack c = p[g] * scaled, before = gamma[g], alpha = *di;
          s[g] = b * scaled;
          Pack now = c * (alpha - sigma[g]) - s[g] * before;
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

// Entries (i .. i+1, j .. j+1) of the Cholesky factor L of A = L L^H, rows i >= j + 2 given to column j.
template <int Rows, int Columns>
IRESNET_FAST_INLINE void cholesky_tile(Entry* a, int64_t i, int64_t j, const Pack* inverse_diagonal) {
  Entry sum[Rows][Columns];
  Entry* rows[Rows];
  const Entry* columns[Columns];
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
      rows[r][j + c] = Entry{sum[r][c].re * inverse_diagonal[j + c], sum[r][c].im * inverse_diagonal[j + c]};
    }
}

// Whether all matrices have a Cholesky factorisation with positive pivots; a is overwritten. inverse_diagonal: scratch
// of n packs.
IRESNET_FAST_INLINE bool has_cholesky(Entry* a, int64_t n, Pack* inverse_diagonal) {
  constexpr int64_t kBlock = 8;  // rows that share each pair of earlier rows while it is near
  for (int64_t top = 0; top < n; top += kBlock) {
    const int64_t bottom = top + kBlock < n ? top + kBlock : n;
    for (int64_t j = 0; j < top; j += 2) {
      int64_t i = top;
      for (; i + 1 < bottom; i += 2) cholesky_tile<2, 2>(a, i, j, inverse_diagonal);
      if (i < bottom) cholesky_tile<1, 2>(a, i, j, inverse_diagonal);
    }
    for (int64_t i = top; i < bottom; ++i) {
      for (int64_t j = top; j < i; ++j) cholesky_tile<1, 1>(a, i, j, inverse_diagonal);
      const Entry* row = a + entry_index(i, 0);
      Pack pivot = row[i].re;
      for (int64_t k = 0; k < i; ++k) pivot -= row[k].re * row[k].re + row[k].im * row[k].im;
      if (any(~(pivot > splat(0)))) return false;
      inverse_diagonal[i] = splat(1) / square_root(pivot);
    }
  }
  return true;
}

}  // namespace iresnet_fast
