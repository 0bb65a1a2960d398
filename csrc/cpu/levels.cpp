#include "kernels.h"

namespace ms {

#define MS_EXTERN(type, member) extern const type member##_kernels;
#define MS_ADDRESS(type, member) &member##_kernels,
#define MS_TABLE(level)                                                          \
  namespace level {                                                              \
  MS_KERNEL_GROUPS(MS_EXTERN)                                                    \
  static const Kernels all_kernels = {#level, MS_KERNEL_GROUPS(MS_ADDRESS)};     \
  }

#if defined(MS_HAS_PORTABLE)
MS_TABLE(portable)
#endif
#if defined(MS_HAS_AVX2)
MS_TABLE(avx2)
#endif
#if defined(MS_HAS_AVX512)
MS_TABLE(avx512)
#endif
#if defined(MS_HAS_AVX512_BF16)
MS_TABLE(avx512_bf16)
#endif

namespace {

bool machine_has(Level level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (level == Level::portable) return true;
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
        __builtin_cpu_supports("bmi2")))
    return false;
  if (level == Level::avx2) return true;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni")))
    return false;
  if (level == Level::avx512) return true;
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512vbmi2");
#else
  return level == Level::portable;
#endif
}

const Kernels* built(Level level) {
  switch (level) {
#if defined(MS_HAS_PORTABLE)
    case Level::portable: return &portable::all_kernels;
#endif
#if defined(MS_HAS_AVX2)
    case Level::avx2: return &avx2::all_kernels;
#endif
#if defined(MS_HAS_AVX512)
    case Level::avx512: return &avx512::all_kernels;
#endif
#if defined(MS_HAS_AVX512_BF16)
    case Level::avx512_bf16: return &avx512_bf16::all_kernels;
#endif
    default: return nullptr;
  }
}

}  // namespace

const Kernels* kernels_of(Level level) { return machine_has(level) ? built(level) : nullptr; }

Level best_level() {
  for (int index = kNumLevels - 1; index > 0; --index)
    if (kernels_of(static_cast<Level>(index)) != nullptr) return static_cast<Level>(index);
  return Level::portable;
}

}  // namespace ms
