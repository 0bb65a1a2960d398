// Vectors from and to bfloat16, float16 and bytes, and the reductions that encoders need; exact, each level its way.
#pragma once

#include "vec.h"

namespace ms::MS_LEVEL {

typedef uint16_t Half __attribute__((vector_size(2 * W)));  // W 16-bit lanes

MS_INLINE float scalar_f32(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
MS_INLINE uint32_t scalar_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

// To the nearest whole number, ties to even; in range of int32 only.
MS_INLINE I to_int_nearest(F value) {
#if defined(MS_X512)
  return (I)_mm512_cvtps_epi32((__m512)value);
#elif defined(MS_X256)
  return (I)_mm256_cvtps_epi32((__m256)value);
#elif defined(__SSE2__)
  return (I)_mm_cvtps_epi32((__m128)value);
#else
  return to_int(round_even(value));
#endif
}

// The low byte of each lane; lanes hold 0 to 255.
MS_INLINE void store_u8(uint8_t* to, I value) {
#if defined(MS_X512)
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)value));
#elif defined(MS_X256)
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)value),
                                         _mm256_extracti128_si256((__m256i)value, 1));
  _mm_storel_epi64((__m128i*)to, _mm_packus_epi16(words, words));
#elif defined(__SSE2__)
  const __m128i words = _mm_packs_epi32((__m128i)value, (__m128i)value);
  const int32_t bytes = _mm_cvtsi128_si32(_mm_packus_epi16(words, words));
  __builtin_memcpy(to, &bytes, 4);
#else
  for (int i = 0; i < W; ++i) to[i] = static_cast<uint8_t>(value[i]);
#endif
}

MS_INLINE int32_t largest_int(I value) {
#if defined(MS_X512)
  return _mm512_reduce_max_epi32((__m512i)value);
#elif defined(MS_X256)
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128((__m256i)value), _mm256_extracti128_si256((__m256i)value, 1));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4E));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0xB1));
  return _mm_cvtsi128_si32(half);
#else
  int32_t best = value[0];
  for (int i = 1; i < W; ++i) best = value[i] > best ? value[i] : best;
  return best;
#endif
}

// One bit for each lane of a mask of 0 and -1.
MS_INLINE uint32_t lane_bits(I mask) {
#if defined(MS_X512)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(MS_X256)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}

MS_INLINE I widen_u16(const uint16_t* from) { return __builtin_convertvector(load<Half>(from), I); }

MS_INLINE F load_f32(const float* from) { return load<F>(from); }
MS_INLINE F load_bf16(const uint16_t* from) { return as<F>(widen_u16(from) << 16); }
MS_INLINE F load_f16(const uint16_t* from) {
#if defined(MS_X512)
  return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(MS_X256)
  return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
  const I bits = widen_u16(from), magnitude = bits & 0x7FFF;
  F value = as<F>((magnitude << 13) + (112 << 23));
  value = select(magnitude < 0x400, value + value - 0x1p-14f, value);
  value = select(magnitude >= 0x7C00, as<F>((magnitude << 13) | 0x7F800000), value);
  return as<F>(as<I>(value) | ((bits & 0x8000) << 16));
#endif
}

// Round to nearest even; NaN becomes a quiet NaN.
MS_INLINE void store_bf16(uint16_t* to, F value) {
  const U bits = as<U>(value);
  const U rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const I is_nan = (as<I>(bits) & 0x7FFFFFFF) > 0x7F800000;
  const U result = as<U>(select(is_nan, set1i(0x7FC0), as<I>(rounded)));
  store(to, __builtin_convertvector(result, Half));
}
MS_INLINE void store_f16(uint16_t* to, F value) {
#if defined(MS_X512)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(MS_X256)
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const I bits = as<I>(value), magnitude = bits & 0x7FFFFFFF;
  const I clamped = min(magnitude, set1i(0x47800000));  // 2^16 rounds to Inf as all above it
  const I field = max(clamped >> 23, set1i(113));
  const I anchor = (field + 13) << 23;
  I code = as<I>(as<F>(clamped) + as<F>(anchor)) - anchor + ((field - 113) << 10);
  code = min(code, set1i(0x7C00));
  code = select(magnitude > 0x7F800000, set1i(0x7E00), code);
  store(to, __builtin_convertvector(as<U>(code | ((bits >> 16) & 0x8000)), Half));
#endif
}

// One number, by way of a vector.
MS_INLINE float half_to_float(uint16_t bits) {
  uint16_t lanes[W] = {bits};
  return load_f16(lanes)[0];
}

}  // namespace ms::MS_LEVEL
