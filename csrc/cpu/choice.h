// From a weight's values to the template arguments of a kernel, and the kernels that each source in kernels/ offers.
#pragma once

#include "linear.h"

namespace ms::MS_LEVEL {

using Row = LinearKernels::Row;
using Block = LinearKernels::Block;

// Each returns null where there is no such kernel at this level.
Row choose_row_integer(const Weight& w, int32_t sub);
Row choose_row_f32(const Weight& w, int32_t sub);
Row choose_row_bf16(const Weight& w, int32_t sub, int32_t parts);
Block choose_block_integer(const Weight& w, int32_t sub);
Block choose_block_f32(const Weight& w);

// Calls make.template operator()<BITS>() for the number of bits, one of those listed, or returns null.
template <int... BITS, class Make>
auto for_bits(int32_t bits, const Make& make) -> decltype(make.template operator()<4>()) {
  decltype(make.template operator()<4>()) found = nullptr;
  ((bits == BITS ? void(found = make.template operator()<BITS>()) : void()), ...);
  return found;
}

// Calls make.template operator()<BITS, EXTRA, PLANES>() for the weight's values, or returns null.
template <class Make>
auto for_integer(const Weight& w, const Make& make) -> decltype(make.template operator()<4, Extra::none, 1>()) {
  if (w.int_planes == 0) return nullptr;
  if (w.int_planes == 2)
    return w.bits == 6 && w.extra == Extra::none ? make.template operator()<6, Extra::none, 2>() : nullptr;
  const auto with = [&]<Extra EXTRA>() {
    return [&]<int BITS>() { return make.template operator()<BITS, EXTRA, 1>(); };
  };
  switch (w.extra) {
    case Extra::none: return for_bits<2, 3, 4, 5, 6, 8>(w.bits, with.template operator()<Extra::none>());
    case Extra::zero_point: return for_bits<2, 3, 4, 8>(w.bits, with.template operator()<Extra::zero_point>());
    case Extra::low: return for_bits<4, 6, 8>(w.bits, with.template operator()<Extra::low>());
    default: return for_bits<4, 6>(w.bits, with.template operator()<Extra::largest>());
  }
}

// The same for floats: make.template operator()<KIND, BITS, EXTRA>().
template <Extra EXTRA, class Make>
auto for_float_extra(const Weight& w, const Make& make)
    -> decltype(make.template operator()<ElementKind::table, 4, EXTRA>()) {
  if (w.element == ElementKind::integer) return make.template operator()<ElementKind::integer, 8, EXTRA>();
  if (w.element == ElementKind::float8) {
    if constexpr (EXTRA != Extra::zero_point) return make.template operator()<ElementKind::float8, 8, EXTRA>();
    return nullptr;
  }
  return for_bits<2, 3, 4, 5, 6, 7, 8>(
      w.bits, [&]<int BITS>() { return make.template operator()<ElementKind::table, BITS, EXTRA>(); });
}

template <class Make>
auto for_float(const Weight& w, const Make& make) -> decltype(make.template operator()<ElementKind::table, 4, Extra::none>()) {
  switch (w.extra) {
    case Extra::none: return for_float_extra<Extra::none>(w, make);
    case Extra::low: return for_float_extra<Extra::low>(w, make);
    case Extra::largest: return for_float_extra<Extra::largest>(w, make);
    default: return for_float_extra<Extra::zero_point>(w, make);
  }
}

}  // namespace ms::MS_LEVEL
