// Absorbed attention of generated tokens: a part of floats.cpp, from which it has paths, threads and the
// products of heads.
//
// Its three stages are one call, since between calls helpers fall asleep and Python runs as long as a stage.

// Which latents each query sees: its blocks, and how many positions.
struct Contexts {
  const int64_t* tables;  // [N, table_stride]
  int64_t table_stride;
  const int64_t* lengths;  // [N]
};

// q [N, H, size + R] and weight [H, size + columns, C] by their strides; elements of a line are neighbours.
template <class T>
struct Absorbed {
  const T *q, *weight;
  int64_t queries, heads, size, columns;
  int64_t query_stride, head_stride, weight_stride, line_stride;
};

// latents [N, H, C] are the queries' first parts; what a query finds takes their place.
template <class T>
bool attend_rows(int path, int threads, const Absorbed<T>& absorbed, const LatentCache<T>& cache,
                 const Contexts& contexts, float scale, T* latents) {
  const int64_t queries = absorbed.queries, heads = absorbed.heads;
  int64_t products = 0;
  for (int64_t query = 0; query < queries; query++)
    products += contexts.lengths[query] * heads * (2 * cache.values + cache.rope);
  // Heads of a group share the reading of the latents; small groups keep every thread busy. No bit depends on
  // it.
  const int64_t whole = queries * ceil_div(heads, kMostHeads);
  const int64_t group = whole >= 2 * threads ? kMostHeads : kMostHeads / 2;
  const int64_t groups = ceil_div(heads, group), width = cache.values + cache.rope;
  return try_each(threads_for(threads, queries * groups, products), queries * groups, [&](int64_t task) {
    const int64_t query = task / groups, head = task % groups * group;
    Workspace work(group * (width + kKeyTile + cache.values) + kKeyTile * width);
    Attended state;
    state.queries = work.take(group * width);
    state.latents = work.take(kKeyTile * width);
    state.scores = work.take(group * kKeyTile);
    state.result = work.take(group * cache.values);
    T* own_latents = latents + (query * heads + head) * cache.values;
    const LatentQuery<T> own = {
        own_latents,
        absorbed.q + query * absorbed.query_stride + head * absorbed.head_stride + absorbed.size,
        absorbed.head_stride,
        std::min(group, heads - head),
        contexts.lengths[query],
        contexts.tables + query * contexts.table_stride,
        scale};
    ON_PATH(path, attend(own, cache, state, own_latents));
  });
}

// A head's queries by the first `size` lines of its weight, attention, and what they found by the others.
template <class T>
bool absorbed_rows(int path, int threads, const Absorbed<T>& absorbed, const LatentCache<T>& cache,
                   const Contexts& contexts, float scale, T* out) {
  const int64_t queries = absorbed.queries, heads = absorbed.heads, values = cache.values;
  const std::unique_ptr<T[]> latents(new (std::nothrow) T[queries * heads * values]);
  if (!latents) return false;
  const HeadWeight<T> keys = {absorbed.weight, values, absorbed.size, 1, absorbed.line_stride};
  const HeadWeight<T> results = {absorbed.weight + absorbed.size * absorbed.line_stride, absorbed.columns,
                                 values, absorbed.line_stride, 1};
  return head_rows<T>(path, threads, absorbed.q, queries, heads, absorbed.query_stride, absorbed.head_stride,
                      keys, absorbed.weight_stride, latents.get()) &&
         attend_rows(path, threads, absorbed, cache, contexts, scale, latents.get()) &&
         head_rows<T>(path, threads, latents.get(), queries, heads, heads * values, values, results,
                      absorbed.weight_stride, out);
}
