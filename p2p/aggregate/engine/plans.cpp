#include "plans.h"

#include <ATen/ops/_lazy_clone.h>

#include <limits>
#include <unordered_set>

#include "plan_syntax.h"
#include "script_keys.h"

namespace engine {
namespace {

// ---------------------------------------------------------------- reading

std::vector<std::string> texts_of(Arguments words) {
  std::vector<std::string> texts;
  while (!words.empty()) texts.push_back(c_string_of(words.next()));
  return texts;
}

// Names of keys may hold any byte.
std::vector<std::string> names_of(Arguments words) {
  std::vector<std::string> names;
  while (!words.empty()) names.emplace_back(text_of(words.next()));
  return names;
}

ScriptOperation script_operation(
    std::shared_ptr<Script> script, std::string function, const ScriptWords& words) {
  ScriptOperation operation;
  operation.script = std::move(script);
  operation.call.function = std::move(function);
  operation.call.keys = texts_of(words.keys);
  operation.call.arguments = texts_of(words.arguments);
  operation.inputs = names_of(words.inputs);
  operation.outputs = names_of(words.outputs);
  operation.call.outputs = operation.outputs.size();
  return operation;
}

// Bytes shared with the key until one of the two is written: so it may go to another thread.
StoredTensor share(const StoredTensor& tensor) {
  return {tensor.type, tensor.shape, at::_lazy_clone(tensor.data)};
}

void load(server::Context* context, Plan& plan, Arguments names) {
  while (!names.empty()) {
    server::String* name = names.next();
    plan.tensors.insert_or_assign(
        std::string(text_of(name)), share(keys::get_tensor(context, name)));
  }
}

void check_arity(const Arguments& words, size_t least, size_t most, const char* command) {
  if (words.left() < least || words.left() > most) {
    throw CommandError(std::string("wrong number of arguments for '") + command + "' command");
  }
}

constexpr size_t kAnyNumber = std::numeric_limits<size_t>::max();

using Names = std::unordered_set<std::string>;

Operation read_script_operation(
    server::Context* context, Arguments words, Names& names, bool read_only) {
  if (read_only) {
    throw CommandError("ERR AI.SCRIPTEXECUTE command cannot be specified in a read-only DAG");
  }
  check_arity(words, 2, kAnyNumber, "AI.SCRIPTEXECUTE");
  std::shared_ptr<Script> script = keys::get_script(context, words.next());
  std::string function = c_string_of(words.next());
  ScriptOperation operation =
      script_operation(std::move(script), std::move(function), read_script_words(words, true));
  for (const std::string& input : operation.inputs) {
    if (names.count(input) == 0) throw CommandError("ERR INPUT key cannot be found in DAG");
  }
  names.insert(operation.outputs.begin(), operation.outputs.end());
  return operation;
}

Operation read_operation(server::Context* context, Arguments words, Names& names, bool read_only) {
  if (words.accept("AI.TENSORSET")) {
    check_arity(words, 3, kAnyNumber, "AI.TENSORSET");
    std::string name(text_of(words.next()));
    names.insert(name);
    return SetOperation{std::move(name), read_tensor(words, false)};
  }
  if (words.accept("AI.TENSORGET")) {
    check_arity(words, 1, 3, "AI.TENSORGET");
    std::string name(text_of(words.next()));
    return GetOperation{std::move(name), read_format(words)};
  }
  if (words.accept("AI.SCRIPTEXECUTE")) {
    return read_script_operation(context, words, names, read_only);
  }
  if (words.accept("AI.SCRIPTRUN")) {
    throw CommandError("Deprecated AI.SCRIPTRUN cannot be used in AI.DAGEXECUTE command");
  }
  throw CommandError("Unsupported command within DAG");
}

void keep(Plan& plan, Arguments persisted, const Names& names) {
  plan.kept = names_of(persisted);
  if (Names(plan.kept.begin(), plan.kept.end()).size() != plan.kept.size()) {
    throw CommandError("ERR PERSIST keys must be unique");
  }
  for (const std::string& name : plan.kept) {
    if (names.count(name) == 0) throw CommandError("ERR PERSIST key cannot be found in DAG");
  }
}

// ---------------------------------------------------------------- running

class Runner {
 public:
  Runner(Plan& plan, Commands& commands, Clock::time_point until)
      : plan_(plan), commands_(commands), until_(until) {}

  Outcome operator()(SetOperation& set) {
    plan_.tensors.insert_or_assign(set.name, std::move(set.tensor));
    return {.kind = Outcome::kDone};
  }

  Outcome operator()(GetOperation& get) {
    const auto found = plan_.tensors.find(get.name);
    if (found == plan_.tensors.end()) return {};
    return {.kind = Outcome::kFound, .tensor = found->second, .format = get.format};
  }

  Outcome operator()(ScriptOperation& operation) {
    for (const std::string& input : operation.inputs) {
      operation.call.inputs.push_back(lend(plan_.tensors.at(input)));
    }
    std::vector<at::Tensor> outputs = operation.script->run(operation.call, commands_, until_);
    operation.call.inputs.clear();
    std::vector<StoredTensor> adopted;
    for (at::Tensor& output : outputs) adopted.push_back(adopt(std::move(output)));
    for (size_t i = 0; i < adopted.size(); ++i) {
      plan_.tensors.insert_or_assign(operation.outputs[i], std::move(adopted[i]));
    }
    return {.kind = Outcome::kDone};
  }

 private:
  Plan& plan_;
  Commands& commands_;
  Clock::time_point until_;
};

}  // namespace

void Plan::run(Commands& commands, Clock::time_point until) {
  outcomes.resize(operations.size());
  Runner runner(*this, commands, until);
  for (size_t i = 0; i < operations.size(); ++i) {
    try {
      outcomes[i] = std::visit(runner, operations[i]);
    } catch (const std::exception& error) {
      outcomes[i] = {.kind = Outcome::kFailed, .error = one_line(text_of_error(error))};
      return;
    }
  }
}

const std::string* Plan::error() const {
  for (const Outcome& outcome : outcomes) {
    if (outcome.kind == Outcome::kFailed) return &outcome.error;
  }
  return nullptr;
}

Plan read_script_plan(server::Context* context, Arguments words) {
  if (words.left() < 2) {
    throw CommandError("ERR wrong number of arguments for 'AI.SCRIPTEXECUTE' command");
  }
  std::shared_ptr<Script> script = keys::get_script(context, words.next());
  std::string function = c_string_of(words.next());
  const ScriptWords read = read_script_words(words, false);
  Plan plan;
  plan.timeout_ms = read.timeout_ms;
  load(context, plan, read.inputs);
  plan.kept = names_of(read.outputs);
  plan.operations.emplace_back(script_operation(std::move(script), std::move(function), read));
  return plan;
}

Plan read_dag_plan(server::Context* context, Arguments words, bool read_only) {
  const char* command = read_only ? "AI.DAGEXECUTE_RO" : "AI.DAGEXECUTE";
  if (words.left() < 5) {
    throw CommandError(std::string("ERR missing arguments for '") + command + "' command");
  }
  const DagWords read = read_dag_words(words, read_only);
  Plan plan;
  plan.is_dag = true;
  plan.timeout_ms = read.timeout_ms;
  load(context, plan, read.loaded);
  Names names;
  for (const auto& [name, tensor] : plan.tensors) names.insert(name);
  while (!words.empty()) {
    const Arguments operation = take_operation(words);
    if (operation.empty()) continue;
    plan.operations.push_back(read_operation(context, operation, names, read_only));
  }
  if (plan.operations.empty()) throw CommandError("ERR DAG is empty");
  keep(plan, read.persisted, names);
  return plan;
}

}  // namespace engine
