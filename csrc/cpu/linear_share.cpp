// Groups of outputs are shared out over the threads as tasks; each task sums its segments and stores the results.
#include <algorithm>
#include <cstring>

#include "half.h"
#include "linear_steps.h"
#include "pool.h"

namespace ms {
namespace {

constexpr int64_t kGroupsAtOnce = 16;    // groups of outputs in one task of many rows
constexpr int64_t kTaskBytes = 1 << 17;  // weights in one task of one row: enough for the prefetchers to run

// `count` groups of one output from `group` on.
struct Task {
  size_t output;
  int64_t group, count;
};

void store_row(const float* from, int64_t count, const float* bias, Dtype dtype, void* to, int64_t at) {
  if (dtype == Dtype::f32) {
    float* out = static_cast<float*>(to) + at;
    for (int64_t i = 0; i < count; ++i) out[i] = from[i] + (bias ? bias[i] : 0.0f);
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(to) + at;
  for (int64_t i = 0; i < count; ++i) {
    const float value = from[i] + (bias ? bias[i] : 0.0f);
    out[i] = dtype == Dtype::bf16 ? to_bf16(value) : to_f16(value);
  }
}

class Share {
 public:
  Share(const Pass& pass, const std::vector<Choice>& choices) : pass_(pass), choices_(choices) {}

  void run() const {
    const bool is_pair = pass_.call.combine == Combine::silu_mul;
    const std::vector<Task>& tasks = cut(is_pair ? 1 : pass_.call.outputs.size());
    parallel(static_cast<int64_t>(tasks.size()), pass_.threads, [&](int64_t index) {
      if (is_pair)
        run_pair(tasks[index]);
      else
        run_one(tasks[index]);
    });
  }

 private:
  const std::vector<Task>& cut(size_t outputs) const {
    thread_local std::vector<Task> tasks;
    tasks.clear();
    const int64_t shares = pass_.threads * 4;
    for (size_t o = 0; o < outputs; ++o) {
      const LinearOutput& output = pass_.call.outputs[o];
      const int64_t groups = (output.rows + kLanes - 1) / kLanes;
      int64_t step = kGroupsAtOnce;
      if (pass_.rows == 1) step = std::max<int64_t>(1, kTaskBytes / std::max<int64_t>(group_bytes(output), 1));
      step = std::min(step, std::max<int64_t>((groups + shares - 1) / shares, pass_.rows == 1 ? 1 : 2));
      if (pass_.rows > 1) step += step & 1;
      for (int64_t g = 0; g < groups; g += step) tasks.push_back({o, g, std::min(step, groups - g)});
    }
    return tasks;
  }

  int64_t group_bytes(const LinearOutput& output) const {
    int64_t bytes = 0;
    for (int32_t s = output.first; s < output.first + output.count; ++s)
      bytes += pass_.call.segments[s].weight->chunks * 64 * pass_.call.segments[s].weight->bits;
    return bytes;
  }

  enum Scratch { kSums, kOtherSums, kPanelFloats, kNumScratch };
  static float* scratch(Scratch which, int64_t count) {
    thread_local Buffer<float> own[kNumScratch];
    return own[which].get(count);
  }

  // Sums of all segments for some groups: [rows][count * 16].
  void accumulate(const LinearOutput& output, const Task& task, float* sums) const {
    const int64_t stride = task.count * kLanes;
    std::memset(sums, 0, sizeof(float) * pass_.rows * stride);
    for (int32_t s = output.first; s < output.first + output.count; ++s) {
      const Weight& w = *pass_.call.segments[s].weight;
      const Choice& choice = choices_[s];
      if (pass_.rows == 1) {
        for (int64_t g = 0; g < task.count; ++g) choice.row(w, *choice.act, task.group + g, sums + g * kLanes);
      } else {
        choice.block(w, *choice.act, task.group, task.count, sums, stride, scratch(kPanelFloats, kScratchFloats));
      }
      if (w.sparse_offsets != nullptr) add_sparse(w, *choice.act, task, sums);
    }
  }

  void add_sparse(const Weight& w, const Act& act, const Task& task, float* sums) const {
    const int64_t width = act.chunks * kChunk, stride = task.count * kLanes, first = task.group * kLanes;
    for (int64_t lane = 0; lane < std::min(stride, w.rows - first); ++lane) {
      for (int32_t j = w.sparse_offsets[first + lane]; j < w.sparse_offsets[first + lane + 1]; ++j) {
        const int64_t column = w.sparse_wide ? static_cast<const int32_t*>(w.sparse_columns)[j]
                                             : static_cast<const uint16_t*>(w.sparse_columns)[j];
        for (int64_t m = 0; m < pass_.rows; ++m)
          sums[m * stride + lane] += w.sparse_values[j] * act.plain[m * width + column];
      }
    }
  }

  void run_one(const Task& task) const {
    const LinearOutput& output = pass_.call.outputs[task.output];
    const int64_t stride = task.count * kLanes, first = task.group * kLanes;
    float* sums = scratch(kSums, pass_.rows * stride);
    accumulate(output, task, sums);
    const float* bias = pass_.bias ? pass_.bias : output.bias;
    for (int64_t m = 0; m < pass_.rows; ++m)
      store_row(sums + m * stride, std::min(stride, output.rows - first), bias ? bias + first : nullptr,
                pass_.call.dtype, pass_.out, m * pass_.call.output_stride + output.first_column + first);
  }

  void run_pair(const Task& task) const {
    const LinearOutput &gate = pass_.call.outputs[0], &up = pass_.call.outputs[1];
    const int64_t stride = task.count * kLanes, first = task.group * kLanes;
    const int64_t width = std::min(stride, gate.rows - first);
    float *gates = scratch(kSums, pass_.rows * stride), *ups = scratch(kOtherSums, pass_.rows * stride);
    accumulate(gate, task, gates);
    accumulate(up, task, ups);
    for (int64_t m = 0; m < pass_.rows; ++m) {
      float *g = gates + m * stride, *u = ups + m * stride;
      if (gate.bias)
        for (int64_t i = 0; i < width; ++i) g[i] += gate.bias[first + i];
      if (up.bias)
        for (int64_t i = 0; i < width; ++i) u[i] += up.bias[first + i];
      pass_.linear.silu_mul(g, u, g, width);
      store_row(g, width, nullptr, pass_.call.dtype, pass_.out,
                m * pass_.call.output_stride + gate.first_column + first);
    }
  }

  const Pass& pass_;
  const std::vector<Choice>& choices_;
};

}  // namespace

void share_out(const Pass& pass, const std::vector<Choice>& choices) { Share(pass, choices).run(); }

}  // namespace ms
