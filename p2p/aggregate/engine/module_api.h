// The functions of the server's module API that the engine uses, as the server names them.
//
// A server hands a module one function that looks up the others by name. Those marked optional came
// with later servers (their value is null on an older one); all the rest are there since 6.2.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {
struct RedisModuleCtx;
struct RedisModuleString;
struct RedisModuleKey;
struct RedisModuleIO;
struct RedisModuleType;
struct RedisModuleDigest;
struct RedisModuleBlockedClient;
struct RedisModuleCallReply;
struct RedisModuleInfoCtx;
struct RedisModuleServerInfoData;
struct RedisModuleCommand;
struct RedisModuleUser;
}

namespace server {

using Context = RedisModuleCtx;
using String = RedisModuleString;
using Key = RedisModuleKey;
using Stream = RedisModuleIO;
using Type = RedisModuleType;
using BlockedClient = RedisModuleBlockedClient;
using Reply = RedisModuleCallReply;
using Info = RedisModuleInfoCtx;
using ServerInfo = RedisModuleServerInfoData;
using Command = RedisModuleCommand;
using User = RedisModuleUser;

using CommandFunction = int (*)(Context*, String**, int);

constexpr int kOk = 0;
constexpr int kError = 1;
constexpr int kApiVersion = 1;

constexpr int kRead = 1 << 0;
constexpr int kWrite = 1 << 1;

constexpr int kKeyEmpty = 0;
constexpr int kKeyModule = 6;

constexpr int kInScript = 1 << 0;       // called by EVAL
constexpr int kInTransaction = 1 << 1;  // called by EXEC
constexpr int kReplica = 1 << 3;
constexpr int kAppendOnly = 1 << 6;
constexpr int kFromMaster = 1 << 12;
constexpr int kLoading = 1 << 13;
constexpr int kMustNotBlock = 1 << 21;

constexpr int kOptionHandlesIoErrors = 1 << 0;

// What happens to the server, and what its subscribers are told of a flush.
struct Event {
  uint64_t id;
  uint64_t version;
};
struct Flushed {
  uint64_t version;
  int32_t is_synchronous;
  int32_t database;  // -1: all
};
constexpr Event kFlush{2, 1};
constexpr Event kShutdown{5, 1};
using EventFunction = void (*)(Context*, Event, uint64_t part, void* told);

enum ReplyKind {
  kReplyString = 0,
  kReplyError = 1,
  kReplyInteger = 2,
  kReplyArray = 3,
  kReplyNull = 4,
};

// What a type does with its values; the first version of the structure, which every server knows.
struct TypeMethods {
  uint64_t version = 1;
  void* (*load)(Stream*, int encoding) = nullptr;
  void (*save)(Stream*, void* value) = nullptr;
  void (*rewrite)(Stream*, String* key, void* value) = nullptr;
  size_t (*memory)(const void* value) = nullptr;
  void (*digest)(RedisModuleDigest*, void* value) = nullptr;
  void (*release)(void* value) = nullptr;
};

// clang-format off
#define ENGINE_MODULE_API(USED, OPTIONAL)                                                          \
  USED(void, SetModuleAttribs, (Context*, const char* name, int version, int api))                 \
  USED(int, IsModuleNameBusy, (const char* name))                                                  \
  USED(void, SetModuleOptions, (Context*, int options))                                            \
  USED(int, CreateCommand, (Context*, const char* name, CommandFunction, const char* flags,        \
                            int first_key, int last_key, int step))                                \
  USED(Type*, CreateDataType, (Context*, const char* name, int encoding, TypeMethods*))            \
  USED(int, WrongArity, (Context*))                                                                \
  USED(int, ReplyWithLongLong, (Context*, long long))                                              \
  USED(int, ReplyWithDouble, (Context*, double))                                                   \
  USED(int, ReplyWithError, (Context*, const char*))                                               \
  USED(int, ReplyWithSimpleString, (Context*, const char*))                                        \
  USED(int, ReplyWithStringBuffer, (Context*, const char*, size_t))                                \
  USED(int, ReplyWithArray, (Context*, long))                                                      \
  USED(int, ReplyWithNull, (Context*))                                                             \
  USED(const char*, StringPtrLen, (const String*, size_t*))                                        \
  USED(String*, CreateString, (Context*, const char*, size_t))                                     \
  USED(void, FreeString, (Context*, String*))                                                      \
  USED(Key*, OpenKey, (Context*, String*, int mode))                                               \
  USED(void, CloseKey, (Key*))                                                                     \
  USED(int, KeyType, (Key*))                                                                       \
  USED(int, DeleteKey, (Key*))                                                                     \
  USED(Type*, ModuleTypeGetType, (Key*))                                                           \
  USED(void*, ModuleTypeGetValue, (Key*))                                                          \
  USED(int, ModuleTypeSetValue, (Key*, Type*, void*))                                              \
  USED(int, GetSelectedDb, (Context*))                                                             \
  USED(int, GetContextFlags, (Context*))                                                           \
  USED(int, Replicate, (Context*, const char* command, const char* format, ...))                   \
  USED(int, ReplicateVerbatim, (Context*))                                                         \
  USED(ServerInfo*, GetServerInfo, (Context*, const char* section))                                \
  USED(void, FreeServerInfo, (Context*, ServerInfo*))                                              \
  USED(long long, ServerInfoGetFieldSigned, (ServerInfo*, const char* field, int* error))          \
  USED(BlockedClient*, BlockClient, (Context*, CommandFunction reply, CommandFunction timeout,     \
                                     void (*release)(Context*, void*), long long timeout_ms))      \
  USED(int, UnblockClient, (BlockedClient*, void* private_data))                                   \
  USED(void*, GetBlockedClientPrivateData, (Context*))                                             \
  USED(Context*, GetThreadSafeContext, (BlockedClient*))                                           \
  USED(void, FreeThreadSafeContext, (Context*))                                                    \
  USED(void, ThreadSafeContextLock, (Context*))                                                    \
  USED(void, ThreadSafeContextUnlock, (Context*))                                                  \
  USED(int, SelectDb, (Context*, int))                                                             \
  USED(Reply*, Call, (Context*, const char* command, const char* format, ...))                     \
  USED(int, CallReplyType, (Reply*))                                                               \
  USED(const char*, CallReplyStringPtr, (Reply*, size_t*))                                         \
  USED(long long, CallReplyInteger, (Reply*))                                                      \
  USED(size_t, CallReplyLength, (Reply*))                                                          \
  USED(Reply*, CallReplyArrayElement, (Reply*, size_t))                                            \
  USED(void, FreeCallReply, (Reply*))                                                              \
  USED(void, SaveUnsigned, (Stream*, uint64_t))                                                    \
  USED(uint64_t, LoadUnsigned, (Stream*))                                                          \
  USED(void, SaveStringBuffer, (Stream*, const char*, size_t))                                     \
  USED(char*, LoadStringBuffer, (Stream*, size_t*))                                                \
  USED(int, IsIOError, (Stream*))                                                                  \
  USED(const String*, GetKeyNameFromIO, (Stream*))                                                 \
  USED(void, EmitAOF, (Stream*, const char* command, const char* format, ...))                     \
  USED(void, Log, (Context*, const char* level, const char* format, ...))                          \
  USED(void*, Alloc, (size_t))                                                                     \
  USED(void, Free, (void*))                                                                        \
  USED(int, IsKeysPositionRequest, (Context*))                                                     \
  USED(void, KeyAtPos, (Context*, int))                                                            \
  USED(int, RegisterInfoFunc, (Context*, void (*)(Info*, int for_crash_report)))                   \
  USED(int, InfoAddSection, (Info*, const char*))                                                  \
  USED(int, InfoAddFieldCString, (Info*, const char* field, const char* value))                    \
  USED(int, InfoAddFieldULongLong, (Info*, const char* field, unsigned long long value))           \
  USED(int, SubscribeToServerEvent, (Context*, Event, EventFunction))                              \
  USED(int, GetServerVersion, ())                                                                  \
  OPTIONAL(void*, TryAlloc, (size_t))                                                              \
  OPTIONAL(int, EventLoopAddOneShot, (void (*)(void*), void*))                                     \
  OPTIONAL(int, GetDbIdFromIO, (Stream*))                                                          \
  OPTIONAL(Command*, GetCommand, (Context*, const char*))                                          \
  OPTIONAL(int, AddACLCategory, (Context*, const char*))                                           \
  OPTIONAL(int, SetCommandACLCategories, (Command*, const char*))                                  \
  OPTIONAL(String*, GetCurrentUserName, (Context*))                                                \
  OPTIONAL(User*, GetModuleUserFromUserName, (String*))                                            \
  OPTIONAL(void, FreeModuleUser, (User*))                                                          \
  OPTIONAL(int, ACLCheckCommandPermissions, (User*, String**, int))
// clang-format on

#define ENGINE_DECLARE(result, name, arguments) inline result(*name) arguments = nullptr;
ENGINE_MODULE_API(ENGINE_DECLARE, ENGINE_DECLARE)
#undef ENGINE_DECLARE

// Looks all of them up. False when the server lacks one that is not optional.
inline bool load(Context* context) {
  using Lookup = int (*)(const char*, void*);
  const auto lookup = reinterpret_cast<Lookup>(reinterpret_cast<void**>(context)[0]);
  bool complete = true;
#define ENGINE_USED(result, name, arguments) \
  complete &= lookup("RedisModule_" #name, reinterpret_cast<void*>(&name)) == kOk;
#define ENGINE_OPTIONAL(result, name, arguments) \
  lookup("RedisModule_" #name, reinterpret_cast<void*>(&name));
  ENGINE_MODULE_API(ENGINE_USED, ENGINE_OPTIONAL)
#undef ENGINE_USED
#undef ENGINE_OPTIONAL
  return complete;
}

}  // namespace server
