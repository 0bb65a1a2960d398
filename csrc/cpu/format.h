// A block format as plain data: what kernels/cpu/descriptors.py fills from the Python record, field by field.
//
// Nothing about a number format is stated in C++; encoders and decoders read it from here. All fields are four bytes
// wide, so that the struct has no padding and its Python twin (ctypes) the same offsets; the bindings export the size.
#pragma once

#include <cstdint>

#include "enums.h"

namespace ms {

constexpr int kFitSteps = 16;

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

// How linear multiplies by elements of a format, as weights or as activations.
struct Products {
  ElementKind element;
  Extra extra;
  ScaleKind scale;
  ZeroKind zero;
  int32_t special_code;  // 8-bit floats: the first code (without sign) that is not finite
  float low_values[8];        // Extra::low: what the three bits above the index add
  float largest_values[256];  // Extra::largest: value of the largest element's code
  float delta_values[8];      // Extra::largest: factor of the others for every exponent difference
  // The values as small integers: value = (sum of planes) * step, plane 1 times 16. 0 planes: they are not.
  int32_t int_planes;
  int32_t int_offset[2];  // added to the integers so that they are unsigned bytes
  int32_t int_values[2][64];
  float int_step;
  int32_t low_is_int;   // Extra::low: integers with the low part added are still unsigned bytes
  int32_t bf16_exact;   // every value of a code is a normal bfloat16 or zero
  int32_t bf16_values[32];  // magnitudes by code without sign; 4-bit elements: all 16 codes, twice
  // The values as signed bytes for activations: value = integer * step; a step of 0: they are not.
  int32_t act_integers[256];
  int32_t act_largest[256];  // of every code of a largest element (MX+)
  float act_step;
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
  Products products;
};

}  // namespace ms
