// One function for each kind of x86 processor around code that is inlined into each, and the choice at run time.
#pragma once

namespace iresnet_fast {

#if defined(__x86_64__) && defined(__GNUC__)
enum class Processor { baseline, avx2, avx512 };

inline Processor detect_processor() {
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return Processor::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Processor::avx2;
  return Processor::baseline;
}

inline const Processor kProcessor = detect_processor();

#define IRESNET_FAST_DISPATCH(result, name, parameters, call)                                               \
  __attribute__((target("avx512f,avx512vl,avx512dq,fma"))) result name##_avx512 parameters { return call; } \
  __attribute__((target("avx2,fma"))) result name##_avx2 parameters { return call; }                        \
  result name##_baseline parameters { return call; }
#define IRESNET_FAST_CHOOSE(name, arguments)                 \
  (kProcessor == Processor::avx512 ? name##_avx512 arguments \
   : kProcessor == Processor::avx2 ? name##_avx2 arguments   \
                                   : name##_baseline arguments)
#else
#define IRESNET_FAST_DISPATCH(result, name, parameters, call) \
  result name##_baseline parameters { return call; }
#define IRESNET_FAST_CHOOSE(name, arguments) (name##_baseline arguments)
#endif

}  // namespace iresnet_fast
