// Activations made ready for the linear kernels: floats in blocks of rows, bfloat16 terms, integers with their sums.
#include "codec.h"
#include "kernels.h"
#include "linear.h"
#include "tile.h"

namespace ms::MS_LEVEL {
namespace {

void to_f32(const void* from, Dtype dtype, int64_t count, float* to) {
  if (dtype == Dtype::f32) {
    __builtin_memcpy(to, from, 4 * count);
    return;
  }
  const uint16_t* at = static_cast<const uint16_t*>(from);
  for (int64_t i = 0; i < count; i += W) {
    const int64_t left = count - i < W ? count - i : W;
    uint16_t lanes[W] = {};
    __builtin_memcpy(lanes, at + i, 2 * left);
    U bits;
    for (int lane = 0; lane < W; ++lane) bits[lane] = lanes[lane];
    const F value = dtype == Dtype::bf16 ? as<F>(bits << 16) : half_to_float(bits);
    __builtin_memcpy(to + i, &value, 4 * left);
  }
}

float amax(const float* values, int64_t count) {
  U top = U{};
  int64_t i = 0;
  for (; i + W <= count; i += W) {
    const U bits = load<U>(values + i) & 0x7FFFFFFFu;
    top = bits > top ? bits : top;
  }
  uint32_t result = 0;
  for (int lane = 0; lane < W; ++lane) result = top[lane] > result ? top[lane] : result;
  for (; i < count; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, values + i, 4);
    bits &= 0x7FFFFFFFu;
    result = bits > result ? bits : result;
  }
  float value;
  __builtin_memcpy(&value, &result, 4);
  return value;
}

void pack_f32(const float* plain, int64_t rows, int64_t chunks, int32_t row_block, int64_t block, float* to) {
  const int64_t cols = chunks * kChunk;
  to += block * cols * row_block;
  const int64_t first = block * row_block;
  const int64_t there = rows - first < row_block ? rows - first : row_block;
  for (int64_t k = 0; k < cols; ++k, to += row_block) {
    for (int64_t r = 0; r < there; ++r) to[r] = plain[(first + r) * cols + k];
    for (int64_t r = there; r < row_block; ++r) to[r] = 0.0f;
  }
}

// One row as sums of `parts` bfloat16: [parts][chunks][16] pairs of the values (j, j + 4) of each octet, times 2^-log2(unit).
void pack_bf16(const float* plain, int64_t chunks, int32_t parts, float gain, float* scaled, uint32_t* to) {
  const int64_t stride = chunks * 16;
  for (int64_t i = 0; i < chunks * kChunk; i += 8) {
    uint32_t bits[8], rest_bits[8];
    float value[8];
    for (int j = 0; j < 8; ++j) value[j] = scaled[i + j] = plain[i + j] * gain;
    for (int32_t part = 0; part < parts; ++part) {
      for (int j = 0; j < 8; ++j) {
        __builtin_memcpy(&bits[j], &value[j], 4);
        rest_bits[j] = bits[j] & 0xFFFF0000u;
        float head;
        __builtin_memcpy(&head, &rest_bits[j], 4);
        value[j] -= head;
      }
      for (int j = 0; j < 4; ++j) to[part * stride + i / 2 + j] = rest_bits[j] >> 16 | rest_bits[j + 4];
    }
  }
}

// Integers of one row (signed bytes, natural order) into the interleaved order, with the sums of every (part of a) chunk.
void pack_integer(const int8_t* values, int64_t chunks, int32_t sub, int32_t row_block, int64_t row, uint32_t* packed,
                  int32_t* sums) {
  const int64_t block = row / row_block, place = row % row_block;
  for (int64_t c = 0; c < chunks; ++c) {
    uint32_t* to = packed + (block * chunks + c) * 8 * row_block + place;
    int32_t sum[4];
    for (int o = 0; o < 4; ++o) {
      uint64_t octet;
      __builtin_memcpy(&octet, values + c * kChunk + 8 * o, 8);
      // bytes 0 2 4 6 and 1 3 5 7 come together in three exchanges of neighbours
      uint64_t swap = (octet ^ (octet >> 8)) & 0x0000FF000000FF00ull;
      octet ^= swap ^ (swap << 8);
      swap = (octet ^ (octet >> 16)) & 0x00000000FFFF0000ull;
      octet ^= swap ^ (swap << 16);
      to[(2 * o) * row_block] = static_cast<uint32_t>(octet);
      to[(2 * o + 1) * row_block] = static_cast<uint32_t>(octet >> 32);
      int32_t total = 0;
      for (int j = 0; j < 8; ++j) total += values[c * kChunk + 8 * o + j];
      sum[o] = total;
    }
    if (sub == 1) {
      sums[(block * chunks + c) * row_block + place] = sum[0] + sum[1] + sum[2] + sum[3];
    } else {
      sums[((block * chunks + c) * 2) * row_block + place] = sum[0] + sum[1];
      sums[((block * chunks + c) * 2 + 1) * row_block + place] = sum[2] + sum[3];
    }
  }
}

void integers(const ActFormat& act, const float* plain, int64_t blocks, int64_t size, float tensor_inv, uint64_t place,
              uint8_t* codes, int8_t* values, float* factors) {
  const Format& f = *act.format;
  const bool has_largest = f.extension != Extension::none;
  uint8_t *places = codes + blocks * size, *deltas = places + blocks, *stored = deltas + blocks;
  Notes notes;
  const RowOutput out = {codes, has_largest ? stored : nullptr, factors, has_largest ? places : nullptr,
                         has_largest ? deltas : nullptr, nullptr, nullptr};
  encode_row(f, plain, blocks, size, tensor_inv, nullptr, place, out, notes);
  if (f.element.is_integer && f.element.bits == 8) {
    __builtin_memcpy(values, codes, blocks * size);
  } else {
    for (int64_t i = 0; i < blocks * size; ++i) values[i] = act.integers[codes[i]];
  }
  if (!has_largest) return;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t at = block * size + places[block];
    if (stored[block] != 0) values[at] = act.largest_integers[codes[at]];  // scale code 0: the whole block is zero
  }
}

}  // namespace

extern const ActivationKernels activation_kernels;
const ActivationKernels activation_kernels = {to_f32, amax, pack_f32, pack_bf16, pack_integer, integers};

}  // namespace ms::MS_LEVEL
