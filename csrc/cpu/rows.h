// How quantize and dequantize walk a matrix: units of some blocks of a row, shared out in tasks, with their scratch.
#pragma once

#include "codec.h"
#include "kernels.h"
#include "pool.h"
#include "restore.h"

namespace ms::MS_LEVEL {

constexpr int64_t kUnitElements = 4096;   // stays in the first cache with its codes
constexpr int64_t kLongUnitElements = 32768;  // where nothing is staged: what a unit prepares counts less
constexpr int64_t kTaskElements = 32768;  // what is worth waking a thread for

// A matrix cut into units of whole blocks; a unit starts on a byte in every packed part.
struct Grid {
  int64_t rows, cols, size, blocks;  // blocks of one row
  int64_t unit_blocks, units_per_row, units, tasks;

  Grid(const Format& f, int64_t row_count, int64_t col_count, int threads, int64_t unit_size = kUnitElements)
      : rows(row_count), cols(col_count) {
    size = f.block_size ? f.block_size : cols;
    blocks = f.block_size ? (cols + size - 1) / size : 1;
    const int64_t eight = 8 * size;
    unit_blocks = unit_size > eight ? unit_size / eight * 8 : 8;
    unit_blocks = unit_blocks < blocks ? unit_blocks : blocks;
    units_per_row = (blocks + unit_blocks - 1) / unit_blocks;
    units = rows * units_per_row;
    tasks = rows * blocks * size / kTaskElements;
    const int64_t most = 16 * static_cast<int64_t>(threads);
    tasks = threads < 2 || tasks < 2 ? 1 : tasks < most ? tasks : most;
    tasks = tasks < units ? tasks : units;
  }
  int64_t begin(int64_t task) const { return units / tasks * task + (units % tasks < task ? units % tasks : task); }
  int64_t unit_elements() const { return unit_blocks * size; }
};

// One unit: blocks [first, first + count) of a row.
struct Unit {
  int64_t row, first, count, col, valid;
  Unit(const Grid& grid, int64_t index) {
    row = index / grid.units_per_row;
    first = index % grid.units_per_row * grid.unit_blocks;
    count = grid.blocks - first < grid.unit_blocks ? grid.blocks - first : grid.unit_blocks;
    col = first * grid.size;
    valid = grid.cols - col < count * grid.size ? grid.cols - col : count * grid.size;
  }
};

// Memory of one task, in pieces.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : memory_(static_cast<char*>(__builtin_malloc(static_cast<size_t>(bytes) + 64))) {}
  ~Scratch() { __builtin_free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(memory_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
  void reset() { used_ = 0; }
  // What take() of these element counts and sizes needs.
  static int64_t bytes_of(int64_t elements, int64_t blocks) { return 5 * elements + 32 * blocks + 16 * 64; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// The blocks of a unit as decoding wants them.
struct UnitInfo {
  const Format& f;
  const void* stored;
  int64_t offset;  // of the unit's first block in `stored`
  float tensor_inv;
  const uint8_t* max_idx;
  const uint8_t* delta;
  const float* zero;

  MS_INLINE float factor(int64_t block) const {
    return factor_of(f, load_stored(stored, f.storage, offset + block), tensor_inv);
  }
  MS_INLINE BlockInfo operator()(int64_t block) const {
    const uint32_t code = load_stored(stored, f.storage, offset + block);
    return {code,
            factor_of(f, code, tensor_inv),
            max_idx ? max_idx[block] : 0,
            delta ? delta[block] : 0,
            0,
            zero ? zero[block] : 0.0f};
  }
};

// Numbers of any dtype as float32, zeros after the valid ones.
inline void load_floats(Dtype dtype, const void* values, int64_t at, int64_t valid, int64_t padded, float* to) {
  int64_t i = 0;
  if (dtype == Dtype::f32) {
    __builtin_memcpy(to, static_cast<const float*>(values) + at, static_cast<size_t>(valid) * 4);
    i = valid;
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(values) + at;
    const bool is_half = dtype == Dtype::f16;
    for (; i + W <= valid; i += W) {
      __builtin_prefetch(from + i + 2 * kPrefetchElements);
      store(to + i, is_half ? load_f16(from + i) : load_bf16(from + i));
    }
    for (; i < valid; ++i) to[i] = is_half ? half_to_float(from[i]) : scalar_f32(static_cast<uint32_t>(from[i]) << 16);
  }
  for (; i < padded; ++i) to[i] = 0;
}

template <class Out>
inline void decode_unit_to(const Format& f, const uint8_t* codes, int bits, const Unit& unit, int64_t size,
                           const UnitInfo& info, typename Out::Type* to) {
  if (!RestoreRow::takes(f, unit.count, size, unit.valid)) {
    decode_row<Out>(f, codes, unit.count, size, unit.valid, info, to);
    return;
  }
  restore_row<Out>({f, codes, bits, unit.count, size, info.stored, info.offset, info.tensor_inv, info.max_idx,
                    info.delta}, to);
}

// `codes` are packed with `bits` bits each; less than 8 only where is_restored_packed holds.
inline void decode_unit(const Format& f, Dtype dtype, bool is_stream, const uint8_t* codes, int bits, const Unit& unit,
                        int64_t size, const UnitInfo& info, void* to, int64_t at) {
  uint16_t* halves = static_cast<uint16_t*>(to) + at;
  float* floats = static_cast<float*>(to) + at;
  if (dtype == Dtype::bf16)
    decode_unit_to<ToBF16>(f, codes, bits, unit, size, info, halves);
  else if (dtype == Dtype::f16)
    decode_unit_to<ToF16>(f, codes, bits, unit, size, info, halves);
  else if (is_stream)
    decode_unit_to<ToF32Stream>(f, codes, bits, unit, size, info, floats);
  else
    decode_unit_to<ToF32>(f, codes, bits, unit, size, info, floats);
}
inline bool is_restored_packed(const Format& f, const Unit& unit, int64_t size) {
  return CodeReader::kIsPacked && RestoreRow::takes(f, unit.count, size, unit.valid);
}

inline void fence() {
#if defined(__SSE2__)
  _mm_sfence();  // streamed stores become visible before the task counts as done
#endif
}

}  // namespace ms::MS_LEVEL
