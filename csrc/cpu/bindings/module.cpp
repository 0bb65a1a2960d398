// The extension module.
#include <nanobind/stl/string.h>

#include "bindings/bindings.h"

NB_MODULE(_native, m) {
  using namespace ms::bindings;
  nb::set_leak_warnings(false);  // prepared calls are remembered until the process ends
  m.def("levels", [] {
    nb::list found;
    for (int index = 0; index < ms::kNumLevels; ++index)
      if (const ms::Kernels* kernels = ms::kernels_of(static_cast<ms::Level>(index)))
        found.append(nb::make_tuple(index, kernels->name));
    return found;
  });
  m.def("best_level", [] { return static_cast<int>(ms::best_level()); });
  bind_limits(m);
  bind_linear(m);
  bind_quantize(m);
  bind_fused(m);
  bind_decoder(m);
  bind_layout(m);
}
