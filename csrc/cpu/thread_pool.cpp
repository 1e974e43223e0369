#include "cpu/thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace nabla::cpu {
namespace {

// One run_tasks call. Everything but `next` is guarded by the pool's mutex.
struct Job {
    TaskFunction function;
    void* context;
    int64_t tasks;
    int slots;                     // the caller's and the helpers'
    int joined = 1;                // slots given out; the caller has slot 0
    int helping = 0;               // helpers that are still working
    std::atomic<int64_t> next{0};  // first task that nobody has taken
    std::condition_variable helpers_done{};

    void work(int slot) {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
            function(context, i, slot);
    }
    bool wants_help() const {
        return joined < slots && next.load(std::memory_order_relaxed) < tasks;
    }
};

class ThreadPool {
  public:
    // The process's pool. It is never destroyed: its threads may outlive static destruction.
    static ThreadPool& instance() {
        ThreadPool* pool = current.load(std::memory_order_acquire);
        if (pool) return *pool;
        static const int handler = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });
        (void)handler;
        auto* fresh = new ThreadPool;
        if (current.compare_exchange_strong(pool, fresh, std::memory_order_acq_rel)) return *fresh;
        delete fresh;
        return *pool;
    }

    void run(Job& job) {
        {
            std::lock_guard lock(mutex_);
            start_workers(job.slots - 1);
            jobs_.push_back(&job);
        }
        wake_.notify_all();
        job.work(0);
        std::unique_lock lock(mutex_);
        jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
        job.helpers_done.wait(lock, [&] { return job.helping == 0; });
    }

  private:
    // Fewer threads than asked for only make a job slower.
    void start_workers(int wanted) {
        try {
            for (; workers_ < wanted; ++workers_) std::thread([this] { serve(); }).detach();
        } catch (const std::system_error&) {
        }
    }

    void serve() {
        std::unique_lock lock(mutex_);
        for (;;) {
            auto found =
                std::find_if(jobs_.begin(), jobs_.end(), [](Job* j) { return j->wants_help(); });
            if (found == jobs_.end()) {
                wake_.wait(lock);
                continue;
            }
            Job& job = **found;
            const int slot = job.joined++;
            ++job.helping;
            lock.unlock();
            job.work(slot);
            lock.lock();
            if (--job.helping == 0) job.helpers_done.notify_one();
        }
    }

    static std::atomic<ThreadPool*>
        current;  // null in a forked child: its parent's threads are not there

    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<Job*> jobs_;
    int workers_ = 0;
};

std::atomic<ThreadPool*> ThreadPool::current{nullptr};

}  // namespace

void run_tasks(int threads, int64_t tasks, TaskFunction function, void* context) {
    Job job{function, context, tasks, static_cast<int>(std::min<int64_t>(threads, tasks))};
    if (job.slots <= 1) job.work(0);
    else ThreadPool::instance().run(job);
}

}  // namespace nabla::cpu
