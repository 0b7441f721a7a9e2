#include "commands_in_scripts.h"

#include <ATen/core/List.h>
#include <ATen/core/jit_type.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <exception>
#include <functional>
#include <future>
#include <memory>
#include <stdexcept>

#include "arguments.h"

namespace engine {
namespace {

// What would act on the connection, which a script has none of, or on the server as a whole. SCRIPT
// and FUNCTION: a Valkey that forgets its Lua scripts away from its main thread waits for itself.
// WAIT: Redis 7.0 blocks even a client that cannot be, and ends.
constexpr std::array kRefused{
    "AI.SCRIPTEXECUTE", "AI.DAGEXECUTE", "AI.DAGEXECUTE_RO", "SHUTDOWN",  "DEBUG",
    "MONITOR",          "SUBSCRIBE",     "PSUBSCRIBE",       "SSUBSCRIBE", "SYNC",
    "PSYNC",            "MODULE",        "FAILOVER",         "REPLICAOF",  "SLAVEOF",
    "SCRIPT",           "FUNCTION",      "WAIT",             "WAITAOF",
};

// A context that belongs to no client. Whoever has one holds the server's lock.
class Detached {
 public:
  explicit Detached(int database) : context_(server::GetThreadSafeContext(nullptr)) {
    server::SelectDb(context_, database);
  }
  ~Detached() { server::FreeThreadSafeContext(context_); }
  Detached(const Detached&) = delete;
  Detached& operator=(const Detached&) = delete;
  server::Context* get() const { return context_; }

 private:
  server::Context* context_;
};

// Since this version a command called in an event of the server's loop is passed on to replicas and
// to the log at once. Redis 7.0 leaves it for later, and then ends over what is left.
constexpr int kEventsPassOn = 0x00070200;

void under_lock(const std::function<void()>& body) {
  server::Context* context = server::GetThreadSafeContext(nullptr);
  server::ThreadSafeContextLock(context);
  body();
  server::ThreadSafeContextUnlock(context);
  server::FreeThreadSafeContext(context);
}

void on_main_thread(const std::function<void()>& body) {
  struct Visit {
    const std::function<void()>& body;
    std::promise<void> over;
  };
  Visit visit{body, {}};
  server::EventLoopAddOneShot(
      [](void* argument) {
        auto* visit = static_cast<Visit*>(argument);
        visit->body();
        visit->over.set_value();
      },
      &visit);
  visit.over.get_future().wait();
}

// Runs it as the server's only activity, and waits for it. On another thread than its main one, a
// newer server may wait for itself: Valkey 9 does when it forgets Lua scripts, as it does after many
// EVALs. An older one must be asked on another thread.
void alone(const std::function<void()>& body) {
  if (server::EventLoopAddOneShot != nullptr && server::GetServerVersion() >= kEventsPassOn) {
    on_main_thread(body);
  } else {
    under_lock(body);
  }
}

void check_permission(server::Context* context, const std::string& user, Words& words) {
  if (user.empty()) return;
  server::String* name = server::CreateString(context, user.data(), user.size());
  server::User* known = server::GetModuleUserFromUserName(name);
  server::FreeString(context, name);
  if (known == nullptr) throw std::runtime_error("NOPERM the script's user is gone");
  const int verdict =
      server::ACLCheckCommandPermissions(known, words.all(), static_cast<int>(words.count()));
  server::FreeModuleUser(known);
  if (verdict != server::kOk && errno != ENOENT && errno != EINVAL) {
    throw std::runtime_error("NOPERM this user has no permissions to run the command of the script");
  }
}

constexpr int kDepthLimit = 100;

c10::IValue value_of(server::Reply* reply, int depth = 0) {
  size_t length = 0;
  switch (server::CallReplyType(reply)) {
    case server::kReplyString: {
      const char* text = server::CallReplyStringPtr(reply, &length);
      return std::string(text, strnlen(text, length));
    }
    case server::kReplyError: {
      const char* text = server::CallReplyStringPtr(reply, &length);
      throw std::runtime_error("Redis command returned an error: " + std::string(text, length));
    }
    case server::kReplyInteger:
      return static_cast<int64_t>(static_cast<int32_t>(server::CallReplyInteger(reply)));
    case server::kReplyArray: {
      if (depth > kDepthLimit) throw std::runtime_error("Redis reply is nested too deeply");
      c10::impl::GenericList list(c10::AnyType::get());
      for (size_t i = 0; i < server::CallReplyLength(reply); ++i) {
        list.push_back(value_of(server::CallReplyArrayElement(reply, i), depth + 1));
      }
      return list;
    }
    default:
      return {};
  }
}

}  // namespace

c10::IValue Commands::execute(const std::vector<std::string>& words) {
  for (const char* refused : kRefused) {
    if (same_word(words.front(), refused)) {
      throw std::runtime_error(
          "Redis command returned an error: ERR " + std::string(refused) +
          " cannot be called from within a script");
    }
  }
  c10::IValue value;
  std::exception_ptr failed;
  alone([&] {
    try {
      value = call(words);
    } catch (...) {
      failed = std::current_exception();
    }
  });
  if (failed) std::rethrow_exception(failed);
  return value;
}

c10::IValue Commands::call(const std::vector<std::string>& words) const {
  const Detached context(database_);
  Words strings(context.get(), words);
  check_permission(context.get(), user_, strings);
  errno = 0;
  const std::unique_ptr<server::Reply, void (*)(server::Reply*)> reply(
      server::Call(
          context.get(), words.front().c_str(), "!v", strings.all() + 1, strings.count() - 1),
      [](server::Reply* given) { server::FreeCallReply(given); });
  if (reply == nullptr) {
    throw std::runtime_error(
        "Redis command returned an error: " + std::string(std::strerror(errno)));
  }
  return value_of(reply.get());
}

}  // namespace engine
