// The fields of the records in format.h by name, so that Python's twins can be compared with them.
#pragma once

#include "format.h"

#define MS_NUMBER_FIELDS(X) \
  X(is_integer) X(bits) X(is_signed) X(has_subnormals) X(mantissa_bits) X(bias) X(magnitude_bits) X(max_code) \
  X(min_code) X(nan_code) X(overflow_code) X(special_base) X(max_exponent) X(can_anchor) X(is_plain) X(max_value) \
  X(min_normal) X(steps_first) X(steps_second) X(int_scale)

#define MS_PRODUCTS_FIELDS(X) \
  X(element) X(extra) X(scale) X(zero) X(special_code) X(low_values) X(largest_values) X(delta_values) \
  X(int_planes) X(int_offset) X(int_values) X(int_step) X(low_is_int) X(bf16_exact) X(bf16_values) X(act_integers) \
  X(act_largest) X(act_step)

#define MS_FORMAT_FIELDS(X) \
  X(element) X(scale) X(zero) X(rounding) X(noise_key) X(inf_saturates) X(storage) X(nan_scale) X(block_size) \
  X(statistic) X(percentile_rank) X(rule) X(exponent_base) X(mantissa_limit) X(deviation_factor) X(search_low) \
  X(search_high) X(fit_factors) X(is_power_of_two) X(has_exact_inverse) X(divisor) X(multiplier) \
  X(has_tensor_scale) X(tensor_by_raw) X(tensor_numerator) X(tensor_numerator_amax) X(extension) X(index_bits) \
  X(delta_shift) X(delta_limit) X(plain_limit) X(zero_point) X(zero_is_half) X(zero_limit) X(decoding) \
  X(element_values) X(scale_values) X(scale_inverses) X(zero_values) X(products)
