// Rows through one weight, or through the two of a SwiGLU, by several threads: stages of jobs, cut into tasks.
//
// Shapes: M rows, K in-features, N out-features, D hidden_size, F expert size.
// Of a packed weight: G = K / 4 rounded up to a multiple of 4, B = N / 16 rounded up.
#pragma once
#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "int8_paths.h"
#include "threads.h"

namespace int8 {

constexpr int64_t kSegment = 256;  // most rows between two reads of the same weights
// What jobs have between their stages, in bytes: wide weights get fewer rows at a time and fewer jobs at once,
// but no less than kLeastSegment rows of one job, which take long enough to hide the reading of weights.
constexpr int64_t kWorkspace = 8 << 20;
constexpr int64_t kLeastSegment = 64;
// What a task reads of a weight, times the rows that meet it over 8: from a few microseconds to some hundred.
constexpr int64_t kLeastTask = 1 << 14, kMostTask = 1 << 21;
// How often a thread that waits for another looks at once, some 20 microseconds, and then giving way, before
// it sleeps between two looks: who yields may be let go on at once, while another process keeps the core from
// the thread that is waited for.
constexpr int kSpins = 1000, kYields = 50;
constexpr std::chrono::microseconds kNap{50};

// What rows are: int8 with a scale each, or numbers that are quantised on the way.
enum Type { kFloat, kBfloat16, kInt8 };

int64_t size_of(Type type) { return type == kFloat ? 4 : type == kBfloat16 ? 2 : 1; }

// Rows [M, K] and, where they are int8, scales [M].
struct Input {
  const void* rows;
  const float* scales;
  Type type;

  Input from(int64_t row, int64_t k) const {
    return {static_cast<const char*>(rows) + row * k * size_of(type), scales ? scales + row : nullptr, type};
  }
};

// The first row of `in`, which is not int8 yet -> codes [K]. Returns its scale.
inline float quantise(const Path& path, const Input& in, int64_t k, int8_t* codes) {
  return in.type == kBfloat16 ? path.quantise_bfloat16(static_cast<const Bfloat16*>(in.rows), k, codes)
                              : path.quantise(static_cast<const float*>(in.rows), k, codes);
}

// Rows [M, N] of float or bfloat16.
struct Output {
  void* rows;
  Type type;

  Output from(int64_t row, int64_t n) const {
    return {static_cast<char*>(rows) + row * n * size_of(type), type};
  }
};

// Rows that meet the same weights, at most segment_of of them. A job goes through stages, in a slot of the
// workspace.
struct Job {
  Input in;
  Output out;
  int64_t num_rows;
  Weight weights[2];
  int slot;
};

// What a slot of the workspace has for each row, in bytes.
int64_t row_bytes(const Path& path, const Job& job) {
  const int64_t k = job.weights[0].k, size = job.weights[1].blocks ? job.weights[1].k : 0;
  const int64_t codes = job.in.type == kInt8 ? 0 : k;
  const int64_t gate_up = ceil_div(2 * size, kOut) * kOut;
  const int64_t sums_and_scales = 16;
  const int64_t tiles = (groups_of(k) + groups_of(size)) * 4 * path.code_bytes;
  return tiles + codes + gate_up * 4 + size + sums_and_scales;
}

// Most rows of a job like this one.
int64_t segment_of(const Path& path, const Job& job) {
  const int64_t rows = kWorkspace / row_bytes(path, job) / kTile * kTile;
  return std::min(std::max(rows, kLeastSegment), kSegment);
}

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
    for (int look = 0; !is_done(); look++) {
      if (look >= kSpins + kYields) {
        std::this_thread::sleep_for(kNap);
      } else if (look >= kSpins) {
        std::this_thread::yield();
      } else {
#ifdef __x86_64__
        _mm_pause();
#endif
      }
    }
  }
};

struct Tiles {
  std::unique_ptr<uint8_t[]> rows;
  std::unique_ptr<uint32_t[]> sums;
  std::unique_ptr<float[]> scales;
  int64_t row_bytes = 0;

  void reserve(const Path& path, int64_t num_rows, int64_t k) {
    row_bytes = groups_of(k) * 4 * path.code_bytes;
    rows.reset(new uint8_t[num_rows * row_bytes]);
    sums.reset(new uint32_t[num_rows]);
    scales.reset(new float[num_rows]);
  }
  // Writes rows `first` ... `first + count - 1`, which are one tile; from: [count, k].
  void fill(const Path& path, int64_t first, int64_t count, const int8_t* from, int64_t k) {
    path.lay_out(from, k, count, rows.get() + first * row_bytes);
    for (int64_t row = 0; row < count; row++)
      sums[first + row] = static_cast<uint32_t>(path.sum(from + row * k, k)) * 128;
  }
  Tile tile(int64_t first) const {
    return {rows.get() + first * row_bytes, sums.get() + first, scales.get() + first};
  }
};

// What a job needs between its stages.
struct Slot {
  Tiles in, hidden;
  std::unique_ptr<float[]> gate_up;    // [rows, 2F padded to whole blocks]
  std::unique_ptr<int8_t[]> codes[2];  // [rows, K], where rows are not int8 yet, and [rows, F]
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
    const int most = std::min(num_jobs, num_stages + 1);
    const int64_t fitting = std::max<int64_t>(kWorkspace / (most_rows * row_bytes(path, jobs_[0])), 1);
    slots_.resize(std::min<int64_t>(fitting, most));
    // With fewer, so many jobs have begun all their stages before the next ones enter.
    const int at_once = fitting < most ? static_cast<int>(fitting) : num_jobs;
    for (Slot& slot : slots_) reserve(slot, most_rows);
    for (int job = 0; job < num_jobs; job++) jobs_[job].slot = job % static_cast<int>(slots_.size());
    steps_ = std::vector<Step>(num_jobs * num_stages);
    // Stage s of job j takes its turn in round j + s: what a step needs started a round ago, and is done.
    std::vector<const Step*> last(num_jobs);
    Step* step = steps_.data();
    int64_t first = 0;
    for (int begin = 0; begin < num_jobs; begin += at_once) {
      const int end = std::min(begin + at_once, num_jobs);
      for (int round = 0; round < at_once + num_stages - 1; round++)
        for (int stage = 0; stage < num_stages; stage++) {
          const int job = begin + round - stage;
          if (job < begin || job >= end) continue;
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
  }

  void run() {
    const Step& last = steps_.back();
    const int threads = static_cast<int>(std::min<int64_t>(threads_, last.first + last.count));
    Helpers::of_process().run(threads, [](void* all) { static_cast<Run*>(all)->work(); }, this);
  }

 private:
  void reserve(Slot& slot, int64_t rows) const {
    const Job& job = jobs_[0];
    const int64_t k = job.weights[0].k;
    slot.in.reserve(path_, rows, k);
    if (job.in.type != kInt8) slot.codes[0].reset(new int8_t[rows * k]);
    if (num_stages_ == 2) return;
    const int64_t size = job.weights[1].k;
    slot.gate_up.reset(new float[rows * ceil_div(2 * size, kOut) * kOut]);
    slot.hidden.reserve(path_, rows, size);
    slot.codes[1].reset(new int8_t[rows * size]);
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
    const Weight& last = job.weights[num_stages_ == 2 ? 0 : 1];
    if (stage == kLayOut) {
      lay_out(job, slot, task);
    } else if (stage == kActivate) {
      activate(job, slot, task);
    } else if (stage == kFirst && num_stages_ > 2) {
      const Output gate_up = {slot.gate_up.get(), kFloat};
      multiply(job, slot.in, first, task, gate_up, ceil_div(first.n, kOut) * kOut);
    } else {
      multiply(job, stage == kFirst ? slot.in : slot.hidden, last, task, job.out, last.n);
    }
  }

  void lay_out(const Job& job, Slot& slot, int64_t tile) {
    const int64_t k = job.weights[0].k;
    const int64_t first = tile_start(job, tile), count = tile_start(job, tile + 1) - first;
    const Input in = job.in.from(first, k);
    if (in.type == kInt8) {
      slot.in.fill(path_, first, count, static_cast<const int8_t*>(in.rows), k);
      std::copy_n(in.scales, count, slot.in.scales.get() + first);
      return;
    }
    int8_t* codes = slot.codes[0].get() + first * k;
    for (int64_t row = 0; row < count; row++) {
      slot.in.scales[first + row] = quantise(path_, in.from(row, k), k, codes + row * k);
    }
    slot.in.fill(path_, first, count, codes, k);
  }

  void activate(const Job& job, Slot& slot, int64_t tile) {
    const int64_t k = job.weights[1].k, stride = ceil_div(2 * k, kOut) * kOut;
    const int64_t first = tile_start(job, tile), count = tile_start(job, tile + 1) - first;
    int8_t* codes = slot.codes[1].get() + first * k;
    for (int64_t row = 0; row < count; row++) {
      float* gate = slot.gate_up.get() + (first + row) * stride;
      path_.swiglu(gate, gate + k, k);
      slot.hidden.scales[first + row] = path_.quantise(gate, k, codes + row * k);
    }
    slot.hidden.fill(path_, first, count, codes, k);
  }

  void multiply(const Job& job, const Tiles& tiles, const Weight& weight, int64_t task, const Output& out,
                int64_t stride) {
    const int64_t per_task = blocks_per_task(job, weight), groups = groups_of(weight.k);
    const int64_t last = std::min(ceil_div(weight.n, kOut), (task + 1) * per_task);
    for (int64_t block = task * per_task; block < last; block++) {
      const int64_t column = block * kOut, columns = std::min(kOut, weight.n - column);
      const Block own = {weight.blocks + block * block_bytes(groups), groups};
      for (int64_t tile = 0; tile < num_tiles(job); tile++) {  // the block stays in the cache
        const int64_t first = tile_start(job, tile), count = tile_start(job, tile + 1) - first;
        const auto product = path_.multiply[count - 1];
        if (out.type == kFloat) {
          float* to = static_cast<float*>(out.rows) + first * stride + column;
          product(tiles.tile(first), own, to, stride, columns);
          continue;
        }
        float wide[kTile * kOut];
        product(tiles.tile(first), own, wide, kOut, columns);
        Bfloat16* to = static_cast<Bfloat16*>(out.rows) + first * stride + column;
        for (int64_t row = 0; row < count; row++) path_.narrow(wide + row * kOut, columns, to + row * stride);
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

}  // namespace int8
