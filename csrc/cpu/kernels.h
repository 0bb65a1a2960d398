// The table of kernels that every instruction-set level fills, and how a level is chosen.
//
// Each source in kernels/ is compiled once for each level and defines, in namespace ms::MS_LEVEL, the functions that
// levels.cpp collects here. Entry points take raw pointers and sizes, hold no state and check nothing: the Python
// wrappers check shapes, dtypes, devices and contiguity before any pointer is taken.
#pragma once

#include <cstdint>

#include "enums.h"

namespace ms {

enum class Level : int32_t { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };
constexpr int kNumLevels = 4;

// Each group of kernels has a struct of function pointers of its own, made by one source of kernels/.
// (type, member): a new group is one line here.
#define MS_KERNEL_GROUPS(X)          \
  X(LimitKernels, limit)             \
  X(LinearKernels, linear)           \
  X(ActivationKernels, activation)   \
  X(QuantizeKernels, quantize)       \
  X(DequantizeKernels, dequantize)   \
  X(DecoderKernels, decoder)         \
  X(FusedKernels, fused)             \
  X(LayoutKernels, layout)

#define MS_FORWARD(type, member) struct type;
#define MS_MEMBER(type, member) const type* member;
MS_KERNEL_GROUPS(MS_FORWARD)

struct Kernels {
  const char* name;
  MS_KERNEL_GROUPS(MS_MEMBER)
};

// The kernels of a level, or null where the level was not built or the machine lacks its instructions.
const Kernels* kernels_of(Level level);
// The best level of this machine.
Level best_level();

struct LimitKernels {
  // Sum of all bytes read, in a loop that the memory bounds; `bytes` is a multiple of 256.
  uint64_t (*read_bytes)(const void* from, int64_t bytes);
  // `rounds` times 12 independent fused multiply-adds on full vectors; returns the flop count through `flops`.
  float (*multiply_add)(int64_t rounds, int64_t* flops);
  // Writes `bytes` (a multiple of 256), through the caches or past them; the latter wants `to` aligned to 64 bytes.
  void (*fill_bytes)(void* to, int64_t bytes);
  void (*fill_bytes_streaming)(void* to, int64_t bytes);
};

// ------------------------------------------------------------------------------------------ quantize, dequantize

struct Format;

// A matrix [rows, cols] to the parts of the layout row_major, or with `restored` to the numbers they stand for.
struct QuantizeArgs {
  const Format* format;
  Dtype dtype;  // of values and restored
  const void* values;
  int64_t rows, cols;
  const float* amax;         // of each block, or null: measured
  const float* tensor_amax;  // of the tensor, for formats with a second level, or null: measured
  uint8_t* codes;
  void* scale;
  float* tensor_inv;
  uint8_t* index;
  void* zero_point;
  void* restored;  // then the parts before are null
  int threads;
};

struct QuantizeKernels {
  // counts: NaNs, Infs, and blocks whose result only the reference can tell.
  void (*quantize)(const QuantizeArgs& args, int64_t* counts);
  // What the second level of a matrix is (1 where the format has none).
  float (*tensor_level)(const QuantizeArgs& args);
};

struct DequantizeArgs {
  const Format* format;
  Dtype dtype;  // of restored
  int64_t rows, cols;
  const uint8_t* codes;
  const void* scale;
  const float* tensor_inv;
  const uint8_t* index;
  const void* zero_point;
  void* restored;
  int threads;
};

struct DequantizeKernels {
  void (*dequantize)(const DequantizeArgs& args);
};

// ------------------------------------------------------------------------------------------ fused

struct FusedArgs {
  FusedOperation operation;
  Dtype dtype;  // of values and result
  const void* values;
  int64_t rows, cols;      // of the result
  int64_t source_cols;     // gather: of the values
  const void* other;       // RMSNorm: weight [cols]; SiLU: up [rows, cols]
  Dtype other_dtype;       // of RMSNorm's weight
  const int64_t* columns;  // gather: [cols]
  const float* signs;      // Hadamard: [cols] or null
  int64_t size;            // Hadamard: 16 to 128
  float eps;
  void* result;  // or null: quantize
  int threads;
};

struct FusedKernels {
  // Fills `result`, or the parts of `out` (format, codes, scale, index, zero_point) with the counts of quantize.
  // Returns how many columns of a gather lie outside of the values; then nothing is read or written.
  int64_t (*fused)(const FusedArgs& args, const QuantizeArgs& out, int64_t* counts);
};

// ------------------------------------------------------------------------------------------------------- layout

// The codes of a matrix in row_major, to those of the layout rows16 (layouts/rows16.py).
struct LayoutArgs {
  int bits;
  int64_t rows, cols, row_bytes;
  const uint8_t* codes;
  uint8_t* packed;
  // 8-bit floats: flags for each tile, 1 where (code & magnitude_mask) is in 1 .. num_mantissas - 1, 2 where it is past
  // max_code; else null.
  uint8_t* subnormals;
  int magnitude_mask, num_mantissas, max_code;
  // MX+ and MX++ (else null): the place of the largest element of each block [rows, grid_cols], `zero_block` where all
  // codes are cleared, and any other number past the block where they are left alone.
  const uint8_t* place;
  int64_t grid_cols, block_size;
  int zero_block;
  uint8_t* side;  // [rows, grid_cols]: the low bits with the sign above them, or the whole code
  bool is_compact, is_int;
  int low_bits, magnitude_bits, first_code;
};

struct LayoutKernels {
  // One group of 16 rows; false where there was no memory.
  bool (*pack_rows16)(const LayoutArgs& args, int64_t group);
};

}  // namespace ms
