// What the engine tells of itself and of its scripts, to those who look after a server.
//
// The commands reply, or throw what becomes the reply: CommandError or ArityError.
#pragma once

#include "arguments.h"
#include "module_api.h"

namespace engine::introspection {

// How often and how long a script ran.
void info(server::Context* context, Arguments words);

// Settings of RedisAI that change nothing here.
void config(server::Context* context, Arguments words);

void script_scan(server::Context* context, Arguments words);

// There are no models: the reply is empty.
void model_scan(server::Context* context, Arguments words);

// The engine's sections of the server's INFO.
void module_info(server::Info* info, int for_crash_report);

}  // namespace engine::introspection
