// The batched Hermitian algorithms, for each kind of processor that this one can run; prints what fails.
#include "cpu/hermitian.cpp"

#include <algorithm>
#include <cstdio>
#include <random>
#include <vector>

using namespace iresnet_fast;

namespace {

int failures = 0;

void expect(bool holds, const char* what, int64_t n) {
  if (!holds) std::printf("n = %ld: %s\n", static_cast<long>(n), what), ++failures;
}

// Hermitian matrices with known eigenvalues 1, 2, ..., n in every lane: reflections of a diagonal.
template <typename P>
void fill(HermitianGroup<P>& group, std::mt19937& generator, double shift = 0) {
  const int64_t n = group.order();
  std::normal_distribution<double> normal;
  for (int lane = 0; lane < kLanes<P>; ++lane) {
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

template <typename P>
void check(int64_t n, Processor processor) {
  std::mt19937 generator(n);
  HermitianGroup<P> group(n, processor);
  Packed<P> d(n), e(n), all_d(n * kPairs), all_e(n * kPairs);
  fill(group, generator);
  Invariants<P> invariants;
  group.take_invariants(&invariants);
  group.tridiagonalize(d.data(), e.data());
  for (int64_t i = 0; i < n; ++i)
    for (int pair = 0; pair < kPairs; ++pair) {
      all_d[i * kPairs + pair] = d[i];
      if (i + 1 < n) all_e[i * kPairs + pair] = e[i];
    }
  expect(tridiagonal_eigenvalues_of_pairs(all_d.data(), all_e.data(), n, processor), "the QL iteration converges", n);
  for (int lane = 0; lane < kLanes<P>; ++lane) {
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
    group.subtract_from(0);
    group.subtract_from(0);
    expect(group.has_cholesky() == (smallest > 0), "Cholesky tells the sign of the least", n);
  }
}

// Sums of cosines and sines with one coefficient each, against their definition.
template <typename P>
void check_combine(int64_t n, Processor processor) {
  constexpr int64_t kPhases = 3;
  std::mt19937 generator(n);
  std::normal_distribution<double> normal;
  HermitianGroup<P> group(n, processor);
  std::vector<double> coefficients(group.entries() * (1 + 2 * kPhases));
  for (double& coefficient : coefficients) coefficient = normal(generator);
  Packed<P> cosines(kPhases), sines(kPhases);
  for (int64_t s = 0; s < kPhases; ++s)
    for (int lane = 0; lane < kLanes<P>; ++lane)
      cosines[s][lane] = normal(generator), sines[s][lane] = normal(generator);
  group.combine(coefficients.data(), kPhases, cosines.data(), sines.data());
  double error = 0;
  for (int64_t entry = 0; entry < group.entries(); ++entry)
    for (int lane = 0; lane < kLanes<P>; ++lane) {
      const double* from = coefficients.data() + entry * (1 + 2 * kPhases);
      double re = from[0], im = 0;
      for (int64_t s = 0; s < kPhases; ++s) {
        re += from[1 + 2 * s] * cosines[s][lane];
        im += from[2 + 2 * s] * sines[s][lane];
      }
      error = std::max(
          {error, std::abs(group.matrix()[entry].re[lane] - re), std::abs(group.matrix()[entry].im[lane] - im)});
    }
  expect(error <= 1e-14, "entries are sums of cosines and sines", n);
}

template <typename P>
void check_all() {
  for (const Processor processor : {Processor::baseline, Processor::avx2, Processor::avx512}) {
    const bool wide = kLanes<P> == 8;
    if (processor > kProcessor || wide != (processor == Processor::avx512)) continue;
    for (const int64_t n : {1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 64}) {
      check<P>(n, processor);
      check_combine<P>(n, processor);
    }
  }
  // Matrices whose reduction and iteration meet zeros: multiples of the identity, and nothing at all.
  for (const double value : {0.0, 2.5}) {
    HermitianGroup<P> group(6);
    for (int64_t i = 0; i < group.entries(); ++i) group.matrix()[i] = Entry<P>{};
    group.subtract_from(value);
    Packed<P> d(6), e(6), all_d(6 * kPairs), all_e(6 * kPairs);
    group.tridiagonalize(d.data(), e.data());
    for (int64_t i = 0; i < 6; ++i)
      for (int pair = 0; pair < kPairs; ++pair) {
        all_d[i * kPairs + pair] = d[i];
        if (i < 5) all_e[i * kPairs + pair] = e[i];
      }
    expect(tridiagonal_eigenvalues_of_pairs(all_d.data(), all_e.data(), 6), "converges at once", 6);
    for (int64_t i = 0; i < 6; ++i) expect(all_d[i * kPairs][0] == value, "the diagonal is kept", 6);
  }
}

}  // namespace

int main() {
  check_all<Pack4>();
  if (kProcessor == Processor::avx512) check_all<Pack8>();
  return failures != 0;
}
