// The codes of a matrix to the layout rows16.
#include <atomic>
#include <new>

#include "bindings/bindings.h"
#include "pool.h"

namespace ms::bindings {

void bind_layout(nb::module_& m) {
  m.def(
      "pack_rows16",
      [](int level, const nb::dict& from, int threads) {
        LayoutArgs args{};
        args.bits = get<int>(from, "bits");
        args.rows = get<int64_t>(from, "rows"), args.cols = get<int64_t>(from, "cols");
        args.row_bytes = get<int64_t>(from, "row_bytes");
        args.codes = pointer<const uint8_t>(from, "codes");
        args.packed = pointer<uint8_t>(from, "packed");
        args.subnormals = pointer<uint8_t>(from, "subnormals");
        args.magnitude_mask = get<int>(from, "magnitude_mask"), args.num_mantissas = get<int>(from, "num_mantissas");
        args.max_code = get<int>(from, "max_code");
        args.place = pointer<const uint8_t>(from, "place");
        args.side = pointer<uint8_t>(from, "side");
        args.grid_cols = get<int64_t>(from, "grid_cols"), args.block_size = get<int64_t>(from, "block_size");
        args.zero_block = get<int>(from, "zero_block");
        args.is_compact = get<bool>(from, "is_compact"), args.is_int = get<bool>(from, "is_int");
        args.low_bits = get<int>(from, "low_bits"), args.magnitude_bits = get<int>(from, "magnitude_bits");
        args.first_code = get<int>(from, "first_code");
        const auto& kernel = kernels_at(level).layout->pack_rows16;
        bool ok = true;
        {
          nb::gil_scoped_release release;
          std::atomic<bool> fine{true};
          parallel((args.rows + 15) / 16, threads, [&](int64_t group) {
            if (!kernel(args, group)) fine = false;
          });
          ok = fine;
        }
        if (!ok) throw std::bad_alloc();
      },
      "level"_a, "args"_a, "threads"_a);
}

}  // namespace ms::bindings
