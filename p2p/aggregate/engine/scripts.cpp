#include "scripts.h"

#include <c10/core/InferenceMode.h>
#include <torch/csrc/jit/api/compilation_unit.h>
#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/frontend/error_report.h>
#include <torch/csrc/jit/frontend/resolver.h>
#include <torch/csrc/jit/frontend/sugared_value.h>
#include <torch/csrc/jit/ir/ir.h>
#include <torch/csrc/jit/runtime/custom_operator.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/csrc/jit/runtime/print_handler.h>

#include <limits>
#include <unordered_map>

#include "commands_in_scripts.h"
#include "deep_stack.h"
#include "memory.h"

namespace engine {
namespace {

namespace jit = torch::jit;

// ---------------------------------------------------------------- what a script can call

// The run that this thread is in.
struct Running {
  Commands* commands;
  Clock::time_point until;
  uint32_t turns = 0;
};
thread_local Running* running = nullptr;

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
  jit::push(stack, running->commands->execute(words));
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

// ---------------------------------------------------------------- what is checked in a graph

// Functions with one underscore are torch's own, many of which trust their arguments; these the
// compiler puts in by itself.
bool is_private(const std::string& name) {
  static const std::array compilers{"_set_item", "_unwrap_optional", "_get_tracing_state"};
  return name.size() > 1 && name[0] == '_' && name[1] != '_' &&
         std::find(compilers.begin(), compilers.end(), name) == compilers.end();
}

// Those that reach files, take memory of a tensor's at their word, or grow without a check (format).
bool is_harmful(const std::string& name) {
  static const std::array harmful{"from_file", "set_", "set_data", "save", "format"};
  static const std::array families{"fbgemm_", "mkldnn_", "quantize", "cudnn_", "miopen_", "fake_quantize", "quantized_", "q_"};
  if (std::find(harmful.begin(), harmful.end(), name) != harmful.end()) return true;
  return std::any_of(families.begin(), families.end(), [&](const char* family) {
    return name.rfind(family, 0) == 0;
  });
}

bool is_one_of(const std::string& name, std::initializer_list<const char*> names) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

// One that its errors place in the same line of the source.
jit::Node* new_check(jit::Node& node, const char* name, at::ArrayRef<jit::Value*> inputs) {
  jit::Node* check = node.owningGraph()->create(c10::Symbol::fromQualString(name), inputs, 0);
  check->setSourceRange(node.sourceRange());
  return check;
}

void insert_before(jit::Node& node, const char* name, at::ArrayRef<jit::Value*> inputs) {
  new_check(node, name, inputs)->insertBefore(&node);
}

// Puts in what ends a script whose lists of pieces of a tensor would take all memory.
void guard_pieces(jit::Node& node, const std::string& name) {
  const auto inputs = node.inputs();
  const bool by_number = inputs.size() == 3 && inputs[1]->type() == c10::IntType::get();
  if (name == "tolist") {
    insert_before(node, "engine::check_numbers", {inputs.at(0)});
  } else if (by_number && is_one_of(name, {"split", "unsafe_split"})) {
    insert_before(node, "engine::check_pieces", inputs);
  } else if (by_number && is_one_of(name, {"chunk", "unsafe_chunk", "tensor_split"})) {
    insert_before(node, "engine::check_count", {inputs[1]});
  } else if (name == "unbind") {
    jit::WithInsertPoint here(&node);
    jit::Value* one = node.owningGraph()->insertConstant(int64_t{1});
    insert_before(node, "engine::check_pieces", {inputs.at(0), one, inputs.at(1)});
  }
}

// Refuses what may harm the server, and puts in what ends it.
void guard(jit::Block& block) {
  for (jit::Node* node : block.nodes()) {
    const c10::Symbol kind = node->kind();
    const std::string name = kind.toUnqualString();
    if (kind.is_aten() && (is_private(name) || is_harmful(name))) {
      throw CommandError("torch." + name + " is not available in scripts");
    }
    if (name == "execute" && kind.ns().toUnqualString() == std::string("redis") && node->inputs().size() < 2) {
      throw CommandError("redis.execute needs at least one argument after the command's name");
    }
    if (kind.is_aten() || name == "tolist") guard_pieces(*node, name);
    for (jit::Block* inner : node->blocks()) guard(*inner);
    if (kind == c10::prim::Loop) {
      node->blocks().at(0)->prependNode(new_check(*node, "engine::take_turn", {}));
    }
  }
}

constexpr int kNestingLimit = 16;

// The compiler takes twice as long for each bracket that a tuple is deeper nested.
void check_nesting(const std::string& source) {
  int depth = 0;
  for (size_t i = 0; i < source.size(); ++i) {
    const char each = source[i];
    if (each == '#') {
      i = std::min(source.find('\n', i), source.size());
    } else if (each == '"' || each == '\'') {
      const bool triple = source.compare(i, 3, std::string(3, each)) == 0;
      const std::string quote(triple ? 3 : 1, each);
      i += quote.size();
      while (i < source.size() && source.compare(i, quote.size(), quote) != 0) {
        i += source[i] == '\\' ? 2 : 1;
      }
      i += quote.size() - 1;
    } else if (each == '(' || each == '[' || each == '{') {
      if (++depth > kNestingLimit) {
        throw CommandError("ERR the script nests brackets deeper than " + std::to_string(kNestingLimit));
      }
    } else if (each == ')' || each == ']' || each == '}') {
      --depth;
    }
  }
}

constexpr size_t kNodeLimit = 100'000;

// Nodes of a function with all that it calls in place, as it will be run.
size_t inlined_size(
    jit::GraphFunction& function, std::unordered_map<const jit::Function*, size_t>& known);

size_t inlined_size(
    jit::Block& block, std::unordered_map<const jit::Function*, size_t>& known) {
  size_t size = 0;
  for (jit::Node* node : block.nodes()) {
    ++size;
    if (node->kind() == c10::prim::CallFunction) {
      const auto type = node->input(0)->type()->cast<c10::FunctionType>();
      if (auto* called = type ? jit::tryToGraphFunction(*type->function()) : nullptr) {
        size += inlined_size(*called, known);
      }
    }
    for (jit::Block* inner : node->blocks()) size += inlined_size(*inner, known);
    if (size > kNodeLimit) throw CommandError("the script is too large once its functions are in place");
  }
  return size;
}

size_t inlined_size(
    jit::GraphFunction& function, std::unordered_map<const jit::Function*, size_t>& known) {
  const auto found = known.find(&function);
  if (found != known.end()) return found->second;
  return known[&function] = inlined_size(*function.graph()->block(), known);
}

// ---------------------------------------------------------------- entry points

jit::Function* find_function(const Script& script, const std::string& name) {
  return script.compiled->find_function(c10::QualifiedName(name));
}

bool is_list_of(const c10::Argument& argument, const c10::TypePtr& element) {
  const auto list = argument.type()->cast<c10::ListType>();
  return list && *list->getElementType() == *element;
}

void check_entry_point(const Script& script, const std::string& name) {
  // A name such as "a..b" is none that a function can have, and torch would not look for it.
  const bool plain = !name.empty() && name.find('.') == std::string::npos;
  jit::Function* function = plain ? find_function(script, name) : nullptr;
  if (function == nullptr) {
    throw CommandError("Function " + name + " does not exist in the given script.");
  }
  const auto& arguments = function->getSchema().arguments();
  if (arguments.size() != 3) {
    throw CommandError(
        "Wrong number of inputs in function " + name + ". Expected 3 but was " +
        std::to_string(arguments.size()));
  }
  if (!is_list_of(arguments[0], c10::TensorType::get()) ||
      !is_list_of(arguments[1], c10::StringType::get()) ||
      !is_list_of(arguments[2], c10::StringType::get())) {
    throw CommandError(
        "Wrong inputs type in function " + name +
        ". Expected signature similar to: def " + name +
        "(tensors: List[Tensor], keys: List[str], args: List[str])");
  }
}

void compile_here(Script& script) {
  script.compiled = std::make_shared<jit::CompilationUnit>();
  const auto functions = script.compiled->define(
      std::nullopt, script.source, std::make_shared<Names>(), nullptr);
  std::unordered_map<const jit::Function*, size_t> sizes;
  for (jit::Function* function : functions) {
    function->ensure_defined();
    auto& graph_function = jit::toGraphFunction(*function);
    guard(*graph_function.graph()->block());
    inlined_size(graph_function, sizes);
  }
  for (const std::string& name : script.entry_points) check_entry_point(script, name);
}

// ---------------------------------------------------------------- running

bool is_entry_point(const Script& script, const std::string& name) {
  const auto& names = script.entry_points;
  return std::find(names.begin(), names.end(), name) != names.end();
}

template <typename Element>
c10::List<Element> list_of(const std::vector<Element>& elements, size_t from = 0) {
  c10::List<Element> list;
  for (size_t i = from; i < elements.size(); ++i) list.push_back(elements[i]);
  return list;
}

// The arguments of a function that is no entry point: the inputs in order, as far as they go.
jit::Stack positional(const jit::Function& function, const Call& call) {
  jit::Stack stack;
  size_t used = 0;
  for (const c10::Argument& argument : function.getSchema().arguments()) {
    if (argument.type()->kind() == c10::TypeKind::TensorType) {
      if (used == call.inputs.size()) {
        throw CommandError("Wrong number of inputs provided to function: " + call.function);
      }
      stack.emplace_back(call.inputs[used++]);
    } else if (is_list_of(argument, c10::TensorType::get())) {
      stack.emplace_back(list_of(call.inputs, used));
      used = call.inputs.size();
    } else {
      throw CommandError("Unsupported input type in function definition: " + call.function);
    }
  }
  return stack;
}

std::vector<at::Tensor> tensors_of(const c10::IValue& value, const Call& call) {
  std::vector<c10::IValue> values{value};
  if (value.isTuple()) values = value.toTupleRef().elements().vec();
  if (value.isList()) values = value.toListRef().vec();
  if (values.size() != call.outputs) {
    throw CommandError("Function returned unexpected number of outputs - " + call.function);
  }
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& each : values) {
    if (!each.isTensor() || !each.toTensor().defined()) {
      throw CommandError("Function returned non-tensor values" + call.function);
    }
    tensors.push_back(each.toTensor());
  }
  return tensors;
}

std::vector<at::Tensor> run_here(
    const Script& script, const Call& call, Commands& commands, Clock::time_point until) {
  if (script.compiled == nullptr) throw CommandError(script.broken);
  const bool plain = !call.function.empty() && call.function.find('.') == std::string::npos;
  jit::Function* function = plain ? find_function(script, call.function) : nullptr;
  if (function == nullptr) throw CommandError("Function does not exist: " + call.function);
  jit::Stack stack;
  if (is_entry_point(script, call.function)) {
    stack = {list_of(call.inputs), list_of(call.keys), list_of(call.arguments)};
  } else {
    stack = positional(*function, call);
  }
  Running run{&commands, until};
  running = &run;
  const std::unique_ptr<Running*, void (*)(Running**)> over(&running, [](Running** now) { *now = nullptr; });
  const c10::InferenceMode inference;
  function->run(stack);
  if (call.outputs == 0) return {};
  return tensors_of(jit::pop(stack), call);
}

}  // namespace

Script::~Script() {
  if (compiled == nullptr) return;
  // A deeply nested graph is taken apart as deeply as it was built.
  on_deep_stack([gone = std::move(compiled)]() mutable { gone.reset(); });
}

std::vector<at::Tensor> Script::run(const Call& call, Commands& commands, Clock::time_point until) {
  const auto began = Clock::now();
  const auto count = [&](bool failed) {
    const auto took = std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - began);
    statistics.microseconds += took.count();
    statistics.calls += 1;
    statistics.errors += failed ? 1 : 0;
  };
  try {
    auto outputs = run_here(*this, call, commands, until);
    count(false);
    return outputs;
  } catch (const CommandError&) {
    count(true);
    throw;
  } catch (const std::exception& error) {
    count(true);
    throw CommandError(text_of_error(error));
  }
}

void compile(Script& script) {
  if (script.source.size() > kSourceLimit) {
    throw CommandError("ERR the script's source is longer than " + std::to_string(kSourceLimit) + " bytes");
  }
  check_nesting(script.source);
  std::exception_ptr failed;
  on_deep_stack([&] {
    try {
      compile_here(script);
    } catch (...) {
      failed = std::current_exception();
    }
  });
  if (!failed) return;
  try {
    std::rethrow_exception(failed);
  } catch (const CommandError&) {
    throw;
  } catch (const std::exception& error) {
    throw CommandError(text_of_error(error));
  }
}

void compile_or_break(Script& script) {
  try {
    compile(script);
  } catch (const CommandError& error) {
    script.compiled = nullptr;
    script.broken = error.what();
  }
}

std::string text_of_error(const std::exception& error) {
  if (const auto* known = dynamic_cast<const c10::Error*>(&error)) {
    return known->what_without_backtrace();
  }
  return error.what();
}

void prepare_torch() {
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

}  // namespace engine
