// Threads shared by every launch: run(threads, tasks, task) calls task(index, slot) once for each
// index < tasks.
//
// Tasks are handed out one by one, so which thread runs a task is open; slot < threads names
// scratch memory that no other running task uses. The caller works too: concurrent callers share
// the workers and none waits for another. A forked child starts with a pool of its own.
#pragma once

#include <cstdint>

namespace nabla::cpu {

using TaskFunction = void (*)(void* context, int64_t index, int slot);

void run_tasks(int threads, int64_t tasks, TaskFunction function, void* context);

// run_tasks for a callable (index, slot).
template <class Task>
static inline void parallel_for(int threads, int64_t tasks, Task task) {
    run_tasks(
        threads, tasks,
        [](void* context, int64_t index, int slot) { (*static_cast<Task*>(context))(index, slot); },
        &task);
}

}  // namespace nabla::cpu
