// Threads with room for deep recursion: torch's compiler takes nested source apart recursively, and
// a stack of the usual size would overflow, which ends the process.
#pragma once

#include <functional>

#include <pthread.h>

namespace engine {

// Starts a thread with a large stack, of which only what is used takes memory.
// Throws std::runtime_error if the system has no thread left.
pthread_t start_thread(std::function<void()> body);

// Runs it on such a thread, and waits. The body must not throw.
void on_deep_stack(std::function<void()> body);

}  // namespace engine
