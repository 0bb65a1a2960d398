// linear: one row of activations (decode) or many (prefill) times a weight in the layout rows16. Here the kernel is
// chosen; each kind of products has a source of its own.
//
// One row: codes are decoded in registers, once, while they stream from memory. Many rows: a panel of 32 outputs is
// decoded into the first-level cache and used for all rows. Three kinds of products:
//   integer  bytes times bytes: linear_row_integer.cpp, linear_block_integer.cpp;
//   bf16     pairs of bfloat16 (avx512_bf16, one row): linear_row_bf16.cpp;
//   f32      fused multiply-adds: linear_row_f32.cpp, linear_block_f32.cpp.
// The largest element of MX+ and MX++ is a correction: one product more for each block, no second pass.
#include "linear.h"

#include "choice.h"
#include "exponential.h"
#include "panel.h"

namespace ms::MS_LEVEL {
namespace {

Row choose_row(const Weight& w, ActKind kind, int32_t sub, int32_t parts) {
  switch (kind) {
    case ActKind::integer: return choose_row_integer(w, sub);
    case ActKind::bf16: return choose_row_bf16(w, sub, parts);
    default: return choose_row_f32(w, sub);
  }
}

Block choose_block(const Weight& w, ActKind kind, int32_t sub) {
  switch (kind) {
    case ActKind::integer: return choose_block_integer(w, sub);
    case ActKind::bf16: return nullptr;
    default: return choose_block_f32(w);
  }
}

void silu_mul(const float* gate, const float* up, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += W) {
    const int64_t left = count - i < W ? count - i : W;
    F g = F{}, u = F{};
    __builtin_memcpy(&g, gate + i, 4 * left);
    __builtin_memcpy(&u, up + i, 4 * left);
    const F result = silu(g) * u;
    __builtin_memcpy(out + i, &result, 4 * left);
  }
}

}  // namespace

extern const LinearKernels linear_kernels;
const LinearKernels linear_kernels = {choose_row, choose_block, kRowsF32, kRowsInteger, silu_mul};

}  // namespace ms::MS_LEVEL
