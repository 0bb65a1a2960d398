// linear, one row: elements that become floats by a table, by their fields or as small integers, times float32.
#include "choice.h"
#include "products.h"

namespace ms::MS_LEVEL {
namespace {

template <ElementKind KIND, int BITS, Extra EXTRA, int SUB>
void row_f32(const Weight& w, const Act& act, int64_t group, float* accumulator) {
  const FloatDecoder<KIND, BITS> decoder(w);
  for (int slice = 0; slice < kSlices; ++slice) {
    const uint8_t* chunk = w.codes + group * w.chunks * 64 * BITS + slice * 4 * W;
    F total = F{};
    for (int64_t c = 0; c < w.chunks; ++c, chunk += 64 * BITS) {
      fetch<BITS>(chunk);
      const float* a = act.plain + c * kChunk;
      for (int part = 0; part < SUB; ++part) {
        const int64_t column = scale_column(w, c * kChunk + part * (kChunk / SUB));
        F zero = F{};
        if constexpr (EXTRA == Extra::zero_point) zero = zero_lane(w, group, column, slice);
        F dot = chunk_dot<KIND, BITS, EXTRA, SUB>(decoder, chunk, a, part, zero);
        dot = add_extra<EXTRA, SUB>(w, dot, group, column, slice, a, part, 1.0f);
        total = fma(dot, scale_lane(w, group, column, slice), total);
      }
    }
    store(accumulator + slice * W, load<F>(accumulator + slice * W) + total);
  }
}

// Byte b of every dword moved to its top, zeros below: as an int32 it is the signed byte times 2^24.
MS_INLINE I top_byte(U bytes, int b) {
#if defined(MS_X512)
  const __m128i lane = _mm_set_epi8(12 + b, -1, -1, -1, 8 + b, -1, -1, -1, 4 + b, -1, -1, -1, b, -1, -1, -1);
  return (I)_mm512_shuffle_epi8((__m512i)bytes, _mm512_broadcast_i32x4(lane));
#else
  return as<I>((bytes << (24 - 8 * b)) & 0xFF000000u);
#endif
}

// The same product for elements that are small integers: whole bytes are looked up, and become floats afterwards.
template <int BITS, Extra EXTRA, int SUB>
void row_bytes(const Weight& w, const Act& act, int64_t group, float* accumulator) {
  uint8_t integers[64];
  for (int i = 0; i < 64; ++i) integers[i] = static_cast<uint8_t>(w.int_values[0][i] - w.int_offset[0]);
  const ByteTable<BITS == 8 ? 4 : BITS> table(integers);
  const float step = w.int_step * 0x1p-24f;
  for (int slice = 0; slice < kSlices; ++slice) {
    const uint8_t* chunk = w.codes + group * w.chunks * 64 * BITS + slice * 4 * W;
    F total = F{};
    for (int64_t c = 0; c < w.chunks; ++c, chunk += 64 * BITS) {
      fetch<BITS>(chunk);
      const float* a = act.plain + c * kChunk;
MS_UNROLL(2)
      for (int part = 0; part < SUB; ++part) {
        const int64_t column = scale_column(w, c * kChunk + part * (kChunk / SUB));
        F dot[4] = {};
MS_UNROLL(8)
        for (int d = part * 8 / SUB; d < (part + 1) * 8 / SUB; ++d) {
          const U codes = code_bytes<BITS>(chunk, d >> 1, d & 1);
          const U bytes = BITS == 8 ? codes : table.look_up(codes);
MS_UNROLL(4)
          for (int b = 0; b < 4; ++b)
            dot[b] = fma(to_float(top_byte(bytes, b)), set1(a[8 * (d >> 1) + 2 * b + (d & 1)]), dot[b]);
        }
        F sums = ((dot[0] + dot[1]) + (dot[2] + dot[3])) * set1(step);
        sums = add_extra<EXTRA, SUB>(w, sums, group, column, slice, a, part, 1.0f);
        total = fma(sums, scale_lane(w, group, column, slice), total);
      }
    }
    store(accumulator + slice * W, load<F>(accumulator + slice * W) + total);
  }
}

template <Extra EXTRA>
Row pick_row_bytes(const Weight& w, int32_t sub) {
  if (w.element == ElementKind::integer && w.is_signed)
    return sub == 2 ? row_bytes<8, EXTRA, 2> : row_bytes<8, EXTRA, 1>;
  if (w.bits == 6) return sub == 2 ? row_bytes<6, EXTRA, 2> : row_bytes<6, EXTRA, 1>;
  return nullptr;
}

Row choose_row_bytes(const Weight& w, int32_t sub) {
  if (w.int_planes != 1) return nullptr;
  if (w.extra == Extra::none) return pick_row_bytes<Extra::none>(w, sub);
  if (w.extra == Extra::low) return pick_row_bytes<Extra::low>(w, sub);
  if (w.extra == Extra::largest) return pick_row_bytes<Extra::largest>(w, sub);
  return nullptr;
}

}  // namespace

Row choose_row_f32(const Weight& w, int32_t sub) {
  if (const Row row = choose_row_bytes(w, sub)) return row;
  return for_float(w, [sub]<ElementKind KIND, int BITS, Extra EXTRA>() -> Row {
    return sub == 2 ? row_f32<KIND, BITS, EXTRA, 2> : row_f32<KIND, BITS, EXTRA, 1>;
  });
}


}  // namespace ms::MS_LEVEL
