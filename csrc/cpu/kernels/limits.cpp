// What the machine can do at best: the loops against which kernels are measured.
#include "kernels.h"
#include "vec.h"

namespace ms::MS_LEVEL {
namespace {

uint64_t read_bytes(const void* from, int64_t bytes) {
  const char* at = static_cast<const char*>(from);
  I sums[4] = {};
  for (int64_t i = 0; i < bytes; i += 256) {
    for (int line = 0; line < 4; ++line) __builtin_prefetch(at + i + 1024 + 64 * line);
    for (int part = 0; part < 256 / (4 * W); ++part) sums[part % 4] += load<I>(at + i + part * 4 * W);
  }
  I total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  uint64_t result = 0;
  for (int i = 0; i < W; ++i) result += static_cast<uint32_t>(total[i]);
  return result;
}

float multiply_add(int64_t rounds, int64_t* flops) {
  F a0 = set1(1), a1 = a0, a2 = a0, a3 = a0, a4 = a0, a5 = a0, a6 = a0, a7 = a0, a8 = a0, a9 = a0, a10 = a0, a11 = a0;
  F b = set1(0.999f), c = set1(1e-3f);
  for (int64_t i = 0; i < rounds; ++i) {
    a0 = fma(a0, b, c), a1 = fma(a1, b, c), a2 = fma(a2, b, c), a3 = fma(a3, b, c);
    a4 = fma(a4, b, c), a5 = fma(a5, b, c), a6 = fma(a6, b, c), a7 = fma(a7, b, c);
    a8 = fma(a8, b, c), a9 = fma(a9, b, c), a10 = fma(a10, b, c), a11 = fma(a11, b, c);
  }
  *flops = rounds * 12 * 2 * W;
  return sum(((a0 + a1) + (a2 + a3)) + ((a4 + a5) + (a6 + a7)) + ((a8 + a9) + (a10 + a11)));
}

}  // namespace

extern const LimitKernels limit_kernels;
const LimitKernels limit_kernels = {read_bytes, multiply_add};

}  // namespace ms::MS_LEVEL
