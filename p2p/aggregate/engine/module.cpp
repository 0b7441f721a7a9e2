// The module: RedisAI's commands for tensors, scripts and DAGs, for a server that loads it.
//
// Settings, as words after the module's path:
//   THREADS n          plans that run at once (default: the number of processors, at least 2)
//   SCRIPT_LIMIT_MS n  for a command without a TIMEOUT (default: 300000)
//   MEMORY_LIMIT n     bytes of the process, beyond which no tensor is made (default: 80 % of the
//                      machine's memory)
//   KEPT_BYTES n       freed memory that is kept for the next tensors (default: 256 MB)
#include <ATen/Parallel.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <string>
#include <thread>
#include <vector>

#include "arguments.h"
#include "commands.h"
#include "introspection.h"
#include "jobs.h"
#include "memory.h"
#include "module_api.h"
#include "operators.h"
#include "plan_syntax.h"
#include "script_keys.h"
#include "scripts.h"
#include "tensors.h"

namespace engine {
namespace {

constexpr const char* kModuleName = "ai";
constexpr int kModuleVersion = 10207;  // the RedisAI whose protocol this is

using Handler = void (*)(server::Context*, Arguments);
using Positions = std::vector<int> (*)(server::String**, int);

// What the server calls: nothing that a command throws goes further than its reply.
template <Handler handler, Positions positions>
int handle(server::Context* context, server::String** words, int count) {
  if constexpr (positions != nullptr) {
    if (server::IsKeysPositionRequest(context) != 0) {
      for (const int position : positions(words, count)) server::KeyAtPos(context, position);
      return server::kOk;
    }
  }
  try {
    handler(context, Arguments(words + 1, count - 1));
    return server::kOk;
  } catch (const ArityError&) {
    return server::WrongArity(context);
  } catch (const std::exception& error) {
    return server::ReplyWithError(context, one_line(text_of_error(error)).c_str());
  }
}

struct CommandFacts {
  const char* name;
  server::CommandFunction function;
  const char* flags;
  int first_key;
  int last_key;
  int step;
};

template <Handler handler, Positions positions = nullptr>
constexpr server::CommandFunction served = handle<handler, positions>;

constexpr std::array kCommands{
    CommandFacts{"ai.tensorset", served<commands::tensor_set>, "write deny-oom", 1, 1, 1},
    CommandFacts{"ai.tensorget", served<commands::tensor_get>, "readonly", 1, 1, 1},
    CommandFacts{"ai.scriptstore", served<commands::script_store>, "write deny-oom", 1, 1, 1},
    CommandFacts{"ai.scriptget", served<commands::script_get>, "readonly", 1, 1, 1},
    CommandFacts{"ai.scriptdel", served<commands::script_delete>, "write", 1, 1, 1},
    CommandFacts{"ai.scriptexecute", served<commands::script_execute, script_key_positions>,
                 "write deny-oom getkeys-api", 5, 5, 1},
    CommandFacts{"ai.dagexecute", served<commands::dag_execute, dag_key_positions>,
                 "write deny-oom getkeys-api", 3, 3, 1},
    CommandFacts{"ai.dagexecute_ro", served<commands::dag_execute_read_only, dag_key_positions>,
                 "readonly getkeys-api", 3, 3, 1},
    CommandFacts{"ai.info", served<introspection::info>, "readonly", 1, 1, 1},
    CommandFacts{"ai.config", served<introspection::config>, "write", 0, 0, 0},
    CommandFacts{"ai._scriptscan", served<introspection::script_scan>, "readonly", 0, 0, 0},
    CommandFacts{"ai._modelscan", served<introspection::model_scan>, "readonly", 0, 0, 0},
};

constexpr const char* kCategory = "ai";

bool create_commands(server::Context* context) {
  const bool categories = server::AddACLCategory != nullptr && server::GetCommand != nullptr &&
                          server::SetCommandACLCategories != nullptr &&
                          server::AddACLCategory(context, kCategory) == server::kOk;
  for (const CommandFacts& facts : kCommands) {
    const int created = server::CreateCommand(
        context, facts.name, facts.function, facts.flags, facts.first_key, facts.last_key,
        facts.step);
    if (created != server::kOk) return false;
    if (categories) {
      const bool writes = std::string_view(facts.flags).substr(0, 5) == "write";
      const std::string all = std::string(kCategory) + (writes ? " write" : " read");
      server::SetCommandACLCategories(server::GetCommand(context, facts.name), all.c_str());
    }
  }
  return true;
}

struct Settings {
  int64_t threads = std::max(2u, std::thread::hardware_concurrency());
  int64_t limit_ms = 300'000;
  int64_t memory_limit = sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE) / 5 * 4;
  int64_t kept_bytes = int64_t{256} << 20;
};

// Throws CommandError.
Settings read_settings(Arguments words) {
  Settings settings;
  while (!words.empty()) {
    int64_t* setting = words.accept("THREADS")           ? &settings.threads
                       : words.accept("SCRIPT_LIMIT_MS") ? &settings.limit_ms
                       : words.accept("MEMORY_LIMIT")    ? &settings.memory_limit
                       : words.accept("KEPT_BYTES")      ? &settings.kept_bytes
                                                         : nullptr;
    if (setting == nullptr) {
      throw CommandError("unknown setting: " + c_string_of(words.next()));
    }
    const auto value = words.empty() ? std::nullopt : integer_of(text_of(words.next()));
    if (!value || *value < (setting == &settings.kept_bytes ? 0 : 1)) {
      throw CommandError("a setting has no number of its own, or one out of range");
    }
    *setting = *value;
  }
  return settings;
}

}  // namespace
}  // namespace engine

extern "C" __attribute__((visibility("default"))) int RedisModule_OnLoad(
    server::Context* context, server::String** words, int count) {
  using namespace engine;
  if (!server::load(context)) return server::kError;
  if (server::IsModuleNameBusy(kModuleName) != 0) return server::kError;
  server::SetModuleAttribs(context, kModuleName, kModuleVersion, server::kApiVersion);
  server::SetModuleOptions(context, server::kOptionHandlesIoErrors);
  try {
    const Settings settings = read_settings(Arguments(words, count));
    memory::install(
        {static_cast<size_t>(settings.memory_limit), static_cast<size_t>(settings.kept_bytes)});
    operators::prepare();
    at::set_num_threads(1);
    keys::register_tensor_type(context);
    keys::register_script_type(context);
    if (!create_commands(context)) return server::kError;
    server::RegisterInfoFunc(context, introspection::module_info);
    jobs::start(context, {static_cast<int>(settings.threads), settings.limit_ms});
  } catch (const std::exception& error) {
    server::Log(context, "warning", "the engine cannot start: %s", error.what());
    return server::kError;
  }
  return server::kOk;
}
