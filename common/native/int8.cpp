// int8 rows times int8 weights (W8A8) on CPUs: one linear, and all local experts of a layer in one call.
//
// A C ABI without torch. The caller names a path that int8_best_path() allows; all give the same bits.
//
// Shapes: M rows, K in-features, N out-features, R rows of all experts, D hidden_size, F expert size.
// Of a packed weight: G = K / 4 rounded up to a multiple of 4, B = N / 16 rounded up.
#include <atomic>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "int8_paths.h"

namespace int8 {

constexpr int64_t kSegment = 256;  // most rows between two reads of the same weights; bounds the workspace
// What a task reads of a weight, times the rows that meet it over 8: from a few microseconds to some hundred.
constexpr int64_t kLeastTask = 1 << 14, kMostTask = 1 << 19;
constexpr int kSpins = 1000;  // about 20 microseconds

// Rows of one expert, at most kSegment of them. A job goes through stages, in a slot of the workspace.
struct Job {
  const int8_t* rows;
  const float* row_scales;
  float* out;
  int64_t num_rows;
  Weight weights[2];
  int slot;
};

int64_t num_tiles(const Job& job) { return ceil_div(job.num_rows, kTile); }
// Tiles differ by one row at most: 17 rows are 8 + 9, not 16 + 1.
int64_t tile_start(const Job& job, int64_t tile) { return job.num_rows * tile / num_tiles(job); }

// One stage of one job: tasks for whoever is free. Tasks start in order: what a step waits for has started.
struct Step {
  const Job* job;
  int stage;
  int64_t first, count;  // tasks
  const Step* needs;
  std::atomic<int64_t> done{0};

  bool is_done() const { return done.load(std::memory_order_acquire) == count; }
  void wait() const {
    for (int spin = 0; !is_done(); spin++) {
      if (spin >= kSpins) std::this_thread::yield();
#ifdef __x86_64__
      else
        _mm_pause();
#endif
    }
  }
};

struct Tiles {
  std::unique_ptr<int32_t[]> rows;
  std::unique_ptr<uint32_t[]> sums;
  std::unique_ptr<float[]> scales;
  int64_t groups = 0;

  void reserve(int64_t num_rows, int64_t k) {
    groups = groups_of(k);
    rows.reset(new int32_t[num_rows * groups]);
    sums.reset(new uint32_t[num_rows]);
    scales.reset(new float[num_rows]);
  }
  // Writes rows `first` ... `first + count - 1`, which are one tile; from: [count, k].
  void fill(const Path& path, int64_t first, int64_t count, const int8_t* from, int64_t k) {
    int32_t* to = rows.get() + first * groups;
    for (int64_t group = 0; group < k / 4; group++)
      for (int64_t row = 0; row < count; row++) std::memcpy(to++, from + row * k + group * 4, 4);
    for (int64_t group = k / 4; group < groups; group++)
      for (int64_t row = 0; row < count; row++) {
        int8_t last[4] = {};
        if (group * 4 < k) std::memcpy(last, from + row * k + group * 4, k - group * 4);
        std::memcpy(to++, last, 4);
      }
    for (int64_t row = 0; row < count; row++)
      sums[first + row] = static_cast<uint32_t>(path.sum(from + row * k, k)) * 128;
  }
  Tile tile(int64_t first) const {
    return {rows.get() + first * groups, sums.get() + first, scales.get() + first};
  }
};

// What a job needs between its stages.
struct Slot {
  Tiles in, hidden;
  std::unique_ptr<float[]> gate_up;     // [rows, 2F padded to whole blocks]
  std::unique_ptr<int8_t[]> quantised;  // [rows, F]
};

enum Stage { kLayOut, kFirst, kActivate, kSecond };

class Run {
 public:
  // Linear jobs have the stages kLayOut and kFirst, expert jobs all four.
  Run(const Path& path, std::vector<Job>&& jobs, int num_stages, int threads)
      : path_(path), jobs_(std::move(jobs)), num_stages_(num_stages), threads_(std::max(threads, 1)) {
    const int num_jobs = static_cast<int>(jobs_.size());
    int64_t most_rows = 0;
    for (const Job& job : jobs_) most_rows = std::max(most_rows, job.num_rows);
    // One more than there are stages: a slot's last job has left it one round before the next one enters.
    slots_.resize(std::min(num_jobs, num_stages + 1));
    for (Slot& slot : slots_) reserve(slot, most_rows);
    for (int job = 0; job < num_jobs; job++) jobs_[job].slot = job % static_cast<int>(slots_.size());
    steps_ = std::vector<Step>(num_jobs * num_stages);
    // Stage s of job j takes its turn in round j + s: what a step needs started a round ago, and is done.
    std::vector<const Step*> last(num_jobs);
    Step* step = steps_.data();
    int64_t first = 0;
    for (int round = 0; round < num_jobs + num_stages - 1; round++)
      for (int stage = 0; stage < num_stages; stage++) {
        const int job = round - stage;
        if (job < 0 || job >= num_jobs) continue;
        const int earlier = job - static_cast<int>(slots_.size());
        step->job = &jobs_[job];
        step->stage = stage;
        step->first = first;
        step->count = num_tasks(jobs_[job], stage);
        step->needs = stage ? last[job] : earlier >= 0 ? last[earlier] : nullptr;
        first += step->count;
        last[job] = step++;
      }
  }

  void run() {
    const Step& last = steps_.back();
    const int threads = static_cast<int>(std::min<int64_t>(threads_, last.first + last.count));
#pragma omp parallel num_threads(threads) if (threads > 1)
    work();
  }

 private:
  void reserve(Slot& slot, int64_t rows) const {
    const Weight& first = jobs_[0].weights[0];
    slot.in.reserve(rows, first.k);
    if (num_stages_ == 2) return;
    const int64_t size = jobs_[0].weights[1].k;
    slot.gate_up.reset(new float[rows * ceil_div(2 * size, kOut) * kOut]);
    slot.hidden.reserve(rows, size);
    slot.quantised.reset(new int8_t[rows * size]);
  }

  int64_t blocks_per_task(const Job& job, const Weight& weight) const {
    const int64_t share = ceil_div(weight.n, kOut) / (4 * threads_);
    const int64_t work = groups_of(weight.k) * 64 * std::max(job.num_rows / 8, int64_t{1});
    return std::max({std::min(kMostTask / work, share), kLeastTask / work, int64_t{1}});
  }

  int64_t num_tasks(const Job& job, int stage) const {
    if (stage == kLayOut || stage == kActivate) return num_tiles(job);
    const Weight& weight = job.weights[stage == kSecond];
    return ceil_div(ceil_div(weight.n, kOut), blocks_per_task(job, weight));
  }

  void work() {
    Step* step = steps_.data();
    Step* const end = step + steps_.size();
    while (true) {
      const int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
      while (step != end && task >= step->first + step->count) step++;
      if (step == end) return;
      if (step->needs) step->needs->wait();
      perform(*step->job, step->stage, task - step->first);
      step->done.fetch_add(1, std::memory_order_release);
    }
  }

  void perform(const Job& job, int stage, int64_t task) {
    Slot& slot = slots_[job.slot];
    const Weight& first = job.weights[0];
    if (stage == kLayOut) {
      lay_out(job, slot.in, task);
    } else if (stage == kActivate) {
      activate(job, slot, task);
    } else if (stage == kSecond) {
      multiply(job, slot.hidden, job.weights[1], task, job.out, job.weights[1].n);
    } else if (num_stages_ == 2) {
      multiply(job, slot.in, first, task, job.out, first.n);
    } else {
      multiply(job, slot.in, first, task, slot.gate_up.get(), ceil_div(first.n, kOut) * kOut);
    }
  }

  void lay_out(const Job& job, Tiles& tiles, int64_t tile) {
    const int64_t k = job.weights[0].k;
    const int64_t first = tile_start(job, tile), count = tile_start(job, tile + 1) - first;
    tiles.fill(path_, first, count, job.rows + first * k, k);
    std::copy_n(job.row_scales + first, count, tiles.scales.get() + first);
  }

  void activate(const Job& job, Slot& slot, int64_t tile) {
    const int64_t k = job.weights[1].k, stride = ceil_div(2 * k, kOut) * kOut;
    const int64_t first = tile_start(job, tile), count = tile_start(job, tile + 1) - first;
    int8_t* codes = slot.quantised.get() + first * k;
    for (int64_t row = 0; row < count; row++) {
      float* gate = slot.gate_up.get() + (first + row) * stride;
      path_.swiglu(gate, gate + k, k);
      slot.hidden.scales[first + row] = path_.quantise(gate, k, codes + row * k);
    }
    slot.hidden.fill(path_, first, count, codes, k);
  }

  void multiply(const Job& job, const Tiles& tiles, const Weight& weight, int64_t task, float* out,
                int64_t stride) {
    const int64_t per_task = blocks_per_task(job, weight), groups = groups_of(weight.k);
    const int64_t last = std::min(ceil_div(weight.n, kOut), (task + 1) * per_task);
    for (int64_t block = task * per_task; block < last; block++) {
      const int64_t column = block * kOut;
      const Block own = {weight.blocks + block * block_bytes(groups), groups};
      for (int64_t tile = 0; tile < num_tiles(job); tile++) {  // the block stays in the cache
        const int64_t first = tile_start(job, tile), count = tile_start(job, tile + 1) - first;
        path_.multiply[count - 1](tiles.tile(first), own, out + first * stride + column, stride,
                                  std::min(kOut, weight.n - column));
      }
    }
  }

  const Path& path_;
  std::vector<Job> jobs_;
  const int num_stages_;
  const int threads_;
  std::vector<Slot> slots_;
  std::vector<Step> steps_;
  std::atomic<int64_t> next_{0};
};

// Adds the jobs of `count` rows that meet the same weights.
void add_jobs(std::vector<Job>& jobs, const int8_t* rows, const float* row_scales, float* out, int64_t count,
              const Weight& first, const Weight& second) {
  const Weight& last = second.blocks ? second : first;
  for (int64_t row = 0; row < count; row += kSegment)
    jobs.push_back({rows + row * first.k,
                    row_scales + row,
                    out + row * last.n,
                    std::min(kSegment, count - row),
                    {first, second},
                    0});
}

int run(int path, std::vector<Job>&& jobs, int num_stages, int threads) {
  if (!jobs.empty()) Run(path_of(path), std::move(jobs), num_stages, threads).run();
  return 0;
}

}  // namespace int8

using namespace int8;

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// Of this interface. common/native_int8.py refuses a library of another one.
EXPORT int int8_version() { return 1; }

// The best path of this CPU; the lower numbers work too. 0 portable, 1 AVX2, 2 AVX-512 VNNI.
EXPORT int int8_best_path() {
#ifdef __x86_64__
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni"))
    return 2;
  if (__builtin_cpu_supports("avx2")) return 1;
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

// x [M, K] -> rows [M, K], scales [M].
EXPORT void int8_quantise(int path, int threads, const float* x, int64_t m, int64_t k, int8_t* rows,
                          float* scales) {
  const Path& chosen = path_of(path);
#pragma omp parallel for num_threads(threads) if (threads > 1 && m > 1)
  for (int64_t row = 0; row < m; row++) scales[row] = chosen.quantise(x + row * k, k, rows + row * k);
}

// rows [M, K], row_scales [M] -> out [M, N]. Returns 0, or 1 if there is not enough memory.
EXPORT int int8_linear(int path, int threads, const int8_t* rows, const float* row_scales, int64_t m,
                       const Weight* weight, float* out) try {
  std::vector<Job> jobs;
  add_jobs(jobs, rows, row_scales, out, m, *weight, {});
  return run(path, std::move(jobs), 2, threads);
} catch (const std::bad_alloc&) {
  return 1;
}

// rows [R, D], row_scales [R], sorted by expert -> out [R, D]: down(quantised(silu(gate) * up)), each row
// through its expert. weights: gate_up [2F, D] and down [D, F] of expert 0, of expert 1, ... Returns as
// int8_linear does.
EXPORT int int8_experts(int path, int threads, const int8_t* rows, const float* row_scales,
                        int64_t num_experts, const int64_t* rows_of_expert, const Weight* weights,
                        float* out) try {
  std::vector<Job> jobs;
  for (int64_t expert = 0; expert < num_experts; expert++) {
    const Weight &gate_up = weights[expert * 2], &down = weights[expert * 2 + 1];
    add_jobs(jobs, rows, row_scales, out, rows_of_expert[expert], gate_up, down);
    rows += rows_of_expert[expert] * gate_up.k;
    row_scales += rows_of_expert[expert];
    out += rows_of_expert[expert] * down.n;
  }
  return run(path, std::move(jobs), 4, threads);
} catch (const std::bad_alloc&) {
  return 1;
}

}  // extern "C"
