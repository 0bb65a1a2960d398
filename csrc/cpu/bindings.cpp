// Python bindings of the CPU kernels: raw pointers and sizes in, nothing kept. The GIL is released around every kernel.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "linear.h"
#include "pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Pointer = uintptr_t;

const ms::Kernels& kernels_at(int level) {
  if (level >= 0 && level < ms::kNumLevels)
    if (const ms::Kernels* found = ms::kernels_of(static_cast<ms::Level>(level))) return *found;
  throw std::invalid_argument("this machine or build has no instruction-set level " + std::to_string(level));
}

std::vector<std::pair<int, std::string>> levels() {
  std::vector<std::pair<int, std::string>> found;
  for (int index = 0; index < ms::kNumLevels; ++index)
    if (const ms::Kernels* kernels = ms::kernels_of(static_cast<ms::Level>(index)))
      found.emplace_back(index, kernels->name);
  return found;
}

// ---------------------------------------------------------------------------------------------------- linear

template <class T>
T get(const nb::dict& from, const char* name) {
  return nb::cast<T>(from[name]);
}

template <class T>
const T* pointer(const nb::dict& from, const char* name) {
  return reinterpret_cast<const T*>(nb::cast<Pointer>(from[name]));
}

template <class T, size_t N>
void fill(T (&to)[N], const nb::dict& from, const char* name) {
  const auto values = nb::cast<std::vector<T>>(from[name]);
  if (values.size() > N) throw std::invalid_argument(std::string("table too long: ") + name);
  std::copy(values.begin(), values.end(), to);
}

std::unique_ptr<ms::Weight> make_weight(const nb::dict& d) {
  auto w = std::make_unique<ms::Weight>();
  std::memset(static_cast<void*>(w.get()), 0, sizeof(ms::Weight));
  w->rows = get<int64_t>(d, "rows");
  w->cols = get<int64_t>(d, "cols");
  w->groups = (w->rows + ms::kLanes - 1) / ms::kLanes;
  w->chunks = (w->cols + ms::kChunk - 1) / ms::kChunk;
  w->scale_cols = get<int64_t>(d, "scale_cols");
  w->block = get<int64_t>(d, "block");
  w->bits = get<int32_t>(d, "bits");
  w->scale_kind = static_cast<ms::ScaleKind>(get<int32_t>(d, "scale_kind"));
  w->extra = static_cast<ms::Extra>(get<int32_t>(d, "extra"));
  w->element = static_cast<ms::ElementKind>(get<int32_t>(d, "element"));
  w->zero_kind = static_cast<ms::ZeroKind>(get<int32_t>(d, "zero_kind"));
  w->codes = pointer<uint8_t>(d, "codes");
  w->scale = pointer<void>(d, "scale");
  w->index = pointer<uint8_t>(d, "index");
  w->largest = pointer<uint8_t>(d, "largest");
  w->zero = pointer<void>(d, "zero_point");
  w->flags = pointer<uint8_t>(d, "subnormals");
  fill(w->values, d, "values");
  fill(w->scale_values, d, "scale_values");
  fill(w->low_values, d, "low_values");
  fill(w->largest_values, d, "largest_values");
  fill(w->delta_values, d, "delta_values");
  fill(w->zero_values, d, "zero_values");
  w->multiplier = get<float>(d, "multiplier");
  w->tensor_inv = get<float>(d, "tensor_inv");
  w->int_planes = get<int32_t>(d, "int_planes");
  fill(w->int_offset, d, "int_offset");
  fill(w->int_values[0], d, "int_values");
  fill(w->int_values[1], d, "int_high_values");
  w->int_step = get<float>(d, "int_step");
  w->mantissa_bits = get<int32_t>(d, "mantissa_bits");
  w->bias = get<int32_t>(d, "bias");
  w->special_code = get<int32_t>(d, "special_code");
  w->is_signed = get<int32_t>(d, "is_signed");
  w->bf16_exact = get<int32_t>(d, "bf16_exact");
  fill(w->bf16_values, d, "bf16_values");
  w->sparse_offsets = pointer<int32_t>(d, "sparse_offsets");
  w->sparse_columns = pointer<void>(d, "sparse_columns");
  w->sparse_values = pointer<float>(d, "sparse_values");
  w->sparse_wide = get<int32_t>(d, "sparse_wide");
  return w;
}

// (first column, columns, rule, terms), (weight, input), (rows, first column, first segment, count, bias)
using InputRow = std::tuple<int64_t, int64_t, int32_t, int32_t>;
using OutputRow = std::tuple<int64_t, int64_t, int32_t, int32_t, Pointer>;

std::unique_ptr<ms::LinearCall> make_linear_call(const std::vector<InputRow>& inputs, const nb::list& weights,
                                                 const std::vector<int32_t>& weight_inputs,
                                                 const std::vector<OutputRow>& outputs, int combine, int dtype,
                                                 int64_t input_stride, int64_t output_stride) {
  auto call = std::make_unique<ms::LinearCall>();
  for (const auto& [first, cols, rule, terms] : inputs)
    call->inputs.push_back({first, cols, static_cast<ms::ActRule>(rule), terms});
  for (size_t i = 0; i < weights.size(); ++i)
    call->segments.push_back({nb::cast<const ms::Weight*>(weights[i]), weight_inputs.at(i)});
  for (const auto& [rows, column, first, count, bias] : outputs)
    call->outputs.push_back({rows, column, first, count, reinterpret_cast<const float*>(bias)});
  call->combine = static_cast<ms::Combine>(combine);
  call->dtype = static_cast<ms::Dtype>(dtype);
  call->input_stride = input_stride;
  call->output_stride = output_stride;
  return call;
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("levels", [] {
    nb::list result;
    for (const auto& [index, name] : levels()) result.append(nb::make_tuple(index, name));
    return result;
  });
  m.def("best_level", [] { return static_cast<int>(ms::best_level()); });

  // ------------------------------------------------------------------------------------------------ limits
  m.def(
      "read_bytes",
      [](int level, Pointer from, int64_t bytes, int threads) {
        const auto& kernel = kernels_at(level).limits->read_bytes;
        nb::gil_scoped_release release;
        const int64_t piece = (bytes / threads) & ~int64_t{255};
        std::vector<uint64_t> sums(threads);
        ms::parallel(threads, threads, [&](int64_t chunk) {
          sums[chunk] = kernel(reinterpret_cast<const char*>(from) + chunk * piece, piece);
        });
        uint64_t total = 0;
        for (uint64_t sum : sums) total += sum;
        return total;
      },
      "level"_a, "start"_a, "bytes"_a, "threads"_a);
  m.def(
      "multiply_add",
      [](int level, int64_t rounds, int threads) {
        const auto& kernel = kernels_at(level).limits->multiply_add;
        nb::gil_scoped_release release;
        std::vector<int64_t> flops(threads);
        std::vector<float> values(threads);
        ms::parallel(threads, threads, [&](int64_t chunk) { values[chunk] = kernel(rounds, &flops[chunk]); });
        int64_t total = 0;
        for (int64_t count : flops) total += count;
        return total;
      },
      "level"_a, "rounds"_a, "threads"_a);
  m.def(
      "fill_bytes",
      [](int level, Pointer to, int64_t bytes, int threads, bool past_caches) {
        const auto& limits = *kernels_at(level).limits;
        const auto kernel = past_caches ? limits.fill_bytes_streaming : limits.fill_bytes;
        nb::gil_scoped_release release;
        const int64_t piece = (bytes / threads) & ~int64_t{255};
        ms::parallel(threads, threads,
                     [&](int64_t chunk) { kernel(reinterpret_cast<char*>(to) + chunk * piece, piece); });
      },
      "level"_a, "start"_a, "bytes"_a, "threads"_a, "past_caches"_a);

  // ------------------------------------------------------------------------------------------------ linear
  nb::class_<ms::Weight>(m, "Weight");
  nb::class_<ms::LinearCall>(m, "LinearCall");
  m.def("make_weight", &make_weight, "description"_a);
  m.def("make_linear_call", &make_linear_call, "inputs"_a, "weights"_a, "weight_inputs"_a, "outputs"_a, "combine"_a,
        "dtype"_a, "input_stride"_a, "output_stride"_a);
  m.def(
      "linear",
      [](int level, const ms::LinearCall& call, Pointer x, int64_t rows, Pointer out, int threads) {
        const ms::Kernels& kernels = kernels_at(level);
        nb::gil_scoped_release release;
        ms::linear(call, kernels, reinterpret_cast<const void*>(x), rows, reinterpret_cast<void*>(out), threads);
      },
      "level"_a, "call"_a, "x"_a, "rows"_a, "out"_a, "threads"_a);
}
