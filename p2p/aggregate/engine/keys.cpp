// Keys that hold tensors: in the database, its files, its log and its replicas.
#include <vector>

#include "tensors.h"

namespace engine::keys {
namespace {

constexpr int kEncoding = 1;
server::Type* tensor_type = nullptr;

// Closes the key when it goes.
class OpenKey {
 public:
  OpenKey(server::Context* context, server::String* name, int mode)
      : key_(server::OpenKey(context, name, mode)) {}
  ~OpenKey() {
    if (key_ != nullptr) server::CloseKey(key_);
  }
  OpenKey(const OpenKey&) = delete;
  OpenKey& operator=(const OpenKey&) = delete;

  server::Key* get() const { return key_; }
  bool is_free() const { return key_ == nullptr || server::KeyType(key_) == server::kKeyEmpty; }
  bool is_tensor() const { return server::ModuleTypeGetType(key_) == tensor_type; }

 private:
  server::Key* key_;
};

// The words between a tensor's type and its bytes.
std::vector<std::string> dimensions_of(const StoredTensor& tensor) {
  std::vector<std::string> words;
  for (const int64_t dim : tensor.shape) words.push_back(std::to_string(dim));
  return words;
}

bool anyone_listens(server::Context* context) {
  if ((server::GetContextFlags(context) & server::kAppendOnly) != 0) return true;
  server::ServerInfo* info = server::GetServerInfo(context, "replication");
  int error = 0;
  const long long active = server::ServerInfoGetFieldSigned(info, "repl_backlog_active", &error);
  server::FreeServerInfo(context, info);
  return error != 0 || active != 0;
}

void save(server::Stream* stream, void* value) {
  const auto* tensor = static_cast<const StoredTensor*>(value);
  server::SaveUnsigned(stream, static_cast<uint64_t>(tensor->type));
  server::SaveUnsigned(stream, tensor->shape.size());
  for (const int64_t dim : tensor->shape) server::SaveUnsigned(stream, static_cast<uint64_t>(dim));
  const std::string_view bytes = tensor->bytes();
  server::SaveStringBuffer(stream, bytes.data(), bytes.size());
}

// Null, which the server reports, when the file does not hold what `save` writes.
void* load(server::Stream* stream, int encoding) {
  if (encoding != kEncoding) return nullptr;
  const uint64_t type = server::LoadUnsigned(stream);
  const uint64_t dims = server::LoadUnsigned(stream);
  if (server::IsIOError(stream) || type > static_cast<uint64_t>(Type::kString)) return nullptr;
  std::vector<int64_t> shape;
  for (uint64_t i = 0; i < dims; ++i) {
    shape.push_back(static_cast<int64_t>(server::LoadUnsigned(stream)));
    if (server::IsIOError(stream)) return nullptr;
  }
  size_t length = 0;
  char* bytes = server::LoadStringBuffer(stream, &length);
  if (bytes == nullptr) return nullptr;
  void* loaded = nullptr;
  try {
    loaded = new StoredTensor(restore_tensor(static_cast<Type>(type), std::move(shape), {bytes, length}));
  } catch (const std::exception& error) {
    server::Log(nullptr, "warning", "a tensor cannot be loaded: %s", error.what());
  }
  server::Free(bytes);
  return loaded;
}

void rewrite(server::Stream* stream, server::String* key, void* value) {
  const auto* tensor = static_cast<const StoredTensor*>(value);
  Words dims(nullptr, dimensions_of(*tensor));
  const std::string_view bytes = tensor->bytes();
  server::EmitAOF(
      stream, "AI.TENSORSET", "scvcb", key, name_of(tensor->type), dims.all(), dims.count(),
      "BLOB", bytes.data(), bytes.size());
}

size_t memory(const void* value) {
  const auto* tensor = static_cast<const StoredTensor*>(value);
  return sizeof(StoredTensor) + tensor->shape.size() * sizeof(int64_t) + tensor->data.nbytes();
}

void release(void* value) { delete static_cast<StoredTensor*>(value); }

}  // namespace

void register_tensor_type(server::Context* context) {
  static server::TypeMethods methods{
      .load = load, .save = save, .rewrite = rewrite, .memory = memory, .release = release};
  tensor_type = server::CreateDataType(context, "AI_TENSOR", kEncoding, &methods);
}

const StoredTensor& get_tensor(server::Context* context, server::String* name) {
  const OpenKey key(context, name, server::kRead);
  if (key.is_free()) throw CommandError("ERR tensor key is empty or in a different shard");
  if (!key.is_tensor()) throw CommandError(kWrongType);
  return *static_cast<StoredTensor*>(server::ModuleTypeGetValue(key.get()));
}

bool can_set_tensor(server::Context* context, server::String* name) {
  const OpenKey key(context, name, server::kRead);
  return key.is_free() || key.is_tensor();
}

void set_tensor(server::Context* context, server::String* name, StoredTensor tensor) {
  const OpenKey key(context, name, server::kRead | server::kWrite);
  server::ModuleTypeSetValue(key.get(), tensor_type, new StoredTensor(std::move(tensor)));
}

void replicate_tensor(server::Context* context, server::String* name, const StoredTensor& tensor) {
  if (!anyone_listens(context)) {
    // A copy of the bytes would be made for nobody; all that is wanted is that a save is due.
    server::Replicate(context, "PING", "");
    return;
  }
  Words dims(context, dimensions_of(tensor));
  const std::string_view bytes = tensor.bytes();
  server::Replicate(
      context, "AI.TENSORSET", "scvcb", name, name_of(tensor.type), dims.all(), dims.count(),
      "BLOB", bytes.data(), bytes.size());
}

}  // namespace engine::keys
