#include "commands.h"

#include <memory>
#include <string>

#include "executions.h"
#include "jobs.h"
#include "plans.h"
#include "replies.h"
#include "script_keys.h"
#include "scripts.h"
#include "tensors.h"

namespace engine::commands {
namespace {

// Whether a file or a master has the command done, which it must be.
bool is_from_above(server::Context* context) {
  return (server::GetContextFlags(context) & (server::kLoading | server::kFromMaster)) != 0;
}

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

void execute(server::Context* context, Plan plan) {
  jobs::submit(context, std::make_unique<Execution>(context, std::move(plan)));
}

void check_may_block(server::Context* context) {
  if (!jobs::may_block(context)) {
    throw CommandError("ERR Cannot run RedisAI command within a transaction or a LUA script");
  }
}

}  // namespace

void tensor_set(server::Context* context, Arguments words) {
  if (words.left() < 3) throw ArityError();
  server::String* name = words.next();
  if (!keys::can_set_tensor(context, name)) throw CommandError(kWrongType);
  keys::set_tensor(context, name, read_tensor(words, /*may_be_empty=*/is_from_above(context)));
  server::ReplicateVerbatim(context);
  server::ReplyWithSimpleString(context, "OK");
}

void tensor_get(server::Context* context, Arguments words) {
  if (words.left() < 1 || words.left() > 3) throw ArityError();
  const StoredTensor& tensor = keys::get_tensor(context, words.next());
  reply_with(context, tensor, read_format(words));
}

void script_store(server::Context* context, Arguments words) {
  if (words.left() < 7) throw ArityError();
  server::String* name = words.next();
  std::shared_ptr<Script> script = read_script(words);
  if (is_from_above(context)) {
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

}  // namespace engine::commands
