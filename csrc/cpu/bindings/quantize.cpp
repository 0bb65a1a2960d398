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
          kernel({at<const Format>(format), static_cast<Dtype>(dtype), at<const void>(values), rows, cols,
                  at<const float>(amax), at<const float>(tensor_amax), at<uint8_t>(codes), at<void>(scale),
                  at<float>(tensor_inv), at<uint8_t>(index), at<void>(zero_point), at<void>(restored), threads},
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
        kernel({at<const Format>(format), static_cast<Dtype>(dtype), rows, cols, at<const uint8_t>(codes),
                at<const void>(scale), at<const float>(tensor_inv), at<const uint8_t>(index),
                at<const void>(zero_point), at<void>(restored), threads});
      },
      "level"_a, "format"_a, "dtype"_a, "rows"_a, "cols"_a, "codes"_a, "scale"_a, "tensor_inv"_a, "index"_a,
      "zero_point"_a, "restored"_a, "threads"_a);
}

}  // namespace ms::bindings
