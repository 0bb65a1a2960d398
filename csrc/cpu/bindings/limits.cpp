// What the machine can do at most: reading, multiplying and adding, writing.
#include <vector>

#include "bindings/bindings.h"
#include "pool.h"

namespace ms::bindings {

void bind_limits(nb::module_& m) {
  m.def(
      "read_bytes",
      [](int level, Pointer from, int64_t bytes, int threads) {
        const auto& kernel = kernels_at(level).limit->read_bytes;
        nb::gil_scoped_release release;
        const int64_t piece = (bytes / threads) & ~int64_t{255};
        std::vector<uint64_t> sums(threads);
        parallel(threads, threads, [&](int64_t chunk) {
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
        const auto& kernel = kernels_at(level).limit->multiply_add;
        nb::gil_scoped_release release;
        std::vector<int64_t> flops(threads);
        std::vector<float> values(threads);
        parallel(threads, threads, [&](int64_t chunk) { values[chunk] = kernel(rounds, &flops[chunk]); });
        int64_t total = 0;
        for (int64_t count : flops) total += count;
        return total;
      },
      "level"_a, "rounds"_a, "threads"_a);
  m.def(
      "fill_bytes",
      [](int level, Pointer to, int64_t bytes, int threads, bool past_caches) {
        const auto& limits = *kernels_at(level).limit;
        const auto kernel = past_caches ? limits.fill_bytes_streaming : limits.fill_bytes;
        nb::gil_scoped_release release;
        const int64_t piece = (bytes / threads) & ~int64_t{255};
        parallel(threads, threads,
                     [&](int64_t chunk) { kernel(reinterpret_cast<char*>(to) + chunk * piece, piece); });
      },
      "level"_a, "start"_a, "bytes"_a, "threads"_a, "past_caches"_a);
}

}  // namespace ms::bindings
