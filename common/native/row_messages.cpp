// Messages of int8 rows at ep_level 2, each end's part of a layer in one call: the router's, from the choice of
// experts to what is sent, and the expert worker's, from what came to its reply.
//
// They are the other kernels one after another, with their bits. Between two calls Python runs longer than all
// of them take in a decode step, from memory where weights have driven it out of the cache.
//
// Shapes: T tokens, K experts per token, S slots, T * K, D hidden_size, R rows, W workers, E experts, E_local of
// a worker, M most experts of one.
#include <chrono>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// By the other files of this folder.
void int8_quantise(int path, int threads, int is_bfloat16, const void* x, int64_t m, int64_t k, int8_t* rows,
                   float* scales);
int int8_experts(int path, int threads, const int8_t* rows, const float* row_scales, int64_t num_rows,
                 int64_t num_experts, const int64_t* rows_of_expert, const void* weights, int is_bfloat16,
                 void* out);
int route_slots(const int64_t* ids, int64_t slots, int64_t top_k, const int64_t* first_keys, int64_t experts,
                int64_t workers, int64_t most_local, int64_t* counts, int64_t* ends, int64_t* token_of,
                int64_t* position_of);
void route_write(int threads, const int64_t* counts, int64_t experts, const int64_t* token_of, int64_t low,
                 int64_t high, const uint8_t* tokens, int64_t row_bytes, const float* scales, uint8_t* to);

// The front of every message: common/exchange/wire.py has the same words.
struct Header {
  int64_t magic, kind, term, epoch, incarnation, step_id, layer_id, micro_batch, round, rounds, ep_level;
  int64_t num_tokens, num_rows, num_experts, num_bytes, capacity_bytes, micro_batches, pass_rows, first_key;
  int64_t is_grouped, is_int8, is_window, received_ns, compute_start_ns, compute_end_ns;
};

// What a router knows of a layer: where each expert's slots are computed, first_keys [E], and how many experts
// each worker has, num_local [W]. common/native_rows.py has the same fields here and below.
struct SentLayer {
  const int64_t *first_keys, *num_local;
  int64_t experts, workers, most_local, top_k, hidden_size;
};

// The experts of a layer at a worker, gate_up and down of each, in turn; none where its rows are not int8.
struct HeldLayer {
  const void* weights;
  int64_t experts;
};

// What a worker answers by itself: rows of the step that `step` announced.
struct Answers {
  const HeldLayer* layers;
  int64_t num_layers, hidden_size;
  uint64_t* progress;
  Header step;
};

}  // extern "C"

namespace {

constexpr int64_t kRows = 2, kReply = 3;
constexpr int64_t kAllToAll = 2;
constexpr int64_t kScaleBytes = sizeof(float);

// By the clock of Python's time.monotonic_ns.
int64_t now_ns() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
}

int64_t message_bytes(int64_t experts, int64_t rows, int64_t hidden_size) {
  return sizeof(Header) + experts * sizeof(int64_t) + rows * (kScaleBytes + hidden_size);
}

// Whether a message is one of those, and not longer than what came; else nothing is said of it.
bool is_of_step(const Header& found, const Answers& own, int64_t came_bytes) {
  const Header& step = own.step;
  if (found.magic != step.magic || found.kind != kRows || found.term != step.term ||
      found.epoch != step.epoch || found.incarnation != step.incarnation || found.step_id != step.step_id)
    return false;
  if (step.ep_level != kAllToAll || found.ep_level != kAllToAll || !step.is_grouped || !found.is_int8 ||
      found.is_window)
    return false;
  if (found.layer_id < 0 || found.layer_id >= own.num_layers || !own.layers[found.layer_id].weights)
    return false;
  if (found.micro_batch < 0 || found.micro_batch >= step.micro_batches || found.num_tokens < 0 ||
      found.num_tokens > step.num_tokens || found.round < 0 || found.num_rows < 0 ||
      found.num_rows > came_bytes)
    return false;
  const int64_t experts = own.layers[found.layer_id].experts;
  const int64_t bytes = message_bytes(experts, found.num_rows, own.hidden_size);
  return found.num_experts == experts && found.num_bytes == bytes && bytes <= came_bytes;
}

}  // namespace

extern "C" {

// hidden [T, D] and the chosen experts, ids [S] -> for each worker that gets rows their message, at memory [W],
// with the words of headers [W] but for what the rows are; ends [W], one past each worker's last row, and
// position_of [S], the row of each slot. Returns 0, 1 without memory, or 2 if an expert was chosen that nobody
// holds.
EXPORT int rows_write(int path, int threads, int is_bfloat16, const SentLayer* layer, int64_t layer_id,
                      int64_t micro_batch, const void* hidden, const int64_t* ids, int64_t tokens,
                      const Header* headers, uint8_t* const* memory, int64_t* ends,
                      int64_t* position_of) try {
  const SentLayer& own = *layer;
  const int64_t slots = tokens * own.top_k;
  std::vector<int64_t> counts(own.workers * own.most_local), token_of(slots);
  if (route_slots(ids, slots, own.top_k, own.first_keys, own.experts, own.workers, own.most_local,
                  counts.data(), ends, token_of.data(), position_of))
    return 2;
  std::vector<int8_t> codes(tokens * own.hidden_size);
  std::vector<float> scales(tokens);
  int8_quantise(path, threads, is_bfloat16, hidden, tokens, own.hidden_size, codes.data(), scales.data());
  for (int64_t worker = 0, first = 0; worker < own.workers; first = ends[worker++]) {
    const int64_t rows = ends[worker] - first, experts = own.num_local[worker];
    if (!rows) continue;
    Header header = headers[worker];
    header.layer_id = layer_id;
    header.micro_batch = micro_batch;
    header.num_tokens = tokens;
    header.num_rows = rows;
    header.num_experts = experts;
    header.num_bytes = message_bytes(experts, rows, own.hidden_size);
    header.is_int8 = 1;
    std::memcpy(memory[worker], &header, sizeof header);
    route_write(threads, counts.data() + worker * own.most_local, experts, token_of.data() + first, 0, rows,
                reinterpret_cast<const uint8_t*>(codes.data()), own.hidden_size, scales.data(),
                memory[worker] + sizeof header);
  }
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

// How many rows a message has that is one of the step's, and for experts that are held in int8; -1 where it is
// not: that is for the caller to look at.
EXPORT int64_t rows_count(const Answers* answers, const uint8_t* message, int64_t came_bytes) {
  Header header;
  if (came_bytes < static_cast<int64_t>(sizeof header)) return -1;
  std::memcpy(&header, message, sizeof header);
  return is_of_step(header, *answers, came_bytes) ? header.num_rows : -1;
}

// A message that rows_count has let pass, with so many rows -> its reply, a header and rows [R, D], float or
// bfloat16. Returns as int8_experts does, and 2 also if the message, which others can write to, is none of so many
// rows any more.
EXPORT int rows_answer(int path, int threads, int is_bfloat16, const Answers* answers, const uint8_t* message,
                       int64_t came_bytes, int64_t num_rows, int64_t received_ns, uint8_t* reply) {
  const int64_t start_ns = now_ns();
  Header header;
  std::memcpy(&header, message, sizeof header);
  if (header.num_rows != num_rows || header.layer_id < 0 || header.layer_id >= answers->num_layers) return 2;
  const HeldLayer& layer = answers->layers[header.layer_id];
  if (!layer.weights || message_bytes(layer.experts, num_rows, answers->hidden_size) > came_bytes) return 2;
  const uint8_t* counts = message + sizeof header;
  const uint8_t* scales = counts + layer.experts * sizeof(int64_t);
  const uint8_t* rows = scales + header.num_rows * kScaleBytes;
  ++*answers->progress;
  const int failure = int8_experts(
      path, threads, reinterpret_cast<const int8_t*>(rows), reinterpret_cast<const float*>(scales),
      header.num_rows, layer.experts, reinterpret_cast<const int64_t*>(counts), layer.weights, is_bfloat16,
      reply + sizeof header);
  if (failure) return failure;
  ++*answers->progress;
  header.kind = kReply;
  header.num_bytes = sizeof header + header.num_rows * answers->hidden_size * (is_bfloat16 ? 2 : 4);
  header.received_ns = received_ns;
  header.compute_start_ns = start_ns;
  header.compute_end_ns = now_ns();
  std::memcpy(reply, &header, sizeof header);
  return 0;
}

}  // extern "C"
