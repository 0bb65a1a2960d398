// What stands between the linear layers of a decoder.
#include <new>

#include "bindings/bindings.h"
#include "decoder.h"

namespace ms::bindings {
namespace {

// A kernel that takes a record.
template <class Call>
void def_call(nb::module_& m, const char* name, void (*DecoderKernels::*member)(const Call&, int)) {
  const auto run = [member](int level, int threads, const Call& call) {
    const auto kernel = kernels_at(level).decoder->*member;
    nb::gil_scoped_release release;
    kernel(call, threads);
  };
  m.def(name, run, "level"_a, "threads"_a, "call"_a);
}

void bind_attention(nb::module_& m) {
  nb::class_<KeyValueCache>(m, "KeyValueCache")
      .def(
          "__init__",
          [](KeyValueCache* self, Pointer keys, Pointer values, int dtype, int64_t kv_heads, int64_t head_dim,
             int64_t capacity) {
            new (self) KeyValueCache{.keys = at<void>(keys), .values = at<void>(values),
                                     .dtype = static_cast<Dtype>(dtype), .kv_heads = kv_heads, .head_dim = head_dim,
                                     .capacity = capacity};
          },
          nb::kw_only(), "keys"_a, "values"_a, "dtype"_a, "kv_heads"_a, "head_dim"_a, "capacity"_a);
  nb::class_<HeadsCall>(m, "HeadsCall")
      .def(
          "__init__",
          [](HeadsCall* self, const KeyValueCache& cache, Pointer heads, int64_t rows, int64_t num_heads,
             Pointer first, Pointer cosines, Pointer sines, Pointer query_norm, Pointer key_norm, float eps) {
            new (self) HeadsCall{.cache = cache, .heads = at(heads), .rows = rows, .num_heads = num_heads,
                                 .first = at<const int64_t>(first), .cosines = at(cosines), .sines = at(sines),
                                 .query_norm = at(query_norm), .key_norm = at(key_norm), .eps = eps};
          },
          nb::kw_only(), "cache"_a, "heads"_a, "rows"_a, "num_heads"_a, "first"_a, "cosines"_a, "sines"_a,
          "query_norm"_a, "key_norm"_a, "eps"_a);
  nb::class_<AttentionCall>(m, "AttentionCall")
      .def(
          "__init__",
          [](AttentionCall* self, const KeyValueCache& cache, Pointer queries, int64_t stride, Pointer out,
             int64_t rows, int64_t num_heads, Pointer first, int64_t window, float scale, Pointer scratch) {
            new (self) AttentionCall{.cache = cache, .queries = at(queries), .stride = stride, .out = at(out),
                                     .rows = rows, .num_heads = num_heads, .first = at<const int64_t>(first),
                                     .window = window, .scale = scale, .scratch = at(scratch)};
          },
          nb::kw_only(), "cache"_a, "queries"_a, "stride"_a, "out"_a, "rows"_a, "num_heads"_a, "first"_a, "window"_a,
          "scale"_a, "scratch"_a);
  def_call(m, "store_heads", &DecoderKernels::store_heads);
  def_call(m, "attend", &DecoderKernels::attend);
}

}  // namespace

void bind_decoder(nb::module_& m) {
  bind_attention(m);
  m.def(
      "add_rms_norm",
      [](int level, int threads, Pointer residual, Pointer added, Pointer weight, Pointer out, int64_t rows,
         int64_t cols, float eps) {
        const auto& kernel = kernels_at(level).decoder->add_rms_norm;
        nb::gil_scoped_release release;
        kernel(at(residual), at(added), at(weight), at(out), rows, cols, eps, threads);
      },
      "level"_a, "threads"_a, "residual"_a, "added"_a, "weight"_a, "out"_a, "rows"_a, "cols"_a, "eps"_a);
  m.def(
      "gate",
      [](int level, int threads, Pointer pairs, Pointer out, int64_t rows, int64_t cols, int kind) {
        const auto& kernel = kernels_at(level).decoder->gate;
        nb::gil_scoped_release release;
        kernel(at(pairs), at(out), rows, cols, static_cast<Gate>(kind), threads);
      },
      "level"_a, "threads"_a, "pairs"_a, "out"_a, "rows"_a, "cols"_a, "kind"_a);
  m.def(
      "dense_linear",
      [](int level, int threads, Pointer inputs, Pointer weight, int dtype, Pointer bias, Pointer out, int64_t rows,
         int64_t cols, int64_t out_cols) {
        const auto& kernel = kernels_at(level).decoder->dense_linear;
        nb::gil_scoped_release release;
        kernel(at(inputs), at<void>(weight), static_cast<Dtype>(dtype), at(bias), at(out), rows, cols, out_cols,
               threads);
      },
      "level"_a, "threads"_a, "inputs"_a, "weight"_a, "dtype"_a, "bias"_a, "out"_a, "rows"_a, "cols"_a,
      "out_cols"_a);
  m.def(
      "largest_index",
      [](int level, Pointer from, int64_t count) {
        nb::gil_scoped_release release;
        return kernels_at(level).decoder->largest_index(at(from), count);
      },
      "level"_a, "start"_a, "count"_a);
  m.def(
      "exponential",
      [](int level, Pointer from, Pointer out, int64_t count) {
        nb::gil_scoped_release release;
        kernels_at(level).decoder->exponential(at(from), at(out), count);
      },
      "level"_a, "start"_a, "out"_a, "count"_a);
}

}  // namespace ms::bindings
