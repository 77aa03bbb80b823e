// The algorithms that a GPU's thread block runs, by teams of threads of this machine; prints what fails.
#include "common/hermitian_team.h"

#include <algorithm>
#include <barrier>
#include <complex>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

using namespace iresnet_fast;

namespace {

using Dense = std::vector<std::complex<double>>;

int failures = 0;

void expect(bool holds, const char* what, int n, int size) {
  if (!holds) std::printf("n = %d, %d threads: %s\n", n, size, what), ++failures;
}

// What the members of a team share.
struct Meeting {
  explicit Meeting(int size) : barrier(size), sums(2 * size) {}
  std::barrier<> barrier;
  std::vector<double> sums;
};

class ThreadTeam {
 public:
  ThreadTeam(Meeting& meeting, int rank, int size) : meeting_(meeting), rank_(rank), size_(size) {}
  int rank() const { return rank_; }
  int size() const { return size_; }
  void sync() { meeting_.barrier.arrive_and_wait(); }
  double sum(double x) {  // as the thread block's: one barrier, two buffers in turn
    double* buffer = meeting_.sums.data() + (second_ ? size_ : 0);
    second_ = !second_;
    buffer[rank_] = x;
    sync();
    double total = 0;
    for (int member = 0; member < size_; ++member) total += buffer[member];
    return total;
  }

 private:
  Meeting& meeting_;
  int rank_, size_;
  bool second_ = false;
};

template <typename Work>
void by_team(int size, const Work& work) {
  Meeting meeting(size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank)
    threads.emplace_back([&, rank] {
      ThreadTeam team(meeting, rank, size);
      work(team);
    });
  for (std::thread& thread : threads) thread.join();
}

// A Hermitian matrix with these eigenvalues: a diagonal between three random reflections.
std::vector<Complex> with_eigenvalues(const std::vector<double>& values, std::mt19937& generator) {
  const int n = static_cast<int>(values.size());
  std::normal_distribution<double> normal;
  Dense dense(n * n);
  for (int i = 0; i < n; ++i) dense[i * n + i] = values[i];
  for (int reflection = 0; reflection < 3; ++reflection) {
    std::vector<std::complex<double>> v(n);
    double norm = 0;
    for (auto& x : v) x = {normal(generator), normal(generator)}, norm += std::norm(x);
    for (int j = 0; j < n; ++j) {  // H A, by columns
      std::complex<double> dot = 0;
      for (int i = 0; i < n; ++i) dot += std::conj(v[i]) * dense[i * n + j];
      for (int i = 0; i < n; ++i) dense[i * n + j] -= 2 / norm * v[i] * dot;
    }
    for (int i = 0; i < n; ++i) {  // (H A) H, by rows
      std::complex<double> dot = 0;
      for (int j = 0; j < n; ++j) dot += dense[i * n + j] * v[j];
      for (int j = 0; j < n; ++j) dense[i * n + j] -= 2 / norm * dot * std::conj(v[j]);
    }
  }
  std::vector<Complex> lower;
  for (int i = 0; i < n; ++i)
    for (int j = 0; j <= i; ++j) lower.push_back({dense[i * n + j].real(), i == j ? 0 : dense[i * n + j].imag()});
  return lower;
}

void check_eigenvalues(const std::vector<double>& expected, int size, std::mt19937& generator, double scale = 1) {
  const int n = static_cast<int>(expected.size());
  std::vector<Complex> matrix = with_eigenvalues(expected, generator), scratch(team_scratch(n, size));
  for (Complex& x : matrix) x = {x.re * scale, x.im * scale};
  std::vector<double> diagonal(n), off_squared(n), values(n), scales(size);
  std::vector<char> matches(size);
  by_team(size, [&](ThreadTeam& team) {
    scales[team.rank()] = bring_into_range(team, matrix.data(), n);
    matches[team.rank()] =
        eigenvalues(team, matrix.data(), n, scratch.data(), diagonal.data(), off_squared.data(), values.data());
  });
  double error = 0, largest = 1e-300;
  for (int i = 0; i < n; ++i) {
    error = std::max(error, std::abs(values[i] * scales[0] / scale - expected[i]));
    largest = std::max(largest, std::abs(expected[i]));
  }
  expect(error <= 1e-14 * n * largest, "the eigenvalues are those it was made of", n, size);
  expect(std::all_of(matches.begin(), matches.end(), [](char match) { return match; }), "they match", n, size);
}

void check_cholesky(int n, int size, std::mt19937& generator) {
  for (const double smallest : {1e-6, -1e-6}) {
    std::vector<double> expected(n);
    for (int i = 0; i < n; ++i) expected[i] = smallest + i;
    std::vector<Complex> matrix = with_eigenvalues(expected, generator);
    std::vector<char> positive(size);
    by_team(size, [&](ThreadTeam& team) { positive[team.rank()] = has_cholesky(team, matrix.data(), n); });
    for (const char found : positive) expect(found == (smallest > 0), "Cholesky tells the least one's sign", n, size);
  }
}

}  // namespace

int main() {
  std::mt19937 generator(0);
  for (const int n : {1, 2, 3, 5, 8, 31, 33, 64}) {
    for (const int size : {1, 3, 4, 64, 96}) {
      if (size > 4 && n != 5 && n != 33) continue;  // more threads than the machine has: slow
      std::vector<double> values(n);
      for (int i = 0; i < n; ++i) values[i] = i + 1;
      check_eigenvalues(values, size, generator);
      check_cholesky(n, size, generator);
    }
    std::vector<double> values(n);
    check_eigenvalues(values, 4, generator);  // nothing at all
    for (double& value : values) value = 2.5;
    check_eigenvalues(values, 4, generator);  // a multiple of the identity
    for (int i = 0; i < n; ++i) values[i] = i < n / 2 ? 0 : 1;
    check_eigenvalues(values, 4, generator);  // of half rank, and multiple
    check_eigenvalues(values, 4, generator, 1e-200);
    check_eigenvalues(values, 4, generator, 1e200);
  }
  // Rounding errors of nothing: indefinite, of trace 0; and a column that is almost none.
  for (const std::vector<Complex>& lower : std::vector<std::vector<Complex>>{
           {{0, 0}, {-2.2e-16, 0}, {0, 0}, {0, 0}, {-8.9e-16, 0}, {0, 0}},
           {{1, 0}, {0, 0}, {1, 0}, {1e-155, 0}, {0, 0}, {1, 0}},
       }) {
    std::vector<Complex> matrix = lower, scratch(team_scratch(3, 2));
    std::vector<double> diagonal(3), off_squared(3), values(3);
    bool matches[2];
    by_team(2, [&](ThreadTeam& team) {
      matches[team.rank()] =
          eigenvalues(team, matrix.data(), 3, scratch.data(), diagonal.data(), off_squared.data(), values.data());
    });
    expect(matches[0] && matches[1], "small numbers raise no alarm", 3, 2);
  }
  // NaN comes out as no match and no proof.
  std::vector<Complex> matrix(6, {NAN, 0}), scratch(team_scratch(3, 2));
  std::vector<double> diagonal(3), off_squared(3), values(3);
  bool matches = true, positive = true;
  by_team(1, [&](ThreadTeam& team) {
    positive = has_cholesky(team, matrix.data(), 3);
    matches = eigenvalues(team, matrix.data(), 3, scratch.data(), diagonal.data(), off_squared.data(), values.data());
  });
  expect(!matches && !positive, "NaN is caught", 3, 1);
  return failures != 0;
}
