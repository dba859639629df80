// What is computed on a CPU beside int8 products: norms, SwiGLU, rotation, the gate's products, attention over
// prompts and over the latent cache, and the sum over a token's slots.
//
// A C ABI without torch. `path` is one that int8_best_path() allows; all give the same bits. `is_bfloat16`
// says what x, weight and out are, bfloat16 or float; sums are float. Strides count elements.
//
// Shapes: M rows, T tokens, N queries, H heads, C kv_lora_rank, R qk_rope_head_dim, E experts, D hidden_size.
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#include "elementwise.h"
#include "threads.h"
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace floats {

constexpr int kLanes = 16;
constexpr size_t kCacheLine = 64;        // bytes
constexpr size_t kAhead = 8192;          // bytes of a weight between what is read and what is asked for
constexpr int64_t kRowTile = 16;         // rows that meet a head's weight while it is in the cache
constexpr int64_t kManyRows = 6;         // rows that pay for widening a head's weight once
constexpr int64_t kKeyTile = 32;         // keys between two looks at the maximum
constexpr int64_t kMostHeads = 8;        // heads of a query that read the same latents together
constexpr int64_t kQueryTile = 32;       // queries of a prompt that meet the same keys
constexpr int64_t kPromptTile = 64;      // keys that queries of a prompt see between two looks at the maximum
constexpr int64_t kColumnTile = 16;      // experts of one task
constexpr int64_t kSumTile = 256;        // columns that are summed up while they stay in the cache
constexpr int64_t kLeastWork = 1 << 17;  // products that are worth waking another thread for

template <class T>
struct HeadRows {
  const T* from;
  int64_t rows, stride;
};

template <class T>
struct HeadWeight {
  const T* from;
  int64_t columns, size, column_stride, size_stride;
};

template <class T>
struct LatentQuery {
  const T *latent, *rope;  // [heads, C], [heads, R], those rope_stride apart
  int64_t rope_stride, heads, length;
  const int64_t* table;
  float scale;
};

template <class T>
struct LatentCache {
  const T* from;  // [blocks, block_size, C + R]
  int64_t block_size, values, rope;
};

// What `attend` needs between its tiles.
struct Attended {
  float *queries, *latents, *scores, *result;
  float maximum[kMostHeads], sum[kMostHeads], fading[kMostHeads];
};

// The keys [size, most_keys], their rows `key_stride` apart, and values [most_keys, values] of one head.
struct PromptHead {
  float *keys, *value_rows;
  int64_t size, values, most_keys, key_stride, start;
  float scale;
};

// What `attend_prompt` needs between its tiles.
struct PromptState {
  float *queries, *scores, *result;
  float maximum[kQueryTile], sum[kQueryTile], fading[kQueryTile];
};

// Rows that lie in several pieces of memory, one after another: part i ends before row ends[i] of all.
struct Parts {
  const void* const* from;
  const int64_t* ends;
  int64_t count;

  // Null where no part holds it.
  template <class T>
  const T* row(int64_t position, int64_t size) const {
    int64_t begin = 0;
    for (int64_t part = 0; part < count; begin = ends[part++])
      if (position < ends[part]) return static_cast<const T*>(from[part]) + (position - begin) * size;
    return nullptr;
  }
};

#define INLINE_LAMBDA __attribute__((always_inline))

#define FUSED_LANES 1
namespace portable {
#include "float_paths.h"
}

#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#undef FUSED_LANES
#define FUSED_LANES 8
namespace avx2 {
#include "float_paths.h"
}
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif
#undef FUSED_LANES
#define FUSED_LANES 16
namespace avx512 {
#include "float_paths.h"
}
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#define ON_PATH(path, call) ((path) == 2 ? avx512::call : (path) == 1 ? avx2::call : portable::call)
#else
#define ON_PATH(path, call) portable::call
#endif

// What tasks that run side by side write between their steps, in one piece.
class Workspace {
 public:
  explicit Workspace(int64_t size) : memory_(new float[size]) {}
  float* take(int64_t size) {
    float* taken = memory_.get() + used_;
    used_ += size;
    return taken;
  }

 private:
  std::unique_ptr<float[]> memory_;
  int64_t used_ = 0;
};

int threads_for(int threads, int64_t tasks, int64_t products) {
  return products < kLeastWork ? 1
                               : static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, tasks)));
}

template <class T>
void norm_rows(int path, int threads, const T* x, int64_t m, int64_t size, int64_t stride, const T* weight,
               float eps, T* out) {
  for_each(threads_for(threads, m, m * size), m, [&](int64_t row) {
    ON_PATH(path, rms_norm(x + row * stride, weight, eps, size, out + row * size));
  });
}

template <class T>
void swiglu_rows(int path, int threads, const T* gate, const T* up, int64_t m, int64_t size,
                 int64_t gate_stride, int64_t up_stride, T* out) {
  for_each(threads_for(threads, m, m * size * 8), m, [&](int64_t row) {
    ON_PATH(path, swiglu(gate + row * gate_stride, up + row * up_stride, size, out + row * size));
  });
}

template <class T>
void add_and_norm_rows(int path, int threads, T* residual, const T* update, int64_t m, int64_t size,
                       const T* weight, float eps, T* out) {
  for_each(threads_for(threads, m, m * size), m, [&](int64_t row) {
    const int64_t first = row * size;
    ON_PATH(path, add_rms_norm(residual + first, update + first, weight, eps, size, out + first));
  });
}

template <class T>
void add_routed_rows(int path, int threads, T* shared, const float* routed, int64_t m, int64_t size) {
  for_each(threads_for(threads, m, m * size), m,
           [&](int64_t row) { ON_PATH(path, add_routed(shared + row * size, routed + row * size, size)); });
}

// The last `rope` elements of each head of a query, `head_stride` apart, and a latent of `values` elements, to
// be normalised, with the key of `rope` elements behind it.
template <class T>
struct Projected {
  T* q;
  const T* latents;
  int64_t heads, q_stride, head_stride, latent_stride, values, rope;
};

// Turns queries in place, and writes latents to their slots of the cache.
template <class T>
void place_rows(int path, int threads, const Projected<T>& rows, int64_t tokens, const T* weight, float eps,
                const T* bias, const float* cos, const float* sin, T* cache, const int64_t* slots) {
  const int64_t width = rows.values + rows.rope;
  const int64_t work = tokens * (rows.heads * rows.rope + width);
  for_each(threads_for(threads, tokens, work), tokens, [&](int64_t token) {
    const float *own_cos = cos + token * (rows.rope / 2), *own_sin = sin + token * (rows.rope / 2);
    for (int64_t head = 0; head < rows.heads; head++) {
      T* q = rows.q + token * rows.q_stride + head * rows.head_stride;
      ON_PATH(path, rotate(q, own_cos, own_sin, rows.rope, q));
    }
    const T* latent = rows.latents + token * rows.latent_stride;
    T* slot = cache + slots[token] * width;
    ON_PATH(path, rms_norm(latent, weight, eps, rows.values, slot));
    if (bias) ON_PATH(path, add_row(slot, bias, rows.values));
    ON_PATH(path, rotate(latent + rows.values, own_cos, own_sin, rows.rope, slot + rows.values));
  });
}

template <class T, class Sum>
void sum_tokens(int path, int threads, const Parts& parts, int64_t size, const int64_t* positions,
                const float* weights, int64_t tokens, int64_t slots, Sum* out) {
  for_each(threads_for(threads, tokens, tokens * slots * size), tokens, [&](int64_t token) {
    ON_PATH(path, sum_slots<T>(parts, size, positions + token * slots, weights + token * slots, slots,
                               out + token * size));
  });
}

template <class T>
bool gate_rows(int path, int threads, const T* x, int64_t m, int64_t size, const float* weight,
               int64_t experts, float* out) {
  const int64_t row_tiles = ceil_div(m, kRowTile), column_tiles = ceil_div(experts, kColumnTile);
  const int64_t tasks = row_tiles * column_tiles;
  return try_each(threads_for(threads, tasks, m * size * experts), tasks, [&](int64_t task) {
    const int64_t row = task / column_tiles * kRowTile, column = task % column_tiles * kColumnTile;
    const int64_t rows = std::min(kRowTile, m - row), columns = std::min(kColumnTile, experts - column);
    Workspace own(rows * size);
    ON_PATH(path, row_products(x + row * size, size, rows, weight + column * size, columns, size,
                               out + row * experts + column, experts, own.take(rows * size)));
  });
}

template <class T>
bool head_rows(int path, int threads, const T* x, int64_t tokens, int64_t heads, int64_t token_stride,
               int64_t head_stride, const HeadWeight<T>& weight, int64_t weight_stride, T* out) {
  const int64_t products = tokens * heads * weight.columns * weight.size;
  return try_each(threads_for(threads, heads, products), heads, [&](int64_t head) {
    HeadWeight<T> own = weight;
    own.from += head * weight_stride;
    const int64_t rows = std::min(kRowTile, tokens), is_many = tokens >= kManyRows;
    Workspace work(rows * (weight.size + weight.columns) + is_many * weight.size * weight.columns);
    float* wide = work.take(rows * weight.size);
    float* sums = work.take(rows * weight.columns);
    float* wide_weight = is_many ? work.take(weight.size * weight.columns) : nullptr;
    ON_PATH(path,
            head_products<T>({x + head * head_stride, tokens, token_stride}, own, out + head * weight.columns,
                             heads * weight.columns, wide, sums, wide_weight));
  });
}

#include "latent_attention.h"
#include "prompt_attention.h"

template <class T>
const T* as(const void* from) {
  return static_cast<const T*>(from);
}
template <class T>
T* as(void* to) {
  return static_cast<T*>(to);
}

}  // namespace floats

using namespace floats;

#define EXPORT __attribute__((visibility("default")))
// Runs `call` with T as what `is_bfloat16` says.
#define FOR_TYPE(is_bfloat16, call) \
  if (is_bfloat16) {                \
    using T = Bfloat16;             \
    call;                           \
  } else {                          \
    using T = float;                \
    call;                           \
  }

extern "C" {

// x [M, size], rows `stride` apart, weight [size] -> out [M, size]: normalised, rounded, then weighted.
EXPORT void float_rms_norm(int path, int threads, int is_bfloat16, const void* x, int64_t m, int64_t size,
                           int64_t stride, const void* weight, float eps, void* out){
    FOR_TYPE(is_bfloat16,
             norm_rows(path, threads, as<T>(x), m, size, stride, as<T>(weight), eps, as<T>(out)))}

// gate, up [M, size] -> out [M, size]: silu(gate) * up.
EXPORT void float_swiglu(int path, int threads, int is_bfloat16, const void* gate, const void* up, int64_t m,
                         int64_t size, int64_t gate_stride, int64_t up_stride, void* out){
    FOR_TYPE(is_bfloat16,
             swiglu_rows(path, threads, as<T>(gate), as<T>(up), m, size, gate_stride, up_stride, as<T>(out)))}

// residual [M, size] += update [M, size], rounded; out [M, size] is the residual, as float_rms_norm has it.
EXPORT void float_add_rms_norm(int path, int threads, int is_bfloat16, void* residual, const void* update,
                               int64_t m, int64_t size, const void* weight, float eps, void* out){
    FOR_TYPE(is_bfloat16, add_and_norm_rows(path, threads, as<T>(residual), as<T>(update), m, size,
                                            as<T>(weight), eps, as<T>(out)))}

// shared [M, size] += routed [M, size] float, rounded once.
EXPORT void float_add_routed(int path, int threads, int is_bfloat16, void* shared, const float* routed,
                             int64_t m, int64_t size){
    FOR_TYPE(is_bfloat16, add_routed_rows(path, threads, as<T>(shared), routed, m, size))}

// The last R of each q [T, H, size + R], in place, and k [T, R] are turned, neighbouring pairs by their angle,
// cos and sin [T, R / 2]. latents [T, C] are normalised and get the bias [C], or none; with their k behind
// them they go to slots [T] of cache [blocks, block_size, C + R]. `q` is the first element to turn; strides: of
// queries, of their heads, of latents.
EXPORT void float_rotate_and_store(int path, int threads, int is_bfloat16, void* q, const void* latents,
                                   int64_t tokens, int64_t heads, int64_t values, int64_t rope,
                                   const int64_t* strides, const void* weight, float eps, const void* bias,
                                   const float* cos, const float* sin, void* cache, const int64_t* slots) {
  FOR_TYPE(is_bfloat16, place_rows<T>(path, threads,
                                      {as<T>(q), as<T>(latents), heads, strides[0], strides[1], strides[2],
                                       values, rope},
                                      tokens, as<T>(weight), eps, as<T>(bias), cos, sin, as<T>(cache), slots))
}

// rows [ends[count - 1], size] in `count` parts, positions and weights [T, slots] -> out [T, size], float or
// double: products rounded to float, added in slot order in double. A position beyond all parts adds nothing.
EXPORT void float_sum_slots(int path, int threads, int is_bfloat16, const void* const* from,
                            const int64_t* ends, int64_t count, int64_t size, const int64_t* positions,
                            const float* weights, int64_t tokens, int64_t slots, int is_double, void* out) {
  const Parts parts = {from, ends, count};
  FOR_TYPE(is_bfloat16, if (is_double) sum_tokens<T>(path, threads, parts, size, positions, weights, tokens,
                                                     slots, as<double>(out));
           else sum_tokens<T>(path, threads, parts, size, positions, weights, tokens, slots, as<float>(out)))
}

// x [M, D], weight [E, D] float -> out [M, E] float. Returns 0, or 1 if there is not enough memory.
EXPORT int float_gate_logits(int path, int threads, int is_bfloat16, const void* x, int64_t m, int64_t size,
                             const float* weight, int64_t experts, float* out){
    FOR_TYPE(is_bfloat16, return !gate_rows(path, threads, as<T>(x), m, size, weight, experts, out))}

// x [T, H, size], weight [H, columns, size] -> out [T, H, columns]; one of the last two strides of the weight
// is 1. Returns as float_gate_logits does.
EXPORT int float_per_head_linear(int path, int threads, int is_bfloat16, const void* x, int64_t tokens,
                                 int64_t heads, int64_t size, int64_t token_stride, int64_t head_stride,
                                 const void* weight, int64_t columns, int64_t weight_stride,
                                 int64_t column_stride, int64_t size_stride, void* out){
    FOR_TYPE(is_bfloat16,
             return !head_rows<T>(path, threads, as<T>(x), tokens, heads, token_stride, head_stride,
                                  {as<T>(weight), columns, size, column_stride, size_stride}, weight_stride,
                                  as<T>(out)))}

// q [N, H, size + R], weight [H, size + columns, C], cache [blocks, block_size, C + R],
// tables [N, table_stride], lengths [N] -> out [N, H, columns]; strides: of queries and their heads, of the
// weight's heads and lines. Returns as float_gate_logits does.
EXPORT int float_absorbed_attention(int path, int threads, int is_bfloat16, const void* q, int64_t queries,
                                    int64_t heads, int64_t size, const void* weight, int64_t columns,
                                    const int64_t* strides, const void* cache, int64_t block_size,
                                    int64_t values, int64_t rope, const int64_t* tables, int64_t table_stride,
                                    const int64_t* lengths, float scale, void* out){
    FOR_TYPE(is_bfloat16,
             return !absorbed_rows<T>(
                 path, threads,
                 {as<T>(q), as<T>(weight), queries, heads, size, columns, strides[0], strides[1], strides[2],
                  strides[3]},
                 {as<T>(cache), block_size, values, rope}, {tables, table_stride, lengths}, scale,
                 as<T>(out)))}

// q [T, H, size], k [S, H, size], v [S, H, values] -> out [T, H, values]; strides: of tokens and of heads, of
// q, k and v. Returns as float_gate_logits does.
EXPORT int float_prompt_attention(int path, int threads, int is_bfloat16, const void* q, const void* k,
                                  const void* v, int64_t queries, int64_t heads, int64_t size, int64_t values,
                                  int64_t start, const int64_t* strides, float scale, void* out){
    FOR_TYPE(is_bfloat16, return !prompt_rows<T>(path, threads,
                                                 {as<T>(q),
                                                  as<T>(k),
                                                  as<T>(v),
                                                  queries,
                                                  heads,
                                                  size,
                                                  values,
                                                  start,
                                                  {strides[0], strides[1]},
                                                  {strides[2], strides[3]},
                                                  {strides[4], strides[5]}},
                                                 scale, as<T>(out)))}

}  // extern "C"
