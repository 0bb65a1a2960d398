// linear, many rows: a panel of 32 outputs is decoded to floats in the first-level cache and multiplied with all rows.
#include "choice.h"
#include "panel.h"
#include "products.h"

namespace ms::MS_LEVEL {
namespace {

constexpr int64_t kChunksF32 = 8;  // of a panel: 32 kB of floats

// Decode `chunks` chunks of a group into panel[k][kPanel], each value as dequantize gives it.
template <ElementKind KIND, int BITS, Extra EXTRA>
void fill_f32(const Weight& w, int64_t group, int64_t c0, int64_t chunks, int half, float* panel) {
  const FloatDecoder<KIND, BITS> decoder(w);
  const int64_t span = w.block == 0 || w.block > kChunk ? kChunk : w.block;
  for (int slice = 0; slice < kSlices; ++slice) {
    const int lane = half * kLanes + slice * W;
    for (int64_t c = 0; c < chunks; ++c) {
      float* to = panel + c * kChunk * kPanel + lane;
      if (group >= w.groups) {
        for (int k = 0; k < kChunk; ++k) store(to + k * kPanel, F{});
        continue;
      }
      const uint8_t* chunk = w.codes + (group * w.chunks + c0 + c) * 64 * BITS + slice * 4 * W;
      fetch<BITS>(chunk);
      for (int64_t first = 0; first < kChunk; first += span) {
        const int64_t column = scale_column(w, (c0 + c) * kChunk + first);
        const F scale = scale_lane(w, group, column, slice);
        F others = scale, zero = F{};
        const int64_t at = (group * w.scale_cols + column) * kLanes + slice * W;
        I index = I{};
        if constexpr (EXTRA == Extra::low || EXTRA == Extra::largest) index = widen_u8(w.index + at);
        if constexpr (EXTRA == Extra::largest) others = scale * pick8(w.delta_values, index >> 5);
        if constexpr (EXTRA == Extra::zero_point) zero = zero_lane(w, group, column, slice);
        for (int64_t k = first; k < first + span; ++k) {
          F value = decoder.decode(chunk, static_cast<int>(k));
          if constexpr (EXTRA == Extra::zero_point) value -= zero;
          if constexpr (EXTRA == Extra::low) {
            const I is_largest = (index & 31) + static_cast<int>(first) == static_cast<int>(k);
            value += select(is_largest, pick8(w.low_values, index >> 5), F{});
          }
          value *= others;
          if constexpr (EXTRA == Extra::largest) {
            const I is_largest = (index & 31) + static_cast<int>(first) == static_cast<int>(k);
            value = select(is_largest, gather(w.largest_values, widen_u8(w.largest + at)) * scale, value);
          }
          store(to + k * kPanel, value);
        }
      }
    }
  }
}

template <int ROWS>
MS_INLINE void micro_f32(const Act& act, const float* panel, int64_t k0, int64_t count, int64_t row_block, int there,
                         float* accumulator, int64_t stride) {
  Sums<ROWS> total;
  clear<ROWS>(total);
  const float* a = act.interleaved + (row_block * act.chunks * kChunk + k0) * kRowsF32;
  for (int64_t k = 0; k < count; ++k, a += kRowsF32, panel += kPanel) {
    F weight[kVectors];
MS_UNROLL(2)
    for (int v = 0; v < kVectors; ++v) weight[v] = load<F>(panel + v * W);
MS_UNROLL(16)
    for (int r = 0; r < ROWS; ++r) {
      const F value = set1(a[r]);
MS_UNROLL(2)
      for (int v = 0; v < kVectors; ++v) total[r][v] = fma(value, weight[v], total[r][v]);
    }
  }
  add_sums<ROWS>(total, row_block * kRowsF32, act.rows, there, accumulator, stride);
}

// A block of rows that is not full, as a batch of a few rows, costs what its rows cost.
MS_INLINE void micro_f32_rows(const Act& act, const float* panel, int64_t k0, int64_t count, int64_t row_block,
                              int there, float* accumulator, int64_t stride) {
  const int64_t rows = act.rows - row_block * kRowsF32;
  if (kRowsF32 > 4 && rows <= 4)
    micro_f32<4>(act, panel, k0, count, row_block, there, accumulator, stride);
  else if (kRowsF32 > 8 && rows <= 8)
    micro_f32<8>(act, panel, k0, count, row_block, there, accumulator, stride);
  else
    micro_f32<kRowsF32>(act, panel, k0, count, row_block, there, accumulator, stride);
}

template <ElementKind KIND, int BITS, Extra EXTRA>
void block_f32(const Weight& w, const Act& act, int64_t group, int64_t count, float* accumulator, int64_t stride,
               float* scratch) {
  const int64_t row_blocks = (act.rows + kRowsF32 - 1) / kRowsF32;
  for (int64_t c0 = 0; c0 < w.chunks; c0 += kChunksF32) {
    const int64_t chunks = w.chunks - c0 < kChunksF32 ? w.chunks - c0 : kChunksF32;
    for (int64_t g = 0; g < count; g += 2) {
      const int groups = count - g < 2 ? 1 : 2;
      for (int half = 0; half < 2; ++half)
        fill_f32<KIND, BITS, EXTRA>(w, half < groups ? group + g + half : w.groups, c0, chunks, half, scratch);
      for (int lane = 0; lane < groups * kLanes; lane += kVectors * W)
        for (int64_t b = 0; b < row_blocks; ++b)
          micro_f32_rows(act, scratch + lane, c0 * kChunk, chunks * kChunk, b, (groups * kLanes - lane) / W,
                         accumulator + g * kLanes + lane, stride);
    }
  }
}

}  // namespace

Block choose_block_f32(const Weight& w) {
  return for_float(w, []<ElementKind KIND, int BITS, Extra EXTRA>() -> Block { return block_f32<KIND, BITS, EXTRA>; });
}


}  // namespace ms::MS_LEVEL
