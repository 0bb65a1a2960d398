// linear, one row: bytes times bytes, exact in int32 over a (sub-)chunk, then scaled in float32.
#include "choice.h"
#include "products.h"

namespace ms::MS_LEVEL {
namespace {

template <int BITS, Extra EXTRA, int SUB, int PLANES>
void row_integer(const Weight& w, const Act& act, int64_t group, float* accumulator) {
  using Table = ByteTable<BITS == 8 ? 4 : BITS>;
  const Table table0(w.int_values[0]), table1(w.int_values[1]);
  const U flip = set1u(w.int_offset[0] ? 0x80808080u : 0u);
  const float unit = 1.0f / w.int_step;
  for (int slice = 0; slice < kSlices; ++slice) {
    const uint8_t* chunk = w.codes + group * w.chunks * 64 * BITS + slice * 4 * W;
    F total = F{};
    for (int64_t c = 0; c < w.chunks; ++c, chunk += 64 * BITS) {
      fetch<BITS>(chunk);
      const uint32_t* a = act.packed + c * 8;
MS_UNROLL(2)
      for (int part = 0; part < SUB; ++part) {
        const int64_t at = c * SUB + part;
        const int sum = act.sums[at];
        I dot = set1i(-w.int_offset[0] * sum), odd = I{};
        I high = set1i(PLANES == 2 ? -w.int_offset[1] * sum : 0);
MS_UNROLL(8)
        for (int d = part * 8 / SUB; d < (part + 1) * 8 / SUB; ++d) {
          const U codes = code_bytes<BITS>(chunk, d >> 1, d & 1);
          const I value = set1i(static_cast<int32_t>(a[d]));
          const U bytes = BITS == 8 ? codes ^ flip : table0.look_up(codes);
          if (d & 1)
            odd = dot4<BITS>(odd, bytes, value);
          else
            dot = dot4<BITS>(dot, bytes, value);
          if constexpr (PLANES == 2) high = dot4<BITS>(high, table1.look_up(codes), value);
        }
        dot += odd;
        if constexpr (PLANES == 2) dot += high << 4;
        const int64_t column = scale_column(w, c * kChunk + part * (kChunk / SUB));
        F sums = to_float(dot);
        if constexpr (EXTRA == Extra::zero_point)
          sums -= zero_lane(w, group, column, slice) * set1(static_cast<float>(sum));
        sums = add_extra<EXTRA, SUB>(w, sums, group, column, slice, act.plain + c * kChunk, part, unit);
        total = fma(sums * set1(act.scale[at] * w.int_step), scale_lane(w, group, column, slice), total);
      }
    }
    store(accumulator + slice * W, load<F>(accumulator + slice * W) + total);
  }
}

}  // namespace

Row choose_row_integer(const Weight& w, int32_t sub) {
  return for_integer(w, [sub]<int BITS, Extra EXTRA, int PLANES>() -> Row {
    return sub == 2 ? row_integer<BITS, EXTRA, 2, PLANES> : row_integer<BITS, EXTRA, 1, PLANES>;
  });
}


}  // namespace ms::MS_LEVEL
