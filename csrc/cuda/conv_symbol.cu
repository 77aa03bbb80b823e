// Assembly of a convolution's symbol at given frequencies.
//
// A thread owns one element (g, o, i) of the weight and keeps its taps in registers while it walks through a tile of
// frequencies, whose phases the block has put into shared memory: the weight is read once per tile, every symbol value
// is written once, by consecutive threads to consecutive addresses. The floor is the bytes of the symbol.
#include <algorithm>

#include "cuda/conv_symbol.cuh"

namespace iresnet_fast {
namespace {

constexpr int kThreads = 128;
constexpr int kTile = 32;               // (frequency, alias) pairs per block, fewer for large kernels
constexpr int kSharedBytes = 48 << 10;  // what every architecture grants without asking
static_assert(kMaxTaps * sizeof(double2) <= kSharedBytes);

// kTaps: taps held in registers; 0 reads them from memory each time, for kernels of other sizes.
template <int kTaps>
__global__ void __launch_bounds__(kThreads)
    conv_symbol_kernel(const double* __restrict__ weight, const int64_t* __restrict__ frequencies,
                       double2* __restrict__ symbol, SymbolShape shape, SymbolSizes sizes, double scale, int tile) {
  extern __shared__ double2 phases[];  // (tile, taps)
  const int64_t taps = kTaps > 0 ? kTaps : sizes.taps;
  const int64_t pairs = sizes.frequencies * sizes.aliases;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * tile;
  const int64_t count = pairs - first < tile ? pairs - first : tile;
  for (int64_t slot = threadIdx.x; slot < count * taps; slot += kThreads) {
    const int64_t pair = first + slot / taps;
    const Phase phase = tap_phase(shape, frequencies[pair / sizes.aliases], pair % sizes.aliases, slot % taps);
    phases[slot] = make_double2(scale * phase.re, scale * phase.im);
  }
  __syncthreads();

  const int64_t elements = sizes.groups * sizes.c_out * sizes.c_in;
  const int64_t element = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (element >= elements) return;
  const double* own = weight + element * taps;
  double held[kTaps > 0 ? kTaps : 1];
  if constexpr (kTaps > 0) {
#pragma unroll
    for (int t = 0; t < kTaps; ++t) held[t] = own[t];
  }
  const int64_t row = element / sizes.c_in, column = element % sizes.c_in;
  for (int64_t slot = 0; slot < count; ++slot) {
    const double2* phase = phases + slot * taps;
    double re = 0.0, im = 0.0;
    if constexpr (kTaps > 0) {
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
        re = fma(held[t], phase[t].x, re);
        im = fma(held[t], phase[t].y, im);
      }
    } else {
      for (int64_t t = 0; t < taps; ++t) {
        re = fma(own[t], phase[t].x, re);
        im = fma(own[t], phase[t].y, im);
      }
    }
    const int64_t pair = first + slot;
    const int64_t frequency = pair / sizes.aliases, alias = pair % sizes.aliases;
    const int64_t line = frequency * sizes.groups * sizes.c_out + row;
    symbol[(line * sizes.aliases + alias) * sizes.c_in + column] = make_double2(re, im);
  }
}

template <int kTaps>
cudaError_t launch(const double* weight, const int64_t* frequencies, double2* symbol, const SymbolShape& shape,
                   const SymbolSizes& sizes, double scale, int tile, cudaStream_t stream) {
  const int64_t elements = sizes.groups * sizes.c_out * sizes.c_in;
  const int64_t pairs = sizes.frequencies * sizes.aliases;
  const dim3 blocks(static_cast<unsigned>((pairs + tile - 1) / tile),
                    static_cast<unsigned>((elements + kThreads - 1) / kThreads));
  const size_t shared = sizeof(double2) * tile * sizes.taps;
  conv_symbol_kernel<kTaps>
      <<<blocks, kThreads, shared, stream>>>(weight, frequencies, symbol, shape, sizes, scale, tile);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_conv_symbol(const double* weight, const int64_t* frequencies, double2* symbol,
                               const SymbolShape& shape, const SymbolSizes& sizes, double scale, cudaStream_t stream) {
  const int64_t fit = kSharedBytes / (static_cast<int64_t>(sizeof(double2)) * sizes.taps);
  if (sizes.taps > kMaxTaps) return cudaErrorInvalidValue;
  const int tile = static_cast<int>(std::min<int64_t>(fit, kTile));
  switch (sizes.taps) {
    case 1:
      return launch<1>(weight, frequencies, symbol, shape, sizes, scale, tile, stream);
    case 9:
      return launch<9>(weight, frequencies, symbol, shape, sizes, scale, tile, stream);
    case 25:
      return launch<25>(weight, frequencies, symbol, shape, sizes, scale, tile, stream);
    default:
      return launch<0>(weight, frequencies, symbol, shape, sizes, scale, tile, stream);
  }
}

}  // namespace iresnet_fast
