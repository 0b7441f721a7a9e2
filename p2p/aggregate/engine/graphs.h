// What is checked in a script before it ever runs. All of these throw CommandError.
#pragma once

#include <string>
#include <vector>

namespace torch::jit {
struct Function;
}

namespace engine::graphs {

// The compiler takes twice as long for each bracket that a tuple is deeper nested.
void check_nesting(const std::string& source);

// Refuses what may harm the server, and puts in what ends a script that runs too long.
void hold(const std::vector<torch::jit::Function*>& functions);

}  // namespace engine::graphs
