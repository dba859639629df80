// Which slot of a token is computed where: keys of slots, and slots in the order of their keys.
//
// A C ABI without torch. A key is worker * M + local index of an expert there. Nothing is allocated.
//
// Shapes: S slots, which are tokens * top_k, E experts, W workers, M most experts of one worker.
#include <algorithm>
#include <cstdint>

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

}  // extern "C"
