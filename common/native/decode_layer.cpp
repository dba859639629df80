// What a layer does to generated tokens before it asks its experts, in one call: norm, attention by int8
// linears, norm, and the choice of experts.
//
// It is the other kernels one after another, with their bits. Between two calls Python runs as long as a small
// kernel does, from memory where weights have driven it out of the cache, and helpers fall asleep.
//
// Shapes: T tokens, D hidden_size, H heads, C kv_lora_rank, R qk_rope_head_dim, L q_lora_rank, E experts,
// K experts per token.
#include <cstdint>
#include <memory>
#include <new>

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// By the other files of this folder.
void float_rms_norm(int path, int threads, int is_bfloat16, const void* x, int64_t m, int64_t size,
                    int64_t stride, const void* weight, float eps, void* out);
void float_add_rms_norm(int path, int threads, int is_bfloat16, void* residual, const void* update, int64_t m,
                        int64_t size, const void* weight, float eps, void* out);
void float_rotate_and_store(int path, int threads, int is_bfloat16, void* q, const void* latents,
                            int64_t tokens, int64_t heads, int64_t values, int64_t rope,
                            const int64_t* strides, const void* weight, float eps, const void* bias,
                            const float* cos, const float* sin, void* cache, const int64_t* slots);
int float_absorbed_attention(int path, int threads, int is_bfloat16, const void* q, int64_t queries,
                             int64_t heads, int64_t size, const void* weight, int64_t columns,
                             const int64_t* strides, const void* cache, int64_t block_size, int64_t values,
                             int64_t rope, const int64_t* tables, int64_t table_stride,
                             const int64_t* lengths, float scale, void* out);
int float_gate_logits(int path, int threads, int is_bfloat16, const void* x, int64_t m, int64_t size,
                      const float* weight, int64_t experts, float* out);
int gate_choose_experts(int threads, const float* logits, const float* bias, int64_t tokens, int64_t experts,
                        int64_t groups, int64_t kept_groups, int64_t top_k, int is_softmax,
                        int is_by_best_two, int is_normalized, float factor, int64_t* ids, float* weights);
int int8_quantising_linear(int path, int threads, int is_bfloat16, const void* x, int64_t m,
                           const void* weight, void* out);

// The weights of a layer, and its sizes: `nope` and `values_out` are a head's parts of kv_b, whose other
// dimension is C. Null: q_a and its norm where queries are projected at once, the gate where a layer has no
// experts, its bias where there is none. common/native_decode_layer.py has the same fields.
struct DecodeLayer {
  const void *input_norm, *q_a, *q_a_norm, *q, *kv_a, *kv_a_norm, *kv_a_norm_bias, *kv_b, *o, *post_norm;
  const float *gate, *gate_bias;
  int64_t hidden_size, q_lora_rank, heads, nope, rope, latents, values, block_size;
  int64_t experts, groups, kept_groups, top_k;
  int32_t is_softmax, is_by_best_two, is_normalized;
  float eps, latent_eps, scale, factor;
};

// What differs from step to step. `update` [T, D], or null, is added to the residual [T, D] first; cos and sin
// [T, R / 2], slots and lengths [T], tables [T, table_stride], cache [blocks, block_size, C + R].
struct DecodeRows {
  void* residual;
  const void* update;
  const float *cos, *sin;
  const int64_t *slots, *tables, *lengths;
  void* cache;
  int64_t tokens, table_stride;
};

}  // extern "C"

namespace {

class Memory {
 public:
  Memory(int64_t rows, int64_t element_bytes) : rows_(rows), element_bytes_(element_bytes) {}
  // Of [T, columns], for the length of the call.
  void* rows_of(int64_t columns) {
    const int64_t bytes = rows_ * columns * element_bytes_;
    parts_[count_].reset(new char[bytes]);
    return parts_[count_++].get();
  }

 private:
  const int64_t rows_, element_bytes_;
  std::unique_ptr<char[]> parts_[6];
  int count_ = 0;
};

}  // namespace

extern "C" {

// -> out [T, D], normalised for experts or MLP, and what experts are chosen, ids and weights [T, K]. The
// residual is brought up to date. Returns 0, or 1 without memory.
EXPORT int decode_layer(int path, int threads, int is_bfloat16, const DecodeLayer* layer,
                        const DecodeRows* step, void* out, int64_t* ids, float* weights) try {
  const DecodeLayer& own = *layer;
  const int64_t tokens = step->tokens, hidden_size = own.hidden_size, width = own.latents + own.rope;
  const int64_t q_size = own.nope + own.rope, head_lines = own.nope + own.values;
  Memory memory(tokens, is_bfloat16 ? 2 : 4);

  void* normed = memory.rows_of(hidden_size);
  if (step->update)
    float_add_rms_norm(path, threads, is_bfloat16, step->residual, step->update, tokens, hidden_size,
                       own.input_norm, own.eps, normed);
  else
    float_rms_norm(path, threads, is_bfloat16, step->residual, tokens, hidden_size, hidden_size,
                   own.input_norm, own.eps, normed);

  int failure = 0;
  const auto multiply = [&](const void* x, const void* weight, void* to) {
    failure |= int8_quantising_linear(path, threads, is_bfloat16, x, tokens, weight, to);
  };
  void* q = memory.rows_of(own.heads * q_size);
  if (own.q_a) {
    void* q_latents = memory.rows_of(own.q_lora_rank);
    multiply(normed, own.q_a, q_latents);
    void* q_normed = memory.rows_of(own.q_lora_rank);
    float_rms_norm(path, threads, is_bfloat16, q_latents, tokens, own.q_lora_rank, own.q_lora_rank,
                   own.q_a_norm, own.latent_eps, q_normed);
    multiply(q_normed, own.q, q);
  } else {
    multiply(normed, own.q, q);
  }
  void* latents = memory.rows_of(width);
  multiply(normed, own.kv_a, latents);
  if (failure) return failure;

  const int64_t q_strides[] = {own.heads * q_size, q_size, width};
  char* first_turned = static_cast<char*>(q) + own.nope * (is_bfloat16 ? 2 : 4);
  float_rotate_and_store(path, threads, is_bfloat16, first_turned, latents, tokens, own.heads, own.latents,
                         own.rope, q_strides, own.kv_a_norm, own.latent_eps, own.kv_a_norm_bias, step->cos,
                         step->sin, step->cache, step->slots);
  const int64_t strides[] = {own.heads * q_size, q_size, head_lines * own.latents, own.latents};
  void* attended = memory.rows_of(own.heads * own.values);
  failure = float_absorbed_attention(path, threads, is_bfloat16, q, tokens, own.heads, own.nope, own.kv_b,
                                     own.values, strides, step->cache, own.block_size, own.latents, own.rope,
                                     step->tables, step->table_stride, step->lengths, own.scale, attended);
  if (failure) return failure;
  multiply(attended, own.o, normed);  // in the place of what nobody needs any more
  if (failure) return failure;
  float_add_rms_norm(path, threads, is_bfloat16, step->residual, normed, tokens, hidden_size, own.post_norm,
                     own.eps, out);
  if (!own.gate) return 0;

  const std::unique_ptr<float[]> logits(new float[tokens * own.experts]);
  failure = float_gate_logits(path, threads, is_bfloat16, out, tokens, hidden_size, own.gate, own.experts,
                              logits.get());
  if (failure) return failure;
  return gate_choose_experts(threads, logits.get(), own.gate_bias, tokens, own.experts, own.groups,
                             own.kept_groups, own.top_k, own.is_softmax, own.is_by_best_two,
                             own.is_normalized, own.factor, ids, weights);
} catch (const std::bad_alloc&) {
  return 1;
}

}  // extern "C"
