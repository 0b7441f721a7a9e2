// What one command has the engine do: operations in order, on tensors by name, away from the keys.
//
// AI.SCRIPTEXECUTE is a plan of one operation; AI.DAGEXECUTE states one of several. The tensors are
// taken from the keys before it runs, and what it leaves is stored after it, both on the server's
// main thread; in between it touches nothing that a client can see.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <variant>
#include <vector>

#include "commands_in_scripts.h"
#include "replies.h"
#include "scripts.h"
#include "tensors.h"

namespace engine {

struct SetOperation {
  std::string name;
  StoredTensor tensor;
};

struct GetOperation {
  std::string name;
  Format format;
};

struct ScriptOperation {
  std::shared_ptr<Script> script;
  Call call;
  std::vector<std::string> inputs;
  std::vector<std::string> outputs;
};

using Operation = std::variant<SetOperation, GetOperation, ScriptOperation>;

struct Outcome {
  enum Kind { kNotRun, kDone, kFound, kFailed };
  Kind kind = kNotRun;
  StoredTensor tensor;  // found
  Format format;        // of what was found
  std::string error;    // failed
};

struct Plan {
  std::vector<Operation> operations;
  std::unordered_map<std::string, StoredTensor> tensors;  // before it runs: loaded; then all
  std::vector<std::string> kept;                          // names that become keys at the end
  long long timeout_ms = 0;                               // 0: none
  bool is_dag = false;

  std::vector<Outcome> outcomes;

  // Runs the operations up to the first that fails.
  void run(Commands& commands, Clock::time_point until);
  const std::string* error() const;
};

// The plan of `key function [KEYS …] [INPUTS …] [ARGS …] [OUTPUTS …] [TIMEOUT ms]`.
// Throws CommandError.
Plan read_script_plan(server::Context* context, Arguments words);

// The plan of `[ROUTING …] [LOAD …] [PERSIST …] [TIMEOUT ms] |> operation |> …`.
// Throws CommandError.
Plan read_dag_plan(server::Context* context, Arguments words, bool read_only);

}  // namespace engine
