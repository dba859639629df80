// Which slot of a token is computed where: keys of slots, slots in the order of their keys, and the rows that
// go to a worker.
//
// A C ABI without torch. A key is worker * M + local index of an expert there. Nothing is allocated.
//
// Shapes: T tokens, S slots, which are tokens * top_k, E experts, W workers, M most experts of one worker.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "threads.h"

// Bytes that are worth waking another thread to copy.
constexpr int64_t kLeastCopied = 1 << 19;

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// ids [S], first_keys [E], -1 where nobody holds the expert -> keys [S]. Returns 0, or 1 if an expert was
// chosen that nobody holds.
EXPORT int route_place(const int64_t* ids, int64_t slots, const int64_t* first_keys, int64_t experts,
                       int64_t* keys) {
  for (int64_t slot = 0; slot < slots; slot++) {
    if (ids[slot] < 0 || ids[slot] >= experts || first_keys[ids[slot]] < 0) return 1;
    keys[slot] = first_keys[ids[slot]];
  }
  return 0;
}

// keys [S] -> counts [W, M], ends [W], one past each worker's last row, and slots by key, equal keys as they
// stand: token_of [S], position_of [S]. Returns 0, or 1 if a key is not below W * M.
EXPORT int route_sort(const int64_t* keys, int64_t slots, int64_t top_k, int64_t workers, int64_t most_local,
                      int64_t* counts, int64_t* ends, int64_t* token_of, int64_t* position_of) {
  const int64_t num_keys = workers * most_local;
  std::fill_n(counts, num_keys, 0);
  for (int64_t slot = 0; slot < slots; slot++) {
    if (keys[slot] < 0 || keys[slot] >= num_keys) return 1;
    counts[keys[slot]]++;
  }
  // Counts become where each key's rows begin, then where they end, and counts again.
  int64_t row = 0;
  for (int64_t key = 0; key < num_keys; key++) {
    const int64_t count = counts[key];
    counts[key] = row;
    row += count;
    if (key % most_local == most_local - 1) ends[key / most_local] = row;
  }
  for (int64_t slot = 0; slot < slots; slot++) {
    position_of[slot] = counts[keys[slot]]++;
    token_of[position_of[slot]] = slot / top_k;
  }
  for (int64_t key = num_keys - 1; key > 0; key--) counts[key] -= counts[key - 1];
  return 0;
}

// Both in one: ids [S], first_keys [E] -> what route_sort makes of their keys. Returns as they do.
EXPORT int route_slots(const int64_t* ids, int64_t slots, int64_t top_k, const int64_t* first_keys,
                       int64_t experts, int64_t workers, int64_t most_local, int64_t* counts, int64_t* ends,
                       int64_t* token_of, int64_t* position_of) {
  // A slot's key lies where its row will: the sorting reads it just before it writes there.
  return route_place(ids, slots, first_keys, experts, position_of) ||
         route_sort(position_of, slots, top_k, workers, most_local, counts, ends, token_of, position_of);
}

// Rows `low` ... `high - 1` of a worker: counts [experts] and token_of of all its rows, tokens [T] of row_bytes
// each, scales [T] or null -> at `to`, without gaps: how many of these rows each expert has, their scales if
// there are any, and the rows.
EXPORT void route_write(int threads, const int64_t* counts, int64_t experts, const int64_t* token_of,
                        int64_t low, int64_t high, const uint8_t* tokens, int64_t row_bytes,
                        const float* scales, uint8_t* to) {
  int64_t begin = 0;
  for (int64_t expert = 0; expert < experts; expert++, to += sizeof begin) {
    const int64_t end = begin + counts[expert];
    const int64_t count = std::max<int64_t>(0, std::min(end, high) - std::max(begin, low));
    std::memcpy(to, &count, sizeof count);
    begin = end;
  }
  token_of += low;
  const int64_t rows = high - low;
  for (int64_t row = 0; scales && row < rows; row++, to += sizeof(float))
    std::memcpy(to, scales + token_of[row], sizeof(float));
  for_each(rows * row_bytes < kLeastCopied ? 1 : threads, rows, [&](int64_t row) {
    std::memcpy(to + row * row_bytes, tokens + token_of[row] * row_bytes, row_bytes);
  });
}

}  // extern "C"
