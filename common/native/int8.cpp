// int8 rows times int8 weights (W8A8) on CPUs: one linear, and all local experts of a layer in one call.
//
// A C ABI without torch. The caller names a path that int8_best_path() allows; all give the same bits.
//
// Shapes: M rows, K in-features, N out-features, R rows of all experts, D hidden_size, F expert size.
// Of a packed weight: G = K / 4 rounded up to a multiple of 4, B = N / 16 rounded up.
#include <new>

#include "int8_run.h"

namespace int8 {

constexpr int64_t kLeastQuantised = 1 << 17;  // numbers that are worth waking another thread for

// Adds the jobs of `count` rows that meet the same weights.
void add_jobs(int path, std::vector<Job>& jobs, const Input& in, const Output& out, int64_t count,
              const Weight& first, const Weight& second) {
  const Weight& last = second.blocks ? second : first;
  const int64_t segment = segment_of(path_of(path), {in, out, count, {first, second}, 0});
  for (int64_t row = 0; row < count; row += segment)
    jobs.push_back(
        {in.from(row, first.k), out.from(row, last.n), std::min(segment, count - row), {first, second}, 0});
}

int run(int path, std::vector<Job>&& jobs, int num_stages, int threads) {
  if (!jobs.empty()) Run(path_of(path), std::move(jobs), num_stages, threads).run();
  return 0;
}

}  // namespace int8

using namespace int8;

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// Of this interface. common/native_library.py refuses a library of another one.
EXPORT int int8_version() { return 10; }

// Has the threads of this process compute on a core each: whoever calls a kernel on the one with `first` before
// it among those the process may use. Not in a process that was forked from one with helpers.
EXPORT void threads_place(int first) { Helpers::of_process().place(first); }

// Has the helpers of this process look for work for so long before they sleep.
EXPORT void threads_look(int microseconds) { Helpers::of_process().look(microseconds); }

// The best path of this CPU; the lower numbers work too. 0 portable, 1 AVX2, 2 AVX-512 VNNI.
EXPORT int int8_best_path() {
#ifdef __x86_64__
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

// What int8_pack writes for a weight [N, K].
EXPORT int64_t int8_packed_bytes(int64_t n, int64_t k) {
  return ceil_div(n, kOut) * block_bytes(groups_of(k));
}

// weight [N, K], scales [N], bias [N] or null -> blocks [B]; what is padded stands for weight 0.
EXPORT void int8_pack(const int8_t* weight, const float* scales, const int32_t* bias, int64_t n, int64_t k,
                      uint8_t* blocks) {
  const int64_t groups = groups_of(k);
  for (int64_t first = 0; first < n; first += kOut) {
    uint8_t* to = blocks + first / kOut * block_bytes(groups);
    std::memset(to, 128, groups * 64);
    std::memset(to + groups * 64, 0, 128);
    const int64_t count = std::min(kOut, n - first);
    for (int64_t o = 0; o < count; o++) {
      const int8_t* from = weight + (first + o) * k;
      for (int64_t group = 0; group < k / 4; group++) {
        uint32_t four;
        std::memcpy(&four, from + group * 4, 4);
        four ^= 0x80808080;  // adds 128 to each
        std::memcpy(to + (group * kOut + o) * 4, &four, 4);
      }
      for (int64_t i = k / 4 * 4; i < k; i++)
        to[(i / 4 * kOut + o) * 4 + i % 4] = static_cast<uint8_t>(from[i] + 128);
    }
    std::memcpy(to + groups * 64, scales + first, count * sizeof(float));
    if (bias) std::memcpy(to + groups * 64 + 64, bias + first, count * sizeof(int32_t));
  }
}

// x [M, K], float or bfloat16 -> rows [M, K], scales [M].
EXPORT void int8_quantise(int path, int threads, int is_bfloat16, const void* x, int64_t m, int64_t k,
                          int8_t* rows, float* scales) {
  const Path& chosen = path_of(path);
  const Input in = {x, nullptr, is_bfloat16 ? kBfloat16 : kFloat};
  for_each(m * k < kLeastQuantised ? 1 : threads, m, [&](int64_t row) {
    scales[row] = quantise(chosen, in.from(row, k), k, rows + row * k);
  });
}

// rows [M, K], row_scales [M] -> out [M, N]. Returns 0, or 1 if there is not enough memory.
EXPORT int int8_linear(int path, int threads, const int8_t* rows, const float* row_scales, int64_t m,
                       const Weight* weight, float* out) try {
  std::vector<Job> jobs;
  add_jobs(path, jobs, {rows, row_scales, kInt8}, {out, kFloat}, m, *weight, {});
  return run(path, std::move(jobs), 2, threads);
} catch (const std::bad_alloc&) {
  return 1;
}

// x [M, K] -> out [M, N], both float or both bfloat16: every row quantised, multiplied, rounded. Returns as
// int8_linear does.
EXPORT int int8_quantising_linear(int path, int threads, int is_bfloat16, const void* x, int64_t m,
                                  const Weight* weight, void* out) try {
  const Type type = is_bfloat16 ? kBfloat16 : kFloat;
  std::vector<Job> jobs;
  add_jobs(path, jobs, {x, nullptr, type}, {out, type}, m, *weight, {});
  return run(path, std::move(jobs), 2, threads);
} catch (const std::bad_alloc&) {
  return 1;
}

// x [M, D] -> out [M, D], both float or both bfloat16, through one SwiGLU: down(quantised(silu(gate) * up))
// of every row, quantised. weights: gate_up [2F, D] and down [D, F]. Returns as int8_linear does.
EXPORT int int8_mlp(int path, int threads, int is_bfloat16, const void* x, int64_t m, const Weight* weights,
                    void* out) try {
  const Type type = is_bfloat16 ? kBfloat16 : kFloat;
  std::vector<Job> jobs;
  add_jobs(path, jobs, {x, nullptr, type}, {out, type}, m, weights[0], weights[1]);
  return run(path, std::move(jobs), 4, threads);
} catch (const std::bad_alloc&) {
  return 1;
}

// rows [R, D], row_scales [R], sorted by expert -> out [R, D], float or bfloat16: each row through its
// expert, down(quantised(silu(gate) * up)). weights: gate_up [2F, D] and down [D, F] of expert 0, of expert 1,
// ... Returns as int8_linear does, or 2 if rows_of_expert does not count `num_rows` rows.
EXPORT int int8_experts(int path, int threads, const int8_t* rows, const float* row_scales, int64_t num_rows,
                        int64_t num_experts, const int64_t* rows_of_expert, const Weight* weights,
                        int is_bfloat16, void* out) try {
  int64_t left = num_rows;
  for (int64_t expert = 0; expert < num_experts; expert++) {
    if (rows_of_expert[expert] < 0 || rows_of_expert[expert] > left) return 2;
    left -= rows_of_expert[expert];
  }
  if (left) return 2;
  std::vector<Job> jobs;
  Input in = {rows, row_scales, kInt8};
  Output to = {out, is_bfloat16 ? kBfloat16 : kFloat};
  for (int64_t expert = 0; expert < num_experts; expert++) {
    if (!rows_of_expert[expert]) continue;
    const Weight &gate_up = weights[expert * 2], &down = weights[expert * 2 + 1];
    add_jobs(path, jobs, in, to, rows_of_expert[expert], gate_up, down);
    in = in.from(rows_of_expert[expert], gate_up.k);
    to = to.from(rows_of_expert[expert], down.n);
  }
  return run(path, std::move(jobs), 4, threads);
} catch (const std::bad_alloc&) {
  return 1;
}

}  // extern "C"
