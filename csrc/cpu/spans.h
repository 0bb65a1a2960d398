// Spans of numbers under one factor to codes: the vectors of encoders, and the plain loop for what they leave.
#pragma once

#include "scales.h"

namespace ms::MS_LEVEL {

// ------------------------------------------------------------------------------------------ vectors of codes

struct IntegerEncoder {
  F scale, low, high;
  I mask;
  explicit IntegerEncoder(const Format& f) : IntegerEncoder(f.element) {}
  explicit IntegerEncoder(const Number& n)
      : scale(set1(n.int_scale)),
        low(set1(static_cast<float>(n.min_code))),
        high(set1(static_cast<float>(n.max_code))),
        mask(set1i((1 << n.bits) - 1)) {}
  MS_INLINE I operator()(F value, U) const { return to_int_nearest(min(max(value * scale, low), high)) & mask; }
};

// |x| + 2^(e + 23 - M) is rounded by the addition itself; the sum's last bits count steps of 2^(e - M).
struct FloatEncoder {
  F limit;
  I lowest_field, sign_bit;
  int mantissa_bits, gap, sign_shift;
  explicit FloatEncoder(const Format& f) : FloatEncoder(f.element) {}
  explicit FloatEncoder(const Number& n)
      : limit(set1(n.max_value)),
        lowest_field(set1i(128 - n.bias)),
        sign_bit(set1i(1 << n.magnitude_bits)),
        mantissa_bits(n.mantissa_bits),
        gap(23 - n.mantissa_bits),
        sign_shift(31 - n.magnitude_bits) {}
  MS_INLINE I operator()(F value, U) const {
    const F magnitude = min(abs(value), limit);
    const I field = max(as<I>(magnitude) >> 23, lowest_field);
    const I anchor = (field + gap) << 23;
    const I steps = as<I>(magnitude + as<F>(anchor)) - anchor;
    const I code = steps + ((field - lowest_field) << mantissa_bits);
    return code | (as<I>(as<U>(value) >> static_cast<uint32_t>(sign_shift)) & sign_bit);
  }
};

// ------------------------------------------------------------------------------------------ all roundings in vectors

MS_INLINE U mix(U h) {
  h = (h ^ (h >> 16)) * 0x21F0AAADu;
  h = (h ^ (h >> 15)) * 0x735A2D97u;
  return h ^ (h >> 15);
}

MS_INLINE U lane_numbers() {
  U lanes;
  for (int i = 0; i < W; ++i) lanes[i] = static_cast<uint32_t>(i);
  return lanes;
}

// random_bits of W consecutive places that share the high half.
MS_INLINE U random_vector(uint64_t place, uint32_t key) {
  const uint32_t fold = static_cast<uint32_t>(place >> 32) * 0x85EBCA6Bu;
  return mix(mix((lane_numbers() + static_cast<uint32_t>(place)) ^ fold) ^ key) >> 8;
}

// Whether |value - whole| rounds away from zero, for the modes that start from truncation.
MS_INLINE I rounds_away(F rest, Rounding rounding, U noise) {
  if (rounding == Rounding::nearest_away) return rest >= 0.5f;
  if (rounding == Rounding::stochastic) return rest > to_float(as<I>(noise)) * 0x1p-24f;
  return I{};
}

struct RoundingIntegerEncoder {
  Rounding rounding;
  F scale, low, high;
  I min_code, max_code, mask;
  explicit RoundingIntegerEncoder(const Format& f)
      : rounding(f.rounding),
        scale(set1(f.element.int_scale)),
        low(set1(static_cast<float>(f.element.min_code - 1))),
        high(set1(static_cast<float>(f.element.max_code + 1))),
        min_code(set1i(f.element.min_code)),
        max_code(set1i(f.element.max_code)),
        mask(set1i((1 << f.element.bits) - 1)) {}
  MS_INLINE I operator()(F value, U noise) const {
    const F scaled = min(max(value * scale, low), high);
    const I whole = to_int(scaled);
    const I away = rounds_away(abs(scaled - to_float(whole)), rounding, noise);
    const I code = whole + (away & ((as<I>(scaled) >> 31) | 1));
    return min(max(code, min_code), max_code) & mask;
  }
};

// The twin of encode_float for floats with subnormals whose normal numbers are normal float32 numbers.
struct RoundingFloatEncoder {
  Rounding rounding;
  int shift, sign_shift;
  F min_normal, first, second, steps_limit;
  I half, rebias, max_code, overflow_code, sign_bit, keep;
  explicit RoundingFloatEncoder(const Format& f)
      : rounding(f.rounding),
        shift(23 - f.element.mantissa_bits),
        sign_shift(31 - f.element.magnitude_bits),
        min_normal(set1(f.element.min_normal)),
        first(set1(f.element.steps_first)),
        second(set1(f.element.steps_second)),
        steps_limit(set1(static_cast<float>(2 << f.element.mantissa_bits))),
        half(set1i(1 << (shift - 1))),
        rebias(set1i(static_cast<int32_t>(static_cast<uint32_t>(127 - f.element.bias) << f.element.mantissa_bits))),
        max_code(set1i(f.element.max_code)),
        overflow_code(set1i(f.element.overflow_code)),
        sign_bit(set1i(f.element.is_signed ? 1 << f.element.magnitude_bits : 0)),
        keep(set1i(f.element.is_signed ? -1 : 0)) {}
  MS_INLINE I operator()(F value, U noise) const {
    // An unsigned element takes negative numbers as 0.
    const I bits = as<I>(value) & (keep | ~(as<I>(value) >> 31));
    const I magnitude_bits = bits & 0x7FFFFFFF;
    const F magnitude = as<F>(magnitude_bits);
    const F steps = min(magnitude * first * second, steps_limit);
    I normal = magnitude_bits, small;
    if (rounding == Rounding::nearest_even) {
      normal += ((magnitude_bits >> shift) & 1) + (half - 1);
      small = to_int_nearest(steps);
    } else {
      const I whole = to_int(steps);
      small = whole - rounds_away(steps - to_float(whole), rounding, noise);
      if (rounding == Rounding::nearest_away) normal += half;
      if (rounding == Rounding::stochastic) {
        const I dropped = magnitude_bits & (half + half - 1);
        normal += (dropped > as<I>(noise >> static_cast<uint32_t>(24 - shift))) & (half + half);
      }
    }
    I code = select(magnitude < min_normal, small, (normal >> shift) - rebias);
    code = max(code, I{});
    code = select(code > max_code, overflow_code, code);
    return code | (as<I>(as<U>(bits) >> static_cast<uint32_t>(sign_shift)) & sign_bit);
  }
};

// ------------------------------------------------------------------------------------------ spans

// How a span is scaled and rounded: x / factor (+ zero), and the place of its first element for the random bits.
struct SpanScale {
  float factor;
  float inverse;  // exact, or 0 where the factor must divide
  float zero;
  uint64_t place;
};

// Whether nearest-even and saturation are all that rounding needs, in vectors by the anchor or the conversion.
MS_INLINE bool is_nearest(const Format& f) { return f.rounding == Rounding::nearest_even && f.element.can_anchor; }

struct ScalarSpan {
  explicit ScalarSpan(const Format&) {}
  inline void run(const Format& f, const float* x, int64_t count, const SpanScale& s, uint8_t* codes) const {
    const bool is_shifted = f.zero_point != ZeroPoint::none, is_noisy = f.rounding == Rounding::stochastic;
    for (int64_t i = 0; i < count; ++i) {
      float value = s.factor > 0 ? x[i] / s.factor : 0.0f;
      if (is_shifted) value += s.zero;
      const uint32_t noise = is_noisy ? random_bits(s.place + static_cast<uint64_t>(i), f.noise_key) : 0;
      codes[i] = static_cast<uint8_t>(encode_number(value, f.element, f.rounding, noise));
    }
  }
};

template <class Encoder>
struct VectorSpan {
  Encoder encode;
  bool is_shifted, is_noisy;
  uint32_t key;
  explicit VectorSpan(const Format& f)
      : encode(f),
        is_shifted(f.zero_point != ZeroPoint::none),
        is_noisy(f.rounding == Rounding::stochastic),
        key(f.noise_key) {}

  MS_INLINE void run(const Format& f, const float* x, int64_t count, const SpanScale& s, uint8_t* codes) const {
    int64_t full = count / W * W;
    if (!(s.factor > 0)) full = 0;  // the plain loop knows what a block flushed to zero becomes
    if (is_noisy) {
      full = encode_noisy(x, full, s, codes);
    } else if (is_shifted) {
      const F factor = set1(s.factor), zero = set1(s.zero);
      for (int64_t i = 0; i < full; i += W) store_u8(codes + i, encode(load<F>(x + i) / factor + zero, U{}));
    } else if (s.inverse != 0) {
      const F inverse = set1(s.inverse);
      for (int64_t i = 0; i < full; i += W) store_u8(codes + i, encode(load<F>(x + i) * inverse, U{}));
    } else {
      const F factor = set1(s.factor);
      for (int64_t i = 0; i < full; i += W) store_u8(codes + i, encode(load<F>(x + i) / factor, U{}));
    }
    if (full < count)
      ScalarSpan(f).run(f, x + full, count - full, {s.factor, 0, s.zero, s.place + static_cast<uint64_t>(full)},
                        codes + full);
  }

 private:
  inline int64_t encode_noisy(const float* x, int64_t full, const SpanScale& s, uint8_t* codes) const {
    const F factor = set1(s.factor), zero = set1(s.zero);
    for (int64_t i = 0; i < full; i += W) {
      const uint64_t place = s.place + static_cast<uint64_t>(i);
      if (static_cast<uint32_t>(place) > 0xFFFFFFFFu - W) return i;  // the high half changes among these lanes
      const F scaled = load<F>(x + i) / factor;
      store_u8(codes + i, encode(is_shifted ? scaled + zero : scaled, random_vector(place, key)));
    }
    return full;
  }
};

}  // namespace ms::MS_LEVEL
