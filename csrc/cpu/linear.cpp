// One call of linear: see linear_steps.h.
#include "linear.h"

#include <algorithm>

#include "linear_steps.h"

namespace ms {

constexpr int64_t kRowsAtOnce = 512;  // rows of activations that are packed and multiplied together

void linear(const LinearCall& call, const Kernels& kernels, const void* x, int64_t rows, void* out, const float* bias,
            int threads) {
  Pass pass{.call = call,
            .linear = *kernels.linear,
            .activation = *kernels.activation,
            .quantize = *kernels.quantize,
            .bias = bias,
            .threads = std::max(threads, 1)};
  std::vector<Source> sources;
  std::vector<Ready> ready;
  std::vector<Choice> choices;
  find_sources(pass, static_cast<const char*>(x), rows, sources);
  for (int64_t first = 0; first < rows; first += kRowsAtOnce) {
    pass.first = first;
    pass.rows = std::min(kRowsAtOnce, rows - first);
    pass.out = static_cast<char*>(out) + first * call.output_stride * pass.number_bytes();
    make_ready(pass, sources, ready);
    choose(pass, ready, choices);
    share_out(pass, choices);
  }
  trim_sources(call);
}

}  // namespace ms
