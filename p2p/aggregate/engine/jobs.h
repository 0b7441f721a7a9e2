// Long work is done away from the server's main thread; the client that asked is blocked meanwhile.
#pragma once

#include <chrono>
#include <memory>

#include "module_api.h"

namespace engine::jobs {

using Clock = std::chrono::steady_clock;

// What a command has the engine do.
class Work {
 public:
  virtual ~Work() = default;

  // How long the client waits; 0: as long as this store allows.
  virtual long long timeout_ms() const { return 0; }

  // On a thread of the engine; must not throw. Until then it has to be through.
  virtual void run(Clock::time_point until) = 0;

  // On the main thread, if it was through in time: replies, and stores what is to be stored.
  // May throw CommandError.
  virtual void finish(server::Context* context) = 0;
};

struct Settings {
  int threads;         // that work at once
  long long limit_ms;  // for work without a timeout
};

void start(server::Context* context, Settings settings);

// Whether a client that calls from here can be blocked: not from EXEC, EVAL or another module.
bool may_block(server::Context* context);

// Blocks the client until the work was done or its time is over, and then answers it. Work that came
// too late, or whose client has left, is not finished: nothing of it is stored.
void submit(server::Context* context, std::unique_ptr<Work> work);

}  // namespace engine::jobs
