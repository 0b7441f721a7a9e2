// TorchScript: compiled once, held to what may not harm the server, and run with a limit of time.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "arguments.h"

namespace torch::jit {
struct CompilationUnit;
}

namespace engine {

using Clock = std::chrono::steady_clock;

class Commands;

// What AI.INFO tells of a script.
struct Statistics {
  std::atomic<long long> microseconds{0};
  std::atomic<long long> calls{0};
  std::atomic<long long> errors{0};
};

// Who calls a script and with what; and by when it has to be through.
struct Call {
  std::string function;
  std::vector<std::string> keys;
  std::vector<std::string> arguments;
  std::vector<at::Tensor> inputs;
  size_t outputs = 0;  // how many tensors it has to return; 0: whatever it returns is ignored
};

struct Script {
  std::string device;
  std::string tag;
  std::vector<std::string> entry_points;
  std::string source;
  std::shared_ptr<torch::jit::CompilationUnit> compiled;  // null: `broken` says why
  std::string broken;
  Statistics statistics;
  std::atomic<bool> is_stored = false;  // at a key; one that is not may still be running

  ~Script();

  // Throws CommandError with torch's text, or the engine's own.
  std::vector<at::Tensor> run(const Call& call, Commands& commands, Clock::time_point until);
};

constexpr size_t kSourceLimit = 64 * 1024;  // bytes

// Compiles it and checks its entry points, on a thread that has the stack for it.
// Throws CommandError.
void compile(Script& script);

// As `compile`, but a script that cannot be compiled is kept with the reason, for whoever calls it:
// what a file or a master says was stored must not be refused.
void compile_or_break(Script& script);

// What an error says, without the C++ calls that led to it.
std::string text_of_error(const std::exception& error);

}  // namespace engine
