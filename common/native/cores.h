// Which core each thread of this process computes on, where several processes share the cores of a machine.
//
// Router and expert workers have a thread for every core each, and compute in turns. Where two threads of one of
// them meet on a core, another core may have nothing to do meanwhile: the system is slow to move a thread that
// has just run.
#pragma once
#include <algorithm>
#include <thread>
#include <vector>

#ifdef __linux__
#include <pthread.h>
#include <sched.h>

class Cores {
 public:
  // Gives every thread a core of its own among those this process may use: the caller of `come_home` the one
  // that has `first` before it, and thread i the i-th after that.
  void place(int first) {
    if (sched_getaffinity(0, sizeof all_, &all_)) return;
    cores_.clear();
    for (int core = 0; core < CPU_SETSIZE; core++)
      if (CPU_ISSET(core, &all_)) cores_.push_back(core);
    std::rotate(cores_.begin(), cores_.begin() + first % cores_.size(), cores_.end());
  }

  // Keeps a thread on its core.
  void keep(std::thread::native_handle_type thread, int index) const {
    if (cores_.empty()) return;
    const cpu_set_t own = set_of(index);
    pthread_setaffinity_np(thread, sizeof own, &own);
  }

  // Moves the calling thread to its core, which it may leave again: what it starts may use all cores, as before.
  void come_home() const {
    if (cores_.empty() || sched_getcpu() == cores_[0]) return;
    const cpu_set_t own = set_of(0);
    if (sched_setaffinity(0, sizeof own, &own) == 0) sched_setaffinity(0, sizeof all_, &all_);
  }

 private:
  cpu_set_t set_of(int index) const {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cores_[index % cores_.size()], &one);
    return one;
  }

  cpu_set_t all_;
  std::vector<int> cores_;
};

#else

// Threads are where the system has them.
class Cores {
 public:
  void place(int) {}
  void keep(std::thread::native_handle_type, int) const {}
  void come_home() const {}
};

#endif
