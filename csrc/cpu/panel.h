// Many rows: how many of them a micro-kernel multiplies at once, and how its sums are stored.
#pragma once

#include "linear.h"
#include "vec.h"

namespace ms::MS_LEVEL {

constexpr int kVectors = 2;  // vectors of outputs that a micro-kernel holds
constexpr int kRowsInteger = W == 16 ? 6 : 2;
constexpr int kRowsF32 = W == 16 ? 14 : W == 8 ? 6 : 4;

// Sums of ROWS rows of activations from `first` on times kVectors vectors of outputs.
template <int ROWS>
using Sums = F[ROWS][kVectors];

template <int ROWS>
MS_INLINE void clear(Sums<ROWS>& sums) {
MS_UNROLL(16)
  for (int r = 0; r < ROWS; ++r)
MS_UNROLL(2)
    for (int v = 0; v < kVectors; ++v) sums[r][v] = F{};
}

// accumulator[row][...] += sums, for the rows that are there and the first `there` vectors.
template <int ROWS>
MS_INLINE void add_sums(const Sums<ROWS>& sums, int64_t first, int64_t rows, int there, float* accumulator,
                        int64_t stride) {
MS_UNROLL(16)
  for (int r = 0; r < ROWS; ++r) {
    const int64_t row = first + r;
    if (row >= rows) break;
MS_UNROLL(2)
    for (int v = 0; v < kVectors; ++v) {
      if (v >= there) break;  // past the last group: there stands another row
      float* to = accumulator + row * stride + v * W;
      store(to, load<F>(to) + sums[r][v]);
    }
  }
}


}  // namespace ms::MS_LEVEL
