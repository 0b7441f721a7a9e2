#include "replies.h"

#include <algorithm>
#include <type_traits>

namespace engine {
namespace {

template <typename Element>
void reply_with_elements(server::Context* context, const StoredTensor& tensor) {
  const auto* from = static_cast<const Element*>(tensor.data.const_data_ptr());
  const int64_t count = tensor.data.numel();
  server::ReplyWithArray(context, count);
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (std::is_floating_point_v<Element>) {
      server::ReplyWithDouble(context, from[i]);
    } else {
      server::ReplyWithLongLong(context, from[i]);
    }
  }
}

void reply_with_strings(server::Context* context, const StoredTensor& tensor) {
  std::string_view bytes = tensor.bytes();
  server::ReplyWithArray(context, std::count(bytes.begin(), bytes.end(), '\0'));
  while (!bytes.empty()) {
    const size_t end = bytes.find('\0');
    server::ReplyWithStringBuffer(context, bytes.data(), end);
    bytes.remove_prefix(end + 1);
  }
}

void reply_with_values(server::Context* context, const StoredTensor& tensor) {
  switch (tensor.type) {
    case Type::kFloat: return reply_with_elements<float>(context, tensor);
    case Type::kDouble: return reply_with_elements<double>(context, tensor);
    case Type::kInt8: return reply_with_elements<int8_t>(context, tensor);
    case Type::kInt16: return reply_with_elements<int16_t>(context, tensor);
    case Type::kInt32: return reply_with_elements<int32_t>(context, tensor);
    case Type::kInt64: return reply_with_elements<int64_t>(context, tensor);
    case Type::kUInt8: return reply_with_elements<uint8_t>(context, tensor);
    case Type::kUInt16: return reply_with_elements<uint16_t>(context, tensor);
    case Type::kBool: return reply_with_elements<bool>(context, tensor);
    case Type::kString: return reply_with_strings(context, tensor);
  }
}

void reply_with_blob(server::Context* context, const StoredTensor& tensor) {
  const std::string_view bytes = tensor.bytes();
  server::ReplyWithStringBuffer(context, bytes.data(), bytes.size());
}

}  // namespace

void reply_with_text(server::Context* context, std::string_view text) {
  server::ReplyWithStringBuffer(context, text.data(), text.size());
}

Format read_format(Arguments arguments) {
  Format format;
  if (arguments.empty()) return {.meta = true, .blob = true};
  while (!arguments.empty()) {
    if (arguments.accept("META")) {
      format.meta = true;
    } else if (arguments.accept("BLOB")) {
      format.blob = true;
    } else if (arguments.accept("VALUES")) {
      format.values = true;
    } else {
      throw CommandError("ERR unsupported data format");
    }
  }
  if (format.blob && format.values) throw CommandError("ERR both BLOB and VALUES specified");
  return format;
}

void reply_with(server::Context* context, const StoredTensor& tensor, Format format) {
  if (!format.meta) {
    return format.blob ? reply_with_blob(context, tensor) : reply_with_values(context, tensor);
  }
  server::ReplyWithArray(context, format.blob || format.values ? 6 : 4);
  reply_with_text(context, "dtype");
  reply_with_text(context, name_of(tensor.type));
  reply_with_text(context, "shape");
  server::ReplyWithArray(context, static_cast<long>(tensor.shape.size()));
  for (const int64_t dim : tensor.shape) server::ReplyWithLongLong(context, dim);
  if (format.blob) {
    reply_with_text(context, "blob");
    reply_with_blob(context, tensor);
  } else if (format.values) {
    reply_with_text(context, "values");
    reply_with_values(context, tensor);
  }
}

}  // namespace engine
