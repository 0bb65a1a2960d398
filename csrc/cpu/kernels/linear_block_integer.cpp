// linear, many rows: a panel of 32 outputs is decoded to bytes in the first-level cache and multiplied with the bytes of
// all rows, exact in int32 over a (sub-)chunk, then scaled in float32.
#include "choice.h"
#include "panel.h"
#include "products.h"

namespace ms::MS_LEVEL {
namespace {

constexpr int64_t kChunksInteger = 24;  // of a panel: 24 kB of bytes

// Decoded integers of one chunk of a group, and what scales them.
struct IntegerPanel {
  uint8_t* bytes;  // [plane][chunk][8][kPanel dwords]
  float* scale;    // [chunk * sub][kPanel]
  float* zero;     // [chunk * sub][kPanel]
  int32_t* index;  // [chunk * sub][kPanel]
  float* low;      // [chunk * sub][kPanel]
  float* delta;    // [chunk * sub][kPanel]
};

// Make the largest elements of W rows whole where they stand, as bytes of a panel.
MS_INLINE void add_low(uint8_t* bytes, int64_t c, int lane, const int32_t* places, I low) {
  for (int i = 0; i < W; ++i) {
    const int k = places[i];
    const int d = 2 * (k >> 3) + (k & 1);
    bytes[((c * 8 + d) * kPanel + lane + i) * 4 + ((k & 7) >> 1)] += static_cast<uint8_t>(low[i]);
  }
}

template <int BITS, Extra EXTRA, int SUB, int PLANES>
void fill_integer(const Weight& w, int64_t group, int64_t c0, int64_t chunks, int half, const IntegerPanel& panel) {
  using Table = ByteTable<BITS == 8 ? 4 : BITS>;
  const Table table0(w.int_values[0]), table1(w.int_values[1]);
  const U flip = set1u(w.int_offset[0] ? 0x80808080u : 0u);
  const bool is_there = group < w.groups;
  for (int slice = 0; slice < kSlices; ++slice) {
    const int lane = half * kLanes + slice * W;
    for (int64_t c = 0; c < chunks; ++c) {
      const uint8_t* chunk = w.codes + (group * w.chunks + c0 + c) * 64 * BITS + slice * 4 * W;
      if (is_there) fetch<BITS>(chunk);
MS_UNROLL(8)
      for (int d = 0; d < 8; ++d) {
        U codes = is_there ? code_bytes<BITS>(chunk, d >> 1, d & 1) : U{};
        store(panel.bytes + ((c * 8 + d) * kPanel + lane) * 4, BITS == 8 ? codes ^ flip : table0.look_up(codes));
        if constexpr (PLANES == 2)
          store(panel.bytes + (((kChunksInteger + c) * 8 + d) * kPanel + lane) * 4, table1.look_up(codes));
      }
      for (int part = 0; part < SUB; ++part) {
        const int64_t at = (c * SUB + part) * kPanel + lane;
        const int64_t column = scale_column(w, (c0 + c) * kChunk + part * (kChunk / SUB));
        store(panel.scale + at, is_there ? scale_lane(w, group, column, slice) : F{});
        if constexpr (EXTRA == Extra::zero_point) store(panel.zero + at, is_there ? zero_lane(w, group, column, slice) : F{});
        if constexpr (EXTRA == Extra::low || EXTRA == Extra::largest) {
          const int64_t source = (group * w.scale_cols + column) * kLanes + slice * W;
          const I index = is_there ? widen_u8(w.index + source) : I{};
          const bool is_split = SUB == 2 && w.block != kChunk / 2;  // as in add_extra
          const I place = (index & 31) + (is_split ? 0 : part * (kChunk / SUB));
          const I is_here = is_split ? I((place >> 4) == part) : I{} - 1;
          store(panel.index + at, place);
          const float unit = 1.0f / w.int_step;
          if constexpr (EXTRA == Extra::low) {
            const F low = select(is_here, pick8(w.low_values, index >> 5) * set1(unit), F{});
            store(panel.low + at, low);
            if (w.low_is_int && is_there) add_low(panel.bytes, c, lane, panel.index + at, to_int(low));
          } else {
            const F largest = is_there ? gather(w.largest_values, widen_u8(w.largest + source)) : F{};
            store(panel.low + at, select(is_here, largest * set1(unit), F{}));
            store(panel.delta + at, pick8(w.delta_values, index >> 5));
          }
        }
      }
    }
  }
}

// The products of a (sub-)chunk, exact in int32; with two planes `high` holds those of the upper one.
template <int PLANES>
struct Dots {
  I low[kRowsInteger][kVectors];
  I high[PLANES == 2 ? kRowsInteger : 1][kVectors];
};

// `bytes` and `packed` stand at the chunk and, of the panel, at the first lane; `sums` at the sums of the activations.
template <int BITS, int SUB, int PLANES>
MS_INLINE void multiply_chunk(const Weight& w, const uint8_t* bytes, const uint32_t* packed, const int32_t* sums,
                              int part, Dots<PLANES>& dots) {
  constexpr int R = kRowsInteger;
MS_UNROLL(8)
  for (int r = 0; r < R; ++r)
MS_UNROLL(2)
    for (int v = 0; v < kVectors; ++v) {
      dots.low[r][v] = set1i(-w.int_offset[0] * sums[r]);
      if constexpr (PLANES == 2) dots.high[r][v] = set1i(-w.int_offset[1] * sums[r]);
    }
MS_UNROLL(8)
  for (int d = part * 8 / SUB; d < (part + 1) * 8 / SUB; ++d) {
    U low[kVectors], high[kVectors];
MS_UNROLL(2)
    for (int v = 0; v < kVectors; ++v) {
      low[v] = load<U>(bytes + (d * kPanel + v * W) * 4);
      if constexpr (PLANES == 2) high[v] = load<U>(bytes + ((kChunksInteger * 8 + d) * kPanel + v * W) * 4);
    }
MS_UNROLL(8)
    for (int r = 0; r < R; ++r) {
      const I value = set1i(static_cast<int32_t>(packed[d * R + r]));
MS_UNROLL(2)
      for (int v = 0; v < kVectors; ++v) {
        dots.low[r][v] = dot4<BITS>(dots.low[r][v], low[v], value);
        if constexpr (PLANES == 2) dots.high[r][v] = dot4<BITS>(dots.high[r][v], high[v], value);
      }
    }
  }
}

// total += the products of chunk `c` as numbers: less the zero points, with the largest elements, times both scales.
template <Extra EXTRA, int SUB, int PLANES>
MS_INLINE void add_scaled(const Weight& w, const Act& act, const IntegerPanel& panel, int64_t c0, int64_t c, int part,
                          int64_t row_block, int first_lane, Dots<PLANES>& dots, Sums<kRowsInteger>& total) {
  constexpr int R = kRowsInteger;
  const int64_t at = ((row_block * act.chunks + c0 + c) * SUB + part) * R;
  const int64_t first = (c * SUB + part) * kPanel + first_lane;
  F scale[kVectors];
MS_UNROLL(2)
  for (int v = 0; v < kVectors; ++v) scale[v] = load<F>(panel.scale + first + v * W);
MS_UNROLL(8)
  for (int r = 0; r < R; ++r) {
    const F factor = set1(act.scale[at + r]) * set1(w.int_step);
MS_UNROLL(2)
    for (int v = 0; v < kVectors; ++v) {
      const int64_t lane = first + v * W;
      if constexpr (PLANES == 2) dots.low[r][v] += dots.high[r][v] << 4;
      F sums = to_float(dots.low[r][v]);
      if constexpr (EXTRA == Extra::zero_point)
        sums -= load<F>(panel.zero + lane) * set1(static_cast<float>(act.sums[at + r]));
      if constexpr (EXTRA == Extra::low || EXTRA == Extra::largest) {
        const int64_t row = row_block * R + r < act.rows ? row_block * R + r : act.rows - 1;
        const float* plain = act.plain + (row * act.chunks + c0 + c) * kChunk;
        if constexpr (EXTRA == Extra::largest) sums *= load<F>(panel.delta + lane);
        sums = fma(load<F>(panel.low + lane), pick(plain, load<I>(panel.index + lane)), sums);
      }
      total[r][v] = fma(sums * factor, scale[v], total[r][v]);
    }
  }
}

template <int BITS, Extra EXTRA, int SUB, int PLANES>
MS_INLINE void micro_integer(const Weight& w, const Act& act, const IntegerPanel& panel, int64_t c0, int64_t chunks,
                             int64_t row_block, int first_lane, int there, float* accumulator, int64_t stride) {
  Sums<kRowsInteger> total;
  clear<kRowsInteger>(total);
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t chunk = row_block * act.chunks + c0 + c;
MS_UNROLL(2)
    for (int part = 0; part < SUB; ++part) {
      Dots<PLANES> dots;
      multiply_chunk<BITS, SUB>(w, panel.bytes + (c * 8 * kPanel + first_lane) * 4,
                                act.packed + chunk * 8 * kRowsInteger,
                                act.sums + (chunk * SUB + part) * kRowsInteger, part, dots);
      add_scaled<EXTRA, SUB>(w, act, panel, c0, c, part, row_block, first_lane, dots, total);
    }
  }
  add_sums<kRowsInteger>(total, row_block * kRowsInteger, act.rows, there, accumulator + first_lane, stride);
}

template <int BITS, Extra EXTRA, int SUB, int PLANES>
void block_integer(const Weight& w, const Act& act, int64_t group, int64_t count, float* accumulator, int64_t stride,
                   float* scratch) {
  alignas(64) uint8_t bytes[PLANES * kChunksInteger * 8 * kPanel * 4];
  constexpr int64_t lines = kChunksInteger * SUB * kPanel;
  const IntegerPanel panel = {bytes, scratch, scratch + lines, reinterpret_cast<int32_t*>(scratch + 2 * lines),
                              scratch + 3 * lines, scratch + 4 * lines};
  const int64_t row_blocks = (act.rows + kRowsInteger - 1) / kRowsInteger;
  for (int64_t c0 = 0; c0 < w.chunks; c0 += kChunksInteger) {
    const int64_t chunks = w.chunks - c0 < kChunksInteger ? w.chunks - c0 : kChunksInteger;
    for (int64_t g = 0; g < count; g += 2) {
      const int groups = count - g < 2 ? 1 : 2;
      for (int half = 0; half < groups; ++half)
        fill_integer<BITS, EXTRA, SUB, PLANES>(w, group + g + half, c0, chunks, half, panel);
      for (int lane = 0; lane < groups * kLanes; lane += kVectors * W) {
        const int there = (groups * kLanes - lane) / W;
        if (there < kVectors) {  // one group of 16 at W = 16: the second vector is computed from zeros and dropped
          for (int half = groups; half < 2; ++half)
            fill_integer<BITS, EXTRA, SUB, PLANES>(w, w.groups, c0, chunks, half, panel);
        }
        for (int64_t b = 0; b < row_blocks; ++b) {
          float* to = accumulator + g * kLanes;
          if (EXTRA == Extra::low && w.low_is_int)
            micro_integer<BITS, Extra::none, SUB, PLANES>(w, act, panel, c0, chunks, b, lane, there, to, stride);
          else
            micro_integer<BITS, EXTRA, SUB, PLANES>(w, act, panel, c0, chunks, b, lane, there, to, stride);
        }
      }
    }
  }
}

}  // namespace

Block choose_block_integer(const Weight& w, int32_t sub) {
  return for_integer(w, [sub]<int BITS, Extra EXTRA, int PLANES>() -> Block {
    return sub == 2 ? block_integer<BITS, EXTRA, 2, PLANES> : block_integer<BITS, EXTRA, 1, PLANES>;
  });
}


}  // namespace ms::MS_LEVEL
