// Single numbers: rounding, encoding and decoding by a Number record, and the random bits of stochastic rounding.
//
// The scalar twin of formats/codec.py, operation for operation: float32 arithmetic that is exact where Python's is.
#pragma once

#include "convert.h"
#include "format.h"

namespace ms::MS_LEVEL {

constexpr float kFloatMax = 0x1.fffffep+127f;
constexpr uint32_t kInfBits = 0x7F800000u;

inline uint32_t mix(uint32_t h) {
  h = (h ^ (h >> 16)) * 0x21F0AAADu;
  h = (h ^ (h >> 15)) * 0x735A2D97u;
  return h ^ (h >> 15);
}

// 24 random bits for the element at a place (row * padded cols + col).
inline uint32_t random_bits(uint64_t place, uint32_t key) {
  const uint32_t folded = static_cast<uint32_t>(place) ^ (static_cast<uint32_t>(place >> 32) * 0x85EBCA6Bu);
  return mix(mix(folded) ^ key) >> 8;
}

inline float truncate(float value) {
  const uint32_t bits = scalar_bits(value);
  if ((bits & 0x7FFFFFFFu) >= 0x4B000000u) return value;  // 2^23 and above, NaN, Inf
  const float whole = static_cast<float>(static_cast<int32_t>(value));
  return scalar_f32((scalar_bits(whole) & 0x7FFFFFFFu) | (bits & 0x80000000u));
}

inline float round_even_one(float value) {
  const uint32_t sign = scalar_bits(value) & 0x80000000u;
  const float magnitude = scalar_f32(scalar_bits(value) & 0x7FFFFFFFu);
  if (!(magnitude < 8388608.0f)) return value;
  const float rounded = (magnitude + 8388608.0f) - 8388608.0f;
  return scalar_f32(scalar_bits(rounded) | sign);
}

inline float round_to_int(float value, Rounding rounding, uint32_t noise) {
  if (rounding == Rounding::nearest_even) return round_even_one(value);
  const float whole = truncate(value);
  if (rounding == Rounding::toward_zero) return whole;
  const float rest = scalar_f32(scalar_bits(value - whole) & 0x7FFFFFFFu);
  const float step = scalar_bits(value) & 0x80000000u ? -1.0f : 1.0f;
  const bool away = rounding == Rounding::nearest_away ? rest >= 0.5f : rest > static_cast<float>(noise) * 0x1p-24f;
  return away ? whole + step : whole;
}

inline int32_t encode_integer(float value, const Number& n, Rounding rounding, uint32_t noise) {
  float whole = round_to_int(value * n.int_scale, rounding, noise);
  if (whole != whole) whole = 0;
  const float low = static_cast<float>(n.min_code), high = static_cast<float>(n.max_code);
  whole = whole < low ? low : whole > high ? high : whole;
  return static_cast<int32_t>(whole) & ((1 << n.bits) - 1);
}

// Round the bit pattern at the last mantissa bit; a carry moves into the exponent as it should.
inline int32_t round_normal(int32_t bits, const Number& n, Rounding rounding, uint32_t noise) {
  const int shift = 23 - n.mantissa_bits;
  const int32_t rebias = static_cast<int32_t>(static_cast<uint32_t>(127 - n.bias) << n.mantissa_bits);
  if (shift == 0) return bits - rebias;
  int32_t rounded = bits;
  if (rounding == Rounding::nearest_even) rounded += ((bits >> shift) & 1) + ((1 << (shift - 1)) - 1);
  if (rounding == Rounding::nearest_away) rounded += 1 << (shift - 1);
  if (rounding == Rounding::stochastic) {
    const int32_t dropped = bits & ((1 << shift) - 1);
    if (dropped > static_cast<int32_t>(noise >> (24 - shift))) rounded += 1 << shift;
  }
  return (rounded >> shift) - rebias;
}

inline int32_t encode_float(float value, const Number& n, Rounding rounding, uint32_t noise) {
  if (!n.is_signed && value < 0) value = 0;
  const uint32_t bits = scalar_bits(value);
  const uint32_t magnitude_bits = bits & 0x7FFFFFFFu;
  const float magnitude = scalar_f32(magnitude_bits);
  int32_t code;
  if (magnitude_bits > kInfBits) {
    code = n.nan_code;
  } else {
    if (n.has_subnormals && magnitude < n.min_normal) {
      float steps = magnitude * n.steps_first * n.steps_second;
      const float limit = static_cast<float>(2 << n.mantissa_bits);
      steps = steps > limit ? limit : steps;
      code = static_cast<int32_t>(round_to_int(steps, rounding, noise));
    } else {
      int32_t normal = static_cast<int32_t>(magnitude_bits);
      if (n.min_normal < 0x1p-126f && magnitude_bits < (1u << 23))
        normal = static_cast<int32_t>(scalar_bits(magnitude * 0x1p64f)) - (64 << 23);
      code = round_normal(normal, n, rounding, noise);
    }
    code = code < 0 ? 0 : code;
    code = code > n.max_code ? n.overflow_code : code;
  }
  if (n.is_signed && (bits >> 31)) code |= static_cast<int32_t>(1u << n.magnitude_bits);
  return code;
}

inline int32_t encode_number(float value, const Number& n, Rounding rounding, uint32_t noise) {
  return n.is_integer ? encode_integer(value, n, rounding, noise) : encode_float(value, n, rounding, noise);
}

// floor(log2 |x|) of the bits of a positive float32, subnormals included, with the mantissa field of the normal form.
inline int32_t floor_log2(uint32_t magnitude_bits, int32_t& mantissa) {
  if (magnitude_bits >= (1u << 23)) {
    mantissa = static_cast<int32_t>(magnitude_bits & 0x7FFFFFu);
    return static_cast<int32_t>(magnitude_bits >> 23) - 127;
  }
  const int top = 31 - __builtin_clz(magnitude_bits);  // not for 0
  mantissa = static_cast<int32_t>((magnitude_bits << (23 - top)) & 0x7FFFFFu);
  return top - 149;
}

// The same of a positive float64, without the mantissa.
inline int32_t floor_log2(double value) {
  uint64_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const int32_t field = static_cast<int32_t>(bits >> 52);
  return field ? field - 1023 : 63 - __builtin_clzll(bits) - 1074;
}

inline float power_of_two(int32_t exponent) {  // -149 to 127
  return exponent >= -126 ? scalar_f32(static_cast<uint32_t>(exponent + 127) << 23)
                          : scalar_f32(1u << (exponent + 149));
}

}  // namespace ms::MS_LEVEL
