// One call of linear in three steps, for up to kRowsAtOnce rows at a time: prepare (linear_prepare.cpp) makes the
// activations ready, choose (linear_choose.cpp) picks a kernel for each weight, share (linear_share.cpp) runs groups of
// outputs on the threads and stores the results.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "linear.h"

namespace ms {

// Memory that a thread keeps between calls, aligned to cache lines.
template <class T>
class Buffer {
 public:
  T* get(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T) + 64;
    if (bytes > size_) {
      drop();  // before the new memory is there
      memory_.reset(new char[bytes + 64]);
      size_ = bytes;
    }
    const uintptr_t at = (reinterpret_cast<uintptr_t>(memory_.get()) + 63) & ~uintptr_t{63};
    return reinterpret_cast<T*>(at);
  }

  // Gives back what is too much to keep.
  void trim() {
    if (size_ > kKeptBytes) drop();
  }

 private:
  // The rounded float32 input of 4,096 tokens and 16,384 channels.
  static constexpr size_t kKeptBytes = 256 << 20;

  void drop() {
    size_ = 0;
    memory_.reset();
  }

  std::unique_ptr<char[]> memory_;
  size_t size_ = 0;
};

// The rows of a call that are multiplied together, and what they are multiplied by.
struct Pass {
  const LinearCall& call;
  const LinearKernels& linear;
  const ActivationKernels& activation;
  const QuantizeKernels& quantize;
  const float* bias;  // stands for that of the only output, or null
  int threads;
  int64_t first = 0, rows = 0;
  char* out = nullptr;  // of row `first`

  int64_t number_bytes() const { return call.dtype == Dtype::f32 ? 4 : 2; }
};

// Where the rows of an input lie: in the caller's memory, or rounded to a format in ours.
struct Source {
  const char* at;
  int64_t stride;  // in elements
  float tensor_inv;
};

// What one input is in all the forms that the weights ask for.
struct Ready {
  Act f32{}, bf16{}, integer{};
  bool has_f32 = false, has_bf16 = false, has_integer = false;
};

// The kernel of one weight, and the form of its input.
struct Choice {
  LinearKernels::Row row = nullptr;
  LinearKernels::Block block = nullptr;
  const Act* act = nullptr;
};

// ------------------------------------------------------------------------------------------------ prepare

// Where all `count` rows of the inputs lie, once those that need all rows at once are rounded.
void find_sources(const Pass& pass, const char* x, int64_t count, std::vector<Source>& sources);
// The rows of the pass in all forms that the weights ask for.
void make_ready(const Pass& pass, const std::vector<Source>& sources, std::vector<Ready>& ready);
// Gives back memory as large as all rows.
void trim_sources(const LinearCall& call);

// ------------------------------------------------------------------------------------------------ choose

bool has_bf16_kernel(const Pass& pass, const Weight& weight, int32_t terms);
bool has_integer_kernel(const Pass& pass, const Weight& weight, int32_t sub);
// Scales that a weight has in a chunk.
inline int32_t scales_in_chunk(const Weight& weight) { return weight.block == 16 ? 2 : 1; }
void choose(const Pass& pass, const std::vector<Ready>& ready, std::vector<Choice>& choices);

// ------------------------------------------------------------------------------------------------ share

void share_out(const Pass& pass, const std::vector<Choice>& choices);

}  // namespace ms
