#include "graphs.h"

#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/ir/ir.h>

#include <iterator>
#include <sstream>
#include <unordered_map>
#include <unordered_set>

#include "allowed.h"
#include "arguments.h"

namespace engine::graphs {
namespace {

namespace jit = torch::jit;

constexpr int kNestingLimit = 16;

bool is_allowed(const std::string& name) {
  static const std::unordered_set<std::string> allowed = [] {
    std::istringstream words(kAllowed);
    return std::unordered_set<std::string>(
        std::istream_iterator<std::string>(words), std::istream_iterator<std::string>());
  }();
  return allowed.contains(name);
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
    if (kind.is_aten() && !is_allowed(name)) {
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

}  // namespace

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

void hold(const std::vector<jit::Function*>& functions) {
  std::unordered_map<const jit::Function*, size_t> sizes;
  for (jit::Function* function : functions) {
    function->ensure_defined();
    auto& graph_function = jit::toGraphFunction(*function);
    guard(*graph_function.graph()->block());
    inlined_size(graph_function, sizes);
  }
}

}  // namespace engine::graphs
