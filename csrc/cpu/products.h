// What all products of linear share: codes fetched ahead, a chunk times activations, and what the largest element of a
// block adds.
#pragma once

#include "tile.h"

namespace ms::MS_LEVEL {

// Bytes between the codes in use and those that are fetched, into the second-level cache and into the first.
constexpr int64_t kAhead = 4096, kNear = 1024;

template <int BITS>
MS_INLINE void fetch(const uint8_t* chunk) {
MS_UNROLL(8)
  for (int line = 0; line < BITS; ++line) {
    __builtin_prefetch(chunk + kAhead + 64 * line, 0, 2);
    __builtin_prefetch(chunk + kNear + 64 * line, 0, 3);
  }
}

// What the block's largest element adds to a sum of products, before the weight's scale. `plain` are the activations of
// the chunk; where they have two scales in it, a block of 32 has two sums and its largest element belongs to one.
template <Extra EXTRA, int SUB>
MS_INLINE F add_extra(const Weight& w, F sum, int64_t group, int64_t column, int slice, const float* plain, int part,
                      float unit) {
  if constexpr (EXTRA == Extra::low || EXTRA == Extra::largest) {
    const int64_t at = (group * w.scale_cols + column) * kLanes + slice * W;
    const I index = widen_u8(w.index + at);
    const bool is_split = SUB == 2 && w.block != kChunk / 2;
    const I place = (index & 31) + (SUB == 2 && !is_split ? part * (kChunk / 2) : 0);
    F activation = pick(plain, place);
    if (is_split) activation = select((place >> 4) == part, activation, F{});
    if constexpr (EXTRA == Extra::low) {
      sum = fma(pick8(w.low_values, index >> 5) * set1(unit), activation, sum);
    } else {
      const F largest = gather(w.largest_values, widen_u8(w.largest + at)) * set1(unit);
      sum = fma(largest, activation, sum * pick8(w.delta_values, index >> 5));
    }
  }
  return sum;
}

// A (sub-)chunk of a slice, decoded to floats, times activations.
template <ElementKind KIND, int BITS, Extra EXTRA, int SUB>
MS_INLINE F chunk_dot(const FloatDecoder<KIND, BITS>& decoder, const uint8_t* chunk, const float* a, int part, F zero) {
  F dot[4] = {};
MS_UNROLL(32)
  for (int k = part * kChunk / SUB; k < (part + 1) * kChunk / SUB; ++k) {
    F value = decoder.decode(chunk, k);
    if constexpr (EXTRA == Extra::zero_point) value -= zero;
    dot[k & 3] = fma(value, set1(a[k]), dot[k & 3]);
  }
  return (dot[0] + dot[1]) + (dot[2] + dot[3]);
}

}  // namespace ms::MS_LEVEL
