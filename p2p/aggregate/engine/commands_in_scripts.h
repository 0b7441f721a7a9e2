// The server's commands, as a running script calls them: `redis.execute`.
#pragma once

#include <ATen/core/ivalue.h>

#include <string>
#include <vector>

#include "module_api.h"

namespace engine {

class Commands {
 public:
  // On behalf of a user (empty: the server has no users to check), in a database.
  Commands(std::string user, int database) : user_(std::move(user)), database_(database) {}

  // Waits for the server's main thread. Throws std::runtime_error with the server's error.
  c10::IValue execute(const std::vector<std::string>& words);

 private:
  c10::IValue call(const std::vector<std::string>& words) const;

  std::string user_;
  int database_;
};

}  // namespace engine
