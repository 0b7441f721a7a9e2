// The words of AI.SCRIPTEXECUTE and AI.DAGEXECUTE, taken apart: which belong to which keyword, and
// which are keys. What they mean, and whether it is there, is for `plans.h`.
#pragma once

#include <vector>

#include "arguments.h"
#include "module_api.h"

namespace engine {

struct ScriptWords {
  Arguments keys{nullptr, 0};
  Arguments inputs{nullptr, 0};
  Arguments arguments{nullptr, 0};
  Arguments outputs{nullptr, 0};
  long long timeout_ms = 0;
};

// Reads what follows the function: `[KEYS …] [INPUTS …] [ARGS …] [OUTPUTS …] [TIMEOUT ms]`.
// Throws CommandError.
ScriptWords read_script_words(Arguments words, bool in_dag);

struct DagWords {
  Arguments loaded{nullptr, 0};
  Arguments persisted{nullptr, 0};
  long long timeout_ms = 0;
};

// Takes `[ROUTING …] [LOAD …] [PERSIST …] [TIMEOUT ms]`, up to the first pipe. Throws CommandError.
DagWords read_dag_words(Arguments& words, bool read_only);

// Takes the words of the next operation, without the pipe before it.
Arguments take_operation(Arguments& words);

// Where the keys are in these two commands; unreadable ones have as many as can be made out.
std::vector<int> script_key_positions(server::String** words, int count);
std::vector<int> dag_key_positions(server::String** words, int count);

}  // namespace engine
