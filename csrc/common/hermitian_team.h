// Eigenvalues and positive definiteness of one Hermitian matrix by a team of threads that share its memory.
//
// On a GPU the team is a thread block and the memory its own; on a CPU tests run the same code with a team of any size,
// under the thread sanitizer. A Team has rank(), size(), sync(), and sum(x), which every member gets alike; sum()
// is a barrier as well. Sums are in a fixed order, so that results do not depend on chance.
//
// A matrix is its lower triangle by rows, entry (i, j) at i (i + 1) / 2 + j.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/phase.h"

#ifdef __CUDACC__
#define IRESNET_FAST_TEAM __host__ __device__ __forceinline__
#else
#define IRESNET_FAST_TEAM inline
#endif

namespace iresnet_fast {

struct alignas(16) Complex {
  double re, im;
};

IRESNET_FAST_TEAM int triangle(int i) { return i * (i + 1) / 2; }

// a -= b * conj(c)
IRESNET_FAST_TEAM void subtract_product(Complex& a, Complex b, Complex c) {
  a.re -= b.re * c.re + b.im * c.im;
  a.im -= b.im * c.re - b.re * c.im;
}

// How a team spreads over the rows of a matrix of order n: `parts` members share a row. Rows are given out in whole
// warps, so that neighbours in a warp read neighbouring columns.
struct RowShares {
  int rows, parts;

  IRESNET_FAST_TEAM RowShares(int n, int team_size) {
    const int padded = (n + 31) / 32 * 32;
    rows = team_size < padded ? team_size : padded;
    parts = team_size / rows;
  }
};

// A column whose squares sum up to less is zero beside a matrix in range; its reflection would overflow.
constexpr double kVanishing = 1e-290;

// What the algorithms need beside the matrix, in complex numbers.
IRESNET_FAST_TEAM int team_scratch(int n, int team_size) { return n * (2 + RowShares(n, team_size).parts); }

// partial[part * n + i]: a part of (A v)_i, over the leading k rows and columns.
template <typename Team>
IRESNET_FAST_TEAM void multiply_in_parts(Team& team, const Complex* a, int n, int k, const Complex* v,
                                         Complex* partial) {
  const RowShares shares(n, team.size());
  const int part = team.rank() / shares.rows;
  if (part >= shares.parts) return;
  for (int i = team.rank() % shares.rows; i < k; i += shares.rows) {
    Complex sum{0, 0};
    for (int j = part; j < k; j += shares.parts) {
      const bool below = j <= i;
      const Complex x = a[below ? triangle(i) + j : triangle(j) + i], y = v[j];
      const double im = below ? x.im : -x.im;
      sum.re += x.re * y.re - im * y.im;
      sum.im += x.re * y.im + im * y.re;
    }
    partial[part * n + i] = sum;
  }
}

// Reduce the matrix to a real tridiagonal one of the same eigenvalues by Householder reflections, from the last row up;
// a is overwritten. diagonal: n; off_squared: n - 1 squares of the off-diagonal (its phases do not matter).
template <typename Team>
IRESNET_FAST_TEAM void tridiagonalize(Team& team, Complex* a, int n, Complex* scratch, double* diagonal,
                                      double* off_squared) {
  const int rank = team.rank(), size = team.size();
  const int parts = RowShares(n, size).parts;
  Complex* v = scratch;
  Complex* q = v + n;
  Complex* partial = q + n;
  const int columns = size < 32 ? size : 32, rows = size / columns;
  for (int k = n - 1; k > 0; --k) {
    const Complex* row = a + triangle(k);
    double squares = 0;
    for (int j = rank; j < k; j += size) {
      v[j] = Complex{row[j].re, -row[j].im};
      squares += row[j].re * row[j].re + row[j].im * row[j].im;
    }
    const double norm_squared = team.sum(squares);
    if (rank == 0) {
      diagonal[k] = row[k].re;
      off_squared[k - 1] = norm_squared;
    }
    if (k == 1 || norm_squared < kVanishing) continue;
    // v becomes the reflection of the column v onto its last entry.
    const Complex last{row[k - 1].re, -row[k - 1].im};
    const double norm = std::sqrt(norm_squared), head = std::sqrt(last.re * last.re + last.im * last.im);
    const double stretch = 1 + norm / (head == 0 ? 1 : head);
    if (rank == 0) v[k - 1] = head == 0 ? Complex{norm, 0} : Complex{last.re * stretch, last.im * stretch};
    team.sync();
    multiply_in_parts(team, a, n, k, v, partial);
    team.sync();
    // q = beta A v - v beta (v, beta A v) / 2, so that the reflected matrix is A - q v^H - v q^H.
    const double beta = 1 / (norm_squared + norm * head);
    double overlap = 0;
    for (int i = rank; i < k; i += size) {
      Complex sum = partial[i];
      for (int part = 1; part < parts; ++part) {
        sum.re += partial[part * n + i].re;
        sum.im += partial[part * n + i].im;
      }
      q[i] = Complex{beta * sum.re, beta * sum.im};
      overlap += v[i].re * q[i].re + v[i].im * q[i].im;
    }
    const double half = 0.5 * beta * team.sum(overlap);
    for (int i = rank; i < k; i += size) {
      q[i].re -= half * v[i].re;
      q[i].im -= half * v[i].im;
    }
    team.sync();
    for (int i = rank / columns; i < k; i += rows) {
      if (rank / columns >= rows) break;
      for (int j = rank % columns; j <= i; j += columns) {
        Complex x = a[triangle(i) + j];
        subtract_product(x, q[i], v[j]);
        subtract_product(x, v[i], q[j]);
        a[triangle(i) + j] = x;
      }
    }
    team.sync();
  }
  if (rank == 0) diagonal[0] = a[0].re;
  team.sync();
}

// The eigenvalue of a real symmetric tridiagonal matrix that `index` others lie below, by bisection: the negative
// pivots of T - x count those below x (Barth, Martin, Wilkinson 1967). Every member finds eigenvalues of its own, each
// to the rounding of the matrix's norm. Any order of magnitude whose squares are in range.
IRESNET_FAST_TEAM double tridiagonal_eigenvalue(const double* diagonal, const double* off_squared, int n, int index) {
  double largest = 0, off = 0;
  for (int i = 0; i < n; ++i) {
    largest = std::fmax(largest, std::fabs(diagonal[i]));
    if (i + 1 < n) off = std::fmax(off, off_squared[i]);
  }
  const double reach = largest + 2 * std::sqrt(off);
  const double least_pivot = std::fmax(reach * 1e-30, 1e-290);
  double low = -reach, high = reach;
  for (int step = 0; step < 60; ++step) {
    const double middle = 0.5 * (low + high);
    if (middle == low || middle == high) break;
    int below = 0;
    double pivot = diagonal[0] - middle;
    for (int i = 1; i < n; ++i) {
      if (std::fabs(pivot) < least_pivot) pivot = -least_pivot;
      below += pivot < 0;
      pivot = diagonal[i] - middle - off_squared[i - 1] / pivot;
    }
    below += pivot < 0;
    if (below > index) {
      high = middle;
    } else {
      low = middle;
    }
  }
  return 0.5 * (low + high);
}

// All eigenvalues of the matrix, ascending; a is overwritten. scratch: team_scratch(n, team.size()). Returns whether
// they have the trace and the Frobenius norm of the matrix, to every member alike.
template <typename Team>
IRESNET_FAST_TEAM bool eigenvalues(Team& team, Complex* a, int n, Complex* scratch, double* diagonal,
                                   double* off_squared, double* values) {
  double trace = 0, frobenius = 0;
  for (int i = team.rank(); i < n; i += team.size()) {
    const Complex* row = a + triangle(i);
    for (int j = 0; j < i; ++j) frobenius += 2 * (row[j].re * row[j].re + row[j].im * row[j].im);
    frobenius += row[i].re * row[i].re;
    trace += row[i].re;
  }
  trace = team.sum(trace);
  frobenius = team.sum(frobenius);
  tridiagonalize(team, a, n, scratch, diagonal, off_squared);
  double sum = 0, squares = 0;
  for (int i = team.rank(); i < n; i += team.size()) {
    values[i] = tridiagonal_eigenvalue(diagonal, off_squared, n, i);
    sum += values[i];
    squares += values[i] * values[i];
  }
  sum = team.sum(sum);
  squares = team.sum(squares);
  // Written so that NaN does not match.
  return std::fabs(sum - trace) <= 1e-11 * std::fmax(std::sqrt(n * frobenius), 1e-290) &&
         std::fabs(squares - frobenius) <= 1e-11 * std::fmax(frobenius, 1e-290);
}

// Whether the matrix has a Cholesky factorisation with positive pivots, to every member alike; a is overwritten.
template <typename Team>
IRESNET_FAST_TEAM bool has_cholesky(Team& team, Complex* a, int n) {
  const int rank = team.rank(), size = team.size();
  const int columns = size < 32 ? size : 32, rows = size / columns;
  for (int k = 0; k < n; ++k) {
    const double pivot = a[triangle(k) + k].re;
    if (!(pivot > 0)) return false;
    const double inverse = 1 / std::sqrt(pivot);
    for (int i = k + 1 + rank; i < n; i += size) {
      Complex& x = a[triangle(i) + k];
      x = Complex{x.re * inverse, x.im * inverse};
    }
    team.sync();
    for (int i = k + 1 + rank / columns; i < n; i += rows) {
      if (rank / columns >= rows) break;
      const Complex left = a[triangle(i) + k];
      for (int j = k + 1 + rank % columns; j <= i; j += columns)
        subtract_product(a[triangle(i) + j], left, a[triangle(j) + k]);
    }
    team.sync();
  }
  return true;
}

// Scale the matrix by a power of two, which is returned, where its squares would leave the range of a double.
template <typename Team>
IRESNET_FAST_TEAM double bring_into_range(Team& team, Complex* a, int n) {
  double trace = 0;
  for (int i = team.rank(); i < n; i += team.size()) trace += a[triangle(i) + i].re;
  trace = team.sum(trace);
  if (!(trace > 0) || (trace >= 1e-60 && trace <= 1e60)) return 1;
  int exponent = 0;
  std::frexp(trace, &exponent);
  exponent = exponent > 1000 ? 1000 : exponent < -1000 ? -1000 : exponent;
  const double scale = std::ldexp(1.0, exponent), inverse = std::ldexp(1.0, -exponent);
  for (int e = team.rank(); e < triangle(n); e += team.size()) a[e] = Complex{a[e].re * inverse, a[e].im * inverse};
  team.sync();
  return scale;
}

}  // namespace iresnet_fast
