// Runs tasks on a few threads, without waiting for a thread that has not begun.
//
// A team of OpenMP meets at the end of its work: a member that waits for a core, because another process
// computes there, is waited for although nothing is left to do. Router and expert workers of one machine have
// more threads than cores. Here the caller works too, helpers take what they find, and one that comes too late
// finds nothing.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "cores.h"

// How long a helper gives way and looks again before it sleeps, where nothing else is said: to wake it takes as
// long as a small task.
constexpr int kLookMicroseconds = 50;

// The helpers of a process, made when they are first needed and kept. One caller has them at a time; another
// one that calls meanwhile works alone.
class Helpers {
 public:
  using Work = void (*)(void* argument);

  // Never destroyed: a helper may sleep in it while the process ends.
  static Helpers& of_process() {
    static Helpers* const helpers = new Helpers;
    return *helpers;
  }

  // Calls work(argument) here, and on up to `threads - 1` helpers that come in time.
  void run(int threads, Work work, void* argument) {
    const std::unique_lock<std::mutex> own(caller_, std::try_to_lock);
    if (threads < 2 || !own.owns_lock()) return work(argument);
    cores_.come_home();
    bool is_asleep;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      try {
        while (static_cast<int>(started_.size()) < threads - 1) start();
      } catch (const std::system_error&) {
        // The system has no thread to give: those there are will do.
      }
      work_ = work;
      argument_ = argument;
      wanted_ = threads - 1;
      number_.fetch_add(1, std::memory_order_release);
      is_asleep = asleep_ > 0;
    }
    if (is_asleep) wake_.notify_all();
    work(argument);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      work_ = nullptr;  // nobody begins any more
    }
    while (busy_.load(std::memory_order_acquire)) std::this_thread::yield();
  }

  // Gives the caller and every helper a core of its own: Cores says which.
  void place(int first) {
    const std::lock_guard<std::mutex> own(caller_);
    const std::lock_guard<std::mutex> lock(mutex_);
    cores_.place(first);
    for (size_t i = 0; i < started_.size(); i++) cores_.keep(started_[i], i + 1);
  }

  // How long helpers look from here on before they sleep.
  void look(int microseconds) { look_microseconds_.store(microseconds, std::memory_order_relaxed); }

 private:
  void start() {
    const int index = static_cast<int>(started_.size());
    started_.reserve(index + 1);
    std::thread helper(&Helpers::serve, this, index);
    started_.push_back(helper.native_handle());
    cores_.keep(started_.back(), index + 1);
    helper.detach();
  }

  void serve(int index) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      lock.unlock();
      look_for(seen);
      lock.lock();
      asleep_++;
      wake_.wait(lock, [&] { return number_.load(std::memory_order_relaxed) != seen; });
      asleep_--;
      seen = number_.load(std::memory_order_relaxed);
      if (!work_ || index >= wanted_) continue;
      const Work work = work_;
      void* const argument = argument_;
      busy_.fetch_add(1, std::memory_order_relaxed);  // under the lock: before the caller looks
      lock.unlock();
      work(argument);
      busy_.fetch_sub(1, std::memory_order_release);
      lock.lock();
    }
  }

  // Returns when there may be work, or nothing came for a while.
  void look_for(uint64_t seen) const {
    const std::chrono::microseconds look(look_microseconds_.load(std::memory_order_relaxed));
    const auto until = std::chrono::steady_clock::now() + look;
    while (number_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < until)
      std::this_thread::yield();
  }

  std::mutex caller_, mutex_;
  std::condition_variable wake_;
  Work work_ = nullptr;
  void* argument_ = nullptr;
  int wanted_ = 0, asleep_ = 0;
  std::vector<std::thread::native_handle_type> started_;
  Cores cores_;
  std::atomic<uint64_t> number_{0};
  std::atomic<int> busy_{0}, look_microseconds_{kLookMicroseconds};
};

// Calls task(0) ... task(count - 1), each once, in any order.
template <class Task>
void for_each(int threads, int64_t count, const Task& task) {
  struct Tasks {
    const Task& task;
    const int64_t count, grain;
    std::atomic<int64_t> next{0};

    void work() {
      for (int64_t first; (first = next.fetch_add(grain, std::memory_order_relaxed)) < count;)
        for (int64_t i = first; i < std::min(first + grain, count); i++) task(i);
    }
  } tasks{task, count, std::max<int64_t>(1, count / (8 * std::max(threads, 1)))};
  if (threads < 2 || count < 2) return tasks.work();
  Helpers::of_process().run(threads, [](void* all) { static_cast<Tasks*>(all)->work(); }, &tasks);
}

// Like for_each. Returns whether every task had the memory it asked for.
template <class Task>
bool try_each(int threads, int64_t count, const Task& task) {
  std::atomic<bool> has_memory{true};
  for_each(threads, count, [&](int64_t i) {
    try {
      task(i);
    } catch (const std::bad_alloc&) {
      has_memory = false;
    }
  });
  return has_memory;
}
