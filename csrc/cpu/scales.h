// The scale of one block: from its statistic to what is stored and the factor that it stands for, and back.
//
// The twin of kernels/reference/scales.py; the rules that sum over a block stand in sums.h.
#pragma once

#include "numbers.h"

namespace ms::MS_LEVEL {

struct Scale {
  uint32_t stored;
  float factor;
};

inline float decode_stored(uint32_t stored, Storage storage, const float* values) {
  switch (storage) {
    case Storage::code8: return values[stored & 0xFF];
    case Storage::f16: return half_to_float(static_cast<uint16_t>(stored));
    case Storage::bf16: return scalar_f32(stored << 16);
    default: return scalar_f32(stored);
  }
}

// decode(scale) * multiplier / tensor_inv, at most the largest float32.
inline float factor_of(const Format& f, uint32_t stored, float tensor_inv) {
  float factor = decode_stored(stored, f.storage, f.scale_values);
  if (f.multiplier != 1.0f) {
    factor *= f.multiplier;
    factor = factor > kFloatMax ? kFloatMax : factor;
  }
  if (f.has_tensor_scale) {
    factor /= tensor_inv;
    factor = factor > kFloatMax ? kFloatMax : factor;
  }
  return factor;
}

inline uint32_t load_stored(const void* scales, Storage storage, int64_t index) {
  if (storage == Storage::code8) return static_cast<const uint8_t*>(scales)[index];
  if (storage == Storage::f32) return static_cast<const uint32_t*>(scales)[index];
  return static_cast<const uint16_t*>(scales)[index];
}
inline void store_stored(void* scales, Storage storage, int64_t index, uint32_t stored) {
  if (storage == Storage::code8)
    static_cast<uint8_t*>(scales)[index] = static_cast<uint8_t>(stored);
  else if (storage == Storage::f32)
    static_cast<uint32_t*>(scales)[index] = stored;
  else
    static_cast<uint16_t*>(scales)[index] = static_cast<uint16_t>(stored);
}

// factor_of for consecutive blocks.
inline void factors_of(const Format& f, const void* stored, int64_t first, int64_t count, float tensor_inv, float* to) {
  if (f.storage == Storage::code8) {
    const uint8_t* codes = static_cast<const uint8_t*>(stored) + first;
    for (int64_t i = 0; i < count; ++i) to[i] = f.scale_values[codes[i]];
  } else {
    for (int64_t i = 0; i < count; ++i)
      to[i] = decode_stored(load_stored(stored, f.storage, first + i), f.storage, f.scale_values);
  }
  if (f.multiplier != 1.0f)
    for (int64_t i = 0; i < count; ++i) to[i] *= f.multiplier, to[i] = to[i] > kFloatMax ? kFloatMax : to[i];
  if (f.has_tensor_scale)
    for (int64_t i = 0; i < count; ++i) to[i] /= tensor_inv, to[i] = to[i] > kFloatMax ? kFloatMax : to[i];
}

// The stored code of 2^exponent, saturating at both ends.
MS_INLINE uint32_t code_of_exponent(const Format& f, int32_t exponent) {
  const int32_t code = exponent + f.scale.bias;
  return static_cast<uint32_t>(code < 0 ? 0 : code > f.scale.max_code ? f.scale.max_code : code);
}

// Rule::exponent: the stored code of the power of two that belongs to a statistic.
MS_INLINE uint32_t exponent_code(const Format& f, uint32_t magnitude_bits) {
  if (magnitude_bits == 0) return 0;
  int32_t mantissa;
  const int32_t exponent = floor_log2(magnitude_bits, mantissa);
  return code_of_exponent(f, exponent + f.exponent_base + (mantissa > f.mantissa_limit));
}

inline float raw_scale(const Format& f, float statistic) { return statistic / f.divisor; }

inline Scale scale_from_raw(const Format& f, float raw, float tensor_inv) {
  float scaled = f.has_tensor_scale ? raw * tensor_inv : raw;
  scaled = scaled > kFloatMax ? kFloatMax : scaled;
  const bool is_up = f.rule == Rule::up;
  int32_t code = encode_float(scaled, f.scale, is_up ? Rounding::toward_zero : Rounding::nearest_even, 0);
  if (is_up && decode_stored(static_cast<uint32_t>(code), f.storage, f.scale_values) < scaled)
    code = code + 1 > f.scale.max_code ? f.scale.max_code : code + 1;
  const uint32_t stored = static_cast<uint32_t>(code);
  return {stored, factor_of(f, stored, tensor_inv)};
}

inline Scale scale_of(const Format& f, float statistic, float tensor_inv) {
  if (f.rule == Rule::exponent) {
    const uint32_t stored = exponent_code(f, scalar_bits(statistic) & 0x7FFFFFFFu);
    return {stored, factor_of(f, stored, tensor_inv)};
  }
  return scale_from_raw(f, raw_scale(f, statistic), tensor_inv);
}

// The second level: numerator / largest, in two rounded steps; 1 for a tensor of zeros.
inline float tensor_inverse(float largest, float numerator) {
  if (largest == 0) return 1.0f;
  const float ratio = (1.0f / largest) * numerator;
  return ratio > kFloatMax ? kFloatMax : ratio;
}

// ------------------------------------------------------------------------------------------ zero points

struct Range {
  float low, high;
  bool has_both_zeros;  // +0 and -0: which of them torch takes as the minimum depends on its order
};

inline Range range_of(const float* x, int64_t size) {
  float low = x[0], high = x[0];
  int32_t plus = 0, minus = 0;
  int64_t i = 0;
  if (size >= W) {
    F lows = load<F>(x), highs = lows;
    I pluses = {}, minuses = {};
    for (; i + W <= size; i += W) {
      const F value = load<F>(x + i);
      lows = min(value, lows), highs = max(value, highs);
      pluses |= as<I>(value) == 0;
      minuses |= as<I>(value) == INT32_MIN;
    }
    low = -largest(-lows), high = largest(highs);
    plus = largest_int(-pluses), minus = largest_int(-minuses);
  }
  for (; i < size; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
    plus |= scalar_bits(x[i]) == 0;
    minus |= scalar_bits(x[i]) == 0x80000000u;
  }
  if (low == 0) low = minus && !plus ? -0.0f : 0.0f;
  if (high == 0) high = minus && !plus ? -0.0f : 0.0f;
  return {low, high, plus && minus};
}

// Whether the sign of a zero minimum or maximum would show in the stored bits while it is not known.
inline bool is_ambiguous(const Format& f, const Range& range) {
  return range.has_both_zeros && range.low == 0 && (f.zero_point != ZeroPoint::integer || range.high == 0);
}

inline float range_step(float low, float high, const Format& f) {
  float width = high - low;
  width = width > kFloatMax ? kFloatMax : width;
  const float raw = width / f.divisor;
  return raw == 0 && low != 0 ? scalar_f32(scalar_bits(low) & 0x7FFFFFFFu) : raw;
}

// The raw scale of a block with a zero point; widens the range to include 0 where the format asks for it.
inline float range_raw(const Format& f, Range& range) {
  const float raw = range_step(range.low, range.high, f);
  const float magnitude = scalar_f32(scalar_bits(range.low) & 0x7FFFFFFFu);
  if (!(magnitude > f.zero_limit * raw)) return raw;
  range.low = range.low > 0 ? 0.0f : range.low;
  return range_step(range.low, range.high < 0 ? 0.0f : range.high, f);
}

struct Zero {
  uint32_t stored;
  float value;
};

inline float decode_zero(const Format& f, uint32_t stored) {
  if (f.zero_point == ZeroPoint::integer) return static_cast<float>(stored);
  return f.zero_is_half ? half_to_float(static_cast<uint16_t>(stored)) : f.zero_values[stored & 0xFF];
}

inline Zero zero_of(const Format& f, float low, float factor) {
  const float zero = round_even_one(factor > 0 ? -low / factor : 0.0f);
  uint32_t stored;
  if (f.zero_point == ZeroPoint::integer) {
    const float top = static_cast<float>(f.element.max_code);
    stored = static_cast<uint32_t>(zero > top ? top : zero > 0 ? zero : 0.0f);
  } else {
    stored = static_cast<uint32_t>(encode_float(zero, f.zero, Rounding::nearest_even, 0));
  }
  return {stored, decode_zero(f, stored)};
}

}  // namespace ms::MS_LEVEL
