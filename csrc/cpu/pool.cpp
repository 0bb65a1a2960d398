#include "pool.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ms {
namespace {

constexpr int kSpins = 2000;  // about 50 microseconds of waiting before a thread goes to sleep
constexpr int kHelperBits = 8;  // low bits of the state: how many helpers the job wants; above them the job's number
constexpr uint32_t kHelperMask = (1u << kHelperBits) - 1;
constexpr uint32_t kClosed = 0;  // no job has no helpers
constexpr int kMaxThreads = 1 << kHelperBits;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Job {
  ChunkBody body;
  const void* context;
  int64_t chunks;
};

class Pool {
 public:
  void run(int64_t chunks, int threads, ChunkBody body, const void* context) {
    const int helpers = static_cast<int>(std::min<int64_t>(std::min(threads, kMaxThreads), chunks)) - 1;
    grow(helpers);
    job_ = {body, context, chunks};
    next_.store(0, std::memory_order_relaxed);
    const uint32_t number = (state_.load(std::memory_order_relaxed) >> kHelperBits) + 1;
    const uint32_t state = number << kHelperBits | static_cast<uint32_t>(helpers);
    open_.store(state, std::memory_order_seq_cst);
    state_.store(state, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) state_.notify_all();
    work();
    open_.store(kClosed, std::memory_order_seq_cst);  // a helper that was not scheduled in time need not be waited for
    for (int64_t spin = 0; active_.load(std::memory_order_seq_cst) != 0; ++spin) {
      pause();
      if (spin > 20 * kSpins) std::this_thread::yield();
    }
  }

 private:
  void grow(int helpers) {
    while (static_cast<int>(threads_.size()) < helpers) {
      const int index = static_cast<int>(threads_.size());
      const uint32_t seen = state_.load();
      threads_.emplace_back([this, index, seen] { serve(index, seen); });
      threads_.back().detach();
    }
  }

  void work() {
    for (;;) {
      const int64_t chunk = next_.fetch_add(1, std::memory_order_relaxed);
      if (chunk >= job_.chunks) return;
      job_.body(job_.context, chunk);
    }
  }

  void serve(int index, uint32_t seen) {
    for (;;) {
      uint32_t now = state_.load(std::memory_order_acquire);
      for (int spin = 0; now == seen && spin < kSpins; ++spin) {
        pause();
        now = state_.load(std::memory_order_acquire);
      }
      if (now == seen) {
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        state_.wait(seen, std::memory_order_seq_cst);
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
        continue;
      }
      seen = now;
      if (index >= static_cast<int>(now & kHelperMask)) continue;
      // Join, then look whether the job is still open: the caller closes it, then looks whether anybody has joined.
      active_.fetch_add(1, std::memory_order_seq_cst);
      if (open_.load(std::memory_order_seq_cst) == now) work();
      active_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  std::vector<std::thread> threads_;
  Job job_{};
  std::atomic<int64_t> next_{0};
  std::atomic<int> active_{0};
  std::atomic<uint32_t> open_{kClosed};
  std::atomic<uint32_t> state_{0};
  std::atomic<int> sleepers_{0};
};

// Leaked on purpose: workers run until the process ends, and a child after fork gets a new pool.
std::atomic<Pool*> pool{nullptr};
std::mutex* gate = new std::mutex;

void forget_pool() {
  pool.store(nullptr);
  gate = new std::mutex;
}

void prepare_once() {
#if defined(__unix__) || defined(__APPLE__)
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
  (void)registered;
#endif
}

}  // namespace

void parallel_for(int64_t chunks, int threads, ChunkBody body, const void* context) {
  if (threads > 1 && chunks > 1) {
    std::unique_lock<std::mutex> lock(*gate, std::try_to_lock);
    if (lock.owns_lock()) {
      prepare_once();
      Pool* own = pool.load();
      if (own == nullptr) pool.store(own = new Pool);
      own->run(chunks, threads, body, context);
      return;
    }
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk) body(context, chunk);
}

}  // namespace ms
