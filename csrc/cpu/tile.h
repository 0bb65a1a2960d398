// Decoding of tiles of the layout rows16: codes to bytes, floats or bfloat16 pairs, and scales to floats.
//
// A slice is the W rows of one vector out of the 16 that the layout interleaves; its byte offset inside every 64-byte
// line is `slice * 4 * W`. A chunk is 32 columns: octets o = 0..3 of 8 values, value k of an octet at parity k & 1 and
// byte k >> 1, so that one dword of a row holds 8 codes of 4 bits, or the 4 codes of one parity in 8 bits.
#pragma once

#include "linear.h"
#include "vec.h"

namespace ms::MS_LEVEL {

constexpr int kSlices = kLanes / W;

// First plane's dword `w` of a slice.
MS_INLINE U dword(const uint8_t* chunk, int w) { return load<U>(chunk + 64 * w); }

// The bits of plane `width` (first dword `base`) for octet o, parity f: one byte for each of the 4 values.
template <int WIDTH>
MS_INLINE U plane_bytes(const uint8_t* chunk, int base, int o, int f) {
  constexpr int fields = 8 / WIDTH;
  const int field = (2 * o + f) % fields;
  const U word = dword(chunk, base + (2 * o + f) / fields);
  if constexpr (WIDTH == 8) return word;
  constexpr uint32_t mask = 0x01010101u * ((1u << (WIDTH % 8)) - 1);
  return (word >> (WIDTH * field)) & mask;
}

// All bits of the codes of octet o, parity f: bytes in the order of the dword.
template <int BITS>
MS_INLINE U code_bytes(const uint8_t* chunk, int o, int f) {
  if constexpr (BITS == 8 || BITS == 4 || BITS == 2) {
    return plane_bytes<BITS>(chunk, 0, o, f);
  } else if constexpr (BITS == 7) {
    return plane_bytes<4>(chunk, 0, o, f) | plane_bytes<2>(chunk, 4, o, f) << 4 | plane_bytes<1>(chunk, 6, o, f) << 6;
  } else if constexpr (BITS == 6) {
    return plane_bytes<4>(chunk, 0, o, f) | plane_bytes<2>(chunk, 4, o, f) << 4;
  } else if constexpr (BITS == 5) {
    return plane_bytes<4>(chunk, 0, o, f) | plane_bytes<1>(chunk, 4, o, f) << 4;
  } else {
    static_assert(BITS == 3);
    return plane_bytes<2>(chunk, 0, o, f) | plane_bytes<1>(chunk, 2, o, f) << 2;
  }
}

// ------------------------------------------------------------------------------------------------ integers

// A table of bytes by code: 16 entries in each 128-bit lane, or 64.
template <int BITS>
struct ByteTable {
  B table[BITS <= 4 ? 1 : 4];

  MS_INLINE explicit ByteTable(const uint8_t* values) {
    if constexpr (BITS <= 4) {
      table[0] = repeat(values);
    } else {
#if defined(MS_LEVEL_AVX512_BF16)
      table[0] = load<B>(values);
#else
      for (int part = 0; part < 4; ++part) table[part] = repeat(values + 16 * part);
#endif
    }
  }

  static MS_INLINE B repeat(const uint8_t* values) {
    uint8_t bytes[4 * W];
    for (int i = 0; i < 4 * W; ++i) bytes[i] = values[i % 16];
    return load<B>(bytes);
  }

  static MS_INLINE B shuffle(B from, B codes) {
#if defined(MS_X512)
    return (B)_mm512_shuffle_epi8((__m512i)from, (__m512i)codes);
#elif defined(MS_X256)
    return (B)_mm256_shuffle_epi8((__m256i)from, (__m256i)codes);
#else
    return __builtin_shuffle(from, codes);
#endif
  }

  MS_INLINE U look_up(U codes) const {
    if constexpr (BITS <= 4) {
      return as<U>(shuffle(table[0], as<B>(codes)));
    } else {
#if defined(MS_LEVEL_AVX512_BF16)
      return (U)_mm512_permutexvar_epi8((__m512i)codes, (__m512i)table[0]);
#else
      const B low = as<B>(codes & set1u(0x0F0F0F0Fu));
      typedef int8_t S __attribute__((vector_size(4 * W)));
      const S bit4 = (S)(as<B>(codes << 3)) < 0;
      const S bit5 = (S)(as<B>(codes << 2)) < 0;
      const B first = bit4 ? shuffle(table[1], low) : shuffle(table[0], low);
      const B second = bit4 ? shuffle(table[3], low) : shuffle(table[2], low);
      return as<U>(bit5 ? second : first);
#endif
    }
  }
};

// acc + sum over the 4 bytes of each dword of w (unsigned) * a (signed).
template <int BITS>
MS_INLINE I dot4(I acc, U w, I a) {
#if defined(MS_X512)
  return (I)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)a);
#elif defined(MS_X256)
  if constexpr (BITS < 8) {
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)w, (__m256i)a);  // 2 * 127 * 128 fits
    return acc + (I)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  } else {
    const __m256i low = _mm256_set1_epi16(0xFF);
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256((__m256i)w, low),
                                           _mm256_srai_epi16(_mm256_slli_epi16((__m256i)a, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16((__m256i)w, 8), _mm256_srai_epi16((__m256i)a, 8));
    return acc + (I)even + (I)odd;
  }
#else
  for (int byte = 0; byte < 4; ++byte) {
    const I weight = as<I>((w >> (8 * byte)) & 0xFF);
    const I value = (a << (24 - 8 * byte)) >> 24;
    acc += weight * value;
  }
  return acc;
#endif
}

// The unsigned bytes of plane `plane` of the integers of octet o, parity f.
template <int BITS>
MS_INLINE U int_bytes(const uint8_t* chunk, int o, int f, const ByteTable<BITS == 8 ? 4 : BITS>& table, U flip) {
  const U codes = code_bytes<BITS>(chunk, o, f);
  if constexpr (BITS == 8)
    return codes ^ flip;
  else
    return table.look_up(codes);
}

// ------------------------------------------------------------------------------------------------ floats

// float16 bits, one in each lane, to float32; every value is exact.
MS_INLINE F half_to_float(U half) {
  const U sign = (half & 0x8000u) << 16;
  const U magnitude = half & 0x7FFFu;
  const F small = to_float(as<I>(magnitude)) * set1(5.9604644775390625e-08f);  // 2^-24
  U normal = (magnitude << 13) + (112u << 23);
  normal = as<U>(select(as<I>(magnitude) >= 0x7C00, as<I>((magnitude << 13) | 0x7F800000u), as<I>(normal)));
  const F value = select(as<I>(magnitude) < 0x0400, small, as<F>(normal));
  return as<F>(as<U>(value) | sign);
}

MS_INLINE F gather(const float* table, I index) {
#if defined(MS_X512)
  return (F)_mm512_i32gather_ps((__m512i)index, table, 4);
#elif defined(MS_X256)
  return (F)_mm256_i32gather_ps(table, (__m256i)index, 4);
#else
  F result;
  for (int i = 0; i < W; ++i) result[i] = table[index[i]];
  return result;
#endif
}

// A table of floats by code; up to 4 bits it stays in registers.
template <int BITS>
struct FloatTable {
  const float* memory;
#if defined(MS_X512)
  F part[BITS <= 4 ? 1 : BITS == 5 ? 2 : 4];
#elif defined(MS_X256)
  F part[2];
#endif

  MS_INLINE explicit FloatTable(const float* values) : memory(values) {
#if defined(MS_X512)
    if constexpr (BITS <= 6)
      for (size_t i = 0; i < sizeof(part) / sizeof(F); ++i) part[i] = load<F>(values + W * i);
#elif defined(MS_X256)
    for (int i = 0; i < 2; ++i) part[i] = load<F>(values + W * i);
#endif
  }

  // The upper bits of `codes` must be zero, but for up to 4 bits at W = 16, where the lowest 4 bits count.
  MS_INLINE F look_up(U codes) const {
#if defined(MS_X512)
    if constexpr (BITS <= 4) return (F)_mm512_permutexvar_ps((__m512i)codes, (__m512)part[0]);
    if constexpr (BITS == 5)
      return (F)_mm512_permutex2var_ps((__m512)part[0], (__m512i)codes, (__m512)part[1]);
    if constexpr (BITS == 6) {
      const __m512 low = _mm512_permutex2var_ps((__m512)part[0], (__m512i)codes, (__m512)part[1]);
      const __m512 high = _mm512_permutex2var_ps((__m512)part[2], (__m512i)codes, (__m512)part[3]);
      return (F)_mm512_mask_blend_ps(_mm512_test_epi32_mask((__m512i)codes, _mm512_set1_epi32(32)), low, high);
    }
#elif defined(MS_X256)
    if constexpr (BITS <= 4) {
      const __m256 low = _mm256_permutevar8x32_ps((__m256)part[0], (__m256i)codes);
      const __m256 high = _mm256_permutevar8x32_ps((__m256)part[1], (__m256i)codes);
      return (F)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32((__m256i)codes, 28)));
    }
#endif
    return gather(memory, as<I>(codes));
  }
};

// Code k (0..31) of a chunk in every lane of a slice; for up to 4 bits at W = 16 with other codes above it.
template <int BITS>
MS_INLINE U code_lane(const uint8_t* chunk, int k) {
  const int o = k >> 3, f = k & 1, b = (k & 7) >> 1;
  if constexpr (BITS == 4 && W == 16) {
    return dword(chunk, o) >> (4 * (k & 7));
  } else {
    U code = U{};
    int base = 0, shift = 0;
    auto plane = [&](int width) {
      const int fields = 8 / width;
      const int field = (2 * o + f) % fields;
      const U word = dword(chunk, base + (2 * o + f) / fields);
      code |= ((word >> (8 * b + width * field)) & ((1u << width) - 1)) << shift;
      base += width;
      shift += width;
    };
    if constexpr (BITS == 8) plane(8);
    if constexpr (BITS >= 4 && BITS < 8) plane(4);
    if constexpr (BITS == 2 || BITS == 3 || BITS == 6 || BITS == 7) plane(2);
    if constexpr (BITS == 3 || BITS == 5 || BITS == 7) plane(1);
    return code;
  }
}

// How codes become floats: a table; a signed or unsigned 8-bit integer; the fields of an 8-bit float.
template <ElementKind KIND, int BITS>
struct FloatDecoder {
  const Weight& weight;
  FloatTable<KIND == ElementKind::table ? BITS : 8> table;
  F step, subnormal_step;
  I special, rebias;
  int shift;
  int sign_shift;

  MS_INLINE explicit FloatDecoder(const Weight& w) : weight(w), table(w.values) {
    step = set1(w.values[1]);
    special = set1i(w.special_code);
    shift = 23 - w.mantissa_bits;
    rebias = set1i((127 - w.bias) << 23);
    subnormal_step = set1(w.values[1]);
    sign_shift = w.is_signed ? 0 : 1;
  }

  MS_INLINE F decode(const uint8_t* chunk, int k) const {
    if constexpr (KIND == ElementKind::table) {
      return table.look_up(code_lane<BITS>(chunk, k));
    } else if constexpr (KIND == ElementKind::integer) {
      const int o = k >> 3, f = k & 1, b = (k & 7) >> 1;
      const U word = dword(chunk, 2 * o + f) << (24 - 8 * b);
      const I whole = sign_shift ? as<I>(word >> 24) : as<I>(word) >> 24;
      return to_float(whole) * step;
    } else {
      const U code = code_lane<8>(chunk, k);
      const I magnitude = as<I>(code & 0x7Fu);
      const F small = to_float(magnitude) * subnormal_step;
      const F normal = as<F>((magnitude << shift) + rebias);
      F value = select(magnitude < (1 << (23 - shift)), small, normal);
      value = as<F>(as<U>(value) | (code & 0x80u) << 24);
      const I is_special = magnitude >= special;
      return any(is_special) ? select(is_special, gather(weight.values, as<I>(code)), value) : value;
    }
  }

  static MS_INLINE bool any(I mask) {
#if defined(MS_X512)
    return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(MS_X256)
    return _mm256_movemask_epi8((__m256i)mask) != 0;
#else
    for (int i = 0; i < W; ++i)
      if (mask[i]) return true;
    return false;
#endif
  }
};

// ------------------------------------------------------------------------------------------------ scales

MS_INLINE F wide_scale(const Weight& w, F scale) {
  const F largest = set1(3.40282346638528859811704183484516925e+38f);
  if (w.multiplier != 1.0f) scale = scale * set1(w.multiplier), scale = select(scale > largest, largest, scale);
  if (w.tensor_inv != 0.0f) scale = scale / set1(w.tensor_inv), scale = select(scale > largest, largest, scale);
  return scale;
}

// Factor of scale column `column` for a slice of group `group`.
MS_INLINE F scale_lane(const Weight& w, int64_t group, int64_t column, int slice) {
  const int64_t at = (group * w.scale_cols + column) * kLanes + slice * W;
  switch (w.scale_kind) {
    case ScaleKind::power_of_two: {
      const I code = widen_u8(static_cast<const uint8_t*>(w.scale) + at);
      F factor = as<F>(code << 23);
      factor = select(code == 0, set1(w.scale_values[0]), factor);
      return select(code == 255, set1(__builtin_nanf("")), factor);
    }
    case ScaleKind::table: return gather(w.scale_values, widen_u8(static_cast<const uint8_t*>(w.scale) + at));
    case ScaleKind::f16: {
      const uint16_t* from = static_cast<const uint16_t*>(w.scale) + at;
      U half;
      for (int i = 0; i < W; ++i) half[i] = from[i];
      return wide_scale(w, half_to_float(half));
    }
    case ScaleKind::bf16: {
      const uint16_t* from = static_cast<const uint16_t*>(w.scale) + at;
      U bits;
      for (int i = 0; i < W; ++i) bits[i] = static_cast<uint32_t>(from[i]) << 16;
      return wide_scale(w, as<F>(bits));
    }
    default: return wide_scale(w, load<F>(static_cast<const float*>(w.scale) + at));
  }
}

MS_INLINE F zero_lane(const Weight& w, int64_t group, int64_t column, int slice) {
  const int64_t at = (group * w.scale_cols + column) * kLanes + slice * W;
  if (w.zero_kind == ZeroKind::table) return gather(w.zero_values, widen_u8(static_cast<const uint8_t*>(w.zero) + at));
  const uint16_t* from = static_cast<const uint16_t*>(w.zero) + at;
  U half;
  for (int i = 0; i < W; ++i) half[i] = from[i];
  return half_to_float(half);
}

// The scale column of the first value of a (sub-)chunk that begins at value `k`.
MS_INLINE int64_t scale_column(const Weight& w, int64_t k) { return w.block == 0 ? 0 : k / w.block; }

// values[index] for indices below 32, the table being 32 floats of L1.
MS_INLINE F pick(const float* values, I index) {
#if defined(MS_X512)
  return (F)_mm512_permutex2var_ps(_mm512_loadu_ps(values), (__m512i)index, _mm512_loadu_ps(values + 16));
#else
  return gather(values, index & 31);
#endif
}

// table[index] for indices below 8; bits above the lowest three of the index must be zero.
MS_INLINE F pick8(const float* table, I index) {
#if defined(MS_X512)
  return (F)_mm512_permutexvar_ps((__m512i)index, _mm512_castps256_ps512(_mm256_loadu_ps(table)));
#elif defined(MS_X256)
  return (F)_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
#else
  return gather(table, index);
#endif
}

}  // namespace ms::MS_LEVEL
