// Weights and prepared calls of linear.
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <memory>
#include <new>
#include <stdexcept>
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
