// bfloat16 rows times bfloat16 weights on CPUs: one linear, and all local experts of a layer in one call.
//
// A C ABI without torch. The caller asks bf16_is_available() first. Weights are read where they are.
//
// Shapes: M rows, K in-features, N out-features, R rows of all experts, D hidden_size, F expert size.
#include <cstdint>

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// Whether this processor has the instructions of the kernels below.
EXPORT int bf16_is_available() {
#ifdef __x86_64__
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bf16");
#else
  return 0;
#endif
}

}  // extern "C"

#ifdef __x86_64__
#include <memory>
#include <vector>

#include "bf16_products.h"
#include "threads.h"

namespace bf16 {

constexpr int64_t kSegment = 512;        // most rows of a job
constexpr int64_t kRowsAtOnce = 2048;    // most rows of jobs that are computed together; bounds the workspace
constexpr int64_t kTaskBytes = 1 << 17;  // weights of a task whose time is that of reading them
constexpr int64_t kPanelBytes = 1 << 19;  // panels that stay in a core's own cache, beside the rows
constexpr int64_t kMostPanels = 4;        // more save no more reads of rows
// From so many rows on, a panel's products take longer than reading the next panel: no need to fetch it early.
constexpr int64_t kRowsThatHideReads = 64;
constexpr int64_t kUnitsOfFewRows = 8;  // of a task that fetches its next panel early

// [N, K], as it is.
struct Weight {
  const Bfloat16* rows;
  int64_t k, n;
};

int64_t padded(int64_t k) { return ceil_div(k, kStep) * kStep; }

// Rows [M, K] in tiles that differ by one row at most, each [G, rows, 8]; K is padded with zeros.
struct Tiles {
  int64_t rows = 0, k = 0;
  std::unique_ptr<Line[]> lines;

  void reserve(int64_t num_rows, int64_t size) {
    rows = num_rows;
    k = padded(size);
    lines.reset(new Line[rows * k / kStep]);
  }
  int64_t count() const { return rows <= kFew ? 1 : ceil_div(rows, kTile); }
  int64_t start(int64_t tile) const { return rows * tile / count(); }
  int64_t rows_of(int64_t tile) const { return start(tile + 1) - start(tile); }
  Bfloat16* tile(int64_t tile) const { return lines[0].elements + start(tile) * k; }

  // Writes one tile of rows that lie one after another.
  void fill(int64_t tile, const Bfloat16* from, int64_t size) const {
    Bfloat16* to = this->tile(tile);
    const int64_t count = rows_of(tile), whole = size / kGranule * kGranule;
    from += start(tile) * size;
    for (int64_t i = 0; i < whole; i += kGranule)
      for (int64_t row = 0; row < count; row++, to += kGranule)
        std::memcpy(to, from + row * size + i, kGranule * sizeof(Bfloat16));
    std::memset(to, 0, (k - whole) * count * sizeof(Bfloat16));
    for (int64_t row = 0; row < count && whole < size; row++)
      std::memcpy(to + row * kGranule, from + row * size + whole, (size - whole) * sizeof(Bfloat16));
  }
};

// Rows that meet the same weights: one, or the two of a SwiGLU.
struct Job {
  const Bfloat16* in;
  Bfloat16* out;
  int64_t num_rows;
  Weight first, second;
  Tiles x, hidden;
};

// A weight's rows column ... column + 15 as the products read them, copied to `odd` where they are not whole:
// what is missing at either end stands for weight 0.
Rows rows_at(const Weight& weight, int64_t column, int64_t count, Line* odd) {
  const Bfloat16* from = weight.rows + column * weight.k;
  const int64_t stride = padded(weight.k);
  if (count >= kColumns && stride == weight.k) return {from, stride};
  std::memset(odd, 0, kColumns * stride * sizeof(Bfloat16));
  for (int64_t row = 0; row < std::min(count, kColumns); row++)
    std::memcpy(odd[0].elements + row * stride, from + row * weight.k, weight.k * sizeof(Bfloat16));
  return {odd[0].elements, stride};
}

// Sixteen outputs of each of `kBlocks` halves of a weight: the unit that tasks consist of.
template <int kBlocks>
struct Units {
  const Weight& weight;
  int64_t size;  // outputs of a half

  int64_t lines() const { return padded(weight.k) / kStep * kColumns; }
  int64_t panels_at_once() const {
    const int64_t bytes = lines() * static_cast<int64_t>(sizeof(Line)) * kBlocks;
    return std::max<int64_t>(std::min(kMostPanels / kBlocks, kPanelBytes / bytes), 1);
  }
  Rows rows(int64_t unit, int block, Line* odd) const {
    return rows_at(weight, block * size + unit * kColumns, size - unit * kColumns, odd);
  }
  int64_t of_task(int64_t num_rows, int64_t count, int threads) const {
    const int64_t bytes = lines() * static_cast<int64_t>(sizeof(Line)) * kBlocks;
    const int64_t most = num_rows <= kFew                ? kTaskBytes / bytes
                         : num_rows < kRowsThatHideReads ? kUnitsOfFewRows
                                                         : panels_at_once();
    return std::max<int64_t>(std::min(most, count / (8 * threads)), 1);
  }
};

// Calls finish(unit, first row, number of rows, outputs) for all tiles of units first ... last - 1, where
// outputs[block][row] holds the sixteen outputs of a row.
template <int kBlocks, class Finish>
void multiply(const Tiles& x, const Units<kBlocks>& units, int64_t first, int64_t last,
              const Finish& finish) {
  Line outputs[kBlocks][kFew];
  const std::unique_ptr<Line[]> odd(new Line[units.lines()]);
  if (x.rows <= kFew) {
    const MultiplyFew product = few(x.rows, std::make_integer_sequence<int, kFew>{});
    for (int64_t unit = first; unit < last; unit++) {
      for (int block = 0; block < kBlocks; block++)
        product(x.tile(0), units.rows(unit, block, odd.get()), x.k, outputs[block]);
      finish(unit, 0, x.rows, outputs);
    }
    return;
  }
  const int64_t at_once = x.rows < kRowsThatHideReads ? 1 : units.panels_at_once(), lines = units.lines();
  const std::unique_ptr<Line[]> panels(new Line[at_once * kBlocks * lines]);
  for (int64_t unit = first; unit < last; unit += at_once) {
    const int64_t end = std::min(unit + at_once, last);
    for (int64_t own = unit; own < end; own++)
      for (int block = 0; block < kBlocks; block++)
        lay_out_panel(units.rows(own, block, odd.get()), x.k,
                      panels.get() + ((own - unit) * kBlocks + block) * lines);
    for (int64_t tile = 0; tile < x.count(); tile++) {
      const MultiplyMany product = many(x.rows_of(tile), std::make_integer_sequence<int, kTile>{});
      for (int64_t own = unit; own < end; own++) {
        for (int block = 0; block < kBlocks; block++) {
          const Line* panel = panels.get() + ((own - unit) * kBlocks + block) * lines;
          // A tile takes as many steps as a quarter of the next panel has lines.
          Ahead ahead = {reinterpret_cast<const char*>(panel), 0};
          if (end < last && tile < 4) {
            const Bfloat16* next = units.weight.rows + (block * units.size + end * kColumns) * units.weight.k;
            ahead = {reinterpret_cast<const char*>(next) + tile * x.k / kGranule * 64, 64};
          }
          product(x.tile(tile), panel, x.k, ahead, outputs[block]);
        }
        finish(own, x.start(tile), x.rows_of(tile), outputs);
      }
    }
  }
}

// Calls work(job, task) for each of count(job) tasks of each job. Returns whether there was memory for all.
template <class Count, class Work>
bool each_task(int threads, std::vector<Job>& jobs, const Count& count, const Work& work) {
  std::vector<int64_t> ends;
  for (const Job& job : jobs) ends.push_back((ends.empty() ? 0 : ends.back()) + count(job));
  return try_each(threads, ends.back(), [&](int64_t task) {
    const size_t index = std::upper_bound(ends.begin(), ends.end(), task) - ends.begin();
    work(jobs[index], index ? task - ends[index - 1] : task);
  });
}

bool lay_out(int threads, std::vector<Job>& jobs) {
  return each_task(
      threads, jobs, [](const Job& job) { return job.x.count(); },
      [](const Job& job, int64_t tile) { job.x.fill(tile, job.in, job.first.k); });
}

// x -> hidden = silu(gate) * up, both rounded before.
bool activate(int threads, std::vector<Job>& jobs) {
  const auto units_of = [](const Job& job) { return Units<2>{job.first, job.second.k}; };
  const auto per_task = [&](const Job& job) {
    return units_of(job).of_task(job.num_rows, job.hidden.k / kColumns, threads);
  };
  return each_task(
      threads, jobs, [&](const Job& job) { return ceil_div(job.hidden.k / kColumns, per_task(job)); },
      [&](const Job& job, int64_t task) {
        const int64_t first = task * per_task(job), end = job.hidden.k / kColumns;
        const auto finish = [&](int64_t unit, int64_t row, int64_t count, const Line(&outputs)[2][kFew]) {
          // The tiles of x and hidden are alike.
          Bfloat16* to = job.hidden.lines[0].elements + row * job.hidden.k + unit * kColumns * count;
          for (int64_t i = 0; i < count; i++) {
            Line activated = {};
            swiglu(outputs[0][i].elements, outputs[1][i].elements, activated.elements);
            const int64_t real = std::min(std::max<int64_t>(job.second.k - unit * kColumns, 0), kColumns);
            std::memset(activated.elements + real, 0, (kColumns - real) * sizeof(Bfloat16));
            for (int64_t half = 0; half < 2; half++)
              std::memcpy(to + (half * count + i) * kGranule, activated.elements + half * kGranule, 16);
          }
        };
        multiply(job.x, units_of(job), first, std::min(first + per_task(job), end), finish);
      });
}

// tiles -> out.
bool write_products(int threads, std::vector<Job>& jobs, Tiles Job::*tiles, Weight Job::*weight) {
  const auto count_of = [&](const Job& job) { return ceil_div((job.*weight).n, kColumns); };
  const auto per_task = [&](const Job& job) {
    return Units<1>{job.*weight, (job.*weight).n}.of_task(job.num_rows, count_of(job), threads);
  };
  return each_task(
      threads, jobs, [&](const Job& job) { return ceil_div(count_of(job), per_task(job)); },
      [&](const Job& job, int64_t task) {
        const int64_t first = task * per_task(job), n = (job.*weight).n;
        const auto finish = [&](int64_t unit, int64_t row, int64_t count, const Line(&outputs)[1][kFew]) {
          const int64_t column = unit * kColumns, columns = std::min(kColumns, n - column);
          for (int64_t i = 0; i < count; i++)
            std::memcpy(job.out + (row + i) * n + column, outputs[0][i].elements, columns * sizeof(Bfloat16));
        };
        multiply(job.*tiles, Units<1>{job.*weight, n}, first, std::min(first + per_task(job), count_of(job)),
                 finish);
      });
}

// Some jobs, stage by stage.
bool run(int threads, std::vector<Job>& jobs) {
  if (jobs.empty()) return true;
  const bool is_mlp = jobs[0].second.rows != nullptr;
  for (Job& job : jobs) {
    job.x.reserve(job.num_rows, job.first.k);
    if (is_mlp) job.hidden.reserve(job.num_rows, job.second.k);
  }
  if (!lay_out(threads, jobs)) return false;
  if (!is_mlp) return write_products(threads, jobs, &Job::x, &Job::first);
  return activate(threads, jobs) && write_products(threads, jobs, &Job::hidden, &Job::second);
}

// Collects jobs, and runs them when they have rows enough.
class Queue {
 public:
  explicit Queue(int threads) : threads_(threads) {}

  bool add(const Bfloat16* in, Bfloat16* out, int64_t count, const Weight& first, const Weight& second) {
    const int64_t n = second.rows ? second.n : first.n;
    for (int64_t row = 0; row < count; row += kSegment) {
      const int64_t own = std::min(kSegment, count - row);
      if (num_rows_ + own > kRowsAtOnce && !flush()) return false;
      jobs_.push_back({in + row * first.k, out + row * n, own, first, second, {}, {}});
      num_rows_ += own;
    }
    return true;
  }

  bool flush() {
    const bool has_memory = run(threads_, jobs_);
    jobs_.clear();
    num_rows_ = 0;
    return has_memory;
  }

 private:
  const int threads_;
  std::vector<Job> jobs_;
  int64_t num_rows_ = 0;
};

}  // namespace bf16

using namespace bf16;

extern "C" {

// x [M, K] -> out [M, N]. Returns 0, or 1 if there is not enough memory.
EXPORT int bf16_linear(int threads, const Bfloat16* x, int64_t m, const Weight* weight, Bfloat16* out) try {
  Queue queue(std::max(threads, 1));
  return queue.add(x, out, m, *weight, {}) && queue.flush() ? 0 : 1;
} catch (const std::bad_alloc&) {
  return 1;
}

// rows [R, D], sorted by expert -> out [R, D]: each row through its expert, down(silu(gate) * up), everything
// rounded to bfloat16 in between. weights: gate_up [2F, D] and down [D, F] of expert 0, of expert 1, ...
// Returns as bf16_linear does.
EXPORT int bf16_experts(int threads, const Bfloat16* rows, int64_t num_experts, const int64_t* rows_of_expert,
                        const Weight* weights, Bfloat16* out) try {
  Queue queue(std::max(threads, 1));
  for (int64_t expert = 0; expert < num_experts; expert++) {
    const Weight &gate_up = weights[expert * 2], &down = weights[expert * 2 + 1];
    if (!queue.add(rows, out, rows_of_expert[expert], gate_up, down)) return 1;
    rows += rows_of_expert[expert] * gate_up.k;
    out += rows_of_expert[expert] * down.n;
  }
  return queue.flush() ? 0 : 1;
} catch (const std::bad_alloc&) {
  return 1;
}

}  // extern "C"
#endif
