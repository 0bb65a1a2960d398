// The activations of a call in the forms that its weights ask for: float32, bfloat16 terms, or integers of a format.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "format.h"
#include "linear_steps.h"
#include "pool.h"

namespace ms {
namespace {

// One input's memory; what only many rows or only one format needs stays empty without them.
struct InputBuffers {
  Buffer<char> whole, rounded;  // all rows side by side, as they are and rounded, in the dtype of the call
  Buffer<float> plain, interleaved, scaled, restored;
  Buffer<uint32_t> terms;  // pairs of bfloat16

  Buffer<uint8_t> codes;
  Buffer<int8_t> integers;
  Buffer<float> factors, integer_floats, scales, term_scales;
  Buffer<uint32_t> packed;
  Buffer<int32_t> sums;
};

InputBuffers& buffers(size_t index) {
  thread_local std::vector<std::unique_ptr<InputBuffers>> all;
  while (all.size() <= index) all.push_back(std::make_unique<InputBuffers>());
  return *all[index];
}

// Rows of integers q with value = q * step * factor[row][k / size].
struct Integers {
  const int8_t* values;
  int64_t width;
  const float* factors;
  int64_t blocks, size;
  float step;

  float scale(int64_t row, int64_t k) const { return factor(row, k) * step; }
  float factor(int64_t row, int64_t k) const {
    const int64_t block = k / size;
    return block < blocks ? factors[row * blocks + block] : 0.0f;
  }
  int32_t scales_in_chunk() const { return size % kChunk == 0 || blocks == 1 ? 1 : 2; }
};

// What the weights of an input ask for where it is rounded to integers.
struct Wanted {
  bool integers = false, floats = false;
  bool plain = false;  // the integers in natural order too
  int32_t sub;         // scales in a chunk
};

class Preparation {
 public:
  Preparation(const Pass& pass, size_t index, const Source& source, Ready& ready)
      : pass_(pass),
        index_(static_cast<int32_t>(index)),
        input_(pass.call.inputs[index]),
        source_(source),
        own_(buffers(index)),
        ready_(ready),
        rows_(pass.rows),
        chunks_((input_.cols + kChunk - 1) / kChunk),
        width_(chunks_ * kChunk) {}

  void run() {
    if (input_.rule == ActRule::integer) return make_integers();
    const float* plain = load_plain(width_);
    take_plain(plain);
    if (rows_ > 1) return interleave(plain);
    if (!wants_bf16(input_.terms)) return;
    const float top = pass_.activation.amax(plain, width_);
    if (top <= 0x1p100f) split_terms(plain, top);
  }

 private:
  // ---------------------------------------------------------------------------------------------- float32, bfloat16

  // Rows as float32, padded with zeros to `width` columns.
  const float* load_plain(int64_t width) {
    const int64_t size = pass_.number_bytes();
    const char* from = source_.at + pass_.first * source_.stride * size;
    if (pass_.call.dtype == Dtype::f32 && width == input_.cols && rows_ == 1)
      return reinterpret_cast<const float*>(from);
    float* plain = own_.plain.get(rows_ * width);
    each_row([&](int64_t row) {
      pass_.activation.to_f32(from + row * source_.stride * size, pass_.call.dtype, input_.cols, plain + row * width);
      std::memset(plain + row * width + input_.cols, 0, 4 * (width - input_.cols));
    });
    return plain;
  }

  void take_plain(const float* plain) {
    ready_.f32 = {.kind = ActKind::f32, .rows = rows_, .chunks = chunks_, .plain = plain};
    ready_.has_f32 = true;
  }

  void interleave(const float* plain) {
    const int32_t block = pass_.linear.row_block_f32;
    const int64_t blocks = (rows_ + block - 1) / block;
    float* to = own_.interleaved.get(blocks * block * width_);
    parallel(blocks, pass_.threads,
             [&](int64_t place) { pass_.activation.pack_f32(plain, rows_, chunks_, block, place, to); });
    ready_.f32.interleaved = to;
    ready_.f32.row_block = block;
  }

  bool wants_bf16(int32_t terms) const {
    for (const LinearSegment& segment : pass_.call.segments)
      if (segment.input == index_ && has_bf16_kernel(pass_, *segment.weight, terms)) return true;
    return false;
  }

  void split_terms(const float* plain, float top) {
    // The largest becomes about 2^100, so that the smallest products stay far from the end of the exponents.
    const int exponent = top > 0 ? std::min(100 - std::ilogb(top), 100) : 0;
    uint32_t* terms = own_.terms.get(input_.terms * chunks_ * 16);
    float* scaled = own_.scaled.get(width_);
    pass_.activation.pack_bf16(plain, chunks_, input_.terms, std::ldexp(1.0f, exponent), scaled, terms);
    ready_.bf16 = {.kind = ActKind::bf16, .rows = 1, .chunks = chunks_, .row_block = 1, .parts = input_.terms,
                   .plain = plain, .scaled = scaled, .packed = terms, .unit = std::ldexp(1.0f, -exponent)};
    ready_.has_bf16 = true;
  }

  // ---------------------------------------------------------------------------------------------- integers

  void make_integers() {
    const ActFormat& act = *input_.act;
    const int64_t size = act.format->block_size ? act.format->block_size : input_.cols;
    const int64_t blocks = (input_.cols + size - 1) / size;
    const int64_t padded = blocks * size, width = std::max(padded, width_);
    const float* plain = load_plain(width);
    const int64_t code_bytes = blocks * (size + 3);
    uint8_t* codes = own_.codes.get(code_bytes * rows_);
    int8_t* values = own_.integers.get(rows_ * width);
    float* factors = own_.factors.get(rows_ * blocks);
    each_row([&](int64_t row) {
      const uint64_t place = static_cast<uint64_t>(pass_.first + row) * static_cast<uint64_t>(padded);
      pass_.activation.integers(act, plain + row * width, blocks, size, source_.tensor_inv, place,
                                codes + row * code_bytes, values + row * width, factors + row * blocks);
      if (width > padded) std::memset(values + row * width + padded, 0, width - padded);
    });
    const Integers q = {values, width, factors, blocks, size, act.step};
    const Wanted wanted = find_wanted(q);
    if (wanted.integers) pack_integers(q, wanted);
    if (wanted.floats) restore_integers(q);
  }

  Wanted find_wanted(const Integers& q) const {
    const int32_t own_sub = q.scales_in_chunk();
    Wanted wanted{.sub = own_sub};
    for (const LinearSegment& segment : pass_.call.segments) {
      if (segment.input != index_) continue;
      const Weight& w = *segment.weight;
      const int32_t sub = std::max(own_sub, scales_in_chunk(w));
      if (w.sparse_offsets == nullptr && has_integer_kernel(pass_, w, sub)) {
        wanted.integers = true;
        wanted.sub = std::max(wanted.sub, sub);
        wanted.plain = wanted.plain || w.extra == Extra::low || w.extra == Extra::largest;
      } else {
        wanted.floats = true;
      }
    }
    return wanted;
  }

  // Integers for integer kernels: in dwords, with the sum and the scale of each part of a chunk.
  void pack_integers(const Integers& q, const Wanted& wanted) {
    const int32_t block = rows_ == 1 ? 1 : pass_.linear.row_block_integer, sub = wanted.sub;
    const int64_t blocks = (rows_ + block - 1) / block;
    uint32_t* packed = own_.packed.get(blocks * block * chunks_ * 8);
    int32_t* sums = own_.sums.get(blocks * block * chunks_ * sub);
    float* scales = own_.scales.get(blocks * block * chunks_ * sub);
    if (blocks * block != rows_) {  // the rows that are not there
      std::memset(packed + (blocks - 1) * block * chunks_ * 8, 0, 4 * block * chunks_ * 8);
      std::memset(sums + (blocks - 1) * block * chunks_ * sub, 0, 4 * block * chunks_ * sub);
      std::memset(scales + (blocks - 1) * block * chunks_ * sub, 0, 4 * block * chunks_ * sub);
    }
    each_row([&](int64_t row) {
      pass_.activation.pack_integer(q.values + row * q.width, chunks_, sub, block, row, packed, sums);
      float* to = scales + row / block * chunks_ * sub * block + row % block;
      for (int64_t part = 0; part < chunks_ * sub; ++part) to[part * block] = q.scale(row, part * (kChunk / sub));
    });
    ready_.integer = {.kind = ActKind::integer, .rows = rows_, .chunks = chunks_, .row_block = block, .sub = sub,
                      .plain = wanted.plain ? as_floats(q) : nullptr, .packed = packed, .scale = scales, .sums = sums};
    ready_.has_integer = true;
  }

  const float* as_floats(const Integers& q) {
    float* floats = own_.integer_floats.get(rows_ * width_);
    each_row([&](int64_t row) {
      for (int64_t k = 0; k < width_; ++k) floats[row * width_ + k] = q.values[row * q.width + k];
    });
    return floats;
  }

  // The numbers that the integers stand for, for all other kernels.
  void restore_integers(const Integers& q) {
    float* plain = own_.restored.get(rows_ * width_);
    each_row([&](int64_t row) {
      for (int64_t k = 0; k < width_; ++k)
        plain[row * width_ + k] = (q.values[row * q.width + k] * q.step) * q.factor(row, k);
    });
    take_plain(plain);
    if (rows_ > 1)
      interleave(plain);
    else if (wants_bf16(1))
      pack_integer_terms(q);
  }

  // Integers are exact as one bfloat16 term; the blocks' scales follow the sums.
  void pack_integer_terms(const Integers& q) {
    const int32_t sub = q.scales_in_chunk();
    const float* integers = as_floats(q);
    uint32_t* terms = own_.terms.get(chunks_ * 16);
    float* scales = own_.term_scales.get(chunks_ * sub);
    for (int64_t part = 0; part < chunks_ * sub; ++part) scales[part] = q.scale(0, part * (kChunk / sub));
    float* scaled = own_.scaled.get(width_);
    pass_.activation.pack_bf16(integers, chunks_, 1, 0x1p93f, scaled, terms);
    ready_.bf16 = {.kind = ActKind::bf16, .rows = 1, .chunks = chunks_, .row_block = 1, .sub = sub, .plain = integers,
                   .scaled = scaled, .packed = terms, .scale = scales, .unit = 0x1p-93f};
    ready_.has_bf16 = true;
  }

  template <class Body>
  void each_row(const Body& body) {
    if (rows_ < 16) {
      for (int64_t row = 0; row < rows_; ++row) body(row);
    } else {
      parallel(rows_, pass_.threads, body);
    }
  }

  const Pass& pass_;
  const int32_t index_;
  const LinearInput& input_;
  const Source& source_;
  InputBuffers& own_;
  Ready& ready_;
  const int64_t rows_, chunks_, width_;
};

// Rounds all rows of an input to its format, or finds the format's second level.
void round_rows(const Pass& pass, const LinearInput& input, int64_t count, InputBuffers& own, Source& source) {
  const int64_t size = pass.number_bytes();
  QuantizeArgs args{};
  args.format = input.act->format;
  args.dtype = pass.call.dtype;
  args.values = source.at;
  args.rows = count;
  args.cols = input.cols;
  args.threads = pass.threads;
  if (source.stride != input.cols) {
    char* copy = own.whole.get(count * input.cols * size);
    for (int64_t row = 0; row < count; ++row)
      std::memcpy(copy + row * input.cols * size, source.at + row * source.stride * size, input.cols * size);
    args.values = copy;
  }
  if (input.rule != ActRule::number) {
    source.tensor_inv = pass.quantize.tensor_level(args);
    return;
  }
  char* rounded = own.rounded.get(count * input.cols * size);
  args.restored = rounded;
  int64_t counts[3] = {};
  pass.quantize.quantize(args, counts);
  source.at = rounded;
  source.stride = input.cols;
}

}  // namespace

void find_sources(const Pass& pass, const char* x, int64_t count, std::vector<Source>& sources) {
  sources.clear();
  for (size_t i = 0; i < pass.call.inputs.size(); ++i) {
    const LinearInput& input = pass.call.inputs[i];
    Source source = {x + input.first_column * pass.number_bytes(), pass.call.input_stride, 1.0f};
    const bool needs_all_rows =
        input.rule == ActRule::number || (input.rule == ActRule::integer && input.act->format->has_tensor_scale);
    if (needs_all_rows) round_rows(pass, input, count, buffers(i), source);
    sources.push_back(source);
  }
}

void make_ready(const Pass& pass, const std::vector<Source>& sources, std::vector<Ready>& ready) {
  ready.assign(pass.call.inputs.size(), Ready{});
  for (size_t i = 0; i < ready.size(); ++i) Preparation(pass, i, sources[i], ready[i]).run();
}

void trim_sources(const LinearCall& call) {
  for (size_t i = 0; i < call.inputs.size(); ++i) {
    buffers(i).whole.trim();
    buffers(i).rounded.trim();
  }
}

}  // namespace ms
