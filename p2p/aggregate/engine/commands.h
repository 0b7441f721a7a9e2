// The commands that clients work with: tensors and scripts are stored, shown, deleted and run.
//
// Each replies, or throws what becomes the reply: CommandError, ArityError or an error of torch.
#pragma once

#include "arguments.h"
#include "module_api.h"

namespace engine::commands {

void tensor_set(server::Context* context, Arguments words);
void tensor_get(server::Context* context, Arguments words);

void script_store(server::Context* context, Arguments words);
void script_get(server::Context* context, Arguments words);
void script_delete(server::Context* context, Arguments words);

void script_execute(server::Context* context, Arguments words);
void dag_execute(server::Context* context, Arguments words);
void dag_execute_read_only(server::Context* context, Arguments words);

}  // namespace engine::commands
