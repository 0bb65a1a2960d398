// One call of linear: activations are made ready, groups of outputs are shared out over the threads, results are stored.
#include "linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "format.h"
#include "pool.h"

namespace ms {
namespace {

constexpr int64_t kRowsAtOnce = 512;     // rows of activations that are packed and multiplied together
constexpr int64_t kGroupsAtOnce = 16;    // groups of outputs in one task of many rows
constexpr int64_t kTaskBytes = 1 << 17;  // weights in one task of one row: enough for the prefetchers to run

constexpr size_t kKeptBytes = 256 << 20;  // of a buffer: the rounded float32 input of 4,096 tokens and 16,384 channels

// Memory that a thread keeps between calls, aligned to cache lines.
class Buffer {
 public:
  template <class T>
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
  void drop() {
    size_ = 0;
    memory_.reset();
  }

  std::unique_ptr<char[]> memory_;
  size_t size_ = 0;
};

struct InputBuffers {
  Buffer plain, packed, values, bytes, scale, sums, block_scale, codes, whole, rounded;
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

struct Choice {
  LinearKernels::Row row = nullptr;
  LinearKernels::Block block = nullptr;
  const Act* act = nullptr;
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

class Run {
 public:
  Run(const LinearCall& call, const Kernels& kernels, const float* bias, int threads)
      : call_(call), bias_(bias), linear_(*kernels.linear), prepare_(*kernels.activation), quantize_(*kernels.quantize), threads_(std::max(threads, 1)) {}

  void rows(const char* x, int64_t count, char* out) {
    const int64_t size = call_.dtype == Dtype::f32 ? 4 : 2;
    find_sources(x, count, size);
    for (int64_t first = 0; first < count; first += kRowsAtOnce) {
      rows_ = std::min(kRowsAtOnce, count - first);
      first_ = first;
      out_ = out + first * call_.output_stride * size;
      make_ready();
      share_out();
    }
    for (size_t i = 0; i < call_.inputs.size(); ++i) {  // what is as large as all rows
      buffers(i).whole.trim();
      buffers(i).rounded.trim();
    }
  }

 private:
  static InputBuffers& buffers(size_t index) {
    thread_local std::vector<std::unique_ptr<InputBuffers>> all;
    while (all.size() <= index) all.push_back(std::make_unique<InputBuffers>());
    return *all[index];
  }

  // Whatever needs all rows at once: rounding to a format, or the second level of one.
  void find_sources(const char* x, int64_t count, int64_t size) {
    sources_.assign(call_.inputs.size(), Source{});
    for (size_t i = 0; i < call_.inputs.size(); ++i) {
      const LinearInput& input = call_.inputs[i];
      Source& source = sources_[i];
      source = {x + input.first_column * size, call_.input_stride, 1.0f};
      if (input.rule == ActRule::keep) continue;
      const bool is_number = input.rule == ActRule::number;
      if (!is_number && !input.act->format->has_tensor_scale) continue;
      InputBuffers& own = buffers(i);
      const char* whole = source.at;
      if (call_.input_stride != input.cols) {
        char* copy = own.whole.get<char>(count * input.cols * size);
        for (int64_t row = 0; row < count; ++row)
          std::memcpy(copy + row * input.cols * size, source.at + row * call_.input_stride * size, input.cols * size);
        whole = copy;
      }
      QuantizeArgs args{};
      args.format = input.act->format;
      args.dtype = call_.dtype;
      args.values = whole;
      args.rows = count;
      args.cols = input.cols;
      args.threads = threads_;
      if (!is_number) {
        source.tensor_inv = quantize_.tensor_level(args);
        continue;
      }
      char* rounded = own.rounded.get<char>(count * input.cols * size);
      args.restored = rounded;
      int64_t counts[3] = {};
      quantize_.quantize(args, counts);
      source.at = rounded;
      source.stride = input.cols;
    }
  }

  void make_ready() {
    ready_.assign(call_.inputs.size(), Ready{});
    choices_.assign(call_.segments.size(), Choice{});
    for (size_t i = 0; i < call_.inputs.size(); ++i) make_input_ready(i);
    for (size_t s = 0; s < call_.segments.size(); ++s) choose(s);
  }

  // Chunks that an input is padded to: those of the weights that read it.
  int64_t chunks_of(size_t input) const { return (call_.inputs[input].cols + kChunk - 1) / kChunk; }

  void make_input_ready(size_t i) {
    const LinearInput& input = call_.inputs[i];
    Ready& ready = ready_[i];
    InputBuffers& own = buffers(i);
    const int64_t chunks = chunks_of(i), width = chunks * kChunk;
    if (input.rule == ActRule::integer) {
      quantize_integers(own, chunks, ready, i);
      return;
    }
    const float* plain = load_plain(i, own, width);
    ready.f32 = {ActKind::f32, rows_, chunks, 0, 1, 0, plain, nullptr, nullptr, nullptr, nullptr, 1.0f};
    ready.has_f32 = true;
    if (rows_ == 1) {
      const float top = prepare_.amax(plain, width);
      if (wants_bf16(i, input.terms) && top <= 0x1p100f) pack_bf16(own, plain, chunks, top, input.terms, ready);
      return;
    }
    pack_rows(own, plain, chunks, ready);
  }

  bool wants_bf16(size_t i, int32_t terms) const {
    for (const LinearSegment& segment : call_.segments)
      if (segment.input == static_cast<int32_t>(i) && linear_.row(*segment.weight, ActKind::bf16, 1, terms))
        return true;
    return false;
  }

  // Rows as float32, padded with zeros to `width` columns.
  const float* load_plain(size_t i, InputBuffers& own, int64_t width) {
    const LinearInput& input = call_.inputs[i];
    const Source& source = sources_[i];
    const int64_t size = call_.dtype == Dtype::f32 ? 4 : 2;
    const char* from = source.at + first_ * source.stride * size;
    if (call_.dtype == Dtype::f32 && width == input.cols && rows_ == 1) return reinterpret_cast<const float*>(from);
    float* plain = own.plain.get<float>(rows_ * width);
    each_row([&](int64_t row) {
      prepare_.to_f32(from + row * source.stride * size, call_.dtype, input.cols, plain + row * width);
      std::memset(plain + row * width + input.cols, 0, 4 * (width - input.cols));
    });
    return plain;
  }

  template <class Body>
  void each_row(const Body& body) {
    if (rows_ < 16) {
      for (int64_t row = 0; row < rows_; ++row) body(row);
    } else {
      parallel(rows_, threads_, body);
    }
  }

  void pack_rows(InputBuffers& own, const float* plain, int64_t chunks, Ready& ready) {
    const int32_t block = linear_.row_block_f32;
    const int64_t blocks = (rows_ + block - 1) / block;
    float* packed = own.packed.get<float>(blocks * block * chunks * kChunk);
    parallel(blocks, threads_, [&](int64_t index) { prepare_.pack_f32(plain, rows_, chunks, block, index, packed); });
    ready.f32.packed = reinterpret_cast<const uint32_t*>(packed);
    ready.f32.row_block = block;
  }

  void pack_bf16(InputBuffers& own, const float* plain, int64_t chunks, float top, int32_t terms, Ready& ready) {
    // The largest becomes about 2^100, so that the smallest products stay far from the end of the exponents.
    const int exponent = top > 0 ? std::min(100 - std::ilogb(top), 100) : 0;
    uint32_t* packed = own.values.get<uint32_t>(terms * chunks * 16);
    float* scaled = own.bytes.get<float>(chunks * kChunk);
    prepare_.pack_bf16(plain, chunks, terms, std::ldexp(1.0f, exponent), scaled, packed);
    ready.bf16 = {ActKind::bf16, 1, chunks, 1, terms, 0, plain, scaled, packed, nullptr, nullptr, std::ldexp(1.0f, -exponent)};
    ready.has_bf16 = true;
  }

  void quantize_integers(InputBuffers& own, int64_t chunks, Ready& ready, size_t i) {
    const LinearInput& input = call_.inputs[i];
    const ActFormat& act = *input.act;
    const int64_t size = act.format->block_size ? act.format->block_size : input.cols;
    const int64_t blocks = (input.cols + size - 1) / size;
    const int64_t padded = blocks * size, width = std::max(padded, chunks * kChunk);
    const float* plain = load_plain(i, own, width);
    const int64_t memory = blocks * (size + 3);
    uint8_t* codes = own.codes.get<uint8_t>(memory * rows_);
    int8_t* values = own.bytes.get<int8_t>(rows_ * width);
    float* factors = own.block_scale.get<float>(rows_ * blocks);
    each_row([&](int64_t row) {
      const uint64_t place = static_cast<uint64_t>(first_ + row) * static_cast<uint64_t>(padded);
      prepare_.integers(act, plain + row * width, blocks, size, sources_[i].tensor_inv, place, codes + row * memory,
                        values + row * width, factors + row * blocks);
      if (width > padded) std::memset(values + row * width + padded, 0, width - padded);
    });
    finish_integer(own, {values, width, factors, blocks, size, act.step}, chunks, ready, i);
  }

  // Rows of integers q with value = q * step * factor[row][k / size].
  struct Integers {
    const int8_t* values;
    int64_t width;
    const float* factors;
    int64_t blocks, size;
    float step;

    float scale(int64_t row, int64_t k) const {
      const int64_t block = k / size;
      return block < blocks ? factors[row * blocks + block] * step : 0.0f;
    }
  };

  // The integers in the forms that the weights ask for.
  void finish_integer(InputBuffers& own, const Integers& q, int64_t chunks, Ready& ready, size_t i) {
    const int64_t width = chunks * kChunk;
    bool wants_integer = false, wants_f32 = false, wants_plain = false;
    const int32_t own_sub = q.size % kChunk == 0 || q.blocks == 1 ? 1 : 2;
    int32_t sub = own_sub;
    for (const LinearSegment& segment : call_.segments) {
      if (segment.input != static_cast<int32_t>(i)) continue;
      const Weight& w = *segment.weight;
      const int32_t wanted = std::max(own_sub, w.block == 16 ? 2 : 1);
      if (w.sparse_offsets == nullptr && has_integer_kernel(w, wanted)) {
        wants_integer = true;
        sub = std::max(sub, wanted);
        wants_plain = wants_plain || w.extra == Extra::low || w.extra == Extra::largest;
      } else {
        wants_f32 = true;
      }
    }
    if (wants_integer) {
      const int32_t block = rows_ == 1 ? 1 : linear_.row_block_integer;
      const int64_t blocks = (rows_ + block - 1) / block;
      uint32_t* packed = own.packed.get<uint32_t>(blocks * block * chunks * 8);
      int32_t* sums = own.sums.get<int32_t>(blocks * block * chunks * sub);
      float* scales = own.scale.get<float>(blocks * block * chunks * sub);
      if (blocks * block != rows_) {  // the rows that are not there
        std::memset(packed + (blocks - 1) * block * chunks * 8, 0, 4 * block * chunks * 8);
        std::memset(sums + (blocks - 1) * block * chunks * sub, 0, 4 * block * chunks * sub);
        std::memset(scales + (blocks - 1) * block * chunks * sub, 0, 4 * block * chunks * sub);
      }
      each_row([&](int64_t row) {
        prepare_.pack_integer(q.values + row * q.width, chunks, sub, block, row, packed, sums);
        float* to = scales + row / block * chunks * sub * block + row % block;
        for (int64_t part = 0; part < chunks * sub; ++part) to[part * block] = q.scale(row, part * (kChunk / sub));
      });
      float* integers = nullptr;
      if (wants_plain) {
        integers = own.values.get<float>(rows_ * width);
        each_row([&](int64_t row) {
          for (int64_t k = 0; k < width; ++k) integers[row * width + k] = q.values[row * q.width + k];
        });
      }
      ready.integer = {ActKind::integer, rows_, chunks, block, 1, sub, integers, nullptr, packed, scales, sums, 1.0f};
      ready.has_integer = true;
    }
    if (wants_f32) {
      float* plain = own.rounded.get<float>(rows_ * width);
      each_row([&](int64_t row) {
        for (int64_t k = 0; k < width; ++k)
          plain[row * width + k] = (q.values[row * q.width + k] * q.step) * (k < q.blocks * q.size ? q.factors[row * q.blocks + k / q.size] : 0.0f);
      });
      ready.f32 = {ActKind::f32, rows_, chunks, 0, 1, 0, plain, nullptr, nullptr, nullptr, nullptr, 1.0f};
      ready.has_f32 = true;
      InputBuffers& other = buffers(call_.inputs.size() + i);
      if (rows_ > 1) {
        pack_rows(other, plain, chunks, ready);
      } else if (wants_bf16(i, 1)) {
        // Integers are exact as one bfloat16 term; the blocks' scales follow the sums.
        float* integers = other.values.get<float>(width);
        uint32_t* packed = other.packed.get<uint32_t>(chunks * 16);
        float* scales = other.scale.get<float>(chunks * own_sub);
        for (int64_t k = 0; k < width; ++k) integers[k] = q.values[k];
        for (int64_t part = 0; part < chunks * own_sub; ++part) scales[part] = q.scale(0, part * (kChunk / own_sub));
        float* scaled = other.plain.get<float>(width);
        prepare_.pack_bf16(integers, chunks, 1, 0x1p93f, scaled, packed);
        ready.bf16 = {ActKind::bf16, 1, chunks, 1, 1, own_sub, integers, scaled, packed, scales, nullptr, 0x1p-93f};
        ready.has_bf16 = true;
      }
    }
  }

  bool has_integer_kernel(const Weight& w, int32_t sub) const {
    return rows_ == 1 ? linear_.row(w, ActKind::integer, sub, 1) != nullptr
                      : linear_.block(w, ActKind::integer, sub) != nullptr;
  }

  void choose(size_t s) {
    const LinearSegment& segment = call_.segments[s];
    const Weight& w = *segment.weight;
    const Ready& ready = ready_[segment.input];
    Choice& choice = choices_[s];
    const int32_t own_sub = w.block == 16 ? 2 : 1;
    const auto take = [&](const Act& act) {
      const int32_t sub = std::max(own_sub, act.sub);
      if (rows_ == 1)
        choice.row = linear_.row(w, act.kind, sub, act.parts);
      else
        choice.block = linear_.block(w, act.kind, sub);
      choice.act = &act;
      return choice.row != nullptr || choice.block != nullptr;
    };
    // A sparse table multiplies activations as they are, so its weight cannot use integers that are scaled later.
    const bool is_sparse = w.sparse_offsets != nullptr;
    if (ready.has_integer && !is_sparse && take(ready.integer)) return;
    if (ready.has_bf16 && !(is_sparse && ready.bf16.sub) && take(ready.bf16)) return;
    take(ready.f32);
  }

  void share_out() {
    const bool is_pair = call_.combine == Combine::silu_mul;
    struct Task {
      size_t output;
      int64_t group, count;
    };
    std::vector<Task>& tasks = task_list<Task>();
    tasks.clear();
    for (size_t o = 0; o < (is_pair ? 1 : call_.outputs.size()); ++o) {
      const LinearOutput& output = call_.outputs[o];
      const int64_t groups = (output.rows + kLanes - 1) / kLanes;
      int64_t step = kGroupsAtOnce;
      if (rows_ == 1) {
        const int64_t bytes = group_bytes(output);
        step = std::max<int64_t>(1, kTaskBytes / std::max<int64_t>(bytes, 1));
      }
      step = std::min(step, std::max<int64_t>((groups + threads_ * 4 - 1) / (threads_ * 4), rows_ == 1 ? 1 : 2));
      if (rows_ > 1) step += step & 1;
      for (int64_t g = 0; g < groups; g += step) tasks.push_back({o, g, std::min(step, groups - g)});
    }
    parallel(static_cast<int64_t>(tasks.size()), threads_, [&](int64_t index) {
      const Task& task = tasks[index];
      if (is_pair)
        run_pair(task.group, task.count);
      else
        run_one(task.output, task.group, task.count);
    });
  }

  template <class Task>
  static std::vector<Task>& task_list() {
    thread_local std::vector<Task> list;
    return list;
  }

  int64_t group_bytes(const LinearOutput& output) const {
    int64_t bytes = 0;
    for (int32_t s = output.first; s < output.first + output.count; ++s)
      bytes += call_.segments[s].weight->chunks * 64 * call_.segments[s].weight->bits;
    return bytes;
  }

  static float* scratch(int which, int64_t count) {
    thread_local Buffer own[3];
    return own[which].get<float>(count);
  }

  // Sums of all segments for some groups: [rows][count * 16].
  void accumulate(const LinearOutput& output, int64_t group, int64_t count, float* sums) {
    const int64_t stride = count * kLanes;
    std::memset(sums, 0, sizeof(float) * rows_ * stride);
    for (int32_t s = output.first; s < output.first + output.count; ++s) {
      const Weight& w = *call_.segments[s].weight;
      const Choice& choice = choices_[s];
      if (rows_ == 1) {
        for (int64_t g = 0; g < count; ++g) choice.row(w, *choice.act, group + g, sums + g * kLanes);
      } else {
        choice.block(w, *choice.act, group, count, sums, stride, scratch(2, kScratchFloats));
      }
      if (w.sparse_offsets != nullptr) add_sparse(w, *choice.act, group, count, sums, stride);
    }
  }

  void add_sparse(const Weight& w, const Act& act, int64_t group, int64_t count, float* sums, int64_t stride) {
    const int64_t width = act.chunks * kChunk;
    for (int64_t lane = 0; lane < std::min(count * kLanes, w.rows - group * kLanes); ++lane) {
      const int64_t row = group * kLanes + lane;
      for (int32_t j = w.sparse_offsets[row]; j < w.sparse_offsets[row + 1]; ++j) {
        const int64_t column = w.sparse_wide ? static_cast<const int32_t*>(w.sparse_columns)[j]
                                             : static_cast<const uint16_t*>(w.sparse_columns)[j];
        for (int64_t m = 0; m < rows_; ++m) sums[m * stride + lane] += w.sparse_values[j] * act.plain[m * width + column];
      }
    }
  }

  void run_one(size_t index, int64_t group, int64_t count) {
    const LinearOutput& output = call_.outputs[index];
    const int64_t stride = count * kLanes;
    float* sums = scratch(0, rows_ * stride);
    accumulate(output, group, count, sums);
    const int64_t first = group * kLanes, width = std::min(stride, output.rows - first);
    const float* bias = bias_ ? bias_ : output.bias;
    for (int64_t m = 0; m < rows_; ++m)
      store_row(sums + m * stride, width, bias ? bias + first : nullptr, call_.dtype, out_,
                m * call_.output_stride + output.first_column + first);
  }

  void run_pair(int64_t group, int64_t count) {
    const LinearOutput &gate = call_.outputs[0], &up = call_.outputs[1];
    const int64_t stride = count * kLanes, first = group * kLanes, width = std::min(stride, gate.rows - first);
    float *gates = scratch(0, rows_ * stride), *ups = scratch(1, rows_ * stride);
    accumulate(gate, group, count, gates);
    accumulate(up, group, count, ups);
    for (int64_t m = 0; m < rows_; ++m) {
      float *g = gates + m * stride, *u = ups + m * stride;
      if (gate.bias)
        for (int64_t i = 0; i < width; ++i) g[i] += gate.bias[first + i];
      if (up.bias)
        for (int64_t i = 0; i < width; ++i) u[i] += up.bias[first + i];
      linear_.silu_mul(g, u, g, width);
      store_row(g, width, nullptr, call_.dtype, out_, m * call_.output_stride + gate.first_column + first);
    }
  }

  const LinearCall& call_;
  const float* bias_;
  const LinearKernels& linear_;
  const ActivationKernels& prepare_;
  const QuantizeKernels& quantize_;
  const int threads_;
  int64_t rows_ = 0, first_ = 0;
  std::vector<Source> sources_;
  char* out_ = nullptr;
  std::vector<Ready> ready_;
  std::vector<Choice> choices_;
};

}  // namespace

void linear(const LinearCall& call, const Kernels& kernels, const void* x, int64_t rows, void* out, const float* bias,
            int threads) {
  Run(call, kernels, bias, threads).rows(static_cast<const char*>(x), rows, static_cast<char*>(out));
}

}  // namespace ms
