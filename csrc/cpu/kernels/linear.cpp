// linear: one row of activations (decode) or many (prefill) times a weight in the layout rows16.
//
// One row: codes are decoded in registers, once, while they stream from memory. Many rows: a panel of 32 outputs is
// decoded into the first-level cache and used for all rows. Three kinds of products:
//   integer  bytes times bytes, exact in int32 over a chunk, then scaled in float32;
//   bf16     6- and 8-bit floats become pairs of bfloat16 in few steps (avx512_bf16), each half a float32 for a
//            multiply-add. The bfloat16 dot product itself takes subnormals of 8-bit floats for zero and has half the
//            rate of multiply-adds on Sapphire Rapids, so that it serves only for the few tiles that hold subnormals:
//            there their mantissas are a second product, and a float32 activation is split into three terms;
//   f32      fused multiply-adds.
// The largest element of MX+ and MX++ is a correction: one product more for each block, no second pass.
#include "linear.h"

#include "exponential.h"
#include "kernels.h"
#include "tile.h"

namespace ms::MS_LEVEL {
namespace {

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

// ------------------------------------------------------------------------------------------------ integers, one row

template <int BITS, Extra EXTRA, int SUB, int PLANES>
void row_integer(const Weight& w, const Act& act, int64_t group, float* accumulator) {
  using Table = ByteTable<BITS == 8 ? 4 : BITS>;
  const Table table0(w.int_values[0]), table1(w.int_values[1]);
  const U flip = set1u(w.int_offset[0] ? 0x80808080u : 0u);
  const float unit = 1.0f / w.int_step;
  for (int slice = 0; slice < kSlices; ++slice) {
    const uint8_t* chunk = w.codes + group * w.chunks * 64 * BITS + slice * 4 * W;
    F total = F{};
    for (int64_t c = 0; c < w.chunks; ++c, chunk += 64 * BITS) {
      fetch<BITS>(chunk);
      const uint32_t* a = act.packed + c * 8;
MS_UNROLL(2)
      for (int part = 0; part < SUB; ++part) {
        const int64_t at = c * SUB + part;
        const int sum = act.sums[at];
        I dot = set1i(-w.int_offset[0] * sum), odd = I{};
        I high = set1i(PLANES == 2 ? -w.int_offset[1] * sum : 0);
MS_UNROLL(8)
        for (int d = part * 8 / SUB; d < (part + 1) * 8 / SUB; ++d) {
          const U codes = code_bytes<BITS>(chunk, d >> 1, d & 1);
          const I value = set1i(static_cast<int32_t>(a[d]));
          const U bytes = BITS == 8 ? codes ^ flip : table0.look_up(codes);
          if (d & 1)
            odd = dot4<BITS>(odd, bytes, value);
          else
            dot = dot4<BITS>(dot, bytes, value);
          if constexpr (PLANES == 2) high = dot4<BITS>(high, table1.look_up(codes), value);
        }
        dot += odd;
        if constexpr (PLANES == 2) dot += high << 4;
        const int64_t column = scale_column(w, c * kChunk + part * (kChunk / SUB));
        F sums = to_float(dot);
        if constexpr (EXTRA == Extra::zero_point)
          sums -= zero_lane(w, group, column, slice) * set1(static_cast<float>(sum));
        sums = add_extra<EXTRA, SUB>(w, sums, group, column, slice, act.plain + c * kChunk, part, unit);
        total = fma(sums * set1(act.scale[at] * w.int_step), scale_lane(w, group, column, slice), total);
      }
    }
    store(accumulator + slice * W, load<F>(accumulator + slice * W) + total);
  }
}

// ------------------------------------------------------------------------------------------------ floats, one row

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

template <ElementKind KIND, int BITS, Extra EXTRA, int SUB>
void row_f32(const Weight& w, const Act& act, int64_t group, float* accumulator) {
  const FloatDecoder<KIND, BITS> decoder(w);
  for (int slice = 0; slice < kSlices; ++slice) {
    const uint8_t* chunk = w.codes + group * w.chunks * 64 * BITS + slice * 4 * W;
    F total = F{};
    for (int64_t c = 0; c < w.chunks; ++c, chunk += 64 * BITS) {
      fetch<BITS>(chunk);
      const float* a = act.plain + c * kChunk;
      for (int part = 0; part < SUB; ++part) {
        const int64_t column = scale_column(w, c * kChunk + part * (kChunk / SUB));
        F zero = F{};
        if constexpr (EXTRA == Extra::zero_point) zero = zero_lane(w, group, column, slice);
        F dot = chunk_dot<KIND, BITS, EXTRA, SUB>(decoder, chunk, a, part, zero);
        dot = add_extra<EXTRA, SUB>(w, dot, group, column, slice, a, part, 1.0f);
        total = fma(dot, scale_lane(w, group, column, slice), total);
      }
    }
    store(accumulator + slice * W, load<F>(accumulator + slice * W) + total);
  }
}

// Byte b of every dword moved to its top, zeros below: as an int32 it is the signed byte times 2^24.
MS_INLINE I top_byte(U bytes, int b) {
#if defined(MS_X512)
  const __m128i lane = _mm_set_epi8(12 + b, -1, -1, -1, 8 + b, -1, -1, -1, 4 + b, -1, -1, -1, b, -1, -1, -1);
  return (I)_mm512_shuffle_epi8((__m512i)bytes, _mm512_broadcast_i32x4(lane));
#else
  return as<I>((bytes << (24 - 8 * b)) & 0xFF000000u);
#endif
}

// The same product for elements that are small integers: whole bytes are looked up, and become floats afterwards.
template <int BITS, Extra EXTRA, int SUB>
void row_bytes(const Weight& w, const Act& act, int64_t group, float* accumulator) {
  uint8_t integers[64];
  for (int i = 0; i < 64; ++i) integers[i] = static_cast<uint8_t>(w.int_values[0][i] - w.int_offset[0]);
  const ByteTable<BITS == 8 ? 4 : BITS> table(integers);
  const float step = w.int_step * 0x1p-24f;
  for (int slice = 0; slice < kSlices; ++slice) {
    const uint8_t* chunk = w.codes + group * w.chunks * 64 * BITS + slice * 4 * W;
    F total = F{};
    for (int64_t c = 0; c < w.chunks; ++c, chunk += 64 * BITS) {
      fetch<BITS>(chunk);
      const float* a = act.plain + c * kChunk;
MS_UNROLL(2)
      for (int part = 0; part < SUB; ++part) {
        const int64_t column = scale_column(w, c * kChunk + part * (kChunk / SUB));
        F dot[4] = {};
MS_UNROLL(8)
        for (int d = part * 8 / SUB; d < (part + 1) * 8 / SUB; ++d) {
          const U codes = code_bytes<BITS>(chunk, d >> 1, d & 1);
          const U bytes = BITS == 8 ? codes : table.look_up(codes);
MS_UNROLL(4)
          for (int b = 0; b < 4; ++b)
            dot[b] = fma(to_float(top_byte(bytes, b)), set1(a[8 * (d >> 1) + 2 * b + (d & 1)]), dot[b]);
        }
        F sums = ((dot[0] + dot[1]) + (dot[2] + dot[3])) * set1(step);
        sums = add_extra<EXTRA, SUB>(w, sums, group, column, slice, a, part, 1.0f);
        total = fma(sums, scale_lane(w, group, column, slice), total);
      }
    }
    store(accumulator + slice * W, load<F>(accumulator + slice * W) + total);
  }
}

// ------------------------------------------------------------------------------------------------ bf16, one row

#if defined(MS_LEVEL_AVX512_BF16)
// Pairs of bfloat16 of the values (j, j + 4) of octet o.
template <int BITS>
struct PairDecoder {
  __m512i table, shift, mask, low_byte;

  explicit PairDecoder(const Weight& w) {
    table = _mm512_loadu_si512(w.bf16_values);
    shift = _mm512_set1_epi16(static_cast<short>(1 + w.mantissa_bits));
    mask = _mm512_set1_epi16(static_cast<short>(0x8000 | 0x7F << (7 - w.mantissa_bits)));
    low_byte = _mm512_broadcast_i32x4(_mm_set_epi8(14, -1, 12, -1, 10, -1, 8, -1, 6, -1, 4, -1, 2, -1, 0, -1));
  }

  template <int O, int J>
  MS_INLINE __m512i pair(const uint8_t* chunk) const {
    if constexpr (BITS == 6) {
      const __m512i low = _mm512_srli_epi32((__m512i)dword(chunk, O), 4 * J);
      constexpr int place = 8 * (J >> 1) + 4 * (O & 1) + 2 * (J & 1);
      const __m512i word = (__m512i)dword(chunk, 4 + (O >> 1));
      __m512i high;
      if constexpr (place >= 4)
        high = _mm512_srli_epi32(word, place - 4);
      else
        high = _mm512_slli_epi32(word, 4 - place);
      // codes: bits 0-3 from low, the rest from high
      const __m512i codes = _mm512_ternarylogic_epi32(_mm512_set1_epi16(15), low, high, 0xCA);
      const __m512i magnitude = _mm512_permutexvar_epi16(codes, table);
      return _mm512_ternarylogic_epi32(_mm512_set1_epi16(static_cast<short>(0x8000)), _mm512_slli_epi16(codes, 10), magnitude, 0xCA);
    } else {
      const __m512i word = (__m512i)dword(chunk, 2 * O + (J & 1));
      const __m512i top = (J & 2) ? word : _mm512_shuffle_epi8(word, low_byte);
      return _mm512_and_si512(_mm512_srav_epi16(top, shift), mask);
    }
  }

  // sums += the same pair times two activations, as float32: a bfloat16 is the upper half of one.
  template <int O, int J>
  MS_INLINE void multiply_add(const uint8_t* chunk, const float* a, F* sums) const {
    __m512i high, low;
    if constexpr (BITS == 8) {
      const __m512i word = (__m512i)dword(chunk, 2 * O + (J & 1));
      const __m512i top = _mm512_srav_epi16((J & 2) ? word : _mm512_shuffle_epi8(word, low_byte), shift);
      const __m512i upper = _mm512_slli_epi32(mask, 16);
      high = _mm512_and_si512(top, upper);
      low = _mm512_and_si512(_mm512_slli_epi32(top, 16), upper);
    } else {
      const __m512i both = pair<O, J>(chunk);
      high = _mm512_and_si512(both, _mm512_set1_epi32(static_cast<int32_t>(0xFFFF0000u)));
      low = _mm512_slli_epi32(both, 16);
    }
    sums[J & 1] = fma((F)low, set1(a[8 * O + J]), sums[J & 1]);
    sums[2 + (J & 1)] = fma((F)high, set1(a[8 * O + J + 4]), sums[2 + (J & 1)]);
  }

  template <int O>
  MS_INLINE void multiply_add_octet(const uint8_t* chunk, const float* a, F* sums) const {
    multiply_add<O, 0>(chunk, a, sums);
    multiply_add<O, 1>(chunk, a, sums);
    multiply_add<O, 2>(chunk, a, sums);
    multiply_add<O, 3>(chunk, a, sums);
  }

  // Of an 8-bit float's pair only the subnormal values, as the whole numbers of their mantissas; all else is 0.
  template <int O, int J>
  MS_INLINE __m512i small_pair(const uint8_t* chunk, __m512i exponent_mask, __m512i mantissas) const {
    const __m512i word = (__m512i)dword(chunk, 2 * O + (J & 1));
    const __m512i code = _mm512_srli_epi16((J & 2) ? word : _mm512_slli_epi16(word, 8), 8);
    const __mmask32 is_small = _mm512_testn_epi16_mask(code, exponent_mask);
    const __m512i magnitude = _mm512_maskz_permutexvar_epi16(is_small, code, mantissas);
    return _mm512_ternarylogic_epi32(_mm512_set1_epi16(static_cast<short>(0x8000)), _mm512_slli_epi16(code, 8), magnitude, 0xCA);
  }
};

MS_INLINE __m512 dot_pairs(__m512 sum, __m512i weights, const uint32_t* activations) {
  return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(static_cast<int32_t>(*activations)));
}

template <int BITS, int PARTS, int O, int J>
MS_INLINE void add_pair(const PairDecoder<BITS>& decoder, const uint8_t* chunk, const uint32_t* a, int64_t stride,
                        __m512* sums) {
  const __m512i pair = decoder.template pair<O, J>(chunk);
MS_UNROLL(3)
  for (int part = 0; part < PARTS; ++part)
    sums[part == 0 ? (J & 1) : 1 + part] =
        dot_pairs(sums[part == 0 ? (J & 1) : 1 + part], pair, a + part * stride + 4 * O + J);
}

template <int BITS, int PARTS, int O>
MS_INLINE void add_octet(const PairDecoder<BITS>& decoder, const uint8_t* chunk, const uint32_t* a, int64_t stride,
                         __m512* sums) {
  add_pair<BITS, PARTS, O, 0>(decoder, chunk, a, stride, sums);
  add_pair<BITS, PARTS, O, 1>(decoder, chunk, a, stride, sums);
  add_pair<BITS, PARTS, O, 2>(decoder, chunk, a, stride, sums);
  add_pair<BITS, PARTS, O, 3>(decoder, chunk, a, stride, sums);
}

template <int PARTS, int O>
MS_INLINE void add_small_octet(const PairDecoder<8>& decoder, const uint8_t* chunk, const uint32_t* a, int64_t stride,
                               __m512i exponent_mask, __m512i mantissas, __m512* sums) {
  const __m512i pairs[4] = {decoder.small_pair<O, 0>(chunk, exponent_mask, mantissas),
                            decoder.small_pair<O, 1>(chunk, exponent_mask, mantissas),
                            decoder.small_pair<O, 2>(chunk, exponent_mask, mantissas),
                            decoder.small_pair<O, 3>(chunk, exponent_mask, mantissas)};
MS_UNROLL(4)
  for (int j = 0; j < 4; ++j)
MS_UNROLL(3)
    for (int part = 0; part < PARTS; ++part)
      sums[part] = dot_pairs(sums[part], pairs[j], a + part * stride + 4 * O + j);
}

// What the subnormal values of a tile add: bfloat16 products take them for zero.
template <int SUB, int PARTS>
__attribute__((noinline)) F small_dot(const Weight& w, const PairDecoder<8>& decoder, const uint8_t* chunk,
                                      const uint32_t* a, int64_t stride, int part) {
  uint16_t table[32] = {};
  for (int i = 1; i < (1 << w.mantissa_bits) && i < 32; ++i) {
    const float whole = static_cast<float>(i);
    uint32_t bits;
    __builtin_memcpy(&bits, &whole, 4);
    table[i] = static_cast<uint16_t>(bits >> 16);
  }
  const __m512i mantissas = _mm512_loadu_si512(table);
  const __m512i exponent_mask = _mm512_set1_epi16(static_cast<short>(0x7F >> w.mantissa_bits << w.mantissa_bits));
  __m512 sums[3] = {};
  if (SUB == 1 || part == 0) {
    add_small_octet<PARTS, 0>(decoder, chunk, a, stride, exponent_mask, mantissas, sums);
    add_small_octet<PARTS, 1>(decoder, chunk, a, stride, exponent_mask, mantissas, sums);
  }
  if (SUB == 1 || part == 1) {
    add_small_octet<PARTS, 2>(decoder, chunk, a, stride, exponent_mask, mantissas, sums);
    add_small_octet<PARTS, 3>(decoder, chunk, a, stride, exponent_mask, mantissas, sums);
  }
  F sum = (F)sums[0];
  for (int term = 1; term < PARTS; ++term) sum += (F)sums[term];
  return sum;
}

template <int BITS, Extra EXTRA, int SUB, int PARTS>
void row_bf16(const Weight& w, const Act& act, int64_t group, float* accumulator) {
  const PairDecoder<BITS> decoder(w);
  const FloatDecoder<ElementKind::float8, 8> exact(w);
  const uint8_t* chunk = w.codes + group * w.chunks * 64 * BITS;
  const uint8_t* flags = BITS == 8 ? w.flags + group * w.chunks : nullptr;
  const int64_t stride = act.chunks * 16;
  const float gain = BITS == 8 ? __builtin_ldexpf(1.0f, 127 - w.bias) : 1.0f;
  const F factor = set1(act.unit * gain), small_factor = set1(act.unit * w.values[1]);
  F total = F{};
  for (int64_t c = 0; c < w.chunks; ++c, chunk += 64 * BITS) {
    fetch<BITS>(chunk);
    const uint32_t* a = act.packed + c * 16;
MS_UNROLL(2)
    for (int part = 0; part < SUB; ++part) {
      const int64_t column = scale_column(w, c * kChunk + part * (kChunk / SUB));
      F dot;
      if (BITS == 8 && flags[c] & 2) {
        dot = chunk_dot<ElementKind::float8, 8, Extra::none, SUB>(exact, chunk, act.plain + c * kChunk, part, F{});
      } else if (BITS == 6 || !flags[c]) {
        F sums[4] = {};
        const float* scaled = act.scaled + c * kChunk;
        if (SUB == 1 || part == 0) {
          decoder.template multiply_add_octet<0>(chunk, scaled, sums);
          decoder.template multiply_add_octet<1>(chunk, scaled, sums);
        }
        if (SUB == 1 || part == 1) {
          decoder.template multiply_add_octet<2>(chunk, scaled, sums);
          decoder.template multiply_add_octet<3>(chunk, scaled, sums);
        }
        dot = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * factor;
      } else if constexpr (BITS == 8) {
        __m512 sums[4] = {};
        if (SUB == 1 || part == 0) {
          add_octet<BITS, PARTS, 0>(decoder, chunk, a, stride, sums);
          add_octet<BITS, PARTS, 1>(decoder, chunk, a, stride, sums);
        }
        if (SUB == 1 || part == 1) {
          add_octet<BITS, PARTS, 2>(decoder, chunk, a, stride, sums);
          add_octet<BITS, PARTS, 3>(decoder, chunk, a, stride, sums);
        }
        dot = (F)_mm512_add_ps(sums[0], sums[1]);
        if (PARTS > 1) dot += (F)(PARTS > 2 ? _mm512_add_ps(sums[2], sums[3]) : sums[2]);
        dot *= factor;
        dot = fma(small_dot<SUB, PARTS>(w, decoder, chunk, a, stride, part), small_factor, dot);
      }
      dot = add_extra<EXTRA, SUB>(w, dot, group, column, 0, act.plain + c * kChunk, part, 1.0f);
      if (act.sub) dot *= set1(act.scale[act.sub == 1 ? c : 2 * c + part]);
      total = fma(dot, scale_lane(w, group, column, 0), total);
    }
  }
  store(accumulator, load<F>(accumulator) + total);
}
#endif

// ------------------------------------------------------------------------------------------------ integers, many rows

constexpr int kVectors = 2;  // vectors of outputs that a micro-kernel holds
constexpr int kRowsInteger = W == 16 ? 6 : 2;
constexpr int kRowsF32 = W == 16 ? 14 : W == 8 ? 6 : 4;
constexpr int64_t kChunksInteger = 24;  // of a panel: 24 kB of bytes
constexpr int64_t kChunksF32 = 8;       // of a panel: 32 kB of floats

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

template <int BITS, Extra EXTRA, int SUB, int PLANES>
MS_INLINE void micro_integer(const Weight& w, const Act& act, const IntegerPanel& panel, int64_t c0, int64_t chunks,
                             int64_t row_block, int first_lane, int there, float* accumulator, int64_t stride) {
  constexpr int R = kRowsInteger;
  F total[R][kVectors];
MS_UNROLL(8)
  for (int r = 0; r < R; ++r)
MS_UNROLL(2)
    for (int v = 0; v < kVectors; ++v) total[r][v] = F{};
  const int64_t base = row_block * act.chunks + c0;
  const F step = set1(w.int_step);
  for (int64_t c = 0; c < chunks; ++c) {
    const uint32_t* a = act.packed + (base + c) * 8 * R;
MS_UNROLL(2)
    for (int part = 0; part < SUB; ++part) {
      const int64_t at = ((base + c) * SUB + part) * R;
      I dot[R][kVectors], high[PLANES == 2 ? R : 1][kVectors];
MS_UNROLL(8)
      for (int r = 0; r < R; ++r)
MS_UNROLL(2)
        for (int v = 0; v < kVectors; ++v) {
          dot[r][v] = set1i(-w.int_offset[0] * act.sums[at + r]);
          if constexpr (PLANES == 2) high[r][v] = set1i(-w.int_offset[1] * act.sums[at + r]);
        }
MS_UNROLL(8)
      for (int d = part * 8 / SUB; d < (part + 1) * 8 / SUB; ++d) {
        U bytes[kVectors], more[kVectors];
MS_UNROLL(2)
        for (int v = 0; v < kVectors; ++v) {
          bytes[v] = load<U>(panel.bytes + ((c * 8 + d) * kPanel + first_lane + v * W) * 4);
          if constexpr (PLANES == 2)
            more[v] = load<U>(panel.bytes + (((kChunksInteger + c) * 8 + d) * kPanel + first_lane + v * W) * 4);
        }
MS_UNROLL(8)
        for (int r = 0; r < R; ++r) {
          const I value = set1i(static_cast<int32_t>(a[d * R + r]));
MS_UNROLL(2)
          for (int v = 0; v < kVectors; ++v) {
            dot[r][v] = dot4<BITS>(dot[r][v], bytes[v], value);
            if constexpr (PLANES == 2) high[r][v] = dot4<BITS>(high[r][v], more[v], value);
          }
        }
      }
      F scale[kVectors];
MS_UNROLL(2)
      for (int v = 0; v < kVectors; ++v)
        scale[v] = load<F>(panel.scale + (c * SUB + part) * kPanel + first_lane + v * W);
MS_UNROLL(8)
      for (int r = 0; r < R; ++r) {
        const F factor = set1(act.scale[at + r]) * step;
MS_UNROLL(2)
        for (int v = 0; v < kVectors; ++v) {
          const int64_t lane = (c * SUB + part) * kPanel + first_lane + v * W;
          if constexpr (PLANES == 2) dot[r][v] += high[r][v] << 4;
          F sums = to_float(dot[r][v]);
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
  }
MS_UNROLL(8)
  for (int r = 0; r < R; ++r) {
    const int64_t row = row_block * R + r;
    if (row >= act.rows) break;
MS_UNROLL(2)
    for (int v = 0; v < kVectors; ++v) {
      if (v >= there) break;  // past the last group: there stands another row
      float* to = accumulator + row * stride + first_lane + v * W;
      store(to, load<F>(to) + total[r][v]);
    }
  }
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

// ------------------------------------------------------------------------------------------------ floats, many rows

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
  F total[ROWS][kVectors];
MS_UNROLL(16)
  for (int r = 0; r < ROWS; ++r)
MS_UNROLL(2)
    for (int v = 0; v < kVectors; ++v) total[r][v] = F{};
  const float* a = reinterpret_cast<const float*>(act.packed) + (row_block * act.chunks * kChunk + k0) * kRowsF32;
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
MS_UNROLL(16)
  for (int r = 0; r < ROWS; ++r) {
    const int64_t row = row_block * kRowsF32 + r;
    if (row >= act.rows) break;
MS_UNROLL(2)
    for (int v = 0; v < kVectors; ++v) {
      if (v >= there) break;  // past the last group: there stands another row
      float* to = accumulator + row * stride + v * W;
      store(to, load<F>(to) + total[r][v]);
    }
  }
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

// ------------------------------------------------------------------------------------------------ choice

using Row = LinearKernels::Row;
using Block = LinearKernels::Block;

template <int BITS, Extra EXTRA, int PLANES>
Row pick_row_integer(int32_t sub) {
  return sub == 2 ? row_integer<BITS, EXTRA, 2, PLANES> : row_integer<BITS, EXTRA, 1, PLANES>;
}
template <int BITS, Extra EXTRA, int PLANES>
Block pick_block_integer(int32_t sub) {
  return sub == 2 ? block_integer<BITS, EXTRA, 2, PLANES> : block_integer<BITS, EXTRA, 1, PLANES>;
}

// Calls make.template operator()<BITS, EXTRA, PLANES>() for the weight's values, or returns null.
template <class Make>
auto for_integer(const Weight& w, const Make& make) -> decltype(make.template operator()<4, Extra::none, 1>()) {
  if (w.int_planes == 0) return nullptr;
  if (w.int_planes == 2)
    return w.bits == 6 && w.extra == Extra::none ? make.template operator()<6, Extra::none, 2>() : nullptr;
  if (w.extra == Extra::none) {
    switch (w.bits) {
      case 2: return make.template operator()<2, Extra::none, 1>();
      case 3: return make.template operator()<3, Extra::none, 1>();
      case 4: return make.template operator()<4, Extra::none, 1>();
      case 5: return make.template operator()<5, Extra::none, 1>();
      case 6: return make.template operator()<6, Extra::none, 1>();
      case 8: return make.template operator()<8, Extra::none, 1>();
      default: return nullptr;
    }
  }
  if (w.extra == Extra::zero_point) {
    switch (w.bits) {
      case 2: return make.template operator()<2, Extra::zero_point, 1>();
      case 3: return make.template operator()<3, Extra::zero_point, 1>();
      case 4: return make.template operator()<4, Extra::zero_point, 1>();
      case 8: return make.template operator()<8, Extra::zero_point, 1>();
      default: return nullptr;
    }
  }
  if (w.extra == Extra::low) {
    switch (w.bits) {
      case 4: return make.template operator()<4, Extra::low, 1>();
      case 6: return make.template operator()<6, Extra::low, 1>();
      case 8: return make.template operator()<8, Extra::low, 1>();
      default: return nullptr;
    }
  }
  switch (w.bits) {
    case 4: return make.template operator()<4, Extra::largest, 1>();
    case 6: return make.template operator()<6, Extra::largest, 1>();
    default: return nullptr;
  }
}

// The same for floats: make.template operator()<KIND, BITS, EXTRA>().
template <Extra EXTRA, class Make>
auto for_float_extra(const Weight& w, const Make& make)
    -> decltype(make.template operator()<ElementKind::table, 4, EXTRA>()) {
  if (w.element == ElementKind::integer) return make.template operator()<ElementKind::integer, 8, EXTRA>();
  if (w.element == ElementKind::float8) {
    if constexpr (EXTRA != Extra::zero_point) return make.template operator()<ElementKind::float8, 8, EXTRA>();
    return nullptr;
  }
  switch (w.bits) {
    case 2: return make.template operator()<ElementKind::table, 2, EXTRA>();
    case 3: return make.template operator()<ElementKind::table, 3, EXTRA>();
    case 4: return make.template operator()<ElementKind::table, 4, EXTRA>();
    case 5: return make.template operator()<ElementKind::table, 5, EXTRA>();
    case 6: return make.template operator()<ElementKind::table, 6, EXTRA>();
    case 7: return make.template operator()<ElementKind::table, 7, EXTRA>();
    default: return make.template operator()<ElementKind::table, 8, EXTRA>();
  }
}

template <class Make>
auto for_float(const Weight& w, const Make& make) -> decltype(make.template operator()<ElementKind::table, 4, Extra::none>()) {
  switch (w.extra) {
    case Extra::none: return for_float_extra<Extra::none>(w, make);
    case Extra::low: return for_float_extra<Extra::low>(w, make);
    case Extra::largest: return for_float_extra<Extra::largest>(w, make);
    default: return for_float_extra<Extra::zero_point>(w, make);
  }
}

#if defined(MS_LEVEL_AVX512_BF16)
template <int BITS, Extra EXTRA>
Row pick_row_bf16(int32_t sub, int32_t parts) {
  if (sub == 2) return parts == 1 ? row_bf16<BITS, EXTRA, 2, 1> : row_bf16<BITS, EXTRA, 2, 3>;
  return parts == 1 ? row_bf16<BITS, EXTRA, 1, 1> : row_bf16<BITS, EXTRA, 1, 3>;
}
template <Extra EXTRA>
Row pick_row_bf16_bits(const Weight& w, int32_t sub, int32_t parts) {
  switch (w.bits) {
    case 6: return pick_row_bf16<6, EXTRA>(sub, 1);
    case 8: return pick_row_bf16<8, EXTRA>(sub, parts);
    default: return nullptr;
  }
}
#endif

Row choose_row_bf16([[maybe_unused]] const Weight& w, [[maybe_unused]] int32_t sub, [[maybe_unused]] int32_t parts) {
#if defined(MS_LEVEL_AVX512_BF16)
  if (!w.bf16_exact) return nullptr;
  if (w.int_planes == 1) return nullptr;  // row_bytes is faster
  if (w.extra == Extra::none) return pick_row_bf16_bits<Extra::none>(w, sub, parts);
  if (w.extra == Extra::low) return pick_row_bf16_bits<Extra::low>(w, sub, parts);
  if (w.extra == Extra::largest) return pick_row_bf16_bits<Extra::largest>(w, sub, parts);
#endif
  return nullptr;
}

template <Extra EXTRA>
Row pick_row_bytes(const Weight& w, int32_t sub) {
  if (w.element == ElementKind::integer && w.is_signed)
    return sub == 2 ? row_bytes<8, EXTRA, 2> : row_bytes<8, EXTRA, 1>;
  if (w.bits == 6) return sub == 2 ? row_bytes<6, EXTRA, 2> : row_bytes<6, EXTRA, 1>;
  return nullptr;
}

Row choose_row_bytes(const Weight& w, int32_t sub) {
  if (w.int_planes != 1) return nullptr;
  if (w.extra == Extra::none) return pick_row_bytes<Extra::none>(w, sub);
  if (w.extra == Extra::low) return pick_row_bytes<Extra::low>(w, sub);
  if (w.extra == Extra::largest) return pick_row_bytes<Extra::largest>(w, sub);
  return nullptr;
}

Row choose_row(const Weight& w, ActKind kind, int32_t sub, int32_t parts) {
  switch (kind) {
    case ActKind::integer:
      return for_integer(w, [&]<int BITS, Extra EXTRA, int PLANES>() -> Row {
        return pick_row_integer<BITS, EXTRA, PLANES>(sub);
      });
    case ActKind::bf16: return choose_row_bf16(w, sub, parts);
    default:
      if (const Row row = choose_row_bytes(w, sub)) return row;
      return for_float(w, [&]<ElementKind KIND, int BITS, Extra EXTRA>() -> Row {
        return sub == 2 ? row_f32<KIND, BITS, EXTRA, 2> : row_f32<KIND, BITS, EXTRA, 1>;
      });
  }
}

Block choose_block(const Weight& w, ActKind kind, int32_t sub) {
  if (kind == ActKind::integer)
    return for_integer(w, [&]<int BITS, Extra EXTRA, int PLANES>() -> Block {
      return pick_block_integer<BITS, EXTRA, PLANES>(sub);
    });
  if (kind == ActKind::bf16) return nullptr;
  return for_float(w, []<ElementKind KIND, int BITS, Extra EXTRA>() -> Block { return block_f32<KIND, BITS, EXTRA>; });
}

void silu_mul(const float* gate, const float* up, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += W) {
    const int64_t left = count - i < W ? count - i : W;
    F g = F{}, u = F{};
    __builtin_memcpy(&g, gate + i, 4 * left);
    __builtin_memcpy(&u, up + i, 4 * left);
    const F result = silu(g) * u;
    __builtin_memcpy(out + i, &result, 4 * left);
  }
}

}  // namespace

extern const LinearKernels linear_kernels;
const LinearKernels linear_kernels = {choose_row, choose_block, kRowsF32, kRowsInteger, silu_mul};

}  // namespace ms::MS_LEVEL
