// quantize and fake_quantize: any float dtype to the parts of row_major, or straight back to numbers.
#include "kernels.h"
#include "quantize_unit.h"

namespace ms::MS_LEVEL {
namespace {

// The numbers of a unit as float32: where they lie, or converted and padded in `buffer`.
const float* unit_values(const QuantizeArgs& args, const Grid& grid, const Unit& unit, float* buffer) {
  const int64_t at = unit.row * grid.cols + unit.col, padded = unit.count * grid.size;
  if (args.dtype == Dtype::f32 && unit.valid == padded) return static_cast<const float*>(args.values) + at;
  load_floats(args.dtype, args.values, at, unit.valid, padded, buffer);
  return buffer;
}

// ------------------------------------------------------------------------------------------ the second level

float raw_of_block(const Format& f, const float* x, int64_t size) {
  if (f.statistic == Statistic::deviation) return deviation_raw(f, x, size);
  if (f.zero_point == ZeroPoint::none) return raw_scale(f, statistic_of(f, x, size, amax_bits(x, size)));
  Range range = range_of(x, size);
  return range_raw(f, range);
}

// What a block adds to the tensor's statistic: its amax or raw scale; nothing where it is poisoned.
float largest_of_block(const Format& f, const float* x, int64_t size, float* clean) {
  bool has_inf = false;
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t bits = scalar_bits(x[i]) & 0x7FFFFFFFu;
    if (bits > kInfBits || (bits == kInfBits && !f.inf_saturates)) return 0;
    has_inf |= bits == kInfBits;
    clean[i] = bits == kInfBits ? (x[i] > 0 ? kFloatMax : -kFloatMax) : x[i];
  }
  if (f.tensor_by_raw) return raw_of_block(f, clean, size);
  return has_inf ? kFloatMax : scalar_f32(amax_bits(x, size));
}

float largest_of_unit(const Format& f, const float* x, int64_t count, int64_t size, float* clean) {
  if (!f.tensor_by_raw) {
    const uint32_t amax = amax_bits<true>(x, count * size);
    if (amax < kInfBits) return scalar_f32(amax);
  }
  float largest = 0;
  for (int64_t block = 0; block < count; ++block) {
    const float own = largest_of_block(f, x + block * size, size, clean);
    largest = own > largest ? own : largest;
  }
  return largest;
}

float tensor_level(const QuantizeArgs& args, const Grid& grid) {
  const Format& f = *args.format;
  if (!f.has_tensor_scale) return 1.0f;
  if (args.tensor_amax != nullptr) return tensor_inverse(*args.tensor_amax, f.tensor_numerator_amax);
  Scratch results(grid.tasks * 4);
  float* own = results.take<float>(grid.tasks);
  parallel(grid.tasks, args.threads, [&](int64_t task) {
    Scratch scratch(4 * grid.unit_elements() + 4 * grid.size + 128);
    float* buffer = scratch.take<float>(grid.unit_elements());
    float* clean = scratch.take<float>(grid.size);
    float largest = 0;
    for (int64_t index = grid.begin(task); index < grid.begin(task + 1); ++index) {
      const Unit unit(grid, index);
      const float found = largest_of_unit(f, unit_values(args, grid, unit, buffer), unit.count, grid.size, clean);
      largest = found > largest ? found : largest;
    }
    own[task] = largest;
  });
  float largest = 0;
  for (int64_t task = 0; task < grid.tasks; ++task) largest = own[task] > largest ? own[task] : largest;
  return tensor_inverse(largest, f.tensor_numerator);
}

// ------------------------------------------------------------------------------------------ all units

void quantize(const QuantizeArgs& args, int64_t* counts) {
  const Format& f = *args.format;
  const Grid grid(f, args.rows, args.cols, args.threads);
  const Target target = {args, grid, tensor_level(args, grid)};
  if (args.tensor_inv != nullptr) *args.tensor_inv = target.tensor_inv;
  Scratch results(grid.tasks * static_cast<int64_t>(sizeof(Notes)));
  Notes* notes = results.take<Notes>(grid.tasks);
  parallel(grid.tasks, args.threads, [&](int64_t task) {
    Notes own;
    Scratch scratch(Scratch::bytes_of(grid.unit_elements(), grid.unit_blocks));
    for (int64_t index = grid.begin(task); index < grid.begin(task + 1); ++index) {
      scratch.reset();
      const Unit unit(grid, index);
      const float* x = unit_values(args, grid, unit, scratch.take<float>(grid.unit_elements()));
      quantize_unit(target, unit, x, scratch, own);
    }
    notes[task] = own;
  });
  Notes total;
  for (int64_t task = 0; task < grid.tasks; ++task) total.add(notes[task]);
  counts[0] = total.num_nan, counts[1] = total.num_inf, counts[2] = total.num_ambiguous;
}

float tensor_level_of(const QuantizeArgs& args) {
  return tensor_level(args, Grid(*args.format, args.rows, args.cols, args.threads));
}

}  // namespace

extern const QuantizeKernels quantize_kernels;
const QuantizeKernels quantize_kernels = {quantize, tensor_level_of};

}  // namespace ms::MS_LEVEL
