// What the sources of the bindings share: raw pointers and sizes in, nothing kept. The GIL is released around every
// kernel.
#pragma once

#include <nanobind/nanobind.h>

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace ms::bindings {

namespace nb = nanobind;
using namespace nb::literals;

using Pointer = uintptr_t;

template <class T = float>
T* at(Pointer address) {
  return reinterpret_cast<T*>(address);
}

inline const Kernels& kernels_at(int level) {
  if (level >= 0 && level < kNumLevels)
    if (const Kernels* found = kernels_of(static_cast<Level>(level))) return *found;
  throw std::invalid_argument("this machine or build has no instruction-set level " + std::to_string(level));
}

// A field of a description that Python filled by name.
template <class T>
T get(const nb::dict& from, const char* name) {
  return nb::cast<T>(from[name]);
}

template <class T>
T* pointer(const nb::dict& from, const char* name) {
  return at<T>(nb::cast<Pointer>(from[name]));
}

void bind_limits(nb::module_& m);
void bind_linear(nb::module_& m);
void bind_quantize(nb::module_& m);
void bind_fused(nb::module_& m);
void bind_decoder(nb::module_& m);
void bind_layout(nb::module_& m);

}  // namespace ms::bindings
