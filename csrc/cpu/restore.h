// Whole vectors of codes to numbers, from the packed bits where the level can: what dequantize spends its time in.
//
// The same numbers as decode.h, which keeps ragged ends, zero points and blocks that are no whole vectors. Each line of
// 64 bytes has about 8 cycles before the stores past the caches hold it up, so nothing here branches or divides for a
// block: factors are spread to one for each vector beforehand, and the largest element of MX+ is blended in.
#pragma once

#include "decode.h"

namespace ms::MS_LEVEL {

// ------------------------------------------------------------------------------------------ two vectors of codes

// Bits above a code's own are left undefined; decoders look past them.
#if defined(MS_LEVEL_AVX512_BF16)
struct CodeReader {
  static constexpr bool kIsPacked = true;
  int64_t stride;  // bytes of 2 * W codes
  explicit CodeReader(int bits) : stride(4 * bits), bytes_(static_cast<__mmask32>((1ull << stride) - 1)) {
    alignas(64) uint8_t order[3][64], shift[3][64] = {};
    for (int k = 0; k < 32; ++k) {
      const uint8_t first = static_cast<uint8_t>(k * bits / 8), gap = static_cast<uint8_t>(k * bits % 8);
      for (int i = 0; i < 4; ++i) order[k / 16][k % 16 * 4 + i] = static_cast<uint8_t>(first + i);
      for (int i = 0; i < 2; ++i) order[2][2 * k + i] = static_cast<uint8_t>(first + i);
      shift[k / 16][k % 16 * 4] = shift[2][2 * k] = gap;
    }
    for (int i = 0; i < 3; ++i) order_[i] = load<__m512i>(order[i]), shift_[i] = load<__m512i>(shift[i]);
  }
  MS_INLINE __m512i bytes(const uint8_t* from) const {
    return _mm512_castsi256_si512(_mm256_maskz_loadu_epi8(bytes_, from));
  }
  template <int kHalf>
  MS_INLINE I codes(__m512i bytes) const {
    return (I)_mm512_srlv_epi32(_mm512_permutexvar_epi8(order_[kHalf], bytes), shift_[kHalf]);
  }
  MS_INLINE __m512i words(__m512i bytes) const {  // all 32, in 16 bits each
    return _mm512_srlv_epi16(_mm512_permutexvar_epi8(order_[2], bytes), shift_[2]);
  }

 private:
  __mmask32 bytes_;
  __m512i order_[3], shift_[3];
};
#else
struct CodeReader {  // of codes in one byte each
  static constexpr bool kIsPacked = false;
  int64_t stride = 2 * W;
  explicit CodeReader(int) {}
  MS_INLINE const uint8_t* bytes(const uint8_t* from) const { return from; }
  template <int kHalf>
  MS_INLINE I codes(const uint8_t* from) const {
    return widen_u8(from + kHalf * W);
  }
#if defined(MS_X512)
  MS_INLINE __m512i words(const uint8_t* from) const { return _mm512_cvtepu8_epi16(load<__m256i>(from)); }
#endif
};
#endif

// ------------------------------------------------------------------------------------------ two vectors of values

template <class Decoder>
struct PairOf {
  CodeReader reader;
  Decoder decode;
  PairOf(const Format& f, int bits) : reader(bits), decode(f) {}
  MS_INLINE void operator()(const uint8_t* from, F& a, F& b) const {
    const auto bytes = reader.bytes(from);
    a = decode(reader.template codes<0>(bytes));
    b = decode(reader.template codes<1>(bytes));
  }
};

#if defined(MS_X512)
// Floats of at most 32 magnitudes: a permutation of two vectors. Of fewer, the sign is part of the index.
struct Table32Decoder {
  F low, high;
  I sign_mask;
  int sign_shift;
  explicit Table32Decoder(const Format& f)
      : sign_mask(set1i(f.element.is_signed ? INT32_MIN : 0)), sign_shift(31 - f.element.magnitude_bits) {
    const SmallFloatDecoder decode(f);
    I code;
    for (int i = 0; i < W; ++i) code[i] = i;
    const I limit = set1i((1 << f.element.magnitude_bits) - 1);
    low = decode(code & limit), high = decode((code + W) & limit);  // repeated where there are fewer
  }
  static bool takes(const Format& f) { return f.element.magnitude_bits <= 5; }
  MS_INLINE F operator()(I code) const {
    const F value = (F)_mm512_permutex2var_ps((__m512)low, (__m512i)code, (__m512)high);
    return as<F>(as<I>(value) | ((code << sign_shift) & sign_mask));
  }
};

// Floats whose bits are those of a float16 of another bias once they are shifted; the hardware knows its subnormals.
struct PairOfHalves {
  CodeReader reader;
  __m512i magnitude_mask, max_code, special_base, sign_mask;
  __m128i gap, sign_gap;
  F rebias;
  PairOfHalves(const Format& f, int bits)
      : reader(bits),
        magnitude_mask(_mm512_set1_epi16(static_cast<int16_t>((1 << f.element.magnitude_bits) - 1))),
        max_code(_mm512_set1_epi16(static_cast<int16_t>(f.element.max_code))),
        special_base(_mm512_set1_epi16(static_cast<int16_t>(f.element.special_base))),
        sign_mask(_mm512_set1_epi16(f.element.is_signed ? INT16_MIN : 0)),
        gap(_mm_cvtsi32_si128(10 - f.element.mantissa_bits)),
        sign_gap(_mm_cvtsi32_si128(15 - f.element.magnitude_bits)),
        rebias(set1(power_of_two(15 - f.element.bias))) {}
  // The finite numbers must be finite as float16 too.
  static bool takes(const Format& f) {
    const Number& n = f.element;
    return n.magnitude_bits - n.mantissa_bits <= 5 && n.max_code >> n.mantissa_bits < 31 && n.bias <= 127;
  }
  MS_INLINE void operator()(const uint8_t* from, F& a, F& b) const {
    const __m512i code = reader.words(reader.bytes(from)), magnitude = _mm512_and_si512(code, magnitude_mask);
    const __mmask32 is_special = _mm512_cmpgt_epi16_mask(magnitude, max_code);
    __m512i half = _mm512_sll_epi16(magnitude, gap);
    if (__builtin_expect(is_special != 0, 0)) {  // Inf and NaN, with what decode.h has as their last bits
      const __m512i rest = _mm512_slli_epi16(_mm512_sub_epi16(magnitude, special_base), 3);
      half = _mm512_mask_mov_epi16(half, is_special, _mm512_or_si512(rest, _mm512_set1_epi16(0x7C00)));
    }
    half = _mm512_or_si512(half, _mm512_and_si512(_mm512_sll_epi16(code, sign_gap), sign_mask));
    a = (F)_mm512_cvtph_ps(_mm512_castsi512_si256(half)) * rebias;
    b = (F)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)) * rebias;
  }
};
#endif

// ------------------------------------------------------------------------------------------ what belongs to vectors

constexpr int64_t kVectors = 256;     // of one stretch
constexpr int64_t kCodesAhead = 2048;  // bytes: stores past the caches leave the hardware's own prefetching behind

// For each vector of a stretch the factor and, with MX+ and MX++, lane and value of the largest element.
struct VectorInfo {
  alignas(64) float factor[kVectors];
  alignas(64) float largest[kVectors];
  alignas(64) int32_t lane[kVectors];
};

// One number for each block to one for each of its vectors; the first vector is number `part` of its block.
template <class T, class Step>
inline void spread_blocks(const T* blocks, int64_t per_block, int64_t part, int64_t vectors, Step step, T* to) {
  const auto stepped = [step](T value, int64_t count) {  // -0 must stay -0
    return step == Step{} ? value : value + static_cast<T>(count) * step;
  };
  if (per_block == 1) {
    for (int64_t v = 0; v < vectors; ++v) to[v] = blocks[v];
  } else if (per_block == 2 && part == 0 && vectors % 2 == 0) {
    for (int64_t v = 0; v < vectors; v += 2) to[v] = blocks[v / 2], to[v + 1] = stepped(blocks[v / 2], 1);
  } else {
    for (int64_t v = 0; v < vectors; ++v) {
      to[v] = stepped(*blocks, part);
      if (++part == per_block) part = 0, ++blocks;
    }
  }
}

// The code at a place of packed codes.
MS_INLINE uint8_t packed_code(const uint8_t* codes, int64_t place, int bits) {
  const int64_t first = place * bits >> 3, last = (place * bits + bits - 1) >> 3;
  const uint32_t word = codes[first] | static_cast<uint32_t>(codes[last]) << (last > first ? 8 : 0);
  return static_cast<uint8_t>(word >> (place * bits & 7) & ((1u << bits) - 1));
}

// A row of whole blocks, each of whole vectors; `codes` are packed with `bits` bits each.
struct RestoreRow {
  const Format& f;
  const uint8_t* codes;
  int bits;
  int64_t blocks, size;
  const void* stored;
  int64_t offset;  // of the first block in `stored`
  float tensor_inv;
  const uint8_t* max_idx;
  const uint8_t* delta;

  static bool takes(const Format& f, int64_t blocks, int64_t size, int64_t valid) {
    return size % W == 0 && valid == blocks * size && f.zero_point == ZeroPoint::none;
  }

  // Of `count` vectors from a place on.
  inline void fill(int64_t first, int64_t count, VectorInfo& to) const {
    const int64_t per_block = size / W, block = first / per_block, part = first % per_block;
    const int64_t end = (first + count + per_block - 1) / per_block;
    float factor[kVectors + 1];
    factors_of(f, stored, offset + block, end - block, tensor_inv, factor);
    if (f.extension != Extension::none) fill_largest(block, end - block, per_block, part, count, factor, to);
    spread_blocks(factor, per_block, part, count, 0.0f, to.factor);
  }

  // Blocks of MX+ under the zero scale are zeros, whatever their codes.
  inline bool is_zero(int64_t block) const {
    return f.is_power_of_two && load_stored(stored, f.storage, offset + block) == 0;
  }

 private:
  inline void fill_largest(int64_t block, int64_t blocks, int64_t per_block, int64_t part, int64_t count,
                           float* factor, VectorInfo& to) const {
    float largest[kVectors + 1];
    int32_t lane[kVectors + 1], code[kVectors + 1];
    const int sign_bit = f.element.bits - 1, width = bits;
    const uint8_t* const packed = codes;
    const uint8_t* const idx = max_idx + block;
    for (int64_t b = 0; b < blocks; ++b) {  // an index past the block is no lane's
      const int64_t inside = idx[b] < size ? idx[b] : size - 1;
      code[b] = packed_code(packed, (block + b) * size + inside, width);
    }
    // Signs by their bits: a branch on them would be mispredicted every other time.
    const float fraction = power_of_two(-sign_bit), top = power_of_two(f.element.max_exponent);
    for (int64_t b = 0; b < blocks; ++b) {
      const int32_t magnitude = code[b] & ((1 << sign_bit) - 1), sign = code[b] >> sign_bit;
      const float value = (static_cast<float>(magnitude) * fraction + 1) * top;
      largest[b] = scalar_f32(scalar_bits(value) | static_cast<uint32_t>(sign) << 31) * factor[b];
      lane[b] = idx[b];
    }
    if (!f.is_power_of_two)
      for (int64_t b = 0; b < blocks; ++b)
        if (decode_stored(load_stored(stored, f.storage, offset + block + b), f.storage, f.scale_values) <= f.plain_limit)
          lane[b] = INT32_MAX;  // the plain encoding: no lane has it
    if (f.extension == Extension::plusplus)
      for (int64_t b = 0; b < blocks; ++b) factor[b] *= power_of_two(-delta[block + b]);
    spread_blocks(largest, per_block, part, count, 0.0f, to.largest);
    spread_blocks(lane, per_block, part, count, -W, to.lane);
  }
};

// ------------------------------------------------------------------------------------------ rows

template <class Pair, class Out, bool kPatched>
inline void restore_vectors(const Pair& pair, const uint8_t* codes, int64_t vectors, const VectorInfo& info,
                            typename Out::Type* to) {
  const I lanes = as<I>(lane_numbers());
  const auto finish = [&](F value, int64_t v) {
    value = value * set1(info.factor[v]);
    return kPatched ? select(lanes == set1i(info.lane[v]), set1(info.largest[v]), value) : value;
  };
  const int64_t stride = pair.reader.stride;
  F a, b;
  int64_t v = 0;
  for (; v + 2 <= vectors; v += 2, codes += stride) {
    __builtin_prefetch(codes + kCodesAhead);
    pair(codes, a, b);
    Out::put(to + v * W, finish(a, v));
    Out::put(to + v * W + W, finish(b, v + 1));
  }
  if (v < vectors) {
    uint8_t last[2 * W] = {};
    __builtin_memcpy(last, codes, static_cast<size_t>(stride / 2));
    pair(last, a, b);
    Out::put(to + v * W, finish(a, v));
  }
}

template <class Pair, class Out>
inline void restore_row_with(const RestoreRow& row, typename Out::Type* to) {
  const Pair pair(row.f, row.bits);
  const int64_t vectors = row.blocks * row.size / W;
  VectorInfo info;
  for (int64_t first = 0; first < vectors; first += kVectors) {
    const int64_t count = vectors - first < kVectors ? vectors - first : kVectors;
    row.fill(first, count, info);
    const uint8_t* codes = row.codes + first / 2 * pair.reader.stride;
    if (row.f.extension == Extension::none)
      restore_vectors<Pair, Out, false>(pair, codes, count, info, to + first * W);
    else
      restore_vectors<Pair, Out, true>(pair, codes, count, info, to + first * W);
  }
  if (row.f.extension == Extension::none) return;
  for (int64_t block = 0; block < row.blocks; ++block)
    if (row.is_zero(block))
      for (int64_t i = 0; i < row.size; i += W) Out::put(to + block * row.size + i, F{});
}

template <class Out>
inline void restore_row(const RestoreRow& row, typename Out::Type* to) {
  const Format& f = row.f;
  switch (f.decoding) {
    case Decoding::table16: return restore_row_with<PairOf<Table16Decoder>, Out>(row, to);
    case Decoding::integer: return restore_row_with<PairOf<IntegerDecoder>, Out>(row, to);
    case Decoding::small_float:
#if defined(MS_X512)
      if (Table32Decoder::takes(f)) return restore_row_with<PairOf<Table32Decoder>, Out>(row, to);
      if (PairOfHalves::takes(f)) return restore_row_with<PairOfHalves, Out>(row, to);
#endif
      return restore_row_with<PairOf<SmallFloatDecoder>, Out>(row, to);
    default: return restore_row_with<PairOf<TableDecoder>, Out>(row, to);
  }
}

}  // namespace ms::MS_LEVEL
