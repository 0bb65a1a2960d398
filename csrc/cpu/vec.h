// Vectors of one instruction-set level: the one place where levels differ.
//
// Every kernel source is compiled once for each level with MS_LEVEL_<NAME> defined; inside namespace ms::MS_LEVEL the
// types F, I and U are the level's widest float, int32 and uint32 vectors (W lanes). Arithmetic, comparison (a mask of
// 0 / -1) and selection (mask ? a : b) are the compiler's vector extensions; what they cannot say stands here.
// Nothing here may call a function of the standard library that could be emitted out of line: the linker would keep
// the copy of one level for all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#define MS_INLINE inline __attribute__((always_inline))

// Loops whose counts are known are unrolled where registers are many; the portable level stays small instead.
#define MS_PRAGMA(text) _Pragma(#text)
#if defined(MS_LEVEL_PORTABLE)
#define MS_UNROLL(count)
#else
#define MS_UNROLL(count) MS_PRAGMA(GCC unroll count)
#endif

namespace ms::MS_LEVEL {

#if defined(MS_LEVEL_AVX512) || defined(MS_LEVEL_AVX512_BF16)
#define MS_X512 1
constexpr int W = 16;
#elif defined(MS_LEVEL_AVX2)
#define MS_X256 1
constexpr int W = 8;
#else
#define MS_PORTABLE 1
constexpr int W = 4;
#endif
#if defined(MS_LEVEL_AVX512_BF16)
constexpr bool HAS_BF16 = true;  // dot products of bfloat16 pairs, and permutations of bytes (VBMI)
#else
constexpr bool HAS_BF16 = false;
#endif

typedef float F __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint8_t B __attribute__((vector_size(4 * W)));  // the same width, as bytes

template <class To, class From>
MS_INLINE To as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  __builtin_memcpy(&result, &value, sizeof(To));
  return result;
}

template <class V>
MS_INLINE V load(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}
template <class V>
MS_INLINE void store(void* to, V value) {
  __builtin_memcpy(to, &value, sizeof(V));
}

// Store past the caches, where the level can; `to` is aligned to the vector. finish_streaming() orders such stores before
// whatever follows and stands at the end of a chunk that made them.
template <class V>
MS_INLINE void store_streaming(void* to, V value) {
#if defined(MS_X512)
  _mm512_stream_si512(static_cast<__m512i*>(to), as<__m512i>(value));
#elif defined(MS_X256)
  _mm256_stream_si256(static_cast<__m256i*>(to), as<__m256i>(value));
#elif defined(__x86_64__)
  _mm_stream_si128(static_cast<__m128i*>(to), as<__m128i>(value));
#else
  store(to, value);
#endif
}
MS_INLINE void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

MS_INLINE F set1(float value) {  // not F{} + value: that turns -0 into 0, and costs an addition
#if defined(MS_X512)
  return (F)_mm512_set1_ps(value);
#elif defined(MS_X256)
  return (F)_mm256_set1_ps(value);
#else
  return F{value, value, value, value};
#endif
}
MS_INLINE I set1i(int32_t value) { return I{} + value; }
MS_INLINE U set1u(uint32_t value) { return U{} + value; }

MS_INLINE F to_float(I value) { return __builtin_convertvector(value, F); }
MS_INLINE I to_int(F value) { return __builtin_convertvector(value, I); }  // toward zero; in range only

MS_INLINE F select(I mask, F yes, F no) { return mask ? yes : no; }
MS_INLINE I select(I mask, I yes, I no) { return mask ? yes : no; }

MS_INLINE F abs(F value) { return as<F>(as<I>(value) & 0x7FFFFFFF); }

// a * b + c: one rounding where the level has FMA, two on the portable one.
MS_INLINE F fma(F a, F b, F c) {
#if defined(MS_X512)
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(MS_X256)
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// The larger one; for NaN the second operand, as x86 has it.
MS_INLINE F max(F a, F b) {
#if defined(MS_X512)
  return (F)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(MS_X256)
  return (F)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
MS_INLINE F min(F a, F b) {
#if defined(MS_X512)
  return (F)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(MS_X256)
  return (F)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
MS_INLINE I max(I a, I b) { return a > b ? a : b; }
MS_INLINE I min(I a, I b) { return a < b ? a : b; }

// Round half to even to whole numbers; -0, NaN and Inf pass through.
MS_INLINE F round_even(F value) {
#if defined(MS_X512)
  return (F)_mm512_roundscale_ps((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(MS_X256)
  return (F)_mm256_round_ps((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const I sign = as<I>(value) & INT32_MIN;
  const F magnitude = abs(value);
  const F big = set1(8388608.0f);
  F rounded = (magnitude + big) - big;
  return select(magnitude < big, as<F>(as<I>(rounded) | sign), value);
#endif
}

// Bytes to one int32 lane each, unsigned.
MS_INLINE I widen_u8(const uint8_t* from) {
#if defined(MS_X512)
  return (I)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(MS_X256)
  return (I)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
  I result;
  for (int i = 0; i < W; ++i) result[i] = from[i];
  return result;
#endif
}

// Sum over all lanes, by halves: the same order at every call.
MS_INLINE float sum(F value) {
  float lanes[W];
  store(lanes, value);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}
MS_INLINE float largest(F value) {
  float lanes[W];
  store(lanes, value);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}

}  // namespace ms::MS_LEVEL
