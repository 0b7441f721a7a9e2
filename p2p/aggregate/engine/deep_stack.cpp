#include "deep_stack.h"

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

namespace engine {
namespace {

constexpr size_t kStackBytes = size_t{1} << 30;

thread_local bool deep = false;

void* run(void* body) {
  deep = true;
  const std::unique_ptr<std::function<void()>> owned(static_cast<std::function<void()>*>(body));
  (*owned)();
  return nullptr;
}

}  // namespace

pthread_t start_thread(std::function<void()> body) {
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, kStackBytes);
  auto owned = std::make_unique<std::function<void()>>(std::move(body));
  pthread_t thread{};
  const int error = pthread_create(&thread, &attributes, run, owned.get());
  pthread_attr_destroy(&attributes);
  if (error != 0) throw std::runtime_error("no thread can be started: " + std::string(std::strerror(error)));
  owned.release();
  return thread;
}

void on_deep_stack(std::function<void()> body) {
  if (deep) return body();
  pthread_join(start_thread(std::move(body)), nullptr);
}

}  // namespace engine
