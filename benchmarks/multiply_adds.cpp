// What a thread of this processor can do at most: independent multiply-adds of vectors that never leave the registers.
// Compiled with -march=native by benchmarks/machine.py.
#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

// More than a multiply-add takes cycles, times how many start in one; no more than there are registers.
#if defined(__aarch64__)
constexpr int kChains = 24;
#else
constexpr int kChains = 12;
#endif

// The result keeps the rounds from being left out.
template <typename T>
T multiply_adds(long rounds) {
  typedef T Vector __attribute__((vector_size(kBytes)));
  Vector sum[kChains], factor = Vector{} + T(0.999), term = Vector{} + T(1e-3);
  for (int i = 0; i < kChains; ++i) sum[i] = Vector{} + T(i);
  for (long round = 0; round < rounds; ++round)
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) sum[i] = sum[i] * factor + term;
  T result = 0;
  for (int i = 0; i < kChains; ++i) result += sum[i][0];
  return result;
}

extern "C" {
float float32(long rounds) { return multiply_adds<float>(rounds); }
double float64(long rounds) { return multiply_adds<double>(rounds); }
int per_round(int element_bytes) { return kChains * kBytes / element_bytes; }
}
