// The exponential of every kernel, and the SiLU that is made of it.
#pragma once

#include "vec.h"

namespace ms::MS_LEVEL {

// e^x within 3 units of the last place of the result; 0 below -104, Inf above 88.73, NaN stays.
MS_INLINE F exponential(F x) {
  const F bounded = min(max(x, set1(-104.0f)), set1(88.73f));
  const F n = round_even(bounded * set1(1.44269504f));
  F r = fma(n, set1(-0x1.62e4p-1f), bounded);  // ln 2 in two parts: n times the first, 16 bits, is exact
  r = fma(n, set1(-1.42860677e-6f), r);
  F p = set1(1.0f / 5040);  // the series to r^7: |r| <= ln 2 / 2, so what is left out is below 2^-27
  p = fma(p, r, set1(1.0f / 720));
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  const F value = fma(p * r, r, r) + set1(1.0f);
  // 2^n in two factors, so that results near both ends of float32 are right.
  const I whole = to_int(n), half = whole >> 1;
  const F first = as<F>((half + 127) << 23), second = as<F>((whole - half + 127) << 23);
  F result = value * first * second;
  result = select(x > set1(88.73f), set1(__builtin_inff()), result);
  return select(x == x, result, x);
}

MS_INLINE float exponential(float x) { return exponential(set1(x))[0]; }

// x / (1 + e^-x): -0 below -88.73, where it should be above -2^-120; NaN of -Inf and of NaN.
MS_INLINE F silu(F x) { return x / (exponential(-x) + set1(1.0f)); }

}  // namespace ms::MS_LEVEL
