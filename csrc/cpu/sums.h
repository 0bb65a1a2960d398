// The rules that sum over a block in float64: std, and mse over powers of two and over float scales.
//
// The twin of kernels/reference/scales.py (_std, _search_exponent, _least_squares): the same operations, each rounded
// once, and every sum in the order of ordered_sum. The sources are compiled without contraction to fused multiply-adds.
#pragma once

#include "spans.h"

namespace ms::MS_LEVEL {

constexpr int64_t kStackBlock = 256;  // up to this size a block needs no memory from the heap

// Room for what a rule computes of every element of a block.
class BlockRoom {
 public:
  double* terms;
  float* values;
  uint8_t* codes;

  explicit BlockRoom(int64_t size) : terms(own_terms_), values(own_values_), codes(own_codes_) {
    if (size <= kStackBlock) return;
    heap_ = __builtin_malloc(static_cast<size_t>(size) * (sizeof(double) + sizeof(float) + 1));
    terms = static_cast<double*>(heap_);
    values = reinterpret_cast<float*>(terms + size);
    codes = reinterpret_cast<uint8_t*>(values + size);
  }
  ~BlockRoom() { __builtin_free(heap_); }
  BlockRoom(const BlockRoom&) = delete;
  BlockRoom& operator=(const BlockRoom&) = delete;

 private:
  void* heap_ = nullptr;
  double own_terms_[kStackBlock];
  float own_values_[kStackBlock];
  uint8_t own_codes_[kStackBlock];
};

// Sum by halves, as if zeros filled the numbers up to a power of two; destroys them.
inline double ordered_sum(double* terms, int64_t size) {
  int64_t width = 1;
  while (width < size) width *= 2;
  for (int64_t half = width / 2; half > 0; half /= 2) {
    for (int64_t i = half; i < size; ++i) terms[i - half] += terms[i];
    size = size < half ? size : half;
  }
  return terms[0];
}

// ------------------------------------------------------------------------------------------ std

// The population standard deviation of a finite block.
inline double deviation_of(const float* x, int64_t size) {
  BlockRoom room(size);
  const double count = static_cast<double>(size);
  for (int64_t i = 0; i < size; ++i) room.terms[i] = static_cast<double>(x[i]);
  const double mean = ordered_sum(room.terms, size) / count;
  for (int64_t i = 0; i < size; ++i) {
    const double deviation = static_cast<double>(x[i]) - mean;
    room.terms[i] = deviation * deviation;
  }
  return __builtin_sqrt(ordered_sum(room.terms, size) / count);
}

// c * deviation / max, where the bits of c / max stand in the format.
inline double scaled_deviation(const Format& f, const float* x, int64_t size) {
  double factor;
  const uint64_t bits = static_cast<uint64_t>(f.deviation_factor[1]) << 32 | f.deviation_factor[0];
  __builtin_memcpy(&factor, &bits, sizeof factor);
  return deviation_of(x, size) * factor;
}

inline float deviation_raw(const Format& f, const float* x, int64_t size) {
  const float raw = static_cast<float>(scaled_deviation(f, x, size));
  return raw > kFloatMax ? kFloatMax : raw;
}

// ------------------------------------------------------------------------------------------ mse

template <class Encoder>
MS_INLINE int64_t nearest_codes(const Encoder& encode, const float* x, int64_t size, float factor, uint8_t* codes) {
  const F factors = set1(factor);
  int64_t i = 0;
  for (; i + W <= size; i += W) store_u8(codes + i, encode(load<F>(x + i) / factors, U{}));
  return i;
}

// What x / factor rounds to: to nearest even and saturating, whatever the format does otherwise; 0 / 0 counts as 0.
inline void nearest_values(const Format& f, const float* x, int64_t size, float factor, const BlockRoom& room) {
  int64_t i = 0;
  if (factor > 0 && f.element.is_integer) i = nearest_codes(IntegerEncoder(f), x, size, factor, room.codes);
  if (factor > 0 && !f.element.is_integer && f.element.can_anchor)
    i = nearest_codes(FloatEncoder(f), x, size, factor, room.codes);
  Number element = f.element;
  element.overflow_code = element.max_code;
  for (; i < size; ++i) {
    const float scaled = factor > 0 ? x[i] / factor : 0.0f;
    room.codes[i] = static_cast<uint8_t>(encode_number(scaled, element, Rounding::nearest_even, 0));
  }
  for (i = 0; i < size; ++i) room.values[i] = f.element_values[room.codes[i]];
}

inline double squared_error(const Format& f, const float* x, int64_t size, float factor, const BlockRoom& room) {
  nearest_values(f, x, size, factor, room);
  for (int64_t i = 0; i < size; ++i) {
    const float error = room.values[i] * factor - x[i];
    room.terms[i] = static_cast<double>(error) * static_cast<double>(error);
  }
  return ordered_sum(room.terms, size);
}

// Rule::search: the lowest exponent with the least error. Offsets beyond the ends of the scale repeat its last code.
inline Scale search_exponent(const Format& f, const float* x, int64_t size, float amax) {
  const uint32_t bits = scalar_bits(amax) & 0x7FFFFFFFu;
  int32_t mantissa;
  const int32_t start = (bits == 0 ? -(1 << 20) : floor_log2(bits, mantissa)) + f.exponent_base;
  const uint32_t last = code_of_exponent(f, start + f.search_high);
  uint32_t best = code_of_exponent(f, start + f.search_low);
  double best_error = __builtin_huge_val();
  const BlockRoom room(size);
  for (uint32_t code = best; code <= last; ++code) {
    const double error = squared_error(f, x, size, factor_of(f, code, 1.0f), room);
    best = error < best_error ? code : best;
    best_error = error < best_error ? error : best_error;
  }
  return {best, factor_of(f, best, 1.0f)};
}

// The least-squares scale of a block for the codes that it has under a start factor.
inline float fitted_raw(const Format& f, const float* x, int64_t size, float start, const BlockRoom& room) {
  nearest_values(f, x, size, start, room);
  for (int64_t i = 0; i < size; ++i) {
    const double value = static_cast<double>(room.values[i]);
    room.terms[i] = value * value;
  }
  const double energy = ordered_sum(room.terms, size);
  for (int64_t i = 0; i < size; ++i) room.terms[i] = static_cast<double>(room.values[i]) * static_cast<double>(x[i]);
  const float fitted = static_cast<float>(ordered_sum(room.terms, size) / (energy > 0 ? energy : 1.0));
  return fitted > kFloatMax ? kFloatMax : fitted > 0 ? fitted : 0.0f;
}

// Rule::fit: amax / max and shrunk starts, each refitted to its codes; the first with the least error.
inline Scale fit_scale(const Format& f, const float* x, int64_t size, float amax, float tensor_inv) {
  const float full = raw_scale(f, amax);
  const BlockRoom room(size);
  Scale best = scale_from_raw(f, full, tensor_inv);
  double best_error = squared_error(f, x, size, best.factor, room);
  for (int step = 0; step < kFitSteps; ++step) {
    const float raw = fitted_raw(f, x, size, full * f.fit_factors[step], room);
    const Scale candidate = scale_from_raw(f, raw, tensor_inv);
    if (candidate.stored == best.stored) continue;  // the same error is not less
    const double error = squared_error(f, x, size, candidate.factor, room);
    if (error < best_error) best = candidate;
    if (!(error >= best_error)) best_error = error;  // NaN stays, as torch.minimum has it
  }
  return best;
}

// ------------------------------------------------------------------------------------------ all of them

MS_INLINE bool is_summing(const Format& f) {
  return f.statistic == Statistic::deviation || f.rule == Rule::search || f.rule == Rule::fit;
}

// The scale of a finite block under a rule that sums; `amax` starts the searches.
__attribute__((noinline)) inline Scale scale_by_sums(const Format& f, const float* x, int64_t size, float amax,
                                                     float tensor_inv) {
  if (f.rule == Rule::search) return search_exponent(f, x, size, amax);
  if (f.rule == Rule::fit) return fit_scale(f, x, size, amax, tensor_inv);
  if (f.rule != Rule::exponent) return scale_from_raw(f, deviation_raw(f, x, size), tensor_inv);
  const double deviation = scaled_deviation(f, x, size);
  const uint32_t stored = deviation == 0 ? 0 : code_of_exponent(f, floor_log2(deviation));
  return {stored, factor_of(f, stored, tensor_inv)};
}

}  // namespace ms::MS_LEVEL
