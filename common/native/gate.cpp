// Which experts a token goes to, and how much each of them weighs: router/kernels/gate.py in one call.
//
// A C ABI without torch. NaN comes before every number, as in torch.topk, and of equal scores that of the
// lower index. A row gets the same bits in every company, at every number of threads and on every processor.
//
// Shapes: T tokens, K experts per token, E experts, G groups of experts.
#include <vector>

#include "elementwise.h"
#include "places.h"
#include "threads.h"

namespace gate {

constexpr int64_t kRowTile = 16;           // rows of one task
constexpr int64_t kLeastScores = 1 << 14;  // scores that are worth waking another thread for

struct Rules {
  int64_t experts, groups, kept_groups, top_k;
  bool is_softmax, is_by_best_two, is_normalized;
  float factor;
};

// What one row needs at a time.
struct Scratch {
  explicit Scratch(const Rules& rules)
      : scores(rules.experts), choice(rules.experts), places(rules.experts), groups(rules.groups) {}
  std::vector<float> scores, choice;     // [E], and with the correction
  std::vector<uint64_t> places, groups;  // [E], [G]
};

// Brings the `count` highest places to the front, in their order. Few pass the first test: that takes less
// time than a heap.
void take_highest(uint64_t* places, int64_t size, int64_t count) {
  for (int64_t i = 0; i < size; i++) {
    const uint64_t place = places[i];
    int64_t to = i;
    if (i >= count) {
      if (place < places[count - 1]) continue;
      places[i] = places[count - 1];
      to = count - 1;
    }
    for (; to > 0 && places[to - 1] < place; to--) places[to] = places[to - 1];
    places[to] = place;
  }
}

// In double and in order, rounded once.
float sum_of(const float* x, int64_t size) {
  double sum = 0;
  for (int64_t i = 0; i < size; i++) sum += x[i];
  return static_cast<float>(sum);
}

void softmax(const float* logits, int64_t size, float* scores) {
  float maximum = logits[0];
  for (int64_t i = 1; i < size; i++) maximum = logits[i] > maximum ? logits[i] : maximum;
  for (int64_t i = 0; i < size; i++) scores[i] = exponential(logits[i] - maximum);
  const float sum = sum_of(scores, size);
  for (int64_t i = 0; i < size; i++) scores[i] /= sum;
}

void sigmoid(const float* logits, int64_t size, float* scores) {
  for (int64_t i = 0; i < size; i++) scores[i] = 1.0f / (1.0f + exponential(-logits[i]));
}

// The best score of the group that has these places, or the sum of its two best.
float group_score(const Scratch& row, const uint64_t* places, int64_t size, bool is_by_best_two) {
  uint64_t best = 0, second = 0;
  for (int64_t i = 0; i < size; i++) {
    second = std::max(second, std::min(best, places[i]));
    best = std::max(best, places[i]);
  }
  const float score = row.choice[index_of(best)];
  return is_by_best_two && size > 1 ? score + row.choice[index_of(second)] : score;
}

// Takes every expert out of the choice whose group is not among the best.
void drop_groups(const Rules& rules, Scratch& row) {
  const int64_t size = rules.experts / rules.groups;
  for (int64_t group = 0; group < rules.groups; group++) {
    const float score = group_score(row, row.places.data() + group * size, size, rules.is_by_best_two);
    row.groups[group] = place_of(score, group);
  }
  take_highest(row.groups.data(), rules.groups, rules.kept_groups);
  for (int64_t i = rules.kept_groups; i < rules.groups; i++)
    std::fill_n(row.places.begin() + index_of(row.groups[i]) * size, size, 0);
}

void choose(const Rules& rules, const float* logits, const float* bias, Scratch& row, int64_t* ids) {
  (rules.is_softmax ? softmax : sigmoid)(logits, rules.experts, row.scores.data());
  for (int64_t i = 0; i < rules.experts; i++) {
    row.choice[i] = bias ? row.scores[i] + bias[i] : row.scores[i];
    row.places[i] = place_of(row.choice[i], i);
  }
  if (rules.kept_groups < rules.groups) drop_groups(rules, row);
  take_highest(row.places.data(), rules.experts, rules.top_k);
  for (int64_t i = 0; i < rules.top_k; i++) ids[i] = index_of(row.places[i]);
}

void weigh(const Rules& rules, const Scratch& row, const int64_t* ids, float* weights) {
  for (int64_t i = 0; i < rules.top_k; i++) weights[i] = row.scores[ids[i]];
  const float divisor = rules.is_normalized ? sum_of(weights, rules.top_k) + 1e-20f : 1.0f;
  for (int64_t i = 0; i < rules.top_k; i++) weights[i] = weights[i] / divisor * rules.factor;
}

}  // namespace gate

using namespace gate;

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// logits [T, E], bias [E] or null -> ids and weights [T, K]; groups divide E, and those kept have K experts.
// The bias corrects what experts are chosen by, but not their weights. A group is kept for its best expert or
// for its two best. Weights may be normalised to a sum of 1, then they are multiplied by `factor`. Returns 0,
// or 1 without memory.
EXPORT int gate_choose_experts(int threads, const float* logits, const float* bias, int64_t tokens,
                               int64_t experts, int64_t groups, int64_t kept_groups, int64_t top_k,
                               int is_softmax, int is_by_best_two, int is_normalized, float factor,
                               int64_t* ids, float* weights) {
  const Rules rules = {
      experts, groups, kept_groups, top_k, is_softmax != 0, is_by_best_two != 0, is_normalized != 0, factor};
  const int team = tokens * experts < kLeastScores ? 1 : threads;
  return !try_each(team, ceil_div(tokens, kRowTile), [&](int64_t tile) {
    Scratch row(rules);
    for (int64_t token = tile * kRowTile; token < std::min((tile + 1) * kRowTile, tokens); token++) {
      choose(rules, logits + token * experts, bias, row, ids + token * top_k);
      weigh(rules, row, ids + token * top_k, weights + token * top_k);
    }
  });
}

}  // extern "C"
