// Python bindings of the CPU kernels: raw pointers and sizes in, nothing kept. The GIL is released around every kernel.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "format.h"
#include "kernels.h"
#include "pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Pointer = uintptr_t;

template <class T>
T* at(Pointer address) {
  return reinterpret_cast<T*>(address);
}

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

  // ------------------------------------------------------------------------------------------------ quantize
  // Pointers that are 0 are absent; see QuantizeArgs and DequantizeArgs in kernels.h.
  m.attr("FORMAT_BYTES") = sizeof(ms::Format);
  m.def(
      "quantize",
      [](int level, Pointer format, int dtype, Pointer values, int64_t rows, int64_t cols, Pointer amax,
         Pointer tensor_amax, Pointer codes, Pointer scale, Pointer tensor_inv, Pointer index, Pointer zero_point,
         Pointer restored, int threads) {
        const auto& kernel = kernels_at(level).quantize->quantize;
        int64_t counts[3] = {};
        {
          nb::gil_scoped_release release;
          kernel({at<const ms::Format>(format), static_cast<ms::Dtype>(dtype), at<const void>(values), rows, cols,
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
        kernel({at<const ms::Format>(format), static_cast<ms::Dtype>(dtype), rows, cols, at<const uint8_t>(codes),
                at<const void>(scale), at<const float>(tensor_inv), at<const uint8_t>(index),
                at<const void>(zero_point), at<void>(restored), threads});
      },
      "level"_a, "format"_a, "dtype"_a, "rows"_a, "cols"_a, "codes"_a, "scale"_a, "tensor_inv"_a, "index"_a,
      "zero_point"_a, "restored"_a, "threads"_a);
}
