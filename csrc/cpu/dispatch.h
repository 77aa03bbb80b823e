// Work that is compiled for each kind of processor, with all that is inlined into it, and the choice at run time.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "common/inline.h"

namespace iresnet_fast {

enum class Processor { baseline, avx2, avx512 };

#if defined(__x86_64__) && defined(__GNUC__)

inline Processor find_processor() {
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return Processor::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Processor::avx2;
  return Processor::baseline;
}

template <typename Work>
__attribute__((noinline, target("avx512f,avx512vl,avx512dq,fma"))) auto run_on_avx512(const Work& work) {
  return work();
}
template <typename Work>
__attribute__((noinline, target("avx2,fma"))) auto run_on_avx2(const Work& work) {
  return work();
}

#else

inline Processor find_processor() { return Processor::baseline; }
template <typename Work>
auto run_on_avx512(const Work& work) {
  return work();
}
template <typename Work>
auto run_on_avx2(const Work& work) {
  return work();
}

#endif

// This processor's kind, or what PyTorch's own variable asks for, if that is less.
inline Processor detect_processor() {
  const char* asked = std::getenv("ATEN_CPU_CAPABILITY");
  const Processor found = find_processor();
  if (asked && !std::strcmp(asked, "default")) return Processor::baseline;
  if (asked && !std::strcmp(asked, "avx2")) return std::min(found, Processor::avx2);
  return found;
}

inline const Processor kProcessor = detect_processor();

inline const char* name_of(Processor processor) {
  return processor == Processor::avx512 ? "AVX-512" : processor == Processor::avx2 ? "AVX2" : "baseline";
}

// Bytes of a vector, as a type.
template <int bytes>
using VectorBytes = std::integral_constant<int, bytes>;

// work(VectorBytes<...>) with vectors as wide as those of the processor, or twice as wide as the baseline's.
template <typename Work>
auto with_vectors(const Work& work) {
  return kProcessor == Processor::avx512 ? work(VectorBytes<64>{}) : work(VectorBytes<32>{});
}

// work(), which uses vectors of so many bytes, on a processor that has them. Work is a lambda of IRESNET_FAST_INLINED,
// or it is compiled for the baseline; it returns no vector, for which the calling conventions differ.
template <int bytes, typename Work>
auto run_on(Processor processor, const Work& work) {
  static_assert(std::is_void_v<decltype(work())> || std::is_arithmetic_v<decltype(work())>);
  if constexpr (bytes == 64)
    return run_on_avx512(work);
  else
    return processor == Processor::baseline ? work() : run_on_avx2(work);
}

}  // namespace iresnet_fast
