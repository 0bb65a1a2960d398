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

// Twelve chains keep two multiply-add units of latency four (and then some) busy; each starts elsewhere, for the
// compiler merges chains that are equal.
float multiply_add(int64_t rounds, int64_t* flops) {
  constexpr int kChains = 12;
  F a[kChains];
  for (int chain = 0; chain < kChains; ++chain) a[chain] = set1(1.0f + 0.25f * static_cast<float>(chain));
  const F b = set1(0.999f), c = set1(1e-3f);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int chain = 0; chain < kChains; ++chain) a[chain] = fma(a[chain], b, c);
  }
  *flops = rounds * kChains * 2 * W;
  F total = a[0];
  for (int chain = 1; chain < kChains; ++chain) total += a[chain];
  return sum(total);
}

void fill_bytes(void* to, int64_t bytes) {
  char* at = static_cast<char*>(to);
  const I value = set1i(0x01020304);
  for (int64_t i = 0; i < bytes; i += 256)
    for (int part = 0; part < 256 / (4 * W); ++part) store(at + i + part * 4 * W, value);
}

void fill_bytes_streaming(void* to, int64_t bytes) {
  char* at = static_cast<char*>(to);
  const I value = set1i(0x01020304);
  for (int64_t i = 0; i < bytes; i += 256)
    for (int part = 0; part < 256 / (4 * W); ++part) store_streaming(at + i + part * 4 * W, value);
  finish_streaming();
}

}  // namespace

extern const LimitKernels limit_kernels;
const LimitKernels limit_kernels = {read_bytes, multiply_add, fill_bytes, fill_bytes_streaming};

}  // namespace ms::MS_LEVEL
