// One unit of blocks, from float32 numbers to the packed parts of row_major or straight back to numbers.
#pragma once

#include "rows.h"

namespace ms::MS_LEVEL {

// ------------------------------------------------------------------------------------------ packing

inline void pack_index(const Format& f, const RowOutput& out, int64_t count, uint8_t* to) {
  uint8_t* index = out.max_idx;
  if (f.extension == Extension::plusplus)
    for (int64_t i = 0; i < count; ++i) index[i] |= static_cast<uint8_t>(out.delta[i] << f.delta_shift);
  pack_codes(index, count, f.index_bits, to);
}

struct Target {
  const QuantizeArgs& args;
  const Grid& grid;
  float tensor_inv;
};

// Encode the float32 numbers of a unit (padded to whole blocks) and pack or restore them.
inline void quantize_unit(const Target& t, const Unit& unit, const float* x, Scratch& scratch, Notes& notes) {
  const QuantizeArgs& args = t.args;
  const Format& f = *args.format;
  const int64_t size = t.grid.size, padded_cols = t.grid.blocks * size, elements = unit.count * size;
  const int64_t block = unit.row * t.grid.blocks + unit.first;
  const bool is_fake = args.restored != nullptr;
  const int bits = f.element.bits;
  uint8_t* codes = nullptr;
  if (!is_fake) codes = args.codes + unit.row * ((padded_cols * bits + 7) / 8) + unit.col * bits / 8;
  uint8_t* staged = is_fake || bits < 8 ? scratch.take<uint8_t>(elements) : codes;
  const bool has_zero = f.zero_point != ZeroPoint::none, has_index = f.extension != Extension::none;
  void* stored = is_fake ? scratch.take<uint32_t>(unit.count) : args.scale;
  const int64_t offset = is_fake ? 0 : block;
  const int64_t width = f.storage == Storage::code8 ? 1 : f.storage == Storage::f32 ? 4 : 2;
  uint8_t* zero_bytes = scratch.take<uint8_t>(2 * unit.count);
  const bool is_half_zero = has_zero && !is_fake && f.zero_is_half;
  const RowOutput out = {
      staged,
      static_cast<char*>(stored) + offset * width,
      nullptr,
      has_index ? scratch.take<uint8_t>(unit.count) : nullptr,
      has_index ? scratch.take<uint8_t>(unit.count) : nullptr,
      is_half_zero ? static_cast<void*>(static_cast<uint16_t*>(args.zero_point) + block) : zero_bytes,
      has_zero ? scratch.take<float>(unit.count) : nullptr,
  };
  const uint64_t place = static_cast<uint64_t>(unit.row) * static_cast<uint64_t>(padded_cols) +
                         static_cast<uint64_t>(unit.col);
  encode_row(f, x, unit.count, size, t.tensor_inv, args.amax ? args.amax + block : nullptr, place, out, notes);
  if (is_fake) {
    const UnitInfo info = {f, stored, 0, t.tensor_inv, out.max_idx, out.delta, out.zero};
    decode_unit(f, args.dtype, false, staged, 8, unit, size, info, args.restored, unit.row * t.grid.cols + unit.col);
    return;
  }
  if (staged != codes) pack_codes(staged, elements, bits, codes);
  if (has_index)
    pack_index(f, out, unit.count,
               args.index + unit.row * ((t.grid.blocks * f.index_bits + 7) / 8) + unit.first * f.index_bits / 8);
  if (has_zero && !f.zero_is_half)
    pack_codes(zero_bytes, unit.count, f.zero.bits,
               static_cast<uint8_t*>(args.zero_point) + unit.row * ((t.grid.blocks * f.zero.bits + 7) / 8) +
                   unit.first * f.zero.bits / 8);
}

}  // namespace ms::MS_LEVEL
