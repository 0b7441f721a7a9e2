// What a script calls: redis.execute and the like, and torch's own operators, some of them with a
// check before them, since they would end the process or take all its memory.
#pragma once

#include <torch/csrc/jit/frontend/resolver.h>

#include <memory>

#include "scripts.h"

namespace engine::operators {

// Once, when the module is loaded.
void prepare();

// The free names of a script: torch, redis and redisAI, in any case.
std::shared_ptr<torch::jit::Resolver> names();

// The run of a script that this thread is in, from its construction on.
class Run {
 public:
  Run(Commands& commands, Clock::time_point until);
  ~Run();
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;

  Commands& commands;
  const Clock::time_point until;
  uint32_t turns = 0;  // of its loops
};

}  // namespace engine::operators
