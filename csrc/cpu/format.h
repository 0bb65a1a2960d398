// A block format as plain data: what kernels/cpu/descriptors.py fills from the Python record, field by field.
//
// Nothing about a number format is stated in C++; encoders and decoders read it from here. All fields are four bytes
// wide, so that the struct has no padding and its Python twin (ctypes) the same offsets; the bindings export the size.
#pragma once

#include <cstdint>

namespace ms {

enum class Rounding : int32_t { nearest_even = 0, nearest_away = 1, toward_zero = 2, stochastic = 3 };
// How a scale lies in memory.
enum class Storage : int32_t { code8 = 0, f16 = 1, bf16 = 2, f32 = 3 };
// Which number of the block a rule looks at.
enum class Statistic : int32_t { amax = 0, percentile = 1, range = 2, deviation = 3 };
// What the rule makes of it: a power of two by exponent and mantissa, or a quotient rounded to nearest or up; or the
// start of a search for the least squared error: among powers of two, or among quotients fitted to their codes.
enum class Rule : int32_t { exponent = 0, nearest = 1, up = 2, search = 3, fit = 4 };
enum class Extension : int32_t { none = 0, plus = 1, plusplus = 2 };
enum class ZeroPoint : int32_t { none = 0, integer = 1, number = 2 };
constexpr int kFitSteps = 16;
// How codes of an element become float32 in vectors.
enum class Decoding : int32_t { table = 0, table16 = 1, small_float = 2, integer = 3 };

// An element, a scale or a zero point: a float or an integer of at most 8 bits, or one of fp16, bf16, fp32.
struct Number {
  int32_t is_integer;
  int32_t bits;
  int32_t is_signed;
  int32_t has_subnormals;
  int32_t mantissa_bits;
  int32_t bias;
  int32_t magnitude_bits;  // exponent and mantissa: the place of the sign
  int32_t max_code;        // of the largest finite value; integers: the largest integer
  int32_t min_code;        // integers: the smallest integer that is written
  int32_t nan_code;        // what NaN is encoded to
  int32_t overflow_code;   // what magnitudes past the largest are encoded to
  int32_t special_base;    // the code of Inf, or the largest finite one where there is none: NaN codes follow it
  int32_t max_exponent;    // floor(log2 max_value)
  int32_t can_anchor;      // nearest even by adding 2^(e + 23 - M) is exact (vectors); integers: always
  int32_t is_plain;        // has subnormals, and normals that are normal float32 numbers
  float max_value;
  float min_normal;
  float steps_first;  // x * steps_first * steps_second counts units of the last place of subnormals
  float steps_second;
  float int_scale;  // integers: 2^fraction_bits
};

struct Format {
  Number element;
  Number scale;
  Number zero;
  Rounding rounding;
  uint32_t noise_key;
  int32_t inf_saturates;
  Storage storage;
  uint32_t nan_scale;  // stored bits of a NaN scale
  int32_t block_size;  // 0: the whole row
  Statistic statistic;
  int32_t percentile_rank;
  Rule rule;
  int32_t exponent_base;   // Rule::exponent: floor(log2 a) + base + (mantissa field of a > limit)
  int32_t mantissa_limit;
  uint32_t deviation_factor[2];  // the bits of the float64 that multiplies a deviation, low word first
  int32_t search_low;            // Rule::search: offsets to the exponent of Rule::exponent
  int32_t search_high;
  float fit_factors[kFitSteps];  // Rule::fit: what multiplies the quotient at each start
  int32_t is_power_of_two;     // the scale
  int32_t has_exact_inverse;   // every factor is a power of two whose inverse is a float32
  float divisor;               // other rules: a / divisor
  float multiplier;            // of the decoded scale
  int32_t has_tensor_scale;
  int32_t tensor_by_raw;       // the second level follows from the largest raw scale, not from the tensor's amax
  float tensor_numerator;      // tensor_inv = numerator / largest
  float tensor_numerator_amax;  // the same for a given amax
  Extension extension;
  int32_t index_bits;
  int32_t delta_shift;   // place of MX++'s exponent difference above the index
  int32_t delta_limit;
  float plain_limit;     // MX+ over a float scale: blocks with a scale up to this one stay plain
  ZeroPoint zero_point;
  int32_t zero_is_half;  // stored as float16
  float zero_limit;      // the range is widened to include 0 where |low| > limit * step
  Decoding decoding;
  float element_values[256];
  float scale_values[256];
  float scale_inverses[256];  // 1 / value where has_exact_inverse
  float zero_values[256];
};

}  // namespace ms
