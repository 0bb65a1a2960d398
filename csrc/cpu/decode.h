// From codes, one per byte, to float32 numbers: the twin of kernels/reference/decode.py, bit for bit.
#pragma once

#include "encode.h"

namespace ms::MS_LEVEL {

// ------------------------------------------------------------------------------------------ vectors of values
// One code in each lane; what stands above its bits does not count.

// Floats of at most 8 bits whose exponents are those of normal float32 numbers.
struct SmallFloatDecoder {
  I magnitude_mask, sign_mask, first_normal, max_code, special_base, rebias;
  F smallest_normal;
  int gap, sign_shift;
  explicit SmallFloatDecoder(const Format& f)
      : magnitude_mask(set1i((1 << f.element.magnitude_bits) - 1)),
        sign_mask(set1i(f.element.is_signed ? INT32_MIN : 0)),
        first_normal(set1i(1 << f.element.mantissa_bits)),
        max_code(set1i(f.element.max_code)),
        special_base(set1i(f.element.special_base)),
        rebias(set1i((127 - f.element.bias) << 23)),
        smallest_normal(set1(f.element.min_normal)),
        gap(23 - f.element.mantissa_bits),
        sign_shift(31 - f.element.magnitude_bits) {}
  MS_INLINE F operator()(I code) const {
    const I magnitude = code & magnitude_mask;
    F value = as<F>((magnitude << gap) + rebias);
    value = select(magnitude < first_normal, value + value - smallest_normal, value);
    const I special = ((magnitude - special_base) << 16) | 0x7F800000;
    value = select(magnitude > max_code, as<F>(special), value);
    return as<F>(as<I>(value) | ((code << sign_shift) & sign_mask));
  }
};

struct IntegerDecoder {
  int gap;
  bool is_signed;
  F step;
  explicit IntegerDecoder(const Format& f)
      : gap(32 - f.element.bits), is_signed(f.element.is_signed), step(set1(1.0f / f.element.int_scale)) {}
  MS_INLINE F operator()(I code) const {
    const I top = code << gap;
    return to_float(is_signed ? top >> gap : as<I>(as<U>(top) >> static_cast<uint32_t>(gap))) * step;
  }
};

struct TableDecoder {
  const float* values;
  int mask;
  explicit TableDecoder(const Format& f) : values(f.element_values), mask((1 << f.element.bits) - 1) {}
  MS_INLINE F operator()(I code) const {
    F result;
    for (int i = 0; i < W; ++i) result[i] = values[code[i] & mask];
    return result;
  }
};

// At most 16 codes: a permutation where the level has one.
struct Table16Decoder {
#if defined(MS_X512)
  F values;  // repeated where there are fewer
  explicit Table16Decoder(const Format& f) {
    for (int i = 0; i < W; ++i) values[i] = f.element_values[i & ((1 << f.element.bits) - 1)];
  }
  MS_INLINE F operator()(I code) const {
    return (F)_mm512_permutexvar_ps((__m512i)code, (__m512)values);
  }
#elif defined(MS_X256)
  F low, high;
  explicit Table16Decoder(const Format& f) : low(load<F>(f.element_values)), high(load<F>(f.element_values + 8)) {}
  MS_INLINE F operator()(I code) const {
    const __m256i index = (__m256i)code;
    const __m256 a = _mm256_permutevar8x32_ps((__m256)low, index), b = _mm256_permutevar8x32_ps((__m256)high, index);
    return (F)_mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
#else
  const float* values;
  explicit Table16Decoder(const Format& f) : values(f.element_values) {}
  MS_INLINE F operator()(I code) const {
    F result;
    for (int i = 0; i < W; ++i) result[i] = values[code[i] & 15];
    return result;
  }
#endif
};

// ------------------------------------------------------------------------------------------ where values go

struct ToF32 {
  static constexpr bool kIsStream = false;
  using Type = float;
  static MS_INLINE void put(float* to, F value) { store(to, value); }
};
// Past the caches; `to` must be aligned to a whole vector.
struct ToF32Stream {
  static constexpr bool kIsStream = true;
  using Type = float;
  static MS_INLINE void put(float* to, F value) {
#if defined(MS_X512)
    _mm512_stream_ps(to, (__m512)value);
#elif defined(MS_X256)
    _mm256_stream_ps(to, (__m256)value);
#elif defined(__SSE2__)
    _mm_stream_ps(to, (__m128)value);
#else
    store(to, value);
#endif
  }
};
struct ToBF16 {
  static constexpr bool kIsStream = false;
  using Type = uint16_t;
  static MS_INLINE void put(uint16_t* to, F value) { store_bf16(to, value); }
};
struct ToF16 {
  static constexpr bool kIsStream = false;
  using Type = uint16_t;
  static MS_INLINE void put(uint16_t* to, F value) { store_f16(to, value); }
};

template <class Out>
MS_INLINE void put_one(typename Out::Type* to, float value) {
  if constexpr (sizeof(typename Out::Type) == 4) {
    *to = value;
  } else {
    uint16_t lanes[W];
    Out::put(lanes, set1(value));
    *to = lanes[0];
  }
}

// ------------------------------------------------------------------------------------------ blocks

// (decode(code) - zero) * factor for `count` codes.
template <class Decoder, class Out, bool kShifted>
MS_INLINE void decode_span_with(const Decoder& decode, const Format& f, const uint8_t* codes, int64_t count,
                                float factor, float zero, typename Out::Type* to) {
  const F factors = set1(factor), zeros = set1(zero);
  int64_t i = 0;
  for (; i + W <= count; i += W) {
    const F value = decode(widen_u8(codes + i));
    Out::put(to + i, (kShifted ? value - zeros : value) * factors);
  }
  for (; i < count; ++i) {
    const float value = f.element_values[codes[i]];
    put_one<Out>(to + i, (kShifted ? value - zero : value) * factor);
  }
}

// The largest element of MX+ and MX++: sign and B fraction bits under the element's top exponent.
MS_INLINE float decode_largest(const Format& f, uint8_t code) {
  const int bits = f.element.bits - 1;
  const float fraction = static_cast<float>(code & ((1 << bits) - 1)) * power_of_two(-bits);
  const float magnitude = (fraction + 1) * power_of_two(f.element.max_exponent);
  return code >> bits & 1 ? -magnitude : magnitude;
}

constexpr int kLargestExtended = 256;  // the largest block of MX+ and MX++

// The values of a block of MX+ or MX++; only the first `valid` codes are there.
template <class Decoder, class Out>
inline void decode_extended(const Decoder& decode, const Format& f, const uint8_t* codes, int64_t valid,
                            const BlockInfo& info, typename Out::Type* to) {
  if constexpr (Out::kIsStream) {  // patched in the cache first
    if (valid <= kLargestExtended && valid % W == 0) {
      float values[kLargestExtended];
      decode_extended<Decoder, ToF32>(decode, f, codes, valid, info, values);
      for (int64_t i = 0; i < valid; i += W) Out::put(to + i, load<F>(values + i));
      return;
    }
  }
  float factor = info.factor;
  if (f.is_power_of_two && info.stored == 0) {
    for (int64_t i = 0; i < valid; ++i) put_one<Out>(to + i, 0.0f);
    return;
  }
  if (f.extension == Extension::plusplus) factor *= power_of_two(-info.delta);
  decode_span_with<Decoder, Out, false>(decode, f, codes, valid, factor, 0, to);
  const bool is_plain =
      !f.is_power_of_two && decode_stored(info.stored, f.storage, f.scale_values) <= f.plain_limit;
  if (!is_plain && info.max_idx < valid)
    put_one<Out>(to + info.max_idx, decode_largest(f, codes[info.max_idx]) * info.factor);
}

template <class Decoder, class Out>
MS_INLINE void decode_block(const Decoder& decode, const Format& f, const uint8_t* codes, int64_t valid,
                            const BlockInfo& info, typename Out::Type* to) {
  if (f.extension != Extension::none)
    decode_extended<Decoder, Out>(decode, f, codes, valid, info, to);
  else if (f.zero_point != ZeroPoint::none)
    decode_span_with<Decoder, Out, true>(decode, f, codes, valid, info.factor, info.zero, to);
  else
    decode_span_with<Decoder, Out, false>(decode, f, codes, valid, info.factor, 0, to);
}

// Consecutive blocks of `size` codes of one row; `valid` numbers are wanted (the last block may be ragged).
// BlockInfo of block b is info(b).
template <class Decoder, class Out, class Info>
inline void decode_row_with(const Format& f, const uint8_t* codes, int64_t blocks, int64_t size, int64_t valid,
                            const Info& info, typename Out::Type* to) {
  const Decoder decode(f);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t left = valid - block * size;
    if (left <= 0) return;
    decode_block<Decoder, Out>(decode, f, codes + block * size, left < size ? left : size, info(block),
                               to + block * size);
  }
}

template <class Out, class Info>
inline void decode_row(const Format& f, const uint8_t* codes, int64_t blocks, int64_t size, int64_t valid,
                       const Info& info, typename Out::Type* to) {
#define MS_DECODE(Decoder) decode_row_with<Decoder, Out>(f, codes, blocks, size, valid, info, to)
  switch (f.decoding) {
    case Decoding::table16: return MS_DECODE(Table16Decoder);
    case Decoding::small_float: return MS_DECODE(SmallFloatDecoder);
    case Decoding::integer: return MS_DECODE(IntegerDecoder);
    default: return MS_DECODE(TableDecoder);
  }
#undef MS_DECODE
}

}  // namespace ms::MS_LEVEL
