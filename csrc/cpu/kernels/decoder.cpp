// What stands between the linear layers of a decoder, beside attention: norms, gates, and a linear layer with plain
// weights. Float32 throughout; plain weights may be bfloat16.
#include "decoder_parts.h"
#include "exponential.h"
#include "pool.h"

namespace ms::MS_LEVEL {
namespace {

// ---------------------------------------------------------------------------------------------------- norms and gates

void add_rms_norm(float* residual, const float* added, const float* weight, float* out, int64_t rows, int64_t cols,
                  float eps, int threads) {
  parallel(rows, threads, [=](int64_t row) {
    float* x = residual + row * cols;
    if (added != nullptr) {
      const float* y = added + row * cols;
      int64_t i = 0;
      for (; i + W <= cols; i += W) store(x + i, load<F>(x + i) + load<F>(y + i));
      for (; i < cols; ++i) x[i] += y[i];
    }
    rms_norm(x, weight, out + row * cols, cols, eps);
  });
}

template <Gate KIND>
MS_INLINE F activated(F x) {
  if constexpr (KIND == Gate::silu) return silu(x);
  // 0.5 x (1 + tanh(z)) with z = sqrt(2 / pi) (x + 0.044715 x^3) is x / (1 + e^(-2z))
  const F z = set1(1.5957691216f) * (x + set1(0.044715f) * x * x * x);
  return x / (set1(1) + exponential(-z));
}

template <Gate KIND>
void gate_of(const float* pairs, float* out, int64_t rows, int64_t cols, int threads) {
  constexpr int64_t kPiece = 4096;
  const int64_t pieces = (cols + kPiece - 1) / kPiece;
  parallel(rows * pieces, threads, [=](int64_t chunk) {
    const int64_t row = chunk / pieces, begin = chunk % pieces * kPiece, end = smaller(begin + kPiece, cols);
    const float* a = pairs + row * 2 * cols;
    const float* b = a + cols;
    float* to = out + row * cols;
    int64_t i = begin;
    for (; i + W <= end; i += W) store(to + i, activated<KIND>(load<F>(a + i)) * load<F>(b + i));
    for (; i < end; ++i) to[i] = activated<KIND>(set1(a[i]))[0] * b[i];
  });
}

void gate(const float* pairs, float* out, int64_t rows, int64_t cols, Gate kind, int threads) {
  if (kind == Gate::silu) return gate_of<Gate::silu>(pairs, out, rows, cols, threads);
  gate_of<Gate::gelu_tanh>(pairs, out, rows, cols, threads);
}

// ---------------------------------------------------------------------------------------------------- plain linear

template <int ROWS, int OUTS, class T>
void dense_tile(const float* inputs, const T* weight, const float* bias, float* out, int64_t cols, int64_t out_cols) {
  F sums[ROWS][OUTS] = {};
  int64_t i = 0;
  for (; i + W <= cols; i += W) {
    F weights[OUTS];
    for (int o = 0; o < OUTS; ++o) weights[o] = numbers(weight + o * cols + i);
    for (int r = 0; r < ROWS; ++r) {
      const F input = load<F>(inputs + r * cols + i);
      for (int o = 0; o < OUTS; ++o) sums[r][o] = fma(input, weights[o], sums[r][o]);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int o = 0; o < OUTS; ++o) {
      float total = sum(sums[r][o]);
      for (int64_t j = i; j < cols; ++j) total += inputs[r * cols + j] * number(weight[o * cols + j]);
      out[r * out_cols + o] = bias == nullptr ? total : total + bias[o];
    }
  }
}

template <int ROWS, class T>
void dense_rows(const float* inputs, const T* weight, const float* bias, float* out, int64_t cols, int64_t out_cols,
                int64_t begin, int64_t end) {
  constexpr int kOuts = ROWS == 1 ? 4 : 2;
  int64_t o = begin;
  const auto bias_at = [bias](int64_t place) { return bias == nullptr ? nullptr : bias + place; };
  for (; o + kOuts <= end; o += kOuts)
    dense_tile<ROWS, kOuts>(inputs, weight + o * cols, bias_at(o), out + o, cols, out_cols);
  for (; o < end; ++o) dense_tile<ROWS, 1>(inputs, weight + o * cols, bias_at(o), out + o, cols, out_cols);
}

template <class T>
void dense_of(const float* inputs, const T* weight, const float* bias, float* out, int64_t rows, int64_t cols,
              int64_t out_cols, int threads) {
  constexpr int64_t kPiece = 32, kRows = 4;
  parallel((out_cols + kPiece - 1) / kPiece, threads, [=](int64_t chunk) {
    const int64_t begin = chunk * kPiece, end = smaller(begin + kPiece, out_cols);
    int64_t row = 0;
    for (; row + kRows <= rows; row += kRows)
      dense_rows<kRows>(inputs + row * cols, weight, bias, out + row * out_cols, cols, out_cols, begin, end);
    for (; row < rows; ++row)
      dense_rows<1>(inputs + row * cols, weight, bias, out + row * out_cols, cols, out_cols, begin, end);
  });
}

void dense_linear(const float* inputs, const void* weight, Dtype dtype, const float* bias, float* out, int64_t rows,
                  int64_t cols, int64_t out_cols, int threads) {
  if (dtype == Dtype::f32)
    return dense_of(inputs, static_cast<const float*>(weight), bias, out, rows, cols, out_cols, threads);
  dense_of(inputs, static_cast<const Bf16*>(weight), bias, out, rows, cols, out_cols, threads);
}

// ---------------------------------------------------------------------------------------------------- choice

int64_t largest_index(const float* from, int64_t count) {
  F best = set1(kMinusInf);
  I is_nan{};
  int64_t i = 0;
  for (; i + W <= count; i += W) {
    const F value = load<F>(from + i);
    is_nan |= value != value;
    best = max(value, best);
  }
  bool has_nan = false;
  for (int lane = 0; lane < W; ++lane) has_nan |= is_nan[lane] != 0;
  float top = largest(best);
  for (; i < count; ++i) {
    has_nan |= from[i] != from[i];
    if (from[i] > top) top = from[i];
  }
  for (int64_t j = 0; j < count; ++j)
    if (has_nan ? from[j] != from[j] : from[j] == top) return j;
  return 0;
}

void exponentials(const float* from, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = exponential(from[i]);
}

}  // namespace

extern const DecoderKernels decoder_kernels;
const DecoderKernels decoder_kernels = {add_rms_norm, store_heads,   attend,      gate,
                                        dense_linear, largest_index, exponentials};

}  // namespace ms::MS_LEVEL
