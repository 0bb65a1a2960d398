// Weights and prepared calls of linear.
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <memory>
#include <new>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "bindings/bindings.h"
#include "format.h"
#include "linear.h"

namespace ms::bindings {
namespace {

// The address of a part of a weight, null where it has none.
template <class T>
T* part(const nb::dict& parts, const char* name) {
  return parts.contains(name) ? pointer<T>(parts, name) : nullptr;
}

template <class To, class From, size_t N>
void copy(To (&to)[N], const From (&from)[N]) {
  for (size_t i = 0; i < N; ++i) to[i] = static_cast<To>(from[i]);
}

// What the kernels are told about a format, taken from its record.
void take_format(Weight& w, const Format& f) {
  const Products& p = f.products;
  w.block = f.block_size;
  w.bits = f.element.bits;
  w.scale_kind = p.scale;
  w.extra = p.extra;
  w.element = p.element;
  w.zero_kind = p.zero;
  copy(w.values, f.element_values);
  copy(w.low_values, p.low_values);
  copy(w.largest_values, p.largest_values);
  copy(w.delta_values, p.delta_values);
  copy(w.zero_values, f.zero_values);
  w.multiplier = f.multiplier;
  w.int_planes = p.int_planes;
  copy(w.int_offset, p.int_offset);
  copy(w.int_values[0], p.int_values[0]);
  copy(w.int_values[1], p.int_values[1]);
  w.int_step = p.int_step;
  w.low_is_int = p.low_is_int;
  w.mantissa_bits = f.element.mantissa_bits;
  w.bias = f.element.bias;
  w.special_code = p.special_code;
  w.is_signed = f.element.is_signed;
  w.bf16_exact = p.bf16_exact;
  copy(w.bf16_values, p.bf16_values);
}

// `scale_values` holds the factor of every 8-bit scale code; wide scales have none.
std::unique_ptr<Weight> make_weight(Pointer format, int64_t rows, int64_t cols, int64_t scale_cols,
                                    const std::vector<float>& scale_values, float tensor_inv, const nb::dict& parts) {
  auto w = std::make_unique<Weight>();
  std::memset(static_cast<void*>(w.get()), 0, sizeof(Weight));
  take_format(*w, *at<const Format>(format));
  w->rows = rows;
  w->cols = cols;
  w->groups = (rows + kLanes - 1) / kLanes;
  w->chunks = (cols + kChunk - 1) / kChunk;
  w->scale_cols = scale_cols;
  if (scale_values.size() > std::size(w->scale_values)) throw std::invalid_argument("too many scale_values");
  std::copy(scale_values.begin(), scale_values.end(), w->scale_values);
  w->tensor_inv = tensor_inv;
  w->codes = part<const uint8_t>(parts, "codes");
  w->scale = part<const void>(parts, "scale");
  w->index = part<const uint8_t>(parts, "index");
  w->largest = part<const uint8_t>(parts, "largest");
  w->zero = part<const void>(parts, "zero_point");
  w->flags = part<const uint8_t>(parts, "subnormals");
  w->sparse_offsets = part<const int32_t>(parts, "sparse_offsets");
  w->sparse_wide = parts.contains("sparse_columns");
  w->sparse_columns = part<const void>(parts, w->sparse_wide ? "sparse_columns" : "sparse_columns_16");
  w->sparse_values = part<const float>(parts, "sparse_values");
  return w;
}

std::unique_ptr<ActFormat> make_act_format(Pointer format) {
  auto act = std::make_unique<ActFormat>();
  act->format = at<const Format>(format);
  copy(act->integers, act->format->products.act_integers);
  copy(act->largest_integers, act->format->products.act_largest);
  act->step = act->format->products.act_step;
  return act;
}

// -------- superseded: what callers built before the records of format.h held the products of linear

template <class T, size_t N>
void fill(T (&to)[N], const nb::dict& from, const char* name) {
  const auto values = nb::cast<std::vector<T>>(from[name]);
  if (values.size() > N) throw std::invalid_argument(std::string("table too long: ") + name);
  std::copy(values.begin(), values.end(), to);
}

std::unique_ptr<Weight> make_described_weight(const nb::dict& d) {
  auto w = std::make_unique<Weight>();
  std::memset(static_cast<void*>(w.get()), 0, sizeof(Weight));
  w->rows = get<int64_t>(d, "rows");
  w->cols = get<int64_t>(d, "cols");
  w->groups = (w->rows + kLanes - 1) / kLanes;
  w->chunks = (w->cols + kChunk - 1) / kChunk;
  w->scale_cols = get<int64_t>(d, "scale_cols");
  w->block = get<int64_t>(d, "block");
  w->bits = get<int32_t>(d, "bits");
  w->scale_kind = static_cast<ScaleKind>(get<int32_t>(d, "scale_kind"));
  w->extra = static_cast<Extra>(get<int32_t>(d, "extra"));
  w->element = static_cast<ElementKind>(get<int32_t>(d, "element"));
  w->zero_kind = static_cast<ZeroKind>(get<int32_t>(d, "zero_kind"));
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
  w->low_is_int = get<int32_t>(d, "low_is_int");
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

std::unique_ptr<ActFormat> make_listed_act_format(Pointer format, const std::vector<int>& integers,
                                               const std::vector<int>& largest_integers, float step) {
  auto act = std::make_unique<ActFormat>();
  act->format = at<const Format>(format);
  for (size_t i = 0; i < 256; ++i) {
    act->integers[i] = static_cast<int8_t>(i < integers.size() ? integers[i] : 0);
    act->largest_integers[i] = static_cast<int8_t>(i < largest_integers.size() ? largest_integers[i] : 0);
  }
  act->step = step;
  return act;
}

// (first column, columns, rule, terms, activation format), (weight, input), (rows, first column, first segment, count,
// bias)
using InputRow = std::tuple<int64_t, int64_t, int32_t, int32_t, nb::object>;
using OutputRow = std::tuple<int64_t, int64_t, int32_t, int32_t, Pointer>;

std::unique_ptr<LinearCall> make_linear_call(const std::vector<InputRow>& inputs, const nb::list& weights,
                                                 const std::vector<int32_t>& weight_inputs,
                                                 const std::vector<OutputRow>& outputs, int combine, int dtype,
                                                 int64_t input_stride, int64_t output_stride) {
  auto call = std::make_unique<LinearCall>();
  for (const auto& [first, cols, rule, terms, act] : inputs)
    call->inputs.push_back({first, cols, static_cast<ActRule>(rule), terms,
                            act.is_none() ? nullptr : nb::cast<const ActFormat*>(act)});
  for (size_t i = 0; i < weights.size(); ++i)
    call->segments.push_back({nb::cast<const Weight*>(weights[i]), weight_inputs.at(i)});
  for (const auto& [rows, column, first, count, bias] : outputs)
    call->outputs.push_back({rows, column, first, count, reinterpret_cast<const float*>(bias)});
  call->combine = static_cast<Combine>(combine);
  call->dtype = static_cast<Dtype>(dtype);
  call->input_stride = input_stride;
  call->output_stride = output_stride;
  return call;
}

}  // namespace

void bind_linear(nb::module_& m) {
  nb::class_<Weight>(m, "Weight");
  nb::class_<ActFormat>(m, "ActFormat");
  nb::class_<LinearCall>(m, "LinearCall")
      .def(
          "__init__",
          [](LinearCall* self, int combine, int dtype, int64_t input_stride, int64_t output_stride) {
            new (self) LinearCall{.combine = static_cast<Combine>(combine), .dtype = static_cast<Dtype>(dtype),
                                  .input_stride = input_stride, .output_stride = output_stride};
          },
          nb::kw_only(), "combine"_a, "dtype"_a, "input_stride"_a, "output_stride"_a)
      .def(
          "add_input",
          [](LinearCall& call, int64_t first_column, int64_t cols, int rule, int32_t terms, const ActFormat* act) {
            call.inputs.push_back({.first_column = first_column, .cols = cols, .rule = static_cast<ActRule>(rule),
                                   .terms = terms, .act = act});
          },
          nb::kw_only(), "first_column"_a, "cols"_a, "rule"_a, "terms"_a, "act"_a.none())
      .def(
          "add_segment",
          [](LinearCall& call, const Weight& weight, int32_t input) {
            call.segments.push_back({.weight = &weight, .input = input});
          },
          nb::kw_only(), "weight"_a, "input"_a)
      .def(
          "add_output",
          [](LinearCall& call, int64_t rows, int64_t first_column, int32_t first, int32_t count, Pointer bias) {
            call.outputs.push_back({.rows = rows, .first_column = first_column, .first = first, .count = count,
                                    .bias = at<const float>(bias)});
          },
          nb::kw_only(), "rows"_a, "first_column"_a, "first"_a, "count"_a, "bias"_a);
  m.def("make_act_format", &make_act_format, "format"_a);
  m.def("make_weight", &make_weight, nb::kw_only(), "format"_a, "rows"_a, "cols"_a, "scale_cols"_a, "scale_values"_a,
        "tensor_inv"_a, "parts"_a);
  // superseded
  m.def("make_act_format", &make_listed_act_format, "format"_a, "integers"_a, "largest_integers"_a, "step"_a);
  m.def("make_weight", &make_described_weight, "description"_a);
  m.def("make_linear_call", &make_linear_call, "inputs"_a, "weights"_a, "weight_inputs"_a, "outputs"_a, "combine"_a,
        "dtype"_a, "input_stride"_a, "output_stride"_a);
  m.def(
      "linear",
      [](int level, const LinearCall& call, Pointer x, int64_t rows, Pointer out, Pointer bias, int threads) {
        const Kernels& kernels = kernels_at(level);
        nb::gil_scoped_release release;
        linear(call, kernels, at<const void>(x), rows, at<void>(out), at<const float>(bias), threads);
      },
      "level"_a, "call"_a, "x"_a, "rows"_a, "out"_a, "bias"_a, "threads"_a);
}

}  // namespace ms::bindings
