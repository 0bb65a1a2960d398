// Which kernel multiplies by a weight: integers where both sides are, else bfloat16 pairs, else float32.
#include <algorithm>

#include "linear_steps.h"

namespace ms {
namespace {

// Whether the level has a kernel for a weight and this form of its input, which then becomes the choice.
bool take(const Pass& pass, const Weight& weight, const Act& act, Choice& choice) {
  const int32_t sub = std::max(scales_in_chunk(weight), act.sub);
  if (pass.rows == 1)
    choice.row = pass.linear.row(weight, act.kind, sub, act.parts);
  else
    choice.block = pass.linear.block(weight, act.kind, sub);
  choice.act = &act;
  return choice.row != nullptr || choice.block != nullptr;
}

Choice choose_one(const Pass& pass, const Weight& weight, const Ready& ready) {
  Choice choice;
  // A sparse table multiplies activations as they are, so its weight cannot use integers that are scaled later.
  const bool is_sparse = weight.sparse_offsets != nullptr;
  if (ready.has_integer && !is_sparse && take(pass, weight, ready.integer, choice)) return choice;
  if (ready.has_bf16 && !(is_sparse && ready.bf16.sub) && take(pass, weight, ready.bf16, choice)) return choice;
  take(pass, weight, ready.f32, choice);
  return choice;
}

}  // namespace

bool has_bf16_kernel(const Pass& pass, const Weight& weight, int32_t terms) {
  return pass.linear.row(weight, ActKind::bf16, 1, terms) != nullptr;
}

bool has_integer_kernel(const Pass& pass, const Weight& weight, int32_t sub) {
  return pass.rows == 1 ? pass.linear.row(weight, ActKind::integer, sub, 1) != nullptr
                        : pass.linear.block(weight, ActKind::integer, sub) != nullptr;
}

void choose(const Pass& pass, const std::vector<Ready>& ready, std::vector<Choice>& choices) {
  choices.clear();
  for (const LinearSegment& segment : pass.call.segments)
    choices.push_back(choose_one(pass, *segment.weight, ready[segment.input]));
}

}  // namespace ms
