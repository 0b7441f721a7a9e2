#include "scripts.h"

#include <c10/core/InferenceMode.h>
#include <torch/csrc/jit/api/compilation_unit.h>
#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/frontend/resolver.h>

#include "deep_stack.h"
#include "graphs.h"
#include "operators.h"

namespace engine {
namespace {

namespace jit = torch::jit;

// ---------------------------------------------------------------- compiling

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
      std::nullopt, script.source, operators::names(), nullptr);
  graphs::hold(functions);
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
  const operators::Run run(commands, until);
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
  graphs::check_nesting(script.source);
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

}  // namespace engine
