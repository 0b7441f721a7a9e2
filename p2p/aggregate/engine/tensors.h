// Tensors as values of keys: type, shape and bytes; how commands state and scripts get them.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "arguments.h"
#include "module_api.h"

namespace engine {

// As AI.TENSORSET names them.
enum class Type : uint8_t { kFloat, kDouble, kInt8, kInt16, kInt32, kInt64, kUInt8, kUInt16, kBool, kString };

const char* name_of(Type type);

// Immutable once it is a key's value: a command that changes a key gives it another value.
struct StoredTensor {
  Type type = Type::kFloat;
  std::vector<int64_t> shape;
  at::Tensor data;  // contiguous; of a STRING: its bytes, each element ended by a NUL

  std::string_view bytes() const;
};

// Reads `type [dim …] [BLOB data | VALUES v …]`. Throws CommandError; c10::Error if memory is short.
// A client cannot set a tensor without elements, but a script's output may be one: then the log and
// the replicas have to.
StoredTensor read_tensor(Arguments arguments, bool may_be_empty);

// The tensor of this type, this shape and these bytes. Throws as `read_tensor`.
StoredTensor restore_tensor(Type type, std::vector<int64_t> shape, std::string_view bytes);

// What a script gets: a tensor of its own, which shares the bytes until it writes to them.
// Throws CommandError for a type that a script cannot take.
at::Tensor lend(const StoredTensor& tensor);

// What a script gave, with bytes that nothing else can change. Throws CommandError for a type that
// no key can have.
StoredTensor adopt(at::Tensor tensor);

namespace keys {

void register_tensor_type(server::Context* context);

// The tensor at a key. Throws CommandError: no key, or one of another type.
const StoredTensor& get_tensor(server::Context* context, server::String* name);

// Whether a tensor may be stored there: the key is free or a tensor's.
bool can_set_tensor(server::Context* context, server::String* name);

// Stores it. The key must be one for which `can_set_tensor`.
void set_tensor(server::Context* context, server::String* name, StoredTensor tensor);

// Tells the log and the replicas what a command of another name has stored at a key.
void replicate_tensor(server::Context* context, server::String* name, const StoredTensor& tensor);

}  // namespace keys
}  // namespace engine
