#include "tensors.h"

#include <ATen/ops/_lazy_clone.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/COW.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>

namespace engine {
namespace {

struct TypeFacts {
  const char* name;
  at::ScalarType scalar;
  size_t size;  // bytes of an element; 0: they differ
};

constexpr std::array<TypeFacts, 10> kTypes{{
    {"FLOAT", at::kFloat, 4},
    {"DOUBLE", at::kDouble, 8},
    {"INT8", at::kChar, 1},
    {"INT16", at::kShort, 2},
    {"INT32", at::kInt, 4},
    {"INT64", at::kLong, 8},
    {"UINT8", at::kByte, 1},
    {"UINT16", at::kUInt16, 2},
    {"BOOL", at::kBool, 1},
    {"STRING", at::kByte, 0},
}};

const TypeFacts& facts_of(Type type) { return kTypes[static_cast<size_t>(type)]; }

Type read_type(std::string_view word) {
  for (size_t i = 0; i < kTypes.size(); ++i) {
    if (same_word(word, kTypes[i].name)) return static_cast<Type>(i);
  }
  throw CommandError("ERR invalid data type");
}

struct Shape {
  std::vector<int64_t> dims;
  size_t elements = 1;
};

// Dimensions are at least `least`, 0 or 1.
Shape shape_of(std::vector<int64_t> dims, int64_t least) {
  const CommandError invalid("ERR invalid or negative value found in tensor shape");
  Shape shape{.dims = std::move(dims)};
  for (const int64_t dim : shape.dims) {
    if (dim < least) throw invalid;
    if (__builtin_mul_overflow(shape.elements, static_cast<size_t>(dim), &shape.elements) ||
        shape.elements > static_cast<size_t>(std::numeric_limits<int64_t>::max()) / 8) {
      throw invalid;
    }
  }
  return shape;
}

Shape read_shape(Arguments& arguments, bool may_be_empty) {
  std::vector<int64_t> dims;
  while (!arguments.empty() && !same_word(arguments.peek(), "BLOB") &&
         !same_word(arguments.peek(), "VALUES")) {
    dims.push_back(integer_of(text_of(arguments.next())).value_or(-1));
  }
  return shape_of(std::move(dims), may_be_empty ? 0 : 1);
}

at::Tensor new_bytes(size_t bytes) {
  return at::empty({static_cast<int64_t>(bytes)}, at::kByte);
}

// Uninitialised for a type of fixed size.
at::Tensor new_data(Type type, const Shape& shape) {
  return at::empty(shape.dims, facts_of(type).scalar);
}

at::Tensor read_blob(Type type, const Shape& shape, std::string_view blob) {
  const TypeFacts& facts = facts_of(type);
  if (type == Type::kString) {
    const auto ends = static_cast<size_t>(std::count(blob.begin(), blob.end(), '\0'));
    if (ends != shape.elements || (!blob.empty() && blob.back() != '\0')) {
      throw CommandError("ERR Number of string elements in data blob does not match tensor length");
    }
  } else if (blob.size() != shape.elements * facts.size) {
    throw CommandError("ERR data length does not match tensor shape and type");
  }
  if (type == Type::kBool &&
      std::any_of(blob.begin(), blob.end(), [](char each) { return each != 0 && each != 1; })) {
    throw CommandError("ERR BOOL tensor elements must be 0 or 1");
  }
  at::Tensor data = type == Type::kString ? new_bytes(blob.size()) : new_data(type, shape);
  std::memcpy(data.mutable_data_ptr(), blob.data(), blob.size());
  return data;
}

template <typename Element>
Element read_element(std::string_view word) {
  const CommandError invalid("ERR invalid value");
  if constexpr (std::is_floating_point_v<Element>) {
    double value = 0;
    if (!word.empty() && word.front() == '+') word.remove_prefix(1);
    const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
    if (error != std::errc() || end != word.data() + word.size() || std::isnan(value)) throw invalid;
    if (std::isfinite(value) && std::abs(value) > std::numeric_limits<Element>::max()) throw invalid;
    return static_cast<Element>(value);
  } else {
    const auto value = integer_of(word);
    if (!value || *value < static_cast<int64_t>(std::numeric_limits<Element>::min()) ||
        (sizeof(Element) < 8 && *value > static_cast<int64_t>(std::numeric_limits<Element>::max()))) {
      throw invalid;
    }
    return static_cast<Element>(*value);
  }
}

template <typename Element>
void read_elements(Arguments words, at::Tensor& data) {
  for (auto* to = static_cast<Element*>(data.mutable_data_ptr()); !words.empty(); ++to) {
    *to = read_element<Element>(text_of(words.next()));
  }
}

at::Tensor read_values(Type type, const Shape& shape, Arguments words) {
  if (words.left() != shape.elements) {
    throw CommandError("ERR wrong number of values was given in 'AI.TENSORSET' command");
  }
  if (type == Type::kString) {
    std::string all;
    while (!words.empty()) {
      const std::string_view value = text_of(words.next());
      if (value.find('\0') != std::string_view::npos) {
        throw CommandError("ERR C-string value contains null character");
      }
      all.append(value).push_back('\0');
    }
    at::Tensor data = new_bytes(all.size());
    std::memcpy(data.mutable_data_ptr(), all.data(), all.size());
    return data;
  }
  at::Tensor data = new_data(type, shape);
  switch (type) {
    case Type::kFloat: read_elements<float>(words, data); break;
    case Type::kDouble: read_elements<double>(words, data); break;
    case Type::kInt8: read_elements<int8_t>(words, data); break;
    case Type::kInt16: read_elements<int16_t>(words, data); break;
    case Type::kInt32: read_elements<int32_t>(words, data); break;
    case Type::kInt64: read_elements<int64_t>(words, data); break;
    case Type::kUInt8: read_elements<uint8_t>(words, data); break;
    case Type::kUInt16: read_elements<uint16_t>(words, data); break;
    case Type::kBool: read_elements<bool>(words, data); break;
    case Type::kString: break;
  }
  return data;
}

}  // namespace

const char* name_of(Type type) { return facts_of(type).name; }

std::string_view StoredTensor::bytes() const {
  // No memory is no address; Redis 6.2 reads from the address of nothing all the same.
  if (data.nbytes() == 0) return "";
  return {static_cast<const char*>(data.const_data_ptr()), data.nbytes()};
}

StoredTensor read_tensor(Arguments arguments, bool may_be_empty) {
  StoredTensor tensor;
  tensor.type = read_type(text_of(arguments.next()));
  Shape shape = read_shape(arguments, may_be_empty);
  if (arguments.empty()) {
    if (tensor.type == Type::kString) {
      tensor.data = at::zeros({static_cast<int64_t>(shape.elements)}, at::kByte);
    } else {
      tensor.data = at::zeros(shape.dims, facts_of(tensor.type).scalar);
    }
  } else if (arguments.accept("BLOB")) {
    if (arguments.left() != 1) {
      throw CommandError(
          "ERR a single binary string should come after the BLOB argument in 'AI.TENSORSET' command");
    }
    const std::string_view blob = text_of(arguments.next());
    if (blob.empty() && shape.elements > 0) {
      throw CommandError("ERR data length does not match tensor shape and type");
    }
    tensor.data = read_blob(tensor.type, shape, blob);
  } else {
    arguments.next();
    tensor.data = read_values(tensor.type, shape, arguments);
  }
  tensor.shape = std::move(shape.dims);
  return tensor;
}

StoredTensor restore_tensor(Type type, std::vector<int64_t> dims, std::string_view bytes) {
  Shape shape = shape_of(std::move(dims), 0);
  at::Tensor data = read_blob(type, shape, bytes);
  return {type, std::move(shape.dims), std::move(data)};
}

at::Tensor lend(const StoredTensor& tensor) {
  if (tensor.type == Type::kUInt16) throw CommandError("Unsupported kUInt bits 16");
  if (tensor.type == Type::kString) throw CommandError("Unsupported code 7");
  return at::_lazy_clone(tensor.data);
}

StoredTensor adopt(at::Tensor tensor) {
  if (tensor.layout() != at::kStrided || !tensor.device().is_cpu()) {
    throw CommandError("only dense tensors on the CPU can be stored");
  }
  StoredTensor stored;
  const auto found = std::find_if(kTypes.begin(), kTypes.end(), [&](const TypeFacts& facts) {
    return facts.scalar == tensor.scalar_type();
  });
  if (found == kTypes.end()) {
    throw CommandError(std::string(c10::toString(tensor.scalar_type())) + " is not supported by dlpack");
  }
  stored.type = static_cast<Type>(found - kTypes.begin());
  tensor = tensor.resolve_conj().resolve_neg().contiguous();
  const c10::Storage& storage = tensor.storage();
  const bool shared = c10::impl::cow::is_cow_data_ptr(storage.data_ptr()) || storage.use_count() > 1;
  if (shared || storage.nbytes() != tensor.nbytes()) {
    tensor = tensor.clone(at::MemoryFormat::Contiguous);
  }
  stored.shape = tensor.sizes().vec();
  stored.data = std::move(tensor);
  return stored;
}

}  // namespace engine
