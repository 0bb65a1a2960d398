// Python bindings of the CPU kernels: raw pointers and sizes in, nothing kept. The GIL is released around every kernel.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "decoder.h"
#include "format.h"
#include "kernels.h"
#include "linear.h"
#include "memory.h"
#include "pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Pointer = uintptr_t;

template <class T = float>
T* at(Pointer address) {
  return reinterpret_cast<T*>(address);
}

const ms::Kernels& kernels_at(int level) {
  if (level >= 0 && level < ms::kNumLevels)
    if (const ms::Kernels* found = ms::kernels_of(static_cast<ms::Level>(level))) return *found;
  throw std::invalid_argument("this machine or build has no instruction-set level " + std::to_string(level));
}

std::vector<std::pair<int, std::string>> levels() {
  std::vector<std::pair<int, std::string>> found;
  for (int index = 0; index < ms::kNumLevels; ++index)
    if (const ms::Kernels* kernels = ms::kernels_of(static_cast<ms::Level>(index)))
      found.emplace_back(index, kernels->name);
  return found;
}

// ---------------------------------------------------------------------------------------------------- linear

template <class T>
T get(const nb::dict& from, const char* name) {
  return nb::cast<T>(from[name]);
}

template <class T>
const T* pointer(const nb::dict& from, const char* name) {
  return reinterpret_cast<const T*>(nb::cast<Pointer>(from[name]));
}

template <class T, size_t N>
void fill(T (&to)[N], const nb::dict& from, const char* name) {
  const auto values = nb::cast<std::vector<T>>(from[name]);
  if (values.size() > N) throw std::invalid_argument(std::string("table too long: ") + name);
  std::copy(values.begin(), values.end(), to);
}

std::unique_ptr<ms::Weight> make_weight(const nb::dict& d) {
  auto w = std::make_unique<ms::Weight>();
  std::memset(static_cast<void*>(w.get()), 0, sizeof(ms::Weight));
  w->rows = get<int64_t>(d, "rows");
  w->cols = get<int64_t>(d, "cols");
  w->groups = (w->rows + ms::kLanes - 1) / ms::kLanes;
  w->chunks = (w->cols + ms::kChunk - 1) / ms::kChunk;
  w->scale_cols = get<int64_t>(d, "scale_cols");
  w->block = get<int64_t>(d, "block");
  w->bits = get<int32_t>(d, "bits");
  w->scale_kind = static_cast<ms::ScaleKind>(get<int32_t>(d, "scale_kind"));
  w->extra = static_cast<ms::Extra>(get<int32_t>(d, "extra"));
  w->element = static_cast<ms::ElementKind>(get<int32_t>(d, "element"));
  w->zero_kind = static_cast<ms::ZeroKind>(get<int32_t>(d, "zero_kind"));
  w->codes = pointer<uint8_t>(d, "codes");
  w->scale = pointer<void>(d, "scale");
  w->index = pointer<uint8_t>(d, "index");
  w->largest = pointer<uint8_t>(d, "largest");
  w->zero = pointer<void>(d, "zero_point");
  w->flags = pointer<uint8_t>(d, "subnormals");
  fill(w->values, d, "values");
  fill(w->scale_values, d, "scale_values");
  fill(w->low_values, d, "low_values");
  fill(w->largest_values, d, "largest_values");
  fill(w->delta_values, d, "delta_values");
  fill(w->zero_values, d, "zero_values");
  w->multiplier = get<float>(d, "multiplier");
  w->tensor_inv = get<float>(d, "tensor_inv");
  w->int_planes = get<int32_t>(d, "int_planes");
  fill(w->int_offset, d, "int_offset");
  fill(w->int_values[0], d, "int_values");
  fill(w->int_values[1], d, "int_high_values");
  w->int_step = get<float>(d, "int_step");
  w->low_is_int = get<int32_t>(d, "low_is_int");
  w->mantissa_bits = get<int32_t>(d, "mantissa_bits");
  w->bias = get<int32_t>(d, "bias");
  w->special_code = get<int32_t>(d, "special_code");
  w->is_signed = get<int32_t>(d, "is_signed");
  w->bf16_exact = get<int32_t>(d, "bf16_exact");
  fill(w->bf16_values, d, "bf16_values");
  w->sparse_offsets = pointer<int32_t>(d, "sparse_offsets");
  w->sparse_columns = pointer<void>(d, "sparse_columns");
  w->sparse_values = pointer<float>(d, "sparse_values");
  w->sparse_wide = get<int32_t>(d, "sparse_wide");
  return w;
}

std::unique_ptr<ms::ActFormat> make_act_format(Pointer format, const std::vector<int>& integers,
                                               const std::vector<int>& largest_integers, float step) {
  auto act = std::make_unique<ms::ActFormat>();
  act->format = at<const ms::Format>(format);
  for (size_t i = 0; i < 256; ++i) {
    act->integers[i] = static_cast<int8_t>(i < integers.size() ? integers[i] : 0);
    act->largest_integers[i] = static_cast<int8_t>(i < largest_integers.size() ? largest_integers[i] : 0);
  }
  act->step = step;
  return act;
}

// (first column, columns, rule, terms, activation format), (weight, input), (rows, first column, first segment, count,
// bias)
using InputRow = std::tuple<int64_t, int64_t, int32_t, int32_t, nb::object>;
using OutputRow = std::tuple<int64_t, int64_t, int32_t, int32_t, Pointer>;

std::unique_ptr<ms::LinearCall> make_linear_call(const std::vector<InputRow>& inputs, const nb::list& weights,
                                                 const std::vector<int32_t>& weight_inputs,
                                                 const std::vector<OutputRow>& outputs, int combine, int dtype,
                                                 int64_t input_stride, int64_t output_stride) {
  auto call = std::make_unique<ms::LinearCall>();
  for (const auto& [first, cols, rule, terms, act] : inputs)
    call->inputs.push_back({first, cols, static_cast<ms::ActRule>(rule), terms,
                            act.is_none() ? nullptr : nb::cast<const ms::ActFormat*>(act)});
  for (size_t i = 0; i < weights.size(); ++i)
    call->segments.push_back({nb::cast<const ms::Weight*>(weights[i]), weight_inputs.at(i)});
  for (const auto& [rows, column, first, count, bias] : outputs)
    call->outputs.push_back({rows, column, first, count, reinterpret_cast<const float*>(bias)});
  call->combine = static_cast<ms::Combine>(combine);
  call->dtype = static_cast<ms::Dtype>(dtype);
  call->input_stride = input_stride;
  call->output_stride = output_stride;
  return call;
}

// ---------------------------------------------------------------------------------------------------- decoder

ms::KeyValueCache cache_at(Pointer keys, Pointer values, int dtype, int64_t kv_heads, int64_t head_dim,
                           int64_t capacity) {
  return {at<void>(keys), at<void>(values), static_cast<ms::Dtype>(dtype), kv_heads, head_dim, capacity};
}

void bind_decoder(nb::module_& m) {
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
      "store_heads",
      [](int level, int threads, Pointer keys, Pointer values, int dtype, int64_t kv_heads, int64_t head_dim,
         int64_t capacity, Pointer heads, int64_t rows, int64_t num_heads, Pointer first, Pointer cosines,
         Pointer sines, Pointer query_norm, Pointer key_norm, float eps) {
        const auto& kernel = kernels_at(level).decoder->store_heads;
        nb::gil_scoped_release release;
        kernel({cache_at(keys, values, dtype, kv_heads, head_dim, capacity), at(heads), rows, num_heads,
                at<const int64_t>(first), at(cosines), at(sines), at(query_norm), at(key_norm), eps},
               threads);
      },
      "level"_a, "threads"_a, "keys"_a, "values"_a, "dtype"_a, "kv_heads"_a, "head_dim"_a, "capacity"_a, "heads"_a,
      "rows"_a, "num_heads"_a, "first"_a, "cosines"_a, "sines"_a, "query_norm"_a, "key_norm"_a, "eps"_a);
  m.def(
      "attend",
      [](int level, int threads, Pointer keys, Pointer values, int dtype, int64_t kv_heads, int64_t head_dim,
         int64_t capacity, Pointer queries, int64_t stride, Pointer out, int64_t rows, int64_t num_heads,
         Pointer first, int64_t window, float scale, Pointer scratch) {
        const auto& kernel = kernels_at(level).decoder->attend;
        nb::gil_scoped_release release;
        kernel({cache_at(keys, values, dtype, kv_heads, head_dim, capacity), at(queries), stride, at(out), rows,
                num_heads, at<const int64_t>(first), window, scale, at(scratch)},
               threads);
      },
      "level"_a, "threads"_a, "keys"_a, "values"_a, "dtype"_a, "kv_heads"_a, "head_dim"_a, "capacity"_a,
      "queries"_a, "stride"_a, "out"_a, "rows"_a, "num_heads"_a, "first"_a, "window"_a, "scale"_a, "scratch"_a);
  m.def(
      "gate",
      [](int level, int threads, Pointer pairs, Pointer out, int64_t rows, int64_t cols, int kind) {
        const auto& kernel = kernels_at(level).decoder->gate;
        nb::gil_scoped_release release;
        kernel(at(pairs), at(out), rows, cols, static_cast<ms::Gate>(kind), threads);
      },
      "level"_a, "threads"_a, "pairs"_a, "out"_a, "rows"_a, "cols"_a, "kind"_a);
  m.def(
      "dense_linear",
      [](int level, int threads, Pointer inputs, Pointer weight, int dtype, Pointer bias, Pointer out, int64_t rows,
         int64_t cols, int64_t out_cols) {
        const auto& kernel = kernels_at(level).decoder->dense_linear;
        nb::gil_scoped_release release;
        kernel(at(inputs), at<void>(weight), static_cast<ms::Dtype>(dtype), at(bias), at(out), rows, cols, out_cols,
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

}  // namespace

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // prepared calls are remembered until the process ends
  m.def("levels", [] {
    nb::list result;
    for (const auto& [index, name] : levels()) result.append(nb::make_tuple(index, name));
    return result;
  });
  m.def("best_level", [] { return static_cast<int>(ms::best_level()); });

  // ------------------------------------------------------------------------------------------------ limits
  m.def(
      "read_bytes",
      [](int level, Pointer from, int64_t bytes, int threads) {
        const auto& kernel = kernels_at(level).limit->read_bytes;
        nb::gil_scoped_release release;
        const int64_t piece = (bytes / threads) & ~int64_t{255};
        std::vector<uint64_t> sums(threads);
        ms::parallel(threads, threads, [&](int64_t chunk) {
          sums[chunk] = kernel(reinterpret_cast<const char*>(from) + chunk * piece, piece);
        });
        uint64_t total = 0;
        for (uint64_t sum : sums) total += sum;
        return total;
      },
      "level"_a, "start"_a, "bytes"_a, "threads"_a);
  m.def(
      "multiply_add",
      [](int level, int64_t rounds, int threads) {
        const auto& kernel = kernels_at(level).limit->multiply_add;
        nb::gil_scoped_release release;
        std::vector<int64_t> flops(threads);
        std::vector<float> values(threads);
        ms::parallel(threads, threads, [&](int64_t chunk) { values[chunk] = kernel(rounds, &flops[chunk]); });
        int64_t total = 0;
        for (int64_t count : flops) total += count;
        return total;
      },
      "level"_a, "rounds"_a, "threads"_a);
  m.def(
      "fill_bytes",
      [](int level, Pointer to, int64_t bytes, int threads, bool past_caches) {
        const auto& limits = *kernels_at(level).limit;
        const auto kernel = past_caches ? limits.fill_bytes_streaming : limits.fill_bytes;
        nb::gil_scoped_release release;
        const int64_t piece = (bytes / threads) & ~int64_t{255};
        ms::parallel(threads, threads,
                     [&](int64_t chunk) { kernel(reinterpret_cast<char*>(to) + chunk * piece, piece); });
      },
      "level"_a, "start"_a, "bytes"_a, "threads"_a, "past_caches"_a);

  // ------------------------------------------------------------------------------------------------ linear
  nb::class_<ms::Weight>(m, "Weight");
  nb::class_<ms::LinearCall>(m, "LinearCall");
  nb::class_<ms::ActFormat>(m, "ActFormat");
  m.def("make_act_format", &make_act_format, "format"_a, "integers"_a, "largest_integers"_a, "step"_a);
  m.def("make_weight", &make_weight, "description"_a);
  m.def("make_linear_call", &make_linear_call, "inputs"_a, "weights"_a, "weight_inputs"_a, "outputs"_a, "combine"_a,
        "dtype"_a, "input_stride"_a, "output_stride"_a);
  m.def(
      "linear",
      [](int level, const ms::LinearCall& call, Pointer x, int64_t rows, Pointer out, Pointer bias, int threads) {
        const ms::Kernels& kernels = kernels_at(level);
        nb::gil_scoped_release release;
        ms::linear(call, kernels, at<const void>(x), rows, at<void>(out), at<const float>(bias), threads);
      },
      "level"_a, "call"_a, "x"_a, "rows"_a, "out"_a, "bias"_a, "threads"_a);

  // ------------------------------------------------------------------------------------------------ quantize
  // Pointers that are 0 are absent; see QuantizeArgs and DequantizeArgs in kernels.h.
  m.attr("FORMAT_BYTES") = sizeof(ms::Format);
  m.def(
      "prepare_memory", [](Pointer memory, int64_t bytes) { ms::prepare_memory(at<void>(memory), bytes); }, "memory"_a,
      "bytes"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "quantize",
      [](int level, Pointer format, int dtype, Pointer values, int64_t rows, int64_t cols, Pointer amax,
         Pointer tensor_amax, Pointer codes, Pointer scale, Pointer tensor_inv, Pointer index, Pointer zero_point,
         Pointer restored, int threads) {
        const auto& kernel = kernels_at(level).quantize->quantize;
        int64_t counts[3] = {};
        {
          nb::gil_scoped_release release;
          kernel({at<const ms::Format>(format), static_cast<ms::Dtype>(dtype), at<const void>(values), rows, cols,
                  at<const float>(amax), at<const float>(tensor_amax), at<uint8_t>(codes), at<void>(scale),
                  at<float>(tensor_inv), at<uint8_t>(index), at<void>(zero_point), at<void>(restored), threads},
                 counts);
        }
        return nb::make_tuple(counts[0], counts[1], counts[2]);
      },
      "level"_a, "format"_a, "dtype"_a, "values"_a, "rows"_a, "cols"_a, "amax"_a, "tensor_amax"_a, "codes"_a,
      "scale"_a, "tensor_inv"_a, "index"_a, "zero_point"_a, "restored"_a, "threads"_a);
  m.def(
      "dequantize",
      [](int level, Pointer format, int dtype, int64_t rows, int64_t cols, Pointer codes, Pointer scale,
         Pointer tensor_inv, Pointer index, Pointer zero_point, Pointer restored, int threads) {
        const auto& kernel = kernels_at(level).dequantize->dequantize;
        nb::gil_scoped_release release;
        kernel({at<const ms::Format>(format), static_cast<ms::Dtype>(dtype), rows, cols, at<const uint8_t>(codes),
                at<const void>(scale), at<const float>(tensor_inv), at<const uint8_t>(index),
                at<const void>(zero_point), at<void>(restored), threads});
      },
      "level"_a, "format"_a, "dtype"_a, "rows"_a, "cols"_a, "codes"_a, "scale"_a, "tensor_inv"_a, "index"_a,
      "zero_point"_a, "restored"_a, "threads"_a);

  // ------------------------------------------------------------------------------------------------ fused
  // See FusedArgs in kernels.h; with `result` 0 the parts of a quantized tensor are written.
  m.def(
      "fused",
      [](int level, int operation, int dtype, Pointer values, int64_t rows, int64_t cols, int64_t source_cols,
         Pointer other, int other_dtype, Pointer columns, Pointer signs, int64_t size, float eps, Pointer result,
         Pointer format, Pointer codes, Pointer scale, Pointer index, Pointer zero_point, int threads) {
        const auto& kernel = kernels_at(level).fused->fused;
        int64_t counts[3] = {}, outside = 0;
        {
          nb::gil_scoped_release release;
          ms::QuantizeArgs out = {};
          out.format = at<const ms::Format>(format), out.dtype = static_cast<ms::Dtype>(dtype);
          out.codes = at<uint8_t>(codes), out.scale = at<void>(scale);
          out.index = at<uint8_t>(index), out.zero_point = at<void>(zero_point);
          outside = kernel({static_cast<ms::FusedOperation>(operation), static_cast<ms::Dtype>(dtype),
                            at<const void>(values), rows, cols, source_cols, at<const void>(other),
                            static_cast<ms::Dtype>(other_dtype), at<const int64_t>(columns), at<const float>(signs),
                            size, eps, at<void>(result), threads},
                           out, counts);
        }
        return nb::make_tuple(outside, counts[0], counts[1], counts[2]);
      },
      "level"_a, "operation"_a, "dtype"_a, "values"_a, "rows"_a, "cols"_a, "source_cols"_a, "other"_a, "other_dtype"_a,
      "columns"_a, "signs"_a, "size"_a, "eps"_a, "result"_a, "format"_a, "codes"_a, "scale"_a, "index"_a,
      "zero_point"_a, "threads"_a);

  // ------------------------------------------------------------------------------------------------ decoder
  bind_decoder(m);

  // ------------------------------------------------------------------------------------------------ layout
  m.def(
      "pack_rows16",
      [](int level, const nb::dict& from, int threads) {
        ms::LayoutArgs args{};
        args.bits = get<int>(from, "bits");
        args.rows = get<int64_t>(from, "rows"), args.cols = get<int64_t>(from, "cols");
        args.row_bytes = get<int64_t>(from, "row_bytes");
        args.codes = at<const uint8_t>(get<Pointer>(from, "codes"));
        args.packed = at<uint8_t>(get<Pointer>(from, "packed"));
        args.subnormals = at<uint8_t>(get<Pointer>(from, "subnormals"));
        args.magnitude_mask = get<int>(from, "magnitude_mask"), args.num_mantissas = get<int>(from, "num_mantissas");
        args.max_code = get<int>(from, "max_code");
        args.place = at<const uint8_t>(get<Pointer>(from, "place"));
        args.side = at<uint8_t>(get<Pointer>(from, "side"));
        args.grid_cols = get<int64_t>(from, "grid_cols"), args.block_size = get<int64_t>(from, "block_size");
        args.zero_block = get<int>(from, "zero_block");
        args.is_compact = get<bool>(from, "is_compact"), args.is_int = get<bool>(from, "is_int");
        args.low_bits = get<int>(from, "low_bits"), args.magnitude_bits = get<int>(from, "magnitude_bits");
        args.first_code = get<int>(from, "first_code");
        const auto& kernel = kernels_at(level).layout->pack_rows16;
        bool ok = true;
        {
          nb::gil_scoped_release release;
          std::atomic<bool> fine{true};
          ms::parallel((args.rows + 15) / 16, threads, [&](int64_t group) {
            if (!kernel(args, group)) fine = false;
          });
          ok = fine;
        }
        if (!ok) throw std::bad_alloc();
      },
      "level"_a, "args"_a, "threads"_a);
}
