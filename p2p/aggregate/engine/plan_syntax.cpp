#include "plan_syntax.h"

#include <optional>
#include <string>
#include <unordered_set>

namespace engine {
namespace {

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

constexpr const char* kPipe = "|>";

Arguments read_dag_keys(Arguments& words, const char* keyword) {
  const auto count = words.empty() ? std::nullopt : integer_of(text_of(words.next()));
  if (!count || *count <= 0 || static_cast<uint64_t>(*count) > words.left()) {
    throw CommandError(
        std::string("ERR invalid or negative value found in number of keys to ") + keyword);
  }
  return words.take(static_cast<size_t>(*count));
}

}  // namespace

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

DagWords read_dag_words(Arguments& words, bool read_only) {
  DagWords read;
  bool any = false;
  while (!words.empty() && words.peek() != kPipe) {
    if (words.accept("LOAD")) {
      read.loaded = read_dag_keys(words, "LOAD");
      any = true;
    } else if (words.accept("PERSIST")) {
      if (read_only) throw CommandError("ERR PERSIST cannot be specified in a read-only DAG");
      read.persisted = read_dag_keys(words, "PERSIST");
      any = true;
    } else if (words.accept("ROUTING")) {
      if (words.empty()) throw CommandError("ERR Missing arguments after ROUTING keyword");
      words.next();
      any = true;
    } else if (words.accept("TIMEOUT")) {
      read.timeout_ms = read_timeout(words, "AI.DAGEXECUTE", 0);
    } else {
      throw CommandError(
          "ERR Invalid DAG command. Unexpected argument:  " + c_string_of(words.next()));
    }
  }
  if (!any) {
    throw CommandError(
        "ERR AI.DAGEXECUTE and AI.DAGEXECUTE_RO commands must contain at least one out of ROUTING, "
        "LOAD, PERSIST keywords");
  }
  return read;
}

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
