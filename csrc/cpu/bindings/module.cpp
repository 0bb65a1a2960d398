// The extension module.
#include <nanobind/stl/string.h>

#include <cctype>
#include <cstddef>
#include <sstream>
#include <string>

#include "bindings/bindings.h"
#include "bindings/fields.h"

namespace {

namespace nb = nanobind;

// The members of an enum by name, in capitals as Python spells them.
nb::dict members(const char* names) {
  nb::dict found;
  std::istringstream words(names);
  int count = 0;
  for (std::string word; std::getline(words >> std::ws, word, ',');) {
    for (char& letter : word) letter = static_cast<char>(std::toupper(static_cast<unsigned char>(letter)));
    found[word.c_str()] = count++;
  }
  return found;
}

nb::dict enums() {
  nb::dict found;
#define MS_EXPORT(name) found[#name] = members(ms::name##_members);
  MS_EXPORTED_ENUMS(MS_EXPORT)
#undef MS_EXPORT
  return found;
}

// Where each field of the records in format.h lies, in bytes.
nb::dict fields() {
  nb::dict number, format, products;
#define MS_FIELD(type, into, name) into[#name] = offsetof(ms::type, name);
#define MS_NUMBER(name) MS_FIELD(Number, number, name)
#define MS_FORMAT(name) MS_FIELD(Format, format, name)
#define MS_PRODUCTS(name) MS_FIELD(Products, products, name)
  MS_NUMBER_FIELDS(MS_NUMBER)
  MS_FORMAT_FIELDS(MS_FORMAT)
  MS_PRODUCTS_FIELDS(MS_PRODUCTS)
  nb::dict found;
  found["Number"] = number, found["Format"] = format, found["Products"] = products;
  return found;
}

}  // namespace

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
  m.def("enums", &enums);
  m.def("fields", &fields);
  bind_limits(m);
  bind_linear(m);
  bind_quantize(m);
  bind_fused(m);
  bind_decoder(m);
  bind_layout(m);
}
