// The heads of a decoder: norm and rotary embedding, the cache of keys and values, attention over it.
//
// Attention goes over the cache in spans of 64 positions with a running maximum (online softmax), for up to kTile rows
// at once: the queries that share a key/value head. All shares are cut by shapes and positions alone, so the number of
// threads changes no bit.
#include "decoder_parts.h"
#include "exponential.h"
#include "pool.h"

namespace ms::MS_LEVEL {
namespace {

// Registers of a tile of products: rows times vectors accumulators, beside one row of vectors and one number.
#if defined(MS_X512)
constexpr int kTileRows = 6, kTileVectors = 4;
#elif defined(MS_X256)
constexpr int kTileRows = 6, kTileVectors = 2;
#else
constexpr int kTileRows = 3, kTileVectors = 4;
#endif
constexpr int64_t kTile = 12;  // rows of one piece of attention, in several tiles of products

// ---------------------------------------------------------------------------------------------------- heads and cache

// Norm (where a weight is given) and rotation of one head, in place; the halves of the head are the pairs.
MS_INLINE void turn_head(float* head, const float* norm, const float* cosine, const float* sine, int64_t head_dim,
                         float eps) {
  if (norm != nullptr) rms_norm(head, norm, head, head_dim, eps);
  const int64_t half = head_dim / 2;
  int64_t i = 0;
  for (; i + W <= half; i += W) {
    const F low = load<F>(head + i), high = load<F>(head + half + i);
    store(head + i, low * load<F>(cosine + i) - high * load<F>(sine + i));
    store(head + half + i, high * load<F>(cosine + half + i) + low * load<F>(sine + half + i));
  }
  for (; i < half; ++i) {
    const float low = head[i], high = head[half + i];
    head[i] = low * cosine[i] - high * sine[i];
    head[half + i] = high * cosine[half + i] + low * sine[half + i];
  }
}

MS_INLINE int64_t padded(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

template <class T>
void store_row(const HeadsCall& call, int64_t row) {
  const KeyValueCache& cache = call.cache;
  const int64_t dim = cache.head_dim, position = *call.first + row;
  const float* cosine = call.cosines + position * dim;
  const float* sine = call.sines + position * dim;
  float* head = call.heads + row * (call.num_heads + 2 * cache.kv_heads) * dim;
  for (int64_t h = 0; h < call.num_heads; ++h, head += dim)
    turn_head(head, call.query_norm, cosine, sine, dim, call.eps);
  for (int64_t h = 0; h < cache.kv_heads; ++h, head += dim) {
    turn_head(head, call.key_norm, cosine, sine, dim, call.eps);
    T* to = static_cast<T*>(cache.keys) + (h * cache.capacity + position / kLane * kLane) * dim + position % kLane;
    for (int64_t i = 0; i < dim; ++i) put(to + i * kLane, head[i]);
  }
  for (int64_t h = 0; h < cache.kv_heads; ++h, head += dim) {
    T* to = static_cast<T*>(cache.values) + (h * cache.capacity + position) * padded(dim);
    for (int64_t i = 0; i < dim; ++i) put(to + i, head[i]);
  }
}

// ---------------------------------------------------------------------------------------------------- attention

// What a single query will read next: the keys of the next span and the values of this one. The pattern of accesses is
// no plain stream, so the memory has to be told.
struct Ahead {
  const char* keys;
  const char* values;
};

// scores[r][0 .. VECTORS W) = rows[r] . keys of the positions from the block at `keys` on.
template <int ROWS, int VECTORS, class T>
void score_tile(const float* const* rows, const T* keys, int64_t dim, float* scores, const Ahead* ahead) {
  constexpr int64_t kBytes = VECTORS * W * sizeof(T);  // of a step over d
  F sums[ROWS][VECTORS] = {};
  for (int64_t d = 0; d < dim; ++d) {
    if (ahead != nullptr)
      for (int64_t line = 0; line < kBytes; line += 64) {
        __builtin_prefetch(ahead->keys + d * kBytes + line);
        __builtin_prefetch(ahead->values + d * kBytes + line);
      }
    F key[VECTORS];
    for (int v = 0; v < VECTORS; ++v) key[v] = numbers(keys + v * W / kLane * dim * kLane + v * W % kLane + d * kLane);
    for (int r = 0; r < ROWS; ++r) {
      const F query = set1(rows[r][d]);
      for (int v = 0; v < VECTORS; ++v) sums[r][v] = fma(query, key[v], sums[r][v]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) store(scores + r * kSpan + v * W, sums[r][v]);
}

// sums[r][0 .. VECTORS W) += weights[r][j] * values[j][...] over `count` positions.
template <int ROWS, int VECTORS, class T>
void value_tile(const float* weights, const T* values, int64_t stride, int64_t count, float* sums) {
  F total[ROWS][VECTORS];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) total[r][v] = load<F>(sums + r * stride + v * W);
  for (int64_t j = 0; j < count; ++j) {
    F value[VECTORS];
    for (int v = 0; v < VECTORS; ++v) value[v] = numbers(values + j * stride + v * W);
    for (int r = 0; r < ROWS; ++r) {
      const F weight = set1(weights[r * kSpan + j]);
      for (int v = 0; v < VECTORS; ++v) total[r][v] = fma(weight, value[v], total[r][v]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) store(sums + r * stride + v * W, total[r][v]);
}

template <int ROWS, class T>
void score_rows(const float* const* rows, const T* keys, int64_t dim, int64_t positions, float* scores,
                const T* values) {
  constexpr int64_t kStep = kTileVectors * W;
  int64_t done = 0;
  const auto run = [&]<int VECTORS>() {
    const Ahead ahead = {reinterpret_cast<const char*>(keys + (done + kSpan) * dim),
                         reinterpret_cast<const char*>(values + done * padded(dim))};
    score_tile<ROWS, VECTORS>(rows, keys + done * dim, dim, scores + done, values == nullptr ? nullptr : &ahead);
    done += VECTORS * W;
  };
  while (done + kStep <= positions) run.template operator()<kTileVectors>();
  if constexpr (kStep > kLane)  // whole blocks of 16 are left over
    while (done < positions) run.template operator()<kLane / W>();
}

template <int ROWS, class T>
void value_rows(const float* weights, const T* values, int64_t stride, int64_t count, float* sums) {
  constexpr int64_t kStep = kTileVectors * W;
  int64_t done = 0;
  for (; done + kStep <= stride; done += kStep)
    value_tile<ROWS, kTileVectors>(weights, values + done, stride, count, sums + done);
  if constexpr (kStep > kLane)
    for (; done < stride; done += kLane)
      value_tile<ROWS, kLane / W>(weights, values + done, stride, count, sums + done);
}

// Calls body with the number of rows of each tile as a constant: body(count, first row).
template <class Body>
MS_INLINE void for_tiles(int64_t rows, const Body& body) {
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) body.template operator()<kTileRows>(row);
  switch (rows - row) {
    case 1: return body.template operator()<1>(row);
    case 2: return body.template operator()<2>(row);
    case 3: if constexpr (kTileRows > 3) return body.template operator()<3>(row); break;
    case 4: if constexpr (kTileRows > 4) return body.template operator()<4>(row); break;
    case 5: if constexpr (kTileRows > 5) return body.template operator()<5>(row); break;
    default: break;
  }
}

// One piece of attention: some rows of one key/value head over some positions.
struct Piece {
  const float* rows[kTile];
  int64_t last[kTile];  // the row's own position
  int64_t count;
  int64_t kv_head;
  int64_t begin, end;  // positions, begin a multiple of kSpan
};

// The exponentials of one row's scores of a span, relative to the new running maximum; rescales what was summed so far.
MS_INLINE void soften(float* scores, int64_t span, int64_t low, int64_t high, float scale, float* maximum, float* total,
                      float* sums, int64_t stride) {
  I place;
  for (int i = 0; i < W; ++i) place[i] = i;
  F largest_of = set1(kMinusInf);
  for (int64_t i = 0; i < span; i += W) {
    const I at = place + set1i(static_cast<int32_t>(i));
    const I seen = (at >= set1i(static_cast<int32_t>(low))) & (at <= set1i(static_cast<int32_t>(high)));
    const F score = select(seen, load<F>(scores + i) * set1(scale), set1(kMinusInf));
    store(scores + i, score);
    largest_of = max(largest_of, score);
  }
  const float before = *maximum, found = largest(largest_of);
  const float now = found > before ? found : before;
  if (now == kMinusInf) {  // nothing in sight: NaN scores pass on, all others weigh nothing
    for (int64_t i = 0; i < span; i += W) {
      const F score = load<F>(scores + i);
      store(scores + i, select(score == score, F{}, score));
      *total += sum(load<F>(scores + i));
    }
    return;
  }
  F added{};
  for (int64_t i = 0; i < span; i += W) {
    const F weight = exponential(load<F>(scores + i) - set1(now));
    store(scores + i, weight);
    added += weight;
  }
  const float correction = exponential(before - now);
  *maximum = now;
  *total = *total * correction + sum(added);
  if (correction != 1.0f)
    for (int64_t d = 0; d < stride; d += W) store(sums + d, load<F>(sums + d) * set1(correction));
}

// Leaves, for each row: the weighted sum of values [stride], not yet divided, the maximum and the total of weights.
template <class T>
void attend_piece(const AttentionCall& call, const Piece& piece, float* sums, float* maxima, float* totals) {
  const KeyValueCache& cache = call.cache;
  const int64_t dim = cache.head_dim, stride = padded(dim);
  const T* keys = static_cast<const T*>(cache.keys) + piece.kv_head * cache.capacity * dim;
  const T* values = static_cast<const T*>(cache.values) + piece.kv_head * cache.capacity * stride;
  alignas(64) float scores[kTile * kSpan];
  for (int64_t r = 0; r < piece.count; ++r) maxima[r] = kMinusInf, totals[r] = 0.0f;
  __builtin_memset(sums, 0, sizeof(float) * piece.count * stride);
  for (int64_t from = piece.begin; from < piece.end; from += kSpan) {
    const int64_t count = smaller(kSpan, piece.end - from);
    const int64_t span = (count + kLane - 1) / kLane * kLane;
    for_tiles(piece.count, [&]<int ROWS>(int64_t row) {
      const T* soon = call.rows == 1 && row == 0 ? values + from * stride : nullptr;
      score_rows<ROWS>(piece.rows + row, keys + from * dim, dim, span, scores + row * kSpan, soon);
    });
    for (int64_t r = 0; r < piece.count; ++r) {
      const int64_t low = call.window > 0 ? piece.last[r] - call.window + 1 - from : 0;
      soften(scores + r * kSpan, span, larger(low, 0), smaller(piece.last[r] - from, count - 1), call.scale,
             maxima + r, totals + r, sums + r * stride, stride);
    }
    for_tiles(piece.count, [&]<int ROWS>(int64_t row) {
      value_rows<ROWS>(scores + row * kSpan, values + from * stride, stride, count, sums + row * stride);
    });
  }
}

template <class T>
void attend_many(const AttentionCall& call, int threads) {
  const int64_t dim = call.cache.head_dim, stride = padded(dim), group = call.num_heads / call.cache.kv_heads;
  const int64_t all_rows = call.rows * group, tiles = (all_rows + kTile - 1) / kTile;
  parallel(tiles * call.cache.kv_heads, threads, [=, &call](int64_t chunk) {
    Piece piece;
    piece.kv_head = chunk % call.cache.kv_heads;
    const int64_t begin = chunk / call.cache.kv_heads * kTile;
    piece.count = smaller(kTile, all_rows - begin);
    float* out[kTile];
    for (int64_t r = 0; r < piece.count; ++r) {
      const int64_t row = (begin + r) / group, head = piece.kv_head * group + (begin + r) % group;
      piece.rows[r] = call.queries + row * call.stride + head * dim;
      piece.last[r] = *call.first + row;
      out[r] = call.out + (row * call.num_heads + head) * dim;
    }
    const int64_t seen = call.window > 0 ? larger(piece.last[0] - call.window + 1, 0) : 0;
    piece.begin = seen / kSpan * kSpan;
    piece.end = piece.last[piece.count - 1] + 1;
    float maxima[kTile], totals[kTile];
    alignas(64) float small[kTile * 256];
    float* sums = stride <= 256 ? small : new float[kTile * stride];
    attend_piece<T>(call, piece, sums, maxima, totals);
    for (int64_t r = 0; r < piece.count; ++r)
      for (int64_t d = 0; d < dim; ++d) out[r][d] = sums[r * stride + d] / totals[r];
    if (sums != small) delete[] sums;
  });
}

// Merges the pieces of one head: each one's sums and total count as much as its maximum says.
void merge_splits(const float* parts, int64_t splits, int64_t dim, float* out) {
  const int64_t stride = padded(dim), size = stride + 2;
  float maximum = kMinusInf, total = 0.0f;
  for (int64_t s = 0; s < splits; ++s) {
    const float found = parts[s * size + stride];
    if (found > maximum) maximum = found;
  }
  for (int64_t d = 0; d < dim; ++d) out[d] = 0.0f;
  for (int64_t s = 0; s < splits; ++s) {
    const float* part = parts + s * size;
    if (part[stride] == kMinusInf && part[stride + 1] == 0.0f) continue;  // outside of the window
    const float factor = splits == 1 ? 1.0f : exponential(part[stride] - maximum);
    total += factor * part[stride + 1];
    for (int64_t d = 0; d < dim; ++d) out[d] += factor * part[d];
  }
  for (int64_t d = 0; d < dim; ++d) out[d] /= total;
}

template <class T>
void attend_one(const AttentionCall& call, int threads) {
  const int64_t dim = call.cache.head_dim, stride = padded(dim), group = call.num_heads / call.cache.kv_heads;
  const int64_t last = *call.first, seen = call.window > 0 ? larger(last - call.window + 1, 0) : 0;
  const int64_t from = seen / kSplit, splits = last / kSplit + 1 - from, tiles = (group + kTile - 1) / kTile;
  parallel(call.cache.kv_heads * splits * tiles, threads, [=, &call](int64_t chunk) {
    Piece piece;
    piece.kv_head = chunk % call.cache.kv_heads;
    const int64_t split = chunk / call.cache.kv_heads % splits, tile = chunk / call.cache.kv_heads / splits;
    piece.count = smaller(kTile, group - tile * kTile);
    piece.begin = larger((from + split) * kSplit, seen / kSpan * kSpan);
    piece.end = smaller((from + split + 1) * kSplit, last + 1);
    const int64_t first_head = piece.kv_head * group + tile * kTile;
    for (int64_t r = 0; r < piece.count; ++r) {
      piece.rows[r] = call.queries + (first_head + r) * dim;
      piece.last[r] = last;
    }
    float maxima[kTile], totals[kTile];
    alignas(64) float small[kTile * 256];
    float* sums = stride <= 256 ? small : new float[kTile * stride];
    attend_piece<T>(call, piece, sums, maxima, totals);
    for (int64_t r = 0; r < piece.count; ++r) {
      float* part = call.scratch + ((first_head + r) * splits + split) * (stride + 2);
      __builtin_memcpy(part, sums + r * stride, sizeof(float) * stride);
      part[stride] = maxima[r], part[stride + 1] = totals[r];
    }
    if (sums != small) delete[] sums;
  });
  for (int64_t head = 0; head < call.num_heads; ++head)
    merge_splits(call.scratch + head * splits * (stride + 2), splits, dim, call.out + head * dim);
}

}  // namespace

void store_heads(const HeadsCall& call, int threads) {
  // Cut where the blocks of the cache begin: no two threads write one cache line.
  const int64_t lead = *call.first % kLane;
  parallel((lead + call.rows + kLane - 1) / kLane, threads, [&call, lead](int64_t chunk) {
    const int64_t begin = larger(chunk * kLane - lead, 0), end = smaller((chunk + 1) * kLane - lead, call.rows);
    for (int64_t row = begin; row < end; ++row) {
      if (call.cache.dtype == Dtype::f32)
        store_row<float>(call, row);
      else
        store_row<Bf16>(call, row);
    }
  });
}

void attend(const AttentionCall& call, int threads) {
  const bool is_float = call.cache.dtype == Dtype::f32;
  if (call.rows == 1) return is_float ? attend_one<float>(call, threads) : attend_one<Bf16>(call, threads);
  is_float ? attend_many<float>(call, threads) : attend_many<Bf16>(call, threads);
}

}  // namespace ms::MS_LEVEL
