// Enums that both sides know: members count from 0, and the bindings export their names (bindings/module.cpp).
// Their Python twins lie in kernels/cpu/enums.py.
#pragma once

#include <cstdint>

// An enum and the text of its members.
#define MS_ENUM(name, ...)                   \
  enum class name : int32_t { __VA_ARGS__ }; \
  inline constexpr const char* name##_members = #__VA_ARGS__

namespace ms {

MS_ENUM(Dtype, f32, bf16, f16);

// ------------------------------------------------------------------------------------------ formats

MS_ENUM(Rounding, nearest_even, nearest_away, toward_zero, stochastic);
// How a scale lies in memory.
MS_ENUM(Storage, code8, f16, bf16, f32);
// Which number of the block a rule looks at.
MS_ENUM(Statistic, amax, percentile, range, deviation);
// What the rule makes of it: a power of two by exponent and mantissa, or a quotient rounded to nearest or up; or the
// start of a search for the least squared error: among powers of two, or among quotients fitted to their codes.
MS_ENUM(Rule, exponent, nearest, up, search, fit);
MS_ENUM(Extension, none, plus, plusplus);
MS_ENUM(ZeroPoint, none, integer, number);
// How codes of an element become float32 in vectors.
MS_ENUM(Decoding, table, table16, small_float, integer);

// ------------------------------------------------------------------------------------------ linear

// How a stored scale becomes a factor.
MS_ENUM(ScaleKind, power_of_two, table, f16, bf16, f32);
// What a block has beside elements and scale.
MS_ENUM(Extra, none, low, largest, zero_point);
// How element codes become floats.
MS_ENUM(ElementKind, table, integer, float8);
MS_ENUM(ZeroKind, table, f16);
// How the activations of an input are used: as they are; rounded to a format whose values are small integers times a
// block's scale; rounded to any other format, and multiplied as float32.
MS_ENUM(ActRule, keep, integer, number);
MS_ENUM(Combine, concatenate, silu_mul);

// ------------------------------------------------------------------------------------------ other operations

MS_ENUM(FusedOperation, rms_norm, silu_mul, gather, hadamard);
MS_ENUM(Gate, silu, gelu_tanh);

#define MS_EXPORTED_ENUMS(X)                                                                                      \
  X(Dtype) X(Rounding) X(Storage) X(Statistic) X(Rule) X(Extension) X(ZeroPoint) X(Decoding) X(ScaleKind) X(Extra) \
  X(ElementKind) X(ZeroKind) X(ActRule) X(Combine) X(FusedOperation) X(Gate)

}  // namespace ms
