#include "script_keys.h"

#include <map>

namespace engine::keys {
namespace {

constexpr int kEncoding = 1;
server::Type* script_type = nullptr;

using Value = std::shared_ptr<Script>;

// By database and name. Only the main thread, or who holds the server's lock, comes here.
std::map<std::pair<int, std::string>, std::weak_ptr<Script>>& known_scripts() {
  static std::map<std::pair<int, std::string>, std::weak_ptr<Script>> known;
  return known;
}

std::pair<int, std::string> known_name(server::Context* context, server::String* name) {
  return {server::GetSelectedDb(context), std::string(text_of(name))};
}

Value* new_value(std::shared_ptr<Script> script) {
  script->is_stored = true;
  return new Value(std::move(script));
}

// The script of an entry there, if it is still at a key; or null.
std::shared_ptr<Script> stored(const std::weak_ptr<Script>& known) {
  std::shared_ptr<Script> script = known.lock();
  return script != nullptr && script->is_stored ? script : nullptr;
}

// Drops the entries of scripts that went with their keys, once these may be the most.
void forget_some() {
  static size_t limit = 64;
  if (known_scripts().size() < limit) return;
  std::erase_if(known_scripts(), [](const auto& each) { return stored(each.second) == nullptr; });
  limit = 2 * known_scripts().size() + 64;
}

// At once, though the keys may be released later, by another thread.
void on_flush(server::Context*, server::Event, uint64_t, void* told) {
  const int database = static_cast<server::Flushed*>(told)->database;
  std::erase_if(known_scripts(), [&](const auto& each) {
    return database < 0 || each.first.first == database;
  });
}

void save_text(server::Stream* stream, const std::string& text) {
  server::SaveStringBuffer(stream, text.data(), text.size());
}

bool load_text(server::Stream* stream, std::string& text) {
  size_t length = 0;
  char* bytes = server::LoadStringBuffer(stream, &length);
  if (bytes == nullptr) return false;
  text.assign(bytes, length);
  server::Free(bytes);
  return true;
}

void save(server::Stream* stream, void* value) {
  const Script& script = **static_cast<Value*>(value);
  save_text(stream, script.device);
  save_text(stream, script.tag);
  save_text(stream, script.source);
  server::SaveUnsigned(stream, script.entry_points.size());
  for (const std::string& name : script.entry_points) save_text(stream, name);
}

void* load(server::Stream* stream, int encoding) {
  if (encoding != kEncoding) return nullptr;
  auto script = std::make_shared<Script>();
  if (!load_text(stream, script->device) || !load_text(stream, script->tag) ||
      !load_text(stream, script->source)) {
    return nullptr;
  }
  const uint64_t count = server::LoadUnsigned(stream);
  for (uint64_t i = 0; i < count; ++i) {
    std::string name;
    if (server::IsIOError(stream) || !load_text(stream, name)) return nullptr;
    script->entry_points.push_back(std::move(name));
  }
  compile_or_break(*script);
  if (const server::String* name = server::GetKeyNameFromIO(stream)) {
    const int database = server::GetDbIdFromIO != nullptr ? server::GetDbIdFromIO(stream) : 0;
    known_scripts()[{database, std::string(text_of(name))}] = script;
  }
  return new_value(std::move(script));
}

// AI.SCRIPTSTORE, key, device, TAG, tag, ENTRY_POINTS, their number and names, SOURCE, source.
constexpr const char* kStoreFormat = "sbcbclvcb";

void rewrite(server::Stream* stream, server::String* key, void* value) {
  const Script& script = **static_cast<Value*>(value);
  Words names(nullptr, script.entry_points);
  server::EmitAOF(
      stream, "AI.SCRIPTSTORE", kStoreFormat, key, script.device.data(), script.device.size(),
      "TAG", script.tag.data(), script.tag.size(), "ENTRY_POINTS",
      static_cast<long long>(names.count()), names.all(), names.count(), "SOURCE",
      script.source.data(), script.source.size());
}

size_t memory(const void* value) {
  const Script& script = **static_cast<const Value*>(value);
  return sizeof(Script) + script.source.size() + script.tag.size();
}

void release(void* value) {
  const std::unique_ptr<Value> owned(static_cast<Value*>(value));
  (*owned)->is_stored = false;
}

// The value at a key, or null if it is free. Throws CommandError if it is of another type.
Value* value_at(server::Key* key) {
  if (key == nullptr || server::KeyType(key) == server::kKeyEmpty) return nullptr;
  if (server::ModuleTypeGetType(key) != script_type) throw CommandError(kWrongType);
  return static_cast<Value*>(server::ModuleTypeGetValue(key));
}

using OpenKey = std::unique_ptr<server::Key, void (*)(server::Key*)>;

OpenKey open_key(server::Context* context, server::String* name, int mode) {
  return {server::OpenKey(context, name, mode), [](server::Key* key) { server::CloseKey(key); }};
}

}  // namespace

void register_script_type(server::Context* context) {
  static server::TypeMethods methods{
      .load = load, .save = save, .rewrite = rewrite, .memory = memory, .release = release};
  script_type = server::CreateDataType(context, "AI_SCRIPT", kEncoding, &methods);
  server::SubscribeToServerEvent(context, server::kFlush, on_flush);
}

std::shared_ptr<Script> get_script(server::Context* context, server::String* name) {
  const OpenKey key = open_key(context, name, server::kRead);
  const Value* value = value_at(key.get());
  if (value == nullptr) throw CommandError("ERR script key is empty");
  return *value;
}

void set_script(server::Context* context, server::String* name, std::shared_ptr<Script> script) {
  const OpenKey key = open_key(context, name, server::kRead | server::kWrite);
  value_at(key.get());
  forget_some();
  known_scripts()[known_name(context, name)] = script;
  server::ModuleTypeSetValue(key.get(), script_type, new_value(std::move(script)));
}

void replicate_script(server::Context* context, server::String* name, const Script& script) {
  Words names(nullptr, script.entry_points);
  server::Replicate(
      context, "AI.SCRIPTSTORE", kStoreFormat, name, script.device.data(), script.device.size(),
      "TAG", script.tag.data(), script.tag.size(), "ENTRY_POINTS",
      static_cast<long long>(names.count()), names.all(), names.count(), "SOURCE",
      script.source.data(), script.source.size());
}

void delete_script(server::Context* context, server::String* name) {
  const OpenKey key = open_key(context, name, server::kRead | server::kWrite);
  if (value_at(key.get()) == nullptr) throw CommandError("ERR script key is empty");
  known_scripts().erase(known_name(context, name));
  server::DeleteKey(key.get());
}

std::shared_ptr<Script> stored_as(server::Context* context, server::String* name) {
  const auto found = known_scripts().find(known_name(context, name));
  return found == known_scripts().end() ? nullptr : stored(found->second);
}

std::vector<std::pair<std::string, std::string>> all_scripts(server::Context* context) {
  std::vector<std::pair<std::string, std::string>> all;
  auto& known = known_scripts();
  for (auto each = known.begin(); each != known.end();) {
    const std::shared_ptr<Script> script = stored(each->second);
    if (script != nullptr && each->first.first == server::GetSelectedDb(context)) {
      all.emplace_back(each->first.second, script->tag);
    }
    each = script == nullptr ? known.erase(each) : std::next(each);
  }
  return all;
}

}  // namespace engine::keys
