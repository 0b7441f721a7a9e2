#include "operators.h"

#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/frontend/sugared_value.h>
#include <torch/csrc/jit/runtime/custom_operator.h>
#include <torch/csrc/jit/runtime/print_handler.h>

#include <limits>

#include "commands_in_scripts.h"
#include "memory.h"

namespace engine::operators {
namespace {

namespace jit = torch::jit;

// ---------------------------------------------------------------- the run

thread_local Run* running = nullptr;  // the one that this thread is in

constexpr uint32_t kTurnsBetweenMemoryChecks = 4096;

// In every turn of every loop, so that a script can be ended.
void take_turn(jit::Stack&) {
  if (Clock::now() > running->until) throw std::runtime_error("the script ran out of time");
  if (++running->turns % kTurnsBetweenMemoryChecks == 0) memory::check_process();
}

constexpr int64_t kMostRepetitions = 1'000'000;
constexpr size_t kLongest = size_t{1} << 21;  // characters of a string, elements of a list
constexpr size_t kLong = size_t{1} << 16;     // from here on the process is looked at
constexpr size_t kLongestProduct = size_t{1} << 18;

// Of what torch allocates without asking the engine, which the system would end the process for.
void check_length(size_t length) {
  if (length > kLongest) throw std::runtime_error("out of memory: a string or list is too long");
  if (length > kLong) memory::check_process();
}

size_t length_of(const c10::IValue& value) {
  if (value.isString()) return value.toStringRef().size();
  return value.isList() ? value.toList().size() : 0;
}

// About how many characters there are in a value's text.
size_t text_length(const c10::IValue& value) {
  size_t length = 1;
  const auto add = [&](const c10::IValue& part) {
    length += text_length(part);
    check_length(length);
  };
  if (value.isString()) return value.toStringRef().size();
  if (value.isTensor()) return value.toTensor().defined() ? value.toTensor().numel() : 1;
  if (value.isList()) {
    for (const c10::IValue& each : value.toList()) add(each);
  } else if (value.isTuple()) {
    for (const c10::IValue& each : value.toTupleRef().elements()) add(each);
  } else if (value.isGenericDict()) {
    for (const auto& entry : value.toGenericDict()) {
      add(entry.key());
      add(entry.value());
    }
  }
  return length;
}

// ---------------------------------------------------------------- what is checked before operators

using Operands = at::ArrayRef<c10::IValue>;

// Which would end the process.
void check_division(Operands operands) {
  if (!operands[0].isInt() || !operands[1].isInt()) return;
  if (operands[1].toInt() == 0) throw std::runtime_error("integer division by zero");
  if (operands[1].toInt() == -1 && operands[0].toInt() == std::numeric_limits<int64_t>::min()) {
    throw std::runtime_error("integer overflow in a division");
  }
}

void check_width(Operands operands) {
  if (operands[1].toInt() > kMostRepetitions) throw std::runtime_error("a width is too large");
}

// Of a list times a number, or the other way round.
void check_repetition(Operands operands) {
  const bool list_first = operands[0].isList();
  if (!list_first && !operands[1].isList()) return;
  const size_t length = length_of(operands[list_first ? 0 : 1]);
  const int64_t count = std::max<int64_t>(operands[list_first ? 1 : 0].toInt(), 0);
  if (count > kMostRepetitions) throw std::runtime_error("a list is repeated too often");
  check_length(static_cast<size_t>(count) * length);
}

void check_growth(Operands operands) {
  for (const c10::IValue& each : operands) check_length(length_of(each));
}

void check_text(Operands operands) {
  for (const c10::IValue& each : operands) check_length(text_length(each));
}

// Torch takes time in the square of what comes of it.
void check_product(const c10::IValue& first, const c10::IValue& second) {
  const size_t product = (text_length(first) + 1) * (text_length(second) + 1);
  if (product > kLongestProduct) throw std::runtime_error("out of memory: a string is too long");
}

void check_join(Operands operands) { check_product(operands[0], operands[1]); }
void check_replace(Operands operands) { check_product(operands[0], operands[2]); }

// Has `check` called before torch's own operator of this name, wherever that is run: the compiler
// already runs it if its operands are constants.
void watch(const char* name, void (*check)(Operands)) {
  const auto operators = jit::getAllOperatorsFor(c10::Symbol::fromQualString(name));
  for (const std::shared_ptr<jit::Operator>& original : std::vector(operators)) {
    if (original->isC10Op() || !original->hasOperation()) continue;
    const c10::FunctionSchema& schema = original->schema();
    const size_t fixed = schema.arguments().size();
    const bool any_number = schema.is_vararg();
    auto run = [=, operation = original->getOperation()](jit::Stack& stack) mutable {
      const size_t count = any_number ? static_cast<size_t>(stack.back().toInt()) : fixed;
      const size_t end = stack.size() - (any_number ? 1 : 0);
      check(Operands(stack).slice(end - count, count));
      operation(stack);
    };
    const auto aliases = original->aliasAnalysisKind();
    jit::deregisterOperator(schema);
    jit::registerOperator(jit::Operator(c10::toString(schema), std::move(run), aliases));
  }
}

void watch_operators() {
  for (const char* name : {"aten::floordiv", "aten::remainder", "aten::divmod"}) {
    watch(name, check_division);
  }
  for (const char* name :
       {"aten::ljust", "aten::rjust", "aten::center", "aten::zfill", "aten::expandtabs"}) {
    watch(name, check_width);
  }
  for (const char* name : {"aten::mul", "aten::mul_"}) watch(name, check_repetition);
  for (const char* name : {"aten::add", "aten::add_", "aten::extend"}) watch(name, check_growth);
  for (const char* name : {"aten::percentFormat", "aten::format", "aten::str", "prim::Print"}) {
    watch(name, check_text);
  }
  watch("aten::join", check_join);
  watch("aten::replace", check_replace);
}

// ---------------------------------------------------------------- what is put into a graph

// Before a tensor is split into so many.
void check_count(jit::Stack& stack) {
  if (jit::pop(stack).toInt() > kMostRepetitions) throw std::runtime_error("a count is too large");
}

// Before a tensor becomes a list of its numbers.
void check_numbers(jit::Stack& stack) {
  check_length(static_cast<size_t>(jit::pop(stack).toTensor().numel()));
}

// Before a tensor becomes a list of pieces of this size along a dimension.
void check_pieces(jit::Stack& stack) {
  const int64_t dim = jit::pop(stack).toInt();
  const int64_t size = jit::pop(stack).toInt();
  const at::Tensor tensor = jit::pop(stack).toTensor();
  if (tensor.dim() == 0 || size <= 0) return;  // torch's to refuse
  if (tensor.size(dim) / size > kMostRepetitions) {
    throw std::runtime_error("a tensor is split into too many pieces");
  }
}

void redis_execute(jit::Stack& stack) {
  const auto count = static_cast<size_t>(jit::pop(stack).toInt());
  std::vector<std::string> words;
  for (size_t i = 0; i < count; ++i) {
    const c10::IValue& word = jit::peek(stack, i, count);
    if (word.isString()) {
      words.push_back(word.toStringRef());
    } else {
      for (const c10::IValue& each : word.toListRef()) words.push_back(each.toStringRef());
    }
  }
  jit::drop(stack, count);
  if (running == nullptr) throw std::runtime_error("redis.execute needs a running script");
  for (std::string& word : words) word.resize(word.find('\0') == std::string::npos ? word.size() : word.find('\0'));
  jit::push(stack, running->commands.execute(words));
}

void redis_as_list(jit::Stack& stack) {
  const c10::IValue value = jit::pop(stack);
  if (!value.isList()) throw std::runtime_error("redis.asList: the value is not a list");
  jit::push(stack, value.toList());
}

void model_execute(jit::Stack&) {
  throw std::runtime_error("redisAI.model_execute: this engine has no MODEL commands");
}

jit::Operator operation(const char* schema, void (*run)(jit::Stack&)) {
  return {schema, [run](jit::Stack& stack) { run(stack); }, c10::AliasAnalysisKind::CONSERVATIVE};
}

// The free names of a script: torch, redis and redisAI, in any case.
class Names final : public jit::Resolver {
 public:
  std::shared_ptr<jit::SugaredValue> resolveValue(
      const std::string& name, jit::GraphFunction&, const jit::SourceRange&) override {
    if (same_word(name, "torch")) return std::make_shared<jit::BuiltinModule>("aten");
    if (same_word(name, "redis")) return std::make_shared<jit::BuiltinModule>("redis");
    if (same_word(name, "redisAI")) return std::make_shared<jit::BuiltinModule>("redisAI");
    return nullptr;
  }
};

}  // namespace

Run::Run(Commands& its_commands, Clock::time_point its_end) : commands(its_commands), until(its_end) {
  running = this;
}

Run::~Run() { running = nullptr; }

std::shared_ptr<jit::Resolver> names() { return std::make_shared<Names>(); }

void prepare() {
  static const jit::RegisterOperators operators({
      operation("redis::execute(str command, ...) -> Any", redis_execute),
      operation("redis::asList(Any value) -> Any[]", redis_as_list),
      operation("redisAI::model_execute(str model_key, Tensor[] tensors, int num_outputs) -> Tensor[]", model_execute),
      operation("engine::take_turn() -> ()", take_turn),
      operation("engine::check_count(int count) -> ()", check_count),
      operation("engine::check_numbers(Tensor tensor) -> ()", check_numbers),
      operation("engine::check_pieces(Tensor tensor, int size, int dim) -> ()", check_pieces),
  });
  watch_operators();
  // Graphs are run as they are written: no profiling runs, no fusion, the same kernels every time.
  jit::getProfilingMode() = false;
  jit::setPrintHandler([](const std::string& text) {
    server::Log(nullptr, "debug", "a script says: %s", text.c_str());
  });
}

}  // namespace engine::operators
