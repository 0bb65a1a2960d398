// What a transformer does just before it quantizes: RMSNorm, SiLU times up, gather of channels, block Hadamard.
//
// Every operation makes one row at a time in float32, rounds it once to the dtype of the input, and stores it or encodes
// it as kernels/quantize.cpp would encode the stored row, so that the fused result is quantize(operation(x)) bit for bit.
#include "exponential.h"
#include "kernels.h"
#include "quantize_unit.h"

namespace ms::MS_LEVEL {
namespace {

// ------------------------------------------------------------------------------------------ RMSNorm

// x / sqrt(mean(x^2) + eps) * weight; squares are summed in four vectors, then by halves.
void rms_norm_row(const FusedArgs& args, int64_t row, float* to) {
  const int64_t cols = args.cols;
  load_floats(args.dtype, args.values, row * cols, cols, cols, to);
  F sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= cols; i += 4 * W)
    for (int part = 0; part < 4; ++part) {
      const F x = load<F>(to + i + part * W);
      sums[part] = fma(x, x, sums[part]);
    }
  for (; i + W <= cols; i += W) sums[0] = fma(load<F>(to + i), load<F>(to + i), sums[0]);
  float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < cols; ++i) total += to[i] * to[i];
  const float inverse = 1.0f / __builtin_sqrtf(total / static_cast<float>(cols) + args.eps);
  constexpr int64_t kPiece = 256;
  float weights[kPiece];
  for (int64_t start = 0; start < cols; start += kPiece) {
    const int64_t count = cols - start < kPiece ? cols - start : kPiece;
    load_floats(args.other_dtype, args.other, start, count, count, weights);
    for (int64_t k = 0; k < count; ++k) to[start + k] = to[start + k] * inverse * weights[k];
  }
}

// ------------------------------------------------------------------------------------------ SiLU

void silu_mul_row(const FusedArgs& args, int64_t row, float* to) {
  const int64_t cols = args.cols;
  constexpr int64_t kPiece = 256;
  float up[kPiece];
  for (int64_t start = 0; start < cols; start += kPiece) {
    const int64_t count = cols - start < kPiece ? cols - start : kPiece;
    const int64_t padded = (count + W - 1) / W * W;
    float gate[kPiece];
    load_floats(args.dtype, args.values, row * cols + start, count, padded, gate);
    load_floats(args.dtype, args.other, row * cols + start, count, padded, up);
    for (int64_t k = 0; k < padded; k += W) store(gate + k, silu(load<F>(gate + k)) * load<F>(up + k));
    __builtin_memcpy(to + start, gate, static_cast<size_t>(count) * sizeof(float));
  }
}

// ------------------------------------------------------------------------------------------ gather

void gather_row(const FusedArgs& args, int64_t row, float* to) {
  const int64_t from = row * args.source_cols;
  if (args.dtype == Dtype::f32) {
    const float* x = static_cast<const float*>(args.values) + from;
    for (int64_t i = 0; i < args.cols; ++i) to[i] = x[args.columns[i]];
    return;
  }
  const uint16_t* x = static_cast<const uint16_t*>(args.values) + from;
  if (args.dtype == Dtype::bf16) {
    for (int64_t i = 0; i < args.cols; ++i) to[i] = scalar_f32(static_cast<uint32_t>(x[args.columns[i]]) << 16);
    return;
  }
  for (int64_t i = 0; i < args.cols; ++i) to[i] = half_to_float(x[args.columns[i]]);
}

// ------------------------------------------------------------------------------------------ Walsh-Hadamard

// The lanes that differ in one bit of their number change places.
MS_INLINE F exchange(F value, int distance) {
  const I lanes = as<I>(lane_numbers()) ^ distance;
#if defined(MS_X512)
  return (F)_mm512_permutexvar_ps((__m512i)lanes, (__m512)value);
#elif defined(MS_X256)
  return (F)_mm256_permutevar8x32_ps((__m256)value, (__m256i)lanes);
#else
  F result;
  for (int i = 0; i < W; ++i) result[i] = value[lanes[i]];
  return result;
#endif
}

// One block in place: stages of distance 1, 2, 4, ... of (a + b, a - b), then the factor.
void hadamard_block(float* x, int64_t size, float factor) {
  for (int distance = 1; distance < W; distance *= 2) {
    const I flip = ((as<I>(lane_numbers()) & distance) != 0) & INT32_MIN;
    for (int64_t i = 0; i < size; i += W) {
      const F value = load<F>(x + i);
      store(x + i, exchange(value, distance) + as<F>(as<I>(value) ^ flip));
    }
  }
  for (int64_t distance = W; distance < size; distance *= 2)
    for (int64_t start = 0; start < size; start += 2 * distance)
      for (int64_t i = start; i < start + distance; i += W) {
        const F a = load<F>(x + i), b = load<F>(x + i + distance);
        store(x + i, a + b);
        store(x + i + distance, a - b);
      }
  for (int64_t i = 0; i < size; i += W) store(x + i, load<F>(x + i) * factor);
}

void hadamard_row(const FusedArgs& args, int64_t row, float* to) {
  load_floats(args.dtype, args.values, row * args.cols, args.cols, args.cols, to);
  if (args.signs != nullptr)
    for (int64_t i = 0; i < args.cols; ++i) to[i] *= args.signs[i];
  const float factor = 1.0f / __builtin_sqrtf(static_cast<float>(args.size));
  for (int64_t start = 0; start < args.cols; start += args.size) hadamard_block(to + start, args.size, factor);
}

// ------------------------------------------------------------------------------------------ rows

void make_row(const FusedArgs& args, int64_t row, float* to) {
  switch (args.operation) {
    case FusedOperation::rms_norm: return rms_norm_row(args, row, to);
    case FusedOperation::silu_mul: return silu_mul_row(args, row, to);
    case FusedOperation::gather: return gather_row(args, row, to);
    default: return hadamard_row(args, row, to);
  }
}

// Round a row to 16 bits: to memory, or back to float32 in place.
template <class Out>
void round_row(const float* from, int64_t cols, uint16_t* to) {
  int64_t i = 0;
  for (; i + W <= cols; i += W) Out::put(to + i, load<F>(from + i));
  for (; i < cols; ++i) put_one<Out>(to + i, from[i]);
}

void store_row(Dtype dtype, const float* from, int64_t cols, void* to, int64_t at) {
  if (dtype == Dtype::f32)
    __builtin_memcpy(static_cast<float*>(to) + at, from, static_cast<size_t>(cols) * sizeof(float));
  else if (dtype == Dtype::bf16)
    round_row<ToBF16>(from, cols, static_cast<uint16_t*>(to) + at);
  else
    round_row<ToF16>(from, cols, static_cast<uint16_t*>(to) + at);
}

int64_t tasks_of(const FusedArgs& args) {
  int64_t tasks = args.rows * args.cols / (kTaskElements / 4);  // these cost more for each element than quantize
  const int64_t most = 16 * static_cast<int64_t>(args.threads);
  tasks = args.threads < 2 || tasks < 2 ? 1 : tasks < most ? tasks : most;
  return tasks < args.rows ? tasks : args.rows;
}

int64_t first_row(const FusedArgs& args, int64_t tasks, int64_t task) {
  return args.rows / tasks * task + (args.rows % tasks < task ? args.rows % tasks : task);
}

void transform(const FusedArgs& args) {
  const int64_t tasks = tasks_of(args);
  parallel(tasks, args.threads, [&](int64_t task) {
    Scratch scratch(4 * args.cols + 128);
    float* buffer = scratch.take<float>(args.cols);
    for (int64_t row = first_row(args, tasks, task); row < first_row(args, tasks, task + 1); ++row) {
      make_row(args, row, buffer);
      store_row(args.dtype, buffer, args.cols, args.result, row * args.cols);
    }
  });
}

void transform_and_quantize(const FusedArgs& args, const QuantizeArgs& out, int64_t* counts) {
  const Grid grid(*out.format, args.rows, args.cols, args.threads);
  const Target target = {out, grid, 1.0f};
  const int64_t tasks = tasks_of(args), padded = grid.blocks * grid.size;
  Scratch results(tasks * static_cast<int64_t>(sizeof(Notes)));
  Notes* notes = results.take<Notes>(tasks);
  parallel(tasks, args.threads, [&](int64_t task) {
    Notes own;
    Scratch rows(6 * padded + 256), scratch(Scratch::bytes_of(grid.unit_elements(), grid.unit_blocks));
    float* buffer = rows.take<float>(padded);
    uint16_t* rounded = rows.take<uint16_t>(args.cols);
    for (int64_t row = first_row(args, tasks, task); row < first_row(args, tasks, task + 1); ++row) {
      make_row(args, row, buffer);
      if (args.dtype != Dtype::f32) {
        store_row(args.dtype, buffer, args.cols, rounded, 0);
        load_floats(args.dtype, rounded, 0, args.cols, args.cols, buffer);
      }
      for (int64_t i = args.cols; i < padded; ++i) buffer[i] = 0;
      for (int64_t index = 0; index < grid.units_per_row; ++index) {
        scratch.reset();
        const Unit unit(grid, row * grid.units_per_row + index);
        quantize_unit(target, unit, buffer + unit.col, scratch, own);
      }
    }
    notes[task] = own;
  });
  Notes total;
  for (int64_t task = 0; task < tasks; ++task) total.add(notes[task]);
  counts[0] = total.num_nan, counts[1] = total.num_inf, counts[2] = total.num_ambiguous;
}

int64_t count_outside(const FusedArgs& args) {
  int64_t count = 0;
  for (int64_t i = 0; args.columns != nullptr && i < args.cols; ++i)
    count += args.columns[i] < 0 || args.columns[i] >= args.source_cols;
  return count;
}

// Returns how many columns lie outside of the source; then nothing is done.
int64_t fused(const FusedArgs& args, const QuantizeArgs& out, int64_t* counts) {
  const int64_t outside = count_outside(args);
  if (outside > 0) return outside;
  if (args.result != nullptr)
    transform(args);
  else
    transform_and_quantize(args, out, counts);
  return 0;
}

}  // namespace

extern const FusedKernels fused_kernels;
const FusedKernels fused_kernels = {fused};

}  // namespace ms::MS_LEVEL
