#include "plans.h"

#include <ATen/ops/_lazy_clone.h>

#include <algorithm>
#include <unordered_set>

#include "script_keys.h"

namespace engine {
namespace {

// ---------------------------------------------------------------- reading

struct ScriptWords {
  Arguments keys{nullptr, 0};
  Arguments inputs{nullptr, 0};
  Arguments arguments{nullptr, 0};
  Arguments outputs{nullptr, 0};
  long long timeout_ms = 0;
};

// One list of `NAME count word …`, and how its errors name it.
struct Scope {
  const char* keyword;
  const char* in_count_error;
  const char* in_length_error;
};

constexpr Scope kInputs{"INPUTS", "inputs", "inputs"};
constexpr Scope kArguments{"ARGS", "keys", "args"};
constexpr Scope kOutputs{"OUTPUTS", "outputs", "outputs"};

Arguments read_scope(Arguments& words, const Scope& scope) {
  if (words.empty()) throw CommandError("ERR Invalid arguments provided to AI.SCRIPTEXECUTE");
  const auto count = integer_of(text_of(words.next()));
  if (!count || *count < 0) {
    throw CommandError(
        std::string("ERR Invalid argument for ") + scope.in_count_error +
        " count in AI.SCRIPTEXECUTE");
  }
  if (static_cast<uint64_t>(*count) > words.left()) {
    throw CommandError(
        std::string("ERR number of ") + scope.in_length_error +
        " to AI.SCRIPTEXECUTE command does not match the number of given arguments");
  }
  return words.take(static_cast<size_t>(*count));
}

Arguments read_keys(Arguments& words) {
  if (words.empty()) throw CommandError("ERR Missing arguments after KEYS keyword");
  const auto count = integer_of(text_of(words.next()));
  if (!count || *count <= 0) {
    throw CommandError("ERR Invalid or negative value found in number of KEYS");
  }
  if (static_cast<uint64_t>(*count) > words.left()) {
    throw CommandError(
        "ERR Number of pre declared KEYS to be used in the command does not match the number of "
        "given arguments");
  }
  return words.take(static_cast<size_t>(*count));
}

long long read_timeout(Arguments& words, const char* command, int64_t least) {
  if (words.empty()) {
    throw CommandError(std::string("ERR No value provided for TIMEOUT in ") + command);
  }
  const auto timeout = integer_of(text_of(words.next()));
  if (!timeout || *timeout < least) throw CommandError("ERR Invalid value for TIMEOUT");
  return *timeout;
}

// The words after the function's name.
ScriptWords read_script_words(Arguments words, bool in_dag) {
  ScriptWords read;
  std::unordered_set<std::string> met;
  const auto once = [&](const char* keyword) {
    if (!met.insert(keyword).second) {
      throw CommandError(
          std::string("ERR Already Encountered ") + keyword + " scope in AI.SCRIPTEXECUTE command");
    }
  };
  if (!in_dag && (words.empty() || (!same_word(words.peek(), "KEYS") && !same_word(words.peek(), "INPUTS")))) {
    throw CommandError(
        "ERR KEYS or INPUTS scope must be provided first for AI.SCRIPTEXECUTE command");
  }
  while (!words.empty()) {
    if (words.accept("KEYS")) {
      once("KEYS");
      read.keys = read_keys(words);
    } else if (words.accept(kInputs.keyword)) {
      once(kInputs.keyword);
      read.inputs = read_scope(words, kInputs);
    } else if (words.accept(kArguments.keyword)) {
      once(kArguments.keyword);
      read.arguments = read_scope(words, kArguments);
    } else if (words.accept(kOutputs.keyword)) {
      once(kOutputs.keyword);
      read.outputs = read_scope(words, kOutputs);
    } else if (words.accept("TIMEOUT")) {
      if (in_dag) throw CommandError("ERR TIMEOUT not allowed within a DAG command");
      read.timeout_ms = read_timeout(words, "AI.SCRIPTEXECUTE", 1);
      if (!words.empty()) {
        throw CommandError("ERR Encountered problem parsing AI.SCRIPTEXECUTE");
      }
    } else {
      throw CommandError(
          "ERR Invalid AI.SCRIPTEXECUTE command. Unexpected argument: " +
          c_string_of(words.next()));
    }
  }
  return read;
}

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

// ---------------------------------------------------------------- a DAG's

struct DagWords {
  bool any = false;
  Arguments loaded{nullptr, 0};
  Arguments persisted{nullptr, 0};
  long long timeout_ms = 0;
};

constexpr const char* kPipe = "|>";

Arguments read_dag_keys(Arguments& words, const char* keyword) {
  const auto count = words.empty() ? std::nullopt : integer_of(text_of(words.next()));
  if (!count || *count <= 0 || static_cast<uint64_t>(*count) > words.left()) {
    throw CommandError(
        std::string("ERR invalid or negative value found in number of keys to ") + keyword);
  }
  return words.take(static_cast<size_t>(*count));
}

DagWords read_dag_words(Arguments& words, bool read_only) {
  DagWords read;
  while (!words.empty() && words.peek() != kPipe) {
    if (words.accept("LOAD")) {
      read.loaded = read_dag_keys(words, "LOAD");
      read.any = true;
    } else if (words.accept("PERSIST")) {
      if (read_only) throw CommandError("ERR PERSIST cannot be specified in a read-only DAG");
      read.persisted = read_dag_keys(words, "PERSIST");
      read.any = true;
    } else if (words.accept("ROUTING")) {
      if (words.empty()) throw CommandError("ERR Missing arguments after ROUTING keyword");
      words.next();
      read.any = true;
    } else if (words.accept("TIMEOUT")) {
      read.timeout_ms = read_timeout(words, "AI.DAGEXECUTE", 0);
    } else {
      throw CommandError(
          "ERR Invalid DAG command. Unexpected argument:  " + c_string_of(words.next()));
    }
  }
  if (!read.any) {
    throw CommandError(
        "ERR AI.DAGEXECUTE and AI.DAGEXECUTE_RO commands must contain at least one out of ROUTING, "
        "LOAD, PERSIST keywords");
  }
  return read;
}

// The words of the next operation, without the pipe before it.
Arguments take_operation(Arguments& words) {
  words.next();
  Arguments rest = words;
  size_t count = 0;
  while (!rest.empty() && rest.peek() != kPipe) {
    rest.next();
    ++count;
  }
  return words.take(count);
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

std::vector<int> script_key_positions(server::String** words, int count) {
  std::vector<int> positions;
  if (count > 1) positions.push_back(1);
  for (int i = 3; i + 1 < count;) {
    const auto listed = integer_of(text_of(words[i + 1]));
    if (!listed || *listed < 0 || *listed > count - i - 2) break;
    const int next = i + 2 + static_cast<int>(*listed);
    if (!same_word(text_of(words[i]), "ARGS")) {
      for (int position = i + 2; position < next; ++position) positions.push_back(position);
    }
    i = next;
  }
  return positions;
}

std::vector<int> dag_key_positions(server::String** words, int count) {
  std::vector<int> positions;
  int i = 1;
  for (; i + 1 < count && text_of(words[i]) != kPipe; ++i) {
    const std::string_view word = text_of(words[i]);
    if (same_word(word, "ROUTING")) {
      positions.push_back(++i);
    } else if (same_word(word, "LOAD") || same_word(word, "PERSIST")) {
      const auto listed = integer_of(text_of(words[++i]));
      if (!listed || *listed < 0 || *listed > count - i - 1) return positions;
      for (int64_t left = *listed; left > 0; --left) positions.push_back(++i);
    }
  }
  // What follows a pipe is an operation, whatever its other words are: a word that reads LOAD may be
  // the value of a STRING, and must not hide from the server's ACL which script is run.
  for (; i + 2 < count; ++i) {
    if (text_of(words[i]) == kPipe && same_word(text_of(words[i + 1]), "AI.SCRIPTEXECUTE")) {
      positions.push_back(i + 2);
    }
  }
  return positions;
}

}  // namespace engine
