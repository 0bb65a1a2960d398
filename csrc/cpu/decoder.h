// What the kernels of a decoder take: the cache of keys and values, and the calls between the linear layers.
#pragma once

#include "kernels.h"

namespace ms {

// Number of cached positions that lie side by side (see KeyValueCache); every capacity is a multiple of kSpan.
constexpr int64_t kLane = 16;
// Positions that attention handles between two updates of its running maximum.
constexpr int64_t kSpan = 64;
// A single query shares its positions out in pieces of this many, so that several threads can work on one head.
constexpr int64_t kSplit = 512;

// Keys and values of one layer for all positions, allocated once. With D = head_dim and P = D rounded up to 16:
//   keys   [kv_heads, capacity / 16, D, 16]  the 16 positions of a block side by side: a score needs no sum over lanes
//   values [kv_heads, capacity, P]           padding holds zero
// Elements are float32 or bfloat16.
struct KeyValueCache {
  void* keys;
  void* values;
  Dtype dtype;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t capacity;
};

// Row t of `heads` holds the queries [num_heads, D], then the keys and the values [kv_heads, D] of position first + t.
struct HeadsCall {
  KeyValueCache cache;
  float* heads;  // [rows, (num_heads + 2 kv_heads) D]; the queries are changed in place
  int64_t rows;
  int64_t num_heads;
  const int64_t* first;  // the position of row 0
  const float* cosines;  // [positions, D], as are the sines
  const float* sines;
  const float* query_norm;  // [D], or null: no norm of the heads
  const float* key_norm;
  float eps;
};

struct AttentionCall {
  KeyValueCache cache;
  const float* queries;  // row t begins at t * stride
  int64_t stride;
  float* out;  // [rows, num_heads D]
  int64_t rows;
  int64_t num_heads;
  const int64_t* first;
  int64_t window;  // how many positions a query sees, itself included; 0 for all
  float scale;
  float* scratch;  // one query: [num_heads, splits, P + 2] floats; else unused
};

struct DecoderKernels {
  // residual += added (where not null); out = residual / sqrt(mean(residual^2) + eps) * weight, for each row.
  void (*add_rms_norm)(float* residual, const float* added, const float* weight, float* out, int64_t rows,
                       int64_t cols, float eps, int threads);
  // Norm of the query and key heads, rotation of both, keys and values into the cache.
  void (*store_heads)(const HeadsCall& call, int threads);
  // softmax(q K^T scale) V over the positions up to each query's own.
  void (*attend)(const AttentionCall& call, int threads);
  // out = act(pairs[:, :cols]) * pairs[:, cols:].
  void (*gate)(const float* pairs, float* out, int64_t rows, int64_t cols, Gate kind, int threads);
  // out = inputs weight^T + bias (or null), weight [out_cols, cols] in float32 or bfloat16.
  void (*dense_linear)(const float* inputs, const void* weight, Dtype dtype, const float* bias, float* out,
                       int64_t rows, int64_t cols, int64_t out_cols, int threads);
  // Index of the first largest number; of the first NaN where there is one.
  int64_t (*largest_index)(const float* from, int64_t count);
  // out = exp(from), as attention computes it.
  void (*exponential)(const float* from, float* out, int64_t count);
};

}  // namespace ms
