// From float32 to codes, one per byte: spans, blocks and rows. Kernels that quantize activations on the fly use this.
//
// The twin of kernels/reference/encode.py, bit for bit.
#pragma once

#include "sums.h"

namespace ms::MS_LEVEL {

// What irregular input was met: counted, so that the host can refuse it or leave it to the reference.
struct Notes {
  int64_t num_nan = 0;
  int64_t num_inf = 0;
  int64_t num_ambiguous = 0;  // blocks whose bits depend on the order in which torch looks at +0 and -0

  void add(const Notes& other) {
    num_nan += other.num_nan;
    num_inf += other.num_inf;
    num_ambiguous += other.num_ambiguous;
  }
};

// What is stored and known of one block beside its codes.
struct BlockInfo {
  uint32_t stored;
  float factor;  // multiplies decoded codes; NaN for a poisoned block
  int32_t max_idx;
  int32_t delta;
  uint32_t stored_zero;
  float zero;
};

// ------------------------------------------------------------------------------------------ statistics of a block

constexpr int64_t kPrefetchElements = 1024;  // 4 KiB ahead: the hardware alone gave 5 instead of 8 GB/s for a thread

// Bits of the largest magnitude; at least those of Inf where there is NaN or Inf.
template <bool kAhead = false>  // whether what follows in memory will be read next
MS_INLINE uint32_t amax_bits(const float* x, int64_t size) {
  I best = {};
  int64_t i = 0;
  for (; i + W <= size; i += W) {
    if constexpr (kAhead) __builtin_prefetch(x + i + kPrefetchElements);
    best = max(best, load<I>(x + i) & 0x7FFFFFFF);
  }
  int32_t result = largest_int(best);
  for (; i < size; ++i) {
    const int32_t bits = static_cast<int32_t>(scalar_bits(x[i]) & 0x7FFFFFFFu);
    result = bits > result ? bits : result;
  }
  return static_cast<uint32_t>(result);
}

// The number of this rank (1: the smallest) among the magnitudes, by bisection of the bit patterns.
inline float magnitude_of_rank(const float* x, int64_t size, int64_t rank) {
  uint32_t low = 0, high = kInfBits;  // count(<= high) >= rank
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    int64_t count = 0;
    for (int64_t i = 0; i < size; ++i) count += (scalar_bits(x[i]) & 0x7FFFFFFFu) <= middle;
    if (count >= rank)
      high = middle;
    else
      low = middle + 1;
  }
  return scalar_f32(low);
}

inline int64_t first_of_magnitude(const float* x, int64_t size, uint32_t bits) {
  int64_t i = 0;
  for (; i + 32 <= size; i += 32) {  // all at once: where it lies cannot be predicted
    uint32_t found = 0;
    for (int part = 0; part < 32; part += W)
      found |= lane_bits((load<I>(x + i + part) & 0x7FFFFFFF) == static_cast<int32_t>(bits)) << part;
    if (found) return i + __builtin_ctz(found);
  }
  for (; i < size && (scalar_bits(x[i]) & 0x7FFFFFFFu) != bits; ++i) {}
  return i < size ? i : 0;
}

// What the rule looks at, of a finite block.
inline float statistic_of(const Format& f, const float* x, int64_t size, uint32_t amax) {
  return f.statistic == Statistic::percentile ? magnitude_of_rank(x, size, f.percentile_rank) : scalar_f32(amax);
}

// The scale of a finite block; `given` (null: measured) stands for its amax.
MS_INLINE Scale scale_of_block(const Format& f, const float* x, int64_t size, uint32_t amax, const float* given,
                               float tensor_inv) {
  const bool is_given = given != nullptr && !f.has_tensor_scale && f.statistic == Statistic::amax;
  if (is_summing(f)) return scale_by_sums(f, x, size, is_given ? *given : scalar_f32(amax), tensor_inv);
  return scale_of(f, is_given ? *given : statistic_of(f, x, size, amax), tensor_inv);
}

// ------------------------------------------------------------------------------------------ MX+ and MX++

inline int32_t exponent_difference(const Format& f, uint32_t others, uint32_t stored) {
  const int32_t code = static_cast<int32_t>(stored);
  const int32_t limit = code < f.delta_limit ? code : f.delta_limit;
  if (others == 0) return limit;
  int32_t mantissa;
  const int32_t wanted = floor_log2(others, mantissa) - f.element.max_exponent + 1;
  const int32_t delta = code - f.scale.bias - wanted;
  return delta < 0 ? 0 : delta > limit ? limit : delta;
}

// Sign and B fraction bits of |x| = 2^e_max * (1 + f / 2^B), saturating at both ends.
inline uint8_t encode_largest(const Format& f, float scaled, uint32_t noise) {
  const int bits = f.element.bits - 1;
  const float magnitude = scalar_f32(scalar_bits(scaled) & 0x7FFFFFFFu);
  const float fraction = (magnitude * power_of_two(-f.element.max_exponent) - 1) * static_cast<float>(1 << bits);
  const float whole = round_to_int(fraction, f.rounding, noise);
  const float top = static_cast<float>((1 << bits) - 1);
  const int32_t code = static_cast<int32_t>(whole > top ? top : whole > 0 ? whole : 0.0f);
  return static_cast<uint8_t>(code | static_cast<int32_t>((scalar_bits(scaled) >> 31) << bits));
}

template <class Span>
inline void encode_extended(const Span& span, const Format& f, const float* x, int64_t size, uint32_t amax, uint64_t place,
                            uint8_t* codes, BlockInfo& info) {
  const int64_t idx = first_of_magnitude(x, size, amax);
  float factor = info.factor;
  if (f.extension == Extension::plusplus) {
    const uint32_t before = amax_bits(x, idx), after = amax_bits(x + idx + 1, size - idx - 1);
    info.delta = exponent_difference(f, before > after ? before : after, info.stored);
    factor *= power_of_two(-info.delta);
  }
  const bool is_plain =
      f.is_power_of_two ? info.stored == 0 : decode_stored(info.stored, f.storage, f.scale_values) <= f.plain_limit;
  if (is_plain && f.is_power_of_two) {
    info.delta = 0;
    __builtin_memset(codes, 0, static_cast<size_t>(size));
    return;
  }
  const float inverse =
      f.has_exact_inverse ? f.scale_inverses[static_cast<int32_t>(info.stored) - info.delta] : 0.0f;
  span.run(f, x, size, {factor, inverse, 0, place}, codes);
  if (is_plain) return;
  const uint32_t noise =
      f.rounding == Rounding::stochastic ? random_bits(place + static_cast<uint64_t>(idx), f.noise_key) : 0;
  codes[idx] = encode_largest(f, info.factor > 0 ? x[idx] / info.factor : 0.0f, noise);
  info.max_idx = static_cast<int32_t>(idx);
}

// ------------------------------------------------------------------------------------------ blocks

template <class Span>
inline void encode_finite_block(const Span& span, const Format& f, const float* x, int64_t size, uint32_t amax,
                                float tensor_inv, const float* given, uint64_t place, uint8_t* codes, BlockInfo& info, Notes& notes) {
  info = {0, 0, 0, 0, 0, 0};
  if (f.zero_point != ZeroPoint::none) {
    Range range = range_of(x, size);
    notes.num_ambiguous += is_ambiguous(f, range);
    const Scale scale = scale_from_raw(f, range_raw(f, range), tensor_inv);
    const Zero zero = zero_of(f, range.low, scale.factor);
    info = {scale.stored, scale.factor, 0, 0, zero.stored, zero.value};
    span.run(f, x, size, {scale.factor, 0, zero.value, place}, codes);
    return;
  }
  const Scale scale = scale_of_block(f, x, size, amax, given, tensor_inv);
  info.stored = scale.stored, info.factor = scale.factor;
  if (f.extension != Extension::none) {
    encode_extended(span, f, x, size, amax, place, codes, info);
    return;
  }
  const float inverse = f.has_exact_inverse ? f.scale_inverses[scale.stored] : 0.0f;
  span.run(f, x, size, {scale.factor, inverse, 0, place}, codes);
}

// A block with NaN or Inf: by policy it is poisoned (all zeros under a NaN scale), or its Infs count as the largest.
template <class Span>
__attribute__((noinline)) inline void encode_irregular_block(const Span& span, const Format& f, const float* x,
                                                             int64_t size, float tensor_inv, const float* given, uint64_t place,
                                                             uint8_t* codes, BlockInfo& info, Notes& notes) {
  float* clean = static_cast<float*>(__builtin_malloc(static_cast<size_t>(size) * sizeof(float)));
  int64_t num_nan = 0, num_inf = 0;
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t bits = scalar_bits(x[i]) & 0x7FFFFFFFu;
    num_nan += bits > kInfBits;
    num_inf += bits == kInfBits;
    clean[i] = bits == kInfBits ? (x[i] > 0 ? kFloatMax : -kFloatMax) : x[i];
  }
  const bool is_poisoned = num_nan > 0 || !f.inf_saturates;
  if (is_poisoned) __builtin_memset(clean, 0, static_cast<size_t>(size) * sizeof(float));
  notes.num_nan += num_nan, notes.num_inf += num_inf;
  encode_finite_block(span, f, clean, size, amax_bits(clean, size), tensor_inv, given, place, codes, info, notes);
  if (is_poisoned) {
    info.stored = f.nan_scale;
    info.factor = scalar_f32(0x7FC00000u);
  }
  __builtin_free(clean);
}

// Encode one block of `size` numbers; `given` replaces the measured amax, `place` is that of the first element.
template <class Span>
inline void encode_block(const Span& span, const Format& f, const float* x, int64_t size, float tensor_inv,
                         const float* given, uint64_t place, uint8_t* codes, BlockInfo& info, Notes& notes) {
  const uint32_t amax = amax_bits(x, size);
  if (amax >= kInfBits)
    encode_irregular_block(span, f, x, size, tensor_inv, given, place, codes, info, notes);
  else
    encode_finite_block(span, f, x, size, amax, tensor_inv, given, place, codes, info, notes);
}

// ------------------------------------------------------------------------------------------ rows

// Where the results of consecutive blocks go; what is null is not wanted. Every array starts at the first block.
struct RowOutput {
  uint8_t* codes;        // one byte each, blocks * size
  void* stored;          // scales as stored
  float* factor;
  uint8_t* max_idx;      // MX+ and MX++
  uint8_t* delta;        // MX++
  void* stored_zero;     // uint8 or uint16
  float* zero;
};

inline void put_info(const Format& f, const BlockInfo& info, int64_t block, const RowOutput& out) {
  if (out.stored) store_stored(out.stored, f.storage, block, info.stored);
  if (out.factor) out.factor[block] = info.factor;
  if (out.max_idx) out.max_idx[block] = static_cast<uint8_t>(info.max_idx);
  if (out.delta) out.delta[block] = static_cast<uint8_t>(info.delta);
  if (out.zero) out.zero[block] = info.zero;
  if (out.stored_zero) {
    if (f.zero_is_half)
      static_cast<uint16_t*>(out.stored_zero)[block] = static_cast<uint16_t>(info.stored_zero);
    else
      static_cast<uint8_t*>(out.stored_zero)[block] = static_cast<uint8_t>(info.stored_zero);
  }
}

// Fetch what lies some blocks further on; past the end of the numbers a prefetch does nothing.
MS_INLINE void prefetch_ahead(const float* from, int64_t width) {
  const char* ahead = reinterpret_cast<const char*>(from) + 4 * kPrefetchElements;
  for (int64_t line = 0; line < 4 * width; line += 64) __builtin_prefetch(ahead + line);
}

// The common case in one loop: a power-of-two scale by exponent and mantissa of amax, no extension.
template <class Encoder, int kSize>
inline void encode_row_by_exponent(const Format& f, const float* x, int64_t blocks, int64_t size, uint64_t place,
                                   const RowOutput& out, Notes& notes) {
  const VectorSpan<Encoder> span(f);
  const Encoder& encode = span.encode;
  const int64_t width = kSize ? kSize : size;
  for (int64_t block = 0; block < blocks; ++block) {
    const float* from = x + block * width;
    uint8_t* codes = out.codes + block * width;
    prefetch_ahead(from, width);
    I best = {};
    for (int64_t i = 0; i < width; i += W) best = max(best, load<I>(from + i) & 0x7FFFFFFF);
    const uint32_t amax = static_cast<uint32_t>(largest_int(best));
    if (__builtin_expect(amax >= kInfBits, 0)) {
      BlockInfo info;
      encode_irregular_block(span, f, from, width, 1.0f, nullptr, place + static_cast<uint64_t>(block * width), codes,
                             info, notes);
      put_info(f, info, block, out);
      continue;
    }
    const uint32_t code = exponent_code(f, amax);
    const F inverse = set1(f.scale_inverses[code]);
    for (int64_t i = 0; i < width; i += W) store_u8(codes + i, encode(load<F>(from + i) * inverse, U{}));
    if (out.stored) static_cast<uint8_t*>(out.stored)[block] = static_cast<uint8_t>(code);
    if (out.factor) out.factor[block] = f.scale_values[code];
  }
}

// Whether encode_row_by_exponent may run for blocks of this size.
inline bool is_by_exponent(const Format& f, int64_t size) {
  return f.rule == Rule::exponent && f.statistic == Statistic::amax && f.has_exact_inverse &&
         f.extension == Extension::none && is_nearest(f) && size % W == 0;
}

// The other common case: a scale of 8 bits that is a quotient rounded to nearest, under one for the tensor or not. The
// scales of many blocks are computed in vectors, then their elements: one block after the other would wait for three
// divisions each time.
template <class Encoder>
inline void encode_row_by_quotient(const Format& f, const float* x, int64_t blocks, int64_t size, float tensor_inv,
                                   uint64_t place, const RowOutput& out, Notes& notes) {
  constexpr int64_t kStretch = 128;
  static_assert(kStretch % W == 0);
  const VectorSpan<Encoder> span(f);
  const FloatEncoder encode_scale(f.scale);
  const F divisor = set1(f.divisor), tensor = set1(f.has_tensor_scale ? tensor_inv : 1.0f), limit = set1(kFloatMax);
  alignas(64) int32_t amax[kStretch] = {};
  uint8_t stored[kStretch];
  float factor[kStretch];
  for (int64_t first = 0; first < blocks; first += kStretch) {
    const int64_t count = blocks - first < kStretch ? blocks - first : kStretch;
    for (int64_t b = 0; b < count; ++b) {
      prefetch_ahead(x + (first + b) * size, size);
      amax[b] = static_cast<int32_t>(amax_bits(x + (first + b) * size, size));
    }
    for (int64_t b = 0; b < count; b += W) {
      const F scaled = min(load<F>(amax + b) / divisor * tensor, limit);
      store_u8(stored + b, encode_scale(scaled, U{}));
    }
    factors_of(f, stored, 0, count, tensor_inv, factor);
    for (int64_t b = 0; b < count; ++b) {
      const float* from = x + (first + b) * size;
      uint8_t* codes = out.codes + (first + b) * size;
      BlockInfo info = {stored[b], factor[b], 0, 0, 0, 0};
      const uint64_t at = place + static_cast<uint64_t>((first + b) * size);
      if (__builtin_expect(amax[b] >= static_cast<int32_t>(kInfBits), 0))
        encode_irregular_block(span, f, from, size, tensor_inv, nullptr, at, codes, info, notes);
      else if (__builtin_expect(!(factor[b] > 0), 0))
        span.run(f, from, size, {factor[b], 0, 0, at}, codes);
      else
        for (int64_t i = 0; i < size; i += W) store_u8(codes + i, span.encode(load<F>(from + i) / set1(factor[b]), U{}));
      put_info(f, info, first + b, out);
    }
  }
}

inline bool is_by_quotient(const Format& f, int64_t size) {
  return f.rule == Rule::nearest && f.statistic == Statistic::amax && f.storage == Storage::code8 &&
         !f.scale.is_integer && f.scale.can_anchor && f.scale.overflow_code == f.scale.max_code &&
         !f.has_exact_inverse && f.extension == Extension::none && f.zero_point == ZeroPoint::none && is_nearest(f) &&
         size % W == 0;
}

template <class Span>
inline void encode_row_with(const Span& span, const Format& f, const float* x, int64_t blocks, int64_t size,
                            float tensor_inv, const float* given, uint64_t place, const RowOutput& out, Notes& notes) {
  for (int64_t block = 0; block < blocks; ++block) {
    BlockInfo info;
    prefetch_ahead(x + block * size, size);
    encode_block(span, f, x + block * size, size, tensor_inv, given ? given + block : nullptr,
                 place + static_cast<uint64_t>(block * size), out.codes + block * size, info, notes);
    put_info(f, info, block, out);
  }
}

// Encode `blocks` consecutive blocks of `size` float32 numbers each (ragged ends already padded with zeros).
// `given` replaces the measured amax of each block (null: measured), `place` counts the first element for the random
// bits (row * padded cols + col), `tensor_inv` is the second level (1 where there is none).
inline void encode_row(const Format& f, const float* x, int64_t blocks, int64_t size, float tensor_inv,
                       const float* given, uint64_t place, const RowOutput& out, Notes& notes) {
  const bool is_integer = f.element.is_integer;
  if (given == nullptr && is_by_exponent(f, size)) {
    if (is_integer)
      size == 32 ? encode_row_by_exponent<IntegerEncoder, 32>(f, x, blocks, size, place, out, notes)
                 : encode_row_by_exponent<IntegerEncoder, 0>(f, x, blocks, size, place, out, notes);
    else
      size == 32 ? encode_row_by_exponent<FloatEncoder, 32>(f, x, blocks, size, place, out, notes)
                 : encode_row_by_exponent<FloatEncoder, 0>(f, x, blocks, size, place, out, notes);
    return;
  }
  if (given == nullptr && is_by_quotient(f, size)) {
    is_integer ? encode_row_by_quotient<IntegerEncoder>(f, x, blocks, size, tensor_inv, place, out, notes)
               : encode_row_by_quotient<FloatEncoder>(f, x, blocks, size, tensor_inv, place, out, notes);
    return;
  }
#define MS_ENCODE(Span) encode_row_with(Span(f), f, x, blocks, size, tensor_inv, given, place, out, notes)
  if (is_nearest(f))
    is_integer ? MS_ENCODE(VectorSpan<IntegerEncoder>) : MS_ENCODE(VectorSpan<FloatEncoder>);
  else if (is_integer)
    MS_ENCODE(VectorSpan<RoundingIntegerEncoder>);
  else if (f.element.is_plain)
    MS_ENCODE(VectorSpan<RoundingFloatEncoder>);
  else
    MS_ENCODE(ScalarSpan);
#undef MS_ENCODE
}

}  // namespace ms::MS_LEVEL
