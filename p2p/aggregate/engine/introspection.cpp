#include "introspection.h"

#include <torch/version.h>

#include <memory>
#include <string>

#include "memory.h"
#include "replies.h"
#include "script_keys.h"
#include "scripts.h"

namespace engine::introspection {
namespace {

constexpr long long kModelChunkBytes = 535822336;

// Kept for clients that set it; there is nothing to be found under it.
std::string& backends_path() {
  static std::string path;
  return path;
}

long long model_chunk_bytes = kModelChunkBytes;

void config_get(server::Context* context, Arguments words) {
  if (words.accept("BACKENDSPATH")) {
    reply_with_text(context, backends_path());
  } else if (words.accept("MODEL_CHUNK_SIZE")) {
    server::ReplyWithLongLong(context, model_chunk_bytes);
  } else {
    server::ReplyWithNull(context);
  }
}

}  // namespace

void info(server::Context* context, Arguments words) {
  if (words.left() < 1 || words.left() > 2) throw ArityError();
  server::String* name = words.next();
  const std::shared_ptr<Script> script = keys::stored_as(context, name);
  if (script == nullptr) throw CommandError("ERR cannot find run info for key");
  Statistics& statistics = script->statistics;
  if (words.accept("RESETSTAT")) {
    statistics.microseconds = statistics.calls = statistics.errors = 0;
    server::ReplyWithSimpleString(context, "OK");
    return;
  }
  const auto text_field = [&](const char* field, const std::string& value) {
    reply_with_text(context, field);
    reply_with_text(context, value);
  };
  const auto number_field = [&](const char* field, long long value) {
    reply_with_text(context, field);
    server::ReplyWithLongLong(context, value);
  };
  server::ReplyWithArray(context, 18);
  text_field("key", std::string(text_of(name)));
  text_field("type", "SCRIPT");
  text_field("backend", "TORCH");
  text_field("device", script->device);
  text_field("tag", script->tag);
  number_field("duration", statistics.microseconds);
  number_field("samples", -1);
  number_field("calls", statistics.calls);
  number_field("errors", statistics.errors);
}

void config(server::Context* context, Arguments words) {
  if (words.empty()) throw ArityError();
  if (words.accept("GET")) {
    if (words.empty()) throw ArityError();
    return config_get(context, words);
  }
  if (words.accept("BACKENDSPATH")) {
    if (words.empty()) throw CommandError("ERR BACKENDSPATH: missing path argument");
    backends_path() = text_of(words.next());
  } else if (words.accept("MODEL_CHUNK_SIZE")) {
    if (words.empty()) throw CommandError("ERR MODEL_CHUNK_SIZE: missing chunk size");
    const auto bytes = integer_of(text_of(words.next()));
    if (!bytes || *bytes <= 0) throw CommandError("ERR MODEL_CHUNK_SIZE: invalid chunk size");
    model_chunk_bytes = *bytes;
  } else if (words.accept("LOADBACKEND")) {
    if (words.left() < 2) throw ArityError();
    if (!same_word(words.peek(), "TORCH")) throw CommandError("ERR unsupported backend");
    throw CommandError("ERR error loading backend");  // torch is there already
  } else {
    throw CommandError("ERR unsupported subcommand");
  }
  server::ReplyWithSimpleString(context, "OK");
}

void script_scan(server::Context* context, Arguments words) {
  if (!words.empty()) throw ArityError();
  const auto scripts = keys::all_scripts(context);
  server::ReplyWithArray(context, static_cast<long>(scripts.size()));
  for (const auto& [name, tag] : scripts) {
    server::ReplyWithArray(context, 2);
    reply_with_text(context, name);
    reply_with_text(context, tag);
  }
}

void model_scan(server::Context* context, Arguments words) {
  if (!words.empty()) throw ArityError();
  server::ReplyWithArray(context, 0);
}

void module_info(server::Info* info, int) {
  server::InfoAddSection(info, "backends_info");
  server::InfoAddFieldCString(info, "Torch_version", TORCH_VERSION);
  server::InfoAddSection(info, "engine");
  server::InfoAddFieldCString(info, "name", "mayfly");
  server::InfoAddFieldULongLong(info, "tensor_bytes", memory::used_bytes());
  server::InfoAddFieldULongLong(info, "kept_bytes", memory::kept_bytes());
}

}  // namespace engine::introspection
