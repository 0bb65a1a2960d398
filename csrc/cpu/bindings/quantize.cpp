// quantize and dequantize. Pointers that are 0 are absent; see QuantizeArgs and DequantizeArgs in kernels.h.
#include "bindings/bindings.h"
#include "format.h"
#include "memory.h"

namespace ms::bindings {

void bind_quantize(nb::module_& m) {
  m.attr("FORMAT_BYTES") = sizeof(Format);
  m.def(
      "prepare_memory", [](Pointer memory, int64_t bytes) { prepare_memory(at<void>(memory), bytes); }, "memory"_a,
      "bytes"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "quantize",
      [](int level, Pointer format, int dtype, Pointer values, int64_t rows, int64_t cols, Pointer amax,
         Pointer tensor_amax, Pointer codes, Pointer scale, Pointer tensor_inv, Pointer index, Pointer zero_point,
         Pointer restored, int threads) {
        const auto& kernel = kernels_at(level).quantize->quantize;
        int64_t counts[3] = {};
        {
          nb::gil_scoped_release release;
          kernel({.format = at<const Format>(format),
                  .dtype = static_cast<Dtype>(dtype),
                  .values = at<const void>(values),
                  .rows = rows,
                  .cols = cols,
                  .amax = at<const float>(amax),
                  .tensor_amax = at<const float>(tensor_amax),
                  .codes = at<uint8_t>(codes),
                  .scale = at<void>(scale),
                  .tensor_inv = at<float>(tensor_inv),
                  .index = at<uint8_t>(index),
                  .zero_point = at<void>(zero_point),
                  .restored = at<void>(restored),
                  .threads = threads},
                 counts);
        }
        return nb::make_tuple(counts[0], counts[1], counts[2]);
      },
      "level"_a, "format"_a, "dtype"_a, "values"_a, "rows"_a, "cols"_a, "amax"_a, "tensor_amax"_a, "codes"_a,
      "scale"_a, "tensor_inv"_a, "index"_a, "zero_point"_a, "restored"_a, "threads"_a);
  m.def(
      "dequantize",
      [](int level, Pointer format, int dtype, int64_t rows, int64_t cols, Pointer codes, Pointer scale,
         Pointer tensor_inv, Pointer index, Pointer zero_point, Pointer restored, int threads) {
        const auto& kernel = kernels_at(level).dequantize->dequantize;
        nb::gil_scoped_release release;
        kernel({.format = at<const Format>(format),
                .dtype = static_cast<Dtype>(dtype),
                .rows = rows,
                .cols = cols,
                .codes = at<const uint8_t>(codes),
                .scale = at<const void>(scale),
                .tensor_inv = at<const float>(tensor_inv),
                .index = at<const uint8_t>(index),
                .zero_point = at<const void>(zero_point),
                .restored = at<void>(restored),
                .threads = threads});
      },
      "level"_a, "format"_a, "dtype"_a, "rows"_a, "cols"_a, "codes"_a, "scale"_a, "tensor_inv"_a, "index"_a,
      "zero_point"_a, "restored"_a, "threads"_a);
}

}  // namespace ms::bindings
