// The arithmetic of floats.cpp for one path: included once for each, inside a namespace and under the options
// of its processor, so that Lanes become whatever registers that one has. No include guard: that is the point.
//
// A sum of K products has sixteen partial sums, element i going to sum i mod 16, which are added as a tree; a
// blend of K rows adds them one after another. Neither depends on what is computed beside it.

#include "float_lanes.h"

template <class T>
INLINE void widen_row(const T* x, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i++) to[i] = widen(x[i]);
}

// out[row][column] = sum of a[row][i] * b[column][i]. Both have `size` elements next to each other.
template <int kRows, int kColumns, class B>
INLINE void dots_tile(const float* a, int64_t a_stride, const B* b, int64_t b_stride, int64_t size,
                      float* out, int64_t out_stride) {
  Lanes sums[kRows][kColumns] = {};
  const auto add = [&](const Lanes(&left)[kRows], const Lanes(&right)[kColumns]) INLINE_LAMBDA {
#pragma GCC unroll 4
    for (int row = 0; row < kRows; row++)
#pragma GCC unroll 4
      for (int column = 0; column < kColumns; column++)
        sums[row][column] = fused(left[row], right[column], sums[row][column]);
  };
  Lanes left[kRows], right[kColumns];
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int row = 0; row < kRows; row++) left[row] = load(a + row * a_stride + i);
    for (int column = 0; column < kColumns; column++) right[column] = load(b + column * b_stride + i);
    add(left, right);
  }
  if (i < size) {
    for (int row = 0; row < kRows; row++) left[row] = load_some(a + row * a_stride + i, size - i);
    for (int column = 0; column < kColumns; column++)
      right[column] = load_some(b + column * b_stride + i, size - i);
    add(left, right);
  }
  for (int row = 0; row < kRows; row++)
    for (int column = 0; column < kColumns; column++)
      out[row * out_stride + column] = total(sums[row][column]);
}

template <int kRows, class B>
INLINE void dots_rows(const float* a, int64_t a_stride, const B* b, int64_t b_stride, int64_t columns,
                      int64_t size, float* out, int64_t out_stride) {
  constexpr int kColumns = kRows == 1 ? kOfOneRow : kDotsColumns;
  int64_t column = 0;
  for (; column + kColumns <= columns; column += kColumns)
    dots_tile<kRows, kColumns>(a, a_stride, b + column * b_stride, b_stride, size, out + column, out_stride);
  for (; column < columns; column++)
    dots_tile<kRows, 1>(a, a_stride, b + column * b_stride, b_stride, size, out + column, out_stride);
}

// out[row][column] = sum over i of a[row][i] * b[column][i], for all rows and columns.
template <class B>
INLINE void dots(const float* a, int64_t a_stride, int64_t rows, const B* b, int64_t b_stride,
                 int64_t columns, int64_t size, float* out, int64_t out_stride) {
  int64_t row = 0;
  for (; row + kDotsRows <= rows; row += kDotsRows)
    dots_rows<kDotsRows>(a + row * a_stride, a_stride, b, b_stride, columns, size, out + row * out_stride,
                         out_stride);
  for (; row < rows; row++)
    dots_rows<1>(a + row * a_stride, a_stride, b, b_stride, columns, size, out + row * out_stride,
                 out_stride);
}

// out[row] = out[row] * fading[row] + the sum over i of a[row][i] * b[i], for up to kVectors * 16 columns.
template <int kRows, int kVectors, class B>
INLINE void blend_tile(const float* a, int64_t a_stride, const B* b, int64_t b_stride, int64_t size,
                       const float* fading, float* out, int64_t out_stride, int64_t columns) {
  Lanes sums[kRows][kVectors];
  const bool is_whole = columns == kVectors * kLanes;
  for (int row = 0; row < kRows; row++)
    for (int vector = 0; vector < kVectors; vector++) {
      const float* from = out + row * out_stride + vector * kLanes;
      sums[row][vector] = (is_whole ? load(from) : load_some(from, columns)) * spread(fading[row]);
    }
  for (int64_t i = 0; i < size; i++) {
    Lanes right[kVectors];
    for (int vector = 0; vector < kVectors; vector++) {
      const B* from = b + i * b_stride + vector * kLanes;
      right[vector] = is_whole ? load(from) : load_some(from, columns);
    }
#pragma GCC unroll 4
    for (int row = 0; row < kRows; row++) {
      const Lanes left = spread(a[row * a_stride + i]);
#pragma GCC unroll 4
      for (int vector = 0; vector < kVectors; vector++)
        sums[row][vector] = fused(left, right[vector], sums[row][vector]);
    }
  }
  for (int row = 0; row < kRows; row++)
    for (int vector = 0; vector < kVectors; vector++) {
      float* to = out + row * out_stride + vector * kLanes;
      is_whole ? store(sums[row][vector], to) : store_some(sums[row][vector], columns, to);
    }
}

template <int kRows, class B>
INLINE void blend_rows(const float* a, int64_t a_stride, const B* b, int64_t b_stride, int64_t columns,
                       int64_t size, const float* fading, float* out, int64_t out_stride) {
  constexpr int kVectors = kRows == 1 ? kOfOneRow : kBlendVectors;
  int64_t column = 0;
  for (; column + kVectors * kLanes <= columns; column += kVectors * kLanes)
    blend_tile<kRows, kVectors>(a, a_stride, b + column, b_stride, size, fading, out + column, out_stride,
                                kVectors * kLanes);
  for (; column < columns; column += kLanes)
    blend_tile<kRows, 1>(a, a_stride, b + column, b_stride, size, fading, out + column, out_stride,
                         std::min<int64_t>(kLanes, columns - column));
}

// out[row] = out[row] * fading[row] + sum over i of a[row][i] * b[i], where b[i] has `columns` elements.
template <class B>
INLINE void blend(const float* a, int64_t a_stride, int64_t rows, const B* b, int64_t b_stride,
                  int64_t columns, int64_t size, const float* fading, float* out, int64_t out_stride) {
  int64_t row = 0;
  for (; row + kBlendRows <= rows; row += kBlendRows)
    blend_rows<kBlendRows>(a + row * a_stride, a_stride, b, b_stride, columns, size, fading + row,
                           out + row * out_stride, out_stride);
  for (; row < rows; row++)
    blend_rows<1>(a + row * a_stride, a_stride, b, b_stride, columns, size, fading + row,
                  out + row * out_stride, out_stride);
}

#include "float_streams.h"

template <class T>
void rms_norm(const T* x, const T* weight, float eps, int64_t size, T* out) {
  Lanes sums = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Lanes lanes = load(x + i);
    sums = sums + lanes * lanes;
  }
  if (i < size) {
    const Lanes lanes = load_some(x + i, size - i);
    sums = sums + lanes * lanes;
  }
  const float factor = 1.0f / std::sqrt(total(sums) / static_cast<float>(size) + eps);
  for (i = 0; i < size; i++) {
    T rounded;
    narrow(widen(x[i]) * factor, &rounded);
    narrow(widen(weight[i]) * widen(rounded), out + i);
  }
}

// x += y, rounded.
template <class T>
void add_row(T* x, const T* y, int64_t size) {
  for (int64_t i = 0; i < size; i++) narrow(widen(x[i]) + widen(y[i]), x + i);
}

// The residual gets what a layer made, and is normalised.
template <class T>
void add_rms_norm(T* residual, const T* update, const T* weight, float eps, int64_t size, T* out) {
  add_row(residual, update, size);
  rms_norm(residual, weight, eps, size, out);
}

// shared += routed, rounded once.
template <class T>
void add_routed(T* shared, const float* routed, int64_t size) {
  for (int64_t i = 0; i < size; i++) narrow(routed[i] + widen(shared[i]), shared + i);
}

template <class T>
void swiglu(const T* gate, const T* up, int64_t size, T* out) {
  for (int64_t i = 0; i < size; i++) narrow(silu_times(widen(gate[i]), widen(up[i])), out + i);
}

// `out` may be x.
template <class T>
void rotate(const T* x, const float* cos, const float* sin, int64_t size, T* out) {
  for (int64_t i = 0; i < size / 2; i++) {
    const float even = widen(x[2 * i]), odd = widen(x[2 * i + 1]);
    narrow(even * cos[i] - odd * sin[i], out + 2 * i);
    narrow(even * sin[i] + odd * cos[i], out + 2 * i + 1);
  }
}

// The sum over the slots of one token: products rounded to float, added in slot order in double. A slot whose
// row is in none of the parts adds nothing.
template <class T, class Sum>
void sum_slots(const Parts& parts, int64_t size, const int64_t* positions, const float* weights,
               int64_t slots, Sum* out) {
  for (int64_t first = 0; first < size; first += kSumTile) {
    const int64_t count = std::min(kSumTile, size - first);
    double sums[kSumTile] = {};
    for (int64_t slot = 0; slot < slots; slot++) {
      const T* row = parts.row<T>(positions[slot], size);
      if (!row) continue;
      row += first;
      for (int64_t i = 0; i < count; i++) sums[i] += static_cast<double>(widen(row[i]) * weights[slot]);
    }
    for (int64_t i = 0; i < count; i++) out[first + i] = static_cast<Sum>(sums[i]);
  }
}

// Some rows of x, [rows, size], against some rows of a float weight, [columns, size].
template <class T>
void row_products(const T* x, int64_t x_stride, int64_t rows, const float* weight, int64_t columns,
                  int64_t size, float* out, int64_t out_stride, float* wide) {
  for (int64_t row = 0; row < rows; row++) widen_row(x + row * x_stride, size, wide + row * size);
  if (rows >= kManyRows) return dots(wide, size, rows, weight, size, columns, size, out, out_stride);
  with_rows(rows, [&](auto count) INLINE_LAMBDA {
    stream_dots<count>(wide, size, weight, size, columns, size, out, out_stride);
  });
}

// The rows of one head against its weight, columns first or size first in memory (stride 1). Where there is
// room for it, for as many rows as pay for it, the weight is widened once.
template <class T>
void head_products(const HeadRows<T>& x, const HeadWeight<T>& weight, T* out, int64_t out_stride, float* wide,
                   float* sums, float* wide_weight) {
  const bool is_size_first = weight.size_stride != 1;
  const int64_t lines = is_size_first ? weight.size : weight.columns;
  const int64_t length = is_size_first ? weight.columns : weight.size;
  const int64_t stride = is_size_first ? weight.size_stride : weight.column_stride;
  const int64_t size = weight.size, columns = weight.columns;
  const float none[kRowTile] = {};
  for (int64_t line = 0; wide_weight && line < lines; line++)
    stream_row(weight.from + line * stride, length, wide_weight + line * length);
  for (int64_t first = 0; first < x.rows; first += kRowTile) {
    const int64_t rows = std::min(kRowTile, x.rows - first);
    for (int64_t row = 0; row < rows; row++)
      widen_row(x.from + (first + row) * x.stride, size, wide + row * size);
    if (!wide_weight) {
      with_rows(rows, [&](auto count) INLINE_LAMBDA {
        if (is_size_first)
          stream_blend<count>(wide, size, weight.from, stride, columns, size, sums, columns);
        else
          stream_dots<count>(wide, size, weight.from, stride, columns, size, sums, columns);
      });
    } else if (is_size_first) {
      std::memset(sums, 0, rows * columns * sizeof(float));
      blend(wide, size, rows, wide_weight, length, columns, size, none, sums, columns);
    } else {
      dots(wide, size, rows, wide_weight, length, columns, size, sums, columns);
    }
    for (int64_t row = 0; row < rows; row++)
      for (int64_t column = 0; column < columns; column++)
        narrow(sums[row * columns + column], out + (first + row) * out_stride + column);
  }
}

// Some heads of one query against the latents of its sequence, tile by tile from its beginning: a running
// maximum and sum per head, and the values weighed so far. `out` may be the query's latent.
template <class T>
void attend(const LatentQuery<T>& query, const LatentCache<T>& cache, Attended& state, T* out) {
  const int64_t width = cache.values + cache.rope;
  for (int64_t head = 0; head < query.heads; head++) {
    float* to = state.queries + head * width;
    widen_row(query.latent + head * cache.values, cache.values, to);
    widen_row(query.rope + head * query.rope_stride, cache.rope, to + cache.values);
    state.maximum[head] = -std::numeric_limits<float>::infinity();
    state.sum[head] = 0.0f;
  }
  std::memset(state.result, 0, query.heads * cache.values * sizeof(float));
  for (int64_t first = 0; first < query.length; first += kKeyTile) {
    const int64_t keys = std::min(kKeyTile, query.length - first);
    for (int64_t key = 0; key < keys; key++) {
      const int64_t block = query.table[(first + key) / cache.block_size];
      const int64_t slot = block * cache.block_size + (first + key) % cache.block_size;
      widen_row(cache.from + slot * width, width, state.latents + key * width);
    }
    dots(state.queries, width, query.heads, state.latents, width, keys, width, state.scores, kKeyTile);
    for (int64_t head = 0; head < query.heads; head++) {
      float* scores = state.scores + head * kKeyTile;
      float maximum = state.maximum[head], sum = 0.0f;
      for (int64_t key = 0; key < keys; key++) {
        scores[key] *= query.scale;
        maximum = std::max(maximum, scores[key]);
      }
      for (int64_t key = 0; key < keys; key++) scores[key] = exponential(scores[key] - maximum);
      for (int64_t key = 0; key < keys; key++) sum += scores[key];
      state.fading[head] = exponential(state.maximum[head] - maximum);
      state.sum[head] = state.sum[head] * state.fading[head] + sum;
      state.maximum[head] = maximum;
    }
    blend(state.scores, kKeyTile, query.heads, state.latents, width, cache.values, keys, state.fading,
          state.result, cache.values);
  }
  for (int64_t head = 0; head < query.heads; head++)
    for (int64_t i = 0; i < cache.values; i++)
      narrow(state.result[head * cache.values + i] / state.sum[head], out + head * cache.values + i);
}

// One head's queries against the keys and values of its sequence: query i stands at position start + i. Keys
// lie dimension first, [size, key_stride], so that a product of all keys with one number is one of whole rows.
template <class T>
void attend_prompt(const HeadRows<T>& queries, const PromptHead& head, PromptState& state, int64_t out_stride,
                   T* out) {
  const float none[kQueryTile] = {};
  for (int64_t first_query = 0; first_query < queries.rows; first_query += kQueryTile) {
    const int64_t rows = std::min(kQueryTile, queries.rows - first_query);
    const int64_t position = head.start + first_query;
    for (int64_t row = 0; row < rows; row++) {
      widen_row(queries.from + (first_query + row) * queries.stride, head.size,
                state.queries + row * head.size);
      state.maximum[row] = -std::numeric_limits<float>::infinity();
      state.sum[row] = 0.0f;
    }
    std::memset(state.result, 0, rows * head.values * sizeof(float));
    for (int64_t first = 0; first < position + rows; first += kPromptTile) {
      const int64_t keys = std::min(kPromptTile, head.most_keys - first);
      std::memset(state.scores, 0, rows * kPromptTile * sizeof(float));
      blend(state.queries, head.size, rows, head.keys + first, head.key_stride, keys, head.size, none,
            state.scores, kPromptTile);
      for (int64_t row = 0; row < rows; row++) {
        float* scores = state.scores + row * kPromptTile;
        const int64_t visible = std::max<int64_t>(0, std::min(keys, position + row + 1 - first));
        float maximum = state.maximum[row], sum = 0.0f;
        for (int64_t key = 0; key < visible; key++) {
          scores[key] *= head.scale;
          maximum = std::max(maximum, scores[key]);
        }
        for (int64_t key = 0; key < visible; key++) scores[key] = exponential(scores[key] - maximum);
        for (int64_t key = visible; key < keys; key++) scores[key] = 0.0f;
        for (int64_t key = 0; key < visible; key++) sum += scores[key];
        state.fading[row] = visible ? exponential(state.maximum[row] - maximum) : 1.0f;
        state.sum[row] = state.sum[row] * state.fading[row] + sum;
        state.maximum[row] = maximum;
      }
      blend(state.scores, kPromptTile, rows, head.value_rows + first * head.values, head.values, head.values,
            keys, state.fading, state.result, head.values);
    }
    for (int64_t row = 0; row < rows; row++)
      for (int64_t i = 0; i < head.values; i++)
        narrow(state.result[row * head.values + i] / state.sum[row],
               out + (first_query + row) * out_stride + i);
  }
}
