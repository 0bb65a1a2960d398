// linear, one row, avx512_bf16: 6- and 8-bit floats become pairs of bfloat16 in few steps, each half a float32 for a
// multiply-add.
//
// The bfloat16 dot product itself takes subnormals of 8-bit floats for zero and has half the rate of multiply-adds on
// Sapphire Rapids, so that it serves only for the few tiles that hold subnormals: there their mantissas are a second
// product, and a float32 activation is split into three terms.
#include "choice.h"
#include "products.h"

namespace ms::MS_LEVEL {

#if defined(MS_LEVEL_AVX512_BF16)
namespace {

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

}  // namespace
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

}  // namespace ms::MS_LEVEL
