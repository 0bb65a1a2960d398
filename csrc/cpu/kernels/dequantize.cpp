// dequantize: the parts of row_major to float32, bfloat16 or float16.
#include "kernels.h"
#include "rows.h"

namespace ms::MS_LEVEL {
namespace {

constexpr int64_t kStreamBytes = 4 << 20;  // larger results go past the caches

// Rows of whole blocks that end on whole bytes in every part follow each other as one long row.
Grid grid_of(const DequantizeArgs& args) {
  const Format& f = *args.format;
  const Grid grid(f, args.rows, args.cols, args.threads);
  const bool is_whole = f.block_size > 0 && args.cols % f.block_size == 0 && args.cols * f.element.bits % 8 == 0;
  const bool is_plain = f.zero_point == ZeroPoint::none &&
                        (f.extension == Extension::none || grid.blocks * f.index_bits % 8 == 0);
  if (!is_whole || !is_plain) return grid;
  const bool is_staged = f.element.bits < 8 && !(CodeReader::kIsPacked && grid.size % W == 0);
  return Grid(f, 1, args.rows * args.cols, args.threads, is_staged ? kUnitElements : kLongUnitElements);
}

bool can_stream(const DequantizeArgs& args, const Grid& grid) {
  const bool is_aligned = reinterpret_cast<uintptr_t>(args.restored) % sizeof(F) == 0;
  return args.dtype == Dtype::f32 && is_aligned && grid.cols % W == 0 && grid.size % W == 0 &&
         grid.rows * grid.cols * 4 >= kStreamBytes;
}

void dequantize_unit(const DequantizeArgs& args, const Grid& grid, bool is_stream, const Unit& unit, Scratch& scratch) {
  const Format& f = *args.format;
  int bits = f.element.bits;
  const int64_t size = grid.size, padded_cols = grid.blocks * size, elements = unit.count * size;
  const uint8_t* codes = args.codes + unit.row * ((padded_cols * bits + 7) / 8) + unit.col * bits / 8;
  if (bits < 8 && !is_restored_packed(f, unit, size)) {
    uint8_t* staged = scratch.take<uint8_t>(elements);
    unpack_codes(codes, elements, bits, staged);
    codes = staged, bits = 8;
  }
  const int64_t block = unit.row * grid.blocks + unit.first;
  UnitInfo info = {f, args.scale, block, args.tensor_inv ? *args.tensor_inv : 1.0f, nullptr, nullptr, nullptr};
  if (f.extension != Extension::none) {
    uint8_t* idx = scratch.take<uint8_t>(unit.count);
    uint8_t* delta = scratch.take<uint8_t>(unit.count);
    unpack_codes(args.index + unit.row * ((grid.blocks * f.index_bits + 7) / 8) + unit.first * f.index_bits / 8,
                 unit.count, f.index_bits, idx);
    for (int64_t i = 0; i < unit.count; ++i) {
      delta[i] = static_cast<uint8_t>(idx[i] >> f.delta_shift);
      idx[i] &= static_cast<uint8_t>((1 << f.delta_shift) - 1);
    }
    info.max_idx = idx, info.delta = delta;
  }
  if (f.zero_point != ZeroPoint::none) {
    float* zero = scratch.take<float>(unit.count);
    if (f.zero_is_half) {
      const uint16_t* from = static_cast<const uint16_t*>(args.zero_point) + block;
      for (int64_t i = 0; i < unit.count; ++i) zero[i] = half_to_float(from[i]);
    } else {
      uint8_t* stored = scratch.take<uint8_t>(unit.count);
      unpack_codes(static_cast<const uint8_t*>(args.zero_point) + unit.row * ((grid.blocks * f.zero.bits + 7) / 8) +
                       unit.first * f.zero.bits / 8,
                   unit.count, f.zero.bits, stored);
      for (int64_t i = 0; i < unit.count; ++i) zero[i] = decode_zero(f, stored[i]);
    }
    info.zero = zero;
  }
  decode_unit(f, args.dtype, is_stream, codes, bits, unit, size, info, args.restored, unit.row * grid.cols + unit.col);
}

void dequantize(const DequantizeArgs& args) {
  const Grid grid = grid_of(args);
  const bool is_stream = can_stream(args, grid);
  parallel(grid.tasks, args.threads, [&](int64_t task) {
    Scratch scratch(Scratch::bytes_of(grid.unit_elements(), grid.unit_blocks));
    for (int64_t index = grid.begin(task); index < grid.begin(task + 1); ++index) {
      scratch.reset();
      dequantize_unit(args, grid, is_stream, Unit(grid, index), scratch);
    }
    if (is_stream) fence();
  });
}

}  // namespace

extern const DequantizeKernels dequantize_kernels;
const DequantizeKernels dequantize_kernels = {dequantize};

}  // namespace ms::MS_LEVEL
