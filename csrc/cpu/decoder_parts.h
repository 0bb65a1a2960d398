// What the sources of the decoder's kernels share: numbers of either dtype, the norm of a row, and the table's entries.
#pragma once

#include "decoder.h"
#include "half.h"
#include "vec.h"

namespace ms::MS_LEVEL {

constexpr float kMinusInf = -__builtin_inff();

MS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
MS_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// kernels/attention.cpp
void store_heads(const HeadsCall& call, int threads);
void attend(const AttentionCall& call, int threads);

struct Bf16 {
  uint16_t bits;
};

MS_INLINE float number(float value) { return value; }
MS_INLINE float number(Bf16 value) { return __builtin_bit_cast(float, static_cast<uint32_t>(value.bits) << 16); }

MS_INLINE void put(float* to, float value) { *to = value; }
MS_INLINE void put(Bf16* to, float value) { to->bits = to_bf16(value); }

MS_INLINE F numbers(const float* from) { return load<F>(from); }
MS_INLINE F numbers(const Bf16* from) {
#if defined(MS_X512)
  return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#elif defined(MS_X256)
  return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
#else
  U bits;
  for (int i = 0; i < W; ++i) bits[i] = static_cast<uint32_t>(from[i].bits) << 16;
  return as<F>(bits);
#endif
}

MS_INLINE float square_sum(const float* x, int64_t count) {
  F a{}, b{}, c{}, d{};
  int64_t i = 0;
  for (; i + 4 * W <= count; i += 4 * W) {
    const F xa = load<F>(x + i), xb = load<F>(x + i + W), xc = load<F>(x + i + 2 * W), xd = load<F>(x + i + 3 * W);
    a = fma(xa, xa, a), b = fma(xb, xb, b), c = fma(xc, xc, c), d = fma(xd, xd, d);
  }
  float total = sum((a + b) + (c + d));
  for (; i < count; ++i) total += x[i] * x[i];
  return total;
}

MS_INLINE void rms_norm(const float* x, const float* weight, float* out, int64_t count, float eps) {
  const float factor = 1.0f / __builtin_sqrtf(square_sum(x, count) / static_cast<float>(count) + eps);
  int64_t i = 0;
  for (; i + W <= count; i += W) store(out + i, load<F>(x + i) * set1(factor) * load<F>(weight + i));
  for (; i < count; ++i) out[i] = x[i] * factor * weight[i];
}

}  // namespace ms::MS_LEVEL
