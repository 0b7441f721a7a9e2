// The module: RedisAI's commands for tensors, scripts and DAGs, for a server that loads it.
//
// Settings, as words after the module's path:
//   THREADS n          plans that run at once (default: the number of processors, at least 2)
//   SCRIPT_LIMIT_MS n  for a command without a TIMEOUT (default: 300000)
//   MEMORY_LIMIT n     bytes of the process, beyond which no tensor is made (default: 80 % of the
//                      machine's memory)
//   KEPT_BYTES n       freed memory that is kept for the next tensors (default: 256 MB)
#include <ATen/Parallel.h>
#include <torch/version.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <thread>

#include "arguments.h"
#include "executions.h"
#include "jobs.h"
#include "memory.h"
#include "module_api.h"
#include "operators.h"
#include "plans.h"
#include "script_keys.h"
#include "scripts.h"
#include "tensors.h"

namespace engine {
namespace {

constexpr const char* kModuleName = "ai";
constexpr int kModuleVersion = 10207;  // the RedisAI whose protocol this is
constexpr long long kModelChunkBytes = 535822336;

// ---------------------------------------------------------------- tensors

void tensor_set(server::Context* context, Arguments words) {
  if (words.left() < 3) throw ArityError();
  server::String* name = words.next();
  if (!keys::can_set_tensor(context, name)) throw CommandError(kWrongType);
  const int from_above = server::kLoading | server::kFromMaster;
  const bool may_be_empty = (server::GetContextFlags(context) & from_above) != 0;
  keys::set_tensor(context, name, read_tensor(words, may_be_empty));
  server::ReplicateVerbatim(context);
  server::ReplyWithSimpleString(context, "OK");
}

void tensor_get(server::Context* context, Arguments words) {
  if (words.left() < 1 || words.left() > 3) throw ArityError();
  const StoredTensor& tensor = keys::get_tensor(context, words.next());
  reply_with(context, tensor, read_format(words));
}

// ---------------------------------------------------------------- scripts

void check_device(const std::string& device) {
  if (same_word(std::string_view(device).substr(0, 3), "CPU")) return;
  if (same_word(std::string_view(device).substr(0, 3), "GPU")) {
    throw CommandError("GPU requested but Torch couldn't find CUDA");
  }
  throw CommandError("ERR unsupported device");
}

std::shared_ptr<Script> read_script(Arguments words) {
  auto script = std::make_shared<Script>();
  script->device = c_string_of(words.next());
  if (words.accept("TAG")) script->tag = c_string_of(words.next());
  const CommandError missing("ERR Insufficient arguments, missing script entry points");
  if (!words.accept("ENTRY_POINTS") || words.empty()) throw missing;
  const auto count = integer_of(text_of(words.next()));
  if (!count) {
    throw CommandError(
        "ERR Non numeric entry points number provided to AI.SCRIPTSTORE command");
  }
  if (*count < 0 || static_cast<uint64_t>(*count) > words.left()) throw missing;
  for (int64_t i = 0; i < *count; ++i) script->entry_points.push_back(c_string_of(words.next()));
  if (!words.accept("SOURCE") || words.empty()) {
    throw CommandError("ERR Insufficient arguments, missing script SOURCE");
  }
  script->source = c_string_of(words.next());
  check_device(script->device);
  return script;
}

void store(server::Context* context, server::String* name, std::shared_ptr<Script> script) {
  keys::set_script(context, name, script);
  keys::replicate_script(context, name, *script);
  server::ReplyWithSimpleString(context, "OK");
}

class Compilation final : public jobs::Work {
 public:
  Compilation(std::string name, std::shared_ptr<Script> script)
      : name_(std::move(name)), script_(std::move(script)) {}

  void run(Clock::time_point) override { compile_or_break(*script_); }

  void finish(server::Context* context) override {
    if (script_->compiled == nullptr) throw CommandError(script_->broken);
    const Word name(context, name_);
    store(context, name.get(), script_);
  }

 private:
  std::string name_;
  std::shared_ptr<Script> script_;
};

void script_store(server::Context* context, Arguments words) {
  if (words.left() < 7) throw ArityError();
  server::String* name = words.next();
  std::shared_ptr<Script> script = read_script(words);
  const int from_above = server::kLoading | server::kFromMaster;
  if ((server::GetContextFlags(context) & from_above) != 0) {
    compile_or_break(*script);
    return store(context, name, std::move(script));
  }
  if (!jobs::may_block(context)) {
    compile(*script);
    return store(context, name, std::move(script));
  }
  jobs::submit(
      context, std::make_unique<Compilation>(std::string(text_of(name)), std::move(script)));
}

void reply_with_text(server::Context* context, const std::string& text) {
  server::ReplyWithStringBuffer(context, text.data(), text.size());
}

void script_get(server::Context* context, Arguments words) {
  if (words.left() < 1) throw ArityError();
  const std::shared_ptr<Script> script = keys::get_script(context, words.next());
  bool meta = false;
  bool source = false;
  while (!words.empty()) {
    if (words.accept("META")) {
      meta = true;
    } else if (words.accept("SOURCE")) {
      source = true;
    } else {
      words.next();
    }
  }
  if (source && !meta) return reply_with_text(context, script->source);
  const bool both = meta == source;
  server::ReplyWithArray(context, both ? 8 : 6);
  reply_with_text(context, "device");
  reply_with_text(context, script->device);
  reply_with_text(context, "tag");
  reply_with_text(context, script->tag);
  reply_with_text(context, "Entry Points");
  server::ReplyWithArray(context, static_cast<long>(script->entry_points.size()));
  for (const std::string& name : script->entry_points) reply_with_text(context, name);
  if (both) {
    reply_with_text(context, "source");
    reply_with_text(context, script->source);
  }
}

void script_delete(server::Context* context, Arguments words) {
  if (words.left() != 1) throw ArityError();
  keys::delete_script(context, words.next());
  server::ReplicateVerbatim(context);
  server::ReplyWithSimpleString(context, "OK");
}

void execute(server::Context* context, Plan plan) {
  jobs::submit(context, std::make_unique<Execution>(context, std::move(plan)));
}

void check_may_block(server::Context* context) {
  if (!jobs::may_block(context)) {
    throw CommandError("ERR Cannot run RedisAI command within a transaction or a LUA script");
  }
}

void script_execute(server::Context* context, Arguments words) {
  check_may_block(context);
  execute(context, read_script_plan(context, words));
}

void dag_execute(server::Context* context, Arguments words) {
  check_may_block(context);
  execute(context, read_dag_plan(context, words, /*read_only=*/false));
}

void dag_execute_read_only(server::Context* context, Arguments words) {
  check_may_block(context);
  execute(context, read_dag_plan(context, words, /*read_only=*/true));
}

// ---------------------------------------------------------------- what is known

void info(server::Context* context, Arguments words) {
  if (words.left() < 1 || words.left() > 2) throw ArityError();
  server::String* name = words.next();
  const std::shared_ptr<Script> script = keys::stored_as(context, name);
  if (script == nullptr) throw CommandError("ERR cannot find run info for key");
  Statistics& statistics = script->statistics;
  if (words.accept("RESETSTAT")) {
    statistics.microseconds = statistics.calls = statistics.errors = 0;
    server::ReplyWithSimpleString(context, "OK");
    return;
  }
  const auto text_field = [&](const char* field, const std::string& value) {
    reply_with_text(context, field);
    reply_with_text(context, value);
  };
  const auto number_field = [&](const char* field, long long value) {
    reply_with_text(context, field);
    server::ReplyWithLongLong(context, value);
  };
  server::ReplyWithArray(context, 18);
  text_field("key", std::string(text_of(name)));
  text_field("type", "SCRIPT");
  text_field("backend", "TORCH");
  text_field("device", script->device);
  text_field("tag", script->tag);
  number_field("duration", statistics.microseconds);
  number_field("samples", -1);
  number_field("calls", statistics.calls);
  number_field("errors", statistics.errors);
}

// Kept for clients that set it; there is nothing to be found under it.
std::string& backends_path() {
  static std::string path;
  return path;
}

long long model_chunk_bytes = kModelChunkBytes;

void config_get(server::Context* context, Arguments words) {
  if (words.accept("BACKENDSPATH")) {
    reply_with_text(context, backends_path());
  } else if (words.accept("MODEL_CHUNK_SIZE")) {
    server::ReplyWithLongLong(context, model_chunk_bytes);
  } else {
    server::ReplyWithNull(context);
  }
}

void config(server::Context* context, Arguments words) {
  if (words.empty()) throw ArityError();
  if (words.accept("GET")) {
    if (words.empty()) throw ArityError();
    return config_get(context, words);
  }
  if (words.accept("BACKENDSPATH")) {
    if (words.empty()) throw CommandError("ERR BACKENDSPATH: missing path argument");
    backends_path() = text_of(words.next());
  } else if (words.accept("MODEL_CHUNK_SIZE")) {
    if (words.empty()) throw CommandError("ERR MODEL_CHUNK_SIZE: missing chunk size");
    const auto bytes = integer_of(text_of(words.next()));
    if (!bytes || *bytes <= 0) throw CommandError("ERR MODEL_CHUNK_SIZE: invalid chunk size");
    model_chunk_bytes = *bytes;
  } else if (words.accept("LOADBACKEND")) {
    if (words.left() < 2) throw ArityError();
    if (!same_word(words.peek(), "TORCH")) throw CommandError("ERR unsupported backend");
    throw CommandError("ERR error loading backend");  // torch is there already
  } else {
    throw CommandError("ERR unsupported subcommand");
  }
  server::ReplyWithSimpleString(context, "OK");
}

void script_scan(server::Context* context, Arguments words) {
  if (!words.empty()) throw ArityError();
  const auto scripts = keys::all_scripts(context);
  server::ReplyWithArray(context, static_cast<long>(scripts.size()));
  for (const auto& [name, tag] : scripts) {
    server::ReplyWithArray(context, 2);
    reply_with_text(context, name);
    reply_with_text(context, tag);
  }
}

void model_scan(server::Context* context, Arguments words) {
  if (!words.empty()) throw ArityError();
  server::ReplyWithArray(context, 0);
}

void module_info(server::Info* info, int) {
  server::InfoAddSection(info, "backends_info");
  server::InfoAddFieldCString(info, "Torch_version", TORCH_VERSION);
  server::InfoAddSection(info, "engine");
  server::InfoAddFieldCString(info, "name", "mayfly");
  server::InfoAddFieldULongLong(info, "tensor_bytes", memory::used_bytes());
  server::InfoAddFieldULongLong(info, "kept_bytes", memory::kept_bytes());
}

// ---------------------------------------------------------------- loading

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
    CommandFacts{"ai.tensorset", served<tensor_set>, "write deny-oom", 1, 1, 1},
    CommandFacts{"ai.tensorget", served<tensor_get>, "readonly", 1, 1, 1},
    CommandFacts{"ai.scriptstore", served<script_store>, "write deny-oom", 1, 1, 1},
    CommandFacts{"ai.scriptget", served<script_get>, "readonly", 1, 1, 1},
    CommandFacts{"ai.scriptdel", served<script_delete>, "write", 1, 1, 1},
    CommandFacts{"ai.scriptexecute", served<script_execute, script_key_positions>,
                 "write deny-oom getkeys-api", 5, 5, 1},
    CommandFacts{"ai.dagexecute", served<dag_execute, dag_key_positions>,
                 "write deny-oom getkeys-api", 3, 3, 1},
    CommandFacts{"ai.dagexecute_ro", served<dag_execute_read_only, dag_key_positions>,
                 "readonly getkeys-api", 3, 3, 1},
    CommandFacts{"ai.info", served<info>, "readonly", 1, 1, 1},
    CommandFacts{"ai.config", served<config>, "write", 0, 0, 0},
    CommandFacts{"ai._scriptscan", served<script_scan>, "readonly", 0, 0, 0},
    CommandFacts{"ai._modelscan", served<model_scan>, "readonly", 0, 0, 0},
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
    server::RegisterInfoFunc(context, module_info);
    jobs::start({static_cast<int>(settings.threads), settings.limit_ms});
  } catch (const std::exception& error) {
    server::Log(context, "warning", "the engine cannot start: %s", error.what());
    return server::kError;
  }
  return server::kOk;
}
