// The threads of one step: barriers that spin, since a step has a dozen of them per layer and lasts milliseconds.
#pragma once

#include <atomic>
#include <sched.h>

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Team {
  public:
    int size = 1;

    // Waits for all; the last to come runs `serial` for everybody, before anybody goes on.
    template <class F> void sync(F serial) {
        const int phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
            serial();
            next_.store(0, std::memory_order_relaxed);
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
        } else {
            for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; spins++) {
                if (spins < 20000) relax();
                else sched_yield();  // somebody's core is taken
            }
        }
    }

    void sync() {
        sync([] {});
    }

    // Work in pieces, each taken by whoever is free; at most one such loop between two syncs.
    template <class F> void share(int count, F work) {
        for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
    }

  private:
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> phase_{0};
    alignas(64) std::atomic<int> next_{0};
};

struct Worker {
    Team& team;
    int me;

    // The part of [0, count) that is this thread's, in runs as long as possible.
    int begin(int count) const { return (int)((int64_t)count * me / team.size); }
    int end(int count) const { return (int)((int64_t)count * (me + 1) / team.size); }

    // sync, work on every i, sync. What is short is done by the last to come: one wait instead of two.
    template <class F> void each(int count, bool is_short, F work) const {
        if (is_short || team.size == 1) {
            team.sync([&] {
                for (int i = 0; i < count; i++) work(i);
            });
            return;
        }
        team.sync();
        for (int i = begin(count); i < end(count); i++) work(i);
        team.sync();
    }
};
