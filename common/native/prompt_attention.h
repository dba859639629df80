// Attention over a prompt, each head for itself: a part of floats.cpp, from which it has paths and threads.

// q [T, H, size], k [S, H, size], v [S, H, values] by their strides; S = start + T keys are read.
template <class T>
struct Prompt {
  const T *q, *k, *v;
  int64_t queries, heads, size, values, start;
  int64_t q_strides[2], k_strides[2], v_strides[2];  // of tokens and of heads
};

// Copies the keys and values of one head to float, keys with their dimensions first.
template <class T>
void lay_out_head(const Prompt<T>& prompt, int64_t head, PromptHead& to) {
  const T* k = prompt.k + head * prompt.k_strides[1];
  const T* v = prompt.v + head * prompt.v_strides[1];
  for (int64_t first = 0; first < to.most_keys; first += kLanes) {  // a cache line of each dimension at once
    const int64_t last = std::min<int64_t>(first + kLanes, to.most_keys);
    for (int64_t i = 0; i < to.size; i++)
      for (int64_t key = first; key < last; key++)
        to.keys[i * to.key_stride + key] = widen(k[key * prompt.k_strides[0] + i]);
  }
  for (int64_t key = 0; key < to.most_keys; key++)
    for (int64_t i = 0; i < to.values; i++)
      to.value_rows[key * to.values + i] = widen(v[key * prompt.v_strides[0] + i]);
}

template <class T>
bool prompt_rows(int path, int threads, const Prompt<T>& prompt, float scale, T* out) {
  const int64_t keys = prompt.start + prompt.queries;
  const int64_t products = prompt.queries * keys * prompt.heads * prompt.size;
  return try_each(threads_for(threads, prompt.heads, products), prompt.heads, [&](int64_t head) {
    // An odd number of cache lines: rows that a power of two lies between would share a few sets of the cache.
    const int64_t key_stride = (ceil_div(keys, kLanes) | 1) * kLanes;
    Workspace work(key_stride * prompt.size + keys * prompt.values +
                   kQueryTile * (prompt.size + prompt.values + kPromptTile));
    PromptHead own = {work.take(key_stride * prompt.size),
                      work.take(keys * prompt.values),
                      prompt.size,
                      prompt.values,
                      keys,
                      key_stride,
                      prompt.start,
                      scale};
    lay_out_head(prompt, head, own);
    PromptState state;
    state.queries = work.take(kQueryTile * prompt.size);
    state.scores = work.take(kQueryTile * kPromptTile);
    state.result = work.take(kQueryTile * prompt.values);
    ON_PATH(path,
            attend_prompt<T>({prompt.q + head * prompt.q_strides[1], prompt.queries, prompt.q_strides[0]},
                             own, state, prompt.heads * prompt.values, out + head * prompt.values));
  });
}
