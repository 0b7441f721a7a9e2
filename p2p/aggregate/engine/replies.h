// What replies are made of beyond the server's own: texts, and tensors as AI.TENSORGET shows them.
#pragma once

#include <string_view>

#include "arguments.h"
#include "module_api.h"
#include "tensors.h"

namespace engine {

void reply_with_text(server::Context* context, std::string_view text);

// How AI.TENSORGET shows a tensor.
struct Format {
  bool meta = false;
  bool blob = false;
  bool values = false;
};

// Reads `[META] [BLOB | VALUES]`. Throws CommandError.
Format read_format(Arguments arguments);

void reply_with(server::Context* context, const StoredTensor& tensor, Format format);

}  // namespace engine
