// The fused operations; see FusedArgs in kernels.h. With `result` 0 the parts of a quantized tensor are written.
#include "bindings/bindings.h"
#include "format.h"

namespace ms::bindings {

void bind_fused(nb::module_& m) {
  m.def(
      "fused",
      [](int level, int operation, int dtype, Pointer values, int64_t rows, int64_t cols, int64_t source_cols,
         Pointer other, int other_dtype, Pointer columns, Pointer signs, int64_t size, float eps, Pointer result,
         Pointer format, Pointer codes, Pointer scale, Pointer index, Pointer zero_point, int threads) {
        const auto& kernel = kernels_at(level).fused->fused;
        int64_t counts[3] = {}, outside = 0;
        {
          nb::gil_scoped_release release;
          QuantizeArgs out = {};
          out.format = at<const Format>(format), out.dtype = static_cast<Dtype>(dtype);
          out.codes = at<uint8_t>(codes), out.scale = at<void>(scale);
          out.index = at<uint8_t>(index), out.zero_point = at<void>(zero_point);
          outside = kernel({.operation = static_cast<FusedOperation>(operation), .dtype = static_cast<Dtype>(dtype),
                            .values = at<const void>(values), .rows = rows, .cols = cols, .source_cols = source_cols,
                            .other = at<const void>(other), .other_dtype = static_cast<Dtype>(other_dtype),
                            .columns = at<const int64_t>(columns), .signs = at<const float>(signs), .size = size,
                            .eps = eps, .result = at<void>(result), .threads = threads},
                           out, counts);
        }
        return nb::make_tuple(outside, counts[0], counts[1], counts[2]);
      },
      "level"_a, "operation"_a, "dtype"_a, "values"_a, "rows"_a, "cols"_a, "source_cols"_a, "other"_a, "other_dtype"_a,
      "columns"_a, "signs"_a, "size"_a, "eps"_a, "result"_a, "format"_a, "codes"_a, "scale"_a, "index"_a,
      "zero_point"_a, "threads"_a);
}

}  // namespace ms::bindings
