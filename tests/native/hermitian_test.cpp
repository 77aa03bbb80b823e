// The batched Hermitian algorithms, for each kind of processor that this one can run; prints what fails.
#include "cpu/hermitian.cpp"

#include <algorithm>
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/invariants.h"

using namespace iresnet_fast;

namespace {

int failures = 0;

void expect(bool holds, const char* what, int64_t n) {
  if (!holds) std::printf("n = %ld: %s\n", static_cast<long>(n), what), ++failures;
}

// Hermitian matrices with known eigenvalues 1, 2, ..., n in every lane: reflections of a diagonal.
void fill(HermitianGroup& group, std::mt19937& generator, double shift = 0) {
  const int64_t n = group.order();
  std::normal_distribution<double> normal;
  for (int lane = 0; lane < kLanes; ++lane) {
    std::vector<double> re(n * n), im(n * n), vr(n), vi(n);
    for (int64_t i = 0; i < n; ++i) re[i * n + i] = i + 1 + shift;
    for (int reflection = 0; reflection < 3; ++reflection) {
      double norm = 0;
      for (int64_t i = 0; i < n; ++i) {
        vr[i] = normal(generator), vi[i] = normal(generator);
        norm += vr[i] * vr[i] + vi[i] * vi[i];
      }
      // A <- H A H with H = I - 2 v v^H / norm
      for (int side = 0; side < 2; ++side) {
        for (int64_t j = 0; j < n; ++j) {
          double dr = 0, di = 0;
          for (int64_t i = 0; i < n; ++i) {
            const double ar = re[i * n + j], ai = im[i * n + j];
            dr += vr[i] * ar + vi[i] * ai;
            di += vr[i] * ai - vi[i] * ar;
          }
          for (int64_t i = 0; i < n; ++i) {
            re[i * n + j] -= 2 / norm * (vr[i] * dr - vi[i] * di);
            im[i * n + j] -= 2 / norm * (vr[i] * di + vi[i] * dr);
          }
        }
        for (int64_t i = 0; i < n; ++i)  // the conjugate transpose, so that the other side follows
          for (int64_t j = 0; j <= i; ++j) {
            std::swap(re[i * n + j], re[j * n + i]);
            const double kept = im[i * n + j];
            im[i * n + j] = -im[j * n + i];
            im[j * n + i] = -kept;
          }
      }
    }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j <= i; ++j) {
        group.matrix()[entry_index(i, j)].re[lane] = re[i * n + j];
        group.matrix()[entry_index(i, j)].im[lane] = i == j ? 0 : im[i * n + j];
      }
  }
}

using Reduce = void (*)(Entry*, int64_t, TridiagonalScratch, Pack*, Pack*);
using Factor = bool (*)(Entry*, int64_t, Pack*);
using Solve = bool (*)(Pack*, Pack*, int64_t);

void check(int64_t n, Reduce reduce_with, Factor factor_with, Solve solve_with) {
  std::mt19937 generator(n);
  HermitianGroup group(n);
  Packed<Pack> d(n), e(n), all_d(n * kPairs), all_e(n * kPairs);
  Entry* scratch = group.matrix() + group.entries();
  fill(group, generator);
  const Invariants invariants(group.matrix(), n);
  reduce_with(group.matrix(), n, {scratch, scratch + n, scratch + 2 * n, scratch + 3 * n}, d.data(), e.data());
  for (int64_t i = 0; i < n; ++i)
    for (int pair = 0; pair < kPairs; ++pair) {
      all_d[i * kPairs + pair] = d[i];
      if (i + 1 < n) all_e[i * kPairs + pair] = e[i];
    }
  expect(solve_with(all_d.data(), all_e.data(), n), "the QL iteration converges", n);
  for (int lane = 0; lane < kLanes; ++lane) {
    std::vector<double> values(n);
    for (int64_t i = 0; i < n; ++i) values[i] = all_d[i * kPairs + 1][lane];
    std::sort(values.begin(), values.end());
    double error = 0;
    for (int64_t i = 0; i < n; ++i) error = std::max(error, std::abs(values[i] - (i + 1)));
    expect(error <= 1e-13 * n, "the eigenvalues are 1 ... n", n);
    expect(invariants.match(lane, values.data(), n), "they match trace and norm", n);
    values[n / 2] *= 1 + 1e-8;
    expect(!invariants.match(lane, values.data(), n), "a corrupted eigenvalue is caught", n);
    values[n / 2] = NAN;
    expect(!invariants.match(lane, values.data(), n), "NaN is caught", n);
  }
  for (const double smallest : {1e-6, -1e-6}) {
    fill(group, generator, smallest - 1);
    expect(factor_with(group.matrix(), n, &scratch->re) == (smallest > 0), "Cholesky tells the sign of the least", n);
  }
}

}  // namespace

int main() {
  for (const int64_t n : {1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 64}) {
    check(n, reduce_baseline, factor_baseline, solve_baseline);
#if defined(__x86_64__) && defined(__GNUC__)
    if (kProcessor != Processor::baseline) check(n, reduce_avx2, factor_avx2, solve_avx2);
    if (kProcessor == Processor::avx512) check(n, reduce_avx512, factor_avx512, solve_avx512);
#endif
  }
  // Matrices whose reduction and iteration meet zeros: multiples of the identity, and nothing at all.
  for (const double value : {0.0, 2.5}) {
    HermitianGroup group(6);
    for (int64_t i = 0; i < group.entries(); ++i) group.matrix()[i] = Entry{splat(0), splat(0)};
    for (int64_t i = 0; i < 6; ++i) group.matrix()[entry_index(i, i)].re = splat(value);
    Packed<Pack> d(6), e(6), all_d(6 * kPairs), all_e(6 * kPairs);
    group.tridiagonalize(d.data(), e.data());
    for (int64_t i = 0; i < 6; ++i)
      for (int pair = 0; pair < kPairs; ++pair) {
        all_d[i * kPairs + pair] = d[i];
        if (i < 5) all_e[i * kPairs + pair] = e[i];
      }
    expect(tridiagonal_eigenvalues_of_pairs(all_d.data(), all_e.data(), 6), "converges at once", 6);
    for (int64_t i = 0; i < 6; ++i) expect(all_d[i * kPairs][0] == value, "the diagonal is kept", 6);
  }
  return failures != 0;
}
