// Python bindings of the CPU kernels: raw pointers and sizes in, nothing kept. The GIL is released around every kernel.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
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
}
