// Keys that hold scripts, and what AI.INFO knows of them by name.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "module_api.h"
#include "scripts.h"

namespace engine::keys {

void register_script_type(server::Context* context);

// Throws CommandError: no key, or one of another type.
std::shared_ptr<Script> get_script(server::Context* context, server::String* name);

// Throws CommandError if the key is of another type.
void set_script(server::Context* context, server::String* name, std::shared_ptr<Script> script);

// Tells the log and the replicas what was stored.
void replicate_script(server::Context* context, server::String* name, const Script& script);

void delete_script(server::Context* context, server::String* name);

// The script that was stored under this name and still lives, wherever it is now; or null.
std::shared_ptr<Script> stored_as(server::Context* context, server::String* name);

// Names and tags of all of them in this database.
std::vector<std::pair<std::string, std::string>> all_scripts(server::Context* context);

}  // namespace engine::keys
