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

// Calls make.template operator()<BITS, EXTRA, PLANES>() for the weight's values, or returns null.
template <class Make>
auto for_integer(const Weight& w, const Make& make) -> decltype(make.template operator()<4, Extra::none, 1>()) {
  if (w.int_planes == 0) return nullptr;
  if (w.int_planes == 2)
    return w.bits == 6 && w.extra == Extra::none ? make.template operator()<6, Extra::none, 2>() : nullptr;
  if (w.extra == Extra::none) {
    switch (w.bits) {
      case 2: return make.template operator()<2, Extra::none, 1>();
      case 3: return make.template operator()<3, Extra::none, 1>();
      case 4: return make.template operator()<4, Extra::none, 1>();
      case 5: return make.template operator()<5, Extra::none, 1>();
      case 6: return make.template operator()<6, Extra::none, 1>();
      case 8: return make.template operator()<8, Extra::none, 1>();
      default: return nullptr;
    }
  }
  if (w.extra == Extra::zero_point) {
    switch (w.bits) {
      case 2: return make.template operator()<2, Extra::zero_point, 1>();
      case 3: return make.template operator()<3, Extra::zero_point, 1>();
      case 4: return make.template operator()<4, Extra::zero_point, 1>();
      case 8: return make.template operator()<8, Extra::zero_point, 1>();
      default: return nullptr;
    }
  }
  if (w.extra == Extra::low) {
    switch (w.bits) {
      case 4: return make.template operator()<4, Extra::low, 1>();
      case 6: return make.template operator()<6, Extra::low, 1>();
      case 8: return make.template operator()<8, Extra::low, 1>();
      default: return nullptr;
    }
  }
  switch (w.bits) {
    case 4: return make.template operator()<4, Extra::largest, 1>();
    case 6: return make.template operator()<6, Extra::largest, 1>();
    default: return nullptr;
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
  switch (w.bits) {
    case 2: return make.template operator()<ElementKind::table, 2, EXTRA>();
    case 3: return make.template operator()<ElementKind::table, 3, EXTRA>();
    case 4: return make.template operator()<ElementKind::table, 4, EXTRA>();
    case 5: return make.template operator()<ElementKind::table, 5, EXTRA>();
    case 6: return make.template operator()<ElementKind::table, 6, EXTRA>();
    case 7: return make.template operator()<ElementKind::table, 7, EXTRA>();
    default: return make.template operator()<ElementKind::table, 8, EXTRA>();
  }
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
