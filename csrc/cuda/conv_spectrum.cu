// Gram matrices of a convolution, their eigenvalues and their Cholesky factorisations: a thread block per frequency
// and group of channels holds the matrix in its own memory, from its assembly to its last eigenvalue, so that neither
// the symbol nor the matrices touch device memory. The floor is the arithmetic of the reduction, 16/3 n^3 a matrix.
#include <algorithm>

#include "common/hermitian_team.h"
#include "cuda/conv_spectrum.cuh"

namespace iresnet_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 2;       // per processor at least, as far as their registers go
constexpr int kFewThreads = 64;  // for matrices of which many blocks share a processor
constexpr int kFewRows = 32;
constexpr int kWarp = 32;

class BlockTeam {
 public:
  // sums: kThreads / kWarp numbers for each of two sums.
  __device__ explicit BlockTeam(double* sums) : sums_(sums) {}
  __device__ int rank() const { return threadIdx.x; }
  __device__ int size() const { return blockDim.x; }
  __device__ void sync() const { __syncthreads(); }
  __device__ double sum(double x) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    if (rank() % kWarp == 0) sums_[rank() / kWarp] = x;
    __syncthreads();
    double total = 0;
    for (int warp = 0; warp < size() / kWarp; ++warp) total += sums_[warp];
    // The other half next time: nobody can write it again before all have passed another barrier.
    sums_ = second_ ? sums_ - kThreads / kWarp : sums_ + kThreads / kWarp;
    second_ = !second_;
    return total;
  }

 private:
  double* sums_;
  bool second_ = false;
};

// Where a block keeps what it works on.
struct Layout {
  int matrix, scratch, diagonal, off_squared, values, phases, sums, bytes;

  __host__ __device__ Layout(int n, int shifts, int threads) {
    matrix = 0;
    scratch = matrix + 16 * triangle(n);
    diagonal = scratch + 16 * team_scratch(n, threads);
    off_squared = diagonal + 8 * n;
    values = off_squared + 8 * n;
    phases = (values + 8 * n + 15) / 16 * 16;
    sums = phases + 16 * shifts;
    bytes = sums + 8 * 2 * kThreads / kWarp;
  }
};

int threads_for(int order) { return order <= kFewRows ? kFewThreads : kThreads; }

// The lower triangle of G at the block's frequency.
__device__ void assemble(const BlockTeam& team, const GramMatrices& gram, int64_t frequency, int64_t group, Complex* a,
                         Complex* phases) {
  const int n = gram.order, entries = triangle(n);
  if (gram.formed != nullptr) {
    const double2* from = gram.formed + (frequency * gram.groups + group) * n * n;
    for (int cell = team.rank(); cell < n * n; cell += team.size()) {
      const int i = cell / n, j = cell % n;
      if (j <= i) a[triangle(i) + j] = Complex{from[cell].x, from[cell].y};
    }
    team.sync();
    return;
  }
  for (int s = team.rank(); s < gram.shifts; s += team.size()) {
    const Phase phase = shift_phase(gram.shape, gram.frequencies[frequency], gram.shift + kMaxAxes * s);
    phases[s] = Complex{phase.re, -phase.im};
  }
  team.sync();
  const double* coefficients = gram.coefficients + group * (1 + 2 * gram.shifts) * static_cast<int64_t>(entries);
  for (int entry = team.rank(); entry < entries; entry += team.size()) {
    const double* stream = coefficients + entry;
    Complex sum{*stream, 0};
    for (int s = 0; s < gram.shifts; ++s) {
      stream += entries;
      sum.re = fma(*stream, phases[s].re, sum.re);
      stream += entries;
      sum.im = fma(*stream, phases[s].im, sum.im);
    }
    a[entry] = sum;
  }
  team.sync();
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    gram_values_kernel(const __grid_constant__ GramMatrices gram, double* __restrict__ values, int* wrong) {
  extern __shared__ __align__(16) unsigned char memory[];
  const int n = gram.order;
  const Layout layout(n, gram.shifts, blockDim.x);
  Complex* a = reinterpret_cast<Complex*>(memory + layout.matrix);
  double* found = reinterpret_cast<double*>(memory + layout.values);
  BlockTeam team(reinterpret_cast<double*>(memory + layout.sums));
  const int64_t frequency = blockIdx.x / gram.groups, group = blockIdx.x % gram.groups;
  assemble(team, gram, frequency, group, a, reinterpret_cast<Complex*>(memory + layout.phases));
  const double scale = bring_into_range(team, a, n);
  const bool match = eigenvalues(team, a, n, reinterpret_cast<Complex*>(memory + layout.scratch),
                                 reinterpret_cast<double*>(memory + layout.diagonal),
                                 reinterpret_cast<double*>(memory + layout.off_squared), found);
  if (!match && team.rank() == 0) *wrong = 1;
  double* out = values + static_cast<int64_t>(blockIdx.x) * n;
  for (int i = team.rank(); i < n; i += team.size()) out[i] = sqrt(fmax(found[n - 1 - i], 0.0) * scale);
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    gram_below_kernel(const __grid_constant__ GramMatrices gram, double shift, int* failed) {
  extern __shared__ __align__(16) unsigned char memory[];
  const int n = gram.order;
  const Layout layout(n, gram.shifts, blockDim.x);
  Complex* a = reinterpret_cast<Complex*>(memory + layout.matrix);
  BlockTeam team(reinterpret_cast<double*>(memory + layout.sums));
  const int64_t frequency = blockIdx.x / gram.groups, group = blockIdx.x % gram.groups;
  assemble(team, gram, frequency, group, a, reinterpret_cast<Complex*>(memory + layout.phases));
  for (int i = team.rank() / kWarp; i < n; i += team.size() / kWarp)
    for (int j = team.rank() % kWarp; j <= i; j += kWarp) {
      const Complex x = a[triangle(i) + j];
      a[triangle(i) + j] = Complex{(i == j ? shift : 0.0) - x.re, -x.im};
    }
  team.sync();
  if (!has_cholesky(team, a, n) && team.rank() == 0) *failed = 1;
}

template <typename Kernel, typename... Arguments>
cudaError_t launch(Kernel kernel, const GramMatrices& gram, int64_t count, cudaStream_t stream,
                   Arguments... arguments) {
  if (count * gram.groups > kMaxMatrices) return cudaErrorInvalidValue;
  const int threads = threads_for(gram.order);
  const int bytes = Layout(gram.order, gram.shifts, threads).bytes;
  // All there is, whatever this launch takes of it: launches of other threads rely on it as well.
  int device = 0, available = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, available);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(count * gram.groups), threads, bytes, stream>>>(gram, arguments...);
  return cudaGetLastError();
}

}  // namespace

cudaError_t largest_gram_order(int device, int* order) {
  int available = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  *order = 0;
  while (Layout(*order + 1, kMaxShifts, threads_for(*order + 1)).bytes <= available) ++*order;
  return cudaSuccess;
}

cudaError_t launch_gram_values(const GramMatrices& gram, int64_t count, double* values, int* wrong,
                               cudaStream_t stream) {
  return launch(gram_values_kernel, gram, count, stream, values, wrong);
}

cudaError_t launch_gram_below(const GramMatrices& gram, int64_t count, double shift, int* failed, cudaStream_t stream) {
  return launch(gram_below_kernel, gram, count, stream, shift, failed);
}

}  // namespace iresnet_fast
