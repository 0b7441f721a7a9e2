#include "executions.h"

namespace engine {
namespace {

// All of what the plan leaves, or nothing. Throws CommandError if a key holds something else.
void store(server::Context* context, Plan& plan) {
  if ((server::GetContextFlags(context) & server::kReplica) != 0) {
    throw CommandError("READONLY You can't write against a read only replica.");
  }
  for (const std::string& kept : plan.kept) {
    if (!keys::can_set_tensor(context, Word(context, kept).get())) throw CommandError(kWrongType);
  }
  for (const std::string& kept : plan.kept) {
    const Word name(context, kept);
    StoredTensor& tensor = plan.tensors.at(kept);
    keys::replicate_tensor(context, name.get(), tensor);
    keys::set_tensor(context, name.get(), tensor);
  }
}

void answer(server::Context* context, const Outcome& outcome) {
  switch (outcome.kind) {
    case Outcome::kNotRun: server::ReplyWithSimpleString(context, "NA"); break;
    case Outcome::kDone: server::ReplyWithSimpleString(context, "OK"); break;
    case Outcome::kFound: reply_with(context, outcome.tensor, outcome.format); break;
    case Outcome::kFailed: server::ReplyWithError(context, outcome.error.c_str()); break;
  }
}

void answer_script(server::Context* context, Plan& plan) {
  if (plan.error() != nullptr) throw CommandError(*plan.error());
  store(context, plan);
  server::ReplyWithSimpleString(context, "OK");
}

void answer_dag(server::Context* context, Plan& plan) {
  std::string not_stored;
  if (plan.error() == nullptr && !plan.kept.empty()) {
    try {
      store(context, plan);
    } catch (const CommandError& error) {
      not_stored = error.what();
    }
  }
  const size_t count = plan.outcomes.size() + (not_stored.empty() ? 0 : 1);
  server::ReplyWithArray(context, static_cast<long>(count));
  for (const Outcome& outcome : plan.outcomes) answer(context, outcome);
  if (!not_stored.empty()) server::ReplyWithError(context, not_stored.c_str());
}

// Empty where the server does not tell, or cannot check what a user may do.
std::string user_of(server::Context* context) {
  if (server::GetCurrentUserName == nullptr || server::GetModuleUserFromUserName == nullptr ||
      server::ACLCheckCommandPermissions == nullptr) {
    return {};
  }
  server::String* name = server::GetCurrentUserName(context);
  if (name == nullptr) return {};
  std::string user(text_of(name));
  server::FreeString(context, name);
  return user;
}

}  // namespace

Execution::Execution(server::Context* context, Plan plan)
    : plan_(std::move(plan)), commands_(user_of(context), server::GetSelectedDb(context)) {}

void Execution::finish(server::Context* context) {
  plan_.is_dag ? answer_dag(context, plan_) : answer_script(context, plan_);
}

}  // namespace engine
