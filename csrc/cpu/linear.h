// What the linear kernels of all levels are told: weights in the layout rows16, prepared activations, and the call.
//
// Nothing here is a fact about a format: tables and parameters come from the format records (format.h).
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace ms {

constexpr int kLanes = 16;   // rows that the layout rows16 interleaves
constexpr int kChunk = 32;   // columns that stand together
constexpr int kPanel = 32;   // rows of a decoded panel

struct Weight {
  int64_t rows, cols;
  int64_t groups, chunks, scale_cols;
  int64_t block;  // columns that share a scale; 0: all
  int32_t bits;
  ScaleKind scale_kind;
  Extra extra;
  ElementKind element;
  ZeroKind zero_kind;

  const uint8_t* codes;
  const void* scale;
  const uint8_t* index;
  const uint8_t* largest;
  const void* zero;
  const uint8_t* flags;  // float8: 1 for tiles with subnormals, 2 for tiles with codes that are no numbers

  float values[256];          // value of every element code
  float scale_values[256];    // factor of every 8-bit scale code, multipliers and second levels included
  float low_values[8];        // Extra::low: what the three bits above the index add
  float largest_values[256];  // Extra::largest: value of the largest element's code
  float delta_values[8];      // Extra::largest: factor of the others for every exponent difference
  float zero_values[256];     // ZeroKind::table
  float multiplier;           // wide scales: factor = scale * multiplier / tensor_inv
  float tensor_inv;           // 0: none

  // The values as small integers: value = (sum of planes) * int_step, plane 1 times 16. int_planes 0: they are not.
  int32_t int_planes;
  int32_t int_offset[2];  // added to the integers so that they are unsigned bytes
  uint8_t int_values[2][64];
  float int_step;
  int32_t low_is_int;  // Extra::low: integers with the low part added are still unsigned bytes

  // 8-bit floats: fields, and the first code (without sign) that is not finite.
  int32_t mantissa_bits, bias, special_code;
  int32_t is_signed;  // integers: two's complement
  int32_t bf16_exact;  // every value of a code is a normal bfloat16 or zero
  uint16_t bf16_values[32];  // magnitudes by code without sign; 4-bit elements: all 16 codes, twice

  // Dense-and-sparse: row r adds sparse_values[j] * x[sparse_columns[j]] for j in sparse_offsets[r .. r+1].
  const int32_t* sparse_offsets;  // null: none
  const void* sparse_columns;
  const float* sparse_values;
  int32_t sparse_wide;  // columns are int32, else int16 without sign
};

// Prepared activations of one range of columns, `rows` of them.
enum class ActKind : int32_t { f32 = 0, integer = 1, bf16 = 2 };

struct Act {
  ActKind kind;
  int64_t rows, chunks;
  int32_t row_block = 0;  // rows that `packed` or `interleaved` holds side by side
  int32_t parts = 1;      // integer: scales in a chunk (1 or 2); bf16: terms of the sum that an activation was split into
  int32_t sub = 0;        // scales in a chunk (1 or 2); 0: none
  const float* plain = nullptr;        // [rows][chunks * 32] in natural order: values, or the integers
  const float* interleaved = nullptr;  // f32, many rows: [row blocks][k][row_block]
  const float* scaled = nullptr;       // bf16: plain times 1 / unit
  const uint32_t* packed = nullptr;    // integer: [row blocks][chunks][8][row_block]; bf16: [parts][chunks][16]
  const float* scale = nullptr;        // [row blocks][chunks * sub][row_block]
  const int32_t* sums = nullptr;       // integer: the same shape, sums of the integers
  float unit = 1.0f;                   // bf16: multiplies a sum of products
};

// One level's kernels. `accumulator` is float32 [rows][stride], 16 columns for each group, and is added to.
struct LinearKernels {
  // One row of activations times one group of weights (16 outputs).
  using Row = void (*)(const Weight&, const Act&, int64_t group, float* accumulator);
  // All rows times `count` groups from `group` on; `scratch` holds scratch_floats() floats.
  using Block = void (*)(const Weight&, const Act&, int64_t group, int64_t count, float* accumulator, int64_t stride,
                         float* scratch);
  // The kernel for a weight and a kind of activations, or null where this level has none.
  Row (*row)(const Weight&, ActKind, int32_t sub, int32_t parts);
  Block (*block)(const Weight&, ActKind, int32_t sub);
  int32_t row_block_f32, row_block_integer;
  // out[i] = silu(gate[i]) * up[i] in float32.
  void (*silu_mul)(const float* gate, const float* up, float* out, int64_t count);
};

struct ActFormat;

struct ActivationKernels {
  void (*to_f32)(const void* from, Dtype dtype, int64_t count, float* to);
  float (*amax)(const float* values, int64_t count);  // NaN where there is one
  // Block `block` of rows of plain [rows][chunks * 32] into [block][k][row].
  void (*pack_f32)(const float* plain, int64_t rows, int64_t chunks, int32_t row_block, int64_t block, float* to);
  void (*pack_bf16)(const float* plain, int64_t chunks, int32_t parts, float gain, float* scaled, uint32_t* to);
  void (*pack_integer)(const int8_t* values, int64_t chunks, int32_t sub, int32_t row_block, int64_t row,
                       uint32_t* packed, int32_t* sums);
  // One row, padded to whole blocks with zeros, to integers and the factor of every block; `codes` is memory
  // for blocks * (size + 3) bytes. A MX+ format has a power-of-two scale here.
  void (*integers)(const ActFormat& act, const float* plain, int64_t blocks, int64_t size, float tensor_inv, uint64_t place,
                   uint8_t* codes, int8_t* values, float* factors);
};

constexpr int64_t kScratchFloats = 256 * kPanel + 2048;

// A format of activations; the integers belong to ActRule::integer: value = integer * step * scale.
struct ActFormat {
  const Format* format;
  int8_t integers[256];          // of every element code
  int8_t largest_integers[256];  // of every code of a largest element (MX+)
  float step;
};

// A range of columns of the activations.
struct LinearInput {
  int64_t first_column, cols;
  ActRule rule;
  int32_t terms;  // bfloat16 terms that hold an activation exactly: 3 for float32, 1 for bfloat16
  const ActFormat* act;  // null where they are kept
};
// A weight that multiplies one input; the segments of an output are added up.
struct LinearSegment {
  const Weight* weight;
  int32_t input;
};
struct LinearOutput {
  int64_t rows, first_column;
  int32_t first, count;  // segments
  const float* bias;     // or null
};
struct LinearCall {
  std::vector<LinearInput> inputs;
  std::vector<LinearSegment> segments;
  std::vector<LinearOutput> outputs;
  Combine combine = Combine::concatenate;
  Dtype dtype = Dtype::f32;  // of activations and results
  int64_t input_stride = 0, output_stride = 0;
};

// out[rows, output_stride] = x[rows, input_stride] times the weights; `bias` stands for that of a call's only output.
void linear(const LinearCall& call, const Kernels& kernels, const void* x, int64_t rows, void* out, const float* bias,
            int threads);

}  // namespace ms
